"""Training: resume after SIGKILL bit for bit, the cache, the recipes, the schedules, checkpoints, processes,
and what is refused."""

import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file
from torchvision.transforms import v2
from toy_refer import SMALL, make_toy

from refseg_nb import files
from refseg_nb.data.batches import make_loader
from refseg_nb.data.words import Vocabulary
from refseg_nb.errors import InputError
from refseg_nb.files import atomic_folder
from refseg_nb.models.backbones import Backbone
from refseg_nb.models.base import ModelConfig, Recipe, RISModel
from refseg_nb.models.hub import CheckpointError, load_model, model_tensors, save_model
from refseg_nb.models.losses import dice_loss
from refseg_nb.models.registry import create_model
from refseg_nb.models.shnet import RECIPES
from refseg_nb.system import available_memory, peak_memory
from refseg_nb.training import checkpoint as module
from refseg_nb.training import learner as learner_module
from refseg_nb.training.checkpoint import checkpoints, load_checkpoint
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.features import FeatureCache
from refseg_nb.training.learner import (
    Learner,
    Objective,
    Run,
    TargetDataset,
    cut_log,
    expression_batches,
    polynomial_decay,
    read_history,
    train,
)

CONTEXT = torch.multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["accelerate", "refseg_nb.training.learner"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def config(root, out, **changes) -> TrainConfig:
    usual = {
        "root": root,
        "data": "toy",
        "split_by": "unc",
        "overrides": SMALL,
        "epochs": 4,
        "images_per_batch": 3,
        "accumulate": 2,
        "expressions_per_image": 2,
        "lr": 1e-3,
        "warmup": 2,
        "clip": 1.0,
        "checkpoint_every": 1,
        "out": out,
        "device": "cpu",
        "threads": 1,
        "quiet": True,
    }
    return TrainConfig(**usual | changes)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nothing stopped."""
    return train(config(root, tmp_path_factory.mktemp("whole") / "run"))


# all that the released recipe does otherwise, made so that the rate falls within a few epochs
RELEASED = {
    "schedule": "plateau",
    "grayscale": 0.5,
    "targets": "dilated",
    "mask_size": 20,
    "batch_size": 6,
    "images_per_batch": None,
    "threshold": 0.4,
    "lr": 0.02,
    "epochs": 6,
}


IMPATIENT = replace(RECIPES["refshapes"], plateau_patience=0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setitem(RECIPES, "refshapes", IMPATIENT)


@pytest.fixture(scope="module")
def whole_released(root, tmp_path_factory):
    """The same as the released code trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "refshapes", IMPATIENT)
        return train(config(root, tmp_path_factory.mktemp("released") / "run", **RELEASED))


