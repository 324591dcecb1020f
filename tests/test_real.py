"""Training and evaluation on real RefCOCO files: the micro sets are overfitted, at original resolution."""

import pytest

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.evaluation.evaluator import evaluate
from refseg_nb.models.hub import load_model
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import train

OVERRIDES = {
    "image_size": 160,
    "grid": 10,
    "backbone_weights": "none",
    "sfm_dropout": 0.0,
    "aspp_dropout": 0.0,
}
RECIPES = {
    "refcoco": {"epochs": 150, "images_per_batch": 4},
    "refcoco+": {"epochs": 150, "images_per_batch": 4},
    "refcocog": {"epochs": 220, "images_per_batch": 4, "loss": "bce+dice"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_overfits_the_photographs(name, real_data, tmp_path):
    config = TrainConfig(
        **{
            "root": real_data,
            "data": name,
            "split_by": "micro",
            "val_split": None,
            "preset": "refshapes",
            "overrides": OVERRIDES,
            "lr": 2e-3,
            "device": "cpu",
            "threads": 1,
            "quiet": True,
            "out": tmp_path / "run",
            **RECIPES[name],
        }
    )
    result = train(config)
    model, vocabulary, meta = load_model(result.out / "model")  # what a user would load
    dataset = RISDataset(
        Refer(real_data, name, "micro"), "train", vocabulary, image_size=meta["image_size"], target_size=None
    )
    record = evaluate(model, dataset, name=name)
    assert record.metrics["samples"] == len(dataset.samples)
    assert record.metrics["overall_iou"]["value"] > 90, record
    shuffled = evaluate(model, dataset, text_control="other", resamples=50)
    assert shuffled.metrics["overall_iou"]["value"] < 60, "it learned the words, not just the pictures"
