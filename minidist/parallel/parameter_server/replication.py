"""Copies of a shard on other servers: chain replication.

    worker --push--> head --forward--> middle --forward--> tail
           <---ack---     <-replicated-       <-replicated-

The head applies a push (in synchronous modes: a round) and forwards what it applied; every server of the chain applies
the same in the same order, so all hold the same bits. The worker's push is acknowledged when the tail has it. So when
servers die, as long as one of a chain lives, nothing is lost that was acknowledged; what was not, its worker sends
again, to the new head, which knows the numbers of the pushes that it has.

An entry is what was applied: key, a number counted up by the head, and the body

    pushes (int64: count, then worker and number of each), gradient (as long as the key; nothing if there was none)

Cost    copies · n bytes and 2 · copies messages for each update of n bytes, on top of push and acknowledgement.
        Synchronous modes forward the sum of a round, not each worker's gradient ("replication after aggregation")
Source  van Renesse & Schneider 2004, "Chain replication for supporting high throughput and availability" (OSDI);
        Li et al. 2014, section 4.3
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import backend
from ...backend import Array
from .messages import Code, Kind, Message, Refused
from .store import Store

if TYPE_CHECKING:
    from .server import Server


@dataclass(frozen=True)
class Entry:
    """One update of one key, as the head applied it."""

    number: int  # counted from 1, for each key
    clock: int  # what the workers' clocks are with it
    scale: float
    made_of: list[tuple[int, int]]  # worker and request number of each push in it
    gradient: Array | None

    @staticmethod
    def nbytes(store: Store, workers: int) -> int:
        """Of the longest body."""
        return 8 + 16 * workers + store.key.size * store.key.dtype.itemsize

    def pack(self) -> np.ndarray:
        head = np.array([len(self.made_of), *(x for pair in self.made_of for x in pair)], np.int64).view(np.uint8)
        return head if self.gradient is None else np.concatenate([head, backend.to_numpy(self.gradient).view(np.uint8)])

    @staticmethod
    def unpack(message: Message, body: Any, store: Store) -> Entry:
        """Errors  Refused: it is none of this key"""
        raw = np.empty(0, np.uint8) if body is None else body.reshape(-1).view(np.uint8)
        count = int(raw[:8].view(np.int64)[0]) if len(raw) >= 8 else -1
        none = len(raw) == 8 + 16 * count
        if not 0 <= count <= len(raw) // 16 or not (none or len(raw) == Entry.nbytes(store, count)):
            raise Refused(Code.WRONG_LENGTH, f"forward of {len(raw)} bytes to {store.key.name}")
        pairs = raw[8 : 8 + 16 * count].view(np.int64).reshape(count, 2).tolist()
        values = raw[8 + 16 * count :].view(store.key.dtype)
        gradient = None if none else backend.to(values, backend.device_of(store.data)).copy()
        return Entry(message.number, message.clock, message.weight, [(w, n) for w, n in pairs], gradient)


class Chain:
    """This server's place in the chain of one shard."""

    def __init__(self, server: Server, shard: int):
        self.server, self.shard = server, shard
        self.applied_to: dict[int, int] = {}  # of each key: the number of its last entry here
        self.log: dict[int, deque[Entry]] = {}  # of each key: entries that the tail may not have yet
        self.asked: dict[int, list[tuple[int, int]]] = {}  # of each key: pushes sent again, not yet acknowledged

    def members(self) -> list[int]:
        return self.server.view.chain(self.shard, self.server.roles.copies)

    def next(self) -> int | None:
        """The rank behind us; None for the tail."""
        members = self.members()
        place = members.index(self.server.comm.rank)
        return members[place + 1] if place + 1 < len(members) else None

    # -- at the head ----------------------------------------------------------------------------------------------

    def applied(self, store: Store, gradient: Array | None, made_of: list[tuple[int, int]], scale: float) -> None:
        """We have applied pushes: the others are to do so, then the workers are told."""
        number = self.applied_to.get(store.key.number, 0) + 1
        clock = max((store.clocks[worker] for worker, _ in made_of if worker in store.clocks), default=0)
        clock = store.clock if self.server.consistency.synchronous else clock
        self.pass_on(store, Entry(number, clock, scale, made_of, None if gradient is None else gradient.copy()))

    def acknowledge(self, store: Store, worker: int, number: int) -> None:
        """A push that is in the values already was sent again."""
        if self.log.get(store.key.number):
            self.asked.setdefault(store.key.number, []).append((worker, number))
        else:
            self.server.acknowledge(store, [(worker, number)])

    # -- in the middle --------------------------------------------------------------------------------------------

    def forwarded(self, source: int, store: Store, entry: Entry) -> bool:
        """Whether an entry that comes from `source` is to be applied."""
        members = self.members()
        place = members.index(self.server.comm.rank)
        if not place or members[place - 1] != source:
            return False  # from a server that is out of the chain, and does not know it yet
        have = self.applied_to.get(store.key.number, 0)
        if entry.number <= have:  # it is sent again; so is our word that we have it
            if not self.log.get(store.key.number):
                self._tell_before(store, have)
            return False
        assert entry.number == have + 1, "entries come in order"
        return True

    def pass_on(self, store: Store, entry: Entry) -> None:
        """We have applied an entry: keep it until the tail has it, and send it on."""
        key = store.key.number
        self.applied_to[key] = entry.number
        self.log.setdefault(key, deque()).append(entry)
        behind = self.next()
        if behind is None:
            self._is_safe(store, entry.number)
        else:
            self._forward(behind, store, entry)

    def replicated(self, source: int, store: Store, number: int) -> None:
        """The tail has all entries up to this one."""
        if source == self.next():
            self._is_safe(store, number)

    def changed(self) -> None:
        """There is a new view: those behind us may lack what the dead have not passed on."""
        if self.server.comm.rank not in self.members():
            return
        behind = self.next()
        for key, log in self.log.items():
            store = self.server.stores[key]
            if behind is None:
                if log:
                    self._is_safe(store, log[-1].number)
            else:
                for entry in log:
                    self._forward(behind, store, entry)

    def _forward(self, dest: int, store: Store, entry: Entry) -> None:
        self.server.post.send(
            dest, Kind.FORWARD, entry.pack(), key=store.key.number, number=entry.number, clock=entry.clock,
            size=len(entry.made_of), stamp=self.server.view.number, weight=entry.scale,
        )  # fmt: skip

    def _is_safe(self, store: Store, number: int) -> None:
        """All who keep this key have it up to this entry: say so to the one before us, or to the workers."""
        key = store.key.number
        log, done = self.log.get(key, deque()), []
        while log and log[0].number <= number:
            done.append(log.popleft())
        if self.members()[0] != self.server.comm.rank:
            self._tell_before(store, number)
            return
        for entry in done:
            self.server.acknowledge(store, entry.made_of)
        if not log:
            self.server.acknowledge(store, self.asked.pop(key, []))

    def _tell_before(self, store: Store, number: int) -> None:
        members = self.members()
        before = members[members.index(self.server.comm.rank) - 1]
        self.server.post.send(
            before, Kind.REPLICATED, key=store.key.number, number=number, stamp=self.server.view.number
        )
