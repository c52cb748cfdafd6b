"""Is all that is made from the notebooks up to date? `python nbs/_tools/check.py`; runs no cell.

Cleans the notebooks and makes package and README again; what that changes was out of date. Then looks at stored outputs
and docs/.
"""
import hashlib, subprocess, sys
from nbdev.clean import nbdev_clean
import docs, export, nbrun, readme
from common import cfg, notebooks, rel, root

def made():
    "Names and hashes of notebooks and of what is made from them, docs/ apart"
    files = [*notebooks(), *cfg.lib_path.rglob('*.py'), root/'README.md', *(cfg.nbs_path/'images'/'readme').glob('*')]
    return {(rel(p), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files if p.exists()}

def main():
    ok = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--quiet'], cwd=root).returncode==0
    before = made()
    nbdev_clean()
    export.main()
    readme.main()
    if diff := sorted({p for p,_ in before ^ made()}):
        print('Was out of date and is made again now:', *diff, sep='\n  ')
        ok = False
    if nbrun.stale(notebooks()): ok = False
    if diff := docs.changed():
        print(docs.outdated, *diff, sep='\n  ')
        ok = False
    print('check passed' if ok else 'check FAILED')
    sys.exit(not ok)

if __name__=='__main__': main()
