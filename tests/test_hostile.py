"""Model folders that somebody else made, or damaged: each ends in one clear error, soon and without much memory."""

import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from refseg_nb.errors import RefsegError
from refseg_nb.models.hub import load_model, shipped


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
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shipped()["shnet-refshapes"], tmp_path / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configuration_is_one_error(folder, name):
    change, said = CONFIGS[name]
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    start = time.perf_counter()
    with pytest.raises(RefsegError, match=said) as error:
        load_model(folder)
    assert time.perf_counter() - start < 10 and "\n" not in str(error.value).strip()


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


def test_no_hostile_folder_takes_much_memory(folder, tmp_path):
    "In a process that may take 4 GB in all, torch included."
    resource = pytest.importorskip("resource")
    assert resource
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for name in ("channels 2^40", "channels 60,000", "a billion layers", "60,000 layers", "rates of 10^12"):
        path.write_text(json.dumps(CONFIGS[name][0](json.loads(json.dumps(good)))))
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
            "from refseg_nb.errors import RefsegError\n"
            "from refseg_nb.models.hub import load_model\n"
            "try: load_model(sys.argv[1])\n"
            "except RefsegError: sys.exit(7)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 7, (name, done.stderr[-500:])


def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    from PIL import Image

    (folder / "config.json").write_text("[]")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    call = [sys.executable, "-m", "refseg_nb", "segment", tmp_path / "a.png", "the ball", "--model", folder]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "config.json must hold an object" in done.stderr


def test_a_good_folder_still_loads(folder):
    model, vocabulary, meta = load_model(folder)
    assert (
        torch.isfinite(next(model.parameters())).all() and len(vocabulary) > 50 and 0 < meta["threshold"] < 1
    )
