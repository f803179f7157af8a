"""Text from a trained GPT, token by token, with a key/value cache."""

from __future__ import annotations

import numpy as np

import minidist as md
from minidist import Tensor, backend
from minidist.backend import Generator
from minidist.examples.gpt.model import GPT, Cache


@md.no_grad()
def generate(
    model: GPT,
    tokens: np.ndarray,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> np.ndarray:
    """`tokens` (B, T), continued by so many.   -> (B, T + length) int64

    Each next token is drawn from softmax(logits / temperature), of the top_k likeliest if that is given; temperature 0
    takes the likeliest. A token is computed once, against the keys and values of those before it. Only where the
    context is full the newer half of it begins a new one: positions are counted from the start of the context.

    generator  what numbers are drawn from; this rank's default one if not given
    Cost       a token: its own way through the layers, and attention to at most `context` others
    Errors     ValueError: no token to begin with, one outside the vocabulary, a length or temperature below 0, top_k
               below 1, a model that is split over ranks
    """
    tokens = np.array(tokens, np.int64)
    vocabulary, context = model.config.vocab_size, model.config.context
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens of shape {tokens.shape}: expected (B, T), with a token at least to begin with")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"tokens {tokens.min()} to {tokens.max()}: the vocabulary has {vocabulary}")
    if length < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"length {length}, temperature {temperature}, top_k {top_k}: must be at least 0, 0 and 1")
    split = {axis: n for axis, n in model.mesh.shape.items() if n > 1 and axis != "dp"}
    if split:
        raise ValueError(f"this model is split over ranks ({split}): generate with one that is whole on one rank")
    generator = generator or backend.default_generator()
    was_training = model.training
    model.eval()
    # Invariant: the context is tokens[:, start:], of which the first caches[0].length have been through the model.
    start, caches = max(tokens.shape[1] - context, 0), new_caches(model)
    for _ in range(length):
        if tokens.shape[1] - start > context:
            start, caches = tokens.shape[1] - max(context // 2, 1), new_caches(model)
        logits = _next_logits(model, tokens[:, start + caches[0].length :], caches)
        drawn = _draw(logits, temperature, top_k, generator)
        tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
    model.train(was_training)
    return tokens


def new_caches(model: GPT) -> list[Cache]:
    """One for each block."""
    return [Cache(model.config.context) for _ in range(model.config.layers)]


def _next_logits(model: GPT, tokens: np.ndarray, caches: list[Cache]) -> np.ndarray:
    """The logits of what comes behind these tokens, which stand behind those in the caches.   -> (B, V) float64"""
    embed, *blocks, norm, head = model
    x = embed(Tensor(backend.to(tokens, model.device)), start=caches[0].length)
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cache)
    return head(norm(x[:, -1:])).numpy()[:, 0].astype(np.float64)


def _draw(logits: np.ndarray, temperature: float, top_k: int | None, generator: Generator) -> np.ndarray:
    """A token for each row.   (B, V) -> (B)"""
    if temperature == 0:
        return logits.argmax(axis=1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # the likeliest first
    scores = np.take_along_axis(logits, order, axis=1) / temperature
    p = np.exp(scores - scores[:, :1])
    drawn = generator.uniform(0, 1, (len(p), 1), np.float64) * p.sum(axis=1, keepdims=True)
    chosen = (p.cumsum(axis=1) <= drawn).sum(axis=1).clip(max=p.shape[1] - 1)
    return np.take_along_axis(order, chosen[:, None], axis=1)[:, 0]
