"Diagnostics: models that are right, models that are wrong on purpose, and recall against a count"
import math
from itertools import product
import peer
from meter import Largest
import pytest, torch
from torch import nn
from reformer_nb.oracle import lsh_attention_oracle
from reformer_nb.diagnostics import check_causality, check_gradients, check_padding
from reformer_nb.recall import attention_recall, listen, rehash, row_recall
from reformer_nb.encoder_decoder import ReformerEncDec
from reformer_nb.hasher import BucketHasher
from reformer_nb.language_model import ReformerLM
from reformer_nb.recorder import Recorder, attention_layers
from reformer_nb.reformer import Reformer
from reformer_nb.reversible_sequence import ReversibleSequence
from reformer_nb.rows import AttentionCall
from reformer_nb.self_attention import LSHSelfAttention
from grids import sample

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def new_model(**options):
    torch.manual_seed(0)
    return ReformerLM(61, 24, 2, 64, **{**dict(heads=2, dim_head=8, bucket_size=4, n_hashes=2, causal=True), **options})

def state(model): return [o.clone() for o in model.state_dict().values()] + [torch.get_rng_state()]
def same(a, b): return len(a)==len(b) and all(torch.equal(o, p) for o,p in zip(a, b))
tokens = torch.randint(61, (2, 24), generator=seeded())
x = torch.randn(2, 24, 24, generator=seeded(1))

options = [dict(zip(('lsh_dropout', 'layer_dropout', 'weight_tie', 'hash_seed', 'use_full_attn', 'n_local_attn_heads', 'ff_chunks'), o))
           for o in product((0., .2), (0., .3), (False, True), (0, None), (False, True), (0, 1), (1, 3))]

@pytest.mark.parametrize('o', sample(options, 6))
@pytest.mark.parametrize('training', (True, False))
def test_our_models_have_right_gradients(o, training):
    model = new_model(**o).train(training)
    before = state(model)
    verdict = check_gradients(model, tokens)
    assert verdict and verdict.error<1e-10, verdict
    assert same(before, state(model)) and all(p.grad is None for p in model.parameters()) and model.training==training

def test_arguments_get_gradients_too():
    model = Reformer(24, 2, heads=2, bucket_size=4, n_hashes=2)
    verdict = check_gradients(model, x, keys=torch.randn(2, 5, 24), input_mask=torch.ones(2, 24, dtype=torch.bool))
    assert verdict and {'argument 0', 'keys'}<=set(verdict.errors), verdict
    torch.manual_seed(0)
    both = ReformerEncDec(24, enc_num_tokens=61, enc_depth=1, enc_max_seq_len=64, enc_bucket_size=4, enc_heads=2,
                          dec_num_tokens=61, dec_depth=1, dec_max_seq_len=64, dec_bucket_size=4, dec_heads=2)
    assert check_gradients(both, tokens, tokens)

class Block(nn.Module):
    def __init__(self, fn=torch.tanh, e=12):
        super().__init__()
        self.lin,self.gain,self.fn = nn.Linear(e, e),nn.Parameter(torch.ones(e)),fn
    def forward(self, x): return self.fn(self.lin(x))*self.gain

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()
    @staticmethod
    def backward(ctx, dy): return dy*ctx.saved_tensors[0].cos()*1.01

def stack(*fns): return ReversibleSequence(nn.ModuleList(nn.ModuleList([Block(), Block(f)]) for f in fns))

@pytest.mark.parametrize('at', range(3))
def test_finds_a_planted_error_and_names_its_block(at):
    torch.manual_seed(0)
    fns = [torch.sin]*3
    assert check_gradients(stack(*fns), x)
    fns[at] = Wrong.apply
    verdict = check_gradients(stack(*fns), x)
    assert not verdict and verdict.where.split(': ')[1].rsplit('.', 1)[0]==f'blocks.{at}.1.lin', verdict
    assert check_gradients(stack(*fns), x, slopes=False)   # both ways are wrong alike

def test_finds_a_weight_that_gets_no_gradient():
    class Detached(Block):
        def forward(self, x): return torch.tanh(self.lin(x))*self.gain.detach()
    verdict = check_gradients(ReversibleSequence(nn.ModuleList([nn.ModuleList([Block(), Detached()])])), x)
    assert not verdict and verdict.where.endswith('blocks.0.1.gain'), verdict

