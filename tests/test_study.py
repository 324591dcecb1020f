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
