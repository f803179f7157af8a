"""D.1 data partition (数据划分): which samples each rank takes in each step of an epoch.

    uniform (均匀划分)        every global batch dealt evenly to the ranks
    hierarchical (分层划分)   hosts first, each with its own part of the data; then the ranks within a host
    stratified (分层, by class)  as uniform, and every share has the labels in the proportions of the whole
    skewed                   each rank has its own part, with few labels (Dirichlet): for experiments

A partition is a function that returns one rank's sample indices, batch by batch. Every rank computes it for itself,
from the same seed, so that nothing is sent. All of them put the samples in one order, the same on all ranks, and cut
it: global batch k is order[k * batch_size : (k + 1) * batch_size], the last one may be smaller. So every sample is used
exactly once an epoch, all ranks take equally many steps, and an epoch is resumed behind any sample (`start`). They
differ in the order, and in who takes which sample of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

Batches = list[np.ndarray]
Partition = Callable[..., Batches]  # with the arguments of `uniform`; others are given beforehand


def uniform(
    n: int,
    size: int,
    rank: int,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    start: int = 0,
) -> Batches:
    """D.1 uniform (均匀划分): deal `n` samples evenly, in global batches of `batch_size`; this rank's share of each.

    All samples are put in an order drawn from (seed, epoch), or kept in theirs without `shuffle`; the first `start` are
    left out, since all ranks together have had them. Rank r takes chunk r of np.array_split(batch, size): shares differ
    by one sample at most, and some are empty where a batch has fewer samples than there are ranks.

    Stays the same  the global batches, whatever the number of ranks
    Shapes          ceil((n - start) / batch_size) arrays of int64, equally many on every rank; their lengths differ
    Errors          ValueError: a rank outside the size, a batch of less than 1 sample, a negative n, seed or epoch, a
                    start outside the epoch
    """
    _check(n, size, rank, batch_size, seed, epoch, start)
    order = _shuffled(n, seed, epoch) if shuffle else np.arange(n)
    return [_chunk(batch, size, rank) for batch in _cut(order[start:], batch_size)]


def hierarchical(
    n: int,
    size: int,
    rank: int,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    start: int = 0,
    *,
    hosts: Sequence[int],
) -> Batches:
    """D.1 hierarchical (分层划分): each host has its own part of the data, and deals it to its ranks.

    `hosts` is a number for the host of each rank (`comm.hosts()`). A host's part is one stretch of the samples, as long
    as its share of the ranks, and the same in every epoch, so that a host needs only that. In every batch each host
    has its share of the samples (to within two, of hosts that are alike), which is dealt to its ranks as in `uniform`.

    Stays the same  with other numbers of ranks per host, but equal on all hosts: the global batches. With other hosts,
                    which samples can meet in a batch changes too: those of two hosts are never shuffled among them
    Shapes, Errors  as for uniform; ValueError: `hosts` is not of the ranks' number
    """
    _check(n, size, rank, batch_size, seed, epoch, start)
    if len(hosts) != size:
        raise ValueError(f"hosts {list(hosts)} name {len(hosts)} ranks, not {size}")
    # 1. Hosts, in the order of their first ranks: each has one stretch of the samples.
    ranks_of = {host: [r for r in range(size) if hosts[r] == host] for host in hosts}
    ends = n * np.cumsum([len(ranks) for ranks in ranks_of.values()]) // size
    parts = np.split(np.arange(n), ends[:-1])
    if shuffle:
        parts = [part[_shuffled(len(part), seed, epoch, index)] for index, part in enumerate(parts)]
    order, owner = _woven(parts)
    # 2. Ranks within the host.
    mine, ranks = list(ranks_of).index(hosts[rank]), ranks_of[hosts[rank]]
    return [
        _chunk(batch[whose == mine], len(ranks), ranks.index(rank))
        for batch, whose in zip(_cut(order[start:], batch_size), _cut(owner[start:], batch_size))
    ]


def stratified(
    n: int,
    size: int,
    rank: int,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    start: int = 0,
    *,
    labels: np.ndarray,
) -> Batches:
    """D.1 in the other reading of 分层: in every rank's share each label is as frequent as in the whole.

    A batch has of each label its proportion (to within two samples, of labels that are equally frequent), and the
    ranks' shares of that differ by one at most.

    Stays the same  the global batches, whatever the number of ranks
    Shapes, Errors  labels (n,) of any dtype; as for uniform. ValueError: another number of labels
    """
    _check(n, size, rank, batch_size, seed, epoch, start)
    labels = _checked_labels(labels, n)
    parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if shuffle:
        parts = [part[_shuffled(len(part), seed, epoch, index)] for index, part in enumerate(parts)]
    order, owner = _woven(parts, _generator(seed, epoch, len(parts)).random(len(parts)) if shuffle else None)
    # Dealt like cards, label by label, one after the other; in each batch another rank is the first, or those that are
    # would have more of the first labels over the epoch.
    return [
        batch[np.argsort(whose, kind="stable")][(rank - number) % size :: size]
        for number, (batch, whose) in enumerate(
            zip(_cut(order[start:], batch_size), _cut(owner[start:], batch_size)), start // batch_size
        )
    ]


def skewed(
    n: int,
    size: int,
    rank: int,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    start: int = 0,
    *,
    labels: np.ndarray,
    alpha: float = 0.5,
) -> Batches:
    """For experiments: each rank has its own part of the data, in which a few labels prevail.

    Each label's samples are divided among the ranks in proportions drawn from a Dirichlet distribution with all
    parameters `alpha`: 0.1 leaves most ranks two or three labels of ten, 100 is nearly uniform. That is drawn from the
    seed alone, so a rank's part is the same in every epoch. Parts differ in length, a rank's share of a batch likewise.

    Stays the same  nothing, with another number of ranks: they are dealt other parts, and so are the batches
    Shapes, Errors  as for stratified; ValueError: alpha is not above 0
    Source          Hsu, Qi & Brown 2019, section 3 (there with the roles of labels and ranks exchanged)
    """
    _check(n, size, rank, batch_size, seed, epoch, start)
    labels = _checked_labels(labels, n)
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha {alpha} must be a number above 0")
    draw = _generator(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(size)]
    for label in np.unique(labels):
        samples = draw.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(draw.dirichlet([alpha] * size)) * len(samples)
        for part, samples_of_rank in zip(parts, np.split(samples, ends[:-1].astype(int))):
            part.append(samples_of_rank)
    whole = [np.sort(np.concatenate([*part, np.empty(0, int)])) for part in parts]
    if shuffle:
        whole = [part[_shuffled(len(part), seed, epoch, index)] for index, part in enumerate(whole)]
    order, owner = _woven(whole)
    return [
        batch[whose == rank] for batch, whose in zip(_cut(order[start:], batch_size), _cut(owner[start:], batch_size))
    ]


NAMES = ("uniform", "hierarchical", "stratified", "skewed")


def named(name: str, labels: Any, hosts: Sequence[int] | None = None) -> Partition:
    """The partition of a name: one of NAMES, or "skewed:ALPHA".

    Errors  ValueError: no such name; no number after the colon; hierarchical without hosts
    """
    kind, colon, alpha = name.partition(":")
    if kind not in NAMES or (colon and kind != "skewed"):
        raise ValueError(f"partition {name!r}: choose uniform, hierarchical, stratified, skewed or skewed:ALPHA")
    if kind == "uniform":
        return uniform
    if kind == "hierarchical":
        if hosts is None:
            raise ValueError("partition 'hierarchical' needs hosts=comm.hosts()")
        return partial(hierarchical, hosts=hosts)
    if kind == "stratified":
        return partial(stratified, labels=labels)
    if not colon:
        return partial(skewed, labels=labels)
    try:
        number = float(alpha)
    except ValueError:
        number = 0.0
    if not 0 < number < np.inf:
        raise ValueError(f"partition {name!r}: ALPHA must be a number above 0")
    return partial(skewed, labels=labels, alpha=number)


# -- parts and orders -----------------------------------------------------------------------------------------------


def _woven(parts: list[np.ndarray], phases: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All parts in one order, each spread evenly over it and in its own order; and whose each sample is.

    Sample i of a part of m stands at (i + phase) / m, phase 0.5 if not given. So of k parts any stretch of the order
    holds their proportions; of a part of m of all n samples, to within 1 + k m / n.
    """
    phases = np.full(len(parts), 0.5) if phases is None else phases
    places = [(np.arange(len(part)) + phase) / max(len(part), 1) for part, phase in zip(parts, phases)]
    order = np.argsort(np.concatenate([*places, []]), kind="stable")
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate([*parts, np.empty(0, int)]).astype(int)[order], owner[order]


def _generator(seed: int, *key: int) -> np.random.Generator:
    """The key keeps epochs, parts, and weights of the same seed, independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _shuffled(n: int, seed: int, *key: int) -> np.ndarray:
    """0 .. n-1 in the order of seed and key."""
    return _generator(seed, *key).permutation(n)


def _cut(order: np.ndarray, batch_size: int) -> Batches:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _chunk(batch: np.ndarray, size: int, rank: int) -> np.ndarray:
    """np.array_split(batch, size)[rank], without making the others' shares: the first ranks take one sample more."""
    each, extra = divmod(len(batch), size)
    start = rank * each + min(rank, extra)
    return batch[start : start + each + (rank < extra)]


def _checked_labels(labels: Any, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels of shape {labels.shape} for {n} samples")
    return labels


def _check(n: int, size: int, rank: int, batch_size: int, seed: int, epoch: int, start: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is outside a size of {size}: ranks are 0 .. size - 1")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is less than 1")
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} {value} is negative")
    if not 0 <= start <= n:
        raise ValueError(f"start {start} is outside an epoch of {n} samples")
