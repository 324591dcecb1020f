"""The image store: the same batches bit for bit, never stale, never half there, whoever is killed."""

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import types
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_refer import make_toy

from refseg_nb.data import store as store_module
from refseg_nb.data.batches import RISDataset, make_loader, soft_target
from refseg_nb.data.images import resize_square
from refseg_nb.data.refer import Refer
from refseg_nb.data.store import (
    ImageStore,
    StoreError,
    build_store,
    open_store,
    pack_mask,
    store_key,
    store_size,
    unpack_mask,
)
from refseg_nb.data.words import vocabulary_for

S, T = 32, 12


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Refer(make_toy(tmp_path_factory.mktemp("toy")), "toy")


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    return build_store(toy, S, T, tmp_path_factory.mktemp("stores"), progress=False)


@pytest.fixture
def own(tmp_path):
    """A toy set that the test may change."""
    return Refer(make_toy(tmp_path / "data"), "toy")


def folders(path):
    return sorted(p.name for p in Path(path).iterdir() if p.is_dir())


def holds(store, refer, splits=None):
    """Everything in the store is what decoding gives."""
    samples = [s for split in splits or refer.splits for s in refer.samples(split)]
    for s in samples:
        assert torch.equal(
            store.image(s.image_id), resize_square(np.array(refer.load_image(s.image_id)), store.image_size)
        )
        assert (store.mask(s.ann_id) == refer.mask(s.ann_id)).all() and store.mask(s.ann_id).dtype == bool
        if store.target_size:
            assert torch.equal(
                store.target(s.ann_id), soft_target(refer.mask(s.ann_id), store.target_size).half()
            )
    return bool(samples)


@pytest.fixture(scope="module")
def two_workers():
    """Two spawned workers, started once: it takes seconds."""
    with store_module._pool(2) as pool:
        assert pool is not None
        yield pool


@pytest.fixture
def with_workers(two_workers, monkeypatch):
    """Let `build_store(..., workers=2)` use them."""
    monkeypatch.setattr(
        store_module, "_pool", lambda workers: nullcontext(two_workers if workers > 1 else None)
    )


def ended(process, seconds=200):
    """The exit code of a process, or None if it does not end in time."""
    process.join(seconds)
    return process.exitcode


