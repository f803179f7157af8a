"""The table of operations. A row brings all the tests of test_ops.py and, where PyTorch is, of test_parity_torch.py.

A row names an op, the inputs it is called with (in float64; drawn anew for each test from a fixed seed), and its other
arguments. Names and arguments are PyTorch's, so that one row runs on both libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Maker = Callable[[np.random.Generator], np.ndarray]

# -- inputs ---------------------------------------------------------------------------------------------------------


def normal(*shape: int) -> Maker:
    return lambda rng: np.asarray(rng.normal(size=shape))


def positive(*shape: int) -> Maker:
    return lambda rng: np.asarray(rng.uniform(0.5, 2, shape))


def away(*shape: int) -> Maker:
    """At least 0.1 away from 0, where some functions have a kink."""
    return lambda rng: np.asarray(rng.uniform(0.1, 2, shape) * rng.choice([-1, 1], shape))


def distinct(*shape: int) -> Maker:
    """No two equal, or nearly: for maxima, whose gradient jumps where two meet."""
    return lambda rng: rng.permutation(int(np.prod(shape))).reshape(shape) * 0.3 - 2


def ints(high: int, *shape: int) -> Maker:
    return lambda rng: np.asarray(rng.integers(0, high, shape))


def bools(*shape: int) -> Maker:
    return lambda rng: np.asarray(rng.random(shape) < 0.6)


def given(*values: Any, dtype: Any = np.float64) -> Maker:
    return lambda rng: np.array(values, dtype)


# -- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """call(F, *tensors): F holds the functions, ours or PyTorch's. check: compare the gradient with differences."""

    id: str
    call: Callable[..., Any]
    inputs: tuple[Maker, ...]
    check: bool = True
    tolerance: float = 1e-5  # of float32 against float64

    def arrays(self, dtype: Any = np.float64) -> list[np.ndarray]:
        """The inputs, floats in the given dtype; the same at every call."""
        rng = np.random.default_rng(sum(map(ord, self.id)))
        made = [make(rng) for make in self.inputs]
        return [a.astype(dtype) if a.dtype.kind == "f" else a for a in made]


CASES: list[Case] = []


def _add(name: str, call: Callable[..., Any], inputs: tuple[Maker, ...], **options: Any) -> None:
    count = sum(c.id.split("#")[0] == name for c in CASES)
    CASES.append(Case(f"{name}#{count + 1}", call, inputs, **options))


def op(name: str, *inputs: Maker, args: tuple[Any, ...] = (), check: bool = True, **arguments: Any) -> None:
    """F.name(*inputs, *args, **arguments)"""
    _add(name, lambda F, *xs: getattr(F, name)(*xs, *args, **arguments), inputs, check=check)


def method(name: str, x: Maker, *args: Any, **arguments: Any) -> None:
    """x.name(*args, **arguments)"""
    _add(name, lambda F, x: getattr(x, name)(*args, **arguments), (x,))


def expression(name: str, call: Callable[..., Any], *inputs: Maker, check: bool = True) -> None:
    """call(*inputs), of operators and methods"""
    _add(name, lambda F, *xs: call(*xs), inputs, check=check)


def joined(name: str, *inputs: Maker, **arguments: Any) -> None:
    """F.name([*inputs], **arguments)"""
    _add(name, lambda F, *xs: getattr(F, name)(list(xs), **arguments), inputs)


# Arithmetic: equal shapes, broadcast both ways, 0 dims, nothing at all, numbers on either side.
for sign, function in {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "**": lambda x, y: x**y,
}.items():
    expression(sign, function, positive(2, 3), positive(2, 3))
    expression(sign, function, positive(3), positive(2, 1))
    expression(sign, function, positive(), positive(2, 2))
    expression(sign, function, positive(), positive())
    expression(sign, function, positive(0, 3), positive(3))
    expression(sign, lambda x, function=function: function(x, 2), positive(2, 3))
    expression(sign, lambda x, function=function: function(2, x), positive(2, 3))
    expression(sign, lambda x, function=function: function(x, 0.5), positive(2, 3))
