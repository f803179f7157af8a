"""What was measured on this machine, for algorithm="auto": `mpirun -n 4 python -m minidist.comm tune`.

On these ranks and hosts it times every algorithm of every operation over a range of sizes, and fits α, β and γ of the
model for other numbers of ranks. The result is kept in a JSON file (see comm/stored.py), one for each machine; runs
with other numbers of ranks add to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from statistics import median
from typing import Any

import numpy as np

from ..comm.base import Communicator
from ..comm.network import Link, Network
from .table import ALGORITHMS

SIZES = [2**k for k in range(6, 27, 2)]  # bytes
BUDGET = 0.04  # seconds for each algorithm and size, in REPEATS parts
REPEATS = 5
HOPELESS = 4.0  # an algorithm that takes so many times the best's time is left out at larger sizes of that operation


@dataclass
class Tuning:
    """Measurements of one machine."""

    network: Network
    seconds: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    # ["4 ranks on 1 hosts"]["all_reduce"]["ring"]["1024"]: so long it takes

    @classmethod
    def read(cls, text: str) -> Tuning | None:
        """From a file's text; None if it is not what `write` wrote."""
        try:
            content = json.loads(text)
            within, between = content["within"], content["between"]
            network = _network(Link(*map(float, within[:2])), float(within[2]), between and Link(*map(float, between)))
            seconds = {
                place: {
                    operation: {
                        name: {str(int(size)): float(s) for size, s in by_size.items() if 0 < float(s) < inf}
                        for name, by_size in by_name.items()
                    }
                    for operation, by_name in by_operation.items()
                }
                for place, by_operation in content["seconds"].items()
            }
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return None
        return cls(network, seconds)

    def write(self) -> str:
        """As a file's text."""
        between = None if self.network.between is None else [self.network.between.alpha, self.network.between.beta]
        within = [self.network.alpha, self.network.beta, self.network.gamma]
        return json.dumps({"within": within, "between": between, "seconds": self.seconds}, indent=1) + "\n"

    def best(self, ranks: int, hosts: int, classes: int, shared: bool = True) -> dict[str, list[str | None]]:
        """Of each operation measured on so many ranks and hosts, the fastest algorithm for each class of sizes.

        None for sizes beyond those measured, unless all of SIZES were. `shared`: whether those through shared memory
        count.
        """
        best = {}
        for operation, by_name in self.seconds.get(place(ranks, hosts), {}).items():
            rows = ALGORITHMS.get(operation, {})
            known = {
                n: by_size
                for n, by_size in by_name.items()
                if n in rows and rows[n].cost and (shared or not rows[n].shared)
            }
            sizes = sorted({int(size) for by_size in known.values() for size in by_size})
            if sizes:
                near = [min(sizes, key=lambda size: abs(size.bit_length() - k)) for k in range(classes)]
                last = classes if sizes[-1] >= SIZES[-1] else sizes[-1].bit_length() + 1
                best[operation] = [
                    min((n for n in known if str(size) in known[n]), key=lambda n: known[n][str(size)])
                    if k <= last
                    else None
                    for k, size in enumerate(near)
                ]
        return best


def place(ranks: int, hosts: int) -> str:
    """The name of a number of ranks on a number of hosts."""
    return f"{ranks} ranks on {hosts} hosts"


# -- measuring ------------------------------------------------------------------------------------------------------


