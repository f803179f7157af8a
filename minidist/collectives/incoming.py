"""Partial sums that come piece by piece from one rank: while one is added, the next arrives."""

from __future__ import annotations

from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction


class Incoming:
    """All pieces of an array, from one rank, in order. Asks for the first at once; takes the memory of two."""

    __slots__ = ("comm", "pieces", "source", "_scratch", "_receive")

    def __init__(self, comm: Lane, pieces: Chunks, source: int):
        self.comm, self.pieces, self.source = comm, pieces, source
        self._scratch = [comm.scratch_like(pieces[i]) for i in range(min(2, len(pieces)))]  # the first are the longest
        self._receive = comm.irecv(self._scratch[0], source)

    def fold(self, index: int, reduction: Reduction, theirs_first: bool = False) -> Steps:
        """Wait for piece `index`, ask for the one after it, and add this one to ours meanwhile."""
        mine = self.pieces[index]
        yield self._receive
        if index + 1 < len(self.pieces):
            after = self._scratch[(index + 1) % 2][: self.pieces[index + 1].size]
            self._receive = self.comm.irecv(after, self.source)
        self.comm.combine(mine, self._scratch[index % 2][: mine.size], reduction, theirs_first)
        if index + 1 == len(self.pieces):
            for memory in self._scratch:
                self.comm.give_back(memory)
