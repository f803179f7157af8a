"""Simulated ranks that die, hang and slow down: what becomes of them and of the others, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fault_programs import LATE, NEVER, PLAIN, arrival, at_once, every_second, number
from pytest import approx

from minidist.collectives import all_reduce
from minidist.comm import (
    Deadlock,
    Delay,
    Hang,
    Kill,
    Network,
    Partition,
    Slow,
    Strike,
    simulate,
)

# -- a rank dies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [PLAIN, LATE], ids=["eager", "rendezvous"])
def test_what_a_rank_sent_before_it_was_killed_arrives_and_nothing_after(network):
    kill = Kill(1, at=2.5)
    run = simulate(every_second, 3, 4, network=network, faults=[kill])
    # Rendezvous: the send is done when it has arrived, so the second would have left at 3 s.
    expected = [2.0, 3.0, NEVER] if network is PLAIN else [2.0, NEVER]
    assert run.results == [expected, None, []]
    assert run.seconds_by_rank == [100.0 + expected[-2], 2.5, 0.0]
    assert (run.struck, run.gone) == ([Strike(kill, 2.5)], [1])


def test_a_fault_strikes_before_all_else_that_happens_at_its_time():
    for seed in range(10):
        assert simulate(every_second, 2, 3, seed=seed, faults=[Kill(1, at=2.0)]).results[0] == [1.0, NEVER]
        assert simulate(at_once, 2, 3, seed=seed, faults=[Kill(1, at=0.0)]).results[0] == []


@pytest.mark.parametrize("message", [1, 2, 3, 4])
@pytest.mark.parametrize("network", [None, PLAIN, Network(sends="rendezvous"), LATE])
def test_a_rank_is_killed_instead_of_sending_a_message(message, network):
    for seed in range(5):
        run = simulate(at_once, 3, 3, network=network, seed=seed, faults=[Kill(1, message=message)])
        assert run.results[0] == [1, 2, 3][: message - 1]
        assert run.messages == min(message - 1, 3)
        assert run.gone == ([1] if message <= 3 else [])


def test_messages_are_counted_over_all_communicators_and_collectives():
    def program(comm):
        done = []
        group = comm.split(comm.rank // 3)
        for _ in range(3):
            all_reduce(group, np.ones(6), algorithm="ring")  # 2 (3 - 1) messages
            done.append(group.size)
            ended.append((comm.rank, len(done)))

    ended: list[tuple[int, int]] = []
    with pytest.raises(Deadlock):
        simulate(program, 4, faults=[Kill(1, message=9)])
    assert (1, 2) in ended and (1, 3) not in ended
    simulate(program, 4, faults=[Kill(1, message=13)])


def test_the_finally_clauses_of_a_killed_rank_run_and_what_they_do_has_no_effect():
    tried: list[str] = []

    def program(comm, by_message):
        if comm.rank == 1:
            try:
                comm.elapse(1.0)
                if by_message:
                    comm.send(number(), 0)
                comm.elapse(9.0)
            finally:
                for use in (
                    lambda: comm.send(number(), 0),
                    lambda: comm.recv(number(), 0),
                    lambda: comm.elapse(1.0),
                    lambda: comm.split(0),
                    lambda: comm.iprobe(),
                ):
                    try:
                        use()
                    except BaseException as error:
                        tried.append(type(error).__name__)
                raise RuntimeError("a killed rank's own troubles")
        comm.elapse(5.0)
        assert comm.iprobe() is None
        return "survived"

    for by_message in (False, True):
        kill = Kill(1, message=1) if by_message else Kill(1, at=1.0)
        run = simulate(program, 2, by_message, faults=[kill])
        assert run.results == ["survived", None]
        assert run.seconds_by_rank == [5.0, 1.0]
        assert run.messages == 0
        assert tried == ["Killed"] * 5
        tried.clear()


def test_what_a_killed_rank_would_return_does_not_count():
    def program(comm):
        try:
            comm.elapse(2.0)
        except BaseException:
            return "caught it"
        return "lived"

    assert simulate(program, 2, faults=[Kill(1, at=1.0)]).results == ["lived", None]


def test_a_rank_that_has_finished_is_not_struck():
    run = simulate(every_second, 3, 3, faults=[Kill(1, at=3.5), Kill(2, at=1.0), Hang(2, at=1.0), Kill(0, message=1)])
    assert run.results == [[1.0, 2.0, 3.0], "done", []]
    assert run.struck == [] and run.gone == []


def test_an_eager_send_to_a_killed_rank_succeeds_and_a_rendezvous_send_is_never_done():
    def program(comm):
        if comm.rank == 1:
            comm.irecv(number(), 0)  # even though it has been asked for
            comm.elapse(9.0)
        comm.elapse(2.0)
        try:
            comm.isend(number(), 1).wait(10.0)
        except TimeoutError:
            return NEVER
        return comm.clock()

    kill = Kill(1, at=1.0)
    assert simulate(program, 2, network=PLAIN, faults=[kill]).results == [2.0, None]
    assert simulate(program, 2, network=LATE, faults=[kill]).results == [NEVER, None]


def test_a_rendezvous_message_that_has_not_left_when_its_sender_dies_never_does():
    def program(comm, posted_at):
        if comm.rank == 1:
            comm.send(number(), 0)
        comm.elapse(posted_at)
        return comm.iprobe(1) is not None, arrival(comm, 1, 10.0)

    faults = [Kill(1, at=1.0)]
    assert simulate(program, 2, 0.5, network=LATE, faults=faults).results[0] == (True, 1.5)  # it is under way
    assert simulate(program, 2, 2.0, network=LATE, faults=faults).results[0] == (False, NEVER)
    assert simulate(program, 2, 2.0, network=PLAIN, faults=faults).results[0] == (True, 2.0)


def test_all_ranks_may_be_killed():
    def polls(comm):
        while comm.iprobe() is None:
            pass

    for program in (polls, lambda comm: comm.probe(), lambda comm: comm.split(0) and comm.recv(number(), 0)):
        run = simulate(program, 3, faults=[Kill(rank, at=rank + 1.0) for rank in range(3)])
        assert run.results == [None] * 3 and run.gone == [0, 1, 2]
        assert run.seconds_by_rank == [1.0, 2.0, 3.0]


# -- a rank hangs -------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs_goes_on_later_and_its_work_takes_so_much_longer():
    hang = Hang(1, at=2.5, seconds=10.0)
    run = simulate(every_second, 2, 4, network=PLAIN, faults=[hang])
    assert run.results == [[2.0, 3.0, 14.0, 15.0], "done"]
    assert run.struck == [Strike(hang, 2.5)] and run.gone == []


def test_a_rank_hangs_before_a_message_leaves():
    def program(comm):
        if comm.rank == 1:
            comm.send(number(), 0)
            comm.send(number(), 0)
            return comm.clock()
        return arrival(comm, 1), arrival(comm, 1)

    hang = Hang(1, message=2, seconds=5.0)
    assert simulate(program, 2, faults=[hang]).results == [(0.0, 5.0), 5.0]
    assert simulate(program, 2, network=PLAIN, faults=[hang]).results == [(1.0, 6.0), 5.0]
    assert simulate(program, 2, network=LATE, faults=[Hang(1, message=2, seconds=5.0)]).results == [(1.0, 7.0), 7.0]


def test_messages_to_a_rank_that_hangs_wait_for_it():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(3.0)
            comm.send(number(), 1)
            return comm.clock()
        return arrival(comm, 0, patience=3.5)

    # It waits until 3.5 s, hangs from 2 to 7, and finds the message that came at 4 when it goes on.
    assert simulate(program, 2, network=PLAIN, faults=[Hang(1, at=2.0, seconds=5.0)]).results == [3.0, 7.0]


def test_timeouts_pass_while_a_rank_hangs():
    def program(comm):
        with pytest.raises(TimeoutError):
            comm.probe(timeout=3.0)
        return comm.clock()

    assert simulate(program, 1, faults=[Hang(0, at=1.0, seconds=10.0), Kill(0, at=11.5)]).results == [11.0]
    assert simulate(program, 1, faults=[Hang(0, at=3.5, seconds=10.0)]).results == [3.0]


def test_hangs_that_overlap_are_one():
    faults = [Hang(0, at=1.0, seconds=3.0), Hang(0, at=2.0, seconds=1.0), Hang(0, at=3.0, seconds=2.0)]
    assert simulate(lambda comm: comm.elapse(2.0) or comm.clock(), 1, faults=faults).results == [6.0]


@pytest.mark.parametrize("fault", [Hang(1, at=2.5), Hang(1, message=3)])
def test_a_rank_that_hangs_for_ever_is_not_waited_for(fault):
    ended: list[float] = []

    def program(comm, count):
        try:
            return every_second(comm, count)
        finally:
            ended.append(comm.rank)

    run = simulate(program, 3, 4, faults=[fault])
    assert run.results == [[1.0, 2.0, NEVER], None, []]
    assert run.gone == [1] and ended == [2, 0, 1]
    assert run.seconds_by_rank[1] == run.struck[0].seconds == (fault.at or 3.0)


def test_a_rank_that_tests_in_vain_can_hang():
    def program(comm):
        if comm.rank == 1:
            while comm.iprobe() is None:
                pass
            comm.recv(number(), 0)
            return comm.clock()
        comm.elapse(3.0)
        comm.send(number(), 1)
        return comm.clock()

    assert simulate(program, 2, faults=[Hang(1, at=2.0, seconds=5.0)]).results == [3.0, 7.0]
    assert simulate(program, 2, faults=[Hang(1, at=2.0)]).results == [3.0, None]


# -- a rank is slow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults, seconds",
    [
        ([Slow(0, 3.0)], 12.0),
        ([Slow(0, 3.0, at=2.0)], 2.0 + 2.0 * 3),
        ([Slow(0, 3.0, at=2.0, seconds=3.0)], 2.0 + 3.0 + 1.0),
        ([Slow(0, 3.0, at=4.0)], 4.0),
        ([Slow(1, 3.0)], 4.0),
        ([Slow(0, 2.0, at=1.0), Slow(0, 3.0, at=2.0)], 2.0 + 2.5 * 6),
        ([Slow(0, 2.0, at=1.0, seconds=4.0), Hang(0, at=2.0, seconds=2.0)], 7.0),  # 1 + 0.5 + 0 + 0.5 + 2 of work
    ],
)
def test_work_takes_longer_while_a_rank_is_slow(faults, seconds):
    def program(comm):
        comm.elapse(4.0)
        return comm.clock()

    assert simulate(program, 2, faults=faults).results[0] == approx(seconds)


def test_a_rank_is_slow_from_a_message_on_and_its_messages_are_not():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(1.0)
            comm.send(number(), 1)
            comm.reduced(2)
            return comm.clock()
        return arrival(comm, 0)

    network = Network(alpha=1.0, gamma=0.5)
    slow = Slow(0, 4.0, message=1)
    run = simulate(program, 2, network=network, faults=[slow])
    assert run.results == [5.0, 2.0] and run.struck == [Strike(slow, 1.0)]


# -- deadlocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("network", [None, LATE], ids=["eager", "rendezvous"])
def test_a_ring_with_a_killed_rank_is_a_deadlock_that_names_it(message, network):
    def program(comm):
        all_reduce(comm, np.ones(8), algorithm="ring")

    with pytest.raises(Deadlock) as caught:
        simulate(program, 4, network=network, faults=[Kill(2, message=message)])
    text = str(caught.value)
    assert "rank 3 waits for rank 2, which was killed at " in text and "of all_reduce ring" in text
    assert f"Faults so far:\n  Kill(rank=2, at=None, message={message}), at " in text


@pytest.mark.parametrize(
    "fault, fate",
    [
        (Kill(2, at=0.25), "was killed at 0.25 s"),
        (Hang(2, at=0.25), "hangs since 0.25 s"),
        (Hang(2, message=1), "hangs since 1 s"),
    ],
)
@pytest.mark.parametrize(
    "wait",
    [
        lambda comm: comm.recv(number(), 2),
        lambda comm: comm.probe(2),
        lambda comm: comm.probe(),
        lambda comm: comm.split(0),
    ],
    ids=["receive", "probe", "probe anyone", "split"],
)
def test_who_waits_for_a_rank_that_is_gone_is_told_so(fault, fate, wait):
    def program(comm):
        if comm.rank == 2:
            comm.elapse(1.0)
            comm.send(number(), 2)
            return
        wait(comm)

    with pytest.raises(Deadlock, match=f"rank 0 waits for rank 2, which {fate}") as caught:
        simulate(program, 3, faults=[fault])
    assert "rank 2 waits" not in str(caught.value)


def test_who_tests_in_vain_for_a_rank_that_is_gone_is_told_so():
    def program(comm):
        while comm.rank == 0 and comm.iprobe(1) is None:
            pass
        comm.elapse(1.0)

    with pytest.raises(Deadlock, match=r"rank 0 tests in vain for rank 1, which was killed at 0\.5 s"):
        simulate(program, 2, faults=[Kill(1, at=0.5)])


def test_a_rank_killed_in_a_split_that_it_has_called_is_in_the_group():
    def program(comm):
        comm.elapse(2.0 - comm.rank)
        return comm.split(0).size

    assert simulate(program, 3, faults=[Kill(2, at=1.5)]).results == [3, 3, None]


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Kill(1), r"Kill\(rank=1, at=None, message=None\): say when, by at or message"),
        (lambda: Kill(1, at=1.0, message=2), "give at or message, not both"),
        (lambda: Kill(-1, at=1.0), r"Kill\(rank=-1, .*expected rank to be a rank's number, 0 or more"),
        (lambda: Kill(1.5, at=1.0), r"rank=1\.5"),
        (lambda: Kill(0, at=-1.0), r"at=-1\.0.*expected at to be a number of seconds"),
        (lambda: Kill(0, at=math.nan), "at=nan"),
        (lambda: Kill(0, at=math.inf), "at=inf"),
        (lambda: Kill(0, at="soon"), "at='soon'"),
        (lambda: Kill(0, message=0), "message=0.*counted from 1"),
        (lambda: Kill(0, message=1.5), r"message=1\.5"),
        (lambda: Hang(0), "say when"),
        (lambda: Hang(0, at=0.0, seconds=0.0), r"seconds=0\.0.*expected seconds above 0"),
        (lambda: Slow(0, 0.5), r"factor=0\.5.*expected a factor of 1 or more"),
        (lambda: Slow(0, math.inf), "factor=inf"),
        (lambda: Slow(0, 2.0, at=1.0, message=1), "not both"),
        (lambda: Delay(-1.0), r"seconds=-1\.0"),
        (lambda: Delay(math.inf), "seconds=inf"),
        (lambda: Delay(1.0, rank=-1), "rank=-1"),
        (lambda: Delay(1.0, dest="all"), "dest='all'"),
        (lambda: Delay(1.0, at=2.0, until=2.0), "expected until to be later than at"),
        (lambda: Partition([]), r"ranks=\(\)"),
        (lambda: Partition(3), "ranks=3"),
        (lambda: Partition([1, 1]), r"ranks=\(1, 1\)"),
        (lambda: Partition([-1]), r"ranks=\(-1,\)"),
        (lambda: Partition([1], seconds=-1), "seconds=-1"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "fault, words",
    [
        (Kill(4, at=0.0), r"Kill\(rank=4, .*: the ranks are 0 to 3"),
        (Delay(1.0, dest=7), "dest=7"),
        (Partition([0, 9]), r"ranks=\(0, 9\)"),
        ("kill", "'kill' is no fault: choose Kill, Hang, Slow, Delay, Partition"),
    ],
)
def test_simulate_refuses_faults_of_ranks_that_it_does_not_have(fault, words):
    with pytest.raises(ValueError, match=words):
        simulate(lambda comm: None, 4, faults=[fault])
