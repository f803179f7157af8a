"""The server: a loop, and one handler per message.

    while there is work:  receive a message;  handle it;  answer the pulls that can be answered now

(The loop, which the scheduler shares, is in node.py.) What a server keeps of each key is in store.py; when a push is
applied and a pull is answered, in consistency.py; copies on other servers, in replication.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import backend
from ...backend import Array
from ...comm import Communicator
from .consistency import Consistency
from .keys import Key, Layout, Roles
from .membership import View, first_view
from .messages import Code, Expelled, Kind, Message, Refused
from .post import Item, Post
from .replication import Chain, Entry
from .store import Store

Make = Callable[[Key], Store]  # the store of a key, with its first values
Handler = Callable[[int, Message, Any], None]


class Server:
    """One server's part. `make(key)` gives the store of each key of its own shard, and of those it has copies of."""

    def __init__(
        self, comm: Communicator, post: Post, roles: Roles, layout: Layout, consistency: Consistency, make: Make
    ):
        self.comm, self.post, self.roles, self.layout, self.consistency = comm, post, roles, layout, consistency
        self.number = roles.server_ranks.index(comm.rank)
        # C.3 Communication mechanism: a parameter server. Workers push gradients here, and pull values.
        self.view = first_view(roles)
        # The shards of which it has a copy: its own, and those of the servers before it in the circle.
        shards = [(self.number - i) % roles.servers for i in range(roles.copies + 1)]
        self.stores = {key.number: make(key) for key in layout.keys if key.server in shards}
        self.chains = {shard: Chain(self, shard) for shard in shards}
        self.headed = self._headed()
        self.early: list[Item] = []  # from servers who know a later view than we do
        self.touched: dict[int, None] = {}  # keys at which something has happened, since `answer`
        self.staleness: Counter[int] = Counter()  # of each gradient: how many updates the values had had meanwhile
        self.lag: Counter[int] = Counter()  # of each pull that is answered: clocks ahead of the slowest worker
        self.dropped = 0
        self.stopped = False
        self.handlers: dict[int, Handler] = {
            Kind.PULL: self.on_pull,
            Kind.PULL_ROWS: self.on_pull,
            Kind.PUSH: self.on_push,
            Kind.PUSH_ROWS: self.on_push,
            Kind.VIEW: self.on_view,
            Kind.FORWARD: self.on_forward,
            Kind.REPLICATED: self.on_replicated,
            Kind.STOP: self.on_stop,
        }

    def _headed(self) -> dict[int, Store]:
        """The stores that it serves, as the head of their chains."""
        heads = [self.view.chain(shard, self.roles.copies)[0] for shard in range(self.roles.servers)]
        return {number: store for number, store in self.stores.items() if heads[store.key.server] == self.comm.rank}

    # -- pull -----------------------------------------------------------------------------------------------------

    def on_pull(self, source: int, message: Message, body: Any) -> None:
        """Answer when the consistency allows it."""
        store = self.store(source, message)
        rows = None
        if message.kind == Kind.PULL_ROWS:
            rows = self.rows(store.key, message, body)
        elif message.start + message.size > store.key.size:
            raise Refused(
                Code.WRONG_LENGTH,
                f"pull of elements {message.start} … {message.start + message.size} of "
                f"{store.key.name} (key {message.key}), which has {store.key.size}",
            )
        store.waiting.append((source, message, rows))
        if self.consistency.synchronous and self.consistency.patient and message.clock > store.clocks[source]:
            # It is done with the clocks below; a dead head has told it so, of a round that is still open here.
            store.clocks[source] = message.clock
            self.consistency.changed(store, self.apply)
        self.touched[message.key] = None

    def answer(self) -> None:
        """Answer the pulls that can be answered now: the keys of the first layers first."""
        for number in sorted(self.touched):
            store = self.stores[number]
            if not store.waiting:
                continue
            still = []
            slowest = min(store.clocks.values(), default=0)
            for source, message, rows in store.waiting:
                if source not in store.clocks:
                    continue  # it died or left while it waited
                if not self.consistency.ready(store, message.clock):
                    still.append((source, message, rows))
                    continue
                self.lag[max(message.clock - slowest, 0)] += 1
                self.consistency.answered(store, source)
                self._send_values(source, store, message, rows)
            store.waiting = still
        self.touched.clear()

    def _send_values(self, source: int, store: Store, message: Message, rows: Any) -> None:
        if rows is None:
            values = store.data[message.start : message.start + message.size]
        else:
            values = store.data.reshape(-1, store.key.width)[backend.to(rows, backend.device_of(store.data))]
        sent = self.post.send(
            source, Kind.VALUES, values, key=message.key, dtype=ord(store.key.dtype.char), number=message.number,
            clock=max(store.clock, message.clock), start=message.start, size=message.size, stamp=store.version,
        )  # fmt: skip
        if rows is None:
            store.lend(sent)

    # -- push -----------------------------------------------------------------------------------------------------

    def on_push(self, source: int, message: Message, body: Any) -> None:
        """Take a gradient; it is acknowledged when it is in the values, and in all copies of them."""
        store = self.store(source, message)
        if message.number <= store.seen.get(source, -1):  # sent again, after the server it was sent to had died
            self.chains[store.key.server].acknowledge(store, source, message.number)
            return
        gradient = self.gradient(store, message, body)
        staleness = max(store.version - message.stamp, 0)
        if not self.consistency.push(store, source, message, gradient, self.apply):
            self.dropped += 1
            if gradient is not None:
                store.give_back(gradient)
            self._acknowledge(source, store, message.number, taken=0)
        elif gradient is not None and not self.consistency.synchronous:
            self.staleness[staleness] += 1
            self.comm.value("staleness", staleness)
        self.touched[message.key] = None

    def apply(self, store: Store, gradient: Array | None, made_of: list[tuple[int, int]], scale: float) -> None:
        """The one place where values change: here, and then on the copies."""
        if gradient is not None:
            store.apply(gradient, scale)
        for worker, number in made_of:
            store.seen[worker] = number
        if self.consistency.synchronous:
            self.staleness[0] += len(made_of)
            for _ in made_of:
                self.comm.value("staleness", 0)
        if self.roles.copies:
            self.chains[store.key.server].applied(store, gradient, made_of, scale)
        else:
            self.acknowledge(store, made_of)

    def acknowledge(self, store: Store, made_of: list[tuple[int, int]]) -> None:
        """Pushes are in the values, on all servers that keep them."""
        for worker, number in made_of:
            self._acknowledge(worker, store, number)

    def _acknowledge(self, worker: int, store: Store, number: int, taken: int = 1) -> None:
        if worker in self.view.workers:
            self.post.send(worker, Kind.ACK, key=store.key.number, number=number, clock=store.clock, start=taken)

    # -- copies ---------------------------------------------------------------------------------------------------

    def on_forward(self, source: int, message: Message, body: Any) -> None:
        """The server before us in a chain has applied something: so do we."""
        store = self._copy(source, message, body)
        if store is None:
            return
        entry = Entry.unpack(message, body, store)
        if self.chains[store.key.server].forwarded(source, store, entry):
            if entry.gradient is not None:
                store.apply(entry.gradient, entry.scale)
            store.seen.update(entry.made_of)
            for worker, _ in entry.made_of:
                if worker in store.clocks:
                    store.clocks[worker] = max(store.clocks[worker], message.clock)
            store.clock = max(store.clock, message.clock) if self.consistency.synchronous else 0
            self.chains[store.key.server].pass_on(store, entry)

    def on_replicated(self, source: int, message: Message, body: Any) -> None:
        """All servers behind us in a chain have applied something."""
        store = self._copy(source, message, body)
        if store is not None:
            self.chains[store.key.server].replicated(source, store, message.number)

    def _copy(self, source: int, message: Message, body: Any) -> Store | None:
        """The store of another server's message; None if that waits for a view which its sender knows already."""
        if message.key not in self.stores:
            raise Refused(Code.UNKNOWN_KEY, f"key {message.key} has no copy on server {self.number}")
        if message.stamp > self.view.number:
            self.early.append((source, message, body))
            return None
        return self.stores[message.key]

    # -- who takes part -------------------------------------------------------------------------------------------

    def on_view(self, source: int, message: Message, body: Any) -> None:
        """The scheduler's word about who takes part."""
        if source != self.roles.scheduler:
            raise Refused(Code.NO_ROLE, f"a view from rank {source}, which is not the scheduler")
        view = View.unpack(message.stamp, body)
        if view.number > self.view.number:
            before, self.view = self.view, view
            if self.comm.rank not in view.servers:
                raise Expelled(Code.EXPELLED, f"server {self.number} was not heard of for too long; others go on")
            self.headed = self._headed()
            for number, store in self.stores.items():
                self._change_workers(store, before)
                self.touched[number] = None
            for chain in self.chains.values():
                chain.changed()
            for number in self.touched:
                self.consistency.changed(self.stores[number], self.apply)
            early, self.early = self.early, []
            for item in early:
                self.handlers[item[1].kind](*item)
        self.post.send(source, Kind.ACK, number=message.number, stamp=view.number)

    def _change_workers(self, store: Store, before: View) -> None:
        for worker in before.workers:
            if worker not in self.view.workers:
                store.clocks.pop(worker, None)
                store.pulled.pop(worker, None)
        for worker, clock in self.view.workers.items():
            if before.workers.get(worker) != clock:
                store.clocks[worker] = clock

    # -- the end --------------------------------------------------------------------------------------------------

    def on_stop(self, source: int, message: Message, body: Any) -> None:
        """The run is over: tell the values, and what there was; or (size 1) that has been done, and this is the end."""
        if source != self.roles.scheduler:
            raise Refused(Code.NO_ROLE, f"a stop from rank {source}, which is not the scheduler")
        if message.size:
            self.post.send(source, Kind.STATS)
            self.stopped = True
            return
        for store in self.headed.values():
            whole = message._replace(kind=Kind.PULL, key=store.key.number, size=store.key.size)
            self._send_values(source, store, whole, None)
        self.post.flush()
        figures = [self.post.received_bytes, self.post.sent_bytes, self.dropped, len(self.staleness), len(self.lag)]
        for histogram in (self.staleness, self.lag):
            for value, count in sorted(histogram.items()):
                figures += [value, count]
        self.post.send(source, Kind.STATS, np.array(figures, np.int64), number=message.number)

    # -- checks ---------------------------------------------------------------------------------------------------

    def store(self, source: int, message: Message) -> Store:
        """The store of a worker's message. Errors  Refused: no such key here, or no such worker"""
        store = self.headed.get(message.key)
        if store is None:
            keys = self.layout.keys
            known = message.key < len(keys)
            where = f"it is on {keys[message.key].server}" if known else f"there are {len(keys)} keys"
            raise Refused(Code.UNKNOWN_KEY, f"key {message.key} is not on server {self.number}; {where}")
        if source not in store.clocks:
            if source in self.roles.workers:
                raise Expelled(Code.EXPELLED, f"rank {source} does not take part (any more): register first")
            raise Refused(Code.NO_ROLE, f"rank {source} is no worker: those are {self.roles.workers}")
        return store

    def rows(self, key: Key, message: Message, body: Any) -> np.ndarray:
        """The row numbers at the beginning of a body."""
        count = message.size
        if count > (0 if body is None else body.nbytes) // 8:
            raise Refused(Code.WRONG_LENGTH, f"{count} rows in a body of {0 if body is None else body.nbytes} bytes")
        rows = np.empty(0, np.int64) if body is None else body.reshape(-1).view(np.uint8)[: 8 * count].view(np.int64)
        if count and not (rows.min() >= 0 and rows.max() < key.size // key.width):
            raise Refused(
                Code.WRONG_LENGTH,
                f"rows {rows.min()} to {rows.max()} of {key.name} (key {key.number}), of {key.size // key.width}",
            )
        return rows

    def room(self, source: int, message: Message) -> Array:
        """Where a long body is to be put. Errors  Refused: it is not wanted"""
        if message.kind == Kind.VIEW and source == self.roles.scheduler and message.length <= View.most(self.roles):
            return np.empty(message.length, np.uint8)
        if message.kind == Kind.FORWARD and message.key in self.stores:
            store = self.stores[message.key]
            if message.length <= Entry.nbytes(store, len(self.roles.workers)):
                return np.empty(message.length, np.uint8)
        if message.kind == Kind.PULL_ROWS:
            key = self.store(source, message).key
            if message.length == 8 * message.size <= 8 * key.size:
                return np.empty(message.length, np.uint8)
        if message.kind not in (Kind.PUSH, Kind.PUSH_ROWS):
            raise Refused(Code.WRONG_LENGTH, f"{message.name} with a body of {message.length} bytes")
        store = self.store(source, message)
        self.check_push(store, message)
        if message.kind == Kind.PUSH and message.size == store.key.size:
            return store.spare()
        return np.empty(message.length, np.uint8)

    def check_push(self, store: Store, message: Message) -> None:
        """Errors  Refused: a push of another dtype or length"""
        key, rows = store.key, message.kind == Kind.PUSH_ROWS
        if message.dtype != ord(key.dtype.char) and message.size:
            try:
                sent = np.dtype(chr(message.dtype)).name
            except TypeError:
                sent = f"code {message.dtype}"
            raise Refused(Code.WRONG_DTYPE, f"push of {sent} to {key.name} (key {key.number}), which is {key.dtype}")
        each = key.width * key.dtype.itemsize + 8 if rows else key.dtype.itemsize
        most = key.size // key.width if rows else key.size - message.start
        if message.size > max(most, 0) or message.length != message.size * each:
            what = "rows" if rows else "elements"
            raise Refused(
                Code.WRONG_LENGTH,
                f"push of {message.length} bytes, {message.size} {what} from {message.start}, to {key.name} "
                f"(key {key.number}), which has {key.size // (key.width if rows else 1)} {what}",
            )

    def gradient(self, store: Store, message: Message, body: Any) -> Array | None:
        """What was pushed, as an array like the values; zeros where nothing was pushed."""
        self.check_push(store, message)
        key, count = store.key, message.size
        if not count:  # no row here is a gradient of zeros; no element is no gradient at all
            return store.zeros() if message.kind == Kind.PUSH_ROWS and message.weight else None
        if message.kind == Kind.PUSH:
            if body.dtype == key.dtype and body.size == key.size:
                return body  # received into a spare array
            values = body.view(key.dtype)
            if count == key.size and isinstance(store.data, np.ndarray):
                return values  # it lies in a parcel, which is ours
            gradient = store.spare() if count == key.size else store.zeros()
            gradient[message.start : message.start + count] = backend.to(values, backend.device_of(gradient))
            return gradient
        rows = self.rows(key, message, body)
        values = body.reshape(-1).view(np.uint8)[8 * count :].view(key.dtype).reshape(count, key.width)
        gradient = store.zeros()
        device = backend.device_of(gradient)
        add_at = backend.namespace(gradient).add.at
        add_at(gradient.reshape(-1, key.width), backend.to(rows, device), backend.to(values, device))
        return gradient