@pytest.fixture
def start():
    """Runs a function in a process of its own, which does not outlive the test."""
    processes = []

    def run(fn, *arguments):
        processes.append(multiprocessing.get_context("fork").Process(target=fn, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield run
    for process in processes:
        if process.is_alive():
            process.kill()


def gone(pid, seconds=20):
    """Whether a process ends within this time."""
    for _ in range(int(seconds * 20)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (8, 8), (13, 21), (64, 48)])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_masks_come_back(shape, share):
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = rng.random(shape) < share
        (y, x, h, w), bits = pack_mask(mask)
        assert (unpack_mask((y, x, h, w), bits, shape) == mask).all() and len(bits) == -(-h * w // 8)
        inside = np.zeros(shape, bool)
        inside[y : y + h, x : x + w] = True
        assert not (mask & ~inside).any()
        if mask.any():
            assert (
                mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
            ), "the box is tight"


def test_masks_of_any_layout_come_back():
    mask = np.asfortranarray(np.random.default_rng(0).random((30, 20)) < 0.3)
    for m in (mask, mask[::-1], mask[::2, 1:]):
        assert (unpack_mask(*pack_mask(m), m.shape) == m).all()


# ---------------------------------------------------------------- what is in it
def test_it_holds_what_decoding_gives(toy, built):
    assert holds(built, toy) and len(built) == len(toy.images) and "toy" in repr(built)
    assert open_store(toy, S, T, built.path.parent).path == built.path


def test_two_processes_write_the_same_files_as_one(tmp_path, with_workers):
    refer = Refer(make_toy(tmp_path / "data", train=50, val=20), "toy")
    one, two = (build_store(refer, S, T, tmp_path / str(n), workers=n, progress=False) for n in (1, 2))
    names = sorted(p.name for p in one.path.iterdir())
    assert names == ["images.u8", "index.json", "masks.bits", "targets.f16"] and len(one) == 70
    for name in names:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    assert holds(two, refer)


def test_a_job_carries_only_its_own_part_of_the_reader(toy):
    wanted = store_module._wanted(toy, None)
    part = pickle.loads(pickle.dumps(store_module._part(toy, wanted[5:7])))
    assert (
        set(part.images) >= {i for i, _ in wanted[5:7]}
        and len(pickle.dumps(part)) < len(pickle.dumps(toy)) / 4
    )
    assert all((part.mask(a) == toy.mask(a)).all() for _, anns in wanted[5:7] for a in anns) and not part.refs


def test_real_photographs(real_data, tmp_path):
    refer = Refer(real_data, "refcocog", "micro")
    store = build_store(refer, 96, T, tmp_path, progress=False)
    assert holds(store, refer)
    bound = store_size(len(store), len({r.ann_id for r in refer.refs}), 96, T, 640 * 640)
    assert all((store.path / name).stat().st_size <= size for name, size in bound.items())


def test_only_what_is_referred_to(toy, tmp_path):
    store = build_store(toy, S, T, tmp_path, ["val"], progress=False)
    val = toy.samples("val")
    assert len(store) == len({s.image_id for s in val}) and holds(store, toy, ["val"])
    assert (store.path / "targets.f16").stat().st_size == 2 * T * T * len({s.ann_id for s in val})
    with pytest.raises(KeyError):
        store.image(toy.samples("train")[0].image_id)
    assert open_store(toy, S, T, tmp_path) is None and open_store(toy, S, T, tmp_path, ["val"]) is not None


def test_empty_masks_and_no_targets(toy, tmp_path):
    empty = copy.copy(toy)
    empty.annotations = {k: a | {"segmentation": []} for k, a in toy.annotations.items()}
    store = build_store(empty, S, None, tmp_path, progress=False)
    assert (store.path / "masks.bits").stat().st_size == (store.path / "targets.f16").stat().st_size == 0
    assert holds(store, empty) and not store.mask(toy.refs[0].ann_id).any()


def test_referit(tmp_path):
    from PIL import Image

    from refseg_nb.data.referit import ReferIt, write_referit

    rng = np.random.default_rng(0)
    pictures = {i: Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)) for i in (1, 2, 3)}
    masks = {f"{i}_{r}": rng.random((20 + i, 30)) < 0.3 for i in pictures for r in (1, 2)}
    queries = {"train": {"1_1": ["sky"], "1_2": ["man"], "2_1": ["sea", "water"]}, "test": {"3_2": ["tree"]}}
    write_referit(tmp_path / "referit", queries, pictures.get, masks.get)
    refer = ReferIt(tmp_path)
    store = build_store(refer, S, T, tmp_path / "stores", progress=False)
    assert holds(store, refer) and (store.mask(20001) == masks["2_1"]).all() and len(store) == 3
    os.utime(refer.mask_path(20001), (1, 1))
    assert open_store(ReferIt(tmp_path), S, T, tmp_path / "stores") is None, (
        "each mask is a file of its own there: a changed one is noticed"
    )


def test_sizes():
    assert store_size(10, 4, 32, 12, 100) == {
        "images.u8": 10 * 3 * 32 * 32,
        "targets.f16": 4 * 2 * 12 * 12,
        "masks.bits": 4 * 13,
    }
    assert store_size(19994, 50000, 320, None) == {
        "images.u8": 19994 * 307200,
        "targets.f16": 0,
        "masks.bits": 50000 * 38400,
    }


# ---------------------------------------------------------------- copies, processes
def test_what_comes_out_is_a_copy(toy, built, recwarn):
    s = toy.samples("val")[0]
    for read in (
        lambda: built.image(s.image_id),
        lambda: built.target(s.ann_id),
        lambda: torch.from_numpy(built.mask(s.ann_id)),
    ):
        one, want = read(), read().clone()
        one.zero_()
        assert want.any() and torch.equal(read(), want) and read().is_contiguous()
    assert not recwarn.list
    with pytest.raises(ValueError, match="read-only"):
        built._images[0] = 0


def _read(store, image_id, answer):
    answer.put(hashlib.sha256(store.image(image_id).numpy().tobytes()).hexdigest())


def test_other_processes_read_it(toy, built, start):
    image_id = toy.samples("val")[0].image_id
    answer = multiprocessing.get_context("fork").Queue()
    process = start(_read, built, image_id, answer)
    assert (
        answer.get(timeout=60)
        == hashlib.sha256(resize_square(np.array(toy.load_image(image_id)), S).numpy().tobytes()).hexdigest()
    )
    process.join()
    data = pickle.dumps(built)
    assert len(data) < 1000 and holds(pickle.loads(data), toy), "pickled is the path, not the pixels"


