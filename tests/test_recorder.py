"Recorder: what it leaves behind, and what it keeps"
import copy, pickle
from meter import Largest
import pytest, torch
from torch import nn
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.encoder_decoder import ReformerEncDec
from reformer_nb.training_wrapper import TrainingWrapper
from reformer_nb.language_model import ReformerLM
from reformer_nb.pictures import summarize
from reformer_nb.recorder import Recorder, attention_layers, by_round, sorted_order
from reformer_nb.reformer import Autopadder
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

@pytest.mark.parametrize('where', (lambda model: model, lambda model: model.reformer))
def test_an_error_before_the_recorder_is_called(where):
    "A hook that stands before its own and fails: the model is left as it was, and later passes are recorded"
    model,fails = new_model(),[True]
    def fail(*_):
        if fails: raise MemoryError('no more')
    handle = where(model).register_forward_pre_hook(fail)
    recorder = Recorder(model)
    for _ in range(2):
        with pytest.raises(MemoryError): recorder(tokens)
    fails.clear()
    recorder(tokens), recorder(tokens)
    handle.remove()
    assert {k: len(o) for k,o in recorder.recordings.items()}=={0: 2, 1: 2}
    assert all(o.callback is None and 'report' not in vars(o) for o in attention_layers(model).values())

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

@pytest.mark.parametrize('options', (dict(), dict(use_full_attn=True), dict(look_back='rounds', lsh_allow_duplicate_attention=False), dict(n_local_attn_heads=1, num_mem_kv=3)))
@pytest.mark.parametrize('training', (False, True))
def test_sparse_rows_are_the_largest_of_the_dense_ones(options, training):
    model = new_model(**options, rotations='fixed').train(training)
    dense,sparse = (Recorder(model, top_k=k) for k in (None, 7))
    dense(tokens), sparse(tokens)
    for o,p in zip(dense.recordings[0], sparse.recordings[0]):
        torch.testing.assert_close(p['attn'].weights, o['attn'].topk(7).values, rtol=0, atol=1e-6)
        torch.testing.assert_close(o['attn'].gather(-1, p['attn'].keys.long()), p['attn'].weights, rtol=0, atol=1e-6)
        assert torch.equal(o['buckets'], p['buckets']) and o['columns']==p['columns']
        assert p['attn'].keys.dtype==torch.int32 and p['attn'].to_dense().shape==o['attn'].shape

def test_layers_and_heads():
    model = new_model(heads=3)
    names = list(attention_layers(model))
    everything,some = Recorder(model.eval()),Recorder(model.eval(), layers=[names[1]], heads=[2, 1])
    everything(tokens), some(tokens)
    (entry,),want = some.recordings[0],everything.recordings[0][1]
    assert (entry['layer'], entry['name'], entry['heads'])==(1, names[1], [2, 1])
    assert torch.equal(entry['buckets'], want['buckets'][:,[2,1]])
    torch.testing.assert_close(entry['attn'], want['attn'][:,[2,1]], rtol=0, atol=1e-7)
    for wrong in (dict(layers=[2]), dict(layers=['no']), dict(heads=[3]), dict(heads=[-1]), dict(heads=['0'])):
        with pytest.raises(ValueError): Recorder(model, **wrong)

def test_padding_that_counts_has_a_bucket_of_its_own():
    "Also without a mask of the user: ids of the second round begin after it"
    model = new_model(count_padding=True, look_back='rounds', n_buckets=4).eval()
    recorder = Recorder(model)
    for mask in (None, torch.arange(19)<torch.tensor([[19],[9]])):
        recorder.clear()
        recorder(tokens, input_mask=mask)
        for o in recorder.recordings[0]:
            first,second = o['buckets'].unflatten(-1, (2, -1)).unbind(-2)
            assert first.max()==4 and second.min()>=5 and second.max()==9   # 20 places for 19 tokens: the last one is padding