expression("**", lambda x: x**2, normal(2, 3))
expression("**", lambda x: x**3, given(0.0, -1.5, 2))
expression("**", lambda x: x**0, given(0.0, -1.5, 2))
expression("**", lambda x, y: x**y, given(0.0, 0, 1), given(0.0, 2, 3), check=False)
expression("*", lambda x: x * x + x, normal(3))
expression("-x", lambda x: -x, normal(2, 3))
op("add", normal(2, 3), normal(3), alpha=2)
op("sub", normal(2, 3), normal(3), alpha=0.5)
for sign, function in {
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
}.items():
    expression(sign, function, ints(3, 4, 4), ints(3, 4))
    expression(sign, function, normal(2, 3), normal(2, 3), check=False)
    expression(sign, lambda x, function=function: function(x, 1), ints(3, 4))

# Functions of one number.
for name in ["exp", "sin", "cos", "tanh", "sigmoid", "gelu", "silu", "softplus"]:
    for shape in [(2, 3), (), (0, 2)]:
        op(name, normal(*shape))
for name in ["abs", "relu", "leaky_relu"]:
    for shape in [(2, 3), (), (0, 2)]:
        op(name, away(*shape))
for name in ["log", "sqrt"]:
    for shape in [(2, 3), (), (0, 2)]:
        op(name, positive(*shape))
for name in ["tanh", "sigmoid", "gelu", "silu", "softplus", "relu", "leaky_relu", "abs"]:
    op(name, given(-800.0, -100, -30, -9, -0.0, 0, 9, 30, 100, 800), check=False)
op("leaky_relu", away(2, 3), negative_slope=0.2)
op("leaky_relu", away(2, 3), negative_slope=1.5)
op("gelu", normal(2, 3), approximate="tanh")
op("gelu", given(-800.0, -9, 0, 9, 800), approximate="tanh", check=False)
op("softplus", normal(2, 3), beta=2, threshold=20)
op("softplus", given(-3.0, 0.4, 0.6, 5), beta=2, threshold=1)
op("clip", distinct(3, 4), min=-0.95, max=0.95)
op("clip", distinct(3, 4), min=-0.95)
op("clip", distinct(3, 4), max=0.95)
op("clip", given(-1.0, 0, 1), min=-1, max=1, check=False)

# Choosing.
op("maximum", normal(2, 3), normal(3))
op("minimum", normal(2, 3), normal(3))
op("maximum", given(1.0, 2), given(1.0, 3), check=False)
op("minimum", given(1.0, 2), given(1.0, 3), check=False)
op("where", bools(2, 3), normal(2, 3), normal(3))
op("where", bools(3), normal(2, 1), normal())
_add("where", lambda F, c, x: F.where(c, x, 0.0), (bools(3), normal(2, 3)))
_add("where", lambda F, c, x: F.where(c, 1.5, x), (bools(3), normal(2, 3)))
op("masked_fill", normal(2, 3), bools(3), args=(-2.5,))
expression(
    "masked_fill", lambda x, m: x.masked_fill(m, float("-inf")).softmax(-1), normal(2, 3), given(0, 1, 0, dtype=bool)
)

# Reductions.
for name in ["sum", "mean", "amax", "amin", "logsumexp", "var", "std"]:
    op(name, distinct(2, 3, 4), dim=1)
    op(name, distinct(2, 3, 4), dim=-1, keepdim=True)
    op(name, distinct(2, 3, 4), dim=(0, 2))
    op(name, distinct(2, 3, 4), dim=(-1, 0), keepdim=True)
for name in ["sum", "mean", "prod", "var", "std", "max", "min"]:
    op(name, distinct(2, 3))
for name in ["sum", "mean", "prod", "max", "min"]:
    op(name, positive())
for name in ["sum", "prod"]:
    op(name, normal(0, 3))
    op(name, normal(0, 3), dim=0)
    op(name, normal(2, 0), dim=-1, keepdim=True)
