"""How messages travel: short ones together in a parcel, a long body on its own, straight to where it is wanted.

    parcel    header | body | header | header | body ...     one MPI message; bodies of up to SHORT bytes, padded to 8
    body      the MPI message behind a parcel whose last header announces it

What is said to a rank is gathered until `flush`, so that many small requests cost one MPI message. A parcel is read
header by header; where one is not understood, the rest of its parcel is thrown away and the sender is told. Nothing is
waited for but the next message: who announces a body and does not send it, or stops half-way, holds up nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from ...backend import Array, copy_into
from ...comm import Communicator, PeerEnded, PeerFailed, Request
from .messages import HEADER, LARGEST, MAGIC, NBYTES, VERSION, Code, Kind, Message, Refused, check, unpack

TAG = 31900
SHORT = 1 << 12  # bytes of the longest body inside a parcel
FULL = 1 << 16  # bytes: a parcel of this length is sent at once

PACK = HEADER.pack
PADDING = [bytes(-n % 8) for n in range(8)]

Item = tuple[int, Message, Any]  # source, header, body (None: there is none)
Room = Callable[[int, Message], Array]  # where a long body is to be put; raises Refused


class Sending:
    """A message on its way."""

    __slots__ = ("memory", "request")

    def __init__(self, request: Request | None, memory: Any):
        self.request, self.memory = request, memory  # None: it has left, or nobody will ever receive it

    def done(self) -> bool:
        """Whether it has left."""
        try:
            if self.request is not None and self.request._poll():
                self.request = None
        except PeerFailed:
            self.request = None
        return self.request is None

    def wait(self, timeout: float) -> None:
        """Wait until it has left, or for so many seconds."""
        with suppress(TimeoutError, PeerEnded):
            if self.request is not None:
                self.request.wait(timeout)
                self.request = None


class Post:
    """One rank's end.

    room      room(source, message) gives the array for a long body, or raises Refused
    patience  seconds to wait for the rest of a message that has begun to arrive
    """

    def __init__(self, comm: Communicator, room: Room, patience: float):
        self.comm, self.room, self.patience = comm, room, patience
        self.sent_bytes = self.received_bytes = 0
        self._parcels: dict[int, bytearray] = {}
        self._sending: deque[Sending] = deque()
        self._expected: dict[int, tuple[Message, Array | None]] = {}  # of each source: a body it has announced
        self._stalled: dict[int, deque[tuple[Request, Array]]] = {}  # of each source: messages that stopped half-way
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
    ) -> Sending | None:
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
        while self._sending and self._sending[0].done():
            self._sending.popleft()

    def _send_parcel(self, dest: int) -> None:
        self._isend(np.frombuffer(self._parcels.pop(dest), np.uint8), dest)

    def _isend(self, raw: Array, dest: int) -> Sending:
        self.sent_bytes += raw.nbytes
        try:
            sending = Sending(self.comm.isend(raw, dest, TAG), raw)
        except PeerFailed:  # who counts on an answer hears of the death from the scheduler
            sending = Sending(None, None)
        self._sending.append(sending)
        return sending

    def finish(self, patience: float) -> None:
        """Wait until all has been sent, but not for ever: who is dead receives no more."""
        self.flush()
        until = self.comm.clock() + patience
        for sending in self._sending:
            sending.wait(max(until - self.comm.clock(), 0.0))

    def refuse(self, dest: int, message: Message | None, refused: Refused) -> None:
        """Tell a rank that its message is not taken, and why. (Not a refusal: that would go on for ever.)"""
        number = 0
        if message is not None:
            if message.kind == Kind.REFUSED:
                return
            number = message.number if 0 <= message.number < LARGEST else 0
        self.send(dest, Kind.REFUSED, str(refused).encode()[:SHORT], number=number, start=int(refused.code))

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = 0.0) -> Item | None:
        """The next message; None if none has come after `timeout` seconds (None: the communicator's deadline)."""
        while not self._inbox:
            if self._stalled:
                self._look_after_stalled()
                timeout = min(timeout, self.patience) if timeout is not None else self.patience
                if self._inbox:
                    break
            try:
                found = self.comm.probe(None, TAG, timeout)
            except TimeoutError:
                if timeout is None:
                    raise
                return None
            with suppress(PeerFailed):  # it died while it was talking
                self._take(found.source, found.nbytes)
            if not self._inbox:
                self.flush()  # what was refused in there
        return self._inbox.popleft()

    def next(self) -> Item | None:
        """The next message of those that were received with the last one."""
        return self._inbox.popleft() if self._inbox else None

    def _take(self, source: int, nbytes: int) -> None:
        """Receive one MPI message: an announced body, straight to its place, or a parcel.

        A rank may die or be cut off between the two halves of a message. Then it is left aside, with what comes from
        there behind it, and the others are served.
        """
        stalled = self._stalled.get(source)
        message, room = self._expected.get(source, (None, None))
        straight = stalled is None and message is not None and room is not None and nbytes == message.length
        buffer: Any = np.empty(nbytes, np.uint8) if not straight else room.reshape(-1).view(np.uint8)  # type: ignore
        request = self.comm.irecv(buffer, source, TAG)
        if stalled is not None:
            stalled.append((request, buffer))
            return
        try:
            request.wait(self.patience)
        except TimeoutError:
            self._stalled[source] = deque([(request, buffer)])
        else:
            self._has_come(source, buffer, straight)

    def _look_after_stalled(self) -> None:
        for source, waiting in tuple(self._stalled.items()):
            try:
                while waiting and waiting[0][0].test():
                    self._has_come(source, waiting.popleft()[1], False)
            except PeerFailed:
                waiting.clear()
            if not waiting:
                del self._stalled[source]

    def _has_come(self, source: int, buffer: Array, straight: bool) -> None:
        self.received_bytes += buffer.nbytes
        if source not in self._expected:
            self._read(source, buffer)
            return
        message, room = self._expected.pop(source)
        if room is None:
            return  # refused already
        if buffer.nbytes != message.length:
            text = f"a body of {buffer.nbytes} bytes behind a header that announces {message.length}"
            self.refuse(source, message, Refused(Code.WRONG_LENGTH, text))
            return
        if not straight:
            copy_into(room.reshape(-1).view(np.uint8), buffer)
        self._inbox.append((source, message, room))

    def _read(self, source: int, parcel: np.ndarray) -> None:
        """Take a parcel apart."""
        at, end = 0, len(parcel)
        message = None
        try:
            while at < end:
                message = None
                message = unpack(parcel, at)
                check(message)
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
