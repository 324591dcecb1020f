"""The dense CRF: against the exact kernel, against the program of the published numbers, against closed
forms, and inside the evaluation."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import toy_dataset, toy_model
from toy_refer import make_toy

from refseg_nb.data.refer import Refer
from refseg_nb.errors import MissingExtra
from refseg_nb.evaluation.crf import (
    CrfConfig,
    Lattice,
    dense_crf,
    gaussian_matrix,
    lift,
    pixel_features,
    simplex,
)
from refseg_nb.evaluation.evaluator import evaluate, load_record, probability_at, save_record

CMPC = CrfConfig()


def smooth(mask, sigma):
    """A blurred map, by a matrix for each axis."""

    def blur(n):
        x = np.arange(n)
        g = np.exp(-0.5 * ((x[:, None] - x) / sigma) ** 2)
        return g / g.sum(1, keepdims=True)

    return blur(mask.shape[0]) @ mask @ blur(mask.shape[1]).T


def soft(mask, seed):
    """What a network might say: the mask, blurred, shifted, with slow noise, never quite sure."""
    rng = np.random.default_rng(seed)
    h, w = mask.shape
    moved = np.roll(
        smooth(mask.astype(float), max(h, w) / 60),
        rng.integers(-max(h, w) // 60 - 1, max(h, w) // 60 + 2, 2),
        (0, 1),
    )
    noise = smooth(rng.normal(size=mask.shape), max(h, w) / 20)
    return np.clip(0.03 + 0.92 * moved + 0.08 * noise / noise.std(), 0.002, 0.998).astype(np.float32)


def photos(root, count):
    """The photographs with the largest objects, each once, with the mask of that object."""
    found = {}
    for name in ("refcocog", "refcoco"):
        refer = Refer(root, name, "micro")
        for sample in refer.samples("train"):
            mask = refer.mask(sample.ann_id)
            if sample.image_id not in found or mask.mean() > found[sample.image_id][1].mean():
                found[sample.image_id] = refer.load_image(sample.image_id), mask
    return sorted(found.values(), key=lambda pair: -pair[1].mean())[:count]


def resized(image, mask, size, letterbox=False):
    w, h = (
        (size, size)
        if not letterbox
        else (round(image.width * size / max(image.size)), round(image.height * size / max(image.size)))
    )
    image, mask = (
        np.array(image.resize((w, h), Image.Resampling.BILINEAR)),
        np.array(Image.fromarray(mask).resize((w, h))),
    )
    if letterbox:
        top, left = (size - h) // 2, (size - w) // 2
        pad = ((top, size - h - top), (left, size - w - left))
        image, mask = np.pad(image, (*pad, (0, 0))), np.pad(mask, pad)
    return image, mask


def exact_crf(probability, image, config=CMPC):
    """The mean field with two labels and a softmax, as the paper writes it, over all pairs of pixels."""

    def gaussian(n, sigma):
        return torch.exp(-(((torch.arange(n)[:, None] - torch.arange(n)) / sigma) ** 2) / 2)

    near, wide = (
        torch.kron(gaussian(image.shape[0], s), gaussian(image.shape[1], s))
        for s in (config.gaussian_sxy, config.bilateral_sxy)
    )
    colours = torch.tensor(image).reshape(-1, 3) / config.bilateral_srgb
    kernels = (
        near,
        wide
        * torch.exp(-(torch.cdist(colours, colours, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 2),
    )
    scales = [k.sum(0) ** -0.5 for k in kernels]
    p = torch.tensor(probability).clamp(config.epsilon, 1 - config.epsilon).flatten()
    unary = -torch.stack([1 - p, p]).log()
    Q = (-unary).softmax(0)
    for _ in range(config.iterations):
        for_labels = sum(
            w * ((Q * d) @ k) * d
            for w, k, d in zip((config.gaussian_compat, config.bilateral_compat), kernels, scales)
        )
        Q = (-unary - for_labels.flip(0)).softmax(0)
    return Q[1].reshape(probability.shape).numpy()


def agreement(a, b):
    a, b = a > 0.5, b > 0.5
    return (a == b).mean(), (a & b).sum() / (a | b).sum()


# --- against other programs


@pytest.mark.parametrize(
    "kind, size", [("letterbox", 320), ("squash", 320), ("letterbox", 200), ("squash", 97)]
)
def test_agrees_with_the_program_of_the_published_numbers(real_data, kind, size):
    pytest.importorskip("pydensecrf")
    changed = 0
    for seed, (image, mask) in enumerate(photos(real_data, 4)):
        image, mask = resized(image, mask, size, kind == "letterbox")
        p = soft(mask, seed)
        ours, theirs = dense_crf(p, image), dense_crf(p, image, replace(CMPC, backend="pydensecrf"))
        same, iou = agreement(ours, theirs)
        assert same >= 0.995 and iou >= 0.97, (seed, same, iou)
        assert np.abs(ours - theirs).mean() < 2e-3
        changed += ((p > 0.5) != (ours > 0.5)).mean()
    assert changed > 0.01, "the CRF changed hardly a pixel: this test would see nothing"


def test_agrees_with_the_exact_kernel(real_data):
    """The lattice is an approximation: nearly all pixels agree, and the masks as a whole. Both programs
    share the rest."""
    both = either = 0
    for seed, (image, mask) in enumerate(photos(real_data, 4)):
        image, mask = resized(image, mask, 72)
        p = soft(mask, seed)
        ours, exact = dense_crf(p, image), exact_crf(p, image)
        same, iou = agreement(ours, exact)
        assert same >= 0.97 and iou >= 0.9, (seed, same, iou)
        both, either = (
            both + ((ours > 0.5) & (exact > 0.5)).sum(),
            either + ((ours > 0.5) | (exact > 0.5)).sum(),
        )
    assert both / either >= 0.95


def test_without_the_bilateral_kernel_it_is_exact(real_data):
    image, mask = resized(*photos(real_data, 1)[0], 40)
    p, config = soft(mask, 0), replace(CMPC, bilateral_compat=0)
    assert np.abs(dense_crf(p, image, config) - exact_crf(p, image, config)).max() < 1e-4
    other = dense_crf(p, 255 - image, config)
    assert np.array_equal(other, dense_crf(p, image, config)), (
        "without the bilateral kernel the colours do not matter"
    )


# --- closed forms


def picture(h, w, seed=0, noise=5):
    """A few flat patches with a little noise, and a soft map of one of them."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (2, 3, 3))[np.arange(h)[:, None] * 2 // h, np.arange(w) * 3 // w]
    p = smooth((patches == patches[0, 0]).all(-1).astype(float), 2) * 0.8 + 0.1
    return (patches + rng.normal(0, noise, (h, w, 3))).clip(0, 255).astype(np.uint8), p.astype(np.float32)


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.2, 0.5, 0.9, 1.0])
def test_one_pixel_pulls_only_at_itself(value):
    unary = np.log(np.clip(value, 1e-6, 1 - 1e-6) / (1 - np.clip(value, 1e-6, 1 - 1e-6)))
    logit = unary
    for _ in range(5):
        logit = unary + (3 + 10) * (2 / (1 + np.exp(-logit)) - 1)
    got = dense_crf(np.array([[value]], np.float32), np.zeros((1, 1, 3), np.uint8))
    assert got.item() == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)