def test_kept_randomness_is_an_exception():
    noise = seeded()
    verdict = check_gradients(stack(lambda o: o*torch.rand(1, generator=noise).item()), x)
    assert not verdict and verdict.error==math.inf and 'G of block 0' in verdict.where

lsh_options = dict(look_back=('none', 'round', 'rounds'), causal=(False, True), n_local_attn_heads=(0, 1), use_full_attn=(False, True), num_mem_kv=(0, 2))

@pytest.mark.parametrize('values', sample(product(*lsh_options.values()), 8))
def test_padding_of_our_models_is_inert(values):
    model = new_model(**dict(zip(lsh_options, values))).train()
    before = state(model)
    verdict = check_padding(model, tokens)
    assert verdict and verdict.error<1e-10, verdict
    assert same(before, state(model)) and model.training

def test_padding_of_a_layer_and_of_vectors():
    assert check_padding(LSHSelfAttention(24, heads=2, bucket_size=4), x)
    assert check_padding(Reformer(24, 1, heads=2, bucket_size=4), x, keys=torch.randn(2, 5, 24))

@pytest.mark.parametrize('b', (2, 24))   # as many rows as positions, too
@pytest.mark.parametrize('options', (dict(), dict(num_mem_kv=2), dict(use_full_attn=True), dict(n_local_attn_heads=1)), ids=str)
def test_padding_of_a_layer_with_arguments_that_belong_to_positions(options, b):
    layer,x = LSHSelfAttention(24, heads=2, bucket_size=4, n_hashes=2, **options),torch.randn(b, 24, 24, generator=seeded(1))
    angles,pairs = torch.randn(b, 24, 6, generator=seeded(2)),torch.rand(b, 24, 24, generator=seeded(3))<.8
    some_keys = torch.cat([pairs, torch.rand(b, 24, layer.config['num_mem_kv'] + 24, generator=seeded(4))<.8], -1)
    context = dict(keys=torch.randn(b, 24, 24, generator=seeded(5)), context_mask=torch.rand(b, 24, generator=seeded(6))<.8)   # of the length of the text
    for o in (dict(pos_emb=angles[0]), dict(pos_emb=angles), dict(input_attn_mask=pairs), dict(input_attn_mask=some_keys, pos_emb=angles, **context)):
        verdict = check_padding(layer, x, **o)
        assert verdict and verdict.error<1e-10, (list(o), verdict)

def test_padding_refuses_what_it_cannot_cut():
    class Adds(nn.Module):
        def forward(self, x, input_mask=None, extra=0.): return x + extra
    extra = torch.randn(24, 24)
    with pytest.raises(ValueError, match=r"extra \(24, 24\) has an axis of 24, as long as x, .* lambda x, input_mask=None: model\(x, input_mask=input_mask, extra=extra\[:x.shape\[1\]\]\)"):
        check_padding(Adds(), x, extra=extra)
    assert check_padding(lambda x, input_mask=None: Adds()(x, input_mask=input_mask, extra=extra[:x.shape[1]]), x)
    row = torch.randn(1, 24, 24)
    with pytest.raises(ValueError, match=r'extra=extra\[:, :x.shape\[1\]\]'): check_padding(Adds(), x[:1], extra=row)
    assert check_padding(lambda x, input_mask=None: Adds()(x, input_mask=input_mask, extra=row[:, :x.shape[1]]), x[:1])
    assert check_padding(Adds(), x[...,:7], extra=torch.randn(2, 1, 7)) and check_padding(Adds(), x[...,:7], extra=torch.randn(7)) and check_padding(Adds(), x, extra=torch.tensor(2.))

    two = torch.randn(2, 24, 24)
    with pytest.raises(ValueError, match=r'lambda x, mask=None: model\(x, mask=mask, extra=extra\[:1, :x.shape\[1\]\]\)'): check_padding(Adds(), x, mask_name='mask', extra=two)
    assert check_padding(lambda x, mask=None: Adds()(x, extra=two[:1, :x.shape[1]]), x[:1], mask_name='mask')

