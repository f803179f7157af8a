"""Every page runs as it stands, in both languages: `pytest tutorials`.

A page is a notebook in Markdown, tutorials/en/NN_name.md, and its Chinese edition tutorials/zh/NN_name.md. Needs the
extras mpi, test and tutorials.
"""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jupytext
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent
ROOT = TUTORIALS.parent
SECONDS = 120  # that a page may take

PAGES = {lang: sorted(path.stem for path in (TUTORIALS / lang).glob("*.md")) for lang in ("en", "zh")}
LESSONS = [f"{lang}/{name}" for lang in PAGES for name in PAGES[lang] if name != "glossary"]
EVERY = [f"{lang}/{name}" for lang in PAGES for name in PAGES[lang]]
BOTH = sorted(set(PAGES["en"]) & set(PAGES["zh"]))

# A page's five parts: what a heading, or bold words, begin with. There may be several of each; exercises come last.
SECTIONS = {
    "en": ["Predict", "Run", "See", "Check", "Exercises?"],
    "zh": ["预测", "运行", "(观察|看)", "(核对|检查|验证)", "练习"],
}
CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


# -- what a page consists of ------------------------------------------------------------------------------------------


def text_of(page: str) -> str:
    return (TUTORIALS / f"{page}.md").read_text("utf-8")


def read_near(page: str, link: str) -> str:
    return ((TUTORIALS / page).parent / link).read_text("utf-8")


def code_of(page: str) -> list[Any]:
    """Its code cells."""
    return code_cells(jupytext.reads(text_of(page), fmt="md"))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(text: str) -> str:
    """What is neither code nor output."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", text))


def headings(text: str) -> list[tuple[int, str]]:
    """(level, words) of each."""
    return [(len(marks), words) for marks, words in re.findall(r"^(#+) +(.+)$", FENCE.sub("", text), re.MULTILINE)]


def links(text: str) -> list[str]:
    """What its links and pictures point to, within the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    return [link for link in found if not re.match(r"\w+:|#", link)]


def pictures(text: str) -> list[str]:
    return sorted({link for link in links(text) if "pictures/" in link})


def checks_in(source: str) -> list[str]:
    """The exercises' checks that a cell calls, in order: `check_partner(...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(call.lineno, call.func.id) for call in calls if isinstance(call.func, ast.Name)]
    return [name for _, name in sorted(names) if name.startswith("check_")]


def told(cell: Any) -> list[str]:
    """What checks have printed: "right" or "not yet", for each."""
    text = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
    return re.findall(r"^(right$|not yet(?=: ))", text, re.MULTILINE)


def exercises(cells: list[Any]) -> list[str]:
    """The exercises of cells that have run: each was asked, unanswered; the next such cell answered it."""
    done: list[str] = []
    asked: list[str] = []
    for cell in cells:
        names = checks_in(cell.source)
        if not names:
            continue
        solves = "solution" in cell.metadata.get("tags", [])
        expected = ["right" if solves else "not yet"] * len(names)
        assert told(cell) == expected, f"{names} said {told(cell)}, expected {expected}:\n{cell.source}"
        if solves:
            assert names == asked, f"a solution of {names} follows the exercises {asked}"
            done, asked = done + names, []
        else:
            assert not asked, f"{asked} had no solution yet when {names} were asked"
            asked = names
    assert not asked, f"{asked} have no solution"
    return done


# -- running ----------------------------------------------------------------------------------------------------------


def execute(notebook: Any, folder: Path) -> None:
    """Run its cells in order, in `folder`, with the working copy of minidist. An exception in a cell is one here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    where = {"metadata": {"path": str(folder)}}

    async def run() -> None:
        with tempfile.TemporaryDirectory() as sockets:  # no TCP: a page that runs beside may take the port
            manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
            client = NotebookClient(notebook, km=manager, timeout=SECONDS, resources=where)
            try:
                await asyncio.wait_for(client.async_execute(env=env), SECONDS)
            finally:
                await manager.shutdown_kernel(now=True)

    asyncio.run(run())


