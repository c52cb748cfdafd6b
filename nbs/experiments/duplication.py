"""The duplication task of the paper's Table 2: `python nbs/experiments/duplication.py [part ...]`

A sequence is 0w0w with a random word w; loss and accuracy count on the second w alone. Parts:

    table     the four rows of the table, three seeds
    half      the rows with LSH at half the chunk length
    peers     the row LSH-2 with reformer_pytorch and Hugging Face's Reformer, at two learning rates
    small     the same at length 256, at three learning rates, ours too, until 99.5 % are right
    ablation  one change of the recipe at a time, at length 256, until 99.5 % are right

Each finished run adds a row to results/duplication.csv and its learning curve to results/duplication_curves.csv. A run
that has a row there is not repeated, so an interrupted command goes on where it stopped.
"""
import argparse, statistics, time
from dataclasses import asdict, dataclass, replace
import torch
import torch.nn.functional as F
from reformer_nb import ReformerLM
from reformer_nb.batches import duplication_batch
from records import append, read, results, surroundings

symbols,batch_size,every = 127,8,25   # different symbols; sequences in a batch; steps in a point of a curve
evaluations = {'Full': 0, '8': 8, '4': 4, '2': 2, '1': 1}   # hash rounds; 0 is full attention

@dataclass(frozen=True)
class Run:
    "All that decides how a run goes"
    library:str = 'reformer_nb'   # or 'reformer_pytorch', 'transformers'
    trained:str = 'LSH-2'         # or 'Full', 'LSH-1', 'LSH-4'
    length:int = 1024             # tokens of a sequence
    chunk:int = 128               # chunk length; there are length/chunk buckets
    variant:str = ''              # what differs from the recipe, a key of `variants`
    lr:float = 1e-3               # of Adam with betas .9, .98
    steps:int = 400               # of training
    seed:int = 0                  # of weights, data and rotations
    @property
    def n_hashes(self): return 0 if self.trained=='Full' else int(self.trained[4:])

variants = {'': {}, 'scores over √d': dict(scale=64**-.5), 'ScaleNorm': dict(use_scale_norm=True),
            'ReZero, no norm': dict(use_rezero=True), 'tied head': dict(weight_tie_embedding='plain'),
            'fixed rotations': dict(rotations='fixed'),
            'duplicates count once': dict(lsh_allow_duplicate_attention=False),
            'same bucket only': dict(lsh_attend_across_buckets=False),
            'look-back between rounds': dict(look_back='rounds'), 'strict causality': dict(causal='strict'), 'rotary positions': dict(absolute_position_emb=False)}

def ours(run, n_hashes, hash_seed):
    "One layer of width 256, 4 heads, pre-LayerNorm, learned positions, a head of its own"
    options = dict(causal=True, absolute_position_emb=True, ff_mult=1) | variants[run.variant]
    return ReformerLM(symbols+1, 256, 1, run.length, heads=4, bucket_size=run.chunk, n_hashes=n_hashes or 1,
                      use_full_attn=not n_hashes, hash_seed=hash_seed, **options)

def reformer_pytorch(run, n_hashes, hash_seed):
    "The same in reformer_pytorch, which draws rotations from the global generator; in a `small start`, embeddings are as small as ours"
    from reformer_pytorch import ReformerLM as Theirs
    model = Theirs(symbols+1, 256, 1, run.length, heads=4, bucket_size=run.chunk, n_hashes=n_hashes or 1, causal=True,
                   use_full_attn=not n_hashes, absolute_position_emb=True, ff_mult=1, ff_chunks=1)
    if run.variant=='small start':
        for emb in (model.token_emb, model.pos_emb.emb): torch.nn.init.normal_(emb.weight, std=.02)
    return model

class Logits(torch.nn.Module):
    "A model of transformers that returns its logits"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, tokens): return self.model(tokens).logits

def hugging_face(run, n_hashes, hash_seed):
    "The same in transformers; one chunk of the whole length is full attention there"
    from transformers import ReformerConfig, ReformerModelWithLMHead
    config = ReformerConfig(attn_layers=['lsh'], vocab_size=symbols+1, hidden_size=256, feed_forward_size=256, num_attention_heads=4,
        attention_head_size=64, num_hashes=n_hashes or 1, lsh_attn_chunk_length=run.chunk if n_hashes else run.length,
        num_buckets=run.length//run.chunk, axial_pos_embds=False, max_position_embeddings=run.length, is_decoder=True,
        hidden_dropout_prob=0., lsh_attention_probs_dropout_prob=0., hash_seed=None, use_cache=False, tie_word_embeddings=False)
    return Logits(ReformerModelWithLMHead(config))

