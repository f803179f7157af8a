"""The plain versions: everything goes through one rank. Easy to believe, and the reference for the clever ones.

The root sends and receives (P-1) n bytes alone, while the others wait: time grows with the number of ranks.
"""

from __future__ import annotations

from ..backend import Array, namespace
from ..comm.base import Communicator
from .chunks import split
from .reductions import combiner, finish

TAG = 32002
ROOT = 0


def naive_broadcast(comm: Communicator, array: Array, root: int = ROOT) -> Array:
    """The root sends its array to each other rank in turn. In place; returns array. P - 1 messages of n bytes."""
    if comm.rank == root:
        for rank in range(comm.size):
            if rank != root:
                comm.send(array, rank, TAG)
    else:
        comm.recv(array, root, TAG)
    return array


def naive_all_reduce(comm: Communicator, array: Array, op: str = "sum") -> Array:
    """Reduce over all ranks; every rank ends with the whole result. In place; returns array.

    Shapes  array (any, contiguous), equal on all ranks
    dtype   kept; accumulates in it, in the order of ranks
    Cost    the root receives and sends P - 1 messages of array.nbytes
    """
    combine = combiner(op, array)

    # 1. The root receives each rank's array and folds it into its own.
    if comm.rank == ROOT:
        theirs = namespace(array).empty_like(array)
        for rank in range(1, comm.size):
            comm.recv(theirs, rank, TAG)
            combine(array, theirs)
        finish(op, array, comm.size)
    else:
        comm.send(array, ROOT, TAG)

    # 2. It sends the result to all.
    return naive_broadcast(comm, array)


def naive_reduce_scatter(comm: Communicator, array: Array, op: str = "sum") -> Array:
    """Reduce over all ranks; return this rank's chunk (a view). It does a whole all-reduce, and uses a part of it."""
    naive_all_reduce(comm, array, op)
    return split(array, comm.size)[comm.rank]


def naive_all_gather(comm: Communicator, array: Array) -> Array:
    """Every rank gives its chunk of the array; all end with all chunks. In place; returns array.

    Cost    the root receives P - 1 chunks and sends P - 1 whole arrays
    """
    chunks = split(array, comm.size)
    # 1. The root receives each rank's chunk, where it belongs.
    if comm.rank == ROOT:
        for rank in range(1, comm.size):
            comm.recv(chunks[rank], rank, TAG)
    else:
        comm.send(chunks[comm.rank], ROOT, TAG)
    # 2. It sends all of them to all.
    return naive_broadcast(comm, array)
