"""Make the reference results of the relation probe again: `python results/probe/make.py [NAME ...]`.

A name is a reader of `refseg_nb.probe.readers`, `largest-of-colour` (the predictor of chapter 13d), a shipped model,
or a folder that training wrote. Without names, all readers, that predictor and all shipped models are probed. What is
kept of each is `probe.json` and its record; the answers lie in `runs/probe` and are not asked again."""

import sys
from functools import cache
from pathlib import Path

from refseg_nb.inference.segmenter import load
from refseg_nb.models.hub import shipped
from refseg_nb.probe.example import largest_of_colour
from refseg_nb.probe.page import write_card
from refseg_nb.probe.questions import load_probe
from refseg_nb.probe.readers import READERS, Reader
from refseg_nb.probe.run import run_probe

HOME, ANSWERS = Path(__file__).parent, Path("runs/probe")
WITH_CARD = ("largest-of-colour", "shnet-refshapes")


def predictor_called(name):
    "A reader, the predictor of chapter 13d, or a model."
    if name in READERS:
        return Reader(name)
    return largest_of_colour if name == "largest-of-colour" else load(name)


def main(*names):
    probe = load_probe()
    probe.drawn = cache(probe._draw)  # each image is drawn once for all
    for given in names or (*READERS, "largest-of-colour", *shipped()):
        name = Path(given).name
        result = run_probe(predictor_called(given), ANSWERS / name, name=name)
        kept = HOME / name
        kept.mkdir(exist_ok=True)
        for file in ("probe.json", "record.json", "record.npz"):
            (kept / file).write_bytes((ANSWERS / name / file).read_bytes())
        if name in WITH_CARD:
            write_card(result, kept / "card.png")
        print(f"{name}: {result.verdict} ({result.seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
