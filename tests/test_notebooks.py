"Each notebook is one test: `nbdev_test` on it, in a process of its own. `pytest --flags slow` runs flagged cells too."
import os, subprocess, sys
from importlib.util import find_spec
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = get_config().config_path
nbs = sorted(nbglob(as_path=True))

@pytest.mark.parametrize('nb', nbs, ids=[os.path.relpath(o, root) for o in nbs])
def test_notebook(nb, pytestconfig):
    if 'triton' in nb.stem and not find_spec('triton'): pytest.skip('Triton, which this notebook needs, is made for Linux alone')
    args = dict(path=str(nb), flags=pytestconfig.getoption('--flags'))
    cmd = [sys.executable, '-c', f'from nbdev.test import nbdev_test; nbdev_test(**{args})']
    res = subprocess.run(cmd, cwd=root, capture_output=True, text=True)
    if res.returncode or 'Success' not in res.stdout: pytest.fail(res.stderr or res.stdout, pytrace=False)
