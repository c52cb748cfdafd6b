"""Memory of the models of the paper's Table 3: `python nbs/experiments/memory_law.py [axis ...] [--quick]`

    length   against the length of the text, where pairs of positions take most
    depth    against the number of blocks
    hidden   against the width of the hidden layer, where that takes most
    rounds   against the number of hash rounds, where pairs of positions take most

Each writes results/memory_<axis>.csv, a row for a training step of a model: the bytes that autograd holds after the
forward pass (kept) and at most at a time (saved), by `torch.autograd.graph.saved_tensors_hooks`, and the most that
tensors take (peak), by torch's profiler. Weights and the input are not counted, nor in the peak one gradient of each.
No number depends on how fast or busy the machine is. `--quick` takes small sizes and writes to out/bench.
"""
import argparse
from collections import Counter
from pathlib import Path
import torch
from torch.autograd.graph import saved_tensors_hooks
from records import append, results, slope, surroundings
from speed import most_allocated

# ---- the models: options of our Reformer, and what the paper's table says ------------------------------------------

plain,full = dict(reverse_thres=2**40),dict(use_full_attn=True)   # longer than any input; the whole matrix of attention
models = {
    'Transformer':                    full | plain | dict(ff_chunks=1),
    'reversible Transformer':         full | dict(ff_chunks=1),
    'chunked reversible Transformer': full,
    'LSH Transformer':                plain | dict(ff_chunks=1),
    'Reformer':                       {},
    'Reformer, fused':                dict(backend='fused'),
}
formulas = {
    'Transformer':                    r'$\max(b l d_{ff},\ b n_h l^2)\,n_l$',
    'reversible Transformer':         r'$\max(b l d_{ff},\ b n_h l^2)$',
    'chunked reversible Transformer': r'$\max(b l d_{model},\ b n_h l^2)$',
    'LSH Transformer':                r'$\max(b l d_{ff},\ b n_h l n_r c)\,n_l$',
    'Reformer':                       r'$\max(b l d_{model},\ b n_h l n_r c)$',
}
hashing = ('LSH Transformer', 'Reformer', 'Reformer, fused')

def step_of(who, b, n, **options):
    "Tensors that get gradients, and a function that returns where a backward pass starts, and its gradient"
    from reformer_nb import Reformer
    torch.manual_seed(0)
    model = Reformer(**dict(backend='reference', causal=True) | options | models[who])
    x,grad = torch.randn(b, n, options['dim'], requires_grad=True),torch.randn(b, n, options['dim'])
    return [*model.parameters(), x],lambda: (model(x), grad)

# ---- counting ------------------------------------------------------------------------------------------------------

class Held:
    "A tensor that autograd holds"
    def __init__(self, tensor, count):
        self.tensor,self.count = tensor.detach(),count
        count.add(tensor.untyped_storage(), 1)
    def __del__(self): self.count.add(self.tensor.untyped_storage(), -1)

class SavedBytes:
    "Bytes of the storages that autograd holds: each counts once, those of `known` tensors never"
    def __init__(self, known=()):
        self.known = {o.untyped_storage().data_ptr() for o in known}
        self.held,self.now,self.most = Counter(),0,0
    def add(self, storage, sign):
        key = storage.data_ptr()
        if key in self.known: return
        before = self.held[key]
        self.held[key] += sign
        if not before or not self.held[key]: self.now += sign*storage.nbytes()
        self.most = max(self.most, self.now)
    def hooks(self): return saved_tensors_hooks(lambda o: Held(o, self), lambda o: o.tensor)

def saved_bytes(leaves, step):
    "What autograd holds for the backward pass: after the forward pass, and at most at any time of the step"
    count = SavedBytes(leaves)
    with count.hooks():
        out,grad = step()
        kept = count.now
        out.backward(grad)
    return kept,count.most

def measure(who, **options):
    "One training step, in bytes"
    leaves,step = step_of(who, **options)
    kept,saved = saved_bytes(leaves, step)
    gradients = sum(o.grad.nbytes for o in leaves)
    for o in leaves: o.grad = None
    return dict(kept=kept, saved=saved, peak=most_allocated(step)-gradients, gradients=gradients)

# ---- the axes: what a model is measured with, one argument at several values ------------------------------------------

common = dict(b=1, n=512, depth=1, dim=64, heads=2, ff_hidden=256, n_hashes=4, bucket_size=32, ff_chunks=32)
settings = dict(
    length={},
    depth=dict(ff_hidden=2048),
    hidden=dict(b=16, dim=32, heads=1, n_hashes=1, bucket_size=8, ff_chunks=512),
    rounds=dict(n=1024, dim=32, bucket_size=64),
)
varied = dict(length='n', depth='depth', hidden='ff_hidden', rounds='n_hashes')

