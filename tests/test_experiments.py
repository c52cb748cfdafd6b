"What the notebooks of nbs/experiments read and draw: records, the duplication task, text, time and memory"
import re, sys
from dataclasses import asdict, replace
from importlib.util import find_spec
import nbformat
import peer
import pytest
import torch
from nbdev.config import get_config
from reformer_nb import triton_lsh
from reformer_nb.attention import full_attention

sys.path.insert(0, str(get_config().nbs_path/'experiments'))
import duplication, gpu, memory_law, records, speed, text  # noqa: E402

tiny = duplication.Run(length=64, chunk=16, steps=2)   # far too short to learn
needs_peer = pytest.mark.skipif(bool(peer.missing()), reason=str(peer.missing()))

# ---- records -------------------------------------------------------------------------------------------------------

def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path/'a.csv'
    assert records.read(path) == []
    records.append(path, dict(name='a, "b"', k=1), dict(name='', k=.5))
    records.append(path, dict(name='c', k=''))
    assert records.read(path) == [dict(name='a, "b"', k=1), dict(name='', k=.5), dict(name='c', k='')]
    with pytest.raises(ValueError, match='move the old file away'): records.append(path, dict(name='d', other=1))

def test_growth_is_a_slope_of_logarithms():
    assert records.slope([(x, 7*x**1.5) for x in (1, 2, 4, 8)])==pytest.approx(1.5)

# ---- duplication ---------------------------------------------------------------------------------------------------

def test_the_second_word_alone_counts():
    tokens = duplication.duplication_batch(0, batch_size=2, length=16)
    def bets(wanted): return torch.nn.functional.one_hot(wanted, 128)*20.
    right = bets(tokens.roll(-1, dims=1))
    loss,accuracy = duplication.second_word(lambda x: right, tokens)
    assert accuracy==1 and loss<1e-5
    right[:,:8] = 0   # the first word, and the zero in the middle
    assert duplication.second_word(lambda x: right, tokens)[1]==1
    right[:,-2] = 0
    assert duplication.second_word(lambda x: right, tokens)[1].item() == pytest.approx(6/7)

def test_a_finished_run_is_not_repeated(tmp_path):
    for run in (tiny, tiny, replace(tiny, seed=1), tiny): duplication.finish(run, tmp_path)
    rows,curves = (records.read(tmp_path/f'duplication{o}.csv') for o in ('', '_curves'))
    assert [o['seed'] for o in rows]==[0, 1] and [o['step'] for o in curves]==[2, 2]
    assert all(0<=rows[0][k]<=100 for k in duplication.evaluations) and rows[0]['torch']==torch.__version__
    assert [o['% at the end'] for o in duplication.progress(rows, curves)]==[o['accuracy'] for o in curves]

def test_a_run_ends_early_and_says_when():
    _,curve = duplication.train(replace(tiny, steps=200), stop_at=0.)
    assert [o['step'] for o in curve]==[25]
    assert duplication.first_above([dict(step=1, accuracy=99.), dict(step=2, accuracy=99.1)])==2
    assert duplication.first_above([dict(step=1, accuracy=99.)])==''

def test_the_table_and_what_is_below_it():
    row = dict(library='reformer_nb', trained='LSH-1', length=1024, chunk=128, variant='', lr=.001, Full=1., **{'8': 99.9, '4': 99., '2': 95., '1': 70.})
    rows = [row, dict(row, **{'1': 80.})]
    shown = list(duplication.beside_paper(rows))
    assert [o['1'] for o in shown]==['75.0 ± 7.1', 77.9] and shown[0]['8']=='99.9 ± 0.0' and shown[0]['who']=='ours, 2 seeds'
    assert list(duplication.below_paper(rows))==[('LSH-1', '4', 99., 99.6), ('LSH-1', '1', 75., 77.9)]
    assert list(duplication.beside_paper(rows, chunk=64))==list(duplication.below_paper(rows, chunk=64))==[]

