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
from scipy.ndimage import binary_erosion

import refseg_nb
from refseg_nb.attention.explorer import (
    SCALES,
    STATIC,
    Explorer,
    full_at,
    outline,
    pack_rows,
    pool_grid,
    pool_pixels,
    unpack_rows,
    view,
    word_likeness,
)
from refseg_nb.attention.maps import AttentionError, AttentionMaps, AttentionSteps, weight_steps
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import vocabulary_for
from refseg_nb.models.hub import save_model
from refseg_nb.models.registry import create_model
from refseg_nb.refshapes.scenes import render, sample_scene

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
            for direction in ("looks", "is looked at", "reads"):
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
                step = 0.01 if direction == "looks" or (direction == "reads" and "word" not in what) else 0.03
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
    page.get_by_role("button", name="the true mask", exact=True).click()
    assert locked(page) == {"panel": 0, "mask": "truth"} and "true mask" in shown(page)["from"]
    assert (
        "inside the answer" in page.locator(".inside").inner_text()
        and "inside the true mask" in page.locator(".inside").inner_text()
    )
    cells = page.locator(".atlas button")
    assert cells.count() == 3 * 2 * 4  # levels, layers, (mean, max, two heads)
    before = shown(page)["pixels"]
    page.get_by_role("radio", name="level 2, first layer, second head").click()
    assert (
        shown(page)["pixels"] != before
        and page.evaluate("() => document.querySelector('[data-state]').explorer.get('level')") == "2"
    )
    page.keyboard.press("ArrowDown")
    settle(page)
    assert (
        page.locator(".atlas [aria-checked=true]").get_attribute("aria-label")
        == "level 2, second layer, second head"
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
        "() => document.querySelector('.hidden[aria-live]').textContent.startsWith('pixel row 7, column 7:')"
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
    put(page, layer=1)
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
    put(page, direction="looks")
    page.locator(".panel").nth(1).locator(".word").nth(2).click()
    settle(page)
    assert "no attention in the chosen direction" in page.locator(".says").nth(1).inner_text()
    assert np.allclose(
        shown(page, 1)["pixels"], right.panels[0].maps["raw"].levels[1].weights[1, 0, :, 2], atol=5e-3
    )


# ---- the five defects of the first explorer, and what stands in their place


def seen(page, points, panel=0):
    "The colours of the stage at points (x, y), shares of its width and height: [n, 3]."
    settle(page)
    return np.array(
        page.evaluate(
            """([points, k]) => { const c = document.querySelectorAll('.stage canvas')[k], copy = document.createElement('canvas');
            copy.width = c.width; copy.height = c.height;
            const g = copy.getContext('2d', {willReadFrequently: true});
            g.drawImage(c, 0, 0);
            return points.map(([x, y]) => [...g.getImageData(Math.floor(x * c.width), Math.floor(y * c.height), 1, 1).data].slice(0, 3)); }""",
            [points, panel],
        )
    )


def hues(colours):
    "Which of red, green, blue leads, and by how much of the brightest channel: ([n], [n])."
    colours = np.asarray(colours, float)
    return colours.argmax(-1), (colours.max(-1) - colours.min(-1)) / np.maximum(colours.max(-1), 1)


@pytest.fixture(scope="module")
def boat():
    "A drawn scene with a green boat, as sharp as the demonstration's, and the explorer of “the green boat”."
    seg = refseg_nb.load()
    for index in range(200):
        scene = sample_scene(777, index)
        found = [i for i, o in enumerate(scene.objects) if (o.color, o.category) == ("green", "boat")]
        if len(found) != 1:
            continue
        drawn = render(scene, 512)
        answer, truth = seg.segment(drawn.image, "the green boat"), np.asarray(drawn.masks)[found[0]]
        if (answer.mask & truth).sum() > 0.6 * (answer.mask | truth).sum():
            return Explorer(seg, drawn.image, "the green boat", truth=truth, names=("SHNet",))
    raise AssertionError("none of 200 scenes has a green boat that the model finds")


@drives
def test_a_green_boat_is_green(boat, page_of):
    page, picture = page_of(boat), boat._picture
    masks = (boat.panels[0].predicted, boat._truth)  # away from their outlines, which are white and orange
    yy, xx = np.nonzero(np.logical_and(*(binary_erosion(mask, iterations=10) for mask in masks)))
    lead, strength = hues(picture[yy, xx])
    sure = np.flatnonzero((lead == 1) & (strength > 0.35))[::40]
    assert len(sure) > 20  # the boat's own green
    points = [[(xx[k] + 0.5) / 512, (yy[k] + 0.5) / 512] for k in sure]
    for what in (None, {"panel": 0, "word": 1}, {"panel": 0, "word": 0}, {"panel": 0, "mask": "truth"}):
        for scale in SCALES:
            put(page, locked=what, scale=scale)
            lead, strength = hues(seen(page, points))
            assert (lead == 1).mean() > 0.95 and np.median(strength) > 0.3, (what, scale)


@drives
def test_opacity_carries_the_weight_and_no_colour_is_added(page_of):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (20, 160, 40), (200, 60, 30)
    a = rows((1, 1, 66, 66), power=1)
    a[0, 0, 65] = 1e-4
    a[0, 0, 65, [9, 14]] = 0.4, 0.2  # the second word looks at row 1, columns 1 and 6
    a[0, 0, 65] /= a[0, 0, 65].sum()
    page = page_of(Explorer.from_arrays(picture, ["a", "b"], a, (8, 8)))
    put(page, locked={"panel": 0, "word": 1}, scale="linear", direction="looks")
    centre = lambda row, column: [(column + 0.5) / 8, (row + 0.5) / 8]
    bright, left, half, right = seen(page, [centre(1, 1), centre(6, 1), centre(1, 6), centre(6, 6)])
    assert np.abs(bright - picture[0, 0]).max() <= 3  # full weight: the picture as it is
    # no weight: the same colour, three tenths as bright; half the weight: between the two
    assert np.abs(left - 0.3 * picture[0, 0].astype(float)).max() <= 3
    assert np.abs(right - 0.3 * picture[0, 40].astype(float)).max() <= 3
    assert np.abs(half - 0.65 * picture[0, 40].astype(float)).max() <= 4


@drives
def test_a_dark_picture_is_veiled_by_white(page_of):
    picture = np.full((48, 48, 3), (25, 8, 40), np.uint8)
    page = page_of(Explorer.from_arrays(picture, ["a"], rows((1, 1, 37, 37), power=8), (6, 6)))
    put(page, locked={"panel": 0, "word": 0})
    everywhere = seen(page, [[(c + 0.5) / 6, (r + 0.5) / 6] for r in range(6) for c in range(6)])
    assert everywhere.max() > 150 and np.abs(everywhere - picture[0, 0]).max(-1).min() <= 3


def test_the_true_mask_goes_with_its_phrase(explorer):
    truth, picture, phrase = explorer._truth, explorer._picture, explorer.panels[0].phrase
    mine = Explorer("shnet-refshapes", picture, phrase, truth=truth)
    mine.phrase = "the ball"
    assert mine.panels[0].truth is truth and mine.panels[1].truth is None
    assert mine.data["panels"][1]["masks"]["truth"] is None
    mine.keep()
    assert mine.panels[0].truth is None
    mine.phrase = f"  {phrase.upper()} "  # the same words: it is their mask again
    assert mine.panels[1].truth is truth


@drives
def test_after_an_edit_the_page_draws_no_true_mask(explorer, page_of):
    mine = Explorer("shnet-refshapes", explorer._picture, explorer.panels[0].phrase, truth=explorer._truth)
    mine.phrase = "the ball"
    page = page_of(mine)
    legends = page.locator(".legend").all_inner_texts()
    assert "the true mask" in legends[0] and "the true mask" not in legends[1]
    assert "the true mask" not in page.locator(".inside").nth(1).inner_text()


def test_full_light_leaves_out_the_brightest():
    a = rows((500,))
    for n in (8, 24, 144, 500):
        assert full_at(a[:n]) == np.sort(a[:n])[::-1][max(1, int(0.02 * n))]
    assert full_at(a, "linear") == full_at(a, "log") == a.max()
    assert full_at(np.array([0.0] * 20 + [0.5])) == 0.5  # nothing else is there to see


@drives
def test_one_bright_cell_does_not_blank_the_map(page_of):
    n = 144
    a = np.full((1, 1, n + 3, n + 3), 0.0, np.float32)
    a[..., :n] = np.linspace(0.002, 0.006, n)
    a[..., 77] = 0.38
    a[..., n:] = 0.004, 0.002, 0.001
    a /= a.sum(-1, keepdims=True)
    explorer = Explorer.from_arrays(np.full((96, 96, 3), 230, np.uint8), ["the", "red", "ball"], a, (12, 12))
    page = page_of(explorer)
    put(page, locked={"panel": 0, "word": 1}, direction="looks")
    dim, bright = seen(page, [[0.5 / 12, 0.5 / 12], [11.5 / 12, 11.5 / 12]]).max(-1)
    assert bright - dim > 60 and bright > 200  # 0.2 % and 0.6 % differ, although one cell has 38 %
    assert "98th percentile" in page.locator(".scale .unit").inner_text()
    assert "the largest is" in page.locator(".scale .unit").inner_text()
    assert page.locator(".ticks").inner_text().count("≥") == 1
    for scale in SCALES:
        put(page, scale=scale)
        assert np.isclose(
            shown(page)["top"], full_at(view(explorer.panels[0], {"word": 1}, 1, 0)[0], scale), rtol=0.02
        )
    assert explorer.scale == "percentile" and "98th percentile" in explorer.to_svg()
    # all words together have 0.7 %, and the words are told apart all the same
    values = page.locator(".word .value").all_inner_texts()
    assert values == ["57 %", "29 %", "14 %"]
    small = page.locator(".word .all").all_inner_texts()
    assert small == [f"{100 * v:.1f} % of all" for v in a[0, 0, 0, n:]]
    assert np.allclose(shown(page)["among"], a[0, 0, 0, n:] / a[0, 0, 0, n:].sum(), atol=0.01)


@drives
def test_the_word_matrix_is_that_of_figure_7_and_can_be_clicked(explorer, page_of):
    page, maps = page_of(explorer), explorer.panels[0].maps["raw"]
    T = len(maps.words)
    for level, layer, head in ((2, 0, "mean"), (3, 1, 1), (4, 0, "max")):
        put(page, level=str(level), layer=layer, head=str(head))
        want = maps.block(level, layer, "words", "words", head=head)
        # the bytes keep the square root, in steps of the row's largest
        off = np.abs(np.sqrt(shown(page)["matrix"]) - np.sqrt(want)).max(-1)
        assert (off < 0.01 * np.sqrt(want.max(-1))).all()
        texts = np.array(page.locator(".matrix tbody td").all_inner_texts(), float).reshape(T, T)
        assert np.abs(texts - 100 * want / want.sum(-1, keepdims=True)).max() < 2
    page.locator(".matrix tbody td").nth(2 * T + 3).click()
    settle(page)
    # a word is shown by who reads it: the word of the column
    assert locked(page) == {"panel": 0, "word": 3} and page.locator(".matrix td.here").count() == T
    page.keyboard.press("Escape")
    put(page, direction="looks")
    page.locator(".matrix tbody td").nth(2 * T + 3).click()
    settle(page)
    assert locked(page) == {"panel": 0, "word": 2}
    says = page.locator(".matrix .unit").inner_text()
    assert f"“{maps.words[2]}” looks at “{maps.words[3]}”" in says and "of what it gives to words" in says
    assert page.locator(".matrix td[aria-selected=true]").count() == 1
    page.locator(".matrix tbody td").nth(2 * T + 1).click()  # another cell of the row: the lock stays
    settle(page)
    assert (
        locked(page) == {"panel": 0, "word": 2}
        and f"“{maps.words[1]}”" in page.locator(".matrix .unit").inner_text()
    )
    page.keyboard.press("Escape")
    page.locator(".matrix tbody td[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert shown(page)["from"] == f"“{maps.words[1]}”" and locked(page) is None
    page.keyboard.press("Enter")
    assert locked(page) == {"panel": 0, "word": 1} and page.locator(".matrix td[tabindex='0']").count() == 1


@drives
def test_a_model_whose_words_do_not_look_has_no_matrix(page_of):
    one_way = Explorer.from_arrays(
        np.zeros((8, 8, 3), np.uint8), ["a", "b"], rows((1, 2, 4, 2)), (2, 2), "pixels", "words"
    )
    page = page_of(one_way)
    assert page.locator(".matrix").is_hidden() and shown(page)["matrix"] is None


# A page's own model: what it would answer is handed over as plain arrays, in JSON
HOOK = """text => {
    const answers = JSON.parse(text);
    window.asked = [];
    document.querySelector('[data-state]').explorer.set('segment', async phrase => {
        window.asked.push(phrase);
        if (phrase === 'slow') await new Promise(done => setTimeout(done, 400));
        if (!(phrase in answers)) throw new Error(`the phrase ${phrase} is not known`);
        return answers[phrase];
    });
}"""


def plain(panel, note=""):
    "A panel as the plain arrays that a page's own model gives."
    return {
        "words": panel.words,
        "note": note,
        "residual": 0.5,
        "mask": {
            "data": panel.predicted.astype(int).ravel().tolist(),
            "width": panel.predicted.shape[1],
            "height": panel.predicted.shape[0],
        },
        "attention": [
            {
                "name": str(name),
                "grid": list(a.grid),
                "layers": a.weights.shape[0],
                "heads": a.weights.shape[1],
                "queries": a.queries,
                "keys": a.keys,
                "weights": a.weights.ravel().tolist(),
            }
            for name, a in panel.maps["raw"].levels.items()
        ],
    }


@drives
def test_the_phrase_can_be_changed_where_the_page_has_a_model(explorer, page_of):
    phrase = explorer.panels[0].phrase
    other = Explorer("shnet-refshapes", explorer._picture, "the ball").panels[0]
    page = page_of(explorer)
    assert page.get_by_role("button", name="Segment").is_hidden()  # no dead button
    assert phrase in page.locator(".fixed").inner_text() and page.locator("input[type=text]").is_hidden()
    answers = {"the ball": plain(other, "found"), "slow": plain(other), phrase: plain(explorer.panels[0])}
    page.evaluate(HOOK, json.dumps(answers))
    settle(page)
    box = page.get_by_label("Phrase", exact=True)
    box.fill("the ball")
    page.get_by_role("button", name="Segment").click()
    page.wait_for_function("() => document.querySelectorAll('.refseg-explorer .panel').length === 2")
    titles = page.locator(".title").all_inner_texts()
    assert titles == ["shnet-refshapes: before", "shnet-refshapes: after"]
    assert page.locator(".note").nth(1).inner_text() == "found"
    # the panel that the page made is the one that Python makes, in every kind that needs no gradient
    for kind, level, layer, head in (("raw", 2, 0, 1), ("raw", 3, 1, "mean"), ("rollout", 4, 1, "mean")):
        for what in ({"pixel": [3, 4], "grid": [12, 12]}, {"word": 1}, {"mask": "predicted"}):
            put(
                page,
                locked={"panel": 1} | what,
                kind=kind,
                level=str(level),
                layer=layer,
                head=str(head),
                direction="looks",
            )
            pixels, words = view(other, what, level, layer, head, kind)
            got = shown(page, 1)
            mine, theirs = np.r_[words, pixels.ravel()], np.r_[got["words"], got["pixels"]]
            assert np.abs(np.sqrt(theirs) - np.sqrt(mine)).max() < 0.01 * np.sqrt(mine.max()), (kind, what)
    # the true mask belongs to the first phrase alone
    assert "true" not in page.locator(".legend").nth(1).inner_text()
    box.fill("the giraffe")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.status').textContent.includes('not known')")
    assert page.locator(".panel").count() == 2
    page.get_by_role("button", name="Keep the new one").click()
    settle(page)
    assert page.locator(".panel").count() == 1 and page.locator(".title").inner_text() == "shnet-refshapes"
    box.fill(phrase)
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.refseg-explorer .panel').length === 2")
    assert "the true mask" in page.locator(".legend").nth(1).inner_text()
    # a slow answer does not come over a later one
    box.fill("slow")
    page.keyboard.press("Enter")
    box.fill("the ball")
    page.keyboard.press("Enter")
    page.wait_for_timeout(700)
    assert page.evaluate("() => window.asked.slice(-2)") == ["slow", "the ball"]
    assert page.evaluate("() => document.querySelector('[data-state]').explorer.get('phrase')") == "the ball"


@drives
def test_an_outline_made_in_the_page_encloses_the_mask(browser, tmp_path):
    from matplotlib.path import Path as Line

    module = (STATIC / "explorer.js").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(f'<script type="module">{module}\nwindow.outline = outline;</script>')
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("() => window.outline")
    yy, xx = np.mgrid[:20, :30]
    ring = ((yy - 9) ** 2 + (xx - 14) ** 2 < 70) & ((yy - 9) ** 2 + (xx - 14) ** 2 > 12)
    for mask in (ring, np.eye(6, dtype=bool), np.ones((3, 4), bool), np.zeros((3, 4), bool)):
        h, w = mask.shape
        lines = page.evaluate(
            "([data, width, height]) => outline({data, width, height})",
            [mask.astype(int).ravel().tolist(), w, h],
        )
        inside = np.zeros(mask.shape, int)  # even and odd: a hole is enclosed twice
        rows_, columns = np.mgrid[:h, :w]
        for line in lines:
            points = np.reshape([*line, *line[:2]], (-1, 2)) * (w, h)
            inside += (
                Line(points).contains_points(np.c_[columns.ravel() + 0.5, rows_.ravel() + 0.5]).reshape(h, w)
            )
        assert (inside % 2 == mask).all() and bool(lines) == bool(mask.any())
    page.close()


@drives
def test_plain_arrays_need_no_python(browser, tmp_path, explorer):
    "A page made of the module, the stylesheet and JSON alone."
    module, style = ((STATIC / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    panel, image = explorer.panels[0], explorer.data["image"]
    (tmp_path / "page.html").write_text(
        f"<!doctype html><html lang=en><title>x</title><style>{style}</style><div id=here></div>"
        f'<script type="module">{module}\nwindow.explore = explore;</script>'
    )
    page = test_browser.watched(browser.new_context(offline=True))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("() => window.explore")
    page.evaluate(
        """text => { const given = JSON.parse(text);
        window.mine = explore(document.getElementById('here'), {...given, level: '3'}); }""",
        json.dumps({"image": image, "answer": plain(panel)}),
    )
    put_ = "traits => { for (const [k, v] of Object.entries(traits)) mine.model.set(k, v); }"
    page.evaluate(put_, {"locked": {"panel": 0, "word": 1}, "layer": 0, "head": "1", "direction": "looks"})
    pixels, words = view(panel, {"word": 1}, 3, 0, 1)
    got = shown(page)
    assert np.allclose(np.sqrt(got["pixels"]), np.sqrt(pixels.ravel()), atol=0.01)
    assert page.get_by_role("button", name="Segment").is_hidden()
    answer = plain(Explorer("shnet-refshapes", explorer._picture, "the ball").panels[0])
    show = "text => mine.show({answer: JSON.parse(text)})"
    page.evaluate(show, json.dumps(answer))  # a new answer in the same place
    assert page.locator(".panel").count() == 1 and shown(page)["from"] == "“ball”"
    bad = answer | {"attention": [answer["attention"][0] | {"weights": [0] * 5}]}
    with pytest.raises(Exception, match="level 2: 5 weights, but 2 layers x 2 heads x"):
        page.evaluate(show, json.dumps(bad))
    page.evaluate("() => mine.close()")
    assert page.trouble == []
    page.context.close()


@drives
def test_on_a_phone_the_picture_comes_before_the_controls(explorer, page_of):
    for width in (390, 1100):
        page = page_of(explorer, viewport={"width": width, "height": 844})
        stage, controls = (page.locator(f".{name}").bounding_box() for name in ("stage", "controls"))
        assert stage["y"] + stage["height"] <= controls["y"]
        if width == 390:
            assert stage["y"] < 500  # on the first screen


def test_in_its_chapter_the_explorer_stands_directly_under_the_title():
    cells = json.loads((test_browser.ROOT / "nbs" / "15_explorer.ipynb").read_text(encoding="utf-8"))["cells"]
    assert cells[0]["source"][0] == "# The attention explorer\n" and len("".join(cells[0]["source"])) < 700
    shows = [k for k, c in enumerate(cells) if "refseg-explorer" in json.dumps(c.get("outputs", []))]
    assert (
        shows
        and shows[0] <= 2
        and not any(
            c["cell_type"] == "code" and "default_exp" not in "".join(c["source"])
            for c in cells[1 : shows[0]]
        )
    )


@drives
def test_levels_layers_and_heads_have_names_and_nothing_is_jargon(explorer, page_of):
    page = page_of(explorer)
    put(page, level="3", layer=0, head="mean")
    settle(page)
    assert page.locator(".now").inner_text() == (
        "Shown: raw attention, level 3, first layer, mean of 2 heads (12 × 12 pixels)"
    )
    names = [b.get_attribute("aria-label") for b in page.locator(".atlas button").all()]
    assert (
        names[0] == "level 2, first layer, mean of 2 heads"
        and names[-1] == "level 4, second layer, second head"
    )
    text = page.locator(".refseg-explorer").inner_text()
    for word in ("Free", "alike", "2 · 0", "softmax over keys"):
        assert word not in text
    assert page.get_by_role("button", name="Unlock").is_disabled()
    mine = Explorer("shnet-refshapes", explorer._picture, "the ball", level="3", layer=0, head="1")
    assert "level 3, first layer, second head" in mine.to_svg()


@drives
@pytest.mark.parametrize("width", [1100, 390])
def test_the_tour(boat, page_of, width):
    page = page_of(boat, viewport={"width": width, "height": 844})
    says = lambda: (settle(page), page.locator(".tour p").inner_text())[1]
    step = lambda: page.locator(".tour .count").inner_text()
    assert page.locator(".tour").is_hidden()
    page.get_by_role("button", name="One-minute tour").click()
    assert "the green boat" in says() and step() == "1 of 7"
    page.get_by_role("button", name="Next").click()
    assert "lock the word “green”" in says()
    page.locator(".word").nth(1).click()  # the reader does it, and the tour goes on
    assert says().startswith("The picture is lit where pixels read “green”") and step() == "3 of 7"
    assert locked(page) == {"panel": 0, "word": 1} and "of the light lies inside the answer" in says()
    page.get_by_role("button", name="Next").click()
    assert "In the row of “green”" in says()
    page.get_by_role("button", name="Next").click()
    assert "click a pixel inside the outline" in says()
    page.get_by_role("button", name="Do it for me").click()
    assert "small maps" in says() and "pixel" in locked(page)
    page.get_by_role("button", name="Do it for me").click()
    assert "attention shows where weights went, not why" in says() and step() == "7 of 7"
    box = page.locator(".tour").bounding_box()
    assert 0 <= box["y"] < 844 and page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Done").click()
    settle(page)
    assert (
        page.locator(".tour").is_hidden() and page.get_by_role("button", name="One-minute tour").is_visible()
    )
    assert page.locator(".spot").count() == 0


def test_it_opens_where_words_differ_most(explorer):
    maps, likeness = explorer.panels[0].maps["raw"], {}
    for name, level in maps.levels.items():
        for layer in range(2):
            heat = level.block("words", "pixels")[layer].mean(0)
            pairs = [np.corrcoef(heat[i], heat[j])[0, 1] for i in range(len(heat)) for j in range(i)]
            likeness[str(name), layer] = np.mean(pairs)
            assert np.isclose(word_likeness(level)[layer], likeness[str(name), layer], atol=1e-4)
    assert (explorer.level, explorer.layer) == min(likeness, key=likeness.get)
    assert Explorer("shnet-refshapes", explorer._picture, "the ball", layer=1).layer == 1
    one_way = AttentionMaps.from_arrays(
        rows((2, 1, 6, 3)), ["a", "b", "c"], (2, 3), "pixels", "words"
    ).levels[1]
    assert word_likeness(one_way).shape == (2,)
    assert word_likeness(AttentionMaps.from_arrays(rows((1, 1, 7, 7)), ["a"], (2, 3)).levels[1]) is None


def test_another_image_in_the_same_explorer(explorer, boat):
    mine = Explorer("shnet-refshapes", explorer._picture, "the ball")
    mine.phrase = "the red ball"
    mine.show(boat._picture, "the green boat", boat._truth)
    assert (
        len(mine.panels) == 1
        and mine.phrase == "the green boat"
        and mine.locked is None
        and not mine.can_keep
    )
    assert np.array_equal(mine.panels[0].predicted, boat.panels[0].predicted)
    assert mine.data["image"]["width"] == 512 and mine.panels[0].truth is boat._truth
    with pytest.raises(ValueError, match="no word"):
        mine.show(explorer._picture, "?!")
    assert mine.data["image"]["width"] == 512 and mine.phrase == "the green boat"
    mine.phrase = "the boat"  # and it can be edited as before
    assert [p.phrase for p in mine.panels] == ["the green boat", "the boat"] and mine.panels[1].truth is None
    with pytest.raises(AttentionError, match="arrays and no model"):
        Explorer.from_arrays(boat._picture, ["a"], rows((1, 1, 5, 5)), (2, 2)).show(boat._picture, "a")


# ---- how a weight is made


def unfold(page, **traits):
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    put(page, **{"direction": "looks"} | traits)
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
    put(page, head="0", direction="looks", locked={"panel": 0, "word": 1})
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

    python(
        "explorer.set_trait('direction', 'looks') or explorer.set_trait('locked', {'word': 0})"
        " or explorer.set_trait('kind', 'rollout')"
    )
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
