"Layers of every kind in a reversible stack: gradients equal those of the plain stack in float64, or an error says why not"
import copy
from concurrent.futures import ThreadPoolExecutor
import itertools
import random
import threading
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from reformer_nb.reformer import Reformer
from reformer_nb.reversible_sequence import ReversibleSequence

e,n = 6,5
generator = torch.Generator().manual_seed(3)
x,weights = (torch.randn(2, n, 2*e, dtype=torch.double, generator=generator) for _ in range(2))
angles = torch.randn(n, e, dtype=torch.double, generator=generator)

def mlp(): return nn.Sequential(nn.LayerNorm(e), nn.Linear(e, 11), nn.Tanh(), nn.Linear(11, e))

class Wraps(nn.Module):
    "A layer around `mlp`"
    def __init__(self):
        super().__init__()
        self.f = mlp()
    def forward(self, x): return self.f(x)

class Dropout(Wraps):
    def forward(self, x): return nn.functional.dropout(self.f(x), .3, self.training)

class Counter(Wraps):
    "Its output depends on a buffer that it changes"
    in_place = True
    def __init__(self):
        super().__init__()
        self.register_buffer('count', torch.zeros(()))
    def forward(self, x):
        if self.in_place: self.count += 1
        else: self.count = self.count + 1
        return self.f(x) * self.count.clone()

class Assigned(Counter):
    in_place = False

class GRU(Wraps):
    def __init__(self):
        super().__init__()
        self.f = nn.GRU(e, e, batch_first=True)
    def forward(self, x): return self.f(x)[0]

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.MultiheadAttention(e, 2, dropout=.2, batch_first=True)
    def forward(self, x): return self.f(x, x, x, need_weights=False)[0]

class Checkpointed(Wraps):
    def forward(self, x): return checkpoint(self.f, x, use_reentrant=False)

class Constant(nn.Module):
    def forward(self, x): return x.detach()/2

class Decides(Wraps):
    "Keeps a mask by `with_state`"
    def forward(self, x): return self.with_state(x)[0]
    def with_state(self, x, state=None, *, layer=0):
        state = x>0 if state is None else state
        return self.f(x)*state,state

class Draws(Decides):
    "Draws a mask, and nothing if it is given one"
    def with_state(self, x, state=None, *, layer=0):
        state = torch.rand(e)>.5 if state is None else state
        return self.f(x)*state,state

class DrawsAgain(Decides):
    "Draws a mask, and again what it drew, so that dropout repeats"
    def with_state(self, x, state=None, *, layer=0):
        drawn = torch.rand(e)>.5
        state = drawn if state is None else state
        return nn.functional.dropout(self.f(x), .3)*state,state

def batch_norm(): return nn.Sequential(nn.BatchNorm1d(n), nn.Linear(e, e))

layers = {'plain': mlp, 'dropout': Dropout, 'buffer changed in place': Counter, 'buffer assigned': Assigned, 'GRU': GRU, 'attention': Attention,
          'checkpoint': Checkpointed, 'identity': nn.Identity, 'constant': Constant, 'batch norm': batch_norm, 'state': Decides, 'state drawn': Draws,
          'state drawn again': DrawsAgain, 'spectral norm': lambda: spectral_norm(nn.Linear(e, e)), 'weight norm': lambda: weight_norm(nn.Linear(e, e))}

def stack(make=mlp, depth=3, tied=False, **options):
    torch.manual_seed(0)
    pair = make(),make()
    return ReversibleSequence([pair if tied else (make(),make()) for _ in range(depth)], **options).double()

def loss_grads(model, x_grad=True, between=lambda _: None, inputs=x, **args):
    "Gradients of the input, of tensor arguments and of weights"
    inputs = inputs.clone().requires_grad_(x_grad)
    args = {k: o.clone().requires_grad_() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for k,o in args.items()}
    y = model(inputs, **args)
    between(model)
    to = [o for o in (inputs, *args.values(), *model.parameters()) if isinstance(o, torch.Tensor) and o.requires_grad]
    return torch.autograd.grad((weights*y).sum(), to, allow_unused=True)

def both(model, run=loss_grads):
    "What `run` gives for the reversible and for the plain stack, with buffers and the random numbers that follow"
    results = []
    for thres in (0,10**9):
        one = copy.deepcopy(model)
        one.reverse_thres = thres
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        results.append([*run(one), *one.buffers(), torch.rand(3)])
    return results

