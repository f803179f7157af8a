"""What is particular to the reducing collectives: costs, the order in which they add, the shape of their trees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

from minidist.collectives import ALGORITHMS, all_gather, all_reduce, reduce, reduce_scatter, scan
from minidist.collectives.at_once import at_once
from minidist.collectives.double_tree import TREES, moves, parent_of, trees_over
from minidist.collectives.hierarchical import hierarchical_all_reduce_cost
from minidist.collectives.lane import Lane
from minidist.comm import Link, Network, alone, simulate

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
POWERS = (1, 2, 4, 8, 16)
FIGURES = [(1e-5, 1e-9, 0.0), (1e-5, 1e-9, 3e-10), (0.0, 1e-9, 2e-9)]  # alpha, beta, gamma
OPERATIONS = {
    "all_reduce": all_reduce,
    "reduce": reduce,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "scan": scan,
}


def seconds(operation, algorithm, size, nbytes, network) -> float:
    def program(comm):
        OPERATIONS[operation](comm, np.ones(nbytes // 8), algorithm=algorithm)

    return simulate(program, size, network=network).seconds


# -- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation, algorithm",
    [
        ("all_reduce", "rabenseifner"),
        ("reduce", "binomial"),
        ("reduce", "rabenseifner"),
        ("reduce_scatter", "recursive_halving"),
        ("all_gather", "recursive_doubling"),
        ("scan", "chain"),
        ("scan", "recursive_doubling"),
    ],
)
def test_where_a_send_waits_for_its_receive_the_formula_holds_for_any_number_of_ranks(operation, algorithm):
    cost = ALGORITHMS[operation][algorithm].cost
    for size in SIZES:
        nbytes = size * 8 * 256
        for a, b, g in FIGURES[:2]:
            took = seconds(operation, algorithm, size, nbytes, Network(a, b, g, sends="rendezvous"))
            assert took == pytest.approx(cost(size, nbytes, a, b, g), rel=1e-12), (size, a, b, g)


@pytest.mark.parametrize(
    "operation, algorithm",
    [
        ("all_reduce", "rabenseifner"),
        ("all_reduce", "tree"),
        ("reduce", "binomial"),
        ("reduce", "rabenseifner"),
        ("reduce_scatter", "recursive_halving"),
        ("all_gather", "recursive_doubling"),
        ("scan", "chain"),
    ],
)
def test_where_it_does_not_the_formula_holds_for_powers_of_two(operation, algorithm):
    cost = ALGORITHMS[operation][algorithm].cost
    for size in POWERS:
        for a, b, g in FIGURES:
            took = seconds(operation, algorithm, size, 1 << 13, Network(a, b, g))
            assert took == pytest.approx(cost(size, 1 << 13, a, b, g), rel=1e-12), (size, a, b, g)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 31, 33])
def test_two_trees_cost_what_their_formula_says_or_little_more(size):
    cost = ALGORITHMS["all_reduce"]["double_tree"].cost
    for a, b, g in FIGURES[:2]:
        took = seconds("all_reduce", "double_tree", size, 1 << 16, Network(a, b, g, sends="rendezvous"))
        steps = cost(size, 1 << 16, a, b, g)
        assert took >= steps * (1 - 1e-12)
        assert took <= steps * (1 + 1e-12) if size in (1, 2, 3, 4, 8, 16) else took < 1.3 * steps


def test_a_mebibyte_on_eight_ranks_costs_what_the_papers_say():
    network = Network(alpha=1e-5, beta=1e-9)
    for algorithm, microseconds in [("ring", 1975.008), ("rabenseifner", 1895.008), ("recursive_doubling", 3175.728)]:
        took = seconds("all_reduce", algorithm, 8, 1 << 20, network)
        assert took * 1e6 == pytest.approx(microseconds, abs=1e-6)


@pytest.mark.parametrize("hosts, ranks", [(1, 4), (2, 1), (2, 2), (2, 3), (3, 2)])
def test_the_hierarchy_costs_what_its_formula_says(hosts, ranks):
    size, (a, b, g), (A, B) = hosts * ranks, (1e-6, 1e-10, 3e-10), (1e-5, 1e-9)
    nbytes = size * ranks * 8 * 240
    network = Network(a, b, g, ranks_per_host=ranks, between=Link(A, B), sends="rendezvous")
    took = seconds("all_reduce", "hierarchical", size, nbytes, network)
    least = hierarchical_all_reduce_cost(size, nbytes, a, b, g, hosts, (A, B))
    assert least <= took * (1 + 1e-12) <= 1.07 * least  # where more than two hosts' messages meet, some wait in line
    if hosts * ranks <= 4:
        assert took == pytest.approx(least, rel=1e-9)


# -- hosts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 1, 1), (0, 1, 1, 1, 2, 2), (0, 0, 0), (0, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_hosts_may_have_different_numbers_of_ranks(hosts, sends, op):
    network = Network(1e-6, 1e-10, hosts=hosts, between=Link(1e-5, 1e-9), sends=sends, segment=64)

    def program(comm):
        first, second = np.arange(100.0) + comm.rank, np.ones(3)
        handle = all_reduce(comm, first, op, "hierarchical", async_op=True)
        all_reduce(comm, second, op, "hierarchical")
        handle.wait()
        return first, second

    size = len(hosts)
    total = sum(np.arange(100.0) + rank for rank in range(size))
    for first, second in simulate(program, size, network=network).results:
        assert_allclose(first, total / size if op == "mean" else total, rtol=1e-15)
        assert_array_equal(second, 1 if op == "mean" else size)


def test_work_within_hosts_hides_behind_the_link_between_them():
    n, link = 1 << 16, Link(1e-6, 1e-8)

    def took(segment):
        network = Network(1e-7, 2e-9, ranks_per_host=2, between=link, ports="many", segment=segment)
        return seconds("all_reduce", "hierarchical", 4, n, network)

    assert took(n / 16) < 0.87 * took(n)
    assert took(n / 16) < 1.06 * n * link.beta


# -- the order of adding ------------------------------------------------------------------------------------------


def awkward(rank: int) -> np.ndarray:
    """Numbers whose sum depends on the order in which they are added."""
    return np.random.default_rng(rank).standard_normal(64).astype(np.float32)


@pytest.mark.parametrize("algorithm", ["recursive_halving"])
def test_halving_adds_the_farthest_ranks_first(algorithm):
    a, b, c, d = map(awkward, range(4))
    chunks = simulate(lambda comm: reduce_scatter(comm, awkward(comm.rank), "sum", algorithm), 4).results
    assert_array_equal(np.concatenate(chunks), (a + c) + (b + d))


def test_a_scan_by_chain_adds_in_the_order_of_ranks_and_by_doubling_in_pairs():
    a, b, c, d = map(awkward, range(4))
    chain = simulate(lambda comm: scan(comm, awkward(comm.rank), algorithm="chain"), 4).results
    doubling = simulate(lambda comm: scan(comm, awkward(comm.rank), algorithm="recursive_doubling"), 4).results
    for got, expected in zip(chain, [a, a + b, (a + b) + c, ((a + b) + c) + d], strict=True):
        assert_array_equal(got, expected)
    for got, expected in zip(doubling, [a, a + b, a + (b + c), (a + b) + (c + d)], strict=True):
        assert_array_equal(got, expected)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS["reduce"] if name != "mpi"])
def test_a_reduction_repeats_bit_for_bit(algorithm):
    def program(comm):
        return reduce(comm, awkward(comm.rank), "sum", 2, algorithm)

    first, *others = (simulate(program, 7, seed=seed).results[2] for seed in range(6))
    for other in others:
        assert_array_equal(other, first)


# -- scan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS["scan"] if name != "mpi"])
@pytest.mark.parametrize("exclusive", [False, True])
@on_ranks(1, 2, 3, 5)
def test_the_mean_of_a_scan_is_that_of_the_ranks_combined(comm, algorithm, exclusive):
    array = np.arange(5.0) + comm.rank**2
    assert scan(comm, array, "mean", algorithm, exclusive=exclusive) is array
    combined = range(comm.rank) if exclusive and comm.rank else range(comm.rank + 1)
    assert_allclose(array, np.mean([np.arange(5.0) + rank**2 for rank in combined], axis=0), rtol=1e-15)


# -- the trees ----------------------------------------------------------------------------------------------------


def test_a_tree_of_seven_is_complete():
    assert [parent_of(number, 7) for number in range(1, 8)] == [2, 4, 2, None, 6, 4, 6]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 64, 100])
def test_of_the_two_trees_every_rank_is_inside_one_at_most(size):
    trees = trees_over(size)
    for tree in TREES:
        (root,) = [rank for rank in range(size) if trees.parent[tree][rank] is None]
        reached = [root]
        for rank in reached:
            reached += trees.children[tree][rank]
        assert sorted(reached) == list(range(size))
    for rank in range(size):
        inside = [tree for tree in TREES if trees.children[tree][rank]]
        assert len(inside) <= 1
        assert all(len(trees.children[tree][rank]) <= 2 for tree in TREES)
    assert trees.last <= 2 * np.log2(size) - 2


@pytest.mark.parametrize("size", [3, 6, 8, 13])
def test_both_ends_of_every_message_have_it_in_the_same_order(size):
    sends, receives = Counter(), Counter()
    for rank in range(size):
        for receive, send in moves(rank, size, pieces=5):
            if receive is not None:
                receives[receive.peer, rank, receive.tree, receive.piece] += 1
            if send is not None:
                sends[rank, send.peer, send.tree, send.piece] += 1
    assert sends == receives
    assert set(sends.values()) == {1}
    assert len(sends) == 2 * (size - 1) * 5


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_simulated_ranks_have_no_library(operation):
    with pytest.raises(ValueError, match="'mpi' needs ranks started by mpirun; these are simulated"):
        OPERATIONS[operation](alone(), np.ones(3), algorithm="mpi")


def test_a_failure_in_one_of_several_pieces_of_work_is_raised_by_the_whole():
    comm = alone()

    def fails():
        yield comm.irecv(np.zeros(0), 0, tag=1)
        raise RuntimeError("this piece")

    def works():
        yield comm.irecv(np.zeros(0), 0, tag=2)

    for tag in (1, 2):
        comm.send(np.zeros(0), 0, tag)
    with pytest.raises(RuntimeError, match="this piece"):
        for request in at_once(Lane(comm), [works(), fails()]):
            request.wait()
    assert comm.in_flight == []
