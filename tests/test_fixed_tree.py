"""The sum along a fixed tree: the same bits on any number of ranks, and those of a recursive sum on one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from ranks import on_ranks

from minidist import backend
from minidist.collectives import all_reduce, chunk_slice
from minidist.comm import Communicator, Network, simulate
from minidist.parallel import fixed_tree
from minidist.parallel.fixed_tree import TreeSum, nodes_of, share

LEAVES = [1, 2, 3, 5, 8, 12, 24]
SIZES = [0, 1, 3, 37, 1000]  # for 8 ranks: nothing, fewer elements than ranks, chunks of two sizes


def leaf(index: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    """Numbers of very different sizes, some of them -0.0, and no two leaves alike."""
    rng = np.random.default_rng((index, n))
    numbers = rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3, n)
    numbers[rng.random(n) < 0.2] = -0.0
    return numbers.astype(dtype)


def strange(index: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    """With infinities, of which some meet their opposite, and nans of many bit patterns, some in every leaf."""
    rng = np.random.default_rng((index, n, 1))
    numbers, bits = leaf(index, n, dtype), leaf(index, n, dtype).view(unsigned(dtype))
    numbers[rng.random(n) < 0.2] = np.inf
    numbers[rng.random(n) < 0.2] = -np.inf
    bits[:] = np.array(np.nan if index % 2 else -np.nan, dtype).view(bits.dtype) + np.arange(n) % 99
    nans = rng.random(n) < 0.2
    numbers[nans] = bits.view(dtype)[nans]
    numbers[:2] = -0.0
    return numbers


def unsigned(dtype: Any) -> np.dtype:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return bool((one.view(unsigned(one.dtype)) == other.view(unsigned(other.dtype))).all())


def assert_same_bits(actual: np.ndarray, desired: np.ndarray) -> None:
    assert actual.dtype == desired.dtype
    assert_array_equal(actual.view(unsigned(actual.dtype)), desired.view(unsigned(desired.dtype)))


def reference(leaves: list[np.ndarray]) -> np.ndarray:
    """The sum of the first 1, 2, 4, 8, ... leaves, as many as are fewer than all, plus that of the others."""

    def total(part: list[np.ndarray]) -> np.ndarray:
        if len(part) == 1:
            return part[0]
        half = 1
        while 2 * half < len(part):
            half *= 2
        return np.add(total(part[:half]), total(part[half:]))

    whole = total(leaves)
    return np.where(np.isnan(whole), np.array(np.nan, whole.dtype), whole)


def tree_of(comm: Communicator, leaves: int, n: int, dtype: Any = np.float32, make: Any = leaf) -> TreeSum:
    """This rank's leaves, added, all from one array as a training loop would."""
    mine = share(leaves, comm.size, comm.rank)
    tree = TreeSum(leaves, mine.start, mine.stop)
    buffer = np.empty(n, dtype)
    for index in mine:
        buffer[:] = make(index, n, dtype)
        tree.add(buffer)
        assert_same_bits(buffer, make(index, n, dtype))
        buffer[:] = 999
    return tree


def junk(n: int, dtype: Any = np.float32) -> np.ndarray:
    return np.full(n, 7, dtype)


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", LEAVES)
@on_ranks(1, 2, 3, 4, 5, 8)
def test_every_rank_gets_the_bits_of_the_sum_on_one_rank(comm: Communicator, leaves: int) -> None:
    for n in SIZES:
        want = reference([leaf(i, n) for i in range(leaves)])
        out = junk(n)
        assert fixed_tree.all_reduce(comm, tree_of(comm, leaves, n), out) is out
        assert_same_bits(out, want)


