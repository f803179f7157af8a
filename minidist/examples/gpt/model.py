"""A GPT of the tensor-parallel layers: the same on one rank, and split along every axis of a mesh.

    tokens -> embed -> block0 ... -> norm -> head -> logits
    block:  x + attention(norm1(x)),  then  x + mlp(norm2(x))

It is one Sequential of named layers, each from a tensor to a tensor, so that a pipeline can cut it anywhere. Along

    tp  every layer has its slice: heads of the attention, columns and rows of the MLP, rows of the vocabulary
    cp  x is this rank's part of each sequence, dealt zig-zag; attention sees the whole by messages
    ep  the experts of a layer are dealt to the ranks
    pp, dp  nothing in here

Shapes  tokens (B, T / cp) -> x (B, T / cp, width), with sequence_parallel (B, T / cp / tp, width) between the split
        layers -> logits (B, T / cp, vocabulary / tp)
Source  Radford et al. 2019 (GPT-2: pre-norm, GELU, learned positions, initial values, tied head); Touvron et al. 2023
        (Llama: rotary positions, SwiGLU)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import minidist as md
from minidist import Tensor, backend
from minidist.backend import Array, Shape
from minidist.collectives import chunk_slice
from minidist.examples.gpt.rotary import rotary
from minidist.mesh import Mesh
from minidist.nn import Module, Sequential
from minidist.nn import functional as F
from minidist.parallel.context import ring_attention, ulysses_attention
from minidist.parallel.experts import MixtureOfExperts
from minidist.parallel.functions import copy_to, gather_from, scatter_to
from minidist.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    VocabParallelEmbedding,
    VocabParallelHead,
    sharded_dropout,
    sharded_mask,
)
from minidist.parallel.zigzag import zigzag_positions
from minidist.recomputation import recompute

BALANCE = 0.01  # what the auxiliary loss of a layer of experts counts for
CONTEXT_PARALLEL = {"ring": ring_attention, "ulysses": ulysses_attention}
CHOICES = {
    "positions": ("learned", "rotary"),
    "mlp": ("gelu", "gelu-erf", "swiglu"),
    "recompute": (None, "selective", "whole"),
    "context_parallel": tuple(CONTEXT_PARALLEL),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    context            the most tokens of a sequence
    hidden             of the MLP; 4 width if not given, with SwiGLU's third matrix 8/3 width (as many parameters)
    dropout            of the embedding and of what is added to x; of the attention's weights too, but not along cp,
                       where no rank sees them all
    experts            so many MLPs in the place of one, of which each token takes two; 0 for none
    sequence_parallel  between the split layers each tp rank has a part of the sequence
    recompute          in backward, once more, what forward does not keep: "selective" the insides of the attention,
                       "whole" all of a block
    mlp                "gelu" by tanh, as GPT-2 has it; "gelu-erf", the exact one; or "swiglu"
    context_parallel   how attention goes along cp: "ring" or "ulysses"
    Errors             ValueError: a number below its least, a choice that there is not, a width of no whole heads,
                       experts that are no GELU MLPs
    """

    vocab_size: int
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    hidden: int | None = None
    positions: str = "learned"
    mlp: str = "gelu"
    dropout: float = 0.0
    experts: int = 0
    sequence_parallel: bool = False
    recompute: str | None = None
    context_parallel: str = "ring"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "hidden"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.experts < 0:
            raise ValueError(f"experts {self.experts}: must not be negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: must be a probability below 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(map(str, choices))}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions turn pairs: heads of {self.width // self.heads} have an odd number")
        if self.experts and self.mlp != "gelu":
            raise ValueError(f"experts {self.experts} with mlp {self.mlp!r}: experts are MLPs with GELU")

    @property
    def hidden_width(self) -> int:
        return self.hidden or (8 * self.width // 3 if self.mlp == "swiglu" else 4 * self.width)


class Embed(Module):
    """A row for each token, and for its position if positions are learned.   tokens (B, T / cp) -> x"""

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self.config, self.tp, self.cp = config, mesh.tp, mesh.cp
        self.tokens = VocabParallelEmbedding(config.vocab_size, config.width, mesh.tp, config.sequence_parallel)
        if config.positions == "learned":
            self.positions = md.nn.Embedding(config.context, config.width)
        self.dropout = Dropout(config, mesh)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """`start`: the position of the first token, in generation."""
        length = start + tokens.shape[1] * self.cp.size
        if length > self.config.context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {self.config.context}")
        x = self.tokens(tokens)
        if self.config.positions == "learned":
            x = x + self._positions(start, length)
        return self.dropout(x)

    def _positions(self, start: int, length: int) -> Tensor:
        """The rows of this rank's positions."""
        places = start + zigzag_positions(length - start, self.cp.size, self.cp.rank)
        weight: Tensor = self.positions.weight
        if self.config.sequence_parallel:  # each tp rank uses some of the rows: their gradients add up
            places, weight = places[chunk_slice(len(places), self.tp.size, self.tp.rank)], copy_to(weight, self.tp)
        return F.embedding(Tensor(backend.to(places, weight.device)), weight)


def norm(config: GPTConfig, mesh: Mesh) -> Module:
    """LayerNorm, of whole sequences or of this tp rank's part."""
    if config.sequence_parallel:
        return SequenceParallelLayerNorm(config.width, mesh.tp)
    return md.nn.LayerNorm(config.width)


class Dropout(Module):
    """Of x between the split layers: alike on all tp ranks, or of this rank's part of the sequence."""

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self.p, self.parted = config.dropout, mesh.tp if config.sequence_parallel else None

    def forward(self, x: Tensor) -> Tensor:
        if self.parted is None:
            return F.dropout(x, self.p, self.training)
        return sharded_dropout(x, self.p, self.training, self.parted, 1)


class Cache:
    """Keys and values of a layer so far, in generation: each token's are computed once.   (B, heads, length, E) each"""

    def __init__(self, context: int):
        self.context, self.length = context, 0
        self.keys: Array = None
        self.values: Array = None

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All so far, with these behind them."""
        if self.keys is None:
            room = (*k.shape[:2], self.context, k.shape[3])
            self.keys, self.values = (backend.empty(room, k.dtype, k.device) for _ in range(2))
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = k.data, v.data
        return Tensor(self.keys[:, :, : self.length]), Tensor(self.values[:, :, : self.length])


class Attention(Module):
    """Causal self-attention: this rank's heads, of heads / tp.   x -> as x

    qkv  (3 width, width): queries, keys and values of all heads, one under the other
    """

    def __init__(self, config: GPTConfig, mesh: Mesh):
        if config.heads % mesh.tp.size:
            raise ValueError(f"{config.heads} heads do not divide over tp={mesh.tp.size} ranks")
        self.config, self.tp, self.cp = config, mesh.tp, mesh.cp
        self.heads = config.heads // mesh.tp.size
        split = config.sequence_parallel
        self.qkv = ColumnParallelLinear(config.width, 3 * config.width, mesh.tp, sequence_parallel=split, blocks=3)
        self.out = RowParallelLinear(config.width, config.width, mesh.tp, sequence_parallel=split)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        qkv = self.qkv(x)
        if self.config.positions == "rotary":
            start = cache.length if cache is not None else 0
            places = start + zigzag_positions(qkv.shape[1] * self.cp.size, self.cp.size, self.cp.rank)
            qkv = rotary(qkv, self.heads, places)
        attend = partial(recompute, self._attend) if self.recomputed == "core" else self._attend
        return self.out(attend(qkv, cache))

    def _attend(self, qkv: Tensor, cache: Cache | None) -> Tensor:
        """(B, T / cp, 3 width / tp) -> (B, T / cp, width / tp)"""
        b, t, c = qkv.shape
        if cache is None and self.cp.size == 1:
            drop = None
            if self.training and self.config.dropout:
                drop = sharded_mask(qkv.data, self.config.dropout, (b, self.heads, t, t), self.tp, 1)
            return F.packed_attention(qkv, self.heads, is_causal=True, drop=drop)
        q, k, v = (u.reshape(b, t, self.heads, -1).transpose(1, 2) for u in qkv.split(c // 3, -1))
        if cache is None:
            y = CONTEXT_PARALLEL[self.config.context_parallel](q, k, v, self.cp)
        else:  # the newest tokens, of a longer sequence
            k, v = cache.extended(k, v)
            mask = np.tri(t, k.shape[2], k.shape[2] - t, dtype=bool)
            y = F.scaled_dot_product_attention(q, k, v, Tensor(backend.to(mask, q.device)))
        return y.transpose(1, 2).reshape(b, t, c // 3)


class MLP(Module):
    """y = down(gelu(up(x))); SwiGLU: down(silu(gate(x)) * up(x)), `up` then holding gate and up in one."""

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self.gated, self.approximate = config.mlp == "swiglu", "none" if config.mlp == "gelu-erf" else "tanh"
        hidden, split, blocks = config.hidden_width, config.sequence_parallel, 2 if self.gated else 1
        self.up = ColumnParallelLinear(config.width, blocks * hidden, mesh.tp, sequence_parallel=split, blocks=blocks)
        self.down = RowParallelLinear(hidden, config.width, mesh.tp, sequence_parallel=split)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not self.gated:
            return self.down(F.gelu(h, self.approximate))
        gate, up = h.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Experts(MixtureOfExperts):
    """In the place of one MLP many, of which each token takes two.   x -> as x

    Along tp all ranks compute the same: with sequence_parallel, for whole sequences.
    """

    def __init__(self, config: GPTConfig, mesh: Mesh):
        having_tokens = mesh.along("dp", "ep", "cp")
        super().__init__(config.width, config.hidden_width, config.experts, mesh.ep, tokens=having_tokens)
        self.tp = mesh.tp if config.sequence_parallel else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if self.tp is None else gather_from(x, self.tp, 1))
        assert self.auxiliary_loss is not None
        self.auxiliary_loss = self.auxiliary_loss * BALANCE  # as the trainer adds it
        return y if self.tp is None else scatter_to(y, self.tp, 1)


class Block(Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).   x -> as x"""

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self.norm1, self.attention = norm(config, mesh), Attention(config, mesh)
        self.norm2, self.mlp = norm(config, mesh), (Experts if config.experts else MLP)(config, mesh)
        self.dropout = Dropout(config, mesh)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(Sequential):
    """embed, block0, block1, ..., norm, head; the head's weight is the embedding's own.

    Errors  ValueError: heads, or a context, that do not divide over the ranks
    """

    def __init__(self, config: GPTConfig, mesh: Mesh):
        parts = mesh.cp.size * (mesh.tp.size if config.sequence_parallel else 1)
        if config.context % parts:
            raise ValueError(f"context {config.context} does not divide into {parts} parts, along {mesh}")
        embed = Embed(config, mesh)
        blocks = {f"block{i}": Block(config, mesh) for i in range(config.layers)}
        head = VocabParallelHead(embed.tokens.weight, mesh.tp, config.sequence_parallel)
        super().__init__({"embed": embed, **blocks, "norm": norm(config, mesh), "head": head})
        self.config, self.mesh = config, mesh
        self._initialise()
        if config.recompute == "selective":
            self.recompute_("core")
        for block in blocks.values() if config.recompute == "whole" else ():
            block.recompute_("all")

    @property
    def device(self) -> str:
        return next(self.parameters()).device

    def _initialise(self) -> None:
        """GPT-2's: weights normal with deviation 0.02, those whose result is added to x less, since two a layer add up:
        0.02 / sqrt(2 layers); biases 0. All drawn whole, so that any mesh starts with the weights of one rank.
        """
        added = 0.02 / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            match module:
                case ColumnParallelLinear() | RowParallelLinear():
                    std = added if name.endswith((".out", ".down")) else 0.02
                    _draw(module, "weight", (module.out_features, module.in_features), std)
                case VocabParallelEmbedding():
                    _draw(module, "weight", (module.num_embeddings, module.embedding_dim), 0.02)
                case Experts():
                    hidden = self.config.hidden_width
                    _draw(module, "w1", (module.num_experts, hidden, module.dim), 0.02)
                    _draw(module, "w2", (module.num_experts, module.dim, hidden), added)
                case md.nn.Linear() | md.nn.Embedding():  # an expert's router; learned positions
                    md.nn.init.normal_(module.weight, 0, 0.02)
            for bias in ("bias", "b1", "b2"):
                if getattr(module, bias, None) is not None:
                    md.nn.init.constant_(getattr(module, bias), 0)


def _draw(module: Any, name: str, whole: Shape, std: float) -> None:
    """Give a split parameter new values: this rank's part of a whole array of normal numbers."""
    drawn = backend.default_generator().normal(0, std, whole)
    with md.no_grad():
        getattr(module, name).copy_(module.splits[name].slice(drawn, module.comm.size, module.comm.rank))
