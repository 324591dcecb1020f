"""Protocols against naive programs, thresholds, sample files, comparisons, and whether the intervals keep
their promise."""

import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from test_evaluation import fake_record, toy_dataset
from toy_refer import make_toy

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer, write_refer
from refseg_nb.data.referit import ReferIt, write_referit
from refseg_nb.data.words import PAD, vocabulary_for
from refseg_nb.evaluation import protocols
from refseg_nb.evaluation.evaluator import (
    FAILURES,
    Record,
    bootstrap,
    evaluate,
    load_record,
    make_record,
    metric_columns,
    metrics_of_sums,
    object_arrays,
    paired_bootstrap,
    sample_groups,
    save_record,
)
from refseg_nb.evaluation.metrics import THRESHOLDS
from refseg_nb.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    choose_threshold,
    compare,
    compared_masks,
    dilated,
    evaluate_protocols,
    nearest,
    read_ignore,
    read_samples,
    write_samples,
)
from refseg_nb.models.base import ModelConfig

REPO = Path(__file__).resolve().parents[1]


class Canned(torch.nn.Module):
    """Answers that depend on image and words alone: random maps, smooth enough to have an inside."""

    config = ModelConfig()

    def __init__(self, low=-3.0, high=3.0):
        super().__init__()
        self.low, self.high, self.p, self.seen = low, high, torch.nn.Parameter(torch.zeros(1)), []

    def encode(self, images):
        return images

    def answer(self, image, words):
        seed = hash((int(image.long().sum()), tuple(words[words != PAD].tolist()))) % 2**31
        return torch.empty(6, 6).uniform_(self.low, self.high, generator=torch.Generator().manual_seed(seed))

    def segment(self, features, words, index):
        self.seen.append(len(words))
        return torch.stack([self.answer(features[i], w) for i, w in zip(index, words)])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Sides of 41, 49 and 57 pixels: odd, so that no sample point of a resize falls exactly on a pixel,
    where rounding would decide what is above 0."""
    return toy_dataset(make_toy(tmp_path_factory.mktemp("toy"), size=41))


# --- the naive programs: one sample at a time, matrices instead of `interpolate`, plain Python sums


def weights(n, m):
    """[m, n]: bilinear interpolation from n to m pixels, half-pixel centres, edges repeated."""
    out = np.zeros((m, n))
    for i in range(m):
        at = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
        low = int(at)
        out[i, low] += 1 - (at - low)
        if at > low:
            out[i, low + 1] += at - low
    return out


def resize(a, size):
    return weights(a.shape[0], size[0]) @ a.astype(float) @ weights(a.shape[1], size[1]).T


def nearest_by_centres(mask, side):
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in mask.shape)
    return mask[rows][:, columns]


def lavt(p, y):
    return resize(p, (480, 480)) > 0.5, nearest_by_centres(y, 480)


def cris(p, y):
    return resize(p, y.shape) > 0.35, y


def ours(p, y):
    return resize(p, y.shape) > 0.5, y


def shnet(side):
    return lambda p, y: (resize(p, (side, side)) > 0.4, resize(y, (side, side)) > 0)


def cmpc(p, y):
    scale = 320 / max(y.shape)
    return resize(resize(p, [round(n * scale) for n in y.shape]) > 0.5, y.shape) > 0


NAIVE = {  # masks, hit, empty, which sentences
    "refseg": (ours, lambda iou, x: iou > x, 1, "all"),
    "shnet": (shnet(160), lambda iou, x: iou > x, 0, "all"),
    "shnet-56": (shnet(56), lambda iou, x: iou > x, 0, "all"),
    "lavt": (lavt, lambda iou, x: iou >= x, 0, "all"),
    "cris": (cris, lambda iou, x: iou > x, 0, "all"),
    "cris-val": (cris, lambda iou, x: iou > x, 0, "first"),
    "cmpc": (lambda p, y: (cmpc(p, y), y), lambda iou, x: iou >= x, 0, "all"),
    "last": (ours, lambda iou, x: iou > x, 1, "last"),
}


def run_naively(name, model, dataset):
    masks, _, _, which = NAIVE[name]
    rows = {}
    for s in dataset.samples:
        if (
            which != "all"
            and s.sent_id != [x.sent_id for x in s.ref.sentences][{"first": 0, "last": -1}[which]]
        ):
            continue
        z = (
            model.answer(
                dataset.image(s.image_id), torch.tensor(dataset.vocabulary.encode(s.text, dataset.max_words))
            )
            .detach()
            .numpy()
            .astype(float)
        )
        pred, true = masks(1 / (1 + np.exp(-z)), dataset.original_mask(s))
        rows[s.ref_id, s.sent_id] = int((pred & true).sum()), int((pred | true).sum())
    return rows


@pytest.fixture(scope="module")
def by_protocol(toy):
    return evaluate_protocols(Canned(), toy, [*PROTOCOLS, Protocol("last", sentences="last")], resamples=20)


@pytest.mark.parametrize("name", NAIVE)
def test_each_protocol_is_its_naive_program(name, toy, by_protocol):
    expected, record = run_naively(name, Canned(), toy), by_protocol[name]
    a = record.arrays
    got = {
        (r, s): (i, u)
        for r, s, i, u in zip(*(a[k].tolist() for k in ("ref_id", "sent_id", "intersection", "union")))
    }
    assert got.keys() == expected.keys() and len({u for _, u in expected.values()}) > 5
    assert sum(got[k] != expected[k] for k in got) <= 1 and all(
        abs(x - y) <= 2 for k in got for x, y in zip(got[k], expected[k])
    ), "float32 may move a pixel"
    _, hit, empty, _ = NAIVE[name]
    ious = [i / u if u else empty for i, u in got.values()]
    want = {
        "overall_iou": sum(i for i, _ in got.values()) / sum(u for _, u in got.values()),
        "mean_iou": sum(ious) / len(ious),
        **{f"precision@{x:g}": sum(hit(iou, x) for iou in ious) / len(ious) for x in THRESHOLDS},
    }
    for metric, v in want.items():
        assert record.metrics[metric]["value"] == pytest.approx(100 * v), metric
    assert record.protocol["protocol"] == name and record.metrics["samples"] == record.protocol[
        "samples"
    ] == len(got)


def test_the_protocols_say_what_they_are(by_protocol):
    stamp = {n: r.protocol for n, r in by_protocol.items()}
    assert (
        stamp["lavt"]["resolution"] == "squash 480"
        and stamp["lavt"]["comparator"] == ">="
        and stamp["lavt"]["empty_union_iou"] == 0
    )
    assert (
        stamp["shnet"]["resolution"] == "dilated 160"
        and stamp["shnet"]["threshold"] == 0.4
        and stamp["shnet-56"]["resolution"] == "dilated 56"
    )
    assert (
        stamp["cris"]["headline"] == "mean_iou"
        and stamp["cris-val"]["sentences"] == "first"
        and stamp["cmpc"]["resolution"] == "binary 320"
    )
    assert all(p.source for p in PROTOCOLS.values()) and [p.name for p in PROTOCOLS.values()] == list(
        PROTOCOLS
    )
    areas = [r.arrays["area"].tolist() for n, r in by_protocol.items() if r.protocol["sentences"] == "all"]
    assert all(a == areas[0] for a in areas), "area and pixels are the image's own under every protocol"


def test_own_protocol_is_evaluate_and_the_model_runs_once(toy):
    model = Canned()
    record = evaluate_protocols(model, toy, resamples=20)["refseg"]
    assert sum(model.seen) == len(toy.samples)
    plain = evaluate(Canned(), toy, resamples=20)
    assert plain.metrics == record.metrics and plain.groups == record.groups
    assert {k: v for k, v in record.protocol.items() if k in plain.protocol} == plain.protocol


def test_any_batch_size(toy):
    one, seven = (
        [
            evaluate_protocols(
                Canned(), toy, [*PROTOCOLS], resamples=2, images_per_batch=n, expressions_per_step=n
            ),
            choose_threshold(Canned(), toy, images_per_batch=n, expressions_per_step=n),
        ]
        for n in (1, 7)
    )
    for name in PROTOCOLS:
        for k, v in one[0][name].arrays.items():
            assert np.array_equal(v, seven[0][name].arrays[k]), (name, k)
    assert one[1] == seven[1]


@pytest.mark.parametrize("size", [(480, 640), (37, 53), (640, 427)])
def test_nearest_is_pillows(size):
    masks = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) > 0.5
    want = [
        np.asarray(Image.fromarray(m.numpy()).resize((480, 480), Image.Resampling.NEAREST)) for m in masks
    ]
    assert np.array_equal(nearest(masks, 480).numpy(), np.stack(want))


def test_a_dilated_mask_holds_the_nearest_one_and_a_point_may_vanish():
    masks = torch.rand(3, 61, 47, generator=torch.Generator().manual_seed(1)) > 0.8
    assert (dilated(masks, (56, 56)) | ~nearest(masks, 56)).all()
    point = torch.zeros(1, 480, 480, dtype=torch.bool)
    point[0, 8, 8] = True
    assert not dilated(point, (56, 56)).any() and not nearest(point, 56).any(), (
        "shrinking looks at single pixels; what lies between them is lost"
    )
    assert dilated(point, (960, 960)).sum() == 16, "enlarging dilates a pixel to 4 x 4, not 2 x 2"


def test_what_a_perfect_dilated_answer_is_worth():
    """Against its own truth it is perfect; against the original mask it is not, and less so on a coarser
    grid."""
    y, x = np.mgrid[:200, :200]
    true = torch.from_numpy(np.stack([(y - 90) ** 2 + (x - 80) ** 2 < r * r for r in (20, 35, 60)]))
    worth = []
    for side in (56, 160):
        logits = (dilated(true, (side, side)).float() - 0.5) * 40
        own = Protocol("own", resolution="dilated", side=side)
        pred, target = compared_masks(own, logits, true)
        assert torch.equal(pred, target)
        pred, target = compared_masks(PROTOCOLS["refseg"], logits, true)
        worth.append(float((pred & target).sum() / (pred | target).sum()))
        assert (pred & ~target).sum() > 3 * (target & ~pred).sum(), "the answer is too fat"
    assert worth[0] < worth[1] < 1


def test_bad_protocols_are_refused(toy):
    for wrong, text in (
        ({"resolution": "squared"}, "resolution must be"),
        ({"resolution": "squash"}, "needs a side"),
        ({"side": 4}, "no side"),
        ({"comparator": "<"}, "comparator"),
        ({"threshold": 1.0}, "threshold"),
        ({"empty_union_iou": 2}, "empty_union_iou"),
        ({"sentences": "any"}, "sentences"),
        ({"headline": "ciou"}, "headline"),
        ({"resolution": "binary", "side": 0}, "needs a side"),
    ):
        with pytest.raises(ValueError, match=f"'mine'.*{text}"):
            Protocol("mine", **wrong)
    with pytest.raises(ValueError, match="no protocol 'vlt'"):
        evaluate_protocols(Canned(), toy, ["vlt"])
    with pytest.raises(ValueError, match="same name"):
        evaluate_protocols(Canned(), toy, ["lavt", PROTOCOLS["lavt"]])
    with pytest.raises(AttributeError):
        PROTOCOLS["lavt"].threshold = 0.3


# --- masks with nothing in them


@pytest.fixture(scope="module")
def with_empty(tmp_path_factory):
    """Two images; the first object of each has an empty mask."""
    root = tmp_path_factory.mktemp("empty")
    folder = root / "images" / "none"
    folder.mkdir(parents=True)
    images, annotations, refs = [], [], []
    for i in (1, 2):
        Image.fromarray(np.full((30, 40, 3), 90 * i, np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 30, "width": 40})
        for k, polygon in enumerate(([], [[5, 5, 20, 5, 20, 20, 5, 20]])):
            ann = 10 * i + k
            annotations.append(
                {
                    "id": ann,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": 0.0,
                    "bbox": [0, 0, 1, 1],
                    "segmentation": polygon,
                }
            )
            sentence = {"sent_id": ann, "sent": f"thing {k}", "raw": "", "tokens": ["thing", str(k)]}
            refs.append(
                {
                    "ref_id": ann,
                    "ann_id": ann,
                    "image_id": i,
                    "category_id": 1,
                    "split": "val",
                    "sent_ids": [ann],
                    "sentences": [sentence],
                }
            )
    write_refer(
        root / "none",
        refs,
        {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]},
    )
    refer = Refer(root, "none", "unc")
    return RISDataset(refer, "val", vocabulary_for(refer, "val"), image_size=32, target_size=None)


def test_empty_masks_have_a_value(with_empty):
    found = evaluate_protocols(Canned(-9, -8), with_empty, resamples=50)  # nothing is ever marked
    for name, r in found.items():
        assert r.arrays["intersection"].sum() == 0 and (r.arrays["union"] == 0).tolist() == [
            True,
            False,
            True,
            False,
        ]
        one = name in ("refseg", "shnet", "shnet-56")  # two empty masks are alike
        assert r.metrics["overall_iou"]["value"] == 0
        assert r.metrics["mean_iou"]["value"] == (50 if one else 0)
        assert r.metrics["wrong_object"]["value"] == (50 if one else 100)
        assert all(np.isfinite(m["value"]) for m in r.metrics.values() if isinstance(m, dict))
    choice = choose_threshold(Canned(-9, -8), with_empty)
    assert choice.threshold == 0.5 and choice.counts[0.5] == (
        0,
        2 * int(with_empty.original_mask(with_empty.samples[1]).sum()),
    )
    whole = evaluate_protocols(Canned(8, 9), with_empty, ["refseg", "lavt"], resamples=50)  # all is marked
    assert all(r.metrics["mean_iou"]["value"] < 50 for r in whole.values()), (
        "an empty truth with a mask on it is wrong under every protocol"
    )


def test_only_empty_unions(with_empty):
    key = {(s.ref_id, s.sent_id) for s in with_empty.samples if s.ann_id % 10}
    choice = choose_threshold(Canned(-9, -8), with_empty, ignore=key)
    assert choice.threshold == 0.5 and set(choice.curve.values()) == {0.0}
    r = evaluate(Canned(-9, -8), with_empty, ignore=key, resamples=20)
    assert (
        r.metrics["mean_iou"]["value"] == 100
        and np.isnan(r.metrics["overall_iou"]["value"])
        and r.metrics["samples"] == 2
    )


# --- large sums


def test_sums_beyond_32_bits():
    rng = np.random.default_rng(0)
    n = 10_834
    union = rng.integers(250_000, 400_000, n)
    inter = rng.binomial(union, 0.61)
    exact = Fraction(sum(inter.tolist()), sum(union.tolist()))
    assert exact.denominator and sum(union.tolist()) > 2**31
    arrays = {
        "sent_id": np.arange(n),
        "ref_id": np.arange(n),
        "image_id": np.arange(n) // 7,
        "kind": np.full(n, ""),
        "words": np.full(n, 3),
        "area": union,
        "pixels": np.full(n, 480_000),
        "intersection": inter,
        "union": union,
    }
    a = make_record("a", arrays, resamples=5)
    assert a.metrics["overall_iou"]["value"] == pytest.approx(100 * float(exact), rel=1e-14)
    b = replace(a, arrays=arrays | {"intersection": inter + 1})
    gain = float(100 * Fraction(n, sum(union.tolist())))
    assert paired_bootstrap(a, b, resamples=5)["overall_iou"]["difference"] == pytest.approx(gain, rel=1e-9)


def test_a_threshold_is_chosen_on_exact_sums(toy, monkeypatch):
    """Sums that differ by one pixel in 10^17: float64 would call it a tie and take 0.5."""

    def measure(self, model, names, count, **_):
        n = np.arange(len(self.samples))
        return {
            k: n if k == "index" else 10**17 // len(n) - ((k == (0.5, "I")) & (n == 0))
            for k in ("index", "area", "pixels", *names)
        }

    monkeypatch.setattr(protocols.Evaluator, "measure", measure)
    choice = choose_threshold(Canned(), toy, [0.3, 0.5])
    assert (
        choice.counts[0.3][0] == choice.counts[0.5][0] + 1 > 2**31
        and choice.curve[0.3] == choice.curve[0.5]
        and choice.threshold == 0.3
    )


# --- the threshold


def test_the_curve_is_what_evaluations_say(toy):
    choice = choose_threshold(Canned(), toy, (0.2, 0.45, 0.5, 0.8))
    own = {t: evaluate(Canned(), toy, t, resamples=2) for t in choice.curve}
    for t, r in own.items():
        assert choice.counts[t] == (r.arrays["intersection"].sum(), r.arrays["union"].sum())
        assert choice.curve[t] == pytest.approx(r.metrics["overall_iou"]["value"])
    assert (
        choice.threshold == max(choice.curve, key=choice.curve.get) and len(set(choice.curve.values())) == 4
    )
    assert (
        choice.chosen_on == f"toy (unc) val: 7 images, {len(toy.samples)} expressions"
        and choice.chosen_on in str(choice)
    )


def test_equal_thresholds_go_to_the_middle(toy):
    sure = Canned(30, 31)  # every pixel, at every threshold
    assert choose_threshold(sure, toy, (0.1, 0.4, 0.7)).threshold == 0.4
    assert choose_threshold(sure, toy).threshold == 0.5
    for wrong in ([], [0.0], [0.5, 1.0]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            choose_threshold(sure, toy, wrong)
    everything = {(s.ref_id, s.sent_id) for s in toy.samples}
    with pytest.raises(ValueError, match="no samples"):
        choose_threshold(sure, toy, ignore=everything)


def test_the_record_says_where_its_threshold_comes_from(toy):
    choice = choose_threshold(Canned(), toy)
    assert evaluate(Canned(), toy, resamples=2).protocol["threshold_from"] == "fixed"
    assert (
        evaluate(Canned(), toy, choice.threshold, threshold_from=choice.chosen_on, resamples=2).protocol[
            "threshold_from"
        ]
        == choice.chosen_on
    )
    tuned = replace(PROTOCOLS["lavt"], threshold=choice.threshold, threshold_from=choice.chosen_on)
    assert (
        evaluate_protocols(Canned(), toy, [tuned], resamples=2)["lavt"].protocol["threshold_from"]
        == choice.chosen_on
    )


# --- what is known about the objects


def test_categories_and_distractors(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    samples = refer.samples("val")
    found = object_arrays(refer, samples)
    table = json.loads((tiny_root / "refshapes" / "instances.json").read_text())
    names = {c["id"]: c["name"] for c in table["categories"]}
    for s, category, n in zip(samples, found["category"], found["distractors"]):
        mine = next(a for a in table["annotations"] if a["id"] == s.ann_id)
        alike = [
            a
            for a in table["annotations"]
            if a["image_id"] == s.image_id and a["category_id"] == mine["category_id"]
        ]
        assert category == names[mine["category_id"]] and n == len(alike) - 1
    assert len(set(found["distractors"].tolist())) > 2


def test_crowds_are_not_distractors(tmp_path):
    root = make_toy(tmp_path)
    refer = Refer(root, "toy", "unc")
    samples = refer.samples("val")
    before = object_arrays(refer, samples)["distractors"]
    assert set(before.tolist()) == {1, 2} and set(object_arrays(refer, samples)["category"]) == {"square"}
    for s in samples:  # another object of the image becomes a crowd
        next(a for a in refer.annotations_of(s.image_id) if a["id"] != s.ann_id)["iscrowd"] = 1
        break
    after = object_arrays(refer, samples)["distractors"]
    assert after[0] == before[0] - 1
    refer.annotation(samples[0].ann_id)["category_id"] = refer.annotation(samples[-1].ann_id)["category_id"]


def test_categories_of_real_data(real_data):
    refer = Refer(real_data, "refcoco", "micro")
    samples = refer.samples("val") if "val" in refer.splits else refer.samples(refer.splits[0])
    found = object_arrays(refer, samples)
    for s, category, n in zip(samples, found["category"], found["distractors"]):
        own = refer.annotations[s.ann_id]
        alike = [
            a
            for a in refer.annotations.values()
            if a["image_id"] == s.image_id and a["category_id"] == own["category_id"] and not a["iscrowd"]
        ]
        assert category == refer.categories[own["category_id"]] and n == len(alike) - (not own["iscrowd"])


def test_referit_has_no_categories(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:15] = True
    write_referit(
        tmp_path / "referit",
        {"train": {"1_1": ["sky"]}, "val": {"2_1": ["sky"], "2_2": ["left tree", "tree"]}},
        lambda i: Image.new("RGB", (30, 20), (9 * i, 40, 40)),
        lambda key: mask,
    )
    refer = ReferIt(tmp_path)
    data = RISDataset(refer, "val", vocabulary_for(refer), image_size=32, target_size=None)
    record = evaluate(Canned(), data, resamples=20)
    assert (
        "category" not in record.arrays
        and "distractors" not in record.arrays
        and record.groups.keys() == {"kind", "words", "area"}
    )
    back = load_record(save_record(record, tmp_path / "r.json"))
    assert back.arrays.keys() == record.arrays.keys()
    with_, without = fake_record(20), write_samples(record, tmp_path / "r.jsonl")
    assert (
        "category" not in without.read_text()
        and read_samples(without).keys() == record.arrays.keys()
        and "category" not in with_.arrays
    )


def with_objects(record, categories=20, seed=0):
    rng = np.random.default_rng(seed)
    n = len(record.arrays["union"])
    names = np.array([f"kind {i}" for i in range(categories - 1)] + ["other"])
    return record.arrays | {
        "category": names[np.minimum(rng.geometric(0.15, n) - 1, categories - 1)],
        "distractors": rng.integers(0, 6, n),
    }


def test_groups_by_category_and_distractors():
    arrays = with_objects(fake_record(200))
    groups = sample_groups(arrays)
    for family in ("category", "distractors"):
        assert np.array_equal(sum(k.astype(int) for k in groups[family].values()), np.ones(1000)), (
            "each sample once"
        )
    assert (
        list(groups["distractors"]) == ["0", "1", "2", "3+"]
        and groups["distractors"]["3+"].sum() == (arrays["distractors"] >= 3).sum()
    )
    names = list(groups["category"])
    assert len(names) == 13 and names[-1] == "other"
    counts = [groups["category"][n].sum() for n in names[:-1]]
    assert counts == sorted(counts, reverse=True)
    few = sample_groups(arrays | {"category": np.where(np.arange(1000) % 2, "cat", "dog")})["category"]
    assert few.keys() == {"cat", "dog"}
    record = make_record("x", arrays, resamples=20)
    for name, keep in groups["category"].items():
        i, u = (arrays[k][keep] for k in ("intersection", "union"))
        assert record.groups["category"][name]["overall_iou"]["value"] == pytest.approx(
            100 * i.sum() / u.sum()
        )


def test_records_keep_the_new_arrays_and_stay_small(tmp_path):
    record = make_record("x", with_objects(fake_record()), resamples=20)
    path = save_record(record, tmp_path / "x.json")
    back = load_record(path)
    for k, v in record.arrays.items():
        assert np.array_equal(back.arrays[k], v), k
    with np.load(path.with_suffix(".npz")) as stored:
        assert (
            stored["distractors"].dtype == stored["category"].dtype == np.uint8
            and len(stored["categories"]) == 20
        )
    assert path.stat().st_size + path.with_suffix(".npz").stat().st_size < 120_000


def test_old_records_are_read_and_compared():
    """Those in the repository, which know neither categories nor where their threshold came from."""
    found = sorted((REPO / "results").rglob("*.npz"))
    assert len(found) > 10
    for file in found:
        r = load_record(file.with_suffix(".json"))
        again = make_record(r.name, r.arrays, resamples=2)
        assert again.metrics["overall_iou"]["value"] == pytest.approx(
            r.metrics["overall_iou"]["value"]
        ) and sample_groups(r.arrays).keys() >= {"words", "area"}
    old = load_record(REPO / "results" / "reproduction" / "records" / "shnet-seed0-val.json")
    new = replace(
        old, arrays=with_objects(old), protocol=old.protocol | {"threshold_from": "fixed", "ignored": 0}
    )
    c = compare(old, new, resamples=20)
    assert c.differ == {} and c.groups.keys() >= {
        "kind",
        "category",
        "distractors",
    }, "what one of two records knows is enough for both"


# --- failures


def test_failures_are_counted_at_their_borders():
    inter, union = (
        np.array([0, 9, 10, 11, 49, 50, 51, 100, 0, 3]),
        np.array([100, 100, 100, 100, 100, 100, 100, 100, 0, 30]),
    )
    columns = metric_columns(inter, union, empty_union_iou=0.0)
    found = metrics_of_sums(columns.sum(0))
    assert {k: found[k] for k in FAILURES} == {"wrong_object": 30, "sloppy_mask": 40, "right": 30}
    assert metrics_of_sums(metric_columns(inter, union).sum(0))["right"] == 40, (
        "two empty masks are right where that is the rule"
    )
    for comparator in (">", ">="):
        again = metrics_of_sums(
            metric_columns(inter, union, comparator=comparator, empty_union_iou=0.0).sum(0)
        )
        assert {k: again[k] for k in FAILURES} == {k: found[k] for k in FAILURES}, (
            "what right means does not hang on the comparator"
        )
    assert (
        metrics_of_sums(metric_columns(inter, union, comparator=">=", empty_union_iou=0.0).sum(0))[
            "precision@0.5"
        ]
        == found["right"]
    )


def test_shares_of_failures_have_clustered_intervals():
    """Images of equal size: the standard error of a share is that of the mean of the images' shares."""
    r = fake_record(400, 5, quality=0.4)
    iou = (r.arrays["intersection"] / r.arrays["union"]).reshape(400, 5)
    got = bootstrap(*(r.arrays[k] for k in ("intersection", "union", "image_id")))["all"]
    for name, share in (
        ("wrong_object", iou < 0.1),
        ("sloppy_mask", (iou >= 0.1) & (iou < 0.5)),
        ("right", iou >= 0.5),
    ):
        means = 100 * share.mean(1)
        m = got[name]
        assert m["value"] == pytest.approx(means.mean()) and m["high"] - m["low"] == pytest.approx(
            2 * 1.96 * means.std() / 20, rel=0.1
        )
    assert sum(got[k]["value"] for k in FAILURES) == pytest.approx(100)


