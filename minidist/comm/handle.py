"""Operations in progress: a collective is a generator of the requests it waits for, and a Handle is one on its way.

An algorithm says `yield request` where it cannot go on before that request is done. Who drives it decides what happens
meanwhile: a blocking call waits for each request in turn; a handle goes on whenever this rank waits for anything, or
tests it. So a rank that waits for one operation keeps all its others moving, and no order of waiting can deadlock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import Request

if TYPE_CHECKING:
    from .base import Communicator
    from .record import Entry

NAP = 5e-5  # seconds between a helper thread's looks, when nothing moves
Uses = list[tuple["Communicator", int]]  # communicators, and the tags of messages on them
Steps = Generator[Request, None, None]  # an operation, as the requests that it has to wait for, one after the other


class Handle(Request):
    """An operation that has been started. `test` and `wait` as for a message; `wait` returns the operation's result.

    The arrays it was given belong to it until it is done. What goes wrong in it is raised by its own wait or test,
    whoever's waiting moved it on.
    """

    __slots__ = ("comm", "tag", "uses", "result", "current", "done", "_steps", "_error", "_going_on")

    def __init__(self, comm: Communicator, uses: Uses, steps: Steps, result: Any = None, entry: Entry | None = None):
        self.comm, self.tag = comm, uses[0][1] if uses else 0
        self.uses = uses  # the tags that its messages have
        self.result, self.entry = result, entry
        self.current: Request | None = None  # what it waits for, once it has been started
        self.done = False
        self._steps = steps
        self._error: BaseException | None = None
        self._going_on = False
        with comm.in_flight.lock:
            comm.in_flight.append(self)
            self._go_on()  # its first messages leave now

    def wait(self, timeout: float | None = None) -> Any:
        """Return the operation's result when it is done. Errors as for Request.wait, and those of the operation."""
        self.settle(timeout)
        return self._outcome()

    def settle(self, timeout: float | None = None) -> None:
        """As wait, but what has gone wrong in it is not raised now."""
        give_up = None if timeout is None else self.comm.clock() + timeout
        while not self.done:
            if not progress(self.comm.in_flight) and (waits := self.comm.in_flight.waits()):
                left = None if give_up is None else max(0.0, give_up - self.comm.clock())
                self.comm._wait_any(waits, left)

    def cancel(self) -> None:
        """Go no further. Messages that have been started stay so: the communicator is of no use any more."""
        if not self.done:
            self._end()

    def test(self) -> bool:
        if not progress(self.comm.in_flight):
            current = self.current
            while isinstance(current, Handle):  # a part of this operation
                current = current.current
            if current is not None:
                self.comm.tested_in_vain(current)
                progress(self.comm.in_flight)
        if self.done:
            self._outcome()
        return self.done

    def _poll(self) -> bool:
        self._go_on()
        return self.done

    def _outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        return self.result

    def _go_on(self) -> bool:
        """Do all that can be done without waiting; whether there was anything."""
        if self._going_on or self.done:
            return False
        self._going_on, moved = True, False
        try:
            while self.current is None or self.current._poll():
                moved = True
                self.current = next(self._steps)
        except StopIteration:
            self._end()
        except BaseException as error:
            moved = True
            self._error = error
            self._end()
            if not isinstance(error, Exception):
                raise  # an interrupt is everyone's
        finally:
            self._going_on = False
        return moved

    def _end(self) -> None:
        self.done, self.current = True, None
        self.comm.in_flight.remove(self)
        if self.entry is not None:
            self.comm.record.end(self.entry)


class InFlight(list[Handle]):
    """One rank's operations in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()  # held by the thread that moves them on

    def waits(self) -> Waits:
        """Each of them with what it waits for."""
        with self.lock:
            return [(handle, handle.current) for handle in self if handle.current is not None]


Waits = list[tuple[Handle, Request]]


def progress(in_flight: InFlight) -> bool:
    """Let every operation in flight go on as far as it can without waiting; whether any could."""
    moved = False
    with in_flight.lock:
        for handle in tuple(in_flight):
            moved |= handle._go_on()
    return moved


@contextmanager
def helper_thread(comm: Communicator) -> Iterator[None]:
    """Inside of the `with`, a thread of its own moves this rank's operations in flight on, while the program computes.

    Without it they only move when this rank waits or tests. It takes a core: with as many busy ranks as cores it does
    harm (see benchmarks/overlap.py). Arrays must be on the CPU.

    Errors  ValueError: simulated ranks, which run one at a time
    """
    if comm.network is not None:
        raise ValueError("a helper thread needs ranks started by mpirun; these are simulated, and run one at a time")
    over = threading.Event()

    def help_on() -> None:
        while not over.is_set():
            time.sleep(0 if comm.in_flight and progress(comm.in_flight) else NAP)

    thread = threading.Thread(target=help_on, name="minidist helper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