def assert_same(model, run=loss_grads):
    found,want = both(model, run)
    for a,b in zip(found, want, strict=True):
        assert (a is None)==(b is None)
        if b is not None: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('training', (True,False), ids=('train','eval'))
@pytest.mark.parametrize('tied', (False,True), ids=('','tied'))
@pytest.mark.parametrize('kind', layers)
def test_layers_of_every_kind(kind, tied, training): assert_same(stack(layers[kind], tied=tied).train(training))

options = {'layer dropout': dict(layer_dropout=.5, depth=5), 'one block': dict(depth=1), 'eight blocks': dict(depth=8)}
@pytest.mark.parametrize('kind', options)
def test_options_of_the_stack(kind): assert_same(stack(Dropout, **options[kind]))

def test_input_without_gradient(): assert_same(stack(Dropout), lambda model: loss_grads(model, x_grad=False))

@pytest.mark.parametrize('trial', range(3))
def test_frozen_weights(trial):
    model = stack()
    for i,p in enumerate(model.parameters()): p.requires_grad_(i%3==trial)
    for x_grad in (True,False): assert_same(model, lambda o, x_grad=x_grad: loss_grads(o, x_grad=x_grad))

def test_nothing_wants_a_gradient(): assert not stack().requires_grad_(False)(x).requires_grad

def test_backward_fills_grad_and_hooks_are_called_once():
    def run(model):
        for p in model.parameters(): p.register_hook(lambda d: d/2)
        (weights*model(x)).sum().backward()
        return [p.grad for p in model.parameters()]
    assert_same(stack(Dropout), run)

def test_module_hooks():
    def run(model):
        for o in model.modules():
            if isinstance(o, nn.Linear): o.register_forward_hook(lambda _, given, out: 1.1*out)
        return loss_grads(model)
    assert_same(stack(), run)

@pytest.mark.parametrize('make', (Dropout,Counter,batch_norm))
@pytest.mark.parametrize('second', (True,False), ids=('train','eval'))
def test_two_forwards_before_one_backward(make, second):
    def run(model):
        first = model(x)
        return torch.autograd.grad((first*model.train(second)(2*x)).sum(), list(model.parameters()))
    assert_same(stack(make), run)

def test_mode_changed_before_the_backward_pass(): assert_same(stack(Dropout), lambda model: loss_grads(model, between=lambda o: o.eval()))

def test_backward_twice():
    def run(model):
        loss = (weights*model(x)).sum()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for a,b in zip(first, torch.autograd.grad(loss, list(model.parameters()))): assert torch.equal(a, b)
        return first
    assert_same(stack(Dropout), run)

def test_what_a_hook_keeps_of_a_stream_stays():
    "Rests of streams are changed in place, streams never"
    model,seen = stack(),[]
    for block in model.blocks:
        for fn in block: fn.register_forward_hook(lambda _,args,out: seen.append((args[0],args[0].clone(),out,out.clone())))
    loss_grads(model)
    assert len(seen)>=2*2*len(model.blocks)   # there and back
    for inputs,inputs_then,out,out_then in seen: assert torch.equal(inputs, inputs_then) and torch.equal(out, out_then)

def test_one_tensor_as_both_streams():
    def run(model):
        same = x[...,:e].clone().requires_grad_()
        return torch.autograd.grad(sum((o*w).sum() for o,w in zip(model.streams(same, same), weights.chunk(2, -1))), [same, *model.parameters()])
    assert_same(stack(), run)

def test_inside_a_checkpoint():
    def run(model, reentrant):
        inputs = x.clone().requires_grad_()
        (weights*checkpoint(model, inputs, use_reentrant=reentrant)).sum().backward()
        return [inputs.grad, *(p.grad for p in model.parameters())]
    for o in (False,True): assert_same(stack(Dropout), lambda model, o=o: run(model, o))

def test_swapped_parameters():
    def run(model):
        source = {k: o.detach().clone().requires_grad_() for k,o in model.named_parameters()}
        y = torch.func.functional_call(model, {k: o.sin() for k,o in source.items()}, (x,))
        return torch.autograd.grad((weights*y).sum(), list(source.values()))
    assert_same(stack(Dropout), run)

@pytest.mark.parametrize('shape', ((0,n,2*e),(2,0,2*e)))
def test_empty_input(shape):
    model = stack()
    y = model(torch.zeros(shape, dtype=torch.double, requires_grad=True))
    assert y.shape==shape and not any(o.any() for o in torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True) if o is not None)

