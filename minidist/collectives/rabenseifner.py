"""Rabenseifner's all-reduce: a reduce-scatter by recursive halving, then an all-gather by recursive doubling.

    P = 4, the blocks that a rank sends its partner; ' marks sums of two ranks, " of all four

                        halving                  doubling
        step            1           2            3           4
        partner         2 away      1 away       1 away      2 away
        rank 0          2 3         1'           0"          0" 1"
        rank 1          2 3         0'           1"          0" 1"
        rank 2          0 1         3'           2"          2" 3"
        rank 3          0 1         2'           3"          2" 3"

It sends what the ring does, 2 (P-1)/P n bytes, in 2 lg P messages instead of 2 (P-1): better than the ring for arrays
of middle length, and as good for long ones. Its partners are far apart, though, where the ring's are neighbours.

His reduce begins alike; then the blocks are gathered at the root only, along a binomial tree.
Source: Rabenseifner 2004, "Optimization of collective reduction operations"; Thakur, Rabenseifner & Gropp 2005, section
4.5.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .chunks import Chunks
from .extra_ranks import hand_back, hand_on, power_of_two
from .lane import Lane
from .recursive_halving import double, halve
from .reductions import Reduction


def rabenseifner_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """Every rank ends with the sum over all ranks. All get the same bits, since each block is computed by one of them.

    dtype   kept; accumulates in it, the farthest ranks' sums first: (0+2)+(1+3) for P = 4
    Cost    2 lg P messages, 2 (P-1)/P n bytes, sent per rank, for P a power of two; else see extra_ranks.py
    """
    # 1. Make the number of ranks a power of two, Q; cut the array into as many blocks.
    group = power_of_two(comm.rank, comm.size)
    yield from hand_on(comm, array, reduction, group)
    blocks = Chunks(array, group.size)

    # 2. Each of the Q ranks adds up its block ...
    yield from halve(comm, blocks, group, reduction)
    if group.number is not None:
        reduction.finish(blocks[group.number], comm.size)

    # 3. ... and they gather all blocks.
    yield from double(comm, blocks, group)

    # 4. The ranks that rested get the result.
    yield from hand_back(comm, array, group)


def rabenseifner_reduce(comm: Lane, array: Array, reduction: Reduction, root: int) -> Steps:
    """The root ends with the sum over all ranks; the others' arrays are left holding partial sums.

    dtype   kept; accumulates in it, the farthest ranks' sums first: (0+2)+(1+3) for P = 4
    Cost    2 lg P messages, 2 (P-1)/P n bytes, sent or received by the root, for P a power of two
    """
    # 1. and 2. As above. If the root rests, the rank that works for it is the root until step 4.
    group = power_of_two(comm.rank, comm.size)
    yield from hand_on(comm, array, reduction, group)
    blocks = Chunks(array, group.size)
    yield from halve(comm, blocks, group, reduction)
    rests = power_of_two(root, comm.size).number is None
    number = power_of_two(root - rests, comm.size).number
    assert number is not None

    # 3. Gather the blocks: whoever differs from the root in a bit passes on what it has gathered by then.
    #    Invariant: all blocks whose numbers differ from ours in bits below `count` only are here.
    if group.number is not None:
        reduction.finish(blocks[group.number], comm.size)
        count = 1
        while count < group.size:
            partner = group.number ^ count
            if (group.number ^ number) & count:
                first = group.number & -count
                comm.isend(blocks[first : first + count], group.rank(partner))
                yield from comm.sent()
                break
            first = partner & -count
            yield comm.irecv(blocks[first : first + count], group.rank(partner))
            count *= 2

    # 4. A root that rested gets the result.
    if rests and comm.rank in (root - 1, root):
        yield from hand_back(comm, array, group)


def rabenseifner_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """2 lg P a + 2 n (P-1)/P b + n (P-1)/P g for P a power of two; else with Q for P, and 2 a + 2 n b + n g more"""
    Q = 1 << (P.bit_length() - 1)
    more = 2 * a + 2 * n * b + n * g if P != Q else 0.0
    return 2 * (Q.bit_length() - 1) * a + n * (Q - 1) / Q * (2 * b + g) + more


def rabenseifner_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """2 lg P a + 2 n (P-1)/P b + n (P-1)/P g for P a power of two; else with Q for P, and a + n b + n g more

    A root that rests costs a + n b once more.
    """
    Q = 1 << (P.bit_length() - 1)
    more = a + n * b + n * g if P != Q else 0.0
    return 2 * (Q.bit_length() - 1) * a + n * (Q - 1) / Q * (2 * b + g) + more
