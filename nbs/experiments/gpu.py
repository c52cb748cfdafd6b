"""Time and memory on a GPU, beside the peers: `python nbs/experiments/gpu.py [part ...] [--quick]`

    attention   attention alone, forward, and forward and backward: ours, hashing and sorting included, ours with buckets
                given, and PyTorch's flash attention
    layer       one layer with its projections: ours, reformer_pytorch's, transformers', full attention

Each part writes results/gpu_<part>.csv, a row as soon as it is measured; `--quick` stops at 8192 tokens, repeats less and
writes to out/bench. Times are medians of many repeats between CUDA events, in bfloat16 (autocast in layers); memory is the
peak above what was held before the step. Where a step does not fit, the row says so. First the kernels are compared with
the oracle: if they are wrong, nothing is timed.
"""
import argparse, gc, os, statistics, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
import speed
from records import append, results, surroundings

heads,width,rounds,bucket_size = 8,64,4,64   # of `attention`; `layer` has those of speed.py
lengths = [2**k for k in range(11, 18)]      # 2048 to 131,072

# ---- are the kernels right? ------------------------------------------------------------------------------------

def draw(*shape, device, dtype=torch.float, seed=0):
    "Normal numbers in the memory order of a layer, (b, n, h, d), seen as (b, h, n, d)"
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).transpose(1, 2).contiguous().transpose(1, 2)
    return x.to(device, dtype).requires_grad_()

def difference(found, wanted): return ((found-wanted).norm()/wanted.norm()).item()

def wrong(device, dtype, bound):
    "What differs from the oracle by more than `bound`, relatively: outputs and gradients of the kernels, bucket ids"
    from reformer_nb.hasher import BucketHasher
    from reformer_nb.oracle import lsh_attention_oracle
    from reformer_nb.triton_lsh import triton_lsh_attention
    qk,v = (draw(1, 2, 96, 32, device=device, dtype=dtype, seed=i) for i in range(2))
    hasher = BucketHasher(2, 16).eval()
    ids,exact = hasher(qk),hasher(qk.detach().cpu()).to(device)
    options = dict(bucket_size=16, causal=True, look_back='rounds')
    out = triton_lsh_attention(qk, v, exact, **options)
    found = dict(zip(('output', 'gradient of qk', 'gradient of v'), (out, *torch.autograd.grad(out.float().sin().sum(), (qk, v)))))
    x,y = (o.detach().double().requires_grad_() for o in (qk, v))
    out = lsh_attention_oracle(x, y, exact, **options)
    wanted = dict(zip(found, (out, *torch.autograd.grad(out.sin().sum(), (x, y)))))
    said = [f'{k} {o:.1e}' for k in found if not (o := difference(found[k].double(), wanted[k]))<=bound]
    moved = (ids!=exact).float().mean().item()
    return said + ([f'{moved:.1%} of the bucket ids'] if moved>.01 else [])

def gate(device):
    "The first dtype in which the kernels are wrong, and what is wrong; None if they are right"
    checks = {torch.float32: 1e-4, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if device=='cuda' else {})   # the interpreter lacks bfloat16
    return next((f'{dtype}: {", ".join(said)}' for dtype,bound in checks.items() if (said := wrong(device, dtype, bound))), None)

# ---- contestants: what gets gradients, and a function that returns an output and its gradient --------------------

def attention_step(who, n, device, dtype):
    "Causal attention of 8 heads of 64"
    from reformer_nb.hasher import BucketHasher
    from reformer_nb.triton_lsh import triton_lsh_attention
    qk,v,grad = (draw(1, heads, n, width, device=device, dtype=dtype, seed=i) for i in range(3))
    hasher = BucketHasher(rounds, bucket_size, rotations='fixed')
    given,key = hasher(qk),F.normalize(qk.detach(), dim=-1)
    def hashed(buckets=None): return triton_lsh_attention(qk, v, hasher(qk) if buckets is None else buckets, bucket_size=bucket_size, causal=True)
    def flash():
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if device=='cuda' else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(qk, key, v, is_causal=True, scale=1.)
    attend = {'reformer_nb': hashed, 'reformer_nb, buckets given': lambda: hashed(given), 'flash attention': flash}[who]
    return [qk, v],lambda: (attend(), grad.detach())

def layer_step(who, n, device, dtype):
    "One layer of width 512"
    torch.manual_seed(0)
    model = (speed.layers[who](n, rounds) if who!='reformer_nb' else ours(device)).to(device)
    x,grad = (torch.randn(1, n, speed.width, device=device, requires_grad=i<1) for i in range(2))
    def step():
        with torch.autocast(device, dtype=dtype): out = model(x)
        return out,grad.to(out.dtype)
    return [*model.parameters(), x],step

