"The committed site works from disk, without a network"
import contextlib, html, itertools, json, os, re, shutil, signal, subprocess, sys, time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit
import nbformat, pytest
from nbdev.config import get_config

docs = get_config().doc_path
pages = sorted(docs.rglob('*.html'))

# ---- what the files say --------------------------------------------------------------------------------------------

class Page(HTMLParser):
    "The anchors of a page, what it links to, and what it loads"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.loads = set(),[],[]
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.ids |= {d[k] for k in ('id','name') if d.get(k)}
        if tag=='a' and d.get('href'): self.links.append(d['href'])
        if d.get('src'): self.loads.append(d['src'])
        if tag=='link' and d.get('rel') in ('stylesheet','icon','preload'): self.loads.append(d['href'])

def shows(page): return page.read_text(encoding='utf-8') if page.exists() else ''

parsed = {p: Page(p) for p in pages}

@pytest.mark.parametrize('page', pages, ids=[p.relative_to(docs).as_posix() for p in pages])
def test_links(page):
    for url in parsed[page].loads: assert not urlsplit(url).netloc, f'loads {url} from the network'
    for url in parsed[page].links + parsed[page].loads:
        u = urlsplit(url)
        if u.scheme or u.netloc: continue
        to = (page.parent/unquote(u.path)).resolve() if u.path else page
        assert to.is_file(), f'{url}: no such file'
        if u.fragment and to.suffix=='.html': assert unquote(u.fragment) in parsed[to].ids, f'{url}: no such anchor'

course = [p.relative_to(docs).as_posix() for p in pages if 'class="cell ' in shows(p)]   # those made from notebooks that run

def test_every_page_is_reached():
    "From the list of pages, without scripts too, and page after page from the first to the last"
    def to(page, link):
        found = re.search(f'<a class="{link}" href="([^"]*)"', page.read_text(encoding='utf-8'))
        return found and (page.parent/found[1]).resolve()
    home = docs/'index.html'
    listed = [docs/o for o in parsed[home].links if o.endswith('.html') and o!='index.html']
    page,passed = home,[]
    while page := to(page, 'next-page'): passed.append(page); assert to(page, 'prev-page')==(passed[-2:-1] or [home])[0]
    assert {docs/o for o in course} - {home} <= set(passed) <= set(listed)
    for o in course: assert o=='index.html' or '<noscript><a ' in shows(docs/o)

def test_home_says_what_and_for_whom():
    "In its first paragraphs"
    text = re.sub('<[^>]*>', '', re.search('<article.*?</article>', shows(docs/'index.html'), flags=re.S)[0])[:1000]
    assert 'Reformer' in text and 'is for those who' in text

def test_downloads_are_the_notebooks():
    "Without outputs, and valid"
    sources = {p.name: p for p in get_config().nbs_path.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    for page in course:
        link, = [o for o in parsed[docs/page].links if o.endswith('.ipynb') and not urlsplit(o).netloc]
        at = (docs/page).parent/link
        nb = nbformat.read(at, 4)
        assert not list(nbformat.validator.iter_validate(json.loads(at.read_text(encoding='utf-8'))))
        assert [c.source for c in nb.cells]==[c.source for c in nbformat.read(sources[Path(link).name], 4).cells]
        assert not any(c.get('outputs') for c in nb.cells)

def test_pictures_and_symbols():
    "Each picture says in words what it shows, each function, class and method links to its source"
    for o in course:
        text = shows(docs/o)
        for img in re.findall('<img [^>]*>', text): assert re.search(r'alt="[^"]{10,}"', img), f'{o}: {img}'
        for entry in re.findall('<dt class="sig.*?</dt>', text, flags=re.S): assert '[source]' in entry or '>property <' in entry, f'{o}: {entry}'

def test_code_is_marked():
    "Keywords, strings and comments, in pages and in sources, by tags that a style sheet colours in light and in dark"
    style = shows(docs/'_static'/'pygments.css')
    for page,tag in itertools.product(('hashing.html', '_modules/reformer_nb/hashing.html'), 'biu'):
        assert f'<{tag}>' in shows(docs/page)
        for scheme in ('', 'body[data-theme="dark"] '): assert f'\n{scheme}.highlight {tag} {{ color' in style

def test_size(): assert sum(p.stat().st_size for p in docs.rglob('*') if p.is_file()) < 10e6

def test_styles_load_nothing():
    for p in docs.rglob('*.css'):
        assert not re.search(r'url\(["\']?(https?:)?//|@import', p.read_text(encoding='utf-8')), p

# ---- what a browser shows ------------------------------------------------------------------------------------------

names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable',
         '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome')
