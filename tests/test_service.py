"""Many requests at once: the answers of single calls, each picture encoded once, resumed after SIGKILL,
errors where they belong, bounded memory."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from toy_refer import SMALL

from refseg_nb.data.words import Vocabulary
from refseg_nb.inference import requests as service
from refseg_nb.inference.requests import parse_request, read_requests, request_id, segment_batch
from refseg_nb.inference.segmenter import EncodedScene, Segmenter, load
from refseg_nb.models.hub import save_model
from refseg_nb.models.registry import create_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(["the red square on the left"])
    return save_model(
        tmp_path_factory.mktemp("model"),
        create_model("shnet", "refshapes", vocab_size=len(vocabulary), **SMALL | {"prior": 0.5}),
        vocabulary,
    )


@pytest.fixture
def segmenter(model_folder):
    return load(model_folder)


@pytest.fixture
def shots(tmp_path):
    """Five pictures of different sizes."""
    folder, rng = tmp_path / "shots", np.random.default_rng(0)
    folder.mkdir()
    for n in range(5):
        Image.fromarray(rng.integers(0, 255, (20 + n, 30, 3), dtype=np.uint8)).save(folder / f"shot {n}.png")
    return folder


PHRASES = ("the red square", "left", "the square on the right")


def write_requests(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def mask(out, line):
    return np.asarray(Image.open(out / line["mask"]))


@pytest.fixture
def encoded(monkeypatch):
    """The pictures that were encoded, and the scenes that are alive meanwhile."""
    seen, alive, encode = [], weakref.WeakSet(), Segmenter.encode

    def counted(self, image):
        seen.append(os.path.basename(image))
        assert not alive, "the scene before is still in memory"
        scene = encode(self, image)
        alive.add(scene)
        return scene

    monkeypatch.setattr(Segmenter, "encode", counted)
    return seen


def test_the_answers_are_those_of_single_calls(segmenter, shots, tmp_path, encoded):
    rows = [{"image": f"shots/shot {n}.png", "phrase": phrase} for phrase in PHRASES for n in range(5)]
    report = segment_batch(segmenter, write_requests(tmp_path / "asked.jsonl", rows), tmp_path / "out")
    assert (report.requests, report.before, report.done, report.failed, report.images) == (
        15,
        0,
        15,
        0,
        5,
    ) and report.ok
    assert sorted(encoded) == [f"shot {n}.png" for n in range(5)], (
        "requests about one picture are fifteen lines apart, and it is encoded once"
    )
    encoded.clear()
    found = lines(tmp_path / "out")
    assert {(r["image"], r["phrase"]) for r in found} == {(r["image"], r["phrase"]) for r in rows}
    for r in found:
        answer = segmenter.segment(tmp_path / r["image"], r["phrase"])
        image = mask(tmp_path / "out", r)
        assert (
            image.shape == answer.mask.shape
            and set(np.unique(image)) <= {0, 255}
            and ((image > 0) != answer.mask).sum() <= 1
        )
        assert (
            r["score"] == pytest.approx(answer.score, abs=2e-3)
            and r["unknown_words"] == answer.unknown_words
            and r["found"] == answer.found
        )
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".tmp" or "index" in p.name]


def test_a_folder_and_phrases(segmenter, shots, tmp_path):
    (shots / "notes.txt").write_text("no picture")
    report = segment_batch(segmenter, shots, tmp_path / "out", PHRASES[:2])
    assert report.done == 10 and [r["image"] for r in lines(tmp_path / "out")] == [
        f"shot {n}.png" for n in range(5) for _ in range(2)
    ]
    with pytest.raises(ValueError, match="say what to look for"):
        segment_batch(segmenter, shots, tmp_path / "none")
    with pytest.raises(ValueError, match="there is no image"):
        segment_batch(segmenter, tmp_path / "out" / "masks" / "..", tmp_path / "none", PHRASES)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        segment_batch(segmenter, tmp_path / "gone", tmp_path / "none", PHRASES)
    assert not (tmp_path / "none").exists()


def test_a_second_call_does_what_is_missing(segmenter, shots, tmp_path, encoded):
    out, rows = (
        tmp_path / "out",
        [
            {"image": f"shots/shot {n}.png", "phrase": p, "id": f"{n}-{k}"}
            for n in range(5)
            for k, p in enumerate(PHRASES)
        ],
    )
    asked = write_requests(tmp_path / "asked.jsonl", rows)
    segment_batch(segmenter, asked, out)
    before = {p.name: p.read_bytes() for p in (out / "masks").iterdir()}
    encoded.clear()
    assert segment_batch(segmenter, asked, out).done == 0 and encoded == []
    (out / "masks" / "1-0.png").unlink()
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(text[:-9])  # half a line
    rows[8] = rows[8] | {"phrase": "left left"}  # another question under an old name
    report = segment_batch(segmenter, write_requests(asked, rows[1:] + rows[:1]), out)  # in another order
    assert (report.before, report.done) == (12, 3) and sorted(encoded) == [
        "shot 1.png",
        "shot 2.png",
        "shot 4.png",
    ]
    after = {p.name: p.read_bytes() for p in (out / "masks").iterdir()}
    assert after.keys() == before.keys() and {k for k in after if after[k] != before[k]} <= {"2-2.png"}
    assert sorted(r["id"] for r in lines(out)) == sorted(r["id"] for r in rows), "each once"
    segment_batch(segmenter, write_requests(asked, rows[:3]), out)
    assert len(lines(out)) == 15, "answers to requests that are no longer asked stay"


def test_killed_and_called_again(model_folder, shots, tmp_path):
    """SIGKILL after some answers: what stands there is whole, and the next call adds the rest."""
    out, rows = (
        tmp_path / "out",
        [{"image": f"shots/shot {n}.png", "phrase": p} for n in range(5) for p in PHRASES],
    )
    asked = write_requests(tmp_path / "asked.jsonl", rows)
    code = f"""
