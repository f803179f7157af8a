"""Collectives that have been started and not yet waited for; and that none, in flight or not, can deadlock."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
from collective_cases import OPERATIONS, Problem, every_algorithm, needs_processes, rows
from numpy.testing import assert_array_equal
from ranks import on_ranks

from minidist import backend
from minidist.collectives import all_gather, all_reduce, barrier, broadcast
from minidist.comm import Deadlock, Network, simulate

RENDEZVOUS = Network(sends="rendezvous")


def one_of_each(size: int, length: int = 7) -> list[tuple[str, Problem]]:
    """(algorithm, problem) for every algorithm of every operation, each with numbers of its own."""
    return [
        (algorithm, Problem(operation, size, (length,), root=seed % size, seed=seed))
        for seed, (operation, algorithm) in enumerate(rows())
    ]


def start_all(comm, started):
    return [(problem, problem.run(comm, algorithm, async_op=True)) for algorithm, problem in started]


def wait_in_any_order(rank, *handles):
    """Every rank in an order of its own."""
    handles = [pair for pairs in handles for pair in pairs]
    random.Random(rank).shuffle(handles)
    for problem, handle in handles:
        problem.check(rank, handle.wait())


# -- one ----------------------------------------------------------------------------------------------------------


@every_algorithm()
@on_ranks(1, 3, 4)
def test_wait_returns_what_the_call_would_have(comm, operation, algorithm):
    problem = Problem(operation, comm.size)
    array = problem.array(comm.rank)
    handle = problem.run(comm, algorithm, array, async_op=True)
    result = handle.wait()
    problem.check(comm.rank, result)
    assert handle.wait() is result
    assert handle.test()
    assert (result is array) == (OPERATIONS[operation].returns == "array")
    assert not comm.in_flight


@every_algorithm()
@on_ranks(1, 3, 4)
def test_test_becomes_true(comm, operation, algorithm):
    problem = Problem(operation, comm.size, (5,))
    handle = problem.run(comm, algorithm, async_op=True)
    while not handle.test():
        pass
    problem.check(comm.rank, handle.wait())


@every_algorithm("barrier")
@on_ranks(1, 2, 3, 5)
def test_a_barrier_in_flight(comm, operation, algorithm):
    handles = [barrier(comm, algorithm, async_op=True) for _ in range(3)]
    assert [handle.wait() for handle in handles[::-1]] == [None] * 3


@every_algorithm("barrier")
@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_barrier_is_not_done_before_all_have_come(operation, algorithm, size):
    def program(comm):
        if comm.rank == size - 1:
            for rank in range(size - 1):
                comm.recv(np.empty(1), rank)  # the others have tested in vain
            barrier(comm, algorithm)
            return
        handle = barrier(comm, algorithm, async_op=True)
        assert not any(handle.test() for _ in range(5))
        comm.send(np.zeros(1), size - 1)
        handle.wait()

    for seed in range(10):
        simulate(program, size, seed=seed)


@every_algorithm()
@on_ranks(3)
def test_arrays_on_a_gpu_stay_there(comm, operation, algorithm, gpu):
    problem = Problem(operation, comm.size, (7,), "float32")
    if needs_processes(operation, algorithm):
        return  # which does not take them
    result = problem.run(comm, algorithm, backend.to(problem.array(comm.rank), "cuda"), async_op=True).wait()
    assert backend.on_gpu(result) or result is problem.expected(comm.rank) is None
    problem.check(comm.rank, result)


@every_algorithm("all_reduce")
@on_ranks(3, 4)
def test_sixteen_bit_floats_accumulate_in_float32(comm, operation, algorithm):
    array = np.array([2048 if comm.rank == 0 else 1], np.float16)
    handle = all_reduce(comm, array, "sum", algorithm, accumulate="float32", async_op=True)
    assert handle.wait() is array
    assert array[0] == np.float16(2048 + comm.size - 1)


# -- several ------------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4, 6)
def test_all_operations_at_once_waited_for_in_another_order_on_each_rank(comm):
    wait_in_any_order(comm.rank, start_all(comm, one_of_each(comm.size)))
    assert not comm.in_flight


@every_algorithm()
@on_ranks(2, 3, 4)
def test_several_of_one_algorithm_with_many_kilobytes(comm, operation, algorithm):
    problems = [Problem(operation, comm.size, (9001,), "int32", root=s % comm.size, seed=s) for s in range(4)]
    wait_in_any_order(comm.rank, start_all(comm, [(algorithm, problem) for problem in problems]))


@on_ranks(2, 3, 4)
def test_several_on_each_of_two_communicators(comm):
    other, some = comm.split(0), one_of_each(comm.size)
    here, there = some[::2], some[1::2]
    wait_in_any_order(comm.rank, start_all(comm, here), start_all(other, there))


@on_ranks(2, 4)
def test_several_on_a_communicator_and_on_a_part_of_it(comm):
    pair = comm.split(comm.rank // 2)
    whole = start_all(comm, one_of_each(comm.size)[::3])
    halves = start_all(pair, one_of_each(2)[1::3])
    random.Random(comm.rank).shuffle(halves)
    for problem, handle in halves:  # of which the numbers are those of ranks 0 and 1 of the pair
        problem.check(pair.rank, handle.wait())
    wait_in_any_order(comm.rank, whole)


@on_ranks(2, 3, 4)
def test_a_blocking_collective_while_others_are_in_flight(comm):
    for algorithm, problem in one_of_each(comm.size):
        before = Problem("all_reduce", comm.size, (11,), seed=91)
        handle = before.run(comm, "ring", async_op=True)
        problem.check(comm.rank, problem.run(comm, algorithm))
        before.check(comm.rank, handle.wait())


@on_ranks(2, 3, 4)
def test_messages_of_the_program_while_collectives_are_in_flight(comm):
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    started = start_all(comm, one_of_each(comm.size))
    got = comm.sendrecv(np.full(7, comm.rank), right, np.empty(7, int), left)
    assert_array_equal(got, left)
    if comm.rank == 0:
        comm.send(np.arange(3), right)
    elif comm.rank == 1:
        assert_array_equal(comm.recv(np.empty(3, int), left), np.arange(3))
    wait_in_any_order(comm.rank, started)


@on_ranks(2, 3)
def test_a_rank_that_waits_for_a_message_keeps_its_operations_moving(comm):
    """Rank 0's own wait comes last; the others cannot finish without it."""
    handle = all_reduce(comm, np.full(9, comm.rank), algorithm="naive", async_op=True)
    if comm.rank == 0:
        for rank in range(1, comm.size):
            comm.recv(np.empty(1), rank)
    else:
        handle.wait()
        comm.send(np.zeros(1), 0)
    assert_array_equal(handle.wait(), sum(range(comm.size)))