def tune(comm: Communicator, old: Tuning | None, say: Callable[[str], None], largest: int = SIZES[-1]) -> Tuning:
    """Measure everything on the ranks of `comm`, up to `largest` bytes; every rank must call it. `say` is told how.

    Returns what was known before, with these measurements added or in the place of older ones.
    """
    hosts = len(set(comm.hosts()))
    say(f"{place(comm.size, hosts)}: measuring the model's figures")
    network = fit(comm, hosts, old)
    times: dict[str, dict[str, dict[str, float]]] = {}
    for operation, call in calls(comm).items():
        rows = [name for name, row in ALGORITHMS[operation].items() if row.cost and (hosts == 1 or not row.shared)]
        if len(rows) < 2:
            continue
        say(f"  {operation}: {', '.join(rows)}")
        times[operation] = {name: {} for name in rows}
        running = list(rows)
        for nbytes in (size for size in SIZES if size <= largest):
            array, out = np.zeros(nbytes // 4, np.float32), np.zeros(nbytes // 4, np.float32)
            for name in running:
                times[operation][name][str(nbytes)] = timed(comm, partial(call, array, out, name))
            best = min(times[operation][name][str(nbytes)] for name in running)
            running = [name for name in running if times[operation][name][str(nbytes)] < HOPELESS * best]
    here, seconds = place(comm.size, hosts), dict(old.seconds) if old is not None else {}
    before = seconds.get(here, {})
    seconds[here] = {operation: merged(before.get(operation, {}), new) for operation, new in times.items()}
    return Tuning(network, seconds)


def merged(old: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Both; of a size that has been measured anew, only the new."""
    sizes = {size for by_size in new.values() for size in by_size}
    return {
        name: {size: s for size, s in old.get(name, {}).items() if size not in sizes} | by_size
        for name, by_size in new.items()
    }


def calls(comm: Communicator) -> dict[str, Callable[[Any, Any, str], Any]]:
    """How each operation is called with an array of n bytes in all, and memory of the same size."""
    from . import operations as o

    size, root = comm.size, comm.rank == 0
    return {
        "all_reduce": lambda a, out, name: o.all_reduce(comm, a, "sum", name),
        "reduce_scatter": lambda a, out, name: o.reduce_scatter(comm, a, "sum", name),
        "all_gather": lambda a, out, name: o.all_gather(comm, a, name),
        "broadcast": lambda a, out, name: o.broadcast(comm, a, 0, name),
        "reduce": lambda a, out, name: o.reduce(comm, a, "sum", 0, name),
        "barrier": lambda a, out, name: o.barrier(comm, name),
        "scan": lambda a, out, name: o.scan(comm, a, "sum", name),
        "scatter": lambda a, out, name: o.scatter(
            comm, a[: a.size // size * size] if root else None, out[: a.size // size], 0, name
        ),
        "gather": lambda a, out, name: o.gather(
            comm, a[: a.size // size], out[: a.size // size * size] if root else None, 0, name
        ),
        "all_to_all": lambda a, out, name: o.all_to_all(
            comm, a[: a.size // size * size], out[: a.size // size * size], name
        ),
    }


def timed(comm: Communicator, call: Callable[[], Any]) -> float:
    """Seconds of one call: the slowest rank's, the median of REPEATS."""
    from .operations import all_reduce, barrier

    def once(times: int) -> float:
        barrier(comm, "dissemination")
        start = comm.clock()
        for _ in range(times):
            call()
        took = np.array([(comm.clock() - start) / times])
        return float(all_reduce(comm, took, "max", "naive")[0])

    first = once(2)
    times = max(1, min(1000, int(BUDGET / REPEATS / max(first, 1e-7))))
    return median(once(times) for _ in range(REPEATS))


def fit(comm: Communicator, hosts: int, old: Tuning | None) -> Network:
    """α and β from messages that neighbours exchange, on a host and between hosts; γ from adding."""
    array, other = np.zeros(1 << 20, np.float32), np.zeros(1 << 20, np.float32)
    known = old.network if old is not None else None
    gamma = timed(comm, lambda: np.add(array, other, out=array)) / array.nbytes
    within, between = None, known.between if known is not None else None
    host, across = comm.by_host()
    for group, most in ((host, max(comm.hosts().count(h) for h in set(comm.hosts()))), (across, hosts)):
        if most < 2:
            continue

        def exchange(data: np.ndarray, into: np.ndarray, group: Communicator = group) -> None:
            group.sendrecv(data, (group.rank + 1) % group.size, into, (group.rank - 1) % group.size)

        alpha = timed(comm, lambda: exchange(array[:2], other[:2]))
        beta = max(timed(comm, lambda: exchange(array, other)) - alpha, 0.0) / array.nbytes
        if group is host:
            within = Link(alpha, beta)
        else:
            between = Link(alpha, beta)
    if within is None:  # one rank on each host
        within = Link(known.alpha, known.beta) if known is not None else between or Link()
    return _network(within, gamma, between)


def _network(within: Link, gamma: float, between: Link | None) -> Network:
    return Network(within.alpha, within.beta, gamma, ranks_per_host=1 if between else None, between=between)
