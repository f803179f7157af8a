"""Pipelines by the clock: play a schedule, given how long things take, and see when each rank does what, and waits.

    >>> timeline = play("1f1b", num_stages=2, num_micro=3)
    >>> print(timeline.picture())
    rank 0  f0 f1 .  .  B0 B0 f2 B1 B1 .  B2 B2
    rank 1  .  f0 B0 B0 f1 B1 B1 f2 B2 B2 .  .
    >>> timeline.seconds, timeline.idle, timeline.bubble
    (12, 0.25, 0.3333333333333333)

There are no ranks and no threads here: what can begin when follows from the actions alone (schedules.py). An action
begins when its rank has ended the one before, and has the message it needs. Integers and Fractions stay exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from ..comm import Deadlock
from .schedules import SCHEDULES, Action, Backward, BackwardInput, BackwardWeight, Forward, Schedule

SENDS = ("buffered", "rendezvous", "blocking")


class Span(NamedTuple):
    """What a rank did from `start` to `end`, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """spans[rank]: what that rank did, in order."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """When the last rank was done."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """The seconds that each rank worked."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def idle(self) -> float:
        """The share of all ranks' time in which they did not work: what GPipe's paper calls the bubble."""
        whole = len(self.spans) * self.seconds
        return (whole - sum(self.busy)) / whole

    @property
    def bubble(self) -> float:
        """What came on top of the ideal time, as a share of that: what Megatron's papers call the bubble.

        Ideal is the time in which the busiest rank works; with equal stages it is anyone's.
        """
        ideal = max(self.busy)
        return (self.seconds - ideal) / ideal

    def picture(self, unit: float | None = None) -> str:
        """A row for each rank, a column for every `unit` seconds (by default the shortest span): see schedules.py.

        A column shows what goes on in its middle.
        """
        every = [span for spans in self.spans for span in spans]
        if unit is None:
            unit = min(span.end - span.start for span in every if span.end > span.start)
        chunks = any(span.action.chunk for span in every)
        rows = []
        for spans in self.spans:
            row = ["."] * ceil(self.seconds / unit - 0.5)
            for action, start, end in spans:
                letter = chr(ord("a") + action.chunk) if chunks else ""
                first, stop = ceil(start / unit - 0.5), ceil(end / unit - 0.5)
                row[first:stop] = [f"{action.letter}{action.micro}{letter}"] * (stop - first)
            rows.append(row)
        width = max(len(cell) for row in rows for cell in row)
        name = len(str(len(rows) - 1))
        lines = (f"rank {rank:{name}}  " + " ".join(f"{cell:{width}}" for cell in row) for rank, row in enumerate(rows))
        return "\n".join(line.rstrip() for line in lines)


def check(actions: Iterable[Action], num_micro: int, num_chunks: int = 1) -> None:
    """Of one rank: each microbatch goes through each chunk forward, then backward, whole or in two parts; all once.

    Errors  ValueError: what is missing, too much, or too early
    """
    todo = [(m, c) for c in range(num_chunks) for m in range(num_micro)]
    done: dict[tuple[int, int], list[type[Action]]] = {passage: [] for passage in todo}
    for action in actions:
        if (action.micro, action.chunk) not in done:
            raise ValueError(f"{action}: there are {num_micro} microbatches and {num_chunks} chunks")
        done[action.micro, action.chunk].append(type(action))
    for (m, c), kinds in done.items():
        if kinds not in ([Forward, Backward], [Forward, BackwardInput, BackwardWeight]):
            names = ", ".join(kind.__name__ for kind in kinds) or "nothing"
            raise ValueError(f"microbatch {m}, chunk {c}: {names}; expected Forward, then Backward or its two parts")


def in_flight(actions: Iterable[Action], until: type[Action] = BackwardWeight) -> int:
    """The most forwards of one rank that wait for their backward at any time; if that is in two parts, `until` this."""
    now = most = 0
    for action in actions:
        now += isinstance(action, Forward) - isinstance(action, (Backward, until))
        most = max(most, now)
    return most


class Message(NamedTuple):
    """What a stage sends for a microbatch: y forward (direction 1), dx backward (-1)."""

    micro: int
    stage: int
    direction: int


class Wait(NamedTuple):
    """A rank goes on when `message` is among `events`."""

    message: Message
    events: dict[Message, float]


