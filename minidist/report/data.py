"""What the page shows of a trace, as one object of plain lists and numbers: the page only draws.

Times are nanoseconds since the trace began. Columns are as columns.py says, and `TIMELINE` names them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..trace.analysis import PARTS, Breakdown, breakdown, memory, parts_of, time_by_label, time_by_layer, traffic
from ..trace.tables import NONE, Rank, Trace, span_of
from .columns import Codes, differences, spans
from .pipeline import pipeline

Object = dict[str, Any]


def data(trace: Trace) -> Object:
    """All of it. A section of which the trace knows nothing is None or empty."""
    zero, end = trace.span
    parts = breakdown(trace)
    return {
        "command": str(trace.header.get("program") or "a run"),
        "facts": facts(trace),
        "notes": trace.notes,
        "nanoseconds": end - zero,
        "ranks": [rank.number for rank in trace.ranks],
        "numbers": numbers(trace, parts),
        "curves": curves(trace, zero),
        "timeline": timeline(trace, zero),
        "breakdown": [steps_of(each) for each in parts],
        "labels": labels(trace),
        "layers": layers(trace, parts),
        "traffic": {name: matrix.tolist() for name, matrix in vars(traffic(trace)).items()},
        "memory": memory(trace),
        "pipeline": pipeline(trace),
        "staleness": staleness(trace),
    }


def facts(trace: Trace) -> list[tuple[str, str]]:
    """Names and values, in words."""
    header = trace.header
    hosts = {rank.header.get("host", 0): str(rank.header.get("hostname", "?")) for rank in trace.ranks}
    devices = sorted({str(rank.header.get("device", "?")) for rank in trace.ranks})
    found = [("ranks", f"{len(trace.ranks)}"), ("hosts", f"{len(hosts)}: {', '.join(hosts.values())}")]
    found.append(("device", ", ".join(devices)))
    if header.get("virtual"):
        found.append(("time", "virtual: simulated ranks"))
    elif header.get("started"):
        found.append(("started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(header["started"]))))
    schedule = header.get("schedule")
    if schedule:
        words = ", ".join(
            f"{schedule[name]} {name}" for name in ("stages", "microbatches", "chunks") if name in schedule
        )
        found.append(("schedule", f"{schedule.get('name', '?')}: {words}"))
    return found


def numbers(trace: Trace, parts: list[Breakdown]) -> list[Object]:
    """The main numbers of each rank. Times are nanoseconds a step, in the mean; bytes and messages are of all the run.

    A rank without training steps (a server) has its whole time in the place of a step.
    """
    sent = traffic(trace)
    peaks = memory(trace)
    rows = []
    for rank, part in zip(trace.ranks, parts):
        steps = len(part.step)
        row: Object = {"rank": rank.number, "steps": steps}
        for name in PARTS:
            row[name] = float(np.mean(getattr(part, name))) if steps else float(part.whole[name])
        row["step"] = sum(row[name] for name in PARTS)
        row["bytes"] = int(sent.bytes[rank.number].sum())
        row["messages"] = int(sent.messages[rank.number].sum())
        kinds = [peak[rank.number] for kind, peak in peaks.items() if kind != "process"]
        row["memory"] = sum(kinds) if kinds else None
        rows.append(row)
    return rows


def curves(trace: Trace, zero: int) -> Object:
    """name: [times, training steps done by then, values], the mean of the ranks that tell equally many.

    Steps are the rank's own that tells, or if it has none (a server) those of the rank with the most.
    """
    names = dict.fromkeys(name for rank in trace.ranks for name in rank.values.name)
    most_steps = max((rank.steps for rank in trace.ranks), key=len)
    found = {}
    for name in sorted(names, key="accuracy".__eq__):  # after the loss
        if name.startswith("memory ") or name == "staleness":
            continue
        told = []
        for rank in trace.ranks:
            mine = np.array([each == name for each in rank.values.name], bool)
            told.append((rank.values.time[mine], rank.values.value[mine], rank.steps))
        most = max(len(values) for _, values, _ in told)
        told = [one for one in told if len(one[1]) == most]
        times, _, steps = told[0]
        steps = steps if len(steps) else most_steps
        done = np.searchsorted(np.sort(steps.end), times, "right") if len(steps) else np.arange(1, most + 1)
        values = np.mean([values for _, values, _ in told], axis=0)
        found[name] = [(times - zero).tolist(), done.tolist(), [float(f"{value:.6g}") for value in values]]
    return found


def timeline(trace: Trace, zero: int) -> Object:
    """Per rank the columns of each lane; and the messages. What rows have in common is in tables, by number.

    computing   start, length, number of [kind, layer, label]
    operations  start, length, number of [kind, group, peer, bytes, dtype, tag, label], 1 if it finished
    labels      start, length, number of a label, depth
    exposed, idle  start, length                      steps  start, length, number
    marks       [time, label, words]
    messages    sent, until it arrived, number of [sender, receiver, group, tag, bytes]
    """
    computing, operations, words, wire = Codes(), Codes(), Codes(), Codes()
    lanes = []
    for rank, parts in zip(trace.ranks, parts_of(trace)):
        c, o, w, s = rank.computing, rank.operations, rank.labels, rank.steps
        called = zip(o.kind, o.group, _or_none(o.peer), o.nbytes.tolist(), o.dtype, o.tag.tolist(), o.label)
        finished = o.end != NONE
        ends = np.where(finished, o.end, span_of(rank.times())[1])
        lanes.append(
            {
                "computing": spans(c.start, c.end, zero, computing(zip(c.kind, c.layer, c.label))),
                "operations": spans(o.start, ends, zero, operations(called), finished.astype(int).tolist()),
                "labels": spans(w.start, w.end, zero, words(w.label), w.depth.tolist()),
                "steps": spans(s.start, s.end, zero, s.number.tolist()),
                **{name: spans(parts[name].starts, parts[name].ends, zero) for name in ("exposed", "idle")},
                "marks": [[moment - zero, label, text] for label, text, moment in rank.marks],
            }
        )
    m = trace.messages
    ends_of = zip(m.sender.tolist(), m.receiver.tolist(), m.group, m.tag.tolist(), m.nbytes.tolist())
    return {
        "lanes": lanes,
        "messages": [differences(m.sent - zero), (m.arrived - m.sent).tolist(), wire(ends_of)],
        "computing": computing.entries,
        "operations": operations.entries,
        "labels": words.entries,
        "wire": wire.entries,
    }


def _or_none(column: np.ndarray) -> list[int | None]:
    return [None if number == NONE else number for number in column.tolist()]


def steps_of(part: Breakdown) -> Object:
    """Of one rank: nanoseconds of each part of each step."""
    return {"step": part.step.tolist(), **{name: getattr(part, name).tolist() for name in PARTS}, "whole": part.whole}


def labels(trace: Trace) -> list[Object]:
    """Of each label: the words it comes with, and each rank's nanoseconds."""
    words: dict[str, dict[str, None]] = {}
    for rank in trace.ranks:
        for text in dict.fromkeys(rank.labels.label):
            code, _, rest = text.partition(" ")
            without_number = rest.split(",")[0].rstrip("0123456789 ")
            words.setdefault(code, {})[without_number] = None
    return [
        {"label": label, "words": _listed(list(words[label])), "nanoseconds": times}
        for label, times in time_by_label(trace).items()
    ]