@pytest.mark.parametrize("page", LESSONS)
def test_a_page_runs_top_to_bottom(page: str, tmp_path: Path) -> None:
    # A place like tutorials/, without any picture: those that are there afterwards were made by the page.
    copy = tmp_path / "tutorials"
    for folder in ("pictures", page[:2]):
        (copy / folder).mkdir(parents=True)
    notebook = jupytext.reads(text_of(page), fmt="md")
    execute(notebook, (copy / page).parent)
    if folder := os.environ.get("TUTORIALS_OUTPUTS"):  # for the site: what the cells have printed
        ran = Path(folder, f"{page}.ipynb")
        ran.parent.mkdir(parents=True, exist_ok=True)
        ran.write_text(jupytext.writes(notebook, fmt="ipynb"), "utf-8")

    assert len(exercises(code_cells(notebook))) >= 2, "a page has two exercises at least"
    shown = pictures(text_of(page))
    assert shown, "a page shows a picture at least"
    for picture in shown:
        made, committed = ((folder / page).parent / picture for folder in (copy, TUTORIALS))
        assert made.is_file() and made.stat().st_size, f"no cell makes {picture}"
        assert committed.is_file(), f"{picture} is not in tutorials/pictures: copy it there from a run of the page"


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LESSONS)
def test_a_page_has_its_five_parts(page: str) -> None:
    text = FENCE.sub("", text_of(page))
    places = {}
    for section in SECTIONS[page[:2]]:
        places[section] = [m.start() for m in re.finditer(rf"(^##+ +|\*\*){section}", text, re.MULTILINE)]
        assert places[section], f"no heading or bold words begin with {section}"
    *others, last = places.values()
    assert last[-1] > max(first for first, *_ in others), f"exercises come last: {places}"


@pytest.mark.parametrize("page", LESSONS)
def test_a_page_opens_in_jupyter(page: str) -> None:
    kernel = jupytext.reads(text_of(page), fmt="md").metadata.get("kernelspec", {})
    assert kernel.get("name") == "python3", "the header names no kernel: see the other pages"


@pytest.mark.parametrize("page", [*EVERY, "README"])
def test_links_lead_somewhere(page: str) -> None:
    folder = (TUTORIALS / page).parent
    missing = [link for link in links(text_of(page)) if not (folder / link.partition("#")[0]).exists()]
    assert not missing


def test_the_index_names_every_page() -> None:
    assert set(links(text_of("README"))) >= {f"{page}.md" for page in EVERY}


@pytest.mark.parametrize("page", ["en/glossary", "zh/glossary"])
def test_the_glossary_names_what_is_in_the_code(page: str) -> None:
    places = re.findall(r"\]\(([^)]+\.py)\) `(\w+)` \|$", text_of(page), re.MULTILINE)
    assert len(places) == len(re.findall(r"^\| \*\*", text_of(page), re.MULTILINE)) > 50, "a row without its place"
    missing = [(file, name) for file, name in places if not re.search(rf"\b{name}\b", read_near(page, file))]
    assert not missing


# -- two editions -----------------------------------------------------------------------------------------------------


def test_both_editions_have_the_same_pages() -> None:
    assert PAGES["en"] == PAGES["zh"] and PAGES["en"]


@pytest.mark.parametrize("name", PAGES["en"])
def test_english_pages_are_english(name: str) -> None:
    if name != "glossary":
        lines = text_of(f"en/{name}").splitlines()
        assert not [f"{i}: {line}" for i, line in enumerate(lines, 1) if CHINESE.search(line)]


@pytest.mark.parametrize("name", BOTH)
def test_both_editions_are_built_alike(name: str) -> None:
    en, zh = text_of(f"en/{name}"), text_of(f"zh/{name}")
    assert [level for level, _ in headings(zh)] == [level for level, _ in headings(en)]
    assert pictures(zh) == pictures(en)
    assert commands(zh) == commands(en)
    assert len(CHINESE.findall(prose(zh))) > len(prose(en)) / 10, "the Chinese edition is hardly Chinese"


@pytest.mark.parametrize("name", BOTH)
def test_both_editions_have_the_same_code(name: str) -> None:
    for number, (en, zh) in enumerate(zip_longest(code_of(f"en/{name}"), code_of(f"zh/{name}")), 1):
        assert en is not None and zh is not None, f"cell {number} is in one edition only:\n{(en or zh).source}"
        assert en.metadata.get("tags") == zh.metadata.get("tags"), f"cell {number} has other tags"
        why = difference(ast.parse(en.source), ast.parse(zh.source))
        assert not why, f"cell {number} differs ({why}):\n{en.source}\n\n{zh.source}"


def difference(en: Any, zh: Any) -> str:
    """Where two syntax trees differ, but for strings that are Chinese in the second; "" where nowhere."""
    if isinstance(en, ast.JoinedStr | ast.Constant) and isinstance(zh, ast.JoinedStr | ast.Constant):
        return _difference_of_constants(en, zh)
    if isinstance(en, ast.AST) and type(en) is type(zh):
        parts = [(getattr(en, field, None), getattr(zh, field, None)) for field in en._fields]
        return next(filter(None, (difference(a, b) for a, b in parts)), "")
    if isinstance(en, list) and isinstance(zh, list) and len(en) == len(zh):
        return next(filter(None, map(difference, en, zh)), "")
    return "" if en == zh else f"{_shown(en)} and {_shown(zh)}"