def test_a_pickled_store_does_not_depend_on_the_working_folder(toy, built, monkeypatch, tmp_path):
    monkeypatch.chdir(built.path.parent)
    data = pickle.dumps(ImageStore(built.path.name))
    monkeypatch.chdir(tmp_path)
    assert len(pickle.loads(data)) == len(built)


# ---------------------------------------------------------------- in RISDataset
def equal(a, b):
    tensors = all(
        torch.equal(getattr(a, k), getattr(b, k)) and getattr(a, k).stride() == getattr(b, k).stride()
        for k in ("images", "words", "image_index", "targets")
    )
    return tensors and a.samples == b.samples and a.image_ids == b.image_ids


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bit_for_bit(toy, built, workers):
    vocabulary = vocabulary_for(toy)
    plain, stored = (RISDataset(toy, "train", vocabulary, S, T, **more) for more in ({}, {"store": built}))
    pairs = list(
        zip(
            make_loader(plain, 4, 2, shuffle=True, seed=3),
            make_loader(stored, 4, 2, shuffle=True, seed=3, num_workers=workers),
            strict=True,
        )
    )
    assert len(pairs) == 4 and all(equal(a, b) for a, b in pairs)
    assert all((stored.original_mask(s) == plain.original_mask(s)).all() for s in toy.samples("train"))
    assert not stored.warm().cached and not stored._images and not stored._targets, (
        "nothing is kept a second time"
    )


def test_with_a_store_no_image_and_no_mask_is_decoded(toy, built, monkeypatch):
    stored = RISDataset(toy, "val", vocabulary_for(toy), S, T, store=built)
    for method in ("load_image", "mask"):
        monkeypatch.setattr(toy, method, lambda *a: pytest.fail("decoded"), raising=True)
    for batch in make_loader(stored, 3):
        for sample in batch.samples:
            stored.original_mask(sample)


def test_a_data_set_without_targets_can_use_any_store_of_its_size(toy, built):
    stored = RISDataset(toy, "val", vocabulary_for(toy), S, None, store=built)
    assert next(iter(make_loader(stored, 2))).targets is None


def test_the_wrong_store_is_refused(toy, built, tmp_path):
    vocabulary = vocabulary_for(toy)
    with pytest.raises(ValueError, match="image_size=32, not 48"):
        RISDataset(toy, "val", vocabulary, 48, T, store=built)
    with pytest.raises(ValueError, match="target_size=12, not 8"):
        RISDataset(toy, "val", vocabulary, S, 8, store=built)
    val = build_store(toy, S, None, tmp_path, ["val"], progress=False)
    with pytest.raises(ValueError, match="target_size=None, not 12"):
        RISDataset(toy, "val", vocabulary, S, T, store=val)
    with pytest.raises(ValueError, match="does not hold annotation"):
        RISDataset(toy, "train", vocabulary, S, None, store=val)
    other = copy.copy(toy)
    other.name = "toys"
    with pytest.raises(ValueError, match="name='toy', not 'toys'"):
        RISDataset(other, "val", vocabulary, S, T, store=built)


# ---------------------------------------------------------------- never stale
def changed_image(refer):
    refer.image_path(3).write_bytes(refer.image_path(6).read_bytes())


def touched_image(refer):
    os.utime(refer.image_path(3), (10**9, 10**9))


def edited(name, change):
    def edit(refer):
        file = refer.folder / name
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return edit


