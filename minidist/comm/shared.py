"""Memory that all ranks of a communicator read and write alike, where they run on one host.

Ranks take turns by flags: a rank raises its flag of a phase when what it has written may be read, and waits until all
have raised theirs. A flag is a number: what the rank claims (the same on all, or something is wrong), and one bit. In
each phase two places take turns, and nobody raises the second flag after this one before we have raised the next: so
what stands in a place is this flag or the one before it there, and one bit tells which. Each rank's flags are in cache
lines of their own.
Source: Hoefler et al. 2013, "MPI + MPI: a new hybrid approach to parallel programming with MPI plus shared memory".
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .waiting import PolledRequest

if TYPE_CHECKING:
    from .mpi import MpiCommunicator

PHASES = 2
LINE = 8  # int64 of a cache line
MOST_VIEWS = 100  # that are kept: making them takes longer than adding short arrays


class SharedMemory:
    """`slots[r]`: the bytes that rank r writes. `common`: bytes of which each rank writes its part.

    It is a file, in memory where the system has a place for such files: rank 0 creates it, the others attach to it, and
    when all have, rank 0 removes its name. So nothing is left behind by whatever happens later, and the memory goes
    when the last of them lets go of it.
    """

    def __init__(self, comm: MpiCommunicator, slot: int, common: int, sync: Callable[[], None]):
        """`sync` orders what one rank writes for the others."""
        self.comm, self.sync = comm, sync
        self._sizes = [PHASES * comm.size * LINE * 8, *[slot] * comm.size, common]
        lines = [range(phase * comm.size * LINE, (phase + 1) * comm.size * LINE, LINE) for phase in range(PHASES)]
        self._places = [[[line + turn for line in of_phase] for turn in (0, 1)] for of_phase in lines]  # of flags
        self.is_open = False
        self.counts = [1] * PHASES  # flags raised, and 1 so that the first is not 0; the same on all ranks
        self.broken = ""  # why it is of no use any more
        self.called = 0  # operations that use it, so far
        self.over = 0  # of these, those that have ended
        self._views: dict[tuple[int, int, np.dtype], tuple[list[np.ndarray], np.ndarray]] = {}

    def create(self) -> str:
        """On one rank: make the file, filled with zeros; returns its path. Errors  OSError: there is no room"""
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        file, path = tempfile.mkstemp(prefix="minidist-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, sum(self._sizes))  # or the first to write would be killed
            else:
                os.ftruncate(file, sum(self._sizes))
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(file)
        return path

    def attach(self, path: str) -> None:
        """See the file as memory. Errors  OSError"""
        file = os.open(path, os.O_RDWR)
        try:
            memory = np.frombuffer(mmap.mmap(file, sum(self._sizes)), np.uint8)
        finally:
            os.close(file)
        flags, *self.slots, self.common = np.split(memory, np.cumsum(self._sizes)[:-1])
        self._flags: Any = memoryview(flags.view(np.int64))  # type: ignore[arg-type]
        self.is_open = True

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

    def raise_flag(self, phase: int, claim: int, tag: int) -> FlagsRaised:
        """What this rank has written may be read. Returns what is done when all have raised theirs.

        `claim`: a number from 0 up, which all ranks should have in common; the request's `claims` are theirs if they
        have not. `tag` of the operation, for reports
        """
        self.sync()
        return FlagsRaised(self, phase, claim, tag)


class SharedRequest(PolledRequest):
    """Something that a rank waits for by looking at memory."""

    __slots__ = ("memory", "comm", "tag")

    def __init__(self, memory: SharedMemory, tag: int):
        self.memory, self.comm, self.tag = memory, memory.comm, tag
        self.entry = self.message = None

    def peers(self) -> list[int]:
        """World ranks it waits for."""
        return self.comm.members

    def wait_long(self, timeout: float | None) -> None:
        poll, comm = self._poll, self.comm

        def poll_and_drive() -> bool:
            comm.drive()  # looking at memory does not, and another rank may first need a message of ours to come along
            return poll()

        comm.wait_for(poll_and_drive, self.peers(), timeout, self)


class FlagsRaised(SharedRequest):
    """All ranks' flags of a phase."""

    __slots__ = ("_flag", "_places", "claims")

    def __init__(self, memory: SharedMemory, phase: int, claim: int, tag: int):
        super().__init__(memory, tag)
        memory.counts[phase] += 1
        number = memory.counts[phase]
        self._flag, self._places = claim << 1 | number >> 1 & 1, memory._places[phase][number & 1]
        memory._flags[self._places[memory.comm.rank]] = self._flag
        self.claims: list[int] | None = None

    def _poll(self) -> bool:
        flags, flag, differ = self.memory._flags, self._flag, False
        for place in self._places:
            raised = flags[place]
            if raised != flag:
                if (raised ^ flag) & 1:
                    return False
                differ = True
        self.memory.sync()
        if differ:
            self.claims = [flags[place] >> 1 for place in self._places]
        return True

    def _missing(self) -> list[int]:
        """Ranks that have not raised theirs."""
        bit, flags = self._flag & 1, self.memory._flags
        return [rank for rank, place in enumerate(self._places) if flags[place] & 1 != bit]

    def peers(self) -> list[int]:
        return [self.comm.members[rank] for rank in self._missing()]

    def __str__(self) -> str:
        return "others to write to the shared memory"


class Turn(SharedRequest):
    """This rank's operations use the memory one after the other, in the order in which they were called."""

    __slots__ = ("_number",)

    def __init__(self, memory: SharedMemory, tag: int, number: int):
        super().__init__(memory, tag)
        self._number = number

    def _poll(self) -> bool:
        return self.memory.over == self._number

    def peers(self) -> list[int]:
        return [self.comm.members[self.comm.rank]]  # itself

    def __str__(self) -> str:
        return "the operation before it to leave the shared memory"
