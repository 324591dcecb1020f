"""ReferIt in the Berkeley layout: masks, queries, splits, and hostile files; RefCLEF's lists of run lengths
through the REFER reader."""

import io
import json
import os
import shutil
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import enough_memory
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix

from refseg_nb.data import referit as module
from refseg_nb.data.batches import RISDataset, make_loader
from refseg_nb.data.refer import Refer, ReferError, write_refer
from refseg_nb.data.referit import (
    MISSING_IMAGES,
    PUBLISHED_REFERIT,
    ReferIt,
    open_data,
    read_mat_mask,
    read_queries,
    write_referit,
)
from refseg_nb.data.words import vocabulary_for

H, W = 12, 17
QUERIES = {
    "train": {"7_1": ["the sky", "the sky", "blue bit"], "7_3": ["café on 2nd floor"], "9_1": ["all of it"]},
    "val": {"12_2": ["grass"]},
    "test": {"40_1": ["man", "man 7"], "40_2": ["bottom right™"]},
}


def toy_mask(key):
    image, region = map(int, key.split("_"))
    return np.random.default_rng([image, region]).random((H + image % 5, W)) < 0.3


def toy_image(image_id):
    return Image.fromarray(
        np.random.default_rng(image_id).integers(0, 255, (H + image_id % 5, W, 3), dtype=np.uint8)
    )


@pytest.fixture
def root(tmp_path):
    write_referit(tmp_path / "referit", QUERIES, toy_image, toy_mask)
    return tmp_path


def mat(**variables) -> bytes:
    file = io.BytesIO()
    compress = variables.pop("compress", False)
    savemat(file, variables, do_compression=compress)
    return file.getvalue()


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
def test_zero_is_foreground_and_scipy_agrees(tmp_path, dtype, compress):
    rng = np.random.default_rng(0)
    for h, w in [(1, 1), (1, 9), (2, 2), (H, W)]:
        values = rng.integers(0, 3, (h, w)).astype(dtype)
        (tmp_path / "m.mat").write_bytes(mat(a=[1, 2], segimg_t=values, z="text", compress=compress))
        mask = read_mat_mask(tmp_path / "m.mat", h, w)
        assert (
            mask.dtype == bool
            and (mask == (values == 0)).all()
            and (mask == (loadmat(tmp_path / "m.mat")["segimg_t"] == 0)).all()
        )


def test_negative_and_fractional_values_are_background(tmp_path):
    (tmp_path / "m.mat").write_bytes(mat(segimg_t=np.array([[0.0, -1.0, 0.5], [-0.0, 255.0, 1e-300]])))
    assert read_mat_mask(tmp_path / "m.mat", 2, 3).tolist() == [[True, False, False], [True, False, False]]


def by_hand(values, order):
    """A file of MATLAB 5 written without a library, in either byte order; class double whatever the numbers
    are stored as, as MATLAB does."""

    def element(kind, data):
        return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)

    codes = {"u1": 2, "i2": 3, "f8": 9}
    kind = codes[values.dtype.str[1:]]
    matrix = (
        element(6, struct.pack(order + "II", 6, 0))
        + element(5, struct.pack(order + "ii", *values.shape))
        + element(1, b"segimg_t")
        + element(kind, values.T.astype(values.dtype.newbyteorder(order)).tobytes())
    )
    head = (
        b"MATLAB 5.0 MAT-file".ljust(124)
        + struct.pack(order + "H", 0x0100)
        + (b"IM" if order == "<" else b"MI")
    )
    return head + element(14, matrix)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f8"])
def test_both_byte_orders(tmp_path, order, dtype):
    values = np.random.default_rng(1).integers(0, 2, (H, W)).astype(dtype)
    (tmp_path / "m.mat").write_bytes(by_hand(values, order))
    assert (loadmat(tmp_path / "m.mat")["segimg_t"] == values).all()
    assert (read_mat_mask(tmp_path / "m.mat", H, W) == (values == 0)).all()


