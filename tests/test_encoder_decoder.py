"An encoder and a decoder: gradients, padding, what the decoder sees, saving, refusals"
import copy, inspect
import pytest
import torch
from reformer_nb.encoder_decoder import ReformerEncDec
from reformer_nb.language_model import ReformerLM

kinds = dict(joined={}, cross=dict(cross_attention=True), cross_full=dict(cross_attention=True, dec_use_full_attn=True),
             local=dict(enc_n_local_attn_heads=1, dec_n_local_attn_heads=1), memory=dict(dec_num_mem_kv=3, enc_num_mem_kv=2))

def new_model(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=40, depth=2, max_seq_len=64, heads=2, dim_head=8, bucket_size=4, n_hashes=2)
    parts = {f'{k}_{name}': o for k in ('enc','dec') for name,o in sizes.items()}
    return ReformerEncDec(dim=16, **{**parts, **options}).double()

def tokens(n, seed, b=2): return torch.randint(1, 40, (b, n), generator=torch.Generator().manual_seed(seed))

def grads(model):
    torch.manual_seed(1)
    loss = model(tokens(21, 0), tokens(13, 1), return_loss=True)
    return loss,*torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

@pytest.mark.parametrize('kind', kinds)
def test_reversible_gradients_equal_plain_ones(kind):
    model = new_model(**kinds[kind])
    plain = copy.deepcopy(model)
    for o in plain.modules():
        if hasattr(o, 'reverse_thres'): o.reverse_thres = 10**9
    for a,b in zip(grads(model), grads(plain)):
        assert (a is None)==(b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

@pytest.mark.parametrize('cross', (False, True))
@pytest.mark.parametrize('depth', (1, 4))
def test_the_encoder_is_differentiated_once(depth, cross):
    model,times = new_model(dec_depth=depth, cross_attention=cross),[]
    model.enc.norm.register_full_backward_hook(lambda *_: times.append(1))
    grads(model)
    assert len(times)==1

@pytest.mark.parametrize('kind', kinds)
def test_padding_changes_nothing(kind):
    model,text,out = new_model(**kinds[kind]).eval(),tokens(17, 2, b=1),tokens(9, 3, b=1)
    alone = model(text, out)
    for fill,more in ((0, 3), (7, 30)):
        padded = torch.cat([torch.cat([text, text.new_full((1, more), fill)], 1), tokens(17+more, 4, b=1)])
        real = torch.arange(17+more) < torch.tensor([[17], [17+more]])
        targets = torch.cat([torch.cat([out, out.new_full((1, 4), fill)], 1), tokens(13, 5, b=1)])
        found = model(padded, targets, enc_input_mask=real, dec_input_mask=torch.arange(13) < torch.tensor([[9], [13]]))
        torch.testing.assert_close(found[:1,:9], alone, rtol=0, atol=1e-10)
    listed = model([text[0], tokens(30, 6, b=1)[0]], [out[0], tokens(12, 7, b=1)[0]])
    torch.testing.assert_close(listed[:1,:9], alone, rtol=0, atol=1e-10)

@pytest.mark.parametrize('kind', kinds)
def test_the_decoder_sees_the_input_and_no_later_token(kind):
    "Each output moves with the input under full cross-attention, and some do otherwise; the mask of the context hides it"
    model,text,out = new_model(**kinds[kind]).eval(),tokens(16, 2),tokens(10, 3)
    other = (text+1).clamp(max=39)
    moved = (model(text, out)-model(other, out)).abs().amax(-1) > 1e-9
    assert moved.all() if kind.startswith('cross') else moved.any()
    last = torch.arange(16)>=8
    half = torch.where(last, text, other)   # differs where nobody may look
    if kind=='cross_full':
        model.enc.forward = lambda tokens, *a, **k: model.enc.token_emb(tokens)   # so that a token tells of itself alone
        torch.testing.assert_close(model(text, out, dec_context_mask=last.expand(2, -1)), model(half, out, dec_context_mask=last.expand(2, -1)), rtol=0, atol=1e-12)
        later = torch.cat([out[:,:6], (out[:,6:]+1).clamp(max=39)], 1)
        torch.testing.assert_close(model(text, out)[:,:6], model(text, later)[:,:6], rtol=0, atol=1e-12)

@pytest.mark.parametrize('cross', (False, True))
def test_generation_reads_once_without_gradients(cross):
    model,times = new_model(cross_attention=cross).train(),[]
    model.enc.register_forward_hook(lambda module, inputs, out: times.append((module.training, out.requires_grad)))
    new = model.generate(tokens(17, 0), tokens(3, 1), 5, temperature=0)
    assert times==[(False, False)] and new.shape==(2,5) and model.training and model.enc.training
    step = model.eval()(tokens(17, 0), tokens(3, 1))[:,-1].argmax(-1)
    assert torch.equal(new[:,0], step)
    assert model.generate(tokens(17, 0, b=1)[0], tokens(3, 1, b=1)[0], 5).shape==(5,)

@pytest.mark.parametrize('kind', kinds)
def test_saved_and_loaded(kind, tmp_path):
    model = new_model(**kinds[kind]).eval()
    model.save_pretrained(tmp_path)
    again = ReformerEncDec.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(17, 0), tokens(9, 1)), model(tokens(17, 0), tokens(9, 1)))

