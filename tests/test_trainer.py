"Runs under hard conditions: killed at random moments, spread over processes, on a full disk"
import json, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
from reformer_nb.checkpoints import read_weights
from reformer_nb.language_model import ReformerLM

common = textwrap.dedent('''
    import json, os, sys, torch
    from accelerate import Accelerator
    from reformer_nb.data import Corpus
    from reformer_nb.language_model import ReformerLM
    from reformer_nb.trainer import Trainer
    from reformer_nb.training import TrainSettings
    torch.set_num_threads(1)
    def corpus():
        generator = torch.Generator().manual_seed(0)
        words = [torch.randint(97, 123, (5,), generator=generator) for _ in range(40)]
        text = torch.cat([words[i] for i in torch.randint(40, (2000,), generator=generator).tolist()]).to(torch.uint8)
        return Corpus('words', text[:8000], text[8000:9000], text[9000:])
    def model(**options):
        torch.manual_seed(0)
        return ReformerLM(128, 16, 2, 64, heads=2, dim_head=8, bucket_size=8, n_hashes=2, causal=True, **options)
''')

def process(code, *words, launcher=(), **options):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent))
    return subprocess.Popen([sys.executable, *launcher, *((code,) if launcher else ('-c', code)), *map(str, words)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

def run(*args, **options):
    p = process(*args, **options)
    said,complaint = p.communicate(timeout=300)
    return p.returncode,said,complaint

def curve(folder): return [json.loads(l)['bits_per_byte'] for l in (folder/'metrics.jsonl').read_text().splitlines()]

def same_weights(a, b):
    a,b = (read_weights(o/'model.safetensors')[0] for o in (a, b))
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- killed --------------------------------------------------------------------------------------------------------

steady = common + textwrap.dedent('''
    settings = TrainSettings(seq_len=64, batch_size=2, steps=40, save_every=1, eval_every=7, eval_windows=2)
    trainer = Trainer(model(ff_dropout=.1, lsh_dropout=.1), corpus(), settings, out=sys.argv[1], show=False)
    print('ready', flush=True)
    trainer.fit(resume=True)
''')

def test_killed_at_random_moments_and_resumed(tmp_path):
    "A checkpoint is written after each step, so that most kills come while one is being written"
    assert run(steady, tmp_path/'whole')[0]==0
    rng,kills = random.Random(0),0
    for _ in range(10):
        p = process(steady, tmp_path/'killed')
        p.stdout.readline()
        time.sleep(rng.uniform(0, .5))
        p.kill()
        p.communicate()
        kills += p.returncode==-9
        if not p.returncode: break   # it came to its end before it could be killed
    assert kills>=3
    assert run(steady, tmp_path/'killed')[0]==0
    assert curve(tmp_path/'killed')==curve(tmp_path/'whole') and len(curve(tmp_path/'whole'))==40
    assert same_weights(tmp_path/'killed', tmp_path/'whole')
    assert len(list((tmp_path/'killed'/'checkpoints').iterdir()))<=4   # two, the best, and what one kill may leave

def test_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    assert run(steady, tmp_path/'whole')[0]==0
    done = run(steady.replace('steps=40', 'steps=20'), tmp_path/'hurt')   # another schedule, so only the way back is looked at
    assert done[0]==0
    newest = max((tmp_path/'hurt'/'checkpoints').glob('step-*'))
    newest.write_bytes(newest.read_bytes()[:-100])
    code,_,complaint = run(steady, tmp_path/'hurt')
    assert code==0 and 'going back to the checkpoint before' in complaint
    assert len(curve(tmp_path/'hurt'))==40

# ---- several processes ---------------------------------------------------------------------------------------------

spread = common + textwrap.dedent('''
    torch.set_default_dtype(torch.float64)
    settings = TrainSettings(seq_len=64, batch_size=4, steps=int(sys.argv[2]), save_every=5, shard='shard' in sys.argv)
    class Mortal(Trainer):
        def one_step(self, start):
            if 'dies' in sys.argv and self.accelerator.process_index==1 and self.step==8: os.kill(os.getpid(), 9)
            super().one_step(start)
            if self.step==1: print(type(next(self.model.parameters())).__name__, type(next(self.model.parameters()).data).__name__)
    Mortal(model(weight_tie=True), corpus(), settings, out=sys.argv[1], show=False).fit()
''')
no_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch has no gloo')

@pytest.fixture
def script(tmp_path):
    path = tmp_path/'spread.py'
    path.write_text(spread)
    return path

def torchrun(script, *words):
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0')
    return run(str(script), *words, launcher=launcher)

@no_gloo
def test_two_processes_learn_like_one(script, tmp_path):
    assert run(spread, tmp_path/'one', 50)[0]==0
    code,_,complaint = torchrun(script, tmp_path/'two', 50)
    assert code==0, complaint[-2000:]
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('one', 'two'))
    assert len(a)==50 and a[0]-a[-1]>.5
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

@no_gloo
def test_sharded_by_fsdp(script, tmp_path):
    "Two processes hold half of each weight, and write one checkpoint, which loads"
    assert run(spread, tmp_path/'one', 6)[0]==0
    code,said,complaint = torchrun(script, tmp_path/'two', 6, 'shard')
    assert code==0 and 'DTensor' in said, complaint[-2000:]
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('one', 'two'))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    a,b = (dict(ReformerLM.from_pretrained(tmp_path/o).named_parameters()) for o in ('one', 'two'))
    for k,o in a.items(): torch.testing.assert_close(b[k], o, rtol=0, atol=1e-9)

@no_gloo
def test_a_killed_worker_leaves_a_checkpoint(script, tmp_path):
    code,_,complaint = torchrun(script, tmp_path/'run', 20, 'dies')
    assert code!=0 and 'Signal 9' in complaint
    assert run(spread.replace(".fit()", ".fit(resume=True)"), tmp_path/'run', 20)[0]==0
    assert run(spread, tmp_path/'whole', 20)[0]==0
    a,b = (torch.tensor(curve(tmp_path/o), dtype=torch.float64) for o in ('run', 'whole'))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)   # it went on in one process where two had been

# ---- hard conditions -----------------------------------------------------------------------------------------------

small_disk = common + textwrap.dedent('''
    import resource
    settings = TrainSettings(seq_len=64, batch_size=2, steps=6, save_every=2)
    class Full(Trainer):
        def one_step(self, start):
            if self.step==3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))   # files may grow no further
            super().one_step(start)
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # write() says so instead
    Full(model(), corpus(), settings, out=sys.argv[1], show=False).fit()
''')

@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='needs limits on the size of files')
def test_full_disk_loses_nothing(tmp_path):
    code,_,complaint = run(small_disk, tmp_path/'run')
    assert code!=0 and 'step-000000004' in complaint
    assert [p.name for p in (tmp_path/'run'/'checkpoints').iterdir()]==['step-000000002.safetensors']
    read_weights(tmp_path/'run'/'checkpoints'/'step-000000002.safetensors')
