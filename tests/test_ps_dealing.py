"""Who trains on which samples: everything dealt, nothing twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from minidist.parallel.parameter_server.dealing import BY_SPEED, EVEN, IN_TURN, Dealer, Share

RANKS = [4, 2, 9, 3, 7, 5]  # workers' numbers are any
SIZES = dict(samples=st.integers(1, 60), batch=st.integers(1, 70), workers=st.integers(1, 6))


def batches(samples: int, batch: int) -> list[np.ndarray]:
    """Of one epoch."""
    return [np.arange(start, min(start + batch, samples)) for start in range(0, samples, batch)]


def indices(share: Share) -> np.ndarray:
    return np.arange(share.start, share.start + share.size)


@given(**SIZES, epochs=st.integers(1, 3), data=st.data())
def test_even_shares_are_an_array_split_of_each_batch(
    samples: int, batch: int, workers: int, epochs: int, data: st.DataObject
) -> None:
    members, clock = RANKS[:workers], 0
    dealer = Dealer(samples, batch, workers, EVEN)
    for epoch in range(epochs):
        for whole in batches(samples, batch):
            expected = dict(zip(sorted(members), np.array_split(whole, workers), strict=True))
            for worker in data.draw(st.permutations(members)):  # in whatever order they ask
                share = dealer.deal(worker, clock, members, 3, 0.1 * worker)
                assert share.epoch == epoch
                assert_array_equal(indices(share), expected[worker])
            clock += 1
    assert dealer.newest == clock - 1


@given(**SIZES, speeds=st.lists(st.floats(0.1, 100), min_size=6, max_size=6))
def test_by_speed_everyone_has_a_share_as_long_as_it_is_fast(
    samples: int, batch: int, workers: int, speeds: list[float]
) -> None:
    members = sorted(RANKS[:workers])
    dealer = Dealer(samples, batch, workers, BY_SPEED)
    whole = batches(samples, batch)
    first = [dealer.deal(w, 0, members, 0, 0.0) for w in members]  # nobody's speed is known
    assert [s.size for s in first] == [len(part) for part in np.array_split(whole[0], workers)]
    total = sum(speeds[:workers])
    # Everyone reports 12 samples in 12 / speed seconds; the first to ask has its share cut before the rest do.
    for w, speed in zip(members, speeds):
        dealer.deal(w, 1, members, 12, 12 / speed)
    for clock in range(2, 2 * len(whole) + 2):
        shares = [dealer.deal(w, clock, members, 12, 12 / speed) for w, speed in zip(members, speeds)]
        batch_now = whole[clock % len(whole)]
        assert_array_equal(np.concatenate([indices(s) for s in shares]), batch_now)
        assert {s.epoch for s in shares} == {clock // len(whole)}
        if len(batch_now) < workers:
            continue
        # One sample each, the rest by speed, rounded up or down.
        sizes = np.array([s.size for s in shares])
        ideal = 1 + (len(batch_now) - workers) * np.array(speeds[:workers]) / total
        assert sizes.min() >= 1
        assert (abs(sizes - ideal) < 1 + 1e-6).all()


def test_by_speed_by_hand() -> None:
    dealer = Dealer(1000, 100, 2, BY_SPEED)
    for w, seconds in ((1, 1.0), (2, 3.0)):
        dealer.deal(w, 0, [1, 2], 30, seconds)  # 30 and 10 samples a second
    assert dealer.deal(1, 1, [1, 2], 0, 0.0) == Share(0, 100, 75)  # 1 + 98 * 3/4 = 74.5, and what rounding leaves
    assert dealer.deal(2, 1, [1, 2], 0, 0.0) == Share(0, 175, 25)
    dealer.deal(1, 1, [1, 2], 30, 3.0)  # it has become slow: (30 + 10) / 2
    assert dealer.deal(1, 2, [1, 2], 0, 0.0).size == 1 + 65  # 65.3 and 32.7: the larger fraction is rounded up
    assert dealer.deal(2, 1, [1, 2], 0, 0.0) == Share(0, 175, 25)  # what was cut stays cut


def test_by_speed_who_is_behind_has_less_to_do() -> None:
    dealer = Dealer(1000, 100, 2, BY_SPEED)
    for clock in range(4):
        dealer.deal(1, clock, [1, 2], 50, 1.0)
        if clock < 2:
            dealer.deal(2, clock, [1, 2], 50, 1.0)  # equally fast, but it has stood still since
    # It is two clocks behind the other, so it is let off two tenths: 98 * 0.8 / 1.8 = 43.6.
    assert dealer.deal(1, 4, [1, 2], 50, 1.0).size == 100 - 45
    assert dealer.deal(2, 4, [1, 2], 50, 1.0).size == 45


@given(**SIZES, data=st.data(), how=st.sampled_from([EVEN, BY_SPEED]))
def test_who_is_behind_finds_the_share_that_was_cut_for_it(
    samples: int, batch: int, workers: int, data: st.DataObject, how: str
) -> None:
    members = sorted(RANKS[:workers])
    dealer, clocks = Dealer(samples, batch, workers, how), dict.fromkeys(members, 0)
    got: dict[int, list[Share]] = {}
    last = 2 * len(batches(samples, batch))
    while min(clocks.values()) < last:  # any order, as far apart as ssp:5 allows
        able = [w for w in members if clocks[w] < last and clocks[w] <= min(clocks.values()) + 5]
        w = data.draw(st.sampled_from(able))
        got.setdefault(clocks[w], []).append(dealer.deal(w, clocks[w], members, 5, data.draw(st.floats(0.01, 10))))
        clocks[w] += 1
    for clock, shares in got.items():
        covered = np.sort(np.concatenate([indices(s) for s in shares]))
        assert_array_equal(covered, batches(samples, batch)[clock % len(batches(samples, batch))])


def test_who_is_a_hundred_clocks_behind_finds_its_share_too() -> None:
    # ssp:100 allows it. Speeds change meanwhile, so that a batch that is cut anew would be cut elsewhere.
    dealer = Dealer(1000, 100, 2, BY_SPEED)
    fast = [dealer.deal(1, clock, [1, 2], 10, 1.0 / (clock + 1)) for clock in range(101)]
    slow = [dealer.deal(2, clock, [1, 2], 10, 1.0) for clock in range(101)]
    for clock, (a, b) in enumerate(zip(fast, slow, strict=True)):
        covered = np.sort(np.concatenate([indices(a), indices(b)]))
        assert_array_equal(covered, np.arange(100) + 100 * (clock % 10), err_msg=f"clock {clock}")


@given(**SIZES, epochs=st.integers(1, 4), data=st.data())
def test_in_turn_every_sample_comes_once_an_epoch(
    samples: int, batch: int, workers: int, epochs: int, data: st.DataObject
) -> None:
    dealer, clocks = Dealer(samples, batch, workers, IN_TURN), [0] * workers
    got: list[list[np.ndarray]] = [[] for _ in range(epochs + 1)]
    while not got[epochs]:
        w = data.draw(st.integers(0, workers - 1))  # whoever asks
        share = dealer.deal(w, clocks[w], list(range(workers)), 1, 1.0)
        clocks[w] += 1
        assert 1 <= share.size <= max(batch // workers, 1)
        got[share.epoch].append(indices(share))
    for epoch in range(epochs):
        assert_array_equal(np.concatenate(got[epoch]), np.arange(samples))
    assert got[epochs][0][0] == 0


@pytest.mark.parametrize("how", [EVEN, BY_SPEED])
def test_who_joins_has_shares_from_then_on_and_who_leaves_none(how: str) -> None:
    dealer, members = Dealer(24, 6, 3, how), {0: [3, 4, 5], 1: [3, 4, 5, 8], 2: [3, 4, 5, 8], 3: [4, 8]}
    for clock, now in members.items():
        shares = [dealer.deal(w, clock, now, 0, 0.0) for w in now]
        expected = np.array_split(np.arange(6 * clock, 6 * clock + 6), len(now))
        for share, part in zip(shares, expected, strict=True):
            assert_array_equal(indices(share), part)
    assert dealer.deal(3, 3, members[3], 0, 0.0).size == 0  # its batch is cut already, without it


def test_dealers_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="samples=-1, batch_size=4"):
        Dealer(-1, 4, 1, EVEN)
    with pytest.raises(ValueError, match="samples=4, batch_size=0"):
        Dealer(4, 0, 1, EVEN)
    assert Dealer(0, 1, 1, EVEN).deal(1, 5, [1], 0, 0.0) == Share(0, 0, 0)
