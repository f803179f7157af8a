"""Activation recomputation (checkpointing): a stretch of forward keeps its inputs only, and is done over in backward.

    forward     x -> [ a -> b -> c ] -> y     the graph is made as ever; then a, b, c, which it has saved, are let go of
    backward    x -> [ a -> b -> c ]          once more, when backward first asks for what was saved in here
                dx <- [ a <- b <- c ] <- dy   through the first graph, with the arrays of the second

The first graph stays, so backward sees what it would see without all this: which parameters it will reach, and when
each one's gradient is finished. Hooks, flat buffers, buckets and sharded parameters need to know nothing of it. What
is drawn at random is drawn again.

Between forward and backward a stretch keeps its arguments; while it is done over, and until backward has gone through,
all that it would have kept without. So L layers of A bytes each, and inputs of I bytes, take L I + A in the place of
L A, for one more forward. What saves nothing (sums, views) is not done over.

Source  Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; Griewank & Walther 2000; the form is that of
        PyTorch's torch.utils.checkpoint with use_reentrant=False
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from .autograd import _recomputing, enable_grad, is_grad_enabled
from .backend import Array, Draws
from .tensor import Function, Tensor, _creation_order


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of which backward keeps the arguments only and computes the rest again.

    function  gives tensors, or tuples, lists or dicts of them; they may be nested, as may calls of recompute. It does
              the same the second time: what else it changes is changed twice (running statistics know better, see
              `autograd.is_recomputing`), and communication in it is done twice, so by all ranks
    Errors    RuntimeError: a model that data_parallel returned is in it (let recompute be in the model). In backward:
              an argument, or a parameter that it uses, was changed in place since; the second time it did something
              else than the first
    """
    if not is_grad_enabled():
        return function(*args, **kwargs)
    stretch = Stretch(function, args, kwargs)
    with stretch.draws.noted():
        result, nodes = stretch.run()
    stretch.let_go(nodes)
    return result


def recompute_sequential(modules: Sequence[Callable[[Any], Any]], segments: int, x: Any) -> Any:
    """Modules one after another, cut into `segments` stretches of about equal length, each recomputed.

    About sqrt(n) segments take the least memory for n equal modules: their inputs, and what one segment saves.

    Errors  ValueError: segments is less than 1, or there are more than modules
    Source  Chen et al. 2016, section 4; PyTorch's checkpoint_sequential
    """
    if not 1 <= segments <= len(modules):
        raise ValueError(f"recompute_sequential: {len(modules)} modules can't be cut into {segments} segments")

    def run(start: int, stop: int, x: Any) -> Any:
        for i in range(start, stop):
            x = modules[i](x)
        return x

    stops = [len(modules) * i // segments for i in range(segments + 1)]
    for i in range(segments):
        x = recompute(run, stops[i], stops[i + 1], x)
    return x


class Stretch:
    """One call of recompute.

    versions  the counters of in-place changes of all that the second forward will read, and where each stood
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.function, self.args, self.kwargs = function, args, kwargs
        self.draws = Draws()
        self.versions = [(x._version, x._version[0]) for x in tensors_in((args, kwargs))]
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.outline: list[Outline] = []
        self.again: list[list[Any]] = []  # of each node: what the second forward has saved, until it is used

    def run(self) -> tuple[Any, list[Function]]:
        """The function's result, and the nodes that it was computed by."""
        start = next(_creation_order)
        result = self.function(*self.args, **self.kwargs)
        return result, _nodes_since(start, tensors_in(result))

    def let_go(self, nodes: list[Function]) -> None:
        """Drop what the nodes have saved, and put in its place what brings it back."""
        if any(node.announce is not None for node in nodes):
            raise RuntimeError(
                f"recompute({self.name}): a model that data_parallel returned is in it, and its forward can't be done "
                "over: let recompute be inside of the model"
            )
        self.outline = [_outline(node) for node in nodes]
        for i, node in enumerate(nodes):
            leaves = [x for x in node.inputs or () if x is not None and x.is_leaf]
            self.versions += [*node.versions, *((x._version, x._version[0]) for x in leaves)]
            node.saved = tuple([None if a is None else Later(self, i, j) for j, a in enumerate(node.saved)])
            node.bringing, node.versions = bool(node.saved), ()

    def bring(self, i: int, j: int) -> Array:
        """Array j of what node i saved; handed out once."""
        if not self.again or self.again[i][j] is None:
            self.do_over()
        array, self.again[i][j] = self.again[i][j], None
        return array() if callable(array) else array  # a stretch in this one, or a sharded parameter

    def do_over(self) -> None:
        """The forward once more."""
        if any(version[0] != before for version, before in self.versions):
            raise RuntimeError(
                f"backward of recompute({self.name}): an argument or a parameter was changed in place since its "
                "forward, which can't be done over: change a copy (x.clone()), or do it after backward"
            )
        token = _recomputing.set(True)
        try:
            with enable_grad(), self.draws.repeated():
                _, nodes = self.run()
        finally:
            _recomputing.reset(token)
        outline = [_outline(node) for node in nodes]
        if outline != self.outline:
            raise RuntimeError(
                f"backward of recompute({self.name}): the second forward is not what the first was: "
                f"{_difference(self.outline, outline)}"
            )
        self.again = [list(node.saved) for node in nodes]
        for node in nodes:
            node.free()  # of the second graph nothing else is of use


class Later:
    """What stands in a saved array's place: calling it gives the array."""

    def __init__(self, stretch: Stretch, i: int, j: int):
        self.stretch, self.i, self.j = stretch, i, j

    def __call__(self) -> Array:
        return self.stretch.bring(self.i, self.j)

    @property
    def keeps(self) -> list[Array]:
        """The arrays that are kept for it: the stretch's arguments."""
        return [x.data for x in tensors_in((self.stretch.args, self.stretch.kwargs))]


Outline = tuple[str, tuple[Any, ...]]  # of a node: what it does, and the shapes of what it saves


def _outline(node: Function) -> Outline:
    return type(node).__name__, tuple([getattr(array, "shape", None) for array in node.saved])


def _difference(first: list[Outline], second: list[Outline]) -> str:
    """The first difference, in words."""
    for i, (a, b) in enumerate(zip_longest(first, second, fillvalue=("nothing", ()))):
        if a != b:
            return f"operation {i} was {a[0]}, saving {list(a[1])}, and is {b[0]}, saving {list(b[1])}"
    raise AssertionError("there is none")


def _nodes_since(start: int, results: list[Tensor]) -> list[Function]:
    """The nodes made since then that the results were computed by, oldest first."""
    pending: list[Any] = [y._node for y in results]
    found: set[Function] = set()
    while pending:
        node = pending.pop()
        if node is not None and not node.is_leaf and node.order > start and node not in found:
            found.add(node)
            pending += node.inputs or ()
    return sorted(found, key=lambda node: node.order)


def tensors_in(y: Any) -> list[Tensor]:
    """All tensors of a structure of tuples, lists and dicts."""
    if isinstance(y, Tensor):
        return [y]
    values = y if isinstance(y, tuple | list) else y.values() if isinstance(y, dict) else ()
    return [tensor for value in values for tensor in tensors_in(value)]
