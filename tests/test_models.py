"Reformer and ReformerLM: every argument does something, reversible gradients are plain ones, padding is inert"
import copy, inspect
from itertools import product
from meter import Largest
import grids
import pytest
import torch
import torch.nn.functional as F
from reformer_nb.cross_attention import CrossAttention, context_attention
from reformer_nb.in_blocks import compute_in_blocks
from reformer_nb.language_model import ReformerLM
from reformer_nb.next_token import loss_in_blocks, next_token_loss
from reformer_nb.reformer import Autopadder, Reformer
from reformer_nb.self_attention import LSHSelfAttention
from torch import nn
from torch.nn.utils import prune

b,n,c,e,v = 2,37,19,24,61

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=torch.double)
def near(a, b, atol=1e-12): torch.testing.assert_close(a, b, rtol=atol, atol=atol)

x,context,wide = normal(b, n, e),normal(b, c, e, seed=1),normal(b, c, 11, seed=2)
mask,context_mask = torch.arange(n) < torch.tensor([[n], [23]]),torch.arange(c) < torch.tensor([[c], [7]])
pairs,angles = torch.rand(b, n, n, generator=seeded(3)) > .3,normal(b, n, 4, seed=4)
tokens = torch.randint(v, (b, n), generator=seeded(5))

def stack(depth=2, **options):
    torch.manual_seed(0)
    model = Reformer(**{**dict(dim=e, depth=depth, heads=3, bucket_size=5, n_hashes=3), **options}).double()
    for o in model.modules():
        if isinstance(getattr(o, 'g', None), nn.Parameter): o.g.data.fill_(.5)   # of ReZero, which starts at 0
    return model

def language(**options):
    torch.manual_seed(0)
    small = dict(num_tokens=v, dim=e, depth=2, max_seq_len=40, heads=3, dim_head=6, bucket_size=5, n_hashes=3, causal=True)
    return ReformerLM(**{**small, **options}).double()

def plainly(model):
    "A copy that runs without reversibility"
    res = copy.deepcopy(model)
    for o in res.modules():
        if hasattr(o, 'reverse_thres'): o.reverse_thres = 10**9
    return res

# every argument

changes = dict(dim=12, depth=3, heads=4, dim_head=6, bucket_size=8, n_hashes=2, ff_chunks=4, attn_chunks=3, causal=True, weight_tie=True,
    lsh_dropout=.2, ff_dropout=.2, ff_activation=nn.ReLU, ff_mult=2, ff_glu=True, post_attn_dropout=.2, layer_dropout=.5,
    lsh_attend_across_buckets=False, lsh_allow_duplicate_attention=False, random_rotations_per_head=True, use_scale_norm=True, use_rezero=True,
    use_full_attn=True, full_attn_thres=n, reverse_thres=n, num_mem_kv=3, one_value_head=True, n_local_attn_heads=1, pkm_layers=2, pkm_num_keys=40,
    max_seq_len=36, twin_attention=True, cross_attention=True, context_dim=16, rehash_each_round=False, drop_for_hash_rate=.5,
    local_pos_emb=False, local_memory=False, n_buckets=(2,4), look_back='round', scale=.35, hash_seed=1, rotations='fixed', backend='reference', split_above=4, look_around=(1,1), count_padding=True, key_eps=.1, out_bias=False, norm_eps=.1,
    attn_layers=('local','lsh'), local_window=3, local_look_around=(0,0), local_shared_qk=True, local_dropout=.2, ff_hidden=20, combine='concat')
lm_changes = dict(num_tokens=70, emb_dim=10, return_embeddings=True, weight_tie_embedding=True, fixed_position_emb=True, absolute_position_emb=True,
    axial_position_emb=True, axial_position_shape=(4,10), axial_position_dims=(8,16), emb_dropout=.2)
