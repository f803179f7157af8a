"""A linear layer dealt over ranks, as functions: by its outputs (columns), or by its inputs (rows).

    one rank        y   = x   @ W.T   + b
    by columns      y_r = x   @ W_r.T + b_r               W_r: some of W's rows, so some of y's columns
    by rows         y   = Σ_r x_r @ W_r.T  + b            W_r: some of W's columns, which meet some of x's

One after the other they need one sum over the ranks forward, behind the second, and one backward, before the first.
Either sum may be cut in two, a reduce_scatter and an all_gather, along the sequence: then what lies between this pair
of layers and the next one (norms, dropout, sums) is done by each rank for its part of the sequence only.

                                 forward                           backward
    columns                      -                                 all_reduce dx
    rows                         all_reduce y                      -
    columns, of a sequence       all_gather x                      all_gather x again, reduce_scatter dx
    rows, of a sequence          reduce_scatter y                  all_gather dy

What is summed was computed here and is nobody else's: it is summed in place. The gradients of w and b are computed
while that of x is summed.

Sources  Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2 (of a sequence; x is gathered again
         because only this rank's part of it is kept)
"""

from __future__ import annotations

import math
from typing import Any

from .. import backend
from ..backend import Array, namespace
from ..collectives import all_gather, all_reduce, reduce_scatter
from ..comm import Communicator
from ..ops.common import same_dtype
from ..tensor import Function, Tensor
from .functions import STEP


def rows(x: Array) -> Array:
    """(..., I) as (N, I). Not with reshape's -1, which I = 0 leaves open: there may be more ranks than features."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(a: Array, b: Array) -> Array:
    """a @ b, contiguous, so that it can be communicated as it is.   a (N, I), b (I, O) -> (N, O)"""
    y = backend.empty((a.shape[0], b.shape[1]), a.dtype, backend.device_of(a))
    return namespace(a).matmul(a, b, out=y)


class DealtLinear(Function):
    """y = x @ w.T + b, of which w, and b or x, are this rank's part; common to the four."""

    comm: Communicator

    def of_input(self, x: Array, w: Array, b: Array | None) -> Array:
        """x @ w.T + b.   x (N, I) -> (N, O)"""
        y = product(x, w.T)
        if b is not None:
            y += b
        return y

    def of_parameters(self, dy: Array, x: Array) -> tuple[Array | None, Array | None]:
        """dw = dy.T @ x and db = 1 @ dy, where they are wanted.   dy (N, O), x (N, I)"""
        xp = namespace(dy)
        dw = xp.matmul(dy.T, x, out=self.into[1]) if self.needs[1] else None
        db = xp.matmul(xp.ones(len(dy), dy.dtype), dy, out=self.into[2]) if self.needs[2] else None
        return dw, db


class ColumnLinear(DealtLinear):
    """y = x @ w.T + b.   x (..., I), equal on all ranks; w (O/P, I), b (O/P) -> y (..., O/P)

    dx = dy @ w, summed over all ranks         (..., I)
    dw, db as of any linear layer
    """

    def forward(self, x: Array, w: Array, b: Array | None, comm: Communicator) -> Array:
        self.comm = comm
        self.save(x, w)
        return self.of_input(rows(x), w, b).reshape(*x.shape[:-1], len(w))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, w = self.saved
        dy = rows(dy)
        # 1. The ranks add up dx ...
        if self.needs[0]:
            dx = product(dy, w)
            with self.comm.step(STEP):
                summing = all_reduce(self.comm, dx, async_op=True)
        # 2. ... while they compute the other gradients.
        dw, db = self.of_parameters(dy, rows(x))
        return summing.wait().reshape(x.shape) if self.needs[0] else None, dw, db


class RowLinear(DealtLinear):
    """y = x @ w.T, summed over all ranks, + b.   x (..., I/P), w (O, I/P); b (O), equal on all -> y (..., O), as well

    dx, dw, db as of any linear layer: dy is the same on all ranks
    """

    def forward(self, x: Array, w: Array, b: Array | None, comm: Communicator) -> Array:
        self.save(x, w)
        y = product(rows(x), w.T)
        with comm.step(STEP):
            all_reduce(comm, y)
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], len(w))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, w = self.saved
        dy = rows(dy)
        dx = product(dy, w).reshape(x.shape) if self.needs[0] else None
        return dx, *self.of_parameters(dy, rows(x))


# -- of a sequence: x (B, T, I); each rank has T/P of it, one after the other ----------------------------------------

# Chunks of dim 1 lie apart in memory. So all these work with the time first: (T, B, I), as one matrix (T * B, I).


def time_first(x: Array) -> Array:
    """(B, T, I) as (T * B, I)."""
    return rows(x.swapaxes(0, 1))


