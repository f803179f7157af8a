"""The measured parts of parameter_server.py: a straggler, short messages, and PyTorch DDP, on real ranks."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import train_mlp
from common import report_of_ranks, spread

import minidist as md
from minidist.comm import Communicator
from minidist.examples.straggler import Straggler
from minidist.nn import functional as F
from minidist.parallel.parameter_server import Layout, Roles, Stretch, Worker, consistency_of

SCRIPT = str(Path(__file__).parent / "parameter_server.py")
SHARE = 128  # samples a worker and step


def ranks_report(part: str, ranks: int, args: argparse.Namespace, repeats: int | None = None) -> Any:
    """Have so many ranks measure a part; what their rank 0 tells."""
    options = ["--part", part, "--repeats", str(repeats or (args.many if part == "messages" else args.few))]
    return report_of_ranks(ranks, [SCRIPT, *options, *["--quick"] * args.quick], args.deadline)


def network() -> tuple[md.nn.Module, md.optim.Optimizer]:
    """The document's, alike on every rank."""
    md.manual_seed(0)
    model = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
    return model, md.optim.Adam(model.parameters(), lr=1e-3)


def ours_over(other: list[dict], key: str, runs: list[dict]) -> list[float]:
    """Ratios, repeat by repeat."""
    return [mine[key] / theirs[key] for mine, theirs in zip(runs, other, strict=True)]


def judged(ratios: list[float], target: float) -> str:
    return f"target {target:.2f}: {'met' if statistics.median(ratios) >= target else 'NOT met'}"


# -- a straggler ----------------------------------------------------------------------------------------------------

EVEN_SHARES = ", even shares"
CONTENDERS = ["bsp", "ssp:3", f"ssp:3{EVEN_SHARES}", "async", "backup:1"]
COMPUTING = ["trains", "sleeps"]
ALONE, BESIDE = "none", "3:3"  # rank 3, three times slower
TARGETS = {"ssp:3": 0.8, "async": 0.8}
NAP = 20e-3  # seconds for a share of SHARE samples
Plan = tuple[str, str, int, int]  # how it computes, beside whom, steps, and how many of them are to warm up


