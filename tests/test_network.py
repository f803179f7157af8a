"""Virtual time on a simulated network, against times worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from minidist.collectives import all_reduce
from minidist.comm import Communicator, Deadlock, Link, LostMessages, Network, Simulation, simulate
from minidist.comm.handle import Handle

A, B, G = 3.0, 0.25, 0.125  # seconds a message, a byte, a combined byte
PLAIN = Network(A, B, G)
LATE = Network(A, B, G, sends="rendezvous")


def message(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, np.uint8)


def exactly(expected):
    """Equal but for rounding."""
    return approx(expected, rel=1e-12)


def cost(nbytes: int) -> float:
    return A + nbytes * B


def times(program, size: int, network: Network, **options) -> list[list[float]]:
    """What each rank's program returned: the times it looked at its clock."""
    return simulate(program, size, network=network, **options).results


# -- one message --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 100])
def test_a_message_arrives_after_alpha_and_beta_for_each_byte(nbytes):
    def program(comm):
        if comm.rank == 0:
            comm.send(message(nbytes), 1)
        else:
            comm.recv(message(nbytes), 0)
        return comm.clock()

    run = simulate(program, 2, network=PLAIN)
    assert run.results == exactly([0.0, cost(nbytes)])  # the eager sender does not wait
    assert run.seconds == exactly(cost(nbytes))
    assert run.seconds_by_rank == run.results


def test_a_receiver_that_comes_later_than_the_message_does_not_wait():
    def program(comm):
        if comm.rank == 0:
            comm.send(message(8), 1)
        else:
            comm.elapse(100)
            comm.recv(message(8), 0)
        return comm.clock()

    assert times(program, 2, PLAIN) == [0.0, 100.0]


def test_without_a_network_time_stands_still_and_work_takes_the_time_it_says():
    def program(comm):
        comm.reduced(1000)
        comm.sendrecv(message(8), comm.rank ^ 1, message(8), comm.rank ^ 1)
        comm.elapse(1.5)
        comm.elapse(0)
        return comm.clock()

    assert times(program, 4, None) == times(program, 4, Network()) == [1.5] * 4


def test_combining_costs_gamma_for_each_byte():
    def program(comm):
        comm.reduced(40)
        before = comm.clock()
        comm.elapse(2.0)
        return [before, comm.clock()]

    assert times(program, 2, PLAIN) == [[40 * G, 40 * G + 2.0]] * 2


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_work_takes_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match=r"elapse\(.*\): expected a number of seconds, 0 or more"):
        simulate(lambda comm: comm.elapse(seconds), 1)


# -- ports --------------------------------------------------------------------------------------------------------


def fan_out(comm: Communicator) -> float:
    if comm.rank == 0:
        for rank in range(1, comm.size):
            comm.send(message(10), rank)
    else:
        comm.recv(message(10), 0)
    return comm.clock()


def fan_in(comm: Communicator) -> float:
    if comm.rank == 0:
        receives = [comm.irecv(message(10), rank) for rank in range(1, comm.size)]
        for receive in receives:
            receive.wait()
    else:
        comm.send(message(10), 0)
    return comm.clock()


def test_one_port_sends_one_message_after_the_other_and_many_send_all_at_once():
    assert times(fan_out, 4, PLAIN) == exactly([0.0, cost(10), 2 * cost(10), 3 * cost(10)])
    assert times(fan_out, 4, Network(A, B, ports="many")) == exactly([0.0] + 3 * [cost(10)])


def test_one_port_receives_one_message_after_the_other_and_many_receive_all_at_once():
    assert times(fan_in, 4, PLAIN)[0] == exactly(3 * cost(10))
    assert times(fan_in, 4, Network(A, B, ports="many"))[0] == exactly(cost(10))


