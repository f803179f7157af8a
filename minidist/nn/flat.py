"""Flat buffers: all parameters of one dtype end to end in one array, and their gradients in another.

Communication, the optimizer, sharding and checkpoints then work on whole arrays, without copies:

    data   |---- weight ----|-- bias --|------ weight ------|-- bias --|      flat.data   (n,)
    grad   |---- weight ----|-- bias --|------ weight ------|-- bias --|      flat.grad   (n,)

Each parameter's `data` is a view into the first, and backward writes its gradient into its view of the second.
"""

from __future__ import annotations

from collections.abc import Iterable

from .. import backend
from ..tensor import Tensor
from .module import Parameter


class FlatBuffer:
    """The parameters given, moved into one array.

    data, grad  (n,) arrays of the parameters' dtype, on their device
    bounds      (start, stop) of each parameter within them, in the order given
    """

    def __init__(self, parameters: list[Parameter]):
        self.parameters = parameters
        self.bounds: list[tuple[int, int]] = []
        self.views: list[backend.Array] = []  # what each parameter's data was made
        n = 0
        for p in parameters:
            self.bounds.append((n, n + p.data.size))
            n += p.data.size
        dtype, device = parameters[0].dtype, parameters[0].device
        self.data = backend.empty((n,), dtype, device)
        self.grad = backend.full((n,), 0, dtype, device)
        for p, (start, stop) in zip(parameters, self.bounds, strict=True):
            view = self.data[start:stop].reshape(p.shape)
            view[...] = p.data
            p.data = view
            self.views.append(view)
            p._grad_buffer = self.grad[start:stop].reshape(p.shape)
            if p.grad is not None:
                p._grad_buffer[...] = p.grad.data
                p.grad.data = p._grad_buffer
            p._flat = self

    @property
    def size(self) -> int:
        return self.data.size

    def holds(self) -> bool:
        """Whether every parameter still lies here."""
        return all(p._flat is self and p.data is view for p, view in zip(self.parameters, self.views, strict=True))

    def check(self) -> None:
        """Raise if a parameter lies elsewhere by now: in another buffer, or in an array put in its place."""
        if self.holds():
            return
        if any(p._flat is not self for p in self.parameters):
            raise RuntimeError(
                "a parameter was laid out anew since, with other parameters beside it: give all that one model "
                "trains to one optimizer, or to several that share none"
            )
        raise RuntimeError(
            "a parameter's data was replaced by another array, which its optimizer does not see: change it in place "
            "(with md.no_grad(): p.copy_(values))"
        )

    def collect(self) -> None:
        """Take in the gradients that were set by hand (p.grad = …), so that `grad` has them too."""
        for p in self.parameters:
            if p.grad is not None and p.grad.data is not p._grad_buffer:
                p._grad_buffer[...] = p.grad.data
                p.grad = Tensor(p._grad_buffer)

    def gradient(self) -> backend.Array:
        """`grad`, with zeros for the parameters that got no gradient."""
        self.collect()
        for p in self.parameters:
            if p.grad is None:
                p._grad_buffer.fill(0)
        return self.grad

    def changed(self) -> None:
        """Note that `data` was changed in place, so that a graph that saved it notices."""
        for p in self.parameters:
            p._version[0] += 1


def flatten(parameters: Iterable[Parameter]) -> list[FlatBuffer]:
    """Lay parameters into flat buffers, one for each dtype; those that lie so already stay where they are."""
    by_kind: dict[tuple[object, str], list[Parameter]] = {}
    for p in dict.fromkeys(parameters):  # a tied parameter once
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    flats = []
    for group in by_kind.values():
        known = group[0]._flat
        # By identity: == of tensors is elementwise.
        same = known is not None and list(map(id, known.parameters)) == list(map(id, group)) and known.holds()
        flats.append(known if known is not None and same else FlatBuffer(group))
    return flats
