"Layers of windows: what nobody may see is seen by nobody, and options that would do nothing are refused"
import pytest
import torch
from reformer_nb import LocalSelfAttention, Reformer, ReformerLM
from reformer_nb.generation import can_cache
from reformer_nb.planner import attends_fully
from reformer_nb.state import SegmentCall

def layer(**options):
    torch.manual_seed(0)
    return LocalSelfAttention(8, 2, 4, **options).double().eval()

def vectors(n=8): return torch.randn(1, n, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('causal', (False, True))
@pytest.mark.parametrize('count_padding', (False, True))
def test_a_query_that_may_see_nobody_sees_nobody(causal, count_padding):
    net,x,pairs = layer(causal=causal, count_padding=count_padding),vectors(),torch.ones(1, 8, 8, dtype=torch.bool)
    pairs[0,4] = False
    before = net(x, input_attn_mask=pairs)[0,4]
    for j in range(8):
        y = x.clone()
        y[0,j] += 5
        assert torch.equal(net(y, input_attn_mask=pairs)[0,4], before)
    assert not torch.equal(net(x)[0,4], before)

@pytest.mark.parametrize('causal', (False, True))
@pytest.mark.parametrize('count_padding', (False, True))
@pytest.mark.parametrize('content', (7., float('nan'), float('inf')))
def test_padding_of_any_content_is_inert(causal, count_padding, content):
    net,x = layer(causal=causal, count_padding=count_padding),vectors()
    real = torch.arange(8)[None] < 6
    def found():
        out = net(x, input_mask=real)[:,:6]
        return out,*torch.autograd.grad(out.sin().sum(), net.parameters())
    wanted = found()
    x[:,6:] = content
    for got,want in zip(found(), wanted): assert torch.equal(got, want)

@pytest.mark.parametrize('around,exact', (((0,0), True), ((1,0), True), ((1,1), False), ((2,0), False)))
def test_a_circle_of_windows_has_a_cache_only_where_it_is_exact(around, exact):
    def model(count_padding):
        torch.manual_seed(0)
        return ReformerLM(11, 16, 2, 64, heads=2, dim_head=8, causal=True, attn_layers=('local','local'), local_window=4, local_look_around=around,
                          count_padding=count_padding).double().eval()
    tokens = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(0))
    for net,cached in ((model(False), True), (model(True), exact)):
        assert can_cache(net, 20)==cached
        if not cached:
            with pytest.raises(ValueError, match='count_padding=False'): net.init_state(1)
            with pytest.raises(ValueError, match='count_padding=False'): net.generate(tokens, 2, use_cache=True)
            continue
        state,parts = net.init_state(1),[]
        for o in tokens.split(3, dim=1):
            part,state = net(o, state=state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), net(tokens), rtol=0, atol=1e-10)

counting = (dict(use_full_attn=True), dict(attn_layers=('local','local'), local_window=4), dict(attn_layers=('local','lsh'), local_window=4, use_full_attn=True))

@pytest.mark.parametrize('options', counting)
def test_places_that_count_and_a_state_exclude_padding(options):
    "Padding in front or between is refused with a state; text is written without one, as it would be read at once"
    torch.manual_seed(0)
    model = ReformerLM(11, 16, 2, 64, heads=2, dim_head=8, bucket_size=4, causal=True, count_padding=True, **options).double().eval()
    tokens,real = torch.randint(11, (2, 12)),torch.ones(2, 12, dtype=torch.bool)
    real[0,4:7] = False
    refused = pytest.raises(ValueError, match='places, which count with count_padding=True, but a state remembers real tokens alone')
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, torch.ones_like(real), state=model.init_state(2))[0], model(tokens), rtol=0, atol=1e-10)
        state = model.init_state(2)
        with refused: model(tokens, real, state=state)
        with refused: model.reformer(torch.randn(2, 12, 16).double(), real, state=model.reformer.init_state(2))
        torch.testing.assert_close(model(tokens, state=state)[0], model(tokens), rtol=0, atol=1e-10)
    for mask in (real, torch.arange(12)>=torch.tensor([[0], [5]])):
        args = dict(input_mask=mask, temperature=0)
        want = model.generate(tokens, 9, **args, use_cache=False)
        assert torch.equal(model.generate(tokens, 9, **args), want) and torch.equal(torch.stack(list(model.stream(tokens, 9, **args)), 1), want)
        with pytest.raises(ValueError, match='use_cache=True would change the result: with count_padding=True places of padding count'): model.generate(tokens, 9, **args, use_cache=True)

@pytest.mark.parametrize('mask,error,says', ((torch.ones(1, 3), TypeError, 'input_mask is torch.float32'), (torch.zeros(1, 3), TypeError, 'input_mask is torch.float32'),
                                             (torch.zeros(1, 2, dtype=torch.bool), ValueError, 'input_mask has shape'), (torch.ones(1, 2, dtype=torch.bool), ValueError, 'input_mask has shape')))
def test_a_mask_is_checked_before_it_is_taken_for_padding(mask, error, says):
    net = layer(causal=True, count_padding=True)
    past = SegmentCall({0: net.begin_text(1, 0)})
    with pytest.raises(error, match=says): net.with_state(vectors(3), past=past, input_mask=mask)

@pytest.mark.parametrize('options', counting)
def test_rows_may_end_where_places_count(options):
    torch.manual_seed(0)
    model = ReformerLM(11, 16, 2, 64, heads=2, dim_head=8, bucket_size=4, causal=True, count_padding=True, **options).double().eval()
    tokens = torch.randint(11, (4, 12))
    free = model.generate(tokens, 9, temperature=0, use_cache=False)
    for eos in free[:,:5].unique().tolist():
        a,b = (model.generate(tokens, 9, temperature=0, eos_token=eos, pad_token=-1, use_cache=o) for o in (True, False))
        assert torch.equal(a, b)

idle = dict(n_hashes=3, attn_chunks=2, lsh_dropout=.9, lsh_attend_across_buckets=False, lsh_allow_duplicate_attention=False, random_rotations_per_head=True,
            use_full_attn=True, full_attn_thres=7, num_mem_kv=8, one_value_head=True, n_local_attn_heads=1, rehash_each_round=False, drop_for_hash_rate=.5,
            local_pos_emb=False, local_memory=False, n_buckets=4, split_above=4, look_back='round', look_around=(1,1), backend='reference', scale=.5,
            key_eps=.1, hash_seed=3, rotations='fixed')

@pytest.mark.parametrize('name', idle)
def test_options_of_hashing_are_refused_where_nothing_hashes(name):
    with pytest.raises(ValueError, match=f'{name}=.* does nothing beside'): Reformer(16, 1, heads=2, attn_layers=('local',), **{name: idle[name]})

def test_no_local_layer_attends_fully():
    assert not attends_fully(dict(attn_layers=('local',), use_full_attn=True), 10**6) and attends_fully(dict(use_full_attn=True), 10**6)

def test_sizes_are_checked():
    with pytest.raises(ValueError, match="causal='no' is not known; choose one of False, True"): LocalSelfAttention(8, 2, causal='no')
    with pytest.raises(ValueError, match='dim_head=0 must be at least 1'): LocalSelfAttention(8, 2, dim_head=0)
    with pytest.raises(TypeError, match='local_look_around=3 must be two whole numbers'): Reformer(16, 1, heads=2, attn_layers=('local',), local_look_around=3)

def test_no_tokens_at_all():
    x = torch.zeros(2, 0, 8, requires_grad=True)
    out = LocalSelfAttention(8, 2, window=4)(x)
    assert out.shape==x.shape and torch.autograd.grad(out.sum(), x)[0].shape==x.shape
