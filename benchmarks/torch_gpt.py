"""The GPT of examples/gpt in PyTorch, with modules of the same names: what tests and benchmarks compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def torch_gpt(config: Any) -> nn.Sequential:
    """For a GPTConfig without experts and dropout. (Rotary positions by complex numbers.)"""

    def rotated(x: Any) -> Any:
        """Pair (x[i], x[i + E/2]) as one complex number, times e**(i position frequency)."""
        half = x.shape[-1] // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)
        y = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat([y.real, y.imag], -1).to(x.dtype)

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocab_size, config.width)
            if config.positions == "learned":
                self.positions = nn.Embedding(config.context, config.width)

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens)
            return x + self.positions(torch.arange(tokens.shape[1])) if config.positions == "learned" else x

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

        def forward(self, x: Any) -> Any:
            b, t, c = x.shape
            q, k, v = (u.view(b, t, config.heads, -1).transpose(1, 2) for u in self.qkv(x).split(c, dim=2))
            if config.positions == "rotary":
                q, k = rotated(q), rotated(k)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(b, t, c))

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(config.width, config.hidden_width * (2 if config.mlp == "swiglu" else 1))
            self.down = nn.Linear(config.hidden_width, config.width)

        def forward(self, x: Any) -> Any:
            if config.mlp != "swiglu":
                return self.down(F.gelu(self.up(x), approximate="none" if config.mlp == "gelu-erf" else "tanh"))
            gate, up = self.up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attention = nn.LayerNorm(config.width), Attention()
            self.norm2, self.mlp = nn.LayerNorm(config.width), MLP()

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    model = nn.Sequential()
    model.add_module("embed", Embed())
    for i in range(config.layers):
        model.add_module(f"block{i}", Block())
    model.add_module("norm", nn.LayerNorm(config.width))
    model.add_module("head", nn.Linear(config.width, config.vocab_size, bias=False))
    model.head.weight = model.embed.tokens.weight
    return model
