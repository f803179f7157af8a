"""Layers with weights: Linear, Conv2d, Embedding, and the normalisations. PyTorch's names, layouts and first values."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..autograd import is_recomputing
from ..creation import ones, zeros
from ..tensor import Tensor
from . import functional as F
from . import init
from .module import Module, Parameter


def _parameter(*shape: int) -> Parameter:
    return Parameter(backend.empty(shape))


class Linear(Module):
    """y = x @ weight.T + bias.   x (..., in_features) -> y (..., out_features)

    weight  (out_features, in_features), uniform within 1 / sqrt(in_features)
    bias    (out_features), likewise; None with bias=False
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        self.in_features, self.out_features = in_features, out_features
        self.weight = _parameter(out_features, in_features)
        self.bias = _parameter(out_features) if bias else None
        init.linear_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Conv2d(Module):
    """A 2-d convolution.   x (N, in_channels, H, W) -> y (N, out_channels, H', W')

    weight  (out_channels, in_channels / groups, kh, kw), uniform within 1 / sqrt(in_channels / groups * kh * kw)
    bias    (out_channels), likewise; None with bias=False
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"Conv2d: {in_channels} -> {out_channels} channels don't divide into {groups} groups")
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.options: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.weight = _parameter(out_channels, in_channels // groups, *kernel)
        self.bias = _parameter(out_channels) if bias else None
        init.linear_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.options)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"weight={self.weight.shape}, bias={self.bias is not None}, {options}"


class Embedding(Module):
    """A row of weight for each number.   x (...) of int -> y (..., embedding_dim)

    weight  (num_embeddings, embedding_dim), normal; row padding_idx is 0 and stays so
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding: padding_idx {padding_idx} is not one of {num_embeddings} rows")
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = _parameter(num_embeddings, embedding_dim)
        init.normal_(self.weight)
        if self.padding_idx is not None:
            self.weight.data[self.padding_idx] = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LayerNorm(Module):
    """Mean 0, variance 1 over the last dims, then weight and bias.   x (..., *normalized_shape) -> the same shape"""

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ):
        self.shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        self.weight = Parameter(ones(*self.shape)) if elementwise_affine else None
        self.bias = Parameter(zeros(*self.shape)) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"


class RMSNorm(Module):
    """Root mean square 1 over the last dims, then weight.   x (..., *normalized_shape) -> the same shape"""

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float | None = None, elementwise_affine: bool = True
    ):
        self.shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        self.weight = Parameter(ones(*self.shape)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"


class BatchNorm2d(Module):
    """Mean 0, variance 1 for each channel over the batch, then weight and bias.   x (N, num_features, H, W)

    running_mean, running_var  buffers (num_features): averages over batches, used in evaluation
    momentum                   what the newest batch counts for in them; None: as much as each before it
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        self.eps, self.momentum = eps, momentum
        self.weight = Parameter(ones(num_features)) if affine else None
        self.bias = Parameter(zeros(num_features)) if affine else None
        self.register_buffer("running_mean", zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", ones(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", zeros(dtype=np.int64) if track_running_stats else None)

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"BatchNorm2d: input of shape {x.shape} has {x.ndim} dims, not 4 (N, C, H, W)")
        if self.training and self.num_batches_tracked is not None and not is_recomputing():
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / max(int(self.num_batches_tracked), 1) if self.num_batches_tracked is not None else 0.0
        return self.normalise(x, self.training or self.running_mean is None, momentum)

    def normalise(self, x: Tensor, use_batch: bool, momentum: float) -> Tensor:
        """By the batch's own statistics, moving the running ones; or by the running ones."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use_batch, momentum, self.eps
        )

    def extra_repr(self) -> str:
        return f"eps={self.eps}, momentum={self.momentum}"
