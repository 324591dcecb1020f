"""The stand-in of chapter 12b with one thing changed at a time: how many seeds learn relations, and when.

    python results/relations/standin.py                 # all that results/relations/standin.json lacks
    python results/relations/standin.py nothing both    # these

A seed has learned relations at the first of two measurements in a row, 50 steps apart, with four fifths right.
"""

import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from refseg_nb.course.standin import Seeds, learn, step

FILE = Path(__file__).parent / "standin.json"
SEEDS, STEPS = 6, 800
BOTH = {"anchor": 1.0, "relative": True}
CHANGES = {  # name -> what it is, arguments of `Seeds`, arguments of a step
    "nothing": ("nothing", {}, {}),
    "relative": ("relative bias", {"relative": True}, {}),
    "anchor": ("the anchor is asked", {"anchor": 1.0}, {}),
    "both": ("both", BOTH, {}),
    "both, anchor 0.3": ("both, the anchor with weight 0.3", BOTH | {"anchor": 0.3}, {}),
    "both, 3 layers": ("both, three layers", BOTH | {"layers": 3}, {}),
    "3 layers": ("three layers", {"layers": 3}, {}),
    "temperature 2": ("queries times keys twice as large", {"temperature": 2.0}, {}),
    "staged": ("attributes alone for the first 200 steps", {}, {"staged": 200}),
    "relations alone": ("no attributes", {}, {"share": 1.0}),
    "lr 4e-3": ("twice the learning rate", {"lr": 4e-3}, {}),
    "96 questions": ("twice as many questions a step", {}, {"questions": 96}),
}


def jumps(rows: list[dict]) -> list[int | None]:
    "Of each seed: the step at which it had learned relations."
    found = []
    for k in range(SEEDS):
        right = [row["relation"][k] >= 0.8 for row in rows]
        found.append(
            next((rows[i]["step"] for i in range(len(right) - 1) if right[i] and right[i + 1]), None)
        )
    return found


def run(name: str) -> dict:
    "One line of the table."
    changed, reader, of_step = CHANGES[name]
    start, seeds = time.perf_counter(), Seeds(SEEDS, **reader)
    staged, share = of_step.get("staged", 0), of_step.get("share", 0.5)
    rows = learn(
        seeds,
        STEPS,
        before=lambda done: 0.0 if done < staged else share,
        one=partial(step, questions=of_step.get("questions", 48)),
    )
    thin = [
        {"step": row["step"]} | {kind: [round(x, 3) for x in row[kind]] for kind in ("attribute", "relation")}
        for row in rows
    ]
    return {
        "changed": changed,
        "jumps": jumps(rows),
        "seconds": round(time.perf_counter() - start),
        "rows": thin,
    }


def table() -> str:
    "The record as Markdown."
    lines = ["| changed | seeds that learned relations | at step | right at the end |", "|---|---|---|---|"]
    for one in json.loads(FILE.read_text(encoding="utf-8")).values():
        there = [str(j) for j in sorted(j for j in one["jumps"] if j)]
        last = sorted(one["rows"][-1]["relation"])
        lines.append(
            f"| {one['changed']} | {len(there)} of {len(one['jumps'])} | {', '.join(there) or '–'} |"
            f" {last[0]:.2f} to {last[-1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    "The command line."
    warnings.filterwarnings("ignore", message="There is a performance drop")
    torch.set_num_threads(1)
    record = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in sys.argv[1:] or [name for name in CHANGES if name not in record]:
        record[name] = run(name)
        print(name, record[name]["jumps"], record[name]["seconds"], "s", flush=True)
        ordered = {k: record[k] for k in CHANGES if k in record}
        FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
