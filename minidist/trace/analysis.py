"""What a trace tells: where each rank's time went, who sent how much to whom, and what took the time.

At every moment of a training step a rank does one of four things, so that they add up to the step's length exactly:

    compute   the program runs (the engine, or Python around it), and nothing of this rank is on its way
    hidden    the program runs, and meanwhile a message or a collective of this rank is on its way
    exposed   the program waits for communication, or does nothing but communicate
    idle      it waits, and communication is not to blame, for another rank has not come so far

A program waits where the trace says so (rows "W"), and in blocking operations: those in which no computing begins or
ends; and at the end of any other one, when its last computing is done and it still is not. (What outlasts the step in
which it was called, as a bucket's all-reduce does, doesn't block, whatever lies in it.) What it waits for may be late
for two reasons, two of the wait states of Scalasca, and so long a wait is idle:

    late sender   the message that comes next to this rank has not been sent yet. (The next to arrive, of several that
                  it may have asked for; if it computes again before it asks, it has waited for something else.)
    wait at NxN   a rank of the group has not called the collective yet. Collectives with a root are not meant: there
                  nobody needs everybody, and late senders tell who was late

On its way is a collective that is not blocking, from its call to its end; a message that this rank has sent, until it
is done with it or the receiver has it; and one to this rank, from when it has been sent and is wanted to when it is
there.

Source  Geimer, Wolf, Wylie, Ábrahám, Becker & Mohr 2010, "The Scalasca performance toolset architecture"
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .intervals import Intervals
from .tables import MESSAGES, NONE, Messages, Rank, Trace, span_of

NEVER = 2**63
PARTS = ("compute", "hidden", "exposed", "idle")


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Of one rank: nanoseconds of each part in each training step, arrays as long as there are steps.

    step      the steps' numbers          start, end   when they were
    compute, hidden, exposed, idle        see above; their sum is end - start
    whole     the same four of all the rank's time, steps and what is between them
    """

    step: np.ndarray
    start: np.ndarray
    end: np.ndarray
    compute: np.ndarray
    hidden: np.ndarray
    exposed: np.ndarray
    idle: np.ndarray
    whole: dict[str, int]


def breakdown(trace: Trace) -> list[Breakdown]:
    """Of every rank, where its time went."""
    return [_of_rank(rank, parts) for rank, parts in zip(trace.ranks, parts_of(trace))]


def parts_of(trace: Trace) -> list[dict[str, Intervals]]:
    """For every rank the exact stretches of its time that are "hidden", "exposed" and "idle"; the rest is computing."""
    late = _late_arrivals(trace)
    return [_parts(rank, late[rank.number], trace.messages) for rank in trace.ranks]


def _of_rank(rank: Rank, parts: dict[str, Intervals]) -> Breakdown:
    start, end = rank.steps.start, rank.steps.end
    inside = {name: stretches.within(start, end) for name, stretches in parts.items()}
    whole = {name: stretches.total for name, stretches in parts.items()}
    first, last = span_of(rank.times())
    return Breakdown(
        rank.steps.number,
        start,
        end,
        compute=end - start - sum(inside.values()),
        whole={"compute": last - first - sum(whole.values()), **whole},
        **inside,
    )


def _parts(rank: Rank, late: Intervals, messages: Messages) -> dict[str, Intervals]:
    first, last = span_of(rank.times())
    operations, computing = rank.operations, rank.computing
    ends = np.where(operations.end == NONE, last, operations.end)

    # 1. Where the program waits. An operation in which no computing begins or ends blocks; so does the end of any other
    #    one, after the last such edge. (Messages inside of computing don't: that is there to hide them.)
    edges = np.sort(np.concatenate([computing.start, computing.end]))
    before_end = np.searchsorted(edges, ends, "left")
    background = (before_end > np.searchsorted(edges, operations.start, "right")) | _outlasts_its_step(rank, ends)
    last_edge = edges[np.maximum(before_end - 1, 0)] if len(edges) else operations.start
    alone = np.where(background, np.maximum(last_edge, operations.start), operations.start)
    message = np.array([kind in MESSAGES for kind in operations.kind], bool)
    whole = ~background & ~message
    computes = Intervals(computing.start, computing.end)
    waiting = (
        Intervals(rank.waits.start, rank.waits.end)
        | Intervals(operations.start[whole], ends[whole])
        | (Intervals(alone[~whole], ends[~whole]) - computes)
    )

    # 2. Of that, idle: what was waited for had not been sent, or not everybody had come.
    to_me = messages.receiver == rank.number
    idle = waiting & (
        late | _late_senders(messages.sent[to_me], messages.posted[to_me], messages.arrived[to_me], edges)
    )

    # 3. While the program runs: is something on its way?
    background &= ~message
    from_me = messages.sender == rank.number
    going = (
        Intervals(operations.start[background], ends[background])
        | Intervals(messages.sent[from_me], np.minimum(messages.sent_end, messages.arrived)[from_me])
        | Intervals(np.maximum(messages.sent, messages.posted)[to_me], messages.arrived[to_me])
    )
    going &= Intervals([first], [last])  # what this rank has sent may arrive when it has no more to tell
    return {"hidden": going - waiting, "exposed": waiting - idle, "idle": idle}


