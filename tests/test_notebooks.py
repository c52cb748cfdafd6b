"Each notebook is one test: `nbdev_test` on it, in a process of its own. `pytest --flags slow` runs flagged cells too."
import faulthandler, os
from importlib.util import find_spec
import pytest
from forks import processes, redirect
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = get_config().config_path
nbs = sorted(nbglob(as_path=True))
def run(nb, flags, limit, said):
    "What it prints goes to the file `said`; after `limit` seconds it ends, and says where it stands"
    redirect(said, said)
    os.chdir(root)
    faulthandler.dump_traceback_later(limit, exit=True)
    from nbdev.test import nbdev_test
    nbdev_test(path=nb, flags=flags)

@pytest.mark.parametrize('nb', nbs, ids=[os.path.relpath(o, root) for o in nbs])
@pytest.mark.timeout(3100)   # the notebook's own limit comes first
def test_notebook(nb, tmp_path, pytestconfig):
    if 'triton' in nb.stem and not find_spec('triton'): pytest.skip('Triton, which this notebook needs, is made for Linux alone')
    flags,said = pytestconfig.getoption('--flags'),tmp_path/'said'
    process = processes.Process(target=run, args=(str(nb), flags, 3000 if flags else 400, str(said)))
    process.start()
    process.join()
    if process.exitcode or 'Success' not in said.read_text(): pytest.fail(said.read_text(), pytrace=False)
