"""Messages that come late or not at all in the simulator, against times worked out by hand."""

from __future__ import annotations

import pytest
from fault_programs import LATE, NEVER, PLAIN, arrival, at_once, every_second, number

from minidist.comm import (
    Communicator,
    Deadlock,
    Delay,
    Hang,
    Kill,
    LostMessages,
    Partition,
    Strike,
    simulate,
)

# -- messages come late -------------------------------------------------------------------------------------------


def three_messages(comm: Communicator) -> list[float] | None:
    """Rank 1 sends three to rank 0 at once; when each arrived."""
    if comm.rank == 1:
        for _ in range(3):
            comm.send(number(), 0)
    if comm.rank:
        return None
    receives = [comm.irecv(number(), 1) for _ in range(3)]
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
