"The contract of models: one of one's own in one file, and nobody above asks which model it holds."

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import refseg_nb
from refseg_nb.attention.explorer import Explorer
from refseg_nb.data.batches import RISDataset
from refseg_nb.data.referit import open_data
from refseg_nb.errors import InputError
from refseg_nb.evaluation.evaluator import evaluate
from refseg_nb.models.backbones import create_backbone
from refseg_nb.models.base import AttentionBlock, ModelAttention, ModelConfig, Recipe, RISModel, image_rows
from refseg_nb.models.registry import create_model, list_models, model_config, register_model, registered
from refseg_nb.refshapes.dataset import tiny_data
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import train

PACKAGE = Path(refseg_nb.__file__).parent


# ---- a model of one's own: the whole file


class Looks(ModelAttention):
    def __init__(self, weights, grid):
        self.weights, self.grid = weights, grid  # [B, heads, words, pixels]

    def expression(self, row, words=None):
        return Looks(self.weights[row : row + 1, :, :words], self.grid)

    def blocks(self):
        return {1: AttentionBlock([self.weights], self.grid, "words", "pixels")}


@register_model("word-product", "Word product")
class WordProduct(RISModel):
    presets = {"refshapes": ModelConfig(image_size=48)}
    recipes = {"refshapes": Recipe(batch_size=4, lr=1e-3)}

    def __init__(self, config, vocab_size, vectors=None, backbone=None):
        super().__init__(config, vocab_size)
        self.backbone = backbone or create_backbone(config.backbone, config.backbone_weights)
        self.words = nn.Embedding(vocab_size, self.backbone.channels[0], padding_idx=0)

    def segment(self, features, words, image_index=None, return_attention=False):
        rows = image_rows(len(features[0]), len(words), image_index, words.device)
        level = features[0] if rows is None else features[0][rows]
        scores = torch.einsum("bchw,btc->bthw", level, self.words(words))
        weights = scores.flatten(2).softmax(2)[:, None]
        logits = scores.mean(1)
        return (logits, Looks(weights, tuple(level.shape[2:]))) if return_attention else logits


# ---- what is done with it


def test_trained_evaluated_stored_loaded_and_explored(tmp_path):
    settings = dict(data="refshapes", root=tiny_data(), limit=6, max_steps=2, eval_limit=2, quiet=True)
    result = train(TrainConfig(model="word-product", out=tmp_path / "run", threads=1, **settings))
    assert result.steps == 2 and type(result.model) is WordProduct
    segmenter = refseg_nb.load(tmp_path / "run")
    for (name, a), b in zip(result.model.state_dict().items(), segmenter.model.state_dict().values()):
        assert torch.equal(a, b), name
    data = RISDataset(open_data(tiny_data(), "refshapes"), "val", segmenter.vocabulary, image_size=48)
    record = evaluate(segmenter.model, data, limit=2)
    assert record.metrics["samples"] > 0
    sample = data.samples[0]
    explorer = Explorer(segmenter, data.refer.load_image(sample.image_id), sample.text)
    assert "word" in explorer.to_html(tmp_path / "page.html")


def test_names_and_presets():
    assert "word-product" in list_models() and registered("word-product").title == "Word product"
    assert model_config("only-sfm").use_hcam is False and model_config("shnet", grid=6).grid == 6
    with pytest.raises(InputError, match="no model called 'nothing'; there are shnet, .*word-product"):
        create_model("nothing")
    with pytest.raises(InputError, match="no preset called 'paper'; there are refshapes"):
        create_model("word-product", "paper", vocab_size=3)
    with pytest.raises(InputError, match="is taken by SHNet"):
        register_model("shnet")(WordProduct)


@pytest.mark.parametrize("name", ["shnet", "cmpc", "lavt", "crossvlt", "word-product"])
def test_a_configuration_is_checked_once_and_survives_json(name):
    config = model_config(name)
    assert type(config).from_dict(config.to_dict()) == config
    for field, value in (("image_size", "large"), ("image_size", -1), ("max_words", 0), ("backbone", 3)):
        with pytest.raises(InputError, match=field):
            model_config(name, **{field: value})
    with pytest.raises(InputError, match="has no field 'image_sise'; did you mean 'image_size'"):
        model_config(name, image_sise=96)


def test_nobody_outside_asks_which_model_it_is():
    "Not by `hasattr` or `getattr` on a model, not by its name, and not by importing a module by its name."
    asks = re.compile(
        r"hasattr\((?:\w+\.)*model\b|getattr\((?:\w+\.)*(?:model|config|recipe)\b|\.model\s*[!=]=\s*[\"']"
        r"|isinstance\((?:\w+\.)*model\b"
    )
    by_name = re.compile(r"\bimport_module\(")
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "_modidx.py" or name.startswith("course/"):
            continue
        text = path.read_text()
        if not name.startswith("models/"):
            assert not asks.search(text), (name, asks.search(text)[0])
        if name not in ("models/registry.py", "errors.py"):  # errors: optional packages
            assert not by_name.search(text), name
