"""Every message of the parameter server, with its fixed binary layout.

A message is a header of 64 bytes and, if `length` is not 0, a body of so many bytes. What a field means depends on the
kind; those that a kind does not name are 0.

    kind         from, to               fields                                   body                    answer
    REGISTER     worker, scheduler      (join a run)                             -                       VIEW, to all
    PULL         worker, server         key start size clock                     -                       VALUES
    PULL_ROWS    worker, server         key size clock                           rows (size,) int64      VALUES
    VALUES       server, worker         key start size clock stamp               values                  -
    PUSH         worker, server         key start size clock stamp weight        values                  ACK
    PUSH_ROWS    worker, server         key size clock stamp weight              rows int64, values      ACK
    ACK          server, worker         clock start (1: taken, 0: dropped)       -                       -
    CLOCK        worker, scheduler      clock size (samples) weight (seconds)    -                       DEAL
    DEAL         scheduler, worker      clock stamp (epoch) start size           -                       -
    BARRIER      worker, scheduler      key (label) size stamp (next epoch)      numbers (size,) f64     RELEASE
    RELEASE      scheduler, worker      start (this worker of) size (workers)    sums f64                -
    HEARTBEAT    anyone, scheduler      clock                                    -                       ACK, to servers
    LEAVE        worker, scheduler      clock weight (seconds waited)            -                       ACK
    VIEW         scheduler, all         stamp (its number)                       see membership.py       ACK, of servers
    FORWARD      server, next in chain  key number clock size stamp weight       see replication.py      REPLICATED
    REPLICATED   server, the one before key number stamp                         -                       -
    STOP         scheduler, server      size (1: that is all)                    -                       VALUES, STATS
    STATS        server, scheduler      -                                        figures int64           -
    REFUSED      anyone                 start (a code)                           why, UTF-8              -

number   counts a rank's requests; an answer has its request's
clock    how many steps the worker has done; of VALUES and ACK, the one that the server is at
stamp    of VALUES, the version: how many updates the values have had; of PUSH, the version the
         gradient was taken at; between servers, the sender's view
weight   samples behind a gradient, or seconds
start, size  elements of the key, or rows; size 0 in a PUSH: no gradient this time

Nothing here is unpickled or evaluated. What is not understood is refused, and the sender raises `Refused`.

Source  Li et al. 2014, "Scaling distributed machine learning with the parameter server" (OSDI), section 3
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple

MAGIC, VERSION = 0x6D64, 1  # "md", and the version of this layout
HEADER = struct.Struct("<HBBHBxqqqqqdq")
NBYTES = HEADER.size
LARGEST = 1 << 62  # what a field stays below
LONGEST_BODY = 1 << 30  # bytes; what MPI can count in one message


class Kind:
    """What a message asks for, or says. (Plain numbers: they are compared for every message.)"""

    REGISTER = 1
    PULL = 2
    PULL_ROWS = 3
    VALUES = 4
    PUSH = 5
    PUSH_ROWS = 6
    ACK = 7
    CLOCK = 8
    DEAL = 9
    BARRIER = 10
    RELEASE = 11
    HEARTBEAT = 12
    LEAVE = 13
    VIEW = 14
    FORWARD = 15
    REPLICATED = 16
    STOP = 17
    STATS = 18
    REFUSED = 19


NAMES = {number: name.lower().replace("_", " ") for name, number in vars(Kind).items() if name.isupper()}


class Message(NamedTuple):
    """A header, in the order of its layout."""

    magic: int
    version: int
    kind: int
    key: int
    dtype: int  # of the body's values: the code of NumPy's character, ord("f") for float32
    number: int
    clock: int
    start: int
    size: int
    stamp: int
    weight: float
    length: int  # bytes of the body

    @property
    def name(self) -> str:
        return NAMES[self.kind]


class Code(IntEnum):
    """Why a message is refused."""

    NOT_UNDERSTOOD = 1
    UNKNOWN_KEY = 2
    WRONG_LENGTH = 3
    WRONG_DTYPE = 4
    CLOSED = 5
    NO_ROLE = 6
    EXPELLED = 7
    OVER = 8


class Refused(ValueError):
    """Another rank has refused a message of ours, and says why."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Expelled(Refused):
    """This rank was not heard of for too long; the others go on without it. It may join again."""


class RunOver(Refused):
    """This rank was taken for dead, and the others have finished without it."""


def refusal(code: int, text: str) -> Refused:
    """The exception for a REFUSED with this code."""
    return {Code.EXPELLED: Expelled, Code.OVER: RunOver}.get(code, Refused)(code, text)  # type: ignore[call-overload]


def unpack(data: Any, at: int) -> Message:
    """The header that begins at byte `at` of some memory.

    Errors  Refused: it is no header of this version
    """
    if len(data) - at < NBYTES:
        raise Refused(Code.NOT_UNDERSTOOD, f"a message of {len(data) - at} bytes, shorter than a header of {NBYTES}")
    message = Message._make(HEADER.unpack_from(data, at))
    if message.magic != MAGIC or message.version != VERSION:
        raise Refused(
            Code.NOT_UNDERSTOOD,
            f"a message marked {message.magic:#06x} version {message.version}; expected {MAGIC:#06x} version {VERSION}",
        )
    if message.kind not in NAMES:
        raise Refused(Code.NOT_UNDERSTOOD, f"a message of the unknown kind {message.kind}")
    return message


def check(message: Message) -> None:
    """Errors  Refused: a field that is out of its range, whatever the kind"""
    if not 0 <= message.length <= LONGEST_BODY:
        raise Refused(Code.WRONG_LENGTH, f"a body of {message.length} bytes; 0 to {LONGEST_BODY} are possible")
    numbers = message[5:10]
    if min(numbers) < 0 or max(numbers) >= LARGEST:
        fields = ", ".join(f"{name} {value}" for name, value in zip(Message._fields[5:10], numbers))
        raise Refused(
            Code.WRONG_LENGTH, f"{message.name} (key {message.key}) with {fields}: they are 0 to {LARGEST - 1}"
        )
    if not 0 <= message.weight < LARGEST:
        raise Refused(Code.WRONG_LENGTH, f"{message.name} (key {message.key}) with the weight {message.weight}")
