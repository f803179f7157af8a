"""The flight record: what a rank has done last, kept at all times, for the day when something hangs.

`comm.record` is the same object on all of a rank's communicators. To see what the rank has been doing:

    print(comm.record.table())
    comm.record.operations()[-1].nbytes

Each send, receive and collective is an entry, begun when it is called and ended when it is done (the messages that a
collective consists of are not entries). The record keeps the last LENGTH of them: some 60 KB, and no array. An entry
costs about 0.3 us, so it is a bare list while it is written, and gets names when read. It may be read while another
thread writes it.

Who wants to see more than the last operations, as it happens, is a `Listener`: `comm.record.listeners` is who is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from .where import shortened

if TYPE_CHECKING:
    from ..backend import Array
    from .base import Communicator

LENGTH = 256
START, END = 8, 9  # where in an entry its start and end stand

Entry = list[Any]  # the fields of Operation, in its order


class Operation(NamedTuple):
    """One entry of a flight record."""

    number: int  # counted from 1, over all the rank has done
    kind: str  # "send", "receive", or the collective and its algorithm: "all_reduce ring"
    group: Communicator  # on which communicator
    peer: int | None  # rank in the group that it is sent to or received from, or root; None where all take part
    nbytes: int
    dtype: Any
    tag: int
    label: str  # the step of the program, as `Communicator.step` names it
    start: float  # seconds of the communicator's clock
    end: float | None  # None while it is under way

    def __str__(self) -> str:
        """ "receive from rank 1, tag 3, 40 bytes float64"; or "all_reduce ring, 400 bytes float32"."""
        size = f"{self.nbytes:,} bytes {self.dtype}"
        if self.kind in DIRECTIONS:
            return f"{self.kind} {DIRECTIONS[self.kind]} rank {self.peer}, tag {self.tag}, {size}"
        return f"{self.kind}{'' if self.peer is None else f' with root {self.peer}'}, {size}"


DIRECTIONS = {"send": "to", "receive": "from"}  # of the kinds that are messages; all others are collectives


class Waiting(NamedTuple):
    """What a rank waits for at this moment."""

    what: object  # a Request, or words
    peers: list[int]  # the ranks of the world that it depends on; one of them is enough if the wait is for any
    since: float  # seconds of the communicator's clock


# A message that has been started: "s" (sent) or "r" (received), on which communicator, to or from which rank of the
# world, with which tag, bytes, and its start and end, seconds of the clock (end None while it is under way).
Message = list[Any]
MESSAGE_END = 6


class Listener:
    """Who is told what a rank does: a recorder of timelines, a narrator. A subclass overrides what it wants to know.

    Times are seconds of the communicator's clock.
    """

    def began(self, entry: Entry) -> None:
        """An operation has been called. The entry's end is filled in when it is done."""

    def ended(self, entry: Entry) -> None: ...

    def message(self, message: Message) -> None:
        """A message has been started, of an operation or inside of a collective. Its end is filled in."""

    def waited(self, start: float, end: float) -> None:
        """The program could do nothing but wait for other ranks. A longer wait may follow of which this was a part."""

    def step_began(self, label: str) -> None:
        """Until the call of step_ended that belongs to this, the rank is in this step of the program."""

    def step_ended(self, label: str) -> None: ...

    def mark(self, label: str, words: str) -> None:
        """A step of the document that takes no time worth telling: what was decided in it."""

    def value(self, name: str, number: float) -> None:
        """A number that changes as the program goes on: a loss, bytes in use."""

    def fact(self, kind: str, fields: tuple[Any, ...]) -> None:
        """Something else. "schedule": a pipeline's (name, stages, microbatches, chunks). "action": what a pipeline
        has done, (kind, micro, chunk, start, ready, end)."""


class FlightRecord:
    """One rank's last LENGTH operations, over all its communicators, and what it waits for now."""

    def __init__(self, clock: Callable[[], float]):
        self.label = ""  # the step of the program that the next operation belongs to
        # The fields of Waiting, bare for the same reason. None: it does not wait. (Simulated ranks do not note this.)
        self.waiting: tuple[object, list[int], float] | None = None
        self.clock = clock
        self.sent_bytes = self.sent_messages = 0  # by all of this rank's communicators, collectives included
        self.listeners: tuple[Listener, ...] = ()
        self._count = 0
        self._groups: dict[tuple[int, ...], int] = {}
        self._entries: deque[Entry] = deque(maxlen=LENGTH)

    def begin(self, kind: str, group: Communicator, peer: int | None, array: Array, tag: int) -> Entry:
        """Note that an operation has been called; `end` it when it is done."""
        self._count += 1
        entry = [self._count, kind, group, peer, array.nbytes, array.dtype, tag, self.label, self.clock(), None]
        self._entries.append(entry)
        for listener in self.listeners:
            listener.began(entry)
        return entry

    def end(self, entry: Entry) -> None:
        """Note that an operation is done."""
        entry[END] = self.clock()
        for listener in self.listeners:
            listener.ended(entry)

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """In here `listener` too is told what the rank does."""
        self.listeners = (*self.listeners, listener)
        try:
            yield
        finally:
            self.listeners = tuple(one for one in self.listeners if one is not listener)

    def message(self, direction: str, group: Communicator, peer: int, tag: int, nbytes: int) -> Message:
        """Tell of a message that is about to be started; whoever finishes it fills in its end."""
        message = [direction, group, peer, tag, nbytes, self.clock(), None]
        for listener in self.listeners:
            listener.message(message)
        return message

    def waited(self, start: float) -> None:
        """Tell that the program has waited since `start`."""
        end = self.clock()
        if end > start:
            for listener in self.listeners:
                listener.waited(start, end)

    def name_group(self, members: Sequence[int]) -> str:
        """A name for a new communicator of these ranks of the world, the same on all of them: "0,2", "0,2 #2", …

        Ranks that are together in two communicators have made them in the same order.
        """
        key = tuple(members)
        number = self._groups[key] = self._groups.get(key, 0) + 1
        return shortened(key).replace(", ", ",") + f" #{number}" * (number > 1)

    def operations(self) -> list[Operation]:
        """The last LENGTH operations, oldest first."""
        return [Operation(*entry) for entry in self._entries.copy()]

    def table(self) -> str:
        """The operations as text, a line each, oldest first. Times start at 0 with the oldest."""
        operations = self.operations()
        if not operations:
            return "nothing sent, received or combined so far"
        zero = operations[0].start
        rows: list[tuple[str, ...]] = [("number", "start s", "took ms", "step", "operation", "ranks")]
        for op in operations:
            took = "under way" if op.end is None else f"{(op.end - op.start) * 1e3:.3f}"
            rows.append((str(op.number), f"{op.start - zero:.6f}", took, op.label, str(op), ranks_of(op.group)))
        return "\n".join(aligned(rows, right=3))


def ranks_of(group: Communicator) -> str:
    """The world's numbers of a communicator's ranks: "0, 2, 4"."""
    return shortened(getattr(group, "members", range(group.size)))


def aligned(rows: list[tuple[str, ...]], right: int = 0) -> list[str]:
    """Lines of a table: columns two spaces apart, the first `right` of them flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.rjust] * right + [str.ljust] * (len(widths) - right)
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths)).rstrip() for row in rows]
