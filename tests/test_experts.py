"""A mixture of experts: whatever the number of ranks, it is what one rank computes for all tokens."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from gradcheck import gradcheck
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist.collectives import all_reduce
from minidist.comm import Communicator, Network, simulate
from minidist.mesh import Mesh
from minidist.parallel.experts import MixtureOfExperts, assign, largest
from minidist.tensor import Tensor

C, HIDDEN, EXPERTS = 3, 4, 5  # 5 experts divide by 1 rank only
ALPHA = 0.3  # of the auxiliary loss
NAMES = ("router.weight", "w1", "b1", "w2", "b2")


def numbers(tokens: int) -> dict[str, np.ndarray]:
    """x, the gradient c of y, and weights of all experts."""
    shapes = [(tokens, C), (tokens, C), (EXPERTS, C), (EXPERTS, HIDDEN, C), (EXPERTS, HIDDEN), (EXPERTS, C, HIDDEN)]
    rng = np.random.default_rng(tokens)
    return {name: rng.normal(size=s) for name, s in zip(("x", "c", *NAMES), [*shapes, (EXPERTS, C)], strict=True)}


def reference(a: dict[str, np.ndarray], k: int, factor: float | None, ranks: int) -> tuple[np.ndarray, ...]:
    """(y, the loss, the share of dropped choices of each rank), token by token.

    Any array may be complex and have a leading dim more, of variants that differ too little for other choices.
    """
    n = a["x"].shape[-2]
    y, p_mean, f, dropped = [0.0] * n, 0.0, np.zeros(EXPERTS), np.zeros(ranks)
    for rank, tokens in enumerate(np.array_split(np.arange(n), ranks)):
        room = np.full(EXPERTS, n if factor is None else math.ceil(factor * k * len(tokens) / EXPERTS))
        gates, chosen = {}, {}
        for t in tokens:
            e_logits = np.exp(np.einsum("...ec,...c->...e", a["router.weight"], a["x"][..., t, :]))
            p = e_logits / e_logits.sum(-1, keepdims=True)
            chosen[t] = np.argsort(-p.real.reshape(-1, EXPERTS)[0])[:k]
            gates[t] = p[..., chosen[t]] / (p[..., chosen[t]].sum(-1, keepdims=True) if k > 1 else 1)
            p_mean = p_mean + p / n
            f[chosen[t]] += 1 / (k * n)
        for choice in range(k):
            for t in tokens:
                e = chosen[t][choice]
                room[e] -= 1
                if room[e] < 0:
                    dropped[rank] += 1 / (k * len(tokens))
                    continue
                h = np.einsum("...hc,...c->...h", a["w1"][..., e, :, :], a["x"][..., t, :]) + a["b1"][..., e, :]
                h = h / (1 + np.exp(-h))  # silu
                out = np.einsum("...ch,...h->...c", a["w2"][..., e, :, :], h) + a["b2"][..., e, :]
                y[t] = y[t] + gates[t][..., choice, None] * out
    y = np.stack([each + np.zeros(C) for each in np.broadcast_arrays(*y, np.zeros(C))[:n]], -2)
    return y, (a["c"] * y).sum((-1, -2)) / n + ALPHA * EXPERTS * (f * p_mean).sum(-1), dropped


@functools.cache
def derivatives(tokens: int, k: int, factor: float | None, ranks: int) -> dict[str, np.ndarray]:
    """Of the reference's loss, exact to rounding: f(x + ih) = f(x) + ih f'(x), with nothing subtracted."""
    arrays, result = numbers(tokens), {}
    for name in ("x", *NAMES):
        shape, size = arrays[name].shape, arrays[name].size
        moved = arrays[name] + 1e-30j * np.eye(size).reshape(size, *shape)
        result[name] = reference({**arrays, name: moved}, k, factor, ranks)[1].imag.reshape(shape) / 1e-30
    return result


def layer_of(comm: Communicator, arrays: dict[str, np.ndarray], **options: object) -> MixtureOfExperts:
    """The layer with this rank's part of these weights."""
    layer = MixtureOfExperts(C, HIDDEN, EXPERTS, comm, **options)
    layer.double()
    state = {name: np.array_split(arrays[name], comm.size)[comm.rank] for name in NAMES[1:]}
    layer.load_state_dict({"router.weight": arrays["router.weight"], **state})
    return layer


