"""Normalisation: over each sample's features (layer_norm, rms_norm), or over each channel's samples (batch_norm).

Each is one fused op. All three have the same gradient at heart: with x̂ the normalised input and g = dy * weight,

    dx = (g - mean(g) - x̂ * mean(g * x̂)) / σ

with the means over what was normalised together, and the middle term only where the mean was subtracted.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import is_recomputing, no_grad
from ..backend import Array, Shape, namespace
from ..tensor import Function, Tensor
from .common import same_dtype, to_float, wide


def _row_dot(a: Array, b: Array) -> Array:
    """The dot product of each row of a with that of b, as a column."""
    return namespace(a).einsum("ij,ij->i", a, b)[:, None]


def _row_mean(a: Array, w: Array | None = None) -> Array:
    """The mean of each row (of a * w), as a column. A matrix product takes a third of the time of `mean`."""
    n = a.shape[1]
    weights = namespace(a).full(n, 1 / max(n, 1), a.dtype) if w is None else w / n
    return (a @ weights)[:, None]


def _column_sum(a: Array) -> Array:
    """The sum of the rows. A matrix product takes a quarter of the time of `sum`."""
    return namespace(a).ones(len(a), a.dtype) @ a


class LayerNorm(Function):
    """y = x̂ * w + b, x̂ = (x - mean) / σ, σ = sqrt(var + eps), over the last dims, those of w.   x (..., n), w, b (n)

    dx = (g - mean(g) - x̂ mean(g x̂)) / σ, g = dy * w     (..., n)
    dw = dy * x̂, db = dy, summed over leading dims        (n)
    """

    def forward(self, x: Array, w: Array | None, b: Array | None, shape: Shape, eps: float) -> Array:
        self.shape, n = shape, math.prod(shape)
        xp = namespace(x)
        rows = wide(x).reshape(-1, n)
        x_hat = rows - _row_mean(rows)
        scale = 1 / xp.sqrt(_row_dot(x_hat, x_hat) / n + eps)
        x_hat *= scale
        self.save(x_hat, scale, w)
        y = x_hat if w is None else x_hat * w.reshape(n)
        if b is not None:
            y = y + b.reshape(n) if w is None else xp.add(y, b.reshape(n), out=y)
        return y.reshape(x.shape).astype(x.dtype, copy=y is x_hat)  # never the saved array itself

    def backward(self, dy: Array) -> tuple[Array | None, Array | None, Array | None]:
        x_hat, scale, w = self.saved
        xp = namespace(dy)
        rows, n = wide(dy).reshape(x_hat.shape), x_hat.shape[1]
        w = None if w is None else wide(w).reshape(n)
        product = rows * x_hat
        dx = dw = db = None
        if self.needs[1]:
            dw = _column_sum(product).reshape(self.shape).astype(dy.dtype, copy=False)
        if self.needs[2]:
            db = _column_sum(rows).reshape(self.shape).astype(dy.dtype, copy=False)
        if self.needs[0]:
            means = xp.multiply(x_hat, _row_mean(product, w), out=product)
            means += _row_mean(rows, w)
            dx = xp.subtract(rows if w is None else rows * w, means, out=means)
            dx *= scale
            dx = dx.reshape(dy.shape).astype(dy.dtype, copy=False)
        return dx, dw, db


class RMSNorm(Function):
    """y = x̂ * w, x̂ = x / σ, σ = sqrt(mean(x²) + eps), over the last dims, those of w.   x (..., n), w (n)

    dx = (g - x̂ mean(g x̂)) / σ, g = dy * w     (..., n)
    dw = dy * x̂, summed over leading dims       (n)
    """

    def forward(self, x: Array, w: Array | None, shape: Shape, eps: float) -> Array:
        n = math.prod(shape)
        rows = wide(x).reshape(-1, n)
        sigma = namespace(x).sqrt(_row_dot(rows, rows) / n + eps)
        x_hat = rows * (1 / sigma)
        self.save(x_hat, sigma, w)
        y = x_hat if w is None else x_hat * w.reshape(n)
        return y.reshape(x.shape).astype(x.dtype, copy=y is x_hat)  # never the saved array itself

    def backward(self, dy: Array) -> tuple[Array | None, Array | None]:
        x_hat, sigma, w = self.saved
        rows, n = wide(dy).reshape(x_hat.shape), x_hat.shape[1]
        dx = dw = None
        if self.needs[0]:
            g = rows if w is None else rows * w.reshape(n)
            dx = x_hat * (_row_dot(g, x_hat) / -n)
            dx += g
            dx *= 1 / sigma
            dx = dx.reshape(dy.shape).astype(dy.dtype, copy=False)
        if self.needs[1]:
            dw = namespace(dy).einsum("ij,ij->j", rows, x_hat).reshape(w.shape).astype(dy.dtype, copy=False)
        return dx, dw


def _by_channel(x: Array) -> Array:
    """(N, C, ...) as (N, C, all the rest)."""
    return wide(x).reshape(*x.shape[:2], math.prod(x.shape[2:]))


class BatchNorm(Function):
    """y = x̂ * w + b, x̂ = (x - mean) / σ, σ = sqrt(var + eps), for each channel.   x (N, C, ...), the others (C)

    dx = (g - mean(g) - x̂ mean(g x̂)) / σ, g = dy * w, where mean and var are the batch's own
    dx = g / σ                                        where they are given numbers (`fixed`)
    dw = dy * x̂, db = dy, summed over all dims but the channel's
    """

    def forward(
        self, x: Array, w: Array | None, b: Array | None, mean: Array, var: Array, eps: float, fixed: bool
    ) -> Array:
        self.fixed = fixed
        self.mean = mean[:, None].copy()  # the running mean may have moved on by the time of backward
        self.sigma = namespace(x).sqrt(var[:, None] + eps)
        self.save(x, w)
        # y = scale * x + shift, which takes two passes over x.
        scale = (1 if w is None else w[:, None]) / self.sigma
        shift = (0 if b is None else b[:, None]) - self.mean * scale
        y = _by_channel(x) * scale
        y += shift
        return y.reshape(x.shape).astype(x.dtype, copy=False)

    def means(self, db: Array, dw: Array, n: int) -> tuple[Array, Array]:
        """The means of dy and of dy * x̂ over the batch, of which these are the sums and n the number of values."""
        return db / n, dw / n

    def backward(self, dy: Array) -> tuple[Array | None, Array | None, Array | None]:
        x, w = self.saved
        rows = _by_channel(dy)
        x_hat = (_by_channel(x) - self.mean) / self.sigma
        db = rows.sum(axis=(0, 2))
        dw = (rows * x_hat).sum(axis=(0, 2))
        dx = None
        if self.needs[0]:
            dx = rows
            if not self.fixed:
                mean, mean_hat = self.means(db, dw, rows.size // rows.shape[1])
                x_hat *= -mean_hat[:, None]
                x_hat += rows
                x_hat -= mean[:, None]
                dx = x_hat
            dx = dx * ((1 if w is None else w[:, None]) / self.sigma)
            dx = dx.reshape(dy.shape).astype(dy.dtype, copy=False)
        return (
            dx,
            dw.astype(dy.dtype, copy=False) if self.needs[1] else None,
            db.astype(dy.dtype, copy=False) if self.needs[2] else None,
        )


def _check_shapes(name: str, input: Tensor, normalized_shape: int | Shape, *parameters: Tensor | None) -> Shape:
    """The normalized_shape as a tuple; raises ValueError unless it ends the input's and equals the parameters'."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"{name}: input {input.shape} does not end in normalized_shape {shape}")
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{name}: a weight or bias of shape {parameter.shape} for normalized_shape {shape}")
    return shape


