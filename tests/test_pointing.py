"""Pointing before drawing: the anchors' masks in a batch, the losses of the pointer, a run that begins with it."""

import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch

from refseg_nb.data.refer import Refer
from refseg_nb.data.words import vocabulary_for
from refseg_nb.models.registry import create_model
from refseg_nb.models.shnet import BEHIND_SFM, SHNet, SHNetConfig
from refseg_nb.refshapes.anchors import anchors_of, candidates_of
from refseg_nb.refshapes.dataset import tiny_data
from refseg_nb.training.checkpoint import CheckpointError
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import Run, TargetDataset, read_history, train

SMALL = {"grid": 6, "channels": 16, "word_dim": 8, "sfm_ffn": 16, "decoder_widths": (8, 8, 8)}
ROWS = pytest.mark.parametrize("row", ["shnet", "baseline"])


@pytest.fixture(scope="module")
def refer():
    return Refer(tiny_data(), "refshapes")


def test_batch_has_the_masks_of_the_anchors(refer):
    data = TargetDataset(refer, "val", vocabulary_for(refer), 96, 24, anchors=True)
    batch = data[[(0, data.groups[0][1]), (1, data.groups[1][1])]]
    assert batch.anchors.shape == batch.targets.shape
    kinds = set()
    for sample, found in zip(batch.samples, batch.anchors):
        ids = anchors_of(refer, sample)
        kinds.add(bool(ids))
        if not ids:
            assert found.isnan().all()
            continue
        cells = [refer.mask(i).reshape(24, 4, 24, 4).mean((1, 3)) for i in ids]
        assert np.allclose(found, np.max(cells, axis=0), atol=1e-3)
    assert kinds == {True, False}
    assert TargetDataset(refer, "val", vocabulary_for(refer), 96, 24)[[(0, [0])]].anchors is None


def test_candidates_are_what_the_first_noun_names(refer):
    "Judged by the attributes in the annotations, and not by the world that runs programs."
    several = 0
    for sample in refer.samples("val"):
        head = re.match(
            r"\w+\((?:(?:left|right|top|bottom|biggest|smallest), )?(?:\d, )?([\w.]+)",
            sample.sentence.program,
        )
        noun, *more = head[1].split(".")
        if noun in ("any", "thing", "person", "animal") or {"big", "small"} & set(more):
            continue
        true = set()
        for a in refer.annotations_of(sample.image_id):
            said = {refer.categories[a["category_id"]], *map(str, a["attributes"].values())}
            if {noun, *more} <= said:
                true.add(a["id"])
        assert candidates_of(refer, sample) == true, sample.sentence.program
        several += len(true) > 1
    assert several > 20


def pointers(row, **changes):
    torch.manual_seed(0)
    changes = SMALL | {"pointer": True} | changes
    model = create_model(row, vocab_size=9, preset="refshapes", **changes).eval()
    scene, words = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), torch.randint(1, 9, (3, 4))
    return model, model.encode(scene), words, torch.tensor([0, 1, 1])