chromium = next(filter(None, map(shutil.which, names)), None)
browser = pytest.mark.skipif(not chromium, reason='no Chromium found; install the package chromium')

probe = r'''<script>
const errors = []
addEventListener('error', e => errors.push(e.message || 'cannot load ' + (e.target.src || e.target.href)), true)
addEventListener('unhandledrejection', e => errors.push(String(e.reason)))
console.error = (...a) => errors.push(a.join(' '))
addEventListener('load', async () => {
  await window.MathJax?.startup?.promise
  await document.fonts.ready
  const theme = document.querySelector('.theme-toggle-content .theme-toggle')
  for (let i = 0; location.search == '?toggle' && i < 3 && document.body.dataset.theme != 'dark'; i++) theme.click()
  const faults = location.search == '?axe' ? (await axe.run({resultTypes: ['violations']})).violations : []
  const seen = JSON.stringify({errors,
    faults: faults.filter(o => ['serious', 'critical'].includes(o.impact)).flatMap(o => o.nodes.map(n => o.id + ': ' + n.html.slice(0, 200))),
    background: getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number),
    width: innerWidth,
    too_wide: Math.max(...[document.documentElement, document.querySelector('.content')].map(o => o.scrollWidth - o.clientWidth)),
    listed: [...document.querySelectorAll('.sidebar-tree a')].map(o => o.href),
    here: [...document.querySelectorAll('.sidebar-tree [aria-current=page]')].map(o => o.href),
    code: document.querySelectorAll('.highlight pre').length,
    copy: document.querySelectorAll('.highlight button.copybtn').length,
    math: document.querySelectorAll('mjx-container mjx-c').length,
    fonts: [...document.fonts].filter(o => o.status == 'error').map(o => o.family),
    failed: document.querySelectorAll('mjx-merror').length,
    plots: [...document.images].filter(o => o.naturalWidth > 99).length,
    broken: [...document.images].filter(o => !o.naturalWidth).map(o => o.src)})
  if (parent == window) document.documentElement.setAttribute('seen', seen)
  else parent.postMessage(seen, '*')
})</script>'''

# a window is never as narrow as a phone, a frame is
phone = '''<script>onmessage = e => document.documentElement.setAttribute('seen', e.data)
document.write(`<iframe width=390 height=844 src="${location.search.slice(1)}"></iframe>`)</script>'''

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A copy of the site whose pages report what a browser made of them"
    to = tmp_path_factory.mktemp('site')/'docs'
    shutil.copytree(docs, to)
    for p in to.rglob('*.html'):
        p.write_text(p.read_text(encoding='utf-8').replace('<head>', '<head>'+probe, 1), encoding='utf-8')
    for name in looked_at:   # the pages that axe-core examines
        page = to/name
        page.write_text(page.read_text(encoding='utf-8').replace('<head>', f'<head><script src="{(to/"axe.min.js").as_uri()}"></script>', 1), encoding='utf-8')
    shutil.copy(files('axe_core_python')/'axe.min.js', to)
    (to/'phone.html').write_text(phone, encoding='utf-8')
    return to

