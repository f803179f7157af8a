"""A rank that serves, as a server, as the scheduler, or as both: its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...backend import Array
from ...comm import Communicator, PeerEnded
from .keys import Roles
from .messages import NAMES, Code, Expelled, Kind, Message, Refused, RunOver
from .post import Post
from .scheduler import Scheduler
from .server import Handler, Server


class Node:
    """A rank that serves: as a server, as the scheduler, or as both. `run` is its loop."""

    def __init__(self, comm: Communicator, roles: Roles, heartbeat: float):
        self.comm, self.roles, self.heartbeat = comm, roles, heartbeat
        self.post = Post(comm, self.room, heartbeat / 8)
        self.server: Server | None = None
        self.scheduler: Scheduler | None = None
        self.handlers: dict[int, Handler] = {}
        self._beat = comm.clock()  # when it gave its last sign of life
        self._heard = comm.clock()  # when it heard of the scheduler last
        self._due = comm.clock()  # when to check next

    def room(self, source: int, message: Message) -> Array:
        """Where a long body is to be put."""
        if self.scheduler is not None and message.kind in (Kind.VALUES, Kind.BARRIER):
            return self.scheduler.room(source, message)
        if self.server is None:
            raise Refused(Code.NO_ROLE, f"rank {self.comm.rank} is no server")
        return self.server.room(source, message)

    def run(self, over: Callable[[], bool]) -> None:
        """Serve until `over()`."""
        for role in (self.scheduler, self.server):
            self.handlers.update({} if role is None else role.handlers)
        self.post.flush()
        while not over():
            # 1. Look who is dead, now and then; but first what they have said. (We may have stood still ourselves.)
            now = self.comm.clock()
            if now >= self._due:
                while (item := self.post.receive(0)) is not None:
                    self.handle(*item)
                self._due = now + self.check()
                self.post.flush()
                if over():
                    break
            # 2. Handle all that has come.
            item = self.post.receive(self._due - now)
            while item is not None:
                self.handle(*item)
                item = self.post.next()
            # 3. Answer.
            if self.server is not None and self.server.touched:
                self.server.answer()
            self.post.flush()
        self.post.finish(self.heartbeat)

    def check(self) -> float:
        """Do what is due; returns after how many seconds something will be."""
        if self.scheduler is not None:
            return self.scheduler.check()
        now, scheduler = self.comm.clock(), self.roles.scheduler
        if scheduler in self.comm.failed():
            raise PeerEnded(f"rank {scheduler}, the scheduler, has died; rank {self.comm.rank} serves nobody any more")
        if now - self._heard >= self.comm.timeout:
            raise TimeoutError(f"rank {self.comm.rank} has not heard of the scheduler for {now - self._heard:g} s")
        if now - self._beat >= self.heartbeat:
            self.post.send(scheduler, Kind.HEARTBEAT)
            self._beat = now
        return max(self._beat + self.heartbeat - now, 1e-3)

    def handle(self, source: int, message: Message, body: Any) -> None:
        """Pass a message to the handler for its kind; what is wrong with it goes back to its sender."""
        if source == self.roles.scheduler:
            self._heard = self.comm.clock()
        handler = self.handlers.get(message.kind)
        if handler is not None:
            try:
                handler(source, message, body)
            except Refused as refused:
                if message.kind == Kind.VIEW and isinstance(refused, Expelled):
                    raise
                self.post.refuse(source, message, refused)
            return
        if message.kind == Kind.REFUSED and message.start == Code.OVER and source == self.roles.scheduler:
            raise RunOver(Code.OVER, f"rank {self.comm.rank} was taken for dead, and the others have finished")
        if message.kind not in (Kind.REFUSED, Kind.ACK):
            text = f"{NAMES[message.kind]}: rank {self.comm.rank} has no handler for it"
            self.post.refuse(source, message, Refused(Code.NO_ROLE, text))
