"""The systems beside SHNet under the same roof: created, trained, stopped, stored, loaded and asked by the
same commands."""

import json

import pytest
import torch

import refseg_nb
from refseg_nb.data.refer import Refer
from refseg_nb.models.hub import load_model
from refseg_nb.models.registry import create_from_config, create_model, registered
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import train

pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["cmpc", "lavt", "crossvlt"])
def test_parts_and_recipes(name):
    kind = registered(name).model
    assert set(kind.presets) == set(kind.recipes) and "refshapes" in kind.presets
    model = create_model(name, "refshapes", vocab_size=30)
    again = create_from_config(name, model.config.to_dict(), 30)
    assert type(model) is kind and {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    groups = model.parameter_groups(0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    ), "each trained parameter once"
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}


def test_unknown_names():
    with pytest.raises(ValueError, match="no model called 'brain'; there are shnet, .*cmpc, lavt, crossvlt"):
        TrainConfig(model="brain")
    with pytest.raises(ValueError, match="no model called 'brain'"):
        create_model("brain")
    with pytest.raises(
        ValueError, match="cmpc has no preset called 'released'; there are published, refshapes"
    ):
        TrainConfig(model="cmpc", preset="released")


def settings(name, root, out, **more):
    return TrainConfig(
        model=name,
        root=str(root),
        out=str(out),
        epochs=1,
        images_per_batch=2,
        expressions_per_image=2,
        limit=8,
        val_split=None,
        quiet=True,
        device="cpu",
        threads=1,
        **more,
    )


@pytest.mark.parametrize("name", ["cmpc", "lavt", "crossvlt"])
def test_trained_stopped_resumed_loaded_and_asked(name, tiny_root, tmp_path):
    """Four steps at once, and two and two: the same weights bit for bit; the stored model answers as the
    trained one, with its attention."""
    whole = train(settings(name, tiny_root, tmp_path / "whole", checkpoint_every=2))
    assert whole.steps == 4
    (tmp_path / "parts").mkdir()
    import shutil

    shutil.copytree(
        tmp_path / "whole" / "checkpoint" / "step-00000002",
        tmp_path / "parts" / "checkpoint" / "step-00000002",
    )
    resumed = train(settings(name, tiny_root, tmp_path / "parts", checkpoint_every=2))
    assert resumed.resumed_from == 2
    for (k, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), k
    model, vocabulary, meta = load_model(tmp_path / "whole" / "model")
    assert meta["model"] == name and type(model) is registered(name).model
    for (k, a), b in zip(whole.model.state_dict().items(), model.state_dict().values()):
        assert torch.equal(a, b), k
    refer = Refer(tiny_root, "refshapes")
    sample = next(iter(refer.samples("val")))
    answer = (
        refseg_nb.load(tmp_path / "whole")
        .encode(refer.load_image(sample.image_id))
        .segment(sample.text, return_attention=True)
    )
    assert answer.mask.shape == (96, 96) and answer.attention is not None
    stored = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert stored["model"] == name and str(tmp_path) not in json.dumps(stored)


def test_several_losses_are_summed(tiny_root, tmp_path):
    "The learner's loss of CrossVLT's first step is the model's own: its masks' and its alignment's."
    from refseg_nb.training.learner import Learner, Objective

    learner = Learner(settings("crossvlt", tiny_root, tmp_path / "x"))
    batch = next(learner.data.batches(0))
    model = learner.model.eval()
    objective = Objective(model)
    with torch.no_grad():
        got = objective(batch.images, None, batch.words, batch.image_index, batch.targets)
        parts = model.losses(
            model.encode(batch.images), batch.words, batch.image_index, batch.targets, objective.compare
        )
    assert set(parts) == {"mask", "alignment"} and torch.isclose(got, sum(parts.values()))
