"""CMPC: counts of the published program, every step against loops over arrays in TensorFlow's layout, and
what the model may and may not depend on."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import Vocabulary, vocabulary_for
from refseg_nb.evaluation.protocols import PROTOCOLS
from refseg_nb.models.cmpc import (
    CMPC,
    CMPC_PRESETS,
    CMPC_RECIPES,
    CMPCConfig,
    DeepLabResNet,
    RelationGraph,
    WordReader,
    coordinates,
    deeplab_backbone,
    enlarge,
    load_published,
    pad_same,
    published_layout,
)
from refseg_nb.models.cost import count_flops, count_parameters
from refseg_nb.models.hub import load_model, save_model
from refseg_nb.models.registry import create_model

TINY = CMPCConfig(
    backbone="refshapes",
    backbone_weights="none",
    image_size=32,
    grid=4,
    word_dim=6,
    channels=8,
    fused=4,
    heads=2,
    factor=3,
)
V = 10  # words of the tiny vocabulary


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def published_arrays():
    "Random arrays of the tiny layout, large enough that nothing is nearly linear; norms' scales near one."
    arrays = {}
    for name, shape in published_layout(V, TINY).items():
        arrays[name] = torch.randn(shape, dtype=torch.double) * (
            0.3 if name.endswith(("bias", "beta")) else 0.6
        ) + (1.0 if name.endswith("gamma") else 0.0)
    return arrays


def loaded(arrays):
    "A tiny model in double precision with these arrays."
    model = CMPC(TINY, V).double().eval()
    missing, unknown = model.load_state_dict(load_published(arrays, V, TINY)[0], strict=False)
    assert not unknown and all(k.startswith("backbone.") for k in missing)
    return model


def random_levels(k=2):
    return [torch.randn(k, c, s, s, dtype=torch.double) for c, s in zip((48, 96, 160), (4, 4, 4))]


# ---- the whole model, one expression at a time, from arrays as TensorFlow keeps them


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def relu(x):
    return np.maximum(x, 0)


def naive(arrays, levels, numbers):
    """Logits, shares, and P and Q of each level for one expression without padding; maps are [H, W,
    channels], everything is tiled and built."""
    a = {k: v.numpy() for k, v in arrays.items()}
    dense = lambda name, x: x @ a[name + ".kernel"][0, 0] + a[name + ".bias"]
    joint = lambda name, m: (m - m.mean()) / m.std() * a[name + ".gamma"] + a[name + ".beta"]
    tile = lambda x: np.tile(x, (4, 4, 1))

    def conv3(name, m):
        "3x3, to one channel, by taps."
        kernel, out = a[name + ".kernel"], np.full((4, 4), a[name + ".bias"][0])
        for y, x, dy, dx in itertools.product(range(4), range(4), range(3), range(3)):
            if 0 <= y + dy - 1 < 4 and 0 <= x + dx - 1 < 4:
                out[y, x] += m[y + dy - 1, x + dx - 1] @ kernel[dy, dx, :, 0]
        return out

    h, c, w, lstm = np.zeros(8), np.zeros(8), [], "reader.encoder.lstm."
    for number in numbers:
        i, j, f, o = np.split(
            np.concatenate([a["reader.encoder.embedding.weight"][number], h]) @ a[lstm + "kernel"]
            + a[lstm + "bias"],
            4,
        )
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
        h = sigmoid(o) * np.tanh(c)
        w.append(unit(h))
    shares = [softmax(dense("reader.parser.2", relu(dense("reader.parser.0", x)))) for x in w]
    q = unit(sum((p[0] + p[1]) * x for p, x in zip(shares, w)))
    s = unit(sum((p[0] + p[1] + p[2]) * x for p, x in zip(shares, w)))

    edges = lambda y, x: [
        x / 2 - 1,
        y / 2 - 1,
        (x + 1) / 2 - 1,
        (y + 1) / 2 - 1,
        (x + 0.5) / 2 - 1,
        (y + 0.5) / 2 - 1,
        0.25,
        0.25,
    ]
    where = np.array([[edges(y, x) for x in range(4)] for y in range(4)])
    maps, ps, qs, scores = [], [], [], []
    for n, level in enumerate(levels):
        of = f"levels.{n}."
        v = unit(dense(of + "lateral", level.permute(1, 2, 0).numpy()))
        seen, said = (
            np.tanh(dense(of + "fusion.visual", np.concatenate([v, where], 2))),
            np.tanh(dense(of + "fusion.language", q)),
        )
        # two heads, one behind the other on the last axis
        X = unit(np.tanh(seen[..., :8] * said[:8] + seen[..., 8:] * said[8:]))
        key = dense(of + "graph.place", X).reshape(16, 8)
        A = np.stack(
            [p[2] * (key @ dense(of + "graph.word", t)) / math.sqrt(8) for p, t in zip(shares, w)], axis=1
        )
        P, Q = np.stack([softmax(row) for row in A]), np.stack([softmax(column) for column in A.T], axis=1)
        G = joint(of + "graph.norm1", ((P @ Q.T) @ X.reshape(16, 8)).reshape(4, 4, 8))
        R = unit(relu(joint(of + "graph.norm2", dense(of + "graph.out", relu(X + G)))))
        y = relu(dense(of + "mix", np.concatenate([X, R, tile(q), where], 2)))
        maps.append(y), ps.append(P), qs.append(Q), scores.append(conv3(of + "score", y))
    for n in range(2):
        new = []
        for i in range(3):
            of = f"exchange.rounds.{n}.{i}."
            look = softmax((dense(of + "key", maps[i]) @ dense(of + "query", s) / math.sqrt(4)).ravel())
            context = unit(dense(of + "context", np.concatenate([look @ maps[i].reshape(16, 4), s])))
            total = maps[i].copy()
            for k, j in enumerate([j for j in range(3) if j != i]):
                total += relu(dense(f"{of}features.{k}", maps[j])) * sigmoid(dense(f"{of}gates.{k}", context))
            new.append(unit(total))
        maps = new
    of, h, c = "exchange.fuse.", np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
    for x in maps:
        j, i, f, o = np.split(np.concatenate([x, h], axis=2) @ a[of + "kernel"][0, 0], 4, axis=2)
        j, i, f = (
            joint(of + "norms.0", j),
            joint(of + "norms.1", i + a[of + "w_ci"] * c),
            joint(of + "norms.2", f + a[of + "w_cf"] * c),
        )
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
        o, c = joint(of + "norms.3", o + a[of + "w_co"] * c), joint(of + "norms.4", c)
        h = sigmoid(o) * np.tanh(c)
    return [legacy(m, TINY.factor) for m in (conv3("score", h), *scores)], np.stack(shares), ps, qs


def legacy(m, factor):
    "TensorFlow 1: pixel n is read at n / factor."
    n = len(m)
    out = np.zeros((n * factor, n * factor))
    for y, x in itertools.product(range(n * factor), repeat=2):
        (y0, fy), (x0, fx) = divmod(y, factor), divmod(x, factor)
        y1, x1, fy, fx = min(y0 + 1, n - 1), min(x0 + 1, n - 1), fy / factor, fx / factor
        out[y, x] = (1 - fy) * ((1 - fx) * m[y0, x0] + fx * m[y0, x1]) + fy * (
            (1 - fx) * m[y1, x0] + fx * m[y1, x1]
        )
    return out


PHRASES, OF = [[3, 1, 4, 1], [5, 9], [2, 6, 5, 3, 7], [8]], [1, 0, 1, 0]


def padded(phrases=PHRASES):
    return nn.utils.rnn.pad_sequence([torch.tensor(p) for p in phrases], batch_first=True)


def test_the_model_is_what_loops_over_tensorflow_s_arrays_give():
    arrays = published_arrays()
    model, raw = loaded(arrays), random_levels()
    with torch.no_grad():
        logits, attention = model.segment(model.adapt(raw), padded(), torch.tensor(OF), return_attention=True)
    for b, (numbers, k) in enumerate(zip(PHRASES, OF)):
        (want, *_), shares, ps, qs = naive(arrays, [level[k] for level in raw], numbers)
        torch.testing.assert_close(logits[b], torch.tensor(want), atol=1e-8, rtol=1e-6)
        own = attention.expression(b)
        assert own.types.shape[1] == len(numbers)
        torch.testing.assert_close(own.types[0], torch.tensor(shares))
        for level, p, q in zip((2, 3, 4), ps, qs):
            torch.testing.assert_close(own.to_words[level][0], torch.tensor(p))
            torch.testing.assert_close(own.to_places[level][0], torch.tensor(q))
            torch.testing.assert_close(own.affinity(level)[0], torch.tensor(p @ q.T))
            torch.testing.assert_close(own.places(level)[0], torch.tensor(q.T.reshape(-1, 4, 4)))
    assert (attention.types[1, 2:] == 0).all() and (attention.to_words[3][1, :, 2:] == 0).all()


def test_losses_are_the_weighted_entropies_of_the_answer_and_the_levels():
    arrays = published_arrays()
    model, raw, targets = loaded(arrays), random_levels(), torch.rand(2, 12, 12, dtype=torch.double)
    with torch.no_grad():
        got = model.losses(model.adapt(raw), padded(PHRASES[:2]), torch.tensor(OF[:2]), targets)
        other = model.losses(
            model.adapt(raw),
            padded(PHRASES[:2]),
            torch.tensor(OF[:2]),
            targets,
            mask_loss=lambda y, t: (y - t).sum(),
        )
    maps = [naive(arrays, [level[k] for level in raw], numbers)[0] for numbers, k in zip(PHRASES[:2], OF[:2])]
    answer, *levels = (torch.tensor(np.stack(m), dtype=torch.double) for m in zip(*maps))
    entropy = lambda y: -(targets * y.sigmoid().log() + (1 - targets) * (1 - y.sigmoid()).log()).mean()
    assert float(got["mask"]) == pytest.approx(0.7 * float(entropy(answer)), rel=1e-5)
    assert float(got["levels"]) == pytest.approx(0.1 * sum(float(entropy(y)) for y in levels), rel=1e-5)
    assert float(other["mask"]) == pytest.approx(0.7 * float((answer - targets).sum()), rel=1e-5)


# ---- published weights


def test_every_published_array_is_used_once_and_every_key_is_filled():
    arrays = published_arrays()
    state, report = load_published({k: a.numpy() for k, a in arrays.items()}, V, TINY)
    own = {k: v for k, v in CMPC(TINY, V).state_dict().items() if not k.startswith("backbone.")}
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()} and set(
        report
    ) == set(own)
    assert set(itertools.chain(*report.values())) == set(arrays)
    # the constant forget bias
    assert (
        sum(v.numel() for v in state.values()) == sum(a.numel() for a in arrays.values()) + 4 * TINY.channels
    )
    assert report["reader.encoder.lstm.bias_hh_l0"] == []


def test_what_does_not_fit_the_published_layout_is_named():
    arrays = published_arrays()
    with pytest.raises(ValueError, match=r"1 missing keys \(exchange.fuse.w_cf\)"):
        load_published({k: a for k, a in arrays.items() if k != "exchange.fuse.w_cf"}, V, TINY)
    with pytest.raises(ValueError, match=r"1 unknown keys \(global_step\)"):
        load_published(arrays | {"global_step": torch.zeros(1)}, V, TINY)
    with pytest.raises(
        ValueError, match=r"wrong shapes \(score.kernel \[1, 4, 3, 3\] instead of \[3, 3, 4, 1\]"
    ):
        load_published(arrays | {"score.kernel": arrays["score.kernel"].permute(3, 2, 0, 1)}, V, TINY)
    with pytest.raises(ValueError, match="embedding"):
        load_published(arrays, V + 1, TINY)


def test_peepholes_are_interpolated_to_another_grid():
    arrays = published_arrays()
    state, _ = load_published(arrays, V, TINY, grid=7)
    model = CMPC(replace(TINY, grid=7), V)
    assert not model.load_state_dict(state, strict=False)[1]
    row = torch.arange(4.0).expand(4, 4)
    flat = load_published(
        arrays | {"exchange.fuse.w_ci": row[..., None].expand(4, 4, 4).double()}, V, TINY, grid=8
    )[0]["exchange.fuse.peepholes"]
    torch.testing.assert_close(
        flat[0, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).double()
    )


def test_the_published_layout_holds_the_published_number_of_weights():
    assert sum(math.prod(s) for s in published_layout().values()) == 76_055_608
    assert sum(math.prod(s) for s in published_layout(8_803).values()) == 75_062_908


# ---- counts


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return create_model("cmpc", "published", vocab_size=12_112, backbone_weights="none")


def test_parameters_of_every_part(published):
    counts = count_parameters(published, trained=True)
    assert counts == {
        "word vectors": 3_633_600,
        "LSTM": 5_204_000,
        "parser": 502_504,
        "laterals": 3_587_000,
        "MUTAN": 3 * 10_050_000,
        "graph": 3 * 3_007_000,  # fmt: skip
        "mix": 3 * 1_504_500,
        "scores": 18_004,
        "exchange": 6 * 2_503_500,
        "ConvLSTM": 4_405_000,
        "total": 76_055_608,
    }
    trained, frozen = (
        sum(p.numel() for p in published.parameters() if p.requires_grad is flag) for flag in (True, False)
    )
    # PyTorch's second LSTM bias: the constant forget bias
    assert trained == counts["total"] and frozen == 42_500_160 + 4_000
    assert trained + 42_500_160 == 118_555_768
    assert (
        0.25e6
        < count_parameters(create_model("cmpc", vocab_size=80, backbone_weights="none"))["total"]
        < 0.35e6
    )


def test_operations_by_hand():
    n, t, c, d = 16, 20, 8, 4
    flops = {k: round(x * 1e9) for k, x in count_flops(TINY, words=20).items()}
    assert (
        flops["MUTAN, picture"] == 3 * 2 * n * (c + 8) * 2 * c and flops["MUTAN, words"] == 3 * 2 * c * 2 * c
    )
    # at the levels' own sizes: 8, 4 and 2 places a side
    assert flops["laterals"] == 2 * c * (48 * 64 + 96 * 16 + 160 * 4)
    # keys, W_x^T k; scores, gather, hand out; W_h
    assert flops["graph"] == 3 * 2 * (2 * t * c * c + 3 * n * t * c + n * c * c)
    assert flops["mix"] == 3 * 2 * (n * 2 * c * d + c * d + n * 8 * d) and flops["score"] == 2 * 9 * d * n
    assert flops["ConvLSTM"] == 2 * 5 * n * d * 4 * d
    assert set(flops) == {
        "backbone",
        "laterals",
        "MUTAN, picture",
        "words",
        "MUTAN, words",
        "graph",
        "mix",
        "exchange",
        "ConvLSTM",
        "score",
    }


def test_only_convolutions_are_decayed(published):
    decayed, free = ({id(p) for p in g["params"]} for g in published.parameter_groups())
    assert [g["weight_decay"] for g in published.parameter_groups(0.5)] == [0.5, 0.0] and not decayed & free
    assert decayed | free == {id(p) for p in published.parameters() if p.requires_grad}
    names = {name for name, p in published.named_parameters() if id(p) in decayed}
    assert all(
        name.endswith("weight")
        and "norm" not in name
        and "embedding" not in name
        and "lstm" not in name
        and "fuse" not in name
        for name in names
    )
    layout = {name.replace(".kernel", ".weight") for name in published_layout() if name.endswith(".kernel")}
    assert names == {n for n in layout if n not in ("reader.encoder.lstm.weight", "exchange.fuse.weight")}
    assert (
        CMPC_RECIPES["published"].weight_decay == pytest.approx(4.9e-9, rel=0.01)
        and CMPC_RECIPES["published"].protocol in PROTOCOLS
    )


# ---- what it may depend on


def test_entities_and_attributes_cannot_be_told_apart():
    model, raw = loaded(published_arrays()), random_levels()
    run = lambda: model.segment(model.adapt(raw), padded(), torch.tensor(OF)).detach()
    before, last = run(), model.reader.parser[2]
    with torch.no_grad():
        for p in (last.weight, last.bias):
            p.copy_(p[[1, 0, 2, 3]])
        torch.testing.assert_close(run(), before)
        for p in (last.weight, last.bias):
            p.copy_(p[[0, 2, 1, 3]])
        assert (run() - before).abs().max() > 1e-3


def test_padding_and_company_change_nothing():
    model, raw = loaded(published_arrays()), random_levels()
    with torch.no_grad():
        features = model.adapt(raw)
        together = model.segment(features, F.pad(padded(), (0, 3)), torch.tensor(OF))
        alone = [
            model.segment([f[k : k + 1] for f in features], torch.tensor([p])) for p, k in zip(PHRASES, OF)
        ]
    torch.testing.assert_close(torch.cat(alone), together)


def test_without_relations_every_place_gets_the_average():
    graph, x, w = (
        RelationGraph(8).double(),
        torch.randn(2, 8, 3, 5, dtype=torch.double),
        torch.randn(2, 4, 8, dtype=torch.double),
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    _, p, q = graph(x, w, mask, torch.zeros(2, 4, dtype=torch.double))
    torch.testing.assert_close(p @ q.transpose(1, 2), torch.full((2, 15, 15), 1 / 15, dtype=torch.double))
    assert (p[1, :, 2:] == 0).all() and torch.allclose(p[1, :, :2], torch.tensor(0.5).double())


def test_a_phrase_s_first_words_do_not_know_its_last():
    reader = WordReader(V, 8, 6)
    with torch.no_grad():
        long, short = reader(torch.tensor([[3, 4, 5, 6]])), reader(torch.tensor([[3, 4]]))
    torch.testing.assert_close(long.words[:, :2], short.words)
    torch.testing.assert_close(long.types[:, :2], short.types)
    assert torch.allclose(long.words.norm(dim=2), torch.ones(1, 4)) and torch.allclose(
        long.types.sum(2), torch.ones(1, 4)
    )
    constant = reader.encoder.lstm.bias_hh_l0  # PyTorch's gates: i, f, g, o
    assert constant.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16 and not constant.requires_grad


def test_every_trained_weight_gets_a_gradient_and_the_frozen_ones_none():
    model = CMPC(TINY, V)
    with torch.no_grad():
        model.exchange.fuse.peepholes.normal_()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    sum(
        model.losses(model.encode(images), padded(), torch.tensor(OF), torch.rand(4, 12, 12)).values()
    ).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.grad is None and name.startswith(("backbone.", "reader.encoder.lstm.bias_hh")), name


# ---- parts


@pytest.mark.parametrize("height, width", [(3, 5), (4, 4), (1, 2)])
def test_coordinates(height, width):
    where = coordinates(height, width)
    for y, x in itertools.product(range(height), range(width)):
        edges = [2 * x / width - 1, 2 * y / height - 1, 2 * (x + 1) / width - 1, 2 * (y + 1) / height - 1]
        want = torch.tensor(
            [*edges, (edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2, 1 / width, 1 / height]
        )
        torch.testing.assert_close(where[:, y, x], want, atol=1e-6, rtol=0)


def test_enlarge_both_ways():
    m = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(
        enlarge(m, 8, True)[1, 0], torch.tensor(legacy(m[1, 0].numpy(), 8)).float(), atol=1e-5, rtol=1e-5
    )
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    torch.testing.assert_close(enlarge(ramp, 2)[0, 0, 3, 1:-1], torch.arange(8) / 2 + 0.25)
    torch.testing.assert_close(enlarge(ramp, 2, True)[0, 0, 3, :9], torch.arange(9) / 2)


@pytest.mark.parametrize(
    "size, kernel, stride, want",
    [(320, 7, 2, (2, 3)), (160, 3, 2, (0, 1)), (321, 7, 2, (3, 3)), (7, 3, 2, (1, 1)), (8, 1, 2, (0, 0))],
)
def test_padding_same(size, kernel, stride, want):
    row = pad_same(torch.ones(1, 1, 2, size), kernel, stride)[0, 0].amax(0)
    assert (int(row.argmax()), int(row.flip(0).argmax())) == want
    assert (len(row) - kernel) // stride + 1 == math.ceil(size / stride)


def test_deeplab_resnet_is_laid_out_as_caffe_s():
    with torch.device("meta"):
        net = DeepLabResNet()
    strided = [
        (name, m.kernel_size)
        for name, m in net.body.named_modules()
        if isinstance(m, nn.Conv2d) and m.stride == (2, 2)
    ]
    assert strided == [("conv1", (7, 7)), ("layer2.0.conv1", (1, 1)), ("layer2.0.downsample.0", (1, 1))]
    rates = {
        layer: {b.conv2.dilation for b in getattr(net.body, layer)}
        for layer in ("layer1", "layer2", "layer3", "layer4")
    }
    assert rates == {"layer1": {(1, 1)}, "layer2": {(1, 1)}, "layer3": {(2, 2)}, "layer4": {(4, 4)}}
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3} and net.strides == (
        8,
        8,
        8,
    )


def test_deeplab_resnet_s_first_layer_sees_blue_green_red_less_their_means():
    net, seen = DeepLabResNet().freeze(), []
    net.body.bn1.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net.body.layer1 = nn.Identity()
    for name in ("layer2", "layer3", "layer4"):
        setattr(net.body, name, nn.Identity())
    image = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    with torch.no_grad():
        levels = net(image)
    x = np.zeros((17, 17, 3))
    # two before, three after
    x[2:14, 2:14] = image[0].permute(1, 2, 0).numpy()[..., ::-1] - np.array([104.007, 116.669, 122.679])
    kernel = net.body.conv1.weight.permute(2, 3, 1, 0).numpy()
    want = np.stack(
        [
            np.stack(
                [np.einsum("ijc,ijco->o", x[2 * y : 2 * y + 7, 2 * z : 2 * z + 7], kernel) for z in range(6)]
            )
            for y in range(6)
        ]
    )
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), want, atol=1e-3)
    assert levels[0].shape == (1, 64, 3, 3)


def test_backbone_weights_from_a_file(tmp_path):
    with torch.device("meta"):
        layout = DeepLabResNet().body.state_dict()
    # a byte or four each on the disk
    state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in layout.items()}
    state["conv1.weight"] = torch.tensor(7.0).expand(64, 3, 7, 7)
    torch.save(state, tmp_path / "resnet.pt")
    net = deeplab_backbone(str(tmp_path / "resnet.pt"))
    assert net.frozen and (net.body.conv1.weight == 7).all() and (net.body.layer4[2].conv3.weight == 0).all()
    torch.save(state | {"odd": torch.zeros(1)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd.pt: .*unknown keys \(odd\)"):
        deeplab_backbone(str(tmp_path / "odd.pt"))


# ---- as a model of the package


def test_other_backbones_come_at_stride_8():
    with torch.device("meta"):
        model = create_model(
            "cmpc", "published", vocab_size=5, backbone="deeplabv3plus-resnet101", backbone_weights="none"
        )
        assert [tuple(v.shape[2:]) for v in model.backbone(torch.empty(1, 3, 320, 320))] == [(40, 40)] * 3
        assert model(torch.empty(1, 3, 320, 320), torch.ones(1, 20, dtype=torch.long)).shape == (1, 320, 320)


def test_word_vectors_give_the_table_and_its_size():
    vectors = torch.randn(7, 5)
    model = create_model("cmpc", vectors=vectors, backbone_weights="none", train_words=False)
    assert (
        torch.equal(model.reader.encoder.embedding.weight[1:], vectors[1:])
        and not model.reader.encoder.embedding.weight.requires_grad
    )
    assert count_parameters(model, trained=True)["word vectors"] == 0


def test_a_configuration_survives_json_and_names_what_is_wrong():
    for config in CMPC_PRESETS.values():
        assert CMPCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="CMPCConfig has no field 'chanels'"):
        CMPCConfig.from_dict({"chanels": 3})
    with pytest.raises(ValueError, match="no backbone called 'vgg'"):
        CMPCConfig(backbone="vgg")
    with pytest.raises(ValueError, match="auxiliary"):
        CMPCConfig(auxiliary=0.4)
    with pytest.raises(ValueError, match="no preset called 'paper'; there are published, refshapes"):
        create_model("cmpc", "paper", vocab_size=3)
    with pytest.raises(ValueError, match="vocab_size is needed"):
        create_model("cmpc")
    with pytest.raises(FileNotFoundError, match="deeplab_resnet_init.ckpt"):
        create_model("cmpc", "published", vocab_size=3)


def test_which_image_must_be_said():
    model, raw = loaded(published_arrays()), random_levels(2)
    with torch.no_grad():
        features = model.adapt(raw)
        with pytest.raises(ValueError, match="2 images and 4 expressions: image_index must say"):
            model.segment(features, padded())
        each = model.segment(features, padded(PHRASES[:2]))
        torch.testing.assert_close(each, model.segment(features, padded(PHRASES[:2]), torch.tensor([0, 1])))
        one = model.segment([f[:1] for f in features], padded())
        torch.testing.assert_close(one, model.segment(features, padded(), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="peepholes were made for"):
        model.exchange.fuse([torch.zeros(1, 4, 5, 4)] * 3)


def test_half_precision_on_a_cpu_gives_finite_gradients_everywhere():
    model = create_model("cmpc", vocab_size=V)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(model.encode(images), padded(), torch.tensor(OF), torch.rand(4, 32, 32))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        whole = model.losses(model.encode(images), padded(), torch.tensor(OF), torch.rand(4, 32, 32))
    assert all(losses[name].item() == pytest.approx(float(x), rel=0.1) for name, x in whole.items())


def test_it_survives_saving(tmp_path):
    vocabulary = Vocabulary.build(["the second smallest ball", "boat closest to the green boat"])
    model = create_model("cmpc", vocab_size=len(vocabulary)).eval()
    save_model(tmp_path / "m", model, vocabulary, {"model": "cmpc"})
    make = lambda stored: (CMPC(CMPCConfig.from_dict(stored["config"]), len(vocabulary)), vocabulary)
    again, _, meta = load_model(tmp_path / "m", make)
    images, words = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8), torch.tensor([[2, 3, 4, 0]])
    with torch.no_grad():
        torch.testing.assert_close(again(images, words), model(images, words))
    assert meta["model"] == "cmpc" and meta["image_size"] == 96


def test_the_learner_trains_it(tiny_root, tmp_path):
    from refseg_nb.training.config import TrainConfig
    from refseg_nb.training.learner import train

    vocabulary = vocabulary_for(Refer(tiny_root, "refshapes"))
    model = create_model("cmpc", vocab_size=len(vocabulary))
    before = model.score.weight.detach().clone()
    sizes = dict(limit=2, images_per_batch=1, expressions_per_image=2, max_steps=2)
    result = train(
        TrainConfig(root=tiny_root, val_split=None, device="cpu", out=tmp_path / "run", quiet=True, **sizes),
        model=model,
    )
    assert result.steps == 2 and (result.model.score.weight - before).abs().max() > 1e-5


def test_it_learns_two_scenes_by_heart(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    vocabulary = vocabulary_for(refer)
    data = RISDataset(refer, "val", vocabulary, target_size=32)
    ids = [i for i, _ in data.groups[:2]]
    which = [[k for k, s in enumerate(data.samples) if s.image_id == i][:2] for i in ids]
    index = torch.tensor([k for k, rows in enumerate(which) for _ in rows])
    rows = which[0] + which[1]
    words, target = data.words[rows], torch.stack([data.target(data.samples[k].ann_id) for k in rows]).float()
    # less work than the preset's
    model = create_model("cmpc", vocab_size=len(vocabulary), channels=48, fused=32, heads=2)
    raw = model.backbone(torch.stack([data.image(i) for i in ids]))
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), 2e-3)
    for _ in range(30):
        loss = sum(model.losses(model.adapt(raw), words, index, target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval().segment(model.adapt(raw), words, index) > 0
    iou = (found & (target > 0.5)).sum((1, 2)) / (found | (target > 0.5)).sum((1, 2))
    assert iou.mean() > 0.7, iou


@pytest.mark.slow
def test_a_training_step_at_the_published_size():
    model = create_model("cmpc", "published", vocab_size=12_112, backbone_weights="none")
    optimizer = torch.optim.Adam(model.parameter_groups(), CMPC_RECIPES["published"].lr)
    words, targets = torch.randint(1, 12_112, (1, 20)), torch.zeros(1, 320, 320)
    targets[:, 100:200, 50:150] = 1
    features = model.encode(torch.randint(0, 256, (1, 3, 320, 320), dtype=torch.uint8))
    sum(model.losses(features, words, None, targets).values()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) if p.requires_grad else p.grad is None, name
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
