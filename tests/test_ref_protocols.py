"""One answer a ref (`lavt-cat`, `lavt-avg`) against loops over refs, and controls at their own thresholds."""

import json

import numpy as np
import pytest
import torch
from test_evaluation import toy_dataset
from test_protocols import Canned, resize
from toy_refer import make_toy
from typer.testing import CliRunner

from refseg_nb.cli import app
from refseg_nb.data.batches import RISDataset
from refseg_nb.data.referit import open_data
from refseg_nb.data.words import PAD, WordPieces
from refseg_nb.evaluation.evaluator import controlled_texts, evaluate
from refseg_nb.evaluation.protocols import (
    PROTOCOLS,
    at_own_threshold,
    choose_threshold,
    evaluate_protocols,
    find_protocols,
    join_sentences,
)
from refseg_nb.refshapes.dataset import tiny_data


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(make_toy(tmp_path_factory.mktemp("toy"), size=41))


class Positions(Canned):
    """Hears where a word stands, as BERT does: padding inside a phrase moves the words behind it."""

    def answer(self, image, words):
        real = [(place, int(word)) for place, word in enumerate(words) if word != PAD]
        seed = hash((int(image.long().sum()), tuple(real))) % 2**31
        return torch.empty(6, 6).uniform_(self.low, self.high, generator=torch.Generator().manual_seed(seed))


def refs(dataset, texts=None):
    "ref_id -> its samples and the texts that are read, in the data set's order."
    found = {}
    for group in dataset.groups:
        for i in group[1]:
            s = dataset.samples[i]
            text = s.text if texts is None else texts[s.ref_id, s.sent_id]
            samples, said = found.setdefault(s.ref_id, ([], []))
            if text is not None:
                samples.append(s)
                said.append(text)
    return {k: v for k, v in found.items() if v[0]}


def scored(z, dataset, sample):
    "The map at the image's size, above one half; intersection and union."
    y = dataset.original_mask(sample)
    pred = resize(1 / (1 + np.exp(-z.detach().numpy().astype(float))), y.shape) > 0.5
    return int((pred & y).sum()), int((pred | y).sum())


def average(model, dataset, said, image):
    total = 0
    for text in said:
        total = total + model.answer(image, torch.tensor(dataset.vocabulary.encode(text, dataset.max_words)))
    return total / len(said)


def joined(model, dataset, said, image):
    row = []
    for text in said:
        numbers = dataset.vocabulary.encode(text, dataset.max_words)
        row += numbers
        if isinstance(dataset.vocabulary, WordPieces):
            row += [PAD] * (dataset.max_words - len(numbers))
    if not isinstance(dataset.vocabulary, WordPieces):
        row = row[: dataset.max_words]
    return model.answer(image, torch.tensor(row))


def compare_with_loops(record, dataset, model, how, texts=None):
    a, want = record.arrays, {}
    for ref_id, (samples, said) in refs(dataset, texts).items():
        z = how(model, dataset, said, dataset.image(samples[0].image_id))
        want[ref_id] = (samples[0].sent_id, *scored(z, dataset, samples[0]))
    got = {
        r: (s, i, u)
        for r, s, i, u in zip(*(a[k].tolist() for k in ("ref_id", "sent_id", "intersection", "union")))
    }
    assert got.keys() == want.keys() and len(got) == len(a["ref_id"])
    for ref_id, (sent, i, u) in want.items():
        assert got[ref_id][0] == sent
        assert abs(got[ref_id][1] - i) <= 1 and abs(got[ref_id][2] - u) <= 1, "float32 may move a pixel"
    iou = sum(i for _, i, _ in want.values()) / sum(u for *_, u in want.values())
    assert record.metrics["overall_iou"]["value"] == pytest.approx(100 * iou, abs=0.5)


WAYS = {"lavt-cat": joined, "lavt-avg": average}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("step", [64, 3])
def test_one_answer_a_ref_is_what_a_loop_over_refs_gives(name, step, toy):
    several = [len(said) for _, said in refs(toy).values()]
    assert max(several) > 1 and len(several) < len(toy.samples)
    found = evaluate_protocols(
        Canned(), toy, [name], resamples=2, images_per_batch=2, expressions_per_step=step
    )
    compare_with_loops(found[name], toy, Canned(), WAYS[name])


@pytest.mark.parametrize("name", WAYS)
def test_word_pieces_are_joined_with_their_paddings(name, real_data, tmp_path):
    pytest.importorskip("transformers")
    refer = open_data(real_data, "refcoco", "micro")
    pieces = WordPieces(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "left", "right", "man", "the", "in", "white"], "lavt"
    )
    data = RISDataset(refer, "val", pieces, 32, None, 7, sentence="raw")
    record = evaluate_protocols(Positions(), data, [name], resamples=2)[name]
    assert record.metrics["samples"] == 6 and record.protocol["text"] == "raw"
    compare_with_loops(record, data, Positions(), WAYS[name])


@pytest.mark.parametrize("name", WAYS)
def test_controls_reach_every_sentence_of_a_ref(name, toy):
    groups = [[toy.samples[i] for i in indices] for _, indices in toy.groups]
    texts = {
        (s.ref_id, s.sent_id): t
        for group, said in zip(groups, controlled_texts(groups, "other", 5))
        for s, t in zip(group, said)
    }
    record = evaluate_protocols(Canned(), toy, [name], text_control="other", seed=5, resamples=2)[name]
    compare_with_loops(record, toy, Canned(), WAYS[name], texts)


