"""Algorithms that pair ranks off need a power of two; this makes one, for those that reduce.

Of P ranks, Q the largest power of two, P - Q are extra. Each of the first P - Q odd ranks hands its array to the rank
before it and rests; the Q that are left work under new numbers, in the same order; then the extra ranks get the result.

    P = 6    ranks     0 1 2 3 4 5
             hand on   0<1 2<3
             work as   0   1   2 3
             get       0>1 2>3

Cost: 2 a + 2 n b + n g more. Source: Thakur, Rabenseifner & Gropp 2005, section 4.5.
"""

from __future__ import annotations

from functools import cache

from ..backend import Array
from ..comm.handle import Steps
from .lane import Lane
from .reductions import Reduction


class PowerOfTwo:
    """The numbering of the ranks that work. `number` is this rank's, None if it rests."""

    __slots__ = ("extra", "number", "size")

    def __init__(self, rank: int, ranks: int):
        self.size = 1 << (ranks.bit_length() - 1)
        self.extra = ranks - self.size
        if rank >= 2 * self.extra:
            self.number: int | None = rank - self.extra
        else:
            self.number = rank // 2 if rank % 2 == 0 else None

    def rank(self, number: int) -> int:
        """Which rank works under a number."""
        return 2 * number if number < self.extra else number + self.extra


power_of_two = cache(PowerOfTwo)


def hand_on(comm: Lane, array: Array, reduction: Reduction, group: PowerOfTwo) -> Steps:
    """Fold the extra ranks' arrays into their neighbours'."""
    if comm.rank < 2 * group.extra:
        if group.number is None:
            comm.send_partial(array, comm.rank - 1)
            yield from comm.sent()
        else:
            yield from comm.fold_partial(array, comm.rank + 1, reduction)


def hand_back(comm: Lane, array: Array, group: PowerOfTwo) -> Steps:
    """Give the extra ranks the result."""
    if comm.rank < 2 * group.extra:
        if group.number is None:
            yield comm.irecv(array, comm.rank - 1)
        else:
            comm.isend(array, comm.rank + 1)
            yield from comm.sent()
