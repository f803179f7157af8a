"""Films of ranks that work and wait: a row for each, time to the right, bars that fill up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

from . import colours
from .film import PLAIN, Film
from .scene import LETTER, WIDTH, Line, Rect, Scene, Shape, Sliding, Text
from .terminal import Style

# Of the picture, in pixels:
LEFT, EDGE, RIGHT, TOP = 108.0, 20.0, 104.0, 70.0
BAR, PITCH = 28.0, 42.0
SMALL, LINE = 12.0, 17.0
LONGEST = 60.0  # scenes' weights, together: seconds, as a rule


class Bar(NamedTuple):
    """What a row does from `start` to `end`, in seconds. `kind` is a colour's name."""

    row: int
    start: float
    end: float
    kind: str
    label: str
    short: str  # where there is little room
    faint: bool = False


class Arrow(NamedTuple):
    """A message from row to row."""

    row: int
    to: int
    start: float
    end: float
    kind: str
    label: str = ""
    stays: bool = False  # whether it is seen to the end


class GanttFilm(Film):
    """What the films of schedules and of parameter servers have in common."""

    bars: Sequence[Bar]
    arrows: Sequence[Arrow]
    keys: Sequence[tuple[str, str]]  # the legend: a colour, and what it means
    seconds: float  # of the whole run
    unit: float  # seconds of a bar that is to have room for its label

    @abstractmethod
    def rows(self) -> list[str]:
        """The names of the rows."""

    @abstractmethod
    def lines(self, i: int) -> list[str]:
        """What happens in frame i, in sentences."""

    @abstractmethod
    def notes(self, i: int) -> list[str]:
        """A few letters on each row, at its right end."""

    def until(self, i: int) -> float:
        """When frame i ends."""
        return self.frames[i + 1].time if i + 1 < len(self.frames) else self.seconds

    # -- the terminal ---------------------------------------------------------------------------------------------

    def text(self, i: int, style: Style = PLAIN) -> str:
        i %= len(self.frames)
        head = f"{self.title}   frame {i} of {len(self.frames) - 1}, {self.frames[i].time:g} s"
        lines = [style.paint(line, "bold") for line in style.wrapped(head)] + [""]
        lines += [*self._chart(i, style), ""]
        for line in self.lines(i):
            lines += style.wrapped(line)
        return style.signs("\n".join(lines))

    def _chart(self, i: int, style: Style) -> list[str]:
        """As many letters to a `unit` as labels need and the terminal has; at least two, and then the latest part."""
        names, notes, until = self.rows(), self.notes(i), self.until(i)
        side, end = max(map(len, names)) + 4, max(map(len, notes)) + 2
        room = max(10, style.width - side - end)
        need = max(len(bar.short) for bar in self.bars) + 1
        scale = max(2, min(need, int(room * self.unit / self.seconds))) / self.unit
        first = max(0, round(until * scale) - room)
        wide = min(room, round(self.seconds * scale))
        lines = []
        for row, name in enumerate(names):
            text, at = "", first
            for bar in sorted(bar for bar in self.bars if bar.row == row and bar.start < until):
                start, stop = round(bar.start * scale), round(min(bar.end, until) * scale)
                if stop <= max(start, at):
                    continue
                text += " " * (start - at)
                shown = _filled(bar, stop - start)[max(0, at - start) :]
                text += style.paint(shown, bar.kind if bar.kind != "cell" else None)
                at = stop
            lines.append(f"  {name:<{side - 2}}{text}{' ' * (first + wide - at)}  {notes[row]}".rstrip())
        return lines

    # -- the picture ----------------------------------------------------------------------------------------------

    def scenes(self) -> list[Scene]:
        letters = int((WIDTH - 2 * EDGE) / (SMALL * LETTER))
        below = [[part for line in self.lines(i) for part in wrap(line, letters)] for i in range(len(self.frames))]
        height = self._below() + LINE * (max(map(len, below)) + 1) + 12
        spans = [self.until(i) - frame.time for i, frame in enumerate(self.frames)]
        usual = max(sum(spans) / max(len(spans) - 1, 1), 1e-9)
        slower = min(1.0, LONGEST / len(spans))
        found = []
        for i in range(len(self.frames)):
            last = i == len(self.frames) - 1
            weight = 4.0 if last else slower * min(2.0, max(0.6, spans[i] / usual))
            shapes: list[Shape | Sliding] = [*self._frame(i), *self._bars(i), *self._arrows(i)]
            for k, line in enumerate(below[i]):
                shapes.append(Text(EDGE, self._below() + 10 + k * LINE, line, "ink", SMALL))
            found.append(Scene(height, i, weight, shapes))
        return found

    def _below(self) -> float:
        return TOP + len(self.rows()) * PITCH + 42

    def _x(self, time: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * time / self.seconds

    def _frame(self, i: int) -> list[Shape]:
        """Title, rows, the axis and the present moment."""
        now = self.frames[i].time
        bottom = TOP + len(self.rows()) * PITCH
        shapes: list[Shape] = [
            Text(EDGE, 26, self.title, size=17, bold=True),
            Text(WIDTH - EDGE, 26, f"{now:g} s", "dim", 14, "end"),
        ]
        x = LEFT
        for kind, words in self.keys:
            shapes.append(Rect(x, 45, 12, 12, kind, "rule" if kind in ("cell", "wait") else None, 3))
            shapes.append(Text(x + 17, 51, words, "dim", 11))
            x += 30 + len(words) * 11 * LETTER
        for row, name in enumerate(self.rows()):
            y = TOP + row * PITCH
            shapes.append(Rect(LEFT, y, WIDTH - LEFT - RIGHT, BAR, "cell", None, 3))
            shapes.append(Rect(EDGE, y + BAR / 2 - 6, 12, 12, self.dot(row), round=6))
            shapes.append(Text(EDGE + 18, y + BAR / 2, name))
            shapes.append(Text(WIDTH - RIGHT + 10, y + BAR / 2, self.notes(i)[row], "dim", 11))
        step = _round_step(self.seconds / 10)
        for k in range(int(self.seconds / step) + 1):
            shapes.append(Line(self._x(k * step), bottom - 6, self._x(k * step), bottom - 1, "rule", 1))
            shapes.append(Text(self._x(k * step), bottom + 8, f"{k * step:g}", "dim", 10, "middle"))
        x = self._x(self.until(i))
        shapes.append(Line(x, TOP - 6, x, bottom - 6, "accent", 1.5))
        return shapes

    def dot(self, row: int) -> str:
        """The colour of a row's dot."""
        return colours.of_rank(row)

    def _bars(self, i: int) -> list[Shape]:
        until = self.until(i)
        shapes: list[Shape] = []
        for bar in self.bars:
            if bar.start >= until:
                continue
            x, y = self._x(bar.start), TOP + bar.row * PITCH
            w = self._x(min(bar.end, until)) - x
            stroke = "rule" if bar.kind in ("cell", "wait") else None
            opacity = 0.62 if bar.faint else 1.0
            shapes.append(Rect(x + 0.5, y, max(w - 1, 0.5), BAR, bar.kind, stroke, 3, opacity))
            whole = self._x(bar.end) - x
            texts = bar.label, bar.short, "".join(letter for letter in bar.short if letter.isdigit())
            label = next((text for text in texts if len(text) * 11 * LETTER <= whole - 2), "")
            if label and w >= (whole + len(label) * 11 * LETTER) / 2 - 1:
                ink = "ink" if bar.kind in ("cell", "wait") else "onfill"
                shapes.append(Text(x + whole / 2, y + BAR / 2, label, ink, 11, "middle"))
        return shapes

    def _arrows(self, i: int) -> list[Shape]:
        now, until = self.frames[i].time, self.until(i)
        shapes: list[Shape] = []
        last = i == len(self.frames) - 1
        for arrow in self.arrows:
            ended = arrow.end <= now or (last and arrow.end <= until)
            if not (arrow.end == now or (arrow.stays and ended)):
                continue
            down = arrow.to > arrow.row
            y = TOP + arrow.row * PITCH + (BAR if down else 0)
            to = TOP + arrow.to * PITCH + (0 if down else BAR)
            x = self._x(arrow.start)
            shapes.append(Line(x, y, self._x(arrow.end), to, arrow.kind, 1.5, arrow=True))
            if arrow.label:
                shapes.append(Text(x - 4, y + (7 if down else -7), arrow.label, arrow.kind, 10, "end"))
        return shapes


def _filled(bar: Bar, room: int) -> str:
    """A bar in so many letters."""
    if bar.kind == "wait":
        return f"{bar.label:·<{room}}" if len(bar.label) < room else "·" * room
    none = "│" if bar.short[:1].isdigit() else bar.short[:1]
    label = next((text for text in (bar.label, bar.short) if len(text) < room), bar.short[-room:] if room > 1 else none)
    return (label + "─" * (room - len(label) - 1) + " ")[:room]


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5, 10, 20, …"""
    size = 1.0
    while True:
        for factor in (1, 2, 5):
            if factor * size >= step:
                return factor * size
        size *= 10
