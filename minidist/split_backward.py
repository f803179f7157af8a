"""A backward in two halves: first what others wait for, then what they do not.

    forward               x --> [ layer, w ] --> y
    backward, 1st half    dx <-- [       w ] <-- dy        the gradient of the input, which the stage before waits for
    backward, 2nd half           [ x  ->dw ] <-- dy        those of the parameters, which nobody waits for before the
                                                           optimizer's step

The second half may come any time later: a pipeline fills its bubble with it. In between dy of each layer with
parameters is kept, with what the layer has saved of its input. For linear layers each half is one of the two products
of a backward; an operation that computes both gradients at once does some of its work twice.

Source  Qi et al. 2023, "Zero bubble pipeline parallelism", section 2
"""

from __future__ import annotations

from collections.abc import Set

from .autograd import announce, reachable, running, visit
from .backend import Array
from .tensor import Function, Tensor


class SplitBackward:
    """A backward from `root`: making it does the first half, `finish` the second.

    parameters  the leaves whose gradients are left to the second half
    """

    def __init__(self, root: Tensor, seed: Array, parameters: Set[Tensor]):
        self.nodes, self.uses = reachable(root)
        # 1. Part the inputs of each node, oldest first: parameters (and views of them), and what flows through layers.
        still: set[Function | Tensor] = set(parameters)
        second: dict[Function, tuple[bool, ...]] = {}
        for node in reversed(self.nodes):
            assert node.inputs is not None, "this graph was freed by an earlier backward"
            if node.is_view and node.inputs[0] in still:
                still.add(node)
                continue
            second[node] = tuple([need and x in still for x, need in zip(node.inputs, node.needs, strict=True)])
            node.needs = tuple([need and x not in still for x, need in zip(node.inputs, node.needs, strict=True)])
        # 2. Visit the nodes that something flows through. Those with parameters wait, with their gradients.
        self.waiting: dict[Tensor | Function, Array] = {}

        def keep(node: Function, dy: Array | None) -> None:
            if dy is not None and True in second[node]:
                self.waiting[node] = dy
                node.needs = second[node]
            else:
                node.free()

        with running():
            announce(self.nodes, self.uses.keys())
            visit([node for node in self.nodes if node in second], {root._node or root: seed}, self.uses, keep)
        self.nodes = [node for node in self.nodes if node in self.waiting or node in still]

    def finish(self) -> None:
        """The second half."""
        with running():
            visit(self.nodes, self.waiting, self.uses, lambda node, _: node.free())
