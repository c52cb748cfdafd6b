"""Notebooks and their stored outputs -> docs/: `python nbs/_tools/docs.py [--check]`.

`--check` builds nothing: it fails where docs/ was made from other inputs than those of the working tree.
"""
import hashlib, json, re, shutil, subprocess, sys
from functools import cache
from importlib.metadata import files
from pathlib import Path
from common import cfg, rel, root

here,docs,work = Path(__file__).parent,cfg.doc_path,root/'_proc'
stamp = docs/'.inputs'
outdated = 'docs/ is out of date (make docs); changed since it was built:'

def inputs():
    "Names and hashes of all that the site is made from, one a line"
    skip = {'__pycache__', '.ipynb_checkpoints', 'readme', 'results', 'check.py', 'export.py', 'nbrun.py', 'readme.py'}
    found = [root/'settings.ini', *cfg.lib_path.rglob('*.py'), *cfg.nbs_path.rglob('*')]
    keep = sorted(rel(p) for p in found if p.is_file() and p.name[0]!='.' and not skip & set(p.parts))
    return [f'{hashlib.sha256((root/p).read_bytes()).hexdigest()}  {p}' for p in keep]

def changed():
    "Inputs that are not those of docs/"
    old = stamp.read_text(encoding='utf-8').splitlines() if stamp.exists() else []
    return sorted({l.split('  ', 1)[1] for l in set(old) ^ set(inputs())})

formula_parts = {f'{o}.js' for o in ('startup', 'core', 'input/tex', 'output/chtml', 'output/chtml/fonts/tex', 'a11y/assistive-mml')}   # without menus

def mathjax(dest):
    "Copy the parts of MathJax that the pages load, and its fonts, out of the package which brings them"
    unused = ('Fraktur', 'SansSerif', 'Script', 'Typewriter', 'Calligraphic-Bold', 'Main-Italic', 'Math-Bold', 'Math-Regular')   # alphabets of no formula here
    note = b'/* MathJax, Apache License 2.0, https://www.mathjax.org */\n'
    for p in files('sphinx-mathjax-offline'):
        if 'mathjax' not in p.parts: continue
        within = Path(*p.parts[p.parts.index('mathjax')+1:])
        if within.as_posix() not in formula_parts and ('woff-v2' not in p.parts or any(o in p.name for o in unused)): continue
        at = dest/within
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes((note if p.suffix=='.js' else b'') + p.locate().read_bytes())

def source_page(html):
    "The code of a module, and a way back"
    title,root,code = (re.search(o, html, flags=re.S)[1] for o in ('<title>(.*?)</title>', 'data-content_root="([^"]*)"', '(<article.*?</article>)'))
    styles = ''.join(f'<link rel="stylesheet" href="{root}_static/{o}.css">' for o in ('pygments', 'styles/furo', 'custom'))
    theme = 'document.body.dataset.theme = localStorage.getItem("theme") || "auto"'
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title>{styles}</head><body><script>{theme}</script>'
            f'<main class="source"><a href="{root}index.html">{cfg.title}</a>{code}</main></body></html>\n')

unstyled = {'basic.css', 'skeleton.css', 'debug.css', 'plus.png', 'minus.png', 'file.png'}   # of themes other than this

def styled(folder):
    "What style sheets and scripts know elements by: `(tag, classes)`, the tag empty if any will do"
    res = {('', frozenset({o})) for p in folder.glob('**/*.js') if 'mathjax' not in p.parts for o in re.findall(r'[\w-]{4,}', p.read_text(encoding='utf-8'))}
    res |= {('', frozenset({o})) for o in ('math', 'tex2jax_ignore', 'mathjax_ignore', 'tex2jax_process', 'mathjax_process')}
    for p in folder.glob('**/*.css'):
        for selector in re.findall(r'([^{}]+)\{', re.sub(r'/\*.*?\*/', '', p.read_text(encoding='utf-8'), flags=re.S)):
            res |= {(tag, frozenset(names.split('.')[1:])) for tag,names in re.findall(r'([a-z0-9]*)((?:\.[a-zA-Z][\w-]*)+)', selector)}
    return res

