"""The ring: every rank talks to its two neighbours only, and each sends about the same, however many ranks there are.

    rank 0 -> rank 1 -> rank 2 -> ... -> rank P-1 -> rank 0

The array is cut into P chunks. In the first half (reduce-scatter) partial sums travel round the ring and grow until
rank r holds the finished chunk r; in the second (all-gather) the finished chunks travel once round. For P = 3, the
chunk that each rank gets from its left, with ' where it then holds the sum of two ranks, " of all three:

               reduce-scatter       all-gather
    step        1       2            1       2
    rank 0      1'      0"           2"      1"
    rank 1      2'      1"           0"      2"
    rank 2      0'      2"           1"      0"

Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction


def ring_reduce_scatter(comm: Lane, chunks: Chunks, reduction: Reduction) -> Steps:
    """Chunk `rank` ends with the sum over all ranks; the other chunks are left holding partial sums.

    dtype   kept; accumulates in it.   Chunk i adds in the order i+1, i+2, ..., i
    Cost    P - 1 messages, about (P-1)/P n bytes, sent per rank
    """
    size, rank = comm.size, comm.rank
    right, left = (rank + 1) % size, (rank - 1) % size

    # 1. P - 1 times, pass a partial sum to the right and fold the one from the left into our own share.
    #    Invariant: after step s, chunk (rank - s - 1) here is the sum over ranks rank - s - 1 ... rank.
    for step in range(1, size):
        comm.send_partial(chunks[(rank - step) % size], right)
        yield from comm.fold_partial(chunks[(rank - step - 1) % size], left, reduction)

    # 2. The last one folded is our own, complete. Nothing sent was changed above, so sends are only waited for here.
    yield from comm.sent()
    reduction.finish(chunks[rank], size)


def ring_all_gather(comm: Lane, chunks: Chunks) -> Steps:
    """Every rank gives chunk `rank`; all end with all chunks.

    Cost    P - 1 messages, about (P-1)/P n bytes, sent per rank
    """
    size, rank = comm.size, comm.rank
    right, left = (rank + 1) % size, (rank - 1) % size

    # P - 1 times, pass on the chunk that came last (at first our own).
    # Invariant: after step s, chunks rank, rank - 1, ..., rank - s are finished here.
    for step in range(1, size):
        comm.isend(chunks[(rank - step + 1) % size], right)
        yield comm.irecv(chunks[(rank - step) % size], left)
    yield from comm.sent()


def ring_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """The one half, then the other. All ranks get the same bits, since each chunk is computed by one of them."""
    chunks = Chunks(array, comm.size)
    yield from ring_reduce_scatter(comm, chunks, reduction)
    yield from ring_all_gather(comm, chunks)


def ring_reduce_scatter_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) a + n (P-1)/P (b + g)"""
    return (P - 1) * a + n * (P - 1) / P * (b + g)


def ring_all_gather_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) a + n (P-1)/P b"""
    return (P - 1) * a + n * (P - 1) / P * b


def ring_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """2 (P-1) a + 2 n (P-1)/P b + n (P-1)/P g"""
    return ring_reduce_scatter_cost(P, n, a, b, g) + ring_all_gather_cost(P, n, a, b, g)