# --- sample files


def test_sample_lines_give_the_same_numbers(tmp_path, toy):
    fake = with_objects(fake_record(30)) | {"kind": np.full(150, "größer \n ü")}
    for record in (evaluate(Canned(), toy, resamples=50), make_record("x", fake, resamples=50)):
        path = write_samples(record, tmp_path / "new" / "x.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == record.metrics["samples"] and set(rows[0]) == set(protocols.SAMPLE_FIELDS)
        assert 100 * sum(x["intersection"] for x in rows) / sum(x["union"] for x in rows) == pytest.approx(
            record.metrics["overall_iou"]["value"]
        )
        back = read_samples(path)
        for k, v in record.arrays.items():
            assert np.array_equal(back[k], v), k
        again = make_record("again", back, resamples=50)
        assert again.metrics == record.metrics and again.groups == record.groups
        assert [p.name for p in path.parent.iterdir()] == ["x.jsonl"]


def test_other_programs_may_leave_out_and_add_keys(tmp_path):
    path = tmp_path / "theirs.jsonl"
    row = {
        "image_id": 1,
        "ref_id": 2,
        "sent_id": 3,
        "intersection": 5,
        "union": 10,
        "area": 7,
        "pixels": 100,
        "words": 2,
        "score": 0.3,
    }
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"sent_id": 4}))
    arrays = read_samples(path)
    assert "score" not in arrays and arrays["kind"].tolist() == ["", ""]
    assert make_record("theirs", arrays, resamples=2).metrics["overall_iou"]["value"] == 50


