"""A picture of a partition: who holds what. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np


def draw_partitions(histograms: dict[str, np.ndarray], path: str | PathLike[str]) -> None:
    """One panel a partition, by name: a bar for each rank, as long as its samples are many, in a colour for each label.

    Shapes  histograms (ranks, labels) of counts, as `Loader.histogram` gives them; `path` ends in .svg, .png or .pdf
    Errors  ImportError: no matplotlib
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "minidist"  # the same bytes every time
    ranks, labels = max(len(h) for h in histograms.values()), max(h.shape[1] for h in histograms.values())
    figure = Figure(figsize=(3.2 * len(histograms) + 0.8, 0.9 + 0.35 * ranks), layout="constrained")
    axes: Any = figure.subplots(1, len(histograms), sharex=True, sharey=True, squeeze=False)[0]
    colours = matplotlib.colormaps["tab10" if labels <= 10 else "turbo"]
    for ax, (name, counts) in zip(axes, histograms.items()):
        left = np.zeros(len(counts))
        for label in range(counts.shape[1]):
            colour = colours(label if labels <= 10 else label / max(labels - 1, 1))
            ax.barh(range(len(counts)), counts[:, label], left=left, color=colour, label=str(label))
            left += counts[:, label]
        ax.set_title(name)
        ax.set_xlabel("samples an epoch")
        ax.set_yticks(range(len(counts)), [f"rank {rank}" for rank in range(len(counts))])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    if labels <= 20:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", title="label")
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
