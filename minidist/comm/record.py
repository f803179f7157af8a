"""The flight record: what a rank has done last, kept at all times, for the day when something hangs.

Each send, receive and collective is an entry, begun when it is called and ended when it is done. The record keeps the
last LENGTH of them. An entry costs about 0.3 us, so it is a bare list while it is written, and gets names when read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..backend import Array
    from .base import Communicator

LENGTH = 256
END = 9  # where in an entry its end stands

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


class FlightRecord:
    """One rank's last LENGTH operations, over all its communicators, and what it waits for now."""

    def __init__(self, clock: Callable[[], float]):
        self.label = ""
        self.waiting: object = None  # what this rank waits for at the moment
        self.waiting_since = 0.0
        self._clock = clock
        self._count = 0
        self._entries: deque[Entry] = deque(maxlen=LENGTH)

    def begin(self, kind: str, group: Communicator, peer: int | None, array: Array, tag: int) -> Entry:
        """Note that an operation has been called; `end` it when it is done."""
        self._count += 1
        entry = [self._count, kind, group, peer, array.nbytes, array.dtype, tag, self.label, self._clock(), None]
        self._entries.append(entry)
        return entry

    def end(self, entry: Entry) -> None:
        """Note that an operation is done."""
        entry[END] = self._clock()

    def operations(self) -> list[Operation]:
        """The last LENGTH operations, oldest first."""
        return [Operation(*entry) for entry in self._entries]
