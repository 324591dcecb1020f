"""Several processes compute what one computes, the loss of one is said and mended, and the launch
configurations start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn
from toy_refer import SMALL, make_toy
from typer.testing import CliRunner

from refseg_nb.bench.growth import GROWTH, fitted_slope, growth
from refseg_nb.cli import app
from refseg_nb.evaluation.evaluator import load_record
from refseg_nb.models.registry import create_model
from refseg_nb.refshapes.dataset import tiny_data
from refseg_nb.training.checkpoint import checkpoints
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.distributed import (
    ProcessLost,
    SharedBatchNorm2d,
    launch_folder,
    share_batch_norm,
    share_of_batch,
)
from refseg_nb.training.learner import Learner, Objective, read_history, train

CONTEXT = torch.multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["accelerate", "refseg_nb.training.learner"])
# dropout's coins are thrown by each process for itself
STILL = SMALL | {"sfm_dropout": 0.0, "aspp_dropout": 0.0, "decoder_dropout": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def values(root, out, **changes) -> dict:
    usual = {
        "root": root,
        "data": "toy",
        "split_by": "unc",
        "overrides": STILL,
        "epochs": 2,
        "images_per_batch": 3,
        "expressions_per_image": 2,
        "lr": 1e-3,
        "warmup": 2,
        "clip": 1.0,
        "threshold": 0.05,
        "out": out,
        "device": "cpu",
        "threads": 1,
        "quiet": True,
    }
    return usual | changes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def member(rank, world, port, function, *args):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(rank, *args)


def together(world, function, *args, timeout=150) -> list[int]:
    """Run a function in several processes that can reach each other; their exit codes."""
    port = free_port()
    processes = [
        CONTEXT.Process(target=member, args=(rank, world, port, function, *args)) for rank in range(world)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    return codes


def losses(out) -> list[float]:
    return [row["loss"] for row in read_history(Path(out) / "losses.jsonl")]


# --- the parts


def test_a_batch_is_dealt_out_whole():
    batch = [(3, [1, 2, 3]), (0, [7]), (5, [4, 5])]
    for world in range(1, 10):
        parts = [share_of_batch(batch, rank, world) for rank in range(world)]
        real = [(part, share) for part, share in parts if share]
        assert sorted(i for part, _ in real for _, indices in part for i in indices) == [1, 2, 3, 4, 5, 7]
        assert all(share == pytest.approx(sum(len(i) for _, i in part) / 6) for part, share in real) and sum(
            s for _, s in parts
        ) == pytest.approx(1)
        assert all(part and all(indices for _, indices in part) for part, _ in parts), (
            "nobody has nothing to compute"
        )
        if world <= 3:
            assert all(group in batch for part, _ in parts for group in part), "images stay whole"
    with pytest.raises(ValueError, match="rank must be between 0 and 1"):
        share_of_batch(batch, 2, 2)


ROWS = (4, 1, 2)  # of three processes; with a fourth that stands in


def rows() -> torch.Tensor:
    return torch.randn(sum(ROWS), 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 20


def part_of_the_norm(rank, folder):
    torch.distributed.init_process_group("gloo")
    x = rows().split(ROWS)[rank].clone() if rank < len(ROWS) else torch.full((2, 3, 4, 5), 99.0)
    model = nn.Sequential(nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    (norm,) = share_batch_norm(model)
    norm.counted = rank < len(ROWS)
    x.requires_grad_()
    y = model(x)
    if rank < len(ROWS):
        (y * y.detach().sin()).sum().backward()
    else:
        (0 * y.sum()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16 and (rank == len(ROWS) or torch.allclose(half.float(), y, atol=0.1))
    torch.save(
        {
            "y": y.detach(),
            "x": x.grad,
            "weight": norm.weight.grad,
            "var": norm.running_var,
            "mean": norm.running_mean,
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_shared_batch_norm_is_that_of_all_rows(tmp_path):
    """Uneven parts and one stand-in: values, gradients and statistics of one BatchNorm2d over all rows."""
    assert together(4, part_of_the_norm, str(tmp_path)) == [0] * 4
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    x, norm = rows().double().requires_grad_(), nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    y = norm(x)
    (y * y.detach().sin()).sum().backward()
    norm(x.detach())  # as the half-precision pass above
    close = lambda a, b: torch.allclose(a, b.float(), rtol=1e-4, atol=2e-5)
    assert close(torch.cat([p["y"] for p in parts[:3]]), y) and close(
        torch.cat([p["x"] for p in parts[:3]]), x.grad
    )
    assert close(sum(p["weight"] for p in parts), norm.weight.grad) and not parts[3]["x"].any()
    for p in parts:
        assert torch.equal(p["var"], parts[0]["var"]) and torch.allclose(
            p["mean"], norm.running_mean.float(), rtol=1e-2
        )


def test_shared_batch_norm_takes_the_place_of_the_old_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(1, 4)), nn.BatchNorm2d(4, eps=1e-3)
    )
    model[2].eval()
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 3, 4, 4)
    parameters = list(model.parameters())
    put_in = share_batch_norm(model)
    assert (
        {id(m) for m in put_in} == {id(model[1][0]), id(model[2])}
        and model[2].eps == 1e-3
        and not model[2].training
        and model[1][0].training
    )
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(before[k], v) for k, v in model.state_dict().items()
    )
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()], (
        "an optimizer that was made before still has the right ones"
    )
    assert share_batch_norm(model) == [] and isinstance(model[2], SharedBatchNorm2d)
    assert torch.isfinite(model.eval()(x)).all()


# --- one and two processes

JOBS = {
    "images": {"accumulate": 2},
    "expressions": {"images_per_batch": None, "batch_size": 5, "expressions_per_image": None, "epochs": 1},
    "released": {
        "schedule": "plateau",
        "grayscale": 0.5,
        "targets": "dilated",
        "mask_size": 20,
        "images_per_batch": 1,
        "max_steps": 6,
        "loss": "bce+dice",
    },
    "bf16": {"mixed_precision": "bf16", "max_steps": 5},
    "no cache": {"cache_features": False, "max_steps": 3},
    "backbone": {"train_backbone": True, "max_steps": 3},
    "dropout": {"overrides": SMALL},
}
GRADIENTS = {
    "plain": {"loss": "bce+dice"},
    "weighted": {"class_weights": (0.2, 3.0)},
    "pointing": {
        "objective": "pointing",
        "overrides": STILL | {"pointer": True},
        "data": "refshapes",
        "root": tiny_data(),
    },
}


def first_gradient(root, out, changes) -> dict:
    changes = {"accumulate": 2, "clip": None} | changes
    learner = Learner(TrainConfig(**(values(root, out) | changes)))
    learner.objective.train()
    group = [
        batch for _, batch in zip(range(learner.config.accumulate), learner.data.batches(0), strict=False)
    ]
    learner.optimizer_step(group)
    return {k: p.grad.clone() for k, p in learner.model.named_parameters() if p.grad is not None}


def train_all(rank, root, folder):
    for name, changes in GRADIENTS.items():
        torch.save(
            first_gradient(root, f"{folder}/gradient", changes),
            f"{folder}/gradient-{name}-{rank}.pt",
        )
    for name, changes in JOBS.items():
        result = train(TrainConfig(**values(root, f"{folder}/{name}", **changes)))
        torch.save(dict(result.model.state_dict().items()), f"{folder}/{name}-{rank}.pt")
        if rank == 0:
            assert all(
                "Shared" in type(m).__name__ for m in result.model.modules() if isinstance(m, nn.BatchNorm2d)
            )


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """Seven trainings, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    assert together(2, train_all, root, str(folder)) == [0, 0]
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_as_one(root, two, tmp_path, job):
    """The same loss at each step within rounding, the same weights and the same score."""
    a, b = (torch.load(two / f"{job}-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a), "both processes hold the same model, bit for bit"
    one = train(TrainConfig(**values(root, tmp_path / "one", **JOBS[job])))
    mine, theirs = losses(tmp_path / "one"), losses(two / job)
    assert len(mine) == len(theirs) > 2
    if job == "dropout":
        assert mine != theirs and theirs == pytest.approx(mine, rel=0.3)
        return
    rough = 50 if job == "bf16" else 1
    # Another order of sums is another rounding, and AdamW, which divides by the root of the second moment, makes
    # whole steps of it: the losses part by a factor of about ten a step (measured: 0, 0, 0, 8e-5, 6e-4). A wrong
    # share of a batch shows at once, so the first steps have the narrow bound.
    assert theirs[:3] == pytest.approx(mine[:3], rel=2e-4 * rough)
    assert theirs == pytest.approx(mine, rel=2e-3 * rough)
    w = one.model.state_dict()
    assert a.keys() == w.keys()
    flat = lambda state: torch.cat(
        [v.flatten() for k, v in state.items() if v.is_floating_point() and not k.endswith("conv.bias")]
    )
    # a bias in front of BatchNorm has a gradient of nothing but rounding, and AdamW makes steps of it
    assert (flat(a) - flat(w)).norm() <= 2e-3 * rough * flat(w).norm()
    scores = [read_history(folder / "history.jsonl")[-1] for folder in (tmp_path / "one", two / job)]
    assert scores[0]["samples"] == scores[1]["samples"] and scores[0]["overall_iou"] > 0
    assert scores[1]["overall_iou"] == pytest.approx(scores[0]["overall_iou"], abs=2.0 * rough)


@pytest.mark.parametrize("loss", GRADIENTS)
def test_two_processes_have_the_gradient_of_one(root, two, tmp_path, loss):
    """Of two accumulated batches, unevenly shared: every parameter's, in both processes; a mean over weights
    is that of the whole batch."""
    one = first_gradient(root, tmp_path / "one", GRADIENTS[loss])
    scale = torch.stack([g.norm() for g in one.values()]).norm()
    for rank in range(2):
        found = torch.load(two / f"gradient-{loss}-{rank}.pt", weights_only=True)
        assert found.keys() == one.keys() and all(
            (found[k] - one[k]).norm() <= 1e-4 * one[k].norm() + 1e-6 * scale for k in one
        )


# --- a lost one


def train_until(rank, root, folder, die_at, changes):
    """Train; at a step, SIGKILL the second process."""
    step = Learner.optimizer_step

    def deadly(self, batches):
        if rank == 1 and self.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batches)

    Learner.optimizer_step = deadly
    try:
        result = train(
            TrainConfig(**values(root, f"{folder}/run", checkpoint_every=1, accumulate=2, **changes))
        )
    except ProcessLost as error:
        Path(f"{folder}/lost").write_text(str(error))
        raise SystemExit(3) from None
    Path(f"{folder}/resumed-{rank}").write_text(json.dumps(result.resumed_from))
    torch.save(dict(result.model.state_dict().items()), f"{folder}/{rank}.pt")


def test_a_killed_process_ends_the_run_and_it_goes_on(root, two, tmp_path):
    """The other process ends at once and says what to do; called again, the run ends where an undisturbed
    one does, bit for bit, dropout and all."""
    changes = {"overrides": SMALL, "epochs": 3}
    codes = together(2, train_until, root, str(tmp_path), 3, changes, timeout=60)
    assert codes == [3, -signal.SIGKILL]
    message = (tmp_path / "lost").read_text()
    assert (
        all(
            word in message
            for word in ("process 0 of 2", "run is stopped", "same command again", "last checkpoint")
        )
        and "\n" not in message
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    for folder in (tmp_path, whole):
        assert together(2, train_until, root, str(folder), None, changes) == [0, 0]
    assert [json.loads((f / "resumed-0").read_text()) for f in (tmp_path, whole)] == [3, None]
    a, b = (torch.load(f / "1.pt", weights_only=True) for f in (tmp_path, whole))
    assert all(torch.equal(a[k], b[k]) for k in a) and losses(tmp_path / "run") == losses(whole / "run")


def test_begun_with_two_processes_and_finished_by_one(root, tmp_path, capsys):
    """Without dropout, it is the run that one process would have made."""
    assert together(2, train_until, root, str(tmp_path), 2, {}, timeout=60) == [3, -signal.SIGKILL]
    c = values(root, tmp_path / "run", checkpoint_every=1, accumulate=2)
    result = train(TrainConfig(**c))
    whole = train(TrainConfig(**c | {"out": tmp_path / "whole"}))
    assert result.resumed_from == 2 and losses(tmp_path / "run") == pytest.approx(
        losses(tmp_path / "whole"), rel=2e-4
    )
    assert whole.steps == result.steps


# --- the launch configurations

LAUNCH = Path(launch_folder())
ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "TERM": "dumb"}


def launch(*args, **more):
    """`accelerate launch` in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, args)]
    return subprocess.Popen(
        command,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **more,
    )


def finish(process, timeout=150) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_configurations_are_read_and_say_what_they_are():
    kinds = {path.stem: load_config_from_file(str(path)) for path in LAUNCH.glob("*.yaml")}
    assert {k: (c.distributed_type.value, c.num_processes, c.num_machines) for k, c in kinds.items()} == {
        "cpus": ("MULTI_GPU", 2, 1),
        "gpus": ("MULTI_GPU", 8, 1),
        "nodes": ("MULTI_GPU", 32, 4),
        "fsdp": ("FSDP", 8, 1),
    }
    assert kinds["cpus"].use_cpu and all(
        "-m refseg_nb train" in path.read_text() or path.stem == "fsdp" for path in LAUNCH.glob("*.yaml")
    )


def command(root, out, changes) -> list[str]:
    config = Path(out).with_suffix(".json")
    config.write_text(
        json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values(root, out, **changes).items()})
    )
    return ["-m", "refseg_nb", "train", "--config", config, "--device", "cpu"]


def test_launched_killed_and_launched_again(root, two, tmp_path):
    """`accelerate launch` with cpus.yaml; a worker is killed: the launcher ends with an error that names it;
    the same command ends as the training above."""
    arguments = [
        "--config_file",
        LAUNCH / "cpus.yaml",
        *command(root, tmp_path / "run", JOBS["images"] | {"checkpoint_every": 1, "epochs": 400}),
    ]
    process = launch(*arguments)
    deadline = time.time() + 120
    while len(losses(tmp_path / "run")) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "refseg_nb" in p.cmdline()]
    assert len(workers) == 2, "two workers train"
    workers[1].kill()
    said = finish(process, 60)
    assert process.returncode not in (0, None) and (
        "SIGKILL" in said or "exitcode  : -9" in said or "another one" in said
    ), said
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers), (
        "nobody is left behind"
    )
    assert checkpoints(tmp_path / "run" / "checkpoint")


def test_two_machines_and_an_evaluation(root, tmp_path):
    """nodes.yaml: two machines of one process each, both played by this one. Then `refseg evaluate` by two
    processes: the record of one, to the last digit."""
    port = free_port()
    nodes = [
        "--config_file",
        LAUNCH / "nodes.yaml",
        "--mixed_precision=no",
        "--num_machines=2",
        "--num_processes=2",
        f"--main_process_port={port}",
    ]
    train_them = [
        launch(*nodes, f"--machine_rank={rank}", *command(root, tmp_path / "run", {"max_steps": 3}))
        for rank in range(2)
    ]
    outputs = [finish(p) for p in train_them]
    assert [p.returncode for p in train_them] == [0, 0], outputs
    assert len(losses(tmp_path / "run")) == 3 and sum("steps in" in text for text in outputs) == 1, (
        "one of them reports"
    )
    score = [
        "-m",
        "refseg_nb",
        "evaluate",
        tmp_path / "run",
        "--data",
        "toy",
        "--split-by",
        "unc",
        "--root",
        root,
        "--device",
        "cpu",
        "--name",
        "x",
    ]
    process = launch("--config_file", LAUNCH / "cpus.yaml", *score, "--out", tmp_path / "two.json")
    assert "overall_iou" in finish(process) and process.returncode == 0
    assert CliRunner().invoke(app, [*map(str, score[2:]), "--out", str(tmp_path / "one.json")]).exit_code == 0
    one, both = (load_record(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.arrays["intersection"].any() and one.metrics == both.metrics
    assert one.groups == both.groups and all((one.arrays[k] == both.arrays[k]).all() for k in one.arrays)


# --- weights in pieces


def shard_the_weights(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    objective, batch = little()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in (objective.model.decoder, objective.model.aspp, objective):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    loss = objective(*batch)
    loss.backward()
    optimizer.step()
    held = sum(p.to_local().numel() for p in objective.parameters())
    state = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in objective.state_dict().items()
    }
    torch.save({"loss": loss.detach(), "held": held, "state": state}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def little():
    torch.manual_seed(0)
    objective = Objective(create_model("shnet", "refshapes", vocab_size=9, **STILL)).train()
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=g)
    return objective, (
        images,
        None,
        torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8]]),
        torch.tensor([0, 0, 1]),
        torch.rand(3, 16, 16, generator=g),
    )


def test_weights_in_pieces_make_the_same_step(tmp_path):
    """FSDP as in fsdp.yaml, of two CPU processes: each holds half of the weights, and the step is that of
    one process with all of them."""
    assert together(2, shard_the_weights, str(tmp_path)) == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    objective, batch = little()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    loss = objective(*batch)
    loss.backward()
    optimizer.step()
    total = sum(p.numel() for p in objective.parameters())
    assert all(p["held"] < 0.6 * total for p in parts) and sum(p["held"] for p in parts) >= total
    for part in parts:
        assert part["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for k, v in objective.state_dict().items():
            if not k.endswith("conv.bias"):
                assert torch.allclose(part["state"][k].float(), v.float(), atol=1e-4), k


def test_the_learner_refuses_pieces(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "accelerate.Accelerator.distributed_type", property(lambda self: SimpleNamespace(value="FSDP"))
    )
    with pytest.raises(ValueError, match="asks for FSDP"):
        Learner(TrainConfig(**values(root, tmp_path / "run")))


# --- growth


def test_growth_is_measured_once_and_its_slope_fitted(tmp_path):
    points = {"phrases": {"refshapes": (1, 3)}, "samples": {"bootstrap": (50, 200), "open": (70, 700)}}
    record = growth(tmp_path / "growth.json", points, progress=False)
    rows = {(r["series"], r["of"], r["size"]): r for r in record["rows"]}
    assert len(rows) == 6 and all(r["seconds"] >= 0 and r["memory"] >= 0 for r in record["rows"])
    assert (
        rows["phrases", "refshapes", 3]["training_seconds"] > rows["phrases", "refshapes", 3]["seconds"] > 0
    )
    assert "training_seconds" not in rows["phrases", "refshapes", 1], (
        "a batch of one expression cannot be trained on"
    )
    again = growth(tmp_path / "growth.json", points, progress=False)
    assert json.loads((tmp_path / "growth.json").read_text())["rows"] == again["rows"] == record["rows"], (
        "nothing is measured twice"
    )
    assert fitted_slope([1, 10, 100], [5, 50, 500]) == pytest.approx(1) and fitted_slope(
        [1, 2, 4, 8], [9, 9, 1, 8]
    ) == pytest.approx(3)
    for bad in (([1], [1]), ([1, 2], [0, 1])):
        with pytest.raises(ValueError, match="two points"):
            fitted_slope(*bad)


def test_the_recorded_growth():
    """The record that chapter 21b draws from: all points, and slopes that the design promises."""
    record = json.loads((Path(__file__).parents[1] / "results/scaling/growth.json").read_text())
    wanted = {
        (series, of, size)
        for series, parts in GROWTH.items()
        for of, sizes in parts.items()
        for size in sizes
    }
    assert {(r["series"], r["of"], r["size"]) for r in record["rows"]} == wanted

    def slope(series, of):
        rows = sorted(
            (r for r in record["rows"] if (r["series"], r["of"]) == (series, of)), key=lambda r: r["size"]
        )
        return fitted_slope([r["size"] for r in rows], [r["seconds"] for r in rows])

    assert all(slope("samples", part) < 1.4 for part in GROWTH["samples"]), (
        "nothing grows faster than the data"
    )
    assert slope("phrases", "paper") < 1.15 and slope("words", "paper") < 0.5
