"""Files and options that somebody else made, or damaged: each ends in one line and exit code 2, within ten seconds
and a gigabyte. The limits are set on a process of its own; what a fuzzer finds is held to them, too."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import enough_memory, run_limited
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from refseg_nb.cli import app
from refseg_nb.errors import RefsegError
from refseg_nb.models.hub import load_model, shipped

SECONDS, ROOM = 10, 2**30  # of processor time, so that a busy machine fails nobody; and bytes
PATIENCE = 300  # seconds on the clock, for what waits and takes no processor time


def one_line(*args, says):
    "The command ends with exit code 2 and one line that names what is wrong; in a process that may take no more."

    def called():
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        result = CliRunner().invoke(app, list(map(str, args)))
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert result.exit_code == 2, (result.exit_code, result.stderr[-1500:], result.exception)
        assert len(lines) == 1 and lines[0].startswith("refseg: "), result.stderr[-1500:]
        assert re.search(says, lines[0]), lines[0]

    run_limited(called, room=ROOM, seconds=PATIENCE)


@pytest.fixture(scope="module", autouse=True)
def imported():
    "What the commands import is there before the first of them is measured."
    import refseg_nb.data.convert
    import refseg_nb.data.fetch
    import refseg_nb.data.verify
    import refseg_nb.evaluation.protocols
    import refseg_nb.inference.requests
    import refseg_nb.training.learner  # noqa: F401
    from refseg_nb.inference.segmenter import load

    load("shnet-refshapes").segment(torch.zeros(3, 9, 9), "ball")


@pytest.fixture
def scene(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def put(path, value):
    "A change of config.json: the field at a path gets a value, or goes (`...`)."

    def change(stored):
        *outer, last = path.split(".")
        at = stored
        for name in outer:
            at = at[name]
        if value is ...:
            del at[last]
        else:
            at[last] = value
        return stored

    return change


CONFIGS = {  # name -> what becomes of the content, and what the error must name
    "a list": (lambda stored: [stored], "object with fields, not list"),
    "null": (lambda stored: None, "object with fields, not NoneType"),
    "a number": (lambda stored: 7, "not int"),
    "no format": (put("format", ...), "format None"),
    "format 2": (put("format", 2), "format 2"),
    "format as text": (put("format", "1"), "format '1'"),
    "no config": (put("config", ...), "no field 'config'"),
    "config is null": (put("config", None), "config is 'None'"),
    "config is a list": (put("config", []), "config is"),
    "no vocabulary": (put("vocabulary", ...), "no field 'vocabulary'"),
    "vocabulary is an object": (put("vocabulary", {"words": []}), "vocabulary is"),
    "vocabulary is no JSON": (put("vocabulary", "{"), "vocabulary cannot be read"),
    "vocabulary without counts": (put("vocabulary", '{"words": ["a"]}'), "vocabulary"),
    "another vocabulary": (put("vocabulary", '{"words": ["a"], "counts": [3], "min_freq": 1}'), "embedding"),
    "meta is a list": (put("meta", []), "meta is"),
    "no threshold": (put("threshold", ...), "no field 'threshold'"),
    "threshold NaN": (put("threshold", math.nan), "threshold is nan"),
    "threshold 7": (put("threshold", 7), "threshold is 7"),
    "threshold as text": (put("threshold", "0.5"), "threshold is"),
    "threshold true": (put("threshold", True), "threshold is"),
    "an import as model": (put("model", "os.system"), "no model called 'os.system'"),
    "model is a number": (put("model", 3), "model is '3'"),
    "an unknown field": (put("config.colour", "red"), "no field 'colour'"),
    "channels as text": (put("config.channels", "64"), "channels must be int"),
    "channels 2^40": (put("config.channels", 2**40), "channels is 1099511627776"),
    "channels 60,000": (put("config.channels", 60_000), "numbers|tensor|does not fit"),
    "channels 63": (put("config.channels", 63), "heads"),
    "a billion layers": (put("config.sfm_layers", 10**9), "sfm_layers is 1000000000"),
    "60,000 layers": (put("config.sfm_layers", 60_000), "only .* tensors"),
    "image_size 0": (put("config.image_size", 0), "image_size"),
    "image_size -1": (put("config.image_size", -1), "image_size"),
    "two image sizes": (put("image_size", 320), "image_size is 320 and 96"),
    "rates of 10^12": (put("config.aspp_rates", [10**12]), "aspp_rates is 1000000000000"),
    "infinite extent": (put("config.sfm_extent", math.inf), "sfm_extent is inf"),
    "an unknown backbone": (put("config.backbone", "vgg"), "no backbone called 'vgg'"),
    "backbone_stored as text": (put("backbone_stored", "no"), "backbone_stored is"),
    "a grid of 3,000": (put("config.grid", 3000), "largest map has"),
    "a grid of 0": (put("config.grid", 0), "grid must be between"),
    "forty doublings": (put("config.decoder_doublings", 40), "40 doublings need"),
    "training is a list": (put("meta.training", [1]), "meta.training is"),
    "data is a number": (put("meta.training", {"data": 7}), "meta.training.data is"),
    "max_words 0": (put("config.max_words", 0), "max_words must be at least 1"),
    "another model's fields": (put("model", "lavt"), "no field"),
    "deep": (lambda stored: json.loads("[" * 900 + "]" * 900), "object with fields, not list"),
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shipped()["shnet-refshapes"], tmp_path / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configuration_is_one_line(folder, scene, name):
    change, says = CONFIGS[name]
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    one_line("segment", scene, "the ball", "--model", folder, says=says)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": 1', "\x00", "NaN"])
def test_a_configuration_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(RefsegError, match="config.json"):
        load_model(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(folder, value):
    tensors = load_file(folder / "model.safetensors")
    name = sorted(k for k, v in tensors.items() if v.is_floating_point())[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RefsegError, match=f"{name} has values that are not finite"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header"])
def test_a_damaged_file_of_weights(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    changed = {"cut": data[:-9], "empty": b"", "text": b"hello", "header": b"\xff" * 7 + b"\x7f" + data[8:]}[
        damage
    ]
    path.write_bytes(changed)
    with pytest.raises(RefsegError, match="model.safetensors cannot be read"):
        load_model(folder)


def test_a_good_folder_still_loads(folder):
    model, vocabulary, meta = load_model(folder)
    assert (
        torch.isfinite(next(model.parameters())).all() and len(vocabulary) > 50 and 0 < meta["threshold"] < 1
    )


# ---- a folder that a fuzzer damages

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD = json.loads((shipped()["shnet-refshapes"] / "config.json").read_text())
FIELDS = sorted(
    [*GOOD, *(f"config.{name}" for name in GOOD["config"]), *(f"meta.{name}" for name in GOOD["meta"])]
)


def refused_or_read(folder):
    "A folder is read, or refused with an error that is the user's; never with another, nor for want of memory."
    try:
        load_model(folder)
    except RefsegError as error:
        enough_memory(error)
        assert "\n" not in str(error).strip()


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return shutil.copytree(shipped()["shnet-refshapes"], tmp_path_factory.mktemp("fuzz") / "model")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_fuzz_configurations(copied, changes):
    stored = json.loads(json.dumps(GOOD))
    for name, value in changes.items():
        try:
            put(name, value)(stored)
        except (KeyError, TypeError):
            pass  # an outer field is no object any more
    (copied / "config.json").write_text(json.dumps(stored))
    refused_or_read(copied)
    (copied / "config.json").write_text(json.dumps(GOOD))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["config.json", "model.safetensors"]),
    at=st.integers(0, 6000),
    junk=st.binary(max_size=9),
)
def test_fuzz_bytes(copied, file, at, junk):
    path = copied / file
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        refused_or_read(copied)
    finally:
        path.write_bytes(whole)


# ---- data sets


def refer_files(root, segmentation=((2, 2, 9, 2, 9, 9),), instances=None, refs=None):
    "RefCOCO's two files for one image of 20 x 20 pixels, written from the format's description."
    folder, images = root / "refcoco", root / "images" / "mscoco" / "images" / "train2014"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    name = "COCO_train2014_000000000001.jpg"
    Image.new("RGB", (20, 20)).save(images / name)
    record = {
        "images": [{"id": 1, "file_name": name, "height": 20, "width": 20}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "segmentation": [list(p) for p in segmentation]}
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    sentence = {"sent_id": 3, "sent": "the box", "raw": "The box", "tokens": ["the", "box"]}
    ref = {
        "ref_id": 2,
        "ann_id": 5,
        "image_id": 1,
        "category_id": 1,
        "split": "train",
        "sentences": [sentence],
        "sent_ids": [3],
        "file_name": "x_5.jpg",
    }
    (folder / "instances.json").write_text(json.dumps(record) if instances is None else instances)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref], 2) if refs is None else refs)
    return root


BOMB = b"\x80\x02]r" + struct.pack("<I", 2**27) + b"."  # an empty list as object number 134,217,728
CALL = b"cos\nsystem\n(S'true'\ntR."
PICKLES = {
    "a memo bomb": (BOMB, "numbers an object 134,217,728"),
    "a call": (CALL, "asks for the Python object os.system"),
    "cut": (pickle.dumps([{"ref_id": 1}])[:-2], "not a readable pickle"),
    "empty": (b"", "not a readable pickle"),
    "text": (b"hello", "not a readable pickle"),
    "a number": (pickle.dumps(5), "holds int, not a list"),
    "a list of numbers": (pickle.dumps([1, 2]), "not a list of dicts"),
    "no fields": (pickle.dumps([{}]), "has no 'ref_id'"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_one_line(tmp_path, name):
    content, says = PICKLES[name]
    root = refer_files(tmp_path / "data", refs=content)
    one_line("data", "info", "refcoco", "--root", root, "--split-by", "unc", says=says)


INSTANCES = {
    "null": ("null", "holds NoneType"),
    "deep": ("[" * 100_000, "not readable as JSON"),
    "cut": ('{"images": [', "not readable as JSON"),
    "no images": ('{"annotations": [], "categories": []}', "has no 'images'"),
    "a huge image": (
        '{"images": [{"id": 1, "file_name": "a", "height": 65000, "width": 65000}], "annotations": [],'
        ' "categories": []}',
        "65000 x 65000 pixels large",
    ),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_hostile_instances_are_one_line(tmp_path, name):
    content, says = INSTANCES[name]
    root = refer_files(tmp_path / "data", instances=content)
    one_line("data", "info", "refcoco", "--root", root, "--split-by", "unc", says=says)


ZIGZAG = [v for i in range(40_000) for v in (0 if i % 2 else 20, i % 20)]
POLYGONS = {
    "infinite": ([[0, 0, math.inf, 0, 5, 5]], "far outside"),
    "not a number": ([[0, 0, math.nan, 0, 5, 5]], "not a number"),
    "28 of 80,000 numbers": ([ZIGZAG] * 28, "outline is [\\d,]+ pixels long"),
    "two points": ([[0, 0, 5, 5]], "at least three points"),
    "a text": ([["a"] * 6], "not a number"),
}


@pytest.mark.parametrize("name", POLYGONS)
def test_hostile_polygons_are_one_line(tmp_path, name):
    polygons, says = POLYGONS[name]
    root = refer_files(tmp_path / "data", polygons)
    args = ("--root", root, "--split-by", "unc", "--out", tmp_path / "stores", "--workers", 1)
    one_line("data", "store", "refcoco", *args, says=says)


def test_an_honest_outline_is_no_zigzag(tmp_path):
    "The limit is far above what a person draws: a spiral through every fourth row, there and back, passes."
    from refseg_nb.data.refer import ReferError, decode_segmentation

    rows = [v for y in range(0, 100, 4) for v in (0, y, 99, y, 99, y + 2, 0, y + 2)]
    assert decode_segmentation([rows], 100, 100).any()
    with pytest.raises(ReferError, match="pixels long"):
        decode_segmentation([rows * 20], 100, 100)


# ---- pipes where a file is expected: nobody waits for the other end


def pipe(path):
    os.mkfifo(path)
    return path


PIPES = {
    "an image": lambda t, s: (("segment", pipe(t / "p.png"), "the ball"), "no regular file"),
    "a batch": lambda t, s: (("segment", "--batch", pipe(t / "p"), "--out", t / "o"), "p"),
    "a configuration": lambda t, s: (("train", "--config", pipe(t / "p.json")), "no configuration file"),
    "a manifest": lambda t, s: (("data", "fetch", "glove", "--manifest", pipe(t / "p.toml")), "no manifest"),
    "a model": lambda t, s: (("segment", s, "the ball", "--model", pipe(t / "p")), "no model at"),
    "own data": lambda t, s: (("data", "check", pipe(t / "p.jsonl")), "p.jsonl"),
    "data to convert": lambda t, s: (("data", "convert", pipe(t / "p.jsonl"), "--root", t / "d"), "p.jsonl"),
    "a record": lambda t, s: (("compare", pipe(t / "a.json"), t / "a.json"), "a.json"),
    "word vectors": lambda t, s: (
        ("train", *train_of(t), "--vectors", pipe(t / "v.txt")),
        "v.txt: no such file, and no name of a vector set",
    ),
    "samples to ignore": lambda t, s: (
        ("evaluate", "shnet-refshapes", "--root", DATA["root"], "--ignore", pipe(t / "i.json")),
        "i.json",
    ),
}
DATA = {}


@pytest.fixture(autouse=True)
def tiny(tiny_root):
    DATA["root"] = tiny_root


def train_of(folder, **more):
    "Options of a run of a few steps, which most mistakes end before its first."
    given = {
        "root": DATA["root"],
        "out": folder / "run",
        "steps": 3,
        "device": "cpu",
        "val-split": "none",
        "limit": 8,
    }
    return [str(x) for name, value in (given | more).items() for x in (f"--{name}", value)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_one_line(tmp_path, scene, name):
    args, says = PIPES[name](tmp_path, scene)
    one_line(*args, says=says)


# ---- options

OPTIONS = {
    "an infinite learning rate": (["--lr", "inf"], "lr"),
    "a learning rate of NaN": (["--lr", "nan"], "lr"),
    "a learning rate of 10^30": (
        ["--lr", "1e30"],
        "lower lr, or set clip; (no checkpoint had been written|the last good checkpoint is)|not finite",
    ),
    "no learning rate": (["--lr", "0"], "lr must be positive"),
    "a threshold of NaN": (["--threshold", "nan"], "threshold"),
    "a negative image size": (["--set", "image_size=-1"], "image_size must be at least 1"),
    "an image size in letters": (["--set", "image_size=abc"], "image_size must be int"),
    "an unknown field": (["--set", "colour=red"], "no field 'colour'"),
    "no value": (["--set", "grid"], "FIELD=VALUE"),
    "a grid of 0": (["--set", "grid=0"], "grid must be between"),
    "channels that no head divides": (["--set", "channels=63"], "heads"),
    "a grid of 10^6": (["--set", "grid=1000000"], "grid must be between"),
    "channels of 10^9": (["--set", "channels=1000000000"], "numbers|cannot be built"),
    "an image size of 10^6": (["--set", "image_size=1000000"], "image|map"),
    "an unknown model": (["--model", "os.system"], "no model called 'os.system'"),
    "an unknown preset": (["--preset", "huge"], "no preset called 'huge'"),
    "an unknown device": (["--device", "tpu9"], "device 'tpu9' is not available"),
    "a GPU that is not there": (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    "no threads": (["--threads", "0"], "threads must be at least 1"),
    "a million threads": (["--threads", "1000000"], "threads"),
    "negative readers": (["--num-workers", "-1"], "num.workers"),
    "a million readers": (["--num-workers", "1000000"], "num.workers"),
    "no epochs": (["--epochs", "0"], "epochs must be at least 1"),
    "a batch of one": (["--batch-size", "1"], "batch.size must be at least 2"),
    "a batch in both units": (["--batch-size", "8", "--images-per-batch", "2"], "exclude each other"),
    "a negative warm-up": (["--warmup", "-1"], "warmup"),
    "a negative clip": (["--clip", "-1"], "clip"),
    "a clip of NaN": (["--clip", "nan"], "clip"),
    "a decay of NaN": (["--weight-decay", "nan"], "weight.decay"),
    "a power of NaN": (["--power", "nan"], "power"),
    "a Dice weight of NaN": (["--loss", "bce+dice", "--dice-weight", "nan"], "dice.weight"),
    "class weights of NaN": (["--class-weights", "nan", "1"], "class.weights"),
    "a mask of 10^6 pixels": (["--mask-size", "1000000"], "mask.size"),
    "a data set in the parent folder": (["--data", "../../etc"], "etc"),
    "a split that is not there": (["--train-split", "rehearsal"], "rehearsal"),
    "word vectors that are not there": (["--vectors", "glove.9B.1d"], "glove.9B.1d"),
    "a start that is not there": (["--start", "nowhere"], "no model at nowhere"),
    "a limit of 0": (["--limit", "0"], "limit must be at least 1"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_hostile_option_of_train_is_one_line(tmp_path, name, monkeypatch):
    options, says = OPTIONS[name]
    monkeypatch.chdir(tmp_path)
    one_line("train", *train_of(tmp_path), *options, says=says)


OTHERS = {
    "no phrase": (["segment", "{scene}", "  "], "phrase is empty"),
    "a phrase of a million letters": (
        ["segment", "{scene}", "{long}"],
        "1,000,000 characters: give at most 10,000",
    ),
    "a folder as image": (["segment", "{folder}", "the ball"], "is a folder"),
    "an address as image": (["segment", "http://x/a.png", "the ball"], "is a web address"),
    "a threshold of NaN": (
        ["evaluate", "shnet-refshapes", "--root", "{root}", "--threshold", "nan"],
        "threshold",
    ),
    "a limit of -1": (["evaluate", "shnet-refshapes", "--root", "{root}", "--limit", "-1"], "limit"),
    "an unknown protocol": (
        ["evaluate", "shnet-refshapes", "--root", "{root}", "--protocol", "x"],
        "protocol",
    ),
    "a store of 10^6 pixels": (
        ["data", "store", "--root", "{root}", "--image-size", "1000000"],
        "image.size|a store of refshapes at 1000000 px takes up to",
    ),
    "a store of -1 pixels": (["data", "store", "--root", "{root}", "--image-size", "-1"], "image.size"),
    "a scene of 10^6 pixels": (
        ["data", "make", "--root", "{folder}/d", "--size", "tiny", "--resolution", "1000000"],
        "size is 1000000",
    ),
    "minus one process": (
        ["data", "make", "--root", "{folder}/d", "--size", "tiny", "--workers", "-1"],
        "workers",
    ),
    "a size that is unknown": (["data", "make", "--root", "{folder}/d", "--size", "colossal"], "colossal"),
    "no draws": (["compare", "{folder}/a.json", "{folder}/b.json", "--resamples", "0"], "a.json|resamples"),
    "images that are unknown": (["data", "fetch", "glove", "--images", "some"], "images"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_hostile_option_of_other_commands_is_one_line(tmp_path, scene, name, monkeypatch):
    args, says = OTHERS[name]
    monkeypatch.chdir(tmp_path)
    known = {"scene": scene, "folder": tmp_path, "root": DATA["root"], "long": "w" * 1_000_000}
    one_line(*(arg.format(**known) for arg in args), says=says)


def test_an_unpackaged_tracker_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    one_line(
        "train", *train_of(tmp_path), "--tracker", "wandb", says="needs the package wandb.*refseg_nb.wandb"
    )
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_diverges_keeps_and_names_its_last_good_checkpoint(tmp_path):
    "Ten steps as they should be, then the rate of the next ones goes through the roof."
    from refseg_nb.training.checkpoint import checkpoints, load_checkpoint

    good = CliRunner().invoke(app, ["train", *train_of(tmp_path, steps=2)])
    assert good.exit_code == 0, good.output
    [kept] = checkpoints(tmp_path / "run" / "checkpoint")[-1:]
    # the same run, longer, from a state whose learning rate somebody has changed
    state = json.loads((kept / "state.json").read_text())
    state["config"] |= {"lr": 1e30, "max_steps": 9}
    (kept / "state.json").write_text(json.dumps(state))
    one_line(
        "train",
        *train_of(tmp_path, steps=9, lr=1e30),
        says=r"(lower lr, or set clip; |not finite.*)the last good checkpoint is step-\d+ in .*checkpoint",
    )
    found, last = (
        load_checkpoint(tmp_path / "run" / "checkpoint"),
        checkpoints(tmp_path / "run" / "checkpoint")[-1],
    )
    assert int(kept.name[5:]) <= found["state"]["step"] == int(last.name[5:])
    assert all(torch.isfinite(v).all() for v in found["model"].values() if v.is_floating_point())


# ---- no network


def without_network(monkeypatch, look_up):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("socket.getaddrinfo", look_up)


def no_name(*args, **more):
    import socket

    raise socket.gaierror(-3, "Temporary failure in name resolution")


def test_fetch_without_a_network_fails_at_once_and_shows_the_way_by_hand(tmp_path, monkeypatch):
    from refseg_nb.data.fetch import load_manifest

    without_network(monkeypatch, no_name)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} seconds"))
    result = CliRunner().invoke(
        app, ["data", "fetch", "refcoco", "--root", str(tmp_path)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 1 and "there is no network here" in result.stdout, result.output
    spec = load_manifest().files["refcoco.zip"]
    for url in spec.urls:
        assert url in result.stdout, "a person can try the address in a browser"
    assert str(tmp_path / spec.to) in result.stdout and "By hand:" in result.stdout


def test_a_name_lookup_that_hangs_is_not_waited_for(monkeypatch):
    import threading
    import time

    from refseg_nb.data.fetch import network_fault

    without_network(monkeypatch, lambda *args, **more: threading.Event().wait(60))
    start = time.monotonic()
    assert "there is no network here" in network_fault(
        ["https://a.invalid/x", "https://b.invalid/x"], seconds=0.2
    )
    assert time.monotonic() - start < 30
    without_network(monkeypatch, lambda host, port: [host])
    assert network_fault(["https://a.invalid/x"]) is None and network_fault(["gdrive:abc"]) is None


def test_an_address_whose_name_is_not_found_is_asked_once(tmp_path, monkeypatch):
    from refseg_nb.data.fetch import FileSpec, NoNetwork, RetryPolicy, Unavailable, download, receive

    without_network(monkeypatch, no_name)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} seconds"))
    spec = FileSpec("a", "a", ("https://a.invalid/a", "https://b.invalid/a"))
    with pytest.raises(Unavailable, match="a.invalid is not found.*b.invalid is not found"):
        download(spec, tmp_path / "a", RetryPolicy(attempts=5, pause=60))
    assert issubclass(NoNetwork, Unavailable) and receive and list(tmp_path.iterdir()) == []


def test_fetch_takes_a_manifest(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[files."a.zip"]\nto = "a.zip"\nurls = ["https://mirror.invalid/a.zip"]\nsize = 5\nlicence = "-"\n'
        'cite = "-"\nby_hand = "Ask me for a.zip and put it at {to}."\n[sets.mine]\nfiles = ["a.zip"]\n'
    )
    args = ["data", "fetch", "mine", "--manifest", str(file), "--root", str(tmp_path / "data"), "--dry-run"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0 and "mirror.invalid" in result.stdout, result.output
    one_line(
        "data", "fetch", "refcoco", "--manifest", file, says="nothing is known of 'refcoco'; there are mine"
    )
    file.write_text("[files")
    one_line("data", "fetch", "mine", "--manifest", file, says="not readable as TOML")
