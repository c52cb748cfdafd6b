"Runs under hard conditions: killed at random moments, spread over processes, on a full disk"
import json, math, os, random, shutil, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import Program
from reformer_nb.batches import segment_at
from reformer_nb.checkpoints import read_weights
from reformer_nb.data import Corpus
from reformer_nb.language_model import ReformerLM
from reformer_nb.run_state import read_checkpoint
from reformer_nb.trainer import Trainer
from reformer_nb.training import TrainSettings, bits_per_byte, learning_rate, make_optimizer

common = textwrap.dedent('''
    import json, os, sys, torch
    from accelerate import Accelerator
    from reformer_nb.data import Corpus
    from reformer_nb.language_model import ReformerLM
    from reformer_nb.trainer import Trainer
    from reformer_nb.training import TrainSettings
    torch.set_num_threads(1)
    def corpus():
        generator = torch.Generator().manual_seed(0)
        words = [torch.randint(97, 123, (5,), generator=generator) for _ in range(40)]
        text = torch.cat([words[i] for i in torch.randint(40, (2000,), generator=generator).tolist()]).to(torch.uint8)
        return Corpus('words', text[:8000], text[8000:9000], text[9000:])
    def model(**options):
        torch.manual_seed(0)
        return ReformerLM(128, 16, 2, 64, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal=True, **options)
    class Loud(Trainer):
        "Tells when a step, with its checkpoint, is done"
        def one_step(self, start):
            super().one_step(start)
            print('step', flush=True)
''')

def run(folder, code, *words): return Program(folder.parent/'said', code, folder, *words).end()

def curve(folder, key='bits_per_byte'):
    records = [json.loads(l) for l in (folder/'metrics.jsonl').read_text().splitlines()]
    return [o[key] for o in records if key in o]

def same_run(a, b):
    for key in ('bits_per_byte', 'valid'): assert curve(a, key)==curve(b, key)
    assert same_weights(a, b)

def same_weights(a, b):
    a,b = (read_weights(o/'model.safetensors')[0] for o in (a, b))
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- killed --------------------------------------------------------------------------------------------------------

steady = common + textwrap.dedent('''
    settings = TrainSettings(seq_len=64, batch_size=2, steps=50, save_every=1, eval_every=7, eval_windows=2)
    trainer = Loud(model(ff_dropout=.1, lsh_dropout=.1), corpus(), settings, out=sys.argv[1], show=False)
    print('ready', flush=True)
    trainer.fit(resume=True)
''')

def killed(rng, folder, code, *words):
    "Whether a run was ended by SIGKILL, after a few steps and some milliseconds"
    p = Program(folder.parent/'said', code, folder, *words)
    steps = rng.randrange(4)
    p.wait_for('step' if steps else 'ready', max(1, steps))
    time.sleep(rng.uniform(0, .05))
    p.process.kill()
    return p.end()[0]==-signal.SIGKILL

def test_killed_at_random_moments_and_resumed(tmp_path):
    "A checkpoint is written after each step, so that most kills come while one is being written"
    assert run(tmp_path/'whole', steady)[0]==0
    rng = random.Random(0)
    assert all([killed(rng, tmp_path/'killed', steady) for _ in range(10)])
    assert run(tmp_path/'killed', steady)[0]==0
    same_run(tmp_path/'killed', tmp_path/'whole')
    assert len(curve(tmp_path/'whole'))==50
    assert len(list((tmp_path/'killed'/'checkpoints').iterdir()))<=4   # two, the best, and what one kill may leave

def test_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    assert run(tmp_path/'hurt', steady.replace('steps=50', 'steps=10'))[0]==0
    newest = max((tmp_path/'hurt'/'checkpoints').glob('step-*'))
    newest.write_bytes(newest.read_bytes()[:-100])
    code,_,complaint = run(tmp_path/'hurt', steady.replace('steps=50', 'steps=14'))
    assert code==0 and 'going back to the checkpoint before' in complaint
    assert len(curve(tmp_path/'hurt'))==14

