"""CrossVLT: each block against loops written from its equations, the whole against a plain walk through the
stages, and the published layout name by name."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")
pytest.importorskip("transformers")

from refseg_nb.models.cost import count_parameters
from refseg_nb.models.crossvlt import (
    BERT_NAMES,
    CROSSVLT_PRESETS,
    CROSSVLT_RECIPES,
    MHCA,
    BertBlock,
    CrossVLT,
    CrossVLTConfig,
    LanguageStage,
    alignment_loss,
    attend,
    load_published,
    similarity_map,
)
from refseg_nb.models.lavt import SWINS
from refseg_nb.models.losses import weighted_loss
from refseg_nb.models.registry import create_model

DEAD = 2 * 1024**2  # the released gate after the last stage, which nothing reads
TINY = replace(CROSSVLT_PRESETS["refshapes"], backbone_weights="none", window=3, factor=1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return create_model("crossvlt", "base", backbone_weights="none", text_weights="none")


def shaken(module):
    "No parameter at a value that hides a swap (ones of a norm, zeros of a bias)."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in module.named_buffers():
            if name.endswith("running_var"):
                b.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                b.normal_()
    return module.eval()


def tiny(**changes):
    return shaken(CrossVLT(replace(TINY, **changes), 30))


def batch(b=3, k=2, t=5, size=96):
    images = torch.randint(0, 256, (k, 3, size, size), dtype=torch.uint8)
    words = torch.randint(1, 30, (b, t))
    for row in range(1, b):
        words[row, t - row :] = 0
    return images, words, torch.arange(b) % k


# ---- blocks against loops


def naive_attend(q, k, v, heads):
    "One picture, one phrase, number by number."
    d = q.shape[1] // heads
    out = torch.zeros(len(q), v.shape[1], dtype=q.dtype)
    for n in range(len(q)):
        for h in range(heads):
            scores = [
                sum(q[n, c].item() * k[m, c].item() for c in range(h * d, (h + 1) * d)) / math.sqrt(d)
                for m in range(len(k))
            ]
            parts = [math.exp(s - max(scores)) for s in scores]
            for c in range(h * d, (h + 1) * d):
                out[n, c] = sum(p / sum(parts) * v[m, c].item() for m, p in enumerate(parts))
    return out


def naive_norm(x, eps=1e-5):
    "Each column of [N, C] to mean 0 and variance 1."
    x = x.clone()
    for c in range(x.shape[1]):
        mean = sum(x[:, c].tolist()) / len(x)
        variance = sum((a - mean) ** 2 for a in x[:, c].tolist()) / len(x)
        x[:, c] = (x[:, c] - mean) / math.sqrt(variance + eps)
    return x


def gelu(x):
    return torch.tensor(
        [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in x.flatten().tolist()], dtype=x.dtype
    ).view_as(x)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attend_equals_loops_with_and_without_weights_and_never_looks_at_padding(heads):
    q, k, v = (torch.randn(2, n, 6, dtype=torch.double) for n in (4, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    fused, none = attend(q, k, v, heads, mask)
    plain, weights = attend(q, k, v, heads, mask, return_weights=True)
    assert none is None and weights.shape == (2, heads, 4, 5) and (weights[1, ..., 2:] == 0).all()
    for y in (fused, plain):
        assert torch.allclose(y[0], naive_attend(q[0], k[0], v[0], heads), atol=1e-10)
        assert torch.allclose(y[1], naive_attend(q[1], k[1, :2], v[1, :2], heads), atol=1e-10)


def test_attention_dropout_acts_only_in_training():
    block = BertBlock(8, 2, 12, dropout=0.5)
    x = torch.randn(1, 6, 8)
    assert not torch.equal(block(x, x)[0], block(x, x)[0])
    block.eval()
    assert torch.equal(block(x, x)[0], block(x, x)[0])


def test_mhca_equals_loops_from_its_equations():
    m = shaken(MHCA(6, 8, 5, heads=2).double())
    x, words = torch.randn(2, 7, 6, dtype=torch.double), torch.randn(2, 4, 5, dtype=torch.double)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    with torch.no_grad():
        got, weights = m(x, words, mask, return_weights=True)
        for b, t in ((0, 4), (1, 3)):
            y = naive_attend(naive_norm(m.query(x[b])), m.key(words[b, :t]), m.value(words[b, :t]), 2)
            assert torch.allclose(got[b], gelu(m.mix(naive_norm(m.out(y)) + x[b])), atol=1e-9)
    assert (
        torch.allclose(weights.sum(-1), torch.ones(2, 2, 7, dtype=torch.double))
        and (weights[1, ..., 3] == 0).all()
    )


def test_a_lone_word_is_not_heard_but_two_are():
    m, x = shaken(MHCA(6, 8, 5, heads=2).double()), torch.randn(1, 7, 6, dtype=torch.double)
    one, other = torch.randn(2, 1, 1, 5, dtype=torch.double)
    cls = torch.randn(1, 1, 5, dtype=torch.double)
    assert torch.allclose(m(x, one)[0], m(x, other)[0], atol=1e-8)
    assert (m(x, torch.cat([cls, one], 1))[0] - m(x, torch.cat([cls, other], 1))[0]).abs().max() > 1e-2


def test_the_model_hears_a_phrase_of_one_word():
    model = tiny()
    image, _, _ = batch()
    with torch.no_grad():
        a, b = model(image[:1].expand(2, -1, -1, -1), torch.tensor([[3], [4]]))
    assert (a - b).abs().max() > 1e-3


def test_bert_block_is_a_layer_of_bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=9, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20
    )
    bert = shaken(BertModel(config, add_pooling_layer=False))
    theirs, block = bert.encoder.layer[0].state_dict(), BertBlock(12, 3, 20).eval()
    names = {
        f"{mine}.{kind}": f"{name}.{kind}" for mine, name in BERT_NAMES.items() for kind in ("weight", "bias")
    }
    assert set(names.values()) == set(theirs)
    block.load_state_dict({mine: theirs[name] for mine, name in names.items()})
    words = torch.tensor([[2, 3, 4, 5, 6], [7, 8, 2, 0, 0]])
    with torch.no_grad():
        want = bert(words, attention_mask=(words != 0).long()).last_hidden_state
        x = bert.embeddings(words)
        for return_weights in (False, True):
            assert torch.allclose(
                block(x, x, words != 0, return_weights)[0][words != 0], want[words != 0], atol=1e-5
            )


def test_a_language_stage_asks_the_picture_then_itself_and_padding_reaches_no_word():
    stage = shaken(LanguageStage(6, 2, 4).double())
    words, places = torch.randn(1, 3, 6, dtype=torch.double), torch.randn(1, 5, 4, dtype=torch.double)
    x = words[0]
    with torch.no_grad():
        for block, asked in ((stage.ask, places[0]), (stage.read, None)):
            y = naive_attend(
                block.query(x),
                block.key(x if asked is None else asked),
                block.value(x if asked is None else asked),
                2,
            )
            x = F.layer_norm(x + block.out(y), (6,), block.norm1.weight, block.norm1.bias, 1e-12)
            hidden = gelu(block.ffn[0](x))
            x = F.layer_norm(x + block.ffn[2](hidden), (6,), block.norm2.weight, block.norm2.bias, 1e-12)
        got, looks = stage(words, torch.ones(1, 3, dtype=torch.bool), places, return_weights=True)
        padded, _ = stage(
            F.pad(words, (0, 0, 0, 2), value=9.0), torch.tensor([[True] * 3 + [False] * 2]), places
        )
    assert torch.allclose(got[0], x, atol=1e-9) and looks.shape == (1, 2, 3, 5)
    assert torch.allclose(padded[:, :3], got, atol=1e-9)


def test_similarity_and_alignment_loss_equal_loops():
    v, c, target = (
        torch.randn(2, 3, 3, 4, dtype=torch.double),
        torch.randn(2, 4, dtype=torch.double),
        (torch.rand(2, 5, 5) > 0.5).double(),
    )
    s = similarity_map(v, c, 0.5)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        cosine = float(v[b, y, x] @ c[b]) / math.sqrt(float(v[b, y, x] @ v[b, y, x]) * float(c[b] @ c[b]))
        assert math.isclose(float(s[b, y, x]), cosine / 0.5, rel_tol=1e-6)
    total = 0.0
    # corners aligned: 5 samples over 3 are halves
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
        (y0, fy), (x0, fx) = ((int(p), p - int(p)) for p in (y / 2, x / 2))
        z = sum(
            wy * wx * float(s[b, min(y0 + dy, 2), min(x0 + dx, 2)])
            for dy, wy in ((0, 1 - fy), (1, fy))
            for dx, wx in ((0, 1 - fx), (1, fx))
        )
        t = float(target[b, y, x])
        total += -(t * math.log(1 / (1 + math.exp(-z))) + (1 - t) * math.log(1 / (1 + math.exp(z))))
    assert math.isclose(float(alignment_loss([s], target)), total / 50, rel_tol=1e-6)
    assert torch.allclose(alignment_loss([s, s, s], target), 3 * alignment_loss([s], target))


def test_alignment_at_temperature_one_has_the_floor_that_published_curves_have():
    target = (torch.rand(1, 8, 8) > 0.9).float()
    best = alignment_loss([2 * target - 1], target)
    assert math.isclose(float(best), math.log1p(math.exp(-1)), rel_tol=1e-5) and 0.31 < float(best) < 0.32


# ---- the whole


def plain_walk(model, image, words):
    """One picture and one phrase without padding, stage by stage in the published order: logits and
    similarity maps."""
    ones = torch.ones(1, words.shape[1] + 1, dtype=torch.bool)
    maps, similar = [], []
    # lang 1
    l = (
        model.text[0]
        .bert(F.pad(words, (1, 0), value=model.text[0].bert.config.vocab_size - 1))
        .last_hidden_state
    )
    v = model.backbone.patch_embed(model.backbone.normalise(image))
    for i in range(4):
        if i:
            l = model.text[i].ask(l, v.flatten(1, 2))[0]  # lang i + 1
            l = model.text[i].read(l, l, ones)[0]
        v = model.backbone.stages[i].run(v)  # vis i + 1
        a, c = model.align_places[i](v), model.align_words[i](l[:, 0])
        similar.append((a * c).sum(-1) / (a.norm(dim=-1) * c.norm(dim=-1)) / model.temperature[i])
        f = model.fusion[i](v.flatten(1, 2), l)[0].reshape(v.shape)
        maps.append(
            F.layer_norm(f, f.shape[-1:], model.norms[i].weight, model.norms[i].bias).permute(0, 3, 1, 2)
        )
        if i == 3:
            break
        gate = torch.tanh(F.relu(f @ model.gates[i][0].weight.T) @ model.gates[i][2].weight.T)
        v = model.backbone.stages[i + 1].downsample(v + gate * f)
        f = model.merged_fusion[i](v.flatten(1, 2), l)[0].reshape(v.shape)
        v = (
            v
            + torch.tanh(F.relu(f @ model.merged_gates[i][0].weight.T) @ model.merged_gates[i][2].weight.T)
            * f
        )
    x = maps[3]
    for block, beside in zip(model.decoder.blocks, maps[2::-1]):
        x = block(
            torch.cat([F.interpolate(x, beside.shape[-1], mode="bilinear", align_corners=True), beside], 1)
        )
    scores = model.decoder.classify(x)
    return scores[:, 1] - scores[:, 0], similar


def test_the_model_equals_a_plain_walk_through_the_stages_for_each_expression():
    model = tiny().double()
    images, words, index = batch()
    with torch.no_grad():
        logits, seen = model.segment(model.encode(images), words, index, return_attention=True)
        for b in range(len(words)):
            alone, similar = plain_walk(model, images[index[b]][None], words[b][words[b] != 0][None])
            assert torch.allclose(logits[b], alone[0], rtol=1e-7, atol=1e-7)
            for i, s in enumerate(similar):
                assert torch.allclose(seen.similarity[i + 1][b], s[0], atol=1e-7)
        assert torch.allclose(model.segment(model.encode(images), words, index), logits)
        assert torch.allclose(model(images, words, index), logits)


def test_the_picture_changes_the_words_from_stage_2_on():
    model = tiny()
    images, words, _ = batch()
    states = []
    for image in images:
        seen = []
        hooks = [
            stage.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out[0]))
            for stage in model.text
        ]
        with torch.no_grad():
            model(image[None], words[:1])
        for hook in hooks:
            hook.remove()
        states.append(seen)
    gaps = [float((a - b).abs().max()) for a, b in zip(*states)]
    assert gaps[0] == 0 and min(gaps[1:]) > 1e-3


def test_attention_has_both_directions_with_documented_shapes_and_rows_of_one():
    model = tiny()
    images, words, index = batch()
    with torch.no_grad():
        _, seen = model.segment(model.encode(images), words, index, return_attention=True)
    t = words.shape[1] + 1  # the model's own [CLS]
    assert {i: tuple(w.shape) for i, w in seen.places.items()} == {
        1: (3, 2, 24, 24, t),
        2: (3, 2, 12, 12, t),
        3: (3, 4, 6, 6, t),
        4: (3, 8, 3, 3, t),
    }
    assert {i: tuple(w.shape) for i, w in seen.merged.items()} == {
        1: (3, 2, 12, 12, t),
        2: (3, 4, 6, 6, t),
        3: (3, 8, 3, 3, t),
    }
    assert {i: tuple(w.shape) for i, w in seen.words.items()} == {
        2: (3, 2, t, 12, 12),
        3: (3, 2, t, 6, 6),
        4: (3, 2, t, 3, 3),
    }
    assert {i: tuple(s.shape) for i, s in seen.similarity.items()} == {
        1: (3, 24, 24),
        2: (3, 12, 12),
        3: (3, 6, 6),
        4: (3, 3, 3),
    }
    for w in (*seen.places.values(), *seen.merged.values()):
        assert (
            torch.allclose(w.sum(-1), torch.ones(w.shape[:-1]), atol=1e-5)
            and (w.amax((1, 2, 3))[~seen.mask] == 0).all()
        )
    for w in seen.words.values():
        assert torch.allclose(w.sum((-2, -1)), torch.ones(w.shape[:3]), atol=1e-5)
    one = seen.expression(2)
    real = int((words[2] != 0).sum()) + 1
    assert (
        one.mask.shape == (1, real)
        and one.mask.all()
        and one.places[3].shape[-1] == real == one.words[2].shape[2]
    )
    assert torch.equal(one.words[4][0], seen.words[4][2][:, :real]) and torch.equal(
        one.similarity[1][0], seen.similarity[1][2]
    )


def test_losses_are_the_published_sum_and_pass_the_masks_comparison_through():
    model = tiny()
    images, words, index = batch()
    masks = (torch.rand(3, 48, 48) > 0.8).float()
    with torch.no_grad():
        features = model.encode(images)
        logits, seen = model.segment(features, words, index, return_attention=True)
        losses = model.losses(features, words, index, masks, mask_loss=weighted_loss)
        scores = torch.stack([torch.zeros_like(logits), logits], 1)
        up = F.interpolate(scores, 48, mode="bilinear", align_corners=True)
        cross_entropy = F.cross_entropy(up, masks.long(), torch.tensor([0.9, 1.1]))
    assert set(losses) == {"mask", "alignment"}
    assert torch.allclose(losses["mask"], 2 * cross_entropy, rtol=1e-4)
    assert torch.allclose(
        losses["alignment"], alignment_loss(list(seen.similarity.values()), masks), rtol=1e-4
    )
    with torch.no_grad():
        without = tiny(alignment_weight=0.0)
        assert list(without.losses(features, words, index, torch.rand(3, 24, 24))) == ["mask"]
        half = model.losses(features, words, index, torch.rand(3, 24, 24))
    assert all(math.isfinite(float(x)) for x in half.values())


@pytest.mark.parametrize("train_embeddings", [True, False])
def test_everything_that_is_trained_gets_a_finite_gradient_and_nothing_else(train_embeddings):
    model = CrossVLT(replace(TINY, train_embeddings=train_embeddings), 30).train()
    images, words, index = batch()
    sum(model.losses(model.encode(images), words, index, torch.rand(3, 24, 24)).values()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
        else:
            assert p.grad is None and "embeddings" in name, name
    assert model.temperature.grad.abs().min() > 0


def test_the_small_model_learns_two_pictures_by_heart():
    model = CrossVLT(TINY, 30).train()
    images = torch.full((2, 3, 96, 96), 60, dtype=torch.uint8)
    target = torch.zeros(4, 24, 24)
    # two squares of different colours a picture
    for b, (y, x) in enumerate(((2, 2), (12, 14), (4, 14), (14, 4))):
        images[b // 2, b % 2, 4 * y : 4 * y + 32, 4 * x : 4 * x + 32] = 230
        target[b, y : y + 8, x : x + 8] = 1
    words, index = torch.tensor([[2], [3], [2], [3]]), torch.tensor([0, 0, 1, 1])
    optimizer, first = torch.optim.AdamW(model.parameters(), 2e-3), None
    for _ in range(40):
        losses = model.losses(model.encode(images), words, index, target)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        first = first or {name: loss.item() for name, loss in losses.items()}
    with torch.no_grad():
        predicted = model.eval()(images, words, index) > 0
    iou = (predicted & (target > 0)).sum((1, 2)) / (predicted | (target > 0)).sum((1, 2))
    assert iou.min() > 0.8 and losses["alignment"] < 0.8 * first["alignment"]


# ---- sizes and names


def test_parameters_by_part_are_the_published_ones(base):
    assert count_parameters(base) == {
        "Swin": 86_876_536,
        "language stage 1": 66_561_280,
        "language stage 2": 13_586_176,
        "language stage 3": 13_979_392,
        "language stage 4": 14_765_824,
        "fusion": 14_256_640,
        "gates": 5_537_792 - DEAD,
        "norms": 3_840,
        "alignment of places": 492_544,
        "decoder": 20_651_010,
        "total": 236_711_038 - DEAD - 4,
    }
    attn1, attn2 = (
        [sum(p.numel() for p in m.parameters()) for m in fusion]
        for fusion in (base.fusion, base.merged_fusion)
    )
    assert attn1 == [476_160, 591_104, 1_575_424, 4_723_712] and attn2 == attn1[1:]
    assert [m.heads for m in base.fusion] == [4, 4, 8, 16] and [m.heads for m in base.merged_fusion] == [
        4,
        8,
        16,
    ]
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == 212_873_850 - DEAD
    spared, decayed = (sum(p.numel() for p in group["params"]) for group in base.parameter_groups())
    assert (spared, spared + decayed) == (258_296, 212_873_850 - DEAD)


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_the_other_sizes_can_be_built_and_differ_where_their_swins_do(size):
    with torch.device("meta"):
        model = create_model("crossvlt", size, backbone_weights="none", text_weights="none")
    width = SWINS[f"swin-{size}"]["embed_dim"]
    assert [n.normalized_shape[0] for n in model.norms] == [width * 2**i for i in range(4)]
    assert model.fusion[0].query.out_features == 2 * width and [m.heads for m in model.fusion] == [
        2 * width // 64,
        *(width * 2**i // 64 for i in (1, 2, 3)),
    ]
    assert CROSSVLT_RECIPES[size].batch_size == 12 and CROSSVLT_RECIPES[size].lr == 3e-5


def published_layout(width, depths, heads, window, d, layers, vocab, align):
    """Names and shapes of a released checkpoint, written down by hand: what a stage does to words and image stands under
    `layers`, beside its blocks; its norm does not."""
    out = {}

    def both(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def bert(name, asked=None):
        attention = "crossattention" if asked else "attention"
        both(f"{name}.{attention}.self.query", d, d)
        for part in ("key", "value"):
            both(f"{name}.{attention}.self.{part}", d, asked or d)
        both(f"{name}.{attention}.output.dense", d, d)
        both(f"{name}.{attention}.output.LayerNorm", d)
        both(f"{name}.intermediate.dense", 4 * d, d)
        both(f"{name}.output.dense", d, 4 * d)
        both(f"{name}.output.LayerNorm", d)

    both("backbone.0.patch_embed.proj", width, 3, 4, 4)
    both("backbone.0.patch_embed.norm", width)
    for i, (depth, h) in enumerate(zip(depths, heads)):
        c, at = width * 2**i, f"backbone.{i}"
        for j in range(depth):
            b = f"{at}.layers.blocks.{j}"
            for part, *shape in (
                ("norm1", c),
                ("norm2", c),
                ("attn.qkv", 3 * c, c),
                ("attn.proj", c, c),
                ("mlp.fc1", 4 * c, c),
                ("mlp.fc2", c, 4 * c),
            ):
                both(f"{b}.{part}", *shape)
            out[f"{b}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, h)
            out[f"{b}.attn.relative_position_index"] = (window**2, window**2)
        both(f"{at}.norm{i}", c)
        both(f"{at}.layers.proj", align, c)
        for n, c2, inner in ((1, c, 2 * c if i == 0 else c), (2, 2 * c, 2 * c)):
            if n == 2 and i == 3:
                continue
            both(f"{at}.layers.attn{n}.v_q.0", inner, c2, 1)
            both(f"{at}.layers.attn{n}.l_q", inner, d)
            both(f"{at}.layers.attn{n}.values_l", inner, d)
            both(f"{at}.layers.attn{n}.w_v.0", c2, inner, 1)
            both(f"{at}.layers.attn{n}.project_mm.0", c2, c2, 1)
            for k in (0, 2):
                out[f"{at}.layers.linear{n}.{k}.weight"] = (c2, c2)
        if i < 3:
            out[f"{at}.layers.downsample.reduction.weight"] = (2 * c, 4 * c)
            both(f"{at}.layers.downsample.norm", 4 * c)
    for name, n in (("word", vocab), ("position", 512), ("token_type", 2)):
        out[f"lang_stage1.embeddings.{name}_embeddings.weight"] = (n, d)
    both("lang_stage1.embeddings.LayerNorm", d)
    out["lang_stage1.embeddings.position_ids"] = (1, 512)
    for j in range(layers):
        bert(f"lang_stage1.encoder.layer.{j}")
    both("lang_stage1.encoder.proj", align, d)
    for i in (2, 3, 4):
        bert(f"lang_stage{i}", asked=width * 2 ** (i - 1))
        bert(f"lang_stage{i}.layer.0")
        both(f"lang_stage{i}.proj", align, d)
    last = 4 * width
    for level, inputs in ((4, 12 * width), (3, 6 * width), (2, 5 * width)):
        for half, n in ((1, inputs), (2, last)):
            out[f"classifier.conv{half}_{level}.weight"] = (last, n, 3, 3)
            both(f"classifier.bn{half}_{level}", last)
            out |= {
                f"classifier.bn{half}_{level}.{part}": (last,) for part in ("running_mean", "running_var")
            }
            out[f"classifier.bn{half}_{level}.num_batches_tracked"] = ()
    both("classifier.conv1_1", 2, last, 1, 1)
    out["temp"] = (4,)
    return out


SMALL = replace(TINY, begin=False, decoder_width=None, align_width=20)
LAYOUT = published_layout(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 48, 1, vocab=40, align=20)


def random_file(layout):
    return {name: torch.rand(shape) + 0.5 if shape else torch.tensor(3) for name, shape in layout.items()}


def test_the_layout_of_the_tests_has_the_published_size():
    layout = published_layout(128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 768, 6, vocab=30_522, align=256)
    buffers = (
        "relative_position_index",
        "position_ids",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )
    assert (
        sum(math.prod(shape) for name, shape in layout.items() if not name.endswith(buffers)) == 236_711_038
    )


def test_every_published_tensor_arrives_where_it_belongs_or_is_left_out_for_a_reason():
    file = random_file(LAYOUT)
    state, left_out = load_published(
        {"model": {f"module.{k}": v for k, v in file.items()}, "epoch": 39}, SMALL, vocab_size=40
    )
    model = CrossVLT(SMALL, 40)
    model.load_state_dict(state)
    assert len(state) + sum(map(len, left_out.values())) == len(file)
    assert sorted(sum(left_out.values(), [])) == sorted(
        [k for k in file if k.endswith(("relative_position_index", "position_ids"))]
        + ["backbone.3.layers.linear1.0.weight", "backbone.3.layers.linear1.2.weight"]
    )
    same = {
        "backbone.0.patch_embed.proj.weight": model.backbone.patch_embed.proj.weight,
        "backbone.1.layers.downsample.norm.bias": model.backbone.stages[2].downsample.norm.bias,
        "backbone.2.layers.blocks.1.attn.relative_position_bias_table": (
            model.backbone.stages[2].blocks[1].attn.relative_position_bias_table
        ),
        "backbone.0.layers.attn1.l_q.weight": model.fusion[0].key.weight,
        "backbone.0.layers.attn1.values_l.weight": model.fusion[0].value.weight,
        "backbone.2.layers.attn2.l_q.bias": model.merged_fusion[2].key.bias,
        "backbone.1.layers.linear1.2.weight": model.gates[1][2].weight,
        "backbone.1.layers.linear2.0.weight": model.merged_gates[1][0].weight,
        "backbone.3.norm3.weight": model.norms[3].weight,
        "backbone.3.layers.proj.weight": model.align_places[3].weight,
        "lang_stage1.encoder.layer.0.intermediate.dense.weight": (
            model.text[0].bert.encoder.layer[0].intermediate.dense.weight
        ),
        "lang_stage1.encoder.proj.bias": model.align_words[0].bias,
        "lang_stage2.crossattention.self.key.weight": model.text[1].ask.key.weight,
        "lang_stage3.crossattention.output.LayerNorm.weight": model.text[2].ask.norm1.weight,
        "lang_stage3.output.LayerNorm.weight": model.text[2].ask.norm2.weight,
        "lang_stage4.output.dense.weight": model.text[3].ask.ffn[2].weight,
        "lang_stage4.layer.0.attention.self.value.bias": model.text[3].read.value.bias,
        "lang_stage4.proj.weight": model.align_words[3].weight,
        "classifier.conv2_2.weight": model.decoder.blocks[2][3].weight,
        "classifier.bn1_4.running_var": model.decoder.blocks[0][1].running_var,
        "classifier.conv1_1.weight": model.decoder.classify.weight,
        "temp": model.temperature,
    }
    for name, parameter in same.items():
        assert torch.equal(file[name], parameter), name
    assert torch.equal(file["backbone.0.layers.attn1.v_q.0.weight"][..., 0], model.fusion[0].query.weight)
    assert torch.equal(
        file["backbone.2.layers.attn2.project_mm.0.weight"][..., 0], model.merged_fusion[2].mix.weight
    )


def test_a_file_without_temperatures_means_ones():
    state, _ = load_published({k: v for k, v in random_file(LAYOUT).items() if k != "temp"}, SMALL, 40)
    assert torch.equal(state["temperature"], torch.ones(4))


def test_unknown_missing_and_misshapen_tensors_are_listed():
    file = random_file(LAYOUT)
    del file["lang_stage3.crossattention.self.query.bias"]
    file |= {"lang_stage9.proj.weight": torch.ones(1), "backbone.1.norm1.weight": torch.ones(7)}
    with pytest.raises(ValueError) as error:
        load_published(file, SMALL, 40)
    for part in (
        "1 unknown: lang_stage9.proj.weight",
        "1 missing: text.2.ask.query.bias",
        "norms.1.weight [7] instead of [32]",
    ):
        assert part in str(error.value)


# ---- configuration and bad input


def test_a_configuration_survives_json_and_refuses_nonsense():
    import json

    for config in CROSSVLT_PRESETS.values():
        assert CrossVLTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for values, said in (
        ({"text_layer": 6}, "no field 'text_layer'"),
        ({"backbone": "vgg"}, "no backbone called 'vgg'"),
        ({"head_width": 60}, "head_width 60"),
        ({"text_heads": 7}, "text_width 768"),
    ):
        with pytest.raises(ValueError, match=said):
            CrossVLTConfig.from_dict(values)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no preset called 'huge'"):
        create_model("crossvlt", "huge")
    with pytest.raises(ValueError, match="vocab_size is needed"):
        create_model("crossvlt")
    model = tiny()
    images, words, _ = batch()
    features = model.encode(images)
    with pytest.raises(ValueError, match="2 images and 3 expressions: image_index"):
        model.segment(features, words)
    with pytest.raises(ValueError, match="96 x 96"):
        model.encode(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"words must be \[B, T\]"):
        model.segment([features[0][:1]], words[0])


def test_a_saved_model_comes_back(tmp_path):
    from refseg_nb.data.words import Vocabulary
    from refseg_nb.models.hub import load_model, save_model

    vocabulary = Vocabulary.build(["the red ball", "a tree"])
    model = CrossVLT(TINY, len(vocabulary)).eval()
    save_model(tmp_path / "m", model, vocabulary, {"model": "crossvlt"})

    def create(stored):
        return CrossVLT(CrossVLTConfig.from_dict(stored["config"]), len(vocabulary)), vocabulary

    again, _, meta = load_model(tmp_path / "m", create)
    images, _, _ = batch()
    words = torch.tensor([vocabulary.encode("red tree")])
    with torch.no_grad():
        assert torch.equal(model(images[:1], words), again(images[:1], words))
    assert meta["model"] == "crossvlt"


@pytest.mark.slow
def test_one_training_step_at_the_published_size():
    "About 4 GB and half a minute on one core."
    model = create_model("crossvlt", "base", backbone_weights="none", text_weights="none").train()
    images, words = (
        torch.randint(0, 256, (1, 3, 480, 480), dtype=torch.uint8),
        torch.randint(1, 30_000, (1, 21)),
    )
    losses = model.losses(
        model.encode(images), words, None, (torch.rand(1, 480, 480) > 0.9).float(), mask_loss=weighted_loss
    )
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) if p.requires_grad else p.grad is None, name
