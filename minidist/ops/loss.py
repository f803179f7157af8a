"""Softmax and the losses. `reduction` is "mean", "sum" or "none" everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import as_tensor, one_dim, promote, to_float
from .elementwise import abs, mul, neg, sub
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


class OfClasses(Function):
    """Common to the losses against class numbers: what a sample counts for, and the reduction."""

    def begin(self, name: str, x: Array, t: Array, w: Array | None, ignore_index: int) -> tuple[Array, ...]:
        """For each sample: its row, its class (0 if ignored), what it counts for (0 if ignored), whether it does."""
        xp = namespace(x)
        valid = t != ignore_index
        t = xp.where(valid, t, 0)
        _check_classes(name, t, x.shape[1])
        return xp.arange(len(t)), t, valid.astype(x.dtype) if w is None else valid * w[t], valid

    def reduce(self, losses: Array, counts: Array, reduction: str) -> Array:
        """The losses, their sum, or their mean: the sum over what the samples count for."""
        self.divisor = counts.sum() if reduction == "mean" else None
        if reduction == "none":
            return losses
        return losses.sum() if self.divisor is None else _quotient(losses.sum(), self.divisor)

    def spread(self, dy: Array, valid: Array) -> Array:
        """Each sample's share of dy. Even nan, of a mean of nothing, is 0 for who is ignored."""
        dy = dy if self.divisor is None else _quotient(dy, self.divisor)
        return namespace(valid).where(valid, dy, dy.dtype.type(0))


class CrossEntropy(OfClasses):
    """The loss of M samples of C classes, from logits x (M, C) and class numbers t (M), reduced.

    With p = softmax(x), w the class weights (1), s the label smoothing (0), and Z what the mean divides by, Σ w[t_i]:

    loss_i   = -(1 - s) w[t_i] log p[i, t_i] - s/C Σ_c w_c log p[i, c];    0 where t_i = ignore_index
    dx[i, c] = dloss_i (p[i, c] Σ_k q[i, k] - q[i, c]),   q[i, c] = (1 - s) w[t_i] [c = t_i] + s/C w_c
    dloss_i  = dy / Z (mean), dy (sum), dy_i (none)
    """

    def forward(
        self, x: Array, t: Array, w: Array | None, ignore_index: int, smoothing: float, reduction: str
    ) -> Array:
        xp = namespace(x)
        # 1. What each sample counts for (0 if ignored), and its class.
        rows, t, counts, valid = self.begin("cross_entropy", x, t, w, ignore_index)
        # 2. log p = x - largest - log of the sum: no overflow, no log 0.
        shifted = x - x.max(axis=1, keepdims=True)
        target = shifted[rows, t]
        p = xp.exp(shifted, out=None if smoothing else shifted)
        total = p @ xp.ones((x.shape[1], 1), x.dtype)  # a third of the time of `sum`
        p *= 1 / total
        log_total = xp.log(total)
        # 3. The losses, and how each depends on its own class (`own`) and on every class (`all`).
        own = counts * x.dtype.type(1 - smoothing) if smoothing else counts
        losses = own * (log_total[:, 0] - target)
        self.all = None
        if smoothing:
            every = smoothing / x.shape[1]
            self.all = xp.full(x.shape[1], every, x.dtype) if w is None else w * every
            losses += valid * ((log_total - shifted) * self.all).sum(axis=1)
        # 4. Reduce.
        self.save(p, rows, t, own, valid)
        return self.reduce(losses, counts, reduction)

    def backward(self, dy: Array) -> tuple[Array, None, None]:
        p, rows, t, own, valid = self.saved
        dy = self.spread(dy, valid)
        scale = dy * own
        if self.all is None:
            dx = p * scale[:, None]
        else:
            every = dy[:, None]
            dx = p * (scale[:, None] + every * self.all.sum()) - every * self.all
        dx[rows, t] -= scale
        return dx, None, None


class NLL(OfClasses):
    """loss_i = -w[t_i] x[i, t_i], 0 where t_i = ignore_index; reduced.   dx[i, t_i] = -dloss_i w[t_i]"""

    def forward(self, x: Array, t: Array, w: Array | None, ignore_index: int, reduction: str) -> Array:
        self.shape = x.shape
        rows, t, counts, valid = self.begin("nll_loss", x, t, w, ignore_index)
        self.save(counts, rows, t, valid)
        return self.reduce(-counts * x[rows, t], counts, reduction)

    def backward(self, dy: Array) -> tuple[Array, None, None]:
        counts, rows, t, valid = self.saved
        dx = namespace(counts).zeros(self.shape, dy.dtype)
        dx[rows, t] = -self.spread(dy, valid) * counts
        return dx, None, None


def _quotient(x: Array, y: Array) -> Array:
    """x / y; without a warning where y is 0: the mean of nothing is nan, as in PyTorch."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / y


def _check_classes(name: str, t: Array, classes: int) -> None:
    """Raise IndexError for a class number that there is not. Not on a GPU, where looking would mean waiting for it."""
    if not backend.on_gpu(t) and t.size and (t.min() < 0 or t.max() >= classes):
        bad = t[(t < 0) | (t >= classes)][0]
        raise IndexError(f"{name}: target {bad} is not one of the {classes} classes")


def softmax(x: Tensor, dim: int) -> Tensor:
    """e**x along dim, scaled to add up to 1."""
    return Softmax.apply(to_float(x), dim=one_dim(dim, x.ndim))


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """log(softmax(x)), without overflow or log 0."""
    return LogSoftmax.apply(to_float(x), dim=one_dim(dim, x.ndim))


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    _check_reduction(reduction)
    return mean(losses) if reduction == "mean" else sum(losses) if reduction == "sum" else losses


def _of_classes(
    loss: type[Function],
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    **options: Any,
) -> Tensor:
    """Apply a loss of (M, C) inputs and (M) class numbers to (C), (N, C) or (N, C, d1, …)."""
    _check_reduction(reduction)
    samples = input.shape[:1] * (input.ndim > 1) + input.shape[2:]
    if target.shape != samples:
        raise ValueError(f"{name}: input {input.shape} wants a target of shape {samples}, not {target.shape}")
    if input.ndim == 2:
        return loss.apply(input, target, weight, reduction=reduction, **options)
    if input.ndim > 2:
        input = permute(input, 0, *range(2, input.ndim), 1)
    rows = reshape(input, -1, input.shape[-1])
    losses = loss.apply(rows, reshape(target, -1), weight, reduction=reduction, **options)
    return reshape(losses, samples) if reduction == "none" else losses


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
    if target.dtype.kind != "f":
        options = dict(ignore_index=ignore_index, smoothing=label_smoothing)
        return _of_classes(CrossEntropy, "cross_entropy", input, target, weight, reduction, **options)
    if target.shape != input.shape:
        raise ValueError(f"cross_entropy: probabilities of shape {target.shape} for input {input.shape}")
    dim = min(input.ndim - 1, 1)
    target = target * (1 - label_smoothing) + label_smoothing / input.shape[dim]
    if weight is not None:
        target = target * reshape(weight, -1, *(1,) * (input.ndim - dim - 1))
    losses = neg(sum(mul(log_softmax(input, dim), target), dim))
    return _reduced(losses, reduction)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The negative log-likelihood: cross_entropy for an input that holds log-probabilities already."""
    return _of_classes(NLL, "nll_loss", input, target, weight, reduction, ignore_index=ignore_index)


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
    input, target = promote(input, target)
    losses = BinaryCrossEntropyWithLogits.apply(input, target, pos_weight)
    return _reduced(losses if weight is None else mul(losses, weight), reduction)
