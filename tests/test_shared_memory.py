"""All-reduce through shared memory: what the table's tests of all algorithms do not reach, on real ranks.

Under plain pytest the ranks are simulated, and share no memory: then that is what is checked.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
from launch import needs_mpi, run_ranks
from numpy.testing import assert_array_equal
from ranks import on_ranks

from minidist.collectives import all_reduce, barrier
from minidist.collectives.reductions import Reduction
from minidist.collectives.shared_memory import HALF, PIECE, SHORT
from minidist.comm.shared import SharedMemory


def has_none(comm) -> bool:
    """Simulated ranks have no such memory."""
    if comm.network is None:
        return False
    with pytest.raises(ValueError, match="algorithm 'shared_memory' needs ranks started by mpirun"):
        all_reduce(comm, np.ones(3), algorithm="shared_memory")
    return True


def numbers(rank: int, length: int, dtype: str, salt: int = 0) -> np.ndarray:
    return np.random.default_rng((rank, salt)).integers(0, 9, length).astype(dtype)


def total(comm, length: int, dtype: str, salt: int = 0) -> np.ndarray:
    return functools.reduce(np.add, [numbers(rank, length, dtype, salt) for rank in range(comm.size)])


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "complex128", "longdouble"])
@on_ranks(1, 2, 3, 4)
def test_arrays_of_no_piece_of_one_and_of_several(comm, dtype):
    if has_none(comm):
        return
    piece, short = PIECE // np.dtype(dtype).itemsize, SHORT // comm.size // np.dtype(dtype).itemsize
    for length in (0, 1, short, short + 1, piece - 1, piece, piece + 1, 2 * piece + 5):
        array = all_reduce(comm, numbers(comm.rank, length, dtype), algorithm="shared_memory")
        assert_array_equal(array, total(comm, length, dtype))


@on_ranks(2, 3, 4)
def test_short_and_long_arrays_of_several_dtypes_in_any_turn(comm):
    """A slot that is written too early would change what a slow rank still reads."""
    if has_none(comm):
        return
    draw = np.random.default_rng(7)  # the same on all ranks
    chance = np.random.default_rng(comm.rank)
    combine_all = Reduction.combine_all

    def be_late() -> None:
        if chance.random() < 0.2:
            np.sort(chance.random(20_000))

    def slowly(self, arrays, out) -> None:
        be_late()
        combine_all(self, arrays, out)
        be_late()

    with patch.object(Reduction, "combine_all", slowly):
        for salt in range(300):
            length = int(draw.choice([3, 1000, HALF // comm.size // 8, 90_000]))
            dtype = str(draw.choice(["float32", "float64", "int16"]))
            be_late()
            array = all_reduce(comm, numbers(comm.rank, length, dtype, salt), algorithm="shared_memory")
            assert_array_equal(array, total(comm, length, dtype, salt))


@on_ranks(2, 3, 4)
def test_several_in_flight_take_turns(comm):
    if has_none(comm):
        return
    lengths = [5, 200_000, 7, 100_000, 1]
    handles = [
        all_reduce(comm, numbers(comm.rank, n, "float64", i), algorithm="shared_memory", async_op=True)
        for i, n in enumerate(lengths)
    ]
    alone = all_reduce(comm, numbers(comm.rank, 9, "int64"), algorithm="shared_memory")  # waits for its turn
    assert_array_equal(alone, total(comm, 9, "int64"))
    for i in np.random.default_rng(comm.rank).permutation(len(lengths)):
        assert_array_equal(handles[i].wait(), total(comm, lengths[i], "float64", i))
    barrier(comm)


@on_ranks(2, 3, 4)
def test_arrays_that_differ_are_told_on_every_rank_and_then_all_goes_on(comm):
    if has_none(comm):
        return
    odd = comm.rank == comm.size - 1
    cases = [
        (np.ones(10 + odd), "80 bytes of float64, 88 bytes of float64"),
        (np.ones(10, "f" if odd else "d"), "80 bytes of float64, 40 bytes of float32"),
        (np.ones(10, "f" if odd else "i"), "40 bytes of int32, 40 bytes of float32"),
        (np.ones(10, ">i4" if odd else "<i4"), "40 bytes of int32, 40 bytes of int32 in the other byte order"),
    ]
    for array, words in cases:
        with pytest.raises(ValueError, match=f"the ranks' arrays differ: rank 0 to {comm.size - 1} have .*{words}"):
            all_reduce(comm, array, algorithm="shared_memory")
    with pytest.raises(ValueError, match="differ"):  # one piece, and several
        all_reduce(comm, np.ones(3 * PIECE if odd else PIECE, np.int8), algorithm="shared_memory")
    assert_array_equal(all_reduce(comm, np.ones(4), algorithm="shared_memory"), comm.size)


@on_ranks(2, 3)
def test_after_a_failure_the_next_call_says_so(comm):
    if has_none(comm):
        return
    group = comm.split(0)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        all_reduce(group, np.full(3, 1e308), algorithm="shared_memory")
    with pytest.raises(RuntimeError, match=r"no use any more: an all-reduce has failed \(FloatingPointError"):
        all_reduce(group, np.ones(3), algorithm="shared_memory")


@on_ranks(3, 4)
def test_groups_have_memory_of_their_own(comm):
    if has_none(comm):
        return
    groups = [comm.split(0), comm.split(comm.rank % 2)]
    handles = [
        all_reduce(group, np.full(50_000, comm.rank + 1.0), algorithm="shared_memory", async_op=True)
        for group in groups
    ]
    for group, handle in reversed(list(zip(groups, handles))):
        assert_array_equal(handle.wait(), sum(member + 1.0 for member in _members(comm, group)))


def _members(comm, group) -> range:
    return range(comm.size) if group.size == comm.size else range(comm.rank % 2, comm.size, 2)


@needs_mpi
@pytest.mark.parametrize("cma", ["0", "1"])
def test_messages_under_way_come_along_while_a_rank_waits_for_flags(monkeypatch, cma):
    monkeypatch.setenv("MPIR_CVAR_CH4_CMA_ENABLE", cma)  # 0: long messages need the sender's help until their end
    program = (
        "import time, numpy as np, minidist as md\n"
        "comm = md.comm.world()\n"
        "md.collectives.all_reduce(comm, np.ones(5), algorithm='shared_memory')\n"
        "start = time.monotonic()\n"
        "long = np.ones(4_000_000)\n"
        "if comm.rank == 0:\n"
        "    sending = comm.isend(long, 1)\n"
        "else:\n"
        "    comm.recv(long, 0)\n"
        "md.collectives.all_reduce(comm, np.ones(5), algorithm='shared_memory')\n"
        "if comm.rank == 0:\n"
        "    sending.wait()\n"
        "assert time.monotonic() - start < 5, time.monotonic() - start\n"
    )
    done = run_ranks(2, "-c", program, deadline=60)
    assert done.returncode == 0, done.stderr


@needs_mpi
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_deadline():
    program = (
        "import time, numpy as np, minidist as md\n"
        "comm = md.comm.world()\n"
        "md.collectives.all_reduce(comm, np.ones(5), algorithm='shared_memory')\n"
        "comm.timeout = 1.0\n"
        "if comm.rank == 1:\n"
        "    time.sleep(30)\n"
        "md.collectives.all_reduce(comm, np.ones(5), algorithm='shared_memory')\n"
    )
    done = run_ranks(3, "-c", program, deadline=20)
    assert done.returncode != 0
    assert "all_reduce shared_memory" in done.stderr
    assert "Waited for, but not waiting: rank 1" in done.stderr


@on_ranks(2, 3, 4)
def test_it_adds_in_the_order_of_ranks(comm):
    if has_none(comm):
        return
    for length in (1000, PIECE):
        parts = [np.random.default_rng(rank).standard_normal(length).astype(np.float32) for rank in range(comm.size)]
        array = all_reduce(comm, parts[comm.rank].copy(), algorithm="shared_memory")
        assert_array_equal(array, functools.reduce(np.add, parts), strict=True)


@pytest.mark.parametrize("method", ["create", "attach"])
@on_ranks(2, 3)
def test_memory_that_one_rank_cannot_get_is_told_on_all(comm, method):
    if has_none(comm):
        return
    group, of_rank = comm.split(0), 0 if method == "create" else comm.size - 1
    fails = patch.object(SharedMemory, method, side_effect=OSError) if comm.rank == of_rank else nullcontext()
    with fails, pytest.raises(RuntimeError, match="memory cannot be made, or not be shared"):
        all_reduce(group, np.ones(4), algorithm="shared_memory")
    assert_array_equal(all_reduce(group, np.ones(4), algorithm="ring"), comm.size)


@on_ranks(2, 3)
def test_a_call_that_was_given_up_makes_nobody_wait(comm):
    if has_none(comm):
        return
    group = comm.split(0)
    group.timeout = 0.2
    if comm.rank == 0:
        with pytest.raises(TimeoutError):
            all_reduce(group, np.ones(4), algorithm="shared_memory")
        with pytest.raises(RuntimeError, match="no use any more: an all-reduce was given up"):
            all_reduce(group, np.ones(4), algorithm="shared_memory")
    barrier(comm)