@pytest.mark.parametrize("leaves", LEAVES)
@on_ranks(1, 2, 3, 4, 5, 8)
def test_reduce_scatter_fills_this_ranks_chunk_of_out_and_nothing_else(comm: Communicator, leaves: int) -> None:
    for n in SIZES:
        out, want = junk(n), junk(n)
        mine = chunk_slice(n, comm.size, comm.rank)
        want[mine] = reference([leaf(i, n) for i in range(leaves)])[mine]
        chunk = fixed_tree.reduce_scatter(comm, tree_of(comm, leaves, n), out)
        assert_same_bits(out, want)
        assert_same_bits(chunk, want[mine])
        assert chunk.base is out


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("leaves", [1, 2, 5, 12])
@on_ranks(1, 2, 3, 4, 5, 8)
def test_nans_infinities_and_zeros_have_the_same_bits_too(comm: Communicator, leaves: int, dtype: str) -> None:
    n = 211
    with np.errstate(invalid="ignore"):
        want = reference([strange(i, n, dtype) for i in range(leaves)])
        got = fixed_tree.all_reduce(comm, tree_of(comm, leaves, n, dtype, strange), junk(n, dtype))
    assert_same_bits(got, want)
    assert np.isnan(got).any() and (leaves > 5 or np.isinf(got).any())
    assert np.signbit(got[:2]).all() and not got[:2].any()


@on_ranks(1, 2, 3, 5)
def test_arrays_of_more_dims_are_summed_in_place(comm: Communicator) -> None:
    mine = share(7, comm.size, comm.rank)
    tree, out = TreeSum(leaves=7, first=mine.start, stop=mine.stop), junk(24).reshape(2, 3, 4)
    for index in mine:
        tree.add(leaf(index, 24).reshape(4, 3, 2).T)  # not contiguous either
    got = fixed_tree.all_reduce(comm, tree, out, algorithm="ring")
    assert got is out
    assert_same_bits(out, reference([leaf(i, 24).reshape(4, 3, 2).T for i in range(7)]))


@on_ranks(1, 2, 3, 4)
def test_a_tree_can_be_summed_again_and_cleared_and_filled_again(comm: Communicator) -> None:
    tree = tree_of(comm, 11, 50)
    want = reference([leaf(i, 50) for i in range(11)])
    for _ in range(2):
        assert_same_bits(fixed_tree.all_reduce(comm, tree, junk(50)), want)
    tree.clear()
    for index in share(11, comm.size, comm.rank):
        tree.add(leaf(index + 100, 50))
    want = reference([leaf(i + 100, 50) for i in range(11)])
    assert_same_bits(fixed_tree.all_reduce(comm, tree, junk(50)), want)


def test_the_numbers_of_these_tests_tell_one_order_from_another() -> None:
    """Or they could not fail. A sum per rank, then over ranks, is another one on every number of ranks."""
    leaves = [leaf(i, 1000) for i in range(24)]
    sums = [reference(leaves), reference(leaves[::-1]), sum(leaves[1:], leaves[0])]
    for ranks in (2, 3, 5, 8):
        partial = [sum(leaves[part.start + 1 : part.stop], leaves[part.start]) for part in shares(24, ranks)]
        sums.append(sum(partial[1:], partial[0]))
    for i, one in enumerate(sums):
        assert not any(same_bits(one, other) for other in sums[:i])
    for few in (3, 5, 8, 12):
        assert not same_bits(reference(leaves[:few]), reference(leaves[1:few] + leaves[:1]))

    def ring(comm: Communicator) -> np.ndarray:
        partial = [leaves[i] for i in share(24, comm.size, comm.rank)]
        return all_reduce(comm, sum(partial[1:], partial[0]), algorithm="ring")

    rings = [simulate(ring, ranks).results[0] for ranks in (2, 4, 8)]
    assert not same_bits(rings[0], rings[1]) and not same_bits(rings[1], rings[2])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_strange_numbers_of_these_tests_have_nans_to_tell_apart(dtype: str) -> None:
    one, other = strange(0, 211, dtype), strange(1, 211, dtype)
    both = np.isnan(one) & np.isnan(other)
    assert both.any() and (one.view(unsigned(dtype)) != other.view(unsigned(dtype)))[both].all()


