"""What collectives cost on simulated networks: virtual seconds, messages and bytes, against the published closed forms.

The forms are written out here once more, from the papers; the package's own cost functions are compared with them too.
Throughout: p ranks, n bytes of the whole array, a seconds a message, b seconds a byte, g seconds a reduced byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from collective_cases import OPERATIONS, Problem, rows

from minidist.collectives import ALGORITHMS, all_reduce, barrier
from minidist.comm import Link, Network, Simulation, simulate

POWERS, OTHERS = (2, 4, 8, 16), (3, 5, 6, 7, 12)
ALL = (*POWERS, *OTHERS)
N = 16 * 3 * 5 * 7 * 2**7  # bytes: whole numbers of 8 bytes for every p here and for as many segments as a chain has

# α, β, γ: one at a time, and together, with γ below β and above it.
FIGURES = [(1e-5, 0, 0), (0, 1e-9, 0), (0, 0, 1e-9), (1e-5, 1e-9, 0), (1e-5, 1e-9, 3e-10), (1e-5, 1e-9, 4e-9)]


def lg(p: int) -> int:
    """Rounds of doubling until p is reached: ceil(lg p)."""
    return math.ceil(math.log2(p))


def floor_lg(p: int) -> int:
    return math.floor(math.log2(p))


def below(p: int) -> int:
    """The largest power of two up to p."""
    return 2 ** floor_lg(p)


def chain_segments(p: int, n: int) -> int:
    """The power of two nearest to the best number, where 16 KiB take as long on the way as a message to start."""
    return 2 ** round(math.log2(max(1, math.sqrt((p - 2) * n / 2**14))))


def tree_pieces(p: int, n: int) -> int:
    """The same for half an array that goes down a tree in steps of two directions."""
    return chain_segments(2 * lg(p) - 1, n // 4) if p > 2 else 1


class Form(NamedTuple):
    """An algorithm's closed forms, and the numbers of ranks for which they are exact."""

    seconds: Callable[[int, int, float, float, float], float]
    messages: Callable[[int], int]  # of p, by all ranks together
    bytes: Callable[[int, int], float]  # of p and n, by all ranks together
    ranks: tuple[int, ...] = ALL


