"Position-wise layers: pieces that are computed again, wrappers, and product keys beside the package that reformer_pytorch uses"
import copy, pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
import pytest, torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from grids import sample
from reformer_nb.feed_forward import Chunk, FeedForward, PreNorm, ReZero, ScaleNorm, in_pieces
from reformer_nb.in_blocks import compute_in_blocks
from reformer_nb.product_keys import ProductKeyMemory, best_pairs
from reformer_nb.reversible_sequence import ReversibleSequence
from reformer_nb.self_attention import LSHSelfAttention

def same(a, b, atol=0.): torch.testing.assert_close(a, b, rtol=0., atol=atol)
def seeded(seed=0): return torch.Generator().manual_seed(seed)
def data(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)

def gradients(run, x, weights, between=None):
    "Output and gradients; the same random numbers each time"
    torch.manual_seed(1)
    out = run(x)
    if between: between()
    return out,*torch.autograd.grad((out*data(*out.shape, seed=2)).sum(), [x, *weights], allow_unused=True)

class Pieces(nn.Module):
    "Pieces without recomputation"
    def __init__(self, chunks, fn): super().__init__(); self.chunks,self.fn = chunks,fn
    def forward(self, x): return in_pieces(self.fn, x, self.chunks)

def layer(glu=False, dropout=0.):
    torch.manual_seed(0)
    return FeedForward(6, 3, dropout, glu=glu).double()

@pytest.mark.parametrize('chunks,glu,dropout,frozen', sample(product((2,3,13,20), (False,True), (0.,.4), (None,'w1','all')), 16))
def test_chunk_gradients(chunks, glu, dropout, frozen):
    fn,x = layer(glu, dropout),data(2, 13, 6).requires_grad_()
    for name,p in fn.named_parameters(): p.requires_grad_(frozen is None or frozen=='w1' and not name.startswith('w1'))
    weights = [p for p in fn.parameters() if p.requires_grad]
    for a,b in zip(gradients(Chunk(chunks, fn), x, weights), gradients(Pieces(chunks, fn), x, weights)): same(a, b, 1e-13)

def test_chunk_mode_changes_before_backward():
    fn,x = layer(dropout=.4),data(2, 13, 6).requires_grad_()
    found = [gradients(cls(3, fn.train()), x, [*fn.parameters()], fn.eval) for cls in (Chunk, Pieces)]
    for a,b in zip(*found): same(a, b, 1e-13)
    assert not fn.training

def test_chunk_keeps_random_stream():
    fn,x = layer(dropout=.4),data(2, 13, 6).requires_grad_()
    states = []
    for cls in (Chunk, Pieces):
        gradients(cls(3, fn), x, [*fn.parameters()])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)

def test_chunk_two_forwards_one_backward():
    fn,x = layer(dropout=.4),data(2, 13, 6).requires_grad_()
    def twice(run): return gradients(lambda x: run(x) + run(2*x), x, [*fn.parameters()])
    found = [twice(Chunk(3, fn)), twice(Pieces(3, fn))]
    for a,b in zip(*found): same(a, b, 1e-13)

def test_chunk_stale_weights():
    fn,x = layer(),data(2, 13, 6).requires_grad_()
    out = Chunk(3, fn)(x)
    with torch.no_grad(): fn.w2.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): out.sum().backward()

def test_chunk_lent_weights():
    fn,x = layer(),data(2, 13, 6).requires_grad_()
    other = {k: (2*p).detach().requires_grad_() for k,p in fn.named_parameters()}
    def call(module, prefix): return lambda x: functional_call(module, {prefix+k: p for k,p in other.items()}, (x,))
    for a,b in zip(gradients(call(Chunk(3, fn), 'fn.'), x, other.values()), gradients(call(fn, ''), x, other.values())): same(a, b, 1e-12)

def test_chunk_parameter_hooks_see_the_sum():
    "A hook that is not linear would show it if it were called for each piece"
    found = []
    for cls in (Chunk, Pieces):
        fn = layer()
        fn.w1.weight.register_hook(lambda g: g**2)
        cls(3, fn)(data(2, 13, 6)).square().sum().backward()
        found.append([p.grad for p in fn.parameters()])
    for a,b in zip(*found): same(a, b, 1e-9)

def test_chunk_second_derivative():
    assert torch.autograd.gradgradcheck(Chunk(3, FeedForward(3, 2).double()), data(1, 4, 3).requires_grad_())

def test_chunk_without_gradients_is_called_plainly():
    calls = []
    fn = layer()
    fn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(): out = Chunk(3, fn)(data(2, 13, 6))
    assert len(calls)==3 and out.grad_fn is None

