"""Evaluation: the protocol, the record, the intervals, the controls, and several processes."""

import json
import os
import time

import numpy as np
import pytest
import torch
from toy_refer import SMALL, make_toy

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import UNK, vocabulary_for
from refseg_nb.evaluation.evaluator import (
    Evaluator,
    Record,
    bootstrap,
    controlled_texts,
    evaluate,
    gather_rows,
    load_record,
    make_record,
    paired_bootstrap,
    probability_at,
    save_record,
)
from refseg_nb.evaluation.segmentation_metric import SegmentationMetric
from refseg_nb.models.registry import create_model


def toy_dataset(root, split="val"):
    refer = Refer(root, "toy", "unc")
    return RISDataset(refer, split, vocabulary_for(refer), image_size=32, target_size=16)


def toy_model(dataset, seed=0):
    torch.manual_seed(seed)
    model = create_model("shnet", "refshapes", vocab_size=len(dataset.vocabulary), **SMALL, prior=0.3)
    with torch.no_grad():  # an untrained model that answers with uneven masks
        for p in model.decoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy(toy_root):
    return toy_dataset(toy_root)


@pytest.fixture(scope="module")
def model(toy):
    return toy_model(toy)


def one_by_one(model, dataset, threshold=0.5):
    """The protocol written out: one sentence at a time, nothing shared, nothing batched."""
    rows = {}
    for sample in dataset.samples:
        words = torch.tensor([dataset.vocabulary.encode(sample.text, dataset.max_words)])
        logits = model(dataset.image(sample.image_id)[None], words)[0]
        h, w = dataset.original_mask(sample).shape
        p = torch.nn.functional.interpolate(
            torch.sigmoid(logits)[None, None], (h, w), mode="bilinear", align_corners=False
        )[0, 0]
        pred, true = (p > threshold).detach().numpy(), dataset.original_mask(sample)
        rows[sample.ref_id, sample.sent_id] = int((pred & true).sum()), int((pred | true).sum())
    return rows


def test_evaluate_is_the_protocol(model, toy):
    record = evaluate(model, toy, images_per_batch=3, expressions_per_step=4, resamples=50)
    expected = one_by_one(model, toy)
    a = record.arrays
    got = {(r, s): (i, u) for r, s, i, u in zip(a["ref_id"], a["sent_id"], a["intersection"], a["union"])}
    assert len(got) == len(toy.samples) == record.metrics["samples"] and got.keys() == expected.keys()
    assert sum(abs(got[k][0] - expected[k][0]) + abs(got[k][1] - expected[k][1]) for k in got) <= 2, (
        "batching moved more than a pixel at the threshold"
    )
    assert len({u for _, u in got.values()}) > 3, (
        "the untrained model answers all the same: this test would see nothing"
    )
    metric = SegmentationMetric()
    metric.update_counts(a["intersection"], a["union"])
    for name, value in metric.compute().items():
        assert record.metrics[name]["value"] == pytest.approx(value)
    assert (
        record.protocol["resolution"] == "original"
        and record.protocol["sentences"] == "all"
        and record.protocol["threshold"] == 0.5
    )
    assert record.groups["kind"].keys() == {"attribute", "relation"}
    assert (
        sum(g["samples"] for g in record.groups["area"].values())
        == sum(g["samples"] for g in record.groups["words"].values())
        == len(got)
    )


def test_probability_then_resize_then_threshold():
    logits = torch.tensor([[[9.0, -1.0], [-1.0, -1.0]]])
    p = probability_at(logits, (4, 4))
    assert torch.allclose(p[0, 0, 0], torch.tensor(9.0).sigmoid()) and 0 < p.min() and p.max() < 1
    other = torch.nn.functional.interpolate(logits[None], (4, 4), mode="bilinear")[0].sigmoid()
    assert (p > 0.5).sum() < (other > 0.5).sum(), (
        "the order matters: resized logits would spread a confident pixel"
    )


