"""The aggregations that can stand in HCAM's place, against loops written from their equations, in
closed-form cases, and as rows of Tables 2 and 4."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from refseg_nb.data.words import Vocabulary
from refseg_nb.inference.segmenter import load
from refseg_nb.models.aggregation import AGGREGATIONS, GBFM, MGATE, TGFE, ConvLSTMLevels, Exchange
from refseg_nb.models.backbones import create_backbone
from refseg_nb.models.cost import count_flops, count_parameters
from refseg_nb.models.decoder import ConcatLevels
from refseg_nb.models.hcam import HCAM, Conv3dLevels
from refseg_nb.models.hub import load_model, save_model
from refseg_nb.models.registry import create_model, list_models, registered
from refseg_nb.models.shnet import ABLATIONS, PRESETS, TABLE4, TABLE4_OWN, SHNet, SHNetConfig, model_name
from refseg_nb.reproduce.experiments import PAPER, ROWS

NAMES = ["convlstm", "gbfm", "mgate", "tgfe"]  # test_table4 has those that were run for Table 4
every = pytest.mark.parametrize("name", NAMES)
C = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(b=2, c=C, h=4, w=5, grad=False):
    "Three maps and three language vectors, in double precision."
    visual = [torch.randn(b, c, h, w, dtype=torch.double, requires_grad=grad) for _ in range(3)]
    return visual, [torch.randn(b, c, dtype=torch.double, requires_grad=grad) for _ in range(3)]


def made(name, c=C):
    """A module in double precision with weights that are not small, so that no gate is near one half
    everywhere."""
    module = AGGREGATIONS[name](c).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return module


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def conv(x, weight, bias=None):
    """A convolution of one map [I, H, W] that keeps its size, tap by tap: a list of lists of lists of
    numbers, [O][H][W]."""
    o, i, k, _ = weight.shape
    _, h, w = x.shape
    out = torch.zeros(o, h, w, dtype=torch.double)
    for n, y, z in itertools.product(range(o), range(h), range(w)):
        total = 0.0 if bias is None else bias[n].item()
        for dy, dz in itertools.product(range(k), range(k)):
            row, column = y + dy - k // 2, z + dz - k // 2
            if 0 <= row < h and 0 <= column < w:
                total += (weight[n, :, dy, dz] * x[:, row, column]).sum().item()
        out[n, y, z] = total
    return out


# ---- against loops


def naive_convlstm(module, maps):
    "One picture's levels [C, H, W], number by number."
    c, h, w = maps[0].shape
    state, memory = torch.zeros(c, h, w, dtype=torch.double), torch.zeros(c, h, w, dtype=torch.double)
    for x in maps:
        sums = conv(x, module.input.weight, module.input.bias) + conv(state, module.state.weight)
        new_state, new_memory = torch.zeros_like(state), torch.zeros_like(memory)
        for k, y, z in itertools.product(range(c), range(h), range(w)):
            i, f, g, o = (sums[part * c + k, y, z].item() for part in range(4))
            m = sigmoid(f) * memory[k, y, z].item() + sigmoid(i) * math.tanh(g)
            new_memory[k, y, z], new_state[k, y, z] = m, sigmoid(o) * math.tanh(m)
        state, memory = new_state, new_memory
    return state


def naive_mgate(module, maps):
    c, h, w = maps[0].shape
    sums = [conv(x, gate.weight, gate.bias) for x, gate in zip(maps, module.gates)]
    out = torch.zeros(c, h, w, dtype=torch.double)
    for k, y, z, i in itertools.product(range(c), range(h), range(w), range(3)):
        m = [sigmoid(s[0, y, z].item()) for s in sums]
        r = sigmoid(sums[i][1, y, z].item())
        g = (1 - m[i]) * maps[i][k, y, z].item()
        for j in range(3):
            if j != i:
                g += module.gamma[j].item() * m[j] * maps[j][k, y, z].item()
        out[k, y, z] += r * math.tanh(g) + (1 - r) * maps[i][k, y, z].item()
    return out


def naive_exchange(module, own, others, sentence):
    "One level's part: place by place and channel by channel."
    c, h, w = own.shape
    places = list(itertools.product(range(h), range(w)))
    key, query = (
        conv(own, module.key.weight, module.key.bias),
        module.query.weight @ sentence + module.query.bias,
    )
    scores = [
        math.exp(sum((key[k, y, z] * query[k]).item() for k in range(c)) / math.sqrt(c)) for y, z in places
    ]
    summary = [
        sum(a / sum(scores) * own[k, y, z].item() for a, (y, z) in zip(scores, places)) for k in range(c)
    ]
    context = (
        module.context.weight @ torch.cat([sentence, sentence.new_tensor(summary)]) + module.context.bias
    )
    context = context / math.sqrt((context**2).sum().item())
    out = own.clone()
    for j in range(2):
        gate, feature = (
            module.gates[j].weight @ context + module.gates[j].bias,
            conv(others[j], module.features[j].weight, module.features[j].bias),
        )
        for k, (y, z) in itertools.product(range(c), places):
            out[k, y, z] += sigmoid(gate[k].item()) * max(0.0, feature[k, y, z].item())
    for y, z in places:
        out[:, y, z] /= math.sqrt(sum(out[k, y, z].item() ** 2 for k in range(c)))
    return out


def naive_tgfe(module, maps, sentences):
    for round_ in module.rounds:
        maps = [
            naive_exchange(round_[i], maps[i], [maps[j] for j in range(3) if j != i], sentences[i])
            for i in range(3)
        ]
    return naive_convlstm(module.fuse, maps)


def naive_gbfm(module, maps):
    def step(x, path, gate):
        return x + conv(torch.cat([x, path]), gate.weight, gate.bias).sigmoid() * path

    x2, x3, x4 = maps
    return step(x4, step(x3, x2, module.up[0]), module.up[1]) + step(
        x2, step(x3, x4, module.down[0]), module.down[1]
    )


NAIVE = {"convlstm": naive_convlstm, "mgate": naive_mgate, "tgfe": naive_tgfe, "gbfm": naive_gbfm}


@every
def test_module_is_its_equations(name):
    module, (visual, language) = made(name), inputs(h=3, w=4)
    with torch.no_grad():
        got = module(visual, language)
        for b in range(2):
            maps, words = [v[b] for v in visual], [s[b] for s in language]
            want = NAIVE[name](module, maps, words) if name == "tgfe" else NAIVE[name](module, maps)
            torch.testing.assert_close(got[b], want)


def test_exchange_is_its_equations():
    module, (visual, language) = Exchange(C).double(), inputs(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
        new, gates = module(visual[0], visual[1:], language[0])
        torch.testing.assert_close(
            new[0], naive_exchange(module, visual[0][0], [v[0] for v in visual[1:]], language[0][0])
        )
    assert [g.shape for g in gates] == [(1, C)] * 2 and (gates[0] - gates[1]).abs().max() > 1e-3


def test_convlstm_with_a_kernel_of_one_is_torch_s_lstm_at_every_place():
    module, (visual, _) = ConvLSTMLevels(C, kernel=1).double(), inputs()
    lstm = torch.nn.LSTM(C, C, batch_first=True).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(module.input.weight[:, :, 0, 0])
        lstm.weight_hh_l0.copy_(module.state.weight[:, :, 0, 0])
        lstm.bias_ih_l0.copy_(module.input.bias)
        lstm.bias_hh_l0.zero_()
        sequences = torch.stack(visual, 1).permute(0, 3, 4, 1, 2).flatten(0, 2)
        want = lstm(sequences)[0][:, -1].view(2, 4, 5, C).permute(0, 3, 1, 2)
        torch.testing.assert_close(module(visual), want)


# ---- gradients


@every
def test_gradients_are_right_and_reach_every_weight(name):
    module, (visual, language) = AGGREGATIONS[name](4).double(), inputs(2, 4, 4, 4, grad=True)
    leaves = [*visual, *(language if name == "tgfe" else [])]
    assert torch.autograd.gradcheck(lambda *x: module(list(x[:3]), list(x[3:])), leaves, fast_mode=True)
    module(visual, language).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, f"no gradient reaches {key}"
    assert all(x.grad.abs().sum() > 0 for x in leaves)


# ---- closed forms


def fill(convs, bias):
    with torch.no_grad():
        for c in convs:
            c.weight.zero_()
            c.bias.copy_(torch.as_tensor(bias, dtype=torch.double).expand(len(c.bias)))


@pytest.mark.parametrize("memory, reset", itertools.product((-60.0, 0.0, 60.0), repeat=2))
def test_mgate_with_gates_of_one_value(memory, reset):
    module, (x, _) = MGATE(C).double(), inputs()
    fill(module.gates, (memory, reset))
    with torch.no_grad():
        module.gamma.copy_(torch.tensor([0.5, 1.0, 2.0]))
        got = module(x)
    m, r, gamma = sigmoid(memory), sigmoid(reset), (0.5, 1.0, 2.0)
    want = sum(
        r * ((1 - m) * x[i] + m * sum(gamma[j] * x[j] for j in range(3) if j != i)).tanh() + (1 - r) * x[i]
        for i in range(3)
    )
    torch.testing.assert_close(got, want)
    if reset == -60:
        torch.testing.assert_close(got, sum(x))  # the exchange is off


@pytest.mark.parametrize("bias", [-60.0, -1.0, 0.0, 60.0])
def test_gbfm_with_gates_of_one_value(bias):
    module, (x, _) = GBFM(C).double(), inputs()
    fill([*module.up, *module.down], bias)
    g = sigmoid(bias)
    with torch.no_grad():
        torch.testing.assert_close(module(x), (1 + g * g) * (x[0] + x[2]) + 2 * g * x[1])
        torch.testing.assert_close(module([x[0]] * 3), 2 * (1 + g + g * g) * x[0])  # all levels equal


def test_gbfm_is_the_same_from_both_ends():
    module, (x, _) = made("gbfm"), inputs()
    turned = GBFM(C).double()
    turned.up.load_state_dict(module.down.state_dict())
    turned.down.load_state_dict(module.up.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x), turned(x[::-1]))


def test_exchange_with_gates_shut_keeps_directions():
    module, (x, words) = Exchange(C).double(), inputs()
    fill(module.gates, -60.0)
    with torch.no_grad():
        torch.testing.assert_close(module(x[0], x[1:], words[0])[0], x[0] / x[0].norm(dim=1, keepdim=True))
        fill(module.gates, 60.0)
        taken = x[0] + sum(feature(y).relu() for feature, y in zip(module.features, x[1:]))
        torch.testing.assert_close(module(x[0], x[1:], words[0])[0], F.normalize(taken, dim=1))


def test_exchange_without_a_question_summarises_by_the_average():
    module, (x, words) = Exchange(C).double(), inputs()
    with torch.no_grad():
        module.query.weight.zero_()
        module.query.bias.zero_()
        c = F.normalize(module.context(torch.cat([words[0], x[0].mean((2, 3))], 1)), dim=1)
        torch.testing.assert_close(
            module(x[0], x[1:], words[0])[1], [gate(c).sigmoid() for gate in module.gates]
        )


def test_tgfe_treats_equal_levels_equally_and_does_not_see_a_round_s_own_results():
    module, (x, words) = TGFE(C).double(), inputs()
    for round_ in module.rounds:
        for exchange in round_:
            exchange.load_state_dict(round_[0].state_dict())
            exchange.features[1].load_state_dict(exchange.features[0].state_dict())
            exchange.gates[1].load_state_dict(exchange.gates[0].state_dict())
    with torch.no_grad():
        _, gates = module([x[0]] * 3, [words[0]] * 3, return_gates=True)
    for n in (1, 2):
        assert all(torch.allclose(g, gates[n, 2, 3]) for key, g in gates.items() if key[0] == n)
    assert (gates[1, 2, 3] - gates[2, 2, 3]).abs().max() > 1e-9


def test_convlstm_gates_at_their_ends():
    module, (x, _) = ConvLSTMLevels(C).double(), inputs()
    with torch.no_grad():
        module.state.weight.zero_()
        module.input.bias[C : 2 * C] = -1e4  # forget everything: only the last level is left
        i, _, g, o = module.input(x[2]).chunk(4, 1)
        torch.testing.assert_close(module(x), o.sigmoid() * (i.sigmoid() * g.tanh()).tanh())
        module.input.bias[C : 2 * C] = 1e4  # forget nothing: all candidates are summed
        parts = [module.input(v).chunk(4, 1) for v in x]
        torch.testing.assert_close(
            module(x), parts[2][3].sigmoid() * sum(p[0].sigmoid() * p[2].tanh() for p in parts).tanh()
        )
        module.input.bias[:C] = -1e4  # let nothing in
        assert (module(x) == 0).all()


def test_convlstm_forget_gates_start_open_and_the_order_matters():
    module, (x, _) = ConvLSTMLevels(8), inputs()
    assert (module.input.bias[8:16] == 1).all() and module.input.bias[:8].abs().max() < 1
    other = made("convlstm")
    with torch.no_grad():
        assert (other(x) - other(x[::-1])).abs().max() > 1e-2


# ---- what a module sees


def together(name):
    return HCAM(C, "level", norm=False).double() if name == "hcam" else made(name)


@pytest.mark.parametrize("name", [*NAMES, "hcam"])
def test_words_matter_by_construction_or_not_at_all(name):
    module, (x, words) = together(name), inputs()
    with torch.no_grad():
        change = [
            (module(x, words) - module(x, [w + (k == level) for k, w in enumerate(words)])).abs().max()
            for level in range(3)
        ]
    assert all((c > 1e-6) == (name in ("tgfe", "hcam")) for c in change), change
    if name not in ("tgfe", "hcam"):
        assert torch.equal(module(x), module(x, words))


def test_whose_words_move_which_gates():
    x, words = inputs()
    # HCAM: (listener, sender); TGFE: (round, listener, sender)
    for name, want in (("hcam", lambda k: k[1] == 3), ("tgfe", lambda k: k[1] == 3)):
        module = together(name)
        with torch.no_grad():
            _, before = module(x, words, return_gates=True)
            _, after = module(x, [words[0], words[1] + 1, words[2]], return_gates=True)
        assert {k for k in before if not torch.equal(before[k], after[k])} == {
            k for k in before if want(k)
        }, name


SHAPES = {"convlstm": (C, 4, 5), "mgate": (1, 4, 5), "tgfe": (C,), "gbfm": (C, 4, 5)}
COUNTS = {"convlstm": 9, "mgate": 6, "tgfe": 12, "gbfm": 4}


@every
def test_gates_are_part_of_the_answer(name):
    module, (x, words) = made(name), inputs()
    with torch.no_grad():
        plain, (again, gates) = module(x, words), module(x, words, return_gates=True)
    assert torch.equal(plain, again) and plain.shape == x[0].shape and len(gates) == COUNTS[name]
    assert all(g.shape == (2, *SHAPES[name]) and 0 < g.min() and g.max() < 1 for g in gates.values())


REACH = {
    "convlstm": (49, 25, 9),
    "mgate": (9, 9, 9),
    "tgfe": (121, 121, 121),
    "gbfm": (25, 25, 25),
    "hcam": (25, 25, 25),
}


@pytest.mark.parametrize("name", sorted(REACH))
def test_reach(name):
    module, (x, words) = together(name), inputs(1, C, 11, 11)
    for level in range(3):
        other = [v.clone() for v in x]
        other[level][..., 5, 5] += 1
        with torch.no_grad():
            changed = (module(x, words) - module(other, words)).abs().amax(1)[0] > 1e-12
        side = math.isqrt(REACH[name][level])
        assert (
            changed.sum() == side * side
            and changed[5 - side // 2 : 6 + side // 2, 5 - side // 2 : 6 + side // 2].all()
        )


@every
def test_a_picture_s_answer_does_not_depend_on_its_batch(name):
    module, (x, words) = made(name).eval(), inputs(5)
    order = torch.randperm(5)
    with torch.no_grad():
        all_ = module(x, words)
        for b in range(5):
            torch.testing.assert_close(
                module([v[b : b + 1] for v in x], [w[b : b + 1] for w in words])[0], all_[b]
            )
        torch.testing.assert_close(module([v[order] for v in x], [w[order] for w in words]), all_[order])


@every
def test_the_input_is_left_as_it_is(name):
    module, (x, words) = made(name), inputs()
    kept = [v.clone() for v in (*x, *words)]
    with torch.no_grad():
        module(x, words)
    assert all(torch.equal(a, b) for a, b in zip((*x, *words), kept)) and len(x) == 3


# ---- counts

FORMULA = {
    "convlstm": lambda c: 72 * c * c + 4 * c,
    "mgate": lambda c: 54 * c + 9,
    "tgfe": lambda c: 56 * c * c + 46 * c,
    "gbfm": lambda c: 72 * c * c + 4 * c,
}


@every
@pytest.mark.parametrize("c", [4, 10, 512])
def test_parameters_by_formula(name, c):
    with torch.device("meta"):
        assert sum(p.numel() for p in AGGREGATIONS[name](c).parameters()) == FORMULA[name](c)


def test_exchange_has_the_layers_that_were_counted_on_cmpc_s_program():
    def formula(c, words):
        return (c + 1) * c + (words + 1) * c + (c + words + 1) * c + 4 * (c + 1) * c

    assert formula(500, 1000) == 2_503_500
    assert all(sum(p.numel() for p in Exchange(c).parameters()) == formula(c, c) for c in (3, 16))


def test_conv3d_has_fewer_parameters_than_the_convlstm_as_the_paper_says():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (
        count(ConvLSTMLevels(32, kernel=1)) < count(Conv3dLevels(32, norm=False)) < count(ConvLSTMLevels(32))
    )


# ---- rows of the tables

TABLES = ABLATIONS | TABLE4 | TABLE4_OWN
ROW_NAMES = [*ABLATIONS, *TABLE4, *TABLE4_OWN]


def small(row, **overrides):
    settings = dict(
        vocab_size=20,
        backbone_weights="none",
        channels=16,
        grid=6,
        word_dim=8,
        sfm_heads=2,
        sfm_ffn=24,
        decoder_widths=(12, 8),
        image_size=48,
    )
    torch.manual_seed(0)
    return create_model(model_name(row), **(settings | overrides))


def test_rows_have_the_paper_s_names():
    assert list(ABLATIONS) == list(PAPER["table2"]["rows"]) and list(TABLE4) == list(PAPER["table4"]["rows"])
    assert set(ROWS) <= set(ABLATIONS)
    # recorded runs and saved models have these
    assert {model_name(row) for row in ROWS} == {"baseline", "only-hcam", "only-sfm", "shnet"}
    assert [name for name in list_models() if registered(name).model is SHNet] == ["shnet", "baseline", "only-hcam", "only-sfm", "sfm-convlstm", "sfm-conv3d", "shnet-without-glove", "shnet-without-pe",
                            "mgate-released", "tgfe-released", "gbfm-released", "hcam", "mgate", "tgfe", "gbfm"]  # fmt: skip


def test_rows_differ_in_what_they_say_and_in_nothing_else():
    paper = PRESETS["paper"]
    changes = {row: {k: v for k, v in TABLES[row].items() if getattr(paper, k) != v} for row in ROW_NAMES}
    assert changes["SHNet"] == changes["HCAM"] == {}
    assert changes["SHNet w/o Glove"] == {"one_hot": True} and changes["SHNet w/o P.E"] == {
        "sfm_positions": "none"
    }
    assert changes["SFM+Conv3D"] == {"use_hcam": False, "level_fusion": "conv3d"} and changes["TGFE"] == {
        "use_hcam": False,
        "level_fusion": "tgfe-released",
    }
    others = ("SFM+ConvLSTM", "MGATE", "TGFE", "GBFM", *TABLE4_OWN)
    assert {changes[row]["level_fusion"] for row in others} == set(AGGREGATIONS)


@pytest.mark.parametrize("row", ["SFM+ConvLSTM", "SFM+Conv3D", "MGATE", "TGFE", "GBFM", *TABLE4_OWN])
def test_everything_around_the_aggregation_is_the_same(row):
    model, shnet = small(row), small("SHNet")
    around = lambda m: {
        k: tuple(v.shape) for k, v in m.state_dict().items() if not k.startswith(("hcam.", "levels."))
    }
    assert around(model) == around(shnet)
    assert not any(k.startswith("hcam.") for k in model.state_dict()) and any(
        k.startswith("levels.") for k in model.state_dict()
    )
    counts = count_parameters(model)
    assert (
        counts["level fusion"] == sum(p.numel() for p in model.levels.parameters())
        and sum(counts.values()) == 2 * counts["total"]
    )
    assert set(counts) - set(count_parameters(shnet)) == {"level fusion"}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_row_can_be_laid_over_every_preset(preset):
    with torch.device("meta"):
        backbone = create_backbone(PRESETS[preset].backbone, "none")
        for row in ROW_NAMES:
            model = create_model(model_name(row), preset, vocab_size=30, backbone=backbone)
            assert (
                count_parameters(model)["total"] > 0
                and SHNetConfig.from_dict(model.config.to_dict()) == model.config
            )
            assert (
                replace(model.config, **TABLES[row])
                == model.config
                == replace(PRESETS[preset], **TABLES[row])
            )


@pytest.mark.parametrize("row", [r for r in ROW_NAMES if r != "HCAM"])
def test_operations_of_every_row(row):
    config = small(row).config
    flops = count_flops(config, words=5)
    c, p, taps = config.channels, config.grid**2, 9
    by_hand = {
        "convlstm": 5 * taps * c * 4 * c * p,
        "mgate": 6 * taps * c * p,
        "gbfm": 4 * taps * 2 * c * c * p,
        "conv3d": 3 * taps * c * c * p,
        "concat": 3 * c * c * p,  # fmt: skip
        "mgate-released": 3 * taps * c * 3 * c * p,
        "tgfe-released": 6 * (2 * c * c * p + 2 * c * p + c * c + 2 * c * c + c * c),
        "gbfm-released": 3 * c * c * (p + 1) + 6 * (2 * c * c + taps * c * c) * p + taps * c * c * p,
        "tgfe": 6 * ((3 * c * c + 2 * c) * p + c * c + 2 * c * c + 2 * c * c) + 5 * c * 4 * c * p,
    }
    if config.use_hcam:
        assert {"HCAM gates", "HCAM Conv3d"} <= set(flops)
    else:
        assert flops["level fusion"] * 1e9 == pytest.approx(2 * by_hand[config.level_fusion])
    # a 1x1, three 3x3 and the projection of five; one vector
    assert flops["ASPP"] * 1e9 == 2 * ((1 + 3 * taps + 5) * c * c * p + c * c)


def test_the_model_hands_over_maps_and_words():
    for row in ("TGFE of CMPC", "GBFM of BRINet"):
        model = small(row).eval()
        images, words = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8), torch.randint(1, 20, (2, 5))
        with torch.no_grad():
            features = model.encode(images)
            visual, language, _ = model.fuse(features, model.text(words))
            want = model.decoder(
                model.aspp(AGGREGATIONS[model_name(row)].forward(model.levels, visual, language))
            )
            torch.testing.assert_close(model.segment(features, words), want)


def test_an_unknown_fusion_names_what_there_is():
    with pytest.raises(
        ValueError,
        match="level_fusion must be one of concat, conv3d, convlstm, mgate, tgfe, gbfm, mgate-released,"
        " tgfe-released, gbfm-released, not 'lstm'",
    ):
        SHNetConfig(level_fusion="lstm")
    assert isinstance(small("Only SFM").levels, ConcatLevels)


def test_saved_configurations_of_before_still_load():
    model = load("shnet-refshapes").model
    assert model.config.use_hcam and model.config.level_fusion == "concat" and isinstance(model.hcam, HCAM)


@pytest.mark.parametrize("row", ["TGFE", "GBFM of BRINet", "SHNet w/o Glove"])
def test_a_row_survives_saving(row, tmp_path):
    vocabulary = Vocabulary.build(["the second smallest ball", "boat closest to the green boat"])
    model = small(row, vocab_size=len(vocabulary)).eval()
    save_model(tmp_path / "m", model, vocabulary, {})
    again, _, _ = load_model(tmp_path / "m")
    images, words = (
        torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8),
        torch.randint(1, len(vocabulary), (1, 5)),
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images, words), model(images, words))