class Hidden(nn.Linear):
    "A second weight that is not registered"
    def __init__(self): super().__init__(6, 6); self.scales = [nn.Parameter(torch.ones(6, dtype=torch.float64))]
    def forward(self, x): return super().forward(x) * self.scales[0]

class Counter(nn.Module):
    "Its output depends on how often it was called, by a buffer"
    def __init__(self, in_place):
        super().__init__()
        self.in_place,self.weight = in_place,nn.Parameter(torch.ones(6))
        self.register_buffer('count', torch.zeros(()))
    def forward(self, x):
        if self.in_place: self.count += 1
        else: self.count = self.count + 1
        return x.sin() * self.weight * self.count

class Learned(nn.Linear):
    "A buffer that wants a gradient"
    def __init__(self): super().__init__(6, 6); self.register_buffer('scale', torch.ones(6, dtype=torch.float64, requires_grad=True))
    def forward(self, x): return super().forward(x) * self.scale

class Constant(nn.Module):
    "Its output does not depend on its input"
    def forward(self, x): return torch.ones_like(x)

def in_stack(fn, reverse_thres=0):
    "A reversible block with `fn` for its F, called with both streams equal"
    stack = ReversibleSequence([[fn, nn.Identity()]], reverse_thres=reverse_thres).double()
    return lambda x: stack(torch.cat([x, x], -1))

places = pytest.mark.parametrize('place', (lambda fn: fn, in_stack, lambda fn: Chunk(2, fn)), ids=('alone', 'in a stack', 'nested'))

@places
@pytest.mark.parametrize('want', (True, False))
def test_chunk_refuses_hidden_weights(place, want):
    "A weight in a plain list would get no gradient"
    run = place(Chunk(3, Hidden().double()))
    with pytest.raises(RuntimeError, match=r'Hidden uses a tensor \(6,\) that requires a gradient and would get none'):
        run(data(2, 13, 6).requires_grad_(want)).sum().backward()

@places
@pytest.mark.parametrize('in_place', (True, False))
def test_chunk_buffers_that_change(place, in_place):
    "The second computation starts from the buffers of the first, and leaves the module's own alone"
    found = []
    for cls,fn in ((Chunk, Counter(in_place).double()), (Pieces, Counter(False).double())):   # autograd alone refuses the change in place
        found.append([*gradients(place(cls(3, fn)), data(2, 13, 6).requires_grad_(), [fn.weight]), fn.count])
    for a,b in zip(*found): same(a, b, 1e-12)

@places
def test_chunk_buffers_that_learn(place):
    found = []
    for cls in (Chunk, Pieces):
        torch.manual_seed(0)
        fn,x = Learned().double(),data(2, 13, 6).requires_grad_()
        found.append(gradients(place(cls(3, fn)), x, [*fn.parameters(), fn.scale]))
    for a,b in zip(*found): same(a, b, 1e-12)

def test_chunk_of_a_constant():
    x = data(2, 13, 6).requires_grad_()
    assert gradients(Chunk(3, Constant()), x, [])[1].abs().max()==0

def test_chunk_inside_a_checkpoint():
    fn,x = layer(dropout=.4),data(2, 13, 6).requires_grad_()
    found = [gradients(lambda x, cls=cls: checkpoint(cls(3, fn), x, use_reentrant=False), x, [*fn.parameters()]) for cls in (Chunk, Pieces)]
    for a,b in zip(*found): same(a, b, 1e-13)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_chunk_autocast(dtype):
    fn,x = layer().float(),data(2, 13, 6).float().requires_grad_()
    def run(cls):
        with torch.autocast('cpu', dtype=dtype): out = cls(3, fn)(x)
        return out,*torch.autograd.grad(out.float().sum(), [x, *fn.parameters()])
    for a,b in zip(run(Chunk), run(Pieces)): same(a/b.norm(), b/b.norm(), 1e-2)
    assert run(Chunk)[0].dtype==dtype

def test_chunk_compiles_and_exports():
    chunk,x = Chunk(3, FeedForward(6)).eval(),data(2, 13, 6).float()
    same(torch.export.export(chunk, (x,)).module()(x), chunk(x), 1e-6)
    same(torch.compile(chunk, backend='aot_eager', fullgraph=True)(x), chunk(x), 1e-6)

def test_wrappers_offer_state_if_their_module_does():
    attention = LSHSelfAttention(6, heads=2, bucket_size=2, n_hashes=2)
    for wrap in (lambda fn: PreNorm(6, fn), lambda fn: PreNorm(6, fn, ScaleNorm), ReZero):
        for fn,has in ((attention, True), (ProductKeyMemory(6, 1, 4, 2, 3), True), (FeedForward(6), False), (Chunk(2, FeedForward(6)), False)):
            for o in (wrap(fn), copy.deepcopy(wrap(fn)), pickle.loads(pickle.dumps(wrap(fn)))): assert hasattr(o, 'with_state')==has

