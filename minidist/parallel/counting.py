"""Which forwards a backward goes through, and with how many samples: what gradients are weighted by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..backend import Array
from ..tensor import Function, Tensor

Start = Callable[[Iterable[Tensor]], None]  # what is called when all have told, with the leaves that will be reached


class Counted(Function):
    """y, unchanged. When a backward begins that goes through it, it says that the samples of this forward take part.

    Not every forward is followed by a backward (one that forgot no_grad, in an evaluation), so forward can't count.
    """

    is_view = True

    def forward(self, y: Array, tell: Callable[[], Start]) -> Array:
        self.announce = tell
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy,)


def counted(y: Any, tell: Callable[[], Start]) -> Any:
    """`y` with each tensor in it counted: a tensor, or a tuple, list or dict of such."""
    if isinstance(y, Tensor):
        return Counted.apply(y, tell=tell)
    if isinstance(y, tuple | list):
        values = [counted(value, tell) for value in y]
        return type(y)(*values) if hasattr(y, "_fields") else type(y)(values)  # named tuples take them one by one
    if isinstance(y, dict):
        return {name: counted(value, tell) for name, value in y.items()}
    return y
