"""How much of the communication hides behind backward, and how large should a bucket be?

    python benchmarks/cluster.py --bandwidth 1gbit -- python benchmarks/buckets.py --save     # 2 hosts of 2 ranks
    mpirun -n 4 python benchmarks/buckets.py

A network of --layers equal layers (1024 x 1024, ReLU: 4.2 MB of gradients each), float32, SGD, so many samples a rank,
trained with all gradients in one bucket and with buckets of several sizes. Told are, as medians over repeats,

    samples/s    of all ranks, and as a ratio to one bucket's in the same repeat
    waited       ms a step in which a rank could do nothing but communicate (the mean over ranks)
    on its way   ms a step in which a bucket was on its way or waited for; what was not waited for was hidden

What to expect. Between hosts, n bytes of gradients take 2 n (H-1)/H bytes of each host's link, all of it after backward
with one bucket. With buckets a part of it goes while backward computes: at most backward's time, and less by what the
first bucket waits for and the last one adds. Within a host there is nothing to hide behind: messages are carried by
the cores that compute, and small buckets only add latency. Messages move on when a rank looks after them, which it
does as each gradient is finished; there is no thread for it (see overlap.py for why).

How it is measured. Each repeat trains every contender for --steps steps, in turn, beginning with another one each time,
from the same weights, between barriers; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np
from common import RESULTS, machine, spread

import minidist as md
from minidist.parallel.buckets import size_of_buckets

WIDTH, WARM_UP, MB = 1024, 2, 1 << 20
SIZES = {"one bucket": 1 << 40, "chosen": None, "1 MiB": MB, "4 MiB": 4 * MB, "8 MiB": 8 * MB, "16 MiB": 16 * MB}


def measured(comm, bucket_bytes: int | None, args) -> tuple[float, float, float]:
    """(samples/s of all ranks, seconds a step waited, seconds a step on its way)."""
    md.manual_seed(0)
    nn = md.nn
    model = nn.Sequential(*[layer for _ in range(args.layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])
    optimizer = md.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer = md.parallel.data_parallel(model, optimizer, comm, bucket_bytes=bucket_bytes)
    x = md.Tensor(np.random.default_rng(comm.rank).standard_normal((args.batch, WIDTH)).astype(np.float32))

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()
            optimizer.step()

    steps(WARM_UP)
    model.meter.reset()
    md.collectives.barrier(comm)
    start = time.perf_counter()
    steps(args.steps)
    md.collectives.barrier(comm)
    took = md.collectives.all_reduce(comm, np.array([time.perf_counter() - start]), "max")
    times = np.array([model.meter.waited, model.meter.communicated]) / args.steps
    md.collectives.all_reduce(comm, times, "mean")
    return args.steps * args.batch * comm.size / float(took[0]), float(times[0]), float(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="samples a rank (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    comm = md.comm.world()
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SIZES}
    for repeat in range(args.repeats):
        names = list(SIZES)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            runs[name].append(measured(comm, SIZES[name], args))
    if comm.rank == 0:
        report(comm, args, runs)


def report(comm, args, runs: dict[str, list[tuple[float, float, float]]]) -> None:
    """Print, and save, what was measured."""
    hosts, link = len(set(comm.hosts())), os.environ.get("MINIDIST_CLUSTER_BANDWIDTH")
    where = f"{comm.size} ranks on {hosts} host{'s' * (hosts > 1)}"
    where += f", {float(link) / 1e6:g} Mbit/s between them" if link else ""
    gradients = args.layers * (WIDTH * WIDTH + WIDTH) * 4
    chosen = size_of_buckets(comm, zero=0)
    lines = [
        machine(),
        f"{where}; {args.layers} layers, {gradients / 1e6:.1f} MB of gradients, batch {args.batch} a rank; "
        f"{args.repeats} repeats of {args.steps} steps",
        f"chosen: {'one bucket' if chosen is None else f'{chosen / MB:.2f} MiB'}",
        "",
        f"{'buckets':<12}{'samples/s':<24}{'against one':<22}{'waited ms':>10}{'on its way ms':>15}{'hidden':>8}",
    ]
    one = runs["one bucket"]
    for name, several in runs.items():
        ratios = [mine[0] / whole[0] for mine, whole in zip(several, one, strict=True)]
        waited, under_way = (statistics.median(run[i] for run in several) * 1e3 for i in (1, 2))
        lines.append(
            f"{name:<12}{spread([run[0] for run in several], ',.0f'):<24}{spread(ratios, '.2f'):<22}"
            f"{waited:>10.1f}{under_way:>15.1f}{1 - waited / under_way if under_way else 0:>8.0%}"
        )
    print("\n".join(lines), flush=True)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        name = "buckets" + ("_two_hosts" if hosts == 2 else "")
        (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
