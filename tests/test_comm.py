"""What every communicator does, simulated or over MPI."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from ranks import on_ranks

from minidist import backend
from minidist.comm import MAX_TAG, Communicator, alone, refuse, simulate, world

DTYPES = ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64", "complex128"]


def payload(rank: int, shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    """Values that differ by rank and position, the same wherever they are made."""
    values = np.random.default_rng(rank).integers(0, 100, shape)
    return np.asarray(values % 2 if dtype == "bool" else values).astype(dtype)


def neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size


# -- point to point -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@on_ranks(1, 3)
def test_an_array_of_any_dtype_and_shape_arrives(comm, dtype, shape):
    right, left = neighbours(comm)
    got = comm.sendrecv(payload(comm.rank, shape, dtype), right, np.zeros(shape, dtype), left)
    assert_array_equal(got, payload(left, shape, dtype))


@on_ranks(2, 3, 4)
def test_recv_returns_the_array_that_it_filled(comm):
    array = np.zeros(5)
    if comm.rank == 0:
        for rank in range(1, comm.size):
            assert comm.recv(array, rank) is array
            assert_array_equal(array, payload(rank, (5,)))
    else:
        comm.send(payload(comm.rank, (5,)), 0)


@on_ranks(2, 3, 4)
def test_messages_with_one_source_and_tag_keep_their_order(comm):
    right, left = neighbours(comm)
    sends = [comm.isend(np.array([comm.rank, i]), right) for i in range(20)]
    assert [comm.recv(np.zeros(2, int), left).tolist() for _ in range(20)] == [[left, i] for i in range(20)]
    for send in sends:
        send.wait()


@on_ranks(2, 3)
def test_a_tag_picks_its_message_whatever_came_first(comm):
    right, left = neighbours(comm)
    sends = [comm.isend(np.array([tag]), right, tag) for tag in (0, 5, MAX_TAG)]
    for tag in (MAX_TAG, 0, 5):
        assert comm.recv(np.zeros(1, int), left, tag) == [tag]
    for send in sends:
        send.wait()


@on_ranks(1, 3)
def test_receives_match_in_the_order_they_were_posted_not_waited_for(comm):
    right, left = neighbours(comm)
    first, second = np.zeros(1), np.zeros(1)
    receives = [comm.irecv(first, left), comm.irecv(second, left)]
    sends = [comm.isend(np.array([value]), right) for value in (1.0, 2.0)]
    for request in [*reversed(receives), *sends]:
        request.wait()
        request.wait()  # a second time does nothing
        assert request.test()
    assert (first[0], second[0]) == (1, 2)


@on_ranks(2, 4)
def test_test_says_when_a_message_is_here(comm):
    right, left = neighbours(comm)
    got = np.zeros(3)
    receive = comm.irecv(got, left)
    if comm.rank == 0:
        assert not receive.test()  # the last rank waits for its left before it sends, and so on down to us
        comm.send(payload(0, (3,)), right)
    while not receive.test():
        pass
    assert_array_equal(got, payload(left, (3,)))
    if comm.rank != 0:
        comm.send(payload(comm.rank, (3,)), right)


@on_ranks(2)
def test_an_array_may_be_changed_once_it_is_sent(comm):
    array = np.full(100_000, comm.rank)
    request = comm.isend(array, 1 - comm.rank)
    got = comm.recv(np.zeros_like(array), 1 - comm.rank)
    request.wait()
    array[:] = -1
    assert (got == 1 - comm.rank).all()


@on_ranks(2)
def test_a_view_that_is_contiguous_is_read_and_written_in_place(comm):
    array = np.zeros((4, 3))
    array[comm.rank] = comm.rank + 1
    comm.sendrecv(array[comm.rank], 1 - comm.rank, array[1 - comm.rank], 1 - comm.rank)
    assert_array_equal(array[:2], [[1, 1, 1], [2, 2, 2]])


@given(messages=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)), max_size=12))
@on_ranks(3)
def test_any_pattern_of_messages_arrives(comm, messages):
    numbered = list(enumerate(messages))  # (number, (source, dest, tag))
    mine = [(i, source, tag) for i, (source, dest, tag) in numbered if dest == comm.rank]
    sends = [comm.isend(np.array([i]), dest, tag) for i, (source, dest, tag) in numbered if source == comm.rank]
    arrays = [np.array([-1]) for _ in mine]
    receives = [comm.irecv(array, source, tag) for array, (_, source, tag) in zip(arrays, mine)]
    for request in receives + sends:
        request.wait()
    assert [int(array[0]) for array in arrays] == [i for i, _, _ in mine]


@on_ranks(1, 2, 3)
def test_messages_on_a_gpu_arrive_on_the_gpu(comm, gpu):
    right, left = neighbours(comm)
    sent = backend.to(payload(comm.rank, (6,), "float32"), "cuda")
    got = backend.to(np.zeros(6, np.float32), "cuda")
    assert comm.sendrecv(sent, right, got, left) is got
    assert backend.on_gpu(got)
    assert_array_equal(backend.to_numpy(got), payload(left, (6,), "float32"))


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_arguments_are_refused_with_both_values_named():
    comm, array = alone(), np.zeros(4)
    read_only = np.zeros(4)
    read_only.flags.writeable = False
    for call, error, words in [
        (lambda: comm.send(array, 1), ValueError, "dest 1: .* 0 to 0"),
        (lambda: comm.send(array, -1), ValueError, "dest -1: .* 0 to 0"),
        (lambda: comm.recv(array, 7), ValueError, "source 7: .* 0 to 0"),
        (lambda: comm.send(array, 0, -1), ValueError, f"tag -1: .* 0 to {MAX_TAG}"),
        (lambda: comm.recv(array, 0, MAX_TAG + 1), ValueError, f"tag {MAX_TAG + 1}: .* 0 to {MAX_TAG}"),
        (lambda: comm.send(array, 0.5), TypeError, "dest 0.5, tag 0: expected whole numbers"),
        (lambda: comm.send(array[::2], 0), ValueError, r"\(2,\) and strides \(16,\) .*ascontiguousarray"),
        (lambda: comm.recv(np.zeros((2, 3)).T, 0), ValueError, r"\(3, 2\) .*ascontiguousarray"),
        (lambda: comm.send([1.0], 0), TypeError, "expected a NumPy or CuPy array, got list"),
        (lambda: comm.send(np.float64(3), 0), TypeError, "array, got float64"),
        (lambda: comm.send(np.array([None]), 0), TypeError, "dtype object"),
        (lambda: comm.recv(read_only, 0), ValueError, "read-only"),
        (lambda: comm.split(-3), ValueError, "color -3"),
    ]:
        with pytest.raises(error, match=words):
            call()


@on_ranks(2)
def test_a_message_of_another_size_is_refused_by_the_receiver(comm):
    if comm.rank == 0:
        comm.send(np.zeros(3), 1, tag=1)
        comm.send(np.zeros(9), 1, tag=2)
    else:
        with pytest.raises(ValueError, match=r"24 bytes.*40"):
            comm.recv(np.zeros(5), 0, tag=1)
        with pytest.raises(ValueError, match=r"tag 2.*message has .*bytes.*40"):
            comm.recv(np.zeros(5), 0, tag=2)


def test_a_timeout_from_the_environment_must_be_a_number(monkeypatch):
    monkeypatch.setenv("MINIDIST_TIMEOUT", "12.5")
    assert alone().timeout == 12.5
    for text in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("MINIDIST_TIMEOUT", text)
        with pytest.raises(ValueError, match=f"MINIDIST_TIMEOUT='{text}'"):
            alone()


@on_ranks(2)
def test_a_wait_with_a_timeout_gives_up_and_may_be_tried_again(comm):
    if comm.rank == 0:
        comm.recv(np.zeros(1), 1, tag=1)
        comm.send(np.array([5.0]), 1)
    else:
        got = np.zeros(1)
        receive = comm.irecv(got, 0)
        with pytest.raises(TimeoutError, match=r"has waited 0\.01 .*s.* receive from rank 0, tag 0"):
            receive.wait(timeout=0.01)
        comm.send(np.zeros(1), 0, tag=1)
        receive.wait()
        assert got == 5


# -- groups -------------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4)
def test_split_makes_a_group_of_each_color_ordered_by_key(comm):
    comm.timeout = 33.0
    group = comm.split(comm.rank % 2, key=-comm.rank)
    members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2][::-1]
    assert (group.rank, group.size, group.timeout) == (members.index(comm.rank), len(members), 33.0)
    right, left = neighbours(group)
    assert group.sendrecv(np.array([comm.rank]), right, np.zeros(1, int), left) == members[left]


@on_ranks(1, 3, 4)
def test_split_with_equal_keys_keeps_the_order_of_ranks(comm):
    group = comm.split(7)
    assert (group.rank, group.size) == (comm.rank, comm.size)


@on_ranks(1, 2, 3)
def test_split_gives_nothing_to_a_rank_without_color(comm):
    group = comm.split(None if comm.rank == 0 else 1)
    assert (group is None) == (comm.rank == 0)
    if group is not None:
        assert (group.rank, group.size) == (comm.rank - 1, comm.size - 1)


@on_ranks(2, 3)
def test_groups_do_not_hear_one_another(comm):
    groups = [comm.split(0), comm.split(0), comm]
    right, left = neighbours(comm)
    sends = [group.isend(np.array([i]), right) for i, group in enumerate(groups)]
    for i, group in reversed(list(enumerate(groups))):
        assert group.recv(np.zeros(1, int), left) == i
    for send in sends:
        send.wait()


@on_ranks(4)
def test_a_group_splits_again(comm):
    pair = comm.split(comm.rank // 2)
    single = pair.split(pair.rank)
    assert (pair.size, single.size, single.rank) == (2, 1, 0)


@on_ranks(1, 3)
def test_on_one_host_everyone_is_on_my_host_and_alone_in_my_row(comm):
    host, across = comm.split_by_host()
    assert (host.rank, host.size) == (comm.rank, comm.size)
    assert (across.rank, across.size) == (0, 1)


# -- worlds -------------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 4)
def test_world_is_the_same_object_on_every_call(comm):
    assert world() is world()
    assert world().size >= comm.size
    assert world().rank == comm.rank


def test_refuse_ends_all_ranks_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        simulate(refuse, 4, "3 stages do not fit 4 ranks", 5)
    assert ended.value.code == 5
    assert capsys.readouterr().err == "3 stages do not fit 4 ranks\n"


# -- the harness itself -------------------------------------------------------------------------------------------


@given(number=st.integers(0, 9))
@on_ranks(3)
def test_assume_works_on_ranks(comm, number):
    assume(number % 2 == 0)
    assert number in (0, 2, 4, 6, 8)