def print_of(cmd, path, tries=2, limit=60):
    "What a browser prints, by way of a file: a helper of a browser that hangs would keep a pipe open for ever"
    with path.open('w') as f: process = subprocess.Popen(cmd, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.DEVNULL, start_new_session=True)
    try: code = process.wait(limit)
    except subprocess.TimeoutExpired:
        if tries==1: raise
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)   # and its helpers
        process.wait()
    if code is None: return print_of(cmd, path, tries-1, limit)
    assert code==0, f'{cmd[0]} ended with {code}'
    return path.read_text(encoding='utf-8')

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
def test_a_browser_that_hangs_is_ended(tmp_path):
    "With its helpers, though one of them keeps what it prints to open"
    cmd = ['sh', '-c', f'sleep 600 & echo $! > {tmp_path}/helper; sleep 600']
    with pytest.raises(subprocess.TimeoutExpired): print_of(cmd, tmp_path/'out', limit=1)
    helper = int((tmp_path/'helper').read_text())
    state,end = Path(f'/proc/{helper}/stat'),time.monotonic()+10
    def runs(): return state.exists() and state.read_text().rsplit(')', 1)[1].split()[0]!='Z'
    while runs() and time.monotonic()<end: time.sleep(.05)   # until the system has taken it away
    assert not runs()

def visit(site, page, query='', options=(), narrow=False):
    "The document that Chromium makes of `page` from disk, and its report"
    cmd = [chromium, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
           '--disable-sync', '--disable-background-networking', '--disable-component-update', '--disable-quic',
           '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={site.parent}/{Path(page).stem}',
           *options, '--virtual-time-budget=20000', '--dump-dom',
           f'{(site/"phone.html").as_uri()}?{page}{query}' if narrow else (site/page).as_uri()+query]
    dom = print_of(cmd, site.parent/f'{Path(page).stem}.dom')
    return dom, json.loads(html.unescape(re.search(r'<html[^>]* seen="([^"]*)"', dom)[1]))

@browser
@pytest.mark.parametrize('page', course)
def test_page_in_browser(site, page):
    text = shows(docs/page)
    _,seen = visit(site, page, narrow=True)
    assert not seen['errors'] and not seen['broken'] and not seen['failed'] and not seen['fonts']
    assert seen['width']==390 and seen['too_wide']<=0 and seen['copy']==seen['code']>0
    assert page=='index.html' or seen['here']==[(site/page).as_uri()]
    if 'class="math' in text: assert seen['math'], 'no formula is drawn'
    assert seen['plots'] >= text.count('<img alt="_images')
    for o in course: assert page==o or o=='index.html' or (site/o).as_uri() in seen['listed'], f'{o} is not in the sidebar'

looked_at = ('index.html', 'hashing.html', 'language_model.html', 'experiments/speed.html', 'search.html')   # every kind of page
light,dark = '--blink-settings=preferredColorScheme=1','--blink-settings=preferredColorScheme=0'

@browser
@pytest.mark.parametrize('scheme,narrow', ((light, False), (dark, True)), ids=('light and wide', 'dark on a phone'))
@pytest.mark.parametrize('page', looked_at)
def test_everybody_can_read_it(site, page, scheme, narrow):
    "axe-core finds no serious fault, dark is dark, and no page is wider than the window, a phone's among them"
    _,seen = visit(site, page, '?axe', (scheme, '--window-size=1200,900'), narrow)
    assert not seen['errors'] and not seen['faults']
    assert (sum(seen['background'][:3])<3*128)==(scheme==dark)
    assert seen['too_wide']<=0

@browser
def test_the_reader_chooses_dark(site):
    _,seen = visit(site, 'hashing.html', '?toggle', [light])
    assert not seen['errors'] and sum(seen['background'][:3])<3*128

@browser
@pytest.mark.parametrize('words', ['look-back', 'hash_vectors'])
def test_search_in_browser(site, words):
    dom,seen = visit(site, 'search.html', f'?q={words}')
    assert not seen['errors']
    hits = re.search(r'<ul[^>]* class="search".*?</ul>', dom, flags=re.S)
    assert hits and '<a href=' in hits[0], f'nothing found for {words}'
