"Outputs and gradients equal those of reformer_pytorch 1.4.4, from its weights and its random numbers, wherever it is right"
import contextlib, copy
import peer
import pytest
import reformer_nb
import torch
from reformer_nb.attention import FullQKAttention
from reformer_nb.compat import upstream_modules
from reformer_nb.upstream import upstream_names
from torch import nn

@pytest.fixture(autouse=True)
def installed():
    if why := peer.missing(): pytest.fail(why, pytrace=False)

sizes = dict(heads=4, dim_head=8, bucket_size=8, n_hashes=2, ff_chunks=4)
lm = dict(sizes, num_tokens=50, dim=32, depth=2, max_seq_len=64, causal=True)
stack = dict(sizes, dim=32, depth=2)
layer = dict(dim=32, heads=4, bucket_size=8, n_hashes=2)
# what the user's README asks of one model, scaled down
readme = dict(num_tokens=50, dim=32, depth=3, max_seq_len=64, heads=4, dim_head=8, lsh_dropout=0., emb_dim=16, causal=True, bucket_size=8, n_hashes=4,
              ff_chunks=8, attn_chunks=2, num_mem_kv=16, use_full_attn=False, full_attn_thres=16, weight_tie=False, use_scale_norm=False)
pkm = dict(pkm_layers=(1,), pkm_num_keys=32)