@pytest.mark.parametrize("operation, algorithm", rows("all_reduce"))
@on_ranks(3)
def test_hundreds_in_flight_that_are_cut_into_segments(comm, operation, algorithm):
    before, comm.segment = comm.segment, 16
    count = 300 if algorithm == "hierarchical" else 100  # which uses several tags at a time
    try:
        handles = [all_reduce(comm, np.arange(9) + i, algorithm=algorithm, async_op=True) for i in range(count)]
        for i in random.Random(comm.rank).sample(range(count), count):
            assert_array_equal(handles[i].wait(), (np.arange(9) + i) * comm.size)
    finally:
        comm.segment = before


@on_ranks(3)
def test_more_in_flight_than_there_are_tags(comm):
    handles = [all_reduce(comm, np.array([comm.rank, i]), async_op=True) for i in range(600)]
    for i in random.Random(comm.rank).sample(range(600), 600):
        assert_array_equal(handles[i].wait(), [sum(range(comm.size)), i * comm.size])
    assert not comm.in_flight


@on_ranks(1, 3)
def test_six_hundred_one_after_the_other_with_one_in_flight_all_the_time(comm):
    long = all_reduce(comm, np.full(5, comm.rank), async_op=True)
    for i in range(600):
        got = broadcast(comm, np.array([comm.rank, i]), root=i % comm.size)
        assert_array_equal(got, [i % comm.size, i])
    assert_array_equal(long.wait(), sum(range(comm.size)))


