"""D.1: every sample once an epoch, whatever the counts; batches that do not depend on the ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidist.data import partition

COUNTS = {"n": st.integers(0, 200), "size": st.integers(1, 9), "batch_size": st.integers(1, 70)}


def global_batches(n: int, size: int, batch_size: int, **order: int) -> list[np.ndarray]:
    """The shares of all ranks put together again, batch by batch."""
    shares = [partition.uniform(n, size, rank, batch_size, **order) for rank in range(size)]
    return [np.concatenate(parts) for parts in zip(*shares, strict=True)]


@given(**COUNTS, seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_every_sample_is_used_exactly_once_an_epoch(n: int, size: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = global_batches(n, size, batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(n))


@given(**COUNTS)
def test_the_global_batches_are_those_of_one_rank(n: int, size: int, batch_size: int) -> None:
    together = global_batches(n, size, batch_size, seed=3, epoch=5)
    alone = partition.uniform(n, 1, 0, batch_size, seed=3, epoch=5)
    assert [batch.tolist() for batch in together] == [batch.tolist() for batch in alone]
    assert all(len(batch) == batch_size for batch in alone[:-1])


@given(**COUNTS)
def test_shares_are_chunks_of_array_split(n: int, size: int, batch_size: int) -> None:
    alone = partition.uniform(n, 1, 0, batch_size)
    for rank in range(size):
        shares = partition.uniform(n, size, rank, batch_size)
        assert [share.tolist() for share in shares] == [np.array_split(batch, size)[rank].tolist() for batch in alone]


def test_the_order_changes_with_the_epoch_and_with_the_seed_and_repeats() -> None:
    orders = {
        (seed, epoch): tuple(np.concatenate(partition.uniform(50, 1, 0, 7, seed, epoch)).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == tuple(np.concatenate(partition.uniform(50, 1, 0, 7, 2, 3)).tolist())


def test_without_shuffling_samples_keep_their_order() -> None:
    shares = partition.uniform(7, 2, 1, 4, seed=1, epoch=1, shuffle=False)
    assert [share.tolist() for share in shares] == [[2, 3], [6]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 2}, "rank 2 is outside a size of 2"),
        ({"rank": -1}, "rank -1 is outside a size of 2"),
        ({"batch_size": 0}, "batch_size 0 is less than 1"),
        ({"n": -1}, "n -1 is negative"),
        ({"seed": -3}, "seed -3 is negative"),
        ({"epoch": -1}, "epoch -1 is negative"),
    ],
)
def test_bad_arguments_raise_naming_the_values(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.uniform(**{"n": 10, "size": 2, "rank": 0, "batch_size": 4} | arguments)