@pytest.mark.parametrize("network", [PLAIN, LATE, Network(A, B, ports="many")])
def test_a_rank_sends_and_receives_at_the_same_time(network):
    def program(comm):
        comm.sendrecv(message(10), (comm.rank + 1) % comm.size, message(10), (comm.rank - 1) % comm.size)
        return comm.clock()

    for size in (1, 2, 3, 8):
        assert times(program, size, network) == exactly([cost(10)] * size)


def test_a_message_that_waits_for_its_receivers_port_holds_up_those_behind_it():
    """0 -> 2 takes 2's port; 1 -> 2 waits for it, and 1 -> 3 behind it, though 3's port has been free all the time."""

    def program(comm):
        if comm.rank == 0:
            comm.send(message(100), 2)
        elif comm.rank == 1:
            comm.elapse(1.0)  # be second
            comm.send(message(10), 2)
            comm.send(message(20), 3)
        elif comm.rank == 2:
            comm.recv(message(100), 0)
            comm.recv(message(10), 1)
        else:
            comm.recv(message(20), 1)
        return comm.clock()

    second = cost(100) + cost(10)
    assert times(program, 4, PLAIN) == exactly([0.0, 1.0, second, second + cost(20)])
    many = Network(A, B, ports="many")
    assert times(program, 4, many) == exactly([0.0, 1.0, cost(100), 1.0 + cost(20)])


def test_of_messages_that_compete_the_seed_picks_the_first():
    def program(comm):
        if comm.rank == 0:
            receives = [comm.irecv(message(1), rank) for rank in (1, 2)]
            while not any(done := [receive.test() for receive in receives]):
                pass
            for receive in receives:
                receive.wait()
            return done.index(True) + 1, comm.clock()
        comm.send(message(1), 0)
        return None

    outcomes = [simulate(program, 3, seed=seed, network=PLAIN).results[0] for seed in range(20)]
    assert {first for first, _ in outcomes} == {1, 2}
    assert [end for _, end in outcomes] == exactly([2 * cost(1)] * 20)


# -- hosts --------------------------------------------------------------------------------------------------------

FAR = Link(7.0, 2.0)
TWO_HOSTS = Network(A, B, hosts=(0, 0, 1, 1), between=FAR)


def two_pairs(first: tuple[int, int], second: tuple[int, int], nbytes: int = 10):
    """A program of two messages, both sent at the start."""

    def program(comm):
        for source, dest in (first, second):
            if comm.rank == source:
                comm.send(message(nbytes), dest)
            if comm.rank == dest:
                comm.recv(message(nbytes), source)
        return comm.clock()

    return program


@pytest.mark.parametrize("ports", ["one", "many"])
def test_ranks_of_a_host_share_its_link(ports):
    network = Network(A, B, hosts=(0, 0, 1, 1), between=FAR, ports=ports)
    far = 7.0 + 10 * 2.0
    both = sorted(times(two_pairs((0, 2), (1, 3)), 4, network))
    assert both == exactly([0.0, 0.0, far, 10 * 2.0 + far])  # the second leaves when the first one's bytes are out


def test_a_link_carries_both_ways_at_once_and_is_not_used_within_a_host():
    far = 7.0 + 10 * 2.0
    assert times(two_pairs((0, 2), (3, 1)), 4, TWO_HOSTS) == exactly([0.0, far, far, 0.0])
    assert times(two_pairs((0, 1), (2, 3)), 4, TWO_HOSTS) == exactly([0.0, cost(10), 0.0, cost(10)])
    assert times(two_pairs((0, 2), (1, 0)), 4, TWO_HOSTS) == exactly([cost(10), 0.0, far, 0.0])


def test_a_link_is_held_for_the_bytes_and_a_port_for_the_whole_message():
    far = 7.0 + 10 * 2.0
    assert times(two_pairs((0, 2), (0, 3)), 4, TWO_HOSTS) == exactly([0.0, 0.0, far, 2 * far])