def weights(out) -> dict:
    return load_file(Path(out) / "model" / "model.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def strip(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


# --- killed and resumed


def run_and_die(values, die_at=None):
    """Train in a process of its own; `die_at` = (name, number): SIGKILL instead of that call of os.fsync,
    os.rename, rmtree or of an optimizer step."""
    if die_at:
        name, number = die_at
        count = [0]

        def deadly(function):
            def wrapper(*args, **kwargs):
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        if name == "step":
            Learner.optimizer_step = deadly(Learner.optimizer_step)
        elif name == "rename":
            Path.rename = deadly(Path.rename)
        elif name == "evaluate":
            Learner.evaluate = deadly(Learner.evaluate)
        elif name == "write":
            module.save_file = deadly(module.save_file)
        elif name == "remove":
            module.shutil.rmtree = deadly(module.shutil.rmtree)
        else:
            files.fsync = deadly(files.fsync)
    if values["schedule"] == "plateau":
        RECIPES["refshapes"] = IMPATIENT
    train(TrainConfig(**values))


def start(values, die_at=None):
    process = CONTEXT.Process(target=run_and_die, args=(values, die_at))
    process.start()
    return process


def values_of(c: TrainConfig) -> dict:
    return dict(vars(c).items())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_killed_at_chosen_calls(root, whole, tmp_path, keep):
    """Each leg dies in the middle of something else; the last one ends with the same weights, bit for bit."""
    c = config(root, tmp_path / "run", keep=keep)
    legs = [
        ("step", 1),
        ("step", 2),
        ("fsync", 2),
        ("write", 2),
        ("rename", 1),
        ("remove", 2),
        ("evaluate", 1),
        ("write", 3),
        ("rename", 3),
        ("fsync", 9),
    ]
    for leg in legs:
        process = start(values_of(c), leg)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, f"{leg}: the run should have died there"
    last = start(values_of(c))
    last.join(120)
    assert last.exitcode == 0
    history = read_history(Path(c.out) / "history.jsonl")
    if keep == "last":
        assert same(weights(c.out), weights(whole.out))
        assert strip(history) == strip(whole.history)
    else:
        assert (
            max(r["overall_iou"] for r in history)
            == json.loads((Path(c.out) / "model" / "config.json").read_text())["meta"]["best"]["overall_iou"]
        )
    leftovers = [p.name for p in (Path(c.out) / "checkpoint").iterdir() if p.name.startswith(".")]
    assert not leftovers, leftovers


@pytest.mark.parametrize("recipe", ["usual", "released"])
def test_killed_at_random_moments(root, whole, whole_released, tmp_path, recipe):
    c, rng, killed = (
        config(root, tmp_path / "run", **RELEASED if recipe == "released" else {}),
        random.Random(os.urandom(4)),
        0,
    )
    whole = {"usual": whole, "released": whole_released}[recipe]
    seed = rng.randrange(10**6)
    rng.seed(seed)
    for _ in range(6):
        process = start(values_of(c))
        time.sleep(rng.uniform(0.1, 2.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join(120)
    process = start(values_of(c))
    process.join(120)
    assert process.exitcode == 0, f"seed {seed}"
    assert same(weights(c.out), weights(whole.out)), f"seed {seed}, killed {killed} times"
    assert strip(read_history(Path(c.out) / "history.jsonl")) == strip(whole.history), f"seed {seed}"
    assert (Path(c.out) / "losses.jsonl").read_text() == (whole.out / "losses.jsonl").read_text(), (
        f"seed {seed}"
    )
    assert [row["step"] for row in read_history(Path(c.out) / "losses.jsonl")] == list(
        range(1, whole.steps + 1)
    )


def test_a_log_is_cut_at_the_checkpoint(tmp_path):
    log = tmp_path / "losses.jsonl"
    log.write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo'
    )
    assert [row["step"] for row in read_history(log)] == [1, 2, 3] and read_history(tmp_path / "none") == []
    cut_log(log, 2)
    assert log.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'


@pytest.mark.parametrize("recipe", ["usual", "released"])
def test_stopped_at_every_step(root, whole, whole_released, impatient, tmp_path, monkeypatch, recipe):
    """The same within one process: an exception at each step in turn, then the rest."""

    class Stop(Exception):
        pass

    whole = {"usual": whole, "released": whole_released}[recipe]
    c = config(root, tmp_path / "run", **RELEASED if recipe == "released" else {})
    step = Learner.optimizer_step
    for last in range(1, whole.steps):

        def stops(self, batches, last=last):
            if self.step == last:
                raise Stop
            return step(self, batches)

        monkeypatch.setattr(Learner, "optimizer_step", stops)
        with pytest.raises(Stop):
            train(c)
        assert load_checkpoint(Path(c.out) / "checkpoint")["state"]["step"] == last
    monkeypatch.setattr(Learner, "optimizer_step", step)
    result = train(c, resume=True)
    assert (
        result.resumed_from == whole.steps - 1
        and same(weights(c.out), weights(whole.out))
        and strip(result.history) == strip(whole.history)
    )
    again = train(c)
    assert again.resumed_from == again.steps == whole.steps and same(weights(c.out), weights(whole.out)), (
        "a finished run has nothing left to do"
    )


def test_dropout_is_part_of_the_state(root, whole, tmp_path):
    """Without the stored random state a resumed run would go another way: this is what the two tests above
    would miss without dropout."""
    model = whole.model
    assert (
        any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
        or model.config.sfm_dropout > 0
    )
    other = train(config(root, tmp_path / "other", seed=1))
    assert not same(weights(other.out), weights(whole.out))


# --- checkpoints


def test_atomic_folder(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(target) as new:
        (new / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["model"]
    with atomic_folder(target) as new:
        (new / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_no_pickle_and_two_kept(whole):
    found = checkpoints(whole.out / "checkpoint")
    assert len(found) == 2 and found[-1].name == f"step-{whole.steps:08d}"
    assert {p.name for p in found[-1].iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    }
    assert not any(k.startswith("backbone.") for k in load_file(found[-1] / "model.safetensors")), (
        "the frozen backbone need not be written each time"
    )
    json.loads((found[-1] / "state.json").read_text())


def test_a_broken_checkpoint_is_passed_over_and_said(root, whole, tmp_path, capfd):
    c = config(root, tmp_path / "run", max_steps=2)
    first = train(c)
    older, newest = checkpoints(tmp_path / "run" / "checkpoint")
    (newest / "model.safetensors").write_bytes(b"broken")
    again = train(c)
    assert again.resumed_from == 1, "the one before is still whole"
    assert "step-00000002 is damaged" in capfd.readouterr().err
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), "as if nothing had happened"
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoint")] == [older.name, newest.name]
    for path in (older, newest):
        (path / "state.json").write_text("[]")
    with pytest.raises(
        CheckpointError, match="step-00000002 is damaged.*step-00000001 is damaged.*resume=False"
    ):
        train(c)


def test_one_process_trains_into_a_folder(root, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(CheckpointError, match=r"another process is training into .*run: wait for it"),
    ):
        train(config(root, tmp_path / "run"))
    with pytest.raises(FloatingPointError):
        train(config(root, tmp_path / "run", lr=1e30, clip=None, warmup=0))
    assert train(config(root, tmp_path / "run", epochs=1), resume=False).steps > 0, (
        "the lock ends with the training, also one that failed"
    )


def test_resume_with_another_configuration(root, whole, tmp_path):
    c = values_of(config(root, tmp_path / "run", max_steps=2))
    train(TrainConfig(**c))
    for name, value in {
        "lr": 5e-4,
        "epochs": 9,
        "seed": 3,
        "max_steps": 3,
        "overrides": {**SMALL, "channels": 32},
        "accumulate": 1,
        "schedule": "plateau",
        "grayscale": 0.1,
        "threshold": 0.4,
        "mask_size": 20,
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}="):
            train(TrainConfig(**c | {name: value}))
    state = checkpoints(tmp_path / "run" / "checkpoint")[-1] / "state.json"
    stored = json.loads(state.read_text())
    for name in ("schedule", "grayscale", "threshold", "mask_size", "batch_size"):
        del stored["config"][name]
    state.write_text(json.dumps(stored))
    free = {"checkpoint_every": 5, "quiet": True, "cache_folder": tmp_path / "features"}
    assert train(TrainConfig(**c | free)).resumed_from == 2, (
        "these change no weight; and a checkpoint from before the recipe's fields is still good"
    )
    with pytest.raises(CheckpointError, match="grayscale="):
        train(TrainConfig(**c | {"grayscale": 0.1}))
    assert train(TrainConfig(**c | {"lr": 5e-4}), resume=False).resumed_from is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(config(root, tmp_path / "new"), resume=True)


# --- models on disk


def test_save_and_load_model(whole, tmp_path):
    model, vocabulary, meta = load_model(whole.out / "model")
    assert (
        vocabulary == whole.vocabulary
        and meta["image_size"] == 32
        and meta["threshold"] == 0.5
        and meta["training"]["seed"] == 0
    )
    assert not model.training and same(model.state_dict(), whole.model.state_dict())
    half = save_model(tmp_path / "half", model, vocabulary, {"model": "shnet"}, torch.float16)
    small, _, meta = load_model(half)
    assert meta["dtype"] == "float16" and all(
        v.dtype == torch.float32 for v in small.state_dict().values() if v.is_floating_point()
    )
    assert (half / "model.safetensors").stat().st_size < 0.6 * (
        whole.out / "model" / "model.safetensors"
    ).stat().st_size
    images, words = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[2, 3], [4, 0]])
    assert torch.allclose(model(images, words), small(images, words), atol=0.05)
    for file in (
        whole.out / "model" / "config.json",
        whole.out / "checkpoint" / f"step-{whole.steps:08d}" / "state.json",
    ):
        assert str(whole.out.parent) not in file.read_text(), "no path of this machine"


def test_broken_model_folders(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)
    for name, content, message in (
        ("config.json", b"{", "not JSON"),
        ("config.json", b'{"format": 9}', "format 9"),
        ("model.safetensors", b"x" * 40, "cannot be read"),
    ):
        folder = save_model(tmp_path / "m", whole.model, whole.vocabulary)
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
    folder = save_model(tmp_path / "m", whole.model, whole.vocabulary)
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["channels"] = 24
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(folder)


def test_a_random_backbone_is_stored_and_another_than_its_own_is_refused(tmp_path):
    from safetensors.torch import save_file

    small = {k: v for k, v in SMALL.items() if k != "backbone_weights"}
    make = lambda weights: create_model(
        "shnet", "refshapes", vocab_size=5, backbone="resnet101", backbone_weights=weights, **small
    ).eval()
    words = Vocabulary.build(["red car left"])
    images, numbers = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8), torch.tensor([[2, 3]])
    model = make("none")
    again = load_model(save_model(tmp_path / "random", model, words))[0]
    assert torch.equal(again(images, numbers), model(images, numbers))
    file = tmp_path / "resnet.safetensors"
    save_file({k: v.contiguous() for k, v in make("none").backbone.body.state_dict().items()}, file)
    model = make(str(file))
    folder = save_model(tmp_path / "fetched", model, words)
    assert not any(k.startswith("backbone.") for k in load_file(folder / "model.safetensors"))
    assert torch.equal(load_model(folder)[0](images, numbers), model(images, numbers))
    save_file({k: v.contiguous() for k, v in make("none").backbone.body.state_dict().items()}, file)
    with pytest.raises(CheckpointError, match="trained on another resnet101"):
        load_model(folder)


# --- the loop


def test_the_cache_changes_nothing(root, tmp_path):
    runs = [
        train(config(root, tmp_path / f"{cache}", cache_features=cache, max_steps=6))
        for cache in (True, False)
    ]
    a, b = (weights(r.out) for r in runs)
    assert a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)
    assert runs[0].history[-1]["overall_iou"] == pytest.approx(runs[1].history[-1]["overall_iou"], abs=0.2)


