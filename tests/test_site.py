"The built site in Chromium: `make docs-test`. No errors, pictures that load, search, narrow and wide, light and dark"
import functools, http.server, os, re, shutil, threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
site = Path(__file__).resolve().parents[1]/'_docs'/'html'
PAGES = sorted(o.relative_to(site).as_posix() for o in site.rglob('*.html') if '_' not in o.parent.name)
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    assert CHROMIUM, 'Chromium is needed, such as that of Debian: apt-get install chromium'
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu',
                                                                    '--disable-background-networking'])
        yield browser
        browser.close()

@pytest.fixture(params=[(400, 'light'), (400, 'dark'), (1400, 'light'), (1400, 'dark')], ids=str)
def page(browser, request):
    "A page that fails the test for errors on its console and for whatever it asks of another host"
    width,scheme = request.param
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    page,wrong = context.new_page(),[]
    page.on('console', lambda o: wrong.append(f'{page.url}: {o.text}') if o.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on('request', lambda r: wrong.append(f'{page.url} asks {r.url}') if '127.0.0.1' not in r.url
            and not r.url.startswith('data:') else None)
    page.on('response', lambda r: wrong.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    page.wrong,page.width,page.scheme = wrong,width,scheme
    yield page
    context.close()

LOOK = """() => ({
    wide: document.documentElement.scrollWidth,
    missing: [...document.images].filter(o => !(o.complete && o.naturalWidth)).map(o => o.src),
    title: document.title,
    dark: getComputedStyle(document.body).backgroundColor})"""

def test_every_page_is_sound(page, address):
    "No errors, all pictures there, nothing wider than the window or from elsewhere, the colours that were asked for"
    assert len(PAGES) > 60
    for name in PAGES:
        page.goto(address + name, wait_until='load')
        seen = page.evaluate(LOOK)
        assert seen['missing'] == [], name
        assert seen['wide'] <= page.width, name
        assert seen['title'], name
        brightness = sum(map(int, re.findall(r'\d+', seen['dark'])[:3]))/3
        assert (brightness < 128) == (page.scheme == 'dark'), name
    assert page.wrong == []

@pytest.mark.parametrize('words, leads_to', [('half-life', 'averaging/rules'), ('BNUpdateCB', 'callbacks/batchnorm')])
def test_search_finds(browser, address, words, leads_to):
    page = browser.new_page()
    page.goto(f'{address}search.html?q={words}')
    page.wait_for_selector('ul.search li a', timeout=60_000)
    page.wait_for_function("!/Searching/.test(document.querySelector('#search-results h2').textContent)")
    found = page.eval_on_selector_all('ul.search li a', 'links => links.map(o => o.href)')
    assert any(leads_to in o for o in found), found
    page.close()

def test_pages_are_small():
    "Below 1 MB each with their pictures, but for the studies"
    def size(name):
        html = (site/name).read_text(encoding='utf-8')
        pictures = {o for o in re.findall(r'<img[^>]* src="([^"]+)"', html) if not o.startswith('data:')}
        return len(html.encode()) + sum(os.path.getsize((site/name).parent/o) for o in pictures)
    assert {o: n for o in PAGES if not o.startswith('experiments/') and (n := size(o)) >= 10**6} == {}