def test_hosts_without_figures_of_their_own_cost_as_one_host():
    same = Network(A, B, hosts=(0, 0, 1, 1))
    assert times(two_pairs((0, 2), (1, 3)), 4, same) == exactly([0.0, 0.0, cost(10), cost(10)])


@pytest.mark.parametrize(
    "network, expected",
    [
        (Network(hosts=[4, 0, 4, 0, 4]), [(0, 3, 0, 2), (0, 2, 1, 2), (1, 3, 0, 2), (1, 2, 1, 2), (2, 3, 0, 1)]),
        (Network(ranks_per_host=2), [(0, 2, 0, 3), (1, 2, 0, 2), (0, 2, 1, 3), (1, 2, 1, 2), (0, 1, 2, 3)]),
        (None, [(rank, 5, 0, 1) for rank in range(5)]),
    ],
    ids=["hosts", "ranks_per_host", "neither"],
)
def test_split_by_host_groups_the_ranks_of_each_host(network, expected):
    def program(comm):
        host, across = comm.split_by_host()
        return host.rank, host.size, across.rank, across.size

    assert simulate(program, 5, network=network).results == expected


def test_a_split_costs_no_messages_and_ends_when_the_last_rank_comes():
    def program(comm):
        comm.elapse(comm.rank)
        group = comm.split(comm.rank % 2)
        group.send(message(4), (group.rank + 1) % group.size)
        group.recv(message(4), (group.rank - 1) % group.size)
        return comm.clock()

    run = simulate(program, 5, network=PLAIN)
    assert run.results == exactly([4.0 + cost(4)] * 5)
    assert run.messages == 5


# -- rendezvous ---------------------------------------------------------------------------------------------------


def late_receiver(comm: Communicator) -> float:
    if comm.rank == 0:
        comm.send(message(8), 1)
    else:
        comm.elapse(50)
        comm.recv(message(8), 0)
    return comm.clock()


def test_a_rendezvous_send_waits_for_a_late_receiver_and_an_eager_one_does_not():
    assert times(late_receiver, 2, LATE) == exactly([50 + cost(8)] * 2)
    assert times(late_receiver, 2, PLAIN) == exactly([0.0, 50.0])


def test_a_rendezvous_send_that_comes_late_is_done_when_it_has_arrived():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(50)
            request = comm.isend(message(8), 1)
            assert comm.clock() == 50  # starting it takes no time
            request.wait()
            assert request.test()
        else:
            comm.recv(message(8), 0)
        return comm.clock()

    assert times(program, 2, LATE) == exactly([50 + cost(8)] * 2)


def test_a_rendezvous_message_holds_no_port_before_its_receive_is_posted():
    def program(comm):
        if comm.rank == 0:
            requests = [comm.isend(message(8), 1), comm.isend(message(4), 2)]
            for request in requests:
                request.wait()
        else:
            comm.elapse(100 if comm.rank == 1 else 1)
            comm.recv(message(8 if comm.rank == 1 else 4), 0)
        return comm.clock()

    assert times(program, 3, LATE) == exactly([100 + cost(8), 100 + cost(8), 1 + cost(4)])


def test_a_rendezvous_send_reads_its_array_when_the_receive_is_there():
    def program(comm):
        array = np.ones(3)
        if comm.rank == 0:
            request = comm.isend(array, 1)
            array[:] = 2  # a mistake that an eager send would hide
            request.wait()
            array[:] = 3
        else:
            comm.elapse(1)
            comm.recv(array, 0)
        return array.tolist()

    assert simulate(program, 2, network=LATE).results[1] == [2, 2, 2]


def send_first(comm: Communicator) -> None:
    comm.send(message(1), 1 - comm.rank)  # both
    comm.recv(message(1), 1 - comm.rank)


