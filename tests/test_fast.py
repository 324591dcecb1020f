"""SHNet as it is published and as it is computed: the same function, one saving at a time and all together;
folded norms, export, the benchmark's records."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from refseg_nb.bench import savings as fast
from refseg_nb.models.decoder import UpsampleDecoder, double, doubled_conv, doubling_taps
from refseg_nb.models.registry import create_model

SMALL = dict(
    vocab_size=30,
    backbone="refshapes",
    backbone_weights="none",
    image_size=64,
    grid=6,
    channels=128,
    word_dim=8,
    sfm_heads=2,
    aspp_rates=(1, 2, 4),
    decoder_widths=(128, 16, 8),
    max_words=12,
    sfm_dropout=0.0,
    hcam_dropout=0.0,
    aspp_dropout=0.0,
    decoder_dropout=0.0,
)


def case(preset="released", **changes):
    torch.manual_seed(0)
    model = create_model("shnet", preset, **(SMALL | changes)).double().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    words = torch.randint(2, 30, (5, 7))
    words[1, 3:] = words[4, 5:] = 0
    return model, (torch.rand(3, 3, 64, 64, dtype=torch.double), words, torch.tensor([0, 0, 2, 1, 0]))


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 3), (5, 5)])
def test_doubled_conv_is_the_convolution_of_the_doubled_map(shape, corners):
    x, weight, bias = (
        torch.randn(2, 3, *shape).double(),
        torch.randn(4, 3, 3, 3).double(),
        torch.randn(4).double(),
    )
    large = F.conv2d(double(x, corners), weight, bias, padding=1)
    torch.testing.assert_close(doubled_conv(x, weight, bias, corners), large)
    assert torch.autograd.gradcheck(
        partial(doubled_conv, align_corners=corners),
        tuple(t.requires_grad_() for t in (x[:1], weight[:2], bias[:2])),
    )


def test_aligned_doubling_by_hand():
    "Position i of 2n looks at i (n - 1) / (2n - 1) of n: the corners stay where they are."
    n = 5
    line = torch.arange(n, dtype=torch.double) ** 2
    at = [i * (n - 1) / (2 * n - 1) for i in range(2 * n)]
    want = [line[int(a)] + (a - int(a)) * (line[min(int(a) + 1, n - 1)] - line[int(a)]) for a in at]
    taps = doubling_taps(n, align_corners=True, dtype=torch.double)
    torch.testing.assert_close(taps[1] @ line, torch.stack(want))
    assert want[0] == line[0] and want[-1] == line[-1]
    before, after = taps[0] @ line, taps[2] @ line
    assert before[0] == after[-1] == 0, "beyond the edge there is nothing"
    torch.testing.assert_close(before[1:], torch.stack(want[:-1]))
    torch.testing.assert_close(after[:-1], torch.stack(want[1:]))


def test_taps_of_doubling_by_hand():
    """Bilinear doubling: the 2i-th of 2n places is a quarter of place i-1 and three of i, the next three of
    i and one of i+1; at the edge, itself."""
    n = 5
    want = torch.zeros(3, 2 * n, n)
    for k in range(3):
        for row in range(2 * n):
            at = row + k - 1
            if 0 <= at < 2 * n:
                i = at // 2
                beside = min(max(i + (1 if at % 2 else -1), 0), n - 1)
                want[k, row, i] += 0.75
                want[k, row, beside] += 0.25
    torch.testing.assert_close(doubling_taps(n), want)


@pytest.mark.parametrize(
    "widths, doublings", [((130, 128, 9), 2), ((130, 9), 2), ((130,), 1), ((130, 129), 0)]
)
def test_wide_decoder_against_convolutions_of_doubled_maps(widths, doublings):
    torch.manual_seed(0)
    decoder, x = (
        UpsampleDecoder(128, widths, doublings, dropout=0.0).double(),
        torch.randn(2, 128, 3, 4).double(),
    )
    y = x
    for i, conv in enumerate(decoder.convs):
        y = conv(y)
        if i < doublings:
            y = double(y)
    torch.testing.assert_close(decoder(x), decoder.last(y).squeeze(1))


@pytest.mark.parametrize(
    "preset, changes",
    [("released", {}), ("paper", {}), ("paper", {"sfm_shared": False, "hcam_gates": "one"})],
)
def test_each_saving_leaves_the_function_as_it_is(preset, changes):
    model, batch = case(preset, **changes)
    with torch.no_grad():
        want = fast.AsPublished(model)(*batch)
        for savings in [(name,) for name in fast.SAVINGS] + [fast.SAVINGS]:
            torch.testing.assert_close(
                fast.AsPublished(model, savings)(*batch), want, atol=1e-9, rtol=1e-7, msg=str(savings)
            )
        torch.testing.assert_close(model(*batch), want, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(
            model.float()(batch[0].float(), *batch[1:]), want.float(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("saving", [*fast.SAVINGS, "all"])
def test_gradients_of_each_saving(saving):
    "In training mode, with as many phrases about each picture."
    model, (images, words, _) = case()
    model.train()
    index, savings = torch.tensor([0, 0, 1, 1]), fast.SAVINGS if saving == "all" else (saving,)
    weight, parameters = torch.randn(4, 24, 24).double(), [p for p in model.parameters() if p.requires_grad]
    want, got = (
        torch.autograd.grad(
            (fast.AsPublished(model, s)(images[:2], words[:4], index) * weight).sum(), parameters
        )
        for s in ((), savings)
    )
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_reference_really_does_the_work_that_is_saved():
    model, batch = case()
    cost = {}
    for name in ("as published", *fast.SAVINGS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fast.AsPublished(model, () if name == "as published" else (name,))(*batch)
        cost[name] = counter.get_total_flops()
    for name in ("encode once", "short text", "split gates", "small-map decoder"):
        assert cost[name] < cost["as published"], name
    with pytest.raises(ValueError, match="no saving called 'magic'"):
        fast.AsPublished(model, ("magic",))
    with pytest.raises(ValueError, match="SFM and HCAM"):
        fast.AsPublished(create_model("baseline", vocab_size=9))


def test_folded_norms_are_the_same_function_and_the_model_stays():
    model, batch = case(adapter_norm=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fast.fold_norms(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(*batch), model(*batch), atol=1e-9, rtol=1e-7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.decoder.modules())
    with pytest.raises(ValueError, match="eval"):
        fast.fold_norms(model.train())


def test_published_paper_size_costs_what_the_facts_say():
    """Backbone 40.5 and adapters 10.7 GFLOP; gates 18.3, Conv3d 4.6, ASPP 5.6, decoder 44.4; SFM of the
    paper's preset is a single attention, about 3."""
    model, batch = fast.make_case(phrases=2, device="meta")
    assert model.config.grid == 18
    published, here = (fast.count(run, *batch) / 2 for run in (fast.AsPublished(model), model))
    adapters = sum(2 * 9 * c * 512 * 18**2 for c in (512, 1024, 2048)) / 1e9
    assert published == pytest.approx(40.5 + adapters + 18.3 + 4.6 + 5.6 + 44.4 + 3, rel=0.02)
    assert here < 0.65 * published