ONES = np.ones((H, W), np.uint8)
CELL, STRUCT_ARRAY = np.array([[1, "a"]], dtype=object), np.zeros((H, W), dtype=[("a", "f8")])
SPARSE = csc_matrix(np.eye(H, W))
REFUSED = {
    "empty": (b"", "not a .mat file"),
    "html": (b"<html>404</html>" * 40, "not a .mat file"),
    "header only": (mat(segimg_t=ONES)[:128], "no variable segimg_t .*none at all"),
    "hdf5": (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", "HDF5"),
    "bare hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
    "other variable": (mat(mask=ONES), "no variable segimg_t .*'mask'"),
    "other shape": (mat(segimg_t=np.ones((W, H))), f"shape {W} x {H}.*{H} x {W}"),
    "three axes": (mat(segimg_t=np.ones((H, W, 1, 2))), "shape"),
    "cell": (mat(segimg_t=CELL), "a cell array"),
    "struct": (mat(segimg_t={"a": 1}), "a struct"),
    "struct array": (mat(segimg_t=STRUCT_ARRAY), "a struct"),
    "text": (mat(segimg_t="mask"), "text"),
    "sparse": (mat(segimg_t=SPARSE), "sparse"),
    "complex": (mat(segimg_t=ONES * 1j), "complex"),
    "nan": (mat(segimg_t=np.where(np.arange(W) == 3, np.nan, ONES)), "NaN"),
    "inf": (mat(segimg_t=np.where(np.arange(W) == 3, np.inf, ONES)), "NaN or infinity"),
    "cut": (mat(segimg_t=ONES)[:-20], "cut off"),
    "cut tag": (mat(segimg_t=ONES)[:132], "cut off"),
    "cut stream": (mat(segimg_t=ONES, compress=True)[:-3], "cut off"),
    "large": (bytes(2**20 + 8 * H * W + 1), "more than a mask"),
}


PACKABLE = [
    name
    for name, (content, _) in REFUSED.items()
    if content[:10] == b"MATLAB 5.0" and len(content) > 200 and name not in ("cut", "cut stream")
]


@pytest.mark.parametrize(
    "name,compress", [*((name, False) for name in REFUSED), *((name, True) for name in PACKABLE)]
)
def test_what_is_no_mask_is_refused_in_one_line(tmp_path, name, compress):
    content, says = REFUSED[name]
    if compress:  # the same variables in compressed elements
        size = struct.unpack("<I", content[132:136])[0]
        packed = zlib.compress(content[128 : 136 + size])
        content = content[:128] + struct.pack("<II", 15, len(packed)) + packed
    (tmp_path / "bad.mat").write_bytes(content)
    with pytest.raises(ReferError, match=rf"bad\.mat: .*{says}") as caught:
        read_mat_mask(tmp_path / "bad.mat", H, W)
    assert "\n" not in str(caught.value)


def declared(shape=(H, W), size=None, tail=b"", kind=2, flags=9, name=b"segimg_t"):
    """A compressed element that claims a shape and a size of its own, followed by whatever `tail` yields (an
    iterable of bytes)."""
    count = H * W if size is None else size
    head = (
        struct.pack("<IIII", 14, min(56 + count, 2**32 - 1), 6, 8)
        + struct.pack("<II", flags, 0)
        + struct.pack("<IIii", 5, 8, *shape)
    )
    head += struct.pack("<II", 1, 8) + name + struct.pack("<II", kind, count)
    pack = zlib.compressobj(9)
    data = pack.compress(head) + b"".join(pack.compress(part) for part in tail) + pack.flush()
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(data)) + data


def test_a_bomb_takes_no_memory(tmp_path):
    """64 MB of zeros in 64 kB, which claims to be a mask of the right shape, of an absurd one, or another
    variable."""
    zeros = [bytes(2**20)] * 64
    bombs = {
        "inside": declared(tail=zeros),
        "shape": declared((2**31 - 1, 2**31 - 1), 2**32 - 100, zeros),
        "size": declared(size=64 * 2**20, tail=zeros),
    }
    bombs["other"] = declared(tail=zeros, name=b"segimg_x")
    for name, content in bombs.items():
        (tmp_path / "bomb.mat").write_bytes(content)
        assert len(content) < 2**18
        tracemalloc.start()
        with pytest.raises(ReferError, match=r"bomb\.mat: "):
            read_mat_mask(tmp_path / "bomb.mat", H, W)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 2**20, (name, peak)


