"""What does sending less save, and what does it cost?

    python benchmarks/cluster.py --bandwidth 1gbit -- python benchmarks/compression.py --save     # 2 hosts of 2 ranks
    mpirun -n 4 python benchmarks/compression.py

The document's network (784-1024-10, 814,090 float32) on MNIST, 128 samples a rank, Adam, with whole gradients and with
each compression of parallel/compression. Told are

    samples/s     of all ranks, median over repeats and the range, and as a ratio to whole gradients' in the same repeat
    MB a step     that a rank sends, counted by the simulator on as many ranks and hosts
    accuracy      on the test images after so many epochs (one run; the plot of --save shows it against bytes sent)

What to expect. Whole gradients take 2 n (H-1)/H bytes of each host's link (n = 3.26 MB): 26 ms at 1 Gbit/s, two hosts,
beside some 20 ms of computing by four ranks on two cores; 16 bits half of that. top-k, random-k and sign send 30 to 100
times less, and take the time that choosing takes; PowerSGD of rank 4 sends 2 % and multiplies three more times.

How it is measured. Each repeat trains every contender for --steps steps, in turn, beginning with another one each time,
from the same weights, on the same batches, between barriers; the slowest rank counts. The accuracy is that of a run of
its own, of --epochs epochs.
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
from minidist.data.mnist import scaled
from minidist.nn import functional as F
from minidist.nn.flat import FlatBuffer
from minidist.parallel.compression import compression_of

WHOLE = "whole"
CONTENDERS = [WHOLE, "fp16", "bf16", "topk:0.01", "randomk:0.01", "sign", "powersgd:4"]
BATCH, WARM_UP, POINTS = 128, 3, 10


class Training:
    """One contender, from the same start as all others."""

    def __init__(self, comm, how: str, data):
        md.manual_seed(0)
        self.comm, self.how = comm, how
        self.model = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
        optimizer = md.optim.Adam(self.model.parameters(), lr=1e-3)
        compress = None if how == WHOLE else how
        self.network, self.optimizer = md.parallel.data_parallel(self.model, optimizer, comm, compress=compress)
        self.loader = md.data.Loader(*data, batch_size=BATCH * comm.size, rank=comm.rank, size=comm.size)

    def steps(self, epoch: int):
        """Train an epoch; yields after each step."""
        for images, labels in self.loader.epoch(epoch):
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(md.Tensor(images)), md.Tensor(labels)).backward()
            self.optimizer.step()
            yield

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Of this rank's part of the test images, and all others'."""
        right = np.zeros(2)
        with md.no_grad():
            for start in range(self.comm.rank * 500, len(labels), self.comm.size * 500):
                part = slice(start, start + 500)
                x = scaled(images[part]) if images.dtype == np.uint8 else images[part]
                right += (self.model(md.Tensor(x)).argmax(1).numpy() == labels[part]).sum(), len(labels[part])
        md.collectives.all_reduce(self.comm, right)
        return float(right[0] / right[1])


def samples_per_second(comm, how: str, data, steps: int) -> float:
    """Of all ranks together; the slowest counts."""
    training = Training(comm, how, data)
    running = training.steps(epoch=0)
    for _ in range(WARM_UP):
        next(running)
    md.collectives.barrier(comm)
    start = time.perf_counter()
    for _ in range(steps):
        next(running)
    md.collectives.barrier(comm)
    took = md.collectives.all_reduce(comm, np.array([time.perf_counter() - start]), "max")
    return steps * BATCH * comm.size / float(took[0])


def curve(comm, how: str, data, test, epochs: int) -> list[tuple[int, float]]:
    """(steps so far, accuracy), POINTS times an epoch."""
    training, points, step = Training(comm, how, data), [], 0
    every = max(1, len(training.loader) // POINTS)
    for epoch in range(epochs):
        for _ in training.steps(epoch):
            step += 1
            if step % every == 0:
                points.append((step, training.accuracy(*test)))
    return [*points, (step, training.accuracy(*test))]


def bytes_a_step(how: str, size: int, hosts: list[int]) -> float:
    """What a rank sends for the gradients of one step, the mean over ranks."""

    def program(comm, steps: int) -> None:
        model = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
        flat = FlatBuffer(list(model.parameters()))
        gradient = np.random.default_rng(comm.rank).standard_normal(flat.size).astype(np.float32)
        compression = None if how == WHOLE else compression_of(how)(comm, flat)
        for _ in range(steps):
            if compression is None:
                md.collectives.all_reduce(comm, gradient)
            else:
                compression.add_up(gradient)

    network = md.comm.Network(alpha=1e-5, beta=1e-10, hosts=hosts, between=md.comm.Link(5e-5, 8e-9))
    sent = [md.comm.simulate(program, size, steps, network=network).bytes for steps in (1, 2)]
    return (sent[1] - sent[0]) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="that are timed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="for the accuracy (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the table and the plot to benchmarks/results/")
    args = parser.parse_args()
    comm = md.comm.world()
    train, test = md.data.read_mnist("train"), md.data.read_mnist("test")
    speeds: dict[str, list[float]] = {how: [] for how in CONTENDERS}
    for repeat in range(args.repeats):
        first = repeat % len(CONTENDERS)
        for how in CONTENDERS[first:] + CONTENDERS[:first]:
            speeds[how].append(samples_per_second(comm, how, train, args.steps))
    curves = {how: curve(comm, how, train, test, args.epochs) for how in CONTENDERS}
    if comm.rank == 0:
        report(comm, args, speeds, curves)


def report(comm, args, speeds: dict[str, list[float]], curves: dict[str, list[tuple[int, float]]]) -> None:
    """Print, and save, what was measured."""
    hosts = comm.hosts()
    sent = {how: bytes_a_step(how, comm.size, hosts) for how in CONTENDERS}
    link = os.environ.get("MINIDIST_CLUSTER_BANDWIDTH")
    where = f"{comm.size} ranks on {len(set(hosts))} hosts" if len(set(hosts)) > 1 else f"{comm.size} ranks on one host"
    where += f", {float(link) / 1e6:g} Mbit/s between them" if link else ""
    lines = [
        machine(),
        f"{where}; {args.repeats} repeats of {args.steps} steps; accuracy after {args.epochs} epochs",
        "",
    ]
    lines.append(f"{'gradients':<14}{'samples/s':<28}{'against whole':<22}{'MB a step':>10}  {'accuracy':>8}")
    for how in CONTENDERS:
        ratios = [mine / whole for mine, whole in zip(speeds[how], speeds[WHOLE], strict=True)]
        lines.append(
            f"{how:<14}{spread(speeds[how], ',.0f'):<28}{spread(ratios, '.2f'):<22}"
            f"{sent[how] / 1e6:>10.3f}  {curves[how][-1][1]:>8.2%}"
        )
    slower = [how for how in CONTENDERS[1:] if statistics.median(speeds[how]) <= statistics.median(speeds[WHOLE])]
    lines += ["", "slower than whole gradients: " + (", ".join(slower) or "none")]
    print("\n".join(lines), flush=True)
    if args.save:
        name = "compression" + ("_two_hosts" if len(set(hosts)) == 2 else "")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n")
        plot(RESULTS / f"{name}.png", where, sent, curves)


def plot(path, where: str, sent: dict[str, float], curves: dict[str, list[tuple[int, float]]]) -> None:
    """Accuracy against bytes sent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for how, points in curves.items():
        axes.plot([step * sent[how] / 1e6 for step, _ in points], [a for _, a in points], marker=".", label=how)
    axes.set(xscale="log", xlabel="sent by a rank so far, MB", ylabel="test accuracy", title=where, ylim=(0.7, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
