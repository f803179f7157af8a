"""Scan, the prefix sums over the ranks: rank r ends with the sum over ranks 0 to r. By a chain, or by doubling.

    chain            0 -> 1 -> 2 -> 3 -> 4 -> 5              each adds its own to what has come and passes it on,
                                                             segment by segment

    P = 6, which ranks' sum each rank has by doubling
                     rank 0    1    2    3    4    5
    at first              0    1    2    3    4    5
    r sends to r + 1      0  0-1  1-2  2-3  3-4  4-5
    r sends to r + 2      0  0-1  0-2  0-3  1-4  2-5
    r sends to r + 4      0  0-1  0-2  0-3  0-4  0-5

The exclusive scan leaves rank r the sum over ranks 0 to r - 1, and rank 0 what it had: every rank first takes over the
array of the one before it, and then the ranks from 1 on scan.
Source: Hillis & Steele 1986, "Data parallel algorithms"; Kogge & Stone 1973 for the doubling.
"""

from __future__ import annotations

from collections.abc import Generator

from ..backend import Array, copy_into
from ..comm.base import Request
from ..comm.handle import Steps
from .chain import segments
from .chunks import Chunks
from .incoming import Incoming
from .lane import Lane
from .reductions import Reduction


def chain_scan(comm: Lane, array: Array, reduction: Reduction, exclusive: bool) -> Steps:
    """Each rank receives and sends n bytes, in k segments (see chain.py).

    dtype   kept; accumulates in it, in the order of ranks
    """
    first = yield from _take_over(comm, array, exclusive)
    count = min(segments(comm.size, array.nbytes, comm.comm.segment), max(1, array.size))
    pieces, last = Chunks(array, count), comm.size - 1
    if comm.rank > first:
        incoming = Incoming(comm, pieces, comm.rank - 1)
    # Invariant: the pieces before i are sums over all ranks from `first` to us, and on their way to the next rank.
    for i in range(count):
        if comm.rank > first:
            yield from incoming.fold(i, reduction, theirs_first=True)
        if first <= comm.rank < last:
            comm.isend(pieces[i], comm.rank + 1)
    yield from comm.sent()
    if comm.rank >= first:
        reduction.finish(array, comm.rank - first + 1)


def recursive_doubling_scan(comm: Lane, array: Array, reduction: Reduction, exclusive: bool) -> Steps:
    """Each rank sends at most ceil(lg P) messages of n bytes.

    dtype   kept; accumulates in it, as a tree over neighbouring ranks in order
    """
    first = yield from _take_over(comm, array, exclusive)
    if comm.rank < first:
        return
    partial, distance = comm.scratch_like(array), 1
    # Invariant: array is the sum over the `distance` ranks up to this one, as far as there are so many from `first` on.
    while distance < comm.size - first:
        if comm.rank + distance < comm.size:
            comm.isend(array, comm.rank + distance)
        if comm.rank - distance >= first:
            yield comm.irecv(partial, comm.rank - distance)
        yield from comm.sent()
        if comm.rank - distance >= first:
            comm.combine(array, partial, reduction, theirs_first=True)
        distance *= 2
    comm.give_back(partial)
    reduction.finish(array, comm.rank - first + 1)


def _take_over(comm: Lane, array: Array, exclusive: bool) -> Generator[Request, None, int]:
    """If the scan is to be exclusive, replace our array by that of the rank before us. Returns the first that scans."""
    if not exclusive:
        return 0
    if comm.rank + 1 < comm.size:
        comm.isend(array, comm.rank + 1)
    if comm.rank > 0:
        theirs = comm.scratch_like(array)
        yield comm.irecv(theirs, comm.rank - 1)
        yield from comm.sent()
        copy_into(array, theirs)
        comm.give_back(theirs)
    else:
        yield from comm.sent()
    return 1


def chain_scan_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(P-1) (a + n/k (b + g)) + (k-1) max(a + n/k b, n/k g) for k segments; inclusive"""
    k = segments(P, n)
    return (P - 1) * (a + n / k * (b + g)) + (k - 1) * max(a + n / k * b, n / k * g) if P > 1 else 0.0


def recursive_doubling_scan_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) (a + n b + n g); inclusive. (Low ranks finish early: if sends do not wait, theirs hold up others'.)"""
    return (P - 1).bit_length() * (a + n * (b + g))
