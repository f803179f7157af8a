"""Tensor and Function: arrays that remember how they were computed, and the operations that compute them.

Every operation is a `Function` with a forward and, beside it, its derivative. Applying one to tensors that require a
gradient leaves a node behind; the nodes, each pointing to its inputs, are the graph. `backward` (autograd.py) walks
them from the result to the leaves, newest first:

    x = md.tensor([1.0, 2.0], requires_grad=True)
    y = (x * x).sum()
    y.backward()
    x.grad                       # tensor([2., 4.])

The arithmetic itself (`x * x`, `.sum()`) is in `ops/`, which hangs its functions onto Tensor as methods.

Source  Griewank & Walther 2008, Evaluating Derivatives, chapter 3 (reverse mode); names follow PyTorch.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backend
from .autograd import is_grad_enabled, run_backward
from .backend import Array, Shape

Hook = Callable[["Tensor"], None]

_creation_order = count(1)


class Tensor:
    """An array (NumPy's or CuPy's) that remembers how it was computed.

    data           the array; changing it directly is invisible to autograd, `x.add_(1)` and the like are checked
    grad           the accumulated gradient, a Tensor of the same shape, or None; on leaves only
    requires_grad  whether backward shall reach this tensor
    """

    __slots__ = ("__weakref__", "_bring", "_grad_room", "_hooks", "_node", "_version", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # numpy_array * tensor becomes Tensor.__rmul__

    def __init__(self, data: Array, requires_grad: bool = False):
        if type(data) is not np.ndarray:
            data = backend.asarray(plain(data))  # NumPy gives scalars for 0 dims; users may give lists
        if requires_grad and data.dtype.kind not in "fc":
            raise TypeError(f"only floating-point tensors can require gradients; this one has dtype {data.dtype}")
        self.data = data
        self.grad: Tensor | None = None
        self.requires_grad = requires_grad
        self._node: Function | None = None  # what computed it; None for a leaf
        self._version = [0]  # in-place changes so far; one counter is shared by all views of the same memory
        self._hooks: dict[int, Hook] | None = None  # called when this leaf's gradient is finished
        # In flat buffers: what gives the array of the gradient; and what brings back `data`, if it comes and goes.
        self._grad_room: Callable[[], Array] | None = None
        self._bring: Callable[[], Array] | None = None

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def device(self) -> str:
        return backend.device_of(self.data)

    @property
    def is_leaf(self) -> bool:
        """Whether nothing computed it: made by hand, or without a graph. Only leaves have a `grad`."""
        return self._node is None

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.data.size

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        if isinstance(self.data, backend.Absent):
            return f"tensor(sharded, shape={self.shape}, dtype={self.dtype})"
        text = np.array2string(self.numpy(), separator=", ", prefix="tensor(")
        kind = "" if self.dtype in (np.float32, np.int64, np.bool_) else f", dtype={self.dtype}"
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        how = f", grad_fn={type(self._node).__name__}" if self._node else ", requires_grad=True"
        return f"tensor({text}{kind}{where}{how if self.requires_grad else ''})"

    # -- taking the values out ----------------------------------------------------------------------------------

    def numpy(self) -> np.ndarray:
        """The values in host memory; on CPU the very array, not a copy."""
        return backend.to_numpy(self.data)

    def item(self) -> Any:
        """The single value as a Python number."""
        return self.data.item()

    def tolist(self) -> Any:
        return self.data.tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())  # CuPy's arrays have no __index__ of their own

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else str(self), spec)  # f"{loss:.3f}"

    __hash__ = object.__hash__  # by identity, though ops/ makes == elementwise

    def detach(self) -> Tensor:
        """The same array, cut off from the graph."""
        result = Tensor(self.data)
        result._version = self._version
        return result

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` of a leaf; return self."""
        if not requires_grad and self._node is not None:
            raise RuntimeError("requires_grad of a computed tensor can't be turned off; use y.detach()")
        self.requires_grad = Tensor(self.data, requires_grad).requires_grad
        return self

    # -- changing it in place -----------------------------------------------------------------------------------

    def _changing(self, *others: Any) -> Array:
        """Note an in-place change of self that reads `others`, and return the array to change."""
        if is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (self, *others)):
            raise RuntimeError(
                "in-place change where gradients are recorded: use the out-of-place form (y = y + x, not y += x), "
                "or, for an update that is not part of the function, do it under `with md.no_grad():`"
            )
        self._version[0] += 1
        return self.data

    def __setitem__(self, index: Any, value: Any) -> None:
        self._changing(value)[plain(index)] = plain(value)

    def copy_(self, other: Any) -> Tensor:
        self._changing(other)[...] = backend.asarray(plain(other), self.dtype, self.device)
        return self

    def fill_(self, value: float) -> Tensor:
        self._changing().fill(value)
        return self

    def zero_(self) -> Tensor:
        return self.fill_(0)

    def add_(self, other: Any, alpha: float = 1) -> Tensor:
        data = self._changing(other)
        data += plain(other) if alpha == 1 else alpha * plain(other)
        return self

    def sub_(self, other: Any, alpha: float = 1) -> Tensor:
        return self.add_(other, alpha=-alpha)

    def mul_(self, other: Any) -> Tensor:
        data = self._changing(other)
        data *= plain(other)
        return self

    def div_(self, other: Any) -> Tensor:
        data = self._changing(other)
        data /= plain(other)
        return self

    __iadd__, __isub__, __imul__, __itruediv__ = add_, sub_, mul_, div_

    # -- gradients ----------------------------------------------------------------------------------------------

    def backward(self, gradient: Tensor | Array | None = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf) into the `grad` of every leaf that requires a gradient.

        gradient      d(loss)/d(self), of self's shape; 1 where self is a single number
        retain_graph  keep the saved arrays, so that backward can be called again
        Errors        RuntimeError: no graph; not a scalar and no gradient given; the graph was freed by an earlier
                      backward; an array that backward needs was changed in place
        """
        if not self.requires_grad:
            raise RuntimeError("backward of a tensor that requires no gradient: none of its inputs has requires_grad")
        if gradient is None:
            if self.data.size != 1:
                raise RuntimeError(
                    f"backward of a tensor of shape {self.shape} needs a gradient of that shape: reduce it to one "
                    "number first (y.sum().backward()), or give one (y.backward(gradient))"
                )
            seed = backend.namespace(self.data).ones_like(self.data)
        else:
            seed = backend.asarray(plain(gradient), self.dtype, self.device)
            if seed.shape != self.shape:
                raise RuntimeError(f"backward: the gradient has shape {seed.shape}, the tensor {self.shape}")
        run_backward(self, seed, retain_graph)

    def register_post_accumulate_grad_hook(self, hook: Hook, last: bool = False) -> Callable[[], None]:
        """Call hook(self) in every backward, as soon as this leaf's gradient is finished; returns what removes it.

        Finished means: every use of the leaf in this graph has contributed. Leaves finish in the reverse of the order
        of their use, so a network's last layers first. Hooks are called as registered, `last` ones after the others.
        """
        if not (self.is_leaf and self.requires_grad):
            raise RuntimeError("hooks on a finished gradient need a leaf that requires a gradient")
        hooks = self._hooks = {} if self._hooks is None else self._hooks
        key = -next(_creation_order) if last else next(_creation_order)
        hooks[key] = hook
        for after in [k for k in hooks if k < 0 < key]:
            hooks[after] = hooks.pop(after)
        return lambda: (hooks.pop(key, None), None)[1]

    def _accumulate(self, dx: Array) -> None:
        """grad += dx. The first contribution goes into the parameter's own buffer, where it has one."""
        if self.grad is not None:
            self.grad.data += dx
        elif self._grad_room is None:
            self.grad = Tensor(dx.copy())  # a copy: dx may be another tensor's gradient too
        else:
            room = self._grad_room()
            if dx is not room:
                room[...] = dx
            self.grad = Tensor(room)

    if TYPE_CHECKING:  # what ops/ hangs on

        def __getattr__(self, name: str) -> Any: ...
        def __neg__(self) -> Tensor: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...


