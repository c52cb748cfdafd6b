"Heads and their losses: padding, masking, labels, saving, gradients of the reversible trunk"
import copy
import pytest
import torch
from reformer_nb.checkpoints import load_pretrained
from reformer_nb.language_model import ReformerLM
from reformer_nb.series import SeriesRegressor
from reformer_nb.tasks import MaskedLM, SequenceClassifier, SpanFinder, TokenTagger, choose_places, mask_tokens, masked_mean

v,n = 20,21
trunk = dict(dim=16, depth=2, heads=2, dim_head=8, bucket_size=4, n_hashes=2)
on_tokens = dict(num_tokens=v, max_seq_len=64, **trunk)

def new(kind, **options):
    torch.manual_seed(0)
    made = dict(mlm=lambda: MaskedLM(1, (0, 2), .3, **on_tokens, **options), classes=lambda: SequenceClassifier(3, **on_tokens, **options),
                tags=lambda: TokenTagger(3, **on_tokens, **options), numbers=lambda: SeriesRegressor(4, 2, **trunk, **options),
                number=lambda: SeriesRegressor(4, 2, pooled=True, **trunk, **options))
    return made[kind]().double()

def seeded(seed): return torch.Generator().manual_seed(seed)
def tokens(b=2, n=n, seed=0): return torch.randint(3, v, (b, n), generator=seeded(seed))
def data(kind, n=n):
    if kind.startswith('number'): return torch.randn(2, n, 4, generator=seeded(0), dtype=torch.float64)
    return tokens(n=n)
def targets(kind):
    if kind=='number': return torch.randn(2, 2, generator=seeded(1), dtype=torch.float64)
    if kind=='numbers': return torch.randn(2, n, 2, generator=seeded(1), dtype=torch.float64)
    return torch.randint(3, (2, n) if kind=='tags' else (2,), generator=seeded(1))

def loss(model, kind, x, mask=None, y=None):
    if kind=='mlm': return model.loss(x, mask, generator=seeded(2))
    return model.loss(x, targets(kind) if y is None else y, mask)

kinds = ('mlm', 'classes', 'tags', 'numbers', 'number')

# ---- padding -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('more', (3, 30))
def test_padding_changes_no_output(kind, more):
    model,x = new(kind).eval(),data(kind)
    alone = model(x)
    for fill in ((0, 99) if not x.is_floating_point() else (0., torch.nan)):
        padded = torch.cat([x, x.new_full((2, more, *x.shape[2:]), fill)], 1)
        found = model(padded, torch.arange(n+more).expand(2, -1) < n)
        torch.testing.assert_close(found if found.ndim==2 else found[:,:n], alone, rtol=0, atol=1e-10)

@pytest.mark.parametrize('kind', ('classes', 'tags', 'numbers', 'number'))
def test_padding_changes_no_loss_and_gets_no_gradient(kind):
    model,x,y = new(kind).eval(),data(kind),targets(kind)
    want = loss(model, kind, x)
    padded = torch.cat([x, x.new_full((2, 9, *x.shape[2:]), 0)], 1)
    if kind in ('tags', 'numbers'): y = torch.cat([y, y.new_full((2, 9, *y.shape[2:]), 12345)], 1)
    mask = (torch.arange(n+9)<n).expand(2, -1)
    torch.testing.assert_close(loss(model, kind, padded, mask, y), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss(model, kind, padded, mask.long(), y), want, rtol=0, atol=1e-10)
    if padded.is_floating_point():
        grad, = torch.autograd.grad(loss(model, kind, padded.requires_grad_(), mask, y), padded)
        assert grad[:,:n].abs().amax(-1).min()>0 and not grad[:,n:].any()

def test_mean_over_nothing_is_zero():
    x = torch.randn(2, 5, 3).masked_fill(torch.tensor([[[True]], [[False]]]), torch.nan)
    found = masked_mean(x, torch.tensor([[False]*5, [True]*5]))
    assert not found[0].any()
    torch.testing.assert_close(found[1], x[1].mean(0))
    assert torch.equal(masked_mean(x[:,:0]), torch.zeros(2, 3))

