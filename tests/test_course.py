"""The rules of the course: what every chapter has, what none may contain, and that its exercises hold."""

import ast
import importlib
import io
import re
import statistics
import tokenize
from pathlib import Path

import nbformat
import pytest

from refseg_nb.course.tools import exercise_stub, exercises, readme_from, same_code, solution_of

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"[0-7]\d[a-z]?_", p.name)]


def read(path):
    return nbformat.read(path, as_version=4)


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def prose(notebook):
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def runs(cell):
    return (
        cell.cell_type == "code"
        and cell.source.strip()
        and "skip-execution" not in cell.metadata.get("tags", [])
    )


def visible(cell):
    stub = 'raise NotImplementedError("your turn")' in cell.source  # the reader's own, to be filled in
    return runs(cell) and not stub and not re.match(r"#\s*\|\s*(hide|default_exp)\b", cell.source)


@by_name(NOTEBOOKS)
def test_each_notebook_opens_with_title_and_one_sentence(path):
    first = read(path).cells[0].source
    assert first.startswith("# ")
    assert path.name == "index.ipynb" or re.search(r"^> \S.*[.!?]$", first, re.M), (
        "under the title stands one sentence, marked with >"
    )


@by_name(NOTEBOOKS)
def test_no_notebook_is_too_large_or_carries_machine_paths_warnings_or_tracebacks(path):
    assert path.stat().st_size < 1.5e6
    for number, cell in enumerate(read(path).cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number} shows a traceback"
            text = str({k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}) + str(
                output.get("text", "")
            )
            assert not re.search(r"(?<![\w.])/(tmp|work|root|home|opt|Users)/", text), (
                f"cell {number} shows a path of a machine"
            )
            assert not re.search(r"\w*Warning: ", text), f"cell {number} shows a warning"
        assert not re.search(r"(?<![\w.])/(tmp|work|root|home|opt|Users)/\w", cell.source), (
            f"cell {number} names a path of a machine"
        )


def ends_in_a_value(cell):
    source = "\n".join(x for x in cell.source.splitlines() if not x.startswith(("%", "!")))
    tree = ast.parse(source).body
    return bool(tree) and isinstance(tree[-1], ast.Expr) and not source.rstrip().endswith(";")


@by_name(CHAPTERS)
def test_committed_outputs_are_there(path):
    values = [c for c in read(path).cells if visible(c) and ends_in_a_value(c)]
    without = [c.source for c in values if not c.outputs]
    assert len(without) <= 0.2 * len(values), (
        f"{len(without)} of {len(values)} cells that end in a value show none: run the chapter. The"
        f" first:\n{without[0]}"
    )


@by_name(CHAPTERS)
def test_chapter_has_objectives_summary_exercises_and_next(path):
    text = prose(read(path)).lower()
    assert "objectives" in text and "minutes" in text
    for heading in ("summary", "next"):
        assert re.search(rf"^#+ .*{heading}|^\*\*{heading}", text, re.M), f"no {heading}"
    # the four were cut out of chapters 05, 08, 12 and 21b, which kept the exercises
    cut_out = ("05b", "07b", "11c", "21d")
    if path.stem[:2] not in ("00", "20", "22") and path.stem[:3] not in cut_out:
        assert list(exercises(read(path))), "a chapter has exercises"


def logical_lines(source):
    "Statements and headers of blocks: a count that the formatter's layout does not change."
    source = "\n".join(x for x in source.splitlines() if not x.startswith(("%", "!")))
    tokens = tokenize.generate_tokens(io.StringIO(source + "\n").readline)
    return sum(token.type == tokenize.NEWLINE for token in tokens)


@by_name(CHAPTERS)
def test_chapter_is_more_prose_than_code_and_its_cells_are_small(path):
    notebook = read(path)
    code = [c for c in notebook.cells if visible(c)]
    lines = [logical_lines(c.source) for c in code]
    assert sum(c.cell_type == "markdown" for c in notebook.cells) >= 0.9 * len(code)
    assert statistics.median(lines) <= 9, f"median cell of {statistics.median(lines)} lines"
    exported = re.compile(r"^#\s*\|\s*export", re.M)
    showing = sum(
        bool(c.get("outputs")) or "assert" in c.source or bool(exported.search(c.source)) for c in code
    )
    assert showing >= 0.6 * len(code), "most cells show or assert something"
    assert sum(
        "assert" in c.source or "test_" in c.source or "check_" in c.source or "expect_error" in c.source
        for c in code
    ) >= 0.2 * len(code)


@by_name(CHAPTERS)
def test_links_between_chapters_lead_somewhere(path):
    for target in re.findall(r"\]\(([\w./]+\.(?:ipynb|md|py))\)", prose(read(path))):
        assert (path.parent / target).exists(), f"{target} does not exist"


EXERCISES = [(p, text.source, stub.source, name) for p in CHAPTERS for text, stub, name in exercises(read(p))]


@pytest.mark.parametrize(
    "path, text, stub, name", EXERCISES, ids=[f"{p.stem.split('_')[0]}-{n}" for p, _, _, n in EXERCISES]
)
def test_exercise_stub_is_made_from_its_solution_and_the_check_tells_them_apart(path, text, stub, name):
    assert "difficulty" in text and "minutes" in text and "<summary>Hint</summary>" in text
    assert same_code(stub, exercise_stub(text, name)), (
        "stub and solution differ: make them again with `make run`"
    )
    module = importlib.import_module(f"refseg_nb.course.exercises.ch{path.stem.split('_')[0]}")
    check = getattr(module, f"check_{name}")
    solved, seen = {}, []
    exec(compile(solution_of(text), f"{path.stem}:{name}", "exec"), solved)
    verdict = check(solved[name])
    assert verdict.ok, verdict
    exec(compile(stub, f"{path.stem}:{name}", "exec"), {f"check_{name}": lambda fn: seen.append(check(fn))})
    assert [verdict.state for verdict in seen] == ["your turn"]


def test_readme_is_made_from_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_from(ROOT / "nbs" / "index.ipynb"), (
        "run `make readme`"
    )
