"""algorithm="auto": which algorithm, for an array of this size, on these ranks and hosts.

What `python -m minidist.comm tune` has measured on this machine decides (see tuning.py); for numbers of ranks that it
has not measured, and without it, the α–β–γ model: of each algorithm's cost formula the smallest. A simulated
communicator goes by the model with its own network's figures.

Every rank comes to the same choice without asking the others: they all know the same figures (rank 0 of the world
reads the file, when the world is opened).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

from ..backend import Array, on_gpu
from ..comm.base import Communicator
from ..comm.handle import Steps
from ..comm.network import Link, Network
from ..comm.stored import tuning_file
from .table import ALGORITHMS, Algorithm
from .tuning import Tuning

CLASSES = 48  # of sizes: class k holds the sizes of k bits, 2^(k-1) to 2^k - 1 bytes

Choices = dict[str, list[str]]  # of each operation, the algorithm's name for each class of sizes

# What messages of processes on one host and over a fast network cost, Python included, where nothing was measured.
USUAL = Network(alpha=6e-6, beta=1.5e-10, gamma=5e-11, ranks_per_host=1, between=Link(4e-5, 1e-9))


def choose(
    comm: Communicator, operation: str, algorithm: str, array: Array, op: str | None = None, nbytes: int | None = None
) -> tuple[str, Callable[..., Steps]]:
    """(operation and algorithm in words, the algorithm's function), for `nbytes` in all, which is array's if not given.

    Errors  ValueError: the operation has no algorithm of that name. As Communicator.native, if it is MPI's own
    """
    if algorithm == "auto":
        if comm.choices is None:
            comm.choices = choices_for(comm)
        in_memory, elsewhere = comm.choices
        names = (elsewhere if on_gpu(array) else in_memory)[operation]
        algorithm = names[min((array.nbytes if nbytes is None else nbytes).bit_length(), CLASSES - 1)]
    row = ALGORITHMS[operation].get(algorithm) if isinstance(algorithm, str) else None
    if row is None:
        raise ValueError(f"{operation}: no algorithm {algorithm!r}; choose auto, {', '.join(ALGORITHMS[operation])}")
    if row.check is not None:
        row.check(comm, array, op)
    return f"{operation} {algorithm}", row.steps


def choices_for(comm: Communicator) -> tuple[Choices, Choices]:
    """For arrays in the host's memory, which ranks of one host may share; and for those on a GPU."""
    hosts = len(set(comm.hosts()))
    if comm.network is not None:
        free = not any((comm.network.alpha, comm.network.beta, comm.network.gamma, comm.network.between))
        simulated = by_model(USUAL if free else comm.network, comm.size, hosts, shared=False)
        return simulated, simulated
    if comm.rank == 0 and comm.tuning and Tuning.read(comm.tuning) is None:
        warnings.warn(f"{tuning_file()} does not hold what `tune` writes; algorithm='auto' goes without", stacklevel=2)
    text, ranks = comm.tuning, comm.size
    return by_measurement(text, ranks, hosts, shared=hosts == 1), by_measurement(text, ranks, hosts, shared=False)


@cache
def by_measurement(text: str, ranks: int, hosts: int, shared: bool = False) -> Choices:
    """The measured ones, where there are any; else by the model with the measured figures, or the usual ones.

    `shared`: whether algorithms through shared memory may be chosen.
    """
    tuning = Tuning.read(text)
    modelled = by_model(USUAL if tuning is None else tuning.network, ranks, hosts, shared)
    measured = {} if tuning is None else tuning.best(ranks, hosts, CLASSES, shared)
    return {
        operation: [best or name for best, name in zip(measured.get(operation, [None] * CLASSES), names, strict=True)]
        for operation, names in modelled.items()
    }


@cache
def by_model(network: Network, ranks: int, hosts: int, shared: bool = False) -> Choices:
    """The cheapest by their cost formulas, for arrays in the middle of each class."""
    sizes = [0, *(round(0.75 * 2**k) for k in range(1, CLASSES))]
    choices = {}
    for operation, rows in ALGORITHMS.items():
        able = {name: row for name, row in rows.items() if row.cost is not None and (shared or not row.shared)}
        choices[operation] = [
            # Two formulas may differ in their rounding only; then the first algorithm is meant.
            min(able, key=lambda name: float(f"{predicted(able[name], ranks, n, network, hosts):.9g}"))
            for n in sizes
        ]
    return choices


def predicted(row: Algorithm, ranks: int, nbytes: int, network: Network, hosts: int = 1) -> float:
    """Seconds, by the model. On several hosts, an algorithm that knows nothing of them goes at the slow link's pace."""
    assert row.cost is not None
    link, between = Link(network.alpha, network.beta), network.between or Link(network.alpha, network.beta)
    if row.by_host:
        return row.cost(ranks, nbytes, link.alpha, link.beta, network.gamma, hosts, (between.alpha, between.beta))
    if hosts > 1:
        link = between
    return row.cost(ranks, nbytes, link.alpha, link.beta, network.gamma)
