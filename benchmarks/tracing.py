"""What recording a run costs: steps of training with the recorder on and off, in turn.

    python benchmarks/tracing.py [--ranks 1 2 4] [--pairs 30] [--save]

The document's network, 784-1024-10, on 32 images a rank; by data parallelism with the ring, and on two ranks and more
also in a pipeline of all ranks, with 4 microbatches. A pair is STEPS steps without the recorder and STEPS with it, in
changing order; the slowest rank's time counts. The table gives the median over pairs of (with - without) / without, and
its quartiles, and the rows that a rank writes in a step. To expect: about 1 us a row as it happens. Putting a row into
words takes 2 us more; that is done when all is over (or every ROOM rows), and is not in these figures.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, machine, run_ranks

STEPS = 20


def rank(how: str, pairs: int, out: str) -> None:
    """What each rank runs; rank 0 writes its line."""
    import minidist as md
    from minidist.nn import functional as F

    comm = md.comm.world()
    md.manual_seed(0)
    model = md.nn.Sequential(md.nn.Linear(784, 1024), md.nn.ReLU(), md.nn.Linear(1024, 10))
    images, labels = (array[: 32 * comm.size] for array in md.data.mnist("train"))
    if how == "pp":
        mesh = md.Mesh(comm, pp=comm.size)
        options = {"schedule": "1f1b", "microbatches": 4}
        trainer = md.parallel.Trainer(model, md.optim.Adam, mesh, F.cross_entropy, **options)

        def step() -> None:
            trainer.step(images, labels)
    else:
        model, optimizer = md.parallel.data_parallel(model, md.optim.Adam(model.parameters()), comm, algorithm="ring")
        mine = md.collectives.chunk_slice(len(labels), comm.size, comm.rank)

        def step() -> None:
            optimizer.zero_grad()
            with comm.step("D.3(3) train"):
                F.cross_entropy(model(md.Tensor(images[mine])), md.Tensor(labels[mine])).backward()
            optimizer.step()

    def steps() -> float:
        md.collectives.barrier(comm)
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        took = np.array([time.perf_counter() - start])
        return float(md.collectives.all_reduce(comm, took, "max")[0])

    order = random.Random(0)  # alike on all ranks
    added, rows, lengths = [], [], []
    steps()
    for _ in range(pairs):
        with_first = order.random() < 0.5
        seconds = {}
        for recorded in (with_first, not with_first):
            if not recorded:
                seconds[recorded] = steps()
                continue
            with tempfile.TemporaryDirectory() as folder:
                with md.trace.record(comm, folder):
                    seconds[recorded] = steps()
                written = Path(folder, f"rank-{comm.rank:04}.jsonl").read_text()
            rows.append(written.count("\n") / STEPS)
        added.append(seconds[True] / seconds[False] - 1)
        lengths.append(seconds[False] / STEPS)
    if comm.rank == 0:
        low, middle, high = statistics.quantiles(added, n=4)
        figures = f"{statistics.median(lengths) * 1e3:>10.2f}{statistics.median(rows):>14.0f}{middle:>12.1%}"
        Path(out).write_text(f"{how:<6}{comm.size:>5}{figures}   ({low:.1%} – {high:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--as-rank", nargs=2, metavar=("HOW", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return rank(args.as_rank[0], args.pairs, args.as_rank[1])
    lines = [machine(), f"{args.pairs} pairs of {STEPS} steps; median (quartiles)", ""]
    lines.append(f"{'':<6}{'ranks':>5}{'ms a step':>10}{'rows a step':>14}{'recording adds':>17}")
    print("\n".join(lines), flush=True)
    for ranks in args.ranks:
        for how in ("dp", "pp") if ranks > 1 else ("dp",):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "line")
                run_ranks(
                    ranks, [__file__, "--pairs", str(args.pairs), "--as-rank", how, str(out)], 600, sys.executable
                )
                lines.append(out.read_text())
            print(lines[-1], flush=True)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "tracing.txt").write_text("\n".join(lines) + "\n")
    return None


if __name__ == "__main__":
    main()
