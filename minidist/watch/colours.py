"""The colours of the pictures, by name: for light, and for dark."""

from __future__ import annotations

RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#3fa7a0", "#d4a72c", "#9c755f")  # told apart by most

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "dim": "#656d76",
    "rule": "#d0d7de",
    "cell": "#f6f8fa",
    "done": "#1a7f37",
    "accent": "#0969da",
    "forward": "#3b82c4",
    "backward": "#d9822b",
    "weight": "#4d9b51",
    "wait": "#c9d1d9",
    "late": "#cf222e",
    "onfill": "#ffffff",
}
DARK = {
    **LIGHT,
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "dim": "#8b949e",
    "rule": "#30363d",
    "cell": "#161b22",
    "done": "#3fb950",
    "accent": "#4493f8",
    "wait": "#30363d",
    "late": "#f85149",
}
SHARED = {f"rank{i}": colour for i, colour in enumerate(RANKS)}  # the same in both


def of_rank(rank: int) -> str:
    """The name of a rank's colour."""
    return f"rank{rank % len(RANKS)}"
