"""What a trace holds: for each rank a table for each kind of row, in columns, and what belongs together across ranks.

All times are integer nanoseconds of rank 0's clock. Texts are lists, numbers are NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

Texts = list[str]
Integers = np.ndarray  # int64
Optional = np.ndarray  # int64; a null of the file is NONE
Reals = np.ndarray  # float64

NONE = -(2**63)

MESSAGES = ("send", "receive")  # the kinds of operations that are one message; all others are collectives


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one kind, in columns: the fields stand in the order of the row's items."""

    TIMES: ClassVar[tuple[str, ...]] = ("start", "end")  # columns that hold a time

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Row by row."""
        return zip(*(column if isinstance(column, list) else column.tolist() for column in self.columns().values()))

    def columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, rows: list[list[Any]]) -> Self:
        """Of a file's rows, without their first item.

        Errors  ValueError: a row of another length, or something in a column that does not belong there
        """
        names = [field.name for field in fields(cls)]
        if {*map(len, rows)} - {len(names) + 1}:
            raise ValueError(f"expected {len(names)} items after the first: {', '.join(names)}")
        columns = list(zip(*rows))[1:] or [()] * len(names)
        return cls(*(_column(field.name, field.type, column) for field, column in zip(fields(cls), columns)))


def _column(name: str, kind: Any, column: tuple[Any, ...]) -> Any:
    if kind == "Optional":
        column = tuple(NONE if item is None else item for item in column)
    types: dict[str, set[type]] = {"Texts": {str}, "Reals": {int, float}}
    expected = types.get(kind, {int})
    wrong = {*map(type, column)} - expected
    if wrong:
        raise ValueError(f"{name}: expected {kind.lower()}, got {', '.join(sorted(t.__name__ for t in wrong))}")
    if kind == "Texts":
        return list(column)
    return np.array(column, np.float64 if kind == "Reals" else np.int64)


@dataclass(frozen=True, eq=False)
class Computing(Table):
    """Rows "C". kind: "forward", "backward", "update", "recompute". layer: its name in the model, or ""."""

    kind: Texts
    layer: Texts
    label: Texts
    start: Integers
    end: Integers


@dataclass(frozen=True, eq=False)
class Operations(Table):
    """Rows "O": what the program called. peer: a rank of the group, or NONE. end: NONE if it never finished."""

    number: Integers
    kind: Texts
    group: Texts
    peer: Optional
    nbytes: Integers
    dtype: Texts
    tag: Integers
    label: Texts
    start: Integers
    end: Optional


@dataclass(frozen=True, eq=False)
class Wire(Table):
    """Rows "M": messages, those inside of collectives too. direction: "s" or "r". peer: a rank of the world."""

    direction: Texts
    group: Texts
    peer: Integers
    tag: Integers
    nbytes: Integers
    start: Integers
    end: Optional


@dataclass(frozen=True, eq=False)
class Waits(Table):
    """Rows "W": the program could not go on. One may lie in another."""

    start: Integers
    end: Integers


@dataclass(frozen=True, eq=False)
class Labels(Table):
    """Rows "L": numbered steps of the document, with words. depth: how many others a step lies in."""

    label: Texts
    depth: Integers
    start: Integers
    end: Integers


@dataclass(frozen=True, eq=False)
class Marks(Table):
    """Rows "I": what happened at a time."""

    label: Texts
    words: Texts
    time: Integers
    TIMES = ("time",)


@dataclass(frozen=True, eq=False)
class Values(Table):
    """Rows "V": numbers that change: "loss", "accuracy", "staleness", "memory gradients" (bytes), …"""

    name: Texts
    value: Reals
    time: Integers
    TIMES = ("time",)


@dataclass(frozen=True, eq=False)
class Steps(Table):
    """Rows "S": training steps."""

    number: Integers
    start: Integers
    end: Integers


@dataclass(frozen=True, eq=False)
class Actions(Table):
    """Rows "P": what a rank of a pipeline did for a microbatch in one of its chunks; from start to ready it waited."""

    kind: Texts
    micro: Integers
    chunk: Integers
    start: Integers
    ready: Integers
    end: Integers
    TIMES = ("start", "ready", "end")


@dataclass(frozen=True, eq=False)
class Clock(Table):
    """Rows "A": at `time` of this rank's clock, `offset` has to be added for rank 0's."""

    time: Integers
    offset: Integers
    TIMES = ()


@dataclass(frozen=True)
class Rank:
    """One rank's file. groups: of each communicator, its ranks in the world."""

    number: int
    header: dict[str, Any]
    groups: dict[str, tuple[int, ...]]
    computing: Computing
    operations: Operations
    wire: Wire
    waits: Waits
    labels: Labels
    marks: Marks
    values: Values
    steps: Steps
    actions: Actions
    clock: Clock

    def tables(self) -> Iterator[Table]:
        """Those whose times are times."""
        for name in TABLES.values():
            yield getattr(self, name)

    def times(self) -> Iterator[np.ndarray]:
        """All there are in its rows; among them the beginning and the end of the recording."""
        yield self.clock.time + self.clock.offset
        for table in self.tables():
            for name in table.TIMES:
                yield getattr(table, name)


# The letter of each kind of row, and where Rank has its table.
TABLES = {
    "C": "computing",
    "O": "operations",
    "M": "wire",
    "W": "waits",
    "L": "labels",
    "I": "marks",
    "V": "values",
    "S": "steps",
    "P": "actions",
}
CLASSES: dict[str, type[Table]] = {
    "C": Computing,
    "O": Operations,
    "M": Wire,
    "W": Waits,
    "L": Labels,
    "I": Marks,
    "V": Values,
    "S": Steps,
    "P": Actions,
    "A": Clock,
}


@dataclass(frozen=True, eq=False)
class Messages(Table):
    """Messages of which both ends are known. Ranks are the world's.

    sent     when the sender began           sent_end  when the sender was done with it
    posted   when the receiver wanted it     arrived   when the receiver had it
    send, receive   the places of its rows in the two ranks' `wire`
    """

    sender: Integers
    receiver: Integers
    group: Texts
    tag: Integers
    nbytes: Integers
    sent: Integers
    sent_end: Integers
    posted: Integers
    arrived: Integers
    send: Integers
    receive: Integers


class Collective(NamedTuple):
    """The k-th collective of a group, on all of its ranks.

    calls     rank of the world: the place of its row in that rank's `operations`
    entered   when the last rank called it
    complete  whether the trace has it on every rank of the group
    """

    group: str
    kind: str
    calls: dict[int, int]
    entered: int
    complete: bool


@dataclass(frozen=True)
class Trace:
    """A folder. notes: what a reader should know: lines that were cut off, messages nobody received, and the like."""

    ranks: list[Rank]
    messages: Messages
    collectives: list[Collective]
    notes: list[str]

    @property
    def header(self) -> dict[str, Any]:
        """Rank 0's."""
        return self.ranks[0].header

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last time of all ranks; (0, 0) of a trace without any."""
        return span_of(chain.from_iterable(rank.times() for rank in self.ranks))


def span_of(columns: Iterator[np.ndarray]) -> tuple[int, int]:
    """The least and the greatest of all times, NONE apart; (0, 0) if there is none."""
    known = [column[column != NONE] for column in columns]
    filled = [column for column in known if len(column)]
    if not filled:
        return 0, 0
    return int(min(column.min() for column in filled)), int(max(column.max() for column in filled))
