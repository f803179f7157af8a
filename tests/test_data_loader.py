"""The loader: this rank's share of every batch, scaled, and nothing lost."""

import os

import numpy as np
import pytest

from minidist import backend
from minidist.data import Loader
from minidist.data.mnist import scaled

DEVICE = os.environ.get("MINIDIST_TEST_DEVICE", "cpu")
N = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 6), np.uint8)
LABELS = np.arange(N)  # a label tells which sample it is


def loader(**options) -> Loader:
    return Loader(IMAGES, LABELS, **{"batch_size": 5, "device": DEVICE} | options)


def epoch(dealer: Loader, number: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(backend.to_numpy(images), backend.to_numpy(labels)) for images, labels in dealer.epoch(number)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_ranks_together_deal_the_batches_of_one_rank_and_lose_no_sample(size: int) -> None:
    alone = epoch(loader())
    shares = [epoch(loader(rank=rank, size=size)) for rank in range(size)]
    for step, (images, labels) in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([share[step][0] for share in shares]), images)
        np.testing.assert_array_equal(np.concatenate([share[step][1] for share in shares]), labels)
    assert sorted(np.concatenate([labels for _, labels in alone])) == list(range(N))


def test_len_and_batch_sizes_count_global_batches() -> None:
    for size in (1, 4):
        dealer = loader(size=size)
        assert dealer.batch_sizes == [5, 5, 5, 5, 3]
        assert len(dealer) == len(epoch(dealer)) == 5


def test_a_rank_without_samples_in_the_last_batch_still_takes_the_step() -> None:
    images, labels = epoch(loader(rank=3, size=4))[-1]
    assert images.shape == (0, 6)
    assert labels.shape == (0,)


def test_batches_are_bit_for_bit_the_rows_of_the_scaled_images() -> None:
    for dtype in (np.float32, np.float64):
        whole = scaled(IMAGES, dtype)
        for images, labels in epoch(loader(dtype=dtype)):
            assert (images.dtype, labels.dtype) == (dtype, np.int64)
            np.testing.assert_array_equal(images, whole[labels])


def test_images_that_are_numbers_already_are_not_scaled() -> None:
    numbers = np.linspace(-3, 3, N * 4, dtype=np.float32).reshape(N, 2, 2)
    dealer = Loader(numbers, LABELS.astype(np.uint8), 4, device=DEVICE)
    for images, labels in epoch(dealer):
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(images, numbers[labels])


def test_epochs_are_shuffled_anew_and_repeat_by_seed() -> None:
    def order(seed: int, number: int) -> list[int]:
        return np.concatenate([labels for _, labels in epoch(loader(seed=seed), number)]).tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(5, 2) == order(5, 2)
    assert np.concatenate([labels for _, labels in epoch(loader(shuffle=False), 2)]).tolist() == list(range(N))


def test_a_batch_is_the_callers_to_keep() -> None:
    batches = iter(loader().epoch(0))
    first, _ = next(batches)
    kept = first.copy()
    next(batches)[0][...] = -1
    np.testing.assert_array_equal(backend.to_numpy(first), backend.to_numpy(kept))


def test_bad_arguments_raise_at_the_call_naming_both_values() -> None:
    with pytest.raises(ValueError, match="23 images do not fit 22 labels"):
        Loader(IMAGES, LABELS[:-1], 5)
    for options, message in (
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 4, "size": 4}, "rank 4 is outside a size of 4"),
        ({"seed": -1}, "seed -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(**options)
