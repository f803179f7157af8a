"""How much of an all-reduce hides behind computing, and does a helper thread hide more?

    python benchmarks/overlap.py [--ranks 2] [--save]

A rank starts an all-reduce, computes (products of matrices, about as long as the all-reduce alone), then waits. Ways:

    blocking     the one, then the other: the sum of both times
    in flight    async_op=True. Nothing moves while the rank computes, but what was sent at the start has arrived
    tests        the same, and handle.test() after each product: the rank moves it on itself, in between
    helper       the same as in flight, under comm.helper_thread: a thread moves it on meanwhile

hidden = (blocking - time) / the all-reduce alone. What to expect: an all-reduce is made of copies and additions by the
ranks' own cores, so on one machine there is something to hide only while a rank would wait for another; with as many
ranks as cores a helper thread takes its core from a rank that computes. Over a network the waiting is longer.
Medians of repeats, each repeat's slowest rank; the ways in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZES = (1 << 20, 1 << 22, 1 << 24)
REPEATS = 15


def rank() -> None:
    """What each rank runs; rank 0 prints the table."""
    import minidist as md

    comm = md.comm.world()
    matrix, out = np.ones((256, 256), np.float32), np.empty((256, 256), np.float32)
    if comm.rank == 0:
        print(f"{comm.size} ranks; ms, medians of {REPEATS}; hidden: share of the all-reduce alone")
        print(f"{'MiB':>5}{'compute':>10}{'alone':>10}{'blocking':>10}{'in flight':>18}{'tests':>18}{'helper':>18}")
    for nbytes in SIZES:
        array = md.zeros(nbytes // 4).numpy()

        def product() -> None:
            np.matmul(matrix, matrix, out=out)

        def reduce(array: np.ndarray = array, async_op: bool = False):
            return md.collectives.all_reduce(comm, array, algorithm="ring", async_op=async_op)

        # As many products as take as long as the all-reduce; the same number on all ranks.
        alone = statistics.median(timed(comm, reduce) for _ in range(5))
        products = max(1, round(alone / statistics.median(timed(comm, product) for _ in range(50))))
        products = int(md.collectives.all_reduce(comm, np.array([products]), "max")[0])

        def compute(products: int = products, between=lambda: None) -> None:
            for _ in range(products):
                product()
                between()

        def blocking(reduce=reduce, compute=compute) -> None:
            compute()
            reduce()

        def in_flight(reduce=reduce, compute=compute) -> None:
            handle = reduce(async_op=True)
            compute()
            handle.wait()

        def tests(reduce=reduce, compute=compute) -> None:
            handle = reduce(async_op=True)
            compute(between=handle.test)
            handle.wait()

        times: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for way in (compute, reduce, blocking, in_flight, tests):
                times.setdefault(way.__name__, []).append(timed(comm, way))
            with md.comm.helper_thread(comm):
                times.setdefault("helper", []).append(timed(comm, in_flight))
        took = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
        if comm.rank == 0:
            ways = [
                f"{took[way]:8.2f} ({(took['blocking'] - took[way]) / took['reduce']:5.0%})"
                for way in ("in_flight", "tests", "helper")
            ]
            first = f"{nbytes >> 20:>5}{took['compute']:>10.2f}{took['reduce']:>10.2f}{took['blocking']:>10.2f}"
            print(first + "".join(f"{way:>18}" for way in ways), flush=True)


def timed(comm, call) -> float:
    """Seconds that the slowest rank takes."""
    from minidist.collectives import all_reduce, barrier

    barrier(comm)
    start = time.perf_counter()
    call()
    return float(all_reduce(comm, np.array([time.perf_counter() - start]), "max")[0])


def main() -> None:
    from minidist.comm.world import launched

    if launched():
        rank()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    text = f"{os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}\n"
    for ranks in args.ranks:
        done = subprocess.run(
            ["mpirun", "-n", str(ranks), sys.executable, __file__],
            env=environment, check=True, timeout=300, capture_output=True, text=True,
        )  # fmt: skip
        text += done.stdout
    print(text, end="")
    if args.save:
        (Path(__file__).parent / "results" / "overlap.txt").write_text(text)


if __name__ == "__main__":
    main()
