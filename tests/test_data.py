"Data under hard conditions: servers that hang up, cannot continue, never answer or lie; names, links and odd files; texts of any number and length"
import hashlib, io, os, re, signal, socket, subprocess, sys, time, zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import numpy as np
import pytest
import torch
from reformer_nb import data
from reformer_nb.batches import batch_at, texts_to_read, windows
from reformer_nb.data import enwik8_corpus, files_corpus, load_corpus, split_of, to_bytes
from reformer_nb.downloads import download, fetch_zipped
from reformer_nb.sequences import own_sequence, pack, packed_rows, pad_rows, rows_by_length

content = bytes(range(256))*2000   # 512000 bytes

class Handler(BaseHTTPRequestHandler):
    "Serves `server.content` as `server.how` says, and notes the ranges that it was asked for"
    def do_GET(self):
        how,body,wanted = self.server.how,self.server.content,self.headers['Range']
        self.server.asked.append(wanted)
        if how=='silent': time.sleep(3)
        if how=='missing': return self.send_error(404)
        if how=='teapot': return self.wfile.write(b'I am no HTTP server\r\n\r\n')
        start = int(re.search(r'\d+', wanted)[0]) if wanted and how!='no ranges' else 0
        if start and start>=len(body): return self.send_error(416)
        self.send_response(206 if start else 200)
        if how!='no length': self.send_header('Content-Length', len(body)-start)
        self.end_headers()
        self.wfile.write(body[start:][:self.server.limit])
    def log_message(self, *args): "Say nothing"

@contextmanager
def serving(content=content, how='well', limit=10**9):
    "A server on this machine, with an `url`"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.content,server.how,server.limit,server.asked = content,how,limit,[]
    server.url = f'http://127.0.0.1:{server.server_port}/archive.zip'
    Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()

