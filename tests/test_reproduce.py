"""The reproduction: the paper's numbers, experiments and plan, resuming job by job, tables and sentences,
the report, and the recorded run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest

from refseg_nb.evaluation.evaluator import make_record, save_record
from refseg_nb.models.registry import model_recipe
from refseg_nb.models.shnet import BEHIND_SFM, PRESETS, SHNetConfig
from refseg_nb.reproduce import experiments as E
from refseg_nb.reproduce import report as R
from refseg_nb.reproduce import tables as T
from refseg_nb.reproduce.experiments import FAMILY

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "results" / "reproduction"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def test_the_papers_numbers():
    """Sums of the printed columns, the differences that section 4.4 states in words, and the one
    disagreement between tables."""
    rows = E.PAPER["table2"]["rows"]
    overall = {row: v[-1] for row, v in rows.items()}
    assert len(rows) == 8 and all(len(v) == 6 for v in rows.values())
    assert all(list(v[:5]) == sorted(v[:5], reverse=True) for v in rows.values())
    assert (
        round(overall["Only HCAM"] - overall["Baseline"], 2) == 4.83
        and round(overall["Only SFM"] - overall["Baseline"], 2) == 7.46
    )
    assert round(rows["Only HCAM"][4] - rows["Baseline"][4], 1) == 2.5
    one, three, four = (E.PAPER[f"table{i}"]["rows"] for i in (1, 3, 4))
    assert overall["SHNet"] == one["SHNet* (320x320)"][0] == three["DeepLabv3+ 320x320"][0] == four["HCAM"][0]
    assert (one["SHNet* (448x448)"][0], three["DeepLabv3+ 448x448"][0], four["HCAM"][1]) == (
        65.32,
        65.29,
        65.32,
    )
    for table in E.PAPER.values():
        assert all(len(v) == len(table["columns"]) for v in table["rows"].values())


def test_the_papers_numbers_against_its_text():
    paper = REPO.parent / "shared" / "mission" / "paper.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not here")
    text = paper.read_text()
    for row, values in E.PAPER["table2"]["rows"].items():
        line = next(m for m in re.findall(r"^\d\t(.+)$", text, re.M) if m.split("\t")[0] == row)
        assert [float(x) for x in line.split("\t")[1:]] == list(values)


def test_every_cell_has_an_experiment_and_every_experiment_a_cell():
    cells = [c for t in E.tables().values() for row in t.rows.values() for c in row]
    assert {c.experiment for c in cells} == set(E.experiments())
    for name in ("table1", "table2", "table3", "table4"):
        for label, row in E.tables()[name].rows.items():
            assert [c.paper for c in row] == list(E.PAPER[name]["rows"][label])
    low, high = E.tables()["table1"].rows.values()
    read = [(c.experiment, c.split) for c in low[3:]]
    assert read == [
        *(("shnet-uncplus", s) for s in ("val", "testA", "testB")),
        ("shnet-gref", "val"),
        ("shnet-referit", "test"),
    ]
    assert all(E.experiments()[c.experiment].pixels == "high" for c in high)
    for t in E.tables().values():
        assert all(len(row) == len(t.columns) for row in t.rows.values()) and {
            x for pair in t.pairs for x in pair
        } <= set(t.rows)


def test_every_difference_of_the_presets_is_an_experiment_or_has_a_reason():
    """Each row changes one field of the model or one thing of the training, and to a value that the base
    does not have."""
    from refseg_nb.models.shnet import RECIPES, differences
    from refseg_nb.training.config import TrainConfig

    fields = {
        *differences(PRESETS["paper"], PRESETS["released"]),
        *differences(RECIPES["paper"], RECIPES["released"]),
    }
    rows = {
        e.name.removeprefix("preset-").replace("-", "_"): e
        for e in E.experiments().values()
        if e.name.startswith("preset-")
    }
    assert set(rows) == fields - set(E.NOT_TRAINED) and set(E.NOT_TRAINED) <= fields
    base = PRESETS["refshapes"].to_dict() | E.RECIPE["overrides"]
    known = set(TrainConfig.__dataclass_fields__)
    for name, e in rows.items():
        assert bool(e.overrides) != bool(e.training)
        if e.overrides:
            assert list(e.overrides) == [name] and e.overrides[name] != base[name]
        assert set(e.training) <= known, f"{name}: the learner has no field {set(e.training) - known}"


def fake(experiment, seed, good, images=60, each=4, kinds=("attribute", "relation"), split="val", **config):
    "A record whose samples have IoU `good` (plus noise that all rows share)."
    rng = np.random.default_rng(0)
    n = images * each
    noise = rng.normal(0, 0.1, n) + np.random.default_rng([seed, len(experiment)]).normal(0, 0.02, n)
    union = rng.integers(200, 900, n)
    inter = (union * np.clip(good + noise, 0, 1)).astype(int)
    arrays = {
        "sent_id": np.arange(n),
        "ref_id": np.arange(n) // 2,
        "image_id": np.arange(n) // each,
        "kind": np.array(kinds)[np.arange(n) % len(kinds)],
        "words": np.full(n, 4),
        "area": union // 2,
        "pixels": np.full(n, 96 * 96),
        "intersection": inter,
        "union": union,
    }
    return make_record(
        experiment,
        arrays,
        {"dataset": "refshapes", "split": split},
        {"experiment": experiment, **config},
        {"training": seed},
        resamples=100,
    )


@pytest.fixture
def folder(tmp_path):
    for name, good in zip(("baseline", "only-hcam", "only-sfm", "shnet"), (0.3, 0.45, 0.6, 0.6)):
        for seed in (0, 1):
            save_record(fake(name, seed, good), tmp_path / "run" / "records" / f"{name}-seed{seed}-val.json")
    return tmp_path / "run"


def test_summary_is_made_of_the_records(folder):
    runs = T.load_runs(folder)
    s = T.summarise(runs, "table2", 300)
    key = s["key"]
    assert (
        list(s["rows"]) == ["Baseline", "Only HCAM", "Only SFM", "SHNet"]
        and s["columns"][key] == "Overall IoU"
    )
    for row, name in zip(s["rows"].values(), ("baseline", "only-hcam", "only-sfm", "shnet")):
        cell, records = row["cells"][key], runs[name, "val"]
        assert (
            np.isclose(cell["value"], np.mean([r.metrics["overall_iou"]["value"] for r in records]))
            and cell["low"] < cell["value"] < cell["high"]
        )
        assert np.isclose(
            row["cells"][0]["value"], np.mean([r.metrics["precision@0.5"]["value"] for r in records])
        ) and cell["seeds"] == [0, 1]
    d = {(p["a"], p["b"]): p for p in s["differences"]}
    one = d["Only HCAM", "Baseline"]["ours"]
    hcam, baseline = (s["rows"][row]["cells"][key]["value"] for row in ("Only HCAM", "Baseline"))
    assert one["low"] > 0 and np.isclose(one["value"], hcam - baseline)
    assert d["Only HCAM", "Baseline"]["paper"] == 4.83 and set(d["SHNet", "Only SFM"]["by kind"]) == {
        "attribute",
        "relation",
    }
    text = T.markdown_table(s)
    assert f"{baseline - 54.70:+.1f}" in text.split("| gap |")[1].splitlines()[0], (
        "the gap is ours minus the paper's"
    )


def test_a_difference_takes_the_seeds_that_both_have(folder):
    save_record(fake("shnet", 2, 0.9), folder / "records" / "shnet-seed2-val.json")
    runs = T.load_runs(folder)
    d = T.difference(runs["shnet", "val"], runs["only-sfm", "val"], 200)
    assert d["seeds"] == [0, 1] and len(d["by seed"]) == 2
    alone = T.difference([fake("shnet", 5, 0.6)], runs["only-sfm", "val"], 200)
    assert alone["seeds"] == [] and alone["by seed"] is None
    assert "different numbers of runs" in T.sentence(
        {"a": "A", "b": "B", "paper": None, "by kind": {}, "ours": alone}
    )


def test_conclusions_say_no_more_than_the_intervals(folder):
    said = T.conclusions(T.summarise(T.load_runs(folder), "table2", 300))
    assert (
        said[2].startswith("Only SFM is better than Baseline")
        and "2 of 2 seeds" in said[2]
        and "+7.46" in said[2]
    )
    assert said[0].startswith("SHNet and Only SFM") and "better" not in said[0]
    assert said[-1].startswith("Order by Overall IoU here")

    def say(value, low, high, seeds):
        return T.sentence(
            {
                "a": "SHNet",
                "b": "Only SFM",
                "paper": 1.82,
                "by kind": {},
                "ours": {"value": value, "low": low, "high": high, "by seed": seeds},
            }
        )

    assert "not told apart" in say(1.0, -1.0, 3.0, [1.0, 2.0])
    assert "worse" in say(-2.0, -3.0, -1.0, [-2.0, -1.0]) and "opposite" in say(
        -2.0, -3.0, -1.0, [-2.0, -1.0]
    )
    assert "not with every seed" in say(2.0, 1.0, 3.0, [5.0, -1.0])
    assert "one run each" in say(2.0, 1.0, 3.0, [2.0]) and "in this pair of runs" in say(2.0, 1.0, 3.0, [2.0])


def test_single_trainings_are_read_against_the_spread_of_seeds(tmp_path):
    rows = {"shnet-third": (0.6, 0.4), "preset-pool": (0.5,), "preset-grid": (0.55,)}
    for name, goods in rows.items():
        for seed, good in enumerate(goods):
            save_record(fake(name, seed, good), tmp_path / "records" / f"{name}-seed{seed}-val.json")
    s = T.summarise(T.load_runs(tmp_path), "presets", 200)
    spread = T.seed_spread(s)
    a, b = s["rows"]["SHNet as trained here"]["cells"][0]["each seed"]
    assert spread["rows"] == 1 and np.isclose(spread["points"], abs(a - b)), (
        "of two seeds, the distance is theirs"
    )
    assert any("lie" in line and "may be the seed's" in line for line in T.conclusions(s))
    assert (
        all(p["paper"] is None for p in s["differences"])
        and "paper" not in T.markdown_table(s).splitlines()[0]
    )


def test_controls_and_cost_are_read_from_the_records(folder):
    assert T.controls_table(T.load_runs(folder)) == "" == T.cost_table(T.load_runs(folder))
    cost = {"seconds": 90.0, "peak memory": 2_000_000_000, "parameters": 1234, "GFLOP": 0.5}
    save_record(fake("shnet", 0, 0.6, cost=cost), folder / "records" / "shnet-seed0-val.json")
    (folder / "records" / "shnet-seed1-val.json").unlink()
    save_record(fake("shnet", 0, 0.05), folder / "records" / "shnet-seed0-val.no-text.json")
    runs = T.load_runs(folder)
    blind = runs["shnet", "val.no-text"][0].metrics["mean_iou"]["value"]
    assert f"| no phrase | {blind:.1f} |" in T.controls_table(
        runs
    ) and "| no image | – |" in T.controls_table(runs)
    assert re.search(r"\| shnet \| 1,234 \| 0.50 \| 1.5 \| 2.0 \|", T.cost_table(runs))


def test_report_is_one_page(folder):
    R.report(folder, 200)
    page = (folder / "report.html").read_text()
    pictures = {p.name for p in folder.glob("*.png")}
    assert pictures == {
        "table1-bars.png",
        "table1-kinds.png",
        "table2-bars.png",
        "table2-kinds.png",
    } and page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page and "<table>" in page and 'src="table' not in page
    text = (folder / "report.md").read_text()
    assert "54.70" in text and "63.98" in text and "Only SFM − Baseline" in text and "CMPC" in text
    assert set(json.loads((folder / "tables.json").read_text())) == {"table1", "table2"}
    before = text
    R.report(folder, 200)
    assert (folder / "report.md").read_text() == before, "the same records give the same report"


def test_records_that_do_not_belong_together(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no records"):
        T.load_runs(tmp_path / "nothing")
    (folder / "records" / "shnet-seed0-val.json").rename(folder / "records" / "only-sfm-seed7-val.json")
    with pytest.raises(
        ValueError,
        match="only-sfm-seed7-val.json: the name says only-sfm, seed 7; the record is of shnet, seed 0",
    ):
        T.load_runs(folder)
    (folder / "records" / "only-sfm-seed7-val.json").unlink()
    save_record(fake("shnet", 1, 0.6, images=50), folder / "records" / "shnet-seed1-val.json")
    with pytest.raises(ValueError):
        T.summarise(T.load_runs(folder), "table2", 100)
    (folder / "records" / "baseline-seed0-val.npz").unlink()
    with pytest.raises(FileNotFoundError, match="baseline-seed0-val.json: its samples"):
        T.load_runs(folder)


def test_plan(tmp_path):
    jobs = E.plan(tmp_path, seeds=(0, 1), data_root=tmp_path / "data")
    assert len(jobs) == 8 and jobs[0]["experiment"] == "shnet" and json.loads(json.dumps(jobs)) == jobs
    assert len({j["folder"] for j in jobs}) == 8 and {j["config"]["model"] for j in jobs} == {
        "shnet",
        "only-sfm",
        "only-hcam",
        "baseline",
    }
    assert len({j["config"]["max_steps"] for j in jobs}) == 1, "every row gets the same number of steps"
    for message, wrong in (
        ("no budget 'huge'", {"budget": "huge"}),
        ("no row 'LSTM'", {"rows": ("LSTM",)}),
        ("no target 'table9'", {"target": "table9"}),
        ("no data 'coco'", {"data": "coco"}),
        ("no preset 'huge'", {"preset": "huge"}),
    ):
        with pytest.raises(ValueError, match=message):
            E.plan(tmp_path, **wrong)
    assert (
        E.estimate(jobs, 2)["minutes"] > E.estimate(jobs[:4], 2)["minutes"] > 0 == E.estimate([])["minutes"]
    )


def test_plan_of_everything(tmp_path):
    jobs = {j["experiment"]: j for j in E.plan(tmp_path, "all", data_root=tmp_path)}
    assert set(jobs) == set(E.experiments())
    assert (
        jobs["shnet"]["splits"] == ["val", "testA", "testB"]
        and jobs["shnet"]["controls"]
        and not jobs["only-sfm"]["controls"]
    )
    assert jobs["shnet-high"]["config"]["overrides"]["image_size"] == 128 and jobs["shnet-high"]["config"][
        "root"
    ].endswith("large-128")
    assert jobs["shnet-high"]["draw"] == {"size": "large", "resolution": 128} and jobs["shnet"]["draw"] == {
        "size": "large",
        "resolution": None,
    }
    assert (
        jobs["shnet-resnet"]["config"]["overrides"]["backbone"] == "refshapes-classifier"
        and jobs["shnet-gref"]["config"]["data"] == "refshapes-g"
    )
    from refseg_nb.training.config import TrainConfig

    for job in jobs.values():
        c = TrainConfig(**job["config"], out="x")  # every field is known
        if c.model not in FAMILY:
            SHNetConfig.from_dict(PRESETS["refshapes"].to_dict() | c.overrides)
    for preset in ("paper", "released"):
        for name in ("refcoco", "refcoco+"):
            (tmp_path / name).mkdir(exist_ok=True)
        real = E.plan(tmp_path, "all", "full", data="real", data_root=tmp_path, preset=preset)
        assert {j["config"]["data"] for j in real} == {"refcoco", "refcoco+"} and all(
            j["draw"] is None for j in real
        )
        of_shnet = [j for j in real if j["config"]["model"] not in FAMILY]
        sizes = {
            j["experiment"]: asdict(
                SHNetConfig.from_dict(PRESETS[preset].to_dict() | j["config"]["overrides"])
            )
            for j in of_shnet
        }
        assert (
            sizes["shnet-high"]["image_size"] == 448
            and sizes["shnet"]["image_size"] == 320
            and sizes["shnet-resnet"]["backbone"] == "resnet101"
        )
        assert sizes["shnet"]["grid"] == PRESETS[preset].grid, "the small model's grid is not the paper's"


def test_presets_are_trained_for_a_third_of_the_steps_and_so_is_what_they_are_compared_with(tmp_path):
    steps = lambda *args, **more: {
        j["experiment"]: j["config"]["max_steps"] for j in E.plan(tmp_path, *args, data_root=tmp_path, **more)
    }
    assert (
        set(steps("presets").values()) == {E.BUDGETS["quick"].steps // 3}
        and set(steps("presets", "plain").values()) == {2000}
        and set(steps("presets", steps=30).values()) == {10}
        and set(steps("presets", "tiny").values()) == {2}
    )
    assert {c.experiment for row in E.tables()["presets"].rows.values() for c in row} == set(steps("presets"))
    assert set(steps("savings").values()) == set(steps("table2").values()) == {E.BUDGETS["quick"].steps}, (
        "a cheaper model is compared with the whole training"
    )
    short, whole = (
        [j | {"draw": None} for j in E.plan(tmp_path, name, "plain", data_root=tmp_path)[:1]]
        for name in ("presets", "table2")
    )
    minutes = lambda jobs: E.estimate(jobs, 1)["minutes"]
    assert np.isclose(minutes(short + whole), minutes(short) + minutes(whole)) and np.isclose(
        minutes(whole), 3 * minutes(short)
    )


def test_plan_of_the_family(tmp_path):
    """The same trainings but for the model and its learning rate; SHNet's jobs are those of Table 1, cut
    short; the published presets at the paper's size."""
    from refseg_nb.training.config import TrainConfig

    jobs = E.plan(tmp_path, "family", "plain", seeds=(0, 1, 2), data_root=tmp_path)
    assert {j["experiment"] for j in jobs} == {
        f"{name}{tag}" for name in ("shnet-third", *FAMILY) for tag in ("", "-uncplus")
    } and len(jobs) == 24
    assert all(j["splits"] == ["val", "testA", "testB"] for j in jobs)
    same = [
        {k: v for k, v in j["config"].items() if k not in ("model", "lr", "overrides", "seed", "data")}
        for j in jobs
    ]
    assert (
        all(s == same[0] for s in same) and same[0]["max_steps"] == 2000 and same[0]["images_per_batch"] == 3
    )
    assert all(
        j["config"]["overrides"] == {} and j["config"]["lr"] == E.FAMILY_LR[j["config"]["model"]]
        for j in jobs
        if j["config"]["model"] in FAMILY
    )
    tables = {j["experiment"]: j["config"] for j in E.plan(tmp_path, "table1", "plain", data_root=tmp_path)}
    mine = {j["experiment"]: j["config"] for j in jobs if j["seed"] == 0}
    assert all(
        mine[f"shnet-third{tag}"] == tables[f"shnet{tag}"] | {"max_steps": 2000} for tag in ("", "-uncplus")
    )
    for name in ("refcoco", "refcoco+"):
        (tmp_path / name).mkdir()
    real = {
        j["experiment"]: j["config"]
        for j in E.plan(tmp_path, "family", "full", data="real", data_root=tmp_path, preset="paper")
    }
    for name in FAMILY:
        c = TrainConfig(**real[f"{name}-uncplus"], out="x")
        recipe = model_recipe(name, E.FAMILY_PRESETS[name])
        assert (c.preset, c.lr, c.weight_decay, c.data) == (
            E.FAMILY_PRESETS[name],
            recipe.lr,
            recipe.weight_decay,
            "refcoco+",
        )
    assert real["shnet-third"]["preset"] == "paper"