def test_two_ranks_that_both_send_first_meet_eagerly_and_deadlock_in_rendezvous():
    assert simulate(send_first, 2, network=PLAIN).seconds == exactly(cost(1))
    for seed in range(5):
        with pytest.raises(Deadlock, match="A circle of 2") as caught:
            simulate(send_first, 2, network=LATE, seed=seed)
        for rank in (0, 1):
            assert f"rank {rank} waits for rank {1 - rank}: send to rank {1 - rank}, tag 0, uint8[1]" in str(
                caught.value
            )
        assert str(caught.value).count("in send_first") == 2


def test_a_circle_of_a_send_and_a_receive_is_found():
    def program(comm):
        with comm.step("D.3(4)"):
            if comm.rank == 0:
                comm.send(message(1), 1, tag=3)
            else:
                comm.recv(message(1), 0, tag=4)

    with pytest.raises(Deadlock, match="A circle of 2") as caught:
        simulate(program, 2, network=LATE)
    assert "rank 0 waits for rank 1: send to rank 1, tag 3, uint8[1], in step D.3(4)" in str(caught.value)
    assert "rank 1 waits for rank 0: receive from rank 0, tag 4, uint8[1], in step D.3(4)" in str(caught.value)


def test_a_rendezvous_send_that_nobody_receives_is_lost_and_one_that_nobody_waits_for_is_not():
    def program(comm, receives):
        if comm.rank == 0:
            comm.isend(message(5), 1, tag=2)
        elif receives:
            comm.recv(message(5), 0, tag=2)

    assert simulate(program, 2, True, network=LATE).seconds == exactly(cost(5))
    with pytest.raises(LostMessages, match="rank 0 -> rank 1, tag 2, 5 bytes"):
        simulate(program, 2, False, network=LATE)


def test_a_message_of_another_size_is_refused_in_rendezvous_too():
    def program(comm):
        if comm.rank == 0:
            comm.send(message(5), 1)
        else:
            with pytest.raises(ValueError, match=r"5 bytes.*6"):
                comm.recv(message(6), 0)
        return comm.clock()

    assert times(program, 2, LATE) == exactly([cost(5)] * 2)


# -- testing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [PLAIN, LATE], ids=["eager", "rendezvous"])
def test_a_loop_of_tests_ends_when_the_message_arrives(network):
    def program(comm):
        if comm.rank == 0:
            comm.elapse(10)
            comm.send(message(4), 1)
        else:
            receive = comm.irecv(message(4), 0)
            while not receive.test():
                assert comm.clock() < 10 + cost(4)
        return comm.clock()

    for seed in range(10):
        sender = 10 if network is PLAIN else 10 + cost(4)
        assert times(program, 2, network, seed=seed) == exactly([sender, 10 + cost(4)])


def test_a_single_test_takes_no_time_and_a_message_under_way_is_not_done():
    def program(comm):
        if comm.rank == 0:
            comm.send(message(4), 1)
            return None
        receives = [comm.irecv(message(4), 0), comm.irecv(message(4), 1)]
        comm.elapse(1.0)  # by now it is under way
        looks = [(receive.test(), comm.clock()) for receive in receives]
        comm.elapse(cost(4) - 1.0)
        looks.append((receives[0].test(), comm.clock()))
        comm.send(message(4), 1)
        receives[1].wait()
        return looks

    assert simulate(program, 2, network=PLAIN).results[1] == [(False, 1.0), (False, 1.0), (True, exactly(cost(4)))]


def test_a_loop_over_several_requests_sees_each_when_it_arrives():
    def program(comm):
        if comm.rank:
            comm.elapse(10 * (3 - comm.rank))  # the last rank sends first
            comm.send(message(4), 0)
            return None
        receives = {rank: comm.irecv(message(4), rank) for rank in (1, 2, 3)}
        seen = []
        while receives:
            for rank in list(receives):
                if receives[rank].test():
                    seen.append((rank, comm.clock()))
                    del receives[rank]
        return seen

    for seed in range(10):
        got = simulate(program, 4, network=PLAIN, seed=seed).results[0]
        assert got == [(rank, exactly(10 * (3 - rank) + cost(4))) for rank in (3, 2, 1)]