def check(comm: Communicator, tokens: int, k: int, factor: float | None, dp: int = 1, device: str = "cpu") -> None:
    """Each rank has its tokens and their mean loss; the mean over ranks is weighted by how many tokens they have."""
    arrays, mesh = numbers(tokens), Mesh(comm, dp=dp, ep=comm.size // dp)
    mine = np.array_split(np.arange(tokens), comm.size)[comm.rank]
    layer = layer_of(mesh.ep, arrays, top_k=k, capacity_factor=factor, activation="silu", tokens=comm)
    layer.to(device)
    x = md.tensor(arrays["x"][mine][None], device=device, requires_grad=True)
    y = layer(x)
    assert layer.auxiliary_loss is not None
    weight = comm.size * len(mine) / tokens
    loss = (y * md.tensor(arrays["c"][mine][None], device=device)).sum() / max(
        len(mine), 1
    ) + layer.auxiliary_loss * ALPHA
    loss.backward(np.array(weight))

    expected, expected_loss, dropped = reference(arrays, k, factor, comm.size)
    assert_allclose(y.numpy()[0], expected[mine], rtol=1e-10, atol=1e-12)
    assert_allclose(all_reduce(comm, np.array([weight * loss.item()]), "mean"), expected_loss, rtol=1e-10)
    assert_allclose(layer.dropped, dropped[comm.rank], atol=1e-12)
    exact = derivatives(tokens, k, factor, comm.size)
    got = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    assert_allclose(x.grad.numpy()[0] / comm.size, exact["x"][mine], rtol=1e-10, atol=1e-12)
    router = all_reduce(comm, got.pop("router.weight").copy(), "mean")
    assert_allclose(router, exact["router.weight"], rtol=1e-10, atol=1e-12)
    for name, gradient in got.items():
        mean = all_reduce(mesh.dp, gradient.copy(), "mean")
        part = np.array_split(exact[name], mesh.ep.size)[mesh.ep.rank]
        assert_allclose(mean, part, rtol=1e-10, atol=1e-12, err_msg=name)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.6])
def test_values_and_gradients_are_those_of_one_rank(comm: Communicator, k: int, factor: float | None) -> None:
    check(comm, 13, k, factor)


@on_ranks(1, 3, 4)
def test_experts_and_ranks_without_tokens(comm: Communicator) -> None:
    check(comm, 2, 1, None)


@on_ranks(4)
def test_replicas_of_the_experts(comm: Communicator) -> None:
    check(comm, 13, 2, None, dp=2)


def test_on_a_gpu(device: str) -> None:
    simulate(check, 2, 7, 2, 0.6, 1, device)


def test_sends_that_wait_for_their_receives() -> None:
    simulate(check, 3, 13, 2, 1.25, network=Network(sends="rendezvous"))


