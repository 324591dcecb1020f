"""The controls around the explorer: data set, split, search, sample."""

import shutil

import numpy as np
import pytest

from refseg_nb.attention.browser import SampleBrowser, data_sets
from refseg_nb.data.refer import Refer
from refseg_nb.errors import NotFoundError


@pytest.fixture(scope="module")
def browser(tiny_root):
    return SampleBrowser(root=tiny_root)


def test_each_partition_is_a_choice(tmp_path, real_data):
    for name in (
        "refcoco/refs(unc).p",
        "refcoco/refs(google).p",
        "mine/refs(own).p",
        "mine/instances.json",
        "x/y.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "referit" / "data").mkdir(parents=True)
    (tmp_path / "referit" / "data" / "referit_query_val.json").write_text("{}")
    assert data_sets(tmp_path) == [
        ("mine (own)", ("mine", "own")),
        ("refcoco (google)", ("refcoco", "google")),
        ("refcoco (unc)", ("refcoco", "unc")),
        ("referit (berkeley)", ("referit", "berkeley")),
    ]
    assert data_sets(real_data)
    with pytest.raises(NotFoundError, match="no such folder"):
        data_sets(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no data set here"):
        SampleBrowser(root=tmp_path / "empty")


def test_a_sample_brings_its_image_its_phrase_and_its_mask(browser, tiny_root):
    refer = Refer(tiny_root, "refshapes")
    assert browser.split.options == tuple(refer.splits) and browser.split.value == "val"
    for number in (1, 2, 5):
        browser.number.value = number
        sample = refer.samples("val")[number - 1]
        assert browser.explorer.phrase == sample.text and len(browser.explorer.panels) == 1
        assert np.array_equal(browser.explorer.panels[0].truth, refer.mask(sample.ann_id))
        assert np.array_equal(browser.explorer._picture, np.asarray(refer.load_image(sample.image_id)))
        mask, truth = browser.explorer.panels[0].predicted, refer.mask(sample.ann_id)
        assert f"IoU {(mask & truth).sum() / (mask | truth).sum():.2f}" in browser.note.value


def test_buttons_go_round(browser):
    n = len(browser.samples)
    browser.number.value = n
    browser.step(1)
    assert browser.number.value == 1
    browser.step(-1)
    assert browser.number.value == n
    browser.step(None)
    assert 1 <= browser.number.value <= n and browser.explorer.phrase == browser.sample.text


def test_split_search_and_data_set(browser, tiny_root):
    browser.split.value = "testA"
    assert browser.explorer.phrase == Refer(tiny_root, "refshapes").samples("testA")[0].text
    browser.search.value = " THE "
    assert browser.samples and all("the" in s.text for s in browser.samples)
    browser.search.value = "<b>zebra"
    assert browser.samples == [] and "&lt;b&gt;zebra" in browser.note.value
    before = browser.explorer.phrase
    browser.step(1)
    assert browser.explorer.phrase == before
    browser.search.value = ""
    browser.data.value = ("refshapes+", Refer(tiny_root, "refshapes+").split_by)
    assert browser.refer.name == "refshapes+" and browser.explorer.phrase == browser.samples[0].text


def test_a_missing_image_is_said_and_the_sample_before_it_stays(tiny_root, tmp_path):
    shutil.copytree(tiny_root, tmp_path / "root")
    browser = SampleBrowser(root=tmp_path / "root")
    before, first = browser.explorer.phrase, browser.sample.image_id
    later = next(k for k, s in enumerate(browser.samples) if s.image_id != first)
    browser.refer.image_path(browser.samples[later].image_id).unlink()
    browser.number.value = later + 1
    assert "is missing" in browser.note.value and browser.explorer.phrase == before


def test_two_models_are_scored_side_by_side(tiny_root):
    browser = SampleBrowser("shnet-refshapes", tiny_root, beside="shnet-refshapes", layer=1)
    assert (
        len(browser.explorer.panels) == 2
        and browser.note.value.count("IoU") == 2
        and browser.explorer.layer == 1
    )
