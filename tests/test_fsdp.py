"Models in shares (FSDP2): two processes get the weights of one over the whole batch, however the model is wrapped"
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from reformer_nb.language_model import ReformerLM
from reformer_nb.reversible_sequence import ReversibleSequence
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch has no gloo')
world,rows,n,steps = 2,2,37,2
options = dict(dim=12, depth=2, heads=3, dim_head=4, max_seq_len=n, bucket_size=4, n_hashes=2, causal=True)
tied = dict(weight_tie=True)

class Foreign(nn.Module):
    "A reversible stack around blocks that know nothing of it"
    def __init__(self):
        super().__init__()
        def pair(): return nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.Tanh()) for _ in range(2))
        self.table,self.stack,self.head = nn.Embedding(30, 12),ReversibleSequence(nn.ModuleList(pair() for _ in range(2))),nn.Linear(12, 30)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(sum(self.stack.streams(x, x)))

def new_model(**more):
    torch.manual_seed(0)
    return (Foreign() if more.get('foreign') else ReformerLM(30, **options, **more)).double()

def blocks(model): return (model.stack if isinstance(model, Foreign) else model.reformer.layers).blocks
def branches(model): return [f for pair in blocks(model) for f in pair]
def stack(model): return [model.reformer.layers]
def inner(model): return [f.fn for f in branches(model)]
def nobody(model): return []

# name: (what is wrapped besides the whole model, options, short enough to run without reversibility)
cases = {'root': (nobody, {}, False), 'layers': (branches, {}, False), 'stack': (stack, {}, False), 'plain': (branches, {}, True),
         'root_tied': (nobody, tied, False), 'stack_tied': (stack, tied, False), 'memory': (branches, dict(num_mem_kv=3, n_local_attn_heads=1), False),
         'foreign': (nobody, dict(foreign=True), False), 'foreign_layers': (branches, dict(foreign=True), False)}

def batch(step): return torch.randint(30, (world*rows, n+1), generator=torch.Generator().manual_seed(step))

def train(model, mine=slice(None)):
    "Some steps of SGD, in which the size of each gradient counts"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    for step in range(steps):
        optimizer.zero_grad()
        tokens = batch(step)[mine]
        F.cross_entropy(model(tokens[:,:-1]).transpose(1, 2), tokens[:,1:]).backward()
        optimizer.step()
    return {k: (o.full_tensor() if hasattr(o, 'full_tensor') else o).detach().clone() for k,o in model.named_parameters()}

def ready(name):
    parts,more,short = cases[name]
    model = new_model(**more)
    if short: model.reformer.layers.reverse_thres = n
    return parts(model),model

def worker(rank, folder):
    "Weights of all cases after training on this rank's share of the rows"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    mesh,found = init_device_mesh('cpu', (world,)),{}
    for name in cases:
        parts,model = ready(name)
        for o in (*parts, model): fully_shard(o, mesh=mesh)
        found[name] = train(model, slice(rank*rows, (rank+1)*rows))
    model = new_model()
    for o in (*inner(model), model): fully_shard(o, mesh=mesh)
    try: train(model)
    except ValueError as e: found['refused'] = str(e)
    model = fully_shard(new_model(), mesh=mesh)
    try: model.loss(batch(0))
    except ValueError as e: found['loss'] = str(e)
    register_fsdp_forward_method(model, 'loss')
    model.loss(batch(0)[rank*rows:(rank+1)*rows]).backward()
    found['grads'] = {k: o.grad.full_tensor() for k,o in model.named_parameters()}
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What the two processes computed"
    folder = tmp_path_factory.mktemp('fsdp')
    mp.spawn(worker, (str(folder),), nprocs=world)
    return [torch.load(folder/f'{rank}.pt') for rank in range(world)]

@pytest.mark.parametrize('name', cases)
def test_fsdp_matches_one_process(found, name):
    _,model = ready(name)
    before = {k: o.detach().clone() for k,o in model.named_parameters()}
    want = train(model)
    assert sum(not torch.equal(o, before[k]) for k,o in want.items())>=len(want)-1
    for rank in range(world):
        for k,o in want.items(): torch.testing.assert_close(found[rank][name][k], o, rtol=0, atol=1e-9, msg=lambda m, k=k: f'{k}: {m}')

def test_wrapping_inside_of_a_branch_is_refused(found):
    for o in found: assert 'F of block 0' in o['refused'] and 'wrap' in o['refused']

def test_a_loss_on_shares_is_refused_until_it_is_registered(found):
    model = new_model()
    model.loss(batch(0)).backward()
    for rank in range(world):
        assert 'register_fsdp_forward_method' in found[rank]['loss']
        for k,o in model.named_parameters(): torch.testing.assert_close(found[rank]['grads'][k], o.grad, rtol=0, atol=1e-12)
