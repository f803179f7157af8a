"""Products: matmul, the linear layer, einsum."""

from __future__ import annotations

import string

from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import as_tensor, same_dtype, unbroadcast


class MatMul(Function):
    """y = x @ w.   x (..., N, I), w (..., I, O) -> y (..., N, O); the leading dims are broadcast

    dx = dy @ w.T       (..., N, I)
    dw = x.T @ dy       (..., I, O)
    """

    def forward(self, x: Array, w: Array) -> Array:
        self.save(x, w)
        return namespace(x).matmul(x, w)

    def backward(self, dy: Array) -> tuple[Array | None, Array | None]:
        x, w = self.saved
        # A vector on the left is a matrix of one row, on the right one of one column.
        rows = x[None, :] if x.ndim == 1 else x
        columns = w[:, None] if w.ndim == 1 else w
        if x.ndim == 1:
            dy = dy[..., None, :] if w.ndim > 1 else dy[None, ...]
        if w.ndim == 1:
            dy = dy[..., None]
        dx = dw = None
        if self.needs[0]:
            dx = unbroadcast(dy @ columns.swapaxes(-1, -2), rows.shape).reshape(x.shape)
        if self.needs[1]:
            dw = unbroadcast(rows.swapaxes(-1, -2) @ dy, columns.shape).reshape(w.shape)
        return dx, dw


class Linear(Function):
    """y = x @ w.T + b.   x (..., I), w (O, I), b (O) -> y (..., O)

    dx = dy @ w                                (..., I)
    dw = dy.T @ x, summed over leading dims    (O, I)
    db = 1 @ dy: summed over leading dims      (O)
    """

    def forward(self, x: Array, w: Array, b: Array | None) -> Array:
        self.save(x, w)
        # One product over all leading dims, not one for each.
        x2 = x.reshape(-1, x.shape[-1])
        if x.ndim == 2 and len(x) < len(w):
            # A wide layer on few rows: (w @ x.T).T, whose memory runs down the columns, is up to 10 % faster than
            # x @ w.T on OpenBLAS. (Not for sequences: their norms want rows.)
            y = (w @ x2.T).T
        else:
            y = x2 @ w.T
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], w.shape[0])

    def backward(self, dy: Array) -> tuple[Array | None, Array | None, Array | None]:
        x, w = self.saved
        xp = namespace(dy)
        x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, w.shape[0])
        dx = None
        if self.needs[0]:  # dx runs as x does, so that elementwise operations find the two alike
            dx = (dy2 @ w if x2.flags.c_contiguous else (w.T @ dy2.T).T).reshape(x.shape)
        dw = xp.matmul(dy2.T, x2, out=self.into[1]) if self.needs[1] else None
        db = xp.matmul(xp.ones(len(dy2), dy.dtype), dy2, out=self.into[2]) if self.needs[2] else None
        return dx, dw, db


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w. Vectors, matrices, or batches of matrices whose leading dims broadcast.

    Errors  TypeError: different dtypes; ValueError: sizes that do not match
    """
    x, w = as_tensor(x), as_tensor(w)
    same_dtype("matmul", x, w)
    inner = w.shape[0] if w.ndim == 1 else w.shape[-2] if w.ndim else 0
    if not x.ndim or not w.ndim or x.shape[-1] != inner:
        raise ValueError(f"matmul: shapes {x.shape} and {w.shape} do not match")
    return MatMul.apply(x, w)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias: input (..., I), weight (O, I), bias (O) -> (..., O).

    Errors  TypeError: different dtypes; ValueError: sizes that do not match
    """
    same_dtype("linear", input, weight, bias)
    if input.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"linear: input {input.shape} and weight {weight.shape} do not match in their last dim")
    return Linear.apply(input, weight, bias)


class Einsum(Function):
    """y = the sum over all letters absent from the output.   dx_i = einsum of dy with the other operands, to x_i"""

    def forward(self, *operands: Array, terms: list[str], output: str) -> Array:
        self.terms, self.output = terms, output
        self.save(*operands)
        return namespace(operands[0]).einsum(f"{','.join(terms)}->{output}", *operands, optimize=True)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return tuple(self._gradient(i, dy) if need else None for i, need in enumerate(self.needs))

    def _gradient(self, i: int, dy: Array) -> Array:
        xp = namespace(dy)
        x, term = self.saved[i], self.terms[i]
        letters = "".join(dict.fromkeys(term))
        others = [(t, a) for j, (t, a) in enumerate(zip(self.terms, self.saved, strict=True)) if j != i]
        # 1. Sum over everything x lacks.
        known = set(self.output).union(*(t for t, _ in others))
        present = "".join(c for c in letters if c in known)
        subscripts = ",".join([self.output, *(t for t, _ in others)]) + "->" + present
        dx = xp.einsum(subscripts, dy, *(a for _, a in others), optimize=True)
        # 2. Where x has length 1 and another operand more, x was broadcast.
        sizes = dict(zip(term, x.shape, strict=True))
        found = {c: min(n, sizes[c]) for c, n in zip(present, dx.shape, strict=True)}
        dx = unbroadcast(dx, tuple(found.values()))
        # 3. A letter that only x has was summed over alone: its gradient is the same all along it.
        dx = dx.reshape([found.get(c, 1) for c in letters])
        dx = xp.broadcast_to(dx, [sizes[c] for c in letters])
        # 4. A letter that x has twice took its diagonal: only the diagonal has a gradient.
        if len(letters) == len(term):
            return dx
        whole = xp.zeros(x.shape, dy.dtype)
        strides = [sum(s for c, s in zip(term, whole.strides, strict=True) if c == letter) for letter in letters]
        xp.lib.stride_tricks.as_strided(whole, dx.shape, strides)[...] = dx
        return whole


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Einstein summation: `einsum("bij,bjk->bik", x, y)`. Ellipses stand for leading dims of any number.

    Errors  ValueError: an equation that does not fit the operands; TypeError: different dtypes
    """
    same_dtype("einsum", *operands)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise ValueError(f"einsum: {equation!r} has {len(terms)} terms for {len(operands)} operands")
    free = [c for c in string.ascii_letters if c not in equation]
    ranks = [x.ndim - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True)]
    if any(r < 0 or (r > 0 and "..." not in t) for t, r in zip(terms, ranks, strict=True)):
        raise ValueError(f"einsum: {equation!r} does not fit operands of {[x.ndim for x in operands]} dims")
    widest = max((r for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    dots = "".join(free[:widest])
    terms = [t.replace("...", dots[widest - r :]) for t, r in zip(terms, ranks, strict=True)]
    if not arrow:  # as usual: the letters that occur once, in alphabetical order, after the ellipsis
        joined = "".join(terms)
        output = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in dots))
    return Einsum.apply(*operands, terms=terms, output=output.replace("...", dots))


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x_i * y_j, of two vectors."""
    return einsum("i,j->ij", x, y)
