"""The loader: a data set in memory, dealt to this rank batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .mnist import scaled
from .partition import named, uniform


class Loader:
    """This rank's share of every global batch, in an order that changes with the epoch and repeats with the seed.

        loader = Loader(*read_mnist("train"), batch_size=512, rank=comm.rank, size=comm.size)
        for epoch in range(10):
            for images, labels in loader.epoch(epoch):
                ...

    `batch_size` counts the samples of all ranks together. `partition` says which of them a rank takes: "uniform",
    "hierarchical" (with hosts=comm.hosts()), "stratified", "skewed" or "skewed:ALPHA", as in partition.py. With
    "uniform", batch and seed decide which samples meet in a step, and the number of ranks does not. A rank's share of a
    batch may be empty; it is still yielded, so that all ranks take equally many steps. len(loader) is the number of
    steps in an epoch.

    The images stay on `device` as they are given. Where they are uint8, a batch is scaled to [0, 1] as it is dealt,
    so that a data set takes 1 byte a pixel and not 4. Each batch is a new array, the caller's to keep.

    Shapes  images (n, ...), labels (n,) -> a batch of images (share, ...) `dtype`, labels (share,) int64
    Errors  ValueError: other numbers of images than labels; those of the partition
    """

    def __init__(
        self,
        images: Array,
        labels: Array,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        dtype: Any = np.float32,
        device: str = "cpu",
        partition: str = "uniform",
        hosts: Sequence[int] | None = None,
    ):
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images do not fit {len(labels)} labels")
        self.images = backend.to(images, device)
        self.labels = backend.asarray(labels, np.int64, device)
        self.batch_size, self.rank, self.size = batch_size, rank, size
        self.seed, self.shuffle, self.dtype, self.device = seed, shuffle, dtype, device
        self.partition = named(partition, np.asarray(labels), hosts)
        self._order: tuple[int, np.ndarray] | None = None  # an epoch, and its samples in order
        self.shares(epoch=0)  # refuses bad arguments here, not in the first step

    def __len__(self) -> int:
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> list[int]:
        """How many samples each global batch has, over all ranks: what a rank's share is weighted against."""
        n = len(self.labels)
        return [min(self.batch_size, n - start) for start in range(0, n, self.batch_size)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """Deal all batches of one epoch, counted from 0.

        `start` resumes an epoch in the middle: behind the samples that all ranks together have had (k * batch_size,
        after k steps). What is left is dealt as it would have been.
        """
        for indices in self.shares(epoch, start):
            yield self._batch(indices)

    def _batch(self, indices: np.ndarray) -> tuple[Array, Array]:
        indices = backend.to(indices, self.device)
        images = self.images.take(indices, axis=0)
        if images.dtype == np.uint8:
            images = scaled(images, self.dtype)
        else:
            images = images.astype(self.dtype, copy=False)
        return images, self.labels.take(indices)

    def take(self, epoch: int, start: int, size: int) -> tuple[Array, Array]:
        """The samples start … start + size of an epoch's order, which all ranks have alike: what a scheduler deals."""
        if self._order is None or self._order[0] != epoch:
            n = len(self.labels)
            whole = uniform(n, 1, 0, max(n, 1), self.seed, epoch, self.shuffle)
            self._order = (epoch, np.concatenate([*whole, np.empty(0, int)]).astype(int))
        return self._batch(self._order[1][start : start + size])

    def shares(self, epoch: int, start: int = 0, rank: int | None = None) -> list[np.ndarray]:
        """The indices of this rank's samples (or another's), batch by batch (D.1)."""
        who, n = self.rank if rank is None else rank, len(self.labels)
        return self.partition(n, self.size, who, self.batch_size, self.seed, epoch, self.shuffle, start)

    def histogram(self) -> np.ndarray:
        """How many samples of each label each rank gets in an epoch.   (size, labels) int64; labels in sorted order"""
        labels, kinds = np.unique(backend.to_numpy(self.labels), return_inverse=True)
        counts = [
            np.bincount(
                kinds[np.concatenate([*self.shares(0, rank=rank), np.empty(0, int)]).astype(int)], minlength=len(labels)
            )
            for rank in range(self.size)
        ]
        return np.array(counts)