# -- mistakes -----------------------------------------------------------------------------------------------------


@on_ranks(2, 3)
def test_what_goes_wrong_is_raised_by_that_handle_and_by_no_other(comm):
    first = all_reduce(comm, np.arange(6), algorithm="ring", async_op=True)
    wrong = all_reduce(comm, np.zeros(6 * (comm.rank + 1)), algorithm="ring", async_op=True)
    last = all_gather(comm, np.full(comm.size, comm.rank), "ring", async_op=True)
    assert_array_equal(last.wait(), np.arange(comm.size))
    assert_array_equal(first.wait(), np.arange(6) * comm.size)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the message has .* the receiving array"):
            wrong.wait()
    with pytest.raises(ValueError, match=r"the message has .* the receiving array"):
        wrong.test()
    assert not comm.in_flight
    assert_array_equal(all_reduce(comm, np.ones(4)), comm.size)


@on_ranks(2)
def test_not_even_by_the_one_that_needs_its_tag(comm):
    wrong = all_reduce(comm, np.zeros(6 * (comm.rank + 1)), algorithm="ring", async_op=True)
    right = [all_reduce(comm, np.ones(2), async_op=True) for _ in range(512)]
    for handle in right:
        assert_array_equal(handle.wait(), comm.size)
    with pytest.raises(ValueError, match="the message has"):
        wrong.wait()


@every_algorithm("all_reduce")
@on_ranks(2, 3)
def test_a_wait_gives_up_after_its_timeout_and_may_be_tried_again(comm, operation, algorithm):
    problem = Problem(operation, comm.size)
    problem.solve(comm, algorithm)  # the first hierarchical one finds out who shares a host, and that all wait for
    if comm.rank == 0:
        handle = problem.run(comm, algorithm, async_op=True)
        with pytest.raises(TimeoutError):
            handle.wait(timeout=0.01)
        for rank in range(1, comm.size):
            comm.send(np.zeros(1), rank)
    else:
        comm.recv(np.empty(1), 0)
        handle = problem.run(comm, algorithm, async_op=True)
    problem.check(comm.rank, handle.wait(timeout=10))


def test_a_timeout_is_not_prolonged_by_the_progress_of_others():
    def program(comm):
        other = comm.split(0)
        moving = all_reduce(comm, np.ones(8), algorithm="ring", async_op=True)  # 6 messages one after the other
        if comm.rank == 0:
            waiting = all_reduce(other, np.ones(8), algorithm="ring", async_op=True)
            with pytest.raises(TimeoutError):
                waiting.wait(timeout=1.0)
            assert comm.clock() == pytest.approx(1.0)
        moving.wait()
        barrier(comm)
        if comm.rank > 0:
            waiting = all_reduce(other, np.ones(8), algorithm="ring", async_op=True)
        assert_array_equal(waiting.wait(), comm.size)

    simulate(program, 4, network=Network(alpha=0.75))


def test_a_handle_that_nobody_joins_is_a_deadlock():
    def program(comm):
        if comm.rank == 0:
            all_reduce(comm, np.ones(3), algorithm="ring", async_op=True).wait()

    with pytest.raises(Deadlock, match="rank 0"):
        simulate(program, 3)


# -- sends that wait for their receives -----------------------------------------------------------------------------


def blocking(comm, algorithm, problem):
    problem.solve(comm, algorithm)


