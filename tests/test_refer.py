"""The REFER reader on real files, on RefShapes, and on damage."""

import copy
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import enough_memory, run_limited
from PIL import Image
from pycocotools.coco import COCO

from refseg_nb.data.refer import (
    PUBLISHED,
    Refer,
    ReferError,
    decode_segmentation,
    load_pickle,
    read_refs,
    verify_counts,
    write_refer,
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


def toy(split="train", **changes):
    ref = {
        "ref_id": 0,
        "ann_id": 7,
        "image_id": 1,
        "category_id": 3,
        "split": split,
        "file_name": "x_7.png",
        "sent_ids": [0, 1],
        "sentences": [
            {"sent_id": i, "sent": "the house", "raw": "the house", "tokens": ["the", "house"]}
            for i in (0, 1)
        ],
    }
    return ref | changes


def toy_instances():
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 14}],
        "categories": [{"id": 3, "name": "house"}],
        "annotations": [
            {
                "id": 7,
                "image_id": 1,
                "category_id": 3,
                "iscrowd": 0,
                "segmentation": [[2, 4, 12, 4, 12, 9, 2, 9], [8, 1, 11, 1, 11, 6, 8, 6]],
            }
        ],
    }


# ---------------------------------------------------------------- real files
@pytest.mark.parametrize("name,split_by", PARTITIONS)
def test_masks_agree_with_pycocotools_on_every_annotation(real_data, name, split_by, capsys):
    refer, coco = Refer(real_data, name, split_by), COCO(real_data / name / "instances.json")
    assert set(refer.annotations) == set(coco.anns)
    for ann_id, ann in coco.anns.items():
        mask = refer.mask(ann_id)
        assert mask.dtype == bool and mask.shape == (
            refer.images[ann["image_id"]].height,
            refer.images[ann["image_id"]].width,
        )
        assert (mask == coco.annToMask(ann).astype(bool)).all(), ann_id
        assert ann["iscrowd"] or mask.sum() == pytest.approx(ann["area"], rel=0.05, abs=30)


def polygon_free(ann, h, w):
    """The mask in another way: PIL fills each polygon at four times the size; runs are expanded one by one."""
    seg = ann["segmentation"]
    if isinstance(seg, dict):
        flat, value = [], 0
        for run in seg["counts"]:
            flat += [value] * run
            value = 1 - value
        return np.array(flat, dtype=bool).reshape(w, h).T
    from PIL import ImageDraw

    x0, y0 = (int(min(min(polygon[axis::2]) for polygon in seg)) for axis in (0, 1))
    x1, y1 = (
        min(int(max(max(polygon[axis::2]) for polygon in seg)) + 2, size) for axis, size in ((0, w), (1, h))
    )
    canvas = Image.new("1", ((x1 - x0) * 4, (y1 - y0) * 4))  # only the box around it
    for polygon in seg:
        ImageDraw.Draw(canvas).polygon([(v - (x0, y0)[i % 2]) * 4 for i, v in enumerate(polygon)], fill=1)
    mask = np.zeros((h, w), dtype=bool)
    mask[y0:y1, x0:x1] = np.asarray(canvas).reshape(y1 - y0, 4, x1 - x0, 4).mean((1, 3)) > 0.5
    return mask


@pytest.mark.parametrize("name", ["refcoco", "refcocog"])
def test_masks_agree_with_an_independent_rasteriser(real_data, name):
    refer, crowds = Refer(real_data, name, "micro"), 0
    for ann_id, ann in refer.annotations.items():
        info = refer.images[ann["image_id"]]
        mask, other = refer.mask(ann_id), polygon_free(ann, info.height, info.width)
        if ann.get("iscrowd"):
            crowds += 1
            assert (mask == other).all()
        elif mask.sum() > 400:
            assert (mask & other).sum() / (mask | other).sum() > 0.9, ann_id
    assert crowds >= 1


def test_overlapping_polygons_of_a_real_ref_leave_no_hole(real_data):
    """One ref of the micro set has polygons that overlap; the sum of its planes holds a 2, the mask does not
    lose these pixels."""
    from pycocotools import mask as coco_mask

    overlapping = 0
    for name, split_by in PARTITIONS:
        refer = Refer(real_data, name, split_by)
        for ref in refer.refs:
            info, seg = refer.images[ref.image_id], refer.annotations[ref.ann_id]["segmentation"]
            planes = coco_mask.decode(coco_mask.frPyObjects(seg, info.height, info.width)).sum(2)
            if planes.max() > 1:
                overlapping += 1
                mask = refer.mask(ref.ann_id)
                assert mask[planes == 2].all() and mask.sum() > (planes == 1).sum()
    assert overlapping >= 1


