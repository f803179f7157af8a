"""Which forwards a backward goes through, and with how many samples: what gradients are weighted by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..tensor import Function, Tensor


class Counted(Function):
    """y, unchanged. Its backward says that the samples of this forward take part.

    Not every forward is followed by a backward (one that forgot no_grad, in an evaluation), so forward can't count.
    """

    is_view = True

    def forward(self, y: Array, tell: Callable[[], None]) -> Array:
        self.tell = tell
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        self.tell()
        return (dy,)


def counted(y: Any, tell: Callable[[], None]) -> Any:
    """`y` with each tensor in it counted: a tensor, or a tuple, list or dict of such."""
    if isinstance(y, Tensor):
        return Counted.apply(y, tell=tell)
    if isinstance(y, tuple | list):
        return type(y)([counted(value, tell) for value in y])
    if isinstance(y, dict):
        return {name: counted(value, tell) for name, value in y.items()}
    return y


def tensors_in(y: Any) -> list[Tensor]:
    """All tensors of such a structure."""
    if isinstance(y, Tensor):
        return [y]
    values = y if isinstance(y, tuple | list) else y.values() if isinstance(y, dict) else ()
    return [tensor for value in values for tensor in tensors_in(value)]
