"The tools behind `make run`, `make docs` and `make readme`, and what holds the pages together"
import ast, base64, functools, io, re, sys
import grids
import nbformat
import pytest
import reformer_nb
from matplotlib.figure import Figure
from nbdev.config import get_config
from nbformat.v4 import new_code_cell, new_notebook, new_output

sys.path.insert(0, str(get_config().nbs_path/'_tools'))
import common, nbrun, prep, readme  # noqa: E402

# ---- common --------------------------------------------------------------------------------------------------------

def test_directives():
    cell = new_code_cell('#| label: fig-x\n#|fig-cap: "A: b"\n\n#| slow\nx = 1\n#| cuda')
    assert common.directives(cell) == {'label': 'fig-x', 'fig-cap': 'A: b', 'slow': ''}
    assert common.body(new_code_cell('#| slow\n\nx = 1 #| y')) == 'x = 1 #| y'

# ---- nbrun ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('src,force,want', [
    ('x', '', 'run'), ('#| slow\nx', '', 'keep'), ('#| slow\nx', 'slow', 'stamp'),
    ('#| slow\n#| cuda\nx', 'slow', 'keep'), ('#| eval: false\nx', '', 'keep'), ('#| export\nx', '', 'run'), ('#| notest\nx', 'slow cuda', 'keep')])
def test_plan(src, force, want): assert nbrun.plan(new_code_cell(src), set(force.split())) == want

def test_state():
    out,cell = [new_output('stream', text='1')],new_code_cell('#| slow\nprint(1)')
    assert nbrun.state(new_code_cell('x', outputs=out)) is None
    assert nbrun.state(cell) == 'new'
    cell.outputs = out
    assert nbrun.state(cell) == 'stale'   # nobody says where that output comes from
    cell.metadata['stored'] = dict(sha=nbrun.sha(cell), by='torch', on='2026-01-01')
    assert nbrun.state(cell) == 'fresh'
    cell.source += '+1'
    assert nbrun.state(cell) == 'stale'

def notebook(tmp_path, *cells):
    "A notebook of code cells, and its path"
    path = tmp_path/'a.ipynb'
    nbformat.write(new_notebook(cells=[new_code_cell(o, id=f'c{i}', outputs=[new_output('stream', text='old')]) for i,o in enumerate(cells)]), path)
    return path

def test_only_notebooks_with_such_cells(tmp_path):
    path = notebook(tmp_path, 'x = 1', '#| cuda\nx')
    assert nbrun.holds(path, {'cuda'}) and nbrun.holds(path, {'slow', 'cuda'}) and not nbrun.holds(path, {'slow'})
    assert not nbrun.holds(notebook(tmp_path, '#| slow\n#| cuda\nx'), {'cuda'})

def test_a_missing_gpu_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    path = notebook(tmp_path, 'print(1)', '#| cuda\nprint(2)')
    before = path.read_bytes()
    monkeypatch.setattr(sys, 'argv', ['nbrun.py', str(path), '--flags', 'cuda'])
    monkeypatch.setattr(nbrun, 'notebooks', lambda *paths: [path])
    with pytest.raises(SystemExit, match='need a GPU, and torch sees none') as e: nbrun.main()
    assert '\n' not in str(e.value) and path.read_bytes()==before

@pytest.mark.parametrize('flags,want', [('', ['1', 'old']), ('cuda', ['old', '2'])])
def test_a_gpu_changes_the_outputs_of_its_cells_alone(tmp_path, monkeypatch, flags, want):
    monkeypatch.setattr(nbrun, 'machine', lambda cuda: f'a machine, {cuda}')
    path = notebook(tmp_path, 'print(1, end="")', '#| cuda\nprint(2, end="")')
    assert nbrun.run(path, set(flags.split()), 60)[0]=='updated'
    cells = nbformat.read(path, 4).cells
    assert [o.outputs[0].text for o in cells]==want
    assert (cells[1].metadata.get('stored') or {}).get('by')==('a machine, True' if flags else None)

