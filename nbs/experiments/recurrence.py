"""Training over segments with a memory of earlier ones: `python nbs/experiments/recurrence.py [--quick]`

Rows of consecutive text from Python's standard library are read in short segments. One model carries its state from
segment to segment, the other begins anew with each; all else is equal, also the bytes and their order. Held-out files
are then read in both ways. Adds rows to results/recurrence.csv.
"""
import argparse, time
from pathlib import Path
import torch
from reformer_nb import ReformerLM, Trainer
from reformer_nb.data import stdlib_corpus
from reformer_nb.training import TrainSettings, bits_per_byte
from records import append, results, surroundings

segment,rows,longest,held_out = 128,8,2**14,2**17   # bytes read at a time; rows of a batch; bytes that a state lives for, and that are held out

def make(seed):
    "Two layers, two of four heads local"
    torch.manual_seed(seed)
    return ReformerLM(256, 128, 2, longest, heads=4, dim_head=32, bucket_size=32, n_hashes=2, causal='strict', n_buckets=32, n_local_attn_heads=2)

class Forgetful(Trainer):
    "Reads the same segments, each as if it were the first of its text"
    def next_batch(self):
        mine = super().next_batch()
        self.states = [self.model.init_state(len(mine))]
        return mine

def train(carry, steps, seed, corpus):
    "A model that has read the text, with or without its state from the segment before"
    settings = TrainSettings(seq_len=segment, batch_size=rows, steps=steps, lr=2e-3, warmup=1/12, seed=seed, carry_state=True)
    trainer = (Trainer if carry else Forgetful)(make(seed), corpus, settings)
    trainer.fit()
    return trainer.model

def main(quick):
    torch.set_num_threads(1)
    folder,corpus = Path('out/bench') if quick else results,stdlib_corpus()
    steps,valid = (20, corpus.valid[:2**12+1]) if quick else (600, corpus.valid[:held_out+1])
    for seed in (0,) if quick else (0, 1):
        for carry in (False, True):
            start = time.process_time()
            model = train(carry, steps, seed, corpus)
            seconds = time.process_time()-start
            row = dict(segment=segment, carried=carry, seed=seed, tokens=steps*rows*segment, read_apart=round(bits_per_byte(model, valid, segment), 4),
                       read_on=round(bits_per_byte(model, valid, segment, longest=longest), 4), cpu_seconds=round(seconds))
            append(folder/'recurrence.csv', {**row, **surroundings()})
            print(row, flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='a few steps, and nothing in results/')
    main(p.parse_args().quick)
