"""Sphinx's settings for the course's pages, and two additions: anchors for the library's symbols, and links to
them from the code."""

import json
import re
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
project, author, copyright = (settings["DEFAULT"][key] for key in ("lib_name", "author", "copyright"))
mathjax = (
    Path(find_spec("mathjax").submodule_search_locations[0])
    / "static"
    / "mathjax"
    / "es5"
    / "tex-svg-full.js"
)

extensions = ["myst_nb"]
exclude_patterns = [".doctrees"]
nb_execution_mode = "off"  # the committed outputs are shown; nothing is run
nb_mime_priority_overrides = [("html", "text/html", 0)]  # the attention explorer is live, not a picture
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables in outputs
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
nitpicky = True
nb_code_prompt_show = nb_code_prompt_hide = "Imports"  # what is folded away

html_theme = "sphinx_book_theme"
html_title = project
# MathJax travels with the pages: one file, its letters are drawn, no fonts
html_static_path = ["static", str(mathjax)]
html_css_files = ["site.css"]
html_extra_path = ["../LICENSE"]
mathjax_path = mathjax.name
html_copy_source = html_use_index = html_domain_indices = False
html_show_search_summary = False  # a page opened from a file may not read another one
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "pygments_light_style": "github-light-high-contrast",
    "pygments_dark_style": "github-dark-high-contrast",
}


class Symbols(SphinxDirective):
    """Anchors for the symbols that the next cell defines; search and cross-references know them as Python
    objects."""

    has_content = True

    def run(self):
        domain, out = self.env.get_domain("py"), []
        for line in self.content:
            name, kind = line.split()
            out.append(nodes.target("", "", ids=[name]))
            if kind == "module":
                domain.note_module(name, name, "", "", False)
            else:
                domain.note_object(name, kind, name, location=out[-1])
        return out


def page_of(app, docname, name):
    "Where a name that stands in a chapter leads to, if it means a symbol of the library."
    name = name.removesuffix("()")
    full = app.site_links["names"].get(docname, {}).get(name, name)
    # prose uses names of other chapters: `create_model`, `Refer`
    if full not in app.site_links["symbols"] and re.search(r"[A-Z_]", name):
        ends = [s for s in app.site_links["symbols"] if s.endswith("." + name)]
        full = ends[0] if len(ends) == 1 else name
    return from_page(docname, app.site_links["symbols"].get(full))


def from_page(docname, address):
    "An address as a page writes it: the notebooks of the library are one folder down."
    return address and "../" * docname.count("/") + address


def inside(node, kinds):
    "Whether a node stands in one of these."
    return node.parent is not None and (isinstance(node.parent, kinds) or inside(node.parent, kinds))


def link_prose(app, doctree, docname):
    "Link the names in inline code, where it is not a link already."
    for node in list(doctree.findall(nodes.literal)):
        address = page_of(app, docname, node.astext())
        if address and not inside(node, (nodes.reference, nodes.title)):
            link = nodes.reference("", "", internal=True, refuri=address, classes=["symbol"])
            node.replace_self(link)
            link += node


def link_code(app, pagename, templatename, context, doctree):
    """Link the names in code cells, and make every line of code its own box, so that a long one wraps below
    its own indentation."""
    symbols = {full: from_page(pagename, address) for full, address in app.site_links["symbols"].items()}
    names = {
        name: symbols[full]
        for name, full in app.site_links["names"].get(pagename, {}).items()
        if full in symbols
    }

    def line(text):
        tag, indent = re.match(r'((?:<span class="\w+">)?)( *)', text).groups()
        return (
            f'<span class="line" style="--indent:{len(indent)}">{tag}<span'
            f' class="indent">{indent}</span>{text[len(tag + indent) :]}</span>'
        )

    def block(found):
        code = found[2]
        code = re.sub(
            r'<span class="n">refseg_nb</span><span class="o">\.</span><span class="n">load</span>',
            lambda m: f'<a class="symbol" href="{symbols["refseg_nb.load"]}">{m[0]}</a>',
            code,
        )
        code = re.sub(
            r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?!<span class="o">=</span>)',
            lambda m: f'<a class="symbol" href="{names[m[1]]}">{m[0]}</a>' if m[1] in names else m[0],
            code,
        )
        code = re.sub(
            r'<span class="nn">(refseg_nb[\w.]*)</span>',
            lambda m: f'<a class="symbol" href="{symbols[m[1]]}">{m[0]}</a>' if m[1] in symbols else m[0],
            code,
        )
        return found[1] + "\n".join(map(line, code.rstrip("\n").split("\n"))) + found[3]

    if "body" in context:
        body = re.sub(
            r'(<div class="highlight"><pre>(?:<span></span>)?)(.*?)(</pre>)',
            block,
            context["body"],
            flags=re.S,
        )
        # what is read out is what is seen
        body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
        # in the outputs of cells
        context["body"] = re.sub(r'href="(?:nbs/)?((?:\d|library/)\w+)\.ipynb"', r'href="\1.html"', body)


def setup(app):
    app.site_links = json.loads((Path(app.srcdir) / "symbols.json").read_text(encoding="utf-8"))
    app.add_directive("symbols", Symbols)
    app.connect("doctree-resolved", link_prose)
    app.connect("html-page-context", link_code)
