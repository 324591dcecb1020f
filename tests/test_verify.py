"""Verifying a copy: nothing is found in sound data, every planted damage is found by its kind, and what the
strict reader refuses is always a finding."""

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from refseg_nb.data import verify as module
from refseg_nb.data.refer import (
    PUBLISHED,
    ImageInfo,
    Refer,
    ReferError,
    image_folder_of,
    load_pickle,
    write_refer,
)
from refseg_nb.data.referit import PUBLISHED_REFERIT, ReferIt, write_referit
from refseg_nb.data.verify import (
    FILTER_PARTITIONS,
    KINDS,
    Finding,
    image_faults,
    leakage,
    mask_faults,
    outline_area,
    verify,
)

PARTITIONS = [
    ("refcoco", "unc"),
    ("refcoco", "micro"),
    ("refcoco+", "unc"),
    ("refcoco+", "micro"),
    ("refcocog", "google"),
    ("refcocog", "umd"),
    ("refcocog", "micro"),
]
quiet = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(root, name, split_by=None, **more):
    report = verify(root, name, split_by, progress=False, **more)
    assert set(report.kinds) <= set(KINDS)
    return report


# ---------------------------------------------------------------- sound data
@pytest.mark.parametrize("name,split_by", PARTITIONS)
def test_nothing_is_found_in_the_real_sample(real_data, name, split_by):
    report = check(real_data, name, split_by)
    assert report.findings == [] and report.status == "part" and not report.ok
    refer = Refer(real_data, name, split_by)
    assert {r["split"]: r["found"] for r in report.rows if r["found"]["refs"]} == refer.counts()
    assert report.checked == {
        "image files": len({r.image_id for r in refer.refs}),
        "masks": len({r.ann_id for r in refer.refs}),
        "refs": len(refer.refs),
        "expressions": sum(len(r.sentences) for r in refer.refs),
    }


@pytest.mark.parametrize("name", ["refshapes", "refshapes+"])
def test_nothing_is_found_in_refshapes(tiny_root, name):
    report = check(tiny_root, name)
    assert report.findings == [] and report.ok and report.counts.status == "whole"


def test_the_recorded_area_is_that_of_the_outline_and_pixels_are_rougher(real_data):
    """What chapter 03e says: to the last digit for the outline, up to 5 % for the pixels of small objects."""
    outline, pixels, n = [], [], 0
    for name in ("refcoco", "refcocog"):
        refer = Refer(real_data, name, "micro")
        for ann_id, ann in refer.annotations.items():
            if ann["iscrowd"]:
                continue
            n += 1
            outline.append(abs(outline_area(ann["segmentation"]) / ann["area"] - 1))
            if ann["area"] > 50:
                pixels.append(abs(refer.mask(ann_id).sum() / ann["area"] - 1))
            info = refer.images[ann["image_id"]]
            assert mask_faults(ann, info.height, info.width) == []
    assert n > 390 and max(outline) < 1e-9 and 0.04 < max(pixels) < 0.06


# ---------------------------------------------------------------- planted damage
def png_bomb(width, height):
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


class Copy:
    """A copy of a data set to be damaged: refs, instances and image files."""

    def __init__(self, source, name, split_by, root):
        self.root, self.name, self.split_by, self.source = root, name, split_by, Refer(source, name, split_by)
        self.refs = load_pickle(source / name / f"refs({split_by}).p")
        self.instances = json.loads((source / name / "instances.json").read_text())
        (root / name).mkdir()
        if name == "refshapes":
            self.keep_a_few()
        used = {r["image_id"] for r in self.refs}
        for image in self.instances["images"]:
            if image["id"] not in used:
                continue
            path = root / image_folder_of(name) / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / image_folder_of(name) / image["file_name"], path)
        write_refer(root / name, self.refs, self.instances, split_by)
        self.ref = self.refs[0]
        self.ann = next(a for a in self.instances["annotations"] if a["id"] == self.ref["ann_id"])
        self.image = next(i for i in self.instances["images"] if i["id"] == self.ref["image_id"])
        self.other = next(r for r in self.refs if r["split"] != self.ref["split"])  # a ref of another split

    def keep_a_few(self):
        """Eight images of train and of val, and their counts, to be quick."""
        few = {
            r["image_id"]
            for r in self.refs
            if r["split"] in ("train", "val") and r["image_id"] % 10_000_000 <= 8
        }
        self.refs = [r for r in self.refs if r["image_id"] in few]
        for table, key in (("images", "id"), ("annotations", "image_id")):
            self.instances[table] = [x for x in self.instances[table] if x[key] in few]
        counts = {}
        for split in ("train", "val"):
            refs = [r for r in self.refs if r["split"] == split]
            counts[split] = {
                "images": len({r["image_id"] for r in refs}),
                "refs": len(refs),
                "expressions": sum(len(r["sentences"]) for r in refs),
            }
        (self.root / self.name / "refshapes.json").write_text(json.dumps({"counts": counts}))

    @property
    def file(self):
        return self.file_of(self.image["id"])

    def file_of(self, image_id):
        name = next(i["file_name"] for i in self.instances["images"] if i["id"] == image_id)
        return self.root / image_folder_of(self.name) / name

    def one_more(self, **changes):
        self.refs.append(
            copy.deepcopy(self.ref)
            | {"ref_id": 10**8, "sentences": [{"sent_id": 10**8, "sent": "it"}], "sent_ids": [10**8]}
            | changes
        )

    def mask(self):
        return self.source.mask(self.ann["id"])

    def set_mask(self, mask):
        from pycocotools import mask as coco_mask

        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        self.ann["segmentation"] = {"size": list(mask.shape), "counts": rle["counts"].decode()}

    def verify(self, **more):
        if self.refs is not None:
            write_refer(self.root / self.name, self.refs, self.instances, self.split_by)
        return check(self.root, self.name, self.split_by, **more)


