"""Scenes as an animated GIF, in light colours. Needs Pillow, which the extra `plot` brings."""

from __future__ import annotations

import math
from functools import cache
from os import PathLike
from typing import Any

from .colours import LIGHT, SHARED
from .scene import WIDTH, Line, Rect, Scene, Shape, Sliding, Strip, depth

SCALE = 2  # drawn so much larger, then shrunk: smooth edges
COLOURS = LIGHT | SHARED
HEAD = 8.0  # pixels, of an arrow


def write(scenes: list[Scene], path: str | PathLike[str], seconds: float) -> None:
    """One GIF frame for each scene; what slides is shown on its way."""
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: expected a time above 0")
    pictures = [picture(scene) for scene in scenes]
    durations = [max(20, round(1000 * seconds * scene.weight)) for scene in scenes]
    palette = _palette()  # one for all, so that a frame need only hold what has changed
    first, *rest = [one.quantize(palette=palette, dither=0) for one in pictures]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def _palette() -> Any:
    """Our colours, and what they are where they are thin, or at an edge."""
    from PIL import Image

    colours = sorted({_mixed(colour, step / 10) for colour in COLOURS.values() for step in (10, 8, 6, 4, 2)})
    found = Image.new("P", (1, 1))
    found.putpalette([level for colour in colours for level in colour])
    return found


def picture(scene: Scene) -> Any:
    """A scene as a Pillow image."""
    from PIL import Image, ImageDraw

    size = (WIDTH * SCALE, math.ceil(scene.height) * SCALE)
    image = Image.new("RGB", size, COLOURS["paper"])
    draw = ImageDraw.Draw(image)
    for shape in sorted(scene.shapes, key=depth):
        if isinstance(shape, Sliding):
            for part in shape.shapes:
                _draw(draw, part, shape.dx / 2, shape.dy / 2)
        else:
            _draw(draw, shape, 0, 0)
    return image.resize((WIDTH, math.ceil(scene.height)), Image.Resampling.LANCZOS)


def _draw(draw: Any, shape: Shape, dx: float, dy: float) -> None:
    if isinstance(shape, Rect):
        box = [(shape.x + dx) * SCALE, (shape.y + dy) * SCALE]
        box += [box[0] + shape.w * SCALE, box[1] + shape.h * SCALE]
        fill = _mixed(COLOURS[shape.fill], shape.opacity) if shape.fill else None
        line = COLOURS[shape.stroke] if shape.stroke else None
        draw.rounded_rectangle(box, shape.round * SCALE, fill, line, SCALE if line else 0)
    elif isinstance(shape, Strip):
        for piece in shape.pieces():
            _draw(draw, piece, shape.x + dx, shape.y + dy)
    elif isinstance(shape, Line):
        _draw_line(draw, shape, dx, dy)
    else:
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[shape.anchor]
        place = ((shape.x + dx) * SCALE, (shape.y + dy) * SCALE)
        draw.text(place, shape.text, COLOURS[shape.fill], _font(shape.size * SCALE, shape.bold), anchor)


def _draw_line(draw: Any, line: Line, dx: float, dy: float) -> None:
    start = ((line.x1 + dx) * SCALE, (line.y1 + dy) * SCALE)
    end = ((line.x2 + dx) * SCALE, (line.y2 + dy) * SCALE)
    draw.line([start, end], COLOURS[line.stroke], round(line.width * SCALE))
    if line.arrow:
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        wings = [
            (end[0] - HEAD * SCALE * math.cos(angle + turn), end[1] - HEAD * SCALE * math.sin(angle + turn))
            for turn in (0.45, -0.45)
        ]
        draw.polygon([end, *wings], COLOURS[line.stroke])


def _mixed(colour: str, opacity: float) -> tuple[int, ...]:
    """A colour laid over the paper."""
    over, under = (_rgb(name) for name in (colour, COLOURS["paper"]))
    return tuple(round(opacity * a + (1 - opacity) * b) for a, b in zip(over, under))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@cache
def _font(size: float, bold: bool) -> Any:
    """A fixed-width font: matplotlib brings one. Else Pillow's own."""
    from pathlib import Path

    from PIL import ImageFont

    try:
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        return ImageFont.truetype(folder / f"DejaVuSansMono{'-Bold' if bold else ''}.ttf", round(size))
    except (ImportError, OSError):
        return ImageFont.load_default(size)
