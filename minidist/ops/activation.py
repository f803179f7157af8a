"""Activation functions, element by element. Integers become float32 first, except in relu."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor
from . import normal
from .common import to_float, wide
from .pieces import pieces, scratch


class Tanh(Function):
    """y = tanh x.   dx = dy * (1 - y²)"""

    def forward(self, x: Array) -> Array:
        return self.save(namespace(x).tanh(x))

    def backward(self, dy: Array) -> tuple[Array]:
        (y,) = self.saved
        dx = 1 - y * y
        dx *= dy
        return (dx,)


def logistic(x: Array) -> Array:
    """σ(x) = 1 / (1 + exp(-x)), of an array. Below 0 it is exp(x) / (1 + exp(x)), so that exp never overflows."""
    xp = namespace(x)
    e = xp.abs(x)
    e *= -1
    e = xp.exp(e)
    y = xp.maximum(e, x >= 0)
    e += 1
    y /= e
    return y


class Sigmoid(Function):
    """y = σ(x) = 1 / (1 + exp(-x)).   dx = dy * y (1 - y)"""

    def forward(self, x: Array) -> Array:
        return self.save(logistic(x))

    def backward(self, dy: Array) -> tuple[Array]:
        (y,) = self.saved
        dx = (1 - y) * y
        dx *= dy
        return (dx,)


class ReLU(Function):
    """y = max(x, 0).   dx = dy where y > 0, else 0"""

    def forward(self, x: Array) -> Array:
        return self.save(namespace(x).maximum(x, 0))

    def backward(self, dy: Array) -> tuple[Array]:
        # The mask as numbers of dy's dtype, then one product in place: `where` takes 15 times as long on CPU.
        dx = (self.saved[0] > 0).astype(dy.dtype)
        dx *= dy
        return (dx,)


class LeakyReLU(Function):
    """y = x where x > 0, else slope * x.   dx = dy where x > 0, else slope * dy"""

    def forward(self, x: Array, slope: float) -> Array:
        self.slope = slope
        self.save(x)
        return namespace(x).where(x > 0, x, slope * x)

    def backward(self, dy: Array) -> tuple[Array]:
        (x,) = self.saved
        return (namespace(x).where(x > 0, dy, self.slope * dy),)


class Smooth(Function):
    """y = f(x).   dx = dy * f'(x), which forward calculates beside f(x): the two share most of their steps.

    A subclass gives the steps. They are done in pieces, in memory that is there already.
    """

    def forward(self, x: Array) -> Array:
        dtype, x = x.dtype, wide(x)
        # What runs down the columns (see Linear) is gone through in that order, and so is what comes of it.
        self.turned = x.flags.f_contiguous and not x.flags.c_contiguous
        x = x.T if self.turned else x
        xp = namespace(x)
        y = xp.empty(x.shape, x.dtype)
        slope = xp.empty(x.shape, x.dtype) if self.recording else y
        scratch = None
        with np.errstate(over="ignore"):  # where something overflows, what is made of it is right: tanh(inf), 1 / inf
            for x_piece, y_piece, slope_piece in pieces(x, y, slope):
                scratch = self.scratch(x_piece) if scratch is None else scratch[:, : x_piece.size]
                self.steps(x_piece, y_piece, slope_piece, scratch)
        self.save(slope.astype(dtype, copy=False))
        return (y.T if self.turned else y).astype(dtype, copy=False)

    def backward(self, dy: Array) -> tuple[Array]:
        (slope,) = self.saved
        dy = dy.T if self.turned else dy
        dx = dy * slope
        return (dx.T if self.turned else dx,)

    def scratch(self, x: Array) -> Array:
        """Scratch memory for the steps (rows, n)."""
        return scratch(x, 2)

    @abstractmethod
    def steps(self, x: Array, y: Array, slope: Array, scratch: Array) -> None:
        """Write f(x) into y and then, if `self.recording`, f'(x) into slope. All are flat but scratch (rows, n)."""