def test_a_constant_picture_leaves_only_the_distance():
    """All colours alike: the bilateral kernel is a Gaussian over the positions, which separates exactly."""
    y, x = np.mgrid[:60, :80]
    p = (1 / (1 + np.exp((30 - y + 40 - x) / 6))).astype(np.float32)  # a slanted edge
    unary = torch.tensor(p).logit()
    Q, blurs = (
        torch.tensor(p),
        [(w, gaussian_matrix(60, s), gaussian_matrix(80, s)) for w, s in ((3, 3.0), (10, 20.0))],
    )
    for _ in range(5):
        Q = (unary + sum(w * a @ (2 * Q - 1) @ b for w, a, b in blurs)).sigmoid()
    got = dense_crf(p, np.full((60, 80, 3), 90, np.uint8))
    same, iou = agreement(got, Q.numpy())
    assert same > 0.99 and iou > 0.97 and np.abs(got - Q.numpy()).mean() < 0.01


def test_undecided_stays_undecided_and_labels_are_symmetric():
    image, p = picture(30, 42)
    assert np.allclose(dense_crf(np.full_like(p, 0.5), image), 0.5, atol=1e-6)
    assert np.allclose(dense_crf(1 - p, image), 1 - dense_crf(p, image), atol=1e-3)


def test_without_pull_or_without_updates_nothing_changes():
    image, p = picture(20, 30)
    for config in (replace(CMPC, iterations=0), replace(CMPC, gaussian_compat=0, bilateral_compat=0)):
        assert np.allclose(dense_crf(p, image, config), p, atol=1e-6)


