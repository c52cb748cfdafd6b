"A reversible stack under DistributedDataParallel: two processes give the gradients of one over the whole batch"
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reformer_nb.feed_forward import FeedForward, PreNorm
from reformer_nb.reversible_sequence import ReversibleSequence
from reformer_nb.self_attention import LSHSelfAttention
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch has no gloo')
world,rows,n,dim = 2,2,20,12
# name: (blocks share their modules, a layer takes no part, find_unused_parameters, steps)
cases = {'plain': (False,False,False,1), 'find_unused': (False,False,True,1), 'unused': (False,True,True,1),
         'tied': (True,False,False,1), 'tied_find_unused': (True,False,True,1), 'steps': (False,False,False,3)}

class Model(nn.Module):
    "Angles, a reversible stack, and a layer that no output depends on"
    def __init__(self, tied, unused):
        super().__init__()
        self.angles = nn.Parameter(torch.randn(n, 2))
        shared = self.pair()
        self.stack = ReversibleSequence(nn.ModuleList([shared if tied else self.pair() for _ in range(3)]))
        if unused: self.idle = nn.Linear(dim, dim)

    def pair(self):
        attn = LSHSelfAttention(dim, 3, bucket_size=4, n_hashes=2, causal=True)
        return nn.ModuleList([attn, PreNorm(dim, FeedForward(dim, 2))])

    def forward(self, x): return sum(self.stack.streams(x, x, dict(pos_emb=self.angles)))

def new_model(tied, unused):
    torch.manual_seed(0)
    return Model(tied, unused).double()

def batches(steps):
    g = torch.Generator().manual_seed(1)
    return torch.randn(steps, 2, world*rows, n, dim, dtype=torch.float64, generator=g)

def step_grads(model, x, w):
    "Gradients of the mean over the rows"
    model.zero_grad()
    (w*model(x)).sum((1,2)).mean().backward()
    return {k.removeprefix('module.'): None if p.grad is None else p.grad.clone() for k,p in model.named_parameters()}

def worker(rank, folder):
    "Gradients of all cases on this rank's share of the rows"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    try:
        mine,found = slice(rank*rows, (rank+1)*rows),{}
        for name,(tied,unused,find,steps) in cases.items():
            model = DistributedDataParallel(new_model(tied, unused), find_unused_parameters=find)
            found[name] = [step_grads(model, x[mine], w[mine]) for x,w in batches(steps)]
        torch.save(found, f'{folder}/{rank}.pt')
    finally: dist.destroy_process_group()

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What the two processes computed"
    folder = tmp_path_factory.mktemp('ddp')
    mp.spawn(worker, (str(folder),), nprocs=world)
    return [torch.load(folder/f'{rank}.pt') for rank in range(world)]

@pytest.mark.parametrize('reverse_thres', (0,n))
@pytest.mark.parametrize('name', cases)
def test_ddp_matches_one_process(found, name, reverse_thres):
    tied,unused,_,steps = cases[name]
    model = new_model(tied, unused)
    model.stack.reverse_thres = reverse_thres
    for k,(x,w) in enumerate(batches(steps)):
        want = step_grads(model, x, w)
        assert any(o.abs().max()>1e-3 for o in want.values() if o is not None)
        for rank in range(world):
            got = found[rank][name][k]
            assert got.keys()==want.keys()
            for p,o in want.items():
                if o is None: assert got[p] is None or not got[p].any(), p
                else: torch.testing.assert_close(got[p], o, rtol=1e-12, atol=1e-12, msg=lambda m, p=p: f'{p}: {m}')
