"""The figures of the reproduction: rules against naive ones, causes against pixels counted by hand, and what
stands in each panel."""

import dataclasses
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from refseg_nb.data.refer import Refer
from refseg_nb.evaluation.evaluator import Record
from refseg_nb.refshapes.anchors import anchors_of
from refseg_nb.refshapes.expressions import parse_program
from refseg_nb.reproduce.experiments import PAPER
from refseg_nb.reproduce.figures import (
    CAUSE_COLORS,
    CAUSES,
    QUANTILES,
    answers,
    at_quantile,
    cause_counts,
    cause_of,
    cause_table,
    choose_examples,
    choose_failures,
    choose_gains,
    choose_image,
    colors_of,
    failure_causes,
    figure_bars,
    figure_baseline,
    figure_causes,
    figure_curves,
    figure_failures,
    figure_kinds,
    figure_modules,
    figure_phrases,
    gains,
    png,
)
from refseg_nb.viz import MODEL_COLORS


class MadeUp:
    """A segmenter that answers with the masks of a table: (bytes of the picture, phrase) -> mask."""

    def __init__(self, refer, split, choose):
        self.masks, self.encoded = {}, 0
        for s in refer.samples(split):
            self.masks[self.key(np.asarray(refer.load_image(s.image_id))), s.text] = choose(s)

    def key(self, image):
        return image.tobytes()

    def encode(self, image):
        self.encoded += 1
        return SimpleNamespace(
            segment_all=lambda phrases: [
                SimpleNamespace(mask=self.masks[self.key(np.asarray(image)), p]) for p in phrases
            ]
        )


@pytest.fixture(scope="module")
def refer(tiny_root):
    return Refer(tiny_root, "refshapes")


@pytest.fixture(scope="module")
def unique(refer):
    """The samples of val, for a made-up segmenter: no picture has one phrase twice."""
    samples = refer.samples("val")
    assert len({(s.image_id, s.text) for s in samples}) == len(samples)
    return samples


def others_of(refer, s, same=None):
    mine = refer.annotation(s.ann_id)["category_id"]
    things = [a for a in refer.annotations_of(s.image_id) if a["id"] != s.ann_id and not a.get("iscrowd")]
    return [a["id"] for a in things if same is None or (a["category_id"] == mine) == same]


def table_of(refer, segmenter, split="val"):
    """A record's arrays, written out."""
    rows = [
        (
            s.sent_id,
            s.ref_id,
            s.image_id,
            s.kind or "",
            len(s.text.split()),
            (t := refer.mask(s.ann_id)).sum(),
            t.size,
            (m & t).sum(),
            (m | t).sum(),
        )
        for s, m in answers(segmenter, refer, refer.samples(split))
    ]
    names = ("sent_id", "ref_id", "image_id", "kind", "words", "area", "pixels", "intersection", "union")
    return {k: np.array(v) for k, v in zip(names, zip(*rows))}


# ------------------------------------------------------------------------------------------------ causes


def block(*rows, h=6, w=12):
    out = np.zeros((h, w), dtype=bool)
    for y0, y1, x0, x1 in rows:
        out[y0:y1, x0:x1] = True
    return out


# 12 places each: the one meant, its twin, a thing of another category
THINGS = np.stack([block((1, 5, 0, 3)), block((1, 5, 4, 7)), block((1, 5, 8, 11))])


