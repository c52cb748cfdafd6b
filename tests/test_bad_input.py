"Fifteen kinds of bad input: one clear line each, the exit code 2 where it is a command, and no file is touched"
import errno, mmap, os, subprocess, sys, textwrap
from pathlib import Path
import pytest
import torch
from reformer_nb import cli
from reformer_nb.arguments import parse
from reformer_nb.checkpoints import fingerprint, read_weights, save_pretrained
from reformer_nb.cli import main, write_on
from reformer_nb.language_model import ReformerLM
from safetensors.torch import save_file

text = 'a text of some words, with a few more of them. '*60
small = '--seq-len 64 --dim 16 --depth 1 --heads 2 --dim-head 8 --local-heads 1 --bucket-size 16'.split()

def new_model(**options):
    torch.manual_seed(0)
    return ReformerLM(**{**dict(num_tokens=128, dim=16, depth=1, max_seq_len=64, heads=2, dim_head=8, bucket_size=8, causal=True), **options})

entry = 'import sys; from reformer_nb.cli import main; sys.exit(main())'   # what the installed command runs

def command(*words):
    "The exit code"
    try: return main([*map(str, words)])
    except SystemExit as e: return e.code

def contents(folder):
    "All that is below a folder, to the byte"
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob('*')}

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with a text and a finished run, to copy"
    home = tmp_path_factory.mktemp('finished')
    (home/'text.txt').write_text(text)
    assert command('train', home/'text.txt', '--out', home/'run', *small, '--steps', 2)==0
    return home

@pytest.fixture
def home(tmp_path, finished):
    for p,o in contents(finished).items():
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        if o is not False: (tmp_path/p).write_bytes(o)
    return tmp_path

# ---- commands ------------------------------------------------------------------------------------------------------

def train(home, *words, data='text.txt', out='run'): return 'train', home/data, '--out', home/out, *small, '--steps', 3, *words

def missing_file(home): return train(home, data='nowhere.txt')

def missing_checkpoint(home): return 'generate', home/'nowhere'

def folder_without_text(home):
    (home/'folder'/'.hidden').mkdir(parents=True)
    (home/'folder'/'empty.txt').touch()
    (home/'folder'/'photo.png').write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR'*9)
    return train(home, data='folder')

def binary_file(home):
    (home/'photo.png').write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR'*9)
    return train(home, data='photo.png')

def binary_config(home):
    (home/'run.toml').write_bytes(b'\x89PNG\r\n\x1a\n\0')
    return train(home, '--config', home/'run.toml')

def one_byte(home):
    (home/'one.txt').write_bytes(b'a')
    return train(home, data='one.txt')

def wrong_flag(home): return train(home, '--sequence-len', 9)

def wrong_value(home): return train(home, '--optimizer', 'sgd')

def run_of_another_shape(home): return train(home, '--resume', '--dim', 32)

def finished_run(home): return train(home)

def weights_of_another_shape(home):
    "A file that says other sizes than its tensors have, with a checksum that fits"
    tensors,metadata = read_weights(home/'run'/'model.safetensors')
    config = metadata['config'].replace('"dim": 16', '"dim": 32')
    save_file(tensors, home/'run'/'model.safetensors', dict(config=config, sha256=fingerprint(config, tensors)))
    (home/'run'/'config.json').write_text(config)
    return 'generate', home/'run'

def truncated_weights(home):
    path = home/'run'/'model.safetensors'
    path.write_bytes(path.read_bytes()[:-50])
    return 'evaluate', home/'run', '--data', home/'text.txt'

def corrupted_json(home):
    path = home/'run'/'config.json'
    path.write_text(path.read_text()[:50])
    return 'generate', home/'run'

def out_is_a_file(home): return train(home, out='text.txt')

def empty_batch(home): return train(home, '--batch-size', 0)

def empty_prompt(home): return 'generate', home/'run', '--prompt', ''

def vocabulary_without_some_bytes(home):
    save_pretrained(new_model(), home/'ascii')
    return 'generate', home/'ascii', '--prompt', 'é'