def plain(value: Any) -> Any:
    """The array of a tensor, also inside an index tuple; anything else as it is."""
    if isinstance(value, Tensor):
        return value.data
    return tuple(plain(v) for v in value) if isinstance(value, tuple) else value


class Function(ABC):
    """One operation: its forward and, beside it, its derivative. An instance is a node of the graph.

    A subclass works on arrays, never writes to an argument, and gives one array:

        class Exp(Function):
            '''y = exp(x).   dx = dy * y'''

            def forward(self, x):
                return self.save(namespace(x).exp(x))

            def backward(self, dy):
                (y,) = self.saved
                return (dy * y,)

        def exp(x):
            return Exp.apply(x)

    inputs  of what `apply` was given: the nodes that computed it, and leaves; None where no gradient is wanted
    needs   for each input, whether its gradient is wanted; backward may return None (or skip the work) for the others
    saved   what forward saved; whole arrays and not views of them, so that in-place changes can be noticed
    into    during backward: for each input, None, or an array where its gradient would be kept for good; a backward
            that can write its result there (`out=`) and return it saves a copy
    """

    is_view = False  # the result shares memory with the first input
    announce: Callable[[], Callable[[Iterable[Tensor]], None]] | None = None  # see autograd.py
    bringing = False  # whether among `saved` there are functions that bring arrays back
    is_leaf = False  # as a tensor's

    inputs: tuple[Any, ...] | None
    saved: tuple[Array, ...] = ()
    versions: Sequence[tuple[list[int], int]] = ()
    into: Sequence[Array] = (None,) * 8

    @abstractmethod
    def forward(self, *arrays: Any, **options: Any) -> Array:
        """The result, as a new array (or a view of the first input, if `is_view`)."""

    @abstractmethod
    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        """The gradient of each input, given that of the result."""

    def save(self, *arrays: Array) -> Array:
        """Keep arrays for backward, if there will be one; returns the first."""
        if self.recording:
            self.saved = arrays
        return arrays[0]

    @classmethod
    def apply(cls, *inputs: Any, **options: Any) -> Tensor:
        """Run forward on the inputs' arrays; record the node if an input requires a gradient."""
        node = cls()
        node.needs = tuple([isinstance(x, Tensor) and x.requires_grad for x in inputs])
        node.recording = True in node.needs and is_grad_enabled()
        arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
        try:
            data = node.forward(*arrays, **options)
        except TypeError as error:
            _explain_mixed_devices(cls.__name__, arrays, error)
            raise
        result = Tensor(data)
        if cls.is_view:
            result._version = inputs[0]._version
        if node.recording:
            node.inputs = tuple([x._node or x if need else None for x, need in zip(inputs, node.needs, strict=True)])
            node.out_shape = data.shape
            node.order = next(_creation_order)
            if node.saved:  # remember the version of each tensor whose very array was saved
                ids = {id(array) for array in node.saved}
                tensors = [t for t in (*inputs, result) if isinstance(t, Tensor)]
                kept = [t for t in tensors if id(t.data) in ids]
                node.versions = [(t._version, t._version[0]) for t in kept]
                brought = {id(t.data): t._bring for t in kept if t._bring is not None}
                if brought:  # keep what brings an array back in the array's place
                    node.saved, node.bringing = tuple([brought.get(id(a), a) for a in node.saved]), True
            result.requires_grad, result._node = True, node
        return result

    def check_saved(self) -> None:
        """Have the saved arrays at hand. Raise if the graph was freed, or if one was changed in place since forward."""
        if self.inputs is None:
            raise RuntimeError(
                f"second backward through a graph that the first has freed (at {type(self).__name__}): compute the "
                "forward again, or call the first backward with retain_graph=True"
            )
        for version, saved_at in self.versions:
            if version[0] != saved_at:
                raise RuntimeError(
                    f"backward of {type(self).__name__}: an array it saved was changed in place since (now at "
                    f"version {version[0]}, saved at {saved_at}): change a copy (x.clone()), or do it after backward"
                )
        if self.bringing:
            self.packed, self.saved = self.saved, tuple([a() if callable(a) else a for a in self.saved])

    def put_back(self) -> None:
        """Let go of arrays that were brought back: another backward will bring them again."""
        if self.bringing:
            self.saved = self.packed

    def free(self) -> None:
        """Let go of the saved arrays and of the graph behind."""
        self.inputs = None
        self.saved = self.packed = self.versions = ()

    # Set by `apply`; declared here for readers and type checkers.
    needs: tuple[bool, ...]
    out_shape: Shape
    recording: bool
    packed: tuple[Any, ...]
    order: int


def _explain_mixed_devices(name: str, arrays: list[Any], error: TypeError) -> None:
    devices = [backend.device_of(a) for a in arrays if backend.is_array(a)]
    if len(set(devices)) > 1:
        where = ", ".join(devices)
        raise RuntimeError(f"{name}: its inputs are on different devices ({where}); use x.to(device)") from error
