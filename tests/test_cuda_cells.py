"The course's full-size examples, smaller and on the CPU: whether a GPU would find calls that work"
import re
from types import SimpleNamespace
import nbformat
import pytest
import reformer_nb
import torch
from nbdev.config import get_config

cells = {'06_self_attention': 'full-size-cuda', '10_reformer': 'full-size-cuda', '11_language_model': 'first-cuda', '13_encoder_decoder': 'full-size-cuda'}
smaller = {65536: 256, 20000: 50, 8192: 256, 4096: 256, 1024: 32, 512: 32, 200: 4, 128: 16, 64: 16, 12: 2}

def source(notebook, name):
    cells = nbformat.read(get_config().nbs_path/f'{notebook}.ipynb', 4).cells
    return next(o.source for o in cells if o.id==name)

def shrink(code):
    "Smaller numbers in the calls, and no GPU"
    code = code.replace('.cuda()', '').replace("device='cuda'", "device='cpu'").replace("backend='triton'", "backend='auto'")
    return re.sub(r'(?<![\w.*])\d{2,}\b', lambda m: str(smaller.get(int(m[0]), m[0])), code)

@pytest.mark.parametrize('notebook', cells)
def test_cell_runs(notebook, monkeypatch):
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 2000.)
    fake = dict(Event=lambda enable_timing: event, max_memory_allocated=lambda: 2**30, synchronize=lambda: None, reset_peak_memory_stats=lambda: None)
    for k,o in fake.items(): monkeypatch.setattr(torch.cuda, k, o)
    names = vars(reformer_nb) | dict(torch=torch)
    if notebook=='11_language_model': exec(re.search(r'first = dict\(.*?\)\n', shrink(source(notebook, 'first-demo')), re.S)[0], names)
    code = shrink(source(notebook, cells[notebook]))
    exec(code, names)
    assert eval(code.splitlines()[-1], names)=='1.0 GiB at the peak, 2.00 s forth and back'
    model = next(o for o in names.values() if isinstance(o, torch.nn.Module))
    assert all(p.grad is not None for p in model.parameters())