# library and variant of ours and of each peer
starts = ('reformer_nb', ''),('reformer_pytorch', ''),('reformer_pytorch', 'small start'),('transformers', '')
makers = dict(reformer_nb=ours, reformer_pytorch=reformer_pytorch, transformers=hugging_face)

def make(run, n_hashes, hash_seed=0): return makers[run.library](run, n_hashes, hash_seed)

def batch(step, length, seed):
    return duplication_batch(step, batch_size=batch_size, length=length, num_symbols=symbols, seed=seed)

def second_word(model, tokens):
    "Mean cross-entropy, and share of right guesses, of the second word"
    half = tokens.shape[1]//2
    logits,wanted = model(tokens)[:,half:-1],tokens[:,half+1:]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()),(logits.argmax(-1)==wanted).float().mean()

def train(run, watch=lambda point: None, stop_at=2.):
    "The model and its learning curve, on data that never repeat, so it counts as on new ones; ends early above `stop_at`"
    torch.manual_seed(run.seed)
    model = make(run, run.n_hashes, run.seed)
    optimizer = torch.optim.Adam(model.parameters(), run.lr, betas=(.9, .98))
    curve,recent,wall,cpu = [],[],time.perf_counter(),time.process_time()
    for step in range(1, run.steps+1):
        loss,accuracy = second_word(model, batch(step, run.length, run.seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append((loss.item(), accuracy.item()))
        if step%every and step<run.steps: continue
        mean = [sum(o)/len(recent) for o in zip(*recent)]
        curve.append(dict(step=step, loss=round(mean[0], 4), accuracy=round(100*mean[1], 2),
                          seconds=round(time.perf_counter()-wall, 1), cpu_seconds=round(time.process_time()-cpu, 1)))
        recent = []
        watch(curve[-1])
        if mean[1]>stop_at: break
    return model,curve

@torch.no_grad()
def evaluate(run, model, n_hashes, batches=8):
    "Accuracy in percent on new sequences, each batch with rotations of its own"
    right = []
    for i in range(batches):
        torch.manual_seed(i)
        other = make(run, n_hashes, hash_seed=10**6+i)
        other.load_state_dict(model.state_dict())
        right.append(second_word(other.eval(), batch(i, run.length, 10**6))[1].item())
    return round(100*sum(right)/len(right), 2)

def first_above(curve, accuracy=99):
    "The step at which a curve is first above an accuracy, or an empty string"
    return next((o['step'] for o in curve if o['accuracy']>accuracy), '')

def finish(run, folder=results, stop_at=2.):
    "Train and evaluate, and write a row and a curve, unless the row is there"
    old = read(folder/'duplication.csv')
    key = {k: (float(v) if k=='lr' else v) for k,v in asdict(run).items()}
    if any(all(row[k]==v for k,v in key.items()) for row in old): return
    print(run, flush=True)
    model,curve = train(run, watch=lambda point: print(' ', *point.values(), flush=True), stop_at=stop_at)
    accuracy = {k: evaluate(run, model, n) for k,n in evaluations.items()}
    cost = {k: curve[-1][k] for k in ('cpu_seconds', 'seconds')}
    append(folder/'duplication_curves.csv', *[asdict(run) | point for point in curve])
    append(folder/'duplication.csv', asdict(run) | dict(above_99=first_above(curve)) | accuracy | cost | surroundings())
    print(accuracy, flush=True)

# ---- what the notebook shows ------------------------------------------------------------------------------------

paper = {'Full': (100, 94.8, 92.5, 76.9, 52.5), 'LSH-4': (.8, 100, 99.9, 99.4, 91.9),   # Kitaev et al. 2020, Table 2, in percent
         'LSH-2': (.8, 100, 99.9, 98.1, 86.8), 'LSH-1': (.8, 99.9, 99.6, 94.8, 77.9)}

def select(rows, **wanted):
    "Rows with the wanted values"
    return [row for row in rows if all(row[k]==v for k,v in wanted.items())]

def with_spread(values):
    "Mean and, of several values, standard deviation"
    mean = statistics.mean(values)
    return f'{mean:.1f} ± {statistics.stdev(values):.1f}' if len(values)>1 else f'{mean:.1f}'

def beside_paper(rows, chunk=128):
    "Table 2: each row with what the paper has, accuracy in percent by hash rounds in evaluation"
    for trained,theirs in paper.items():
        ours = select(rows, library='reformer_nb', trained=trained, length=1024, chunk=chunk, variant='', lr=1e-3)
        if not ours: continue
        who = f'ours, {len(ours)} seed{"s"*(len(ours)>1)}'
        yield dict(trained=trained, who=who) | {k: with_spread([o[k] for o in ours]) for k in evaluations}
        yield dict(trained='', who='paper') | dict(zip(evaluations, theirs))

def below_paper(rows, chunk=128):
    "What falls short of the paper where both evaluate with LSH, on average over seeds"
    for trained,theirs in paper.items():
        ours = select(rows, library='reformer_nb', trained=trained, length=1024, chunk=chunk, variant='', lr=1e-3)
        for k,wanted in list(zip(evaluations, theirs))[1:] if ours else ():
            found = statistics.mean(o[k] for o in ours)
            if found<wanted: yield trained,k,round(found, 1),wanted

def settings(row):
    "What a run was, for a table"
    return dict(library=row['library'], variant=row['variant'], lr=row['lr'], seed=row['seed'])

def progress(rows, curves, cpu_seconds=None):
    "For each run its cost and when 99 % were right; also the accuracy after so many seconds of processor time"
    for row in rows:
        curve = select(curves, **{k: row[k] for k in asdict(Run())})
        late = [o['accuracy'] for o in curve if cpu_seconds is None or o['cpu_seconds']<=cpu_seconds]
        at = {} if cpu_seconds is None else {f'% after {cpu_seconds:.0f} s': late[-1] if late else 0.}
        end = curve[-1]
        yield settings(row) | {'steps': end['step'], 'above 99 % at step': row['above_99'] or 'never', '% at the end': end['accuracy'],
                               'processor s/step': round(end['cpu_seconds']/end['step'], 2)} | at | dict(processor=row['processor'])

def our_time(rows, length, chunk):
    "Processor time that our slowest run in the row LSH-2 took"
    return max(o['cpu_seconds'] for o in select(rows, library='reformer_nb', trained='LSH-2', length=length, chunk=chunk, variant='', lr=1e-3))

def beside_peers(rows, curves, length, chunk):
    "Runs of all libraries in the row LSH-2 with the recipe, and how far they are after the time of our slowest"
    found = [o for o in select(rows, trained='LSH-2', length=length, chunk=chunk) if (o['library'],o['variant']) in starts]
    ours = [o for o in found if o['library']=='reformer_nb' and o['lr']==1e-3]
    if not ours or all(o['library']=='reformer_nb' for o in found): return []
    return list(progress(found, curves, cpu_seconds=our_time(rows, length, chunk)))

def plot_curves(curves, names, ax=None):
    "Accuracy against steps, a colour for each of `names`, {label: what to select}"
    import matplotlib.pyplot as plt
    ax = ax or plt.subplots(figsize=(6, 3))[1]
    for (label,wanted),color in zip(names.items(), ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#555555')):
        found = select(curves, **wanted)
        for i,run in enumerate(sorted({tuple(o[k] for k in ('seed', 'lr')) for o in found})):
            points = [o for o in found if (o['seed'],o['lr'])==run]
            x,y = ([o[k] for o in points] for k in ('step', 'accuracy'))
            ax.plot(x, y, color=color, lw=1.2, label=None if i else label)
    ax.set(xlabel='steps', ylabel='accuracy, %', ylim=(-3, 103))
    if ax.lines: ax.legend(frameon=False, fontsize=8)
    return ax

# ---- command line -----------------------------------------------------------------------------------------------

def runs(part, seeds):
    "The runs of a part, the first seed of all rows first"
    rows,small = ('LSH-2', 'LSH-1', 'LSH-4', 'Full'),Run(length=256, chunk=32, seed=seeds[0])
    if part=='table': return [Run(trained=o, seed=s) for s in seeds for o in rows]
    if part=='half': return [Run(trained=o, chunk=64, seed=s) for s in seeds for o in rows if o!='Full']
    if part=='peers': return [Run(library=o, variant=v, lr=lr, seed=seeds[0]) for lr in (1e-3, 3e-3) for o,v in starts[1:]]
    if part=='small': return [replace(small, library=o, variant=v, lr=lr) for lr in (1e-3, 3e-3, 3e-4) for o,v in starts]
    return [replace(small, variant=o, seed=s) for s in seeds for o in variants]

parts = ('table', 'half', 'peers', 'small', 'ablation')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=['table'], help=f'of {", ".join(parts)}; table if left out')
    p.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2], help='0 1 2 if left out')
    p.add_argument('--threads', type=int, default=1, help='of a run; two commands side by side use two cores best')
    a = p.parse_args()
    if bad := set(a.parts)-set(parts): p.error(f'no such part: {" ".join(bad)}')
    torch.set_num_threads(a.threads)
    for part in a.parts:
        for run in runs(part, a.seeds): finish(run, stop_at=.995 if part in ('small', 'ablation') else 2.)

if __name__=='__main__': main()
