"""The document's numbered steps, and where in minidist each of them happens: `python -m minidist steps`.

A step is marked where it happens: by a comment or a docstring that begins with its label, or by the call that makes it
visible in a run (`comm.step("D.3(4) average gradients")`, `comm.mark("D.1", ...)`). Several strategies do the same step
in their own way, so a label may stand in several places.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The label; the step in a word or two; and in the document's language.
LABELS = {
    "D.1": ("data partition", "数据划分"),
    "D.2": ("parameter partition", "模型划分（参数）"),
    "D.3(1)": ("initialise the parameters", "初始化参数"),
    "D.3(2)": ("partition the data", "划分数据"),
    "D.3(3)": ("train", "各节点训练"),
    "D.3(4)": ("synchronise", "同步参数"),
    "D.3(5)": ("repeat", "重复至停止条件"),
    "M.1": ("model partition", "模型划分"),
    "M.2(1)": ("initialise the parameters", "初始化参数"),
    "M.2(2)": ("partition the model", "划分模型"),
    "M.2(3)": ("train a part", "各节点训练各部分"),
    "M.2(4)": ("combine", "合并结果"),
    "M.2(5)": ("repeat", "重复至停止条件"),
    "C.1": ("hardware", "硬件"),
    "C.2": ("software platform", "软件平台"),
    "C.3": ("communication mechanism", "通信机制"),
    "C.4": ("the practical case", "实践案例"),
}
LABEL = re.compile(r"[DMC]\.\d(?:\(\d\))?")
TELLING = ("step", "mark")  # methods whose first argument begins with a label


class Place(NamedTuple):
    """Where a step is marked."""

    label: str
    file: str  # within the package
    line: int
    words: str  # what is said there


def places(package: Path = Path(__file__).parents[1]) -> list[Place]:
    """Every mark in the sources of a package: first by label, then by file and line."""
    found = [place for path in package.rglob("*.py") for place in places_in(path, path.relative_to(package).as_posix())]
    order = {label: number for number, label in enumerate(LABELS)}
    return sorted(found, key=lambda place: (order.get(place.label, len(order)), place.file, place.line))


def places_in(path: Path, name: str) -> Iterator[Place]:
    """The marks in one file."""
    text = path.read_text("utf-8")
    # 1. Comments: "# D.3(2) Partition the data (D.1): ...", "# M.2(5), D.3(5) Repeat ..."
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            for clause in re.split(r"(?<=[.;]) (?=[DMC]\.\d)", token.string.lstrip("# ")):
                yield from marks(clause, name, token.start[0])
    for node in ast.walk(ast.parse(text)):
        # 2. Docstrings of functions and classes.
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (words := ast.get_docstring(node)):
            yield from marks(words.splitlines()[0], name, node.lineno)
        # 3. Calls, and the words that are kept for them: comm.step("D.3(4) average gradients"), comm.mark("D.1", words)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TELLING:
            yield from marks(" ".join(map(constant, node.args)), name, node.lineno)
        elif isinstance(node, ast.Assign):
            yield from marks(constant(node.value), name, node.lineno)


def constant(node: ast.AST) -> str:
    """What can be read of a string: "{...}" in the place of what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(constant, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{...}"


def marks(text: str, file: str, line: int) -> Iterator[Place]:
    """The labels that a text begins with."""
    begin = re.match(rf"{LABEL.pattern}(?:, {LABEL.pattern})*", text)
    if begin is not None:
        for label in LABEL.findall(begin[0]):
            yield Place(label, file, line, text[begin.end() :].lstrip(":, ").strip())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidist steps", description="Where each numbered step happens.")
    parser.add_argument("label", nargs="*", help="D.3(4), say, or D.3 (all)")
    parser.add_argument("--json", action="store_true", help="a JSON list of the places")
    args = parser.parse_args(argv)
    for wanted in args.label:
        if not any(label.startswith(wanted) for label in LABELS):
            parser.error(f"there is no step {wanted}: {', '.join(LABELS)}")
    chosen = [label for label in LABELS if not args.label or any(label.startswith(w) for w in args.label)]
    found = [place for place in places() if place.label in chosen]
    if args.json:
        print(json.dumps([place._asdict() for place in found], indent=1))
        return
    for label in chosen:
        english, chinese = LABELS[label]
        print(f"{label}  {english}  {chinese}")
        for place in found:
            if place.label == label:
                print(f"    minidist/{place.file}:{place.line}".ljust(60) + f"  {place.words}".rstrip())
