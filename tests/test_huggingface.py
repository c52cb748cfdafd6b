"Reformers of Hugging Face, loaded here: the same numbers; and what is wrong there is right here"
from itertools import product
import pytest
import torch
import torch.nn.functional as F
import hf
from grids import sample
from reformer_nb import ReformerLM

def close(a, b, atol=1e-9): torch.testing.assert_close(a, b, rtol=0, atol=atol)

def draw(config, n, b=3, seed=0): return torch.randint(1, config.vocab_size, (b, n), generator=torch.Generator().manual_seed(seed))

def masks(kind, b, n):
    if kind=='none': return None
    if kind=='end': return (torch.arange(n) < torch.tensor([n, n-3, max(1, n//3)])[:,None]).long()
    return (torch.rand(b, n, generator=torch.Generator().manual_seed(n)) > .3).long().index_fill(1, torch.tensor([0]), 1)

def pair(seed, task='causal_lm', **options):
    decoder = dict(is_decoder=task!='masked_lm') if task in ('causal_lm','masked_lm') else {}
    if task=='causal_lm': decoder.update(local_num_chunks_after=0, lsh_num_chunks_after=0)   # which that class asks for
    if task=='question_answering': decoder['num_labels'] = 2
    theirs = hf.new_model(hf.random_config(seed, **{**decoder, **options}), task, seed)
    return theirs,ReformerLM.from_huggingface(theirs, task)

# the same numbers

tasks = list(hf.classes)
grid = list(product(range(40), ('none','end','holes'), ('whole','short','odd')))

@pytest.mark.parametrize('seed,mask,length', sample(grid, 60))
def test_outputs_and_buckets(seed, mask, length):
    "All options, tasks, masks, lengths: outputs of real tokens to 1e-9, and the same buckets"
    task = tasks[seed%5]
    theirs,ours = pair(seed, task)
    n = dict(whole=48, short=min(theirs.config.lsh_attn_chunk_length, theirs.config.local_attn_chunk_length), odd=29)[length]
    tokens,seen = draw(theirs.config, n),masks(mask, 3, n)
    with torch.no_grad(), hf.single_draws():
        with hf.our_buckets() as mine: got = hf.our_outputs(ours, task, tokens, seen)
        with hf.heard_buckets(theirs) as want_buckets: want = hf.outputs(theirs, task, tokens, seen)
    assert len(mine)==len(want_buckets)
    for a,b in zip(mine, want_buckets): assert torch.equal(a.long(), b)
    real = seen.bool() if seen is not None and got.ndim==3 else ...
    close(got[real], want[real])
