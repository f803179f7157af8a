"""Multi-head attention, with the parameter names and layouts of PyTorch's MultiheadAttention.

Source  Vaswani et al. 2017, section 3.2
"""

from __future__ import annotations

import math
from functools import partial

from .. import backend
from ..ops import masked_fill, split
from ..recomputation import recompute
from ..tensor import Tensor
from . import functional as F
from . import init
from .layers import Linear
from .module import Module, Parameter


class MultiHeadAttention(Module):
    """Each of num_heads heads attends with its own embed_dim / num_heads of the dims.

    Shapes  query (L, N, E), key and value (S, N, E) -> output (L, N, E), weights (N, L, S);
            with batch_first (N, L, E) and (N, S, E); without a batch (L, E) and (S, E)
    in_proj_weight  (3E, E): the projections of query, key and value, one under the other
    out_proj        Linear(E, E)
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *, batch_first: bool = False
    ):
        if embed_dim % num_heads:
            raise ValueError(f"MultiHeadAttention: embed_dim {embed_dim} does not divide into {num_heads} heads")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.in_proj_weight = Parameter(backend.empty((3 * embed_dim, embed_dim)))
        self.in_proj_bias = Parameter(backend.full((3 * embed_dim,), 0)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias)
        init.xavier_uniform_(self.in_proj_weight)
        if self.out_proj.bias is not None:
            init.constant_(self.out_proj.bias, 0)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; returns (output, weights or None).

        key_padding_mask  (N, S) bool, True for keys to leave out
        attn_mask         (L, S) or (N * heads, L, S): bool, True where attending is forbidden; or added to the scores
        is_causal         as a mask that forbids later keys; needs no attn_mask
        need_weights      give the weights too, averaged over the heads unless average_attn_weights is False; slower
        """
        # 1. To (N, L, E), whatever came in.
        batched = query.ndim == 3
        if not (batched and self.batch_first):
            # Once for each tensor, so that one which is query, key and value in one stays one.
            turned = {t: t.transpose(0, 1) if batched else t.unsqueeze(0) for t in dict.fromkeys((query, key, value))}
            query, key, value = turned[query], turned[key], turned[value]
        n, length, e = query.shape
        if key.shape[:2] != value.shape[:2] or key.shape[0] != n or e != self.embed_dim:
            raise ValueError(f"MultiHeadAttention: query {query.shape}, key {key.shape}, value {value.shape}")
        source = key.shape[1]
        # 2. Project, and part the heads: (N, heads, L or S, E / heads).
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        # 3. Masks to one that is added to the scores.
        spell_out = is_causal and (need_weights or key_padding_mask is not None)
        mask = self._mask(key_padding_mask, attn_mask, spell_out, n, length, source, q)
        # 4. Attend.
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(e // self.num_heads))
            scores = scores if mask is None else scores + mask
            weights = F.dropout(F.softmax(scores, -1), dropout, self.training)
            heads = weights @ v
        else:
            attend = F.scaled_dot_product_attention
            if self.recomputed == "core":
                attend = partial(recompute, attend)
            heads = attend(q, k, v, mask, dropout, is_causal and mask is None)
        # 5. Put the heads side by side again, and project.
        out = self.out_proj(heads.transpose(1, 2).reshape(n, length, e))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        e = self.embed_dim
        if query is key and key is value:
            return split(F.linear(query, self.in_proj_weight, self.in_proj_bias), e, -1)
        weights = split(self.in_proj_weight, e)
        biases = (None,) * 3 if self.in_proj_bias is None else split(self.in_proj_bias, e)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, t: Tensor) -> Tensor:
        n, length, e = t.shape
        return t.reshape(n, length, self.num_heads, e // self.num_heads).transpose(1, 2)

    def _mask(
        self, padding: Tensor | None, mask: Tensor | None, causal: bool, n: int, length: int, source: int, like: Tensor
    ) -> Tensor | None:
        """The masks as one tensor to add to the scores (N, heads, L, S), or None."""
        xp = backend.namespace(like.data)

        def added(t: Tensor) -> Tensor:
            return masked_fill(Tensor(xp.zeros(t.shape, like.dtype)), t, -math.inf) if t.dtype == bool else t

        parts = []
        if mask is not None:
            parts.append(added(mask).reshape(n, self.num_heads, length, source) if mask.ndim == 3 else added(mask))
        elif causal:
            parts.append(added(Tensor(xp.triu(xp.ones((length, source), bool), 1))))
        if padding is not None:
            parts.append(added(padding).reshape(n, 1, 1, source))
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


MultiheadAttention = MultiHeadAttention  # PyTorch's spelling