class Takes(Wraps):
    "A layer with keyword arguments"
    def forward(self, x, by=0., mask=1): return self.f(x.sin()+by)*mask

@pytest.mark.parametrize('routes', ((True,False),(False,True),(True,True)))
def test_tensor_arguments_get_gradients(routes):
    mask = (torch.arange(n)<4)[:,None]
    model = stack(Takes)
    assert_same(model, lambda o: loss_grads(o, arg_route=routes, by=angles, mask=mask))
    def run(o):   # the same by `streams`; the argument is no leaf
        leaf = angles.clone().requires_grad_()
        args = [dict(by=leaf.sin(), mask=mask) if to else None for to in routes]
        return torch.autograd.grad(torch.cat(o.streams(*x.chunk(2, -1), *args), -1).sin().sum(), [leaf, *o.parameters()])
    assert_same(model, run)

@pytest.mark.parametrize('given', ((angles,), [angles], dict(a=angles), nn.Linear(2, 3)), ids=lambda o: type(o).__name__)
def test_tensors_in_containers_are_refused(given):
    if not isinstance(given, nn.Module): angles.requires_grad_(True)
    try:
        for thres,route in itertools.product((0,n), ((True,False),(False,True))):
            with pytest.raises(TypeError, match='pass each as a keyword argument of its own'): stack(Takes, reverse_thres=thres)(x, arg_route=route, by=given)
    finally: angles.requires_grad_(False)

def test_unknown_and_lost_arguments_are_refused():
    with pytest.raises(TypeError, match='nonsense'): stack(Takes)(x, nonsense=1)
    with pytest.raises(ValueError, match='sends by nowhere'): stack(Takes)(x, arg_route=(False,False), by=angles)

class Told(Wraps):
    "Notes a number for each depth, and recalls it in the recomputation"
    def __init__(self):
        super().__init__()
        self.notes = {}
    def forward(self, x, _depth, _reverse):
        if not _reverse: self.notes[_depth] = np.random.rand()
        return self.f(x) * self.notes[_depth]

def test_signal_tells_depth_and_recomputation(): assert_same(stack(Told, send_signal=True, tied=True))

def test_a_note_of_another_pass_is_refused():
    model = stack(Told, send_signal=True)
    first,_ = model(x),model(x)
    with pytest.raises(RuntimeError, match='gave something else when it was recomputed'): first.sum().backward()

class Noise(Wraps):
    "Multiplies by a number that torch knows nothing of"
    amount = .05
    def draw(self): return np.random.randn()
    def forward(self, x): return self.f(x) * (1 + self.amount*self.draw())

class LittleNoise(Noise): amount = 1e-4

class PythonNoise(Noise):
    def draw(self): return random.gauss(0, 1)

class Calls(Noise):
    "Counts its calls in Python"
    calls = 0
    def draw(self):
        self.calls += 1
        return self.calls

class List(Wraps):
    "Has a weight that is not registered"
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(e, dtype=torch.double))]
    def forward(self, x): return self.f(x)*self.hidden[0]

class Cache(Wraps):
    "Keeps what it has computed from a weight"
    def __init__(self):
        super().__init__()
        self.weight,self.double_weight = nn.Parameter(torch.ones(e)),None
    def forward(self, x):
        if self.double_weight is None: self.double_weight = 2*self.weight
        return self.f(x)*self.double_weight

class DrawsOnce(Decides):
    "Draws a mask once, and then uses dropout"
    def with_state(self, x, state=None, *, layer=0):
        state = torch.rand(e)>.5 if state is None else state
        return nn.functional.dropout(self.f(x), .3)*state,state

class FloatState(Decides):
    def with_state(self, x, state=None, *, layer=0): return self.f(x),2*x

class Hides(Wraps):
    "Holds a layer with a state, and does not hand it on"
    def __init__(self):
        super().__init__()
        self.f = Decides()

class Pools(nn.Module):
    def forward(self, x): return x.mean(1, keepdim=True)

class Tuple(nn.Module):
    def forward(self, x): return x,x

class Widens(nn.Module):
    def forward(self, x): return x.double()

