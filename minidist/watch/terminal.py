"""Films in a terminal: colours, arrows, and keys to step with."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .film import Film

CODES = {"bold": "1", "dim": "2", "done": "30;42", "part": "30;46", "forward": "30;44", "backward": "30;43"}
CODES |= {"weight": "30;42", "wait": "2", "late": "31"}
PLAIN_SIGNS = {"→": "->", "·": "-", "–": "-", "…": "...", "×": "x", "█": "#", "░": ".", "▶": ">", "│": "|", "─": "-"}


@dataclass(frozen=True)
class Style:
    """How a frame is written: with colours, in ASCII only, how wide."""

    colour: bool
    ascii: bool
    width: int

    def paint(self, text: str, kind: str | None) -> str:
        """The text in a colour, if there are any."""
        return f"\x1b[{CODES[kind]}m{text}\x1b[0m" if self.colour and kind else text

    def signs(self, text: str) -> str:
        """The text with signs that the terminal has."""
        if self.ascii:
            for sign, plain in PLAIN_SIGNS.items():
                text = text.replace(sign, plain)
        return text

    def wrapped(self, text: str, indent: str = "") -> list[str]:
        """The text in lines that fit; further ones are set in."""
        return wrap(self.signs(text), max(self.width, 24), initial_indent=indent, subsequent_indent=indent + "  ")


def style_of(ascii_only: bool = False, width: int | None = None) -> Style:
    """What standard output can show. NO_COLOR (https://no-color.org) is honoured."""
    out = sys.stdout
    try:
        "".join(PLAIN_SIGNS).encode(out.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        ascii_only = True
    tty = out.isatty()
    colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(colour, ascii_only, width or (shutil.get_terminal_size().columns if tty else 100))


def show(film: Film, style: Style, pause: bool = True, speed: float | None = None) -> None:
    """Show a film on standard output. With `pause`, and at a terminal, keys go on and back; else all is printed.

    speed  frames a second: they go on by themselves
    """
    out = sys.stdout
    stepping = pause and out.isatty() and (speed is not None or sys.stdin.isatty())
    if not stepping:
        print("\n\n".join(film.text(i, style) for i in range(len(film))))
        print()
        print("\n".join(style.wrapped(style.signs(film.summary()))))
        return
    if speed is not None:
        for i in range(len(film)):
            out.write(_screen(film, i, style))
            out.flush()
            time.sleep(1 / speed)
        return
    i = 0
    with _keys() as read:
        while True:
            out.write(_screen(film, i, style))
            out.write(style.paint("Enter or right: on   left: back   q: quit ", "dim"))
            out.flush()
            key = read()
            if key in QUIT or (key not in BACK and i == len(film) - 1):
                out.write("\n")
                return
            i = max(0, i - 1) if key in BACK else i + 1


def _screen(film: Film, i: int, style: Style) -> str:
    """A frame on an empty screen; below the last one what there was to see."""
    end = style.wrapped(style.signs(film.summary())) if i == len(film) - 1 else []
    return "\x1b[2J\x1b[H" + film.text(i, style) + "\n\n" + "".join(f"{line}\n" for line in end)


BACK = ("\x1b[D", "\x1b[A", "b", "\x7f")  # left, up
QUIT = ("q", "\x03", "\x04", "")


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """A function that waits for a key, and gives its letters: an arrow has three. Ctrl-C is a key as well."""
    try:
        import termios
        import tty
    except ImportError:  # no terminal of that kind: a line it is
        yield lambda: sys.stdin.readline().rstrip("\n") or "\n"
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def read() -> str:
        try:
            return os.read(descriptor, 8).decode(errors="replace")
        except KeyboardInterrupt:
            return "q"

    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)
        yield read
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