def powers_of_two(first, last): return [2**i for i in range(first, last+1)]

def values(axis, who):
    "What an axis gives its argument; full attention is not measured at great lengths, nor against rounds"
    if axis=='length': return powers_of_two(9, 14 if who in hashing else 12)
    if axis=='rounds': return powers_of_two(1, 5) if who in hashing else []
    return powers_of_two(12, 15) if axis=='hidden' else powers_of_two(1, 5)

def cases(axis, quick=False):
    "Models and options along an axis"
    for who in models:
        for o in values(axis, who)[:2 if quick else None]:
            smaller = dict(b=1) if quick else {}
            yield who,common | settings[axis] | smaller | {varied[axis]: o}

# ---- how memory grows ----------------------------------------------------------------------------------------------------

# what the formula of a model says of an axis: the exponent, and the term that it belongs to; our own kernel keeps no pairs
grows = {
    'length': {who: (1, 'b n_h l n_r c') if who in hashing else (2, 'b n_h l²') for who in models} | {'Reformer, fused': (1, 'b l d_model')},
    'depth': {who: (1, 'n_l') if models[who].get('reverse_thres') else (0, '') for who in models},
    'hidden': {who: (1, 'b l d_ff') if models[who].get('ff_chunks') else (0, '') for who in models},
    'rounds': {who: (1, 'b n_h l n_r c') for who in hashing} | {'Reformer, fused': (0, '')},
}

def fit(points, exponents):
    "Coefficients of y = Σ c xᵏ with the least squares of relative errors, and the largest relative error"
    x,y = (torch.tensor(o, dtype=torch.float64) for o in zip(*points))
    columns = torch.stack([x**k/y for k in exponents], dim=1)
    unit = columns.abs().amax(0)
    found = torch.linalg.lstsq(columns/unit, torch.ones_like(y)[:,None]).solution[:,0]/unit
    return found.tolist(),(columns@found-1).abs().max().item()

def along(rows, axis, who, what):
    "Points (x, bytes) of a model"
    return [(o[varied[axis]], o[what]) for o in rows if o['who']==who]

def exponents(rows, axis):
    "Of each model: what the formula says, what is measured, and how far that is off"
    for who,(wanted,term) in grows[axis].items():
        saved,peak = (slope(along(rows, axis, who, k)) for k in ('saved', 'peak'))
        x = [o for o,_ in along(rows, axis, who, 'saved')]
        yield dict(model=who, values=f'{min(x)} to {max(x)}', term=term, formula=wanted, saved=round(saved, 2), off=round(saved-wanted, 2),
                   peak=round(peak, 2), peak_off=round(peak-wanted, 2))

def one_tensor(row, axis):
    "Bytes that one tensor of the term which an axis is about takes for each unit of the axis; none for the depth"
    pairs = row['heads']*(row['n_hashes']*2*row['bucket_size'] if row['who'] in hashing else 1)
    return dict(length=4*row['b']*pairs, hidden=4*row['b']*row['n'], rounds=4*row['b']*row['n']*pairs//row['n_hashes']).get(axis)

def sums(rows, axis, what='saved'):
    "Of each model: bytes a + c·x, or a·x + c·x², fitted to what is measured, and how many tensors of the term c is"
    for who,(wanted,_) in grows[axis].items():
        (first,second),error = fit(along(rows, axis, who, what), (1, 2) if wanted==2 else (0, 1))
        tensor = one_tensor(next(o for o in rows if o['who']==who), axis)
        yield dict(model=who, a=round(first), c=round(second, 1), tensors=round(second/tensor, 2) if tensor else '', error=f'{100*error:.1f} %')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('axes', nargs='*', default=list(settings), help='all if left out')
    p.add_argument('--quick', action='store_true', help='small sizes, and nothing in results/')
    a = p.parse_args()
    if bad := set(a.axes)-set(settings): p.error(f'no such axis: {" ".join(bad)}')
    torch.set_num_threads(1)
    folder,made = Path('out/bench') if a.quick else results,surroundings()
    for axis in a.axes:
        path = folder/f'memory_{axis}.csv'
        path.unlink(missing_ok=True)
        for who,options in cases(axis, a.quick):
            row = dict(who=who) | options | measure(who, **options)
            print(axis, row, flush=True)
            append(path, row | made)

if __name__=='__main__': main()
