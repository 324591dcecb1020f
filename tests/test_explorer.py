"""The attention explorer in a real browser: the exported page from a file with no network, and JupyterLab
with a kernel."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest
import test_browser
import torch
import traitlets

import refseg_nb
from refseg_nb.attention.explorer import (
    Explorer,
    outline,
    pack_rows,
    pool_grid,
    pool_pixels,
    unpack_rows,
    view,
)
from refseg_nb.attention.maps import AttentionError, AttentionMaps, AttentionSteps, weight_steps
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import vocabulary_for
from refseg_nb.models.hub import save_model
from refseg_nb.models.registry import create_model

browser, lab = test_browser.browser, test_browser.lab
in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(
        test_browser.CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
    ),
]
drives = lambda test: in_browser[0](in_browser[1](test))


def rows(shape, seed=0, power=4):
    a = np.random.default_rng(seed).random(shape) ** power
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def explorer(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    seg = refseg_nb.load()
    sample = next(
        s
        for s in refer.samples("val")
        if len(s.sentence.tokens) >= 5
        and seg.segment(refer.load_image(s.image_id), s.text).mask.mean() > 0.01
    )
    return Explorer(
        "shnet-refshapes", refer.load_image(sample.image_id), sample.text, truth=refer.mask(sample.ann_id)
    )


@pytest.fixture(scope="module")
def page_of(browser, tmp_path_factory):
    """Open an explorer's exported page from a file, with no network; what the page logs or asks for must
    stay empty."""
    opened = []

    def open_page(explorer, **options):
        path = tmp_path_factory.mktemp("page") / "page.html"
        explorer.to_html(path)
        context = browser.new_context(
            **dict(viewport={"width": 1100, "height": 900}, offline=True, has_touch=True) | options
        )
        page = test_browser.watched(context)
        page.goto(path.as_uri())
        page.wait_for_selector(".refseg-explorer .stage canvas")
        opened.append((context, page))
        settle(page)
        return page

    yield open_page
    for context, page in opened:
        assert page.trouble == []
        context.close()


def settle(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def shown(page, panel=0):
    settle(page)
    return page.evaluate("k => document.querySelector('.refseg-explorer').shown()[k]", panel)


def put(page, **traits):
    page.evaluate(
        "traits => { const m = document.querySelector('[data-state]').explorer; for (const [k, v] of"
        " Object.entries(traits)) m.set(k, v); }",
        traits,
    )


def locked(page):
    return page.evaluate("() => document.querySelector('[data-state]').explorer.get('locked')")


def cell(page, row, column, grid=(12, 12), panel=0):
    box = page.locator(".stage").nth(panel).bounding_box()
    return (
        box["x"] + box["width"] * (column + 0.5) / grid[1],
        box["y"] + box["height"] * (row + 0.5) / grid[0],
    )


# ---- without a browser


def test_bytes_keep_the_weights():
    a = rows((3, 40, 300))
    a[0, 0] = 0
    a[1, 1, 1:] = 0
    back = unpack_rows(pack_rows(a))
    assert np.abs(np.sqrt(back) - np.sqrt(a)).max() <= np.sqrt(a.max()) * 0.003 and (back[0, 0] == 0).all()
    assert np.abs(back.sum(-1) - a.sum(-1)).max() < 0.02
    for scale in (1e-9, 1e4):
        assert (
            np.abs(np.sqrt(unpack_rows(pack_rows(scale * a))) - np.sqrt(scale * a)).max()
            <= np.sqrt(scale * a.max()) * 0.003
        )


@pytest.mark.parametrize("grid, side", [((7, 9), 4), ((3, 5), 10), ((26, 26), 6)])
def test_pooling_averages_queries_and_adds_keys(grid, side):
    n = grid[0] * grid[1]
    a = rows((2, n, n))
    of, (h, w) = pool_grid(grid, side)
    assert max(h, w) <= side and set(of) == set(range(h * w))
    pooled = pool_pixels(a, grid, side)
    for q in (0, h * w - 1):
        for k in (0, h * w // 2):
            assert np.isclose(
                pooled[1, q, k], np.mean([a[1, i][of == k].sum() for i in np.flatnonzero(of == q)]), rtol=1e-4
            )
    assert np.allclose(pooled.sum(-1), 1, atol=1e-4)


def test_outline_encloses_the_mask():
    from matplotlib.path import Path

    yy, xx = np.mgrid[:40, :60]
    mask = (yy - 18) ** 2 + (xx - 40) ** 2 < 150
    (line,) = outline(mask)
    inside = (
        Path(np.reshape(line, (-1, 2)) * (60, 40))
        .contains_points(np.column_stack([xx.ravel() + 0.5, yy.ravel() + 0.5]))
        .reshape(mask.shape)
    )
    assert (inside == mask).all()
    assert (
        len(outline(np.eye(3, dtype=bool))) >= 1
        and outline(np.ones((4, 4), bool))
        and not outline(np.zeros((4, 4), bool))
    )


def test_what_cannot_be_locked_is_refused(explorer):
    bad = [
        {"word": 99},
        {"pixel": [0, 12]},
        {"pixel": [-1, 0]},
        {"box": [2, 2, 2, 5]},
        {"mask": "both"},
        {},
        {"word": 0, "pixel": [0, 0]},
    ]
    for what in [*bad, {"panel": 3, "word": 0}]:
        with pytest.raises(traitlets.TraitError):
            explorer.locked = what
    for name, value in {"level": "7", "head": "first", "kind": "flow", "direction": "up"}.items():
        with pytest.raises(traitlets.TraitError):
            setattr(explorer, name, value)
    assert explorer.locked is None


def test_from_arrays_names_what_is_wrong(explorer):
    picture = np.zeros((8, 8, 3), np.uint8)
    good = dict(image=picture, words=["a", "b"], attention=rows((1, 1, 6, 6)), grid=(2, 2))
    assert not Explorer.from_arrays(**good).live
    with pytest.raises(AttentionError, match="key axis has 5"):
        Explorer.from_arrays(**good | dict(attention=rows((1, 1, 6, 5))))
    with pytest.raises(AttentionError, match="NaN or infinite values along the key"):
        Explorer.from_arrays(**good | dict(attention=rows((1, 1, 6, 6)) * np.nan))
    with pytest.raises(AttentionError, match="must sum to one along the key axis"):
        Explorer.from_arrays(**good | dict(attention=2 * rows((1, 1, 6, 6))))
    with pytest.raises(AttentionError, match=r"truth: a mask is a bool array \[H, W\], not float64"):
        Explorer.from_arrays(**good, truth=np.zeros((8, 8)))
    maps = AttentionMaps.from_arrays(good["attention"], ["a", "b"], (2, 2))
    with pytest.raises(AttentionError, match="words are"):
        Explorer.from_arrays(picture, ["a"], maps)


def test_editing_puts_the_new_answer_beside_the_old_one(explorer):
    picture = explorer._picture
    mine = Explorer("shnet-refshapes", picture, "the ball")
    mine.locked = {"word": 1}
    mine.phrase = "the red ball"
    assert (
        [p.words for p in mine.panels] == [["the", "ball"], ["the", "red", "ball"]]
        and mine.locked is None
        and mine.error == ""
    )
    mine.phrase = "  "
    assert "empty" in mine.error and len(mine.panels) == 2 and mine.answered == 2
    mine.phrase = "the ball on the left"
    assert [p.phrase for p in mine.panels] == ["the ball", "the ball on the left"] and mine.error == ""
    mine.keep()
    assert [p.phrase for p in mine.panels] == ["the ball on the left"] and not mine.can_keep
    seg = refseg_nb.load()
    assert np.array_equal(mine.panels[0].predicted, seg.segment(picture, "the ball on the left").mask)
    two = Explorer(seg, picture, "the ball", beside="shnet-refshapes")
    two.phrase = "the red ball"
    assert (
        [p.phrase for p in two.panels] == ["the red ball"] * 2
        and [p.title for p in two.panels] == ["model 1", "shnet-refshapes"]
        and not two.can_keep
    )


def test_pages_are_small_and_complete(explorer, tmp_path):
    large = Explorer.from_arrays(
        np.zeros((64, 96, 3), np.uint8),
        [f"w{i}" for i in range(12)],
        rows((6, 8, 688, 688), power=2),
        (26, 26),
    )
    page = large.to_html(tmp_path / "large.html")
    assert (
        len((tmp_path / "large.html").read_bytes()) < 2_000_000
        and (tmp_path / "large.html").read_text(encoding="utf-8") == page
    )
    for text in (page, explorer.to_html()):
        assert "http:" not in text and "https:" not in text and "import(" not in text
    with pytest.raises(AttentionError, match="fewer levels, layers or heads"):
        large.to_html(limit=100_000)
    assert (
        explorer.to_png()[:4] == b"\x89PNG"
        and "<svg" in explorer.to_svg(tmp_path / "figure.svg")
        and (tmp_path / "figure.svg").exists()
    )


def test_the_notebook_gets_a_live_view_a_page_and_a_picture(explorer):
    data = explorer._repr_mimebundle_()[0]
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "image/png", "text/plain"} <= set(
        data
    ) and len(data["text/plain"]) < 300


# ---- the exported page

LOCKS = [
    {"pixel": [3, 4], "grid": [12, 12]},
    {"word": 1},
    {"box": [2, 3, 6, 5], "grid": [12, 12]},
    {"mask": "predicted"},
    {"mask": "truth"},
]


@drives
def test_the_page_computes_what_python_computes(explorer, page_of):
    page = page_of(explorer)
    for i, what in enumerate(LOCKS):
        for kind in ("raw", "rollout", "relevance"):
            for direction in ("looks", "is looked at"):
                level, layer, head = (
                    (2, 3, 4)[i % 3],
                    i % 2,
                    ("mean", "max", "0", "1")[i % 4] if kind == "raw" else "mean",
                )
                put(
                    page,
                    locked={"panel": 0} | what,
                    kind=kind,
                    direction=direction,
                    level=str(level),
                    layer=layer,
                    head=head,
                )
                got, (pixels, words) = (
                    shown(page),
                    view(explorer.panels[0], what, level, layer, head, kind, direction),
                )
                where = (what, kind, direction, level, layer, head)
                mine, theirs = (
                    np.concatenate([words, pixels.ravel()]),
                    np.concatenate([got["words"], got["pixels"]]),
                )
                # the bytes of a column are steps of other rows' largest weights
                step = 0.01 if direction == "looks" else 0.03
                assert np.abs(np.sqrt(theirs) - np.sqrt(mine)).max() < step * np.sqrt(mine.max()), where


@drives
def test_point_click_lock_and_free(explorer, page_of):
    page = page_of(explorer)
    assert "the answer" in shown(page)["from"] and locked(page) is None
    page.mouse.move(*cell(page, 3, 4))
    assert shown(page)["from"] == "pixel row 3, column 4" and "= 100 %" in page.locator(".says").inner_text()
    first = shown(page)["words"]
    page.mouse.move(*cell(page, 8, 9))
    assert shown(page)["from"] == "pixel row 8, column 9" and shown(page)["words"] != first
    page.mouse.click(*cell(page, 8, 9))
    assert locked(page) == {"panel": 0, "pixel": [8, 9], "grid": [12, 12]}
    page.mouse.move(*cell(page, 1, 1))
    assert (
        shown(page)["from"] == "pixel row 8, column 9"
        and "Row 1, column 1:" in page.locator(".readout").inner_text()
    )
    page.keyboard.press("Escape")
    assert locked(page) is None
    page.hover(".word >> nth=1")
    settle(page)
    assert shown(page)["from"] == f"“{explorer.panels[0].words[1]}”"
    page.click(".word >> nth=1")
    settle(page)
    assert (
        locked(page) == {"panel": 0, "word": 1}
        and page.locator(".word >> nth=1").get_attribute("aria-pressed") == "true"
    )
    page.click(".word >> nth=1")
    assert locked(page) is None


@drives
def test_a_box_the_masks_and_the_small_maps(explorer, page_of):
    page = page_of(explorer)
    page.mouse.move(*cell(page, 2, 3))
    page.mouse.down()
    page.mouse.move(*cell(page, 4, 4))
    page.mouse.move(*cell(page, 5, 6))
    page.mouse.up()
    assert locked(page) == {"panel": 0, "box": [2, 3, 6, 7], "grid": [12, 12]}
    page.get_by_role("button", name="Truth").click()
    assert locked(page) == {"panel": 0, "mask": "truth"} and "true mask" in shown(page)["from"]
    assert (
        "inside the answer" in page.locator(".inside").inner_text()
        and "inside the true mask" in page.locator(".inside").inner_text()
    )
    cells = page.locator(".atlas button")
    assert cells.count() == 3 * 2 * 4  # levels, layers, (mean, max, two heads)
    before = shown(page)["pixels"]
    page.get_by_role("radio", name="level 2, layer 0, head 1").click()
    assert (
        shown(page)["pixels"] != before
        and page.evaluate("() => document.querySelector('[data-state]').explorer.get('level')") == "2"
    )
    page.keyboard.press("ArrowDown")
    settle(page)
    assert (
        page.locator(".atlas [aria-checked=true]").get_attribute("aria-label") == "level 2, layer 1, head 1"
    )
    assert page.locator(".atlas [tabindex='0']").count() == 1
    page.get_by_label("Show").select_option("rollout")
    settle(page)
    assert page.locator(".atlas button").count() == 6 and "Rollout over" in page.locator(".says").inner_text()
    page.get_by_label("Direction").select_option("is looked at")
    settle(page)
    assert "no fixed sum" in page.locator(".says").inner_text()


@drives
def test_the_keyboard_alone(explorer, page_of):
    page = page_of(explorer)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.className") == "stage":
            break
    else:
        raise AssertionError("the picture cannot be reached with Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert shown(page)["from"] == "pixel row 7, column 7"
    page.wait_for_function(
        "() => document.querySelector('[aria-live]').textContent.startsWith('pixel row 7, column 7:')"
    )
    page.keyboard.press("Enter")
    assert locked(page) == {"panel": 0, "pixel": [7, 7], "grid": [12, 12]}
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Enter")
    assert locked(page) == {"panel": 0, "box": [6, 6, 8, 8], "grid": [12, 12]}
    outline_width = page.evaluate("() => getComputedStyle(document.activeElement).outlineWidth")
    assert outline_width == "3px"  # the focus can be seen


@drives
def test_touch(explorer, page_of):
    page = page_of(explorer, viewport={"width": 390, "height": 844})
    # nothing sticks out of a narrow page
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.locator(".stage").scroll_into_view_if_needed()
    page.touchscreen.tap(*cell(page, 5, 6))
    settle(page)
    assert locked(page) == {"panel": 0, "pixel": [5, 6], "grid": [12, 12]}
    page.locator(".word").nth(1).tap()
    settle(page)
    assert locked(page) == {"panel": 0, "word": 1}


@drives
def test_without_a_kernel_the_phrase_cannot_be_edited_and_says_so(explorer, page_of):
    page = page_of(explorer)
    assert (
        page.locator("input[type=text]").get_attribute("readonly") is not None
        and page.get_by_role("button", name="Segment").is_disabled()
    )
    assert "needs a model and a running kernel" in page.locator(".status").inner_text()


@drives
def test_side_by_side_with_other_grids_and_one_way_attention(page_of):
    picture, words = np.zeros((48, 64, 3), np.uint8), ["the", "</script>", "<b>&"]
    left = Explorer.from_arrays(
        picture, words, rows((1, 2, 9 * 12 + 3, 9 * 12 + 3)), (9, 12), predicted=np.eye(48, 64, dtype=bool)
    )
    right = Explorer.from_arrays(
        picture, words, rows((2, 1, 24, 3)), (4, 6), queries="pixels", keys="words", title="one way"
    )
    left.panels = [left.panels[0], right.panels[0]]
    left.data = left._pack(10**7)
    page = page_of(left)
    assert (
        page.locator(".panel").count() == 2
        and page.locator(".word .text >> nth=1").inner_text() == "</script>"
    )
    page.mouse.click(*cell(page, 8, 11, (9, 12)))
    assert (
        shown(page, 0)["from"] == "pixel row 8, column 11"
        and shown(page, 1)["from"] == "pixel row 3, column 5"
    )
    assert shown(page, 1)["pixels"] is None and np.allclose(
        shown(page, 1)["words"], right.panels[0].maps["raw"].levels[1].weights[1, 0, 23], atol=5e-3
    )
    page.locator(".panel").nth(1).locator(".word").nth(2).click()
    settle(page)
    assert "no attention in the chosen direction" in page.locator(".says").nth(1).inner_text()
    assert np.allclose(
        shown(page, 1)["pixels"], right.panels[0].maps["raw"].levels[1].weights[1, 0, :, 2], atol=5e-3
    )


# ---- how a weight is made


def unfold(page, **traits):
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    put(page, **traits)
    return shown(page)["steps"]


@drives
def test_the_steps_of_a_biased_model_are_those_of_python(page_of, tmp_path, tiny_root):
    torch.manual_seed(6)
    refer = Refer(tiny_root, "refshapes")
    vocabulary = vocabulary_for(refer)
    model = create_model(
        "shnet", vocab_size=len(vocabulary), preset="refshapes", sfm_relative=True, sfm_word_bias=1.5
    ).eval()
    for layer in model.sfm[0].layers:
        torch.nn.init.normal_(layer.attention.bias.relative)
    save_model(tmp_path / "m", model, vocabulary)
    sample = refer.samples("val")[0]
    explorer = Explorer(refseg_nb.load(tmp_path / "m"), refer.load_image(sample.image_id), "the red ball")
    page, maps = page_of(explorer), explorer.panels[0].maps["raw"]
    for what, query, level, layer, head in [
        ({"pixel": [3, 4], "grid": [12, 12]}, 40, 3, 0, 1),
        ({"pixel": [11, 0], "grid": [12, 12]}, 132, 2, 1, 0),
        ({"word": 2}, 146, 2, 1, 0),
    ]:
        steps = unfold(page, locked={"panel": 0} | what, level=str(level), layer=layer, head=str(head))
        want = weight_steps(maps, level, layer, head, query)
        got = {name: np.array([key[name] for key in steps["keys"]]) for name in ("score", "bias")}
        assert np.allclose(got["bias"], want["bias"], atol=1e-5)
        off = np.array([np.inf if key["error"] is None else key["error"] + 2e-3 for key in steps["keys"]])
        kept = np.isfinite(off)
        assert kept.sum() > 20 and (np.abs(got["score"] - want["scaled"])[kept] <= off[kept]).all()
        assert bool(want["bias"].any()) == (query < 144)
    assert "+ bias" in page.locator(".made thead").inner_text()
    assert "The learned bias adds" in page.locator(".walk").inner_text()


@drives
def test_the_steps_are_those_of_python(explorer, page_of):
    page, maps = page_of(explorer), explorer.panels[0].maps["raw"]
    for what, query, level, layer, head in [
        ({"pixel": [3, 4], "grid": [12, 12]}, 40, 3, 0, 1),
        ({"word": 2}, 146, 2, 1, 0),
        ({"word": 0}, 144, 4, 0, 1),
    ]:
        steps = unfold(page, locked={"panel": 0} | what, level=str(level), layer=layer, head=str(head))
        want = weight_steps(maps, level, layer, head, query)
        got = {
            name: np.array([key[name] for key in steps["keys"]])
            for name in ("score", "weight", "length", "added", "exp")
        }
        off = [np.inf if key["error"] is None else key["error"] + 2e-3 for key in steps["keys"]]
        kept = np.isfinite(off)
        assert kept.sum() > 20 and (np.abs(got["score"] - want["scaled"])[kept] <= np.array(off)[kept]).all()
        assert (want["scaled"] <= got["score"] + 2e-3)[~kept].all()  # "< …" is true
        assert (
            np.allclose(got["length"], want["length"], rtol=1e-5)
            and np.isclose(steps["sum"], want["exp"].sum(), rtol=0.02)
            and steps["width"] == 32
        )
        for name in ("weight", "added", "exp"):
            assert np.abs(np.sqrt(got[name]) - np.sqrt(want[name])).max() < 0.01 * np.sqrt(
                want[name].max()
            ), name
        assert [k["key"] for k in steps["pixels"]] == list(
            np.argsort(-got["weight"][:144], kind="stable")[:6]
        )
        rows = page.locator(".made tbody tr")
        assert (
            rows.count() == len(maps.words) + 6 + 1
            and f"all {144 + len(maps.words)} keys" in page.locator(".made tfoot").inner_text()
        )
        top = steps["pixels"][0]
        assert f"row {top['key'] // 12}, col {top['key'] % 12}" in rows.nth(len(maps.words)).inner_text()
    heads = [
        text.replace("\N{NO-BREAK SPACE}", " ") for text in page.locator(".made thead th").all_inner_texts()
    ]
    assert heads == [
        "key",
        "q·k",
        "÷ √32 = s",
        "+ mask",
        "exp (s − max)",
        "÷ sum = weight",
        "× length",
        "adds",
    ]
    best = int(want["weight"].argmax())
    walk = page.locator(".walk").inner_text()
    assert f"s = {want['scaled'][best]:.1f}"[:-1] in walk.replace("−", "-") and "the mask adds 0" in walk


@drives
def test_what_has_no_steps_says_what_is_missing(explorer, page_of):
    page = page_of(explorer)
    text = lambda: page.locator(".made .why").inner_text()
    assert (
        "one head, in the grid of small maps; one pixel or one word" in unfold(page)["missing"]
        and page.locator(".made table").is_hidden()
    )
    assert text().endswith("Still to choose: one head, in the grid of small maps; one pixel or one word.")
    assert "raw attention" in unfold(page, kind="rollout", locked={"panel": 0, "word": 1})["missing"]
    assert (
        "the direction “what it looks at”."
        in unfold(page, kind="raw", head="0", direction="is looked at")["missing"]
    )
    assert (
        "one pixel or one word."
        in unfold(page, direction="looks", locked={"panel": 0, "box": [1, 1, 3, 3], "grid": [12, 12]})[
            "missing"
        ]
    )
    # a box of one pixel is one query
    assert "keys" in unfold(page, locked={"panel": 0, "box": [1, 1, 2, 2], "grid": [12, 12]})
    assert page.locator(".made .why").is_hidden() and page.locator(".made table").is_visible()


@drives
def test_steps_of_arrays_pooled_or_one_way_or_without(page_of):
    picture, words, rng = np.zeros((48, 64, 3), np.uint8), ["a", "b"], np.random.default_rng(0)
    scores = rng.standard_normal((1, 1, 12, 2)).astype(np.float32)
    steps = AttentionSteps(np.log(np.exp(scores).sum(-1)), rng.random((1, 1, 2), dtype=np.float32), 9)
    one_way = AttentionMaps.from_arrays(
        np.exp(scores) / np.exp(scores).sum(-1, keepdims=True), words, (3, 4), "pixels", "words", steps=steps
    )
    page = page_of(Explorer.from_arrays(picture, words, one_way))
    found = unfold(page, locked={"panel": 0, "pixel": [2, 1], "grid": [3, 4]})
    assert (
        np.allclose([k["score"] for k in found["keys"]], scores[0, 0, 9], atol=0.03)
        and found["pixels"] == []
        and page.locator(".made tbody tr").count() == 2
    )
    assert (
        page_of(Explorer.from_arrays(picture, words, rows((1, 1, 12, 2)), (3, 4), "pixels", "words"))
        .locator(".made")
        .count()
        == 0
    )
    n = 30 * 30 + 2
    steps = AttentionSteps(np.zeros((1, 2, n), np.float32), np.ones((1, 2, n), np.float32), 4)
    large = Explorer.from_arrays(
        picture, words, AttentionMaps.from_arrays(rows((1, 2, n, n)), words, (30, 30), steps=steps)
    )
    page = page_of(large)  # below two megabytes, so pooled
    assert (
        "Pixel to pixel is kept at"
        in unfold(page, head="1", locked={"panel": 0, "pixel": [2, 1], "grid": [30, 30]})["missing"]
    )
    assert len(unfold(page, locked={"panel": 0, "word": 1})["keys"]) == n


@drives
def test_the_steps_by_keyboard_and_on_a_narrow_page(explorer, page_of):
    page = page_of(explorer, viewport={"width": 390, "height": 844})
    put(page, head="0", locked={"panel": 0, "word": 1})
    page.locator(".made summary").focus()
    page.keyboard.press("Enter")
    settle(page)
    assert page.locator(".made table").is_visible() and page.evaluate(
        "() => document.documentElement.scrollWidth <= innerWidth"
    )
    page.keyboard.press("Tab")
    # the table can be scrolled
    assert page.evaluate("() => document.activeElement.getAttribute('role')") == "region"
    page.keyboard.press("Escape")
    assert locked(page) is None


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if npm is None:
        pytest.skip("npm is not installed: axe-core cannot be fetched")
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"],
        capture_output=True,
        timeout=120,
    )
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if done.returncode or not source.exists():
        pytest.skip("axe-core cannot be fetched")
    return source.read_text(encoding="utf-8")


@drives
@pytest.mark.parametrize("scheme, width", [("light", 1100), ("dark", 1100), ("light", 390)])
def test_axe_finds_nothing(explorer, page_of, axe, scheme, width):
    page = page_of(explorer, color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True)
    page.evaluate(axe)
    for what in (None, {"panel": 0, "word": 0}, {"panel": 0, "pixel": [6, 6], "grid": [12, 12]}):
        unfold(page, locked=what, head="mean" if what is None else "1")
        page.wait_for_timeout(120)  # until the chips have their colours
        found = page.evaluate(
            "async () => (await axe.run()).violations.map(v => [v.id, v.help, v.nodes.map(n => n.html +"
            " n.failureSummary).slice(0, 3)])"
        )
        assert found == []


# ---- JupyterLab

NOTEBOOK = [
    """import warnings; warnings.simplefilter("ignore")
