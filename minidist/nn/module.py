"""Module: parameters, buffers and other modules, under names. PyTorch's names and rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import backend
from ..autograd import no_grad
from ..backend import Array
from ..recomputation import recompute
from ..tensor import Tensor, plain
from ..watcher import current_watchers

if TYPE_CHECKING:
    from .flat import FlatBuffer

T = TypeVar("T")


class Parameter(Tensor):
    """A tensor that a module trains."""

    __slots__ = ("_flat",)

    def __init__(self, data: Tensor | Array, requires_grad: bool = True):
        super().__init__(data.data if isinstance(data, Tensor) else data, requires_grad)
        self._flat: FlatBuffer | None = None  # the flat buffer that data is a view of

    def forget_grad(self, set_to_none: bool = True) -> None:
        """No gradient; or, with set_to_none=False, one of zeros where there is one."""
        if self._flat is not None:
            self._flat.forget(self)
        if set_to_none or self.grad is None:
            self.grad = None
        else:
            self.grad = Tensor(self.grad.zero_().data)  # a new one, which no strategy knows as an average

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        """A parameter of its own memory, in no flat buffer and without hooks; with a copy of the gradient, if any."""
        copy = memo[id(self)] = Parameter(self.data.copy(), self.requires_grad)
        copy.grad = None if self.grad is None else Tensor(self.grad.data.copy())
        return copy


def _first(named: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Each thing once, under its first name."""
    seen: set[T] = set()
    for name, thing in named:
        if thing not in seen:
            seen.add(thing)
            yield name, thing


