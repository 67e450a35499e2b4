"""Every built page as a reader with a phone and no network meets it, in headless Chromium.

Wants a built book (`make book`) and Chromium; without one of them these tests are skipped, or
fail where the environment says DIFFNOTES_REQUIRE_BROWSER=1.
"""

import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser as devtools
import pytest

BOOK = Path(__file__).resolve().parent.parent / "_build" / "html"
PAGES = sorted(
    path.relative_to(BOOK).as_posix()
    for path in BOOK.rglob("*.html")
    if not any(part.startswith("_") for part in path.relative_to(BOOK).parts)
)


def absent(what: str):
    if os.environ.get("DIFFNOTES_REQUIRE_BROWSER") == "1":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    if devtools.executable() is None:
        absent("no Chromium on this machine")
    chromium = devtools.Browser()
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def book(chromium):
    site = devtools.Site(BOOK)
    yield site.url
    site.close()


class Anchors(HTMLParser):
    """Collects the places of a page that a link can point to."""

    def __init__(self, text: str):
        super().__init__()
        self.names = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names |= {value for key, value in attrs if key == "id" or (tag, key) == ("a", "name")}


@cache
def anchors(path: Path) -> set[str]:
    return Anchors(path.read_text(encoding="utf8")).names


def dead_links(page: Path, links: list[str]) -> list[str]:
    """Those of a page's links to the same site that lead nowhere."""
    complaints = []
    for link in dict.fromkeys(links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            complaints.append(f"dead link: {link}")
        elif target.suffix == ".html" and unquote(parts.fragment) not in anchors(target):
            complaints.append(f"dead anchor: {link}")
    return complaints


def look(chromium, folder: Path, url: str, page: str) -> list[str]:
    complaints, links = chromium.look(url + page, site=url)
    return complaints + dead_links(folder / page, links)


@pytest.mark.parametrize("page", PAGES or ["(no book)"])
def test_page(page, request):
    if not PAGES:
        absent("no built book in _build/html: run `make book`")
    chromium, url = request.getfixturevalue("chromium"), request.getfixturevalue("book")
    complaints = look(chromium, BOOK, url, page)
    assert not complaints, "\n".join([f"{page}:", *complaints])


def test_chapters_are_numbered_as_their_files():
    chapters = [page for page in PAGES if page[:2].isdigit()]
    if not chapters:
        absent("no built book in _build/html: run `make book`")
    for page in chapters:
        text = (BOOK / page).read_text(encoding="utf8")
        number = re.search(r'<h1><span class="section-number">(\d+)\. ', text)
        assert page.startswith("00_") or number and int(number[1]) == int(page[:2]), page


# One scratch page per kind of failure, so that a silent page is known to be a good one.
MATHS = '<script>MathJax = {startup: {promise: Promise.resolve()}}</script><span class="math">'
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
GOOD = f"""<p id="here">$5, <code>$$</code> <a href="#here">a</a> <a href="good.html#here">b</a>
<a href="https://example.org">c</a> <img src="{PIXEL}" alt="a dot">
{MATHS}<mjx-container>x</mjx-container></span> <pre style="overflow: auto">{"x" * 200}</pre>"""
BROKEN = {
    "mathematics not rendered": rf"{MATHS}\(x\)</span>",
    "MathJax error": f"{MATHS}<mjx-container><mjx-merror>x</mjx-merror></mjx-container></span>",
    "raw markup in the text: '$$": "<p>$$ x $$</p>",
    "raw markup in the text: '$x": "<p>$x$</p>",
    "raw markup in the text: 'the $": r"<p>the $x = \alpha y$ line</p>",
    r"raw markup in the text: '\\(": r"<p>\(x\)</p>",
    "raw markup in the text: '{eq}": "<p>{eq}`eq-x`</p>",
    "raw markup in the text: ':::": "<p>:::{tip}</p>",
    "script error: Error: broken": "<script>throw Error('broken')</script>",
    "script error on the console: broken": "<script>console.error('broken')</script>",
    "script error: SyntaxError": "<script>let a; </script><script>let a;</script>",
    "image does not load: none.png": '<img src="none.png" alt="a dot" loading="lazy">',
    "local request failed (404)": '<link rel="stylesheet" href="none.css">',
    "remote request while loading": '<script src="https://example.org/x.js"></script>',
    "image without alt text: gif;base64": f'<img src="{PIXEL}">',
    "image without alt text: none.png": '<img src="none.png" alt="../folder/none.png">',
    "wider than a 360 px screen": f"<p>{'x' * 200}</p>",
    "dead link: none.html": '<a href="none.html">x</a>',
    "dead anchor: #none": '<a href="#none">x</a>',
    "dead anchor: good.html#none": '<a href="good.html#none">x</a>',
}


@pytest.fixture(scope="module")
def scratch(chromium, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    head = '<!doctype html><title>x</title><meta name="viewport" content="width=device-width">'
    for name, body in {"good": GOOD, **dict(enumerate(BROKEN.values()))}.items():
        (folder / f"{name}.html").write_text(f"{head}<body>{body}", encoding="utf8")
    site = devtools.Site(folder)
    yield folder, site.url
    site.close()


def test_good_page(chromium, scratch):
    assert look(chromium, *scratch, "good.html") == []


@pytest.mark.parametrize("number, complaint", list(enumerate(BROKEN)), ids=list(BROKEN))
def test_broken_page(chromium, scratch, number, complaint):
    assert complaint in "\n".join(look(chromium, *scratch, f"{number}.html"))
