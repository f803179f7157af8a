"""Pictures of a trace for papers, PNG and SVG. Needs matplotlib, the extra `plot`.

write_plots(trace, "pictures")   # curves, breakdown, traffic and step, each as .png and .svg
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import PARTS, breakdown, parts_of, traffic
from .tables import Trace

# Those of the page, by day.
COLOURS = {
    "forward": "#4377ac",
    "backward": "#2e7d6e",
    "update": "#7d62a4",
    "recompute": "#5f778e",
    "compute": "#4377ac",
    "hidden": "#cdb653",
    "exposed": "#b8542a",
    "idle": "#c9c5bb",
}
MOST_ARROWS = 200  # of messages: more can't be told apart


def write_plots(trace: Trace, folder: str | PathLike[str]) -> list[Path]:
    """Draw what the trace has something for; returns the files.

    Errors  ImportError: no matplotlib
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = len(trace.ranks)
    drawings: list[tuple[str, Callable[[Trace, Any], bool], tuple[float, float]]] = [
        ("curves", draw_curves, (5, 3)),
        ("breakdown", draw_breakdown, (6, 1.1 + 0.4 * ranks)),
        ("traffic", draw_traffic, (1.6 + 0.75 * ranks, 1.2 + 0.6 * ranks)),
        ("step", draw_step, (9, 1.1 + 0.65 * ranks)),
    ]
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "minidist", "font.size": 9}):  # the same bytes every time
        for name, draw, size in drawings:
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots()
            if draw(trace, axes):
                for kind, metadata in (("png", None), ("svg", {"Date": None})):
                    written.append(folder / f"{name}.{kind}")
                    figure.savefig(written[-1], metadata=metadata, dpi=200)
    return written


def draw_curves(trace: Trace, axes: Any) -> bool:
    """Loss (left) and accuracy (right) of the first rank that tells them, against seconds. False: there are none."""
    zero = trace.span[0]
    found = False
    for name, colour in (("loss", COLOURS["compute"]), ("accuracy", COLOURS["exposed"])):
        for rank in trace.ranks:
            mine = np.array([each == name for each in rank.values.name], bool)
            if mine.any():
                ax = axes.twinx() if found else axes
                line = dict(color=colour, linewidth=1, marker="o" if mine.sum() < 30 else None, markersize=3)
                ax.plot((rank.values.time[mine] - zero) / 1e9, rank.values.value[mine], **line)
                ax.set_ylabel(name, color=colour)
                ax.spines["top"].set_visible(False)
                found = True
                break
    axes.set_xlabel("seconds")
    return found


def draw_breakdown(trace: Trace, axes: Any) -> bool:
    """A bar for each rank: the parts of its training step, milliseconds in the mean. False: there are no steps."""
    having = [(rank.number, part) for rank, part in zip(trace.ranks, breakdown(trace)) if len(part.step)]
    if not having:
        return False
    names = [f"rank {number}" for number, _ in having]
    left = np.zeros(len(having))
    for name in PARTS:
        values = np.array([getattr(part, name).mean() / 1e6 for _, part in having])
        axes.barh(names, values, left=left, color=COLOURS[name], label=name, height=0.65)
        left += values
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds in a training step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False)
    return True


def draw_traffic(trace: Trace, axes: Any) -> bool:
    """Who sent how many megabytes to whom. False: nobody."""
    megabytes = traffic(trace).bytes / 1e6
    if not megabytes.any():
        return False
    axes.imshow(megabytes, cmap="YlOrBr", vmin=0)
    for (sender, receiver), amount in np.ndenumerate(megabytes):
        if amount and len(megabytes) <= 16:
            colour = "white" if amount > 0.6 * megabytes.max() else "black"
            words = f"{amount:,.0f}" if amount >= 100 else f"{amount:.2g}"
            axes.text(receiver, sender, words, ha="center", va="center", color=colour)
    every = range(len(megabytes))
    axes.set_xticks(every, every)
    axes.set_yticks(every, [f"rank {rank}" for rank in every])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("megabytes to rank")
    axes.spines[:].set_visible(False)
    return True


def draw_step(trace: Trace, axes: Any) -> bool:
    """The training step of median length, of the first rank that has any, and what all did in it. False: no steps."""
    first = next((rank for rank in trace.ranks if len(rank.steps)), None)
    if first is None:
        return False
    lengths = first.steps.end - first.steps.start
    step = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    begin, end = int(first.steps.start[step]), int(first.steps.end[step])
    seen = {}

    def bars(row: int, starts: np.ndarray, ends: np.ndarray, name: str) -> None:
        inside = (ends > begin) & (starts < end)
        left = np.maximum(starts[inside], begin)
        widths = np.minimum(ends[inside], end) - left
        if inside.any():
            seen[name] = axes.barh(
                [row] * len(left), widths / 1e6, left=(left - begin) / 1e6, color=COLOURS[name], height=0.6
            )

    for rank, parts in zip(trace.ranks, parts_of(trace)):
        for kind in ("forward", "backward", "recompute", "update"):
            mine = np.array([each == kind for each in rank.computing.kind], bool)
            bars(rank.number, rank.computing.start[mine], rank.computing.end[mine], kind)
        for name in ("exposed", "idle"):
            bars(rank.number, parts[name].starts, parts[name].ends, name)
    messages = trace.messages
    inside = np.flatnonzero((messages.arrived > begin) & (messages.sent < end))
    for i in inside if len(inside) <= MOST_ARROWS else ():
        tail = ((messages.sent[i] - begin) / 1e6, messages.sender[i])
        head = ((messages.arrived[i] - begin) / 1e6, messages.receiver[i])
        axes.annotate(
            "", head, tail, arrowprops={"arrowstyle": "-|>", "lw": 0.5, "color": "#23262b", "mutation_scale": 5}
        )
    axes.set_xlim(0, (end - begin) / 1e6)
    axes.set_yticks(range(len(trace.ranks)), [f"rank {rank.number}" for rank in trace.ranks])
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds since the beginning of training step {first.steps.number[step]}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(seen.values(), seen, loc="outside upper center", ncols=len(seen), frameon=False)
    return True
