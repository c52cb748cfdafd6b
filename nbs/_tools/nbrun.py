"""Run notebooks in place and store their outputs, keeping what is stored for cells that this machine may not run.

A cell with a flag of `tst_flags` (settings.ini) runs only if `--flags` names all its flags; then its metadata note
what ran where. Cells with `eval: false` never run. A notebook that fails is not written. With `--flags` and no paths,
the notebooks that have such cells run; with `cuda` among the flags, cells without a flag run and keep their outputs,
which belong to a CPU.

    python nbs/_tools/nbrun.py                                  # all notebooks
    python nbs/_tools/nbrun.py --flags cuda                     # those with cells for a GPU, on a machine that has one
    python nbs/_tools/nbrun.py nbs/01_hashing.ipynb --flags slow
    python nbs/_tools/nbrun.py --stale                            # run nothing: are stored outputs those of the cells?
"""
import argparse, base64, hashlib, io, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import clean_nb
from PIL import Image
from traitlets.config import Config
from common import cfg, directives, flags, notebooks, rel, root

def sha(cell): return hashlib.sha256(cell['source'].encode()).hexdigest()[:12]

def plan(cell, force):
    "`run`, `keep`, or `stamp` (run, and note where) for a code cell"
    d = directives(cell)
    if d.get('eval', '').lower()=='false': return 'keep'
    held = flags & d.keys()
    return 'run' if not held else 'stamp' if held <= force else 'keep'

def state(cell):
    "Of a flagged cell: `fresh`, `stale`, or `new` if it never ran; otherwise None"
    if not (flags-{'notest'}) & directives(cell).keys(): return None
    if stamp := cell['metadata'].get('stored'): return 'fresh' if stamp['sha']==sha(cell) else 'stale'
    return 'stale' if cell['outputs'] else 'new'

def holds(path, force):
    "Whether the notebook at `path` has cells that `force` releases"
    return any(plan(c, force)=='stamp' for c in nbformat.read(path, 4).cells if c.cell_type=='code')

def missing(force):
    "What this machine lacks to run cells with the flags `force`; nothing if it can"
    import torch
    if 'cuda' in force and not torch.cuda.is_available(): return '--flags cuda: these cells need a GPU, and torch sees none; nothing was run'

def machine(cuda):
    "What the outputs were made with"
    import torch
    return f'torch {torch.__version__}' + (f' on {torch.cuda.get_device_name()}' if cuda else '')

def palette(png):
    "A picture in base64 with 128 colours at most, which for plots is a third of the bytes; one that has a palette stays"
    picture,out = Image.open(io.BytesIO(base64.b64decode(png))),io.BytesIO()
    if picture.mode=='P': return png
    flat = Image.new('RGB', picture.size, 'white')
    flat.paste(picture, mask=picture.getchannel('A') if picture.mode=='RGBA' else None)
    flat.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode()

def slim(nb):
    "Give the pictures among the outputs of `nb` a palette"
    for data in (o['data'] for c in nb.cells for o in c.get('outputs', ()) if 'data' in o):
        if 'image/png' in data: data['image/png'] = palette(data['image/png'])

class Client(NotebookClient):
    "A notebook client that leaves alone the cells which `force` does not release"
    def __init__(self, nb, force, **kw):
        super().__init__(nb, record_timing=False, **kw)
        self.force_ = force

    async def async_execute_cell(self, cell, cell_index, **kw):
        how = plan(cell, self.force_) if cell.cell_type=='code' else 'keep'
        if how=='keep': return cell
        old = cell.get('outputs')
        cell = await super().async_execute_cell(cell, cell_index, **kw)
        if how=='run' and 'cuda' in self.force_: cell.outputs = old
        if how=='stamp':
            by = machine('cuda' in directives(cell))
            cell.metadata['stored'] = dict(sha=sha(cell), by=by, on=time.strftime('%Y-%m-%d'))
        return cell

def run(path, force, timeout):
    "Run the notebook at `path`, write it if that changed it: `(result, seconds, error)`"
    start,old = time.perf_counter(),path.read_text(encoding='utf-8')
    nb = nbformat.reads(old, as_version=4)
    with TemporaryDirectory() as tmp:   # sockets are files here: no port races between workers
        ipc = Config(KernelManager=dict(transport='ipc', ip=f'{tmp}/k'))
        where = dict(metadata=dict(path=str(path.parent)))
        try: Client(nb, force, timeout=timeout, kernel_name='python3', resources=where, config=ipc).execute()
        except (CellExecutionError, DeadKernelError, TimeoutError) as e:
            return 'FAILED', time.perf_counter()-start, str(e)
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())
    slim(nb)
    new = nbformat.writes(nb)+'\n'
    if new!=old: path.write_text(new, encoding='utf-8')
    return 'same' if new==old else 'updated', time.perf_counter()-start, ''

def run_all(paths, force, timeout, workers):
    "Run `paths` side by side; the number that failed"
    os.environ['OMP_NUM_THREADS'] = str(max(1, os.cpu_count()//workers))   # kernels share the cores
    os.environ['PYTHONPATH'] = str(root)   # and import this checkout
    failed = 0
    with ThreadPoolExecutor(workers) as ex:
        for p,(res,secs,err) in zip(paths, ex.map(lambda p: run(p, force, timeout), paths)):
            print(f'{rel(p):40}{secs:6.1f} s  {res}', flush=True)
            if err: print(err, file=sys.stderr, flush=True)
            failed += bool(err)
    return failed

def stale(paths):
    "Print the flagged cells whose outputs are not those of their source; the number of stale ones"
    cells = [(p, c, state(c)) for p in paths for c in nbformat.read(p, 4).cells if c.cell_type=='code']
    what = dict(new='note: no output stored yet', stale='edited since its output was stored; run it (make run)')
    for p,c,s in cells:
        if s in what: print(f'{rel(p)}: cell {c.id} ({" ".join(sorted(flags & directives(c).keys()))}): {what[s]}')
    return sum(s=='stale' for *_,s in cells)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('paths', nargs='*', help='notebooks or folders of them; all if left out')
    p.add_argument('--flags', default='', help='flags whose cells run too, space separated')
    p.add_argument('--timeout', type=int, default=600, help='seconds that a cell may take; -1 for any')
    p.add_argument('--workers', type=int, help='notebooks at a time; as many as cores, or 1 with --flags')
    p.add_argument('--stale', action='store_true', help='run nothing, look for outputs that are out of date')
    a = p.parse_args()
    paths,force = notebooks(*a.paths),set(a.flags.split())
    if bad := force-flags: sys.exit(f'--flags {" ".join(sorted(bad))}: settings.ini has tst_flags = {cfg.tst_flags}')
    if a.stale: sys.exit(bool(stale(paths)))
    if said := missing(force): sys.exit(said)
    if force and not a.paths: paths = [p for p in paths if holds(p, force)]
    failed = run_all(paths, force, a.timeout, a.workers or (1 if force else os.cpu_count()))
    print(f'{len(paths)-failed} passed, {failed} failed')
    sys.exit(bool(failed))

if __name__=='__main__': main()