rough = common + textwrap.dedent('''
    how = json.loads(sys.argv[2])
    settings = TrainSettings(seq_len=64, batch_size=4, steps=24, save_every=8, pieces=2, clip=.5, lr=.02, **how)
    if 'dies' in sys.argv:
        class Loud(Loud):
            def one_step(self, start):
                if self.step==13: os.kill(os.getpid(), 9)
                super().one_step(start)
    seen = []
    net = model(ff_dropout=.1)
    trainer = Loud(net, corpus(), settings, out=sys.argv[1], show=False)
    device = trainer.accelerator.device.type
    def note(layer, *_): seen.extend((layer.weight.dtype, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None))
    net.norm.register_forward_hook(note)
    trainer.fit(resume=True)
    print(*{str(o) for o in seen})
''')
ways = dict(adafactor=dict(optimizer='adafactor'), bf16=dict(precision='bf16'), both=dict(optimizer='adafactor', precision='bf16'))

@pytest.mark.parametrize('how', [*ways.values(), pytest.param(dict(precision='fp16'), marks=pytest.mark.cuda)], ids=[*ways, 'fp16'])
def test_learns_and_resumes_in_every_way(tmp_path, how):
    "Weights stay float32; autocast is on where it was asked for; with fp16 the scale of the gradients is part of a checkpoint"
    code,said,complaint = run(tmp_path/'whole', rough, json.dumps(how))
    assert code==0, complaint
    types = dict(bf16={'torch.bfloat16'}, fp16={'torch.float16'}).get(how.get('precision'), {'None'})
    assert set(said.replace('step', '').split())=={'torch.float32'} | types
    assert run(tmp_path/'killed', rough, json.dumps(how), 'dies')[0]==-signal.SIGKILL
    assert run(tmp_path/'killed', rough, json.dumps(how))[0]==0
    losses = curve(tmp_path/'whole')
    assert len(losses)==24 and losses[-1]<losses[0]-.5
    if torch.cuda.is_available(): assert curve(tmp_path/'killed')==pytest.approx(losses, abs=1e-2)
    else: same_run(tmp_path/'killed', tmp_path/'whole')

@pytest.mark.skipif(torch.accelerator.is_available(), reason='there is a device that has fp16')
def test_fp16_needs_a_device():
    with pytest.raises(ValueError, match=r"\Aprecision='fp16' [^\n]*; use 'bf16'[^\n]*\Z"):
        Trainer(strict_model(), words, replace(drawn, precision='fp16', tensorboard=False), show=False)

def forget(folder, after):
    "As if the run had been killed after this step; what it wrote then is the whole run's"
    for path in (folder/'checkpoints').glob('step-*'):
        if int(path.stem[5:])>after: path.unlink()

def lazy_model(skip=.8, **options):
    "Whose blocks are skipped most of the time"
    torch.manual_seed(0)
    return ReformerLM(128, 16, 4, 64, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal=True, layer_dropout=skip, **options)

@pytest.mark.parametrize('optimizer', ['adamw', 'adafactor'])
def test_resumes_with_blocks_that_no_step_has_used(tmp_path, optimizer):
    "Their weights have no averages in a checkpoint, and get none"
    s = TrainSettings(seq_len=64, batch_size=2, steps=12, save_every=2, keep=9, optimizer=optimizer)
    def fit(folder): return Trainer(lazy_model(), words, s, out=folder, show=False).fit(resume=True)
    fit(tmp_path/'whole'), shutil.copytree(tmp_path/'whole', tmp_path/'again')
    forget(tmp_path/'again', after=2)
    tensors = read_checkpoint(tmp_path/'again'/'checkpoints'/'step-000000002.safetensors')[0]
    known = {k.split('.', 1)[1].rpartition('.')[0] for k in tensors if k.startswith('optimizer.')}
    assert 0<len(known)<len([*lazy_model().parameters()])
    fit(tmp_path/'again')
    same_run(tmp_path/'again', tmp_path/'whole')
    last = [read_checkpoint(tmp_path/o/'checkpoints'/'step-000000012.safetensors')[0] for o in ('again', 'whole')]
    assert last[0].keys()==last[1].keys() and all(torch.equal(o, last[1][k]) for k,o in last[0].items())