@pytest.mark.parametrize(
    "cause, answered, mask, anchors",
    [
        ("right", 0, block((1, 5, 0, 3)), ()),
        ("right", 0, block((1, 5, 0, 6)), ()),  # 12 of 24: exactly .5 is right
        ("nothing found", -1, block(), ()),
        ("sloppy outline", 0, block((1, 2, 0, 3)), ()),  # 3 of 12
        ("sloppy outline", 0, block((1, 2, 0, 1)), ()),  # 1 of 12, IoU .083, but all of it on the right thing
        ("sloppy outline", 0, block((0, 6, 0, 4), (0, 1, 4, 12)), ()),  # 12 of 32, the rest on nothing
        ("same category", 1, block((1, 5, 4, 8)), ()),
        ("other category", 2, block((1, 5, 8, 12)), ()),
        ("the anchor", 2, block((1, 5, 8, 12)), (2,)),
        ("the anchor", 1, block((1, 5, 4, 8)), (1, 2)),  # an anchor of the same category is the anchor
        ("several things", -1, block((1, 5, 4, 11)), ()),  # both wrong ones
        ("several things", -1, block((1, 3, 0, 12)), ()),  # half of each
        ("nothing annotated", -1, block((5, 6, 0, 12)), ()),
        # 2 of 26 places on the twin
        ("nothing annotated", -1, block((0, 1, 0, 12), (5, 6, 0, 12), (1, 2, 4, 6)), ()),
    ],
)
def test_each_cause_on_masks_made_by_hand(cause, answered, mask, anchors):
    assert cause_of(mask, THINGS, [1, 1, 2], anchors) == (cause, answered)


def test_what_was_meant_may_be_hidden_altogether():
    things = np.stack([block(), block((0, 2, 0, 2))])
    # nothing is there and nothing was found: IoU 1, as in the records
    assert cause_of(block(), things, [1, 1])[0] == "right"
    assert cause_of(block((0, 2, 0, 2)), things, [1, 1]) == ("same category", 1)


def naive_cause(mask, things, categories, anchors):
    """The rules with sets of places."""
    places = lambda m: set(map(tuple, np.argwhere(m)))
    p, ts = places(mask), [places(t) for t in things]
    iou = [len(p & t) / len(p | t) if p | t else 1.0 for t in ts]
    if iou[0] >= 0.5:
        return "right"
    if not p:
        return "nothing found"
    if sum(len(p & t) >= max(len(t), 1) / 2 and 5 * len(p & t) >= len(p) for t in ts) >= 2:
        return "several things"
    best = iou.index(max(iou))
    if iou[best] < 0.1 and len(p & ts[best]) * 2 < len(p):
        return "nothing annotated"
    if best == 0:
        return "sloppy outline"
    if best in anchors:
        return "the anchor"
    return "same category" if categories[best] == categories[0] else "other category"


