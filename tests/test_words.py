"""Words: tokens, vocabulary, and vectors, on real expressions and on damage."""

import json
import os
import shutil
import ssl
import zipfile
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import enough_memory

from refseg_nb.data import words as words_module
from refseg_nb.data.refer import Refer, write_refer
from refseg_nb.data.words import (
    PAD,
    UNK,
    VectorsError,
    Vocabulary,
    filter_vectors,
    load_vectors,
    pad_words,
    tokenize,
    vocabulary_for,
)


def small():
    return Vocabulary.build(["the man on the left", "the 2nd man", "number 160", "the dog"])


def vectors_file(path, rows=None):
    rows = rows or {"the": [1, 2, 3], "man": [0.5, -0.5, 1e-3], "160": [0, 1, 0], "zebra": [9, 9, 9]}
    path.write_text("".join(f"{w} {' '.join(map(str, v))}\n" for w, v in rows.items()), encoding="utf-8")
    return path


# ---------------------------------------------------------------- tokens and the vocabulary
def test_tokens_keep_digits_and_hyphens():
    assert tokenize("The 2nd T-shirt, #33!") == ["the", "2nd", "t-shirt", ",", "#33", "!"]
    assert tokenize("  ") == tokenize('""') == []


def test_words_of_letters_alone(tmp_path):
    "SHNet's released split: at everything that is no letter, digit or underscore; then letters alone stay."
    assert tokenize("The 2nd T-shirt, #33!", letters_only=True) == ["the", "t", "shirt"]
    assert tokenize("black-haired woman's under_score É", letters_only=True) == [
        "black",
        "haired",
        "woman",
        "s",
        "é",
    ]
    assert tokenize("160", letters_only=True) == []
    phrases = ["the 2nd black-haired man", "black cat"]
    usual, letters = (Vocabulary.build(phrases, letters_only=only) for only in (False, True))
    assert "2nd" in usual and "black-haired" in usual and "haired" not in usual
    assert sorted(letters.itos[2:]) == ["black", "cat", "haired", "man", "the"] and letters.itos[2] == "black"
    assert letters.decode(letters.encode("The BLACK-haired 2nd cat")) == "the black haired cat"
    assert letters.encode_all(["2nd"])[1].empty == 1 and letters.encode("2nd") == [UNK]
    back = Vocabulary.from_json(letters.to_json())
    assert (
        back == letters
        and back.letters_only
        and back.encode("black-haired") == letters.encode("black-haired")
    )
    assert "letters_only" not in usual.to_json() and not Vocabulary.from_json(usual.to_json()).letters_only
    same = Vocabulary.build(["black cat"]), Vocabulary.build(["black cat"], letters_only=True)
    assert same[0].itos == same[1].itos and same[0] != same[1], "they read 'black-cat' differently"


def test_order_and_specials():
    vocabulary = small()
    assert vocabulary.itos[:4] == ["<pad>", "<unk>", "the", "man"] and (PAD, UNK) == (0, 1)
    assert vocabulary.itos[4:] == sorted(vocabulary.itos[4:])
    assert "man" in vocabulary and "<pad>" not in vocabulary and "zebra" not in vocabulary
    assert Vocabulary.build(["a a b"], min_freq=2).itos == ["<pad>", "<unk>", "a"]


def test_encoding_handles_what_people_type():
    vocabulary = small()
    assert vocabulary.decode(vocabulary.encode("THE 2nd zebra")) == "the 2nd <unk>"
    assert vocabulary.encode("") == vocabulary.encode('"') == [UNK]
    assert PAD not in vocabulary.encode("the <pad> man") and vocabulary.encode("<pad>") == [UNK]
    assert vocabulary.encode("the " * 40, max_words=3) == [2, 2, 2]
    size = len(vocabulary)
    vocabulary.encode("words never seen"), "words" in vocabulary
    assert len(vocabulary) == len(vocabulary.vocab.stoi) == size, "asking for a word must not add it"


def test_the_report_counts_what_was_lost():
    numbers, report = small().encode_all(["the zebra", "", "the the the the"], max_words=3)
    assert [len(n) for n in numbers] == [2, 1, 3]
    assert (report.expressions, report.words, report.unknown, report.empty, report.cut, report.longest) == (
        3,
        6,
        1,
        1,
        1,
        4,
    )
    assert "1 cut at 3 words" in str(report)


def test_json_keeps_every_number():
    vocabulary = small()
    again = Vocabulary.from_json(vocabulary.to_json())
    assert (
        again == vocabulary
        and again.fingerprint == vocabulary.fingerprint
        and again.vocab.freqs == vocabulary.vocab.freqs
    )
    for text in (
        "",
        "{}",
        "[]",
        '{"words": ["a", "b"], "counts": [1, 2], "min_freq": 1}',
        '{"words": ["a"], "counts": [], "min_freq": 1}',
    ):
        with pytest.raises(ValueError, match="not a vocabulary"):
            Vocabulary.from_json(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5), st.text(max_size=60), st.integers(1, 10))