def test_damaged_sample_lines_are_named(tmp_path):
    path = write_samples(fake_record(2), tmp_path / "x.jsonl")
    good = path.read_text().splitlines()
    row = json.loads(good[2])
    change = lambda **kw: json.dumps({k: v for k, v in (row | kw).items() if v is not None})
    for bad, text in (
        ("{", "is not JSON"),
        ("[1]", "list, not an object"),
        (change(union=None), "no 'union'"),
        (change(union="3"), "union is '3'"),
        (change(words=True), "words is True"),
        (change(area=-1), "area is -1"),
        (change(area=2**70), "area is"),
        (change(kind=3), "kind is 3"),
        (change(intersection=row["union"] + 1), "larger than the union"),
        (good[1], "repeats ref"),
        (change(category="cat"), "has the keys"),
        (change(pixels=1.5), "pixels is 1.5"),
        ("NaN", "float, not an object"),
        ("[" * 100_000, "is not JSON"),
    ):
        path.write_text("\n".join([*good[:2], bad, *good[3:]]))
        with pytest.raises(ValueError, match=f"x.jsonl: line 3: .*{text}"):
            read_samples(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"x.jsonl: line 1: is not JSON"):
        read_samples(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(path)
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no per-sample"):
        write_samples(Record("x", {}), path)


def test_a_sample_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_samples(fake_record(2), tmp_path / "x.jsonl")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_samples(fake_record(3), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


# --- ignored samples


def test_ignored_samples(toy, tmp_path):
    whole = evaluate(Canned(), toy, resamples=20)
    a = whole.arrays
    pairs = [[int(a["ref_id"][i]), int(a["sent_id"][i])] for i in (0, 3, 4)] + [[10**6, 1]]
    (tmp_path / "bad.json").write_text(json.dumps(pairs))
    ignore = read_ignore(tmp_path / "bad.json")
    part = evaluate(Canned(), toy, ignore=ignore, resamples=20)
    keep = np.array([(r, s) not in ignore for r, s in zip(a["ref_id"].tolist(), a["sent_id"].tolist())])
    for k, v in a.items():
        assert np.array_equal(part.arrays[k], v[keep]), k
    assert (
        part.protocol["ignored"] == 3
        and whole.protocol["ignored"] == 0
        and part.protocol["samples"] == len(keep) - 3
    )
    same = evaluate_protocols(Canned(), toy, ["refseg", "lavt"], ignore=ignore, resamples=20)
    assert same["refseg"].metrics == part.metrics and same["lavt"].protocol["ignored"] == 3
    choice = choose_threshold(Canned(), toy, [0.5], ignore=ignore)
    assert choice.counts[0.5] == (part.arrays["intersection"].sum(), part.arrays["union"].sum())
    image = {(s.ref_id, s.sent_id) for s in toy.samples if s.image_id == toy.samples[0].image_id}
    assert evaluate(Canned(), toy, ignore=image, resamples=2).protocol["images"] == 6, (
        "an image without samples is not read"
    )
    assert evaluate(Canned(), toy, text_control="shuffled", ignore=image, resamples=2).protocol["images"] == 6
    limited = [
        evaluate(Canned(), toy, limit=4, ignore=i, resamples=2).arrays["sent_id"].tolist()
        for i in (None, ignore)
    ]
    assert set(limited[1]) <= set(limited[0]), "a limit takes the same images with and without the list"
    with pytest.raises(ValueError, match="no samples"):
        evaluate(Canned(), toy, ignore={(s.ref_id, s.sent_id) for s in toy.samples})


def test_damaged_lists_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    for text, message in (
        ("[[1, 2]", "not JSON"),
        ('{"a": 1}', "dict, not a list"),
        ("[[1, 2], [1]]", "entry 2"),
        ("[[1, true]]", "entry 1"),
        ('["1"]', "entry 1"),
        ("[[1.0, 2]]", "entry 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
            read_ignore(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_ignore(tmp_path / "none.json")
    path.write_text("[]")
    assert read_ignore(path) == set()


# --- a against b


def test_a_comparison_is_the_paired_bootstrap_of_each_group():
    a, b = (
        make_record(n, with_objects(fake_record(80, quality=q, seed=i)), resamples=2)
        for i, (n, q) in enumerate((("a", 0.6), ("b", 0.64)))
    )
    order = np.random.default_rng(0).permutation(400)
    shuffled = replace(b, arrays={k: v[order] for k, v in b.arrays.items()})
    c = compare(a, shuffled, resamples=200)
    assert c.metrics == paired_bootstrap(a, b, resamples=200)
    assert c.groups.keys() == {"kind", "words", "area", "distractors", "category"}
    image = a.arrays["image_id"]
    rng, draws = np.random.default_rng(0), []
    drawn = rng.integers(80, size=(200, 80))
    keep = a.arrays["distractors"] == 1
    for row in drawn:  # written out: draw images, take their samples of the group
        rows = np.concatenate([np.flatnonzero((image == i) & keep) for i in row])
        draws.append(
            [100 * r.arrays["intersection"][rows].sum() / r.arrays["union"][rows].sum() for r in (a, b)]
        )
    draws = np.array(draws)
    got = c.groups["distractors"]["1"]
    low, high = np.quantile(draws[:, 1] - draws[:, 0], [0.025, 0.975])
    assert got["samples"] == keep.sum() and (
        got["overall_iou"]["low"],
        got["overall_iou"]["high"],
    ) == pytest.approx((low, high), abs=1e-9)
    text = str(c)
    for word in (
        "overall_iou",
        "precision@0.9",
        "wrong_object",
        "distractors 3+",
        "area small",
        "words 3-5",
        "kind relation",
    ):
        assert word in text
    assert (
        text.splitlines()[0] == "a: a" and "80 images" in text and "*" in text and "each training" not in text
    )
    assert len({len(line.split("[")[0]) for line in text.splitlines() if "[" in line}) == 1, (
        "the columns stand below each other"
    )


def test_a_comparison_of_trainings_shows_each():
    a, b = (
        [fake_record(40, quality=q, seed=s, name=n) for s in (1, 2)] for n, q in (("one", 0.6), ("two", 0.62))
    )
    c = compare(a, b, resamples=50)
    assert c.a == "one (2 runs)" and c.metrics == paired_bootstrap(a, b, resamples=50)
    assert "b - a for each run: " + ", ".join(
        f"{x:+.2f}" for x in c.metrics["overall_iou"]["by_seed"]
    ) in str(c)


def test_a_small_group_may_be_missing_in_a_resample():
    a, b = (fake_record(30, 2, seed=s) for s in (0, 1))
    for r in (a, b):
        r.arrays = r.arrays | {"kind": np.where(np.arange(60) < 1, "rare", "usual")}
    d = compare(a, b, resamples=100).groups["kind"]["rare"]["overall_iou"]
    assert all(np.isfinite(d[k]) for k in ("a", "b", "difference", "low", "high", "p")) and 0 < d["p"] <= 1


def test_what_cannot_be_compared(toy):
    a = evaluate(Canned(), toy, name="one", resamples=2)
    for key, value in (
        ("split", "test"),
        ("dataset", "refcoco"),
        ("split_by", "umd"),
        ("sentences", "first"),
        ("comparator", ">="),
        ("empty_union_iou", 0.0),
    ):
        b = replace(a, name="two", protocol=a.protocol | {key: value})
        with pytest.raises(ValueError, match=f"'one' and 'two' cannot be compared: {key} is"):
            compare(a, b)
    with pytest.raises(ValueError, match="different samples"):
        compare(a, evaluate(Canned(), toy, limit=3, resamples=2))
    for key in ("area", "pixels", "image_id"):
        other = replace(
            a, name="two", arrays=a.arrays | {key: a.arrays[key] + (np.arange(len(a.arrays[key])) == 2)}
        )
        with pytest.raises(ValueError, match=f"{key} of ref {a.arrays['ref_id'][2]} differs"):
            compare(a, other)
    with pytest.raises(ValueError, match="no per-sample"):
        compare(a, replace(a, arrays={}))
    with pytest.raises(ValueError, match="at least one"):
        compare([], [a])


def test_what_may_differ_is_said(toy):
    a = evaluate(Canned(), toy, resamples=2)
    b = evaluate(Canned(), toy, 0.7, threshold_from="somewhere", resamples=2)
    c = compare(a, b, resamples=20)
    assert c.differ == {
        "threshold": ("0.5", "0.7"),
        "threshold_from": ("fixed", "somewhere"),
    } and "they differ in threshold: 0.5 and 0.7" in str(c)
    squashed = evaluate_protocols(
        Canned(), toy, [Protocol("refseg"), Protocol("large", resolution="squash", side=480)], resamples=2
    )
    assert compare(squashed["refseg"], squashed["large"], resamples=20).differ == {
        "protocol": ("refseg", "large"),
        "resolution": ("original", "squash 480"),
    }
    assert compare(a, a, resamples=20).differ == {}


# --- do the intervals keep their promise?


def simulated(seed, images=120, gain=0.04):
    """Two models on one test set: images of unequal size, a difficulty that their expressions share. The
    truth: overall IoU 60, difference 100 * gain."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), rng.integers(1, 9, images))
    hard, union = rng.beta(6, 4, images)[image] * 0.9 + 0.06, rng.integers(100, 1000, len(image))
    chances = (np.clip(hard + g + rng.normal(0, 0.08, len(image)), 0, 1) for g in (0, gain))
    return image, union, [rng.binomial(union, c) for c in chances]


def truth(gain=0.04):
    """By brute force: one enormous test set."""
    _, union, inters = simulated(10**6, 300_000, gain)
    return [100 * i.sum() / union.sum() for i in inters]


@pytest.fixture(scope="module")
def experiments():
    """How often 200 intervals hold the truth: one score, the same with expressions drawn, and the
    difference."""
    held, (a, b) = {"images": 0, "expressions": 0, "difference": 0, "closed form": 0}, truth()
    for seed in range(200):
        image, union, inters = simulated(seed)
        for what, clusters in (("images", image), ("expressions", None)):
            m = bootstrap(inters[0], union, clusters, resamples=400, seed=seed)["all"]["overall_iou"]
            held[what] += m["low"] <= a <= m["high"]
        n = np.arange(len(image))
        records = [
            Record(
                "x",
                {},
                arrays={"ref_id": n, "sent_id": n, "image_id": image, "union": union, "intersection": i},
            )
            for i in inters
        ]
        d = paired_bootstrap(*records, resamples=400, seed=seed)["overall_iou"]
        held["difference"] += d["low"] <= b - a <= d["high"]
        ratio = inters[0].sum() / union.sum()
        surplus = np.bincount(image, weights=inters[0] - ratio * union)
        held["closed form"] += abs(100 * ratio - a) <= 196 * np.sqrt((surplus**2).sum()) / union.sum()
    return held


# what 200 honest 95 % intervals do, all but one time in a thousand
LOW, HIGH = binom.ppf([0.0005, 0.9995], 200, 0.95)


@pytest.mark.parametrize("what", ["images", "difference", "closed form"])
def test_intervals_over_images_hold_the_truth(what, experiments):
    assert LOW <= experiments[what] <= HIGH, experiments


def test_intervals_over_expressions_are_too_sure(experiments):
    assert experiments["expressions"] < min(LOW, experiments["images"] - 20), experiments


def test_the_bootstrap_agrees_with_the_closed_form_of_a_ratio():
    for seed in range(5):
        image, union, (inter, _) = simulated(seed, 400)
        m = bootstrap(inter, union, image, resamples=2000, seed=seed)["all"]["overall_iou"]
        ratio = inter.sum() / union.sum()
        half = 196 * np.sqrt((np.bincount(image, weights=inter - ratio * union) ** 2).sum()) / union.sum()
        assert (m["high"] - m["low"]) / 2 == pytest.approx(half, rel=0.08)