def test_a_rank_that_tests_does_not_keep_time_from_the_others():
    """Neither those that wait for messages under way, nor those that work."""

    def program(comm):
        if comm.rank < 2:
            receive = comm.irecv(message(0), 3)
            while not receive.test():
                pass
        elif comm.rank == 2:
            for _ in range(5):
                comm.elapse(7)
            comm.send(message(0), 3)
        else:
            comm.recv(message(0), 2)
            comm.send(message(0), 0)
            comm.send(message(0), 1)
        return comm.clock()

    assert times(program, 4, PLAIN) == exactly([35 + 2 * A, 35 + 3 * A, 35.0, 35 + A])


def test_testing_between_pieces_of_work_takes_no_more_time_than_the_work():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(100)
            comm.send(message(0), 1)
            return 0
        receive, pieces = comm.irecv(message(0), 0), 0
        while not receive.test():
            comm.elapse(0.01)
            pieces += 1
        return pieces

    pieces = simulate(program, 2, network=PLAIN).results[1]
    assert pieces == pytest.approx((100 + A) / 0.01, abs=2)


def test_ranks_that_test_and_work_in_vain_for_ever_are_a_deadlock():
    def program(comm):
        receive = comm.irecv(message(1), (comm.rank + 1) % comm.size)
        if comm.rank == 2:
            receive.wait()
        while not receive.test():
            comm.elapse(1 + comm.rank)

    with pytest.raises(Deadlock, match="rank 0 tests in vain for rank 1") as caught:
        simulate(program, 3, network=PLAIN)
    assert "rank 2 waits for rank 0" in str(caught.value)


def test_a_message_under_way_is_no_deadlock_however_often_something_else_is_tested():
    def program(comm):
        if comm.rank == 0:
            comm.send(message(0), 1)
            return 0
        arrives, never = comm.irecv(message(0), 0), comm.irecv(message(0), 1)
        tests = 0
        while not never.test():
            comm.elapse(A / 3000)
            tests += 1
            if arrives.test():
                comm.send(message(0), 1)
                break
        never.wait()
        return tests

    assert simulate(program, 2, network=PLAIN).results[1] == approx(3000, abs=2)


def test_a_rank_may_test_in_vain_and_then_be_the_one_who_goes_on():
    def program(comm):
        if comm.rank == 0:
            receive = comm.irecv(message(1), 1)
            for _ in range(100):
                assert not receive.test()
            comm.send(message(1), 1)
            receive.wait()
        else:
            comm.irecv(message(1), 0).wait(timeout=60)  # and 100 tests are no reason to let it pass
            comm.send(message(1), 0)
        return comm.clock()

    assert times(program, 2, PLAIN) == exactly([2 * cost(1), cost(1)])


def test_a_rendezvous_send_can_be_tested():
    def program(comm):
        if comm.rank == 0:
            send = comm.isend(message(1), 1)
            assert not send.test()
            while not send.test():
                pass
        else:
            comm.elapse(5)
            comm.recv(message(1), 0)
        return comm.clock()

    assert times(program, 2, LATE) == exactly([5 + cost(1)] * 2)


# -- timeouts -----------------------------------------------------------------------------------------------------


def test_a_wait_gives_up_at_its_virtual_deadline_and_may_be_tried_again():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(10)
            comm.send(message(0), 1)
            return None
        receive = comm.irecv(message(0), 0)
        looks = []
        for _ in range(3):
            with pytest.raises(TimeoutError, match="waited 4 virtual seconds: receive from rank 0"):
                receive.wait(timeout=4)
            looks.append(comm.clock())
        receive.wait(timeout=4)
        return [*looks, comm.clock()]

    assert simulate(program, 2, network=PLAIN).results[1] == exactly([4, 8, 12, 10 + A])


