"""What a reduction does to two arrays: one row per name."""

from __future__ import annotations

from collections.abc import Callable

from ..backend import Array, namespace

# name: the element-wise function, of NumPy and CuPy alike, that combines two ranks' arrays.
OPS = {"sum": "add", "mean": "add", "prod": "multiply", "min": "minimum", "max": "maximum"}

Combine = Callable[[Array, Array], None]


def combiner(op: str, array: Array) -> Combine:
    """A function combine(mine, theirs) that folds `theirs` into `mine`, in place.

    Errors  ValueError: no such op, or the mean of a dtype that cannot hold it
    """
    if op not in OPS:
        raise ValueError(f"op {op!r}: choose one of {', '.join(OPS)}")
    if op == "mean" and array.dtype.kind in "iub":
        raise ValueError(f"op 'mean' of {array.dtype}: the mean of integers is not an integer; use op='sum' and divide")
    function = getattr(namespace(array), OPS[op])

    def combine(mine: Array, theirs: Array) -> None:
        function(mine, theirs, out=mine)

    return combine


def finish(op: str, array: Array, ranks: int) -> None:
    """Turn the combined values of all `ranks` into the result, in place: a mean is a sum, divided."""
    if op == "mean" and ranks > 1:
        array *= 1 / ranks  # half the time of a division