def batch_first(x: Array, batch: int) -> Array:
    """(T * B, I) as (B, T, I). A view."""
    return x.reshape(len(x) // max(batch, 1), batch, x.shape[1]).swapaxes(0, 1)


def start_gather(comm: Communicator, part: Array) -> Any:
    """Start to join all ranks' parts of a sequence: (B, T/P, I). The handle's wait gives them as (T * B, I)."""
    batch, length, width = part.shape
    whole = backend.empty((comm.size, length, batch, width), part.dtype, backend.device_of(part))
    whole[comm.rank] = part.swapaxes(0, 1)
    with comm.step(STEP):
        return all_gather(comm, rows(whole), async_op=True)


def start_scatter(comm: Communicator, whole: Array) -> Any:
    """Start to sum (T * B, I) over all ranks, in place. The handle's wait gives this rank's part, flat, a view."""
    with comm.step(STEP):
        return reduce_scatter(comm, whole, async_op=True)


class GatheredColumnLinear(DealtLinear):
    """y = x @ w.T + b, x being all ranks' parts.   x (B, T/P, I), w (O/P, I), b (O/P) -> y (B, T, O/P)

    dx = this rank's part of dy @ w, summed over all ranks        (B, T/P, I)
    dw, db as of any linear layer, with the whole x
    """

    def forward(self, x: Array, w: Array, b: Array | None, comm: Communicator) -> Array:
        self.comm = comm
        self.save(x, w)
        return batch_first(self.of_input(start_gather(comm, x).wait(), w, b), len(x))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, w = self.saved
        dy, dx = time_first(dy), None
        # 1. x comes together again, and dx is computed meanwhile;
        gathering = start_gather(self.comm, x) if self.needs[1] else None
        if self.needs[0]:
            scattering = start_scatter(self.comm, product(dy, w))
        # 2. dx is summed, and the other gradients are computed meanwhile.
        dw, db = self.of_parameters(dy, gathering.wait() if gathering else None)
        if self.needs[0]:
            dx = batch_first(scattering.wait().reshape(-1, x.shape[2]), len(x)).copy()  # to let go of the rest
        return dx, dw, db


class ScatteredRowLinear(DealtLinear):
    """y = this rank's part of x @ w.T, summed over all ranks, + b.   x (B, T, I/P), w (O, I/P), b (O) -> y (B, T/P, O)

    dx, dw, db as of any linear layer, with dy being all ranks' parts
    """

    def forward(self, x: Array, w: Array, b: Array | None, comm: Communicator) -> Array:
        self.comm = comm
        self.save(x, w)
        y = start_scatter(comm, product(time_first(x), w.T)).wait()
        y = batch_first(y.reshape(-1, len(w)), len(x))
        return y.copy() if b is None else y + b

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, w = self.saved
        dy = start_gather(self.comm, dy).wait()
        dx = batch_first(product(dy, w), len(x)) if self.needs[0] else None
        return dx, *self.of_parameters(dy, time_first(x))


# -- what is called --------------------------------------------------------------------------------------------------


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, sequence_parallel: bool = False
) -> Tensor:
    """This rank's columns of the result.

    Shapes  x (..., I), weight (O/P, I), bias (O/P) -> (..., O/P); with sequence_parallel x (B, T/P, I) -> (B, T, O/P)
    Errors  as F.linear; ValueError: a sequence not in 3 dims
    """
    _check("column_linear", x, weight, bias, sequence_parallel)
    return (GatheredColumnLinear if sequence_parallel else ColumnLinear).apply(x, weight, bias, comm=comm)


def row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, comm: Communicator, sequence_parallel: bool = False
) -> Tensor:
    """The whole result, from this rank's columns of x.

    Shapes  x (..., I/P), weight (O, I/P), bias (O) -> (..., O); with sequence_parallel x (B, T, I/P) -> (B, T/P, O)
    Errors  as column_linear; ValueError: a sequence that does not divide
    """
    _check("row_linear", x, weight, bias, sequence_parallel)
    if sequence_parallel:
        check_divides(x.shape[1], comm)
    return (ScatteredRowLinear if sequence_parallel else RowLinear).apply(x, weight, bias, comm=comm)


def check_divides(length: int, comm: Communicator) -> None:
    """Raise ValueError for a sequence that cannot be dealt in equal parts."""
    if length % comm.size:
        raise ValueError(f"sequence parallel: a sequence of {length} does not divide into {comm.size} parts")


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, sequence_parallel: bool) -> None:
    same_dtype(name, x, weight, bias)
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"{name}: x {x.shape} and this rank's weight {weight.shape} do not match in their last dim")
    if sequence_parallel and x.ndim != 3:
        raise ValueError(f"{name}: sequence parallel needs x of 3 dims (batch, time, channels), not shape {x.shape}")
