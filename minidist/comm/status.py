"""What one rank is doing at this moment, as another thread of its process can see it; and that as a message.

The message is made of int64, then texts, each of which is preceded by its length:

    state, microseconds, number of peers, number of groups, peers, (check sum, collectives started) of each group
    host, operation, label, place, name of each group

It stays below 4000 bytes, so every MPI sends it at once, without waiting for the receiver.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import threading
import zlib
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .record import DIRECTIONS, Operation, Waiting, ranks_of
from .where import describe

if TYPE_CHECKING:
    from .base import Communicator

RUNS, WAITS, ENDED, DIED = range(4)  # ENDED: its program is over, and it waits for the others to end too
MOST_PEERS, MOST_GROUPS = 128, 8  # that a message names
LONGEST_TEXT = 200  # bytes

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_EXAMPLES = _PACKAGE + "examples" + os.sep
_WAITING = (_PACKAGE + "comm" + os.sep, _PACKAGE + "collectives" + os.sep)
_LIBRARIES = {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_NOT_THE_USERS = (_PACKAGE, *_LIBRARIES, "<frozen ")


class Status(NamedTuple):
    """What a rank is doing."""

    state: int  # RUNS, WAITS, ENDED, or said of it by another: DIED
    seconds: float  # for so long
    peers: list[int]  # ranks of the world that it waits for
    groups: list[tuple[int, int, str]]  # (check sum of the members, collectives started on it, its name)
    host: str
    operation: str  # the one under way, or the last one
    label: str  # the step of the program
    place: str  # the line of the program

    def pack(self) -> np.ndarray:
        """As bytes."""
        peers, groups = self.peers[:MOST_PEERS], self.groups[:MOST_GROUPS]
        numbers = [self.state, round(self.seconds * 1e6), len(peers), len(groups), *peers]
        numbers += [number for check, count, _ in groups for number in (check, count)]
        message = np.array(numbers, np.int64).tobytes()
        for text in (self.host, self.operation, self.label, self.place, *(name for _, _, name in groups)):
            encoded = text.encode(errors="replace")[:LONGEST_TEXT]
            message += np.int64(len(encoded)).tobytes() + encoded
        return np.frombuffer(message, np.uint8)

    @staticmethod
    def unpack(message: np.ndarray) -> Status:
        """The reverse of `pack`."""
        data, at = message.tobytes(), 0

        def numbers(count: int) -> list[int]:
            nonlocal at
            at += 8 * count
            return np.frombuffer(data, np.int64, count, at - 8 * count).tolist()

        def text() -> str:
            nonlocal at
            (length,) = numbers(1)
            at += length
            return data[at - length : at].decode(errors="replace")

        state, microseconds, n_peers, n_groups = numbers(4)
        peers, counts = numbers(n_peers), numbers(2 * n_groups)
        host, operation, label, place = text(), text(), text(), text()
        groups = [(counts[2 * i], counts[2 * i + 1], text()) for i in range(n_groups)]
        return Status(state, microseconds / 1e6, peers, groups, host, operation, label, place)


def status_of(world: Communicator, opened: float, over: bool) -> Status:
    """What this process's rank is doing. `opened`: when the world was; `over`: whether the program is."""
    record, now = world.record, world.clock()
    operations, label = record.operations(), record.label
    noted = record.waiting  # read once: the main thread may change it at any moment
    waiting = None if noted is None else Waiting(*noted)
    if over:
        state, since, operation = ENDED, now, ""
    elif waiting is not None:
        state, since = WAITS, waiting.since
        operation, label = _waited_for(waiting, operations, label, world)
    else:
        last = max((time for op in operations for time in (op.start, op.end) if time is not None), default=opened)
        state, since, operation = RUNS, last, _last(operations, world)
    return Status(
        state,
        now - since,
        waiting.peers if waiting is not None and not over else [],
        _collectives(operations, world),
        socket.gethostname(),
        operation,
        label,
        "" if over else place_in(sys._current_frames().get(threading.main_thread().ident or 0)),
    )


# -- operations in words ------------------------------------------------------------------------------------------


def _waited_for(waiting: Waiting, operations: list[Operation], label: str, world: Communicator) -> tuple[str, str]:
    """(the operation that a rank waits in, its step). For a message of a collective, that and the collective."""
    what, entry = waiting.what, getattr(waiting.what, "entry", None)
    if entry is not None:
        return _named(Operation(*entry), world), entry[Operation._fields.index("label")]
    group, tag = getattr(what, "comm", None), getattr(what, "tag", None)
    under_way = [op for op in operations if op.kind not in DIRECTIONS and op.end is None and op.group is group]
    if under_way:  # several at a time have different tags; MPI's own requests have none
        op = max(under_way, key=lambda op: (op.tag == tag, op.number))
        return f"{_named(op, world)}: {what}", op.label
    return str(what), label


def _last(operations: list[Operation], world: Communicator) -> str:
    """What a rank that does not wait has started and not ended; else what it ended last."""
    under_way = [op for op in operations if op.end is None]
    if under_way:
        return f"started, not waited for: {_named(under_way[0], world)}"
    return f"last: {_named(max(operations, key=lambda op: op.end or 0.0), world)}" if operations else ""


def _named(op: Operation, world: Communicator) -> str:
    return f"{op}, on {_name(op.group, world)}"


def _name(group: Communicator, world: Communicator) -> str:
    if group is world:
        return "the world"
    return f"the group of {group.size} (rank{'s' * (group.size > 1)} {ranks_of(group)})"


def _collectives(operations: list[Operation], world: Communicator) -> list[tuple[int, int, str]]:
    """How many collectives this rank has started on the world and on the groups it used last.

    A group is known to other ranks by its members; one that shares them with another in the record is left out.
    """
    seen = dict.fromkeys(op.group for op in operations if op.group is not world)
    members = {group: np.array(getattr(group, "members", ()), np.int64).tobytes() for group in seen}
    alone = [group for group in seen if list(members.values()).count(members[group]) == 1]
    return [
        (0, world.operations, "the world"),
        *((1 + zlib.crc32(members[group]), group.operations, _name(group, world)) for group in alone[::-1]),
    ]


# -- the line of the program --------------------------------------------------------------------------------------


def place_in(frame: FrameType | None) -> str:
    """The user's line in a stack, and what it leads to: "train.py:12 in step, inside of .../_linalg.py:90 in svd".

    The user's is the innermost one that is neither minidist's (but its examples are users) nor an installed library's.
    Of a call that communicates only the user's is told: the operation says the rest.
    """
    inside: FrameType | None = None
    while frame is not None and not _is_users(frame.f_code.co_filename):
        if frame.f_code.co_filename.startswith(_WAITING):
            inside = None
        elif inside is None:
            inside = frame
        frame = frame.f_back
    lines = [describe((f.f_code, f.f_lineno)) for f in (frame, inside) if f is not None]
    return ", inside of ".join(lines)


def _is_users(path: str) -> bool:
    return path.startswith(_EXAMPLES) or not path.startswith(_NOT_THE_USERS)
