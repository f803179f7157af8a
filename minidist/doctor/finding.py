"""What the doctor finds, and how it is shown."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

LEVELS = ("ok", "warning", "problem")
COLOURS = {"ok": "32", "warning": "33", "problem": "31;1"}


@dataclass
class Finding:
    """One line of the doctor's screen.

    level   "ok"; "warning": works, but not as well as it could; "problem": something does not work until it is mended
    remedy  what to do about it: a command that can be pasted as it stands, or a sentence
    """

    about: str
    level: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {', '.join(LEVELS)}")


def ok(about: str, text: str) -> Finding:
    return Finding(about, "ok", text)


def warning(about: str, text: str, remedy: str) -> Finding:
    return Finding(about, "warning", text, remedy)


def problem(about: str, text: str, remedy: str) -> Finding:
    return Finding(about, "problem", text, remedy)


def guarded(about: str, check: Callable[..., Finding], *arguments: Any) -> Finding:
    """What a check finds; where it fails itself, that, for one odd machine must not hide what else there is to say."""
    try:
        return check(*arguments)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return warning(about, f"could not be looked at: {words}", "Please report this line as a bug of minidist.")


def conclusion(findings: list[Finding]) -> str:
    """The last line of the screen."""
    count = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    words = [f"{n} {level}{'s' * (n > 1)}" for level in ("problem", "warning") if (n := count[level])]
    if count["problem"]:
        return f"not ready: {' and '.join(words)}"
    return "ready" + (f", with {words[0]}" if words else "")


def screen(findings: list[Finding], colours: bool, width: int) -> str:
    """All findings as text. Remedies are never broken, so that they can be pasted."""
    column = max(len(finding.about) for finding in findings) + 2
    lines = []
    for finding in findings:
        margin = f"{finding.level:<9}{finding.about:<{column}}"
        broken = textwrap.wrap(
            finding.text, max(width - len(margin), 40), break_long_words=False, break_on_hyphens=False
        )
        for number, piece in enumerate(broken or [""]):
            lines.append((margin if number == 0 else " " * len(margin)) + piece)
            if number == 0 and colours:
                lines[-1] = lines[-1].replace(finding.level, f"\x1b[{COLOURS[finding.level]}m{finding.level}\x1b[0m", 1)
        if finding.remedy:
            lines.append(" " * 9 + f"-> {finding.remedy}")
    return "\n".join([*lines, "", conclusion(findings)])


def wants_colours(stream: TextIO) -> bool:
    """Whether escapes for colours may be written: to a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Columns, at most as many as are pleasant to read."""
    return min(shutil.get_terminal_size((110, 24)).columns, 120)
