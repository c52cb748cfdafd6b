"""Time and peak memory beside the peers: `python nbs/experiments/speed.py [part ...] [--quick]`

    layer       seconds of one attention layer against length, all contestants in turns in one process
    core        seconds of the fused attention alone, beside the rate of a large matrix product
    rounds      seconds and peak memory of one layer against the number of hash rounds
    crossing    seconds of one layer of ours, hashed and with full attention, at short lengths
    tokens      seconds of attention against length, with as many rows as make up a constant number of tokens
    memory      peak memory of one layer against length
    depth       peak memory of a training step against depth
    vocabulary  peak memory of a training step against the vocabulary
    example     seconds and peak memory of a training step of the first example of reformer_pytorch's README
    million     seconds and peak memory of a training step on 262,144 and 1,048,576 tokens

Each part writes results/speed_<part>.csv, a row as soon as it is measured; `--quick` takes smaller sizes and writes to
out/bench. Peak memory is that of a process of its own, above what it held before the step: weights and inputs. It counts
gradients. It is read from /proc, so these parts need Linux. `tokens` counts processor time with `--threads 1`, which
other programs hardly change, and notes how busy the machine was.
"""
import argparse, gc, itertools, json, os, statistics, subprocess, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from records import append, results, slope, surroundings

# ---- contestants: each a module from (1, n, 512) to (1, n, 512) -------------------------------------------------

width,heads,bucket_size = 512,8,64

def ours(n, rounds):
    from reformer_nb import LSHSelfAttention
    return LSHSelfAttention(width, heads, bucket_size, rounds, causal=True)

def reformer_pytorch(n, rounds):
    from reformer_pytorch import LSHSelfAttention
    return LSHSelfAttention(width, heads, bucket_size, rounds, causal=True)

class HuggingFace(nn.Module):
    "LSHSelfAttention and ReformerSelfOutput of transformers, which chooses the number of buckets itself"
    def __init__(self, n, rounds):
        super().__init__()
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerSelfOutput
        config = ReformerConfig(attn_layers=['lsh'], hidden_size=width, num_attention_heads=heads, attention_head_size=width//heads,
            num_hashes=rounds, lsh_attn_chunk_length=bucket_size, is_decoder=True, max_position_embeddings=n, axial_pos_embds=False,
            hidden_dropout_prob=0., lsh_attention_probs_dropout_prob=0., use_cache=False)
        self.attention,self.output = LSHSelfAttention(config),ReformerSelfOutput(config)
    def forward(self, x): return self.output(self.attention(x).hidden_states)

class FullAttention(nn.Module):
    "Full causal attention by PyTorch's `scaled_dot_product_attention`, with the projections of the others"
    def __init__(self, n, rounds):
        super().__init__()
        self.toqk,self.tov,self.to_out = (nn.Linear(width, width, bias=b) for b in (False, False, True))
    def forward(self, x):
        q,v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (self.toqk, self.tov))
        out = F.scaled_dot_product_attention(q, F.normalize(q, dim=-1), v, is_causal=True, scale=1.)
        return self.to_out(out.transpose(1, 2).flatten(2))

contestants = {'reformer_nb': ours, 'reformer_pytorch': reformer_pytorch, 'transformers': HuggingFace, 'full attention': FullAttention}

def in_full(n, rounds):
    "Our layer, which attends fully"
    from reformer_nb import LSHSelfAttention
    return LSHSelfAttention(width, heads, bucket_size, causal=True, use_full_attn=True)

layers = contestants | dict(in_full=in_full)

# ---- steps: tensors that get gradients, and a function that returns where a backward pass starts, and its gradient ----

def layer_step(who, n, rounds=4):
    "One attention layer"
    torch.manual_seed(0)
    model,x,grad = layers[who](n, rounds),torch.randn(1, n, width, requires_grad=True),torch.randn(1, n, width)
    return [*model.parameters(), x],lambda: (model(x), grad)

