"""Every algorithm of every collective, against NumPy on one rank; and the mistakes that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from collective_cases import (
    BITWISE,
    COMBINE,
    DTYPES,
    EQUAL_CHUNKS,
    FLOATS,
    OPERATIONS,
    Problem,
    every_algorithm,
    needs_processes,
    ops_of,
    rows,
    where,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from ranks import UNDER_MPIRUN, on_ranks

from minidist import backend, collectives
from minidist.collectives import (
    ALGORITHMS,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    chunk_slice,
    reduce_scatter,
)
from minidist.comm import Link, Network, alone, simulate

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)
FEW = (1, 3, 4, 6)
REDUCING, ROOTED, COUNTED = where("op"), where("root"), where("counts")


def uneven(ranks: int, pattern: tuple[int, ...] = (3, 0, 1, 5, 0, 2)) -> tuple[int, ...]:
    """Counts that differ by rank, with zeros."""
    return tuple(pattern[rank % len(pattern)] for rank in range(ranks))


def assert_same_bits_on_all_ranks(comm, array):
    """Rank 0 tells the others its bits."""
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if comm.rank == 0:
        for rank in range(1, comm.size):
            comm.send(bits, rank)
    else:
        assert_array_equal(comm.recv(np.empty_like(bits), 0), bits)


# -- results ------------------------------------------------------------------------------------------------------


@every_algorithm()
@on_ranks(*SIZES)
def test_every_algorithm_has_numpys_result_for_every_length(comm, operation, algorithm):
    size = comm.size
    for shape in [(0,), (1,), (size - 1,), (size,), (2 * size + 1,), (3 * size,), (), (size + 1, 3), (2, 0)]:
        problem = Problem(operation, size, shape, "int16", root=size // 2)
        problem.solve(comm, algorithm)


@every_algorithm()
@on_ranks(3, 4, seeds=1, once=True)
def test_every_algorithm_takes_every_dtype(comm, operation, algorithm):
    for dtype in [*DTYPES, "uint16", "uint32", "uint64", "longdouble", ">f4"]:
        problem = Problem(operation, comm.size, (7,), dtype, root=1)
        problem.solve(comm, algorithm)


@every_algorithm(*REDUCING)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "float32", "complex128"])
@on_ranks(*FEW, seeds=1, once=True)
def test_every_algorithm_combines_by_every_op(comm, operation, algorithm, dtype):
    for op in ops_of(dtype):
        problem = Problem(operation, comm.size, (13,), dtype, op, root=comm.size - 1)
        problem.solve(comm, algorithm)


@every_algorithm()
@on_ranks(1, 3, 4, seeds=1, once=True)
def test_bfloat16_travels_and_adds_up(comm, operation, algorithm):
    pytest.importorskip("ml_dtypes")
    for op in ops_of("float32") if operation in REDUCING else ["sum"]:
        problem = Problem(operation, comm.size, (9,), "bfloat16", op)
        problem.solve(comm, algorithm)


@every_algorithm(*ROOTED)
@on_ranks(2, 3, 4, 7)
def test_any_rank_can_be_the_root(comm, operation, algorithm):
    for root in range(comm.size):
        problem = Problem(operation, comm.size, (2 * comm.size + 1,), root=root)
        problem.solve(comm, algorithm)


@pytest.mark.parametrize("operation, algorithm", [row for row in rows(*COUNTED) if row not in EQUAL_CHUNKS])
@on_ranks(*SIZES)
def test_chunks_may_be_of_any_sizes(comm, operation, algorithm):
    size = comm.size
    for counts in [uneven(size), uneven(size)[::-1], (0,) * (size - 1) + (7,), (0,) * size, (4,) + (0,) * (size - 1)]:
        problem = Problem(operation, size, (sum(counts),), counts=counts, root=size - 1)
        problem.solve(comm, algorithm)


@every_algorithm(*(name for name in OPERATIONS if not OPERATIONS[name].dealt))
@on_ranks(1, 3)
def test_the_result_is_in_the_array_that_was_given(comm, operation, algorithm):
    problem = Problem(operation, comm.size, (4, 3))
    array = problem.array(comm.rank)
    result = problem.run(comm, algorithm, array)
    if OPERATIONS[operation].returns == "array":
        assert result is array
    else:
        assert result.ndim == 1
        assert np.shares_memory(result, array)


@every_algorithm("scatter", "gather", "all_to_all")
@on_ranks(1, 3)
def test_the_result_is_in_out_and_array_stays_as_it_was(comm, operation, algorithm):
    problem = Problem(operation, comm.size, (4, 3))
    array, expected = problem.array(comm.rank), problem.expected(comm.rank)
    array.flags.writeable = False
    mine = array[comm.rank] if operation == "gather" else array if operation != "scatter" or comm.rank == 0 else None
    out = None if expected is None else np.empty((expected.size // 3, 3), int)
    result = getattr(collectives, operation)(comm, mine, out, algorithm=algorithm)
    assert result is out
    problem.check(comm.rank, out)
    assert_array_equal(array, problem.array(comm.rank))


@on_ranks(1, 3)
def test_without_out_one_is_made(comm):
    problem = Problem("gather", comm.size, (4, 3))
    gathered = problem.run(comm, "auto")
    assert gathered is None if comm.rank else gathered.shape == (comm.size * 12,)
    assert Problem("all_to_all", comm.size, (4, 3)).run(comm, "auto").shape == (comm.size, 4, 3)


@every_algorithm()
@on_ranks(1, 3, 5)
def test_an_array_that_comes_again_gives_a_new_result(comm, operation, algorithm):
    for seed in range(3):
        problem = Problem(operation, comm.size, (11,), "float32", root=seed % comm.size, seed=seed)
        problem.solve(comm, algorithm)


@pytest.mark.parametrize("operation", list(OPERATIONS))
@given(
    which=st.integers(0, 99),
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    counts=st.none() | st.lists(st.integers(0, 9), min_size=7, max_size=7).map(tuple),
    dtype=st.sampled_from(DTYPES),
    op=st.integers(0, 99),
    root=st.integers(0, 99),
    seed=st.integers(0, 99),
)
@settings(max_examples=10 if UNDER_MPIRUN else 40)
@on_ranks(3, 4, 7, seeds=1)
def test_any_problem_has_numpys_result(comm, operation, which, shape, counts, dtype, op, root, seed):
    algorithms, ops, size = [algorithm for _, algorithm in rows(operation)], ops_of(dtype), comm.size
    algorithm = algorithms[which % len(algorithms)]
    if counts is not None and operation in COUNTED and (operation, algorithm) not in EQUAL_CHUNKS:
        counts = counts[:size]
        shape = (sum(counts),)
    else:
        counts = None
    problem = Problem(operation, size, shape, dtype, ops[op % len(ops)], root % size, counts, seed)
    problem.solve(comm, algorithm)


@every_algorithm()
@on_ranks(2, 3, 4, once=True)
def test_arrays_of_many_kilobytes_that_begin_anywhere_in_a_cache_line(comm, operation, algorithm):
    for offset in (0, 1, 3):
        problem = Problem(operation, comm.size, (20_003,), "float64", root=1)
        numbers = problem.array(comm.rank)
        array = np.empty(numbers.size + offset)[offset:].reshape(numbers.shape)
        array[...] = numbers
        problem.solve(comm, algorithm, array)


@pytest.mark.parametrize("operation", list(OPERATIONS))
@on_ranks(1, 3, 4)
def test_an_algorithm_is_chosen_where_none_is_named(comm, operation):
    for length in (0, 3, 1000, 100_000):
        problem = Problem(operation, comm.size, (length,), "float32")
        problem.solve(comm, "auto")


# -- hosts --------------------------------------------------------------------------------------------------------

HOSTS = [(0, 0, 1, 1), (0, 1, 0, 1, 0), (0, 0, 0, 1, 1, 2), (0, 1, 2), (0, 0, 0, 0, 0, 0, 0, 1), (2, 2, 1, 1, 0, 0)]


@every_algorithm("all_reduce")
@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("segment, sends", [(math.inf, "eager"), (24, "rendezvous")])
def test_ranks_on_several_hosts_get_numpys_result(operation, algorithm, hosts, segment, sends):
    network = Network(hosts=hosts, between=Link(1e-5, 1e-9), sends=sends, segment=segment)
    problems = [(0, "int8", "sum"), (3, "int8", "max"), (37, "float64", "mean"), (50, "int64", "sum")]

    def program(comm):
        for length, dtype, op in problems:
            problem = Problem(operation, comm.size, (length,), dtype, op)
            array = problem.solve(comm, algorithm)
            assert_same_bits_on_all_ranks(comm, array)

    for seed in range(2):
        simulate(program, len(hosts), seed=seed, network=network)


# -- bits ---------------------------------------------------------------------------------------------------------


@every_algorithm("all_reduce")
@pytest.mark.parametrize("dtype", FLOATS)
@on_ranks(2, 3, 4, 5, 6, 8)
def test_every_rank_gets_the_same_bits(comm, operation, algorithm, dtype):
    for op in ("sum", "mean", "prod"):
        arrays = [np.random.default_rng(rank).standard_normal(101).astype(dtype) for rank in range(comm.size)]
        array = all_reduce(comm, arrays[comm.rank].copy(), op, algorithm)
        assert_same_bits_on_all_ranks(comm, array)
        exact = np.stack(arrays).astype(float)
        result = {"sum": np.sum, "mean": np.mean, "prod": np.prod}[op](exact, axis=0)
        scale = np.prod(np.abs(exact), axis=0) if op == "prod" else np.abs(exact).sum(0)
        assert np.all(np.abs(array - result) <= comm.size * np.finfo(dtype).eps * scale + np.finfo(dtype).tiny)


@every_algorithm("all_reduce")
@on_ranks(2, 3, 4, 5, 6, 8)
def test_every_rank_gets_the_same_zeros_and_the_same_nans(comm, operation, algorithm):
    if algorithm == "mpi":
        return  # MPI says nothing of them
    nans = np.array([0x7FC00001, 0x7FC00002, 0xFFC00003, 0x7FC00004], np.uint32).view(np.float32)
    choices = np.concatenate([[-0.0, 0.0, -0.0, 0.0, 1.0], nans]).astype(np.float32)
    arrays = [choices[np.random.default_rng(rank).integers(0, len(choices), 300)] for rank in range(comm.size)]
    for op in ("min", "max", "sum", "prod"):
        array = all_reduce(comm, arrays[comm.rank].copy(), op, algorithm)
        assert_same_bits_on_all_ranks(comm, array)
        assert_array_equal(array, COMBINE[op].reduce(np.stack(arrays)))  # nan equals nan here, and -0.0 equals 0.0


@every_algorithm(*(name for name in OPERATIONS if name not in REDUCING))
@on_ranks(3, 4)
def test_what_only_moves_keeps_its_bits(comm, operation, algorithm):
    problem = Problem(operation, comm.size, (50,), "uint32", root=1)
    result = problem.run(comm, algorithm, problem.array(comm.rank).view(np.float32))  # nans with payloads among them
    if result is not None:
        problem.check(comm.rank, result.view(np.uint32))


@every_algorithm(*REDUCING)
@pytest.mark.parametrize("size", [3, 4, 6])
def test_a_run_repeats_bit_for_bit_in_any_interleaving(operation, algorithm, size):
    problem = Problem(operation, size, (37,))

    def program(comm):
        array = np.random.default_rng(comm.rank).standard_normal(37).astype(np.float32)
        return problem.run(comm, algorithm, array)

    runs = [simulate(program, size, seed=seed).results for seed in range(5)]
    ranks = [problem.root] if operation in ROOTED else range(size)
    for rank in ranks:
        assert len({run[rank].tobytes() for run in runs}) == 1


# -- accumulating in float32 --------------------------------------------------------------------------------------


@every_algorithm(*where("accumulate"))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@on_ranks(1, 3, 4, 7)
def test_sixteen_bit_floats_accumulate_in_float32_on_request(comm, operation, algorithm, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    # 256 and 2048 are where these dtypes begin to leave out odd numbers: there, small terms one by one get lost.
    big, problem = {"float16": 2048, "bfloat16": 256}[dtype], Problem(operation, comm.size, (30,), dtype)
    terms = [(np.where(np.arange(30) % comm.size == rank, big, 1)).astype(dtype) for rank in range(comm.size)]
    total = np.sum(np.stack(terms).astype(np.float32), axis=0)
    once_rounded = total.astype(dtype)
    result = problem.run(comm, algorithm, terms[comm.rank].copy(), accumulate="float32")
    assert result.dtype == once_rounded.dtype
    if problem.expected(comm.rank) is not None:
        mine = problem.cut(once_rounded)[comm.rank] if operation == "reduce_scatter" else once_rounded
        if operation == "scan":
            mine = np.sum(np.stack(terms[: comm.rank + 1]).astype(np.float32), axis=0).astype(dtype)
        assert_array_equal(result.astype(np.float32).reshape(-1), mine.astype(np.float32))


@pytest.mark.parametrize("dtype, big", [("float16", 2048), ("bfloat16", 256)])
def test_sixteen_bit_floats_lose_small_terms_where_they_do_not(dtype, big):
    """So that the test above shows something."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")

    def program(comm, accumulate):
        array = np.array([big if comm.rank == 0 else 1], dtype)
        return float(all_reduce(comm, array, "sum", "naive", accumulate=accumulate)[0])

    assert simulate(program, 5, None).results == [big] * 5
    assert simulate(program, 5, "float32").results == [big + 4] * 5