def test_without_drops_the_result_does_not_depend_on_the_ranks() -> None:
    arrays = numbers(12)

    def program(comm: Communicator) -> np.ndarray:
        layer = layer_of(comm, arrays, capacity_factor=2.5)  # 2 · 2.5 / 5: one place for every token
        y = layer(Tensor(np.array_split(arrays["x"], comm.size)[comm.rank]))
        assert layer.dropped == 0
        return y.numpy()

    one, *others = (np.concatenate(simulate(program, size).results) for size in (1, 2, 3))
    for other in others:
        assert_allclose(other, one, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_as_the_docstring_says(size: int) -> None:
    def program(comm: Communicator, backward: bool) -> None:
        layer = MixtureOfExperts(64, 8, size, comm, top_k=size, capacity_factor=None)  # all choose all: it is even
        y = layer(Tensor(np.ones((50, 64), np.float32), requires_grad=True))
        if backward:
            y.sum().backward()

    shares = simulate(lambda comm: all_reduce(comm, np.zeros(size + 1)), size)
    forward, whole = (simulate(program, size, backward) for backward in (False, True))
    for rank in range(size):
        large = 50 * 64 * 4 * (size - 1)
        assert forward.bytes_by_rank[rank] == 2 * large + 8 * (size - 1) + shares.bytes_by_rank[rank]
        assert whole.bytes_by_rank[rank] - forward.bytes_by_rank[rank] == 2 * large


@on_ranks(1)
@pytest.mark.parametrize("k, activation", [(1, "relu"), (2, "gelu")])
def test_derivatives_by_differences(comm: Communicator, k: int, activation: str) -> None:
    layer = MixtureOfExperts(2, 2, 3, comm, top_k=k, capacity_factor=0.8, activation=activation)

    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        layer.router.weight, layer.w1, layer.b1, layer.w2, layer.b2 = weights
        y = layer(x)
        assert 0 < layer.dropped < 0.5
        return [y, layer.auxiliary_loss]

    rng = np.random.default_rng(4)
    gradcheck(function, *(rng.normal(size=shape) for shape in [(5, 2), (3, 2), (3, 2, 2), (3, 2), (3, 2, 2), (3, 2)]))


@on_ranks(1, 2, 3)
def test_weights_are_those_that_one_rank_draws(comm: Communicator) -> None:
    drawn = []
    for ranks in (comm, comm.split(comm.rank)):
        assert ranks is not None
        md.manual_seed(3)
        drawn.append(MixtureOfExperts(C, HIDDEN, EXPERTS, ranks))
    split, whole = drawn
    for name, array in whole.state_dict().items():
        part = split.splits[name].slice(array, comm.size, comm.rank) if name in split.splits else array
        assert_array_equal(split.state_dict()[name], part)
    assert 0.9 / math.sqrt(C) < np.abs(whole.w1.numpy()).max() <= 1 / math.sqrt(C)
    assert 0.9 / math.sqrt(HIDDEN) < np.abs(whole.w2.numpy()).max() <= 1 / math.sqrt(HIDDEN)


@on_ranks(2)
def test_half_precision_in_and_out(comm: Communicator) -> None:
    arrays = numbers(13)
    layer = layer_of(comm, arrays, activation="silu", capacity_factor=None).half()
    x = Tensor(arrays["x"].astype(np.float16), requires_grad=True)
    y = layer(x)
    (y.sum() + layer.auxiliary_loss).backward()
    assert (y.dtype, x.grad.dtype, layer.w1.grad.dtype, layer.auxiliary_loss.dtype) == (*["f2"] * 3, "f4")
    assert_allclose(y.numpy(), reference(arrays, 2, None, 1)[0], atol=0.03)


def test_first_come_first_served() -> None:
    # Tokens like: 0 then 1; 0 then 2; 1 then 0; 0 then 1. Each expert takes two.
    plan = assign(np.array([[0, 1], [0, 2], [1, 0], [0, 1]]), 4, 2)
    assert plan.wanted.tolist() == [4, 3, 1, 0]
    assert plan.counts.tolist() == [2, 2, 1, 0]
    assert plan.tokens.tolist() == [0, 1, 2, 0, 1]  # 0: tokens 0, 1 first. 1: token 2 first, then 0's second choice
    assert [rows.tolist() for rows in plan.rounds] == [[0, 1, 2], [3, 4]]


def test_the_largest_and_the_first_of_equal_ones() -> None:
    assert largest(np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]), 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert largest(np.empty((0, 4)), 2).shape == (0, 2)


@on_ranks(2)
def test_bad_arguments_are_refused(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="1 experts for 2 ranks"):
        MixtureOfExperts(C, HIDDEN, 1, comm, top_k=1)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"top_k={k} of 5 experts"):
            MixtureOfExperts(C, HIDDEN, 5, comm, top_k=k)
    with pytest.raises(ValueError, match="capacity_factor=0; expected a number above 0, or None"):
        MixtureOfExperts(C, HIDDEN, 5, comm, capacity_factor=0)
    with pytest.raises(ValueError, match="activation='step'; choose gelu, relu, silu"):
        MixtureOfExperts(C, HIDDEN, 5, comm, activation="step")
    with pytest.raises(ValueError, match="x has 4 channels, the layer 3"):
        MixtureOfExperts(C, HIDDEN, 5, comm)(md.zeros(2, 4))
