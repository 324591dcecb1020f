"""Metrics against a naive loop, pycocotools, and over processes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from refseg_nb.evaluation.metrics import THRESHOLDS, intersection_union, iou, iou_of_counts, scores
from refseg_nb.evaluation.segmentation_metric import SegmentationMetric


def random_masks(n=40, h=31, w=47, seed=0):
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:h, :w]

    def disc():
        cy, cx, r = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(2, 15)
        return (yy - cy) ** 2 + (xx - cx) ** 2 < r * r

    target = np.stack([disc() for _ in range(n)])
    pred = np.stack(
        [np.roll(t, rng.integers(-4, 5), rng.integers(2)) if rng.random() < 0.8 else disc() for t in target]
    )
    return torch.from_numpy(pred), torch.from_numpy(target)


def naive(pred, target, comparator=">", empty=Fraction(1)):
    """Every metric by loops over pixels and exact fractions."""
    inter = union = 0
    ious = []
    for p, y in zip(pred.tolist(), target.tolist()):
        i = sum(a and b for r, s in zip(p, y) for a, b in zip(r, s))
        u = sum(a or b for r, s in zip(p, y) for a, b in zip(r, s))
        inter, union = inter + i, union + u
        ious.append(Fraction(i, u) if u else empty)
    hit = (lambda v, x: v > x) if comparator == ">" else (lambda v, x: v >= x)
    xs = {x: Fraction(str(x)) for x in THRESHOLDS}
    return {
        "overall_iou": float(100 * (Fraction(inter, union) if union else empty)),
        "mean_iou": float(100 * sum(ious) / len(ious)),
        **{f"precision@{x:g}": 100 * sum(hit(v, f) for v in ious) / len(ious) for x, f in xs.items()},
    }


def test_against_loops_and_pycocotools():
    pred, target = random_masks()
    metric = SegmentationMetric()
    metric.update(pred, target)
    assert metric.compute() == pytest.approx(naive(pred, target), abs=1e-9)
    rle = lambda masks: [coco.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in masks]
    theirs = np.array([coco.iou([p], [y], [0])[0, 0] for p, y in zip(rle(pred), rle(target))])
    assert np.allclose(iou(pred, target).numpy(), theirs, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=30),
    st.sampled_from([">", ">="]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_counts_against_fractions(pairs, comparator, empty):
    """Any counts, both comparators, all empty rules: thresholds that an IoU hits exactly are where floats go
    wrong."""
    counts = [(min(i, u), u) for i, u in pairs]
    ious = [Fraction(i, u) if u else Fraction(empty) for i, u in counts]
    metric = SegmentationMetric(comparator=comparator, empty_union_iou=empty)
    metric.update_counts([i for i, _ in counts], [u for _, u in counts])
    got = metric.compute()
    assert got == scores(*map(list, zip(*counts)), comparator=comparator, empty_union_iou=empty)
    for x in THRESHOLDS:
        f = Fraction(str(x))
        expected = 100 * sum(v > f if comparator == ">" else v >= f for v in ious) / len(ious)
        assert got[f"precision@{x:g}"] == pytest.approx(expected)
    assert got["mean_iou"] == pytest.approx(float(100 * sum(ious) / len(ious)), abs=1e-9)


def test_the_order_of_batches_changes_no_bit():
    rng = np.random.default_rng(1)
    union = rng.integers(1, 10**6, 999)
    inter = (union * rng.random(999)).astype(np.int64)
    results = set()
    for seed in range(5):
        order, metric = np.random.default_rng(seed).permutation(999), SegmentationMetric()
        for part in np.array_split(order, seed + 1):
            metric.update_counts(inter[part], union[part])
        results.add(tuple(metric.compute().values()))
    assert len(results) == 1


def test_large_sums():
    """More pixels than int32 holds, and far more than float16 or float32 count one by one."""
    metric = SegmentationMetric()
    for _ in range(3):
        metric.update_counts(np.full(1000, 2**21 + 1), np.full(1000, 2**22))
    assert (
        metric.intersection.dtype == torch.int64 and metric.intersection.item() == 3000 * (2**21 + 1) > 2**31
    )
    assert metric.compute()["overall_iou"] == 100 * (2**21 + 1) / 2**22


def test_empty_masks():
    none, some = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert iou(none, none).item() == 1 and iou(none, none, empty_union_iou=0.0).item() == 0
    assert iou(none, some).item() == 0 and iou(some, none).item() == 0
    metric = SegmentationMetric()
    metric.update(torch.cat([none, some]), torch.cat([none, some]))
    assert metric.compute()["overall_iou"] == 100 and metric.compute()["mean_iou"] == 100
    metric = SegmentationMetric(empty_union_iou=0.0)
    metric.update(torch.cat([none, some]), torch.cat([none, some]))
    assert metric.compute()["overall_iou"] == 100 and metric.compute()["mean_iou"] == 50, (
        "an empty pair adds nothing to the overall IoU"
    )
    metric = SegmentationMetric(empty_union_iou=0.5)
    metric.update(none, none)
    assert metric.compute()["overall_iou"] == 50
    assert all(map(math.isnan, SegmentationMetric().compute().values()))


def test_sizes_may_differ_and_states_reset():
    metric = SegmentationMetric()
    a, b = random_masks(3, 10, 20), random_masks(4, 33, 7)
    metric.update([*a[0], *b[0]], [*a[1], *b[1]])
    both = metric.compute()
    metric.reset()
    metric.update(*a)
    metric.update(*b)
    assert metric.compute() == both and metric.samples == 7


def test_what_is_refused():
    a = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool"):
        intersection_union(a.float(), a)
    with pytest.raises(ValueError, match="resize"):
        intersection_union(a, torch.zeros(2, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="comparator"):
        SegmentationMetric(comparator="<")
    with pytest.raises(ValueError, match="empty_union_iou"):
        SegmentationMetric(empty_union_iou=2.0)
    with pytest.raises(ValueError, match="comparator"):
        scores([1], [2], comparator="<")
    with pytest.raises(ValueError, match="2 predicted"):
        SegmentationMetric().update(list(a), list(a)[:1])


def test_counts_do_not_wrap():
    big = iou_of_counts(torch.tensor([2**40]), torch.tensor([2**41]))
    assert big.dtype == torch.float64 and big.item() == 0.5
