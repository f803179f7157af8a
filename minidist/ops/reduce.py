"""Reductions: sums, means, extremes, and the running sum. `dim` is one dim, several, or None for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Shape, namespace
from ..tensor import Function, Tensor
from .common import cast, dim_tuple, one_dim, to_float, wide
from .elementwise import maximum, minimum
from .shape import squeeze

Dim = int | tuple[int, ...] | None


class Extreme(NamedTuple):
    """What `max` and `min` along a dim give."""

    values: Tensor
    indices: Tensor


def _kept(shape: Shape, dims: tuple[int, ...]) -> Shape:
    """The shape of a reduction over dims that keeps them with length 1: what broadcasts against the input again."""
    return tuple(1 if d in dims else n for d, n in enumerate(shape))


def _count(shape: Shape, dims: tuple[int, ...]) -> int:
    count = 1
    for d in dims:
        count *= shape[d]
    return count


class Reduction(Function):
    """Common to all: the dims, the input's shape, and a result's gradient laid over the input again."""

    def begin(self, x: Array, dim: Dim) -> tuple[int, ...]:
        self.shape = x.shape
        self.dims = dim_tuple(dim, x.ndim)
        return self.dims

    def spread(self, dy: Array) -> Array:
        """dy (or y) with the reduced dims back at length 1, to broadcast against x."""
        return dy.reshape(_kept(self.shape, self.dims))


class Sum(Reduction):
    """y = sum of x.   dx = dy, everywhere"""

    def forward(self, x: Array, dim: Dim, keepdim: bool) -> Array:
        return x.sum(axis=self.begin(x, dim), keepdims=keepdim)

    def backward(self, dy: Array) -> tuple[Array]:
        return (namespace(dy).broadcast_to(self.spread(dy), self.shape),)


class Mean(Reduction):
    """y = sum of x / n.   dx = dy / n"""

    def forward(self, x: Array, dim: Dim, keepdim: bool) -> Array:
        dims = self.begin(x, dim)
        self.n = _count(x.shape, dims)
        with np.errstate(invalid="ignore", divide="ignore"):  # the mean of nothing is nan, as in PyTorch
            return (wide(x).sum(axis=dims, keepdims=keepdim) / self.n).astype(x.dtype, copy=False)

    def backward(self, dy: Array) -> tuple[Array]:
        share = (wide(self.spread(dy)) / (self.n or 1)).astype(dy.dtype, copy=False)
        return (namespace(dy).broadcast_to(share, self.shape),)


class Prod(Reduction):
    """y = product of x.   dx_i = dy * product of all the others, so zeros in x need no special case"""

    def forward(self, x: Array, dim: int | None, keepdim: bool) -> Array:
        self.begin(x, dim)
        self.save(x)
        return x.prod(axis=self.dims, keepdims=keepdim)

    def backward(self, dy: Array) -> tuple[Array]:
        (x,) = self.saved
        xp = namespace(x)
        dim = self.dims[0] if len(self.dims) == 1 else None
        line = x.reshape(-1, 1) if dim is None else xp.moveaxis(x, dim, 0)
        ones = xp.ones_like(line[:1])
        before = xp.concatenate([ones, line[:-1]]).cumprod(axis=0)
        after = xp.flip(xp.concatenate([ones, xp.flip(line[1:], 0)]).cumprod(axis=0), 0)
        others = before * after
        others = others.reshape(x.shape) if dim is None else xp.moveaxis(others, 0, dim)
        return (self.spread(dy) * others,)


class Var(Reduction):
    """y = sum of (x - mean)**2 / (n - correction).   dx = dy * 2 (x - mean) / (n - correction)"""

    def forward(self, x: Array, dim: Dim, correction: int, keepdim: bool) -> Array:
        dims = self.begin(x, dim)
        n = _count(x.shape, dims)
        self.freedom = n - correction if n > correction else 0
        with np.errstate(invalid="ignore", divide="ignore"):
            centred = wide(x) - wide(x).sum(axis=dims, keepdims=True) / n
            self.save(centred)
            return ((centred * centred).sum(axis=dims, keepdims=keepdim) / self.freedom).astype(x.dtype, copy=False)

    def backward(self, dy: Array) -> tuple[Array]:
        with np.errstate(invalid="ignore", divide="ignore"):
            dx = wide(self.spread(dy)) * 2 / self.freedom * self.saved[0]
        return (dx.astype(dy.dtype, copy=False),)


class Std(Var):
    """y = sqrt(var).   dx = dy * (x - mean) / (y (n - correction)); 0 where y is 0"""

    def forward(self, x: Array, dim: Dim, correction: int, keepdim: bool) -> Array:
        y = namespace(x).sqrt(super().forward(x, dim, correction, keepdim))
        self.save(*self.saved, y)
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        y = self.saved[1]
        xp = namespace(y)
        return super().backward(xp.where(y == 0, 0, dy / xp.where(y == 0, 1, 2 * y)))


class Amax(Reduction):
    """y = max of x.   dy is shared equally by the elements that equal y"""

    def forward(self, x: Array, dim: Dim, keepdim: bool) -> Array:
        y = self.extreme(x, axis=self.begin(x, dim), keepdims=keepdim)
        self.save(y, x)
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        y, x = self.saved
        chosen = (x == self.spread(y)).astype(dy.dtype)
        return (chosen * (self.spread(dy) / chosen.sum(axis=self.dims, keepdims=True)),)

    def extreme(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        return x.max(axis=axis, keepdims=keepdims)


class Amin(Amax):
    """y = min of x.   dy is shared equally by the elements that equal y"""

    def extreme(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        return x.min(axis=axis, keepdims=keepdims)


class TakeExtreme(Function):
    """y = x at the given indices along a dim.   dx = dy there, 0 elsewhere"""

    def forward(self, x: Array, indices: Array, dim: int) -> Array:
        self.shape, self.dim = x.shape, dim
        self.save(indices)
        return namespace(x).take_along_axis(x, indices, axis=dim)

    def backward(self, dy: Array) -> tuple[Array, None]:
        (indices,) = self.saved
        xp = namespace(dy)
        shape = [-1 if d == self.dim else 1 for d in range(len(self.shape))]
        here = indices == xp.arange(self.shape[self.dim]).reshape(shape)
        return xp.where(here, dy, dy.dtype.type(0)), None


class LogSumExp(Reduction):
    """y = log of the sum of e**x, without overflow.   dx = dy * e**(x - y)"""

    def forward(self, x: Array, dim: Dim, keepdim: bool) -> Array:
        xp = namespace(x)
        dims = self.begin(x, dim)
        largest = x.max(axis=dims, keepdims=True)
        largest = xp.where(xp.isfinite(largest), largest, x.dtype.type(0))
        with np.errstate(divide="ignore"):  # log 0: a row of -inf gives -inf
            y = xp.log(xp.exp(x - largest).sum(axis=dims, keepdims=True)) + largest
        self.save(x, y)
        return y if keepdim else y.reshape([n for d, n in enumerate(x.shape) if d not in dims])

    def backward(self, dy: Array) -> tuple[Array]:
        x, y = self.saved
        xp = namespace(x)
        return (self.spread(dy) * xp.exp(x - xp.where(xp.isfinite(y), y, x.dtype.type(0))),)


class CumSum(Function):
    """y_i = x_0 + … + x_i along a dim.   dx_i = dy_i + … + dy_last"""

    def forward(self, x: Array, dim: int) -> Array:
        self.dim = dim
        return x.cumsum(axis=dim) if x.ndim else x.copy()

    def backward(self, dy: Array) -> tuple[Array]:
        xp = namespace(dy)
        return (xp.flip(xp.flip(dy, self.dim).cumsum(axis=self.dim), self.dim) if dy.ndim else dy,)


def _whole(x: Tensor) -> Tensor:
    """Integers and booleans are summed as int64."""
    return cast(x, np.int64) if x.dtype.kind in "bui" else x


def _floating(name: str, x: Tensor) -> Tensor:
    """x; raises TypeError if it holds integers."""
    if x.dtype.kind not in "fc":
        raise TypeError(f"{name} of a {x.dtype} tensor: cast it first (x.float())")
    return x


def sum(x: Tensor, dim: Dim = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The sum over dim."""
    return Sum.apply(_whole(x) if dtype is None else cast(x, dtype), dim=dim, keepdim=keepdim)