def test_cached_levels_are_the_backbones(root, tmp_path):
    learner = Learner(config(root, tmp_path / "run"))
    learner.model.train()
    cache = FeatureCache(learner.model, learner.data.train, 4)
    half = FeatureCache(learner.model, learner.data.train, 4, torch.float16)
    for batch in make_loader(learner.data.train, 3, shuffle=True):
        for kept, small, fresh in zip(
            cache(batch.image_ids), half(batch.image_ids), learner.model.backbone(batch.images)
        ):
            assert (
                torch.allclose(kept, fresh, atol=1e-5)
                and torch.allclose(small, fresh, atol=2e-2)
                and small.dtype == torch.float32
            )
    assert half.nbytes * 2 == cache.nbytes


def test_grey_rows_of_the_cache(root, tmp_path):
    learner = Learner(config(root, tmp_path / "run"))
    cache = FeatureCache(learner.model, learner.data.train, 4, grey=True)
    assert cache.nbytes == 2 * FeatureCache(learner.model, learner.data.train, 4).nbytes
    always = v2.RandomGrayscale(p=1)
    for batch in make_loader(learner.data.train, 4, shuffle=True):
        which = [k % 2 == 1 for k in range(len(batch.image_ids))]
        images = torch.stack([always(x) if g else x for x, g in zip(batch.images, which)])
        for kept, fresh in zip(cache(batch.image_ids, grey=which), learner.model.backbone(images)):
            assert torch.allclose(kept, fresh, atol=1e-5)


