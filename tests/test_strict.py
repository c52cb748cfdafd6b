"Strict causality: both backends against the oracle, no leak in models, texts in segments, cached writing"
from functools import partial
from itertools import product
import grids
import pytest
import torch
import torch.nn.functional as F
from reformer_nb.diagnostics import check_causality
from reformer_nb.encoder_decoder import ReformerEncDec
from reformer_nb.fused_lsh import fused_lsh_attention
from reformer_nb.hasher import BucketHasher
from reformer_nb.language_model import ReformerLM
from reformer_nb.lsh import LSHAttention, lsh_attention
from reformer_nb.recorder import Recorder
from reformer_nb.reformer import Reformer
from reformer_nb.strict import strict_attention, strict_attention_oracle

def draw(*shape, seed=0, dtype=torch.double):
    "Normal numbers that depend on the seed alone"
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).to(dtype)

def coins(*shape, rate, seed=0):
    "True with probability `rate`"
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate

def masks(kind, b, n):
    "No mask, padding at the end of a row, or holes"
    if kind=='none': return None
    return torch.arange(n) < torch.tensor([[n], [max(1, n//2)]]) if kind=='end' else coins(b, n, rate=.6, seed=n)

def results(f, qk, v, buckets, **options):
    "Output and gradients"
    x,y = (o.clone().requires_grad_() for o in (qk, v))
    out = f(x, y, buckets, **options)
    return out,*torch.autograd.grad((out*draw(*out.shape, seed=9, dtype=out.dtype)).sum(), (x, y), allow_unused=True, materialize_grads=True)

grid = list(product((1, 5, 16, 23, 48), (4, 8), (1, 2, 4), (2, 6), (True, False), ('none', 'end', 'holes'), (1., .6), (False, True), (False, True)))

@pytest.mark.parametrize('n,w,r,k,duplicates,mask,ask,silent,pairs', grids.sample(grid, 60))
def test_both_backends_equal_the_oracle(n, w, r, k, duplicates, mask, ask, silent, pairs):
    qk,v,mask,query_len = draw(2, 3, n, 6, seed=1),draw(2, 3, n, 6, seed=2),masks(mask, 2, n),max(1, int(ask*n))
    buckets = BucketHasher(r, w, n_buckets=k).eval()(qk, mask)
    options = dict(bucket_size=w, mask=mask, scale=.7, allow_duplicate_attention=duplicates, query_len=query_len,
                   key_mask=coins(2, n, rate=.7) if silent else None, attn_mask=coins(2, query_len, n, rate=.6) if pairs else None)
    wanted = results(strict_attention_oracle, qk, v, buckets, **options)
    for backend in ('reference', 'fused'):
        found = results(partial(strict_attention, backend=backend), qk, v, buckets, **options)
        for a,b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

@pytest.mark.parametrize('options', (dict(), dict(allow_duplicate_attention=False), dict(query_len=9), dict(dropout=.4), dict(query_len=9, dropout=.4)))
def test_gradcheck(options):
    qk,v = draw(1, 2, 13, 4, seed=5).requires_grad_(),draw(1, 2, 13, 4, seed=6).requires_grad_()
    buckets = BucketHasher(2, 4, n_buckets=2).eval()(qk)
    def f(qk, v):
        torch.manual_seed(3)
        return lsh_attention(qk, v, buckets, bucket_size=4, scale=.8, causal='strict', **options)
    assert torch.autograd.gradcheck(f, (qk, v))

def test_gradient_of_the_log_sum_exp():
    qk,v = draw(1, 2, 13, 4, seed=5).requires_grad_(),draw(1, 2, 13, 3, seed=6).requires_grad_()
    buckets = BucketHasher(2, 4).eval()(qk)
    def f(qk, v): return tuple(o.clamp(min=-99) for o in fused_lsh_attention(qk, v, buckets, bucket_size=4, return_lse=True, causal=True))
    assert torch.autograd.gradcheck(f, (qk, v))

def test_float32_over_blocks_and_strips():
    qk,v = draw(2, 3, 600, 32, seed=3, dtype=torch.float),draw(2, 3, 600, 32, seed=4, dtype=torch.float)
    buckets = BucketHasher(3, 16, n_buckets=12).eval()(qk)
    found,wanted = (results(partial(strict_attention, backend=o), qk, v, buckets, bucket_size=16, query_len=590) for o in ('fused', 'reference'))
    for a,b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

models = list(product((1, 2), (1, 3), (0, 1), (0, 2), ('auto', 'reference'), (False, True), (37, 64, 90)))

def new_model(rounds=2, heads=2, local=0, memory=0, backend='auto', tie=False, **options):
    "A small strictly causal language model in float64, in evaluation"
    torch.manual_seed(0)
    return ReformerLM(29, 12, 2, 96, **{**dict(heads=heads+local, dim_head=4, bucket_size=4, n_hashes=rounds, causal='strict', n_local_attn_heads=local,
                                               num_mem_kv=memory, backend=backend, weight_tie=tie), **options}).double().eval()

def tokens_of(b, n, seed=0): return torch.randint(29, (b, n), generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize('rounds,heads,local,memory,backend,tie,n', grids.sample(models, 12))
def test_no_later_token_reaches_an_earlier_output(rounds, heads, local, memory, backend, tie, n):
    model,text = new_model(rounds, heads, local, memory, backend, tie),tokens_of(2, n)
    context = draw(2, 5, 12, seed=3)
    for keep in (1, n//2, n-1):
        other = torch.cat([text[:,:keep], tokens_of(2, n-keep, seed=1)], 1)
        short,long,changed = (model(o, keys=context) for o in (text[:,:keep], text, other))
        for o in (long, changed): torch.testing.assert_close(o[:,:keep], short, rtol=0, atol=1e-10)
    assert check_causality(model, text, cuts=3, draws=1, tol=1e-10, keys=context)

def test_the_ordinary_kind_leaks():
    model,text = new_model(causal=True),tokens_of(2, 64)
    other = torch.cat([text[:,:40], tokens_of(2, 24, seed=1)], 1)
    assert (model(text)-model(other))[:,:40].abs().max() > 1e-3
    assert check_causality(model, text).error > 1e-3

def test_memory_context_and_local_heads_matter():
    text,context = tokens_of(2, 64),draw(2, 5, 12, seed=3)
    plain = new_model()
    assert not torch.allclose(plain(text), plain(text, keys=context))
    remembering = new_model(memory=2)
    before = remembering(text)
    for o in remembering.modules():
        if getattr(o, 'mem_kv', None) is not None: o.mem_kv.data += 1
    assert not torch.allclose(before, remembering(text))
    local = new_model(local=1)
    before = local(text)
    for o in local.modules():
        if hasattr(o, 'n_local_attn_heads'): o.n_local_attn_heads = 0
    assert not torch.allclose(before, local(text))

def in_segments(model, text, lengths, mask=None, **args):
    "Logits of a text that is read segment by segment"
    state,outs = model.init_state(len(text)),[]
    for i,part in enumerate(text.split(lengths, 1)):
        here = {} if mask is None else dict(input_mask=mask.split(lengths, 1)[i])
        out,state = model(part, state=state, **here, **args)
        outs.append(out)
    return torch.cat(outs, 1),state

segments = list(product(([1]*20+[70], [7]*12+[6], [64,26], [1]*3+[80]+[1]*7), (False, True),
                        (dict(), dict(local=1, memory=2), dict(use_full_attn=True), dict(n_buckets=(2,4), lsh_allow_duplicate_attention=False),
                         dict(twin_attention=True), dict(backend='reference', memory=1))))

@pytest.mark.parametrize('lengths,grad,options', grids.sample(segments, 16))
def test_segments_equal_the_whole(lengths, grad, options):
    model,text = new_model(**options),tokens_of(2, 90)
    real = torch.ones(2, 90, dtype=torch.bool)
    real[1,:17] = real[1,50:55] = False   # nothing, then gaps
    context = draw(2, 5, 12, seed=3)
    with torch.set_grad_enabled(grad):
        for mask in (None, real):
            got,state = in_segments(model, text, lengths, mask, keys=context)
            want = model(text, mask, keys=context)
            if mask is not None: got,want = got[real],want[real]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            assert state.count.tolist()==([90,90] if mask is None else [90,68])

def test_a_long_text_in_segments():
    torch.manual_seed(0)
    model = Reformer(8, 1, heads=1, bucket_size=16, n_hashes=2, causal='strict', n_buckets=32, max_seq_len=16_384).double().eval()
    x = draw(1, 16_384, 8)
    with torch.no_grad():
        want = model(x)
        for length in (1000, 2048):
            state,outs = model.init_state(1),[]
            for part in x.split(length, 1):
                out,state = model(part, state=state)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-10)

def test_a_state_with_gradients_is_left_as_it_was_and_branches():
    model,text = new_model(local=1),tokens_of(2, 60)
    _,state = in_segments(model, text[:,:40], [40])
    before = [o.clone() for o in state.tensors()]
    first,_ = model(text[:,40:], state=state)
    assert all(torch.equal(a, b) for a,b in zip(before, state.tensors()))
    with torch.no_grad():
        branch = state.clone()
        model(text[:,:20], state=branch)
        assert all(torch.equal(a, b) for a,b in zip(before, state.tensors()))
        torch.testing.assert_close(model(text[:,40:], state=state)[0], first, rtol=0, atol=1e-12)

def test_a_failed_call_leaves_no_half_written_state():
    model,text = new_model(local=1),tokens_of(2, 60)
    def fail(*_): raise MemoryError('no more')
    with torch.no_grad():
        _,state = model(text[:,:20], state=model.init_state(2))
        spare = state.clone()
        handle = model.reformer.layers.blocks[-1][0].fn.toqk.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError): model(text[:,20:], state=state)
        handle.remove()
        with pytest.raises(ValueError, match=r'only some of the layers remember its segment; go on with a clone\(\) made before'): model(text[:,20:], state=state)
        torch.testing.assert_close(model(text[:,20:], state=spare)[0], model(text)[:,20:], rtol=0, atol=1e-10)

def test_no_copy_of_the_rings_for_a_token():
    model,text = new_model(),tokens_of(1, 30)
    with torch.no_grad():
        _,state = in_segments(model, text, [30])
        where = {i: o['ring_keys'].data_ptr() for i,o in state.layers[0].items()}
        _,state = model(text[:,:1], state=state)
    assert where=={i: o['ring_keys'].data_ptr() for i,o in state.layers[0].items()}

def test_gradients_of_a_second_segment():
    "In training, the reversible stack and the plain one agree, also on what memory and local heads get"
    text,found = tokens_of(2, 50),[]
    for reverse_thres in (0, 99):
        model = new_model(local=1, memory=2, reverse_thres=reverse_thres, lsh_dropout=.1).train()
        torch.manual_seed(1)
        _,state = model.loss(text[:,:30], state=model.init_state(2))
        loss,_ = model.loss(text[:,29:], state=state)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(o.abs().max()>0 for o in found[-1])
    for a,b in zip(*found): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_single_heads():
    layer = LSHAttention(bucket_size=4, n_hashes=2, causal='strict', n_buckets=6, return_attn=True).eval()
    x,y = draw(6, 37, 8, seed=1),draw(6, 37, 8, seed=2)
    out,attn,_ = layer(x, y)
    torch.testing.assert_close(out, attn@y, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[:,:20], y[:,:20])[0], out[:,:20], rtol=0, atol=1e-12)

def test_recorded_in_one_piece_only():
    recorder,text = Recorder(new_model()),tokens_of(1, 20)
    with torch.no_grad(): recorder(text)
    attn = recorder.recordings[0][0]['attn']
    torch.testing.assert_close(attn.sum(-1), torch.ones_like(attn[...,0]))
    assert not attn.triu(1).any()
    with pytest.raises(ValueError, match='use_cache=False'): recorder.generate(text, 3)
    recorder.generate(text, 3, use_cache=False)
    recorder.turn_off()
    recorder.generate(text, 3)

def test_a_strictly_causal_decoder():
    torch.manual_seed(0)
    model = ReformerEncDec(12, enc_num_tokens=29, enc_depth=1, enc_max_seq_len=32, enc_heads=2, enc_dim_head=6, enc_bucket_size=4, cross_attention=True,
                           dec_num_tokens=29, dec_depth=1, dec_max_seq_len=32, dec_heads=2, dec_dim_head=6, dec_bucket_size=4, dec_causal='strict').double().eval()
    seen,start = tokens_of(2, 16),tokens_of(2, 3, seed=1)
    found = model.generate(seen, start, 9, temperature=0)   # cached
    text = start
    with torch.no_grad():
        for _ in range(9): text = torch.cat([text, model(seen, text)[:,-1:].argmax(-1)], 1)
    assert torch.equal(found, text[:,3:])

def test_bad_states():
    model,text = new_model(),tokens_of(2, 20)
    with pytest.raises(ValueError, match="a state needs causal='strict'"): new_model(causal=True).init_state(2)
    with pytest.raises(ValueError, match='the segment has 2 rows, the state 1'): model(text, state=model.init_state(1))
    with pytest.raises(ValueError, match='96 tokens|97 tokens'):
        _,state = in_segments(model, tokens_of(2, 90), [90])
        model(tokens_of(2, 7), state=state)
    with pytest.raises(ValueError, match='input_attn_mask and a state exclude each other'):
        model(text, state=model.init_state(2), input_attn_mask=torch.ones(2, 20, 20, dtype=torch.bool))
    with torch.no_grad(), pytest.raises(ValueError, match='keys and context_mask are other tensors than with earlier segments'):
        _,state = model(text, state=model.init_state(2), keys=draw(2, 5, 12))
        model(text, state=state, keys=draw(2, 5, 12))

def test_a_call_that_is_refused_leaves_its_state_usable():
    model = ReformerLM(16, 16, 2, 64, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal='strict').eval()
    state,tokens = model.init_state(1),torch.arange(10)[None]
    with torch.no_grad():
        with pytest.raises(ValueError, match='input_attn_mask'): model(tokens, state=state, input_attn_mask=torch.ones(1, 10, 10, dtype=torch.bool))
        got,_ = model(tokens, state=state)
        torch.testing.assert_close(got, model(tokens))

@pytest.mark.parametrize('options', (dict(), dict(local=1, memory=2), dict(use_full_attn=True), dict(twin_attention=True)))
@pytest.mark.parametrize('grad', (False, True))
def test_a_state_begun_in_inference_mode_goes_on_outside(options, grad):
    "And back again: whatever mode a segment is read in"
    model,text = new_model(**options),tokens_of(2, 60)
    modes,outs = (torch.inference_mode, partial(torch.set_grad_enabled, grad), torch.inference_mode, partial(torch.set_grad_enabled, grad)),[]
    with torch.inference_mode(): state = model.init_state(2)
    for mode,part in zip(modes, text.split(15, 1)):
        with mode():
            out,state = model(part, state=state)
            outs.append(out)
    torch.testing.assert_close(torch.cat([o.clone() for o in outs], 1), model(text), rtol=0, atol=1e-10)
    if grad: outs[-1].sum().backward()

def test_a_context_that_was_read_in_inference_mode():
    model,text,context = new_model(cross_attention=True),tokens_of(2, 30),draw(2, 5, 12)
    with torch.inference_mode(): first,state = model(text[:,:15], state=model.init_state(2), keys=context)
    with torch.no_grad(): second,state = model(text[:,15:], state=state, keys=context)
    torch.testing.assert_close(torch.cat([first.clone(), second], 1), model(text, keys=context), rtol=0, atol=1e-10)

def test_a_key_eps_with_a_state():
    torch.manual_seed(0)
    model = ReformerLM(20, 32, 2, 64, heads=2, dim_head=16, causal=True, use_full_attn=True, key_eps=1.).eval()
    tokens = torch.randint(20, (2, 20))
    with torch.no_grad(): torch.testing.assert_close(model(tokens, state=model.init_state(2))[0], model(tokens), rtol=0, atol=1e-5)

@pytest.mark.parametrize('modes', list(product((False, True), repeat=2)))
@pytest.mark.parametrize('options', (dict(), dict(cross_attention=True)))
def test_a_context_is_not_forgotten_between_gradient_modes(modes, options):
    "A segment that omits it, brings it late, or changes its length is refused; without gradients, also other contents"
    model,text,context,mask = new_model(**options),tokens_of(2, 30),draw(2, 5, 12),torch.arange(5)<torch.tensor([[5],[3]])
    given,refused = dict(keys=context, context_mask=mask),pytest.raises(ValueError, match=r'have shapes .*, but \[\(2, 5, 12\), \(2, 5\)\] with earlier segments')
    with torch.set_grad_enabled(modes[0]): first,state = model(text[:,:15], state=model.init_state(2), **given)
    with torch.set_grad_enabled(modes[1]):
        for wrong in (dict(), dict(keys=context), dict(keys=context[:,:4], context_mask=mask[:,:4])):
            with refused: model(text[:,15:], state=state, **wrong)
        spare = state.clone()
        second,_ = model(text[:,15:], state=state, **given)
        torch.testing.assert_close(torch.cat([first, second], 1), model(text, **given), rtol=0, atol=1e-10)
        model(text[:,15:], state=spare.clone(), **(given if modes==(False, False) else dict(keys=context.clone(), context_mask=mask)))
        if modes==(False, False):
            with pytest.raises(ValueError, match='are other tensors than with earlier segments'):
                model(text[:,15:], state=spare, keys=context.clone(), context_mask=mask)

@pytest.mark.parametrize('modes', list(product((False, True), repeat=2)))
def test_a_context_comes_with_the_first_segment_or_never(modes):
    model,text = new_model(),tokens_of(2, 30)
    with torch.set_grad_enabled(modes[0]): _,state = model(text[:,:15], state=model.init_state(2))
    with torch.set_grad_enabled(modes[1]), pytest.raises(ValueError, match=r'but \[None, None\] with earlier segments'): model(text[:,15:], state=state, keys=draw(2, 5, 12))

def test_with_gradients_a_state_takes_a_context_computed_anew():
    model,text = new_model(),tokens_of(2, 30)
    start = model.init_state(2)
    for i in range(2):   # and the start remembers none
        context = draw(2, 5+i, 12).requires_grad_()
        _,state = model(text[:,:15], state=start, keys=2*context)
        out,_ = model(text[:,15:], state=state, keys=2*context)
        out.sum().backward()
        assert context.grad.abs().max()>0

@pytest.mark.parametrize('options', (dict(), dict(absolute_position_emb=True), dict(axial_position_emb=True), dict(use_full_attn=True)))
def test_the_longest_text_is_that_of_one_row(options):
    "Rows of different lengths each go on up to max_seq_len; places of padding need no position"
    model = ReformerLM(20, 16, 1, 16, heads=2, dim_head=8, bucket_size=4, causal='strict', **options).double().eval()
    text,state,outs = tokens_of(2, 16)%20,model.init_state(2),[]
    with torch.no_grad():
        for first,second in ((8,8), (0,8), (4,0), (4,0)):   # tokens of each row
            rows = [F.pad(o[k:k+here], (0,8-here)) for o,k,here in zip(text, state.count.tolist(), (first, second))]
            real = torch.arange(8)<torch.tensor([[first],[second]])
            out,state = model(torch.stack(rows), real, state=state)
            outs.append([o[x] for o,x in zip(out, real)])
        for i,o in enumerate(model(text)): torch.testing.assert_close(torch.cat([part[i] for part in outs]), o, rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match='a row has 17 tokens, more than max_seq_len=16'): model(text[:,:1], state=state)

@pytest.mark.parametrize('options', (dict(), dict(absolute_position_emb=True), dict(axial_position_emb=True), dict(use_full_attn=True)))
def test_a_segment_may_have_more_places_than_positions(options):
    "Half of them are padding"
    model,text,real = ReformerLM(20, 16, 1, 16, heads=2, dim_head=8, bucket_size=4, causal='strict', **options).double().eval(),tokens_of(2, 10)%20,torch.arange(20)%2==0
    with torch.no_grad():
        out,state = model(text.repeat_interleave(2, 1), real.expand(2, -1), state=model.init_state(2))
        torch.testing.assert_close(out[:,real], model(text), rtol=0, atol=1e-10)
        x = draw(2, 10, 16, dtype=torch.double)
        stack = model.reformer
        again,_ = stack(x.repeat_interleave(2, 1), real.expand(2, -1), state=stack.init_state(2))
        torch.testing.assert_close(again[:,real], stack(x), rtol=0, atol=1e-10)
    assert state.count.tolist()==[10, 10]

def test_a_stack_refuses_a_text_that_is_too_long_in_segments():
    model,x = Reformer(8, 1, heads=1, bucket_size=4, n_hashes=2, causal='strict', max_seq_len=16).eval(),draw(1, 20, 8, dtype=torch.float)
    with torch.no_grad():
        _,state = model(x[:,:10], state=model.init_state(1))
        with pytest.raises(ValueError, match='a row has 17 tokens, more than max_seq_len=16'): model(x[:,10:17], state=state)
        model(x[:,10:17], torch.arange(7)[None]<6, state=state)
