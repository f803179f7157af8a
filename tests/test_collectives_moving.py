"""The collectives that move chunks about: scatter, gather, all-to-all; and what is particular to some algorithms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from ranks import UNDER_MPIRUN, on_ranks

from minidist import backend
from minidist.collectives import (
    ALGORITHMS,
    all_gather,
    all_to_all,
    barrier,
    broadcast,
    gather,
    reduce_scatter,
    scatter,
)
from minidist.collectives.binomial import binomial_tree
from minidist.collectives.chain import LATENCY_BYTES, chain_broadcast_cost, segments
from minidist.comm import Network, alone, simulate

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)


def algorithms(operation: str):
    names = [name for name in ALGORITHMS[operation] if name != "mpi" or UNDER_MPIRUN]
    return pytest.mark.parametrize("algorithm", ["auto", *names])


def numbers(length: int, dtype: str = "int64", seed: int = 0) -> np.ndarray:
    """The same on all ranks."""
    return np.random.default_rng(seed).integers(0, 100, length).astype(dtype)


def uneven(size: int) -> list[int]:
    return [(3, 0, 1, 5, 0, 2)[rank % 6] for rank in range(size)]


def dealt(size: int) -> np.ndarray:
    """counts[i, j]: elements that rank i deals to rank j; many are 0."""
    return np.random.default_rng(size).integers(-2, 5, (size, size)).clip(0)


# -- scatter and gather -------------------------------------------------------------------------------------------


@algorithms("scatter")
@on_ranks(*SIZES)
def test_scatter_gives_each_rank_its_chunk_of_the_roots_array(comm, algorithm):
    for root in range(comm.size):
        for block in (0, 1, 5):
            array, out = numbers(comm.size * block), np.full(block, -1)
            assert scatter(comm, array.copy() if comm.rank == root else None, out, root, algorithm) is out
            assert_array_equal(out, array[comm.rank * block : (comm.rank + 1) * block])


@algorithms("gather")
@on_ranks(*SIZES)
def test_gather_gives_the_root_each_ranks_chunk(comm, algorithm):
    for root in range(comm.size):
        for block in (0, 1, 5):
            array = numbers(comm.size * block)
            mine, out = array[comm.rank * block : (comm.rank + 1) * block].copy(), np.full_like(array, -1)
            given = out if comm.rank == root else None
            assert gather(comm, mine, given, root, algorithm) is given
            made = gather(comm, mine, None, root, algorithm)
            if comm.rank == root:
                assert_array_equal(out, array)
                assert_array_equal(made, array)
            else:
                assert made is None


@pytest.mark.parametrize("algorithm", ["auto", "linear", "binomial"])
@on_ranks(*SIZES)
def test_scatter_and_gather_of_chunks_of_any_sizes(comm, algorithm):
    for counts in (uneven(comm.size), [0] * comm.size, [4] + [0] * (comm.size - 1), [0] * (comm.size - 1) + [4]):
        for root in {0, comm.size // 2, comm.size - 1}:
            array, here = numbers(sum(counts), "float32"), comm.rank == root
            out = np.full(counts[comm.rank], np.nan, np.float32)
            scatter(comm, array if here else None, out, root, algorithm, counts=counts)
            assert_array_equal(out, np.split(array, np.cumsum(counts)[:-1])[comm.rank])
            back = gather(comm, out, None, root, algorithm, counts=counts)
            assert back is None if not here else np.array_equal(back, array)


@pytest.mark.parametrize("algorithm", ["linear", "binomial"])
@on_ranks(1, 3, 4)
def test_the_roots_chunk_may_be_where_it_belongs(comm, algorithm):
    root, here = comm.size // 2, comm.rank == comm.size // 2
    array = numbers(comm.size * 4).reshape(comm.size, 4)
    whole = array.copy()
    mine = whole[root] if here else np.empty(4, int)
    scatter(comm, whole if here else None, mine, root, algorithm)
    assert_array_equal(mine, array[comm.rank])
    mine += 1
    gather(comm, mine, whole if here else None, root, algorithm)
    assert_array_equal(whole, array + 1 if here else array)


@given(size=st.integers(1, 40), root=st.integers(0, 39))
def test_the_binomial_tree_reaches_every_rank_once_in_lg_p_rounds(size, root):
    root %= size
    nodes = [binomial_tree(rank, size, root) for rank in range(size)]
    got_in_round = {root: 0}

    def hand_on(rank: int, start: int) -> None:
        assert nodes[rank].own.head == rank
        assert nodes[rank].own.first <= rank < nodes[rank].own.stop
        covered = {rank}
        for i, child in enumerate(nodes[rank].children):
            assert nodes[child.head].parent == rank
            assert nodes[child.head].own == child
            assert child.head not in got_in_round
            got_in_round[child.head] = start + i + 1
            covered |= set(range(child.first, child.stop))
            hand_on(child.head, start + i + 1)
        assert covered == set(range(nodes[rank].own.first, nodes[rank].own.stop))

    hand_on(root, 0)
    assert len(got_in_round) == size
    assert max(got_in_round.values()) == (size - 1).bit_length() == len(nodes[root].children)


# -- all-to-all ---------------------------------------------------------------------------------------------------


@algorithms("all_to_all")
@on_ranks(*SIZES)
def test_all_to_all_is_a_transpose(comm, algorithm):
    for block in (0, 1, 3):
        everything = numbers(comm.size**2 * block).reshape(comm.size, comm.size, block)
        array = everything[comm.rank].copy()
        out = all_to_all(comm, array, None, algorithm)
        assert out.shape == array.shape
        assert_array_equal(out, everything[:, comm.rank])
        into = np.full(array.size, -1)
        assert all_to_all(comm, array, into, algorithm) is into
        assert_array_equal(into.reshape(out.shape), out)
        assert_array_equal(array, everything[comm.rank])


@pytest.mark.parametrize("algorithm", ["auto", "pairwise"])
@on_ranks(*SIZES)
def test_all_to_all_of_chunks_of_any_sizes(comm, algorithm):
    counts = dealt(comm.size)
    chunks = [[numbers(counts[i, j], seed=100 * i + j) for j in range(comm.size)] for i in range(comm.size)]
    expected = np.concatenate([row[comm.rank] for row in chunks])
    sizes = {"counts": counts[comm.rank], "out_counts": counts[:, comm.rank]}
    array, out = np.concatenate(chunks[comm.rank]), np.empty_like(expected)
    assert_array_equal(all_to_all(comm, array, None, algorithm, **sizes), expected)
    assert all_to_all(comm, array, out, algorithm, **sizes) is out
    assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "complex128", "longdouble", ">f4", "bfloat16"])
@on_ranks(1, 3, 4)
def test_every_dtype_moves(comm, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    array, root = numbers(comm.size * comm.size * 2, dtype).reshape(comm.size, -1), comm.size - 1
    for algorithm in ALGORITHMS["all_to_all"]:
        if algorithm != "mpi":
            out = all_to_all(comm, array[comm.rank].copy(), None, algorithm)
            assert out.dtype == array.dtype
            assert_array_equal(out, array.reshape(comm.size, comm.size, 2)[:, comm.rank].reshape(-1))
    for algorithm in ("linear", "binomial"):
        out = scatter(comm, array if comm.rank == root else None, np.empty_like(array[0]), root, algorithm)
        assert_array_equal(out, array[comm.rank])
        whole = gather(comm, out, None, root, algorithm)
        if comm.rank == root:
            assert_array_equal(whole, array.reshape(-1))


@on_ranks(1, 3, 4)
def test_on_a_gpu_chunks_stay_there(comm, gpu):
    array = numbers(comm.size * comm.size * 2, "float32").reshape(comm.size, -1)
    mine, size = backend.to(array[comm.rank].copy(), "cuda"), comm.size

    def check(got, expected):
        assert backend.on_gpu(got)
        assert_array_equal(backend.to_numpy(got).reshape(-1), expected.reshape(-1))

    for algorithm in ("pairwise", "bruck"):
        check(all_to_all(comm, mine, None, algorithm), array.reshape(size, size, 2)[:, comm.rank])
    for algorithm in ("linear", "binomial"):
        whole = gather(comm, mine, None, 0, algorithm)
        assert (whole is None) == (comm.rank != 0)
        if comm.rank == 0:
            check(whole, array)
        out = backend.to(np.zeros(2 * size, np.float32), "cuda")
        check(scatter(comm, whole, out, 0, algorithm), array[comm.rank])
    for algorithm in ("scatter_all_gather", "chain", "binomial"):
        check(broadcast(comm, backend.to(array[comm.rank].copy(), "cuda"), 0, algorithm), array[0])
    held = np.zeros_like(array)
    held[comm.rank] = array[comm.rank]
    check(all_gather(comm, backend.to(held, "cuda"), "bruck"), array)
    check(
        reduce_scatter(comm, backend.to(array.reshape(-1).copy(), "cuda"), "sum", "pairwise"), array[comm.rank] * size
    )


@on_ranks(1, 3, 4)
def test_several_may_be_in_flight(comm):
    array, handles, size = numbers(comm.size * 3), [], comm.size
    outs = [np.zeros(3, int) for _ in range(4)]
    for i, out in enumerate(outs):
        root = i % size
        handles.append(scatter(comm, array * (i + 1) if comm.rank == root else None, out, root, async_op=True))
        handles.append(all_to_all(comm, array + i, algorithm=("pairwise", "bruck")[i % 2], async_op=True))
        handles.append(gather(comm, array + comm.rank, root=root, async_op=True))
    for i in reversed(range(4)):
        mine = array.reshape(size, 3)[comm.rank]
        assert_array_equal(handles[3 * i].wait(), mine * (i + 1))
        assert_array_equal(handles[3 * i + 1].wait(), np.tile(mine + i, size))
        whole = handles[3 * i + 2].wait()
        if comm.rank == i % size:
            assert_array_equal(whole.reshape(size, -1), array + np.arange(size)[:, None])
        else:
            assert whole is None


# -- particular to an algorithm -----------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4, 6, 8)
def test_pairwise_reduce_scatter_adds_in_the_order_it_says_and_leaves_the_other_chunks_alone(comm):
    size, rank = comm.size, comm.rank
    arrays = [np.random.default_rng(r).standard_normal(size * 7).astype(np.float32) for r in range(size)]
    array = arrays[rank].copy()
    chunk = reduce_scatter(comm, array, "sum", "pairwise")
    order = [rank ^ step if size in (1, 2, 4, 8) else (rank - step) % size for step in range(size)]
    mine = slice(rank * 7, (rank + 1) * 7)
    expected = arrays[rank][mine].copy()
    for other in order[1:]:
        expected += arrays[other][mine]
    assert_array_equal(chunk, expected)
    array[mine] = arrays[rank][mine]
    assert_array_equal(array, arrays[rank])


@on_ranks(*SIZES)
def test_bruck_all_gather_puts_chunks_of_any_sizes_in_their_places(comm):
    for counts in (None, uneven(comm.size), [0] * comm.size, [0] * (comm.size - 1) + [9]):
        expected = numbers(3 * comm.size + 2 if counts is None else sum(counts))
        edges = np.cumsum(counts)[:-1] if counts is not None else comm.size
        array = expected.copy()
        for rank, chunk in enumerate(np.array_split(array, edges)):
            chunk[...] = chunk if rank == comm.rank else -1
        assert_array_equal(all_gather(comm, array, "bruck", counts=counts), expected)


@pytest.mark.parametrize("algorithm", ["scatter_all_gather", "chain"])
@on_ranks(*SIZES)
def test_broadcasts_of_large_arrays_for_every_length_and_root(comm, algorithm):
    for root in range(comm.size):
        for length in (0, 1, comm.size - 1, 2 * comm.size + 1, 30_011):
            array = numbers(length, "int32", seed=comm.rank)
            broadcast(comm, array, root, algorithm)
            assert_array_equal(array, numbers(length, "int32", seed=root))


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
def test_nobody_leaves_the_tree_barrier_before_all_have_come(size, sends):
    def program(comm):
        comm.elapse(comm.rank)
        barrier(comm, "tree")
        return comm.clock()

    assert min(simulate(program, size, network=Network(sends=sends)).results) == size - 1


# -- what they cost -----------------------------------------------------------------------------------------------

A, B, G = 1e-5, 1e-9, 3e-10
BLOCK = 1 << 12  # elements of 8 bytes
CALLS = {
    "broadcast": lambda comm, root, name: broadcast(comm, np.zeros(BLOCK * comm.size), root, name),
    "scatter": lambda comm, root, name: scatter(
        comm, np.zeros(BLOCK * comm.size) if comm.rank == root else None, np.zeros(BLOCK), root, name
    ),
    "gather": lambda comm, root, name: gather(comm, np.zeros(BLOCK), None, root, name),
    "all_to_all": lambda comm, root, name: all_to_all(comm, np.zeros(BLOCK * comm.size), None, name),
    "all_gather": lambda comm, root, name: all_gather(comm, np.zeros(BLOCK * comm.size), name),
    "reduce_scatter": lambda comm, root, name: reduce_scatter(comm, np.zeros(BLOCK * comm.size), "sum", name),
    "barrier": lambda comm, root, name: barrier(comm, name),
}
EXACT = [
    *[("broadcast", name) for name in ("binomial", "scatter_all_gather", "chain")],
    *[("scatter", "linear"), ("scatter", "binomial"), ("gather", "linear"), ("gather", "binomial")],
    *[("all_to_all", "pairwise"), ("all_to_all", "bruck"), ("all_gather", "ring"), ("all_gather", "bruck")],
    *[("reduce_scatter", "ring"), ("reduce_scatter", "pairwise"), ("barrier", "dissemination"), ("barrier", "tree")],
]


@pytest.mark.parametrize("operation, algorithm", EXACT)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 16])
@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
def test_virtual_time_is_the_formulas(operation, algorithm, size, sends):
    network = Network(alpha=A, beta=B, gamma=G, sends=sends)
    nbytes = 0 if operation == "barrier" else BLOCK * size * 8
    seconds = ALGORITHMS[operation][algorithm].cost(size, nbytes, A, B, G)
    for seed, root in enumerate((0, size // 2, size - 1)):
        run = simulate(CALLS[operation], size, root, algorithm, seed=seed, network=network)
        assert run.seconds == pytest.approx(seconds, rel=1e-12, abs=0)


def test_the_formulas_are_the_published_ones():
    p, n, lg = 8, 1 << 20, 3
    published = {
        ("broadcast", "binomial"): lg * (A + n * B),
        ("broadcast", "scatter_all_gather"): (lg + p - 1) * A + 2 * n * (p - 1) / p * B,
        ("scatter", "linear"): (p - 1) * A + n * (p - 1) / p * B,
        ("scatter", "binomial"): lg * A + n * (p - 1) / p * B,
        ("gather", "binomial"): lg * A + n * (p - 1) / p * B,
        ("all_to_all", "pairwise"): (p - 1) * (A + n / p * B),
        ("all_to_all", "bruck"): lg * (A + n / 2 * B),
        ("all_gather", "bruck"): lg * A + n * (p - 1) / p * B,
        ("reduce_scatter", "pairwise"): (p - 1) * A + n * (p - 1) / p * (B + G),
        ("barrier", "dissemination"): lg * A,
        ("barrier", "tree"): 2 * lg * A,
    }
    for (operation, algorithm), seconds in published.items():
        assert ALGORITHMS[operation][algorithm].cost(p, n, A, B, G) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 8, 32])
@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
def test_a_chain_of_segments_takes_what_its_formula_says(size, count, sends):
    n = 1 << 18
    network = Network(alpha=A, beta=B, segment=n // count, sends=sends)
    k = segments(size, n, n // count)
    assert k >= count
    run = simulate(lambda comm: broadcast(comm, np.zeros(n, np.uint8), size - 1, "chain"), size, network=network)
    assert run.seconds == pytest.approx((size - 2 + k) * (A + n / k * B), rel=1e-12)
    assert run.seconds == pytest.approx(chain_broadcast_cost(size, n, A, B, G, n // count), rel=1e-12)
    assert run.messages == (size - 1) * k


def test_the_chain_cuts_its_array_nearly_as_is_best():
    a, b = LATENCY_BYTES * B, B
    for p in (2, 3, 8, 100):
        for n in (0, 1, 1 << 12, 1 << 20, 1 << 26):
            best = min((p - 2 + k) * (a + n / k * b) for k in (2**i for i in range(16)))
            assert chain_broadcast_cost(p, n, a, b, 0) <= 1.05 * best
    assert segments(2, 1 << 26) == 1  # one link: nothing to overlap
    assert segments(4, 1 << 20, longest=1 << 14) == 64


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_messages_and_bytes_are_what_the_files_say(size):
    rounds, block = (size - 1).bit_length(), BLOCK * 8
    bits = sum(rank.bit_count() for rank in range(size))

    def run(operation: str, algorithm: str):
        return simulate(CALLS[operation], size, 0, algorithm)

    for operation in ("scatter", "gather"):
        for algorithm in ("linear", "binomial"):
            assert run(operation, algorithm).messages == size - 1
        assert run(operation, "linear").bytes == (size - 1) * block
    assert run("scatter", "linear").messages_by_rank == [size - 1] + [0] * (size - 1)
    assert run("scatter", "binomial").messages_by_rank[0] == rounds
    assert run("scatter", "binomial").bytes_by_rank[0] == (size - 1) * block
    assert run("all_gather", "bruck").messages_by_rank == [rounds] * size
    assert run("all_gather", "bruck").bytes_by_rank == [(size - 1) * block] * size
    for operation in ("all_to_all", "reduce_scatter"):
        assert run(operation, "pairwise").messages_by_rank == [size - 1] * size
        assert run(operation, "pairwise").bytes_by_rank == [(size - 1) * block] * size
    assert run("all_to_all", "bruck").messages_by_rank == [rounds] * size
    assert run("all_to_all", "bruck").bytes_by_rank == [bits * block] * size
    assert run("barrier", "tree").messages == 2 * (size - 1)
    broadcast_bytes = run("broadcast", "scatter_all_gather").bytes_by_rank
    assert max(broadcast_bytes) == broadcast_bytes[0] == 2 * (size - 1) * block


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_mistakes_are_refused_with_what_is_allowed():
    comm, array = alone(), np.zeros(6)
    read_only = np.zeros(6)
    read_only.flags.writeable = False
    for call, words in [
        (lambda: scatter(comm, array, array.copy(), 3), "root 3: .* 0 to 0"),
        (lambda: scatter(comm, None, array), "array=None on rank 0, the root"),
        (lambda: scatter(comm, array, np.zeros(5)), "array has 6 elements, .* chunks have 5 together"),
        (lambda: scatter(comm, array, np.zeros(6), counts=[5]), r"out has 6 elements, .* counts \[5\]"),
        (lambda: scatter(comm, array, np.zeros(6), counts=[3, 3]), "counts has 2 entries, the communicator 1 ranks"),
        (lambda: scatter(comm, array, np.zeros(6, np.float32)), "array is float64 on cpu, out is float32 on cpu"),
        (lambda: scatter(comm, array, read_only), "read-only"),
        (
            lambda: scatter(comm, array, np.zeros(6), algorithm="ring"),
            "no algorithm 'ring'; choose auto, linear, binom",
        ),
        (lambda: scatter(comm, np.zeros((6, 2))[:, 0], np.zeros(6)), "not contiguous"),
        (lambda: gather(comm, array, np.zeros(7)), "out has 7 elements, .* chunks have 6 together"),
        (lambda: gather(comm, array, np.zeros(6, int)), "out is int64 on cpu, array is float64"),
        (lambda: gather(comm, array, counts=[-6]), "fewer than 0"),
        (lambda: all_to_all(comm, array, array), "overlap in memory"),
        (lambda: all_to_all(comm, array[:4], array[2:]), "overlap in memory"),
        (lambda: all_to_all(comm, array, np.zeros(5)), "out has 5 elements, the chunks to come 6"),
        (lambda: all_to_all(comm, array, counts=[6]), r"counts=\[6\], out_counts=None: .* both of them, or neither"),
        (lambda: all_to_all(comm, array, counts=[5], out_counts=[5]), r"sum to 5, the array has 6"),
        (lambda: all_to_all(comm, array, counts=[6], out_counts=[5]), "what rank 0 deals to itself"),
        (lambda: all_to_all(comm, array, None, "bruck", counts=[6], out_counts=[6]), "choose auto or pairwise"),
        (lambda: all_to_all(comm, array, read_only), "read-only"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    for not_an_array in ([1.0], 3, "text"):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array"):
            scatter(comm, not_an_array, array)
    scatter(comm, read_only, array)
    assert gather(comm, read_only).flags.writeable
    all_to_all(comm, read_only)


def test_what_only_some_ranks_can_get_wrong():
    for call, words in [
        (lambda comm: scatter(comm, np.zeros(6), np.zeros(2)), "array is the root's alone: pass None on rank [12]"),
        (lambda comm: gather(comm, np.zeros(2), np.zeros(6)), "out is the root's alone: pass None on rank [12]"),
        (lambda comm: all_to_all(comm, np.zeros(5)), "5 elements cannot be cut into 3 chunks .* counts and out_counts"),
        (lambda comm: scatter(comm, np.zeros(6) if comm.rank == 0 else None, np.zeros(2 + comm.rank // 2)), "elements"),
        (lambda comm: gather(comm, np.zeros(2 + comm.rank // 2)), "message has 3 elements"),
    ]:
        with pytest.raises(ValueError, match=words):
            simulate(call, 3)