@pytest.fixture
def encoded(monkeypatch):
    """The sizes of all batches of more than one image that a backbone was asked about."""
    sizes, call = [], Backbone.__call__

    def spy(self, images):
        if len(images) > 1:
            sizes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Backbone, "__call__", spy)
    return sizes


@pytest.mark.parametrize(
    "changes",
    [{}, {"grayscale": 0.4}, {"cache_dtype": "bfloat16", "mixed_precision": "bf16"}],
    ids=["plain", "grey", "bf16"],
)
def test_features_on_the_disk(root, tmp_path, encoded, changes):
    """With and without a folder: the same losses and weights, and the second run asks no backbone."""
    folder = tmp_path / "features"
    without = train(config(root, tmp_path / "without", max_steps=4, **changes))
    assert encoded == [14] * (2 if "grayscale" in changes else 1) + [7]
    first = train(config(root, tmp_path / "first", max_steps=4, cache_folder=folder, **changes))
    encoded.clear()
    second = train(config(root, tmp_path / "second", max_steps=4, cache_folder=folder, lr=2e-3, **changes))
    assert not encoded and len([p for p in folder.iterdir() if p.is_dir()]) == 2
    third = train(config(root, tmp_path / "third", max_steps=4, cache_folder=folder, **changes))
    assert not encoded
    for run in (first, third):
        assert (
            same(weights(run.out), weights(without.out))
            and (run.out / "losses.jsonl").read_bytes() == (without.out / "losses.jsonl").read_bytes()
        )
    assert not same(weights(second.out), weights(without.out))
    assert "cache_folder" not in (first.out / "model" / "config.json").read_text(), "no path of this machine"


def test_damaged_features_are_made_again(root, tmp_path, encoded):
    learner = Learner(config(root, tmp_path / "run"))
    make = lambda: FeatureCache(learner.model, learner.data.train, folder=tmp_path / "features").levels
    good = [v.clone() for v in make()]
    [folder] = [p for p in (tmp_path / "features").iterdir() if p.is_dir()]
    largest = folder / "1.npy"

    def flip():
        data = bytearray(largest.read_bytes())
        data[-5] ^= 16
        largest.write_bytes(data)

    def cut():
        os.truncate(largest, largest.stat().st_size - 4)

    def no_sums():
        (folder / "sums.json").unlink()

    def other_sums():
        (folder / "sums.json").write_text("[1, 2]")

    def no_header():
        largest.write_bytes(b"x" * 300)

    def a_file():
        shutil.rmtree(folder)
        folder.write_text("")

    for damage in (flip, cut, no_sums, other_sums, no_header, lambda: largest.unlink(), a_file):
        damage()
        encoded.clear()
        with pytest.warns(
            UserWarning, match=f"{folder.name}: the features kept there are damaged .*; they are made again"
        ):
            again = make()
        assert encoded and all(torch.equal(a, b) for a, b in zip(again, good, strict=True))
    encoded.clear()
    assert all(torch.equal(a, b) for a, b in zip(make(), good)) and not encoded


def test_other_features_have_another_folder(tmp_path, encoded):
    root = make_toy(tmp_path)
    learner = Learner(config(root, tmp_path / "run"))
    make = lambda data=learner.data.train, **k: FeatureCache(
        learner.model, data, folder=tmp_path / "features", **k
    )
    folders = lambda: len([p for p in (tmp_path / "features").iterdir() if p.is_dir()])
    make()
    os.utime(root / "images" / "toy" / "3.png", (1, 1))
    make()
    assert folders() == 2
    learner.model.backbone.mean += 0.01  # part of the answer, not of the weights
    make()
    assert folders() == 3
    fewer = Learner(config(root, tmp_path / "fewer", limit=5)).data.train
    half = lambda: torch.autocast("cpu", torch.bfloat16)
    others = [
        (fewer, {}),
        (learner.data.val, {}),
        (fewer, {"grey": True}),
        (fewer, {"dtype": torch.float16}),
        (fewer, {"autocast": half}),
    ]
    for number, (data, other) in enumerate(others, 4):
        make(data, **other)
        assert folders() == number
    encoded.clear()
    make(fewer)
    assert not encoded and folders() == 8


def test_no_room_for_features(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="features: the features take 0.0 GB and 0.0 GB are free"):
        train(config(root, tmp_path / "run", cache_folder=tmp_path / "features"))
    assert not [p for p in (tmp_path / "features").iterdir() if p.is_dir()], "nothing is left"