def test_protocols_of_both_kinds_in_one_call(toy):
    model = Canned()
    found = evaluate_protocols(model, toy, ["lavt-avg", "refseg", "cris", "lavt-cat"], resamples=2)
    assert list(found) == ["lavt-avg", "refseg", "cris", "lavt-cat"]
    # sentences once for refseg and cris, once for the average, one input a ref for the join
    assert sum(model.seen) == 2 * len(toy.samples) + len(refs(toy))
    alone = evaluate_protocols(Canned(), toy, ["refseg"], resamples=2)["refseg"]
    for k, v in alone.arrays.items():
        assert np.array_equal(found["refseg"].arrays[k], v)


def test_a_ref_with_one_sentence_is_scored_as_ever(toy):
    lonely = {(s.ref_id, s.sent_id) for samples, _ in refs(toy).values() for s in samples[1:]}
    one = evaluate_protocols(Canned(), toy, ["lavt-cat", "lavt-avg", "refseg"], ignore=lonely, resamples=2)
    for name in WAYS:
        for k in ("ref_id", "sent_id", "intersection", "union"):
            assert np.array_equal(one[name].arrays[k], one["refseg"].arrays[k])


def test_what_the_records_say(toy):
    found = evaluate_protocols(Canned(), toy, list(WAYS), resamples=2)
    for name, sentences in (("lavt-cat", "joined"), ("lavt-avg", "averaged")):
        stamp = found[name].protocol
        assert (
            stamp["sentences"] == sentences
            and stamp["resolution"] == "original"
            and stamp["threshold"] == 0.5
        )
        assert "not comparable" in stamp["source"] and "undefined there, 0 here" in stamp["source"]
    assert not {p.name for p in find_protocols()} & set(WAYS)  # what is asked for nothing in particular
    for name in ("shnet", "shnet-56"):
        assert "two empty masks are undefined there, 1 here" in PROTOCOLS[name].source


def test_bert_reads_no_more_than_its_positions():
    assert len(join_sentences([[7] * 30] * 40, 30, padded=True)) == 512
    assert join_sentences([[1, 2], [3]], 2, padded=False) == [1, 2]


# ---- controls at their own thresholds


@pytest.mark.parametrize(
    "control", [{"text_control": "none"}, {"text_control": "other"}, {"image_control": "none"}]
)
def test_a_control_s_own_threshold_is_the_best_of_all_evaluations(control, toy):
    model = Canned(low=-4.0, high=0.5)
    own = at_own_threshold(model, toy, toy, **control, seed=3)
    tried = {
        t: evaluate(model, toy, t, resamples=2, seed=3, **control).metrics
        for t in (i / 20 for i in range(1, 20))
    }
    best = max(tried.values(), key=lambda m: m["overall_iou"]["value"])
    assert own["overall_iou"] == pytest.approx(best["overall_iou"]["value"])
    assert own["overall_iou"] > tried[0.5]["overall_iou"]["value"]
    assert own["mean_iou"] == pytest.approx(tried[own["threshold"]]["mean_iou"]["value"])
    plain = choose_threshold(model, toy, seed=3)
    assert plain.counts != choose_threshold(model, toy, seed=3, **control).counts


def test_a_control_s_threshold_comes_from_the_other_split(toy):
    test = evaluate(Canned(), toy, 0.3, text_control="none", resamples=2)
    own = at_own_threshold(Canned(), toy, toy, "none")
    assert own["chosen_on"] == choose_threshold(Canned(), toy, text_control="none").chosen_on
    assert test.protocol["text_control"] == "none"


def test_the_command_prints_both_thresholds_and_keeps_the_record_s_old_keys(tmp_path):
    run = lambda *more: CliRunner().invoke(
        app,
        ["evaluate", "shnet-refshapes", "--root", str(tiny_data()), "--limit", "6", "--device", "cpu", *more],
        env={"COLUMNS": "120", "TERM": "dumb"},
    )
    blind = run("--text-control", "none", "--split", "testA", "--out", str(tmp_path / "blind.json"))
    assert blind.exit_code == 0, blind.output
    record = json.loads((tmp_path / "blind.json").read_text())
    own = record["protocol"]["own_threshold"]
    assert " val: 6 images" in own["chosen_on"] and record["protocol"]["threshold"] == 0.5
    assert record["protocol"]["threshold_from"] == "fixed" and record["protocol"]["split"] == "testA"
    line = next(x for x in blind.output.splitlines() if x.startswith("overall IoU at the fixed threshold"))
    assert f"{record['metrics']['overall_iou']['value']:.1f}" in line and f"{own['overall_iou']:.1f}" in line
    plain = run("--out", str(tmp_path / "plain.json"))
    assert plain.exit_code == 0 and "own best" not in plain.output
    assert "own_threshold" not in json.loads((tmp_path / "plain.json").read_text())["protocol"]
    for name in ("lavt-cat", "lavt-avg"):
        said = run("--protocol", name, "--out", str(tmp_path / f"{name}.json"))
        assert said.exit_code == 0, said.output