@every_algorithm("reduce_scatter")
@on_ranks(3, 4)
def test_uneven_chunks_accumulate_in_float32(comm, operation, algorithm):
    counts = uneven(comm.size)
    problem = Problem(operation, comm.size, (sum(counts),), "float16", counts=counts)
    terms = np.full(sum(counts), 2048 if comm.rank == 0 else 1, np.float16)
    chunk = problem.run(comm, algorithm, terms, accumulate="float32")
    assert_array_equal(chunk, np.full(counts[comm.rank], 2048 + comm.size - 1, np.float16))


@on_ranks(3)
def test_float32_accumulates_in_float64_on_request(comm):
    array = np.array([2.0**24 if comm.rank == 0 else 1], np.float32)
    assert all_reduce(comm, array.copy(), accumulate="float64")[0] == 2.0**24 + 2


@pytest.mark.parametrize("operation", where("accumulate"))
def test_only_floats_accumulate_in_wider_floats(operation):
    call = OPERATIONS[operation].call
    for dtype, accumulate in [("int16", "float32"), ("float64", "float32"), ("float16", "int32"), ("V2", "float32")]:
        array = np.ones(3).astype(dtype) if dtype != "V2" else np.zeros(3, "V2")
        before = array.tobytes()
        with pytest.raises((TypeError, ValueError), match=accumulate):
            call(alone(), array, accumulate=accumulate)
        assert array.tobytes() == before