def test_a_model_that_draws_cannot_be_checked():
    own = seeded()
    for check in (check_padding, check_causality):
        with pytest.raises(ValueError, match='another output at each call'): check(lambda t, input_mask=None: t + torch.rand(t.shape, generator=own), tokens)
    model = new_model(ff_dropout=.5, use_full_attn=True).double().train()
    def call(t, input_mask=None): return model(t, input_mask=input_mask)
    with pytest.raises(ValueError, match='eval mode'): check_padding(call, tokens)   # a row by itself has other dropout
    assert check_causality(call, tokens)   # which is replayed for inputs of one shape
    model.eval()
    assert check_padding(call, tokens)
    with pytest.raises(ValueError, match='give it a hash_seed'): check_padding(new_model(hash_seed=None), tokens)
    for options in (dict(n_buckets=4), dict(causal='strict')): assert check_padding(new_model(hash_seed=None, **options), tokens)   # as many rotations for each length
    assert check_padding(LSHSelfAttention(24, heads=2, bucket_size=4), torch.where(torch.arange(24)[:,None]<23, x, torch.nan))

def test_padding_that_leaks():
    class Mean(nn.Module):   # sees the whole row, padding included, but not from position 10 on
        def forward(self, x, input_mask=None):
            at = torch.arange(x.shape[1])[:,None]
            return x + torch.where(at<10, 0, x.mean(1, keepdim=True))
    verdict = check_padding(Mean(), x)
    assert not verdict and verdict.position==10

def test_causality():
    assert check_causality(new_model(use_full_attn=True), tokens).error==0
    assert check_causality(new_model(bucket_size=32), tokens)
    verdict = check_causality(new_model(), tokens)
    assert not verdict and verdict.position is not None and verdict.error>1e-3
    model = new_model(use_full_attn=True, ff_dropout=.3).train()
    before = state(model)
    assert check_causality(model, tokens) and check_causality(model.embed, tokens)
    assert same(before, state(model))

@pytest.mark.skipif(bool(peer.missing()), reason=str(peer.missing()))
def test_causality_of_a_foreign_model():
    "reformer_pytorch, where later tokens move the borders of chunks, and where a text is one chunk"
    from reformer_pytorch import ReformerLM as Theirs
    torch.manual_seed(0)
    sizes = dict(num_tokens=61, dim=24, depth=1, max_seq_len=64, heads=2, n_hashes=2, causal=True, absolute_position_emb=True)
    leaky,full = (Theirs(bucket_size=4, use_full_attn=o, **sizes).eval() for o in (False, True))
    text = torch.randint(61, (2, 64), generator=seeded())
    def seen(model): return check_causality(lambda o: (torch.manual_seed(1), model(o))[1], text, tol=1e-5)
    assert seen(leaky).error>1e-3 and seen(leaky).position is not None and seen(full)

@pytest.mark.parametrize('at,reach', ((0, 1), (7, 3), (12, 11)))
def test_first_leak(at, reach):
    "Position `at`, and no other, sees so far ahead"
    def model(x):
        res = x.cumsum(1)
        res[:,at] += x[:,at+reach]
        return res
    verdict = check_causality(model, torch.randn(1, 24, 3, generator=seeded()), cuts=23)
    assert not verdict and verdict.position==at
    assert check_causality(lambda x: x.cumsum(1), torch.randn(1, 24, 3), cuts=23).error==0

def brute_force(call, rows, top_k, batch, head):
    "Recall of single queries by the oracle's dense weights"
    o = {k: v for k,v in call.options.items() if k!='full_attn_thres'}
    def dense(buckets, **more): return lsh_attention_oracle(call.qk, call.qk, buckets, query_len=call.query_len, return_weights=True, **call.masks, **{**o, **more})[1][batch,head]
    shown,full = dense(call.buckets),dense(torch.zeros_like(call.buckets[:,:,:1]), bucket_size=call.qk.shape[2])
    mass,top = [],[]
    for i in rows.tolist():
        p,see = full[i].clone(),shown[i]>0
        if see.sum()==1 and see[i]: see[i] = False   # a lonely query
        p[i] = 0
        if not p.any(): mass.append(math.nan), top.append(math.nan); continue
        best = [j for j in p.argsort(descending=True).tolist()[:top_k] if p[j]>0]
        mass.append(p[see].sum().item())
        top.append(sum(see[j].item() for j in best)/len(best))
    return torch.tensor(mass, dtype=torch.float64),torch.tensor(top, dtype=torch.float64)

