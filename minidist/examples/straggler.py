"""A rank that runs slower than the others, to see what a strategy does about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minidist.comm import Communicator


def straggler_of(text: str) -> tuple[int, float]:
    """ "2:3.0": rank 2, three times slower. Errors  ValueError: it is no such pair"""
    rank, _, factor = text.partition(":")
    try:
        found = int(rank), float(factor)
    except ValueError:
        found = -1, 0.0
    if found[0] < 0 or not 1 <= found[1] < float("inf"):
        raise ValueError(f"straggler {text!r}: expected RANK:FACTOR, say 2:3.0 for a rank that is three times slower")
    return found


class Straggler:
    """`with straggler.computing(waited):` takes `factor` times as long on that rank, less what it waits for others.

    The rest is slept, so a slow rank leaves its core to others. (A slow computer would not, but it has its own.)
    """

    def __init__(self, given: str | None, comm: Communicator):
        rank, factor = straggler_of(given) if given else (-1, 1.0)
        self.comm, self.factor = comm, factor if comm.rank == rank else 1.0

    @contextmanager
    def computing(self, waited: Callable[[], float]) -> Iterator[None]:
        """`waited()`: seconds in which the rank has waited so far."""
        start = self.comm.clock() - waited()
        yield
        if self.factor > 1:
            seconds = (self.factor - 1) * (self.comm.clock() - waited() - start)
            self.comm.elapse(seconds)  # virtual time, on simulated ranks
            if self.comm.network is None:
                time.sleep(seconds)