def test_cost_of_a_model_against_counts_by_hand():
    """Parameters: the model's own, less its table of words. Operations: SHNet's parts that an image pays,
    and the phrase's, as chapter 11 counts them."""
    from refseg_nb.models.cost import count_flops
    from refseg_nb.models.registry import create_model

    config = E.model_config({"model": "shnet", "preset": "refshapes", "overrides": {"grid": 8}})
    assert config == PRESETS["refshapes"].to_dict() | {"grid": 8}
    cost, model = E.model_cost("shnet", config), create_model("shnet", "refshapes", vocab_size=50, grid=8)
    words = model.text.embedding.weight.numel()
    assert cost["all parameters"] == sum(p.numel() for p in model.parameters()) - words
    assert cost["trained parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad) - words
    parts = count_flops(SHNetConfig.from_dict(config), 10)
    assert abs(cost["GFLOP an image"] + cost["GFLOP a phrase"] - sum(parts.values())) < 1e-3
    assert parts["backbone"] + parts["level adapters"] <= cost["GFLOP an image"] + 1e-3, (
        "some of HCAM's gates hear no word either"
    )
    seconds = E.model_seconds(model, tries=1)
    assert (
        set(seconds) == {"seconds an image", "seconds a phrase"}
        and all(0 <= s < 60 for s in seconds.values())
        and model.training
    )


def test_the_family_beside_shnet(tmp_path):
    """Nothing trained: said so. With records: means and intervals are `row_scores`', differences are paired
    over images, costs are the record's."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert T.family_table({}).count("not trained yet") == 8
    cost = {
        "seconds": 600.0,
        "peak memory": 3e9,
        "seconds an image": 0.01,
        "seconds a phrase": 0.004,
        "parameters": 5,
        "GFLOP": 0.1,
    }
    for name, good in (("shnet-third", 0.6), ("lavt", 0.4)):
        for seed in (0, 1):
            save_record(
                fake(name, seed, good, cost=cost), tmp_path / "records" / f"{name}-seed{seed}-val.json"
            )
    runs = T.load_runs(tmp_path)
    table = T.family_table(runs, 200)
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert (
        "not trained yet" in lines["CMPC"]
        and lines["LAVT"].endswith("| not trained yet |")
        and "2 runs" in lines["LAVT"]
    )
    assert (
        "| 10.0 | 4.0 | 10 | 3.0 |" in lines["LAVT"]
        and f"{T.row_scores(runs['lavt', 'val'], 200)['Overall IoU']['value']:.1f} [" in lines["LAVT"]
    )
    s = T.summarise(runs, "family", 200)
    assert [(p["a"], p["b"]) for p in s["differences"]] == [("LAVT", "SHNet")] and s["differences"][0][
        "ours"
    ]["high"] < 0
    assert np.isclose(
        s["differences"][0]["ours"]["value"],
        T.difference(runs["lavt", "val"], runs["shnet-third", "val"], 200)["value"],
    )
    R.report(tmp_path, 100)
    text = (tmp_path / "report.md").read_text()
    assert (
        "## The family: Four systems in a third of the steps on UNC" in text
        and "LAVT is worse than SHNet" in text
        and "not trained yet" in text
    )


def test_cost_of_the_full_reproduction_against_a_count_by_hand():
    """SHNet at 320 px, grid 20: the facts give 40.5 + 13.2 GFLOP an image, 10.2 + 22.6 + 5.7 + 6.9 + 54.8 a phrase for the released model. The gates
    are split (a quarter); two of the decoder's convolutions, 30.3 and 7.6, mix channels on the small map (a quarter, and 30 n products for the places).
    """
    small = sum(2 * (9 * 512 + 30 * n) * 512 * n**2 for n in (20, 40)) / 1e9
    line = next(x for x in E.full_cost("released") if x["experiment"] == "shnet")
    by_hand = (
        30
        * (16_994 * (40.5 + 13.2) + 3 * 120_624 * (10.2 + 22.6 / 4 + 5.7 + 6.9 + 54.8 - 30.3 - 7.6 + small))
        / 1e9
    )
    assert abs(line["exaFLOP"] / by_hand - 1) < 0.03
    assert np.isclose(line["hours"], line["exaFLOP"] * 1e18 / 100e12 / 3600)
    assert 6.1 < line["GB"] < 12, (
        "19,994 images of 320 x 320 x 3 bytes are 6.14 GB; masks and targets come on top"
    )


@pytest.mark.slow
def test_two_rows_from_nothing_killed_and_resumed(tmp_path):
    args = [
        sys.executable,
        "-m",
        "refseg_nb",
        "reproduce",
        "--budget",
        "tiny",
        "--row",
        "Baseline",
        "--row",
        "SHNet",
        "--out",
        str(tmp_path / "run"),
        "--root",
        str(tmp_path / "data"),
    ]
    # a shell's background job ignores SIGINT, and so do its children
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        args,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        start_new_session=True,
        preexec_fn=heard,
    )
    for _ in range(1200):
        if list((tmp_path / "run").glob("*/losses.jsonl")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    result = subprocess.run(args, capture_output=True, text=True, env=ENV, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "63.98" in (tmp_path / "run" / "report.md").read_text() and "paper" in result.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()}
    drawn = {
        f"{name}.png"
        for name in (
            "table2-bars",
            "table2-kinds",
            "curves",
            "figure4",
            "figure5",
            "figure6",
            "causes",
            "failures",
        )
    }
    assert {"report.html", "report.md", "tables.json", "records"} | drawn <= names
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").iterdir()}
    again = subprocess.run(args, capture_output=True, text=True, env=ENV, timeout=300)
    assert again.returncode == 0 and "2 of them done already" in again.stdout
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").iterdir()}, (
        "finished rows are not done again"
    )
    other = subprocess.run([*args, "--steps", "9"], capture_output=True, text=True, env=ENV, timeout=300)
    assert (
        other.returncode == 2
        and "other settings" in other.stderr
        and len(other.stderr.strip().splitlines()) == 1
    )


@pytest.mark.parametrize("how, ends", [(signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGHUP, False)])
def test_no_training_goes_on_alone(how, ends, tmp_path):
    """A signal to the program that started them ends the trainings too; one that it was told to ignore
    (nohup) ends nothing."""
    code = (
        "import signal, sys, refseg_nb.reproduce.experiments as E; E.JOB = 'import time; time.sleep(60)'\n"
        # whatever this process was told itself
        f"signal.signal(signal.{how.name}, signal.{'SIG_DFL' if ends else 'SIG_IGN'})\n"
        "E.run_jobs(E.plan(sys.argv[1])[::3], 2)"
    )
    parent = psutil.Process(
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL).pid
    )
    wait_for(lambda: len(parent.children()) == 2)
    trainings = parent.children()
    parent.send_signal(how)
    try:
        if ends:
            wait_for(lambda: not any(p.is_running() for p in trainings))
        else:
            time.sleep(1.0)
            assert parent.is_running() and all(p.is_running() for p in trainings)
    finally:
        for p in (parent, *trainings):
            if p.is_running():
                p.kill()


def wait_for(what, seconds=60):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_table_1_on_real_photographs(real_data, tmp_path):
    "The three COCO columns end to end, from the micro sets; ReferIt is not there, and said to be left out."
    from rich.console import Console

    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    found = R.reproduce(
        "table1",
        tmp_path / "run",
        "tiny",
        rows=("SHNet* (320x320)",),
        data="real",
        split_by="micro",
        data_root=real_data,
        steps=2,
        n_jobs=1,
        console=console,
    )
    said = console.export_text()
    assert (
        "Left out, because they are not there: refclef, refcoco+ testA, refcoco+ testB, refcoco testA,"
        " refcoco testB" in said
    )
    cells = found["table1"]["rows"]["SHNet* (320x320)"]["cells"]
    assert [c is not None for c in cells] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ], "the micro partition has val, and no testA and testB"
    runs = T.load_runs(tmp_path / "run")
    for name, data in (("shnet", "refcoco"), ("shnet-uncplus", "refcoco+"), ("shnet-gref", "refcocog")):
        record = runs[name, "val"][0]
        assert (record.protocol["dataset"], record.protocol["split_by"]) == (data, "micro") and len(
            record.arrays["union"]
        ) > 0
        assert (name, "val.no-image") in runs, "the blind controls are made on real data too"


recorded = pytest.mark.skipif(not (RESULTS / "records").is_dir(), reason="no recorded run")


@recorded
def test_the_recorded_report_is_what_the_records_give(tmp_path):
    "Records, tables.json, report.md and README say the same."
    import shutil

    shutil.copytree(RESULTS, tmp_path / "again")
    for name in ("report.md", "tables.json"):
        (tmp_path / "again" / name).unlink()
    R.report(tmp_path / "again")
    for name in ("report.md", "tables.json"):
        assert (tmp_path / "again" / name).read_text() == (RESULTS / name).read_text(), (
            f"results/reproduction/{name} is not made from its records"
        )
    results = R.readme_results(REPO / "results").strip()
    assert results in (REPO / "README.md").read_text(), (
        "the README's results are not made from the records: run nbs/index.ipynb and make readme"
    )


@recorded
def test_the_recorded_run_has_what_it_claims():
    """Every cell of every table has a record, rows of Table 2 and of the family have three seeds, and all
    are of one recipe but for what a row changes."""
    runs = T.load_runs(RESULTS)
    # Table 4's modules as its authors ran them: not yet run, and the report says so
    to_come = {f"{module}-released{high}" for module in ("mgate", "tgfe", "gbfm") for high in ("", "-high")}
    assert not to_come & {name for name, _ in runs}, "they are run now: take this exception away"
    for target in set(E.TARGETS) - {"all", "aids"}:  # the recipe that is recorded has no aid to lose
        for name, splits in E.wanted(target).items():
            if name in to_come:
                continue
            for split in splits:
                least = 3 if target in ("table2", "family") else 1
                assert len(runs.get((name, split), [])) >= least, f"{name} on {split} has too few runs"
    fields, plain = (
        ("max_steps", "lr", "power", "loss", "dice_weight", "images_per_batch"),
        E.BUDGETS["plain"],
    )
    for (name, _), records in runs.items():
        e = E.experiments()[name]
        expected = plain.recipe | {"max_steps": round(plain.steps * e.share)} | e.training
        for r in records:
            assert {k: r.config["training"][k] for k in fields} == {k: expected[k] for k in fields}, (
                f"{name} was trained with another recipe"
            )


@recorded
def test_the_recorded_models_are_blind_without_words_or_picture():
    """The gates of the data, on SHNet: without its words at most 1.15 / n, n = 8 objects; without its
    picture at most .12; on all four data sets."""
    runs = T.load_runs(RESULTS)
    least = {"no-text": 1.15 / 8, "no-image": 0.12, "shuffled": 1.15 / 8, "other": 1.15 / 8}
    for tag in E.TAGS.values():
        split = "test" if tag == "-referit" else "val"
        for control, gate in least.items():
            for r in runs[f"shnet{tag}", f"{split}.{control}"]:
                assert r.metrics["mean_iou"]["value"] <= 100 * gate, (tag, control)
        assert min(r.metrics["mean_iou"]["value"] for r in runs[f"shnet{tag}", split]) > 30


@recorded
def test_the_recorded_core_rows_are_six_seeds_of_the_budget_of_make_reproduce():
    """Each row of the argument six times, with today's settings; SHNet learns relations with each seed, and rows that
    begin with one run of pointing say so."""
    runs, b = T.load_runs(REPO / "results" / "quick"), E.BUDGETS["quick"]
    named = {job["experiment"]: job for job in E.plan(Path("x"), "core", "quick")}
    for name, job in named.items():
        records = runs[name, "val"]
        assert sorted(r.seeds["training"] for r in records) == list(range(6)), name
        for r in records:
            told = r.config["training"]
            told = {k: v for k, v in told.items() if k not in ("seed", "mixed_precision")}  # the machine's
            assert (
                told == {k: v for k, v in job["config"].items() if k in told}
                and r.config["budget"] == "quick"
            )
            assert (
                r.config["pointing"]["max_steps"] == b.pointing["max_steps"] and told["max_steps"] == b.steps
            )
            assert len(r.config["scores"]) == 5 and r.config["cost"]["seconds of pointing"] > 0
    score = lambda r: r.metrics["overall_iou"]["value"]
    relation = lambda r: r.groups["kind"]["relation"]["overall_iou"]["value"]
    whole = [score(r) for r in runs["shnet", "val"]]
    assert min(whole) >= 58 and sum(whole) / 6 >= 62 and min(map(relation, runs["shnet", "val"])) >= 50
    for a, b in (("shnet", "only-sfm"), ("baseline", "only-hcam")):
        pairs = zip(runs[a, "val"], runs[b, "val"])
        assert all(x.config["pointing"] == y.config["pointing"] for x, y in pairs)


def test_a_job_waits_for_the_run_that_it_shares(tmp_path):
    "Two rows that begin with one run are not started together; a row that begins with another one is not held up."
    code = (
        "import json, sys, time; from pathlib import Path; job = json.load(open(sys.argv[1]))\n"
        "first, log = Path(job['pointing']['out']), open(Path(job['folder']).parent / 'log', 'a')\n"
        "print(job['experiment'], (first / 'result.json').exists(), file=log, flush=True); time.sleep(1)\n"
        "first.mkdir(parents=True, exist_ok=True); (first / 'result.json').write_text('{}'); time.sleep(1)"
    )
    jobs = E.plan(tmp_path, data_root=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "JOB", code)
        E.run_jobs(jobs, 4, say=lambda line: None)
    started = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {name for name, _ in started[:2]} == {"shnet", "only-hcam"}, (
        "the two of the four that share nothing"
    )
    assert sorted(started) == [
        ["baseline", "True"],
        ["only-hcam", "False"],
        ["only-sfm", "True"],
        ["shnet", "False"],
    ]


def test_plan_points_first_where_the_budget_says_so(tmp_path):
    "The run before it has the same model, data and seed; rows without a pointer, and `plain`, have none."
    from refseg_nb.training.config import TrainConfig

    quick = {j["experiment"]: j for j in E.plan(tmp_path, "all", data_root=tmp_path)}
    for name, job in quick.items():
        before, config = job["pointing"], job["config"]
        if config["model"] in FAMILY or name.endswith("-no-pointing"):
            assert before is None
            continue
        assert (
            before["objective"] == "pointing"
            and before["max_steps"] == E.BUDGETS["quick"].pointing["max_steps"]
        )
        gone = {"without-pe": ("sfm_relative",), "no-groupnorm": ("norm_groups",)} | {
            "no-biases": ("sfm_relative", "sfm_word_bias")
        }
        gone = next((fields for end, fields in gone.items() if name.endswith(end)), ())
        aids = {k: v for k, v in config["overrides"].items() if k in E.AIDS}
        assert aids == {k: v for k, v in E.AIDS.items() if k not in gone}, name
        same = ("data", "root", "preset", "seed", "mixed_precision", "clip", "cache_dtype")
        assert all(before[k] == config[k] for k in same), name
        assert TrainConfig(**before).val_split is None
        models = E.model_config(before), E.model_config(config)
        other = {k for k in models[0] if models[0][k] != models[1][k]}
        assert all(k.startswith(BEHIND_SFM) for k in other - {"grid"}), (name, other)
        assert models[0]["grid"] == E.POINTING["overrides"]["grid"] < models[1]["grid"]
    first = {name: job["pointing"]["out"] for name, job in quick.items() if job["pointing"]}
    shared = [{k for k, v in first.items() if v == out} for out in dict.fromkeys(first.values())]
    of = lambda name: next(names for names in shared if name in names)
    assert {"baseline", "only-hcam"} == of("baseline") - {k for k in first if "-no-" in k}
    assert {"only-sfm", "sfm-conv3d", "sfm-convlstm", "mgate", "tgfe", "gbfm", "shnet"} <= of("shnet")
    alone = ("shnet-without-glove", "shnet-without-pe", "shnet-high", "shnet-uncplus", "shnet-resnet")
    assert all(not of(name) & {"shnet", "baseline"} for name in alone) and len({first[k] for k in alone}) == 5
    by_folder = {job["pointing"]["out"]: job["pointing"] for job in quick.values() if job["pointing"]}
    assert all(job["pointing"] in (None, by_folder.get(first.get(name))) for name, job in quick.items())
    assert "sfm_relative" not in quick["shnet-without-pe"]["config"]["overrides"], (
        "no positions, no offsets either"
    )
    assert all(j["pointing"] is None for j in E.plan(tmp_path, "all", "plain", data_root=tmp_path))
    for job in E.plan(tmp_path, "core", "plain", data_root=tmp_path):
        assert not set(job["config"]["overrides"]) & set(E.AIDS), (
            "the recipe that the recorded tables were made with"
        )
    short = E.plan(tmp_path, "core", steps=250, data_root=tmp_path)[0]
    share = 250 / E.BUDGETS["quick"].steps
    assert short["pointing"]["max_steps"] == round(share * E.BUDGETS["quick"].pointing["max_steps"])
    assert short["config"]["score_every"] == 50 and short["config"]["eval_limit"] == 150


def test_aids_are_off_where_the_paper_is_reproduced_as_it_is():
    for preset in ("paper", "released"):
        values = PRESETS[preset].to_dict()
        assert not any(values[field] for field in E.AIDS), preset
    assert not set(E.BUDGETS["full"].recipe["overrides"]) & set(E.AIDS)


def test_recorded_seeds_are_counted_from_the_records(tmp_path):
    "Against sums by hand, on records of two runs."
    records = tmp_path / "quick" / "records"
    records.mkdir(parents=True)
    for seed, level in ((0, 0.3), (1, 0.8)):
        save_record(fake("shnet", seed, level), records / f"shnet-seed{seed}-val.json")
    said = R.recorded_seeds("quick", tmp_path)
    found = []
    for seed in (0, 1):
        r = T.load_runs(tmp_path / "quick")["shnet", "val"][seed]
        at = r.arrays["kind"] == "relation"
        found.append(100 * r.arrays["intersection"][at].sum() / r.arrays["union"][at].sum())
    assert "2 runs of SHNet" in said and f"{sum(v >= 50 for v in found)} of 2 learned relations" in said
    assert f"{min(found):.1f} to {max(found):.1f}" in said
    assert R.recorded_seeds("standard", tmp_path) == "" == R.recorded_seeds("full", tmp_path)
