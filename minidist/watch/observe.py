"""Ranks whose messages are seen.

The simulator runs them as always, and an observer is told of each message:

    class Mine(Observer): ...
    simulate(lambda comm: program(Observed(comm, Mine())), 4)
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from functools import cache
from inspect import getdoc
from linecache import getlines
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..comm.base import Communicator, Request
from ..comm.mailbox import Receive
from ..comm.simulated import SimulatedCommunicator

PACKAGE = Path(__file__).parents[1]
BETWEEN = ("comm", "watch", "collectives/lane.py", "collectives/incoming.py")  # an algorithm and its messages


class Step(NamedTuple):
    """Where in the source something was done.

    words  the numbered step there, "1. P - 1 times, pass a partial sum to the right …"; else what the docstring says
    """

    function: str
    words: str
    file: str  # "collectives/ring.py"
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file.strip('/')}, line {self.line})"


class Message:
    """One message: its ranks in the world, what was in it, and when."""

    def __init__(self, source: int, dest: int, array: Array, sent: float, step: Step):
        self.source, self.dest, self.sent, self.step = source, dest, sent, step
        self.data = np.array(array).reshape(-1)  # a copy
        self.received = 0.0  # when its receiver took it in
        self.contents: Any = None  # what an observer makes of it


class Observer:
    """What is told. Ranks are those of the world, times their virtual clocks'."""

    def __init__(self) -> None:
        self.messages: list[Message] = []  # as they were received
        self._under_way: dict[Any, deque[Message]] = defaultdict(deque)

    def sends(self, message: Message) -> None:
        """A rank is about to send."""

    def looks(self, rank: int, now: float) -> None:
        """A rank is about to wait, or to see whether it must: what it did before `now` is done."""

    def receives(self, message: Message) -> None:
        """A rank has taken a message in; its array is filled."""


class Observed(SimulatedCommunicator):
    """A simulated rank's communicator, and all that come from it by splitting. The rank program notices nothing."""

    def __init__(self, comm: Communicator, observer: Observer):
        if not isinstance(comm, SimulatedCommunicator):
            raise TypeError(f"{comm!r}: only simulated ranks can be observed")
        self.__dict__.update(comm.__dict__)  # the same rank, mailbox and clock
        self.observer = observer
        self.checked = False  # (what ranks tell one another for that is not the algorithm's)
        if self._by_host is not None:
            host, across = self._by_host
            self._by_host = Observed(host, observer), Observed(across, observer)

    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        message = Message(self.world_rank, self.members[dest], array, self.clock(), step_here())
        self.observer.sends(message)
        self.observer._under_way[self.context, message.source, message.dest, tag].append(message)
        return super()._isend(array, dest, tag)

    def _irecv(self, array: Array, source: int, tag: int) -> Request:
        request = super()._irecv(array, source, tag)
        request.__class__ = Observation
        return request

    def _split(self, color: int | None, key: int) -> Communicator | None:
        child = super()._split(color, key)
        return None if child is None else Observed(child, self.observer)


class Observation(Receive):
    """A receive that tells when it is done."""

    __slots__ = ()

    def _poll(self) -> bool:
        comm: Any = self.comm
        if not self.done:
            comm.observer.looks(comm.world_rank, comm.clock())
        return super()._poll()

    def _finish(self) -> None:
        super()._finish()
        comm: Any = self.comm
        # The k-th message of a channel goes to its k-th receive.
        message = comm.observer._under_way[comm.context, comm.members[self.peer], comm.world_rank, self.tag].popleft()
        message.received = comm.clock()
        comm.observer.messages.append(message)
        comm.observer.receives(message)


# -- where in the source --------------------------------------------------------------------------------------------


def step_here() -> Step:
    """The step of the algorithm that is sending: the innermost function that is not about sending in general."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and file_of(frame.f_code).startswith(BETWEEN):
        frame = frame.f_back
    assert frame is not None
    return step_at(frame.f_code, frame.f_lineno, frame.f_globals.get(frame.f_code.co_name))


@cache
def step_at(code: CodeType, line: int, function: Any) -> Step:
    """The last comment of a function before the line, "# 1. …" as a rule; else the first line of its docstring."""
    lines = getlines(code.co_filename)
    words = (getdoc(function) or "").partition("\n")[0]
    number = min(line - 1, len(lines))
    while number > code.co_firstlineno:
        block, number = _comment_above(lines, number)
        if block:
            words = block
            break
    return Step(code.co_name, words, file_of(code), line)


@cache
def file_of(code: CodeType) -> str:
    """ "collectives/ring.py"; of what is not in this package, its name alone, after a slash."""
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else f"/{path.name}"


def _comment_above(lines: list[str], number: int) -> tuple[str, int]:
    """The comment that ends in line `number`, if there is one, up to its invariant; and the line above it."""
    block: list[str] = []
    while lines[number - 1].strip().startswith("# "):
        block.insert(0, lines[number - 1].strip().lstrip("# "))
        number -= 1
    text = " ".join(block).partition("Invariant:")[0].strip()
    return text, number - (not block)
