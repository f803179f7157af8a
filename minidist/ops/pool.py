"""Pooling: the largest or the mean of each window of an image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .windows import Windows, images, pair


class MaxPool2d(Function):
    """y = the largest element of each window.   x (N, C, H, W) -> y (N, C, H', W')

    dx gets dy where the largest came from: the first of equals, row by row; padding counts as -inf
    """

    def forward(self, x: Array, windows: Windows) -> Array:
        self.windows = windows
        view = self.view(x)
        y = view[:, :, 0, 0].copy()
        for i, j in windows.offsets()[1:]:
            namespace(x).maximum(y, view[:, :, i, j], out=y)
        y = y.reshape(*x.shape[:-2], *y.shape[-2:])
        self.save(y, x)
        return y

    def view(self, x: Array) -> Array:
        lowest: Any = -math.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        return self.windows.over(self.windows.padded(images(x), lowest), *x.shape[-2:])

    def backward(self, dy: Array) -> tuple[Array]:
        y, x = self.saved
        windows = self.windows
        y, dy, view = images(y), images(dy), self.view(x)
        whole = windows.zeros(images(x).shape, like=dy)
        dview = windows.over(whole, *x.shape[-2:])
        waiting = namespace(x).ones(y.shape, bool)  # windows whose largest element has not been met yet
        for i, j in windows.offsets():
            here = view[:, :, i, j] == y
            here &= waiting
            waiting ^= here
            dview[:, :, i, j] += dy * here
        return (windows.inside(whole, *x.shape[-2:]).reshape(x.shape),)


class AvgPool2d(Function):
    """y = the mean of each window.   x (N, C, H, W) -> y (N, C, H', W')

    dx = dy / count, summed over the windows an element lies in
    """

    def forward(self, x: Array, windows: Windows, count_include_pad: bool) -> Array:
        self.windows, self.shape = windows, x.shape
        view = windows.over(windows.padded(images(x)), *x.shape[-2:])
        y = view[:, :, 0, 0].copy()
        for i, j in windows.offsets()[1:]:
            y += view[:, :, i, j]
        self.count = self.elements(x, count_include_pad)
        y /= self.count
        return y.reshape(*x.shape[:-2], *y.shape[-2:])

    def elements(self, x: Array, count_include_pad: bool) -> Array:
        """How many elements each window averages (H', W'). What lies beyond the padding never counts."""
        xp, windows, counts = namespace(x), self.windows, []
        for dim, number in enumerate(windows.count(*x.shape[-2:])):
            size, (before, after) = x.shape[dim - 2], windows.padding[dim]
            start = xp.arange(number) * windows.stride[dim] - before
            stop = xp.minimum(start + windows.kernel[dim], size + after)
            if not count_include_pad:
                start, stop = xp.maximum(start, 0), xp.minimum(stop, size)
            counts.append((stop - start).astype(x.dtype))
        return counts[0][:, None] * counts[1]

    def backward(self, dy: Array) -> tuple[Array]:
        windows, (*_, height, width) = self.windows, self.shape
        share = images(dy) / self.count
        whole = windows.zeros((*share.shape[:2], height, width), like=dy)
        dview = windows.over(whole, height, width)
        for i, j in windows.offsets():
            dview[:, :, i, j] += share
        return (windows.inside(whole, height, width).reshape(self.shape),)


def _windows(
    name: str, input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Windows:
    kernel = pair("kernel_size", kernel_size)
    pads = pair("padding", padding)
    spread = pair("dilation", dilation)
    if any(2 * p > d * (k - 1) + 1 for p, d, k in zip(pads, spread, kernel, strict=True)):
        raise ValueError(f"{name}: the padding {pads} must be at most half of the kernel {kernel} (dilation {spread})")
    steps = kernel if stride is None else pair("stride", stride)
    windows = Windows(kernel, steps, ((pads[0], pads[0]), (pads[1], pads[1])), spread, ceil)
    windows.check(name, input)
    return windows


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window: input (N, C, H, W) or (C, H, W) -> (N, C, H', W') or (C, H', W').

    stride     the kernel's size if not given
    padding    at most half the kernel; counts as -inf
    ceil_mode  let a last window reach beyond the image
    Errors     ValueError: sizes that do not match
    """
    windows = _windows("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    return MaxPool2d.apply(input, windows=windows)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window: input (N, C, H, W) or (C, H, W) -> (N, C, H', W') or (C, H', W').

    stride, padding, ceil_mode   as in max_pool2d; the padding is 0 here
    count_include_pad            whether the padding counts in the mean
    Errors                       ValueError: sizes that do not match
    """
    windows = _windows("avg_pool2d", input, kernel_size, stride, padding, 1, ceil_mode)
    return AvgPool2d.apply(input, windows=windows, count_include_pad=count_include_pad)
