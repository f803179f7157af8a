"""How an array is dealt to ranks: contiguous chunks, one each, in the order of ranks.

Unless the caller gives their sizes (MPI's "v" forms), these differ by at most one element, as np.array_split cuts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from ..backend import Array


@lru_cache(1000)
def _even_bounds(length: int, ranks: int) -> list[int]:
    size, longer = divmod(length, ranks)
    return [rank * size + min(rank, longer) for rank in range(ranks + 1)]


def chunk_slice(length: int, ranks: int, rank: int) -> slice:
    """Where chunk `rank` of `ranks` lies in an array of `length` elements; the first length % ranks have one more."""
    bounds = _even_bounds(length, ranks)
    return slice(bounds[rank], bounds[rank + 1])


def checked_counts(counts: Sequence[int], ranks: int, length: int | None = None) -> list[int]:
    """`counts` as a list of one size in elements per rank.

    Errors  TypeError: no list of integers
            ValueError: another number of them, a negative one, or a sum other than `length`
    """
    try:
        numbers = [operator.index(count) for count in counts]
    except TypeError:
        raise TypeError(f"counts={counts!r}: expected a list of {ranks} integers, one per rank") from None
    if len(numbers) != ranks:
        raise ValueError(f"counts has {len(numbers)} entries, the communicator {ranks} ranks")
    if min(numbers) < 0:
        raise ValueError(f"counts {numbers}: a chunk cannot have fewer than 0 elements")
    if length is not None and sum(numbers) != length:
        raise ValueError(f"counts {numbers} sum to {sum(numbers)}, the array has {length} elements")
    return numbers


class Chunks:
    """A flat array, cut: chunks[i] is chunk i, and chunks[i:j] chunks i to j - 1 as one. Both are views of `flat`."""

    __slots__ = ("flat", "_bounds")

    def __init__(self, flat: Array, ranks: int, counts: list[int] | None = None):
        self.flat = flat
        self._bounds = _even_bounds(flat.size, ranks) if counts is None else [0, *accumulate(counts)]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def start(self, index: int) -> int:
        """Where chunk `index` begins; for index P, where the last one ends."""
        return self._bounds[index]

    def __getitem__(self, index: int | slice) -> Array:
        bounds = self._bounds
        if isinstance(index, slice):
            return self.flat[bounds[index.start or 0] : bounds[len(bounds) - 1 if index.stop is None else index.stop]]
        return self.flat[bounds[index] : bounds[index + 1]]
