"""Does the preset `photo` learn a handful of real phrases by heart, and what does one of its steps cost?

    python results/photos/overfit.py ROOT --data refcoco --split-by micro --out results/photos

ROOT is a folder in the REFER layout; the data set's split `train` is trained on and then scored, `val` is scored as
what was never seen. The extra `photos` must be installed. It writes DATA.json, the scores; with --only-step it
writes step.json instead, the seconds of one step of the whole preset at 320 px. No image and no phrase is stored, nor
any id of one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.evaluation.evaluator import evaluate
from refseg_nb.models.cost import count_flops
from refseg_nb.models.hub import load_model
from refseg_nb.models.registry import create_model
from refseg_nb.system import git_commit, machine, peak_memory, versions
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import train


def settings(root: Path, data: str, split_by: str, steps: int, channels: int, out: Path) -> TrainConfig:
    "The preset without dropout, whose purpose is the opposite of learning by heart; narrow, to be quick."
    changes = {
        "channels": channels,
        "sfm_ffn": channels,
        "decoder_widths": [channels // 2, channels // 4, channels // 8],
        "sfm_dropout": 0.0,
        "aspp_dropout": 0.0,
        "decoder_dropout": 0.0,
    }
    return TrainConfig(
        root=str(root),
        data=data,
        split_by=split_by,
        val_split=None,
        preset="photo",
        vectors="glove.6B.50d",
        overrides=changes,
        epochs=10**6,
        max_steps=steps,
        lr=2e-3,
        device="cpu",
        threads=1,
        quiet=True,
        out=str(out),
    )


def score(folder: Path, root: Path, data: str, split_by: str) -> dict:
    "Overall and mean IoU of the trained model at original size, with the words, with another object's, and unseen."
    model, vocabulary, meta = load_model(folder)
    found = {}
    for name, split, control in (
        ("train", "train", None),
        ("train, another object's words", "train", "other"),
        ("val", "val", None),
        ("val, without words", "val", "none"),
    ):
        dataset = RISDataset(
            Refer(root, data, split_by), split, vocabulary, image_size=meta["image_size"], target_size=None
        )
        metrics = evaluate(model, dataset, text_control=control, resamples=200, progress=False).metrics
        found[name] = {
            "overall_iou": round(metrics["overall_iou"]["value"], 2),
            "mean_iou": round(metrics["mean_iou"]["value"], 2),
            "expressions": metrics["samples"],
        }
    return found


def step_seconds(expressions: int = 64, images: int = 9, words: int = 8, repeats: int = 3) -> dict:
    "Processor seconds of the parts of one step of the preset on one thread: medians of several."
    torch.set_num_threads(1)
    model = create_model("shnet", "photo", vocab_size=10_000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    pictures = torch.randint(0, 256, (images, 3, 320, 320), dtype=torch.uint8)
    phrase = torch.randint(2, 10_000, (expressions, words))
    index = torch.arange(expressions) % images
    targets = torch.rand(expressions, model.output_size, model.output_size)
    taken = {"backbone, an image": [], "step, from cached features": [], "answer, a phrase": []}
    for _ in range(repeats):
        start = time.process_time()
        with torch.no_grad():
            levels = model.backbone(pictures)
        taken["backbone, an image"].append((time.process_time() - start) / images)
        model.train()
        start = time.process_time()
        sum(model.losses(model.adapt(levels), phrase, index, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken["step, from cached features"].append(time.process_time() - start)
        model.eval()
        start = time.process_time()
        with torch.no_grad():
            model.segment(model.adapt(levels[:1] and [v[:1] for v in levels]), phrase[:1])
        taken["answer, a phrase"].append(time.process_time() - start)
    medians = {name: sorted(values)[repeats // 2] for name, values in taken.items()}
    flops = count_flops(model.config, words)
    return {
        "expressions": expressions,
        "images": images,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "seconds an expression": round(medians["step, from cached features"] / expressions, 4),
        "GFLOP an expression, forward, behind the backbone": round(
            sum(v for name, v in flops.items() if name != "backbone"), 2
        ),
        "GFLOP an image, backbone": round(flops["backbone"], 2),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "feature numbers an image": sum(v[0].numel() for v in levels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--data", default="refcoco")
    parser.add_argument("--split-by", default="micro")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--channels", type=int, default=96, help="The preset has 256.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only-step", action="store_true", help="Measure a step, train nothing.")
    given = parser.parse_args()
    known = {"machine": machine("cpu"), "versions": versions(), "commit": git_commit()}
    if given.only_step:
        record = {"what": "one step of the preset photo"} | step_seconds() | known
        (given.out / "step.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        config = settings(
            given.root,
            data=given.data,
            split_by=given.split_by,
            steps=given.steps,
            channels=given.channels,
            out=Path(scratch) / "run",
        )
        result = train(config)
        spent = time.process_time() - start
        record = {
            "what": f"the preset photo overfits {given.data} ({given.split_by})",
            "scores": score(result.out / "model", given.root, given.data, given.split_by),
            "steps": result.steps,
            "loss": round(result.history[-1]["loss"], 4),
            "processor seconds of training": round(spent),
            "peak memory, GB": round(peak_memory() / 1e9, 2),
            "settings": {name: getattr(config, name) for name in ("preset", "vectors", "lr", "overrides")},
        } | known
    (given.out / f"{given.data}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["scores"], indent=1))


if __name__ == "__main__":
    main()