def test_libraries_stand_beside_each_other_after_our_slowest_time():
    run = duplication.Run(length=256, chunk=32)
    runs = dict(fast=run, slow=replace(run, seed=1), peer=replace(run, library='transformers'), other=replace(run, variant='tied head'))
    rows = [asdict(o) | dict(above_99='', cpu_seconds=s, processor='') for o,s in zip(runs.values(), (10., 20., 40., 90.))]
    curves = [asdict(o) | dict(step=i, accuracy=i, cpu_seconds=i*s/4) for o,s in zip(runs.values(), (10., 20., 40., 90.)) for i in (1, 2, 3, 4)]
    shown = duplication.beside_peers(rows, curves, length=256, chunk=32)
    assert [(o['library'], o['seed'], o['% at the end'], o['% after 20 s']) for o in shown]==[('reformer_nb', 0, 4, 4), ('reformer_nb', 1, 4, 4), ('transformers', 0, 4, 2)]
    assert duplication.beside_peers([o for o in rows if o['library']=='reformer_nb'], curves, length=256, chunk=32)==[]

def test_parts_try_each_library_at_each_rate():
    peers,small = ({(o.library, o.variant, o.lr) for o in duplication.runs(part, [0])} for part in ('peers', 'small'))
    assert peers=={(*o, lr) for o in duplication.starts[1:] for lr in (1e-3, 3e-3)}
    assert small=={(*o, lr) for o in duplication.starts for lr in (3e-4, 1e-3, 3e-3)}
    assert {(o.trained, o.seed) for o in duplication.runs('half', [0, 1, 2])}=={(f'LSH-{r}', s) for r in (1, 2, 4) for s in (0, 1, 2)}

@needs_peer
@pytest.mark.parametrize('library,variant', duplication.starts)
def test_each_library_trains_with_its_rounds_and_is_evaluated_with_others(library, variant):
    run = replace(tiny, library=library, variant=variant)
    model,_ = duplication.train(run)
    other = duplication.make(run, 4)
    other.load_state_dict(model.state_dict())
    tokens = duplication.duplication_batch(0, batch_size=2, length=64)
    full = duplication.make(run, 0)
    full.load_state_dict(model.state_dict())
    with torch.no_grad(): a,b,c = (o.eval()(tokens) for o in (model, other, full))
    assert a.shape==(2, 64, 128) and not torch.equal(a, b) and not torch.equal(b, c)
    changed = tokens.clone()
    changed[:,40:] = 1
    with torch.no_grad(): assert torch.allclose(full(changed)[:,:40], c[:,:40], atol=1e-5)   # full attention sees no later token

# ---- the page of results -------------------------------------------------------------------------------------------

def test_the_page_of_results_links_all_others_and_leaves_numbers_to_cells():
    folder = get_config().nbs_path/'experiments'
    page,index = (nbformat.read(o, 4) for o in (folder/'results.ipynb', folder.parent/'index.ipynb'))
    prose,start = ('\n'.join(c.source for c in o.cells if c.cell_type=='markdown') for o in (page, index))
    for o in folder.glob('*.ipynb'):
        assert f'(experiments/{o.name})' in start and (o.stem=='results' or f']({o.name})' in prose), o.name
    assert not re.findall(r'\d+[.,]\d+|\d ?×', prose)
    for part in re.findall(r'python nbs/experiments/duplication.py (.*?)`', prose)[0].split(): assert part in duplication.parts

# ---- text ----------------------------------------------------------------------------------------------------------

short = text.Run(length=64, chunk=8, dim=16, steps=2)   # far too short to learn
noise = torch.randint(256, (1, 65), generator=torch.Generator().manual_seed(0))