def test_on_a_gpu_too(device: str) -> None:
    for dtype in ("float16", "float32", "float64"):
        want = reference([leaf(i, 37, dtype) for i in range(12)])
        want[:1] = np.nan

        def program(comm: Communicator, dtype: str = dtype) -> np.ndarray:
            mine = share(12, comm.size, comm.rank)
            tree = TreeSum(12, mine.start, mine.stop)
            for index in mine:
                host = leaf(index, 37, dtype)
                host[:1] = np.nan
                tree.add(backend.to(host, device))
            out = backend.to(junk(37, dtype), device)
            return backend.to_numpy(fixed_tree.all_reduce(comm, tree, out))

        for ranks in (1, 2, 3, 5, 13):
            for got in simulate(program, ranks).results:
                assert_array_equal(got, want)
                numbers = ~np.isnan(want)
                assert_same_bits(got[numbers], want[numbers])


# -- who has which nodes ----------------------------------------------------------------------------------------------


def shares(leaves: int, ranks: int) -> list[range]:
    return [share(leaves, ranks, rank) for rank in range(ranks)]


def covered(leaves: int, level: int, index: int) -> range:
    return range(min(index * 2**level, leaves), min((index + 1) * 2**level, leaves))


def test_the_nodes_of_the_modules_drawing() -> None:
    assert shares(8, 3) == [range(3), range(3, 6), range(6, 8)]
    assert [nodes_of(8, part) for part in shares(8, 3)] == [[(1, 0), (0, 2)], [(0, 3), (1, 2)], [(1, 3)]]


