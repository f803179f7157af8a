"""A barrier by dissemination: in round k each rank tells the one 2^k further on that it, and all it knows of, are here.

After ceil(lg P) rounds everyone has heard of everyone, for any number of ranks and without a root.
Source: Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization".
"""

from __future__ import annotations

import numpy as np

from ..comm.base import Communicator

TAG = 32004


def dissemination_barrier(comm: Communicator) -> None:
    """Return when every rank has called it. Cost: ceil(lg P) empty messages sent per rank."""
    nothing = np.empty(0, np.uint8)
    distance = 1
    # Invariant: before each round, this rank knows that the `distance` ranks up to and including it are here.
    while distance < comm.size:
        comm.sendrecv(nothing, (comm.rank + distance) % comm.size, nothing, (comm.rank - distance) % comm.size, TAG)
        distance *= 2
