"Each code block of reformer_pytorch's README runs, with only the package name changed, smaller and on the CPU"
import re, subprocess, sys, types
from pathlib import Path
import pytest
import torch
from reformer_nb.compat import upstream_modules
from torch import nn

language_model = '''
# should fit in ~ 5gb - 8k tokens

import torch
from reformer_pytorch import ReformerLM

model = ReformerLM(
    num_tokens= 20000,
    dim = 1024,
    depth = 12,
    max_seq_len = 8192,
    heads = 8,
    lsh_dropout = 0.1,
    emb_dim = 128,        # embedding factorization for further memory savings
    causal = True,        # auto-regressive or not
    bucket_size = 64,     # average size of qk per bucket, 64 was recommended in paper
    n_hashes = 4,         # 4 is permissible per author, 8 is the best but slower
    ff_chunks = 200,      # number of chunks for feedforward layer, make higher if there are memory issues
    weight_tie = False,   # tie parameters of each layer for no memory per additional depth
    attn_chunks = 8,        # process lsh attention in chunks, only way for memory to fit when scaling to 16k tokens
    num_mem_kv = 128,       # persistent learned memory key values, from all-attention paper
    twin_attention = False, # both branches of the reversible network will be attention
    use_full_attn = False,  # use full self attention, for comparison
    full_attn_thres = 1024, # use full attention if context length is less than set value
    use_scale_norm = False  # use scale norm from 'Transformers without tears' paper
).cuda()

x = torch.randint(0, 20000, (1, 8192)).long().cuda()
y = model(x) # (1, 8192, 20000)
'''

reformer = '''
# should fit in ~ 5gb - 8k embeddings

import torch
from reformer_pytorch import Reformer

model = Reformer(
    dim = 512,
    depth = 12,
    max_seq_len = 8192,
    heads = 8,
    lsh_dropout = 0.1,
    causal = True
).cuda()

x = torch.randn(1, 8192, 512).cuda()
y = model(x) # (1, 8192, 512)
'''

self_attention = '''
import torch
from reformer_pytorch import LSHSelfAttention

attn = LSHSelfAttention(
    dim = 128,
    heads = 8,
    bucket_size = 64,
    n_hashes = 8,
    causal = False
)

x = torch.randn(10, 1024, 128)
y = attn(x) # (10, 1024, 128)
'''

lsh_attention = '''
import torch
from reformer_pytorch import LSHAttention

attn = LSHAttention(
    bucket_size = 64,
    n_hashes = 16,
    causal = True
)

qk = torch.randn(10, 1024, 128)
v = torch.randn(10, 1024, 128)

out, attn, buckets = attn(qk, v) # (10, 1024, 128)
# attn contains the unsorted attention weights, provided return_attn is set to True (costly otherwise)
# buckets will contain the bucket number (post-argmax) of each token of each batch
'''

translation = '''
import torch
from reformer_pytorch import ReformerLM

DE_SEQ_LEN = 4096
EN_SEQ_LEN = 4096

encoder = ReformerLM(
    num_tokens = 20000,
    emb_dim = 128,
    dim = 1024,
    depth = 12,
    heads = 8,
    max_seq_len = DE_SEQ_LEN,
    fixed_position_emb = True,
    return_embeddings = True # return output of last attention layer
).cuda()

decoder = ReformerLM(
    num_tokens = 20000,
    emb_dim = 128,
    dim = 1024,
    depth = 12,
    heads = 8,
    max_seq_len = EN_SEQ_LEN,
    fixed_position_emb = True,
    causal = True
).cuda()

x  = torch.randint(0, 20000, (1, DE_SEQ_LEN)).long().cuda()
yi = torch.randint(0, 20000, (1, EN_SEQ_LEN)).long().cuda()

enc_keys = encoder(x)               # (1, 4096, 1024)
yo = decoder(yi, keys = enc_keys)   # (1, 4096, 20000)
'''

captioning = '''
import torch
from torch.nn import Sequential
from torchvision import models
from reformer_pytorch import Reformer, ReformerLM

resnet = models.resnet50(pretrained=True)
resnet = Sequential(*list(resnet.children())[:-4])

SEQ_LEN = 4096

encoder = Reformer(
    dim = 512,
    depth = 6,
    heads = 8,
    max_seq_len = 4096,
)

decoder = ReformerLM(
    num_tokens = 20000,
    dim = 512,
    depth = 6,
    heads = 8,
    max_seq_len = SEQ_LEN,
    causal = True
)

x  = torch.randn(1, 3, 512, 512)
yi = torch.randint(0, 20000, (1, SEQ_LEN)).long()

visual_emb = resnet(x)
b, c, h, w = visual_emb.shape
visual_emb = visual_emb.view(1, c, h * w).transpose(1, 2) # nchw to nte

enc_keys = encoder(visual_emb)
yo = decoder(yi, keys = enc_keys) # (1, 4096, 20000)
'''

recorder = '''
import torch
from reformer_pytorch import Reformer, Recorder

model = Reformer(
    dim = 512,
    depth = 12,
    max_seq_len = 8192,
    heads = 8,
    lsh_dropout = 0.1,
    causal = True
).cuda()

model = Recorder(model)

x = torch.randn(1, 8192, 512).cuda()
y = model(x)

model.recordings[0] # a list of attention weights and buckets for the first forward pass

model.turn_off() # stop recording
model.turn_on() # start recording
model.clear() # clear the recordings

model = model.eject() # recover the original model and remove all listeners
'''

