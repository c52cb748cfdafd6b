"`install()`: this package under the name of reformer_pytorch, in a process of its own"
import subprocess, sys
import pytest
import reformer_nb
import torch
from reformer_nb.compat import upstream_modules
from reformer_nb.positions import position_angles
from reformer_nb.stand_ins import as_angles

def run(code):
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    return res.returncode,res.stdout,res.stderr

def test_install():
    code = '''
import reformer_nb.compat as compat
compat.install()
compat.install()   # twice is once
import importlib.util
import reformer_pytorch, reformer_pytorch.reversible
from reformer_pytorch import LSHAttention, LSHSelfAttention, Reformer, ReformerLM, ReformerEncDec, Recorder, Autopadder
from reformer_pytorch.reformer_pytorch import (Always, default, exists, cast_tuple, max_neg_value, FullQKAttention, FeedForward, Chunk, PreNorm, ReZero, ScaleNorm,
    AbsolutePositionalEmbedding, FixedPositionalEmbedding, AxialPositionalEmbedding, PKM, GELU, ReversibleSequence)
from reformer_pytorch.reversible import ReversibleBlock, ReversibleSequence
from reformer_pytorch.generative_tools import TrainingWrapper, top_k, top_p
from reformer_pytorch.autopadder import Autopadder as A
from reformer_pytorch.recorder import Recorder as R
from reformer_pytorch.reformer_enc_dec import ReformerEncDec as E
assert (A,R,E)==(Autopadder,Recorder,ReformerEncDec) and reformer_pytorch.ReformerLM is reformer_pytorch.reformer_pytorch.ReformerLM
assert importlib.util.find_spec('reformer_pytorch') is not None
model = ReformerLM(num_tokens=50, dim=32, depth=1, max_seq_len=64, bucket_size=8)
assert model.config['scale']==64**-.5 and model.config['look_back']=='rounds' and model.config['hash_seed'] is None and model.config['ff_chunks']==100
import pickle, copy
pickle.loads(pickle.dumps(copy.deepcopy(model)))
try: import reformer_pytorch.unknown
except ModuleNotFoundError: print('fine')
'''
    code,out,err = run(code)
    assert not code and out=='fine\n', err

def test_install_after_the_real_one():
    code = '''
import sys, types
sys.modules['reformer_pytorch'] = types.ModuleType('reformer_pytorch')   # somebody imported it
from reformer_nb.compat import install
install()
'''
    code,_,err = run(code)
    assert code and 'already imported' in err and 'before' in err

def test_a_program_runs_as_it_is(tmp_path):
    "With its arguments, its own folder on the path, and the name that a program has"
    (tmp_path/'beside.py').write_text('width = 16\n')
    (tmp_path/'train.py').write_text('''
import pickle, sys
import reformer_pytorch
from beside import width
class Mine: pass
if __name__=='__main__':
    pickle.loads(pickle.dumps(Mine()))   # found where it was defined
    print(sys.argv[1:], reformer_pytorch.LSHSelfAttention(dim=width, heads=2).__module__)
''')
    command = [sys.executable, '-c', 'from reformer_nb.compat import run_program; run_program()']
    res = subprocess.run([*command, tmp_path/'train.py', '--lr', '1'], capture_output=True, text=True)
    assert res.stdout=="['--lr', '1'] reformer_nb.stand_ins\n", res.stderr
    (tmp_path/'links').mkdir()
    (tmp_path/'links'/'run.py').symlink_to(tmp_path/'train.py')   # Python looks beside the file, not beside the link
    res = subprocess.run([*command, tmp_path/'links'/'run.py'], capture_output=True, text=True)
    assert res.stdout=='[] reformer_nb.stand_ins\n', res.stderr
    for args,says in (([], 'path of a program'), ([tmp_path/'no.py'], 'no.py')):
        res = subprocess.run([*command, *args], capture_output=True, text=True)
        assert res.returncode and says in res.stderr.splitlines()[-1], res.stderr

def test_modules_are_not_installed_by_looking_at_them():
    before = dict(sys.modules)
    upstream_modules.__wrapped__()   # not what an earlier call has made
    assert {k for k in sys.modules if k.startswith('reformer_pytorch')}=={k for k in before if k.startswith('reformer_pytorch')}

@pytest.mark.parametrize('dtype,tolerance', ((torch.float32, 1e-5), (torch.float64, 1e-12)))
def test_tables_of_sines_become_angles(dtype, tolerance):
    angles = position_angles(torch.arange(50), 8, dtype)
    found = as_angles(torch.cat([angles.sin(), angles.cos()], dim=-1)[None], 8)
    assert found.shape==(50,4)
    for f in (torch.sin, torch.cos): torch.testing.assert_close(f(found), f(angles), rtol=0, atol=tolerance)
    assert as_angles(angles, 8) is angles and as_angles(None, 8) is None

def test_saving_writes_a_model_of_this_package(tmp_path):
    names = upstream_modules()['reformer_pytorch']
    torch.manual_seed(0)
    model = names.ReformerLM(num_tokens=50, dim=32, depth=1, max_seq_len=64, bucket_size=8, weight_tie_embedding=True).eval()
    model.save_pretrained(tmp_path)
    again,x = reformer_nb.ReformerLM.from_pretrained(tmp_path),torch.arange(48)[None]
    assert type(again) is reformer_nb.ReformerLM
    results = []
    for o in (model, again):
        torch.manual_seed(1)
        results.append(o(x))
    assert torch.equal(*results)