def mean(x: Tensor, dim: Dim = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The mean over dim. Raises TypeError for integers, which have no mean of their own dtype."""
    return Mean.apply(_floating("mean", x if dtype is None else cast(x, dtype)), dim=dim, keepdim=keepdim)


def prod(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The product over dim, or of all elements."""
    return Prod.apply(_whole(x), dim=dim, keepdim=keepdim)


def var(x: Tensor, dim: Dim = None, correction: int = 1, keepdim: bool = False) -> Tensor:
    """The variance over dim; correction 1 (Bessel's) divides by n - 1, correction 0 by n."""
    return Var.apply(_floating("var", x), dim=dim, correction=correction, keepdim=keepdim)


def std(x: Tensor, dim: Dim = None, correction: int = 1, keepdim: bool = False) -> Tensor:
    """The standard deviation over dim; see `var`."""
    return Std.apply(_floating("std", x), dim=dim, correction=correction, keepdim=keepdim)


def amax(x: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """The largest over dim."""
    return Amax.apply(x, dim=dim, keepdim=keepdim)


def amin(x: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """The smallest over dim."""
    return Amin.apply(x, dim=dim, keepdim=keepdim)


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the largest is (int64): along dim, or in the flattened tensor."""
    return _arg("argmax", x, dim, keepdim)


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Where the smallest is (int64): along dim, or in the flattened tensor."""
    return _arg("argmin", x, dim, keepdim)


def all(x: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """Whether every element over dim is true (not 0)."""
    return Tensor(x.data.all(axis=dim_tuple(dim, x.ndim), keepdims=keepdim))


def any(x: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """Whether an element over dim is true (not 0)."""
    return Tensor(x.data.any(axis=dim_tuple(dim, x.ndim), keepdims=keepdim))


def _arg(name: str, x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    xp = namespace(x.data)
    if dim is None or not x.ndim:
        return Tensor(getattr(xp, name)(x.data).reshape((1,) * x.ndim if keepdim else ()))
    indices = getattr(xp, name)(x.data, axis=one_dim(dim, x.ndim))
    return Tensor(xp.expand_dims(indices, one_dim(dim, x.ndim)) if keepdim else indices)


def max(x: Tensor, dim: int | Tensor | None = None, keepdim: bool = False) -> Any:
    """All of x: its largest. Along a dim: (values, indices). With a second tensor: the larger, element by element."""
    if isinstance(dim, Tensor):
        return maximum(x, dim)
    return amax(x) if dim is None else _extreme(x, argmax(x, dim, keepdim=True), dim, keepdim)


def min(x: Tensor, dim: int | Tensor | None = None, keepdim: bool = False) -> Any:
    """All of x: its smallest. Along a dim: (values, indices). With a second tensor: the smaller, element by element."""
    if isinstance(dim, Tensor):
        return minimum(x, dim)
    return amin(x) if dim is None else _extreme(x, argmin(x, dim, keepdim=True), dim, keepdim)


def _extreme(x: Tensor, indices: Tensor, dim: int, keepdim: bool) -> Extreme:
    if not x.ndim:
        return Extreme(amax(x), indices)
    dim = one_dim(dim, x.ndim)
    values = TakeExtreme.apply(x, indices, dim=dim)
    if keepdim:
        return Extreme(values, indices)
    return Extreme(squeeze(values, dim), Tensor(indices.data.squeeze(dim)))


def logsumexp(x: Tensor, dim: Dim, keepdim: bool = False) -> Tensor:
    """log(sum(exp(x))) over dim, without overflow."""
    return LogSumExp.apply(to_float(x), dim=dim, keepdim=keepdim)


def cumsum(x: Tensor, dim: int) -> Tensor:
    """The running sum along dim."""
    return CumSum.apply(_whole(x), dim=one_dim(dim, x.ndim))