@pytest.mark.parametrize('first', [False, True], ids=['thawed', 'frozen'])
def test_resumes_with_other_weights_frozen(tmp_path, first):
    "Weights that begin to learn have no averages yet; those that no longer learn stay as they are"
    before = None
    for steps,learns in ((2, first), (4, not first)):
        model = lazy_model(skip=0.)
        weight = model.token_emb.weight.requires_grad_(learns)
        trainer = Trainer(model, words, TrainSettings(seq_len=64, batch_size=2, steps=steps), out=tmp_path, show=False)
        assert len(trainer.fit(resume=True))==steps
        if before is not None: assert torch.equal(before, weight) is first
        before = weight.detach().clone()
    assert {int(o['step']) for p,o in trainer.opt.state.items() if p is weight}==({2} if learns else set())

# ---- texts that go on -----------------------------------------------------------------------------------------------

going_on = common + textwrap.dedent('''
    torch.manual_seed(0)
    strict = ReformerLM(128, 16, 2, 256, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal='strict', n_local_attn_heads=1, **json.loads(sys.argv[2]))
    settings = TrainSettings(seq_len=32, batch_size=4, steps=int(sys.argv[3]), save_every=1, carry_state=True, **json.loads(sys.argv[4]))
    trainer = Loud(strict, corpus(), settings, out=sys.argv[1], show=False)
    print('ready', flush=True)
    trainer.fit(resume=True)
''')
noisy = '{"ff_dropout": 0.1, "lsh_dropout": 0.1}', 18, '{"pieces": 2, "eval_every": 7, "eval_windows": 2}'   # two texts of eight segments a row, and a piece of the third

def test_killed_amid_a_text_and_resumed(tmp_path):
    assert run(tmp_path/'whole', going_on, *noisy)[0]==0
    rng = random.Random(1)
    assert all([killed(rng, tmp_path/'killed', going_on, *noisy) for _ in range(3)])
    assert run(tmp_path/'killed', going_on, *noisy)[0]==0
    same_run(tmp_path/'killed', tmp_path/'whole')
    assert (len(curve(tmp_path/'whole')), len(curve(tmp_path/'whole', 'valid')))==(18, 2)

def strict_model(**options):
    torch.manual_seed(0)
    return ReformerLM(**dict(num_tokens=128, dim=16, depth=2, max_seq_len=256, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal='strict') | options)

kinds = dict(), dict(n_local_attn_heads=1, num_mem_kv=2), dict(n_buckets=(2,4)), dict(causal=True, use_full_attn=True), dict(weight_tie=True)

