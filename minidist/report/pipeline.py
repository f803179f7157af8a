"""A pipeline's schedule as it was played in one training step, and its ideal: the same work, and messages for free."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ..parallel import schedules
from ..parallel.timeline import play
from ..trace.tables import MESSAGES, Rank, Trace

Object = dict[str, Any]


def pipeline(trace: Trace) -> Object | None:
    """The step of median length: what every stage did in it, and what the schedule would have come to.

    played, ideal   for each stage: [kind, microbatch, chunk, start, length], nanoseconds since the first began
    idle            the share of all ranks' time in which they did not work: as played, and ideally
    formula         the same by the schedule's formula, for equal stages
    None: no pipeline.
    """
    schedule = trace.header.get("schedule")
    stages = _stages(trace, schedule)
    if not schedule or len(stages) < 2:
        return None
    steps = min(len(rank.steps) for rank in stages)
    if not steps:
        return None
    lengths = stages[0].steps.end[:steps] - stages[0].steps.start[:steps]
    step = int(np.argsort(lengths, kind="stable")[steps // 2])
    rows = [_actions_of(rank, step) for rank in stages]
    if not all(rows):
        return None
    zero = min(row[3] for actions in rows for row in actions)
    played = [[(kind, m, c, start - zero, length) for kind, m, c, start, length in actions] for actions in rows]
    found: Object = {
        "name": str(schedule.get("name", "?")),
        "step": int(stages[0].steps.number[step]),
        "ranks": [rank.number for rank in stages],
        "played": played,
        "idle": _idle(played),
    }
    return {**found, **_ideal(played, schedule)}


def _stages(trace: Trace, schedule: Object | None) -> list[Rank]:
    """The ranks of one pipeline, the first stage's first: rank 0's, of several."""
    if not isinstance(schedule, dict):
        return []
    ranks = [rank for rank in trace.ranks if len(rank.actions)]
    stages = schedule.get("stages", len(ranks))
    if len(ranks) > stages and ranks:
        # Stages send to one another in a group of their own.
        operations = ranks[0].operations
        sending = Counter(group for kind, group in zip(operations.kind, operations.group) if kind in MESSAGES)
        for group, _ in sending.most_common():
            members = ranks[0].groups[group]
            if len(members) == stages:
                return [trace.ranks[member] for member in members]
    return ranks if len(ranks) == stages else []


def _actions_of(rank: Rank, step: int) -> list[tuple[str, int, int, int, int]]:
    """Kind, microbatch, chunk, start of the work, and its length, of one training step."""
    begin, end = int(rank.steps.start[step]), int(rank.steps.end[step])
    return [
        (kind, micro, chunk, ready, done - ready)
        for kind, micro, chunk, start, ready, done in rank.actions
        if begin < done <= end  # its first one may have begun to wait before the step
    ]


def _idle(spans: list[list[tuple[str, int, int, int, int]]]) -> float:
    """The share of the time from the first beginning to the last end in which ranks did not work."""
    whole = max(start + length for row in spans for *_, start, length in row)
    busy = sum(length for row in spans for *_, length in row)
    return 1 - busy / (whole * len(spans)) if whole else 0.0


def _ideal(played: list[list[tuple[str, int, int, int, int]]], schedule: Object) -> Object:
    """The schedule with each stage's median times. Empty if there is no such schedule, or it was not played whole."""
    name, chunks = schedule.get("name"), int(schedule.get("chunks", 1))
    micro = int(schedule.get("microbatches", 0))
    if name not in schedules.SCHEDULES or micro < 1:
        return {}
    ranks = len(played)
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank, row in enumerate(played):
        for kind, _, chunk, _, length in row:
            lengths[kind, chunk * ranks + rank].append(length)
    every = [range(ranks * chunks)]
    f, whole, b, w = (
        [float(np.median(lengths[kind, stage])) if lengths[kind, stage] else 0.0 for stage in every[0]]
        for kind in ("Forward", "Backward", "BackwardInput", "BackwardWeight")
    )
    if not all(f):
        return {}
    # A Backward takes the time of its two parts: all of it stands in the first.
    b = [x + y for x, y in zip(whole, b)]
    ideal = play(name, ranks, micro, chunks, forward=f, backward_input=b, backward_weight=w)
    spans = [
        [
            (
                type(span.action).__name__,
                span.action.micro,
                span.action.chunk,
                round(span.start),
                round(span.end - span.start),
            )
            for span in row
        ]
        for row in ideal.spans
    ]
    splits = schedules.SCHEDULES[name].splits
    mean = [float(np.mean(times)) for times in (f, b, w)]
    if not splits:  # the formulas want both parts, and only their sum counts
        mean[1:] = [mean[1] / 2, mean[1] / 2]
    return {
        "ideal": spans,
        "ideal_idle": ideal.idle,
        "formula": schedules.SCHEDULES[name].idle(ranks, micro, chunks, *mean),
    }
