"""A backward in two halves: what the first does, what it leaves, and that both together are one backward."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

import minidist as md
from minidist import nn
from minidist.nn import Module
from minidist.nn import functional as F
from minidist.split_backward import SplitBackward
from minidist.tensor import Tensor


class Twice(Module):
    """The same weight in two places, once transposed; and a frozen one."""

    def __init__(self) -> None:
        self.weight = nn.Linear(6, 6).weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(F.linear(x, self.weight)) @ self.weight.T + self.weight[0]


class Attend(nn.MultiHeadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False, is_causal=True)[0]


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6, bias=False)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)),
    "attention": lambda: nn.Sequential(Attend(6, 2, batch_first=True), nn.GELU()),
    "twice": Twice,
    "no parameters": lambda: nn.Sequential(nn.Tanh(), nn.Softmax(-1)),
    "recomputed": lambda: nn.Sequential(nn.Linear(6, 5).recompute_(), nn.Tanh(), nn.Linear(5, 6)).recompute_(),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_two_halves_are_one_backward(name: str, flat: bool) -> None:
    md.manual_seed(0)
    model = MODELS[name]().double()
    if flat and any(True for _ in model.parameters()):
        nn.flatten(p for p in model.parameters() if p.requires_grad)
    array = np.random.default_rng(0).normal(size=(3, 4, 6))
    dy = np.random.default_rng(1).normal(size=array.shape)

    x = Tensor(array, requires_grad=True)
    model(x).backward(dy)
    assert x.grad is not None
    dx = x.grad.numpy().copy()
    expected = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    finished: list[Tensor] = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(finished.append)
    x = Tensor(array, requires_grad=True)
    halves = SplitBackward(model(x), dy, set(model.parameters()))
    assert x.grad is not None
    assert_allclose(x.grad.numpy(), dx, rtol=1e-12)
    assert not finished and all(p.grad is None for p in model.parameters())
    halves.finish()
    assert set(finished) == {p for p in model.parameters() if p.requires_grad} and len(finished) == len(expected)
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert_allclose(p.grad.numpy(), expected[n], rtol=1e-12, err_msg=n)


def test_the_first_half_does_not_multiply_for_the_weights() -> None:
    """Of a linear layer's two products each half does one: seen by what backward was asked for."""
    asked = []
    linear = type(F.linear(Tensor(np.ones((1, 1)), True), Tensor(np.ones((1, 1)), True))._node)
    original = linear.backward

    def noting(self, dy):
        asked.append(self.needs)
        return original(self, dy)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    linear.backward = noting
    try:
        halves = SplitBackward(model(x), np.ones((2, 3), np.float32), set(model.parameters()))
        assert asked == [(True, False, False)] * 2
        halves.finish()
        assert asked[2:] == [(False, True, True)] * 2
    finally:
        linear.backward = original


def test_an_embedding_comes_in_the_second_half() -> None:
    """A first stage has no input that wants a gradient; what flows through it is differentiated first all the same."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    ids = Tensor(np.array([[0, 4, 4]]))
    model(ids).sum().backward()
    expected = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    model.zero_grad()
    halves = SplitBackward(model(ids).sum(), np.ones(()), set(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert len(halves.waiting) == 2  # the linear layer and the embedding itself
    halves.finish()
    for n, p in model.named_parameters():
        assert_allclose(p.grad.numpy(), expected[n], rtol=1e-12)


def test_a_change_in_between_is_noticed() -> None:
    model = nn.Linear(3, 3)
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    h = x * 2
    halves = SplitBackward(model(h).sum(), np.ones((), np.float32), set(model.parameters()))
    with md.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        halves.finish()
