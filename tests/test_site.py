"""The course as pages: every chapter in reading order, every symbol anchored, nothing from another host, and
alive in a browser from a file."""

import ast
import html
import importlib.util
import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import test_browser
import test_explorer
from filelock import FileLock

ROOT = Path(__file__).parent.parent
CHAPTERS = [
    *sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")),
    *sorted(f"library/{p.stem}" for p in (ROOT / "nbs").glob("library/*.ipynb")),
]
missing = [
    name
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "mathjax")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed: `make site` installs what the pages need"
)
browser, axe, drives = test_browser.browser, test_explorer.axe, test_explorer.drives


class Page(HTMLParser):
    "What the tests ask of a page: its text, ids, links, resources, and how many code cells it shows."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.resources, self.relations, self.inputs = set(), [], [], {}, 0
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "id" in a:
            self.ids.add(a["id"])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag == "link" and a.get("rel") in ("next", "prev"):
            self.relations[a["rel"]] = a["href"]
        if tag not in ("a", "link") or a.get("rel") in ("stylesheet", "preload", "icon"):
            self.resources += [a[k] for k in ("src", "href", "srcset", "data") if a.get(k)]
        if tag == "div" and "cell_input" in (a.get("class") or "").split():
            self.inputs += 1


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The pages, built once for all workers, and what the build printed."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    log = base / "site.log"
    with FileLock(base / "site.lock"):
        if not log.exists():
            done = subprocess.run(
                [sys.executable, ROOT / "site" / "build.py", "--out", base / "site"],
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert (base / "site" / "index.html").exists(), done.stderr
            log.write_text(done.stderr, encoding="utf-8")
    return base / "site"


@pytest.fixture(scope="session")
def pages(site):
    found = [*sorted(site.glob("*.html")), *sorted(site.glob("library/*.html"))]
    return {path.relative_to(site).with_suffix("").as_posix(): Page(path) for path in found}


def led_to(name, link):
    "The page that a link of a page leads to."
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link)).removesuffix(".html")


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "site" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def code_cells(name):
    cells = [
        c for c in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"
    ]
    return [c for c in cells if c.source.strip() and not re.match(r"# ?\| *(hide|default_exp)", c.source)]


def test_sphinx_has_nothing_to_complain_about(site):
    assert (site.parent / "site.log").read_text(encoding="utf-8") == ""


def test_next_and_previous_follow_the_reading_order(pages):
    order = ["index", *CHAPTERS, "library", "real_data"]
    assert {*order} <= {*pages}
    for relation, wanted in (("next", [*order[1:], None]), ("prev", [None, *order[:-1]])):
        links = [(name, pages[name].relations.get(relation)) for name in order]
        assert [link and led_to(name, link) for name, link in links] == wanted


def test_nothing_comes_from_another_host(site, pages):
    for name, page in pages.items():
        assert [r for r in page.resources if re.match(r"(https?:)?//", r)] == [], name
        assert not re.search(r"(?:import|from)\s*\(?[\"']https?:", page.text), name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), (
            path.name
        )


def test_every_link_inside_leads_somewhere(site, pages):
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = led_to(name, file) if file else name
            assert (site / name).parent.joinpath(file).exists(), f"{name}: {link}"
            if anchor and Path(file).suffix in ("", ".html"):
                assert anchor in pages[target].ids, f"{name}: {link}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_what_is_shown_is_the_notebook_without_nbdevs_directives(pages, name):
    page, cells = pages[name], code_cells(name)
    assert page.inputs == len(cells)
    shown = re.findall(r'<div class="cell_input.*?<pre>(.*?)</pre>', page.text, re.S)
    plain = [re.sub(r"<.*?>", "", text) for text in shown]
    assert not any(text.startswith(("#|", "# |")) for text in plain)
    for cell, text in zip(cells, plain, strict=True):
        source = re.sub(r"\A(# ?\|.*\n)+", "", cell.source)
        assert html.unescape(text).strip("\n") == source.strip("\n")