op("mean", normal(0, 3), dim=1)
op("prod", distinct(2, 3, 4), dim=1)
op("prod", distinct(2, 3, 4), dim=-1, keepdim=True)
op("prod", given(0.0, 2, 3), dim=0)
op("prod", given(0.0, 2, 0), check=False)
op("var", normal(2, 3), dim=1, correction=0)
op("std", normal(2, 3), dim=1, correction=0, keepdim=True)
for name in ["max", "min"]:
    op(name, distinct(2, 3, 4), dim=1)
    op(name, distinct(2, 3, 4), dim=-2, keepdim=True)
    op(name, distinct(2, 3), distinct(1, 3), check=False)
for name in ["amax", "amin"]:
    op(name, given(1.0, 2, 2, 1), dim=0, check=False)
for name in ["max", "min"]:
    op(name, given(1.0, 2, 2, 1), check=False)
    op(name, given(1.0, 2, 2, 1), dim=0, check=False)
for name in ["argmax", "argmin"]:
    op(name, distinct(3, 4), check=False)
    op(name, distinct(3, 4), dim=-1, check=False)
    op(name, distinct(3, 4), dim=0, keepdim=True, check=False)
    op(name, ints(9, 5))
op("logsumexp", given(-1000.0, -1001, 3), dim=0)
op("logsumexp", given(1000.0, 1001, 3), dim=0)
op("cumsum", normal(2, 3), dim=0)
op("cumsum", normal(2, 3, 2), dim=-2)
op("cumsum", normal(0, 3), dim=0)

# Products.
for shapes in [
    [(2, 3), (3, 4)],
    [(3,), (3,)],
    [(3,), (3, 4)],
    [(2, 3), (3,)],
    [(5, 2, 3), (5, 3, 4)],
    [(5, 1, 2, 3), (2, 3, 2)],
    [(5, 2, 3), (3,)],
    [(3,), (5, 3, 2)],
    [(5, 2, 3), (3, 4)],
    [(0, 3), (3, 2)],
    [(2, 0), (0, 3)],
]:
    expression("matmul", lambda x, w: x @ w, *(normal(*s) for s in shapes))
for equation, *shapes in [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("bij,bjk->bik", (2, 2, 3), (2, 3, 2)),
    ("i,j->ij", (2,), (3,)),
    ("ij->ji", (2, 3)),
    ("ij->", (2, 3)),
    ("ij->i", (2, 3)),
    ("ii->i", (3, 3)),
    ("ii", (3, 3)),
    ("ij,ij", (2, 3), (2, 3)),
    ("...ij,...jk->...ik", (2, 2, 3), (3, 2)),
    ("ij,jk,kl->il", (2, 3), (3, 2), (2, 2)),
    ("bhld,bhsd->bhls", (1, 2, 2, 3), (1, 2, 3, 3)),
]:
    _add("einsum", lambda F, *xs, e=equation: F.einsum(e, *xs), tuple(normal(*s) for s in shapes))
op("linear", normal(4, 3), normal(2, 3))
op("linear", normal(4, 3), normal(2, 3), normal(2))
op("linear", normal(2, 3), normal(4, 3), normal(4))
op("linear", normal(2, 4, 3), normal(2, 3), normal(2))
op("linear", normal(3), normal(2, 3), normal(2))
op("linear", normal(0, 3), normal(2, 3), normal(2))

