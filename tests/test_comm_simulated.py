"""The simulator: repeatable interleavings, and what it says of programs that are wrong."""

from __future__ import annotations

import contextlib
import gc
import random
import time
import traceback
import weakref
from contextvars import ContextVar

import numpy as np
import pytest
from greenlet import greenlet

from minidist import backend
from minidist.collectives import all_reduce
from minidist.comm import Communicator, Deadlock, LostMessages, alone, simulate, world


def line_of(text: str) -> str:
    """ "test_comm_simulated.py:LINE" of the line in this file that ends with the comment `# text`."""
    with open(__file__) as file:
        number = next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}"))
    return f"test_comm_simulated.py:{number} in "


def one() -> np.ndarray:
    return np.zeros(1)


# -- running ------------------------------------------------------------------------------------------------------


def test_results_are_listed_by_rank_and_messages_counted_at_the_sender():
    def program(comm, factor):
        if comm.rank:
            comm.send(np.zeros(comm.rank, np.float32), 0)
        else:
            for rank in range(1, comm.size):
                comm.recv(np.zeros(rank, np.float32), rank)
        return comm.rank * factor

    run = simulate(program, 4, 10)
    assert run.results == [0, 10, 20, 30]
    assert (run.messages, run.bytes, run.seconds) == (3, 24, 0.0)
    assert (run.messages_by_rank, run.bytes_by_rank) == ([0, 1, 1, 1], [0, 4, 8, 12])


def interleaving(seed: int) -> list[int]:
    """In which order the ranks get to run, in a program that leaves the order open."""
    order: list[int] = []

    def program(comm):
        for _ in range(4):
            order.append(comm.rank)
            comm.send(one(), comm.rank)
            comm.recv(one(), comm.rank)

    simulate(program, 4, seed=seed)
    return order


def test_a_seed_repeats_its_interleaving_and_another_gives_another():
    assert interleaving(3) == interleaving(3)
    assert len({tuple(interleaving(seed)) for seed in range(20)}) == 20


def test_an_interleaving_does_not_depend_on_the_global_random_state():
    random.seed(1)
    first = interleaving(0)
    random.seed(2)
    assert interleaving(0) == first


def test_a_thousand_ranks_pass_a_token_round():
    def program(comm):
        token = np.zeros(1, int)
        if comm.rank:
            comm.recv(token, comm.rank - 1)
        token += comm.rank
        comm.send(token, (comm.rank + 1) % comm.size)
        if comm.rank == 0:
            return int(comm.recv(token, comm.size - 1)[0])
        return None

    start = time.monotonic()
    assert simulate(program, 1000).results[0] == sum(range(1000))
    assert time.monotonic() - start < 10


def test_every_rank_has_its_own_world_generator_and_context():
    variable: ContextVar[int] = ContextVar("variable", default=-1)
    outside = world()
    variable.set(100)

    def program(comm):
        assert world() is comm
        assert variable.get() == -1
        variable.set(comm.rank)
        backend.manual_seed(comm.rank)
        comm.split(0)
        assert variable.get() == comm.rank
        return backend.default_generator().seed

    assert simulate(program, 3).results == [0, 1, 2]
    assert world() is outside
    assert variable.get() == 100


def test_simulations_nest():
    def inner(comm):
        return world().size

    def outer(comm):
        return (world().size, simulate(inner, 3).results, world().size)

    assert simulate(outer, 2).results == [(2, [3, 3, 3], 2)] * 2


def test_a_simulation_needs_a_rank():
    with pytest.raises(ValueError, match="size 0"):
        simulate(lambda comm: None, 0)


def test_a_dtype_that_differs_is_refused_by_the_receiver():
    def program(comm):
        if comm.rank == 0:
            comm.send(np.zeros(3, np.float32), 1)
        else:
            comm.recv(np.zeros(3, np.int32), 0)

    with pytest.raises(TypeError, match="message is float32, the receiving array is int32"):
        simulate(program, 2)


# -- deadlocks ----------------------------------------------------------------------------------------------------


def test_a_deadlock_prints_the_circle_with_tags_and_lines():
    def program(comm):
        def deeper():
            comm.recv(one(), (comm.rank + 1) % 3, tag=comm.rank + 5)  # circle

        if comm.rank < 3:
            deeper()
        elif comm.rank == 3:
            comm.recv(one(), 0)  # on top
        elif comm.rank == 4:
            comm.recv(one(), 5)  # for one that has finished

    with pytest.raises(Deadlock) as caught:
        simulate(program, 6)
    text = str(caught.value)
    circle, others = text.split("Also waiting:")
    assert "A circle of 3:" in circle
    for rank in range(3):
        assert (
            f"rank {rank} waits for rank {(rank + 1) % 3}: receive from rank {(rank + 1) % 3}, tag {rank + 5}" in circle
        )
    assert circle.count(line_of("circle") + "deeper") == 3
    assert "rank 3 waits for rank 0: receive from rank 0, tag 0, float64[1]" in others
    assert line_of("on top") + "program" in others
    assert "rank 4 waits for rank 5, which has finished" in others
    assert line_of("for one that has finished") in others


