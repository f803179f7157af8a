"""How much memory does each stage of ZeRO take on a rank, and what does it send for it?

    python benchmarks/zero_memory.py [--ranks 1 2 4] [--layers 24] [--hidden 2048] [--save]

A stack of layers (Linear and ReLU; by default 24 of 2048 x 2048, 100.7 million parameters), Adam, float32, a batch so
small that activations hardly count, zero=0 to 3, buckets as data_parallel chooses them, the ring. Told are, per rank
(of all ranks the largest figure), in MB = 10^6 bytes:

    held      between two steps. formula: parallel.bytes_per_rank. arrays: those that the Meter knows. RSS: what the
              process has more of, by the operating system, than before the model was made; and what it had before
              glibc was asked to give back what is free
    peak      during a step. formula: see below. RSS: VmHWM, the most that the operating system has seen
    made      during one more step: the most that new arrays take, counted by Python itself (tracemalloc)
    sent      a step, counted by the Meter

What to expect. With n parameters on P ranks held is (4 + 4 + 8) n bytes with zero=0, and 1/P of what is sharded. A step
needs more, beside A bytes of activations:

    zero=2    2 B: the gradients of a bucket, of B bytes, while those of the bucket before are on their way
    zero=3    3 L: the same of two layers, of L bytes each, and the parameters of the layer that computes
    Adam      two scratch arrays of at most 48 Ki numbers (of which plain Adam writes to one)

and sends 2 n (P-1)/P parameters of 4 bytes, or with zero=3, which gathers each layer twice, 3 n (P-1)/P. Larger
batches, and models with one layer much larger than the others, save less than the table of stages promises. The model
is made whole on each rank before it is dealt: until the first step a rank has all 4 n bytes of parameters at any stage.

How it is measured. For each line, processes of their own: a model of two such layers trains first, so that what the
libraries (BLAS, MPI) keep for themselves is there already; then the model is made, two steps warm up (the first makes
Adam's state), the peak is reset (5 to /proc/self/clear_refs), and --steps steps are timed, of which the slowest rank
counts. Where the peak can't be reset it is that since the process was started, setting up included, and marked so.
The losses must be alike on all lines.

glibc keeps some of what is freed: arrays below a threshold, which grows with those freed up to 32 MiB, come from its
heap, of which it gives back the end only. So a process may still have the memory of the parameters as they were made
(4 n bytes, idle), before they were laid out anew in one array; that is where "untrimmed" is the larger. malloc_trim(0)
gives back all that is free; it is called before the peak is reset, and before "RSS" is read. During the timed steps
glibc is left as it is, and its heap is cut up: with zero=3 it takes up to one layer more than the arrays in it ever did
(see "made", where there is no heap). With MALLOC_MMAP_THRESHOLD_=1048576 in the environment, which keeps large arrays
off the heap, the peak is the formula's at all stages, within 0.5 %; and steps take longer, as their memory comes anew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

from common import ONE_THREAD, RESULTS, machine, report_of_ranks, spread

BATCH, WARM_UP = 16, 2
LIBRARIES = 150e6  # bytes that a rank takes without any model


# -- what the operating system says -----------------------------------------------------------------------------------


def status() -> dict[str, int]:
    """Bytes that this process has (VmRSS) and has had at most (VmHWM); empty where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def reset_peak() -> bool:
    """Let VmHWM begin anew; whether that was possible."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return bool(status())
    return False


def peak_since_start() -> int:
    """Bytes; where /proc can't tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def trim() -> None:
    """Have glibc give back all that is free. Other allocators keep what they keep."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available() -> float:
    """Bytes that programs may still take on this machine; infinite if it doesn't say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), math.inf)


# -- a rank ---------------------------------------------------------------------------------------------------------


