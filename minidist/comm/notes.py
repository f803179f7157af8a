"""Notes: what the ranks' endings and watchdogs tell one another, beside the program's own messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .deaths import Deaths

NOTHING = np.empty(0, np.uint8)


class Notes:
    """Messages of a kind and a few bytes, on a communicator of all ranks for them alone. `mpi` is mpi4py.MPI.

    That a rank has died disturbs nobody here: a note to it is lost, and so may be one from it. Where a job outlives its
    ranks, `end` reaches all others, and `on_end` is called there when they read.
    """

    def __init__(self, mpi: Any, comm: Any, deaths: Deaths, on_end: Callable[[], None] | None = None):
        self.mpi, self.comm, self.deaths, self._on_end = mpi, comm, deaths, on_end
        self._sending: list[tuple[np.ndarray, Any]] = []  # notes on their way, with their memory

    def send(self, rank: int, kind: int, note: np.ndarray = NOTHING) -> None:
        """Start sending `note` (uint8, at most 4000 bytes) to a rank."""
        try:
            self._sending.append((note, self.comm.Isend(note, rank, kind)))
        except self.mpi.Exception as error:
            self._heed(error)

    def sent(self) -> bool:
        """Whether all that can leave has left."""
        self._sending = [(note, request) for note, request in self._sending if not self._over(request)]
        return not self._sending

    def read(self) -> tuple[int, int, np.ndarray] | None:
        """(sender, kind, note) of the next that has arrived, if any."""
        arrived = self.mpi.Status()
        try:
            while self.deaths.iprobe(self.comm, self.mpi.ANY_SOURCE, self.mpi.ANY_TAG, arrived):
                sender, kind = arrived.source, arrived.tag
                note = np.empty(arrived.Get_count(self.mpi.BYTE), np.uint8)
                try:
                    self.comm.Recv(note, sender, kind)
                except self.mpi.Exception as error:
                    self._heed(error)
                    self.deaths.drop(self.comm, sender, kind)
                    continue
                return sender, kind, note
        except self.mpi.Exception as error:
            self._heed(error)
        return None

    def end(self) -> None:
        """Tell all ranks that the job is over; they hear of it in their next `read`."""
        self.comm.Revoke()  # the one message that ULFM delivers to all survivors, whoever dies meanwhile

    def _over(self, request: Any) -> bool:
        try:
            return request.Test()
        except self.mpi.Exception as error:
            self._heed(error)
            return True

    def _heed(self, error: Exception) -> None:
        """Pass over errors that mean a death; those that mean the end are acted on, all others raised."""
        if self.deaths.survives and error.Get_error_class() == self.mpi.ERR_REVOKED:  # type: ignore[attr-defined]
            if self._on_end is not None:
                self._on_end()
        elif not self.deaths.are_told_by(error):
            raise error
