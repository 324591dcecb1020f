"""The command line as a person uses it: what it prints, what it writes, and one clear line with exit code 2
when the person is mistaken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_refer import SMALL
from typer.testing import CliRunner

from refseg_nb.cli import app, parse_overrides, read_config

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "TERM": "dumb"}


def refseg(*args, cwd=None, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "refseg_nb", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENV,
        timeout=timeout,
    )


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch

    from refseg_nb.data.words import Vocabulary
    from refseg_nb.models.hub import save_model
    from refseg_nb.models.registry import create_model

    torch.manual_seed(0)
    vocabulary = Vocabulary.build(["the red car on the left"])
    folder = tmp_path_factory.mktemp("model")
    save_model(
        folder,
        create_model("shnet", "refshapes", vocab_size=len(vocabulary), backbone_weights="none", prior=0.5),
        vocabulary,
        {},
    )
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def one_line(result, code, *words):
    "Exit code, an empty stdout, and one line on stderr that holds the words."
    stderr = result.stderr
    assert (result.returncode if hasattr(result, "returncode") else result.exit_code) == code, (
        stderr,
        getattr(result, "exception", None),
    )
    assert len(stderr.strip().splitlines()) == 1 and stderr.startswith("refseg: "), stderr
    for word in words:
        assert word in stderr, stderr
    assert "Traceback" not in stderr


# ---- help and version


def test_help_is_quick_and_names_every_command():
    start = time.time()
    result = refseg("--help")
    seconds = time.time() - start
    assert result.returncode == 0 and seconds < 5  # 0.5 s alone on a machine; here others run beside it
    for command in ("data", "pretrain", "train", "evaluate", "segment", "explore", "reproduce"):
        assert command in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from refseg_nb.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
        .stdout.strip()
        .endswith("[]")
    )


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["data"],
        ["data", "make", "--help"],
        ["data", "info", "-h"],
        ["train", "--help"],
        ["evaluate", "-h"],
        ["segment", "-h"],
        ["pretrain", "-h"],
        ["reproduce", "-h"],
        ["explore", "-h"],
        ["data", "fetch", "-h"],
        ["data", "verify", "-h"],
        ["data", "leakage", "-h"],
        ["data", "check", "-h"],
        ["data", "convert", "-h"],
        ["data", "store", "-h"],
        ["convert", "-h"],
    ],
)
def test_every_command_has_help(args):
    result = invoke(*args)
    assert result.exit_code == 0 and "Usage" in result.stdout


def test_version():
    import refseg_nb

    assert invoke("--version").stdout.strip() == f"refseg {refseg_nb.__version__}"


# ---- segment


def test_segment_writes_mask_and_overlay_beside_the_image(picture, model_folder):
    start = time.time()
    result = refseg("segment", picture, "the red car", "--model", model_folder)
    seconds = time.time() - start
    assert result.returncode == 0, result.stderr
    assert seconds < 30  # 10 s is the promise, alone on a machine
    mask, overlay = (
        Image.open(picture.with_name("photo.the-red-car.mask.png")),
        Image.open(picture.with_name("photo.the-red-car.overlay.png")),
    )
    assert mask.size == (60, 40) and mask.mode == "L" and overlay.mode == "RGB"
    assert min(overlay.size) >= 512, "large enough to look at"
    assert set(np.unique(mask)) <= {0, 255}
    assert "score" in result.stdout and "photo.the-red-car.mask.png" in result.stdout and result.stderr == ""
    assert sorted(p.name for p in picture.parent.iterdir()) == [
        "photo.png",
        "photo.the-red-car.mask.png",
        "photo.the-red-car.overlay.png",
    ]


def test_segment_replaces_only_what_it_wrote_itself(picture, model_folder):
    ask = lambda *more: invoke("segment", picture, "the red car", "--model", model_folder, *more)
    mine = picture.with_name("photo.the-red-car.mask.png")
    mine.write_bytes(b"a person's own file")
    one_line(ask(), 2, "is there already", "--force")
    assert mine.read_bytes() == b"a person's own file"
    assert ask("--force").exit_code == 0 and ask().exit_code == 0, "its own files it replaces"
    assert invoke("segment", picture, "the blue car", "--model", model_folder).exit_code == 0
    assert len(list(picture.parent.glob("photo.the-*-car.*.png"))) == 4, "two phrases, two pairs of files"
    other = picture.with_name("photo.jpg")
    Image.open(picture).convert("RGB").save(other)
    one_line(invoke("segment", other, "the red car", "--model", model_folder), 2, "is there already")


def test_a_picture_unlike_the_domain_and_unknown_words_get_one_warning_each(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    done = refseg("segment", tmp_path / "noise.png", "zzyzx")
    assert done.returncode == 0 and "the model knows drawn scenes of RefShapes" in done.stdout
    assert done.stderr.count("unlike what the model knows") == 1
    assert done.stderr.count("knows none of these words") == 1
    from refseg_nb.refshapes.scenes import render, sample_scene

    Image.fromarray(render(sample_scene(0, 1), 300).image).save(tmp_path / "scene.png")
    assert refseg("segment", tmp_path / "scene.png", "the tree").stderr == ""


def test_demo_needs_no_file(tmp_path):
    done = refseg("demo", "--no-open", "--out", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "d" / "scene-4.html").read_text()
    assert page.count("<figure>") == 3 and "://" not in page.replace("http://www.w3.org", "")
    assert Image.open(tmp_path / "d" / "scene-4.png").size == (512, 512)


def test_every_field_can_be_set_and_help_has_examples():
    from dataclasses import fields

    from refseg_nb.cli import config_fields, in_options
    from refseg_nb.training.config import TrainConfig

    assert [f.name for f in config_fields()] == [f.name for f in fields(TrainConfig)]
    text = invoke("train", "--help").output
    for field in config_fields():
        assert field.option[:20] in text, field.name
    assert in_options("max_steps must be 1, or resume=False; split_by='unc'") == (
        "--steps must be 1, or --fresh; --split-by 'unc'"
    )
    for command in ("demo", "segment", "explore", "train", "evaluate", "compare", "pretrain", "reproduce"):
        assert "Example:" in invoke(command, "--help").output, command
    first = invoke("--help").output.split("Try it")[1]
    assert first.index("demo") < first.index("segment") < first.index("explore") < first.index("train ")


def test_segment_imports_only_what_it_needs(picture, model_folder):
    code = (
        f"import sys; from refseg_nb.cli import app\ntry: app(['segment', {str(picture)!r}, 'the red car',"
        f" '--model', {str(model_folder)!r}])\nexcept SystemExit: pass\nprint([m for m in ('nbformat',"
        " 'matplotlib.pyplot', 'torchvision', 'torchmetrics', 'scipy.io') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.stdout.strip().endswith("[]") and "mask" in done.stdout, done.stdout + done.stderr


def test_explore_writes_one_page(picture, model_folder, monkeypatch, tmp_path):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    result = invoke("explore", picture, "the red car", "--model", model_folder)
    page = picture.with_name("photo.the-red-car.explorer.html")
    assert result.exit_code == 0 and opened == [page.absolute().as_uri()], result.output
    assert page.stat().st_size < 2e6 and "://" not in page.read_text().replace("http://www.w3.org", "")
    two = invoke(
        "explore",
        picture,
        "the red car",
        "--model",
        model_folder,
        "--beside",
        model_folder,
        "--out",
        tmp_path / "new" / "two.html",
        "--no-open",
    )
    assert two.exit_code == 0 and len(opened) == 1 and (tmp_path / "new" / "two.html").exists(), two.output
    one_line(
        invoke("explore", tmp_path / "none.png", "car", "--model", model_folder),
        2,
        "there is no image at",
        "none.png",
    )
    one_line(invoke("explore", picture, " ", "--model", model_folder, "--no-open"), 2, "the phrase is empty")


def test_segment_out_and_json(picture, model_folder, tmp_path):
    out = tmp_path / "new" / "folder"
    result = invoke("segment", picture, "the purple car", "--model", model_folder, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (
        answer["unknown_words"] == ["purple"]
        and 0 <= answer["score"] <= 1
        and Path(answer["mask"]).exists()
        and Path(answer["overlay"]).exists()
    )
    assert not picture.with_name("photo.mask.png").exists()


def test_segment_mistakes_are_one_line(picture, model_folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.jpg"
    Image.open(picture).resize((300, 300)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    m = ("--model", model_folder)
    one_line(refseg("segment", tmp_path / "broken.jpg", "car", *m), 2, "broken.jpg")
    one_line(refseg("segment", picture, "  ", *m), 2, "the phrase is empty")
    one_line(refseg("segment", tmp_path / "none.png", "car", *m), 2, "there is no image at", "none.png")
    one_line(invoke("segment", tmp_path / "text.png", "car", *m), 2, "text.png", "not an image")
    one_line(invoke("segment", tmp_path / "cut.jpg", "car", *m), 2, "cut.jpg")
    one_line(invoke("segment", tmp_path, "car", *m), 2, "is a folder")
    one_line(invoke("segment", picture, "car", "--model", tmp_path / "nothing"), 2, "there is no model at")
    one_line(invoke("segment", picture, "car", *m, "--device", "tpu"), 2, "device", "tpu")
    one_line(invoke("segment", picture, "car", *m, "--out", picture), 2, "photo.png")
    one_line(invoke("segment", picture), 2, "Missing argument")
    one_line(invoke("segmint", picture), 2, "segmint")
    one_line(invoke("segment", picture, "car", "--colour", "red"), 2, "--colour")
    assert not list(tmp_path.glob("*.mask.png")) and not list(tmp_path.glob(".*tmp"))


def test_segment_never_leaves_half_a_picture(picture, model_folder, monkeypatch):
    from refseg_nb import cli

    def fail(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        cli._write_pictures({picture.with_name("a.png"): Image.new("L", (4, 4))}, picture, "car")
    assert sorted(p.name for p in picture.parent.iterdir()) == ["photo.png"]


def test_model_files_that_are_damaged_are_one_line(picture, model_folder, tmp_path):
    import shutil

    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x" * 100)
    one_line(invoke("segment", picture, "car", "--model", tmp_path / "m"), 2)
    (tmp_path / "m" / "config.json").write_text("{")
    one_line(invoke("segment", picture, "car", "--model", tmp_path / "m"), 2)


# ---- configuration


def test_config_files(tmp_path):
    (tmp_path / "a.json").write_text('{"lr": 0.1}')
    (tmp_path / "a.toml").write_text("lr = 0.1\n")
    assert read_config(tmp_path / "a.json") == read_config(tmp_path / "a.toml") == {"lr": 0.1}
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.json").write_text('{"learning": 1}')
    one_line(invoke("train", "--config", tmp_path / "b.json"), 2, "b.json", "JSON")
    one_line(invoke("train", "--config", tmp_path / "c.json"), 2, "c.json")
    one_line(invoke("train", "--config", tmp_path / "d.json"), 2, "learning", "--weight-decay")
    one_line(invoke("train", "--config", tmp_path / "e.json"), 2, "e.json")


def test_overrides():
    assert parse_overrides(["use_hcam=false", "grid=12", "backbone=refshapes"]) == {
        "use_hcam": False,
        "grid": 12,
        "backbone": "refshapes",
    }
    with pytest.raises(ValueError, match="FIELD=VALUE"):
        parse_overrides(["grid"])


# ---- data, train, evaluate


def test_data_make_and_info(tmp_path):
    result = refseg("data", "make", "--size", "tiny", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    result = invoke("data", "info", "refshapes", "--root", tmp_path)
    assert result.exit_code == 0 and "train" in result.stdout and "whole" in result.stdout
    one_line(invoke("data", "info", "refcoco", "--root", tmp_path), 2, "refcoco")
    one_line(invoke("data", "make", "--size", "enormous", "--root", tmp_path), 2, "enormous")
    one_line(invoke("data", "make", "refcocoplus", "--root", tmp_path), 2, "refcocoplus")


def test_data_info_on_real_files(real_data):
    result = invoke("data", "info", "refcoco", "--root", real_data)
    assert result.exit_code == 0 and "testA" in result.stdout


def test_data_verify_names_what_is_wrong_and_ends_with_1(tiny_root, tmp_path):
    sound = invoke(
        "data", "verify", "refshapes", "--root", tiny_root, "--no-images", "--out", tmp_path / "report.json"
    )
    assert sound.exit_code == 0, sound.output
    assert json.loads((tmp_path / "report.json").read_text())["findings"] == []
    shutil.copytree(tiny_root / "refshapes", tmp_path / "data" / "refshapes")
    damaged = invoke("data", "verify", "refshapes", "--root", tmp_path / "data")
    assert damaged.exit_code == 1 and "missing image" in damaged.stdout
    one_line(invoke("data", "verify", "refshapes", "--root", tmp_path / "nowhere"), 2, "nowhere")


def test_own_data_from_a_jsonl_to_a_trained_model(tmp_path):
    draw = np.random.default_rng(0)
    lines = []
    for i, split in enumerate(["train", "train", "val"]):
        Image.fromarray(draw.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(
            {
                "image": f"{i}.png",
                "expression": "the left half",
                "mask": [[0, 0, 30, 0, 30, 40, 0, 40]],
                "split": split,
            }
        )
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(json.dumps(line | {"mask": [[0, 0, 99, 0, 30, 40]]}) + "\n" for line in lines[:1])
    )
    wrong = invoke("data", "check", file)
    assert wrong.exit_code == 1 and "line 1" in wrong.stdout and "mask" in wrong.stdout
    assert "expression" in json.loads(invoke("data", "check", "--schema").stdout)["properties"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert invoke("data", "check", file).exit_code == 0
    made = invoke("data", "convert", file, "--root", tmp_path / "data", "--name", "mine")
    assert made.exit_code == 0 and "mine" in made.stdout
    config = tmp_path / "small.json"
    config.write_text(
        json.dumps(
            {
                "overrides": {**SMALL, "aspp_rates": [1, 2]},
                "max_steps": 1,
                "images_per_batch": 2,
                "device": "cpu",
            }
        )
    )
    trained = invoke(
        "train",
        "--data",
        "mine",
        "--root",
        tmp_path / "data",
        "--config",
        config,
        "--out",
        tmp_path / "run",
        "--store",
        tmp_path / "stores",
    )
    assert trained.exit_code == 0, trained.output
    assert "peak memory" in trained.stdout and list((tmp_path / "stores").iterdir())
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "config.json").read_text(), (
        "a model carries no path of the machine that trained it"
    )
    scored = invoke(
        "evaluate",
        tmp_path / "run" / "model",
        "--data",
        "mine",
        "--root",
        tmp_path / "data",
        "--out",
        tmp_path / "r.json",
        "--crf",
    )
    assert (
        scored.exit_code == 0
        and json.loads((tmp_path / "r.json").read_text())["protocol"]["crf"]["iterations"] == 5
    ), scored.output


def test_data_fetch_without_a_connection_says_what_to_do_by_hand(tmp_path):
    planned = invoke("data", "fetch", "refcoco", "--root", tmp_path / "data", "--dry-run")
    assert "refcoco.zip" in planned.stdout and "54" in planned.stdout, planned.output
    assert not (tmp_path / "data" / "refcoco").exists()
    one_line(invoke("data", "fetch", "nonsense", "--root", tmp_path), 2, "nonsense", "refcocog")


def test_data_leakage_over_a_root(real_data, tmp_path):
    said = invoke("data", "leakage", "--root", real_data, "--write-filter", tmp_path / "ids.txt")
    assert said.exit_code == 0 and len((tmp_path / "ids.txt").read_text().split()) > 10, said.output


def test_train_then_evaluate_then_segment(tiny_root, tmp_path, picture):
    out = tmp_path / "run"
    args = [
        "train",
        "--data",
        "refshapes",
        "--root",
        tiny_root,
        "--steps",
        3,
        "--images-per-batch",
        4,
        "--expressions-per-image",
        2,
        "--set",
        "backbone_weights=none",
        "--out",
        out,
        "--device",
        "cpu",
        "--lr",
        "1e-3",
        "--model",
        "baseline",
    ]
    result = refseg(*args)
    assert result.returncode == 0, result.stderr
    assert (out / "model" / "model.safetensors").exists()
    record = tmp_path / "r.json"
    result = invoke("evaluate", out / "model", "--root", tiny_root, "--split", "val", "--out", record)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (
        json.loads(record.read_text())["metrics"]["overall_iou"]["value"] >= 0
        and "overall_iou" in result.stdout
    )
    result = invoke(
        "evaluate",
        out,
        "--root",
        tiny_root,
        "--text-control",
        "shuffled",
        "--limit",
        4,
        "--out",
        tmp_path / "s.json",
    )
    assert (
        result.exit_code == 0
        and json.loads((tmp_path / "s.json").read_text())["protocol"]["text_control"] == "shuffled"
    )
    assert invoke("segment", picture, "the red car", "--model", out).exit_code == 0
    one_line(invoke("evaluate", out, "--root", tiny_root, "--split", "test"), 2, "no split 'test'")
    one_line(invoke("evaluate", out, "--root", tiny_root, "--text-control", "loud"), 2, "loud")
    one_line(invoke("train", "--data", "refshapes", "--root", tmp_path / "nothing"), 2)
    one_line(invoke("train", "--root", tiny_root, "--model", "resnet", "--out", tmp_path / "o"), 2, "resnet")
    one_line(invoke("train", "--root", tiny_root, "--set", "grids=3", "--out", tmp_path / "o"), 2, "grids")


# ---- stopping


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_evaluate_with_a_tuned_threshold_ignored_samples_and_a_comparison(tiny_root, model_folder, tmp_path):
    usual = [
        "evaluate",
        model_folder,
        "--data",
        "refshapes",
        "--root",
        tiny_root,
        "--limit",
        6,
        "--device",
        "cpu",
    ]
    assert invoke(*usual, "--out", tmp_path / "a.json", "--samples", tmp_path / "a.jsonl").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(lines) == record["metrics"]["samples"] and record["protocol"]["threshold_from"] == "fixed"
    union = sum(line["union"] for line in lines)
    assert np.isclose(
        100 * sum(line["intersection"] for line in lines) / union, record["metrics"]["overall_iou"]["value"]
    )
    (tmp_path / "wrong.json").write_text(json.dumps([[lines[0]["ref_id"], lines[0]["sent_id"]]]))
    done = invoke(
        *usual, "--out", tmp_path / "b.json", "--ignore", tmp_path / "wrong.json", "--tune-on", "val"
    )
    other = json.loads((tmp_path / "b.json").read_text())
    assert (
        done.exit_code == 0
        and other["metrics"]["samples"] == len(lines) - 1
        and "val" in other["protocol"]["threshold_from"]
    )
    same = invoke("compare", tmp_path / "a.json", tmp_path / "a.json", "--resamples", 50)
    assert same.exit_code == 0 and "overall" in same.stdout and "+0.0" in same.stdout
    one_line(invoke("compare", tmp_path / "a.json", tmp_path / "b.json"), 2, "samples")


def test_ctrl_c_is_exit_code_130(tiny_root, tmp_path):
    args = [
        sys.executable,
        "-m",
        "refseg_nb",
        "train",
        "--root",
        tiny_root,
        "--steps",
        "100000",
        "--set",
        "backbone_weights=none",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--checkpoint-every",
        "1",
    ]
    # a shell's background job ignores SIGINT, and so do its children
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heard
    )
    for _ in range(600):
        if list((tmp_path / "run").glob("checkpoint/*")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and stderr.strip().splitlines()[-1] == "refseg: stopped"
        and "Traceback" not in stderr
    )


def test_debug_keeps_the_traceback(picture, monkeypatch):
    monkeypatch.setenv("REFSEG_DEBUG", "1")
    assert isinstance(invoke("segment", picture.with_name("none.png"), "car").exception, FileNotFoundError)


def test_a_bug_keeps_its_traceback_and_says_how_to_report_it(picture, model_folder, monkeypatch):
    import refseg_nb
    from refseg_nb.models import hub

    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(hub, "load_tensors", broken)
    result = invoke("segment", picture, "the red car", "--model", model_folder)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "broadcast together" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert (
        "please report" in last
        and refseg_nb.__version__ in last
        and "the red car" in last
        and "://" not in last
    )


def test_messages_speak_the_command_lines_language():
    from refseg_nb.cli import explain
    from refseg_nb.errors import InputError

    assert explain(InputError("give split_by='umd'")) == "give --split-by 'umd'"
    assert explain(InputError("max_steps must be at least 1, got 0")) == "--steps must be at least 1, got 0"
    assert explain(InputError("use resume=False")) == "use --fresh"


def test_segment_says_what_is_wrong_with_image_and_phrase(picture, model_folder, tmp_path):
    m = ("--model", model_folder)
    one_line(invoke("segment", picture, "🐶", *m), 2, "has no word")
    one_line(invoke("segment", "https://example.org/a.jpg", "car", *m), 2, "download it first")
    os.mkfifo(tmp_path / "pipe.png")
    one_line(invoke("segment", tmp_path / "pipe.png", "car", *m), 2, "no regular file")
