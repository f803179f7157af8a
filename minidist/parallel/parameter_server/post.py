"""How messages travel: short ones together in a parcel, a long body on its own, straight to where it is wanted.

    parcel    header | body | header | header | body ...     one MPI message; bodies of up to SHORT bytes, padded to 8
    body      the MPI message behind a parcel whose last header announces it

What is said to a rank is gathered until `flush`, so that many small requests cost one MPI message. A parcel is read
header by header; where one is not understood, the rest of its parcel is thrown away and the sender is told. Nothing is
waited for but the next message: who announces a body and does not send it holds up nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from ...backend import Array
from ...comm import Communicator, Request
from .messages import HEADER, MAGIC, NBYTES, VERSION, Code, Kind, Message, Refused, unpack

TAG = 31900
SHORT = 1 << 12  # bytes of the longest body inside a parcel
FULL = 1 << 16  # bytes: a parcel of this length is sent at once

PACK = HEADER.pack
PADDING = [bytes(-n % 8) for n in range(8)]

Item = tuple[int, Message, Any]  # source, header, body (None: there is none)
Room = Callable[[int, Message], Array]  # where a long body is to be put; raises Refused


class Post:
    """One rank's end. `room(source, message)` gives the array for a long body, or raises Refused."""

    def __init__(self, comm: Communicator, room: Room):
        self.comm, self.room = comm, room
        self.sent_bytes = self.received_bytes = 0
        self._parcels: dict[int, bytearray] = {}
        self._sending: deque[tuple[Request, Any]] = deque()  # on their way, with their memory
        self._expected: dict[int, tuple[Message, Array | None]] = {}  # of each source: a body it has announced
        self._inbox: deque[Item] = deque()

    # -- sending --------------------------------------------------------------------------------------------------

    def send(
        self,
        dest: int,
        kind: int,
        body: Any = None,
        key: int = 0,
        dtype: int = 0,
        number: int = 0,
        clock: int = 0,
        start: int = 0,
        size: int = 0,
        stamp: int = 0,
        weight: float = 0.0,
    ) -> Request | None:
        """Say something to a rank, at the next `flush`; a long body leaves now, and is not to change before it has.

        body  a contiguous array, or bytes. Returns what is done when a long body has left, else None
        """
        nbytes = 0 if body is None else len(body) if isinstance(body, bytes) else body.nbytes
        parcel = self._parcels.get(dest)
        if parcel is None:
            parcel = self._parcels[dest] = bytearray()
        parcel += PACK(MAGIC, VERSION, kind, key, dtype, number, clock, start, size, stamp, weight, nbytes)
        if nbytes > SHORT:
            self._send_parcel(dest)
            raw = np.frombuffer(body, np.uint8) if isinstance(body, bytes) else body.reshape(-1).view(np.uint8)
            return self._isend(raw, dest)
        if nbytes:
            parcel += body.data if isinstance(body, np.ndarray) else body if isinstance(body, bytes) else body.tobytes()
            parcel += PADDING[nbytes % 8]
        if len(parcel) >= FULL:
            self._send_parcel(dest)
        return None

    def flush(self) -> None:
        """Send what has gathered."""
        for dest in list(self._parcels):
            self._send_parcel(dest)
        while self._sending and self._sending[0][0]._poll():
            self._sending.popleft()

    def _send_parcel(self, dest: int) -> None:
        self._isend(np.frombuffer(self._parcels.pop(dest), np.uint8), dest)

    def _isend(self, raw: Array, dest: int) -> Request:
        self.sent_bytes += raw.nbytes
        request = self.comm.isend(raw, dest, TAG)
        self._sending.append((request, raw))
        return request

    def finish(self, patience: float) -> None:
        """Wait until all has been sent, but not for ever: who is dead receives no more."""
        self.flush()
        until = self.comm.clock() + patience
        for request, _ in self._sending:
            with suppress(TimeoutError):
                request.wait(max(until - self.comm.clock(), 0.0))

    def refuse(self, dest: int, message: Message | None, refused: Refused) -> None:
        """Tell a rank that its message is not taken, and why."""
        number = 0 if message is None else message.number
        self.send(dest, Kind.REFUSED, str(refused).encode()[:SHORT], number=number, start=int(refused.code))

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = 0.0) -> Item | None:
        """The next message; None if none has come after `timeout` seconds (None: the communicator's deadline)."""
        while not self._inbox:
            try:
                found = self.comm.probe(None, TAG, timeout)
            except TimeoutError:
                if timeout is None:
                    raise
                return None
            self._take(found.source, found.nbytes)
        return self._inbox.popleft()

    def _take(self, source: int, nbytes: int) -> None:
        """Receive one MPI message: an announced body, or a parcel."""
        self.received_bytes += nbytes
        expected = self._expected.pop(source, None)
        if expected is not None:
            message, room = expected
            if room is not None and nbytes == message.length:
                self.comm.recv(room.reshape(-1).view(np.uint8), source, TAG)
                self._inbox.append((source, message, room))
                return
            self.comm.recv(np.empty(nbytes, np.uint8), source, TAG)
            if room is not None:
                text = f"a body of {nbytes} bytes behind a header that announces {message.length}"
                self.refuse(source, message, Refused(Code.WRONG_LENGTH, text))
            return
        parcel = np.empty(nbytes, np.uint8)
        self.comm.recv(parcel, source, TAG)
        self._read(source, parcel)

    def _read(self, source: int, parcel: np.ndarray) -> None:
        """Take a parcel apart."""
        at, end = 0, len(parcel)
        message = None
        try:
            while at < end:
                message = None
                message = unpack(parcel, at)
                at += NBYTES
                if not message.length:
                    self._inbox.append((source, message, None))
                elif message.length <= SHORT:
                    if at + message.length > end:
                        text = f"a body of {end - at} bytes behind a header that announces {message.length}"
                        raise Refused(Code.WRONG_LENGTH, text)
                    self._inbox.append((source, message, parcel[at : at + message.length]))
                    at += message.length + -message.length % 8
                else:
                    # The body comes as a message of its own; whatever is wrong, it is not taken for a parcel.
                    self._expected[source] = (message, None)
                    self._expected[source] = (message, self.room(source, message))
                    if at < end:
                        text = f"{end - at} bytes behind a header that announces a body of its own"
                        raise Refused(Code.NOT_UNDERSTOOD, text)
        except Refused as refused:
            if source in self._expected and message is not None:
                self._expected[source] = (message, None)
            self.refuse(source, message, refused)