def _outlasts_its_step(rank: Rank, ends: np.ndarray) -> np.ndarray:
    """For each operation whether the numbered step in which it was called was over before it was."""
    steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for label, _, start, end in sorted(rank.labels, key=lambda row: row[2]):
        steps[label].append((start, end))
    found = np.zeros(len(ends), bool)
    for i, (label, start) in enumerate(zip(rank.operations.label, rank.operations.start.tolist())):
        last = bisect_right(steps[label], (start, NEVER)) - 1 if label in steps else -1
        found[i] = last >= 0 and start <= steps[label][last][1] < ends[i]
    return found


def _late_senders(sent: np.ndarray, posted: np.ndarray, arrived: np.ndarray, edges: np.ndarray) -> Intervals:
    """The time in which the message to this rank that comes next had not been sent.

    It comes next from the arrival of the one before to its own; but if computing began or ended in that time before the
    rank asked for it (edges, ordered), from there.
    """
    if not len(sent):
        return Intervals()
    order = np.argsort(arrived, kind="stable")
    sent, posted, arrived = sent[order], posted[order], arrived[order]
    before = np.concatenate([[NONE], arrived[:-1]])
    since = np.concatenate([[NONE], edges])[np.searchsorted(edges, posted, "right")]
    return Intervals(np.maximum(before, since), np.minimum(sent, arrived))


def _late_arrivals(trace: Trace) -> list[Intervals]:
    """Of every rank, the time between its calls of collectives and those of the last rank of each."""
    early: list[list[tuple[int, int]]] = [[] for _ in trace.ranks]
    for collective in trace.collectives:
        for member, i in collective.calls.items():
            operations = trace.ranks[member].operations
            if operations.peer[i] == NONE and collective.complete:
                early[member].append((int(operations.start[i]), collective.entered))
    return [Intervals(*zip(*pairs)) if pairs else Intervals() for pairs in early]


@dataclass(frozen=True, eq=False)
class Traffic:
    """bytes[a, b], messages[a, b]: what rank a has sent to rank b over the wire, inside of collectives too."""

    bytes: np.ndarray
    messages: np.ndarray


def traffic(trace: Trace) -> Traffic:
    """Who sent how much to whom. What travels through shared memory or MPI's own collectives is no message of ours."""
    size = len(trace.ranks)
    nbytes, count = np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
    for rank in trace.ranks:
        sent = np.array([direction == "s" for direction in rank.wire.direction], bool)
        np.add.at(nbytes[rank.number], rank.wire.peer[sent], rank.wire.nbytes[sent])
        np.add.at(count[rank.number], rank.wire.peer[sent], 1)
    return Traffic(nbytes, count)


def time_by_label(trace: Trace) -> dict[str, list[int]]:
    """Nanoseconds that each rank spent in the steps of each label: "D.3(4)", with all that the step consists of.

    Labels come in their order in the document.
    """
    per_label: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for rank in trace.ranks:
        for label, _, start, end in rank.labels:
            per_label[label.split(" ", 1)[0]][rank.number].append((start, end))
    return {
        label: [Intervals(*zip(*spans[n])).total if spans.get(n) else 0 for n in range(len(trace.ranks))]
        for label, spans in sorted(per_label.items())
    }


def time_by_layer(trace: Trace) -> dict[tuple[str, str], list[int]]:
    """Nanoseconds that each rank computed in each (layer, kind), without what lies in layers inside of it.

    In the order of the first rank's first step; layer is "" for what is outside of any.
    """
    times: dict[tuple[str, str], list[int]] = {}
    for rank in trace.ranks:
        for key, nanoseconds in own_times(rank.computing):
            times.setdefault(key, [0] * len(trace.ranks))[rank.number] += nanoseconds
    return times


def own_times(computing: Iterable[tuple[str, str, str, int, int]]) -> Iterable[tuple[tuple[str, str], int]]:
    """(layer, kind) and the nanoseconds of each span, less those of the spans that lie directly in it."""
    open_spans: list[tuple[tuple[str, str], int, list[int]]] = []  # key, end, [own nanoseconds]
    for kind, layer, _, start, end in sorted(computing, key=lambda span: (span[3], -span[4])):
        while open_spans and open_spans[-1][1] <= start:
            key, _, own = open_spans.pop()
            yield key, own[0]
        if open_spans:
            open_spans[-1][2][0] -= end - start
        open_spans.append(((layer, kind), end, [end - start]))
    for key, _, own in reversed(open_spans):
        yield key, own[0]


def memory(trace: Trace) -> dict[str, list[int]]:
    """The most bytes of each kind that each rank has said it used: "parameters", "gradients", "optimizer", …"""
    peaks: dict[str, list[int]] = {}
    for rank in trace.ranks:
        for name, value, _ in rank.values:
            if name.startswith("memory "):
                peak = peaks.setdefault(name.removeprefix("memory "), [0] * len(trace.ranks))
                peak[rank.number] = max(peak[rank.number], int(value))
    return peaks
