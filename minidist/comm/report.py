"""What the simulator says when a program is wrong: the circle of a deadlock, and messages nobody received."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from .record import DIRECTIONS, Operation
from .where import describe, describe_stack

if TYPE_CHECKING:
    from .agenda import Rank, Wait
    from .faults import Strike
    from .mailbox import Mailboxes

T = TypeVar("T")

LONGEST = 20  # lines of a list that are printed; a thousand ranks would bury the message


class Deadlock(RuntimeError):
    """No rank can go on: each waits for another, or for one that has finished."""


class LostMessages(RuntimeError):
    """All ranks have finished, but something was sent that nobody received, or a receive was never finished."""


def deadlock_text(
    ranks: Sequence[Rank], stack_of: Callable[[Rank], FrameType | None], struck: Sequence[Strike] = ()
) -> str:
    """Who waits for whom: first the circle, if there is one, then the ranks that wait on top of it; then the faults."""
    # 1. An edge per waiting rank, to the first rank it waits for (a split can wait for several), or one that is gone.
    waits = {
        rank.number: wait for rank in ranks if not rank.gone and (wait := rank.waiting or rank.testing) is not None
    }
    target = {}
    for number, wait in waits.items():
        needed = wait.waits_for()
        target[number] = next((rank for rank in needed if ranks[rank].gone), needed[0])

    # 2. With one edge each, following them either runs into a circle or out to a rank that has finished.
    circle: list[int] = []
    followed: set[int] = set()
    for number in waits:
        path: list[int] = []
        while number in target and number not in followed:
            followed.add(number)
            path.append(number)
            number = target[number]
        if number in path:
            circle = path[path.index(number) :]
            break

    # 3. In words.
    def line(number: int) -> str:
        rank, to = ranks[number], target[number]
        verb = "waits" if rank.waiting is not None else "tests in vain"
        whom = "itself" if to == number else f"rank {to}"
        ended = ", which has finished" if ranks[to].finished else ""
        if ranks[to].gone:
            ended = f", which {ranks[to].gone}"
        place = describe_stack(stack_of(rank))
        what = waits[number].describe() + _within(rank, waits[number])
        return f"  rank {number} {verb} for {whom}{ended}: {what}\n    at {place}"

    others = [number for number in waits if number not in circle]
    text = ["no rank can go on"]
    if circle:
        text += [f"A circle of {len(circle)}:", *_first_lines(circle, line)]
    if others:
        text += ["Also waiting:" if circle else "Waiting:", *_first_lines(others, line)]
    if struck:
        faults = [f"  {fault}, at {seconds:g} s" for fault, seconds in struck]
        text += ["Faults so far:", *_first_lines(faults, str)]
    return "\n".join(text)


def _within(rank: Rank, wait: Wait) -> str:
    """ ", of all_reduce ring, in step D.3(4)": the collective that a message belongs to, and the program's step."""
    if rank.record is None:
        return ""
    first = getattr(wait, "waits", [wait])[0]  # of several, the one that it waits for most of all
    group, tag, entry = (getattr(first, name, None) for name in ("comm", "tag", "entry"))
    for op in reversed(rank.record.operations() if entry is None else []):
        if op.kind not in DIRECTIONS and op.end is None and op.group is group and op.tag == tag:
            return f", of {op.kind}" + (f", in step {op.label}" if op.label else "")
    label = rank.record.label if entry is None else Operation(*entry).label
    return f", in step {label}" if label else ""


def lost_text(mailboxes: Mailboxes) -> str:
    """Every message left in a mailbox and every receive left open."""
    messages = [
        f"  rank {source} -> rank {dest}, tag {tag}, {data.nbytes} bytes ({data.dtype}[{data.size}]), "
        f"sent at {describe(place)}"
        for source, dest, tag, (data, place, _, _) in mailboxes.unreceived()
    ]
    receives = [
        f"  rank {rank}: {receive.describe()}, posted at {describe(receive.place)}"
        for rank, receive in mailboxes.unfinished()
    ]
    text = []
    if messages:
        text += [f"messages sent but never received: {len(messages)}", *_first_lines(messages, str)]
    if receives:
        text += [f"receives started but never finished: {len(receives)}", *_first_lines(receives, str)]
    return "\n".join(text)


def _first_lines(items: list[T], line: Callable[[T], str]) -> list[str]:
    left_out = len(items) - LONGEST
    return [line(item) for item in items[:LONGEST]] + ([f"  and {left_out} more"] if left_out > 0 else [])
