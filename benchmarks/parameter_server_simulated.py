"""The simulated parts of parameter_server.py: training on virtual time, and exchanges against the formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import minidist as md
from minidist.collectives.choice import predicted
from minidist.collectives.table import ALGORITHMS
from minidist.comm import Communicator, Network
from minidist.nn import functional as F
from minidist.parallel.parameter_server import Layout, Node, Roles, Server, Store, Stretch, Worker, add, consistency_of
from minidist.parallel.parameter_server.dealing import EVEN, Dealer
from minidist.parallel.parameter_server.scheduler import Scheduler

ALPHA, BETA = 50e-6, 8e-9  # 50 us a message, 1 Gbit/s
BEGIN = 1000.0  # virtual seconds at which what is timed begins: all are ready
LONG = 1e6  # virtual seconds: nobody is taken for dead
Data = tuple[np.ndarray, np.ndarray]

# -- consistency ----------------------------------------------------------------------------------------------------

HIDDEN, SHARE, PER_SAMPLE, FACTOR = 128, 32, 1e-3, 3.0  # SHARE: samples a worker and step; the straggler's FACTOR
LEARNING_RATE, POINTS, GOAL = 0.3, 40, 0.9
RING, EVEN_SHARES = "ring", ", even shares"
CONTENDERS = [RING, "bsp", "ssp:1", "ssp:3", "ssp:10", f"ssp:3{EVEN_SHARES}", "async", "backup:1"]


@dataclass
class Run:
    """One contender's training."""

    name: str
    slow: bool  # whether there is a straggler
    points: list[tuple[float, int, float]] = field(default_factory=list)  # virtual seconds, samples, accuracy
    seconds: float = 0.0  # until the last worker was done
    samples: int = 0  # that were computed, by all workers
    computed: float = 0.0  # seconds in which they computed, all together
    accuracy: float = 0.0
    staleness: float = 0.0  # mean, in updates
    most_ahead: int = 0  # clocks, of any pull

    def reached(self, accuracy: float) -> float:
        """Virtual seconds until then."""
        return next((seconds for seconds, _, a in self.points if a >= accuracy), math.inf)


class Course(Run):
    """A run that is under way. All simulated ranks see the same one."""

    def begin(self, train: Data, test: Data, budget: int, workers: int) -> None:
        self.train, self.test, self.budget, self.workers = train, test, budget, workers
        self.next = 0
        md.manual_seed(0)

    def model(self) -> tuple[md.nn.Module, md.optim.Optimizer]:
        """The same on every rank."""
        md.manual_seed(0)
        pixels = self.train[0].shape[1]
        model = md.nn.Sequential(md.nn.Linear(pixels, HIDDEN), md.nn.ReLU(), md.nn.Linear(HIDDEN, 10))
        one_by_one = not (self.name in (RING, "bsp") or self.name.startswith("backup"))
        return model, md.optim.SGD(model.parameters(), lr=LEARNING_RATE / (self.workers if one_by_one else 1))

    def step(self, comm: Communicator, model: Any, images: np.ndarray, labels: np.ndarray) -> None:
        """Forward and backward, which take virtual time. The last rank is the straggler."""
        loss = F.cross_entropy(model(md.Tensor(images)), md.Tensor(labels))
        factor = FACTOR if self.slow and comm.rank == comm.size - 1 else 1.0
        comm.elapse(len(labels) * PER_SAMPLE * factor)
        self.computed += len(labels) * PER_SAMPLE * factor
        self.samples += len(labels)
        loss.backward()

    def look(self, comm: Communicator, model: md.nn.Module) -> None:
        """The first worker tells how far all are, every so many samples. That takes no virtual time."""
        if self.samples >= self.next:
            self.next = self.samples + self.budget // POINTS
            now = comm.clock() - BEGIN
            self.points.append((now, self.samples, self.correct(model)))

    @md.no_grad()
    def correct(self, model: Any) -> float:
        """The share of the test images that it gets right. (A worker's forward waits for its parameters.)"""
        images, labels = self.test
        return float((model(md.Tensor(images)).argmax(1).numpy() == labels).mean())

    def done(self, comm: Communicator) -> None:
        """A worker has trained on its last share."""
        self.seconds = max(self.seconds, comm.clock() - BEGIN)

    def end(self, model: md.nn.Module) -> None:
        """All have, and this is what came of it. The first worker tells."""
        self.accuracy = self.correct(model)
        self.points.append((self.seconds, self.samples, self.accuracy))


