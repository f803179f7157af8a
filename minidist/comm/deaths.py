"""Who has died: what MPI tells of ranks that were killed, and what a rank does that waits for one of them.

Most launchers end a job when one of its processes dies. Open MPI's does not if it was started as
`mpirun --with-ft ulfm` (User-Level Failure Mitigation, in the MPI standard from 5.0 on): then a survivor learns of a
death within some 10 ms, operations that need the dead rank fail, and everything else works as before. From then on

    what needs the dead rank      raises PeerFailed: sends, receives, collectives, a look for its messages
    a look for anyone's message   goes on, among the living; whether what the dead rank sent last is still found, or
                                  lost with it, is chance
    if nobody catches it          PeerFailed ends the job, as any exception does (see endings.py)

What ULFM calls acknowledging, revoking and so on is in this file, in notes.py and in survival.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

ULFM = "Open MPI's `mpirun --with-ft ulfm`"


class PeerEnded(RuntimeError):
    """A rank waits for another whose program has ended."""


class PeerFailed(PeerEnded):
    """A rank needs another that has died. `rank`: its number in the world; None: MPI does not say who."""

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


def launched_to_survive() -> bool:
    """Whether mpirun was told to let the job outlive its ranks: Open MPI's leaves this in the environment."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "0") in ("1", "true")  # noqa: SIM112


@contextlib.contextmanager
def python_finalizes_mpi(wish: bool) -> Iterator[bool]:
    """Inside of the `with`, import mpi4py's MPI: whether Python will call MPI_Finalize at its end, as mpi4py has it do.

    It will in spite of another `wish` if the program has imported that module already.
    """
    if wish or "mpi4py.MPI" in sys.modules:
        yield True
        return
    os.environ["MPI4PY_RC_FINALIZE"] = "0"
    try:
        yield False
    finally:
        del os.environ["MPI4PY_RC_FINALIZE"]


class Deaths:
    """The ranks of the world that are known to be dead. `mpi` is the mpi4py.MPI module."""

    def __init__(self, mpi: Any, survives: bool):
        self.mpi = mpi
        self.survives = survives  # whether this job outlives them; else nobody is ever known to be dead
        self.known: frozenset[int] = frozenset()  # at the last look

    def look(self) -> frozenset[int]:
        """World ranks. Takes less than a microsecond."""
        if self.survives:
            world = self.mpi.COMM_WORLD
            group = world.Get_failed()
            if group.size != len(self.known):
                self.known = frozenset(self.mpi.Group.Translate_ranks(group, range(group.size), world.group))
            if group.size:
                group.Free()
        return self.known

    def are_told_by(self, error: Exception) -> bool:
        """Whether an error of MPI's means that a rank has died."""
        if not self.survives or not isinstance(error, self.mpi.Exception):
            return False
        return error.Get_error_class() in (self.mpi.ERR_PROC_FAILED, self.mpi.ERR_PROC_FAILED_PENDING)

    def iprobe(self, comm: Any, source: int, tag: int, status: Any) -> bool:
        """`comm.Iprobe`, but a death that concerns nobody in particular does not end it."""
        while True:
            try:
                return comm.Iprobe(source, tag, status)
            except self.mpi.Exception as error:
                if source != self.mpi.ANY_SOURCE or not self.are_told_by(error):
                    raise
                comm.Ack_failed()  # looks for anyone's messages work again, until the next death

    def drop(self, comm: Any, source: int, tag: int) -> None:
        """Forget a message from a dead rank: MPI still shows it, but refuses to receive it."""
        comm.Improbe(source, tag)


class Epitaph:
    """A line on standard error if this process is killed; for a job that does not outlive its ranks.

    A launcher that ends such a job kills the other ranks as well (MPICH's by SIGKILL, which nobody can catch). So a
    child process waits: at the end of its standard input it writes the line, unless it has been told that all is over.
    """

    _child: subprocess.Popen[bytes] | None = None

    def __init__(self, mpi: Any):
        library, version = mpi.get_vendor()
        self.line = line = (
            "minidist: the launcher has ended this job. If that is because a rank has died: this MPI, "
            f"{library} {'.'.join(map(str, version))}, started as it was, ends the others then; {ULFM} lets them go on."
        )
        shell = shutil.which("sh")
        if shell is None:  # on Windows: say it in advance
            print(line.replace("has ended", "may end").replace("has died", "dies"), file=sys.stderr, flush=True)
            return
        # In a session of its own, where a launcher's signals to the ranks and their children do not reach it.
        self._child = subprocess.Popen(
            [shell, "-c", 'read -r over || printf "\\n%s\\n" "$0" >&2', line],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def cancel(self) -> None:
        """The job ends in another way."""
        if self._child is None:
            return
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._child.communicate(b"over\n", timeout=1.0)
