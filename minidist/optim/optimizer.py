"""What all optimizers share: flat buffers, groups, updates in cache-sized pieces, state.

An update reads and writes several arrays of the model's size, several times each. Done on whole arrays every pass goes
to main memory and back; done on pieces of PIECE elements the passes find them in the processor's cache. (Measured with
Adam on 814,090 float32: whole arrays 1.85 ms, pieces of 32 Ki 1.03 ms, of 4 Ki 1.56 ms, where calls cost most.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .. import backend
from ..backend import Array
from ..nn.flat import FlatBuffer, flatten
from ..nn.module import Parameter

PIECE = 32 * 1024

Group = dict[str, Any]


class Part:
    """The part of one flat buffer that this optimizer updates, and its state: all of it, unless it is sharded.

    start, stop  the part, as elements of the flat buffer
    state        arrays of stop - start elements, by name; empty before the first step
    steps        for each of the buffer's parameters, how many updates it has had
    """

    def __init__(self, group: Group, flat: FlatBuffer):
        self.group, self.flat = group, flat
        self.start, self.stop = 0, flat.size
        self.state: dict[str, Array] = {}
        self.steps = [0] * len(flat.parameters)

    def shard(self, start: int, stop: int) -> None:
        """Update, and keep state for, this part only. Before the first step."""
        if self.state:
            raise RuntimeError("an optimizer can be sharded before its first step only")
        self.start, self.stop = start, stop

    def allocate(self, names: Iterable[str]) -> None:
        """Make the state: zeros."""
        if not self.state:
            shape, like = (self.stop - self.start,), self.flat.data
            self.state = {name: backend.full(shape, 0, like.dtype, backend.device_of(like)) for name in names}

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, step): stretches of parameters that have a gradient and are equally old; counts the step."""
        begin = end = step = 0
        for i, (p, (start, stop)) in enumerate(zip(self.flat.parameters, self.flat.bounds, strict=True)):
            if p.grad is None:
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
        listed = list(params)
        if not listed:
            raise ValueError("an optimizer needs parameters: the list is empty")
        groups: list[Any] = listed if isinstance(listed[0], dict) else [{"params": listed}]
        self.defaults = defaults
        self.param_groups: list[Group] = [{**defaults, **g, "params": list(g["params"])} for g in groups]
        if len({p for g in self.param_groups for p in g["params"]}) < sum(len(g["params"]) for g in self.param_groups):
            raise ValueError("a parameter stands twice in an optimizer's list")
        for group in self.param_groups:
            self.check(group)
        self.parts = [Part(group, flat) for group in self.param_groups for flat in flatten(group["params"])]
        self._scratch: dict[tuple[Any, str], tuple[Array, Array]] = {}

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
        """Update every parameter that has a gradient. `closure`, if given, computes the loss again and is called first."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.flat.check()
            part.allocate(self.names_of_state(part.group))
            for start, stop, step in part.runs():
                self._update_run(part, start, stop, step)
        return loss

    def _update_run(self, part: Part, start: int, stop: int, step: int) -> None:
        data, grad, offset = part.flat.data, part.flat.grad, part.start
        # A GPU has no use for small pieces: there every call costs a kernel.
        size = PIECE if not backend.on_gpu(data) else max(stop - start, 1)
        for a in range(start, stop, size):
            b = min(a + size, stop)
            state = {name: array[a - offset : b - offset] for name, array in part.state.items()}
            t, u = self._scratch_for(data, size)
            self.update(data[a:b], grad[a:b], state, t[: b - a], u[: b - a], part.group, step)

    def _scratch_for(self, like: Array, size: int) -> tuple[Array, Array]:
        key = like.dtype, backend.device_of(like)
        if key not in self._scratch or self._scratch[key][0].size < size:
            self._scratch[key] = backend.empty((size,), *key), backend.empty((size,), *key)
        return self._scratch[key]

    def zero_grad(self) -> None:
        """Forget the gradients: the next backward starts anew. (They become None, as in PyTorch.)"""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # -- state --------------------------------------------------------------------------------------------------

    def scale_of_state(self, name: str, group: Group) -> float:
        """What a state array is multiplied by to get PyTorch's."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's form: {"state": {i: {"step": k, name: array, …}}, "param_groups": [options, "params": [i, …]]}.

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
                    state[number[p]][name] = (array[start:stop] * array.dtype.type(scale)).reshape(p.shape)
        groups = [{**g, "params": [number[p] for p in g["params"]]} for g in self.param_groups]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, of an optimizer of the same kind over parameters of the same shapes."""
        self._check_whole("load_state_dict")
        sizes, mine = [len(g["params"]) for g in saved["param_groups"]], [len(g["params"]) for g in self.param_groups]
        if sizes != mine:
            raise ValueError(f"load_state_dict: groups of {sizes} parameters for an optimizer of {mine}")
        for group, other in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in other.items() if name != "params"})
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for part in self.parts:
            part.allocate(self.names_of_state(part.group))
            for i, (p, (start, stop)) in enumerate(zip(part.flat.parameters, part.flat.bounds, strict=True)):
                entry = saved["state"].get(number[p], {})
                part.steps[i] = int(entry.get("step", 0))
                for name, array in part.state.items():
                    value = backend.asarray(entry.get(name, 0), array.dtype, p.device)
                    array[start:stop] = value.reshape(-1) / array.dtype.type(self.scale_of_state(name, part.group))

    def _check_whole(self, what: str) -> None:
        if any((part.start, part.stop) != (0, part.flat.size) for part in self.parts):
            raise RuntimeError(f"{what}: this optimizer is sharded; each rank has a part of the state only")
