"""Activation functions, element by element. Integers become float32 first, except in relu."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import to_float, wide
from .normal import normal
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

    A subclass gives the steps. They are done in pieces that stay in the cache, in memory that is there already.
    """

    def forward(self, x: Array) -> Array:
        dtype, x, xp = x.dtype, wide(x), namespace(x)
        # What runs down the columns (see Linear) is gone through in that order, and so is what comes of it.
        self.turned = x.flags.f_contiguous and not x.flags.c_contiguous
        x = x.T if self.turned else x
        y = xp.empty(x.shape, x.dtype)
        slope = xp.empty(x.shape, x.dtype) if self.recording else y
        a = b = None
        with np.errstate(over="ignore"):  # where something overflows, what is made of it is right: tanh(inf), 1 / inf
            for x_piece, y_piece, slope_piece in pieces(x, y, slope):
                if a is None or a.size != x_piece.size:
                    a, b = scratch(x_piece), scratch(x_piece)
                self.steps(x_piece, y_piece, slope_piece if self.recording else None, a, b)
        self.save(slope.astype(dtype, copy=False))
        return (y.T if self.turned else y).astype(dtype, copy=False)

    def backward(self, dy: Array) -> tuple[Array]:
        (slope,) = self.saved
        return (dy * (slope.T if self.turned else slope),)

    @abstractmethod
    def steps(self, x: Array, y: Array, slope: Array | None, a: Array, b: Array) -> None:
        """Write f(x) into y and, unless it is None, f'(x) into slope. a and b are scratch; all are flat."""


class GELU(Smooth):
    """y = x Φ(x), where Φ is the distribution function of the standard normal.

    dx = dy * (Φ(x) + x φ(x)), where φ is its density
    """

    def steps(self, x: Array, y: Array, slope: Array | None, a: Array, b: Array) -> None:
        xp = namespace(x)
        normal(x, cdf=a, density=b, with_density=slope is not None)
        xp.multiply(x, a, out=y)
        if slope is not None:
            b *= x
            xp.add(b, a, out=slope)


class TanhGELU(Smooth):
    """y = x s, where s = (1 + tanh(k x (1 + c x²))) / 2, k = √(2/π), c = 0.044715: close to GELU, in fewer steps.

    dx = dy * (s + (1 - s) q), where q = x s (2 k + 6 k c x²)
    """

    k, c = math.sqrt(2 / math.pi), 0.044715

    def steps(self, x: Array, y: Array, slope: Array | None, a: Array, b: Array) -> None:
        xp = namespace(x)
        square = xp.multiply(x, x, out=b)
        s = xp.multiply(square, self.k * self.c, out=a)
        s += self.k
        s *= x
        xp.tanh(s, out=s)
        s *= 0.5
        s += 0.5
        xp.multiply(x, s, out=y)
        if slope is not None:  # s + (1 - s) q = 1 - (1 - s) (1 - q)
            q = xp.multiply(square, -6 * self.k * self.c, out=b)
            q -= 2 * self.k
            q *= y
            q += 1
            xp.subtract(1, s, out=s)
            q *= s
            xp.subtract(1, q, out=slope)


class SiLU(Smooth):
    """y = x σ(x), σ(x) = 1 / (1 + exp(-x)).   dx = dy * (σ(x) + y (1 - σ(x)))"""

    def steps(self, x: Array, y: Array, slope: Array | None, a: Array, b: Array) -> None:
        xp = namespace(x)
        s = xp.negative(x, out=a)
        xp.exp(s, out=s)
        s += 1
        xp.reciprocal(s, out=s)
        xp.multiply(x, s, out=y)
        if slope is not None:
            xp.subtract(1, s, out=b)
            b *= y
            xp.add(b, s, out=slope)


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