@pytest.mark.parametrize('n', (19, 20))
def test_real_keys_where_padding_counts(n):
    "Also of a layer, which may look at its context only"
    mask,context_mask = torch.arange(n)<torch.tensor([[n],[7]]),torch.arange(5)<torch.tensor([[3],[5]])
    recorder = Recorder(new_model(count_padding=True).eval())
    recorder(torch.randint(61, (2, n)), mask)
    for o in recorder.recordings[0]: assert torch.equal(o['real'], torch.nn.functional.pad(mask, (0, 20-n)))
    for context_only in (False, True):
        torch.manual_seed(0)
        layer = LSHSelfAttention(24, heads=2, bucket_size=4, n_hashes=2, count_padding=True, context_only=context_only, num_mem_kv=2).eval()
        x,keys,recorder = torch.randn(2, n, 24),torch.randn(2, 5, 24),Recorder(layer)
        with torch.no_grad(): out = recorder(x, keys=keys, input_mask=mask, context_mask=context_mask)
        (o,) = recorder.recordings[0]
        assert torch.equal(o['real'], torch.cat([mask, torch.ones(2, 2).bool(), context_mask], 1))
        v = layer.split_heads(torch.cat([x, layer.mem_kv.expand(2, -1, -1), keys], 1))[1]
        torch.testing.assert_close(layer.join_heads(o['attn'] @ v)[mask], out[mask], rtol=0, atol=1e-5)

def test_largest_weights_with_short_keys():
    model = new_model(key_eps=.1).eval()
    dense,sparse = Recorder(model),Recorder(model, top_k=40)
    dense(tokens)
    sparse(tokens)
    for a,b in zip(dense.recordings[0], sparse.recordings[0]):
        torch.testing.assert_close(b['attn'].to_dense(), a['attn'], rtol=0, atol=1e-6)

def test_buckets_are_those_used():
    model = new_model().eval()
    used = []
    handles = [o.hasher.register_forward_hook(lambda m, args, out: used.append(out)) for o in attention_layers(model).values()]
    recorder = Recorder(model)
    recorder(tokens)
    for o in handles: o.remove()
    for entry,ids in zip(recorder.recordings[0], used):
        got = by_round(entry)
        assert torch.equal(got - got.new_tensor([0, got[:,:,1].min()-ids[:,:,1].min()])[:,None], ids.long())

@pytest.mark.parametrize('wrap', (lambda o: o, Autopadder, nn.DataParallel, lambda o: nn.Sequential(o)))
def test_wrappers(wrap):
    plain,wrapped = Recorder(new_model().eval()),Recorder(wrap(new_model().eval()))
    outs = plain(tokens),wrapped(tokens)
    assert torch.equal(*outs)
    for o,p in zip(plain.recordings[0], wrapped.recordings[0]): assert torch.equal(o['attn'], p['attn']) and p['name'].endswith(o['name'])
    trained = TrainingWrapper(Recorder(new_model()))
    trained(tokens, return_loss=True).backward()
    assert [len(o) for o in trained.net.recordings.values()]==[2]

def test_encoder_and_decoder_are_told_apart():
    torch.manual_seed(0)
    both = ReformerEncDec(24, enc_num_tokens=61, enc_depth=1, enc_max_seq_len=64, enc_bucket_size=4, enc_heads=2,
                          dec_num_tokens=61, dec_depth=1, dec_max_seq_len=64, dec_bucket_size=4, dec_heads=2).eval()
    recorder = Recorder(both)
    recorder(tokens, tokens[:,:11])
    entries = [o for entries in recorder.recordings.values() for o in entries]
    assert len(entries)==2 and len({o['name'] for o in entries})==2
    assert entries[1]['columns']==dict(text=slice(0, entries[1]['attn'].shape[2]), memory=slice(entries[1]['attn'].shape[2], entries[1]['attn'].shape[2]), context=slice(entries[1]['attn'].shape[2], entries[1]['attn'].shape[2]+19))

def test_shared_layers_are_counted():
    recorder = Recorder(new_model(weight_tie=True))
    recorder(tokens)
    assert [o['layer'] for o in recorder.recordings[0]]==[0, 1] and len({o['name'] for o in recorder.recordings[0]})==1