def tokens_that_are_no_bytes(home):
    save_pretrained(new_model(num_tokens=300), home/'words')
    return 'evaluate', home/'words', '--data', home/'text.txt'

def seed_out_of_range(home): return train(home, '--seed', 10**23, out='new')

def seed_out_of_range_in_a_file(home):
    (home/'run.toml').write_text(f'seed = {-10**23}')
    return train(home, '--config', home/'run.toml', out='new')

def wider_than_memory(home): return train(home, '--dim', 4*10**13, out='new')

def wider_than_numbers_are(home): return train(home, '--dim', 2**62, out='new')

def sequence_beyond_the_data(home): return train(home, '--seq-len', 99_999, out='new')

cases = {missing_file: 'nowhere.txt', missing_checkpoint: 'model.safetensors is missing; give the folder', folder_without_text: 'folder holds nothing to read; give files',
         binary_file: 'photo.png is no text in UTF-8', binary_config: 'run.toml is no TOML', one_byte: 'one.txt has 1 bytes, too few',
         wrong_flag: 'unknown argument --sequence-len, did you mean --seq-len?', wrong_value: "invalid choice: 'sgd'",
         run_of_another_shape: 'holds a run with dim=16, this one has 32', finished_run: 'holds a run; choose another folder',
         weights_of_another_shape: 'other tensors do not fit a ReformerLM', truncated_weights: 'model.safetensors is damaged',
         corrupted_json: 'config.json contradicts model.safetensors', out_is_a_file: 'text.txt', empty_batch: 'batch_size=0 must be at least 1',
         empty_prompt: "prompt='' is empty", vocabulary_without_some_bytes: 'ascii has num_tokens=128, the command reads and writes the 256 values of a byte',
         tokens_that_are_no_bytes: 'words has num_tokens=300, the command', seed_out_of_range: f'--seed={10**23} is out of range; give a whole number from 0 to 2**63-1',
         seed_out_of_range_in_a_file: f'--seed={-10**23} is out of range; give a whole number from 0 to 2**63-1',
         wider_than_memory: 'does not fit in memory; for training, try a smaller dim,', wider_than_numbers_are: 'does not fit in memory; for training, try a smaller dim,',
         sequence_beyond_the_data: 'too few for seq_len=99999; give more text'}

@pytest.mark.parametrize('case', cases, ids=lambda case: case.__name__)
def test_commands(home, case, capsys):
    words = case(home)
    before = contents(home)
    assert command(*words)==2
    told = capsys.readouterr().err
    assert told.startswith('reformer-nb') and told.count('\n')==1 and cases[case] in told and 'Errno' not in told
    assert contents(home)==before

def test_a_step_longer_than_the_run(home, capsys):
    assert command(*train(home, '--minutes', .0001, '--steps', 'none', '--dry-run', out='new'))==0
    assert 'not one step fits into 0.0001 minutes' in capsys.readouterr().out and not (home/'new').exists()

def test_a_prompt_that_is_no_text(home, capsys):
    "Bytes that a shell hands on are those that the model reads; a character may be ended by the model"
    prompt = os.fsdecode(b'a\xff')
    assert command('generate', home/'run', '--prompt', prompt, '--length', 3)==0
    assert capsys.readouterr().out.startswith('a\ufffd')
    model = ReformerLM.from_pretrained(home/'run')
    torch.nn.init.zeros_(model.to_logits.weight)
    with torch.no_grad(): model.to_logits.bias.fill_(-9).index_fill_(0, torch.tensor(0xa9), 9.)
    assert ''.join(write_on(model, os.fsdecode(b'caf\xc3'), 1))=='café'

