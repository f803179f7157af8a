"""The operations, as a program calls them. All ranks of the communicator call the same, in the same order.

With async_op=True an operation is started, and its Handle returned: `wait()` returns what the call would have, `test()`
says whether it is done. Several may be in flight; the arrays belong to them meanwhile.

`accumulate` is for arrays of floats: "float32" makes 16-bit ones travel and add up in that dtype, rounded once at the
end, for twice the bytes. ("float64" does the same for float32.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array
from ..comm.base import Communicator
from ..comm.handle import Steps
from .call import flat_view, run
from .checked import compare, refused_on_all
from .choice import choose
from .chunks import Chunks, checked_counts
from .dealing import all_to_all, gather, scatter  # noqa: F401  they are operations like those below
from .lane import Lane
from .reductions import is_number, reduction_of


@refused_on_all
def all_reduce(
    comm: Communicator,
    array: Array,
    op: str = "sum",
    algorithm: str = "auto",
    *,
    accumulate: str | None = None,
    async_op: bool = False,
) -> Any:
    """Combine all ranks' arrays; every rank ends with the whole result. In place; returns array.

    `op` is one of OPS: sum, mean, prod, min, max, logical_and, ... All ranks get the same bits.
    """
    flat = flat_view(comm, array)
    wide = flat if accumulate is None else _widened(flat, accumulate)
    reduction = reduction_of(op, wide)
    kind, steps_of = choose(comm, "all_reduce", algorithm, wide, op)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, op=op, shape=array.shape, dtype=array.dtype, accumulate=accumulate)
    steps = steps_of(lane, wide, reduction)
    if wide is not flat:
        steps = _narrowed(steps, wide, flat)
    return run(lane, kind, steps, array, array, async_op)


@refused_on_all
def reduce_scatter(
    comm: Communicator,
    array: Array,
    op: str = "sum",
    algorithm: str = "auto",
    *,
    counts: Sequence[int] | None = None,
    accumulate: str | None = None,
    async_op: bool = False,
) -> Any:
    """Combine all ranks' arrays; return this rank's chunk of the result, a view of `array` in one dimension.

    `counts` are the elements of each rank's chunk; without it chunks are those of np.array_split(flat, P). The rest of
    `array` is used as work space: afterwards it holds nothing of meaning.
    """
    flat = flat_view(comm, array)
    sizes = None if counts is None else checked_counts(counts, comm.size, flat.size)
    wide = flat if accumulate is None else _widened(flat, accumulate)
    reduction = reduction_of(op, wide)
    kind, steps_of = choose(comm, "reduce_scatter", algorithm, wide, op)
    lane = Lane(comm)
    if comm.checked:
        like = {"shape": array.shape, "dtype": array.dtype, "counts": sizes}
        compare(lane, kind, op=op, **like, accumulate=accumulate)
    chunks = Chunks(wide, comm.size, sizes)
    steps, chunk = steps_of(lane, chunks, reduction), chunks[comm.rank]
    if wide is not flat:
        chunk = Chunks(flat, comm.size, sizes)[comm.rank]
        steps = _narrowed(steps, chunks[comm.rank], chunk)
    return run(lane, kind, steps, array, chunk, async_op)


@refused_on_all
def all_gather(
    comm: Communicator,
    array: Array,
    algorithm: str = "auto",
    *,
    counts: Sequence[int] | None = None,
    async_op: bool = False,
) -> Any:
    """Each rank's chunk of `array` counts; every rank ends with all of them. In place; returns array.

    `counts` are the elements of each rank's chunk; without it chunks are those of np.array_split(flat, P).
    """
    flat = flat_view(comm, array)
    sizes = None if counts is None else checked_counts(counts, comm.size, flat.size)
    kind, steps_of = choose(comm, "all_gather", algorithm, flat)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, shape=array.shape, dtype=array.dtype, counts=sizes)
    steps = steps_of(lane, Chunks(flat, comm.size, sizes))
    return run(lane, kind, steps, array, array, async_op)


@refused_on_all
def broadcast(
    comm: Communicator, array: Array, root: int = 0, algorithm: str = "auto", *, async_op: bool = False
) -> Any:
    """Every rank ends with the root's array. In place; returns array."""
    root = comm.check_root(root)
    flat = flat_view(comm, array, written=comm.rank != root)
    kind, steps_of = choose(comm, "broadcast", algorithm, flat)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, root=root, shape=array.shape, dtype=array.dtype)
    return run(lane, kind, steps_of(lane, flat, root), array, array, async_op, root)


