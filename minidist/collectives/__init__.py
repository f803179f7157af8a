"""Operations of all ranks together, each by one or more algorithms written over point-to-point messages.

Every rank of the communicator calls the same operation with an array of the same size and dtype. Arrays are NumPy's or
CuPy's, contiguous, of any shape; an operation works on the flattened array, in place. An array's chunks are those of
np.array_split(flat, P), and rank r's chunk is number r; chunk_slice says where that is. So ZeRO needs no copies:

    chunk = reduce_scatter(comm, gradients)                  # a view: this rank's part of the sum
    ...update this rank's part of the parameters...
    all_gather(comm, parameters)                             # everyone gets all parts

A new algorithm is one file and one row of ALGORITHMS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..comm.base import Communicator
from .binomial import binomial_broadcast
from .chunks import chunk_slice
from .dissemination import dissemination_barrier
from .naive import naive_all_gather, naive_all_reduce, naive_broadcast, naive_reduce_scatter
from .reductions import OPS
from .ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter

ALGORITHMS: dict[str, dict[str, Callable[..., Any]]] = {  # of each operation; the first is what "auto" takes
    "all_reduce": {"ring": ring_all_reduce, "naive": naive_all_reduce},
    "reduce_scatter": {"ring": ring_reduce_scatter, "naive": naive_reduce_scatter},
    "all_gather": {"ring": ring_all_gather, "naive": naive_all_gather},
    "broadcast": {"binomial": binomial_broadcast, "naive": naive_broadcast},
    "barrier": {"dissemination": dissemination_barrier},
}


def all_reduce(comm: Communicator, array: Array, op: str = "sum", algorithm: str = "auto") -> Array:
    """Combine all ranks' arrays; every rank ends with the whole result. In place; returns array.

    `op` is one of OPS: sum, mean, prod, min, max. All ranks get the same bits.
    """
    return _choose("all_reduce", algorithm)(comm, array, op)


def reduce_scatter(comm: Communicator, array: Array, op: str = "sum", algorithm: str = "auto") -> Array:
    """Combine all ranks' arrays; return this rank's chunk of the result, a view of `array`.

    The rest of `array` is used as work space: afterwards it holds nothing of meaning.
    """
    return _choose("reduce_scatter", algorithm)(comm, array, op)


def all_gather(comm: Communicator, array: Array, algorithm: str = "auto") -> Array:
    """Each rank's chunk of `array` counts; every rank ends with all of them. In place; returns array."""
    return _choose("all_gather", algorithm)(comm, array)


def broadcast(comm: Communicator, array: Array, root: int = 0, algorithm: str = "auto") -> Array:
    """Every rank ends with the root's array. In place; returns array."""
    if not 0 <= root < comm.size:
        raise ValueError(f"root {root}: the ranks of this communicator are 0 to {comm.size - 1}")
    return _choose("broadcast", algorithm)(comm, array, root)


def barrier(comm: Communicator, algorithm: str = "auto") -> None:
    """Return when every rank has called it."""
    _choose("barrier", algorithm)(comm)


def _choose(operation: str, algorithm: str) -> Callable[..., Any]:
    table = ALGORITHMS[operation]
    if algorithm == "auto":
        return next(iter(table.values()))
    if algorithm not in table:
        raise ValueError(f"{operation}: no algorithm {algorithm!r}; choose auto, {', '.join(table)}")
    return table[algorithm]


__all__ = [
    "ALGORITHMS",
    "OPS",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "chunk_slice",
    "reduce_scatter",
]
