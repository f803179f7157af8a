"""What the pages in tutorials/ share: exercises that check themselves, and the source of what is talked about.

    @lessons.exercise
    def check_right_neighbour(answer):
        assert answer(3, 4) == 0, "the last rank's right neighbour is rank 0"

    check_right_neighbour(my_answer)  # prints "right", or "not yet" and why
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from .comm import simulate


class Verdict:
    """True or False, of which a notebook shows nothing: what there is to say has been printed."""

    def __init__(self, right: bool):
        self.right = right

    def __bool__(self) -> bool:
        return self.right

    def _ipython_display_(self) -> None:
        pass


def exercise(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
    """Make a function of assertions about an answer one that says whether they hold, and never raises.

    It prints "right", or "not yet" and what the first assertion that failed says; what it returns is true or false.
    """

    @functools.wraps(check)
    def checked(answer: Any) -> Verdict:
        try:
            check(answer)
        except AssertionError as error:
            why = str(error) or "an assertion of the check does not hold"
        except Exception as error:  # whatever a wrong answer does is an answer
            why = told(error)
        else:
            print("right")
            return Verdict(True)
        print(f"not yet: {why}")
        return Verdict(False)

    return checked


def source(thing: Any, first: int = 1, last: int | None = None) -> None:
    """Print the source of a function, class or module of minidist; or its lines first … last, counted from 1."""
    lines = inspect.getsource(thing).splitlines()
    print("\n".join(lines[first - 1 : last]))


def error_of(program: Callable[..., Any], size: int, *args: Any, **options: Any) -> Exception | None:
    """What `simulate(program, size, *args, **options)` raises; None if it ends well."""
    try:
        simulate(program, size, *args, **options)
    except Exception as error:
        return error
    return None


def told(error: BaseException | None) -> str:
    """An error's kind and words, as a page shows them: no folders; of a notebook's lines, "line 3 of the cell"."""
    if error is None:
        return "no error"
    words = re.sub(r"[^\s(]*[/\\]ipykernel_\d+[/\\]\d+\.py:(\d+)", r"line \1 of the cell", str(error))
    return f"{type(error).__name__}: " + re.sub(r"[^\s(]*[/\\](?=minidist[/\\]\w+[/\\])", "", words)
