"""Read a trace: `read(folder)` of the files rank-0000.jsonl, rank-0001.jsonl, … that `--trace` has written.

A file's first line is its header, an object; each other line is a row, an array whose first item says the kind. Kinds
that are not known are passed over, so that older readers read newer traces of the same version.

Two things happen on the way. Times become those of rank 0's clock: rows "A" say what to add, and in between it is
interpolated, as clocks drift. And what belongs together across ranks is found (matching.py).
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .matching import match_collectives, match_messages
from .tables import CLASSES, NONE, TABLES, Clock, Rank, Trace

FORMAT, VERSION = "minidist trace", 1
NAME = "rank-{:04}.jsonl"

Rows = dict[str, list[list[Any]]]


def read(folder: str | PathLike[str]) -> Trace:
    """The trace in a folder, times aligned to rank 0's clock, messages and collectives matched.

    A rank that was killed may leave half a line at the end of its file: it is left out, and `notes` says so.

    Errors  ValueError: no trace, a file of a rank that is missing, a line that is no row; names the file and line
    """
    folder = Path(folder)
    first = folder / NAME.format(0)
    if not first.is_file():
        raise ValueError(f"{folder}: no trace: there is no {first.name}, as --trace {folder} would have written")
    notes: list[str] = []
    size = _header(first, 0, None)["size"]
    paths = [folder / NAME.format(number) for number in range(size)]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{folder}: {path.name} is missing, of {size} ranks (ranks on other hosts write there: "
                "put all files into one folder)"
            )
    with _no_garbage():
        ranks = [_rank(path, number, size, notes) for number, path in enumerate(paths)]
        messages = match_messages(ranks, notes)
        return Trace(ranks, messages, match_collectives(ranks, notes), notes)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """In here Python does not look for garbage. Among a million rows it finds none, but looks for it all the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _header(path: Path, number: int, size: int | None) -> dict[str, Any]:
    """A file's first line, checked."""
    with path.open("rb") as file:
        line = file.readline()
    if not line:
        raise ValueError(f"{path}:1: the file is empty: was the rank killed before it wrote anything?")
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{path}:1: no trace: expected a header with "format": "{FORMAT}", got {_short(line)}')
    if header.get("version") != VERSION:
        raise ValueError(f"{path}:1: version {header.get('version')!r} of the format; this reads version {VERSION}")
    if header.get("rank") != number or not isinstance(header.get("size"), int) or header["size"] < 1:
        raise ValueError(f"{path}:1: rank {header.get('rank')!r} of {header.get('size')!r}; expected rank {number}")
    if size is not None and header["size"] != size:
        raise ValueError(f"{path}:1: of a run of {header['size']} ranks; rank 0's file is of one of {size}")
    return header


def _rank(path: Path, number: int, size: int, notes: list[str]) -> Rank:
    header = _header(path, number, size)
    rows = _rows(path, notes)
    tables = {name: _table(path, CLASSES[kind].of, rows[kind]) for kind, name in TABLES.items()}
    clock: Clock = _table(path, Clock.of, rows["A"])
    if not len(clock):
        notes.append(f"rank {number}: nothing says how its clock differs from rank 0's; taken as it is")
    groups = _table(path, _groups, rows["G"])
    for kind in "OM":
        unknown = {*tables[TABLES[kind]].group} - {*groups}
        if unknown:
            raise ValueError(f'{path}: rows "{kind}" of the group {min(unknown)!r}, of which no row "G" tells')
    for kind in "OM":
        unfinished = int(np.sum(tables[TABLES[kind]].end == NONE))
        if unfinished:
            what = "operations" if kind == "O" else "messages"
            notes.append(f"rank {number}: {unfinished:,} {what} never finished")
    for name, table in tables.items():
        tables[name] = replace(table, **{time: _aligned(getattr(table, time), clock) for time in table.TIMES})
    return Rank(number, header, groups, clock=clock, **tables)


def _rows(path: Path, notes: list[str]) -> Rows:
    """A file's rows by their kind."""
    # 1. All lines but the last are whole. That one is if it ends, or else if it happens to have been cut at its end.
    body, _, rest = path.read_bytes().rpartition(b"\n")
    lines = body.split(b"\n")[1:]
    if rest and not body:
        rest = b""  # the header is all there is
    if rest:
        try:
            json.loads(rest)
            lines.append(rest)
        except ValueError:
            notes.append(f"{path.name}:{len(lines) + 2}: the last line is cut off, and left out: was the rank killed?")
    # 2. One call for all lines: ten times as fast as a call for each.
    try:
        items = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        items = None
    if items is None or len(items) != len(lines) or not all(map(_is_row, items)):
        raise ValueError(_first_wrong(path, lines))
    rows: Rows = defaultdict(list)
    for item in items:
        rows[item[0]].append(item)
    return rows


def _is_row(item: object) -> bool:
    return type(item) is list and len(item) > 0 and type(item[0]) is str


def _first_wrong(path: Path, lines: list[bytes]) -> str:
    for number, line in enumerate(lines, 2):
        try:
            right = _is_row(json.loads(line))
        except ValueError:
            right = False
        if not right:
            return f"{path}:{number}: expected an array that begins with a kind, got {_short(line)}"
    return f"{path}: not a file of arrays, one a line"


def _table(path: Path, make: Callable[[list[list[Any]]], Any], rows: list[list[Any]]) -> Any:
    """make(rows); if that fails, say which row it was."""
    try:
        return make(rows)
    except ValueError as error:
        for row in rows:
            try:
                make([row])
            except ValueError as of_row:
                raise ValueError(f"{path}:{_line_of(path, row)}: {of_row}, got {_short(json.dumps(row))}") from None
        raise ValueError(f"{path}: {error}") from None


def _line_of(path: Path, row: list[Any]) -> int:
    """Where in a file a row stands."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if number > 1 and line and json.loads(line) == row:
            return number
    return 0


def _groups(rows: list[list[Any]]) -> dict[str, tuple[int, ...]]:
    for row in rows:
        if len(row) != 3 or type(row[1]) is not str or type(row[2]) is not list or {*map(type, row[2])} != {int}:
            raise ValueError("expected a group's name and its ranks")
    return {name: tuple(members) for _, name, members in rows}


def _aligned(times: np.ndarray, clock: Clock) -> np.ndarray:
    """By rank 0's clock. Outside of the first and last rows "A" theirs hold."""
    if not len(clock) or not len(times):
        return times
    order = np.argsort(clock.time, kind="stable")
    zero = clock.time[order[0]]  # so that no digits are lost in floats
    offsets = np.interp(times - zero, clock.time[order] - zero, clock.offset[order])
    return np.where(times == NONE, NONE, times + np.rint(offsets).astype(np.int64))


def _short(line: bytes | str) -> str:
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = text.rstrip("\n")
    return repr(text if len(text) <= 80 else text[:77] + "…")
