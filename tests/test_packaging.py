"The package as its users get it"
import shutil, subprocess, sys, zipfile
import pytest
from nbdev.config import get_config

cfg = get_config()
root,lib = cfg.config_path,cfg.lib_path
tools = {'nbdev', 'execnb', 'fastcore', 'IPython', 'ipykernel', 'jupyter', 'matplotlib', 'sphinx', 'pytest'}
needs = ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md')

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what it needs"
    src = tmp_path_factory.mktemp('src')
    for f in needs: shutil.copy(root/f, src)
    shutil.copytree(lib, src/lib.name, ignore=shutil.ignore_patterns('__pycache__'))
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', src/'dist', src]
    subprocess.run(pip, check=True)
    return zipfile.ZipFile(next((src/'dist').glob('*.whl')))

def test_wheel_holds_the_package_and_nothing_else(wheel):
    code = {n for n in wheel.namelist() if '.dist-info/' not in n}
    assert code == {p.relative_to(root).as_posix() for p in lib.rglob('*.py')}

def test_wheel_says_what_settings_say(wheel):
    text = {n.rsplit('/', 1)[1]: wheel.read(n).decode() for n in wheel.namelist() if '.dist-info/' in n}
    want = [f'Version: {cfg.version}', f'Requires-Python: >={cfg.min_python}']
    want += [f'Requires-Dist: {o}' for o in cfg.requirements.split()]
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
