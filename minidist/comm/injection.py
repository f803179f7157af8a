"""How faults strike in one simulated run: `Injection`, which the scheduler and the mailboxes ask where it matters.

    when a rank goes on, and how long it works    Course, of each rank that a fault may stop or slow down
    at a fault's time                             an alarm of the scheduler
    before a message leaves                       Injection.before_send
    when a message arrives                        Injection.gets_through, Injection.arrival

A run without faults has no Injection.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .agenda import Rank
from .faults import Delay, Fault, Hang, Kill, Partition, Slow, Strike, check_faults
from .scheduler import Killed, Scheduler

if TYPE_CHECKING:
    from .mailbox import Mailboxes

Span = tuple[float, float]  # start and end of a time, without the end


class Course:
    """What faults do to one rank's time: the spans in which it stands still, and those in which it works slowly.

    Those that begin at a time are known from the start, others from the message on with which they begin: in any case
    before the rank's clock is there.
    """

    def __init__(self) -> None:
        self.stops: list[Span] = []
        self.slow: list[tuple[float, float, float]] = []  # start, end, factor

    def awake(self, time: float) -> float:
        """The first moment, from `time` on, at which the rank does not stand still; inf: never again."""
        return after(self.stops, time)

    def works_until(self, now: float, seconds: float) -> float:
        """When work of so many seconds, begun now, is done."""
        edges = [start for start, _ in self.stops] + [edge for start, end, _ in self.slow for edge in (start, end)]
        while (now := self.awake(now)) < math.inf:
            # The pace is even up to the next edge.
            factor = math.prod(factor for start, end, factor in self.slow if start <= now < end)
            change = min((edge for edge in edges if edge > now), default=math.inf)
            if now + seconds * factor <= change:
                return now + seconds * factor
            seconds = max(0.0, seconds - (change - now) / factor)
            now = change
        return now


def after(spans: list[Span], time: float) -> float:
    """The first moment, from `time` on, that is in none of the spans."""
    for start, end in sorted(spans):
        if start <= time < end:
            time = end
    return time


class Injection:
    """One run's faults."""

    def __init__(self, faults: Sequence[Fault], scheduler: Scheduler, mailboxes: Mailboxes):
        faults = tuple(faults)
        check_faults(faults, len(scheduler.ranks))
        self._scheduler, self._mailboxes = scheduler, mailboxes
        self._by_message: defaultdict[tuple[int, int], list[Fault]] = defaultdict(list)  # (rank, its n-th message)
        self._cuts: list[tuple[frozenset[int], Span]] = []
        self._delays = [fault for fault in faults if isinstance(fault, Delay)]
        self._counts = [0] * len(self._delays)  # messages that each has looked at
        # (receiver, context, source, tag): the latest arrival of a message that a fault has held up
        self._held_up: dict[tuple[int, int, int, int], float] = {}

        for fault in faults:
            if isinstance(fault, Delay):
                continue
            first = fault.ranks[0] if isinstance(fault, Partition) else fault.rank
            if fault.message is not None:
                self._by_message[first, fault.message].append(fault)
            else:
                at = fault.at or 0.0
                self._begin(fault, at)
                scheduler.alarm(at, partial(self._on_time, fault, at))

    def _begin(self, fault: Fault, now: float) -> None:
        """From `now` on, it changes what happens."""
        if isinstance(fault, Kill):
            self._course(fault.rank).stops.append((now, math.inf))
        elif isinstance(fault, Hang):
            self._course(fault.rank).stops.append((now, now + fault.seconds))
        elif isinstance(fault, Slow):
            self._course(fault.rank).slow.append((now, now + fault.seconds, fault.factor))
        elif isinstance(fault, Partition):
            self._cuts.append((frozenset(fault.ranks), (now, now + fault.seconds)))

    def _course(self, rank: int) -> Course:
        that = self._scheduler.ranks[rank]
        that.course = that.course or Course()
        return that.course

    # -- striking -------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault, now: float) -> None:
        """Its moment has come: note it, and if its rank is gone now, say so. Nothing strikes who has finished."""
        if isinstance(fault, Kill | Hang | Slow):
            rank = self._scheduler.ranks[fault.rank]
            if rank.finished or rank.gone:
                return
            if isinstance(fault, Kill):
                self._lose(rank, f"was killed at {now:g} s", now)
            elif isinstance(fault, Hang) and fault.seconds == math.inf:
                self._lose(rank, f"hangs since {now:g} s", now)
        self._scheduler.struck.append(Strike(fault, now))

    def _lose(self, rank: Rank, fate: str, now: float) -> None:
        rank.gone, rank.now = fate, now
        self._scheduler.unfinished -= 1
        self._mailboxes.withdraw(rank.number)

    def _on_time(self, fault: Fault, at: float) -> None:
        """The time `at` has come. No rank runs at this moment."""
        self._strike(fault, at)
        if isinstance(fault, Kill):
            self._scheduler.end(self._scheduler.ranks[fault.rank])

    def before_send(self, rank: Rank, number: int) -> None:
        """The rank, which runs, is about to send its n-th message."""
        faults = self._by_message.pop((rank.number, number), ())
        for fault in faults:
            self._begin(fault, rank.now)
            self._strike(fault, rank.now)
        if any(isinstance(fault, Kill) for fault in faults):
            raise Killed
        if any(isinstance(fault, Hang) for fault in faults):
            self._scheduler.stand_still(rank)

    # -- messages -------------------------------------------------------------------------------------------------

    def gets_through(self, source: int, dest: int, now: float) -> float:
        """The first moment, from now on, at which a message from one to the other gets through; inf: never."""
        if self._scheduler.ranks[dest].gone or self._scheduler.ranks[source].gone:
            return math.inf
        return after([span for ranks, span in self._cuts if (source in ranks) != (dest in ranks)], now)

    def arrival(self, dest: int, context: int, source: int, tag: int, arrival: float) -> float:
        """When a message that leaves now, and would arrive at `arrival`, does arrive; inf: never."""
        now, channel = self._scheduler.now, (dest, context, source, tag)
        # 1. Partitions: it leaves anew when they have ended.
        leaves = self.gets_through(source, dest, now)
        late = arrival if leaves == now else leaves + (arrival - now)
        # 2. Delays.
        late += sum(self._delay(index, source, dest, now) for index in range(len(self._delays)))
        # 3. It does not overtake one that has been held up.
        late = max(late, self._held_up.get(channel, 0.0))
        if late > arrival:
            self._held_up[channel] = late
        return late

    def _delay(self, index: int, source: int, dest: int, now: float) -> float:
        """What one of the delays adds to a message."""
        fault = self._delays[index]
        if fault.rank not in (None, source) or fault.dest not in (None, dest) or not fault.at <= now < fault.until:
            return 0.0
        self._counts[index] += 1
        if self._counts[index] == (fault.message or 1):
            self._scheduler.struck.append(Strike(fault, now))  # the first that it delays
        return fault.seconds if fault.message in (None, self._counts[index]) else 0.0

    def parted(self, source: int, dest: int) -> bool:
        """Whether one was gone, or hung, or was cut off from the other, and so may not know what the other knows."""
        for fault, _ in self._scheduler.struck:
            if isinstance(fault, Kill | Hang) and fault.rank in (source, dest):
                return True
            if isinstance(fault, Partition) and (source in fault.ranks) != (dest in fault.ranks):
                return True
        return False
