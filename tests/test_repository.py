"""One place for each fact: settings.ini against the files that repeat it for other tools, and what the
repository may not contain."""

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import refseg_nb

ROOT = Path(__file__).parent.parent


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
        "|".join(["py" + "pi.org", "python" + "hosted", "npm" + "js.", "deb." + "debian", "registry" + r"\."])
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
    sizes = [p.stat().st_size for p in tracked if "weights" in p.parts]
    assert sum(sizes) <= 10e6 and all(size <= 5e6 for size in sizes)


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