def play(
    schedule: str | Schedule,
    num_stages: int,
    num_micro: int,
    num_chunks: int = 1,
    *,
    forward: float | Sequence[float] = 1,
    backward_input: float | Sequence[float] = 1,
    backward_weight: float | Sequence[float] = 1,
    message: float = 0,
    sends: str = "buffered",
) -> Timeline:
    """Let all ranks do their actions, each as soon as it can.

    forward, backward_input, backward_weight
             seconds, alike for all stages or a list for each of num_stages * num_chunks; a Backward takes both
    message  seconds from one rank to another, however many are on their way
    sends    buffered: a message sets off when it is made (isend, with the receive posted before)
             rendezvous: when it is made and wanted (isend, with the receive posted when needed)
             blocking: the same, and its sender stands still until it has arrived (send)
    Errors   ValueError: no such schedule, or one that fails `check`; times negative, all 0, or for too few stages
             Deadlock: no rank can go on, and who waits for whom
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}")
        schedule = SCHEDULES[schedule]
    if sends not in SENDS:
        raise ValueError(f"sends={sends!r}: expected one of {', '.join(SENDS)}")
    if num_stages < 1 or message < 0:
        raise ValueError(f"num_stages={num_stages}, message={message}: expected at least 1, and at least 0 seconds")
    actions = [list(schedule(rank, num_stages, num_micro, num_chunks)) for rank in range(num_stages)]
    for of_rank in actions:
        check(of_rank, num_micro, num_chunks)
    stages = num_stages * num_chunks
    f, b, w = (_of_stages(times, stages) for times in (forward, backward_input, backward_weight))
    if not any((*f, *b, *w)):
        raise ValueError("forward, backward_input and backward_weight are all 0: expected something that takes time")
    seconds = {Forward: f, BackwardInput: b, BackwardWeight: w, Backward: [x + y for x, y in zip(b, w)]}
    return _play(actions, seconds, stages, message, sends)


def _of_stages(times: float | Sequence[float], stages: int) -> list[float]:
    every = list(times) if isinstance(times, Sequence) else [times] * stages
    if len(every) != stages or min(every) < 0:
        raise ValueError(f"{every} for {stages} stages: expected seconds for each, at least 0")
    return every


def _play(
    actions: Sequence[Sequence[Action]], seconds: dict[type[Action], list[float]], stages: int, delay: float, sends: str
) -> Timeline:
    """`play` with actions[rank] and, for each kind of action, its seconds in each stage."""
    ranks = len(actions)
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    made: dict[Message, float] = {}  # when
    wanted: dict[Message, float] = {}  # since when its receiver waits

    def arrival(message: Message) -> float:
        if ranks == 1:
            return made[message]
        return delay + (made[message] if sends == "buffered" else max(made[message], wanted[message]))

    def run(rank: int) -> Iterator[Wait]:
        now: float = 0
        for action in actions[rank]:
            stage, direction = action.chunk * ranks + rank, action.direction
            # 1. Receive. The first stage's forward and the last's backward need nothing.
            if direction and 0 <= stage - direction < stages:
                needed = Message(action.micro, stage - direction, direction)
                wanted[needed] = now
                yield Wait(needed, made)
                now = max(now, arrival(needed))
            # 2. Compute.
            start, now = now, now + seconds[type(action)][stage]
            spans[rank].append(Span(action, start, now))
            # 3. Send. Nobody needs the last stage's forward and the first's backward.
            if direction and 0 <= stage + direction < stages:
                result = Message(action.micro, stage, direction)
                made[result] = now
                if sends == "blocking" and ranks > 1:
                    yield Wait(result, wanted)
                    now = arrival(result)

    # Whoever can go on does, as far as to its next wait. In which order they do changes no times.
    running = {rank: run(rank) for rank in range(ranks)}
    waits: dict[int, Wait] = {}
    while running:
        able = [rank for rank in running if rank not in waits or waits[rank].message in waits[rank].events]
        if not able:
            raise Deadlock("\n".join(["no rank can go on", *(_line(rank, ranks, waits[rank]) for rank in running)]))
        for rank in able:
            wait = next(running[rank], None)
            if wait is None:
                del running[rank]
            else:
                waits[rank] = wait
    return Timeline(tuple(map(tuple, spans)))


def _line(rank: int, ranks: int, wait: Wait) -> str:
    micro, stage, direction = wait.message
    sender, receiver, what = stage % ranks, (stage + direction) % ranks, "y" if direction > 0 else "dx"
    other, verb = (sender, "send") if rank == receiver else (receiver, "receive")
    return f"  rank {rank} waits for rank {other} to {verb} {what} of microbatch {micro}, made by stage {stage}"
