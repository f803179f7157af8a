"""The standard normal distribution, which GELU needs and NumPy lacks.

Its distribution function is Φ(x) = (1 + erf(x / √2)) / 2, its density φ(x) = Φ'(x) = exp(-x²/2) / √2π.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..backend import Array, namespace

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


def normal(x: Array, cdf: Array, density: Array, with_density: bool = True) -> None:
    """Write Φ(x) into cdf and φ(x) into density, which is scratch if not wanted.   All float32 or all float64"""
    xp = namespace(x)
    square = xp.multiply(x, x, out=density)
    if x.dtype != np.float32:
        cdf[...] = _cdf_double(x)
    else:
        polynomial(P, square, out=cdf)
        cdf *= x
        xp.tanh(cdf, out=cdf)
        cdf *= 0.5
        cdf += 0.5
    if with_density:
        square *= -0.5
        xp.exp(square, out=density)
        density *= 1 / math.sqrt(2 * math.pi)


def _cdf_double(x: Array) -> Array:
    xp = namespace(x)
    z = xp.minimum(xp.abs(x) * math.sqrt(0.5), 27)  # Φ(-27 √2) is 0 in float64
    near = 1 - z * polynomial(A, z * z) / polynomial(B, z * z)
    far = xp.exp(-z * z) * polynomial(C, z) / polynomial(D, z)
    below = 0.5 * xp.where(z < 15 / 32, near, far)  # Φ(-|x|)
    return xp.where(x < 0, below, 1 - below)


def polynomial(coefficients: Sequence[float], x: Array, out: Array = None) -> Array:
    """Horner's rule, in one array: ((c0 x + c1) x + c2) x + …"""
    first, *rest = coefficients
    y = namespace(x).multiply(x, first, out=out)
    for c in rest[:-1]:
        y += c
        y *= x
    y += rest[-1]
    return y
