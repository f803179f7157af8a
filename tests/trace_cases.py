"""Traces for tests: written by hand, row by row, or as long as one wants, by a rule."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Row = list[Any]


def header(rank: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "format": "minidist trace",
        "version": 1,
        "rank": rank,
        "size": size,
        "host": 0,
        "hostname": "here",
        "virtual": False,
        "device": "cpu",
        "started": 1_750_000_000.0,
        "program": "mnist",
        "schedule": None,
        **more,
    }


def write(folder: Path, ranks: list[list[Row]], **more: Any) -> Path:
    """A trace of these rows of each rank; the world's row "G" and a clock that needs no change come by themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    size = len(ranks)
    for rank, rows in enumerate(ranks):
        rows = [["G", "0", list(range(size))], *rows]
        if not any(row[0] == "A" for row in rows):
            rows.append(["A", 0, 0])
        text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))[1:-1].replace("],[", "]\n[")  # a row a line
        head = json.dumps(header(rank, size, **more))
        (folder / f"rank-{rank:04}.jsonl").write_text(f"{head}\n{text}\n", "utf-8")
    return folder


def ring_run(
    size: int = 4,
    steps: int = 8,
    nbytes: int = 3_256_360,
    layers: int = 2,
    drift: int = 0,
    evaluate: int = 0,
    jitter: int = 0,
) -> list[list[Row]]:
    """The rows of every rank of a data-parallel run: forward, backward, a ring all-reduce, update; each step.

    Rank r computes r % 3 * 20 % longer than rank 0, so that the others wait for it. Times are whole: a message takes
    100 microseconds. The all-reduce begins before backward's last layer, which hides some of it.
    drift     rank r's clock is r * drift behind at the beginning, and 2 r * drift at the end
    evaluate  an accuracy every so many steps
    jitter    each stretch of computing takes up to so many nanoseconds longer, by chance
    """
    us, chunk, chance = 1000, nbytes // size, random.Random(0)
    ranks: list[list[Row]] = [[] for _ in range(size)]
    now = [5 * us * rank for rank in range(size)]
    begin = max(now)
    for step in range(steps):
        start, enter, hidden_end = now.copy(), [0] * size, [0] * size
        for r in range(size):
            slow, t, rows = 10 + 2 * (r % 3), now[r], ranks[r]
            for layer in range(layers):
                took = 20 * us * slow + chance.randint(0, jitter)
                rows.append(["C", "forward", str(2 * layer), "D.3(3) train", t, t + took])
                t += took
            rows.append(["C", "forward", "loss", "D.3(3) train", t, t + 2 * us * slow])
            t += 2 * us * slow
            for layer in reversed(range(layers)):
                if layer == 0:
                    enter[r] = t
                took = 30 * us * slow + chance.randint(0, jitter)
                rows.append(["C", "backward", str(2 * layer), "D.3(3) train", t, t + took])
                t += took
            rows.append(["L", "D.3(3) train on its own share", 0, start[r], t])
            hidden_end[r] = t
        # The ring: 2 (P - 1) rounds, each of which can begin when both neighbours are ready.
        ready = enter.copy()
        for _ in range(2 * (size - 1)):
            ends = [max(ready[r], ready[(r - 1) % size]) + 100 * us for r in range(size)]
            for r in range(size):
                right, left = (r + 1) % size, (r - 1) % size
                ranks[r].append(["M", "s", "0", right, 7, chunk, ready[r], ends[(r + 1) % size]])
                ranks[r].append(["M", "r", "0", left, 7, chunk, ready[r], ends[r]])
                if ends[r] > max(ready[r], hidden_end[r]):
                    ranks[r].append(["W", max(ready[r], hidden_end[r]), ends[r]])
            ready = ends
        for r in range(size):
            t, rows = max(ready[r], hidden_end[r]), ranks[r]
            words = "D.3(4) average gradients, bucket 1"
            row = ["O", step + 1, "all_reduce ring", "0", None, nbytes, "float32", 0, words, enter[r], t]
            rows.append(row)
            rows.append(["L", "D.3(4) average gradients", 0, hidden_end[r], t])
            rows.append(["C", "update", "", "D.3(4) update", t, t + 60 * us])
            now[r] = t + 60 * us
            rows.append(["S", step, start[r], now[r]])
            rows.append(["V", "loss", 2.3 / (1 + 0.1 * step) + 0.01 * r, now[r]])
            if evaluate and step % evaluate == evaluate - 1 and r == 0:
                rows.append(["V", "accuracy", 1 - 0.9 / (1 + 0.2 * step), now[r]])
            now[r] += 15 * us
    for r, rows in enumerate(ranks):
        rows.append(["I", "D.1", f"{60_000:,} samples dealt uniformly", begin])
        for name, count in (("parameters", 1), ("gradients", 1), ("optimizer", 2), ("activations", 0.4)):
            rows.append(["V", f"memory {name}", nbytes * count, now[r]])
        if drift:
            _let_drift(rows, r * drift, 2 * r * drift, max(now))
    return ranks


TIMES = {"C": (4, 5), "O": (9, 10), "M": (6, 7), "W": (1, 2), "L": (3, 4), "I": (3,), "V": (3,), "S": (2, 3)}


def _let_drift(rows: list[Row], first: int, last: int, end: int) -> None:
    """Write times of rank 0's clock, 0 … end, as a clock shows them that is `first` behind, and `last` at the end."""
    rate = (end - (last - first)) / end
    for row in rows:
        for i in TIMES[row[0]]:
            row[i] = round(row[i] * rate) - first
    rows[:0] = [["A", -first, first], ["A", round(end * rate) - first, last]]
