"""Shards with copies on other servers (chain replication): servers die or hang, and no acknowledged push is lost.

Rank 0 is the scheduler, ranks 1 … S are the servers, all others workers. Rank 1 is the head of shard 0, ranks 2 … its
copies; and so on in a circle. So each server is a head, a tail, and with two copies a middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ps_cases import Served, by_hand
from test_ps_faults import DEADLINE, PLAIN, STEP, in_time, run_marks

from minidist.comm import Communicator, Delay, Hang, Kill, Network, Partition, simulate
from minidist.comm.faults import Fault
from minidist.parallel.parameter_server import Expelled, RunOver, Server, Stretch, Worker, WorkerLost
from minidist.parallel.parameter_server.membership import LostShard

SIZES = [700, 5]  # elements: the first key's messages are too long for a parcel


def in_order(values: Any, gradient: Any, scale: float) -> None:
    """An update whose result depends on the order, and on how often it is made."""
    values *= 0.875
    values += gradient * scale


def gradient(worker: int, clock: int, key: Any) -> np.ndarray:
    """Of worker 0, 1, …"""
    return np.random.default_rng([worker, clock, key.number]).standard_normal(key.size).astype(key.dtype)


class Run:
    """Some steps of all workers with gradients at random; what is left of it."""

    def __init__(
        self,
        how: str,
        faults: Sequence[Fault] = (),
        servers: int = 2,
        copies: int = 1,
        workers: int = 3,
        steps: int = 4,
        network: Network | None = PLAIN,
        seed: int = 0,
        empty: Any = lambda worker, clock: False,
    ):
        self.seen: dict[int, Server] = {}
        self.heads: dict[int, list[int]] = {}
        self.pulled: dict[int, list[np.ndarray]] = {}
        self.servers, self.copies = servers, copies

        def work(worker: Worker) -> str:
            comm, keys, clock = worker.comm, worker.layout.keys, worker.first
            mine = comm.rank - worker.roles.first_worker
            values = [np.zeros(key.size, key.dtype) for key in keys]
            while clock < steps:
                worker.wait(worker.clock(clock))
                comm.elapse(STEP * (1 + mine % 3 / 2))
                nothing = empty(mine, clock)
                given = [None if nothing else gradient(mine, clock, key) for key in keys]
                asked = [worker.push(key.number, g, clock) for key, g in zip(keys, given)]
                clock = max([clock + 1] + [worker.wait(n).clock for n in asked if how.startswith("backup")])
                worker.wait(*asked, *[worker.pull(key.number, v, clock) for key, v in zip(keys, values)])
            worker.barrier()
            worker.wait(*[worker.pull(key.number, v, 0) for key, v in zip(keys, values)])
            self.heads[comm.rank], self.pulled[comm.rank] = worker.heads, values
            return "done"

        def program(comm: Communicator) -> Any:
            comm.timeout = 30.0
            stretches = [Stretch("long", SIZES[0], "f8"), Stretch("short", SIZES[1], "f4")] * servers
            with suppress(Expelled, RunOver):
                return by_hand(
                    comm, work, stretches, servers, how, copies, update=in_order, seen=self.seen, deadline=DEADLINE
                )

        first = servers + (copies > 0)
        self.simulation = simulate(program, first + workers, network=network, faults=faults, seed=seed)
        self.served: Served = self.simulation.results[0]
        assert self.served.report is not None
        self.values = self.served.values
        self.deaths = [event.rank for event in self.served.report.deaths]
        assert self.simulation.results[first:] == ["done"] * workers

    def check_copies(self) -> None:
        """All living servers of a chain have the same bits, and know the same."""
        for key, final in enumerate(self.values):
            shard = key // 2
            chain = [(shard + i) % self.servers + 1 for i in range(self.copies + 1)]
            stores = [self.seen[rank].stores[key] for rank in chain if rank not in self.deaths]
            assert stores
            for store in stores:
                assert_array_equal(store.data, final)
                assert store.seen == stores[0].seen
                assert store.version == stores[0].version
                assert store.clock == stores[0].clock
        for rank, server in self.seen.items():
            if rank not in self.deaths:
                assert not any(log for chain in server.chains.values() for log in chain.log.values())
        for pulled in self.pulled.values():  # after they had met: nobody pushed any more
            for mine, theirs in zip(pulled, self.values):
                assert_array_equal(mine, theirs)


HOW = ["bsp", "async", "ssp:1", "backup:1", "async-scaled", "async-dc:0.1"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("servers", "copies"), [(2, 1), (3, 1), (3, 2), (4, 2)])
def test_all_copies_have_the_same_bits(how: str, servers: int, copies: int) -> None:
    for seed, network in enumerate((None, PLAIN, Network(alpha=1e-3, beta=1e-6, sends="rendezvous"))):
        run = Run(how, servers=servers, copies=copies, network=network, seed=seed)
        assert run.deaths == []
        run.check_copies()
        for server in run.seen.values():
            assert len(server.stores) == 2 * (copies + 1)


def test_copies_do_not_change_what_bsp_computes() -> None:
    whole = [run.values for run in (Run("bsp", copies=0, servers=1), Run("bsp"), Run("bsp", servers=3, copies=2))]
    for values in whole[1:]:
        for mine, theirs in zip(whole[0], values):
            assert_array_equal(mine, theirs)
    expected, key = np.zeros(SIZES[0]), Run("bsp").seen[1].layout.keys[0]
    for clock in range(4):
        expected = 0.875 * expected + np.mean([gradient(worker, clock, key) for worker in range(3)], axis=0)
    assert_allclose(whole[1][0], expected, rtol=1e-12, atol=1e-12)


# -- a server dies at any message -------------------------------------------------------------------------------------


def at_the_end(error: WorkerLost) -> bool:
    """Whether a server died when all workers had left: for that, there is a test at the end of this file."""
    return "last values" in str(error)


@pytest.mark.parametrize("fault", [Kill, Hang])
@pytest.mark.parametrize("victim", [1, 2])
def test_bsp_ends_as_if_nobody_had_died(victim: int, fault: type[Kill] | type[Hang]) -> None:
    whole = Run("bsp", steps=3)
    wrong = []
    for number in range(1, whole.simulation.messages_by_rank[victim] + 1):
        try:
            run = Run("bsp", [fault(victim, message=number)], steps=3)
        except WorkerLost as error:
            assert at_the_end(error)
            continue
        assert run.deaths == [victim]
        same = all((mine == theirs).all() for mine, theirs in zip(run.values, whole.values))
        if not same:
            wrong.append(number)
            continue
        run.check_copies()
        assert all(victim not in heads for heads in run.heads.values() if run.served.report.deaths[0].seconds < 1.1)
    assert not wrong, f"other values, where rank {victim} dies before it sends one of its messages {wrong}"


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("how", ["async", "ssp:1", "backup:1"])
def test_a_server_dies_at_any_message_and_nothing_acknowledged_is_lost(how: str, victim: int) -> None:
    whole = run_marks(5, how, servers=2, copies=1, steps=4)
    for number in range(1, whole.run.messages_by_rank[victim] + 1):
        try:
            outcome = run_marks(5, how, [Kill(victim, message=number)], servers=2, copies=1, steps=4, seed=number)
        except WorkerLost as error:
            assert at_the_end(error)
            continue
        (death,) = outcome.report.deaths
        assert (death.rank, death.role) == (victim, "server")
        assert in_time(outcome, DEADLINE / 4)
        if how != "backup:1":
            assert outcome.all_acknowledged((3, 4), 4), number
            for rank in (3, 4):
                assert all((outcome.applied(key, rank)[:4] == 1).all() for key in range(4)), number


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("how", ["bsp", "async", "backup:1"])
def test_any_place_of_a_chain_of_three_may_die(how: str, victim: int) -> None:
    options = dict(servers=3, copies=2, steps=3, network=None)
    whole = run_marks(7, how, **options)  # type: ignore[arg-type]
    last = whole.run.messages_by_rank[victim]
    for number in range(2, last + 1, 5):
        try:
            outcome = run_marks(7, how, [Kill(victim, message=number)], seed=number, **options)  # type: ignore[arg-type]
        except WorkerLost as error:
            assert at_the_end(error)
            continue
        assert outcome.deaths() in ([victim], [])
        assert how == "backup:1" or outcome.all_acknowledged((4, 5, 6), 3)


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("victim", [1, 2, 3])
def test_servers_may_hear_of_a_death_one_long_after_the_other(late: int, victim: int) -> None:
    # The view that says so comes late to one: the others act on it before.
    whole = Run("bsp", servers=3, copies=2, steps=3)
    for at in np.linspace(0.05, 0.16, 8):
        faults = [Kill(victim, at=float(at)), Delay(0.2, rank=0, dest=late, at=0.5)]
        run = Run("bsp", faults, servers=3, copies=2, steps=3)
        assert run.deaths == [victim]
        run.check_copies()
        for mine, theirs in zip(run.values, whole.values):
            assert_array_equal(mine, theirs)


@pytest.mark.parametrize("how", ["bsp", "async", "ssp:1"])
def test_heads_may_die_one_after_the_other(how: str) -> None:
    for first, second in [(0.07, 1.3), (0.11, 0.9), (0.155, 1.16), (0.12, 0.12)]:
        faults = [Kill(1, at=first), Kill(2, at=second)]
        outcome = run_marks(6, how, faults, servers=3, copies=2, steps=12)
        assert sorted(outcome.deaths()) == [1, 2]
        assert outcome.all_acknowledged((4, 5), 12)
        for rank in (4, 5):
            assert all((outcome.applied(key, rank)[:12] == 1).all() for key in range(6))


@pytest.mark.parametrize("how", ["bsp", "async"])
@pytest.mark.parametrize("faults", [[Kill(1, at=0.1), Kill(2, at=0.12)], [Kill(2, at=0.1), Hang(1, at=1.3)]])
def test_a_shard_whose_copies_have_all_died_ends_the_run(how: str, faults: list[Fault]) -> None:
    with pytest.raises(LostShard, match="shard 0 is lost: all servers that had a copy of it are dead"):
        run_marks(7, how, faults, servers=3, copies=1, steps=40)


@pytest.mark.parametrize("how", ["bsp", "async"])
def test_two_servers_may_die_if_they_are_not_of_one_chain(how: str) -> None:
    outcome = run_marks(8, how, [Kill(1, at=0.1), Kill(3, at=0.1)], servers=4, copies=1, steps=6)
    assert sorted(outcome.deaths()) == [1, 3]
    assert outcome.all_acknowledged((5, 6, 7))


def test_a_server_and_a_worker_die_together() -> None:
    for how in ("async", "ssp:1", "backup:1"):
        for at in np.linspace(0.051, 0.3, 10):
            outcome = run_marks(6, how, [Kill(1, at=float(at)), Kill(4, at=float(at))], servers=2, copies=1)
            assert sorted(outcome.deaths()) == [1, 4]
            assert how == "backup:1" or outcome.all_acknowledged((3, 5))


# -- a server that was taken for dead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bsp", "async", "ssp:1", "backup:1"])
@pytest.mark.parametrize("victim", [1, 2])
def test_a_server_that_wakes_up_changes_nothing_any_more(how: str, victim: int) -> None:
    for number in range(5, 60, 11):
        fault = Hang(victim, message=number, seconds=1.8)
        outcome = run_marks(5, how, [fault], servers=2, copies=1, steps=40, seed=number)
        assert (outcome.deaths(), outcome.run.gone) == ([victim], [])
        assert outcome.run.results[victim] is None
        assert how == "backup:1" or outcome.all_acknowledged((3, 4), 40)


@pytest.mark.parametrize("how", ["bsp", "async"])
def test_a_head_that_serves_on_not_knowing_that_it_is_out_of_it_changes_nothing(how: str) -> None:
    # Its heartbeats come too late. The workers' pushes reach it, and its answers them, until they know.
    for late in (1.5, 2.5):
        faults: list[Fault] = [Delay(late, rank=1, dest=0, at=0.1), Delay(late, rank=0, dest=1, at=0.1)]
        faults.append(Hang(1, at=0.1, seconds=1e-3))  # so that nobody minds what it is sent in the end
        outcome = run_marks(5, how, faults, servers=2, copies=1, steps=70)
        assert outcome.deaths() == [1]
        assert outcome.all_acknowledged((3, 4), 70)


def test_a_server_that_is_cut_off_for_a_while_is_taken_over() -> None:
    for how in ("bsp", "async"):
        for cut in ([1], [1, 3]):
            if how == "bsp" and 3 in cut:
                continue
            outcome = run_marks(6, how, [Partition(cut, at=0.155, seconds=1.9)], servers=2, copies=1, steps=60)
            assert outcome.deaths() == cut
            assert outcome.all_acknowledged({3, 4, 5} - set(cut), 60)


# -- what a new head must know ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["async", "ssp:3", "async-scaled", "async-dc:0.1"])
def test_values_that_a_dead_head_had_given_out_do_not_trouble_the_new_one(how: str) -> None:
    # Worker 3 pushes; what the head passes on to its copy is late. Worker 4 pulls values with that push in them, the
    # head dies, and worker 4 pushes to the new head: which has not seen worker 3's push.
    def work(worker: Worker) -> str:
        comm = worker.comm
        values = np.zeros(3)
        worker.wait(worker.clock(worker.first))
        if comm.rank == 3:
            worker.wait(worker.push(0, np.full(3, 1.0), 0))
        else:
            comm.elapse(0.2)
            worker.wait(worker.pull(0, values, 0))  # before the head dies
            comm.elapse(0.2)
            worker.wait(worker.push(0, np.full(3, 10.0), 0))
        worker.barrier()
        return "done"

    def program(comm: Communicator) -> Any:
        with suppress(Expelled, RunOver):
            return by_hand(comm, work, [Stretch("all", 3, "f8")] * 2, 2, how, 1, deadline=DEADLINE)

    for seed, late in enumerate((3, 4, 3, 4)):  # who hears later of the new head
        faults = [Delay(5.0, rank=1, dest=2), Kill(1, at=0.3), Delay(0.5, rank=0, dest=late, at=0.5)]
        run = simulate(program, 5, network=PLAIN, faults=faults, seed=seed)
        assert run.results[3:] == ["done", "done"]
        assert how == "async-dc:0.1" or run.results[0].values[0].tolist() == [11.0] * 3


def test_backup_rounds_that_a_dead_head_had_closed_alone_are_closed_again() -> None:
    # As above: worker 5 is the backup, hears that it is late, and goes on with a round that the new head has not begun.
    for at in np.linspace(0.06, 0.3, 7):
        for late in (3, 4, 5):
            faults = [Delay(5.0, rank=1, dest=2, at=0.04), Kill(1, at=float(at)), Delay(0.2, rank=0, dest=late, at=0.5)]
            outcome = run_marks(6, "backup:1", faults, servers=2, copies=1, seed=late)
            assert outcome.deaths() == [1]


@pytest.mark.parametrize("how", ["bsp", "ssp:0", "ssp:2", "async", "backup:1"])
def test_a_new_head_knows_the_clocks_of_workers_that_pushed_nothing(how: str) -> None:
    # A push of nothing moves a clock; ssp waits for clocks.
    for empty in (lambda worker, clock: worker == 0, lambda worker, clock: True, lambda worker, clock: clock % 2):
        for at in np.linspace(0.06, 0.4, 5):
            run = Run(how, [Kill(1, at=float(at))], steps=8, empty=empty)
            assert run.deaths == [1]
            run.check_copies()


def test_pulls_that_wait_are_answered_by_the_new_head() -> None:
    # Worker 3 waits for values of a clock that worker 4 has not come to when the head dies.
    def work(worker: Worker) -> str:
        comm = worker.comm
        values = np.zeros(3)
        worker.wait(worker.clock(0))
        if comm.rank == 4:
            for _ in range(20):
                comm.elapse(0.1)
                worker.beat()
        worker.wait(worker.push(0, np.full(3, float(comm.rank)), 0))
        worker.wait(worker.pull(0, values, 1))
        assert values.tolist() == [3.5] * 3
        assert worker.heads == [2, 2]
        return "done"

    def program(comm: Communicator) -> Any:
        return by_hand(comm, work, [Stretch("all", 3, "f8")] * 2, 2, "bsp", 1, deadline=DEADLINE)

    run = simulate(program, 5, network=PLAIN, faults=[Kill(1, at=0.3)])
    assert run.results[3:] == ["done", "done"]
    assert [event.rank for event in run.results[0].report.deaths] == [1]


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("fault", [Kill, Hang])
def test_a_server_that_dies_at_the_end_takes_no_values_with_it(fault: type[Kill] | type[Hang], victim: int) -> None:
    whole = Run("bsp", steps=2)
    last = whole.simulation.messages_by_rank[victim]
    for number in range(last - 6, last + 1):
        run = Run("bsp", [fault(victim, message=number)], steps=2)
        assert run.deaths == [victim]
        for mine, theirs in zip(run.values, whole.values):
            assert_array_equal(mine, theirs)
