"""Recomputation: gradients are those without it, only arguments are kept, and what can't be done over is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gradcheck import gradcheck
from numpy.testing import assert_allclose

import minidist as md
from minidist import backend, ops
from minidist.autograd import bytes_kept
from minidist.recomputation import recompute
from minidist.split_backward import SplitBackward
from minidist.tensor import Tensor

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))


def counting(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and a list that grows by one with every call."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return counted, calls


def block(x: Tensor, w: Tensor) -> Tensor:
    return ops.tanh(ops.exp(ops.tanh(x @ w)) @ w.T)


# -- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_right_for_every_input() -> None:
    gradcheck(lambda x, w: recompute(block, x, w), A, B)
    gradcheck(lambda x, w: ops.exp(x) @ recompute(lambda x, w: ops.exp(x @ w), ops.tanh(x), w), A.T @ A, B)


def test_several_results_in_tuples_and_dicts() -> None:
    def several(x: Tensor, pair: tuple[Tensor, Tensor]) -> Any:
        both = ops.exp(x) * pair[0]
        return both, {"sum": (both * pair[1]).sum(), "same": x}

    def flat(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        a, rest = recompute(several, x, (y, z))
        return a, rest["sum"], rest["same"]

    gradcheck(flat, A, A + 1, A * 2)


def test_nested_and_one_after_another() -> None:
    def inner(x: Tensor) -> Tensor:
        return ops.tanh(ops.exp(x) * x)

    def outer(x: Tensor) -> Tensor:
        y = ops.sin(recompute(inner, x) + x)
        return recompute(lambda z: recompute(inner, recompute(inner, z)) * y, y)

    gradcheck(lambda x: recompute(outer, recompute(outer, x)), A)


def test_each_stretch_is_done_over_once_and_nothing_is_without_backward() -> None:
    inner, inner_calls = counting(lambda x: ops.exp(ops.tanh(x)))
    outer, outer_calls = counting(lambda x: recompute(inner, ops.exp(recompute(inner, x))))
    x = Tensor(A * 0.1, requires_grad=True)
    y = recompute(outer, x)
    assert (len(outer_calls), len(inner_calls)) == (1, 2)
    y.sum().backward()
    assert (len(outer_calls), len(inner_calls)) == (2, 6)  # forward; the outer one's second; each one's own
    with md.no_grad():
        recompute(outer, x)
    assert (len(outer_calls), len(inner_calls)) == (3, 8)


def test_what_saves_nothing_is_not_done_over() -> None:
    sums, calls = counting(lambda x: (x + x).reshape(12) - 1)
    x = Tensor(A, requires_grad=True)
    recompute(sums, x).sum().backward()
    assert len(calls) == 1
    assert_allclose(x.grad.numpy(), 2)


def test_tensors_that_need_no_gradient_and_those_that_are_closed_over() -> None:
    w, mask = Tensor(B, requires_grad=True), Tensor(A > 0)
    closed = ops.exp(w)  # neither an argument nor a leaf
    y = recompute(lambda x, mask: ops.exp(x * mask) @ closed, Tensor(A), mask)
    y.sum().backward()
    assert_allclose(w.grad.numpy(), np.exp(A * (A > 0)).sum(0)[:, None] * np.exp(B))


def test_no_graph_where_nothing_needs_a_gradient() -> None:
    assert not recompute(block, Tensor(A), Tensor(B)).requires_grad


def test_backward_twice_with_retain_graph_and_without() -> None:
    x = Tensor(A, requires_grad=True)
    function, calls = counting(lambda x: ops.exp(ops.exp(x)))
    y = recompute(function, x).sum()
    y.backward(retain_graph=True)
    first = x.grad.numpy().copy()
    with md.no_grad():
        y.backward()
    assert_allclose(x.grad.numpy(), 2 * first)
    assert_allclose(first, np.exp(np.exp(A)) * np.exp(A))
    assert len(calls) == 3
    with pytest.raises(RuntimeError, match="second backward"):
        y.backward()


def test_backward_through_one_result_and_later_through_the_other() -> None:
    x, w = Tensor(A, requires_grad=True), Tensor(A, requires_grad=True)
    y, z = recompute(lambda x, w: (ops.exp(x), ops.tanh(w)), x, w)
    y.sum().backward()
    assert w.grad is None
    z.sum().backward()
    assert_allclose(x.grad.numpy(), np.exp(A))
    assert_allclose(w.grad.numpy(), 1 - np.tanh(A) ** 2)


def test_a_backward_in_two_halves_does_it_over_once() -> None:
    x, w = Tensor(A, requires_grad=True), md.nn.Parameter(B)
    function, calls = counting(lambda x: block(block(x, w), w))
    y = recompute(function, x * 1).sum()
    halves = SplitBackward(y, np.ones(()), {w})
    assert w.grad is None
    halves.finish()
    plain, v = Tensor(A, requires_grad=True), Tensor(B, requires_grad=True)
    block(block(plain, v), v).sum().backward()
    assert_allclose(x.grad.numpy(), plain.grad.numpy(), rtol=1e-12)
    assert_allclose(w.grad.numpy(), v.grad.numpy(), rtol=1e-12)
    assert len(calls) == 2


def test_on_every_device(device: str) -> None:
    x, w = (Tensor(backend.to(a, device), requires_grad=True) for a in (A, B))
    recompute(block, x, w).sum().backward()
    plain, v = Tensor(A, requires_grad=True), Tensor(B, requires_grad=True)
    block(plain, v).sum().backward()
    assert_allclose(x.grad.numpy(), plain.grad.numpy(), rtol=1e-12)
    assert_allclose(w.grad.numpy(), v.grad.numpy(), rtol=1e-12)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["argument", "parameter", "no gradient"])
def test_an_input_changed_in_place_is_noticed(changed: str) -> None:
    # Neither sum saves what it adds, so that without recomputation nobody would have to notice.
    x, w, c = Tensor(A, requires_grad=True), Tensor(A.copy(), requires_grad=True), Tensor(A.copy())
    z = x * 1
    y = recompute(lambda x, c: ops.exp(x + w + c), z, c)
    with md.no_grad():
        {"argument": z, "parameter": w, "no gradient": c}[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"recompute\(.*changed in place"):
        y.sum().backward()


def test_another_second_forward_is_noticed() -> None:
    model = md.nn.Sequential(md.nn.Tanh(), md.nn.Dropout(0.5), md.nn.Tanh()).recompute_()
    x = Tensor(A, requires_grad=True)
    y = model(x)
    model.eval()
    with pytest.raises(RuntimeError, match=r"operation 1 was Dropout, saving \[\(3, 4\)\], and is Tanh"):
        y.sum().backward()
    sizes = iter((3, 2))
    y = recompute(lambda x: ops.exp(x[: next(sizes)]), x)
    with pytest.raises(RuntimeError, match=r"Exp, saving \[\(3, 4\)\], and is Exp, saving \[\(2, 4\)\]"):
        y.sum().backward()


def test_an_error_of_the_function_is_the_callers() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        recompute(fails, Tensor(A, requires_grad=True))
    assert backend._draws.get() == ()  # what is drawn from now on is nobody's


# -- memory -----------------------------------------------------------------------------------------------------------


def test_only_the_arguments_are_kept_and_freed_on_the_way_back() -> None:
    x = Tensor(A, requires_grad=True)
    h = x * 2

    def function(x: Tensor, t: Tensor) -> Tensor:
        return ops.exp(ops.exp(ops.tanh(x) * t))

    t = Tensor(np.ones(4))
    assert bytes_kept([function(h, t)]) > 3 * A.nbytes
    y = recompute(function, h, t)
    assert bytes_kept([y]) == A.nbytes + t.data.nbytes
    kept = weakref.ref(h)
    del h
    assert kept() is not None
    y.sum().backward()
    gc.collect()
    assert kept() is None  # with y still there


def test_the_second_graph_is_let_go_of() -> None:
    made, aside = [], []

    def function(x: Tensor) -> Tensor:
        y = ops.exp(x)
        made.append(weakref.ref(y.data))
        aside.append(ops.tanh(y))
        return recompute(ops.exp, recompute(ops.exp, aside[-1]))

    y = recompute(function, Tensor(A, requires_grad=True))
    y.sum().backward()
    gc.collect()
    assert [ref() for ref in made] == [None, None]  # though what was put aside is there