class Training:
    """A stack of layers, dealt to the ranks."""

    def __init__(self, comm: Any, zero: int, hidden: int, layers: int):
        import numpy as np

        import minidist as md

        md.manual_seed(0)
        linears = [md.nn.Linear(hidden, hidden) for _ in range(layers)]
        for linear in linears:
            md.nn.init.kaiming_uniform_(linear.weight)  # or nothing of the batch would come through so many layers
        model = md.nn.Sequential(*[module for linear in linears for module in (linear, md.nn.ReLU())])
        adam = md.optim.Adam(model.parameters(), lr=1e-5)
        self.network, self.optimizer = md.parallel.data_parallel(model, adam, comm, zero=zero, algorithm="ring")
        self.parts = adam.parts
        rows = np.random.default_rng(0).standard_normal((BATCH, hidden), np.float32)
        self.batch = md.Tensor(np.array_split(rows, comm.size)[comm.rank])

    def step(self) -> float:
        """Train once; this rank's part of the loss, as it was before."""
        self.optimizer.zero_grad()
        y = self.network(self.batch)
        loss = (y * y).sum() * (1 / len(self.batch))  # of the mean row
        loss.backward()
        self.optimizer.step()
        return loss.item() * len(self.batch) / BATCH

    def transient(self, zero: int) -> int:
        """Bytes that a step needs for a while, beside activations: gradients of two buckets, parameters of a layer."""
        largest = max(part.flat.size * part.flat.dtype.itemsize for part in self.parts)
        return (min(2, len(self.parts)) * (zero >= 2) + (zero == 3)) * largest

    def scratch(self) -> int:
        """Bytes of the optimizer's scratch arrays."""
        return sum({id(array): array.nbytes for part in self.parts for array in part.scratch}.values())


def measure(args: argparse.Namespace) -> dict[str, float] | None:
    """Measure one stage as one of the ranks; rank 0 gets the report."""
    import numpy as np

    import minidist as md

    comm = md.comm.world()

    # 1. What the libraries keep for themselves is there before we look.
    first = Training(comm, args.zero, args.hidden, layers=2)
    for _ in range(WARM_UP):
        first.step()
    del first
    trim()
    before = status().get("VmRSS", 0)

    # 2. The model, and Adam's state.
    training = Training(comm, args.zero, args.hidden, args.layers)
    for _ in range(WARM_UP):
        training.step()
    meter = training.network.meter
    activations = meter.memory["activations"]
    untrimmed = status().get("VmRSS", 0) - before
    meter.reset()

    # 3. The steps that count.
    trim()
    md.collectives.barrier(comm)
    could_reset = reset_peak()
    seconds, losses = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(training.step())
        seconds.append(time.perf_counter() - start)
    peak = status()["VmHWM"] - before if could_reset else peak_since_start() - before
    sent = meter.sent_bytes / args.steps
    trim()
    held = status().get("VmRSS", 0) - before
    meter.reset()
    meter.weigh()  # now, between two steps
    arrays = sum(meter.memory.values())

    # 4. One more, for Python to count what it makes.
    tracemalloc.start()
    training.step()
    made = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    n = sum(p.numel() for p in training.network.parameters())
    formula = md.parallel.bytes_per_rank(args.zero, n, comm.size)
    for_a_while = training.transient(args.zero) + activations
    figures = {
        "arrays": arrays,
        "held": held,
        "untrimmed": untrimmed,
        "peak": peak,
        "peak_formula": formula + for_a_while + training.scratch(),
        "made": made,
        "made_formula": for_a_while,
        "scratch": training.scratch(),
        "sent": sent,
        "could_not_reset": not could_reset,
        **{f"seconds {i}": value for i, value in enumerate(seconds)},
    }
    largest = md.collectives.all_reduce(comm, np.array(list(figures.values()), np.float64), "max").tolist()
    told: dict[str, float] = dict(zip(figures, largest, strict=True))
    loss = md.collectives.all_reduce(comm, np.array([losses[-1]])).item()
    send = (3 if args.zero == 3 else 2) * 4 * n * (comm.size - 1) / comm.size
    return {**told, "n": n, "formula": formula, "sent_formula": send, "loss": loss} if comm.rank == 0 else None


# -- the whole ------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, ranks: int, zero: int) -> dict[str, float]:
    """Have so many ranks measure one stage; their report."""
    size = ["--hidden", str(args.hidden), "--layers", str(args.layers), "--steps", str(args.steps)]
    return report_of_ranks(ranks, [__file__, *size, "--zero", str(zero)], args.deadline)


def needed(args: argparse.Namespace, ranks: int, zero: int) -> float:
    """Bytes that all ranks together will take at most, setting up included."""
    from minidist.parallel import bytes_per_rank

    layer = args.hidden * (args.hidden + 1)
    n = args.layers * layer
    setting_up = 2 * 4 * n + 4 * n / ranks  # as it is made, laid out anew, and this rank's part
    return ranks * (LIBRARIES + max(setting_up, bytes_per_rank(zero, n, ranks) + 5 * 4 * layer))


