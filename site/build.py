"""The course as static pages: `make site` builds them into build/site, and opens from a file with the network off.

1. `prepare` writes what Sphinx reads into build/site-source: the chapters, then the notebooks of nbs/library, without
   nbdev's directives and with anchors for the symbols that they export; the home page, which is the README; and a page
   that lists the library's symbols. No notebook is run: the pages show the committed outputs.
2. Sphinx renders them (conf.py). Anything that it warns about, such as a link to a chapter that does not exist, fails
   the build.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

from refseg_nb.course.tools import readme_from

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = {
    0: "Start",
    1: "Data",
    7: "The model",
    12: "Training and measuring",
    14: "Attention",
    16: "The family",
    20: "Reproduction",
    21: "Scaling",
    22: "Command line",
    23: "Photographs",
    90: "Behind the course",
}  # a part begins with the chapter of this number
LIBRARY = "Library"  # the part of the notebooks in nbs/library


@dataclass
class Symbol:
    "What a chapter adds to the library."

    name: str  # in full: "refseg_nb.data.refer.Refer"
    kind: str  # "module", "class", "function", "method" or "data"
    summary: str  # the first line of its docstring


@dataclass
class Chapter:
    "A notebook, and what it exports."

    name: str  # "03_refer_format", or "library/viz"
    notebook: nbformat.NotebookNode  # as it is committed
    module: str  # "refseg_nb.data.refer"; empty where nothing is exported

    @property
    def in_library(self) -> bool:
        return self.name.startswith("library/")

    @property
    def up(self) -> str:
        "From the chapter's page to the folder of all pages."
        return "../" * self.name.count("/")

    @property
    def title(self) -> str:
        heading = self.notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        return heading if self.in_library else f"{self.name.split('_')[0]} · {heading}"

    @property
    def part(self) -> str:
        if self.in_library:
            return LIBRARY
        return PARTS[max(first for first in PARTS if first <= int(self.name[:2]))]

    @property
    def sentence(self) -> str:
        return next(
            (x.removeprefix("> ") for x in self.notebook.cells[0].source.splitlines() if x.startswith("> ")),
            "",
        )

    @property
    def symbols(self) -> list[Symbol]:
        own = [Symbol(self.module, "module", self.sentence)] if self.module else []
        return own + [
            s
            for c in self.notebook.cells
            if "export" in directives(c)
            for s in symbols_of(c.source, self.exported_to(c))
        ]

    def exported_to(self, cell: nbformat.NotebookNode) -> str:
        "The module that a cell is exported to: the chapter's, unless the cell names another one."
        named = directives(cell)["export"]
        return f"refseg_nb.{named}" if named else self.module


def directives(cell) -> dict[str, str]:
    "nbdev's directives at the head of a code cell: `# | eval: false` is {'eval': 'false'}."
    if cell.cell_type != "code":
        return {}
    found = (re.match(r"# ?\| *(\w+):? *(.*)$", line) for line in cell.source.splitlines())
    return {m[1]: m[2].strip() for m in found if m}


def symbols_of(
    source: str,  # an exported cell
    scope: str,  # the module, or the class
    kind: str = "function",
) -> list[Symbol]:
    "The public names that a cell defines."
    found = []
    for node in (ast.parse(source) if isinstance(source, str) else source).body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, kind, node))
        if isinstance(node, ast.ClassDef):
            found.append((node.name, "class", node))
        if isinstance(node, ast.Assign | ast.AnnAssign) and kind == "function":
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [
                (t.id, "data", None)
                for target in targets
                for t in ast.walk(target)
                if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)
            ]
    out = []
    for name, what, node in found:
        if name.startswith("_"):
            continue
        lines = (ast.get_docstring(node) or "" if node else "").splitlines()
        out.append(Symbol(f"{scope}.{name}", what, lines[0] if lines else ""))
        if what == "class":
            out += symbols_of(node, f"{scope}.{name}", "method")
    return out


def read(path: Path) -> Chapter:
    "Read a chapter, or a notebook of the library."
    notebook = nbformat.read(path, as_version=4)
    module = next(
        (f"refseg_nb.{d['default_exp']}" for d in map(directives, notebook.cells) if "default_exp" in d), ""
    )
    return Chapter(f"{'library/' * (path.parent.name == 'library')}{path.stem}", notebook, module)


def moved(text: str, chapter: Chapter) -> str:
    "Links as they are on the site: figures are copied to stand beside the pages, the README is the home page."
    text = text.replace(f"]({chapter.up}index.ipynb)", f"]({chapter.up}index.md)")
    return text.replace(f"]({chapter.up}../results/", f"]({chapter.up}results/")


def page_link(link: re.Match, chapter: Chapter) -> str:
    "A link to a notebook that is a page of the site; others stay as they are."
    target = (ROOT / "nbs" / chapter.name).parent / f"{link[1]}.ipynb"
    return f"]({link[1]}.html" if target.is_file() else link[0]


def page(chapter: Chapter) -> nbformat.NotebookNode:
    "The notebook as Sphinx reads it."
    out = []
    for cell in chapter.notebook.cells:
        cell, found = nbformat.from_dict(cell), directives(cell)
        if "hide" in found or "default_exp" in found:
            continue
        if "export" in found:
            out.append(anchors(symbols_of(cell.source, chapter.exported_to(cell))))
        if found:
            cell.source = re.sub(r"\A(# ?\|.*\n?)+", "", cell.source)
            imports = all(
                isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body
            )
            cell.metadata["tags"] = [
                *cell.metadata.get("tags", []),
                *["export"] * ("export" in found),
                *["hide-input"] * imports,
            ]
        if cell.cell_type == "markdown":
            cell.source = moved(cell.source, chapter)
        for made in (o.data for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})):
            text = moved("".join(made["text/markdown"]), chapter)
            # Sphinx resolves links in cells, not in outputs
            made["text/markdown"] = re.sub(
                r"\]\(([\w./]+)\.ipynb", lambda link: page_link(link, chapter), text
            )
        out.append(cell)
    where = f"Notebook `nbs/{chapter.name}.ipynb`" + (
        f", exports [`{chapter.module}`]({chapter.up}library.md#{chapter.module.replace('.', '')})"
        if chapter.module
        else ""
    )
    out[0].source = re.sub(r"\A# .*", f"# {chapter.title}", out[0].source) + f"\n\n{{.where}}\n{where}\n"
    if chapter.module:
        out.insert(1, anchors(chapter.symbols[:1]))
    return nbformat.v4.new_notebook(cells=[c for c in out if c], metadata=chapter.notebook.metadata)


def anchors(symbols: list[Symbol]) -> nbformat.NotebookNode | None:
    "A cell with an anchor for each symbol: the directive of conf.py."
    return (
        new_markdown_cell("\n".join(["```{symbols}", *(f"{s.name} {s.kind}" for s in symbols), "```"]))
        if symbols
        else None
    )


def links(chapter: Chapter) -> dict[str, str]:
    """Which names mean a symbol of the library in a chapter's code: what it imports and what it defines,
    unless it also uses the name for something else."""
    own = [s for s in chapter.symbols if s.kind != "module"]
    found, taken = {s.name.rpartition(".")[2]: s.name for s in own if s.kind != "method"}, set()
    for cell in chapter.notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refseg_nb"):
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                taken.add(node.id)
            if isinstance(node, ast.arg):
                taken.add(node.arg)
    return {name: full for name, full in found.items() if name not in taken}


def library(chapters: list[Chapter]) -> str:
    "The page that lists the library's symbols, by module."
    lines = [
        "# The library",
        "",
        ("Every public name of `refseg_nb`. Each leads to the notebook that builds, explains and tests it."),
        "",
    ]
    plain = lambda text: "`".join(
        t if i % 2 else re.sub(r"([\\<*$|{}\[\]])", r"\\\1", t) for i, t in enumerate(text.split("`"))
    )
    for part, inside in groupby((c for c in chapters if c.module), lambda c: c.part):
        lines += [f"## {part}", ""]
        for chapter in inside:
            lines += [f"### `{chapter.module}`", "", f"[]({chapter.name}.ipynb): {chapter.sentence}", ""]
            for s in chapter.symbols[1:]:
                level = 1 if s.kind == "method" else 0
                lines.append(
                    f"{'  ' * level}- {{py:obj}}`{s.name.rpartition('.')[2]} <{s.name}>`"
                    + (f" · {plain(s.summary)}" if s.summary else "")
                )
            lines.append("")
    return "\n".join(lines)


def live_section(
    out: Path,  # the folder of the pages
) -> str:  # HTML; empty, and a line on stderr, where it cannot be made
    "The live page as a section of the home page; its scripts go to `out / live`."
    from refseg_nb.attention.live import live_assets, runtime_files, write_live_site
    from refseg_nb.errors import RefsegError
    from refseg_nb.inference.segmenter import load

    try:
        runtime_files()
        return write_live_site(out, live_assets(load("shnet-refshapes")))
    except RefsegError as error:
        print(f"the home page is built without the live page: {error}", file=sys.stderr)
        return ""


def with_live(
    home: str,  # the home page in markdown
    section: str,  # HTML, or empty
) -> str:
    "The home page with the live page before its first picture that stands alone, else before its first section."
    if not section:
        return home
    block = f"````{{raw}} html\n{section}````\n\n"
    place = re.search(r"^!\[|^## ", home, re.M)
    at = place.start() if place else len(home)
    return f"{home[:at]}\n{block}{home[at:]}"


def prepare(
    nbs: Path,  # the notebooks
    source: Path,  # an empty folder
    live: str = "",  # HTML of the live page, for the home page
) -> list[Chapter]:
    "Write what Sphinx reads."
    chapters = [
        read(path) for path in [*sorted(nbs.glob("[0-9]*.ipynb")), *sorted(nbs.glob("library/*.ipynb"))]
    ]
    texts = {chapter.name: nbformat.writes(page(chapter)) for chapter in chapters}
    (source / "library").mkdir()
    for name, text in texts.items():
        (source / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (source / "library.md").write_text(library(chapters), encoding="utf-8")
    parts = {part: [c.name for c in inside] for part, inside in groupby(chapters, lambda c: c.part)}
    parts[chapters[-1].part] += ["library", "real_data"]
    contents = [
        "\n".join(["```{toctree}", f":caption: {part}", ":hidden:", "", *names, "```", ""])
        for part, names in parts.items()
    ]
    home = (
        re.sub(r"\[([^\]]+)\]\((results/[^)]+\.md)\)", r"\1 (`\2`)", readme_from(nbs / "index.ipynb"))
        .replace("](nbs/", "](")
        .replace("](data_setup/README.md)", "](real_data.md)")
    )
    (source / "index.md").write_text(with_live(home, live) + "\n" + "\n".join(contents), encoding="utf-8")
    (source / "real_data.md").write_text(
        (ROOT / "data_setup" / "README.md").read_text(encoding="utf-8").replace("](../nbs/", "]("),
        encoding="utf-8",
    )
    for name in set(
        re.findall(
            r"\]\((?:\.\./)?((?:results/|LICENSE|CITATION.cff)[^){]*)\)", home + "".join(texts.values())
        )
    ):
        if name.endswith(".md"):
            continue  # named, not linked: see above
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(nbs / "images", source / "images")
    known = {s.name: f"{c.name}.html#{s.name}" for c in chapters for s in c.symbols}
    known["refseg_nb.load"] = known["refseg_nb.inference.segmenter.load"]
    (source / "symbols.json").write_text(
        json.dumps({"symbols": known, "names": {c.name: links(c) for c in chapters}}), encoding="utf-8"
    )
    return chapters


def build(
    nbs: Path = ROOT / "nbs",
    out: Path = ROOT / "build" / "site",
) -> int:  # 0 if Sphinx had nothing to complain about
    "Build the pages."
    from sphinx.cmd.build import build_main

    source = out.with_name(out.name + "-source")
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    out.mkdir(parents=True)
    prepare(nbs, source, live_section(out))
    return build_main(
        ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(source / ".doctrees"), str(source), str(out)]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the course's pages.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    out = parser.parse_args().out.resolve()
    status = build(out=out)
    if status == 0:
        print(f"open {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}/index.html")
    sys.exit(status)
