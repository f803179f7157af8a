"""Pairwise exchange: everybody has something for everybody, and hands it over in person, to one rank a step.

    P = 4 (a power of two): rank r and r xor step       P = 5: r sends to r + step, receives from r - step
    step 1    0 <> 1    2 <> 3                          step 1    0 -> 1 -> 2 -> 3 -> 4 -> 0
    step 2    0 <> 2    1 <> 3                          step 2    0 -> 2 -> 4 -> 1 -> 3 -> 0
    step 3    0 <> 3    1 <> 2                          step 3    0 -> 3 -> 1 -> 4 -> 2 -> 0
                                                        step 4    0 -> 4 -> 3 -> 2 -> 1 -> 0

In every step each rank sends to one rank and receives from one, so nobody waits for a port. Every byte travels once:
the best there is for long messages. For short ones the P - 1 steps cost more than Bruck's lg P (see bruck.py).
Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH",
sections 4.3 (all-to-all) and 4.4 (reduce-scatter).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction


def partners(rank: int, size: int) -> Iterator[tuple[int, int]]:
    """(whom to send to, whom to receive from) in each of the size - 1 steps."""
    for step in range(1, size):
        if size & (size - 1) == 0:
            yield rank ^ step, rank ^ step
        else:
            yield (rank + step) % size, (rank - step) % size


def pairwise_all_to_all(comm: Lane, chunks: Chunks, out: Chunks) -> Steps:
    """Chunk j goes to rank j; chunk i of `out` comes from rank i. They may be of any sizes.

    Cost    P - 1 messages, about (P-1)/P n bytes, sent per rank
    """
    out[comm.rank][...] = chunks[comm.rank]
    for dest, source in partners(comm.rank, comm.size):
        receive = comm.irecv(out[source], source)
        comm.isend(chunks[dest], dest)
        yield receive
    yield from comm.sent()


def pairwise_reduce_scatter(comm: Lane, chunks: Chunks, reduction: Reduction) -> Steps:
    """Chunk `rank` ends with the sum over all ranks; the other chunks stay as they are.

    dtype   kept; accumulates in it. Chunk r adds in the order r, r xor 1, r xor 2, ... for P a power of two, else
            r, r - 1, r - 2, ...
    Cost    P - 1 messages, about (P-1)/P n bytes, sent per rank
    """
    # Invariant: after each step our chunk is the sum over the ranks met so far; theirs, which we send, never change.
    for dest, source in partners(comm.rank, comm.size):
        comm.send_partial(chunks[dest], dest)
        yield from comm.fold_partial(chunks[comm.rank], source, reduction)
    yield from comm.sent()
    reduction.finish(chunks[comm.rank], comm.size)


def pairwise_all_to_all_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (a + n/P b)"""
    return (P - 1) * (a + n / P * b)


def pairwise_reduce_scatter_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) a + n (P-1)/P (b + g)"""
    return (P - 1) * a + n * (P - 1) / P * (b + g)