@pytest.mark.parametrize(
    "content,says",
    [
        (declared((-1, 5)), "shape -1 x 5"),
        (declared((2**31 - 1, 2**31 - 1)), "shape 2147483647"),
        (declared(size=2**32 - 1), "cut off"),
        (declared(size=H * W - 1, tail=[bytes(H * W)]), "bytes for"),
        (declared(kind=14, tail=[bytes(H * W)]), "unknown type 14"),
        (declared(flags=0x809, tail=[bytes(H * W)]), "complex"),
    ],
)
def test_declared_sizes_are_checked(tmp_path, content, says):
    (tmp_path / "bad.mat").write_bytes(content)
    with pytest.raises(ReferError, match=rf"bad\.mat: .*{says}"):
        read_mat_mask(tmp_path / "bad.mat", H, W)


VALID = [mat(segimg_t=ONES), mat(segimg_t=ONES, compress=True), mat(a=1, segimg_t=np.eye(H, W))]


@st.composite
def damaged(draw):
    """A valid file with a few bytes changed, or cut."""
    raw = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 5))):
        raw[draw(st.integers(120, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(100, len(raw)))]) if draw(st.booleans()) else bytes(raw)


quiet = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quiet
@given(damaged() | st.binary(max_size=200).map(lambda tail: VALID[0][:128] + tail))
def test_fuzz_mat_files(tmp_path, content):
    (tmp_path / "f.mat").write_bytes(content)
    try:
        mask = read_mat_mask(tmp_path / "f.mat", H, W)
    except ReferError as error:
        enough_memory(error)
        assert "f.mat: " in str(error) and "\n" not in str(error)
    else:
        assert mask.shape == (H, W) and mask.dtype == bool


