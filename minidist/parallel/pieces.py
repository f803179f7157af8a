"""Pieces of a tensor along a dim, joined in another order: how rows and times are brought into the order of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor


class Pieces(Function):
    """y = slices of x along a dim, no place in two of them, one after another.   dx = dy there, 0 elsewhere"""

    def forward(self, x: Array, dim: int, slices: Sequence[slice]) -> Array:
        self.shape, self.dim, self.slices = x.shape, dim, slices
        return joined(x, dim, slices)

    def backward(self, dy: Array) -> tuple[Array]:
        dx = namespace(dy).zeros(self.shape, dy.dtype)
        before = (slice(None),) * self.dim
        start = 0
        for piece in self.slices:
            stop = start + len(range(self.shape[self.dim])[piece])
            dx[(*before, piece)] = dy[(*before, slice(start, stop))]
            start = stop
        return (dx,)


def joined(x: Array, dim: int, slices: Iterable[slice]) -> Array:
    """Slices of an array along a dim, one after another, as a new array."""
    before = (slice(None),) * dim
    return namespace(x).concatenate([x[(*before, piece)] for piece in slices], axis=dim)


def pieces(x: Tensor, dim: int, slices: Sequence[slice]) -> Tensor:
    """Slices of a tensor along a dim (none of them overlapping), one after another."""
    return Pieces.apply(x, dim=dim, slices=slices)


def side_by_side(lengths: Iterable[int]) -> list[slice]:
    """Where pieces of these lengths lie, one after another."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def turned(lengths: np.ndarray) -> list[slice]:
    """Where pieces of these lengths (rows, columns) lie, row by row, one after another: those of column 0 first."""
    places = side_by_side(lengths.reshape(-1).tolist())
    return [place for column in range(lengths.shape[1]) for place in places[column :: lengths.shape[1]]]
