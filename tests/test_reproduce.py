"""The reproduction of Table 2: the paper's numbers, the plan, resuming row by row, and what is said from the intervals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refseg_nb import reproduce as R
from refseg_nb.training.evaluation import make_record, save_record

REPO = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def test_the_papers_numbers():
    "Sums of the printed columns, and the differences that section 4.4 states in words."
    rows = R.PAPER["table2"]["rows"]
    assert len(rows) == 8 and all(len(v) == 6 for v in rows.values())
    assert all(list(v[:5]) == sorted(v[:5], reverse=True) for v in rows.values())
    assert round(R.paper_value("Only HCAM") - R.paper_value("Baseline"), 2) == 4.83
    assert round(R.paper_value("Only SFM") - R.paper_value("Baseline"), 2) == 7.46
    assert round(R.paper_value("Only HCAM", "prec@0.9") - R.paper_value("Baseline", "prec@0.9"), 1) == 2.5
    one, three, four = (R.PAPER[f"table{i}"]["rows"] for i in (1, 3, 4))
    assert R.paper_value("SHNet") == one["SHNet* (320x320)"][0] == three["DeepLabv3+ 320x320"][0] == four["HCAM"][0]
    for table in R.PAPER.values(): assert all(len(v) == len(table["columns"]) for v in table["rows"].values())


def test_the_papers_numbers_against_its_text():
    paper = REPO.parent / "shared" / "mission" / "paper.txt"
    if not paper.is_file(): pytest.skip("the paper's text is not here")
    text = paper.read_text()
    for row, values in R.PAPER["table2"]["rows"].items():
        line = next(m for m in re.findall(r"^\d\t(.+)$", text, re.M) if m.split("\t")[0] == row)
        assert [float(x) for x in line.split("\t")[1:]] == list(values)


def fake(row, seed, good, images=60, each=4, kinds=("attribute", "relation")):
    "A record whose samples have IoU `good` (plus noise that all rows share)."
    rng = np.random.default_rng(0); n = images * each; noise = rng.normal(0, .1, n) + np.random.default_rng([seed, len(row)]).normal(0, .02, n)
    union = rng.integers(200, 900, n); inter = (union * np.clip(good + noise, 0, 1)).astype(int)
    arrays = {"sent_id": np.arange(n), "ref_id": np.arange(n) // 2, "image_id": np.arange(n) // each, "kind": np.array(kinds)[np.arange(n) % len(kinds)],
              "words": np.full(n, 4), "area": union // 2, "pixels": np.full(n, 96 * 96), "intersection": inter, "union": union}
    return make_record(row, arrays, {"dataset": "refshapes", "split": "val"}, {}, {"training": seed}, resamples=100)


@pytest.fixture
def records(tmp_path):
    for row, good in zip(R.ROWS, (.3, .45, .6, .6)):
        for seed in (0, 1): save_record(fake(row, seed, good), tmp_path / "records" / f"{R._slug(row, seed)}.json")
    return tmp_path / "records"


def test_summary_is_made_of_the_records(records):
    runs = R.load_runs(records); s = R.summarise(runs, 300)
    assert list(s["rows"]) == list(R.ROWS) and s["samples"] == 240 and s["images"] == 60
    for row, rs in runs.items():
        both = s["rows"][row]["ours"]["Overall IoU"]
        assert np.isclose(both["value"], np.mean([r.metrics["overall_iou"]["value"] for r in rs])) and both["low"] < both["value"] < both["high"]
        assert np.isclose(s["rows"][row]["ours"]["prec@0.5"]["value"], np.mean([r.metrics["precision@0.5"]["value"] for r in rs]))
    d = {(p["a"], p["b"]): p for p in s["differences"]}
    one = d["Only HCAM", "Baseline"]["ours"]
    hcam, baseline = (s["rows"][row]["ours"]["Overall IoU"]["value"] for row in ("Only HCAM", "Baseline"))
    assert one["low"] > 0 and np.isclose(one["value"], hcam - baseline)
    assert d["Only HCAM", "Baseline"]["paper"] == 4.83 and set(d["SHNet", "Only SFM"]["by kind"]) == {"attribute", "relation"}


def test_conclusions_say_no_more_than_the_intervals(records):
    said = R.conclusions(R.summarise(R.load_runs(records), 300))
    assert said[2].startswith("Only SFM is better than Baseline") and "2 of 2 seeds" in said[2] and "+7.46" in said[2]
    assert said[0].startswith("SHNet and Only SFM") and "better" not in said[0]
    assert said[-1].startswith("Order by overall IoU here")
    template = {"a": "SHNet", "b": "Only SFM", "paper": 1.82, "by kind": {}}
    def say(value, low, high, seeds):
        return R.conclusions({"differences": [template | {"ours": {"value": value, "low": low, "high": high, "by seed": seeds}}], "rows": {}})[0]
    assert "not told apart" in say(1., -1., 3., [1.])
    assert "worse" in say(-2., -3., -1., [-2.]) and "opposite" in say(-2., -3., -1., [-2.])
    assert "not with every seed" in say(2., 1., 3., [5., -1.])
    assert "one training each" in say(2., 1., 3., [2.])


def test_report_is_one_page(records, tmp_path):
    R.report(records, tmp_path / "out", resamples=200)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page and "<table>" in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "54.70" in text and "63.98" in text and "Only SFM − Baseline" in text
    assert json.loads((tmp_path / "out" / "table2.json").read_text())["samples"] == 240
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "table2.json", "table2.md", "overall_iou.png", "by_kind.png"}


def test_records_that_do_not_belong_together(records, tmp_path):
    with pytest.raises(FileNotFoundError, match="no records"): R.load_runs(tmp_path / "nothing")
    save_record(fake("SHNet", 0, .6, images=50), records / "shnet-seed0.json")
    with pytest.raises(ValueError): R.summarise(R.load_runs(records), 100)


def test_examples_are_chosen_by_the_rule():
    record = fake("SHNet", 0, .4); iou = record.arrays["intersection"] / record.arrays["union"]
    picked = R.choose_examples(record)
    attribute = np.flatnonzero(record.arrays["kind"] == "attribute")
    assert picked[0] in attribute and np.isclose(iou[picked[0]], np.median(iou[attribute]), atol=.02)
    if (iou < .1).any(): assert picked[-1] == np.flatnonzero(iou < .1)[0]


def test_plan(tmp_path):
    jobs = R.plan(tmp_path, "quick", (0, 1), data_root=tmp_path / "data")
    assert len(jobs) == 8 and jobs[0]["row"] == "SHNet" and json.loads(json.dumps(jobs)) == jobs
    assert len({j["folder"] for j in jobs}) == 8 and {j["config"]["model"] for j in jobs} == {"shnet", "only-sfm", "only-hcam", "baseline"}
    assert len({j["config"]["max_steps"] for j in jobs}) == 1, "every row gets the same number of steps"
    with pytest.raises(ValueError, match="no budget 'huge'"): R.plan(tmp_path, "huge")
    with pytest.raises(ValueError, match="no row 'LSTM'"): R.plan(tmp_path, rows=("LSTM",))
    assert R.estimate(jobs, 2)["minutes"] > R.estimate(jobs[:4], 2)["minutes"] > 0 == R.estimate([])["minutes"]


@pytest.mark.slow
def test_two_rows_from_nothing_killed_and_resumed(tmp_path):
    args = [sys.executable, "-m", "refseg_nb", "reproduce", "--budget", "tiny", "--row", "Baseline", "--row", "SHNet", "--out", str(tmp_path / "run"),
            "--root", str(tmp_path / "data")]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores SIGINT, and so do its children
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True, preexec_fn=heard)
    for _ in range(1200):
        if list((tmp_path / "run").glob("*/losses.jsonl")) or process.poll() is not None: break
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    result = subprocess.run(args, capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "63.98" in (tmp_path / "run" / "table2.md").read_text() and "paper" in result.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"report.html", "report.md", "table2.json", "overall_iou.png", "by_kind.png", "curves.png", "examples.png", "records"} <= names
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").iterdir()}
    again = subprocess.run(args, capture_output=True, text=True, env=ENV, timeout=300)
    assert again.returncode == 0 and "2 of them done already" in again.stdout
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").iterdir()}, "finished rows are not done again"
    other = subprocess.run([*args, "--steps", "9"], capture_output=True, text=True, env=ENV, timeout=300)
    assert other.returncode == 2 and "other settings" in other.stderr and len(other.stderr.strip().splitlines()) == 1
