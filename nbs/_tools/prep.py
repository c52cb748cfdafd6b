"""Notebooks -> what myst-nb reads: `python nbs/_tools/prep.py OUT`. Runs no cell.

The notebooks are MyST already. Directives of nbdev become tags of cells, exported symbols become Sphinx objects with
their docments, symbols in backticks become links.
"""
import ast, base64, importlib, inspect, json, re, shutil, sys, textwrap
from dataclasses import dataclass, field
from pathlib import Path
import nbformat
from fastcore.docments import docments
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from common import body, cfg, directives, notebooks, root, slug

lib = cfg.lib_path.name
sys.path.insert(0, str(root))   # document this checkout, whatever is installed

# ---- prose -----------------------------------------------------------------------------------------------------

def inline(s, syms):
    "Link symbols in backticks, and notebooks by the names of their pages"
    def page(m): return f']({m[1] or ""}{slug(m[2])}.ipynb{m[3] or ""})'
    out = ['']
    for part in re.split(r'(`[^`]*`)', s):
        name = part[1:-1].removesuffix('()')
        if not part.startswith('`'): part = re.sub(r'\]\(((?:[\w.-]+/)*)([\w.-]+)\.ipynb(#[^)]*)?\)', page, part)
        elif name in syms and not out[-1].endswith(('}', '[')):   # neither a role nor the text of a link
            part = f'{{py:obj}}`{name} <{syms[name]}>`'
        out.append(part)
    return ''.join(out)

def markdown(src, syms):
    "A markdown cell with its links, outside headings, code and display math"
    out,fence,math = [],None,False
    for l in src.splitlines():
        if m := re.match(r'\s*(```+|~~~+)', l): fence = None if fence and m[1].startswith(fence) else fence or m[1]
        if l.count('$$')%2: math = not math
        out.append(l if fence or math or l.startswith('#') else inline(l, syms))
    return '\n'.join(out)

# ---- API entries ----------------------------------------------------------------------------------------------

@dataclass
class Signature:
    "What is written in the source: `text` without annotations, and for each parameter its type and docment"
    text:str = ''
    types:dict = field(default_factory=dict)
    docs:dict = field(default_factory=dict)

def written(o): return ast.unparse(o).replace(' | ', '|') if o is not None else ''

def of_function(fn, bound):
    "The signature of a function, without its first argument if `bound`"
    t = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0]
    a = t.args
    if bound: (a.posonlyargs or a.args).pop(0)
    args = [o for o in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if o]
    types = {o.arg: written(o.annotation) for o in args}
    for o in args: o.annotation = None
    docs = {k: v['docment'] for k,v in docments(fn, full=True).items()}
    returns = f' -> {written(t.returns)}' if t.returns and t.name!='__init__' else ''
    return Signature(f'({ast.unparse(a)}){returns}', types, docs)

def of_fields(cls):
    "The signature of a dataclass or named tuple, whose parameters are its fields"
    src = textwrap.dedent(inspect.getsource(cls))
    fields = [o for o in ast.parse(src).body[0].body if isinstance(o, ast.AnnAssign)]
    text = ', '.join(o.target.id + (f'={written(o.value)}' if o.value else '') for o in fields)
    docs = {o.target.id: src.splitlines()[o.end_lineno-1].partition(' # ')[2] for o in fields}
    return Signature(f'({text})', {o.target.id: written(o.annotation) for o in fields}, docs)

def signature(o, bound=False):
    if inspect.isfunction(o): return of_function(o, bound)
    if not inspect.isclass(o): return Signature()
    ours = [c for c in o.__mro__ if c.__module__.startswith(lib)]
    if hasattr(o, '__dataclass_fields__') or hasattr(o, '_fields'): return of_fields(o)
    return next((of_function(c.__init__, True) for c in ours if '__init__' in vars(c)), Signature())

