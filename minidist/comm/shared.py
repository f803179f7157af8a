"""Memory that all ranks of a communicator read and write alike, where they run on one host.

Ranks take turns by flags: a rank raises its flag of a phase when what it has written may be read, and waits until all
have raised theirs. Flags are counters that only grow, in cache lines of their own.
Source: Hoefler et al. 2013, "MPI + MPI: a new hybrid approach to parallel programming with MPI plus shared memory".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Request
from .waiting import FIRST_TESTS, FIRST_TURNS, give_way

if TYPE_CHECKING:
    from .mpi import MpiCommunicator

PHASES = 2
LINE = 8  # int64 of a cache line
MOST_VIEWS = 100  # that are kept: making them takes longer than adding short arrays


class SharedMemory:
    """`slots[r]`: the bytes that rank r writes. `common`: bytes of which each rank writes its part."""

    def __init__(self, comm: MpiCommunicator, memory: np.ndarray, slot: int, common: int, sync: Callable[[], None]):
        """`memory` (nbytes(...),) uint8, the same on all ranks; `sync` orders what one rank writes for the others."""
        self.comm, self.sync = comm, sync
        flags, rest = np.split(memory, [PHASES * comm.size * LINE * 8])
        self._flags: Any = memoryview(flags.view(np.int64))  # type: ignore[arg-type]
        self.slots = [rest[rank * slot : (rank + 1) * slot] for rank in range(comm.size)]
        self.common = rest[comm.size * slot :][:common]
        self.count = 0  # exchanges begun by this rank; the same on all, since all take part in each
        self.broken = ""  # why it is of no use any more
        self.called = 0  # operations that use it, so far
        self.over = 0  # of these, those that have ended
        self._views: dict[tuple[int, int, np.dtype], tuple[list[np.ndarray], np.ndarray]] = {}

    @staticmethod
    def nbytes(size: int, slot: int, common: int) -> int:
        """So much memory is needed."""
        return PHASES * size * LINE * 8 + size * slot + common

    def like(self, array: np.ndarray, start: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
        """(the slots from byte `start` on, the common memory), each as an array of this one's length and dtype."""
        key = start, array.size, array.dtype
        views = self._views.get(key)
        if views is None:
            if len(self._views) > MOST_VIEWS:
                self._views.clear()
            parts = [memory[start : start + array.nbytes].view(array.dtype) for memory in (*self.slots, self.common)]
            views = self._views[key] = parts[:-1], parts[-1]
        return views

    def raise_flag(self, phase: int, *claim: int) -> None:
        """What this rank has written in exchange `count` may be read. `claim`: two numbers that must agree."""
        at = (phase * self.comm.size + self.comm.rank) * LINE
        if claim:
            here = at + 1 + 2 * (self.count % 2)  # the others may not yet have read the one before
            self._flags[here], self._flags[here + 1] = claim
        self.sync()
        self._flags[at] = self.count

    def claims(self, phase: int) -> list[tuple[int, int]]:
        """What the ranks have claimed in exchange `count`; to be read after all have raised their flag."""
        first = phase * self.comm.size
        places = [(first + rank) * LINE + 1 + 2 * (self.count % 2) for rank in range(self.comm.size)]
        return [(self._flags[at], self._flags[at + 1]) for at in places]

    def raised_by_all(self, phase: int, tag: int) -> Request:
        """Done when all ranks have raised their flag of exchange `count`. `tag` of the operation, for reports."""
        return FlagsRaised(self, phase, tag)


class SharedRequest(Request):
    """Something that a rank waits for by looking at memory."""

    __slots__ = ("memory", "comm", "tag")

    def __init__(self, memory: SharedMemory, tag: int):
        self.memory, self.comm, self.tag, self.entry = memory, memory.comm, tag, None

    def peers(self) -> list[int]:
        """World ranks it waits for."""
        return self.comm.members

    def wait(self, timeout: float | None = None) -> None:
        poll, comm = self._poll, self.comm
        if not comm.in_flight:
            for _ in range(FIRST_TURNS):
                for _ in range(FIRST_TESTS):
                    if poll():
                        return
                give_way()

        def poll_and_drive() -> bool:
            comm.drive()  # looking at memory does not, and another rank may first need a message of ours to come along
            return poll()

        comm.wait_for(poll_and_drive, self.peers(), timeout, self)


class FlagsRaised(SharedRequest):
    """All ranks' flags of a phase."""

    __slots__ = ("_next", "_number", "_first")

    def __init__(self, memory: SharedMemory, phase: int, tag: int):
        self.memory, self.comm, self.tag, self.entry = memory, memory.comm, tag, None
        self._next, self._number = 0, memory.count  # the ranks before `_next` have raised theirs
        self._first = phase * memory.comm.size

    def _poll(self) -> bool:
        memory, number, first = self.memory, self._number, self._first
        flags, size = memory._flags, memory.comm.size
        while self._next < size:
            if flags[(first + self._next) * LINE] < number:
                return False
            self._next += 1
        memory.sync()
        return True

    def peers(self) -> list[int]:
        flags, ranks = self.memory._flags, range(self.comm.size)
        return [self.comm.members[r] for r in ranks if flags[(self._first + r) * LINE] < self._number]

    def __str__(self) -> str:
        return "others to write to the shared memory"


class Turn(SharedRequest):
    """This rank's operations use the memory one after the other, in the order in which they were called."""

    __slots__ = ("_number",)

    def __init__(self, memory: SharedMemory, tag: int):
        super().__init__(memory, tag)
        self._number = memory.called
        memory.called += 1

    def _poll(self) -> bool:
        return self.memory.over == self._number

    def __str__(self) -> str:
        return "the operation before it to leave the shared memory"
