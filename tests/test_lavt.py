"""LAVT against torchvision's Swin and loops written from its equations, parameter counts, the published
layout, WordPieces, and learning two scenes."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import Vocabulary, WordPieces, vocabulary_for
from refseg_nb.models.cost import count_flops, count_parameters
from refseg_nb.models.hub import load_model, save_model
from refseg_nb.models.lavt import (
    LAVT,
    LAVT_PRESETS,
    LAVT_RECIPES,
    PWAM,
    SWINS,
    LAVTConfig,
    SwinBackbone,
    TopDownDecoder,
    difference,
    language_gate,
    load_published,
    swin_backbone,
)
from refseg_nb.models.losses import weighted_loss
from refseg_nb.models.registry import create_model
from refseg_nb.models.text import bert_encoder
from refseg_nb.training.learner import Objective
from refseg_nb.training.pretrain import pretrain_swin

DEAD = 2 * 1024**2  # the published gate of stage 4, which feeds nothing
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "red", "car", "chim", "##ney", "tall", "##er", "!"]
VOCAB = 40
# maps 16 to 2: padded
SMALL = replace(
    LAVT_PRESETS["refshapes"],
    backbone_weights="none",
    begin=False,
    decoder_width=None,
    factor=1,
    window=5,
    image_size=64,
    text_width=16,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny():
    "The small preset on a vocabulary of 40 words, in eval mode."
    torch.manual_seed(0)
    return create_model("lavt", vocab_size=VOCAB).eval()


@pytest.fixture(scope="module")
def base():
    "The published LAVT on the device that has no memory."
    with torch.device("meta"):
        return create_model("lavt", "base", backbone_weights="none", text_weights="none")


def phrases(*lengths, longest=6):
    "Random phrases of these lengths, [B, longest], padded with 0."
    words = torch.randint(1, VOCAB, (len(lengths), longest))
    return words * (torch.arange(longest) < torch.tensor(lengths)[:, None])


def disturb(module):
    "Random numbers in everything that starts as 0 or 1, so that a swap of two of them is seen."
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if p.dim() == 1 and p.is_floating_point():
                p.copy_(
                    torch.rand_like(p) + 0.5
                    if "weight" in name or "var" in name
                    else 0.3 * torch.randn_like(p)
                )
    return module


# --- counts at the published size ---


def test_parameters_of_the_published_size_by_part(base):
    counts = count_parameters(base)
    assert counts == {
        "Swin": 86_876_536,
        "text encoder": 108_891_648,
        "PWAM": 8_531_200,
        "gates": 2_785_280 - DEAD,
        "norms": 3_840,
        "decoder": 20_651_010,
        "total": 227_739_514 - DEAD,
    }
    assert [sum(p.numel() for p in m.parameters()) for m in base.fusion] == [
        262_912,
        656_896,
        1_838_080,
        5_773_312,
    ]


def test_what_the_published_optimizer_trains(base):
    spared, decayed = base.parameter_groups(0.01)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.01)
    n_spared, n_decayed = (sum(p.numel() for p in g["params"]) for g in (spared, decayed))
    assert n_spared == 258_296 and n_spared + n_decayed == 189_726_586 - DEAD
    frozen = sum(p.numel() for p in base.parameters() if not p.requires_grad)
    assert frozen == 38_012_928 == 23_837_184 + 2 * 7_087_872
    everything = {id(p) for g in (spared, decayed) for p in g["params"]}
    assert len(everything) == len(spared["params"]) + len(decayed["params"])


@pytest.mark.parametrize("name, embed, depth", [("tiny", 96, 12), ("small", 96, 24), ("large", 192, 24)])
def test_the_other_sizes_are_made(name, embed, depth):
    with torch.device("meta"):
        model = create_model("lavt", name, backbone_weights="none", text_weights="none", image_size=224)
    assert model.backbone.channels == (embed, 2 * embed, 4 * embed, 8 * embed)
    assert sum(len(s.blocks) for s in model.backbone.stages) == depth
    window = LAVT_PRESETS[name].window
    assert all(
        len(b.attn.relative_position_bias_table) == (2 * window - 1) ** 2
        for s in model.backbone.stages
        for b in s.blocks
    )
    assert LAVT_RECIPES[name].lr == 5e-5


def test_depth_of_the_random_drop_rises_linearly(base):
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in base.backbone.stages for b in s.blocks]
    assert rates == pytest.approx([0.3 * i / 23 for i in range(24)])


def test_flops_of_a_part_by_hand():
    flops = count_flops(LAVT_PRESETS["base"], words=20)
    pixels, gates = (14_400, 3_600, 900, 225), 0
    for n, c in zip(pixels[:3], (128, 256, 512)):
        gates += 2 * 2 * n * c * c
    assert flops["gates"] * 1e9 == pytest.approx(gates)
    convolutions = (
        sum(n * 9 * 512 * (width + 512) for n, width in zip(pixels, (640, 768, 1536))) + pixels[0] * 512 * 2
    )
    assert flops["decoder"] * 1e9 == pytest.approx(2 * convolutions)
    assert flops["stage 1"] < 0.05 * sum(flops.values())


# --- Swin: another library as the reference ---


def torchvision_swin(ours, window):
    "torchvision's Swin with the weights of ours; it pads before it rolls, as the published one does."
    from torchvision.models.swin_transformer import SwinTransformer

    depths, heads = [len(s.blocks) for s in ours.stages], [s.blocks[0].attn.num_heads for s in ours.stages]
    patch = ours.patch_embed.proj.kernel_size[0]
    swin = SwinTransformer(
        [patch] * 2, ours.channels[0], depths, heads, [window] * 2, stochastic_depth_prob=0.0, num_classes=1
    )
    swin.features[0][0].load_state_dict(ours.patch_embed.proj.state_dict())
    swin.features[0][2].load_state_dict(ours.patch_embed.norm.state_dict())
    for i, stage in enumerate(ours.stages):
        if i:
            swin.features[2 * i].load_state_dict(stage.downsample.state_dict())
        for mine, theirs in zip(stage.blocks, swin.features[2 * i + 1]):
            state = {
                k.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3"): v
                for k, v in mine.state_dict().items()
            }
            missing, unknown = theirs.load_state_dict(state, strict=False)
            assert not unknown and all("relative_position_index" in k for k in missing)
    return swin.eval()


@pytest.mark.parametrize("size, window, padded", [(96, 5, True), (60, 3, True), (96, 6, False)])
def test_stages_equal_torchvisions_swin(size, window, padded):
    from timm.models.swin_transformer import SwinTransformer

    stock = SwinTransformer(
        img_size=size,
        patch_size=2,
        num_classes=0,
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4),
        window_size=window,
        always_partition=True,
        drop_path_rate=0.0,
    ).eval()
    disturb(stock)
    ours = SwinBackbone(stock)
    reference, x, differs = torchvision_swin(ours, window), torch.randn(2, 3, size, size), []
    with torch.no_grad():
        a, b, c = ours.patch_embed(x), reference.features[0](x), ours.patch_embed(x)
        for i in range(4):
            if i:
                b = reference.features[2 * i](b)
            a, b, c = ours.stages[i](a), reference.features[2 * i + 1](b), stock.layers[i](c)
            # torchvision does not shift a map that fits into one window; the published Swin does
            if a.shape[1] > window:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
                differs.append(float((a - c).abs().max()) > 1e-2)
    assert any(differs) == padded, (
        "timm's own order must be seen to differ where, and only where, a map is padded"
    )


def test_a_map_within_one_window_is_still_shifted():
    """A naive block on a 3 x 3 map with a window of 4: pad to 4 x 4, roll by 2, attend within the parts that
    were neighbours."""
    from timm.models.swin_transformer import SwinTransformerStage

    from refseg_nb.models.lavt import SwinStage

    stage = SwinTransformerStage(
        4, 4, (3, 3), 2, downsample=False, num_heads=1, window_size=4, always_partition=True
    )
    disturb(stage)
    block, x = stage.blocks[1], torch.randn(1, 3, 3, 4)
    with torch.no_grad():
        got = SwinStage(stage).attend(block, x)
        big = F.pad(x, (0, 0, 0, 1, 0, 1)).roll((-2, -2), (1, 2))[0].flatten(0, 1)
        qkv = big @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = qkv.split(4, dim=-1)
        out = torch.zeros(16, 4)
        for n in range(16):
            # what lay on the same side of the edges
            same = [m for m in range(16) if (m // 4 < 2) == (n // 4 < 2) and (m % 4 < 2) == (n % 4 < 2)]
            bias = [
                block.attn.relative_position_bias_table[(n // 4 - m // 4 + 3) * 7 + n % 4 - m % 4 + 3, 0]
                for m in same
            ]
            weights = torch.stack([q[n] @ k[m] / 2 + b for m, b in zip(same, bias)]).softmax(0)
            out[n] = weights @ v[same]
        out = (
            (out @ block.attn.proj.weight.T + block.attn.proj.bias).view(4, 4, 4).roll((2, 2), (0, 1))[:3, :3]
        )
    torch.testing.assert_close(got[0], out, atol=1e-5, rtol=1e-5)


def official_swin(window=7):
    """The weights of a small Swin as its authors name them: merging at the end of a stage, an index in each
    block, a norm and a head."""
    ours = swin_backbone("swin-tiny", window, 64, weights="none")
    state = {f"patch_embed.{k}": torch.randn(v.shape) for k, v in ours.patch_embed.state_dict().items()}
    for i, stage in enumerate(ours.stages):
        for k, v in stage.state_dict().items():
            state[f"layers.{i - 1}.{k}" if k.startswith("downsample") else f"layers.{i}.{k}"] = torch.randn(
                v.shape
            )
        for j in range(len(stage.blocks)):
            state[f"layers.{i}.blocks.{j}.attn.relative_position_index"] = torch.zeros(
                window**2, window**2, dtype=torch.long
            )
    return state | {
        "norm.weight": torch.ones(64),
        "norm.bias": torch.zeros(64),
        "head.weight": torch.zeros(5, 64),
        "head.bias": torch.zeros(5),
    }


def test_swin_weights_are_read_in_their_authors_layout(tmp_path, monkeypatch):
    monkeypatch.setitem(SWINS, "swin-tiny", dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)))
    state = official_swin()
    torch.save({"model": state}, tmp_path / "swin.pth")
    swin = swin_backbone("swin-tiny", 7, 96, weights=tmp_path / "swin.pth")
    assert torch.equal(swin.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    for i in range(3):
        assert torch.equal(
            swin.stages[i + 1].downsample.reduction.weight, state[f"layers.{i}.downsample.reduction.weight"]
        )
    for k in ("attn.qkv.weight", "attn.relative_position_bias_table", "mlp.fc2.bias", "norm2.weight"):
        assert torch.equal(swin.stages[2].blocks[1].state_dict()[k], state[f"layers.2.blocks.1.{k}"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "swin.pth").rename(tmp_path / "checkpoints" / "swin_tiny_patch4_window7_224_22k.pth")
    found = swin_backbone("swin-tiny", 7, 96)  # where `refseg data fetch` puts such a file
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), swin.parameters()))
    del state["layers.1.blocks.0.mlp.fc1.weight"]
    torch.save({"model": state | {"layers.7.bias": torch.zeros(1)}}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"damaged.pth.*layers.7.bias.*layers.1.blocks.0.mlp.fc1.weight"):
        swin_backbone("swin-tiny", 7, 64, weights=tmp_path / "damaged.pth")


def test_bad_swins_are_named(tmp_path):
    for call, error, text in [
        (lambda: swin_backbone("swin-giant"), ValueError, "swin-giant"),
        (
            lambda: swin_backbone("swin-refshapes", weights=tmp_path / "no.safetensors"),
            FileNotFoundError,
            "pretrain_swin.*'none'",
        ),
        (lambda: swin_backbone("swin-base", weights=tmp_path / "no.pth"), FileNotFoundError, "no.pth"),
        (
            lambda: swin_backbone("swin-refshapes", 6, 32, weights="none")(torch.zeros(1, 3, 40, 32)),
            ValueError,
            "32 x 32",
        ),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_the_pretrained_small_swin_is_the_one_that_hears_words_later(tiny_root, tmp_path):
    result = pretrain_swin(
        tiny_root, tmp_path / "swin.safetensors", epochs=4, batch_size=8, limit=32, progress=False
    )
    assert result.losses[-1] < result.losses[0]
    assert [v.shape[1:] for v in result.backbone(torch.zeros(1, 3, 96, 96))] == [
        (16 << i, 24 >> i, 24 >> i) for i in range(4)
    ]
    model = create_model("lavt", vocab_size=VOCAB, backbone_weights=str(tmp_path / "swin.safetensors")).eval()
    assert (
        not model.backbone.frozen
        and model.backbone.state_dict().keys() == result.backbone.state_dict().keys()
    )
    x = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        maps = [model.encode(x)[0]]
        for stage in model.backbone.stages[1:]:
            maps.append(stage(maps[-1]))
        for a, b in zip(maps, result.backbone(x)):
            assert torch.equal(a.permute(0, 3, 1, 2), b)
    state = load_file(tmp_path / "swin.safetensors")
    save_file({k: v for k, v in state.items() if "stages.3" not in k}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors.*missing keys \(stages.3"):
        swin_backbone("swin-refshapes", 6, 96, weights=tmp_path / "cut.safetensors")


# --- pixel-word attention, gate, decoder, text ---


def instance_norm(x):
    "Each column of a list of rows: mean 0, variance 1, by hand."
    mean = x.sum(0) / len(x)
    return (x - mean) / (((x - mean) ** 2).sum(0) / len(x) + 1e-5).sqrt()


def pwam_by_hand(p, v, words, mask):
    """Equations 1 to 4 for one picture and one phrase, in loops; the masks stand where the published code
    has them."""
    q, k, u = instance_norm(p.query(v)), p.key(words) * mask[:, None], p.value(words) * mask[:, None]
    n, t, c, d = len(v), len(words), v.shape[1], v.shape[1] // p.heads
    attention, gathered = torch.zeros(p.heads, n, t), torch.zeros(n, c)
    for h in range(p.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            scores = [float(q[i, part] @ k[j, part]) * c**-0.5 + 1e4 * float(mask[j]) - 1e4 for j in range(t)]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            for j in range(t):
                attention[h, i, j] = weights[j] / sum(weights)
                gathered[i, part] += attention[h, i, j] * u[j, part]
    g = instance_norm(p.out(gathered))
    return F.gelu(p.mix(F.gelu(p.visual(v)) * g)), attention


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_pixel_word_attention_equals_loops(heads):
    module = disturb(PWAM(8, 6, heads))
    v, words, mask = (
        2 * torch.randn(2, 9, 8),
        2 * torch.randn(2, 5, 6),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(),
    )
    with torch.no_grad():
        f, attention = module(v, words, mask)
        for b in range(2):
            want, weights = pwam_by_hand(module, v[b], words[b], mask[b].float())
            torch.testing.assert_close(f[b], want, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(attention[b], weights, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="8 channels"):
        PWAM(8, 6, heads=3)


def test_a_phrase_of_one_token_says_nothing_and_begin_mends_it(tiny):
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    one, other = torch.tensor([[3]]), torch.tensor([[9]])
    dumb = create_model("lavt", vocab_size=VOCAB, begin=False).eval()
    with torch.no_grad():
        f1, f2 = (
            dumb.fusion[0](dumb.encode(image)[0].flatten(1, 2), *dumb.text(w)[:2])[0] for w in (one, other)
        )
        assert (f1 - f2).abs().max() < 1e-2
        assert (tiny(image, one) - tiny(image, other)).abs().max() > 1e-2


def test_gate_is_two_matrices_without_bias():
    gate, f = language_gate(5), torch.randn(3, 5)
    assert [tuple(p.shape) for p in gate.parameters()] == [(5, 5), (5, 5)]
    first, second = gate.parameters()
    torch.testing.assert_close(gate(f), torch.tanh((f @ first.T).clamp(min=0) @ second.T))


def aligned(x, size):
    "Bilinear up-sampling with aligned corners, pixel by pixel."
    b, c, n, _ = x.shape
    out = torch.zeros(b, c, size, size)
    for i in range(size):
        for j in range(size):
            y, z = i * (n - 1) / (size - 1), j * (n - 1) / (size - 1)
            y0, z0 = min(int(y), n - 2), min(int(z), n - 2)
            for dy in (0, 1):
                for dz in (0, 1):
                    out[..., i, j] += (
                        x[..., y0 + dy, z0 + dz] * abs(1 - dy - (y - y0)) * abs(1 - dz - (z - z0))
                    )
    return out


def test_decoder_goes_from_coarse_to_fine():
    decoder = disturb(TopDownDecoder([2, 3, 4, 6], width=5)).eval()
    maps = [torch.randn(1, c, s, s) for c, s in zip((2, 3, 4, 6), (12, 6, 3, 2))]

    def mix(block, x):
        for conv, norm in ((block[0], block[1]), (block[3], block[4])):
            x = F.conv2d(x, conv.weight, padding=1)
            x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
            x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
        return x

    with torch.no_grad():
        x = maps[3]
        for block, beside in zip(decoder.blocks, (maps[2], maps[1], maps[0])):
            x = mix(block, torch.cat([aligned(x, beside.shape[-1]), beside], 1))
        want = (
            torch.einsum("bchw,oc->bohw", x, decoder.classify.weight[..., 0, 0])
            + decoder.classify.bias[:, None, None]
        )
        torch.testing.assert_close(decoder(maps), want, atol=1e-5, rtol=1e-4)


def test_the_answer_is_enlarged_between_the_middles_of_places_and_begins_at_the_prior():
    scores = torch.randn(2, 2, 3, 3)
    logits = difference(scores)
    assert torch.equal(logits, scores[:, 1] - scores[:, 0])
    large = difference(scores, 2)
    for i in range(6):
        for j in range(6):
            at = [min(max((k + 0.5) / 2 - 0.5, 0), 2) for k in (i, j)]
            (y, fy), (x, fx) = ((min(int(p), 1), p - min(int(p), 1)) for p in at)
            want = sum(
                wy * wx * logits[:, y + dy, x + dx]
                for dy, wy in ((0, 1 - fy), (1, fy))
                for dx, wx in ((0, 1 - fx), (1, fx))
            )
            torch.testing.assert_close(large[:, i, j], want)
    decoder = TopDownDecoder([2, 3, 4, 6], width=5, prior=0.05)
    empty = difference(
        decoder.eval()([torch.zeros(1, c, s, s) for c, s in zip((2, 3, 4, 6), (12, 6, 3, 2))])
    ).sigmoid()
    torch.testing.assert_close(empty, torch.full_like(empty, 0.05))
    small, double = (
        create_model("lavt", vocab_size=VOCAB, factor=1).eval(),
        create_model("lavt", vocab_size=VOCAB).eval(),
    )
    double.load_state_dict(small.state_dict())
    images, words = torch.rand(1, 3, 96, 96), phrases(3, longest=3)
    with torch.no_grad():
        want = F.interpolate(small(images, words)[:, None], scale_factor=2, mode="bilinear")[:, 0]
        torch.testing.assert_close(double(images, words), want)


def test_text_does_not_depend_on_the_padding_and_begins_with_its_own_token():
    reader, words = bert_encoder(2, 16, 2, VOCAB, begin=True, weights="none").eval(), phrases(2, 4, longest=4)
    with torch.no_grad():
        short, long = reader(words), reader(F.pad(words, (0, 5)))
        bert = reader.bert(torch.cat([torch.full((1, 1), VOCAB), words[:1, :2]], 1)).last_hidden_state
    torch.testing.assert_close(short.words[short.mask], long.words[long.mask], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(short.words[0, :3], bert[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(short.sentence, short.words[:, 0])
    vectors = torch.randn(VOCAB, 16)
    table = bert_encoder(
        1, 16, 2, VOCAB, weights="none", vectors=vectors
    ).bert.embeddings.word_embeddings.weight
    assert torch.equal(table, vectors)
    with pytest.raises(ValueError, match=r"\[40, 16\]"):
        bert_encoder(1, 16, 2, VOCAB, weights="none", vectors=torch.zeros(VOCAB, 8))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        reader(words[0])


def test_a_published_bert_keeps_its_first_layers_and_its_dropout(tmp_path):
    whole = bert_encoder(3, 16, 2, VOCAB, weights="none")
    whole.bert.save_pretrained(tmp_path / "bert")
    part = bert_encoder(2, 16, 2, VOCAB, weights=str(tmp_path / "bert"))
    assert part.training and part.bert.training
    state = whole.state_dict()
    assert (
        all(torch.equal(v, state[k]) for k, v in part.state_dict().items())
        and len(part.bert.encoder.layer) == 2
    )


def test_loss_is_the_published_cross_entropy_over_two_scores():
    scores, truth = torch.randn(2, 2, 6, 6), torch.rand(2, 20, 20) > 0.6
    want = F.cross_entropy(
        F.interpolate(scores, 20, mode="bilinear", align_corners=True), truth.long(), torch.tensor([0.9, 1.1])
    )
    torch.testing.assert_close(weighted_loss(scores[:, 1] - scores[:, 0], truth.float()), want)


# --- the whole, from a published checkpoint, against a model built from other parts ---


def published_checkpoint(c, depths, heads, window, d, layers, vocab):
    "Random weights under the published names."
    both = lambda name, *shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    s = both("backbone.patch_embed.proj", c, 3, 4, 4) | both("backbone.patch_embed.norm", c)
    for i, (depth, h) in enumerate(zip(depths, heads)):
        n, at = c * 2**i, f"backbone.layers.{i}"
        for j in range(depth):
            b = f"{at}.blocks.{j}"
            for name, shape in [
                ("norm1", (n,)),
                ("norm2", (n,)),
                ("attn.qkv", (3 * n, n)),
                ("attn.proj", (n, n)),
                ("mlp.fc1", (4 * n, n)),
                ("mlp.fc2", (n, 4 * n)),
            ]:
                s |= both(f"{b}.{name}", *shape)
            s |= {
                f"{b}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, h),
                f"{b}.attn.relative_position_index": (window**2, window**2),
            }
        for name, width in [
            ("vis_project", n),
            ("image_lang_att.f_query", n),
            ("image_lang_att.f_key", d),
            ("image_lang_att.f_value", d),
            ("image_lang_att.W", n),
            ("project_mm", n),
        ]:
            s |= both(f"{at}.fusion.{name}.0", n, width, 1)
        s |= {f"{at}.res_gate.0.weight": (n, n), f"{at}.res_gate.2.weight": (n, n)} | both(
            f"backbone.norm{i}", n
        )
        if i < 3:
            s |= both(f"{at}.downsample.norm", 4 * n) | {f"{at}.downsample.reduction.weight": (2 * n, 4 * n)}
    for level, width in ((4, 12 * c), (3, 6 * c), (2, 5 * c)):
        for half, n in ((1, width), (2, 4 * c)):
            s |= {f"classifier.conv{half}_{level}.weight": (4 * c, n, 3, 3)} | both(
                f"classifier.bn{half}_{level}", 4 * c
            )
            s |= {
                f"classifier.bn{half}_{level}.running_mean": (4 * c,),
                f"classifier.bn{half}_{level}.running_var": (4 * c,),
                f"classifier.bn{half}_{level}.num_batches_tracked": (),
            }
    s |= (
        both("classifier.conv1_1", 2, 4 * c, 1, 1)
        | both("text_encoder.embeddings.LayerNorm", d)
        | {"text_encoder.embeddings.position_ids": (1, 512)}
    )
    s |= {
        f"text_encoder.embeddings.{k}_embeddings.weight": (n, d)
        for k, n in (("word", vocab), ("position", 512), ("token_type", 2))
    }
    for j in range(layers):
        b = f"text_encoder.encoder.layer.{j}"
        for name, shape in [
            ("attention.self.query", (d, d)),
            ("attention.self.key", (d, d)),
            ("attention.self.value", (d, d)),
            ("attention.output.dense", (d, d)),
            ("attention.output.LayerNorm", (d,)),
            ("intermediate.dense", (4 * d, d)),
            ("output.dense", (d, 4 * d)),
            ("output.LayerNorm", (d,)),
        ]:
            s |= both(f"{b}.{name}", *shape)

    def number(name, shape):
        if "num_batches" in name or "index" in name or "position_ids" in name:
            return torch.zeros(shape, dtype=torch.long)
        if "running_var" in name or (len(shape) == 1 and name.endswith("weight")):
            return torch.rand(shape) + 0.5
        return torch.randn(shape) * (0.3 if len(shape) == 1 else 1.5 / math.sqrt(math.prod(shape[1:])))

    return {name: number(name, shape) for name, shape in s.items()}


class Reference(nn.Module):
    """LAVT from other parts: torchvision's Swin, convolutions of one place, two scores; weights straight
    from the published names."""

    def __init__(self, state, model, window):
        super().__init__()
        self.s, self.swin, self.text = state, torchvision_swin(model.backbone, window), model.text.bert

    def conv(self, name, x):
        return F.conv1d(x, self.s[f"{name}.0.weight"], self.s[f"{name}.0.bias"])

    def fuse(self, at, v, words, m):
        "v [B, C, N], words [B, D, T], m [B, T]."
        q = F.instance_norm(self.conv(f"{at}.image_lang_att.f_query", v))
        k, u = (
            self.conv(f"{at}.image_lang_att.f_key", words) * m[:, None],
            self.conv(f"{at}.image_lang_att.f_value", words) * m[:, None],
        )
        a = (torch.einsum("bcn,bct->bnt", q, k) * v.shape[1] ** -0.5 + (1e4 * m - 1e4)[:, None]).softmax(-1)
        g = F.instance_norm(self.conv(f"{at}.image_lang_att.W", torch.einsum("bnt,bct->bcn", a, u)))
        return F.gelu(self.conv(f"{at}.project_mm", F.gelu(self.conv(f"{at}.vis_project", v)) * g))

    def forward(self, images, words):
        s, m = self.s, (words != 0).double()
        language = self.text(words, attention_mask=(words != 0).long()).last_hidden_state.transpose(1, 2)
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        x, maps = self.swin.features[0]((images - mean) / std), []
        for i in range(4):
            at = f"backbone.layers.{i}"
            x = self.swin.features[2 * i + 1](x)
            f = (
                self.fuse(f"{at}.fusion", x.flatten(1, 2).transpose(1, 2), language, m)
                .transpose(1, 2)
                .view_as(x)
            )
            maps.append(
                F.layer_norm(
                    f, f.shape[-1:], s[f"backbone.norm{i}.weight"], s[f"backbone.norm{i}.bias"]
                ).permute(0, 3, 1, 2)
            )
            x = (
                x
                + torch.tanh((f @ s[f"{at}.res_gate.0.weight"].T).relu() @ s[f"{at}.res_gate.2.weight"].T) * f
            )
            if i < 3:
                x = self.swin.features[2 * i + 2](x)
        x = maps[3]
        for level, beside in ((4, maps[2]), (3, maps[1]), (2, maps[0])):
            x = torch.cat(
                [F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=True), beside], 1
            )
            for half in (1, 2):
                x, bn = (
                    F.conv2d(x, s[f"classifier.conv{half}_{level}.weight"], padding=1),
                    f"classifier.bn{half}_{level}",
                )
                x = F.batch_norm(
                    x, s[f"{bn}.running_mean"], s[f"{bn}.running_var"], s[f"{bn}.weight"], s[f"{bn}.bias"]
                ).relu()
        return F.conv2d(x, s["classifier.conv1_1.weight"], s["classifier.conv1_1.bias"])


def test_logits_from_a_published_checkpoint_equal_those_of_other_parts():
    # maps 32, 16, 8, 4: padded to 33, 18, 9, 6, and none fits into a window
    config = replace(SMALL, window=3, image_size=128)
    file = published_checkpoint(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 16, 2, VOCAB)
    model = LAVT(config, VOCAB).eval()
    model.load_state_dict(load_published({"model": file}, config, VOCAB)[0])
    # in single precision these weights amplify rounding
    reference = Reference({k: v.double() for k, v in file.items()}, model, 3).double().eval()
    images, words = torch.rand(3, 3, 128, 128, dtype=torch.double), phrases(6, 3, 2)
    with torch.no_grad():
        scores, logits = reference(images, words), model.double()(images, words)
    want = scores[:, 1] - scores[:, 0]
    assert want.std() > 0.1
    torch.testing.assert_close(logits, want, atol=1e-8, rtol=1e-8)


def test_every_key_of_the_published_layout_is_accounted_for():
    config = replace(SMALL, window=5)
    file = published_checkpoint(16, (2, 2, 2, 2), (1, 2, 4, 8), 5, 16, 2, VOCAB)
    state, left_out = load_published(file, config, VOCAB)
    assert len(state) + sum(map(len, left_out.values())) == len(file)
    # position ids; the unused gate; an index for each of 8 blocks
    assert sorted(len(keys) for keys in left_out.values()) == [1, 2, 8]
    assert torch.equal(
        state["fusion.2.key.weight"], file["backbone.layers.2.fusion.image_lang_att.f_key.0.weight"][..., 0]
    )
    assert torch.equal(
        state["backbone.stages.3.downsample.norm.bias"], file["backbone.layers.2.downsample.norm.bias"]
    )
    two_files = {
        "model": {f"module.{k}": v for k, v in file.items() if not k.startswith("text_encoder.")},
        "bert_model": {
            k.removeprefix("text_encoder."): v for k, v in file.items() if k.startswith("text_encoder.")
        },
    }
    again, _ = load_published(two_files, config, VOCAB)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_a_damaged_checkpoint_is_an_error_that_lists_the_keys():
    config = replace(SMALL, window=5)
    file = published_checkpoint(16, (2, 2, 2, 2), (1, 2, 4, 8), 5, 16, 2, VOCAB)
    lost = [k for k in file if "res_gate" in k and "layers.3" not in k]
    with pytest.raises(ValueError, match="6 missing: gates.0.0.weight, .*gates.2.2.weight"):
        load_published({k: v for k, v in file.items() if k not in lost}, config, VOCAB)
    with pytest.raises(ValueError, match="2 unknown: head.bias, backbone.layers.0.fusion.other.weight"):
        load_published(
            file | {"head.bias": torch.zeros(2), "backbone.layers.0.fusion.other.weight": torch.zeros(2)},
            config,
            VOCAB,
        )
    with pytest.raises(ValueError, match=r"1 unknown: fusion\.9\.visual\.bias"):
        load_published(file | {"backbone.layers.9.fusion.vis_project.0.bias": torch.zeros(2)}, config, VOCAB)
    with pytest.raises(ValueError, match=r"word_embeddings.weight \[40, 16\] instead of \[41, 16\]"):
        load_published(file, config, VOCAB + 1)


# --- the contract of every model ---


def test_shared_encoding_gives_what_each_phrase_alone_gets(tiny):
    images, words, index = (
        torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8),
        phrases(6, 2, 4),
        torch.tensor([1, 0, 1]),
    )
    with torch.no_grad():
        features = tiny.encode(images)
        together, attention = tiny.segment(features, words, index, return_attention=True)
        for b in range(3):
            real = words[b][words[b] != 0][None]
            torch.testing.assert_close(
                together[b], tiny(images[index[b]][None], real)[0], atol=1e-5, rtol=1e-4
            )
        torch.testing.assert_close(
            tiny.segment(tiny.adapt(tiny.backbone(images)), words, index), together, atol=1e-6, rtol=1e-5
        )
        cut = attention.expression(1)
        alone = tiny.segment(tiny.encode(images[:1]), words[1:2, :2], return_attention=True)[1]
    with pytest.raises(ValueError, match="image_index"):
        tiny.segment(features, words)
    assert {s: tuple(a.shape) for s, a in attention.items()} == {
        i + 1: (3, 1, 24 >> i, 24 >> i, 7) for i in range(4)
    }
    for stage, a in attention.items():
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))
        assert (a[1, ..., 3:] == 0).all() and cut[stage].shape == (
            1,
            1,
            24 >> (stage - 1),
            24 >> (stage - 1),
            3,
        )
        torch.testing.assert_close(cut[stage], alone[stage], atol=1e-5, rtol=1e-4)


def test_heads_show_in_the_attention():
    model = create_model("lavt", vocab_size=VOCAB, heads=(1, 2, 4, 8)).eval()
    with torch.no_grad():
        attention = model.segment(
            model.encode(torch.zeros(1, 3, 96, 96)), phrases(3, longest=3), return_attention=True
        )[1]
    assert [attention[s].shape[1] for s in (1, 2, 3, 4)] == [1, 2, 4, 8]


def test_configuration_goes_to_json_and_back_and_bad_fields_are_named():
    for config in LAVT_PRESETS.values():
        assert LAVTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for values, text in [
        ({"windows": 7}, "windows"),
        ({"backbone": "vgg"}, "vgg"),
        ({"heads": (1, 1)}, "4 stages"),
        ({"trained_layers": 13}, "trained"),
    ]:
        with pytest.raises(ValueError, match=text):
            LAVTConfig.from_dict(values)
    with pytest.raises(ValueError, match="vocab_size"):
        create_model("lavt", "refshapes")
    with pytest.raises(ValueError, match="huge"):
        create_model("lavt", "huge")


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = create_model("lavt", vocab_size=VOCAB, trained_layers=1, text_layers=2)
    weighted_loss(
        model(torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), phrases(3, 5)),
        (torch.rand(2, 96, 96) > 0.5).float(),
    ).backward()
    without = sorted(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("text.")}
    assert trained and all(n.startswith("text.bert.encoder.layer.0.") for n in trained)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_two_scenes_are_learnt_by_heart(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    vocabulary = vocabulary_for(refer)
    data = RISDataset(refer, "val", vocabulary)
    batch = data[[(g, data.groups[g][1][:2]) for g in (0, 1)]]
    model = create_model("lavt", vocab_size=len(vocabulary))
    objective, optimizer = Objective(model), torch.optim.AdamW(model.parameter_groups(), lr=2e-3)
    for _ in range(30):
        loss = objective(batch.images, None, batch.words, batch.image_index, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted, true = model.eval()(batch.images, batch.words, batch.image_index) > 0, batch.targets > 0.5
    iou = (predicted & true).sum((1, 2)) / (predicted | true).sum((1, 2))
    assert iou.mean() > 0.6


def test_a_saved_model_is_read_back(tiny, tmp_path):
    vocabulary = Vocabulary(Counter([f"w{i}" for i in range(VOCAB - 2)]))

    def create(stored):
        assert stored["model"] == "lavt" and stored["backbone_stored"]
        return (
            LAVT(
                LAVTConfig.from_dict(stored["config"] | {"backbone_weights": "none", "text_weights": "none"}),
                VOCAB,
            ),
            vocabulary,
        )

    save_model(tmp_path / "model", tiny, vocabulary, {"model": "lavt"})
    model, _, _ = load_model(tmp_path / "model", create)
    images, words = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8), phrases(3, longest=3)
    with torch.no_grad():
        assert torch.equal(model(images, words), tiny(images, words)) and model.config == replace(
            tiny.config, backbone_weights="none", text_weights="none"
        )


@pytest.mark.slow
def test_a_training_step_at_the_published_size():
    model = create_model("lavt", "base", backbone_weights="none", text_weights="none").train()
    words = torch.randint(1, 30_522, (1, 20))
    loss = weighted_loss(
        model(torch.randint(0, 256, (1, 3, 480, 480), dtype=torch.uint8), words),
        (torch.rand(1, 480, 480) > 0.9).float(),
    )
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) if p.requires_grad else p.grad is None, name


# --- WordPieces ---


def test_word_pieces_equal_greedy_longest_match():
    def by_hand(word):
        """BERT's WordPiece: the longest piece from the left, again and again; [UNK] for the whole word if
        that fails."""
        out, start = [], 0
        while start < len(word):
            end = next(
                (e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in PIECES),
                None,
            )
            if end is None:
                return ["[UNK]"]
            out.append(("##" if start else "") + word[start:end])
            start = end
        return out

    pieces = WordPieces(PIECES)
    for text in ("the taller chimney", "THE Red car !", "chimneys", "car car the taller red boat", ""):
        want = ["[CLS]", *(p for word in text.lower().split() for p in by_hand(word)), "[SEP]"]
        assert pieces.decode(pieces.encode(text)).split() == want
    assert pieces.decode(pieces.encode("Red, car!")) == "[CLS] red [UNK] car ! [SEP]"


def test_the_two_ways_to_cut():
    ours, lavt = WordPieces(PIECES), WordPieces(PIECES, "lavt")
    for n in range(25):
        text = " ".join(["red"] * n)
        a, b = ours.encode(text), lavt.encode(text)
        assert a[0] == b[0] == 2 and len(a) == len(b) == min(n + 2, 20) and 0 not in a
        assert a[-1] == 3 and (b[-1] == 3) == (n <= 18)
    with pytest.raises(ValueError, match="max_words"):
        ours.encode("red", 2)


def test_word_pieces_report_store_and_refuse(tmp_path):
    pieces = WordPieces(PIECES, "lavt")
    numbers, report = pieces.encode_all(["the taller chimney", "a red car", "", "red"], 5)
    assert [len(n) for n in numbers] == [5, 5, 2, 3]
    assert (report.expressions, report.words, report.unknown, report.empty, report.cut, report.longest) == (
        4,
        7 + 5 + 2 + 3,
        1,
        1,
        1,
        7,
    )
    assert pieces.encode_all([], 5)[1].longest == 0
    back = WordPieces.from_json(pieces.to_json())
    assert (
        back == pieces != WordPieces(PIECES)
        and back.fingerprint == pieces.fingerprint != WordPieces(PIECES).fingerprint
    )
    assert back.encode("the taller chimney", 5) == numbers[0] and len(back) == len(PIECES)
    assert "taller" in pieces and "boat" not in pieces and "" not in pieces
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    assert WordPieces.from_file(tmp_path / "vocab.txt", "lavt") == pieces
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(PIECES)))
    with pytest.raises(ValueError, match=r"vocab.txt: the first piece must be \[PAD\]"):
        WordPieces.from_file(tmp_path / "vocab.txt")
    with pytest.raises(FileNotFoundError, match="none.txt"):
        WordPieces.from_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"\[UNK\], \[CLS\], \[SEP\]"):
        WordPieces(["[PAD]", "red"])
    with pytest.raises(ValueError, match="protocol"):
        WordPieces(PIECES, "bert")
    for text in ("", "[]", '{"pieces": ["[PAD]"]}'):
        with pytest.raises(ValueError, match="to_json"):
            WordPieces.from_json(text)


def test_a_data_set_reads_with_word_pieces(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    words = sorted({t for s in refer.samples("val") for t in s.sentence.tokens})
    pieces = WordPieces([*PIECES[:4], *words])
    data = RISDataset(refer, "val", pieces, max_words=20)
    assert data.report.unknown == 0 and data.words.shape[1] <= 20
    assert (data.words[:, 0] == 2).all() and ((data.words == 3).sum(1) == 1).all()
    assert pieces.decode(data.words[0]).split()[1:-1] == list(data.samples[0].sentence.tokens)