def _difference_of_constants(en: ast.JoinedStr | ast.Constant, zh: ast.JoinedStr | ast.Constant) -> str:
    """What they show must be the same, in any order; the words around it may be Chinese in the second."""
    (words_en, values_en), (words_zh, values_zh) = map(_words_and_values, (en, zh))
    if values_en != values_zh:
        return f"{_shown(en)} and {_shown(zh)}"
    same = words_en == words_zh or (isinstance(words_zh, str) and CHINESE.search(words_zh))
    return "" if same else f"{_shown(en)} and {_shown(zh)}"


def _words_and_values(node: ast.JoinedStr | ast.Constant) -> tuple[Any, list[str]]:
    if isinstance(node, ast.Constant):
        return node.value, []
    words = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    return words, sorted(ast.dump(part) for part in node.values if isinstance(part, ast.FormattedValue))


def _shown(node: Any) -> str:
    return ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else repr(node)


# -- what is to be typed into a terminal ------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The lines to be typed: those of ```console fences that begin with "$ "; a \\ at the end joins the next."""
    fences = [body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language == "console"]
    return [line[2:] for body in fences for line in body.splitlines() if line.startswith("$ ")]


def python_of(command: str) -> list[str] | None:
    """What python is told by `A=1 mpirun -n 4 python -m minidist.examples.mnist --zero 1`; None: it starts none."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    if not words or words[0] not in ("mpirun", "python") or "python" not in words:
        return None
    arguments = words[words.index("python") + 1 :]
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


@cache
def help_of(*program: str) -> str:
    """What it prints with --help."""
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{program}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", [*EVERY, "README"])
def test_commands_are_understood_by_their_programs(page: str) -> None:
    for command in commands(text_of(page)):
        words = python_of(command)
        if not words or words[0] == "-c" or (words[0] == "-m" and not words[1].startswith("minidist")):
            continue
        if words[0] != "-m" and not (ROOT / words[0]).exists():
            assert any(f'"{words[0]}"' in cell.source for cell in code_of(page)), f"no {words[0]}, nor is it written"
            continue
        # The program: a script, -m and a module, or those and a command of the module.
        length = 1 if words[0] != "-m" else 3 if words[1] in ("minidist", "minidist.comm") else 2
        known = help_of(*words[:length])
        options = [word.partition("=")[0] for word in words[length:] if word.startswith("--")]
        unknown = [option for option in options if not re.search(rf"{option}(?![\w-])", known)]
        assert not unknown, f"{command}: its --help knows no {unknown}"


# -- whether these tests can fail -------------------------------------------------------------------------------------


def cell(source: str, printed: str, solves: bool = False) -> Any:
    from nbformat.v4 import new_code_cell, new_output

    outputs = [new_output("stream", name="stdout", text=printed)]
    return new_code_cell(source, outputs=outputs, metadata={"tags": ["solution"]} if solves else {})


ASKED = cell("check_a(a)", "not yet: no\n")
SOLVED = cell("assert check_a(a)", "right\n", solves=True)


def test_lastare_found() -> None:
    assert exercises([cell("x = 1", ""), ASKED, cell("y = 2", "right\n"), SOLVED]) == ["check_a"]


@pytest.mark.parametrize(
    "cells",
    [
        [ASKED],
        [SOLVED],
        [ASKED, ASKED, SOLVED],
        [cell("check_a(a)", "right\n"), SOLVED],
        [ASKED, cell("check_a(a)", "not yet: no\n", solves=True)],
        [ASKED, cell("check_b(a)", "right\n", solves=True)],
    ],
)
def test_a_wrong_exercise_is_noticed(cells: list[Any]) -> None:
    with pytest.raises(AssertionError):
        exercises(cells)


@pytest.mark.parametrize(
    ("en", "zh", "same"),
    [
        ("f(1)  # one", "f(1)  # 一", True),
        ('f("one")', 'f("一")', True),
        ('f"{a} of {b}"', 'f"{b} 中的 {a}"', True),
        ('f(algorithm="ring")', 'f(algorithm="tree")', False),
        ('f"{a} of {b}"', 'f"{b} 中的 {c}"', False),
        ("f(1)", "f(2)", False),
        ("f(x)", "f(x); g(x)", False),
        ("f(x)", "f(x, y=1)", False),
    ],
)
def test_a_difference_of_editions_is_noticed(en: str, zh: str, same: bool) -> None:
    assert (not difference(ast.parse(en), ast.parse(zh))) == same


def test_an_exception_in_a_cell_fails_the_page(tmp_path: Path) -> None:
    notebook = jupytext.reads("```python\nimport minidist\n```\n\n```python\nassert 1 == 2\n```\n", fmt="md")
    with pytest.raises(Exception, match="AssertionError"):
        execute(notebook, tmp_path)


def test_commands_are_taken_apart() -> None:
    text = "```console\n$ A=1 mpirun -n 4 python -m minidist.examples.mnist \\\n    --zero 1\nepoch 1\n$ ls\n```\n"
    assert list(map(python_of, commands(text))) == [["-m", "minidist.examples.mnist", "--zero", "1"], None]