def test_a_deadlock_inside_minidist_names_the_line_that_called_it():
    def program(comm):
        if comm.rank:
            all_reduce(comm, np.zeros(10), algorithm="ring")  # who called

    with pytest.raises(Deadlock) as caught:
        simulate(program, 3)
    text = str(caught.value)
    assert "float64[3], of all_reduce ring\n" in text
    assert "called from " in text
    assert line_of("who called") + "program" in text


def test_a_deadlock_names_the_step_of_the_program():
    def program(comm):
        with comm.step("M.2(4)"):
            receive = comm.irecv(one(), 1 - comm.rank)
        with comm.step("M.2(5)"):
            if comm.rank == 0:
                receive.wait()  # belongs to the step that started it
            else:
                comm.split(0)

    with pytest.raises(Deadlock) as caught:
        simulate(program, 2)
    assert "rank 0 waits for rank 1: receive from rank 1, tag 0, float64[1], in step M.2(4)\n" in str(caught.value)
    assert "rank 1 waits for rank 0: split, in step M.2(5)\n" in str(caught.value)


def test_a_split_that_a_rank_does_not_call_is_a_deadlock():
    with pytest.raises(Deadlock, match="rank 0 waits for rank 1, which has finished: split"):
        simulate(lambda comm: comm.rank == 0 and comm.split(0), 2)


def test_ranks_of_a_group_are_named_by_their_numbers_in_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank % 2:
            group.recv(one(), 1 - group.rank)

    with pytest.raises(Deadlock, match=r"rank 1 waits for rank 3: .*in a group of 2 \(world ranks 1, 3\)"):
        simulate(program, 4)


def test_a_deadlock_of_a_thousand_ranks_is_found_at_once_and_reported_in_few_lines():
    start = time.monotonic()
    with pytest.raises(Deadlock, match=r"A circle of 1000:(.|\n)*and 980 more") as caught:
        simulate(lambda comm: comm.recv(one(), (comm.rank + 1) % comm.size), 1000)
    assert time.monotonic() - start < 5
    assert len(str(caught.value).splitlines()) < 50


def test_a_chain_of_a_thousand_waiting_ranks_is_reported_at_once():
    start = time.monotonic()
    with pytest.raises(Deadlock, match=r"rank 0 waits for rank 1: (.|\n)*and 979 more"):
        simulate(lambda comm: comm.rank < 999 and comm.recv(one(), comm.rank + 1), 1000)
    assert time.monotonic() - start < 5


def test_what_was_tested_in_vain_is_not_kept():
    def program(comm):
        receives = []
        for _ in range(10):
            receive = comm.irecv(one(), comm.rank)
            assert not receive.test()
            comm.send(one(), comm.rank)
            receive.wait()
            receives.append(weakref.ref(receive.array))
            del receive
        return [ref() is None for ref in receives]

    assert all(simulate(program, 1).results[0][:-1])


def test_ranks_that_test_in_vain_for_ever_are_a_deadlock():
    def program(comm):
        receive = comm.irecv(one(), 1 - comm.rank)
        while not receive.test():
            pass

    with pytest.raises(Deadlock, match="rank 0 tests in vain for rank 1: receive"):
        simulate(program, 2)


def test_ranks_that_test_and_ranks_that_wait_do_not_confuse_each_other():
    def program(comm):
        got = [np.zeros(1, int) for _ in range(comm.size)]
        for number in range(5):
            receives = [comm.irecv(array, rank) for rank, array in enumerate(got)]
            for rank in range(comm.size):
                comm.send(np.array([comm.rank + 10 * number]), rank)
            for receive in receives:
                if comm.rank % 2:
                    receive.wait()
                while not receive.test():
                    pass
        return [int(array[0]) for array in got]

    for seed in range(20):
        assert simulate(program, 4, seed=seed).results == [[40, 41, 42, 43]] * 4


def test_alone_a_receive_without_a_message_is_a_deadlock_at_once():
    comm = alone()
    comm.send(np.array([3.0]), 0)
    assert comm.recv(one(), 0) == 3
    with pytest.raises(Deadlock, match="rank 0 waits for itself: receive from rank 0, tag 4") as caught:
        comm.recv(one(), 0, tag=4)  # alone
    assert line_of("alone") in str(caught.value)
    receive = comm.irecv(one(), 0)
    assert not receive.test()
    with pytest.raises(Deadlock, match="tests in vain"):
        while not receive.test():
            pass
    assert comm.split(3).size == 1
    assert comm.split(None) is None


