"""D.1: every sample once an epoch, whatever the counts; batches that do not depend on the ranks; who holds what."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidist.data import Loader, partition
from minidist.data.partition import Partition

Batches = list[np.ndarray]


@st.composite
def cases(draw: Any) -> tuple[int, int, int, list[int], np.ndarray]:
    """(n, size, batch_size, the host of each rank, the label of each sample)."""
    n, size, batch_size = draw(st.integers(0, 200)), draw(st.integers(1, 9)), draw(st.integers(1, 70))
    hosts = draw(st.lists(st.integers(3, 6), min_size=size, max_size=size))  # in no order, and some numbers left out
    labels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, draw(st.integers(1, 12)), n)
    return n, size, batch_size, hosts, labels


def all_four(hosts: list[int], labels: np.ndarray) -> dict[str, Partition]:
    return {
        "uniform": partition.uniform,
        "hierarchical": partial(partition.hierarchical, hosts=hosts),
        "stratified": partial(partition.stratified, labels=labels),
        "skewed": partial(partition.skewed, labels=labels, alpha=0.3),
    }


NAMES = pytest.mark.parametrize("name", ["uniform", "hierarchical", "stratified", "skewed"])


def shares_of(how: Partition, n: int, size: int, batch_size: int, **options: Any) -> list[Batches]:
    return [how(n, size, rank, batch_size, **options) for rank in range(size)]


def together(shares: list[Batches]) -> list[list[int]]:
    """The shares of all ranks put together again, batch by batch."""
    return [np.concatenate(parts).tolist() for parts in zip(*shares, strict=True)]


# -- what all of them promise -----------------------------------------------------------------------------------------


@NAMES
@given(case=cases(), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000), shuffle=st.booleans())
def test_every_sample_is_used_exactly_once_an_epoch(name: str, case: Any, seed: int, epoch: int, shuffle: bool) -> None:
    n, size, batch_size, hosts, labels = case
    options = dict(seed=seed, epoch=epoch, shuffle=shuffle)
    batches = together(shares_of(all_four(hosts, labels)[name], n, size, batch_size, **options))
    assert sorted(sample for batch in batches for sample in batch) == list(range(n))
    # All ranks take equally many steps, and all batches are full but the last.
    assert [len(batch) for batch in batches] == [min(batch_size, n - start) for start in range(0, n, batch_size)]


@NAMES
@given(case=cases(), epoch=st.integers(0, 3), data=st.data())
def test_an_epoch_is_resumed_at_the_same_sample(name: str, case: Any, epoch: int, data: Any) -> None:
    n, size, batch_size, hosts, labels = case
    step = data.draw(st.integers(0, -(-n // batch_size)))
    how = all_four(hosts, labels)[name]
    for rank in range(size):
        whole = how(n, size, rank, batch_size, 5, epoch)
        rest = how(n, size, rank, batch_size, 5, epoch, start=min(step * batch_size, n))
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[step:]]


@NAMES
def test_the_order_changes_with_the_epoch_and_with_the_seed_and_repeats(name: str) -> None:
    how = all_four([0, 0, 1], np.arange(50) % 4)[name]

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(sample for batch in together(shares_of(how, 50, 3, 7, seed=seed, epoch=epoch)) for sample in batch)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == order(2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 2}, "rank 2 is outside a size of 2"),
        ({"rank": -1}, "rank -1 is outside a size of 2"),
        ({"batch_size": 0}, "batch_size 0 is less than 1"),
        ({"n": -1}, "n -1 is negative"),
        ({"seed": -3}, "seed -3 is negative"),
        ({"epoch": -1}, "epoch -1 is negative"),
        ({"start": 11}, "start 11 is outside an epoch of 10 samples"),
        ({"start": -1}, "start -1 is outside"),
    ],
)
@NAMES
def test_bad_arguments_raise_naming_the_values(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        all_four([0, 1], np.zeros(10))[name](**{"n": 10, "size": 2, "rank": 0, "batch_size": 4} | arguments)


# -- uniform ----------------------------------------------------------------------------------------------------------


@given(case=cases())
def test_uniform_and_stratified_batches_do_not_depend_on_the_ranks(case: Any) -> None:
    n, size, batch_size, hosts, labels = case
    for name in ("uniform", "stratified"):
        how = all_four(hosts, labels)[name]
        alone = together(shares_of(how, n, 1, batch_size, seed=3, epoch=5))
        several = together(shares_of(how, n, size, batch_size, seed=3, epoch=5))
        assert list(map(sorted, several)) == list(map(sorted, alone))
        assert name == "stratified" or several == alone


@given(case=cases())
def test_uniform_shares_are_chunks_of_array_split(case: Any) -> None:
    n, size, batch_size, *_ = case
    alone = partition.uniform(n, 1, 0, batch_size)
    for rank in range(size):
        shares = partition.uniform(n, size, rank, batch_size)
        assert [share.tolist() for share in shares] == [np.array_split(batch, size)[rank].tolist() for batch in alone]


def test_without_shuffling_samples_keep_their_order() -> None:
    shares = partition.uniform(7, 2, 1, 4, seed=1, epoch=1, shuffle=False)
    assert [share.tolist() for share in shares] == [[2, 3], [6]]


# -- hierarchical -----------------------------------------------------------------------------------------------------


def held(shares: Batches) -> list[int]:
    return sorted(sample for share in shares for sample in share.tolist())


@given(case=cases(), epoch=st.integers(0, 9))
def test_a_host_has_one_stretch_of_the_samples_as_long_as_its_share_of_the_ranks(case: Any, epoch: int) -> None:
    n, size, batch_size, hosts, _ = case
    shares = shares_of(partial(partition.hierarchical, hosts=hosts), n, size, batch_size, epoch=epoch)
    begin = 0
    for host in dict.fromkeys(hosts):  # in the order of their first ranks, whatever the epoch
        ranks = [rank for rank in range(size) if hosts[rank] == host]
        samples = held([share for rank in ranks for share in shares[rank]])
        assert samples == list(range(begin, begin + len(samples)))
        assert abs(len(samples) - n * len(ranks) / size) < 1
        begin += len(samples)
        # In each batch its ranks' shares differ by one at most.
        for parts in zip(*(shares[rank] for rank in ranks), strict=True):
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(n=st.integers(0, 300), hosts=st.integers(1, 5), each=st.integers(1, 4), batch_size=st.integers(1, 40))
def test_hosts_that_are_alike_take_alike_shares_whatever_ranks_they_have(
    n: int, hosts: int, each: int, batch_size: int
) -> None:
    names = [host for host in range(hosts) for _ in range(each)]
    shares = shares_of(partial(partition.hierarchical, hosts=names), n, hosts * each, batch_size)
    per_host = shares_of(partial(partition.hierarchical, hosts=list(range(hosts))), n, hosts, batch_size)
    assert list(map(sorted, together(shares))) == list(map(sorted, together(per_host)))
    for parts in zip(*per_host, strict=True):
        batch = sum(map(len, parts))
        assert all(abs(len(part) - batch / hosts) <= 2 for part in parts)


def test_hosts_must_name_every_rank() -> None:
    with pytest.raises(ValueError, match=r"hosts \[0, 1\] name 2 ranks, not 3"):
        partition.hierarchical(10, 3, 0, 4, hosts=[0, 1])


# -- by label ---------------------------------------------------------------------------------------------------------


@given(case=cases(), shuffle=st.booleans())
def test_stratified_shares_have_the_labels_in_the_proportions_of_the_whole(case: Any, shuffle: bool) -> None:
    n, size, batch_size, _, labels = case
    shares = shares_of(partial(partition.stratified, labels=labels), n, size, batch_size, shuffle=shuffle)
    kinds, counts = np.unique(labels, return_counts=True)
    for parts in zip(*shares, strict=True):
        batch = np.concatenate(parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for kind, count in zip(kinds, counts):
            of_ranks = [int((labels[part] == kind).sum()) for part in parts]
            assert max(of_ranks) - min(of_ranks) <= 1
            assert abs(sum(of_ranks) - len(batch) * count / n) <= 1 + len(kinds) * count / n + 1e-9


def test_over_an_epoch_stratified_ranks_have_each_label_about_equally_often() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 6400)
    shares = shares_of(partial(partition.stratified, labels=labels), 6400, 4, 64)
    counts = np.array([np.bincount(labels[held(share)], minlength=10) for share in shares])
    assert np.ptp(counts, axis=0).max() <= 0.15 * counts.mean()


@given(case=cases())
def test_a_rank_of_a_skewed_partition_keeps_its_part(case: Any) -> None:
    n, size, batch_size, _, labels = case
    how = partial(partition.skewed, labels=labels, alpha=0.5)
    first, second = (shares_of(how, n, size, batch_size, seed=4, epoch=epoch) for epoch in (0, 7))
    assert list(map(held, first)) == list(map(held, second))


def test_a_small_alpha_leaves_few_labels_a_rank_and_a_large_one_all() -> None:
    labels = np.arange(10_000) % 10

    def largest_part(alpha: float) -> float:
        """Of a rank's samples, those of its most frequent label; the mean over ranks."""
        shares = shares_of(partial(partition.skewed, labels=labels, alpha=alpha), 10_000, 10, 500)
        counts = [np.bincount(labels[held(share)], minlength=10) for share in shares]
        return float(np.mean([count.max() / max(count.sum(), 1) for count in counts]))

    assert largest_part(0.05) > 0.5
    assert largest_part(1e4) < 0.11


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_must_be_above_0(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha .* must be a number above 0"):
        partition.skewed(4, 1, 0, 2, labels=np.zeros(4), alpha=alpha)


@pytest.mark.parametrize("name", ["stratified", "skewed"])
def test_labels_must_be_as_many_as_samples(name: str) -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(9,\) for 10 samples"):
        all_four([0], np.zeros(9))[name](10, 1, 0, 4)


# -- by name, and as a picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("even", "partition 'even': choose uniform, hierarchical, stratified, skewed or skewed:ALPHA"),
        ("uniform:3", "choose uniform"),
        ("skewed:", "ALPHA must be a number above 0"),
        ("skewed:-1", "ALPHA must be a number above 0"),
        ("skewed:much", "ALPHA must be a number above 0"),
        ("hierarchical", r"needs hosts=comm\.hosts\(\)"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(np.zeros((4, 1)), np.zeros(4), 2, partition=name)


@NAMES
def test_the_loader_deals_by_the_name_and_resumes(name: str) -> None:
    labels, hosts = np.arange(60) % 7, [0, 0, 1]
    for rank in range(3):
        loader = Loader(np.arange(60.0)[:, None], labels, 8, rank, 3, seed=2, partition=name, hosts=hosts)
        alpha = {"alpha": 0.5} if name == "skewed" else {}
        expected = partial(all_four(hosts, labels)[name], **alpha)(60, 3, rank, 8, 2, 1)
        assert [images[:, 0].astype(int).tolist() for images, _ in loader.epoch(1)] == [e.tolist() for e in expected]
        rest = [images[:, 0].astype(int).tolist() for images, _ in loader.epoch(1, start=24)]
        assert rest == [e.tolist() for e in expected[3:]]


def test_a_histogram_counts_what_each_rank_is_dealt() -> None:
    labels = np.array([5, 5, 5, 9, 9, 7, 5, 9, 5, 7])
    for name in partition.NAMES:
        loaders = [Loader(np.zeros((10, 1)), labels, 4, rank, 3, partition=name, hosts=[0, 1, 1]) for rank in range(3)]
        dealt = [np.concatenate([share for _, share in own.epoch(0)]) for own in loaders]
        assert loaders[1].histogram().tolist() == [[int((got == kind).sum()) for kind in (5, 7, 9)] for got in dealt]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_picture_has_a_bar_for_each_rank_and_a_colour_for_each_label(tmp_path: Any, kind: str) -> None:
    pytest.importorskip("matplotlib")
    from minidist.data.picture import draw_partitions

    path = tmp_path / f"partition.{kind}"
    draw_partitions({"one": np.array([[3, 4], [5, 6], [0, 2]]), "another": np.ones((3, 30), int)}, path)
    content = path.read_bytes()
    if kind == "svg":
        assert all(f"<!-- {words} -->".encode() in content for words in ("rank 0", "rank 2", "one", "another"))
        draw_partitions({"one": np.array([[3, 4], [5, 6], [0, 2]]), "another": np.ones((3, 30), int)}, path)
        assert path.read_bytes() == content
    else:
        assert content.startswith(b"\x89PNG")
