"""Anybody's predictor through `evaluate`, and the relation probe: what it says about readers of which we know what they lack."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refseg_nb.data.batches import RISDataset
from refseg_nb.data.refer import Refer
from refseg_nb.errors import InputError, NotFoundError
from refseg_nb.evaluation.evaluator import Evaluator, evaluate
from refseg_nb.evaluation.predictors import (
    Called,
    MaskWriter,
    RawSplit,
    StoredMasks,
    as_predictor,
    check_answer,
    check_predictor,
    split_answers,
)
from refseg_nb.evaluation.protocols import choose_threshold, compare, evaluate_protocols
from refseg_nb.inference.segmenter import load
from refseg_nb.probe.questions import (
    NOTHING,
    SLOTS,
    SORTS,
    Probe,
    load_probe,
    make_questions,
    say,
    write_probe,
)
from refseg_nb.probe.readers import READERS, Reader
from refseg_nb.probe.run import load_result, run_probe, shares, summarise
from refseg_nb.refshapes.expressions import execute, parse_program

CONTROL = {"text_control": None, "image_control": None, "seed": 0}


@pytest.fixture(scope="module")
def refer(tiny_root):
    return Refer(tiny_root, "refshapes")


@pytest.fixture(scope="module")
def shnet():
    return load("shnet-refshapes")


@pytest.fixture(scope="module")
def split(refer):
    return RawSplit(refer, "testB")


def data_of(refer, shnet, split="testB"):
    return RISDataset(refer, split, shnet.vocabulary, shnet.image_size, None, shnet.max_words)


def reddest(image, phrases):
    "A predictor of ten lines: it takes the red half of the image, whatever is said."
    red = image[..., 0].astype(int) - image[..., 1:].mean(2)
    return [red > np.median(red)] * len(phrases)


# ---- what is counted


def test_a_function_is_scored_as_a_loop_over_its_masks_scores_it(refer, split):
    record = evaluate(reddest, split, resamples=10)
    both = either = 0
    ious = []
    for sample in refer.samples("testB"):
        image = np.asarray(refer.load_image(sample.image_id)).astype(int)
        red = image[..., 0] - (image[..., 1] + image[..., 2]) / 2
        mask, true = red > np.median(red), refer.mask(sample.ann_id)
        i, u = np.count_nonzero(mask & true), np.count_nonzero(mask | true)
        both, either = both + i, either + u
        ious.append(i / u)
    assert record.metrics["overall_iou"]["value"] == pytest.approx(100 * both / either, abs=1e-9)
    assert record.metrics["mean_iou"]["value"] == pytest.approx(100 * np.mean(ious), abs=1e-9)
    assert record.name == "model" and record.config == {"predictor": "reddest"}
    assert record.protocol["image_size"] is None and record.protocol["split"] == "testB"


@pytest.mark.parametrize("place", ["masks", "results.json"])
def test_masks_of_our_own_predictions_give_the_records_numbers_to_the_last_digit(
    refer, shnet, split, tmp_path, place
):
    path = tmp_path / place
    direct = evaluate(shnet.model, data_of(refer, shnet), masks=path, resamples=50)
    stored = evaluate(str(path), split, resamples=50)
    assert stored.metrics == direct.metrics and stored.groups == direct.groups
    for name, column in direct.arrays.items():
        assert np.array_equal(column, stored.arrays[name]), name
    assert compare(direct, stored, resamples=20).metrics["overall_iou"]["difference"] == 0


def test_a_segmenter_is_a_predictor_like_any_other(refer, shnet, split):
    direct = evaluate(shnet.model, data_of(refer, shnet), limit=3, resamples=5)
    asked = evaluate(shnet, split, limit=3, resamples=5)
    for name in ("intersection", "union"):  # batches of another size: a pixel may fall to the other side
        assert np.abs(direct.arrays[name] - asked.arrays[name]).max() <= 2


def test_every_protocol_and_control_works_on_a_predictor(refer, split):
    names = list(evaluate_protocols(reddest, split, limit=3, resamples=5))
    assert len(names) == 7
    asked = []

    def listener(image, phrases):
        asked.extend((int(image.max()), phrase) for phrase in phrases)
        return reddest(image, phrases)

    own = {s.text for s in refer.samples("testB")}
    evaluate(listener, split, text_control="none", limit=2, resamples=2)
    assert {phrase for _, phrase in asked} == {""}
    asked.clear()
    evaluate(listener, split, text_control="shuffled", image_control="none", resamples=2)
    assert {top for top, _ in asked} == {127} and {phrase for _, phrase in asked} == own
    choice = choose_threshold(lambda image, phrases: [image[..., 0] / 255] * len(phrases), split, limit=3)
    assert choice.threshold in choice.curve


def test_probabilities_and_logits_are_the_same_answer(split):
    soft = lambda image, phrases: [image[::2, ::2, 0] / 300 + 0.05] * len(phrases)
    logits = lambda image, phrases: [np.log(p / (1 - p)) for p in soft(image, phrases)]
    a = evaluate(Called(soft), split, resamples=5, limit=4)
    b = evaluate(Called(logits, scores="logit"), split, resamples=5, limit=4)
    assert np.abs(a.arrays["intersection"] - b.arrays["intersection"]).max() <= 1
    tensor = lambda image, phrases: torch.tensor(np.stack(soft(image, phrases)))
    c = evaluate(tensor, split, resamples=5, limit=4)
    assert np.array_equal(a.arrays["intersection"], c.arrays["intersection"])


def test_our_model_wants_words_as_numbers(shnet, split):
    with pytest.raises(InputError, match="give it a RISDataset"):
        evaluate(shnet.model, split)


# ---- what is wrong with an answer


SIZE = (6, 9)
WRONG = [
    (None, "returned None"),
    ({"masks": 1}, "a dict with masks"),
    (np.zeros(SIZE, bool), "a single array of 6 x 9"),
    (np.zeros((6, 9, 2), bool), "phrases come first"),
    ([np.zeros(SIZE, bool)], "1 answers: give a list with one mask for each of the 2"),
    ("mask", "'mask'"),
    ([np.zeros((9, 6), bool)] * 2, "height and width are swapped"),
    ([np.zeros((9, 6))] * 2, "height and width are swapped"),
    ([np.zeros((3, 4), bool)] * 2, "give it the image's size"),
    ([np.zeros((1, 6, 9), bool)] * 2, "leave out the axes of length 1"),
    ([np.arange(54).reshape(SIZE)] * 2, "whole numbers, 0 to 53"),
    ([np.full(SIZE, 128.0)] * 2, "divide by 255"),
    ([np.linspace(-3, 9, 54).reshape(SIZE)] * 2, "apply a sigmoid"),
    ([np.full(SIZE, np.inf)] * 2, "54 of its 54 values are not finite"),
    ([np.full(SIZE, 1j)] * 2, "complex128"),
    ([[[1, 2], [3]]] * 2, "not"),
]


@pytest.mark.parametrize("answer, words", WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_said_in_words(answer, words):
    predictor = Called(lambda image, phrases: answer, "theirs")
    with pytest.raises(InputError, match="^theirs: ") as error:
        predictor.ask(np.zeros((*SIZE, 3), np.uint8), [None, None], ["a", "b"])
    assert words in str(error.value)


@given(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.sampled_from(["bool", "uint8", "float32"]))
@settings(max_examples=30, deadline=None)
def test_a_right_answer_of_any_type_passes_as_it_is(n, h, w, kind):
    masks = np.random.default_rng(0).random((n, h, w)) < 0.5
    given_ = masks.astype(kind) * (255 if kind == "uint8" else 1)
    for value in (given_, list(given_), given_.tolist() if kind != "uint8" else list(given_)):
        answers = [check_answer(a, (h, w)) for a in split_answers(value, n, (h, w))]
        assert all(((a > 0.5) == m).all() for a, m in zip(answers, masks))


def by_area(image, phrases):
    height = len(image)
    return [np.arange(height)[:, None] + 0 * image[..., 0].astype(int) < len(p) % height for p in phrases]


def test_the_conformance_check_tells_faults_apart():
    calls = []

    def forgetful(image, phrases):
        calls.append(1)
        return [np.roll(m, len(calls), axis=0) for m in by_area(image, phrases)]

    turned = lambda image, phrases: by_area(image, phrases)[::-1]
    company = lambda image, phrases: [m if len(phrases) == 1 else ~m for m in by_area(image, phrases)]
    assert check_predictor(by_area).ok
    for predictor, words in (
        (forgetful, "each time"),
        (turned, "do not come in the order"),
        (company, "asked alone"),
        (lambda image, phrases: 1 / 0, "ZeroDivisionError"),
    ):
        report = check_predictor(predictor)
        assert not report.ok and words in str(report), report
    quiet = check_predictor(
        Called(lambda image, phrases: [np.full((4, 4), 0.2)] * len(phrases), scores="logit")
    )
    assert quiet.ok and any("are they probabilities" in note for note in quiet.notes)


# ---- masks on disk


@pytest.fixture
def six(refer):
    samples = refer.samples("val")[:6]
    return samples, {s.sent_id: refer.mask(s.ann_id) for s in samples}


def read_back(path, refer, samples, **more):
    stored = StoredMasks(path, **more)
    stored.begin(samples, lambda i: refer.image(i).file_name, CONTROL)
    images = [np.asarray(refer.load_image(s.image_id)) for s in samples]
    return [stored.ask(image, [s], [s.text])[0] for image, s in zip(images, samples)]


def runs_by_hand(mask):
    "COCO's uncompressed run lengths, column by column, beginning with zeros."
    counts, value, run = [], False, 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


SHAPES = {
    "coco list": lambda s, r, f: {"image_id": s.image_id, "sent_id": s.sent_id, "segmentation": r},
    "ref and sentence": lambda s, r, f: {"ref_id": s.ref_id, "sent_id": s.sent_id, "rle": r},
    "image and phrase": lambda s, r, f: {
        "file_name": f"some/where/{f}",
        "caption": f"  {s.text.upper()} ",
        "mask": r,
    },
    "image_id and expression": lambda s, r, f: {"image_id": s.image_id, "expression": s.text, "pred_mask": r},
    "rle as text": lambda s, r, f: {"sent_id": s.sent_id, "mask": json.dumps(r)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_results_of_other_tools_are_read(refer, six, tmp_path, shape, ending):
    samples, masks = six
    entries = [
        SHAPES[shape](s, runs_by_hand(masks[s.sent_id]), refer.image(s.image_id).file_name.split("/")[-1])
        for s in samples
    ]
    file = tmp_path / f"theirs{ending}"
    file.write_text(
        "\n".join(map(json.dumps, entries)) if ending == ".jsonl" else json.dumps({"results": entries})
    )
    for mask, s in zip(read_back(file, refer, samples), samples):
        assert np.array_equal(mask, masks[s.sent_id])


def test_a_dict_by_sentence_and_the_best_of_several_boxes(refer, six, tmp_path):
    samples, masks = six
    (tmp_path / "a.json").write_text(json.dumps({str(k): runs_by_hand(m) for k, m in masks.items()}))
    assert np.array_equal(read_back(tmp_path / "a.json", refer, samples)[2], masks[samples[2].sent_id])
    entries = [{"sent_id": k, "rle": runs_by_hand(m), "score": 0.7} for k, m in masks.items()]
    worse = [entry | {"rle": runs_by_hand(~masks[entry["sent_id"]]), "score": 0.6} for entry in entries]
    (tmp_path / "b.json").write_text(json.dumps(worse[:3] + entries + worse[3:]))
    for mask, s in zip(read_back(tmp_path / "b.json", refer, samples), samples):
        assert np.array_equal(mask, masks[s.sent_id])
    (tmp_path / "c.json").write_text(json.dumps([{"sent_id": 1, "rle": []}] * 2))
    with pytest.raises(InputError, match="result 2 is about the same sentence as .*result 1, without scores"):
        StoredMasks(tmp_path / "c.json")


def test_files_of_every_kind(refer, six, tmp_path):
    samples, masks = six
    writer = MaskWriter(tmp_path / "m", samples)
    for s in samples:
        writer.add(s, masks[s.sent_id])
    first, second, third = (tmp_path / "m" / f"{s.sent_id}.png" for s in samples[:3])
    Image.fromarray(255 * np.stack([masks[samples[0].sent_id]] * 3, 2).astype(np.uint8)).save(
        first
    )  # grey, as RGB
    soft = (100 * masks[samples[1].sent_id] + 100).astype(np.uint8)
    soft[0, 0] = 7  # three levels: scores from 0 to 255
    Image.fromarray(soft).save(second)
    third.rename(tmp_path / "m" / f"{samples[2].ref_id}-{samples[2].sent_id}.png")
    found = read_back(tmp_path / "m", refer, samples)
    assert np.array_equal(found[0], masks[samples[0].sent_id]) and np.array_equal(
        found[2], masks[samples[2].sent_id]
    )
    assert found[1].dtype == np.float32 and np.allclose(found[1], soft / 255)
    for damage, words in (
        (lambda: Image.fromarray(np.zeros((5, 7), bool)).save(first), "is 5 x 7, but its image is 96 x 96"),
        (lambda: first.write_bytes(b"no"), "not a readable image"),
        (lambda: first.rename(first.with_name("first.png")), "is not named by its sentence"),
        (lambda: first.with_name("first.png").unlink(), "no mask for 1 of 6 sentences"),
    ):
        damage()
        with pytest.raises(InputError, match=words):
            read_back(tmp_path / "m", refer, samples)
    assert not read_back(tmp_path / "m", refer, samples, missing="empty")[0].any()


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a list of results"),
        ('[{"sent_id": 3}]', "result 1 has no mask"),
        ('[{"rle": []}]', "result 1 names no sentence"),
        ("[]", "holds no masks"),
    ],
)
def test_damaged_results_are_refused(tmp_path, text, words):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=words):
        StoredMasks(tmp_path / "r.json")
    with pytest.raises(NotFoundError):
        StoredMasks(tmp_path / "no.json")


def test_stored_masks_answer_a_control_only_if_they_were_asked(refer, shnet, split, tmp_path):
    data = data_of(refer, shnet)
    own = evaluate(shnet.model, data, masks=tmp_path / "own", resamples=5)
    other = evaluate(shnet.model, data, text_control="other", resamples=5)
    stored = evaluate(tmp_path / "own", split, text_control="other", resamples=5)
    # the answer to the other phrase is the one that lies there
    assert np.array_equal(other.arrays["intersection"], stored.arrays["intersection"])
    assert not np.array_equal(own.arrays["intersection"], stored.arrays["intersection"])
    for control in ({"text_control": "shuffled"}, {"text_control": "none"}, {"image_control": "none"}):
        with pytest.raises(InputError, match="--requests"):
            evaluate(tmp_path / "own", split, **control)
    direct = evaluate(shnet.model, data, text_control="shuffled", masks=tmp_path / "blind", resamples=5)
    lines = Evaluator(split, text_control="shuffled").requests()
    (tmp_path / "blind" / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    blind = evaluate(tmp_path / "blind", split, text_control="shuffled", resamples=5)
    assert blind.metrics == direct.metrics
    with pytest.raises(InputError, match="was written under the controls"):
        evaluate(tmp_path / "blind", split)


def test_missing_masks_count_as_empty_and_are_counted(refer, shnet, split, tmp_path):
    evaluate(shnet.model, data_of(refer, shnet), masks=tmp_path / "m", resamples=5)
    gone = sorted((tmp_path / "m").glob("*.png"))[:4]
    for file in gone:
        file.unlink()
    record = evaluate(as_predictor(tmp_path / "m", missing="empty"), split, resamples=5)
    assert record.protocol["masks_missing"] == 4
    lost = np.isin(record.arrays["sent_id"], [int(f.stem) for f in gone])
    assert (record.arrays["intersection"][lost] == 0).all()
    assert np.array_equal(record.arrays["union"][lost], record.arrays["area"][lost])


# ---- the probe


@pytest.fixture(scope="module")
def probe():
    "Images 1 to 100, each drawn once for all tests of this file."
    whole = load_probe()
    own, whole.drawn = whole.drawn, cache(whole._draw)
    yield whole.part(100)
    whole.drawn = own


def test_the_stored_questions_are_what_the_code_makes():
    counts = {sort: spec[3] for sort, spec in SORTS.items()}
    images, questions = make_questions(dict.fromkeys(counts, 2))
    again = make_questions(dict.fromkeys(counts, 2))
    assert (images, questions) == again and len(questions) == 4 * len(counts)
    stored = load_probe()
    assert len(stored.questions) == 2 * sum(counts.values()) and stored.version == 1
    known = {(stored.images[q.image_id]["index"], q.text, q.program, q.referent) for q in stored.questions}
    asked = [(images[q.image_id - 1]["index"], q.text, q.program, q.referent) for q in questions]
    # the first scenes give the same pairs whatever is asked for, as long as the sorts are open
    assert sum(row in known for row in asked) >= len(asked) // 2


def test_a_pair_differs_in_one_slot_and_in_its_object(probe):
    for a, b in zip(probe.questions[::2], probe.questions[1::2]):
        assert a.pair == b.pair and a.image_id == b.image_id and a.referent != b.referent and a.text != b.text
        left, right = a.text.split(), b.text.split()
        if a.slot in ("noun", "colour", "size", "side"):
            # "the man in red", "the red ball": people wear their colour
            one = sum(x != y for x, y in zip(left, right)) == 1 and len(left) == len(right)
            assert (
                one
                or a.slot == "noun"
                and {*left} ^ {*right} == {"in", a.program[4:].split(".")[0], b.program[4:].split(".")[0]}
            )
        if a.slot == "anchor":
            assert left[: left.index("to")] == right[: right.index("to")]
        if a.slot == "order":  # head and anchor change places
            assert left[2:4] == ["closest", "to"] == right[2:4]
            assert (left[1], left[-1]) == (right[-1], right[1]) and left[-2] in ("a", "an")
    assert {q.slot for q in probe.questions} == {*SLOTS, ""}


def test_what_a_phrase_means_by_the_drawn_pixels_alone(probe):
    "Superlatives and relations measured on the masks at 512 pixels, with code of this test's own."
    checked = 0
    for q in (q for q in probe.questions[:300] if q.kind in ("superlative", "relation")):
        scene, drawn = probe.drawn(q.image_id)
        boxes = np.array([[*p.min(0), *(p.max(0) + 1)] for p in map(np.argwhere, drawn.full)], float)
        y, x = (boxes[:, :2] + boxes[:, 2:]).T / 2
        words, kinds = q.text.split(), [t.category for t in scene.objects]
        if q.kind == "superlative":
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            ranks = {
                "leftmost": x,
                "rightmost": -x,
                "highest": y,
                "lowest": -y,
                "biggest": -area,
                "smallest": area,
            }
            value, head = ranks[words[1]], words[2]
        else:
            anchors = [i for i, kind in enumerate(kinds) if kind == words[-1]]
            assert (len(anchors) == 1) == (words[-2] == "the")
            value = np.min([np.hypot(x - x[j], y - y[j]) for j in anchors], axis=0)
            head = words[1]
        best = min((value[i], i) for i, kind in enumerate(kinds) if kind == head)
        assert best[1] == q.referent, q
        checked += 1
    assert checked > 80


def test_a_phrase_that_means_nothing_names_what_is_not_there(probe):
    for q in (q for q in probe.questions if q.referent == NOTHING):
        objects = probe.scene(q.image_id).objects
        words = q.text.split(" closest")[0].split()
        fits = [t for t in objects if t.category in words and (t.color in words or len(words) == 2)]
        assert q.kind == "absent" and not fits


def test_the_true_program_gets_100_everywhere(probe, tmp_path):
    for name, limit in (("true-program", 100), ("human-written", 30)):
        result = run_probe(Reader(name, probe), tmp_path / name, limit=limit)
        shown = [m["value"] for part in result.kinds.values() for m in part.values()]
        shown += [m["value"] for m in result.no_target.values()]
        shown += [m["both right"]["value"] for m in result.slots.values()]
        assert set(shown) == {100.0} and result.ignored == [] and not result.notes
        assert all(m["verdict"] == "read" and m["same answer"]["value"] == 0 for m in result.slots.values())
    whole = load_probe()
    for q in whole.questions:  # what is not drawn here is executed
        found = execute(q.program, whole.scene(q.image_id)) if q.kind != "absent" else None
        assert (NOTHING if found is None else found) == q.referent


@pytest.mark.parametrize("slot", ["colour", "anchor", "order", "side", "size"])
def test_a_crippled_oracle_is_named_as_what_it_is(probe, tmp_path, slot):
    result = run_probe(Reader(f"{slot}-blind", probe), tmp_path, limit=100)
    assert result.ignored == [slot] and result.verdict.startswith(f"It is {slot}-blind: ")
    assert (
        result.slots[slot]["both right"]["value"] == 0 and result.slots[slot]["same answer"]["value"] == 100
    )


def test_who_reads_nothing_is_named_so_and_no_blind_reader_gets_a_pair(probe, tmp_path):
    for name in ("largest-object", "central-object"):
        result = run_probe(Reader(name, probe), tmp_path / name, limit=60)
        assert result.verdict.startswith("It does not read the phrase") and set(result.ignored) == set(SLOTS)
        assert all(m["both right"]["value"] == 0 for m in result.kinds.values())
    assert "head-noun" in READERS


def test_the_scores_are_those_of_a_loop(probe):
    "Random masks, counted by hand."
    part, rng = probe.part(25), np.random.default_rng(1)
    from refseg_nb.evaluation.predictors import encode_mask

    masks = {}
    for q in part.questions:
        drawn = part.drawn(q.image_id)[1].masks
        choice = rng.integers(-1, len(drawn))
        masks[q.sent_id] = np.zeros_like(drawn[0]) if choice < 0 else np.roll(drawn[choice], 3, axis=1)
    answers = {i: {q.sent_id: encode_mask(masks[q.sent_id]) for q in qs} for i, qs in part.of_image.items()}
    result = summarise("random", part, answers)

    def iou(a, b):
        return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0

    own = {q.sent_id: iou(masks[q.sent_id], part.true_mask(q)) for q in part.questions}
    pairs = list(zip(part.questions[::2], part.questions[1::2]))
    for kind, found in result.kinds.items():
        ids = [q.sent_id for q in part.questions if q.kind == kind]
        assert found["mean IoU"]["value"] == pytest.approx(100 * np.mean([own[i] for i in ids]))
        assert found["right"]["n"] == len(ids)
        both = [own[a.sent_id] >= 0.5 and own[b.sent_id] >= 0.5 for a, b in pairs if a.kind == kind]
        assert found["both right"]["value"] == pytest.approx(100 * np.mean(both))
    for slot, found in result.slots.items():
        same = [iou(masks[a.sent_id], masks[b.sent_id]) >= 0.5 for a, b in pairs if a.slot == slot]
        assert found["same answer"]["value"] == pytest.approx(100 * np.mean(same))
    absent = [q for q in part.questions if q.kind == "absent"]
    present = [q for q in part.questions if q.kind == "present"]
    empty = lambda q: not masks[q.sent_id].any()
    assert result.no_target["N-acc"]["value"] == pytest.approx(100 * np.mean([empty(q) for q in absent]))
    assert result.no_target["T-acc"]["value"] == pytest.approx(100 * np.mean([not empty(q) for q in present]))
    gious = [float(empty(q)) for q in absent] + [own[q.sent_id] for q in present]
    assert result.no_target["gIoU"]["value"] == pytest.approx(100 * np.mean(gious))
    with_target = [q for q in part.questions if q.kind != "absent"]
    assert result.record.metrics["samples"] == len(with_target)
    assert result.record.metrics["mean_iou"]["value"] == pytest.approx(
        100 * np.mean([own[q.sent_id] for q in with_target])
    )


def test_shares_resample_images_and_not_rows():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(40), 10)
    hits = np.repeat(rng.random(40) < 0.5, 10).astype(float)  # all rows of an image alike
    everything = np.ones(400, bool)
    found = shares({"a": (everything, hits)}, images, 2000)["a"]
    naive = []
    for _ in range(2000):
        drawn = rng.integers(40, size=40)
        naive.append(100 * hits.reshape(40, 10)[drawn].mean())
    assert np.allclose([found["low"], found["high"]], np.quantile(naive, [0.025, 0.975]), atol=3)


def test_a_stopped_probe_goes_on_and_two_predictors_never_mix(probe, tmp_path):
    asked = []

    class Stops(Reader):
        def ask(self, image, samples, texts):
            if len(asked) == self.until:
                raise KeyboardInterrupt
            asked.append(samples[0].image_id)
            return super().ask(image, samples, texts)

    reader = Stops("head-noun", probe)
    reader.until = 5
    with pytest.raises(KeyboardInterrupt):
        run_probe(reader, tmp_path, limit=9)
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"image_id": 6, "ans')  # the power went
    reader.until = None
    result = run_probe(reader, tmp_path, limit=9)
    assert sorted(asked) == list(range(1, 10))
    assert result.kinds == run_probe(Reader("head-noun", probe), tmp_path / "whole", limit=9).kinds
    with pytest.raises(InputError, match="answers to other questions"):
        run_probe(Reader("side-blind", probe), tmp_path, limit=9)
    assert run_probe(Reader("side-blind", probe), tmp_path, limit=9, fresh=True).name == "side-blind"
    again = load_result(tmp_path)
    assert again.name == "side-blind" and again.record.metrics["samples"] > 0 and again.images == 9


def test_masks_of_a_model_that_ran_elsewhere(probe, tmp_path):
    "Written questions, answered by a program of its own, read back by sentence."
    from refseg_nb.evaluation.predictors import encode_mask

    lines = [
        json.loads(line) for line in write_probe(tmp_path / "asked", probe.part(4)).read_text().splitlines()
    ]
    assert all((tmp_path / "asked" / line["image"]).is_file() for line in lines)
    image = np.asarray(Image.open(tmp_path / "asked" / lines[0]["image"]))
    assert np.array_equal(image, probe.drawn(1)[1].image)
    truth = {q.sent_id: encode_mask(probe.true_mask(q)) for q in probe.questions}
    (tmp_path / "theirs.json").write_text(
        json.dumps([{"sent_id": x["sent_id"], "rle": truth[x["sent_id"]]} for x in lines])
    )
    result = run_probe(tmp_path / "theirs.json", tmp_path / "out", limit=4)
    assert all(m["right"]["value"] == 100 for m in result.kinds.values()) and result.name == "theirs"


def test_two_probes_compare(probe, tmp_path):
    a, b = (run_probe(Reader(n, probe), tmp_path / n, limit=20).record for n in ("head-noun", "true-program"))
    found = compare(a, b, resamples=50)
    assert found.metrics["mean_iou"]["low"] > 0 and "relation" in found.groups["kind"]


def test_words_of_a_program():
    for text, words in {
        "the(man.red)": "the man in red",
        "nearest(ball, a(umbrella))": "the ball closest to an umbrella",
        "nearest(ball.red, most(bottom, 1, dog))": "the red ball closest to the lowest dog",
    }.items():
        assert say(parse_program(text)) == words


def test_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def turned(image, phrases):\n    return [np.zeros(image.shape[1::-1], bool)] * len(phrases)\n"
        "def nothing(image, phrases):\n    return [np.zeros(image.shape[:2], bool)] * len(phrases)\n"
    )
    run = lambda *args: subprocess.run(
        [sys.executable, "-m", "refseg_nb", "probe", *args], cwd=tmp_path, capture_output=True, text=True
    )
    wrong = run("mine:turned", "--limit", "2")
    assert wrong.returncode == 2 and "height and width are swapped" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    right = run("mine:nothing", "--limit", "12")
    assert right.returncode == 0 and "N-acc 100.0" in right.stdout, right.stderr
    out = tmp_path / "runs" / "probe" / "nothing"
    assert Image.open(out / "card.png").size == (1200, 630)
    page = (out / "index.html").read_text()
    assert "N-acc" in page and "http" not in page.replace("http-equiv", "")
    assert run().returncode == 2


def test_a_probe_needs_its_version():
    with pytest.raises(InputError, match="no version 7"):
        load_probe(7)
    with pytest.raises(InputError, match="no reader"):
        Reader("deaf")
    assert isinstance(load_probe().part(3), Probe)
    with pytest.raises(InputError, match="limit must be at least 1"):
        load_probe().part(0)
