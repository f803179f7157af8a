"""Which parameters are split over ranks, and how: what joins them again, for files, comparisons and norms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..backend import Array
from ..collectives import chunk_slice


class Split(NamedTuple):
    """Rank r has chunk r of the whole parameter along `dim`; with blocks, chunk r of each of so many equal blocks.

    blocks=1   |   0   |   1   |              blocks=3   | 0 | 1 | 0 | 1 | 0 | 1 |      (queries, keys, values)
    """

    dim: int
    blocks: int = 1

    def indices(self, length: int, ranks: int, rank: int) -> np.ndarray:
        """Which places along `dim`, of the whole's `length`, rank `rank` has."""
        if length % self.blocks:
            raise ValueError(f"a dim of {length} does not divide into {self.blocks} blocks")
        places = np.arange(length).reshape(self.blocks, -1)
        return places[:, chunk_slice(places.shape[1], ranks, rank)].reshape(-1)

    def slice(self, whole: Array, ranks: int, rank: int) -> Array:
        """Rank `rank`'s part of a whole parameter, as an array of its own."""
        return whole.take(self.indices(whole.shape[self.dim], ranks, rank), axis=self.dim)