def layer_norm(
    input: Tensor,
    normalized_shape: int | Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last dims to mean 0 and variance 1, then scale by weight and add bias.

    Shapes  input (..., *normalized_shape); weight, bias normalized_shape -> the input's
    Errors  ValueError: shapes that do not match; TypeError: different dtypes
    Source  Ba, Kiros, Hinton 2016
    """
    same_dtype("layer_norm", input, weight, bias)
    shape = _check_shapes("layer_norm", input, normalized_shape, weight, bias)
    return LayerNorm.apply(input, weight, bias, shape=shape, eps=eps)


def rms_norm(
    input: Tensor, normalized_shape: int | Shape, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Divide by the root of the mean square over the last dims, then scale by weight.

    Shapes  input (..., *normalized_shape); weight normalized_shape -> the input's
    eps     added to the mean square; the dtype's machine epsilon if not given
    Errors  ValueError: shapes that do not match; TypeError: different dtypes
    Source  Zhang & Sennrich 2019
    """
    same_dtype("rms_norm", input, weight)
    shape = _check_shapes("rms_norm", input, normalized_shape, weight)
    input = to_float(input)
    return RMSNorm.apply(input, weight, shape=shape, eps=float(np.finfo(input.dtype).eps) if eps is None else eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel over the batch, then scale by weight and add bias.

    Shapes    input (N, C, ...); all the others (C) -> the input's
    training  True: use the batch's mean and variance, and move the running ones (changed in place, if given) towards
              them by `momentum`; the running variance takes the unbiased one. False: use the running ones
    Errors    ValueError: shapes that do not match; training on one value per channel; no running statistics otherwise
    Source    Ioffe & Szegedy 2015
    """
    same_dtype("batch_norm", input, weight, bias)
    if input.ndim < 2:
        raise ValueError(f"batch_norm: the input must have at least 2 dims (N, C), not shape {input.shape}")
    channels = input.shape[1]
    for parameter in (running_mean, running_var, weight, bias):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"batch_norm: a parameter of shape {parameter.shape} for input {input.shape}")
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: training=False needs running_mean and running_var")
        mean, var = running_mean.data, running_var.data
    else:
        n = input.numel() // max(channels, 1)
        if n <= 1:
            raise ValueError(f"batch_norm: training needs more than 1 value per channel, input has shape {input.shape}")
        mean, var = mean_and_variance(input.data)
        move_running(running_mean, running_var, mean, var, n, momentum)
    return BatchNorm.apply(input, weight, bias, mean=mean, var=var, eps=eps, fixed=not training)


def mean_and_variance(x: Array) -> tuple[Array, Array]:
    """Of each channel over the batch; the variance is the biased one.   x (N, C, ...) -> (C), (C)"""
    rows = _by_channel(x)
    mean = rows.mean(axis=(0, 2))
    centred = rows - mean[:, None]
    centred *= centred
    return mean, centred.mean(axis=(0, 2))


@no_grad()
def move_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Array, var: Array, n: int, momentum: float
) -> None:
    """Move the running statistics, in place, towards those of a batch of n values per channel.

    A forward that is done over for its backward moves nothing: it has.
    """
    if is_recomputing():
        return
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * n / (n - 1))
