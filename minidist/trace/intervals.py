"""Stretches of time as sets: union, intersection, difference, and how much of them lies in others. Exact integers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Intervals:
    """Disjoint half-open intervals [start, end), in order.

    Intervals(starts, ends) of any: they may overlap, and what is empty or ends before it starts is left out.
    a | b, a & b, a - b, and a.within(starts, ends): how much of each [start, end) is in a.
    """

    __slots__ = ("starts", "ends", "_sums")

    def __init__(self, starts: Iterable[int] = (), ends: Iterable[int] = ()):
        begin, end = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        keep = end > begin
        self.starts, self.ends = _covered([(begin[keep], end[keep])], 1)
        self._sums = np.concatenate([[0], np.cumsum(self.ends - self.starts)])

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals(np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, other.ends]))

    def __and__(self, other: Intervals) -> Intervals:
        return Intervals(*_covered([(self.starts, self.ends), (other.starts, other.ends)], 2))

    def __sub__(self, other: Intervals) -> Intervals:
        # Whatever is in self and in `other` counts 2, and in `other` alone 1: so count self twice, other minus once.
        return Intervals(*_covered([(self.starts, self.ends), (other.ends, other.starts)], 1))

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        return f"Intervals({self.starts.tolist()}, {self.ends.tolist()})"

    @property
    def total(self) -> int:
        return int(self._sums[-1])

    def within(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How much of each [start, end) is covered."""
        return self._until(ends) - self._until(starts)

    def _until(self, times: np.ndarray) -> np.ndarray:
        """How much is covered before each of these times."""
        if not len(self):
            return np.zeros(len(times), np.int64)
        i = np.searchsorted(self.starts, times, side="right")  # so many begin at or before it
        last = np.maximum(i - 1, 0)
        over = np.where(i > 0, np.maximum(self.ends[last] - times, 0), 0)  # of the last of them, what comes after
        return self._sums[i] - over


def _covered(pairs: list[tuple[np.ndarray, np.ndarray]], least: int) -> tuple[np.ndarray, np.ndarray]:
    """Where at least so many of the intervals overlap. One whose ends are swapped counts as minus one."""
    ups = np.concatenate([up for up, _ in pairs])
    downs = np.concatenate([down for _, down in pairs])
    times = np.concatenate([ups, downs])
    changes = np.concatenate([np.ones(len(ups), np.int64), -np.ones(len(downs), np.int64)])
    order = np.argsort(times, kind="stable")
    times, depth = times[order], np.cumsum(changes[order])
    # Of equal times only the last one's depth lasts.
    lasts = np.flatnonzero(np.diff(times, append=times[-1:] + 1))
    times, inside = times[lasts], depth[lasts] >= least
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    bounds = times[edges]
    return bounds[0::2], bounds[1::2]
