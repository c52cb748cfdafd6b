"Grids in float64: LSH attention against the oracle, the reversible stack against the plain one"
import copy
from functools import partial
from itertools import product
import grids
import pytest
import torch
from reformer_nb.attention import FullQKAttention
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.hasher import BucketHasher
from reformer_nb.lsh import LSHAttention, lsh_attention, lsh_weights
from reformer_nb.reformer import Reformer

def masks(kind, b, n):
    "No mask, padding at the end of a row, or holes"
    if kind=='none': return None
    if kind=='end': return torch.arange(n) < torch.tensor([[n], [max(1, n//2)]])
    return torch.rand(b, n, generator=torch.Generator().manual_seed(n)) > .4

def hidden(kind, b, n, query_len):
    "Keys that nobody may see: none, those that ask (attention to the context alone), or any"
    if kind=='none': return None
    if kind=='context': return torch.arange(n).expand(b, n) >= query_len
    return torch.rand(b, n, generator=torch.Generator().manual_seed(n+1)) > .4

def pairs(kind, b, n, query_len):
    "No matrix of pairs, or a random one whose first row allows nothing"
    if not kind: return None
    return (torch.rand(b, query_len, n, generator=torch.Generator().manual_seed(n+2)) > .5).index_fill(1, torch.tensor([0]), False)

lsh_grid = list(product((1, 5, 16, 23, 48), (4, 8), (1, 2, 4), (False, True), ('none', 'round', 'rounds'), (True, False), (True, False),
                        ('none', 'end', 'holes'), (None, .6), ('none', 'context', 'any'), (False, True)))

@pytest.mark.parametrize('n,m,r,causal,look_back,across,duplicates,mask,asking,keys,matrix', grids.sample(lsh_grid, 300))
def test_lsh_attention_equals_the_oracle(n, m, r, causal, look_back, across, duplicates, mask, asking, keys, matrix):
    generator = torch.Generator().manual_seed(0)
    qk,v,weights = (torch.randn(2, 3, n, 6, dtype=torch.double, generator=generator) for _ in range(3))
    query_len,mask = n if asking is None else max(1, int(asking*n)),masks(mask, 2, n)
    buckets = BucketHasher(r, m).eval()(qk, mask)
    options = dict(bucket_size=m, causal=causal, mask=mask, look_back=look_back, attend_across_buckets=across, allow_duplicate_attention=duplicates,
                   query_len=None if asking is None else query_len, key_mask=hidden(keys, 2, n, query_len), attn_mask=pairs(matrix, 2, n, query_len))
    results = []
    for f in (partial(lsh_attention, backend='reference'), lsh_attention_oracle):   # test_fused.py has the other backend
        x,y = qk.clone().requires_grad_(),v.clone().requires_grad_()
        out = f(x, y, buckets, **options)
        (out*weights[:,:,:query_len]).sum().backward()
        results.append((out, x.grad, y.grad))
    zero = torch.zeros_like(qk)
    results[0] += (lsh_weights(qk, buckets, **options),)
    results[1] += (lsh_attention_oracle(qk, v, buckets, return_weights=True, **options)[1],)
    for a,b in zip(*results): torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-12)

around_grid = list(product((1, 16, 23, 48), (4, 8), (1, 2, 4), (False, True), ((0,0), (2,0), (0,1), (1,1), (1,2)), (True, False), (True, False), (None, .6),
                           ('none', 'any'), (False, True), (0., 1e-3)))

@pytest.mark.parametrize('n,m,r,causal,around,across,duplicates,asking,keys,matrix,eps', grids.sample(around_grid, 60))
def test_other_neighbours_and_short_keys_equal_the_oracle(n, m, r, causal, around, across, duplicates, asking, keys, matrix, eps):
    generator = torch.Generator().manual_seed(0)
    qk,v,weights = (torch.randn(2, 3, n, 6, dtype=torch.double, generator=generator) for _ in range(3))
    query_len,buckets = n if asking is None else max(1, int(asking*n)),BucketHasher(r, m).eval()(qk)
    options = dict(bucket_size=m, causal=causal, look_back='rounds', attend_across_buckets=across, allow_duplicate_attention=duplicates, key_eps=eps,
                   query_len=None if asking is None else query_len, key_mask=hidden(keys, 2, n, query_len), attn_mask=pairs(matrix, 2, n, query_len))
    calls = [partial(lsh_attention, look_around=around), partial(lsh_attention_oracle, look_around=around)], [partial(lsh_attention, backend='fused'), lsh_attention_oracle]
    for compared in calls[:1 if eps==0 else 2]:   # the second: short keys in the fused form
        results = []
        for f in compared:
            x,y = qk.clone().requires_grad_(),v.clone().requires_grad_()
            out = f(x, y, buckets, **options)
            (out*weights[:,:,:query_len]).sum().backward()
            results.append((out, x.grad, y.grad))
        zero = torch.zeros_like(qk)
        for a,b in zip(*results): torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-12)
    weights = lsh_weights(qk, buckets, look_around=around, **options)
    torch.testing.assert_close(weights, lsh_attention_oracle(qk, v, buckets, look_around=around, return_weights=True, **options)[1], rtol=0, atol=1e-12)

module_grid = list(product((False, True), (True, False), (False, True), (True, False), (32, 20), (False, True), (False, True), (0., .3)))

@pytest.mark.parametrize('causal,across,per_head,rehash,query_len,matrix,rotary,dropout', grids.sample(module_grid, 50))
def test_modules_equal_reformer_pytorch(causal, across, per_head, rehash, query_len, matrix, rotary, dropout, monkeypatch):
    from reformer_pytorch import reformer_pytorch as peer
    generator,b,n,d = torch.Generator().manual_seed(0),6,32,8
    x,y = torch.randn(2, b, n, d, dtype=torch.double, generator=generator)
    allowed = torch.rand(b, query_len, query_len-2, generator=generator) > .3 if matrix else None
    angles = torch.rand(query_len, d//2, dtype=torch.double, generator=generator)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)[None]
    options = dict(bucket_size=4, n_hashes=4, causal=causal, attend_across_buckets=across, random_rotations_per_head=per_head,
                   rehash_each_round=rehash, return_attn=True, dropout=dropout, drop_for_hash_rate=dropout)
    backend = 'reference' if dropout else 'auto'   # which draws dropout as the peer does
    draw = torch.randn
    def draw_single(shape, dtype, device): return draw(shape, dtype=torch.float32).to(dtype)   # as ours does
    torch.manual_seed(1)
    monkeypatch.setattr(torch, 'randn', draw_single)
    torch.set_default_dtype(torch.double)   # its matrix of weights needs it
    try: want = peer.LSHAttention(**options).train(dropout>0)(x, y, query_len, input_attn_mask=allowed, pos_emb=table if rotary else None)
    finally: torch.set_default_dtype(torch.float)
    monkeypatch.undo()
    after = torch.rand(3)
    torch.manual_seed(1)
    module = LSHAttention(**options, hash_seed=None, look_back='rounds', scale=d**-.5, backend=backend).train(dropout>0)
    got = module(x, y, query_len, input_attn_mask=allowed, pos_emb=angles if rotary else None)
    assert torch.equal(got[2], want[2]) and torch.equal(torch.rand(3), after)   # the same buckets, and the same random numbers follow
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-10)   # a lone query's score is -5e4 there, which costs digits
    met = want[1].diagonal(dim1=1, dim2=2) < .5 if dropout else slice(None)   # and dropout may take its value
    torch.testing.assert_close(got[0][met], want[0][met], rtol=0, atol=1e-10)
    if matrix: allowed = (torch.rand(b, query_len, query_len, generator=generator) > .3) | torch.eye(query_len).bool()   # a blind query sees all there
    want = peer.FullQKAttention(causal)(x, y, query_len, input_attn_mask=allowed)[:2]
    got = FullQKAttention(causal, scale=d**-.5)(x, y, query_len, input_attn_mask=allowed)[:2]
    for o,w in zip(got, want): torch.testing.assert_close(o, w, rtol=0, atol=1e-12)

def test_full_attention_is_causal_or_not():
    with pytest.raises(ValueError, match="causal='strct' is not known; choose one of False, True"): FullQKAttention(causal='strct')

reversible_grid = list(product((False, True), (1, 2, 4), (1, 3), (0., .1), (False, True), (32, 37), ('none', 'end', 'holes'), (0, None), (0, 1)))

@pytest.mark.parametrize('causal,n_hashes,depth,dropout,tie,n,mask,hash_seed,local', grids.sample(reversible_grid, 40))
def test_reversible_gradients_equal_plain_ones(causal, n_hashes, depth, dropout, tie, n, mask, hash_seed, local):
    torch.manual_seed(0)
    stack = Reformer(16, depth, heads=2, bucket_size=8, n_hashes=n_hashes, causal=causal, weight_tie=tie, lsh_dropout=dropout, ff_dropout=dropout,
                     post_attn_dropout=dropout, ff_chunks=2, hash_seed=hash_seed, n_local_attn_heads=local).double().train()
    plain = copy.deepcopy(stack)
    plain.layers.reverse_thres = 10**9
    x,mask,results = torch.randn(2, n, 16, dtype=torch.double),masks(mask, 2, n),[]
    for model in (stack, plain):
        torch.manual_seed(5)
        inputs = x.clone().requires_grad_()
        out = model(inputs, mask)
        grads = torch.autograd.grad(out.sin().sum(), [inputs, *model.parameters()])
        results.append((out, *grads, torch.rand(3)))   # the same random numbers follow
    for a,b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