def test_one_encodes_the_others_wait(root, tmp_path, encoded):
    learner, found = Learner(config(root, tmp_path / "run")), []
    task = lambda: found.append(
        FeatureCache(learner.model, learner.data.train, 4, folder=tmp_path / "features").levels
    )
    threads = [threading.Thread(target=task) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert encoded == [4, 4, 4, 2] and all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)
    )


# --- recipes


def test_every_field_of_a_recipe_is_in_the_chapter():
    cells = nbformat.read(
        Path(__file__).parent.parent / "nbs" / "library" / "train_config.ipynb", as_version=4
    ).cells
    [table] = [c.source for c in cells if "| field of `Recipe` |" in c.source]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [f.name for f in fields(Recipe)]
    own = names[: names.index("optimizer")]  # where SHNet's presets differ; the others are in the next table
    assert sorted(name for row in rows for name in row.replace("`", "").replace(",", " ").split()) == sorted(
        own
    )


def test_presets_bring_their_recipe():
    released, paper, small = (TrainConfig(preset=p) for p in ("released", "paper", "refshapes"))
    recipe = RECIPES["released"]
    for name in (
        "epochs",
        "lr",
        "weight_decay",
        "schedule",
        "mask_size",
        "grayscale",
        "threshold",
        "batch_size",
        "patience",
        "keep",
        "drop_last",
    ):
        assert getattr(released, name) == getattr(recipe, name)
    assert (
        released.targets == recipe.target
        and released.images_per_batch is None
        and paper.batch_size == 50
        and small.batch_size is None
    )
    assert (
        small.images_per_batch,
        small.schedule,
        small.grayscale,
        small.mask_size,
        small.threshold,
        small.targets,
    ) == (8, "polynomial", 0, None, 0.5, "soft")
    assert (
        TrainConfig(preset="paper", images_per_batch=4).batch_size is None
        and TrainConfig(batch_size=4).images_per_batch is None
    )
    assert TrainConfig(**vars(released)) == released


def test_the_plateau_follows_the_validation_loss(root, whole_released):
    """The rates of the history, replayed from its losses."""
    lr, best, rates = 0.02, math.inf, []
    for row in whole_released.history:
        rates.append(lr)
        if row["val_loss"] < best * (1 - 1e-3):
            best = row["val_loss"]
        else:
            lr *= 0.7
    assert [r["lr"] for r in whole_released.history] == pytest.approx(rates) and 1 < len(set(rates)) < len(
        rates
    )


def test_the_plateau_ends_at_its_floor(root, tmp_path):
    "The rate does not fall below 1e-8, and a gain of less than a thousandth is none: as released."
    run = Run(config(root, tmp_path / "run", **RELEASED | {"lr": 1e-4}))
    for loss in (1.0, 0.9995, 0.9995, 0.9995, 0.9995, 0.9995, 0.9995):
        run.learner.plateau.step(loss)
    assert run.learner.plateau.get_last_lr()[0] == pytest.approx(0.7 * 0.7 * 1e-4)
    for _ in range(200):
        run.learner.plateau.step(1.0)
    # PyTorch leaves out a step of less than 1e-8, so the floor itself is not reached
    assert run.learner.plateau.min_lrs == [1e-8] and 1e-8 <= run.learner.plateau.get_last_lr()[0] < 5e-8


def test_patience_ends_a_run_and_the_best_epoch_stays(root, tmp_path, monkeypatch):
    scores, seen = [10.0, 12.0, 11.0, 12.0, 11.5, 30.0], []

    def scripted(self, by_kind=False):
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return {"overall_iou": scores[len(seen) - 1], "mean_iou": 0.0}

    monkeypatch.setattr(Learner, "evaluate", scripted)
    c = config(root, tmp_path / "run", epochs=10, patience=3, keep="best", lr=0.01)
    done = train(c)
    assert [row["epoch"] for row in done.history] == [1, 2, 3, 4, 5], "three epochs without more than 12"
    assert done.best["epoch"] == 2 and same(weights(c.out), {k: seen[1][k] for k in weights(c.out)})
    assert not same(weights(c.out), {k: seen[4][k] for k in weights(c.out)})
    again = train(config(root, tmp_path / "run", epochs=10, patience=3, keep="best", lr=0.01))
    assert again.steps == done.steps and len(seen) == 5, "a second call has nothing left to do"
    with pytest.raises(InputError, match="patience needs a val_split"):
        config(root, tmp_path / "x", patience=2, val_split=None)
    with pytest.raises(InputError, match="patience must be 0 or more"):
        config(root, tmp_path / "x", patience=-1)