def test_there_a_ring_of_blocking_sends_does_deadlock():
    """So that the tests below show something."""

    def program(comm):
        comm.send(np.ones(1), (comm.rank + 1) % comm.size)
        comm.recv(np.ones(1), (comm.rank - 1) % comm.size)

    simulate(program, 3)
    for seed in range(20):
        with pytest.raises(Deadlock):
            simulate(program, 3, seed=seed, network=RENDEZVOUS)


@every_algorithm()
@pytest.mark.parametrize("size", [3, 4, 6, 7])
def test_no_algorithm_deadlocks_where_sends_wait(operation, algorithm, size):
    for seed in range(50 * size, 50 * size + 50):  # 200 in all
        problem = Problem(operation, size, (size + 2,), root=seed % size)
        simulate(partial(blocking, algorithm=algorithm, problem=problem), size, seed=seed, network=RENDEZVOUS)


@every_algorithm("barrier")
@pytest.mark.parametrize("size", [3, 4, 6, 7])
def test_no_barrier_deadlocks_where_sends_wait(operation, algorithm, size):
    for seed in range(50 * size, 50 * size + 50):
        simulate(lambda comm: barrier(comm, algorithm), size, seed=seed, network=RENDEZVOUS)


@every_algorithm()
@pytest.mark.parametrize("size", [3, 4])
def test_no_algorithm_deadlocks_with_segments_where_sends_wait(operation, algorithm, size):
    network = Network(sends="rendezvous", segment=16)
    problem = Problem(operation, size, (6 * size + 1,))
    for seed in range(20):
        simulate(partial(blocking, algorithm=algorithm, problem=problem), size, seed=seed, network=network)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_no_order_of_waiting_deadlocks_where_sends_wait(size):
    def program(comm, seed):
        started = start_all(comm, random.Random(seed).sample(one_of_each(size, 4), 6))
        wait_in_any_order(comm.rank, started)

    for seed in range(50):
        simulate(program, size, seed, seed=seed, network=RENDEZVOUS)


@pytest.mark.parametrize("algorithm", ["auto", "ring", "hierarchical", "shared_memory"])
@on_ranks(2, 3, 4)
def test_starting_the_first_one_of_a_communicator_waits_for_nobody(comm, algorithm):
    if algorithm == "shared_memory" and comm.network is not None:
        algorithm = "auto"  # simulated ranks share no memory
    group = comm.split(0)
    array, note = np.full(8, comm.rank + 1), np.zeros(1)
    if comm.rank == 0:
        handle = all_reduce(group, array, algorithm=algorithm, async_op=True)
        for rank in range(1, comm.size):
            comm.send(note, rank)
    else:
        comm.recv(note, 0)  # before it starts its own
        handle = all_reduce(group, array, algorithm=algorithm, async_op=True)
    assert_array_equal(handle.wait(), comm.size * (comm.size + 1) // 2)


def test_nor_does_starting_the_first_one_between_hosts():
    def program(comm):
        if comm.rank == 0:
            handle = all_reduce(comm, np.ones(8), algorithm="hierarchical", async_op=True)
            comm.send(np.zeros(1), 3)
        else:
            if comm.rank == 3:
                comm.recv(np.zeros(1), 0)
            handle = all_reduce(comm, np.ones(8), algorithm="hierarchical", async_op=True)
        return handle.wait()[0]

    assert simulate(program, 4, network=Network(hosts=[0, 0, 1, 1])).results == [4, 4, 4, 4]


@on_ranks(2, 3)
def test_one_that_was_interrupted_is_not_taken_for_done(comm):
    def interrupt(kind, flag):
        raise KeyboardInterrupt

    group = comm.split(0)
    with np.errstate(over="call", call=interrupt), pytest.raises(KeyboardInterrupt):  # in the first addition
        all_reduce(group, np.full(4, 1e308), algorithm="ring", async_op=True).wait()
    assert not comm.in_flight
