"Recorder: what it leaves behind, and what it keeps"
import copy, pickle
import pytest, torch
from torch import nn
from reformer_nb.language_model import ReformerLM
from reformer_nb.recorder import Recorder, by_round, sorted_order
from reformer_nb.self_attention import LSHSelfAttention

def new_model(**options):
    torch.manual_seed(0)
    return ReformerLM(61, 24, 2, 40, **{**dict(heads=2, dim_head=8, bucket_size=4, n_hashes=2, causal=True), **options})

tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('reverse_thres', (0, 100))
@pytest.mark.parametrize('full', (False, True))
@pytest.mark.parametrize('inside', (False, True))
def test_one_entry_per_layer_also_after_a_backward(reverse_thres, full, inside):
    "A full layer has no buckets by which a repeated call could be told"
    model = new_model(reverse_thres=reverse_thres, use_full_attn=full).train()
    recorder = Recorder(model)
    if inside:
        with recorder: model(tokens).square().mean().backward()
    else: recorder(tokens).square().mean().backward()
    assert [len(o) for o in recorder.recordings.values()]==[2]
    assert all(o['attn'].shape==(2, 2, 19, 19) and o['buckets'].shape==(2, 2, 0 if full else 38) for o in recorder.recordings[0])

def test_leaves_layers_as_found_after_an_error():
    model = new_model()
    layers = [o for o in model.modules() if isinstance(o, LSHSelfAttention)]
    layers[0].callback,layers[1].return_attn = print,True
    def fail(*_): raise MemoryError('no more')
    handle = model.norm.register_forward_hook(fail)
    recorder = Recorder(model)
    with pytest.raises(MemoryError): recorder(tokens)
    handle.remove()
    assert [(o.callback, o.return_attn) for o in layers]==[(print, False), (None, True)]
    assert recorder.recordings=={} and not model._forward_hooks and not model._forward_pre_hooks
    layers[0].callback = None
    recorder(tokens)
    assert [*recorder.recordings]==[0] and len(recorder.recordings[0])==2

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(dtype):
    recorder = Recorder(new_model().to(dtype).eval())
    recorder(tokens)
    for o in recorder.recordings[0]:
        assert o['attn'].dtype==torch.float32 and o['attn'].device.type=='cpu' and not o['attn'].requires_grad
        torch.testing.assert_close(o['attn'].sum(-1), torch.ones(2, 2, 19), rtol=0, atol=2e-2)

@pytest.mark.parametrize('options', (dict(), dict(num_mem_kv=3), dict(use_full_attn=True), dict(look_back='rounds'),
                                     dict(allow_duplicate_attention=False), dict(attend_across_buckets=False), dict(causal=True)))
def test_weights_give_the_output(options):
    torch.manual_seed(0)
    layer = LSHSelfAttention(12, heads=3, bucket_size=4, n_hashes=2, full_attn_thres=0, **options).double().eval()
    x,keys = torch.randn(2, 19, 12).double(),torch.randn(2, 5, 12).double()
    recorder = Recorder(layer)
    out = recorder(x, keys=keys)
    parts = [x, keys] if not options.get('num_mem_kv') else [x, layer.mem_kv.expand(2, -1, -1), keys]
    v = layer.tov(torch.cat(parts, dim=1)).unflatten(-1, (3, 4)).transpose(1, 2)
    again = layer.to_out((recorder.recordings[0][0]['attn'].double() @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, again, rtol=0, atol=1e-5)

def test_copies_and_pickles():
    recorder = Recorder(new_model())
    recorder(tokens)
    for o in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        o(tokens)
        assert [*o.recordings]==[0, 1] and [*recorder.recordings]==[0]
    assert recorder.config is recorder.net.config and recorder.max_seq_len==40

def test_order():
    recorder = Recorder(new_model())
    recorder(tokens)
    entry = recorder.recordings[0][0]
    ids = by_round(entry).gather(-1, sorted_order(entry))
    assert (ids.diff(dim=-1)>=0).all()

def test_nothing_to_record():
    with pytest.raises(ValueError, match='nothing to record'): Recorder(nn.Linear(2, 2))
