"""The model's rooms against versions written from the equations, the counts of the released model, and what
must never change."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from refseg_nb.models import backbones as B
from refseg_nb.models.cost import count_parameters
from refseg_nb.models.decoder import ASPP, BaselineFusion, LevelAdapter, UpsampleDecoder
from refseg_nb.models.hcam import HCAM, Conv3dLevels, average_words, constant_conv
from refseg_nb.models.losses import training_target
from refseg_nb.models.registry import create_model, list_models, registered
from refseg_nb.models.sfm import SFM, pixel_positions, sinusoid, word_positions
from refseg_nb.models.shnet import ABLATIONS, PRESETS, RECIPES, SHNet, SHNetConfig, differences
from refseg_nb.models.text import TextEncoder
from refseg_nb.training import pretrain

RELEASED = {
    "text encoder": 1_667_072,
    "level adapters": 16_519_680,
    "SFM": 3_156_992,
    "HCAM": 21_239_808,
    "ASPP": 8_919_040,
    "decoder": 8_263_425,
    "total": 59_766_017,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


ROWS = sorted(name for name in list_models() if registered(name).model is SHNet)


def small(name="shnet", **overrides):
    "A model that is small enough for a test: 6 x 6 places, 16 channels."
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
    return create_model(name, **(settings | overrides))


def batch(images=2, each=2, words=5, size=48):
    pictures = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    w = torch.randint(1, 20, (images * each, words))
    w[0, 3:] = 0
    return pictures, w, torch.arange(images).repeat_interleave(each)


# ---- counts and configuration


def test_released_counts_by_part():
    with torch.device("meta"):
        model = create_model("shnet", "released", vocab_size=100, backbone_weights="none")
    assert count_parameters(model) == RELEASED


def test_every_row_has_the_same_aspp_and_decoder():
    counts = {row: count_parameters(small(row)) for row in ("baseline", "only-hcam", "only-sfm", "shnet")}
    assert (
        len({(c["ASPP"], c["decoder"], c["text encoder"], c["level adapters"]) for c in counts.values()}) == 1
    )
    assert len({c["total"] for c in counts.values()}) == 4 and {
        "Baseline",
        "Only HCAM",
        "Only SFM",
        "SHNet",
    } <= set(ABLATIONS)


def test_presets_differ_one_field_at_a_time():
    changes = differences(PRESETS["paper"], PRESETS["released"])
    assert {"grid", "pool", "sfm_layers", "sfm_ffn", "sfm_positions", "hcam_gates", "train_words"} <= set(
        changes
    )
    for name, (_, value) in changes.items():  # each difference can be turned alone, and gives a model
        with torch.device("meta"):
            create_model("shnet", "paper", vocab_size=10, backbone_weights="none", **{name: value})
    assert {"schedule", "target", "threshold", "letters_only", "grayscale", "batch_size"} <= set(
        differences(RECIPES["paper"], RECIPES["released"])
    )


def test_config_survives_json():
    import json

    for config in PRESETS.values():
        assert SHNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="no field 'colour'"):
        SHNetConfig.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="no model called"):
        create_model("shnet2", vocab_size=3)
    with pytest.raises(ValueError, match="no preset called"):
        create_model("shnet", "big", vocab_size=3)


def test_refshapes_preset_is_small():
    model = create_model(vocab_size=100, backbone_weights="none")
    assert (
        count_parameters(model)["total"] < 1_000_000
        and sum(p.numel() for p in model.backbone.parameters()) <= 450_000
    )
    assert (
        model.output_size == 48
        and create_model(vocab_size=9, backbone_weights="none", decoder_doublings=3).output_size == 96
    )


# ---- SFM


def naive_sfm(sfm, visual, words, mask):
    "Equation 1 with loops over heads and queries; one layer of the paper's kind."
    layer = sfm.layers[0]
    attention = layer.attention
    b, c, h, w = visual.shape
    joined = torch.cat([visual.flatten(2).transpose(1, 2), words], 1)
    p = torch.cat([sfm.p_v, sfm.p_l[: words.shape[1]]])
    mean, var = joined.mean(-1, keepdim=True), joined.var(-1, unbiased=False, keepdim=True)
    x = (joined - mean) / (var + 1e-5).sqrt() * layer.norm1.weight + layer.norm1.bias + p
    weight, bias, d = attention.qkv.weight, attention.qkv.bias, c // attention.heads
    out, maps = torch.zeros_like(x), torch.zeros(b, attention.heads, x.shape[1], x.shape[1])
    for i in range(b):
        keys = [n for n in range(x.shape[1]) if n < h * w or mask[i, n - h * w]]
        for head in range(attention.heads):
            rows = [slice(part * c + head * d, part * c + (head + 1) * d) for part in range(3)]
            for n in range(x.shape[1]):
                q = weight[rows[0]] @ x[i, n] + bias[rows[0]]
                scores = torch.stack(
                    [q @ (weight[rows[1]] @ x[i, m] + bias[rows[1]]) / math.sqrt(d) for m in keys]
                )
                a = scores.exp() / scores.exp().sum()
                maps[i, head, n, keys] = a
                out[i, n, head * d : (head + 1) * d] = sum(
                    a[k] * (weight[rows[2]] @ x[i, m] + bias[rows[2]]) for k, m in enumerate(keys)
                )
    out = out @ attention.out.weight.T + attention.out.bias
    return out, maps


def test_sfm_is_equation_1():
    sfm = SFM(8, 3, heads=2)
    visual, words, mask = (
        torch.randn(2, 8, 3, 3),
        torch.randn(2, 4, 8),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    with torch.no_grad():
        for p in sfm.parameters():
            p.add_(0.1 * torch.randn_like(p))
        want, maps = naive_sfm(sfm, visual, words, mask)
        v, l, attention = sfm(visual, words, mask, return_attention=True)
        fast, _, _ = sfm(visual, words, mask)
    got = torch.cat([v.flatten(2).transpose(1, 2), l], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention[0].weights, maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast, v, atol=1e-5, rtol=1e-4)


def test_released_sfm_is_torch_s_encoder_with_positions_in_queries_and_keys():
    sfm = SFM(16, 3, layers=2, heads=4, ffn=24, residual=True, final_norm=True, positions="qk").eval()
    visual, words, mask = (
        torch.randn(2, 16, 3, 3),
        torch.randn(2, 4, 16),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    x = torch.cat([visual.flatten(2).transpose(1, 2), words], 1)
    p = torch.cat([sfm.p_v, sfm.p_l[:4]])
    pad = ~torch.cat([mask.new_ones(2, 9), mask], 1)
    with torch.no_grad():
        for layer in sfm.layers:
            mha = nn.MultiheadAttention(16, 4, batch_first=True)
            mha.in_proj_weight.copy_(layer.attention.qkv.weight)
            mha.in_proj_bias.copy_(layer.attention.qkv.bias)
            mha.out_proj.load_state_dict(layer.attention.out.state_dict())
            n = layer.norm1(x)
            x = x + mha(n + p, n + p, n, key_padding_mask=pad, need_weights=False)[0]
            x = x + layer.ffn(layer.norm2(x))
        want = sfm.final(x)[:, :9].transpose(1, 2).reshape(2, 16, 3, 3)
        torch.testing.assert_close(sfm(visual, words, mask)[0], want, atol=1e-5, rtol=1e-4)


def test_sinusoids_closed_form():
    p = pixel_positions(3, 5, 8, base=100.0)
    for y in range(3):
        for x in range(5):
            want = [f(n / 100 ** (2 * k / 4)) for n in (x, y) for k in range(2) for f in (math.sin, math.cos)]
            torch.testing.assert_close(p[y * 5 + x], torch.tensor(want))
    torch.testing.assert_close(
        word_positions(4, 6)[3],
        torch.tensor([f(3 / 10000 ** (2 * k / 6)) for k in range(3) for f in (math.sin, math.cos)]),
    )
    with pytest.raises(ValueError, match="even"):
        sinusoid(torch.arange(3.0), 5)


@pytest.mark.parametrize("positions", ["qkv", "qk", "none"])
def test_positions_tell_places_apart(positions):
    sfm = SFM(8, 3, heads=2, positions=positions).eval()
    visual, words, order = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 8), torch.randperm(9)
    shuffled = visual.flatten(2)[:, :, order].view(1, 8, 3, 3)
    with torch.no_grad():
        a, b = (sfm(v, words)[0].flatten(2) for v in (visual, shuffled))
    assert torch.allclose(a[:, :, order], b, atol=1e-5) == (positions == "none")


def test_padding_is_never_seen():
    model = small().eval()
    images, words, index = batch()
    wide = F.pad(words, (0, 4))
    with torch.no_grad():
        features = model.encode(images)
        torch.testing.assert_close(
            model.segment(features, words, index), model.segment(features, wide, index), atol=1e-5, rtol=1e-4
        )
        _, attention = model.segment(features, wide, index, return_attention=True)
    assert attention[2][0][..., 36 + 5 :].abs().max() == 0


# ---- HCAM


def naive_gate(gate, f, l):
    tiled = l[:, :, None, None].expand_as(f)
    return torch.sigmoid(gate.after(gate.conv(torch.cat([f, tiled], 1))))


def naive_hcam(hcam, visual, language):
    g = []
    for i in range(3):
        g.append(
            visual[i]
            + sum(naive_gate(hcam.gate(i, j), visual[i], language[j]) * visual[j] for j in range(3) if j != i)
        )
    x = hcam.aggregate.conv(torch.stack(g, 2)).squeeze(2)
    return hcam.aggregate.after(x)


@pytest.mark.parametrize("gates", ["pair", "level", "one"])
@pytest.mark.parametrize("norm", [False, True])
def test_hcam_split_equals_equation_2(gates, norm):
    hcam = HCAM(6, gates, norm).double()
    visual = [torch.randn(3, 6, 4, 5, dtype=torch.double, requires_grad=True) for _ in range(3)]
    language = [torch.randn(3, 6, dtype=torch.double, requires_grad=True) for _ in range(3)]
    inputs = [*visual, *language, *hcam.parameters()]
    a, b = hcam(visual, language), naive_hcam(hcam, visual, language)
    torch.testing.assert_close(a, b)
    direction = torch.randn_like(a)
    for x, y in zip(
        torch.autograd.grad((a * direction).sum(), inputs), torch.autograd.grad((b * direction).sum(), inputs)
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (3, 3), (6, 4)])
def test_constant_conv_is_a_convolution(size):
    weight, vector = torch.randn(5, 4, 3, 3), torch.randn(2, 4)
    torch.testing.assert_close(
        constant_conv(weight, vector, *size),
        F.conv2d(vector[:, :, None, None].expand(-1, -1, *size), weight, padding=1),
        atol=1e-5,
        rtol=1e-4,
    )


def test_three_levels_make_a_conv3d_a_conv2d():
    module = Conv3dLevels(4, norm=False)
    maps = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    want = module.conv(torch.stack(maps, 2))
    assert want.shape == (2, 4, 1, 5, 5)
    torch.testing.assert_close(module(maps), want.squeeze(2), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="three levels"):
        module(maps[:2])


def test_average_is_over_real_words():
    words, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [False] * 4])
    got = average_words(words, mask)
    torch.testing.assert_close(got[0], words[0, :2].mean(0))
    assert (got[1] == 0).all()


# ---- decoder


def test_aspp_is_a_sum_of_taps():
    aspp = ASPP(4, (1, 2, 3), dropout=0.0).eval()
    x = torch.randn(2, 4, 6, 6)

    def taps(weight, rate):
        out = torch.zeros(2, 4, 6, 6)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                for row in range(6):
                    for column in range(6):
                        r, c = row + dy * rate, column + dx * rate
                        if 0 <= r < 6 and 0 <= c < 6:
                            out[:, :, row, column] += x[:, :, r, c] @ weight[:, :, dy + 1, dx + 1].T
        return out

    with torch.no_grad():
        branches = [
            F.conv2d(x, aspp.branches[0][0].weight),
            *(taps(aspp.branches[k][0].weight, k) for k in (1, 2, 3)),
            F.conv2d(x.mean((2, 3), keepdim=True), aspp.pool[0].weight).expand(-1, -1, 6, 6),
        ]
        norms = [branch[1] for branch in aspp.branches] + [aspp.pool[1]]
        want = aspp.project(torch.cat([F.relu(n(y)) for n, y in zip(norms, branches)], 1))
        torch.testing.assert_close(aspp(x), want, atol=1e-5, rtol=1e-4)


def test_text_encoder_ignores_padding():
    text = TextEncoder(20, 8, 6).eval()
    words = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10], [1, 0, 0, 0, 0]])
    out = text(words)
    lengths = (words > 0).sum(1)
    packed = nn.utils.rnn.pack_padded_sequence(
        text.embedding(words), lengths, batch_first=True, enforce_sorted=False
    )
    states, (last, _) = text.lstm(packed)
    torch.testing.assert_close(out.words, nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0])
    torch.testing.assert_close(out.sentence, last[0])
    with pytest.raises(ValueError, match="rows but the vocabulary"):
        TextEncoder(20, 8, vectors=torch.zeros(3, 4))
    assert not TextEncoder(20, 8, one_hot=True).embedding.weight.requires_grad


def test_baseline_is_concatenation():
    fusion = BaselineFusion(4).eval()
    features, sentence = [torch.randn(2, 4, 3, 3) for _ in range(3)], torch.randn(4, 4)
    index = torch.tensor([0, 0, 1, 1])
    got = fusion(features, sentence, index)
    for i in range(3):
        weight = torch.cat([fusion.visual[i].weight, fusion.language[i].weight[:, :, None, None]], 1)
        joined = torch.cat([features[i][index], sentence[:, :, None, None].expand(-1, -1, 3, 3)], 1)
        torch.testing.assert_close(got[i], fusion.after[i](F.conv2d(joined, weight)))


@pytest.mark.parametrize("pool", [1, 2])
def test_adapter_gives_the_grid_from_any_size(pool):
    for size in (5, 12, 40):
        assert LevelAdapter(3, 4, 6, pool)(torch.randn(2, 3, size, size)).shape == (2, 4, 6, 6)


def test_prior_is_what_an_untrained_decoder_predicts():
    decoder = UpsampleDecoder(8, (8, 8), prior=0.05).eval()
    with torch.no_grad():
        p = decoder(torch.zeros(1, 8, 4, 4)).sigmoid()
    assert p.mean().item() == pytest.approx(0.05, abs=0.02)


# ---- the whole


@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs_and_learns(name):
    model = small(name)
    images, words, index = batch()
    logits = model(images, words, index)
    assert logits.shape == (4, 24, 24) and torch.isfinite(logits).all()
    logits.sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_attention_is_part_of_the_answer():
    model = small().eval()
    images, words, index = batch()
    with torch.no_grad():
        features = model.encode(images)
        plain = model.segment(features, words, index)
        logits, attention = model.segment(features, words, index, return_attention=True)
    torch.testing.assert_close(plain, logits, atol=1e-5, rtol=1e-4)
    assert list(attention) == [2, 3, 4] and attention.grid == (6, 6) and attention.words == 5
    for layers in attention.values():
        assert len(layers) == 2
        for a in layers:
            assert a.shape == (4, 2, 41, 41)
            torch.testing.assert_close(a.sum(-1), torch.ones(4, 2, 41))
            assert a[0, :, :, 36 + 3 :].abs().max() == 0
    assert attention.block(3, -1, "words", "pixels").shape == (4, 2, 5, 36)
    assert small("baseline").eval().segment(features, words, index, return_attention=True)[1] is None


@pytest.mark.parametrize("name", ROWS)
def test_one_image_many_phrases(name):
    model = small(name).eval()
    images, words, index = batch(2, 3)
    with torch.no_grad():
        features = model.encode(images)
        together = model.segment(features, words, index)
        for b in range(6):
            torch.testing.assert_close(
                model.segment([f[index[b] : index[b] + 1] for f in features], words[b : b + 1])[0],
                together[b],
                atol=1e-5,
                rtol=1e-4,
            )
        torch.testing.assert_close(
            model.segment([f[:1] for f in features], words[:3]), together[:3], atol=1e-5, rtol=1e-4
        )
        with pytest.raises(ValueError, match="image_index"):
            model.segment(features, words)


def test_levels_in_one_batch_equal_levels_apart():
    model = small().eval()
    images, words, index = batch()
    with torch.no_grad():
        language, features = model.text(words), model.encode(images)
        visual, average, _ = model.fuse(features, language, index)
        for i in range(3):
            v, l, _ = model.sfm[0](features[i][index], language.words, language.mask)
            torch.testing.assert_close(visual[i], v, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(average[i], average_words(l, language.mask), atol=1e-5, rtol=1e-4)
    assert len(small(sfm_shared=False).sfm) == 3


@pytest.mark.parametrize(
    "override",
    [
        dict(sfm_shared=False),
        dict(sfm_positions="none"),
        dict(sfm_embedding="learned"),
        dict(one_hot=True),
        dict(pool=1, adapter_norm=False),
        dict(hcam_gates="one"),
        dict(hcam_norm=False),
        dict(use_hcam=False, level_fusion="conv3d"),
        dict(sfm_norm="post"),
        dict(sfm_dropout=0.3, sfm_attention_dropout=None),
    ],
)
def test_every_switch_works(override):
    model = small(**override)
    images, words, index = batch()
    model(images, words, index).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_long_expression_is_an_error_and_an_empty_one_is_not():
    model = small().eval()
    images, _, _ = batch()
    with torch.no_grad():
        features = model.encode(images)
        assert torch.isfinite(model.segment(features, torch.zeros(2, 3, dtype=torch.long))).all()
        with pytest.raises(ValueError, match="shorten it"):
            model.segment(features, torch.ones(2, 60, dtype=torch.long))


def test_targets():
    mask = torch.zeros(1, 12, 12)
    mask[0, 3:7, 3:7] = 1
    soft, hard, dilated = (training_target(mask, 4, policy) for policy in ("soft", "hard", "dilated"))
    assert soft.sum() * 9 == mask.sum() and set(hard.unique().tolist()) <= {0.0, 1.0}
    big = training_target(mask, 24, "dilated")
    assert big.sum() > 4 * mask.sum(), "the released target is larger than the mask"
    with pytest.raises(ValueError, match="'soft', 'hard' or 'dilated'"):
        training_target(mask, 4, "blurred")
    assert dilated.shape == (1, 4, 4)


# ---- backbones


def voc_layout():
    "A synthetic checkpoint with the keys and shapes of jfzhang95's DeepLabv3+ ResNet-101."
    state, gen = {}, torch.Generator().manual_seed(0)

    def conv(key, o, i, k):
        state[f"{key}.weight"] = torch.randn(o, i, k, k, generator=gen) * 0.02

    def norm(key, n):
        state.update(
            {
                f"{key}.weight": torch.ones(n),
                f"{key}.bias": torch.zeros(n),
                f"{key}.running_mean": torch.zeros(n),
                f"{key}.running_var": torch.ones(n),
                f"{key}.num_batches_tracked": torch.tensor(0),
            }
        )

    conv("backbone.conv1", 64, 3, 7)
    norm("backbone.bn1", 64)
    inputs = 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (23, 256), (3, 512)), 1):
        for n in range(blocks):
            key = f"backbone.layer{layer}.{n}"
            conv(f"{key}.conv1", width, inputs, 1)
            norm(f"{key}.bn1", width)
            conv(f"{key}.conv2", width, width, 3)
            norm(f"{key}.bn2", width)
            conv(f"{key}.conv3", 4 * width, width, 1)
            norm(f"{key}.bn3", 4 * width)
            if n == 0:
                conv(f"{key}.downsample.0", 4 * width, inputs, 1)
                norm(f"{key}.downsample.1", 4 * width)
            inputs = 4 * width
    conv("aspp.conv1", 8, 2048, 1)
    norm("aspp.bn1", 8)
    conv("decoder.conv1", 8, 256, 1)
    norm("decoder.bn1", 8)
    return state


@pytest.fixture(scope="module")
def voc_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("voc") / "deeplab-resnet.pth.tar"
    torch.save(
        {"epoch": 3, "state_dict": voc_layout(), "best_pred": np.float64(0.78)}, path
    )  # with the numpy scalar that training programs leave there
    return path


def test_voc_checkpoint_every_key(voc_file):
    net = B.create_backbone("deeplabv3plus-resnet101", voc_file)
    want = voc_layout()
    for key, value in net.body.state_dict().items():
        assert torch.equal(value, want[f"backbone.{key}"]), key
    assert net.strides == (8, 16, 16) and [b.conv2.dilation[0] for b in net.body.layer4] == [2, 4, 8]
    with torch.no_grad():
        assert [tuple(v.shape) for v in net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))] == [
            (1, 512, 8, 8),
            (1, 1024, 4, 4),
            (1, 2048, 4, 4),
        ]


def test_voc_checkpoint_strange_keys(tmp_path):
    state = voc_layout()
    state["backbone.layer5.0.conv1.weight"] = torch.zeros(1)
    del state["backbone.conv1.weight"]
    state["backbone.bn1.bias"] = torch.zeros(3)
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError) as error:
        B.load_voc_checkpoint(path)
    for part in (
        "unknown keys (backbone.layer5.0.conv1.weight)",
        "missing keys (backbone.conv1.weight)",
        "backbone.bn1.bias [3] instead of [64]",
    ):
        assert part in str(error.value)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="no 'state_dict'"):
        B.load_voc_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot|can be read safely"):
        B.load_voc_checkpoint(path)


def test_voc_checkpoint_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": {}, "x": Evil()}, path)
    with pytest.raises(ValueError, match="read safely"):
        B.load_voc_checkpoint(path)


def test_old_file_format(tmp_path):
    path = tmp_path / "old.pth.tar"
    torch.save(
        {"state_dict": voc_layout(), "best_pred": np.float64(0.78)},
        path,
        _use_new_zipfile_serialization=False,
    )
    assert len(B.load_voc_checkpoint(path)) == 624  # 104 convolutions and as many BatchNorms


def test_coco_weights_are_warned_about(tmp_path, voc_file):
    path = tmp_path / "deeplab-coco.pth.tar"
    path.write_bytes(voc_file.read_bytes())
    with pytest.warns(B.LeakWarning, match="test images of RefCOCO"):
        B.create_backbone("deeplabv3plus-resnet101", path)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="deeplab-resnet.pth.tar.*put it there"):
        B.create_backbone("deeplabv3plus-resnet101")
    with pytest.raises(FileNotFoundError, match="pretrain_backbone"):
        B.create_backbone("refshapes", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no backbone called"):
        B.create_backbone("vgg")

    def refuse(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*weights='none'"):
        B.create_backbone("resnet101")


@pytest.mark.parametrize("name", ["refshapes", "resnet101"])
def test_frozen_means_frozen(name):
    net = B.create_backbone(name, "none")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    holder = nn.Sequential(net)
    holder.train()
    assert net.frozen and not any(m.training for m in net.modules())
    out = net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert not any(v.requires_grad for v in out)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.freeze(False).train()
    assert net.training and not net.frozen


def test_bytes_and_floats_are_the_same_picture():
    net = B.create_backbone("refshapes", "none")
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    for a, b in zip(net(images), net(images / 255)):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="K, 3, S, S"):
        net(images[0])
    with pytest.raises(ValueError, match="uint8 or floats"):
        net(images.int())


def test_refshapes_weights_file(tmp_path):
    net = B.create_backbone("refshapes", "none")
    path = tmp_path / "b.safetensors"
    save_file(net.state_dict(), path)
    again = B.create_backbone("refshapes", path)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="unknown keys"):
        B.create_backbone("refshapes", path)


def test_mean_iou_by_hand():
    true, guess = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    mean, each = pretrain.mean_iou(guess, true, 3)
    assert mean == pytest.approx((1 / 2 + 2 / 3) / 2) and each[2].isnan()


def test_appearance_by_hand():
    images, instance = (
        torch.rand(2, 3, 4, 4),
        torch.tensor([0, 1, 2]).repeat_interleave(8)[torch.randperm(24)[:16]].view(1, 4, 4).repeat(2, 1, 1),
    )
    got = pretrain.appearance(images, instance)
    for k in range(2):
        for n in instance[k].unique():
            inside = instance[k] == n
            pixels = images[k][:, inside]
            torch.testing.assert_close(
                got[k][:, inside][:, 0],
                torch.cat([pixels.mean(1), pixels.std(1, unbiased=False)]),
                atol=1e-4,
                rtol=1e-3,
            )
