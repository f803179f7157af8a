"""How Sphinx builds the site. build.py puts the pages together and calls it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import reference  # noqa: E402
from docstrings import inline, to_rst  # noqa: E402

import minidist  # noqa: E402

project = "minidist"
author = "the minidist authors"
copyright = "the minidist authors, MIT licence"
version = release = minidist.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.githubpages", "myst_nb"]
templates_path: list[str] = []
html_theme = "furo"
html_title = "minidist"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style, pygments_dark_style = "a11y-light", "a11y-dark"
highlight_language = "text"
smartquotes = False  # ' and " in a drawing's legend are what stands in the drawing

# -- the reference: what modules define, in their order, without opening MPI
autodoc_mock_imports = ["mpi4py"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("Array", "Shape", "Steps", "Waits", "Loss", "Command")}
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 120
viewcode_follow_imported_members = False
nitpicky = True
suppress_warnings = ["ref.python"]  # an annotation's short name that two modules define
nitpick_ignore_regex = [
    ("py:.*", r"(?!minidist\.).*"),
    ("py:.*", r"minidist\..*\.[A-Z]"),
]  # others' types; variables of type

# -- the tutorials: notebooks; build.py says whether they are run
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4
nb_ipywidgets_js: dict[str, Any] = {}  # they come from another host
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_render_markdown_format = "commonmark"

MODULES = reference.read(ROOT / "minidist")
NAMES = reference.link_names(MODULES)


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Plain text becomes reStructuredText; see docstrings.py."""
    lines[:] = to_rst(lines, NAMES)
    if what in ("class", "exception"):
        bases = [f"`{b.__name__}`" for b in obj.__bases__ if b.__module__.startswith("minidist") or what == "exception"]
        if bases:
            lines += ["", ".. rst-class:: base", "", inline("based on " + ", ".join(bases), NAMES), ""]


def skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what Python itself says of a named tuple's fields."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def signature(app: Any, what: str, name: str, obj: Any, options: Any, words: str, returns: str) -> tuple[str, str]:
    """An alias of a type goes by its name."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (words, returns))


def page(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """A Chinese page says so: its fonts, hyphens and screen readers depend on that."""
    if pagename.startswith("tutorials/zh/"):
        context["language"] = "zh-CN"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", signature)
    app.connect("html-page-context", page)
