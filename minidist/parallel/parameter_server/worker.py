"""The worker: what it asks of servers and scheduler, and how it waits.

    pushed = worker.push(key, gradient)          # at once; the array is left alone until it is acknowledged
    pulled = worker.pull(key, into)
    worker.wait(pushed, pulled)

Any number of requests may be on their way. What a server refuses is raised by the `wait` for it. If a server dies, all
that it has not answered goes to its successor, pushes with the numbers that they had, so that none counts twice.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ... import backend
from ...backend import Array
from ...comm import Communicator, PeerEnded
from .keys import Layout, Roles
from .membership import View, first_view
from .messages import NAMES, Code, Kind, Message, Refused, refusal
from .post import Post

ABOUT_KEYS = frozenset((Kind.PULL, Kind.PULL_ROWS, Kind.PUSH, Kind.PUSH_ROWS))
ANSWERS = frozenset((Kind.VALUES, Kind.ACK, Kind.DEAL, Kind.RELEASE, Kind.VIEW))


class Request:
    """Something that was asked, and not answered yet."""

    __slots__ = ("answer", "dest", "into", "said")

    def __init__(self, dest: int, said: tuple[Any, ...], into: Any):
        self.dest, self.said, self.into = dest, said, into  # said: the arguments of Post.send behind `dest`
        self.answer: Any = None  # the message; or Refused


class Worker:
    """One worker's end.

    waited     seconds in which it could do nothing but wait
    versions   of each key, the version of the values that it pulled last
    heartbeat  seconds after which a worker that waits, or calls `beat`, gives a sign of life
    """

    def __init__(self, comm: Communicator, roles: Roles, layout: Layout, heartbeat: float):
        self.comm, self.roles, self.layout, self.heartbeat = comm, roles, layout, heartbeat
        self.post = Post(comm, self.room, heartbeat / 8)
        self.view = first_view(roles)
        self.heads = list(roles.server_ranks)  # of each shard, the rank that serves it
        self.requests: dict[int, Request] = {}
        self.versions = [0] * len(layout.keys)
        self.pushes = [0] * len(layout.keys)  # of each key, how often it was pushed: the clock, where none is given
        self.first = 0  # clock at which it takes part
        self.waited = 0.0
        self._number = 0
        self._errors: list[Refused] = []  # of messages that nobody waits for
        self._registering = False
        self._beat = comm.clock()

    # -- values ---------------------------------------------------------------------------------------------------

    def pull(self, key: int, into: Array, clock: int = 0, start: int = 0) -> int:
        """Ask for the values start … start + into.size of a key, which `into` is filled with. Returns a
        number to wait for.

        clock  the worker's; the answer comes when the consistency allows values for it
        """
        return self._ask(self._head(key), Kind.PULL, None, into, key, 0, clock, start, into.size)

    def pull_rows(self, key: int, rows: np.ndarray, into: Array, clock: int = 0) -> int:
        """Ask for some rows of a key: rows (n,) int64 -> into (n, width)."""
        rows = np.ascontiguousarray(rows, np.int64)
        return self._ask(self._head(key), Kind.PULL_ROWS, rows, into, key, 0, clock, 0, len(rows))

    def push(
        self, key: int, gradient: Array | None, clock: int | None = None, start: int = 0, weight: float = 1.0
    ) -> int:
        """Send a gradient (None: none this time). It is acknowledged when it is in the values, and in all copies.

        gradient  (n,) of the key's dtype, for the elements start … start + n; unchanged until it is acknowledged
        clock     the worker's; None: as many as it has pushed to this key
        weight    samples behind it
        """
        if gradient is None:
            return self._push(key, Kind.PUSH, None, 0, clock, 0, 0, weight)
        return self._push(key, Kind.PUSH, gradient, ord(gradient.dtype.char), clock, start, gradient.size, weight)

    def push_rows(
        self, key: int, rows: np.ndarray, gradient: Array, clock: int | None = None, weight: float = 1.0
    ) -> int:
        """Send the gradient of some rows: rows (n,) int64, gradient (n, width); a row that stands twice is added up."""
        gradient = np.ascontiguousarray(backend.to_numpy(gradient))
        body = np.concatenate(
            [np.ascontiguousarray(rows, np.int64).view(np.uint8), gradient.reshape(-1).view(np.uint8)]
        )
        return self._push(key, Kind.PUSH_ROWS, body, ord(gradient.dtype.char), clock, 0, len(rows), weight)

    def _push(
        self, key: int, kind: int, body: Any, dtype: int, clock: int | None, start: int, size: int, weight: float
    ) -> int:
        stamp = 0
        if 0 <= key < len(self.pushes):  # a wrong one is the server's to refuse
            if clock is None:
                clock = self.pushes[key]
            self.pushes[key] = clock + 1
            stamp = self.versions[key]
        return self._ask(self._head(key), kind, body, None, key, dtype, clock or 0, start, size, stamp, weight)

    def _head(self, key: int) -> int:
        return self.heads[self.layout.keys[key].server if 0 <= key < len(self.layout.keys) else 0]

    # -- the run --------------------------------------------------------------------------------------------------

    def register(self) -> int:
        """Take part, from now on (or again): returns the clock to begin with."""
        self.requests.clear()
        self._errors.clear()
        self._registering, self._beat = True, self.comm.clock()
        self.wait(self._ask(self.roles.scheduler, Kind.REGISTER))
        self._registering = False
        self.first = self.view.workers[self.comm.rank]
        self.pushes = [self.first] * len(self.pushes)
        return self.first

    def clock(self, clock: int, samples: int = 0, seconds: float = 0.0) -> int:
        """Say that this worker has come to a clock, having computed so many samples in so many seconds.

        The answer is its share: the epoch in `stamp`, and start and size of a stretch of samples.
        """
        return self._ask(self.roles.scheduler, Kind.CLOCK, clock=clock, size=samples, weight=seconds)

    def barrier(self, numbers: Any = (), label: int = 0, epoch: int = 0) -> tuple[np.ndarray, int, int]:
        """Wait for all living workers; returns the sums of their numbers, and (which, of how many) this worker is.

        epoch  that of this worker's next share: who has joined in that epoch only is not waited for
        """
        mine = np.array(numbers, np.float64).reshape(-1)
        total = np.empty_like(mine)
        number = self._ask(self.roles.scheduler, Kind.BARRIER, mine, total, key=label, size=mine.size, stamp=epoch)
        message = self.wait(number)
        return total, message.start, message.size

    def leave(self, clock: int = 0) -> None:
        """Take part no longer."""
        self.wait(*self.requests)
        self._beat = math.inf  # no signs of life from here on
        self.wait(self._ask(self.roles.scheduler, Kind.LEAVE, clock=clock, weight=self.waited))
        self.post.finish(self.heartbeat)

    def beat(self, clock: int = 0) -> None:
        """Give a sign of life, if it is time to: for a worker that computes long."""
        now = self.comm.clock()
        if self.roles.scheduler in self.comm.failed():
            raise PeerEnded(f"rank {self.roles.scheduler}, the scheduler, has died; rank {self.comm.rank} works for it")
        if now - self._beat >= self.heartbeat:
            self._beat = now
            self.post.send(self.roles.scheduler, Kind.HEARTBEAT, clock=clock)
            self.post.flush()

    # -- asking and waiting ---------------------------------------------------------------------------------------

    def _ask(
        self,
        dest: int,
        kind: int,
        body: Any = None,
        into: Any = None,
        key: int = 0,
        dtype: int = 0,
        clock: int = 0,
        start: int = 0,
        size: int = 0,
        stamp: int = 0,
        weight: float = 0.0,
    ) -> int:
        self._number = number = self._number + 1
        said = (kind, body, key, dtype, number, clock, start, size, stamp, weight)
        self.requests[number] = Request(dest, said, into)
        self.post.send(dest, *said)
        return number

    def flush(self) -> None:
        """Let what was asked leave now. (Waiting does that too.)"""
        self.post.flush()

    def wait(self, *numbers: int) -> Any:
        """Wait until these requests are answered; returns the last answer's header.

        Errors  Refused: by whom it was asked of. Expelled: this worker was taken for dead. TimeoutError: no answer
                after the communicator's `timeout`, with signs of life in between
        """
        self.post.flush()
        start = None
        requests = self.requests
        message = None
        for number in numbers:
            request = requests.get(number)
            if request is None:
                continue
            while request.answer is None and not self._errors:
                if start is None:
                    start = self.comm.clock()
                self._wait(start, request)
            if self._errors:
                raise self._errors.pop(0)
            del requests[number]
            message = request.answer
            if isinstance(message, Refused):
                self._count(start)
                raise message
        self._count(start)
        return message

    def _count(self, start: float | None) -> None:
        if start is not None:
            self.waited += self.comm.clock() - start

    def _wait(self, start: float, request: Request) -> None:
        """Wait for one message; give signs of life."""
        waited = self.comm.clock() - start
        if waited >= self.comm.timeout:
            raise TimeoutError(
                f"rank {self.comm.rank} has waited {waited:g} s for rank {request.dest} to answer its "
                f"{NAMES[request.said[0]]} of key {request.said[2]}, clock {request.said[5]}"
            )
        self._take(max(min(self.heartbeat, self.comm.timeout - waited), 1e-3))
        self.beat()

    def poll(self) -> None:
        """Take in what has come, without waiting."""
        while self._take(0.0):
            pass

    def _take(self, timeout: float) -> bool:
        """Take in one message, if one comes."""
        item = self.post.receive(timeout)
        if item is None:
            return False
        source, message, body = item
        kind = message.kind
        request = self.requests.get(message.number)
        if kind == Kind.VIEW:
            self._change_view(source, message, body)
        elif kind == Kind.REFUSED:
            why = b"" if body is None else body.tobytes()
            error = refusal(message.start, f"rank {source} refused: {why.decode(errors='replace')}")
            if request is not None:
                request.answer = error
            elif message.number == 0 and (not self._registering or error.code == Code.OVER):
                self._errors.append(error)
            return True
        # (An answer may come twice, or from a server that is out of it and does not know.)
        if request is not None and source == request.dest and kind in ANSWERS:
            if body is not None and request.into is not None and body is not request.into:
                self._fill(request.into, body)
            if kind == Kind.VALUES:
                self.versions[message.key] = message.stamp
            request.answer, request.said = message, ()
        return True

    def _fill(self, into: Array, body: Array) -> None:
        values = body.view(into.dtype).reshape(into.shape)
        into[...] = values if isinstance(into, np.ndarray) else backend.to(values, backend.device_of(into))

    def room(self, source: int, message: Message) -> Array:
        """Where the values that come are to be put: where they are wanted."""
        request = self.requests.get(message.number)
        if request is None or request.into is None or source != request.dest or message.length != request.into.nbytes:
            if message.kind in ANSWERS:
                return np.empty(message.length, np.uint8)  # of a request that is answered: taken in, and forgotten
            raise Refused(Code.NO_ROLE, f"rank {self.comm.rank} is a worker: {message.name} is not for it")
        return request.into

    def _change_view(self, source: int, message: Message, body: Any) -> None:
        """Who takes part has changed: what a dead server has not answered goes to its successor."""
        if source != self.roles.scheduler or message.stamp <= self.view.number:
            return
        self.view = View.unpack(message.stamp, body)
        heads = [self.view.chain(shard, self.roles.copies)[0] for shard in range(self.roles.servers)]
        if heads == self.heads:
            return
        moved, self.heads = {shard for shard in range(len(heads)) if heads[shard] != self.heads[shard]}, heads
        for _, request in sorted(self.requests.items()):
            if request.answer is None and request.said[0] in ABOUT_KEYS:
                shard = self.layout.keys[request.said[2]].server
                if shard in moved:
                    request.dest = heads[shard]
                    self.post.send(request.dest, *request.said)
        self.post.flush()