def test_fuzz_expressions(sentences, text, max_words):
    vocabulary = Vocabulary.build(sentences)
    numbers = vocabulary.encode(text, max_words)
    assert 1 <= len(numbers) <= max_words and all(0 < n < len(vocabulary) for n in numbers)
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    padded = pad_words([numbers, [UNK] * 12])
    assert (
        padded.shape == (2, 12)
        and padded[0, : len(numbers)].tolist() == numbers
        and (padded[0, len(numbers) :] == PAD).all()
    )


def test_real_expressions(real_data):
    for name in ("refcoco", "refcoco+", "refcocog"):
        refer = Refer(real_data, name, "micro")
        texts = [s.text for s in refer.samples("train")]
        vocabulary = Vocabulary.build(texts)
        _, report = vocabulary.encode_all(texts)
        assert report.unknown == report.empty == 0 and report.words == sum(vocabulary.vocab.freqs.values())


# ---------------------------------------------------------------- kept beside the data set
def tiny_refer(root, sentences):
    instances = {
        "images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}],
        "categories": [],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": []}],
    }
    refs = [
        {
            "ref_id": 1,
            "ann_id": 1,
            "image_id": 1,
            "category_id": 1,
            "split": "train",
            "sentences": [{"sent_id": i, "sent": s} for i, s in enumerate(sentences)],
        }
    ]
    write_refer(root / "mine", refs, instances)
    return Refer(root, "mine")


def test_vocabulary_is_kept_and_never_stale(tmp_path, monkeypatch):
    refer = tiny_refer(tmp_path, ["red car", "blue car"])
    first = vocabulary_for(refer)
    path = refer.folder / "vocabulary(unc,train).json"
    assert path.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "build", lambda *a: pytest.fail("built again"))
        assert vocabulary_for(Refer(tmp_path, "mine")) == first
    assert "green" in vocabulary_for(tiny_refer(tmp_path, ["green car"])), "new expressions: a new vocabulary"
    for damage in ("", "{", "[]", '{"of": 1}'):
        path.write_text(damage)
        assert (
            "green" in vocabulary_for(Refer(tmp_path, "mine")) and json.loads(path.read_text())["vocabulary"]
        )


def test_a_read_only_data_set_is_left_alone(tmp_path):
    refer = tiny_refer(tmp_path, ["red car"])
    os.chmod(refer.folder, 0o555)
    before = sorted(p.name for p in refer.folder.iterdir())
    assert "red" in vocabulary_for(refer)
    load_vectors(vectors_file(tmp_path / "v.txt", {"red": [1, 2, 3]}), vocabulary_for(refer), refer.folder)
    assert sorted(p.name for p in refer.folder.iterdir()) == before
    os.chmod(refer.folder, 0o755)


# ---------------------------------------------------------------- vectors
def test_vectors_are_filtered_and_kept(tmp_path, monkeypatch):
    vocabulary, source = small(), vectors_file(tmp_path / "hand.50d.txt")
    vectors, coverage = load_vectors(source, vocabulary, tmp_path)
    assert vectors.shape == (len(vocabulary), 3) and vectors.dtype == torch.float32
    assert torch.equal(vectors[vocabulary.number("the")], torch.tensor([1.0, 2, 3]))
    assert torch.equal(vectors[vocabulary.number("man")], torch.tensor([0.5, -0.5, 1e-3]))
    assert not vectors[[PAD, UNK, vocabulary.number("dog")]].any()
    assert (coverage.types, coverage.types_found, coverage.tokens, coverage.tokens_found) == (8, 3, 12, 7)
    assert "3 of 8 words" in str(coverage) and "dog" in coverage.missing
    assert len(list(tmp_path.glob("vectors(hand.50d,*).*"))) == 2 and not list(tmp_path.glob(".vector*"))
    monkeypatch.setattr(words_module, "filter_vectors", lambda *a: pytest.fail("filtered again"))
    again, same = load_vectors(source, vocabulary, tmp_path)
    assert torch.equal(again, vectors) and same == coverage


def test_changed_files_and_vocabularies_are_filtered_anew(tmp_path):
    source = vectors_file(tmp_path / "v.txt")
    load_vectors(source, small(), tmp_path)
    vectors_file(source, {"the": [7, 7, 7, 7]})
    assert load_vectors(source, small(), tmp_path)[0].shape[1] == 4
    other = Vocabulary(Counter({"man": 1, "the": 2, "new": 5}))
    assert load_vectors(source, other, tmp_path)[0].shape == (5, 4)
    kept = next(tmp_path.glob(f"vectors(v,{other.fingerprint}).safetensors"))
    kept.write_bytes(b"damaged")
    assert load_vectors(source, other, tmp_path)[0].shape == (5, 4)


