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

import math
from typing import Any

import numpy as np

from .. import backend
from ..autograd import after_backward, is_grad_enabled
from ..backend import Array
from ..collectives import ALGORITHMS, all_gather, all_reduce, broadcast, reduce_scatter
from ..comm import Communicator
from ..nn import Module
from ..optim import Optimizer, clip_grad_norm_
from ..optim.clip import clip_arrays
from ..tensor import Function, Tensor
from .compression import Make, compression_of
from .sharded import ShardedOptimizer


def data_parallel(
    model: Module,
    optimizer: Optimizer,
    comm: Communicator,
    zero: int = 0,
    algorithm: str = "auto",
    compress: str | None = None,
) -> tuple[DataParallel, Optimizer | ShardedOptimizer]:
    """Make a model and its optimizer train on all ranks of `comm` together. Every rank calls it, with equal models.

    The pair that it returns is used as on one rank:

        for images, labels in loader.epoch(epoch):      # this rank's share of the global batch
            optimizer.zero_grad()
            loss = criterion(model(images), labels)     # the mean over the share
            loss.backward()                             # leaves the gradient of the mean over the global batch
            optimizer.step()                            # updates every rank alike

    Gradients are averaged by sample count (the length of the model's first argument), so uneven shares, and empty
    ones, give what one rank would get from the whole batch. On every rank backward must go through the model: the
    others wait for it at the end of theirs.

    zero       0: every rank keeps all of the optimizer's state and updates all parameters.
               1: each rank keeps and updates its own 1/P. backward leaves the averaged gradient of that part only.
               Gradients can't add up over several backwards then: call zero_grad before each. To clip them, call
               the returned model's clip_grad_norm_, not optim's, which would see a part only.
    algorithm  of all_reduce, or of reduce_scatter and all_gather with zero=1; see collectives.ALGORITHMS
    compress   send less than the whole gradients: "fp16", "bf16", "topk:0.01", "randomk:0.01", "sign" or "powersgd:4",
               see parallel/compression. With zero=0 only; `algorithm` is not used then
    Cost       per step and rank, n bytes of gradients: 2 n (P-1)/P bytes in 2 (P-1) messages with the ring, for either
               `zero`; and an all-gather, in ceil(lg P) messages, of 8 bytes a rank and 8 more a parameter tensor
    Errors     ValueError: another `zero` or algorithm; a trained parameter that the optimizer does not have
    """
    if isinstance(model, DataParallel) or isinstance(optimizer, ShardedOptimizer):
        raise TypeError("this pair has been through data_parallel already: give it the model and optimizer themselves")
    if zero not in (0, 1):
        raise ValueError(f"zero={zero}: choose 0 (nothing sharded) or 1 (the optimizer's state)")
    for operation in ("reduce_scatter", "all_gather") if zero else ("all_reduce",):
        if algorithm not in ("auto", *ALGORITHMS[operation]):
            choice = ", ".join(ALGORITHMS[operation])
            raise ValueError(f"algorithm {algorithm!r}: {operation} has auto, {choice} (with zero={zero})")
    if compress is not None and zero:
        raise ValueError(f"compress={compress!r} with zero={zero}: a part of the gradients cannot be compressed alone")
    make = None if compress is None else compression_of(compress)
    known = {p for part in optimizer.parts for p in part.flat.parameters}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if lost:
        raise ValueError(f"the optimizer lacks parameters that the model trains: {', '.join(lost)}")
    # D.3(1) Initialise the parameters: every rank starts from rank 0's.
    with comm.step("D.3(1) initialise"):
        for part in optimizer.parts:
            broadcast(comm, part.flat.data)
            part.flat.changed()
        for p in model.parameters():
            if p not in known:  # frozen, and left out of the optimizer
                broadcast(comm, p.data)
        for _, buffer in model.named_buffers():
            broadcast(comm, buffer.data)
    wrapped = DataParallel(model, optimizer, comm, zero, algorithm, make)
    return wrapped, ShardedOptimizer(optimizer, comm, algorithm) if zero else optimizer


