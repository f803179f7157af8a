"""Scaled dot-product attention, forward and backward as one op."""

from __future__ import annotations

import math

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor
from .common import same_dtype, unbroadcast, wide
from .dropout import dropout_mask


class Attention(Function):
    """y = d(p) @ v, p = softmax(s), s = scale * q @ k.T + mask.   q (..., L, E), k (..., S, E), v (..., S, V)

    With d(p) = p * drop (dropout), and T the transposition of the last two dims:

    dv    = d(p).T @ dy                         (..., S, V)
    ds    = p * (dp - sum of dp * p over S),    dp = (dy @ v.T) * drop
    dq    = scale * ds @ k                      (..., L, E)
    dk    = scale * ds.T @ q                    (..., S, E)
    dmask = ds
    """

    def forward(
        self, q: Array, k: Array, v: Array, mask: Array | None, drop: Array | None, scale: float, is_causal: bool
    ) -> Array:
        self.scale = scale
        xp = namespace(q)
        # 1. Scores, -inf where a query must not look.
        scores = wide(xp.matmul(q * scale, k.swapaxes(-1, -2)))
        if is_causal:
            scores += xp.triu(xp.full(scores.shape[-2:], -math.inf, scores.dtype), 1)
        if mask is not None:
            scores += xp.where(mask, 0.0, -math.inf).astype(scores.dtype) if mask.dtype == bool else mask
        # 2. Softmax, in place. A row that may look nowhere has the largest score -inf and the sum 0: it gets p = 0.
        scores -= xp.maximum(scores.max(axis=-1, keepdims=True), float(np.finfo(scores.dtype).min))
        p = xp.exp(scores, out=scores)
        total = p.sum(axis=-1, keepdims=True)
        p /= total + (total == 0)
        p = p.astype(q.dtype, copy=False)
        # 3. The average of the values.
        self.save(q, k, v, mask, p, drop)
        return xp.matmul(p if drop is None else p * drop, v)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        q, k, v, mask, p, drop = self.saved
        xp = namespace(dy)
        dq = dk = dv = dmask = None
        if self.needs[2]:
            dropped = p if drop is None else p * drop
            dv = unbroadcast(xp.matmul(dropped.swapaxes(-1, -2), dy), v.shape)
        if self.needs[0] or self.needs[1] or self.needs[3]:
            ds = xp.matmul(dy, v.swapaxes(-1, -2))
            if drop is not None:
                ds *= drop
            ds -= xp.einsum("...s,...s->...", ds, p)[..., None]
            ds *= p
            if self.needs[0]:
                dq = unbroadcast(xp.matmul(ds, k), q.shape) * self.scale
            if self.needs[1]:
                dk = unbroadcast(xp.matmul(ds.swapaxes(-1, -2), q), k.shape) * self.scale
            if self.needs[3]:
                dmask = unbroadcast(ds, mask.shape)
        return dq, dk, dv, dmask


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
    same_dtype("scaled_dot_product_attention", query, key, value)
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(f"scaled_dot_product_attention: query, key and value need 2 dims or more: {shapes}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"scaled_dot_product_attention: shapes do not match: {shapes}")
    leading = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    scores = (*leading, query.shape[-2], key.shape[-2])
    if attn_mask is not None:
        if is_causal:
            raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal=True, not both")
        if attn_mask.dtype not in (np.dtype(bool), query.dtype):
            raise TypeError(f"scaled_dot_product_attention: attn_mask is {attn_mask.dtype}, not bool or {query.dtype}")
        if np.broadcast_shapes(attn_mask.shape, scores) != scores:
            raise ValueError(f"scaled_dot_product_attention: attn_mask {attn_mask.shape} for scores {scores}")
    if drop is not None and drop.shape != scores:
        raise ValueError(f"scaled_dot_product_attention: drop {drop.shape} for scores {scores}")
    if drop is None and dropout_p:
        drop = dropout_mask(query.data, dropout_p, scores)
    return Attention.apply(
        query,
        key,
        value,
        attn_mask,
        drop=drop,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        is_causal=is_causal,
    )
