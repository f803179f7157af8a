"""How does data-parallel training scale, with a batch that grows with the ranks (weak), and with one that does not?

    python benchmarks/scaling.py [--simulated 1 2 4 ... 1024] [--ranks 1 2 4] [--repeats 5] [--save]

Weak scaling is simulated, on up to 1024 ranks: it is the cost model that is asked. A step of the document's network
(784-1026-10: 815,680 float32, which 64 ranks can deal evenly) computes for --compute ms on any rank; a message of x
bytes takes a + x b seconds, adding them x g. Contenders:

    ring            all_reduce through a flat network, each rank a host: 5 us a message, 100 Gbit/s, adding 20 GB/s
    auto            what the formulas choose there
    hierarchical    all_reduce on hosts of 8 ranks: 1 us and 100 GB/s within, between them the same as above
    data_parallel   the network itself, trained a step with the ring on the flat network; on up to 64 ranks

For the first three no network is trained: 16,384 numbers stand for its gradients, with b and g as many times larger, so
that every message takes as long as the real one would; 1024 whole models would not fit in memory. Computing is a
figure (Communicator.elapse), the same on all ranks, and nothing of the communication hides behind it: one bucket.
Hosts' links carry a message at a time; ranks' own ports do only on the flat network, since with both it would depend on
chance, which rank of a host gets the link first, and so would up to 2 a a host.

What to expect. With n bytes of gradients a step takes compute + 2 (P-1) (a + n/P b) + n (P-1)/P g with the ring, where
efficiency is compute divided by that. The bytes cost 2 n b + n g = 0.7 ms however many ranks there are, the messages
2 (P-1) a: 10 ms on 1024 ranks, so that from 512 ranks on more than half of the step is communication. Rabenseifner's
2 lg P messages cost 0.1 ms there. A simulated time must be the formula's but for rounding, or the script fails.

Strong scaling is measured, on this machine: 784-1024-10 on MNIST, --batch samples a step over all ranks, Adam, under
mpirun, plain (zero=0) and with the optimizer sharded (zero=1); on one rank without data_parallel. What to expect. A
step's products take 4 x 784 x 1024 flops a sample, shared by the ranks: 11 ms for 512 samples at 150 GFLOP/s. Adam's
1.1 ms are paid by every rank with zero=0, a P-th of it with zero=1; the all-reduce (through shared memory, which
algorithm="auto" chooses on one host) costs some 0.5 ms on 2 ranks. More ranks than cores take turns: there speed-up
ends, and what every rank does alike (Adam; Python's part of a step) is done P times on the same cores.

How it is measured. Each repeat starts every number of ranks, in turn, as processes of their own, which train both ways,
in turn: some steps to warm up, then --steps steps between barriers; the slowest rank counts. Told are the median over
repeats and the range; speed-ups are taken within each repeat, against one rank. That all runs train alike is checked on
the losses of their last steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

from common import ONE_THREAD, RESULTS, machine, report_of_ranks, spread

STAND_IN = 1 << 14  # numbers that stand for the gradients where no model is trained
WIDTH = 1026  # of the hidden layer in the simulation: (784 + 1) 1026 + (1026 + 1) 10 = 64 * 12,745
PARAMETERS = 785 * WIDTH + 10 * (WIDTH + 1)
PER_HOST = 8
ALPHA, BETA, GAMMA = 5e-6, 8e-11, 5e-11  # between hosts: seconds a message, a byte, and to add a byte
NEAR_ALPHA, NEAR_BETA = 1e-6, 1e-11  # within a host
WARM_UP = 5
RING, AUTO, HIERARCHICAL, MODEL = "ring", "auto", "hierarchical", "data_parallel"
Point = tuple[float, float, str]  # a step's seconds in the simulation, and by the formula; the algorithm


# -- weak scaling, simulated ----------------------------------------------------------------------------------------


def network(by_host: bool, larger: float = 1.0) -> Any:
    """The simulated network; `larger`: how many times a byte's cost, where it stands for so many."""
    import minidist as md

    alpha, beta, gamma = ALPHA, BETA * larger, GAMMA * larger
    if not by_host:
        return md.comm.Network(alpha, beta, gamma)
    between = md.comm.Link(alpha, beta)
    near = NEAR_ALPHA, NEAR_BETA * larger, gamma
    return md.comm.Network(*near, ranks_per_host=PER_HOST, between=between, ports="many")


