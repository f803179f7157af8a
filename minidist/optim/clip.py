"""Gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..backend import Array, namespace
from ..ops.common import wide
from ..tensor import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients, in place, so that the norm of all together is at most max_norm; returns the norm before.

    norm_type  2 for the Euclidean norm, math.inf for the largest element, any other p for the p-norm
    Errors     RuntimeError: the norm is infinite or nan, and error_if_nonfinite
    Source     Pascanu et al. 2013, algorithm 1
    """
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad.data for p in listed if p.grad is not None]
    if not gradients:
        return Tensor(np.zeros((), np.float32))
    flats = [getattr(p, "_flat", None) for p in listed if p.grad is not None]
    scales = [1.0 if flat is None else flat.grad_scale for flat in flats]
    return clip_arrays(gradients, max_norm, norm_type, error_if_nonfinite, scales=scales)


def clip_arrays(
    gradients: list[Array],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    combine: Callable[[Array], Array] = lambda mine: mine,
    uncounted: Sequence[Array] = (),
    scales: Sequence[float] = (),
) -> Tensor:
    """As clip_grad_norm_, of one array or more.

    `combine` is given this rank's Σ |g|^p (or, for math.inf, max |g|), as an array of one number, and gives that of all
    ranks, where each has a part of the gradients. `uncounted` are scaled as the others, and counted on another rank.
    `scales`, if given: how many times too large each array is (FlatBuffer.grad_scale), and stays.
    """
    xp = namespace(gradients[0])

    def size(g: Array, scale: float) -> Array:
        return xp.abs(wide(g) if scale == 1 else wide(g) / scale)

    scaled = list(zip(gradients, scales or [1.0] * len(gradients), strict=True))
    if norm_type == math.inf:
        norm = combine(xp.stack([size(*g).max() for g in scaled]).max(keepdims=True))[0]
    else:
        total = combine(xp.stack([(size(*g) ** norm_type).sum() for g in scaled]).sum(keepdims=True))[0]
        norm = total ** (1 / norm_type)
    if error_if_nonfinite and not bool(xp.isfinite(norm)):
        raise RuntimeError(f"the norm of the gradients is {float(norm)}: they can't be clipped")
    factor = xp.minimum(max_norm / (norm + 1e-6), 1).astype(norm.dtype)
    for g in (*gradients, *uncounted):
        g *= factor
    return Tensor(norm)
