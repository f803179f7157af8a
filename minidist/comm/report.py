"""What the simulator says when a program is wrong: the circle of a deadlock, and messages nobody received."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .where import describe, describe_stack

if TYPE_CHECKING:
    from .mailbox import Mailboxes
    from .simulated import Scheduler

LONGEST = 20  # lines of a list that are printed; a thousand ranks would bury the message


class Deadlock(RuntimeError):
    """No rank can go on: each waits for another, or for one that has finished."""


class LostMessages(RuntimeError):
    """All ranks have finished, but something was sent that nobody received, or a receive was never finished."""


def deadlock_text(scheduler: Scheduler) -> str:
    """Who waits for whom: first the circle, if there is one, then the ranks that wait on top of it."""
    # 1. An edge per waiting rank, to the first rank it waits for (a split can wait for several).
    waits = {rank.number: wait for rank in scheduler.ranks if (wait := rank.waiting or rank.testing) is not None}
    target = {number: wait.waits_for()[0] for number, wait in waits.items()}

    # 2. With one edge each, following them either runs into a circle or out to a rank that has finished.
    circle: list[int] = []
    for start in waits:
        path: list[int] = []
        while start in target and start not in path:
            path.append(start)
            start = target[start]
        if start in path:
            circle = path[path.index(start) :]
            break

    # 3. In words.
    def line(number: int) -> str:
        rank, to = scheduler.ranks[number], target[number]
        verb = "waits" if rank.waiting is not None else "tests in vain"
        whom = "itself" if to == number else f"rank {to}"
        ended = ", which has finished" if scheduler.ranks[to].finished else ""
        place = describe_stack(scheduler.stack_of(rank))
        return f"  rank {number} {verb} for {whom}{ended}: {waits[number].describe()}\n    at {place}"

    others = [number for number in waits if number not in circle]
    text = ["no rank can go on"]
    if circle:
        text += [f"A circle of {len(circle)}:", *_first_lines([line(number) for number in circle])]
    if others:
        text += ["Also waiting:" if circle else "Waiting:", *_first_lines([line(number) for number in others])]
    return "\n".join(text)


def lost_text(mailboxes: Mailboxes) -> str:
    """Every message left in a mailbox and every receive left open."""
    messages = [
        f"  rank {source} -> rank {dest}, tag {tag}, {data.nbytes} bytes ({data.dtype}[{data.size}]), "
        f"sent at {describe(place)}"
        for dest, channels in enumerate(mailboxes.channels)
        for (_, source, tag), channel in channels.items()
        for data, place in channel.messages
    ]
    receives = [
        f"  rank {rank}: {receive.describe()}, posted at {describe(receive.place)}"
        for rank, pending in enumerate(mailboxes.open_receives)
        for receive in pending
    ]
    text = []
    if messages:
        text += [f"messages sent but never received: {len(messages)}", *_first_lines(messages)]
    if receives:
        text += [f"receives started but never finished: {len(receives)}", *_first_lines(receives)]
    return "\n".join(text)


def _first_lines(lines: list[str]) -> list[str]:
    left_out = len(lines) - LONGEST
    return lines[:LONGEST] + ([f"  and {left_out} more"] if left_out > 0 else [])
