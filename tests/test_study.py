"""The study of why relations come late: its script runs, and its table is what the records say."""

import json
import os
import subprocess
import sys
from pathlib import Path

from refseg_nb.refshapes.dataset import tiny_data

FOLDER = Path(__file__).parent.parent / "results" / "relations"


def study(*arguments):
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)}
    done = subprocess.run(
        [sys.executable, FOLDER / "study.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_runs_and_repeats_itself(tmp_path):
    study("prepare", "--root", tiny_data(), "--cache", tmp_path)
    aids = ("--anchor", "0.3", "--relative", "--groups", "8", "--word-bias", "2.5")
    for out in ("a", "b"):
        study("train", "--cache", tmp_path, "--out", tmp_path / out, "--stop", "3", "--name", "x", *aids)
    first, second = (
        [json.loads(line) for line in (tmp_path / out / "x-seed1.jsonl").read_text().splitlines()]
        for out in ("a", "b")
    )
    assert first[0] == second[0] and first[0]["word_bias"] == 2.5
    assert [r["loss"] for r in first[1:]] == [r["loss"] for r in second[1:]] and first[-1]["step"] == 3
    assert {"all", "attribute", "relation"} <= first[-1].keys()


def test_table_is_what_the_records_say():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- table -->")[1].split("<!-- end of the table -->")[0].strip()
    assert shown == study("table").strip(), "put the output of `study.py table` into the README"


def test_pointing_script_runs_and_repeats_itself(tmp_path):
    study("prepare", "--root", tiny_data(), "--cache", tmp_path)

    def pointing(out, *more):
        call = [sys.executable, FOLDER / "pointing.py", "--cache", tmp_path, "--out", tmp_path / out]
        call += ["--steps", "250", "--images", "1", *more]
        environment = os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)}
        done = subprocess.run([*map(str, call)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told, row = (
            json.loads(line) for line in (tmp_path / out / "all-seed1.jsonl").read_text().splitlines()
        )
        return told, {k: v for k, v in row.items() if k != "seconds"}

    told, row = pointing("a")
    assert (told, row) == pointing("b") and told["anchor"] == 1 and row["step"] == 250
    assert {"anchor", "attribute", "relation"} <= row.keys()
    assert pointing("c", "--anchor", "0")[1] != row


def test_table_of_pointing_is_what_the_records_say():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- pointing -->")[1].split("<!-- end of pointing -->")[0].strip().splitlines()
    names = [line.split("|")[1].strip() for line in shown[2:]]
    for name, line in zip(names, shown[2:]):
        files = sorted((FOLDER / "pointing").glob(f"{name}-seed*.jsonl"))
        ends = [json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in files]
        relation = [row["relation"] for row in ends]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == str(len(files)) and cells[4] in (
            f"{min(relation):.0f} to {max(relation):.0f}",
            f"{min(relation):.0f}",
        )
    assert {file.stem.rpartition("-seed")[0] for file in (FOLDER / "pointing").glob("*.jsonl")} == set(names)


def test_the_records_of_pointing_are_whole():
    files = sorted((FOLDER / "pointing").glob("*.jsonl"))
    assert len(files) >= 12
    for file in files:
        told, *rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        assert file.stem == f"{told['name']}-seed{told['seed']}"
        assert [row["step"] for row in rows] == list(range(250, told["steps"] + 1, 250)), file.name


def test_table_of_the_stand_in_is_what_the_record_says():
    from refseg_nb.course.exercises.ch12b import check_jump

    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- stand-in -->")[1].split("<!-- end of the stand-in -->")[0].strip()
    record = json.loads((FOLDER / "standin.json").read_text(encoding="utf-8"))

    def jump(steps, right, level=0.8, run=2):
        return next((steps[i] for i in range(len(right) - run + 1) if min(right[i : i + run]) >= level), None)

    check_jump(jump)
    for one in record.values():
        steps = [row["step"] for row in one["rows"]]
        assert one["jumps"] == [
            jump(steps, [row["relation"][k] for row in one["rows"]]) for k in range(len(one["jumps"]))
        ]
        there = sum(j is not None for j in one["jumps"])
        assert f"| {one['changed']} | {there} of {len(one['jumps'])} |" in shown
    assert shown.count("\n") == len(record) + 1
