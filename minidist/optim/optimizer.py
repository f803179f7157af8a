"""What all optimizers share: flat buffers, groups, updates in cache-sized pieces, state.

An update reads and writes several arrays of the model's size, several times each. Done on whole arrays every pass goes
to main memory and back; done on pieces of PIECE elements the passes find them in the processor's cache. (Measured with
Adam on 814,090 float32 with 2 MiB of L2: whole arrays 1.85 ms, pieces of 48 Ki 1.10, of 32 Ki 1.16, of 4 Ki 1.6, where
calls cost most.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from ..nn.flat import FlatBuffer, flatten
from ..nn.module import Parameter
from ..tensor import Tensor, plain
from ..watcher import current_watchers

PIECE = 48 * 1024

Group = dict[str, Any]


def flush_subnormals(average: Array, decay: float, step: int, scratch: Array) -> None:
    """Now and then, set the smallest numbers of a decaying average to 0, before they become subnormal.

    Where no gradient comes any more an average shrinks by `decay` a step, and below 1.2e-38 (float32) processors
    calculate many times slower, for ever: numbers that small decay no further. On MNIST that are 4 % of Adam's first
    averages after six epochs, and without this its step takes 2.7 ms instead of 1.15 (PyTorch's: 2.0 instead of 0.7).
    Numbers below 1e8 times the smallest normal one change no parameter; the others need ln(1e8) / -ln(decay) steps to
    get there, and so often (175 steps for a decay of 0.9) they are swept out. Half precision, whose smallest normal
    number is 6e-5, is left alone.
    """
    if 0 < decay < 1 and average.dtype.itemsize > 2 and step % max(int(math.log(1e8) / -math.log(decay)), 1) == 0:
        xp = backend.namespace(average)
        xp.abs(average, out=scratch)
        xp.multiply(average, scratch > 1e8 * np.finfo(average.dtype).tiny, out=average)


Scratch = dict[tuple[Any, str], list[Array]]  # of each dtype and device, two arrays or three
Piece = tuple[Any, ...]  # parameters, gradients, state (a dict), and the scratch arrays


class Part:
    """The part of one flat buffer that this optimizer updates, and its state: all of it, unless it is sharded.

    start, stop  the part, as elements of the flat buffer
    data, grad   arrays of stop - start elements: the buffer's own, or others that were put in their place
    state        arrays of stop - start elements, by name; empty before the first step
    steps        for each of the buffer's parameters, how many updates it has had
    """

    num_scratch = 2  # arrays of scratch

    def __init__(self, group: Group, flat: FlatBuffer):
        self.group, self.flat = group, flat
        self.start, self.stop = 0, flat.size
        self.state: dict[str, Array] = {}
        self.steps = [0] * len(flat.parameters)
        self.scratch: list[Array] = []
        self.piece = PIECE
        self.views: dict[tuple[int, int], list[Piece]] = {}  # of each stretch, once `pieces` has made them
        self.own_data: Array = None
        self.own_grad: Array = None

    @property
    def data(self) -> Array:
        return self.flat.data[self.start : self.stop] if self.own_data is None else self.own_data

    @property
    def grad(self) -> Array:
        return self.flat.grad[self.start : self.stop] if self.own_grad is None else self.own_grad

    @property
    def dtype(self) -> Any:
        """That the update is calculated in, and of the state."""
        return self.flat.dtype

    def gradients(self) -> list[Array]:
        """Of the parameters that have a gradient this part's share of it, where they adjoin in one array. Views."""
        stretches: list[list[int]] = []
        for has, (start, stop) in zip(self.flat.gradients(), self.flat.bounds, strict=True):
            start, stop = max(start, self.start) - self.start, min(stop, self.stop) - self.start
            if has and start < stop:
                if stretches and stretches[-1][1] == start:
                    stretches[-1][1] = stop
                else:
                    stretches.append([start, stop])
        return [self.grad[start:stop] for start, stop in stretches]

    def put(self, data: Array) -> None:
        """Work on this array, of stop - start elements, in the place of the buffer's own."""
        self.own_data = data
        self.views.clear()

    def shard(self, start: int, stop: int) -> None:
        """Update, and keep state for, this part only. Before the first step."""
        if self.state:
            raise RuntimeError("an optimizer can be sharded before its first step only")
        self.start, self.stop = start, stop

    def split(self, stops: list[int]) -> list[Part]:
        """In the place of this part, one for each stretch of parameters that ends at one of `stops`, with its state."""
        parts = []
        for flat, (first, last) in zip(self.flat.split(stops), pairwise([0, *stops]), strict=True):
            part = type(self)(self.group, flat)
            start = self.flat.bounds[first][0]
            part.state = {name: array[start : start + flat.size] for name, array in self.state.items()}
            part.steps = self.steps[first:last]
            parts.append(part)
        return parts

    def allocate(self, names: tuple[str, ...], scratch: Scratch) -> None:
        """Make the state: zeros; and find room for the updates, which all parts of a dtype share."""
        if self.state.keys() != set(names) or not self.scratch:
            n, dtype, device = self.stop - self.start, self.dtype, self.flat.device
            if self.state.keys() != set(names):
                self.state = {name: backend.full((n,), 0, dtype, device) for name in names}
            # A GPU has no use for small pieces: there every call costs a kernel.
            self.piece = n if device != "cpu" else PIECE
            room = min(self.piece, n)
            known = scratch.setdefault((dtype, device), [])
            if len(known) < self.num_scratch or len(known[0]) < room:
                known[:] = [backend.empty((room,), dtype, device) for _ in range(self.num_scratch)]
            self.scratch = known[: self.num_scratch]
            self.views.clear()

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Views of the stretch start … stop, piece by piece. Made once: making them takes as long as a pass."""
        if (start, stop) not in self.views:
            data, grad = self.data, self.grad
            ends = [*range(start - self.start, stop - self.start, max(self.piece, 1)), stop - self.start]
            self.views[start, stop] = [
                (
                    data[a:b],
                    grad[a:b],
                    {name: array[a:b] for name, array in self.state.items()},
                    *(array[: b - a] for array in self.scratch),
                )
                for a, b in pairwise(ends)
            ]
        return self.views[start, stop]

    def updates(self, start: int, stop: int) -> Iterable[Piece]:
        """The pieces, each to be updated before the next is asked for."""
        return self.pieces(start, stop)

    def loaded(self) -> None:
        """The state was replaced by another one."""

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, step): stretches of parameters that have a gradient and are equally old; counts the step."""
        begin = end = step = 0
        has_grad = self.flat.gradients()
        for i, (p, (start, stop)) in enumerate(zip(self.flat.parameters, self.flat.bounds, strict=True)):
            if not has_grad[i]:
                continue
            self.steps[i] += 1
            p._version[0] += 1  # a graph that saved the parameter notices
            if start == end and self.steps[i] == step:
                end = stop
                continue
            yield max(begin, self.start), min(end, self.stop), step
            begin, end, step = start, stop, self.steps[i]
        yield max(begin, self.start), min(end, self.stop), step


class Optimizer(ABC):
    """Base of the optimizers. A subclass names its options and its state, and updates one piece.

    params  parameters, or groups of them with options of their own ({"params": [...], "lr": 0.1})
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Parameter] | Iterable[Group], defaults: Group):
        if isinstance(params, Tensor):
            raise TypeError("an optimizer takes a list of parameters, or of groups of them, not one tensor")
        listed = list(params)
        if not listed:
            raise ValueError("an optimizer needs parameters: the list is empty")
        groups: list[Any] = listed if isinstance(listed[0], dict) else [{"params": listed}]
        self.defaults = defaults
        self.param_groups: list[Group] = [{**defaults, **g, "params": list(g["params"])} for g in groups]
        every = [p for g in self.param_groups for p in g["params"]]
        for p in every:
            if not isinstance(p, Parameter):
                raise TypeError(f"an optimizer takes parameters, not {type(p).__name__}: make it a Parameter")
        if len(set(every)) < len(every):
            raise ValueError("a parameter stands twice in an optimizer's list")
        for group in self.param_groups:
            self.check(group)
        self._scratch: Scratch = {}
        self.parts = [Part(group, flat) for group in self.param_groups for flat in flatten(group["params"])]

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raise ValueError if an option is out of its range."""

    @abstractmethod
    def update(self, p: Array, g: Array, state: dict[str, Array], t: Array, u: Array, group: Group, step: int) -> None:
        """Update one piece in place: p and state from the gradient g, which stays as it is; t and u are scratch.

        All are 1-d, of one length and dtype. `step` counts from 1.
        """

    def names_of_state(self, group: Group) -> tuple[str, ...]:
        """The state arrays that the group's options call for."""
        return self.state_names

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. `closure`, if given, is called first and gives the loss."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            self.update_part(part)
        return loss

    def update_part(self, part: Part) -> None:
        """Do one of the parts of `step`."""
        watchers = current_watchers()
        for watcher in watchers:
            watcher.update_begins()
        part.flat.check()
        part.flat.collect()
        part.allocate(self.names_of_state(part.group), self._scratch)
        for start, stop, step in part.runs():
            for p, g, state, t, u in part.updates(start, stop) if start < stop else ():
                self.update(p, g, state, t, u, part.group, step)
        for watcher in watchers:
            watcher.update_ends()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: the next backward starts anew. They become None, or zeros with set_to_none=False."""
        for group in self.param_groups:
            for p in group["params"]:
                p.forget_grad(set_to_none)

    # -- state --------------------------------------------------------------------------------------------------

    def scale_of_state(self, name: str, group: Group) -> float:
        """What a state array is multiplied by to get PyTorch's."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's form: {"state": {i: {"step": k, name: array, …}}, "param_groups": [options, "params": [i, …]]}.

        Arrays that are scaled on their way out are given in float64, so that loading them restores every bit of a
        float32 state (and of a float64 one all but the last).

        Errors  RuntimeError: the optimizer is sharded, so that this rank has a part of the state only
        """
        self._check_whole("state_dict")
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        state: dict[int, dict[str, Any]] = {}
        for part in self.parts:
            for p, (start, stop), steps in zip(part.flat.parameters, part.flat.bounds, part.steps, strict=True):
                if not steps:
                    continue
                state[number[p]] = {"step": steps}
                for name, array in part.state.items():
                    scale = self.scale_of_state(name, part.group)
                    array = array[start:stop].reshape(p.shape)
                    state[number[p]][name] = array.copy() if scale == 1 else array.astype(np.float64) * scale
        groups = [{**g, "params": [number[p] for p in g["params"]]} for g in self.param_groups]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` (or PyTorch's) gave, of an optimizer of the same kind over the same parameters.

        Errors  ValueError: other groups or shapes; options of PyTorch's that are not implemented
        """
        self._check_whole("load_state_dict")
        sizes, mine = [len(g["params"]) for g in saved["param_groups"]], [len(g["params"]) for g in self.param_groups]
        if sizes != mine:
            raise ValueError(f"load_state_dict: groups of {sizes} parameters for an optimizer of {mine}")
        for group, other in zip(self.param_groups, saved["param_groups"], strict=True):
            if other.get("amsgrad") or other.get("maximize"):
                raise ValueError("load_state_dict: amsgrad and maximize are not implemented")
            group.update({name: value for name, value in other.items() if name != "params"})
            self.check(group)
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for part in self.parts:
            part.allocate(self.names_of_state(part.group), self._scratch)
            for i, (p, (start, stop)) in enumerate(zip(part.flat.parameters, part.flat.bounds, strict=True)):
                entry = saved["state"].get(number[p], {})
                present = {name: value for name, value in entry.items() if value is not None}
                part.steps[i] = int(present.get("step", bool(present)))  # PyTorch's SGD counts no steps
                for name, array in part.state.items():
                    value = plain(present[name]) if name in present else np.zeros(p.shape, array.dtype)
                    value = backend.to(value if backend.is_array(value) else np.asarray(value), p.device)
                    if value.shape != p.shape:
                        raise ValueError(f"load_state_dict: {name} of shape {value.shape} for a parameter {p.shape}")
                    scale = self.scale_of_state(name, part.group)
                    value = value.reshape(-1)
                    array[start:stop] = value if scale == 1 else value.astype(np.float64) / scale
            part.loaded()

    def _check_whole(self, what: str) -> None:
        if any((part.start, part.stop) != (0, part.flat.size) for part in self.parts):
            raise RuntimeError(f"{what}: this optimizer is sharded; each rank has a part of the state only")