class GELU(Smooth):
    """y = x Φ(x), where Φ is the distribution function of the standard normal.

    dx = dy * (Φ(x) + x φ(x)), where φ is its density
    """

    def scratch(self, x: Array) -> Array:
        return normal.scratch_for(x)

    def steps(self, x: Array, y: Array, slope: Array, scratch: Array) -> None:
        xp = namespace(x)
        cdf, density = normal.normal(x, scratch, self.recording)
        xp.multiply(x, cdf, out=y)
        if density is not None:
            xp.multiply(x, density, out=slope)
            xp.add(slope, cdf, out=slope)


class TanhGELU(Smooth):
    """y = x s, where s = (1 + tanh(k x (1 + a x²))) / 2, k = √(2/π), a = 0.044715: close to GELU, in fewer steps.

    dx = dy * (s + x s'), where s' = 2 s (1 - s) k (1 + 3 a x²)
    """

    k, a = math.sqrt(2 / math.pi), 0.044715

    def steps(self, x: Array, y: Array, slope: Array, scratch: Array) -> None:
        xp = namespace(x)
        s, square = scratch
        xp.multiply(x, x, out=square)
        xp.multiply(square, self.k * self.a, out=s)
        xp.add(s, self.k, out=s)
        xp.multiply(s, x, out=s)
        xp.tanh(s, out=s)
        xp.multiply(s, 0.5, out=s)
        xp.add(s, 0.5, out=s)
        xp.multiply(x, s, out=y)
        if self.recording:  # as 1 - (1 - s) (1 - q), q = x s (2 k + 6 k a x²)
            xp.multiply(square, 6 * self.k * self.a, out=slope)
            xp.add(slope, 2 * self.k, out=slope)
            xp.multiply(slope, y, out=slope)
            xp.subtract(1, slope, out=slope)
            xp.subtract(1, s, out=s)
            xp.multiply(slope, s, out=slope)
            xp.subtract(1, slope, out=slope)


class SiLU(Smooth):
    """y = x σ(x), σ(x) = 1 / (1 + exp(-x)).   dx = dy * (σ(x) + y (1 - σ(x)))"""

    def steps(self, x: Array, y: Array, slope: Array, scratch: Array) -> None:
        xp = namespace(x)
        s = scratch[0]
        xp.negative(x, out=s)
        xp.exp(s, out=s)
        xp.add(s, 1, out=s)
        xp.reciprocal(s, out=s)
        xp.multiply(x, s, out=y)
        if self.recording:
            xp.subtract(1, s, out=slope)
            xp.multiply(slope, y, out=slope)
            xp.add(slope, s, out=slope)


class Softplus(Function):
    """y = log(1 + exp(βx)) / β, which is x where βx > threshold.   dx = dy * σ(βx), or dy there"""

    def forward(self, x: Array, beta: float, threshold: float) -> Array:
        self.beta, self.threshold = beta, threshold
        self.save(x)
        xp = namespace(x)
        z = beta * x
        y = (xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))) / beta
        return xp.where(z > threshold, x, y)

    def backward(self, dy: Array) -> tuple[Array]:
        (x,) = self.saved
        z = self.beta * x
        return (namespace(x).where(z > self.threshold, dy, dy * logistic(z)),)


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return Tanh.apply(to_float(input))


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    return Sigmoid.apply(to_float(input))


def relu(input: Tensor) -> Tensor:
    """max(x, 0)"""
    return ReLU.apply(input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x, or negative_slope * x below 0"""
    return LeakyReLU.apply(to_float(input), slope=float(negative_slope))


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x) (Hendrycks & Gimpel 2016); approximate="tanh" is GPT-2's form of it."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")
    return (GELU if approximate == "none" else TanhGELU).apply(to_float(input))


def silu(input: Tensor) -> Tensor:
    """x σ(x), also called swish"""
    return SiLU.apply(to_float(input))


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta: a smooth relu. Where beta * x exceeds the threshold it is x itself."""
    return Softplus.apply(to_float(input), beta=float(beta), threshold=threshold)
