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
from ..collectives import all_reduce, broadcast, reduce_scatter
from ..comm import Communicator, Request
from ..nn import Module
from ..optim import Optimizer
from ..tensor import Tensor
from .sharded import ShardedOptimizer

COUNT_TAG = 1000  # of the messages that carry sample counts


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
    algorithm  of all_reduce (with zero=0), see collectives.ALGORITHMS
    Cost       per step and rank, n bytes of gradients: 2 n (P-1)/P bytes in 2 (P-1) messages with the ring, for either
               `zero`, and P - 1 messages of 8 bytes
    Errors     ValueError: another `zero`; a trained parameter that the optimizer does not have
    """
    if zero not in (0, 1):
        raise ValueError(f"zero={zero}: choose 0 (nothing sharded) or 1 (the optimizer's state)")
    known = {p for part in optimizer.parts for p in part.flat.parameters}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if lost:
        raise ValueError(f"the optimizer lacks parameters that the model trains: {', '.join(lost)}")
    # D.3(1) Initialise the parameters: every rank starts from rank 0's.
    for part in optimizer.parts:
        broadcast(comm, part.flat.data)
        part.flat.changed()
    for _, buffer in model.named_buffers():
        broadcast(comm, buffer.data)
    wrapped = DataParallel(model, optimizer, comm, zero, algorithm)
    return wrapped, ShardedOptimizer(optimizer, comm) if zero else optimizer


class DataParallel(Module):
    """A model whose backward ends with the average of all ranks' gradients. Made by `data_parallel`."""

    def __init__(self, module: Module, optimizer: Optimizer, comm: Communicator, zero: int, algorithm: str):
        self.module, self.optimizer, self.comm = module, optimizer, comm
        self.zero, self.algorithm = zero, algorithm
        self.samples = SampleCount(comm)
        self._waiting = False  # whether this backward will synchronise
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
        if not self._waiting:
            self._waiting = True
            after_backward(self._synchronise)

    def _synchronise(self) -> None:
        """D.3(4): sum over ranks of (samples here / samples everywhere) * gradient here."""
        self._waiting = False
        here, everywhere = self.samples.take()
        for part in self.optimizer.parts:
            gradient = part.flat.gradient()
            if not here:
                gradient.fill(0)  # from an empty share may come anything, nan too
            elif here < everywhere:
                gradient *= here / everywhere
            if self.zero:
                reduce_scatter(self.comm, gradient)
            else:
                all_reduce(self.comm, gradient, algorithm=self.algorithm)
            # A parameter that only other ranks used has its gradient now.
            for p in part.flat.parameters:
                if p.grad is None:
                    p.grad = Tensor(p._grad_buffer)

    # The wrapper adds nothing to names: state goes to and from the model itself.

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        self.module.load_state_dict(state, strict)

    def named_parameters(self) -> Any:
        return self.module.named_parameters()

    def named_buffers(self) -> Any:
        return self.module.named_buffers()


class SampleCount:
    """How many samples the ranks have taken in since the last synchronisation, here and everywhere.

    The counts are sent when forward begins and awaited when backward ends, so nobody waits for them.
    """

    def __init__(self, comm: Communicator):
        self.comm = comm
        self.here = 0
        self.received: list[np.ndarray] = []
        self.pending: list[Request] = []

    def add(self, n: int) -> None:
        """Tell every other rank that n more samples are on their way through this rank's model."""
        self.here += n
        mine = np.array([n], np.int64)
        for other in range(self.comm.size):
            if other != self.comm.rank:
                theirs = np.empty(1, np.int64)
                self.pending.append(self.comm.irecv(theirs, other, COUNT_TAG))
                self.pending.append(self.comm.isend(mine, other, COUNT_TAG))
                self.received.append(theirs)

    def take(self) -> tuple[int, int]:
        """(samples here, samples everywhere); counting begins anew."""
        for request in self.pending:
            request.wait()
        here, everywhere = self.here, self.here + sum(int(n[0]) for n in self.received)
        if not everywhere and not self.received and self.comm.size > 1:
            raise RuntimeError("backward without a forward through the model that data_parallel returned")
        self.here, self.received, self.pending = 0, [], []
        return here, everywhere
