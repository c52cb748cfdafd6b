"Checkpoints under hard conditions: killed and concurrent writers, damage in every bit, random configurations"
import copy, json, os, random, subprocess, sys, threading, time
from itertools import product
import pytest
import torch
from reformer_nb.atomic import write_atomic
from reformer_nb.checkpoints import encode_config, load_pretrained, named_tensors, save_pretrained
from reformer_nb.language_model import ReformerLM
from reformer_nb.self_attention import LSHSelfAttention
from torch import nn
from torch.nn.utils import parametrizations
from grids import sample

sizes = dict(num_tokens=61, dim=24, depth=2, max_seq_len=40, heads=3, dim_head=8, bucket_size=5, n_hashes=2,
             causal=True)

def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return ReformerLM(**{**sizes, **options}).eval()

def same(a, b): torch.testing.assert_close(a, b, rtol=0, atol=0)

def same_weights(a, b): return all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters(), strict=True))

# ---- killed writers ------------------------------------------------------------------------------------------------

writer = '''
import sys, time
import reformer_nb.checkpoints as c
models = [c.load_pretrained(o) for o in sys.argv[3:]]   # to save in turns

if sys.argv[2]=='half':
    real = c.save_file
    def save_half(tensors, path, metadata):
        "Write the first half, then wait to be killed"
        real(tensors, path, metadata)
        with open(path, 'rb+') as f: f.truncate(path.stat().st_size//2)
        print('started', flush=True)
        time.sleep(60)
    c.save_file = save_half
else: print('started', flush=True)

while True:
    for model in models: c.save_pretrained(model, sys.argv[1])
'''

def start_writer(folder, how, *models):
    cmd = [sys.executable, '-c', writer, str(folder), how, *map(str, models)]
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, text=True)

def kill_when_started(process, delay=0.):
    "Wait until the writer writes, and `delay` seconds longer; then it has no chance to clean up"
    assert process.stdout.readline().strip()=='started'
    time.sleep(delay)
    assert process.poll() is None
    process.kill()
    process.wait()

def test_killed(tmp_path):
    wide = dict(dim=192, heads=4, dim_head=48)   # a save takes long enough to be hit
    models = [new_model(0, **wide), new_model(1, **wide), new_model(1, **wide, n_buckets=8)]
    sources,targets = [tmp_path/f'model{k}' for k in range(3)],[tmp_path/f'run{k}' for k in range(3)]
    for model,folder in zip(models, sources): save_pretrained(model, folder)
    for folder in targets: save_pretrained(models[0], folder)
    half = start_writer(targets[0], 'half', sources[1])
    loops = [start_writer(o, 'loop', *sources) for o in targets[1:]]

    kill_when_started(half)
    assert same_weights(load_pretrained(targets[0]), models[0])
    left, = targets[0].glob('*.part')
    os.utime(left, (0, time.time()-4000))
    save_pretrained(models[1], targets[0])   # the next writer tidies up
    assert sorted(o.name for o in targets[0].iterdir()) == ['config.json', 'model.safetensors']

    for process,folder,delay in zip(loops, targets[1:], (.13, .29)):
        kill_when_started(process, delay)
        back = load_pretrained(folder)
        assert any(encode_config(back)==encode_config(o) and same_weights(back, o) for o in models)

# ---- writers side by side ------------------------------------------------------------------------------------------

def test_concurrent(tmp_path):
    "Threads replace one file and read it; each reading is one of the contents, whole"
    path,contents,seen = tmp_path/'x',[c*200_000 for c in 'abcd'],[]
    path.write_text(contents[0])
    def work(content):
        for _ in range(20):
            write_atomic(path, lambda part: part.write_text(content))
            seen.append(path.read_text())
    threads = [threading.Thread(target=work, args=(o,)) for o in contents]
    for o in threads: o.start()
    for o in threads: o.join()
    assert len(seen)==80 and set(seen) <= set(contents)
    assert os.listdir(tmp_path) == ['x']

def test_reader_during_write(tmp_path):
    path,seen = tmp_path/'x',[]
    path.write_text('old')
    def write(part):
        part.write_text('ne')
        seen.append(path.read_text())
        part.write_text('new')
    write_atomic(path, write)
    assert seen==['old'] and path.read_text()=='new'