refused = {'noise from numpy': (Noise,'G of block 2 .Noise. gave something else'), 'a little of it': (LittleNoise,'gave something else'),
           'noise from python': (PythonNoise,'gave something else'), 'a counter in python': (Calls,'gave something else'),
           'a weight in a list': (List,r'G of block 2 .List. uses a tensor .6,. that requires a gradient and would get none'),
           'a cached product': (Cache,'would get none'), 'a mask drawn once': (DrawsOnce,'drew other random numbers'),
           'a state of floats': (FloatState,'is torch.float64, but must be None or one tensor of integers'),
           'a hidden state': (Hides,'holds Decides but does not hand on its state'), 'another shape': (Pools,'keep it, since both streams'),
           'a tuple': (Tuple,'returned tuple, not a tensor')}

@pytest.mark.parametrize('kind', refused)
def test_what_cannot_be_right_is_refused(kind):
    make,match = refused[kind]
    with pytest.raises((RuntimeError,TypeError,ValueError), match=match): loss_grads(stack(lambda: make()))

def test_an_error_names_g():
    model = ReversibleSequence([(mlp(),mlp()),(mlp(),Noise())]).double()
    with pytest.raises(RuntimeError, match='G of block 1 .Noise. gave'): loss_grads(model)

def test_a_wider_dtype_is_refused():
    with pytest.raises(TypeError, match='more than the stream'): stack(Widens)(x.float())

def test_noise_in_float32_and_autocast_is_refused():
    model = stack(Noise).float()
    for on in (False,True):
        with torch.autocast('cpu', torch.bfloat16, enabled=on): y = model(x.float())
        Noise.amount = .5
        try:
            with pytest.raises(RuntimeError, match='gave something else'): y.sum().backward()
        finally: Noise.amount = .05

def test_second_derivatives_are_refused():
    inputs = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match='second derivatives'): torch.autograd.grad(stack()(inputs).sin().sum(), inputs, create_graph=True)
    d, = torch.autograd.grad(stack(reverse_thres=n)(inputs).sin().sum(), inputs, create_graph=True)
    assert torch.autograd.grad(d.sin().sum(), inputs)[0].any()

spoils = {'a weight': lambda model, args, out: next(model.parameters()).mul_(2), 'an argument': lambda model, args, out: args['by'].mul_(2),
          'a buffer': lambda model, args, out: next(model.buffers()).mul_(2), 'an output': lambda model, args, out: out[0].mul_(2)}

class Buffered(Takes):
    def __init__(self):
        super().__init__()
        self.register_buffer('factor', torch.ones(e))
    def forward(self, x, by=0.): return super().forward(x, by) * self.factor

@pytest.mark.parametrize('kind', spoils)
def test_changes_between_the_passes_are_refused(kind):
    model,args = stack(Buffered),dict(by=angles.clone())
    out = model.streams(*x.clone().requires_grad_().chunk(2, -1), args)
    with torch.no_grad(): spoils[kind](model, args, out)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): sum(out).sum().backward()

def test_the_joined_output_may_be_changed():
    def run(model):
        y = model(x)
        y.mul_(2)
        return torch.autograd.grad((weights*y).sum(), list(model.parameters()))
    assert_same(stack(), run)

def far(make, dtype, autocast=False, thres=0, depth=24, size=1., factor=1):
    "Relative distance of all gradients of a stack from those of the plain one in float64"
    torch.manual_seed(0)
    exact = ReversibleSequence([(make(),make()) for _ in range(depth)], reverse_thres=10**9)
    with torch.no_grad():
        for p in exact.parameters(): p.mul_(factor if p.ndim>1 else 1)
    inputs = size*torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    def grads(model, dtype):
        model = model.to(dtype)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast and dtype==torch.float32): y = model(inputs.to(dtype))
        return torch.cat([o.flatten().double() for o in torch.autograd.grad(y.double().square().mean(), list(model.parameters()))])
    other = copy.deepcopy(exact)
    other.reverse_thres = thres
    want = grads(exact, torch.double)
    return ((grads(other, dtype)-want).norm()/want.norm()).item()

def wide(): return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

@pytest.mark.parametrize('size', (1.,.02))
@pytest.mark.parametrize('factor', (1,3,10))
def test_depth_24_is_as_exact_as_the_plain_stack(size, factor):
    how = dict(size=size, factor=factor)
    assert far(wide, torch.double, **how)<1e-12
    assert far(wide, torch.float32, **how)<1.5*far(wide, torch.float32, thres=16, **how)<1e-4
    for dtype,autocast in ((torch.float32,True),(torch.bfloat16,False)):
        assert far(wide, dtype, autocast, **how)<1.25*far(wide, dtype, autocast, thres=16, **how)

