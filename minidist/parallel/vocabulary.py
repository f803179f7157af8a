"""A vocabulary dealt over ranks: its embedding, the head that shares the embedding's weight, and the loss.

The vocabulary is the widest dim of a small model, and logits are its largest activation. Each rank has some of the
rows of the table, and so some of the logits' columns. They are never brought together: the loss needs three numbers of
each token's row from the other ranks (the largest logit, the sum of e**x, the target's own logit).

Source  Shoeybi et al. 2019, section 3
"""

from __future__ import annotations

import math

import numpy as np

from .. import backend, nn
from ..backend import Array, namespace
from ..collectives import all_reduce, chunk_slice
from ..comm import Communicator
from ..nn import Module, Parameter
from ..ops.common import wide
from ..ops.embedding import Embedding
from ..tensor import Function, Tensor
from .functions import STEP
from .linear import batch_first, check_divides, column_linear, rows, start_gather, start_scatter
from .splits import Split


class DealtEmbedding(Embedding):
    """y = W[indices], summed over all ranks, of which each finds the rows it has, w.   indices (...) -> y (..., E)

    dw as of any embedding, from the places whose row is here
    """

    def forward(self, indices: Array, w: Array, first: int, comm: Communicator) -> Array:  # type: ignore[override]
        y = self.found(indices, w, first)
        with comm.step(STEP):
            all_reduce(comm, y)
        return y.reshape(*indices.shape, w.shape[1])

    def found(self, indices: Array, w: Array, first: int) -> Array:
        """The rows that are here, 0 for the others.   indices (N places), w: the rows from `first` on -> (N, E)"""
        xp = namespace(w)
        ids = indices.reshape(-1).astype(np.int64, copy=False) - first
        here = xp.flatnonzero((ids >= 0) & (ids < len(w)))
        ids = ids[here]
        y = backend.full((indices.size, w.shape[1]), 0, w.dtype, backend.device_of(w))
        y[here] = w[ids]
        self.shape, self.padding_idx = w.shape, None
        self.save(ids, here)
        return y

    def backward(self, dy: Array) -> tuple[None, Array]:
        return super().backward(rows(dy)[self.saved[1]])


class ScatteredEmbedding(DealtEmbedding):
    """This rank's part of that, along the sequence.   indices (B, T) -> y (B, T/P, E)"""

    def forward(self, indices: Array, w: Array, first: int, comm: Communicator) -> Array:  # type: ignore[override]
        self.comm = comm
        y = start_scatter(comm, self.found(indices.T, w, first)).wait()
        return batch_first(y.reshape(-1, w.shape[1]), len(indices)).copy()  # to let go of the rest

    def backward(self, dy: Array) -> tuple[None, Array]:
        return super().backward(start_gather(self.comm, dy).wait())