axial,local = dict(axial_position_emb=True),dict(n_local_attn_heads=1, num_mem_kv=3)
beside = dict(pkm_num_keys=dict(pkm_layers=2), context_dim=dict(cross_attention=True), local_pos_emb=local, local_memory=local,
              axial_position_shape=axial, axial_position_dims=axial, attn_chunks=dict(use_full_attn=True),
              split_above=dict(n_buckets='power'), count_padding=dict(look_back='rounds'), look_around=dict(look_back='rounds', count_padding=True), **{f'local_{o}': dict(attn_layers=('local','lsh'))
                                                                                                             for o in ('window','look_around','shared_qk','dropout')})
same_numbers = 'ff_chunks', 'attn_chunks', 'reverse_thres', 'backend'   # they change memory and time only

def shapes(model): return {k: tuple(o.shape) for k,o in model.named_parameters()}

def differs(old, new, call):
    "Whether two models differ in parameters, in evaluation, or in one of two training steps"
    if shapes(old)!=shapes(new): return True
    results = []
    for model in (old, new):
        outs = [call(model.eval())]
        torch.manual_seed(1)
        results.append(outs + [call(model.train()) for _ in range(2)])
    return any(a.shape!=b.shape or (a-b).abs().max()>1e-12 for a,b in zip(*results))

def test_all_arguments_are_walked():
    assert set(changes)==set(inspect.signature(Reformer).parameters)
    assert {**changes, **lm_changes}.keys()==set(inspect.signature(ReformerLM).parameters)

@pytest.mark.parametrize('name', changes)
def test_every_argument_of_the_stack_does_something(name):
    old,new = (stack(**beside.get(name, {}), **o) for o in ({}, {name: changes[name]}))
    if name=='max_seq_len':
        with pytest.raises(ValueError, match='max_seq_len=36'): new(x)
        return
    keys = dict(keys=context) if old.config['cross_attention'] else {}
    if name=='local_pos_emb': keys['pos_emb'] = angles
    found = differs(old, new, lambda o: o(x, mask, **keys))
    assert found != (name in same_numbers)

@pytest.mark.parametrize('name', {**changes, **lm_changes})
def test_every_argument_of_the_language_model_does_something(name):
    value = {**changes, **lm_changes}[name]
    if name=='dim_head': value = 8
    if name=='causal': value = False
    old,new = (language(**beside.get(name, {}), **o) for o in ({}, {name: value}))
    if name=='max_seq_len':
        with pytest.raises(ValueError, match='max_seq_len=36'): new(tokens)
        return
    assert differs(old, new, lambda o: o(tokens, mask)) != (name in same_numbers)

def test_the_order_of_positional_arguments_is_that_of_reformer_pytorch():
    def first(cls): return [k for k,o in inspect.signature(cls).parameters.items() if o.kind==o.POSITIONAL_OR_KEYWORD]
    shared = 'heads dim_head bucket_size n_hashes ff_chunks attn_chunks causal weight_tie lsh_dropout ff_dropout '
    assert first(Reformer)==('dim depth ' + shared + 'ff_activation ff_mult ff_glu post_attn_dropout layer_dropout lsh_attend_across_buckets '
        'lsh_allow_duplicate_attention random_rotations_per_head use_scale_norm use_rezero use_full_attn full_attn_thres reverse_thres num_mem_kv '
        'one_value_head n_local_attn_heads pkm_layers pkm_num_keys').split()
    assert first(ReformerLM)==('num_tokens dim depth max_seq_len ' + shared + 'ff_mult ff_activation ff_glu post_attn_dropout layer_dropout '
        'random_rotations_per_head use_scale_norm use_rezero use_full_attn full_attn_thres reverse_thres num_mem_kv one_value_head emb_dim '
        'return_embeddings weight_tie_embedding fixed_position_emb absolute_position_emb axial_position_emb axial_position_shape '
        'n_local_attn_heads pkm_layers pkm_num_keys').split()

