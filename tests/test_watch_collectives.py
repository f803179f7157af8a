"""Collectives that are watched: what the frames say, beside what each operation is for and what a plain run does."""

import math
from collections.abc import Callable

import collective_cases
import numpy as np
import pytest

from minidist import collectives
from minidist.collectives import ALGORITHMS
from minidist.comm import Network, simulate
from minidist.watch import watch
from minidist.watch.collective import number_of, origin_of
from minidist.watch.collective_film import CollectiveFilm

# What an operation leaves in chunk c of rank r, of P ranks and with root 0; None: anything.
LEAVES: dict[str, Callable[[int, int, int], set[int] | None]] = {
    "all_reduce": lambda r, c, P: set(range(P)),
    "reduce_scatter": lambda r, c, P: set(range(P)) if c == r else None,
    "all_gather": lambda r, c, P: {c},
    "broadcast": lambda r, c, P: {0},
    "scatter": lambda r, c, P: {0} if c == r else None,
    "gather": lambda r, c, P: {c} if r == 0 else None,
    "all_to_all": lambda r, c, P: {(r - c) % P},  # the block that has gone c ranks further, to r
    "reduce": lambda r, c, P: set(range(P)) if r == 0 else None,
    "scan": lambda r, c, P: set(range(r + 1)),
    "barrier": lambda r, c, P: {c},
}
ROWS = [
    (operation, algorithm)
    for operation in ALGORITHMS
    for algorithm in ALGORITHMS[operation]
    if not collective_cases.needs_processes(operation, algorithm)
]
every_row = pytest.mark.parametrize("operation, algorithm", ROWS)


def film_of(operation: str, algorithm: str, ranks: int, **options: int) -> CollectiveFilm:
    film = watch(f"{operation} {algorithm}", ranks, **options)
    assert isinstance(film, CollectiveFilm)
    return film


@every_row
def test_the_last_frame_is_what_the_operation_is_for(operation, algorithm):
    for ranks in (1, 2, 3, 4, 5, 8):
        film = film_of(operation, algorithm, ranks)
        for r, row in enumerate(film.frames[-1].state):
            for c, cell in enumerate(row):
                expected = LEAVES[operation](r, c, ranks)
                assert expected is None or cell == expected, (ranks, r, c)


@every_row
@pytest.mark.parametrize("ranks", [1, 3, 4, 5])
def test_messages_are_those_of_a_plain_run(operation, algorithm, ranks):
    film = film_of(operation, algorithm, ranks)
    in_pieces = algorithm in ("chain", "double_tree")
    network = Network(alpha=1.0, hosts=film.given.hosts, segment=8 if in_pieces else math.inf)

    def plain(comm):
        if operation == "barrier":
            collectives.barrier(comm, algorithm)
            return
        shape = (1,) if collective_cases.OPERATIONS[operation].dealt else (film.given.chunks,)
        collective_cases.Problem(operation, ranks, shape, "int64").solve(comm, algorithm)

    run = simulate(plain, ranks, network=network)
    assert len(film.moves()) == film.run.messages == run.messages
    assert film.run.seconds == run.seconds
    sent = [sum(move.source == rank for move in film.moves()) for rank in range(ranks)]
    assert sent == run.messages_by_rank


@every_row
def test_what_ends_in_memory_is_what_was_seen(operation, algorithm):
    film = film_of(operation, algorithm, 5)
    for r, result in enumerate(film.results):
        row = film.frames[-1].state[r]
        if operation == "all_to_all":
            assert [origin_of(int(n)) for n in result] == [(row[(r - i) % 5], r) for i in range(5)]
        elif operation == "scatter" or operation == "reduce_scatter":
            assert origin_of(int(result[0])) == (row[r], r)
        elif result is not None:
            assert tuple(origin_of(int(n))[0] for n in result) == row
    assert (operation == "barrier") == all(result is None for result in film.results)


@every_row
def test_what_travels_is_what_its_sender_has(operation, algorithm):
    """Its sender had it when it was sent, and its receiver has it afterwards."""
    film = film_of(operation, algorithm, 5)
    for before, frame in zip(film.frames, film.frames[1:]):
        assert before.time < frame.time
        for move in frame.moves:
            assert move.sent < move.time == frame.time and move.source != move.dest
            for chunk, holds in zip(move.chunks, move.contents):
                then = [f for f in film.frames if f.time <= move.sent][-1]
                assert holds and holds <= then.state[move.source][chunk]  # (more may have come just then)
                if operation not in ("reduce_scatter", "reduce"):  # (whose work space may be written over)
                    assert holds <= frame.state[move.dest][chunk]


