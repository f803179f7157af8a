"""No silent hang: when a wait passes its deadline, one table says what every rank is doing, waiting or not.

A thread on each rank (the main thread may be busy, asleep, or the one that hangs) looks for notes now and then:

    1. ASK      a rank whose deadline has passed, or that has got SIGUSR1, asks rank 0 for a table
    2. REQUEST  rank 0 asks all ranks what they are doing; who asks meanwhile is content with the same table
    3. STATUS   every rank answers (see status.py)
    4. DONE     rank 0, when it has all answers or COLLECT seconds are over, prints the table and tells all

If rank 0 has not begun PATIENCE seconds after it was asked (it may be what hangs), the rank that asked does its part;
where several do, the lowest goes on and the others answer to it. A wait that a table has shown because of a deadline,
its own or another rank's, gets no second one.

Notes are int64, or a STATUS's bytes, on a communicator of their own, with the kind as tag; rank 0's notes and answers
arrive in the order they were sent, so an ASK never comes after the STATUS that already serves it.

Where MPI may not be called from two threads at a time there is no thread: ranks answer while they wait, and one that
is busy counts as one that gives no answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from .hanging import table
from .notes import Notes
from .status import DIED, RUNS, Status, status_of

if TYPE_CHECKING:
    from .base import Communicator

ASK, REQUEST, STATUS, DONE = range(1, 5)  # kinds of notes
SIGNAL, DEADLINE = range(2)  # why a table is made; if for both reasons, then for the larger
LOOK = 0.25  # seconds between looks ...
LOOK_OFTEN = 0.01  # ... and while a table is being made
COLLECT = 3.0  # seconds in which ranks have to answer
PATIENCE = 1.0  # seconds in which rank 0 has to begin; and after a table, in which a signal counts as the same
GIVE_UP = PATIENCE + 3 * COLLECT  # seconds after which a rank goes on without having heard of a table

_USR1 = getattr(signal, "SIGUSR1", None)  # Windows has none


class Report:
    """A table in the making, on the rank that will print it."""

    def __init__(self, number: int):
        self.number = number  # counted by this rank
        self.why, self.asker, self.waited = -1, -1, 0.0  # the rank that asked, and seconds it has waited
        self.started = time.monotonic()
        self.answers: dict[int, Status] = {}

    def ask(self, why: int, asker: int, waited: float) -> None:
        """Note a reason for it."""
        if why > self.why:
            self.why, self.asker, self.waited = why, asker, waited

    def text(self, size: int) -> str:
        reason = f"rank {self.asker} of {size} has waited {self.waited:g} s, its deadline"
        title = f"minidist: {reason if self.why == DEADLINE else 'SIGUSR1'}. What every rank is doing:"
        return table(title, size, self.answers)


class Watchdog:
    """This rank's part in making tables. `mpi` is mpi4py.MPI."""

    def __init__(self, mpi: Any, notes: Notes, world: Communicator, say: Callable[[str], None]):
        self.mpi, self.notes, self.world, self.say = mpi, notes, world, say
        self.rank, self.size = world.rank, world.size
        self.over = False  # whether the program has ended
        self._opened = world.clock()
        # What this rank wants.
        self._wish: tuple[float, float] | None = None  # of the main thread: (when its wait began, seconds waited)
        self._fulfilled = threading.Event()
        self._signals = 0
        self._patient_until: float | None = None  # None: rank 0 has not been asked
        # The table that this rank makes, or that it has answered to.
        self._report: Report | None = None
        self._reports = 0
        self._maker: int | None = None
        self._maker_until = 0.0
        self._answered_at = 0.0  # by the communicator's clock, like the times of waits
        self._shown_until = 0.0  # a deadline's table has shown the waits that began before
        self._quiet_until = 0.0  # a signal counts as part of the last table
        # How it hears of things.
        self._inbox, self._outbox = socket.socketpair()  # a byte in it wakes the thread; a signal is a byte as well
        self._outbox.setblocking(False)
        self._signals_are_bytes = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- for the main thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen, for notes and for SIGUSR1 (unless the program has its own use for that)."""
        if self.mpi.Query_thread() == self.mpi.THREAD_MULTIPLE:
            self._thread = threading.Thread(target=self._run, name="minidist watchdog", daemon=True)
            self._thread.start()
        in_main = threading.current_thread() is threading.main_thread()  # else Python does not let us
        if _USR1 is not None and in_main and signal.getsignal(_USR1) is signal.SIG_DFL:
            signal.signal(_USR1, self._on_signal)
            # Python calls a handler when a long call, such as a matmul, is over; the byte is written at once.
            before = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
            self._signals_are_bytes = before == -1
            if before != -1:  # the program has its own use for that, too
                signal.set_wakeup_fd(before)
            os.register_at_fork(after_in_child=self._in_child)

    def stop(self) -> None:
        """End the thread; must be called before MPI is finalised."""
        self._stopping = True
        self._wake()
        if self._thread is not None:
            self._thread.join(COLLECT)

    def deadline_passed(self, began: float, waited: float) -> None:
        """A wait that began at `began` has lasted too long: returns when a table that shows it has been printed."""
        self._fulfilled.clear()
        self._wish = (began, waited)
        self._wake()
        give_up = time.monotonic() + GIVE_UP
        try:
            while not self._fulfilled.wait(LOOK_OFTEN) and time.monotonic() < give_up:
                self.look()
        finally:
            self._wish = None

    def look(self) -> None:
        """Do the thread's work, where there is none. Called now and then by a rank that waits."""
        if self._thread is None:
            self._turn(0.0)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: then the thread will wake as well
            self._outbox.send(b"\0")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._signals_are_bytes:
            self._signals += 1
            self._wake()

    def _in_child(self) -> None:
        """A forked process is no rank."""
        if _USR1 is not None and signal.getsignal(_USR1) == self._on_signal:
            signal.signal(_USR1, signal.SIG_DFL)
            if self._signals_are_bytes:
                signal.set_wakeup_fd(-1)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping and not self.mpi.Is_finalized():
            idle = self._report is None and self._patient_until is None
            self._turn(LOOK if idle else LOOK_OFTEN)

    def _turn(self, pause: float) -> None:
        """Wait for a byte, for at most `pause` seconds; then do what there is to do."""
        self._inbox.settimeout(pause)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            heard = self._inbox.recv(4096).count(_USR1 or 255)
            if heard and signal.getsignal(_USR1 or 0) == self._on_signal:  # else the program now has its own handler
                self._signals += heard
        if self._stopping:
            return
        self._read()
        if self._report is not None:
            self._print_when_complete(self._report)
        self._see_to_wishes()
        self.notes.sent()

    def _another_makes_one(self) -> bool:
        return self._maker is not None and time.monotonic() < self._maker_until

    def _see_to_wishes(self) -> None:
        now, wish = time.monotonic(), self._wish
        # 1. What do we want?
        if wish is not None and wish[0] < self._shown_until:
            wish = self._wish = None
            self._fulfilled.set()
        if now < self._quiet_until:
            self._signals = 0
        if wish is None and not self._signals:
            self._patient_until = None
            return
        why, waited = (SIGNAL, 0.0) if wish is None else (DEADLINE, wish[1])
        # 2. Who makes the table?
        if self._report is not None:
            self._report.ask(why, self.rank, waited)
        elif self._another_makes_one():
            pass  # it may be what we want
        elif self.rank == 0 or (self._patient_until is not None and now > self._patient_until):
            self._begin(why, self.rank, waited)
        elif self._patient_until is None:
            self._patient_until = now + PATIENCE
            self._tell(0, ASK, why, round(waited * 1e6))

    # -- notes ----------------------------------------------------------------------------------------------------

    def _tell(self, rank: int, kind: int, *numbers: int) -> None:
        self.notes.send(rank, kind, np.array(numbers, np.int64).view(np.uint8))

    def _read(self) -> None:
        while (arrived := self.notes.read()) is not None:
            sender, kind, note = arrived
            if kind == STATUS:
                number = int(note[:8].view(np.int64)[0])
                if self._report is not None and self._report.number == number:
                    self._report.answers[sender] = Status.unpack(note[8:])
                continue
            first, second = note.view(np.int64).tolist()
            if kind == ASK and not self._another_makes_one():
                self._begin(first, sender, second / 1e6)
            elif kind == REQUEST and (self._report is None or sender < self.rank):
                self._answer(sender, first)
            elif kind == DONE and sender == self._maker:
                self._finish(first)

    # -- a table, on the rank that makes it -----------------------------------------------------------------------

    def _begin(self, why: int, asker: int, waited: float) -> None:
        if self._report is None:
            self._reports += 1
            self._report = Report(self._reports)
            for rank in range(self.size):
                if rank != self.rank:
                    self._tell(rank, REQUEST, self._reports, 0)
            self._answered_at = self.world.clock()
            self._report.answers[self.rank] = self._status()
        self._report.ask(why, asker, waited)

    def _print_when_complete(self, report: Report) -> None:
        for rank in self.notes.deaths.look():
            report.answers.setdefault(rank, Status(DIED, 0.0, [], [], "?", "", "", ""))
        if len(report.answers) < self.size and time.monotonic() < report.started + COLLECT:
            return
        self.say(report.text(self.size))
        for rank in range(self.size):
            if rank != self.rank:
                self._tell(rank, DONE, report.why, 0)
        self._finish(report.why)

    # -- and on the others ----------------------------------------------------------------------------------------

    def _answer(self, maker: int, number: int) -> None:
        self._report = None  # if we were making one as well, it is given up
        self._maker, self._maker_until = maker, time.monotonic() + COLLECT + PATIENCE
        self._answered_at = self.world.clock()
        self.notes.send(
            maker, STATUS, np.concatenate([np.array([number], np.int64).view(np.uint8), self._status().pack()])
        )

    def _finish(self, why: int) -> None:
        """The table has been printed."""
        self._report = self._maker = self._patient_until = None
        self._quiet_until = time.monotonic() + PATIENCE
        if why == DEADLINE:
            self._shown_until = self._answered_at

    def _status(self) -> Status:
        try:
            return status_of(self.world, self._opened, self.over)
        except Exception as error:  # a job that is well must not end because it was asked
            return Status(RUNS, 0.0, [], [], socket.gethostname(), f"cannot tell: {error!r}", "", "")
