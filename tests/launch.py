"""Starting mpirun from a test, with a deadline."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ranks import UNDER_MPIRUN

ROOT = Path(__file__).parent.parent


@cache
def mpirun() -> str | None:
    """The mpirun of this Python's environment, else the first on the PATH."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


@cache
def why_no_mpi() -> str:
    """Why mpirun cannot be started here; empty if it can."""
    if UNDER_MPIRUN:
        return "already running under mpirun"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install 'minidist[mpi]'"
    if mpirun() is None:
        return "there is no mpirun beside python or on the PATH: pip install 'minidist[mpi]'"
    return ""


needs_mpi = pytest.mark.skipif(bool(why_no_mpi()), reason=why_no_mpi())


OPEN_MPI = ["--allow-run-as-root", "--oversubscribe"]  # it wants to be asked for more ranks than there are cores


@cache
def is_open_mpi() -> bool:
    """Whether the mpirun of this environment is Open MPI's."""
    return (
        "Open MPI" in subprocess.run([mpirun() or "", "--version"], capture_output=True, text=True, timeout=60).stdout
    )


def run_ranks(
    size: int,
    *arguments: str,
    deadline: float,
    env: dict[str, str] | None = None,
    start: list[str] | None = None,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """`mpirun -n size python *arguments`; what it printed and its status. Fails if it is not over by the deadline.

    `start`: another launcher and its options.
    """
    start = start or [mpirun() or "", *(OPEN_MPI if is_open_mpi() else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*start, "-n", str(size), python, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{size} ranks of {arguments} were not over after {deadline:g} s\n{out}\n{err}", pytrace=False)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
