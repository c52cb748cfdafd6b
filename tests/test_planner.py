"Planner: laws that must be found again, and real steps"
import sys
import pytest, torch
from reformer_nb.cli import main
from reformer_nb.language_model import ReformerLM
from reformer_nb.planner import Plan, extend, fit, id_bytes, longest_row, make_plan, plan, probe_limits, probe_sizes
from reformer_nb.steps import count_weights, kept_bytes, measure

small = dict(num_tokens=61, dim=32, depth=2, max_seq_len=257, heads=2, dim_head=16, bucket_size=16, n_hashes=2, causal=True)

@pytest.mark.parametrize('depth', (1, 2, 3, 12))
@pytest.mark.parametrize('full', (False, True))
@pytest.mark.parametrize('n,b', ((256, 1), (5000, 1), (300, 40), (65536, 8)))
def test_a_law_is_found_again(depth, full, n, b):
    sizes = probe_sizes(dict(small, depth=depth, use_full_attn=full), n, b, most=2048)
    assert all(m*c<=max(n*b, 1) and m*c<=2048*(1+full) and d<=depth for d,m,c in sizes)
    def law(d, m, c): return 7 + 3*d + (.5+d)*m*c + full*d*m*m*c/99
    got = extend(sizes, fit(sizes, [law(*o) for o in sizes]), (depth, n, b))
    assert got==pytest.approx(law(depth, n, b), rel=1e-6)

@pytest.mark.parametrize('options', (dict(), dict(absolute_position_emb=True), dict(weight_tie=True), dict(ff_glu=True, num_mem_kv=3, weight_tie_embedding=True)))
def test_weights_are_counted(options):
    config = {**small, **options}
    assert count_weights(config)==sum(o.numel() for o in ReformerLM(**config).parameters())
    assert kept_bytes(config)==4*kept_bytes(config, training=False)

def test_layers_without_gradients_share_their_memory():
    "Probes that are wrong by 3 MiB foretell logits four times as long, of twice the depth, within 15 %"
    config,size = dict(num_tokens=61, dim=16, depth=6, max_seq_len=4096, heads=2, dim_head=8, causal=True),(4096, 1)
    sizes,mib = probe_sizes(config, *size, most=1024),2**20
    def peak(d, n): return 270*mib + 15*1024*n + kept_bytes(dict(config, depth=d), False)
    found = [(1., peak(d, n) + (3 if (d>1)==(n>512) else -3)*mib) for d,n,_ in sizes]
    planned = make_plan(config, size, False, None, {}, sizes, found)
    assert planned.peak==pytest.approx(peak(6, 4096), rel=.15)

def test_a_line_that_falls_is_refused():
    "A step that would take less than its own probes"
    config,size = dict(small, max_seq_len=4096),(4096, 1)
    sizes = probe_sizes(config, *size, most=512)
    steep = [(1., 2**30 if n==512 else 2**31) for _,n,_ in sizes]
    with pytest.raises(ValueError, match='up to 512 tokens falls behind them at 4096.*larger most'): make_plan(config, size, True, None, {}, sizes, steep)
    slow = [(1. if n==512 else 2., 2**30) for _,n,_ in sizes]
    with pytest.raises(ValueError, match='larger most'): make_plan(config, size, True, None, {}, sizes, slow)

def test_limits_are_as_much_smaller_as_matrices():
    full = dict(small, use_full_attn=True, backend='reference')
    for n,b in ((9000, 1), (3072, 2), (512, 4)):
        sizes = probe_sizes(full, n, b, most=1024)
        for (_,m,c),limit in zip(sizes, probe_limits(full, sizes, n, b)):
            assert limit is None if (m, c)==(n, b) else limit==pytest.approx(2**25*m*m*c/(n*n*b), abs=1)
    assert probe_limits(small, probe_sizes(small, 9000, 1), 9000, 1)==[None]*4

