"""`Communicator` over an MPI whose job outlives its ranks; see deaths.py. Other jobs know nothing of this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..backend import Array
from .base import Communicator, Envelope, Request
from .deaths import PeerFailed
from .endings import Endings
from .mpi import MPI, MpiCommunicator
from .native import Native
from .status import place_in


class SurvivingCommunicator(MpiCommunicator):
    """An MpiCommunicator that tells deaths from other errors of MPI's, and goes on after them."""

    survives = True

    def __init__(self, comm: MPI.Comm, endings: Endings, parent: MpiCommunicator | None = None):
        super().__init__(comm, endings, parent)
        self._known: frozenset[int] = frozenset()  # the world's dead, and which of our ranks they are
        self._failed: frozenset[int] = frozenset()

    def failed(self) -> frozenset[int]:
        dead = self.endings.deaths.look()
        if dead is not self._known:
            self._failed = frozenset(rank for rank, member in enumerate(self.members) if member in dead)
            self._known = dead
        return self._failed

    # -- messages: a small one to a dead rank would be taken for sent, so nobody starts one ---------------------------

    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        what = f"send to rank {dest}, tag {tag}, {array.nbytes} bytes"
        with self._deaths_told([self.members[dest]], what):
            return super()._isend(array, dest, tag)

    def _irecv(self, array: Array, source: int, tag: int) -> Request:
        what = f"receive from rank {source}, tag {tag}, {array.nbytes} bytes"
        with self._deaths_told([self.members[source]], what):
            return super()._irecv(array, source, tag)

    def _iprobe(self, source: int | None, tag: int) -> Envelope | None:
        if source is not None:
            with self._deaths_told([self.members[source]], f"a message from {source}, tag {tag}"):
                return super()._iprobe(source, tag)
        status = self._status
        while self.endings.deaths.iprobe(self.mpi, MPI.ANY_SOURCE, tag, status):
            if status.source not in self.failed():
                return Envelope(status.source, tag, status.Get_count(MPI.BYTE))
            self.endings.deaths.drop(self.mpi, status.source, tag)
        return None

    def drive(self) -> None:
        self.endings.deaths.iprobe(self.mpi, MPI.ANY_SOURCE, 0, self._status)

    # -- what needs everyone ------------------------------------------------------------------------------------------

    def _split(self, color: int | None, key: int) -> Communicator | None:
        with self._deaths_told(self.members, f"split(color={color}, key={key})"):
            return super()._split(color, key)

    def _split_by_host(self) -> Communicator:
        with self._deaths_told(self.members, "split_by_host()"):
            return super()._split_by_host()

    def native(self, array: Array, op: str | None = None) -> Native:
        if self.failed():
            self._check_alive(self.members, "a collective of MPI's own")
        return super().native(array, op)

    # -- telling --------------------------------------------------------------------------------------------------

    def wait_for(
        self, test: Callable[[], bool], peers: list[int], timeout: float | None, what: object, anyone: bool = False
    ) -> None:
        try:
            super().wait_for(test, peers, timeout, what, anyone)
        except MPI.Exception as error:
            raise self.explained(error, peers, what) from None

    def explained(self, error: Exception, peers: list[int], what: object) -> Exception:
        deaths = self.endings.deaths
        if not deaths.are_told_by(error):
            return error
        gone = sorted(deaths.look().intersection(peers))
        return self._peer_failed(gone[0] if gone else None, what)

    @contextmanager
    def _deaths_told(self, peers: list[int], what: str) -> Iterator[None]:
        self._check_alive(peers, what)
        try:
            yield
        except MPI.Exception as error:
            raise self.explained(error, peers, what) from None

    def _check_alive(self, peers: list[int], what: str) -> None:
        gone = self.endings.deaths.look().intersection(peers)
        if gone:
            raise self._peer_failed(min(gone), what)

    def _peer_failed(self, gone: int | None, what: object) -> PeerFailed:
        me, size = self.endings.rank, self.endings.size
        who = "a rank" if gone is None else f"rank {gone}"
        return PeerFailed(
            f"{who} of {size} has died; rank {me} needs it: {what}, at {place_in(sys._getframe(1))}", gone
        )