# ---------------------------------------------------------------- queries
def test_repeated_and_odd_queries_stay(tmp_path):
    entries = {"7_1": ["sky", "sky", "", "bottom right™", "2nd", "h2o"], "7_0": [], "0_9999": ["x"]}
    (tmp_path / "q.json").write_text(json.dumps(entries), encoding="utf-8")
    assert read_queries(tmp_path / "q.json") == entries
    (tmp_path / "q.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    assert list(read_queries(tmp_path / "q.json")) == list(entries)


BAD_QUERIES = [
    (b"", "not readable as JSON"),
    (b'{"7_1": ["a"', "not readable as JSON"),
    (b'{"7_1": ["\xff"]}', "not readable as JSON"),
    (b"[]", "holds list"),
    (b'{"sky": ["a"]}', "'sky' is not"),
    (b'{"07_1": ["a"]}', "'07_1' is not"),
    (b'{"7_10000": ["a"]}', "is not"),
    (b'{"7": ["a"]}', "is not"),
    ('{"٣_1": ["a"]}'.encode(), "is not"),
    (b'{"7_1": "a"}', "'7_1' is not a list"),
    (b'{"7_1": ["a", 3]}', "'7_1' is not a list"),
    (b'{"7_1": ["a"], "7_1": ["b"]}', "'7_1' is there twice"),
    (json.dumps({"7_1": ["a"] * 1000}).encode(), "1,000 expressions"),
    (b"[" * 100000, "not readable as JSON"),
]


@pytest.mark.parametrize("content,says", BAD_QUERIES)
def test_bad_queries_are_named(tmp_path, content, says):
    (tmp_path / "q.json").write_bytes(content)
    with pytest.raises(ReferError, match=rf"q\.json: .*{says}") as caught:
        read_queries(tmp_path / "q.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 300


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
keys = st.sampled_from(["7_1", "7_2", "8_1", "19579_1"]) | st.text(max_size=6)
entries = st.dictionaries(keys, st.lists(st.text(max_size=6), max_size=3) | plain, max_size=4) | plain


@quiet
@given(
    st.dictionaries(
        st.sampled_from(["train", "val", "trainval", "test"]), entries | st.binary(max_size=20), min_size=1
    )
)
def test_fuzz_query_files(tmp_path, files):
    folder = tmp_path / "referit"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "splits/referit").mkdir(parents=True)
    for split, content in files.items():
        (folder / f"splits/referit/referit_query_{split}.json").write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    try:
        data = ReferIt(tmp_path)
    except ReferError as error:
        enough_memory(error)
        assert "referit_query_" in str(error) and "\n" not in str(error)
        return
    for split in data.splits:
        data.samples(split)
    ids = [s.sent_id for ref in data.refs for s in ref.sentences]
    assert len(set(ids)) == len(ids) and data.splits == [
        s for s in ("train", "val", "trainval", "test") if s in files
    ]


# ---------------------------------------------------------------- the data set
def test_round_trip(root):
    data = ReferIt(root)
    assert (
        isinstance(data, Refer)
        and data.split_by == "berkeley"
        and data.splits == ["train", "val", "trainval", "test"]
    )
    for split, regions in QUERIES.items():
        want = [(key, text) for key, texts in regions.items() for text in texts]
        assert [(f"{s.image_id}_{s.ann_id % 10_000}", s.text) for s in data.samples(split)] == want
        assert all(s.ref.split == split and s.sentence.raw == s.text for s in data.samples(split))
        for key in regions:
            ann_id = int(key.split("_")[0]) * 10_000 + int(key.split("_")[1])
            assert (data.mask(ann_id) == toy_mask(key)).all()
            assert (loadmat(data.mask_path(ann_id))["segimg_t"] == 0).tolist() == toy_mask(key).tolist()
    assert [s.sent_id for s in data.samples("trainval")] == [
        s.sent_id for split in ("train", "val") for s in data.samples(split)
    ]
    for image_id, info in data.images.items():
        image = data.load_image(image_id)
        assert image.size == (info.width, info.height) == toy_image(image_id).size and image.mode == "RGB"
    assert sorted(os.listdir(root)) == ["referit"] and "café on 2nd floor" in [
        s.text for s in data.samples("train")
    ]


def test_the_interface_of_refer(root):
    """Every public name of a Refer is there, with the types it has there."""
    data = ReferIt(root)
    names = [name for name in dir(Refer) if not name.startswith("_")]
    assert all(
        hasattr(data, name)
        for name in [
            *names,
            "root",
            "name",
            "folder",
            "split_by",
            "images",
            "annotations",
            "categories",
            "refs",
            "image_folder",
        ]
    )
    assert data.counts() == {
        "train": {"images": 2, "refs": 3, "expressions": 5},
        "val": {"images": 1, "refs": 1, "expressions": 1},
        "trainval": {"images": 3, "refs": 4, "expressions": 6},
        "test": {"images": 1, "refs": 2, "expressions": 3},
    }
    assert [a["id"] for a in data.annotations_of(7)] == [70001, 70003] and data.annotation(70001)[
        "category_id"
    ] in data.categories
    assert (
        data.categories == {1: "region"}
        and data.image(7).file_name == "7.jpg"
        and data.image_path(7) == root / "referit/images/7.jpg"
    )
    assert (
        len(data.images) == 4
        and set(data.images) == {7, 9, 12, 40}
        and 7 in data.images
        and 8 not in data.images
    )
    for call in (data.annotation, data.mask, data.image, data.image_path, data.load_image, data.mask_path):
        with pytest.raises(ReferError, match="no (region|image) "):
            call(8)
    with pytest.raises(ValueError, match="no split 'testA'; its splits are train, val, trainval, test"):
        data.samples("testA")


def test_ids_are_whole_numbers_unique_and_do_not_depend_on_the_files_present(root):
    data = ReferIt(root)
    of = {(s.image_id, s.ann_id, s.text, s.sent_id) for split in data.splits for s in data.samples(split)}
    ids = [s.sent_id for ref in data.refs for s in ref.sentences]
    assert (
        len(ids) == len(set(ids)) == 9
        and all(type(i) is int for i in ids)
        and {r.ref_id for r in data.refs} == set(data.annotations)
    )
    for split in ("train", "val", "trainval"):
        (root / f"referit/splits/referit/referit_query_{split}.json").unlink()
    alone = ReferIt(root)
    assert (
        alone.splits == ["test"]
        and {(s.image_id, s.ann_id, s.text, s.sent_id) for s in alone.samples("test")} <= of
    )


def test_trainval_alone_keeps_the_order_of_its_file(root):
    folder = root / "referit/splits/referit"
    for split in ("train", "val"):
        (folder / f"referit_query_{split}.json").unlink()
    mixed = dict(reversed((QUERIES["train"] | QUERIES["val"]).items()))
    (folder / "referit_query_trainval.json").write_text(json.dumps(mixed))
    data = ReferIt(root)
    assert data.splits == ["trainval", "test"] and {r.split for r in data.refs} == {"trainval", "test"}
    assert [s.text for s in data.samples("trainval")] == [text for texts in mixed.values() for text in texts]
    (folder / "referit_query_train.json").write_text(json.dumps(QUERIES["train"]))
    data = ReferIt(root)
    assert [s.text for s in data.samples("trainval")] == [text for texts in mixed.values() for text in texts]
    assert [s.text for s in data.samples("train")] == [
        text for texts in QUERIES["train"].values() for text in texts
    ]


@pytest.mark.parametrize(
    "split,change,says",
    [
        ("val", {"7_1": ["x"]}, "val.json: the region '7_1' is also in the split train"),
        ("test", {"12_2": ["x"]}, "'12_2' is also in the split"),
        (
            "trainval",
            {"40_1": ["man", "man 7"]},
            "trainval.json: the region '40_1' is also in the split test",
        ),
        ("trainval", {"99_1": ["x"]}, "'99_1' is neither in train nor in val"),
        ("trainval", {"7_1": ["x"]}, "'7_1' has other expressions"),
        ("trainval", {"7_1": None}, "has no region '7_1'"),
    ],
)
def test_splits_that_disagree_are_named(root, split, change, says):
    path = root / f"referit/splits/referit/referit_query_{split}.json"
    entries = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    with pytest.raises(ReferError, match=says):
        ReferIt(root)


def test_images_are_not_opened_before_they_are_asked_for(root, monkeypatch):
    (root / "referit/referit_imsize.json").unlink()
    opened, real = [], Image.open
    monkeypatch.setattr(
        module.Image, "open", lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k)
    )
    data = ReferIt(root)
    data.counts(), repr(data), data.image_path(7), data.annotations_of(7)
    assert opened == []
    assert (data.mask(70001) == toy_mask("7_1")).all() and (data.mask(70003) == toy_mask("7_3")).all()
    assert opened == ["7.jpg"]


