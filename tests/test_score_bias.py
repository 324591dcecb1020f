"""The learned numbers that SFM may add to its scores, and GroupNorm in BatchNorm's place: against plain loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refseg_nb.attention.maps import look, weight_steps
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import vocabulary_for
from refseg_nb.inference.segmenter import load
from refseg_nb.models.decoder import LevelAdapter, use_group_norm
from refseg_nb.models.hub import load_model, save_model
from refseg_nb.models.registry import create_model, list_models, model_config
from refseg_nb.models.sfm import SFM, JointAttention, ScoreBias
from refseg_nb.refshapes.dataset import tiny_data

GRID, WORDS, HEADS, CHANNELS = 3, 4, 2, 8
TOKENS = GRID**2 + WORDS


def random_bias(relative=True, words=0.5):
    bias = ScoreBias(HEADS, GRID, relative, words)
    with torch.no_grad():
        for p in bias.parameters():
            p.copy_(torch.randn_like(p))
    return bias


def bias_by_loops(bias, head, query, key):
    "What is added to one score, from the definition."
    pixels = GRID**2
    if query >= pixels:
        return 0.0
    if key >= pixels:
        return 0.0 if bias.words is None else float(bias.words[head])
    if bias.relative is None:
        return 0.0
    dy, dx = query // GRID - key // GRID, query % GRID - key % GRID
    table = bias.relative[head].view(2 * GRID - 1, 2 * GRID - 1)
    return float(table[dy + GRID - 1, dx + GRID - 1])


@pytest.mark.parametrize("relative, words", [(True, 0.5), (True, None), (False, 0.5)])
def test_bias_is_its_definition(relative, words):
    torch.manual_seed(0)
    bias = random_bias(relative, words).requires_grad_(False)
    found = bias(TOKENS)
    assert found.shape == (HEADS, TOKENS, TOKENS)
    for head in range(HEADS):
        for query in range(TOKENS):
            for key in range(TOKENS):
                expected = bias_by_loops(bias, head, query, key)
                assert float(found[head, query, key]) == pytest.approx(expected)


def test_attention_with_bias_against_loops():
    torch.manual_seed(1)
    attention = JointAttention(CHANNELS, HEADS, bias=random_bias()).eval().requires_grad_(False)
    bias = attention.bias
    x, where = torch.randn(2, TOKENS, CHANNELS), torch.randn(TOKENS, CHANNELS)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, -2:] = False
    y, looked = attention(x, where, mask, return_attention=True)
    q, k, v = attention.qkv(x + where).chunk(3, dim=-1)
    d = CHANNELS // HEADS
    for b in range(2):
        for n in range(TOKENS):
            parts = []
            for h in range(HEADS):
                part, keys = slice(h * d, (h + 1) * d), [m for m in range(TOKENS) if mask[b, m]]
                scores = [
                    float(q[b, n, part] @ k[b, m, part]) / math.sqrt(d) + bias_by_loops(bias, h, n, m)
                    for m in keys
                ]
                weights = torch.tensor(scores).softmax(0)
                assert torch.allclose(looked.weights[b, h, n, keys], weights, atol=1e-5)
                parts.append(sum(w * v[b, m, part] for w, m in zip(weights, keys)))
            assert torch.allclose(y[b, n], attention.out(torch.cat(parts)), atol=1e-5)
    assert torch.allclose(attention(x, where, mask)[0], y, atol=1e-5), "the fused kernel gives the same"
    assert torch.allclose(attention(x, where)[0], attention(x, where, None, True)[0], atol=1e-5)


def test_a_bias_of_log_pixels_over_words_gives_words_half_of_the_weight():
    "Where all scores are alike, T words beside HW positions get T / (HW + T); the bias makes it one half."
    plain = JointAttention(CHANNELS, HEADS)
    biased = JointAttention(CHANNELS, HEADS, bias=ScoreBias(HEADS, GRID, False, math.log(GRID**2 / WORDS)))
    for attention, share in ((plain, WORDS / TOKENS), (biased, 0.5)):
        torch.nn.init.zeros_(attention.qkv.weight)
        _, looked = attention(torch.randn(1, TOKENS, CHANNELS), None, None, True)
        to_words = looked.weights[..., : GRID**2, GRID**2 :].sum(-1)
        assert torch.allclose(to_words, torch.full_like(to_words, share), atol=1e-6)


def test_a_new_relative_bias_changes_nothing_and_learns():
    torch.manual_seed(2)
    plain = SFM(CHANNELS, GRID, layers=2, heads=HEADS)
    biased = SFM(CHANNELS, GRID, layers=2, heads=HEADS, relative=True)
    biased.load_state_dict(plain.state_dict(), strict=False)
    maps, words = torch.randn(2, CHANNELS, GRID, GRID), torch.randn(2, WORDS, CHANNELS)
    assert torch.allclose(plain(maps, words)[0], biased(maps, words)[0], atol=1e-6)
    biased(maps, words)[0].square().sum().backward()
    tables = [layer.attention.bias.relative for layer in biased.layers]
    assert len(tables) == 2 and all(t.grad.abs().sum() > 0 for t in tables)


def test_model_with_the_aids_is_stored_and_read(tmp_path):
    torch.manual_seed(3)
    refer = Refer(tiny_data(), "refshapes")
    vocabulary = vocabulary_for(refer)
    aids = dict(sfm_relative=True, sfm_word_bias=2.5, norm_groups=8)
    model = create_model("shnet", vocab_size=len(vocabulary), preset="refshapes", **aids).eval()
    images, words = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), torch.randint(1, 9, (2, 4))
    logits, attention = model.segment(model.encode(images), words, return_attention=True)
    save_model(tmp_path / "m", model, vocabulary)
    again, _, _ = load_model(tmp_path / "m")
    assert replace(again.config, backbone_weights=None) == model.config
    assert torch.equal(again(images, words), model(images, words))
    assert torch.allclose(model(images, words), logits, atol=1e-4)


def test_steps_of_a_biased_weight_against_products_by_hand(tmp_path):
    "q·k is computed from the module's own weights; what was added is the table's number."
    torch.manual_seed(5)
    vocabulary = vocabulary_for(Refer(tiny_data(), "refshapes"))
    model = create_model(
        "shnet", vocab_size=len(vocabulary), preset="refshapes", grid=6, sfm_relative=True, sfm_word_bias=1.5
    ).eval()
    for layer in model.sfm[0].layers:
        nn.init.normal_(layer.attention.bias.relative)
    save_model(tmp_path / "m", model, vocabulary)
    seg = load(tmp_path / "m", device="cpu")
    seen = []
    layer = seg.model.sfm[0].layers[1].attention
    layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs))
    answer, maps = look(
        seg.encode(torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8).numpy()), "the red ball"
    )
    x, where = seen[-1][0], seen[-1][1]
    q, k, _ = layer.qkv(x + where).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    for level, head, query in [(2, 0, 7), (3, 1, 20), (4, 0, 36)]:
        products = (q[level - 2, head, query] @ k[level - 2, head].T).detach().numpy()
        steps = weight_steps(maps, level, 1, head, query)
        assert np.allclose(steps["product"], products, atol=2e-2)
        assert np.allclose(steps["scaled"], products / 32**0.5, atol=4e-3)
        if query == 36:  # a word
            assert not steps["bias"].any()
            continue
        for key in (0, 7, 13, 35):
            (y, x_), (y2, x2) = divmod(query, 6), divmod(key, 6)
            number = layer.bias.relative[head].view(11, 11)[y - y2 + 5, x_ - x2 + 5]
            assert steps["bias"][key] == pytest.approx(number.item(), abs=1e-6)
        assert np.allclose(steps["bias"][36:], 1.5)
        total = steps["scaled"] + steps["bias"]
        assert np.allclose(np.exp(total) / np.exp(total).sum(), steps["weight"], atol=1e-5)


def test_group_norm_in_the_place_of_batch_norm():
    torch.manual_seed(4)
    adapter, level = use_group_norm(LevelAdapter(5, 8, 4), 2), torch.randn(3, 5, 9, 9)
    x = adapter.conv(F.adaptive_max_pool2d(level, 8))
    normed = torch.stack(
        [
            torch.cat([(p - p.mean()) / (p.var(unbiased=False) + 1e-5).sqrt() for p in image.split(4)])
            for image in x
        ]
    )
    assert torch.allclose(adapter(level), F.leaky_relu(normed, 0.01), atol=1e-5)
    with pytest.raises(ValueError, match="8 channels .* 3 groups"):
        use_group_norm(LevelAdapter(5, 8, 4), 3)


@pytest.mark.parametrize(
    "row", ["shnet", "baseline", "only-hcam", "only-sfm", "sfm-convlstm", "mgate", "tgfe"]
)
def test_no_batch_norm_is_left_outside_the_backbone(row):
    name = row if row in list_models() else next(n for n in list_models() if row in n)
    model = create_model(name, vocab_size=9, preset="refshapes", norm_groups=8)
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(n.startswith("backbone") for n in norms)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())
    images, words = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8), torch.randint(1, 9, (3, 4))
    features, index = model.train().encode(images), torch.zeros(3, dtype=torch.long)
    together, alone = model.segment(features, words, index), model.segment(features, words[:1], index[:1])
    assert torch.allclose(together[:1], alone, atol=1e-4), "an answer does not depend on the others"


def test_published_presets_have_no_aid():
    for preset in ("paper", "released", "refshapes"):
        config = model_config("shnet", preset)
        assert (config.sfm_relative, config.sfm_word_bias, config.norm_groups) == (False, None, 0)
