"Fused LSH attention: float64 grids against the oracle, lower precision, dropout, derivatives"
from functools import partial
from itertools import product
import grids
import pytest
import torch
from reformer_nb import fused
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.fused_lsh import fused_lsh_attention
from reformer_nb.hasher import BucketHasher
from reformer_nb.lsh import lsh_attention

def draw(*shape, seed=0, dtype=torch.double):
    "Normal numbers that depend on the seed alone"
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).to(dtype)

def chance(*shape, rate, seed=0):
    "True with probability `rate`"
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate

def masks(kind, b, n):
    "No mask, padding at the end of a row, or holes"
    if kind=='none': return None
    return torch.arange(n) < torch.tensor([[n], [max(1, n//2)]]) if kind=='end' else chance(b, n, rate=.6, seed=n)

def results(f, qk, v, buckets, **options):
    "Output and gradients; zeros where nothing depends on an input"
    x,y = (o.clone().requires_grad_() for o in (qk, v))
    out = f(x, y, buckets, **options)
    return out,*torch.autograd.grad((out*draw(*out.shape, seed=9, dtype=out.dtype)).sum(), (x, y), allow_unused=True, materialize_grads=True)

def compare(found, wanted, **tolerance):
    for a,b in zip(found, wanted): torch.testing.assert_close(a, b, **tolerance)

grid = list(product((1, 5, 16, 23, 48), (4, 8), (1, 2, 4), (False, True), ('none', 'round', 'rounds'), (True, False), (True, False),
                    ('none', 'end', 'holes'), (1., .6), (False, True), (False, True)))

@pytest.mark.parametrize('n,m,r,causal,look_back,across,duplicates,mask,ask,silent,pairs', grids.sample(grid, 120))
def test_fused_equals_the_oracle(n, m, r, causal, look_back, across, duplicates, mask, ask, silent, pairs):
    qk,v = draw(2, 3, n, 6, seed=1),draw(2, 3, n, 5, seed=2)
    mask,query_len = masks(mask, 2, n),max(1, int(ask*n))
    buckets = BucketHasher(r, m).eval()(qk, mask)
    options = dict(bucket_size=m, causal=causal, mask=mask, scale=.7, look_back=look_back, attend_across_buckets=across,
                   allow_duplicate_attention=duplicates, query_len=query_len,
                   key_mask=chance(2, n, rate=.7) if silent else None, attn_mask=chance(2, query_len, n, rate=.6) if pairs else None)
    compare(*(results(f, qk, v, buckets, **options) for f in (fused_lsh_attention, lsh_attention_oracle)), rtol=0, atol=1e-12)

def long_inputs(dtype=torch.float, n=600):
    "Inputs of several blocks and strips, and their buckets"
    qk,v = draw(2, 3, n, 32, seed=3, dtype=dtype),draw(2, 3, n, 32, seed=4, dtype=dtype)
    return qk,v,BucketHasher(3, 16).eval()(qk)

def small_blocks(monkeypatch, scores, places):
    "Make a short sequence run through many blocks and strips"
    cut,strips = fused.cut_blocks,fused.make_strips
    monkeypatch.setattr(fused, 'cut_blocks', lambda strip, by_key: cut(strip, by_key=by_key, scores=scores))
    monkeypatch.setattr(fused, 'make_strips', lambda *args: strips(*args, places=places))

@pytest.mark.parametrize('dropout', (0., .3))
@pytest.mark.parametrize('scores,places', ((1, 1), (5*512, 1), (2**20, 2**20)))
def test_blocks_and_strips_change_nothing(monkeypatch, scores, places, dropout):
    qk,v,buckets = long_inputs(torch.double)
    options = dict(bucket_size=16, causal=True, dropout=dropout, look_back='rounds')
    small_blocks(monkeypatch, 2**12, 2**10)
    torch.manual_seed(0)
    wanted = results(fused_lsh_attention, qk, v, buckets, **options)
    monkeypatch.undo()
    small_blocks(monkeypatch, scores, places)
    torch.manual_seed(0)
    compare(results(fused_lsh_attention, qk, v, buckets, **options), wanted, rtol=0, atol=1e-12)

@pytest.mark.parametrize('causal,look_back,duplicates', list(product((False, True), ('none', 'rounds'), (True, False))))
def test_float32_equals_the_reference(causal, look_back, duplicates):
    options = dict(bucket_size=16, causal=causal, look_back=look_back, allow_duplicate_attention=duplicates)
    compare(*(results(f, *long_inputs(), **options) for f in (fused_lsh_attention, partial(lsh_attention, backend='reference'))), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('size', (1e-3, 1., 100.))
def test_float32_of_all_sizes(size):
    qk,v,buckets = long_inputs()
    found = results(fused_lsh_attention, qk*size, v, buckets, bucket_size=16)
    wanted = results(lsh_attention_oracle, qk.double()*size, v.double(), buckets, bucket_size=16)
    for a,b in zip(found, wanted): assert (a-b).norm() < 1e-4*b.norm()

@pytest.mark.parametrize('dtype,bound', ((torch.bfloat16, 2**-6), (torch.half, 2**-9)))
def test_half_precision_is_that_of_its_inputs(dtype, bound):
    qk,v,buckets = long_inputs(dtype)
    found = results(fused_lsh_attention, qk, v, buckets, bucket_size=16, causal=True)
    wanted = results(lsh_attention_oracle, qk.double(), v.double(), buckets, bucket_size=16, causal=True)
    for a,b in zip(found, wanted):
        assert a.dtype==dtype
        assert (a-b).norm() < bound*b.norm()

def test_autocast_changes_nothing():
    qk,v,buckets = long_inputs()
    with torch.autocast('cpu', dtype=torch.bfloat16): found = results(fused_lsh_attention, qk, v, buckets, bucket_size=16)
    compare(found, results(fused_lsh_attention, qk, v, buckets, bucket_size=16), rtol=0, atol=0)

def test_padding_is_never_read():
    qk,v,_ = long_inputs()
    mask = chance(2, 600, rate=.7)
    hide = lambda x, fill: x.masked_fill(~mask[:,None,:,None], fill)
    buckets = BucketHasher(3, 16).eval()(qk, mask)
    found,wanted = (results(fused_lsh_attention, hide(qk, fill), hide(v, fill), buckets, bucket_size=16, mask=mask) for fill in (torch.nan, 0))
    compare(found, wanted, rtol=0, atol=0)

@pytest.mark.parametrize('options', (dict(), dict(causal=True), dict(causal='strict'), dict(allow_duplicate_attention=False), dict(dropout=.2)))
@pytest.mark.parametrize('f', (fused_lsh_attention, lsh_attention, partial(lsh_attention, backend='reference')))
def test_values_that_nobody_may_see_are_never_read(f, options):
    qk,v,_ = long_inputs()
    seen,found = chance(2, 600, rate=.7),[]
    for fill in (torch.nan, torch.inf, 0):
        torch.manual_seed(0)
        found.append(results(f, qk, v.masked_fill(~seen[:,None,:,None], fill), BucketHasher(3, 16, n_buckets=8).eval()(qk), bucket_size=16, key_mask=seen, **options))
    for o in found[:2]: compare(o, found[2], rtol=0, atol=0)

gradient_options = [dict(), dict(causal=True), dict(look_back='rounds', allow_duplicate_attention=False), dict(attend_across_buckets=False)]

@pytest.mark.parametrize('options', gradient_options)
@pytest.mark.parametrize('dropout', (0., .4))
def test_gradcheck(options, dropout):
    qk,v = draw(1, 2, 13, 4, seed=5).requires_grad_(),draw(1, 2, 13, 3, seed=6).requires_grad_()
    buckets = BucketHasher(2, 4).eval()(qk)
    def f(qk, v):
        torch.manual_seed(3)
        return fused_lsh_attention(qk, v, buckets, bucket_size=4, scale=.8, dropout=dropout, **options)
    assert torch.autograd.gradcheck(f, (qk, v))

@pytest.mark.parametrize('causal,m', list(product((False, True), (4, 8))))
def test_dropout_equals_a_replayed_mask(causal, m):
    "One round shows a pair once, so unit values make the mask visible: kept weights are 1/(1-p) times what they were"
    n,p = 40,.25
    qk = draw(1, 2, n, 6, seed=7)
    buckets,options = BucketHasher(1, m).eval()(qk),dict(bucket_size=m, causal=causal)
    unit = torch.eye(n, dtype=torch.double).expand(1, 2, n, n)
    def seeded(qk, v, buckets):
        torch.manual_seed(1)
        return fused_lsh_attention(qk, v, buckets, dropout=p, **options)
    plain = fused_lsh_attention(qk, unit, buckets, **options)
    alone = plain.diagonal(dim1=-2, dim2=-1)==1
    keep = torch.where(alone[...,None], 1, seeded(qk, unit, buckets)/plain.where(plain>0, 1))
    assert ((keep.round(decimals=9)==0) | (keep-1/(1-p)).abs().lt(1e-9) | (keep==1)).all()
    def replayed(qk, v, buckets): return (lsh_attention_oracle(qk, unit, buckets, **options)*keep) @ v
    v = draw(1, 2, n, 5, seed=8)
    compare(results(seeded, qk, v, buckets), results(replayed, qk, v, buckets), rtol=0, atol=1e-12)

def test_dropout_drops_the_share_that_it_should():
    qk,v,buckets = long_inputs()
    ones = torch.ones_like(v[...,:1])
    torch.manual_seed(0)
    out = fused_lsh_attention(torch.zeros_like(qk), ones, buckets, bucket_size=16, dropout=.1)   # equal weights
    assert abs(out.mean()-1) < 5*(.1/.9/(out.numel()*48))**.5*3
    torch.manual_seed(0)
    assert torch.equal(out, fused_lsh_attention(torch.zeros_like(qk), ones, buckets, bucket_size=16, dropout=.1))

def test_backward_twice_is_the_same():
    a,b = (results(fused_lsh_attention, *long_inputs(), bucket_size=16, causal=True) for _ in range(2))
    compare(a, b, rtol=0, atol=0)

def test_second_derivatives_raise():
    qk,v,buckets = long_inputs(torch.double)
    qk.requires_grad_()
    dqk, = torch.autograd.grad(fused_lsh_attention(qk, v, buckets, bucket_size=16).sum(), qk, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivatives'): dqk.pow(2).sum().backward()

def test_torch_func():
    qk,v,buckets = long_inputs(torch.double)
    found = torch.func.grad(lambda x: fused_lsh_attention(x, v, buckets, bucket_size=16).sin().sum())(qk)
    x = qk.clone().requires_grad_()
    fused_lsh_attention(x, v, buckets, bucket_size=16).sin().sum().backward()
    assert torch.equal(found, x.grad)

def test_one_input_without_gradient():
    qk,v,buckets = long_inputs(torch.double)
    _,dqk,dv = results(fused_lsh_attention, qk, v, buckets, bucket_size=16)
    for i,(x,want) in enumerate(((qk, dqk), (v, dv))):
        inputs = [qk, v]
        inputs[i] = x.clone().requires_grad_()
        out = fused_lsh_attention(*inputs, buckets, bucket_size=16)
        (out*draw(*out.shape, seed=9)).sum().backward()
        assert torch.equal(inputs[i].grad, want)

def test_nothing_of_the_size_of_the_scores_is_kept():
    n = 4096
    qk,v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(2))
    buckets,kept = BucketHasher(4, 64).eval()(qk.detach()),0
    def count(x):
        nonlocal kept
        kept += x.numel()*x.element_size()
        return x
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x): fused_lsh_attention(qk, v, buckets, causal=True, dropout=.1)
    assert kept <= 2*n*4*(3*16 + 1 + 4)   # qk, v, output, log-sum-exp, four orders; all of 4 bytes
