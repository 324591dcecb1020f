"""Own data as JSONL, and every layout that circulates: each problem named by line and field, masks equal
pixel for pixel, all or nothing."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from limited import enough_memory
from PIL import Image
from pycocotools import mask as coco_mask
from toy_refer import SMALL, make_toy

from refseg_nb.data import convert as module
from refseg_nb.data.batches import RISDataset
from refseg_nb.data.convert import (
    SCHEMA,
    Conversion,
    ConvertError,
    Problem,
    convert,
    convert_jsonl,
    detect_layout,
    validate_jsonl,
)
from refseg_nb.data.refer import Refer, decode_segmentation, write_refer
from refseg_nb.data.referit import ReferIt, open_data, write_referit
from refseg_nb.errors import MissingExtra

H, W = 30, 40


def blob(seed):
    return np.random.default_rng(seed).random((H, W)) < 0.3


def packed(mask) -> dict:
    return {
        "size": list(mask.shape),
        "counts": coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode(),
    }


def good(**changes) -> dict:
    line = {
        "image": "photos/a.png",
        "expression": "The red  ball",
        "mask": "masks/a.png",
        "split": "train",
    } | changes
    return {key: value for key, value in line.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """Pictures and masks; `own.jsonl` is for the test to write."""
    home = tmp_path / "mine"
    for name in ("photos", "masks"):
        (home / name).mkdir(parents=True)
    for i, letter in enumerate("abc"):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)).save(
            home / f"photos/{letter}.png"
        )
        Image.fromarray(blob(i)).save(home / f"masks/{letter}.png")
    return home


def write(folder, *lines):
    path = folder / "own.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def listed(root) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*")) if root.exists() else []


# ---------------------------------------------------------------- the schema and the problems
def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)
    fits = Draft202012Validator(SCHEMA).is_valid
    assert fits(good()) and fits(good(mask=packed(blob(0))))
    assert fits(
        good(expression=None, expressions=["a", "a"], mask=[[1, 1, 5.5, 1, 5, 5]], category="ball", id=3)
    )

    def descriptions(part):
        if "type" in part:
            assert part["description"]
        for inner in [*part.get("properties", {}).values(), *([part["items"]] if "items" in part else [])]:
            descriptions(inner)

    descriptions(SCHEMA)


def test_a_good_file_has_no_problem(folder):
    path = write(
        folder,
        good(),
        good(image="photos/b.png", mask=packed(blob(1)), split="val"),
        good(image="photos/c.png", mask=[[0, 0, W, 0, W, H]], split="testA"),
        b"",
        good(expressions=["a", "a"], expression=None, category="ball", id="x"),
    )
    assert validate_jsonl(path) == validate_jsonl(str(path)) == validate_jsonl(path, images=False) == []
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert validate_jsonl(path) == []


MISTAKES = {
    "no object": ([1, 2], "", "must be an object"),
    "null": (None, "", "is None"),
    "no json": (b'{"image": ', "", "is not JSON"),
    "nan": (b'{"image": NaN}', "", "NaN is no number"),
    "not utf-8": (b'{"image": "\xe9"}', "", "is not UTF-8 .byte 12"),
    "twice": (b'{"image": "a", "image": "b"}', "", "'image' is there twice"),
    "nested": (b"[" * 100000, "", "nested too deeply|is not JSON"),
    "digits": (b'{"id": 1' + b"0" * 5000 + b"}", "", "is not JSON"),
    "no image": (good(image=None), "image", "is missing"),
    "no split": (good(split=None), "split", "is missing"),
    "no mask": (good(mask=None), "mask", "is missing"),
    "no expression": (good(expression=None), "expression", "is needed, or expressions"),
    "both": (good(expressions=["a"]), "expression", "not both"),
    "unknown": (good(colour="red"), "'colour'", "is not a field .*expressions"),
    "image type": (good(image=3), "image", "is 3; it must be the path"),
    "image empty": (good(image=""), "image", "must be the path"),
    "expression empty": (good(expression=" \n"), "expression", "must be a phrase"),
    "expressions": (good(expression=None, expressions=["a", ""]), r"expressions\[1\]", "must be a phrase"),
    "expressions empty": (good(expression=None, expressions=[]), "expressions", "at least one"),
    "expressions text": (good(expression=None, expressions="a"), "expressions", "must be a list"),
    "split": (good(split="train/x"), "split", "must be a name"),
    "split newline": (good(split="train\n"), "split", "must be a name"),
    "category": (good(category=""), "category", "must be the kind"),
    "id": (good(id=[1]), "id", "must be a name or number"),
    "mask type": (good(mask=5), "mask", "must be the path of a PNG"),
    "polygon short": (good(mask=[[1, 2, 3, 4]]), r"mask\[0\]", "three points"),
    "polygon odd": (good(mask=[[1, 2, 3, 4, 5, 6, 7]]), r"mask\[0\]", "has 7 numbers"),
    "polygon text": (good(mask=[[1, 2, 3, 4, "5", 6]]), r"mask\[0\]\[4\]", "must be a coordinate"),
    "polygon flat": (good(mask=[1, 2, 3, 4, 5, 6]), r"mask\[0\]", "must be a polygon"),
    "polygon outside": (
        good(mask=[[1, 1, 9, 1, 9, 9], [1, 2, 3, 4, 5, 31]]),
        r"mask\[1\]\[5\]",
        "is 31, outside of the image",
    ),
    "polygon infinite": (
        json.dumps(good(mask=[[1, 1, 7, 1, 9, 9]])).replace("7", "1e999").encode(),
        r"mask\[0\]\[2\]",
        "is inf, outside",
    ),
    "polygon huge": (good(mask=[[1, 1, 10**400, 1, 9, 9]]), r"mask\[0\]\[2\]", "outside of the image"),
    "polygon empty": (good(mask=[[1, 1, 1, 1, 1, 1]]), "mask", "is empty"),
    "polygon long": (good(mask=[[0, 0, W, H] * 2000]), r"mask\[0\]", "far too long"),
    "no polygon": (good(mask=[]), "mask", "must be the path"),
    "runs": (good(mask={"size": [H, W]}), "mask.counts", "is missing"),
    "runs unknown": (good(mask={"size": [H, W], "counts": "1", "x": 1}), "mask.'x'", "is not a field"),
    "runs size": (
        good(mask={"size": [W, H], "counts": [H * W]}),
        "mask.size",
        r"is \[40, 30\], but the image's",
    ),
    "runs size type": (good(mask={"size": [W, 0], "counts": [H * W]}), r"mask.size\[1\]", "whole number"),
    "runs sum": (good(mask={"size": [H, W], "counts": [5, 5]}), "mask.counts", "add up to 30 x 40"),
    "runs sign": (good(mask={"size": [H, W], "counts": [-5, 5]}), r"mask.counts\[0\]", "0 or more"),
    "runs text": (good(mask={"size": [H, W], "counts": "no!"}), "mask.counts", "is not a packed string"),
    "runs cut": (
        good(mask={"size": [H, W], "counts": packed(blob(0))["counts"][:-9]}),
        "mask.counts",
        "add up to 30 x 40",
    ),
    "runs endless": (
        good(mask={"size": [H, W], "counts": "o" * 10**6}),
        "mask.counts",
        "is not a packed string",
    ),
    "runs empty": (good(mask={"size": [H, W], "counts": [H * W]}), "mask", "is empty"),
    "image missing": (good(image="photos/z.png"), "image", "does not exist: 'photos/z.png'"),
    "image outside": (good(image="../secret.png"), "image", "leads out of the folder"),
    "image absolute": (good(image="/etc/hostname"), "image", "leads out of the folder"),
    "image link": (good(image="photos/out.png"), "image", "leads out of the folder"),
    "image folder": (good(image="photos"), "image", "does not exist"),
    "image path": (good(image="photos/\0.png"), "image", "no path that can be used"),
    "image long": (good(image="a" * 5000), "image", "no path that can be used|does not exist"),
    "image surrogate": (good(image="\ud800.png"), "image", "no path that can be used|does not exist"),
    "image cut": (good(image="photos/cut.png"), "image", "cannot be decoded"),
    "image text": (good(image="own.jsonl"), "image", "is not a JPEG or PNG"),
    "image bomb": (
        good(image="photos/bomb.png"),
        "image",
        "at most 67,108,864 are read|cannot be decoded .DecompressionBomb",
    ),
    "mask missing": (good(mask="masks/z.png"), "mask", "does not exist"),
    "mask outside": (good(mask="../masks/z.png"), "mask", "leads out of the folder"),
    "mask size": (good(mask="masks/small.png"), "mask", "is 10 x 12 pixels, but its image is 30 x 40"),
    "mask empty": (good(mask="masks/empty.png"), "mask", "is empty"),
    "mask colour": (good(mask="photos/a.png"), "mask", "has the channels RGB"),
    "mask jpeg": (good(mask="masks/a.jpg"), "mask", "is not a PNG"),
    "mask grey": (good(mask="masks/grey.png"), "mask", "more than two values"),
    "mask bomb": (
        good(mask="photos/bomb.png"),
        "mask",
        "at most 67,108,864 are read|cannot be decoded .DecompressionBomb",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_named_by_line_and_field(folder, name):
    line, field, says = MISTAKES[name]
    Image.fromarray(blob(9)).save(folder.parent / "secret.png")
    (folder / "photos/out.png").symlink_to(folder.parent / "secret.png")
    (folder / "photos/cut.png").write_bytes((folder / "photos/a.png").read_bytes()[:-400])
    (folder / "photos/bomb.png").write_bytes(png_bomb(60000, 60000))
    Image.new("L", (12, 10), 1).save(folder / "masks/small.png")
    Image.new("L", (W, H)).save(folder / "masks/empty.png")
    Image.fromarray(blob(0)).convert("L").save(folder / "masks/a.jpg")
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(folder / "masks/grey.png")
    path = write(folder, good(), line, good(image="photos/b.png"))
    problems = validate_jsonl(path)
    assert [p.line for p in problems] == [2] and problems[0].level == "error", problems
    assert re.fullmatch(field, problems[0].field) and re.search(says, problems[0].message), problems[0]
    text = str(problems[0])
    assert (
        text.startswith(f"line 2, {problems[0].field} " if field else "line 2 ")
        and "\n" not in text
        and len(text) < 300
    )
    before = listed(folder.parent)
    with pytest.raises(ConvertError, match=r"own\.jsonl: 1 problem: line 2") as caught:
        convert_jsonl(path, folder.parent / "data", "own")
    assert caught.value.problems == problems and listed(folder.parent) == before


def png_bomb(width, height) -> bytes:
    """A PNG whose header claims far more pixels than its few bytes hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_all_problems_in_one_pass(folder):
    path = write(
        folder,
        good(expression=""),
        b"{",
        good(image="photos/z.png", mask="masks/z.png"),
        good(image=1, mask=2, split=3),
        good(mask=[[1, 2]]),
    )
    found = [(p.line, p.field) for p in validate_jsonl(path)]
    assert found == [
        (1, "expression"),
        (2, ""),
        (3, "image"),
        (3, "mask"),
        (4, "image"),
        (4, "mask"),
        (4, "split"),
        (5, "mask[0]"),
    ]


