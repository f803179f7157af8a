"""Is a derivative right? `gradcheck(ops.matmul, x, w)` compares it with central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minidist.tensor import Tensor


def outputs(result: Any) -> list[Tensor]:
    """A function's results that a gradient can come back through: one tensor, or the float ones of several."""
    several = result if isinstance(result, tuple | list) else [result]
    return [y for y in several if y.dtype.kind == "f"]


def gradients(
    function: Callable[..., Any], arrays: Sequence[np.ndarray], dys: Sequence[np.ndarray]
) -> list[np.ndarray | None]:
    """What backward gives for each array, None for those that are not float or have no influence."""
    tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    results = outputs(function(*tensors))
    total = sum(((y * Tensor(dy)).sum() for y, dy in zip(results, dys, strict=True)), start=Tensor(np.zeros(())))
    if total.requires_grad:
        total.backward()
    return [None if t.grad is None else t.grad.numpy() for t in tensors]


def gradcheck(
    function: Callable[..., Any], *arrays: np.ndarray, step: float = 1e-6, rtol: float = 1e-6, atol: float = 1e-7
) -> None:
    """Assert that the gradients of `function` (tensors in, one tensor or several out) are right at these arrays.

    Checks every element of every float64 array, for a random gradient of the results; integers and booleans are passed
    on as they are. Also that each gradient has the shape and dtype of its input.
    """
    shapes = [y.shape for y in outputs(function(*(Tensor(a) for a in arrays)))]
    rng = np.random.default_rng(0)
    dys = [rng.normal(size=shape) for shape in shapes]

    def loss(changed: Sequence[np.ndarray]) -> float:
        results = outputs(function(*(Tensor(a) for a in changed)))
        return sum(float((y.numpy() * dy).sum()) for y, dy in zip(results, dys, strict=True))

    for i, (array, gradient) in enumerate(zip(arrays, gradients(function, arrays, dys), strict=True)):
        if array.dtype.kind != "f":
            assert gradient is None, f"input {i} is {array.dtype} and got a gradient"
            continue
        assert array.dtype == np.float64, "central differences need float64"
        numeric = np.zeros(array.shape)
        for where in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[where] += sign * step
                ends.append(loss([*arrays[:i], moved, *arrays[i + 1 :]]))
            numeric[where] = (ends[0] - ends[1]) / (2 * step)
        assert gradient is not None, f"input {i} got no gradient"
        assert (gradient.shape, gradient.dtype) == (array.shape, array.dtype)
        np.testing.assert_allclose(gradient, numeric, rtol=rtol, atol=atol, err_msg=f"gradient of input {i}")
