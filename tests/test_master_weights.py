"""Master weights: what they keep, who has them, where they go and come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks
from test_data_parallel import LR, batches
from test_mixed_precision import give, half_network, parameter, train

import minidist as md
from minidist.comm import Communicator
from minidist.optim import GradScaler, with_master_weights
from minidist.parallel import bytes_per_rank, data_parallel
from minidist.parallel.overflow import any_rank
from minidist.parallel.parameter_server.store import OptimizerUpdate
from minidist.tensor import Tensor


def test_updates_below_half_precisions_digits_add_up_in_the_masters() -> None:
    weights = []
    for masters in (False, True):
        p = parameter(1.0, -2.0)
        optimizer: Any = md.optim.SGD([p], lr=1e-4)
        if masters:
            with_master_weights(optimizer)
        for _ in range(50):
            give(p, 1.0, -1.0)
            optimizer.step()
        weights.append(p.numpy().astype(np.float64))
    assert_array_equal(weights[0], [1.0, -2.0])  # lost, every one of them
    assert_allclose(weights[1], [1 - 50e-4, -2 + 50e-4], rtol=5e-4)


def test_half_and_single_precision_side_by_side() -> None:
    half, single = parameter(1.0), parameter(1.0, dtype=np.float32)
    optimizer = with_master_weights(md.optim.AdamW([half, single], lr=0.1))
    for _ in range(3):
        give(half, 0.5)
        give(single, 0.5)
        optimizer.step()
    assert half.item() == np.float16(single.item())
    state = optimizer.state_dict()["state"]
    assert state[0]["master"] == single.numpy() and "master" not in state[1]
    assert all(array.dtype == np.float32 for name, array in state[0].items() if name != "step" and "exp" not in name)


@pytest.mark.parametrize("kind", [md.optim.Adam, md.optim.SGD])
@on_ranks(1, 2, 3)
def test_training_goes_on_from_a_saved_state_bit_for_bit(comm: Communicator, kind: Any) -> None:
    def fresh() -> Any:
        model = half_network()
        options = {"momentum": 0.9} if kind is md.optim.SGD else {}
        return data_parallel(model, with_master_weights(kind(model.parameters(), lr=LR, **options)), comm, zero=1)

    scaler = GradScaler(2.0**8, agree=any_rank(comm))
    model, optimizer = fresh()
    train(model, optimizer, scaler, comm, batches(8)[:4])
    weights, state = {n: a.copy() for n, a in model.state_dict().items()}, optimizer.state_dict()
    train(model, optimizer, scaler, comm, batches(8)[4:8])
    for first in ("model", "optimizer"):
        other, again = fresh()
        for what in (first, "model", "optimizer"):
            other.load_state_dict(weights) if what == "model" else again.load_state_dict(state)
        train(other, again, scaler, comm, batches(8)[4:8])
        for name, array in other.state_dict().items():
            assert_array_equal(array, model.state_dict()[name])


def test_weights_and_states_of_others_are_taken_over() -> None:
    p = parameter(1.0, 2.0)
    optimizer = with_master_weights(md.optim.SGD([p], lr=1e-4, momentum=0.5))
    give(p, 1.0, 1.0)
    optimizer.step()
    with md.no_grad():
        p[1] = 5.0
    optimizer.zero_grad()
    give(p, 1.0, 0.0)
    optimizer.step()
    master = optimizer.state_dict()["state"][0]["master"]
    assert_allclose(master, [1 - 1e-4 - 1.5e-4, 5 - 0.5e-4], rtol=1e-7)  # the first kept its digits
    # A state without masters, of an optimizer in float32 say: they begin from the parameters.
    single = [parameter(1.0, 1.0, dtype=np.float32)]
    other = md.optim.SGD(single, lr=1e-4, momentum=0.5)
    give(single[0], 1.0, 1.0)
    other.step()
    optimizer.load_state_dict(other.state_dict())
    before = p.numpy().astype(np.float64)
    give(p, 1.0, 1.0)
    optimizer.step()
    assert_allclose(optimizer.state_dict()["state"][0]["master"], before - 1.5e-4, rtol=1e-7)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 4)
def test_a_rank_holds_what_the_formula_says(comm: Communicator, zero: int) -> None:
    model = md.nn.Linear(8, 8).half()  # 72 parameters: chunks of 18
    optimizer = with_master_weights(md.optim.Adam(model.parameters()))
    model, optimizer = data_parallel(model, optimizer, comm, zero)
    scaler = GradScaler(8.0, agree=any_rank(comm))
    scaler.scale(model(Tensor(np.ones((2, 8), np.float16))).float().sum()).backward()
    scaler.step(optimizer)
    model.meter.reset()
    model.meter.weigh()
    memory = model.meter.memory
    assert sum(memory.values()) == bytes_per_rank(zero, 72, comm.size, parameter=2, gradient=2, state=12)


def test_what_can_have_no_masters_is_refused() -> None:
    p = parameter(1.0)
    optimizer: Any = md.optim.SGD([p], lr=1.0, momentum=0.9)
    give(p, 1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the optimizer's first step"):
        with_master_weights(optimizer)
    with pytest.raises(ValueError, match=r"are float32: call model.half\(\)"):
        with_master_weights(md.optim.SGD([parameter(1.0, dtype=np.float32)], lr=1.0))
    model = half_network()
    _, sharded = data_parallel(model, md.optim.SGD(model.parameters(), lr=1.0), md.comm.world(), zero=1)
    with pytest.raises(TypeError, match="before data_parallel, not ShardedOptimizer"):
        with_master_weights(sharded)  # type: ignore[arg-type]
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for bfloat16 in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        with pytest.raises(TypeError, match="use float16"):
            model.to(bfloat16)


def test_a_server_keeps_masters_too() -> None:
    p = parameter(1.0, -2.0, 3.0)
    optimizer = with_master_weights(md.optim.SGD([p], lr=1e-4))
    update = OptimizerUpdate(optimizer, optimizer.parts[0], 1, 3)
    data = p.numpy()[1:].copy()
    for _ in range(50):
        update(data, np.array([-1, 1], np.float16), 1.0)
    assert_allclose(data, [-2 + 50e-4, 3 - 50e-4], rtol=5e-4)
