"""nbs/index.ipynb -> README.md, in the Markdown that GitHub shows: `python nbs/_tools/readme.py`.

Figures become files in nbs/images/readme, since GitHub shows no inlined image data. What cannot be shown raises.
"""
import base64, re
import nbformat
from nbdev.doclinks import NbdevLookup
from pybtex.database import parse_file
from common import body, cfg, directives, rel, root, slug

index,figures = cfg.nbs_path/cfg.readme_nb,cfg.nbs_path/'images'/'readme'
site = cfg.doc_host + cfg.doc_baseurl
alerts = ('note', 'tip', 'important', 'warning', 'caution')

def cite(keys):
    "Author, year and address of each work, as in the bibliography"
    res = []
    for k in keys.split(','):
        if not (e := bib.get(k.strip())): raise ValueError(f'README cites {k.strip()}, which references.bib lacks')
        who = [re.sub(r'[{}]', '', ' '.join(p.last_names)) for p in e.persons['author']]
        who = ' and '.join(who) if len(who)<3 else f'{who[0]} et al.'
        res.append(f'[{who}, {e.fields["year"]}]({e.fields["url"]})')
    return '; '.join(res)

bib = parse_file(cfg.nbs_path/'references.bib').entries

def callout(m):
    "An admonition as a GitHub alert, or as details if it is folded"
    kind,title,text = m[2],m[3].strip(),m[4]
    opts = dict(re.findall(r'^:(\w+):[ \t]*(.*)\n', text, flags=re.M))
    text = re.sub(r'^:\w+:.*\n', '', text, flags=re.M).strip()
    kind = next((o for o in [kind, *opts.get('class', '').split()] if o in alerts), None)
    if 'collapsible' in opts: return f'<details><summary>{title}</summary>\n\n{text}\n\n</details>'
    if not kind: raise ValueError(f'README cannot show {m[0].splitlines()[0]!r}; give it one of the classes {alerts}')
    if title: text = f'**{title}**\n\n{text}'
    return '\n'.join([f'> [!{kind.upper()}]', *(f'> {l}'.rstrip() for l in text.splitlines())])

def links(src):
    "Notebooks and symbols link to the site if settings.ini names one, else to the files"
    def to(m):
        file = f'{site}/{m[1]}{slug(m[2])}.html' if site else f'{rel(cfg.nbs_path)}/{m[1]}{m[2]}.ipynb'
        return f']({file}{m[3] or ""})'
    src = re.sub(r'\]\((?:\./)?((?:[\w-]+/)*)([\w.-]+)\.ipynb(#[^)]*)?\)', to, src)
    return NbdevLookup().linkify(src) if site else src

def markdown(src):
    src = re.sub(r'^(:{3,}|`{3,})\{([\w-]+)\}(.*)\n((?:.*\n)*?)\1[ \t]*$', callout, src, flags=re.M)
    src = re.sub(r'\{cite(?::p)?\}`([^`]+)`', lambda m: f'({cite(m[1])})', src)
    src = re.sub(r'\{cite:t\}`([^`]+)`', lambda m: cite(m[1]), src)
    src = re.sub(r'^\$\$[ \t]*\([\w-]+\)$', '$$', src, flags=re.M)
    prose = re.sub(r'^(```+).*?^\1|`[^`]*`', lambda m: '``', src, flags=re.M|re.S)
    if left := re.search(r'\{[\w:-]+\}(``|$)|^:{3,}.*|^\{\.[^}]*\}', prose, flags=re.M):
        raise ValueError(f'README cannot show {left[0]!r}')
    return links(src)

def outputs(cell):
    "What a cell has put out; figures are written to disk"
    d = directives(cell)
    for o in cell.outputs:
        data = o.get('data', {})
        if o.output_type=='stream': yield f'```text\n{o.text.rstrip()}\n```'
        elif 'image/png' in data:
            figures.mkdir(parents=True, exist_ok=True)
            (figures/f'{cell.id}.png').write_bytes(base64.b64decode(data['image/png']))
            yield f'![{d.get("fig-alt", "")}]({rel(figures)}/{cell.id}.png)'
            if 'fig-cap' in d: yield f'*{d["fig-cap"]}*'
        elif 'text/markdown' in data: yield markdown(data['text/markdown'])
        elif 'text/plain' in data: yield f'```text\n{data["text/plain"].rstrip()}\n```'
        else: raise ValueError(f'README cannot show the output of cell {cell.id}: {o.output_type} {list(data)}')

def parts():
    yield f'<!-- Made from {rel(index)} by `make readme`: edit that, not this. -->'
    for c in nbformat.read(index, 4).cells:
        if c.cell_type=='markdown': yield markdown(c.source)
        if c.cell_type!='code' or {'hide','export','exporti','default_exp'} & (d := directives(c)).keys(): continue
        if d.get('echo')!='false': yield f'```python\n{body(c)}\n```'
        if d.get('output')!='false': yield from outputs(c)

def main():
    for old in figures.glob('*.png'): old.unlink()
    (root/'README.md').write_text('\n\n'.join(parts())+'\n', encoding='utf-8')

if __name__=='__main__': main()
