"""Checked mode (MINIDIST_CHECK=1): before each collective the ranks compare what they were called with.

Ranks that call different operations, or the same with different arguments, otherwise wait for ever, or exchange
nonsense. Here every rank tells every other its claim: the operation, its arguments that must be equal (array shape and
dtype, op, root, algorithm, counts) and the line of the program. If the claims differ, Mismatch is raised on all ranks.
The line counts too: branches that call the same collective from two lines are told as well. An argument that is
refused on one rank is refused on all of them.

So starting an operation waits for all ranks here, also with async_op=True.

A claim travels as int64 and UTF-8 bytes in a fixed layout. Cost: P - 1 messages of 1 KiB a rank, before each operation.
"""

from __future__ import annotations

import functools
import re
import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from ..comm.base import Communicator
from ..comm.status import place_in
from ..comm.where import shortened
from .lane import Lane

TAG = 32200
FOLDERS = r"[^ ]*[/\\]"  # of a path in a text
WHAT, PLACE = 640, 360  # bytes of text; longer ones are cut, their check sums still tell them apart

P = ParamSpec("P")
T = TypeVar("T")


class Mismatch(RuntimeError):
    """In checked mode: ranks called different collectives, or one with different arguments, or one's were refused."""


class Claim(NamedTuple):
    """What one rank says of its call."""

    refused: int  # 1: its arguments were refused, and `what` says why
    check_sum: int  # of the whole texts
    what: str
    place: str

    def to_bytes(self) -> np.ndarray:
        """Shapes  -> (16 + WHAT + PLACE,) uint8"""
        numbers = np.array([self.refused, self.check_sum], np.int64).tobytes()
        return np.frombuffer(numbers + _padded(self.what, WHAT) + _padded(self.place, PLACE), np.uint8).copy()

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> Claim:
        """The opposite."""
        refused, check_sum = data[:16].view(np.int64)
        what, place = data[16 : 16 + WHAT].tobytes(), data[16 + WHAT :].tobytes()
        return cls(int(refused), int(check_sum), _text(what), _text(place))


def _padded(text: str, length: int) -> bytes:
    return text.encode()[:length].ljust(length, b"\0")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="ignore")


def claim(what: str, refused: bool = False) -> Claim:
    """This rank's claim; the place is the program's line that called the collective.

    Folders count for nothing: ranks may have other working directories, and hosts other ones to install in.
    """
    place = place_in(sys._getframe(1))
    return Claim(int(refused), zlib.crc32(f"{what}\0{re.sub(FOLDERS, '', place)}".encode()), what, place)


def compare(lane: Lane, kind: str, **arguments: Any) -> None:
    """Before an operation, whose lane has been made: make sure that all ranks are about to start the same.

    Errors  Mismatch: they are not
    """
    agree(lane.comm, kind, claim(f"{kind}({', '.join(f'{name}={value}' for name, value in arguments.items())})"))


def agree(comm: Communicator, kind: str, mine: Claim) -> None:
    """Tell all ranks, hear all ranks, and compare.

    Errors  Mismatch, on every rank but the one whose arguments were refused
    """
    comm.agreements += 1
    # 1. Everyone's claim goes to everyone.
    data = mine.to_bytes()
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    rows = {rank: np.empty_like(data) for rank in others}
    entry = comm.record.begin(f"compare before {kind}", comm, None, data, TAG)
    try:
        pending = [comm._irecv(rows[rank], rank, TAG) for rank in others]
        pending += [comm._isend(data, rank, TAG) for rank in others]
        for request in pending:
            request.wait()
    finally:
        comm.record.end(entry)
    claims = {rank: mine if rank == comm.rank else Claim.from_bytes(rows[rank]) for rank in range(comm.size)}

    # 2. Whoever was refused anything raises that himself; the others tell it.
    refused = [rank for rank, other in claims.items() if other.refused]
    if mine.refused:
        return
    if refused:
        told = [f"rank {rank} (at {claims[rank].place}): {claims[rank].what}" for rank in refused]
        raise Mismatch(f"refused on {_ranks(refused)} of {comm.size}, and so on all:\n  " + "\n  ".join(told))

    # 3. All must say the same.
    groups: dict[int, list[int]] = {}
    for rank, other in claims.items():
        groups.setdefault(other.check_sum, []).append(rank)
    if len(groups) > 1:
        told = [f"{_ranks(r)}: {claims[r[0]].what}\n    at {claims[r[0]].place}" for r in groups.values()]
        raise Mismatch(
            f"collective {comm.agreements} of this communicator of {comm.size} ranks differs between them:\n  "
            + "\n  ".join(told)
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {shortened(ranks)}"


def refused_on_all(operation: Callable[P, T]) -> Callable[P, T]:
    """Make an operation whose arguments are refused on one rank, before it has agreed on anything, tell the others."""

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        comm: Any = args[0] if args else kwargs["comm"]
        if not comm.checked:
            return operation(*args, **kwargs)
        before = comm.agreements
        try:
            return operation(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if comm.agreements == before:
                lane = Lane(comm)  # all ranks count the same operations
                agree(lane.comm, operation.__name__, claim(f"{type(error).__name__}: {error}", refused=True))
            raise

    return call
