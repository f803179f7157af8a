"""What every operation does around its algorithm: look at the array, start, record."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array
from ..comm.base import Communicator
from ..comm.handle import Handle, Steps
from .lane import Lane

PLAIN = frozenset("?bBhHiIlLqQefdFD")  # numbers


def flat_view(comm: Communicator, array: Array, written: bool = True) -> Array:
    """The array's elements in one dimension, not copied.

    Errors  TypeError, ValueError: what is no array, or not contiguous, or read-only where it will be written
    """
    if type(array) is np.ndarray and array.flags.carray and array.dtype.char in PLAIN:  # fine in every way, most often
        return array if array.ndim == 1 else array.reshape(-1)
    comm._check_array(array)
    if written and not getattr(array.flags, "writeable", True):
        raise ValueError(f"the result would be written to a read-only array (shape {array.shape}, {array.dtype})")
    return array if array.ndim == 1 else array.reshape(-1)


def run(lane: Lane, kind: str, steps: Steps, array: Array, result: Any, async_op: bool, root: int | None = None) -> Any:
    """Carry an operation out; or, with async_op, start it and return its Handle."""
    comm = lane.comm
    entry = comm.record.begin(kind, comm, root, array, lane.tag)
    if not async_op and not comm.in_flight:
        try:
            for request in steps:
                request.wait()
        finally:
            steps.close()  # if a wait has failed, now and not when the exception is forgotten
            comm.record.end(entry)
        return result
    handle = Handle(comm, lane.uses, steps, result, entry)
    return handle if async_op else handle.wait()
