"""What the families of ops share: undoing broadcasts, common dtypes, dims."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, Shape
from ..tensor import Function, Tensor

_CATEGORY = {"b": 0, "i": 1, "u": 1, "f": 2, "c": 3}


def unbroadcast(dy: Array, shape: Shape) -> Array:
    """Sum a gradient of the broadcast result down to the shape the input had. The derivative of broadcasting."""
    if dy.shape == shape:
        return dy
    extra = dy.ndim - len(shape)
    stretched = tuple(i + extra for i, n in enumerate(shape) if n == 1 and dy.shape[i + extra] != 1)
    return dy.sum(axis=(*range(extra), *stretched)).reshape(shape)


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is; numbers, lists and arrays become one without a gradient."""
    return value if isinstance(value, Tensor) else Tensor(backend.asarray(value))


def dim_tuple(dim: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """PyTorch's `dim` argument as a tuple of non-negative dims; None means all of them. Raises IndexError."""
    if dim is None:
        return tuple(range(ndim))
    dims = (dim,) if isinstance(dim, int | np.integer) else tuple(dim)
    for d in dims:
        if not -max(ndim, 1) <= d < max(ndim, 1):
            raise IndexError(f"dim {d} is out of range for a tensor of {ndim} dims")
    return tuple(d % max(ndim, 1) for d in dims if ndim)


def one_dim(dim: int, ndim: int) -> int:
    """A single `dim` argument as a non-negative dim. Raises IndexError."""
    return (dim_tuple(dim, ndim) or (0,))[0]


class Cast(Function):
    """y = x in another dtype.   dx = dy in x's"""

    def forward(self, x: Array, dtype: Any) -> Array:
        self.dtype = x.dtype
        return x.astype(dtype)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy.astype(self.dtype),)


def cast(x: Tensor, dtype: Any) -> Tensor:
    """x in another dtype; x itself where it has it already."""
    return x if x.dtype == dtype else Cast.apply(x, dtype=dtype)


def to_float(x: Tensor) -> Tensor:
    """Integers and booleans as float32, as PyTorch does before exp, sqrt, division and their like."""
    return x if x.dtype.kind in "fc" else cast(x, np.float32)


def promote(*values: Any) -> list[Any]:
    """Operands in their common dtype by PyTorch's rule; Python numbers stay numbers and never widen a tensor.

    bool < int < float < complex. The highest category present decides; within it, tensors with dims outrank those
    without, which outrank numbers. So float32 + int64 is float32, and int64 + 1.5 is float32.
    """
    if len(values) == 2 and isinstance(values[0], Tensor):  # the usual cases, at once
        first, second = values
        if isinstance(second, Tensor):
            if first.dtype == second.dtype:
                return [first, second]
        elif type(second) in (int, float) and first.dtype.kind == "f":
            return [first, second]
    # np.float64 is a Python float as well (np.sqrt(2), say), but would widen what it meets.
    values = tuple(v.item() if isinstance(v, np.float64) else v for v in values)
    operands = [v if isinstance(v, Tensor | bool | int | float | complex) else as_tensor(v) for v in values]
    ranks: dict[tuple[int, int], Any] = {}
    for v in operands:
        dtype = v.dtype if isinstance(v, Tensor) else np.dtype({bool: "?", int: "i8", float: "f4"}.get(type(v), "c8"))
        key = _CATEGORY[dtype.kind], 0 if not isinstance(v, Tensor) else 2 if v.ndim else 1
        ranks[key] = np.promote_types(ranks[key], dtype) if key in ranks else dtype
    dtype = ranks[max(ranks)]
    return [cast(v, dtype) if isinstance(v, Tensor) else v for v in operands]


def wide(x: Array) -> Array:
    """x, half precision as float32: for sums and powers, which half precision is too short for."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def same_dtype(name: str, *tensors: Tensor | None) -> None:
    """Raise TypeError where an op's tensors (None is skipped) differ in dtype."""
    dtypes = [t.dtype for t in tensors if t is not None]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise TypeError(f"{name}: its inputs have dtypes {', '.join(map(str, dtypes))}; cast one (x.to(dtype))")
