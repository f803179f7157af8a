"""Every op against PyTorch: values, gradients, dtypes and shapes, by the table in op_cases.py; dtype promotion."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from op_cases import CASES, Case

from minidist import ops
from minidist.tensor import Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'minidist[peers]'")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


class TorchFunctions:
    """PyTorch's functions, wherever it keeps them."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(torch.nn.functional, name, None) or getattr(torch, name)


def several(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.shape == tuple(theirs.shape)
    assert dtype_name(ours) == dtype_name(theirs)
    assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-9), (np.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_values_gradients_and_dtypes_are_pytorchs(case: Case, dtype: Any, tolerance: float) -> None:
    arrays = case.arrays(dtype)
    ours = [Tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in arrays]
    theirs = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    our_results = several(case.call(ops, *ours))
    their_results = several(case.call(TorchFunctions(), *theirs))
    assert len(our_results) == len(their_results)
    rng = np.random.default_rng(2)
    for y, expected in zip(our_results, their_results, strict=True):
        assert_same(y, expected, tolerance)
        assert y.requires_grad == expected.requires_grad
        if y.requires_grad:
            dy = np.asarray(rng.normal(size=y.shape), dtype)
            y.backward(dy, retain_graph=True)
            expected.backward(torch.tensor(dy), retain_graph=True)
    for x, expected in zip(ours, theirs, strict=True):
        assert (x.grad is None) == (expected.grad is None)
        if x.grad is not None:
            assert_same(x.grad, expected.grad, tolerance)


# -- dtype promotion ------------------------------------------------------------------------------------------------

DTYPES = [np.bool_, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64]
BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "==": operator.eq,
    "<": operator.lt,
}


def values(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.array([1, 0, 2]) if shape else np.array(2)).astype(dtype)


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the class of what went wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except Exception:
            return "refused"


def check_promotion(function: Callable[..., Any], x: Any, y: Any) -> None:
    theirs = outcome(lambda: function(*(torch.tensor(v) if isinstance(v, np.ndarray) else v for v in (x, y))))
    if isinstance(theirs, str):
        return  # PyTorch refuses (bool - bool, integers to negative powers); here NumPy decides
    ours = outcome(lambda: function(*(Tensor(v) if isinstance(v, np.ndarray) else v for v in (x, y))))
    assert not isinstance(ours, str), "PyTorch accepts this"
    assert dtype_name(ours) == dtype_name(theirs)
    assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-3)


