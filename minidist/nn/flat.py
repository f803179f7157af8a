"""Flat buffers: all parameters of one dtype end to end in one array, and their gradients in another.

Communication, the optimizer, sharding and checkpoints then work on whole arrays, without copies:

    data   |---- weight ----|-- bias --|------ weight ------|-- bias --|      flat.data   (n,)
    grad   |---- weight ----|-- bias --|------ weight ------|-- bias --|      flat.grad   (n,)

Each parameter's `data` is a view into the first, and backward writes its gradient into its view of the second, which
is made when the first gradient comes. Either may be let go of and come back: that is how sharding saves memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import numpy as np

from .. import backend
from ..backend import Array
from ..tensor import Tensor
from .module import Parameter


class FlatBuffer:
    """The parameters given, moved into one array.

    data, grad           (n,) arrays of the parameters' dtype, on their device
    bounds               (start, stop) of each parameter within them, in the order given
    size, dtype, device  of the arrays, whether they are there or not
    has_grad             for each parameter, whether it has a gradient that is kept elsewhere (sharded); else None
    grad_scale           so many times too large the gradients are at the moment (optim.GradScaler)
    """

    def __init__(self, parameters: list[Parameter], data: Array = None):
        """`data`: an array where the parameters lie already, end to end."""
        self.parameters = parameters
        sizes = [p.data.size for p in parameters]
        stops = np.cumsum([0, *sizes]).tolist()
        self.bounds: list[tuple[int, int]] = list(pairwise(stops))
        self.size, self.dtype, self.device = stops[-1], parameters[0].dtype, parameters[0].device
        self.data: Array = data
        self.views: list[Array] = []  # what each parameter's data was made
        self.has_grad: list[bool] | None = None
        self.grad_scale = 1.0
        self._index = {p: i for i, p in enumerate(parameters)}
        self._grad: Array = None
        self._grad_views: list[Array] = []
        values = [p.data for p in parameters]
        self.claim_data(data)
        for i, p in enumerate(parameters):
            if data is None:
                self.views[i][...] = values[i]
                values[i] = None  # so that large models are not held twice
            p._grad_room = partial(self.room, i)
            if p.grad is not None:
                p.grad.data, given = p._grad_room(), p.grad.data
                p.grad.data[...] = given
            p._flat = self

    def split(self, stops: list[int]) -> list[FlatBuffer]:
        """Cut after so many parameters each time: buffers of fewer parameters, over the same memory."""
        parts = []
        for first, last in pairwise([0, *stops]):
            start, stop = self.bounds[first][0], self.bounds[last - 1][1]
            parts.append(FlatBuffer(self.parameters[first:last], self.data[start:stop]))
        return parts

    # -- the parameters -----------------------------------------------------------------------------------------

    def claim_data(self, data: Array = None) -> Array:
        """Let the parameters lie in `data`, or in a new array whose content is undefined; returns it."""
        self.data = backend.empty((self.size,), self.dtype, self.device) if data is None else data
        self.views = []
        for p, (start, stop) in zip(self.parameters, self.bounds, strict=True):
            p.data = self.data[start:stop].reshape(p.shape)
            self.views.append(p.data)
        return self.data

    def release_data(self) -> None:
        """Let go of the array; it is freed as soon as nothing else uses it. The parameters keep their shapes only."""
        self.data, self.views = None, []
        for p in self.parameters:
            p.data = backend.absent(p.shape, self.dtype, self.device)
            self.views.append(p.data)

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

    def changed(self) -> None:
        """Note that `data` was changed in place, so that a graph that saved it notices."""
        for p in self.parameters:
            p._version[0] += 1

    # -- their gradients ----------------------------------------------------------------------------------------

    @property
    def grad(self) -> Array:
        if self._grad is None:
            self._grad = backend.empty((self.size,), self.dtype, self.device)
            self._grad_views = [
                self._grad[start:stop].reshape(p.shape)
                for p, (start, stop) in zip(self.parameters, self.bounds, strict=True)
            ]
            for p, view in zip(self.parameters, self._grad_views, strict=True):
                if p.grad is None:
                    view.fill(0)
        return self._grad

    def room(self, i: int) -> Array:
        """Where parameter i's gradient is kept."""
        if self._grad is None:
            _ = self.grad
        return self._grad_views[i]

    @property
    def has_gradients(self) -> bool:
        """Whether the array of gradients is there."""
        return self._grad is not None

    def release_grad(self) -> None:
        """Forget the gradients, and let go of their array."""
        self._grad, self._grad_views = None, []
        for p in self.parameters:
            p.grad = None

    def gradients(self) -> list[bool]:
        """For each parameter, whether it has a gradient."""
        return [p.grad is not None for p in self.parameters] if self.has_grad is None else self.has_grad

    def forget(self, p: Parameter) -> None:
        """A parameter's gradient is of no more use, wherever it is kept."""
        if self.has_grad is not None:
            self.has_grad[self._index[p]] = False

    def collect(self) -> None:
        """Take in the gradients that were set by hand (p.grad = …), so that `grad` has them too."""
        for i, p in enumerate(self.parameters):
            if p.grad is not None and p.grad.data is not (room := self.room(i)):
                room[...] = p.grad.data
                p.grad = Tensor(room)

    def gradient(self) -> Array:
        """`grad`, with zeros for the parameters that got no gradient."""
        self.collect()
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                self.room(i).fill(0)
        return self.grad


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