def ring(comm: Communicator, course: Course) -> None:
    """A rank."""
    model, optimizer = course.model()
    network, sgd = md.parallel.data_parallel(model, optimizer, comm, algorithm="ring")
    loader = md.data.Loader(*course.train, batch_size=SHARE * comm.size, rank=comm.rank, size=comm.size)
    comm.elapse(BEGIN - comm.clock())
    for images, labels in loader.epoch(0):
        if comm.rank == 0:
            course.look(comm, model)
        sgd.zero_grad()
        course.step(comm, network, images, labels)
        sgd.step()
    course.done(comm)
    md.collectives.barrier(comm)
    if comm.rank == 0:
        course.end(model)


def server_or_worker(comm: Communicator, course: Course) -> Any:
    """A rank; the server returns the report."""
    model, optimizer = course.model()
    ps = md.parallel.ParameterServer(
        model,
        optimizer,
        comm,
        consistency=course.name.removesuffix(EVEN_SHARES),
        samples=len(course.train[1]),
        batch_size=SHARE * course.workers,
        balanced=not course.name.endswith(EVEN_SHARES),
        deadline=LONG,
    )
    if ps.serves:
        return ps.serve()
    loader = md.data.Loader(*course.train, batch_size=1)
    first = comm.rank == ps.roles.first_worker
    comm.elapse(BEGIN - comm.clock())
    for start, size in ps.shares(0):
        if first:
            course.look(comm, model)
        if size:
            ps.zero_grad()
            course.step(comm, model, *loader.take(0, start, size))
        ps.step()
    ps.meet()
    course.done(comm)
    ps.pull()  # what all have pushed is in these
    if first:
        course.end(model)
    ps.leave()
    return None


def one_run(name: str, slow: bool, train: Data, test: Data, workers: int) -> Run:
    """Train under one contender, in virtual time."""
    course = Course(name, slow)
    course.begin(train, test, len(train[1]), workers)
    network = Network(ALPHA, BETA)
    if name == RING:
        md.comm.simulate(ring, workers, course, network=network)
        return course
    report = md.comm.simulate(server_or_worker, workers + 1, course, network=network).results[0]
    course.staleness, course.most_ahead = report.mean_staleness, max(report.lag)
    assert sum(report.samples.values()) == course.samples
    return course


def all_runs(samples: int, tests: int, workers: int) -> list[Run]:
    """Every contender, without and with a straggler; and what must hold."""
    train, test = md.data.read_mnist("train"), md.data.mnist("test")
    train, test = (train[0][:samples], train[1][:samples]), (test[0][:tests], test[1][:tests])
    runs = {(name, slow): one_run(name, slow, train, test, workers) for slow in (False, True) for name in CONTENDERS}
    for (name, slow), run in runs.items():
        assert run.samples == samples or name == "backup:1", f"{name}: {run.samples} samples of {samples}"
        if name.startswith("ssp"):
            bound = int(name.removesuffix(EVEN_SHARES)[4:])
            assert run.most_ahead <= bound, f"{name}: a worker was {run.most_ahead} clocks ahead"
        if name == "bsp":  # as the ring; and a straggler changes when it comes, not what
            assert abs(run.accuracy - runs[RING, slow].accuracy) <= 2e-3, (run.accuracy, runs[RING, slow].accuracy)
            assert run.accuracy == runs["bsp", False].accuracy and not run.staleness
    return list(runs.values())


