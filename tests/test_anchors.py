"""Anchors as a second answer in training: their masks in a batch, the loss of the anchor head, a run with it."""

import json
import math

import numpy as np
import pytest
import torch

from refseg_nb.data.refer import Refer
from refseg_nb.data.words import vocabulary_for
from refseg_nb.models.registry import create_model
from refseg_nb.refshapes.anchors import anchors_of
from refseg_nb.refshapes.dataset import tiny_data
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import TargetDataset, train

SMALL = {"grid": 6, "channels": 16, "word_dim": 8, "sfm_ffn": 16, "decoder_widths": (8, 8, 8)}


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


@pytest.mark.parametrize("row", ["shnet", "baseline"])
def test_loss_of_the_head_is_its_definition(row):
    "Mean over all phrases; 0 for those without an anchor; over the three levels and all positions otherwise."
    torch.manual_seed(0)
    model = create_model(row, vocab_size=9, preset="refshapes", anchor_layer=1, **SMALL)
    states, anchors = torch.randn(9, 36, 16), torch.rand(3, 12, 12)
    anchors[1] = math.nan
    expected = 0.0
    for level in range(3):
        for b in (0, 2):
            for n in range(36):
                y, x = divmod(n, 6)
                share = float(anchors[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean())
                p = torch.sigmoid(model.anchor(states[3 * level + b, n]))[0].item()
                expected -= (share * math.log(p) + (1 - share) * math.log(1 - p)) / (3 * 36 * 3)
    assert float(model.anchor_loss(states, anchors).detach()) == pytest.approx(expected, rel=1e-4)
    nothing = model.anchor_loss(states, torch.full((3, 12, 12), math.nan))
    nothing.backward()
    assert nothing == 0 and not model.anchor.weight.grad.any(), (
        "no anchor, no loss and no gradient, and not NaN"
    )


@pytest.mark.parametrize("row", ["shnet", "baseline"])
def test_head_reads_the_layer_that_it_is_given(row):
    torch.manual_seed(1)
    model = create_model(row, vocab_size=9, preset="refshapes", anchor_layer=1, **SMALL).eval()
    images, words = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), torch.randint(1, 9, (2, 4))
    features, targets, anchors = model.encode(images), torch.rand(2, 24, 24), torch.rand(2, 24, 24)
    seen = []
    if row == "shnet":
        model.sfm[0].layers[0].register_forward_hook(lambda _, inputs, out: seen.append(out[0][:, :36]))
    else:
        model.fusion.register_forward_hook(
            lambda _, inputs, out: seen.append(torch.cat(out).flatten(2).transpose(1, 2))
        )
    losses = model.losses(features, words, None, targets, anchors=anchors)
    assert torch.allclose(losses["anchor"], model.anchor_loss(seen[0], anchors))
    assert torch.equal(losses["mask"], model.losses(features, words, None, targets)["mask"])


def config(out, **changes):
    values = dict(
        root=tiny_data(),
        out=out,
        images_per_batch=4,
        max_steps=6,
        overrides=SMALL | {"anchor_layer": 1},
        anchor_weight=0.5,
        device="cpu",
        quiet=True,
        val_split=None,
    )
    return TrainConfig(**values | changes)


def logged(folder):
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_run_with_anchors(tmp_path):
    "The weight scales the second loss and nothing else, and what is stored answers as before."
    runs = {w: train(config(tmp_path / str(w), anchor_weight=w, max_steps=1)) for w in (0.0, 0.5, 1.0)}
    assert runs[1.0].steps == 1
    none, half, whole = (logged(tmp_path / str(w))[0] for w in runs)
    assert half - none == pytest.approx((whole - none) / 2, rel=1e-2) and whole > none
    head = runs[0.5].model.anchor.weight
    assert not torch.equal(head, runs[0.0].model.anchor.weight)


def test_what_cannot_be_trained_is_said(tmp_path):
    with pytest.raises(ValueError, match="baseline has no anchor head.*anchor_layer"):
        train(config(tmp_path / "a", model="baseline", overrides=SMALL))
    with pytest.raises(ValueError, match="anchor_weight must not be negative"):
        config(tmp_path / "b", anchor_weight=-1.0)
    with pytest.raises(ValueError, match="anchor_layer must be 1 to 2"):
        create_model("shnet", vocab_size=9, preset="refshapes", anchor_layer=3)
    with pytest.raises(ValueError, match="sfm_shared"):
        create_model("shnet", vocab_size=9, preset="refshapes", anchor_layer=1, sfm_shared=False)