@pytest.mark.parametrize('options', [dict(use_rezero=True, use_scale_norm=True), dict(twin_attention=True, ff_glu=True), dict(pkm_num_keys=64),
                                     dict(context_dim=8), dict(pkm_layers=3), dict(pkm_layers=(0,1)), dict(twin_attention=True, pkm_layers=1)])
def test_arguments_that_would_do_nothing_are_refused(options):
    for make in (stack, language):
        with pytest.raises(ValueError): make(**options)

def test_old_and_unknown_names():
    with pytest.warns(DeprecationWarning, match='dim'): assert Reformer(emb=e, depth=1, heads=3).dim==e
    for old in ('lsh_attn_auto_pad', 'add_local_attn_hash', 'n_local_attn_hashes'):
        for make in (stack, language):
            with pytest.raises(TypeError, match=old): make(**{old: 1})
    with pytest.raises(TypeError, match='rotary_emb'): language(rotary_emb=True)
    for call in (lambda: stack(n_hash=2), lambda: language(n_hash=2), lambda: stack()(x, inputmask=mask), lambda: language()(tokens, inputmask=mask),
                 lambda: language().loss(tokens, inputmask=mask)):
        with pytest.raises(TypeError, match="did you mean '(n_hashes|input_mask)'"): call()

# gradients

kinds = dict(plain={}, memory=dict(num_mem_kv=3), cross=dict(cross_attention=True, context_dim=11), twin=dict(twin_attention=True),
    twin_cross=dict(twin_attention=True, cross_attention=True, context_dim=11), rezero=dict(use_rezero=True), rezero_cross=dict(use_rezero=True, cross_attention=True),
    scale_norm=dict(use_scale_norm=True), pkm=dict(pkm_layers=(1,3), pkm_num_keys=33), tied=dict(weight_tie=True),
    tied_pkm=dict(weight_tie=True, pkm_layers=2, pkm_num_keys=33), tied_cross=dict(weight_tie=True, cross_attention=True, context_dim=11),
    tied_twin=dict(weight_tie=True, twin_attention=True), one_value=dict(one_value_head=True), pieces=dict(attn_chunks=3, ff_chunks=4),
    local=dict(n_local_attn_heads=1, num_mem_kv=2), full=dict(use_full_attn=True, num_mem_kv=2), per_head=dict(random_rotations_per_head=True),
    best=dict(rehash_each_round=False), drop_hash=dict(drop_for_hash_rate=.3), drawn=dict(hash_seed=None, attn_chunks=2), causal=dict(causal=True, look_back='rounds'))

def results(model, given, args):
    torch.manual_seed(1)
    inputs = {k: o.clone().requires_grad_() for k,o in given.items()}
    out = model(inputs['x'], mask, **{k: o for k,o in inputs.items() if k!='x'}, **args)
    loss = (out * normal(*out.shape, seed=9) * mask[...,None]).sum()
    return out,*torch.autograd.grad(loss, [*inputs.values(), *model.parameters()], allow_unused=True),torch.rand(3)

gradient_grid = [o for o in product(kinds, (False, True), (0., .1), (0., .4)) if o[1] or 'cross_attention' not in kinds[o[0]]]

@pytest.mark.parametrize('kind,with_context,dropout,skip', grids.sample(gradient_grid, 50))
def test_reversible_gradients_equal_plain_ones(kind, with_context, dropout, skip):
    dropouts = dict(lsh_dropout=dropout, post_attn_dropout=dropout, **({} if 'twin' in kind else dict(ff_dropout=dropout)))
    model = stack(3, **kinds[kind], **dropouts, layer_dropout=skip).train()
    given,args = dict(x=x, pos_emb=angles),dict(input_attn_mask=pairs)
    if with_context: given['keys'],args['context_mask'] = wide if model.context_dim==11 else context,context_mask
    ours,theirs = (results(o, given, args) for o in (model, plainly(model)))
    assert [o is None for o in ours]==[o is None for o in theirs]
    for one,two in zip(ours, theirs):
        if one is not None: near(one, two)

