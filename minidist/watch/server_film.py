"""A parameter server's film: what each worker computes and whom it waits for, and the versions of the values."""

from __future__ import annotations

from typing import NamedTuple

from ..parallel.parameter_server.consistency import consistency_of
from .gantt import Arrow, Bar, GanttFilm
from .server import MOST_RANKS, Answer, Computing, Hold, Push, Update, train
from .words import amount, listed


class Worker(NamedTuple):
    """A worker at a moment.

    clock      steps that it has done; version  of the values that it has
    doing      "computes", "waits" (for the slowest, waits_for), "talks" (messages are on their way), "done"
    """

    rank: int
    clock: int
    version: int
    doing: str
    waits_for: tuple[int, ...]


class Frame(NamedTuple):
    """A moment: what has come to the server just then, and how everyone stands. state[0] is worker rank 1."""

    time: float
    moves: tuple[Push, ...]
    updates: tuple[Update, ...]
    answers: tuple[Answer, ...]
    holds: tuple[Hold, ...]
    begins: tuple[Computing, ...]
    version: int
    state: tuple[Worker, ...]


class ServerFilm(GanttFilm):
    """frames[i].state[k] is worker k + 1; `log` has what was seen, `report` the server's own report."""

    frames: list[Frame]

    def __init__(self, name: str, ranks: int = 4, steps: int = 5, straggler: float = 3.0, alpha: float = 0.1):
        """`straggler`: how many times slower the last worker is. alpha  seconds that a message takes

        Errors  ValueError: no worker; numbers out of their range; too few workers for the consistency
        """
        if not 2 <= ranks <= MOST_RANKS:
            raise ValueError(f"ranks={ranks}: expected a server and at least a worker, and at most {MOST_RANKS} ranks")
        if steps < 1 or not 1 <= straggler <= 100 or not 0 < alpha <= 10:
            raise ValueError(
                f"steps={steps}, straggler={straggler}, alpha={alpha}: expected at least 1 step, 1 to 100 times, "
                "and more than 0 to 10 seconds"
            )
        consistency_of(name).begin(ranks - 1)
        self.name, self.ranks = name, ranks
        self.log, self.run = train(name, ranks, steps, straggler, alpha)
        self.report = self.log.report
        slow = f", straggler rank {ranks - 1} ({straggler:g}×)" if straggler > 1 else ""
        self.title = f"{name}, {amount(ranks - 1, 'worker')}{slow}"
        log = self.log
        self.seconds = max([c.end for c in log.computing] + [push.time for push in log.pushes])
        self.unit = min(c.end - c.start for c in log.computing)
        self.frames = self._frames()
        self.bars, self.arrows = self._bars_of(), self._arrows_of()
        self.keys = [("forward", "computes"), ("wait", "waits for others"), ("cell", "values")]
        kinds = {arrow.kind for arrow in self.arrows}
        arrows = (("weight", "fresh push"), ("backward", "stale push, +updates"), ("late", "too late"))
        self.keys += [(kind, words) for kind, words in arrows if kind in kinds]

    # -- what happened --------------------------------------------------------------------------------------------

    def _frames(self) -> list[Frame]:
        log = self.log
        times = {0.0, self.seconds}
        times |= {event.time for events in (log.pushes, log.updates, log.answers, log.holds) for event in events}
        times |= {c.start for c in log.computing} | {c.end for c in log.computing}
        return [self._frame_at(time) for time in sorted(time for time in times if time <= self.seconds)]

    def _frame_at(self, now: float) -> Frame:
        log = self.log
        version = max((update.version for update in log.updates if update.time <= now), default=0)
        return Frame(
            now,
            tuple(push for push in log.pushes if push.time == now),
            tuple(update for update in log.updates if update.time == now),
            tuple(answer for answer in log.answers if answer.time == now),
            tuple(hold for hold in log.holds if hold.time == now),
            tuple(c for c in log.computing if c.start == now),
            version,
            tuple(self._worker_at(rank, now) for rank in range(1, self.ranks)),
        )

    def _worker_at(self, rank: int, now: float) -> Worker:
        mine = [c for c in self.log.computing if c.worker == rank]
        done = [c for c in mine if c.end <= now]
        began = [c for c in mine if c.start <= now]
        clock = done[-1].clock + 1 if done else 0
        version = began[-1].version if began else 0
        if began and now < began[-1].end:
            return Worker(rank, began[-1].clock, version, "computes", ())
        if began and len(began) == len(mine):
            return Worker(rank, clock, version, "done", ())
        for hold, until in self.waits():
            if hold.worker == rank and hold.time <= now < until:
                return Worker(rank, clock, version, "waits", hold.waits_for)
        return Worker(rank, clock, version, "talks", ())

    def waits(self) -> list[tuple[Hold, float]]:
        """Each time that the server made a worker wait, and until when."""
        found = []
        for hold in self.log.holds:
            ends = [a.time for a in self.log.answers if a.dest == hold.worker and a.time >= hold.time]
            ends += [u.time for u in self.log.updates if hold.worker in u.workers and u.time > hold.time]
            found.append((hold, min([*ends, self.seconds])))
        return found

    # -- how it looks ---------------------------------------------------------------------------------------------

    def _bars_of(self) -> list[Bar]:
        bars = [
            Bar(c.worker, c.start, c.end, "forward", f"step {c.clock}", str(c.clock), c.worker == self.ranks - 1)
            for c in self.log.computing
        ]
        for hold, until in self.waits():
            if until > hold.time:
                bars.append(Bar(hold.worker, hold.time, until, "wait", f"for {_ranks(hold.waits_for)}", ""))
        starts = [(0.0, 0)] + [(update.time, update.version) for update in self.log.updates]
        latest = dict(starts)  # of several at one time the last
        times = [*latest, self.seconds]
        for (start, version), end in zip(latest.items(), times[1:]):
            if end > start:
                bars.append(Bar(0, start, end, "cell", f"v{version}", str(version)))
        return bars

    def _arrows_of(self) -> list[Arrow]:
        arrows = []
        for push in self.log.pushes:
            kind = "late" if not push.taken else "backward" if push.staleness else "weight"
            label = "dropped" if not push.taken else f"+{push.staleness}" if push.staleness else ""
            arrows.append(Arrow(push.source, 0, push.sent, push.time, kind, label, stays=True))
        for answer in self.log.answers:
            begins = [c.start for c in self.log.computing if c.worker == answer.dest and c.start >= answer.time]
            if begins:
                arrows.append(Arrow(0, answer.dest, answer.time, min(begins), "accent"))
        return arrows

    def rows(self) -> list[str]:
        return ["server", *(f"rank {rank}" for rank in range(1, self.ranks))]

    def notes(self, i: int) -> list[str]:
        frame = self.frames[i]
        return [f"version {frame.version}", *(f"{w.clock} done" for w in frame.state)]

    def lines(self, i: int) -> list[str]:
        """What has just happened; in the last frame, what came of it."""
        frame = self.frames[i]
        lines = [self._of_push(push) for push in frame.moves]
        for update in frame.updates:
            lines.append(f"version {update.version} of the values is made, of the work of {_ranks(update.workers)}")
        for hold in frame.holds:
            lines.append(
                f"rank {hold.worker} may not go on with step {hold.clock} yet: it waits for {_ranks(hold.waits_for)}"
            )
        for answer in frame.answers:
            held = any((h.worker, h.clock) == (answer.dest, answer.clock) for h in self.log.holds)
            now = "may go on now" if held else "is answered"
            lines.append(f"rank {answer.dest} {now}: it gets version {answer.version} for step {answer.clock}")
        for c in frame.begins:
            lines.append(f"rank {c.worker} begins step {c.clock} with version {c.version}")
        if i % len(self.frames) == len(self.frames) - 1:
            return [*lines, self.summary()]
        return lines or ["messages are on their way"]

    def _of_push(self, push: Push) -> str:
        it = f"rank {push.source}'s gradient of step {push.clock} comes, taken at version {push.taken_at}"
        if not push.taken:
            return f"{it}: too late, its round is closed, and it is dropped"
        late = f"{amount(push.staleness, 'update')} old" if push.staleness else "up to date"
        return f"{it}, now {late}"

    def summary(self) -> str:
        waited = sum(until - hold.time for hold, until in self.waits())
        stale = [push.staleness for push in self.log.pushes if push.taken]
        dropped = len(self.log.pushes) - len(stale)
        lost = f", {dropped} dropped" if dropped else ""
        return (
            f"{self.title}: {amount(len(self.log.computing), 'step')} in {self.seconds:.3g} s{lost}; workers waited "
            f"{waited:.3g} s for others; gradients were {sum(stale) / len(stale):.2g} updates old in the mean, "
            f"{max(stale)} at most."
        )


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {listed(ranks)}"