def straggler_rank(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """As one of 4 ranks: of each repeat, contender, straggler and way of computing, samples/s of each worker."""
    comm = md.comm.world()
    train, test = md.data.read_mnist("train"), md.data.mnist("test")
    runs, states = [], {}
    for repeat in range(args.few):
        first = repeat % len(CONTENDERS)
        for computing in COMPUTING:
            for name in CONTENDERS[first:] + CONTENDERS[:first]:
                for slow in (ALONE, BESIDE) if repeat % 2 == 0 else (BESIDE, ALONE):
                    steps = args.steps[computing] + args.warm_up
                    plan = computing, slow, steps, args.warm_up
                    rates, samples, model = beside(comm, name, plan, train)
                    runs.append(dict(name=name, computing=computing, slow=slow, repeat=repeat, rates=rates))
                    if comm.rank == 0:
                        check(model, name, computing, slow, samples, steps, test, states)
    return runs if comm.rank == 0 else None


def beside(comm: Communicator, name: str, plan: Plan, train: Any) -> tuple[list[float], int, md.nn.Module]:
    """Train so many global batches; samples/s of each worker, and on rank 0 what all have trained on, and the model."""
    model, optimizer = network()
    workers = comm.size - 1
    size = plan[2] * workers * SHARE  # of an epoch
    ps = md.parallel.ParameterServer(
        model,
        optimizer,
        comm,
        consistency=name.removesuffix(EVEN_SHARES),
        samples=size,
        batch_size=workers * SHARE,
        balanced=not name.endswith(EVEN_SHARES),
    )
    rates = np.zeros(comm.size)
    samples = 0
    if ps.serves:
        report = ps.serve()
        samples = 0 if report is None else sum(report.samples.values())
    else:
        rates[comm.rank] = rate_of_worker(comm, ps, plan, train)
    md.collectives.all_reduce(comm, rates)
    return rates[1:].tolist(), samples, model


def rate_of_worker(comm: Communicator, ps: Any, plan: Plan, train: Any) -> float:
    """A worker's epoch; its samples/s behind the warm-up."""
    computing, slow, _, warm_up = plan
    loader = md.data.Loader(train[0], train[1], batch_size=SHARE)
    pace = Straggler(None if slow == ALONE else slow, comm)
    ps.meet()
    done, start = 0, time.perf_counter()
    for step, (begin, size) in enumerate(ps.shares(0)):
        if step == warm_up:
            done, start = 0, time.perf_counter()
        if size:
            ps.zero_grad()
            with pace.computing(lambda: ps.worker.waited):
                images, labels = loader.take(0, begin, size if computing == "trains" else 1)
                loss = F.cross_entropy(ps.model(md.Tensor(images)), md.Tensor(labels))
                if computing == "sleeps":
                    ps.count(size)
                    time.sleep(NAP * size / SHARE)
                loss.backward()
        ps.step()
        done += size
    with md.no_grad():
        ps.model(md.Tensor(images[:1]))  # waits for the last values
    seconds = time.perf_counter() - start
    ps.meet()
    ps.pull()
    ps.leave()
    return done / seconds


def check(
    model: md.nn.Module,
    name: str,
    computing: str,
    slow: str,
    samples: int,
    steps: int,
    test: Any,
    states: dict[tuple[str, str], Any],
) -> None:
    """Raise if a run did not do what it should have."""
    state = {key: array.copy() for key, array in model.state_dict().items()}
    if name != "backup:1":
        assert samples == steps * 3 * SHARE, f"{name}: {samples} samples of {steps * 3 * SHARE}"
    if name == "bsp":  # a straggler changes when the parameters come, not what they are
        before = states.setdefault((name, computing), state)
        assert all(np.array_equal(before[key], state[key]) for key in state), f"bsp, {computing}, {slow}: not the same"
    if computing == "trains" and steps >= 50:
        with md.no_grad():
            right = (model(md.Tensor(test[0])).argmax(1).numpy() == test[1]).mean()
        assert right > 0.85, f"{name} beside {slow}: {right:.1%} of the test images"


def straggler_lines(runs: list[dict[str, Any]]) -> list[str]:
    """The table; the last worker is the straggler."""
    lines = [
        "straggler, measured: 3 workers, 1 server, 784-1024-10, Adam, 128 samples a worker and step; samples/s",
        "healthy: the two that are never slow; kept: of what they do when nobody is slow",
        f"{'computing':<11}{'consistency':<20}{'none slow: healthy':<26}{'one 3 times slower: healthy':<30}"
        f"{'the straggler':<24}{'all kept':<20}{'healthy kept':<20}",
    ]
    for computing in COMPUTING:
        for name in CONTENDERS:
            alone, beside = (
                [
                    run["rates"]
                    for run in runs
                    if (run["name"], run["computing"], run["slow"]) == (name, computing, slow)
                ]
                for slow in (ALONE, BESIDE)
            )
            kept = [sum(b[:2]) / sum(a[:2]) for a, b in zip(alone, beside, strict=True)]
            all_kept = [sum(b) / sum(a) for a, b in zip(alone, beside, strict=True)]
            line = (
                f"{computing:<11}{name:<20}{spread([sum(a[:2]) for a in alone], ',.0f'):<26}"
                f"{spread([sum(b[:2]) for b in beside], ',.0f'):<30}{spread([b[2] for b in beside], ',.0f'):<24}"
                f"{spread(all_kept, '.2f'):<20}{spread(kept, '.2f'):<20}"
            )
            if name in TARGETS:
                line += judged(kept, TARGETS[name])
            if name == "bsp":
                pace = statistics.median(sum(b[:2]) / 2 / b[2] for b in beside)
                line += f"the healthy are {pace:.2f} times as fast as the straggler: its pace"
            lines.append(line.rstrip())
    return lines


# -- messages -------------------------------------------------------------------------------------------------------

KIB = 256  # float32
WINDOWS = (16, 64)
BARE, PICKLED, ONE, TOGETHER = "mpi4py Send, Recv", "mpi4py send, recv (pickled)", "one at a time", "push and pull"
Way = Callable[[], None]


def messages_rank(args: argparse.Namespace) -> list[dict[str, float]] | None:
    """As one of 2 ranks: messages/s of every way, in each repeat."""
    from mpi4py import MPI
    from parameter_server_simulated import serve

    comm, plain, count = md.comm.world(), MPI.COMM_WORLD.Dup(), args.messages
    roles, layout = Roles(comm.size, 1), Layout([Stretch("1 KiB", KIB, np.float32)], 1)
    mine, theirs = np.ones(KIB, np.float32), np.empty(KIB, np.float32)

    def bare() -> None:
        for _ in range(2 * count):
            if comm.rank:
                plain.Send(mine, 0)
                plain.Recv(theirs, 0)
            else:
                plain.Recv(theirs, 1)
                plain.Send(mine, 1)

    def pickled() -> None:
        for _ in range(2 * count):
            if comm.rank:
                plain.send(mine, 0)
                plain.recv(source=0)
            else:
                plain.recv(source=1)
                plain.send(mine, 1)

    if comm.rank == 0:
        turns: Iterator[Way] = iter([bare, pickled] * args.many)
        serve(comm, roles, layout, consistency_of("async"), lambda: next(turns)())
        return plain.recv(source=1)

    worker = Worker(comm, roles, layout, heartbeat=10.0)
    worker.register()
    gradient, values = np.ones(KIB, np.float32), np.empty(KIB, np.float32)

    def one_at_a_time() -> None:
        for _ in range(count):
            worker.wait(worker.push(0, gradient))
            worker.wait(worker.pull(0, values))

    def together() -> None:
        for _ in range(count):
            worker.wait(worker.push(0, gradient), worker.pull(0, values))

    def in_windows(window: int) -> None:
        """So many pushes and pulls leave together, when those before the last so many are answered."""
        flying: deque[list[int]] = deque()
        for i in range(0, count, window):
            flying.append([x for _ in range(min(window, count - i)) for x in ask()])
            worker.flush()
            if len(flying) > 2:
                worker.wait(*flying.popleft())
        while flying:
            worker.wait(*flying.popleft())

    def ask() -> tuple[int, int]:
        return worker.push(0, gradient), worker.pull(0, values)

    def per_second(way: Way) -> float:
        start = time.perf_counter()
        way()
        return 2 * count / (time.perf_counter() - start)

    ours: dict[str, Way] = {ONE: one_at_a_time, TOGETHER: together}
    for window in WINDOWS:
        ours[f"windows of {window}"] = lambda window=window: in_windows(window)
    repeats, pushed = [], 0
    for _ in range(args.many):
        rates = {}
        for name, way in ((BARE, bare), (PICKLED, pickled)):
            worker.barrier()  # behind which rank 0 does the same
            rates[name] = per_second(way)
        for name, way in ours.items():
            rates[name] = per_second(way)
            pushed += count
            worker.wait(worker.pull(0, values))
            assert (values == pushed).all(), f"{name}: {values} after {pushed} pushes of ones"
        repeats.append(rates)
    worker.leave()
    plain.send(repeats, 0)
    return None


def messages_lines(repeats: list[dict[str, float]], count: int) -> list[str]:
    """The table."""
    lines = [
        f"messages, measured: {count:,} pushes and {count:,} pulls of 1 KiB, a worker and a server; "
        "a push, a pull and a bare round trip count as one each",
        f"{'':<30}{'messages/s':<30}{'against mpi4py Send, Recv':<30}",
    ]
    for name in repeats[0]:
        ratios = ours_over([{name: rates[BARE]} for rates in repeats], name, repeats)
        line = f"{name:<30}{spread([rates[name] for rates in repeats], ',.0f'):<30}{spread(ratios, '.2f'):<30}"
        if name not in (BARE, PICKLED):
            line += judged(ratios, 0.5)
        lines.append(line.rstrip())
    return lines


# -- PyTorch DDP ----------------------------------------------------------------------------------------------------

OURS, PEER, REDUCED = "minidist, bsp", "pytorch", "minidist:0"


class Dealt:
    """What a worker is dealt, as train_mlp.timed wants it: an epoch after another, of equally many steps."""

    def __init__(self, ps: Any, steps: int):
        self.ps, self.steps, self.loader = ps, steps, train_mlp.loader_of(0, 1)

    def epoch(self, _: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, size in islice(self.ps.shares(sys.maxsize), self.steps):
            yield self.loader.take(self.ps.share().epoch, start, size)


def ddp_rank(args: argparse.Namespace) -> dict[str, Any] | None:
    """As one of 4 ranks: BSP's samples/s of all workers, and the losses of its first steps."""
    os.environ |= {"BENCHMARK_EPOCHS": "1", "BENCHMARK_BATCH": str(SHARE)}
    comm = md.comm.world()
    model, optimizer = network()
    workers, images = comm.size - 1, 60_000
    ps = md.parallel.ParameterServer(model, optimizer, comm, samples=images, batch_size=workers * SHARE)
    figures = np.zeros(1 + train_mlp.WARM_UP)
    steps = -(-images // (workers * SHARE)) if not args.quick else train_mlp.WARM_UP
    if ps.serves:
        ps.serve()
    else:

        def step(images: np.ndarray, labels: np.ndarray) -> float:
            ps.zero_grad()
            loss = F.cross_entropy(ps.model(md.Tensor(images)), md.Tensor(labels))
            loss.backward()
            ps.step()
            return loss.item()

        report = train_mlp.timed(step, Dealt(ps, steps), ps.meet, comm.rank)
        ps.leave()
        figures[0], figures[1:] = report["seconds"][0], report["losses"]
    losses = md.collectives.all_reduce(comm, figures[1:].copy()) / workers
    seconds = float(md.collectives.all_reduce(comm, figures[:1], "max")[0])
    trained = images if not args.quick else steps * workers * SHARE
    return {"whole": trained / seconds, "losses": losses.tolist()} if comm.rank == 0 else None


def ddp_lines(args: argparse.Namespace) -> list[str]:
    """Run the contenders in turn; the table."""
    peers, why = [PEER, f"{PEER}:flush", REDUCED], ""
    if args.quick:
        peers, why = [], "PyTorch is left out of a quick run"
    else:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            peers, why = [REDUCED], f"PyTorch is left out: {error}"
    contenders = [OURS, *peers]
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for repeat in range(args.few):
        first = repeat % len(contenders)
        for name in contenders[first:] + contenders[:first]:
            mine = name == OURS
            runs[name].append(ranks_report("ddp", 4, args, 1) if mine else train_mlp.launch(name, 3, SHARE, 1))
    lines = [
        "ddp, measured: 3 workers, 784-1024-10, Adam, 128 samples a worker, an epoch; samples/s of one worker",
        f"{'':<30}{'samples/s a worker':<28}{'bsp against it':<22}",
    ]
    if PEER in runs:
        train_mlp.check_losses(runs)
    for name, several in runs.items():
        ratios = ours_over(several, "whole", runs[OURS])
        words = f"{OURS} (and 1 server)" if name == OURS else train_mlp.label(name, 3)
        words = words.replace("minidist, zero=0", "minidist, all-reduce")
        line = f"{words:<30}{spread([run['whole'] / 3 for run in several], ',.0f'):<28}{spread(ratios, '.2f'):<22}"
        lines.append((line + judged(ratios, 1.0) * (PEER in name)).rstrip())
    return lines + [why] * bool(why)


RANKS = {"straggler": straggler_rank, "messages": messages_rank, "ddp": ddp_rank}