def test_pictures_get_a_palette_once():
    import base64, io
    import numpy as np
    from PIL import Image
    shades = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    shades[...,3] = 255
    def read(png): return Image.open(io.BytesIO(base64.b64decode(png)))
    out = io.BytesIO()
    Image.fromarray(shades).save(out, 'PNG')
    small = nbrun.palette(base64.b64encode(out.getvalue()).decode())
    assert read(small).mode=='P' and read(small).size==(30, 20) and nbrun.palette(small)==small
    near = np.asarray(read(small).convert('RGB'), dtype=int) - shades[...,:3]
    assert 0 < np.abs(near).mean() < 30   # near the colours, not equal: there were 600

# ---- prep ----------------------------------------------------------------------------------------------------------

syms = {'hash_vectors': 'reformer_nb.hashing.hash_vectors'}
link = '{py:obj}`hash_vectors <reformer_nb.hashing.hash_vectors>`'

@pytest.mark.parametrize('src,want', [
    ('see `hash_vectors()`, `nothing`', f'see {link}, `nothing`'),
    ('## `hash_vectors`', '## `hash_vectors`'),
    ('[`hash_vectors`](x.html) {ref}`hash_vectors`', '[`hash_vectors`](x.html) {ref}`hash_vectors`'),
    ('```\n`hash_vectors`\n```\n`hash_vectors`', f'```\n`hash_vectors`\n```\n{link}'),
    ('[next](02_sorting.ipynb#a)', '[next](sorting.ipynb#a)'),
    ('[up](../01_hashing.ipynb) [down](a/b.ipynb)', '[up](../hashing.ipynb) [down](a/b.ipynb)')])
def test_prep_markdown(src, want): assert prep.markdown(src, syms) == want

def test_prep_cells():
    cell = new_code_cell('#| code-fold: true\n#| label: fig-a\n#| fig-cap: "Of `hash_vectors`"\nplot()', id='a')
    page, = prep.code(cell, syms)
    assert page.source=='plot()' and page.metadata['tags']==['hide-input']
    assert page.metadata['mystnb']['figure'] == dict(caption=f'Of {link}', name='fig-a')
    assert prep.code(new_code_cell('#| hide\nx'), syms) == []
    assert 'Not yet run on a GPU' in prep.code(new_code_cell('#| cuda\nx'), syms)[1].source

@pytest.mark.parametrize('inches,wide', [(3, False), (8, True)])
def test_prep_wide_pictures(inches, wide):
    picture = io.BytesIO()
    Figure((inches,1), dpi=100).savefig(picture, format='png')
    output = new_output('display_data', {'image/png': base64.b64encode(picture.getvalue()).decode()})
    page, = prep.code(new_code_cell('plot()', id='a', outputs=[output]), syms)
    assert ('image' in page.metadata.get('mystnb', {}))==wide

def test_prep_entry():
    class Thing:
        "A thing"
        def __init__(self,
            d:int|None=3, # its width
        ): self.d = d
        @classmethod
        def make(cls): "Make one"
        def hidden(self): pass
    Thing.__module__ = 'reformer_nb.things'
    text = prep.entry('Thing', Thing, 'reformer_nb.things', {})
    assert '{py:class} Thing(d=3)' in text and ':param d: its width\n:type d: int|None' in text
    assert '{py:method} make()' in text and ':classmethod:' in text and 'hidden' not in text

# ---- readme --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('src,want', [
    (':::{note}\nHi\n:::', '> [!NOTE]\n> Hi'),
    (':::{admonition} Why?\n:class: tip\n\nHi\n:::', '> [!TIP]\n> **Why?**\n>\n> Hi'),
    (':::{admonition} Why?\n:class: tip\n:collapsible: closed\n\nHi\n:::',
     '<details><summary>Why?</summary>\n\nHi\n\n</details>'),
    ('{cite:p}`kitaev2020reformer`', '([Kitaev et al., 2020](https://arxiv.org/abs/2001.04451))'),
    ('`{eq}` is a role', '`{eq}` is a role'),
    ('$$\nx\n$$ (eq-x)', '$$\nx\n$$')])
def test_readme_markdown(src, want): assert readme.markdown(src) == want

@pytest.mark.parametrize('src', ['by {eq}`eq-x`', ':::{grid} 2\nx\n:::', '{.lead}\nx', '{cite:p}`nobody2000`'])
def test_readme_refuses(src):
    with pytest.raises(ValueError, match='README c'): readme.markdown(src)