@pytest.mark.parametrize('kind', [k for k in kinds if 'cross_attention' not in kinds[k]])
def test_a_frozen_input_leaves_gradients_to_the_weights(kind):
    model = stack(3, **kinds[kind]).train()
    model(x, mask, pos_emb=angles).sum().backward()
    unused = [k for k,p in model.named_parameters() if p.grad is None]
    assert not unused

def test_frozen_context_and_two_forwards_before_one_backward():
    model = stack(cross_attention=True, lsh_dropout=.1)
    ours,theirs = [],[]
    for o,to in ((model, ours), (plainly(model), theirs)):
        torch.manual_seed(2)
        loss = (o(x, keys=context) * o(x.flip(1), keys=context)).sum()
        to += torch.autograd.grad(loss, [*o.parameters()])
    near(ours, theirs)

# padding

pad_kinds = [k for k in kinds if k not in ('drawn',)]

@pytest.mark.parametrize('kind,with_context', [(k, o) for k,o in product(pad_kinds, (False, True)) if o or 'cross_attention' not in kinds[k]])
def test_padding_is_inert(kind, with_context):
    model = stack(3, **kinds[kind]).eval()
    keys = wide if model.context_dim==11 else context
    both,one = {},{}
    if with_context:
        dirty = F.pad(keys.masked_fill(~context_mask[...,None], torch.nan), (0,0,0,4), value=torch.nan)
        both,one = dict(keys=dirty, context_mask=F.pad(context_mask, (0,4))),dict(keys=keys[1:,:7])
    alone = model(x[1:,:23], **one)
    for k in (0, 1, 46):
        padded = F.pad(x.masked_fill(~mask[...,None], torch.nan), (0,0,0,k), value=torch.nan)
        near(model(padded, F.pad(mask, (0,k)), **both)[1:,:23], alone)

@pytest.mark.parametrize('k', grids.sample([*range(1, 41)], 12))
def test_any_length(k):
    for options in ({}, dict(cross_attention=True), dict(n_local_attn_heads=1, num_mem_kv=1)):
        model = language(**options)
        keys = dict(keys=context[:,:1+k%3]) if options.get('cross_attention') or k%2 else {}
        assert model(tokens.repeat(1, 2)[:,:k], **keys).isfinite().all()
        if k>1: model.loss(tokens.repeat(1, 2)[:,:k], **keys).backward()
        assert Autopadder(model)(tokens.repeat(1, 2)[:,:k], **keys).shape==(b, k, v)

@pytest.mark.parametrize('options', [{}, dict(cross_attention=True, context_dim=11), dict(num_mem_kv=2, n_local_attn_heads=1), dict(axial_position_emb=True),
                                     dict(weight_tie_embedding=True), dict(weight_tie_embedding='plain'), dict(emb_dim=10, absolute_position_emb=True)])
def test_the_loss_of_padded_texts_is_that_of_each_alone(options):
    model = language(**options).eval()
    keys = wide if model.reformer.context_dim==11 else context
    left = torch.arange(n) >= torch.tensor([[0], [14]])
    padded = torch.where(left, tokens.roll(14, 1).where(torch.arange(b)[:,None]==1, tokens), -100)
    texts = [tokens[:1], padded[1:,14:]]
    losses = [model.loss(o, keys=keys[i:i+1,:k]) for i,(o,k) in enumerate(zip(texts, (c, 7)))]
    together = model.loss(padded, left, keys=keys.masked_fill(~context_mask[...,None], torch.nan), context_mask=context_mask)
    one_by_one = (36*losses[0] + 22*losses[1])/58
    near(together, one_by_one)
    near(*(torch.autograd.grad(o, [*model.parameters()]) for o in (together, one_by_one)))

