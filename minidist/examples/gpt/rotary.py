"""Rotary positions: queries and keys are turned by angles that grow with their place, so scores depend on distances.

Source  Su et al. 2021, RoFormer, section 3.4; in the layout of GPT-NeoX and Llama, dim i turned with dim i + E/2
"""

from __future__ import annotations

import numpy as np

from minidist import Function, Tensor, backend
from minidist.backend import Array

BASE = 10_000.0


def turned(x: Array, cos: Array, sin: Array) -> Array:
    """Each pair of numbers i and i + E/2 turned by its angle.   x (..., T, E), cos and sin (T, E/2)"""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    y = backend.namespace(x).empty(x.shape, x.dtype)
    y[..., :half] = first * cos - second * sin
    y[..., half:] = second * cos + first * sin
    return y


class Rotary(Function):
    """y = x turned.   dx = dy turned back"""

    def forward(self, x: Array, cos: Array, sin: Array) -> Array:
        self.angles = cos, -sin
        return turned(x, cos, sin)

    def backward(self, dy: Array) -> tuple[Array]:
        return (turned(dy, *self.angles),)


class RotaryPositions:
    """Turns queries or keys by where they stand: x (..., T, E) and positions (T) -> as x.

    Pair i of position t is turned by t / 10000**(2 i / E) radians.

    Errors  ValueError: an odd E
    """

    def __init__(self, dim: int):
        if dim % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: heads of {dim} have an odd one")
        self.frequencies = BASE ** (-np.arange(0, dim, 2) / dim)

    def __call__(self, x: Tensor, positions: np.ndarray) -> Tensor:
        angles = np.outer(positions, self.frequencies)
        cos, sin = (backend.asarray(f(angles), x.dtype, x.device) for f in (np.cos, np.sin))
        return Rotary.apply(x, cos=cos, sin=sin)