blocks = dict(language_model=language_model, reformer=reformer, self_attention=self_attention, lsh_attention=lsh_attention,
              translation=translation, captioning=captioning, recorder=recorder)
# numbers of the README, and what they shrink to: lengths by 16, widths by 16 or so, thresholds too; bucket sizes and rounds stay
smaller = {20000: 50, 8192: 512, 4096: 256, 1024: 256, 512: 32, 128: 16, 12: 2, 6: 2, 200: 20}

def shrink(code, package='reformer_nb'):
    "The block with smaller numbers, no GPU, and the name of a package"
    code = code.replace('.cuda()', '').replace('reformer_pytorch', package).replace('dim = 1024', 'dim = 64').replace('dim = 512', 'dim = 32')
    code = code.replace('(1, 3, 512, 512)', '(1, 3, 64, 64)').replace('full_attn_thres = 1024', 'full_attn_thres = 64')
    return re.sub(r'\d+', lambda m: str(smaller.get(int(m[0]), m[0])), '\n'.join(o.split('#')[0] for o in code.splitlines()))

def torchvision():
    "What the captioning block needs of it: a ResNet of ten children, of which the first six give 32 channels"
    class ResNet(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 32, 8, stride=4), nn.BatchNorm2d(32), nn.ReLU(), *[nn.Identity() for _ in range(3)], *[nn.Identity() for _ in range(4)])
            self.requires_grad_(False).eval()   # a pretrained network, frozen
    models = types.ModuleType('torchvision.models')
    models.resnet50 = lambda pretrained: ResNet()
    package = types.ModuleType('torchvision')
    package.models = models
    return {'torchvision': package, 'torchvision.models': models}

def run(code, monkeypatch):
    for k,o in torchvision().items(): monkeypatch.setitem(sys.modules, k, o)
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    return names

@pytest.mark.parametrize('name', blocks)
def test_block_runs(name, monkeypatch): run(shrink(blocks[name]), monkeypatch)

def test_language_model_shape(monkeypatch):
    names = run(shrink(language_model), monkeypatch)
    assert names['y'].shape==(1,512,50)
    names['y'].square().mean().backward()
    assert all(p.grad is not None for p in names['model'].parameters())

def test_reformer_shape(monkeypatch): assert run(shrink(reformer), monkeypatch)['y'].shape==(1,512,32)

def test_self_attention_shape(monkeypatch): assert run(shrink(self_attention), monkeypatch)['y'].shape==(10,256,16)

def test_lsh_attention_returns_buckets(monkeypatch):
    names = run(shrink(lsh_attention), monkeypatch)
    assert names['out'].shape==(10,256,16) and not names['attn'].numel()
    buckets = names['buckets'].view(10, 16, 256)
    assert (buckets//4==torch.arange(16)[:,None]).all()   # four buckets a round, in rounds of their own

def test_translation_trains_the_encoder(monkeypatch):
    names = run(shrink(translation), monkeypatch)
    assert names['enc_keys'].shape==(1,256,64) and names['yo'].shape==(1,256,50)
    names['yo'].square().mean().backward()
    for k in ('encoder','decoder'): assert all(p.grad is not None and p.grad.isfinite().all() for p in names[k].parameters())

def test_captioning_trains_the_encoder(monkeypatch):
    "Though nothing that the encoder is given carries a gradient"
    names = run(shrink(captioning), monkeypatch)
    assert not names['visual_emb'].requires_grad and names['yo'].shape==(1,256,50)
    names['yo'].square().mean().backward()
    missing = [k for k,p in names['encoder'].named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing

def test_recorder_records(monkeypatch):
    code = shrink(recorder).replace('model.recordings[0]', 'recordings = list(model.recordings[0])')
    names = run(code, monkeypatch)
    assert [set(o)>={'attn','buckets'} for o in names['recordings']]==[True]*2
    for o in names['recordings']:
        assert o['attn'].shape==(1,8,512,512) and o['buckets'].shape==(1,8,8*512)
        torch.testing.assert_close(o['attn'].sum(-1), torch.ones(1, 8, 512), rtol=0, atol=1e-4)
    assert type(names['model']).__name__=='Reformer'

@pytest.mark.parametrize('name', blocks)
def test_block_runs_under_the_old_name(name, monkeypatch):
    for k,o in upstream_modules().items(): monkeypatch.setitem(sys.modules, k, o)
    run(shrink(blocks[name], 'reformer_pytorch'), monkeypatch)

def test_blocks_run_after_install():
    "In a process of their own, where `reformer_pytorch` means this package"
    lines = ['import sys', 'import test_readme_blocks as t', 'import reformer_nb.compat', 'reformer_nb.compat.install()', 'sys.modules.update(t.torchvision())',
             "for o in t.blocks.values(): exec(t.shrink(o, 'reformer_pytorch'), {})"]
    res = subprocess.run([sys.executable, '-c', '\n'.join(lines)], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert not res.returncode, res.stderr
