"""What the exercises tell a reader: stubs stay calm, and wrong answers are told what is wrong with them."""

import ast
import importlib
import inspect
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refseg_nb.course.checks import Verdict, compare, difference, exercise
from refseg_nb.course.tools import exercises, solution_of

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if re.match(r"[0-7]\d", p.name))
FOUND = {
    f"{path.stem.split('_')[0]}-{name}": (solution_of(text.source), stub.source)
    for path in CHAPTERS
    for text, stub, name in exercises(nbformat.read(path, as_version=4))
}


def check_of(key):
    chapter, name = key.split("-")
    return getattr(importlib.import_module(f"refseg_nb.course.exercises.ch{chapter}"), f"check_{name}")


def function(key, source):
    "The function of an exercise, from Python code."
    names = {"np": np, "torch": torch, "math": math}
    exec(compile_(source, key), names)
    return names[key.split("-")[1]]


def compile_(source, key):
    return compile(source, f"<{key}>", "exec")


# Slips, as changes of the published solutions: an off-by-one first, then two likely ones; and words of the message.
# Where the first entry is None, the second is the whole function.
SLIPS = {
    "01-visible_share": [
        ("range(len(full) - 1,", "range(len(full) - 2,", "the object in front is left out"),
        ("range(len(full) - 1, -1, -1)", "range(len(full))", "front and back are swapped"),
        ("covered |= full[i]", "covered = full[i]", "only the next object is compared"),
    ],
    "01-tight_box": [
        ("xs[0] + 1), int(ys[-1] - ys[0] + 1)", "xs[0]), int(ys[-1] - ys[0])", "one pixel short"),
        ("xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1", "xs[-1] + 1), int(ys[-1] + 1", "not the right bottom"),
        ("xs, ys =", "ys, xs =", "x and y are swapped"),
    ],
    "01-octaves": [
        ("len(areas) > 1", "len(areas) > 2", "two masks are enough"),
        ("np.log2", "np.log", "logarithm to base 2"),
        ("areas = areas[areas > 0]", "", "leave out masks without any pixel"),
    ],
    "04-coverage_of": [
        ("in sentences for", "in sentences[:-1] for", "a sentence is left out: the last"),
        ("return types, sum(n for word, n in counts.items() if word in known) / sum(counts.values())",
         "return sum(n for word, n in counts.items() if word in known) / sum(counts.values()), types",
         "swapped"),
        ("/ len(counts)", "/ len(known)", "divide by the different words that were read"),
    ],
    "04-word_mask": [
        ("words != 0", "words > 1", "word number 1 is a word too"),
        ("/ weight.sum(dim=1)", "/ words.shape[1]", "divide by the number of words"),
        ("words != 0", "words == 0", "the wrong way round"),
    ],
    "04-back_off": [
        ('split("-")', 'split("-", 1)', "at every hyphen"),
        ("all(part", "any(part", "one is not enough"),
        ("if token not in known and", "if", "a known token stays as it is"),
    ],
    "05-receptive_field": [
        ("(kernel - 1)", "kernel", "a kernel of k adds k - 1 pixels"),
        (" * dilation", "", "the dilation is missing"),
        ("j * stride", "j", "the stride is missing"),
    ],
    "05-fold": [
        (" + norm.eps", "", "eps is missing"),
        ("norm.running_mean * scale", "norm.running_mean", "the running mean is scaled too"),
        (".sqrt()", "", "the root is missing"),
    ],
    "06-exact_target": [
        ("np.arange(size)[:, None] * n", "(np.arange(size)[:, None] + 1) * n", "cell i begins at i H / h"),
        (" * size / n\n", "\n", "divide by the area of a cell"),
        (None,
         "def exact_target(mask, size):\n    x = torch.from_numpy(mask).float()[None, None]\n"
         "    return torch.nn.functional.adaptive_avg_pool2d(x, size)[0, 0].numpy()",
         "overlap by a pixel"),
    ],
    "06-take_expressions": [
        ("range(K)", "range(1, K + 1)", "images are counted from 0"),
        ("logits[image_index == k]", "logits[k]", "the k-th expression"),
        ("image_index == k]", "image_index == k][:1]", "only the first expression"),
    ],
    "06-flip_words": [
        ('(swap.get(word, word) for word in text.split(" "))',
         '([*(swap.get(w, w) for w in text.split(" ")[:-1]), text.split(" ")[-1]])',
         "the last word is not looked at"),
        (', "leftmost": "rightmost", "rightmost": "leftmost"', "", "leftmost and rightmost"),
        (None,
         "def flip_words(text):\n    return text.replace('left', 'right').replace('right', 'left')",
         "undoes the first"),
    ],
    "07-dice_from_iou": [
        ("(1 + iou)", "(2 + iou)", "below stands 1 + IoU"),
        ("2 * iou", "iou", "the 2 is missing"),
        ("2 * iou / (1 + iou)", "iou / (2 - iou)", "that is IoU from Dice"),
    ],
    "07-precision_curve": [
        (".mean(axis=0)", ".sum(axis=0) / (len(iou) - 1)", "divide by the number of samples"),
        (" > ", " >= ", "> and not >="),
        ("100 * ", "", "in percent"),
    ],
    "07-boundary_iou": [
        ("iterations=d", "iterations=d + 1", "d + 1 times"),
        ("np.ones((3, 3)), ", "", "a cross"),
        ("iterations=d", "iterations=d, border_value=1", "outside the image are background"),
    ],
    "08-last_state": [
        ("(lengths - 1).clamp(min=0)", "lengths.clamp(max=states.shape[1] - 1)", "ends at column n - 1"),
        ("(lengths - 1).clamp(min=0)", "-1", "the last column"),
        ("picked * (lengths > 0)[:, None]", "picked", "an empty phrase gives zeros"),
    ],
    "08-project": [
        ("-n:, 0, 0]", "-n - 1:-1, 0, 0]", "begin at the channel -n"),
        ("weight[:, :-n]) + (pooled @ weight[:, -n:, 0, 0]", "weight[:, n:]) + (pooled @ weight[:, :n, 0, 0]",
         "the last input channels"),
        (" + (pooled @ weight[:, -n:, 0, 0].T)[:, :, None, None]", "", "the vector is missing"),
    ],
    "09-masked_weights": [
        ("    scores = q",
         "    real = torch.nn.functional.pad(real[:, 1:], (0, 1)) | (torch.arange(real.shape[1]) == 0)\n"
         "    scores = q",
         "the last real key is masked as well"),
        ('scores.masked_fill(~real[:, None, :], float("-inf")).softmax(-1)',
         "scores.softmax(-1) * real[:, None, :]",
         "masked after the softmax"),
        (" ** .5", "", "not by their number"),
    ],
    "09-position_product": [
        ("range(channels // 2)", "range(1, channels // 2 + 1)", "counted from 0"),
        ("2 * k / channels", "k / channels", "2k / channels"),
        ("math.cos", "math.sin", "not its sine"),
    ],
    "10-exchange": [
        ("for j in range(3) if j != i", "for j in [(i + 1) % 3]", "not from the next one only"),
        ("gates[i, j] * maps", "gates[j, i] * maps", "the gates' indices are swapped"),
        ("maps[i] + sum", "sum", "did you forget f_i?"),
    ],
    "10-constant_conv1d": [
        ("(length - 2)", "(length - 1)", "an inner position too many"),
        ("slice(1, 3), slice(0, 3), slice(0, 2)", "slice(0, 2), slice(0, 3), slice(1, 3)", "ends are swapped"),
        ("slice(1, 3), slice(0, 3), slice(0, 2)", "[slice(0, 3)] * 3", "one tap falls outside"),
    ],
    "11-sfm_parameters": [
        ("return layers *", "return (layers - 1) *", "a layer is missing"),
        ("4 * (c * c + c)", "4 * c * c", "the biases of the four matrices"),
        ("4 * (c * c + c)", "3 * (c * c + c)", "four matrices, not three"),
    ],
    "11-one_at_a_time": [
        ("differences(a, b).items()}", "list(differences(a, b).items())[:-1]}", "the last difference is left out"),
        ("replace(a,", "replace(b,", "all are the second configuration"),
        ("(_, value)", "(value, _)", "nothing was changed"),
    ],
    "12-cosine_decay": [
        ("(step + 1) / warmup", "step / warmup", "step 0 of the rise"),
        ("(step - warmup) / (total - warmup)", "step / total", "runs over the steps after the rise"),
        ("math.pi", "2 * math.pi", "this one comes up again"),
    ],
    "12-clip_norm": [
        ("for g in gradients]).sum().sqrt()", "for g in gradients[:-1]]).sum().sqrt()", "the last gradient is left out"),
        ("min(1., largest / float(norm))", "largest / float(norm)", "the scale is at most 1"),
        (".sqrt()", "", "the root is missing"),
    ],
    "12-batches_left": [
        ("return epoch,", "return epoch + 1,", "epochs are counted from 0"),
        ("-(-batches // accumulate)", "batches // accumulate", "round up"),
        ("done * accumulate", "done", "a step takes `accumulate` batches"),
    ],
    "16-controller": [
        ("for j in range(3) if j != i", "for j in [(i + 1) % 3]", "not from the next one only"),
        ("[g * m * x for", "[m * x for", "gamma is missing"),
        ("(1 - memory[i])", "memory[i]", "1 - m, not m"),
    ],
    "16-peephole_step": [
        ("    memory = f * memory + i * g.tanh()\n    return (o + w_o * memory)",
         "    before, memory = memory, f * memory + i * g.tanh()\n    return (o + w_o * before)",
         "the output gate has seen the old memory"),
        (" * memory.tanh()", " * memory", "tanh is missing"),
        ("f * memory + i * g", "i * memory + f * g", "input and forget gate are swapped"),
    ],
    "17-sentence_vector": [
        ("types[..., wanted]", "types[..., [(n + 1) % 4 for n in wanted]]", "kinds are counted from 0"),
        ("total / total.norm(dim=1, keepdim=True)", "total", "not scaled to length 1"),
        ("norm(dim=1, keepdim=True)", "norm()", "for the whole batch"),
    ],
    "17-gather": [
        ("p @ passed_on", "p @ found", "the messages were sent once"),
        ("return p @ passed_on", "return p @ found + p @ passed_on", "only the second is wanted"),
        (None, "def gather(p, q, x):\n    graph = p @ q.transpose(1, 2)\n    return graph @ (graph @ x)",
         "positions x positions was built"),
    ],
    "18-padded_sides": [
        ("(sides[-1] + 1) // 2", "sides[-1] // 2", "its half is rounded up"),
        ("n + -n % window", "(n // window + 1) * window", "whole windows is not padded"),
        ("image_size // 4", "image_size // 8", "stage 1 comes before the first merging"),
    ],
    "18-word_weights": [
        ("    scores = q", "    mask = mask & torch.nn.functional.pad(mask[:, 1:], (0, 1))\n    scores = q",
         "the last real word is masked as well"),
        ("(heads * q.shape[-1])", "q.shape[-1]", "not of one head's"),
        ('.masked_fill(~mask[:, None, None], float("-inf"))', "", "the mask is missing"),
    ],
    "19-floor": [
        ("share * foreground + (1 - share) * background", "foreground + background", "the mean over the positions"),
        ("math.log1p(math.exp(-1 / temperature))", "math.log(2)", "the loss of a similarity of zero"),
        ("-1 / temperature", "-temperature", "the temperature divides"),
    ],
    "19-ask_twice": [
        ("return f,", "return again,", "the first F, not the second"),
        ("return f, merged + merged_gate(again) * again", "return f, merged", "have not asked the words again"),
        ("merge(positions + gate(f) * f)", "merge(positions)", "before F was added"),
    ],
}  # fmt: skip
CASES = [(key, n, *slip) for key, slips in SLIPS.items() for n, slip in enumerate(slips)]


