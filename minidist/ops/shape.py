"""The same numbers in another shape or order: views where NumPy gives views, copies elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, Shape, namespace
from ..tensor import Function, Tensor
from .common import as_tensor, cast, dim_tuple, one_dim, promote, unbroadcast
from .elementwise import where

# -- views ----------------------------------------------------------------------------------------------------------


class Reshape(Function):
    """y = x in another shape.   dx = dy in x's"""

    is_view = True

    def forward(self, x: Array, shape: Shape) -> Array:
        self.shape = x.shape
        return x.reshape(shape)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy.reshape(self.shape),)


class Permute(Function):
    """y = x with its dims in another order.   dx = dy with them in the old one"""

    is_view = True

    def forward(self, x: Array, dims: tuple[int, ...]) -> Array:
        self.back = tuple(sorted(range(len(dims)), key=dims.__getitem__))
        return x.transpose(dims)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy.transpose(self.back),)


class Expand(Function):
    """y = x repeated along dims of length 1, without a copy.   dx = dy summed over them"""

    is_view = True

    def forward(self, x: Array, shape: Shape) -> Array:
        self.shape = x.shape
        return namespace(x).broadcast_to(x, shape)

    def backward(self, dy: Array) -> tuple[Array]:
        return (unbroadcast(dy, self.shape),)


class Flip(Function):
    """y = x reversed along dims.   dx = dy reversed along them"""

    def forward(self, x: Array, dims: tuple[int, ...]) -> Array:
        self.dims = dims
        return namespace(x).flip(x, dims).copy()

    def backward(self, dy: Array) -> tuple[Array]:
        return (namespace(dy).flip(dy, self.dims),)


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """`reshape(2, 3)` and `reshape((2, 3))` mean the same."""
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """x in another shape of as many elements; one size may be -1. A view where possible."""
    return Reshape.apply(x, shape=_sizes(shape))


def permute(x: Tensor, *dims: Any) -> Tensor:
    """x with its dims in the given order; a view."""
    order = dim_tuple(_sizes(dims), x.ndim)
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"permute: {_sizes(dims)} is not an order of {x.ndim} dims")
    return Permute.apply(x, dims=order)


def transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    """x with two dims exchanged; a view."""
    order = list(range(x.ndim))
    if order:
        dim0, dim1 = one_dim(dim0, x.ndim), one_dim(dim1, x.ndim)
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return Permute.apply(x, dims=tuple(order))


def expand(x: Tensor, *sizes: Any) -> Tensor:
    """x broadcast to the given sizes (-1 keeps a size), without a copy."""
    shape = _sizes(sizes)
    old = (1,) * (len(shape) - x.ndim) + x.shape
    return Expand.apply(x, shape=tuple(o if n == -1 else n for n, o in zip(shape, old, strict=True)))


def squeeze(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """x without its dims of length 1: all, or those named (others named are kept)."""
    dims = dim_tuple(dim, x.ndim)
    return Reshape.apply(x, shape=tuple(n for d, n in enumerate(x.shape) if n != 1 or d not in dims))


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """x with a new dim of length 1."""
    d = one_dim(dim, x.ndim + 1)
    return Reshape.apply(x, shape=(*x.shape[:d], 1, *x.shape[d:]))


def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """x with the dims start_dim … end_dim made one."""
    first, last = one_dim(start_dim, x.ndim), one_dim(end_dim, x.ndim)
    if first > last:
        raise ValueError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
    merged = 1
    for n in x.shape[first : last + 1]:
        merged *= n
    return Reshape.apply(x, shape=(*x.shape[:first], merged, *x.shape[last + 1 :]))


def flip(x: Tensor, *dims: Any) -> Tensor:
    """x reversed along dims."""
    return Flip.apply(x, dims=dim_tuple(_sizes(dims), x.ndim))


# -- copies ---------------------------------------------------------------------------------------------------------


class Clone(Function):
    """y = a copy of x.   dx = dy"""

    def forward(self, x: Array) -> Array:
        return x.copy(order="C")

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy,)


class Move(Function):
    """y = x on another device.   dx = dy on x's"""

    def forward(self, x: Array, device: str) -> Array:
        self.device = backend.device_of(x)
        return backend.to(x, device)

    def backward(self, dy: Array) -> tuple[Array]:
        return (backend.to(dy, self.device),)


class Roll(Function):
    """y = x shifted round along dims.   dx = dy shifted back"""

    def forward(self, x: Array, shifts: Any, dims: Any) -> Array:
        self.shifts, self.dims = shifts, dims
        return namespace(x).roll(x, shifts, dims)

    def backward(self, dy: Array) -> tuple[Array]:
        back = tuple(-s for s in self.shifts) if isinstance(self.shifts, tuple) else -self.shifts
        return (namespace(dy).roll(dy, back, self.dims),)


class Repeat(Function):
    """y = copies of x laid side by side.   dx = dy summed over the copies"""

    def forward(self, x: Array, times: tuple[int, ...]) -> Array:
        self.shape, self.times = x.shape, times
        return namespace(x).tile(x, times)

    def backward(self, dy: Array) -> tuple[Array]:
        shape = (1,) * (len(self.times) - len(self.shape)) + self.shape
        pairs = [n for pair in zip(self.times, shape, strict=True) for n in pair]
        return (dy.reshape(pairs).sum(axis=tuple(range(0, len(pairs), 2))).reshape(self.shape),)


