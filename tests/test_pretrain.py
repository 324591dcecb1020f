"""The two pre-trainings of the small backbone: what their labels say of place, their measures against other
ways to compute them, their files."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torchmetrics.functional.classification import binary_average_precision
from typer.testing import CliRunner

from refseg_nb.cli import app
from refseg_nb.data.refer import Refer
from refseg_nb.models import backbones as B
from refseg_nb.training import pretrain as P


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def data(tiny_root):
    return P.pixel_labels(Refer(tiny_root, "refshapes"), "val")


@pytest.fixture(scope="module")
def result(tiny_root, tmp_path_factory):
    "Both tasks, three epochs on 32 pictures, and the files."
    folder = tmp_path_factory.mktemp("weights")
    paths = {task: folder / f"{task}.safetensors" for task in P.TASKS}
    return {
        task: (P.pretrain_backbone(tiny_root, task=task, epochs=3, limit=32, progress=False, out=path), path)
        for task, path in paths.items()
    }


# ---- labels and measures


def test_a_batch_carries_every_map_in_its_order(data):
    rows = torch.tensor([3, 0])
    x = data.batch(rows)
    assert x.dtype == torch.uint8 and x.shape[1] == 3 + 2 + len(data.attributes)
    for channel, want in ((slice(0, 3), data.images), (3, data.category), (4, data.instance)):
        assert torch.equal(x[:, channel], want[rows])
    for k, (_, label) in enumerate(data.attributes.values()):
        assert torch.equal(x[:, 5 + k], label[rows])


def test_presence_is_what_the_file_lists(tiny_root, data):
    refer = Refer(tiny_root, "refshapes")
    ids = sorted({s.image_id for s in refer.samples("val")})
    colours = data.attributes["color"][0]
    categories, painted = (
        P.presence(data.category, len(data.names) - 1),
        P.presence(data.attributes["color"][1], len(colours)),
    )
    for row, image_id in enumerate(ids):
        things = refer.annotations_of(image_id)
        assert {data.names[1 + k] for k in categories[row].nonzero()[:, 0]} == {
            refer.categories[a["category_id"]] for a in things
        }
        assert {colours[k] for k in painted[row].nonzero()[:, 0]} == {
            a["attributes"]["color"] for a in things
        }


def test_average_precision_is_torchmetrics():
    scores, true = torch.randn(40, 6), (torch.rand(40, 6) < torch.linspace(0.1, 0.9, 6)).float()
    true[0], true[1] = 0, 1  # every value is in some pictures and not in others
    for k, got in enumerate(P.average_precision(scores, true)):
        assert float(got) == pytest.approx(
            float(binary_average_precision(scores[:, k], true[:, k].long())), abs=1e-5
        )


def test_average_precision_of_what_cannot_be_ranked_is_nan():
    got = P.average_precision(torch.randn(5, 3), torch.tensor([[0.0, 1, 0]] * 4 + [[0.0, 1, 1]]))
    assert got.isnan().tolist() == [True, True, False]


# ---- heads


def test_only_the_pixels_task_knows_where_things_are(data):
    net = B.RefShapesBackbone().eval()
    x = data.batch(torch.arange(4))
    images, labels = x[:, :3] / 255, x[:, 3:].long()
    shuffled = labels.flatten(2)[:, :, torch.randperm(labels[0, 0].numel())].view_as(labels)
    with torch.no_grad():
        levels = net(images)
        pixels, presence = P.PixelHeads(net.channels, data), P.PresenceHead(net.channels, data)
        assert float(presence.loss(levels, images, labels)) == float(presence.loss(levels, images, shuffled))
        assert float(pixels.loss(levels, images, labels)) != pytest.approx(
            float(pixels.loss(levels, images, shuffled)), abs=1e-3
        )


def test_presence_loss_by_hand(data):
    net = B.RefShapesBackbone().eval()
    head = P.PresenceHead(net.channels, data)
    x = data.batch(torch.arange(3))
    with torch.no_grad():
        levels = net(x[:, :3])
        got = float(head.loss(levels, x[:, :3] / 255, x[:, 3:].long()))
        logits = head.out(levels[-1].flatten(2).mean(2))
    want, column = 0.0, 0
    for weight, values, label in (
        (1, data.names[1:], x[:, 3]),
        *((0.5, v, x[:, 5 + k]) for k, (v, _) in enumerate(data.attributes.values())),
    ):
        signs = [
            (image, k, 1 if (label[image] == k + 1).any() else -1)
            for image in range(3)
            for k in range(len(values))
        ]
        want += (
            weight
            * sum(-float(F.logsigmoid(sign * logits[image, column + k])) for image, k, sign in signs)
            / len(signs)
        )
        column += len(values)
    assert column == logits.shape[1] and got == pytest.approx(want, rel=1e-4)


def test_a_picture_without_things_has_a_finite_loss(data):
    net = B.RefShapesBackbone()
    images, labels = (
        torch.rand(2, 3, 96, 96),
        torch.zeros(2, 2 + len(data.attributes), 96, 96, dtype=torch.long),
    )
    for heads in (P.PixelHeads(net.channels, data), P.PresenceHead(net.channels, data)):
        assert heads.loss(net(images), images, labels).isfinite()


def test_perfect_predictions_score_one(data):
    channels = B.RefShapesBackbone().channels
    names = {k: m for k, (_, m) in data.attributes.items()}
    head = P.PresenceHead(channels, data)
    overall, each, attributes = head.score(head.targets(data.category, names.values()), data)
    there = {data.names[k] for k in data.category.unique().tolist() if k}
    assert (
        overall == 1 and {k for k, v in each.items() if v == 1} == there and set(attributes.values()) == {1.0}
    )
    coarse = {
        k: F.one_hot((m[:, 2::4, 2::4].long() - 1).clamp(min=0)).permute(0, 3, 1, 2).float()
        for k, m in names.items()
    }
    category = F.one_hot(data.category[:, ::2, ::2].long(), len(data.names)).permute(0, 3, 1, 2).float()
    overall, each, attributes = P.PixelHeads(channels, data).score({"category": category} | coarse, data)
    # the outline is lost at half the resolution, and nothing else
    assert set(attributes.values()) == {1.0} and 0.7 < overall < 1


# ---- training and its files


@pytest.mark.parametrize("task", P.TASKS)
def test_pretraining_learns_and_writes_what_it_returns(result, task):
    r, path = result[task]
    assert r.backbone.frozen and r.losses[-1] < r.losses[0] and r.metric == P.TASKS[task].metric
    again = B.create_backbone("refshapes", path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in r.backbone.state_dict().items())
    assert path.stat().st_size < 1e6 and {v.dtype for v in load_file(path).values()} == {
        torch.float16,
        torch.int64,
    }
    with safe_open(str(path), "pt") as file:
        facts = file.metadata()
    assert (
        facts["task"] == task
        and facts["images"] == "32"
        and float(facts[r.metric]) == pytest.approx(r.score, abs=1e-4)
    )
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


def test_pretraining_says_what_is_wrong_before_it_begins(tiny_root, tmp_path):
    with pytest.raises(ValueError, match="'pixels' or 'presence', not 'boxes'"):
        P.pretrain_backbone(tiny_root, task="boxes")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        P.pretrain_backbone(tiny_root, out=tmp_path / "weights.pt")


def test_command_line(tiny_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(
        app, ["pretrain", "--root", str(tiny_root), "--task", "presence", "--epochs", "1"]
    )
    assert run.exit_code == 0, run.output
    assert (
        re.search(r"mean average precision [\d.]+% on val", run.output)
        and (tmp_path / "runs" / "refshapes-classifier.safetensors").is_file()
    )
    run = CliRunner().invoke(app, ["pretrain", "--task", "boxes"])
    assert (
        run.exit_code == 2
        and "'boxes' is not one of pixels, presence" in run.stderr
        and not list(tmp_path.rglob("*.png"))
    )


# ---- the shipped files


def test_each_shipped_backbone_is_a_different_one():
    nets = {name: B.create_backbone(name) for name in B.SHIPPED_BACKBONES}
    assert set(nets) < set(B.BACKBONES)
    assert all(v.isfinite().all() for net in nets.values() for v in net.state_dict().values())
    first, second = nets.values()
    assert not torch.equal(first.stem[0].weight, second.stem[0].weight)
    assert (files("refseg_nb") / "weights" / B.SHIPPED_BACKBONES["refshapes-classifier"]).stat().st_size < 1e6


def test_the_recorded_quality_is_the_files():
    with safe_open(
        str(files("refseg_nb") / "weights" / B.SHIPPED_BACKBONES["refshapes-classifier"]), "pt"
    ) as file:
        facts = file.metadata()
    page = (Path(__file__).parent.parent / "results" / "README.md").read_text(encoding="utf-8")
    assert (
        f"{100 * float(facts['mean_average_precision']):.1f} %"
        in page.split("## The shipped classifier")[1].split("##")[0]
    )
    assert (facts["task"], facts["images"], facts["epochs"]) == ("presence", "8000", "10")


def test_shipped_classifier_ranks_pictures_it_has_not_seen(data):
    """A linear map from the mean of the last level, fitted on half of the pictures, ranks the other half far
    above chance: the weights are the trained ones."""
    net = B.create_backbone("refshapes-classifier")
    with torch.no_grad():
        x = net(data.images)[2].mean((2, 3))
        chance = B.create_backbone("refshapes-classifier", "none")(data.images)[2].mean((2, 3))
    true = P.presence(data.category, len(data.names) - 1)

    def quality(x):
        x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(x), 1)], 1)
        fit, held = x[::2], x[1::2]
        w = fit.T @ torch.linalg.solve(fit @ fit.T + 10 * torch.eye(len(fit)), true[::2])
        return float(P.average_precision(held @ w, true[1::2]).nanmean())

    assert quality(x) > quality(chance) + 0.1


def test_a_model_with_the_classifier_can_be_stored(tmp_path):
    from refseg_nb.data.words import Vocabulary
    from refseg_nb.models.hub import load_model, save_model
    from refseg_nb.models.registry import create_model

    vocabulary = Vocabulary.build(["the red car"])
    model = create_model(
        "shnet", "refshapes", vocab_size=len(vocabulary), backbone="refshapes-classifier"
    ).eval()
    save_model(tmp_path / "model", model, vocabulary)
    again, _, _ = load_model(tmp_path / "model")
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    for a, b in zip(model.backbone(images), again.backbone(images)):
        assert torch.equal(a, b)
