"""How a rank waits over MPI: a loop in Python around a non-blocking test, so that signals and deadlines are seen.

The rule: test a few times, then give way; at first by yielding the core, after a millisecond by sleeping for a small
part of the time already waited. Measured on two cores with MPICH 5.0 (medians, ms); a step is 12 ms of matmul and a
ring all-reduce of 814,090 float32 by 4 ranks, MPI's own is MPI_Allreduce in place:

    4 ranks, a step                     this rule 15.2, MPI's own 15.2; yielding only 15.0, sleeping only 17.4,
                                        neither 56 (who spins keeps the core from the one it waits for)
    with a busy process on each core    yielding for 0.2 ms 28, for 1 ms 33, only yielding 32; MPI's own 26
    three ranks wait long for a fourth  its matmul takes 0.93 s if they yield (the kernel counts them as busy), 0.47 s
                                        if they sleep
    where MPI may not read another      the ring alone, by 16 tests a turn 3.5, by one test 18, MPI's own 3.7: messages
    process's memory (no CMA)           then go through small cells, and a test moves one
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from .base import Request

FIRST_TURNS, FIRST_TESTS = 100, 2  # turns before a wait begins in earnest, and tests in each of them
TESTS = 16  # tests in a turn
YIELD_SECONDS = 1e-3  # for so long, give up the core between turns, but ask for it back at once
SLEEP_PART = 1 / 50  # afterwards sleep between turns for this part of the time waited so far ...
LONGEST_SLEEP = 1e-3  # ... but no longer than this many seconds
WATCH_SECONDS = 0.2  # how often `watch` is called


def _sleep_zero() -> None:
    time.sleep(0)


give_way = getattr(os, "sched_yield", _sleep_zero)


def wait_until(test: Callable[[], bool], timeout: float, watch: Callable[[], None]) -> bool:
    """Wait until `test()` is true; False after `timeout` seconds. Calls `watch` now and then; it may raise."""
    start = time.monotonic()
    waited, next_watch = 0.0, WATCH_SECONDS
    while True:
        if waited < YIELD_SECONDS:
            give_way()
        else:
            time.sleep(min(waited * SLEEP_PART, LONGEST_SLEEP))
        for _ in range(TESTS):
            if test():
                return True
        waited = time.monotonic() - start
        if waited >= next_watch:
            watch()
            next_watch = waited + WATCH_SECONDS
        if waited >= timeout:
            return False


class PolledRequest(Request):
    """One that is waited for by looking again and again. The record's listeners are told how long it took."""

    __slots__ = ()

    comm: Any

    def wait(self, timeout: float | None = None) -> None:
        poll, comm = self._poll, self.comm
        if poll():
            return
        began = comm.clock() if comm.record.listeners else None
        try:
            if not comm.in_flight:  # most are done soon: for them the preparations of a long wait cost too much
                for _ in range(FIRST_TURNS):
                    for _ in range(FIRST_TESTS):
                        if poll():
                            return
                    give_way()
            self.wait_long(timeout)
        finally:
            if began is not None:
                comm.record.waited(began)

    @abstractmethod
    def peers(self) -> list[int]:
        """World ranks it waits for."""

    def wait_long(self, timeout: float | None) -> None:
        """Wait with a deadline, and with an eye on what else goes on; see MpiCommunicator.wait_for."""
        self.comm.wait_for(self._poll, self.peers(), timeout, self)