class VocabParallelEmbedding(Module):
    """A row of the table for each number; each rank holds some rows.

    Shapes  x (...) of int, equal on every rank -> (..., E), equal too; with sequence_parallel (B, T) -> (B, T/P, E)
            weight (V/P, E): the rows dealt as np.array_split does
    Comm    forward one all_reduce of the result; backward none.   With sequence_parallel one reduce_scatter of it
            forward, one all_gather backward
    Init    drawn whole by every rank, which keeps its slice: P ranks have the rows that nn.Embedding has
    Errors  IndexError: an index outside the table; ValueError: a T that does not divide
    Source  Shoeybi et al. 2019, section 3
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, comm: Communicator, sequence_parallel: bool = False):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.comm, self.sequence_parallel = comm, sequence_parallel
        self.splits = {"weight": Split(0)}
        whole = nn.Embedding(num_embeddings, embedding_dim).weight.data
        self.weight = Parameter(self.splits["weight"].slice(whole, comm.size, comm.rank))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.kind not in "iu":
            raise TypeError(f"VocabParallelEmbedding: the indices must be integers, not {x.dtype}")
        _check_numbers("VocabParallelEmbedding: index", x.data, self.num_embeddings)
        first = chunk_slice(self.num_embeddings, self.comm.size, self.comm.rank).start
        if not self.sequence_parallel:
            return DealtEmbedding.apply(x, self.weight, first=first, comm=self.comm)
        if x.ndim != 2:
            raise ValueError(f"VocabParallelEmbedding: sequence parallel needs x (batch, time), not shape {x.shape}")
        check_divides(x.shape[1], self.comm)
        return ScatteredEmbedding.apply(x, self.weight, first=first, comm=self.comm)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.comm.size} ranks"


class VocabParallelHead(Module):
    """Logits by the embedding's own weight: the same Parameter object, or its copy on another pipeline stage.

    Shapes  x (..., E), equal on every rank -> (..., V/P); with sequence_parallel (B, T/P, E) -> (B, T, V/P)
    Comm    as ColumnParallelLinear
    Source  Press & Wolf 2017 (the tie)
    """

    def __init__(self, weight: Parameter, comm: Communicator, sequence_parallel: bool = False):
        self.comm, self.sequence_parallel = comm, sequence_parallel
        self.splits = {"weight": Split(0)}
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, None, self.comm, self.sequence_parallel)


class VocabCrossEntropy(Function):
    """The loss of N samples, from this rank's columns x (N, C/P) of the logits and class numbers t (N), reduced.

    With s_i = Σ_c e**x[i, c], over all ranks' columns, and Z = N for the mean, else 1:

    loss_i   = log s_i - x[i, t_i]
    dx[i, c] = dloss_i (e**x[i, c] / s_i - [c = t_i]) / Z, of this rank's columns: without a message
    """

    def forward(self, x: Array, t: Array, comm: Communicator, reduction: str) -> Array:
        xp = namespace(x)
        self.shape, self.dtype, self.reduction = x.shape, x.dtype, reduction
        x, t = wide(rows(x)), t.reshape(-1)
        # 1. The largest logit of each sample. With it all hear how many columns each rank has.
        told = xp.full(len(x) + comm.size, -math.inf, x.dtype)
        largest, widths = told[: len(x)], told[len(x) :]
        widths[comm.rank] = x.shape[1]
        if x.shape[1]:
            x.max(axis=1, out=largest)
        with comm.step(STEP):
            all_reduce(comm, told, "max")
        columns = [int(width) for width in widths.tolist()]
        _check_numbers("vocab_parallel_cross_entropy: target", t, sum(columns))
        # 2. The sum of e**x, and the target's own logit, which one rank has; both less the largest.
        t = t.astype(np.int64, copy=False) - sum(columns[: comm.rank])
        here = xp.flatnonzero((t >= 0) & (t < x.shape[1]))
        t = t[here]
        e = x - largest[:, None]
        sums = xp.zeros((2, len(x)), x.dtype)
        total, own = sums
        own[here] = e[here, t]
        xp.exp(e, out=e)
        e.sum(axis=1, out=total)
        with comm.step(STEP):
            all_reduce(comm, sums)
        # 3. The losses.
        self.save(e, total, here, t)
        losses = (xp.log(total) - own).astype(self.dtype, copy=False)
        if reduction == "none":
            return losses.reshape(self.shape[:-1])
        return losses.sum() if reduction == "sum" else losses.mean()

    def backward(self, dy: Array) -> tuple[Array, None]:
        e, total, here, t = self.saved
        scale = namespace(dy).broadcast_to(dy.reshape(-1).astype(e.dtype, copy=False), total.shape)
        if self.reduction == "mean":
            scale = scale / len(e)
        dx = e * (scale / total)[:, None]
        dx[here, t] -= scale[here]
        return dx.reshape(self.shape).astype(self.dtype, copy=False), None


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, comm: Communicator, reduction: str = "mean") -> Tensor:
    """F.cross_entropy of logits of which each rank has some columns, one rank's after another's.

    Shapes     logits (..., C/P), target (...) of int, equal on every rank -> a number, equal too; or (...)
    reduction  "mean", "sum" or "none"
    Comm       forward two all_reduces, of N + P and 2 N numbers, for N samples; backward none
    Errors     ValueError: shapes that do not match; TypeError: a target that is not int; IndexError, on every rank: a
               class number outside 0 … C - 1
    Source     Shoeybi et al. 2019, section 3. The sums are one message, not two
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if target.dtype.kind not in "iu":
        raise TypeError(f"vocab_parallel_cross_entropy: the target must be class numbers, not {target.dtype}")
    if target.shape != logits.shape[:-1] or not logits.ndim:
        raise ValueError(
            f"vocab_parallel_cross_entropy: logits {logits.shape} want a target of shape {logits.shape[:-1]}, "
            f"not {target.shape}"
        )
    return VocabCrossEntropy.apply(logits, target, comm=comm, reduction=reduction)


def _check_numbers(name: str, numbers: Array, count: int) -> None:
    """Raise IndexError for one that is not below `count`. Not on a GPU, where looking would mean waiting for it."""
    if not backend.on_gpu(numbers) and numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        bad = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"{name} {bad} is not one of the {count} of all ranks")
