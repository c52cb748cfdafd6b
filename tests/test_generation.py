"TrainingWrapper and its filters, beside reformer_pytorch where it is installed"
import pytest, torch
from reformer_nb.generation import sample
from reformer_nb.training_wrapper import TrainingWrapper, top_k, top_p
from reformer_nb.language_model import ReformerLM
from reformer_nb.recorder import Recorder

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def new_model(**options):
    torch.manual_seed(0)
    return ReformerLM(61, 24, 2, 40, **{**dict(heads=2, dim_head=8, bucket_size=4, n_hashes=2, causal=True), **options}).double().eval()

tokens = torch.randint(61, (3, 23), generator=seeded())
texts = [o[:k] for o,k in zip(tokens, (23, 9, 2))]

@pytest.mark.parametrize('thres', (0., .3, .5, .9, .99))
def test_filters_beside_reformer_pytorch(thres):
    from reformer_pytorch import generative_tools as theirs
    logits = torch.randn(5, 300, generator=seeded())
    assert torch.equal(top_k(logits, thres), theirs.top_k(logits.clone(), thres=thres))
    assert torch.equal(top_p(logits, thres), theirs.top_p(logits.clone(), thres=thres))

@pytest.mark.parametrize('options', (dict(), dict(use_full_attn=True), dict(fixed_position_emb=True)))
@pytest.mark.parametrize('ignore', (-100, 0))
def test_loss_of_a_list(options, ignore):
    "The mean over the counted tokens of the texts, each alone; gradients too"
    model = new_model(**options)
    def alone(o):
        costs = torch.nn.functional.cross_entropy(model(o[None,:-1])[0], o[1:], reduction='none')
        return costs[o[1:]!=ignore]
    costs = torch.cat([alone(o) for o in texts])
    loss = TrainingWrapper(model, ignore_index=ignore)(texts, return_loss=True)
    torch.testing.assert_close(loss, costs.mean(), rtol=0, atol=1e-10)
    pairs = [torch.autograd.grad(o, model.parameters(), allow_unused=True) for o in (loss, costs.mean())]
    for a,b in zip(*pairs):
        if b is not None: torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

@pytest.mark.parametrize('pad', (0, 60))
def test_padded_tensor_equals_list(pad):
    mask = torch.arange(23)<torch.tensor([[23], [9], [2]])
    wrapper = TrainingWrapper(new_model(), pad_value=pad)
    padded = tokens.masked_fill(~mask, pad)
    torch.testing.assert_close(wrapper(padded, return_loss=True, input_mask=mask), wrapper(texts, return_loss=True), rtol=0, atol=0)
    assert torch.equal(wrapper.generate(padded, 5, temperature=0, input_mask=mask), wrapper.generate(texts, 5, temperature=0))

@pytest.mark.parametrize('depth', (1, 2))
@pytest.mark.parametrize('ignore', (-100, 7))
@pytest.mark.parametrize('mask', (None, torch.arange(23)<torch.tensor([[23], [9], [2]]), torch.arange(23)>=torch.tensor([[0], [14], [21]])), ids=('none', 'behind', 'in front'))
def test_loss_where_padding_counts(depth, ignore, mask):
    "The wrapper's loss is that of its own logits, whose last token has a place too, and that of the model"
    model = ReformerLM(61, 24, depth, 40, heads=2, dim_head=8, bucket_size=4, n_hashes=2, causal=True, count_padding=True).double().eval()
    wrapper = TrainingWrapper(model, ignore_index=ignore)
    targets = tokens[:,1:] if mask is None else tokens[:,1:].masked_fill(~(mask[:,1:] & mask[:,:-1]), -100)
    assert (targets==7).any()
    logits = wrapper(tokens, input_mask=mask)[:,:-1].flatten(0, 1)
    found,want = wrapper(tokens, True, input_mask=mask),torch.nn.functional.cross_entropy(logits, targets.masked_fill(targets==ignore, -100).flatten())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    if ignore==-100: assert torch.equal(found, model.loss(tokens, mask))
    for a,b in zip(*(torch.autograd.grad(o, model.parameters()) for o in (found, want))): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_context_and_attention_mask_reach_the_model():
    model,context = new_model(),torch.randn(3, 5, 24, dtype=torch.float64, generator=seeded())
    wrapper,seen = TrainingWrapper(model),torch.arange(5)<3
    args = dict(keys=context, context_mask=seen.expand(3, -1))
    torch.testing.assert_close(wrapper(tokens, return_loss=True, **args), model.loss(tokens, **args), rtol=0, atol=0)
    assert not torch.equal(wrapper(tokens, **args), wrapper(tokens))
    allowed = torch.rand(3, 23, 23, generator=seeded())<.7
    torch.testing.assert_close(wrapper(tokens, return_loss=True, input_attn_mask=allowed), model.loss(tokens, input_attn_mask=allowed), rtol=0, atol=0)
    assert torch.equal(wrapper.generate(tokens, 4, temperature=0, **args), model.generate(tokens, 4, temperature=0, **args))

def test_rows_end_by_themselves():
    wrapper = TrainingWrapper(new_model(), pad_value=7)
    free = wrapper.generate(texts, 8, temperature=0)
    for eos in free.unique().tolist():
        want = [(o[:o.index(eos)+1] if eos in o else o) for o in free.tolist()]
        length = max(map(len, want))
        assert wrapper.generate(texts, 8, eos_token=eos, temperature=0).tolist()==[o + [7]*(length-len(o)) for o in want]

def test_wraps_a_recorder():
    recorder = Recorder(new_model())
    TrainingWrapper(recorder)(tokens)
    assert len(recorder.recordings[0])==2

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize('temperature', (1e-30, 1e-40, 1e-50, 1e-310))
def test_a_tiny_temperature_takes_the_likeliest(dtype, temperature):
    "Among equals it draws, as any temperature above 0 does; 1/T may be no float"
    logits = torch.randn(5, 61, generator=seeded()).to(dtype)
    assert torch.equal(sample(logits, temperature=temperature), logits.argmax(-1))
    equals = torch.tensor([[0., 3., 1., 3.]]).to(dtype).expand(64, -1)
    assert sample(equals, temperature=temperature, generator=seeded()).unique().tolist()==[1, 3]
    assert sample(equals, temperature=temperature, top_k=1, top_p=.3).unique().tolist()==[1]

def test_a_tiny_temperature_is_greedy_in_generate():
    model = new_model().float()
    assert torch.equal(model.generate(tokens, 4, temperature=1e-50), model.generate(tokens, 4, temperature=0))