@pytest.mark.parametrize('options', (*kinds, dict(hash_seed=None)))
def test_carried_state_is_that_of_a_loop(options):
    "Losses to the last bit; a state left out, or one that is never emptied, gives others"
    text = torch.arange(4000)**2%97
    corpus,s = Corpus('squares', *(text.to(torch.uint8) for _ in range(3))),TrainSettings(seq_len=32, batch_size=4, steps=10, carry_state=True)
    model,state,by_hand = strict_model(**options).train(),None,[]
    opt = make_optimizer(model, s)
    for step in range(s.steps):
        batch,fresh = segment_at(corpus.train, step, batch_size=4, seq_len=32, longest=256)
        assert fresh==(step%8==0)
        loss,state = model.loss(batch, state=model.init_state(4) if fresh else state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for group in opt.param_groups: group['lr'] = learning_rate(step/s.steps, s)
        opt.step(), opt.zero_grad()
        by_hand.append(loss.item()/math.log(2))
    trainer = Trainer(strict_model(**options), corpus, s, show=False)
    assert [o['bits_per_byte'] for o in trainer.fit()]==by_hand
    assert trainer.states[0].count.tolist()==[64]*4
    apart = Trainer(strict_model(**options), corpus, replace(s, carry_state=False), show=False).fit()
    assert apart[0]['bits_per_byte']!=by_hand[0] or apart[1]['bits_per_byte']!=by_hand[1]

@torch.no_grad()
def read_by_hand(model, text, seq_len, longest):
    "Bits per byte of texts that are read in segments"
    bits = []
    for start in range(0, len(text)-1, longest):
        state,end = model.init_state(),min(start+longest, len(text)-1)
        for i in range(start, end, seq_len):
            n = min(seq_len, end-i)
            loss,state = model.loss(text[None,i:i+n+1].long(), state=state)
            bits += [loss.item()/math.log(2)]*n
    return sum(bits)/len(bits)

@pytest.mark.parametrize('options', kinds)
def test_held_out_text_is_read_on(options):
    "As in training; that equals reading whole texts, and changes nothing in training"
    text = (torch.arange(300)**2%97).to(torch.uint8)
    corpus,s = Corpus('squares', text, text, text),TrainSettings(seq_len=32, batch_size=2, steps=3, carry_state=True, eval_every=1, eval_windows=None)
    trainer,unwatched = (Trainer(strict_model(**options).double(), corpus, o, show=False) for o in (s, replace(s, eval_every=None)))
    found = trainer.fit()[-1]['valid']
    assert [o['bits_per_byte'] for o in unwatched.fit()]==[o['bits_per_byte'] for o in trainer.history]
    assert trainer.model.training and trainer.states[0].count.tolist()==[96]*2
    model = trainer.model.eval()
    assert found==pytest.approx(read_by_hand(model, text, 32, 256), abs=1e-12)
    assert found==pytest.approx(bits_per_byte(model, text, 256), abs=1e-12)   # texts of 256 and 43 bytes at once
    assert abs(found-bits_per_byte(model, text, 32))>1e-4
    some = bits_per_byte(model, text, 32, longest=256, most=3)   # the first 96 bytes
    assert some==pytest.approx(bits_per_byte(model, text[:97], 96), abs=1e-12)

def test_nothing_to_carry():
    corpus = Corpus('zeros', *torch.zeros(3, 999, dtype=torch.uint8))
    s = TrainSettings(seq_len=32, steps=1, carry_state=True)
    with pytest.raises(ValueError, match="causal='strict', this one has causal=True"): Trainer(strict_model(causal=True), corpus, s)
    with pytest.raises(ValueError, match='build the model with a larger max_seq_len'): Trainer(strict_model(), corpus, replace(s, seq_len=129))
    with pytest.raises(ValueError, match='drop_for_hash_rate'): Trainer(strict_model(drop_for_hash_rate=.1), corpus, s, show=False).fit()

# ---- curves ----------------------------------------------------------------------------------------------------------

words = Corpus('words', *(torch.arange(999).to(torch.uint8)%97 for _ in range(3)))
drawn = TrainSettings(seq_len=64, batch_size=2, steps=4, eval_every=2, eval_windows=1, tensorboard=True)

class Board:
    "Stands for a SummaryWriter"
    made = []
    def __init__(self, folder, purge_step=None):
        self.folder,self.purge_step,self.points,self.open = folder,purge_step,[],True
        self.made.append(self)
    def add_scalar(self, *point): self.points.append(point)
    def __enter__(self): return self
    def __exit__(self, *args): self.open = False

def test_curves_go_to_the_board(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=Board))
    history = Trainer(strict_model(), words, drawn, out=tmp_path, show=False).fit()
    Trainer(strict_model(), words, replace(drawn, steps=5), out=tmp_path, show=False).fit(resume=True)
    first,second = Board.made
    assert first.points==[(k, o[k], o['step']) for o in history for k in ('bits_per_byte', 'valid') if k in o] and len(first.points)==6
    assert first.folder==tmp_path/'tensorboard' and first.purge_step is None and not first.open
    assert second.purge_step==4 and [o[2] for o in second.points]==[4]