def test_what_lines_say_together(folder):
    path = write(
        folder,
        good(id=1),
        good(image="photos/b.png", split="val"),
        good(id="1"),
        good(id=1),
        good(image="photos/../photos/a.png", split="val"),
    )
    problems = validate_jsonl(path)
    assert [(p.line, p.field, p.level) for p in problems] == [(4, "id", "error"), (5, "image", "warning")]
    assert (
        "that of line 1" in problems[0].message and "also in the split train (line 1)" in problems[1].message
    )
    [problem] = validate_jsonl(write(folder, good(split="test")))
    assert problem == Problem(
        0, "split", "is never 'train' (there is test): the data can only be tested on", "warning"
    ) and "(warning)" in str(problem)
    assert [str(p) for p in validate_jsonl(write(folder, b"", b"  "))] == ["the file holds no line"]
    assert convert_jsonl(write(folder, good(split="test")), folder.parent / "data", "own").splits == ["test"]


def test_a_turned_photograph_is_a_warning(folder):
    image, exif = Image.open(folder / "photos/a.png"), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "photos/t.jpg", exif=exif)
    [problem] = validate_jsonl(write(folder, good(image="photos/t.jpg")))
    assert (problem.line, problem.field, problem.level) == (
        1,
        "image",
        "warning",
    ) and "EXIF" in problem.message


