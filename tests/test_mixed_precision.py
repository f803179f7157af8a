"""Half precision: master weights, loss scaling that all ranks agree on, and sums that it is too short for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks
from test_data_parallel import LABELS, LR, N, X, batches, initial, loss_of, network, one_rank, share

import minidist as md
from minidist.comm import Communicator, simulate
from minidist.nn import functional as F
from minidist.optim import GradScaler, with_master_weights
from minidist.parallel import assert_replicas_agree, bytes_per_rank, data_parallel
from minidist.parallel.overflow import any_rank
from minidist.tensor import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def half_network() -> md.nn.Sequential:
    return network(0, np.float32).half()


def parameter(*values: float, dtype: Any = np.float16) -> md.nn.Parameter:
    return md.nn.Parameter(np.array(values, dtype))


def give(p: md.nn.Parameter, *values: float) -> None:
    p.grad = Tensor(np.array(values, p.dtype))


def train(model: Any, optimizer: Any, scaler: GradScaler, comm: Communicator, steps: list[np.ndarray]) -> int:
    """A step with each of these batches, however often that takes; how many were skipped."""
    skipped = 0
    for batch in steps:
        mine, scale = share(batch, comm), math.inf
        while scale > scaler.get_scale():
            scale = scaler.get_scale()
            optimizer.zero_grad()
            logits = model(Tensor(X[mine].astype(np.float16)))
            scaler.scale(F.cross_entropy(logits.float(), md.tensor(LABELS[mine]))).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += scale > scaler.get_scale()
    return skipped


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_half_precision_trains_as_numpy_does_in_float64(comm: Communicator, zero: int) -> None:
    model = half_network()
    optimizer = with_master_weights(md.optim.Adam(model.parameters(), lr=LR))
    model, optimizer = data_parallel(model, optimizer, comm, zero)
    scaler = GradScaler(2.0**20, growth_interval=5, agree=any_rank(comm))
    # The first scale is too large, and so are some that it grows to.
    assert train(model, optimizer, scaler, comm, batches(8)) > 3
    assert_replicas_agree(model, comm)
    state = model.state_dict()
    losses = []
    for weights in (state, one_rank(8), initial(0)):
        net = network()
        net.load_state_dict(weights)
        losses.append(loss_of(net, np.arange(N)).item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[1] < 0.6 * losses[2]
    for name, array in state.items():
        assert array.dtype == np.float16
        assert_allclose(array, one_rank(8)[name], atol=2e-2)


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


# -- master weights ---------------------------------------------------------------------------------------------------


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


# -- the scale --------------------------------------------------------------------------------------------------------


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


# -- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [None, "fp16"])
@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(4)
def test_gradients_add_up_in_float32(comm: Communicator, zero: int, compress: str | None) -> None:
    model = md.nn.Linear(11, 1, bias=False).half()
    optimizer = with_master_weights(md.optim.SGD(model.parameters(), lr=1.0))
    with md.no_grad():
        model.weight.fill_(0)
    model, optimizer = data_parallel(model, optimizer, comm, zero, compress=compress, algorithm="ring")
    # In float16, 2048 + 1 is 2048.
    x = np.full((1, 11), [2048, 1, 1, 1][comm.rank], np.float16)
    model(Tensor(x)).float().sum().backward()
    optimizer.step()
    assert_array_equal(model.state_dict()["weight"], np.full((1, 11), -2051 / 4, np.float16))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_a_gpu_tells_the_host_one_number_a_step(double: Any) -> None:
    model = half_network().to("cuda")
    optimizer = with_master_weights(md.optim.AdamW(model.parameters(), lr=LR))
    scaler = GradScaler(2.0**10)
    on_cpu = half_network()
    reference = with_master_weights(md.optim.AdamW(on_cpu.parameters(), lr=LR))
    other = GradScaler(2.0**10)
    for _ in range(3):
        for net, opt, scale, device in ((model, optimizer, scaler, "cuda"), (on_cpu, reference, other, "cpu")):
            opt.zero_grad()
            y = net(Tensor(X[:5].astype(np.float16)).to(device)).float()
            scale.scale((y * y).sum()).backward()
            double.reset()
            scale.unscale_(opt)
            assert (double.to_host, double.to_device) == ((1, 0) if device == "cuda" else (0, 0))
            md.optim.clip_grad_norm_(net.parameters(), 0.5)
            scale.step(opt)
            scale.update()
            assert (double.to_host, double.to_device) == ((1, 0) if device == "cuda" else (0, 0))
    for name, array in on_cpu.state_dict().items():
        assert_array_equal(model.state_dict()[name].get(), array)


def test_under_the_simulator_the_agreement_costs_one_number() -> None:
    def program(comm: Communicator) -> int:
        before = comm.record.sent_bytes
        any_rank(comm)(False)
        return comm.record.sent_bytes - before

    assert simulate(program, 2).results == [8, 8]
