"""The recorder: what every rank did, and when, written to a file each, for pictures of it.

    with md.trace.record(comm, "run1"):
        train(comm)

Every rank writes run1/rank-0000.jsonl (its number in the place of 0000): JSON arrays, one a line; the first line is an
object that says what run it was. Times are integer nanoseconds of the rank's own clock, virtual ones in a simulation;
rows "A" tell how to bring them to rank 0's.

    ["G", group, [ranks]]                          a communicator, by the name it has on all its ranks; "0" is the world
    ["C", kind, layer, label, start, end]          computing: "forward", "backward", "recompute", "update"
    ["O", number, kind, group, peer, nbytes, dtype, tag, label, start, end]      an operation that the program called
    ["M", "s" or "r", group, peer, tag, nbytes, start, end]    a message, also inside of collectives; peer in the world
    ["W", start, end]                              nothing could be done but wait for other ranks
    ["L", label, depth, start, end]                a step of the document, or of a strategy
    ["I", label, words, time]                      what was decided in one
    ["V", name, value, time]                       a number: "loss", "staleness", "memory process" (bytes)
    ["S", number, start, end]                      a training step: from its first forward to the next one's
    ["P", kind, micro, chunk, start, ready, end]   an action of a pipeline; it waited until `ready`
    ["A", time, offset]                            at this time add so much to have rank 0's clock

The k-th message from a to b with a group and tag is the k-th received there; the k-th collective of a group is the k-th
on all its ranks. An end is null where a rank was ended before it came.

Source  spans and wait states as in Score-P and Scalasca (Geimer et al. 2010, The Scalasca performance toolset)
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from .. import backend
from ..autograd import is_grad_enabled
from ..comm import Communicator
from ..comm.record import END, MESSAGE_END, Entry, Listener, Message
from ..nn import Module
from ..tensor import Function, _creation_order
from ..watcher import Watcher, watched_by
from .clocks import offset_to_first

VERSION = 1
ROOM = 40_000  # rows that are kept in memory before they are written
PAUSE = 0.05  # seconds between looks at the memory in use
SHORTEST = 1e-6  # seconds; shorter stretches of computing (of a Sequential, between its layers) are left out


@contextmanager
def record(
    comm: Communicator, folder: str | Path, device: str = "cpu", program: str | None = None
) -> Iterator[Recorder]:
    """Record what all ranks do in the `with`. Every rank of the world calls it.

    Ranks that share the folder write side by side; what is there of an earlier run is removed. If `device` is a GPU it
    waits for the device at the end of each stretch of computing, so that its times are the device's.

    Cost    about 1 us for each row; where ranks are on several hosts, some messages before and after, see clocks.py
    Errors  OSError: the folder can't be made or written to
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if comm.rank == 0:
        for old in folder.glob("rank-*.jsonl"):
            old.unlink()
    apart = comm.split(0)  # all have come; and its messages will not meet those of the program
    assert apart is not None
    with (folder / f"rank-{comm.rank:04}.jsonl").open("w", encoding="utf-8") as file:
        recorder = Recorder(comm, file, device, program)
        recorder.align(offset_to_first(apart))
        try:
            with comm.record.heard_by(recorder), watched_by(recorder):
                yield recorder
            recorder.align(offset_to_first(apart))
        finally:
            recorder.close()