# -- where the arrays are -----------------------------------------------------------------------------------------


@every_algorithm()
@on_ranks(1, 3, 4)
def test_arrays_on_a_gpu_stay_there(comm, operation, algorithm, gpu):
    for dtype, length in [("float32", 7), ("int64", 2), ("float16", 0)]:
        problem = Problem(operation, comm.size, (length,), dtype, root=comm.size - 1)
        array = backend.to(problem.array(comm.rank), "cuda")
        result = problem.solve(comm, algorithm, array)
        assert backend.on_gpu(result) or (
            result is None and (needs_processes(operation, algorithm) or operation == "gather")
        )


@pytest.mark.parametrize("operation", where("accumulate"))
@on_ranks(1, 3)
def test_arrays_on_a_gpu_accumulate_in_float32(comm, operation, gpu):
    problem = Problem(operation, comm.size, (7,), "float16")
    result = problem.run(comm, "auto", backend.to(problem.array(comm.rank), "cuda"), accumulate="float32")
    assert backend.on_gpu(result)
    problem.check(comm.rank, result)


# -- other things than results --------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4)
def test_reduce_scatter_update_all_gather_is_a_sharded_step(comm):
    problem = Problem("all_reduce", comm.size, (11,), "float64")
    parameters, gradients = np.ones(11), problem.array(comm.rank)
    chunk = reduce_scatter(comm, gradients)
    parameters[chunk_slice(11, comm.size, comm.rank)] -= 0.5 * chunk
    all_gather(comm, parameters)
    assert_allclose(parameters, 1 - 0.5 * problem.combined(), rtol=1e-12)