def table_of_runs(runs: list[Run], samples: int, workers: int) -> list[str]:
    """The figures of each."""
    n = 4 * (785 * HIDDEN + 10 * (HIDDEN + 1))
    lines = [
        f"consistency, simulated: {workers} workers of {SHARE} samples a step, {PER_SAMPLE * 1e3:g} ms each; "
        f"{n / 1e6:.3f} MB of parameters, {8e-9 / BETA:g} Gbit/s and {ALPHA * 1e6:g} us; {samples:,} samples",
        f"{'':<20}{'straggler':>10}{'seconds':>9}{'samples/s':>11}{'against none':>14}{f's to {GOAL:.0%}':>10}"
        f"{'samples':>9}{'accuracy':>10}{'staleness':>11}{'not computing':>15}",
    ]
    alone = {run.name: run.samples / run.seconds for run in runs if not run.slow}
    for run in runs:
        rate = run.samples / run.seconds
        lines.append(
            f"{run.name:<20}{f'{FACTOR:g} times' if run.slow else 'none':>10}{run.seconds:>9.2f}{rate:>11,.0f}"
            f"{rate / alone[run.name]:>14.2f}{run.reached(GOAL):>10.2f}{run.samples:>9,}{run.accuracy:>10.2%}"
            f"{run.staleness:>11.2f}{1 - run.computed / workers / run.seconds:>15.0%}"
        )
    return lines


# -- servers --------------------------------------------------------------------------------------------------------

PARAMETERS = 785 * 1024 + 1025 * 10
STAND_IN = 1 << 16  # numbers that stand for the parameters, with a byte's cost as many times larger
LARGER = PARAMETERS / STAND_IN
NEAR = 1.05  # what latencies may add to the formula
RINGS = 0  # servers of the ring


@dataclass(frozen=True)
class Exchange:
    """Virtual seconds of a push and of a pull, of all workers; `formula` is for one of them. Of the ring the whole."""

    workers: int
    servers: int
    formula: float
    push: float
    pull: float
    push_at_once: float
    pull_at_once: float


def exchange(comm: Communicator, servers: int, at_once: bool) -> tuple[float, float] | None:
    """One rank's push and pull of the stand-in. Workers get (seconds, seconds)."""
    comm.timeout = LONG
    roles, layout = Roles(comm.size, servers), Layout([Stretch("all", STAND_IN, np.float32)], servers)
    bsp: Any = consistency_of("bsp")
    bsp.begin(len(roles.workers))
    if comm.rank in roles.server_ranks:
        serve(comm, roles, layout, bsp)
        return None
    worker = Worker(comm, roles, layout, LONG)
    worker.register()
    which = comm.rank - roles.first_worker
    # Parts one after another: begin with another server than the next worker does.
    order = layout.keys if at_once else [layout.keys[(which + i) % servers] for i in range(servers)]
    gradient, values = np.full(STAND_IN, which, np.float32), np.empty(STAND_IN, np.float32)
    # 1. Push, until all is in the values.
    comm.elapse(BEGIN - comm.clock())
    pushed = []
    for key in order:
        pushed.append(worker.push(key.number, gradient[key.start : key.stop]))
        worker.flush()
        if not at_once:
            comm.elapse(4 * key.size * LARGER * BETA)  # until it has left
    worker.wait(*pushed)
    push = comm.clock() - BEGIN
    # 2. Pull.
    worker.barrier()
    comm.elapse(2 * BEGIN - comm.clock())
    asked = []
    for key in order:
        asked.append(worker.pull(key.number, values[key.start : key.stop], clock=1))
        if not at_once:
            worker.wait(asked[-1])
    worker.wait(*asked)
    pull = comm.clock() - 2 * BEGIN
    # bsp applies the mean, here of 0, 1, ..., W - 1.
    assert np.allclose(values, (len(roles.workers) - 1) / 2, rtol=1e-5), f"{values} after the push of 0 to W - 1"
    worker.leave()
    return push, pull


def serve(
    comm: Communicator, roles: Roles, layout: Layout, how: Any, between: Callable[[], None] = lambda: None
) -> None:
    """Rank 0 and the other servers, whose update is to add. Each time that the workers have met, rank 0 stops serving,
    calls `between`, and serves on."""
    met: list[int] = []
    node = Node(comm, roles, LONG)
    make = lambda key: Store(key, np.zeros(key.size, key.dtype), add)  # noqa: E731
    server = node.server = Server(comm, node.post, roles, layout, how, make)
    if comm.rank != roles.scheduler:
        node.run(lambda: server.stopped)
        return
    on_meet = lambda label, sums, workers: met.append(label)  # noqa: E731
    arguments = comm, node.post, roles, how, Dealer(0, 1, 1, EVEN), LONG
    scheduler = node.scheduler = Scheduler(*arguments, on_meet=on_meet)
    while not scheduler.all_have_left():
        node.run(lambda: bool(met) or scheduler.all_have_left())
        if met:
            met.clear()
            between()
    scheduler.stop([np.zeros(key.size, key.dtype) for key in layout.keys])
    node.run(lambda: not scheduler.stopping)