class DataParallel(Module):
    """A model whose backward ends with the average of all ranks' gradients. Made by `data_parallel`."""

    def __init__(
        self, module: Module, optimizer: Optimizer, comm: Communicator, zero: int, algorithm: str, make: Make | None
    ):
        self.module, self.optimizer, self.comm = module, optimizer, comm
        self.zero, self.algorithm = zero, algorithm
        self.compressions = None if make is None else [make(comm, part.flat) for part in optimizer.parts]
        self._taken: dict[object, int] = {}  # of each forward that this backward goes through: its samples
        self._scattered: dict[Tensor, Tensor] = {}  # the gradients that a reduce-scatter has left
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _: after_backward(self._synchronise))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """D.3(3): this rank's share of the batch, through its own copy of the model."""
        if not is_grad_enabled():
            return self.module(*args, **kwargs)
        self._taken.clear()  # of what a backward that failed has left
        first, *_ = *args, *kwargs.values()
        return _counted(self.module(*args, **kwargs), model=self, key=object(), samples=len(first))

    def _synchronise(self) -> None:
        """D.3(4): the gradient of the mean over all ranks' samples, Σ n_r g_r / Σ n_r."""
        if not self._taken:
            raise RuntimeError("backward without a forward through the model that data_parallel returned")
        here = sum(self._taken.values())
        self._taken.clear()
        parameters = [p for part in self.optimizer.parts for p in part.flat.parameters]
        if any(p.grad is not None and p.grad is self._scattered.get(p) for p in parameters):
            raise RuntimeError(
                "backward adds to gradients of which, with zero=1, this rank has the average of a part only: call "
                "optimizer.zero_grad() before each backward, or use zero=0 to add up gradients"
            )
        with self.comm.step("D.3(4) average gradients"):
            # 1. Tell one another how many samples were taken in, and which parameters were used.
            mine = [here, *(p.grad is not None for p in parameters)]
            told = np.empty((self.comm.size, len(mine)), np.int64)
            told[self.comm.rank] = mine
            all_gather(self.comm, told, "bruck")
            counts, used = told[:, 0], np.logical_or.reduce(told[:, 1:])
            # 2. Add up. Equal shares need the plain mean, for which each rank divides its own chunk only; others are
            #    weighted before. From an empty share may come anything, nan too.
            equal = bool((counts == counts[0]).all()) and self.compressions is None
            for index, part in enumerate(self.optimizer.parts):
                gradient = part.flat.gradient()
                if not here:
                    gradient.fill(0)
                elif not equal:
                    gradient *= here / int(counts.sum())
                if self.compressions is not None:
                    self.compressions[index].add_up(gradient)
                    continue
                reduce = reduce_scatter if self.zero else all_reduce
                reduce(self.comm, gradient, "mean" if equal else "sum", algorithm=self.algorithm)
        # 3. A parameter that only other ranks used has a gradient now. One that nobody used has none, as on one rank.
        for p, anywhere in zip(parameters, used, strict=True):
            if anywhere and p.grad is None:
                p.grad = Tensor(p._grad_buffer)
        if self.zero:
            self._scattered = {p: p.grad for p in parameters if p.grad is not None}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the averaged gradients, in place, so that the norm of all together is at most max_norm.

        Between backward and step; every rank calls it, and gets the norm before. As optim.clip_grad_norm_, also where
        each rank has a part of the gradients only.

        Cost  an all-reduce of one number with zero=1; else none, since all ranks have the same gradients
        """
        if not self.zero:
            return clip_grad_norm_(self.module.parameters(), max_norm, norm_type, error_if_nonfinite)
        mine = []
        for part in self.optimizer.parts:
            part.flat.collect()
            mine += [
                part.flat.grad[max(start, part.start) : min(stop, part.stop)]
                for p, (start, stop) in zip(part.flat.parameters, part.flat.bounds, strict=True)
                if p.grad is not None and max(start, part.start) < min(stop, part.stop)
            ]
        op = "max" if norm_type == math.inf else "sum"
        with self.comm.step("D.3(4) clip gradients"):
            all_of_them = [part.flat.grad for part in self.optimizer.parts]
            dtype = np.result_type(*[gradient.dtype for gradient in all_of_them])
            mine.append(backend.full((1,), 0, dtype, backend.device_of(all_of_them[0])))  # a rank may have none
            return clip_arrays(
                mine, max_norm, norm_type, error_if_nonfinite, lambda own: all_reduce(self.comm, own, op)
            )

    # The wrapper adds nothing to names: state goes to and from the model itself.

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        self.module.load_state_dict(state, strict)

    def named_parameters(self) -> Any:
        return self.module.named_parameters()

    def named_buffers(self) -> Any:
        return self.module.named_buffers()


class Counted(Function):
    """y, unchanged. Its backward notes that the samples of this forward take part, and asks to synchronise at the end.

    Not every forward is followed by a backward (one that forgot no_grad, in an evaluation), so forward can't count.
    """

    is_view = True

    def forward(self, y: Array, model: DataParallel, key: object, samples: int) -> Array:
        self.model, self.key, self.samples = model, key, samples
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        self.model._taken[self.key] = self.samples
        after_backward(self.model._synchronise)
        return (dy,)


def _counted(y: Any, **forward: Any) -> Any:
    """`y` with each tensor in it counted: a tensor, or a tuple, list or dict of such."""
    if isinstance(y, Tensor):
        return Counted.apply(y, **forward)
    if isinstance(y, tuple | list):
        return type(y)([_counted(value, **forward) for value in y])
    if isinstance(y, dict):
        return {name: _counted(value, **forward) for name, value in y.items()}
    return y
