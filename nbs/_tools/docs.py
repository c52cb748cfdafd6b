"""Notebooks and their stored outputs -> docs/: `python nbs/_tools/docs.py [--check]`.

`--check` builds nothing: it fails where docs/ was made from other inputs than those of the working tree.
"""
import hashlib, re, shutil, subprocess, sys
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
    head,root,code = (re.search(o, html, flags=re.S) for o in ('.*?</head>', 'data-content_root="([^"]*)"', '<article.*?</article>'))
    theme = 'document.body.dataset.theme = localStorage.getItem("theme") || "auto"'
    return (f'{head[0]}<body><script>{theme}</script><main style="max-width:64rem;margin:2rem auto;padding:0 1rem">'
            f'<a href="{root[1]}index.html">{cfg.title}</a>{code[0]}</main></body></html>\n')

# light or dark, as the system has it: a disc half filled
half = '<symbol id="svg-half" viewBox="0 0 24 24"><circle cx="12" cy="12" r="8" fill="none" stroke="currentColor"/><path d="M12 4a8 8 0 0 1 0 16z" fill="currentColor"/></symbol>'

def lean(html, source=False):
    "A page without what differs between machines or nobody sees: versions of tools, marks around all but keywords, strings and comments in code, names that pop up over links to them, pictures of no button, indentation; of `source` pages only the code is left"
    html = re.sub(r'<!-- Generated with .*? -->', '', html)
    html = re.sub(r'(<a class="[^"]*" href="[^"]*") title="[^"]*"', r'\1', html)
    for o in (' nohighlight"', ' notranslate"', ' internal"'): html = html.replace(o, '"')   # of no style
    html = html.replace('class="docutils literal', 'class="literal')
    html = re.sub(r'(class="[^"]*) docutils (container|literal)', r'\1 \2', html)
    html = re.sub(r'<span class="(?:default_value|sig-paren|sig-return|sig-return-icon|sig-return-typehint)">', '<span>', html)
    html = re.sub(r'#svg-(?:sun-with-moon|moon-with-sun)"', '#svg-half"', html).replace('<symbol id="svg-sun"', half+'<symbol id="svg-sun"')
    html = html.replace('class="caption" role="heading"', 'class="caption" role="heading" aria-level="2"')   # a heading needs a level
    used = set(re.findall(r'href="#(svg-[\w-]+)"', html))   # pictures of buttons
    html = re.sub(r'<symbol id="([\w-]+)".*?</symbol>', lambda m: m[0] if m[1] in used else '', html, flags=re.S)
    marks = r'[a-z]{1,3}\d?' if source else 'n|nn|nc|nd|nf|nb|ne|o|ow|p|w|mi|mf|kc|bp|si|se|sa|fm|vm|pre'
    for _ in range(2): html = re.sub(f'<span class="(?:{marks})">([^<]*)</span>', r'\1', html)   # some stand in others
    html = ''.join(o if o.startswith('<pre') else re.sub(r'\n\s+', '\n', o) for o in re.split(r'(<pre.*?</pre>)', html, flags=re.S))
    return source_page(html) if source else html

def build():
    shutil.rmtree(work, ignore_errors=True)
    mathjax(work/'static'/'mathjax')
    def python(*a): subprocess.run([sys.executable, *map(str, a)], check=True, cwd=root)
    python(here/'prep.py', work/'src')
    python('-m', 'sphinx', '-q', '-W', '--keep-going', '-c', here, '-d', work/'doctrees', work/'src', work/'html')
    for p in [work/'html'/'.buildinfo', *(work/'html').rglob('*.map')]: p.unlink(missing_ok=True)   # of no use to readers
    for p in (work/'html').rglob('*.html'): p.write_text(lean(p.read_text(encoding='utf-8'), '_modules' in p.parts), encoding='utf-8')
    (work/'html'/'.nojekyll').touch()   # GitHub Pages: serve folders whose names start with _
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(work/'html', docs)
    stamp.write_text('\n'.join(inputs())+'\n', encoding='utf-8')

if __name__=='__main__':
    if '--check' not in sys.argv:
        try: build()
        except subprocess.CalledProcessError: sys.exit('docs/ is as it was; mend what is named above')
    elif diff := changed(): sys.exit('\n  '.join([outdated, *diff]))
