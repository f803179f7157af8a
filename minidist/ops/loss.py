"""Softmax and the losses. `reduction` is "mean", "sum" or "none" everywhere."""

from __future__ import annotations

import numpy as np

from .. import backend
from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import as_tensor, one_dim, to_float
from .elementwise import abs, mul, sub
from .reduce import mean, sum
from .shape import permute, reshape


class Softmax(Function):
    """y = e**x / sum of e**x along a dim.   dx = y * (dy - sum of dy * y)"""

    def forward(self, x: Array, dim: int) -> Array:
        self.dim = dim
        y = namespace(x).exp(x - x.max(axis=dim, keepdims=True))
        y /= y.sum(axis=dim, keepdims=True)
        return self.save(y)

    def backward(self, dy: Array) -> tuple[Array]:
        (y,) = self.saved
        return (y * (dy - (dy * y).sum(axis=self.dim, keepdims=True)),)


class LogSoftmax(Function):
    """y = x - log of the sum of e**x along a dim.   dx = dy - e**y * sum of dy"""

    def forward(self, x: Array, dim: int) -> Array:
        self.dim = dim
        xp = namespace(x)
        y = x - x.max(axis=dim, keepdims=True)
        y -= xp.log(xp.exp(y).sum(axis=dim, keepdims=True))
        return self.save(y)

    def backward(self, dy: Array) -> tuple[Array]:
        (y,) = self.saved
        return (dy - namespace(y).exp(y) * dy.sum(axis=self.dim, keepdims=True),)


class CrossEntropy(Function):
    """The losses of M samples of C classes, from logits x (M, C) and class numbers t (M).

    With p = softmax(x), w the class weights and s the label smoothing:

    loss_i   = -(1 - s) w[t_i] log p[i, t_i] - s/C Σ_c w_c log p[i, c];    0 where t_i = ignore_index
    dx[i, c] = dloss_i (p[i, c] Σ_k q[i, k] - q[i, c]),   q[i, c] = (1 - s) w[t_i] [c = t_i] + s/C w_c
    """

    def forward(self, x: Array, t: Array, w: Array | None, ignore_index: int, smoothing: float) -> Array:
        xp = namespace(x)
        rows, classes = xp.arange(len(t)), x.shape[1]
        valid = t != ignore_index
        if not backend.on_gpu(t) and ((t < 0) | (t >= classes))[valid].any():
            bad = t[valid & ((t < 0) | (t >= classes))][0]
            raise IndexError(f"cross_entropy: target {bad} is not one of the {classes} classes")
        t = xp.where(valid, t, 0)
        # log p, and p in the same pass
        logp = x - x.max(axis=1, keepdims=True)
        p = xp.exp(logp)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        logp -= xp.log(total)
        # What each sample's own class counts for, and what every class counts for.
        own = (valid if w is None else valid * w[t]) * x.dtype.type(1 - smoothing)
        losses = -own * logp[rows, t]
        if smoothing:
            self.all = xp.full(classes, smoothing / classes, x.dtype) if w is None else w * (smoothing / classes)
            losses -= valid * (logp * self.all).sum(axis=1)
        self.smoothing = smoothing
        self.save(p, rows, t, own, valid)
        return losses.astype(x.dtype, copy=False)

    def backward(self, dy: Array) -> tuple[Array, None, None]:
        p, rows, t, own, valid = self.saved
        scale = dy * own
        if not self.smoothing:
            dx = p * scale[:, None]
        else:
            every = (dy * valid)[:, None]
            dx = p * (scale[:, None] + every * self.all.sum()) - every * self.all
        dx[rows, t] -= scale
        return dx, None, None


class NLL(Function):
    """loss_i = -w[t_i] x[i, t_i], 0 where t_i = ignore_index.   dx[i, t_i] = -dloss_i w[t_i]"""

    def forward(self, x: Array, t: Array, w: Array | None, ignore_index: int) -> Array:
        xp = namespace(x)
        self.shape = x.shape
        valid = t != ignore_index
        t = xp.where(valid, t, 0)
        own = valid.astype(x.dtype) if w is None else valid * w[t]
        rows = xp.arange(len(t))
        self.save(own, rows, t)
        return -own * x[rows, t]

    def backward(self, dy: Array) -> tuple[Array, None, None]:
        own, rows, t = self.saved
        dx = namespace(dy).zeros(self.shape, dy.dtype)
        dx[rows, t] = -dy * own
        return dx, None, None


def softmax(x: Tensor, dim: int) -> Tensor:
    """e**x along dim, scaled to add up to 1."""
    return Softmax.apply(to_float(x), dim=one_dim(dim, x.ndim))


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """log(softmax(x)), without overflow or log 0."""
    return LogSoftmax.apply(to_float(x), dim=one_dim(dim, x.ndim))


