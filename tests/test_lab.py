"JupyterLab's server runs notebooks from top to bottom, as `Run All Cells` does; all of them under --all"
import contextlib, json, os, shutil, socket, subprocess, sys, time, uuid
from urllib.request import Request, urlopen
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

pytest.importorskip('jupyterlab')
websocket = pytest.importorskip('websocket')
cfg = get_config()
few = ('00_core.ipynb', '14c_interactive.ipynb', 'experiments/decoding.ipynb')
every = sorted(p.relative_to(cfg.nbs_path).as_posix() for p in nbglob(as_path=True) if '"cell_type": "code"' in p.read_text(encoding='utf-8'))

class Lab:
    "A running server, asked as the page in a browser asks it"
    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port,self.token = s.getsockname()[1],uuid.uuid4().hex
        options = dict(port=self.port, port_retries=0, root_dir=folder, open_browser=False, allow_root=True)
        cmd = [sys.executable, '-m', 'jupyterlab', f'--IdentityProvider.token={self.token}', *(f'--ServerApp.{k}={v}' for k,v in options.items())]
        env = os.environ | dict(JUPYTER_CONFIG_DIR=str(folder/'.config'), OMP_NUM_THREADS='1')
        with (folder/'.log').open('w') as f: self.process = subprocess.Popen(cmd, stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=env)
        self.log = folder/'.log'

    def wait(self):
        "Until it answers"
        end = time.monotonic()+120
        while True:
            with contextlib.suppress(OSError): return self.ask('GET', 'status')
            assert self.process.poll() is None and time.monotonic()<end, self.log.read_text()
            time.sleep(.2)

    def ask(self, method, path, body=None):
        "What the server answers"
        request = Request(f'http://127.0.0.1:{self.port}/api/{path}', None if body is None else json.dumps(body).encode(), self.head(), method=method)
        with urlopen(request, timeout=60) as f: return json.loads(f.read() or 'null')

    def head(self): return {'Authorization': f'token {self.token}'}

    def run_all(self, path):
        "Run the code cells of a notebook in a kernel of its own, but those with a flag; the number of cells that ran"
        cells = [o['source'] for o in self.ask('GET', f'contents/{path}')['content']['cells'] if o['cell_type']=='code']
        cells = [o for o in cells if not any(f'#| {flag}' in o.splitlines() for flag in cfg.tst_flags.split())]
        session = self.ask('POST', 'sessions', dict(path=path, name='', type='notebook', kernel=dict(name='python3')))
        address = f'ws://127.0.0.1:{self.port}/api/kernels/{session["kernel"]["id"]}/channels'
        kernel = websocket.create_connection(address, header=self.head(), timeout=300)
        try:
            for source in cells: run_cell(kernel, source, path)
        finally:
            kernel.close()
            self.ask('DELETE', f'sessions/{session["id"]}')
        return len(cells)

def run_cell(kernel, source, path):
    "Wait until a cell has run; its error is that of the test"
    head = dict(msg_id=uuid.uuid4().hex, msg_type='execute_request', username='', session='', version='5.3', date='')
    content = dict(code=source, silent=False, store_history=True, user_expressions={}, allow_stdin=False, stop_on_error=True)
    kernel.send(json.dumps(dict(header=head, parent_header={}, metadata={}, content=content, channel='shell', buffers=[])))
    while True:
        message = kernel.recv()
        if isinstance(message, bytes): continue   # what widgets send
        message = json.loads(message)
        if message['parent_header'].get('msg_id')!=head['msg_id']: continue
        if message['msg_type']=='error': pytest.fail(f'{path}: {source}\n' + '\n'.join(message['content']['traceback']), pytrace=False)
        if message['msg_type']=='status' and message['content']['execution_state']=='idle': return

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lab')
    for o in (cfg.nbs_path, cfg.lib_path): shutil.copytree(o, folder/o.name, ignore=shutil.ignore_patterns('__pycache__'))   # what cells write stays there
    server = Lab(folder)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)

@pytest.mark.parametrize('path', [pytest.param(o, marks=() if o in few else pytest.mark.slow) for o in every])
def test_run_all_cells(lab, path): assert lab.run_all(f'nbs/{path}')>0

def test_an_error_is_seen(lab):
    cell = dict(cell_type='code', source='1/0', metadata={}, outputs=[], execution_count=None)
    lab.ask('PUT', 'contents/bad.ipynb', dict(type='notebook', content=dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=4)))
    with pytest.raises(pytest.fail.Exception, match='ZeroDivisionError'): lab.run_all('bad.ipynb')
