"""Recomputed modules: hooks, flat buffers, masks, statistics and other ranks as without it, and less memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from launch import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist import backend, ops
from minidist.autograd import bytes_kept
from minidist.comm import Communicator
from minidist.nn import functional as F
from minidist.parallel import data_parallel
from minidist.parallel.functions import copy_to, reduce_from
from minidist.recomputation import recompute, recompute_sequential
from minidist.tensor import Tensor

sys.path.append(str(ROOT / "benchmarks"))
import activation_memory

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))


# -- parameters -------------------------------------------------------------------------------------------------------


def network(seed: int = 0, dropout: float = 0.0, norm: bool = False) -> md.nn.Sequential:
    md.manual_seed(seed)
    layers = [
        md.nn.Sequential(md.nn.Linear(6, 6), md.nn.Tanh(), md.nn.Dropout(dropout), md.nn.Linear(6, 6)) for _ in "abc"
    ]
    return md.nn.Sequential(*layers, md.nn.LayerNorm(6) if norm else md.nn.Identity()).double()


def test_hooks_run_once_each_in_the_usual_order_with_the_whole_gradient() -> None:
    def order(recomputed: bool) -> list[tuple[int, bytes]]:
        model, seen = network(), []
        shared = model[0][0].weight
        model[2][0].weight = shared  # used by two stretches
        for i, p in enumerate(model.parameters()):
            p.register_post_accumulate_grad_hook(lambda p, i=i: seen.append((i, p.grad.numpy().tobytes())))
        for layer in model if recomputed else ():
            layer.recompute_()
        (model(Tensor(np.ones((2, 6)))) ** 2).sum().backward()
        return seen

    assert order(True) == order(False)


def test_gradients_are_written_straight_into_the_flat_buffer() -> None:
    model = network()
    md.optim.SGD(model.parameters(), lr=0.1)
    model.recompute_()
    model(Tensor(np.ones((2, 6)))).sum().backward()
    for p in model.parameters():
        assert np.shares_memory(p.grad.data, p._flat.grad)


def test_names_and_weights_stay_what_they_are() -> None:
    model = network()
    names = list(model.state_dict())
    x = Tensor(RNG.standard_normal((2, 6)))
    before = model(x).numpy()
    assert model.recompute_() is model
    assert list(model.state_dict()) == names
    assert_array_equal(model(x).numpy(), before)
    model.recompute_("none")
    model(x).sum().backward()


def test_what_to_recompute_is_checked() -> None:
    with pytest.raises(ValueError, match="'everything'"):
        network().recompute_("everything")
    with pytest.raises(ValueError, match="2 modules can't be cut into 3"):
        recompute_sequential([md.nn.Tanh(), md.nn.Tanh()], 3, Tensor(A))


def test_a_sequence_in_segments() -> None:
    modules, x = [md.nn.Tanh() for _ in range(5)], Tensor(A, requires_grad=True)
    y = recompute_sequential(modules, 2, x)
    assert bytes_kept([y]) == 1 * A.nbytes  # the second segment's input; the first one's is a leaf
    y.sum().backward()
    plain = Tensor(A, requires_grad=True)
    md.nn.Sequential(*modules)(plain).sum().backward()
    assert_array_equal(x.grad.numpy(), plain.grad.numpy())


# -- random numbers and other state -----------------------------------------------------------------------------------


def gradients(model: md.nn.Module, x: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Of a step; and what the generator draws after it."""
    md.manual_seed(7)
    y = model(Tensor(x))
    drawn = md.rand(1).item()
    (y * y).sum().backward()
    return [p.grad.numpy().copy() for p in model.parameters()], drawn + 10 * md.rand(1).item()


def test_dropout_draws_the_same_masks_and_the_generator_goes_on_as_without() -> None:
    x = RNG.standard_normal((5, 6))
    expected, drawn = gradients(network(dropout=0.5), x)
    model = network(dropout=0.5)
    for layer in model:
        layer.recompute_()
    found, also = gradients(model.recompute_(), x)
    assert drawn == also
    for a, b in zip(found, expected, strict=True):
        assert_array_equal(a, b)


def test_masks_are_the_same_from_any_generator_and_after_a_new_seed() -> None:
    mine = backend.Generator(3)

    def noisy(x: Tensor) -> Tensor:
        return ops.exp(F.dropout(F.dropout(x, 0.5), 0.5, generator=mine))

    x = Tensor(np.ones((20, 20)), requires_grad=True)
    y = recompute(noisy, x)
    md.manual_seed(9)
    after = mine.numpy.bit_generator.state
    y.sum().backward()
    assert_allclose(x.grad.numpy(), np.where(y.numpy() > 1, 4 * y.numpy(), 0))
    assert mine.numpy.bit_generator.state == after
    assert md.rand(1).item() == backend.Generator(9).uniform(0, 1, (1,)).item()


