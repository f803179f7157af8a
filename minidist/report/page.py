"""The page: one file with everything in it, the trace's numbers compressed. It opens without a network.

page(trace) -> str: its HTML.   write_page(trace, "report.html")
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from importlib import resources
from os import PathLike
from pathlib import Path

from ..trace.tables import Trace
from .data import data

SCRIPTS = ("format.js", "charts.js", "sections.js", "lanes.js", "timeline.js", "pointing.js", "page.js")


def page(trace: Trace) -> str:
    """The page's HTML."""
    files = resources.files(__package__)
    content = data(trace)
    packed = gzip.compress(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode(), 6, mtime=0)
    script = "\n".join(files.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(content["command"].split()[0]),
        "command": "\n".join(f"<span>{html.escape(word)}</span>" for word in content["command"].split()),
        "style": files.joinpath("page.css").read_text("utf-8"),
        "script": f'"use strict";\n(() => {{\n{script}\n}})();',
        "data": base64.b64encode(packed).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], files.joinpath("page.html").read_text("utf-8"))


def write_page(trace: Trace, path: str | PathLike[str]) -> None:
    Path(path).write_text(page(trace), "utf-8")
