"What the tools share: the configuration, the list of notebooks, and how nbdev's directives are read"
import os, re
from pathlib import Path
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config()
root = cfg.config_path
flags = set(cfg.tst_flags.split())   # a cell with one of these runs only where it is asked for

def notebooks(*paths):
    "Those at `paths` (files or folders), or all, in the order of the course"
    if missing := [str(p) for p in paths if not Path(p).exists()]:
        raise SystemExit(f'no such notebook or folder: {" ".join(missing)}')
    found = {Path(p).resolve() for o in paths or [cfg.nbs_path] for p in nbglob(o, as_path=True)}
    return sorted(found, key=lambda p: (len(p.relative_to(cfg.nbs_path).parts), p))

def slug(path): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(path).stem.lower())   # as nbdev names its pages

def directives(cell):
    "`{name: value}` of the `#|` lines that a code cell begins with"
    lines = re.match(r'(?:[ \t]*(?:#.*)?\n)*', cell['source']+'\n')[0].splitlines()
    found = [re.match(r'#\s*\|\s*([\w-]+):?\s*(.*)', l) for l in lines]
    return {m[1]: m[2].strip().strip('"\'') for m in found if m}

def body(cell): return re.sub(r'^#\s*\|.*\n?', '', cell['source'], flags=re.M).strip('\n')

def rel(path): return os.path.relpath(path, root)
