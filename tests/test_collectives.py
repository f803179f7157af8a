"""Every algorithm of every collective, against NumPy on one rank."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

from minidist import backend
from minidist.collectives import (
    ALGORITHMS,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    chunk_slice,
    reduce_scatter,
)
from minidist.comm import alone, simulate

REDUCED = {"sum": np.sum, "mean": np.mean, "prod": np.prod, "min": np.min, "max": np.max}
PLAIN_OPS = list(REDUCED)
SIZES = (1, 2, 3, 4, 5, 7)


def payload(rank: int, shape: tuple[int, ...] = (10,), dtype: str = "float64") -> np.ndarray:
    """Small whole numbers that differ by rank and position: any order of adding them is exact."""
    return np.random.default_rng(rank).integers(1, 6, shape).astype(dtype)


def everyones(comm, *args) -> np.ndarray:
    return np.stack([payload(rank, *args) for rank in range(comm.size)])


def algorithms(operation: str):
    return pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS[operation]])


# -- results ------------------------------------------------------------------------------------------------------


@algorithms("all_reduce")
@pytest.mark.parametrize("op", PLAIN_OPS)
@on_ranks(*SIZES)
def test_all_reduce_leaves_every_rank_the_whole_result(comm, op, algorithm):
    array = payload(comm.rank)
    assert all_reduce(comm, array, op, algorithm) is array
    assert_allclose(array, REDUCED[op](everyones(comm), axis=0), rtol=1e-12)


@algorithms("reduce_scatter")
@pytest.mark.parametrize("op", PLAIN_OPS)
@on_ranks(*SIZES)
def test_reduce_scatter_leaves_each_rank_its_chunk_of_the_result(comm, op, algorithm):
    array = payload(comm.rank)
    chunk = reduce_scatter(comm, array, op, algorithm)
    assert np.shares_memory(chunk, array)
    result = REDUCED[op](everyones(comm), axis=0)
    assert_allclose(chunk, np.array_split(result, comm.size)[comm.rank], rtol=1e-12)


@algorithms("all_gather")
@on_ranks(*SIZES)
def test_all_gather_puts_each_ranks_chunk_in_its_place(comm, algorithm):
    expected = payload(99)
    array = np.full_like(expected, -1)
    mine = chunk_slice(array.size, comm.size, comm.rank)
    array[mine] = expected[mine]
    assert all_gather(comm, array, algorithm) is array
    assert_array_equal(array, expected)


@algorithms("broadcast")
@on_ranks(*SIZES)
def test_broadcast_gives_every_rank_the_roots_array(comm, algorithm):
    for root in range(comm.size):
        array = payload(comm.rank)
        assert broadcast(comm, array, root, algorithm) is array
        assert_array_equal(array, payload(root))


@on_ranks(1, 2, 3, 4)
def test_reduce_scatter_update_all_gather_is_a_sharded_step(comm):
    parameters, gradients = np.ones(11), payload(comm.rank, (11,))
    chunk = reduce_scatter(comm, gradients)
    parameters[chunk_slice(11, comm.size, comm.rank)] -= 0.5 * chunk
    all_gather(comm, parameters)
    assert_allclose(parameters, 1 - 0.5 * everyones(comm, (11,)).sum(0), rtol=1e-12)


@given(
    length=st.integers(0, 12),
    columns=st.integers(1, 3),
    dtype=st.sampled_from(["int32", "int64", "float16", "float32", "float64", "complex128", "bool"]),
    op=st.sampled_from(["sum", "max"]),
    algorithm=st.sampled_from(list(ALGORITHMS["all_reduce"])),
)
@on_ranks(1, 3, 4)
def test_all_reduce_of_any_shape_and_dtype(comm, length, columns, dtype, op, algorithm):
    shape = (length, columns)
    array = all_reduce(comm, payload(comm.rank, shape, dtype), op, algorithm)
    assert (array.shape, array.dtype) == (shape, dtype)
    combine = {"sum": np.add, "max": np.maximum}[op]
    assert_array_equal(array, functools.reduce(combine, everyones(comm, shape, dtype)))


@algorithms("all_reduce")
@on_ranks(3, 4)
def test_every_rank_gets_the_same_bits(comm, algorithm):
    array = np.random.default_rng(comm.rank).standard_normal(1001).astype(np.float32)
    all_reduce(comm, array, "mean", algorithm)
    lowest, highest = all_reduce(comm, array.copy(), "min"), all_reduce(comm, array.copy(), "max")
    assert_array_equal(lowest, highest)


@on_ranks(2, 3)
def test_collectives_keep_clear_of_the_programs_own_messages(comm):
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    got = np.zeros(1)
    receive = comm.irecv(got, left)
    total = all_reduce(comm, np.array([1.0]))
    comm.send(np.array([comm.rank]) + 0.5, right)
    receive.wait()
    assert (total[0], got[0]) == (comm.size, left + 0.5)


@pytest.mark.parametrize("operation", [all_reduce, reduce_scatter, all_gather, broadcast])
@on_ranks(1, 3)
def test_arrays_on_a_gpu_stay_there(comm, operation, gpu):
    on_host, on_gpu = payload(comm.rank, (7,), "float32"), backend.to(payload(comm.rank, (7,), "float32"), "cuda")
    expected, got = operation(comm, on_host), operation(comm, on_gpu)
    assert backend.on_gpu(got)
    assert_array_equal(backend.to_numpy(got), expected)


# -- what they cost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_the_ring_sends_as_many_messages_and_bytes_as_its_formula_says(size):
    n = size * 6  # elements of 8 bytes
    halves = [
        lambda comm: reduce_scatter(comm, np.ones(n), algorithm="ring"),
        lambda comm: all_gather(comm, np.ones(n)),
    ]
    for half in halves:
        run = simulate(half, size)
        assert run.messages_by_rank == [size - 1] * size
        assert run.bytes_by_rank == [(size - 1) * 6 * 8] * size
    run = simulate(lambda comm: all_reduce(comm, np.ones(n), algorithm="ring"), size)
    assert run.messages == 2 * (size - 1) * size
    assert run.bytes == 2 * (size - 1) * n * 8


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 16])
def test_trees_and_dissemination_send_as_many_messages_as_their_formulas_say(size):
    rounds = (size - 1).bit_length()
    tree = simulate(lambda comm: broadcast(comm, np.zeros(5), size // 2), size)
    assert (tree.messages, max(tree.messages_by_rank)) == (size - 1, rounds)
    met = simulate(barrier, size)
    assert (met.messages_by_rank, met.bytes) == ([rounds] * size, 0)
    naive = simulate(lambda comm: all_reduce(comm, np.zeros(5), algorithm="naive"), size)
    assert naive.messages_by_rank == [size - 1] + [1] * (size - 1)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_nobody_leaves_a_barrier_before_all_have_come(size):
    for seed in range(10):
        come: list[int] = []

        def program(comm, come=come):
            for _ in range(comm.rank):
                comm.sendrecv(np.zeros(1), comm.rank, np.zeros(1), comm.rank)  # be late
            come.append(comm.rank)
            barrier(comm)
            return len(come)

        assert simulate(program, size, seed=seed).results == [size] * size


@on_ranks(1, 2, 4)
def test_barriers_follow_one_another(comm):
    for _ in range(3):
        barrier(comm)


# -- chunks and mistakes ------------------------------------------------------------------------------------------


@given(length=st.integers(0, 50), ranks=st.integers(1, 12))
def test_chunks_are_those_of_array_split(length, ranks):
    array = np.arange(length)
    for rank, chunk in enumerate(np.array_split(array, ranks)):
        assert_array_equal(array[chunk_slice(length, ranks, rank)], chunk)


def test_mistakes_are_refused_with_what_is_allowed():
    comm, array = alone(), np.zeros((4, 4))
    for call, words in [
        (lambda: all_reduce(comm, array, "median"), "op 'median': choose one of sum, mean, prod, min, max, logical_and"),
        (lambda: reduce_scatter(comm, np.zeros(3, int), "mean"), "op 'mean' of int64"),
        (
            lambda: all_reduce(comm, array, algorithm="star"),
            "all_reduce: no algorithm 'star'; choose auto, naive, ring",
        ),
        (lambda: barrier(comm, "ring"), "barrier: no algorithm 'ring'; choose auto, dissemination"),
        (lambda: broadcast(comm, array, 1), "root 1: .* 0 to 0"),
        (lambda: broadcast(comm, array, 1, "naive"), "root 1: .* 0 to 0"),
        (lambda: all_reduce(comm, array.T[1:]), "not contiguous"),
        (lambda: all_gather(comm, array[:, 0], "naive"), "not contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_arrays_of_different_sizes_are_refused():
    for algorithm in ALGORITHMS["all_reduce"]:
        with pytest.raises(ValueError, match=r"message has \d+ elements .* receiving array"):
            simulate(lambda comm, algorithm=algorithm: all_reduce(comm, np.zeros(6 + comm.rank), "sum", algorithm), 3)
