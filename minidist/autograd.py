"""The backward pass: from a result to the leaves, newest node first, without recursion.

A node (`tensor.Function`) is made by every recorded operation and points to those that computed its inputs, or to
leaves; not to the inputs' arrays, of which only those stay that its backward needs. What is needed of it here:

    order, inputs, needs          when it was made; those nodes and leaves; which of its inputs want a gradient
    out_shape                     of its result
    backward(dy) -> dx, ...       its derivative
    announce                      None, or what to call when a backward will go through it; it returns what to call
                                  with the leaves that the backward will reach, when all such nodes know
    check_saved(), free()         fetch its saved arrays, and see whether they are what they were; let go of them

and of a tensor: `_node` (what computed it; None for a leaf), `grad`, `_accumulate`, `_hooks`, `_grad_room`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from .backend import Array
from .watcher import current_watchers

if TYPE_CHECKING:
    from .tensor import Function, Tensor

# Context variables and not plain globals: every simulated rank has a context of its own, as every process has.
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
_callbacks: ContextVar[list[Callable[[], None]] | None] = ContextVar("callbacks", default=None)


class grad_mode(ContextDecorator):
    """Turn recording on or off for a `with` block or a decorated function. See `no_grad` and `enable_grad`."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __enter__(self) -> None:
        self._token = _recording.set(self.enabled)

    def __exit__(self, *exc: object) -> None:
        _recording.reset(self._token)

    def _recreate_cm(self) -> grad_mode:
        return grad_mode(self.enabled)  # of ContextDecorator: a decorated function may call itself


def no_grad() -> grad_mode:
    """Within it no graph is recorded: for evaluation, and for changing parameters in place."""
    return grad_mode(False)


def enable_grad() -> grad_mode:
    """Record again inside a `no_grad` block."""
    return grad_mode(True)


is_grad_enabled = _recording.get  # a bool: whether operations are being recorded
is_recomputing = _recomputing.get  # a bool: whether a forward is done over (recomputation.py)


def run_backward(root: Tensor, seed: Array, retain_graph: bool) -> None:
    """Hand every node behind `root` its gradient, let it pass on those of its inputs, and free it."""
    with running():
        nodes, uses = reachable(root)
        announce(nodes, uses)
        gradients: dict[Tensor | Function, Array] = {root._node or root: seed}
        if root._node is None:
            _finish(root, gradients)
        visit(nodes, gradients, uses, lambda node, _: node.put_back() if retain_graph else node.free())


@contextmanager
def running() -> Iterator[None]:
    """A backward goes on in here; at its end what hooks and nodes have asked for by after_backward is called."""
    token = _callbacks.set([])
    try:
        yield
        for callback in _callbacks.get() or ():
            callback()
    finally:
        _callbacks.reset(token)


def announce(nodes: list[Function], leaves: Iterable[Tensor]) -> None:
    """Tell those who want to know that a backward begins, which will go through these nodes to these leaves."""
    for start in dict.fromkeys(node.announce() for node in nodes if node.announce is not None):
        start(leaves)


def visit(
    nodes: list[Function],
    gradients: dict[Tensor | Function, Array],
    uses: dict[Tensor, int],
    done: Callable[[Function, Array | None], None],
) -> None:
    """Visit nodes, newest first: take the gradient of each from `gradients`, add what it returns to its inputs'.

    Invariant: all that used a node's result are newer than the node, so when it is visited they have been, and its
    gradient is complete. Sorting by age is a topological sort, however deep the graph.

    uses  how often each leaf is still to be used; when it comes to 0, the leaf's gradient is finished
    done  called with each node and its gradient, when it has been visited
    """
    # A leaf used once, with no gradient so far, may have it written straight into its buffer.
    direct = {x for x, n in uses.items() if n == 1 and x.grad is None and x._grad_room is not None}
    watchers = current_watchers()
    for watcher in watchers:
        watcher.backward_begins()
    for node in nodes:
        node.check_saved()
        for watcher in watchers:
            watcher.visits(node)
        assert node.inputs is not None
        if direct:
            node.into = [
                x._grad_room() if need and x in direct else None
                for x, need in zip(node.inputs, node.needs, strict=True)
            ]
        dy = gradients.pop(node, None)  # None: everything that used the result returned no gradient for it
        dxs = (None,) * len(node.inputs) if dy is None or True not in node.needs else node.backward(dy)
        if direct:
            del node.into  # with retain_graph another backward decides anew
        for x, need, dx in zip(node.inputs, node.needs, dxs, strict=True):
            if not need:
                continue
            if dx is not None:
                shape = x.data.shape if x in uses else x.out_shape
                assert dx.shape == shape, f"{type(node).__name__}: gradient {dx.shape}, input {shape}"
                gradients[x] = gradients[x] + dx if x in gradients else dx
            if x in uses:
                uses[x] -= 1
                if uses[x] == 0:
                    _finish(x, gradients)
        done(node, dy)
    for watcher in watchers:
        watcher.backward_ends()


def reachable(root: Tensor) -> tuple[list[Function], dict[Tensor, int]]:
    """The nodes that `root` was computed by, newest first, and how often each leaf is used."""
    pending = [root._node] if root._node else []
    found = set(pending)
    uses: dict[Tensor, int] = {}
    while pending:
        node = pending.pop()
        if node.inputs is None:
            continue  # freed: check_saved will say so
        for x, need in zip(node.inputs, node.needs, strict=True):
            if not need:
                continue
            if x.is_leaf:
                uses[x] = uses.get(x, 0) + 1
            elif x not in found:
                found.add(x)
                pending.append(x)
    return sorted(found, key=lambda node: node.order, reverse=True), uses


def bytes_kept(roots: list[Tensor]) -> int:
    """How much memory the graph behind these results keeps until backward: the arrays it saved, but for the leaves'."""
    kept: dict[int, int] = {}
    leaves: set[int] = set()
    for node in {node for root in roots for node in reachable(root)[0]}:
        for x in node.inputs or ():
            if x is not None and x.is_leaf:
                leaves.add(id(_owner(x.data)))
        for array in (*node.saved, *(a for later in node.saved for a in getattr(later, "keeps", ()))):
            if hasattr(array, "nbytes") and not isinstance(array, memoryview):
                owner = _owner(array)
                kept[id(owner)] = owner.nbytes
    return sum(nbytes for key, nbytes in kept.items() if key not in leaves)


def _owner(array: Array) -> Array:
    """The array whose memory this one is a view of."""
    while hasattr(base := getattr(array, "base", None), "nbytes"):
        array = base
    return array


def _finish(leaf: Tensor, gradients: dict[Tensor | Function, Array]) -> None:
    """Every use of the leaf has contributed: add the sum to its grad and call its hooks."""
    total = gradients.pop(leaf, None)
    if total is None:
        return
    leaf._accumulate(total)
    for hook in tuple((leaf._hooks or {}).values()):
        hook(leaf)


def after_backward(callback: Callable[[], None]) -> None:
    """From a hook or a node: call `callback`, once, when the running backward has visited every node."""
    callbacks = _callbacks.get()
    if callbacks is None:
        raise RuntimeError("after_backward is for hooks: no backward is running")
    if callback not in callbacks:
        callbacks.append(callback)
