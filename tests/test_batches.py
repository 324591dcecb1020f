"""Batches: each image once, each sentence once, the same order always."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

from refseg_nb.data.batches import RISDataset, epoch_batches, make_loader, soft_target
from refseg_nb.data.images import resize_square
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import PAD, Vocabulary


def dataset_of(refer, split="train", **options):
    return RISDataset(refer, split, Vocabulary.build(s.text for s in refer.samples("train")), **options)


@pytest.fixture(scope="module")
def real(real_data):
    return dataset_of(Refer(real_data, "refcocog", "micro")).warm()


def equal(a, b):
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("images", "words", "targets", "image_index")
    )
    return tensors and a.samples == b.samples and a.image_ids == b.image_ids


def test_a_batch_fits_together(real):
    for batch in make_loader(real, 4, shuffle=True, seed=1):
        K, B = len(batch.image_ids), len(batch)
        assert (
            batch.images.shape == (K, 3, 96, 96)
            and batch.images.dtype == torch.uint8
            and len(set(batch.image_ids)) == K
        )
        assert (
            batch.words.shape[0] == batch.image_index.shape[0] == B
            and batch.targets.shape == (B, 48, 48)
            and batch.targets.dtype == torch.float32
        )
        assert (batch.words[:, -1] != PAD).any(), "no column is only padding"
        for i, sample in enumerate(batch.samples):
            assert batch.image_ids[batch.image_index[i]] == sample.image_id
            assert batch.words[i][batch.words[i] != PAD].tolist() == real.vocabulary.encode(sample.text)
            assert torch.allclose(
                batch.targets[i], soft_target(real.refer.mask(sample.ann_id), 48), atol=1e-3
            )
        for image_id, image in zip(batch.image_ids, batch.images):
            assert torch.equal(image, resize_square(np.array(real.refer.load_image(image_id)), 96))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("K", [1, 3, 100])
def test_every_sentence_exactly_once(real, shuffle, K):
    seen = Counter(
        (s.ref.ref_id, s.sent_id)
        for batch in make_loader(real, K, shuffle=shuffle, seed=3, epoch=2)
        for s in batch.samples
    )
    assert set(seen.values()) == {1} and len(seen) == len(real) == len(real.refer.samples("train"))


def test_the_cap(real):
    for M in (1, 2):
        batches = epoch_batches(real, 4, M, shuffle=True, seed=0, epoch=5)
        counts = {g: len(i) for batch in batches for g, i in batch}
        assert len(counts) == len(real.groups) and all(
            n == min(M, len(real.groups[g][1])) for g, n in counts.items()
        )
    used = {
        i
        for epoch in range(40)
        for batch in epoch_batches(real, 4, 1, shuffle=True, epoch=epoch)
        for _, rows in batch
        for i in rows
    }
    assert used == set(range(len(real))), "over the epochs every sentence gets its turn"


def test_order_is_a_function_of_seed_and_epoch(real):
    order = lambda **k: epoch_batches(real, 4, shuffle=True, **k)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({str(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    torch.manual_seed(0)
    np.random.seed(0)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    flat = [g for batch in epoch_batches(real, 4) for g, _ in batch]
    assert flat == sorted(flat)


def test_a_resumed_run_sees_the_same_batches(real):
    whole = list(make_loader(real, 4, shuffle=True, seed=5, epoch=1))
    for start in (0, 2, len(whole)):
        rest = list(make_loader(real, 4, shuffle=True, seed=5, epoch=1, start=start))
        assert len(rest) == len(whole) - start and all(equal(a, b) for a, b in zip(rest, whole[start:]))


def test_workers_change_nothing(real):
    alone, helped = (list(make_loader(real, 4, 2, shuffle=True, seed=5, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(helped) and all(equal(a, b) for a, b in zip(alone, helped))


def test_the_loader_draws_nothing_from_the_global_generator(real):
    state = torch.get_rng_state()
    list(make_loader(real, 4, shuffle=True)), list(make_loader(real, 4, shuffle=True, num_workers=1))
    assert torch.equal(state, torch.get_rng_state())


def test_cached_and_uncached_are_the_same(real_data):
    refer = Refer(real_data, "refcoco", "micro")
    kept, fresh = dataset_of(refer), dataset_of(refer, cache_gb=0)
    assert kept.cached and not fresh.cached
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(make_loader(kept, 2), make_loader(fresh, 2), strict=True))
    assert kept._images and not fresh._images and not fresh._targets


# ---------------------------------------------------------------- targets and images
def soft_naive(mask, size):
    h, w = mask.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            total = n = 0
            for y in range(i * h // size, -(-(i + 1) * h // size)):
                for x in range(j * w // size, -(-(j + 1) * w // size)):
                    total += mask[y, x]
                    n += 1
            out[i, j] = total / n
    return out


@pytest.mark.parametrize("h,w,size", [(96, 96, 48), (60, 45, 7), (5, 9, 12), (1, 1, 4), (13, 40, 13)])
def test_soft_target_against_the_naive_loop(h, w, size):
    mask = np.random.default_rng(0).random((h, w)) < 0.4
    target = soft_target(mask, size).numpy()
    assert np.allclose(target, soft_naive(mask, size), atol=1e-6) and target.min() >= 0 and target.max() <= 1
    assert (
        soft_target(np.ones((h, w), bool), size).min() == 1
        and soft_target(np.zeros((h, w), bool), size).max() == 0
    )


def test_soft_target_takes_any_layout():
    mask = np.random.default_rng(0).random((30, 20)) < 0.5
    assert torch.equal(soft_target(np.asfortranarray(mask), 8), soft_target(mask, 8))
    assert torch.equal(soft_target(mask[::-1], 10), soft_target(mask, 10).flip(0))


def test_soft_targets_of_real_masks_keep_their_area(real):
    for sample in real.samples:
        mask = real.original_mask(sample)
        assert abs(float(real.target(sample.ann_id).float().mean()) - mask.mean()) < 0.01


def test_original_masks_are_the_reference(real):
    for sample in real.samples[:5]:
        info = real.refer.images[sample.image_id]
        assert (
            real.original_mask(sample).shape == (info.height, info.width)
            and real.original_mask(sample).dtype == bool
        )


def test_resize_square_is_the_antialiased_resize():
    from PIL import Image

    rng = np.random.default_rng(0)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(resize_square(stripes, 16).float() - 127.5).max() < 20, "fine stripes become grey, not stripes"
    image = Image.fromarray(rng.integers(0, 255, (70, 40, 3), dtype=np.uint8))
    pil = np.asarray(image.resize((32, 32), Image.BILINEAR)).astype(float)
    assert abs(resize_square(np.array(image), 32).permute(1, 2, 0).numpy() - pil).max() <= 2
    same = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    assert (resize_square(np.array(same), 32).permute(1, 2, 0).numpy() == np.asarray(same)).all()


def test_no_targets_and_bad_sizes(real_data):
    refer = Refer(real_data, "refcoco", "micro")
    assert next(iter(make_loader(dataset_of(refer, target_size=None), 2))).targets is None
    for options in ({"image_size": 0}, {"target_size": 0}, {"max_words": 0}):
        with pytest.raises(ValueError, match="must be"):
            dataset_of(refer, **options)
    dataset = dataset_of(refer)
    with pytest.raises(ValueError, match="images_per_batch"):
        make_loader(dataset, 0)
    with pytest.raises(ValueError, match="expressions_per_image"):
        make_loader(dataset, 2, 0)
    with pytest.raises(ValueError, match="its splits are"):
        dataset_of(refer, split="trainval")


def test_moving_a_batch(real):
    batch = next(iter(make_loader(real, 2)))
    moved = batch.to("meta")
    assert (
        moved.images.device.type == moved.targets.device.type == "meta"
        and moved.samples is batch.samples
        and batch.images.device.type == "cpu"
    )


# ---------------------------------------------------------------- RefShapes
def test_refshapes_batches(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    for split in refer.splits:
        dataset = dataset_of(refer, split)
        seen = [s.sent_id for batch in make_loader(dataset, 8) for s in batch.samples]
        assert sorted(seen) == sorted(s.sent_id for s in refer.samples(split))


def test_batches_are_fast(tiny_root):
    dataset = dataset_of(Refer(tiny_root, "refshapes")).warm()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        n = sum(len(batch) for batch in make_loader(dataset, 16, shuffle=True))
        best = min(best, (time.perf_counter() - start) / n)
    assert best < 1e-3, f"{best * 1e3:.2f} ms an expression"