EXPECTED = {
    ("refcoco", "unc"): {"val": (4, 11, 30), "testA": (2, 6, 18), "testB": (5, 11, 33)},
    ("refcoco", "micro"): {"train": (4, 11, 30), "val": (2, 6, 18), "test": (5, 11, 33)},
    ("refcoco+", "unc"): {"val": (4, 11, 33), "testA": (2, 6, 16), "testB": (5, 11, 32)},
    ("refcocog", "google"): {"val": (17, 18, 36)},
    ("refcocog", "umd"): {"val": (7, 13, 24), "test": (6, 6, 11)},
}


@pytest.mark.parametrize("key", EXPECTED)
def test_counts_of_the_real_files(real_data, key):
    """The table in the micro set's README, and every sentence against an unchecked reading of the file."""
    refer = Refer(real_data, *key)
    assert {s: tuple(c.values()) for s, c in refer.counts().items()} == EXPECTED[key]
    with open(real_data / key[0] / f"refs({key[1]}).p", "rb") as file:
        raw = pickle.load(file, encoding="latin1")
    for split in refer.splits:
        want = [
            (r["ref_id"], s["sent_id"], s["sent"]) for r in raw if r["split"] == split for s in r["sentences"]
        ]
        assert [(x.ref.ref_id, x.sent_id, x.text) for x in refer.samples(split)] == want


def test_real_images_load_in_rgb_at_their_size(real_data):
    refer = Refer(real_data, "refcocog", "micro")
    for image_id, info in refer.images.items():
        image = refer.load_image(image_id)
        assert image.mode == "RGB" and image.size == (info.width, info.height)


def test_a_part_of_a_data_set_is_said_to_be_one(real_data):
    report = verify_counts(Refer(real_data, "refcoco", "unc"))
    assert report.status == "part" and not report.ok and "train has 0 images of 16,994" in str(report)
    micro = verify_counts(Refer(real_data, "refcoco", "micro"))
    assert micro.status == "unpublished" and "micro" in micro.message


def test_refcocog_must_be_named(real_data):
    with pytest.raises(ValueError, match="more than one partition.*google, micro, umd"):
        Refer(real_data, "refcocog")


# ---------------------------------------------------------------- splits, counts, writing
def test_splits_go_by_their_exact_name(tmp_path):
    write_refer(
        tmp_path / "mine",
        [toy(split, ref_id=i) for i, split in enumerate(["testAB", "testA", "train", "testB", "A"])],
        toy_instances(),
        "unc",
    )
    refer = Refer(tmp_path, "mine")
    assert refer.splits == ["train", "testA", "testB", "A", "testAB"]
    for split in refer.splits:
        assert {s.ref.split for s in refer.samples(split)} == {split}
    for wrong in ("test", "TRAIN", "B", ""):
        with pytest.raises(ValueError, match="its splits are train, testA, testB, A, testAB"):
            refer.samples(wrong)


def test_repeated_sentences_stay(tmp_path):
    write_refer(tmp_path / "mine", [toy()], toy_instances())
    assert [s.text for s in Refer(tmp_path, "mine").samples("train")] == ["the house", "the house"]


def test_whole_wrong_and_partial_counts(tmp_path, monkeypatch):
    write_refer(tmp_path / "refcoco", [toy()], toy_instances())
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {"train": (1, 1, 2)})
    assert verify_counts(Refer(tmp_path, "refcoco")).ok
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {"train": (1, 1, 1)})
    assert verify_counts(Refer(tmp_path, "refcoco")).status == "wrong"
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {"train": (1, 1, 3)})
    assert verify_counts(Refer(tmp_path, "refcoco")).status == "part"
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {"val": (1, 1, 2)})
    assert verify_counts(Refer(tmp_path, "refcoco")).status == "wrong"


def test_published_totals():
    """Sums that the papers state: 50,000 refs and 142,210 expressions in RefCOCO; 141,564 in RefCOCO+;
    95,010 in RefCOCOg."""
    total = lambda key, i: sum(row[i] for row in PUBLISHED[key].values())
    assert total(("refcoco", "unc"), 1) == 50000 and total(("refcoco", "unc"), 2) == 142210
    assert total(("refcoco+", "unc"), 1) == 49856 and total(("refcoco+", "unc"), 2) == 141564
    assert total(("refcocog", "google"), 2) == total(("refcocog", "umd"), 2) == 95010


