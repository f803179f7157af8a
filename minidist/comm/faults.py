"""What can go wrong in a simulation: ranks that die, hang or slow down, messages that come late or not at all.

    faults = [Kill(2, message=3), Delay(0.5, rank=0, dest=1)]
    run = simulate(program, 4, faults=faults)
    run.struck  # which of them have struck, and when
    run.gone  # [2]

A fault strikes at a virtual time, before anything else that happens then, or just before the n-th message of a rank
leaves, counted from 1 over all its communicators, collectives included. The latter reaches every point of a protocol
even where nothing costs time. A run with faults repeats as any other does: same seed, same faults, same run.

A rank that is gone, killed or hanging for ever, is not waited for: the simulation ends when all others have finished.
To these it makes no difference which of the two it is. What it sent before still arrives, but a rendezvous message not
before its receive is posted, so after that it never leaves. What is sent to it is dropped: an eager send succeeds, a
rendezvous send is never done. Nobody is told: who waits for it without a timeout is in a Deadlock.

How they strike is in injection.py.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args


@dataclass(frozen=True)
class Kill:
    """A rank dies, as by kill -9: from then on nothing it does has an effect.

    Its `finally` clauses run, since it is ended by an exception, but it communicates no more; its result is None.
    """

    rank: int
    at: float | None = None  # seconds of virtual time
    message: int | None = None  # or: instead of sending this message

    def __post_init__(self) -> None:
        _check_rank(self, "rank")
        _check_moment(self, needed=True)


@dataclass(frozen=True)
class Hang:
    """A rank stands still for so long, as by SIGSTOP, and then goes on: its clock has moved, its timeouts have passed.

    Messages to it wait in its mailbox meanwhile, and those that are under way arrive. Work takes so much longer.
    """

    rank: int
    at: float | None = None
    message: int | None = None  # just before this message leaves
    seconds: float = math.inf  # inf: it never goes on

    def __post_init__(self) -> None:
        _check_rank(self, "rank")
        _check_moment(self, needed=True)
        _check_duration(self)


@dataclass(frozen=True)
class Slow:
    """A rank's work (`elapse` and `reduced`) takes `factor` times as long while it lasts; messages do not.

    Several at once multiply.
    """

    rank: int
    factor: float
    at: float | None = None  # None, and no message given: from the start
    message: int | None = None
    seconds: float = math.inf

    def __post_init__(self) -> None:
        _check_rank(self, "rank")
        _check_moment(self)
        _check_duration(self)
        if not (_is_number(self.factor) and 1 <= self.factor < math.inf):
            raise ValueError(f"{self}: expected a factor of 1 or more")


@dataclass(frozen=True)
class Delay:
    """Messages from `rank` to `dest` arrive so much later. They hold no port for longer.

    A message never overtakes an earlier one of its communicator, source and tag: it arrives with it at the soonest. A
    rendezvous message leaves when its receive is posted; that moment counts.
    """

    seconds: float
    rank: int | None = None  # None: any
    dest: int | None = None  # None: any
    message: int | None = None  # only this one of them, counted from 1 as they leave; None: every one
    at: float = 0.0  # only those that leave from then on,
    until: float = math.inf  # and before then

    def __post_init__(self) -> None:
        if not (_is_number(self.seconds) and 0 < self.seconds < math.inf):
            raise ValueError(f"{self}: expected seconds above 0, and finite ones (a Partition loses messages)")
        for name in ("rank", "dest"):
            if getattr(self, name) is not None:
                _check_rank(self, name)
        _check_moment(self, both=True)
        if not (_is_number(self.until) and self.at < self.until):
            raise ValueError(f"{self}: expected until to be later than at")


@dataclass(frozen=True)
class Partition:
    """Nothing gets through between `ranks` and all others while it lasts. What was sent before still arrives.

    What is sent meanwhile leaves anew when it ends, as TCP sends again; if it does not end, it is lost: a rendezvous
    send is then never done. (`split` needs no messages in a simulation, and is not kept from ending.)
    """

    ranks: Sequence[int]
    at: float | None = None  # None, and no message given: from the start
    message: int | None = None  # just before this message of the first of `ranks` leaves
    seconds: float = math.inf

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "ranks", tuple(operator.index(rank) for rank in self.ranks))
        except TypeError:
            raise ValueError(f"{self}: expected several ranks' numbers") from None
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"{self}: expected at least one rank, numbers from 0 up, each of them once")
        _check_moment(self)
        _check_duration(self)


Fault = Kill | Hang | Slow | Delay | Partition


class Strike(NamedTuple):
    """A fault that has had its moment."""

    fault: Fault
    seconds: float  # when, in virtual time


def ranks_of(fault: Fault) -> list[int]:
    """The ranks that a fault names."""
    if isinstance(fault, Partition):
        return list(fault.ranks)
    if isinstance(fault, Delay):
        return [rank for rank in (fault.rank, fault.dest) if rank is not None]
    return [fault.rank]


def check_faults(faults: Sequence[Fault], size: int) -> None:
    """Errors  ValueError: one is no fault, or names a rank that a world of `size` ranks does not have"""
    for fault in faults:
        if not isinstance(fault, Fault):
            raise ValueError(f"{fault!r} is no fault: choose {', '.join(kind.__name__ for kind in get_args(Fault))}")
        if max(ranks_of(fault), default=0) >= size:
            raise ValueError(f"{fault}: the ranks are 0 to {size - 1}")


def plan(
    seed: int,
    size: int,
    count: int,
    *,
    seconds: float = 1.0,
    messages: int = 100,
    among: Sequence[int] | None = None,
    kinds: Sequence[type[Fault]] = get_args(Fault),
    by: Sequence[str] = ("time", "message"),
    forever: float = 0.5,
) -> tuple[Fault, ...]:
    """`count` random faults for a world of `size` ranks. The same arguments give the same faults.

    They strike the ranks `among` (None: any), and are of these `kinds`. About half (see `by`) strike at a time below
    `seconds`, half at one of a rank's first `messages` messages. A share `forever` of the hangs, slowdowns and
    partitions never ends; the others, and delays, last up to `seconds`.

    Errors  ValueError: a choice of nothing, or numbers out of range
    """
    among = tuple(range(size)) if among is None else tuple(among)
    if not among or not kinds or not set(kinds) <= set(get_args(Fault)):
        raise ValueError(f"among={among}, kinds={kinds}: expected ranks, and kinds of faults, to choose from")
    if not by or not set(by) <= {"time", "message"}:
        raise ValueError(f"by={by}: expected 'time', 'message' or both")
    if not (0 < seconds < math.inf and messages >= 1 and count >= 0):
        raise ValueError(f"count={count}, seconds={seconds}, messages={messages}: expected 0, above 0, and 1 or more")
    draw = random.Random(seed)

    def moment() -> dict[str, Any]:
        if draw.choice(by) == "time":
            return {"at": draw.uniform(0, seconds)}
        return {"message": draw.randint(1, messages)}

    def duration() -> float:
        return math.inf if draw.random() < forever else some_seconds()

    def some_seconds() -> float:
        return seconds * (1 - draw.random())  # never 0

    faults: list[Fault] = []
    for _ in range(count):
        kind, rank = draw.choice(kinds), draw.choice(among)
        if kind is Kill:
            faults.append(Kill(rank, **moment()))
        elif kind is Hang:
            faults.append(Hang(rank, **moment(), seconds=duration()))
        elif kind is Slow:
            faults.append(Slow(rank, draw.uniform(1, 10), **moment(), seconds=duration()))
        elif kind is Delay:
            faults.append(Delay(some_seconds(), rank, draw.choice((None, *range(size))), **moment()))
        else:
            ranks = draw.sample(among, draw.randint(1, len(among)))
            faults.append(Partition(ranks, **moment(), seconds=duration()))
    check_faults(faults, size)
    return tuple(faults)


# -- checks -------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _check_rank(fault: Any, name: str) -> None:
    rank = getattr(fault, name)
    if not (hasattr(rank, "__index__") and operator.index(rank) >= 0):
        raise ValueError(f"{fault}: expected {name} to be a rank's number, 0 or more")


def _check_moment(fault: Any, needed: bool = False, both: bool = False) -> None:
    """`at` is a time and `message` a count, of which one at most is given; one is `needed`, or `both` may be."""
    at, message = fault.at, fault.message
    if at is not None and not (_is_number(at) and 0 <= at < math.inf):
        raise ValueError(f"{fault}: expected at to be a number of seconds, 0 or more")
    if message is not None and not (hasattr(message, "__index__") and operator.index(message) >= 1):
        raise ValueError(f"{fault}: expected message to be a number, counted from 1")
    if needed and at is None and message is None:
        raise ValueError(f"{fault}: say when, by at or message")
    if not both and at is not None and message is not None:
        raise ValueError(f"{fault}: give at or message, not both")


def _check_duration(fault: Any) -> None:
    if not (_is_number(fault.seconds) and fault.seconds > 0):
        raise ValueError(f"{fault}: expected seconds above 0 (math.inf: for ever)")