def entry(name, o, mod, syms, fields=True, kind=None, opts=(), bound=False):
    "A Sphinx object for `o`, with its docments as `fields` unless its source is shown; a class lists its methods"
    fn = inspect.unwrap(o)
    sig,doc = signature(fn, bound),inspect.getdoc(o) or ''
    if doc.startswith(f'{name}('): doc = ''   # the one that dataclasses make up
    kind = kind or ('class' if inspect.isclass(o) else 'function' if inspect.isfunction(fn) else 'data')
    lines = [f'<span id="{o.__qualname__.lower()}"></span>', ''] if hasattr(o, '__qualname__') else []
    fence = '`'*(6 if kind=='class' else 5)
    if kind=='data': doc = ''
    lines += [f'{fence}{{py:{kind}}} {name}{sig.text}', f':module: {mod}', ':no-index-entry:', *opts, '', inline(doc, syms), '']
    for p,doc in sig.docs.items() if fields else ():
        if not doc: continue
        doc = inline(' '.join(doc.split()).replace('*', r'\*'), syms)
        if p=='return': lines.append(f':returns: {doc}')
        elif p in sig.types: lines += [f':param {p}: {doc}', *(f':type {p}: {t}' for t in [sig.types[p]] if t)]
    if kind=='class': lines += ['', *members(o, mod, syms, fields)]
    return '\n'.join([*lines, fence, ''])

def members(cls, mod, syms, fields):
    "Entries of the public methods and properties that `cls` defines and describes"
    for name,raw in vars(cls).items():
        kind = 'property' if isinstance(raw, property) else 'method'
        fn = raw.fget if kind=='property' else getattr(raw, '__func__', raw)
        if name[0]=='_' or not inspect.isfunction(fn) or not fn.__doc__: continue
        opts = [f':{t}:' for t in ('classmethod', 'staticmethod') if type(raw).__name__==t]
        if kind=='property': yield entry(name, raw, mod, syms, False, kind)
        else: yield entry(name, fn, mod, syms, fields, kind, opts, bound=opts!=[':staticmethod:'])

# ---- notebooks ------------------------------------------------------------------------------------------------

def api(cell, mod, syms):
    "One entry for each public function and class that an exporting cell defines"
    d,defs = directives(cell),(ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef)
    if 'hide' in d or not {'export','exports'} & d.keys(): return
    for name in (o.name for o in ast.parse(cell.source).body if isinstance(o, defs) and o.name[0]!='_'):
        o = getattr(importlib.import_module(mod), name)
        yield new_markdown_cell(entry(name, o, mod, syms, 'exports' not in d), id=f'api-{name}'.replace('_', '-')[:64])

def origin(cell):
    "Where the output of a flagged cell comes from"
    d = directives(cell)
    if by := cell.metadata.get('stored'):
        s = f'{"Stored output" if cell.outputs else "Passed"}: {by["by"]}, {by["on"]}.'
    elif 'cuda' in d: s = 'Not yet run on a GPU.'
    elif 'slow' in d: s = 'Not run here: slow.'
    else: return []
    return [new_markdown_cell('{.stored}\n'+s, id=f'{cell.id[:60]}-by')]

def picture_width(cell):
    "Pixels of the widest picture that a cell has put out; a PNG has its width in bytes 16 to 19"
    pictures = [o['data']['image/png'] for o in cell.outputs if 'image/png' in o.get('data', {})]
    return max((int.from_bytes(base64.b64decode(o)[16:20], 'big') for o in pictures), default=0)

def code(cell, syms):
    "What the page shows of a code cell"
    d = directives(cell)
    if {'hide','default_exp','export','exporti'} & d.keys(): return []
    meta,nb = {},{}
    known = {('echo','false'): 'remove-input', ('output','false'): 'remove-output', ('code-fold','true'): 'hide-input'}
    if tags := [known[o] for o in d.items() if o in known]: meta['tags'] = tags
    if 'label' in d: nb['figure'] = dict(caption=inline(d.get('fig-cap', ''), syms), name=d['label'])
    if 'fig-alt' in d: nb['image'] = dict(alt=d['fig-alt'])
    if picture_width(cell)>700: nb['image'] = {**nb.get('image', {}), 'classes': 'wide'}
    if 'code-summary' in d: nb |= dict(code_prompt_show=d['code-summary'], code_prompt_hide=d['code-summary'])
    if nb: meta['mystnb'] = nb
    return [new_code_cell(body(cell), id=cell.id, outputs=cell.outputs, metadata=meta), *origin(cell)]