def ours(device):
    from reformer_nb import LSHSelfAttention
    return LSHSelfAttention(speed.width, speed.heads, speed.bucket_size, rounds, causal=True, backend='triton' if device=='cuda' else 'auto')

contestants = dict(attention=('reformer_nb', 'reformer_nb, buckets given', 'flash attention'), layer=tuple(speed.contestants))
steps = dict(attention=attention_step, layer=layer_step)

# ---- measuring -------------------------------------------------------------------------------------------------

def between(f, device):
    "Milliseconds that `f` takes, and what it returns"
    if device=='cpu':
        start = time.perf_counter()
        out = f()
        return 1000*(time.perf_counter()-start),out
    begin,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out = f()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end),out

def once(leaves, step, device):
    "Milliseconds of the forward and of the backward pass"
    for o in leaves: o.grad = None
    forward,(out,grad) = between(step, device)
    backward,_ = between(lambda: out.backward(grad), device)
    return forward,backward

def measure(leaves, step, device, repeats, budget):
    "Medians of `repeats`, fewer but at least 5 if `budget` seconds are over, and MiB at the peak"
    for _ in range(3): once(leaves, step, device)   # the first compile and choose kernels
    gc.collect()
    peak = ''
    if device=='cuda':
        for o in leaves: o.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(leaves, step, device)
        peak = round((torch.cuda.max_memory_allocated()-before)/2**20, 1)
    times,start = [],time.perf_counter()
    while len(times)<repeats and (len(times)<5 or time.perf_counter()-start<budget): times.append(once(leaves, step, device))
    forward,both = statistics.median(f for f,_ in times),statistics.median(f+b for f,b in times)
    return dict(forward_ms=round(forward, 4), both_ms=round(both, 4), peak_mib=peak, repeats=len(times), note='')

nothing = dict(forward_ms='', both_ms='', peak_mib='', repeats=0)

def rows(part, sizes, device, repeats, budget=20., dtype=torch.bfloat16):
    "One row for each contestant and length; who did not fit once is not asked again"
    beaten = {}
    for n in sizes:
        for who in contestants[part]:
            row = dict(who=who, n=n, dtype=str(dtype).removeprefix('torch.'))
            if who not in beaten:
                try: row |= measure(*steps[part](who, n, device, dtype), device, repeats, budget)
                except torch.OutOfMemoryError: beaten[who] = 'out of memory'
                except Exception as e: beaten[who] = f'{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ""}'
            if who in beaten: row |= nothing | dict(note=beaten[who])
            yield row
            gc.collect()
            if device=='cuda': torch.cuda.empty_cache()

def where(device):
    "What a measurement was made with"
    return surroundings() | dict(device=torch.cuda.get_device_name() if device=='cuda' else 'cpu', on=time.strftime('%Y-%m-%d'))

def run(parts, sizes, device, folder, repeats, **options):
    "Check the kernels, then write the rows of each part"
    if found := gate(device): sys.exit(f'the kernels are wrong, so nothing is timed; {found}')
    made = where(device)
    for part in parts:
        path = Path(folder)/f'gpu_{part}.csv'
        new = path.with_suffix('.new')
        new.unlink(missing_ok=True)
        for row in rows(part, sizes, device, repeats, **options):
            print(part, *(f'{k}={v}' for k,v in row.items()), flush=True)
            append(new, row | made)
        new.replace(path)   # what was there stays until all of it is measured again

# ---- what the hardware allows ------------------------------------------------------------------------------------

def least(n, r=rounds, h=heads, d=width, m=bucket_size, size=2, bandwidth=3.35e12, rate=989e12):
    "Milliseconds at least on an H100, by its data sheet: ours and full causal attention, forth, and forth and back"
    forth = size*2*d + 4*2 + (r-1)/r*2*4*d + size*d/r + 2*4           # of each token, head and round: see notebooks 05d and 05e
    back = size*3*d + 4*4 + (r-1)/r*2*4*2*d + size*2*d/r + size*2*d/r
    meetings,by_bytes = n*h*r,1e3/bandwidth
    full = 1e3*h*n**2/2*4*d/rate
    return dict(n=n, ours=meetings*forth*by_bytes, ours_both=meetings*(forth+back)*by_bytes, full=full, full_both=3.5*full)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(contestants), help='all if left out')
    p.add_argument('--quick', action='store_true', help='up to 8192 tokens')
    a = p.parse_args(args)
    if bad := set(a.parts)-set(contestants): p.error(f'no such part: {" ".join(bad)}')
    if not torch.cuda.is_available():
        print('gpu.py measures on a GPU, and torch sees none', file=sys.stderr)
        sys.exit(2)
    run(a.parts, lengths[:3] if a.quick else lengths, 'cuda', os.path.join('out', 'bench') if a.quick else results, 20 if a.quick else 100)

if __name__=='__main__': main()
