"""Which simulated rank runs next: a discrete-event simulation in virtual time.

Every rank has its own clock. Computing takes no virtual time, waiting does (until what is waited for has happened), and
so does work that a rank says it does (`elapse`). The one rule: of all ranks that can go on, the one whose clock is
earliest does; of several, one that the seed picks. It runs until it waits or its clock moves on. So ranks act in the
order of time, and nothing that has happened is changed by what another rank does later.

Each rank is a greenlet: a function that keeps its own stack and can be left at a call and entered again, for about a
microsecond. They are all left for the hub, a loop that picks the next.

Testing takes no time either, and yet `while not request.test()` has to end. A request that is tested again, in vain and
at the same time, shows that its rank has nothing better to do: the rank is parked until something happens.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from .agenda import Agenda, AnyOf, Rank, Wait
from .report import Deadlock, deadlock_text

if TYPE_CHECKING:
    from greenlet import greenlet

    from .faults import Strike

IDLE_TESTS = 1000  # unsuccessful tests per rank, with nothing else happening, after which nothing will


class Killed(BaseException):
    """Ends a simulated rank: the simulation is over, or a fault kills it. Not an Exception: programs let it pass."""


class Scheduler:
    """Decides which rank runs. Ranks call `pause`, `block`, `elapse` and `idle`; others may run before these return."""

    def __init__(self, size: int, seed: int):
        self.ranks = [Rank(number) for number in range(size)]
        self.now = 0.0  # the clock of the rank that runs; never decreases
        self.stopping = self.over = False
        self.unfinished = size  # ranks whose end is waited for
        self.struck: list[Strike] = []  # the faults that have, see injection.py
        self.draw = random.Random(seed).random
        self._agenda = Agenda(self.draw)
        self._deadlines: list[tuple[float, int, Rank, Wait]] = []  # a heap of (time, serial number, who, what)
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []  # a heap of (time, serial number, what to do)
        self._serial = itertools.count()
        self._parked: dict[Rank, None] = {}  # they test in vain, until something happens
        self._events = 0  # number of things that have happened
        self._idle_tests = 0  # since the last of them
        self._hub: greenlet | None = None  # where `run` loops; None for a rank alone
        self._failure: BaseException | None = None

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, program: Callable[[int], Any]) -> list[Any]:
        """Run program(rank) for every rank to its end; returns what they returned."""
        from greenlet import getcurrent, greenlet

        results: list[Any] = [None] * len(self.ranks)
        self._hub = getcurrent()
        for rank in self.ranks:
            rank.greenlet = greenlet(self._body(program, rank, results), parent=self._hub)
            self._agenda.put(rank, 0.0)
        try:
            while self._failure is None and self.unfinished:
                turn = self._next()
                if turn is not None:
                    turn.greenlet.switch()  # type: ignore[union-attr]
        finally:
            self._stop()
        if self._failure is not None:
            raise self._failure
        return results

    def _body(self, program: Callable[[int], Any], rank: Rank, results: list[Any]) -> Callable[[], None]:
        def body() -> None:
            try:
                result = program(rank.number)
                if not rank.gone:
                    results[rank.number] = result
            except Killed:
                pass
            except BaseException as error:
                if not (self.stopping or rank.gone):  # what a rank raises while it is being ended is not why
                    error.add_note(f"on simulated rank {rank.number} of {len(self.ranks)}")
                    self._failure = error
            rank.finished, rank.testing = True, None
            if not rank.gone:
                self.unfinished -= 1

        return body

    def _stop(self) -> None:
        """End the ranks that are still under way: their `finally` clauses run, their communication raises Killed."""
        self.stopping = True
        for rank in self.ranks:
            self.end(rank)
            rank.greenlet = None
        self.over = True

    # -- called by faults -----------------------------------------------------------------------------------------

    def alarm(self, time: float, what: Callable[[], None]) -> None:
        """Do this when all that happens before `time` has happened, and nothing of what happens then."""
        heappush(self._alarms, (time, next(self._serial), what))

    def end(self, rank: Rank) -> None:
        """End a rank that does not run at this moment."""
        if rank.greenlet:  # true while it is started and has not ended
            rank.greenlet.throw(Killed())

    def stand_still(self, rank: Rank) -> None:
        """The rank, which runs, goes on when its course lets it."""
        self._agenda.put(rank, rank.now)
        self._give_way()

    # -- called by ranks ------------------------------------------------------------------------------------------

    def check_running(self, rank: Rank) -> None:
        """A rank that communicates while it is being ended (in a `finally`, say) goes no further."""
        if self.stopping or rank.gone:
            if self.over:
                raise RuntimeError("this communicator's simulation is over: it worked inside of simulate() only")
            raise Killed

    def pause(self, rank: Rank) -> None:
        """Let others run first, half of the time, if there are any whose turn it is as well."""
        if self.draw() < 0.5 and self._agenda.earliest <= rank.now:
            self._agenda.put(rank, rank.now)
            self._give_way()

    def elapse(self, rank: Rank, seconds: float) -> None:
        """Move the rank's clock on; those who are earlier run first."""
        self.check_running(rank)
        end = rank.now + seconds if rank.course is None else rank.course.works_until(rank.now, seconds)
        self._agenda.put(rank, end)
        self._give_way()

    def block(self, rank: Rank, wait: Wait, deadline: float | None) -> None:
        """Give way until `wait.at`, or until the deadline if that comes first."""
        self.check_running(rank)
        rank.waiting, rank.testing, rank.deadline = wait, None, deadline
        if wait.at is not None:
            self._agenda.put(rank, wait.at)
        if deadline is not None:
            heappush(self._deadlines, (deadline, next(self._serial), rank, wait))
        try:
            self._give_way()
        finally:
            rank.waiting = rank.deadline = None

    def ends(self, rank: Rank, wait: Wait) -> None:
        """It is now known when `wait`, of this rank, will end: if the rank waits for it, it goes on then."""
        waiting, at = rank.waiting, wait.at
        assert at is not None
        if at > rank.ends_known_until:
            rank.ends_known_until = at
        if waiting is wait or (isinstance(waiting, AnyOf) and wait in waiting.waits):
            self._agenda.put(rank, at)

    def happened(self) -> None:
        """Something has, that may be what the parked ranks test for."""
        self._events += 1
        self._idle_tests = 0
        if self._parked:
            self._release()

    def idle(self, rank: Rank, wait: Wait, others: Iterable[Wait]) -> None:
        """The rank has tested `wait` in vain: let others run. If it goes on testing, its clock moves on.

        That is to the next event, or to the end of a wait that it has tested as well, or of one of `others`.
        """
        self.check_running(rank)
        # 1. Count, so that tests that will be in vain for ever are noticed.
        if rank.tests_since != self._events:
            rank.tests_since, rank.tests, rank.tested = self._events, 0, {}
        rank.tests += 1
        self._idle_tests += 1
        # 2. The first test at this time is a look round; a second one shows that the rank waits.
        if rank.tested_at != rank.now:
            rank.tested_at, rank.tested = rank.now, {}
        if wait not in rank.tested:
            self._agenda.put(rank, rank.now)
        else:
            self._parked[rank] = None
            ends = AnyOf([*rank.tested, *others]).at
            if ends is not None:
                self._agenda.put(rank, max(ends, rank.now))
        rank.tested[wait] = None
        rank.testing = wait
        try:
            self._give_way()
        finally:
            self._parked.pop(rank, None)

    # -- deciding -------------------------------------------------------------------------------------------------

    def _give_way(self) -> None:
        if self._hub is not None:
            self._hub.switch()
        else:
            self._next()  # a rank alone: it is its own next, or nobody is

    def _next(self) -> Rank | None:
        """The rank whose turn it is. None: it was an alarm's, and that has been done.

        Errors  Deadlock: there is none
        """
        agenda = self._agenda
        tired = self._idle_tests > IDLE_TESTS * len(self.ranks)
        if tired:
            self._idle_tests = 0
            if not self._alarms and all(map(self._will_never_go_on, self.ranks)):
                self._deadlock()
        while True:
            deadline = self._next_deadline() if self._deadlines else math.inf
            alarm = self._alarms[0][0] if self._alarms else math.inf
            # 1. A deadline passes when nobody can do anything before it, or at it; an alarm before anyone does.
            somebody = agenda.earliest <= deadline and agenda.earliest < math.inf
            if somebody and agenda.earliest < alarm:
                rank = agenda.take()
                assert rank.now >= self.now  # ranks act in the order of time
                self.now = rank.now
                return rank
            # 2. Those who test in vain might stop testing and do something, so they go on; but not for ever.
            if self._parked and not somebody and not (tired and min(alarm, deadline) < math.inf):
                self._release()
            # 3. A fault strikes, or a wait gives up.
            elif alarm <= deadline and alarm < math.inf:
                self.now = alarm
                heappop(self._alarms)[2]()
                return None
            elif deadline < math.inf:
                agenda.put(heappop(self._deadlines)[2], deadline)
                self._idle_tests = 0
            else:
                self._deadlock()

    def _next_deadline(self) -> float:
        """The earliest of those that still stand."""
        while self._deadlines:
            time, _, rank, wait = self._deadlines[0]
            if rank.waiting is wait and rank.deadline == time:
                return time
            heappop(self._deadlines)
        return math.inf

    def _release(self) -> None:
        """The parked ranks go on now."""
        for rank in self._parked:
            self._agenda.put(rank, self.now)
        self._parked.clear()

    def _will_never_go_on(self, rank: Rank) -> bool:
        if rank.gone:
            return True
        if rank.waiting is not None:
            return rank.goes_on is None and rank.deadline is None
        in_vain = rank.tests_since == self._events and rank.tests >= IDLE_TESTS
        return rank.finished or (in_vain and rank.ends_known_until <= rank.now)

    def _deadlock(self) -> None:
        self._parked.clear()
        raise Deadlock(deadlock_text(self.ranks, self.stack_of, self.struck))

    def stack_of(self, rank: Rank) -> Any:
        """The innermost frame of a rank that is not running; of the caller for a rank alone."""
        return sys._getframe(1) if rank.greenlet is None else rank.greenlet.gr_frame