@pytest.mark.parametrize('tie', (False, True))
def test_in_a_reversible_stack(tie):
    "Equal to the plain stack, with attention, pieces, memories, both normalisations and ReZero"
    def stack(reverse_thres):
        torch.manual_seed(0)
        def attention(): return LSHSelfAttention(12, heads=2, bucket_size=4, n_hashes=2, dropout=.1)
        ff,memory,shared = Chunk(3, FeedForward(12, dropout=.3)),ProductKeyMemory(12, 2, 8, 4, 6),attention()
        new = (lambda: shared) if tie else attention
        pairs = [(PreNorm(12, new(), ScaleNorm), PreNorm(12, memory)), (PreNorm(12, new()), PreNorm(12, ff)), (ReZero(new()), ReZero(ff if tie else memory))]
        res = ReversibleSequence(nn.ModuleList(nn.ModuleList(o) for o in pairs), reverse_thres=reverse_thres).double()
        for p in res.parameters():
            if p.numel()==1: p.data.fill_(.7)
        return res
    found = []
    for thres in (0, 100):
        model,x = stack(thres),data(2, 19, 24).requires_grad_()
        found.append(gradients(model, x, [*model.parameters()], model.eval))
    for a,b in zip(*found): same(a, b, 1e-11)

def test_scale_norm_of_zeros_and_half():
    norm = ScaleNorm(6)
    x = torch.zeros(2, 6, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all() and norm(x.half()).dtype==torch.half
    same(norm(1000*torch.ones(1, 6).half()).float(), torch.full((1, 6), 6**-.5), 1e-3)

@pytest.mark.parametrize('k,topk', [(4,4), (9,5), (40,32), (128,32)])
def test_best_pairs(k, topk):
    s = data(2, 3, 7, k)
    want = (s[0][...,None] + s[1][...,None,:]).flatten(-2).topk(topk).indices
    assert torch.equal(best_pairs(s, topk), want)

@pytest.mark.parametrize('options', [dict(), dict(heads=3, num_keys=16, topk=8, dim_head=10)])
def test_memory_beside_its_package(options):
    "The same outputs and gradients as the PKM of product_key_memory from the same weights"
    from product_key_memory import PKM
    torch.manual_seed(0)
    theirs,ours,x = PKM(24, **options).double(),ProductKeyMemory(24, **options).double(),data(2, 13, 24).requires_grad_()
    ours.load_state_dict(theirs.state_dict())
    weights = dict(theirs.named_parameters())
    for a,b in zip(gradients(ours, x, ours.parameters()), gradients(theirs, x, [weights[k] for k,_ in ours.named_parameters()])): same(a, b, 1e-12)

@pytest.mark.parametrize('frozen', ('w1.weight', 'w2.bias', None))
def test_weights_frozen_before_the_backward_pass(frozen):
    "Gradients are those that the forward pass promised"
    def grads(make):
        fn,x = layer(),data(2, 13, 6).requires_grad_()
        params = dict(fn.named_parameters())
        assert frozen is None or frozen in params, [*params]
        out = make(fn)(x).square().sum()
        for k,p in params.items(): p.requires_grad_(k!=frozen and frozen is not None)
        out.backward()
        return x.grad
    same(grads(lambda fn: Chunk(3, fn)), grads(lambda fn: fn), 1e-13)

def test_pieces_draw_the_same_numbers_in_two_threads():
    "Which all threads take from one generator"
    chunk,x = Chunk(8, nn.Dropout(.5)),torch.ones(1, 64, 128)
    def masks_agree(_):
        y = chunk(leaf := x.clone().requires_grad_())
        return torch.equal(torch.autograd.grad(y.sum(), leaf)[0], y.detach())
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(masks_agree, range(120)))

def test_blocks_draw_the_same_numbers_in_two_threads():
    x = torch.ones(64, 128)
    def masks_agree(_):
        y = compute_in_blocks(nn.Dropout(.5), (leaf := x.clone().requires_grad_(),), size=8)
        return torch.equal(torch.autograd.grad(y.sum(), leaf)[0], y.detach())
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(masks_agree, range(120)))

def test_pieces_that_draw_otherwise_the_second_time_are_refused():
    class Draws(nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            return nn.functional.dropout(x, .5) if self.calls<=4 else x*torch.rand(self.calls).mean()
    y = Chunk(4, Draws())(torch.ones(1, 8, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match='Draws drew other random numbers when it was computed again'): y.sum().backward()