def core_step(n, rounds=4):
    "Fused attention of 8 heads of 64, buckets given"
    from reformer_nb.fused_lsh import fused_lsh_attention
    torch.manual_seed(0)
    qk,v,grad = (torch.randn(1, heads, n, width//heads, requires_grad=i<2) for i in range(3))
    buckets = torch.randint(n//bucket_size, (1, heads, rounds, n), dtype=torch.int16)
    return [qk, v],lambda: (fused_lsh_attention(qk, v, buckets, bucket_size=bucket_size, causal=True), grad)

# the attention of `tokens_step`: in full, with the matrix of weights kept and without, and hashed in so many rounds
attentions = {'matrix kept': None, 'full': 0, 'LSH-1': 1, 'LSH-2': 2, 'LSH-4': 4, 'LSH-8': 8}

def tokens_step(who, n, tokens, heads=2):
    "Causal attention alone, hashing and sorting included: heads of 64, rows of length n that hold all `tokens`"
    from reformer_nb.attention import full_attention
    from reformer_nb.hasher import BucketHasher
    from reformer_nb.head_attention import attend_fully
    from reformer_nb.lsh import lsh_attention
    torch.manual_seed(0)
    qk,v,grad = (torch.randn(tokens//n, heads, n, 64, requires_grad=i<2) for i in range(3))
    rounds = attentions[who]
    if not rounds: attend = full_attention if rounds is None else attend_fully
    else:
        hasher = BucketHasher(rounds, bucket_size)
        def attend(qk, v, causal): return lsh_attention(qk, v, hasher(qk), bucket_size=bucket_size, causal=causal)
    return [qk, v],lambda: (attend(qk, v, causal=True), grad)

def language_model_step(n, vocabulary, reversible=True, **options):
    "A language model of ours and its loss over all tokens; without reversibility all activations are kept"
    from reformer_nb import ReformerLM
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (1, n+1))
    model = ReformerLM(vocabulary, max_seq_len=n, causal=True, reverse_thres=0 if reversible else n, **options)
    return list(model.parameters()),lambda: (model.loss(tokens), None)

example_options = dict(num_tokens=20000, dim=1024, max_seq_len=8192, heads=8, lsh_dropout=.1, emb_dim=128, causal=True,
                       bucket_size=64, n_hashes=4, ff_chunks=200, weight_tie=False, attn_chunks=8, num_mem_kv=128, twin_attention=False,
                       use_full_attn=False, full_attn_thres=1024, use_scale_norm=False)

def example_step(who, depth=12, n=8192):
    "`reformer_pytorch`'s first example, with its options as given; their loss is that of the logits, ours the method"
    torch.manual_seed(0)
    tokens = torch.randint(20000, (1, n+1))
    if who=='reformer_nb':
        from reformer_nb import ReformerLM
        model = ReformerLM(depth=depth, **example_options)
        return list(model.parameters()),lambda: (model.loss(tokens), None)
    from reformer_pytorch import ReformerLM as Theirs
    model = Theirs(depth=depth, **{k: v for k,v in example_options.items() if k!='twin_attention'})
    def loss(): return F.cross_entropy(model(tokens[:,:-1]).flatten(0, 1), tokens[:,1:].flatten())
    return list(model.parameters()),lambda: (loss(), None)

steps = dict(layer=layer_step, core=core_step, model=language_model_step, example=example_step)

# ---- measuring -------------------------------------------------------------------------------------------------

def timed(step, clock=time.perf_counter):
    "Seconds of the forward, and of forward and backward pass"
    start = clock()
    out,grad = step()
    middle = clock()
    out.backward(grad)
    return middle-start,clock()-start

def in_turns(steps, repeats, budget, clock=time.perf_counter):
    "Median seconds of each of `steps`, one after the other again and again: `repeats` times, or 3 if `budget` seconds are over"
    found,start = {k: [] for k in steps},time.perf_counter()
    for i in range(repeats+1):
        for k,step in steps.items():
            seconds = timed(step, clock)
            if i: found[k].append(seconds)   # the first warms up
        if i>=3 and time.perf_counter()-start>budget: break
    medians = {k: [statistics.median(o) for o in zip(*v)] for k,v in found.items()}
    return {k: dict(forward=round(f, 4), both=round(b, 4), repeats=len(found[k])) for k,(f,b) in medians.items()}

def held(field):
    "A number of the process, in bytes"
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024*int(next(l for l in lines if l.startswith(field)).split()[1])

def most_allocated(step):
    "The most bytes that tensors take at a time during a step, by torch's profiler, whatever the allocator makes of it"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as p: timed(step)
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name()=='[memory]')
    return max(itertools.accumulate(o for _,o in events))

def measure_memory(what, count=True, **options):
    "One step in this process: seconds, the peak above what it held before, and in a second step what tensors take"
    if not Path('/proc/self/clear_refs').exists(): raise SystemExit('peak memory is read from /proc; measure it on Linux')
    timed(layer_step('reformer_nb', 256)[1])   # what any first step loads and keeps
    leaves,step = steps[what](**options)
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')   # the peak begins anew
    before = held('VmRSS')
    _,seconds = timed(step)
    peak,gradients = held('VmHWM')-before,sum(o.grad.nbytes for o in leaves if o.grad is not None)
    for o in leaves: o.grad = None
    return dict(peak=peak, allocated=most_allocated(step) if count else 0, gradients=gradients,
                weights=sum(o.nbytes for o in leaves), seconds=seconds)

# environment of a process: glibc's default, and one that gives all blocks of a megabyte and more back at once
allocators = {'default': {}, 'large blocks returned': dict(MALLOC_MMAP_THRESHOLD_=str(2**20))}
measured = ('peak', 'allocated', 'gradients', 'weights', 'seconds')

def in_own_process(threads, what, allocator='default', **options):
    "`measure_memory` in a new process, in MiB; empty if the process is killed for want of memory"
    given,env = json.dumps(dict(options, what=what)),os.environ | allocators[allocator]
    command = [sys.executable, __file__, '--threads', str(threads), '--one', given]
    res = subprocess.run(command, capture_output=True, text=True, env=env)
    if res.returncode in (-9, 137): return dict.fromkeys(measured, '') | dict(allocator=allocator)
    if res.returncode: raise SystemExit(res.stderr)
    found = json.loads(res.stdout.splitlines()[-1])
    return {k: round(v if k=='seconds' else v/2**20, 1) for k,v in found.items()} | dict(allocator=allocator)

# ---- parts: each yields rows -----------------------------------------------------------------------------------

def layer(quick, threads):
    limit,last = 2 if quick else 40,{}
    for n in [2**i for i in range(10, 14 if quick else 17)]:
        ready = {who: layer_step(who, n)[1] for who in contestants if last.get(who, 0)<limit}
        for who,found in in_turns(ready, 3 if quick else 7, 10 if quick else 60).items():
            last[who] = 4*found['both']
            yield dict(who=who, n=n, **found)

def matrix_rate(size=2048, repeats=5):
    "Floating-point operations a second of a large matrix product"
    a = torch.randn(size, size)
    def once():
        start = time.perf_counter()
        a @ a
        return time.perf_counter()-start
    return 2*size**3/statistics.median(once() for _ in range(repeats))

def core(quick, threads):
    for n in [2**i for i in range(12, 14 if quick else 17)]:
        rate,found = matrix_rate(),in_turns(dict(core=core_step(n)[1]), 3 if quick else 7, 60)['core']
        product = 4*heads*n*2*bucket_size*(width//heads)*2   # operations of one product of all windows, 4 rounds
        done = 7*product/1e9
        yield dict(n=n, **found, products_gflop=round(done, 2), gflops=round(done/found['both'], 1), matrix_gflops=round(rate/1e9, 1))

def rounds(quick, threads):
    n,counts = 2048 if quick else 8192,(1, 4) if quick else (1, 2, 4, 8)
    who = [o for o in contestants if o!='full attention']
    ready = {(w,r): layer_step(w, n, r)[1] for r in counts for w in who}
    found = in_turns(ready, 3 if quick else 5, 10 if quick else 60)
    for (w,r),times in found.items():
        yield dict(who=w, n=n, rounds=r, **times, peak_mib=in_own_process(threads, 'layer', who=w, n=n, rounds=r)['peak'])

def crossing(quick, threads):
    for n in [2**i for i in range(8, 11 if quick else 13)]:
        ready = {o: layer_step(o, n)[1] for o in ('reformer_nb', 'in_full')}
        found = in_turns(ready, 3 if quick else 15, 10 if quick else 60)
        yield dict(n=n, hashed=found['reformer_nb']['both'], full=found['in_full']['both'])

def tokens(quick, threads):
    total = 2**12 if quick else 2**15
    clock = time.process_time if threads==1 else time.perf_counter
    for n in [2**i for i in range(10, 13 if quick else 16)]:
        ready = {who: tokens_step(who, n, total)[1] for who in attentions if who!='matrix kept' or n<=4096}   # what fits
        load = os.getloadavg()[0]
        for who,found in in_turns(ready, 2 if quick else 7, 5 if quick else 120, clock).items():
            yield dict(who=who, n=n, tokens=total, **found, clock=clock.__name__, load=round(load, 1))

def memory(quick, threads):
    for n in (1024, 4096) if quick else [2**i for i in range(10, 17)]:
        for who in contestants:
            if n<2**15 or who in ('reformer_nb', 'full attention') or not quick and n==2**15:
                yield dict(who=who, n=n, **in_own_process(threads, 'layer', who=who, n=n))

small = dict(dim=256, heads=4, bucket_size=64, n_hashes=4)

def depth(quick, threads):
    n = 1024 if quick else 4096
    for reversible,allocator in ((True, 'default'), (True, 'large blocks returned'), (False, 'default')):
        for d in (1, 4) if quick else (1, 2, 4, 8, 12, 24):
            options = dict(n=n, depth=d, reversible=reversible)
            found = in_own_process(threads, 'model', allocator, vocabulary=256, **options, **small)
            buckets = round(2*small['n_hashes']*small['heads']*n*d/2**20, 2)
            yield options | found | dict(buckets=buckets, rest=round(found['allocated']-found['gradients']-buckets, 1))

def vocabulary(quick, threads):
    n = 1024 if quick else 4096
    for allocator,v in itertools.product(allocators, (256, 4096) if quick else (256, 4096, 16384, 65536, 262144)):
        found = in_own_process(threads, 'model', allocator, n=n, vocabulary=v, depth=2, **small)
        yield dict(n=n, vocabulary=v, **found, rest=round(found['allocated']-found['gradients'], 1), all_logits=round(4*n*v/2**20, 1))

def example(quick, threads):
    options,who = dict(depth=1, n=2048) if quick else dict(depth=12, n=8192),('reformer_nb', 'reformer_pytorch')
    peaks = {o: in_own_process(threads, 'example', who=o, count=False, **options) for o in who}
    found = in_turns({o: example_step(o, **options)[1] for o in who}, 1 if quick else 3, 60)
    for o in who: yield dict(who=o, **options, **found[o], **{k: peaks[o][k] for k in ('peak', 'gradients', 'weights', 'allocator')})

def million(quick, threads):
    options = dict(vocabulary=256, dim=128, depth=2, heads=2, dim_head=64, n_hashes=2, bucket_size=64)
    for n in (2**14,) if quick else (2**18, 2**20):
        yield dict(n=n, **in_own_process(threads, 'model', count=False, n=n, **options))

parts = dict(layer=layer, core=core, rounds=rounds, crossing=crossing, tokens=tokens, memory=memory, depth=depth, vocabulary=vocabulary, example=example, million=million)

# ---- what the notebooks show -------------------------------------------------------------------------------------

def ratios(rows, what):
    "By length: the value of ours, and how many times as much each of the others has"
    for n in sorted({o['n'] for o in rows}):
        at = {o['who']: o[what] for o in rows if o['n']==n and o[what]!=''}
        if 'reformer_nb' in at: yield {'length': n, 'reformer_nb': at['reformer_nb']} | {k: f'{v/at["reformer_nb"]:.1f}×' for k,v in at.items() if k!='reformer_nb'}

def along(rows, who, what='both'):
    "Points (length, value) of a contestant"
    return [(o['n'], o[what]) for o in rows if o['who']==who and o[what]!='']

def at_constant_tokens(rows):
    "Seconds of each kind of attention by length, and to which power of the length they grow"
    for who in attentions:
        if points := along(rows, who): yield dict(attention=who) | {n: f'{y:.2f}' for n,y in points} | dict(exponent=f'{slope(points):.2f}')

def ahead_of_full(rows):
    "For each number of rounds: the shortest length at which, and beyond which, hashing takes less time than full attention"
    full = dict(along(rows, 'full'))
    for who in list(attentions)[2:]:
        slower = [n for n,y in along(rows, who) if y>=full.get(n, 0.)]
        yield who,min((n for n in full if n>max(slower, default=0)), default=None)

def plot_tokens(rows, ax):
    "Seconds against length, a line for each kind of attention"
    for (who,rounds),color in zip(attentions.items(), ('#555555', '#000000', '#56B4E9', '#0072B2', '#009E73', '#D55E00')):
        if points := along(rows, who): ax.loglog(*zip(*points), 'o-' if rounds else 's--', base=2, color=color, label=who, ms=3, lw=1.2)
    ax.set_yscale('log', base=10)
    ax.set(xlabel='length', ylabel='seconds')
    if ax.lines: ax.legend(frameon=False, fontsize=8, ncols=2, loc='upper left')
    ax.set_ylim(top=8*ax.get_ylim()[1])   # room for it
    return ax

# ---- command line ----------------------------------------------------------------------------------------------

def write(name, rows, folder):
    "Rows of a part to a new file, each as soon as it is there"
    path,made = folder/f'speed_{name}.csv',surroundings()
    path.unlink(missing_ok=True)
    for row in rows:
        print(name, *(f'{k}={v}' for k,v in row.items()), flush=True)
        append(path, row | made)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(parts), help='all if left out')
    p.add_argument('--quick', action='store_true', help='small sizes')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of torch')
    p.add_argument('--one', type=json.loads, help=argparse.SUPPRESS)   # what `in_own_process` asks for
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.one: return print(json.dumps(measure_memory(**a.one)))
    if bad := set(a.parts)-set(parts): p.error(f'no such part: {" ".join(bad)}')
    folder = Path('out/bench') if a.quick else results
    for name in a.parts: write(name, parts[name](a.quick, a.threads), folder)

if __name__=='__main__': main()
