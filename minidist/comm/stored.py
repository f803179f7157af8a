"""Where this machine's measurements are kept: one small JSON file, written by `python -m minidist.comm tune`."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def tuning_file() -> Path:
    """MINIDIST_TUNING, else ~/.cache/minidist/tuning-HOST.json (under XDG_CACHE_HOME where that is set)."""
    named = os.environ.get("MINIDIST_TUNING")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "minidist" / f"tuning-{socket.gethostname()}.json"


def stored_tuning() -> str:
    """The file's text; empty if there is none that can be read."""
    try:
        return tuning_file().read_text("utf-8")
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return ""
