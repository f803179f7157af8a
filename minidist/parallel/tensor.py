"""Tensor parallelism: the layers of a network, each dealt over ranks.

                  x, equal on all ranks (or, sequence parallel, each rank's part of the sequence)
                  |
        columns   q, k, v of some heads          some hidden units
                  attention of these             activation of these
        rows      their share of the result      their share of the result
                  |
                  the sum over the ranks         the sum over the ranks

A block of a transformer communicates four times the size of an activation in a forward and a backward: one sum behind
the attention and one behind the MLP, and their duals. Ranks of `comm` (a mesh's tp) see the same samples, and draw the
same random numbers, in step.

Sequence parallelism adds: what is not split so (norms, dropout, the sums of the residual stream), each rank does for
its part of the sequence only. Each sum becomes a reduce_scatter behind the rows and an all_gather before the columns,
which together move as many bytes, and activations take 1/P of the memory everywhere. Parameters used there have their
gradients summed over the ranks.

linear.py has the two linear layers as functions, vocabulary.py the embedding, the head and the loss.

Sources  Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022, "Reducing activation recomputation in
         large transformer models", section 4.2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import nn
from ..backend import Array
from ..collectives import chunk_slice
from ..comm import Communicator
from ..nn import Module, Parameter
from ..nn import functional as F
from ..ops import split
from ..ops.dropout import Dropout, dropout_mask
from ..tensor import Tensor
from .functions import copy_to, gather_from, scatter_to
from .linear import column_linear, row_linear
from .splits import Split
from .vocabulary import VocabParallelEmbedding, VocabParallelHead, vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "ParallelMLP",
    "ParallelSelfAttention",
    "RowParallelLinear",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "sharded_dropout",
    "vocab_parallel_cross_entropy",
]


class ColumnParallelLinear(Module):
    """y_r = x @ w_r.T + b_r: each rank computes some of the outputs.

    Shapes  x (..., I), equal on every rank -> y_r (..., O/P), or with gather_output (..., O), equal on every rank;
            with sequence_parallel x_r (B, T/P, I), this rank's part of the sequence -> y_r (B, T, O/P)
            weight (O/P, I), bias (O/P): outputs dealt as np.array_split does; with blocks=3 (queries, keys, values)
            each of so many equal blocks on its own
    Comm    forward none; backward one all_reduce of dx, B * T * I elements.   With sequence_parallel one all_gather of
            x forward; the same again and a reduce_scatter of dx backward.   gather_output: an all_gather of y forward
    Init    drawn whole by every rank, which keeps its slice: P ranks have the weights that nn.Linear has
    Errors  ValueError: out_features that don't divide into blocks; blocks that are to be gathered
    Source  Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        blocks: int = 1,
    ):
        if gather_output and blocks > 1:
            raise ValueError(f"ColumnParallelLinear: gather_output=True would mix up {blocks} blocks: use blocks=1")
        self.in_features, self.out_features, self.comm = in_features, out_features, comm
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel
        # M.1 Model partition by module (按模块划分): the inside of a layer, a slice of its weights on each rank.
        whole = nn.Linear(in_features, out_features, bias)
        self.splits = {"weight": Split(0, blocks)} | ({"bias": Split(0, blocks)} if bias else {})
        self.weight = _part(whole.weight, self.splits["weight"], comm)
        self.bias = None if whole.bias is None else _part(whole.bias, self.splits["bias"], comm)

    def forward(self, x: Tensor) -> Tensor:
        y = column_linear(x, self.weight, self.bias, self.comm, self.sequence_parallel)
        return gather_from(y, self.comm, -1, self.out_features) if self.gather_output else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.comm.size} ranks"