@every_algorithm()
@on_ranks(2, 3)
def test_collectives_keep_clear_of_the_programs_own_messages(comm, operation, algorithm):
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    problem, got = Problem(operation, comm.size), np.zeros(10, int)
    receive = comm.irecv(got, left)
    problem.solve(comm, algorithm)
    comm.send(np.full(10, comm.rank), right)
    receive.wait()
    assert_array_equal(got, left)


@on_ranks(4)
def test_groups_work_each_for_itself(comm):
    group = comm.split(comm.rank % 2)
    problem = Problem("all_reduce", comm.size)
    array = all_reduce(group, problem.array(comm.rank))
    assert_array_equal(array, problem.flat(comm.rank % 2) + problem.flat(comm.rank % 2 + 2))
    problem.solve(comm, "auto")


@every_algorithm("scan")
@on_ranks(1, 2, 3, 4, 5, 8)
def test_an_exclusive_scan_leaves_out_ones_own(comm, operation, algorithm):
    for length, dtype, op in [(0, "int32", "sum"), (11, "int8", "prod"), (5, "float32", "mean"), (4, "int64", "max")]:
        problem = Problem(operation, comm.size, (length,), dtype, op)
        array = problem.array(comm.rank)
        assert problem.run(comm, algorithm, array, exclusive=True) is array
        if comm.rank == 0:
            assert_array_equal(array, problem.array(0))
        else:
            problem.check(comm.rank - 1, array)


