"""`python -m minidist COMMAND`: what there is beside the examples.

python -m minidist
"""

from __future__ import annotations

import sys
from collections.abc import Callable

Command = Callable[[list[str]], None]


def _steps(argv: list[str]) -> None:
    from minidist.trace.labels import main

    main(argv)


def _watch(argv: list[str]) -> None:
    from .watch.command import main

    main(argv)


def _report(argv: list[str]) -> None:
    from minidist.report.command import main

    main(argv)


def _doctor(argv: list[str]) -> None:
    from minidist.doctor import main

    main(argv)


# name: (what it does, in a line; and what is called with the rest)
COMMANDS: dict[str, tuple[str, Command]] = {
    "steps": ("the document's numbered steps, and the lines that do them", _steps),
    "watch": ("step through a collective, a pipeline schedule or a parameter server; or draw it moving", _watch),
    "report": ("a traced run as a page to look at, and as files for other programs", _report),
    "doctor": ("whether this machine is ready, with a remedy for what is wrong", _doctor),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]][1](argv[1:])
        return
    width = max(map(len, COMMANDS), default=0)
    lines = [f"  {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items()]
    usage = "\n".join(["usage: python -m minidist COMMAND [--help]", "", *lines])
    if argv and argv[0] not in ("-h", "--help"):
        raise SystemExit(f"{usage}\n\nminidist: there is no command {argv[0]!r}")
    print(usage)


if __name__ == "__main__":
    main()