@pytest.fixture(params=["refcoco", "refshapes"])
def sound(request, tmp_path):
    if request.param == "refshapes":
        return Copy(request.getfixturevalue("tiny_root"), "refshapes", "unc", tmp_path)
    return Copy(request.getfixturevalue("real_data"), "refcoco", "unc", tmp_path)


def cut_file(c, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    c.refs = None


def put_refs(c, data):
    (c.root / c.name / "refs(unc).p").unlink()
    if data:
        (c.root / c.name / "refs(unc).p").write_bytes(data)
    c.refs = None


def move(c):
    mask, (x, _, w, _) = c.mask(), c.ann["bbox"]
    width = mask.shape[1]
    step = -6 if x > 8 else 6
    assert x + step > 0 and x + w + step < width
    c.set_mask(np.roll(mask, step, axis=1))
    c.ann["area"] = int(mask.sum())


def drawn_elsewhere(c):
    w = c.image["width"]
    c.ann.update(
        segmentation=[[w - 20, 5, w + 15, 5, w + 15, 40, w - 20, 40]], area=35 * 35, bbox=[w - 20, 5, 35, 35]
    )


DAMAGE = [  # name, how it is planted, the kind that must be found, kinds that may come with it
    ("refs are cut", lambda c: cut_file(c, c.root / c.name / "refs(unc).p", -30), "unreadable file", ()),
    ("refs want code", lambda c: put_refs(c, b"cos\nsystem\n(S'true'\ntR."), "unreadable file", ()),
    ("refs are gone", lambda c: put_refs(c, None), "unreadable file", ()),
    (
        "instances are cut",
        lambda c: cut_file(c, c.root / c.name / "instances.json", 3000),
        "unreadable file",
        (),
    ),
    ("instances are a list", lambda c: setattr(c, "instances", []), "unreadable file", ()),
    ("a table is gone", lambda c: c.instances.pop("categories"), "malformed record", ()),
    ("a ref has no split", lambda c: c.ref.pop("split"), "malformed record", ()),
    ("a sentence has no text", lambda c: c.ref["sentences"][0].update(sent=None), "malformed record", ()),
    ("tokens are numbers", lambda c: c.ref["sentences"][0].update(tokens=[1]), "malformed record", ()),
    ("an annotation has no image", lambda c: c.ann.pop("image_id"), "malformed record", ()),
    ("an image is 0 pixels high", lambda c: c.image.update(height=0), "malformed record", ()),
    ("an area is text", lambda c: c.ann.update(area="large"), "malformed record", ()),
    ("a box has three numbers", lambda c: c.ann.update(bbox=[1, 2, 3]), "malformed record", ()),
    ("a ref twice", lambda c: c.refs.append(copy.deepcopy(c.ref)), "duplicate id", ()),
    (
        "a sentence id twice",
        lambda c: c.ref["sentences"][0].update(sent_id=c.other["sentences"][0]["sent_id"]),
        "duplicate id",
        ("wrong sentence ids",),
    ),
    ("an annotation twice", lambda c: c.instances["annotations"].append(dict(c.ann)), "duplicate id", ()),
    ("an image twice", lambda c: c.instances["images"].append(dict(c.image)), "duplicate id", ()),
    (
        "a category twice",
        lambda c: c.instances["categories"].append(c.instances["categories"][0]),
        "duplicate id",
        (),
    ),
    ("no such annotation", lambda c: c.ref.update(ann_id=10**9), "broken link", ()),
    ("no such image", lambda c: c.ref.update(image_id=10**9), "broken link", ("wrong counts",)),
    (
        "an annotation of another image",
        lambda c: c.ref.update(ann_id=c.other["ann_id"], category_id=c.other["category_id"]),
        "broken link",
        ("shared object",),
    ),
    ("an image is not listed", lambda c: c.instances["images"].remove(c.image), "broken link", ()),
    (
        "another category",
        lambda c: c.ref.update(
            category_id=next(x["id"] for x in c.instances["categories"] if x["id"] != c.ref["category_id"])
        ),
        "wrong category",
        (),
    ),
    (
        "an unknown category",
        lambda c: (c.ref.update(category_id=999), c.ann.update(category_id=999)),
        "wrong category",
        (),
    ),
    ("an empty sentence", lambda c: c.ref["sentences"][0].update(sent=" ", tokens=[]), "empty sentence", ()),
    ("a ref without sentences", lambda c: c.ref.update(sentences=[], sent_ids=[]), "empty sentence", ()),
    (
        "other tokens",
        lambda c: c.ref["sentences"][0].update(tokens=["something", "else"]),
        "wrong tokens",
        (),
    ),
    (
        "other sentence ids",
        lambda c: c.ref.update(sent_ids=[*c.ref["sent_ids"], 10**9]),
        "wrong sentence ids",
        (),
    ),
    (
        "a name that leads out",
        lambda c: c.image.update(file_name="../" * 9 + "etc/passwd"),
        "unsafe path",
        (),
    ),
    ("an absolute name", lambda c: c.image.update(file_name="/etc/passwd"), "unsafe path", ()),
    ("an image is gone", lambda c: c.file.unlink(), "missing image", ()),
    ("the image folder is gone", lambda c: shutil.rmtree(c.root / "images"), "missing image", ()),
    (
        "an image is cut",
        lambda c: c.file.write_bytes(c.file.read_bytes()[: c.file.stat().st_size // 2]),
        "broken image",
        (),
    ),
    ("an image is a page", lambda c: c.file.write_bytes(b"<html>404 Not Found</html>"), "broken image", ()),
    ("an image is empty", lambda c: c.file.write_bytes(b""), "broken image", ()),
    (
        "an image was shrunk",
        lambda c: Image.open(c.file).resize((40, 40)).save(c.file),
        "wrong image size",
        (),
    ),
    ("an image is a bomb", lambda c: c.file.write_bytes(png_bomb(60000, 60000)), "wrong image size", ()),
    ("all is said to be huge", lambda c: c.image.update(height=60000, width=60000), "wrong image size", ()),
    (
        "a mask of another size",
        lambda c: c.ann.update(segmentation={"size": [7, 9], "counts": [63]}),
        "broken mask",
        (),
    ),
    ("a mask of two points", lambda c: c.ann.update(segmentation=[[1, 1, 2, 2]]), "broken mask", ()),
    (
        "a mask with too large a number",
        lambda c: c.ann.update(segmentation=[[10**400] * 6]),
        "broken mask",
        (),
    ),
    ("an empty mask", lambda c: c.ann.update(segmentation=[]), "empty mask", ()),
    ("a polygon of a larger image", drawn_elsewhere, "mask outside image", ()),
    (
        "a polygon far away",
        lambda c: c.ann.update(segmentation=[[1, 1, 5000, 1, 5000, 5000]]),
        "mask outside image",
        (),
    ),
    ("another area", lambda c: c.ann.update(area=c.ann["area"] * 1.05 + 5), "wrong area", ()),
    (
        "a mask is cut",
        lambda c: c.set_mask(
            c.mask() & (np.arange(c.image["width"]) > c.ann["bbox"][0] + c.ann["bbox"][2] / 2)
        ),
        "wrong area",
        (),
    ),
    ("a mask was moved", move, "mask outside box", ()),
    (
        "a ref changes its split",
        lambda c: c.other.update(split=c.ref["split"]),
        "shared image",
        ("wrong counts",),
    ),
    (
        "an object in two splits",
        lambda c: c.one_more(split=c.other["split"]),
        "shared object",
        ("shared image", "wrong counts"),
    ),
    (
        "a picture under two ids",
        lambda c: (
            shutil.copyfile(c.file, c.file_of(c.other["image_id"])),
            next(i for i in c.instances["images"] if i["id"] == c.other["image_id"]).update(
                height=c.image["height"], width=c.image["width"]
            ),
        ),
        "same picture",
        ("mask outside image", "broken mask"),
    ),
    (
        "an unknown split",
        lambda c: c.one_more(split="extra", image_id=c.ref["image_id"]),
        "wrong counts",
        ("shared image", "shared object"),
    ),
]


@pytest.mark.parametrize("plant,kind,others", [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_planted_damage_is_found_and_named(sound, plant, kind, others):
    plant(sound)
    report = sound.verify()
    assert kind in report.kinds, report
    assert set(report.kinds) <= {kind, *others}, report
    assert report.status == "faulty" and not report.ok
    record = json.dumps(report.record())
    assert str(sound.root) not in record and json.loads(record)["kinds"] == report.kinds


def test_the_copies_are_sound_before(sound):
    report = sound.verify()
    assert report.findings == [] and report.status == ("part" if sound.name == "refcoco" else "ok")


def test_every_kind_is_planted_somewhere():
    planted = {kind for _, _, kind, _ in DAMAGE}
    # these two are ReferIt's: below
    assert len(planted) >= 12 and set(KINDS) - planted == {"missing mask", "wrong splits"}


def test_all_damage_is_found_at_once_and_named_where_it_is(sound):
    sound.file.unlink()
    sound.ref["sentences"][0]["tokens"] = ["no"]
    sound.refs[-1]["split"] = 7
    sound.instances["annotations"].append({"id": 5})
    report = sound.verify()
    assert report.kinds.items() >= {"missing image": 1, "wrong tokens": 1, "malformed record": 2}.items()
    where = {f.kind: f.where for f in report.findings if f.kind != "malformed record"}
    assert where["missing image"] == f"{image_folder_of(sound.name)}/{sound.image['file_name']}"
    assert (
        where["wrong tokens"] == f"{sound.name}/refs(unc).p: ref {sound.ref['ref_id']}, sentence"
        f" {sound.ref['sentences'][0]['sent_id']}"
    )
    text = str(report)
    assert all(f.where in text and f.message in text for f in report.findings)


def test_without_images_only_records_and_masks_are_checked(sound):
    shutil.rmtree(sound.root / "images")
    report = sound.verify(images=False)
    assert report.findings == [] and report.checked["image files"] == 0 and "images" not in report.files
    sound.ann["segmentation"] = []
    assert sound.verify(images=False).kinds == {"empty mask": 1}


def test_the_number_of_processes_changes_nothing(tiny_root, tmp_path):
    sound = Copy(tiny_root, "refshapes", "unc", tmp_path)
    for number in (0, 3, 5):
        sound.refs[number]["sentences"][0]["tokens"] = ["no"]
    sound.file.write_bytes(b"no image")
    alone = sound.verify(workers=1)
    assert (sound.verify(workers=2).findings, sound.verify(workers=2).files) == (alone.findings, alone.files)


def test_a_script_without_a_main_guard_goes_on_alone(tiny_root, tmp_path):
    sound = Copy(tiny_root, "refshapes", "unc", tmp_path)
    sound.file.write_bytes(b"no image")
    sound.verify()
    script = tmp_path / "script.py"
    script.write_text(
        f"from refseg_nb.data.verify import verify\nprint(verify({str(sound.root)!r}, {sound.name!r},"
        " workers=2, progress=False).kinds)"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "{'broken image': 1}", done.stderr


# ---------------------------------------------------------------- what is legal stays legal
HOUSE = [[2, 4, 12, 4, 12, 9, 2, 9], [8, 1, 11, 1, 11, 6, 8, 6]]


def toy(root, refs=None, instances=None, name="mine", split_by="unc", write=True):
    sentences = lambda n: [
        {"sent_id": 10 * n + i, "sent": "the house", "raw": "The house", "tokens": ["the", "house"]}
        for i in (0, 1)
    ]
    ref = lambda n, split, image, ann: {
        "ref_id": n,
        "ann_id": ann,
        "image_id": image,
        "category_id": 3,
        "split": split,
        "file_name": f"x_{ann}.png",
        "sent_ids": [10 * n, 10 * n + 1],
        "sentences": sentences(n),
    }
    refs = refs or [ref(0, "train", 1, 7), ref(1, "train", 1, 7), ref(2, "val", 2, 8)]
    instances = instances or {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 14} for i in (1, 2)],
        "categories": [{"id": 3, "name": "house"}],
        "annotations": [
            {
                "id": 7,
                "image_id": 1,
                "category_id": 3,
                "iscrowd": 0,
                "segmentation": HOUSE,
                "area": 65.0,
                "bbox": [2.0, 1.0, 10.0, 8.0],
            },
            {
                "id": 8,
                "image_id": 2,
                "category_id": 3,
                "iscrowd": 0,
                "segmentation": [{"size": [10, 14], "counts": [24, 10, 106]}],
            },
            {
                "id": 9,
                "image_id": 2,
                "category_id": 3,
                "iscrowd": 1,
                "area": 3,
                "bbox": [],
                "segmentation": {"size": [10, 14], "counts": [0, 140]},
            },
        ],
    }
    folder = root / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    for i in (1, 2):
        Image.fromarray(np.full((10, 14, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    if write:
        write_refer(root / name, refs, instances, split_by)
    return refs, instances


def test_what_the_published_files_hold_is_no_finding(tmp_path):
    """Two refs of one object, repeated sentences, overlapping polygons, lists of runs, and a crowd that no
    ref points at."""
    toy(tmp_path)
    report = check(tmp_path, "mine")
    assert report.findings == [] and report.status == "ok" and report.counts.status == "unpublished"
    # the recorded area counts the overlap twice
    assert outline_area(HOUSE) == 65 and Refer(tmp_path, "mine").mask(7).sum() == 59


def test_google_may_share_images_but_not_objects(tmp_path):
    refs, instances = toy(tmp_path, write=False)
    refs[2]["image_id"] = 1
    instances["annotations"][1]["image_id"] = 1
    for split_by, kinds in (("google", {}), ("umd", {"shared image": 1})):
        write_refer(tmp_path / "mine", refs, instances, split_by)
        assert check(tmp_path, "mine", split_by).kinds == kinds
    refs[2]["ann_id"] = 7
    write_refer(tmp_path / "mine", refs, instances, "google")
    assert check(tmp_path, "mine", "google").kinds == {"shared object": 1}


def test_refclefs_test_splits_overlap_by_design(tmp_path):
    refs, instances = toy(tmp_path, name="refclef", write=False)
    shutil.copytree(tmp_path / "images" / "refclef", tmp_path / image_folder_of("refclef"))
    refs[0]["split"], refs[1]["split"] = "testA", "testC"
    write_refer(tmp_path / "refclef", refs, instances)
    assert check(tmp_path, "refclef").findings == []
    refs[1]["split"] = "val"
    write_refer(tmp_path / "refclef", refs, instances)
    assert check(tmp_path, "refclef").kinds == {"shared image": 1, "shared object": 1}


def test_whole_part_and_wrong(tmp_path, monkeypatch):
    toy(tmp_path)
    more = {"wrong counts": 1}
    for val, status, kinds in [
        ((1, 1, 2), "ok", {}),
        ((1, 1, 3), "part", {}),
        ((1, 1, 1), "faulty", more),
        (None, "faulty", more),
    ]:
        monkeypatch.setitem(PUBLISHED, ("mine", "unc"), {"train": (1, 2, 4)} | ({"val": val} if val else {}))
        report = check(tmp_path, "mine")
        assert (report.status, report.kinds) == (status, kinds)
    for text in ("", "[]", '{"counts": {"train": {"images": "x", "refs": [], "expressions": 1}}}'):
        toy(tmp_path, name="refshapes")
        (tmp_path / "refshapes" / "refshapes.json").write_text(text)
        assert "unreadable file" in check(tmp_path, "refshapes").kinds


def test_arguments_that_are_wrong_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="refcoco: no such folder; the root must hold"):
        check(tmp_path, "refcoco")
    with pytest.raises(FileNotFoundError, match="referit: no such folder"):
        check(tmp_path, "referit")
    toy(tmp_path, name="refcocog", split_by="umd")
    with pytest.raises(ValueError, match=r"refcocog has more than one partition.*umd"):
        check(tmp_path, "refcocog")


def test_a_record_is_saved_whole(tmp_path, monkeypatch):
    toy(tmp_path)
    (tmp_path / "images" / "mine" / "1.png").write_bytes(b"")
    report = check(tmp_path, "mine")
    path = report.save(tmp_path / "new" / "report.json")
    saved = json.loads(path.read_text())
    assert (
        [Finding(**f) for f in saved["findings"]] == report.findings
        and saved["status"] == "faulty"
        and saved["data"] == "mine"
    )
    assert set(saved["sha256"]) == {"mine/instances.json", "mine/refs(unc).p", "images"} and all(
        len(h) == 64 for h in saved["sha256"].values()
    )
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        report.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_fingerprint_tells_copies_apart(tmp_path):
    for name in ("a", "b", "c"):
        toy(tmp_path / name)
    one, two = (tmp_path / "c" / "images" / "mine" / f"{i}.png" for i in (1, 2))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    a, b, c = (check(tmp_path / name, "mine").files for name in ("a", "b", "c"))
    assert a == b and {k for k in a if a[k] != c[k]} == {"images"}


def test_a_header_is_compared_before_a_pixel_is_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("it was decoded"))
    assert [kind for kind, _ in image_faults(tmp_path, ImageInfo(1, "a.png", 10, 14))] == ["wrong image size"]


# ---------------------------------------------------------------- masks against naive checks
def test_outline_area_is_the_exact_area():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y, w, h = rng.random(4) * 40
        assert outline_area([[x, y, x + w, y, x + w, y + h, x, y + h]]) == pytest.approx(w * h)
        a, b, c = rng.random((3, 2)) * 50
        assert outline_area([[*a, *b, *c]]) == pytest.approx(abs(np.linalg.det([b - a, c - a])) / 2)
    assert outline_area([]) == 0 and outline_area(HOUSE) == 50 + 15


def test_box_and_image_limits():
    square = lambda x0, y0, x1, y1: [[x0, y0, x1, y0, x1, y1, x0, y1]]
    for shift in np.arange(0, 6, 0.5):
        kinds = [
            k
            for k, _ in mask_faults(
                {"segmentation": square(4, 4, 10, 9), "bbox": [4 + shift, 4, 10, 5]}, 20, 20
            )
        ]
        assert kinds == (["mask outside box"] if shift > 2 else [])
    for out in np.arange(0, 3, 0.25):
        kinds = [k for k, _ in mask_faults({"segmentation": square(4, 4, 20 + out, 9)}, 20, 20)]
        assert kinds == (["mask outside image"] if out > 1 else [])


# ---------------------------------------------------------------- what the strict reader refuses is a finding
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "../../x", "a\0b", "1.png", 7, 8, 1, 2])
)
plain = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def spoil(data, draw):
    """Change, remove, repeat or wrap one thing somewhere in a nested structure."""
    target = data
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(target[key], dict | list) and target[key] and draw(st.integers(0, 3)):
            target = target[key]
        else:
            break
    action = draw(st.sampled_from(["replace", "remove", "wrap", "repeat"]))
    if action == "remove":
        del target[key]
    elif action == "wrap":
        target[key] = [target[key]]
    elif action == "repeat" and isinstance(target, list):
        target.append(copy.deepcopy(target[key]))
    else:
        target[key] = draw(plain)


def strict(root, name):
    """None if the strict reader loads every sample, else what it says."""
    try:
        refer = Refer(root, name, "unc")
        for split in refer.splits:
            for sample in refer.samples(split):
                refer.mask(sample.ann_id), refer.load_image(sample.image_id)
    except Exception as error:
        return repr(error)


@quiet
@given(st.data())
def test_fuzz_what_the_strict_reader_refuses_is_a_finding(tmp_path, data):
    refs, instances = copy.deepcopy(toy(tmp_path, name="fuzz", write=False))  # the toys share their outlines
    for _ in range(data.draw(st.integers(1, 3))):
        spoil(data.draw(st.sampled_from([refs, instances])), data.draw)
    (tmp_path / "fuzz").mkdir(exist_ok=True)
    (tmp_path / "fuzz" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (tmp_path / "fuzz" / "instances.json").write_text(json.dumps(instances))
    report, refused = check(tmp_path, "fuzz", "unc"), strict(tmp_path, "fuzz")
    assert report.findings or not refused, refused
    assert "MemoryError" not in f"{report.findings} {refused}"
    json.dumps(report.record())


FILES = st.sampled_from(["fuzz/refs(unc).p", "fuzz/instances.json", "images/fuzz/1.png", "images/fuzz/2.png"])


@quiet
@given(FILES, st.integers(0, 900), st.binary(max_size=4), st.booleans())
def test_fuzz_bytes_of_the_files(tmp_path, file, at, junk, cut):
    toy(tmp_path, name="fuzz")
    raw = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(raw[:at] + junk + (b"" if cut else raw[at + len(junk) :]))
    report, refused = check(tmp_path, "fuzz", "unc"), strict(tmp_path, "fuzz")
    assert report.findings or not refused, refused
    # Pillow asks for as many bytes as a block of a PNG claims to have, and touches only those that are there
    assert file.startswith("images/") or "MemoryError" not in f"{report.findings} {refused}"


def test_deep_nesting_is_a_finding(tmp_path):
    toy(tmp_path)
    (tmp_path / "mine" / "refs(unc).p").write_bytes(b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b".")
    (tmp_path / "mine" / "instances.json").write_text("[" * 100000)
    assert check(tmp_path, "mine").kinds == {"unreadable file": 2}


# ---------------------------------------------------------------- ReferIt
def referit(root, name="referit", sizes=True):
    rng = np.random.default_rng(0)
    queries = {
        "train": {"1_1": ["sky", "sky"], "1_2": ["red house"]},
        "val": {"2_1": ["grass"]},
        "test": {"3_1": ["tree"], "3_2": ["2nd"], "19575_1": ["gone"]},
    }
    pixels = {key: rng.random((12, 16)) < 0.4 for part in queries.values() for key in part}
    colours = {i: Image.new("RGB", (16, 12), (50 * i % 256, 90, 90)) for i in (1, 2, 3, 19575)}
    folder = write_referit(root / name, queries, colours.get, pixels.get)
    if not sizes:
        (folder / "referit_imsize.json").unlink()
    return folder


def in_query(split, change):
    def plant(folder):
        path = folder / f"splits/referit/referit_query_{split}.json"
        queries = json.loads(path.read_text())
        change(queries)
        path.write_text(json.dumps(queries))

    return plant


REFERIT = [
    ("a mask is gone", lambda f: (f / "mask/1_2.mat").unlink(), {"missing mask": 1}),
    ("all masks are gone", lambda f: shutil.rmtree(f / "mask"), {"missing mask": 1}),
    (
        "a mask is cut",
        lambda f: (f / "mask/1_2.mat").write_bytes((f / "mask/1_2.mat").read_bytes()[:150]),
        {"broken mask": 1},
    ),
    (
        "a mask of another size",
        lambda f: savemat(f / "mask/1_2.mat", {"segimg_t": np.zeros((9, 9))}),
        {"broken mask": 1},
    ),
    (
        "a mask without its variable",
        lambda f: savemat(f / "mask/1_2.mat", {"mask": np.zeros((12, 16))}),
        {"broken mask": 1},
    ),
    (
        "a mask without an object",
        lambda f: savemat(f / "mask/1_2.mat", {"segimg_t": np.ones((12, 16))}),
        {"empty mask": 1},
    ),
    ("an image is gone", lambda f: (f / "images/3.jpg").unlink(), {"missing image": 1}),
    (
        "an image is cut",
        lambda f: (f / "images/3.jpg").write_bytes((f / "images/3.jpg").read_bytes()[:-40]),
        {"broken image": 1},
    ),
    ("all images are gone", lambda f: shutil.rmtree(f / "images"), {"missing image": 1}),
    (
        "an image twice",
        lambda f: shutil.copyfile(f / "images/1.jpg", f / "images/3.jpg"),
        {"same picture": 1},
    ),
    (
        "a region is in train and test",
        in_query("test", lambda q: q.update({"1_1": ["sky"]})),
        {"shared image": 1, "shared object": 1},
    ),
    ("trainval lacks a region", in_query("trainval", lambda q: q.pop("2_1")), {"wrong splits": 1}),
    (
        "trainval has other words",
        in_query("trainval", lambda q: q.update({"2_1": ["green"]})),
        {"wrong splits": 1},
    ),
    ("nothing was said", in_query("test", lambda q: q.update({"3_1": [" "]})), {"empty sentence": 1}),
    (
        "a query file is cut",
        lambda f: (f / "splits/referit/referit_query_test.json").write_text('{"1'),
        {"unreadable file": 1},
    ),
    ("a key is no region", in_query("test", lambda q: q.update({"sky": ["sky"]})), {"unreadable file": 1}),
    ("there are no query files", lambda f: shutil.rmtree(f / "splits"), {"unreadable file": 1}),
    (
        "sizes are damaged",
        lambda f: (f / "referit_imsize.json").write_text('{"1.jpg": [0, 5]}'),
        {"unreadable file": 1},
    ),
]


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "headers"])
@pytest.mark.parametrize("plant,kinds", [d[1:] for d in REFERIT], ids=[d[0] for d in REFERIT])
def test_damage_of_referit(tmp_path, plant, kinds, sizes):
    folder = referit(tmp_path, sizes=sizes)
    assert check(tmp_path, "referit").status == "part"
    plant(folder)
    report = check(tmp_path, "referit")
    assert report.kinds == kinds or (
        not sizes and not (folder / "images").is_dir() and set(report.kinds) == {"missing image"}
    ), report
    assert str(tmp_path) not in json.dumps(report.record())
    try:
        data = ReferIt(tmp_path, "referit")
        for split, index in product(data.splits, range(9)):
            for sample in data.samples(split)[index : index + 1]:
                data.mask(sample.ann_id), data.load_image(sample.image_id)
    except (ValueError, OSError):
        assert report.findings


def test_referit_in_the_whole_and_under_another_name(tmp_path, monkeypatch):
    referit(tmp_path)
    referit(tmp_path, "drawn")
    report = check(tmp_path, "referit")
    # nothing is said of image 19575
    assert report.status == "part" and report.checked == {
        "image files": 3,
        "masks": 5,
        "refs": 5,
        "expressions": 6,
    }
    assert check(tmp_path, "drawn").status == "ok" and check(tmp_path, "drawn").checked["image files"] == 4
    assert {row["split"]: tuple(row["published"].values()) for row in report.rows} == {
        split: row["files"] for split, row in PUBLISHED_REFERIT.items()
    }
    for split, row in (
        ("train", (1, 2, 3)),
        ("val", (1, 1, 1)),
        ("trainval", (2, 3, 4)),
        ("test", (2, 3, 3)),
    ):
        monkeypatch.setitem(PUBLISHED_REFERIT, split, {"files": row, "usable": row})
    assert check(tmp_path, "referit").ok
    monkeypatch.setitem(PUBLISHED_REFERIT, "test", {"files": (2, 2, 3)})
    assert check(tmp_path, "referit").kinds == {"wrong counts": 1}


def test_referit_without_images_and_sizes_says_why_masks_cannot_be_read(tmp_path):
    folder = referit(tmp_path)
    shutil.rmtree(folder / "images")
    report = check(tmp_path, "referit", images=False)
    assert report.findings == [] and report.checked["image files"] == 0 and report.checked["masks"] == 5
    (folder / "referit_imsize.json").unlink()
    assert check(tmp_path, "referit", images=False).kinds == {"missing image": 3}


# ---------------------------------------------------------------- leaks
def naive_leaks(root, partitions):
    sets = {}
    for name, by in partitions:
        with open(root / name / f"refs({by}).p", "rb") as file:
            refs = pickle.load(file, encoding="latin1")
        for split in {r["split"] for r in refs}:
            sets[name, by, split] = [r["image_id"] for r in refs if r["split"] == split]
    out = {}
    for (a, train), (b, held) in product(sets.items(), repeat=2):
        if a[2] != "train" or b[2] == "train":
            continue
        ids = sorted({i for i in held if i in train})
        if ids:
            out[f"{a[0]} ({a[1]})", f"{b[0]} ({b[1]})", b[2]] = (tuple(ids), len(set(held)))
    return out


def test_leaks_of_the_real_sample(real_data):
    report = leakage(real_data)
    assert set(report.splits) == set(PARTITIONS)
    want = naive_leaks(real_data, PARTITIONS)
    assert {(k.train, k.held_out, k.split): (k.ids, k.images) for k in report.leaks} == want and want
    ids, images = want["refcoco (micro)", "refcoco (unc)", "val"]  # micro trains on val
    assert len(ids) == images
    assert not report.whole and "only a part" in report.filter_text() and "COCO's train2014" in str(report)


def test_the_filter_of_the_real_sample(real_data, tmp_path):
    report = leakage(real_data)
    says = report.write_filter(tmp_path / "new" / "filter.txt")
    ids = [int(line) for line in (tmp_path / "new" / "filter.txt").read_text().split()]
    held_out = set()
    for name, by in FILTER_PARTITIONS:
        held_out |= {r.image_id for r in Refer(real_data, name, by).refs if r.split != "train"}
    assert (
        ids == sorted(held_out)
        and len(ids) > 20
        and says.startswith(f"the leak filter has {len(ids)} of 10,113 image ids: only a part")
    )
    assert len(report.missing) == 9


def write_images(root, splits):
    for (name, by), images in splits.items():
        (root / name).mkdir(exist_ok=True)
        refs = [{"ref_id": i, "image_id": i, "split": split} for split, ids in images.items() for i in ids]
        (root / name / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))