def lean(html, known):
    "A page without what differs between machines or nobody sees: versions of tools, classes by which no rule of `known` takes an element, names that pop up over links to them, indentation"
    html = re.sub(r'<!-- Generated with .*? -->', '', html)
    html = re.sub(r'(<a class="[^"]*" href="[^"]*") title="[^"]*"', r'\1', html)
    html = html.replace('class="caption" role="heading"', 'class="caption" role="heading" aria-level="2"')   # a heading needs a level
    html = re.sub(r'<(em|span) class="sig-(?:paren|param)">(.*?)</\1>', r'\2', html)   # they look as their surroundings do
    @cache
    def kept(tag, names):
        have = set(names.split())
        return ' '.join(o for o in names.split() if tag=='dl' or o.startswith('highlight-') or any(o in c and c<=have and t in ('', tag) for t,c in known))
    def bare(m): return m[0] if kept('span', m[1]) else m[2]
    def plain(m):
        s = m[0]
        for _ in range(3): s = re.sub(r'<span class="([^"]*)">([^<]*)</span>', bare, s)   # some stand in others
        return s
    html = re.sub(r'<dt class="sig .*?</dt>|<code .*?</code>', plain, html, flags=re.S)
    def classes(m):
        names = kept(m[2], m[3])
        return m[1] + (f' class="{names}"' if names else '')
    html = re.sub(r'(<([a-z0-9]+)[^<>]*?) class="([^"]*)"', classes, html)
    return ''.join(o if o.startswith('<pre') else re.sub(r'\n\s+', '\n', o) for o in re.split(r'(<pre.*?</pre>)', html, flags=re.S))

def contents(site):
    "The list of pages in the sidebar, which each page but the first takes from a script"
    tree = re.search(r'<div class="sidebar-tree">(.*?)</div>', (site/'index.html').read_text(encoding='utf-8'), flags=re.S)[1]
    script = """// the list of pages, which is the same on each of them
{
  const {parentElement: tree, dataset: {page}} = document.currentScript
  tree.innerHTML = %s
  for (const a of tree.querySelectorAll('a')) {
    if (a.getAttribute('href') == page + '.html') {
      for (const o of [a, a.parentElement]) o.classList.add('current')
      a.parentElement.classList.add('current-page')
      a.setAttribute('aria-current', 'page')
    }
    a.setAttribute('href', document.documentElement.dataset.content_root + a.getAttribute('href'))
  }
}
"""
    (site/'_static'/'contents.js').write_text(script % json.dumps(tree, ensure_ascii=False), encoding='utf-8')

def build():
    shutil.rmtree(work, ignore_errors=True)
    mathjax(work/'static'/'mathjax')
    def python(*a): subprocess.run([sys.executable, *map(str, a)], check=True, cwd=root)
    python(here/'prep.py', work/'src')
    python('-m', 'sphinx', '-q', '-W', '--keep-going', '-c', here, '-d', work/'doctrees', work/'src', work/'html')
    for p in [work/'html'/'.buildinfo', *(work/'html').rglob('*.map')]: p.unlink(missing_ok=True)   # of no use to readers
    for o in unstyled: (work/'html'/'_static'/o).unlink(missing_ok=True)
    known = styled(work/'html'/'_static')
    for p in (work/'html').rglob('*.html'):
        html = lean(p.read_text(encoding='utf-8'), known)
        p.write_text(source_page(html) if '_modules' in p.parts else html, encoding='utf-8')
    contents(work/'html')
    (work/'html'/'.nojekyll').touch()   # GitHub Pages: serve folders whose names start with _
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(work/'html', docs)
    stamp.write_text('\n'.join(inputs())+'\n', encoding='utf-8')

if __name__=='__main__':
    if '--check' not in sys.argv:
        try: build()
        except subprocess.CalledProcessError: sys.exit('docs/ is as it was; mend what is named above')
    elif diff := changed(): sys.exit('\n  '.join([outdated, *diff]))
