"""minidist's docstrings as reStructuredText, so that they look on a page as they do in the source.

They are plain text, of these kinds of lines:

    prose                          a paragraph; a line that ends early ends there on the page too
    label   text                   rows, of any number of lines: a table of two columns
    1. text,  - text               a list
    y = x @ w.T       (..., O)     formulas, several in a column: as they stand
        indented                   code, drawings: as they stand
    `name`                         a link where the name is one of minidist's and only one thing has it, else code
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise

FULL = 104  # columns: a line of prose that could have taken the next line's first word and be no longer ended early
ROW = re.compile(r"(\S(?:.*?\S)?)(?:   *)(?=\S)")  # a label, two blanks or more
ITEM = re.compile(r"(?:\d+\.|[-*•]) +")
FORMULA = re.compile(r"\S[^=:.]{0,24} (?:=|<-|->) ")
SPECIAL = re.compile(r"([\\*|_<>`])")
LONGEST_LABEL, SHORT_LABEL = 56, 24  # the latter stay on one line


def to_rst(text: list[str], names: Mapping[str, str]) -> list[str]:
    """The lines of a docstring (no indentation in common) as lines of reStructuredText.

    `names`: what `name` in the text may link to, and the full name of that.
    """
    out: list[str] = []
    for kind, lines in _segments(text):
        out += [*WRITERS[kind](lines, names), ""]
    return out


# -- what kind ----------------------------------------------------------------------------------------------------


def _segments(text: list[str]) -> list[tuple[str, list[str]]]:
    """(kind, lines), in order; code that blank lines divide is one segment."""
    found: list[tuple[str, list[str]]] = []
    for blank, group in groupby(text, key=lambda line: not line.strip()):
        if blank:
            continue
        for number, (kind, lines) in enumerate(_of_paragraph(list(group))):
            if number == 0 and kind == "literal" and found and found[-1][0] == kind:
                found[-1][1].extend(["", *lines])
            else:
                found.append((kind, lines))
    return found


def _of_paragraph(lines: list[str]) -> list[tuple[str, list[str]]]:
    """The segments of lines with no blank one among them."""
    if is_code("\n".join(lines)) or (len(lines) > 1 and FORMULA.match(lines[0]) and not lines[1].startswith(" ")):
        return [("literal", lines)]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        kind = _of_line(line)
        last = found[-1][0] if found else ""
        if kind == "indented":
            kind = last if last in ("rows", "list") else "literal"
        if kind == last:
            found[-1][1].append(line)
        else:
            found.append((kind, [line]))
    return found


def _of_line(line: str) -> str:
    if line.startswith(" "):
        return "indented"
    if ITEM.match(line):
        return "list"
    label = ROW.match(line)
    if label and len(label[1]) <= LONGEST_LABEL and label[1][-1] not in ".;:," and not FORMULA.match(line):
        return "rows"
    return "prose"


def is_code(text: str) -> bool:
    """Whether it is a program in Python that does something, and not one word that happens to be one."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    does = ast.Assign | ast.Call | ast.FunctionDef | ast.ClassDef | ast.Import | ast.With | ast.For
    return any(isinstance(node, does) for node in ast.walk(tree))


# -- how each kind is written -------------------------------------------------------------------------------------


def _literal(lines: list[str], names: Mapping[str, str]) -> list[str]:
    indent = min(len(line) - len(line.lstrip()) for line in lines if line)
    bare = [line[indent:] for line in lines]
    language = "python" if is_code("\n".join(bare)) else "none"
    return [f".. code-block:: {language}", "", *(f"   {line}".rstrip() for line in bare)]


def _prose(lines: list[str], names: Mapping[str, str]) -> list[str]:
    parts = _joined(lines)
    if len(parts) == 1:
        return [_start_of_line(inline(parts[0], names))]
    return [f"| {inline(part, names)}" for part in parts]


def _rows(lines: list[str], names: Mapping[str, str]) -> list[str]:
    rows: list[tuple[str, list[str]]] = []
    for line in lines:
        label = None if line.startswith(" ") else ROW.match(line)
        if label:
            rows.append((label[1], [line[label.end() :]]))
        else:
            rows[-1][1].append(line.strip())
    out = [".. list-table::", "   :class: rows", "   :widths: auto", ""]
    for label_text, texts in rows:
        parts = [inline(part, names) for part in _joined(texts, FULL - 16)]
        label_text = label_text.replace(" ", "\u00a0") if len(label_text) <= SHORT_LABEL else label_text
        out.append(f"   * - {inline(label_text, names)}")
        out += [f"     - | {part}" if n == 0 else f"       | {part}" for n, part in enumerate(parts)]
    return out


def _list(lines: list[str], names: Mapping[str, str]) -> list[str]:
    items: list[list[str]] = []
    for line in lines:
        if ITEM.match(line):
            items.append([line])
        else:
            items[-1].append(line.strip())
    out = []
    for item in items:
        marker = ITEM.match(item[0])
        assert marker
        text = " ".join([item[0][marker.end() :], *item[1:]])
        out += [f"{marker[0].strip().replace('•', '-')} {inline(text, names)}", ""]
    return out


WRITERS: dict[str, Callable[[list[str], Mapping[str, str]], list[str]]] = {
    "literal": _literal,
    "prose": _prose,
    "rows": _rows,
    "list": _list,
}


def _joined(lines: list[str], full: int = FULL) -> list[str]:
    """Lines that were broken because they were full, joined; the others stay apart."""
    parts = [lines[0].strip()]
    for before, line in pairwise(lines):
        next_word = line.split()[0]
        if len(before) + 1 + len(next_word) <= full:
            parts.append(line.strip())
        else:
            parts[-1] += " " + line.strip()
    return parts


def inline(text: str, names: Mapping[str, str]) -> str:
    """A line of text: what is between backticks is code or a link, all else is as it stands."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # an odd backtick
        return _escaped(text)
    out = ""
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            out += _escaped(piece)
            continue
        if out and not out[-1].isspace():
            out += "\\ "
        out += _code(piece, names)
        follows = pieces[number + 1][:1]
        if follows and not follows.isspace():
            out += "\\ "
    return out


def _code(piece: str, names: Mapping[str, str]) -> str:
    target = names.get(piece.removesuffix("()"))
    if target and re.search(r"[A-Z_.(]", piece):  # not `rank`, which is more often a number than somebody's method
        return f":py:obj:`{piece} <{target}>`"
    return f"``{piece}``" if piece.strip() == piece and piece else _escaped(piece)


def _escaped(text: str) -> str:
    """Nothing in it means anything; wide gaps stay."""
    text = SPECIAL.sub(r"\\\1", text)
    return re.sub(r"(?<=\S) {2,}(?=\S)", "\u2003", text)


def _start_of_line(text: str) -> str:
    """A paragraph must not begin like a list, a table, a field or a directive."""
    return f"\\{text}" if re.match(r"(?:\d+[.)]|[-+•#=]+|\.\.|::|>>>)(?=\s|$)|:\w", text) else text
