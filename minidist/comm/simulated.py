"""Many ranks in one process: `simulate` runs a rank program unchanged, once per rank, deterministically.

Each rank is a greenlet: a function that keeps its own stack and can be left at a call and entered again, for about a
microsecond. A seeded scheduler decides which rank runs next, so that one seed gives one interleaving and another seed
another; what goes wrong with seed 7 goes wrong with seed 7 again. Ranks change at every wait, and at half of all sends.

Time is virtual. It stands still, except that a wait given a timeout of its own has it pass when nobody can run.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .mailbox import Killed, Mailboxes, SimulatedCommunicator, Wait
from .report import Deadlock, LostMessages, deadlock_text, lost_text

if TYPE_CHECKING:
    from greenlet import greenlet

Program = Callable[..., Any]

# The world communicator of the simulated rank that is running; unset outside of one. Each greenlet has its own context.
current_world: ContextVar[SimulatedCommunicator] = ContextVar("current_world")

IDLE_TESTS = 1000  # unsuccessful tests per rank, with nothing else happening, after which nothing will


@dataclass(frozen=True)
class Simulation:
    """What a simulated run left behind. Messages and bytes are counted where they are sent."""

    results: list[Any]  # what each rank's program returned
    seconds: float  # virtual; 0.0 unless a wait's own timeout passed
    messages_by_rank: list[int]
    bytes_by_rank: list[int]

    @property
    def messages(self) -> int:
        """Messages sent by all ranks together."""
        return sum(self.messages_by_rank)

    @property
    def bytes(self) -> int:
        """Bytes sent by all ranks together."""
        return sum(self.bytes_by_rank)


def simulate(program: Program, size: int, *args: Any, seed: int = 0) -> Simulation:
    """Run `program(comm, *args)` once per rank, for `size` ranks, in this process; `seed` picks the interleaving.

    A send copies its array and never waits. The arguments are shared by all ranks, not copied.

    Errors  whatever a rank raises is raised here, with that rank's traceback; the other ranks are ended
            Deadlock: every rank waits for another. LostMessages: something sent was never received
            TypeError, ValueError (in the receiver): a message's dtype or size is not the receiving array's
    """
    if size < 1:
        raise ValueError(f"size {size}: expected at least 1 rank")
    scheduler = Scheduler(size, seed)
    results = scheduler.run(program, args)
    if scheduler.mailboxes.lost():
        raise LostMessages(lost_text(scheduler.mailboxes))
    return Simulation(results, scheduler.now, scheduler.mailboxes.messages_sent, scheduler.mailboxes.bytes_sent)


def alone() -> SimulatedCommunicator:
    """The world of a program started without mpirun: one rank, which can send to itself.

    Waiting for a message that it has not sent raises Deadlock at once.
    """
    return Scheduler(1, seed=0).world(0)


class _Rank:
    """One simulated rank, as the scheduler sees it."""

    def __init__(self, number: int):
        self.number = number
        self.greenlet: greenlet | None = None  # None: not started, or run by the process itself (see `alone`)
        self.waiting: Wait | None = None  # what it waits for; it cannot run until then
        self.testing: Wait | None = None  # what it has tested in vain; it can run
        self.deadline: float | None = None  # virtual time at which it stops waiting
        self.timed_out = False
        self.finished = False


class Scheduler:
    """Decides which rank runs. Ranks call `pause`, `block` and `idle`; each gives way to others before it returns."""

    def __init__(self, size: int, seed: int):
        self.ranks = [_Rank(number) for number in range(size)]
        self.mailboxes = Mailboxes(size)
        self.now = 0.0
        self._draw = random.Random(seed).random
        self._ready: list[_Rank] = []
        self._hub: greenlet | None = None  # where `run` loops; None for a rank alone
        self._idle_tests = 0
        self._livelock = False
        self._failure: BaseException | None = None
        self.stopping = False
        self.over = False

    def world(self, rank: int) -> SimulatedCommunicator:
        """The communicator of all ranks, as `rank` holds it."""
        return SimulatedCommunicator(self, range(len(self.ranks)), rank, context=0)

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, program: Program, args: tuple[Any, ...]) -> list[Any]:
        """Run every rank to its end; returns what they returned."""
        from greenlet import getcurrent, greenlet

        results: list[Any] = [None] * len(self.ranks)
        self._hub = getcurrent()
        for rank in self.ranks:
            rank.greenlet = greenlet(self._body(program, args, rank, results), parent=self._hub)
        self._ready = list(self.ranks)
        try:
            while self._failure is None and (self._ready or not all(rank.finished for rank in self.ranks)):
                if self._livelock or not self._ready:
                    self._livelock = False
                    self._nobody_can_go_on()
                else:
                    self._take().greenlet.switch()  # type: ignore[union-attr]
        finally:
            self._stop()
        if self._failure is not None:
            raise self._failure
        return results

    def _body(self, program: Program, args: tuple[Any, ...], rank: _Rank, results: list[Any]) -> Callable[[], None]:
        def body() -> None:
            comm = self.world(rank.number)
            current_world.set(comm)
            try:
                results[rank.number] = program(comm, *args)
            except Killed:
                pass
            except BaseException as error:
                if not self.stopping:  # what a rank raises while it is being ended is not why
                    error.add_note(f"on simulated rank {rank.number} of {len(self.ranks)}")
                    self._failure = error
            rank.finished = True
            self._idle_tests = 0

        return body

    def _take(self) -> _Rank:
        """Remove a rank from those that can run: which one, the seed decides."""
        ready = self._ready
        chosen = int(self._draw() * len(ready))
        ready[chosen], ready[-1] = ready[-1], ready[chosen]
        return ready.pop()

    def _stop(self) -> None:
        """End the ranks that are still under way: their `finally` clauses run, their communication raises Killed."""
        self.stopping = True
        for rank in self.ranks:
            if rank.greenlet:  # true while it is started and has not ended
                rank.greenlet.throw(Killed())
            rank.greenlet = None
        self.over = True

    # -- called by ranks ------------------------------------------------------------------------------------------

    def pause(self, number: int) -> None:
        """Let others run first, half of the time."""
        if self._hub is not None and self._draw() < 0.5:
            self._ready.append(self.ranks[number])
            self._hub.switch()

    def check_running(self) -> None:
        """A rank that communicates while it is being ended (in a `finally`, say) goes no further."""
        if self.over:
            raise RuntimeError("this communicator's simulation is over: it worked inside of simulate() only")
        if self.stopping:
            raise Killed

    def block(self, number: int, wait: Wait, timeout: float | None) -> bool:
        """Give way until `wake(number)`; False if `timeout` virtual seconds passed instead."""
        self.check_running()
        rank = self.ranks[number]
        rank.waiting = wait
        rank.deadline = None if timeout is None else self.now + timeout
        if self._hub is None:
            try:
                self._nobody_can_go_on()  # raises Deadlock, or lets the timeout pass
            finally:
                rank.waiting = None
                self._ready.clear()
        else:
            self._hub.switch()
        return not rank.timed_out

    def wake(self, number: int) -> None:
        """What rank `number` waited for is here."""
        self._make_ready(self.ranks[number], timed_out=False)

    def idle(self, number: int, wait: Wait) -> None:
        """Rank `number` tested a request that is not done: let others run."""
        self.check_running()
        rank = self.ranks[number]
        rank.testing = wait
        self._idle_tests += 1
        self._livelock = self._idle_tests > IDLE_TESTS * len(self.ranks)
        if self._hub is None:
            if self._livelock:
                self._nobody_can_go_on()
        else:
            self._ready.append(rank)
            self._hub.switch()
        rank.testing = None

    def progress(self) -> None:
        """Something was sent or received: those who test in vain have a reason to go on."""
        self._idle_tests = 0

    # -- deciding -------------------------------------------------------------------------------------------------

    def _make_ready(self, rank: _Rank, timed_out: bool) -> None:
        rank.timed_out = timed_out
        rank.waiting = rank.deadline = None
        self._ready.append(rank)

    def _nobody_can_go_on(self) -> None:
        """Let the earliest timeout pass, if a rank waits with one; otherwise raise Deadlock."""
        timed = [rank for rank in self.ranks if rank.deadline is not None]
        if not timed:
            raise Deadlock(deadlock_text(self))
        first = min(timed, key=lambda rank: rank.deadline or 0.0)
        self.now = first.deadline or 0.0
        self._idle_tests = 0
        self._make_ready(first, timed_out=True)

    def stack_of(self, rank: _Rank) -> Any:
        """The innermost frame of a rank that is not running; of the caller for a rank alone."""
        return sys._getframe(1) if rank.greenlet is None else rank.greenlet.gr_frame
