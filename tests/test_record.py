"""The flight record: what it notes, what it keeps, and what it lets go."""

from __future__ import annotations

import gc
import re
import threading
import weakref

import numpy as np
import pytest
from ranks import on_ranks

from minidist.collectives import all_reduce, barrier
from minidist.comm import alone
from minidist.comm.record import LENGTH, FlightRecord


def new(comm, before):
    """What has been recorded since `before` operations."""
    return [op for op in comm.record.operations() if op.number > before]


def count(comm):
    return max((op.number for op in comm.record.operations()), default=0)


@on_ranks(2, 3, 4)
def test_a_message_is_noted_at_both_ends(comm):
    before = count(comm)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    with comm.step("D.3(4)"):
        receiving = comm.irecv(np.empty((2, 3), np.float32), left, tag=7)
        sending = comm.isend(np.zeros((2, 3), np.float32), right, tag=7)
    under_way = new(comm, before)[0]
    assert under_way.end is None
    receiving.wait()
    sending.wait()
    received, sent = new(comm, before)
    assert (received.kind, received.peer, sent.kind, sent.peer) == ("receive", left, "send", right)
    assert received.number + 1 == sent.number
    for op in (received, sent):
        assert (op.group, op.nbytes, op.dtype, op.tag, op.label) == (comm, 24, np.float32, 7, "D.3(4)")
    assert received.end is not None
    assert received.end >= received.start
    assert str(received) == f"receive from rank {left}, tag 7, 24 bytes float32"
    assert str(sent) == f"send to rank {right}, tag 7, 24 bytes float32"


@on_ranks(2, 3)
def test_a_receive_that_is_tested_is_ended_too(comm):
    before = count(comm)
    if comm.rank == 0:
        receiving = comm.irecv(np.empty(2), 1)
        while not receiving.test():
            pass
        (op,) = new(comm, before)
        assert op.end is not None
    elif comm.rank == 1:
        comm.send(np.zeros(2), 0)


@on_ranks(1, 2, 3, 4)
def test_a_collective_is_one_entry_and_its_messages_are_none(comm):
    before, started = count(comm), comm.operations
    with comm.step("M.2(4)"):
        all_reduce(comm, np.ones(10, np.float32), algorithm="ring")
        barrier(comm)
    first, second = new(comm, before)
    assert comm.operations == started + 2
    assert (first.kind, first.peer, first.nbytes, first.dtype) == ("all_reduce ring", None, 40, np.float32)
    assert second.kind.startswith("barrier ")
    assert first.label == second.label == "M.2(4)"
    assert first.start <= first.end <= second.start <= second.end
    assert str(first) == "all_reduce ring, 40 bytes float32"


@on_ranks(1, 2, 3, 4)
def test_a_collective_in_progress_has_no_end(comm):
    before = count(comm)
    handle = all_reduce(comm, np.ones(10), algorithm="ring", async_op=True)
    (op,) = new(comm, before)
    assert comm.size == 1 or op.end is None or handle.done
    handle.wait()
    (op,) = new(comm, before)
    assert op.end is not None


@on_ranks(2, 4)
def test_all_communicators_of_a_rank_share_one_record(comm):
    group = comm.split(comm.rank % 2)
    assert group.record is comm.record
    before = count(comm)
    for where in (comm, group):
        where.sendrecv(np.zeros(1), where.rank, np.zeros(1), where.rank)
    assert [op.group for op in new(comm, before)] == [comm, comm, group, group]


@on_ranks(1, 3)
def test_labels_nest_and_end_with_their_block(comm):
    before = comm.record.label
    with comm.step("outer"):
        with pytest.raises(KeyError), comm.step("inner"):
            assert comm.record.label == "inner"
            raise KeyError
        assert comm.record.label == "outer"
    assert comm.record.label == before


@on_ranks(1, 2, 3)
def test_the_last_256_are_kept(comm):
    for i in range(200):
        comm.sendrecv(np.full(1, i), comm.rank, np.empty(1, int), comm.rank)
    operations = comm.record.operations()
    assert LENGTH == 256
    assert len(operations) == 256
    numbers = [op.number for op in operations]
    assert numbers == list(range(numbers[0], numbers[0] + 256))
    assert numbers[-1] >= 400
    assert [op.kind for op in operations] == ["receive", "send"] * 128
    assert all(op.end is not None for op in operations)


@on_ranks(1)
def test_no_array_is_kept(comm):
    array, other = np.zeros(1000), np.zeros(1000)
    comm.sendrecv(array, 0, other, 0)
    all_reduce(comm, array)
    gone = [weakref.ref(array), weakref.ref(other)]
    del array, other
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert [op.nbytes for op in comm.record.operations()[-3:]] == [8000] * 3


def test_a_table_of_all_operations():
    comm = alone()
    assert comm.record.table() == "nothing sent, received or combined so far"
    comm.send(np.zeros(500), 0, tag=2)
    with comm.step("D.3(4)"):
        receiving = comm.irecv(np.zeros(500), 0, tag=2)
    head, sent, received = comm.record.table().splitlines()
    assert re.split("  +", head) == ["number", "start s", "took ms", "step", "operation", "ranks"]
    assert sent.split()[:2] == ["1", "0.000000"]
    assert "send to rank 0, tag 2, 4,000 bytes float64" in sent
    under_way = ["under way", "D.3(4)", "receive from rank 0, tag 2, 4,000 bytes float64", "0"]
    assert re.split("  +", received.strip())[2:] == under_way
    receiving.wait()
    assert "under way" not in comm.record.table().splitlines()[2]


def test_it_can_be_read_while_another_thread_writes_it():
    comm, stop = alone(), threading.Event()
    record, array = FlightRecord(comm.clock), np.zeros(1)

    def write():
        while not stop.is_set():
            record.end(record.begin("send", comm, 0, array, 0))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            numbers = [op.number for op in record.operations()]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    finally:
        stop.set()
        writer.join()


@on_ranks(2, 3)
def test_what_has_failed_is_over(comm):
    before = count(comm)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        all_reduce(comm.split(0), np.full(3, 1e308), algorithm="ring")
    sending = comm.isend(np.ones(2), (comm.rank + 1) % comm.size)
    with pytest.raises(ValueError, match="16 bytes"):
        comm.recv(np.ones(3), (comm.rank - 1) % comm.size)
    sending.wait()
    assert [op.end is not None for op in new(comm, before)] == [True] * 3
