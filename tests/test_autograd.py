"""The backward pass: graphs of every shape, accumulation, what it frees, what it refuses, and its hooks."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gradcheck import gradcheck
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import minidist as md
from minidist import backend, ops
from minidist.autograd import after_backward
from minidist.tensor import Function, Tensor


def leaf(*values: Any, device: str = "cpu") -> Tensor:
    return Tensor(backend.to(np.array(values, np.float64), device), requires_grad=True)


# -- graphs ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_ten_thousand_ops(device: str) -> None:
    x = leaf(1.0, 2.0, device=device)
    y = x
    for _ in range(10_000):
        y = y * 1.0001
    y.sum().backward()
    assert_allclose(x.grad.numpy(), 1.0001**10_000, rtol=1e-9)


def test_a_long_chain_that_is_never_walked_back_is_let_go() -> None:
    assert sys.getrecursionlimit() < 10_000
    x = leaf(1.0)
    y = x
    for _ in range(10_000):
        y = y + 1
    first = weakref.ref(y._node)
    del y
    gc.collect()
    assert first() is None


def test_diamonds() -> None:
    # Every level doubles the number of paths: 2**30 of them, and 61 nodes to visit.
    x = leaf(1.0)
    y = x
    for _ in range(30):
        y = (y + y) * 0.5
    y.sum().backward()
    assert_allclose(x.grad.numpy(), 1)


def test_a_branch_that_joins_late() -> None:
    gradcheck(lambda x: ops.exp(x) * ops.sin(ops.exp(x) + x) + x, np.array([0.3, -0.7]))


def test_a_leaf_used_many_times() -> None:
    x = leaf(2.0)
    y = x * x + x * 3 - x / x + x**2
    y.sum().backward()
    assert_allclose(x.grad.numpy(), 2 * 2 + 3 + 2 * 2)


def test_the_same_tensor_as_both_operands_of_one_op() -> None:
    x = leaf([1.0, 2.0], [3.0, 4.0])
    (x @ x).sum().backward()
    ones = np.ones((2, 2))
    assert_allclose(x.grad.numpy(), ones @ x.data.T + x.data.T @ ones)


def test_part_of_a_graph_that_leads_nowhere() -> None:
    x, unused = leaf(1.0), leaf(1.0)
    _ = unused * x  # uses x, but the result does not depend on it
    y = ops.where(Tensor(np.array([True])), x * 2, unused * 0)
    y.sum().backward()
    assert_allclose(x.grad.numpy(), 2)
    assert_allclose(unused.grad.numpy(), 0)


def test_only_the_inputs_that_ask_get_a_gradient() -> None:
    x, w = leaf(1.0, 2.0), Tensor(np.array([3.0, 4.0]))
    y = x * w
    y.sum().backward()
    assert w.grad is None
    assert_allclose(x.grad.numpy(), [3, 4])
    assert not (w * w).requires_grad


def test_backward_of_a_leaf_itself() -> None:
    x = leaf(2.0)
    x.backward(np.array([3.0]))
    assert_allclose(x.grad.numpy(), 3)


def test_intermediate_tensors_keep_no_gradient() -> None:
    x = leaf(2.0)
    y = x * 2
    (y * y).sum().backward()
    assert y.grad is None
    assert not y.is_leaf
    assert x.is_leaf


# -- accumulation ---------------------------------------------------------------------------------------------------


def test_gradients_of_two_backwards_add_up(device: str) -> None:
    x = leaf(1.0, 2.0, device=device)
    (x * 2).sum().backward()
    (x * x).sum().backward()
    assert_allclose(x.grad.numpy(), 2 + 2 * np.array([1.0, 2.0]))


def test_retain_graph_allows_a_second_backward() -> None:
    x = leaf(3.0)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert_allclose(x.grad.numpy(), 12)


def test_a_gradient_given_as_tensor_array_or_list() -> None:
    for gradient in (Tensor(np.array([1.0, 2.0])), np.array([1.0, 2.0]), [1.0, 2.0]):
        x = leaf(1.0, 1.0)
        (x * 3).backward(gradient)
        assert_allclose(x.grad.numpy(), [3, 6])
        assert x.grad.dtype == np.float64


def test_a_gradient_shares_memory_with_nothing_else() -> None:
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    dz = np.array([5.0, 6.0])
    z = x + y  # hands the same dz to both
    z.backward(dz)
    arrays = [x.grad.data, y.grad.data, x.data, y.data, z.data, dz]
    for i, a in enumerate(arrays):
        for b in arrays[i + 1 :]:
            assert not np.shares_memory(a, b)
    x.grad.data += 1
    assert_allclose(y.grad.numpy(), dz)


def test_a_gradient_from_a_broadcast_can_be_written_to() -> None:
    x = leaf(1.0, 2.0)
    x.sum().backward()
    x.sum().backward()
    x.grad.data *= 2
    assert_allclose(x.grad.numpy(), 4)


# -- a parameter's own buffer ---------------------------------------------------------------------------------------


def with_buffer(array: np.ndarray) -> Tensor:
    """A leaf whose gradient is kept in a slice of a larger array, which holds rubbish."""
    x = Tensor(array, requires_grad=True)
    buffer = np.full(array.size + 2, np.nan)[1:-1].reshape(array.shape)
    x._grad_room = lambda: buffer
    return x


def test_the_first_gradient_fills_the_buffer_and_later_ones_add() -> None:
    x = with_buffer(np.array([1.0, 2.0]))
    buffer = x._grad_room()
    (x * 3).sum().backward()
    assert x.grad.data is buffer
    (x * 4).sum().backward()
    assert x.grad.data is buffer
    assert_allclose(buffer, 7)


@pytest.mark.parametrize("how", ["linear", "embedding"])
def test_a_weight_gradient_is_computed_in_the_buffer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = with_buffer(np.random.default_rng(0).normal(size=(4, 3)))
    returned = []
    kind = {"linear": ops.matmul, "embedding": ops.embedding}[how].__globals__[how.capitalize()]
    backward = kind.backward
    monkeypatch.setattr(kind, "backward", lambda self, dy: returned.append(backward(self, dy)) or returned[-1])
    if how == "linear":
        y = ops.linear(Tensor(np.ones((2, 3))), w)
    else:
        y = ops.embedding(Tensor(np.array([3, 1, 3])), w)
    y.sum().backward()
    assert returned[0][1] is w._grad_room()
    expected = np.full((4, 3), 2.0) if how == "linear" else np.array([0, 1, 0, 2.0])[:, None] * np.ones(3)
    assert_allclose(w.grad.numpy(), expected)


def test_tied_weights_add_up_in_the_buffer() -> None:
    rng = np.random.default_rng(0)
    ids, table = np.array([0, 2, 2, 1]), rng.normal(size=(4, 3))

    def loss(w: Tensor) -> Tensor:
        return (ops.linear(ops.tanh(ops.embedding(Tensor(ids), w)), w) ** 2).sum()

    gradcheck(loss, table)
    plain, w = Tensor(table.copy(), requires_grad=True), with_buffer(table.copy())
    loss(plain).backward()
    for times in (1, 2, 3):
        loss(w).backward()
        assert w.grad.data is w._grad_room()
        assert_allclose(w.grad.numpy(), times * plain.grad.numpy())


def test_a_linear_layer_used_twice_in_one_graph() -> None:
    w, b = with_buffer(np.eye(2) * 2), with_buffer(np.array([1.0, -1.0]))
    x = Tensor(np.array([[1.0, 2.0]]))
    ops.linear(ops.linear(x, w, b), w, b).sum().backward()
    plain_w, plain_b = leaf([2.0, 0.0], [0.0, 2.0]), leaf(1.0, -1.0)
    ops.linear(ops.linear(x, plain_w, plain_b), plain_w, plain_b).sum().backward()
    assert_allclose(w.grad.numpy(), plain_w.grad.numpy())
    assert_allclose(b.grad.numpy(), plain_b.grad.numpy())


def test_a_retained_graph_adds_to_the_buffer_and_does_not_write_over_it() -> None:
    w = with_buffer(np.eye(2))
    y = ops.linear(Tensor(np.array([[1.0, 2.0]])), w)
    y.backward([[1.0, 0.0]], retain_graph=True)
    y.backward([[0.0, 1.0]])
    assert_allclose(w.grad.numpy(), [[1, 2], [1, 2]])


# -- what is freed --------------------------------------------------------------------------------------------------


class Remembering(Function):
    """y = 2 x, saving an array of its own, and noting in backward which of all those saved are still there."""

    saved_arrays: list[weakref.ref[Any]]
    alive: list[int]

    def forward(self, x: Any, saved_arrays: list[Any], alive: list[int]) -> Any:
        array = np.zeros(5)
        self.save(array)
        saved_arrays.append(weakref.ref(array))
        self.saved_arrays, self.alive = saved_arrays, alive
        return x * 2

    def backward(self, dy: Any) -> tuple[Any]:
        self.alive.append(sum(ref() is not None for ref in self.saved_arrays))
        return (dy * 2,)


def test_saved_arrays_are_freed_as_backward_goes() -> None:
    x = leaf(1.0)
    saved: list[Any] = []
    alive: list[int] = []
    y = x
    for _ in range(5):
        y = Remembering.apply(y, saved_arrays=saved, alive=alive)
    y.sum().backward()
    assert alive == [5, 4, 3, 2, 1]
    assert all(ref() is None for ref in saved)


def test_nothing_is_saved_without_a_graph() -> None:
    saved: list[Any] = []
    x = Tensor(np.ones(1))
    y = Remembering.apply(x, saved_arrays=saved, alive=[])
    with md.no_grad():
        z = Remembering.apply(leaf(1.0), saved_arrays=saved, alive=[])
    assert [ref() for ref in saved] == [None, None]
    assert not y.requires_grad
    assert not z.requires_grad


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_second_backward_says_what_to_do() -> None:
    x = leaf(1.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y.backward()


def test_a_graph_that_shares_a_freed_part_is_refused() -> None:
    x = leaf(1.0)
    shared = x * x
    (shared * 2).sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        (shared * 3).sum().backward()


def test_backward_of_several_numbers_needs_a_gradient() -> None:
    with pytest.raises(RuntimeError, match=r"\(2,\).*sum\(\)"):
        (leaf(1.0, 2.0) * 2).backward()


def test_backward_with_a_gradient_of_another_shape() -> None:
    with pytest.raises(RuntimeError, match=r"\(3,\).*\(2,\)"):
        (leaf(1.0, 2.0) * 2).backward(np.ones(3))


def test_backward_without_a_graph() -> None:
    with pytest.raises(RuntimeError, match="requires_grad"):
        Tensor(np.ones(())).backward()


def test_integers_cannot_require_a_gradient() -> None:
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda y: y.add_(1),
    "*=": lambda y: y.mul_(2),
    "zero_": lambda y: y.zero_(),
    "copy_": lambda y: y.copy_(np.zeros(2)),
    "item": lambda y: y.__setitem__(0, 5.0),
    "view": lambda y: y[:1].fill_(3),
    "reshape": lambda y: y.reshape(2, 1).add_(1),
    "transpose": lambda y: y.reshape(2, 1).T.add_(1),
    "detach": lambda y: y.detach().add_(1),
    "view of detach": lambda y: y.detach()[1:].add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", [ops.exp, ops.sigmoid, ops.relu], ids=["exp", "sigmoid", "relu"])
def test_an_in_place_change_of_a_saved_result_is_noticed(change: str, op: Callable[[Tensor], Tensor]) -> None:
    x = leaf(1.0, 2.0)
    y = op(x)
    with md.no_grad():
        CHANGES[change](y)
    with pytest.raises(RuntimeError, match=r"changed in place.*clone\(\)"):
        y.sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_an_in_place_change_of_a_saved_input_is_noticed(change: str) -> None:
    x, w = leaf(1.0, 2.0), Tensor(np.array([3.0, 4.0]))
    y = x * w
    CHANGES[change](w)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_an_in_place_change_of_what_was_not_saved_is_fine() -> None:
    x, w = leaf(1.0, 2.0), Tensor(np.array([3.0, 4.0]))
    y = x + w
    w.add_(1)
    y.sum().backward()
    assert_allclose(x.grad.numpy(), 1)


def test_an_in_place_change_before_the_forward_or_after_backward_is_fine() -> None:
    x, w = leaf(1.0, 2.0), Tensor(np.array([3.0, 4.0]))
    w.mul_(2)
    (x * w).sum().backward()
    w.mul_(2)
    assert_allclose(x.grad.numpy(), [6, 8])


@pytest.mark.parametrize("change", [c for c in CHANGES if "detach" not in c])
def test_an_in_place_change_of_what_requires_a_gradient_is_refused(change: str) -> None:
    for x in (leaf(1.0, 2.0), leaf(1.0, 2.0) * 1):
        with pytest.raises(RuntimeError, match="in-place"):
            CHANGES[change](x)


def test_an_in_place_change_that_reads_what_requires_a_gradient_is_refused() -> None:
    target = Tensor(np.zeros(2))
    with pytest.raises(RuntimeError, match="in-place"):
        target.add_(leaf(1.0, 2.0))
    assert_allclose(target.numpy(), 0)


def test_an_update_under_no_grad() -> None:
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    with md.no_grad():
        x -= 0.5 * x.grad
    assert_allclose(x.numpy(), 0)
    assert x.requires_grad
    assert x.is_leaf


def test_tensors_of_two_devices_are_refused_by_name(gpu: Any) -> None:
    x, y = leaf(1.0), leaf(1.0, device="cuda")
    for call in (lambda: x + y, lambda: y * x, lambda: ops.maximum(x, y), lambda: ops.cat([y, x])):
        with pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
            call()


def test_gradients_cross_devices_with_to(gpu: Any) -> None:
    x = leaf(1.0, 2.0)
    y = (x * 2).to("cuda")
    (y * y).sum().backward()
    assert x.grad.device == "cpu"
    assert_allclose(x.grad.numpy(), 8 * x.numpy())


# -- recording ------------------------------------------------------------------------------------------------------


def test_no_grad_and_enable_grad_nest() -> None:
    x = leaf(1.0)
    with md.no_grad():
        assert not (x * 2).requires_grad
        with md.enable_grad():
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), md.no_grad():
        raise KeyError
    assert md.is_grad_enabled()


def test_no_grad_as_a_decorator_of_a_function_that_calls_itself() -> None:
    x = leaf(1.0)

    @md.no_grad()
    def evaluate(depth: int) -> Tensor:
        return evaluate(depth - 1) if depth else x * 2

    assert not evaluate(3).requires_grad
    assert md.is_grad_enabled()


def test_detach_shares_data_and_cuts_the_graph() -> None:
    x = leaf(1.0, 2.0)
    y = x * 2
    z = y.detach()
    assert z.data is y.data
    assert not z.requires_grad
    (z * x).sum().backward()
    assert_allclose(x.grad.numpy(), [2, 4])


def test_freezing_a_leaf() -> None:
    x = leaf(1.0)
    assert not (x.requires_grad_(False) * 2).requires_grad
    with pytest.raises(RuntimeError, match="detach"):
        (leaf(1.0) * 2).requires_grad_(False)


# -- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_come_last_layer_first_each_once_with_the_finished_gradient() -> None:
    rng = np.random.default_rng(0)
    weights = [Tensor(rng.normal(size=(3, 3)), requires_grad=True) for _ in range(4)]
    seen: list[tuple[int, np.ndarray]] = []
    for i, w in enumerate(weights):
        w.register_post_accumulate_grad_hook(lambda t, i=i: seen.append((i, t.grad.numpy().copy())))
    h = Tensor(rng.normal(size=(2, 3)))
    for w in weights:
        h = ops.tanh(h @ w)
    h = h @ weights[2]  # used again at the end: finished only when its first use has contributed
    h.sum().backward()
    assert [i for i, _ in seen] == [3, 2, 1, 0]
    for i, gradient in seen:
        assert_array_equal(gradient, weights[i].grad.numpy())


def test_a_hook_sees_the_sum_of_several_backwards_and_is_called_in_each() -> None:
    x = leaf(1.0)
    seen: list[float] = []
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.item()))
    (x * 2 + x * 3).sum().backward()
    (x * 4).sum().backward()
    assert seen == [5, 9]


def test_a_hook_can_be_removed_and_others_stay() -> None:
    x = leaf(1.0)
    seen: list[str] = []
    remove = x.register_post_accumulate_grad_hook(lambda t: seen.append("a"))
    x.register_post_accumulate_grad_hook(lambda t: seen.append("b"))
    (x * 2).sum().backward()
    remove()
    (x * 2).sum().backward()
    assert seen == ["a", "b", "b"]


def test_a_hook_may_remove_itself() -> None:
    x = leaf(1.0)
    seen: list[int] = []
    remove = x.register_post_accumulate_grad_hook(lambda t: (seen.append(1), remove()))
    (x * 2).sum().backward()
    (x * 2).sum().backward()
    assert seen == [1]


def test_a_hook_may_change_the_gradient() -> None:
    x = leaf(1.0)

    def halve(t: Tensor) -> None:
        t.grad.mul_(0.5)

    x.register_post_accumulate_grad_hook(halve)
    (x * 2).sum().backward()
    assert_allclose(x.grad.numpy(), 1)


def test_hooks_are_for_leaves_that_require_a_gradient() -> None:
    for x in (Tensor(np.ones(1)), leaf(1.0) * 2):
        with pytest.raises(RuntimeError, match="leaf"):
            x.register_post_accumulate_grad_hook(print)


def test_after_backward_runs_once_everything_is_done() -> None:
    x, y = leaf(1.0), leaf(2.0)
    events: list[str] = []
    y.register_post_accumulate_grad_hook(
        lambda t: (events.append("y"), after_backward(lambda: events.append(f"end {x.grad.item()}")))
    )
    x.register_post_accumulate_grad_hook(lambda t: events.append("x"))
    ((x * 3) * y).sum().backward()
    assert events == ["y", "x", "end 6.0"]
    with pytest.raises(RuntimeError, match="backward"):
        after_backward(lambda: None)


def test_what_several_hooks_ask_for_after_backward_is_done_once() -> None:
    x, y = leaf(1.0), leaf(2.0)
    events: list[str] = []

    def end() -> None:
        events.append("end")

    for t in (x, y):
        t.register_post_accumulate_grad_hook(lambda t: after_backward(end))
    for _ in range(2):
        (x * y).sum().backward()
    assert events == ["end", "end"]  # one of each backward


def test_an_error_in_a_hook_leaves_the_next_backward_working() -> None:
    x = leaf(1.0)

    def fail(t: Tensor) -> None:
        raise ZeroDivisionError

    remove = x.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ZeroDivisionError):
        (x * 2).sum().backward()
    remove()
    x.grad = None
    (x * 2).sum().backward()
    assert_allclose(x.grad.numpy(), 2)


# -- random graphs --------------------------------------------------------------------------------------------------

# Smooth functions that keep numbers small, so that central differences stay accurate.
STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a - 2 * b,
    lambda a, b: ops.tanh(a) * b,
    lambda a, b: a / (ops.exp(ops.sin(b)) + 1),
    lambda a, b: ops.sigmoid(a),
    lambda a, b: ops.sin(a) @ ops.cos(b).mT,
    lambda a, b: a.mean(dim=0, keepdim=True) + b,
    lambda a, b: a.T * 0.5 + b,
    lambda a, b: ops.cat([a, b], dim=1)[:, 1:4],
    lambda a, b: ops.softmax(a, dim=-1),
    lambda a, b: ops.where(b.detach() > 0, a, b),
    lambda a, b: ops.stack([a, b]).sum(dim=0),
]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=8
    ),
    seed=st.integers(0, 1000),
)
def test_random_graphs_agree_with_central_differences(steps: list[tuple[int, int, int]], seed: int) -> None:
    def graph(*leaves: Tensor) -> Tensor:
        made = list(leaves)
        for step, first, second in steps:
            made.append(STEPS[step](made[first % len(made)], made[second % len(made)]))
        return made[-1] + sum((leaf.sum() for leaf in leaves), start=Tensor(np.zeros(()))) * 0.1

    rng = np.random.default_rng(seed)
    gradcheck(graph, rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rtol=1e-5, atol=1e-6)


# -- what users write -----------------------------------------------------------------------------------------------


def test_a_tensor_of_lists_and_numbers() -> None:
    assert_array_equal(Tensor([[1.0, 2.0]]).data, np.array([[1, 2]], np.float32))
    assert Tensor(2).dtype == np.int64
    x = md.tensor([1.0], dtype="float64")
    assert Tensor(x).data is x.data


def test_a_single_number_can_be_formatted_and_converted() -> None:
    x = md.tensor([1.25])
    assert f"{x.sum():.1f} {x.sum()} {x}" == "1.2 1.25 tensor([1.25])"
    assert (float(x), int(x)) == (1.25, 1)


def test_casts_and_moves_by_name(device: str) -> None:
    x = Tensor(backend.to(np.array([0.0, 1.5]), device), requires_grad=True)
    casts = dict(float="float32", double="float64", half="float16", int="int32", long="int64", bool="bool")
    for name, dtype in casts.items():
        assert getattr(x, name)().dtype == dtype
    assert x.double() is x and x.to(dtype=np.float64, device=device) is x
    assert x.to(device=device, dtype="float32").dtype == np.float32
    assert x.cpu().device == "cpu"
    x.float().cpu().sum().backward()
    assert x.grad is not None and x.grad.dtype == np.float64 and x.grad.device == x.device


def test_to_cuda_leaves_a_tensor_on_the_gpu_in_use(double: Any) -> None:
    x = Tensor(backend.to(np.ones(2), "cuda"))
    assert x.to("cuda") is x and x.cuda() is x


def test_creation_takes_what_pytorch_takes() -> None:
    assert md.zeros(np.int64(2)).shape == (2,)
    assert md.zeros([2, 3], dtype=None).dtype == md.ones(2, dtype=None).dtype == np.float32
    md.manual_seed(0)
    by_name = md.randn(3, dtype="float64").numpy()
    md.manual_seed(0)
    assert_array_equal(by_name, md.randn(3, dtype=np.float64).numpy())


def test_copy_into_a_tensor_converts_broadcasts_and_moves(device: str) -> None:
    x = Tensor(backend.to(np.zeros((2, 3), np.float32), device))
    x.T.copy_(np.arange(2))
    assert_array_equal(x.numpy(), [[0, 0, 0], [1, 1, 1]])
    assert_array_equal(x.copy_(1.5).numpy(), np.full((2, 3), 1.5))


def test_a_list_is_no_array() -> None:
    with pytest.raises(TypeError, match="list is not an array"):
        backend.namespace([1.0])
