"The package as its users get it"
import shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest
from nbdev.config import get_config

cfg = get_config()
root,lib = cfg.config_path,cfg.lib_path
tools = {'nbdev', 'execnb', 'fastcore', 'IPython', 'ipykernel', 'jupyter', 'matplotlib', 'sphinx', 'pytest'}
needs = ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md')

needless = ('nbs/00_core.ipynb', 'docs/index.html', 'tests/test_core.py', 'constraints.txt', 'Makefile')   # for those who develop

@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "The sdist, unpacked, of a tree that also holds what does not belong in it"
    top = tmp_path_factory.mktemp('sdist')
    src = top/'src'
    shutil.copytree(lib, src/lib.name, ignore=shutil.ignore_patterns('__pycache__'))
    for f in needs: shutil.copy(root/f, src)
    for f in needless:
        (src/f).parent.mkdir(exist_ok=True)
        (src/f).write_text('')
    build = f'from setuptools.build_meta import build_sdist as b; print(b({str(top)!r}))'
    res = subprocess.run([sys.executable, '-c', build], cwd=src, check=True, capture_output=True, text=True)
    with tarfile.open(top/res.stdout.split()[-1]) as f: f.extractall(top, filter='data')
    return top/f'{lib.name}-{cfg.version}'

@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    "The wheel that the sdist makes"
    out = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, sdist]
    subprocess.run(pip, check=True)
    return zipfile.ZipFile(next(out.glob('*.whl')))

def package():
    "The files of the package, from the root"
    return {p.relative_to(root).as_posix() for p in lib.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def test_sdist_holds_what_builds_and_nothing_else(sdist):
    found = {p.relative_to(sdist).as_posix() for p in sdist.rglob('*') if p.is_file() and '.egg-info' not in p.as_posix()}
    assert found == package() | set(needs) | {'PKG-INFO', 'setup.cfg'}   # setuptools adds the last two

def test_wheel_holds_the_package_and_nothing_else(wheel):
    code = {n for n in wheel.namelist() if '.dist-info/' not in n}
    assert code == package()
    assert {Path(n).suffix for n in code} == {'.py', '.typed'} and f'{lib.name}/py.typed' in code

def test_wheel_says_what_settings_say(wheel):
    text = {n.rsplit('/', 1)[1]: wheel.read(n).decode() for n in wheel.namelist() if '.dist-info/' in n}
    want = [f'Version: {cfg.version}', f'Requires-Python: >={cfg.min_python}']
    want += [f'Requires-Dist: {o}' for o in cfg.requirements.split()]
    want += [f'Classifier: {o}' for o in cfg.classifiers.splitlines()]
    assert set(want) <= set(text['METADATA'].splitlines())
    assert 'reformer-nb = reformer_nb.cli:main' in text['entry_points.txt']

def test_imports_without_the_tools():
    "Every module, in a process where the tools cannot be imported"
    code = f'''
import importlib, pkgutil, sys
class Refuse:
    def find_spec(name, *_):
        if name.split('.')[0] in {tools}: raise ImportError(f'{{name}} is for those who develop or plot')
sys.meta_path.insert(0, Refuse)
import {lib.name}
assert {lib.name}.__version__ == {cfg.version!r}
for m in pkgutil.walk_packages({lib.name}.__path__, '{lib.name}.'):
    if not m.name.endswith('__main__'): importlib.import_module(m.name)'''
    res = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert not res.returncode, res.stderr

def test_a_type_checker_is_content(tmp_path):
    "With the settings of pyproject.toml"
    mypy = [sys.executable, '-m', 'mypy', '--cache-dir', tmp_path, '--warn-unused-ignores', '--warn-unused-configs']
    res = subprocess.run(mypy, cwd=root, capture_output=True, text=True)
    assert not res.returncode, res.stdout+res.stderr

def test_import_loads_little():
    "What torch has not loaded already: two small libraries; the compiler alone would take seconds"
    code = f'''
import sys, torch
had = set(sys.modules)
import {lib.name}
new = {{o.split('.')[0] for o in set(sys.modules)-had}} - set(sys.stdlib_module_names)
print(*sorted(new), *(o for o in set(sys.modules)-had if o.startswith('torch.')))'''
    res = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True)
    assert set(res.stdout.split()) <= {lib.name, 'einops', 'safetensors', 'tqdm'}
