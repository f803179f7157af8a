"""The same bits on any number of ranks: gradients of fixed microbatches, added in one fixed tree.

Floating-point sums depend on their order, and data parallelism adds in an order that depends on the ranks: each sums
over its share, then shares are added. Here the global batch is cut into M microbatches, whatever the ranks; each has a
backward of its own, on whichever rank; and their gradients are added as the leaves of one tree (fixed_tree.py):

    8 microbatches    0   1   2   3   4   5   6   7
    on 2 ranks        [---- rank 0 ---][---- rank 1 ---]
    on 3 ranks        [- rank 0 -][- rank 1 -][rank 2 ]
    the sum           ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))      always

What else would tell the ranks' number apart is fixed too: BLAS works on one core (or as many as the user has set), and
the generator of random numbers (for dropout) is seeded by step and microbatch. Modules that remember batches by
themselves (BatchNorm) see those of their rank, and are beyond this.
"""

from __future__ import annotations

import numpy as np

from .. import backend
from ..collectives import ALGORITHMS, all_gather, broadcast
from ..comm import Communicator
from ..comm.threads import one_core
from ..optim.optimizer import Part
from . import fixed_tree
from .buckets import Bucket
from .meter import Meter


class Microbatches:
    """Which of a step's microbatches this rank has, and which comes next."""

    def __init__(self, number: int, comm: Communicator):
        self.number, self.mine = number, fixed_tree.share(number, comm.size, comm.rank)
        self.step, self.next = 0, self.mine.start
        drawn = backend.default_generator().numpy.integers(1 << 62, size=1)
        self.seed = int(broadcast(comm, drawn)[0])
        one_core()

    def before_forward(self) -> None:
        """Random numbers depend on step and microbatch."""
        key = np.random.SeedSequence((self.seed, self.step, self.next))
        backend.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def after_backward(self, last: bool) -> None:
        """One is done, the last of this step or not."""
        self.next += 1
        done = self.next - self.mine.start
        if done > len(self.mine) or (last and done < len(self.mine)):
            raise RuntimeError(
                f"reproducible={self.number}: this rank has {len(self.mine)} of the microbatches in each step, and "
                f"this was number {done}: give each a backward, all but the last under no_sync"
            )
        if last:
            self.step, self.next = self.step + 1, self.mine.start


class FixedBucket(Bucket):
    """One flat buffer's gradients, added up microbatch by microbatch in the fixed tree."""

    final = True

    def __init__(self, part: Part, comm: Communicator, zero: int, algorithm: str, meter: Meter, micro: Microbatches):
        super().__init__(part, comm, zero, algorithm, None, meter)
        self.tree = fixed_tree.TreeSum(micro.number, micro.mine.start, micro.mine.stop)
        self.used = [False] * len(part.flat.parameters)

    def keep(self, samples: int) -> None:
        """A microbatch's backward is over: its gradient is a leaf, weighted by its samples."""
        flat = self.part.flat
        self.check_fresh()
        if self.tree.next == self.tree.first:
            self.used = [False] * len(self.used)
        self.used = [before or p.grad is not None for before, p in zip(self.used, flat.parameters, strict=True)]
        gradient = flat.gradient()
        if samples:
            gradient *= samples
        else:
            gradient.fill(0)  # from no samples may come anything, nan too
        self.tree.add(gradient)
        for p in flat.parameters:
            p.grad = None

    def skip(self) -> None:
        super().skip()
        self.tree.clear()

    def start(self, weight: float | None, background: bool, check: bool = True) -> None:
        """Add up; `weight` is that of one sample."""
        self.meter.weigh(trees=sum(array.nbytes for _, _, array in self.tree.nodes))
        gradient = self.part.flat.grad
        chunk = fixed_tree.reduce_scatter(self.comm, self.tree, gradient)
        chunk *= weight
        if not self.zero:
            known = self.algorithm in ALGORITHMS["all_gather"]
            all_gather(self.comm, gradient, self.algorithm if known else "auto")
        self.tree.clear()