def _listed(words: list[str], most: int = 4) -> str:
    return ", ".join([*words[:most], *(["…"] if len(words) > most else [])])


def layers(trace: Trace, parts: list[Breakdown]) -> list[Object]:
    """Of each layer: nanoseconds a training step of each kind of computing, in the mean over the ranks that have it.

    A rank without steps (a server) has as many as those that train. In the order in which layers were first computed;
    what is outside of layers comes last.
    """
    steps = max([1, *(len(part.step) for part in parts)])
    found: dict[str, Object] = {}
    for (layer, kind), times in time_by_layer(trace).items():
        per_step = [spent / (len(part.step) or steps) for spent, part in zip(times, parts) if spent]
        if per_step:
            found.setdefault(layer, {"layer": layer, "kinds": {}})["kinds"][kind] = float(np.mean(per_step))
    first: dict[str, int] = {}
    for rank in trace.ranks:
        for layer, start in zip(rank.computing.layer, rank.computing.start.tolist()):
            first[layer] = min(start, first.get(layer, start))
    return sorted(found.values(), key=lambda one: (not one["layer"], first[one["layer"]]))


def staleness(trace: Trace) -> list[tuple[int, int]]:
    """(so many updates late, so often), of all the ranks."""
    told = [_values_of(rank, "staleness") for rank in trace.ranks]
    values, counts = np.unique(np.concatenate(told).astype(np.int64), return_counts=True)
    return list(zip(values.tolist(), counts.tolist()))


def _values_of(rank: Rank, name: str) -> np.ndarray:
    return rank.values.value[np.array([each == name for each in rank.values.name], bool)]