@refused_on_all
def reduce(
    comm: Communicator,
    array: Array,
    op: str = "sum",
    root: int = 0,
    algorithm: str = "auto",
    *,
    accumulate: str | None = None,
    async_op: bool = False,
) -> Any:
    """Combine all ranks' arrays; the root ends with the result. In place; returns array.

    The other ranks' arrays are used as work space: afterwards they hold nothing of meaning.
    """
    root = comm.check_root(root)
    flat = flat_view(comm, array)
    wide = flat if accumulate is None else _widened(flat, accumulate)
    reduction = reduction_of(op, wide)
    kind, steps_of = choose(comm, "reduce", algorithm, wide, op)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, op=op, root=root, shape=array.shape, dtype=array.dtype, accumulate=accumulate)
    steps = steps_of(lane, wide, reduction, root)
    if wide is not flat:
        steps = _narrowed(steps, wide, flat)
    return run(lane, kind, steps, array, array, async_op, root)


@refused_on_all
def scan(
    comm: Communicator,
    array: Array,
    op: str = "sum",
    algorithm: str = "auto",
    *,
    exclusive: bool = False,
    accumulate: str | None = None,
    async_op: bool = False,
) -> Any:
    """Combine the arrays of all ranks up to this one: rank r ends with ranks 0 to r. In place; returns array.

    exclusive=True combines ranks 0 to r - 1, and leaves rank 0's array as it is. The mean is that of the arrays
    combined: of r + 1, or of r.
    """
    flat = flat_view(comm, array)
    wide = flat if accumulate is None else _widened(flat, accumulate)
    reduction = reduction_of(op, wide)
    kind, steps_of = choose(comm, "scan", algorithm, wide, op)
    lane = Lane(comm)
    if comm.checked:
        like = {"shape": array.shape, "dtype": array.dtype, "accumulate": accumulate}
        compare(lane, kind, op=op, exclusive=exclusive, **like)
    steps = steps_of(lane, wide, reduction, exclusive)
    if wide is not flat:
        steps = _narrowed(steps, wide, flat)
    return run(lane, kind, steps, array, array, async_op)


@refused_on_all
def barrier(comm: Communicator, algorithm: str = "auto", *, async_op: bool = False) -> Any:
    """Return when every rank has called it."""
    kind, steps_of = choose(comm, "barrier", algorithm, _NOTHING)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind)
    return run(lane, kind, steps_of(lane), _NOTHING, None, async_op)


_NOTHING = np.empty(0, np.uint8)


def _widened(flat: Array, accumulate: str) -> Array:
    """The array in the dtype to accumulate in: itself, or a copy."""
    try:
        dtype = np.dtype(accumulate)
    except TypeError:
        raise ValueError(f"accumulate={accumulate!r}: choose 'float32' or 'float64'") from None
    is_float = flat.dtype.kind == "f" or (flat.dtype.kind == "V" and is_number(flat.dtype))
    if dtype not in (np.float32, np.float64) or not is_float or flat.dtype.itemsize > dtype.itemsize:
        raise ValueError(
            f"accumulate={accumulate!r} of {flat.dtype}: only floats can be accumulated in another dtype, "
            "in float32 or float64, and not in a narrower one"
        )
    return flat if dtype == flat.dtype else flat.astype(dtype)


def _narrowed(steps: Steps, wide: Array, flat: Array) -> Steps:
    """`steps`, which work on `wide`, and then its content rounded into `flat`."""
    yield from steps
    flat[...] = wide