def test_a_board_that_is_not_installed(tmp_path, monkeypatch):
    for name in ('tensorboard', 'torch.utils.tensorboard'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'reformer_nb\[tensorboard\]', or leave it out"):
        Trainer(strict_model(), words, drawn, out=tmp_path/'run', show=False).fit()
    assert not (tmp_path/'run').exists()
    assert len(Trainer(strict_model(), words, replace(drawn, tensorboard=False), out=tmp_path/'run', show=False).fit())==4

def test_real_board(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = Trainer(strict_model(), words, drawn, out=tmp_path, show=False).fit()
    found = EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert [o.value for o in found.Scalars('bits_per_byte')]==pytest.approx([o['bits_per_byte'] for o in history])
    assert [o.step for o in found.Scalars('valid')]==[1, 3]

def test_files_of_others_among_its_own(tmp_path):
    "A name that is no step, lines that are no records, a model in the place of a checkpoint"
    def fit(steps): return Trainer(strict_model(), words, replace(drawn, steps=steps, tensorboard=False), out=tmp_path, show=False).fit(resume=True)
    fit(3)
    (tmp_path/'checkpoints'/'step-old.safetensors').touch()
    with open(tmp_path/'metrics.jsonl', 'ab') as f: f.write(b'{"x": 3}\n[1]\n\xff\n{"step": ')
    assert [o['step'] for o in fit(4)]==[0, 1, 2, 3]
    (tmp_path/'model.safetensors').rename(tmp_path/'checkpoints'/'step-000000009.safetensors')
    with pytest.raises(ValueError, match='step-000000009.safetensors is no checkpoint of a run; remove it'): fit(5)

class Judged(Trainer):
    "Is measured as it is told"
    def __init__(self, found, **options):
        settings = TrainSettings(seq_len=64, batch_size=2, steps=len(found), save_every=1, eval_every=1, keep=2)
        super().__init__(strict_model(), words, settings, show=False, **options)
        self.found = found
    def evaluate(self):
        with patch('reformer_nb.trainer.bits_per_byte', lambda *args, **options: self.found[self.step-1]): return super().evaluate()

def flip(path): path.write_bytes(path.read_bytes()[:-1]+bytes([path.read_bytes()[-1]^1]))

def test_the_best_of_every_kept_checkpoint_is_kept(tmp_path):
    "Also of one that is gone back to, when a later one was better"
    first = Judged([5., 6., 4.], out=tmp_path)
    first.fit()
    assert first.store.steps()==[1, 2, 3]
    flip(first.store.path(3))
    second = Judged([5., 6., 7., 7.], out=tmp_path)
    with pytest.warns(UserWarning, match='step-000000003.safetensors is damaged'): second.fit(resume=True)
    assert second.best==dict(step=1, bits_per_byte=5.) and second.store.steps()==[1, 3, 4]
    best = read_checkpoint(second.store.path(1))[0]
    for k,o in ReformerLM.from_pretrained(tmp_path).named_parameters(): assert torch.equal(o, best[f'model.{k}'])
    assert json.loads((tmp_path/'training.json').read_text())['best']['step']==1
    for falling in (range(9, 0, -1), range(1, 10)):   # at most the best of the oldest of two is a third
        run = Judged([*map(float, falling)], out=tmp_path/str(falling[0]))
        run.fit()
        assert run.store.steps()==([8, 9] if falling[0]==9 else [1, 8, 9])

@pytest.mark.parametrize('hurt', [Path.unlink, flip, lambda path: path.write_bytes(b'')], ids=['gone', 'flipped', 'empty'])
def test_a_best_checkpoint_that_cannot_be_read(tmp_path, hurt):
    "The run says so at once, looks for another best, and leaves a model in any case"
    run = Judged([1., 2., 3.], out=tmp_path)
    run.fit()
    hurt(run.store.path(1))
    run = Judged([1., 2., 3., 7., 8.], out=tmp_path)
    with pytest.warns(UserWarning, match=r'step-000000001.safetensors is (missing|damaged), so the best evaluation, that of step 1, counts no longer; [^\n]*takes its place') as told: run.fit(resume=True)
    assert 'save_pretrained' not in str(told[0].message)   # which did not write it
    assert run.best==dict(step=4, bits_per_byte=7.) and run.store.steps()==[4, 5]
    best = read_checkpoint(run.store.path(4))[0]
    for k,o in ReformerLM.from_pretrained(tmp_path).named_parameters(): assert torch.equal(o, best[f'model.{k}'])

def test_a_best_checkpoint_that_is_lost_while_the_run_goes_on(tmp_path):
    run = Judged([1., 2., 3.], out=tmp_path)
    ended = run.ended
    run.ended = lambda asked: run.step==3 and not run.store.path(1).unlink() or ended(asked)
    with pytest.warns(UserWarning, match=r'step-000000001.safetensors is missing, so the best evaluation'): run.fit()
    assert json.loads((tmp_path/'training.json').read_text())['best'] is None
    for k,o in ReformerLM.from_pretrained(tmp_path).named_parameters(): assert torch.equal(o, dict(run.model.named_parameters())[k])

def test_nan_is_never_the_best(tmp_path):
    "Nor infinity; a checkpoint of before that says so is not believed"
    run = Judged([math.nan, math.inf, 5., math.nan, 6.], out=tmp_path)
    run.fit()
    assert run.best==dict(step=3, bits_per_byte=5.)
    run = Judged([math.nan]*2)
    run.fit()
    assert run.best is None
    run.best,run.found,run.step = dict(step=1, bits_per_byte=math.nan),[5.],1
    assert run.evaluate()==5. and run.best['bits_per_byte']==5.

# ---- numbers and texts of other kinds -------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', [np.float32, np.float64, Fraction])
def test_numbers_of_other_kinds(tmp_path, kind):
    "The run is that of floats"
    numbers = dict(lr=.0078125, warmup=.125, weight_decay=.0625, clip=.5, minutes=5)   # the same in all kinds
    given = TrainSettings(seq_len=64, batch_size=2, steps=2, **{k: kind(o) for k,o in numbers.items()})
    assert given==TrainSettings(seq_len=64, batch_size=2, steps=2, **numbers)
    assert {type(getattr(given, k)) for k in numbers}=={float}
    Trainer(strict_model(), words, given, out=tmp_path, show=False).fit()
    assert json.loads((tmp_path/'training.json').read_text())['settings']['lr']==.0078125

@pytest.mark.parametrize('wrong,says', [(dict(seq_len=np.int64(64)), r'must be a whole number \(int\)'), (dict(carry_state=np.bool_(True)), 'carry_state=.*must be True or False'),
                                        (dict(shard='no'), "shard='no' must be True or False"), (dict(tensorboard=1), 'tensorboard=1 must be True or False')])
def test_settings_that_could_not_be_written(wrong, says):
    with pytest.raises(TypeError, match=says): TrainSettings(steps=1, **wrong)

def test_texts_that_do_not_lie_in_one_piece(tmp_path):
    "Every second byte of something, or a column, is a text like any other"
    text = torch.stack([words.train, words.train.flip(0)], 1)
    s = replace(drawn, tensorboard=False)
    for name,corpus in dict(whole=words, column=Corpus('words', text[:,0], *[words.valid.repeat_interleave(2)[::2]]*2)).items():
        Trainer(strict_model(), corpus, s, out=tmp_path/name, show=False).fit()
    same_run(tmp_path/'whole', tmp_path/'column')
    Trainer(strict_model(), words, replace(s, steps=5), out=tmp_path/'column', show=False).fit(resume=True)   # the same text

# ---- several processes ---------------------------------------------------------------------------------------------

spread = common + textwrap.dedent('''
    torch.set_default_dtype(torch.float64)
    settings = TrainSettings(seq_len=64, batch_size=4, steps=int(sys.argv[2]), save_every=5, shard='shard' in sys.argv)
    class Mortal(Trainer):
        def one_step(self, start):
            if 'dies' in sys.argv and self.accelerator.process_index==1 and self.step==8: os.kill(os.getpid(), 9)
            super().one_step(start)
            if self.step==1: print(type(next(self.model.parameters())).__name__, type(next(self.model.parameters()).data).__name__)
    Mortal(model(weight_tie=True), corpus(), settings, out=sys.argv[1], show=False).fit()
''')
no_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch has no gloo')

@pytest.fixture
def script(tmp_path):
    path = tmp_path/'spread.py'
    path.write_text(spread)
    return path

def torchrun(script, *words):
    "Exit code, standard output and error of two processes"
    launcher = sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0'
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([*launcher, *map(str, (script, *words))], env=env, capture_output=True, text=True, timeout=300)
    return done.returncode,done.stdout,done.stderr

@no_gloo
def test_two_processes_learn_like_one(script, tmp_path):
    assert run(tmp_path/'one', spread, 50)[0]==0
    code,_,complaint = torchrun(script, tmp_path/'two', 50)
    assert code==0, complaint[-2000:]
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('one', 'two'))
    assert len(a)==50 and a[0]-a[-1]>.5
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

@no_gloo
def test_two_processes_carry_like_one(script, tmp_path):
    "Each keeps the state of its rows, also in a checkpoint; one process cannot go on with the two of two"
    script.write_text(going_on.replace('ReformerLM(128', 'torch.set_default_dtype(torch.float64) or ReformerLM(128'))
    watched = '{"eval_every": 6}'
    assert run(tmp_path/'one', script.read_text(), '{}', 12, watched)[0]==0
    for steps in (12, 14):   # and goes on, amid the second text
        code,_,complaint = torchrun(script, tmp_path/'two', '{}', steps, watched)
        assert code==0, complaint[-2000:]
    for key in ('bits_per_byte', 'valid'):
        a,b = (torch.tensor(curve(tmp_path/o, key), dtype=torch.float64) for o in ('one', 'two'))
        torch.testing.assert_close(a, b[:len(a)], rtol=0, atol=1e-9)
        assert len(b)==dict(bits_per_byte=14, valid=2)[key]
    code,_,complaint = run(tmp_path/'two', script.read_text(), '{}', 14, watched)
    assert code!=0 and 'the texts were read by 2 processes, here are 1; start as many' in complaint

@no_gloo
def test_sharded_by_fsdp(script, tmp_path):
    "Two processes hold half of each weight, and write one checkpoint, which loads"
    assert run(tmp_path/'one', spread, 6)[0]==0
    code,said,complaint = torchrun(script, tmp_path/'two', 6, 'shard')
    assert code==0 and 'DTensor' in said, complaint[-2000:]
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('one', 'two'))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    a,b = (dict(ReformerLM.from_pretrained(tmp_path/o).named_parameters()) for o in ('one', 'two'))
    for k,o in a.items(): torch.testing.assert_close(b[k], o, rtol=0, atol=1e-9)