@pytest.mark.skipif(os.name!='posix', reason='pipes')
@pytest.mark.parametrize('words', [['--stream'], []])
def test_a_reader_that_has_enough(home, words):
    "As in `reformer-nb generate … | head -c 9`"
    process = subprocess.Popen([sys.executable, '-c', entry, 'generate', str(home/'run'), '--length', '9', *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    told = process.stderr.read()
    assert (process.wait(), told)==(141, b'')

def test_exit_code_of_the_process(home):
    done = subprocess.run([sys.executable, '-c', entry, 'generate', str(home)], capture_output=True, text=True)
    assert done.returncode==2 and not done.stdout and done.stderr.count('\n')==1 and done.stderr.startswith('reformer-nb: ')

def test_damaged_checkpoint(home, capsys):
    "One line says so, and the run goes on from the checkpoint before"
    words = train(home, '--save-every', 1, out='hurt')
    assert command(*words)==0
    newest = max((home/'hurt'/'checkpoints').iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert command(*words, '--resume', '--steps', 4)==0
    told = [o for o in capsys.readouterr().err.splitlines() if 'damaged' in o or 'UserWarning' in o]
    assert len(told)==1 and told[0].startswith('reformer-nb: ') and newest.name in told[0] and 'going back to the checkpoint before' in told[0]
    assert len((home/'hurt'/'metrics.jsonl').read_text().splitlines())==4

# ---- memory --------------------------------------------------------------------------------------------------------

def raising(error):
    def fail(*args, **options): raise error
    return fail

def test_a_probe_that_fails_is_told(capsys, monkeypatch):
    "`plan` measures in other processes; which case had no room there is what the user must know"
    says = "a step of 1 rows of 4096 tokens could not be measured: RuntimeError: DefaultCPUAllocator: can't allocate memory"
    monkeypatch.setattr(cli, 'plan', raising(ChildProcessError(says)))
    assert command('plan')==2
    assert capsys.readouterr().err==f'reformer-nb: {says}\n'

@pytest.mark.parametrize('error', [OSError(errno.ENOMEM, 'Cannot allocate memory'), MemoryError()], ids=['system', 'Python'])
def test_no_room_for_a_text(home, capsys, monkeypatch, error):
    "Whoever says so, the remedy is one of the command, or it says of which"
    monkeypatch.setattr(cli, 'load_corpus', raising(error))
    assert command('evaluate', home/'run')==2
    told = capsys.readouterr().err
    assert 'this does not fit in memory; for training, try a smaller dim' in told and 'for a large corpus, --mapped' in told and 'path' not in told

def test_no_room_for_a_map(home, capsys, monkeypatch):
    "It is not the fault of the file"
    monkeypatch.setattr(mmap, 'mmap', raising(OSError(errno.ENOMEM, 'Cannot allocate memory')))
    assert command('evaluate', home/'run', '--data', home/'text.txt', '--mapped')==2
    assert 'this does not fit in memory' in capsys.readouterr().err

# ---- targets that cannot be written ---------------------------------------------------------------------------------

def last_line(told): return told.strip().splitlines()[-1]

@pytest.mark.skipif(os.name!='posix', reason='modes of folders')
def test_read_only_target(home, capsys):
    "For root, who may write everywhere, a file system that takes no files"
    folder = home/'locked'
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK): folder = Path('/proc')
    if not folder.exists(): pytest.skip('no folder that may not be written')
    before = contents(home)
    assert command('train', home/'text.txt', '--out', folder/'run', *small, '--steps', 3)==2
    told = capsys.readouterr().err
    assert told.count('\n')==1 and str(folder/'run') in told and 'with the right to use it' in told
    assert contents(home)==before and not (folder/'run').exists()

limit = textwrap.dedent('''
    import resource, signal, sys
    from reformer_nb import trainer
    from reformer_nb.cli import main
    def one_step(self, start, before=trainer.Trainer.one_step):
        if self.step==2: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))   # files may grow no further
        before(self, start)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # writing fails instead
    trainer.Trainer.one_step = one_step
    sys.exit(main())
''')

@pytest.fixture(params=('tmpfs', 'limit'))
def small_disk(request, home):
    "A folder, the Python code that trains into it until it is full, and how to make room"
    disk = home/'disk'
    disk.mkdir()
    if request.param=='limit':
        yield disk,limit,lambda: None
        return
    def mount(*words): return subprocess.run(['mount', *words, str(disk)], capture_output=True).returncode
    if mount('-t', 'tmpfs', '-o', 'size=256k', 'tmpfs'): pytest.skip('a tmpfs may not be mounted')
    yield disk,entry,lambda: mount('-o', 'remount,size=9m')
    subprocess.run(['umount', str(disk)], check=True)

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs a small disk, or limits on the size of files')
def test_full_disk(home, small_disk):
    "The run ends with a line, its checkpoints are intact, and it goes on when there is room"
    disk,code,make_room = small_disk
    words = train(home, '--save-every', 1, '--keep', 9, out='disk/run')
    done = subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode==2 and 'Traceback' not in done.stderr
    assert last_line(done.stderr).startswith('reformer-nb: ') and 'make room' in last_line(done.stderr)
    kept = sorted((disk/'run'/'checkpoints').iterdir())
    assert kept
    for path in kept: read_weights(path)
    make_room()
    assert command(*words, '--resume')==0
    assert len((disk/'run'/'metrics.jsonl').read_text().splitlines())==3

# ---- numbers that are none ------------------------------------------------------------------------------------------

def test_a_loss_that_is_no_number(home, capsys):
    "The run ends before the step; its checkpoints stay, and so does a finished run beside it"
    before = contents(home/'run')
    assert command(*train(home, '--lr', '1e30', '--warmup', 0, '--clip', 1e30, '--save-every', 1, out='new'))==2
    told = last_line(capsys.readouterr().err)
    assert 'the loss is nan' in told and 'try a smaller lr than' in told
    assert contents(home/'run')==before and not (home/'new'/'model.safetensors').exists()
    for path in (home/'new'/'checkpoints').iterdir(): read_weights(path)

# ---- tensors --------------------------------------------------------------------------------------------------------

tokens = torch.arange(40).view(2, 20)
learned = dict(absolute_position_emb=True)
tensor_cases = {
    'no rows': (dict(), tokens[:0], ValueError, r'targets \(0, 19\) hold no real token, so there is no loss; give'),
    'no tokens': (dict(), tokens[:,:0], ValueError, 'hold no real token, so there is no loss; give'),
    'one token': (dict(), tokens[:,:1], ValueError, 'hold no real token, so there is no loss; give'),
    'floats': (dict(), tokens.float(), TypeError, r'tokens are torch.float32, not integers; give .*tokens.long\(\)'),
    'too large an id': (dict(), tokens+100, ValueError, 'token 139 is outside the vocabulary of num_tokens=128; '),
    'a negative id': (dict(), tokens-1, ValueError, 'token -1 is outside the vocabulary of num_tokens=128; '),
    'longer than learned positions': (learned, torch.zeros(1, 66, dtype=torch.int64), ValueError, '65 tokens are more than max_seq_len=64; shorten'),
    'longer than axial positions': (dict(axial_position_emb=True), torch.zeros(1, 66, dtype=torch.int64), ValueError, '65 tokens are more than max_seq_len=64; shorten')}

@pytest.mark.parametrize('options,tokens,kind,says', tensor_cases.values(), ids=tensor_cases)
def test_tensors(options, tokens, kind, says):
    model = new_model(**options)
    before = {k: o.detach().clone() for k,o in model.named_parameters()}
    with pytest.raises(kind, match=says) as told: model.loss(tokens)
    assert '\n' not in str(told.value)
    assert all(torch.equal(o, before[k]) for k,o in model.named_parameters())

def test_lists():
    with pytest.raises(TypeError, match='tokens are of type list, not a tensor; pass'): new_model()([[1, 2]])
    with pytest.raises(TypeError, match='tokens are of type list, not a tensor; pass'): new_model().loss([[1, 2]])

def test_a_byte_order_mark_before_settings(tmp_path):
    (tmp_path/'run.toml').write_bytes(b'\xef\xbb\xbfsteps = 2\n')
    assert parse(['train', '--config', str(tmp_path/'run.toml')]).steps==2
