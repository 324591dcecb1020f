"""Make the reference results of the relation probe again: `python results/probe/make.py [MODEL ...]`.

Without arguments all readers, the predictor of chapter 13d and the shipped model are probed; with arguments only these
models, each a folder that training wrote. What is kept of each is `probe.json` and its record."""

import sys
from functools import cache
from pathlib import Path

from refseg_nb.inference.segmenter import load
from refseg_nb.probe.example import largest_of_colour
from refseg_nb.probe.page import write_card, write_page
from refseg_nb.probe.questions import load_probe
from refseg_nb.probe.readers import READERS, Reader
from refseg_nb.probe.run import read_answers, run_probe

HOME = Path(__file__).parent
PAGES = Path("runs/probe")  # answers and pages: larger, and made again in minutes


def probed(predictor, name):
    "Probe a predictor, and keep its numbers."
    out = PAGES / name
    result = run_probe(predictor, out, name=name)
    write_page(result, load_probe(), read_answers(out / "answers.jsonl"), out / "index.html")
    write_card(result, out / "card.png")
    (HOME / name).mkdir(exist_ok=True)
    for file in ("probe.json", "record.json", "record.npz"):
        (HOME / name / file).write_bytes((out / file).read_bytes())
    print(f"{name}: {result.verdict} ({result.seconds:.0f} s)", flush=True)
    return out


def main(*models):
    probe = load_probe()
    probe.drawn = cache(probe._draw)  # each image is drawn once for all
    for model in models:
        probed(load(model), Path(model).name)
    if not models:
        for name in READERS:
            probed(Reader(name, probe), name)
        for name, predictor in (
            ("largest-of-colour", largest_of_colour),
            ("shnet-refshapes", load("shnet-refshapes")),
        ):
            card = probed(predictor, name) / "card.png"
            (HOME / name / "card.png").write_bytes(card.read_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
