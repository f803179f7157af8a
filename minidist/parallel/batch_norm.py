"""Batch normalisation over the global batch: the ranks' shares count as the one batch that they are.

With plain BatchNorm2d each rank normalises by its own share: the smaller the share the noisier the statistics, and no
number of ranks gives what one rank would. Here a rank tells the others how many values it has, their mean and their
variance, and all put them together. In backward, what a sample changes of the mean and variance changes the others'
losses too: two sums over all ranks.

Source  Ioffe & Szegedy 2015; Chan, Golub & LeVeque 1979 (putting variances together); PyTorch's SyncBatchNorm
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, device_of, empty, namespace
from ..collectives import all_gather, all_reduce
from ..comm import Communicator
from ..nn import BatchNorm2d, Module
from ..ops.norm import BatchNorm, mean_and_variance, move_running
from ..tensor import Tensor


class SyncBatchNorm(BatchNorm2d):
    """BatchNorm2d that, in training, normalises by the mean and variance over all ranks' shares of the batch.

    x (n, num_features, H, W) -> the same shape. Shares may differ in n, and be empty. The loss must be the mean over
    each rank's share, averaged over the ranks by n, as `data_parallel` does; then outputs, gradients and running
    statistics are those of one rank with the whole batch. Every rank calls forward, and backward if one does.

    Comm    forward in training: all_gather of 2 C + 1 float64 a rank; backward: all_reduce of 2 C numbers
    Errors  ValueError, on every rank: one value per channel in all; those of BatchNorm2d
    """

    def __init__(self, num_features: int, comm: Communicator, **options: Any):
        """`options` as for BatchNorm2d."""
        super().__init__(num_features, **options)
        self.comm = comm

    def normalise(self, x: Tensor, use_batch: bool, momentum: float) -> Tensor:
        if not self.training:
            return super().normalise(x, use_batch, momentum)
        channels = x.shape[1]
        # 1. Tell the others how many values each channel has here, their mean and their variance.
        told = empty((self.comm.size, 2 * channels + 1), np.float64, device_of(x.data))
        mine = told[self.comm.rank]
        mine[0], mine[1:] = x.numel() // max(channels, 1), 0
        if len(x):
            mine[1 : channels + 1], mine[channels + 1 :] = mean_and_variance(x.data)
        all_gather(self.comm, told)
        # 2. Put all ranks' together: around the common mean, each share's variance is larger by its mean's square.
        counts, means, variances = told[:, :1], told[:, 1 : channels + 1], told[:, channels + 1 :]
        n = int(counts.sum())
        if n <= 1:
            raise ValueError(f"SyncBatchNorm: training needs more than 1 value per channel, here x has shape {x.shape}")
        mean = (counts * means).sum(0) / n
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / n
        move_running(self.running_mean, self.running_var, mean, var, n, momentum)
        # 3. Normalise, as one rank would by its batch's.
        mean, var = mean.astype(x.dtype), var.astype(x.dtype)
        return SyncedBatchNorm.apply(
            x, self.weight, self.bias, mean=mean, var=var, eps=self.eps, fixed=False, comm=self.comm, total=n
        )


class SyncedBatchNorm(BatchNorm):
    """BatchNorm, of a share of the batch: the means in its dx are over all ranks' `total` values per channel."""

    def forward(self, *inputs: Any, comm: Communicator, total: int, **options: Any) -> Array:  # type: ignore[override]
        self.comm, self.total = comm, total
        return super().forward(*inputs, **options)

    def means(self, db: Array, dw: Array, n: int) -> tuple[Array, Array]:
        # dy is of the mean loss over this rank's share. All losses count by their samples, so the others' dy must be
        # made larger, or smaller, to be added to ours.
        samples = len(self.saved[0])
        sums = all_reduce(self.comm, namespace(db).stack([db, dw]) * samples)
        sums /= max(samples, 1) * self.total
        return sums[0], sums[1]


def convert_sync_batchnorm(module: Module, comm: Communicator) -> Module:
    """Make SyncBatchNorm of every BatchNorm2d in a model, with the same parameters and buffers; returns the model.

    Call it before the optimizer is made, or after: the parameters are the same.
    """
    if type(module) is BatchNorm2d:
        return _synced(module, comm)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is BatchNorm2d:
                setattr(parent, name, _synced(child, comm))
    return module


def _synced(module: BatchNorm2d, comm: Communicator) -> SyncBatchNorm:
    synced = SyncBatchNorm.__new__(SyncBatchNorm)
    synced.__dict__.update(module.__dict__)
    synced.comm = comm
    return synced
