"""The narrator: tells on rank 0's terminal what the run does, step by step, as it does it (`--explain`).

    D.3(4) synchronise: ring all-reduce of 814,090 float32 (3.26 MB) over 4 ranks, 6 messages of 0.81 MB each, 1.9 ms

All of the first two training steps is told, but for what is done many times in one (a pipeline's microbatches), which
is told three times; from then on, what has not been told before. At most LINES are spent on the beginning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

from ..autograd import is_grad_enabled
from ..comm import Communicator
from ..comm.record import END, START, Entry, Listener, Message
from ..watcher import Watcher, watched_by
from .labels import LABEL, LABELS

FIRST_STEPS = 2  # training steps that are told whole
ALIKE = 3  # so often in a step the same is told
LINES = 60  # of the beginning
SMALL = 1000  # bytes; what is smaller and belongs to no step is not told, and no size of it is new


@contextmanager
def narrate(comm: Communicator, say: Callable[[str], None] = print) -> Iterator[None]:
    """In the `with`, rank 0 tells what it does; other ranks are silent. `say` is called with each line."""
    if comm.rank != 0:
        yield
        return
    narrator = Narrator(comm, say)
    with comm.record.heard_by(narrator), watched_by(narrator):
        yield


class Narrator(Listener, Watcher):
    """What has been told so far, and what is going on."""

    def __init__(self, comm: Communicator, say: Callable[[str], None]):
        self.comm, self.say = comm, say
        self.beginning = True  # of the run: all is told
        self.steps = self.lines = 0  # training steps that are over, lines that were told in the beginning
        self._updated = False
        self._told: Counter[tuple[Any, ...]] = Counter()  # in this step; from the third on, ever
        self._sent: dict[tuple[str, int], list[int]] = {}  # bytes of the messages of an operation, by group and tag
        self._seconds: dict[str, list[float]] = {}  # of operations, by label, since they were last summed up
        self._deep = self._backwards = 0
        self._began = 0.0

    # -- what a rank says to others -----------------------------------------------------------------------------------

    def message(self, message: Message) -> None:
        direction, group, _, tag, nbytes, *_ = message
        if direction == "s":
            self._sent.setdefault((group.group_name, tag), []).append(nbytes)

    def ended(self, entry: Entry) -> None:
        _, kind, group, peer, nbytes, dtype, tag, label, *_ = entry
        sent = self._sent.pop((group.group_name, tag), [])
        seconds = entry[END] - entry[START]
        if label:
            self._seconds.setdefault(label, []).append(seconds)
        if group.size == 1 or (not label and nbytes < SMALL):
            return
        what = what_of(kind, group.size, peer, nbytes, dtype)
        many = ""
        if kind not in ("send", "receive"):
            many = f", {messages_in_words(sent)}" if sent else ", no messages"
        key = (label.rstrip("0123456789"), kind, None if nbytes < SMALL else nbytes, dtype)
        self._tell(key, label, f"{what}{many}, {time_in_words(seconds)}")

    # -- what it computes ---------------------------------------------------------------------------------------------

    def forward_begins(self, module: Any) -> None:
        if not self._deep and not self._backwards:
            if self._updated:
                self._updated = False
                self.step_is_over()
            self._began = self.comm.clock()
        self._deep += 1

    def forward_ends(self, module: Any) -> None:
        self._deep -= 1
        if not self._deep and not self._backwards and is_grad_enabled():
            self._compute("forward")

    def backward_begins(self) -> None:
        if not self._backwards:
            self._began = self.comm.clock()
        self._backwards += 1

    def backward_ends(self) -> None:
        self._backwards -= 1
        if not self._backwards:
            self._compute("backward")

    def update_begins(self) -> None:
        self._began = self.comm.clock()

    def update_ends(self) -> None:
        if self.comm.clock() > self._began:
            self._compute("the optimizer's update")
        self._updated = True

    def step_is_over(self) -> None:
        """A training step is; what the next one does is told anew at first, and then only what is new."""
        self.steps += 1
        if self.steps < FIRST_STEPS:
            self._told.clear()
        elif self.beginning:
            self._end_beginning()

    def _end_beginning(self) -> None:
        self.beginning = False
        self.say("... (from here on, what is new)")

    def _compute(self, what: str) -> None:
        label = self.comm.record.label or "D.3(3)"
        took = time_in_words(self.comm.clock() - self._began)
        self._tell((re.sub(r"\d+", "", label[6:]), what), label, f"{what}, {took}")

    # -- what it decides ----------------------------------------------------------------------------------------------

    def mark(self, label: str, words: str) -> None:
        self.say(f"{label} {LABELS[label][0]}: {words}")
        if label.endswith("(5)"):
            for step, seconds in self._seconds.items():
                if len(seconds) > FIRST_STEPS:
                    took = time_in_words(median(seconds))
                    self.say(f"  {title_of(step)}: {len(seconds):,} operations, {took} in the median{rest_of(step)}")
            self._seconds.clear()

    def _tell(self, key: tuple[Any, ...], label: str, words: str) -> None:
        """Say it, unless it has been said."""
        self._told[key] += 1
        if self._told[key] <= (ALIKE if self.beginning else 1):
            self.say(f"{title_of(label)}: {words}" + rest_of(label))
            self.lines += 1
            if self.beginning and self.lines == LINES:
                self._end_beginning()


# -- in words --------------------------------------------------------------------------------------------------------


def title_of(label: str) -> str:
    """ "D.3(4) synchronise" of "D.3(4) average gradients"."""
    found = LABEL.match(label)
    return f"{found[0]} {LABELS[found[0]][0]}" if found and found[0] in LABELS else label or "beside the steps"


def rest_of(label: str) -> str:
    """ " (average gradients)" of it."""
    found = LABEL.match(label)
    rest = label[found.end() :].strip() if found else ""
    return f" ({rest})" if rest and rest != LABELS.get(found[0] if found else "", ("",))[0] else ""


def what_of(kind: str, size: int, peer: int | None, nbytes: int, dtype: Any) -> str:
    """ "ring all-reduce of 814,090 float32 (3.26 MB) over 4 ranks"."""
    much = f"{nbytes // max(np.dtype(dtype).itemsize, 1):,} {dtype} ({bytes_in_words(nbytes)})"
    if kind == "send":
        return f"send {much} to rank {peer}"
    if kind == "receive":
        return f"receive {much} from rank {peer}"
    operation, _, algorithm = kind.partition(" ")
    name = f"{algorithm.replace('_', ' ')} {operation.replace('_', '-')}".strip()
    return f"{name} of {much} over {size} rank{'s' * (size > 1)}"


def messages_in_words(sent: list[int]) -> str:
    """ "6 messages of 0.81 MB each"."""
    if len(sent) == 1:
        return f"1 message of {bytes_in_words(sent[0])}"
    if max(sent) - min(sent) <= max(sent) // 20:
        return f"{len(sent)} messages of {bytes_in_words(sum(sent) // len(sent))} each"
    return f"{len(sent)} messages of {bytes_in_words(min(sent))} to {bytes_in_words(max(sent))}"


def bytes_in_words(nbytes: float) -> str:
    """In units of 1000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    if nbytes < 1e5:
        return f"{nbytes / 1e3:.3g} kB"
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def time_in_words(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
