"""The loader: a data set in memory, dealt to this rank batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .mnist import scaled
from .partition import uniform


class Loader:
    """This rank's share of every global batch, in an order that changes with the epoch and repeats with the seed.

        loader = Loader(*read_mnist("train"), batch_size=512, rank=comm.rank, size=comm.size)
        for epoch in range(10):
            for images, labels in loader.epoch(epoch):
                ...

    `batch_size` counts the samples of all ranks together: batch and seed decide which samples meet in a step, the
    number of ranks does not (`partition.uniform`). A rank's share of a small last batch may be empty; it is still
    yielded, so that all ranks take equally many steps. len(loader) is the number of steps in an epoch.

    The images stay on `device` as they are given. Where they are uint8, a batch is scaled to [0, 1] as it is dealt,
    so that a data set takes 1 byte a pixel and not 4. Each batch is a new array, the caller's to keep.

    Shapes  images (n, ...), labels (n,) -> a batch of images (share, ...) `dtype`, labels (share,) int64
    Errors  ValueError: other numbers of images than labels; those of `partition.uniform`
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
    ):
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images do not fit {len(labels)} labels")
        self.images = backend.to(images, device)
        self.labels = backend.asarray(labels, np.int64, device)
        self.batch_size, self.rank, self.size = batch_size, rank, size
        self.seed, self.shuffle, self.dtype, self.device = seed, shuffle, dtype, device
        self._indices(epoch=0)  # refuses bad arguments here, not in the first step

    def __len__(self) -> int:
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> list[int]:
        """How many samples each global batch has, over all ranks: what a rank's share is weighted against."""
        n = len(self.labels)
        return [min(self.batch_size, n - start) for start in range(0, n, self.batch_size)]

    def epoch(self, epoch: int) -> Iterator[tuple[Array, Array]]:
        """Deal all batches of one epoch, counted from 0."""
        for indices in self._indices(epoch):
            indices = backend.to(indices, self.device)
            images = self.images.take(indices, axis=0)
            if images.dtype == np.uint8:
                images = scaled(images, self.dtype)
            else:
                images = images.astype(self.dtype, copy=False)
            yield images, self.labels.take(indices)

    def _indices(self, epoch: int) -> list[np.ndarray]:
        """This rank's sample indices, batch by batch (D.1)."""
        n = len(self.labels)
        return uniform(n, self.size, self.rank, self.batch_size, self.seed, epoch, self.shuffle)
