"The committed site works from disk, without a network"
import contextlib, html, json, os, re, shutil, signal, subprocess, sys, time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
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
  const faults = location.search == '?axe' ? (await axe.run({resultTypes: ['violations']})).violations : []
  document.documentElement.setAttribute('seen', JSON.stringify({errors,
    faults: faults.filter(o => ['serious', 'critical'].includes(o.impact)).flatMap(o => o.nodes.map(n => o.id + ': ' + n.html.slice(0, 200))),
    background: getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number),
    too_wide: document.documentElement.scrollWidth - innerWidth,
    math: document.querySelectorAll('mjx-container mjx-c').length,
    fonts: [...document.fonts].filter(o => o.status == 'error').map(o => o.family),
    failed: document.querySelectorAll('mjx-merror').length,
    plots: [...document.images].filter(o => o.naturalWidth > 99).length,
    broken: [...document.images].filter(o => !o.naturalWidth).map(o => o.src)}))
})</script>'''

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

def visit(site, page, query='', options=()):
    "The document that Chromium makes of `page` from disk, and its report"
    cmd = [chromium, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
           '--disable-sync', '--disable-background-networking', '--disable-component-update', '--disable-quic',
           '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={site.parent}/{Path(page).stem}',
           *options, '--virtual-time-budget=20000', '--dump-dom', (site/page).as_uri()+query]
    dom = print_of(cmd, site.parent/f'{Path(page).stem}.dom')
    return dom, json.loads(html.unescape(re.search(r'<html[^>]* seen="([^"]*)"', dom)[1]))

def shows(page): return page.read_text(encoding='utf-8') if page.exists() else ''

course = [p.relative_to(docs).as_posix() for p in pages if 'class="cell ' in shows(p)]

@browser
@pytest.mark.parametrize('page', course)
def test_page_in_browser(site, page):
    text = shows(docs/page)
    dom,seen = visit(site, page)
    assert not seen['errors'] and not seen['broken'] and not seen['failed'] and not seen['fonts']
    if 'class="math' in text: assert seen['math'], 'no formula is drawn'
    assert seen['plots'] >= text.count('<img alt="_images')
    for o in course: assert page==o or Path(o).name in dom, f'{o} is not in the sidebar'

looked_at = ('index.html', 'hashing.html', 'language_model.html', 'experiments/speed.html', 'search.html')   # every kind of page
light,dark = '--blink-settings=preferredColorScheme=1','--blink-settings=preferredColorScheme=0'

@browser
@pytest.mark.parametrize('scheme,size', ((light, '1200,900'), (dark, '390,844')), ids=('light and wide', 'dark on a phone'))
@pytest.mark.parametrize('page', looked_at)
def test_everybody_can_read_it(site, page, scheme, size):
    "axe-core finds no serious fault, dark is dark, and no page is wider than the window"
    _,seen = visit(site, page, '?axe', (scheme, f'--window-size={size}'))
    assert not seen['errors'] and not seen['faults']
    assert (sum(seen['background'][:3])<3*128)==(scheme==dark)
    assert seen['too_wide']<=0

@browser
@pytest.mark.parametrize('words', ['look-back', 'hash_vectors'])
def test_search_in_browser(site, words):
    dom,seen = visit(site, 'search.html', f'?q={words}')
    assert not seen['errors']
    hits = re.search(r'<ul[^>]* class="search".*?</ul>', dom, flags=re.S)
    assert hits and '<a href=' in hits[0], f'nothing found for {words}'
