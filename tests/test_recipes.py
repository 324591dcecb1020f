"""The published recipes of CMPC, LAVT and CrossVLT as the learner acts on them: words, weights, optimizer,
schedule, unit, and how they are measured."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import refseg_nb
from refseg_nb.cli import app
from refseg_nb.data.batches import RISDataset, epoch_batches
from refseg_nb.data.refer import Refer
from refseg_nb.data.words import WordPieces, tokenize, vocabulary_for
from refseg_nb.models.base import Recipe
from refseg_nb.models.hub import CheckpointError, load_model
from refseg_nb.models.losses import mean_weight, weighted_loss
from refseg_nb.models.text import bert_encoder
from refseg_nb.training.config import TrainConfig
from refseg_nb.training.learner import (
    Learner,
    Objective,
    check_same_config,
    comparable,
    expression_batches,
    polynomial_decay,
    train,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

SMALL = {
    "lavt": {
        "backbone": "swin-refshapes",
        "window": 6,
        "image_size": 96,
        "drop_path": 0.0,
        "text_layers": 2,
        "text_width": 16,
        "text_heads": 2,
        "text_dropout": 0.0,
        "text_weights": "none",
        "trained_layers": 1,
        "decoder_width": 8,
    }
}
SMALL["crossvlt"] = {k: v for k, v in SMALL["lavt"].items() if k != "trained_layers"} | {
    "text_layers": 1,
    "head_width": 16,
    "align_width": 8,
}


@pytest.fixture(scope="module")
def pieces(tiny_root, tmp_path_factory):
    "A vocab.txt with the words of RefShapes."
    words = sorted({w for s in Refer(tiny_root, "refshapes").samples("train") for w in tokenize(s.text)})
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return path


@pytest.fixture(scope="module")
def typed_root(tiny_root, tmp_path_factory):
    "The tiny RefShapes, its sentences typed in capitals and with a mark at the end."
    root = tmp_path_factory.mktemp("typed")
    shutil.copytree(tiny_root, root, dirs_exist_ok=True)
    from refseg_nb.data.refer import load_pickle

    [file] = (root / "refshapes").glob("refs*.p")
    refs = load_pickle(file)
    for ref in refs:
        for s in ref["sentences"]:
            s["raw"] = s["sent"].upper() + "!"
    import pickle

    file.write_bytes(pickle.dumps(refs))
    return root


def settings(name, root, out, **more):
    usual = {
        "preset": "base",
        "overrides": SMALL.get(name, {}),
        "images_per_batch": 2,
        "expressions_per_image": 2,
        "limit": 8,
        "max_steps": 4,
        "mask_size": 48,
        "val_split": None,
    }
    return TrainConfig(
        model=name, root=str(root), out=str(out), quiet=True, device="cpu", threads=1, **usual | more
    )


# --- words


@pytest.mark.parametrize("name", SMALL)
def test_published_sizes_read_word_pieces(name, typed_root, pieces, tmp_path):
    "Trained, stopped, resumed and asked, with BERT's pieces and sentences as typed."
    whole = train(settings(name, typed_root, tmp_path / "whole", pieces=pieces, checkpoint_every=2))
    assert (
        whole.steps == 4 and isinstance(whole.vocabulary, WordPieces) and whole.vocabulary.protocol == "lavt"
    )
    assert (whole.config.sentence, whole.config.unit, whole.config.class_weights, whole.config.targets) == (
        "raw",
        "ref",
        (0.9, 1.1),
        "hard",
    )
    shutil.copytree(
        tmp_path / "whole" / "checkpoint" / "step-00000002",
        tmp_path / "parts" / "checkpoint" / "step-00000002",
    )
    resumed = train(settings(name, typed_root, tmp_path / "parts", pieces=pieces, checkpoint_every=2))
    assert resumed.resumed_from == 2 and all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )
    stored = (tmp_path / "whole" / "model" / "config.json").read_text()
    assert str(tmp_path) not in stored and str(pieces) not in stored
    seg = refseg_nb.load(tmp_path / "whole")
    assert seg.sentence == "raw" and seg.vocabulary == whole.vocabulary
    refer = Refer(typed_root, "refshapes")
    sample = refer.samples("val")[0]
    scene = seg.encode(refer.load_image(sample.image_id))
    answer = scene.segment(sample.sentence.raw, return_attention=True)
    assert answer.words == sample.sentence.raw.split() and answer.mask.shape == (96, 96)
    ids = whole.vocabulary.encode(sample.sentence.raw, seg.max_words)
    assert ids[0] == 2 and (ids[-1] == 3 or len(ids) == seg.max_words)
    with torch.no_grad():
        logits = seg.model.segment(scene.features, torch.tensor([ids]), torch.zeros(1, dtype=torch.long))
    from refseg_nb.evaluation.evaluator import probability_at

    np.testing.assert_allclose(answer.probability, probability_at(logits, (96, 96))[0].numpy(), atol=1e-6)
    other = pieces.with_name("other.txt")
    other.write_text(pieces.read_text().replace("[MASK]", "[MORE]"))
    with pytest.raises(CheckpointError, match="other words"):
        train(settings(name, typed_root, tmp_path / "whole", pieces=other, checkpoint_every=2))


def test_where_pieces_come_from(tiny_root, pieces, tmp_path, monkeypatch):
    def offline(name, protocol):
        raise FileNotFoundError(f"the vocabulary of {name} is not here and could not be fetched")

    monkeypatch.setattr(WordPieces, "pretrained", offline)
    with pytest.raises(
        FileNotFoundError, match="bert-base-uncased.*pieces='vocab.txt', or refseg train --pieces vocab.txt"
    ):
        Learner(settings("lavt", tiny_root, tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        Learner(settings("lavt", tiny_root, tmp_path, pieces=tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="reads the words of refshapes, not BERT's pieces"):
        Learner(settings("lavt", tiny_root, tmp_path, pieces=pieces, preset="refshapes", overrides={}))
    with pytest.raises(ValueError, match="vectors='glove.6B.50d'"):
        Learner(settings("lavt", tiny_root, tmp_path, pieces=pieces, vectors="glove.6B.50d"))
    asked = []
    monkeypatch.setattr(
        WordPieces,
        "pretrained",
        lambda name, protocol: asked.append((name, protocol)) or WordPieces.from_file(pieces, protocol),
    )
    Learner(settings("crossvlt", tiny_root, tmp_path))
    own = Learner(settings("lavt", tiny_root, tmp_path, overrides=SMALL["lavt"] | {"begin": True}))
    assert asked == [("bert-base-uncased", "lavt")] and own.vocabulary == vocabulary_for(own.data.refer)


def test_a_bert_of_another_vocabulary_is_refused(tmp_path):
    bert_encoder(1, 16, 2, 30, weights="none").bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no BERT of 40 pieces and 16 channels"):
        bert_encoder(1, 16, 2, 40, weights=str(tmp_path))


def test_torch_knows_its_constructors_after_a_bert_was_loaded(tmp_path):
    """In a process of its own: transformers replaces torch.linspace while it loads, and torch lists its
    constructors once."""
    bert_encoder(1, 16, 2, 30, weights="none").bert.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from refseg_nb.models.text import bert_encoder; bert_encoder(1, 16, 2, 30,"
        " weights=sys.argv[1])\nwith torch.device('meta'): assert torch.linspace(0, 1, 3).device.type =="
        " 'meta'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# --- weights of background and referent


def test_class_weights_are_torchs_weighted_mean(tiny_root, pieces, tmp_path):
    learner = Learner(settings("lavt", tiny_root, tmp_path, pieces=pieces))
    batch, objective = (
        next(learner.data.batches(0)),
        learner.accelerator.unwrap_model(learner.objective).eval(),
    )
    with torch.no_grad():
        got = objective(batch.images, None, batch.words, batch.image_index, batch.targets)
        z = learner.model(batch.images, batch.words, batch.image_index)
    z = F.interpolate(z[:, None], 48, mode="bilinear", align_corners=True)
    want = F.cross_entropy(
        torch.cat([torch.zeros_like(z), z], 1), batch.targets.long(), torch.tensor([0.9, 1.1])
    )
    assert set(batch.targets.unique().tolist()) == {0, 1} and torch.isclose(got, want)


def test_equal_weights_change_no_bit():
    z, y = torch.randn(3, 12, 12), torch.rand(3, 24, 24)
    plain = [Objective(torch.nn.Identity(), loss).compare(z, y) for loss in ("bce", "bce+dice")]
    assert all(
        torch.equal(a, Objective(torch.nn.Identity(), loss, class_weights=(1.0, 1.0)).compare(z, y))
        for a, loss in zip(plain, ("bce", "bce+dice"))
    )
    with pytest.raises(ValueError, match="class_weights"):
        TrainConfig(class_weights=(1.0, 0.0))


def test_shares_of_a_weighted_batch_add_up():
    "Three parts, unevenly: each divides by the mean weight of the whole, and counts as much as its share."
    z, y = torch.randn(6, 8, 8), (torch.rand(6, 8, 8) > torch.linspace(0.2, 0.95, 6)[:, None, None]).float()
    parts = (slice(0, 1), slice(1, 3), slice(3, 6))
    mean = sum(len(y[p]) / 6 * mean_weight(y[p], (0.5, 2.0)) for p in parts)
    whole = weighted_loss(z, y, (0.5, 2.0))
    assert torch.isclose(
        sum(len(y[p]) / 6 * weighted_loss(z[p], y[p], (0.5, 2.0), mean) for p in parts), whole
    )
    assert not torch.isclose(
        sum(len(y[p]) / 6 * weighted_loss(z[p], y[p], (0.5, 2.0)) for p in parts), whole, rtol=1e-4
    )


# --- optimizer and schedule


def test_the_decay_of_cmpc():
    for step in (0, 1, 1000, 699_999, 800_000, 900_000):
        want = 1e-5 + (2.5e-4 - 1e-5) * (1 - min(step, 800_000) / 800_000) ** 0.9
        assert polynomial_decay(step, 800_000, 2.5e-4, 0.9, end_lr=1e-5) == pytest.approx(want, rel=1e-12)
    assert polynomial_decay(30, 100, 1e-3, 0.7) == 1e-3 * (1 - 0.3) ** 0.7
    c = TrainConfig(model="cmpc", preset="published")
    assert (c.optimizer, c.end_lr, c.max_steps, c.epochs, c.batch_size, c.lr, c.power) == (
        "adam",
        1e-5,
        700_000,
        10**6,
        1,
        2.5e-4,
        0.9,
    )
    assert TrainConfig(model="cmpc", preset="published", epochs=3).max_steps is None
    for name, value in (
        ("optimizer", "sgd"),
        ("end_lr", 1.0),
        ("decay_steps", 0),
        ("unit", "image"),
        ("sentence", "tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            TrainConfig(**{name: value})


def adam(p, gradients, rates, decay):
    "Adam (Kingma and Ba, 2015) with an L2 penalty, one number at a time."
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates), 1):
        g = g + decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


def test_a_few_steps_of_adam_by_hand(tiny_root, tmp_path):
    "CMPC's published recipe at the small size: each step of one weight from its gradient."
    config = settings(
        "cmpc",
        tiny_root,
        tmp_path,
        preset="refshapes",
        optimizer="adam",
        lr=2.5e-3,
        end_lr=1e-4,
        power=0.9,
        decay_steps=5,
        weight_decay=0.05,
        mask_size=None,
        expressions_per_image=1,
    )
    learner = Learner(config)
    [weight] = [
        p
        for name, p in learner.model.named_parameters()
        if name == "levels.0.mix.0.weight" or name == "score.weight"
    ][:1]
    before, gradients, rates = weight.detach().clone(), [], []
    assert type(learner.optimizer.optimizer) is torch.optim.Adam
    for batch in learner.data.batches(0):
        rates.append(1e-4 + (2.5e-3 - 1e-4) * (1 - len(rates) / 5) ** 0.9)
        learner.optimizer_step([batch])
        gradients.append(weight.grad.clone())
    assert len(rates) == 4 and rates[-1] == learner.optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(weight.detach(), adam(before, gradients, rates, 0.05), atol=1e-6, rtol=1e-4)


def test_the_decay_keeps_its_proportion(tiny_root, tmp_path, monkeypatch):
    from refseg_nb.models import cmpc

    published = replace(cmpc.CMPC_RECIPES["published"], target="soft")
    monkeypatch.setitem(cmpc.CMPC_RECIPES, "refshapes", published)
    shorter = Learner(settings("cmpc", tiny_root, tmp_path, preset="refshapes", max_steps=70, mask_size=None))
    longer = Learner(
        settings(
            "cmpc", tiny_root, tmp_path, preset="refshapes", max_steps=700_000, epochs=10**6, mask_size=None
        )
    )
    assert (shorter.total, shorter.decay_steps, longer.total, longer.decay_steps) == (
        70,
        80,
        700_000,
        800_000,
    )


# --- what an epoch is made of


def test_one_sentence_of_each_ref(tiny_root):
    refer = Refer(tiny_root, "refshapes")
    data = RISDataset(refer, "train", vocabulary_for(refer))
    refs = {s.ref_id for s in data.samples}
    seen = set()
    for epoch in range(12):
        rng, want = np.random.default_rng([5, epoch, 2]), set()
        for _, indices in data.groups:  # the naive loop
            order = list(dict.fromkeys(data.samples[i].ref_id for i in indices))
            for ref, x in zip(order, rng.random(len(order))):
                of = [i for i in indices if data.samples[i].ref_id == ref]
                want.add(of[int(x * len(of))])
        for shuffle in (False, True):
            got = [
                i
                for batch in epoch_batches(data, 4, None, shuffle, 5, epoch, "ref")
                for _, indices in batch
                for i in indices
            ]
            assert set(got) == want and len(got) == len(refs) == len({data.samples[i].ref_id for i in got})
        got = [
            i
            for batch in expression_batches(data, 7, None, 5, epoch, "ref")
            for _, indices in batch
            for i in indices
        ]
        assert set(got) == want and len(got) == len(refs)
        seen |= want
    assert len(seen) > 0.8 * len(data), "over the epochs each sentence has its turn"
    assert epoch_batches(data, 4, 1, True, 5, 0, "ref") == epoch_batches(data, 4, 1, True, 5, 0, "ref")
    with pytest.raises(ValueError, match="unit must be one of"):
        epoch_batches(data, 4, unit="image")


def test_sentences_as_typed(typed_root):
    refer = Refer(typed_root, "refshapes")
    vocabulary = vocabulary_for(refer)
    cleaned, raw = (RISDataset(refer, "val", vocabulary, sentence=s) for s in ("sent", "raw"))
    assert (
        [s.text for s in raw.samples]
        == [s.text.upper() + "!" for s in cleaned.samples]
        == [s.sentence.raw for s in cleaned.samples]
    )
    for i in (0, 3):
        assert raw.words[i, : raw.lengths[i]].tolist() == vocabulary.encode(cleaned.samples[i].sentence.raw)
    assert [s.sent_id for s in raw.samples] == [
        s.sent_id for s in cleaned.samples
    ] and raw.groups == cleaned.groups
    with pytest.raises(ValueError, match="sentence must be one of 'sent', 'raw'"):
        RISDataset(refer, "val", vocabulary, sentence="tokens")


def test_units_and_typed_sentences_through_a_store_and_expression_batches(typed_root, pieces, tmp_path):
    more = {
        "pieces": pieces,
        "store": str(tmp_path / "stores"),
        "images_per_batch": None,
        "batch_size": 3,
        "expressions_per_image": None,
    }
    stored, plain = (
        Learner(settings("lavt", typed_root, tmp_path, **more | changes)) for changes in ({}, {"store": None})
    )
    assert stored.data.store is not None and stored.data.plan(0) == plain.data.plan(0) != plain.data.plan(1)
    for a, b in zip(stored.data.batches(0), plain.data.batches(0), strict=True):
        assert (
            torch.equal(a.words, b.words)
            and torch.equal(a.targets, b.targets)
            and torch.equal(a.images, b.images)
        )
        assert all(s.text == s.sentence.raw for s in a.samples)
    refs = [s.ref_id for batch in plain.data.batches(0) for s in batch.samples]
    assert (
        len(refs)
        == len(set(refs))
        == len(
            {plain.data.train.samples[i].ref_id for _, indices in plain.data.train.groups for i in indices}
        )
    )


# --- what stays as it was


def test_older_runs_go_on():
    "A configuration that was stored before these fields existed."
    new = {"sentence", "unit", "class_weights", "optimizer", "end_lr", "decay_steps"}
    for model, preset in (
        ("shnet", "refshapes"),
        ("shnet", "released"),
        ("cmpc", "refshapes"),
        ("lavt", "refshapes"),
        ("crossvlt", "refshapes"),
    ):
        config = TrainConfig(model=model, preset=preset)
        check_same_config(config, {k: v for k, v in comparable(config).items() if k not in new})
        assert (
            TrainConfig(**asdict(config)) == config == TrainConfig(**json.loads(json.dumps(asdict(config))))
        )
    published = TrainConfig(model="lavt", preset="base")
    with pytest.raises(CheckpointError, match="class_weights=None, and now class_weights="):
        check_same_config(published, {k: v for k, v in comparable(published).items() if k not in new})


def test_every_further_field_of_a_recipe_is_in_the_chapter():
    cells = nbformat.read(
        Path(__file__).parent.parent / "nbs" / "library" / "train_config.ipynb", as_version=4
    ).cells
    [table] = [c.source for c in cells if "| further field |" in c.source]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [f.name for f in fields(Recipe)]
    mine = set(names[names.index("optimizer") :])  # the fields that SHNet's recipes leave as they are
    assert sorted(name for row in rows for name in row.replace("`", "").replace(",", " ").split()) == sorted(
        mine
    )


# --- how they are measured


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.mark.parametrize("name", ["cmpc", *SMALL])
def test_trained_and_measured_from_the_command_line(name, typed_root, pieces, tmp_path):
    out = tmp_path / name
    usual = ["--root", typed_root, "--device", "cpu"]
    config = {"limit": 6, "val_split": "val", "eval_limit": 2, "threads": 1} | (
        {} if name == "cmpc" else {"mask_size": 24}
    )
    (tmp_path / "c.json").write_text(json.dumps(config | {"overrides": SMALL.get(name, {})}))
    options = ["--preset", "refshapes"] if name == "cmpc" else ["--preset", "base", "--pieces", pieces]
    done = invoke(
        "train",
        *usual,
        "--model",
        name,
        *options,
        "--steps",
        2,
        "--images-per-batch",
        2,
        "--expressions-per-image",
        1,
        "--config",
        tmp_path / "c.json",
        "--out",
        out,
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    protocol = "cmpc" if name == "cmpc" else "lavt"
    crf = ["--crf"] if name == "cmpc" else []
    done = invoke(
        "evaluate", out, *usual, "--limit", 1, "--protocol", protocol, *crf, "--out", tmp_path / "r.json"
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    said = json.loads((tmp_path / "r.json").read_text())["protocol"]
    assert (
        said["protocol"] == protocol
        and said["comparator"] == ">="
        and said["sentences"] == "all"
        and bool(said["crf"]) == (name == "cmpc")
    )
    model, vocabulary, _ = load_model(out / "model")
    refer = Refer(typed_root, "refshapes")
    data = RISDataset(
        refer,
        "val",
        vocabulary,
        96,
        None,
        model.config.max_words,
        sentence="sent" if name == "cmpc" else "raw",
    )
    from refseg_nb.evaluation.crf import dense_crf
    from refseg_nb.evaluation.evaluator import load_record, probability_at

    record = load_record(tmp_path / "r.json")
    from PIL import Image

    # by hand
    for ref, sent, i, u in list(
        zip(*(record.arrays[k].tolist() for k in ("ref_id", "sent_id", "intersection", "union")))
    )[:1]:
        [sample] = [s for s in data.samples if (s.ref_id, s.sent_id) == (ref, sent)]
        with torch.no_grad():
            z = model(
                data.image(sample.image_id)[None],
                torch.tensor([vocabulary.encode(sample.text, model.config.max_words)]),
            )
        truth, side = data.original_mask(sample), 320 if name == "cmpc" else 480
        p = probability_at(z, (side, side))[0]
        if name == "cmpc":
            p = dense_crf(
                p,
                torch.tensor(
                    np.array(refer.load_image(sample.image_id).resize((320, 320), Image.Resampling.BILINEAR))
                ),
            )
            mask = (F.interpolate((p > 0.5)[None, None].float(), truth.shape, mode="bilinear") > 0)[
                0, 0
            ].numpy()
        else:
            mask, truth = (
                (p > 0.5).numpy(),
                np.asarray(Image.fromarray(truth).resize((480, 480), Image.Resampling.NEAREST)),
            )
        assert abs(int((mask & truth).sum()) - i) <= 4 and abs(int((mask | truth).sum()) - u) <= 4