class Cat(Function):
    """y = the inputs one after another along a dim.   Each dx is its slice of dy"""

    def forward(self, *xs: Array, dim: int) -> Array:
        self.dim = dim
        self.ends = [0, *np.cumsum([x.shape[dim] for x in xs]).tolist()]
        return namespace(xs[0]).concatenate(xs, axis=dim)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        before = (slice(None),) * self.dim
        return tuple(dy[(*before, slice(start, end))] for start, end in pairwise(self.ends))


class Pad(Function):
    """y = x with a border of one value.   dx = the inside of dy"""

    def forward(self, x: Array, widths: list[tuple[int, int]], value: float) -> Array:
        self.inside = tuple(slice(a, a + n) for (a, _), n in zip(widths, x.shape, strict=True))
        return namespace(x).pad(x, widths, constant_values=value)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy[self.inside],)


class Triangle(Function):
    """y = x on one side of a diagonal, 0 on the other.   dx = dy there, 0 elsewhere"""

    def forward(self, x: Array, name: str, diagonal: int) -> Array:
        self.name, self.diagonal = name, diagonal
        return getattr(namespace(x), name)(x, diagonal)

    def backward(self, dy: Array) -> tuple[Array]:
        return (getattr(namespace(dy), self.name)(dy, self.diagonal),)


def clone(x: Tensor) -> Tensor:
    """A copy of x, part of the graph."""
    return Clone.apply(x)


def contiguous(x: Tensor) -> Tensor:
    """x laid out in row-major order: x itself where it is so already. Messages need it."""
    return x if x.data.flags.c_contiguous else Clone.apply(x)


def to(x: Tensor, *targets: Any, device: str | None = None, dtype: Any = None) -> Tensor:
    """x on a device ("cpu", "cuda", "cuda:1"), or in a dtype, or both; x itself where it is so already."""
    for target in (t for t in (*targets, device, dtype) if t is not None):
        if not backend.is_device(target):
            x = cast(x, np.dtype(target))
        elif x.device != target and not (target == "cuda" and backend.on_gpu(x.data)):
            x = Move.apply(x, device=target)
    return x


def roll(x: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """x shifted along dims, what falls off one end coming in at the other; without dims, as if it were flat."""
    shifts, dims = (tuple(v) if isinstance(v, list) else v for v in (shifts, dims))
    return Roll.apply(x, shifts=shifts, dims=dims)


def repeat(x: Tensor, *times: Any) -> Tensor:
    """x laid side by side times[d] times along each dim d (NumPy's tile)."""
    times = _sizes(times)
    if len(times) < x.ndim:
        raise ValueError(f"repeat: {len(times)} counts for a tensor of {x.ndim} dims")
    return Repeat.apply(x, times=times)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after another along dim; their other sizes are equal."""
    tensors = promote(*tensors)
    return Cat.apply(*tensors, dim=one_dim(dim, tensors[0].ndim))


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape along a new dim."""
    return cat([unsqueeze(x, one_dim(dim, x.ndim + 1)) for x in tensors], one_dim(dim, tensors[0].ndim + 1))


def split(x: Tensor, split_size: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """x cut along dim into pieces of split_size (the last may be smaller), or of the sizes given; views."""
    d = one_dim(dim, x.ndim)
    n = x.shape[d]
    if isinstance(split_size, int):
        if split_size < 1:
            raise ValueError(f"split: split_size must be at least 1, not {split_size}")
        sizes = [min(split_size, n - start) for start in range(0, n, split_size)] or [0]
    else:
        sizes = list(split_size)
    if sum(sizes) != n:
        raise ValueError(f"split: sizes {sizes} add up to {sum(sizes)}, dim {dim} has {n}")
    ends = [0, *np.cumsum(sizes).tolist()]
    return tuple(x[(slice(None),) * d + (slice(a, b),)] for a, b in pairwise(ends))


def chunk(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """x cut along dim into at most `chunks` equal pieces (the last may be smaller); views."""
    n = x.shape[one_dim(dim, x.ndim)]
    return split(x, max(-(-n // chunks), 1), dim)


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """x with a border: pad = (before, after) of the last dim, then of the one before it, and so on.

    The value is 0 if not given. Negative widths cut off instead.

    Errors  ValueError: a mode other than constant; too many widths
    """
    if mode != "constant":
        raise ValueError(f"pad: mode {mode!r}; only 'constant' is offered")
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise ValueError(f"pad: {len(pad)} widths for a tensor of {x.ndim} dims")
    widths = [(pad[2 * i], pad[2 * i + 1]) for i in reversed(range(len(pad) // 2))]
    widths = [(0, 0)] * (x.ndim - len(widths)) + widths
    if any(w < 0 for pair in widths for w in pair):
        x = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape, strict=True))]
        widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    return Pad.apply(x, widths=widths, value=value or 0)


def tril(x: Tensor, diagonal: int = 0) -> Tensor:
    """x on and below a diagonal (0 the main one, 1 the one above it), 0 elsewhere."""
    return Triangle.apply(x, name="tril", diagonal=diagonal)


def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    """x on and above a diagonal, 0 elsewhere."""
    return Triangle.apply(x, name="triu", diagonal=diagonal)


def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x with `value` wherever mask (bool, broadcast to x) holds."""
    return cast(where(as_tensor(mask), value, x), x.dtype)
