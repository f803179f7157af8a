"""Loss scaling: how the scale moves, what an overflow skips, that all ranks agree, and what clipping sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks
from test_data_parallel import LABELS, LR, X, initial, loss_of, network, share
from test_mixed_precision import give, half_network, parameter

import minidist as md
from minidist.comm import Communicator, simulate
from minidist.nn import functional as F
from minidist.optim import GradScaler, with_master_weights
from minidist.parallel import assert_replicas_agree, data_parallel
from minidist.parallel.overflow import any_rank
from minidist.tensor import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def test_small_gradients_come_through_with_a_scale() -> None:
    found = []
    for scale in (1.0, 2.0**16):
        p = parameter(1.0)
        optimizer = with_master_weights(md.optim.SGD([p], lr=1e6))
        scaler = GradScaler(scale)
        scaler.scale((p * Tensor(np.array([1e-4], np.float16))).float().sum() * 1e-5).backward()
        scaler.step(optimizer)
        found.append(p.item())
    assert_allclose(found, [1.0, 1.0 - 1e6 * 1e-9], rtol=1e-3)


def test_the_scale_grows_and_shrinks_as_pytorchs_does() -> None:
    p = parameter(1.0)
    optimizer = with_master_weights(md.optim.SGD([p], lr=0.0))
    scaler = GradScaler(64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    scales = []
    for gradient in [1, 1, 1, 1, math.inf, 1, 1, -math.inf, math.nan, 1, 1, 1]:
        give(p, gradient)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [64, 64, 256, 256, 64, 64, 64, 16, 4, 4, 4, 16]
    assert GradScaler().get_scale() == 65536
    give(p, 1.0)
    scaler.step(optimizer)
    scaler.update(new_scale=8.0)
    assert scaler.get_scale() == 8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_overflow_skips_the_step_and_nothing_else(dtype: Any) -> None:
    p = parameter(1.0, 2.0, dtype=dtype)
    q = parameter(1.0, dtype=dtype)  # has no gradient in the last step, but an infinite one before
    optimizer: Any = md.optim.SGD([p, q], lr=1.0, momentum=0.9)
    if dtype == np.float16:
        with_master_weights(optimizer)
    scaler = GradScaler(4.0)
    for gradients, expected in (([1, math.nan], [1, 2]), ([1, math.inf], [1, 2]), ([4, 8], [0, 0])):
        optimizer.zero_grad()
        give(p, *gradients)
        if expected == [1, 2]:
            give(q, math.inf)
        assert scaler.step(optimizer) is None
        scaler.update(4.0)
        assert_array_equal(p.numpy(), expected)
    assert q.item() == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_numbers_are_no_overflow_though_their_sum_would_be(dtype: Any) -> None:
    p = parameter(1.0, 2.0, dtype=dtype)
    optimizer: Any = md.optim.SGD([p], lr=0.0)
    if dtype == np.float16:
        with_master_weights(optimizer)
    scaler = GradScaler(2.0, growth_interval=1)
    give(p, np.finfo(dtype).max, np.finfo(dtype).max)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4
    # After the update gradients are what they are again.
    optimizer.param_groups[0]["lr"] = 1.0
    give(p, 1.0, 1.0)
    optimizer.step()
    assert_array_equal(p.numpy(), [0, 1])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_an_overflow_on_one_rank_skips_the_step_on_all(comm: Communicator, zero: int) -> None:
    model = half_network()
    optimizer = with_master_weights(md.optim.Adam(model.parameters(), lr=LR))
    model, optimizer = data_parallel(model, optimizer, comm, zero)
    scaler = GradScaler(2.0**8, agree=any_rank(comm))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    x = X[share(np.arange(6), comm)].astype(np.float16)
    # With zero, the infinite number of the last bias is in the last rank's chunk: the others see none.
    for bad in (True, False):
        optimizer.zero_grad()
        loss = (model(Tensor(x)).float() * np.array([1, 1, 1, 1e4 if bad and comm.rank == 0 else 1])).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**7
        same = [np.array_equal(array, before[name]) for name, array in model.state_dict().items()]
        assert all(same) if bad else not any(same)
    assert_replicas_agree(model, comm)


@on_ranks(2, 3)
def test_only_some_ranks_see_an_overflow_and_all_agree(comm: Communicator) -> None:
    assert any_rank(comm)(comm.rank == 1) is True
    assert any_rank(comm)(False) is False
    # Each rank alone would do something else: that is what `agree` is for.
    p = parameter(1.0)
    for agree, everywhere in ((None, False), (any_rank(comm), True)):
        optimizer = with_master_weights(md.optim.SGD([p], lr=0.0))
        scaler = GradScaler(4.0, agree=agree)
        give(p, math.inf if comm.rank == 1 else 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2 if everywhere or comm.rank == 1 else 4)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 3)
def test_clipping_knows_the_scale(comm: Communicator, zero: int, norm_type: float) -> None:
    model = half_network()
    optimizer = with_master_weights(md.optim.SGD(model.parameters(), lr=1.0))
    model, optimizer = data_parallel(model, optimizer, comm, zero)
    scaler = GradScaler(2.0**10, agree=any_rank(comm))
    x = X[share(np.arange(6), comm)].astype(np.float16)
    (scaler.scale(F.cross_entropy(model(Tensor(x)).float(), md.tensor(LABELS[share(np.arange(6), comm)])))).backward()
    scaler.unscale_(optimizer)
    norm = model.clip_grad_norm_(0.1, norm_type)
    scaler.step(optimizer)
    scaler.update()

    reference = network()
    loss_of(reference, np.arange(6)).backward()
    every = np.concatenate([p.grad.numpy().ravel() for p in reference.parameters()])
    expected = np.linalg.norm(every, norm_type)
    assert norm.item() == pytest.approx(expected, rel=5e-3)
    for name, array in model.state_dict().items():
        gradient = dict(reference.named_parameters())[name].grad.numpy()
        assert_allclose(array, initial(0)[name] - gradient * 0.1 / expected, atol=3e-3)


def test_norms_are_calculated_in_float32() -> None:
    p = parameter(0.0, 0.0)
    give(p, 300.0, 400.0)  # 300² is too large for float16
    assert md.optim.clip_grad_norm_([p], 50.0).item() == 500
    assert_allclose(p.grad.numpy(), [30, 40], rtol=1e-3)


def test_the_scalers_state() -> None:
    p = parameter(1.0)
    optimizer = with_master_weights(md.optim.SGD([p], lr=0.0))
    scaler = GradScaler(8.0, growth_interval=3)
    for _ in range(2):
        give(p, 1.0)
        scaler.step(optimizer)
        scaler.update()
    state = scaler.state_dict()
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    assert state.keys() == names and state["_growth_tracker"] == 2  # as PyTorch's
    other = GradScaler()
    other.load_state_dict(state)
    scaler.step(optimizer)
    scaler.update()
    other.step(optimizer)
    other.update()
    assert other.get_scale() == scaler.get_scale() == 16
    with pytest.raises(RuntimeError, match="not enabled"):
        other.load_state_dict(GradScaler(enabled=False).state_dict())


def test_a_scaler_that_is_not_enabled_changes_nothing() -> None:
    p = parameter(1.0, dtype=np.float32)
    optimizer, scaler = md.optim.SGD([p], lr=1.0), GradScaler(enabled=False)
    loss = (p * 2).sum()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1 and not scaler.is_enabled()
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.item() == -1


def test_several_losses_are_scaled_alike() -> None:
    losses = [md.tensor(1.0), (md.tensor(2.0),)]
    first, (second,) = GradScaler(4.0).scale(losses)
    assert (first.item(), second.item()) == (4, 8)


def test_wrong_use_is_refused() -> None:
    p = parameter(1.0)
    optimizer, scaler = with_master_weights(md.optim.SGD([p], lr=1.0)), GradScaler()
    with pytest.raises(TypeError, match=r"a loss in float16.*model\(x\).float\(\)"):
        scaler.scale(p.sum())
    with pytest.raises(RuntimeError, match="nobody looked"):
        scaler.update()
    give(p, 1.0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step"):
        scaler.step(optimizer)
    with pytest.raises(TypeError, match="with_master_weights"):
        scaler.unscale_(md.optim.SGD([parameter(1.0)], lr=1.0))
    for wrong in ({"init_scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match="GradScaler"):
            GradScaler(**wrong)


def test_under_the_simulator_the_agreement_costs_one_number() -> None:
    def program(comm: Communicator) -> int:
        before = comm.record.sent_bytes
        any_rank(comm)(False)
        return comm.record.sent_bytes - before

    assert simulate(program, 2).results == [8, 8]
