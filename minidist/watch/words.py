"""Sets of ranks, and other things, in few letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby


def listed(items: Sequence[object]) -> str:
    """ "0", "0 and 1", "0, 1 and 2"."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def ranks_in_words(ranks: Iterable[int]) -> str:
    """ "rank 0", "ranks 0, 1 and 2", "ranks 0 to 5 and 7"."""
    runs = [f"{a} to {b}" if b - a > 2 else None if b > a else str(a) for a, b in _runs(ranks)]
    parts = [
        part
        for run, (a, b) in zip(runs, _runs(ranks))
        for part in ([run] if run else [str(rank) for rank in range(a, b + 1)])
    ]
    return f"rank{'s' * (len(set(ranks)) > 1)} {listed(parts)}"


def sum_in_letters(ranks: Iterable[int], room: int, all_ranks: int) -> str:
    """Whose sum it is: "0+1+2"; where that does not fit in so many letters, "0–2", "0–2+5", "4 of 8"."""
    numbers = sorted(ranks)
    plain = "+".join(map(str, numbers))
    short = "+".join(f"{a}–{b}" if b - a > 1 else f"{a}+{b}" if b > a else str(a) for a, b in _runs(numbers))
    for text in (plain, short):
        if len(text) <= room:
            return text
    return f"{len(numbers)}/{all_ranks}"


def _runs(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """The stretches of successive numbers, each as (first, last)."""
    runs = []
    for _, group in groupby(enumerate(sorted(set(ranks))), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        runs.append((numbers[0], numbers[-1]))
    return runs


def amount(number: int, what: str) -> str:
    """ "1 message", "2 messages"."""
    return f"{number} {what}{'s' * (number != 1)}"