def test_missing_files_are_named_when_they_are_needed(root):
    for name in ("images/7.jpg", "mask/40_2.mat"):
        (root / "referit" / name).unlink()
    data = ReferIt(root)
    assert (data.mask(70001) == toy_mask("7_1")).all()
    with pytest.raises(FileNotFoundError, match=r"7\.jpg"):
        data.load_image(7)
    with pytest.raises(FileNotFoundError, match=r"40_2\.mat"):
        data.mask(400002)
    (root / "referit/referit_imsize.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"7\.jpg"):
        ReferIt(root).mask(70001)
    shutil.rmtree(root / "referit/splits")
    with pytest.raises(FileNotFoundError, match=r"referit_query_"):
        ReferIt(root)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ReferIt(root, "other")


def test_broken_images_and_sizes_are_named(root):
    folder, data = root / "referit", ReferIt(root)
    Image.new("L", (W, H)).save(folder / "images/7.jpg")
    with pytest.raises(
        ReferError, match=rf"7\.jpg: is {W} x {H} pixels, but referit_imsize.json says {W} x {H + 2}"
    ):
        data.load_image(7)
    for content in (b"no image", (folder / "images/12.jpg").read_bytes()[:-50]):
        (folder / "images/9.jpg").write_bytes(content)
        (folder / "referit_imsize.json").write_text(json.dumps({"9.jpg": [W, H + 2]}))
        with pytest.raises(ReferError, match=r"9\.jpg: not a readable image"):
            ReferIt(root).load_image(9)
    for sizes in (
        [],
        {"7.jpg": [1]},
        {"seven": [3, 4]},
        {"7.jpg": [0, 4]},
        {"7.jpg": ["3", 4]},
        {"7.jpg": [10**9, 4]},
        {"7.jpg": 3},
    ):
        (folder / "referit_imsize.json").write_text(json.dumps(sizes))
        if sizes == []:
            continue
        with pytest.raises(ReferError, match=r"referit_imsize\.json: "):
            ReferIt(root)


def test_the_images_that_nobody_has_are_left_out_and_counted(tmp_path):
    gone = {f"{image}_1": ["a", "b"] for image in MISSING_IMAGES}
    queries = {"train": QUERIES["train"] | gone, "val": QUERIES["val"], "test": QUERIES["test"]}
    write_referit(tmp_path / "referit", queries, toy_image, toy_mask)
    data = ReferIt(tmp_path)
    assert (
        data.left_out == {"train": 6, "trainval": 6}
        and len(data.samples("train")) == 5
        and not set(MISSING_IMAGES) & set(data.images)
    )
    assert "6 of train left out" in repr(data)
    write_referit(tmp_path / "drawn", queries, toy_image, toy_mask)  # only the real data set has gaps
    assert (
        ReferIt(tmp_path, "drawn").left_out == {} and len(ReferIt(tmp_path, "drawn").samples("train")) == 11
    )


def test_the_arrangement_of_text_objseg(root):
    """Query files and sizes in data/, images and masks in referit-dataset/."""
    folder = root / "referit"
    (folder / "data").mkdir()
    for path in [*(folder / "splits/referit").iterdir(), folder / "referit_imsize.json"]:
        path.rename(folder / "data" / path.name)
    shutil.rmtree(folder / "splits")
    (folder / "referit-dataset").mkdir()
    for name in ("images", "mask"):
        (folder / name).rename(folder / "referit-dataset" / name)
    data = ReferIt(root)
    assert (
        (data.mask(70003) == toy_mask("7_3")).all()
        and data.load_image(40).size == toy_image(40).size
        and len(data.samples("trainval")) == 6
    )


def test_open_data(root):
    write_refer(root / "mine", [], {"images": [], "annotations": [], "categories": []}, "own")
    write_referit(root / "stuff", QUERIES, toy_image, toy_mask)
    assert type(open_data(root, "referit")) is type(open_data(root, "stuff", "berkeley")) is ReferIt
    assert type(open_data(root, "mine")) is type(open_data(root, "mine", "own")) is Refer
    with pytest.raises(ValueError, match="one partition is 'berkeley', not 'unc'"):
        open_data(root, "referit", "unc")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_data(root, "refcoco")
    (root / "empty" / "referit").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="referit_query_"):
        open_data(root / "empty", "referit")