def test_write_and_read_back(tmp_path):
    folder = write_refer(tmp_path / "a" / "mine", [toy()], toy_instances(), "micro")
    assert sorted(p.name for p in folder.iterdir()) == ["instances.json", "refs(micro).p"] and [
        p.name for p in folder.parent.iterdir()
    ] == ["mine"]
    assert load_pickle(folder / "refs(micro).p") == [toy()]
    assert (folder / "refs(micro).p").read_bytes()[:2] == b"\x80\x02"
    write_refer(folder, [toy(split="val")], toy_instances(), "micro")
    assert Refer(folder.parent, "mine").splits == ["val"] and len(list(folder.iterdir())) == 2


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    folder = write_refer(tmp_path / "mine", [toy()], toy_instances())
    before = (folder / "instances.json").read_bytes()
    code = (
        "import os; from refseg_nb.data import refer\n"
        "os.replace = lambda *a: os._exit(9)\n"
        f"refer.write_refer({str(folder)!r}, [], {{'images': [], 'annotations': [], 'categories': []}})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 9 and (folder / "instances.json").read_bytes() == before
    assert len(Refer(tmp_path, "mine").samples("train")) == 2
    with pytest.raises(TypeError):
        write_refer(tmp_path / "other", [], {"images": {1, 2}})
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- what is missing or damaged
GLOBALS = [
    b"cos\nsystem\n(S'true'\ntR.",
    pickle.dumps([np.float32(1)]),
    pickle.dumps([{"a": {1, 2}}], protocol=2),
    pickle.dumps(print),
]


@pytest.mark.parametrize("payload", GLOBALS)
def test_no_global_is_ever_loaded(tmp_path, payload):
    (tmp_path / "refs(unc).p").write_bytes(payload)
    with pytest.raises(ReferError, match=r"refs\(unc\)\.p: asks for the Python object .*refused"):
        load_pickle(tmp_path / "refs(unc).p")


DAMAGED = [
    (b"", "not a readable pickle"),
    (b"<html>404</html>", "not a readable pickle"),
    (pickle.dumps([toy()])[:-20], "not a readable pickle"),
    (b"\x80\x02P1\n.", "not a readable pickle"),
    (pickle.dumps({"a": 1}), "holds dict"),
    (pickle.dumps([1]), "not a list of dicts"),
]


@pytest.mark.parametrize("payload,says", DAMAGED)
def test_what_is_no_list_of_dicts_is_named(tmp_path, payload, says):
    (tmp_path / "refs(unc).p").write_bytes(payload)
    with pytest.raises(ReferError, match=rf"refs\(unc\)\.p: .*{says}"):
        load_pickle(tmp_path / "refs(unc).p")


def framed(inside, after):
    """A frame of protocol 4, long enough that no buffer holds it whole."""
    inside = b"N0" * 200000 + inside
    return b"\x80\x04\x95" + struct.pack("<Q", len(inside)) + inside + after


RAW = pickle.dumps([toy()], protocol=2)
# sizes that the file cannot hold
BOMBS = [
    # a toy set with a byte or three changed, as the fuzz tests below change it (read without a guard, the first
    # takes 22 GB), and five bytes that do the same
    (RAW[:35] + b"r" + RAW[36:], "numbers an object 1,476,872,963, but 306 bytes"),
    (RAW[:244] + b"r" + RAW[245:], "numbers an object"),
    (RAW[:155] + b"C" + RAW[156:], "numbers an object"),
    (RAW[:252] + b"\0\0@" + RAW[255:], "not a readable pickle.*truncated"),
    (b"\x88r\0\0\0\x04", "numbers an object"),
    # ten bytes for two gigabytes, and for more
    (b"\x80\x02(lr" + struct.pack("<I", 2**27) + b".", "numbers an object 134,217,728, but 10 bytes"),
    (
        b"\x80\x02(lr" + struct.pack("<I", 2**31 - 1) + b".",
        "numbers an object 2,147,483,647.*get the file again",
    ),
    (b"\x80\x02(lr" + struct.pack("<I", 2**32 - 1) + b".", "numbers an object"),
    (b"(lp134217728\n.", "numbers an object 134,217,728"),
    (b"(lp134_217_728\n.", "numbers an object 134,217,728"),
    # C reads this number up to the zero
    (b"(lp134217728\0x\n.", "not a readable pickle"),
    (b"(lp" + b"9" * 5000 + b"\n.", "not a readable pickle"),
    # after whatever has an argument to be skipped
    (b"S'\xe9'\n0V\xe9\n0X\1\0\0\0.0C\1.0cr\nr\n]r\0\0\0\x08.", "numbers an object"),
    # where a frame ends in an argument, C's reader goes on behind the frame with a whole one
    (framed(b"]r\1\0", b"\0\0N."), "truncated"),
    (framed(b"X\4\0\0\0r", b"abcU]" + b"r\0\0\0\x08.".ljust(93) + b"."), "truncated"),
    (framed(b"]p-", b"134217728\n."), "truncated"),
    (framed(b"\x95" + struct.pack("<Q", 6) + b"N0", b"N0]r\0\0\0\x08."), "not a readable pickle"),
]
BOMBS += [
    (b"\x80\x05" + opcode + struct.pack(form, count) + b"abc.", "not a readable pickle.*truncated")
    for opcode, form in [
        (b"B", "<I"),
        (b"T", "<I"),
        (b"X", "<I"),
        (b"\x8b", "<I"),
        (b"\x8d", "<Q"),
        (b"\x8e", "<Q"),
        (b"\x95", "<Q"),
        (b"\x96", "<Q"),
    ]
    for count in (2**27, 2**31 - 1, 2**32 - 1)
]


@pytest.mark.parametrize("payload,says", BOMBS)
def test_a_pickle_bomb_takes_no_memory(tmp_path, payload, says):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(payload)

    def body():
        with pytest.raises(ReferError, match=rf"refs\(unc\)\.p: .*{says}") as caught:
            load_pickle(path)
        enough_memory(caught.value)
        assert "\n" not in str(caught.value)

    run_limited(body, room=2**26)


def test_a_pickle_bomb_takes_no_memory_in_a_fresh_process(tmp_path):
    """The same, as a user meets it: the peak of a process that reads a bomb is that of one that does not."""
    resource = pytest.importorskip("resource")
    (tmp_path / "refs(unc).p").write_bytes(BOMBS[0][0])
    code = (
        "import resource\n"
        "from refseg_nb.data.refer import ReferError, load_pickle\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try:\n"
        f"    load_pickle({str(tmp_path / 'refs(unc).p')!r})\n"
        "except ReferError as error:\n"
        "    assert 'numbers an object' in str(error)\n"
        "    print(peak() / before)"
    )
    assert resource.RLIMIT_AS
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 <= float(done.stdout) < 1.1


def honest():
    """Refs as any writer leaves them: short and long strings, numbers of every size, what occurs twice."""
    odd = {"none": None, "yes": True, "float": 0.1, "accent": "café", "line": "a\nb", "long": "x" * 70000}
    odd["numbers"] = [0, 255, 256, 65536, -1, 2**31, 2**63, 2**2100, -(2**70)]
    odd["tuples"] = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    odd["bytes"] = [b"r\xff\xff\xff\x7f", b"y" * 300, b"z" * 70000]
    return [toy(ref_id=i, number=f"a string of its own: {i}") for i in range(400)] + [odd, odd]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("optimised", [False, True])
def test_no_honest_pickle_is_refused(tmp_path, protocol, optimised):
    """The walk ends where the pickle does, in every protocol, by both of Python's own writers."""
    refs = honest()
    if protocol < 3:
        # they become calls of a function
        del refs[-1]["bytes"]
    for writer in (pickle._Pickler, pickle.Pickler):
        buffer = io.BytesIO()
        writer(buffer, protocol).dump(refs)
        raw = pickletools.optimize(buffer.getvalue()) if optimised else buffer.getvalue()
        (tmp_path / "r.p").write_bytes(raw)
        assert load_pickle(tmp_path / "r.p") == refs


def test_the_largest_number_is_the_size_of_the_file(tmp_path):
    for index, fine in ((9, True), (10, False)):
        (tmp_path / "r.p").write_bytes(b"\x80\x02]r" + struct.pack("<I", index) + b".")
        if fine:
            assert load_pickle(tmp_path / "r.p") == []
        else:
            with pytest.raises(ReferError, match="numbers an object 10, but 9 bytes"):
                load_pickle(tmp_path / "r.p")


def test_python_2_strings(tmp_path):
    (tmp_path / "r.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa.")
    assert load_pickle(tmp_path / "r.p") == [{"sent": "café"}]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Refer(tmp_path, "refcoco")
    write_refer(tmp_path / "refcoco", [toy()], toy_instances(), "google")
    with pytest.raises(
        FileNotFoundError, match=r"refs\(unc\)\.p: no such file; partitions in this folder: google"
    ):
        Refer(tmp_path, "refcoco")
    refer = Refer(tmp_path, "refcoco", "google")
    with pytest.raises(FileNotFoundError, match=r"a\.png: the file of image 1 is missing"):
        refer.load_image(1)
    with pytest.raises(ReferError, match="no annotation 99"):
        refer.mask(99)
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json: no such file"):
        Refer(tmp_path, "refcoco", "google")


def test_broken_images_are_named(tmp_path):
    write_refer(tmp_path / "mine", [toy()], toy_instances())
    folder = tmp_path / "images" / "mine"
    folder.mkdir(parents=True)
    refer = Refer(tmp_path, "mine")
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(ReferError, match=r"a\.png: not a readable image"):
        refer.load_image(1)
    Image.new("L", (10, 10)).save(folder / "a.png")
    with pytest.raises(ReferError, match="is 10 x 10 pixels, but instances.json says 14 x 10"):
        refer.load_image(1)
    Image.new("L", (14, 10)).save(folder / "a.png")
    assert refer.load_image(1).mode == "RGB"


def test_an_image_bomb_is_not_decoded(tmp_path, monkeypatch):
    write_refer(tmp_path / "mine", [toy()], toy_instances())
    (tmp_path / "images" / "mine").mkdir(parents=True)
    data = Refer(tmp_path, "mine")
    path = data.image_path(1)
    Image.new("1", (9000, 9000)).save(path)  # 10 kB on the disk, 240 MB as RGB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ReferError, match="is 9000 x 9000 pixels, but instances.json says 14 x 10"):
        data.load_image(1)
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    path.write_bytes(
        header
        + zlib.crc32(header[12:]).to_bytes(4, "big")
        + b"\0\0\0\0IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    with pytest.raises(ReferError, match="not a readable image.*DecompressionBombError"):
        data.load_image(1)


def test_a_file_name_cannot_leave_the_image_folder(tmp_path):
    for name in ("../../secret.png", "/etc/passwd"):
        instances = toy_instances()
        instances["images"][0]["file_name"] = name
        write_refer(tmp_path / "mine", [toy()], instances)
        with pytest.raises(ReferError, match="leads out of the image folder"):
            Refer(tmp_path, "mine").image_path(1)


def test_segmentation_kinds_are_one_mask():
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for _ in range(20):
        h, w = (int(n) for n in rng.integers(1, 30, 2))
        mask = rng.random((h, w)) < 0.4
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.r_[False, flat])).tolist()
        counts = (
            np.diff([0, *edges, h * w]).tolist()
            if not flat[0]
            else [0, *np.diff([0, *edges[1:], h * w]).tolist()]
        )
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        kinds = [{"counts": c, "size": [h, w]} for c in (counts, packed, packed.decode())]
        for kind in [*kinds, kinds[2:] * 2]:
            assert (decode_segmentation(kind, h, w) == mask).all()
    assert decode_segmentation([], 3, 4).shape == (3, 4)


