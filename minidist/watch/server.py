"""Parameter servers, watched: workers train a weight by minidist's ParameterServer, on simulated ranks.

Rank 0 serves. The others compute for so long a step, one of them longer; what they push, and when it is applied or
made to wait, is told by the consistency itself, to which a listener is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..comm import Network, simulate
from ..comm.base import Communicator
from ..nn import Linear
from ..parallel.parameter_server import Consistency, ParameterServer, Report, Store
from ..parallel.parameter_server.consistency import Apply
from ..parallel.parameter_server.messages import Message
from ..tensor import Tensor

MOST_RANKS = 9
SPREAD = 0.15  # by so much a worker is slower than the one before it, so that not all come at once


class Push(NamedTuple):
    """A gradient that has come to the server.

    clock      the worker's, counted from 0; it took the gradient at version `taken_at`
    version    the server's when it came; staleness  how many updates there had been meanwhile
    taken      False: it came too late, and was dropped
    """

    source: int
    clock: int
    taken_at: int
    version: int
    sent: float
    time: float
    taken: bool

    @property
    def staleness(self) -> int:
        return self.version - self.taken_at


class Update(NamedTuple):
    """The values changed: `version` is the new one, made of these workers' gradients."""

    time: float
    version: int
    workers: tuple[int, ...]


class Answer(NamedTuple):
    """The server has let a worker have the values of a version, for its clock."""

    time: float
    dest: int
    clock: int
    version: int


class Hold(NamedTuple):
    """The server lets a worker wait for others, the slowest."""

    time: float
    worker: int
    clock: int
    waits_for: tuple[int, ...]


class Computing(NamedTuple):
    """A worker at work."""

    worker: int
    clock: int
    version: int
    start: float
    end: float


class Log:
    """What was seen, in the order in which it happened."""

    def __init__(self) -> None:
        self.pushes: list[Push] = []
        self.updates: list[Update] = []
        self.answers: list[Answer] = []
        self.holds: list[Hold] = []
        self.computing: list[Computing] = []
        self.report: Report | None = None


class Listening(Consistency):
    """A consistency that does what another one does, and writes down what that decides."""

    def __init__(self, inner: Consistency, comm: Communicator, log: Log):
        self.inner, self.comm, self.log = inner, comm, log
        self.name, self.goes_on, self.synchronous = inner.name, inner.goes_on, inner.synchronous
        self.bounded, self.patient = inner.bounded, inner.patient

    def push(self, store: Store, worker: int, message: Message, gradient: Array | None, apply: Apply) -> bool:
        version, now, log = store.version, self.comm.clock(), self.log
        done = [c for c in log.computing if (c.worker, c.clock) == (worker, message.clock)]
        sent = done[-1].end if done else now

        def applied(store: Store, gradient: Array | None, made_of: list[tuple[int, int]], scale: float) -> None:
            apply(store, gradient, made_of, scale)
            if gradient is not None:
                log.updates.append(Update(now, store.version, tuple(sorted(worker for worker, _ in made_of))))

        taken = self.inner.push(store, worker, message, gradient, applied)
        if self.synchronous and worker in store.open:  # its round is not full
            others = tuple(sorted(other for other in store.clocks if other not in store.open))
            log.holds.append(Hold(now, worker, message.clock + 1, others))
        if gradient is not None:
            log.pushes.append(Push(worker, message.clock, message.stamp, version, sent, now, taken))
        return taken

    def ready(self, store: Store, clock: int) -> bool:
        ready = self.inner.ready(store, clock)
        if not ready:
            slowest = min(store.clocks.values())
            whom = tuple(sorted(worker for worker, done in store.clocks.items() if done == slowest))
            for worker, message, _ in store.waiting:
                known = any((hold.worker, hold.clock) == (worker, clock) for hold in self.log.holds)
                if message.clock == clock and not known:
                    self.log.holds.append(Hold(self.comm.clock(), worker, clock, whom))
        return ready

    def answered(self, store: Store, worker: int) -> None:
        self.inner.answered(store, worker)
        clock = next(message.clock for source, message, _ in store.waiting if source == worker)
        self.log.answers.append(Answer(self.comm.clock(), worker, clock, store.version))

    def changed(self, store: Store, apply: Apply) -> None:
        self.inner.changed(store, apply)


def train(consistency: str, ranks: int, steps: int, straggler: float, alpha: float) -> tuple[Log, Any]:
    """Run it; returns what was seen, and the Simulation.

    Every worker makes `steps` steps (async deals them to whoever asks: as many in the mean) of one second and a bit;
    those of the last take `straggler` times as long. A message takes alpha seconds.
    """
    log, workers = Log(), ranks - 1

    def update(values: Array, gradient: Array, scale: float) -> None:
        values -= 0.1 * scale * gradient

    def program(comm: Communicator) -> None:
        model = Linear(1, 1, bias=False)
        ps = ParameterServer(
            model, update, comm, consistency=consistency, samples=steps * workers, batch_size=workers,
            balanced=False, deadline=1e6,
        )  # fmt: skip
        if ps.serves:
            ps.consistency = Listening(ps.consistency, comm, log)
            log.report = ps.serve()
            return
        seconds = (1 + SPREAD * (comm.rank - 1)) * (straggler if comm.rank == workers else 1)
        for _, size in ps.shares(0):
            if size:
                ps.zero_grad()
                loss = model(Tensor(np.ones((size, 1), np.float32))).sum()  # waits for the values
                start, version = comm.clock(), ps.worker.versions[0]
                comm.elapse(seconds)
                log.computing.append(Computing(comm.rank, ps.clock, version, start, comm.clock()))
                loss.backward()
            ps.step()
        ps.leave()

    run = simulate(program, ranks, network=Network(alpha=alpha))
    return log, run
