"""Asking other processes, each under a deadline: nothing that hangs there makes the doctor hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 3  # seconds between the signal that asks a process to end and the one that makes it
HOME = Path(__file__).parents[2]  # the folder that minidist is in


@dataclass
class Answer:
    """What a process wrote, and how it ended.

    status  its exit status; negative: the signal that ended it; None: it was not over by the deadline, and was ended
    """

    status: int | None
    out: str
    err: str

    def json(self) -> dict[str, Any] | None:
        """The object on the last line of what it wrote; None if there is none."""
        with contextlib.suppress(IndexError, ValueError):
            found = json.loads(self.out.strip().splitlines()[-1])
            return found if isinstance(found, dict) else None
        return None

    def last_words(self) -> str:
        """The line that most likely says what went wrong."""
        lines = [line.strip() for line in (self.out + "\n" + self.err).splitlines()]
        lines = [line for line in lines if any(letter.isalpha() for letter in line)] or ["it wrote nothing"]
        ours = [line for line in lines if line.startswith("mpirun started")]  # comm/world.py
        errors = [line for line in lines if re.search(r"(?i)error\b", line)]  # the last of a traceback says which
        return (ours or errors[-1:] or lines)[0][:300]


def ask(command: Sequence[str], deadline: float, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command to its end, or until `deadline` seconds are over: then it is ended, with all its children.

    Errors  OSError: it cannot be started
    """
    # Files, not pipes: a grandchild that lives on would keep a pipe open, and reading it would never end.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(deadline)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                _end(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="replace"))
    return Answer(status, *texts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: asked first, for a launcher then ends its ranks, those on other hosts too."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def inside(question: str) -> list[str]:
    """The command that puts a question of inside.py to this Python."""
    return [sys.executable, "-m", "minidist.doctor.inside", question]


def with_minidist() -> dict[str, str]:
    """What the environment needs for `inside` to find this very minidist."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))}


def shell(*words: str) -> str:
    """A command as it is typed."""
    return shlex.join(words)


def pip(*packages: str) -> str:
    """The command that installs packages for this Python."""
    return shell(sys.executable, "-m", "pip", "install", *packages)