def test_batch_statistics_move_once() -> None:
    found = []
    for recomputed in ("none", "all"):
        norm = md.nn.BatchNorm2d(3).double()
        norm.recompute_(recomputed)
        norm(Tensor(np.random.default_rng(1).standard_normal((4, 3, 2, 2)))).sum().backward()
        found.append(norm.state_dict())
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        assert_array_equal(a, b)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_core_of_attention_alone(dropout: float) -> None:
    b, s, h, heads = 2, 7, 8, 2
    x = RNG.standard_normal((b, s, h))
    kept, grads = [], []
    for what in ("none", "core"):
        md.manual_seed(0)
        model = md.nn.Sequential(md.nn.Identity())
        model.attention = md.nn.MultiHeadAttention(h, heads, dropout, batch_first=True).double()
        model.recompute_(what)
        t = Tensor(x, requires_grad=True)
        y, _ = model.attention(t, t, t, need_weights=False, is_causal=True)
        kept.append(bytes_kept([y]))
        y.sum().backward()
        grads.append([t.grad.numpy(), *(p.grad.numpy() for p in model.parameters())])
    for a, c in zip(*grads, strict=True):
        assert_array_equal(a, c)
    weights, result = 8 * heads * s * s * b, 8 * b * s * h
    assert kept[0] - kept[1] == weights * (2 if dropout else 1) + result  # and the mask


def test_a_transformers_blocks_keep_what_the_formula_says() -> None:
    # The benchmark itself asserts that the bytes are equal, and the gradients, for every way of recomputing.
    assert activation_memory.formula("none", 1, s=2048, b=1, h=12288, a=96) == 204 * 2048 * 12288 + 8 * 2048
    rows = activation_memory.measure(layers=3, s=5, b=3, h=8, a=2, steps=1)
    assert [row.split()[0] for row in rows] == ["none", "core", "all", "sqrt"]


# -- with other ranks -------------------------------------------------------------------------------------------------

X, LABELS = np.random.default_rng(5).standard_normal((9, 6)), np.random.default_rng(6).integers(0, 6, 9)


@pytest.mark.parametrize("zero, options", [(0, {"bucket_bytes": 300}), (0, {}), (1, {}), (2, {}), (3, {})])
@on_ranks(1, 2, 3)
def test_data_parallelism_trains_as_without(comm: Communicator, zero: int, options: dict[str, int]) -> None:
    weights = []
    for ranks, what in ((comm.split(comm.rank), "none"), (comm, "all")):
        model = network(norm=True)
        for layer in model[:3]:
            layer.recompute_(what)
            layer[1].recompute_(what)
        optimizer = md.optim.AdamW(model.parameters(), lr=0.1)
        model, optimizer = data_parallel(model, optimizer, ranks, zero if ranks is comm else 0, **options)
        for _ in range(3):
            optimizer.zero_grad()
            mine = np.array_split(np.arange(9), ranks.size)[ranks.rank]
            F.cross_entropy(model(Tensor(X[mine])), md.tensor(LABELS[mine])).backward()
            optimizer.step()
        weights.append(model.state_dict())
    for name, array in weights[1].items():
        assert_allclose(array, weights[0][name], rtol=1e-10, atol=1e-12, err_msg=name)


@on_ranks(1, 3)
def test_communication_in_it_is_done_twice(comm: Communicator) -> None:
    x, w = Tensor(A, requires_grad=True), Tensor(B * (comm.rank + 1), requires_grad=True)
    y = recompute(lambda x: reduce_from(ops.exp(copy_to(x, comm) @ w), comm), x)
    y.sum().backward()
    each = [np.exp(A @ B * (r + 1)) for r in range(comm.size)]
    assert_allclose(y.numpy(), sum(each))
    assert_allclose(x.grad.numpy(), sum(e @ B.T * (r + 1) for r, e in enumerate(each)))
    assert_allclose(w.grad.numpy(), A.T @ each[comm.rank])


def test_a_model_that_data_parallel_returned_is_refused() -> None:
    model = network()
    model, _ = data_parallel(model, md.optim.SGD(model.parameters(), lr=0.1), md.comm.world())
    with pytest.raises(RuntimeError, match="let recompute be inside of the model"):
        recompute(model, Tensor(X))