HEADER = [
    f"{'':>11}{'held MB':>38}{'peak MB':>27}{'made MB':>19}{'sent MB a step':>20}",
    f"{'ranks zero':>11}{'formula':>9}{'arrays':>9}{'RSS':>9}{'untrimmed':>11}"
    f"{'formula':>11}{'RSS':>9}{'ratio':>7}{'formula':>10}{'peak':>9}{'formula':>11}{'sent':>9}   s a step",
]


def row(ranks: int, zero: int, report: dict[str, float], steps: int) -> str:
    mb = {name: value / 1e6 for name, value in report.items()}
    seconds = [report[f"seconds {i}"] for i in range(steps)]
    return (
        f"{ranks:>6}{zero:>5}{mb['formula']:>9,.1f}{mb['arrays']:>9,.1f}{mb['held']:>9,.1f}{mb['untrimmed']:>11,.1f}"
        f"{mb['peak_formula']:>11,.1f}{mb['peak']:>9,.1f}{report['peak'] / report['peak_formula']:>7.3f}"
        f"{mb['made_formula']:>10,.1f}{mb['made']:>9,.1f}{mb['sent_formula']:>11,.1f}{mb['sent']:>9,.1f}"
        f"   {spread(seconds, '.2f')}" + "   peak since the start" * bool(report["could_not_reset"])
    )


def check(reports: dict[tuple[int, int], dict[str, float]], layers: int) -> list[str]:
    """All stages on all numbers of ranks have trained alike, and hold the arrays that the formula says.

    Returns what there is to tell; also where more was made during a step than the formula says.
    """
    losses = [report["loss"] for report in reports.values()]
    middle = statistics.median(losses)
    apart = max(abs(loss - middle) / middle for loss in losses)
    assert apart < 1e-3, f"the losses are {apart:.1e} apart: {losses}"
    for (ranks, zero), report in reports.items():
        rounding = 16 * layers  # a parameter more of each bucket, on the first ranks
        assert abs(report["arrays"] - report["formula"]) <= rounding, f"{ranks} ranks, zero={zero}: {report}"
    scratch = max(report["scratch"] for report in reports.values())
    more = [
        f"{ranks} ranks, zero={zero}: {report['made'] / 1e6:.1f} MB"
        for (ranks, zero), report in reports.items()
        if report["made"] > 1.1 * report["made_formula"] + 1e6
    ]
    return [
        f"the last losses of all lines agree to {apart:.0e}; "
        f"the optimizer's scratch arrays take up to {scratch / 1e6:.1f} MB a rank",
        "made during a step, more than the formula says: " + ("; ".join(more) or "nowhere"),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=2048, help="inputs and outputs of a layer (%(default)s)")
    parser.add_argument("--layers", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed (%(default)s)")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for each mpirun (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--zero", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.hidden, args.layers, args.steps, *args.ranks) < 1:
        parser.error("expected --ranks, --hidden, --layers and --steps from 1 up")
    return args


def main() -> None:
    args = parse()
    os.environ.update(ONE_THREAD)  # before NumPy is imported
    if args.report:
        report = measure(args)
        if report is not None:
            args.report.write_text(json.dumps(report))
        return

    n = args.layers * args.hidden * (args.hidden + 1)
    shape = f"{args.layers} layers of {args.hidden} x {args.hidden}, {n:,} parameters of 4 bytes"
    lines = [machine(), f"{shape}; {BATCH} rows over all ranks; {args.steps} steps", "", *HEADER]
    print("\n".join(lines), flush=True)
    reports = {}
    for ranks in args.ranks:
        for zero in range(4):
            need, have = needed(args, ranks, zero), available()
            if need > 0.9 * have:
                line = f"{ranks:>6}{zero:>5}  SKIPPED: it needs {need / 1e9:.1f} GB, and {have / 1e9:.1f} GB are free"
            else:
                reports[ranks, zero] = launch(args, ranks, zero)
                line = row(ranks, zero, reports[ranks, zero], args.steps)
            lines.append(line)
            print(line, flush=True)
    if not reports:
        sys.exit("nothing was measured")
    last = ["", *check(reports, args.layers)]
    print("\n".join(last))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "zero_memory.txt").write_text("\n".join(lines + last) + "\n")


if __name__ == "__main__":
    main()
