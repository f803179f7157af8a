"""A barrier by dissemination: in round k each rank tells the one 2^k further on that it, and all it knows of, are here.

    P = 5     round 1: rank r tells r + 1      round 2: r + 2      round 3: r + 4
    rank 0 knows of    4                       3, 2                (all)

After ceil(lg P) rounds everyone has heard of everyone, for any number of ranks and without a root.
Source: Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization".
"""

from __future__ import annotations

import numpy as np

from ..comm.handle import Steps
from .lane import Lane


def dissemination_barrier(comm: Lane) -> Steps:
    """Done when every rank has called it. ceil(lg P) empty messages sent per rank."""
    nothing = np.empty(0, np.uint8)
    distance = 1
    # Invariant: before each round, this rank knows that the `distance` ranks up to and including it are here.
    while distance < comm.size:
        comm.isend(nothing, (comm.rank + distance) % comm.size)
        yield comm.irecv(nothing, (comm.rank - distance) % comm.size)
        distance *= 2
    yield from comm.sent()


def dissemination_barrier_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) a"""
    return (P - 1).bit_length() * a
