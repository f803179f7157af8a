"""Broadcast as a scatter and an all-gather: no rank sends more than two arrays' worth, however many there are.

    P = 4, root 0, what each rank has of the array's chunks

                              rank 0     rank 1     rank 2     rank 3
    at first                  0 1 2 3    -          -          -
    scatter    after 0 -> 2   0 1 2 3    -          2 3        -
               after 0 -> 1   0 1 2 3    1          2 3        3          and 2 -> 3
    all-gather, step 1        0 1 2 3    0 1        1 2 3      2 3        everyone to the right, chunk `rank`
                step 2        0 1 2 3    0 1 3      0 1 2 3    1 2 3
                step 3        0 1 2 3    0 1 2 3    0 1 2 3    0 1 2 3

The binomial tree's broadcast sends n bytes in each of its lg P rounds, one after the other. For a long array this takes
2 n b however many ranks there are. (Some ranks are sent chunks that they have already; the ring does not look.)
Source: Barnett, Shuler, van de Geijn, Gupta, Payne & Watts 1994, "Interprocessor collective communication library
(InterCom)"; Thakur, Rabenseifner & Gropp 2005, section 4.2.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .binomial import binomial_scatter_cost, binomial_scatter_in_place
from .chunks import Chunks
from .lane import Lane
from .ring import ring_all_gather, ring_all_gather_cost


def scatter_all_gather_broadcast(comm: Lane, array: Array, root: int = 0) -> Steps:
    """Every rank ends with the root's array. At most ceil(lg P) + P - 1 messages, 2 n (P-1)/P bytes, sent per rank."""
    if not getattr(array.flags, "writeable", True):  # the ring will write to it what it has already
        array = array.copy()
    chunks = Chunks(array, comm.size)
    yield from binomial_scatter_in_place(comm, chunks, root)
    yield from ring_all_gather(comm, chunks)


def scatter_all_gather_broadcast_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(ceil(lg P) + P - 1) a + 2 n (P-1)/P b"""
    return binomial_scatter_cost(P, n, a, b, g) + ring_all_gather_cost(P, n, a, b, g)