@pytest.mark.skipif(os.name!='posix', reason='modes of files')
def test_mode(tmp_path):
    "Others may read a checkpoint as they may read any new file"
    (tmp_path/'plain').touch()
    write_atomic(tmp_path/'x', lambda path: path.write_text('x'))
    assert (tmp_path/'x').stat().st_mode==(tmp_path/'plain').stat().st_mode

def test_name_taken(tmp_path):
    (tmp_path/'x').mkdir()
    with pytest.raises(OSError): write_atomic(tmp_path/'x', lambda path: path.write_text('x'))
    assert os.listdir(tmp_path) == ['x']

# ---- damage --------------------------------------------------------------------------------------------------------

def test_every_bit(tmp_path):
    "One line for each damaged file, and never a model"
    save_pretrained(ReformerLM(11, 8, 1, 8, heads=1, dim_head=8, bucket_size=4), tmp_path)
    (tmp_path/'config.json').unlink()
    file = tmp_path/'model.safetensors'
    whole = file.read_bytes()
    header = 8+int.from_bytes(whole[:8], 'little')
    places = sample(product(range(header), range(8)), 1500) + sample(product(range(header, len(whole)), range(8)), 500)
    for k,bit in places:
        file.write_bytes(whole[:k] + bytes([whole[k] ^ 2**bit]) + whole[k+1:])
        with pytest.raises(ValueError, match=r'\A[^\n]+; [^\n]+\Z'): load_pretrained(tmp_path)
    for k in sample(range(len(whole)), 100):
        file.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=r'\A[^\n]+; [^\n]+\Z'): load_pretrained(tmp_path)

@pytest.mark.parametrize('junk', [b'', b'\0'*8, b'\xff'*64, b'not a checkpoint', b'\x80\x04}.', b'\x02'+b'\0'*7+b'{}'])
def test_junk(tmp_path, junk):
    (tmp_path/'model.safetensors').write_bytes(junk)
    with pytest.raises(ValueError, match='is damaged|holds no configuration'): load_pretrained(tmp_path)

def test_pickle_is_not_opened(tmp_path):
    "A file that would act when unpickled does not act"
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save(Trap(), tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match='is damaged'): load_pretrained(tmp_path)
    assert not (tmp_path/'ran').exists()

# ---- round trips ---------------------------------------------------------------------------------------------------

options = dict(heads=(2,), dim_head=(None,), bucket_size=(4,), n_hashes=(3,), emb_dim=(10,),
    weight_tie_embedding=(True,), weight_tie=(True,), ff_chunks=(3,), ff_mult=(2,), ff_activation=(nn.ReLU,nn.PReLU),
    ff_glu=(True,), lsh_dropout=(.1,), ff_dropout=(.1,), post_attn_dropout=(.1,), layer_dropout=(.3,),
    lsh_attend_across_buckets=(False,), lsh_allow_duplicate_attention=(False,), use_full_attn=(True,),
    full_attn_thres=(20,), reverse_thres=(64,), n_buckets=(8,(2,4)), look_back=('round','rounds'),
    scale=(.5,), hash_seed=(9,), rotations=('fixed',))
positions = [{}, dict(absolute_position_emb=True), dict(fixed_position_emb=True), dict(axial_position_emb=True),
             dict(axial_position_emb=True, axial_position_shape=(5,8))]