@pytest.mark.parametrize('kind', ('classes', 'number'))
def test_a_text_of_no_tokens_is_one_of_padding_alone(kind):
    model,x = new(kind).eval(),data(kind)
    want = model(x, torch.zeros(2, n, dtype=torch.bool))
    assert want.isfinite().all() and torch.equal(model(x[:,:0]), want)
    assert torch.equal(model(x[:,:0], torch.zeros(2, 0, dtype=torch.bool)), want)
    if kind=='classes': assert loss(model, kind, x[:,:0]).isfinite()
    else:
        for mask in (None, torch.zeros(2, 0, dtype=torch.bool)):
            with pytest.raises(ValueError, match='holds no position'): loss(model, kind, x[:,:0], mask)

def test_a_series_without_measurements_has_no_error():
    "Whatever its target is, and however many such series there are"
    model,x,y,real = new('number').eval(),data('number'),targets('number'),torch.ones(2, n, dtype=torch.bool)
    want = model.loss(x, y, real)
    more,none = torch.cat([x, x[:1]]),torch.cat([real, ~real[:1]])
    torch.testing.assert_close(model.loss(more, torch.cat([y, y[:1]*torch.nan]), none), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match='holds no position where input_mask is True'): model.loss(x, y, ~real)

# ---- masking -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rate', (0., .15, .9))
def test_masking_leaves_the_rest_alone(rate):
    text = torch.randint(v, (50, 40), generator=seeded(0))
    real = torch.rand(50, 40, generator=seeded(1))<.7
    masked,chosen = mask_tokens(text, v, 1, real=real, special_tokens=(0, 2), rate=rate, generator=seeded(2))
    free = real & (text>2)
    assert torch.equal(masked[~chosen], text[~chosen]) and not (chosen & ~free).any()
    assert torch.equal(chosen.any(-1), free.any(-1))
    assert set(masked[chosen].tolist()) <= {1, *range(3, v)}
    if rate: assert abs((chosen.sum()/free.sum()).item() - rate) < .06

def test_one_free_token_is_always_chosen():
    free = torch.zeros(9, 8, dtype=torch.bool)
    free[range(9),[0,1,2,3,4,5,6,7,0]] = True
    assert torch.equal(choose_places(free, 0.), free)

def test_masking_repeats_with_its_generator_and_leaves_the_global_one():
    before = torch.get_rng_state()
    a,b,c = (mask_tokens(tokens(8, 30), v, 1, generator=seeded(o))[0] for o in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)

def test_the_loss_of_hidden_tokens_is_that_of_the_full_logits():
    for options in ({}, dict(weight_tie_embedding=True), dict(emb_dim=8)):
        model,text = new('mlm', **options).eval(),tokens()
        masked,chosen = mask_tokens(text, v, 1, special_tokens=(0, 2), rate=.3, generator=seeded(2))
        want = torch.nn.functional.cross_entropy(model(masked)[chosen], text[chosen])
        torch.testing.assert_close(loss(model, 'mlm', text), want, rtol=0, atol=1e-12)

def test_hidden_tokens_cannot_be_seen():
    "Two texts that differ only where both show the mask have the same logits"
    model,text = new('mlm').eval(),tokens()
    masked,chosen = mask_tokens(text, v, 1, rate=.5, generator=seeded(3))
    hidden = chosen & (masked==1)
    other = torch.where(hidden, (text-2)%(v-3)+3, text)
    again,_ = mask_tokens(other, v, 1, rate=.5, generator=seeded(3))
    assert (other!=text).any() and torch.equal(again[hidden], masked[hidden])
    torch.testing.assert_close(model(torch.where(hidden, again, masked)), model(masked), rtol=0, atol=0)