@given(st.integers(1, 300), st.integers(1, 50))
def test_all_ranks_nodes_together_are_the_leaves_and_as_few_as_can_be(leaves: int, ranks: int) -> None:
    parts = [list(part) for part in np.array_split(np.arange(leaves), ranks)]
    assert [list(part) for part in shares(leaves, ranks)] == parts
    root = math.ceil(math.log2(leaves))
    every = []
    for part in shares(leaves, ranks):
        nodes = nodes_of(leaves, part)
        assert len(nodes) <= min(2 * root + 1, 2 * math.log2(len(part) + 1))
        for level, index in nodes:
            every += covered(leaves, level, index)
            above = covered(leaves, level + 1, index // 2)
            assert level == root or not (above[0] in part and above[-1] in part)
        assert all(one[0] != other[0] or one[1] // 2 != other[1] // 2 for one, other in pairwise(nodes))
    assert every == list(range(leaves))


@given(st.integers(1, 100).flatmap(lambda m: st.tuples(st.just(m), st.integers(0, m), st.integers(0, m))))
def test_a_tree_sum_has_those_nodes_at_every_moment(case: tuple[int, int, int]) -> None:
    leaves, (first, stop) = case[0], sorted(case[1:])
    tree = TreeSum(leaves, first, stop)
    for index in range(first, stop):
        tree.add(np.eye(leaves)[index])  # so that a node's array shows which leaves are in it
        assert tree.next == index + 1
        assert [node[:2] for node in tree.nodes] == nodes_of(leaves, range(first, index + 1))
        for level, i, array in tree.nodes:
            want = np.zeros(leaves)
            want[covered(leaves, level, i)] = 1
            assert_array_equal(array, want)


def test_memory_is_used_again() -> None:
    tree = TreeSum(16, 0, 16)
    made: dict[int, np.ndarray] = {}  # kept, so that no address comes twice
    for _ in range(3):
        for index in range(16):
            tree.add(leaf(index, 5))
            made |= {array.ctypes.data: array for _, _, array in tree.nodes}
        assert_same_bits(tree.nodes[0][2], reference([leaf(i, 5) for i in range(16)]))
        tree.clear()
    assert len(made) <= 4  # 15 leaves make 4 nodes, and the last one is only added


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("leaves", LEAVES)
def test_it_sends_what_its_docstring_says(leaves: int, ranks: int) -> None:
    for n in (120, 37):
        half = simulate(lambda comm, n=n: fixed_tree.reduce_scatter(comm, tree_of(comm, leaves, n), junk(n)), ranks)
        for rank, part in enumerate(shares(leaves, ranks)):
            chunk = chunk_slice(n, ranks, rank)
            k = len(nodes_of(leaves, part))
            assert half.bytes_by_rank[rank] == 4 * k * (n - (chunk.stop - chunk.start))
            if n == 120:
                assert half.bytes_by_rank[rank] == 4 * k * n * (ranks - 1) / ranks
            assert half.messages_by_rank[rank] == ranks - 1
        whole = simulate(
            lambda comm, n=n: fixed_tree.all_reduce(comm, tree_of(comm, leaves, n), junk(n), "ring"), ranks
        )
        assert whole.bytes - half.bytes == 4 * n * (ranks - 1)
        each, rest = divmod(leaves, ranks)
        if rest == 0 and each in (1, 2, 4, 8, 16):
            assert whole.bytes == simulate(lambda comm, n=n: all_reduce(comm, junk(n), algorithm="ring"), ranks).bytes


def test_a_simulated_network_takes_its_time_for_the_additions() -> None:
    def program(comm: Communicator) -> None:
        fixed_tree.reduce_scatter(comm, tree_of(comm, 8, 120), junk(120))

    seconds = simulate(program, 4, network=Network(0, 0, gamma=1)).seconds
    assert seconds == 3 * 30 * 4  # 4 nodes' chunks of 30 float32


# -- bad input --------------------------------------------------------------------------------------------------------


def test_leaves_that_do_not_belong_are_refused() -> None:
    tree = TreeSum(8, 3, 5)
    tree.add(leaf(3, 4))
    with pytest.raises(ValueError, match=r"leaf 4 is \(5, 'float32', 'cpu'\): .* \(4, 'float32', 'cpu'\)"):
        tree.add(leaf(4, 5))
    with pytest.raises(ValueError, match=r"leaf 4 is \(4, 'float64', 'cpu'\)"):
        tree.add(leaf(4, 4, np.float64))
    tree.add(leaf(4, 4))
    with pytest.raises(ValueError, match="leaves 3:5 of 8 are all added"):
        tree.add(leaf(5, 4))
    with pytest.raises(ValueError, match=r"leaf 0 is \(2, 'int64', 'cpu'\): expected floats"):
        TreeSum(1, 0, 1).add(np.arange(2))
    with pytest.raises(ValueError, match="leaves 2:2 of 2 are all added"):
        TreeSum(2, 2, 2).add(leaf(0, 4))


@pytest.mark.parametrize("case", [(0, 0, 0), (4, -1, 2), (4, 3, 2), (4, 0, 5)])
def test_a_stretch_that_is_none_is_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves={}, first={}, stop={}".format(*case)):
        TreeSum(*case)


@pytest.mark.parametrize("case", [(0, 1, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_a_share_that_is_none_is_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves={}, ranks={}, rank={}".format(*case)):
        share(*case)


@on_ranks(1, 2, 3)
def test_too_few_leaves_or_those_of_another_rank_are_refused(comm: Communicator) -> None:
    mine = share(6, comm.size, comm.rank)
    tree, out = TreeSum(6, mine.start, mine.stop), junk(4)
    for index in mine[:-1]:
        tree.add(leaf(index, 4))
    with pytest.raises(ValueError, match=f"leaves {mine.start}:{mine.stop - 1}, where rank {comm.rank} of {comm.size}"):
        fixed_tree.reduce_scatter(comm, tree, out)
    tree.add(leaf(mine.stop - 1, 4))
    for wrong in (junk(5), junk(4, np.float64)):
        with pytest.raises(ValueError, match=r"out is \(.*\), the leaves are \(4, 'float32', 'cpu'\)"):
            fixed_tree.all_reduce(comm, tree, wrong)
    other = TreeSum(12, 12 - mine.stop, 12 - mine.start)
    for _ in mine:
        other.add(leaf(0, 4))
    with pytest.raises(ValueError, match=rf"leaves {12 - mine.stop}:{12 - mine.start}, where .* of 12"):
        fixed_tree.all_reduce(comm, other, out)
    assert_same_bits(out, junk(4))
    assert_same_bits(fixed_tree.all_reduce(comm, tree, out), reference([leaf(i, 4) for i in range(6)]))