@pytest.fixture
def corpus():
    from reformer_nb.data import Corpus
    return Corpus('noise', *torch.randint(256, (3, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))

def attention_of(run): return text.make(run).reformer.layers.blocks[0][0].fn

def test_separate_keys_are_what_they_say():
    layer,x = attention_of(replace(short, attention='Separate')),torch.randn(1, 10, 16)
    q,k,v = (o(x).view(10, 4, 4).transpose(0, 1) for o in (layer.toqk, layer.tok, layer.tov))
    weights = (q@k.mT/2).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(layer.with_state(x)[0][0], layer.to_out((weights@v).transpose(0, 1).flatten(1)))

def test_local_heads_see_their_window_and_the_one_before():
    layer,x = attention_of(replace(short, attention='Local')),torch.randn(1, 40, 16)
    q,v = (o(x).view(40, 4, 4).transpose(0, 1) for o in (layer.toqk, layer.tov))
    i,j = torch.arange(40)[:,None],torch.arange(40)
    seen = (j<i) & (i//16-j//16<=1)
    seen[0,0] = True   # who sees nobody gets its own value
    weights = (q@torch.nn.functional.normalize(q, dim=-1).mT).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(layer.with_state(x)[0][0], layer.to_out((weights@v).transpose(0, 1).flatten(1)))

def test_one_stream_is_a_sum_of_residuals():
    model,x = text.make(replace(short, attention='Full', variant='one stream')),torch.randn(1, 9, 16)
    y = x
    for f,g in model.reformer.layers.blocks:
        y = y + f.fn(f.norm(y))
        y = y + g.fn(g.norm(y))
    torch.testing.assert_close(model.reformer(x), y)

@torch.no_grad()
def moved(model, place, other):
    "How much another byte at a place changes what is said at another"
    changed = noise[:,:64].clone()
    changed[0,place] += 1 - 2*(changed[0,place]>200)
    return (model(changed)-model(noise[:,:64]))[0,other].abs().max().item()

def test_silenced_heads_say_nothing():
    run = replace(short, variant='half local')
    model = text.make(run).eval()
    read = dict(text.ways(run, model))
    assert list(read)==['no heads', 'no local heads', 'no LSH heads']
    assert moved(model, 59, 60)>1e-6 and moved(read['no heads'], 59, 60)==0<moved(read['no heads'], 60, 60)
    assert moved(read['no LSH heads'], 59, 60)>1e-6 and moved(read['no LSH heads'], 0, 63)<1e-6   # two layers see four windows of 16, less one
    assert {'Full', 'Local', 'LSH-8'} < dict(text.ways(short, text.make(short))).keys()

def test_later_bytes_are_found_to_tell(corpus):
    def cheat(tokens): return torch.nn.functional.one_hot(tokens.roll(-1, dims=1), 256)*20.
    found = text.leak(cheat, corpus.valid, 64, 2)
    assert found['with_later']<.01 and found['alone']>20 and found['moved']>90 and found['bytes']==8
    for run in (replace(short, attention='Full'), replace(short, variant='strict')):
        found = text.leak(text.make(run).eval(), corpus.valid, 64, 2)
        assert found['difference']==pytest.approx(0, abs=1e-3) and found['moved']==0

def test_bits_are_those_of_all_windows(corpus):
    model = text.make(short)
    with torch.no_grad(): model.to_logits.weight.zero_(), model.to_logits.bias.zero_()
    assert text.bits(model, corpus.valid, 64, 3)==pytest.approx(8) and model.training

def test_a_text_run_is_written_once(tmp_path, corpus):
    for run in (short, short, replace(short, attention='Full'), short): text.finish(run, corpus, tmp_path, most=2)
    rows,curves,reads,leaks = (records.read(tmp_path/f'text{o}.csv') for o in ('', '_curves', '_reads', '_leak'))
    assert [o['attention'] for o in rows]==['LSH-2', 'Full'] and [o['step'] for o in curves]==[2, 2] and len(leaks)==1
    assert 0<=rows[0]['recall_mass']<=100 and rows[1]['recall_mass']=='' and rows[0]['corpus']=='noise'
    assert len(reads)==7 and all(7<o['bits']<9 for o in reads)

def test_reversible_or_not_trains_alike(corpus):
    run = replace(short, attention='Full', steps=3)
    (a,curve,_),(b,other,_) = (text.train(replace(run, variant=o), corpus) for o in ('', 'reversible'))
    assert curve==other
    for x,y in zip(a.parameters(), b.parameters()): torch.testing.assert_close(x, y)

def text_row(attention, bits, seed=0, length=2048, variant=''):
    return dict(attention=attention, variant=variant, seed=seed, length=length, bits=bits, parameters=1, seconds_per_step=.1, recall_mass='', recall_top='')

def test_runs_of_one_length_are_compared_by_the_spread_of_all_seeds():
    rows = [text_row('Full', 3.), text_row('LSH-2', 3.3), text_row('LSH-2', 3.2, seed=1),
            text_row('Full', 4., length=4096), text_row('LSH-2', 3.95, length=4096), text_row('Local', 4.2, length=4096)]
    assert [(o['run'], o['length'], o['apart']) for o in text.spread(rows)]==[('LSH-2', 2048, .1)]
    assert [(o['run'], o['more'], o['beyond the spread']) for o in text.against(rows, 'Full', ('LSH-2', 'Local'))]==[('Full', '+0.000', 'no'), ('LSH-2', '+0.300', 'yes')]
    longer = list(text.against(rows, 'Full', ('LSH-2', 'Local'), length=4096))
    assert [(o['run'], o['more'], o['beyond the spread']) for o in longer]==[('Full', '+0.000', 'no'), ('LSH-2', '-0.050', 'no'), ('Local', '+0.200', 'yes')]

def test_what_silenced_heads_cost_is_told_by_length():
    rows = [text_row('LSH-2', 3., length=o) for o in (2048, 4096)]
    reads = [dict(o, read='no heads', bits=o['bits']+more) for o,more in zip(rows, (1, 2))]
    found = [[o['without heads'] for o in text.silenced(rows, reads, length=n)] for n in (2048, 4096)]
    assert found==[['+1.000'], ['+2.000']]

def test_the_parts_on_text_differ_in_what_they_say():
    found = {o: text.runs([o]) for o in text.parts}
    together = [run for part in found.values() for run in part]
    assert len(set(together))==len(together)
    seen = {run.steps*run.length for run in together}
    assert len(seen)==1 and {run.length for run in found['context']}=={4096}
    assert [(run.attention, run.variant) for run in found['context']]==[('LSH-2', ''), ('Full', ''), ('Local', ''), ('LSH-2', 'half local')]

# ---- speed ---------------------------------------------------------------------------------------------------------

def test_full_attention_is_what_it_says():
    torch.manual_seed(0)
    model,x = speed.FullAttention(6, 4),torch.randn(1, 6, 512)
    q,v = (f(x).view(6, 8, 64).transpose(0, 1) for f in (model.toqk, model.tov))
    scores = (q@(q/q.norm(dim=-1, keepdim=True)).mT).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(model(x)[0], model.to_out((scores.softmax(-1)@v).transpose(0, 1).flatten(1)))

@needs_peer
@pytest.mark.parametrize('who', speed.contestants)
def test_each_contestant_takes_a_step(who):
    leaves,step = speed.layer_step(who, 256, 2)
    forward,both = speed.timed(step)
    assert 0<forward<both and step()[0].shape==(1, 256, 512)
    assert all(o.grad is not None for o in leaves)

def test_turns_are_taken():
    order,one = [],torch.ones(1, requires_grad=True)
    def step(name): return lambda: (order.append(name), (one*1, None))[1]
    found = speed.in_turns(dict(a=step('a'), b=step('b')), repeats=2, budget=60)
    assert order==list('ababab') and found['a']['repeats']==2 and 0<=found['b']['forward']<=found['b']['both']
    assert speed.in_turns(dict(a=step('a')), repeats=9, budget=0)['a']['repeats']==3

def test_what_tensors_take_is_counted():
    x = torch.randn(2**20, requires_grad=True)   # 4 MB
    assert speed.most_allocated(lambda: (x.exp().sum(), None)) == pytest.approx(2*2**22, rel=.01)   # the result and the gradient

@pytest.mark.skipif(sys.platform!='linux', reason='peak memory is read from /proc')
def test_memory_of_a_process_of_its_own():
    found = speed.in_own_process(1, 'layer', who='full attention', n=2048)
    assert found['gradients']==found['weights']==pytest.approx(3+4, abs=.1)   # three matrices of 512 x 512, and 2048 x 512 inputs
    assert .7*found['allocated']<found['peak']<5*found['allocated'] and found['seconds']>0

@pytest.mark.parametrize('who', speed.attentions)
def test_rows_of_one_chunk_attend_in_full(who):
    (qk,v),step = speed.tokens_step(who, 64, 256)
    out,grad = step()
    torch.testing.assert_close(out, full_attention(qk, v, causal=True))
    out.backward(grad)
    assert qk.grad.shape==v.grad.shape==out.shape==(4, 2, 64, 64) and qk.grad.any() and v.grad.any()

# ---- on a GPU ------------------------------------------------------------------------------------------------------

kernels_run = pytest.mark.skipif(not find_spec('triton'), reason='Triton is made for Linux alone')
device = 'cuda' if torch.cuda.is_available() else 'cpu'   # where the interpreter runs the kernels

@kernels_run
def test_gpu_rows_are_written(tmp_path, monkeypatch):
    "The script but for its gate, at lengths that the interpreter can do: a contestant that does not fit is not asked again"
    asked,layer_step = [],gpu.layer_step
    def crowded(who, n, *args):
        asked.append((who, n))
        if who=='transformers': raise torch.OutOfMemoryError('no room')
        return layer_step(who, n, *args)
    monkeypatch.setattr(gpu, 'gate', lambda device: None)
    monkeypatch.setattr(gpu, 'heads', 1), monkeypatch.setattr(gpu, 'rounds', 1), monkeypatch.setitem(gpu.steps, 'layer', crowded)
    monkeypatch.setitem(gpu.contestants, 'layer', ('reformer_nb', 'transformers', 'full attention'))
    gpu.run(['attention'], (64,), device, tmp_path, 1, budget=0, dtype=torch.half)
    gpu.run(['layer'], (128, 256), device, tmp_path, 1, budget=0)
    found,layers = (records.read(tmp_path/f'gpu_{o}.csv') for o in gpu.contestants)
    assert [o['who'] for o in found]==list(gpu.contestants['attention']) and all(o['note']=='' and 0<o['forward_ms']<o['both_ms'] for o in found)
    assert [o['note'] for o in layers]==['', 'out of memory', '']*2 and asked.count(('transformers', 256))==0
    assert all(o['repeats']==1 for o in found) and layers[1]['both_ms']=='' and layers[0]['device']==gpu.where(device)['device']

@kernels_run
def test_gpu_times_nothing_if_the_kernels_are_wrong(tmp_path, monkeypatch):
    assert gpu.wrong(device, torch.float32, 1e-4)==[]
    right = triton_lsh.triton_lsh_attention
    monkeypatch.setattr(triton_lsh, 'triton_lsh_attention', lambda qk, v, *args, **options: right(qk, v*1.01, *args, **options))
    with pytest.raises(SystemExit, match='wrong, so nothing is timed; torch.float32: output'): gpu.run(['attention'], (64,), device, tmp_path, 1)
    assert not list(tmp_path.iterdir())

def test_gpu_flash_attention_has_the_scores_of_ours():
    (qk,v),step = gpu.attention_step('flash attention', 64, device, torch.half)
    x,y = (o.detach().double() for o in (qk, v))
    weights = (x@(x/x.norm(dim=-1, keepdim=True)).mT).masked_fill(torch.ones(64, 64, device=device).triu(1).bool(), -torch.inf).softmax(-1)
    out,grad = step()
    torch.testing.assert_close(out.double(), weights@y, rtol=0, atol=1e-2)
    assert [o.shape for o in torch.autograd.grad(out, (qk, v), grad)]==[qk.shape, v.shape]

def test_gpu_is_missed_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e: gpu.main(['--quick'])
    assert e.value.code==2 and capsys.readouterr().err.count('\n')==1

def test_gpu_limits_cross_where_the_course_says():
    "Notebook 05e: in microseconds, of bytes and of operations, forth and back"
    for n,forth,back,full in ((8192, 54, 101, 69), (65536, 431, 811, 4447)):
        found = {k: 1000*o for k,o in gpu.least(n).items()}
        assert [found['ours'], found['ours_both']-found['ours'], found['full']]==pytest.approx([forth, back, full], rel=.02)

def speed_row(who, n, both): return dict(who=who, n=n, both=both)

def test_where_hashing_is_ahead():
    rows = [speed_row('full', n, y) for n,y in ((1024, 1.), (2048, 2.), (4096, 4.))]
    for who,y in (('LSH-1', .5), ('LSH-2', 1.5), ('LSH-4', 3.), ('LSH-8', 9.)): rows += [speed_row(who, n, y) for n in (1024, 2048, 4096)]
    assert dict(speed.ahead_of_full(rows))=={'LSH-1': 1024, 'LSH-2': 2048, 'LSH-4': 4096, 'LSH-8': None}
    shown = {o['attention']: o for o in speed.at_constant_tokens(rows)}
    assert shown['full']=={'attention': 'full', 1024: '1.00', 2048: '2.00', 4096: '4.00', 'exponent': '1.00'}
    assert shown['LSH-8']['exponent']=='0.00' and 'matrix kept' not in shown

def test_how_many_times_as_much_others_take():
    rows = [speed_row('reformer_nb', 1024, 2.), speed_row('transformers', 1024, 5.), speed_row('reformer_nb', 2048, 3.), speed_row('transformers', 2048, '')]
    assert list(speed.ratios(rows, 'both'))==[dict(length=1024, reformer_nb=2., transformers='2.5×'), dict(length=2048, reformer_nb=3.)]

# ---- memory law ----------------------------------------------------------------------------------------------------

def test_saved_bytes_of_a_known_case():
    x,w = torch.ones(4, 8, requires_grad=True),torch.ones(8, 16, requires_grad=True)
    def step():
        y = (x@w).exp()   # the product keeps x and w, exp its result
        return (y*y[:2].repeat(2, 1)).sin(),torch.ones(4, 16)   # y again, what is repeated, and their product
    assert memory_law.saved_bytes([x, w], step)==(4*3*64, 4*3*64)
    assert memory_law.saved_bytes([x], step)==(4*(3*64+8*16),)*2

def test_saved_bytes_are_counted_until_they_are_released():
    count,x = memory_law.SavedBytes(),torch.ones(256, requires_grad=True)
    with count.hooks():
        y = x.exp()
        z = y.exp()*y
        assert count.now==2*1024
        z.sum().backward()
    assert (count.now, count.most)==(0, 2*1024)

def test_reversible_stacks_save_one_branch_at_a_time():
    options = memory_law.common | dict(n=64, bucket_size=16, ff_hidden=1024, ff_chunks=16)
    found = {(who, d): memory_law.measure(who, **options | dict(depth=d)) for who in memory_law.models for d in (2, 4)}
    for who in memory_law.models:
        few,many = found[who,2],found[who,4]
        assert few['peak']+few['gradients']>=few['saved'] and few['gradients']<many['gradients']
        buckets = 2*2*options['heads']*options['n_hashes']*options['n']*(who in memory_law.hashing)   # two bytes each, of two blocks
        if 'reverse_thres' in memory_law.models[who]: assert 1.8<many['saved']/few['saved']<2.2 and few['saved']==few['kept']
        else: assert many['saved']-few['saved']==many['kept']-few['kept']==buckets and few['kept']<few['saved']
    saved = {who: o['saved'] for (who,d),o in found.items() if d==2}
    assert saved['Transformer']>saved['reversible Transformer']>saved['chunked reversible Transformer']
    assert saved['LSH Transformer']>saved['Reformer']>saved['Reformer, fused']

def test_every_axis_is_measured_and_compared():
    for axis in memory_law.settings:
        rows = list(memory_law.cases(axis))
        assert {who for who,_ in rows}==set(memory_law.grows[axis])
        for who in memory_law.grows[axis]:
            varied = [o[memory_law.varied[axis]] for w,o in rows if w==who]
            assert len(set(varied))>=4 and len({str(o | {memory_law.varied[axis]: 0}) for w,o in rows if w==who})==1
        assert len(list(memory_law.cases(axis, quick=True)))==2*len(memory_law.grows[axis])

def test_growth_is_found():
    points = [(x, 3*x + 5*x**2) for x in (1, 2, 4, 8)]
    found,error = memory_law.fit(points, (1, 2))
    assert found==pytest.approx([3, 5]) and error<1e-9
    assert memory_law.fit(points, (0, 1))[1]>.1
