"""Columns that are small once compressed: what repeats becomes a number, and times become differences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np


class Codes:
    """Numbers for things that repeat: codes(things) -> a number for each; `entries` are the things, in their order."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, things: Iterable[Hashable]) -> list[int]:
        numbers = self._numbers
        return [numbers.setdefault(thing, len(numbers)) for thing in things]

    @property
    def entries(self) -> list[Any]:
        return list(self._numbers)


def differences(numbers: np.ndarray) -> list[int]:
    """The first, then what is to be added for each next one."""
    return np.diff(numbers, prepend=0).tolist()


def spans(starts: np.ndarray, ends: np.ndarray, zero: int, *others: list[int]) -> list[list[int]]:
    """Columns of stretches of time, in the order of their starts: differences of the starts, lengths, and others."""
    order = np.lexsort((starts - ends, starts))  # of those that begin together, the longest first
    listed = order.tolist()
    return [
        differences(starts[order] - zero),
        (ends - starts)[order].tolist(),
        *([column[i] for i in listed] for column in others),
    ]