@every_algorithm("broadcast")
@on_ranks(1, 3)
def test_the_root_of_a_broadcast_may_hold_a_read_only_array(comm, operation, algorithm):
    problem = Problem(operation, comm.size)
    array = problem.array(comm.rank)
    array.flags.writeable = comm.rank != problem.root
    problem.solve(comm, algorithm, array)


@every_algorithm("barrier")
@pytest.mark.parametrize("size", [2, 3, 6])
def test_nobody_leaves_a_barrier_before_all_have_come(operation, algorithm, size):
    for seed in range(20):
        come: list[int] = []

        def program(comm, come=come):
            for _ in range(comm.rank):
                comm.sendrecv(np.zeros(1), comm.rank, np.zeros(1), comm.rank)  # be late
            come.append(comm.rank)
            barrier(comm, algorithm)
            return len(come)

        assert simulate(program, size, seed=seed).results == [size] * size


@every_algorithm("barrier")
@on_ranks(*SIZES)
def test_barriers_follow_one_another(comm, operation, algorithm):
    for _ in range(3):
        barrier(comm, algorithm)


# -- segments -----------------------------------------------------------------------------------------------------


@every_algorithm()
@pytest.mark.parametrize("segment", [1, 64, 107])
@on_ranks(1, 3, 4, once=True)
def test_cutting_messages_into_segments_changes_no_bit(comm, operation, algorithm, segment):
    problem = Problem(operation, comm.size, (67,), root=1 % comm.size)
    array = np.random.default_rng(comm.rank).standard_normal(problem.array(0).shape).astype(np.float32)
    whole = problem.run(comm, algorithm, array.copy())
    before, comm.segment = comm.segment, segment
    try:
        cut = problem.run(comm, algorithm, array.copy())
    finally:
        comm.segment = before
    if problem.expected(comm.rank) is None:
        return
    if algorithm == "hierarchical":  # whose chunks are those of segments
        assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)
    else:
        assert cut.tobytes() == whole.tobytes()


