"""A data set of coloured squares in the REFER layout: small enough to train on in a second."""

from pathlib import Path

import numpy as np
from PIL import Image

from refseg_nb.data.refer import write_refer

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


def make_toy(root: Path, train=14, val=7, size=40, seed=0) -> Path:
    """Draw it; images have different numbers of expressions, so that batches and shards are uneven."""
    rng = np.random.default_rng(seed)
    folder = root / "images" / "toy"
    folder.mkdir(parents=True)
    images, annotations, refs = [], [], []
    for i in range(train + val):
        h, w = size, size + 8 * (i % 3)
        picture = np.full((h, w, 3), 200, np.uint8)
        for k, colour in enumerate(rng.permutation(list(COLOURS)).tolist()[: 2 + i % 2]):
            side = int(rng.integers(8, 14))
            x, y = int(rng.integers(0, w // 3 - 2)) + k * w // 3, int(rng.integers(0, h - side))
            picture[y : y + side, x : x + side] = COLOURS[colour]
            x1, y1 = min(x + side, w), min(y + side, h)
            ann = len(annotations) + 1
            annotations.append(
                {
                    "id": ann,
                    "image_id": i + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": float((x1 - x) * (y1 - y)),
                    "bbox": [x, y, x1 - x, y1 - y],
                    "segmentation": [[x, y, x1, y, x1, y1, x, y1]],
                }
            )
            texts = [f"the {colour} square", colour][: 1 + (i + k) % 2]
            sentences = [
                {
                    "sent_id": 10 * ann + j,
                    "sent": t,
                    "raw": t,
                    "tokens": t.split(),
                    "kind": ("attribute", "relation")[j],
                }
                for j, t in enumerate(texts)
            ]
            refs.append(
                {
                    "ref_id": ann,
                    "ann_id": ann,
                    "image_id": i + 1,
                    "category_id": 1,
                    "split": "train" if i < train else "val",
                    "file_name": f"{i}.png",
                    "sent_ids": [s["sent_id"] for s in sentences],
                    "sentences": sentences,
                }
            )
        Image.fromarray(picture).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": h, "width": w})
    write_refer(
        root / "toy",
        refs,
        {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "square", "supercategory": "shape"}],
        },
    )
    return root


SMALL = {
    "image_size": 32,
    "grid": 4,
    "sfm_dropout": 0.1,
    "aspp_dropout": 0.1,
    "channels": 16,
    "word_dim": 16,
    "backbone_weights": "none",
    "sfm_heads": 2,
    "sfm_ffn": 16,
    "aspp_rates": (1, 2),
    "decoder_widths": (16, 16, 16),
}
