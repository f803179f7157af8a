"""What the benchmarks share: the machine in words, a figure with its spread, and mpirun with a deadline."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
RESULTS = Path(__file__).parent / "results"


def machine(**packages: str) -> str:
    """The processor, the versions, the commit and the day, in a line.

    `packages` maps what to call a package to its name: machine(PyTorch="torch"). One that is absent is left out.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    commit = commit or "unknown"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = [f"Python {platform.python_version()}"]
    for called, name in {"NumPy": "numpy", **packages}.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{called} {importlib.metadata.version(name)}")
    return f"{model}, {os.cpu_count()} cores; {', '.join(versions)}; commit {commit}; {time.strftime('%Y-%m-%d')}"


def spread(values: list[float], form: str) -> str:
    """Median (smallest – largest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def find_mpirun(python: str = sys.executable) -> str | None:
    """The mpirun beside a Python, that is of its environment; else the first on the PATH."""
    return shutil.which("mpirun", path=str(Path(python).parent)) or shutil.which("mpirun")


def end(number: int, frame: object) -> None:
    """A signal's handler: end as by an exception, so that what was begun is cleaned up."""
    raise SystemExit(128 + number)


def run_ranks(ranks: int, command: list[str], deadline: float, python: str = sys.executable) -> None:
    """`mpirun -n ranks python *command` in the environment of `python`; ends the program if it fails or is too late.

    The ranks end with this program, also when SIGTERM or SIGHUP ends it.
    """
    mpirun = find_mpirun(python)
    if mpirun is None:
        raise SystemExit("there is no mpirun beside python or on the PATH: pip install 'minidist[mpi]'")
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60).stdout
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    asked = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    process = subprocess.Popen(
        [mpirun, *asked, "-n", str(ranks), python, *command],
        env={**os.environ, **ONE_THREAD},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(deadline)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{ranks} ranks were not done after {deadline:g} s") from None
    finally:
        stop_group(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        raise SystemExit(f"{ranks} ranks ended with status {status}")


def report_of_ranks(ranks: int, command: list[str], deadline: float, python: str = sys.executable) -> Any:
    """run_ranks with `--report FILE` behind the command, and what one of the ranks wrote there, in JSON."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run_ranks(ranks, [*command, "--report", str(report)], deadline, python)
        return json.loads(report.read_text())


def stop_group(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own, and the processes it has started there."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # mpirun ends its ranks, which may be in other groups
            return