@pytest.mark.parametrize("key, n, old, new, words", CASES, ids=[f"{k}-{n}" for k, n, *_ in CASES])
@pytest.mark.filterwarnings("ignore:divide by zero")  # one of the slips does
def test_a_likely_slip_is_named(key, n, old, new, words):
    source = FOUND[key][0]
    assert old is None or source.count(old) == 1, f"{old!r} does not stand once in the solution"
    verdict = check_of(key)(function(key, new if old is None else source.replace(old, new)))
    assert not verdict.ok and words in verdict.message, verdict


def misshapen(value):
    "The same, in another shape or kind."
    if isinstance(value, torch.Tensor | np.ndarray):
        return value[None]
    if isinstance(value, tuple | list):
        return (value,)
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("key", SLIPS)
def test_none_and_a_wrong_shape_are_named(key):
    check, right = check_of(key), function(key, FOUND[key][0])
    verdict = check(lambda *arguments: None)
    assert verdict.message == "your function gives None: it has to end in a `return`"
    verdict = check(lambda *arguments: misshapen(right(*arguments)))
    assert not verdict.ok and re.search(r"has the shape \[|is wanted", verdict.message), verdict


def test_there_are_eighty_wrong_answers_and_whole_chapters():
    assert 5 * len(SLIPS) >= 80 and all(len(slips) >= 3 for slips in SLIPS.values())
    complete = {
        chapter
        for chapter in {key.split("-")[0] for key in SLIPS}
        if {k for k in FOUND if k.startswith(f"{chapter}-")} <= set(SLIPS)
    }
    assert len(complete) >= 4


