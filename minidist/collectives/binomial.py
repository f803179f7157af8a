"""Broadcast along a binomial tree: who has the array passes it on, so that the number who have it doubles each round.

    round 1   0 -> 4
    round 2   0 -> 2   4 -> 6
    round 3   0 -> 1   2 -> 3   4 -> 5   6 -> 7        (P = 8, root 0)

Cost: lg P rounds, rounded up, of a + n b each, where the ring's chain of P - 1 would make the last rank wait longest.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .lane import Lane


def binomial_broadcast(comm: Lane, array: Array, root: int = 0) -> Steps:
    """Every rank ends with the root's array. P - 1 messages in all, of n bytes; at most ceil(lg P) sent by any rank."""
    size = comm.size
    me = (comm.rank - root) % size  # number the ranks from the root on, so that the root is 0

    # 1. Receive from the rank whose number is ours without its lowest set bit. The root has no such bit.
    bit = 1
    while bit < size and not me & bit:
        bit *= 2
    if me:
        yield comm.irecv(array, (me - bit + root) % size)

    # 2. Pass it on to those who differ from us in one lower bit, the farthest first: it has the most to pass on.
    while bit > 1:
        bit //= 2
        if me + bit < size:
            comm.isend(array, (me + bit + root) % size)
    yield from comm.sent()


def binomial_broadcast_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) (a + n b)"""
    return (P - 1).bit_length() * (a + n * b)
