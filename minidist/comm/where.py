"""Lines of the user's code and lists of ranks, in words, for messages that say what happened where."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import CodeType, FrameType

_COMM = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(_COMM)) + os.sep

Place = tuple[CodeType, int]  # a function and a line in it: cheap to note down, turned into words only when needed


def here(depth: int = 1) -> Place:
    """The innermost line now running that is outside minidist/comm. Costs about 0.2 us.

    The `depth` innermost frames are known to be inside, and not even looked at.
    """
    frame = sys._getframe(depth)
    while frame.f_code.co_filename.startswith(_COMM) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lineno


def describe(place: Place) -> str:
    """ "train.py:12 in step"; the file's path is relative where it lies under the working directory."""
    code, line = place
    path = code.co_filename
    folder = os.getcwd() + os.sep
    return f"{path.removeprefix(folder)}:{line} in {code.co_name}"


def describe_stack(frame: FrameType | None) -> str:
    """The innermost line outside minidist/comm of a stack; if minidist's own, the line that called minidist as well."""
    frame = _first_outside(_COMM, frame)
    if frame is None:
        return "an unknown line"
    text = describe((frame.f_code, frame.f_lineno))
    caller = _first_outside(_PACKAGE, frame)
    if caller is not None and caller is not frame:
        text += f", called from {describe((caller.f_code, caller.f_lineno))}"
    return text


def _first_outside(folder: str, frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename.startswith(folder):
        frame = frame.f_back
    return frame


def shortened(ranks: Sequence[int]) -> str:
    """ "0, 2, 4", or the first few and an ellipsis."""
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else text + ", ..."
