"""Why do relations come late? SHNet at 96 px trained for a while with one thing changed, scored by kind of phrase.

    refseg data make --size large --root DATA
    python results/relations/study.py prepare --root DATA --cache CACHE
    python results/relations/study.py train --cache CACHE --name anchor --seed 1 --anchor 0.3 --relative --stop 2000

`prepare` keeps what does not change while SHNet trains: the frozen backbone's levels, pooled as the adapters pool
them, the words, and the masks of referents and anchors. `train` follows the recipe of `refseg reproduce` (24 phrases
about three images, cross-entropy and a tenth of Dice, AdamW, polynomial decay over 6,000 steps) and writes a line
of JSON every 500 steps: overall IoU on 300 images of val, in all and by kind. `table` prints the records.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from refseg_nb.models.losses import dice_loss
from refseg_nb.models.shnet import PRESETS, SHNet

GRID = 8
TARGET = 32  # pixels a side of the targets


def prepare(root: str, cache: str) -> None:
    "Write CACHE/train.pt and CACHE/val.pt."
    from refseg_nb.data.batches import RISDataset, soft_target
    from refseg_nb.data.refer import Refer
    from refseg_nb.data.words import vocabulary_for
    from refseg_nb.models.backbones import create_backbone
    from refseg_nb.refshapes.anchors import anchors_of, candidates_of

    refer = Refer(root, "refshapes")
    vocabulary, backbone = vocabulary_for(refer), create_backbone("refshapes").eval()
    Path(cache).mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", None), ("val", 300)):
        data = RISDataset(refer, split, vocabulary, image_size=96, target_size=TARGET)
        groups, levels = data.groups[:limit], []
        with torch.no_grad():
            for k in range(0, len(groups), 64):
                images = torch.stack([data.image(i) for i, _ in groups[k : k + 64]])
                levels.append([F.adaptive_max_pool2d(v, 2 * GRID).half() for v in backbone(images)])
        rows = [i for _, indices in groups for i in indices]
        samples = [data.samples[i] for i in rows]
        anchors = [sorted(anchors_of(refer, s)) for s in samples]
        candidates = [sorted(candidates_of(refer, s)) for s in samples]
        needed = sorted({s.ann_id for s in samples}.union(*anchors, *candidates))
        number = {ann: k for k, ann in enumerate(needed)}
        whole = torch.stack([torch.from_numpy(refer.mask(i)) for i in needed]) if split == "val" else None
        torch.save(
            {
                "levels": [torch.cat(v) for v in zip(*levels)],
                "image": torch.tensor([k for k, (_, indices) in enumerate(groups) for _ in indices]),
                "words": data.words[rows],
                "length": data.lengths[rows],
                "referent": torch.tensor([number[s.ann_id] for s in samples]),
                "anchors": [[number[i] for i in ids] for ids in anchors],
                "candidates": [[number[i] for i in ids] for ids in candidates],
                "masks": torch.stack([soft_target(refer.mask(i), TARGET).half() for i in needed]),
                "whole": whole,
                "kind": [s.kind for s in samples],
                "words in all": len(vocabulary),
            },
            Path(cache) / f"{split}.pt",
        )
        print(f"{split}: {len(groups):,} images, {len(samples):,} phrases")


class Study:
    "One run."

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = o = options
        self.train, self.val = (
            torch.load(Path(o.cache) / f"{split}.pt", weights_only=False) for split in ("train", "val")
        )
        if o.whiten:
            self.whiten(o.whiten)
        torch.manual_seed(o.seed)
        config = replace(
            PRESETS["refshapes"],
            grid=GRID,
            aspp_rates=(1, 2, 4),
            sfm_layers=o.layers,
            sfm_heads=o.heads,
            sfm_relative=o.relative,
            sfm_word_bias=o.word_bias,
            norm_groups=o.groups,
        )
        self.model = SHNet(config, vocab_size=self.train["words in all"]).train()
        # "is the anchor here?" and "is this what the phrase begins with?", after SFM's first layer
        self.anchor_head = nn.Linear(config.channels, 2 if o.candidates else 1)
        nn.init.constant_(self.anchor_head.bias, -3.0)
        self.after_first = None
        self.model.sfm[0].layers[0].register_forward_hook(self._keep)
        self.parameters = [*self.anchor_head.parameters()]
        self.parameters += [p for n, p in self.model.named_parameters() if not n.startswith("backbone")]
        if o.near:  # the last head of every layer begins by looking at neighbours
            y, x = torch.meshgrid(*2 * [torch.arange(1 - GRID, GRID)], indexing="ij")
            for layer in self.model.sfm[0].layers:
                layer.attention.bias.relative.data[-1] = -o.near * (y**2 + x**2).sqrt().flatten()
        biases = {
            id(p) for n, p in self.model.named_parameters() if ".bias.relative" in n or ".bias.words" in n
        }
        groups = [
            {"params": [p for p in self.parameters if id(p) not in biases], "times": 1.0},
            {"params": [p for p in self.parameters if id(p) in biases], "times": o.bias_lr},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.lr, weight_decay=1e-4, betas=(0.9, o.beta2), fused=True
        )
        self.rng = np.random.default_rng(o.seed)
        self.of_image = [[] for _ in self.train["levels"][0]]
        for row, image in enumerate(self.train["image"].tolist()):
            self.of_image[image].append(row)

    def whiten(self, how: str) -> None:
        "Frozen features with mean 0 and standard deviation 1 in every channel (`scale`), and uncorrelated (`pca`)."
        for k in range(3):
            some = self.train["levels"][k][::20].float().movedim(1, -1).flatten(0, 2)
            mean, cov = some.mean(0), some.T.cov()
            if how == "scale":
                matrix = torch.diag(cov.diag().clamp(min=1e-6).rsqrt())
            else:
                values, vectors = torch.linalg.eigh(cov)
                matrix = vectors @ torch.diag((values + 1e-2 * values.mean()).rsqrt()) @ vectors.T
            for data in (self.train, self.val):
                level = data["levels"][k]
                for n in range(0, len(level), 500):
                    part = level[n : n + 500].float().movedim(1, -1)
                    level[n : n + 500] = ((part - mean) @ matrix).movedim(-1, 1).half()

    def _keep(self, layer, inputs, output) -> None:
        self.after_first = output[0][:, : GRID**2]

    def batches(self):
        "Images and their phrases, in a new order every epoch."
        o = self.options
        while True:
            order = self.rng.permutation(o.scenes or len(self.of_image))
            for k in range(0, len(order) - o.images + 1, o.images):
                images = order[k : k + o.images]
                drawn = [self.of_image[i] for i in images]
                if o.phrases:
                    drawn = [
                        self.rng.choice(r, min(o.phrases, len(r)), replace=False).tolist() for r in drawn
                    ]
                yield images, drawn

    def named_loss(self, rows: list[int], what: str) -> torch.Tensor:
        "Cross-entropy of the share that the anchors (the candidates) have of each position, over the phrases with one."
        objects = [self.train[what][row] for row in rows]
        named = torch.tensor([bool(ids) for ids in objects])
        if not named.any():
            return torch.zeros(())
        masks = torch.stack([self.train["masks"][ids].float().amax(0) for ids in objects if ids])
        share = F.avg_pool2d(masks[:, None], TARGET // GRID).flatten(1)
        states = self.after_first.unflatten(0, (3, len(rows)))[:, named]  # three levels
        logits = self.anchor_head(states)[..., int(what == "candidates")].float()
        return F.binary_cross_entropy_with_logits(logits, share.expand_as(logits))

    def step(self, images: np.ndarray, drawn: list[list[int]]) -> float:
        "One step of the optimizer; the loss of the masks."
        data, rows = self.train, [row for r in drawn for row in r]
        index = torch.repeat_interleave(torch.arange(len(drawn)), torch.tensor([len(r) for r in drawn]))
        words = data["words"][rows][:, : int(data["length"][rows].max())]
        targets = data["masks"][data["referent"][rows]].float()
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.adapt([v[torch.as_tensor(images)].float() for v in data["levels"]])
            logits = self.model.segment(features, words, index).float()
            weights = {"anchors": self.options.anchor, "candidates": self.options.candidates}
            aids = sum(w * self.named_loss(rows, what) for what, w in weights.items() if w)
        loss = F.binary_cross_entropy_with_logits(logits, targets) + self.options.dice * dice_loss(
            logits, targets
        )
        self.optimizer.zero_grad(set_to_none=True)
        (loss + aids).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Overall IoU in per cent, in all and by kind; and for how many phrases the highest logit lies on the referent
        ("hit"), and the anchor head's on the anchor."""
        data, both, either, hits = self.val, {}, {}, {}
        self.model.eval()
        for k in range(len(data["levels"][0])):
            rows = (data["image"] == k).nonzero()[:, 0]
            words = data["words"][rows][:, : int(data["length"][rows].max())]
            with torch.autocast("cpu", torch.bfloat16):
                features = self.model.adapt([v[k : k + 1].float() for v in data["levels"]])
                logits = self.model.segment(features, words, torch.zeros_like(rows)).float()
                # the level in the middle
                states = self.after_first.unflatten(0, (3, len(rows)))[1]
                anchors = (
                    self.anchor_head(states)[..., 0].float() if self.options.anchor else [None] * len(rows)
                )
            masks = F.interpolate(logits[:, None], (96, 96), mode="bilinear", align_corners=False)[:, 0] > 0
            true = data["whole"][data["referent"][rows]]
            for n, row in enumerate(rows.tolist()):
                point = logits[n].flatten().argmax()
                hits.setdefault(data["kind"][row], []).append(
                    float(data["masks"][data["referent"][row]].flatten()[point] > 0.25)
                )
                if anchors[n] is not None and data["anchors"][row]:
                    mask = data["masks"][data["anchors"][row]].amax(0)[None].float()
                    share = F.avg_pool2d(mask, TARGET // GRID).flatten()
                    hits.setdefault("anchor", []).append(float(share[anchors[n].argmax()] > 0.1))
                for key in ("all", data["kind"][row]):
                    both[key] = both.get(key, 0) + int((masks[n] & true[n]).sum())
                    either[key] = either.get(key, 0) + int((masks[n] | true[n]).sum())
        self.model.train()
        found = {key: round(100 * both[key] / either[key], 1) for key in sorted(both)}
        return found | {"hit": {key: round(100 * float(np.mean(v)), 1) for key, v in sorted(hits.items())}}

    def run(self, out: Path) -> None:
        "Train, and write a line every so many steps."
        o, start, losses = self.options, time.perf_counter(), []
        batches = self.batches()
        with open(out / f"{o.name}-seed{o.seed}.jsonl", "w", encoding="utf-8") as log:
            told = {k: v for k, v in vars(o).items() if k not in ("cache", "out", "root", "what")}
            log.write(json.dumps(told) + "\n")
            for done in range(1, min(o.stop, o.steps) + 1):
                rate = min(o.lr * (1 - (done - 1) / o.steps) ** 0.9, o.lr * done / 100)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["times"]
                losses.append(self.step(*next(batches)))
                if done % o.every == 0 or done == o.stop:
                    row = self.evaluate() | {"step": done, "loss": round(float(np.mean(losses)), 4)}
                    row["seconds"], losses = round(time.perf_counter() - start), []
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    print(o.name, o.seed, row, flush=True)


def table(folder: Path) -> str:
    "The runs and the first looks as one Markdown table: overall IoU / that of relations, at each step."
    files = sorted((folder / "runs").glob("*.jsonl"))
    runs = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    found = [(first["name"], first["seed"], changed(first), points) for first, *points in runs]
    drafts = json.loads((folder / "drafts.json").read_text(encoding="utf-8"))
    found += [(f"draft: {d['name']}", d["seed"], d["changed"], d["points"]) for d in drafts]
    steps = sorted({p["step"] for *_, points in found for p in points if p["step"] % 500 == 0})
    lines = ["| run | seed | changed | " + " | ".join(f"{step:,}" for step in steps) + " |"]
    lines.append("|---|---|---|" + "---|" * len(steps))
    for name, seed, what, points in found:
        at = {p["step"]: f"{p['all']:.1f} / {p['relation']:.1f}" for p in points}
        lines.append(f"| {name} | {seed} | {what} | " + " | ".join(at.get(s, "") for s in steps) + " |")
    return "\n".join(lines)


def changed(told: dict) -> str:
    "What a run has that the recipe does not, in words."
    parts = {
        "relative bias": told["relative"],
        f"anchor ({told['anchor']:g})": told["anchor"],
        f"candidates ({told.get('candidates', 0):g})": told.get("candidates"),
        f"GroupNorm ({told['groups']})": told["groups"],
        f"word bias ({told['word_bias']})": told["word_bias"] is not None,
        f"{told['layers']} layers": told["layers"] != 2,
        f"{told['heads']} heads": told["heads"] != 2,
        f"lr {told['lr']:g}": told["lr"] != 1e-3,
        f"biases' lr times {told.get('bias_lr', 1):g}": told.get("bias_lr", 1) != 1,
        f"whitened features ({told.get('whiten')})": told.get("whiten"),
        f"a head that begins near ({told.get('near', 0):g})": told.get("near"),
        f"{told.get('scenes') or 0:,} scenes": told.get("scenes"),
        f"β₂ {told['beta2']:g}": told["beta2"] != 0.999,
        f"Dice {told['dice']:g}": told["dice"] != 0.1,
        f"{told['images']} images of {told['phrases'] or 'all'} phrases": told["images"] != 3
        or told["phrases"],
    }
    return ", ".join(part for part, there in parts.items() if there) or "nothing"


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["prepare", "train", "table"])
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--cache", help="folder for what `prepare` keeps")
    parser.add_argument("--out", default="results/relations/runs", help="folder of the records")
    parser.add_argument("--name", default="recipe")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6000, help="length of the learning rate's decay")
    parser.add_argument("--stop", type=int, default=2000, help="last step")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--images", type=int, default=3, help="images of a batch")
    parser.add_argument(
        "--phrases", type=int, help="phrases of an image in a batch; default: all, about eight"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--dice", type=float, default=0.1, help="weight of the Dice loss")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--relative", action="store_true", help="relative position bias in SFM")
    parser.add_argument("--word-bias", type=float, help="bias of words in SFM, at the start")
    parser.add_argument("--groups", type=int, default=0, help="groups of GroupNorm; 0: BatchNorm")
    parser.add_argument("--anchor", type=float, default=0.0, help="weight of the anchor's loss")
    parser.add_argument(
        "--bias-lr", type=float, default=1.0, help="learning rate of SFM's biases, times --lr"
    )
    parser.add_argument(
        "--near", type=float, default=0.0, help="the last head's relative bias begins at -this * distance"
    )
    parser.add_argument("--whiten", choices=["scale", "pca"], help="normalise the frozen features")
    parser.add_argument("--scenes", type=int, help="train on the first so many scenes alone")
    parser.add_argument("--candidates", type=float, default=0.0, help="weight of the candidates' loss")
    options = parser.parse_args()
    if options.what == "table":
        print(table(Path(__file__).parent))
        return
    if not options.cache or (options.what == "prepare" and not options.root):
        parser.error("prepare needs --root and --cache, train needs --cache")
    torch.set_num_threads(1)
    if options.what == "prepare":
        prepare(options.root, options.cache)
        return
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Study(options).run(Path(options.out))


if __name__ == "__main__":
    main()
