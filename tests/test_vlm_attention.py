"""The attention of transformers' vision-language models as plain arrays: real classes with random weights, against
loops."""

import numpy as np
import pytest
import torch

from refseg_nb.attention.explorer import Explorer
from refseg_nb.attention.maps import OTHER_TOKENS, AttentionError, transformers_maps

transformers = pytest.importorskip("transformers")
IMAGE = "<image>"
TEXT = "USER: " + IMAGE * 12 + " Where is the greenish sailboat? ASSISTANT:"


@pytest.fixture(scope="module")
def tokenizer():
    "Byte-level BPE, as GPT and LLaMA 3 have it, of so few merges that long words fall into pieces."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["where is the green sail the boat is where the sail is"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", additional_special_tokens=[IMAGE]
    )


@pytest.fixture(scope="module")
def llava(tokenizer):
    "A LLaVA of two layers with random weights, asked about 3 x 4 patches: (output, ids)."
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = tokenizer("<s>" + TEXT, return_tensors="pt").input_ids
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    # 12 of the 16 patches: the language model alone decides how many there are
    features = torch.randn(1, 12, 16)
    embedded = model.get_input_embeddings()(ids)
    embedded[ids == config.image_token_id] = features[0]
    with torch.no_grad():
        return model(inputs_embeds=embedded, output_attentions=True), ids, config.image_token_id


def by_loops(a, pixels, groups):
    "Mean over a group's queries, sum over its keys: [heads, N, N] -> [heads, G, G], one number at a time."
    parts = [[p] for p in pixels] + groups
    out = np.zeros((a.shape[0], len(parts), len(parts)))
    for h in range(a.shape[0]):
        for i, queries in enumerate(parts):
            for j, keys in enumerate(parts):
                out[h, i, j] = np.mean([sum(float(a[h, q, k]) for k in keys) for q in queries])
    return out


def test_llava_against_loops(llava, tokenizer):
    out, ids, image = llava
    maps = transformers_maps(
        out.attentions, ids, tokenizer, image, grid=(3, 4), phrase="the greenish sailboat"
    )
    assert maps.words == ["the", "greenish", "sailboat", OTHER_TOKENS]
    pieces, flat = tokenizer.convert_ids_to_tokens(ids[0].tolist()), ids[0].tolist()
    pixels = [i for i, token in enumerate(flat) if token == image]
    # the words' pieces, by the marks that this tokenizer has: Ġ stands where a word begins
    starts = [i for i, piece in enumerate(pieces) if piece.startswith("Ġ")]
    spans = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(pieces)])]
    said = {"".join(pieces[i] for i in span).lstrip("Ġ"): span for span in spans}
    mark = next(word for word in said if word.startswith("sailboat"))
    boat = [i for i in said[mark] if "?" not in pieces[i]]
    groups = [said["the"], said["greenish"], boat]
    assert len(groups[1]) > 1 and len(boat) > 1  # else nothing would be merged
    rest = sorted(set(range(len(flat))) - set(pixels) - {i for g in groups for i in g})
    for layer in (0, 1):
        want = by_loops(out.attentions[layer][0].numpy(), pixels, [*groups, rest])
        assert np.allclose(maps.levels[1].weights[layer], want, atol=1e-5)
    assert maps.levels[1].grid == (3, 4) and np.allclose(maps.levels[1].weights.sum(-1), 1, atol=1e-5)
    whole = transformers_maps(out.attentions, ids[0], tokenizer, image, grid=(3, 4), layers=[1])
    assert whole.words == ["USER:", "Where", "is", "the", "greenish", "sailboat?", "ASSISTANT:", OTHER_TOKENS]
    assert whole.levels[1].weights.shape[0] == 1


def test_the_explorer_takes_them(llava, tokenizer, tmp_path):
    out, ids, image = llava
    maps = transformers_maps(
        out.attentions, ids, tokenizer, image, grid=(3, 4), phrase="the greenish sailboat"
    )
    explorer = Explorer.from_arrays(np.zeros((30, 40, 3), np.uint8), maps.words, maps)
    explorer.locked = {"word": 2}
    assert list(explorer.panels[0].maps) == ["raw", "rollout"] and "sailboat" in explorer.to_html(
        tmp_path / "p.html"
    )


def test_half_precision(llava, tokenizer):
    out, ids, image = llava
    exact = transformers_maps(out.attentions, ids, tokenizer, image, grid=(3, 4))
    for kind in (torch.float16, torch.bfloat16):
        rough = transformers_maps([a.to(kind) for a in out.attentions], ids, tokenizer, image, grid=(3, 4))
        assert np.allclose(rough.levels[1].weights, exact.levels[1].weights, atol=0.02)


def test_vilt_whose_image_follows_the_text(tokenizer):
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attn_implementation="eager",
    )
    model, ids = (
        transformers.ViltModel(config).eval(),
        tokenizer("where is the sail", return_tensors="pt").input_ids,
    )
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), output_attentions=True)
    t, n = ids.shape[1], out.attentions[0].shape[-1]
    assert n == t + 1 + 16  # the text, the image's class token, the patches
    maps = transformers_maps(out.attentions, ids, tokenizer, image=range(t + 1, n))
    assert maps.words == ["where", "is", "the", "sail", OTHER_TOKENS] and maps.levels[1].grid == (4, 4)
    raw = out.attentions[1][0].numpy()
    # what the patches give to the class token, which is neither a word nor a patch
    assert np.allclose(
        maps.block(1, 1, "pixels", "words", head=1)[..., -1].ravel(), raw[1, t + 1 :, t], atol=1e-5
    )


def test_what_is_wrong_is_named(llava, tokenizer):
    out, ids, image = llava
    ask = lambda attentions=out.attentions, ids=ids, image=image, **more: transformers_maps(
        attentions, ids, tokenizer, image, **{"grid": (3, 4)} | more
    )
    for missing in (None, (), (None, None)):
        with pytest.raises(AttentionError, match="attn_implementation='eager'"):
            ask(missing)
    with pytest.raises(AttentionError, match="one forward pass, not of generate"):
        ask((out.attentions, out.attentions))
    with pytest.raises(AttentionError, match=r"must be \[1, heads, N, N\]"):
        ask([a.repeat(2, 1, 1, 1) for a in out.attentions])
    with pytest.raises(AttentionError, match="12 tokens: a grid of 4 x 4 does not fit"):
        ask(grid=(4, 4))
    with pytest.raises(AttentionError, match="12 tokens: a grid of 3 x 3 does not fit"):
        ask(grid=None)
    with pytest.raises(AttentionError, match="placeholder, whose id is 9999"):
        ask(image=9999)
    with pytest.raises(AttentionError, match="positions must be different and below"):
        ask(image=range(100, 112))
    with pytest.raises(AttentionError, match="'the red sailboat' is not in the model's text"):
        ask(phrase="the red sailboat")
    with pytest.raises(AttentionError, match="input_ids, but the attention is over"):
        ask(ids=torch.cat([ids, ids], 1))