def test_memory_by_accounting_against_hand():
    linear = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
    found = fast.training_memory(linear, torch.zeros(7, 10))
    assert (
        found["weights"] * 1e9 == 4 * 220
        and found["optimizer"] * 1e9 == pytest.approx(8 * 220)
        and found["gradients"] == found["weights"]
    )
    assert found["activations"] * 1e9 == pytest.approx(4 * (7 * 10 + 7 * 20)), (
        "a linear layer keeps its input, ReLU its output"
    )


def test_onnx_gives_what_the_model_gives(tmp_path):
    "In ONNX Runtime, on padded phrases of several lengths."
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = create_model("shnet", vocab_size=12).eval()
    levels = model.encode(torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8))
    words = torch.tensor([[2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 10], [11, 0, 0, 0, 0, 0]])
    index = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        want = model.segment(levels, words, index)
    session = onnxruntime.InferenceSession(
        fast.export_onnx(model, tmp_path / "segment.onnx", 3, 6), providers=["CPUExecutionProvider"]
    )
    named = {"v2": levels[0], "v3": levels[1], "v4": levels[2], "words": words, "image_index": index}
    [got] = session.run(None, {name: x.detach().numpy() for name, x in named.items()})
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-4)


def test_exported_graph_is_the_model():
    model = create_model("shnet", vocab_size=30).eval()
    with torch.no_grad():
        levels = model.encode(torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8))
        for phrases in (1, 4):
            words, zeros = torch.randint(2, 30, (phrases, 6)), torch.zeros(phrases, dtype=torch.long)
            words[0, 3:] = 0
            program = fast.export_segment(model, phrases, 6).module()
            torch.testing.assert_close(
                program(*levels, words, zeros), model.segment(levels, words, zeros), atol=1e-4, rtol=1e-4
            )


def test_benchmark_is_taken_up_where_it_was_stopped(tmp_path):
    command = [
        sys.executable,
        "-m",
        "refseg_nb.bench.savings",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--threads",
        "1",
    ]
    first = subprocess.run([*command, "--only", "inference"], capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    path = tmp_path / "cpu-quick-inference.json"
    record, stamp = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert {"machine", "versions", "commit", "date", "command", "rows", "matmul_gflops"} <= set(
        record
    ) and str(tmp_path) not in path.read_text()
    published, here = record["rows"]["as published, fp32"], record["rows"]["here, fp32"]
    assert (
        published["times_as_fast"] == 1
        and published["difference"] == 0
        and here["difference"] < 1e-4 < record["spread_of_logits"]
    )
    assert here["expressions_per_second"] == pytest.approx(record["phrases"] / here["seconds"])
    assert len(fast.bench(tmp_path, quick=True, device="cpu")) == 3
    assert path.stat().st_mtime_ns == stamp, "a record that is there is not measured again"
    cases = fast.bench_cases(fast.read_bench(tmp_path), "training")
    lines = fast.bench_table(cases).splitlines()
    assert lines[0] == "| | 96 px, 2 |" and lines[2].startswith("| as published, fp32 | **1.00 ×**<br>")
    assert {"as published, fp32", "here, features cached, fp32"} <= {
        line.split(" | ")[0].removeprefix("| ") for line in lines[2:]
    }
    assert subprocess.run([*command, "--only", "nothing"], capture_output=True, timeout=300).returncode == 1