def test_a_ring_step_by_step():
    """Chunk i sets off at rank i + 1 and comes home to rank i with everyone's share."""
    film = film_of("all_reduce", "ring", 4)
    assert film.frames[0].state == (({0},) * 4, ({1},) * 4, ({2},) * 4, ({3},) * 4)
    assert [frame.time for frame in film.frames] == [0, 1, 2, 3, 4, 5, 6]
    for step in (1, 2, 3):
        for rank, move in enumerate(film.frames[step].moves):
            assert (move.source, move.dest, move.chunk) == (rank, (rank + 1) % 4, (rank - step) % 4)
            assert move.holds == {(rank - k) % 4 for k in range(step)}
            assert move.step.function == "ring_reduce_scatter" and move.step.file == "collectives/ring.py"
            assert move.step.words.startswith("1. P - 1 times, pass a partial sum to the right")
    assert {move.step.function for frame in film.frames[4:] for move in frame.moves} == {"ring_all_gather"}
    move = film.frames[2].moves[1]
    assert film.says(move) == "rank 1 sends chunk 3, which sums ranks 0 and 1, to rank 2"


def test_an_empty_message_is_told_as_such():
    film = film_of("all_reduce", "hierarchical", 5)  # one host has three ranks, but there are two pieces
    empty = [move for move in film.moves() if not move.chunks]
    assert empty and all(move.chunk is None and move.holds == set() for move in empty)
    assert film.says(empty[0]) == "rank 0 sends rank 1 an empty message"


def test_hosts_roots_chunks_and_costs_can_be_given():
    assert film_of("all_reduce", "hierarchical", 6, hosts=3).given.hosts == (0, 0, 1, 1, 2, 2)
    film = film_of("broadcast", "chain", 3, root=2, chunks=5)
    assert film.frames[0].state == ((set(),) * 5, (set(),) * 5, ({2},) * 5)
    assert len(film.moves()) == 10 and all(row == ({2},) * 5 for row in film.frames[-1].state)
    slow = watch("ring", 3, alpha=2.0, beta=0.5)
    assert slow.frames[1].time == 2 + 8 * 0.5


def test_a_program_of_ones_own():
    def pairs(comm, array):
        got, bit = np.empty_like(array), 1
        while bit < comm.size:
            # 1. Swap sums.
            comm.sendrecv(array.copy(), comm.rank ^ bit, got, comm.rank ^ bit)
            array += got
            bit *= 2

    film = watch(pairs, 4, chunks=2)
    assert len(film.moves()) == 8 and film.frames[-1].state == (({0, 1, 2, 3},) * 2,) * 4
    assert film.frames[1].state[3] == ({2, 3},) * 2
    assert film.steps(film.frames[1]) == ["pairs: 1. Swap sums."]


def test_a_program_that_adds_up_twice_or_the_wrong_chunk_hears_of_it():
    def twice(comm, array):
        got = np.empty_like(array)
        for _ in range(2):
            comm.sendrecv(array[:1].copy(), 1 - comm.rank, got[:1], 1 - comm.rank)
            array[:1] += got[:1]

    def mixed(comm, array):
        got = np.empty(1, np.int64)
        comm.sendrecv(array[comm.rank : comm.rank + 1].copy(), 1 - comm.rank, got, 1 - comm.rank)
        array[:1] += got

    with pytest.raises(ValueError, match=r"holds 2 times the part of rank \d: it was added up too often"):
        watch(twice, 2)
    with pytest.raises(ValueError, match=r"mixes parts of ranks \[0, 1\]"):
        watch(mixed, 2)


@pytest.mark.parametrize("ranks", [1, 2, 7, 16])
def test_numbers_tell_their_origin(ranks):
    numbers = [number_of(rank, 31) for rank in range(ranks)]
    assert origin_of(sum(numbers)) == (frozenset(range(ranks)), 31)
    assert origin_of(numbers[-1]) == ({ranks - 1}, 31) and origin_of(0) == (frozenset(), None)
    assert sum(numbers) < 2**63


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("ring", {"ranks": 0}, "ranks=0"),
        ("ring", {"ranks": 17}, "ranks=17"),
        ("ring", {"root": 1}, "all_reduce has no root"),
        ("broadcast naive", {"root": 4}, "root=4: the ranks are 0 to 3"),
        ("all_gather ring", {"chunks": 3}, "chunks=3: all_gather has a chunk for each of the 4 ranks"),
        ("ring", {"chunks": 0}, "chunks=0"),
        ("hierarchical", {"hosts": 5}, "hosts=5: expected 1 to 4"),
        ("ring", {"alpha": 0.0}, "alpha=0.0"),
        ("rign", {}, "did you mean 'ring'"),
        ("broadcast", {}, "'broadcast naive' or 'broadcast binomial'"),
        ("all_reduce binomial", {}, "there is no 'all_reduce binomial'"),
        ("all_reduce mpi", {}, "'all_reduce mpi' can't be watched: MPI's library does not say"),
        ("shared_memory", {}, "simulated ranks share no memory"),
    ],
)
def test_what_cannot_be_watched_is_refused(name, options, why):
    with pytest.raises(ValueError) as error:
        watch(name, **options)
    assert why in str(error.value)


def test_a_strange_option_or_name_is_a_type_error():
    with pytest.raises(TypeError, match="steps: to watch 'ring' there are root, chunks, hosts, alpha, beta"):
        watch("ring", steps=3)
    with pytest.raises(TypeError, match="name 3: expected a text"):
        watch(3)
