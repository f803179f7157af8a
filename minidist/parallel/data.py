"""Data parallelism: every rank holds the whole model, trains on its own share of the data, and gradients are averaged.

The document's five steps, and where they are:

    D.3(1) initialise the parameters                 data_parallel: rank 0's go to every rank
    D.3(2) partition the data over the nodes         data.Loader, with data.partition
    D.3(3) each node trains on its own               forward and backward of the wrapped model
    D.3(4) synchronise through communication         averaging.py: bucket by bucket, while backward goes on
    D.3(5) repeat 3 and 4 until done                 the caller's loop

Source  Li et al. 2020, PyTorch Distributed; Rajbhandari et al. 2020, ZeRO
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .. import backend
from ..autograd import bytes_kept, is_grad_enabled
from ..backend import Array
from ..collectives import all_reduce
from ..comm import Communicator
from ..nn import Module
from ..optim import Optimizer, clip_grad_norm_
from ..optim.clip import clip_arrays
from ..recomputation import tensors_in
from ..tensor import Tensor
from .averaging import Averaging
from .buckets import Bucket, cut, cut_by_layer, size_of_buckets
from .counting import counted
from .layers import Layers
from .meter import Meter
from .reproducible import FixedBucket, Microbatches
from .sharded import ShardedOptimizer
from .starting import check_options, start_alike


def data_parallel(
    model: Module,
    optimizer: Optimizer,
    comm: Communicator,
    zero: int = 0,
    algorithm: str = "auto",
    compress: str | None = None,
    bucket_bytes: int | None = None,
    reproducible: int | None = None,
) -> tuple[DataParallel, Optimizer | ShardedOptimizer]:
    """Make a model and its optimizer train on all ranks of `comm` together. Every rank calls it, with equal models.

    The pair that it returns is used as on one rank:

        for images, labels in loader.epoch(epoch):      # this rank's share of the global batch
            optimizer.zero_grad()
            loss = criterion(model(images), labels)     # the mean over the share
            loss.backward()                             # leaves the gradient of the mean over the global batch
            optimizer.step()                            # updates every rank alike

    Gradients are averaged by sample count (the length of the model's first argument, or what `model.count` was told),
    so uneven shares, and empty ones, give what one rank would get from the whole batch. On every rank backward must go
    through the model: the others wait for it at the end of theirs.

    zero          what is sharded, see parallel/sharded.py. 0: nothing.
                  1: the optimizer's state. backward leaves the averaged gradient of this rank's part only, so gradients
                  can't add up over several backwards, but under model.no_sync().
                  2: the gradients as well. After backward p.grad is None; the optimizer has them. They add up.
                  3: the parameters as well, a layer at a time. They are there in their module's forward and backward
                  only, or inside of `with model.whole():`. All ranks must go through the same layers, in one order.
                  Clip with the returned model's clip_grad_norm_, not optim's, which would see a part only.
    algorithm     of all_reduce, or of reduce_scatter and all_gather with zero; see collectives.ALGORITHMS
    compress      send less than the whole gradients: "fp16", "bf16", "topk:0.01", "randomk:0.01", "sign" or
                  "powersgd:4", see parallel/compression. All of a dtype at once; with zero=3, layer by layer. With any
                  `zero` a rank remembers all of what it left out; and `algorithm` is not used for gradients then
    bucket_bytes  gradients travel in buckets of at least so many bytes (but the last), and a bucket sets off as soon as
                  backward has finished it; see parallel/buckets.py, also for what is chosen without it. With zero=3
                  they travel layer by layer
    reproducible  the number of microbatches that every global batch is cut into, for the same bits on any number of
                  ranks, see parallel/reproducible.py. This rank has fixed_tree.share(reproducible, P, rank) of them.
                  Each gets a backward, from the mean over its samples, all but the last under no_sync. With zero 0, 1
    Gradients in 16 bits are added up in float32, and travel so; with compress="fp16" they are added up so, but travel
    as they are. See optim.with_master_weights and optim.GradScaler.

    Cost          per step and rank, n bytes of gradients: 2 n (P-1)/P bytes in 2 (P-1) messages a bucket with the ring;
                  with zero=3, 3 n (P-1)/P in 3 (P-1) a layer, and more if backward comes back to a layer. And an
                  all-gather, in ceil(lg P) messages, of 8 bytes a rank and 8 more a parameter tensor (where there are
                  several buckets, another of 16 bytes)
    Errors        ValueError: another `zero` or algorithm; a trained parameter that the optimizer does not have; what
                  does not go together. TypeError: a pair that has been through here
    """
    if isinstance(model, DataParallel) or isinstance(optimizer, ShardedOptimizer):
        raise TypeError("this pair has been through data_parallel already: give it the model and optimizer themselves")
    make = check_options(comm.size, zero, algorithm, compress, bucket_bytes, reproducible)
    start_alike(model, optimizer, comm)
    # D.2 Parameter partition: all ranks have all parameters, kept in step by an all-reduce; or a part each, with zero.
    # The optimizer works bucket by bucket, too.
    if zero == 3:
        optimizer.parts = [piece for part in optimizer.parts for piece in cut_by_layer(part, model)]
    elif make is None and reproducible is None:
        nbytes = size_of_buckets(comm, zero) if bucket_bytes is None else bucket_bytes
        optimizer.parts = [piece for part in optimizer.parts for piece in cut(part, nbytes)]
    meter = Meter(comm, optimizer)
    sharded = ShardedOptimizer(optimizer, model, comm, zero, algorithm, meter) if zero else optimizer
    layers = sharded.layers if isinstance(sharded, ShardedOptimizer) else None
    position = {p: i for i, p in enumerate(model.parameters())}
    micro = None if reproducible is None else Microbatches(reproducible, comm)
    # Several buckets set off at other moments on other ranks, so they must not meet what a layer sends in backward.
    group = comm.split(0) if len(optimizer.parts) > 1 else comm
    assert group is not None
    buckets = [
        Bucket(part, group, zero, algorithm, make, meter)
        if micro is None
        else FixedBucket(part, group, zero, algorithm, meter, micro)
        for part in optimizer.parts
    ]
    buckets.sort(key=lambda bucket: -min(position.get(p, -1) for p in bucket.part.flat.parameters))
    return DataParallel(model, optimizer, comm, zero, buckets, layers, micro, meter), sharded


class DataParallel(Module):
    """A model whose backward ends with the average of all ranks' gradients. Made by `data_parallel`.

    After a backward that has failed on all ranks, the next forward brings them together again.

    meter  where time and memory went: see parallel/meter.py
    """

    def __init__(
        self,
        module: Module,
        optimizer: Optimizer,
        comm: Communicator,
        zero: int,
        buckets: list[Bucket],
        layers: Layers | None,
        micro: Microbatches | None,
        meter: Meter,
    ):
        self.module, self.optimizer, self.comm, self.zero = module, optimizer, comm, zero
        self.buckets, self.layers, self.micro, self.meter = buckets, layers, micro, meter
        self.averaging = Averaging(comm, zero, buckets, layers, micro, meter)
        self._largest = 0  # samples of the largest forward so far

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """D.3(3): this rank's share of the batch, through its own copy of the model."""
        if not is_grad_enabled():
            return self.module(*args, **kwargs)
        self.averaging.give_up()  # what a backward that failed has left
        first, *_ = *args, *kwargs.values()
        samples, key = len(first), object()
        if self.micro is not None:
            self.micro.before_forward()
        result = self.module(*args, **kwargs)
        if samples > self._largest:
            self._largest = samples
            self.meter.weigh(bytes_kept(tensors_in(result)))
        return counted(result, partial(self.averaging.take_in, key, samples))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here leave this rank's own gradients, which add up; the next one outside averages the sum.

        The samples of all of them count then. So for k microbatches of a rank's share, of m_j samples each, let each
        backward's loss be m_j / Σ m times the mean over the microbatch, and all but the last be in here. Each rank has
        whole gradients meanwhile, with any `zero`; with zero=3 layers are gathered as ever, and ranks must all use
        something of the same layers.
        """
        before, self.averaging.syncing = self.averaging.syncing, False
        try:
            yield
        finally:
            self.averaging.syncing = before

    def count(self, number: int) -> None:
        """Say what the next average is weighted by, in the place of the samples: the tokens, say, of this rank's share.

        For losses that are means over something else than samples (tokens that are no padding), of which ranks have
        different numbers: all that were taken in since the last average. Every rank calls it before the backward that
        averages; with `reproducible`, before each backward, for that one. SyncBatchNorm knows nothing of it, and weighs
        ranks by their samples.
        """
        if operator.index(number) < 0:
            raise ValueError(f"count({number}): less than 0")
        self.averaging.told = operator.index(number)

    # -- what the caller may ask for --------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the averaged gradients, in place, so that the norm of all together is at most max_norm.

        Between backward and step; every rank calls it, and gets the norm before. As optim.clip_grad_norm_, also where
        each rank has a part of the gradients only.

        Cost  an all-reduce of one number with zero; else none, since all ranks have the same gradients
        """
        if not self.zero:
            theirs = [p for part in self.optimizer.parts for p in part.flat.parameters]
            every = dict.fromkeys([*self.module.parameters(), *theirs])
            return clip_grad_norm_(every, max_norm, norm_type, error_if_nonfinite)
        mine: list[Array] = []
        scales: list[float] = []
        for part in self.optimizer.parts:
            part.flat.collect()
            mine += part.gradients()
            scales += [part.flat.grad_scale] * (len(mine) - len(scales))
        op = "max" if norm_type == math.inf else "sum"
        with self.meter.waiting(), self.comm.step("D.3(4) clip gradients"):
            flats = [part.flat for part in self.optimizer.parts]
            dtype = np.result_type(np.float32, *[flat.dtype for flat in flats])
            mine.append(backend.full((1,), 0, dtype, flats[0].device))  # a rank may have none
            scales.append(1.0)
            add_up = partial(all_reduce, self.comm, op=op)
            return clip_arrays(mine, max_norm, norm_type, error_if_nonfinite, add_up, scales=scales)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In here all parameters are there on every rank, also with zero=3; changes to them stay. Every rank calls it.

        Cost  with zero=3, n (P-1)/P bytes a rank and room for the whole model; else none
        """
        if self.layers is None:
            yield
            return
        self.layers.gather()
        try:
            yield
        finally:
            self.layers.scatter()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        self.module.zero_grad(set_to_none)

    # The wrapper adds nothing to names: state goes to and from the model itself. With zero=3 every rank must ask.

    def state_dict(self) -> dict[str, Any]:
        with self.whole():
            state = self.module.state_dict()
            return state if self.layers is None else {name: array.copy() for name, array in state.items()}

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        with self.whole():
            self.module.load_state_dict(state, strict)

    def named_parameters(self) -> Any:
        return self.module.named_parameters()

    def named_buffers(self) -> Any:
        return self.module.named_buffers()
