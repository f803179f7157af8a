"""Faults in the simulator, against what they do to times and messages, worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from minidist.collectives import all_reduce
from minidist.comm import (
    Communicator,
    Deadlock,
    Delay,
    Hang,
    Kill,
    LostMessages,
    Network,
    Partition,
    Slow,
    Strike,
    simulate,
)
from minidist.comm.faults import plan

PLAIN = Network(alpha=1.0)  # a message takes a second
LATE = Network(alpha=1.0, sends="rendezvous")
NEVER = "never"


def number(value: int = 0) -> np.ndarray:
    return np.array([value])


def arrival(comm: Communicator, source: int, patience: float = 100.0, tag: int = 0) -> float | str:
    """When the next message came; or NEVER, after some patience."""
    try:
        comm.irecv(number(), source, tag).wait(patience)
    except TimeoutError:
        return NEVER
    return comm.clock()


def every_second(comm: Communicator, count: int):
    """Rank 1 sends to rank 0 at 1, 2, 3, ... s; rank 0 says when each arrived, up to the first that does not."""
    if comm.rank == 1:
        for _ in range(count):
            comm.elapse(1.0)
            comm.send(number(), 0)
        return "done"
    times: list[float | str] = []
    while comm.rank == 0 and len(times) < count and NEVER not in times:
        times.append(arrival(comm, 1))
    return times


def at_once(comm: Communicator, count: int) -> list[int] | None:
    """Rank 1 sends 1, 2, 3, ... to rank 0, which says what it got; nothing takes time."""
    if comm.rank == 1:
        for value in range(1, count + 1):
            comm.send(number(value), 0)
    got: list[int] = []
    while comm.rank == 0 and len(got) < count:
        try:
            comm.probe(1, timeout=100)
        except TimeoutError:
            break
        got.append(int(comm.recv(number(), 1)[0]))
    return got


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


# -- messages come late -------------------------------------------------------------------------------------------


def three_messages(comm: Communicator, network_of_tags: tuple[int, ...] = (0, 0, 0)):
    """Rank 1 sends three to rank 0 at once; when each arrived."""
    if comm.rank == 1:
        for tag in network_of_tags:
            comm.send(number(), 0, tag)
        return None
    if comm.rank == 2:
        return None
    receives = [comm.irecv(number(), 1, tag) for tag in network_of_tags]
    times: list[float] = []
    for receive in receives:
        receive.wait()
        times.append(comm.clock())
    return times


@pytest.mark.parametrize(
    "fault, times",
    [
        (Delay(10.0), [11.0, 12.0, 13.0]),
        (Delay(10.0, rank=1, dest=0), [11.0, 12.0, 13.0]),
        (Delay(10.0, rank=0), [1.0, 2.0, 3.0]),
        (Delay(10.0, dest=1), [1.0, 2.0, 3.0]),
        (Delay(10.0, message=2), [1.0, 12.0, 12.0]),  # the third does not overtake the second
        (Delay(1.5, message=1), [2.5, 2.5, 3.0]),
        (Delay(10.0, at=0.0, until=0.5), [11.0, 12.0, 13.0]),
        (Delay(10.0, at=0.5), [1.0, 2.0, 3.0]),
    ],
)
def test_messages_arrive_late_and_in_order_and_hold_no_port_for_longer(fault, times):
    run = simulate(three_messages, 3, network=PLAIN, faults=[fault])
    assert run.results[0] == times
    assert run.struck == ([Strike(fault, 0.0)] if times[-1] > 3.0 or times[0] > 1.0 else [])


def test_a_message_overtakes_a_late_one_of_another_tag():
    def program(comm):
        if comm.rank == 1:
            for tag in (5, 6):
                comm.send(number(tag), 0, tag)
            return None
        return arrival(comm, 1, tag=6), arrival(comm, 1, tag=5)

    assert simulate(program, 2, faults=[Delay(2.0, message=1)]).results[0] == (0.0, 2.0)


def test_a_probe_sees_a_late_message_when_it_arrives():
    def program(comm):
        if comm.rank == 0:
            comm.send(number(), 1)
            return None
        assert comm.iprobe() is None
        comm.probe()
        return arrival(comm, 0)

    assert simulate(program, 2, faults=[Delay(2.0)]).results[1] == 2.0


def test_a_late_rendezvous_message_is_late_by_as_much_and_so_is_the_end_of_its_send():
    def program(comm):
        if comm.rank == 0:
            comm.send(number(), 1)
            return comm.clock()
        comm.elapse(50.0)
        return arrival(comm, 0)

    assert simulate(program, 2, network=LATE, faults=[Delay(2.0)]).results == [53.0, 53.0]
    assert simulate(program, 2, network=LATE, faults=[Delay(2.0, until=50.0)]).results == [51.0, 51.0]


def test_delays_add_up():
    assert simulate(three_messages, 2, faults=[Delay(2.0), Delay(3.0, message=3)]).results[0] == [2.0, 2.0, 5.0]


# -- messages do not get through ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [None, PLAIN], ids=["free", "plain"])
def test_what_is_sent_in_a_partition_leaves_when_it_ends_and_what_was_sent_before_arrives(network):
    travel = 0.0 if network is None else 1.0
    cut = Partition([0], at=1.5, seconds=4.0)
    run = simulate(every_second, 3, 6, network=network, faults=[cut])
    assert run.results[0] == [time + travel for time in (1.0, 5.5, 5.5, 5.5, 5.5, 6.0)]
    assert run.struck == [Strike(cut, 1.5)]


def test_a_rendezvous_message_in_a_partition_is_not_seen_and_leaves_when_it_ends():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(1.0)
            comm.send(number(), 1)
            return comm.clock()
        comm.elapse(2.0)
        assert comm.iprobe(0) is None
        comm.probe(0)
        return comm.clock(), arrival(comm, 0)

    faults = [Partition([1], at=1.0, seconds=4.0)]
    assert simulate(program, 2, network=LATE, faults=faults).results == [6.0, (5.0, 6.0)]


@pytest.mark.parametrize("network", [PLAIN, LATE], ids=["eager", "rendezvous"])
def test_in_a_partition_that_never_ends_messages_are_lost_and_no_one_is_blamed(network):
    def program(comm):
        other = comm.rank ^ 2
        sent = comm.isend(number(), other)
        got = arrival(comm, other, 10.0)
        try:
            sent.wait(10.0)
        except TimeoutError:
            got = (got, NEVER)
        return got, arrival_within(comm)

    def arrival_within(comm):
        comm.isend(number(), comm.rank ^ 1, tag=1)
        return arrival(comm, comm.rank ^ 1, tag=1) != NEVER

    run = simulate(program, 4, network=network, faults=[Partition((0, 1))])
    never = NEVER if network is PLAIN else (NEVER, NEVER)
    assert run.results == [(never, True)] * 4 and run.gone == []


def test_a_partition_begins_before_a_message_of_the_first_of_its_ranks():
    cut = Partition([1, 2], message=3)
    assert simulate(at_once, 3, 5, faults=[cut]).results[0] == [1, 2]
    assert simulate(at_once, 3, 5, faults=[Partition([2, 1], message=3)]).results[0] == [1, 2, 3, 4, 5]


def test_a_partition_that_begins_while_a_rendezvous_message_waits_keeps_it():
    def program(comm):
        if comm.rank == 0:
            comm.isend(number(), 1).wait()
        else:
            comm.elapse(2.0)
            return arrival(comm, 0)
        return comm.clock()

    finite, lasting = Partition([0], at=1.0, seconds=5.0), Partition([0], at=1.0)
    assert simulate(program, 2, network=LATE, faults=[finite]).results == [7.0, 7.0]
    with pytest.raises(
        Deadlock, match=r"rank 0 waits for rank 1, which has finished(.|\n)*Faults so far:\n  Partition"
    ):
        simulate(program, 2, network=LATE, faults=[lasting])


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


# -- what is left over --------------------------------------------------------------------------------------------


def test_messages_lost_by_a_program_are_still_found():
    def program(comm):
        comm.elapse(1.0)
        comm.send(number(), (comm.rank + 1) % comm.size)

    with pytest.raises(LostMessages) as caught:
        simulate(program, 4, faults=[Kill(1, at=2.0), Hang(2, at=0.5), Delay(3.0, rank=3), Partition([0], at=9.0)])
    assert "never received: 2" in str(caught.value)  # 0 -> 1, which had finished, and 3 -> 0
    assert "rank 0 -> rank 1" in str(caught.value) and "rank 3 -> rank 0" in str(caught.value)


def test_a_receive_that_a_program_forgets_is_still_found():
    def program(comm):
        comm.irecv(number(), (comm.rank + 1) % comm.size)
        comm.elapse(1.0)

    with pytest.raises(LostMessages) as caught:
        simulate(program, 4, faults=[Kill(1, at=0.5)])
    assert "never finished: 2" in str(caught.value)
    assert "rank 2: " in str(caught.value) and "rank 3: " in str(caught.value)


def test_a_message_that_comes_too_late_is_lost_by_the_program():
    def program(comm):
        if comm.rank == 0:
            comm.send(number(), 1)
        else:
            with pytest.raises(TimeoutError):
                comm.probe(0, timeout=1.0)

    with pytest.raises(LostMessages, match="never received: 1"):
        simulate(program, 2, faults=[Delay(2.0)])


# -- repeating ----------------------------------------------------------------------------------------------------


def test_faults_that_do_not_strike_change_nothing():
    def program(comm, order):
        for _ in range(4):
            order.append((comm.rank, comm.clock()))
            all_reduce(comm, np.ones(5), algorithm="ring")
            comm.elapse(0.1 * comm.rank)

    def order_with(faults, network, seed):
        order: list[tuple[int, float]] = []
        run = simulate(program, 4, order, network=network, seed=seed, faults=faults)
        assert run.struck == []
        return order, run

    faults = [Kill(0, at=1e6), Hang(1, message=1000), Slow(2, 3.0, at=1e6), Delay(1.0, at=1e6), Partition([3], at=1e6)]
    for seed in range(5):
        for network in (None, PLAIN, LATE, Network(alpha=1.0, beta=0.1, ports="many")):
            assert order_with(faults, network, seed) == order_with([], network, seed)


CLIENTS, REQUESTS, END = 3, 4, 1e6  # ranks; requests of each; the time at which all have long given up


def ask_and_answer(comm: Communicator) -> list[tuple[float, int]]:
    """Clients ask rank 0, which answers with the square. All waits have timeouts; late messages are read, and dropped.

    Returns when this rank got which numbers.
    """
    log: list[tuple[float, int]] = []

    def receive(source: int, tag: int) -> int | None:
        got = number()
        try:
            comm.irecv(got, source, tag).wait(END)  # a rendezvous message that has been seen may still be late
        except TimeoutError:
            return None
        log.append((comm.clock(), int(got[0])))
        return int(got[0])

    def send(value: int, dest: int, tag: int) -> None:
        try:
            comm.isend(number(value), dest, tag).wait(0.5)
        except TimeoutError:
            log.append((comm.clock(), -1))

    def serve(tag: int, timeout: float, answer: bool) -> bool:
        try:
            found = comm.probe(tag=tag, timeout=timeout)
        except TimeoutError:
            return False
        value = receive(found.source, tag)
        if value is not None and answer:
            comm.elapse(0.01)
            send(value**2, found.source, 2)
        return True

    if comm.rank:
        for request in range(REQUESTS):
            comm.elapse(0.02 * comm.rank)
            send(10 * comm.rank + request, 0, 1)
            serve(2, 0.3, answer=False)
    else:
        while serve(1, 5.0, answer=True):
            pass
    for tag in (1, 2):
        while serve(tag, max(0.0, tag * END - comm.clock()), answer=False):
            pass
    return log


@given(
    faults=st.builds(
        partial(plan, size=CLIENTS + 1), seed=st.integers(0, 10**6), count=st.integers(0, 6), messages=st.just(12)
    ),
    network=st.sampled_from([None, Network(alpha=0.01, beta=1e-4), Network(alpha=0.01, sends="rendezvous")]),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_a_robust_program_survives_any_plan_and_repeats_exactly(faults, network, seed):
    first = simulate(ask_and_answer, CLIENTS + 1, network=network, seed=seed, faults=faults)
    assert first == simulate(ask_and_answer, CLIENTS + 1, network=network, seed=seed, faults=faults)
    for rank, log in enumerate(first.results):
        assert (log is None) == (rank in first.gone)
        assert log is None or [time for time, _ in log] == sorted(time for time, _ in log)
    moments = [strike.seconds for strike in first.struck]
    assert moments == sorted(moments)


def test_without_faults_the_robust_program_gets_all_its_answers():
    run = simulate(ask_and_answer, CLIENTS + 1)
    for rank in range(1, CLIENTS + 1):
        assert [value for _, value in run.results[rank]] == [(10 * rank + request) ** 2 for request in range(REQUESTS)]


# -- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_repeats_and_another_seed_gives_another():
    plans = [plan(seed, 4, 5) for seed in range(50)]
    assert plans == [plan(seed, 4, 5) for seed in range(50)]
    assert len(set(plans)) == 50
    faults = [fault for faults in plans for fault in faults]
    assert {type(fault) for fault in faults} == {Kill, Hang, Slow, Delay, Partition}
    for kind in (Hang, Slow, Partition):
        lasting = [fault.seconds == math.inf for fault in faults if isinstance(fault, kind)]
        assert {True, False} == set(lasting)


def test_a_plan_strikes_only_whom_how_and_when_it_may():
    faults = plan(0, 8, 200, among=[2, 5], kinds=(Kill, Hang), by=["message"], messages=7, forever=0.0, seconds=3.0)
    assert {fault.rank for fault in faults} == {2, 5} and {type(fault) for fault in faults} == {Kill, Hang}
    assert all(fault.at is None and 1 <= fault.message <= 7 for fault in faults)
    assert all(0 < fault.seconds <= 3.0 for fault in faults if isinstance(fault, Hang))
    assert plan(0, 3, 0) == ()


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
        (lambda: plan(0, 4, 1, among=[]), r"among=\(\)"),
        (lambda: plan(0, 4, 1, by=["luck"]), "luck"),
        (lambda: plan(0, 4, 5, among=[4]), "the ranks are 0 to 3"),
        (lambda: plan(0, 4, -1), "count=-1"),
        (lambda: plan(0, 4, 1, seconds=0.0), r"seconds=0\.0"),
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
