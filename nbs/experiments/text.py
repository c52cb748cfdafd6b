"""The paper's experiments on text, small: `python nbs/experiments/text.py [part ...] [--quick]`

A byte model of two layers learns the source files of Python's standard library in windows of 2048. Runs differ in what
their names say, and in nothing else: data, steps, recipe and held-out windows are the same. Parts:

    base     two hash rounds, twice, full attention, local attention
    lsh      half of the heads local
    strict   strict causality, with hashing in all heads and in half of them
    figure3  queries and keys with projections of their own; one stream of residuals
    figure4  1, 4 and 8 hash rounds
    context  hashed, full, local and half local attention: as many bytes, in windows of 4096 and half as many steps
    seeds    another seed of three more runs, for the spread

Each finished run adds a row to results/text.csv, its curve to results/text_curves.csv, what it reads in other ways to
results/text_reads.csv, and what later bytes tell it to results/text_leak.csv. A run that has a row is not repeated.
`--quick` trains three steps at a shorter length and writes to out/bench.
"""
import argparse, copy, math, random, statistics, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from reformer_nb import LSHSelfAttention, ReformerLM, attention_recall
from reformer_nb.attention import rotate_queries
from reformer_nb.batches import batch_at, windows
from reformer_nb.data import stdlib_corpus
from reformer_nb.recorder import attention_layers
from reformer_nb.shared_qk import join_masks
from records import append, read, results, surroundings

heads,warm_up,every = 4,25,50   # attention heads; steps until the full learning rate; steps in a point of a curve
held_out,few = 64,8             # windows of held-out files behind a result, half as many of twice the length; and behind a point of a curve

@dataclass(frozen=True)
class Run:
    "All that decides how a run goes"
    attention:str = 'LSH-2'   # or another number of rounds, 'Full', 'Separate', 'Local'
    variant:str = ''          # what else differs, a key of `variants`
    length:int = 2048         # bytes of a window; 4096 in the part `context`
    chunk:int = 32            # chunk length; there are length/chunk buckets, and a local head sees windows of two chunks
    dim:int = 128             # width of the model
    lr:float = 1e-2           # of AdamW with betas .9, .95, at its highest
    steps:int = 500           # of training, one window each
    seed:int = 0              # of weights, data and rotations

variants = {'': {}, 'half local': dict(n_local_attn_heads=heads//2), 'strict': dict(causal='strict', n_buckets=16),
            'strict, half local': dict(causal='strict', n_buckets=16, n_local_attn_heads=heads//2),
            'reversible': dict(reverse_thres=0), 'one stream': {}}

# ---- layers and stacks to compare with --------------------------------------------------------------------------

class Separate(LSHSelfAttention):
    "Full causal attention as in a Transformer: keys have a projection of their own, and a token may look at itself"
    def __init__(self, **options):
        super().__init__(**options)
        self.tok = nn.Linear(self.toqk.in_features, self.toqk.out_features, bias=False)
    def with_state(self, x, buckets=None, *, pos_emb=None, layer=0):
        q,v = self.split_heads(x)
        k = self.tok(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q,k = (rotate_queries(o, pos_emb) for o in (q, k))
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)),None

class Local(LSHSelfAttention):
    "All heads attend to their surroundings: one bucket, of which they see two chunks"
    def __init__(self, **options):
        super().__init__(**options)
        self.options['bucket_size'] *= 2
    def with_state(self, x, buckets=None, *, pos_emb=None, layer=0):
        qk,v = self.split_heads(x)
        together,n = torch.zeros(*qk.shape[:2], 1, qk.shape[2], dtype=torch.int16),x.shape[1]
        return self.join_heads(self.attend(rotate_queries(qk, pos_emb), v, together, n, join_masks(x))),None

class OneStream(nn.Module):
    "The blocks of a reversible stack as those of an ordinary Transformer"
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
    def streams(self, x, _, f_args, g_args):
        for f,g in self.blocks:
            x = x + f(x, **f_args)
            x = x + g(x, **g_args)
        return x,x

def rebuild(model, kind):
    "Give a model attention of another kind, with the weights that both have"
    for block in model.reformer.layers.blocks:
        old,block[0].fn = block[0].fn,kind(**block[0].fn.config)
        block[0].fn.load_state_dict(old.state_dict(), strict=False)
    return model

def make(run, attention=None):
    "Two layers, four heads, rotary positions, activations kept, which is faster; `attention` in place of that of the run"
    kind = attention or run.attention
    hashed = kind.startswith('LSH-')
    options = dict(causal=True, n_buckets=run.length//run.chunk, reverse_thres=run.length) | variants[run.variant]
    torch.manual_seed(run.seed)
    model = ReformerLM(256, run.dim, 2, run.length, heads=heads, dim_head=run.dim//heads, bucket_size=run.chunk, ff_mult=2,
                       n_hashes=int(kind[4:]) if hashed else 1, use_full_attn=not hashed, hash_seed=run.seed, **options)
    if not hashed and kind!='Full': rebuild(model, dict(Separate=Separate, Local=Local)[kind])
    if run.variant=='one stream': model.reformer.layers = OneStream(model.reformer.layers.blocks)
    return model

# ---- training ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def bits(model, data, length, most):
    "Bits per byte of windows spread over held-out files"
    was = model.training
    losses = [model.eval().loss(o[None]).item() for o in windows(data, length, most=most)]
    model.train(was)
    return sum(losses)/len(losses)/math.log(2)

def train(run, corpus, watch=lambda point: None):
    "The model, its learning curve, and the processor time of a step"
    model = make(run).train()
    opt = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=(.9, .95))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i+1)/warm_up)*(1-i/run.steps))
    curve,recent,seconds = [],[],0.
    for step in range(run.steps):
        tokens,start = batch_at(corpus.train, step, batch_size=1, seq_len=run.length, seed=run.seed),time.process_time()
        loss = model.loss(tokens)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        schedule.step()
        seconds += time.process_time()-start
        recent.append(loss.item()/math.log(2))
        if (step+1)%every and step+1<run.steps: continue
        curve.append(dict(step=step+1, train_bits=round(sum(recent)/len(recent), 4), bits=round(bits(model, corpus.valid, run.length, few), 4)))
        recent = []
        watch(curve[-1])
    return model.eval(),curve,seconds/run.steps

