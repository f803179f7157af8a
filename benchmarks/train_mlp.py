"""How fast is training the document's network, beside PyTorch?

    python benchmarks/train_mlp.py [--ranks 1 2 4] [--batch 128 32] [--repeats 3] [--epochs 10] [--save]

784-1024-10, ReLU, cross-entropy, Adam, 60,000 images of MNIST, batch 128 or 32 a rank, float32, one BLAS thread a rank
on both sides. The contenders:

    minidist           data_parallel: plain (zero=0), and with the optimizer sharded (zero=1)
    PyTorch            eager, fused Adam; on several ranks DistributedDataParallel over Gloo
    PyTorch, flushing  the same after torch.set_flush_denormal(True), which is off by default

What to expect. A step's products cost 4 · 128 · 784 · 1024 flops a rank (no gradient for the images): 2.7 ms at
150 GFLOP/s; with batch 32 a quarter of it. Adam touches 4 arrays of 3.26 MB ten times over, from cache: 1.1 ms; with
zero=1 a P-th of it. 2 (P-1)/P · 3.26 MB a rank go through shared memory: 0.3 to 0.5 ms on 2 ranks, 1 to 1.7 ms on 4.
On fewer cores than ranks all of it takes turns. From the second epoch on Adam's averages meet subnormal numbers, on
which processors are slow; minidist's optimizers sweep them out (optim.optimizer.flush_subnormals), PyTorch's step takes
three times as long. So the first epoch and the whole job are both told.

How it is measured. Each repeat starts every contender once, in turn, as processes of their own, fed by the same loader;
30 steps to warm up, then the epochs, between barriers. A repeat counts its slowest rank; the table gives the median
over repeats and the range; ratios are taken within each repeat, over the whole job. That all contenders do the same is
checked on the losses of their first steps, outside the timed part. PyTorch needs `pip install -e ".[peers]"`.

Tried without gain: parts of the optimizer aligned to cache lines; its pieces in reverse; huge pages; numexpr for Adam
(three times slower); the first layer's product cut into blocks; exchanging sample counts during forward; DDP with
gradient_as_bucket_view (no faster); ranks pinned to cores (2 % at most). For four ranks on two cores: a direct exchange
in the place of the ring, reduce_scatter and all_gather through shared memory, the kernel's batch scheduling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

from common import ONE_THREAD, RESULTS, machine, spread

WARM_UP = 30


# -- a rank ---------------------------------------------------------------------------------------------------------


def loader_of(rank: int, size: int):
    """This rank's share of the images, for either side."""
    from minidist.data import Loader, read_mnist

    batch_size = int(os.environ["BENCHMARK_BATCH"]) * size
    return Loader(*read_mnist("train"), batch_size=batch_size, rank=rank, size=size)


def rank_of_minidist(zero: int) -> dict:
    import minidist as md
    from minidist.nn import functional as F

    comm = md.comm.world()
    md.manual_seed(0)
    model = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
    optimizer = md.optim.Adam(model.parameters(), lr=1e-3)
    if comm.size > 1:
        model, optimizer = md.parallel.data_parallel(model, optimizer, comm, zero=zero)

    def step(images, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(md.Tensor(images)), md.Tensor(labels))
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed(step, loader_of(comm.rank, comm.size), lambda: md.collectives.barrier(comm), comm.rank)


def rank_of_pytorch(meeting: str, flush: bool) -> dict:
    import torch
    import torch.distributed as dist

    import minidist as md

    torch.set_num_threads(1)
    torch.set_flush_denormal(flush)
    rank, size = launcher_place()
    md.manual_seed(0)
    ours = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
    model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    barrier = lambda: None  # noqa: E731
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        model = torch.nn.parallel.DistributedDataParallel(model)
        barrier = dist.barrier
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(images, labels):
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    report = timed(step, loader_of(rank, size), barrier, rank)
    if size > 1:
        dist.destroy_process_group()
    return report


def launcher_place() -> tuple[int, int]:
    """(rank, size) as mpirun tells them, for the peer, which uses no MPI."""
    from minidist.comm.world import launched

    return launched() or (0, 1)


def timed(step, loader, barrier, rank: int) -> dict:
    """WARM_UP steps, then the timed epochs: seconds of each, the first losses, and this process's peak memory."""
    losses, first = [], 0.0
    for images, labels in islice(loader.epoch(0), WARM_UP):
        losses.append(step(images, labels))
        first = first or time.time()
    seconds = []
    for epoch in range(1, int(os.environ["BENCHMARK_EPOCHS"]) + 1):
        barrier()
        start = time.perf_counter()
        for images, labels in loader.epoch(epoch):
            step(images, labels)
        barrier()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"rank": rank, "seconds": seconds, "losses": losses, "first": first, "peak": peak}


# -- the whole ------------------------------------------------------------------------------------------------------


