"""Data parallelism: every rank holds the whole model, trains on its own share of the data, and gradients are averaged.

The document's five steps, and where they are:

    D.3(1) initialise the parameters                 data_parallel: rank 0's go to every rank
    D.3(2) partition the data over the nodes         data.Loader, with data.partition
    D.3(3) each node trains on its own               forward and backward of the wrapped model
    D.3(4) synchronise through communication         DataParallel._synchronise, at the end of backward
    D.3(5) repeat 3 and 4 until done                 the caller's loop

Source  Li et al. 2020, PyTorch Distributed; Rajbhandari et al. 2020, ZeRO (stage 1)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import after_backward, is_grad_enabled
from ..collectives import ALGORITHMS, all_reduce, broadcast, reduce_scatter
from ..comm import Communicator, Request
from ..nn import Module
from ..optim import Optimizer
from ..tensor import Tensor
from .sharded import ShardedOptimizer

COUNT_TAG, USED_TAG = 1000, 1001  # of the messages with sample counts, and with which parameters were used


def data_parallel(
    model: Module, optimizer: Optimizer, comm: Communicator, zero: int = 0, algorithm: str = "auto"
) -> tuple[DataParallel, Optimizer | ShardedOptimizer]:
    """Make a model and its optimizer train on all ranks of `comm` together. Every rank calls it, with equal models.

    The pair that it returns is used as on one rank:

        for images, labels in loader.epoch(epoch):      # this rank's share of the global batch
            optimizer.zero_grad()
            loss = criterion(model(images), labels)     # the mean over the share
            loss.backward()                             # leaves the gradient of the mean over the global batch
            optimizer.step()                            # updates every rank alike

    Gradients are averaged by sample count (the length of the model's first argument), so uneven shares, and empty
    ones, give what one rank would get from the whole batch.

    zero       0: every rank keeps all of the optimizer's state and updates all parameters.
               1: each rank keeps and updates its own 1/P. backward leaves the averaged gradient of that part only.
               Gradients can't add up over several backwards then: call zero_grad before each.
    algorithm  of all_reduce, or of reduce_scatter and all_gather with zero=1; see collectives.ALGORITHMS
    Cost       per step and rank, n bytes of gradients: 2 n (P-1)/P bytes in 2 (P-1) messages with the ring, for either
               `zero`; and to each other rank two messages, of 8 bytes and of a byte per parameter
    Errors     ValueError: another `zero` or algorithm; a trained parameter that the optimizer does not have
    """
    if zero not in (0, 1):
        raise ValueError(f"zero={zero}: choose 0 (nothing sharded) or 1 (the optimizer's state)")
    for operation in ("reduce_scatter", "all_gather") if zero else ("all_reduce",):
        if algorithm not in ("auto", *ALGORITHMS[operation]):
            choice = ", ".join(ALGORITHMS[operation])
            raise ValueError(f"algorithm {algorithm!r}: {operation} has auto, {choice} (with zero={zero})")
    known = {p for part in optimizer.parts for p in part.flat.parameters}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if lost:
        raise ValueError(f"the optimizer lacks parameters that the model trains: {', '.join(lost)}")
    # D.3(1) Initialise the parameters: every rank starts from rank 0's.
    for part in optimizer.parts:
        broadcast(comm, part.flat.data)
        part.flat.changed()
    for p in model.parameters():
        if p not in known:  # frozen, and left out of the optimizer
            broadcast(comm, p.data)
    for _, buffer in model.named_buffers():
        broadcast(comm, buffer.data)
    wrapped = DataParallel(model, optimizer, comm, zero, algorithm)
    return wrapped, ShardedOptimizer(optimizer, comm, algorithm) if zero else optimizer


class DataParallel(Module):
    """A model whose backward ends with the average of all ranks' gradients. Made by `data_parallel`."""

    def __init__(self, module: Module, optimizer: Optimizer, comm: Communicator, zero: int, algorithm: str):
        self.module, self.optimizer, self.comm = module, optimizer, comm
        self.zero, self.algorithm = zero, algorithm
        self.samples = SampleCount(comm)
        self.used = Exchange(comm, USED_TAG)
        self._waiting = False  # whether this backward will synchronise
        self._scattered: dict[Tensor, Tensor] = {}  # the gradients that a reduce-scatter has left
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._gradient_finished)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """D.3(3): this rank's share of the batch, through its own copy of the model."""
        if is_grad_enabled():
            self.samples.add(len(args[0]))
        return self.module(*args, **kwargs)

    def _gradient_finished(self, parameter: Tensor) -> None:
        """The first finished gradient of a backward: synchronise when it has visited everything."""
        if parameter.grad is self._scattered.get(parameter):
            raise RuntimeError(
                "backward adds to gradients of which, with zero=1, this rank has the average of a part only: call "
                "optimizer.zero_grad() before each backward, or use zero=0 to add up gradients"
            )
        if not self._waiting:
            self._waiting = True
            after_backward(self._synchronise)

    def _synchronise(self) -> None:
        """D.3(4): sum over ranks of (samples here / samples everywhere) * gradient here."""
        self._waiting = False
        here, everywhere = self.samples.take()
        parameters = [p for part in self.optimizer.parts for p in part.flat.parameters]
        used = np.array([p.grad is not None for p in parameters])
        self.used.tell(used)
        for part in self.optimizer.parts:
            gradient = part.flat.gradient()
            if not here:
                gradient.fill(0)  # from an empty share may come anything, nan too
            elif here < everywhere:
                gradient *= here / everywhere
            if self.zero:
                reduce_scatter(self.comm, gradient, algorithm=self.algorithm)
            else:
                all_reduce(self.comm, gradient, algorithm=self.algorithm)
        # A parameter that only other ranks used has its gradient now. One that nobody used has none, as on one rank.
        for p, anywhere in zip(parameters, np.logical_or.reduce([used, *self.used.take()]), strict=True):
            if anywhere and p.grad is None:
                p.grad = Tensor(p._grad_buffer)
        if self.zero:
            self._scattered = {p: p.grad for p in parameters if p.grad is not None}

    # The wrapper adds nothing to names: state goes to and from the model itself.

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        self.module.load_state_dict(state, strict)

    def named_parameters(self) -> Any:
        return self.module.named_parameters()

    def named_buffers(self) -> Any:
        return self.module.named_buffers()


