import os, shutil
# before torch is imported: tests run side by side, and spinning threads cost more than they give
os.environ['OMP_NUM_THREADS'] = '1'
if not shutil.which('nvidia-smi'): os.environ['TRITON_INTERPRET'] = '1'   # read when Triton is imported, which torch.compile does too
import grids
import pytest

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='flags of notebook cells to run too, such as "slow cuda"')
    parser.addoption('--all', action='store_true', help='whole grids instead of samples, and slow tests')

def pytest_configure(config): grids.whole = config.getoption('--all')

def pytest_collection_modifyitems(config, items):
    if not config.getoption('--all'):
        for o in items:
            if o.get_closest_marker('slow'): o.add_marker(pytest.mark.skip(reason='slow: run with --all'))
    held = [o for o in items if o.get_closest_marker('cuda')]   # `keywords` has the names of folders too
    if not held: return
    import torch
    if not torch.cuda.is_available():
        for o in held: o.add_marker(pytest.mark.skip(reason='no CUDA device'))
