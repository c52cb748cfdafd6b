"Packaging; what it says stands in settings.ini, which nbdev reads too"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg,readme = ini['DEFAULT'],root/'README.md'
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['dev'] += extras['docs'] + extras['train'] + extras['tensorboard']
urls = {'Source': cfg['git_url'], 'Documentation': cfg['doc_host'] + cfg['doc_baseurl']}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license={'mit': 'MIT'}[cfg['license']], keywords=cfg['keywords'], packages=[cfg['lib_path']],
    package_data={cfg['lib_path']: ['py.typed']}, classifiers=cfg['classifiers'].splitlines(),
    project_urls={k: v for k,v in urls.items() if v},
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': [cfg['console_scripts']],
                  'nbdev': [f'{cfg["lib_name"]} = {cfg["lib_path"]}._modidx:d']},
)
