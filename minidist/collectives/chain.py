"""Broadcast down a chain: the array goes from rank to rank in segments, and all links are busy at once.

    P = 4, 3 segments: which segment each link carries

    time        1   2   3   4   5
    0 -> 1      0   1   2
    1 -> 2          0   1   2
    2 -> 3              0   1   2

The first segment needs P - 1 hops, and the others follow it at once: P - 2 + k times a segment's time, for k of them.
With many segments that is little more than the n b that sending an array once takes, however many ranks there are.

How many? The time is least for k = sqrt((P-2) n b / a). An algorithm does not know a and b: this one takes a/b to be
16 KiB (to start a message costs as much as 16 KiB of it), and the power of two that is next to that k; more, where the
communicator's `segment` allows only shorter ones.
Source: the pipelined broadcast of van de Geijn & Watts 1997, "SUMMA: scalable universal matrix multiplication
algorithm".
"""

from __future__ import annotations

import math

from ..backend import Array
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane

LATENCY_BYTES = 1 << 14  # a/b: how many bytes travel in the time that a message takes to start


def chain_broadcast(comm: Lane, array: Array, root: int = 0) -> Steps:
    """Every rank ends with the root's array. All but the last rank of the chain send n bytes, in k messages.

    The segments differ by one element at most.
    """
    # 1. Our neighbours in the chain, which begins with the root.
    size, rank = comm.size, comm.rank
    before = None if rank == root else (rank - 1) % size
    after = None if (rank + 1) % size == root else (rank + 1) % size
    count = min(segments(size, array.nbytes, comm.comm.segment), max(1, array.size))
    pieces = Chunks(array, count)

    # 2. Ask for all segments, and pass each on when it has come.
    receives = [] if before is None else [comm.irecv(pieces[i], before) for i in range(count)]
    for i in range(count):
        if before is not None:
            yield receives[i]
        if after is not None:
            comm.isend(pieces[i], after)
    yield from comm.sent()


def segments(P: int, n: int, longest: float = math.inf) -> int:
    """How many segments n bytes are cut into, where they may have `longest` bytes at most."""
    best = math.sqrt(max(0, P - 2) * n / LATENCY_BYTES)
    return max(2 ** round(math.log2(max(1.0, best))), math.ceil(n / longest))


def chain_broadcast_cost(P: int, n: int, a: float, b: float, g: float, longest: float = math.inf) -> float:
    """(P - 2 + k) (a + n/k b) for k segments; nothing for one rank alone"""
    k = segments(P, n, longest)
    return (P - 2 + k) * (a + n / k * b) if P > 1 else 0.0
