"""The site's own parts: docstrings as pages, the reference, the check of links. The whole is built by CI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "tutorials" / "site"


def load(name: str):
    """A module of tutorials/site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings, links, reference = load("docstrings"), load("links"), load("reference")
NAMES = {"all_reduce": "minidist.collectives.operations.all_reduce", "rank": "minidist.x.rank"}


def rst(text: str) -> str:
    return "\n".join(docstrings.to_rst(text.split("\n"), NAMES)).strip()


# -- docstrings ---------------------------------------------------------------------------------------------------

LONG = "word " * 20 + "long"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One line.", "One line."),
        (f"{LONG}\nends here.", f"{LONG} ends here."),  # a full line goes on
        ("Ends early.\nAnother.", "| Ends early.\n| Another."),
        ("a * b | c_", r"a \* b \| c\_"),
        ("1.5 is a number", "1.5 is a number"),
        ("..", "\\.."),
        (":name: x", "\\:name: x"),
        ("back\\slash", "back\\\\slash"),
        ("- one\n- two\n  more", "- one\n\n- two more"),
        ("1. one\n2. two", "1. one\n\n2. two"),
        ("    a -> b\n      c", ".. code-block:: none\n\n   a -> b\n     c"),
        ("    x = f(1)\n\n    g(x)", ".. code-block:: python\n\n   x = f(1)\n\n   g(x)"),
        ("x = f(1)\nif x:\n    g(x)", ".. code-block:: python\n\n   x = f(1)\n   if x:\n       g(x)"),
        ("dx = dy!   (B)\ndw = x     (I)", ".. code-block:: none\n\n   dx = dy!   (B)\n   dw = x     (I)"),
        ("z = x + y.   dx = dz!", "z = x + y.\u2003dx = dz!"),
        ("Legend:\n    a drawing", "Legend:\n\n.. code-block:: none\n\n   a drawing"),
    ],
)  # fmt: skip
def test_each_kind_of_text(text, expected):
    assert rst(text) == expected


def test_rows_become_a_table():
    head = ".. list-table::\n   :class: rows\n   :widths: auto\n\n"
    one = "   * - Cost\n     - | P - 1 messages\n"
    two = "   * - two\u00a0words\n     - | first, which ends early\n       | 1: second"
    found = rst("Cost       P - 1 messages\ntwo words  first, which ends early\n           1: second\nProse behind.")
    assert found == f"{head}{one}{two}\n\nProse behind."


def test_names_are_linked_where_they_are_names():
    assert docstrings.inline("`all_reduce`s", NAMES) == (
        ":py:obj:`all_reduce <minidist.collectives.operations.all_reduce>`\\ s"
    )
    assert docstrings.inline("the `all_reduce()` of", NAMES).startswith("the :py:obj:`all_reduce() <minidist.")
    assert docstrings.inline("`rank` and `other`", NAMES) == "``rank`` and ``other``"
    assert docstrings.inline("one ` alone", NAMES) == "one \\` alone"


# -- the reference ------------------------------------------------------------------------------------------------


BASE = '''"""Base.

More."""

def f():
    """Does f.

    More."""

def g(): pass

def _h():
    """No."""

class C:
    """A C."""
    def send(self):
        """Sends."""
    def __init__(self):
        """No."""
'''


def test_modules_are_read_from_their_source(tmp_path):
    package = tmp_path / "minidist"
    (package / "comm").mkdir(parents=True)
    (package / "__init__.py").write_text('"""All."""')
    (package / "__main__.py").write_text('"""A program."""')
    (package / "comm" / "__init__.py").write_text('"""Messages."""')
    (package / "comm" / "base.py").write_text(BASE)
    found = reference.read(package)
    assert list(found) == ["minidist", "minidist.comm", "minidist.comm.base"]
    base = found["minidist.comm.base"]
    assert (base.summary, base.names, base.members) == (
        "Base.",
        {"f": "Does f.", "C": "A C."},
        ["minidist.comm.base.C.send"],
    )
    names = reference.link_names(found)
    assert names["C"] == names["base.C"] == "minidist.comm.base.C"
    assert names["send"] == names["C.send"] == "minidist.comm.base.C.send"
    (package / "other.py").write_text('def send():\n    """Sends too."""\n')
    names = reference.link_names(reference.read(package))
    assert "send" not in names and names["other.send"] == "minidist.other.send"


# -- the check of links -------------------------------------------------------------------------------------------


def site(folder: Path, body: str) -> list[str]:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "index.html").write_text(f"<html><body id='top-of-it'>{body}</body></html>")
    (folder / "sub" / "page.html").write_text('<a name="old"></a><h2 id="here">x</h2><a href="../index.html">up</a>')
    (folder / "picture 1.svg").write_text("<svg/>")
    return links.broken(folder)


@pytest.mark.parametrize(
    "body",
    [
        '<a href="sub/page.html#here">',
        '<a href="sub/page.html#old">',
        '<a href="#top-of-it">',
        '<a href="sub/page.html">',
        '<a href="https://example.org/nothing#here">',
        '<a href="mailto:x@example.org">',
        '<img src="picture%201.svg">',
        '<img src="data:image/png;base64,x">',
        '<link rel="canonical" href="https://example.org">',
    ],
)
def test_links_that_lead_somewhere(tmp_path, body):
    assert site(tmp_path, body) == []


@pytest.mark.parametrize(
    "body, why",
    [
        ('<a href="none.html">', "<a> none.html: no such file"),
        ('<a href="sub/page.html#gone">', "no such anchor"),
        ('<a href="#gone">', "no such anchor"),
        ('<a href="sub/">', "no such file"),
        ('<a href="../outside.html">', "no such file"),
        ('<a href="/sub/page.html">', "an address from the root"),
        ('<img src="none.png">', "no such file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "is fetched from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "is fetched from elsewhere"),
    ],
)
def test_links_that_do_not(tmp_path, body, why):
    (found,) = site(tmp_path, body)
    assert found.startswith("index.html: <") and why in found