def _reduced(losses: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    """Reduce the samples' losses; `count`, where given, is what their mean divides by."""
    if reduction == "mean":
        if count is None:
            return mean(losses)
        with np.errstate(invalid="ignore", divide="ignore"):  # the mean of nothing is nan, as in PyTorch
            return sum(losses) / count
    if reduction == "sum":
        return sum(losses)
    if reduction == "none":
        return losses
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


def _rows(input: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(C), (N, C) or (N, C, d1, …) as (M, C), the target as (M), and the shape of the samples' losses."""
    samples = input.shape[:1] * (input.ndim > 1) + input.shape[2:]
    if target.shape != samples:
        raise ValueError(f"{name}: input {input.shape} wants a target of shape {samples}, not {target.shape}")
    if input.ndim == 2:
        return input, target, samples
    if input.ndim > 2:
        input = permute(input, 0, *range(2, input.ndim), 1)
    return reshape(input, -1, input.shape[-1]), reshape(target, -1), samples


def _weight_of(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: np.dtype) -> Tensor:
    """What the mean divides by: the weights of the targets that count."""
    valid = target.data != ignore_index
    counted = valid if weight is None else valid * weight.data[namespace(valid).where(valid, target.data, 0)]
    return Tensor(counted.sum().astype(dtype))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of softmax(input) against target. `input` holds logits: apply no softmax before.

    input   (C), (N, C) or (N, C, d1, …) logits
    target  class numbers, input's shape without C; or probabilities (floating-point), of input's shape
    weight  (C), what each class counts for; the mean divides by the weights of the samples' classes
    Errors  ValueError: shapes that do not match; IndexError: a class number outside 0 … C - 1
    """
    input, target = as_tensor(input), as_tensor(target)
    if target.dtype.kind == "f":
        if target.shape != input.shape:
            raise ValueError(f"cross_entropy: probabilities of shape {target.shape} for input {input.shape}")
        dim = min(input.ndim - 1, 1)
        classes, samples = input.shape[dim], input.numel() // input.shape[dim]
        target = target * (1 - label_smoothing) + label_smoothing / classes
        if weight is not None:
            target = target * reshape(weight, -1, *(1,) * (input.ndim - dim - 1))
        losses = sum(mul(log_softmax(input, dim), target), dim) * -1
        return _reduced(losses, reduction, Tensor(input.dtype.type(samples)))
    logits, classes_of, samples = _rows(input, target, "cross_entropy")
    losses = CrossEntropy.apply(logits, classes_of, weight, ignore_index=ignore_index, smoothing=label_smoothing)
    count = _weight_of(classes_of, weight, ignore_index, input.dtype) if reduction == "mean" else None
    return _reduced(losses if losses.shape == samples else reshape(losses, samples), reduction, count)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The negative log-likelihood: cross_entropy for an input that holds log-probabilities already."""
    logp, classes_of, samples = _rows(input, target, "nll_loss")
    losses = NLL.apply(logp, classes_of, weight, ignore_index=ignore_index)
    count = _weight_of(classes_of, weight, ignore_index, input.dtype) if reduction == "mean" else None
    return _reduced(losses if losses.shape == samples else reshape(losses, samples), reduction, count)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(input - target)**2"""
    difference = sub(input, target)
    return _reduced(mul(difference, difference), reduction)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """|input - target|"""
    return _reduced(abs(sub(input, target)), reduction)


class BinaryCrossEntropyWithLogits(Function):
    """loss = (1 - t) x + (1 + (p - 1) t) log(1 + e**-x), p the weight of positives (1).

    dx = dloss ((1 - t) - (1 + (p - 1) t) / (1 + e**x));   dt = dloss (-x + (p - 1) log(1 + e**-x))
    """

    def forward(self, x: Array, t: Array, p: Array | None) -> Array:
        xp = namespace(x)
        # log(1 + e**-x) without overflow, e**-|x| being at most 1
        small = xp.exp(-xp.abs(x))
        softplus = xp.log1p(small) + xp.maximum(-x, 0)
        factor = 1 if p is None else 1 + (p - 1) * t
        self.save(x, t, p, small, softplus)
        return (1 - t) * x + factor * softplus

    def backward(self, dy: Array) -> tuple[Array | None, Array | None, None]:
        x, t, p, small, softplus = self.saved
        xp = namespace(x)
        falling = xp.where(x >= 0, small, 1) / (1 + small)  # 1 / (1 + e**x)
        factor = 1 if p is None else 1 + (p - 1) * t
        dx = dy * ((1 - t) - factor * falling) if self.needs[0] else None
        dt = dy * (-x if p is None else -x + (p - 1) * softplus) if self.needs[1] else None
        return dx, dt, None


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of sigmoid(input) against target in [0, 1], of input's shape. `input` holds logits.

    weight      scales each element's loss, broadcast
    pos_weight  scales the loss of positives, broadcast
    """
    if input.shape != target.shape:
        raise ValueError(f"binary_cross_entropy_with_logits: input {input.shape}, target {target.shape}")
    losses = BinaryCrossEntropyWithLogits.apply(input, target, pos_weight)
    return _reduced(losses if weight is None else mul(losses, weight), reduction)