# ---------------------------------------------------------------- fuzz: only the module's own error may come
# out
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
plain = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
numbers = (
    st.integers(-5, 40)
    | st.floats(-20, 60)
    | st.sampled_from([1e9, float("nan"), float("inf"), True, None, "1", 10**30])
)
segmentations = (
    plain
    | st.lists(st.lists(numbers, max_size=12), max_size=3)
    | st.fixed_dictionaries(
        {
            "counts": (
                st.lists(st.integers(-3, 140), max_size=6)
                | st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30)
                | st.binary(max_size=30)
                | plain
            ),
            "size": st.just([10, 14]) | st.lists(st.integers(-2, 20), max_size=3) | plain,
        }
    )
)
quiet = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quiet
@given(segmentations | st.lists(segmentations, max_size=3))
def test_fuzz_segmentations(segmentation):
    try:
        mask = decode_segmentation(segmentation, 10, 14, "annotation 7")
    except ReferError as error:
        enough_memory(error)
        assert str(error).startswith("annotation 7")
    else:
        assert mask.shape == (10, 14) and mask.dtype == bool


def spoil(data, draw):
    """Change, remove or add one thing somewhere in a nested structure."""
    target = data
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(target[key], (dict, list)) and target[key] and draw(st.booleans()):
            target = target[key]
        else:
            break
    action = draw(st.sampled_from(["replace", "remove", "nest"]))
    if action == "remove":
        del target[key]
    elif action == "nest":
        target[key] = [target[key]]
    else:
        target[key] = draw(plain)


