"""Looking for a message before it is received: who sent it and how long it is, from one source or from anyone."""

from __future__ import annotations

import numpy as np
import pytest
from pytest import approx
from ranks import on_ranks

from minidist.comm import Deadlock, Network, simulate


def message(rank: int, number: int) -> np.ndarray:
    return np.full(rank * 10 + number + 1, rank * 100 + number, np.int32)


@on_ranks(1, 2, 3, 4, 6)
def test_messages_from_anyone_are_found_with_their_sizes_and_each_senders_in_order(comm):
    each = 5
    if comm.rank:
        for number in range(each):
            comm.send(message(comm.rank, number), 0, tag=7)
        return
    numbers = dict.fromkeys(range(1, comm.size), 0)
    for _ in range(each * (comm.size - 1)):
        found = comm.probe(tag=7)
        expected = message(found.source, numbers[found.source])
        assert found.tag == 7 and found.nbytes == expected.nbytes
        assert comm.probe(found.source, 7) == found  # looking takes nothing away
        got = comm.recv(np.empty(found.nbytes // 4, np.int32), found.source, 7)
        np.testing.assert_array_equal(got, expected)
        numbers[found.source] += 1
    assert set(numbers.values()) <= {each} and comm.iprobe(tag=7) is None


@on_ranks(2, 3)
def test_only_the_source_and_tag_that_are_asked_for_are_seen(comm):
    last = comm.size - 1
    if comm.rank == last:
        comm.send(message(last, 0), 0, tag=1)
        comm.send(message(last, 1), 0, tag=2)
    if comm.rank == 0:
        assert comm.probe(last, 2).nbytes == message(last, 1).nbytes
        assert comm.probe(tag=1).source == last
        assert comm.iprobe(tag=3) is None
        if last > 1:
            assert comm.iprobe(1, 1) is None
        for tag in (1, 2):
            comm.recv(message(last, tag - 1), last, tag)


@on_ranks(4)
def test_a_group_sees_its_own_messages_by_its_own_ranks(comm):
    group = comm.split(comm.rank % 2, key=-comm.rank)
    if group.rank == 1:
        comm.send(message(9, 9), (comm.rank + 2) % 4, tag=0)
        group.send(message(comm.rank, 0), 0)
    else:
        found = group.probe()
        assert found.source == 1 and found.nbytes == message(comm.rank - 2, 0).nbytes
        group.recv(message(comm.rank - 2, 0), 1)
        comm.recv(message(9, 9), comm.rank - 2)


@on_ranks(2)
def test_a_probe_gives_up_after_its_timeout_and_can_be_tried_again(comm):
    if comm.rank == 0:
        with pytest.raises(TimeoutError):
            comm.probe(timeout=0.02)
        comm.send(message(0, 0), 1)
        assert comm.probe().source == 1
        comm.recv(message(1, 0), 1)
    else:
        comm.probe(0)
        comm.recv(message(0, 0), 0)
        comm.send(message(1, 0), 0)


@on_ranks(2)
def test_polling_for_a_message_ends(comm):
    if comm.rank == 0:
        while comm.iprobe() is None:
            pass
        comm.recv(message(1, 1), 1)
    else:
        comm.elapse(3.0)
        comm.send(message(1, 1), 0)


@on_ranks(1, 2)
def test_bad_arguments_are_refused(comm):
    with pytest.raises(ValueError, match="source 5"):
        comm.iprobe(5)
    with pytest.raises(ValueError, match="tag 40000"):
        comm.probe(tag=40000)
    with pytest.raises(TypeError):
        comm.probe("anyone")


def test_a_message_is_seen_when_it_arrives_and_not_before():
    network = Network(alpha=2.0, beta=0.5)

    def program(comm):
        if comm.rank == 1:
            comm.send(np.zeros(4, np.uint8), 0)
            comm.elapse(1.0)
        elif comm.rank == 2:
            comm.elapse(0.5)
            comm.send(np.zeros(1, np.uint8), 0, tag=1)
        else:
            assert comm.iprobe(1) is None
            first = comm.probe()
            comm.recv(np.empty(first.nbytes, np.uint8), first.source)
            early = comm.clock()
            comm.recv(np.empty(comm.probe(tag=1).nbytes, np.uint8), 2, 1)
            return first.source, early, comm.clock()
        return None

    source, early, late = simulate(program, 3, network=network).results[0]
    assert source == 1 and early == approx(4.0) and late == approx(4.0 + 2.5)  # the second waits for the port


def test_of_messages_that_come_at_once_the_seed_picks_the_first():
    def program(comm):
        if comm.rank:
            comm.send(np.zeros(1, np.uint8), 0)
            return None
        order = []
        for _ in range(comm.size - 1):
            order.append(comm.probe().source)
            comm.recv(np.empty(1, np.uint8), order[-1])
        return tuple(order)

    orders = {simulate(program, 4, seed=seed).results[0] for seed in range(60)}
    assert len(orders) == 6
    assert simulate(program, 4, seed=3).results[0] == simulate(program, 4, seed=3).results[0]


def test_a_rendezvous_message_is_seen_before_it_travels():
    def program(comm):
        if comm.rank:
            comm.send(np.zeros(10, np.uint8), 0)
        else:
            assert comm.probe().nbytes == 10
            comm.recv(np.empty(10, np.uint8), 1)

    assert simulate(program, 2, network=Network(alpha=1.0, sends="rendezvous")).seconds == approx(1.0)


def test_a_rank_that_waits_for_a_message_sees_a_late_rendezvous_one_when_it_is_sent():
    def program(comm):
        if comm.rank:
            comm.elapse(3.0)
            comm.send(np.zeros(10, np.uint8), 0)
            return None
        found = comm.probe(), comm.clock()
        comm.recv(np.empty(10, np.uint8), 1)
        return found

    run = simulate(program, 2, network=Network(alpha=1.0, sends="rendezvous"))
    assert run.results[0] == ((1, 0, 10), approx(3.0)) and run.seconds == approx(4.0)


def test_probing_for_what_nobody_sends_is_a_deadlock():
    with pytest.raises(Deadlock, match="a message from anyone, tag 4"):
        simulate(lambda comm: comm.probe(tag=4) if comm.rank == 0 else None, 3)

    def polls(comm):
        while comm.rank == 0 and comm.iprobe(tag=4) is None:
            pass

    with pytest.raises(Deadlock, match="a message from anyone, tag 4"):
        simulate(polls, 2)
