"""Shared by the tests of the parameter server: messages and ranks put together by hand, and NumPy's references."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from test_data_parallel import HIDDEN, IN, OUT, gradients

from minidist.comm import Communicator
from minidist.parallel.parameter_server import Layout, Node, Report, Roles, Server, Store, Worker, add, consistency_of
from minidist.parallel.parameter_server.dealing import Dealer
from minidist.parallel.parameter_server.messages import Kind
from minidist.parallel.parameter_server.post import TAG, Post
from minidist.parallel.parameter_server.scheduler import Scheduler

State = dict[str, np.ndarray]
KINDS = {name: number for name, number in vars(Kind).items() if name.isupper()}

# -- messages ---------------------------------------------------------------------------------------------------------

# Where each field stands in the header's 64 bytes, and as what (struct's letters; all little-endian).
FIELDS = dict(
    magic=(0, "H"), version=(2, "B"), kind=(3, "B"), key=(4, "H"), dtype=(6, "B"), number=(8, "q"), clock=(16, "q"),
    start=(24, "q"), size=(32, "q"), stamp=(40, "q"), weight=(48, "d"), length=(56, "q"),
)  # fmt: skip


def header(kind: int, **fields: Any) -> bytes:
    """A header, field by field."""
    raw = bytearray(64)
    for name, value in dict(magic=0x6D64, version=1, kind=kind, **fields).items():
        at, letter = FIELDS[name]
        struct.pack_into("<" + letter, raw, at, value)
    return bytes(raw)


def fields_of(raw: bytes, at: int = 0) -> dict[str, Any]:
    """The other way."""
    return {name: struct.unpack_from("<" + letter, raw, at + where)[0] for name, (where, letter) in FIELDS.items()}


def send_raw(comm: Communicator, raw: bytes, dest: int) -> None:
    """What a rank that goes wrong might send."""
    comm.send(np.frombuffer(raw, np.uint8), dest, TAG)


def post_of(comm: Communicator, room: Callable[[int, Any], np.ndarray]) -> Post:
    """A post that waits no more than 5 seconds for what it sends to be received."""
    return Post(comm, room, 5.0)


# -- ranks ------------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """What is left when a rank has served."""

    report: Report | None  # of rank 0
    values: list[np.ndarray]  # of rank 0: the last ones, of each key
    server: Server | None


def by_hand(
    comm: Communicator,
    work: Callable[[Worker], Any],
    stretches: Sequence[Any],
    servers: int = 1,
    consistency: str = "bsp",
    copies: int = 0,
    sharding: str = "range",
    update: Any = add,
    initial: Callable[[Any], np.ndarray] | None = None,
    dealer: Dealer | None = None,
    registers: Callable[[int], bool] = lambda rank: True,
    seen: dict[int, Server] | None = None,
    deadline: float | None = None,
) -> Any:
    """Servers and scheduler serve; each worker runs work(worker), and then leaves. No model, and no autograd.

    seen       is given each rank's server: simulated ranks can look into it
    deadline   after which a silent rank is dead; None: the communicator's
    registers  which of the workers do so before `work`; the run does not wait for the others
    """
    group = comm.split(0)
    assert group is not None
    deadline = deadline or comm.timeout
    roles, rank = Roles(comm.size, servers, copies), comm.rank
    layout, how = Layout(stretches, servers, sharding), consistency_of(consistency)
    how.begin(len(roles.workers), copies)
    if rank in roles.workers:
        worker = Worker(group, roles, layout, deadline / 4)
        if registers(rank):
            worker.register()
        result = work(worker)
        if registers(rank):
            worker.leave()
        return result
    node = Node(group, roles, deadline / 4)

    def store(key: Any) -> Store:
        return Store(key, np.zeros(key.size, key.dtype) if initial is None else initial(key), update)

    if rank in roles.server_ranks:
        node.server = Server(group, node.post, roles, layout, how, store)
        if seen is not None:
            seen[rank] = node.server
    if rank != roles.scheduler:
        node.run(lambda: node.server.stopped)
        return Served(None, [], node.server)
    absent = frozenset(r for r in roles.workers if not registers(r))
    dealer = dealer or Dealer(0, 1, len(roles.workers), "even")
    scheduler = node.scheduler = Scheduler(group, node.post, roles, how, dealer, deadline, absent)
    values = [np.zeros(key.size, key.dtype) for key in layout.keys]
    node.run(scheduler.all_have_left)
    scheduler.stop(values)
    node.run(lambda: not scheduler.stopping)
    return Served(scheduler.report, values, node.server)


# -- what NumPy says --------------------------------------------------------------------------------------------------

N = 23  # samples: no batch size of the tests divides it
X = np.random.default_rng(0).standard_normal((N, IN))
LABELS = np.random.default_rng(1).integers(0, OUT, N)


def initial(seed: int = 0) -> State:
    rng = np.random.default_rng(100 + seed)
    shapes = {"0.weight": (HIDDEN, IN), "0.bias": (HIDDEN,), "2.weight": (OUT, HIDDEN), "2.bias": (OUT,)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


class Momentum:
    """v = m v + g;  p -= lr v"""

    lr, momentum = 0.1, 0.9

    def __init__(self) -> None:
        self.v: State = {}

    def step(self, w: State, grads: State) -> None:
        for name, g in grads.items():
            self.v[name] = self.momentum * self.v.get(name, 0) + g
            w[name] = w[name] - self.lr * self.v[name]


class Adam:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;  p -= lr m' / (sqrt(v') + eps), after p *= 1 - lr decay"""

    lr, b1, b2, eps, decay = 0.02, 0.9, 0.999, 1e-8, 0.0

    def __init__(self) -> None:
        self.m: State = {}
        self.v: State = {}
        self.steps = 0

    def step(self, w: State, grads: State) -> None:
        self.steps += 1
        for name, g in grads.items():
            self.m[name] = m = self.b1 * self.m.get(name, 0) + (1 - self.b1) * g
            self.v[name] = v = self.b2 * self.v.get(name, 0) + (1 - self.b2) * g * g
            p = w[name] * (1 - self.lr * self.decay)
            w[name] = p - self.lr * (m / (1 - self.b1**self.steps)) / (
                np.sqrt(v / (1 - self.b2**self.steps)) + self.eps
            )


class AdamW(Adam):
    decay = 0.1


OPTIMIZERS = dict(momentum=Momentum, adam=Adam, adamw=AdamW)


def one_rank(optimizer: str, batch: int, epochs: int) -> State:
    """The weights after some epochs, their samples in order."""
    w, opt = initial(), OPTIMIZERS[optimizer]()
    for _ in range(epochs):
        for start in range(0, N, batch):
            opt.step(w, gradients(w, X[start : start + batch], LABELS[start : start + batch]))
    return w