@no_gloo
@pytest.mark.parametrize('how', ['plain', 'shard'])
def test_processes_resume_with_blocks_that_no_step_has_used(script, tmp_path, how):
    lazy = "model(weight_tie=True)", "model(layer_dropout=.5)"
    script.write_text(spread.replace(*lazy).replace('fit()', 'fit(resume=True)').replace('save_every=5', 'save_every=1, keep=9'))
    for again in (False, True):
        if again: shutil.copytree(tmp_path/'whole', tmp_path/'again'), forget(tmp_path/'again', after=1)
        code,_,complaint = torchrun(script, tmp_path/('again' if again else 'whole'), 6, how)
        assert code==0, complaint[-2000:]
    same_run(tmp_path/'again', tmp_path/'whole')
    steps = [read_checkpoint(tmp_path/'again'/'checkpoints'/f'step-{o:09}.safetensors')[0] for o in (1, 6)]
    assert steps[0].keys()<steps[1].keys()   # a block of the second half of the run only

@no_gloo
def test_a_killed_worker_leaves_a_checkpoint(script, tmp_path):
    code,_,complaint = torchrun(script, tmp_path/'run', 20, 'dies')
    assert code!=0 and 'Signal 9' in complaint
    assert run(tmp_path/'run', spread.replace(".fit()", ".fit(resume=True)"), 20)[0]==0
    assert run(tmp_path/'whole', spread, 20)[0]==0
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('run', 'whole'))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)   # it went on in one process where two had been