@pytest.mark.parametrize('causal', (False, True))
@pytest.mark.parametrize('duplicates', (False, True))
def test_recall_equals_a_count(causal, duplicates):
    qk = torch.randn(2, 2, 40, 8, generator=seeded()).double()
    masks = dict(mask=torch.arange(40)<torch.tensor([[40], [25]]), key_mask=None, attn_mask=None)
    buckets = BucketHasher(2, 4, rotations='fixed').eval()(qk, masks['mask'])
    o = dict(bucket_size=4, causal=causal, scale=1., look_back='none', attend_across_buckets=True, allow_duplicate_attention=duplicates, full_attn_thres=0)
    call,rows = AttentionCall(qk, buckets, 38, masks, o),torch.tensor([0, 3, 17, 30, 37])
    mass,top = row_recall(call, rows, 5)
    for b,h in product(range(2), range(2)):
        for got,want in zip((mass[b,h], top[b,h]), brute_force(call, rows, 5, b, h)):
            real = rows<(40 if b==0 else 25)
            torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-10, equal_nan=True)
            assert got[~real].isnan().all()

def full_weights(model, layer):
    "What a layer would attend to in full, given what it is fed"
    with torch.no_grad(), listen(model.eval()) as heard: model(tokens)
    call = heard[layer].call
    return call._replace(buckets=None).weights(torch.arange(24)) * ~torch.eye(24, dtype=torch.bool)

def test_recall_of_own_buckets_is_that_of_the_recording():
    model = new_model(full_attn_thres=0, causal=False)
    with torch.no_grad(), Recorder(model.eval()) as recorder: model(tokens)
    rows = attention_recall(model.train(), tokens, queries=24, top_k=1)
    assert model.training and all(o.callback is None and 'report' not in vars(o) for o in attention_layers(model).values())
    for entry in recorder.recordings[0]:
        best = full_weights(model, entry['layer']).argmax(-1, keepdim=True)
        for h in range(2):
            row = next(o for o in rows if (o['layer'], o['head'])==(entry['layer'], h))
            assert row['top']==pytest.approx((entry['attn'][:,h].gather(-1, best[:,h])>0).double().mean().item(), abs=1e-9)
    assert [(o['layer'], o['head'], o['n_hashes'], o['bucket_size']) for o in rows]==[(i, h, 2, 4) for i in (0,1) for h in (0,1)]

def test_recall_rises_and_ends_at_one():
    rows = attention_recall(LSHSelfAttention(24, heads=2, bucket_size=4, causal=True), x, n_hashes=(1, 4, 16), bucket_size=(4, 24), queries=24)
    def mean(r, m): return sum(o['mass'] for o in rows if (o['n_hashes'], o['bucket_size'])==(r, m))/2
    assert mean(1, 4)<mean(4, 4)<mean(16, 4) and abs(mean(1, 24)-1)<1e-9
    full = attention_recall(LSHSelfAttention(24, heads=2, bucket_size=4, use_full_attn=True), x)
    assert all(abs(o['mass']-1)<1e-9 and o['top']==1 for o in full)

kinds_of_hash = (dict(), dict(rehash_each_round=False, n_buckets=32), dict(rotations='shared', n_buckets=16, hash_seed=5), dict(n_buckets='power', split_above=4),
                 dict(n_buckets='power', rotations='shared', random_rotations_per_head=True), dict(causal='strict', n_buckets=8), dict(n_buckets=(4, 6), causal=True),
                 dict(causal=True, look_back='rounds', num_mem_kv=3, n_local_attn_heads=1))