@pytest.mark.parametrize("key", FOUND)
def test_every_stub_is_calm_and_no_answer_makes_a_check_raise(key):
    check, (solution, stub) = check_of(key), FOUND[key]
    seen = []
    exec(compile_(stub, key), {f"check_{key.split('-')[1]}": lambda fn: seen.append(check(fn))})
    assert [verdict.state for verdict in seen] == ["your turn"]
    right = function(key, solution)
    count = len(inspect.signature(right).parameters)
    assert check(right).ok, check(right)
    for wrong in (
        lambda *arguments, **named: None,
        lambda *arguments, **named: object(),
        lambda *arguments, **named: "a word",
        lambda *arguments, **named: np.zeros((1, 7), np.int8),
        lambda *arguments, **named: [],
    ):
        verdict = check(wrong)
        assert isinstance(verdict, Verdict) and verdict.state == "not yet" and verdict.message, verdict
    verdict = check(lambda *arguments, **named: 1 // 0)
    assert not verdict.ok and (key == "22-call" or "ZeroDivisionError" in verdict.message or "division" in verdict.message
                               or "pair" in verdict.message), verdict  # fmt: skip
    verdict = check(eval(f"lambda {', '.join('abcdefghijk'[: count + 1])}: 0"))
    assert not verdict.ok and ("argument" in verdict.message or key == "22-call"), verdict


def test_an_error_is_told_with_the_line_it_came_from(tmp_path):
    (tmp_path / "answer.py").write_text("def area(mask):\n    total = 0\n    return mask.summ()\n")
    names = {}
    exec(compile((tmp_path / "answer.py").read_text(), str(tmp_path / "answer.py"), "exec"), names)

    @exercise
    def check_area(fn):
        compare(fn, lambda mask: mask.sum(), np.ones((2, 2)), case="for four pixels")

    message = check_area(names["area"]).message
    assert message.startswith(
        "your function raises AttributeError in the line `return mask.summ()` (for four pixels):"
    )
    assert check_area(3).message == "give the check the function itself, not 3 (int)"
    assert repr(check_area(np.sum)) == "✓ area · correct"


def test_a_changed_argument_is_noticed():
    @exercise
    def check_add(fn):
        compare(fn, lambda x, y: x + y, torch.ones(3), torch.ones(3))

    assert check_add(lambda x, y: x + y).ok
    assert "changes what it is given" in check_add(lambda x, y: x.add_(y)).message


def test_a_slip_is_named_only_where_it_explains_all_answers():
    @exercise
    def check_twice(fn):
        for x in (2.0, 3.0):
            compare(fn, lambda x: 2 * x, x, slips={"that is the square": lambda x: x * x})

    assert check_twice(lambda x: x * x).message == "that is the square"
    # right for 2, as the square is; 9 for 3, as the square is
    assert check_twice(lambda x: 9.0 if x == 3 else 4.0).message == "that is the square"
    assert check_twice(lambda x: 5.0 if x == 3 else 4.0).message == "the answer is 5, not 6"


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(-9, 9)), st.data()
)
def test_difference_finds_the_one_value_that_differs(x, data):
    assert difference(x.copy(), x) is None and difference(torch.from_numpy(x), x) is None
    assert difference([x, {"a": 1}], (x, {"a": 1.0})) is None
    at = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    y = x.copy()
    y[at] += 1
    found = difference(y, x)
    assert found and (x.size == 1 or f"at {list(at)} stands" in found and f"1 of {x.size}" in found)
    assert difference({"k": (y, 0)}, {"k": (x, 0)}).startswith("entry ['k'][0]: ")


