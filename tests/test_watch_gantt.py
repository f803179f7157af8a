"""Schedules and parameter servers that are watched, beside their actions, their bounds and the server's own report."""

from collections import Counter

import pytest

from minidist.parallel import timeline
from minidist.parallel.schedules import SCHEDULES, Backward, BackwardInput, BackwardWeight, Forward
from minidist.watch import watch

SHAPES = [(1, 1), (2, 3), (4, 8), (4, 2)]  # ranks, microbatches
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


# -- schedules --------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("ranks, microbatches", SHAPES)
def test_what_ranks_do_are_the_actions_of_the_schedule(name, ranks, microbatches):
    film = watch(name, ranks, microbatches=microbatches)
    for rank in range(ranks):
        done = [frame.state[rank].action for frame in film.frames]
        once = [a for before, a in zip([None, *done], done) if a is not None and a is not before]
        assert once == list(SCHEDULES[name](rank, ranks, microbatches, film.chunks))
        most = timeline.in_flight(SCHEDULES[name](rank, ranks, microbatches, film.chunks))
        assert max(frame.in_flight[rank] for frame in film.frames) == most
    assert film.chunks == (2 if SCHEDULES[name].chunks else 1)


@every_schedule
@pytest.mark.parametrize("message", [0, 0.5])
def test_nothing_begins_before_what_it_needs(name, message):
    ranks, microbatches = 4, 6
    film = watch(name, ranks, microbatches=microbatches, message=message)
    begun = {}  # (stage, micro, kind): when
    for frame in film.frames:
        for rank, doing in enumerate(frame.state):
            if doing.action is not None:
                kind = Backward if isinstance(doing.action, BackwardInput) else type(doing.action)
                stage = doing.action.chunk * ranks + rank
                begun.setdefault((stage, doing.action.micro, kind), frame.time)
    stages = ranks * film.chunks
    backward = 1 if SCHEDULES[name].splits else 2
    for (stage, micro, kind), time in begun.items():
        if kind is Forward and stage:
            assert time >= begun[stage - 1, micro, Forward] + 1 + message
        if kind is Backward and stage < stages - 1:
            assert time >= begun[stage + 1, micro, Backward] + backward + message
        if kind is BackwardWeight:
            assert time >= begun[stage, micro, Backward] + 1
    # The messages are those between neighbouring stages, each there and back.
    arrived = [move for frame in film.frames for move in frame.moves]
    assert len(arrived) == 2 * (stages - 1) * microbatches
    assert all(move.time == move.sent + message for move in arrived)


def test_a_rank_that_waits_says_for_whom():
    film = watch("1f1b", ranks=3, microbatches=4)
    second = film.frames[1]  # from second 1 on: rank 0 does its second forward, rank 1 its first
    assert second.state[0].action == Forward(1) and second.state[1].action == Forward(0)
    needs = second.state[2].needs
    assert (needs.source, needs.what, needs.micro, needs.time) == (1, "y", 0, 2)
    assert "rank 2 waits for rank 1: the activation of microbatch 0" in film.text(1)
    assert film.frames[-1].state[0] == (None, None) and film.seconds == 18
    assert "18 s, of which ranks wait 33%; most in flight 3, 2, 1" in film.summary()
    chart = [line[10:28].rstrip() for line in film.text(3).splitlines()[2:5]]
    assert chart == ["f0 f1 f2", "   f0 f1", "      f0 B0───"]


# -- parameter servers ------------------------------------------------------------------------------------------------

MODES = ["bsp", "backup:1", "ssp:0", "ssp:1", "ssp:3", "async", "async-scaled", "async-dc:0.04"]


@pytest.mark.parametrize("name", MODES)
def test_what_was_seen_is_what_the_server_reports(name):
    film = watch(name, ranks=4)
    pushes = film.log.pushes
    taken = [push for push in pushes if push.taken]
    assert len(pushes) - len(taken) == film.report.dropped
    assert Counter(push.staleness for push in taken) == film.report.staleness
    assert {c.worker for c in film.log.computing} == {1, 2, 3} == set(film.report.samples)
    assert film.report.samples == Counter(c.worker for c in film.log.computing)
    assert film.frames[-1].version == film.log.updates[-1].version == len(film.log.updates)
    assert [push for frame in film.frames for push in frame.moves] == pushes
    assert all(push.sent < push.time for push in pushes)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_is_further_ahead_than_the_bound(bound):
    film = watch(f"ssp:{bound}", ranks=4, steps=6)
    ahead = []
    for frame in film.frames:
        slowest = min(worker.clock for worker in frame.state)
        ahead += [worker.clock - slowest for worker in frame.state if worker.doing == "computes"]
    assert max(ahead) == bound  # and the straggler lets them come to it
    for hold, until in film.waits():
        assert hold.worker not in hold.waits_for and (bound == 0 or hold.waits_for == (3,))
        assert until > hold.time


def test_a_round_closes_when_all_have_pushed_and_backups_are_not_waited_for():
    bsp = watch("bsp", ranks=4)
    assert [update.workers for update in bsp.log.updates] == [(1, 2, 3)] * 5
    assert not any(push.staleness for push in bsp.log.pushes)
    backup = watch("backup:1", ranks=4)
    assert [update.workers for update in backup.log.updates] == [(1, 2)] * 5
    assert [push.source for push in backup.log.pushes if not push.taken] == [3, 3]
    assert backup.seconds < bsp.seconds / 2
    assert "rank 3's gradient of step 0 comes, taken at version 0: too late" in "\n".join(
        backup.text(i) for i in range(len(backup))
    )


def test_async_waits_for_nobody_and_pays_in_staleness():
    film = watch("async", ranks=4)
    assert not film.log.holds and not any(w.doing == "waits" for frame in film.frames for w in frame.state)
    stale = {worker: [p.staleness for p in film.log.pushes if p.source == worker] for worker in (1, 2, 3)}
    assert min(stale[3]) > max(stale[1])  # the straggler's are the oldest
    assert len(stale[1]) > len(stale[3])  # and the fast ones do more


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("1f1b", {"ranks": 0}, "ranks=0"),
        ("1f1b", {"chunks": 2}, "1f1b has one chunk a rank"),
        ("gpipe", {"microbatches": 0}, "num_micro=0"),
        ("ssp:3", {"ranks": 1}, "ranks=1: expected a server and at least a worker"),
        ("backup:3", {"ranks": 4}, "backup:3 with 3 workers"),
        ("bsp", {"steps": 0}, "steps=0"),
        ("ssp", {}, "consistency 'ssp': choose"),
        ("ssp:-1", {}, "consistency 'ssp:-1': choose"),
        ("2f2b", {}, "did you mean '1f1b'?"),
        ("asinc", {}, "'async'"),
    ],
)
def test_what_cannot_be_watched_is_refused(name, options, why):
    with pytest.raises(ValueError) as error:
        watch(name, **options)
    assert why in str(error.value)


def test_naive_is_the_schedule_and_may_be_said_to_be():
    assert watch("naive", 2).title == watch("pipeline naive", 2).title == "naive, 2 ranks, 4 microbatches"
    assert watch("all_reduce naive", 2).title == "all_reduce naive, 2 ranks"
