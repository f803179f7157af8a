"""Pipeline schedules: in which order a rank does the forwards and backwards of its microbatches. Data, not messages.

A model is cut into stages, a batch into microbatches. A schedule yields one rank's actions, and that is all it does.
An executor does them (receive, compute, send); `timeline.play` plays them by the clock, without ranks.

    Forward(m)           y of microbatch m, from the x of the stage before (the first: from the data)
    BackwardInput(m)     dx, from the dy of the stage after (the last: from the loss). The stage before waits for it
    BackwardWeight(m)    dw, at any time after that: nobody waits for it
    Backward(m)          both

Rank i of p has v chunks of the model, v > 1 only where the schedule can use them: chunk c is stage c p + i of p v, so
that a microbatch goes round all ranks v times. Further

    m            microbatches
    f, b, w      seconds that Forward, BackwardInput and BackwardWeight take for one chunk
    t            seconds that a message takes
    Seconds      of the whole, for equal stages and t = 0: exact, and written as a function for SCHEDULES
    In flight    forwards whose backward is not done, the most at any time: memory for so many chunks' activations
    Messages     what they add to Seconds for each microbatch while the pipeline is full, if receives are posted early
                 (that it takes longer to fill and to drain comes on top)

The drawings are `timeline.play(...).picture()`, a row for each rank: f3 is the forward of microbatch 3, B3 its backward
(where w is apart, only the input's part, and W3 the weights'); f3b is the forward of the second chunk. A column is
f = b = w; where there are chunks, f = b + w.

Two things hold for all of them. A chunk takes its microbatches in their order, forward and backward: gradients are
summed in one order, whatever the schedule. And what goes one way, forward or backward, from one rank to another is sent
in the order in which the other wants it: a tag for the direction is all that messages need. But nobody may wait for a
send: if sends block, all but naive and gpipe deadlock, and `play(..., sends="blocking")` says how.

A new schedule is a generator and a row of SCHEDULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..collectives import chunk_slice


@dataclass(frozen=True, slots=True)
class Action:
    """What a rank does for one microbatch in one of its chunks.

    direction  stage s needs a message of stage s - direction, and has one for stage s + direction; 0: neither
    """

    micro: int
    chunk: int = 0
    name: ClassVar[str]
    letter: ClassVar[str]
    direction: ClassVar[int]

    def __str__(self) -> str:
        return f"{self.name} {self.micro}" + f", chunk {self.chunk}" * (self.chunk > 0)


class Forward(Action):
    __slots__ = ()
    name, letter, direction = "forward", "f", 1


class Backward(Action):
    __slots__ = ()
    name, letter, direction = "backward", "B", -1


class BackwardInput(Action):
    __slots__ = ()
    name, letter, direction = "backward (inputs)", "B", -1


class BackwardWeight(Action):
    __slots__ = ()
    name, letter, direction = "backward (weights)", "W", 0


Actions = Iterator[Action]


def naive(stage: int, num_stages: int, num_micro: int) -> Actions:
    """One microbatch in the whole pipeline at a time: one rank works, p - 1 wait. What the others improve on.

        rank 0  f0 .  .  .  .  .  .  B0 B0 f1 .  .  .  .  .  .  B1 B1
        rank 1  .  f0 .  .  .  B0 B0 .  .  .  f1 .  .  .  B1 B1 .  .
        rank 2  .  .  f0 B0 B0 .  .  .  .  .  .  f1 B1 B1 .  .  .  .

    Seconds    m p (f + b + w)
    In flight  1
    Messages   2 (p - 1) t
    """
    for m in range(num_micro):
        yield Forward(m)
        yield Backward(m)


def naive_seconds(p: int, m: int, v: int, f: float, b: float, w: float) -> float:
    return m * p * (f + b + w)


def gpipe(stage: int, num_stages: int, num_micro: int) -> Actions:
    """All forwards, then all backwards: ranks wait only while the pipeline fills, turns round and drains.

        rank 0  f0 f1 f2 f3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
        rank 1  .  f0 f1 f2 f3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3 .  .
        rank 2  .  .  f0 f1 f2 f3 B0 B0 B1 B1 B2 B2 B3 B3 .  .  .  .

    Seconds    (m + p - 1)(f + b + w): a share of (p - 1)/(m + p - 1) is waiting
    In flight  m
    Messages   nothing
    Source     Huang et al. 2019, "GPipe: efficient training of giant neural networks using pipeline parallelism".
               There backwards begin with the last microbatch
    """
    # 1. Fill, and go on.
    for m in range(num_micro):
        yield Forward(m)

    # 2. The same way back.
    for m in range(num_micro):
        yield Backward(m)


def one_f_one_b(stage: int, num_stages: int, num_micro: int) -> Actions:
    """Each backward as early as it can be: GPipe's time, but in flight are no more than there are stages to come.

        rank 0  f0 f1 f2 .  .  .  .  B0 B0 f3 B1 B1 .  B2 B2 .  B3 B3
        rank 1  .  f0 f1 .  .  B0 B0 f2 B1 B1 f3 B2 B2 .  B3 B3 .  .
        rank 2  .  .  f0 B0 B0 f1 B1 B1 f2 B2 B2 f3 B3 B3 .  .  .  .

    Seconds    as GPipe
    In flight  min(m, p - i)
    Messages   2 t (p - 1)/p: what is in flight only just keeps p ranks busy, with nothing to do while messages travel
    Source     Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training": PipeDream-flush
    """
    warmup = min(num_stages - stage - 1, num_micro)

    # 1. Warm-up: fill the stages after this one.
    for m in range(warmup):
        yield Forward(m)

    # 2. Steady state: one forward, then the oldest backward.
    #    Invariant: before and after each pair, `warmup` microbatches are in flight.
    for m in range(warmup, num_micro):
        yield Forward(m)
        yield Backward(m - warmup)

    # 3. Cool-down: drain what is still in flight.
    for m in range(num_micro - warmup, num_micro):
        yield Backward(m)


def flush_seconds(p: int, m: int, v: int, f: float, b: float, w: float) -> float:
    return (m + p - 1) * (f + b + w)


def zero_bubble(stage: int, num_stages: int, num_micro: int) -> Actions:
    """1F1B, but no stage waits for another's dw: the weights' work fills up to two thirds of the bubble.

        rank 0  f0 f1 f2 .  .  B0 W0 f3 B1 W1 B2 W2 B3 W3
        rank 1  .  f0 f1 .  B0 f2 B1 W0 f3 B2 W1 B3 W2 W3
        rank 2  .  .  f0 B0 f1 B1 f2 B2 W0 f3 B3 W1 W2 W3

    Rank i does it i microbatches late: so much it has left to do while the last dx is on its way up to rank 0.

    Seconds    (m + p - 1)(f + b) + m w - (min(m, p) - 1) min(f, b, w). For m >= p and w <= f, b that is the paper's
               m (f + b + w) + (p - 1)(f + b - w), of which a share of (p - 1)/(3 m + p - 1) is waiting if f = b = w
    In flight  min(m, p), on any rank what 1F1B has on its first; until BackwardInput only, as 1F1B
    Messages   max(0, 2 t - w)(p - 1)/p
    Source     Qi et al. 2023, "Zero bubble pipeline parallelism": ZB-H1
    """
    warmup = min(num_stages - stage - 1, num_micro)

    # 1. Warm-up, as 1F1B's.
    for m in range(warmup):
        yield Forward(m)

    # 2. Steady state and cool-down, as 1F1B's, with the weights' work `stage` microbatches late.
    #    Invariant: after each round, the weights' work of min(m + 1, stage) microbatches is put off.
    for m in range(num_micro):
        if warmup + m < num_micro:
            yield Forward(warmup + m)
        yield BackwardInput(m)
        if m >= stage:
            yield BackwardWeight(m - stage)

    # 3. What was put off.
    for m in range(max(0, num_micro - stage), num_micro):
        yield BackwardWeight(m)


def zero_bubble_seconds(p: int, m: int, v: int, f: float, b: float, w: float) -> float:
    return (m + p - 1) * (f + b) + m * w - (min(m, p) - 1) * min(f, b, w)


def interleaved(stage: int, num_stages: int, num_micro: int, num_chunks: int) -> Actions:
    """1F1B with v chunks a rank: the pipeline fills in 1/v of the time, for v times the messages.

        rank 0  f0a f1a f0b f1b f2a B0b f3a B1b f2b B0a f3b B1a .   B2b .   B3b B2a B3a
        rank 1  .   f0a f1a f0b B0b f1b B1b f2a B0a f3a B1a f2b B2b f3b B3b B2a B3a .

    Seconds    (max(m, p)(v - 1) + m + p - 1)(f + b + w): for m >= p, waiting is (p - 1)/(v m) of the work
    In flight  min(m v, (v - 1) g + 2 (p - 1 - i) + 1), with g microbatches in the first group: p if p divides m
    Messages   nothing, for t <= min(f, b + w). With v = 1 this is 1F1B with more in flight to that end
    Source     Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using Megatron-LM".
               There p must divide m. Here groups may be longer than p; if m < p the only one is shorter, and ranks wait
    """
    # 1. Groups of p microbatches, or a few more, go through chunk after chunk together: when the last of p has left
    #    a chunk on rank 0, the first is back from rank p - 1 for the next one.
    count = max(1, num_micro // num_stages)
    groups = [range(num_micro)[chunk_slice(num_micro, count, group)] for group in range(count)]
    forwards = [Forward(m, c) for group in groups for c in range(num_chunks) for m in group]
    backwards = [Backward(m, c) for group in groups for c in reversed(range(num_chunks)) for m in group]

    # 2. Warm-up: take the first group to the last chunk, and fill the ranks after this one. Twice as many as there
    #    are of them; once would do, were it not for messages: one microbatch is worked on while another travels.
    warmup = min((num_chunks - 1) * len(groups[0]) + 2 * (num_stages - stage - 1), len(forwards))
    yield from forwards[:warmup]

    # 3. Steady state and cool-down, as 1F1B's.
    for forward, backward in zip(forwards[warmup:], backwards):
        yield forward
        yield backward
    yield from backwards[len(backwards) - warmup :]


def breadth_first(stage: int, num_stages: int, num_micro: int, num_chunks: int) -> Actions:
    """GPipe with v chunks a rank: all microbatches through a chunk, then all through the next.

        rank 0  f0a f1a f2a f3a f0b f1b f2b f3b .   .   B0b B1b B2b B3b B0a B1a B2a B3a
        rank 1  .   f0a f1a f2a f3a f0b f1b f2b f3b B0b B1b B2b B3b B0a B1a B2a B3a .

    If parameters are sharded, each chunk's are gathered twice and their gradients reduced once, not for every group.

    Seconds    as interleaved
    In flight  m v
    Messages   nothing, for t <= min(f, b + w) times (m - p)/p
    Source     Lamy-Poirier 2022, "Breadth-first pipeline parallelism"
    """
    # 1. Forward, chunk by chunk.
    for c in range(num_chunks):
        for m in range(num_micro):
            yield Forward(m, c)

    # 2. The same way back.
    for c in reversed(range(num_chunks)):
        for m in range(num_micro):
            yield Backward(m, c)


def looped_seconds(p: int, m: int, v: int, f: float, b: float, w: float) -> float:
    return (max(m, p) * (v - 1) + m + p - 1) * (f + b + w)


@dataclass(frozen=True)
class Schedule:
    """A row of the table, to be called for a rank's actions.

    seconds  of p, m, v, f, b, w: see above
    chunks   whether it can use several chunks a rank
    splits   whether it has BackwardInput and BackwardWeight where others have Backward
    """

    name: str
    actions: Callable[..., Actions]
    seconds: Callable[[int, int, int, float, float, float], float]
    chunks: bool = False
    splits: bool = False

    def __call__(self, stage: int, num_stages: int, num_micro: int, num_chunks: int = 1) -> Actions:
        """The actions of rank `stage`, of as many ranks as there are stages, or stages per chunk.

        Errors  ValueError: no such rank; nothing to do; chunks where the schedule can use but one
        """
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage={stage}, num_stages={num_stages}: expected 0 <= stage < num_stages")
        if num_micro < 1 or num_chunks < 1:
            raise ValueError(f"num_micro={num_micro}, num_chunks={num_chunks}: expected at least 1 of both")
        if num_chunks > 1 and not self.chunks:
            able = ", ".join(schedule.name for schedule in SCHEDULES.values() if schedule.chunks)
            raise ValueError(f"num_chunks={num_chunks}: {self.name} has one chunk a rank; several have {able}")
        chunks = (num_chunks,) if self.chunks else ()
        return self.actions(stage, num_stages, num_micro, *chunks)

    def idle(self, p: int, m: int, v: int = 1, f: float = 1, b: float = 1, w: float = 1) -> float:
        """The share of Seconds in which ranks wait."""
        seconds = self.seconds(p, m, v, f, b, w)
        return (seconds - m * v * (f + b + w)) / seconds


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("naive", naive, naive_seconds),
        Schedule("gpipe", gpipe, flush_seconds),
        Schedule("1f1b", one_f_one_b, flush_seconds),
        Schedule("zero-bubble", zero_bubble, zero_bubble_seconds, splits=True),
        Schedule("interleaved", interleaved, looped_seconds, chunks=True),
        Schedule("breadth-first", breadth_first, looped_seconds, chunks=True),
    )
}
