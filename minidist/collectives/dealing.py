"""The operations that move chunks from one array to another: `scatter`, `gather` and `all_to_all`.

As those of operations.py, they are called by all ranks in the same order; with async_op=True they return a Handle.
Chunks are of one size, or, where `counts` says so, of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backend import Array, device_of, empty, namespace
from ..comm.base import Communicator
from .call import flat_view, run
from .checked import compare, refused_on_all
from .choice import choose
from .chunks import Chunks, checked_counts
from .lane import Lane


@refused_on_all
def scatter(
    comm: Communicator,
    array: Array | None,
    out: Array,
    root: int = 0,
    algorithm: str = "auto",
    *,
    counts: Sequence[int] | None = None,
    async_op: bool = False,
) -> Any:
    """Deal the root's `array` out: chunk r fills rank r's `out`, which is returned. The others pass None for `array`.

    `counts` are the elements of each rank's chunk, the same list on every rank; without it all are of one size.

    Errors  ValueError: the chunks' sizes do not add up to the array's, or ours is not that of `out`
    """
    root, mine = comm.check_root(root), flat_view(comm, out)
    sizes = _sizes(comm, counts, mine, "out")
    whole = mine[:0]
    if _is_root(comm, root, "array", array):
        if array is None:
            raise ValueError(f"array=None on rank {root}, the root, whose array is to be scattered")
        whole = _whole(flat_view(comm, array, written=False), mine, sizes, "array", "out")
    kind, steps_of = choose(comm, "scatter", algorithm, mine, nbytes=sum(sizes) * mine.itemsize)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, root=root, dtype=out.dtype, counts=sizes)
    steps = steps_of(lane, Chunks(whole, comm.size, sizes), mine, root)
    return run(lane, kind, steps, out, out, async_op, root)


@refused_on_all
def gather(
    comm: Communicator,
    array: Array,
    out: Array | None = None,
    root: int = 0,
    algorithm: str = "auto",
    *,
    counts: Sequence[int] | None = None,
    async_op: bool = False,
) -> Any:
    """Collect all ranks' arrays: rank r's fills chunk r of the root's `out`. Returns `out`; on the other ranks None.

    Without `out` the root makes one, of one dimension. `counts` are the elements of each rank's array, the same list on
    every rank; without it all are of one size.

    Errors  ValueError: the arrays' sizes do not add up to out's, or ours is not as counts says
    """
    root, mine = comm.check_root(root), flat_view(comm, array, written=False)
    sizes = _sizes(comm, counts, mine, "array")
    whole = mine[:0]
    if _is_root(comm, root, "out", out):
        if out is None:
            out = empty((sum(sizes),), mine.dtype, device_of(mine))
        whole = _whole(flat_view(comm, out), mine, sizes, "out", "array")
    kind, steps_of = choose(comm, "gather", algorithm, mine, nbytes=sum(sizes) * mine.itemsize)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, root=root, dtype=array.dtype, counts=sizes)
    steps = steps_of(lane, Chunks(whole, comm.size, sizes), mine, root)
    return run(lane, kind, steps, array, out, async_op, root)


@refused_on_all
def all_to_all(
    comm: Communicator,
    array: Array,
    out: Array | None = None,
    algorithm: str = "auto",
    *,
    counts: Sequence[int] | None = None,
    out_counts: Sequence[int] | None = None,
    async_op: bool = False,
) -> Any:
    """Everybody deals to everybody: chunk j of `array` goes to rank j, chunk i of `out` comes from rank i. Returns out.

    Chunks are of one size unless `counts` (of mine, to each rank) and `out_counts` (from each rank, to me) say
    otherwise. Without `out` one is made: like `array`, or of one dimension with counts.

    Errors  ValueError: an array that cannot be cut so, counts that do not fit, `out` overlaps `array`
    """
    mine, sizes, out_sizes = flat_view(comm, array, written=False), None, None
    if counts is not None and out_counts is not None:
        sizes, out_sizes = checked_counts(counts, comm.size, mine.size), checked_counts(out_counts, comm.size)
        if sizes[comm.rank] != out_sizes[comm.rank]:
            raise ValueError(
                f"counts {sizes} and out_counts {out_sizes} differ in what rank {comm.rank} deals to itself"
            )
        if algorithm == "bruck":
            raise ValueError("algorithm 'bruck' passes on chunks of one size only; with counts choose auto or pairwise")
        if algorithm == "auto":
            algorithm = "pairwise"  # the same on all ranks, which do not know one another's sizes
    elif counts is not None or out_counts is not None:
        raise ValueError(f"counts={counts}, out_counts={out_counts}: all_to_all needs both of them, or neither")
    elif mine.size % comm.size:
        raise ValueError(
            f"an array of {mine.size} elements cannot be cut into {comm.size} chunks of one size; "
            "say by counts and out_counts how it is dealt"
        )
    length = mine.size if out_sizes is None else sum(out_sizes)
    if out is None:
        out = empty(array.shape if out_sizes is None else (length,), mine.dtype, device_of(mine))
    theirs = flat_view(comm, out)
    _check_alike(mine, theirs, "array", "out")
    if theirs.size != length:
        raise ValueError(f"out has {theirs.size} elements, the chunks to come {length}")
    if namespace(mine).may_share_memory(mine, theirs):
        raise ValueError(
            f"array (shape {array.shape}) and out (shape {out.shape}) overlap in memory: chunks that come would "
            "overwrite others before they have gone"
        )
    kind, steps_of = choose(comm, "all_to_all", algorithm, mine)
    lane = Lane(comm)
    if comm.checked:
        compare(lane, kind, size=mine.size if sizes is None else "by counts", dtype=array.dtype)
    steps = steps_of(lane, Chunks(mine, comm.size, sizes), Chunks(theirs, comm.size, out_sizes))
    return run(lane, kind, steps, array, out, async_op)


def _sizes(comm: Communicator, counts: Sequence[int] | None, mine: Array, name: str) -> list[int]:
    """The elements of each rank's chunk, of which one is `mine`."""
    if counts is None:
        return [mine.size] * comm.size
    sizes = checked_counts(counts, comm.size)
    if sizes[comm.rank] != mine.size:
        raise ValueError(f"{name} has {mine.size} elements, where counts {sizes} gives rank {comm.rank} another number")
    return sizes


def _is_root(comm: Communicator, root: int, name: str, array: Array | None) -> bool:
    """Whether this rank is; who is not has no business with the whole array."""
    if comm.rank != root and array is not None:
        raise ValueError(f"{name} is the root's alone: pass None on rank {comm.rank}, as the root is rank {root}")
    return comm.rank == root


def _whole(whole: Array, mine: Array, sizes: list[int], name: str, other: str) -> Array:
    """The root's array of all chunks, found to be as long as they are together."""
    _check_alike(whole, mine, name, other)
    if whole.size != sum(sizes):
        raise ValueError(
            f"{name} has {whole.size} elements, where the {len(sizes)} ranks' chunks have {sum(sizes)} together; "
            "say by counts where they are not of one size"
        )
    return whole


def _check_alike(one: Array, other: Array, name: str, other_name: str) -> None:
    if one.dtype != other.dtype or device_of(one) != device_of(other):
        raise ValueError(
            f"{name} is {one.dtype} on {device_of(one)}, {other_name} is {other.dtype} on {device_of(other)}: they "
            "must be alike"
        )