# Shapes.
method("reshape", normal(2, 6), 3, -1)
method("reshape", normal(2, 6), (4, 3))
method("reshape", normal(1), ())
method("transpose", normal(2, 3, 4), 0, -1)
expression("T", lambda x: x.T, normal(2, 3))
expression("mT", lambda x: x.mT, normal(2, 3, 4))
method("permute", normal(2, 3, 4), 2, 0, -2)
method("expand", normal(2, 1), 4, 2, 3)
method("expand", normal(2, 1), -1, 3)
method("squeeze", normal(1, 2, 1))
method("squeeze", normal(1, 2, 1), -1)
method("squeeze", normal(1, 2, 1), (0, 2))
method("squeeze", normal(1, 2, 1), 1)
method("unsqueeze", normal(2, 3), 1)
method("unsqueeze", normal(2, 3), -1)
op("flatten", normal(2, 3, 4))
op("flatten", normal(2, 3, 4), start_dim=1)
op("flatten", normal(2, 3, 4), start_dim=0, end_dim=-2)
op("flatten", normal())
method("flip", normal(2, 3), (0, -1))
method("flip", normal(2, 3), (1,))
op("roll", normal(2, 3), args=(1,))
op("roll", normal(2, 3), args=(-2, 1))
op("roll", normal(2, 3), args=((1, 2), (0, -1)))
op("roll", normal(2, 3), args=([1, 2], [0, -1]))
method("repeat", normal(2, 3), 2, 1)
method("repeat", normal(2, 3), 2, 1, 3)
method("repeat", normal(2), 0)
method("clone", normal(2, 3))
joined("cat", normal(2, 3), normal(1, 3))
joined("cat", normal(2, 3), normal(2, 1), normal(2, 0), dim=-1)
joined("stack", normal(2, 3), normal(2, 3))
joined("stack", normal(2, 3), normal(2, 3), dim=-1)
joined("stack", normal(), normal())
op("split", normal(5, 2), args=(2,))
op("split", normal(2, 5), args=([1, 4],), dim=-1)
op("chunk", normal(5, 2), args=(2,))
op("chunk", normal(2, 5), args=(3,), dim=1)
op("pad", normal(2, 3), args=((1, 2),))
op("pad", normal(2, 3), args=((1, 0, 2, 1),), value=1.5)
op("pad", normal(2, 4), args=((-1, 2),))
for name in ["tril", "triu"]:
    op(name, normal(3, 4))
    op(name, normal(2, 3, 3), args=(-1,))
    op(name, normal(3, 3), diagonal=1)

# Indexing.
expression("x[1]", lambda x: x[1], normal(3, 4))
expression("x[-1, 1:]", lambda x: x[-1, 1:], normal(3, 4))
expression("x[::2, None]", lambda x: x[::2, None], normal(3, 4))
expression("x[..., 0]", lambda x: x[..., 0], normal(2, 3, 4))
expression("x[1:1]", lambda x: x[1:1], normal(3, 4))
expression("x[i]", lambda x, i: x[i], normal(3, 4), ints(3, 5))
expression("x[i, j]", lambda x, i, j: x[i, j], normal(3, 4), ints(3, 5), ints(4, 5))
expression("x[:, i]", lambda x, i: x[:, i], normal(3, 4), ints(4, 2, 2))
expression("x[[0, 0]]", lambda x: x[[0, 0]], normal(3, 4))
expression("x[mask]", lambda x, m: x[m], normal(3, 4), bools(3, 4))
expression("x[i, 1:]", lambda x, i: x[i, 1:], normal(3, 4), ints(3, 2))
_add("gather", lambda F, x, i: F.gather(x, 1, i), (normal(3, 4), ints(4, 3, 2)))
_add("gather", lambda F, x, i: F.gather(x, 0, i), (normal(3, 4), ints(3, 5, 4)))
_add("gather", lambda F, x, i: F.gather(x, -1, i), (normal(3, 4), ints(4, 2, 4)))

# Softmax and losses.
for name in ["softmax", "log_softmax"]:
    op(name, normal(2, 3), dim=-1)
    op(name, normal(2, 3, 2), dim=1)
    op(name, given(1000.0, 0, -1000), dim=0)
    op(name, normal(0, 3), dim=1)
    op(name, normal(), dim=0)
