"""Scatter and gather without detours: the root talks to every other rank itself.

    scatter   0 -> 1   0 -> 2   0 -> 3          (P = 4, root 0)
    gather    1 -> 0   2 -> 0   3 -> 0

Every byte travels once and nobody needs memory for what is not his own, where a tree's inner ranks pass others' chunks
on; but the root starts or ends P - 1 messages, the tree's ceil(lg P).
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane


def linear_scatter(comm: Lane, chunks: Chunks, out: Array, root: int = 0) -> Steps:
    """`out` ends as chunk `rank` of the root. The root sends P - 1 messages, (P-1)/P n bytes."""
    if comm.rank != root:
        yield comm.irecv(out, root)
        return
    for rank in range(comm.size):
        if rank != root:
            comm.isend(chunks[rank], rank)
    yield from comm.sent()
    out[...] = chunks[root]


def linear_gather(comm: Lane, chunks: Chunks, array: Array, root: int = 0) -> Steps:
    """Chunk r of the root ends as rank r's array. The root receives P - 1 messages, (P-1)/P n bytes."""
    if comm.rank != root:
        comm.isend(array, root)
        yield from comm.sent()
        return
    chunks[root][...] = array
    yield from [comm.irecv(chunks[rank], rank) for rank in range(comm.size) if rank != root]


def linear_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) a + n (P-1)/P b"""
    return (P - 1) * a + n * (P - 1) / P * b
