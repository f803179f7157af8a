"""What a picture is made of, before it is SVG or GIF: rectangles, lines and texts, in pixels from the top left.

Colours are names (see colours.py), so that light and dark are the reader's choice. Two equal shapes in two scenes are
one shape that stays: so pictures must not differ in what they do not mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH = 760  # pixels, of all pictures
LETTER = 0.6  # of a text's size: how wide a letter of a fixed-width font is


@dataclass(frozen=True)
class Rect:
    """A rectangle with round corners. `fill` or `stroke` None: without."""

    x: float
    y: float
    w: float
    h: float
    fill: str | None = None
    stroke: str | None = None
    round: float = 0
    opacity: float = 1.0  # of the fill
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """A line; with a head at its end, an arrow."""

    x1: float
    y1: float
    x2: float
    y2: float
    stroke: str
    width: float = 1.5
    arrow: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Text:
    """One line; `y` is its middle. `anchor` is "start", "middle" or "end"."""

    x: float
    y: float
    text: str
    fill: str = "ink"
    size: float = 13
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of small rectangles of one width, side by side, each in its colour; "": none there."""

    x: float
    y: float
    w: float
    h: float
    fills: tuple[str, ...]

    def pieces(self) -> list[Rect]:
        """The rectangles, their x counted from the strip's own."""
        each = self.w / len(self.fills)
        return [Rect(i * each, 0, max(each - 1, 1), self.h, fill, round=2) for i, fill in enumerate(self.fills) if fill]


Shape = Rect | Line | Text | Strip


@dataclass(frozen=True)
class Sliding:
    """Shapes that come from (dx, dy) away and slide to their places while the scene stands."""

    shapes: tuple[Shape, ...]
    dx: float
    dy: float


def depth(shape: Shape | Sliding) -> int:
    """What is drawn first: rectangles, then what lies on them, then what slides over all."""
    if isinstance(shape, Sliding):
        return 2
    return int(not isinstance(shape, Rect))


@dataclass
class Scene:
    """A picture. `weight` is how long it stands, 1 being usual; `frame` the film's frame that it shows."""

    height: float
    frame: int
    weight: float = 1.0
    shapes: list[Shape | Sliding] = field(default_factory=list)
