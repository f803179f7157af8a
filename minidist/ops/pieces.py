"""Chains of elementwise steps, done piece by piece.

NumPy takes one pass over the arrays for every step. On arrays larger than the cache each pass goes to main memory and
back; on pieces of PIECE elements the passes of a chain find what the one before left in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import backend
from ..backend import Array, on_gpu

PIECE = 32 * 1024


def scratch(piece: Array) -> Array:
    """Uninitialised memory like a piece."""
    return backend.empty(piece.shape, piece.dtype, backend.device_of(piece))


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of equal size, flat, PIECE elements of each at a time; on a GPU, where every call costs, all at once.

    The pieces are views where the arrays are row-major, which those to write to must be.
    """
    flat = [a.reshape(-1) for a in arrays]
    size = flat[0].size
    step = size if on_gpu(flat[0]) else PIECE
    for start in range(0, size, max(step, 1)):
        yield tuple([a[start : start + step] for a in flat])
