"""What a user writes, in one script that a strict type checker must accept (`test_repository` runs it)."""

from pathlib import Path

import numpy as np
import torch

import refseg_nb
from refseg_nb.data import RISDataset, Vocabulary, vocabulary_for
from refseg_nb.evaluation import Record, compare, load_record, save_record
from refseg_nb.models import load_model, save_model
from refseg_nb.refshapes import render, sample_scene, tiny_data
from refseg_nb.training import TrainResult


def answers(image: Path | np.ndarray) -> list[float]:
    """An image is encoded once and asked several times."""
    segmenter: refseg_nb.Segmenter = refseg_nb.load("shnet-refshapes", device="cpu")
    scene = segmenter.encode(image)
    scores: list[float] = []
    for phrase in ("the red car", "the boat on the left"):
        answer: refseg_nb.Answer = scene.segment(phrase)
        mask: np.ndarray = answer.mask
        overlay: np.ndarray = answer.overlay()
        if answer.found and not answer.unknown_words and mask.shape == overlay.shape[:2]:
            scores.append(answer.score)
        print(answer.phrase, answer.message, answer.probability.max())
    scores += [a.score for a in scene.segment_all(["the house", "the tree"])]
    return [*scores, segmenter.segment(image, "the sun").score]


def a_model() -> torch.nn.Module:
    """A model by name and preset, with settings of its own."""
    print(refseg_nb.list_models())
    return refseg_nb.create_model("shnet", "refshapes", vocab_size=100, backbone_weights="none")


def a_run(out: Path) -> Record:
    """Train, store, evaluate, compare."""
    root = tiny_data()
    config = refseg_nb.TrainConfig(root=str(root), data="refshapes", out=str(out), max_steps=2, quiet=True)
    result: TrainResult = refseg_nb.train(config)
    print(result)
    refer = refseg_nb.open_data(root, "refshapes")
    vocabulary: Vocabulary = vocabulary_for(refer)
    dataset = RISDataset(refer, "val", vocabulary, image_size=96, target_size=None)
    model = a_model()
    save_model(out / "again", model, vocabulary)
    model, _, meta = load_model(out / "again")
    record: Record = refseg_nb.evaluate(model, dataset, threshold=0.5, name="again", resamples=10)
    path: Path = save_record(record, out / "again.json")
    print(compare(record, load_record(path)), meta["image_size"])
    return record


def main() -> None:
    """Errors that a user causes have one base."""
    print(answers(render(sample_scene(seed=0, index=3)).image))
    try:
        refseg_nb.load("no-such-model")
    except refseg_nb.RefsegError as error:
        print(error)
    record = a_run(Path("runs/public"))
    print(record.metrics["overall_iou"]["value"])


if __name__ == "__main__":
    main()
