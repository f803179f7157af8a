"""algorithm="auto": which algorithm, for an array of this size, on these ranks and hosts."""

from __future__ import annotations

from collections.abc import Callable

from ..comm.base import Communicator
from ..comm.handle import Steps
from .table import ALGORITHMS


def choose(comm: Communicator, operation: str, algorithm: str, nbytes: int) -> tuple[str, Callable[..., Steps]]:
    """The algorithm's name and function.

    Errors  ValueError: the operation has no algorithm of that name
    """
    if algorithm == "auto":
        algorithm = "ring" if "ring" in ALGORITHMS[operation] else list(ALGORITHMS[operation])[-1]
    row = ALGORITHMS[operation].get(algorithm)
    if row is None:
        raise ValueError(f"{operation}: no algorithm {algorithm!r}; choose auto, {', '.join(ALGORITHMS[operation])}")
    return algorithm, row.steps