@pytest.mark.parametrize('site,want', [
    ('', '[a](nbs/01_hashing.ipynb#b)'), ('https://x.org', '[a](https://x.org/hashing.html#b)')])
def test_readme_links(monkeypatch, site, want):
    monkeypatch.setattr(readme, 'site', site)
    assert readme.links('[a](01_hashing.ipynb#b)') == want

# ---- grids ---------------------------------------------------------------------------------------------------------

def test_sample(monkeypatch):
    grid = range(100)
    monkeypatch.setattr(grids, 'whole', False)
    assert len(grids.sample(grid, 5)) == 5
    assert grids.sample(grid, 5, 1)==grids.sample(grid, 5, 1)!=grids.sample(grid, 5, 2)
    monkeypatch.setattr(grids, 'whole', True)
    assert grids.sample(grid, 5) == list(grid)

# ---- the way through the course ------------------------------------------------------------------------------------

def imported(source, modules):
    "Modules of the package that a cell imports from, also by the names that the package itself has"
    for o in ast.walk(ast.parse(source)):
        if not isinstance(o, ast.ImportFrom) or (o.module or '').split('.')[0]!=common.cfg.lib_name: continue
        names = [a.name for a in o.names if a.name not in modules]
        if '.' in o.module: yield o.module.split('.')[1]
        else: yield from (getattr(getattr(reformer_nb, k), '__module__', k).split('.')[-1] for k in names)
        yield from (a.name for a in o.names if '.' not in o.module and a.name in modules)

@functools.cache
def course():
    "{numbered notebook: its cells}, and for each the lower ones that it imports or begins with, less what others of these need"
    cells = {o.name: nbformat.read(o, 4).cells for o in common.notebooks() if o.name[0].isdigit()}
    code = {k: [c for c in v if c.cell_type=='code'] for k,v in cells.items()}
    modules = {d['default_exp']: k for k,v in code.items() for c in v if 'default_exp' in (d := common.directives(c))}
    found = {k: {modules[m] for c in v for m in imported(c.source, modules) if modules.get(m, k)<k} for k,v in code.items()}
    for k,v in cells.items():
        opening = [c.source for c in v if c.cell_type=='markdown'][1].partition('*Needs*')[0]
        found[k] |= {o for o in re.findall(r'\]\(([\w.-]+\.ipynb)', opening) if o in cells and o<k}
    def below(k): return found[k].union(*map(below, found[k]))
    return cells,{k: sorted(o for o in v if not any(o in below(p) for p in v-{o})) for k,v in found.items()}

def way(name):
    "The line on what a notebook needs and where it leads: to at most three that need it, or to the next"
    cells,needs = course()
    def link(k): return f'[{cells[k][0 if cells[k][0].cell_type=="markdown" else 1].source.splitlines()[0][2:]}]({k})'
    names = list(cells)
    after = [k for k in names if name in needs[k]][:3] or names[names.index(name)+1:][:1]
    leads = ', '.join(map(link, after)) or '[Choosing n_hashes and bucket_size](guides/choosing.ipynb)'
    return f'*Needs* {", ".join(map(link, needs[name])) or "no other notebook"} · *leads to* {leads}'

@pytest.mark.parametrize('name', course()[0])
def test_opening_says_what_a_notebook_needs(name):
    opening = [c.source for c in course()[0][name] if c.cell_type=='markdown'][1]
    assert [o for o in opening.splitlines() if o.startswith('*Needs*')]==[way(name)]   # imports have changed: write this line

@pytest.mark.parametrize('name', course()[0])
def test_ends_with_exercises(name):
    "Each has an answer that is folded"
    prose = '\n'.join(c.source for c in course()[0][name] if c.cell_type=='markdown')
    tasks = prose.partition('Try it')[2]
    assert len(re.findall(r'^:::\{admonition\} Answer.*\n:class: tip dropdown$', tasks, flags=re.M))>=1

def test_links_lead_to_notebooks():
    for page in common.notebooks():
        for c in nbformat.read(page, 4).cells:
            if c.cell_type!='markdown': continue
            for target in re.findall(r'\]\(((?:[\w.-]+/)*[\w.-]+\.ipynb)', c.source): assert (page.parent/target).exists(), (page.name, target)
