"""Runs with faults repeat; random plans of faults, and a program that survives them all."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from fault_programs import LATE, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st

from minidist.collectives import all_reduce
from minidist.comm import Communicator, Delay, Hang, Kill, Network, Partition, Slow, simulate
from minidist.comm.faults import plan

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
        got = np.array([0])
        try:
            comm.irecv(got, source, tag).wait(END)  # a rendezvous message that has been seen may still be late
        except TimeoutError:
            return None
        log.append((comm.clock(), int(got[0])))
        return int(got[0])

    def send(value: int, dest: int, tag: int) -> None:
        try:
            comm.isend(np.array([value]), dest, tag).wait(0.5)
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


PLANS = st.builds(partial(plan, size=CLIENTS + 1, messages=12), seed=st.integers(0, 10**6), count=st.integers(0, 6))


@given(
    faults=PLANS,
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(among=[]), r"among=\(\)"),
        (dict(among=[4]), "the ranks are 0 to 3"),
        (dict(kinds=[Network]), "Network.*expected ranks, and kinds of faults"),
        (dict(by=["luck"]), "by=.'luck'.: expected 'time', 'message' or both"),
        (dict(count=-1), "count=-1"),
        (dict(seconds=0.0), r"seconds=0\.0"),
        (dict(messages=0), "messages=0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"seed": 0, "size": 4, "count": 20, **arguments})
