"""Attention maps: bad arrays are named, rollout and relevance against independent computations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refseg_nb
from refseg_nb.attention.maps import (
    TOKENS,
    AttentionError,
    AttentionMaps,
    AttentionSteps,
    attention_maps,
    figure7,
    look,
    pixel_scores,
    region_weights,
    relevance,
    rollout,
    share_inside,
    weight_steps,
    without_cells,
    without_words,
    word_scores,
)
from refseg_nb.data.refer import Refer
from refseg_nb.inference.segmenter import Segmenter
from refseg_nb.models.base import AttentionBlock, ModelAttention
from refseg_nb.models.registry import create_model
from refseg_nb.models.sfm import SFM, JointAttention

WORDS = ["the", "red", "ball"]


def rows(shape, seed=0, power=3):
    a = np.random.default_rng(seed).random(shape) ** power
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def scene(tiny_root):
    seg, refer = refseg_nb.load(), Refer(tiny_root, "refshapes")
    return seg.encode(refer.load_image(refer.samples("val")[0].image_id))


GOOD = dict(weights=rows((2, 2, 9, 9)), words=WORDS, grid=(2, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(weights=rows((2, 2, 8, 9))),
            "level 1: the query axis has 8 entries, but 2 x 3 pixels and 3 words make 9",
        ),
        (dict(weights=rows((2, 2, 9, 8))), "level 1: the key axis has 8 entries"),
        (dict(weights=rows((2, 9, 9))), r"four axes \[layer, head, query, key\]"),
        (dict(weights=rows((0, 2, 9, 9))), "the layer axis is empty"),
        (dict(weights=rows((2, 0, 9, 9))), "the head axis is empty"),
        (
            dict(weights=rows((2, 2, 9, 9)) * 1.01),
            (
                r"must sum to one along the key axis .* layer 0, head 0, query 0 \(pixel row 0, column 0\)"
                r" sums to 1.01"
            ),
        ),
        (dict(weights=rows((2, 2, 9, 9)).swapaxes(2, 3)), "must sum to one along the key axis"),
        (dict(words=[]), "words must be a list of strings"),
        (dict(words=[1, 2, 3]), "words must be a list of strings"),
        (dict(grid=(2, 4)), "2 x 4 pixels and 3 words make 11"),
        (dict(grid=(0, 3)), "grid must be two positive numbers"),
        (dict(queries="places"), "queries must be one of pixels, words, both"),
        (dict(kind="flow"), "kind must be one of"),
        (dict(weights={}), "there is no level"),
        (dict(weights={3: rows((1, 1, 9, 9))}, grid={4: (2, 3)}), r"levels \[3\], but grid has \[4\]"),
    ],
)
def test_bad_arrays_are_refused_with_the_axis_named(change, message):
    with pytest.raises(AttentionError, match=message):
        AttentionMaps.from_arrays(**GOOD | change)


@pytest.mark.parametrize(
    "value, message",
    [
        (np.nan, "NaN or infinite values along the key axis"),
        (np.inf, "NaN or infinite"),
        (-0.1, "negative values along"),
    ],
)
@pytest.mark.parametrize("query, token", [(4, "pixel row 1, column 1"), (7, "word 'red'")])
def test_a_bad_value_is_located(value, message, query, token):
    bad = GOOD["weights"].copy()
    bad[1, 0, query, 2] = value
    with pytest.raises(AttentionError, match=rf"{message}.* layer 1, head 0, query {query} \({token}\)"):
        AttentionMaps.from_arrays(bad, WORDS, (2, 3))


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    n=st.integers(1, 4),
    queries=st.sampled_from(TOKENS),
    keys=st.sampled_from(TOKENS),
)
def test_the_blocks_are_the_matrix_cut_and_folded(h, w, n, queries, keys):
    count = {"pixels": h * w, "words": n, "both": h * w + n}
    a = rows((1, 2, count[queries], count[keys]), seed=h * w * n)
    maps = AttentionMaps.from_arrays(a, [f"w{i}" for i in range(n)], (h, w), queries, keys)
    names = lambda held: (
        [("pixels", i // w, i % w) for i in range(h * w)] * (held != "words")
        + [("words", i) for i in range(n)] * (held != "pixels")
    )
    for i, query in enumerate(names(queries)):
        for j, key in enumerate(names(keys)):
            assert maps.block(1, 0, query[0], key[0], head=1)[*query[1:], *key[1:]] == a[0, 1, i, j]
    with pytest.raises(AttentionError):
        maps.block(2, 0, "pixels", "words")
    if queries == "words":
        with pytest.raises(AttentionError, match="no attention from pixels"):
            maps.block(1, 0, "pixels", "words")


def test_the_attention_of_a_model_of_one_s_own():
    class Theirs(ModelAttention):
        def blocks(self):
            return {1: AttentionBlock([torch.from_numpy(rows((1, 1, 6, 3)))], (2, 3), "pixels", "words")}

    assert attention_maps(Theirs(), WORDS).levels[1].queries == "pixels"
    with pytest.raises(AttentionError, match="dict is not known"):
        attention_maps({}, WORDS)
    with pytest.raises(AttentionError, match="gave no attention"):
        attention_maps(None, WORDS)


def test_batches_are_refused(scene):
    answers = scene.segment_all(["the red ball", "the ball"], return_attention=True)
    answers[0].attention.levels[3][0] = answers[0].attention.levels[3][0].repeat(2, 1, 1, 1)
    with pytest.raises(AttentionError, match="batch axis has 2 entries"):
        attention_maps(answers[0].attention, answers[0].words)
    with pytest.raises(AttentionError, match="9 words"):
        attention_maps(answers[1].attention, ["x"] * 9)


def by_hand(attention, x, where, head, query):
    """q·k, the scores and the values' lengths of one query, key by key, from an attention's own matrices; x
    is [N, C]."""
    c = x.shape[1]
    d, w, b = c // attention.heads, attention.qkv.weight.detach(), attention.qkv.bias.detach()
    own = slice(head * d, (head + 1) * d)
    placed = x if attention.positions == "none" else x + where
    q = (w[:c] @ placed[query] + b[:c])[own]
    products = [float(q @ (w[c : 2 * c] @ token + b[c : 2 * c])[own]) for token in placed]
    values = placed if attention.positions == "qkv" else x
    lengths = [
        float((attention.out.weight.detach()[:, own] @ (w[2 * c :] @ token + b[2 * c :])[own]).norm())
        for token in values
    ]
    return np.array(products), np.array(products) / d**0.5, np.array(lengths)


@pytest.mark.parametrize("positions", ["qkv", "qk", "none"])
def test_scores_come_back_from_weights_and_log_sums_in_double_precision(positions):
    torch.manual_seed(0)
    sfm = SFM(16, 3, heads=4, positions=positions).double()
    layer = sfm.layers[0]
    visual, words, mask = (
        torch.randn(2, 16, 3, 3).double(),
        torch.randn(2, 4, 16).double(),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    with torch.no_grad():
        for p in sfm.parameters():
            p.add_(0.3 * torch.randn_like(p))
        weights, log_sums, lengths = sfm(visual, words, mask, return_attention=True)[2][0]
        x = layer.norm1(torch.cat([visual.flatten(2).transpose(1, 2), words], 1))
    real = torch.cat([mask.new_ones(2, 9), mask], 1)
    for i, head, query in [(0, 0, 0), (0, 3, 12), (1, 1, 5), (1, 2, 10)]:
        _, scores, long = by_hand(layer.attention, x[i], torch.cat([sfm.p_v, sfm.p_l[:4]]), head, query)
        keep = real[i].numpy()
        softmax = np.exp(scores[keep]) / np.exp(scores[keep]).sum()
        assert (
            np.abs(weights[i, head, query].numpy()[keep] - softmax).max() < 1e-12
            and (weights[i, head, query].numpy()[~keep] == 0).all()
        )
        assert (
            np.abs(
                np.log(weights[i, head, query].numpy()[keep]) + float(log_sums[i, head, query]) - scores[keep]
            ).max()
            < 1e-10
        )
        assert np.abs(lengths[i, head].numpy() - long).max() < 1e-12


@pytest.mark.parametrize("changes", [{}, dict(sfm_shared=False)])
def test_the_steps_of_shnet_are_those_of_its_own_projections(scene, changes):
    torch.manual_seed(0)
    seg = scene.segmenter
    if changes:
        seg = Segmenter(create_model("shnet", vocab_size=len(seg.vocabulary), **changes), seg.vocabulary)
    seen = []  # what goes into each attention
    hooks = [
        m.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[:2]))
        for m in seg.model.modules()
        if isinstance(m, JointAttention)
    ]
    answer, maps = look(seg.encode(scene.image), "the red ball")
    for hook in hooks:
        hook.remove()
    calls = len(seen)
    alone = seg.encode(scene.image).segment_all(
        ["the small house on the left", "the red ball"], return_attention=True
    )[1]
    padded = attention_maps(alone.attention, alone.words)
    modules = [layer.attention for sfm in seg.model.sfm for layer in sfm.layers]
    assert (
        calls == len(modules)
        and maps.levels[3].steps.width == seg.model.config.channels // seg.model.config.sfm_heads
    )
    for level, layer, head, query in [(2, 0, 0, 7), (3, 1, 1, 144), (4, 0, 1, 146), (4, 1, 0, 60)]:
        at = layer if len(seg.model.sfm) == 1 else 2 * (level - 2) + layer
        x, where = seen[at]
        products, scores, lengths = by_hand(
            modules[at], x[level - 2 if len(x) == 3 else 0], where, head, query
        )
        softmax = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        for found in (
            weight_steps(maps, level, layer, head, query),
            weight_steps(padded, level, layer, head, query),
        ):
            counts = found["weight"] > 1e-8  # below, single precision keeps few digits
            assert np.allclose(found["scaled"][counts], scores[counts], atol=2e-3) and np.allclose(
                found["product"][counts], products[counts], atol=2e-2
            )
            assert np.allclose(found["weight"], softmax, atol=1e-5) and np.allclose(
                found["exp"], softmax / softmax.max(), atol=1e-4
            )
            assert np.allclose(found["length"], lengths, rtol=1e-4)
            assert np.allclose(found["added"], softmax * lengths / (softmax @ lengths), atol=1e-5)
    for kind in ("rollout", "relevance"):
        other = look(scene, "the ball", kind)[1]
        with pytest.raises(AttentionError, match=f"not known how these weights were made .kind: {kind}"):
            weight_steps(other, 3, 0, 0, 0)


STEPS = dict(log_sums=np.zeros((2, 2, 9), np.float32), lengths=np.ones((2, 2, 9), np.float32), width=4)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (
            dict(log_sums=STEPS["log_sums"][..., :8]),
            "raw",
            r"level 1: steps.log_sums .* \[layer, head, query\] = \[2, 2, 9\], not float32 \[2, 2, 8\]",
        ),
        (
            dict(lengths=STEPS["lengths"].astype(float)),
            "raw",
            r"steps.lengths must be float32 \[layer, head, key\] = \[2, 2, 9\], not float64",
        ),
        (dict(lengths=[1.0]), "raw", "steps.lengths must be float32"),
        (dict(lengths=-STEPS["lengths"]), "raw", "negative values in steps.lengths"),
        (dict(log_sums=STEPS["log_sums"] * np.nan), "raw", "NaN or infinite values in steps.log_sums"),
        (dict(width=0), "raw", "steps.width is the number of channels of a head, not 0"),
        ({}, "relevance", "steps belong to raw attention, not to relevance"),
    ],
)
def test_bad_steps_are_refused(change, kind, message):
    with pytest.raises(AttentionError, match=message):
        AttentionMaps.from_arrays(**GOOD, kind=kind, steps=AttentionSteps(**STEPS | change))
    with pytest.raises(AttentionError, match=r"levels \[1\], but steps has \[2\]"):
        AttentionMaps.from_arrays(**GOOD, steps={2: AttentionSteps(**STEPS)})


def test_rollout_sums_over_paths_and_keeps_rows():
    maps = AttentionMaps.from_arrays(rows((3, 2, 5, 5)), WORDS, (1, 2))
    a = maps.levels[1].weights.mean(1).astype(np.float64)
    for residual in (0.0, 0.3, 0.5):
        rolled = rollout(maps, residual).levels[1].weights[:, 0]
        step = residual * np.eye(5) + (1 - residual) * a
        assert np.allclose(rolled[0], step[0], atol=1e-6)  # one layer: that layer's mixed matrix
        assert np.allclose(rolled[2], np.einsum("ij,jk,kl->il", step[2], step[1], step[0]), atol=1e-6)
        assert np.allclose(rolled.sum(-1), 1, atol=1e-5)
    assert np.allclose(rollout(maps, 0.0).levels[1].weights[0, 0], a[0], atol=1e-6)
    with pytest.raises(AttentionError, match="made from raw attention"):
        rollout(rollout(maps))
    one_way = AttentionMaps.from_arrays(rows((1, 1, 6, 3)), WORDS, (2, 3), "pixels", "words")
    with pytest.raises(AttentionError, match="same tokens on the query and the key axis"):
        rollout(one_way)


def test_relevance_is_the_recursion_and_zero_for_an_unused_word():
    torch.manual_seed(0)
    layers = [torch.randn(1, 2, 5, 5, dtype=torch.float64).softmax(-1).requires_grad_() for _ in range(2)]
    value = torch.randn(5, 3, dtype=torch.float64)

    def answer():  # read from the two pixels
        x = value
        for a in layers:
            x = x + (a[0] @ x).mean(0)
        return x[:2].square().sum()

    found = relevance({7: layers}, answer(), WORDS, (1, 2)).levels[7].weights[:, 0]
    r = np.eye(5)
    for a, g in zip(layers, torch.autograd.grad(answer(), layers)):
        step = np.zeros((5, 5))
        for head in range(2):
            step += np.maximum(g[0, head].numpy() * a[0, head].detach().numpy(), 0) / 2
        r = r + step @ r
    assert np.allclose(found[1], r - np.eye(5), atol=1e-5)

    value = torch.rand(5, 3)
    value[4] = 0  # the third word's value is zero
    a = torch.randn(1, 2, 5, 5).softmax(-1).requires_grad_()
    zero = relevance({1: [a]}, (a[0] @ value)[:, :2].sum(), WORDS, (1, 2))
    assert (zero.block(1, 0, "pixels", "words")[..., 2] == 0).all() and (
        zero.block(1, 0, "pixels", "words")[..., :2] > 0
    ).all()
    assert (zero.block(1, 0, "words", "pixels") == 0).all()  # and words' rows are not read


@pytest.mark.parametrize("changes", [{}, dict(sfm_shared=False), dict(sfm_residual=False, sfm_layers=1)])
def test_relevance_reaches_every_level_of_shnet(scene, changes):
    seg = scene.segmenter
    torch.manual_seed(0)
    mine = Segmenter(create_model("shnet", vocab_size=len(seg.vocabulary), **changes), seg.vocabulary)
    answer, found = look(mine.encode(scene.image), "the red ball", "relevance")
    assert list(found.levels) == [2, 3, 4] and all(level.weights.max() > 0 for level in found.levels.values())
    assert all(p.grad is None for p in mine.model.parameters())  # nothing is left behind
    _, rolled = look(mine.encode(scene.image), "the red ball", "rollout")
    raw = look(mine.encode(scene.image), "the red ball")[1]
    share = 0.5 if mine.model.config.sfm_residual else 0.0
    mixed = share * np.eye(147) + (1 - share) * raw.levels[3].weights[0].mean(0)
    assert np.allclose(rolled.levels[3].weights[0, 0], mixed, atol=1e-5)


def test_models_without_attention_say_so(scene):
    seg = scene.segmenter
    none = Segmenter(create_model("baseline", vocab_size=len(seg.vocabulary)), seg.vocabulary)
    with pytest.raises(AttentionError, match="gave no attention"):
        look(none.encode(scene.image), "the ball")
    with pytest.raises(AttentionError, match="kind must be one of"):
        look(scene, "the ball", "flow")


def test_regions_and_scores(scene):
    answer, maps = look(scene, "the second smallest ball")
    mask = np.zeros((60, 96), bool)
    mask[20:30, 8:16] = True
    weights = region_weights(mask, (12, 12))
    by_hand = np.array(
        [[mask[5 * i : 5 * i + 5, 8 * j : 8 * j + 8].mean() for j in range(12)] for i in range(12)]
    )
    assert np.allclose(weights, by_hand / by_hand.sum(), atol=1e-6)
    assert np.allclose(share_inside(by_hand, mask), (by_hand * by_hand).sum() / by_hand.sum())
    want = np.mean(
        [
            [maps.levels[v].weights[layer, :, :144, 144:].mean(0).T @ weights.ravel() for layer in (0, 1)]
            for v in (2, 3, 4)
        ],
        (0, 1),
    )
    assert np.allclose(word_scores(maps, mask), want, atol=1e-6)
    want = np.mean([maps.levels[v].weights[:, :, 144:, :144].mean((0, 1, 2)) for v in (2, 3, 4)], 0).reshape(
        12, 12
    )
    assert np.allclose(pixel_scores(maps), want, atol=1e-6)
    with pytest.raises(AttentionError, match="a mask has two axes"):
        region_weights(np.zeros(4, bool), (2, 2))
    one_way = AttentionMaps.from_arrays(rows((1, 1, 6, 3)), WORDS, (2, 3), "pixels", "words")
    with pytest.raises(AttentionError, match="no level has attention from words to pixels"):
        pixel_scores(one_way)


def test_erasing():
    picture = np.random.default_rng(0).integers(0, 255, (10, 7, 3), dtype=np.uint8)
    cells = np.zeros((5, 3), bool)
    cells[1, 2] = True
    erased = without_cells(picture, cells)
    changed = [(i, j) for i in range(10) for j in range(7) if 5 * i // 10 == 1 and 3 * j // 7 == 2]
    mean = picture.reshape(-1, 3).mean(0).round()
    for i, j in np.ndindex(10, 7):
        assert (erased[i, j] == (mean if (i, j) in changed else picture[i, j])).all()
    assert without_words(["a", "b", "c"], [0, 2]) == "b" and without_words(["a"], 0) == ""


def test_figure7_draws_every_block(scene):
    import matplotlib.pyplot as plt

    answer, maps = look(scene, "the second smallest ball")
    fig = figure7(scene.image, maps, answer.mask, 3, 0)
    titles = [ax.get_title() for sub in fig.subfigs for ax in sub.axes]
    assert (
        "word → word, %" in titles
        and "pixel → pixel" in titles
        and sum("→ pixels" in title for title in titles) == 4
    )
    plt.close(fig)


def asked(name, tiny_root, vocabulary=None, **changes):
    "An untrained model of chapters 17 to 19, one scene, and a phrase with a word that nobody has seen."
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    from refseg_nb.data.words import vocabulary_for

    torch.manual_seed(0)
    refer = Refer(tiny_root, "refshapes")
    vocabulary = vocabulary or vocabulary_for(refer)
    seg = Segmenter(create_model(name, vocab_size=len(vocabulary), **changes), vocabulary)
    return seg, refer.load_image(refer.samples("val")[0].image_id), "the red quux"


LEVELS = {
    "cmpc": {
        f"{i} {name}": ((16, 16), *of)
        for i in (2, 3, 4)
        for name, of in {
            "pixels→words": (256, 3),
            "pixels→pixels": (256, 256),
            "words→pixels": (3, 256),
        }.items()
    },
    "lavt": {i + 1: ((24 >> i, 24 >> i), (24 >> i) ** 2, 4) for i in range(4)},
    "crossvlt": (
        {f"{i + 1} pixels→words": ((24 >> i, 24 >> i), (24 >> i) ** 2, 4) for i in range(4)}
        | {f"{i} merged pixels→words": ((24 >> i, 24 >> i), (24 >> i) ** 2, 4) for i in (1, 2, 3)}
        | {f"{i + 1} words→pixels": ((24 >> i, 24 >> i), 4, (24 >> i) ** 2) for i in (1, 2, 3)}
    ),
}


@pytest.mark.parametrize("name", LEVELS)
def test_every_model_says_who_looks_at_what(name, tiny_root):
    seg, image, phrase = asked(name, tiny_root)
    answer, maps = look(seg.encode(image), phrase)
    assert maps.words == ["[CLS]"] * (name != "cmpc") + ["the", "red", "quux"]
    assert {k: (tuple(a.grid), *a.weights.shape[2:]) for k, a in maps.levels.items()} == LEVELS[name]
    for level in maps.levels.values():
        assert len(level.weights) == 1 and np.allclose(level.weights.sum(-1), 1, atol=1e-4)  # one layer
    held = answer.attention
    if name == "cmpc":
        assert np.array_equal(maps.block("3 words→pixels", 0, "words", "pixels"), held.places(3)[0].numpy())
        assert np.array_equal(
            maps.block("3 pixels→words", 0, "pixels", "words").reshape(256, 3), held.to_words[3][0].numpy()
        )
        assert np.array_equal(
            maps.block("4 pixels→pixels", 0, "pixels", "pixels").reshape(256, 256),
            held.affinity(4)[0].numpy(),
        )
    if name == "lavt":
        assert np.array_equal(maps.block(2, 0, "pixels", "words", head=0), held[2][0, 0].numpy())
    if name == "crossvlt":
        assert np.array_equal(
            maps.block("3 words→pixels", 0, "words", "pixels", head=1), held.words[3][0, 1].numpy()
        )
        assert np.array_equal(
            maps.block("2 merged pixels→words", 0, "pixels", "words", head=1), held.merged[2][0, 1].numpy()
        )
    for kind in ("rollout", "relevance"):
        with pytest.raises(AttentionError):
            look(seg.encode(image), phrase, kind)
    assert word_scores(maps, np.ones((96, 96), bool)).shape == (len(maps.words),)
    with pytest.raises(AttentionError, match="words make" if name != "lavt" else "2 words make|3 words make"):
        attention_maps(held, ["the", "red"])


@pytest.mark.parametrize("name", LEVELS)
def test_a_batch_of_theirs_is_refused(name, tiny_root):
    seg, image, phrase = asked(name, tiny_root)
    with torch.no_grad():
        _, attention = seg.model.segment(
            seg.encode(image).features, torch.tensor([[2, 3], [4, 5]]), torch.zeros(2, dtype=torch.long), True
        )
    with pytest.raises(AttentionError, match="batch axis has 2 entries"):
        attention_maps(attention, ["a", "b"])


def test_pieces_of_words_are_named_as_they_are(tiny_root):
    pytest.importorskip("transformers")
    from refseg_nb.data.words import WordPieces

    pieces = WordPieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "tall", "##er", "ball"])
    seg, image, _ = asked("lavt", tiny_root, pieces, begin=False, max_words=6)
    assert look(seg.encode(image), "the taller ball")[1].words == [
        "[CLS]",
        "the",
        "tall",
        "##er",
        "ball",
        "[SEP]",
    ]
    assert look(seg.encode(image), "the taller taller ball")[1].words == [
        "[CLS]",
        "the",
        "tall",
        "##er",
        "tall",
        "[SEP]",
    ]


@pytest.mark.parametrize("name", LEVELS)
def test_the_explorer_shows_every_model(name, tiny_root, tmp_path):
    from refseg_nb.attention.explorer import Explorer

    seg, image, phrase = asked(name, tiny_root)
    explorer = Explorer(seg, image, phrase)
    page = explorer.to_html(tmp_path / "page.html")
    assert page == (tmp_path / "page.html").read_text() and "refseg-explorer" in page
    assert sorted(level["name"] for level in explorer.data["panels"][0]["kinds"]["raw"]) == sorted(
        map(str, LEVELS[name])
    )
    for level in LEVELS[name]:
        explorer.level, explorer.locked = str(level), {"word": len(explorer.panels[0].words) - 1}
        assert explorer.to_svg().startswith("<?xml")
    explorer.phrase = "the ball"
    assert explorer.error == "" and explorer.panels[-1].words[-2:] == ["the", "ball"]
