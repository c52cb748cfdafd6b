"LSHSelfAttention in float64: the whole layer, output and gradients, against explicit matrices of pairs"
import math
from itertools import product
import grids
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reformer_nb.language_model import ReformerLM
from reformer_nb.lsh import LSHAttention
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.reformer import Reformer
from reformer_nb.self_attention import LSHSelfAttention
from reformer_nb.shared_qk import join_sequence

e,h,m,r = 12,3,4,3

def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

def coins(*shape, keep=.7, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < keep

def new_layer(**options):
    "A layer with always the same weights, in evaluation"
    torch.manual_seed(0)
    return LSHSelfAttention(e, h, m, r, **options).double().eval()

def make_mask(kind, n, seed=1):
    "No mask, padding at the end of the second row, or holes"
    if kind=='none': return None
    if kind=='end': return torch.arange(n) < torch.tensor([[n], [max(1, n//2)]])
    return coins(2, n, keep=.6, seed=seed)

def attend_by_matrix(qk, v, see, scale, keep):
    "Softmax over the keys that `see` (b, h, n, N) shows; who sees nobody keeps its value, times `keep`"
    n = see.shape[2]
    scores = (qk[:,:,:n] @ F.normalize(qk, dim=-1).mT * scale).masked_fill(~see, -torch.inf)
    alone = ~see.any(-1, keepdim=True)
    return torch.where(alone, keep*v[:,:,:n], scores.masked_fill(alone, 0).softmax(-1) @ v)

def windows(real, w, causal):
    "Which keys (b, n, n) stand in the windows around a query, if the real tokens are cut into windows of `w`"
    place = (real.cumsum(-1)-1) // w
    apart = place[:,:,None] - place[:,None]
    return (apart>=0) & (apart<=1) if causal else apart.abs()<=1

def layer_by_hand(layer, x, buckets, keys=None, input_mask=None, input_attn_mask=None, context_mask=None, pos_emb=None):
    "The layer from its weights and explicit (n, n+m+c) matrices"
    b,n,_ = x.shape
    o,k = layer.options,layer.n_local_attn_heads
    everything = torch.cat([x] + ([] if layer.mem_kv is None else [layer.mem_kv.expand(b, -1, -1)]) + ([] if keys is None else [keys]), 1)
    total,c = everything.shape[1],0 if keys is None else keys.shape[1]
    true = torch.ones(b, total, dtype=torch.bool)
    mask = torch.cat([true[:,:n] if input_mask is None else input_mask, true[:,n:total-c],
                      true[:,total-c:] if context_mask is None else context_mask], 1)
    pairs = torch.ones(b, n, total, dtype=torch.bool)
    if input_attn_mask is not None: pairs[:,:,:input_attn_mask.shape[-1]] = input_attn_mask
    cut = lambda y: y.unflatten(-1, (-1, layer.dim_head)).transpose(1, 2)
    plain,v = cut(everything @ layer.toqk.weight.T),cut(everything @ layer.tov.weight.T)
    if v.shape[1]==1: v = v.repeat(1, h, 1, 1)
    turned = plain
    if pos_emb is not None:
        spun = torch.view_as_complex(plain[:,:,:n].unflatten(-1, (-1,2)).contiguous()) * torch.exp(1j*pos_emb)
        turned = torch.cat([torch.view_as_real(spun).flatten(-2), plain[:,:,n:]], 2)

    i,j = torch.arange(n)[:,None],torch.arange(total)
    see = pairs & mask[:,None] & mask[:,:n,None] & (i!=j)
    if o['causal']: see = see & ((j<i) | (j>=n))
    if layer.context_only: see = see & (j>=n)
    keep = 0. if layer.context_only else 1.
    near = see & torch.cat([windows(mask[:,:n], 2*m, o['causal']), true[:,None,n:].expand(-1, n, -1) & layer.local_memory], 2)
    local = attend_by_matrix((turned if layer.local_pos_emb else plain)[:,:k], v[:,:k], near[:,None], o['scale'], keep)
    full = attend_by_matrix(turned[:,k:], v[:,k:], see[:,None], o['scale'], keep)
    if buckets is None: hashed = full
    else:
        hashed = lsh_attention_oracle(turned[:,k:], v[:,k:], buckets, mask=mask, query_len=n, attn_mask=pairs,
                                      key_mask=(true & (j>=n)) if layer.context_only else None,
                                      **{a: b for a,b in o.items() if a!='full_attn_thres'})
        hashed = torch.where((mask.sum(-1)<=o['full_attn_thres']).view(-1, 1, 1, 1), full, hashed)
    out = torch.cat([local, hashed], 1) * mask[:,None,:n,None]
    return out.transpose(1, 2).flatten(2) @ layer.to_out.weight.T + layer.to_out.bias

def call(n, c, mask, context_mask, pairs, turn, n_memory=0):
    "Inputs of a call: tensors that get gradients, and masks"
    inputs = dict(x=random(2, n, e).requires_grad_())
    if c: inputs['keys'] = random(2, c, e, seed=1).requires_grad_()
    if turn: inputs['pos_emb'] = random(n, e//h//2, seed=2).requires_grad_()
    masks = dict(input_mask=make_mask(mask, n))
    if c: masks['context_mask'] = make_mask(context_mask, c, seed=3)
    if pairs: masks['input_attn_mask'] = coins(2, n, n+n_memory+c if pairs=='all' else n, seed=4)
    return inputs,masks

grid = dict(
    n=(1, 2, 3, 5, 8, 13, 17, 24, 31), c=(0, 1, 6, 11), causal=(False, True), num_mem_kv=(0, 1, 3), mask=('none', 'end', 'holes'),
    context_mask=('none', 'end', 'holes'), pairs=(False, True, 'all'), turn=(False, True), n_local_attn_heads=(0, 1, 2), local=('both', 'positions', 'memory', 'neither'),
    one_value_head=(False, True), attn_chunks=(1, 2, 4), thres=(0, 4, 9, 100), look_back=('none', 'round', 'rounds'), across=(True, False),
    duplicates=(True, False), context_only=(False, True), scale=(1., .5), hash_seed=(0, None), backend=('auto', 'reference'))

def cases(k, seed=0):
    "`k` random points of the grid that make sense"
    import random as rnd
    draw,found = rnd.Random(seed),[]
    while len(found)<k:
        o = {key: draw.choice(values) for key,values in grid.items()}
        if o['context_only'] and not o['c']: continue
        if o['context_only'] and o['n_local_attn_heads'] and o['local'] in ('positions', 'neither'): continue
        found.append(o)
    return found

def layer_of(o):
    "The layer that a case describes"
    return new_layer(causal=o['causal'], num_mem_kv=o['num_mem_kv'], n_local_attn_heads=o['n_local_attn_heads'], full_attn_thres=o['thres'],
                     local_pos_emb=o['local'] in ('both', 'positions'), local_memory=o['local'] in ('both', 'memory'),
                     one_value_head=o['one_value_head'], attn_chunks=o['attn_chunks'], look_back=o['look_back'], attend_across_buckets=o['across'],
                     allow_duplicate_attention=o['duplicates'], context_only=o['context_only'], scale=o['scale'], hash_seed=o['hash_seed'], backend=o['backend'])

def gradients(out, inputs): return torch.autograd.grad((out*random(*out.shape, seed=9)).sum(), inputs, materialize_grads=True)

def name(o): return '-'.join(str(v) for v in o.values())

@pytest.mark.parametrize('o', cases(2000 if grids.whole else 150), ids=name)
def test_layer_equals_explicit_matrices(o):
    layer = layer_of(o)
    inputs,masks = call(o['n'], o['c'], o['mask'], o['context_mask'], o['pairs'], o['turn'], o['num_mem_kv'])
    out,buckets = layer.with_state(**inputs, **masks)
    slow = layer_by_hand(layer, **inputs, buckets=buckets, **masks)
    torch.testing.assert_close(out, slow, rtol=0, atol=1e-12)
    leaves = [*inputs.values(), *layer.parameters()]
    for a,b in zip(gradients(out, leaves), gradients(slow, leaves)): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

# A call repeated with its buckets

state_grid = list(product((0, None), (1, 3), (0., .3), (0, 5), (0, 1), (False, True), (True, False)))

@pytest.mark.parametrize('hash_seed,attn_chunks,drop,c,local,per_head,rehash', grids.sample(state_grid, 40))
def test_call_with_buckets_repeats_the_first_one(hash_seed, attn_chunks, drop, c, local, per_head, rehash):
    layer = new_layer(hash_seed=hash_seed, attn_chunks=attn_chunks, drop_for_hash_rate=drop, dropout=.2, post_attn_dropout=.1, num_mem_kv=2,
                      n_local_attn_heads=local, random_rotations_per_head=per_head, rehash_each_round=rehash).train()
    inputs,masks = call(19, c, 'holes', 'end', True, True)
    start = torch.get_rng_state()
    with torch.no_grad(): first,buckets = layer.with_state(**inputs, **masks)
    after,step = torch.get_rng_state(),layer.hasher.step
    torch.set_rng_state(start)
    again,same = layer.with_state(**inputs, **masks, buckets=buckets)
    assert torch.equal(again, first) and torch.equal(same, buckets)
    assert torch.equal(torch.get_rng_state(), after) and layer.hasher.step==step
    torch.set_rng_state(start)
    layer.hasher.step = 0
    plain = layer.with_state(**inputs, **masks)[0]
    leaves = [*inputs.values(), *layer.parameters()]
    for a,b in zip(gradients(again, leaves), gradients(plain, leaves)): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

@pytest.mark.parametrize('o', cases(20, seed=1), ids=name)
def test_number_of_pieces_does_not_matter(o):
    o = o | dict(hash_seed=0)
    inputs,masks = call(o['n'], o['c'], o['mask'], o['context_mask'], o['pairs'], o['turn'], o['num_mem_kv'])
    results = []
    for pieces in (None, 1, 2, 5, 100):
        layer = layer_of(o | dict(attn_chunks=pieces))
        out = layer(**inputs, **masks)
        results.append((out, *gradients(out, [*inputs.values(), *layer.parameters()])))
    for other in results[1:]:
        for a,b in zip(results[0], other): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

# Padding

def spread(x, mask, value):
    "A row whose real tokens `x` stand where `mask` is True"
    return torch.full((1, len(mask), *x.shape[2:]), value, dtype=x.dtype).masked_scatter(mask[:,None], x)

@pytest.mark.parametrize('o', cases(500 if grids.whole else 60, seed=2), ids=name)
def test_padding_is_inert(o):
    layer,n,c = layer_of(o | dict(hash_seed=0)),o['n'],o['c']
    x,keys,angles = random(1, n, e),random(1, c, e, seed=1) if c else None,random(n, e//h//2, seed=2)
    pairs = coins(1, n, n, seed=4) if o['pairs'] else None
    alone = layer(x, keys, input_attn_mask=pairs, pos_emb=angles)
    for seed,(n_pad,c_pad) in enumerate(((0, 3), (7, 0), (40, 23))):
        places,c_places = (torch.randperm(k, generator=torch.Generator().manual_seed(seed))<k-p for k,p in ((n+n_pad, n_pad), (c+c_pad, c_pad)))
        inputs = dict(x=torch.cat([random(1, n+n_pad, e, seed=5), spread(x, places, 1e3)]), input_mask=torch.stack([coins(n+n_pad, seed=6), places]))
        if c: inputs |= dict(keys=torch.cat([random(1, c+c_pad, e, seed=7), spread(keys, c_places, -50.)]), context_mask=torch.stack([coins(c+c_pad, seed=8), c_places]))
        inputs['pos_emb'] = spread(angles[None], places, 3.)[0]
        if o['pairs']:
            inputs['input_attn_mask'] = coins(2, n+n_pad, n+n_pad, seed=9)
            inputs['input_attn_mask'][1][places[:,None] & places] = pairs.flatten()
        torch.testing.assert_close(layer(**inputs)[1:,places], alone, rtol=0, atol=1e-10)

@pytest.mark.parametrize('hash_seed', (0, None))
def test_buckets_of_another_input_are_obeyed(hash_seed):
    layer = new_layer(num_mem_kv=2, n_local_attn_heads=1, attn_chunks=2, hash_seed=hash_seed)
    inputs,masks = call(19, 6, 'holes', 'end', False, True)
    _,buckets = layer.with_state(**inputs, **masks)
    inputs['x'] = random(2, 19, e, seed=8)
    out,same = layer.with_state(**inputs, **masks, buckets=buckets)
    assert torch.equal(same, buckets) and not torch.equal(layer.with_state(**inputs, **masks)[1], buckets)
    torch.testing.assert_close(out, layer_by_hand(layer, **inputs, buckets=buckets, **masks), rtol=0, atol=1e-12)

hostile = list(product((dict(), dict(count_padding=True), dict(use_full_attn=True), dict(count_padding=True, use_full_attn=True), dict(n_local_attn_heads=1),
                        dict(causal='strict', n_buckets=4), dict(count_padding=True, backend='reference')), (math.nan, math.inf, -math.inf)))

@pytest.mark.parametrize('options,value', hostile)
def test_padding_of_any_content_reaches_neither_outputs_nor_gradients(options, value):
    "Of the text and of the context"
    torch.manual_seed(0)
    layer,found = LSHSelfAttention(16, 2, 4, 2, **options).double(),[]
    x,keys = random(2, 16, 16),random(2, 5, 16, seed=1)
    real,there = torch.arange(16)<torch.tensor([[16], [9]]),torch.arange(5)<torch.tensor([[3], [5]])
    for o in (0., value):
        layer.hasher.step = 0
        a,c = (y.masked_fill(~mask[...,None], o).requires_grad_() for y,mask in ((x, real), (keys, there)))
        out = layer(a, keys=c, input_mask=real, context_mask=there)
        found.append([out, *torch.autograd.grad(out[real].sin().sum(), [a, c, *layer.parameters()])])
    for got,want in zip(*found): torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

def test_gradients_of_padding_are_zero():
    layer = new_layer(num_mem_kv=2, n_local_attn_heads=1)
    inputs,masks = call(19, 11, 'holes', 'holes', True, False)
    dx,dkeys = torch.autograd.grad(layer(**inputs, **masks)[masks['input_mask']].square().sum(), [*inputs.values()])
    assert torch.equal(dx.any(-1), masks['input_mask']) and torch.equal(dkeys.any(-1), masks['context_mask'])

@pytest.mark.parametrize('kw', [{}, dict(use_full_attn=True), dict(n_local_attn_heads=2), dict(context_only=True), dict(one_value_head=True, attn_chunks=3)], ids=str)
def test_gradients_reach_every_input(kw):
    layer = new_layer(num_mem_kv=3, **kw)
    inputs,masks = call(19, 11, 'none', 'none', False, True)
    for g in gradients(layer(**inputs, **masks), [*inputs.values(), *layer.parameters()]): assert g.abs().sum()>0 and g.isfinite().all()

# Memory and context stand outside of time

@pytest.mark.parametrize('full', (False, True))
def test_causality_hides_later_text_and_nothing_else(full):
    layer = new_layer(causal=True, use_full_attn=full, num_mem_kv=2, n_local_attn_heads=1, n_buckets=2)
    inputs,_ = call(19, 11, 'none', 'none', False, False)
    out,ids = layer.with_state(**inputs)
    dx,dkeys,dmem = torch.autograd.grad(out[:,6].sum(), [inputs['x'], inputs['keys'], layer.mem_kv])
    assert not dx[:,7:].any() and dx[:,:7].any(-1).all() and dkeys.any() and dmem.any()
    if full: assert dkeys.any(-1).all() and dmem.any(-1).all()

# The callback

@pytest.mark.parametrize('o', cases(40, seed=3), ids=name)
def test_callback_gets_the_weights_that_attend(o):
    layer,n,c = layer_of(o | dict(n_local_attn_heads=0)),o['n'],o['c']
    inputs,masks = call(n, c, o['mask'], o['context_mask'], o['pairs'], o['turn'], o['num_mem_kv'])
    seen = []
    layer.callback = lambda attn, ids: seen.append((attn, ids))
    layer(**inputs, **masks)
    layer.return_attn = True
    out,buckets = layer.with_state(**inputs, **masks)
    layer.with_state(**inputs, **masks, buckets=buckets)
    total = n+c+o['num_mem_kv']
    assert [tuple(a.shape) for a,_ in seen[:2]]==[(2, h, n, 0), (2, h, n, total)]
    attn,ids = seen[-1]
    assert ids.shape==(2, h, 0 if buckets is None else r*total) and not attn.requires_grad
    everything = join_sequence(inputs['x'], layer.mem_kv, inputs.get('keys'))
    by_weights = layer.join_heads(attn @ layer.split_heads(everything)[1])
    real = torch.ones(2, n, dtype=torch.bool) if masks['input_mask'] is None else masks['input_mask']
    torch.testing.assert_close(by_weights[real], out[real], rtol=0, atol=1e-12)
    if buckets is not None:
        assert len(seen)==2   # a repeated call does not report
        assert len({frozenset(o.unique().tolist()) for o in ids.view(2, h, r, total)[0,0]})==r

def test_callback_is_silent_in_a_backward_pass():
    from torch.utils.checkpoint import checkpoint
    layer,calls = new_layer(use_full_attn=True),[]
    layer.callback = lambda attn, ids: calls.append(1)
    checkpoint(layer, random(2, 9, e).requires_grad_(), use_reentrant=False).sum().backward()
    assert calls==[1]

# reformer_pytorch 1.4.4, where it hides no padding: there its padding joins the buckets

parity_grid = list(product((False, True), (0, 2), (0, 6), (False, True), (0, 1), (1, 3), (False, True), (False, True), (0, 100), (True, False)))

@pytest.mark.parametrize('causal,num_mem_kv,c,pairs,local,attn_chunks,per_head,rehash,thres,across', grids.sample(parity_grid, 60))
def test_layer_of_reformer_pytorch(causal, num_mem_kv, c, pairs, local, attn_chunks, per_head, rehash, thres, across, monkeypatch):
    from reformer_pytorch import reformer_pytorch as peer
    if local: num_mem_kv,c,pairs = (2, 6, False) if num_mem_kv else (0, 0, False)   # its local heads need whole windows, and obey no pairs
    n,draw = 24-num_mem_kv-c,torch.randn
    shared = dict(n_hashes=2, causal=causal, attn_chunks=attn_chunks, num_mem_kv=num_mem_kv, n_local_attn_heads=local, full_attn_thres=thres,
                  random_rotations_per_head=per_head, rehash_each_round=rehash, attend_across_buckets=across, one_value_head=causal)
    theirs = peer.LSHSelfAttention(e, h, m, **shared).double().eval()
    ours = LSHSelfAttention(e, h, m, **shared, hash_seed=None, scale=(e//h)**-.5, look_back='rounds', local_pos_emb=False, local_memory=False).double().eval()
    ours.load_state_dict(theirs.state_dict() | {k: o for k,o in ours.state_dict().items() if k.startswith('hasher')})
    inputs,masks = call(n, c, 'none', 'none', pairs, False)
    monkeypatch.setattr(torch, 'randn', lambda *s, dtype=None, **kw: draw(*s, dtype=torch.float32, **kw).to(dtype or torch.float32))   # not in float64
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        recorded = []
        layer.callback = lambda attn, ids, recorded=recorded: recorded.append(ids)
        out = layer(**inputs, **masks)
        named = dict(layer.named_parameters())
        results.append((*recorded, out, *torch.autograd.grad(out.sin().sum(), [*inputs.values(), *(named[k] for k in sorted(named))])))
    for a,b in zip(*results): torch.testing.assert_close(a, b, rtol=0, atol=1e-10, check_dtype=a.is_floating_point())

@pytest.mark.parametrize('options', (dict(), dict(num_mem_kv=2), dict(use_full_attn=True), dict(n_local_attn_heads=1), dict(causal='strict', n_buckets=4)), ids=str)
def test_no_tokens_at_all(options):
    layer = new_layer(**options)
    x = torch.zeros(2, 0, e, dtype=torch.double, requires_grad=True)
    out,buckets = layer.with_state(x)
    assert out.shape==(2, 0, e) and layer.with_state(x, buckets)[0].shape==(2, 0, e)
    assert torch.autograd.grad(out.sum(), x)[0].shape==x.shape

@pytest.mark.parametrize('options', (dict(use_full_attn=True), dict(backend='reference'), dict(hash_seed=None)), ids=str)
def test_no_rows_in_pieces(options):
    x = torch.zeros(0, 9, e, dtype=torch.double)
    assert new_layer(attn_chunks=2, **options)(x).shape==x.shape

# ---- values of arguments -------------------------------------------------------------------------------------------

wrong_values = [(name, o) for name,values in dict(scale=(math.nan, math.inf, -math.inf, 'a', None, True, torch.tensor(1.)), key_eps=(math.nan, math.inf, -1., 'a', None, True),
                                                  norm_eps=(math.nan, math.inf, -1., 'a', None), hash_seed=('a', 1.5, 1., True, torch.tensor(1))).items() for o in values]

@pytest.mark.parametrize('name,value', wrong_values)
def test_values_are_checked_at_construction(name, value):
    "Not at the first call, and not by outputs that are NaN"
    stack = dict(dim=16, depth=1, heads=2, bucket_size=4)
    makers = [lambda **o: Reformer(**stack, **o), lambda **o: ReformerLM(num_tokens=11, max_seq_len=32, **stack, **o)]
    if name!='norm_eps': makers.append(new_layer)
    if name not in ('norm_eps', 'key_eps'): makers.append(LSHAttention)
    for make in makers:
        with pytest.raises((TypeError, ValueError), match=f'{name}=.* must be .*; ') as told: make(**{name: value})
        assert '\n' not in str(told.value)

@pytest.mark.parametrize('seed', (None, 0, -3, np.int64(7), np.uint8(7)))
def test_values_that_go_on_to_work(seed):
    x = random(1, 9, e)
    for options in (dict(scale=0), dict(scale=-.5), dict(scale=np.float32(.5)), dict(scale=2), dict(key_eps=0), dict(key_eps=np.float32(.5)), dict(rotations='fresh' if seed is None else 'fixed')):
        assert new_layer(hash_seed=seed, full_attn_thres=0, **options)(x).isfinite().all()
    if seed: assert torch.equal(new_layer(hash_seed=seed, full_attn_thres=0)(x), new_layer(hash_seed=int(seed), full_attn_thres=0)(x))