def test_a_message_that_arrives_at_the_deadline_is_in_time():
    def program(comm):
        if comm.rank == 0:
            comm.elapse(1)
            comm.send(message(0), 1)
        else:
            comm.irecv(message(0), 0).wait(timeout=1 + A)
        return comm.clock()

    for seed in range(10):
        assert times(program, 2, PLAIN, seed=seed) == exactly([1, 1 + A])


def test_timeouts_pass_in_the_order_of_time():
    order: list[tuple[int, float]] = []

    def program(comm):
        receive = comm.irecv(message(0), comm.rank)
        with pytest.raises(TimeoutError):
            receive.wait(timeout=10.0 - comm.rank)
        order.append((comm.rank, comm.clock()))
        comm.send(message(0), comm.rank)
        receive.wait()

    simulate(program, 5, network=PLAIN)
    assert order == [(rank, 10.0 - rank) for rank in (4, 3, 2, 1, 0)]


def test_a_rank_that_only_tests_lets_anothers_timeout_pass():
    def program(comm):
        if comm.rank == 0:
            receive = comm.irecv(message(0), 1)
            while not receive.test():
                pass
        else:
            receive = comm.irecv(message(0), 1)
            with pytest.raises(TimeoutError):
                receive.wait(timeout=20)
            comm.send(message(0), 0)
            comm.send(message(0), 1)
            receive.wait()
        return comm.clock()

    assert times(program, 2, PLAIN) == exactly([20 + A, 20 + 2 * A])


# -- operations in flight -----------------------------------------------------------------------------------------


def forward(comm: Communicator, source: int, dest: int | None):
    """An operation by hand: receive a message, work, pass it on."""
    array = message(4)
    yield comm.irecv(array, source, 9)
    comm.reduced(array.nbytes)
    if dest is not None:
        yield comm.isend(array, dest, 9)


@pytest.mark.parametrize("network", [None, PLAIN, LATE], ids=["free", "eager", "rendezvous"])
@pytest.mark.parametrize("waits", ["receive", "test", "split", "send"])
def test_operations_in_flight_go_on_while_their_rank_waits_for_something_else(network, waits):
    """Rank 2 starts a chain 2 -> 0 -> 1. Rank 1 waits for its end before it does what rank 0 waits for."""

    def program(comm):
        if comm.rank == 0:
            handle = Handle(comm, [(comm, 9)], forward(comm, 2, 1), None, None)
            if waits == "receive":
                comm.recv(message(1), 1)
            elif waits == "test":
                other = Handle(comm, [(comm, 8)], forward(comm, 1, None), None, None)
                while not other.test():
                    pass
            elif waits == "send":
                comm.send(message(1), 1)
            comm.split(0)
            handle.wait()
        elif comm.rank == 1:
            Handle(comm, [(comm, 9)], forward(comm, 0, None), None, None).wait()
            after = comm.clock()
            if waits == "receive":
                comm.send(message(1), 0)
            elif waits == "test":
                comm.send(message(4), 0, tag=9)
            elif waits == "send":
                comm.recv(message(1), 0)
            comm.split(0)
            return after
        else:
            comm.elapse(5)
            comm.send(message(4), 0, tag=9)
            comm.split(0)
        return None

    for seed in range(5):
        run = simulate(program, 3, network=network, seed=seed)
        assert run.results[1] == exactly(5.0 if network is None else 5 + 2 * (cost(4) + 4 * G))


def test_several_operations_in_flight_end_as_soon_as_if_each_were_alone():
    def program(comm):
        if comm.rank:
            comm.elapse(10 * comm.rank)
            comm.send(message(4), 0, tag=9)
            return None
        handles = [Handle(comm, [(comm, rank)], forward(comm, rank, None), None, None) for rank in (3, 2, 1)]
        handles[2].wait()
        first = comm.clock()
        handles[0].wait()
        assert handles[1].done
        return [first, comm.clock()]

    ends = [10 + cost(4) + 4 * G, 30 + cost(4) + 4 * G]
    assert simulate(program, 4, network=PLAIN).results[0] == exactly(ends)


