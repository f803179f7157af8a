"""Rotary positions: queries and keys are turned by angles that grow with their place, so scores depend on distances.

Source  Su et al. 2021, RoFormer, section 3.4; in the layout of GPT-NeoX and Llama, dim i turned with dim i + E/2
"""

from __future__ import annotations

import numpy as np

from minidist import Function, Tensor, backend
from minidist.backend import Array, namespace

BASE = 10_000.0


def turned(qkv: Array, heads: int, cos: Array, sin: Array) -> Array:
    """With queries and keys turned, each pair of numbers i and i + E/2 of a head.   qkv (B, T, 3C), cos (T, E/2)"""
    y = namespace(qkv).array(qkv, order="C")
    pairs = y.reshape(*qkv.shape[:2], 3, heads, 2, -1)[:, :, :2]  # a view (B, T, 2, heads, 2, E/2)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned_first = first * cos - second * sin
    second *= cos
    second += first * sin
    first[...] = turned_first
    return y


class Rotary(Function):
    """y = qkv, its queries and keys turned.   dx = dy, turned back"""

    def forward(self, qkv: Array, heads: int, cos: Array, sin: Array) -> Array:
        self.back = heads, cos, -sin
        return turned(qkv, heads, cos, sin)

    def backward(self, dy: Array) -> tuple[Array]:
        return (turned(dy, *self.back),)


def rotary(qkv: Tensor, heads: int, positions: np.ndarray) -> Tensor:
    """Turn queries and keys by where they stand: pair i at position t by t / 10000**(2 i / E) radians.

    Shapes  qkv (B, T, 3C), queries, keys and values of all heads; positions (T) -> as qkv
    Errors  ValueError: heads of an odd E
    """
    dim = qkv.shape[2] // (3 * heads)
    if dim % 2:
        raise ValueError(f"rotary positions turn pairs of numbers: heads of {dim} have an odd one")
    angles = np.outer(positions, BASE ** (-np.arange(0, dim, 2) / dim))
    cos, sin = (backend.asarray(f(angles), qkv.dtype, qkv.device) for f in (np.cos, np.sin))
    return Rotary.apply(qkv, heads=heads, cos=cos, sin=sin)
