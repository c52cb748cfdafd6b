"""Training over segments with a memory of earlier ones: `python nbs/experiments/recurrence.py [--quick]`

Rows of consecutive text from Python's standard library are read in short segments. One model carries its state from
segment to segment, the other begins anew with each; all else is equal, also the number of tokens and of steps. Held-out
files are then read in both ways. Adds rows to results/recurrence.csv.
"""
import argparse, math, time
from pathlib import Path
import torch
from reformer_nb import ReformerLM
from reformer_nb.data import stdlib_corpus
from records import append, results, surroundings

segment,rows,longest = 128,8,2**14   # tokens read at a time; rows of a batch; tokens that a state lives for in training

def make(seed):
    "Two layers, two of four heads local"
    torch.manual_seed(seed)
    return ReformerLM(256, 128, 2, 2**20, heads=4, dim_head=32, bucket_size=32, n_hashes=2, causal='strict', n_buckets=32, n_local_attn_heads=2)

def consecutive(data, step, seed):
    "The segments of all rows at a step: each row goes on with its text for `longest` tokens, then starts elsewhere"
    per_life = longest//segment
    starts = torch.randint(len(data)-longest-1, (rows,), generator=torch.Generator().manual_seed(1000*seed + step//per_life))
    at = starts[:,None] + step%per_life*segment + torch.arange(segment+1)
    return data[at].long(),step%per_life==0

def train(carry, steps, seed, data):
    "A model that has read the text, with or without its state from the segment before"
    model = make(seed).train()
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i+1)/50)*(1-i/steps))
    state = None
    for step in range(steps):
        tokens,fresh = consecutive(data, step, seed)
        if state is None or fresh or not carry: state = model.init_state(rows)
        loss,state = model.loss(tokens, state=state)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        schedule.step()
        if step%100==0: print(f'carry={carry} step {step}: {loss.item()/math.log(2):.3f} bits', flush=True)
    return model.eval()

@torch.no_grad()
def bits(model, carry, data, n=64):
    "Bits per byte of held-out text, read in segments"
    state,total = None,0.
    for i in range(n):
        at = torch.arange(rows)[:,None]*(len(data)//rows - 1) + i*segment + torch.arange(segment+1)
        if state is None or not carry: state = model.init_state(rows)
        loss,state = model.loss(data[at].long(), state=state)
        total += loss.item()/math.log(2)/n
    return total

def main(quick):
    torch.set_num_threads(1)
    folder,corpus = Path('out/bench') if quick else results,stdlib_corpus()
    steps = 20 if quick else 600
    for seed in (0,) if quick else (0, 1):
        for carry in (False, True):
            start = time.process_time()
            model = train(carry, steps, seed, corpus.train)
            seconds = time.process_time()-start
            row = dict(segment=segment, carried=carry, seed=seed, tokens=steps*rows*segment, read_apart=round(bits(model, False, corpus.valid), 4),
                       read_on=round(bits(model, True, corpus.valid), 4), cpu_seconds=round(seconds))
            append(folder/'recurrence.csv', {**row, **surroundings()})
            print(row, flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='a few steps, and nothing in results/')
    main(p.parse_args().quick)
