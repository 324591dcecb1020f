"""The library's answer on every kind of picture that a person has, with a small untrained model: what comes
back, and at which size."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import refseg_nb
from refseg_nb.data.images import LONGEST_SIDE, ImageError, read_image, resize_square
from refseg_nb.data.words import Vocabulary
from refseg_nb.errors import InputError
from refseg_nb.inference.segmenter import Segmenter, load
from refseg_nb.models.hub import save_model
from refseg_nb.models.registry import create_model


def small_model(prior=0.5):
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(["the red car on the left", "the tree behind the house"])
    return (
        create_model("shnet", "refshapes", vocab_size=len(vocabulary), backbone_weights="none", prior=prior),
        vocabulary,
    )


@pytest.fixture(scope="module")
def seg():
    return Segmenter(*small_model())


def picture(h=37, w=53, channels=3):
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) % 256, np.full((h, w), 255)], -1).astype(np.uint8)[
        ..., :channels
    ]


FILES = {
    "rgb.png": lambda: Image.fromarray(picture()),
    "photo.jpg": lambda: Image.fromarray(picture()),
    "photo.webp": lambda: Image.fromarray(picture()),
    "picture.bmp": lambda: Image.fromarray(picture()),
    "picture.gif": lambda: Image.fromarray(picture()),
    "picture.tiff": lambda: Image.fromarray(picture()),
    "grey.png": lambda: Image.fromarray(picture()[..., 0]),
    "one_bit.png": lambda: Image.fromarray(picture()[..., 0] > 99),
    "rgba.png": lambda: Image.fromarray(picture(channels=4)),
    "grey_alpha.png": lambda: Image.fromarray(picture(channels=4)).convert("LA"),
    "palette.png": lambda: Image.fromarray(picture()).convert("P"),
    "grey16.png": lambda: Image.fromarray(picture()[..., 0].astype(np.uint16) * 257),
    "float.tiff": lambda: Image.fromarray(picture()[..., 0].astype(np.float32) / 255),
    "cmyk.jpg": lambda: Image.fromarray(picture()).convert("CMYK"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_and_answered_at_its_own_size(name, tmp_path, seg):
    FILES[name]().save(tmp_path / name)
    pixels, size = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8 and pixels.shape == (37, 53, 3) and size == (37, 53)
    answer = seg.encode(tmp_path / name).segment("the red car")
    assert answer.mask.shape == answer.probability.shape == (37, 53) and answer.mask.dtype == bool
    shown = answer.overlay()
    assert shown.shape == (512, round(512 * 53 / 37), 3) and shown.dtype == np.uint8


def test_the_grey_levels_survive(tmp_path):
    grey = picture()[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    for image in (
        tmp_path / "a.png",
        grey,
        grey[..., None],
        grey.astype(np.uint16) * 257,
        grey / 255,
        Image.fromarray(grey),
    ):
        pixels, _ = read_image(image)
        assert np.abs(pixels.astype(int) - grey[..., None]).max() <= 1
    assert np.array_equal(read_image(torch.from_numpy(picture()).permute(2, 0, 1))[0], picture())


def test_transparency_goes_over_white(tmp_path):
    pixels = picture(channels=4)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[0] == 255).all() and (read_image(pixels)[0] == 255).all()
    palette = Image.fromarray(picture()).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    palette.save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png")[0][0, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation, tmp_path, seg):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif, quality=100)
    from PIL import ImageOps

    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    pixels, size = read_image(tmp_path / "a.jpg")
    assert np.array_equal(pixels, upright) and size == upright.shape[:2] == (
        (53, 37) if orientation > 4 else (37, 53)
    )
    assert seg.segment(tmp_path / "a.jpg", "the tree").mask.shape == size


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_huge_picture_is_scaled_down_but_its_mask_is_not(ending, tmp_path, seg):
    Image.new("RGB", (6000, 3000), "white").save(tmp_path / f"a.{ending}")
    scene = seg.encode(tmp_path / f"a.{ending}")
    assert scene.size == (3000, 6000) and max(scene.image.shape) == LONGEST_SIDE
    answer = scene.segment("the car")
    assert answer.mask.shape == (3000, 6000) and answer.overlay().shape == scene.image.shape


def test_a_bomb_is_refused_in_one_sentence(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"a\.png is too large to be opened safely.*scale it down"):
        read_image(tmp_path / "a.png")


def test_a_tiny_picture(seg):
    for shape in ((1, 1), (1, 300), (300, 1)):
        assert seg.encode(np.zeros((*shape, 3), np.uint8)).segment("car").mask.shape == shape


def test_what_is_no_picture_is_said(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    Image.open(tmp_path / "whole.jpg").save(tmp_path / "whole.png")
    for ending in ("jpg", "png"):
        data = (tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.png").write_bytes(data[:100] + bytes(200) + data[300:])
    for name in ("text.png", "empty.jpg", "cut.jpg", "cut.png", "flipped.png"):
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no image at"):
        read_image(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5, 3), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.full((4, 5), np.nan),
        np.full((4, 5), -1),
        np.full((4, 5), 1e6),
        np.zeros((4, 5), complex),
        np.array([["a"]]),
    ],
)
def test_an_array_that_is_no_picture_is_said(array):
    with pytest.raises(ImageError, match="the array"):
        read_image(array)


def test_phrases(seg):
    scene = seg.encode(picture())
    for phrase, said in (
        ("", "is empty"),
        ("   ", "is empty"),
        ("\n", "is empty"),
        ("?!", "has no word"),
        ("🐶", "has no word"),
    ):
        with pytest.raises(InputError, match=said):
            scene.segment(phrase)
        with pytest.raises(InputError, match=said):
            seg.segment(picture(), phrase)
    assert scene.segment("the red car").unknown_words == []
    assert "first 25 of 40 words" in scene.segment("car " * 40).message
    assert "none of these words" in scene.segment("zebra unicorn").message
    assert scene.segment_all([]) == []
    with pytest.raises(InputError, match="must be a list of phrases"):
        scene.segment_all("the dog")
    with pytest.raises(ValueError, match="must be a string"):
        scene.segment(None)
    answer = scene.segment("The RED zebra, zebra!")
    assert (
        answer.words == ["the", "red", "zebra", "zebra"]
        and answer.unknown_words == ["zebra"]
        and "zebra" in answer.message
    )
    assert np.array_equal(scene.segment("the red car.").probability, scene.segment("the red car").probability)
    assert scene.segment("the red car").unknown_words == []
    assert scene.segment("car " * 200).mask.shape == scene.size
    assert scene.segment("<pad> <unk>").mask.shape == scene.size


def test_one_encoding_serves_many_phrases(seg):
    scene = seg.encode(picture())
    phrases = ["the red car", "the tree behind the house", "left"]
    together = scene.segment_all(phrases)
    for phrase, answer in zip(phrases, together):
        alone = seg.segment(picture(), phrase)
        assert answer.phrase == phrase and np.allclose(answer.probability, alone.probability, atol=1e-5)


def test_score_is_the_mean_probability_inside_the_mask():
    answer = Segmenter(*small_model()).segment(picture(), "the red car")
    if answer.found:
        assert np.isclose(answer.score, answer.probability[answer.mask].mean()) and 0.5 < answer.score <= 1
    nothing = Segmenter(*small_model(), threshold=1.0).segment(picture(), "the red car")
    assert not nothing.found and nothing.score == 0 and nothing.message.startswith("nothing found")
    everything = Segmenter(*small_model(), threshold=0.0).segment(picture(), "the red car")
    assert everything.mask.all() and np.isclose(everything.score, everything.probability.mean())


def test_the_square_is_what_torchvision_makes():
    "Published weights were trained on torchvision's antialiased resize; `resize_square` must give the same bytes."
    from torchvision.transforms import v2

    for h, w in ((37, 53), (300, 200), (96, 96), (500, 31)):
        image = picture(h, w)
        theirs = v2.Resize((96, 96), antialias=True)(torch.from_numpy(image).permute(2, 0, 1))
        assert torch.equal(resize_square(image, 96), theirs)


def test_inference_imports_nothing_that_it_does_not_need():
    code = (
        "import sys, refseg_nb.inference; print([m for m in ('torchvision', 'torchmetrics', 'accelerate',"
        " 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_attention_on_request(seg):
    scene = seg.encode(picture())
    assert scene.segment("the red car").attention is None
    one, two = scene.segment_all(["the red car", "the tree behind the house"], return_attention=True)
    for answer in (one, two):
        n = 12 * 12 + len(answer.words)
        for layers in answer.attention.values():
            for a in layers:
                assert a.shape[-2:] == (n, n) and torch.allclose(a.sum(-1), torch.ones(()), atol=1e-4)


def test_load(tmp_path, seg):
    model, vocabulary = small_model()
    save_model(tmp_path / "run" / "model", model, vocabulary, {})
    for folder in (tmp_path / "run" / "model", tmp_path / "run", str(tmp_path / "run")):
        again = refseg_nb.load(folder)
        assert np.allclose(
            again.segment(picture(), "the red car").probability,
            seg.segment(picture(), "the red car").probability,
            atol=1e-5,
        )
    with pytest.raises(FileNotFoundError, match="there is no model at nothing"):
        load("nothing")
    with pytest.raises(AttributeError):
        refseg_nb.no_such_name  # noqa: B018


def test_bytes_and_tensors_of_every_layout_are_read():
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    tensor = torch.from_numpy(picture())
    for image in (file, BytesIO(file.getvalue()), file.getvalue(), tensor, tensor.permute(2, 0, 1)):
        assert np.array_equal(read_image(image)[0], picture())
    assert np.abs(read_image((tensor / 255).bfloat16())[0].astype(int) - picture()).max() <= 1
    with pytest.raises(ImageError, match="the tensor"):
        read_image(torch.zeros(2, 5, 7))


def test_what_cannot_be_an_image_is_refused_with_its_own_message(tmp_path):
    with pytest.raises(ImageError, match="NoneType"):
        read_image(None)
    for address in ("https://example.org/a.jpg", "http://example.org"):
        with pytest.raises(ImageError, match="download it first"):
            read_image(address)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no regular file"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="the image"):
        read_image(b"no image")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said():
    for device in ("cuda", "abacus"):
        with pytest.raises(InputError, match=device):
            load(device=device)