def test_the_process_stays_as_it_was(tmp_path, monkeypatch, capfd):
    """torchtext's reader switches TLS checks off for the whole process, leaves a cache in the working
    folder, and draws a bar."""
    monkeypatch.chdir(tmp_path)
    context, state = ssl._create_default_https_context, torch.get_rng_state()
    load_vectors(vectors_file(tmp_path / "v.txt"), small())
    assert ssl._create_default_https_context is context and torch.equal(torch.get_rng_state(), state)
    assert [p.name for p in tmp_path.iterdir()] == ["v.txt"] and capfd.readouterr() == ("", "")


def test_zip_and_name(tmp_path, monkeypatch):
    text = vectors_file(tmp_path / "glove.6B.50d.txt")
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(tmp_path / "glove.6B.50d.zip", "w") as archive:
        archive.write(text, "glove.6B.50d.txt")
        archive.writestr("glove.6B.100d.txt", "the 1\n")
    want = load_vectors(text, small())[0]
    assert torch.equal(load_vectors(tmp_path / "glove.6B.50d.zip", small())[0], want)
    shutil.copy(tmp_path / "glove.6B.50d.zip", cache)
    assert torch.equal(load_vectors("glove.6B.50d", small(), cache=cache)[0], want)
    shutil.move(cache / "glove.6B.50d.zip", tmp_path / "upstream.zip")
    monkeypatch.setattr(
        words_module, "packaged_path", lambda name: None
    )  # the package that has them is not there
    monkeypatch.setitem(
        words_module.GloVe.url,
        "6B",
        (tmp_path / "upstream.zip").as_uri().replace("upstream.zip", "glove.6B.zip"),
    )
    shutil.move(tmp_path / "upstream.zip", tmp_path / "glove.6B.zip")
    assert torch.equal(load_vectors("glove.6B.50d", small(), cache=cache)[0], want), (
        "downloaded from the address that torchtext knows"
    )


def test_glove_6B_zip_holds_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "glove.6B.zip", "w") as archive:
        for dim in (50, 100):
            archive.writestr(f"glove.6B.{dim}d.txt", "the " + " ".join(["1"] * dim) + "\n")
    assert load_vectors("glove.6B.100d", small(), cache=tmp_path)[0].shape[1] == 100
    assert load_vectors("glove.6B.50d", small(), cache=tmp_path)[0].shape[1] == 50


def test_without_a_connection_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setitem(words_module.GloVe.url, "840B", "http://127.0.0.1:9/glove.840B.300d.zip")
    with pytest.raises(
        VectorsError,
        match=(
            r"glove.840B.300d could not be downloaded .*Fetch http://127.0.0.1:9/glove.840B.300d.zip .*put"
            r" it.* into"
        ),
    ):
        load_vectors("glove.840B.300d", small(), cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


DAMAGED = [
    (b"", "none of the words"),
    (b"<html>", "none of the words"),
    (b"the\n", "none of the words"),
    (b"\xff\xfe 1 2 3\n", "none of the words"),
    (b"the 1 2 3\nman 1 2\n", "not readable"),
    (b"the a b c\n", "not readable"),
    (b"the 1 2 nan\n", "not finite"),
]


@pytest.mark.parametrize("content,says", DAMAGED)
def test_damaged_vectors_are_named(tmp_path, content, says):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(VectorsError, match=rf"bad\.txt.*{says}"):
        load_vectors(tmp_path / "bad.txt", small(), tmp_path)
    assert not list(tmp_path.glob("vectors*"))


def test_unknown_names_list_the_known(tmp_path):
    for name in ("word2vec", "glove.9B.300d", str(tmp_path / "missing.txt"), ""):
        with pytest.raises(VectorsError, match="glove.840B.300d"):
            load_vectors(name, small(), cache=tmp_path)


numbers = st.lists(st.floats(-2, 2) | st.sampled_from(["", "x", "1e999"]), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["the", "man", "dog", "x", ""]), numbers), max_size=5),
    st.binary(max_size=10),
)
def test_fuzz_vectors(tmp_path, rows, junk):
    path = tmp_path / "fuzz.txt"
    path.write_bytes("\n".join(f"{w} {' '.join(map(str, v))}" for w, v in rows).encode() + junk)
    try:
        vectors, _ = load_vectors(path, small())
    except VectorsError as error:
        enough_memory(error)
        assert "fuzz.txt" in str(error)
    else:
        assert torch.isfinite(vectors).all() and len(vectors) == len(small())


def test_a_large_file_is_filtered_line_by_line(tmp_path):
    """50 MB of vectors pass through without being held in memory."""
    import tracemalloc

    line = "word%d " + " ".join(["0.12345"] * 300) + "\n"
    with open(tmp_path / "large.txt", "w") as file:
        for i in range(20000):
            file.write(line % i)
    tracemalloc.start()
    kept = filter_vectors(tmp_path / "large.txt", {"word7", "word19999"}, tmp_path / "out.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == 2 and peak < 2e6