def test_without_images_no_file_is_opened(folder):
    path = write(
        folder,
        good(image="photos/z.png"),
        good(mask="masks/z.png"),
        good(mask=[[0, 0, 999, 0, 9, 9]]),
        good(image="../z.png"),
        good(expression=""),
    )
    assert [(p.line, p.field) for p in validate_jsonl(path, images=False)] == [
        (4, "image"),
        (5, "expression"),
    ]


def test_many_problems_are_counted(folder):
    path = write(folder, *[b"{"] * 30, good())
    problems = validate_jsonl(path, most=10)
    assert len(problems) == 11 and problems[-1] == Problem(0, "", "has 20 problems more")
    # of one line the first
    assert len(validate_jsonl(write(folder, good(expression=None, expressions=[""] * 10000)))) == 20
    # of a list of numbers one
    assert [p.field for p in validate_jsonl(write(folder, good(mask=[["x"] * 9, ["y"] * 9])))] == [
        "mask[0][0]",
        "mask[1][0]",
    ]


def test_memory_is_bounded(folder):
    """A line of 40 MB, a picture that claims 60,000 x 60,000 pixels, a thousand outlines across the picture."""
    (folder / "photos/bomb.png").write_bytes(png_bomb(60000, 60000))
    path = write(
        folder,
        b'{"image": "' + b"a" * 40 * 2**20 + b'"}',
        good(image="photos/bomb.png"),
        good(mask=[[0, 0, W, 0, W, H]] * 1000),
        good(),
        good(mask=[[0, 0, 1, 1, 0, 1]] * 1001),
    )
    tracemalloc.start()
    problems = validate_jsonl(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(p.line, p.field) for p in problems] == [(1, ""), (2, "image"), (3, "mask[63]"), (5, "mask")]
    assert "longer than 4,194,304 bytes" in problems[0].message and peak < 20 * 2**20


def test_arguments(folder):
    with pytest.raises(FileNotFoundError, match=r"z\.jsonl: no such file"):
        validate_jsonl(folder / "z.jsonl")
    with pytest.raises(FileNotFoundError, match="mine: no such file"):
        validate_jsonl(folder)
    path, data = write(folder, good()), folder.parent / "data"
    for name in ("refcoco", "refcoco+", "refcocog", "refclef", "referit", "refshapes"):
        with pytest.raises(ValueError, match="published data set"):
            convert_jsonl(path, data, name)
    for name in ("", "a/b", "..", "images", ".x", "a" * 70, "x\n"):
        with pytest.raises(ValueError, match="cannot be the name"):
            convert_jsonl(path, data, name)
    with pytest.raises(ValueError, match="'link' or 'copy'"):
        convert_jsonl(path, data, "own", images="move")
    assert not data.exists()


# ---------------------------------------------------------------- masks and conversion
def test_what_counts_as_foreground(folder):
    """Not 0 is the object, in every mode with one channel; a palette's colours do not count."""
    mask = blob(5)
    palette = Image.fromarray(mask.astype(np.uint8) * 7)
    palette.putpalette([255, 255, 255] + [0, 0, 0] * 7)
    pictures = {
        "one": Image.fromarray(mask),
        "low": Image.fromarray(mask.astype(np.uint8)),
        "high": Image.fromarray(mask.astype(np.uint8) * 255),
        "sixteen": Image.fromarray(mask.astype(np.uint16) * 40000),
        "palette": palette,
        "full": Image.new("L", (W, H), 255),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"masks/{name}.png")
    own = convert_jsonl(
        write(folder, *(good(mask=f"masks/{name}.png", category=name) for name in pictures)),
        folder.parent / "data",
        "own",
    )
    assert list(own.categories.values()) == list(pictures)
    for ref, name in zip(own.refs, pictures, strict=True):
        assert (own.mask(ref.ann_id) == (mask if name != "full" else True)).all(), name