def test_a_planted_leak(tmp_path):
    write_images(
        tmp_path,
        {
            ("refcoco", "unc"): {"train": range(100), "val": range(100, 110)},
            ("refcocog", "umd"): {"train": range(200, 300), "test": range(110, 120)},
        },
    )
    assert leakage(tmp_path).leaks == [] and "no training set has an image of a held-out split" in str(
        leakage(tmp_path)
    )
    write_images(
        tmp_path, {("refcocog", "umd"): {"train": [*range(200, 300), 104, 108, 104], "test": range(110, 120)}}
    )
    [leak] = leakage(tmp_path).leaks
    assert (leak.train, leak.held_out, leak.split, leak.ids, leak.share) == (
        "refcocog (umd)",
        "refcoco (unc)",
        "val",
        (104, 108),
        0.2,
    )
    assert "refcocog (umd) trains on 2 of the 10 images (20.0%) of refcoco (unc) val" in str(
        leakage(tmp_path)
    )
    assert leakage(tmp_path, ["refcoco"]).leaks == []


def test_the_whole_filter_is_said_to_be_whole(tmp_path, monkeypatch):
    """Made-up splits with the published numbers of images and of shared images: 10,113 in the union."""
    unc = range(3000)  # 80 images are in all three sets
    google = [*range(491), *range(3000, 3000 + 595), *range(10000, 10000 + 4650 - 491 - 595)]
    umd = [
        *range(80),
        *range(491, 491 + 271),
        *range(3000, 3595),
        *range(20000, 20000 + 3900 - 80 - 271 - 595),
    ]
    assert (
        len(set(unc) & set(google)) == 491
        and len(set(unc) & set(umd)) == 351
        and len(set(google) & set(umd)) == 675
    )
    by_split = {"val": unc[:1500], "testA": unc[1500:2250], "testB": unc[2250:]}
    splits = {
        ("refcoco", "unc"): by_split,
        ("refcoco+", "unc"): by_split,
        ("refcocog", "google"): {"val": google},
        ("refcocog", "umd"): {"val": umd[:1300], "test": umd[1300:]},
    }
    write_images(tmp_path, splits)
    report = leakage(tmp_path)
    assert (
        report.whole
        and report.missing == []
        and report.write_filter(tmp_path / "f")
        == "the leak filter has 10,113 of 10,113 image ids: it is whole"
    )
    assert len((tmp_path / "f").read_text().split()) == 10113
    monkeypatch.setattr(module, "FILTER_IMAGES", 10114)
    assert not leakage(tmp_path).whole and "these are other images" in leakage(tmp_path).filter_text()