# ---- what a trained model does ----------------------------------------------------------------------------------

def silence(model, first, last):
    "A copy in which the heads `first` to `last`-1 of all layers add nothing"
    other = copy.deepcopy(model)
    for o in attention_layers(other).values(): o.to_out.weight.data[:,first*o.dim_head:last*o.dim_head] = 0
    return other

def ways(run, model):
    "Other ways to read with a trained model: {name: model}"
    local = variants[run.variant].get('n_local_attn_heads', 0)
    yield 'no heads',silence(model, 0, heads)
    if local: yield from (('no local heads', silence(model, 0, local)), ('no LSH heads', silence(model, local, heads)))
    if run!=replace(run, attention='LSH-2', variant='', seed=0): return
    for kind in ('Full', 'Local', 'LSH-1', 'LSH-4', 'LSH-8'):
        other = make(run, kind)
        other.load_state_dict(model.state_dict())
        yield kind,other.eval()

def recall(model, data, length):
    "Share of full attention's weight, and of its 16 largest weights, that the rounds reach, in percent on average over heads that hash"
    found = attention_recall(model, torch.stack(windows(data, length, most=4))[:,:length])
    return {f'recall_{k}': round(100*statistics.mean(o[k] for o in found), 1) for k in ('mass', 'top')}

@torch.no_grad()
def leak(model, data, length, most, per_window=4):
    "Bits of bytes read as the last of what is there, and of the same bytes with what follows in sight"
    draw,apart,together,moved = random.Random(0),[],[],0
    for o in windows(data, length, most=most):
        whole = model(o[None,:length])[0].log_softmax(-1)
        for n in sorted(draw.sample(range(length//8, length), per_window)):
            alone = model(o[None,:n])[0,-1].log_softmax(-1)
            apart.append(-alone[o[n]].item()/math.log(2))
            together.append(-whole[n-1,o[n]].item()/math.log(2))
            moved += (alone.exp()-whole[n-1].exp()).abs().max().item()>.01
    more = [a-b for a,b in zip(apart, together)]
    return dict(bytes=len(more), alone=round(statistics.mean(apart), 4), with_later=round(statistics.mean(together), 4),
                difference=round(statistics.mean(more), 4), standard_error=round(statistics.stdev(more)/len(more)**.5, 4),
                moved=round(100*moved/len(more), 1))

def finish(run, corpus, folder=results, most=held_out):
    "Train and look at the model, and write what is found, unless it is there"
    key = asdict(run)
    if any(all(row[k]==v for k,v in key.items()) for row in read(folder/'text.csv')): return
    print(run, flush=True)
    model,curve,seconds = train(run, corpus, watch=lambda point: print(' ', *point.values(), flush=True))
    hashed = run.attention.startswith('LSH-')
    found = dict(bits=round(bits(model, corpus.valid, run.length, most), 4),
                 **(recall(model, corpus.valid, run.length) if hashed else dict(recall_mass='', recall_top='')),
                 seconds_per_step=round(seconds, 3), parameters=sum(o.numel() for o in model.parameters()))
    print(found, flush=True)
    reads = [key | dict(read=name, bits=round(bits(other, corpus.valid, run.length, most), 4)) for name,other in ways(run, model)]
    if run.attention=='LSH-2': append(folder/'text_leak.csv', key | leak(model, corpus.valid, run.length, most))
    append(folder/'text_curves.csv', *[key | point for point in curve])
    append(folder/'text_reads.csv', *reads)
    append(folder/'text.csv', key | found | dict(corpus=corpus.name) | surroundings())

# ---- what the notebook shows ------------------------------------------------------------------------------------

colors = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#555555')

def select(rows, **wanted):
    "Rows with the wanted values"
    return [row for row in rows if all(row[k]==v for k,v in wanted.items())]

def name(row): return ', '.join(o for o in (row['attention'], row['variant']) if o)

def spread(rows):
    "Runs of which there are two seeds, and how far these are apart"
    for o in select(rows, seed=1):
        first, = select(rows, seed=0, **{k: o[k] for k in ('attention', 'variant', 'length')})
        yield dict(run=name(o), length=o['length'], seed_0=first['bits'], seed_1=o['bits'], apart=round(abs(first['bits']-o['bits']), 4))

def against(rows, base, others, length=Run.length):
    "Bits of those runs at a length that are there, and how many more these are than those of the first, beside the spread of all seeds"
    noise,known = max((o['apart'] for o in spread(rows)), default=math.inf),{name(o): o for o in select(rows, seed=0, length=length)}
    for wanted in (base, *others) if base in known else ():
        if not (row := known.get(wanted)): continue
        more = row['bits']-known[base]['bits']
        yield dict(run=wanted, bits=row['bits'], more=f'{more:+.3f}', **{'beyond the spread': 'yes' if abs(more)>noise else 'no'},
                   parameters=row['parameters'], **{'s per step': row['seconds_per_step']})

def silenced(rows, reads, length=Run.length):
    "What models lose without some of their heads, and what their rounds reach of full attention"
    for row in select(rows, seed=0, length=length):
        found = {o['read']: f"{o['bits']-row['bits']:+.3f}" for o in select(reads, seed=0, length=length) if name(o)==name(row)}
        yield dict(run=name(row), bits=row['bits']) | {f'without {k[3:]}': found.get(k, '') for k in ('no heads', 'no LSH heads', 'no local heads')} | {
            'weight reached, %': row['recall_mass'], 'of the 16 largest, %': row['recall_top']}

def plot_curves(curves, names, ax, length=Run.length):
    "Held-out bits against steps, a colour for each of `names`, {label: what to select}"
    for (label,wanted),color,style in zip(names.items(), colors, ('-', '--', '-.', ':', '-', '--')):
        points = select(curves, seed=0, length=length, **wanted)
        ax.plot([o['step'] for o in points], [o['bits'] for o in points], style, color=color, lw=1.4, label=label)
    ax.set(xlabel='steps', ylabel='held-out bits per byte')
    if ax.lines: ax.legend(frameon=False, fontsize=8)
    return ax

# ---- command line -----------------------------------------------------------------------------------------------

def runs(parts):
    "The runs of some parts, those first on which most depends"
    full,lsh = Run('Full'),Run()
    of = dict(base=[lsh, full, Run('Local'), replace(lsh, seed=1)],
              lsh=[replace(lsh, variant='half local')],
              strict=[replace(lsh, variant=o) for o in ('strict', 'strict, half local')],
              figure3=[Run('Separate'), replace(full, variant='one stream')],
              figure4=[Run(f'LSH-{o}') for o in (1, 4, 8)],
              context=[replace(o, length=4096, steps=250) for o in (lsh, full, Run('Local'), replace(lsh, variant='half local'))],
              seeds=[replace(o, seed=1) for o in (full, Run('Local'), replace(lsh, variant='half local'))])
    return [o for part in parts for o in of[part]]

parts = ('base', 'lsh', 'strict', 'figure3', 'figure4', 'context', 'seeds')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=parts, help=f'of {", ".join(parts)}; all if left out')
    p.add_argument('--quick', action='store_true', help='three steps at length 512, and nothing in results/')
    a = p.parse_args()
    if bad := set(a.parts)-set(parts): p.error(f'no such part: {" ".join(bad)}')
    torch.set_num_threads(1)
    corpus = stdlib_corpus()
    for run in runs(a.parts):
        if a.quick: finish(replace(run, length=512, chunk=16, steps=3), corpus, Path('out/bench').resolve(), most=2)
        else: finish(run, corpus, most=held_out*Run.length//run.length)

if __name__=='__main__': main()