@pytest.mark.parametrize(
    "got, want, words",
    [
        (1, True, "type int64, not bool"),
        (np.ones(2), np.ones(2, bool), "type float64, not bool"),
        (np.ones(2), np.array([1, 1]), "type float64, not int64"),
        (np.ones(3), torch.ones(3), "an array [3] of float64, where a tensor [3] of float32 is wanted"),
        (torch.ones(3), torch.ones(3, 1), "the shape [3], not [3, 1]"),
        (float("nan"), 0.5, "the answer is nan, not 0.5"),
        ((1, 2, 3), (1, 2), "3 entries"),
        (5, {"a": 1}, "the answer is 5 (int), where a dict with a is wanted"),
        ({"b": 1}, {"a": 1}, "the answer is a dict with b, where"),
        ("one", 1, "'one' (str)"),
        (7, "seven", "7 (int), where 'seven' (str) is wanted"),
    ],
)
def test_kind_shape_and_type_are_named(got, want, words):
    assert words in difference(got, want)


# open experiments: what no check can grade
PARTS = {
    "I See it work": ("00", "07"),
    "II The data": ("01", "02", "03", "04", "06"),
    "III Build SHNet": ("05", "08", "09", "10", "11"),
    "IV Train and judge": ("12", "12b", "13"),
    "V Look inside": ("14", "15"),
    "VI Relatives": ("16", "17", "18", "19", "19b"),
    "VII The reproduction": ("20", "20b", "20c", "20d"),
}


def experiments(chapters):
    for path in CHAPTERS:
        if path.stem.split("_")[0] in chapters:
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "markdown" and re.match(r"### Open experiment", cell.source):
                    yield cell.source


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_an_open_experiment_with_a_table_to_fill(part):
    found = list(experiments(PARTS[part]))
    assert found
    for text in found:
        assert re.search(r"\*difficulty 4/5 · \d+ minutes", text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert sum(re.search(r"\|\s+\|", row) is not None for row in rows) >= 3, "rows with empty cells"
        assert "**Before you start**" in text and "**How to read it.**" in text


def test_commands_of_the_experiments_have_options_that_exist():
    from typer.main import get_command

    from refseg_nb.cli import app

    commands = get_command(app).commands
    seen = 0
    for text in (t for chapters in PARTS.values() for t in experiments(chapters)):
        for block in re.findall(r"```sh\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].split()
                if "refseg" not in words:
                    continue
                name, *rest = words[words.index("refseg") + 1 :]
                command = commands[name]
                if hasattr(command, "commands"):
                    command = command.commands[rest[0]]
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                assert {w for w in rest if w.startswith("--")} <= known, line
                seen += 1
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, a.name) for a in node.names)
                    seen += 1
    assert seen >= 5
