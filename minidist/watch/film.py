"""A film: what `watch` returns.

It has frames with typed fields, and ways to look at them:

    film.frames        what happened, moment by moment
    film.text(i)       a frame for the terminal
    film.svg(path)     all of them, as a picture that moves
    film.gif(path)     the same, for places that do not animate SVG (needs Pillow)
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from . import svg
from .scene import Scene
from .terminal import Style

PLAIN = Style(colour=False, ascii=False, width=100)


class Film(ABC):
    """One simulated run, observed. `name` is the algorithm's full name, `title` says on how many ranks and so on."""

    name: str
    title: str
    ranks: int
    frames: Sequence[Any]

    @abstractmethod
    def text(self, i: int, style: Style = PLAIN) -> str:
        """Frame i in lines of text; -1 is the last one."""

    @abstractmethod
    def scenes(self) -> list[Scene]:
        """The pictures, in order: all of one size."""

    @abstractmethod
    def summary(self) -> str:
        """What there was to see, in a sentence."""

    def __len__(self) -> int:
        return len(self.frames)

    def svg(self, path: str | PathLike[str] | None = None, seconds: float = 1.0) -> str:
        """The animation as SVG; written to `path` if there is one. `seconds` is how long one picture stands.

        It is one file that refers to no other, works in <img>, follows the reader's light or dark colours, and stands
        still, at the last frame, for readers who want less motion. The same film gives the same bytes.
        """
        text = svg.animated(self.scenes(), self.title, self.summary(), seconds)
        if path is not None:
            Path(path).write_text(text, "utf-8", newline="\n")
        return text

    def gif(self, path: str | PathLike[str], seconds: float = 1.0) -> None:
        """The same as GIF. Errors  ImportError: no Pillow (the extra `plot` brings it)"""
        from . import gif

        gif.write(self.scenes(), path, seconds)

    def _repr_html_(self) -> str:
        """For notebooks: an <img>, so that no style of one film reaches another."""
        data = base64.b64encode(self.svg().encode()).decode()
        return f'<img alt="{escape(self.title)}" src="data:image/svg+xml;base64,{data}">'

    def __repr__(self) -> str:
        return f"<Film {self.title}: {len(self.frames)} frames>"
