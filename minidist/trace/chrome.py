"""A trace in the Trace Event Format: what https://ui.perfetto.dev and chrome://tracing open.

A process for each rank, and in it a thread for each kind of thing; what overlaps is dealt to further threads of the
same name. Messages are flow events, numbers are counters. Times are microseconds since the trace's beginning.

Source  "Trace Event Format", the Chromium project's document of the JSON that its tracing viewer reads
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from .tables import MESSAGES, NONE, Rank, Trace, span_of

Event = dict[str, Any]
Span = tuple[int, int, str, str, dict[str, Any]]  # start, end, name, category, arguments

THREADS = ("training steps", "numbered steps", "computing", "waiting", "operations", "sending", "receiving", "pipeline")
BETWEEN = 1000  # the first thread of a name is so many after that of the name before


def write_chrome(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a trace as one JSON object, an event a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms",\n"otherData": ')
        json.dump({"program": str(trace.header.get("program", "")), "notes": "; ".join(trace.notes)}, file)
        file.write(',\n"traceEvents": [\n')
        for i, event in enumerate(events(trace)):
            file.write((",\n" if i else "") + json.dumps(event))
        file.write("\n]}\n")


def events(trace: Trace) -> Iterator[Event]:
    """All events, those of a thread in order and nested."""
    zero = trace.span[0]
    flows = _flows(trace)
    for rank in trace.ranks:
        pid = rank.number
        name = f"rank {pid} ({rank.header.get('hostname', '?')}, {rank.header.get('device', '?')})"
        yield _named("process_name", pid, 0, name=name)
        yield _named("process_sort_index", pid, 0, sort_index=pid)
        for number, (thread, spans) in enumerate(zip(THREADS, _spans(rank, *flows[pid]))):
            yield from _thread(pid, number * BETWEEN, thread, spans, zero)
        for label, words, time in rank.marks:
            yield _event("i", f"{label} {words}", "mark", pid, 0, time - zero, s="p")
        for value_name, value, time in rank.values:
            yield _event("C", value_name, "value", pid, 0, time - zero, args={value_name: value})


def _flows(trace: Trace) -> list[tuple[dict[int, int], dict[int, int]]]:
    """Of each rank: the messages' numbers, by the places of their rows in `wire`; those it sent, those it received."""
    flows: list[tuple[dict[int, int], dict[int, int]]] = [({}, {}) for _ in trace.ranks]
    messages = trace.messages
    ends = zip(messages.sender.tolist(), messages.receiver.tolist(), messages.send.tolist(), messages.receive.tolist())
    for number, (sender, receiver, send, receive) in enumerate(ends):
        flows[sender][0][send] = flows[receiver][1][receive] = number
    return flows


def _spans(rank: Rank, sends: dict[int, int], receives: dict[int, int]) -> list[list[Span]]:
    """What goes on each of THREADS. A message's arguments have its number, if both of its ends are known."""
    last = span_of(rank.times())[1]
    sent: list[Span] = []
    received: list[Span] = []
    for row, (direction, group, peer, tag, nbytes, start, end) in enumerate(rank.wire):
        arguments = {"bytes": nbytes, "tag": tag, "group": group}
        target, name = (sent, f"to rank {peer}") if direction == "s" else (received, f"from rank {peer}")
        number = (sends if direction == "s" else receives).get(row)
        if number is not None:
            arguments["message"] = number
        target.append((start, last if end == NONE else end, name, "message", arguments))
    operations: list[Span] = []
    for _, kind, group, peer, nbytes, dtype, tag, label, start, end in rank.operations:
        arguments = {"bytes": nbytes, "dtype": dtype, "group": group, "step": label}
        if peer != NONE:
            arguments["peer"] = peer
        if kind in MESSAGES:
            arguments["tag"] = tag
        operations.append((start, last if end == NONE else end, kind, "operation", arguments))
    computing = [
        (start, end, f"{kind} {layer}".rstrip(), "computing", {"step": label})
        for kind, layer, label, start, end in rank.computing
    ]
    actions = [
        (ready, end, f"{kind} {micro}", "pipeline", {"chunk": chunk, "waited us": (ready - start) / 1000})
        for kind, micro, chunk, start, ready, end in rank.actions
    ]
    return [
        [(start, end, f"step {number}", "step", {}) for number, start, end in rank.steps],
        [(start, end, label, "label", {}) for label, _, start, end in rank.labels],
        computing,
        [(start, end, "waiting", "wait", {}) for start, end in rank.waits],
        operations,
        sent,
        received,
        actions,
    ]


def _thread(pid: int, tid: int, name: str, spans: list[Span], zero: int) -> Iterator[Event]:
    """Complete events. One that begins in another and outlasts it goes to the next thread: on one they must nest."""
    lanes: list[list[int]] = []  # of each thread, the ends of the spans that are open
    for start, end, what, category, arguments in sorted(spans, key=lambda span: (span[0], -span[1])):
        for ends in lanes:
            while ends and ends[-1] <= start:
                ends.pop()
        lane = next((i for i, ends in enumerate(lanes) if not ends or end <= ends[-1]), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(end)
        duration = max(end - start, 0) / 1000
        yield _event("X", what, category, pid, tid + lane, start - zero, dur=duration, args=arguments)
        # An arrow begins at the time of its event in the slice of the sending, and ends in that of the receiving.
        if "message" in arguments and name == "sending":
            yield _event("s", "message", "flow", pid, tid + lane, start - zero, id=arguments["message"])
        elif "message" in arguments:
            there = max(start, end - 1) - zero
            yield _event("f", "message", "flow", pid, tid + lane, there, id=arguments["message"], bp="e")
    for lane in range(len(lanes)):
        yield _named("thread_name", pid, tid + lane, name=name)
        yield _named("thread_sort_index", pid, tid + lane, sort_index=tid + lane)


def _event(kind: str, name: str, category: str, pid: int, tid: int, nanoseconds: int, **more: Any) -> Event:
    return {"ph": kind, "name": name, "cat": category, "pid": pid, "tid": tid, "ts": nanoseconds / 1000, **more}


def _named(what: str, pid: int, tid: int, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}
