"""The site: the README, the tutorials in both languages with what their cells print, and the API reference.

    python tutorials/site/build.py OUTPUT                  runs the pages, those that have changed since the last time
    python tutorials/site/build.py OUTPUT --no-run         shows their code only
    python tutorials/site/build.py OUTPUT --outputs DIR    shows what TUTORIALS_OUTPUTS=DIR pytest tutorials has left

Works offline. Warnings are errors; every link within the site is checked. Needs the extras tutorials and site.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # this copy of minidist, whichever is installed

import links  # noqa: E402
import reference  # noqa: E402

LANGUAGES = {"en": "Tutorials", "zh": "教程"}
SWITCH = {"en": ("zh", "本页中文版"), "zh": ("en", "This page in English")}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")  # [text](HERE#anchor)
FENCE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def assemble(source: Path, outputs: Path | None) -> None:
    """Lay out the pages as Sphinx wants them. `outputs`: notebooks that have run."""
    # 1. What pages link to, where it is beside them in the project: pictures, results, programs.
    for folder in ("benchmarks", "minidist", "tests", "tutorials"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "site", "*.gz")
        )
    for path in [*source.rglob("*.md")]:
        if not path.is_relative_to(source / "tutorials"):
            path.rename(path.with_suffix(".txt"))  # no page of its own

    # 2. The README is the front page, and the table of contents.
    trees = []
    for lang, caption in LANGUAGES.items():
        names = sorted(path.stem for path in (ROOT / "tutorials" / lang).glob("*.md"))
        index = ["tutorials/README"] if lang == "en" and (ROOT / "tutorials" / "README.md").exists() else []
        trees.append(_tree(caption, [*index, *(f"tutorials/{lang}/{name}" for name in names)]))
    modules = reference.read(ROOT / "minidist")
    readme = (ROOT / "README.md").read_text("utf-8")
    house = [f"minidist.{name}" for name in re.findall(r"^  (\w+)(?:\.py|/) ", readme, re.MULTILINE)]  # its order
    tops = sorted((m for m in modules if m.count(".") == 1), key=lambda m: house.index(m) if m in house else 99)
    trees.append(_tree("Reference", [f"api/{name}" for name in ("minidist", *tops)]))
    (source / "index.md").write_text("\n\n".join([_relinked(readme, source, source), *trees]), "utf-8")

    # 3. The tutorials, as notebooks.
    for lang in LANGUAGES:
        for path in sorted((source / "tutorials" / lang).glob("*.md")):
            _to_notebook(path, source, lang, outputs)
    index_page = source / "tutorials" / "README.md"
    if index_page.exists():
        index_page.write_text(_relinked(index_page.read_text("utf-8"), index_page.parent, source), "utf-8")

    # 4. The reference.
    (source / "api").mkdir()
    for name, text in reference.pages(modules).items():
        (source / "api" / f"{name}.rst").write_text(text, "utf-8")


def _tree(caption: str, pages: list[str]) -> str:
    short = [f"{re.split('[./]', page)[-1]} <{page}>" if page.startswith("api/") else page for page in pages]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *short, "```"]) if pages else ""


def _to_notebook(path: Path, source: Path, lang: str, outputs: Path | None) -> None:
    """A page in Markdown becomes one as a notebook: Sphinx shows what its cells print."""
    text = path.read_text("utf-8")
    if not _is_notebook(path):
        path.write_text(_switched(_relinked(text, path.parent, source), path, lang), "utf-8")
        return
    notebook = jupytext.reads(text, fmt="md")
    if outputs is not None:
        ran = nbformat.read(outputs / lang / f"{path.stem}.ipynb", as_version=4)
        if [cell.source for cell in ran.cells] != [cell.source for cell in notebook.cells]:
            raise SystemExit(f"{outputs / lang / path.stem}.ipynb is not a run of {path.stem}.md as it is now")
        notebook = ran
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _relinked(cell.source, path.parent, source)
        elif "tags" in cell.metadata:  # a solution is folded by the page itself: <details>
            cell.metadata["tags"] = [tag for tag in cell.metadata["tags"] if not tag.startswith("hide-")]
    notebook.cells[0].source = _switched(notebook.cells[0].source, path, lang)
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    path.unlink()


def _switched(text: str, path: Path, lang: str) -> str:
    """With a link to the other language below the title."""
    other, words = SWITCH[lang]
    if not (ROOT / "tutorials" / other / path.name).exists():
        return text
    address = f"../{other}/{path.stem}{'.ipynb' if _is_notebook(ROOT / 'tutorials' / other / path.name) else '.md'}"
    return re.sub(r"\A(\s*# .*)$", rf"\1\n\n[{words}]({address})", text, count=1, flags=re.MULTILINE)


def _is_notebook(path: Path) -> bool:
    """Whether a page in Markdown has Jupytext's header; others, such as a glossary, have nothing to run."""
    return path.is_file() and path.read_text("utf-8").startswith("---\n")


