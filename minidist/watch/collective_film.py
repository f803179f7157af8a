"""A collective's film: a row for each rank, a column for each chunk, and messages that go from row to row."""

from __future__ import annotations

from itertools import groupby
from textwrap import wrap
from typing import Any

import numpy as np

from . import colours
from .collective import Cell, Frame, Move, Setting, observe
from .film import PLAIN, Film
from .scene import LETTER, WIDTH, Line, Rect, Scene, Shape, Sliding, Strip, Text
from .terminal import Style
from .words import amount, listed, ranks_in_words, sum_in_letters

# Of the picture, in pixels:
LEFT, EDGE, TOP = 96.0, 20.0, 78.0
CELL, GAP = 44.0, 24.0  # a cell's height, and what is between two rows
WIDEST = 162.0
SMALL, LINE = 12.0, 17.0  # letters below the picture


class CollectiveFilm(Film):
    """frames[i].moves and frames[i].state[rank][chunk]; `run` is the simulation, `results` each rank's result."""

    frames: list[Frame]

    def __init__(self, given: Setting):
        self.given = given
        self.frames, self.results, self.run = observe(given)
        self.name = f"{given.operation} {given.algorithm}".strip()
        self.ranks = given.ranks
        hosts = "" if given.hosts is None else f" on {amount(len(set(given.hosts)), 'host')}"
        root = f", root {given.root}" if given.kind.rooted and given.ranks > 1 else ""
        self.title = f"{self.name}, {amount(given.ranks, 'rank')}{hosts}{root}"

    results: list[np.ndarray | None]
    run: Any

    # -- words ----------------------------------------------------------------------------------------------------

    def says(self, move: Move) -> str:
        """A message in a sentence."""
        what, who = self.given.kind.what, f"rank {move.source}"
        if what == "word":
            told = ranks_in_words(move.chunks)
            return f"{who} tells rank {move.dest} that {told} {'is' if len(move.chunks) == 1 else 'are'} here"
        if not move.chunks:
            return f"{who} sends rank {move.dest} an empty message"
        if what == "swap":
            blocks = [self.block(move, i) for i in range(len(move.chunks))]
            return f"{who} sends {'block' if len(blocks) == 1 else 'blocks'} {listed(blocks)} to rank {move.dest}"
        if self.given.chunks == 1 or (self.given.chunks == len(move.chunks) and what == "sum"):
            it = "the array" if self.given.chunks == 1 else "all chunks"
        else:
            it = f"chunk{'s' * (len(move.chunks) > 1)} {listed(move.chunks)}"
        which = ""
        if what == "sum":
            adds = "sums" if self.given.chunks == 1 or len(move.chunks) == 1 else "sum"
            if len(move.holds) == 1:
                which = ", its own," if move.holds == {move.source} else f", which is rank {min(move.holds)}'s,"
            elif len(move.holds) == self.ranks:
                which = f", which {adds} all {self.ranks} ranks,"
            else:
                which = f", which {adds} {ranks_in_words(move.holds)},"
        return f"{who} sends {it}{which} to rank {move.dest}"

    def block(self, move: Move, i: int) -> str:
        """A block of all_to_all: whose, for whom."""
        return self.letters(move.contents[i], move.chunks[i], 9)

    def letters(self, cell: Cell, chunk: int, room: int) -> str:
        """What is written in a cell."""
        if not cell:
            return "·"
        what = self.given.kind.what
        if what == "sum":
            return sum_in_letters(cell, room, self.ranks)
        if what == "copy" and self.given.chunks == 1:
            return "data"
        if what == "swap":
            return ",".join(f"{source}→{(source + chunk) % self.ranks}" for source in sorted(cell))
        return str(chunk)

    def heads(self) -> list[str]:
        """What stands above the columns."""
        what = self.given.kind.what
        if what == "word":
            return [f"rank {c} is here" for c in range(self.given.chunks)]
        if what == "swap":
            return ["own", *(f"{k} further" for k in range(1, self.ranks))]
        return ["array"] if self.given.chunks == 1 else [f"chunk {c}" for c in range(self.given.chunks)]

    def legend(self) -> str:
        """What the cells mean."""
        what, operation = self.given.kind.what, self.given.operation
        if what == "sum":
            return "0+1 in a cell: it holds the sum of the parts of ranks 0 and 1. Green: the result."
        if what == "swap":
            return "0→2 in a cell: what rank 0 gave for rank 2. It sits under the number of ranks it has to go."
        if what == "word":
            return "A cell is filled when the rank has been told that the other one is here."
        if self.given.chunks == 1:
            return "A cell is filled when the root's array is there."
        whose = "a rank's own" if operation in ("gather", "all_gather") else "the root's"
        return f"A cell is filled when {whose} chunk of that number is there. Green: where it has to be."

    def steps(self, frame: Frame) -> list[str]:
        """The steps of the algorithm that the messages of a frame belong to, each with its words."""
        found = dict.fromkeys((move.step.function, move.step.words) for move in frame.moves)
        return [f"{function}: {words}" if words else function for function, words in found]

    def caption(self, i: int) -> str:
        """Frame i in a line: who sends what to whom."""
        frame = self.frames[i]
        if not frame.moves:
            return self._beginning()
        parts = []
        for move in frame.moves:
            if self.given.kind.what == "word" or self.given.chunks == 1:
                what = ""
            elif self.given.kind.what == "swap":
                what = f" ({' '.join(self.block(move, k) for k in range(len(move.chunks)))})"
            else:
                what = f" c{_span(move.chunks)}" if move.chunks else " nothing"
            parts.append(f"{move.source}→{move.dest}{what}")
        functions = dict.fromkeys(move.step.function for move in frame.moves)
        return f"{', '.join(functions)}: {' · '.join(parts)}"

    def _beginning(self) -> str:
        s = self.given
        if s.operation in ("broadcast", "scatter"):
            return f"At first only rank {s.root}, the root, has anything."
        if s.kind.what == "word":
            return "At first every rank knows of itself only."
        if s.kind.what == "swap":
            return "At first every rank has a block for every rank."
        if s.kind.what == "copy":
            return "At first every rank has its own chunk."
        pieces = "" if s.chunks == 1 else f", cut into {s.chunks} chunks, c0 to c{s.chunks - 1}"
        return f"At first every rank has an array of its own{pieces}."

    def summary(self) -> str:
        moments = len(self.frames) - 1
        return (
            f"{self.title}: {amount(len(self.moves()), 'message')} at {amount(moments, 'moment')}; "
            f"done after {self.run.seconds:g} s, if a message takes {self.given.alpha:g} s."
        )

    def moves(self) -> list[Move]:
        """All messages, in the order in which they came."""
        return [move for frame in self.frames for move in frame.moves]

    # -- the terminal ---------------------------------------------------------------------------------------------

    def text(self, i: int, style: Style = PLAIN) -> str:
        frame, number = self.frames[i], i % len(self.frames)
        head = f"{self.title}   frame {number} of {len(self.frames) - 1}, {frame.time:g} s"
        lines = [style.paint(line, "bold") for line in style.wrapped(head)]
        lines += ["", *self._table(frame, style), ""]
        if not frame.moves:
            lines += style.wrapped(self._beginning()) + style.wrapped(self.legend())
        for move in frame.moves:
            arrow = f"{move.source} → {move.dest}"
            lines += style.wrapped(f"{arrow}   {self.says(move)}")
        for step, moves in groupby(sorted({m.step for m in frame.moves}), lambda s: (s.function, s.words)):
            first = next(moves)
            lines += [style.paint(line, "dim") for line in style.wrapped(f"{first}: {first.words}")]
            del step
        return style.signs("\n".join(lines))

    def _table(self, frame: Frame, style: Style) -> list[str]:
        """The ranks' chunks; in blocks one below the other where the terminal is narrow."""
        names = [self._rank(rank) for rank in range(self.ranks)]
        side = max(map(len, names)) + 4
        room = max(3, (style.width - side) // min(self.given.chunks, max(1, (style.width - side) // 7)) - 3)
        changed = {(move.dest, chunk) for move in frame.moves for chunk in move.chunks}
        cells = [[self.letters(cell, c, room) for c, cell in enumerate(row)] for row in frame.state]
        heads, widest = self.heads(), max(len(cell) for row in cells for cell in row)
        if (max(widest, *map(len, heads)) + 3) * self.given.chunks + side > style.width:
            heads = [_shortened(head, max(3, widest)) for head in heads]
        wide = max(widest, *map(len, heads)) + 2
        per_line = max(1, (style.width - side) // (wide + 1))
        lines = []
        for first in range(0, self.given.chunks, per_line):
            part = range(first, min(first + per_line, self.given.chunks))
            lines.append((" " * side + " ".join(f"{heads[c]:^{wide}}" for c in part)).rstrip())
            for rank, row in enumerate(frame.state):
                shown = []
                for c in part:
                    text, kind = f"{cells[rank][c]:^{wide}}", self._look(rank, c, row[c])
                    if (rank, c) in changed:
                        text = f"[{cells[rank][c]:^{wide - 2}}]"
                    shown.append(style.paint(text, kind))
                lines.append(f"  {names[rank]:<{side - 2}}" + " ".join(shown))
        return [line.rstrip() for line in lines]

    def _look(self, rank: int, chunk: int, cell: Cell) -> str | None:
        if not cell:
            return "dim"
        if cell == self.given.goal(rank, chunk):
            return "done"
        return "part" if len(cell) > 1 else None

    def _rank(self, rank: int) -> str:
        return f"rank {rank}" if self.given.hosts is None else f"host {self.given.hosts[rank]} rank {rank}"

    # -- the picture ----------------------------------------------------------------------------------------------

    def scenes(self) -> list[Scene]:
        """The beginning; then for each frame messages on their way, and what is there after."""
        height, found = self._height(), []
        for i, frame in enumerate(self.frames):
            last = i == len(self.frames) - 1
            if frame.moves:
                before = self.frames[i - 1]
                slides = [self._slide(move, k) for move in frame.moves for k in range(len(move.chunks))]
                shapes = [*self._still(before, i), *self._arrows(frame), *slides]
                found.append(Scene(height, i, 1.3, shapes))
            found.append(Scene(height, i, 3.5 if last else 1.6 if not i else 0.7, self._still(frame, i)))
        return found

    def _height(self) -> float:
        lines = 0
        for i in range(len(self.frames)):
            lines += len(self._caption_lines(i))
        return self._below() + LINE * (lines + 4) + 8

    def _below(self) -> float:
        """Where the rows end."""
        return TOP + self.ranks * (CELL + GAP)

    def _caption_lines(self, i: int) -> list[str]:
        letters = int((WIDTH - 2 * EDGE - 30) / (SMALL * LETTER))
        return wrap(self.caption(i), letters, subsequent_indent="  ", break_on_hyphens=False)

    def _box(self, rank: int, chunk: int) -> tuple[float, float, float]:
        """x, y and width of a cell."""
        pitch = min(WIDEST, (WIDTH - LEFT - EDGE) / self.given.chunks)
        gap = 10 if pitch > 60 else 4
        return LEFT + chunk * pitch, TOP + rank * (CELL + GAP), pitch - gap

    def _still(self, frame: Frame, number: int) -> list[Shape | Sliding]:
        """Everything that does not move."""
        shapes: list[Shape | Sliding] = [
            Text(EDGE, 26, self.title, size=17, bold=True),
            Text(WIDTH - EDGE, 26, f"{frame.time:g} s", "dim", 14, "end"),
        ]
        for chunk, head in enumerate(self.heads()):
            x, _, w = self._box(0, chunk)
            room = max(1, int(w / (SMALL * LETTER)))
            shapes.append(Text(x + w / 2, TOP - 16, _shortened(head, room), "dim", SMALL, "middle"))
        for rank, row in enumerate(frame.state):
            _, y, _ = self._box(rank, 0)
            shapes.append(Rect(EDGE, y + CELL / 2 - 6, 12, 12, colours.of_rank(rank), round=6))
            shapes.append(Text(EDGE + 18, y + CELL / 2, f"rank {rank}"))
            if self.given.hosts is not None:
                shapes.append(Text(EDGE + 18, y + CELL / 2 + 15, f"host {self.given.hosts[rank]}", "dim", 10))
            for chunk, cell in enumerate(row):
                shapes += self._cell(rank, chunk, cell)
        return shapes + self._words(number)

    def _cell(self, rank: int, chunk: int, cell: Cell) -> list[Shape]:
        x, y, w = self._box(rank, chunk)
        if not cell:
            return [Rect(x, y, w, CELL, None, "rule", 6, dashed=True)]
        if cell == self.given.goal(rank, chunk):
            frame: list[Shape] = [Rect(x, y, w, CELL, "done", "done", 6, 0.16)]
        else:
            frame = [Rect(x, y, w, CELL, "cell", "rule", 6)]
        return frame + self._inside(chunk, cell, x, y, w)

    def _inside(self, chunk: int, cell: Cell, x: float, y: float, w: float) -> list[Shape]:
        """A cell's text, and below it a strip with a piece in each rank's colour that is in it."""
        size = 13.0 if w > 40 else 10.0
        text = self.letters(cell, chunk, int((w - 6) / (size * LETTER)))
        shapes: list[Shape] = [Text(x + w / 2, y + CELL / 2 - 5, text, "ink", size, "middle")]
        margin = 8 if w > 40 else 3
        if self.given.kind.what == "sum":
            fills = tuple(colours.of_rank(rank) if rank in cell else "" for rank in range(self.ranks))
        else:
            fills = (colours.of_rank(chunk if self.given.kind.what == "copy" else min(cell)),)
        shapes.append(Strip(x + margin, y + CELL - 14, w - 2 * margin, 7, fills))
        return shapes

    def _slide(self, move: Move, k: int) -> Sliding:
        """A chunk on its way, in its column."""
        chunk, cell = move.chunks[k], move.contents[k]
        x, y, w = self._box(move.dest, chunk)
        shift = -4 if move.dest < move.source else 4  # two that meet can both be seen
        box: list[Shape] = [Rect(x + shift + 3, y + 2, w - 6, CELL - 4, "paper", "accent", 6, 0.94)]
        inside = self._inside(chunk, cell, x + shift, y, w) if cell else []
        return Sliding((*box, *inside), 0, (move.source - move.dest) * (CELL + GAP))

    def _arrows(self, frame: Frame) -> list[Shape]:
        shapes: list[Shape] = []
        for move in frame.moves:
            up = move.dest < move.source
            for chunk in move.chunks:
                x, start, w = self._box(move.source, chunk)
                _, end, _ = self._box(move.dest, chunk)
                x += w * (0.3 if up else 0.7)
                start, end = (start, end + CELL) if up else (start + CELL, end)
                shapes.append(Line(x, start, x, end, "accent", 2, arrow=True))
        return shapes

    def _words(self, number: int) -> list[Shape | Sliding]:
        """Below: the steps now, and the list of all frames, of which this one is marked."""
        letters = int((WIDTH - 2 * EDGE) / (SMALL * LETTER))
        y = self._below() + 4
        shapes: list[Shape | Sliding] = []
        steps = self.steps(self.frames[number]) or [self.legend()]
        lines = [line for step in steps for line in wrap(step, letters)]
        if len(lines) > 3:
            lines = [*lines[:2], lines[2][: letters - 2] + " …"]
        for i, line in enumerate(lines):
            shapes.append(Text(EDGE, y + i * LINE, line, "ink", SMALL))
        y += 3.5 * LINE
        for i in range(len(self.frames)):
            lines = self._caption_lines(i)
            if i == number:
                tall = LINE * len(lines)
                shapes.append(Rect(EDGE - 6, y - LINE / 2, WIDTH - 2 * EDGE + 12, tall, "accent", None, 4, 0.14))
            shapes.append(Text(EDGE + 20, y, str(i), "dim", SMALL, "end"))
            for line in lines:
                shapes.append(Text(EDGE + 30, y, line, "ink" if i == number else "dim", SMALL))
                y += LINE
        return shapes


def _shortened(text: str, room: int) -> str:
    """The text; its last word alone; or its number: what fits."""
    number = "".join(letter for letter in text if letter.isdigit())
    return text if len(text) <= room else number or text[:room]


def _span(chunks: tuple[int, ...]) -> str:
    """ "2", "2–3", "1,3"."""
    if len(chunks) > 1 and chunks == tuple(range(chunks[0], chunks[-1] + 1)):
        return f"{chunks[0]}–{chunks[-1]}"
    return ",".join(map(str, chunks))