@every_algorithm(*REDUCING)
def test_segments_are_more_messages_but_no_more_bytes(operation, algorithm):
    problem = Problem(operation, 4, (4 * 48,), "float32")

    def program(comm, segment):
        comm.segment = segment
        problem.run(comm, algorithm)

    whole, cut = simulate(program, 4, 1e9), simulate(program, 4, 64)
    assert cut.bytes == whole.bytes
    if algorithm in ("ring", "pairwise"):
        assert cut.messages - whole.messages == 4 * 3 * 2  # each partial sum of 192 bytes is 3 messages now
    elif algorithm not in ("naive", "recursive_doubling"):  # which send whole arrays
        assert cut.messages > whole.messages


# -- chunks and mistakes ------------------------------------------------------------------------------------------


@given(length=st.integers(0, 50), ranks=st.integers(1, 12))
def test_chunks_are_those_of_array_split(length, ranks):
    array = np.arange(length)
    for rank, chunk in enumerate(np.array_split(array, ranks)):
        assert_array_equal(array[chunk_slice(length, ranks, rank)], chunk)


def refused(call, array, words, error=ValueError, ranks=1, **arguments):
    """Every rank's call raises, naming `words`, and leaves the array as it was."""

    def program(comm):
        before = array.tobytes() if isinstance(array, np.ndarray) and not array.dtype.hasobject else None
        with pytest.raises(error, match=words):
            call(comm, array, **arguments)
        assert before is None or array.tobytes() == before
        assert comm.operations == 0  # so that the ranks' tags still agree after a mistake on one
        assert not comm.in_flight

    simulate(program, ranks)


# What takes an array, on one rank. "scatter to": its `out`.
CALLS = {
    **{name: operation.call for name, operation in OPERATIONS.items() if not operation.dealt},
    "scatter": lambda comm, array: collectives.scatter(comm, array, np.ones(4)),
    "scatter to": lambda comm, array: collectives.scatter(comm, np.ones(4), array),
    "gather": lambda comm, array: collectives.gather(comm, array),
    "gather to": lambda comm, array: collectives.gather(comm, np.ones(4), array),
    "all_to_all": lambda comm, array: collectives.all_to_all(comm, array),
    "all_to_all to": lambda comm, array: collectives.all_to_all(comm, np.ones(4), array),
}
MADE = ("gather to", "all_to_all to")  # None is no mistake there: one is made
READ_ONLY = ("broadcast", "scatter", "gather", "all_to_all")  # which need not write to the array of rank 0

every_call = pytest.mark.parametrize("call", list(CALLS))
every_operation = pytest.mark.parametrize("operation", list(OPERATIONS))
ASYNC = pytest.mark.parametrize("async_op", [False, True])


@ASYNC
@every_operation
def test_what_needs_processes_is_refused_on_simulated_ranks(operation, async_op):
    call = OPERATIONS[operation].call
    for name in (name for name in ALGORITHMS[operation] if needs_processes(operation, name)):
        words = f"algorithm '{name}' needs ranks started by mpirun"
        refused(call, np.ones(4), words, algorithm=name, async_op=async_op)


@ASYNC
@every_operation
def test_an_unknown_algorithm_is_refused_with_those_there_are(operation, async_op):
    names = ", ".join(ALGORITHMS[operation])
    words = f"{operation}: no algorithm 'star'; choose auto, {names}"
    refused(OPERATIONS[operation].call, np.ones(4), words, algorithm="star", async_op=async_op)
    with pytest.raises(ValueError, match="barrier: no algorithm 'ring'; choose auto, dissemination"):
        barrier(alone(), "ring", async_op=async_op)