def _relinked(text: str, folder: Path, source: Path) -> str:
    """Links between pages, as they are in the project, made those between the site's."""

    def target(link: re.Match[str]) -> str:
        address = link[1]
        if re.match(r"\w+:", address):
            return address
        path = (folder / address).resolve()
        if not path.is_relative_to(source):
            return address  # Sphinx will say that it is missing
        if path.is_dir() and (ROOT / path.relative_to(source) / "README.md").exists():
            path /= "README.md"
        place = path.relative_to(source)
        if place.parts[0] == "minidist" and path.suffix == ".py" and path.stem != "__main__":
            path = source / "api" / f"{reference.module_name(place)}.rst"
        elif place == Path("README.md"):
            path = source / "index.md"
        elif path.suffix == ".md" and place.parts[0] != "tutorials":
            path = path.with_suffix(".txt")
        elif path.suffix == ".md" and _is_notebook(ROOT / place):
            path = path.with_suffix(".ipynb")
        return os.path.relpath(path, folder)

    pieces = FENCE.split(text)  # every second one is code, in which nothing is a link
    return "".join(piece if number % 2 else LINK.sub(target, piece) for number, piece in enumerate(pieces))


def cache_of(folder: Path) -> Path:
    """Where, within a folder, what pages print with this very minidist is kept; the rest of it is removed."""
    texts = b"".join(path.read_bytes() for path in sorted((ROOT / "minidist").rglob("*.py")))
    mine = folder / hashlib.sha256(texts).hexdigest()[:16]
    for other in folder.glob("[0-9a-f]" * 16):
        if other != mine:
            shutil.rmtree(other)
    return mine


def build(output: Path, run: bool, outputs: Path | None, cache: Path) -> int:
    """Make the site in `output`. Returns an exit status."""
    with tempfile.TemporaryDirectory(prefix="minidist-site-") as folder:
        source = Path(folder).resolve() / "source"
        source.mkdir()
        assemble(source, outputs)
        mode = "cache" if run and outputs is None else "off"
        settings = [f"nb_execution_mode={mode}", f"nb_execution_cache_path={cache_of(cache)}", "root_doc=index"]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        command = ["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(HERE), "-d", f"{folder}/doctrees"]
        for setting in settings:
            command += ["-D", setting]
        return sphinx([*command, str(source), str(output)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="the folder to make it in")
    parser.add_argument("--no-run", action="store_true", help="show the tutorials' code, and not what it prints")
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="notebooks that have run: DIR/en/NAME.ipynb, …")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minidist" / "site"
    parser.add_argument("--cache", type=Path, default=default, help="of what pages have printed (%(default)s)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    output = args.output.resolve()
    if output.exists() and any(output.iterdir()):
        if not (output / ".buildinfo").exists():  # Sphinx's mark
            parser.error(f"{output} is there, and holds no site")
        shutil.rmtree(output)  # what is left of an earlier one would be linked
    status = build(output, not args.no_run, args.outputs and args.outputs.resolve(), args.cache.resolve())
    wrong = links.broken(output)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    pages = sum(1 for _ in output.rglob("*.html"))
    print(f"{pages} pages in {time.perf_counter() - start:.0f} s, {len(wrong)} broken links: {output / 'index.html'}")
    sys.exit(status or bool(wrong))


if __name__ == "__main__":
    main()