# loss and cross-attention

@pytest.mark.parametrize('tie', [False, True, 'plain'])
def test_the_loss_in_blocks_has_the_gradients_of_all_logits(tie):
    model = language(weight_tie_embedding=tie).eval()
    ours = model.loss(tokens, mask)
    theirs = next_token_loss(model(tokens[:,:-1], mask[:,1:]), tokens[:,1:], mask[:,1:])
    near(*([o, *torch.autograd.grad(o, [*model.parameters()])] for o in (ours, theirs)))

@pytest.mark.parametrize('entries', [1, v, 150, 10**6])
def test_blocks_of_any_size(entries):
    vectors,weight,bias = (o.requires_grad_() for o in (normal(b, n, e), normal(v, e, seed=1), normal(v, seed=2)))
    losses = loss_in_blocks(vectors, weight, bias, tokens, mask, entries=entries),next_token_loss(F.linear(vectors, weight, bias), tokens, mask)
    near(*([o, *torch.autograd.grad(o, (vectors, weight, bias))] for o in losses))

def test_the_loss_never_holds_all_logits():
    "The largest tensor that is made has no more than a block of logits, or is a table"
    model = ReformerLM(70_000, 8, 1, 200, heads=1, dim_head=4, bucket_size=20, causal=True, emb_dim=4)
    with Largest(lambda o: o.dim()==2 and o.shape[-1]==70_000) as found: model.loss(torch.arange(200)[None]).backward()
    assert 0 < found.size <= 2**22 < 199*70_000

@pytest.mark.parametrize('block,hidden', list(product((1, 5, 64), ('none', 'some', 'a row'))))
def test_context_attention_against_the_formula(block, hidden):
    q,k,v_ = (normal(2, 3, o, 4, seed=o).requires_grad_() for o in (17, 11, 12))
    v_ = v_[:,:,:11]
    visible = None if hidden=='none' else torch.rand(2, 11, generator=seeded()) > .4
    if hidden=='a row': visible[1] = False
    ours = context_attention(q, k, v_, visible, block=block)
    scores = q @ k.transpose(-1, -2) / 2
    if visible is not None: scores = scores.masked_fill(~visible[:,None,None], -1e9)
    theirs = scores.softmax(-1) @ v_
    if hidden=='a row': theirs = theirs * torch.tensor([1., 0.])[:,None,None,None]
    near(*([o, *torch.autograd.grad(o.sin().sum(), (q, k), retain_graph=True)] for o in (ours, theirs)))

def test_cross_attention_refuses():
    layer = CrossAttention(e, 11, heads=3).double()
    for bad in (context, wide[:1], wide.long()):
        with pytest.raises((ValueError, TypeError), match='keys'): layer(x, bad)
    with pytest.raises(ValueError, match='keys is None'): stack(cross_attention=True)(x)
    with pytest.raises(ValueError, match='context_mask'): stack()(x, context_mask=context_mask)

def test_autopadder_takes_what_reformer_pytorch_takes():
    keys,args = context,dict(input_mask=mask, input_attn_mask=pairs, context_mask=context_mask)
    model = stack().eval()
    near(Autopadder(model)(x, keys=keys, **args), model(x, keys=keys, **args))
    with pytest.raises(TypeError, match='net is a Linear'): Autopadder(nn.Linear(2, 2))

# ---- in blocks -----------------------------------------------------------------------------------------------------

def bend(a, b): return (a @ b).tanh()

@pytest.mark.parametrize('made', (lambda w: (w, w), lambda w: (w.sin(), w), lambda w: (w, w.cos())), ids=('same', 'cut of whole', 'whole of cut'))
def test_blocks_of_tensors_that_depend_on_each_other(made):
    "To the second derivative"
    w = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    def blocks(w):
        a,b = made(w)
        return compute_in_blocks(bend, (a,), (b,), size=2)
    torch.testing.assert_close(blocks(w), bend(*made(w)))
    assert torch.autograd.gradcheck(blocks, (w,)) and torch.autograd.gradgradcheck(blocks, (w,))