def bare(ranks: int, algorithm: str, by_host: bool, compute: float) -> Point:
    """Compute, then all-reduce the stand-in for the gradients."""
    import numpy as np

    import minidist as md
    from minidist.collectives.choice import predicted
    from minidist.collectives.table import ALGORITHMS

    def program(comm: Any) -> str:
        array = (np.arange(STAND_IN) % 17 + comm.rank).astype(np.float32)
        comm.elapse(compute)
        md.collectives.all_reduce(comm, array, algorithm=algorithm)
        kind = comm.record.operations()[-1].kind
        # Checked after the clock has stopped; whole numbers below 2^24, so without rounding.
        assert np.array_equal(array, comm.size * (np.arange(STAND_IN) % 17) + sum(range(comm.size)))
        return kind.removeprefix("all_reduce ")

    done = md.comm.simulate(program, ranks, network=network(by_host, PARAMETERS / STAND_IN))
    (name,) = set(done.results)
    hosts = -(-ranks // PER_HOST) if by_host else 1
    cost = predicted(ALGORITHMS["all_reduce"][name], ranks, 4 * PARAMETERS, network(by_host), hosts)
    return done.seconds, compute + cost, name


def whole_model(ranks: int, compute: float) -> Point:
    """Train the network a step, each rank on samples of its own."""
    import numpy as np

    import minidist as md
    from minidist.collectives.choice import predicted
    from minidist.collectives.table import ALGORITHMS

    begin = 10.0  # virtual seconds, at which all are ready

    def program(comm: Any) -> tuple[float, int]:
        model = md.nn.Sequential(md.nn.Linear(784, WIDTH), md.nn.ReLU(), md.nn.Linear(WIDTH, 10))
        adam = md.optim.Adam(model.parameters())
        net, optimizer = md.parallel.data_parallel(model, adam, comm, algorithm="ring")
        draw = np.random.default_rng(comm.rank)
        images = md.Tensor(draw.standard_normal((2, 784), np.float32))
        labels = md.Tensor(draw.integers(0, 10, 2))
        comm.elapse(begin - comm.clock())
        comm.elapse(compute)
        optimizer.zero_grad()
        md.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        seconds = comm.clock() - begin
        md.parallel.assert_replicas_agree(model, comm)
        return seconds, len(list(model.parameters()))

    done = md.comm.simulate(program, ranks, network=network(by_host=False))
    tensors = done.results[0][1]
    # The all-reduce, and an all-gather in which ranks tell one another their samples, and what has a gradient.
    cost = predicted(ALGORITHMS["all_reduce"]["ring"], ranks, 4 * PARAMETERS, network(by_host=False))
    cost += predicted(ALGORITHMS["all_gather"]["bruck"], ranks, 8 * ranks * (1 + tensors), network(by_host=False))
    return max(seconds for seconds, _ in done.results), compute + cost, "ring"


def weak(args: argparse.Namespace, say: Any) -> dict[str, dict[int, Point]]:
    """Simulate each contender on each number of ranks: of each, its points."""
    contenders = {
        RING: lambda ranks: bare(ranks, "ring", False, args.compute * 1e-3),
        AUTO: lambda ranks: bare(ranks, "auto", False, args.compute * 1e-3),
        HIERARCHICAL: lambda ranks: bare(ranks, "hierarchical", True, args.compute * 1e-3),
        MODEL: lambda ranks: whole_model(ranks, args.compute * 1e-3),
    }
    say(
        f"weak scaling, simulated: {args.compute:g} ms of computing a step, {PARAMETERS:,} float32; "
        f"between hosts {ALPHA * 1e6:g} us and {8e-9 / BETA:g} Gbit/s, within {NEAR_ALPHA * 1e6:g} us and "
        f"{1e-9 / NEAR_BETA:g} GB/s, adding {1e-9 / GAMMA:g} GB/s"
    )
    say("a step in ms as simulated, by the formula, and efficiency: computing's share of it")
    say(f"{'ranks':>5}" + "".join(f"{name:>30}  " for name in contenders) + " auto is")
    points: dict[str, dict[int, Point]] = {name: {} for name in contenders}
    for ranks in args.simulated:
        line = f"{ranks:>5}"
        for name, simulate in contenders.items():
            if name == MODEL and ranks > args.with_model:
                line += f"{'-':>30}  "
                continue
            seconds, formula, algorithm = points[name][ranks] = simulate(ranks)
            if not math.isclose(seconds, formula, rel_tol=1e-9):
                raise SystemExit(
                    f"{name}, {ranks} ranks ({algorithm}): {seconds:.9g} s, by the formula {formula:.9g} s"
                )
            line += f"{seconds * 1e3:>13.4f}{formula * 1e3:>9.4f}{args.compute * 1e-3 / seconds:>8.1%}  "
        say(f"{line} {points[AUTO][ranks][2]}")
    return points


# -- strong scaling, measured ---------------------------------------------------------------------------------------


def speeds(args: argparse.Namespace) -> dict[str, list[float]] | None:
    """As one of the ranks: of each way, (samples/s of all ranks, the last loss). Rank 0 gets them."""
    import numpy as np

    import minidist as md

    comm = md.comm.world()
    result = {}
    ways = [0] if comm.size == 1 else [0, 1]
    for zero in ways if args.turn % 2 == 0 else reversed(ways):
        md.manual_seed(0)
        model: Any = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
        optimizer: Any = md.optim.Adam(model.parameters(), lr=1e-3)
        if comm.size > 1:
            model, optimizer = md.parallel.data_parallel(model, optimizer, comm, zero=zero)
        loader = md.data.Loader(*md.data.read_mnist("train"), batch_size=args.batch, rank=comm.rank, size=comm.size)
        batches = (batch for epoch in range(args.steps + WARM_UP) for batch in loader.epoch(epoch))
        for step, (images, labels) in enumerate(islice(batches, WARM_UP + args.steps)):
            if step == WARM_UP:
                md.collectives.barrier(comm)
                start = time.perf_counter()
            optimizer.zero_grad()
            loss = md.nn.functional.cross_entropy(model(md.Tensor(images)), md.Tensor(labels))
            loss.backward()
            optimizer.step()
        md.collectives.barrier(comm)
        took = md.collectives.all_reduce(comm, np.array([time.perf_counter() - start]), "max")
        lost = md.collectives.all_reduce(comm, np.array([loss.item() * len(labels) / args.batch]))
        result[str(zero)] = [args.steps * args.batch / float(took[0]), float(lost[0])]
    return result if comm.rank == 0 else None


def launch(args: argparse.Namespace, ranks: int, turn: int) -> dict[str, list[float]]:
    """Have so many ranks train, both ways; what `speeds` gives."""
    options = ["--batch", str(args.batch), "--steps", str(args.steps), "--turn", str(turn)]
    return report_of_ranks(ranks, [__file__, *options], args.deadline)


def strong(args: argparse.Namespace, say: Any) -> dict[tuple[int, str], list[float]]:
    """Of each (ranks, zero), the speed-ups against one rank, a repeat each."""
    from minidist.comm.threads import cores

    say(
        f"strong scaling, measured on {cores()} cores: {args.batch} samples a step, {args.repeats} x {args.steps} steps"
    )
    runs: dict[tuple[int, str], list[list[float]]] = {}
    for turn in range(args.repeats):
        for ranks in args.ranks if turn % 2 == 0 else reversed(args.ranks):
            for zero, run in launch(args, ranks, turn).items():
                runs.setdefault((ranks, zero), []).append(run)
    losses = [loss for several in runs.values() for _, loss in several]
    apart = (max(losses) - min(losses)) / min(losses)
    assert apart < 0.01, f"the last losses are {apart:.1%} apart: {sorted(set(losses))}"
    alone = [speed for speed, _ in runs[1, "0"]]
    say(f"{'ranks':>5}{'zero':>6}   {'samples/s':<28}{'speed-up':<22}efficiency")
    ratios = {}
    for (ranks, zero), several in sorted(runs.items()):
        ratios[ranks, zero] = [speed / one for (speed, _), one in zip(several, alone, strict=True)]
        efficiency = statistics.median(ratios[ranks, zero]) / ranks
        rate = spread([speed for speed, _ in several], ",.0f")
        say(f"{ranks:>5}{zero:>6}   {rate:<28}{spread(ratios[ranks, zero], '.2f'):<22}{efficiency:.1%}")
    say(f"the last losses agree to {apart:.0e}")
    return ratios


# -- the whole ------------------------------------------------------------------------------------------------------


def plot(path: Path, compute: float, points: dict[str, dict[int, Point]], ratios: dict) -> None:
    """Left the simulated steps on their formulas' lines, beside the `compute` ms; right the measured speed-ups."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, of_ranks) in enumerate(points.items()):
        ranks = list(of_ranks)
        look: Any = dict(color=f"C{number}", markersize=9 - 2 * number, marker="x" if name == MODEL else "o")
        left.plot(ranks, [of_ranks[P][0] * 1e3 for P in ranks], linestyle="", label=name, **look)
        left.plot(ranks, [of_ranks[P][1] * 1e3 for P in ranks], linewidth=1, color=f"C{number}")
    left.axhline(compute, color="grey", linestyle=":", label="computing alone")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.set_title("weak: simulated (points), formulas (lines)")
    left.set(xlabel="ranks", ylabel="a step, ms", xticks=list(points[RING]))
    most = max(seconds for of_ranks in points.values() for seconds, _, _ in of_ranks.values()) * 1e3
    left.set_yticks([compute * times for times in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50) if compute * times <= 1.5 * most])
    left.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    left.yaxis.set_major_formatter(FormatStrFormatter("%.1f"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend(loc="upper left")
    for zero in ("0", "1"):
        several = {ranks: values for (ranks, of), values in sorted(ratios.items()) if of == zero}
        middle = [statistics.median(values) for values in several.values()]
        low = [m - min(values) for m, values in zip(middle, several.values(), strict=True)]
        high = [max(values) - m for m, values in zip(middle, several.values(), strict=True)]
        right.errorbar(list(several), middle, yerr=[low, high], marker="o", capsize=3, label=f"zero={zero}")
    measured = sorted({ranks for ranks, _ in ratios})
    right.plot(measured, measured, color="grey", linestyle=":", label="as many times as ranks")
    right.set(xlabel="ranks", ylabel="times as fast as one rank", xticks=measured)
    right.set_title(f"strong: measured, {os.cpu_count()} cores")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    powers = [1 << k for k in range(11)]
    parser.add_argument("--simulated", type=int, nargs="+", default=powers, help="ranks: powers of two (1 ... 1024)")
    parser.add_argument("--with-model", type=int, default=64, help="up to so many train a whole model (%(default)s)")
    parser.add_argument("--compute", type=float, default=5.0, help="ms of a simulated step (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="that are measured (1 2 4)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="that are timed (%(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="samples a step, over all ranks (%(default)s)")
    parser.add_argument("--deadline", type=float, default=120, help="seconds for each mpirun (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the tables and the plot to benchmarks/results/")
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(ranks < 1 or ranks & ranks - 1 for ranks in args.simulated) or max(args.simulated) > STAND_IN // PER_HOST:
        parser.error("--simulated: expected powers of two, up to 2048")
    if args.with_model > 64:
        parser.error("--with-model: the network's parameters can be dealt evenly to 64 ranks at most")
    if 1 not in args.ranks or min(args.ranks) < 1 or args.batch < max(args.ranks):
        parser.error("--ranks: expected 1 among them, and at least a sample for each")
    if min(args.repeats, args.steps) < 1 or not args.compute > 0:
        parser.error("expected --repeats and --steps from 1 up, and --compute above 0")
    if args.save and importlib.util.find_spec("matplotlib") is None:
        parser.error("--save draws a plot with matplotlib: pip install 'minidist[plot]'")
    return args


def main() -> None:
    args = parse()
    os.environ.update(ONE_THREAD)  # before NumPy is imported
    if args.report:
        result = speeds(args)
        if result is not None:
            args.report.write_text(json.dumps(result))
        return

    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(machine())
    say("")
    points = weak(args, say)
    say("")
    ratios = strong(args, say)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scaling.txt").write_text("\n".join(lines) + "\n")
        plot(RESULTS / "scaling.png", args.compute, points, ratios)


if __name__ == "__main__":
    main()