def test_half_precision_and_autocast_are_exact():
    "Weights come from the layer's own queries: they are those of a float32 layer with the same queries"
    torch.manual_seed(0)
    layer,x = LSHSelfAttention(16, heads=2, bucket_size=4, n_hashes=2).bfloat16().eval(),torch.randn(1, 19, 16).bfloat16()
    recorder = Recorder(layer)
    with torch.no_grad(): recorder(x)
    qk = layer.toqk(x).unflatten(-1, (2, 8)).transpose(1, 2).float()
    want = lsh_attention_oracle(qk, qk, by_round(recorder.recordings[0][0]), bucket_size=4, return_weights=True)[1]
    torch.testing.assert_close(recorder.recordings[0][0]['attn'], want, rtol=0, atol=1e-6)
    model = Recorder(new_model().eval())
    with torch.autocast('cpu', dtype=torch.bfloat16): model(tokens)
    for o in model.recordings[0]: torch.testing.assert_close(o['attn'].sum(-1), torch.ones(2, 2, 19), rtol=0, atol=1e-5)

def test_an_error_while_recording_leaves_the_layers_too():
    recorder = Recorder(new_model())
    recorder.record = None   # calling it fails
    with pytest.raises(TypeError): recorder(tokens)
    assert all(o.callback is None and 'report' not in vars(o) for o in attention_layers(recorder.net).values()) and not recorder.net._forward_hooks
    del recorder.record
    recorder(tokens)
    assert len(recorder.recordings[0])==2

def test_recorders_within_recorders():
    outer = Recorder(inner := Recorder(new_model().eval()))
    outer(tokens)
    assert len(outer.recordings[0])==2 and outer.recordings[0][0]['attn'].shape==(2, 2, 19, 19)
    assert all(o.callback is None and 'report' not in vars(o) for o in attention_layers(inner.net).values())

def test_streams_are_recorded():
    "A pass for each token, streams at the same time too, and nothing that happens between them"
    model = new_model().eval()
    recorder = Recorder(model)
    want = list(model.stream(tokens, 3, temperature=0))
    for token,other,w in zip(recorder.stream(tokens, 3, temperature=0), recorder.stream(tokens, 3, temperature=0), want):
        assert torch.equal(token, w) and torch.equal(other, w)
        model(tokens)
        assert not model._forward_hooks and not recorder.hooks
    assert [o[0]['attn'].shape[-1] for o in recorder.recordings.values()]==[19, 19, 20, 20, 21, 21]
    with recorder: assert len(list(recorder.stream(tokens, 2)))==2 and recorder.hooks
    assert recorder.iter==8
    next(recorder.stream(tokens, 3))   # a stream that nobody reads to its end
    assert recorder.iter==9 and not model._forward_hooks
    with pytest.raises(ValueError, match='max_new_tokens=0'): recorder.stream(tokens, 0)
    recorder.eject()
    with pytest.raises(RuntimeError, match='was ejected'): recorder.stream(tokens, 3)

def test_rows_of_a_table():
    model = new_model(num_mem_kv=2)
    for top_k in (None, 30):
        recorder = Recorder(model.eval(), top_k=top_k)
        recorder(tokens), recorder(tokens)
        rows = summarize(recorder.recordings)
        assert len(rows)==2*2*2*2 and {o['pass'] for o in rows}=={0, 1}
        for o in rows:
            assert o['text']+o['memory']+o['context']==pytest.approx(1, abs=1e-5) and 0<o['band']<=1+1e-6 and 0<=o['overflow']<1
    assert len(summarize({0: recorder.recordings[0]}))==8

@pytest.mark.slow
def test_long_texts_in_bounded_memory():
    "8192 tokens, four heads: the dense weights would be 1 GiB"
    recorder = Recorder(LSHSelfAttention(64, heads=4, n_hashes=4, causal=True).eval(), top_k=16)
    with torch.no_grad(), Largest() as meter: recorder(torch.randn(1, 8192, 64))
    assert meter.bytes<=2**25 and recorder.recordings[0][0]['attn'].weights.shape==(1, 4, 8192, 16)