def ring_exchange(comm: Communicator) -> float:
    """An all-reduce of the stand-in."""
    array = np.full(STAND_IN, comm.rank, np.float32)
    comm.elapse(BEGIN - comm.clock())
    md.collectives.all_reduce(comm, array, algorithm="ring")
    seconds = comm.clock() - BEGIN
    assert (array == sum(range(comm.size))).all()
    return seconds


def one_exchange(workers: int, servers: int) -> Exchange:
    """Simulate it; and what must hold."""
    network = Network(ALPHA, BETA * LARGER)
    if servers == RINGS:
        seconds = max(md.comm.simulate(ring_exchange, workers, network=network).results)
        formula = predicted(ALGORITHMS["all_reduce"]["ring"], workers, 4 * PARAMETERS, Network(ALPHA, BETA))
        if not math.isclose(seconds, formula, rel_tol=1e-9, abs_tol=1e-12):
            raise SystemExit(f"ring, {workers} ranks: {seconds:.9g} s, by the formula {formula:.9g} s")
        return Exchange(workers, RINGS, formula, seconds, 0.0, seconds, 0.0)
    both = []
    for at_once in (False, True):
        done = md.comm.simulate(exchange, workers + servers, servers, at_once, network=network).results[servers:]
        both += [max(seconds[i] for seconds in done) for i in (0, 1)]
    formula = max(1.0, workers / servers) * 4 * PARAMETERS * BETA
    for what, seconds in zip(("push", "pull"), both):
        if not formula <= seconds <= NEAR * formula:
            raise SystemExit(
                f"{what}, {workers} workers, {servers} servers: {seconds:.6g} s, by the formula {formula:.6g} s"
            )
    return Exchange(workers, servers, formula, *both)


def all_exchanges(up_to: int) -> list[Exchange]:
    """Of 1, 2, 4, ... workers with 1, 2 and 4 servers, and of the ring."""
    counts = [1 << k for k in range(up_to.bit_length())]
    return [one_exchange(workers, servers) for workers, servers in itertools.product(counts, (1, 2, 4, RINGS))]


def table_of_exchanges(exchanges: list[Exchange]) -> list[str]:
    """The figures of each."""
    lines = [
        f"servers, simulated: {4 * PARAMETERS / 1e6:.3f} MB, {8e-9 / BETA:g} Gbit/s and {ALPHA * 1e6:g} us. The "
        "formula is max(1, workers/servers) bytes/bandwidth one way",
        f"{'':>7}{'':>8}{'ms':>10}{'':>20}{'/ formula':>20}{'':>22}{'both / the':>14}",
        f"{'workers':>7}{'servers':>8}{'formula':>10}{'push':>10}{'pull':>10}{'push':>10}{'pull':>10}"
        f"{'all parts at once':>22}{'ring':>14}",
    ]
    rings = {e.workers: e.push for e in exchanges if not e.servers}
    for e in exchanges:
        times = f"{e.formula * 1e3:>10,.1f}{e.push * 1e3:>10,.1f}"
        if not e.servers:
            lines.append(f"{e.workers:>7}{'ring':>8}{times}{'':>10}{e.push / e.formula if e.push else 1:>10.3f}")
            continue
        ring = f"{(e.push + e.pull) / rings[e.workers]:>14,.1f}" if rings[e.workers] else f"{'-':>14}"
        at_once = f"{e.push_at_once / e.formula:.2f} and {e.pull_at_once / e.formula:.2f}"
        lines.append(
            f"{e.workers:>7}{e.servers:>8}{times}{e.pull * 1e3:>10,.1f}{e.push / e.formula:>10.3f}"
            f"{e.pull / e.formula:>10.3f}{at_once:>22}{ring}"
        )
    most = max(max(e.push, e.pull) / e.formula for e in exchanges if e.servers)
    least = min(min(e.push, e.pull) / e.formula for e in exchanges if e.servers)
    lines.append(f"/ formula: {least:.3f} to {most:.3f}; target at least 1: {'met' if least >= 1 else 'NOT met'}")
    return lines
