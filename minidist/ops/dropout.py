"""Dropout: zero a random part of the elements in training, so that no unit can rely on another one."""

from __future__ import annotations

from .. import backend
from ..backend import Array, Shape
from ..tensor import Function, Tensor


class Dropout(Function):
    """y = x * mask.   dx = dy * mask.   The mask holds 0 with probability p, else 1 / (1 - p)"""

    def forward(self, x: Array, mask: Array) -> Array:
        self.save(mask)
        return x * mask

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy * self.saved[0],)


def _check(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: the probability p must lie between 0 and 1, not {p}")


def dropout_mask(x: Array, p: float, shape: Shape, generator: backend.Generator | None = None) -> Array:
    """A mask of a given shape, of x's dtype and on its device: 0 with probability p, else 1 / (1 - p).

    The random numbers are drawn on the host (one seed, one result on every device); a GPU is sent a byte for each.
    """
    _check(p)
    keep = (generator or backend.default_generator()).uniform(0, 1, shape) >= p
    mask = backend.to(keep, backend.device_of(x)).astype(x.dtype)
    mask *= 1 / (1 - p) if p < 1 else 0
    return mask


def dropout(input: Tensor, p: float = 0.5, training: bool = True, generator: backend.Generator | None = None) -> Tensor:
    """Zero each element with probability p and divide the others by 1 - p, which keeps the expected sum.

    In evaluation (training=False) the result is the input itself.

    generator   where the mask is drawn from; this rank's default one (`manual_seed`) if not given
    Errors      ValueError: p outside [0, 1]
    Source      Srivastava et al. 2014
    """
    _check(p)
    if not training or p == 0:
        return input
    return Dropout.apply(input, mask=dropout_mask(input.data, p, input.shape, generator))
