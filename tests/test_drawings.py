"""The drawings: made by their script, described for those who cannot see them, and true to the library's names."""

import importlib
import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
WHERE = {  # drawing -> the chapter that shows it, and a module that it must name
    "shnet": ("11_shnet", "refseg_nb.models.hcam.HCAM"),
    "sfm": ("09_sfm", "refseg_nb.models.sfm.JointAttention"),
    "hcam": ("10_hcam", "refseg_nb.models.hcam.Gate"),
    "decoder": ("08_baseline", "refseg_nb.models.decoder.UpsampleDecoder"),
    "cmpc": ("17_cmpc", "refseg_nb.models.cmpc.RelationGraph"),
    "lavt": ("18_lavt", "refseg_nb.models.lavt.PWAM"),
    "crossvlt": ("19_crossvlt", "refseg_nb.models.crossvlt.LanguageStage"),
}
spec = importlib.util.spec_from_file_location("drawings", ROOT / "site" / "drawings.py")
drawings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drawings)
by_name = pytest.mark.parametrize("name", WHERE)


def tree(name):
    return ET.fromstring((ROOT / "nbs" / "images" / f"{name}.svg").read_text(encoding="utf-8"))


def test_the_files_are_what_the_script_makes():
    made = {drawing.name: drawing.svg() for drawing in (make() for make in drawings.DRAWINGS)}
    files = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "nbs" / "images").glob("*.svg")}
    assert set(made) == set(files) == set(WHERE)
    assert made == files, "run `python site/drawings.py`"


@by_name
def test_a_drawing_says_what_it_shows(name):
    root = tree(name)
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert (title.get("id"), desc.get("id")) == ("title", "desc")
    assert 15 < len(title.text) < 90 and len(desc.text.split()) > 50


@by_name
def test_a_drawing_names_only_what_exists(name):
    named = {}
    for group in tree(name).iter(f"{SVG}g"):
        if symbol := group.get("data-symbol"):
            texts = ["".join(t.itertext()) for t in group.iter(f"{SVG}text")]
            named.setdefault(symbol, []).append(texts)
    assert WHERE[name][1] in named
    for symbol in named:
        module, _, attribute = symbol.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), symbol
    # and a bold name in the form of a class is that of the symbol which its box stands for
    for symbol, boxes in named.items():
        for texts in boxes:
            first = texts[0] if texts else ""
            if re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}|SFM|HCAM|ASPP|PWAM|MUTAN", first):
                assert symbol.endswith(f".{first}"), (symbol, first)


@by_name
def test_every_bold_class_name_belongs_to_a_box_with_a_symbol(name):
    root = tree(name)
    inside = {id(t) for g in root.iter(f"{SVG}g") if g.get("data-symbol") for t in g.iter(f"{SVG}text")}
    symbols = {g.get("data-symbol", "").rpartition(".")[2] for g in root.iter(f"{SVG}g")}
    for text in root.iter(f"{SVG}text"):
        label = "".join(text.itertext())
        if text.get("class") == "name" and re.fullmatch(r"(?:[A-Z]+[a-z0-9]+){2,}[A-Z]*", label):
            assert id(text) in inside or label in symbols, label


@by_name
def test_a_drawing_is_legible_in_light_and_in_dark(name):
    style = tree(name).find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for half in (light, dark):
        color = lambda selector, half=half: re.search(rf"{re.escape(selector)} {{ fill: (#\w+)", half)[1]
        grounds = [color(f".{kind}") for kind in ("card", *drawings.KINDS)]
        assert all(contrast(color("text"), ground) >= 7 for ground in grounds)
        assert contrast(color(".quiet"), grounds[0]) >= 4.5
        for kind in drawings.KINDS:  # borders and arrows, on the card
            assert contrast(color(f".{kind}-head"), grounds[0]) >= 3
    assert "font-size: 13px" in light
    sizes = [float(t.get("font-size")) for t in tree(name).iter(f"{SVG}tspan") if t.get("font-size")]
    assert all(size >= 10 for size in sizes)


@by_name
def test_everything_lies_on_the_card(name):
    root = tree(name)
    width, height = (float(root.get(k)) for k in ("width", "height"))
    assert (width, root.get("viewBox")) == (800, f"0 0 800 {root.get('height')}")
    for rect in root.findall(f".//{SVG}rect"):
        x, y, w, h = (float(rect.get(k, 0)) for k in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    for path in root.findall(f".//{SVG}path"):
        if (path.get("class") or "").startswith("line"):
            for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.get("d")):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height


def rects(root):
    "Boxes and circles that stand where they say, as (left, top, right, bottom)."
    moved = {id(r) for g in root.iter(f"{SVG}g") if g.get("transform") for r in g.iter(f"{SVG}rect")}
    for r in root.iter(f"{SVG}rect"):
        if id(r) not in moved and r.get("class") != "card":
            x, y, w, h = (float(r.get(k, 0)) for k in ("x", "y", "width", "height"))
            yield x, y, x + w, y + h
    for g in root.iter(f"{SVG}g"):
        if found := re.match(r"translate\(([\d.]+) ([\d.]+)\) scale\(([\d.]+)\)", g.get("transform") or ""):
            x, y, s = map(float, found.groups())
            yield x, y, x + 84 * s, y + 64 * s
    for c in root.iter(f"{SVG}circle"):
        x, y, r = (float(c.get(k)) for k in ("cx", "cy", "r"))
        yield x - r, y - r, x + r, y + r


@by_name
def test_arrows_touch_what_they_point_at(name):
    root = tree(name)
    boxes, loose = list(rects(root)), 0
    tips = [tuple(map(float, p.get("points").split()[0].split(","))) for p in root.iter(f"{SVG}polygon")]
    assert len(tips) >= 5
    for x, y in tips:
        near = any(a - 3 <= x <= c + 3 and b - 3 <= y <= d + 3 for a, b, c, d in boxes)
        inside = any(a + 3 < x < c - 3 and b + 3 < y < d - 3 for a, b, c, d in boxes)
        loose += not near
        assert not inside, f"an arrow runs into a box at {x}, {y}"
    assert loose <= (name == "hcam"), "one arrow leaves the drawing: G of HCAM"


@by_name
def test_the_chapter_shows_it_with_an_alternative_text_and_a_caption(name):
    cells = nbformat.read(ROOT / "nbs" / f"{WHERE[name][0]}.ipynb", as_version=4).cells
    found = [c.source for c in cells if c.cell_type == "markdown" and f"(images/{name}.svg)" in c.source]
    assert len(found) == 1
    alt = re.search(r"!\[([^\]]+)\]\(images/\w+\.svg\)", found[0])[1]
    assert len(alt.split()) >= 10
    caption = found[0].split("\n\n")[1]
    assert caption.startswith("*") and len(caption.split()) >= 30


def test_readme_and_pages_find_the_drawings(tmp_path):
    from refseg_nb.course.tools import readme_from

    text = "![SHNet](images/shnet.svg) and [the tour](00_tour.ipynb)"
    path = tmp_path / "index.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)
    assert readme_from(path) == "![SHNet](nbs/images/shnet.svg) and [the tour](nbs/00_tour.ipynb)\n"