def test_saturated_probabilities_stay_finite_and_are_clamped():
    image, p = picture(20, 30)
    hard = (p > 0.5).astype(np.float32)
    got = dense_crf(hard, image)
    assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1
    assert np.array_equal(got, dense_crf(hard.clip(1e-6, 1 - 1e-6), image)), (
        "0 and 1 are what the clamp makes of them"
    )
    assert (
        dense_crf(np.zeros_like(p), image).max() < 1e-9 and dense_crf(np.ones_like(p), image).min() > 1 - 1e-6
    )


def test_flips_and_shifts_of_the_colours_change_hardly_a_pixel():
    """The lattice is not symmetric to the last bit, the CRF that it stands for is."""
    image, p = picture(64, 90, noise=3)
    got = dense_crf(p, image)
    for axis in (0, 1):
        assert agreement(got, np.flip(dense_crf(np.flip(p, axis), np.flip(image, axis)), axis))[0] > 0.98
    dark = image // 2 + 20
    assert agreement(dense_crf(p, dark), dense_crf(p, dark + 60))[0] > 0.98


def test_an_edge_of_the_picture_stops_the_mask():
    image = np.full((40, 60, 3), 40, np.uint8)
    image[:, 30:] = 200
    true = np.zeros((40, 60), bool)
    true[:, :30] = True
    # crosses 1/2 four pixels too late
    p = np.tile(np.clip(0.5 + (34.5 - np.arange(60)) / 20, 0.02, 0.98), (40, 1)).astype(np.float32)
    assert agreement(p, true * 1.0)[1] < 0.9 and agreement(dense_crf(p, image), true * 1.0)[1] == 1


# --- the lattice


@pytest.mark.parametrize("d", [1, 2, 5])
def test_points_lie_in_their_simplex(d):
    torch.manual_seed(d)
    f = torch.randn(500, d, dtype=torch.float64) * 4
    y = lift(f)
    v, order, b = simplex(y)
    n = d + 1
    corners = torch.stack([v + k - torch.zeros_like(v).scatter(1, order[:, :k], n) for k in range(n)], 1)
    assert (corners.sum(2) == 0).all() and (corners % n == torch.arange(n)[:, None]).all()
    assert (
        b.min() >= -1e-12
        and torch.allclose(b.sum(1), torch.ones(500, dtype=torch.float64))
        and torch.allclose((b[..., None] * corners).sum(1), y)
    )
    assert torch.allclose(torch.pdist(y), torch.pdist(f) * n * (2 / 3) ** 0.5)
    if d == 2:  # v_0 is the nearest lattice point of remainder 0, by trying all around
        near = n * torch.tensor([(a, c, -a - c) for a in range(-9, 10) for c in range(-9, 10)])
        inside = y.abs().amax(1) < 20
        assert torch.allclose(torch.cdist(y, near.double()).amin(1)[inside], (y - v).norm(dim=1)[inside])


