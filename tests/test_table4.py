"""Table 4's modules as SHNet's authors ran them, against loops written from the description of their program;
and what the names of rows, configurations and experiments stand for."""

import itertools
import math

import pytest
import torch

from refseg_nb.models.aggregation import (
    AGGREGATIONS,
    ReleasedGBFM,
    ReleasedMGATE,
    ReleasedTGFE,
)
from refseg_nb.models.registry import create_model, list_models, registered
from refseg_nb.models.shnet import TABLE4, TABLE4_OWN, model_name
from refseg_nb.reproduce import experiments as E

B, C, H, W = 2, 3, 4, 5
SPOTS = list(itertools.product(range(H), range(W)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(b=B, h=H, w=W, c=C):
    "Maps of three levels and their averaged words, in double precision."
    maps = [torch.randn(b, c, h, w, dtype=torch.double) for _ in range(3)]
    return maps, [torch.randn(b, c, dtype=torch.double) for _ in range(3)]


def made(kind, c=C):
    "A module whose weights are not small."
    module = kind(c).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return module


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def conv3(x, layer):
    "A 3x3 convolution of one map [I, H, W], tap by tap."
    weight, (h, w) = layer.weight, x.shape[1:]
    out = layer.bias[:, None, None].repeat(1, h, w).clone()
    for y, z, dy, dz in itertools.product(range(h), range(w), range(3), range(3)):
        if 0 <= y + dy - 1 < h and 0 <= z + dz - 1 < w:
            out[:, y, z] += weight[:, :, dy, dz] @ x[:, y + dy - 1, z + dz - 1]
    return out


def matrix(layer):
    return layer.weight.reshape(len(layer.weight), -1)


# ---- the modules, one image at a time


def mgate(m, maps, words):
    "A cell a level: one convolution gives i, f, r; the two others enter with .5 each; the outputs are summed."
    total = torch.zeros(C, H, W, dtype=torch.double)
    for own, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        sums = conv3(maps[own], m.cells[own])
        for c, (y, x) in itertools.product(range(C), SPOTS):
            i, f, r = (float(sums[part * C + c, y, x]) for part in range(3))
            f, r = sigmoid(f + 1), sigmoid(r + 1)
            memory = 0.5 * f * maps[a][c, y, x] + 0.5 * f * maps[b][c, y, x] + (1 - f) * i
            total[c, y, x] += r * torch.tanh(memory) + (1 - r) * maps[own][c, y, x]
    return total


def tgfe(m, maps, words):
    "Two rounds with the same weights; no square root of C; the maps are summed."
    for _ in range(2):
        new = []
        for a in range(3):
            x, l = maps[a], words[a]
            asks = (m.ask.weight @ l + m.ask.bias).relu()
            looks = [float((matrix(m.look) @ x[:, y, z] + m.look.bias).relu() @ asks) for y, z in SPOTS]
            shares = [math.exp(k - max(looks)) for k in looks]
            pooled = sum(k / sum(shares) * x[:, y, z] for k, (y, z) in zip(shares, SPOTS))
            s = (m.join.weight @ torch.cat([pooled, l]) + m.join.bias).relu()
            s = s / math.sqrt(float(s @ s))
            gate = m.gate.weight @ s + m.gate.bias
            out = x.clone()
            for b in (b for b in range(3) if b != a):
                for y, z in SPOTS:
                    taken = (matrix(m.take) @ maps[b][:, y, z] + m.take.bias).relu()
                    out[:, y, z] += taken * torch.tensor(
                        [sigmoid(float(g)) for g in gate], dtype=torch.double
                    )
            for y, z in SPOTS:
                out[:, y, z] /= math.sqrt(float(out[:, y, z] @ out[:, y, z]))
            new.append(out)
        maps = new
    return maps[0] + maps[1] + maps[2]


def gbfm(m, maps, words):
    "Words first; two folded paths through one gate; a convolution of their sum."

    def at(layer, a, b):
        "A 1x1 convolution of [a ; b] and a ReLU."
        joined = torch.cat([a, b])
        out = torch.zeros(C, H, W, dtype=torch.double)
        for y, z in SPOTS:
            out[:, y, z] = (matrix(layer) @ joined[:, y, z] + layer.bias).relu()
        return out

    def fuse(a, b):
        gate = conv3(at(m.reduce, a, b), m.gate)
        return gate.apply_(sigmoid) * a + b

    m1, m2, m3 = (at(m.mix, x, l[:, None, None].expand(-1, H, W)) for x, l in zip(maps, words))
    left = fuse(fuse(m3, m2), fuse(m2, m1))
    right = fuse(fuse(m1, m2), fuse(m2, m3))
    return conv3(left + right, m.out)


MODULES = {"mgate": (ReleasedMGATE, mgate), "tgfe": (ReleasedTGFE, tgfe), "gbfm": (ReleasedGBFM, gbfm)}
every = pytest.mark.parametrize("name", MODULES)


@every
def test_module_is_the_described_program(name):
    kind, naive = MODULES[name]
    module, (maps, words) = made(kind), inputs()
    with torch.no_grad():
        got = module(maps, words)
        for b in range(B):
            want = naive(module, [x[b] for x in maps], [l[b] for l in words])
            torch.testing.assert_close(got[b], want, atol=1e-9, rtol=1e-9)


@every
def test_every_weight_and_input_has_a_gradient(name):
    module, (maps, words) = made(MODULES[name][0]), inputs()
    leaves = [x.requires_grad_() for x in (*maps, *words)]
    assert torch.autograd.gradcheck(
        lambda *x: module(list(x[:3]), list(x[3:])), leaves, fast_mode=True, atol=1e-4
    )
    module(maps, words).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    heard = [l.grad is not None and bool(l.grad.abs().sum() > 0) for l in words]
    assert all(x.grad.abs().sum() > 0 for x in maps) and heard == [name != "mgate"] * 3


@every
def test_parameters_and_shared_weights(name):
    formula = {
        "mgate": lambda c: 3 * (27 * c * c + 3 * c),  # a cell a level
        "tgfe": lambda c: 4 * (c * c + c) + 2 * c * c + c,  # five matrices, for all levels and rounds
        "gbfm": lambda c: 2 * (2 * c * c + c) + 2 * (9 * c * c + c),
    }
    for c in (4, 512):
        with torch.device("meta"):
            count = sum(p.numel() for p in MODULES[name][0](c).parameters())
        assert count == formula[name](c)


@every
def test_gates_are_part_of_the_answer(name):
    module, (maps, words) = made(MODULES[name][0]), inputs()
    with torch.no_grad():
        plain, (again, gates) = module(maps, words), module(maps, words, return_gates=True)
    shape = (B, C) if name == "tgfe" else (B, C, H, W)
    assert torch.equal(plain, again) and len(gates) == 6
    assert all(g.shape == shape and 0 < g.min() and g.max() < 1 for g in gates.values())


@pytest.mark.parametrize("name, side", [("mgate", 3), ("tgfe", 11), ("gbfm", 7)])
def test_reach(name, side):
    module, (maps, words) = made(MODULES[name][0], 16), inputs(1, 11, 11, 16)
    for level in range(3):
        other = [x.clone() for x in maps]
        other[level][..., 5, 5] += 1
        with torch.no_grad():
            changed = (module(maps, words) - module(other, words)).abs().amax(1)[0] > 1e-12
        half = side // 2
        assert changed.sum() == side * side and changed[5 - half : 6 + half, 5 - half : 6 + half].all()


def test_mgate_s_gates_begin_open_by_one():
    module, (maps, _) = ReleasedMGATE(C).double(), inputs()
    with torch.no_grad():
        for cell in module.cells:
            cell.weight.zero_(), cell.bias.zero_()
        _, gates = module(maps, return_gates=True)
    assert all(torch.allclose(g, torch.full_like(g, sigmoid(1))) for g in gates.values())


# ---- what the names stand for


def test_table_4_is_what_its_authors_ran_and_the_papers_own_modules_keep_their_names():
    for name in ("MGATE", "TGFE", "GBFM"):
        slug = name.lower()
        assert model_name(name) == TABLE4[name]["level_fusion"] == f"{slug}-released"
        own = next(row for row in TABLE4_OWN if row.startswith(name))
        assert model_name(own) == TABLE4_OWN[own]["level_fusion"] == slug
        assert registered(slug).title == own and registered(f"{slug}-released").title == name
        # a stored model or record with "mgate" is the module that it was before
        for registered_as in (slug, f"{slug}-released"):
            model = create_model(registered_as, vocab_size=9, backbone_weights="none")
            assert (
                type(model.levels) is AGGREGATIONS[registered_as]
                and model.config.level_fusion == registered_as
            )
    assert {*map(model_name, (*TABLE4, *TABLE4_OWN))} <= set(list_models()) and model_name("HCAM") == "hcam"


def test_no_record_of_the_papers_own_modules_stands_in_table_4():
    tables, experiments = E.tables(), E.experiments()
    cells = [c for row in tables["table4"].rows.values() for c in row]
    read = {experiments[c.experiment].model for c in cells}
    assert read == {"shnet", "mgate-released", "tgfe-released", "gbfm-released"}
    own = tables["table4+"]
    assert list(own.rows) == [*TABLE4_OWN, "HCAM"]
    for row in TABLE4_OWN:
        low, high = own.rows[row]
        assert (low.experiment, high.experiment) == (model_name(row), f"{model_name(row)}-high")
        assert low.paper is None and high.paper is None  # the paper has no number for these
    assert set(E.wanted("table4")) >= {"mgate", "mgate-released", "gbfm-released-high"}


@pytest.mark.parametrize("name", ["mgate", "tgfe", "gbfm"])
def test_the_whole_model_hands_over_maps_and_words_and_learns(name):
    small = dict(
        channels=16, grid=6, word_dim=8, sfm_heads=2, sfm_ffn=24, decoder_widths=(12, 8), image_size=48
    )
    model = create_model(f"{name}-released", vocab_size=20, backbone_weights="none", **small)
    images, words = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8), torch.randint(1, 20, (2, 5))
    model.eval()
    with torch.no_grad():
        features = model.encode(images)
        visual, language, _ = model.fuse(features, model.text(words))
        want = model.decoder(model.aspp(MODULES[name][0].forward(model.levels, visual, language)))
        torch.testing.assert_close(model.segment(features, words), want)
    sum(model.train().losses(features, words, None, torch.rand(2, 24, 24)).values()).backward()
    assert all(p.grad is not None for p in model.levels.parameters())