@pytest.mark.parametrize("how", [{"batch_size": 5, "images_per_batch": None}, {"images_per_batch": 5}])
def test_a_short_last_batch_is_left_out_if_asked(root, tmp_path, how):
    kept, left = (
        Run(config(root, tmp_path / "x", drop_last=drop, **how)).learner.data for drop in (False, True)
    )
    size = lambda batch: sum(len(s) for _, s in batch) if how.get("batch_size") else len(batch)
    whole, full = kept.plan(0), left.plan(0)
    number = sum(map(size, whole))
    assert number % 5, "the toy does not divide"
    assert [size(batch) for batch in full] == [5] * (number // 5) and len(whole) == len(full) + 1
    taken = [(g, i) for batch in full for g, indices in batch for i in indices]
    assert set(taken) < {(g, i) for batch in whole for g, indices in batch for i in indices}
    assert len(taken) == len(set(taken))


def test_the_validation_loss_is_that_of_the_answers(root, whole_released, tmp_path):
    run = Run(
        config(
            root,
            tmp_path / "run",
            start=str(whole_released.out),
            **RELEASED | {"loss": "bce+dice", "eval_limit": 5},
        )
    )
    run.fit()
    learner = run.learner
    model, losses = learner.model.eval(), []
    scored = {image_id for image_id, _ in learner.evaluator.dataset.groups}
    assert len(scored) == 5
    for sample, words in zip(learner.data.val.samples, learner.data.val.words):
        if sample.image_id not in scored:
            continue
        with torch.no_grad():
            logits = model(learner.data.val.image(sample.image_id)[None], words[words > 0][None])
        y = (
            F.interpolate(
                torch.from_numpy(learner.data.val.original_mask(sample)).float()[None, None],
                (20, 20),
                mode="bilinear",
            )
            > 0
        ).float()[0]
        z = F.interpolate(logits[None], (20, 20), mode="bilinear")[0]
        losses.append((F.binary_cross_entropy(z.sigmoid(), y) + 0.1 * dice_loss(z, y)).item())
    last = run.history[-1]
    assert last["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert last["samples"] == len(losses)


def test_warm_up_and_plateau(root, impatient, tmp_path):
    learner = Learner(config(root, tmp_path / "run", schedule="plateau", warmup=4))
    rates = []
    for learner.step in range(6):
        rates.append(learner.rate())
    assert rates == [1e-3 / 4, 2e-3 / 4, 3e-3 / 4, 1e-3, 1e-3, 1e-3]
    result = train(config(root, tmp_path / "b", schedule="plateau", warmup=100))
    steps = [r["step"] for r in result.history]
    assert [r["lr"] for r in result.history] == pytest.approx([1e-5 * s for s in steps]), (
        "the rise is no fall of the plateau"
    )


def test_which_images_are_grey(root, tmp_path, monkeypatch):
    """From images and from the cache: a pure function of seed, epoch and image, at the share that was asked
    for; validation keeps its colours."""
    seen = []

    def spy(self, images, *rest):
        seen[-1].append(images)
        return torch.zeros(())

    def images_of(**changes):
        learner = Learner(config(root, tmp_path / "run", cache_features=False, **changes))
        found = {}
        monkeypatch.setattr(Objective, "forward", spy)
        for epoch in range(12):
            learner.step = epoch * learner.data.steps_per_epoch
            for batch in learner.data.batches(epoch):
                seen.append([])
                learner.loss(batch)
                for i, before, after in zip(batch.image_ids, batch.images, seen[-1][0]):
                    grey = bool((after == after[:1]).all())
                    assert torch.equal(after, v2.functional.rgb_to_grayscale(before, 3) if grey else before)
                    found[epoch, i] = grey
        return found

    half, again, other, all_, none = (
        images_of(grayscale=p, seed=seed) for p, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (1.0, 0), (0.0, 0))
    )
    assert half == again != other and len(half) == 12 * 14 and abs(np.mean(list(half.values())) - 0.5) < 0.12
    assert all(all_.values()) and not any(none.values())
    assert len({tuple(half[epoch, i] for i in range(1, 15)) for epoch in range(12)}) == 12, (
        "each epoch has its own"
    )


def test_grey_from_the_cache_is_grey_from_images(root, tmp_path):
    runs = [
        train(config(root, tmp_path / str(cache), cache_features=cache, grayscale=0.5, max_steps=6))
        for cache in (True, False)
    ]
    a, b = (weights(r.out) for r in runs)
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)
    plain = train(config(root, tmp_path / "plain", max_steps=6))
    assert not same(weights(plain.out), a)
    assert runs[0].history[-1]["overall_iou"] == pytest.approx(runs[1].history[-1]["overall_iou"], abs=0.2)


@pytest.mark.parametrize("store", [False, True])
def test_targets_are_made_from_the_original_masks(root, tmp_path, store):
    learner = Learner(
        config(
            root,
            tmp_path / "run",
            targets="dilated",
            mask_size=12,
            store=str(tmp_path / "store") if store else None,
        )
    )
    data = learner.data.train
    assert isinstance(data, TargetDataset) and learner.target_size == 12
    twice = 0
    for sample in data.samples:
        mask = torch.from_numpy(np.ascontiguousarray(data.original_mask(sample))).float()[None, None]
        want = (F.interpolate(mask, (12, 12), mode="bilinear") > 0).float()[0, 0]
        assert torch.equal(data.target(sample.ann_id).float(), want)
        twice += int(((F.adaptive_avg_pool2d(mask, 12)[0, 0] > 0) != want.bool()).sum())
    assert twice > 0, "dilating the soft target is another thing"


def test_the_threshold_is_acted_on_and_stored(root, tmp_path):
    runs = [train(config(root, tmp_path / f"{t}", max_steps=4, threshold=t)) for t in (0.05, 0.95)]
    assert (
        same(*(weights(r.out) for r in runs))
        and runs[0].history[-1]["overall_iou"] != runs[1].history[-1]["overall_iou"]
    )
    assert [load_model(r.out / "model")[2]["threshold"] for r in runs] == [0.05, 0.95]


