"""What a reduction does to two ranks' arrays: one row per name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..backend import Array, namespace

# name: the element-wise function, of NumPy and CuPy alike, that combines two ranks' arrays.
OPS = {
    "sum": "add",
    "mean": "add",
    "prod": "multiply",
    "min": "minimum",
    "max": "maximum",
    "logical_and": "logical_and",
    "logical_or": "logical_or",
    "logical_xor": "logical_xor",
    "bitwise_and": "bitwise_and",
    "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor",
}


def reduction_of(op: str, array: Array) -> Reduction:
    """The reduction `op` for arrays like this one.

    Errors  ValueError: no such op, or the mean of a dtype that cannot hold it. TypeError: the op has no meaning for it
    """
    if not isinstance(op, str):
        raise TypeError(f"op {op!r}: expected one of {', '.join(OPS)}")
    return _reduction(op, array.dtype, namespace(array))


def is_number(dtype: np.dtype) -> bool:
    """Whether a dtype is one of numbers: NumPy's own, or bfloat16 and the like, which NumPy takes for "void"."""
    return dtype.kind in "biufcmM" or (dtype.kind == "V" and dtype.type is not np.void)


@cache
def _reduction(op: str, dtype: np.dtype, xp: Any) -> Reduction:
    if op not in OPS:
        raise ValueError(f"op {op!r}: choose one of {', '.join(OPS)}")
    if not is_number(dtype):
        raise TypeError(f"op {op!r} of {dtype}: only numbers can be combined")
    if op == "mean" and dtype.kind in "iub":
        raise ValueError(f"op 'mean' of {dtype}: the mean of integers is no integer; use op='sum' and divide")
    function, nothing = getattr(xp, OPS[op]), xp.empty(0, dtype)
    try:
        function(nothing, nothing, out=nothing)
    except TypeError as error:
        raise TypeError(f"op {op!r} of {dtype}: {error}") from None
    return Reduction(op, function)


class Reduction:
    """One of OPS, for arrays of one dtype."""

    __slots__ = ("op", "_function")

    def __init__(self, op: str, function: Any):
        self.op = op
        self._function = function

    def combine(self, mine: Array, theirs: Array, theirs_first: bool = False) -> None:
        """Fold `theirs` into `mine`, in place.

        Of two zeros or two nans, some functions return the first: where two ranks compute the same, the lower rank's
        array must come first on both, or their bits could differ.
        """
        if theirs_first:
            self._function(theirs, mine, out=mine)
        else:
            self._function(mine, theirs, out=mine)

    def combine_all(self, arrays: list[Array], out: Array) -> None:
        """Combine two or more arrays, in order, into `out`, which may be the first of them."""
        self._function(arrays[0], arrays[1], out=out)
        for array in arrays[2:]:
            self._function(out, array, out=out)

    def finish(self, array: Array, ranks: int) -> None:
        """Turn the combined values of all `ranks` into the result, in place; twice does harm (of a mean)."""
        if self.op == "mean" and ranks & (ranks - 1):
            array /= ranks
        elif self.op == "mean":
            array *= 1 / ranks  # as exact, by a power of two, and faster
        elif self.op.startswith("logical"):
            array[...] = array != 0  # of one rank alone nothing has been combined yet
