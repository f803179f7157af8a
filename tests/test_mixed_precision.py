"""Half precision: master weights, loss scaling that all ranks agree on, and sums that it is too short for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks
from test_data_parallel import LABELS, LR, N, X, batches, initial, loss_of, network, one_rank, share
from test_trainer import BATCHES
from test_trainer import model as mesh_model
from test_trainer import reference as mesh_reference
from test_trainer import share as mesh_share

import minidist as md
from minidist.comm import Communicator
from minidist.mesh import Mesh
from minidist.nn import functional as F
from minidist.optim import GradScaler, with_master_weights
from minidist.parallel import assert_replicas_agree, data_parallel
from minidist.parallel.overflow import any_rank
from minidist.parallel.trainer import Trainer
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


@pytest.mark.parametrize("recomputed", ["none", "core", "all"])
def test_attention_and_its_kin_train_in_half_precision_as_in_single(recomputed: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 11, (3, 6))

    def losses(half: bool) -> list[float]:
        md.manual_seed(0)
        attention = md.nn.MultiHeadAttention(8, 2, 0.1, batch_first=True).recompute_(recomputed)
        embed, norm, mlp = md.nn.Embedding(11, 8), md.nn.LayerNorm(8), md.nn.Linear(8, 11)
        model = md.nn.Sequential(embed, norm, attention, md.nn.GELU(), md.nn.Dropout(0.1), mlp)
        optimizer: Any = md.optim.AdamW((model.half() if half else model).parameters(), lr=0.01)
        scaler = GradScaler(enabled=half)
        if half:
            with_master_weights(optimizer)
        found = []
        for _ in range(8):
            optimizer.zero_grad()
            h = norm(embed(md.tensor(tokens)))
            h = h + attention(h, h, h, need_weights=False, is_causal=True)[0]
            logits = mlp(model[4](model[3](h)))
            assert logits.dtype == (np.float16 if half else np.float32)
            loss = F.cross_entropy(logits.float().reshape(-1, 11), md.tensor(np.roll(tokens, 1, 1).reshape(-1)))
            scaler.scale(loss).backward()
            assert all(p.grad.dtype == p.dtype == logits.dtype for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        return found

    single = losses(False)
    assert_allclose(losses(True), single, rtol=2e-3)
    assert single[-1] < 0.9 * single[0]


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


# -- on a mesh ---------------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 4)
def test_a_mesh_trains_in_half_precision(comm: Communicator) -> None:
    pipelined: Any = dict(schedule="zero-bubble", microbatches=2)
    cases: dict[int, list[tuple[dict[str, int], Any]]] = {
        1: [({}, {})],
        2: [(dict(dp=2), dict(zero=1)), (dict(pp=2), pipelined)],
        4: [(dict(dp=2, pp=2), dict(zero=2, **pipelined))],
    }

    def masters(parameters: Any) -> Any:
        return with_master_weights(md.optim.AdamW(parameters, lr=0.05))

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.float(), target)

    for axes, options in cases[comm.size]:
        mesh, scaler = Mesh(comm, **axes), GradScaler(2.0**40)
        trainer = Trainer(mesh_model().half(), masters, mesh, loss, clip=0.1, scaler=scaler, **options)
        before = {name: array.copy() for name, array in trainer.state_dict().items()}
        batches = [(x.astype(np.float16), labels) for x, labels in BATCHES]
        # A scale that is too large: all skip the step.
        assert np.isfinite(trainer.step(*mesh_share(mesh, *batches[0])))
        assert scaler.get_scale() == 2.0**39
        assert all(np.array_equal(array, before[name]) for name, array in trainer.state_dict().items())
        scaler.update(2.0**10)
        losses, weights = mesh_reference(0.1)
        assert_allclose([trainer.step(*mesh_share(mesh, *batch)) for batch in batches], losses, rtol=5e-3)
        for name, array in trainer.state_dict().items():
            assert array.dtype == np.float16
            assert_allclose(array, weights[name], atol=2e-2)