class Exchange:
    """A small array that every rank tells every other: sent at once, awaited later, so that nobody waits for it."""

    def __init__(self, comm: Communicator, tag: int):
        self.comm, self.tag = comm, tag
        self.received: list[np.ndarray] = []
        self.pending: list[Request] = []

    def tell(self, mine: np.ndarray) -> None:
        """Send to all other ranks, and prepare to receive as much from each."""
        for other in range(self.comm.size):
            if other != self.comm.rank:
                theirs = np.empty_like(mine)
                self.pending.append(self.comm.irecv(theirs, other, self.tag))
                self.pending.append(self.comm.isend(mine, other, self.tag))
                self.received.append(theirs)

    def take(self) -> list[np.ndarray]:
        """All that the others have told since the last time."""
        for request in self.pending:
            request.wait()
        received, self.received, self.pending = self.received, [], []
        return received


class SampleCount:
    """How many samples the ranks have taken in since the last synchronisation, here and everywhere.

    The counts are sent when forward begins and awaited when backward ends.
    """

    def __init__(self, comm: Communicator):
        self.counts = Exchange(comm, COUNT_TAG)
        self.here: int | None = None  # None: no forward so far

    def add(self, n: int) -> None:
        """Tell every other rank that n more samples are on their way through this rank's model."""
        self.here = (self.here or 0) + n
        self.counts.tell(np.array([n], np.int64))

    def take(self) -> tuple[int, int]:
        """(samples here, samples everywhere); counting begins anew."""
        if self.here is None:
            raise RuntimeError("backward without a forward through the model that data_parallel returned")
        here, self.here = self.here, None
        return here, here + sum(int(n[0]) for n in self.counts.take())