def test_lost_digits_are_refused():
    model = stack(lambda: nn.Sequential(nn.Linear(e, 20), nn.ReLU(), nn.Linear(20, e)), depth=24).float()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4)
    with pytest.raises(RuntimeError, match='if rounding is the cause'): model(x.float()).mean().backward()

def test_outputs_keep_the_dtype():
    for dtype in (torch.bfloat16,torch.float16,torch.float32,torch.float64):
        for thres in (0,n): assert stack(reverse_thres=thres).to(dtype)(x.to(dtype)).dtype==dtype

@pytest.mark.parametrize('hash_seed', (0,None))
@pytest.mark.parametrize('depth,dtype,limit', ((24,torch.float64,1e-12),(6,torch.float32,1e-5),(24,torch.float32,1e-4)))
def test_reformer_by_depth(hash_seed, depth, dtype, limit):
    torch.manual_seed(0)
    model = Reformer(16, depth, heads=2, bucket_size=8, n_hashes=2, causal=True, hash_seed=hash_seed, lsh_dropout=.1, ff_dropout=.1).to(dtype)
    inputs,results = torch.randn(2, 32, 16, dtype=dtype),[]
    for thres in (0,32):
        one = copy.deepcopy(model)
        one.layers.reverse_thres = thres
        torch.manual_seed(5)
        results.append(torch.cat([o.flatten() for o in torch.autograd.grad(one(inputs).square().mean(), list(one.parameters()))]))
    assert (results[0]-results[1]).norm()/results[1].norm()<limit