def test_every_argument_of_a_language_model_may_be_prefixed():
    from reformer_nb.encoder_decoder import split_arguments
    names = [o for o in inspect.signature(ReformerLM).parameters if o!='dim']
    enc,dec = split_arguments({f'{k}_{o}': 1 for k in ('enc','dec') for o in names})
    assert set(enc)==set(dec)==set(names)

@pytest.mark.parametrize('options,says', [(dict(depth=2), 'enc_depth=, dec_depth='), (dict(enc_dephth=2), "did you mean 'enc_depth'"), (dict(enc_dim=8), 'pass dim='),
                                          (dict(bogus=1), 'enc_ or dec_ before them')])
def test_unknown_arguments_are_refused(options, says):
    with pytest.raises(TypeError, match=says): new_model(**options)

@pytest.mark.parametrize('options', [dict(enc_return_embeddings=False), dict(dec_causal=False), dict(dec_return_embeddings=True), dict(cross_attention=True, dec_cross_attention=False)])
def test_conflicts_are_refused(options):
    with pytest.raises(ValueError, match='leave it out'): new_model(**options)

def test_a_decoder_that_counts_padding():
    "Its loss is that of its logits, with padding in front too"
    model,x,y = new_model(dec_count_padding=True).eval(),tokens(21, 0),tokens(13, 1)
    for mask in (None, torch.arange(13)>=torch.tensor([[0], [4]])):
        targets = y[:,1:] if mask is None else y[:,1:].masked_fill(~(mask[:,1:] & mask[:,:-1]), -100)
        want = torch.nn.functional.cross_entropy(model(x, y, dec_input_mask=mask)[:,:-1].transpose(1, 2), targets)
        torch.testing.assert_close(model(x, y, True, dec_input_mask=mask), want, rtol=0, atol=1e-12)

@pytest.mark.parametrize('options', [dict(enc_combine='concat'), dict(enc_combine='concat', cross_attention=True),
                                     dict(enc_combine='concat', dec_cross_attention=True, dec_context_dim=16)])
def test_a_context_of_another_width_is_refused(options):
    with pytest.raises(ValueError, match='enc_combine=.concat. .* width 32.* dec_context_dim=32'): new_model(**options)
    model = new_model(**{**options, 'cross_attention': True, 'dec_context_dim': 32})
    assert model(tokens(21, 0), tokens(13, 1)).shape==(2, 13, 40)
    with pytest.raises(ValueError, match='dec_context_dim=16$'): new_model(cross_attention=True, dec_context_dim=20)

def test_inputs_and_outputs_must_be_pairs():
    with pytest.raises(ValueError, match='give an output for each input'): new_model()(tokens(9, 0), tokens(9, 1, b=1))
    with pytest.raises(ValueError, match='leave it out'): new_model()([tokens(9, 0)[0]], [tokens(9, 1)[0]], enc_input_mask=torch.ones(1, 9).bool())