@ASYNC
@pytest.mark.parametrize("operation", REDUCING)
def test_an_unknown_op_is_refused_with_those_there_are(operation, async_op):
    words = "op 'median': choose one of sum, mean, prod, min, max, logical_and, logical_or, logical_xor, bitwise_and"
    refused(OPERATIONS[operation].call, np.ones(4), words, op="median", async_op=async_op)


@pytest.mark.parametrize("operation", REDUCING)
def test_ops_without_meaning_for_a_dtype_are_refused(operation):
    for dtype in ("int64", "uint8", "bool"):
        refused(OPERATIONS[operation].call, np.ones(4, dtype), f"op 'mean' of {dtype}", op="mean")
    for dtype in ("float32", "complex64"):
        for op in BITWISE:
            refused(OPERATIONS[operation].call, np.ones(4, dtype), f"op '{op}' of {dtype}", TypeError, op=op)


@pytest.mark.parametrize("operation", ROOTED)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_root_that_is_no_rank_is_refused(operation, ranks):
    for root in (-1, ranks, 99):
        refused(OPERATIONS[operation].call, np.ones(4), f"root {root}: .* 0 to {ranks - 1}", ranks=ranks, root=root)
    refused(OPERATIONS[operation].call, np.ones(4), "root|integer", TypeError, ranks=ranks, root="zero")
    refused(OPERATIONS[operation].call, np.ones(4), "root|integer", TypeError, ranks=ranks, root=0.0)


@pytest.mark.parametrize("operation", ["reduce_scatter", "all_gather"])
def test_counts_that_do_not_cut_the_array_are_refused(operation):
    array = np.ones(6)
    for counts, words in [
        ((3, 3), "counts has 2 entries, the communicator 3 ranks"),
        ((1, 2, 4), r"counts \[1, 2, 4\] sum to 7, the array has 6"),
        ((8, -2, 0), r"counts \[8, -2, 0\]"),
    ]:
        refused(OPERATIONS[operation].call, array, words, ranks=3, counts=counts)
    refused(OPERATIONS[operation].call, array, "integer", TypeError, ranks=3, counts=(2.0, 2.0, 2.0))


def test_counts_that_do_not_fit_the_arrays_are_refused():
    refused(collectives.gather, np.ones(2), "counts has 2 entries, the communicator 3 ranks", ranks=3, counts=(2, 2))
    words = r"array has 2 elements, where counts \[3, 3, 3\]"
    refused(collectives.gather, np.ones(2), words, ranks=3, counts=(3, 3, 3))
    words = "array has 7 elements, where the 1 ranks' chunks have 4 together"
    refused(CALLS["scatter"], np.ones(7), words)


@every_call
def test_arrays_that_are_not_contiguous_are_refused(call):
    for array in (np.ones((4, 4)).T[1:], np.ones((4, 4))[:, 0], np.ones(8)[::2], np.ones(8)[::-1]):
        refused(CALLS[call], array, r"not contiguous")


@pytest.mark.parametrize("call", [call for call in CALLS if call not in READ_ONLY])
def test_arrays_that_cannot_be_written_are_refused(call):
    array = np.ones(4)
    array.flags.writeable = False
    refused(CALLS[call], array, r"read-only array \(shape \(4,\), float64\)")


@pytest.mark.parametrize("call", READ_ONLY)
def test_arrays_that_are_only_read_may_be_read_only(call):
    array = np.ones(4)
    array.flags.writeable = False
    assert_array_equal(CALLS[call](alone(), array), 1)


def test_only_the_root_of_a_broadcast_may_hold_a_read_only_array():
    def program(comm):
        array = np.ones(4)
        array.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            broadcast(comm, array, root=1 - comm.rank)

    simulate(program, 2)


@every_call
def test_what_is_no_array_is_refused(call):
    for thing, name in [([1.0, 2.0], "list"), (3.0, "float"), (None, "NoneType"), (b"123", "bytes")]:
        if thing is not None or call not in (*MADE, "scatter"):
            refused(CALLS[call], thing, f"expected a NumPy or CuPy array, got {name}", TypeError)