@quiet
@given(st.data())
def test_fuzz_refs_and_instances(tmp_path, data):
    refs, instances = [toy(), toy("val", ref_id=1)], copy.deepcopy(toy_instances())
    refs = copy.deepcopy(refs)
    for _ in range(data.draw(st.integers(1, 3))):
        spoil(data.draw(st.sampled_from([refs, instances])), data.draw)
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(instances))
    try:
        refer = Refer(tmp_path, "fuzz", "unc")
        for split in refer.splits:
            for sample in refer.samples(split):
                assert refer.mask(sample.ann_id).any() in (True, False)
                refer.image_path(sample.image_id)
        for ann_id in refer.annotations:
            refer.mask(ann_id)
        refer.counts()
    except ReferError as error:
        enough_memory(error)
        assert "fuzz" in str(error) and "\n" not in str(error)


overwritten = st.builds(
    lambda at, junk: RAW[:at] + junk + RAW[at + len(junk) :],
    st.integers(0, 300),
    st.binary(min_size=1, max_size=4),
)


@quiet
@given(st.binary(max_size=60) | overwritten)
def test_fuzz_pickles(tmp_path, payload):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(payload)
    try:
        refs = load_pickle(path)
    except ReferError as error:
        enough_memory(error)
        assert "refs(unc).p" in str(error)
    else:
        assert all(isinstance(ref, dict) for ref in refs)
        try:
            read_refs(path, {}, {})
        except ReferError as error:
            enough_memory(error)