def test_causes_agree_with_sets_of_places_on_random_masks():
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(1500):
        k = int(rng.integers(1, 5))
        things = np.zeros((k, 8, 9), dtype=bool)
        mask = np.zeros((8, 9), dtype=bool)
        for m in things:
            y, x = rng.integers(0, 6, 2)
            m[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
        for _ in range(rng.integers(0, 3)):
            if rng.random() < 0.6:
                mask |= things[rng.integers(k)]
            y, x = rng.integers(0, 7, 2)
            mask[y : y + rng.integers(0, 4), x : x + rng.integers(0, 4)] = True
        categories, anchors = (
            rng.integers(1, 3, k).tolist(),
            tuple(np.flatnonzero(rng.random(k) < 0.3).tolist()),
        )
        cause, answered = cause_of(mask, things, categories, anchors)
        assert cause == naive_cause(mask, things, categories, anchors)
        assert (answered == -1) == (cause in ("nothing found", "several things", "nothing annotated"))
        seen[cause] += 1
    assert set(seen) == {"right", *CAUSES} and min(seen.values()) >= 10


def test_anchors_are_what_the_program_names(refer):
    """Independent of scenes: of `the(house.red)` the annotations say which thing it is."""
    seen = 0
    for s in itertools.chain(*(refer.samples(split) for split in refer.splits)):
        program, found = parse_program(s.sentence.program), anchors_of(refer, s)
        assert s.ann_id not in found and found <= set(others_of(refer, s))
        if program.op in ("the", "most", "middle"):
            assert not found
        else:
            assert found
        inner = [a for a in program.args if getattr(a, "op", None) == "the"]
        if program.op != "nearest" or not inner or inner[0].args[0].size:
            continue
        noun = inner[0].args[0]
        alike = []
        for a in refer.annotations_of(s.image_id):
            look = a["attributes"]
            fits = (
                noun.noun == refer.categories[a["category_id"]]
                and noun.color in ("", look["color"])
                and noun.texture in ("", look["texture"])
            )
            if fits:
                alike.append(a["id"])
        if alike:
            assert found == set(alike)
            seen += 1
    assert seen > 20


def test_anchors_of_another_world_are_refused(refer, tmp_path):
    record = json.loads((refer.folder / "refshapes.json").read_text())
    (tmp_path / "refshapes.json").write_text(json.dumps(record | {"seed": 99}))
    other = Refer(refer.root, "refshapes")
    other.folder = tmp_path
    sample = next(s for s in refer.samples("val") if anchors_of(refer, s))
    with pytest.raises(ValueError, match=r"refshapes.json: image \d+ is not what its seed draws"):
        anchors_of(other, sample)
    (tmp_path / "refshapes.json").unlink()
    assert anchors_of(other, sample) == set()


def test_failure_causes_finds_what_was_put_in(refer, unique):
    """A segmenter that makes one kind of mistake after the other; where a picture does not allow it, it is
    right."""
    planned = {}

    def choose(s):
        n = len(planned)
        truth = refer.mask(s.ann_id)
        blank = np.zeros_like(truth)
        anchors = sorted(anchors_of(refer, s))
        wish = {
            0: ("the anchor", anchors),
            1: ("same category", [i for i in others_of(refer, s, True) if i not in anchors]),
            2: ("other category", [i for i in others_of(refer, s, False) if i not in anchors]),
        }.get(n % 6)
        planned[s.sent_id] = ("right", s.ann_id, truth)
        if wish and wish[1]:
            planned[s.sent_id] = (wish[0], wish[1][0], refer.mask(wish[1][0]))
        if n % 6 == 3:
            planned[s.sent_id] = ("nothing found", -1, blank)
        if n % 6 == 4:
            small = blank.copy()
            small.flat[np.flatnonzero(truth)[: max(1, truth.sum() // 3)]] = True
            planned[s.sent_id] = ("sloppy outline", s.ann_id, small)
        return planned[s.sent_id][2]

    segmenter = MadeUp(refer, "val", choose)
    table = failure_causes(segmenter, refer, "val")
    assert segmenter.encoded == len({s.image_id for s in unique})
    by_id = {s.sent_id: s for s in unique}
    assert (
        sorted(table["sent_id"].tolist()) == sorted(by_id)
        and len({len(column) for column in table.values()}) == 1
    )
    for i, sent_id in enumerate(table["sent_id"].tolist()):
        cause, answered, mask = planned[sent_id]
        s = by_id[sent_id]
        truth = refer.mask(s.ann_id)
        assert (table["cause"][i], table["answered"][i]) == (cause, answered), s.text
        assert (table["intersection"][i], table["union"][i]) == ((mask & truth).sum(), (mask | truth).sum())
        assert (
            table["others"][i] == len(others_of(refer, s))
            and table["anchors"][i] == len(anchors_of(refer, s))
            and table["kind"][i] == s.kind
        )
    counts = cause_counts(table)
    assert counts["all"] == {c: sum(cause == c for cause, *_ in planned.values()) for c in ("right", *CAUSES)}
    assert (
        min(
            counts["all"][c]
            for c in ("the anchor", "same category", "other category", "nothing found", "sloppy outline")
        )
        > 3
    )
    for kind, n in counts.items():
        if kind != "all":
            assert n == {c: sum(planned[s.sent_id][0] == c for s in unique if s.kind == kind) for c in n}


def test_limit_takes_images_by_lot(refer, unique):
    segmenter = MadeUp(refer, "val", lambda s: refer.mask(others_of(refer, s)[0]))
    whole, part = failure_causes(segmenter, refer, "val"), failure_causes(segmenter, refer, "val", limit=5)
    kept = set(part["image_id"].tolist())
    assert len(kept) == 5 and kept != set(sorted({s.image_id for s in unique})[:5])
    inside = np.isin(whole["image_id"], list(kept))
    assert all((np.sort(whole[k][inside]) == np.sort(part[k])).all() for k in whole)
    assert set(failure_causes(segmenter, refer, "val", limit=3)["image_id"].tolist()) < kept
    assert set(failure_causes(segmenter, refer, "val", limit=10**6)["sent_id"].tolist()) == {
        s.sent_id for s in unique
    }


def test_a_phrase_without_words_means_nothing(refer, unique):
    s = unique[0]
    silent = dataclasses.replace(s, sentence=dataclasses.replace(s.sentence, sent=" ?! "))
    segmenter = MadeUp(refer, "val", lambda s: refer.mask(s.ann_id))
    masks = {
        x.text: m
        for x, m in answers(
            segmenter, refer, [silent, *[x for x in unique if x.image_id == s.image_id and x is not s]]
        )
    }
    assert not masks[" ?! "].any() and all(m.any() for text, m in masks.items() if text != " ?! ")
    segmenter.encoded = 0
    ((_, mask),) = answers(segmenter, refer, [silent])
    assert segmenter.encoded == 0 and mask.shape == refer.mask(s.ann_id).shape


def test_regions_without_categories_are_refused():
    from refseg_nb.data.referit import ReferIt

    region = object.__new__(ReferIt)
    region.name = "referit"
    with pytest.raises(ValueError, match="referit has regions without categories"):
        failure_causes(None, region, "val")


@pytest.mark.parametrize("name", ["refcoco", "refcocog"])
def test_causes_on_real_data(real_data, name):
    """No kinds, no programs, crowds, things that overlap: the table is what the naive rules say, and the
    figures are drawn."""
    refer = Refer(real_data, name, "micro")
    split = refer.splits[-1]
    samples = refer.samples(split)
    rng = np.random.default_rng(0)
    given = {}

    def choose(s):
        truth = refer.mask(s.ann_id)
        h, w = truth.shape
        n = len(given)
        mask = np.zeros((h, w), dtype=bool)
        same, different = others_of(refer, s, True), others_of(refer, s, False)
        if n % 6 == 0:
            mask = truth
        elif n % 6 == 1 and same:
            mask = refer.mask(same[int(rng.integers(len(same)))])
        elif n % 6 == 2 and different:
            mask = refer.mask(different[int(rng.integers(len(different)))])
        elif n % 6 == 3:
            mask = np.logical_or.reduce([refer.mask(i) for i in [s.ann_id, *same]])
        elif n % 6 == 4:
            mask[: h // 8] = True
        given[s.image_id, s.text] = mask
        return mask

    segmenter = MadeUp(refer, split, choose)
    table = failure_causes(segmenter, refer, split)
    assert not any(table["kind"]) and not table["anchors"].any() and set(cause_counts(table)) == {"all"}
    by_id = {(s.ref_id, s.sent_id): s for s in samples}
    checked = 0
    for i in range(len(table["cause"])):
        s = by_id[int(table["ref_id"][i]), int(table["sent_id"][i])]
        mask = given[s.image_id, s.text]
        assert table["others"][i] == len(others_of(refer, s))
        if checked < 12 and i % 2 == 0:  # sets of places are slow
            ids = [s.ann_id, *others_of(refer, s)]
            half = lambda m: m[::8, ::8]
            expected = naive_cause(
                half(mask),
                [half(refer.mask(j)) for j in ids],
                [refer.annotation(j)["category_id"] for j in ids],
                (),
            )
            coarse, _ = cause_of(
                half(mask),
                np.stack([half(refer.mask(j)) for j in ids]),
                [refer.annotation(j)["category_id"] for j in ids],
            )
            assert coarse == expected
            checked += 1
        if mask.sum() == 0:
            assert table["cause"][i] == "nothing found"
        if (mask == refer.mask(s.ann_id)).all():
            assert table["cause"][i] == "right"
    assert len(set(table["cause"].tolist())) >= 4
    fig = figure_failures(segmenter, refer, split, table, 2)
    assert sum(ax.axison for ax in fig.axes) == sum(len(v) for v in choose_failures(table, 2).values())
    assert len(figure_phrases(segmenter, refer, split).axes) >= 2
    record = Record("made up", {}, arrays=table)
    assert all(k == "failure" or k.endswith("words") for k in choose_examples(record))
    assert (
        png(figure_baseline({"a": segmenter, "b": segmenter}, {"a": record, "b": record}, refer, split))[:4]
        == b"\x89PNG"
    )


# ------------------------------------------------------------------------------------------------ rules


def record(ious, ids=None, kinds=None, images=None, name="made up"):
    n = len(ious)
    ids = np.arange(n) if ids is None else np.asarray(ids)
    return Record(
        name,
        {},
        arrays={
            "sent_id": ids,
            "ref_id": ids // 2,
            "image_id": ids // 4 if images is None else images,
            "kind": np.array(kinds or [""] * n),
            "words": ids % 12 + 1,
            "area": ids + 1,
            "pixels": np.full(n, 10**4),
            "intersection": np.round(1000 * np.asarray(ious)).astype(int),
            "union": np.full(n, 1000),
        },
    )


def test_quantiles_agree_with_a_sorted_list():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 30))
        values, ids = rng.integers(0, 6, n) / 5, rng.permutation(100)[:n]
        q = float(rng.choice([0, 0.05, 0.2, 0.5, 0.8, 0.95, 1]))
        value = sorted(values)[int(np.floor(q * (n - 1) + 0.5))]
        expected = min((i for i in range(n) if values[i] == value), key=lambda i: ids[i])
        assert at_quantile(values, ids, q) == expected


def test_gains_are_paired_by_sentence_not_by_place():
    rng = np.random.default_rng(1)
    n = 60
    a, b = rng.random(n).round(3), rng.random(n).round(3)
    order = rng.permutation(n)
    first, second = record(a), record(b[order], np.arange(n)[order])
    assert np.allclose(gains(first, second), b - a)
    by_gain = sorted(range(n), key=lambda i: ((b - a).round(6)[i], i))
    assert choose_gains(first, second) == [by_gain[int(q * (n - 1) + 0.5)] for q in QUANTILES]
    assert gains(first, second)[choose_gains(first, second)[-1]] < 0, "the last one is a loss"
    with pytest.raises(ValueError, match="'made up' and 'longer' score different samples"):
        gains(first, record(np.zeros(n + 1), name="longer"))
    with pytest.raises(ValueError, match="score different samples"):
        gains(first, record(a, np.arange(n) + 7))


def test_examples_are_medians_of_their_kind_and_one_failure():
    rng = np.random.default_rng(2)
    n = 80
    ious = rng.random(n).round(2)
    kinds = rng.choice(["attribute", "relation", "superlative"], n).tolist()
    ids = rng.permutation(n) + 5
    chosen = choose_examples(record(ious, ids, kinds))
    for kind in ("attribute", "relation", "superlative"):
        values = sorted(ious[i] for i in range(n) if kinds[i] == kind)
        median = values[int((len(values) - 1) / 2 + 0.5)]
        assert chosen[kind] == min(
            (i for i in range(n) if kinds[i] == kind and ious[i] == median), key=lambda i: ids[i]
        )
    assert chosen["failure"] == min((i for i in range(n) if ious[i] < 0.1), key=lambda i: ids[i])
    assert list(chosen) == ["attribute", "relation", "superlative", "failure"]
    assert "failure" not in choose_examples(record([0.5, 0.6], kinds=["a", "a"]))
    lengths = choose_examples(record(ious))
    assert set(lengths) == {"1-2 words", "3-5 words", "6-10 words", "over 10 words", "failure"}


def test_the_image_with_the_most_phrases(refer):
    for split in refer.splits:
        images = [s.image_id for s in refer.samples(split)]
        most = max(map(images.count, images))
        assert choose_image(refer, split) == min(i for i in images if images.count(i) == most)


def test_failures_are_drawn_by_lot_one_an_image():
    import hashlib

    rng = np.random.default_rng(3)
    n = 200
    table = {
        "sent_id": rng.permutation(1000)[:n],
        "image_id": rng.integers(0, 30, n),
        "cause": rng.choice(["right", "the anchor", "sloppy outline"], n),
    }
    chosen = choose_failures(table, 5)
    assert list(chosen) == [
        "sloppy outline",
        "the anchor",
    ], "in the order of CAUSES; what does not occur is left out"
    for cause, places in chosen.items():
        expected, images = [], []
        for i in sorted(
            (i for i in range(n) if table["cause"][i] == cause),
            key=lambda i: hashlib.sha256(str(table["sent_id"][i]).encode()).hexdigest(),
        ):
            if table["image_id"][i] not in images:
                expected.append(i)
                images.append(table["image_id"][i])
        assert places == expected[:5]
    shuffled = rng.permutation(n)
    again = choose_failures({k: v[shuffled] for k, v in table.items()}, 5)
    assert {c: table["sent_id"][p].tolist() for c, p in chosen.items()} == {
        c: table["sent_id"][shuffled][p].tolist() for c, p in again.items()
    }


# ------------------------------------------------------------------------------------------------ figures


def summary(labels, paper=True, kinds=True):
    rows = {}
    for i, label in enumerate(labels):
        cell = {
            "value": 50.0 + i,
            "low": 48.0 + i,
            "high": 53.0 + i,
            "paper": 40.0 + i if paper else None,
            "seeds": [0, 1],
            "each seed": [49.5 + i, 50.5 + i],
        }
        rows[label] = {
            "cells": [None, cell],
            "by kind": (
                {k: {"value": 50.0 + i, "low": 45.0, "high": 70.0} for k in ("attribute", "relation")}
                if kinds
                else {}
            ),
        }
    return {
        "rows": rows,
        "columns": ["prec@0.5", "Overall IoU"],
        "key": 1,
        "differences": [],
        "title": "Table 9",
        "protocol": {"dataset": "refshapes", "split": "val"},
    }


@pytest.mark.parametrize("n", [1, 4, 8, 9, 15])
def test_bars_have_the_lengths_of_the_numbers(n):
    labels = [*MODEL_COLORS, *(f"model number {i}" for i in range(20))][:n]
    lying = n > 8
    fig = figure_bars(summary(labels))
    (ax,) = fig.axes
    length = (lambda p: p.get_width()) if lying else (lambda p: p.get_height())
    assert sorted(length(p) for p in ax.patches) == sorted(
        [50.0 + i for i in range(n)] + [40.0 + i for i in range(n)]
    )
    names = [
        t.get_text().replace("\n", " ").replace("+ ", "+")
        for t in (ax.get_yticklabels() if lying else ax.get_xticklabels())
    ]
    assert names == labels
    assert {t.get_text() for t in ax.texts} == {f"{50 + i:.1f}" for i in range(n)} | {
        f"{40 + i:.1f}" for i in range(n)
    }
    said = [t.get_text() for t in fig.legends[0].get_texts()]
    assert (
        "RefShapes val" in said[0]
        and "paper" in said[-1]
        and fig.legends[0].get_title().get_text() == "Table 9"
    )
    limits = ax.get_xlim() if lying else ax.get_ylim()
    assert limits[0] == 0 and limits[1] > 53 + n - 1, "a bar begins at zero"


def test_labels_of_the_bars_do_not_overlap():
    for labels in (
        [*MODEL_COLORS],
        list(MODEL_COLORS)[:4],
        [f"SHNet, a rather long label {i}" for i in range(15)],
    ):
        fig = figure_bars(summary(labels))
        png(fig)
        (ax,) = fig.axes
        ticks = ax.get_yticklabels() if len(labels) > 8 else ax.get_xticklabels()
        boxes = [t.get_window_extent() for t in ticks]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        whole = fig.bbox
        assert all(
            whole.x0 <= b.x0 and b.x1 <= whole.x1 and whole.y0 <= b.y0 and b.y1 <= whole.y1 for b in boxes
        )


def test_bars_of_cells_that_are_not_there():
    s = summary(["Baseline", "SHNet", "LAVT"])
    s["rows"]["Baseline"]["cells"][1] = None
    s["rows"]["LAVT"]["cells"][1] |= {"value": None}
    assert len(figure_bars(s).axes[0].patches) == 3  # SHNet's two, and the paper's of LAVT
    s = summary(["Baseline", "SHNet"], paper=False)
    s["rows"]["SHNet"]["cells"][1] |= {"low": None, "high": None}
    s["protocol"] = None
    fig = figure_bars(s)
    assert len(fig.axes[0].patches) == 2 and len(fig.legends[0].get_texts()) == 2, (
        "no word of the paper where it has no number"
    )


def test_kinds_have_a_panel_each():
    s = summary(["Baseline", "SHNet"])
    del s["rows"]["SHNet"]["by kind"]["relation"]
    fig = figure_kinds(s)
    assert [ax.get_title() for ax in fig.axes] == ["attribute", "relation"]
    assert [len(ax.containers) for ax in fig.axes] == [2, 1]
    points = [c.lines[0].get_xydata()[0].tolist() for c in fig.axes[0].containers]
    assert points == [[50, 0], [51, 1]]
    assert figure_kinds(summary(["SHNet"], kinds=False)) is None
    assert len(png(figure_kinds(summary([f"m{i}" for i in range(15)])))) > 1000


def test_curves_are_running_means():
    rng = np.random.default_rng(4)
    losses = {"SHNet": rng.random(300), "short": rng.random(5), "none": []}
    fig = figure_curves({k: [[10 * i, x] for i, x in enumerate(v)] for k, v in losses.items()})
    (ax,) = fig.axes
    for line, (label, k) in zip(ax.lines, (("SHNet", 6), ("short", 1))):
        n = len(losses[label])
        expected = [np.mean(losses[label][i - k + 1 : i + 1]) for i in range(k - 1, n)]
        assert (
            line.get_label() == label
            and np.allclose(line.get_ydata(), expected)
            and line.get_xdata().tolist() == [10 * i for i in range(k - 1, n)]
        )
    assert len(ax.lines) == 2 and figure_curves({"SHNet": []}) is None and figure_curves({}) is None
    many = figure_curves({f"m{i}": [[0, 1.0], [1, 0.0]] for i in range(15)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 15


def seen_by(matrix, color):
    """A colour in Lab, after a matrix on linear RGB (Machado et al. 2009: how it looks to a dichromat)."""
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    c = np.clip(np.array(matrix) @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
    x = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ c
        / [0.9505, 1, 1.089]
    )
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ],
    ids=["all", "no green", "no red"],
)
def test_colours_stay_apart_for_everybody(matrix):
    figures = [
        list(PAPER["table2"]["rows"]),
        list(PAPER["table4"]["rows"]),
        ["SHNet", "CMPC", "LAVT", "CrossVLT"],
    ]
    for colors in (*map(colors_of, figures), CAUSE_COLORS):
        lab = [seen_by(matrix, c) for c in colors.values()]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 15, (
            "2 is just seen, 15 is another colour"
        )


def texts(ax):
    return [t.get_text() for t in ax.texts]


@pytest.fixture(scope="module")
def pair(refer):
    """A model that is right on two samples of three, and one that shifts every mask by a few pixels."""
    half = MadeUp(
        refer, "val", lambda s: refer.mask(s.ann_id) if s.sent_id % 3 else refer.mask(others_of(refer, s)[0])
    )
    shifted = MadeUp(refer, "val", lambda s: np.roll(refer.mask(s.ann_id), s.sent_id % 7, 1))
    return {"half": half, "shifted": shifted}, {
        name: Record(name, {}, arrays=table_of(refer, m))
        for name, m in (("half", half), ("shifted", shifted))
    }


def iou_text(refer, segmenter, s):
    ((_, m),) = answers(segmenter, refer, [s])
    t = refer.mask(s.ann_id)
    return f"{(m & t).sum() / (m | t).sum():.2f}"


def test_figure_4_shows_what_the_rule_chose(refer, pair):
    models, records = pair
    fig = figure_baseline(models, records, refer, "val")
    grid = np.array(fig.axes).reshape(3, 5)
    known = {s.sent_id: s for s in refer.samples("val")}
    a = records["half"].arrays
    gain = gains(*records.values())
    for ax, i in zip(grid.T, choose_gains(*records.values())):
        s = known[int(a["sent_id"][i])]
        title = ax[0].get_title().replace("\n", " ")
        assert title == f"“{s.text}” gain {100 * gain[i]:+.0f} points"
        assert texts(ax[0]) == [] and [texts(x) for x in ax[1:]] == [
            [iou_text(refer, m, s)] for m in models.values()
        ]
    assert [ax.get_ylabel() for ax in grid[:, 0]] == ["image, truth", "half", "shifted"]
    assert png(fig)[:4] == b"\x89PNG" and plt.get_fignums() == []
    with pytest.raises(ValueError, match="testA has no sentence"):
        figure_baseline(models, records, refer, "testA")


def test_figure_5_shows_all_models_on_the_examples(refer, pair):
    models, records = pair
    fig = figure_modules(models, records["shifted"], refer, "val")
    chosen = choose_examples(records["shifted"])
    grid = np.array(fig.axes).reshape(3, len(chosen))
    known = {s.sent_id: s for s in refer.samples("val")}
    for ax, (kind, i) in zip(grid.T, chosen.items()):
        s = known[int(records["shifted"].arrays["sent_id"][i])]
        assert ax[0].get_title().replace("\n", " ") == f"“{s.text}” {kind}" and kind in (s.kind, "failure")
        assert texts(ax[2]) == [iou_text(refer, models["shifted"], s)]


def test_figure_6_shows_every_phrase_of_one_picture(refer, pair):
    models, _ = pair
    fig = figure_phrases(models["shifted"], refer, "val", columns=4)
    image_id = choose_image(refer, "val")
    samples = [s for s in refer.samples("val") if s.image_id == image_id]
    shown = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title().replace("\n", " ") for ax in shown] == [
        "the image",
        *(f"“{s.text}”" for s in samples),
    ]
    assert [texts(ax) for ax in shown[1:]] == [[iou_text(refer, models["shifted"], s)] for s in samples]


def test_gallery_and_counts_say_the_same(refer, pair):
    segmenter = pair[0]["half"]
    table = failure_causes(segmenter, refer, "val")
    chosen = choose_failures(table, 3)
    fig = figure_failures(segmenter, refer, "val", table, 3)
    grid = np.array(fig.axes).reshape(len(chosen), 3)
    wrong = (table["cause"] != "right").sum()
    known = {s.sent_id: s for s in refer.samples("val")}
    for line, (cause, places) in zip(grid, chosen.items()):
        n = (table["cause"] == cause).sum()
        assert line[0].get_ylabel() == f"{cause}\n{n} of {wrong} ({n / wrong:.0%})"
        assert [ax.get_title().replace("\n", " ") for ax in line if ax.axison] == [
            f"“{known[int(table['sent_id'][i])].text}”" for i in places
        ]
    counts = cause_counts(table)
    lines = cause_table(counts).splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    assert head[3:] == list(CAUSES) and len(lines) == 2 + len(counts)
    for line, (name, n) in zip(lines[2:], counts.items()):
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert (
            cells[0] == name
            and int(cells[1]) == sum(n.values())
            and int(cells[2].split()[0]) == sum(n.values()) - n["right"]
        )
        assert [0 if c == "–" else int(c.split()[0]) for c in cells[3:]] == [n[c] for c in CAUSES]
    fig = figure_causes(counts, "made up")
    (ax,) = fig.axes
    n = counts["all"]
    widths = [p.get_width() for p in ax.patches if abs(p.get_y() + p.get_height() / 2) < 1e-9]
    assert (
        np.allclose(widths, [100 * n[c] / sum(n.values()) for c in CAUSES])
        and texts(ax)[0] == f"{wrong} of {len(table['cause'])}"
    )
    assert [t.get_text() for t in fig.legends[0].get_texts()] == list(CAUSES)
    right = {k: v[table["cause"] == "right"] for k, v in table.items()}
    assert figure_failures(segmenter, refer, "val", right) is None and "–" in cause_table(cause_counts(right))
