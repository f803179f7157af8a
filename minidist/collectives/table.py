"""ALGORITHMS: every operation's algorithms by name. A new one is a file and a row here; the tests take it from here.

A row has the generator function (see lane.py) and its cost: the seconds that it takes by the α–β–γ model, as a
function of P ranks, n bytes (of the whole array), a seconds a message, b seconds a byte and g seconds a reduced byte.

The arguments of the functions, after the lane:

    all_reduce        array, reduction           reduce       array, reduction, root
    reduce_scatter    chunks, reduction          broadcast    array, root
    all_gather        chunks                     scan         array, reduction, exclusive
    scatter           chunks, out, root          gather       chunks, array, root
    all_to_all        chunks, out chunks
    barrier
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..backend import Array
from ..comm.base import Communicator
from ..comm.handle import Steps
from . import (
    binomial,
    bruck,
    chain,
    dissemination,
    double_tree,
    hierarchical,
    library,
    linear,
    naive,
    pairwise,
    rabenseifner,
    recursive_doubling,
    recursive_halving,
    ring,
    scan,
    scatter_all_gather,
    shared_memory,
    tree,
)

Cost = Callable[..., float]


class Algorithm(NamedTuple):
    """A row of the table."""

    steps: Callable[..., Steps]
    cost: Cost | None = None  # None: not by the model, and never chosen by it
    by_host: bool = False  # it works on `comm.by_host()`; its cost takes hosts and between=(alpha, beta) as well
    shared: bool = False  # it needs ranks on one host, and arrays in that host's memory
    check: Callable[[Communicator, Array, str | None], None] | None = None  # refuses an array, or an op, at the call


# C.3 Communication mechanism: all-reduce, by the ring and by its relatives.
ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "naive": Algorithm(naive.naive_all_reduce, naive.naive_all_reduce_cost),
        "ring": Algorithm(ring.ring_all_reduce, ring.ring_all_reduce_cost),
        "recursive_doubling": Algorithm(
            recursive_doubling.recursive_doubling_all_reduce, recursive_doubling.recursive_doubling_all_reduce_cost
        ),
        "rabenseifner": Algorithm(rabenseifner.rabenseifner_all_reduce, rabenseifner.rabenseifner_all_reduce_cost),
        "tree": Algorithm(tree.tree_all_reduce, tree.tree_all_reduce_cost),
        "double_tree": Algorithm(double_tree.double_tree_all_reduce, double_tree.double_tree_all_reduce_cost),
        "shared_memory": Algorithm(
            shared_memory.shared_memory_all_reduce,
            shared_memory.shared_memory_all_reduce_cost,
            shared=True,
            check=shared_memory.check,
        ),
        "hierarchical": Algorithm(
            hierarchical.hierarchical_all_reduce,
            hierarchical.hierarchical_all_reduce_cost,
            by_host=True,
        ),
        "mpi": Algorithm(library.mpi_all_reduce, check=library.check),
    },
    "reduce_scatter": {
        "naive": Algorithm(naive.naive_reduce_scatter, naive.naive_all_reduce_cost),
        "ring": Algorithm(ring.ring_reduce_scatter, ring.ring_reduce_scatter_cost),
        "recursive_halving": Algorithm(
            recursive_halving.recursive_halving_reduce_scatter, recursive_halving.recursive_halving_reduce_scatter_cost
        ),
        "pairwise": Algorithm(pairwise.pairwise_reduce_scatter, pairwise.pairwise_reduce_scatter_cost),
        "mpi": Algorithm(library.mpi_reduce_scatter, check=library.check),
    },
    "all_gather": {
        "naive": Algorithm(naive.naive_all_gather, naive.naive_all_gather_cost),
        "ring": Algorithm(ring.ring_all_gather, ring.ring_all_gather_cost),
        "recursive_doubling": Algorithm(
            recursive_halving.recursive_doubling_all_gather, recursive_halving.recursive_doubling_all_gather_cost
        ),
        "bruck": Algorithm(bruck.bruck_all_gather, bruck.bruck_all_gather_cost),
        "mpi": Algorithm(library.mpi_all_gather, check=library.check),
    },
    "broadcast": {
        "naive": Algorithm(naive.naive_broadcast, naive.naive_broadcast_cost),
        "binomial": Algorithm(binomial.binomial_broadcast, binomial.binomial_broadcast_cost),
        "scatter_all_gather": Algorithm(
            scatter_all_gather.scatter_all_gather_broadcast, scatter_all_gather.scatter_all_gather_broadcast_cost
        ),
        "chain": Algorithm(chain.chain_broadcast, chain.chain_broadcast_cost),
        "mpi": Algorithm(library.mpi_broadcast, check=library.check),
    },
    "scatter": {
        "linear": Algorithm(linear.linear_scatter, linear.linear_cost),
        "binomial": Algorithm(binomial.binomial_scatter, binomial.binomial_scatter_cost),
        "mpi": Algorithm(library.mpi_scatter, check=library.check),
    },
    "gather": {
        "linear": Algorithm(linear.linear_gather, linear.linear_cost),
        "binomial": Algorithm(binomial.binomial_gather, binomial.binomial_scatter_cost),
        "mpi": Algorithm(library.mpi_gather, check=library.check),
    },
    "all_to_all": {
        "pairwise": Algorithm(pairwise.pairwise_all_to_all, pairwise.pairwise_all_to_all_cost),
        "bruck": Algorithm(bruck.bruck_all_to_all, bruck.bruck_all_to_all_cost),
        "mpi": Algorithm(library.mpi_all_to_all, check=library.check),
    },
    "reduce": {
        "naive": Algorithm(naive.naive_reduce, naive.naive_reduce_cost),
        "binomial": Algorithm(tree.binomial_reduce, tree.binomial_reduce_cost),
        "rabenseifner": Algorithm(rabenseifner.rabenseifner_reduce, rabenseifner.rabenseifner_reduce_cost),
        "mpi": Algorithm(library.mpi_reduce, check=library.check),
    },
    "scan": {
        "chain": Algorithm(scan.chain_scan, scan.chain_scan_cost),
        "recursive_doubling": Algorithm(scan.recursive_doubling_scan, scan.recursive_doubling_scan_cost),
        "mpi": Algorithm(library.mpi_scan, check=library.check),
    },
    "barrier": {
        "dissemination": Algorithm(dissemination.dissemination_barrier, dissemination.dissemination_barrier_cost),
        "tree": Algorithm(binomial.binomial_barrier, binomial.binomial_barrier_cost),
        "mpi": Algorithm(library.mpi_barrier, check=library.check),
    },
}
