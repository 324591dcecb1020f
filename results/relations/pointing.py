"""When does a phrase point at its referent? SHNet before its decoder, trained to point, with one thing changed.

    refseg data make --size large --root DATA
    python results/relations/study.py prepare --root DATA --cache CACHE
    python results/relations/pointing.py --cache CACHE --name all --seed 1
    python results/relations/pointing.py --cache CACHE --name no-anchor --seed 1 --anchor 0

The run is the first one of `refseg reproduce` (`POINTING`): 48 phrases about six images a step, one level at a time. It
writes a line of JSON every 250 steps: for how many phrases the highest sum of the three levels' logits lies on the
referent (a tenth of the position or more), by kind, on 150 images of val.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from refseg_nb.models.shnet import ABLATIONS, PRESETS, SHNet
from refseg_nb.training.learner import polynomial_decay

GRID, TARGET = 8, 32


class Pointing:
    "One run."

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = o = options
        self.train, self.val = (
            torch.load(Path(o.cache) / f"{split}.pt", weights_only=False) for split in ("train", "val")
        )
        torch.manual_seed(o.seed)
        config = replace(
            PRESETS["refshapes"],
            **ABLATIONS[o.row],
            grid=GRID,
            aspp_rates=(1, 2, 4),
            sfm_layers=o.layers,
            sfm_heads=o.heads,
            sfm_relative=not o.no_relative,
            sfm_word_bias=o.word_bias or None,
            norm_groups=o.groups,
            pointer=True,
        )
        self.model = SHNet(config, vocab_size=self.train["words in all"]).train()
        self.model.prepare("pointing")
        for layer in self.model.sfm[0].layers if config.use_sfm else ():
            layer.attention.qkv.weight.data[: 2 * config.channels] *= math.sqrt(o.temperature)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, weight_decay=1e-4, fused=True)
        self.rng = np.random.default_rng(o.seed)
        self.of_image = [[] for _ in self.train["levels"][0]]
        for row, image in enumerate(self.train["image"].tolist()):
            self.of_image[image].append(row)

    def batches(self):
        "Images and their phrases, in a new order every epoch."
        o = self.options
        while True:
            order = self.rng.permutation(o.scenes or len(self.of_image))
            for k in range(0, len(order) - o.images + 1, o.images):
                images = order[k : k + o.images]
                yield images, [self.of_image[i] for i in images]

    def step(self, images: np.ndarray, drawn: list[list[int]], turn: int) -> None:
        "One step of the optimizer."
        data, rows = self.train, [row for r in drawn for row in r]
        index = torch.repeat_interleave(torch.arange(len(drawn)), torch.tensor([len(r) for r in drawn]))
        words = data["words"][rows][:, : int(data["length"][rows].max())]
        targets = data["masks"][data["referent"][rows]].float()
        nothing = torch.full((TARGET, TARGET), math.nan)
        anchors = [
            data["masks"][ids].float().amax(0) if ids else nothing
            for ids in (data["anchors"][r] for r in rows)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.adapt([v[torch.as_tensor(images)].float() for v in data["levels"]])
            losses = self.model.pointing_losses(features, words, index, targets, torch.stack(anchors), turn)
        self.optimizer.zero_grad(set_to_none=True)
        (losses["referent"] + self.options.anchor * losses["anchor"]).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, limit: int = 150) -> dict[str, float]:
        "How many phrases in a hundred point at their referent, by kind; `anchor`: of those that name one, at it."
        data, hits = self.val, {}
        self.model.eval()
        for k in range(min(limit, len(data["levels"][0]))):
            rows = (data["image"] == k).nonzero()[:, 0]
            words = data["words"][rows][:, : int(data["length"][rows].max())]
            with torch.autocast("cpu", torch.bfloat16):
                features = self.model.adapt([v[k : k + 1].float() for v in data["levels"]])
                levels = [self.model.pointing(features, words, torch.zeros_like(rows), n) for n in range(3)]
            referent, anchor = (sum(z.float() for z in part).argmax(1) for part in zip(*levels))
            for n, row in enumerate(rows.tolist()):
                hits.setdefault(data["kind"][row], []).append(
                    self._lies(referent[n], [data["referent"][row]])
                )
                if data["anchors"][row]:
                    hits.setdefault("anchor", []).append(self._lies(anchor[n], data["anchors"][row]))
        self.model.train()
        return {kind: round(100 * float(np.mean(found)), 1) for kind, found in sorted(hits.items())}

    def _lies(self, position: torch.Tensor, objects: list) -> bool:
        mask = torch.stack([self.val["masks"][int(i)] for i in objects]).float().amax(0)
        return bool(F.avg_pool2d(mask[None], TARGET // GRID).flatten()[position] > 0.1)

    def run(self, out: Path) -> None:
        "Train, and write a line every so many steps."
        o, start, batches = self.options, time.perf_counter(), self.batches()
        with open(out / f"{o.name}-seed{o.seed}.jsonl", "w", encoding="utf-8") as log:
            told = {k: v for k, v in vars(o).items() if k not in ("cache", "out")}
            log.write(json.dumps(told) + "\n")
            for turn in range(o.steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = polynomial_decay(turn, o.steps, o.lr, 0.9, 100)
                self.step(*next(batches), turn)
                if (turn + 1) % 250 == 0:
                    row = {"step": turn + 1, "seconds": round(time.perf_counter() - start)} | self.evaluate()
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    print(o.name, o.seed, row, flush=True)


def table(folder: Path) -> str:
    "The last rows of the records as Markdown: the range over the seeds, in per cent."
    found: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        told, *rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        found.setdefault(told["name"], []).append(rows[-1])
    kinds = ("attribute", "superlative", "relation", "composition", "anchor")
    lines = [f"| run | seeds | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for name, rows in found.items():
        cells = [sorted({f"{row[kind]:.0f}" for row in rows}, key=float) for kind in kinds]
        spans = [cell[0] if len(cell) == 1 else f"{cell[0]} to {cell[-1]}" for cell in cells]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(spans)} |")
    return "\n".join(lines)


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", required=True, help="folder of what `study.py prepare` keeps")
    parser.add_argument("--out", default="results/relations/pointing", help="folder of the records")
    parser.add_argument("--name", default="all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--images", type=int, default=6, help="images of a batch, with all their phrases")
    parser.add_argument("--scenes", type=int, help="train on the first so many scenes alone")
    parser.add_argument("--row", default="SHNet", choices=list(ABLATIONS), help="of Table 2")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="queries times keys begin so much larger"
    )
    parser.add_argument("--no-relative", action="store_true", help="no relative bias in SFM")
    parser.add_argument("--word-bias", type=float, default=2.5, help="of words in SFM, at the start; 0: none")
    parser.add_argument("--groups", type=int, default=8, help="groups of GroupNorm; 0: BatchNorm")
    parser.add_argument("--anchor", type=float, default=1.0, help="weight of the anchor's loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Pointing(options).run(Path(options.out))


if __name__ == "__main__":
    main()