def moved_polygon(data):
    data["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]


def other_file(data):
    data["images"][0]["file_name"] = "other.png"


def other_box(data):
    data["annotations"][0]["bbox"] = [0, 0, 1, 1]


def renamed_image(refer):
    shutil.copy2(refer.image_path(1), refer.image_folder / "other.png")  # of the same size and time
    edited("instances.json", other_file)(refer)


@pytest.mark.parametrize(
    "change", [changed_image, touched_image, renamed_image, edited("instances.json", moved_polygon)]
)
def test_a_store_of_other_data_is_never_read(own, tmp_path, change):
    old = build_store(own, S, T, tmp_path / "stores", progress=False)
    change(own)
    now = Refer(own.root, "toy")
    assert open_store(now, S, T, tmp_path / "stores") is None
    new = build_store(now, S, T, tmp_path / "stores", progress=False)
    assert new.path != old.path and holds(new, now) and old.path.is_dir()


def test_what_it_does_not_depend_on_changes_nothing(own, tmp_path):
    key = store_key(own, S, T)
    assert store_key(own, S, T, own.splits) == key and store_key(own, S, T, own.splits[::-1]) == key
    edited("instances.json", other_box)(own)
    refs = pickle.loads((own.folder / "refs(unc).p").read_bytes())
    refs[0]["sentences"][0]["sent"] = "reworded"
    (own.folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    assert store_key(Refer(own.root, "toy"), S, T) == key


def test_the_key_names_sizes_splits_partition_and_versions(toy, monkeypatch):
    keys = {
        store_key(toy, S, T),
        store_key(toy, S, None),
        store_key(toy, 48, T),
        store_key(toy, S, 8),
        store_key(toy, S, T, ["val"]),
    }
    other = copy.copy(toy)
    other.split_by = "google"
    keys.add(store_key(other, S, T))
    version = store_module.version
    for package in ("torch", "torchvision", "pillow", "pycocotools"):
        with monkeypatch.context() as patch:
            patch.setattr(
                store_module,
                "version",
                lambda name, package=package: "0" if name == package else version(name),
            )
            keys.add(store_key(toy, S, T))
    monkeypatch.setattr(store_module, "FORMAT", 0)
    keys.add(store_key(toy, S, T))
    assert len(keys) == 11 and all(len(key) == 16 for key in keys)


def test_data_that_changes_while_it_is_stored(own, tmp_path):
    class Moving(Refer):
        def load_image(self, image_id):
            if image_id == 5:
                touched_image(self)
            return super().load_image(image_id)

    with pytest.raises(StoreError, match="changed while"):
        build_store(Moving(own.root, "toy"), S, T, tmp_path / "stores", progress=False)
    assert not folders(tmp_path / "stores")


def test_missing_images_and_bad_arguments(own, tmp_path):
    with pytest.raises(ValueError, match="image_size"):
        open_store(own, 0, T, tmp_path)
    with pytest.raises(ValueError, match="target_size"):
        build_store(own, S, 0, tmp_path)
    with pytest.raises(ValueError, match="trainval"):
        build_store(own, S, T, tmp_path, ["trainval"])
    own.image_path(2).unlink()
    with pytest.raises(FileNotFoundError, match=own.image(2).file_name):
        open_store(own, S, T, tmp_path)


# ---------------------------------------------------------------- damage
def cut(name):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def longer(path):
    (path / "masks.bits").write_bytes((path / "masks.bits").read_bytes() + b"x")


def no_file(path):
    (path / "targets.f16").unlink()


def no_index(path):
    (path / "index.json").unlink()


def list_as_index(path):
    (path / "index.json").write_text("[]")


def edited_index(path):
    index = json.loads((path / "index.json").read_text())
    index["annotations"][0][3] += 1
    (path / "index.json").write_text(json.dumps(index))


DAMAGE = {
    "images.u8: is": cut("images.u8"),
    "masks.bits: is": cut("masks.bits"),
    "masks.bits": longer,
    "targets.f16: is 0": no_file,
    "index.json: not the index of a store .FileNotFound": no_index,
    "not the index of a store .*cut|not the index of a store .JSON": cut("index.json"),
    "not the index of a store .Attr|not the index of a store .Type": list_as_index,
    "index.json: was altered": edited_index,
}


@pytest.mark.parametrize("message, damage", DAMAGE.items(), ids=range(len(DAMAGE)))
def test_damage_is_named_and_mended(toy, built, tmp_path, message, damage):
    path = tmp_path / built.path.name
    shutil.copytree(built.path, path)
    damage(path)
    with pytest.raises(StoreError, match=f"{message}.*build the store again"):
        open_store(toy, S, T, tmp_path)
    assert holds(build_store(toy, S, T, tmp_path, progress=False), toy) and folders(tmp_path) == [path.name]


def test_a_folder_with_the_name_of_another_store(toy, built, tmp_path):
    other = build_store(toy, 48, T, tmp_path, progress=False)
    other.path.rename(tmp_path / built.path.name)
    with pytest.raises(StoreError, match="renamed"):
        open_store(toy, S, T, tmp_path)


# ---------------------------------------------------------------- building: errors, space, kills, others
def test_an_unreadable_image_is_named_and_leaves_nothing(own, tmp_path, with_workers):
    own.image_path(9).write_bytes(b"not an image")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=own.image(9).file_name):
            build_store(own, S, T, tmp_path / "stores", workers=workers, progress=False)
        assert not folders(tmp_path / "stores")


def test_a_disk_that_is_too_small(toy, tmp_path, monkeypatch):
    need = sum(store_size(len(toy.images), len(toy.annotations), S, T, 40 * 56).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need // 2))
    with pytest.raises(StoreError, match="MB are free: make room"):
        build_store(toy, S, T, tmp_path, progress=False)
    assert not folders(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    assert holds(build_store(toy, S, T, tmp_path, progress=False), toy)


class Slow(Refer):
    """A reader that stops in the second job and leaves its process's number."""

    def load_image(self, image_id):
        if image_id > 17:
            (self.root / "pids" / str(os.getpid())).touch()
            time.sleep(600)
        return super().load_image(image_id)


def _build(refer, folder, workers):
    torch.set_num_threads(1)
    build_store(refer, S, T, folder, workers=workers, progress=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle(own, tmp_path, workers, start):
    pids = own.root / "pids"
    pids.mkdir()
    process = start(_build, Slow(own.root, "toy"), tmp_path / "stores", workers)
    for _ in range(1200):
        if list(pids.iterdir()) or not process.is_alive():
            break
        time.sleep(0.05)
    found = [int(p.name) for p in pids.iterdir()]
    assert found and (process.pid in found) == (workers == 1)
    [half] = folders(tmp_path / "stores")
    [images] = (tmp_path / "stores" / half).glob("*/images.u8")
    assert half.startswith(".") and images.stat().st_size == 21 * 3 * S * S, (
        "it looks whole, but for its name"
    )
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert all(gone(pid) for pid in found), "workers leave with their parent"
    assert open_store(own, S, T, tmp_path / "stores") is None
    build_store(own, 48, T, tmp_path / "stores", progress=False)
    assert not any(name.startswith(".") for name in folders(tmp_path / "stores")), (
        "the next builder, of whatever store, clears up"
    )
    assert holds(build_store(own, S, T, tmp_path / "stores", progress=False), own)


class Counting(Refer):
    """A reader that notes each image that a process decodes."""

    def load_image(self, image_id):
        with open(self.root / "decoded", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        return super().load_image(image_id)


def test_two_builders_at_once(own, tmp_path, start):
    processes = [start(_build, Counting(own.root, "toy"), tmp_path / "stores", 1) for _ in range(2)]
    assert [ended(process, 60) for process in processes] == [0, 0]
    decoded = (own.root / "decoded").read_text().split()
    assert len(decoded) == len(own.images) and len(set(decoded)) == 1, "one builds, the other waits and opens"
    store = open_store(own, S, T, tmp_path / "stores")
    assert holds(store, own) and folders(tmp_path / "stores") == [store.path.name]


def _as_main(script):
    """What `python script` does, without importing torch again."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = str(script)
    exec(compile(script.read_text(), str(script), "exec"), vars(main))


def test_a_script_without_main_guard(own, tmp_path, monkeypatch, capfd, start):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "from refseg_nb.data.refer import Refer\nfrom refseg_nb.data.store import build_store\n"
        "build_store(Refer('data', 'toy'), 32, 12, 'stores', workers=2, progress=False)\n"
    )
    process = start(_as_main, script)
    assert ended(process) == 0 and "freeze_support" in capfd.readouterr().err, (
        "the worker died, the parent went on alone"
    )
    assert holds(open_store(own, S, T, tmp_path / "stores"), own)


class DyingPool:
    """A pool whose worker is killed at the second job."""

    def map(self, fn, jobs):
        yield ("pool", jobs[0])
        raise BrokenProcessPool("killed")


def test_what_a_killed_worker_left_the_parent_does(monkeypatch):
    monkeypatch.setattr(store_module, "_fill", lambda job: ("alone", job))
    assert list(store_module._results([1, 2, 3], DyingPool())) == [("pool", 1), ("alone", 2), ("alone", 3)]
