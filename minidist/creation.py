"""Making tensors: from data, filled, counted, random. Names and defaults are PyTorch's; floats are float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import backend
from .tensor import Tensor, plain


def tensor(data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor of its own copy of `data`: numbers, lists, arrays, or a tensor. Python floats become float32."""
    source = plain(data)
    array = backend.asarray(source, dtype, device)
    return Tensor(array.copy() if array is source else array, requires_grad)


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    """`zeros(2, 3)` and `zeros((2, 3))` mean the same."""
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size


def full(
    size: tuple[int, ...], fill_value: float, dtype: Any = None, device: str = "cpu", requires_grad: bool = False
) -> Tensor:
    """A tensor of the given shape holding one value. dtype: float32, or int64 / bool as the value is."""
    dtype = dtype or {bool: np.bool_, int: np.int64}.get(type(fill_value), np.float32)
    return Tensor(backend.full(size, fill_value, dtype, device), requires_grad)


def zeros(*size: Any, dtype: Any = np.float32, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    return full(_shape(size), 0.0, dtype, device, requires_grad)


def ones(*size: Any, dtype: Any = np.float32, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    return full(_shape(size), 1.0, dtype, device, requires_grad)


def arange(start: float, end: float | None = None, step: float = 1, dtype: Any = None, device: str = "cpu") -> Tensor:
    """The numbers start, start + step, … below end; int64 where all three are integers, else float32."""
    start, end = (0, start) if end is None else (start, end)
    values = np.arange(start, end, step)
    return Tensor(backend.asarray(values, dtype or (np.int64 if values.dtype.kind == "i" else np.float32), device))


def randn(*size: Any, dtype: Any = np.float32, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Normal with mean 0 and variance 1, from this rank's default generator (`manual_seed`)."""
    return Tensor(backend.default_generator().normal(0, 1, _shape(size), dtype, device), requires_grad)


def rand(*size: Any, dtype: Any = np.float32, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Uniform in [0, 1), from this rank's default generator (`manual_seed`)."""
    return Tensor(backend.default_generator().uniform(0, 1, _shape(size), dtype, device), requires_grad)
