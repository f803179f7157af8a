"""The MPI library's own collectives, as one more algorithm of each operation: the yardstick for all the others.

    all_reduce(comm, array, "sum", "mpi")       # MPI_Iallreduce, and then MPI_Test until it is done

What it does inside is the library's secret: MPICH and Open MPI choose among the algorithms of this directory by size
and number of ranks, and use the shared memory of a host directly. So it has no drawing and no formula.

The calls are MPI's non-blocking ones, on arrays with MPI's own dtypes. A wait for them has a deadline, as all waits,
and others in flight go on meanwhile. Simulated ranks have no library; and it knows fewer dtypes and ops than NumPy.
All that is refused at the call (see Communicator.native): none of these functions is itself a generator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..backend import Array, copy_into
from ..comm.base import Communicator, Request
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction


def check(comm: Communicator, array: Array, op: str | None) -> None:
    """Refuse what the library cannot do."""
    comm.native(array, op)


def _steps(start: Callable[[], Request], finish: Callable[[], None] = lambda: None) -> Steps:
    """Start it, wait for it, finish its result."""
    yield start()
    finish()


def _sizes(chunks: Chunks) -> list[int]:
    return [chunks.start(index + 1) - chunks.start(index) for index in range(len(chunks))]


def mpi_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """MPI_Iallreduce."""
    native = comm.comm.native(array, reduction.op)
    return _steps(lambda: native.all_reduce(array), lambda: reduction.finish(array, comm.size))


def mpi_reduce_scatter(comm: Lane, chunks: Chunks, reduction: Reduction) -> Steps:
    """MPI_Ireduce_scatter, which needs other memory for the result; that is copied."""
    native, mine = comm.comm.native(chunks.flat, reduction.op), chunks[comm.rank]
    result = comm.scratch_like(mine)

    def finish() -> None:
        reduction.finish(result, comm.size)
        copy_into(mine, result)
        comm.give_back(result)

    return _steps(lambda: native.reduce_scatter(chunks.flat, result, _sizes(chunks)), finish)


def mpi_all_gather(comm: Lane, chunks: Chunks) -> Steps:
    """MPI_Iallgatherv."""
    native = comm.comm.native(chunks.flat)
    return _steps(lambda: native.all_gather(chunks.flat, _sizes(chunks)))


def mpi_broadcast(comm: Lane, array: Array, root: int) -> Steps:
    """MPI_Ibcast."""
    native = comm.comm.native(array)
    return _steps(lambda: native.broadcast(array, root))


def mpi_reduce(comm: Lane, array: Array, reduction: Reduction, root: int) -> Steps:
    """MPI_Ireduce."""
    native = comm.comm.native(array, reduction.op)

    def finish() -> None:
        if comm.rank == root:
            reduction.finish(array, comm.size)

    return _steps(lambda: native.reduce(array, root), finish)


def mpi_scatter(comm: Lane, chunks: Chunks, out: Array, root: int) -> Steps:
    """MPI_Iscatterv."""
    native = comm.comm.native(out)
    return _steps(lambda: native.scatter(chunks.flat, _sizes(chunks), out, root))


def mpi_gather(comm: Lane, chunks: Chunks, array: Array, root: int) -> Steps:
    """MPI_Igatherv."""
    native = comm.comm.native(array)
    return _steps(lambda: native.gather(array, chunks.flat, _sizes(chunks), root))


def mpi_all_to_all(comm: Lane, chunks: Chunks, out: Chunks) -> Steps:
    """MPI_Ialltoallv."""
    native = comm.comm.native(chunks.flat)
    return _steps(lambda: native.all_to_all(chunks.flat, _sizes(chunks), out.flat, _sizes(out)))


def mpi_scan(comm: Lane, array: Array, reduction: Reduction, exclusive: bool) -> Steps:
    """MPI_Iscan or MPI_Iexscan, which leaves rank 0 nothing."""
    native, result = comm.comm.native(array, reduction.op), comm.scratch_like(array)

    def finish() -> None:
        ranks = comm.rank if exclusive else comm.rank + 1
        if ranks:
            copy_into(array, result)
            reduction.finish(array, ranks)
        comm.give_back(result)

    return _steps(lambda: native.scan(array, result, exclusive), finish)


def mpi_barrier(comm: Lane) -> Steps:
    """MPI_Ibarrier."""
    native = comm.comm.native(np.empty(0, np.uint8))
    return _steps(native.barrier)
