"""Recursive doubling: pairs exchange everything they have, with partners 1, 2, 4, ... ranks away.

    P = 8, what rank 0 holds:      its own
        after 0 <-> 1              ranks 0 and 1
        after 0 <-> 2              ranks 0 to 3
        after 0 <-> 4              ranks 0 to 7

lg P steps and no more, so nothing is faster for short arrays; but every step sends the whole array, where the ring
sends a P-th of it.
Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
"""

from __future__ import annotations

from math import floor, log2

from ..backend import Array
from ..comm.handle import Steps
from .extra_ranks import hand_back, hand_on, power_of_two
from .lane import Lane
from .reductions import Reduction


def recursive_doubling_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """Every rank ends with the sum over all ranks.

    dtype   kept; accumulates in it, as a balanced tree over the ranks in order; all ranks get the same bits
    Cost    lg P messages of n bytes sent per rank, for P a power of two; else see extra_ranks.py
    """
    # 1. Make the number of ranks a power of two.
    group = power_of_two(comm.rank, comm.size)
    if group.extra:
        yield from hand_on(comm, array, reduction, group)

    # 2. Exchange sums with the partner in each bit of our number.
    #    Invariant: array is the sum over the numbers that differ from ours in bits below `bit` only.
    if group.number is not None:
        partial, bit = comm.scratch_like(array), 1
        while bit < group.size:
            partner = group.number ^ bit
            comm.isend(array, group.rank(partner))
            yield comm.irecv(partial, group.rank(partner))
            yield from comm.sent()
            comm.combine(array, partial, reduction, theirs_first=partner < group.number)
            bit *= 2
        comm.give_back(partial)
        reduction.finish(array, comm.size)

    # 3. The ranks that rested get the result.
    if group.extra:
        yield from hand_back(comm, array, group)


def recursive_doubling_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """lg P (a + n b + n g) for P a power of two; else lg Q, and 2 a + 2 n b + n g more (see extra_ranks.py)"""
    return floor(log2(P)) * (a + n * (b + g)) + (P & (P - 1) != 0) * (2 * a + 2 * n * b + n * g)
