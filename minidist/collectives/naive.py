"""The plain versions: everything goes through one rank. Easy to believe, and the reference for the clever ones.

    all-reduce      1 -> 0,  2 -> 0,  3 -> 0      the root receives each array and adds it to its own
                    0 -> 1,  0 -> 2,  0 -> 3      and sends the result to each

The root sends and receives (P-1) n bytes alone, while the others wait: time grows with the number of ranks.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction

ROOT = 0


def naive_reduce(comm: Lane, array: Array, reduction: Reduction, root: int = ROOT) -> Steps:
    """The root ends with the sum over all ranks; the others' arrays stay as they are.

    dtype   kept; accumulates in it: the root's own first, then the others in order
    Cost    the root receives P - 1 messages of n bytes
    """
    if comm.rank != root:
        comm.isend(array, root)
    else:
        theirs = comm.scratch_like(array)
        for rank in range(comm.size):
            if rank != root:
                yield comm.irecv(theirs, rank)
                comm.combine(array, theirs, reduction)
        comm.give_back(theirs)
        reduction.finish(array, comm.size)
    yield from comm.sent()


def naive_broadcast(comm: Lane, array: Array, root: int = ROOT) -> Steps:
    """The root sends its array to each other rank. P - 1 messages of n bytes."""
    if comm.rank != root:
        yield comm.irecv(array, root)
    else:
        for rank in range(comm.size):
            if rank != root:
                comm.isend(array, rank)
    yield from comm.sent()


def naive_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """The one, then the other. Cost: the root receives and sends P - 1 messages of n bytes."""
    yield from naive_reduce(comm, array, reduction)
    yield from naive_broadcast(comm, array)


def naive_reduce_scatter(comm: Lane, chunks: Chunks, reduction: Reduction) -> Steps:
    """A whole all-reduce, of which each rank uses a part."""
    yield from naive_all_reduce(comm, chunks.flat, reduction)


def naive_all_gather(comm: Lane, chunks: Chunks) -> Steps:
    """The root receives each rank's chunk, where it belongs, and sends the whole to all."""
    if comm.rank != ROOT:
        comm.isend(chunks[comm.rank], ROOT)
    else:
        for rank in range(1, comm.size):
            yield comm.irecv(chunks[rank], rank)
    yield from comm.sent()
    yield from naive_broadcast(comm, chunks.flat)


def naive_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (a + n b + n g)"""
    return (P - 1) * (a + n * b + n * g)


def naive_broadcast_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (a + n b)"""
    return (P - 1) * (a + n * b)


def naive_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (2 a + 2 n b + n g)"""
    return naive_reduce_cost(P, n, a, b, g) + naive_broadcast_cost(P, n, a, b, g)


def naive_all_gather_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (2 a + n/P b + n b)"""
    return (P - 1) * (a + n / P * b) + naive_broadcast_cost(P, n, a, b, g)