@pytest.mark.skipif(sys.platform!='linux', reason='the allocator of glibc')
def test_full_attention_beyond_its_probes():
    "Matrices of 64 MiB, from probes of 16 MiB at the most; without limits these keep what the step gives back"
    config = dict(num_tokens=61, dim=32, depth=1, max_seq_len=2049, heads=4, dim_head=8, use_full_attn=True, backend='reference', causal=True)
    planned = plan(config, 2048, compare=False, threads=1, most=512)
    (_,peak), = measure([(config, 2048, 1, True, 2)], threads=1)
    assert planned.peak==pytest.approx(peak, rel=.2)

def test_causal_full_attention_has_no_memory_for_pairs():
    "Probes that are wrong by 10 MiB do not grow with the square of the length"
    config,size,mib = dict(small, depth=6, max_seq_len=32768, use_full_attn=True),(32768, 1),2**20
    sizes = probe_sizes(config, *size, most=4096)
    def need(d, n): return 350*mib + 8192*n + kept_bytes(dict(config, depth=d))
    found = [(d*n*n/1e7, need(d, n) + 10*mib*((n==4096) - (n==2048))) for d,n,_ in sizes]
    planned = make_plan(config, size, True, None, {}, sizes, found)
    assert planned.peak==pytest.approx(need(6, 32768), rel=.1)
    assert planned.seconds==pytest.approx(6*32768**2/1e7, rel=1e-6)   # time does

@pytest.mark.parametrize('options', (dict(), dict(ff_activation=torch.nn.ReLU), dict(attn_layers=('local', 'lsh')), dict(attn_layers=['lsh', 'lsh'], local_look_around=[1,0]), dict(axial_position_emb=True, axial_position_shape=(13,20))))
def test_plans_a_model(options):
    model = ReformerLM(**{**small, **options})
    assert plan(model, 33, compare=False, threads=1).peak==pytest.approx(plan({**small, **options}, 33, compare=False, threads=1).peak, rel=.1)

@pytest.mark.parametrize('reverse_thres', (0, 32768))
def test_layers_leave_nothing_behind_unless_the_stack_is_plain(reverse_thres):
    "Probes of one layer hold less by chance, which is no sign of what ten hold; a plain stack keeps the activations of each"
    config,size,mib = dict(small, depth=10, max_seq_len=32768, reverse_thres=reverse_thres),(32768, 1),2**20
    sizes = probe_sizes(config, *size, most=4096)
    def need(d, n): return 350*mib + (4096*d if reverse_thres else 8192 - 4096*(d==1))*n + kept_bytes(dict(config, depth=d))
    planned = make_plan(config, size, True, None, {}, sizes, [(1.*d*n, need(d, n)) for d,n,_ in sizes])
    ids = 0 if reverse_thres else 7*2*2*2*32768   # of the layers that were not probed
    assert planned.peak==pytest.approx(need(10, 32768) + ids, rel=1e-6)

def test_an_activation_that_no_other_process_can_import_is_refused():
    class Mine(torch.nn.ReLU): pass
    with pytest.raises(ValueError, match='ff_activation=.*Mine.* put the class into a module of its own'): plan({**small, 'ff_activation': Mine}, 33, compare=False)

def test_longest_row():
    for budget in (100, 200, 500):
        n = longest_row(lambda n: 50+n, budget, 64)
        assert .98*(budget-50)<=n<=budget-50
    assert longest_row(lambda n: 50+n, 49, 64)==0 and longest_row(lambda n: 50+n, 10**9, 64)==512

@pytest.mark.parametrize('n', (1, 2, 3))
@pytest.mark.parametrize('full', (False, True))
def test_the_shortest_rows(n, full):
    config = dict(small, max_seq_len=8, depth=1, use_full_attn=full)
    sizes = probe_sizes(config, n, 1)
    found = [(float(m), float(kept_bytes(config)+m)) for _,m,_ in sizes]
    planned = make_plan(config, (n, 1), True, None, {}, sizes, found)
    assert planned.seconds==pytest.approx(n) and planned.peak-kept_bytes(config)==pytest.approx(n)

def test_the_fastest_that_fits_is_best():
    def some(seconds, peak): return Plan(8, 1, {}, seconds, peak, {}, 8, 100.)
    assert some(1, 99).fits and not some(1, 101).fits and Plan(8, 1, {}, 1, 1e12, {}).fits