def test_batches_and_vocabulary_read_it_like_any_other(root):
    data = open_data(root, "referit")
    vocabulary = vocabulary_for(data, "trainval")
    dataset = RISDataset(data, "trainval", vocabulary, image_size=16, target_size=4)
    [batch] = make_loader(dataset, images_per_batch=8)
    assert batch.images.shape == (3, 3, 16, 16) and len(batch) == 6 and "2nd" in vocabulary
    for sample, target in zip(batch.samples, batch.targets):
        mask = toy_mask(f"{sample.image_id}_{sample.ann_id % 10_000}")
        assert float(target.mean()) == pytest.approx(
            torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), 4).mean().item(),
            abs=1e-3,
        )


def test_a_failing_writer_leaves_nothing(tmp_path):
    def cut(key):
        if key == "40_1":
            raise RuntimeError("drawn wrong")
        return toy_mask(key)

    with pytest.raises(RuntimeError):
        write_referit(tmp_path / "referit", QUERIES, toy_image, cut)
    with pytest.raises(ValueError, match="7_1 is .3, 3.*height, width"):
        write_referit(tmp_path / "referit", QUERIES, toy_image, lambda key: np.ones((3, 3)))
    with pytest.raises(ReferError, match="'x' is not"):
        write_referit(tmp_path / "referit", {"train": {"x": []}}, toy_image, toy_mask)
    with pytest.raises(ValueError, match="give some of train, val, test"):
        write_referit(tmp_path / "referit", {"trainval": {}}, toy_image, toy_mask)
    assert list(tmp_path.iterdir()) == []
    write_referit(tmp_path / "referit", {"test": QUERIES["test"]}, toy_image, toy_mask)
    with pytest.raises(FileExistsError, match="referit is there already"):
        write_referit(tmp_path / "referit", QUERIES, toy_image, toy_mask)
    assert ReferIt(tmp_path).splits == ["test"] and [p.name for p in tmp_path.iterdir()] == ["referit"]