# ---- hard conditions -----------------------------------------------------------------------------------------------

small_disk = common + textwrap.dedent('''
    import resource
    settings = TrainSettings(seq_len=64, batch_size=2, steps=6, save_every=2)
    class Full(Trainer):
        def one_step(self, start):
            if self.step==3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))   # files may grow no further
            super().one_step(start)
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # write() says so instead
    Full(model(), corpus(), settings, out=sys.argv[1], show=False).fit()
''')

@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='needs limits on the size of files')
def test_full_disk_loses_nothing(tmp_path):
    code,_,complaint = run(tmp_path/'run', small_disk)
    assert code!=0 and 'step-000000004' in complaint
    assert [p.name for p in (tmp_path/'run'/'checkpoints').iterdir()]==['step-000000002.safetensors']
    read_weights(tmp_path/'run'/'checkpoints'/'step-000000002.safetensors')

# ---- a model that could not be read back ---------------------------------------------------------------------------

def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(tmp_path):
    "With a folder to write to; without one the trainer writes nothing"
    scope = {}
    exec(common, scope)
    def tie(model): model.to_logits.weight = model.token_emb.weight
    def normalise(model): torch.nn.utils.parametrizations.weight_norm(model.reformer.layers.blocks[0][0].fn.toqk)
    settings = TrainSettings(seq_len=64, batch_size=2, steps=2)
    for change,says in ((tie, "weight_tie_embedding='plain'"), (normalise, 'remove_parametrizations first')):
        model = scope['model']()
        change(model)
        with pytest.raises(ValueError, match=says): Trainer(model, scope['corpus'](), settings, out=tmp_path/'run', show=False)
        assert not (tmp_path/'run').exists()
        assert len(Trainer(model, scope['corpus'](), settings, show=False).fit())==2