def test_batches_of_expressions(root, tmp_path):
    learner = Learner(
        config(
            root,
            tmp_path / "run",
            batch_size=5,
            images_per_batch=None,
            expressions_per_image=None,
            accumulate=1,
        )
    )
    data = learner.data.train
    n = len(data)
    for epoch in range(3):
        plan = learner.data.plan(epoch)
        sizes = [sum(len(i) for _, i in batch) for batch in plan]
        assert sorted(i for batch in plan for _, indices in batch for i in indices) == list(range(n))
        assert (
            len(plan) == math.ceil(n / 5) == learner.data.steps_per_epoch
            and max(sizes) - min(sizes) <= 1
            and max(sizes) <= 5
        )
        for batch in plan:
            assert len({g for g, _ in batch}) == len(batch) and all(
                set(indices) <= set(data.groups[g][1]) for g, indices in batch
            ), "an image once a batch"
    assert learner.data.plan(0) == learner.data.plan(0) != learner.data.plan(1)
    some = expression_batches(data, 5, expressions_per_image=1)
    assert sorted(g for batch in some for g, i in batch for _ in i) == list(range(len(data.groups)))
    learner.data.world, parts = 2, []
    for learner.data.rank in range(2):
        parts.append(learner.data.plan(0))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [
        sorted(batch) for batch in expression_batches(data, 5)
    ], "each batch is shared out"


def test_memory(monkeypatch):
    import psutil

    assert not hasattr(learner_module, "resource"), (
        "Windows has no such module, so it is imported where it is used"
    )
    resident = psutil.Process().memory_info().rss
    assert (
        0.8 * resident < peak_memory() < psutil.virtual_memory().total
        and available_memory() < psutil.virtual_memory().total
    )
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=77))
    )
    assert peak_memory() == 77


def test_schedule():
    rates = [polynomial_decay(s, 100, 1.0, 0.7) for s in range(101)]
    assert (
        rates[0] == 1
        and rates[100] == 0
        and rates[50] == pytest.approx(0.5**0.7)
        and rates == sorted(rates, reverse=True)
    )
    warm = [polynomial_decay(s, 100, 1.0, 0.7, warmup=10) for s in range(100)]
    assert warm[0] == 0.1 and warm[5] == pytest.approx(0.6) and warm[10:] == rates[10:100] and max(warm) < 1


def test_history_and_the_rates_used(whole):
    assert [r["epoch"] for r in whole.history] == [1, 2, 3, 4] and whole.history == read_history(
        whole.out / "history.jsonl"
    )
    assert whole.steps == 4 * math.ceil(math.ceil(14 / 3) / 2)
    assert whole.history[-1]["lr"] == pytest.approx(
        polynomial_decay(whole.steps - 1, whole.steps, 1e-3, 0.7, 2)
    )
    assert all(math.isfinite(r["loss"]) and r["samples"] > 7 for r in whole.history)
    assert whole.best["overall_iou"] == max(r["overall_iou"] for r in whole.history)


def test_accumulation_is_the_larger_batch(root, tmp_path):
    """Without BatchNorm and dropout, two batches of two images with equal numbers of expressions are one of
    four."""
    still = dict(SMALL, sfm_dropout=0.0, aspp_dropout=0.0, decoder_dropout=0.0)
    learner = Learner(config(root, tmp_path / "a", overrides=still, expressions_per_image=1, clip=None))
    learner.model.eval()
    data = learner.data.train
    big, small = list(make_loader(data, 4, 1))[0], list(make_loader(data, 2, 1))[:2]
    objective = Objective(learner.model)
    loss = lambda b: objective(b.images, None, b.words, b.image_index, b.targets)
    one, two = loss(big), sum(loss(b) for b in small) / 2
    assert one.item() == pytest.approx(two.item(), rel=1e-5)


def test_losses():
    torch.manual_seed(0)
    y = (torch.rand(3, 8, 8) > 0.6).float()
    assert (
        dice_loss(100 * (y - 0.5), y) == pytest.approx(0, abs=1e-5) and dice_loss(-100 * (y - 0.5), y) > 0.9
    )

    class Fixed(RISModel):
        def encode(self, images):
            return images

        def segment(self, features, words, index):
            return features

    logits, soft = torch.randn(3, 8, 8), torch.rand(3, 8, 8)
    bce = -(soft * torch.sigmoid(logits).log() + (1 - soft) * torch.sigmoid(-logits).log()).mean()
    value = lambda y=soft, **k: Objective(Fixed(ModelConfig(), vocab_size=2), **k)(
        logits, None, None, None, y
    ).item()
    assert value() == pytest.approx(bce.item(), rel=1e-5)
    assert value(loss="bce+dice", dice_weight=2.0) == pytest.approx(
        (bce + 2 * dice_loss(logits, soft)).item(), rel=1e-5
    )
    fine = torch.rand(3, 20, 20)
    enlarged = torch.stack([v2.functional.resize(z[None], [20, 20], antialias=False)[0] for z in logits])
    assert value(fine) == pytest.approx(F.binary_cross_entropy(enlarged.sigmoid(), fine).item(), rel=1e-5), (
        "the logits are brought to the targets' size"
    )


