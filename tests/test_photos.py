"""Parts that saw photographs: their weights are real, and the whole path runs with them on real files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from refseg_nb.cli import app
from refseg_nb.data.packaged import PACKAGED, copy_packaged_vectors, packaged_path, require_packaged
from refseg_nb.data.words import Vocabulary, WordPieces, load_vectors
from refseg_nb.errors import InputError, MissingExtra
from refseg_nb.models.backbones import create_backbone
from refseg_nb.models.registry import create_model, model_config, model_recipe

timm = pytest.importorskip("timm")
photographs = pytest.importorskip("skimage.data")
if not all(map(packaged_path, PACKAGED)):
    pytest.skip("the extra `photos` is not installed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normalised(image, size):
    "An image as ImageNet's networks read it, by Pillow and the numbers that timm states for these weights."
    from PIL import Image

    pixels = np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]


# ---- EfficientNet-Lite0


@pytest.mark.parametrize("size", [224, 320])
def test_the_levels_are_timms_own_filled_by_position(size):
    plain = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(2, 3, 4)
    )
    file = torch.load(require_packaged("efficientnet-lite0"), map_location="cpu", weights_only=True)
    plain.load_state_dict(dict(zip(plain.state_dict(), file.values())))
    plain.eval()
    ours = create_backbone("efficientnet-lite0")
    images = torch.randint(
        0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(ours(images), plain(pixels), strict=True)):
            assert a.shape == (1, (40, 112, 320)[i], size // (8, 16, 32)[i], size // (8, 16, 32)[i])
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert ours.frozen and not ours.train().training


def test_the_weights_are_real():
    "What the whole network says about two photographs whose content everybody can see."
    from refseg_nb.models.efficientnet import imagenet_classifier

    net = imagenet_classifier()
    with torch.no_grad():
        cat, cup = (
            int(net(normalised(image, 224)).argmax())
            for image in (photographs.chelsea(), photographs.coffee())
        )
    assert 281 <= cat <= 285, "a kind of cat"
    assert cup in (504, 967, 968), "a mug, an espresso or a cup"


def test_random_weights_and_files_of_others(tmp_path):
    from refseg_nb.models.efficientnet import efficientnet_backbone

    a, b = efficientnet_backbone("none"), efficientnet_backbone()
    assert not torch.equal(a.body.conv_stem.weight, b.body.conv_stem.weight)
    file = torch.load(require_packaged("efficientnet-lite0"), map_location="cpu", weights_only=True)
    torch.save({k: v for k, v in file.items() if k != "_blocks.7._expand_conv.weight"}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="1 missing keys .blocks.3.2.conv_pw.weight"):
        efficientnet_backbone(tmp_path / "cut.pth")
    torch.save(file | {"_blocks.16._bn1.weight": torch.ones(3)}, tmp_path / "more.pth")
    with pytest.raises(InputError, match="1 unknown keys"):
        efficientnet_backbone(tmp_path / "more.pth")


# ---- GloVe 6B-50d


def test_vectors_are_the_packages_rows(tmp_path):
    import pyarrow.parquet as parquet

    array = require_packaged("glove.6B.50d")
    index = parquet.read_table(next(array.parent.glob("*.parquet"))).column("index").to_pylist()
    rows = np.load(array)
    vocabulary = Vocabulary.build(["the man left of the fridge", "qqzzy the"])
    vectors, coverage = load_vectors("glove.6B.50d", vocabulary, folder=tmp_path)
    assert vectors.shape == (len(vocabulary), 50) and coverage.missing == ("qqzzy",)
    for word in vocabulary.itos[2:]:
        wanted = torch.tensor(rows[index.index(word)]) if word != "qqzzy" else torch.zeros(50)
        assert torch.equal(vectors[vocabulary.number(word)], wanted), word
    assert not vectors[:2].any()
    again, _ = load_vectors("glove.6B.50d", vocabulary, folder=tmp_path)
    assert torch.equal(again, vectors) and len(list(tmp_path.iterdir())) == 2


def test_a_file_in_the_cache_comes_before_the_package(tmp_path):
    (tmp_path / "glove.6B.50d.txt").write_text("red 1 2 3\n")
    vectors, _ = load_vectors("glove.6B.50d", Vocabulary.build(["red"]), cache=tmp_path)
    assert vectors[2].tolist() == [1, 2, 3]


def test_damaged_vectors_are_said(tmp_path):
    np.save(tmp_path / "emb.npy", np.zeros((3, 50), np.float32))
    with pytest.raises(InputError, match="emb.npy: not readable as packaged word vectors"):
        copy_packaged_vectors(tmp_path / "emb.npy", {"red"}, tmp_path / "out.txt")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("refseg_nb.data.packaged.find_spec", lambda name: None)
    for name in PACKAGED:
        assert packaged_path(name) is None
        with pytest.raises(MissingExtra, match=r"refseg_nb\[photos\]"):
            require_packaged(name)


def test_vectors_of_another_size_are_stored_with_the_model(tmp_path):
    from refseg_nb.models.hub import load_model, save_model

    vocabulary = Vocabulary.build(["the red car"])
    vectors, _ = load_vectors("glove.6B.50d", vocabulary)
    model = create_model("shnet", "refshapes", vectors=vectors, backbone_weights="none")
    save_model(tmp_path / "m", model, vocabulary)
    assert torch.equal(load_model(tmp_path / "m")[0].text.embedding.weight[2:], vectors[2:])


# ---- MiniLM


def test_lavts_small_size_reads_with_minilm(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from refseg_nb.models.text import MINILM

    folder = str(require_packaged("all-MiniLM-L6-v2"))
    phrases = ["the man in the striped shirt", "left"]
    tokens = AutoTokenizer.from_pretrained(folder)(phrases, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    model = create_model("lavt", "refshapes", backbone_weights="none", **MINILM).eval()
    pieces = WordPieces.pretrained("all-MiniLM-L6-v2")
    encoded = [pieces.encode(phrase) for phrase in phrases]
    assert encoded == [
        row[mask.bool()].tolist() for row, mask in zip(tokens["input_ids"], tokens["attention_mask"])
    ]
    with torch.no_grad():
        got = model.text(tokens["input_ids"])
    torch.testing.assert_close(got.words[got.mask], wanted[got.mask], atol=1e-4, rtol=1e-4)
    logits = model(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), tokens["input_ids"])
    assert logits.shape[0] == 2 and torch.isfinite(logits).all()
    assert model.config.pieces_of == "all-MiniLM-L6-v2" and "/" not in json.dumps(model.config.to_dict())


# ---- the preset, and the whole path


def test_the_preset_is_sized_for_a_laptop():
    config, recipe = model_config("shnet", "photo"), model_recipe("shnet", "photo")
    assert (config.backbone, config.image_size, config.channels, config.word_dim) == (
        "efficientnet-lite0",
        320,
        256,
        50,
    )
    assert recipe.epochs == 10 and recipe.batch_size == 64
    model = create_model("shnet", "photo", vocab_size=20)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.backbone.frozen and 5e6 < trained < 15e6


NARROW = {"channels": 32, "sfm_ffn": 32, "decoder_widths": [16, 8, 8], "sfm_dropout": 0, "aspp_dropout": 0}


@pytest.fixture(scope="module")
def path(real_data, tmp_path_factory):
    "Verify, store and train on the micro set of RefCOCO, by the commands of chapter 23."
    import shutil

    root = tmp_path_factory.mktemp("photos")
    for folder in ("refcoco", "images"):
        shutil.copytree(real_data / folder, root / folder, copy_function=shutil.copyfile)
    for place in [root, *root.rglob("*")]:
        place.chmod(0o755 if place.is_dir() else 0o644)
    data = ("refcoco", "--root", root, "--split-by", "micro")
    verified = said("data", "verify", *data, code=1)
    assert "part" in verified, "sound, but not the whole data set"
    said("data", "store", *data, "--image-size", 320, "--target-size", 64, "--workers", 1)
    sets = [x for name, value in NARROW.items() for x in ("--set", f"{name}={json.dumps(value)}")]
    shared = ("--preset", "photo", "--vectors", "glove.6B.50d", "--store", root / "stores", "--device", "cpu")
    run = (
        "--data",
        *data,
        *shared,
        *sets,
        "--lr",
        "3e-3",
        "--steps",
        12,
        "--threads",
        1,
        "--out",
        root / "run",
    )
    said("train", *run, "--val-split", "none")
    return root


def said(*args, code=0):
    result = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "160"})
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result.stdout


def test_the_loss_falls_and_the_model_names_no_path(path):
    losses = [json.loads(line)["loss"] for line in (path / "run" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * losses[0]
    stored = (path / "run" / "model" / "config.json").read_text()
    assert str(path) not in stored and os.sep + "site-packages" not in stored
    assert json.loads(stored)["backbone_stored"] is False, "18 MB that every machine has"


def test_evaluate_segment_and_explore_with_real_weights(path):
    model = path / "run" / "model"
    data = ("--data", "refcoco", "--root", path, "--split-by", "micro")
    said("evaluate", model, *data, "--split", "val", "--device", "cpu", "--out", path / "record.json")
    record = json.loads((path / "record.json").read_text())
    assert record["metrics"]["samples"] == 18 and record["protocol"]["resolution"] == "original"
    image = next((path / "images").rglob("*.jpg"))
    answer = json.loads(
        said("segment", image, "the man on the left", "--model", model, "--out", path, "--json")
    )
    assert answer["domain"] == "photographs of refcoco" and Path(answer["mask"]).is_file()
    said("explore", image, "the man on the left", "--model", model, "--no-open", "--out", path / "page.html")
    assert (path / "page.html").stat().st_size > 50_000


def test_the_recorded_run_has_learnt_its_phrases_by_heart():
    record = json.loads((Path(__file__).parent.parent / "results" / "photos" / "refcoco.json").read_text())
    scores = {name: row["overall_iou"] for name, row in record["scores"].items()}
    assert scores["train"] > 90 and scores["train, another object's words"] < 60
    assert record["settings"]["preset"] == "photo" and record["settings"]["vectors"] == "glove.6B.50d"
    step = json.loads((Path(__file__).parent.parent / "results" / "photos" / "step.json").read_text())
    assert step["expressions"] == 64 and 0 < step["seconds an expression"] < 2
    assert step["trained parameters"] > 5e6 and step["feature numbers an image"] == 140_800
    text = json.dumps([record, step])
    assert ".jpg" not in text and "sent" not in text, (
        "no image and no phrase of the real data is in the records"
    )