def test_sparse_gradients_stay_sparse():
    "Of a table of which a branch reads a few rows, in two blocks"
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)
        def forward(self, x): return self.table(torch.arange(x.shape[1])).expand_as(x)*x
    g = Table()
    stack = ReversibleSequence(nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), g]) for _ in range(2)]))
    stack(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    found,g.table.weight.grad = g.table.weight.grad,None
    assert found.is_sparse
    stack.reverse_thres = 6
    stack(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    torch.testing.assert_close(found.to_dense(), g.table.weight.grad.to_dense())

@pytest.mark.parametrize('options', (dict(), dict(ff_chunks=2), dict(reverse_thres=n*4, ff_chunks=2)), ids=str)
def test_two_threads_train_one_model(options):
    "Each replaces weights for a while in the backward pass"
    torch.manual_seed(0)
    model = Reformer(16, 2, heads=2, bucket_size=4, n_hashes=2, rotations='fixed', **options).double().eval()
    texts,params = torch.randn(4, 1, 4*n, 16, dtype=torch.double),dict(model.named_parameters())
    def learn(text): model(text).square().sum().backward()
    for o in texts: learn(o)
    wanted = {k: p.grad.clone() for k,p in params.items()}
    for _ in range(5):
        for p in params.values(): p.grad = None
        with ThreadPoolExecutor(4) as pool: list(pool.map(learn, texts))
        assert all(dict(model.named_parameters())[k] is p for k,p in params.items())
        for k,p in params.items(): torch.testing.assert_close(p.grad, wanted[k], rtol=0, atol=1e-9)

def test_two_threads_draw_random_numbers():
    "Which all threads take from one generator; a second call sets it back"
    torch.manual_seed(0)
    stack = ReversibleSequence(nn.ModuleList([nn.ModuleList([nn.Dropout(.5), nn.Dropout(.5)])]))
    x = torch.ones(1, 64, 128, dtype=torch.double)
    def learn(_):
        y = stack(leaf := x.clone().requires_grad_())   # linear in x, so its gradient times x sums up to the output
        y.sum().backward()
        torch.testing.assert_close((leaf.grad*x).sum(), y.detach().sum())
    with ThreadPoolExecutor(4) as pool: list(pool.map(learn, range(80)))

# ---- hooks of users ------------------------------------------------------------------------------------------------

def hooked_stack(kind, reverse_thres=0):
    torch.manual_seed(0)
    more = dict(memory=dict(pkm_layers=1, pkm_num_keys=32), decoder=dict(cross_attention=True), decoder_attention=dict(cross_attention=True), rezero=dict(use_rezero=True), local=dict(attn_layers=('local',))).get(kind, {})
    if kind!='local': more.update(n_hashes=2, full_attn_thres=0)
    model = Reformer(8, 1, heads=2, bucket_size=4, reverse_thres=reverse_thres, **more).double()
    for o in model.modules():
        if kind=='rezero' and hasattr(o, 'g'): nn.init.ones_(o.g)
    f,g = model.layers.blocks[0]
    return model,{'memory': lambda: g.fn, 'attention': lambda: f.fn, 'local': lambda: f.fn, 'decoder_attention': lambda: f.attend.fn}.get(kind, lambda: f)()

def hooked_call(model, kind, x):
    return model(x, **(dict(keys=torch.linspace(-1, 1, 40).double().view(1, 5, 8).expand(2, -1, -1)) if 'decoder' in kind else {}))

kinds_of_layer = ('attention', 'norm', 'rezero', 'memory', 'decoder', 'decoder_attention', 'local')
hook_input = torch.randn(2, 19, 8, generator=torch.Generator().manual_seed(5)).double()

@pytest.mark.parametrize('kind', kinds_of_layer)
def test_hooks_of_layers_are_called(kind):
    "Once in a pass, and once more in its recomputation, with the layer itself and its output alone"
    gradients = []
    for reverse_thres in (0, 99):
        model,layer = hooked_stack(kind, reverse_thres)
        plain,seen = hooked_call(copy.deepcopy(model), kind, hook_input),[]
        def note(what, module, some, res=None, seen=seen): seen.append((what, module, type(some))); return res
        layer.register_forward_hook(lambda module, args, out, note=note: note('out', module, out, out*3))
        layer.register_forward_pre_hook(lambda module, args, named, note=note: note('in', module, args[0]), with_kwargs=True)
        layer.register_full_backward_hook(lambda module, dx, dy, note=note: note('back', module, dy[0], tuple(None if o is None else o*2 for o in dx)))
        y = hooked_call(model, kind, x := hook_input.clone().requires_grad_())
        assert [o[0] for o in seen]==['in', 'out'] and not torch.allclose(y, plain)
        (y**2).sum().backward()
        assert [o[0] for o in seen]==['in', 'out']*(1 if reverse_thres else 2) + ['back'] and all(o[1:]==(layer, torch.Tensor) for o in seen)
        gradients.append([y.detach(), x.grad, *(o.grad for o in model.parameters() if o.grad is not None)])
    for o,p in zip(*gradients, strict=True): torch.testing.assert_close(o, p, rtol=0, atol=1e-9)

def test_an_old_backward_hook_is_refused():
    "torch itself cannot call it around another method than forward"
    model,layer = hooked_stack('attention')
    layer.register_backward_hook(lambda module, dx, dy: None)
    with pytest.raises(RuntimeError, match='LSHSelfAttention has a hook of register_backward_hook.*use register_full_backward_hook'): model(hook_input)
    with torch.no_grad(): assert model(hook_input).isfinite().all()

def test_what_a_hook_keeps_has_no_way_back():
    kept = []
    model,layer = hooked_stack('norm')
    layer.register_forward_hook(lambda module, args, out: kept.append(out))
    y = model(hook_input)
    with pytest.raises(RuntimeError, match='detach it, or set reverse_thres'): (y.sum() + kept[0].square().sum()).backward()

def test_hooks_of_two_calls_in_one_graph_and_in_two_threads():
    def run(model, x): return torch.autograd.grad((model(x[0]) * model(x[1])).sum(), list(model.parameters()))
    model,layer = hooked_stack('attention')
    model.eval()
    layer.register_forward_hook(lambda module, args, out: out*2)
    xs = torch.randn(2, 2, 2, 19, 8, generator=torch.Generator().manual_seed(6)).double()
    reversed_ones = [run(model, o) for o in xs]
    model.layers.reverse_thres = 99
    wanted,found = [run(model, o) for o in xs],{}
    threads = [threading.Thread(target=lambda i=i: found.update({i: run(model, xs[i])})) for i in range(2)]
    for o in threads: o.start()
    for o in threads: o.join()
    for i in range(2):
        for o,p,q in zip(found[i], wanted[i], reversed_ones[i], strict=True):
            torch.testing.assert_close(o, p, rtol=0, atol=1e-12), torch.testing.assert_close(q, p, rtol=0, atol=1e-9)

def test_a_weight_that_a_hook_makes():
    "Pruning keeps a mask, and multiplies in a hook"
    torch.manual_seed(0)
    model = Reformer(8, 1, heads=2, bucket_size=4, num_mem_kv=3).double()
    prune.l1_unstructured(model.layers.blocks[0][0].fn, 'mem_kv', .5)
    for _ in range(2): model(hook_input).sum().backward()
    assert model.layers.blocks[0][0].fn.mem_kv_orig.grad.ne(0).sum()<=12