def test_plans_and_measures():
    state,threads = torch.get_rng_state(),torch.get_num_threads()
    planned = plan(dict(small, depth=1), 64, 2, budget=4, threads=1)
    (_,peak),(_,larger) = measure([(dict(small, depth=1), 64, 2, True), (dict(small, dim=256), 256, 8, True)], threads=1)
    assert abs(planned.peak/peak-1)<.2 and larger>peak
    assert planned.fits and planned.best in (planned, *planned.others) or planned.best.seconds<=planned.seconds
    assert sum(planned.parts.values())==pytest.approx(planned.peak)
    assert {'ff_chunks', 'use_full_attn'}=={k for o in planned.others for k in o.changes}
    assert planned.longest>64 and 'recommended within 4.00 GiB' in repr(planned)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads()==threads

def test_failures_are_told(capsys):
    with pytest.raises(ChildProcessError, match='2 rows of 999 tokens could not be measured: ValueError: 999 tokens'): measure([(small, 999, 2, True)], threads=1)
    with pytest.raises(ValueError, match='model lacks depth'): plan(dict(num_tokens=5, dim=8), 64)
    assert main('plan --budget -1'.split())==2 and 'budget=-1.0 must be above 0' in capsys.readouterr().err
    assert main('plan --heads 0'.split())==2 and capsys.readouterr().err.startswith('reformer-nb: heads=0 must be at least 1')

@pytest.mark.parametrize('limit', ('reverse_thres', 'full_attn_thres'))
def test_probes_run_as_the_step(monkeypatch, limit):
    "A limit between probes and step: short probes would be plain, or attend fully, where the step does not"
    seen = []
    def note(cases, **_): return [seen.append(config.get(limit, 0)) or (1., 2**30) for config,*_ in cases]
    monkeypatch.setattr('reformer_nb.planner.measure', note)
    options = dict(small, depth=4, max_seq_len=1024, **{limit: 512})
    plan(options, 1024, most=256, compare=False)
    assert set(seen)=={0}
    seen.clear()
    plan(options, 512, most=256, compare=False)
    assert set(seen)=={512}

@pytest.mark.parametrize('options,each', ((dict(), 2*2*2), (dict(n_local_attn_heads=1), 2*1*2), (dict(use_full_attn=True), 0), (dict(reverse_thres=8192), 0)))
def test_bucket_ids_of_further_layers(options, each):
    "A reversible layer that is not probed adds its ids, in training alone"
    def beyond_weights(depth, training):
        config = dict(small, depth=depth, max_seq_len=8192, **options)
        sizes = probe_sizes(config, 8192, 1, most=512)
        same = [(1., 2**30 + kept_bytes(dict(config, depth=d), training)) for d,_,_ in sizes]
        return make_plan(config, (8192, 1), training, None, {}, sizes, same).peak - kept_bytes(config, training)
    assert beyond_weights(23, True)-beyond_weights(3, True)==pytest.approx(20*8192*each, abs=64)
    assert beyond_weights(23, False)==pytest.approx(beyond_weights(3, False), abs=64)

@pytest.mark.parametrize('options', (dict(full_attn_thres=-5), dict(reverse_thres=2.5), dict(attn_layers=('local', 'local'), full_attn_thres=64)), ids=str)
def test_what_makes_no_model_has_no_plan(options):
    with pytest.raises((TypeError, ValueError)) as wanted: ReformerLM(**small, **options)
    with pytest.raises(type(wanted.value)) as found: plan({**small, **options}, 256, compare=False)
    assert str(found.value)==str(wanted.value)

@pytest.mark.parametrize('options', (dict(), dict(twin_attention=True), dict(n_local_attn_heads=1)), ids=str)
def test_bucket_ids_are_those_that_are_kept(options):
    "Bytes for each token and layer that autograd keeps as integers of two bytes"
    def kept(depth):
        model,found = ReformerLM(**{**small, **options, 'depth': depth}),{}
        def note(o):
            if o.dtype==torch.int16: found[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
            return o
        with torch.autograd.graph.saved_tensors_hooks(note, lambda o: o): _loss = model.loss(torch.zeros(1, 257, dtype=torch.int64))
        return sum(found.values())
    assert kept(3)-kept(1)==2*256*id_bytes({**small, **options}, 256)
