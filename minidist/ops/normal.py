"""The standard normal distribution, whose distribution function NumPy lacks:

    Φ(x) = (1 + erf(x / √2)) / 2,   and its derivative, the density φ(x) = exp(-x²/2) / √2π.   GELU needs both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..backend import Array, namespace, on_gpu
from .pieces import scratch

# float32: Φ(x) = (1 + tanh(x P(x²))) / 2. P was fitted by reweighted least squares to atanh(2 Φ(x) - 1) / x on
# 0 < x < 5.5, so that the largest error of x Φ(x) is least: 7e-8, before rounding. Beyond, P grows, and Φ with it is 1.
# Highest power first, here and below.
P = (
    1.8139262362e-9, -1.3378315343e-7, 3.9740700326e-6, -5.5273381489e-5, -3.3026718551e-5, 0.036334149140,
    0.79788426840,
)  # fmt: skip

# float64, Cody 1969: erf(z) = z * A(z²) / B(z²) below 15/32, and 1 - exp(-z²) * C(z) / D(z) above.
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

LOG_ROOT = math.log(2 * math.pi) / 2  # φ(x) = exp(-x²/2 - LOG_ROOT)
FAR = 64.0  # from x² = 64 on, Φ and φ are 0 or 1 in float32

# P(s) = low(s) + s³ high(s), and log φ, as combinations of (FAR, s, s², s³).
_LOW_HIGH = np.array([(P[6] / FAR, P[5], P[4], 0), (P[3] / FAR, P[2], P[1], P[0])], np.float32)
_LOG_PHI = np.array([-LOG_ROOT / FAR, -1 / 2], np.float32)


def scratch_for(x: Array) -> Array:
    """The memory that `normal` needs for arrays x (n) or shorter."""
    rows = scratch(x, 7)
    rows[0] = FAR
    return rows


def normal(x: Array, scratch: Array, density: bool = True) -> tuple[Array, Array | None]:
    """Φ(x) and, if asked for, φ(x).   x (n) of float32 or float64; the results may lie in the scratch"""
    xp = namespace(x)
    if x.dtype == np.float32 and not on_gpu(x):
        return _normal_by_product(x, scratch, density)
    phi = xp.exp(-0.5 * x * x - LOG_ROOT) if density else None
    if x.dtype == np.float32:
        return 0.5 + 0.5 * xp.tanh(x * _polynomial(P, xp.minimum(x * x, FAR))), phi
    z = xp.minimum(xp.abs(x) * math.sqrt(0.5), 27)  # Φ(-27 √2) is 0 in float64
    near = 1 - z * _polynomial(A, z * z) / _polynomial(B, z * z)
    far = xp.exp(-z * z) * _polynomial(C, z) / _polynomial(D, z)
    below = 0.5 * xp.where(z < 15 / 32, near, far)  # Φ(-|x|)
    return xp.where(x < 0, below, 1 - below), phi


def _normal_by_product(x: Array, scratch: Array, density: bool) -> tuple[Array, Array | None]:
    """The same in float32 on CPU. There Horner's rule costs two passes for each power of P; a matrix product does most
    of them in one.
    """
    powers, low_high, phi = scratch[:4], scratch[4:6], scratch[6]
    far, s, s2, s3 = powers
    np.multiply(x, x, out=s)
    np.minimum(s, far, out=s)
    np.multiply(s, s, out=s2)
    np.multiply(s2, s, out=s3)
    low, cdf = np.matmul(_LOW_HIGH, powers, out=low_high)
    cdf *= s3
    cdf += low
    cdf *= x
    np.tanh(cdf, out=cdf)
    cdf *= 0.5
    cdf += 0.5
    return cdf, np.exp(np.matmul(_LOG_PHI, powers[:2], out=phi), out=phi) if density else None


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Horner's rule, in one array: ((c0 x + c1) x + c2) x + …"""
    first, *rest = coefficients
    y = first * x
    for c in rest[:-1]:
        y += c
        y *= x
    y += rest[-1]
    return y