@every_call
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_what_is_more_than_an_array_of_numbers_is_refused(call):
    refused(CALLS[call], np.matrix([[1.0, 2.0], [3.0, 4.0]]), "a matrix is more than", TypeError)
    refused(CALLS[call], np.ma.masked_array(np.ones(4), mask=True), "a MaskedArray is more than", TypeError)


@every_call
def test_arrays_of_python_objects_are_refused(call):
    refused(CALLS[call], np.array([1, "two"], object), "dtype object", TypeError)
    refused(CALLS[call], np.zeros(2, [("a", object)]), "dtype .*objects", TypeError)


@pytest.mark.parametrize("call", [call for call in CALLS if call.endswith(" to")])
def test_an_out_that_does_not_fit_is_refused(call):
    refused(CALLS[call], np.ones(4, np.float32), "float32.*float64|float64.*float32")
    refused(CALLS[call], np.ones(5), "has [45] elements")


@pytest.mark.parametrize("call", [call for call in CALLS if call.endswith(" to")])
def test_an_out_on_another_device_is_refused(call, gpu):
    refused(CALLS[call], backend.to(np.ones(4), "cuda"), "cpu.*cuda|cuda.*cpu")


def test_scatter_and_gather_want_the_whole_array_on_the_root_only():
    def program(comm):
        if comm.rank == 0:
            with pytest.raises(ValueError, match="array=None on rank 0, the root"):
                collectives.scatter(comm, None, np.ones(2))
        else:
            with pytest.raises(ValueError, match="pass None on rank 1, as the root is rank 0"):
                collectives.scatter(comm, np.ones(4), np.ones(2))
            with pytest.raises(ValueError, match="pass None on rank 1, as the root is rank 0"):
                collectives.gather(comm, np.ones(2), np.ones(4))

    simulate(program, 2)


def test_an_all_to_all_that_cannot_be_cut_or_would_overwrite_itself_is_refused():
    array = np.ones(7)

    def program(comm):
        for arguments, words in [
            ({}, "array of 7 elements cannot be cut into 3 chunks"),
            ({"counts": (3, 3, 1)}, "needs both of them"),
            ({"out_counts": (3, 3, 1)}, "needs both of them"),
            ({"counts": (3, 3, 1), "out_counts": (2, 2, 2)}, "differ in what rank . deals to itself"),
            ({"counts": (3, 3, 1), "out_counts": (3, 3, 1), "algorithm": "bruck"}, "bruck"),
        ]:
            with pytest.raises(ValueError, match=words):
                collectives.all_to_all(comm, array, **arguments)
        with pytest.raises(ValueError, match="overlap"):
            collectives.all_to_all(comm, array[:6], array[1:])

    simulate(program, 3)


@pytest.mark.parametrize("operation", REDUCING)
@pytest.mark.parametrize("op", ["sum", "max", "logical_and"])
@pytest.mark.parametrize("dtype", ["U4", "S3", "V4", "i4,f8"])
def test_what_are_no_numbers_is_not_reduced(operation, op, dtype):
    refused(OPERATIONS[operation].call, np.zeros(4, dtype), r"op|dtype", (TypeError, ValueError), op=op)


@every_algorithm("all_reduce")
def test_arrays_of_different_sizes_are_refused(operation, algorithm):
    with pytest.raises(ValueError, match=r"message has \d+ elements .* receiving array"):
        simulate(lambda comm: all_reduce(comm, np.zeros(6 + comm.rank), "sum", algorithm), 3)


@every_algorithm("all_reduce")
def test_arrays_of_different_dtypes_are_refused(operation, algorithm):
    with pytest.raises(TypeError, match=r"message is (int|float)64, the receiving array is (int|float)64"):
        simulate(lambda comm: all_reduce(comm, np.zeros(6, [int, float][comm.rank % 2]), "sum", algorithm), 3)


def test_the_table_of_cases_has_every_operation():
    assert {*OPERATIONS, "barrier"} == set(ALGORITHMS)
    assert not UNDER_MPIRUN
    assert broadcast is OPERATIONS["broadcast"].call
