"""The site: ``python -m sphinx -W docs OUT``, or ``make -C docs html``.

The build needs no network: links into the pages of Pyro, torch and ArviZ are made only where ``DOCS_ONLINE=1``,
and formulas become MathML, which browsers draw by themselves: no MathJax is fetched, neither by the build nor by a
reader.
Pages under ``tutorials/`` are notebooks that the build runs; a tutorial that raises fails the build.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.directives.other import TocTree
from sphinx.ext.autosummary import Autosummary
from sphinx.util import logging

import gumbo
from gumbo.experiments.cli import usage

DOCS = Path(__file__).resolve().parent

project = "gumbo"
copyright = "the gumbo contributors"
version = release = gumbo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines the names of imports
html_title = "gumbo"
html_static_path = ["_static"]
html_css_files = ["gumbo.css"]
html_math_renderer = "mathml"

# Pages are written for GitHub as well as for the site: its anchors, its formulas, its links to files.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
# A page that begins below the first level, as an included part of another file does, is no mistake.
# Blocks of code may be abridged with "…". A table of names may stand on the page that describes them.
suppress_warnings = ["myst.header", "misc.highlighting_failure", "autosummary.import_cycle"]

# Tutorials run once for each content of their cells; outputs are kept beside the site. A minute each, at most.
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style")]
python_maximum_signature_line_length = 100

if os.environ.get("DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
        "arviz": ("https://python.arviz.org/en/stable", None),
    }

# The packages whose `__all__` is the reference, each described on a page of reference/.
PACKAGES = (
    "gumbo.models",
    "gumbo.guides",
    "gumbo.inference",
    "gumbo.inference.estimators",
    "gumbo.inference.objectives",
    "gumbo.errors",
    "gumbo.testing",
)


def public_home(module: str, name: str) -> str:
    """The package whose page describes what ``module`` offers as ``name``: another one where it only passes it on."""
    value = getattr(importlib.import_module(module), name)
    for package in (module, *PACKAGES):
        home = importlib.import_module(package)
        if package != "gumbo" and name in vars(home) and getattr(home, name) is value:
            return f"{package}.{name}"
    return f"{module}.{name}"


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its ``__all__``, or what it defines under a name without an underscore."""
    defined = (n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_")
    return list(getattr(module, "__all__", defined))


class PublicNames(Autosummary):
    """``.. public-names:: gumbo.models``: what a module offers, with first lines, inside ``eval-rst``."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        described = [name for name in public_names(module) if callable(getattr(module, name))]
        self.content = StringList(
            [f"~{public_home(module.__name__, name)}" for name in sorted(described, key=str.lower)]
        )
        return super().run()


class PagesLeft(TocTree):
    """``{pages-left}``: a toctree of the pages of this folder that the page names nowhere, so that no page is lost."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        here = Path(self.env.doc2path(self.env.docname))
        named = set(here.read_text(encoding="utf-8").split())
        left = sorted(page.stem for page in here.parent.glob("*.md") if page != here and page.stem not in named)
        self.content = StringList(left)
        return super().run() if left else []


class ModelGallery(Directive):
    """``{model-gallery}``: a picture for each page of ``models/``, as far as it has one, that leads to the page."""

    def run(self) -> list[nodes.Node]:
        grid = nodes.container(classes=["gallery"])
        for page in sorted(DOCS.glob("models/*.md")):
            pictures = sorted(DOCS.glob(f"models/figures/{page.stem}-*.png"))
            if not pictures:
                continue
            name = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            kind = pictures[-1].stem.removeprefix(f"{page.stem}-").replace("_", " ")
            image = nodes.image(uri=f"/models/figures/{pictures[-1].name}", alt=f"{name}: {kind}")
            link = nodes.reference("", "", image, nodes.inline(text=name), refuri=f"models/{page.stem}.html")
            grid += nodes.paragraph("", "", link)
        return [grid]


class Usage(Directive):
    """``{usage}``: what ``gumbo --help`` prints."""

    def run(self) -> list[nodes.Node]:
        return [nodes.literal_block(text=usage(), language="text")]


def mathml(tex: str, block: bool) -> str:
    """Write a formula in MathML, which needs neither a script nor a font from elsewhere, nor commands for sizes."""
    try:
        return tex2mathml(re.sub(r"\\textstyle|\\[bB]igg?", "", tex).replace(r"\dots", r"\ldots"), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", tex, error)
        return ""


def visit_inline(writer, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def bars_as_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep the bars of a docstring's ``|x|`` from being read as a substitution."""
    lines[:] = [line if "``" in line else re.sub(r"\|(\w[^|\s]*)\|", r"\\|\1\\|", line) for line in lines]


def from_elsewhere(app, what, name, obj, skip, options) -> bool | None:
    """Leave out functions of other libraries that are the default value of an attribute."""
    home = getattr(obj, "__module__", None)
    return True if callable(obj) and home and home.split(".")[0] not in ("gumbo", "builtins") else None


def outside_pages(app, docname: str, source: list[str]) -> None:
    """Offer Markdown files beside ``docs/`` for download, which are no pages of the site."""
    here = Path(app.env.doc2path(docname)).parent

    def offered(link: re.Match) -> str:
        target = (here / link["path"]).resolve()
        if target.is_relative_to(DOCS) or not target.exists():
            return link[0]
        return f"{{download}}`{link['text']} <{link['path']}>`"

    source[0] = re.sub(r"\[(?P<text>[^\]`]+)\]\((?P<path>(?:\.\./)+[^)#\s]+\.md)\)", offered, source[0])


def mark_not_run(app, doctree) -> None:
    """Mark the blocks of code that say "not run here" in their first line; tests compile them and run all others."""
    for block in doctree.findall(nodes.literal_block):
        if block.astext().startswith("# not run here"):
            block["classes"].append("not-run")


LONG = 30  # characters of a name that still fits into a column


def mark_long_code(app, doctree) -> None:
    """Mark commands and calls in cells, which break where they must; names stay whole."""
    for cell in doctree.findall(nodes.entry):
        for code in cell.findall(nodes.literal):
            if len(code.astext()) > LONG:
                code["classes"].append("long")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", bars_as_text)
    app.connect("autodoc-skip-member", from_elsewhere)
    app.connect("source-read", outside_pages)
    app.connect("doctree-read", mark_not_run)
    app.connect("doctree-read", mark_long_code)
    app.add_directive("public-names", PublicNames)
    app.add_directive("pages-left", PagesLeft)
    app.add_directive("model-gallery", ModelGallery)
    app.add_directive("usage", Usage)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