def test_an_operation_in_flight_gives_up_after_its_timeout():
    def program(comm):
        handle = Handle(comm, [(comm, 9)], forward(comm, 0, None), None, None)
        with pytest.raises(TimeoutError, match="waited 5 virtual seconds"):
            handle.wait(timeout=5)
        given_up = comm.clock()
        comm.send(message(4), 0, tag=9)
        handle.wait()
        return [given_up, comm.clock()]

    assert times(program, 1, PLAIN) == [exactly([5.0, 5 + cost(4) + 4 * G])]


def test_flight_records_tell_virtual_times_and_what_a_rank_waits_for():
    records = {}

    def program(comm):
        records[comm.rank] = comm.record
        if comm.rank == 0:
            comm.elapse(1)
            comm.send(message(4), 1)
            waiting = records[1].waiting
            return waiting.what.describe(), waiting.peers, waiting.since
        comm.recv(message(4), 0)
        assert comm.record.waiting is None
        return None

    run = simulate(program, 2, network=PLAIN)
    assert run.results[0] == ("receive from rank 0, tag 0, uint8[4]", [0], 0.0)
    ends = [[(op.kind, op.start, op.end) for op in records[rank].operations()] for rank in (0, 1)]
    assert ends == [[("send", 1.0, 1.0)], [("receive", 0.0, exactly(1 + cost(4)))]]


# -- whole algorithms ---------------------------------------------------------------------------------------------


def ring(comm: Communicator, steps: int, nbytes: int) -> None:
    """Pass a chunk to the right and combine the one from the left, some times over."""
    for _ in range(steps):
        comm.sendrecv(message(nbytes), (comm.rank + 1) % comm.size, message(nbytes), (comm.rank - 1) % comm.size)
        comm.reduced(nbytes)


def binomial(comm: Communicator, nbytes: int) -> None:
    """Broadcast from rank 0: in round k the 2^k ranks that have it send it 2^k further."""
    distance = 1
    while distance < comm.size:
        if comm.rank < distance and comm.rank + distance < comm.size:
            comm.send(message(nbytes), comm.rank + distance)
        elif distance <= comm.rank < 2 * distance:
            comm.recv(message(nbytes), comm.rank - distance)
        distance *= 2


def dissemination(comm: Communicator) -> None:
    distance = 1
    while distance < comm.size:
        comm.sendrecv(message(0), (comm.rank + distance) % comm.size, message(0), (comm.rank - distance) % comm.size)
        distance *= 2


@pytest.mark.parametrize("sends", ["eager", "rendezvous"])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 13])
def test_algorithms_take_the_time_of_their_formulas(size, sends):
    network = Network(A, B, G, sends=sends)
    rounds = (size - 1).bit_length()
    for seed in (0, 1):
        run = simulate(ring, size, size - 1, 12, network=network, seed=seed)
        assert run.seconds_by_rank == exactly([(size - 1) * (A + 12 * (B + G))] * size)
        assert simulate(binomial, size, 12, network=network, seed=seed).seconds == exactly(rounds * cost(12))
        assert simulate(dissemination, size, network=network, seed=seed).seconds == exactly(rounds * A)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_ring_all_reduce_takes_the_time_of_its_formula(size):
    n = size * 5  # elements of 8 bytes
    run = simulate(lambda comm: all_reduce(comm, np.ones(n), algorithm="ring"), size, network=PLAIN)
    assert run.seconds == exactly(2 * (size - 1) * cost(40) + (size - 1) * 40 * G)


def test_ranks_of_a_network_cut_messages_at_its_segment():
    def program(comm):
        return comm.segment, comm.split(0).segment

    assert simulate(program, 1, network=Network(segment=64)).results == [(64, 64)]
    assert simulate(program, 1).results == [(math.inf, math.inf)]