def test_ties_of_equal_pixels_are_settled():
    lattice = Lattice(torch.zeros(7, 5))
    assert lattice.size == 6 and torch.allclose(
        lattice(torch.arange(7.0)[:, None]), lattice(torch.full((7, 1), 3.0))
    )


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_filter_is_a_gaussian_where_the_lattice_is_full(d):
    """One vote in a dense cloud: what arrives, as a function of the distance, and its spread in every
    direction."""
    torch.manual_seed(0)
    f = torch.rand(20000, d) * 12 - 6
    inner = torch.randperm((f.abs() < 1).all(1).sum())[:200]
    source = (f.abs() < 1).all(1).nonzero()[inner, 0]
    answer = Lattice(f)(
        torch.zeros(len(f), len(source)).index_put_(
            (source, torch.arange(len(source))), torch.ones(len(source))
        )
    )
    offset = f[:, None] - f[source]
    for axis in range(d):
        assert float((answer * offset[..., axis] ** 2).sum() / answer.sum()) == pytest.approx(1, abs=0.12)
    wanted = torch.exp(-0.5 * offset.square().sum(2))
    assert float(torch.corrcoef(torch.stack([answer.flatten(), wanted.flatten()]))[0, 1]) > 0.97


def test_the_lattice_against_a_dictionary():
    image, _ = picture(7, 9, noise=2)
    f = pixel_features(torch.tensor(image), 5.0, 20.0)
    values = torch.rand(63, 2)
    v, order, b = simplex(lift(f))
    grid, keys = {}, []
    for start, ranks, weights, value in zip(v.tolist(), order.tolist(), b.tolist(), values):
        corner, row = list(start), []
        for k in range(6):
            row.append((tuple(corner), weights[k]))
            grid[tuple(corner)] = grid.get(tuple(corner), 0) + weights[k] * value
            corner = [c + 1 - 6 * (i == ranks[k]) for i, c in enumerate(corner)]
        keys.append(row)
    for i in range(6):
        moved = lambda key, sign, i=i: tuple(c + sign * (1 - 6 * (j == i)) for j, c in enumerate(key))
        grid = {
            key: z + (grid.get(moved(key, 1), 0) + grid.get(moved(key, -1), 0)) / 2 for key, z in grid.items()
        }
    expected = torch.stack([sum(weight * grid[key] for key, weight in row) for row in keys])
    lattice = Lattice(f)
    assert lattice.size == len(grid) and torch.allclose(lattice(values), expected, atol=1e-5)


def test_the_gaussian_matrix_is_the_normalised_kernel():
    y, x = np.mgrid[:5, :8].reshape(2, -1)
    K = np.exp(-((x[:, None] - x) ** 2 + (y[:, None] - y) ** 2) / (2 * 1.7**2))
    expected = K / np.sqrt(K.sum(0)[:, None] * K.sum(0))
    s = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    got = gaussian_matrix(5, 1.7) @ torch.tensor(s) @ gaussian_matrix(8, 1.7)
    assert np.allclose(got.flatten(), expected @ s.flatten(), atol=1e-5)


# --- how it is called


def test_maps_of_one_picture_are_done_together():
    image, p = picture(31, 44)
    maps = np.stack([p, 1 - p, p**2])
    together = dense_crf(maps, image)
    assert together.shape == maps.shape and together.dtype == np.float32
    for m, got in zip(maps, together):
        assert np.allclose(dense_crf(m, image), got, atol=1e-4)
    tensor = dense_crf(torch.tensor(p), Image.fromarray(image))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), dense_crf(p, image))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    image, p = picture(200, 320)
    assert np.allclose(dense_crf(torch.tensor(p).cuda(), image).cpu().numpy(), dense_crf(p, image), atol=1e-2)