def test_bf16_on_a_cpu(root, tmp_path):
    result = train(config(root, tmp_path / "bf16", mixed_precision="bf16", max_steps=6))
    assert all(
        v.dtype == torch.float32 for v in weights(result.out).values() if v.is_floating_point()
    ) and math.isfinite(result.history[-1]["loss"])


def test_a_trained_backbone_is_trained_and_saved(root, tmp_path):
    c = config(root, tmp_path / "run", train_backbone=True, max_steps=4)
    result = train(c)
    torch.manual_seed(c.seed)
    fresh = Learner(config(root, tmp_path / "fresh")).model.backbone.state_dict()
    assert not same(fresh, result.model.backbone.state_dict())
    assert same(load_model(result.out / "model")[0].state_dict(), result.model.state_dict())
    (checkpoints(result.out / "checkpoint")[-1]).rename(tmp_path / "gone")
    again = train(c)
    assert again.resumed_from == 3 and same(again.model.state_dict(), result.model.state_dict())


def test_the_last_batch_and_the_last_epoch(root, tmp_path):
    result = train(
        config(
            root, tmp_path / "run", epochs=3, max_steps=7, checkpoint_every=None, eval_every=2, eval_limit=2
        )
    )
    assert result.steps == 7 and [r["epoch"] for r in result.history] == [1, 2, 3]
    assert ["overall_iou" in r for r in result.history] == [
        False,
        True,
        True,
    ], "every second epoch, and at the end"


def test_tensorboard_if_asked(root, tmp_path):
    pytest.importorskip("tensorboard")
    train(config(root, tmp_path / "run", tracker="tensorboard", max_steps=2))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_what_is_refused(root, tmp_path):
    for name, value in {
        "loss": "mse",
        "targets": "sharp",
        "mixed_precision": "fp8",
        "tracker": "mlflow",
        "epochs": 0,
        "lr": -1.0,
        "preset": "huge",
        "keep": "all",
        "schedule": "cosine",
        "grayscale": 1.5,
        "threshold": 1.0,
        "mask_size": 0,
        "images_per_batch": 0,
    }.items():
        with pytest.raises(ValueError, match=name):
            config(root, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="images_per_batch and batch_size exclude each other"):
        config(root, tmp_path, batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        config(root, tmp_path, batch_size=1, images_per_batch=None)
    for changes in ({"schedule": "plateau"}, {"preset": "released"}):
        with pytest.raises(ValueError, match="name a val_split"):
            config(root, tmp_path, val_split=None, **changes)
    with pytest.raises(ValueError, match="cache_features"):
        config(root, tmp_path, cache_features=True, train_backbone=True)
    with pytest.raises(ValueError, match="fp16"):
        train(config(root, tmp_path / "a", mixed_precision="fp16"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            train(config(root, tmp_path / "a", device="cuda"))
    with pytest.raises(ValueError, match="resume"):
        train(config(root, tmp_path / "a"), resume="yes")


def test_a_loss_that_is_no_number_stops_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Learner,
        "loss",
        lambda self, batch: self.objective.model.decoder.parameters().__next__().sum() * float("nan"),
    )
    with pytest.raises(FloatingPointError, match="step 1"):
        train(config(root, tmp_path / "run"))


# --- two processes


def member(rank, world, port, values):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    result = train(TrainConfig(**values))
    torch.save(dict(result.model.state_dict().items()), f"{values['out']}/rank{rank}.pt")
    Path(f"{values['out']}/history{rank}.json").write_text(json.dumps(strip(result.history)))


def test_two_processes_train_one_model(root, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    c = config(
        root,
        tmp_path / "run",
        epochs=2,
        accumulate=1,
        schedule="plateau",
        grayscale=0.5,
        cache_folder=tmp_path / "features",
    )
    processes = [CONTEXT.Process(target=member, args=(rank, 2, port, values_of(c))) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(150)
    assert [p.exitcode for p in processes] == [0, 0]
    a, b = (torch.load(tmp_path / "run" / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert same(a, b), "all processes hold the model that was saved, its BatchNorm statistics too"
    histories = [json.loads((tmp_path / "run" / f"history{r}.json").read_text()) for r in range(2)]
    assert all(
        [r[k] for r in histories[0]] == [r[k] for r in histories[1]]
        for k in ("overall_iou", "val_loss", "samples")
    )
    assert np.isfinite(histories[0][-1]["loss"])


def test_start_takes_the_weights_of_a_trained_model_onto_another_grid(root, whole, tmp_path):
    learner = Learner(
        config(root, tmp_path / "fine", start=str(whole.out), overrides=SMALL | {"grid": 6, "sfm_extent": 4})
    )
    assert learner.model.config.grid == 6 != whole.model.config.grid
    assert same(model_tensors(learner.model), model_tensors(whole.model))
    with pytest.raises(
        ValueError, match="start='shnet-refshapes' was trained with other words than those of toy"
    ):
        Learner(config(root, tmp_path / "other", start="shnet-refshapes"))