class Module(ABC):
    """A function with parameters. A subclass makes them in __init__ and uses them in forward.

        class Classifier(Module):
            def __init__(self):
                self.hidden = Linear(784, 1024)
                self.out = Linear(1024, 10)

            def forward(self, x):
                return self.out(F.relu(self.hidden(x)))

    Attributes that are parameters or modules are found by themselves. A tensor that belongs to the state but is not
    trained (a running mean) is named by `register_buffer`.
    """

    training = True
    recomputed = "none"  # what backward computes again: "none", the "core" of attention, or "all"; see recompute_
    _buffer_names: tuple[str, ...] = ()
    _pre_hooks: tuple[tuple[Callable[[Module, tuple[Any, ...]], None]], ...] = ()  # each in a tuple of its own
    _hooks: tuple[tuple[Callable[[Module, tuple[Any, ...], Any], None]], ...] = ()

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed == "all":
            return recompute(self._call, *args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        watchers = current_watchers()
        if not watchers:
            return self._forward(*args, **kwargs)
        for watcher in watchers:
            watcher.forward_begins(self)
        try:
            return self._forward(*args, **kwargs)
        finally:
            for watcher in watchers:
                watcher.forward_ends(self)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        for (before,) in self._pre_hooks:
            before(self, args)
        result = self.forward(*args, **kwargs)
        for (after,) in self._hooks:
            after(self, args, result)
        return result

    def register_forward_pre_hook(self, hook: Callable[[Module, tuple[Any, ...]], None]) -> Callable[[], None]:
        """Call hook(module, args) before each forward; returns what removes it. What it returns is not used."""
        mine = (hook,)
        self._pre_hooks = (*self._pre_hooks, mine)
        return lambda: setattr(self, "_pre_hooks", tuple(h for h in self._pre_hooks if h is not mine))

    def register_forward_hook(self, hook: Callable[[Module, tuple[Any, ...], Any], None]) -> Callable[[], None]:
        """Call hook(module, args, result) after each forward; returns what removes it. What it returns is not used."""
        mine = (hook,)
        self._hooks = (*self._hooks, mine)
        return lambda: setattr(self, "_hooks", tuple(h for h in self._hooks if h is not mine))

    def register_buffer(self, name: str, value: Tensor | None) -> None:
        """Make a tensor part of the state, under its attribute's name."""
        setattr(self, name, value)
        self._buffer_names = (*self._buffer_names, name)

    # -- what is in it ------------------------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside, with their names."""
        return ((name, m) for name, m in vars(self).items() if isinstance(m, Module))

    def children(self) -> Iterator[Module]:
        return (m for _, m in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all inside it, with their dotted names; a shared one once, under its first name."""
        return _first(self._all_modules(prefix))

    def _all_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """As named_modules, with a shared one under each of its names."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child._all_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        return (m for _, m in self.named_modules())

    def _named_state(self, want_parameters: bool, want_buffers: bool) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._all_modules():
            for name, value in vars(module).items():
                full = f"{prefix}.{name}" if prefix else name
                if isinstance(value, Parameter):
                    if want_parameters:
                        yield full, value
                elif want_buffers and name in module._buffer_names and value is not None:
                    yield full, value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The parameters with their dotted names ("0.weight"); a tied one once, under its first name."""
        for name, p in _first(self._named_state(True, False)):
            assert isinstance(p, Parameter)
            yield name, p

    def own_parameters(self) -> Iterator[Parameter]:
        """Those that are attributes of this module itself."""
        return (value for value in vars(self).values() if isinstance(value, Parameter))

    def parameters(self) -> Iterator[Parameter]:
        return (p for _, p in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors named by `register_buffer`, with their dotted names; a shared one once."""
        return _first(self._named_state(False, True))

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Parameters and buffers as arrays, by PyTorch's names and in its layouts. Views, not copies."""
        state = {name: t.data for name, t in self._named_state(True, True)}
        if any(isinstance(array, backend.Absent) for array in state.values()):
            raise RuntimeError("the parameters are sharded (zero=3): ask the model that data_parallel returned")
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy arrays (or tensors, of PyTorch's too) into the parameters and buffers of the same names, in place.

        Errors  KeyError: names missing or too many (unless strict is False); ValueError: another shape. Nothing is
                loaded then
        """
        mine = dict(self._named_state(True, True))
        missing, unexpected = mine.keys() - state.keys(), state.keys() - mine.keys()
        if strict and (missing or unexpected):
            raise KeyError(f"load_state_dict: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
        arrays = {name: plain(state[name]) for name in mine if name in state}
        arrays = {name: array if backend.is_array(array) else np.asarray(array) for name, array in arrays.items()}
        wrong = [name for name, array in arrays.items() if array.shape != mine[name].shape]
        if wrong:
            shapes = "; ".join(f"{name} has shape {mine[name].shape}, the state {arrays[name].shape}" for name in wrong)
            raise ValueError(f"load_state_dict: {shapes}")
        with no_grad():
            for name, array in arrays.items():
                mine[name].copy_(backend.to(array, mine[name].device))

    def to(self, *targets: Any, device: str | None = None, dtype: Any = None) -> Module:
        """Move the parameters and buffers to a device, or cast them to a floating-point dtype; returns self.

        Errors  RuntimeError: an optimizer holds them already (make it after moving); TypeError: a dtype that is not
                floating-point
        """
        targets = tuple(t for t in (*targets, device, dtype) if t is not None)
        for target in targets:
            if "bfloat16" in (target, getattr(target, "name", ""), getattr(target, "__name__", "")):
                raise TypeError(
                    "to(bfloat16): NumPy gives the products and multiples of it in float32, so that nothing would "
                    "stay in 16 bits; use float16 (module.half()), with optim.GradScaler"
                )
            if not backend.is_device(target) and np.dtype(target).kind != "f":
                raise TypeError(f"to({target!r}): a module can be cast to floating-point dtypes only")
        for t in (t for _, t in self._named_state(True, True)):
            if isinstance(t, Parameter) and t._flat is not None:
                raise RuntimeError("move or cast a model before its optimizer is made: it holds the parameters' memory")
            for target in targets:
                if backend.is_device(target):
                    t.data = backend.to(t.data, target)
                elif t.dtype.kind == "f":
                    t.data = t.data.astype(np.dtype(target))
            t.grad = None
        return self

    def double(self) -> Module:
        """Cast to float64: for checks of gradients."""
        return self.to(np.float64)

    def float(self) -> Module:
        """Cast to float32."""
        return self.to(np.float32)

    def half(self) -> Module:
        """Cast to float16."""
        return self.to(np.float16)

    def train(self, mode: bool = True) -> Module:
        """Switch dropout and batch statistics on (or off); returns self."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch dropout and batch statistics off; returns self."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Freeze the parameters, or train them again; returns self."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def recompute_(self, what: str = "all") -> Module:
        """Keep less of a forward for its backward, which computes it again (recomputation.py); returns self.

        what    "all": of this module keep the arguments only. For a stack of layers say it of each.
                "core": of each attention in it keep queries, keys and values, but not the weights, which grow with the
                square of the length and cost little to compute again. "none": keep everything again, all through it
        Errors  ValueError: another `what`
        Source  Korthikanti et al. 2022, section 5: full and selective activation recomputation
        """
        if what not in ("none", "core", "all"):
            raise ValueError(f"recompute_({what!r}): choose 'all', 'core' (of attention) or 'none'")
        for module in [self] if what == "all" else self.modules():
            module.recomputed = what
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; or, with set_to_none=False, set them to 0."""
        for p in self.parameters():
            p.forget_grad(set_to_none)

    def extra_repr(self) -> str:
        """What the printed form shows between the brackets."""
        return ""

    def __repr__(self) -> str:
        lines = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in self.named_children()]
        inside = "\n  " + "\n  ".join(lines) + "\n" if lines else self.extra_repr()
        return f"{type(self).__name__}({inside})"


class Sequential(Module):
    """Modules one after another; each gets what the one before gave. Named "0", "1", …, or as in the one dict given"""

    def __init__(self, *modules: Module | Mapping[str, Module]):
        numbered = {str(i): module for i, module in enumerate(modules)}
        named = modules[0] if len(modules) == 1 and isinstance(modules[0], Mapping) else numbered
        for name, module in named.items():
            setattr(self, name, module)

    def forward(self, x: Any) -> Any:
        for module in self.children():
            x = module(x)
        return x

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Sequential(dict(list(self.named_children())[index]))  # under their names, as PyTorch has it
        return list(self.children())[index]

    def __iter__(self) -> Iterator[Module]:
        return self.children()


class ModuleList(Module):
    """A list of modules. Named "0", "1", …; calling it is left to its owner."""

    def __init__(self, modules: Any = ()):
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> ModuleList:
        setattr(self, str(len(self)), module)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a ModuleList can't be called: loop over it")

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int) -> Module:
        return list(self.children())[index]

    def __iter__(self) -> Iterator[Module]:
        return self.children()
