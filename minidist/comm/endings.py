"""How a job of several processes ends: together, with the guilty rank's traceback once, and never in a hang.

MPI alone lets a rank leave while the others wait for it for ever. What happens here instead, per case:

    an uncaught exception, Ctrl-C     sys.excepthook: that rank prints its traceback and aborts the job. Where several
    (also in a thread)                ranks fail alike, only the lowest prints.
    a wait passes its deadline        a table says what all ranks are doing (see watchdog.py); then TimeoutError is
                                      raised, which if nobody catches it ends the job as any exception does
    kill -9                           the launcher sees a process die and ends the others; or, if it was started to let
                                      them go on, a rank that waits for the dead one raises PeerFailed (see deaths.py)
    the program ends, sys.exit        the rank says goodbye to every other rank and waits for their goodbyes, then ends
                                      in order. If all call sys.exit, that is all: no tracebacks.
    one rank ends, another waits      the waiting rank finds the goodbye. If the other left by sys.exit, it is asked to
    for it                            print where; else the waiting rank raises PeerEnded.
    sys.exit with an error on one     if the others have not said goodbye PATIENCE seconds later, it prints where it
    rank, the others work on          called sys.exit and aborts the job with its code

(`raise SystemExit` by hand cannot be told from the end of the program; sys.exit can.)
What the ranks tell one another are notes without content, of the kinds below.

A job that outlives its ranks differs in two more ways. MPI_Finalize, where all ranks meet, hung in one of seven runs
whose rank had been killed while large messages were under way: so no rank calls it, and that all have said goodbye is
enough. And MPI_Abort did not end the others: so who aborts tells them, and they leave by themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from .base import Communicator
from .deaths import PeerEnded, PeerFailed
from .notes import Notes

if TYPE_CHECKING:
    from .deaths import Epitaph
    from .watchdog import Watchdog

ENDED, EXITED, FAILED, BLAMED = range(4)  # ENDED: at the end of the program; EXITED: by sys.exit
PATIENCE = 2.0  # seconds
TURN = 0.1  # seconds between ranks' turns to print, where several fail


def refuse(comm: Communicator, message: str, code: int = 2) -> NoReturn:
    """End the program on every rank, with one line on standard error. Every rank must call it."""
    if comm.rank == 0:
        print(message, file=sys.stderr, flush=True)
    comm.split(None)  # nobody leaves before all are here and the line is out
    sys.exit(code)


_GONE = (AttributeError, OSError, ValueError)  # of a stream that is None, a pipe that nobody reads, a closed file


def say(text: str) -> None:
    """Print to standard error, if anyone still listens: nothing may keep the job from ending."""
    with contextlib.suppress(*_GONE):
        sys.stderr.write(text)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*_GONE):
            stream.flush()


class _Exit(SystemExit):
    """What sys.exit raises once a world is open: it remembers where it was called, and notices if nobody catches it.

    Python does not tell an atexit function how the program ended. But an exception is destroyed when it has been dealt
    with: below an `except` clause if it was caught, and with no Python frame below it if it has left the program.
    """

    stack = ""  # where the exit that ended the program came from; empty: it did not end by sys.exit
    status = 0

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._stack = "".join(traceback.format_stack(sys._getframe(2)))

    def __del__(self) -> None:
        if sys._getframe().f_back is None and threading.current_thread() is threading.main_thread():
            _Exit.stack = self._stack
            _Exit.status = self.code if isinstance(self.code, int) else int(self.code is not None)


def _exit(status: Any = None, /) -> NoReturn:
    raise _Exit(status)


class Endings:
    """This rank's part in ending the job. `mpi` is the mpi4py.MPI module."""

    def __init__(self, mpi: Any, notes: Notes):
        self.mpi = mpi
        self.notes = notes
        self.deaths = notes.deaths
        self.rank: int = mpi.COMM_WORLD.rank
        self.size: int = mpi.COMM_WORLD.size
        self.process = os.getpid()
        self.ended: dict[int, int] = {}  # rank: ENDED or EXITED
        self.failed: set[int] = set()
        self.blamed_by: int | None = None
        self.aborting = False
        self.watchdog: Watchdog | None = None  # set by open_world, where there are several ranks
        self.epitaph: Epitaph | None = None  # set by Communicator.outlive
        self.must_leave = False  # set by open_world: Python is not to end this process, for then MPI would be finalised

    def install(self) -> None:
        """From now on, notice how this process ends."""
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception
        sys.exit = _exit
        atexit.register(self._goodbye)

    def abort(self, code: int) -> NoReturn:
        """End the whole job at once; what has been printed is given a moment to reach the launcher."""
        self.aborting = True
        _flush()
        if self.epitaph is not None:
            self.epitaph.cancel()
        if self.deaths.survives and self.watchdog is not None:
            self.watchdog.notes.end()
            self._pump(0.1)  # MPI sends while it is called
            os._exit(code)
        time.sleep(0.1)
        self.mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # not reached: Abort does not return

    def ended_by_another(self) -> None:
        """A rank has aborted the job, in a way that leaves the others alive: leave, without a word.

        The launcher ends with the first status that is not 0: that one's.
        """
        if not self.aborting:
            _flush()
            os._exit(0)

    # -- notes ----------------------------------------------------------------------------------------------------

    def _tell(self, ranks: Iterable[int], kind: int) -> None:
        for rank in ranks:
            if rank != self.rank:
                self.notes.send(rank, kind)

    def _read(self) -> None:
        if self.watchdog is not None:
            self.watchdog.look()
        while (note := self.notes.read()) is not None:
            sender, kind, _ = note
            if kind in (ENDED, EXITED):
                self.ended[sender] = kind
            elif kind == FAILED:
                self.failed.add(sender)
            else:
                self.blamed_by = sender

    # -- while waiting --------------------------------------------------------------------------------------------

    def check(self, peers: list[int], done: Callable[[], bool], who: Callable[[], str], anyone: bool = False) -> None:
        """Called now and then by a rank that waits for all of `peers`, or for anyone of them.

        Errors  PeerEnded, PeerFailed: one of them will not come; where anyone would do, none will
        """
        self._read()
        dead = self.deaths.look()
        left = [peer for peer in peers if peer in self.ended or peer in dead]
        if not left or (anyone and len(left) < len(peers)):
            return
        died = dead.intersection(left)
        if died:
            if not done():
                gone = min(died)
                raise PeerFailed(f"rank {gone} of {self.size} has died; rank {self.rank} waits for {who()}", gone)
            return
        gone = left[0]
        # What it sent before it ended may still be on its way.
        patience = time.monotonic() + PATIENCE / 2
        while time.monotonic() < patience:
            if done():
                return
            time.sleep(1e-3)
        if self.ended[gone] == EXITED:
            self._tell([gone], BLAMED)
            self._expect_the_end()
        raise PeerEnded(f"rank {gone} of {self.size} has ended; rank {self.rank} waits for {who()}")

    def _expect_the_end(self) -> None:
        """Another rank is about to end the job."""
        time.sleep(5 * PATIENCE)

    # -- at the end -----------------------------------------------------------------------------------------------

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._fail("".join(traceback.format_exception(kind, error, trace)), 130 if kind is KeyboardInterrupt else 1)

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit and args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "unknown"
            text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
            self._fail(f"in thread {name}: {text}", 1)

    def _fail(self, text: str, code: int) -> None:
        """Print `text` and end the job, unless a rank before this one is doing so."""
        if os.getpid() == self.process:
            self._tell(range(self.size), FAILED)
            self._pump(min(self.rank, 10) * TURN)
            if self.failed and min(self.failed) < self.rank:
                self._expect_the_end()
        say(f"rank {self.rank} of {self.size} failed: {text}")
        if os.getpid() == self.process:
            self.abort(code)

    def _goodbye(self) -> None:
        """Leave when everyone leaves; see the module's table."""
        if os.getpid() != self.process or self.mpi.Is_finalized():
            return
        _flush()
        if self.watchdog is not None:
            self.watchdog.over = True  # it goes on until all have ended: the others may hang
        self._tell(range(self.size), EXITED if _Exit.stack else ENDED)
        start = time.monotonic()
        while len(self.deaths.look().union(self.ended)) < self.size - 1:
            self._pump(0.01)
            late = _Exit.status != 0 and time.monotonic() - start > PATIENCE
            if self.blamed_by is not None or (late and not self.failed):
                why = f"while rank {self.blamed_by} waits for it" if self.blamed_by is not None else "before the others"
                text = f"rank {self.rank} of {self.size} called sys.exit({_Exit.status}) {why}:\n{_Exit.stack}"
                say(text)
                self.abort(_Exit.status or 1)
        if self.watchdog is not None:
            self.watchdog.stop()
        while not self.notes.sent():
            time.sleep(1e-3)
        if self.epitaph is not None:
            self.epitaph.cancel()
        if self.must_leave:
            _flush()
            os._exit(_Exit.status)

    def _pump(self, seconds: float) -> None:
        """Read notes for so long."""
        end = time.monotonic() + seconds
        self._read()
        while time.monotonic() < end:
            time.sleep(0.005)
            self._read()
