"""The pages of the API reference: a package's has tables of what it offers and holds; and one for each module."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docstrings import inline


@dataclass
class Module:
    """A module, or a package, as its source says.

    summary  the first line of its docstring
    names    what it defines for others, with docstrings: {name: first line}
    members  the same of its classes: full names
    """

    name: str
    path: Path
    summary: str
    names: dict[str, str]
    members: list[str]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def read(package: Path) -> dict[str, Module]:
    """All modules of a package, by name, programs (__main__.py) left out."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        name = module_name(path.relative_to(package.parent))
        tree = ast.parse(path.read_text("utf-8"))
        names, members = {}, []
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if text := ast.get_docstring(node):
                names[node.name] = text.splitlines()[0]
                inner = [n for n in node.body if isinstance(n, ast.FunctionDef) and isinstance(node, ast.ClassDef)]
                members += [f"{name}.{node.name}.{n.name}" for n in inner
                            if not n.name.startswith("_") and ast.get_docstring(n)]  # fmt: skip
        summary = (ast.get_docstring(tree) or "").split("\n")[0]
        found[name] = Module(name, path, summary, names, members)
    return found


def module_name(path: Path) -> str:
    """minidist/comm/base.py is minidist.comm.base, minidist/comm/__init__.py minidist.comm."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def link_names(modules: dict[str, Module]) -> dict[str, str]:
    """{name as it is written in text: full name}, where only one thing has it: `Trainer`, `Trainer.step`, `step`."""
    full = [f"{module.name}.{name}" for module in modules.values() for name in module.names]
    full += [member for module in modules.values() for member in module.members]
    short = [(".".join(parts[-n:]), name) for name in full for parts in [name.split(".")] for n in (1, 2, 3)]
    short = [(word, name) for word, name in short if not word.startswith("minidist.")]
    count = Counter(word for word, _ in short)
    return {word: name for word, name in short if count[word] == 1}


def pages(modules: dict[str, Module]) -> dict[str, str]:
    """{docname under api/: text}."""
    return {
        name: _package(module, modules) if module.is_package else _module(module) for name, module in modules.items()
    }


def _module(module: Module) -> str:
    """A module's page. It is on no list but its package's: 200 in the margin of every page help nobody, and slowly."""
    title, parent = module.name.removeprefix("minidist."), module.name.rpartition(".")[0]
    orphan = "" if parent == "minidist" else ":orphan:\n\n"
    up = _up(parent, module if module.names else None)
    return f"{orphan}{_heading(title)}{up}{_automodule(module)}"


def _automodule(module: Module) -> str:
    """Its docstring, and all that it defines itself."""
    members = f"   :members: {', '.join(module.names)}\n" if module.names else ""
    return f".. automodule:: {module.name}\n{members}\n"


def _up(parent: str, module: Module | None = None) -> str:
    """Links to the package that holds it, and to the whole source of a module (where there is a page of it)."""
    words = [f":doc:`↑ {parent.removeprefix('minidist.')} <{parent}>`"]
    role = ""
    if module is not None:
        role = ".. role:: html(raw)\n   :format: html\n\n"
        place = module.name.replace(".", "/")
        words.append(f':html:`<a class="source" href="../_modules/{place}.html">{place}.py</a>`')
    return f"{role}{' · '.join(words)}\n\n"


def _package(package: Module, modules: dict[str, Module]) -> str:
    title, parent = package.name.removeprefix("minidist."), package.name.rpartition(".")[0]
    orphan = ":orphan:\n\n" if package.name.count(".") > 1 else ""
    up = _up(parent) if parent else ""
    parts = [orphan, _heading(title), up, _automodule(package)]
    names = link_names(modules)
    offered = _offered(package.name, modules)
    if offered:
        rows = [(f":py:obj:`{name} <{target}>`", inline(summary, names)) for name, target, summary in offered]
        parts += [_heading("What it offers", "-"), _table(rows)]
    inside = [m for m in modules.values() if m.name.rpartition(".")[0] == package.name]
    if inside:
        rows = [(f":doc:`{m.name.rpartition('.')[2]} <{m.name}>`", inline(m.summary, names)) for m in inside]
        parts += [_heading("Modules", "-"), _table(rows)]
    return "".join(parts)


def _offered(package: str, modules: dict[str, Module]) -> list[tuple[str, str, str]]:
    """(name, full name of what it is, first line) of all that a package hands on from its modules, in order."""
    found = []
    loaded: Any = importlib.import_module(package)
    for name, value in vars(loaded).items():
        home = modules.get(getattr(value, "__module__", None) or "")
        real = getattr(value, "__name__", "")
        documented = inspect.isclass(value) or inspect.isfunction(value)
        if documented and not name.startswith("_") and home is not None and real in home.names:
            found.append((name, f"{home.name}.{real}", home.names[real]))
    return found


def _heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n\n"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [".. list-table::", "   :class: rows", "   :widths: auto", ""]
    for left, right in rows:
        lines += [f"   * - {left}", f"     - {right}"]
    return "\n".join(lines) + "\n\n"