import numpy as np
from refseg_nb.attention.explorer import Explorer
rng = np.random.default_rng(0)
picture = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
explorer = Explorer("shnet-refshapes", picture, "the red ball")
explorer""",
    "1 + 1",
]


@drives
@pytest.mark.slow
def test_jupyterlab_point_click_lock_edit(lab, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    trouble = []
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(f"{lab}/lab?reset")
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.restored", timeout=60_000)
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": s,
        }
        for i, s in enumerate(NOTEBOOK)
    ]
    content = {
        "cells": cells,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    panel = "window.jupyterapp.shell.currentWidget"
    page.evaluate(
        """async content => { const app = window.jupyterapp; await app.restored;
        await app.serviceManager.contents.save('explore.ipynb', {type: 'notebook', format: 'json', content});
        await app.commands.execute('docmanager:open', {path: 'explore.ipynb'}); }""",
        content,
    )
    page.wait_for_function(f"() => {panel}?.sessionContext?.isReady", timeout=60_000)
    page.evaluate(
        f"async () => {{ await {panel}.sessionContext.ready; await"
        f" {panel}.sessionContext.session.kernel.info; }}"
    )
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_selector(".jp-OutputArea .refseg-explorer .stage canvas", timeout=90_000)
    settle(page)

    def python(code):
        "The value of an expression in the notebook's kernel."
        text = page.evaluate(
            """async code => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; let text = '';
            const future = kernel.requestExecute({code, store_history: false});
            future.onIOPub = m => { text += m.content.text ?? (m.content.traceback ?? []).join('\\n'); };
            await future.done; return text; }""",
            f"import json; print(json.dumps({code}))",
        )
        return json.loads(text)

    def until(condition):
        deadline = time.time() + 30
        while not condition():
            assert time.time() < deadline, "the kernel and the page did not agree"
            time.sleep(0.1)

    page.locator(".stage").scroll_into_view_if_needed()
    page.mouse.move(*cell(page, 4, 5))
    # pointing is not sent
    assert shown(page)["from"] == "pixel row 4, column 5" and python("explorer.locked") is None
    page.mouse.click(*cell(page, 4, 5))
    until(lambda: python("explorer.locked") == {"panel": 0, "pixel": [4, 5], "grid": [12, 12]})

    count = page.evaluate(f"() => {panel}.content.widgets.length")
    # JupyterLab's keys for insert, delete, cut, ...
    for key in ("b", "a", "d", "d", "ArrowDown", "Enter", "x"):
        page.keyboard.press(key)
    page.locator(".word").nth(1).focus()
    page.keyboard.press("b")
    page.keyboard.press("a")
    page.locator(".atlas [tabindex='0']").focus()
    page.keyboard.press("b")
    page.locator(".made summary").focus()
    page.keyboard.press("b")  # the steps of a live view
    settle(page)
    assert page.evaluate(f"() => {panel}.content.widgets.length") == count
    page.keyboard.press("Escape")
    until(lambda: python("explorer.locked") is None)
    page.locator(".word").nth(2).click()
    until(lambda: python("explorer.locked") == {"panel": 0, "word": 2})

    python("explorer.set_trait('locked', {'word': 0}) or explorer.set_trait('kind', 'rollout')")
    page.wait_for_function(
        "() => document.querySelector('.refseg-explorer .says').textContent.includes('“the”')"
    )
    assert "Rollout over" in page.locator(".says").inner_text()

    page.get_by_label("Phrase", exact=True).fill("the blue ball on the left")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelectorAll('.refseg-explorer .panel').length === 2", timeout=30_000
    )
    assert python("[p.phrase for p in explorer.panels]") == ["the red ball", "the blue ball on the left"]
    assert page.locator(".panel").nth(1).locator(".word").count() == 6
    page.get_by_label("Phrase", exact=True).fill("?!")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('.refseg-explorer .status').textContent.includes('no word')"
    )
    assert (
        page.locator(".panel").count() == 2
        and page.evaluate(f"() => {panel}.content.widgets.length") == count
    )
    page.get_by_role("button", name="Keep the new one").click()
    page.wait_for_function("() => document.querySelectorAll('.refseg-explorer .panel').length === 1")
    assert trouble == []
    page.close()
