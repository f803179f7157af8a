"""ALGORITHMS: every operation's algorithms by name. A new one is a file and a row here; the tests take it from here.

A row has the generator function (see lane.py) and its cost: the seconds that it takes by the α–β–γ model, as a
function of P ranks, n bytes (of the whole array), a seconds a message, b seconds a byte and g seconds a reduced byte.

The arguments of the functions, after the lane:

    all_reduce        array, reduction           reduce       array, reduction, root
    reduce_scatter    chunks, reduction          broadcast    array, root
    all_gather        chunks                     scan         array, reduction
    barrier
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..comm.handle import Steps
from . import binomial, dissemination, naive, recursive_doubling, ring

Cost = Callable[[int, int, float, float, float], float]


class Algorithm(NamedTuple):
    """A row of the table."""

    steps: Callable[..., Steps]
    cost: Cost | None = None  # None: not by the model, and never chosen by it


ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "naive": Algorithm(naive.naive_all_reduce, naive.naive_all_reduce_cost),
        "ring": Algorithm(ring.ring_all_reduce, ring.ring_all_reduce_cost),
        "recursive_doubling": Algorithm(
            recursive_doubling.recursive_doubling_all_reduce, recursive_doubling.recursive_doubling_all_reduce_cost
        ),
    },
    "reduce_scatter": {
        "naive": Algorithm(naive.naive_reduce_scatter, naive.naive_all_reduce_cost),
        "ring": Algorithm(ring.ring_reduce_scatter, ring.ring_reduce_scatter_cost),
    },
    "all_gather": {
        "naive": Algorithm(naive.naive_all_gather, naive.naive_all_gather_cost),
        "ring": Algorithm(ring.ring_all_gather, ring.ring_all_gather_cost),
    },
    "broadcast": {
        "naive": Algorithm(naive.naive_broadcast, naive.naive_broadcast_cost),
        "binomial": Algorithm(binomial.binomial_broadcast, binomial.binomial_broadcast_cost),
    },
    "reduce": {
        "naive": Algorithm(naive.naive_reduce, naive.naive_reduce_cost),
    },
    "barrier": {
        "dissemination": Algorithm(dissemination.dissemination_barrier, dissemination.dissemination_barrier_cost),
    },
}
