"""Embedding: look up a row of a table for each index."""

from __future__ import annotations

from itertools import pairwise

from ..backend import Array, namespace, on_gpu
from ..tensor import Function, Tensor
from .common import as_tensor


class Embedding(Function):
    """y = w[indices].   indices (...), w (V, E) -> y (..., E)

    dw[v] = the sum of dy over the places where v was looked up, 0 for v = padding_idx     (V, E)
    """

    def forward(self, indices: Array, w: Array, padding_idx: int | None) -> Array:
        self.shape, self.padding_idx = w.shape, padding_idx
        self.save(indices)
        return w.take(indices, axis=0)

    def backward(self, dy: Array) -> tuple[None, Array]:
        ids = self.saved[0].reshape(-1)
        rows = dy.reshape(-1, self.shape[1])
        xp = namespace(dy)
        dw = self.into[1] if self.into[1] is not None else xp.empty(self.shape, dy.dtype)
        dw.fill(0)
        if on_gpu(dy):
            xp.add.at(dw, ids, rows)  # by atomic additions: their order, and so the last bit, may vary
        elif ids.size:
            # Bring equal ids together and sum each run of rows at once; up to 14 times as fast as add.at.
            order = ids.argsort(kind="stable")
            ids, rows = ids[order], rows[order]
            starts = [0, *(xp.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
            for start, stop in pairwise(starts):
                rows[start:stop].sum(axis=0, out=dw[ids[start]])
        if self.padding_idx is not None:
            dw[self.padding_idx] = 0
        return None, dw


def embedding(indices: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """weight[indices]: integer indices (...), weight (V, E) -> (..., E).

    padding_idx   this row of the weight gets no gradient
    Errors        TypeError: indices that are not integers; ValueError: a weight that is no matrix, a padding_idx
                  outside the table; IndexError: an index outside the table (on a GPU it is not looked for, since that
                  would have to wait for the GPU)
    """
    indices = as_tensor(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"embedding: the indices must be integers, not {indices.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"embedding: the weight must have 2 dims, not shape {weight.shape}")
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx {padding_idx} is outside the table of {rows} rows")
    ids = indices.data
    if not on_gpu(ids) and ids.size and not (ids.min() >= 0 and ids.max() < rows):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"embedding: index {bad} is outside the table of {rows} rows")
    return Embedding.apply(indices, weight, padding_idx=padding_idx)
