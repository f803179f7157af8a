"""The error function, which NumPy lacks:  erf(x) = 2/√π ∫₀ˣ exp(-t²) dt.  GELU needs it.

float64 takes the rational approximations of Cody 1969 (error below 5e-16), float32 and float16 a shorter formula of
our own (error below 3e-7). Both are made of whole-array steps, so on CPU they run on pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import Array, namespace, on_gpu

PIECE = 16 * 1024  # elements

# float32: erf(x) = tanh(x * P(x²)). P was fitted by reweighted least squares to atanh(erf(x)) / x on 0 < x < 4.05;
# at 4.5 the formula gives 1, as erf does in float32 from 4 on. Highest power first, here and below.
P = (
    1.4189925825e-7, -5.6691171157e-6, 8.7640361912e-5, -6.1979073576e-4, -1.9182577625e-4, 0.10276905437,
    1.12837927438,
)  # fmt: skip

# float64, Cody 1969: erf(x) = x * A(x²) / B(x²) below 15/32, and 1 - exp(-x²) * C(x) / D(x) above.
A = (0.185777706184603153, 3.16112374387056560, 113.864154151050156, 377.485237685302021, 3209.37758913846947)
B = (1.0, 23.6012909523441209, 244.024637934444173, 1282.61652607737228, 2844.23683343917062)
C = (
    2.15311535474403846e-8, 0.564188496988670089, 8.88314979438837594, 66.1191906371416295, 298.635138197400131,
    881.952221241769090, 1712.04761263407058, 2051.07837782607147, 1230.33935479799725,
)  # fmt: skip
D = (
    1.0, 15.7449261107098347, 117.693950891312499, 537.181101862009858, 1621.38957456669019,
    3290.79923573345963, 4362.61909014324716, 3439.36767414372164, 1230.33935480374942,
)  # fmt: skip


def erf(x: Array) -> Array:
    """erf of every element of a float array, of either library; the dtype is kept."""
    formula = _erf_double if x.dtype == np.float64 else _erf_single
    if on_gpu(x) or x.size <= PIECE:
        return formula(x).astype(x.dtype)
    flat = x.reshape(-1)
    result = np.empty_like(flat)
    for start in range(0, x.size, PIECE):
        result[start : start + PIECE] = formula(flat[start : start + PIECE])
    return result.reshape(x.shape)


def _erf_single(x: Array) -> Array:
    xp = namespace(x)
    x = xp.clip(x.astype(np.float32), -4.5, 4.5)
    return xp.tanh(x * _polynomial(P, x * x))


def _erf_double(x: Array) -> Array:
    xp = namespace(x)
    size = xp.minimum(xp.abs(x), 6)  # erf(6) is 1 in float64
    square = size * size
    near = size * _polynomial(A, square) / _polynomial(B, square)
    far = 1 - xp.exp(-square) * _polynomial(C, size) / _polynomial(D, size)
    return xp.copysign(xp.where(size < 15 / 32, near, far), x)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Horner's rule, in one array: ((c0 x + c1) x + c2) x + …"""
    first, *rest = coefficients
    y = first * x
    for c in rest[:-1]:
        y += c
        y *= x
    y += rest[-1]
    return y