for reduction in ["mean", "sum", "none"]:
    op("cross_entropy", normal(4, 3), ints(3, 4), reduction=reduction)
    op("cross_entropy", normal(4, 3), ints(3, 4), reduction=reduction, label_smoothing=0.1)
    op("cross_entropy", normal(4, 3), given(0, -100, 2, 1, dtype=int), reduction=reduction)
    op("cross_entropy", normal(2, 3, 4), ints(3, 2, 4), reduction=reduction, ignore_index=1)
    op("cross_entropy", normal(4, 3), positive(4, 3), reduction=reduction, label_smoothing=0.2)
    for name in ["cross_entropy", "nll_loss"]:
        _add(
            name,
            lambda F, x, t, w, name=name, how=reduction: getattr(F, name)(x, t, w.detach(), reduction=how),
            (normal(4, 3), ints(3, 4), positive(3)),
            check=False,
        )
    op("nll_loss", normal(4, 3), ints(3, 4), reduction=reduction)
    op("nll_loss", normal(2, 3, 4), ints(3, 2, 4), reduction=reduction, ignore_index=0)
    op("mse_loss", normal(2, 3), normal(2, 3), reduction=reduction)
    op("l1_loss", normal(2, 3), normal(2, 3), reduction=reduction)
    op("binary_cross_entropy_with_logits", normal(2, 3), positive(2, 3), reduction=reduction)
_add(
    "cross_entropy",
    lambda F, x, t, w: F.cross_entropy(x, t, w.detach(), label_smoothing=0.1, ignore_index=2),
    (normal(6, 3), ints(3, 6), positive(3)),
    check=False,
)
_add("cross_entropy", lambda F, x, t: F.cross_entropy(x, t[0]), (normal(3), ints(3, 1)))
op("binary_cross_entropy_with_logits", given(-800.0, -5, 0.5, 5, 800), given(0.0, 1, 1, 0, 1))
_add(
    "binary_cross_entropy_with_logits",
    lambda F, x, t, w, p: F.binary_cross_entropy_with_logits(x, t, w.detach(), pos_weight=p.detach()),
    (normal(2, 3), positive(2, 3), positive(3), positive(3)),
    check=False,
)

# Convolution and pooling.
op("conv2d", normal(2, 2, 5, 4), normal(3, 2, 3, 2))
op("conv2d", normal(2, 2, 5, 4), normal(3, 2, 3, 2), normal(3), stride=2, padding=1)
op(
    "conv2d",
    normal(1, 2, 7, 6),
    normal(4, 1, 2, 3),
    normal(4),
    stride=(2, 1),
    padding=(1, 2),
    dilation=(2, 1),
    groups=2,
)
op("conv2d", normal(2, 5, 4), normal(3, 2, 3, 2), normal(3))
op("conv2d", normal(1, 2, 5, 4), normal(3, 2, 3, 3), padding="same", dilation=2)
op("conv2d", normal(1, 2, 5, 4), normal(3, 2, 2, 3), padding="same")
op("conv2d", normal(1, 2, 5, 4), normal(3, 2, 3, 3), padding="valid", stride=2)
op("conv2d", normal(2, 3, 2, 2), normal(3, 1, 1, 1), groups=3)
op("conv2d", normal(0, 2, 5, 4), normal(3, 2, 3, 2), normal(3))
for name in ["max_pool2d", "avg_pool2d"]:
    op(name, distinct(2, 2, 4, 5), args=(2,))
    op(name, distinct(1, 2, 5, 6), args=(3,), stride=2, padding=1)
    op(name, distinct(1, 2, 5, 6), args=((2, 3),), stride=(1, 2), padding=(1, 0))
    op(name, distinct(1, 2, 5, 6), args=(2,), stride=2, ceil_mode=True)
    op(name, distinct(1, 2, 5, 6), args=(3,), stride=3, padding=1, ceil_mode=True)
    op(name, distinct(2, 4, 5), args=(2,))
op("max_pool2d", distinct(1, 2, 6, 7), args=(2,), stride=1, dilation=2)
op("max_pool2d", given([[[1.0, 1, 0], [1, 1, 1], [0, 1, 0]]]), args=(2,), stride=1, check=False)
op("avg_pool2d", normal(1, 2, 5, 6), args=(3,), stride=2, padding=1, count_include_pad=False)
op("avg_pool2d", normal(1, 2, 5, 6), args=(3,), stride=3, padding=1, ceil_mode=True, count_include_pad=False)

