"Models in other forms: torch.export, ONNX, torch.compile, shapes without numbers"
import warnings
import pytest
import torch
import torch.nn.functional as F
from reformer_nb import LSHSelfAttention, Reformer, ReformerEncDec, ReformerLM

small = dict(dim=16, heads=2, dim_head=8, bucket_size=8, n_hashes=2)
lm = dict(small, num_tokens=50, depth=2, max_seq_len=64, causal=True)

def tokens(n=48, seed=0): return torch.randint(50, (2, n), generator=torch.Generator().manual_seed(seed))
def vectors(n=48): return torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0))
real = torch.arange(48) < torch.tensor([[48], [31]])

# name: (what makes the model, its inputs)
models = {'language model': (lambda: ReformerLM(**lm), lambda: (tokens(),)),
          'full attention': (lambda: ReformerLM(**dict(lm, full_attn_thres=64)), lambda: (tokens(),)),
          'strict': (lambda: ReformerLM(**dict(lm, causal='strict')), lambda: (tokens(),)),
          'many options': (lambda: ReformerLM(**dict(lm, num_mem_kv=3, n_local_attn_heads=1, ff_chunks=2, ff_glu=True, use_scale_norm=True, emb_dim=12,
                           pkm_layers=2, lsh_allow_duplicate_attention=False, random_rotations_per_head=True, absolute_position_emb=True)), lambda: (tokens(),)),
          'masks': (lambda: Reformer(depth=2, **small), lambda: (vectors(), real)),
          'attention': (lambda: LSHSelfAttention(look_back='rounds', attend_across_buckets=False, **small), lambda: (vectors(), None, real)),
          'local layers': (lambda: ReformerLM(**dict(lm, attn_layers=('local','lsh'), local_window=5)), lambda: (tokens(), real)),
          'two languages': (lambda: ReformerEncDec(dim=16, enc_num_tokens=50, enc_depth=1, enc_max_seq_len=64, dec_num_tokens=50, dec_depth=1, dec_max_seq_len=64,
                            enc_bucket_size=8, dec_bucket_size=8), lambda: (tokens(), tokens(40, 1)))}

def make(name):
    torch.manual_seed(0)
    model,inputs = models[name]
    return model().eval(),inputs()

@pytest.mark.parametrize('name', models)
def test_exports_to_public_operations(name):
    model,inputs = make(name)
    state = torch.get_rng_state()
    with torch.no_grad(): program = torch.export.export(model, inputs).run_decompositions({})
    targets = [o.target for o in program.graph.nodes if o.op=='call_function']
    assert {o.namespace for o in targets if hasattr(o, 'namespace')}=={'aten'}
    assert not any('rand' in str(o) for o in targets)   # rotations are constants
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=0, atol=1e-5)

@pytest.mark.parametrize('name', (pytest.param('language model', marks=pytest.mark.slow), pytest.param('strict', marks=pytest.mark.slow), 'masks', 'local layers'))
def test_onnx(name, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    model,inputs = make(name)
    torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(tmp_path/'model.onnx')
    session = ort.InferenceSession(tmp_path/'model.onnx', providers=['CPUExecutionProvider'])
    got, = session.run(None, {i.name: o.numpy() for i,o in zip(session.get_inputs(), inputs)})
    torch.testing.assert_close(torch.from_numpy(got), model(*inputs), rtol=0, atol=1e-4)

@pytest.mark.parametrize('reverse', (True, False))
@pytest.mark.parametrize('name', models)
def test_shapes_without_numbers(name, reverse):
    "On the meta device: outputs have their shapes, and weights gradients"
    with torch.no_grad(): wanted = make(name)[0](*models[name][1]()).shape
    model,inputs = make(name)
    model.train().to('meta')
    for o in model.modules():
        if hasattr(o, 'reverse_thres'): o.reverse_thres = 0 if reverse else 2**30
    out = model(*(o if o is None else o.to('meta') for o in inputs))
    out.sum().backward()
    assert out.is_meta and out.shape==wanted and all(o.grad.shape==o.shape for o in model.parameters() if o.grad is not None) and any(o.grad is not None for o in model.parameters())
    if isinstance(model, ReformerLM): model.loss(inputs[0].to('meta')).backward()

def test_a_trace_is_refused():
    "A trace would keep the sizes of its example"
    model,inputs = make('language model')
    with warnings.catch_warnings(), pytest.raises(TypeError, match='torch.export.export'):
        warnings.simplefilter('ignore')   # torch's own, of deprecation and of values that become constants
        torch.jit.trace(model, inputs)

def losses(model, step, n_steps=3):
    optimizer,found = torch.optim.SGD(model.parameters(), .1),[]
    for seed in range(n_steps):
        x = tokens(49, seed)
        loss = F.cross_entropy(step(x[:,:-1]).transpose(1, 2), x[:,1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found

def test_compiled_training_has_the_same_losses():
    plain,other = (ReformerLM(**dict(lm, depth=1), hash_seed=0).train() for _ in range(2))
    other.load_state_dict(plain.state_dict())
    want = losses(plain, plain)
    assert want[0]!=want[2]
    torch._dynamo.reset()
    assert losses(other, torch.compile(other, backend='aot_eager'))==pytest.approx(want, abs=1e-4)
    for a,b in zip(plain.parameters(), other.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
