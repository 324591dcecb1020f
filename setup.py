"""Everything about the package is read from settings.ini, so that each fact has one place."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {"dev": cfg["dev_requirements"].split()}
for entry in cfg["extra_requirements"].split():
    name, requirement = entry.split(":", 1)
    extras.setdefault(name, []).append(requirement)

readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="MIT",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["refseg_nb", "refseg_nb.*"]),
    package_data={
        "refseg_nb": [
            "py.typed",
            "**/*.pyi",
            "weights/**/*",
            "data/manifest.toml",
            "attention/static/*",
            "probe/*.json",
            "training/launch/*",
        ]
    },
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["refseg_nb=refseg_nb._modidx:d"],
    },
)
