"""How a rank waits over MPI: a loop in Python around a non-blocking test, so that signals and deadlines are seen.

Measured on two cores, ring all-reduce of 814,090 float32 by 4 ranks with 12 ms of matmul between (MPICH 5.0; whole
step, median of 6): MPI's own blocking wait 14.9 ms; test and sched_yield 15.4; the rule below 15.4; sleeping 50 us
from the start 17.4; pure spinning 56. By 2 ranks all but pure sleeping agree (6.8 ms).
Yielding is not free for the others: the kernel counts a yielding rank as busy, so three ranks that yield for long
took half of the fourth's core (matmul 0.93 s instead of 0.47 s; among eight ranks 1.9 s). Sleepers cost it nothing.
Hence: yield while an answer is likely any moment, then sleep for a small part of the time already waited.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

YIELD_SECONDS = 1e-3  # for so long, give up the core between tests, but ask for it back at once
SLEEP_PART = 1 / 50  # afterwards sleep for this part of the time waited so far ...
LONGEST_SLEEP = 1e-3  # ... but no longer than this many seconds
WATCH_SECONDS = 0.2  # how often `watch` is called


def _sleep_zero() -> None:
    time.sleep(0)


_give_way = getattr(os, "sched_yield", _sleep_zero)


def wait_until(test: Callable[[], bool], timeout: float, watch: Callable[[], None]) -> bool:
    """Wait until `test()` is true; False after `timeout` seconds. Calls `watch` now and then; it may raise."""
    start = time.monotonic()
    next_watch = WATCH_SECONDS
    while not test():
        waited = time.monotonic() - start
        if waited < YIELD_SECONDS:
            _give_way()
        else:
            time.sleep(min(waited * SLEEP_PART, LONGEST_SLEEP))
        if waited >= next_watch:
            watch()
            next_watch = waited + WATCH_SECONDS
        if waited >= timeout:
            return False
    return True