# ---- training ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', kinds)
def test_reversible_gradients_equal_plain_ones(kind):
    model = new(kind).train()
    plain = copy.deepcopy(model)
    for o in plain.modules():
        if hasattr(o, 'reverse_thres'): o.reverse_thres = 10**9
    found,want = (torch.autograd.grad(loss(o, kind, data(kind)), list(o.parameters())) for o in (model, plain))
    for a,b in zip(found, want): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_an_unlabelled_token_costs_nothing():
    model,text,labels = new('tags').eval(),tokens(),targets('tags')
    some = torch.rand(2, n, generator=seeded(4))<.5
    want = torch.nn.functional.cross_entropy(model(text)[some], labels[some])
    torch.testing.assert_close(model.loss(text, labels.masked_fill(~some, -100)), want, rtol=0, atol=1e-12)

# ---- weights -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', kinds)
def test_saved_and_read_back(kind, tmp_path):
    model = new(kind, ff_activation=torch.nn.ReLU).eval()
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert type(again) is type(model) and dict(again.config)==dict(model.config)
        assert torch.equal(again(data(kind)), model(data(kind)))

@pytest.mark.parametrize('options', ({}, dict(emb_dim=8), dict(weight_tie_embedding=True), dict(causal=True, axial_position_emb=True, axial_position_shape=(8, 8))))
def test_on_the_weights_of_a_language_model(options):
    torch.manual_seed(0)
    lm = ReformerLM(**on_tokens, **options).double().eval()
    seen = []
    hook = lm.norm.register_forward_hook(lambda net, args, out: seen.append(out))
    lm(tokens())
    hook.remove()
    for cls in (SequenceClassifier, TokenTagger):
        model = cls.from_language_model(lm, 3).eval()
        torch.testing.assert_close(model.net(tokens()), seen[0], rtol=0, atol=1e-12)
        with torch.no_grad(): model.net.token_emb.weight.add_(1)
        assert lm.token_emb.weight.mean()<.5   # a copy

# ---- numbers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pooled', (False, True))
def test_gradients_of_a_series_whose_padding_is_nan(pooled):
    "Where nothing was measured there is no target either"
    kind = 'number' if pooled else 'numbers'
    real = (torch.arange(n)<torch.tensor([[n],[n-8]]))
    grads = []
    for fill in (0., torch.nan, torch.inf):
        model,y = new(kind),targets(kind)
        if not pooled: y = y.masked_fill(~real[...,None], fill)
        model.loss(data(kind).masked_fill(~real[...,None], fill), y, real).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].isfinite().all() and grads[0].any()
    for o in grads[1:]: assert torch.equal(o, grads[0])