FORMS = {
    # -- everything through the root: p-1 messages, one after the other
    ("all_reduce", "naive"): Form(
        lambda p, n, a, b, g: (p - 1) * (2 * a + 2 * n * b + n * g), lambda p: 2 * (p - 1), lambda p, n: 2 * (p - 1) * n
    ),
    ("reduce_scatter", "naive"): Form(
        lambda p, n, a, b, g: (p - 1) * (2 * a + 2 * n * b + n * g), lambda p: 2 * (p - 1), lambda p, n: 2 * (p - 1) * n
    ),
    ("all_gather", "naive"): Form(
        lambda p, n, a, b, g: (p - 1) * (2 * a + n / p * b + n * b),
        lambda p: 2 * (p - 1),
        lambda p, n: (p - 1) * (n + n // p),
    ),
    ("broadcast", "naive"): Form(
        lambda p, n, a, b, g: (p - 1) * (a + n * b), lambda p: p - 1, lambda p, n: (p - 1) * n
    ),
    ("reduce", "naive"): Form(
        lambda p, n, a, b, g: (p - 1) * (a + n * b + n * g), lambda p: p - 1, lambda p, n: (p - 1) * n
    ),
    ("scatter", "linear"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b, lambda p: p - 1, lambda p, n: (p - 1) * n // p
    ),
    ("gather", "linear"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b, lambda p: p - 1, lambda p, n: (p - 1) * n // p
    ),
    # -- rings (Patarasuk & Yuan 2009)
    ("all_reduce", "ring"): Form(
        lambda p, n, a, b, g: 2 * (p - 1) * a + 2 * n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: 2 * (p - 1) * p,
        lambda p, n: 2 * (p - 1) * n,
    ),
    ("reduce_scatter", "ring"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: (p - 1) * p,
        lambda p, n: (p - 1) * n,
    ),
    ("all_gather", "ring"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b, lambda p: (p - 1) * p, lambda p, n: (p - 1) * n
    ),
    # -- trees
    ("broadcast", "binomial"): Form(
        lambda p, n, a, b, g: lg(p) * (a + n * b), lambda p: p - 1, lambda p, n: (p - 1) * n
    ),
    ("reduce", "binomial"): Form(
        lambda p, n, a, b, g: lg(p) * (a + n * b + n * g), lambda p: p - 1, lambda p, n: (p - 1) * n
    ),
    ("reduce", "rabenseifner"): Form(
        lambda p, n, a, b, g: 2 * lg(p) * a + 2 * n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: p * lg(p) + p - 1,
        lambda p, n: (p - 1) * n + n // 2 * lg(p),
        POWERS,
    ),
    ("all_reduce", "tree"): Form(
        lambda p, n, a, b, g: lg(p) * (2 * a + 2 * n * b + n * g),
        lambda p: 2 * (p - 1),
        lambda p, n: 2 * (p - 1) * n,
        POWERS,
    ),
    ("all_reduce", "double_tree"): Form(
        # k pieces of each half, one in two steps; the last rank gets its first one in step 2 lg p - 2. Up, and down.
        lambda p, n, a, b, g: (
            (2 * lg(p) - 2 + 2 * tree_pieces(p, n) - 1) * (2 * a + n / 2 / tree_pieces(p, n) * (2 * b + g))
        ),
        lambda p: 2 * 2 * (p - 1) * tree_pieces(p, N),
        lambda p, n: 2 * (p - 1) * n,
        POWERS,
    ),
    ("scatter", "binomial"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * (p - 1) / p * b,
        lambda p: p - 1,
        lambda p, n: n // 2 * lg(p),  # in each round each holder gives half of its n/1, n/2, n/4, ... away
        POWERS,
    ),
    ("gather", "binomial"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * (p - 1) / p * b, lambda p: p - 1, lambda p, n: n // 2 * lg(p), POWERS
    ),
    ("broadcast", "scatter_all_gather"): Form(
        lambda p, n, a, b, g: (lg(p) + p - 1) * a + 2 * n * (p - 1) / p * b,
        lambda p: p - 1 + (p - 1) * p,
        lambda p, n: n // 2 * lg(p) + (p - 1) * n,
        POWERS,
    ),
    ("broadcast", "chain"): Form(
        lambda p, n, a, b, g: (p - 2 + chain_segments(p, n)) * (a + n / chain_segments(p, n) * b),
        lambda p: (p - 1) * chain_segments(p, N),
        lambda p, n: (p - 1) * n,
    ),
    # -- doubling and halving (Thakur, Rabenseifner & Gropp 2005; Bruck et al. 1997)
    ("all_reduce", "recursive_doubling"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * lg(p) * b + n * lg(p) * g,
        lambda p: p * lg(p),
        lambda p, n: n * p * lg(p),
        POWERS,
    ),
    ("all_reduce", "rabenseifner"): Form(
        lambda p, n, a, b, g: 2 * lg(p) * a + 2 * n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: 2 * p * lg(p),
        lambda p, n: 2 * (p - 1) * n,
        POWERS,
    ),
    ("reduce_scatter", "recursive_halving"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: p * lg(p),
        lambda p, n: (p - 1) * n,
        POWERS,
    ),
    ("reduce_scatter", "pairwise"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b + n * (p - 1) / p * g,
        lambda p: p * (p - 1),
        lambda p, n: (p - 1) * n,
    ),
    ("all_gather", "recursive_doubling"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * (p - 1) / p * b, lambda p: p * lg(p), lambda p, n: (p - 1) * n, POWERS
    ),
    ("all_gather", "bruck"): Form(
        lambda p, n, a, b, g: lg(p) * a + n * (p - 1) / p * b, lambda p: p * lg(p), lambda p, n: (p - 1) * n
    ),
    ("scan", "recursive_doubling"): Form(
        lambda p, n, a, b, g: lg(p) * (a + n * b + n * g),
        lambda p: p * lg(p) - (2 ** lg(p) - 1),  # all but the last 1, 2, 4, ... send
        lambda p, n: n * (p * lg(p) - (2 ** lg(p) - 1)),
    ),
    ("scan", "chain"): Form(
        lambda p, n, a, b, g: (
            (p - 1) * (a + n / chain_segments(p, n) * (b + g))
            + (chain_segments(p, n) - 1) * max(a + n / chain_segments(p, n) * b, n / chain_segments(p, n) * g)
        ),
        lambda p: (p - 1) * chain_segments(p, N),
        lambda p, n: (p - 1) * n,
    ),
    ("all_to_all", "pairwise"): Form(
        lambda p, n, a, b, g: (p - 1) * a + n * (p - 1) / p * b, lambda p: p * (p - 1), lambda p, n: (p - 1) * n
    ),
    ("all_to_all", "bruck"): Form(
        lambda p, n, a, b, g: lg(p) * a + n / 2 * lg(p) * b,
        lambda p: p * lg(p),
        lambda p, n: p * n // 2 * lg(p),
        POWERS,
    ),
    ("barrier", "dissemination"): Form(lambda p, n, a, b, g: lg(p) * a, lambda p: p * lg(p), lambda p, n: 0),
    ("barrier", "tree"): Form(lambda p, n, a, b, g: 2 * lg(p) * a, lambda p: 2 * (p - 1), lambda p, n: 0, POWERS),
}

# Forms for other numbers of ranks than powers of two, q being the power of two below: the p - q extra ranks hand their
# array on, rest, and get the result (Thakur, Rabenseifner & Gropp 2005, section 4.5).
WITH_EXTRA_RANKS = {
    ("all_reduce", "recursive_doubling"): lambda p, q, n, a, b, g: (
        (floor_lg(p) + 2) * (a + n * b) + (floor_lg(p) + 1) * n * g
    ),
    ("all_reduce", "rabenseifner"): lambda p, q, n, a, b, g: (
        (2 * floor_lg(p) + 2) * a + 2 * n * ((q - 1) / q + 1) * b + n * ((q - 1) / q + 1) * g
    ),
}

# Where a rank adds up what comes from several others, the later ones may arrive while it adds; and messages of ranks
# that are ahead of the others can hold up theirs. The forms know of neither: they hold if a message starts no sooner
# than it is asked for.
NO_OVERLAP = {
    ("all_reduce", "naive"),
    ("reduce_scatter", "naive"),
    ("reduce", "naive"),
    ("reduce", "binomial"),
    ("all_reduce", "double_tree"),
    ("scan", "recursive_doubling"),
}
BY_HOST = [(operation, name) for operation, name in rows() if ALGORITHMS[operation][name].by_host]


def run_once(operation: str, algorithm: str, p: int, network: Network, n: int = N) -> Simulation:
    """One call by p ranks, with arrays of n bytes in all."""
    problem = None if operation == "barrier" else Problem(operation, p)

    def program(comm: Any) -> None:
        if problem is None:
            barrier(comm, algorithm)
        else:
            problem.run(comm, algorithm, np.zeros(n // 8))

    return simulate(program, p, network=network)


with_a_form = pytest.mark.parametrize(
    "operation, algorithm", [row for row in FORMS if row[1] in ALGORITHMS.get(row[0], ())]
)


@with_a_form
def test_seconds_messages_and_bytes_are_those_of_the_closed_form(operation, algorithm):
    form = FORMS[operation, algorithm]
    for p in form.ranks:
        for a, b, g in FIGURES:
            sends = "rendezvous" if (operation, algorithm) in NO_OVERLAP else "eager"
            run = run_once(operation, algorithm, p, Network(a, b, g, sends=sends))
            assert run.seconds == pytest.approx(form.seconds(p, N, a, b, g), rel=1e-12), (p, a, b, g)
        assert run.messages == form.messages(p), p
        assert run.bytes == form.bytes(p, N), p


@with_a_form
def test_the_packages_cost_functions_are_the_closed_forms(operation, algorithm):
    form, cost = FORMS[operation, algorithm], ALGORITHMS[operation][algorithm].cost
    assert cost is not None
    for p in form.ranks:
        for a, b, g in FIGURES:
            for n in (0, 8 * p, N):
                if algorithm != "chain" or n == N:
                    assert cost(p, n, a, b, g) == pytest.approx(form.seconds(p, n, a, b, g), rel=1e-12, abs=1e-30), p


@pytest.mark.parametrize("operation, algorithm", list(WITH_EXTRA_RANKS))
@pytest.mark.parametrize("p", OTHERS)
def test_extra_ranks_cost_two_messages_more(operation, algorithm, p):
    for a, b, g in FIGURES:
        seconds = WITH_EXTRA_RANKS[operation, algorithm](p, below(p), N, a, b, g)
        run = run_once(operation, algorithm, p, Network(a, b, g, sends="rendezvous"))
        assert run.seconds == pytest.approx(seconds, rel=1e-12)
        assert ALGORITHMS[operation][algorithm].cost(p, N, a, b, g) == pytest.approx(seconds, rel=1e-12)


# The hierarchical all-reduce has its own test; MPI's own algorithms have no formula.
MODELLED = [(o, a) for o, a in (*rows(), *rows("barrier")) if ALGORITHMS[o][a].cost and not ALGORITHMS[o][a].by_host]


@pytest.mark.parametrize("operation, algorithm", MODELLED)
def test_every_cost_function_is_right_for_powers_of_two_and_zero_for_one_rank(operation, algorithm):
    row = ALGORITHMS[operation][algorithm]
    assert row.cost(1, N, 1e-5, 1e-9, 1e-9) == 0
    for p in POWERS:
        for a, b, g in FIGURES:
            sends = "rendezvous" if (operation, algorithm) in NO_OVERLAP else "eager"
            run = run_once(operation, algorithm, p, Network(a, b, g, sends=sends))
            assert row.cost(p, N, a, b, g) == pytest.approx(run.seconds, rel=1e-12), (p, a, b, g)


def test_every_algorithm_with_a_cost_has_its_closed_form_here():
    costed = [row for row in [*rows(), *rows("barrier")] if ALGORITHMS[row[0]][row[1]].cost and row not in BY_HOST]
    assert [row for row in costed if row not in FORMS] == []


@pytest.mark.parametrize("operation, algorithm", [*rows(), *rows("barrier")])
@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
def test_one_rank_alone_costs_nothing(operation, algorithm, sends):
    run = run_once(operation, algorithm, 1, Network(1e-5, 1e-9, 1e-9, sends=sends))
    assert (run.seconds, run.messages, run.bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    "algorithm, microseconds", [("ring", 1975.008), ("rabenseifner", 1895.008), ("recursive_doubling", 3175.728)]
)
def test_a_mebibyte_on_eight_ranks(algorithm, microseconds):
    run = run_once("all_reduce", algorithm, 8, Network(alpha=10e-6, beta=1e-9), 2**20)
    assert run.seconds * 1e6 == pytest.approx(microseconds, rel=1e-12)
    assert ALGORITHMS["all_reduce"][algorithm].cost(8, 2**20, 10e-6, 1e-9, 0) * 1e6 == pytest.approx(microseconds)


@pytest.mark.parametrize("algorithm", ["ring", "rabenseifner"])
def test_each_rank_sends_as_much_as_any_other(algorithm):
    run = run_once("all_reduce", algorithm, 8, Network())
    assert run.bytes_by_rank == [2 * N * 7 // 8] * 8
    assert set(run.messages_by_rank) == {2 * 7 if algorithm == "ring" else 2 * 3}


@pytest.mark.parametrize("p", ALL)
def test_nobody_sends_more_than_ceil_lg_p_messages_of_a_binomial_broadcast(p):
    assert max(run_once("broadcast", "binomial", p, Network()).messages_by_rank) == lg(p)


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_the_cheapest_by_the_model_is_chosen(operation):
    """Of long arrays and of short ones, on a simulated network."""
    network = Network(1e-5, 1e-9, 1e-10, sends="rendezvous")
    for n in (8 * 8, 2**20 * 8):
        costs = [
            row.cost(8, n, network.alpha, network.beta, network.gamma)
            for row in ALGORITHMS[operation].values()
            if row.cost and not row.by_host and not row.shared
        ]
        chosen = run_once(operation, "auto", 8, network, n).seconds
        assert chosen <= min(costs) * 1.05


# -- hosts --------------------------------------------------------------------------------------------------------

BEGIN = 2.0**-6  # seconds, by when the ranks know who shares a host


@pytest.mark.parametrize("hosts, ranks_per_host", [(2, 1), (2, 2), (2, 4), (3, 2), (4, 4)])
@pytest.mark.parametrize("A, B", [(4e-5, 8e-9), (1e-5, 1e-9)])
def test_the_hierarchical_all_reduce_between_hosts(hosts, ranks_per_host, A, B):
    H, R, a, b, g, n = hosts, ranks_per_host, 1e-6, 1e-10, 2e-10, N
    p, x = H * R, n / (H * R)

    def program(comm):
        all_reduce(comm, np.zeros(1), algorithm="hierarchical")
        comm.elapse(BEGIN - comm.clock())
        all_reduce(comm, np.zeros(n // 8), algorithm="hierarchical")
        return comm.clock() - BEGIN

    within = 2 * (R - 1) * a + 2 * n * (R - 1) / R * b + n * (R - 1) / R * g
    # A step between hosts ends when its message has come and been added; the link is busy with R ranks' messages.
    adding, passing = max(R * x * B, A + x * (B + g)), max(R * x * B, A + x * B)
    expected = within + (H - 1) * adding + (H - 2) * passing + R * x * B + A
    network = Network(a, b, g, ranks_per_host=R, between=Link(A, B))
    # In which order the ranks of a host get the link, the seed decides; some orders lose a few times A.
    seconds = [max(simulate(program, p, seed=seed, network=network).results) for seed in range(12)]
    assert min(seconds) == pytest.approx(expected, rel=1e-9)
    assert max(seconds) < expected + 2 * H * A
    cost = ALGORITHMS["all_reduce"]["hierarchical"].cost
    assert cost(p, n, a, b, g, H, (A, B)) == pytest.approx(expected, rel=1e-12)


def test_across_hosts_the_hierarchical_all_reduce_is_faster_than_the_flat_ones():
    network = Network(1e-6, 1e-10, 1e-10, ranks_per_host=4, between=Link(5e-5, 8e-9))
    seconds = {name: run_once("all_reduce", name, 16, network, 2**20).seconds for _, name in rows("all_reduce")}
    assert min(seconds, key=seconds.__getitem__) == "hierarchical"


# -- many ranks ---------------------------------------------------------------------------------------------------


def test_a_ring_of_many_ranks_costs_what_its_formula_says():
    """Here 128; with 1,024 it is 64 times the messages, and takes about 31 s and 84 MB."""
    p, n, (a, b, g) = 128, 8 * 128, (1e-6, 1e-9, 1e-10)
    run = run_once("all_reduce", "ring", p, Network(a, b, g), n)
    assert run.seconds == pytest.approx(2 * (p - 1) * a + 2 * n * (p - 1) / p * b + n * (p - 1) / p * g, rel=1e-12)
    assert run.messages == 2 * p * (p - 1)
