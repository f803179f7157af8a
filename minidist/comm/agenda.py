"""Simulated ranks, what each waits for, and when it goes on: the scheduler's book-keeping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from greenlet import greenlet

    from .injection import Course
    from .record import FlightRecord


class Wait(Protocol):
    """Something a rank waits for."""

    @property
    def at(self) -> float | None:
        """The virtual time at which the waiting ends; None while it is not known."""

    def waits_for(self) -> list[int]:
        """World ranks that have to act."""

    def describe(self) -> str:
        """The operation, in the caller's terms."""


class AnyOf:
    """Several things, of which a rank waits for the first."""

    def __init__(self, waits: Iterable[Wait]):
        parts = [part for wait in waits for part in (wait.waits if isinstance(wait, AnyOf) else (wait,))]
        self.waits: list[Wait] = list(dict.fromkeys(parts))

    @property
    def at(self) -> float | None:
        return min((wait.at for wait in self.waits if wait.at is not None), default=None)

    def waits_for(self) -> list[int]:
        return [rank for wait in self.waits for rank in wait.waits_for()]

    def describe(self) -> str:
        return " or ".join(wait.describe() for wait in self.waits)


class Rank:
    """One simulated rank, as the scheduler sees it."""

    def __init__(self, number: int):
        self.number = number
        self.now = 0.0  # its clock
        self.greenlet: greenlet | None = None  # None: not started, or run by the process itself (see `alone`)
        self.record: FlightRecord | None = None
        self.goes_on: float | None = None  # when; None: it waits for something of which that is not known, or runs
        self.waiting: Wait | None = None  # what it waits for
        self.deadline: float | None = None  # at which it stops waiting
        self.ends_known_until = 0.0  # the last time at which one of its waits is known to end
        self.testing: Wait | None = None  # what it has tested in vain since it last waited
        self.tests = 0  # in vain, since the event of number `tests_since`
        self.tests_since = 0
        self.tested: dict[Wait, None] = {}  # what it has tested in vain at `tested_at`, and since that event
        self.tested_at = 0.0
        self.finished = False
        self.course: Course | None = None  # of one that faults stop or slow down
        self.gone = ""  # "was killed at 3 s", "hangs since 3 s": nobody waits for its end


class Agenda:
    """The ranks that can go on, by the time at which they do; those of equal time in random order."""

    def __init__(self, draw: Callable[[], float]):
        self.earliest = math.inf
        self._draw = draw
        self._times: list[float] = []  # a heap
        self._ranks: dict[float, list[Rank]] = {}  # by time

    def put(self, rank: Rank, time: float) -> None:
        """Let a rank go on at `time`, or sooner if that was known already; if it stands still then, afterwards."""
        if rank.course is not None:
            time = rank.course.awake(time)
            if time == math.inf:
                return
        if rank.goes_on is not None:
            if rank.goes_on <= time:
                return
            self._remove(rank, rank.goes_on)
        rank.goes_on = time
        ranks = self._ranks.get(time)
        if ranks is None:
            self._ranks[time] = [rank]
            heappush(self._times, time)
            self.earliest = self._times[0]
        else:
            ranks.append(rank)

    def take(self) -> Rank:
        """Remove a rank of the earliest time, and set its clock."""
        ranks = self._ranks[self.earliest]
        chosen = int(self._draw() * len(ranks))
        ranks[chosen], ranks[-1] = ranks[-1], ranks[chosen]
        rank = ranks.pop()
        rank.now, rank.goes_on = self.earliest, None
        if not ranks:
            del self._ranks[heappop(self._times)]
            self.earliest = self._times[0] if self._times else math.inf
        return rank

    def _remove(self, rank: Rank, time: float) -> None:
        self._ranks[time].remove(rank)
        if not self._ranks[time]:
            del self._ranks[time]
            self._times.remove(time)
            heapify(self._times)
            self.earliest = self._times[0] if self._times else math.inf
