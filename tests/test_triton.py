"The GPU kernels under Triton's interpreter, or on a GPU where there is one; and whether they compile for one"
import os, random, runpy, shutil, subprocess, sys
import torch
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'   # before Triton is imported
from itertools import product
import grids
import pytest
pytest.importorskip('triton')
from reformer_nb import buckets as buckets_module
from reformer_nb import triton_forward, triton_lsh, triton_tiles
from reformer_nb.buckets import assign_buckets, bucket_digits, split_counts
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.fused_lsh import fused_lsh_attention
from reformer_nb.hasher import BucketHasher
from reformer_nb.hashing import random_rotations
from reformer_nb.self_attention import LSHSelfAttention
from reformer_nb.strict import strict_attention_oracle
from reformer_nb.triton_forward import tile_rows
from reformer_nb import triton_hashing
from reformer_nb.triton_hashing import hash_on_gpu
from reformer_nb.triton_lsh import triton_lsh_attention

device = 'cuda' if torch.cuda.is_available() else 'cpu'

def draw(*shape, seed=0, dtype=torch.float):
    "Normal numbers that depend on the seed alone"
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

def chance(*shape, rate, seed=0):
    "True with probability `rate`"
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate).to(device)

def masks(kind, b, n):
    "No mask, padding at the end of a row, or holes"
    if kind=='none': return None
    return (torch.arange(n) < torch.tensor([[max(1, n//2)], [n]])[:b]).to(device) if kind=='end' else chance(b, n, rate=.6, seed=n)

def results(f, qk, v, buckets, **options):
    "Output and gradients"
    x,y = (o.clone().requires_grad_() for o in (qk, v))
    out = f(x, y, buckets, **options)
    weights = draw(*out.shape, seed=9, dtype=torch.double).to(out.dtype)
    return out,*torch.autograd.grad((out*weights).sum(), (x, y), allow_unused=True, materialize_grads=True)

def compare(found, wanted, **tolerance):
    for a,b in zip(found, wanted): torch.testing.assert_close(a, b, **tolerance)

def case_inputs(n, m, r, mask, ask, silent, pairs, b=1):
    "Small inputs, and the options that depend on their size"
    qk,v = draw(b, 1, n, 6, seed=1),draw(b, 1, n, 5, seed=2)
    mask,query_len = masks(mask, b, n),max(1, int(ask*n))
    options = dict(bucket_size=m, mask=mask, scale=.7, query_len=query_len, key_mask=chance(b, n, rate=.7) if silent else None,
                   attn_mask=chance(b, query_len, n, rate=.6) if pairs else None)
    return (qk,v,BucketHasher(r, m).eval()(qk, mask)),options

grid = list(product((1, 13, 20), (5, 8, 16), (1, 2, 3), (False, True), ('none', 'round', 'rounds'), (True, False), (True, False),
                    ('none', 'end', 'holes'), (1., .6), (False, True), (False, True)))
grid = random.Random(0).sample(grid, 400)   # the interpreter takes seconds for a case: all of them would take hours

@pytest.mark.parametrize('n,m,r,causal,look_back,across,duplicates,mask,ask,silent,pairs', grids.sample(grid, 10, seed=1))
def test_kernels_equal_the_oracle(n, m, r, causal, look_back, across, duplicates, mask, ask, silent, pairs):
    inputs,options = case_inputs(n, m, r, mask, ask, silent, pairs)
    options |= dict(causal=causal, look_back=look_back, attend_across_buckets=across, allow_duplicate_attention=duplicates)
    compare(*(results(f, *inputs, **options) for f in (triton_lsh_attention, lsh_attention_oracle)), rtol=0, atol=1e-4)

strict_grid = list(product((13, 20), (5, 8), (1, 2), (True, False), ('none', 'holes'), (False, True)))

@pytest.mark.parametrize('n,m,r,duplicates,mask,silent', grids.sample(strict_grid, 3))
def test_strict_equals_the_oracle(n, m, r, duplicates, mask, silent):
    inputs,options = case_inputs(n, m, r, mask, 1., silent, pairs=False)
    options |= dict(allow_duplicate_attention=duplicates)
    found = results(triton_lsh_attention, *inputs, **options, causal='strict')
    compare(found, results(strict_attention_oracle, *inputs, **options), rtol=0, atol=1e-4)

@pytest.mark.parametrize('causal', (True, 'strict'))
def test_in_a_layer(monkeypatch, causal):
    "`backend='triton'`: the kernels, and for what stands outside of a strict text PyTorch"
    layers,called = [],[]
    monkeypatch.setattr(triton_lsh, 'triton_lsh_attention', lambda *args, **options: called.append(1) or triton_lsh_attention(*args, **options))
    for backend in ('triton', 'reference'):
        torch.manual_seed(0)
        layers.append(LSHSelfAttention(8, 2, 8, 2, causal=causal, n_buckets=2, num_mem_kv=1, backend=backend).to(device).eval())
    x,found = draw(1, 20, 8, seed=1),[]
    for o in layers:
        out = o(x)
        found.append((out, *torch.autograd.grad(out.sin().sum(), list(o.parameters()))))
    compare(*found, rtol=0, atol=1e-4)
    assert len(called)==1

@pytest.mark.parametrize('mask', ('none', 'end', 'holes'))
def test_log_sum_exp_and_its_gradient(mask):
    inputs,options = case_inputs(20, 8, 2, mask, 1., True, False, b=2)
    del options['attn_mask']
    real = 1. if options['mask'] is None else options['mask'][:,None,:options['query_len']].float()   # of padding nobody asks
    found = []
    for f in (triton_lsh_attention, fused_lsh_attention):
        x,y = (o.clone().requires_grad_() for o in inputs[:2])
        out,lse = f(x, y, inputs[2], **options, causal=True, return_lse=True)
        lse = lse.clamp(min=-9)*real   # of those who see nobody the value depends on the dtype
        of_lse = (lse*draw(*lse.shape, seed=5)).sum()
        for loss in (out.sin().sum()+of_lse, of_lse): found.append((out, lse, *torch.autograd.grad(loss, (x, y), retain_graph=True, materialize_grads=True)))
    for a,b in zip(found[:2], found[2:]): compare(a, b, rtol=0, atol=1e-4)

def tiles_of(monkeypatch, budget):
    "Let tiles have what rows fit into `budget` bytes"
    monkeypatch.setattr(triton_forward, 'tile_rows', lambda m, row, _: tile_rows(m, row, budget))

def test_tiles_change_nothing(monkeypatch):
    "Chunks of 18 in one tile and in two, dropout included"
    (qk,v,_),options = case_inputs(22, 18, 2, 'none', 1., False, False)
    found,buckets = [],BucketHasher(2, 18).eval()(qk)
    for budget in (1, 2**20):
        tiles_of(monkeypatch, budget)
        torch.manual_seed(0)
        found.append(results(triton_lsh_attention, qk, v, buckets, **options, dropout=.3, look_back='rounds'))
    compare(*found, rtol=0, atol=1e-5)

def test_rows_heads_and_layouts():
    "Two rows of different length, two heads, three rounds that look back to each other, memory in any order"
    qk,v = draw(2, 2, 12, 16, seed=1),draw(2, 2, 12, 20, seed=2)
    mask = masks('end', 2, 12)
    inputs,options = (qk,v,BucketHasher(3, 8).eval()(qk, mask)),dict(bucket_size=8, mask=mask, look_back='rounds')
    found = results(triton_lsh_attention, *inputs, **options)
    compare(found, results(lsh_attention_oracle, *inputs, **options), rtol=0, atol=1e-4)
    other = (qk.transpose(1, 2).contiguous().transpose(1, 2),v.mT.contiguous().mT,inputs[2])
    assert torch.equal(found[0], triton_lsh_attention(*other, **options))

interpreter_lacks_it = pytest.param(torch.bfloat16, 2**-6, marks=pytest.mark.cuda)   # multiplies its bits as integers

@pytest.mark.parametrize('dtype,bound', (interpreter_lacks_it, (torch.half, 2**-9)))
def test_half_precision_is_that_of_its_inputs(dtype, bound):
    qk,v = draw(1, 1, 32, 16, seed=3, dtype=dtype),draw(1, 1, 32, 16, seed=4, dtype=dtype)
    buckets,options = BucketHasher(2, 16).eval()(qk),dict(bucket_size=16, causal=True)
    found = results(triton_lsh_attention, qk, v, buckets, **options)
    wanted = results(lsh_attention_oracle, qk.double(), v.double(), buckets, **options)
    for a,b in zip(found, wanted):
        assert a.dtype==dtype
        assert (a-b).norm() < bound*b.norm()

@pytest.mark.parametrize('size', (1e-3, 100.))
def test_float32_of_all_sizes(size):
    (qk,v,buckets),options = case_inputs(16, 8, 1, 'none', 1., False, False)
    found = results(triton_lsh_attention, qk*size, v, buckets, **options)
    wanted = results(lsh_attention_oracle, qk.double()*size, v.double(), buckets, **options)
    for a,b in zip(found, wanted): assert (a-b).norm() < 1e-4*b.norm()

def test_padding_is_never_read():
    (qk,v,buckets),options = case_inputs(16, 8, 1, 'holes', 1., False, False)
    hide = lambda x, fill: x.masked_fill(~options['mask'][:,None,:,None], fill)
    found,wanted = (results(triton_lsh_attention, hide(qk, fill), hide(v, fill), buckets, **options) for fill in (torch.nan, 0))
    compare(found, wanted, rtol=0, atol=0)

def test_values_that_nobody_may_see_are_never_read():
    (qk,v,buckets),options = case_inputs(16, 8, 1, 'none', 1., False, False)
    seen = chance(len(qk), qk.shape[2], rate=.7)
    found,wanted = (results(triton_lsh_attention, qk, v.masked_fill(~seen[:,None,:,None], fill), buckets, **{**options, 'key_mask': seen}) for fill in (torch.nan, 0))
    compare(found, wanted, rtol=0, atol=0)

def test_dropout_equals_a_replayed_mask():
    "Unit values make the mask visible: kept weights are 1/(1-p) times what they were; the backward pass uses the same"
    n,p = 32,.25
    qk,unit = draw(1, 1, n, 6, seed=7),torch.eye(n, device=device).expand(1, 1, n, n)
    buckets,options = BucketHasher(1, 16).eval()(qk),dict(bucket_size=16)
    def seeded(qk, v, buckets):
        torch.manual_seed(1)
        return triton_lsh_attention(qk, v, buckets, dropout=p, **options)
    plain = triton_lsh_attention(qk, unit, buckets, **options)
    keep = seeded(qk, unit, buckets)/plain.where(plain>0, 1)
    assert ((keep==0) | (keep-1/(1-p)).abs().lt(1e-5)).all()
    assert abs(keep[plain>0].count_nonzero()/plain.count_nonzero()-(1-p)) < .08
    order = buckets[0,0,0].sort(stable=True).indices
    drawn = (keep[0,0][order][:,order]==0)[16:]   # the second chunk sees the first and itself: other bits for each
    assert (drawn[:,:16]!=drawn[:,16:]).float().mean() > .2
    def replayed(qk, v, buckets): return (lsh_attention_oracle(qk, unit, buckets, **options)*keep) @ v
    v = draw(1, 1, n, 5, seed=8)
    compare(results(seeded, qk, v, buckets), results(replayed, qk, v, buckets), rtol=0, atol=1e-5)

def test_backward_twice_is_the_same():
    inputs,options = case_inputs(16, 8, 2, 'none', 1., False, False)
    compare(*(results(triton_lsh_attention, *inputs, causal=True, **options) for _ in range(2)), rtol=0, atol=0)

def test_second_derivatives_raise():
    (qk,v,buckets),options = case_inputs(8, 8, 1, 'none', 1., False, False)
    qk.requires_grad_()
    dqk, = torch.autograd.grad(triton_lsh_attention(qk, v, buckets, **options).sum(), qk, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivatives'): dqk.pow(2).sum().backward()

widths = list(product((16, 24, 64, 80, 128, 256), (torch.half, torch.float)))

@pytest.mark.parametrize('d,dtype', grids.sample(widths, 4))
def test_head_widths(d, dtype):
    "Powers of two and not, queries and values of different width"
    qk,v = draw(1, 1, 20, d, seed=1, dtype=dtype),draw(1, 1, 20, max(16, d-6), seed=2, dtype=dtype)
    buckets,options = BucketHasher(2, 16).eval()(qk),dict(bucket_size=16, causal=True, scale=d**-.5)
    found = results(triton_lsh_attention, qk, v, buckets, **options)
    wanted = results(lsh_attention_oracle, qk.double(), v.double(), buckets, **options)
    for a,b in zip(found, wanted): assert (a-b).norm() < (2**-9 if dtype==torch.half else 1e-5)*b.norm()

# ---- hashing -------------------------------------------------------------------------------------------------------

def on_device(o): return tuple(map(on_device, o)) if isinstance(o, tuple) else o.to(device) if isinstance(o, torch.Tensor) else o

def same_ids(found, wanted):
    "Equal but for ties"
    assert found.dtype==wanted.dtype and (found.cpu()!=wanted).float().mean() < 1e-3

hash_grid = list(product((1, 33, 70), (6, 16, 100), (1, 3), (1, 2, 4), ((2,), (34,), (4, 6), (2, 4, 6), 'rows'), (False, True),
                         (torch.float, torch.half, torch.bfloat16)))

@pytest.mark.parametrize('n,d,r,heads,factors,masked,dtype', grids.sample(hash_grid, 24, seed=2))
def test_hash_kernel_equals_the_hash(n, d, r, heads, factors, masked, dtype):
    "Of two rows and two heads; rotations for all, for each head, and for each row and head"
    vecs,mask = draw(2, n, 2, d, seed=1, dtype=dtype).transpose(1, 2),torch.arange(n) < torch.tensor([[n], [max(1, n//2)]])
    sizes,counts = (factors,factors) if factors!='rows' else ((128, 12),split_counts(torch.tensor([144, 10])))
    drawn = tuple(random_rotations(d, f, n_hashes=r, n_heads=heads, generator=torch.Generator().manual_seed(f)) for f in sizes)
    wanted = assign_buckets(vecs.cpu(), drawn, counts, mask=mask if masked else None, n_ids=2000)
    same_ids(hash_on_gpu(vecs, bucket_digits(on_device(drawn), on_device(counts)), mask.to(device) if masked else None, 2000), wanted)

def test_hash_kernel_ties_zeros_and_layouts():
    "Small integers, whose products are exact: the first of equal ends counts, in any order of memory"
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).float()
    vecs,turn = whole(2, 3, 50, 5),whole(1, 5, 2, 100)   # two blocks of columns
    vecs[:,:,:7] = 0
    wanted = assign_buckets(vecs, turn, 200)
    for x in (vecs, vecs.mT.contiguous().mT, vecs.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(hash_on_gpu(x.to(device), bucket_digits(turn.to(device), 200), None, 200).cpu(), wanted)
    assert not wanted[:,:,:,:7].any() and len(wanted.unique())>20

@pytest.mark.parametrize('options', (dict(), dict(n_buckets=(4, 6)), dict(random_rotations_per_head=True), dict(hash_seed=None), dict(drop_for_hash_rate=.2)))
def test_a_hasher_calls_the_kernel(monkeypatch, options):
    "Where `kernel_hashes` says so, with rows on both sides of the limit of one digit"
    vecs,mask = draw(2, 2, 600, 8, seed=1),torch.arange(600) < torch.tensor([[600], [70]])
    ids = []
    for able in (True, False):
        monkeypatch.setattr(buckets_module, 'kernel_hashes', lambda vecs, n_best, able=able: able)
        torch.manual_seed(0)
        ids.append(BucketHasher(2, 4, **options).train()(vecs, mask.to(device)))
    same_ids(ids[0], ids[1].cpu())

@pytest.mark.parametrize('broken', ('raises', 'lies'))
def test_a_device_that_hashes_wrongly_is_left_to_pytorch(monkeypatch, broken):
    def kernel(vecs, digits, mask, n_ids):
        if broken=='raises': raise RuntimeError('no such instruction')
        return torch.zeros(*vecs.shape[:2], 2, vecs.shape[2], dtype=torch.int16, device=vecs.device)
    monkeypatch.setattr(triton_hashing, 'hash_on_gpu', kernel)
    monkeypatch.setattr(buckets_module, 'kernel_hashes', lambda vecs, n_best: True)
    triton_hashing.kernel_agrees.cache_clear()
    x,hasher = draw(1, 2, 100, 64, seed=1),BucketHasher(2, 4).eval()
    try:
        with pytest.warns(UserWarning, match='no such instruction' if broken=='raises' else 'gives other ids'): found = hasher(x)
        same_ids(found, hasher(x.cpu()))
    finally: triton_hashing.kernel_agrees.cache_clear()

@pytest.mark.cuda
def test_hashers_on_a_gpu_take_the_kernel():
    x = draw(1, 2, 100, 64, seed=1)
    assert buckets_module.kernel_hashes(x, 1) and not buckets_module.kernel_hashes(x.double(), 1)
    for o in (BucketHasher(2, 4).eval(),): same_ids(o(x), o(x.cpu()))

# ---- without and with a GPU ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', (90, pytest.param(75, marks=pytest.mark.slow)))
def test_kernels_compile(tmp_path, arch):
    "Without a GPU, for an H100: what stays in registers; under --all also that the rarer options and sizes compile, and for a T4"
    env = {k: v for k,v in os.environ.items() if k!='TRITON_INTERPRET'} | dict(TRITON_CACHE_DIR=str(tmp_path))
    args = [str(arch)] + (['--all'] if grids.whole and arch==90 else [])
    res = subprocess.run([sys.executable, os.path.join(os.path.dirname(__file__), 'compile_triton.py'), *args], env=env, capture_output=True, text=True)
    assert not res.returncode, res.stdout+res.stderr

@pytest.mark.cuda
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('tool', ('memcheck', 'racecheck'))
def test_compute_sanitizer_finds_nothing(tool):
    "Some of the tests above, each allocation by itself: no access outside of arrays, no races in shared memory"
    sanitizer = shutil.which('compute-sanitizer') or shutil.which('compute-sanitizer', path='/usr/local/cuda/bin')
    if not sanitizer: pytest.skip('compute-sanitizer, a part of the CUDA toolkit, is not installed')
    some = 'rows_heads or replayed_mask or strict_equals or ties_zeros or (hash_kernel_equals and rows)'
    command = [sanitizer, '--tool', tool, '--target-processes', 'all', '--error-exitcode', '9', sys.executable, '-m', 'pytest', '-q', __file__, '-k', some]
    res = subprocess.run(command, env=os.environ | dict(PYTORCH_NO_CUDA_MEMORY_CACHING='1'), capture_output=True, text=True)
    assert not res.returncode, res.stdout[-4000:]+res.stderr[-1000:]

def test_without_triton_the_tiles_import_and_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)   # any import of it fails
    names = runpy.run_path(triton_tiles.__file__)
    with pytest.raises(ImportError, match='pip install triton'): names['check_triton'](draw(1))