class Recorder(Listener, Watcher):
    """One rank's rows, on their way to its file."""

    def __init__(self, comm: Communicator, file: TextIO, device: str = "cpu", program: str | None = None):
        self.comm, self.file, self.clock = comm, file, comm.clock
        self.header: dict[str, Any] = {
            "format": "minidist trace",
            "version": VERSION,
            "rank": comm.rank,
            "size": comm.size,
            "host": comm.hosts()[comm.rank],
            "hostname": socket.gethostname(),
            "virtual": comm.virtual,
            "device": device,
            "started": time.time(),
            "program": " ".join([_name(Path(sys.argv[0])), *sys.argv[1:]]) if program is None else program,
            "schedule": None,
        }
        self._rows: list[str | Row] = []
        self._entries: list[Entry] = []  # operations and messages, which get their ends later
        self._messages: list[Message] = []
        self._groups: set[str] = set()
        self._labels: list[tuple[str, float]] = []  # the steps that the rank is in
        self._wait = (0.0, 0.0)  # the last one
        self._gpu = self.header["device"] != "cpu"
        # Computing: the stretch that goes on, and the modules that are being called, by name.
        self._stretch: tuple[str, str, str, float] | None = None
        self._calls: list[str] = []
        self._backwards = 0  # that go on
        self._names: dict[Module, str] = {}
        # Which module made a node of the graph: that of the last of these numbers before the node's.
        self._orders: list[int] = []
        self._makers: list[str] = []
        self._step = 0
        self._step_began: float | None = None
        self._updated = False
        self._weighed = float("-inf")  # when the process was
        self._open = True  # whether the header is still to be written

    # -- communication: a Listener's ----------------------------------------------------------------------------------

    def began(self, entry: Entry) -> None:
        self._entries.append(entry)

    def message(self, message: Message) -> None:
        self._messages.append(message)

    def waited(self, start: float, end: float) -> None:
        if start > self._wait[0]:  # else it has the last one in it
            self._write_wait()
        self._wait = (start, end)

    def step_began(self, label: str) -> None:
        self._labels.append((label, self.clock()))

    def step_ended(self, label: str) -> None:
        if self._labels:  # else it began before the recording
            label, start = self._labels.pop()
            self._rows.append(("L", (label, len(self._labels)), (start, self.clock())))

    def mark(self, label: str, words: str) -> None:
        self._row(f'"I",{quoted(label)},{json.dumps(words)},{ns(self.clock())}')

    def value(self, name: str, number: float) -> None:
        self._row(f'"V",{quoted(name)},{json.dumps(float(number))},{ns(self.clock())}')

    def fact(self, kind: str, fields: tuple[Any, ...]) -> None:
        if kind == "schedule":
            self.header["schedule"] = dict(zip(("name", "stages", "microbatches", "chunks"), fields, strict=True))
        elif kind == "action":
            name, micro, chunk, *times = fields
            self._rows.append(("P", (name, micro, chunk), tuple(times)))

    def align(self, offset: float) -> None:
        """Add `offset` to this clock, now, to have rank 0's."""
        self._row(f'"A",{ns(self.clock())},{ns(offset)}')

    # -- computing: a Watcher's ---------------------------------------------------------------------------------------

    def forward_begins(self, module: Module) -> None:
        if not self._calls and not self._backwards:
            self._next_step()
        if module not in self._names:
            for name, inner in module.named_modules():
                inside = name.removeprefix("module").removeprefix(".")  # the wrapper of data_parallel adds nothing
                self._names.setdefault(inner, inside)
        name = self._names[module]
        self._calls.append(name)
        self._made_by(name)
        self._compute("recompute" if self._backwards else "forward", name)

    def forward_ends(self, module: Module) -> None:
        self._calls.pop()
        name = self._calls[-1] if self._calls else ""
        self._made_by(name)
        if self._calls:
            self._compute("recompute" if self._backwards else "forward", name)
        else:
            self._rest()

    def backward_begins(self) -> None:
        self._backwards += 1

    def visits(self, node: Function) -> None:
        place = bisect_right(self._orders, node.order)
        name = self._makers[place - 1] if place else ""
        stretch = self._stretch
        if stretch is None or stretch[0] != "backward" or stretch[1] != name:
            self._compute("backward", name)

    def backward_ends(self) -> None:
        self._backwards -= 1
        self._rest()

    def update_begins(self) -> None:
        self._compute("update", "")

    def update_ends(self) -> None:
        self._rest()
        self._updated = True

    def _made_by(self, name: str) -> None:
        """Nodes made from now on are this module's."""
        self._orders.append(next(_creation_order))
        self._makers.append(name)

    def _compute(self, kind: str, layer: str) -> None:
        """From now on the rank computes this."""
        now = self._rest()
        self._stretch = kind, layer, self.comm.record.label, now

    def _rest(self) -> float:
        """What it computed so far is done; returns the time."""
        if self._gpu:
            backend.synchronize()
        now = self.clock()
        if self._stretch is not None:
            kind, layer, label, start = self._stretch
            self._stretch = None
            if now - start >= SHORTEST:
                self._rows.append(("C", (kind, layer, label), (start, now)))
        return now

    def _next_step(self) -> None:
        """A model is called: if it was updated since, a training step is over, and another begins."""
        now = self.clock()
        if self._updated:
            self._end_step(now)
        if self._step_began is None and is_grad_enabled():
            self._step_began = now

    def _end_step(self, now: float) -> None:
        self._updated = False
        self._orders.clear()
        self._makers.clear()
        if self._step_began is not None:
            self._step += 1
            self._row(f'"S",{self._step},{ns(self._step_began)},{ns(now)}')
            self._step_began = None
            if now - self._weighed > PAUSE and not self.header["virtual"] and (used := memory_in_use()) is not None:
                self._weighed = now
                self.value("memory process", used)
        if self._step == 1 or len(self._rows) + len(self._entries) + len(self._messages) > ROOM:
            self._flush(last=False)  # after the first step too: a rank that is killed early has told something

    # -- the file -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what is left."""
        self._rest()
        if self._updated:
            self._end_step(self.clock())
        while self._labels:
            self.step_ended("")
        self._flush(last=True)

    def _row(self, fields: str) -> None:
        self._rows.append(f"[{fields}]\n")

    def _write_wait(self) -> None:
        start, end = self._wait
        if end > start:
            self._rows.append(("W", (), self._wait))

    def _flush(self, last: bool) -> None:
        """Write what is finished; at last, everything."""
        if self._open:
            self.file.write(json.dumps(self.header) + "\n")
            self._open = False
        if last:
            self._write_wait()
            self._wait = (0.0, 0.0)
        entries, self._entries = self._entries, []
        for entry in entries:
            if entry[END] is None and not last:
                self._entries.append(entry)
                continue
            number, kind, group, peer, nbytes, dtype, tag, label, start, end = entry
            peer = "null" if peer is None else peer
            self._row(
                f'"O",{number},{quoted(kind)},{self._group(group)},{peer},{nbytes},"{dtype}",{tag},{quoted(label)},'
                f"{ns(start)},{ns(end)}"
            )
        messages, self._messages = self._messages, []
        held: set[tuple[Any, ...]] = set()  # by what messages are matched: in the file each of these keeps its order
        for message in messages:
            direction, group, peer, tag, nbytes, start, end = message
            key = direction, group.group_name, peer, tag
            if not last and (message[MESSAGE_END] is None or key in held):
                held.add(key)
                self._messages.append(message)
                continue
            self._row(f'"M","{direction}",{self._group(group)},{peer},{tag},{nbytes},{ns(start)},{ns(end)}')
        self.file.writelines(row if isinstance(row, str) else in_json(*row) for row in self._rows)
        self.file.flush()
        self._rows.clear()

    def _group(self, group: Communicator) -> str:
        """The name of a communicator; before its first use, who is in it."""
        name = "0" if group.group_name == self.comm.group_name else group.group_name
        if name not in self._groups:
            self._groups.add(name)
            self._row(f'"G",{quoted(name)},{json.dumps(list(group.members))}')
        return quoted(name)


# What is put into words only when it is written: the kind of row, its fields, and its times in seconds.
Row = tuple[str, tuple[str | int, ...], tuple[float | None, ...]]


def _name(program: Path) -> str:
    """ "mnist" of examples/mnist.py, "gpt" of examples/gpt/__main__.py"""
    return program.parent.name if program.stem == "__main__" else program.stem


quoted = cache(json.dumps)


def in_json(kind: str, fields: tuple[str | int, ...], times: tuple[float | None, ...]) -> str:
    return f'["{kind}",{"".join(f"{quoted(field)}," for field in fields)}{",".join(map(ns, times))}]\n'


def ns(seconds: float | None) -> str:
    return "null" if seconds is None else str(round(seconds * 1e9))


def memory_in_use() -> int | None:
    """Bytes of this process that are in memory (the resident set); None where the system does not tell it cheaply."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