def test_record_round_trip_and_size(tmp_path, model, toy):
    record = evaluate(model, toy, name="a", seeds={"training": 3}, resamples=50)
    path = save_record(record, tmp_path / "x" / "a.json")
    back = load_record(path)
    assert back.arrays.keys() == record.arrays.keys()
    for k, v in record.arrays.items():
        assert np.array_equal(back.arrays[k], v), k
    assert back.metrics["overall_iou"]["value"] == pytest.approx(
        record.metrics["overall_iou"]["value"], rel=1e-6
    )
    assert back.seeds == {"evaluation": 0, "training": 3} and back.config["grid"] == 4
    text = path.read_text()
    assert str(tmp_path) not in text and os.uname().nodename not in text and "NaN" not in text
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    with pytest.raises(FileNotFoundError, match="no record"):
        load_record(tmp_path / "none.json")


def fake_record(n_images=1000, per_image=5, quality=0.6, seed=0, name="fake", noise=0.2):
    """Samples whose IoU has a part that the expressions of an image share."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(n_images), per_image)
    difficulty = np.repeat(rng.normal(0, 0.2, n_images), per_image)
    area = rng.integers(50, 2000, len(image))
    own = np.random.default_rng(seed + 1)
    iou = np.clip(quality + difficulty + own.normal(0, noise, len(image)), 0, 1)
    union = (area * own.uniform(1, 1.3, len(image))).astype(np.int64)
    kinds = np.array(["attribute", "superlative", "relation", "composition"])[np.arange(len(image)) % 4]
    arrays = {
        "sent_id": np.arange(len(image)) + 10**6,
        "ref_id": np.arange(len(image)) // 2,
        "image_id": image,
        "kind": kinds,
        "words": 2 + np.arange(len(image)) % 11,
        "area": area,
        "pixels": np.full(len(image), 9216),
        "intersection": (iou * union).astype(np.int64),
        "union": union,
    }
    return make_record(name, arrays, resamples=200)


def test_five_thousand_samples_fit_in_100_kb(tmp_path):
    path = save_record(fake_record(), tmp_path / "big.json")
    assert path.with_suffix(".npz").stat().st_size + path.stat().st_size < 100_000


def test_an_old_record_is_never_half_replaced(tmp_path):
    path = save_record(fake_record(20), tmp_path / "r.json")
    save_record(fake_record(30), path)
    assert len(load_record(path).arrays["union"]) == 150 and sorted(p.name for p in tmp_path.iterdir()) == [
        "r.json",
        "r.npz",
    ]


# --- intervals


def test_bootstrap_of_a_mean_against_its_closed_form():
    """Clusters of one size: the standard error of a mean of cluster means is known."""
    r = fake_record(400, 5)
    I, U, image = r.arrays["intersection"], r.arrays["union"], r.arrays["image_id"]
    got = bootstrap(I, U, image, resamples=2000)["all"]["mean_iou"]
    means = 100 * (I / U).reshape(400, 5).mean(1)
    half = 1.96 * means.std() / np.sqrt(400)
    assert got["high"] - got["low"] == pytest.approx(2 * half, rel=0.08)
    iid = bootstrap(I, U, None, resamples=2000)["all"]["mean_iou"]
    assert iid["high"] - iid["low"] < 0.8 * (got["high"] - got["low"]), (
        "expressions of one image are not independent: drawing them so is too sure"
    )


def test_bootstrap_against_a_loop():
    r = fake_record(30, 3)
    I, U, image = r.arrays["intersection"], r.arrays["union"], r.arrays["image_id"]
    rng, values = np.random.default_rng(0), []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(image == i) for i in rng.integers(30, size=30)])
        values.append(100 * I[rows].sum() / U[rows].sum())
    low, high = np.quantile(values, [0.025, 0.975])
    got = bootstrap(I, U, image, resamples=300, seed=0)["all"]["overall_iou"]
    assert (got["low"], got["high"]) == pytest.approx((low, high), abs=1e-9)


def test_coverage_of_the_interval():
    """Of 200 samples from a known population, about 95 % of the intervals hold the true overall IoU."""
    rng, hits = np.random.default_rng(3), 0
    for trial in range(200):
        hard = np.repeat(rng.beta(4, 2, 80), 4)
        union = rng.integers(100, 1000, 320)
        inter = rng.binomial(union, hard)
        got = bootstrap(inter, union, np.repeat(np.arange(80), 4), resamples=400, seed=trial)["all"][
            "overall_iou"
        ]
        hits += got["low"] <= 100 * 4 / 6 <= got["high"]
    assert 180 <= hits <= 199, f"{hits} of 200 intervals hold the truth"


def test_paired_bootstrap():
    a, b = fake_record(300, quality=0.60, seed=0), fake_record(300, quality=0.63, seed=0)
    pair = paired_bootstrap(a, b)
    own = a.metrics["mean_iou"]
    d = pair["mean_iou"]
    assert d["low"] > 0 and d["low"] <= d["difference"] <= d["high"] and d["p"] < 0.01
    assert d["high"] - d["low"] < 0.5 * (own["high"] - own["low"]), "what both share must cancel"
    same = paired_bootstrap(a, a)
    assert all(v["difference"] == v["low"] == v["high"] == 0 and v["p"] == 1 for v in same.values())
    turned = paired_bootstrap(b, a)["mean_iou"]
    assert (turned["low"], turned["high"]) == pytest.approx((-d["high"], -d["low"]))


def test_paired_bootstrap_over_seeds():
    a, b = ([fake_record(100, quality=q, seed=s) for s in (1, 2, 3)] for q in (0.60, 0.64))
    d = paired_bootstrap(a, b)["overall_iou"]
    value = lambda r: r.metrics["overall_iou"]["value"]
    assert d["a"] == pytest.approx(np.mean([value(r) for r in a])) and d["b"] == pytest.approx(
        np.mean([value(r) for r in b])
    )
    assert d["by_seed"] == pytest.approx([value(y) - value(x) for x, y in zip(a, b)])
    assert paired_bootstrap(a, b[:2])["overall_iou"]["by_seed"] is None


def test_coverage_of_the_paired_interval():
    rng, hits = np.random.default_rng(5), 0
    for trial in range(150):
        hard = np.repeat(rng.uniform(0.3, 0.7, 60), 4)
        union = rng.integers(100, 1000, 240)
        records = [
            Record(
                "x",
                {},
                arrays={
                    "ref_id": np.arange(240),
                    "sent_id": np.arange(240),
                    "image_id": np.repeat(np.arange(60), 4),
                    "union": union,
                    "intersection": rng.binomial(union, np.clip(hard + gain + rng.normal(0, 0.1, 240), 0, 1)),
                },
            )
            for gain in (0, 0.05)
        ]
        d = paired_bootstrap(*records, resamples=300, seed=trial)["overall_iou"]
        hits += d["low"] <= 5 <= d["high"]
    assert 134 <= hits <= 149, f"{hits} of 150"


def test_records_of_other_samples_are_not_compared():
    a, b = fake_record(20), fake_record(21)
    with pytest.raises(ValueError, match="different samples"):
        paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap([], b)
    shuffled = fake_record(20)
    order = np.random.default_rng(0).permutation(100)
    shuffled.arrays = {k: v[order] for k, v in shuffled.arrays.items()}
    assert paired_bootstrap(a, shuffled)["mean_iou"]["difference"] == 0, (
        "the order of the samples must not matter"
    )
    del b.arrays["ref_id"]
    with pytest.raises(ValueError, match="per-sample"):
        paired_bootstrap(b, b)


def test_resampling_is_fast():
    start = time.perf_counter()
    fake_record(1500, 7)
    assert time.perf_counter() - start < 10


# --- controls


def test_shuffled_texts_come_from_other_images(toy):
    members = [[toy.samples[i] for i in rows] for _, rows in toy.groups]
    for seed in range(5):
        texts = controlled_texts(members, "shuffled", seed)
        assert sorted(t for g in texts for t in g) == sorted(s.text for s in toy.samples), (
            "the same texts, each once"
        )
    marked = [[type("S", (), {"ann_id": (g, i), "text": f"{g}"}) for i in range(1 + g % 3)] for g in range(9)]
    for seed in range(20):
        for g, group in enumerate(controlled_texts(marked, "shuffled", seed)):
            assert all(t != str(g) for t in group)


def test_other_texts_mean_another_object(toy):
    members = [[toy.samples[i] for i in rows] for _, rows in toy.groups]
    for group, texts in zip(members, controlled_texts(members, "other", 1)):
        for sample, text in zip(group, texts):
            assert text is not None and text in {s.text for s in group if s.ann_id != sample.ann_id}
            assert text not in {s.text for s in group if s.ann_id == sample.ann_id}


def test_a_sample_without_another_object_is_left_out():
    alone = [[type("S", (), {"ann_id": 1, "text": t}) for t in ("a", "b")]]
    assert controlled_texts(alone, "other") == [[None, None]]
    with pytest.raises(ValueError, match="text_control"):
        controlled_texts(alone, "blind")


def test_controls_reach_the_model(model, toy):
    seen = []

    class Spy(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def encode(self, images):
            seen.append(images)
            return images

        def segment(self, features, words, index):
            return torch.full((len(words), 4, 4), -5.0) + 10 * (words == UNK).all(1)[:, None, None]

    record = evaluate(Spy(), toy, text_control="none", image_control="none", resamples=20)
    assert all((i == 127).all() for i in seen)
    a = record.arrays
    assert (a["intersection"] == a["area"]).all() and (a["union"] == a["pixels"]).all(), (
        "every text was one unknown word, so everything was marked"
    )
    assert record.protocol["text_control"] == record.protocol["image_control"] == "none"
    assert evaluate(Spy(), toy, resamples=20).metrics["overall_iou"]["value"] == 0
    with pytest.raises(ValueError, match="image_control"):
        evaluate(Spy(), toy, image_control="grey")
    with pytest.raises(ValueError, match="threshold"):
        evaluate(Spy(), toy, threshold=0)


def test_limit_is_a_subset(model, toy):
    whole, part = evaluate(model, toy, resamples=20), evaluate(model, toy, limit=3, resamples=20)
    counts = lambda r: {
        (int(a), int(b)): (int(i), int(u))
        for a, b, i, u in zip(*(r.arrays[k] for k in ("ref_id", "sent_id", "intersection", "union")))
    }
    assert counts(part).items() <= counts(whole).items() and part.protocol["images"] == 3


# --- several processes


def shard(rank, world, root, folder):
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    dataset = toy_dataset(root)
    record = evaluate(toy_model(dataset), dataset, images_per_batch=2, resamples=50, name=f"world{world}")
    mine = Evaluator(dataset, rank=rank, world=world)
    rows = mine.run(toy_model(dataset))
    metric = SegmentationMetric()
    metric.update_counts(rows["intersection"], rows["union"])
    together = metric.compute()
    twice = gather_rows({k: np.concatenate([v, v]) for k, v in rows.items()})  # every row handed in twice
    assert len(twice["index"]) == len(dataset.samples)
    save_record(record, f"{folder}/world{world}-{rank}.json")
    with open(f"{folder}/metric{world}-{rank}.json", "w") as file:
        json.dump({"metric": together, "own": len(rows["index"])}, file)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_score_as_one(toy_root, tmp_path):
    """Seven images for two processes: uneven shards, nothing counted twice, the same numbers to the last
    bit."""
    context = torch.multiprocessing.get_context("forkserver")
    # imported once, for all processes of the tests
    context.set_forkserver_preload(["accelerate", "refseg_nb.training.learner"])
    processes = [context.Process(target=shard, args=(rank, 2, toy_root, str(tmp_path))) for rank in range(2)]
    for p in processes:
        p.start()
    shard(0, 1, toy_root, str(tmp_path))
    for p in processes:
        p.join(200)
    assert [p.exitcode for p in processes] == [0, 0]
    one, *two = (load_record(tmp_path / f"world{w}-{r}.json") for w, r in ((1, 0), (2, 0), (2, 1)))
    for record in two:
        assert record.metrics == one.metrics and record.groups == one.groups
        assert all(np.array_equal(record.arrays[k], one.arrays[k]) for k in one.arrays)
    metric, *parts = (
        json.loads((tmp_path / f"metric{w}-{r}.json").read_text()) for w, r in ((1, 0), (2, 0), (2, 1))
    )
    assert metric["metric"] == parts[0]["metric"] == parts[1]["metric"]
    assert parts[0]["own"] != parts[1]["own"] and parts[0]["own"] + parts[1]["own"] == metric["own"]
