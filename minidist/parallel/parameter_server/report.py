"""What a run with a parameter server was like: staleness, waiting, bytes, and who died."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Event(NamedTuple):
    """Somebody died or joined."""

    rank: int
    role: str  # "worker" or "server"
    seconds: float  # since the run began
    clock: int
    how: str


@dataclass
class Report:
    """One run.

    staleness   of each gradient that was applied: how many updates the values had had since they were pulled. (In
                rounds 0, of each worker's part, also where it had no samples)
    lag         of each pull: how many clocks its worker was ahead of the slowest
    dropped     gradients that came after their round had closed
    waited      of each worker, seconds in which it waited for values, its share or a barrier
    samples     of each worker, how many it has trained on; clocks: how many steps it made
    received, sent  bytes, of each server
    """

    consistency: str
    seconds: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)
    lag: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    waited: dict[int, float] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    clocks: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    deaths: list[Event] = field(default_factory=list)
    joined: list[Event] = field(default_factory=list)

    def take(self, server: int, figures: np.ndarray) -> None:
        """A server's figures, as it sends them."""
        self.received[server], self.sent[server], dropped, stale, lags = map(int, figures[:5])
        self.dropped += dropped
        pairs = figures[5:].reshape(-1, 2).tolist()
        for histogram, part in ((self.staleness, pairs[:stale]), (self.lag, pairs[stale : stale + lags])):
            for value, count in part:
                histogram[value] += count

    @property
    def mean_staleness(self) -> float:
        return sum(value * count for value, count in self.staleness.items()) / max(self.staleness.total(), 1)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        histograms = {name: dict(sorted(getattr(self, name).items())) for name in ("staleness", "lag")}
        events = {name: [event._asdict() for event in getattr(self, name)] for name in ("deaths", "joined")}
        rest = ("dropped", "waited", "samples", "clocks", "received", "sent")
        return {**histograms, **{name: getattr(self, name) for name in rest}, **events}

    def in_words(self) -> str:
        """A few lines."""
        most = sum(self.staleness.values())
        common = ", ".join(f"{value}: {count / most:.0%}" for value, count in sorted(self.staleness.items())[:8])
        lines = [
            f"staleness       {self.mean_staleness:.2f} updates in the mean ({common or 'no update'})"
            + (f"; {self.dropped} gradients came too late" if self.dropped else ""),
            "waiting         " + ", ".join(f"rank {rank} {s:.1f} s" for rank, s in sorted(self.waited.items())),
            "servers         "
            + ", ".join(
                f"rank {rank} received {self.received[rank] / 1e6:,.1f} MB, sent {self.sent[rank] / 1e6:,.1f} MB"
                for rank in sorted(self.received)
            ),
        ]
        return "\n".join(lines + ([events] if (events := self.events()) else []))

    def events(self) -> str:
        """Who died and who joined, a line each."""
        lines = []
        for event in self.deaths:
            who = f"{event.role} rank {event.rank} at {event.seconds:.1f} s, clock {event.clock}"
            lines.append(f"died            {who}: {event.how}")
        for event in self.joined:
            lines.append(
                f"joined          {event.role} rank {event.rank} at {event.seconds:.1f} s, from clock {event.clock}"
            )
        return "\n".join(lines)