def test_every_public_name_has_its_anchor_and_stands_in_the_list(pages):
    listed, where = set(pages["library"].links), {id: name for name in CHAPTERS for id in pages[name].ids}
    for path in sorted((ROOT / "refseg_nb").rglob("*.py")):
        if path.name == "_modidx.py" or "exercises" in path.parts:
            continue
        if "File to edit: " not in path.read_text(encoding="utf-8"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = next(
            ast.literal_eval(n.value)
            for n in body
            if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
        )
        for name in [module, *(f"{module}.{n}" for n in names)]:
            assert name in where, name
        for name in (f"{module}.{n}" for n in names):
            assert f"{where[name]}.html#{name}" in listed, name


def test_names_in_code_lead_to_the_chapter_that_builds_them(pages):
    text = pages["03_refer_format"].text
    assert re.search(
        r'<a class="symbol" href="90_course.html#refseg_nb.course.tools.expect_error"><span'
        r' class="n">expect_error</span></a>',
        text,
    )
    load = r'<span class="n">refseg_nb</span><span class="o">\.</span><span class="n">load</span></a>'
    assert re.search(
        rf'href="library/segmenter.html#refseg_nb.inference.segmenter.load">{load}', pages["00_tour"].text
    )
    assert not re.search(
        r'<span class="o">\.</span><a class="symbol"', "".join(p.text for p in pages.values())
    )


CELL = """X = 1
_y = [z for z in range(3)]
A, B = 3, 4
N: int = 5
def f(a): "One."
class C:
    "Two.\\n\\nMore."
    def m(self): "Three."
    def _n(self): pass"""


def test_symbols_and_links_of_a_cell(steps):
    found = {s.name: (s.kind, s.summary) for s in steps.symbols_of(CELL, "p.q")}
    assert found == {
        "p.q.X": ("data", ""),
        "p.q.A": ("data", ""),
        "p.q.B": ("data", ""),
        "p.q.N": ("data", ""),
        "p.q.f": ("function", "One."),
        "p.q.C": ("class", "Two."),
        "p.q.C.m": ("method", "Three."),
    }
    sources = (
        "#| default_exp q",
        "# | export\ndef f(a): pass\ndef g(b): pass",
        "#| export y.z\ndef o(a): pass",
        "#| hide\nfrom refseg_nb.x import h as k, m\n%time f(1)\nm = 3",
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# T"), *map(nbformat.v4.new_code_cell, sources)]
    )
    assert steps.links(steps.Chapter("01_t", notebook, "refseg_nb.q")) == {
        "f": "refseg_nb.q.f",
        "g": "refseg_nb.q.g",
        "o": "refseg_nb.y.z.o",
        "k": "refseg_nb.x.h",
    }
    assert (
        steps.directives(notebook.cells[1]) == {"default_exp": "q"}
        and steps.directives(notebook.cells[0]) == {}
    )


# ---- in a browser, from a file, with the network off


@pytest.fixture(scope="module")
def visit(browser, site):
    opened = []

    def open_page(name, **options):
        context = browser.new_context(
            **dict(viewport={"width": 1300, "height": 900}, offline=True, bypass_csp=True) | options
        )
        page = test_browser.watched(context)
        page.goto(f"{(site / 'index.html').as_uri().removesuffix('index.html')}{name}")
        opened.append((context, page))
        return page

    yield open_page
    for context, page in opened:
        assert page.trouble == []
        context.close()


@drives
def test_formulas_are_drawn(visit, pages):
    for name in ("09_sfm", "10_hcam", "16_aggregations"):
        page = visit(f"{name}.html")
        page.wait_for_selector("mjx-container svg")
        page.evaluate("async () => await MathJax.startup.promise")
        assert page.locator("mjx-container svg").count() == len(re.findall(r'class="math ', pages[name].text))
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


@drives
def test_search_finds_a_word_and_a_symbol(visit):
    page = visit("search.html?q=pickle")
    page.wait_for_selector("#search-results li a")
    assert "03_refer_format.html" in "".join(
        a.get_attribute("href") for a in page.locator("#search-results li a").all()
    )
    page = visit("search.html?q=load_pickle")
    page.wait_for_selector("#search-results li a")
    page.locator("#search-results li a[href*='#refseg_nb.data.refer.load_pickle']").first.click()
    page.wait_for_url("**/03_refer_format.html#refseg_nb.data.refer.load_pickle")


@drives
def test_the_explorer_is_alive(visit):
    page = visit("15_explorer.html")
    page.wait_for_selector(".refseg-explorer .stage canvas")
    page.locator(".stage").scroll_into_view_if_needed()
    page.mouse.click(*test_explorer.cell(page, 5, 6))
    test_explorer.settle(page)
    assert (
        test_explorer.locked(page) == {"panel": 0, "pixel": [5, 6], "grid": [12, 12]}
        and test_explorer.shown(page)["from"] == "pixel row 5, column 6"
    )
    page.locator(".word").nth(1).click()
    test_explorer.settle(page)
    assert test_explorer.locked(page) == {"panel": 0, "word": 1}
    # the page's own style leaves the labels alone
    assert page.locator(".atlas .row").first.bounding_box()["width"] > 15


@drives
def test_a_narrow_page_does_not_scroll_sideways(visit):
    for name in ("03_refer_format", "15_explorer", "library"):
        page = visit(f"{name}.html", viewport={"width": 390, "height": 844})
        test_explorer.settle(page)
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), name


@drives
@pytest.mark.parametrize("scheme, width", [("light", 1300), ("dark", 1300), ("light", 390)])
def test_axe_finds_nothing_serious(visit, axe, scheme, width):
    page = visit("09_sfm.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    page.wait_for_selector("mjx-container svg")
    page.evaluate(axe)
    found = page.evaluate(
        """async () => (await axe.run({preload: false})).violations.filter(v => ['serious', 'critical'].includes(v.impact))
                                         .map(v => [v.id, v.help, v.nodes.map(n => n.html + n.failureSummary).slice(0, 3)])"""
    )
    assert found == []