@pytest.mark.parametrize("sign", BINARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_of_two_dtypes(sign: str, dtype: Any) -> None:
    for other, shape, other_shape in itertools.product(DTYPES, [(3,), ()], [(3,), ()]):
        check_promotion(BINARY[sign], values(dtype, shape), values(other, other_shape))


@pytest.mark.parametrize("sign", BINARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_python_numbers(sign: str, dtype: Any) -> None:
    for number, shape in itertools.product([True, 3, 2.5], [(3,), ()]):
        if sign == "**" and dtype == np.bool_ and number is True:
            continue  # a power of truth values: int8 in NumPy
        check_promotion(BINARY[sign], values(dtype, shape), number)
        check_promotion(BINARY[sign], number, values(dtype, shape))


UNARY = ["exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "abs", "relu"]
REDUCTIONS = ["sum", "prod", "max", "min", "argmax", "argmin", "var", "std", "mean"]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: lambda F, x, name=name: getattr(F, name)(x) for name in UNARY + REDUCTIONS},
    "cumsum": lambda F, x: F.cumsum(x, 0),
    "sum dim": lambda F, x: F.sum(x, 0),
    "amax": lambda F, x: F.amax(x, 0),
    "logsumexp": lambda F, x: F.logsumexp(x, 0),
    "clip int": lambda F, x: F.clip(x, 1, 2),
    "clip float": lambda F, x: F.clip(x, 0.5),
    "neg": lambda F, x: -x,
    "masked_fill": lambda F, x: x.masked_fill(x == 0, 3),
    "pad": lambda F, x: F.pad(x, (1, 1)),
    "flip": lambda F, x: x.flip(0),
    "repeat": lambda F, x: x.repeat(2),
    "index": lambda F, x: x[1:],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_any_dtype(name: str, dtype: Any) -> None:
    x = values(dtype, (3,))
    theirs = outcome(lambda: FUNCTIONS[name](TorchFunctions(), torch.tensor(x)))
    ours = outcome(lambda: FUNCTIONS[name](ops, Tensor(x)))
    if isinstance(theirs, str):
        return
    assert not isinstance(ours, str), "PyTorch accepts this"
    assert dtype_name(ours) == dtype_name(theirs)
    assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-3)


@pytest.mark.parametrize("name", ["maximum", "minimum", "where", "cat", "stack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_two_dtypes(name: str, dtype: Any) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "where": lambda F, x, y: F.where(x != 0, x, y),
        "cat": lambda F, x, y: F.cat([x, y]),
        "stack": lambda F, x, y: F.stack([x, y]),
    }
    call = calls.get(name) or (lambda F, x, y: getattr(F, name)(x, y))
    for other in DTYPES:
        x, y = values(dtype, (3,)), values(other, (3,))
        theirs = outcome(lambda x=x, y=y: call(TorchFunctions(), torch.tensor(x), torch.tensor(y)))
        if isinstance(theirs, str):
            continue
        assert_same(call(ops, Tensor(x), Tensor(y)), theirs, 0)


def test_gradients_come_back_in_each_inputs_own_dtype() -> None:
    arrays = [np.ones(3, np.float16), np.ones((2, 3), np.float32), np.ones((), np.float64)]
    ours, theirs = [Tensor(a, True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    for x, y, z in (ours, theirs):
        (x * y + z).sum().backward()
    for x, expected in zip(ours, theirs, strict=True):
        assert_same(x.grad, expected.grad, 0)


# -- ops with a state, or with errors of their own ------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_batch_norms_running_statistics(momentum: float) -> None:
    rng = np.random.default_rng(0)
    x, mean, var = rng.normal(2, 3, (4, 3, 5)), rng.normal(size=3), rng.uniform(1, 2, 3)
    ours, theirs = [Tensor(a.copy()) for a in (x, mean, var)], [torch.tensor(a) for a in (x, mean, var)]
    for _ in range(2):
        y = ops.batch_norm(*ours, training=True, momentum=momentum)
        expected = torch.nn.functional.batch_norm(*theirs, training=True, momentum=momentum)
        assert_same(y, expected, 1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda F, t: t(2, 3) + t(4),
        lambda F, t: t(2, 3) @ t(2, 3),
        lambda F, t: F.softmax(t(2, 3), 2),
        lambda F, t: t(2, 3).reshape(4, 2),
        lambda F, t: t(2, 3).permute(0, 0),
        lambda F, t: t(2, 3).expand(4, 3),
        lambda F, t: t(2, 3)[2],
        lambda F, t: F.cat([t(2, 3), t(2, 2)]),
        lambda F, t: F.split(t(5), [2, 2]),
        lambda F, t: F.conv2d(t(1, 3, 5, 5), t(2, 4, 3, 3)),
        lambda F, t: F.conv2d(t(1, 4, 2, 5), t(2, 4, 3, 3)),
        lambda F, t: F.max_pool2d(t(1, 1, 5, 5), 2, padding=2),
        lambda F, t: F.avg_pool2d(t(1, 1, 5, 5), 6),
        lambda F, t: F.layer_norm(t(2, 3), (2,)),
        lambda F, t: F.batch_norm(t(1, 3), None, None, training=True),
        lambda F, t: F.scaled_dot_product_attention(t(2, 3), t(2, 4), t(2, 3)),
        lambda F, t: F.dropout(t(2), -0.1),
        lambda F, t: F.linear(t(2, 3), t(2, 4)),
        lambda F, t: F.einsum("ij,jk", t(2, 3)),
        lambda F, t: F.gather(t(2, 3), 0, t(2)),
    ],
)
def test_what_pytorch_refuses_is_refused(call: Any) -> None:
    assert outcome(lambda: call(TorchFunctions(), torch.zeros)) == "refused"
    assert outcome(lambda: call(ops, lambda *shape: Tensor(np.zeros(shape, np.float32)))) == "refused"


def test_a_whole_network_trains_alike() -> None:
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(8, 1, 8, 8)), rng.integers(0, 4, 8)
    weights = [rng.normal(size=s) * 0.3 for s in [(3, 1, 3, 3), (3,), (5, 48), (5,), (4, 5), (4,)]]
    ours, theirs = [Tensor(w.copy(), True) for w in weights], [torch.tensor(w, requires_grad=True) for w in weights]

    def loss(F: Any, x: Any, t: Any, w1: Any, b1: Any, w2: Any, b2: Any, w3: Any, b3: Any) -> Any:
        h = F.max_pool2d(F.relu(F.conv2d(x, w1, b1, padding=1)), 2)
        h = F.gelu(F.layer_norm(F.linear(F.flatten(h, 1), w2, b2), (5,)))
        return F.cross_entropy(F.linear(h, w3, b3), t)

    for _ in range(10):
        y = loss(ops, Tensor(x), Tensor(t), *ours)
        expected = loss(TorchFunctions(), torch.tensor(x), torch.tensor(t), *theirs)
        y.backward()
        expected.backward()
        assert_allclose(y.item(), expected.item(), rtol=1e-10)
        for w, v in zip(ours, theirs, strict=True):
            w.data -= 0.1 * w.grad.data
            w.grad = None
            with torch.no_grad():
                v -= 0.1 * v.grad
            v.grad = None
    for w, v in zip(ours, theirs, strict=True):
        assert_array_equal(w.shape, v.shape)
        assert_allclose(w.numpy(), v.detach().numpy(), rtol=1e-8)