def test_leakage_names_what_it_cannot_do(tmp_path, tiny_root):
    with pytest.raises(FileNotFoundError, match=r"none of refcoco, refcoco\+, refcocog is here"):
        leakage(tmp_path)
    write_images(tmp_path, {("refcoco", "unc"): {"train": [1]}})
    with pytest.raises(FileNotFoundError, match="refcocog: no refs"):
        leakage(tmp_path, ["refcoco", "refcocog"])
    with pytest.raises(ValueError, match="refcoco, refshapes have their images in different folders"):
        leakage(tmp_path, ["refcoco", "refshapes"])
    with pytest.raises(ValueError, match="nothing to filter out"):
        leakage(tmp_path).write_filter(tmp_path / "f")
    assert not (tmp_path / "f").exists()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([{"image_id": 1}]))
    with pytest.raises(
        ReferError, match=r"refs\(unc\)\.p: number 0 of its refs has no 'image_id' and 'split'"
    ):
        leakage(tmp_path)
    assert leakage(tiny_root, ["refshapes", "refshapes+"]).leaks == []


def test_counter_of_kinds_follows_the_list(tmp_path):
    toy(tmp_path)
    for i in (1, 2):
        (tmp_path / "images" / "mine" / f"{i}.png").unlink()
    report = check(tmp_path, "mine")
    assert Counter(f.kind for f in report.findings) == report.kinds == {"missing image": 2}