def test_blocks_along_a_negative_dimension_and_without_gradients():
    x = torch.arange(12.).view(3, 4).requires_grad_()
    torch.testing.assert_close(compute_in_blocks(torch.square, (x,), size=2, dim=-1), x.square())
    def some(a): return (a>6).float() if a[0,0]<2 else a   # the first block has no gradient
    compute_in_blocks(some, (x,), size=2, dim=1).sum().backward()
    assert x.grad.tolist()==[[0., 0., 1., 1.]]*3
    assert compute_in_blocks(torch.square, (torch.empty(3, 4, device='meta'),), size=2).shape==(3, 4)

def test_a_tied_table_to_the_second_derivative():
    model = ReformerLM(11, 8, 1, 16, heads=2, dim_head=4, causal=True, weight_tie_embedding='plain', use_full_attn=True, backend='reference', reverse_thres=100).double()
    tokens,weight = torch.randint(11, (1, 9), generator=torch.Generator().manual_seed(0)),model.token_emb.weight
    def second(loss):
        first, = torch.autograd.grad(loss, weight, create_graph=True)
        return first,*torch.autograd.grad(first.square().sum(), weight)
    plain = F.cross_entropy(model.eval()(tokens)[0,:-1], tokens[0,1:])
    for a,b in zip(second(model.loss(tokens)), second(plain)): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

def data_parallel_copy(model):
    "What torch.nn.DataParallel makes of a model for one device: its weights are no parameters"
    copies = {o: o._replicate_for_data_parallel() for o in model.modules()}
    for o,twin in copies.items():
        for k,child in o._modules.items(): twin._modules[k] = copies.get(child)
        for k,p in o._parameters.items(): setattr(twin, k, None if p is None else p.clone())
    return copies[model]

@pytest.mark.parametrize('make', (lambda: language(), lambda: stack(), lambda: LSHSelfAttention(e, 3, 4).double()), ids=('language model', 'stack', 'layer'))
def test_a_copy_of_data_parallel_evaluates_but_does_not_count(make):
    model = make()
    given = tokens if isinstance(model, ReformerLM) else x
    with torch.no_grad(): assert torch.equal(data_parallel_copy(model.eval())(given), model(given))
    with pytest.raises(RuntimeError, match='all steps would hash alike; .*DistributedDataParallel'): data_parallel_copy(model.train())(given)

@pytest.mark.parametrize('options', (dict(), dict(reverse_thres=100, ff_chunks=3)), ids=('reversible', 'in pieces'))
def test_a_copy_of_data_parallel_that_counts_nothing(options):
    "Gradients where autograd knows the weights, and an error that names the remedy where it does not"
    model = language(rotations='fixed', **options)
    with pytest.raises(RuntimeError, match='would get none; .*use DistributedDataParallel'): data_parallel_copy(model)(tokens).square().mean().backward()
    model.zero_grad()
    plain = language(rotations='fixed', reverse_thres=100)
    wanted = torch.autograd.grad(plain(tokens).square().mean(), [*plain.parameters()])
    data_parallel_copy(plain)(tokens).square().mean().backward()
    for p,grad in zip(plain.parameters(), wanted): near(p.grad, grad)

@pytest.mark.parametrize('change', (lambda o: prune.l1_unstructured(o, 'weight', .5), lambda o: o.register_forward_hook(lambda *_: None)))
def test_hooks_of_the_logits_are_not_passed_over(change):
    model = ReformerLM(20, 16, 1, 32, heads=2, dim_head=8, causal=True, use_full_attn=True)
    change(model.to_logits)
    with pytest.raises(TypeError, match=r'to_logits has hooks.*next_token_loss'): model.loss(torch.zeros(1, 9, dtype=torch.int64))
