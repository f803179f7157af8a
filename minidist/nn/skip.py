"""Skip connections between layers that are far apart in a Sequential: put aside here, taken up there.

    model = Sequential(Linear(8, 8), Stash("early"), ReLU(), Linear(8, 8), Pop("early"))      # x + f(x)

Written so, a pipeline may cut the model anywhere between: what was put aside is sent to the stage that takes it up.

Source  Kim et al. 2020, torchgpipe, section 3.3 (skippable layers)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..ops import add
from ..tensor import Tensor
from .module import Module

# What is put aside at the moment: of each simulated rank, as of each process.
_aside: ContextVar[dict[str, Tensor] | None] = ContextVar("aside", default=None)


def _shelf() -> dict[str, Tensor]:
    shelf = _aside.get()
    if shelf is None:
        shelf = {}
        _aside.set(shelf)
    return shelf


@contextmanager
def put_aside(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """In here these are put aside, and nothing else; at the end the dict has what is left, and was put there since."""
    token = _aside.set(tensors)
    try:
        yield tensors
    finally:
        _aside.reset(token)


class Stash(Module):
    """y = x, and x is put aside for the Pop of the same name."""

    def __init__(self, name: str):
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        _shelf()[self.name] = x  # in the place of what a forward that failed has left
        return x

    def extra_repr(self) -> str:
        return repr(self.name)


class Pop(Module):
    """y = join(x, what was put aside under this name); their sum, if no other `join` is given."""

    def __init__(self, name: str, join: Callable[[Tensor, Tensor], Tensor] = add):
        self.name, self.join = name, join

    def forward(self, x: Tensor) -> Tensor:
        shelf = _shelf()
        if self.name not in shelf:
            raise RuntimeError(f"Pop({self.name!r}): no Stash before it has put anything aside under this name")
        return self.join(x, shelf.pop(self.name))

    def extra_repr(self) -> str:
        return repr(self.name)