def random_options(seed):
    rng = random.Random(seed)
    picked = {k: rng.choice(options[k]) for k in rng.sample(sorted(options), rng.randrange(len(options)//2))}
    return {**picked, **rng.choice(positions)}

@pytest.mark.parametrize('seed', sample(range(200), 14))
def test_round_trip(tmp_path, seed):
    "Two training passes before saving; then outputs, losses and gradients of both are the same bits"
    tokens = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(seed))
    def training(model):
        torch.manual_seed(seed)   # of dropout
        loss = model.train().loss(tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]
    model = new_model(seed, **random_options(seed)).to((torch.float32, torch.float64)[seed%2])
    for _ in range(2): training(model)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path, ReformerLM)
    assert back.config==model.config and back.state_dict().keys()==model.state_dict().keys()
    same(back(tokens), model.eval()(tokens))
    for a,b in zip(training(back), training(model), strict=True): assert a is b is None or torch.equal(a, b)

@pytest.mark.parametrize('tie', (False, True))
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(tmp_path, tie, dtype):
    model = new_model(weight_tie=tie).to(dtype)
    save_pretrained(model, tmp_path)
    torch.set_default_dtype(torch.float64)   # is of no account
    try: back = load_pretrained(tmp_path)
    finally: torch.set_default_dtype(torch.float32)
    assert named_tensors(back).keys()==named_tensors(model).keys()
    for k,o in named_tensors(model).items(): same(named_tensors(back)[k], o)

def test_same_file_for_same_model(tmp_path):
    "What is stored does not depend on the process: the fingerprint of equal models is equal"
    for k in range(2): save_pretrained(new_model(), tmp_path/str(k))
    raw = [(tmp_path/str(k)/'model.safetensors').read_bytes() for k in range(2)]
    prints = [json.loads(o[8:8+int.from_bytes(o[:8], 'little')])['__metadata__']['sha256'] for o in raw]
    assert prints[0]==prints[1]

# ---- a model that is no longer the one of its arguments ------------------------------------------------------------

def tie(model): model.to_logits.weight = model.token_emb.weight
def normalise(model): parametrizations.weight_norm(attention(model).toqk)
def untie(model):
    block = model.reformer.layers.blocks[1]
    block[0].fn = copy.deepcopy(block[0].fn)
def widen(model): model.to_logits = nn.Linear(24, 62)
def take_away(model): model.to_logits.bias = None
def attention(model): return next(o for o in model.modules() if isinstance(o, LSHSelfAttention))

@pytest.mark.parametrize('change,options,says', [
    (tie, dict(), r"to_logits.weight is the same tensor as token_emb.weight.*weight_tie_embedding='plain'"),
    (normalise, dict(), r'toqk.parametrizations.weight.original0.*remove_parametrizations first'),
    (untie, dict(weight_tie=True), r'toqk.weight is a tensor of its own.*torch.save'),
    (widen, dict(), r'to_logits.weight has shape \(62, 24\), .* \(61, 24\).*torch.save'),
    (take_away, dict(), 'to_logits.bias is missing.*torch.save')], ids=lambda o: getattr(o, '__name__', None))
def test_what_could_not_be_read_back_is_not_written(tmp_path, change, options, says):
    "Refused while the model is still in memory; what was saved before stays"
    model = new_model(**options)
    change(model)
    with pytest.raises(ValueError, match=says) as told: save_pretrained(model, tmp_path/'new')
    assert not (tmp_path/'new').exists() and '\n' not in str(told.value)
    save_pretrained(new_model(3), tmp_path)
    with pytest.raises(ValueError, match=says): save_pretrained(model, tmp_path)
    same(load_pretrained(tmp_path).norm.weight, new_model(3).norm.weight)

def test_the_remedies_work(tmp_path):
    "A parametrization that was removed, embeddings that are tied by an argument; and saving draws no random numbers"
    model,tokens = new_model(),torch.randint(61, (2, 37))
    normalise(model)
    nn.utils.parametrize.remove_parametrizations(attention(model).toqk, 'weight')
    for o in (model, new_model(weight_tie_embedding='plain')):
        before = torch.get_rng_state()
        save_pretrained(o, tmp_path)
        assert torch.equal(torch.get_rng_state(), before)
        same(load_pretrained(tmp_path)(tokens), o.eval()(tokens))

def test_saving_is_no_slower_for_the_check():
    "The compiler of PyTorch is not loaded for it"
    code = 'import sys, tempfile; from reformer_nb import ReformerLM; ReformerLM(11, 16, 2, 32, heads=2, num_mem_kv=2, pkm_layers=(2,), axial_position_emb=True).save_pretrained(tempfile.mkdtemp()); print([o for o in sys.modules if o.startswith(("sympy", "torch._dynamo", "torch._inductor"))])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout=='[]\n'