# -- properties ---------------------------------------------------------------------------------------------------

MESSAGES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50), st.integers(0, 9)), max_size=12)


def pattern(comm: Communicator, messages: list[tuple[int, int, int, int]], scale: float) -> list[float]:
    """Any messages (source, dest, bytes, work before it), in this order; returns the times at which this rank acted."""
    requests, looks = [], [comm.clock()]
    for source, dest, nbytes, work in messages:
        if comm.rank == source:
            comm.elapse(work * scale)
            requests.append(comm.isend(message(nbytes), dest))
        if comm.rank == dest:
            requests.append(comm.irecv(message(nbytes), source))
        looks.append(comm.clock())
    for request in requests:
        request.wait()
        looks.append(comm.clock())
    return looks


def pattern_on(network: Network, messages, scale: float = 1.0, seed: int = 0) -> Simulation:
    return simulate(pattern, 4, messages, scale, network=network, seed=seed)


@given(
    messages=MESSAGES,
    ports=st.sampled_from(["one", "many"]),
    sends=st.sampled_from(["eager", "rendezvous"]),
    seed=st.integers(0, 3),
)
def test_any_pattern_of_messages(messages, ports, sends, seed):
    def on(scale: float) -> Simulation:
        between = Link(7 * scale, 2 * scale)
        network = Network(A * scale, B * scale, ranks_per_host=2, between=between, ports=ports, sends=sends)
        return pattern_on(network, messages, scale, seed)

    once, again, twice = on(1.0), on(1.0), on(2.0)
    assert once == again  # a run repeats
    assert twice.seconds == 2 * once.seconds  # exactly: doubling is exact
    for looks in once.results:
        assert looks == sorted(looks)  # time never decreases
    slowest = max((7 + 2 * nbytes for _, _, nbytes, _ in messages), default=0)
    work = sum(work for *_, work in messages)
    assert once.seconds <= work + len(messages) * slowest
    assert once.messages == len(messages)


@given(messages=MESSAGES, seed=st.integers(0, 3))
def test_many_ports_and_eager_sends_are_never_slower(messages, seed):
    """With one port, of course, competing messages may overtake one another; with many, none waits for another."""
    fastest = pattern_on(Network(A, B, ports="many"), messages, seed=seed).seconds
    for ports in ("one", "many"):
        for sends in ("eager", "rendezvous"):
            assert fastest <= pattern_on(Network(A, B, ports=ports, sends=sends), messages, seed=seed).seconds


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(alpha=-1.0), r"alpha=-1\.0: expected a number of seconds, 0 or more"),
        (dict(beta=math.nan), "beta=nan"),
        (dict(gamma=math.inf), "gamma=inf"),
        (dict(alpha="fast"), "alpha='fast'"),
        (dict(ports="two"), "ports='two': choose 'one' or 'many'"),
        (dict(sends="late"), "sends='late': choose 'eager' or 'rendezvous'"),
        (dict(segment=0), "segment=0: expected bytes above 0"),
        (dict(segment=math.nan), "segment=nan"),
        (dict(between=3.0, ranks_per_host=2), r"between=3\.0: expected a Link"),
        (dict(between=Link(1.0)), "say which ranks share a host"),
        (dict(hosts=(0, 1), ranks_per_host=1), r"hosts=\(0, 1\) and ranks_per_host=1: give one"),
        (dict(hosts=(0, -1)), r"hosts=\(0, -1\): hosts are numbered from 0"),
        (dict(ranks_per_host=0), "ranks_per_host=0: expected at least 1"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Network(**arguments)


def test_a_link_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"beta=-2\.0"):
        Link(1.0, -2.0)


def test_hosts_are_given_for_every_rank():
    with pytest.raises(ValueError, match=r"hosts=\(0, 0, 1\) names the hosts of 3 ranks; there are 4"):
        simulate(lambda comm: None, 4, network=Network(hosts=[0, 0, 1]))