# opcodes with any argument, honest or not: sizes above all
sizes = st.integers(0, 30) | st.sampled_from([2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
opcodes = st.builds(
    lambda opcode, size, width, tail: (
        opcode.code.encode("latin1") + size.to_bytes(8, "little")[:width] + tail
    ),
    st.sampled_from(pickletools.opcodes),
    sizes,
    st.sampled_from([0, 0, 1, 2, 4, 4, 8]),
    st.just(b"") | st.binary(max_size=6) | sizes.map(lambda size: b"%d\n" % size),
)
bombs = sizes.map(lambda size: b"]r" + (size % 2**32).to_bytes(4, "little")) | sizes.map(
    lambda s: b"]p%d\n" % s
)


@quiet
@given(st.lists(opcodes | bombs | st.sampled_from([b"]", b"}", b"N", b"(", b"0"]), max_size=8))
def test_fuzz_opcodes(tmp_path, pieces):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"".join(pieces) + b".")
    try:
        load_pickle(path)
    except ReferError as error:
        enough_memory(error)
        assert "refs(unc).p" in str(error)


@quiet
@given(
    st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | plain.map(lambda x: json.dumps(x).encode())
)
def test_fuzz_json(tmp_path, payload):
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([], protocol=2))
    (folder / "instances.json").write_bytes(payload)
    with pytest.raises(ReferError, match=r"instances\.json") as caught:
        Refer(tmp_path, "fuzz", "unc")
    enough_memory(caught.value)


def test_deep_nesting_is_an_error_and_not_a_crash(tmp_path):
    (tmp_path / "fuzz").mkdir()
    (tmp_path / "fuzz" / "refs(unc).p").write_bytes(b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b".")
    (tmp_path / "fuzz" / "instances.json").write_text("[" * 100000)
    with pytest.raises(ReferError):
        Refer(tmp_path, "fuzz", "unc")
    with pytest.raises(ReferError):
        load_pickle(tmp_path / "fuzz" / "refs(unc).p")


# ---------------------------------------------------------------- RefShapes through the same reader
@pytest.mark.parametrize("name", ["refshapes", "refshapes+"])
def test_refshapes_is_read_whole(tiny_root, name):
    refer = Refer(tiny_root, name)
    assert refer.splits == ["train", "val", "testA", "testB", "heldout"]
    assert verify_counts(refer).status == "whole"
    for split in refer.splits:
        for sample in refer.samples(split):
            assert refer.mask(sample.ann_id).any() and sample.kind
    image = refer.load_image(next(iter(refer.images)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert image.mode == "RGB"