def zipped(name, content):
    res = io.BytesIO()
    with zipfile.ZipFile(res, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(name, content)
    return res.getvalue()

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('REFORMER_NB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

# ---- downloads -----------------------------------------------------------------------------------------------------

def test_resumes(tmp_path):
    with serving(limit=200_000) as server:
        for arrived in (200_000, 400_000):
            with pytest.raises(ValueError, match=f'{arrived} of 512000 bytes arrived'):
                download(server.url, tmp_path/'x')
            assert not (tmp_path/'x').exists()
        download(server.url, tmp_path/'x')
        assert server.asked==[None, 'bytes=200000-', 'bytes=400000-']
    assert (tmp_path/'x').read_bytes()==content
    assert os.listdir(tmp_path)==['x']

def test_server_without_ranges(tmp_path):
    "It sends everything each time; what was there is not kept in front of it"
    with serving(how='no ranges') as server:
        (tmp_path/'x.part').write_bytes(b'from elsewhere')
        download(server.url, tmp_path/'x')
    assert (tmp_path/'x').read_bytes()==content

@pytest.mark.parametrize('more', [0, 99])
def test_nothing_left_to_send(tmp_path, more):
    "Killed between the last byte and the rename, or a left-over of a longer file: begin anew"
    (tmp_path/'x.part').write_bytes(content + b'x'*more)
    with serving() as server:
        download(server.url, tmp_path/'x')
        assert server.asked==[f'bytes={512000+more}-', None]
    assert (tmp_path/'x').read_bytes()==content

def test_without_length(tmp_path):
    with serving(how='no length') as server: download(server.url, tmp_path/'x')
    assert (tmp_path/'x').read_bytes()==content

@pytest.mark.parametrize('how,says', [('missing', '404'), ('teapot', 'I am no HTTP'), ('silent', 'timed out')])
def test_bad_servers(tmp_path, how, says):
    one_line = rf'\Acannot download [^\r\n]*{says}[^\r\n]*put the file at [^\r\n]*\Z'
    with serving(how=how) as server, pytest.raises(ValueError, match=one_line):
        download(server.url, tmp_path/'x', timeout=.3)
    assert not (tmp_path/'x').exists()

def test_no_server(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{s.getsockname()[1]}/x'   # bound, but nobody listens
        with pytest.raises(ValueError, match='cannot download'): download(url, tmp_path/'x', timeout=2)

@pytest.mark.skipif(os.name!='posix', reason='SIGINT')
def test_interrupted_by_hand(tmp_path):
    "Ctrl-C in the middle keeps what has arrived"
    code = ('import signal, sys; from pathlib import Path; from reformer_nb.downloads import download;'
            'signal.signal(signal.SIGINT, signal.default_int_handler);'   # which a process in the background lacks
            'download(sys.argv[1], Path(sys.argv[2]))')
    with serving() as server:
        write = Handler.do_GET
        def half_then_wait(self):
            self.send_response(200)
            self.send_header('Content-Length', 2**22)
            self.end_headers()
            self.wfile.write(b'x'*2**21)
            time.sleep(30)
        Handler.do_GET = half_then_wait
        try:
            cmd = [sys.executable, '-c', code, server.url, str(tmp_path/'x')]
            process = subprocess.Popen(cmd, stderr=subprocess.DEVNULL)
            part,end = tmp_path/'x.part',time.monotonic()+30
            while not (part.exists() and part.stat().st_size>=2**20) and time.monotonic()<end: time.sleep(.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(10)
        finally: Handler.do_GET = write
    assert part.stat().st_size>=2**20 and not (tmp_path/'x').exists()

# ---- archives ------------------------------------------------------------------------------------------------------

def fetch(server, text):
    return fetch_zipped('x.txt', server.url, size=len(text), sha256=hashlib.sha256(text).hexdigest())

def test_unpacks_once(cache):
    text = b'some text '*99
    with serving(zipped('x.txt', text)) as server:
        assert fetch(server, text).read_bytes()==text
        assert fetch(server, text)==cache/'x.txt'
        assert server.asked==[None]

def test_wrong_checksum(cache):
    "The archive goes, so that the next attempt downloads again; nothing wrong ever has the name of the file"
    text,other = b'some text '*99,b'same size '*99
    with serving(zipped('x.txt', other)) as server:
        with pytest.raises(ValueError, match='is damaged .*SHA-256.* and was removed; try again'): fetch(server, text)
        assert os.listdir(cache)==[]
        server.content = zipped('x.txt', text)
        assert fetch(server, text).read_bytes()==text

@pytest.mark.parametrize('k', range(0, 140, 7))
def test_damaged_archive(cache, k):
    "A flipped bit, wherever it stands, is harmless or noticed"
    text = os.urandom(30)
    whole = zipped('x.txt', text)
    k %= len(whole)
    with serving(whole[:k] + bytes([whole[k]^8]) + whole[k+1:]) as server:
        try: assert fetch(server, text).read_bytes()==text
        except ValueError as e: assert 'and was removed' in str(e) and '\n' not in str(e)

def test_truncated_file_in_cache(cache):
    text = b'some text '*99
    cache.mkdir()
    (cache/'x.txt').write_bytes(text[:-1])
    with serving(zipped('x.txt', text)) as server: assert fetch(server, text).read_bytes()==text

def test_enwik8(cache, monkeypatch, tmp_path):
    "The whole way with a small stand-in: downloaded and given as a path, by name and as any file"
    text = bytes(range(1, 201))   # no zero byte: it is to pass for text
    monkeypatch.setattr(data, 'enwik8_size', 200)
    monkeypatch.setattr(data, 'enwik8_sha256', hashlib.sha256(text).hexdigest())
    (tmp_path/'enwik8').write_bytes(text)
    with serving(zipped('enwik8', text)) as server:
        monkeypatch.setattr(data, 'enwik8_url', server.url)
        found = [load_corpus('enwik8'), enwik8_corpus(tmp_path/'enwik8'), load_corpus(tmp_path/'enwik8')]
    want = [list(text[:180]), list(text[180:190]), list(text[190:])]
    for o in found: assert [o.train.tolist(), o.valid.tolist(), o.test.tolist()]==want
    (tmp_path/'enwik8').write_bytes(text[::-1])
    with pytest.raises(ValueError, match='SHA-256'): enwik8_corpus(tmp_path/'enwik8')

# ---- files of the user ---------------------------------------------------------------------------------------------

def test_names_that_are_no_text(tmp_path):
    "File names that are no UTF-8, and names with spaces and dots"
    names = ['a b.txt', 'c..txt', 'ü.txt']
    for o in names: (tmp_path/o).write_text('text '*20)
    if sys.platform=='linux': Path(os.fsdecode(bytes(tmp_path)+b'/\xff.txt')).write_text('text '*20)
    corpus = files_corpus([tmp_path])
    assert sum(map(len, (corpus.train, corpus.valid, corpus.test)))>=300

@pytest.mark.skipif(os.name!='posix', reason='links and pipes')
def test_links_and_pipes(tmp_path):
    "A link to a file counts as the file, once; a link to a folder, a broken link and a pipe are passed over"
    (tmp_path/'a.txt').write_text('x'*100)
    (tmp_path/'b.txt').symlink_to('a.txt')
    (tmp_path/'broken.txt').symlink_to('nowhere')
    (tmp_path/'again').symlink_to('.')
    os.mkfifo(tmp_path/'pipe')
    assert len(files_corpus([tmp_path]).train)==90

@pytest.mark.skipif(not os.path.exists('/dev/fd'), reason='pipes by name')
def test_a_pipe_is_read_once(tmp_path):
    "As in `cat text.txt | reformer-nb train /dev/stdin` and `train <(cat text.txt)`"
    def piped(**options):
        ends = os.pipe()
        os.write(ends[1], b'x'*100), os.close(ends[1])
        try: return files_corpus([f'/dev/fd/{ends[0]}'], **options)
        finally: os.close(ends[0])
    assert len(piped().train)==90 and piped().name.isdigit()
    with pytest.raises(ValueError, match='/dev/fd/[0-9]+ can be read once only, so it cannot be mapped'): piped(mapped=True)

@pytest.mark.skipif(os.name!='posix', reason='links and pipes')
@pytest.mark.parametrize('beside', [False, True], ids=['alone', 'after its folder'])
def test_what_is_no_text_has_the_name_that_was_given(tmp_path, beside):
    "Not that of the file behind a link, nor that of the system for a pipe"
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'photo.png').write_bytes(b'\x89PNG\0'*20)
    (tmp_path/'link').symlink_to(tmp_path/'folder'/'photo.png')
    with pytest.raises(ValueError, match=rf'\A{tmp_path}/link is no text in UTF-8'): files_corpus([tmp_path/'folder']*beside + [tmp_path/'link'])
    if not os.path.exists('/dev/fd'): return
    ends = os.pipe()
    os.write(ends[1], b'\0'*100), os.close(ends[1])
    try:
        with pytest.raises(ValueError, match=rf'\A/dev/fd/{ends[0]} is no text in UTF-8'): files_corpus([f'/dev/fd/{ends[0]}'])
    finally: os.close(ends[0])

@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='root reads everything')
@pytest.mark.parametrize('name', ['folder', 'folder/a.txt'])
def test_may_not_be_read(tmp_path, name):
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'a.txt').write_text('x'*100)
    (tmp_path/name).chmod(0)
    try:
        with pytest.raises(ValueError, match='cannot read .*Permission denied; give files'): files_corpus([tmp_path])
    finally: (tmp_path/name).chmod(0o755)

def test_split_is_for_ever():
    "A change of the hash would mix what is held out with what was learnt"
    held = dict(valid=['fnmatch.py', 'README.md', '14.txt', '37.txt'], test=['41.txt', '117.txt'])
    for part,names in held.items(): assert {split_of(o) for o in names}=={part}

@pytest.mark.parametrize('k', [49, 50, 51, 80])
@pytest.mark.parametrize('seed', range(5))
def test_no_part_is_empty(tmp_path, k, seed):
    for i in range(k): (tmp_path/f'{seed}-{i}').write_bytes(b'' if i%3 else b'some text')
    corpus = files_corpus([tmp_path])
    assert min(map(len, (corpus.train, corpus.valid, corpus.test)))>=2

# ---- text that stays on the disk -----------------------------------------------------------------------------------

parts = 'train', 'valid', 'test'

@pytest.mark.parametrize('k', [1, 2, 49, 60])
def test_mapped_text_is_the_same(cache, tmp_path, k):
    for i in range(k): (tmp_path/'texts').mkdir(exist_ok=True) or (tmp_path/'texts'/f'{i}.txt').write_text(f'text {i} '*(9+i))
    (tmp_path/'texts'/'empty.txt').touch()
    (tmp_path/'texts'/'photo.png').write_bytes(b'\x89PNG\r\n\x1a\n\0')
    a,b,again = (load_corpus(tmp_path/'texts', mapped=o) for o in (False, True, True))
    for part in parts:
        for o in (b, again): assert torch.equal(getattr(o, part), getattr(a, part))
    kept = len(os.listdir(cache/'joined'))
    (tmp_path/'texts'/'0.txt').write_text('another text '*9)
    assert torch.equal(load_corpus(tmp_path/'texts', mapped=True).train, load_corpus(tmp_path/'texts').train)
    assert len(os.listdir(cache/'joined'))>kept

@pytest.mark.skipif(sys.platform!='linux', reason='memory is read from /proc')
@pytest.mark.parametrize('where', ['here', 'there'])
def test_files_of_one_name(cache, tmp_path, where):
    "Their order depends on what is in them, mapped or not, and not on where they lie"
    names = 'ab' if where=='here' else 'ba'
    for folder,word in zip(names, ('zzzz ', 'aaaa ')): (tmp_path/where/folder).mkdir(parents=True) or (tmp_path/where/folder/'readme.txt').write_text(word*50)
    for order in ('ab', 'ba'):
        found = [files_corpus([tmp_path/where/o for o in order], mapped=k) for k in (False, True)]
        for corpus in found: assert (bytes(corpus.train[:4].tolist()), len(corpus.train))==(b'zzzz', 450)

def test_mapped_text_takes_no_memory(tmp_path):
    def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
    with open(tmp_path/'large', 'wb') as f: f.truncate(2**31)
    before = resident()
    corpus = files_corpus([tmp_path/'large'], binary=True, mapped=True)
    for step in range(9): assert batch_at(corpus.train, step, batch_size=8, seq_len=999).shape==(8, 1000)
    assert resident()-before<2**26 and sum(len(getattr(corpus, o)) for o in parts)==2**31

def test_mapped_text_that_cannot_be_kept(cache, tmp_path):
    "The cache is no folder: no part of a file is left, and the line names it"
    for i in range(2): (tmp_path/f'{i}.txt').write_text('text '*20)
    cache.write_text('')
    with pytest.raises(OSError, match='cache'): files_corpus([tmp_path/'0.txt', tmp_path/'1.txt'], mapped=True)
    assert cache.read_text()=='' and len(os.listdir(tmp_path))==3

# ---- batches and windows -------------------------------------------------------------------------------------------

def test_windows_predict_each_byte_once():
    for n in range(2, 40):
        text = torch.arange(n).to(torch.uint8)
        for seq_len in range(1, 45):
            found = windows(text, seq_len)
            assert torch.equal(torch.cat([o[1:] for o in found]), text[1:].long())
            for most in range(1, len(found)+2):
                some = [o.tolist() for o in windows(text, seq_len, most=most)]
                assert len(some)==min(most, len(found)) and len({o[0] for o in some})==len(some)
                assert most>=len(found) or all(len(o)==seq_len+1 for o in some)

def test_texts_predict_each_byte_once():
    for n in (2, 3, 17, 40):
        text = torch.arange(n).to(torch.uint8)
        for seq_len in (1, 2, 5, 44):
            for longest in (1, 5, 7, 11, 99):
                found = texts_to_read(text, seq_len, longest)
                assert torch.equal(torch.cat([o[1:] for t in found for o in t]), text[1:].long())
                for t in found:
                    assert sum(len(o)-1 for o in t)<=max(longest, seq_len) and all(a[-1]==b[0] for a,b in zip(t, t[1:]))
                for most in range(1, n+2):
                    some = [o for t in texts_to_read(text, seq_len, longest, most=most) for o in t]
                    assert 1<=len(some)<=most and len({o[0].item() for o in some})==len(some)

@pytest.mark.parametrize('n,batch_size,pool', [(1, 1, 1), (7, 3, 1), (40, 8, 2), (41, 8, 2), (100, 7, 50)])
def test_a_pass_sees_each_sequence_once(n, batch_size, pool):
    lengths = torch.randint(1, 30, (n,), generator=torch.Generator().manual_seed(n))
    steps = -(-n//batch_size)
    for turn in range(3):
        found = [rows_by_length(lengths, turn*steps+i, batch_size=batch_size, pool=pool, seed=1) for i in range(steps)]
        assert torch.cat(found).sort()[0].tolist()==list(range(n)) and sorted(map(len, found))[1:]==[batch_size]*(steps-1)

@pytest.mark.parametrize('seed', range(9))
def test_packed_rows_hold_every_sequence(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 19, (int(torch.randint(1, 60, (), generator=g)),), generator=g).tolist()
    sequences = [torch.randint(1, 99, (n,), generator=g) for n in lengths]
    tokens,mask,own = packed_rows(sequences, 19, end=0, pad=100)
    found = [bytes(row[own[r]==k].tolist()) for r,row in enumerate(tokens) for k in range(own[r].max())]
    assert sorted(found)==sorted(bytes([0, *o.tolist()]) for o in sequences)
    assert (tokens[~mask]==100).all() and all(row[int(real.sum())-1]==0 for row,real in zip(tokens, mask))
    rows = pack([n+1 for n in lengths], 19)
    taken = [sum(lengths[i]+1 for i in row) for row in rows]
    assert max(taken)<=19 and sum(t<=9 for t in taken)<=1   # two half-empty rows would be one
    see = own_sequence(own)
    assert see.diagonal(dim1=1, dim2=2).all() and see[0,0].sum()==(own[0]==0).sum()

def filled(given): return packed_rows(given, 5, end=9)

@pytest.mark.parametrize('make', (pad_rows, filled))
def test_sequences_of_every_kind_of_integers(make):
    lists = [[1, 2], [], [3]]
    want = make([torch.tensor(o, dtype=torch.long) for o in lists])
    kinds = [lists, (*map(tuple, lists),), [np.array(o, dtype=np.int32) for o in lists], [torch.tensor(o, dtype=torch.uint8) for o in lists]]
    for given in kinds:
        for a,b in zip(make(given), want): assert torch.equal(a, b) and a.dtype==b.dtype
    rows = torch.tensor([[1, 2], [3, 4]])
    for a,b in zip(make(rows), make([*rows])): assert torch.equal(a, b)

@pytest.mark.parametrize('make', (pad_rows, filled))
@pytest.mark.parametrize('wrong,says', [
    ([1, 2.5], r'sequences\[1\] is torch.float32, not integers; [^\n]*\.long\(\)'), ([True], r'sequences\[1\] is torch.bool, not integers'),
    ('ab', r'sequences\[1\] is no row of integers \(str: [^\n]*as to_bytes makes'), (None, r'no row of integers \(NoneType: '), ([[1], [2, 3]], r'no row of integers \(list: '),
    ([[1], [2]], r'sequences\[1\] has shape \(2, 1\), it must be \(n\)'), (3, r'sequences\[1\] has shape \(\), it must be \(n\)')])
def test_what_is_no_sequence(make, wrong, says):
    with pytest.raises((TypeError, ValueError), match=says): make([[1], wrong])

def test_an_end_inside_of_a_sequence():
    with pytest.raises(ValueError, match=r'end=2 stands in sequences\[1\]'): packed_rows([[1], [1, 2]], 5, end=2)
    with pytest.raises(TypeError, match='end=1.5 must be a whole number'): packed_rows([[1]], 5, end=1.5)

def test_batches_do_not_depend_on_the_program():
    "The same bytes in another process, after other draws, from another number of threads"
    code = ('import torch; from reformer_nb.batches import batch_at; torch.manual_seed(3); torch.set_num_threads(2);'
            'print(batch_at(torch.arange(250).to(torch.uint8), 7, batch_size=2, seq_len=5, seed=4).tolist())')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert found.strip()==str(batch_at(torch.arange(250).to(torch.uint8), 7, batch_size=2, seq_len=5, seed=4).tolist())

def test_shortest_data():
    assert torch.equal(batch_at(to_bytes('ab'), 0, batch_size=3, seq_len=1), to_bytes('ab').long().expand(3, -1))