def test_masks_come_back_pixel_for_pixel(folder):
    rng, lines, want = np.random.default_rng(0), [], []
    for i in range(40):
        mask, kind = rng.random((H, W)) < rng.random(), i % 4
        mask[0, 0] = True
        if kind == 0:
            Image.fromarray(mask).save(folder / f"masks/{i}.png")
            given_as = f"masks/{i}.png"
        elif kind == 1:
            given_as = packed(mask)
        elif kind == 2:
            flat = mask.T.ravel()
            given_as = {
                "size": [H, W],
                "counts": [0, *np.diff([0, *np.flatnonzero(np.diff(flat)) + 1, H * W]).tolist()],
            }
        else:
            polygons = [
                np.stack([rng.uniform(0, W, 5), rng.uniform(0, H, 5)], 1).ravel().round(2).tolist()
                for _ in range(3)
            ]
            given_as, mask = polygons, np.any([decode_segmentation([p], H, W) for p in polygons], axis=0)
        lines.append(good(mask=given_as, image=f"photos/{'abc'[i % 3]}.png", expression=f"number {i}"))
        want.append(mask)
    own = convert_jsonl(write(folder, *lines), folder.parent / "data", "own")
    assert [s.text for s in own.samples("train")] == [f"number {i}" for i in range(40)]
    for sample, mask in zip(own.samples("train"), want, strict=True):
        annotation = own.annotations[sample.ann_id]
        assert (own.mask(sample.ann_id) == mask).all() and annotation["area"] == mask.sum()
        x, y, w, h = annotation["bbox"]
        box = np.zeros((H, W), dtype=bool)
        box[y : y + h, x : x + w] = True
        assert (
            not (mask & ~box).any()
            and mask[y].any()
            and mask[:, x].any()
            and mask[y + h - 1].any()
            and mask[:, x + w - 1].any()
        )


def test_lines_of_one_object_become_one_ref(folder):
    same = [
        good(),
        good(expression="THE RED  ball", id=7),
        good(mask=packed(blob(0)), expression=None, expressions=["x", "x"]),
    ]
    other = [good(category="ball"), good(split="val"), good(image="photos/b.png"), good(mask="masks/b.png")]
    own = convert_jsonl(write(folder, *same, *other), folder.parent / "data", "own")
    assert [[s.sent for s in ref.sentences] for ref in own.refs] == [["the red ball"] * 2 + ["x", "x"]] + [
        ["the red ball"]
    ] * 4
    assert [s.raw for s in own.refs[0].sentences] == [
        "The red  ball",
        "THE RED  ball",
        "x",
        "x",
    ] and own.refs[0].sentences[0].tokens == ("the", "red", "ball")
    assert (
        [ref.split for ref in own.refs] == ["train", "train", "val", "train", "train"]
        and len(own.annotations) == 4
        and len(own.images) == 2
    )
    assert sorted(own.categories.values()) == ["ball", "object"] and own.split_by == "own"
    ids = [s.sent_id for ref in own.refs for s in ref.sentences]
    assert len(ids) == len(set(ids)) == 8
    raw = pickle.loads((own.folder / "refs(own).p").read_bytes())
    assert [s.get("source_id") for s in raw[0]["sentences"]] == [None, 7, None, None]


