"""What a server keeps of one key: the values, how often they were updated, and where each worker is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ... import backend
from ...backend import Array
from ...optim import Optimizer
from ...optim.optimizer import Part
from .keys import Key
from .messages import Message
from .post import Sending

# Change the values, in place, by a gradient; the learning rate, if there is one, is to be scaled by the last argument.
Update = Callable[[Array, Array, float], None]


class Store:
    """One key on one server.

    data     (n,) the values
    version  how many updates they have had
    clock    how many rounds are closed (synchronous)
    clocks   of each worker, how many pushes it has made; a worker that is not in it may not push
    seen     of each worker, the number of its last push that is in the values
    open     of each worker, what it has pushed in the open round: number, weight, gradient
    waiting  pulls that can't be answered yet
    """

    def __init__(self, key: Key, data: Array, update: Update):
        self.key, self.data, self.update = key, data, update
        self.version = self.clock = 0
        self.clocks: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.open: dict[int, tuple[int, float, Array]] = {}
        self.early: list[tuple[int, Message, Array]] = []  # pushes of later rounds
        self.total: Array = None  # of the open round: the sum of the gradients so far, times 1 / the first's weight
        self.added: list[int] = []  # whose are in it
        self.waiting: list[tuple[int, Message, Any]] = []
        self.pulled: dict[int, Array] = {}  # of each worker, the values that it pulled last; where that is asked for
        self._lent: list[Sending] = []  # messages that read `data` on their way
        self._old: list[tuple[Array, list[Sending]]] = []  # values that were replaced while messages still read them
        self._spare: list[Array] = []

    def lend(self, sending: Sending | None) -> None:
        """A message reads the values on its way out."""
        if sending is not None:
            self._lent.append(sending)

    def apply(self, gradient: Array, scale: float) -> None:
        """Update the values; where a message still reads them, a copy of them."""
        if self._lent:
            self._make_ours()
        self.update(self.data, gradient, scale)
        self.version += 1

    def _make_ours(self) -> None:
        """Nobody is to read the values while they change: who still does goes on with the old ones."""
        if not all(sending.done() for sending in self._lent):
            copy = self.spare()
            copy[...] = self.data
            self._old.append((self.data, self._lent))
            self.data = copy
        self._lent = []
        still = []
        for data, readers in self._old:
            if all(sending.done() for sending in readers):
                self.give_back(data)
            else:
                still.append((data, readers))
        self._old = still

    def spare(self) -> Array:
        """An array like the values, of undefined content, for a gradient that arrives."""
        return (
            self._spare.pop()
            if self._spare
            else backend.empty((self.key.size,), self.key.dtype, backend.device_of(self.data))
        )

    def give_back(self, array: Array) -> None:
        """An array is of no more use: if it came from `spare`, it may come from there again."""
        if array.base is None and array.size == self.key.size:
            self._spare.append(array)

    def zeros(self) -> Array:
        array = self.spare()
        array.fill(0)
        return array


class OptimizerUpdate:
    """An optimizer of ours, working on one key: a part of a flat buffer, with its own state.

    It steps whether a parameter got a gradient or not: a worker that has none sends zeros.
    """

    def __init__(self, optimizer: Optimizer, part: Part, start: int, stop: int):
        self.optimizer = optimizer
        self.part = type(part)(dict(part.group), part.flat)
        self.part.shard(start, stop)
        part.flat.has_grad = [True] * len(part.flat.parameters)
        self._data: Array = None
        self._gradient: Array = None

    def __call__(self, data: Array, gradient: Array, scale: float) -> None:
        part = self.part
        if data is not self._data or gradient is not self._gradient:
            part.put(data)
            part.own_grad = gradient
            self._data, self._gradient = data, gradient
        if scale == 1:
            self.optimizer.update_part(part)
            return
        lr = part.group["lr"]
        part.group["lr"] = lr * scale
        try:
            self.optimizer.update_part(part)
        finally:
            part.group["lr"] = lr


def add(data: Array, gradient: Array, scale: float) -> None:
    """The simplest update: what is pushed is added."""
    if scale != 1:
        gradient = gradient * np.asarray(scale, gradient.dtype)
    data += gradient