# name: (class, arguments, how it is called)
cases = dict(
    plain=('ReformerLM', lm, {}),
    both_directions=('ReformerLM', dict(lm, causal=False), {}),
    one_round=('ReformerLM', dict(lm, n_hashes=1), {}),
    eight_rounds=('ReformerLM', dict(lm, n_hashes=8), {}),
    one_chunk_pair=('ReformerLM', lm, dict(n=16)),
    dim_head_64=('ReformerLM', {k: o for k,o in lm.items() if k!='dim_head'}, {}),
    emb_dim=('ReformerLM', dict(lm, emb_dim=16), {}),
    weight_tie=('ReformerLM', dict(lm, weight_tie=True), {}),
    attn_chunks=('ReformerLM', dict(lm, attn_chunks=2), {}),
    attn_chunks_uneven=('ReformerLM', dict(lm, attn_chunks=3), {}),
    num_mem_kv=('ReformerLM', dict(lm, num_mem_kv=16), dict(n=48)),
    num_mem_kv_few=('ReformerLM', dict(lm, num_mem_kv=3), dict(n=61)),
    full_attention=('ReformerLM', dict(lm, use_full_attn=True, absolute_position_emb=True), {}),
    full_attention_mem_kv=('ReformerLM', dict(lm, use_full_attn=True, fixed_position_emb=True, num_mem_kv=5), dict(n=19)),
    full_attn_thres=('ReformerLM', dict(lm, full_attn_thres=48, axial_position_emb=True), dict(n=48)),
    scale_norm=('ReformerLM', dict(lm, use_scale_norm=True), {}),
    rezero=('ReformerLM', dict(lm, use_rezero=True), {}),
    ff_glu=('ReformerLM', dict(lm, ff_glu=True), {}),
    ff_relu=('ReformerLM', dict(lm, ff_activation=nn.ReLU, ff_mult=2), {}),
    one_value_head=('ReformerLM', dict(lm, one_value_head=True), {}),
    local_heads=('ReformerLM', dict(lm, n_local_attn_heads=2), {}),
    local_heads_both=('ReformerLM', dict(lm, n_local_attn_heads=3, causal=False), {}),
    local_heads_mem_kv=('ReformerLM', dict(lm, n_local_attn_heads=2, num_mem_kv=16), dict(n=48)),
    local_heads_one_value=('ReformerLM', dict(lm, n_local_attn_heads=1, one_value_head=True, num_mem_kv=16), dict(n=48)),
    rotations_per_head=('ReformerLM', dict(lm, random_rotations_per_head=True), {}),
    fixed=('ReformerLM', dict(lm, fixed_position_emb=True), {}),
    absolute=('ReformerLM', dict(lm, absolute_position_emb=True, emb_dim=16), {}),
    axial=('ReformerLM', dict(lm, axial_position_emb=True), {}),
    axial_shape=('ReformerLM', dict(lm, axial_position_emb=True, axial_position_shape=(4,16), emb_dim=16), {}),
    tied_embedding=('ReformerLM', dict(lm, weight_tie_embedding=True), {}),
    tied_embedding_factorised=('ReformerLM', dict(lm, weight_tie_embedding=True, emb_dim=16), {}),
    return_embeddings=('ReformerLM', dict(lm, return_embeddings=True, causal=False), {}),
    keys=('ReformerLM', lm, dict(n=48, keys=32)),
    keys_mem_kv=('ReformerLM', dict(lm, num_mem_kv=4), dict(n=40, keys=36)),
    keys_local=('ReformerLM', dict(lm, n_local_attn_heads=2), dict(n=48, keys=32)),
    keys_full=('ReformerLM', dict(lm, use_full_attn=True, fixed_position_emb=True), dict(n=21, keys=13)),
    context_mask_full=('ReformerLM', dict(lm, use_full_attn=True, fixed_position_emb=True, num_mem_kv=2), dict(n=21, keys=13, context_mask=True)),
    input_attn_mask=('ReformerLM', dict(lm, causal=False), dict(input_attn_mask=True)),
    input_attn_mask_mem_kv=('ReformerLM', dict(lm, num_mem_kv=16), dict(n=48, input_attn_mask=True)),
    input_attn_mask_full=('ReformerLM', dict(lm, use_full_attn=True, fixed_position_emb=True), dict(input_attn_mask=True)),
    product_keys=('ReformerLM', dict(lm, **pkm), {}),
    plain_blocks=('ReformerLM', dict(lm, reverse_thres=64), {}),
    readme=('ReformerLM', readme, dict(n=48)),
    readme_scale_norm=('ReformerLM', dict(readme, use_scale_norm=True, weight_tie=True), dict(n=48)),
    readme_full=('ReformerLM', dict(readme, full_attn_thres=1024, absolute_position_emb=True), dict(n=48)),
    readme_encoder=('ReformerLM', dict(lm, fixed_position_emb=True, return_embeddings=True, emb_dim=16, causal=False), {}),
    readme_decoder=('ReformerLM', dict(lm, fixed_position_emb=True, emb_dim=16), dict(keys=64)),
    everything=('ReformerLM', dict(readme, one_value_head=True, ff_glu=True, random_rotations_per_head=True, n_local_attn_heads=1, weight_tie_embedding=True,
                                   axial_position_emb=True, use_rezero=True, **pkm), dict(n=48)),
    stack=('Reformer', stack, {}),
    stack_causal=('Reformer', dict(stack, causal=True, num_mem_kv=16), dict(n=48)),
    stack_dim_head=('Reformer', {k: o for k,o in stack.items() if k!='dim_head'}, {}),
    stack_same_bucket=('Reformer', dict(stack, lsh_attend_across_buckets=False), {}),
    stack_same_bucket_causal=('Reformer', dict(stack, lsh_attend_across_buckets=False, causal=True), {}),
    stack_no_duplicates=('Reformer', dict(stack, lsh_attend_across_buckets=False, lsh_allow_duplicate_attention=False, n_hashes=4), {}),
    stack_no_duplicates_causal=('Reformer', dict(stack, lsh_attend_across_buckets=False, lsh_allow_duplicate_attention=False, n_hashes=4, causal=True), {}),
    stack_keys=('Reformer', stack, dict(n=48, keys=32)),
    attention=('LSHSelfAttention', layer, {}),
    attention_causal=('LSHSelfAttention', dict(layer, causal=True), {}),
    attention_best_buckets=('LSHSelfAttention', dict(layer, rehash_each_round=False, n_hashes=4), {}),
    attention_best_buckets_per_head=('LSHSelfAttention', dict(layer, rehash_each_round=False, random_rotations_per_head=True, attn_chunks=2), {}),
    attention_short=('LSHSelfAttention', layer, dict(n=7)),
    attention_keys=('LSHSelfAttention', dict(layer, num_mem_kv=2, causal=True), dict(n=50, keys=12)),
    attention_mask_full=('LSHSelfAttention', dict(layer, use_full_attn=True), dict(n=20, input_mask=True)),
    attention_local_mask=('LSHSelfAttention', dict(layer, use_full_attn=True, n_local_attn_heads=3), dict(n=48, input_mask=True)),
    encoder_decoder=('ReformerEncDec', dict(dim=32, **{f'{k}_{name}': o for k in ('enc','dec') for name,o in dict(
        num_tokens=50, depth=2, max_seq_len=64, heads=4, dim_head=8, bucket_size=8, n_hashes=2, ff_chunks=4).items()}), {}),
)

