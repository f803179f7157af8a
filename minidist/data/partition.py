"""D.1 data partition (数据划分): which samples each rank takes in each step of an epoch.

A partition is a function that returns one rank's sample indices, batch by batch. Every rank computes it for itself,
from the same seed, so that nothing is sent.
"""

from __future__ import annotations

import numpy as np


def uniform(
    n: int, size: int, rank: int, batch_size: int, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[np.ndarray]:
    """D.1 uniform (均匀划分): deal `n` samples evenly, in global batches of `batch_size`; this rank's share of each.

    All samples are put in an order drawn from (seed, epoch), or kept in theirs without `shuffle`. Global batch k is
    order[k * batch_size : (k + 1) * batch_size], so it does not depend on the number of ranks; the last one may be
    smaller. Rank r takes chunk r of np.array_split(batch, size): shares differ by one sample at most, and some are
    empty where a batch has fewer samples than there are ranks. Every sample is used exactly once an epoch.

    Shapes  ceil(n / batch_size) arrays of int64, equally many on every rank; their lengths differ
    Errors  ValueError: a rank outside the size, a batch of less than 1 sample, a negative n, seed or epoch
    """
    _check(n, size, rank, batch_size, seed, epoch)
    order = _shuffled(n, seed, epoch) if shuffle else np.arange(n)
    batches = (order[start : start + batch_size] for start in range(0, n, batch_size))
    return [_share(batch, size, rank) for batch in batches]


def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """0 .. n-1 in the order of (seed, epoch). The spawn key keeps epochs, and weights of the same seed, independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(n)


def _share(batch: np.ndarray, size: int, rank: int) -> np.ndarray:
    """np.array_split(batch, size)[rank], without making the others' shares: the first ranks take one sample more."""
    each, extra = divmod(len(batch), size)
    start = rank * each + min(rank, extra)
    return batch[start : start + each + (rank < extra)]


def _check(n: int, size: int, rank: int, batch_size: int, seed: int, epoch: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is outside a size of {size}: ranks are 0 .. size - 1")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is less than 1")
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} {value} is negative")