def launch(contender: str, ranks: int, batch: int, epochs: int) -> dict:
    """Start one contender on so many ranks; what its slowest rank took, and what it began with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--contender", contender, "--folder", folder]
        if ranks > 1:
            command = ["mpirun", "-n", str(ranks), *command]
        environment = {**os.environ, **ONE_THREAD, "BENCHMARK_EPOCHS": str(epochs), "BENCHMARK_BATCH": str(batch)}
        begun = time.time()
        subprocess.run(command, env=environment, check=True, timeout=900)
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    assert len(reports) == ranks, f"{contender}: {len(reports)} reports from {ranks} ranks"
    images = 60_000
    return {
        "first_epoch": images / max(r["seconds"][0] for r in reports),
        "whole": images * epochs / max(sum(r["seconds"]) for r in reports),
        "losses": [sum(r["losses"][i] for r in reports) / ranks for i in range(WARM_UP)],
        "startup": max(r["first"] for r in reports) - begun,
        "peak": max(r["peak"] for r in reports),
    }


def autograd_overhead() -> list[str]:
    """The cost of one small recorded operation: tensors of 8 elements, chains of 200 operations."""
    import numpy as np
    import torch

    import minidist as md

    def chain(x, y, forward_only):
        z = x
        for _ in range(100):
            z = z * y
            z = z + y
        z = z.sum()
        if not forward_only:
            z.backward()

    lines = []
    for forward_only in (True, False):
        microseconds = {}
        for name, make in (("minidist", md.tensor), ("PyTorch", torch.tensor)):
            x, y = (make(np.full(8, value, np.float32)).requires_grad_() for value in (0.5, 0.1))
            times = []
            for _ in range(60):
                start = time.perf_counter()
                chain(x, y, forward_only)
                times.append((time.perf_counter() - start) / 201 * 1e6)
            microseconds[name] = statistics.median(times[10:])
        what = "forward" if forward_only else "forward and backward"
        lines.append(f"one small operation, {what}: " + ", ".join(f"{n} {t:.1f} µs" for n, t in microseconds.items()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 32], help="samples a rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.contender:
        kind, _, option = args.contender.partition(":")
        if kind == "minidist":
            report = rank_of_minidist(zero=int(option))
        else:
            report = rank_of_pytorch(f"{args.folder}/meeting", flush=option == "flush")
        Path(args.folder, f"rank-{report['rank']}.json").write_text(json.dumps(report))
        return

    lines = [
        machine(PyTorch="torch"),
        f"{args.repeats} repeats of {args.epochs} epochs; samples/s of all ranks, median (range)",
        "",
    ]
    columns = f"{'first epoch':<27}{'whole job':<27}{'against PyTorch':<22}{'start-up s':<12}peak MB/rank"
    lines.append(f"{'ranks':>5}{'batch':>7}  {'contender':<26}{columns}")
    print("\n".join(lines), flush=True)
    for batch, ranks in product(args.batch, args.ranks):
        contenders = ["minidist:0", *["minidist:1"] * (ranks > 1), "pytorch", "pytorch:flush"]
        runs: dict[str, list[dict]] = {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name in contenders:
                runs[name].append(launch(name, ranks, batch, args.epochs))
        check_losses(runs)
        for name in contenders:
            ratios = [mine["whole"] / theirs["whole"] for mine, theirs in zip(runs[name], runs["pytorch"], strict=True)]
            line = (
                f"{ranks:>5}{batch:>7}  {label(name, ranks):<26}"
                f"{spread([r['first_epoch'] for r in runs[name]], ',.0f'):<27}"
                f"{spread([r['whole'] for r in runs[name]], ',.0f'):<27}"
                f"{spread(ratios, '.2f'):<22}"
                f"{statistics.median(r['startup'] for r in runs[name]):<12.2f}"
                f"{max(r['peak'] for r in runs[name]) / 1e6:.0f}"
            )
            lines.append(line)
            print(line, flush=True)
    overhead = autograd_overhead()
    lines += ["", *overhead]
    print("\n".join(["", *overhead]))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        name = "train_mlp" if 128 in args.batch else f"train_mlp_{args.batch[0]}"
        (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n")


def label(name: str, ranks: int) -> str:
    kind, _, option = name.partition(":")
    if kind == "pytorch":
        return ("PyTorch" if ranks == 1 else "PyTorch DDP") + ", flushing" * (option == "flush")
    return "minidist" if ranks == 1 else f"minidist, zero={option}"


def check_losses(runs: dict[str, list[dict]]) -> None:
    """All contenders trained the same network on the same batches: their losses agree to float32's accuracy."""
    expected = runs["pytorch"][0]["losses"]
    for name, several in runs.items():
        for run in several:
            worst = max(abs(a - b) / b for a, b in zip(run["losses"], expected, strict=True))
            assert worst < 1e-2, f"{name}: losses differ from PyTorch's by {worst:.2e}"


if __name__ == "__main__":
    main()