# ---- refusals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make,error,says', [
    (lambda: MaskedLM(v, **on_tokens), ValueError, 'token 20 is outside the vocabulary'),
    (lambda: MaskedLM(1, (0, 20), **on_tokens), ValueError, 'token 20 is outside the vocabulary'),
    (lambda: MaskedLM(-1, **on_tokens), ValueError, 'mask_token=-1 must be at least 0'),
    (lambda: MaskedLM(1, mask_rate=15, **on_tokens), ValueError, 'mask_rate=15 must be at least 0 and below 1'),
    (lambda: MaskedLM(1, causal=True, **on_tokens), TypeError, 'causal=True cannot be chosen here'),
    (lambda: SequenceClassifier(1, **on_tokens), ValueError, 'num_classes=1 must be at least 2'),
    (lambda: SequenceClassifier(2, **on_tokens, dept=3), TypeError, "did you mean 'depth'"),
    (lambda: TokenTagger(2, **on_tokens, return_embeddings=True), TypeError, 'return_embeddings=True cannot be chosen here'),
    (lambda: SeriesRegressor(0, 1, **trunk), ValueError, 'channels=0 must be at least 1'),
    (lambda: SeriesRegressor(1, 1, **{**trunk, 'dim': 15}), ValueError, 'dim=15'),
    (lambda: new('numbers')(tokens()), TypeError, 'x is torch.int64, but must hold float numbers'),
    (lambda: new('numbers')(data('numbers')[...,:3]), ValueError, r'it must be \(b, n, 4\)'),
    (lambda: new('number').loss(data('number'), torch.zeros(2, n, 2)), ValueError, r'targets have shape \(2, 21, 2\), the predictions \(2, 2\)'),
    (lambda: new('numbers').loss(data('numbers'), targets('numbers'), torch.zeros(2, n, dtype=torch.bool)), ValueError, r'x \(2, 21, 4\) holds no position where input_mask is True'),
    (lambda: new('numbers').loss(data('numbers')[:,:0], targets('numbers')[:,:0]), ValueError, r'x \(2, 0, 4\) holds no position'),
    (lambda: new('classes').loss(tokens(), torch.tensor([0, 3])), ValueError, 'label 3 is none of the 3 numbers'),
    (lambda: new('classes').loss(tokens(), torch.tensor([[0, 1]])), ValueError, r'labels have shape \(1, 2\), they must be \(2,\)'),
    (lambda: new('tags').loss(tokens(), torch.zeros(2, n)), TypeError, 'labels are torch.float32, not integers'),
    (lambda: new('tags').loss(tokens(), torch.full((2, n), -100)), ValueError, 'hold none that counts'),
    (lambda: new('mlm').loss(torch.zeros(2, 5, dtype=torch.long)), ValueError, 'hold none that may be hidden'),
    (lambda: new('mlm').loss(tokens(), torch.ones(2, n)), TypeError, 'input_mask is torch.float32')])
def test_refusals(make, error, says):
    with pytest.raises(error, match=says): make()

small = dict(num_tokens=20, dim=16, depth=1, max_seq_len=32, heads=2, dim_head=8, bucket_size=4)

def test_answers_stand_among_real_tokens():
    torch.manual_seed(0)
    net,tokens,real = SpanFinder(**small).eval(),torch.randint(20, (2, 8)),torch.arange(8)<torch.tensor([[8],[4]])
    starts,ends = net(tokens, real)
    for o in (starts, ends): assert o[1,4:].amax()<o[1,:4].amin() and o[1].argmax()<4
    assert net.loss(tokens, torch.tensor([1, 2]), torch.tensor([7, 3]), real).isfinite()
    with pytest.raises(ValueError, match=r'starts\[1\]=6 is a place of padding; give the place of a real token'): net.loss(tokens, torch.tensor([1, 6]), torch.tensor([7, 3]), real)
    one = net.loss(tokens[:1], torch.tensor([1]), torch.tensor([7]))
    torch.testing.assert_close(net.loss(tokens, torch.tensor([1, -100]), torch.tensor([7, -100]), torch.ones(2, 8, dtype=torch.bool)), one)

def test_the_first_token_is_a_real_one():
    torch.manual_seed(0)
    net,tokens = SequenceClassifier(3, head='first', **small).eval(),torch.randint(20, (2, 8))
    real = torch.arange(8)>=torch.tensor([[0],[3]])
    bets = net(tokens, real)
    torch.testing.assert_close(bets[1:], net(tokens[1:,3:]))
    assert not torch.allclose(bets[1:], net(tokens[1:]))
    with pytest.raises(ValueError, match='hold no first token'): net(tokens[:,:0])
    lm = ReformerLM(**small)
    assert SequenceClassifier.from_language_model(lm, 3, head='first', head_dropout=.1).config['head_dropout']==.1

def test_arguments_that_would_do_nothing():
    net = MaskedLM(0, **small)
    with pytest.raises(ValueError, match='generator does nothing beside labels'): net.loss(torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long), generator=torch.Generator())
    assert not hasattr(TokenTagger, 'from_huggingface')
    assert SeriesRegressor(1, 1, dim=16, depth=1, heads=2, norm_eps=1e-3).norm.eps==1e-3
    assert ReformerLM(**small, use_scale_norm=True, norm_eps=1e-3).norm.eps==1e-3
