"""Reduce along a binomial tree, broadcast's mirror image: partial sums flow to the root, twice as far each round.

    round 1   1 -> 0   3 -> 2   5 -> 4   7 -> 6
    round 2   2 -> 0   6 -> 4
    round 3   4 -> 0                                    (P = 8, root 0)

The tree all-reduce is this, then a broadcast from the root along the same tree. Simple, and in its lg P rounds each way
not far from the best for short arrays; long ones travel whole in every round.
Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .binomial import binomial_broadcast, binomial_broadcast_cost
from .lane import Lane
from .reductions import Reduction


def binomial_reduce(comm: Lane, array: Array, reduction: Reduction, root: int = 0) -> Steps:
    """The root ends with the sum over all ranks; the others' arrays are left holding partial sums.

    dtype   kept; accumulates in it, as a balanced tree over the ranks in order, from the root on
    Cost    P - 1 messages in all, of n bytes; one sent by each rank but the root
    """
    size = comm.size
    me = (comm.rank - root) % size  # number the ranks from the root on, so that the root is 0

    # 1. Add up what those hold who differ from us in one bit below our lowest set one, the nearest first.
    #    Invariant: array is the sum over the numbers me ... me + bit - 1, as far as there are such ranks.
    bit = 1
    while bit < size and not me & bit:
        if me + bit < size:
            yield from comm.fold_partial(array, (me + bit + root) % size, reduction)
        bit *= 2

    # 2. Pass the sum on to the rank whose number is ours without its lowest set bit. The root has no such bit.
    if me:
        comm.send_partial(array, (me - bit + root) % size)
        yield from comm.sent()
    else:
        reduction.finish(array, size)


def tree_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """Up the tree to rank 0, and down again. All ranks get the same bits, those of rank 0."""
    yield from binomial_reduce(comm, array, reduction)
    yield from binomial_broadcast(comm, array)


def binomial_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) (a + n b + n g)"""
    return (P - 1).bit_length() * (a + n * (b + g))


def tree_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) (2 a + 2 n b + n g)"""
    return binomial_reduce_cost(P, n, a, b, g) + binomial_broadcast_cost(P, n, a, b, g)