@pytest.mark.parametrize('options', kinds_of_hash, ids=str)
@pytest.mark.parametrize('tried', (dict(n_hashes=8), dict(bucket_size=8)), ids=str)
def test_recall_of_other_numbers_is_that_of_a_layer_built_so(options, tried):
    text,real = torch.randn(2, 96, 24, generator=seeded(2)),torch.arange(96)<torch.tensor([[96], [50]])
    def new(**o):
        torch.manual_seed(0)
        return LSHSelfAttention(24, **{**dict(heads=2, bucket_size=4, n_hashes=2, full_attn_thres=0), **options, **o})
    asked = attention_recall(new(), text, input_mask=real, **{k: (o,) for k,o in tried.items()})
    assert asked==attention_recall(new(**tried), text, input_mask=real)!=attention_recall(new(), text, input_mask=real)

@pytest.mark.parametrize('options', (dict(attn_layers=('local', 'lsh')), dict(twin_attention=True), dict(weight_tie=True)), ids=str)
def test_recall_of_other_rounds_hashes_as_the_block_does(options):
    found = attention_recall(new_model(**options, n_hashes=4), tokens)
    asked = attention_recall(new_model(**options), tokens, n_hashes=(4,))
    for o,p in zip(asked, found, strict=True):
        if o['layer']==0: assert o==p   # what later layers are fed follows from the rounds of the first

def test_recall_of_full_attention_hashes_as_the_layer_would():
    "The index that a layer hashes with is its place in the model, whatever layers stand between"
    options = dict(attn_layers=('local', 'lsh'))
    asked = attention_recall(new_model(**options, use_full_attn=True), tokens, n_hashes=(2,))
    found = attention_recall(new_model(**options), tokens)
    assert asked==found

def test_recall_of_a_layer_that_is_called_by_with_state():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn = LSHSelfAttention(24, heads=2, bucket_size=4, n_hashes=2)
        def forward(self, x): return self.attn.with_state(x, layer=3)[0]
    own = Own()
    asked,found = (attention_recall(own, x, n_hashes=(r,)) for r in (4, 2))
    own.attn.hasher.n_hashes = 4
    assert [o['mass'] for o in asked]==[o['mass'] for o in attention_recall(own, x)] and asked!=found

def test_recall_without_a_seed_draws_as_the_layer_does():
    "Rounds that fit a hash without digits: other ones each time, and no split"
    layer = LSHSelfAttention(24, heads=2, bucket_size=4, n_hashes=2, hash_seed=None, full_attn_thres=0)
    a,b = (attention_recall(layer, x, n_hashes=(4,), queries=24) for _ in range(2))
    assert a!=b

def test_one_number_is_no_choice():
    for k in ('n_hashes', 'bucket_size'):
        with pytest.raises(TypeError, match=rf'{k}=4 must be a tuple of numbers to try; pass \(4,\)'): attention_recall(new_model(), tokens, **{k: 4})

def test_recall_takes_linear_memory():
    layer,sizes = LSHSelfAttention(16, heads=2, bucket_size=64, n_hashes=2),[]
    for n in (2048, 4096):
        with Largest() as meter: attention_recall(layer, torch.randn(1, n, 16), queries=16)
        sizes.append(meter.bytes)
    assert sizes[1]<=2.1*sizes[0] and sizes[1]<4*4096**2/4

def test_weight_tie_counts_layers():
    rows = attention_recall(new_model(weight_tie=True), tokens, bucket_size=(4, 8))
    assert sorted({o['layer'] for o in rows})==[0, 1]

@pytest.mark.parametrize('count_padding', (False, True))
def test_recall_leaves_padding_out(count_padding):
    "Neither are padded queries averaged, nor is padding hashed as text, where places count"
    model = LSHSelfAttention(24, heads=2, bucket_size=4, n_buckets=4, causal=True, count_padding=count_padding).eval()
    real = torch.arange(24) < torch.tensor([[24], [7]])
    with torch.no_grad(), listen(model) as heard: model(torch.randn(2, 24, 24, generator=seeded()), input_mask=real)
    mass,_ = row_recall(heard[0].call, torch.arange(24), 3, heard[0].real)
    assert torch.equal(mass[:,:,1:].isnan().any(1), ~real[:,1:])   # the first token of a causal text sees nobody
    again = rehash(heard[0], 2, 5)
    assert (again.buckets[1,:,:,7:]>=again.buckets[1,:,:,:7].amax()).all() and (again.buckets[1,:,:,7:]==again.buckets[1,:,:,7:].amax()).all()
