"""One place for each fact: settings.ini against the files that repeat it for other tools, and what the
repository may not contain."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import refseg_nb
from refseg_nb.bench.imports import HEAVY, imported

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(p.parent.name for p in (ROOT / "refseg_nb").glob("*/__init__.pyi"))


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_environment_yml_has_the_dependencies_of_settings_ini(settings):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted((settings["requirements"] + " " + settings["dev_requirements"]).split())
    assert f"python>={settings['min_python']}" in environment["dependencies"]


def test_every_dependency_has_a_tested_version(settings):
    pinned = {
        re.split(r"[=<>]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    }
    for requirement in (settings["requirements"] + " " + settings["dev_requirements"]).split():
        assert re.split(r"[=<>]", requirement)[0].lower() in pinned, (
            f"{requirement} is missing from constraints.txt"
        )


def test_version_stands_once(settings):
    assert refseg_nb.__version__ == settings["version"]


def test_no_machine_path_and_no_registry_host_is_committed(tracked):
    registries = re.compile(
        "|".join(
            [
                "py" + "pi.org",
                "python" + "hosted",
                "npm" + "js.",
                "deb." + "debian",
                r"\bregistry\.(?!ipynb)\w+\.(?:com|dev|io|net|org)\b",
            ]
        )
    )
    paths = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/[\w.-]+")
    for path in tracked:
        if path.suffix in {".png", ".safetensors", ".gz", ".npz", ".p"} or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not registries.search(text), f"{path.name} names a package registry"
        if path.parent.name != "tests":
            assert not paths.search(text), f"{path.name} names a path of a machine"


def test_no_pickle_is_loaded_outside_the_restricted_reader(tracked):
    for path in tracked:
        if path.suffix == ".py" and "refseg_nb" in path.parts and path.name != "refer.py":
            text = path.read_text()
            assert "pickle.load" not in text, f"{path.name} loads a pickle"
            for call in re.findall(r"torch\.load\([^\n]*", text):
                assert "weights_only=True" in call, f"{path.name}: {call}"


def test_shipped_weights_are_small(tracked):
    sizes = {p: p.stat().st_size for p in tracked if "weights" in p.parts}
    rows = sum(size for p, size in sizes.items() if p.parent.name.startswith("quick-"))
    assert rows <= 6e6 and sum(sizes.values()) - rows <= 10e6 and max(sizes.values()) <= 5e6


def test_data_setup_names_every_file_with_its_licence():
    from refseg_nb.data.fetch import load_manifest

    page, manifest = (ROOT / "data_setup" / "README.md").read_text(encoding="utf-8"), load_manifest()
    for name, file in manifest.files.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.endswith(f"| {file.licence} |"), f"the licence of {name} differs from the manifest's"
        if file.size:
            assert f"{file.size / (1e9 if file.size >= 1e9 else 1e6):.1f}" in row, (
                f"the size of {name} differs from the manifest's"
            )
    for name in manifest.sets:
        assert f"refseg data fetch {name} " in page or name == "refclef"


# --- the public face


@pytest.mark.parametrize("name", ["refseg_nb", *(f"refseg_nb.{p}" for p in PACKAGES)])
def test_a_package_shows_its_public_names_alone(name):
    package = importlib.import_module(name)
    names = dir(package)
    assert names == sorted(package.__all__) and 2 <= len(names) <= 16
    assert not [n for n in names if n.startswith("_")]
    assert len(package.__doc__) > 60
    for n in names:
        found = getattr(package, n)
        assert not isinstance(found, type(sys)), f"{name}.{n} is a module: a name of its own would be hidden"
    with pytest.raises(AttributeError):
        getattr(package, "no_such_" + "name")


def test_every_package_has_a_face():
    packages = {p.parent.name for p in (ROOT / "refseg_nb").glob("*/__init__.py")}
    assert packages == set(PACKAGES) and (ROOT / "refseg_nb" / "py.typed").is_file()


@pytest.mark.parametrize("typed,wanted", [("refseg_nb.", "load"), ("refseg_nb.models.", "create_model")])
def test_completion_knows_the_names(typed, wanted):
    from IPython.core.completer import IPCompleter, provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("import refseg_nb.models")
    completer = IPCompleter(shell, shell.user_ns)
    for use_jedi in (False, True):
        completer.use_jedi = use_jedi
        with provisionalcompleter():
            found = {c.text.rpartition(".")[2] for c in completer.completions(typed, len(typed))}
        assert wanted in found


def test_the_first_page_of_the_manual_runs():
    example = refseg_nb.__doc__.split("\n\n")[1:3]
    names = {}
    exec("\n".join(line.strip() for line in "\n".join(example).splitlines()), names)
    assert names["answer"].found and names["answer"].score > 0.8


@pytest.mark.parametrize(
    "statement",
    [
        "import refseg_nb.training, refseg_nb.inference, refseg_nb.models",
        "from refseg_nb.training import train",
        "from refseg_nb.inference import load",
        "from refseg_nb.evaluation import evaluate",
        "from refseg_nb.data import RISDataset",
    ],
)
def test_imports_leave_the_heavy_packages_alone(statement):
    assert not imported(statement) & set(HEAVY)


def test_names_alone_do_not_import_torch():
    assert "torch" not in imported("import refseg_nb; dir(refseg_nb); import refseg_nb.cli")


@pytest.mark.slow
def test_a_strict_type_checker_accepts_the_public_api(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path]
    found = subprocess.run([*command, "tests/public_api.py"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# --- how the code reads


def code_lines(path):
    """The lines that hold code: no blank lines, no lists of names, which nbdev writes."""
    text = path.read_text(encoding="utf-8")
    skipped = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            skipped.update(range(node.lineno, node.end_lineno + 1))
    return [x for i, x in enumerate(text.splitlines(), 1) if i not in skipped and x.strip()]


def test_few_lines_are_long():
    files = [p for p in (ROOT / "refseg_nb").rglob("*.py") if p.name != "_modidx.py"]
    lines = [line for path in files for line in code_lines(path)]
    assert max(map(len, lines)) <= 120
    share = sum(len(line) > 100 for line in lines) / len(lines)
    assert share < 0.08, f"{share:.1%} of the package's lines have over 100 characters"


def test_no_statement_ends_with_a_semicolon():
    for path in (ROOT / "refseg_nb").rglob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        assert not [t.start for t in tokens if t.type == tokenize.OP and t.string == ";"], path.name


def test_the_changelog_names_places_that_exist():
    """Each row of its tables: in the new module there are the names of the old one."""
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `refseg_nb.")]
    assert len(rows) > 40
    for old, new, *names in rows:
        target = re.match(r"`([\w.]+)`", new)[1]
        if names:
            module = importlib.import_module(target)
            for name in re.findall(r"`(\w+)`", names[0]):
                assert hasattr(module, name), f"{old} -> {target}.{name}"
        else:
            module, _, name = target.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{old} -> {target}"