def draw(model):
    "Replace what starts at 0 or 1, so that it matters"
    for k,p in model.named_parameters():
        if k.endswith(('.g', 'bias')) or '.norm.' in k: nn.init.normal_(p, mean=float(p.numel()==1), std=.3)
    return model

def pair(name, dtype=torch.double):
    "The peer's model and ours, with its weights"
    import reformer_pytorch
    cls,options,_ = cases[name]
    torch.manual_seed(1)
    theirs = draw(getattr(reformer_pytorch, cls)(**options)).to(dtype)
    ours = getattr(reformer_nb, cls).from_reformer_pytorch(theirs.state_dict(), **options, **seeds(cls))
    assert {p.dtype for p in ours.parameters()}=={dtype}
    return theirs,ours

def seeds(cls): return dict(enc_hash_seed=None, dec_hash_seed=None) if cls=='ReformerEncDec' else dict(hash_seed=None)

def inputs(name, dtype=torch.double):
    "Arguments of a call, and the tensors among them that need gradients"
    cls,options,call = cases[name]
    call,g = dict(call),torch.Generator().manual_seed(2)
    n,dim = call.pop('n', 64),options['dim']
    if cls in ('ReformerLM','ReformerEncDec'): args = [torch.randint(50, (2, n), generator=g) for _ in range(1 + (cls=='ReformerEncDec'))]
    else: args = [torch.randn(2, n, dim, generator=g).to(dtype).requires_grad_()]
    if c := call.get('keys'): call['keys'] = torch.randn(2, c, dim, generator=g).to(dtype).requires_grad_()
    if 'context_mask' in call: call['context_mask'] = torch.rand(2, c, generator=g)<.7
    if 'input_mask' in call: call['input_mask'] = torch.arange(n)<torch.tensor([[n], [n//2+1]])
    if 'input_attn_mask' in call: call['input_attn_mask'] = (torch.rand(2, n, n, generator=g)<.7) | torch.eye(n, dtype=torch.bool)
    return args,call,[o for o in (*args, *call.values()) if isinstance(o, torch.Tensor) and o.requires_grad]

def forward(model, name, dtype=torch.double):
    args,call,leaves = inputs(name, dtype)
    torch.manual_seed(3)
    with peer.exact() if dtype==torch.double else contextlib.nullcontext(): out = model(*args, **call)
    if (mask := call.get('input_mask')) is not None: out = out*mask[...,None]   # what stands at padded places is nobody's
    return out,leaves

def gradients(model, name):
    "Of a weighted sum of the output, by name, and with respect to the input"
    out,leaves = forward(model.train(), name)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
    with peer.exact(): (out*weights).sum().backward()
    return out,{k: p.grad for k,p in model.named_parameters(remove_duplicate=False)},[o.grad for o in leaves]

@pytest.mark.parametrize('name', cases)
def test_outputs_and_gradients_equal_the_peers(name):
    theirs,ours = pair(name)
    out,expected = (forward(o.eval(), name)[0] for o in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    # with attn_chunks its reversible gradients are wrong (L1), so its plain path is the reference
    if cases[name][1].get('attn_chunks', 1)>1 and cases[name][0]=='ReformerLM': theirs.reformer.layers.reverse_thres = 10**9
    _,theirs_by_name,theirs_leaves = gradients(theirs, name)
    _,ours_by_name,ours_leaves = gradients(ours, name)
    for a,b in zip(ours_leaves, theirs_leaves, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    names,compared = upstream_names(ours),set()
    for k,grad in theirs_by_name.items():
        if grad is None: continue   # the peer lists parameters twice; a tensor's first name has the gradient
        mine = ours_by_name[names[k]]
        torch.testing.assert_close(mine.reshape(grad.shape), grad, rtol=1e-9, atol=1e-9, msg=lambda m, k=k: f'{k}: {m}')
        compared.add(names[k])
    assert compared=={k for k,o in ours_by_name.items() if o is not None}

def test_enough_configurations():
    assert len(cases)>=30
    import reformer_pytorch   # the case of all options at once leaves out those that exclude each other
    assert {'ReformerLM','Reformer','LSHSelfAttention','ReformerEncDec'} <= {o for o,_,_ in cases.values()} <= set(dir(reformer_pytorch))

@pytest.mark.parametrize('name', [k for k,(_,options,_) in cases.items() if not options.get('causal') and options.get('lsh_attend_across_buckets', True) and k!='encoder_decoder'])
def test_float32_outputs_are_close(name):
    "Every row sees another key than itself here"
    theirs,ours = pair(name, torch.float32)
    out,expected = (forward(o.eval(), name, torch.float32)[0] for o in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

heads = [dict(causal=causal, attend_across_buckets=across, allow_duplicate_attention=duplicates, random_rotations_per_head=per_head)
         for causal in (False,True) for across in (False,True) for duplicates in (False,True) for per_head in (False,True) if not across or duplicates]

@pytest.mark.parametrize('dtype', (torch.double, torch.float32))
@pytest.mark.parametrize('options', heads, ids=lambda o: '-'.join(f'{int(v)}' for v in o.values()))
def test_single_heads(options, dtype):
    "LSHAttention and FullQKAttention, with queries fewer than keys"
    import reformer_pytorch.reformer_pytorch as up
    g,d,n,queries = torch.Generator().manual_seed(0),8,64,50
    qk,v = (torch.randn(6, n, d, generator=g).to(dtype) for _ in range(2))
    attn_mask = (torch.rand(6, queries, n, generator=g)<.8) | torch.eye(n, dtype=torch.bool)[:queries]
    theirs = up.LSHAttention(bucket_size=8, n_hashes=3, return_attn=dtype==torch.float32, **options).eval()
    ours = reformer_nb.LSHAttention(bucket_size=8, n_hashes=3, return_attn=True, scale=d**-.5, look_back='rounds', hash_seed=None, **options).eval()
    results = []
    for f in (ours, theirs):
        torch.manual_seed(1)
        with peer.exact() if dtype==torch.double else contextlib.nullcontext(): results.append(f(qk, v, query_len=queries, input_attn_mask=attn_mask))
    (out,attn,buckets),(expected,their_attn,their_buckets) = results
    assert torch.equal(buckets, their_buckets)
    sees = attn.diagonal(dim1=1, dim2=2)<.5   # rows that see another key than themselves
    assert sees.float().mean()>.5
    exact = dtype==torch.double
    torch.testing.assert_close(*((o if exact else o[sees]) for o in (out, expected)), rtol=0, atol=1e-9 if exact else 1e-4)
    if not exact: torch.testing.assert_close(attn[sees], their_attn[sees], rtol=0, atol=1e-4)
    full,their_full = FullQKAttention(options['causal'], scale=d**-.5),up.FullQKAttention(options['causal'])
    results = [f(qk, v, query_len=queries, input_attn_mask=attn_mask)[:2] for f in (full, their_full)]
    sees = results[0][1].diagonal(dim1=1, dim2=2)<.5
    for a,b in zip(*results): torch.testing.assert_close(*((o if exact else o[sees]) for o in (a, b)), rtol=0, atol=1e-9 if exact else 1e-4)

def test_hashing_equals_the_peers():
    "Its draws, its hash, and its best buckets in its order"
    import reformer_pytorch.reformer_pytorch as up
    x = torch.randn(6, 64, 8, generator=torch.Generator().manual_seed(0))
    for rehash in (True,False):
        for per_head in (True,False):
            options = dict(bucket_size=8, n_hashes=4, rehash_each_round=rehash, random_rotations_per_head=per_head)
            results = []
            for f in (up.LSHAttention(**options).eval(), reformer_nb.LSHAttention(**options, hash_seed=None).eval()):
                torch.manual_seed(5)
                results.append((f(x, x)[2], torch.rand(3)))   # the same random numbers follow
            for a,b in zip(*results): assert torch.equal(a, b)

def test_saved_options(tmp_path):
    "An imported model keeps, on disk too, what its weights were trained with"
    name = 'local_heads_mem_kv'
    theirs,ours = pair(name)
    ours.save_pretrained(tmp_path)
    again = reformer_nb.ReformerLM.from_pretrained(tmp_path)
    assert again.config['scale']==8**-.5 and again.config['look_back']=='rounds' and again.config['local_pos_emb'] is False and again.config['local_memory'] is False
    out,expected = (forward(o.eval(), name)[0] for o in (again, theirs))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)

def test_default_seed_makes_evaluation_repeatable():
    import reformer_pytorch
    torch.manual_seed(0)
    theirs = reformer_pytorch.ReformerLM(**lm)
    ours = reformer_nb.ReformerLM.from_reformer_pytorch(theirs.state_dict(), **lm)
    (x,),_,_ = inputs('plain')
    assert torch.equal(ours(x), ours(x)) and not torch.equal(theirs.eval()(x), theirs(x))

@pytest.mark.parametrize('cls,name', [('ReformerLM','readme'), ('Reformer','stack_causal'), ('LSHSelfAttention','attention'), ('ReformerEncDec','encoder_decoder')])
def test_every_key_is_accounted_for(cls, name):
    import reformer_pytorch
    options = cases[name][1]
    torch.manual_seed(0)
    state = getattr(reformer_pytorch, cls)(**options).state_dict()
    ours = getattr(reformer_nb, cls)
    loaded = ours.from_reformer_pytorch(state, **options)
    assert set(state)=={k for k in upstream_names(loaded)}
    key = next(k for k in state if k.endswith('toqk.weight'))
    with pytest.raises(ValueError, match='unexpected.*extra.key'): ours.from_reformer_pytorch({**state, 'extra.key': torch.zeros(1)}, **options)
    short = {k: o for k,o in state.items() if not k.endswith(key.split('.net.')[-1])}
    with pytest.raises(ValueError, match='missing.*toqk.weight'): ours.from_reformer_pytorch(short, **options)
    with pytest.raises(ValueError, match='toqk.weight'): ours.from_reformer_pytorch({**state, key: state[key][1:]}, **options)

def test_wrapped_keys():
    "Weights saved from inside TrainingWrapper or DistributedDataParallel"
    from reformer_pytorch import ReformerLM
    from reformer_pytorch.generative_tools import TrainingWrapper
    torch.manual_seed(0)
    wrapper = TrainingWrapper(ReformerLM(**lm))
    state = {f'module.{k}': o for k,o in wrapper.state_dict().items()}
    ours = reformer_nb.ReformerLM.from_reformer_pytorch(state, **lm)
    assert torch.equal(ours.token_emb.weight, wrapper.net.net.token_emb.weight)

@pytest.mark.parametrize('cls,name', [('ReformerLM','plain'), ('Reformer','stack'), ('LSHSelfAttention','attention'), ('ReformerEncDec','encoder_decoder')])
def test_load_state_dict_points_to_the_importer(cls, name):
    "Also from inside another module"
    theirs,ours = pair(name, torch.float32)
    fresh = copy.deepcopy(ours)
    for module,state in ((fresh, theirs.state_dict()), (nn.Sequential(fresh), {f'0.{k}': o for k,o in theirs.state_dict().items()})):
        with pytest.raises((ValueError,RuntimeError), match='from_reformer_pytorch'): module.load_state_dict(state)
    fresh.load_state_dict(ours.state_dict())

def test_half_precision_weights():
    "Its `inv_freq` was rounded with the rest (L7); ours is not stored"
    from reformer_pytorch import ReformerLM
    torch.manual_seed(0)
    theirs = ReformerLM(**lm)
    exact = reformer_nb.ReformerLM.from_reformer_pytorch(theirs.state_dict(), **lm)
    half = reformer_nb.ReformerLM.from_reformer_pytorch(theirs.half().state_dict(), **lm)
    assert {p.dtype for p in half.parameters()}=={torch.float16}
    x = torch.arange(64)[None]%50
    torch.testing.assert_close(half.float()(x), exact(x), rtol=0, atol=.1)

# ---- under the peer's name -----------------------------------------------------------------------------------------

def compat(name, module='reformer_pytorch'): return getattr(upstream_modules()[module], name)

@pytest.mark.parametrize('name', ('plain', 'readme', 'everything', 'tied_embedding_factorised', 'local_heads_mem_kv', 'stack', 'stack_causal',
                                  'attention_keys', 'attention_best_buckets', 'encoder_decoder'))
def test_compat_has_the_peers_defaults_and_numerics(name):
    "Its constructor calls, its `load_state_dict`, its random numbers"
    import reformer_pytorch
    cls,options,_ = cases[name]
    torch.manual_seed(1)
    theirs = draw(getattr(reformer_pytorch, cls)(**options)).double().eval()
    ours = compat(cls)(**options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    again = compat(cls)(**options).double().eval()
    again.load_state_dict(ours.state_dict())
    for model in (ours, again): torch.testing.assert_close(forward(model, name)[0], forward(theirs, name)[0], rtol=0, atol=1e-9)
    inside = nn.Sequential(compat(cls)(**options).double())
    inside.load_state_dict({f'0.{k}': o for k,o in theirs.state_dict().items()})
    assert all(torch.equal(p, q) for p,q in zip(inside.parameters(), ours.parameters(), strict=True))

def test_compat_positional_arguments():
    import reformer_pytorch
    for cls,args in (('LSHSelfAttention', (32, 4, 8, 2, True, 8, 2)), ('Reformer', (32, 1, 4, 8, 8, 2, 4)), ('ReformerLM', (50, 32, 1, 64, 4, 8, 8, 2, 4))):
        theirs = getattr(reformer_pytorch, cls)(*args)
        compat(cls)(*args).load_state_dict(theirs.state_dict())

def test_compat_single_heads():
    import reformer_pytorch.reformer_pytorch as up
    x,pos = torch.randn(4, 64, 8, dtype=torch.double),up.FixedPositionalEmbedding(8).double()(torch.zeros(1, 50, 8, dtype=torch.double))
    for cls,options in (('LSHAttention', dict(bucket_size=8, n_hashes=2, causal=True)), ('FullQKAttention', dict(causal=True))):
        results = []
        for f in (getattr(up, cls)(**options), compat(cls, 'reformer_pytorch.reformer_pytorch')(**options)):
            torch.manual_seed(1)
            with peer.exact(): results.append(f.eval()(x, x, query_len=50, pos_emb=pos if cls=='LSHAttention' else None, _reverse=False, _depth=0)[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)

def test_compat_layers():
    import reformer_pytorch.reformer_pytorch as up
    ours = upstream_modules()['reformer_pytorch.reformer_pytorch']
    x = torch.randn(2, 12, 8)
    for make in (lambda m: m.FeedForward(8, glu=True), lambda m: m.Chunk(3, m.FeedForward(8), along_dim=1), lambda m: m.PreNorm(m.ScaleNorm, 8, m.FeedForward(8)),
                 lambda m: m.ReZero(m.FeedForward(8)), lambda m: m.AbsolutePositionalEmbedding(8, 20), lambda m: m.FixedPositionalEmbedding(8), lambda m: m.Always(3)):
        theirs,mine = make(up),make(ours)
        mine.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(torch.as_tensor(mine(x)), torch.as_tensor(theirs(x)))
    assert ours.default(None, 3)==3 and ours.cast_tuple(3)==(3,) and ours.exists(0) and ours.max_neg_value(x)==up.max_neg_value(x)

def test_compat_layer_in_a_signalled_stack():
    "Blocks of its own layers, with `send_signal`, as its models are made"
    import reformer_pytorch.reformer_pytorch as up
    ours,x,results = upstream_modules()['reformer_pytorch.reformer_pytorch'],torch.randn(2, 32, 32, dtype=torch.double),[]
    for m in (up, ours):
        torch.manual_seed(0)
        blocks = [[m.PreNorm(nn.LayerNorm, 16, m.LSHSelfAttention(16, 2, 8, 2)), m.PreNorm(nn.LayerNorm, 16, m.FeedForward(16))] for _ in range(2)]
        model = m.ReversibleSequence(nn.ModuleList([nn.ModuleList(o) for o in blocks]), send_signal=True).double()
        torch.manual_seed(1)
        with peer.exact():
            out = model(x.clone().requires_grad_())
            out.sin().sum().backward()
        results.append((out, *[p.grad for o in blocks for f in o for p in f.parameters()]))
    for a,b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

def test_compat_wrappers():
    "Checkpoints saved from TrainingWrapper, and losses"
    from reformer_pytorch import Autopadder, ReformerLM
    from reformer_pytorch.generative_tools import TrainingWrapper
    theirs = TrainingWrapper(ReformerLM(**lm), ignore_index=0).double()
    ours = compat('TrainingWrapper', 'reformer_pytorch.generative_tools')(compat('ReformerLM')(**lm), ignore_index=0).double()
    ours.load_state_dict(theirs.state_dict())
    x,losses = torch.randint(1, 50, (2, 65)),[]
    for model in (theirs, ours):
        torch.manual_seed(3)
        with peer.exact(): losses.append(model(x, return_loss=True))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-9)
    padded = compat('Autopadder')(compat('ReformerLM')(**lm)).double()
    padded.load_state_dict(Autopadder(theirs.net.net).state_dict())
    assert torch.equal(padded.net.token_emb.weight, theirs.net.net.token_emb.weight)
