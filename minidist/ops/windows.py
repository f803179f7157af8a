"""Sliding windows over images: what convolution and pooling share.

`Windows.over` shows an image (N, C, H, W) as all its windows, (N, C, kh, kw, H', W'), without copying anything: a view
whose strides repeat elements. Read, it is im2col. Written to offset by offset, which no two windows share, it is the
derivative: `view[:, :, i, j] += …` for every (i, j) of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend import Array, Shape, namespace
from ..tensor import Tensor

Pair = tuple[int, int]


def pair(name: str, value: int | tuple[int, ...]) -> Pair:
    """An argument that may be one number for both dims. Raises ValueError."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise ValueError(f"{name} must be a number or a pair, not {value!r}")
    return values


@dataclass
class Windows:
    """Where the windows lie. Every attribute is (vertical, horizontal); `padding` is a (before, after) of each."""

    kernel: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    ceil: bool = False  # a last window may start inside the padded image and reach beyond it

    def check(self, name: str, input: Tensor) -> None:
        """Raise ValueError where there is no image, or not a single window fits it."""
        if input.ndim not in (3, 4):
            raise ValueError(f"{name}: the input must be (N, C, H, W) or (C, H, W), not of shape {input.shape}")
        if min(*self.kernel, *self.stride, *self.dilation) < 1:
            raise ValueError(
                f"{name}: kernel {self.kernel}, stride {self.stride} and dilation {self.dilation} must be 1 or more"
            )
        if min(self.padding[0] + self.padding[1]) < 0:
            raise ValueError(f"{name}: the padding must not be negative, it is {self.padding}")
        if min(self.count(*input.shape[-2:])) < 1:
            raise ValueError(
                f"{name}: a kernel of {self.kernel} (dilation {self.dilation}) does not fit an image of "
                f"{input.shape[-2:]} with padding {self.padding}"
            )

    def count(self, height: int, width: int) -> Pair:
        """The number of windows down and across, H' and W'."""
        rows, columns = (self._count(dim, size) for dim, size in enumerate((height, width)))
        return rows, columns

    def _count(self, dim: int, size: int) -> int:
        stride, (before, after) = self.stride[dim], self.padding[dim]
        span = size + before + after - self.dilation[dim] * (self.kernel[dim] - 1) - 1
        if self.ceil:
            count = -(-span // stride) + 1
            return count - 1 if (count - 1) * stride >= size + before else count  # none starts in the padding after
        return span // stride + 1

    def _reach(self, dim: int, size: int) -> int:
        """The size of the padded image, including what the last window needs beyond it."""
        last = (self._count(dim, size) - 1) * self.stride[dim]
        return max(size + sum(self.padding[dim]), last + self.dilation[dim] * (self.kernel[dim] - 1) + 1)

    def _padded_shape(self, shape: Shape) -> Shape:
        *lead, height, width = shape
        return *lead, self._reach(0, height), self._reach(1, width)

    def padded(self, x: Array, value: float = 0) -> Array:
        """The images with their border filled in; x itself where there is none."""
        shape = self._padded_shape(x.shape)
        if shape == x.shape:
            return x
        result = namespace(x).full(shape, value, x.dtype)
        self.inside(result, *x.shape[-2:])[...] = x
        return result

    def zeros(self, shape: Shape, like: Array) -> Array:
        """Zeros for the gradient of images of a given shape, with their border; in the library and dtype of `like`."""
        return namespace(like).zeros(self._padded_shape(shape), like.dtype)

    def inside(self, padded: Array, height: int, width: int) -> Array:
        """The image within its border, as a view."""
        top, left = self.padding[0][0], self.padding[1][0]
        return padded[:, :, top : top + height, left : left + width]

    def over(self, padded: Array, height: int, width: int) -> Array:
        """A view (N, C, kh, kw, H', W') of all the windows; height and width are those without the border."""
        n, c, h, w = padded.strides
        (dh, dw), (sh, sw) = self.dilation, self.stride
        shape = *padded.shape[:2], *self.kernel, *self.count(height, width)
        strides = n, c, h * dh, w * dw, h * sh, w * sw
        return namespace(padded).lib.stride_tricks.as_strided(padded, shape, strides)

    def offsets(self) -> list[Pair]:
        """All positions (i, j) in the kernel, row by row."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]


def images(x: Array) -> Array:
    """(C, H, W) as a batch of one."""
    return x if x.ndim == 4 else x[None]