def header(src, path):
    "The title cell: nbdev's line under the title as a lead, and where to get the notebook"
    nb = path.relative_to(cfg.nbs_path).as_posix()
    links = [f'{{download}}`Download this notebook </notebooks/{nb}>`']
    at = f'blob/{cfg.branch}/{path.relative_to(root).as_posix()}'
    if cfg.git_url: links.append(f'[Notebook in the repository]({cfg.git_url}/{at})')
    if cfg.git_url.startswith('https://github.com/'):
        links.append(f'[Open in Colab](https://colab.research.google.com/github/{cfg.git_url[19:]}/{at})')
    return re.sub(r'^>\s*(.*)', r'{.lead}\n\1', src, count=1, flags=re.M) + '\n\n' + ' · '.join(links)

def convert(path, syms):
    "The page of the notebook at `path`"
    cells,out,titled = nbformat.read(path, 4).cells,[],False
    found = [directives(c) for c in cells if c.cell_type=='code']
    mod = next((f'{lib}.{d["default_exp"]}' for d in found if 'default_exp' in d), lib)
    syms = syms | {k.removeprefix(mod+'.'): v for k,v in syms.items() if k.startswith(mod+'.')}   # its own come first
    for c in cells:
        if c.cell_type=='code': out += [*api(c, mod, syms), *code(c, syms)]
        elif c.cell_type=='markdown':
            src = markdown(c.source, syms)
            if not titled and src.startswith('# '): src,titled = header(src, path),True
            out.append(new_markdown_cell(src, id=c.id))
    return new_notebook(cells=out, metadata=dict(language_info=dict(name='python'), kernelspec=dict(
        name='python3', display_name='python3', language='python')))

def symbols():
    "Full name of each exported symbol by its full and its short name"
    res = {}
    for mod,names in importlib.import_module(f'{lib}._modidx').d['syms'].items():
        for full in names: res[full] = res[full.removeprefix(mod+'.')] = full
    return res

def contents(pages):
    "The table of contents from `{page: title}`: the course, then each folder under its name"
    groups = {}
    for p,title in pages.items(): groups.setdefault(p.parent, []).append(f'{title} <{p.as_posix()}>')
    groups.setdefault(Path('.'), []).append('references')
    def tree(folder, entries):
        caption = [f':caption: {folder.name.capitalize()}'] if folder.name else []
        return '\n'.join(['```{toctree}', ':hidden:', *caption, '', *entries, '```', ''])
    return '\n'.join(tree(*o) for o in groups.items())

def title(path):
    "The number and the heading of a notebook"
    prose = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type=='markdown')
    head = re.search(r'^# (.+)', prose, flags=re.M)
    if not head: raise ValueError(f'{path.name} has no title; begin a markdown cell with "# "')
    number = re.match(r'\d+[a-z]?(?=_)', path.name)
    return f'{number[0]} {head[1]}' if number else head[1]

def main(dest):
    syms,pages = symbols(),{}
    for p in notebooks():
        at = p.relative_to(cfg.nbs_path)
        page,copy = at.parent/slug(p),dest/'notebooks'/at
        for d in (copy.parent, (dest/page).parent): d.mkdir(parents=True, exist_ok=True)
        nb = json.loads(p.read_text(encoding='utf-8'))
        nb['nbformat_minor'] = 4   # whose cells need no ids
        for cell in nb['cells']:
            cell['source'] = ''.join(cell['source'])
            del cell['id']
            if 'outputs' in cell: cell['outputs'] = []   # the page shows them, and a run makes them again
        copy.write_text(json.dumps(nb, ensure_ascii=False, separators=(',', ':')), encoding='utf-8')
        nbformat.write(convert(p, syms), dest/f'{page}.ipynb')
        if page.name!='index': pages[page] = title(p)
    images = cfg.nbs_path/'images'
    if images.exists(): shutil.copytree(images, dest/'images', ignore=shutil.ignore_patterns('readme'))
    (dest/'references.md').write_text('# References\n\n```{bibliography}\n:all:\n```\n', encoding='utf-8')
    home = nbformat.read(dest/'index.ipynb', 4)
    home.cells.append(new_markdown_cell(contents(pages), id='contents'))
    nbformat.write(home, dest/'index.ipynb')

if __name__=='__main__': main(Path(sys.argv[1]))
