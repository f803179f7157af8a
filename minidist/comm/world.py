"""`world()`: the same call opens the right communicator under mpirun, in a simulated rank, and without either."""

from __future__ import annotations

import os
from functools import cache

from .base import Communicator
from .deaths import launched_to_survive, python_finalizes_mpi
from .simulated import alone, current_world

# How launchers tell a process that it is one of several: (its number, how many there are).
LAUNCHERS = (
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, and Slurm's srun --mpi=pmi2
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH
    ("PMIX_RANK", "SLURM_NTASKS"),  # srun --mpi=pmix
)


def launched() -> tuple[int, int] | None:
    """(rank, size) that a launcher such as mpirun gave this process; None if none started it."""
    for rank, size in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def world() -> Communicator:
    """The communicator of all ranks: MPI's under mpirun, a simulated rank's own, or else one of size 1.

    The same object on every call. Under mpirun the first call opens MPI, must be made by every rank, and makes an
    exception or exit of any rank end the job (see endings.py); where MPI cannot be opened the program ends with one
    line that says what to do.
    """
    return current_world.get(None) or _world_of_this_process()


@cache
def _world_of_this_process() -> Communicator:
    place = launched()
    if place is None:
        return alone()
    rank, size = place
    survives = launched_to_survive()
    try:
        with python_finalizes_mpi(not survives) as finalizes:
            from .mpi import library, open_world
    except ImportError as error:
        _give_up(rank, f"started by mpirun, but mpi4py cannot be imported ({error}): pip install 'minidist[mpi]'")
    comm = open_world(survives, finalizes)
    if comm.size != size:
        _give_up(
            rank,
            f"mpirun started {size} ranks, but mpi4py's MPI ({library()}) sees {comm.size}: "
            "mpirun and mpi4py belong to different MPI installations; use the mpirun of mpi4py's",
        )
    return comm


def _give_up(rank: int, message: str) -> None:
    """End the program; of all ranks only the first says why."""
    raise SystemExit(message if rank == 0 else 1)
