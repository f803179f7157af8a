"""Workers of a parameter server that die, hang, slow down, are cut off, come late: the others finish, nothing is lost.

Each push of a worker marks a place of its own, and a server counts how often each place was marked. So after any run it
can be read off the values which pushes are in them, and how often:

    acknowledged  <=  applied once  <=  pushed
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ps_cases import Served, by_hand

import minidist as md
from minidist.comm import Communicator, Delay, Hang, Kill, LostMessages, Network, Partition, Slow, simulate
from minidist.comm.faults import Fault, plan
from minidist.nn import functional as F
from minidist.parallel import ParameterServer
from minidist.parallel.parameter_server import (
    Expelled,
    Key,
    Report,
    Roles,
    RunOver,
    Stretch,
    Worker,
    WorkerLost,
    consistency_of,
)
from minidist.parallel.parameter_server.dealing import BY_SPEED, EVEN, IN_TURN, Dealer
from minidist.parallel.parameter_server.membership import LostShard

DEADLINE, STEP = 1.0, 0.05  # virtual seconds: until a silent rank is dead; of a step's work
PLAIN = Network(alpha=1e-3, beta=1e-7)
SLOTS, WIDE = 96, 2  # pushes that can be told apart; elements that each of them marks in every other key

# -- the workers' side ------------------------------------------------------------------------------------------------


@dataclass
class Tale:
    """What one worker has lived through."""

    pushed: int = 0
    acked: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # of each key: which pushes
    firsts: list[int] = field(default_factory=list)  # clocks that it was given when it came, and came again
    newest: list[int] = field(default_factory=list)  # the largest clock of anyone's, when it asked for those
    clocks: list[int] = field(default_factory=list)
    expelled: int = 0
    end: str = ""


def mark(count: Any, gradient: Any, scale: float) -> None:
    """What the servers do with a gradient, which may be a mean: count whose pushes are in it."""
    count += gradient != 0


def stretches(size: int, servers: int) -> list[Stretch]:
    """Two keys for each server; the first is long enough for messages of its own."""
    return [Stretch("wide", size * SLOTS * WIDE, "f8"), Stretch("narrow", size * SLOTS, "f4")] * servers


def marks(worker: Worker, key: Key, slot: int) -> np.ndarray:
    """A worker's push number `slot` to a key."""
    gradient = np.zeros((worker.comm.size, SLOTS, key.size // (worker.comm.size * SLOTS)), key.dtype)
    gradient[worker.comm.rank, slot] = 1
    return gradient.ravel()


def live(worker: Worker, tale: Tale, tales: dict[int, Tale], until: Any, backup: bool) -> None:
    """A life, from `register` on: steps until until(clock, pushes)."""
    comm, clock = worker.comm, worker.first
    tale.firsts.append(clock)
    pull(worker, clock)
    while not until(clock, tale.pushed):
        comm.elapse(STEP)
        worker.wait(worker.clock(clock, 1, STEP))
        tale.clocks.append(clock)
        slot, tale.pushed = tale.pushed, tale.pushed + 1
        asked = [worker.push(key.number, marks(worker, key, slot), clock) for key in worker.layout.keys]
        after = clock + 1
        for key, number in enumerate(asked):
            ack = worker.wait(number)
            if ack.start:
                tale.acked[key].add(slot)
            if backup:
                after = max(after, ack.clock)
        clock = after
        pull(worker, clock)


def pull(worker: Worker, clock: int) -> None:
    """All values."""
    keys = worker.layout.keys
    worker.wait(*[worker.pull(key.number, np.zeros(key.size, key.dtype), clock) for key in keys])


@dataclass
class Outcome:
    run: Any
    served: Served
    tales: dict[int, Tale]

    @property
    def report(self) -> Report:
        assert self.served.report is not None
        return self.served.report

    def deaths(self) -> list[int]:
        return [event.rank for event in self.report.deaths]

    def joined(self) -> list[int]:
        return [event.rank for event in self.report.joined]

    def applied(self, key: int, rank: int) -> np.ndarray:
        """How often each push of a worker is in the values."""
        marks = self.served.values[key].reshape(len(self.run.results), SLOTS, -1)[rank]
        assert (marks == marks[:, :1]).all(), "a part of a push is there"
        return marks[:, 0]

    def all_acknowledged(self, ranks: Iterable[int], count: int = 6) -> bool:
        """Whether all of these workers' pushes were, to all keys."""
        tales, keys = [self.tales[rank] for rank in ranks], range(len(self.served.values))
        return all(tale.pushed == count and tale.acked[key] == set(range(count)) for tale in tales for key in keys)

    def check(self) -> None:
        """Nothing acknowledged is lost, nothing is applied twice, and nothing is there that nobody pushed."""
        for rank, tale in self.tales.items():
            for key in range(len(self.served.values)):
                applied = self.applied(key, rank)
                assert set(applied) <= {0.0, 1.0}, (rank, key, applied)
                there = set(np.flatnonzero(applied).tolist())
                assert tale.acked[key] <= there <= set(range(tale.pushed)), (rank, key, tale, there)
        assert all(tale.end for rank, tale in self.tales.items() if rank not in self.run.gone)


END = 200.0  # virtual seconds: no run takes so long


def for_ever(fault: Fault) -> bool:
    """Whether it cuts ranks off for ever."""
    return isinstance(fault, Partition) and fault.seconds == math.inf


def run_marks(
    size: int,
    how: str,
    faults: Sequence[Fault] = (),
    servers: int = 1,
    copies: int = 0,
    steps: int = 6,
    until: Any = None,
    seed: int = 0,
    network: Network | None = PLAIN,
    seen: dict[int, Any] | None = None,
    patience: float = 60.0,
    lost_at: list[float] | None = None,
) -> Outcome:
    """Some steps of all workers. Who is expelled comes back. until(clock, pushes): when a worker is done."""
    tales: dict[int, Tale] = {rank: Tale() for rank in Roles(size, servers, copies).workers}
    until = until or (lambda clock, pushed: pushed >= steps)
    backup = getattr(consistency_of(how), "backup", 0) > 0

    def work(worker: Worker) -> None:
        tale = tales[worker.comm.rank]
        while True:
            try:
                live(worker, tale, tales, until, backup)
                tale.end = "done"
                return
            except Expelled:
                tale.expelled += 1
                assert tale.expelled < 6
                tale.newest.append(max((max(t.clocks) for t in tales.values() if t.clocks), default=-1))
                worker.register()

    def program(comm: Communicator) -> Any:
        comm.timeout = patience
        try:
            return by_hand(
                comm, work, stretches(size, servers), servers, how, copies, update=mark, seen=seen, deadline=DEADLINE
            )
        except (Expelled, RunOver) as error:  # a server that was taken for dead; a worker when all is over
            if comm.rank in tales:
                tales[comm.rank].end = type(error).__name__
        except TimeoutError:
            if not any(map(for_ever, faults)):
                raise
            if comm.rank in tales:
                tales[comm.rank].end = "gave up"
        except WorkerLost:
            if lost_at is not None:
                lost_at.append(comm.clock())
            raise

    # (Who is cut off for ever, and never gives up, is to be an error of the tests that look for it, not their end.)
    ends = [Kill(rank, at=END) for fault in faults if for_ever(fault) for rank in fault.ranks]  # type: ignore
    run = simulate(program, size, seed=seed, network=network, faults=[*faults, *ends])
    outcome = Outcome(run, run.results[0], tales)
    outcome.check()
    return outcome


def messages_of(rank: int, *arguments: Any, **options: Any) -> range:
    """The numbers of a rank's messages in a run without faults."""
    return range(1, run_marks(*arguments, **options).run.messages_by_rank[rank] + 1)


# -- a worker dies ----------------------------------------------------------------------------------------------------


def in_time(outcome: Outcome, busy: float = STEP) -> bool:
    """Whether the only death was noticed when it had to be: a deadline after the last sign of life."""
    (death,), struck = outcome.report.deaths, outcome.run.struck[0].seconds
    return DEADLINE - max(busy, DEADLINE / 4) - 0.02 <= death.seconds - struck <= DEADLINE + 0.02


@pytest.mark.parametrize("fault", [Kill, Hang])
@pytest.mark.parametrize("how", ["async", "ssp:2", "backup:1"])
def test_a_worker_is_lost_at_any_message_and_the_rest_finishes(how: str, fault: type[Kill] | type[Hang]) -> None:
    size, victim = 4, 2
    for number in messages_of(victim, size, how):
        outcome = run_marks(size, how, [fault(victim, message=number)])
        assert outcome.run.gone == [victim]
        (death,) = outcome.report.deaths
        assert (death.rank, death.role) == (victim, "worker")
        assert "not heard of for 1.0 s" in death.how
        assert in_time(outcome), (number, death, outcome.run.struck)
        assert f"died            worker rank {victim} at " in outcome.report.in_words()
        for rank in (1, 3):
            assert outcome.tales[rank].end == "done"
            assert outcome.tales[rank].pushed == 6
        assert how == "backup:1" or outcome.all_acknowledged((1, 3))
        assert sorted(outcome.report.clocks) == [1, 3]


@pytest.mark.parametrize("fault", [Kill, Hang])
def test_bsp_says_who_is_lost_at_any_message(fault: type[Kill] | type[Hang]) -> None:
    size, victim = 4, 3
    for number in messages_of(victim, size, "bsp"):
        when: list[float] = []
        words = rf"worker rank {victim} is lost \(not heard of for 1\.0 s, at clock \d\), and bsp cannot go on without"
        with pytest.raises(WorkerLost, match=words) as caught:
            run_marks(size, "bsp", [fault(victim, message=number)], lost_at=when)
        assert "async, ssp:S and backup:B can" in str(caught.value)
        assert when[0] < 10 * STEP + DEADLINE


@pytest.mark.parametrize("how", ["async", "ssp:1", "backup:2"])
def test_workers_are_lost_one_after_another(how: str) -> None:
    outcome = run_marks(5, how, [Kill(2, at=0.12), Hang(4, at=0.4), Kill(1, at=0.7)], steps=40)
    assert outcome.deaths() == [2, 4, 1]
    assert outcome.tales[3].end == "done"


@pytest.mark.parametrize("how", ["async", "ssp:0", "backup:1"])
@pytest.mark.parametrize("network", [None, PLAIN], ids=["at once", "on a network"])
def test_when_all_workers_are_lost_the_run_fails_and_says_who(how: str, network: Network | None) -> None:
    faults = [Kill(rank, message=3 * rank) for rank in (1, 2, 3)]
    with pytest.raises(WorkerLost, match="all workers are lost") as caught:
        run_marks(4, how, faults, network=network)
    for rank in (1, 2, 3):
        assert f"worker rank {rank} at " in str(caught.value)


def test_when_all_die_before_they_have_registered_the_run_fails() -> None:
    with pytest.raises(WorkerLost, match="all workers are lost"):
        run_marks(3, "async", [Kill(1, message=1), Kill(2, message=1)])


def test_a_worker_lost_before_it_registers_does_not_keep_the_others_from_beginning() -> None:
    outcome = run_marks(4, "async", [Kill(1, message=1)])
    assert outcome.deaths() == [1]
    assert outcome.all_acknowledged((2, 3))


def test_a_lost_server_without_copies_ends_the_run() -> None:
    with pytest.raises(WorkerLost, match=r"server rank 1 is lost .*copies=0"):
        run_marks(5, "async", [Kill(1, message=4)], servers=2)


# -- a worker hangs and goes on ---------------------------------------------------------------------------------------

LONG = 70  # clocks: 3.5 s, in which a rank may sleep


@pytest.mark.parametrize("how", ["async", "ssp:2", "backup:1"])
def test_who_slept_too_long_is_told_so_and_joins_again(how: str) -> None:
    size, victim = 4, 2
    for number in range(2, 14, 2):
        fault = Hang(victim, message=number, seconds=2.2)
        outcome = run_marks(size, how, [fault], until=lambda clock, _: clock >= LONG)
        tale = outcome.tales[victim]
        assert (outcome.deaths(), outcome.joined(), tale.expelled) == ([victim], [victim], 1), (number, tale)
        assert all(t.end == "done" for t in outcome.tales.values())
        assert in_time(outcome)
        (back,) = outcome.report.joined
        assert 2.2 <= back.seconds - outcome.run.struck[0].seconds <= 2.2 + 0.3
        # The clock that it begins with is one that nobody had been given.
        assert [back.clock] == tale.firsts[1:]
        assert tale.firsts[1] > tale.newest[0] > 20
        # None of its pushes in the second life is lost; and of the first, only the one it was at.
        applied = outcome.applied(0, victim)
        lost = set(range(tale.pushed)) - set(np.flatnonzero(applied).tolist())
        assert how == "backup:1" or len(lost) <= 1


def test_who_slept_before_it_registered_joins_later() -> None:
    outcome = run_marks(3, "async", [Hang(2, message=1, seconds=2.2)], until=lambda clock, _: clock >= LONG)
    assert (outcome.deaths(), outcome.joined(), outcome.tales[2].expelled) == ([2], [2], 0)
    assert outcome.tales[2].end == "done"


def test_who_sleeps_for_less_than_the_deadline_stays() -> None:
    for number in messages_of(2, 3, "ssp:1"):
        outcome = run_marks(3, "ssp:1", [Hang(2, message=number, seconds=0.7)])
        assert (outcome.deaths(), outcome.joined()) == ([], [])
        assert outcome.all_acknowledged(outcome.tales)


def test_who_wakes_up_when_all_is_over_finds_that() -> None:
    outcome = run_marks(3, "async", [Hang(2, at=0.12, seconds=30.0)])
    assert (outcome.deaths(), outcome.joined()) == ([2], [])
    assert outcome.tales[2].end == "RunOver"


@pytest.mark.parametrize(("servers", "copies"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("how", ["async", "bsp"])
def test_a_scheduler_that_stood_still_does_not_take_the_others_for_dead(how: str, servers: int, copies: int) -> None:
    # Their signs of life are in its mailbox: it has to read before it judges.
    for at in (0.12, 0.13, 0.149, 0.1505, 0.16):
        outcome = run_marks(6, how, [Hang(0, at=at, seconds=2.2)], servers=servers, copies=copies)
        assert outcome.deaths() == []
        assert outcome.all_acknowledged(outcome.tales)


@pytest.mark.parametrize("seconds", [0.9, 3.7])
def test_pushes_of_an_earlier_life_that_come_late_change_nothing(seconds: float) -> None:
    # Of 3 workers, one dies and one is expelled; what that one had pushed comes when it takes part again.
    for at in np.arange(0.1, 0.3, 0.04):
        faults = [
            Kill(3, at=0.15), Hang(2, at=0.3, seconds=1.3), Delay(seconds, rank=2, dest=0, at=float(at), until=0.3)
        ]  # fmt: skip
        for how in ("backup:1", "async"):
            with suppress(LostMessages):  # the run may be over sooner
                run_marks(4, how, faults, until=lambda clock, _: clock >= LONG)


def test_a_worker_that_waits_gives_signs_of_life_though_messages_come() -> None:
    # Worker 1 is ahead; the values that it has asked for come one by one, in less than a heartbeat.
    clocks = 20

    def work(worker: Worker) -> None:
        for clock in range(clocks):
            if worker.comm.rank == 2:
                worker.comm.elapse(0.8 * worker.heartbeat)
                worker.wait(worker.clock(clock))
            worker.wait(worker.push(0, np.ones(1), clock))
        worker.wait(*reversed([worker.pull(0, np.zeros(1), clock) for clock in range(clocks)]))

    def program(comm: Communicator) -> Any:
        return by_hand(comm, work, [Stretch("all", 1, "f8")], 1, "ssp:0", deadline=DEADLINE)

    assert simulate(program, 3, network=PLAIN).results[0].report.deaths == []


@pytest.mark.parametrize("copies", [0, 1])
def test_messages_that_stop_half_way_do_not_keep_a_server_from_giving_signs_of_life(copies: int) -> None:
    # Workers are cut off, for less than a deadline. What they were sending has begun to arrive.
    network = Network(alpha=1e-2, sends="rendezvous")
    for at in np.arange(0.0, 0.4, 0.04):
        faults = [Partition(range(2 + copies, 8 + copies), at=float(at), seconds=0.6)]
        outcome = run_marks(8 + copies, "async", faults, servers=2, copies=copies, network=network)
        assert not set(outcome.report.deaths), (at, outcome.report.deaths)


# -- a worker joins ---------------------------------------------------------------------------------------------------


def vector(rank: int, clock: int) -> np.ndarray:
    return np.random.default_rng([rank, clock]).standard_normal(7)


@pytest.mark.parametrize("pause", [0.0, 0.07, 0.21, 0.34])
@pytest.mark.parametrize("servers", [1, 2])
def test_bsp_counts_who_joins_from_its_first_clock_on(pause: float, servers: int) -> None:
    clocks, late = 12, 4
    pulled: dict[tuple[int, int], np.ndarray] = {}
    weights = {2: 1.0, 3: 2.0, 4: 5.0} if servers == 2 else {1: 1.0, 2: 3.0, 3: 2.0, 4: 5.0}
    joined = dict.fromkeys(weights, 0)

    def work(worker: Worker) -> None:
        comm = worker.comm
        if comm.rank == late:
            comm.elapse(pause)
            joined[late] = worker.register()
        values = [np.zeros(key.size) for key in worker.layout.keys]
        for clock in range(worker.first, clocks + 1):
            worker.wait(worker.clock(clock))
            worker.wait(*(worker.pull(key, v, clock) for key, v in enumerate(values)))
            pulled[comm.rank, clock] = np.concatenate(values)
            if clock == clocks:
                break
            comm.elapse(STEP)
            g = vector(comm.rank, clock)
            for key in worker.layout.keys:
                worker.push(key.number, g[key.start : key.stop], clock, weight=weights[comm.rank])
        if comm.rank == late:
            worker.leave(clocks)

    def program(comm: Communicator) -> Any:
        return by_hand(
            comm, work, [Stretch("all", 7, "f8")], servers, "bsp", registers=lambda rank: rank != late,
            deadline=DEADLINE,
        )  # fmt: skip

    served = simulate(program, 5, network=PLAIN).results[0]
    first = joined[late]
    assert [(e.rank, e.clock) for e in served.report.joined] == ([(late, first)] if served.report.joined else [])
    assert 0 < first < clocks
    value = np.zeros(7)
    for clock in range(clocks + 1):
        there = [rank for rank in weights if joined[rank] <= clock]
        assert {rank for rank, c in pulled if c == clock} == set(there)
        for rank in there:
            assert_allclose(pulled[rank, clock], value, rtol=1e-12, atol=1e-12)
        total = sum(weights[rank] for rank in there)
        value = value + sum(weights[rank] / total * vector(rank, clock) for rank in there)


@pytest.mark.parametrize("how", ["bsp", "backup:1", "ssp:0", "async"])
def test_who_joins_when_the_others_have_just_been_dealt_their_last_share_is_served(how: str) -> None:
    # They were given clock 3, and leave without a push for it.
    def work(worker: Worker) -> str:
        comm = worker.comm
        if comm.rank == 3:
            comm.elapse(0.5)
            assert worker.register() == 4
        for clock in range(worker.first, 3 if comm.rank < 3 else 6):
            worker.wait(worker.clock(clock), worker.pull(0, np.zeros(1), clock))
            worker.wait(worker.push(0, np.ones(1), clock))
        if comm.rank == 3:
            worker.leave()
        else:
            worker.wait(worker.clock(3))
            comm.elapse(0.8)
        return "done"

    def program(comm: Communicator) -> Any:
        comm.timeout = 10.0
        return by_hand(
            comm, work, [Stretch("all", 1, "f8")], 1, how, registers=lambda rank: rank != 3, deadline=DEADLINE
        )

    run = simulate(program, 4, network=PLAIN)
    assert run.results[1:] == ["done"] * 3
    assert [(event.rank, event.clock) for event in run.results[0].report.joined] == [(3, 4)]


@pytest.mark.parametrize("how", ["async", "ssp:3", "async-dc:0.1"])
def test_who_joins_begins_with_the_servers_present_values(how: str) -> None:
    history: list[np.ndarray] = [np.zeros(5)]

    def update(data: Any, gradient: Any, scale: float) -> None:
        data += gradient
        history.append(data.copy())

    def work(worker: Worker) -> Any:
        values = np.zeros(5)
        before = None
        if worker.comm.rank == 3:
            worker.comm.elapse(0.5)
            before = len(history) - 1
            worker.register()
        for clock in range(worker.first, 20):
            worker.wait(worker.clock(clock))
            worker.wait(worker.pull(0, values, clock))
            if before is not None:
                version = worker.versions[0]
                assert before <= version < len(history)
                assert version >= 10
                assert_array_equal(values, history[version])
                before = None
            worker.comm.elapse(STEP)
            worker.wait(worker.push(0, vector(worker.comm.rank, clock)[:5], clock))
        if worker.comm.rank == 3:
            worker.leave()
        return None

    def program(comm: Communicator) -> Any:
        return by_hand(
            comm, work, [Stretch("all", 5, "f8")], 1, how, update=update, registers=lambda rank: rank != 3,
            deadline=DEADLINE,
        )  # fmt: skip

    served = simulate(program, 4, network=PLAIN).results[0]
    (event,) = served.report.joined
    assert event.rank == 3
    assert event.clock >= 8
    assert 0.4 < event.seconds < 0.6


@pytest.mark.parametrize("how", ["bsp", "ssp:2", "async"])
def test_who_joins_is_dealt_a_share_and_who_died_is_not(how: str) -> None:
    samples, batch, clocks, late, victim = 50, 12, 60, 4, 2
    dealt: list[tuple[int, int, int, int, int]] = []  # clock, rank, epoch, start, size
    kind = {"bsp": EVEN, "ssp:2": BY_SPEED, "async": IN_TURN}[how]

    def work(worker: Worker) -> None:
        comm = worker.comm
        if comm.rank == late:
            comm.elapse(0.42)
            worker.register()
        size = 0
        for clock in range(worker.first, clocks):
            deal = worker.wait(worker.clock(clock, size, STEP))
            size = deal.size
            dealt.append((clock, comm.rank, deal.stamp, deal.start, deal.size))
            comm.elapse(STEP)
            worker.wait(worker.push(0, np.ones(1), clock, weight=size))
            worker.wait(worker.pull(0, np.zeros(1), clock + 1))
        if comm.rank == late:
            worker.leave(clocks)

    def program(comm: Communicator) -> Any:
        dealer = Dealer(samples, batch, 4, kind)
        return by_hand(
            comm, work, [Stretch("all", 1, "f8")], 1, how, dealer=dealer, registers=lambda rank: rank != late,
            deadline=DEADLINE,
        )  # fmt: skip

    faults = [] if how == "bsp" else [Kill(victim, at=0.32)]
    served = simulate(program, 5, network=PLAIN, faults=faults).results[0]
    (event,) = served.report.joined
    assert event.rank == late
    mine = [d for d in dealt if d[1] == late]
    assert sum(d[4] for d in mine) > 0
    assert [e.rank for e in served.report.deaths] == ([] if how == "bsp" else [victim])
    if how == "async":
        # In turn: every sample once an epoch, whoever asks, except what the dead one took with it.
        for epoch in range(max(d[2] for d in dealt)):
            counts = np.zeros(samples, int)
            for _, _, _, start, size in (d for d in dealt if d[2] == epoch):
                counts[start : start + size] += 1
            assert counts.max() <= 1
            assert samples - counts.sum() <= batch // 4
        return
    batches = -(-samples // batch)
    for clock in range(clocks):
        parts = sorted((start, size, rank) for c, rank, _, start, size in dealt if c == clock)
        start = clock % batches * batch
        at = start
        for begin, size, _ in parts:
            assert begin >= at  # no sample twice
            at = begin + size
        whole = min(batch, samples - start)
        covered = sum(size for _, size, _ in parts)
        if how == "bsp" or clock > 40:
            assert covered == whole, (clock, parts)
            assert {rank for *_, rank in parts} == {1, 2, 3, 4} - set(served.report.deaths and [victim]) - (
                {late} if clock < event.clock else set()
            )


def test_a_worker_may_join_and_be_lost_and_another_join() -> None:
    def work(worker: Worker) -> str:
        comm = worker.comm
        if comm.rank > 1:
            comm.elapse({2: 0.3, 3: 2.0}[comm.rank])
            worker.register()
        for clock in range(worker.first, 100):
            worker.wait(worker.clock(clock))
            comm.elapse(STEP)
            worker.wait(worker.push(0, np.ones(1), clock))
            worker.wait(worker.pull(0, np.zeros(1), clock + 1))
        if comm.rank > 1:
            worker.leave(100)
        return "done"

    def program(comm: Communicator) -> Any:
        return by_hand(
            comm, work, [Stretch("all", 1, "f8")], 1, "ssp:2", registers=lambda rank: rank == 1, deadline=DEADLINE
        )

    run = simulate(program, 4, network=PLAIN, faults=[Kill(2, at=0.6)])
    report = run.results[0].report
    assert [e.rank for e in report.joined] == [2, 3]
    assert [e.rank for e in report.deaths] == [2]
    assert run.results[1:] == ["done", None, "done"]


# -- a worker is slow, or cut off -------------------------------------------------------------------------------------


def race(kind: str, bound: int, faults: Sequence[Fault], clocks: int = 80) -> tuple[Any, Report, int]:
    """ssp with shares that take as long as they are: the run, its report, and how far anybody was ever ahead."""
    at: dict[int, int] = {}
    ahead = [0]

    def work(worker: Worker) -> None:
        comm = worker.comm
        size, took = 0, 0.0
        at[comm.rank] = 0
        for clock in range(clocks):
            size = worker.wait(worker.clock(clock, size, took)).size
            begin = comm.clock()
            comm.elapse(0.001 * size)
            took = comm.clock() - begin
            worker.wait(worker.push(0, np.ones(1), clock, weight=size))
            at[comm.rank] = clock + 1
            worker.wait(worker.pull(0, np.zeros(1), clock + 1))
            ahead[0] = max(ahead[0], clock + 1 - min(at.values()))

    def program(comm: Communicator) -> Any:
        return by_hand(
            comm, work, [Stretch("all", 1, "f8")], 1, f"ssp:{bound}", dealer=Dealer(4000, 400, 4, kind), deadline=30.0
        )

    run = simulate(program, 5, network=Network(alpha=1e-5), faults=faults)
    return run, run.results[0].report, ahead[0]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_beside_a_slow_worker_the_bound_holds_and_balanced_shares_hold_nobody_up(bound: int) -> None:
    slow = [Slow(3, 5.0, at=0.3)]
    (even, told, ahead), (balanced, told_balanced, ahead_balanced) = (race(k, bound, slow) for k in (EVEN, BY_SPEED))
    assert len(even.struck) == len(balanced.struck) == 1
    assert ahead == bound
    assert ahead_balanced <= bound
    others = (1, 2, 4)
    assert all(told.waited[rank] > 0.5 * told.seconds for rank in others)
    assert all(told_balanced.waited[rank] < 0.2 * told_balanced.seconds for rank in others)
    assert told_balanced.seconds < 0.5 * told.seconds
    assert told_balanced.samples[3] < 0.5 * told_balanced.samples[1]
    assert told.deaths == told_balanced.deaths == []


@pytest.mark.parametrize("how", ["bsp", "async", "ssp:1", "backup:1"])
@pytest.mark.parametrize("cut", [(2,), (1, 3), (1, 2, 3)])
def test_a_partition_that_heals_in_time_costs_nothing_but_time(how: str, cut: tuple[int, ...]) -> None:
    for at in (0.0, 0.0505, 0.12, 0.155):
        outcome = run_marks(4, how, [Partition(cut, at=at, seconds=0.6)])
        assert outcome.deaths() == []
        if how != "backup:1":
            assert outcome.all_acknowledged(outcome.tales)


@pytest.mark.parametrize("how", ["async", "ssp:1", "backup:1"])
def test_a_partition_that_heals_late_expels_and_lets_in_again(how: str) -> None:
    for at in (0.12, 0.155, 0.2005):
        outcome = run_marks(4, how, [Partition([2], at=at, seconds=2.0)], until=lambda clock, _: clock >= LONG)
        assert (outcome.deaths(), outcome.joined()) == ([2], [2])
        assert outcome.tales[2].expelled == 1
        assert all(tale.end == "done" for tale in outcome.tales.values())


@pytest.mark.parametrize("how", ["async", "ssp:1", "backup:1"])
def test_who_is_cut_off_for_ever_gives_up_and_the_rest_finishes(how: str) -> None:
    outcome = run_marks(4, how, [Partition([2], at=0.12)], patience=5.0)
    assert outcome.deaths() == [2]
    assert {rank: tale.end for rank, tale in outcome.tales.items()} == {1: "done", 2: "gave up", 3: "done"}


@pytest.mark.parametrize("how", ["bsp", "async"])
def test_a_server_that_is_cut_off_for_ever_gives_up(how: str) -> None:
    outcome = run_marks(5, how, [Partition([1], at=0.12)], servers=2, copies=1, patience=5.0)
    assert outcome.deaths() == [1]
    assert outcome.run.gone == [], "it was killed in the end"
    assert outcome.all_acknowledged((3, 4))


def test_who_waits_in_vain_says_for_whom_and_what() -> None:
    def work(worker: Worker) -> None:
        with pytest.raises(
            TimeoutError, match=r"rank 1 has waited 5 s for rank 0 to answer its push of key 0, clock 0"
        ):
            worker.wait(worker.push(0, np.ones(1)))
        raise KeyError("as it had to be")

    def program(comm: Communicator) -> Any:
        comm.timeout = 5.0
        return by_hand(comm, work, [Stretch("all", 1, "f8")], 1, "async", deadline=DEADLINE)

    with pytest.raises((KeyError, WorkerLost)):
        simulate(program, 2, network=PLAIN, faults=[Partition([1], at=0.0035)])


@pytest.mark.parametrize("how", ["bsp", "async", "ssp:1", "backup:1"])
def test_late_messages_change_nothing(how: str) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        faults = [
            Delay(draw.uniform(0.01, 0.5), draw.choice((0, 1, 2, 3)), message=draw.randint(1, 12)) for _ in range(4)
        ]
        outcome = run_marks(4, how, faults, seed=seed)
        assert outcome.deaths() == []
        assert all(tale.pushed == 6 for tale in outcome.tales.values())


# -- meetings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["async", "ssp:1", "backup:1"])
def test_a_meeting_waits_for_the_living(how: str) -> None:
    size, victim, rounds = 4, 2, 3

    def run(faults: Sequence[Fault], seed: int) -> tuple[Any, list[list[tuple[int, Any, int, int]]]]:
        met: list[list[tuple[int, Any, int, int]]] = [[] for _ in range(rounds)]

        def work(worker: Worker) -> str:
            for clock in range(rounds):
                worker.wait(worker.clock(clock))
                worker.comm.elapse(STEP)
                worker.wait(worker.push(0, np.ones(1), clock))
                total, which, of = worker.barrier([1.0, worker.comm.rank], label=clock)
                met[clock].append((worker.comm.rank, total.tolist(), which, of))
            return "done"

        def program(comm: Communicator) -> Any:
            return by_hand(comm, work, [Stretch("all", 1, "f8")], 1, how, deadline=DEADLINE)

        return simulate(program, size, network=PLAIN, faults=faults, seed=seed), met

    whole, _ = run([], 0)
    for number in range(1, whole.messages_by_rank[victim] + 1):
        for fault in (Kill(victim, message=number), Hang(victim, message=number)):
            told, met = run([fault], number)
            assert [e.rank for e in told.results[0].report.deaths] == [victim]
            assert (told.results[1], told.results[3]) == ("done", "done")
            for people in met:
                # All that meet hear the same, each is another one of them, and who is in the sums has been there.
                ranks = [rank for rank, *_ in people]
                assert {1, 3} <= set(ranks)
                (heard,) = {(tuple(total), of) for _, total, _, of in people}
                (there, numbers), of = heard
                assert there == of
                assert of in (2, 3)
                assert numbers == 4 if of == 2 else numbers == 6
                assert len({which for *_, which, _ in people}) == len(people)
                assert {which for *_, which, _ in people} <= set(range(of))


def test_samples_dealt_to_the_dead_are_not_waited_for() -> None:
    def program(comm: Communicator) -> Any:
        model, ps = small(comm, "async", deadline=DEADLINE)
        if ps.serves:
            return ps.serve()
        learn(ps, model, comm, epochs=3)
        return "done"

    for at in (0.07, 0.08, 0.13, 0.2):
        run = simulate(program, 4, network=PLAIN, faults=[Kill(3, at=at)])
        report = run.results[0]
        assert run.results[1:3] == ["done", "done"]
        assert [e.rank for e in report.deaths] == [3]
        each = BATCH // 3
        # The last share that the dead one was dealt is nobody's; all others were trained on.
        assert 3 * SAMPLES - 2 * each <= sum(report.samples.values()) <= 3 * SAMPLES


# -- any faults -------------------------------------------------------------------------------------------------------

KINDS: list[tuple[type[Fault], ...]] = [
    (Kill,),
    (Kill, Hang),
    (Hang,),
    (Kill, Delay),
    (Kill, Hang, Slow, Delay),
    (Partition, Delay),
    (Kill, Hang, Slow, Delay, Partition),
]


def hit(faults: Iterable[Fault], among: Iterable[int]) -> set[int]:
    """Ranks that may be taken for dead."""
    ranks: set[int] = set()
    for fault in faults:
        if isinstance(fault, Delay):
            ranks |= {rank for rank in (fault.rank, fault.dest) if rank is not None}
            ranks |= set(among) if fault.dest is None or fault.dest == 0 else set()
        elif not isinstance(fault, Slow):
            ranks |= set(fault.ranks if isinstance(fault, Partition) else [fault.rank])
    return ranks & set(among)


def one_plan(seed: int) -> str:
    """A run with a random plan of faults, and what came of it."""
    draw = random.Random(seed)
    copies = draw.choice((0, 1, 1, 2))
    servers = draw.choice((1, 2, 3)) if not copies else draw.choice(range(copies + 1, 4))
    workers = draw.choice((1, 2, 3, 4))
    size = servers + (copies > 0) + workers
    roles = Roles(size, servers, copies)
    choices = ["async", "ssp:0", "ssp:1", "ssp:3", "async-dc:0.1"] + (["backup:1"] if workers > 1 else [])
    how = draw.choice(choices)
    network = draw.choice((None, PLAIN, Network(alpha=1e-2, sends="rendezvous")))
    among = range(1, size) if copies else roles.workers
    kinds = draw.choice(KINDS)
    faults = plan(seed, size, draw.choice((1, 1, 2, 3)), seconds=1.5, messages=60, among=among, kinds=kinds)
    try:
        outcome = run_marks(size, how, faults, servers, copies, seed=seed, network=network)
    except LostMessages:
        assert any(isinstance(fault, Delay | Partition) for fault in faults)  # held up until all was over
        return "over before a message came"
    except WorkerLost as error:
        assert "all workers are lost" in str(error), error
        assert hit(faults, roles.workers) == set(roles.workers)
        return "all workers lost"
    except LostShard:
        assert len(hit(faults, roles.server_ranks)) > copies
        return "shard lost"
    except Exception as error:
        error.add_note(
            f"seed {seed}: {how}, {servers} servers, {copies} copies, {workers} workers, {network}, {faults}"
        )
        raise
    return "a death" if outcome.deaths() else "nobody died"


@pytest.mark.parametrize("part", range(4))
def test_any_plan_of_faults_loses_nothing_and_counts_nothing_twice(part: int) -> None:
    outcomes = Counter(one_plan(seed) for seed in range(75 * part, 75 * (part + 1)))
    assert outcomes["a death"] > 20
    assert outcomes["nobody died"] > 10


# -- training ---------------------------------------------------------------------------------------------------------

SAMPLES, BATCH = 60, 12
POINTS = np.random.default_rng(5).standard_normal((SAMPLES, 4))
SIDES = (POINTS @ [1.0, -2.0, 0.5, 1.0] > 0.1).astype(np.int64)


def small(comm: Communicator, how: str, **options: Any) -> tuple[md.nn.Sequential, ParameterServer]:
    md.manual_seed(0)
    model = md.nn.Sequential(md.nn.Linear(4, 6), md.nn.Tanh(), md.nn.Linear(6, 2)).to("cpu", np.float64)
    optimizer = md.optim.SGD(model.parameters(), lr=0.2)
    return model, ParameterServer(model, optimizer, comm, consistency=how, samples=SAMPLES, batch_size=BATCH, **options)


def loss_of(model: Any, part: slice = slice(None)) -> md.Tensor:
    return F.cross_entropy(model(md.tensor(POINTS[part], dtype=np.float64)), md.tensor(SIDES[part]))


def learn(ps: ParameterServer, model: Any, comm: Communicator, epochs: int) -> None:
    """A worker, as in the MNIST example: who is expelled joins again, with the epoch of its share."""
    while (epoch := ps.share().epoch) < epochs:
        try:
            for start, size in ps.shares(epoch):
                if size:
                    ps.zero_grad()
                    loss_of(model, slice(start, start + size)).backward()
                comm.elapse(0.004 * max(size, 1))
                ps.step()
            ps.meet([1.0], label=epoch)
            ps.pull()
        except Expelled:
            ps.join()
    ps.leave()


@pytest.mark.parametrize("how", ["async", "ssp:2", "backup:1", "async-scaled", "async-dc:0.04"])
@pytest.mark.parametrize("copies", [0, 1])
def test_the_loss_falls_whatever_happens_to_some(how: str, copies: int) -> None:
    size, epochs = 5 + 2 * copies, 15
    first_worker = 3 if copies else 1

    def program(comm: Communicator, faults: Sequence[Fault]) -> Any:
        comm.timeout = 30.0
        model, ps = small(comm, how, deadline=DEADLINE, servers=1 + copies, copies=copies)
        if comm.rank == 0:
            before = loss_of(model).item()
            report = ps.serve()
            return before, loss_of(model).item(), report
        try:
            if ps.serves:
                ps.serve()
            else:
                learn(ps, model, comm, epochs)
        except RunOver:
            return "over"
        except TimeoutError:
            assert any(map(for_ever, faults))
        return None

    struck = 0
    for seed in range(2):
        # The last worker, and of two servers the first, are spared: somebody is to be left.
        among = [rank for rank in range(1, size - 1) if rank != 2 or not copies]
        kinds = (Kill, Hang, Slow) if seed % 2 else (Kill, Hang, Slow, Partition)
        faults = plan(100 + seed, size, 3, seconds=2.0, messages=80, among=among, kinds=kinds)
        ends = [Kill(rank, at=END) for fault in faults if for_ever(fault) for rank in fault.ranks]  # type: ignore
        run = simulate(program, size, faults, seed=seed, network=PLAIN, faults=[*faults, *ends])
        before, after, report = run.results[0]
        assert before > 0.5
        assert after < 0.6 * before, (seed, before, after, faults)
        assert {event.rank for event in report.deaths} <= hit(faults, range(1, size))
        assert size - 1 in report.waited
        assert first_worker <= min(report.waited)
        struck += len(run.struck)
    assert struck >= 3