def test_published_counts_add_up():
    """train + val = trainval; the papers' 59,969 / 60,103 and the 54,127 of TransVG."""
    for which in ("files", "usable"):
        rows = {split: row[which] for split, row in PUBLISHED_REFERIT.items()}
        for i in range(3):
            if None not in (rows["train"][i], rows["trainval"][i]):
                assert rows["train"][i] + rows["val"][i] == rows["trainval"][i]
    assert [PUBLISHED_REFERIT[s]["usable"][2] for s in ("train", "val", "trainval", "test")] == [
        54127,
        5842,
        59969,
        60103,
    ]


# ---------------------------------------------------------------- RefCLEF: the same photographs in the REFER
# layout
def test_refclef_with_lists_of_run_lengths(tmp_path):
    rng = np.random.default_rng(0)
    masks, annotations, images = {}, [], []
    for i in range(6):
        parts = rng.random((2, H, W)) < 0.2
        masks[i + 1] = parts.any(0)
        runs = [coco_mask.encode(np.asfortranarray(part.astype(np.uint8))) for part in parts]
        segmentation = [{"size": [H, W], "counts": run["counts"].decode()} for run in runs] if i < 5 else []
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "segmentation": segmentation})
        images.append({"id": i + 1, "file_name": f"{i + 1}.jpg", "height": H, "width": W})
    masks[6][:] = False
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "sky"}]}

    def refs(splits):
        return [
            {
                "ref_id": i,
                "ann_id": i + 1,
                "image_id": i + 1,
                "category_id": 1,
                "split": split,
                "sentences": [{"sent_id": i, "sent": "sky", "raw": "Sky", "tokens": ["sky"]}],
            }
            for i, split in enumerate(splits)
        ]

    partitions = {
        "unc": ["testC", "train", "val", "testB", "testA", "train"],
        "berkeley": ["train", "test", "val", "test", "train", "val"],
    }
    for split_by, splits in partitions.items():
        write_refer(tmp_path / "refclef", refs(splits), instances, split_by)
    assert open_data(tmp_path, "refclef", "unc").splits == ["train", "val", "testA", "testB", "testC"]
    assert open_data(tmp_path, "refclef", "berkeley").splits == ["train", "val", "test"]
    for split_by, splits in partitions.items():
        refer = open_data(tmp_path, "refclef", split_by)
        assert type(refer) is Refer and refer.image_path(1) == tmp_path / "images/saiapr_tc-12/1.jpg"
        for split in refer.splits:
            assert [s.ann_id for s in refer.samples(split)] == [
                i + 1 for i, name in enumerate(splits) if name == split
            ]
        for ann_id, mask in masks.items():
            assert (refer.mask(ann_id) == mask).all()
    with pytest.raises(ValueError, match="more than one partition"):
        open_data(tmp_path, "refclef")


def test_kinds_beside_the_queries_are_read(tmp_path):
    folder = tmp_path / "mine"
    image = Image.new("RGB", (8, 6))
    write_referit(
        folder,
        {"train": {"1_1": ["sky", "all of the sky"], "1_2": ["house"]}},
        lambda i: image,
        lambda key: np.eye(6, 8, dtype=bool),
    )
    assert [s.kind for s in ReferIt(tmp_path, "mine").samples("train")] == [None] * 3
    (folder / "kinds.json").write_text(
        json.dumps({"1_1": [{"kind": "stuff", "program": "sky"}, {"kind": "stuff", "group": "a"}]})
    )
    samples = ReferIt(tmp_path, "mine").samples("train")
    assert [(s.kind, s.sentence.program, s.sentence.group) for s in samples] == [
        ("stuff", "sky", None),
        ("stuff", None, "a"),
        (None, None, None),
    ]
    for content, says in [
        ({"1_1": [{}]}, "1 entries for the 2 expressions of 1_1"),
        ({"1_1": [{"kind": 3}, {}]}, "no text"),
        ([], "not a dict"),
    ]:
        (folder / "kinds.json").write_text(json.dumps(content))
        with pytest.raises(ReferError, match=f"kinds.json.*{says}"):
            ReferIt(tmp_path, "mine")
