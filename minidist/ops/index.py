"""Taking elements out: basic indexing (views), advanced indexing, gather."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import one_dim


class Slice(Function):
    """y = x[numbers, slices, None, ...]: each element at most once, a view.   dx = dy there, 0 elsewhere"""

    is_view = True

    def forward(self, x: Array, index: Any) -> Array:
        self.shape, self.index = x.shape, index
        # Of a vector, NumPy's x[0] is a copy, but x[0, ...] is a view.
        return x[index if Ellipsis in index else (*index, ...)]

    def backward(self, dy: Array) -> tuple[Array]:
        dx = namespace(dy).zeros(self.shape, dy.dtype)
        dx[self.index] = dy
        return (dx,)


class Pick(Function):
    """y = x[arrays of numbers]: elements may be taken several times.   dx = the sum of dy over the times taken"""

    def forward(self, x: Array, index: Any) -> Array:
        self.shape, self.index = x.shape, index
        return x[index]

    def backward(self, dy: Array) -> tuple[Array]:
        xp = namespace(dy)
        dx = xp.zeros(self.shape, dy.dtype)
        xp.add.at(dx, self.index, dy)
        return (dx,)


def _prepare(part: Any, device: str) -> Any:
    """Tensors, lists and host arrays in an index, as arrays on the indexed tensor's device."""
    if isinstance(part, Tensor):
        part = part.data
    elif isinstance(part, list):
        part = np.asarray(part)
    return backend.to(part, device) if backend.is_array(part) else part


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index], with numbers, slices, None, `...`, and arrays of int or bool (NumPy's rules)."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(_prepare(part, x.device) for part in parts)
    basic = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)
    return (Slice if basic and not any(part is True or part is False for part in parts) else Pick).apply(x, index=parts)


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """y[i][j] = x[index[i][j]][j] for dim 0, and so on: y has index's shape.

    index (int) may be smaller than x in the other dims. Errors  ValueError: another number of dims
    """
    if index.ndim != x.ndim:
        raise ValueError(f"gather: index has {index.ndim} dims, the tensor {x.ndim}")
    d = one_dim(dim, x.ndim)
    xp = namespace(x.data)
    grid = [xp.arange(n).reshape([-1 if k == axis else 1 for k in range(x.ndim)]) for axis, n in enumerate(index.shape)]
    if grid:
        grid[d] = index.data
    return Pick.apply(x, index=tuple(grid))
