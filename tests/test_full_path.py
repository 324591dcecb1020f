"""The whole path on real files at the paper's size: RefCOCO, image store, ResNet-101, full SHNet, one step,
evaluation."""

import json
import os
import shutil
import subprocess
import sys

import pytest


def refseg(*args, cwd, code=0):
    env = {**os.environ, "COLUMNS": "160", "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "refseg_nb", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=600,
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_refcoco_to_store_to_training_to_evaluation_at_320_pixels(real_data, tmp_path, record_property):
    root = tmp_path / "data"
    for folder in ("refcoco", "images"):
        shutil.copytree(real_data / folder, root / folder, copy_function=shutil.copyfile)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert "part" in refseg(
        "data", "verify", "refcoco", "--root", root, "--split-by", "micro", cwd=tmp_path, code=1
    ), "sound, but not the whole data set"
    refseg(
        "data",
        "store",
        "refcoco",
        "--root",
        root,
        "--split-by",
        "micro",
        "--image-size",
        320,
        "--target-size",
        72,
        cwd=tmp_path,
    )
    stores = lambda: [p for p in (root / "stores").iterdir() if p.is_dir()]
    [built] = stores()
    before = built.stat().st_mtime_ns
    said = refseg(
        "train",
        "--data",
        "refcoco",
        "--root",
        root,
        "--split-by",
        "micro",
        "--preset",
        "paper",
        "--set",
        "backbone=resnet101",
        "--set",
        "backbone_weights=none",
        "--images-per-batch",
        1,
        "--expressions-per-image",
        4,
        "--steps",
        1,
        "--store",
        root / "stores",
        "--set",
        "grid=18",
        "--device",
        "cpu",
        "--out",
        "run",
        "--config",
        small_evaluation(tmp_path),
        cwd=tmp_path,
    )
    assert "1 steps" in said and "peak memory" in said
    assert [built] == stores() and built.stat().st_mtime_ns == before, (
        "the store that was built is the one that was read"
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    saved = (tmp_path / "run" / "model" / "config.json").read_text()
    assert str(tmp_path) not in saved, "a model carries no path of the machine that trained it"
    config = json.loads(saved)["config"]
    assert (config["image_size"], config["grid"], config["channels"], config["backbone"]) == (
        320,
        18,
        512,
        "resnet101",
    )
    assert 0 < result["last"]["loss"] < 2 and result["last"]["samples"] > 0
    record_property("peak memory of one step, GB", result["peak_memory"] / 1e9)
    assert 1e9 < result["peak_memory"] < 12e9, "a full-size step of four expressions on a CPU"
    refseg(
        "evaluate",
        "run/model",
        "--data",
        "refcoco",
        "--root",
        root,
        "--split-by",
        "micro",
        "--split",
        "val",
        "--limit",
        1,
        "--device",
        "cpu",
        "--out",
        "record.json",
        cwd=tmp_path,
    )
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["protocol"]["resolution"] == "original" and record["metrics"]["samples"] > 0


def small_evaluation(folder):
    """Settings that have no option of their own: one image of val is scored, and the backbone's outputs are
    not kept."""
    file = folder / "more.json"
    file.write_text(json.dumps({"eval_limit": 1, "cache_features": False}))
    return file