# Normalisation.
_add("layer_norm", lambda F, x: F.layer_norm(x, (4,)), (normal(3, 4),))
_add("layer_norm", lambda F, x, w, b: F.layer_norm(x, (4,), w, b), (normal(2, 3, 4), normal(4), normal(4)))
_add(
    "layer_norm",
    lambda F, x, w, b: F.layer_norm(x, (3, 4), w, b, eps=0.1),
    (normal(2, 3, 4), normal(3, 4), normal(3, 4)),
)
_add("layer_norm", lambda F, x, w: F.layer_norm(x, (4,), w), (normal(3, 4), normal(4)))
_add("layer_norm", lambda F, x, w, b: F.layer_norm(x, (4,), w, b), (normal(0, 4), normal(4), normal(4)))
_add("rms_norm", lambda F, x: F.rms_norm(x, (4,), eps=1e-5), (normal(3, 4),))
_add("rms_norm", lambda F, x, w: F.rms_norm(x, (4,), w), (normal(2, 3, 4), normal(4)))
_add("rms_norm", lambda F, x, w: F.rms_norm(x, (3, 4), w, eps=0.1), (normal(2, 3, 4), normal(3, 4)))
for shape in [(4, 3), (2, 3, 2, 2), (0, 3, 2)]:
    _add(
        "batch_norm",
        lambda F, x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach(), w, b),
        (normal(*shape), normal(3), normal(3), normal(3), positive(3)),
        check=False,
    )
_add("batch_norm", lambda F, x: F.batch_norm(x, None, None, training=True, eps=0.1), (normal(4, 2, 3),))
_add(
    "batch_norm",
    lambda F, x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    (normal(4, 2, 3), normal(2), normal(2)),
)

# Attention and embedding.
op("scaled_dot_product_attention", normal(3, 4), normal(5, 4), normal(5, 2))
op("scaled_dot_product_attention", normal(2, 2, 3, 4), normal(2, 2, 3, 4), normal(2, 2, 3, 4), is_causal=True)
op("scaled_dot_product_attention", normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), is_causal=True, scale=0.3)
op("scaled_dot_product_attention", normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(3, 5))
op("scaled_dot_product_attention", normal(2, 1, 3, 4), normal(1, 2, 5, 4), normal(2, 1, 5, 2))
op("scaled_dot_product_attention", normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), bools(2, 3, 5))
_seen = given([True, False, True], [False, False, False], dtype=bool)
op("scaled_dot_product_attention", normal(2, 2, 4), normal(2, 3, 4), normal(2, 3, 2), _seen)  # a row sees nothing


def packed(F: Any, x: Any, heads: int, mask: Any = None, **options: Any) -> Any:
    """packed_attention; of PyTorch, which has none, what it stands for."""
    if hasattr(F, "packed_attention"):
        return F.packed_attention(x, heads, mask, **options)
    size = x.shape[-1] // 3 // heads
    q, k, v = (t.reshape(*x.shape[:-1], heads, size).transpose(-3, -2) for t in x.split(heads * size, -1))
    y = F.scaled_dot_product_attention(q, k, v, mask, **options)
    return y.transpose(-3, -2).reshape(*x.shape[:-1], heads * size)


_add("packed_attention", lambda F, x: packed(F, x, 2), (normal(2, 3, 12),))
_add("packed_attention", lambda F, x: packed(F, x, 2, is_causal=True, scale=0.3), (normal(2, 4, 12),))
_add("packed_attention", lambda F, x: packed(F, x, 1, is_causal=True), (normal(5, 9),))
_add("packed_attention", lambda F, x, m: packed(F, x, 2, m), (normal(2, 3, 12), normal(3, 3)))
_add("packed_attention", lambda F, x, m: packed(F, x, 3, m), (normal(2, 3, 9), bools(2, 3, 3, 3)))
op("embedding", ints(5, 2, 3), normal(5, 2))
op("embedding", ints(3, 7), normal(3, 2), padding_idx=1, check=False)
op("embedding", ints(3, 7), normal(3, 2), padding_idx=-1, check=False)
op("embedding", ints(3), normal(3, 2))
op("embedding", ints(3, 0), normal(3, 2))