@ROWS
def test_losses_are_their_definition(row):
    "Cross-entropy of a softmax over positions, mean over all expressions, 0 for the anchor of one without."
    model, features, words, index = pointers(row)
    targets, anchors = torch.rand(3, 12, 12), torch.rand(3, 12, 12)
    anchors[1] = math.nan
    for turn in (0, 1, 5):
        losses = model.pointing_losses(features, words, index, targets, anchors, turn)
        for name, logits, masks in zip(
            ("referent", "anchor"), model.pointing(features, words, index, turn % 3), (targets, anchors)
        ):
            expected = 0.0
            for b in range(3):
                if masks[b].isnan().any():
                    continue
                cells = [
                    float(masks[b, 2 * (n // 6) : 2 * (n // 6) + 2, 2 * (n % 6) : 2 * (n % 6) + 2].sum())
                    for n in range(36)
                ]
                weights = [math.exp(v) for v in logits[b].tolist()]
                for cell, weight in zip(cells, weights):
                    expected -= cell / sum(cells) * math.log(weight / sum(weights)) / 3
            assert losses[name].item() == pytest.approx(expected, rel=1e-4)
    nothing = model.pointing_losses(features, words, index, targets, torch.full((3, 12, 12), math.nan))
    assert nothing["anchor"] == 0 and nothing["referent"] > 0


def test_pointer_reads_the_first_and_the_last_layer_of_one_level():
    model, features, words, index = pointers("shnet", sfm_layers=3)
    seen = []
    for layer in model.sfm[0].layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(out[0][:, :36]))
    for level in range(3):
        seen.clear()
        referent, anchor = model.pointing(features, words, index, level)
        assert len(seen) == 3 and torch.equal(anchor, model.pointer(seen[0])[..., 1])
        assert torch.allclose(referent, model.pointer(model.sfm[0].final(seen[2]))[..., 0], atol=1e-5)
        one = [torch.zeros_like(f) for f in features]
        one[level] = features[level]
        assert torch.equal(model.pointing(one, words, index, level)[0], referent), "the others are not read"


@ROWS
def test_each_objective_trains_what_it_reaches(row):
    model, features, words, index = pointers(row)
    model.train()
    model.prepare("pointing")
    features = model.adapt(model.backbone(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)))
    sum(
        model.pointing_losses(features, words, index, torch.rand(3, 12, 12), torch.rand(3, 12, 12)).values()
    ).backward()
    got = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert got == {"adapters", "text", "pointer", "sfm" if row == "shnet" else "fusion"}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    whole, *_ = pointers(row)
    whole.backbone.freeze(False)
    whole.prepare("pointing")
    assert all(p.requires_grad for p in whole.backbone.parameters()), "train_backbone=True is not undone"
    other, *_ = pointers(row)
    other.prepare("mask")
    assert {
        n for n, p in other.named_parameters() if not p.requires_grad and not n.startswith("backbone")
    } == {
        "pointer.weight",
        "pointer.bias",
    }


def config(out, **changes):
    values = dict(
        root=tiny_data(),
        out=out,
        images_per_batch=4,
        max_steps=6,
        overrides=SMALL | {"pointer": True},
        objective="pointing",
        device="cpu",
        quiet=True,
    )
    return TrainConfig(**values | changes)


@ROWS
def test_a_run_begins_with_pointing_and_goes_on_with_masks(tmp_path, row):
    first = train(config(tmp_path / "a", model=row))
    assert first.best is None and first.config.val_split is None, "no mask, nothing to evaluate"
    again = train(config(tmp_path / "b", model=row, max_steps=3))
    again = train(config(tmp_path / "b", model=row, max_steps=3), resume=True)
    assert again.steps == 3
    second = train(
        config(tmp_path / "c", model=row, objective="mask", start=str(tmp_path / "a" / "model"), max_steps=1)
    )
    assert second.best["overall_iou"] >= 0
    before, after = first.model.state_dict(), second.model.state_dict()
    assert torch.equal(before["pointer.weight"], after["pointer.weight"]), "not trained any more"
    same = [k for k in before if k.startswith("text") and torch.equal(before[k], after[k])]
    moved = max(float((before[k] - after[k]).abs().max()) for k in before if k.startswith("text"))
    assert not same or moved < 0.05, "it began where the first run ended"


def test_another_row_begins_with_what_pointing_trained(tmp_path):
    "Text, adapters, SFM and pointer are taken over to the last bit; what is behind begins as without `start`."
    first = train(config(tmp_path / "first")).model.state_dict()
    parts = SHNet.pointing_parts
    begun, fresh = (
        Run(
            config(tmp_path / str(n), objective="mask", model="only-sfm", start=start)
        ).learner.model.state_dict()
        for n, start in enumerate((str(tmp_path / "first" / "model"), None))
    )
    assert {name.split(".")[0] for name in begun} == {*parts, "levels", "aspp", "decoder"} - {"fusion"}
    for name, value in begun.items():
        assert torch.equal(value, (first if name.split(".")[0] in parts else fresh)[name]), name
    with pytest.raises(CheckpointError, match="does not fit"):
        Run(
            config(
                tmp_path / "other",
                objective="mask",
                start=str(tmp_path / "first" / "model"),
                overrides=SMALL | {"pointer": True, "sfm_layers": 1},
            )
        )


def test_a_finer_grid_takes_over_what_a_coarser_one_learned(tmp_path):
    "All weights as they are, and each relative bias read off the coarse table by hand, on the image."
    biased = SMALL | {"pointer": True, "sfm_relative": True}
    first = train(config(tmp_path / "first", overrides=biased, lr=0.05)).model.state_dict()
    changes = {
        "objective": "mask",
        "overrides": biased | {"grid": 8},
        "start": str(tmp_path / "first" / "model"),
    }
    begun = Run(config(tmp_path / "second", **changes)).learner.model.state_dict()
    seen = 0
    for name, value in begun.items():
        if name.split(".")[0] not in SHNet.pointing_parts:
            continue
        if not name.endswith("relative"):
            assert torch.equal(value, first[name]), name
            continue
        old, new = first[name].view(2, 11, 11).numpy(), value.view(2, 15, 15).numpy()
        for dy, dx in ((0, 0), (1, 0), (-3, 2), (7, -7), (4, 5), (-2, -6)):
            y, x = (min(max(6 * d / 8, -5), 5) + 5 for d in (dy, dx))  # offsets in coarse cells, as indices
            j, i = min(int(y), 9), min(int(x), 9)
            corners = old[:, j : j + 2, i : i + 2]
            by_hand = np.einsum("hyx,y,x->h", corners, [1 - y + j, y - j], [1 - x + i, x - i])
            assert np.allclose(new[:, dy + 7, dx + 7], by_hand, atol=1e-5), (name, dy, dx)
            seen += 1
    assert seen == 12 and float(np.ptp(old)) > 0.01


def test_fields_behind_sfm_do_not_reach_what_points():
    "Every field that is said to be behind SFM leaves the pointer's answer as it is; the names are all there."
    base, features, words, index = pointers("shnet")
    there = {f.name for f in fields(SHNetConfig)}
    other = (
        {"use_hcam": False, "hcam_gates": "one", "hcam_norm": False, "hcam_dropout": 0.5}
        | {"level_fusion": "conv3d", "aspp_rates": (1,), "aspp_dropout": 0.5, "decoder_widths": (8, 8)}
        | {"decoder_doublings": 1, "decoder_dropout": 0.5, "align_corners": True, "prior": 0.5}
    )
    assert set(other) == {name for name in there if name.startswith(BEHIND_SFM)}
    for name, value in other.items():
        changed = pointers("shnet", **{name: value})[0]
        reached = {k: v for k, v in base.state_dict().items() if k.split(".")[0] in base.pointing_parts}
        changed.load_state_dict(changed.state_dict() | reached)
        for a, b in zip(changed.pointing(features, words, index), base.pointing(features, words, index)):
            assert torch.equal(a, b), name


def test_a_pointing_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    whole = train(config(tmp_path / "whole", checkpoint_every=2))
    stop = tmp_path / "stopped"

    class Stop(Exception): ...

    from refseg_nb.training import learner as module

    step = module.Learner.optimizer_step

    def until_four(self, batches):
        if self.step == 4:
            raise Stop
        return step(self, batches)

    module.Learner.optimizer_step = until_four
    try:
        with pytest.raises(Stop):
            train(config(stop, checkpoint_every=2))
    finally:
        module.Learner.optimizer_step = step
    resumed = train(config(stop, checkpoint_every=2))
    assert resumed.resumed_from == 4
    for k, v in whole.model.state_dict().items():
        assert torch.equal(v, resumed.model.state_dict()[k]), k
    loss = lambda folder: [row["loss"] for row in read_history(folder / "losses.jsonl")]
    assert loss(tmp_path / "whole") == loss(stop)


def test_what_cannot_point_says_so(tmp_path):
    with pytest.raises(ValueError, match="no pointer.*--set pointer=true"):
        train(config(tmp_path / "a", model="baseline", overrides=SMALL))
    with pytest.raises(ValueError, match="CMPC cannot point"):
        train(config(tmp_path / "b", model="cmpc", overrides={}))
    with pytest.raises(ValueError, match="objective must be one of"):
        config(tmp_path / "c", objective="points")
    with pytest.raises(ValueError, match="sfm_shared"):
        create_model("shnet", vocab_size=9, preset="refshapes", pointer=True, sfm_shared=False)


def test_scores_on_the_way_are_those_of_the_evaluation(tmp_path, refer):
    "By kind, every so many steps, and without an effect on the run."
    from refseg_nb.data.batches import RISDataset
    from refseg_nb.evaluation.evaluator import evaluate

    scored = train(config(tmp_path / "a", objective="mask", score_every=3, max_steps=6, eval_limit=5))
    plain = train(config(tmp_path / "b", objective="mask", max_steps=6, eval_limit=5))
    rows = read_history(tmp_path / "a" / "scores.jsonl")
    assert [row["step"] for row in rows] == [3, 6] and not (tmp_path / "b" / "scores.jsonl").read_text()
    for k, v in plain.model.state_dict().items():
        assert torch.equal(v, scored.model.state_dict()[k]), k
    data = RISDataset(refer, "val", scored.vocabulary, 96, target_size=None)
    data.groups = data.groups[:5]
    record = evaluate(scored.model, data, 0.5, name="x")
    assert rows[-1]["overall_iou"] == pytest.approx(record.metrics["overall_iou"]["value"], abs=1e-6)
    for kind, group in record.groups["kind"].items():
        assert rows[-1][f"overall_iou.{kind}"] == pytest.approx(group["overall_iou"]["value"], abs=1e-6)
    with pytest.raises(ValueError, match="score_every needs a val_split"):
        config(tmp_path / "c", objective="mask", score_every=3, val_split=None)