def test_a_timeout_passes_in_virtual_time_once_nobody_can_go_on():
    def program(comm):
        waits = {0: 3600.0, 1: 60.0}
        receive = comm.irecv(one(), 2)
        if comm.rank == 2:
            comm.recv(one(), 0)
            comm.send(one(), 0)
            comm.send(one(), 1)
            comm.send(one(), 2)
        else:
            with pytest.raises(TimeoutError):
                receive.wait(timeout=waits[comm.rank])
            if comm.rank == 0:
                comm.send(one(), 2)
        receive.wait()

    start = time.monotonic()
    assert simulate(program, 3).seconds == 3600
    assert time.monotonic() - start < 5


# -- messages nobody received -------------------------------------------------------------------------------------


def test_a_lost_message_is_named_with_its_line():
    def program(comm):
        if comm.rank == 1:
            comm.send(np.zeros(10, np.float32), 2, tag=6)  # lost

    with pytest.raises(LostMessages) as caught:
        simulate(program, 3)
    assert "never received: 1" in str(caught.value)
    assert "rank 1 -> rank 2, tag 6, 40 bytes (float32[10]), sent at " in str(caught.value)
    assert line_of("lost") + "program" in str(caught.value)


def test_a_receive_that_is_never_finished_is_named_with_its_line():
    def program(comm):
        receives = [comm.irecv(one(), 0, tag=2), comm.irecv(one(), 0, tag=3)]  # never
        comm.send(one(), 0, tag=2)  # even though its message has come
        return receives

    with pytest.raises(LostMessages) as caught:
        simulate(program, 1)
    assert "never finished: 2" in str(caught.value)
    assert str(caught.value).count(line_of("never")) == 2
    assert "never received" not in str(caught.value)


# -- exceptions ---------------------------------------------------------------------------------------------------


class Mistake(Exception):
    pass


@pytest.mark.parametrize("error", [Mistake("here"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_ranks_exception_is_raised_with_its_traceback_and_the_others_are_ended(error):
    started: list[int] = []
    cleaned: list[int] = []

    def fails(comm):
        raise error

    def program(comm):
        started.append(comm.rank)
        try:
            comm.split(0)
            if comm.rank == 2:
                fails(comm)
            comm.recv(one(), 2)
        finally:
            cleaned.append(comm.rank)

    with pytest.raises(type(error)) as caught:
        simulate(program, 4, seed=1)
    assert caught.value is error
    assert "on simulated rank 2 of 4" in error.__notes__
    assert "fails" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert sorted(cleaned) == sorted(started) == [0, 1, 2, 3]


def test_a_rank_that_communicates_while_it_is_ended_goes_no_further():
    after: list[str] = []

    def program(comm):
        if comm.rank == 0:
            comm.recv(one(), 1)
            raise Mistake
        receive = comm.irecv(one(), 0)
        try:
            comm.send(one(), 0)
            comm.recv(one(), 0)
        finally:
            try:
                receive.wait()
            finally:
                comm.recv(one(), 0)
                after.append("went on")

    for seed in range(5):
        with pytest.raises(Mistake):
            simulate(program, 2, seed=seed)
    assert after == []


def test_a_communicator_says_that_its_simulation_is_over():
    kept: list[Communicator] = []

    def program(comm):
        kept.append(comm)
        if comm.rank == 2:
            raise Mistake

    with pytest.raises(Mistake):
        simulate(program, 3)
    kept += simulate(lambda comm: comm, 2).results
    for comm in kept:
        for use in (lambda c: c.send(one(), 0), lambda c: c.recv(one(), 0), lambda c: c.split(0)):
            with pytest.raises(RuntimeError, match="simulation is over"):
                use(comm)


def test_abort_ends_the_simulation_with_its_code():
    with pytest.raises(SystemExit) as ended:
        simulate(lambda comm: comm.abort(7), 2)
    assert ended.value.code == 7


def test_nothing_is_left_of_a_simulation():
    def program(comm):
        if comm.rank == 1:
            raise Mistake
        comm.recv(one(), 1)

    gc.collect()
    before = sum(type(thing) is greenlet for thing in gc.get_objects())
    for ending in (program, lambda comm: comm.recv(one(), comm.rank), lambda comm: None):
        with contextlib.suppress(Mistake, Deadlock):
            simulate(ending, 50)
    gc.collect()
    assert sum(type(thing) is greenlet for thing in gc.get_objects()) <= before