import time
from refseg_nb.inference.segmenter import load
from refseg_nb.inference import requests as service
write = service.write_answer
service.write_answer = lambda *args: (time.sleep(.2), write(*args))[1]
service.segment_batch(load({str(model_folder)!r}), {str(asked)!r}, {str(out)!r})"""
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while (
        not ((out / "results.jsonl").exists() and len((out / "results.jsonl").read_text().splitlines()) >= 4)
        and time.time() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    old = lines(out)
    assert 4 <= len(old) < 15 and all(mask(out, r).shape[1] == 30 for r in old)
    report = segment_batch(load(model_folder), asked, out)
    assert (report.before, report.done, report.failed) == (len(old), 15 - len(old), 0)
    whole = tmp_path / "whole"
    segment_batch(load(model_folder), asked, whole)
    one, two = ({r["id"]: r for r in lines(folder)} for folder in (out, whole))
    assert one.keys() == two.keys() and all(abs(one[k]["score"] - two[k]["score"]) < 2e-3 for k in one)
    assert sum(((mask(out, one[k]) > 0) != (mask(whole, two[k]) > 0)).sum() for k in one) <= 3


def test_errors_stay_in_their_line(segmenter, shots, tmp_path):
    (shots / "broken.png").write_bytes((shots / "shot 0.png").read_bytes()[:60])
    rows = [
        {"image": "shots/shot 0.png", "phrase": "left"},
        {"image": "shots/gone.png", "phrase": "left"},
        {"image": "shots/broken.png", "phrase": "left"},
        {"image": "shots/broken.png", "phrase": "the red square"},
        {"image": "shots/shot 0.png", "phrase": " ?! "},
        "{",
        {"image": "shots/shot 1.png"},
        {"image": "shots/shot 1.png", "phrase": "left", "id": "../up"},
        {"image": "shots/shot 1.png", "phrase": "left", "id": "a"},
        {"image": "shots/shot 2.png", "phrase": "left", "id": "a"},
        {"image": "shots", "phrase": "left"},
        "",
        {"image": "shots/shot 0.png", "phrase": "left"},
    ]
    asked = write_requests(tmp_path / "asked.jsonl", rows)
    report = segment_batch(segmenter, asked, tmp_path / "out")
    assert (
        (report.requests, report.done, report.failed) == (11, 2, 9)
        and not report.ok
        and "9 failed" in str(report)
    )
    errors = [r["error"] for r in lines(tmp_path / "out") if "error" in r]
    for said in (
        "no image at",
        "damaged",
        "has no word",
        "line 6: is not JSON",
        "line 7: phrase must be a string",
        "line 8: id must be",
        "line 10: its id 'a' is that of line 9",
        "is a folder",
    ):
        assert any(said in e and "\n" not in e for e in errors), said
    again = segment_batch(segmenter, asked, tmp_path / "out")
    assert (again.before, again.done, again.failed) == (2, 0, 9) and len(lines(tmp_path / "out")) == 11, (
        "tried again, and said once"
    )
    Image.new("RGB", (30, 20)).save(shots / "gone.png")
    assert segment_batch(segmenter, asked, tmp_path / "out").done == 1


def test_a_full_disk_is_not_the_requests_fault(segmenter, shots, tmp_path, monkeypatch):
    monkeypatch.setattr(
        service, "write_answer", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        segment_batch(segmenter, shots, tmp_path / "out", ["left"])
    assert lines(tmp_path / "out") == []
    monkeypatch.undo()
    assert segment_batch(segmenter, shots, tmp_path / "out", ["left"]).done == 5, "the folder is free again"


def test_one_model_and_one_call_a_folder(segmenter, shots, tmp_path):
    segment_batch(segmenter, shots, tmp_path / "out", ["left"])
    segmenter.threshold = 0.3
    with pytest.raises(ValueError, match="another model"):
        segment_batch(segmenter, shots, tmp_path / "out", ["left"])
    segmenter.threshold = 0.5
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another call"):
        segment_batch(segmenter, shots, tmp_path / "out", ["left"])


def test_few_answers_in_memory_at_a_time(segmenter, shots, tmp_path, monkeypatch):
    sizes, segment_all = [], EncodedScene.segment_all
    monkeypatch.setattr(
        EncodedScene,
        "segment_all",
        lambda self, phrases, *a: (sizes.append(len(phrases)), segment_all(self, phrases, *a))[1],
    )
    rows = [{"image": "shots/shot 0.png", "phrase": "left " * n} for n in range(1, 51)]
    assert segment_batch(
        segmenter, write_requests(tmp_path / "asked.jsonl", rows), tmp_path / "a"
    ).done == 50 and sizes == [32, 18]
    sizes.clear()
    monkeypatch.setattr(service, "PIXELS_A_STEP", 30 * 20 * 7)
    assert segment_batch(segmenter, tmp_path / "asked.jsonl", tmp_path / "b").done == 50 and sizes == [
        7
    ] * 7 + [1]
    sizes.clear()
    monkeypatch.setattr(service, "PIXELS_A_STEP", 1)
    assert (
        segment_batch(segmenter, write_requests(tmp_path / "asked.jsonl", rows[:3]), tmp_path / "c").done == 3
        and sizes == [1] * 3
    )


def test_names_of_requests():
    one = request_id("a/b c.jpg", "left")
    assert (
        one == request_id("a/b c.jpg", "left")
        and len({one, request_id("b c.jpg", "left"), request_id("a/b c.jpg", "Left")}) == 3
    )
    for image in ("x" * 300 + ".png", "../../up.png", "…/é?.png", "", ".hidden.jpg"):
        r = parse_request(1, json.dumps({"image": image, "phrase": "p"}))
        assert (
            r.error is None and len(r.id.encode()) <= 200 and "/" not in r.id and not r.id.startswith(".")
        ), image
    assert parse_request(1, '{"image": "a", "phrase": "p", "id": 7}').id == "7"
    for bad in ('""', "true", "null", '".x"', '"a/b"', '"' + "y" * 201 + '"', "1.5e3", "[1]"):
        assert parse_request(1, f'{{"image": "a", "phrase": "p", "id": {bad}}}').error, bad


def test_a_file_that_names_its_phrases(tmp_path):
    with pytest.raises(ValueError, match="names its phrases itself"):
        list(read_requests(write_requests(tmp_path / "a.jsonl", []), ("left",)))


def test_the_command(model_folder, shots, tmp_path):
    from typer.testing import CliRunner

    from refseg_nb.cli import app

    def refseg(*args):
        return CliRunner().invoke(app, ["segment", *map(str, args), "--model", str(model_folder)])

    out = tmp_path / "out"
    done = refseg("--batch", shots, "--phrase", "left", "--phrase", "the red square", "--out", out)
    assert (
        done.exit_code == 0
        and "10 requests: 0 answered before, 10 now (of 5 images), 0 failed" in done.stdout
    )
    assert (
        json.loads(refseg("--batch", shots, "--phrase", "left", "--out", out, "--json").stdout)["before"] == 5
    )
    asked = write_requests(
        tmp_path / "asked.jsonl",
        [{"image": "shots/shot 0.png", "phrase": "left"}, {"image": "none.png", "phrase": "left"}],
    )
    failed = refseg("--batch", asked, "--out", tmp_path / "other")
    assert failed.exit_code == 1 and "1 failed" in failed.stdout
    one = shots / "shot 0.png"
    for args, said in (
        ((one, "left", "--batch", shots, "--out", out), "not both"),
        (("--batch", shots), "needs --out"),
        ((), "Missing argument 'IMAGE'"),
        (("--batch", tmp_path / "gone", "--out", out), "no file or folder"),
        ((one, "left", "--phrase", "x"), "--phrase goes with"),
        (("--batch", shots, "--out", out), "say what to look for"),
        ((one,), "Missing argument 'PHRASE'"),
    ):
        result = refseg(*args)
        assert (
            result.exit_code == 2 and said in result.stderr and len(result.stderr.strip().splitlines()) == 1
        ), (args, result.stderr)