def test_bad_input_is_named():
    image, p = picture(10, 12)
    for bad, words in [
        ((p * 30 - 10, image), r"in \[0, 1\]"),
        ((np.full_like(p, np.nan), image), r"in \[0, 1\]"),
        ((p[:5], image), r"shape \[5, 12\].*10 x 12"),
        ((p.T, image), r"shape \[12, 10\]"),
        ((p[None, None], image), "give"),
        ((p[None][:0], image), r"shape \[0, 10, 12\]"),
        ((p, image / 255), "uint8.*float64"),
        ((p, image[..., 0]), r"\[10, 12\]"),
        ((p, image[..., [0, 1, 2, 2]]), r"\[10, 12, 4\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            dense_crf(*bad)
    for name, value in [
        ("gaussian_sxy", 0),
        ("bilateral_sxy", -1),
        ("bilateral_srgb", math.nan),
        ("gaussian_compat", -1),
        ("bilateral_compat", math.inf),
        ("iterations", -1),
        ("epsilon", 0.5),
        ("epsilon", 0),
        ("backend", "numpy"),
    ]:
        with pytest.raises(ValueError, match=name):
            CrfConfig(**{name: value})
    with pytest.raises(ValueError, match="too small"):
        dense_crf(p, image, replace(CMPC, bilateral_sxy=1e-4, bilateral_srgb=1e-4))


def test_a_missing_backend_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    image, p = picture(10, 12)
    with pytest.raises(MissingExtra, match=r"backend 'torch'.*refseg_nb\[crf\]"):
        dense_crf(p, image, replace(CMPC, backend="pydensecrf"))


# --- in the evaluation


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(make_toy(tmp_path_factory.mktemp("toy")))


def counted(model, dataset, config, grey=False):
    """The protocol with a CRF, one sentence at a time."""
    rows = {}
    for sample in dataset.samples:
        pixels = dataset.image(sample.image_id)[None]
        logits = model(
            torch.full_like(pixels, 127) if grey else pixels,
            torch.tensor([dataset.vocabulary.encode(sample.text, dataset.max_words)]),
        )
        true, image = dataset.original_mask(sample), np.array(dataset.refer.load_image(sample.image_id))
        pred = (
            dense_crf(
                probability_at(logits, true.shape)[0].detach(),
                np.full_like(image, 127) if grey else image,
                config,
            ).numpy()
            > 0.5
        )
        rows[sample.ref_id, sample.sent_id] = int((pred & true).sum()), int((pred | true).sum())
    return rows


@pytest.mark.parametrize(
    "config, control", [(True, None), (CrfConfig(iterations=2, bilateral_srgb=30), None), (True, "none")]
)
def test_evaluate_with_a_crf(toy, tmp_path, config, control):
    model = toy_model(toy)
    plain = evaluate(model, toy, resamples=20, image_control=control)
    record = evaluate(
        model,
        toy,
        resamples=20,
        crf=config,
        image_control=control,
        images_per_batch=3,
        expressions_per_step=4,
    )
    settings = CMPC if config is True else config
    with torch.no_grad():
        expected = counted(model, toy, settings, grey=control == "none")
    a = record.arrays
    got = {(r, s): (i, u) for r, s, i, u in zip(a["ref_id"], a["sent_id"], a["intersection"], a["union"])}
    assert got.keys() == expected.keys()
    assert sum(abs(got[k][0] - expected[k][0]) + abs(got[k][1] - expected[k][1]) for k in got) <= 2, (
        "batching moved more than a pixel at the threshold"
    )
    if control is None:
        assert not np.array_equal(a["union"], plain.arrays["union"]), (
            "the CRF changed nothing: this test would see nothing"
        )
    assert plain.protocol["crf"] is False and plain.crf_seconds is None
    assert record.protocol["crf"] == asdict(settings) and 0 < record.crf_seconds < record.seconds
    back = load_record(save_record(record, tmp_path / "r.json"))
    assert back.protocol["crf"] == asdict(settings) and back.crf_seconds == record.crf_seconds
    assert {k: v for k, v in record.protocol.items() if k != "crf"} == {
        k: v for k, v in plain.protocol.items() if k != "crf"
    }