@pytest.mark.parametrize("images", ["link", "copy", "no links here"])
def test_pictures_are_linked_or_copied(folder, images, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    if images == "no links here":
        monkeypatch.setattr(module.os, "link", refuse)
    (folder / "photos/deep").mkdir()
    (folder / "photos/a.png").rename(folder / "photos/deep/ä b.png")
    path = write(folder, good(image="photos/deep/ä b.png"), good(image="photos/b.png"))
    own = convert_jsonl(path, folder.parent / "data", "own", "copy" if images == "copy" else "link")
    assert (
        own.image(1).file_name == "photos/deep/ä b.png"
        and own.image_path(1) == folder.parent / "data/images/own/photos/deep/ä b.png"
    )
    for image_id, name in ((1, "deep/ä b.png"), (2, "b.png")):
        assert os.path.samefile(own.image_path(image_id), folder / "photos" / name) == (images == "link")
        assert own.image_path(image_id).read_bytes() == (folder / "photos" / name).read_bytes()
    assert listed(folder.parent / "data") == [
        "images",
        "images/own",
        "images/own/photos",
        "images/own/photos/b.png",
        "images/own/photos/deep",
        "images/own/photos/deep/ä b.png",
        "own",
        "own/instances.json",
        "own/refs(own).p",
    ]


@pytest.mark.parametrize("what", ["write_refer", "_put", "Refer", "rename", "interrupt"])
def test_a_conversion_that_fails_leaves_nothing(folder, what, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt if what == "interrupt" else RuntimeError("no room")

    path, data = write(folder, good(), good(image="photos/b.png", mask="masks/b.png")), folder.parent / "data"
    (data / "images").mkdir(parents=True)
    if what == "rename":
        monkeypatch.setattr(module.os, "rename", fail)
    elif what in ("_put", "interrupt"):
        real, calls = module._put, []
        monkeypatch.setattr(
            module, "_put", lambda *a: calls.append(a) or (fail() if len(calls) == 2 else real(*a))
        )
    else:
        monkeypatch.setattr(module, what, fail)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        convert_jsonl(path, data, "own")
    assert listed(data) == ["images"] and len(listed(folder)) == 9
    monkeypatch.undo()
    assert len(convert_jsonl(path, data, "own").refs) == 2


def test_pictures_of_an_earlier_attempt_are_used_and_others_never_overwritten(folder):
    path, data = write(folder, good()), folder.parent / "data"
    (data / "images/own/photos").mkdir(parents=True)
    shutil.copy(folder / "photos/a.png", data / "images/own/photos/a.png")
    assert convert_jsonl(path, data, "own").load_image(1).size == (W, H)
    shutil.rmtree(data / "own")
    shutil.copy(folder / "photos/b.png", data / "images/own/photos/a.png")
    with pytest.raises(FileExistsError, match=r"a\.png is there already and is not the same image"):
        convert_jsonl(path, data, "own")
    assert (data / "images/own/photos/a.png").read_bytes() == (folder / "photos/b.png").read_bytes() and not (
        data / "own"
    ).exists()


def test_it_trains_and_evaluates(folder):
    from refseg_nb.evaluation.evaluator import evaluate
    from refseg_nb.training.config import TrainConfig
    from refseg_nb.training.learner import train

    lines = [
        good(
            image=f"photos/{x}.png",
            mask=f"masks/{x}.png",
            expression=f"thing {x}",
            split="val" if x == "c" else "train",
        )
        for x in "abc"
    ]
    convert_jsonl(write(folder, *lines), folder.parent / "data", "own")
    result = train(
        TrainConfig(
            root=folder.parent / "data",
            data="own",
            overrides=SMALL,
            epochs=1,
            max_steps=1,
            images_per_batch=2,
            device="cpu",
            threads=1,
            quiet=True,
            out=folder.parent / "run",
        )
    )
    refer = open_data(folder.parent / "data", "own")
    record = evaluate(
        result.model,
        RISDataset(refer, "val", result.vocabulary, image_size=32, target_size=None),
        resamples=20,
    )
    assert (
        result.steps == 1
        and record.metrics["samples"] == 1
        and record.protocol["dataset"] == "own"
        and record.protocol["split_by"] == "own"
    )


# ---------------------------------------------------------------- fuzz: a list of problems, never an
# exception
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
numbers = (
    st.integers(-3, 45) | st.floats(-5, 60) | st.sampled_from([10**30, float("inf"), float("nan"), True])
)
runs = st.fixed_dictionaries(
    {
        "size": st.just([H, W]) | st.lists(st.integers(-1, 50), max_size=3),
        "counts": (
            st.lists(st.integers(-2, 1300), max_size=5) | st.text("0123456789:;<=>?@ABCabc", max_size=20)
        ),
    }
)
files = st.sampled_from(["masks/a.png", "photos/a.png", "masks/z.png", "", "..", "masks/\0"])
masks = plain | st.lists(st.lists(numbers, max_size=10), max_size=3) | files | runs
# wrong in one field, or in none
near = st.builds(good, expression=st.text(max_size=5), mask=masks, split=st.sampled_from(["train", "val", 3]))
records = near | st.fixed_dictionaries(
    {},
    optional={
        "image": (
            st.sampled_from(["photos/a.png", "photos/z.png", "masks/a.png", "../x", "/", "own.jsonl"]) | plain
        ),
        "expression": st.text(max_size=5) | plain,
        "expressions": st.lists(st.text(max_size=3), max_size=3) | plain,
        "mask": masks,
        "split": st.sampled_from(["train", "val"]) | plain,
        "category": st.text(max_size=3) | plain,
        "id": st.integers(0, 3) | plain,
        "extra": plain,
    },
)
quiet = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quiet
@given(
    st.lists(
        records.map(lambda r: json.dumps(r).encode())
        | plain.map(lambda r: json.dumps(r).encode())
        | st.binary(max_size=30),
        max_size=5,
    )
)
def test_fuzz_lines(folder, lines):
    path = write(folder, *lines)
    problems = validate_jsonl(path)
    assert all(
        isinstance(p, Problem) and 0 <= p.line <= 1 + path.read_bytes().count(b"\n") and "\n" not in str(p)
        for p in problems
    )
    assert "MemoryError" not in str(problems)
    errors = [p for p in problems if p.level == "error"]
    data = folder.parent / "data"
    try:
        own = convert_jsonl(path, data, "own")
    except ConvertError as error:
        enough_memory(error)
        assert error.problems == errors != [] and not data.exists()
    else:
        assert not errors and all(own.mask(ref.ann_id).any() for ref in own.refs)
        shutil.rmtree(data)


# ---------------------------------------------------------------- the layouts that circulate
REAL = [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]


def assert_same(refer, other, every=True):
    """Refs, sentences and masks agree; `every`: also the annotations that no ref is about."""
    assert refer.refs == other.refs and refer.splits == other.splits
    assert {i: refer.images[i] for i in {r.image_id for r in refer.refs}} == {
        i: other.images[i] for i in {r.image_id for r in other.refs}
    }
    for ann_id in refer.annotations if every else {r.ann_id for r in refer.refs}:
        assert (refer.mask(ann_id) == other.mask(ann_id)).all()


def pictures_of(real):
    return real / "images/mscoco/images/train2014"


@pytest.mark.parametrize(
    "where",
    ["train2014", "images/train2014", "images/mscoco/images/train2014", "refcoco/images/train2014", "given"],
)
def test_refer_with_its_accidents(real_data, tmp_path, where):
    """A doubled folder, and the pictures wherever people put them."""
    source, root = tmp_path / "download", tmp_path / "data"
    shutil.copytree(real_data / "refcoco", source / "refcoco/refcoco")
    folder = tmp_path / "elsewhere" if where == "given" else source / where
    shutil.copytree(pictures_of(real_data), folder)
    assert detect_layout(source) == "refer"
    done = convert(source, root, image_folder=folder if where == "given" else None)
    assert done == Conversion(
        "refer", {"refcoco": ["micro", "unc"]}, len(Refer(real_data, "refcoco").images), 0
    )
    for split_by in ("unc", "micro"):
        assert_same(Refer(root, "refcoco", split_by), Refer(real_data, "refcoco", split_by))
    refer = Refer(root, "refcoco")
    for image_id in refer.images:
        assert os.path.samefile(
            refer.image_path(image_id), folder / refer.image(image_id).file_name
        ) and refer.load_image(image_id)
    for name in ("refs(unc).p", "refs(micro).p", "instances.json"):
        assert (root / "refcoco" / name).read_bytes() == (real_data / "refcoco" / name).read_bytes()
    assert sorted(os.listdir(root)) == ["images", "refcoco"]


@pytest.mark.parametrize("layout", ["data/refcoco", "refcoco/data", "refcoco"])
def test_refs_under_data(real_data, tmp_path, layout):
    """`data/refcoco/...`, `refcoco/data/refs(unc).p` with instances.json above it, and the folder itself as
    the source; pictures beside the source."""
    folder = tmp_path / "up" / layout
    shutil.copytree(real_data / "refcoco", folder)
    if layout == "refcoco/data":
        (folder / "instances.json").rename(folder.parent / "instances.json")
    shutil.copytree(pictures_of(real_data), tmp_path / "up/train2014")
    source = tmp_path / "up" if layout == "data/refcoco" else tmp_path / "up/refcoco"
    done = convert(source, tmp_path / "data")
    assert list(done.data) == ["refcoco"] and done.missing == 0 and done.images > 0
    assert_same(Refer(tmp_path / "data", "refcoco"), Refer(real_data, "refcoco"))


def test_several_data_sets_share_their_pictures(real_data, tmp_path):
    shutil.copytree(
        real_data, tmp_path / "source", ignore=shutil.ignore_patterns("refcocog", "images", "README.md")
    )
    (tmp_path / "source/refcoco+").rename(tmp_path / "source/refcocoplus")
    shutil.copytree(pictures_of(real_data), tmp_path / "source/train2014")
    done = convert(tmp_path / "source", tmp_path / "data", images="copy")
    assert done.data == {"refcoco": ["micro", "unc"], "refcoco+": ["micro", "unc"]} and not done.missing
    for name in done.data:
        assert_same(Refer(tmp_path / "data", name), Refer(real_data, name))
    refer = Refer(tmp_path / "data", "refcoco+")
    assert not os.path.samefile(
        refer.image_path(next(iter(refer.images))),
        tmp_path / "source/train2014" / next(iter(refer.images.values())).file_name,
    )
    one = convert(tmp_path / "source", tmp_path / "one", name="refcoco+")
    assert list(one.data) == ["refcoco+"] and sorted(os.listdir(tmp_path / "one")) == ["images", "refcoco+"]


def queries_and_files(folder):
    """A Berkeley set of two images, one of which is never in circulation in the real data."""
    queries = {
        "train": {"5_1": ["the sky", "the sky"], "19579_1": ["gone"]},
        "val": {"6_1": ["grass 2"]},
        "test": {"7_2": ["man"]},
    }
    write_referit(
        folder,
        queries,
        lambda i: Image.new("RGB", (W, H), (i % 255, 0, 0)),
        lambda key: blob(int(key.split("_")[0])),
    )
    return queries


def test_the_tree_of_shnet(real_data, tmp_path):
    source, root = tmp_path / "shnet", tmp_path / "data"
    for name, _ in REAL:
        shutil.copytree(real_data / name, source / "other" / name)
    shutil.copytree(pictures_of(real_data), source / "other/images/mscoco/images/train2014")
    queries_and_files(source / "referit")
    assert detect_layout(source) == "shnet"
    done = convert(source, root)
    assert (
        done.layout == "shnet"
        and set(done.data) == {"refcoco", "refcoco+", "refcocog", "referit"}
        and done.missing == 0
    )
    assert done.data["refcocog"] == ["google", "micro", "umd"] and "refcocog (google, micro, umd)" in str(
        done
    )
    for name, split_by in REAL:
        assert_same(open_data(root, name, split_by), Refer(real_data, name, split_by))
        assert all(
            open_data(root, name, split_by).image_path(i).is_file()
            for i in open_data(root, name, split_by).images
        )
    old, new = ReferIt(source), open_data(root, "referit")
    assert (
        new.refs == old.refs and new.counts() == old.counts() and new.left_out == {"train": 1, "trainval": 1}
    )
    for ann_id in new.annotations:
        assert (new.mask(ann_id) == old.mask(ann_id)).all() and os.path.samefile(
            new.mask_path(ann_id), old.mask_path(ann_id)
        )
    for image_id in new.images:
        assert new.load_image(image_id).tobytes() == old.load_image(image_id).tobytes()


def test_referit_alone_and_with_files_missing(tmp_path):
    queries_and_files(tmp_path / "exp-referit")
    (tmp_path / "exp-referit/mask/5_1.mat").unlink()
    (tmp_path / "exp-referit/images/7.jpg").unlink()
    assert detect_layout(tmp_path / "exp-referit") == "referit"
    done = convert(tmp_path / "exp-referit", tmp_path / "data", images="copy")
    assert done == Conversion("referit", {"referit": ["berkeley"]}, 4, 2) and str(done).endswith(
        "4 images found, 2 NOT found"
    )
    new = open_data(tmp_path / "data", "referit")
    assert len(new.samples("trainval")) == 3 and (new.mask(60001) == blob(6)).all()
    with pytest.raises(FileNotFoundError, match=r"7\.jpg"):
        new.load_image(7)


def rows_of(refer):
    rows = []
    for ref in refer.refs:
        info = refer.images[ref.image_id]
        described = {
            "id": info.image_id,
            "file_name": info.file_name,
            "height": info.height,
            "width": info.width,
            "license": 1,
        }
        sentences = [
            {"raw": s.raw, "sent": s.sent, "sent_id": s.sent_id, "tokens": list(s.tokens)}
            for s in ref.sentences
        ]
        rows.append(
            {
                "sent_ids": [s.sent_id for s in ref.sentences],
                "file_name": "x_1.jpg",
                "ann_id": ref.ann_id,
                "ref_id": ref.ref_id,
                "image_id": ref.image_id,
                "split": ref.split,
                "sentences": sentences,
                "category_id": ref.category_id,
                "bbox": [0.0, 0.0, 0.0, 0.0],
                "raw_anns": json.dumps(refer.annotations[ref.ann_id]),
                "raw_image_info": json.dumps(described),
                "image_path": "coco/x.jpg",
            }
        )
    return rows


def write_parquet(rows, path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name,split_by", REAL)
def test_parquet_of_the_real_sets(real_data, tmp_path, name, split_by):
    refer = Refer(real_data, name, split_by)
    by_split = {split: [row for row in rows_of(refer) if row["split"] == split] for split in refer.splits}
    for split, rows in by_split.items():
        write_parquet(rows, tmp_path / f"source/data/{split}-00000-of-00001-0a1b.parquet")
    shutil.copytree(pictures_of(real_data), tmp_path / "source/train2014")
    assert detect_layout(tmp_path / "source") == "parquet"
    done = convert(tmp_path / "source", tmp_path / "data", name=name)
    assert done == Conversion("parquet", {name: [split_by]}, len({r.image_id for r in refer.refs}), 0)
    new = Refer(tmp_path / "data", name, split_by)
    assert (
        sorted(new.refs, key=lambda r: r.ref_id) == sorted(refer.refs, key=lambda r: r.ref_id)
        and new.counts() == refer.counts()
    )
    assert set(new.annotations) == {r.ann_id for r in refer.refs} < set(refer.annotations)
    for ref in new.refs:
        assert (new.mask(ref.ann_id) == refer.mask(ref.ann_id)).all() and new.annotations[
            ref.ann_id
        ] == refer.annotations[ref.ann_id]
        assert new.categories[ref.category_id] == refer.categories[ref.category_id]  # COCO's own names
        assert new.image(ref.image_id) == refer.image(ref.image_id) and new.load_image(ref.image_id)


def test_one_parquet_file_without_pictures(tmp_path):
    toy = Refer(make_toy(tmp_path / "toys"), "toy")
    write_parquet(rows_of(toy), tmp_path / "x.parquet")
    done = convert(tmp_path / "x.parquet", tmp_path / "data", name="toy")
    assert done.images == 0 and done.missing == len(toy.images)
    new = Refer(tmp_path / "data", "toy", "unc")
    assert [(r.ref_id, r.split, [s.sent for s in r.sentences]) for r in new.refs] == [
        (r.ref_id, r.split, [s.sent for s in r.sentences]) for r in toy.refs
    ]
    assert (
        all((new.mask(r.ann_id) == toy.mask(r.ann_id)).all() for r in toy.refs) and new.images == toy.images
    )
    assert not (tmp_path / "data/images").exists()


PARQUET_DAMAGE = [
    ({"raw_anns": "{"}, "ref 1: its raw_anns is not JSON"),
    ({"raw_anns": None}, "ref 1: its raw_anns is not JSON"),
    ({"raw_anns": "3"}, "is not that of ann_id 1"),
    ({"raw_image_info": '{"id": 99}'}, "is not that of image_id 1"),
    ({"image_id": 9}, "is not that of image_id 9"),
    ({"ref_id": 2}, "ref 2 is there twice"),
    ({"split": None}, "'split' is NoneType"),
    ({"sentences": None}, "ref 1: its sentences are not"),
    ({"category_id": None}, "'category_id' is NoneType"),
    (
        {"raw_image_info": '{"id": 1, "file_name": "x", "height": 40, "width": 40}'},
        "raw_image_info is not the same as in an earlier row",
    ),
]


@pytest.mark.parametrize("change,says", PARQUET_DAMAGE)
def test_damaged_rows_are_named(tmp_path, change, says):
    toy = Refer(make_toy(tmp_path / "toys"), "toy")
    rows = rows_of(toy)
    rows[0] = rows[0] | change
    write_parquet(rows, tmp_path / "x.parquet")
    with pytest.raises(ConvertError, match=says) as caught:
        convert(tmp_path / "x.parquet", tmp_path / "data", name="toy")
    assert (
        ".convert." not in str(caught.value)
        and "\n" not in str(caught.value)
        and not (tmp_path / "data").exists()
    )


def test_what_is_no_table_of_refs(tmp_path, monkeypatch):
    write_parquet([{"ref_id": 1, "text": "x"}], tmp_path / "x.parquet")
    with pytest.raises(ConvertError, match=r"x\.parquet: has no column ann_id, image_id"):
        convert(tmp_path / "x.parquet", tmp_path / "data", name="toy")
    (tmp_path / "y.parquet").write_bytes(b"<html>404</html>")
    with pytest.raises(ConvertError, match=r"y\.parquet: not a readable parquet file"):
        convert(tmp_path / "y.parquet", tmp_path / "data", name="toy")
    with pytest.raises(ValueError, match="give name="):
        convert(tmp_path / "x.parquet", tmp_path / "data")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'refseg_nb\[parquet\]'"):
        convert(tmp_path / "x.parquet", tmp_path / "data", name="toy")
    assert not (tmp_path / "data").exists()


def test_toy_data_and_a_new_name(tmp_path):
    make_toy(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", name="squares")
    assert done == Conversion("refer", {"squares": ["unc"]}, 21, 0)
    old, new = Refer(tmp_path / "a", "toy"), Refer(tmp_path / "b", "squares")
    assert_same(new, old)
    assert (
        new.image_path(1) == tmp_path / "b/images/squares/0.png"
        and new.load_image(1).tobytes() == old.load_image(1).tobytes()
    )
    with pytest.raises(FileExistsError, match="squares is there already"):
        convert(tmp_path / "a", tmp_path / "b", name="squares")


def test_missing_pictures_are_counted(tmp_path):
    make_toy(tmp_path / "a")
    for i in range(4):
        (tmp_path / f"a/images/toy/{i}.png").unlink()
    done = convert(tmp_path / "a", tmp_path / "b")
    assert (done.images, done.missing) == (17, 4) and str(
        done
    ) == "refer: toy (unc); 17 images found, 4 NOT found"


def test_jsonl_through_the_same_door(folder):
    path = write(folder, good())
    assert detect_layout(path) == "jsonl"
    with pytest.raises(ValueError, match="give the new data set a name"):
        convert(path, folder.parent / "data")
    assert convert(path, folder.parent / "data", name="own") == Conversion("jsonl", {"own": ["own"]}, 1, 0)


def test_hostile_sources_write_nothing(tmp_path):
    make_toy(tmp_path / "a")
    instances = json.loads((tmp_path / "a/toy/instances.json").read_text())
    refs = (tmp_path / "a/toy/refs(unc).p").read_bytes()
    instances["images"][0]["file_name"] = "../../../stolen.png"
    (tmp_path / "a/toy/instances.json").write_text(json.dumps(instances))
    with pytest.raises(ConvertError, match=r"toy/instances\.json: the file name of image 1, .* leads out"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/toy/refs(unc).p").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConvertError, match=r"toy/refs\(unc\)\.p: asks for the Python object os.system"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/toy/refs(unc).p").write_bytes(refs)
    (tmp_path / "a/toy/instances.json").unlink()
    with pytest.raises(ConvertError, match="in toy there is no instances.json"):
        convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_second_data_set_that_fails_takes_the_first_back(tmp_path, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(make_toy(tmp_path / f"made-{name}") / "toy", tmp_path / "a" / name)
    real, calls = os.rename, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(module.os, "rename", second_fails)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 2 and not (tmp_path / "b").exists()
    monkeypatch.undo()
    assert list(convert(tmp_path / "a", tmp_path / "b").data) == ["one", "two"]


def test_what_cannot_be_told_is_asked(tmp_path):
    toy = make_toy(tmp_path / "made") / "toy"
    for place in ("a/toy", "a/copy/toy"):
        shutil.copytree(toy, tmp_path / place)
    with pytest.raises(ConvertError, match=r"holds toy more than once, in toy and copy/toy"):
        convert(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConvertError, match="holds no data set 'x'; it holds toy, toy"):
        convert(tmp_path / "a", tmp_path / "b", name="x")
    assert list(convert(tmp_path / "a/copy", tmp_path / "b").data) == ["toy"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        detect_layout(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        convert(tmp_path / "a/copy", tmp_path / "c", image_folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no layout is called 'coco'"):
        convert(tmp_path / "a/copy", tmp_path / "c", layout="coco")
    with pytest.raises(ConvertError, match=r"must end in \.jsonl or \.parquet"):
        detect_layout(toy / "instances.json")
    (tmp_path / "empty/train.lmdb").mkdir(parents=True)
    with pytest.raises(ConvertError, match="LMDB is not read"):
        detect_layout(tmp_path / "empty")
    (tmp_path / "empty/train.lmdb").rmdir()
    with pytest.raises(ConvertError, match="nothing that is known"):
        detect_layout(tmp_path / "empty")
    with pytest.raises(ConvertError, match="no .parquet file"):
        convert(tmp_path / "empty", tmp_path / "c", layout="parquet", name="x")
    with pytest.raises(ConvertError, match="holds no refs"):
        convert(tmp_path / "empty", tmp_path / "c", layout="refer")
    assert not (tmp_path / "c").exists()


def test_refclef_with_its_pictures(tmp_path):
    instances = {
        "images": [{"id": 1, "file_name": "1.png", "height": H, "width": W}],
        "categories": [{"id": 0, "name": "sky"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 0, "segmentation": [packed(blob(0)), packed(blob(1))]}
        ],
    }
    refs = [
        {
            "ref_id": 1,
            "ann_id": 1,
            "image_id": 1,
            "category_id": 0,
            "split": "testC",
            "sentences": [{"sent_id": 1, "sent": "sky"}],
        }
    ]
    for split_by in ("unc", "berkeley"):
        write_refer(tmp_path / "a/refclef", refs, instances, split_by)
    (tmp_path / "a/images/saiaprtc12").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (W, H)).save(buffer, "PNG")
    (tmp_path / "a/images/saiaprtc12/1.png").write_bytes(buffer.getvalue())
    assert convert(tmp_path / "a", tmp_path / "b") == Conversion(
        "refer", {"refclef": ["berkeley", "unc"]}, 1, 0
    )
    refer = open_data(tmp_path / "b", "refclef", "unc")
    assert refer.load_image(1).size == (W, H) and (refer.mask(1) == (blob(0) | blob(1))).all()
