"""Convolution of images, as a matrix product over all windows (im2col)."""

from __future__ import annotations

from ..backend import Array, namespace, on_gpu
from ..tensor import Function, Tensor
from .common import same_dtype
from .windows import Windows, images, pair

PIECE = 256 * 1024  # elements of the columns that are made at a time


class Conv2d(Function):
    """y[n, o] = b[o] + the sum over c, i, j of w[o, c, i, j] * x[n, c] under the window's (i, j).

    With the windows of x laid out as columns X, (N, C kh kw, H' W'), and the weight as a matrix W, (O, C kh kw):

    y  = W @ X + b                                      x (N, C, H, W), w (O, C/groups, kh, kw) -> y (N, O, H', W')
    dX = W.T @ dy, each element added back to dx where it came from
    dw = dy @ X.T, summed over N
    db = dy, summed over N, H', W'

    Groups split C and O evenly and are convolved apart: one more dim for the products to run over.
    """

    def forward(self, x: Array, w: Array, b: Array | None, windows: Windows, groups: int) -> Array:
        self.windows, self.groups = windows, groups
        self.save(x, w)
        xp, batch, weight = namespace(x), images(x), self.by_group(w)
        size = windows.count(*x.shape[-2:])
        y = xp.empty((len(batch), *weight.shape[:2], size[0] * size[1]), x.dtype)
        for some in self.parts(batch, w):
            xp.matmul(weight, self.columns(batch[some], w), out=y[some])
        y = y.reshape(len(batch), w.shape[0], *size)
        if b is not None:
            y += b[:, None, None]
        return y if x.ndim == 4 else y[0]

    def by_group(self, w: Array) -> Array:
        """W, by groups: (groups, O/groups, C/groups * kh * kw)."""
        return w.reshape(self.groups, w.shape[0] // self.groups, w[0].size)

    def columns(self, x: Array, w: Array) -> Array:
        """X, by groups: (N, groups, C/groups * kh * kw, H' * W'). Not kept for backward: it is kh * kw times x."""
        view = self.windows.over(self.windows.padded(x), *x.shape[-2:])
        rows, columns = view.shape[-2:]
        return view.reshape(len(x), self.groups, w[0].size, rows * columns)

    def parts(self, x: Array, w: Array) -> list[slice]:
        """The batch in parts: on CPU of so few images that their columns stay in the cache, on a GPU one part."""
        rows, columns = self.windows.count(*x.shape[-2:])
        per_image = self.groups * w[0].size * rows * columns
        step = len(x) if on_gpu(x) else PIECE // max(per_image, 1)
        return [slice(start, start + max(step, 1)) for start in range(0, len(x), max(step, 1))]

    def backward(self, dy: Array) -> tuple[Array | None, Array | None, Array | None]:
        x, w = self.saved
        xp, windows, batch, weight = namespace(dy), self.windows, images(x), self.by_group(w)
        height, width = x.shape[-2:]
        dy = images(dy)
        by_group = dy.reshape(len(dy), *weight.shape[:2], dy.shape[2] * dy.shape[3])
        dx = windows.zeros(batch.shape, like=dy) if self.needs[0] else None
        dw = xp.zeros_like(weight) if self.needs[1] else None
        for some in self.parts(batch, w):
            if dx is not None:
                view = windows.over(dx[some], height, width)
                dcolumns = xp.matmul(weight.swapaxes(1, 2), by_group[some]).reshape(view.shape)
                for i, j in windows.offsets():
                    view[:, :, i, j] += dcolumns[:, :, i, j]
            if dw is not None:
                dw += xp.matmul(by_group[some], self.columns(batch[some], w).swapaxes(2, 3)).sum(axis=0)
        return (
            None if dx is None else windows.inside(dx, height, width).reshape(x.shape),
            None if dw is None else dw.reshape(w.shape),
            dy.sum(axis=(0, 2, 3)) if self.needs[2] else None,
        )


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Slide every kernel of the weight over the images (without flipping it, so strictly a cross-correlation).

    Shapes   input (N, C, H, W) or (C, H, W); weight (O, C/groups, kh, kw); bias (O) -> (N, O, H', W') or (O, H', W'),
             H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1, and W' likewise
    padding  zeros around the image; "valid" is 0, "same" makes H' = H and W' = W (stride 1 only)
    Errors   ValueError: sizes that do not match; TypeError: different dtypes
    """
    same_dtype("conv2d", input, weight, bias)
    if weight.ndim != 4:
        raise ValueError(f"conv2d: the weight must have 4 dims (O, C/groups, kh, kw), not shape {weight.shape}")
    kernel, steps, spread = weight.shape[2:], pair("stride", stride), pair("dilation", dilation)
    if padding == "same":
        if steps != (1, 1):
            raise ValueError(f"conv2d: padding='same' needs stride 1, not {stride}")
        totals = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        above, left = ((total // 2, total - total // 2) for total in totals)
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"conv2d: padding must be numbers, 'same' or 'valid', not {padding!r}")
    else:
        above, left = ((p, p) for p in pair("padding", 0 if isinstance(padding, str) else padding))
    windows = Windows((kernel[0], kernel[1]), steps, (above, left), spread)
    windows.check("conv2d", input)
    if groups < 1 or weight.shape[0] % groups or input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: input {input.shape} and weight {weight.shape} do not match with groups={groups}: the input must "
            f"have {weight.shape[1]} * {groups} channels, and {weight.shape[0]} must be a multiple of {groups}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv2d: bias {bias.shape} for a weight {weight.shape}")
    return Conv2d.apply(input, weight, bias, windows=windows, groups=groups)
