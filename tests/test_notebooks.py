"Each notebook is one test: `nbdev_test` on it, in a process of its own. `pytest --flags slow` runs flagged cells too."
import os, subprocess, sys
from importlib.util import find_spec
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = get_config().config_path
nbs = sorted(nbglob(as_path=True))

@pytest.mark.parametrize('nb', nbs, ids=[os.path.relpath(o, root) for o in nbs])
@pytest.mark.timeout(3100)   # the notebook's own limit comes first, and tells where it stands
def test_notebook(nb, tmp_path, pytestconfig):
    if 'triton' in nb.stem and not find_spec('triton'): pytest.skip('Triton, which this notebook needs, is made for Linux alone')
    args,limit = dict(path=str(nb), flags=pytestconfig.getoption('--flags')),3000 if pytestconfig.getoption('--flags') else 400
    code = f'import faulthandler; faulthandler.dump_traceback_later({limit}, exit=True); from nbdev.test import nbdev_test; nbdev_test(**{args})'
    said = tmp_path/'said'   # a file, since a pipe stays open as long as any process that the notebook has started
    with said.open('w') as f: done = subprocess.run([sys.executable, '-c', code], cwd=root, stdin=subprocess.DEVNULL, stdout=f, stderr=f)
    if done.returncode or 'Success' not in said.read_text(): pytest.fail(said.read_text(), pytrace=False)
