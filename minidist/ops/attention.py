"""Scaled dot-product attention, forward and backward as one op."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import Array, Shape, namespace, on_gpu
from ..tensor import Function, Tensor
from .common import same_dtype, unbroadcast, wide
from .dropout import dropout_mask


class Attention(Function):
    """y = d(p) @ v, p = softmax(s), s = scale * q @ k.T + mask.   q (..., L, E), k (..., S, E), v (..., S, V)

    With d(p) = p * drop (dropout), and T the transposition of the last two dims:

    dv    = d(p).T @ dy                         (..., S, V)
    ds    = p * (dp - sum of dp * p over S),    dp = (dy @ v.T) * drop
          = p * (dp - sum of dy * y over V)     (..., L, S)
    dq    = scale * ds @ k                      (..., L, E)
    dk    = scale * ds.T @ q                    (..., S, E)
    dmask = ds
    """

    def forward(
        self, q: Array, k: Array, v: Array, mask: Array | None, drop: Array | None, scale: float, is_causal: bool
    ) -> Array:
        self.scale = scale
        p = attention_weights(q, k, mask, scale, is_causal)
        y = namespace(q).matmul(_T(dropped(p, drop)), v)
        self.save(y, q, k, v, mask, p, drop)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        y, q, k, v, mask, p, drop = self.saved
        xp = namespace(dy)
        dq = dk = dv = dmask = None
        if self.needs[2]:
            dv = unbroadcast(xp.matmul(dropped(p, drop), dy), v.shape)
        if self.needs[0] or self.needs[1] or self.needs[3]:
            ds = scores_gradient(dy, y, v, p, drop)
            if self.needs[3]:
                dmask = unbroadcast(_T(ds), mask.shape)
            ds = ds * self.scale
            dq = unbroadcast(xp.matmul(_T(ds), k), q.shape) if self.needs[0] else None
            dk = unbroadcast(xp.matmul(ds, q), k.shape) if self.needs[1] else None
        return dq, dk, dv, dmask


class PackedAttention(Function):
    """Attention of all heads, of q, k and v that lie side by side.   x (..., T, 3C) -> y (..., T, C)

    dx = dq, dk and dv side by side. Nothing is copied to part the heads, or to put them together again.
    """

    def forward(
        self, x: Array, mask: Array | None, drop: Array | None, heads: int, scale: float, is_causal: bool
    ) -> Array:
        self.heads, self.scale = heads, scale
        q, k, v = by_head(x, heads, 3)
        p = attention_weights(q, k, mask, scale, is_causal)
        xp = namespace(x)
        y = xp.empty((*x.shape[:-1], x.shape[-1] // 3), x.dtype)
        xp.matmul(_T(dropped(p, drop)), v, out=by_head(y, heads, 1)[0])
        self.save(y, x, mask, p, drop)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, Array | None]:
        y, x, mask, p, drop = self.saved
        xp = namespace(dy)
        q, k, v = by_head(x, self.heads, 3)
        y, dy = by_head(y, self.heads, 1)[0], by_head(dy, self.heads, 1)[0]
        ds = scores_gradient(dy, y, v, p, drop)
        dmask = unbroadcast(_T(ds).copy(), mask.shape) if self.needs[1] else None
        ds *= self.scale
        dx = xp.empty(x.shape, x.dtype)
        dq, dk, dv = by_head(dx, self.heads, 3)
        xp.matmul(_T(ds), k, out=dq)
        xp.matmul(ds, q, out=dk)
        xp.matmul(dropped(p, drop), dy, out=dv)
        return dx, dmask


def by_head(x: Array, heads: int, parts: int) -> Array:
    """Views (parts, ..., heads, T, E) of what lies side by side in x (..., T, parts * heads * E)."""
    *lead, length, _ = x.shape
    n = len(lead)
    return x.reshape(*lead, length, parts, heads, -1).transpose(n + 1, *range(n), n + 2, n, n + 3)


def _T(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def attention_weights(q: Array, k: Array, mask: Array | None, scale: float, is_causal: bool) -> Array:
    """p   (..., S, L)"""
    scores = masked_scores(q, k, mask, scale, is_causal)
    if not on_gpu(q):
        # Mostly scores are moderate, and sums of exponentials too: then to subtract the largest score first, which
        # takes as long as the rest, changes nothing. (On a GPU the host would have to wait for the answer.)
        with np.errstate(over="ignore"):
            p, total = _exponentials(scores)
        if total.size and total.min() > 1e-20 and total.max() < 1e20:
            p *= 1 / total
            return p.astype(q.dtype, copy=False)
        scores = masked_scores(q, k, mask, scale, is_causal)
    scores -= namespace(q).maximum(scores.max(axis=-2, keepdims=True), float(np.finfo(scores.dtype).min))
    p, total = _exponentials(scores)
    p *= 1 / (total + (total == 0))  # a query that may look nowhere gets p = 0: its largest score is -inf, its sum 0
    return p.astype(q.dtype, copy=False)


def masked_scores(q: Array, k: Array, mask: Array | None, scale: float, is_causal: bool) -> Array:
    """s, -inf where a query must not look   (..., S, L)"""
    xp = namespace(q)
    s = wide(k @ _T(q * scale))
    if is_causal:
        s += xp.tril(xp.full(s.shape[-2:], -math.inf, s.dtype), -1)
    if mask is not None:
        s += _T(xp.where(mask, 0.0, -math.inf).astype(s.dtype) if mask.dtype == bool else mask)
    return s


def _exponentials(s: Array) -> tuple[Array, Array]:
    """exp(s), in place, and its sums over S, by a matrix product, which takes half the time of `sum`."""
    xp = namespace(s)
    xp.exp(s, out=s)
    return s, xp.ones((1, s.shape[-2]), s.dtype) @ s


def dropped(p: Array, drop: Array | None) -> Array:
    """d(p)   (..., S, L)"""
    return p if drop is None else p * _T(drop)


def scores_gradient(dy: Array, y: Array, v: Array, p: Array, drop: Array | None) -> Array:
    """ds   (..., S, L)"""
    xp = namespace(dy)
    ds = v @ _T(dy)
    if drop is not None:
        ds *= _T(drop)
    products = wide(dy) * wide(y)
    ds -= _T(products @ xp.ones((y.shape[-1], 1), products.dtype))
    ds *= p
    return ds


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    drop: Array | None = None,
) -> Tensor:
    """softmax(scale * query @ key.T + attn_mask) @ value: each query's average of the values, weighted by likeness.

    Shapes     query (..., L, E), key (..., S, E), value (..., S, V) -> (..., L, V); leading dims are broadcast
    attn_mask  broadcast to (..., L, S). Bool: where a query may look; of the query's dtype: added to the scores
    dropout_p  the probability that a weight is dropped; also in evaluation, so pass 0 there
    is_causal  query i looks at keys 0 .. i only
    scale      1 / sqrt(E) if not given
    drop       (..., L, S), in the place of dropout_p: the mask that the weights are multiplied by
    Errors     ValueError: shapes that do not match; a mask together with is_causal; TypeError: different dtypes
    Source     Vaswani et al. 2017, section 3.2. A query that may look nowhere gets 0, as in PyTorch
    """
    name = "scaled_dot_product_attention"
    same_dtype(name, query, key, value)
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(f"{name}: query, key and value need 2 dims or more: {shapes}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{name}: shapes do not match: {shapes}")
    leading = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    scores = (*leading, query.shape[-2], key.shape[-2])
    options = _options(name, query, scores, query.shape[-1], attn_mask, dropout_p, is_causal, scale, drop)
    return Attention.apply(query, key, value, attn_mask, **options)


def packed_attention(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    drop: Array | None = None,
) -> Tensor:
    """scaled_dot_product_attention of every head, of queries, keys and values that lie side by side; the heads' results
    side by side again. It saves the copies that parting and joining them would take.

    Shapes     qkv (..., T, 3C): queries, keys, values; C = num_heads * E, the first E of the first head -> (..., T, C)
    attn_mask, dropout_p, is_causal, scale, drop  as there; the scores are (..., num_heads, T, T)
    Errors     ValueError: 3C does not divide by 3 * num_heads; a mask together with is_causal; TypeError: its dtype
    """
    if num_heads < 1 or qkv.ndim < 2 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"packed_attention: input {qkv.shape} is not (..., T, 3 * {num_heads} heads * E)")
    *leading, length, width = qkv.shape
    scores = (*leading, num_heads, length, length)
    size = width // (3 * num_heads)
    options = _options("packed_attention", qkv, scores, size, attn_mask, dropout_p, is_causal, scale, drop)
    return PackedAttention.apply(qkv, attn_mask, heads=num_heads, **options)


def _options(
    name: str,
    query: Tensor,
    scores: Shape,
    size: int,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    drop: Array | None,
) -> dict[str, Any]:
    """What both functions check and work out alike."""
    if mask is not None:
        if is_causal:
            raise ValueError(f"{name}: give attn_mask or is_causal=True, not both")
        if mask.dtype not in (np.dtype(bool), query.dtype):
            raise TypeError(f"{name}: attn_mask is {mask.dtype}, not bool or {query.dtype}")
        if np.broadcast_shapes(mask.shape, scores) != scores:
            raise ValueError(f"{name}: attn_mask {mask.shape} for scores {scores}")
    if drop is not None and drop.shape != scores:
        raise ValueError(f"{name}: drop {drop.shape} for scores {scores}")
    if drop is None and dropout_p:
        drop = dropout_mask(query.data, dropout_p, scores)
    return dict(
        drop=drop,
        scale=1 / math.sqrt(size) if scale is None else float(scale),
        is_causal=is_causal,
    )
