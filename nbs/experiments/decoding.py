"""Writing token by token: `python nbs/experiments/decoding.py [part ...] [--quick]`

    prefix   milliseconds of processor time for a new token against the length of the text before it, with reformer_pytorch beside
    stream   a text of a million tokens in segments: memory that is held, the state, and what a full cache would take

Each part writes results/decoding_<part>.csv; `--quick` takes smaller sizes and writes to out/bench. Parts that measure
memory read /proc, so they need Linux.
"""
import argparse, statistics, time
from pathlib import Path
import torch
from records import append, results, surroundings

def ours(dim, longest, n_buckets):
    "Two layers, strictly causal, rotary positions"
    from reformer_nb import ReformerLM
    torch.manual_seed(0)
    return ReformerLM(256, dim, 2, longest, heads=8, dim_head=dim//8, bucket_size=64, n_hashes=4, causal='strict', n_buckets=n_buckets).eval()

def theirs(dim, longest):
    "reformer_pytorch of the same size, in its wrapper for generation"
    from reformer_pytorch import ReformerLM
    from reformer_pytorch.generative_tools import TrainingWrapper
    torch.manual_seed(0)
    return TrainingWrapper(ReformerLM(256, dim, 2, longest, heads=8, bucket_size=64, n_hashes=4, causal=True)).eval()

def text(n): return torch.randint(256, (1, n), generator=torch.Generator().manual_seed(0))

@torch.no_grad()
def read(model, tokens, size=2048):
    "State behind a text, read in segments"
    state = model.init_state(len(tokens))
    for part in tokens.split(size, 1): _,state = model(part, state=state)
    return state

@torch.no_grad()
def step_times(model, state, repeat):
    "Seconds of processor time that each of some new tokens takes, after one that fetches weights and state again"
    token,found = torch.tensor([[7]]),[]
    for _ in range(repeat+1):
        start = time.process_time()
        logits,state = model(token, state=state)
        token = logits[:,-1].argmax(-1, keepdim=True)
        found.append(time.process_time()-start)
    return found[1:]

def their_times(wrapper, prefix, repeat):
    "Seconds of processor time that each of some new tokens takes by `generate`, which reads the whole text again"
    found = []
    for _ in range(repeat):
        start = time.process_time()
        wrapper.generate(text(prefix), 1, filter_thres=.9)
        found.append(time.process_time()-start)
    return found

def prefix(folder, quick):
    "Both, in turns, at growing prefixes, on one thread"
    torch.set_num_threads(1)
    for dim in (64,) if quick else (64, 512):
        lengths = (128, 512) if quick else (128, 512, 1024, 2048, 8192, 65536)
        model,peer = ours(dim, 2**17, 256),theirs(dim, 2**12)
        states = {n: read(model, text(n)) for n in lengths}
        for _ in range(2): [step_times(model, states[n], 3) for n in lengths]   # warm up
        mine,other = {n: [] for n in lengths},{n: [] for n in lengths if n<=2048}
        for _ in range(2 if quick else 9):
            for n in lengths: mine[n] += step_times(model, states[n], 5)
            for n in other: other[n] += their_times(peer, n, 1)
        for n in lengths:
            row = dict(dim=dim, prefix=n, ms=round(1000*statistics.median(mine[n]), 2),
                       reformer_pytorch_ms=round(1000*statistics.median(other[n]), 1) if n in other else '')
            append(folder/'decoding_prefix.csv', {**row, **surroundings()})
            print(row, flush=True)

def memory(field):
    "MiB that this process holds ('VmRSS'), or has held at most ('VmHWM')"
    return int(next(l for l in open('/proc/self/status') if l.startswith(field)).split()[1])/1024

def stream(folder, quick):
    "Read a long text with a state of fixed size"
    n,size = (20_000, 2000) if quick else (1_000_000, 4000)
    from reformer_nb import ReformerLM
    model = ReformerLM(256, 128, 2, n, heads=2, dim_head=64, bucket_size=64, n_hashes=2, causal='strict', n_buckets=256).eval()
    tokens,state,held,start = text(n),model.init_state(1),[],time.perf_counter()
    with torch.no_grad():
        for part in tokens.split(size, 1):
            x,state = model.embed(part, state=state)
            held.append(memory('VmRSS'))
    cache,tenth = 2*2*n*2*64*4,len(held)//10   # layers, keys and values, tokens, heads, width, bytes
    row = dict(tokens=n, segment=size, seconds=round(time.perf_counter()-start), state_mib=round(state.nbytes/2**20, 1), cache_mib=round(cache/2**20, 1),
               held_mib_second_tenth=round(statistics.median(held[tenth:2*tenth])), held_mib_last_tenth=round(statistics.median(held[-tenth:])), peak_mib=round(memory('VmHWM')))
    append(folder/'decoding_stream.csv', {**row, **surroundings()})
    print(row, flush=True)

parts = dict(prefix=prefix, stream=stream)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', help='which parts; all if left out')
    p.add_argument('--quick', action='store_true', help='smaller sizes, and nothing in results/')
    a = p.parse_args()
    folder = Path('out/bench') if a.quick else results
    for name in a.parts or parts: parts[name](folder, a.quick)
