"""Clocks of several hosts, compared: how much to add to a rank's clock to get rank 0's."""

from __future__ import annotations

import numpy as np

from ..comm import Communicator

ROUNDS = 16  # questions to each rank; the one that was answered soonest counts
TAG = 0


def offset_to_first(comm: Communicator) -> float:
    """Seconds to add to this rank's `comm.clock()` to have rank 0's. Every rank calls it; nobody else uses tag 0 then.

    Rank 0 asks a rank what time it is. If the answer took r seconds, the clock was read some time within them; taken to
    be in their middle, it is wrong by no more than r/2. Of several questions the one with the least r is taken. Ranks
    on rank 0's host have its clock; simulated ones all have one.

    Cost    2 ROUNDS messages of 8 bytes for each rank on another host, one rank after the other
    Source  Cristian 1989, Probabilistic clock synchronization
    """
    if comm.virtual:
        return 0.0
    hosts = comm.hosts()
    mine = np.zeros(1)
    for rank in (rank for rank in range(comm.size) if hosts[rank] != hosts[0]):
        if comm.rank == 0:
            best, found = np.inf, 0.0
            for _ in range(ROUNDS):
                asked = comm.clock()
                comm.send(mine, rank, TAG)
                theirs = comm.recv(np.empty(1), rank, TAG)[0]
                took = comm.clock() - asked
                if took < best:
                    best, found = took, asked + took / 2 - theirs
            comm.send(np.array([found]), rank, TAG)
        elif comm.rank == rank:
            for _ in range(ROUNDS):
                comm.recv(np.empty(1), 0, TAG)
                comm.send(np.array([comm.clock()]), 0, TAG)
            mine = comm.recv(np.empty(1), 0, TAG)
    return float(mine[0]) if comm.rank else 0.0