class RowParallelLinear(Module):
    """y = Σ_r x_r @ w_r.T + b: each rank has some of the inputs.

    Shapes  x_r (..., I/P), or with input_is_parallel=False (..., I), equal on every rank -> y (..., O), equal on every
            rank; with sequence_parallel y_r (B, T/P, O), this rank's part of the sequence
            weight (O, I/P): inputs dealt as np.array_split does; bias (O), whole
    Comm    forward one all_reduce of y, B * T * O elements; backward none.   With sequence_parallel one reduce_scatter
            of y forward, one all_gather of dy backward.   input_is_parallel=False: an all_gather of dx backward
    Init    as ColumnParallelLinear
    Errors  ValueError: with sequence_parallel, a T that does not divide
    Source  as ColumnParallelLinear
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
    ):
        self.in_features, self.out_features, self.comm = in_features, out_features, comm
        self.input_is_parallel, self.sequence_parallel = input_is_parallel, sequence_parallel
        whole = nn.Linear(in_features, out_features, bias)
        self.splits = {"weight": Split(1)}
        self.weight = _part(whole.weight, self.splits["weight"], comm)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to(x, self.comm, -1)
        return row_linear(x, self.weight, self.bias, self.comm, self.sequence_parallel)

    extra_repr = ColumnParallelLinear.extra_repr


class ParallelMLP(Module):
    """down(activation(up(x))), the hidden units dealt over the ranks.

    Shapes  x (..., dim), equal on every rank -> the same; with sequence_parallel (B, T/P, dim) -> the same
    Comm    that of `up` (ColumnParallelLinear) and `down` (RowParallelLinear)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        comm: Communicator,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        sequence_parallel: bool = False,
    ):
        self.up = ColumnParallelLinear(dim, hidden, comm, sequence_parallel=sequence_parallel)
        self.activation = activation
        self.down = RowParallelLinear(hidden, dim, comm, sequence_parallel=sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class ParallelSelfAttention(Module):
    """Causal self-attention, the heads dealt over the ranks.

    Shapes   x (B, T, dim), equal on every rank -> the same; with sequence_parallel (B, T/P, dim) -> the same
    Comm     that of `qkv` (ColumnParallelLinear) and `proj` (RowParallelLinear)
    dropout  of the attention's weights: those that one rank would drop
    Errors   ValueError: a dim that does not divide into heads, or heads that do not divide by the ranks
    """

    def __init__(self, dim: int, heads: int, comm: Communicator, dropout: float = 0.0, sequence_parallel: bool = False):
        if dim % heads:
            raise ValueError(f"ParallelSelfAttention: dim {dim} does not divide into {heads} heads")
        if heads % comm.size:
            raise ValueError(f"ParallelSelfAttention: {heads} heads do not divide by {comm.size} ranks")
        self.heads, self.dropout, self.comm = heads // comm.size, dropout, comm
        self.qkv = ColumnParallelLinear(dim, 3 * dim, comm, sequence_parallel=sequence_parallel, blocks=3)
        self.proj = RowParallelLinear(dim, dim, comm, sequence_parallel=sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        parts = split(qkv, width, -1)
        q, k, v = (t.reshape(batch, length, self.heads, -1).transpose(1, 2) for t in parts)
        drop = None
        if self.training and self.dropout:
            drop = sharded_mask(q.data, self.dropout, (batch, self.heads, length, length), self.comm, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, drop=drop)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


# -- in a sequence-parallel region: x (B, T/P, C) --------------------------------------------------------------------


class SequenceParallelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm of this rank's part of the sequence: its parameters' gradients are summed over the ranks.

    Comm  backward one all_reduce each of the gradients of weight and bias
    """

    def __init__(self, normalized_shape: int | tuple[int, ...], comm: Communicator, **options: Any):
        super().__init__(normalized_shape, **options)
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else copy_to(p, self.comm) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(nn.RMSNorm):
    """nn.RMSNorm, likewise."""

    def __init__(self, normalized_shape: int | tuple[int, ...], comm: Communicator, **options: Any):
        super().__init__(normalized_shape, **options)
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else copy_to(self.weight, self.comm)
        return F.rms_norm(x, self.shape, weight, self.eps)


# -- random numbers --------------------------------------------------------------------------------------------------


def sharded_dropout(
    x: Tensor, p: float, training: bool, comm: Communicator, dim: int, length: int | None = None
) -> Tensor:
    """Dropout of x, of which each rank has a chunk along dim: P ranks drop exactly what one rank would.

    Every rank draws the mask of the whole from its default generator, and keeps its chunk; so all generators stay in
    step. What is equal on all ranks needs plain dropout only.

    length  of the whole along dim, where chunks are not of one size
    Errors  ValueError: p outside [0, 1]; this rank's chunk is not as long as np.array_split would have it
    """
    if not training or p == 0:
        return F.dropout(x, p, False)
    return Dropout.apply(x, mask=sharded_mask(x.data, p, x.shape, comm, dim, length))


def sharded_mask(
    x: Array, p: float, shape: tuple[int, ...], comm: Communicator, dim: int, length: int | None = None
) -> Array:
    """This rank's chunk, of the given shape, of a dropout mask that is `length` (or P times as) long along dim."""
    dim %= len(shape)
    length = shape[dim] * comm.size if length is None else length
    mine = chunk_slice(length, comm.size, comm.rank)
    if mine.stop - mine.start != shape[dim]:
        raise ValueError(
            f"dropout: rank {comm.rank}'s chunk is {shape[dim]} long, not {mine.stop - mine.start} of {length} over "
            f"{comm.size} ranks"
        )
    whole = dropout_mask(x, p, (*shape[:dim], length, *shape[dim + 1 :]))
    return whole[(slice(None),) * dim + (mine,)].copy()


def _part(whole: Tensor, split: Split, comm: Communicator) -> Parameter:
    return Parameter(split.slice(whole.data, comm.size, comm.rank))
