"""SyncBatchNorm: a model with it gives, on any number of ranks, what one rank gives with the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.comm import Communicator, simulate
from minidist.nn import functional as F
from minidist.parallel import SyncBatchNorm, assert_replicas_agree, convert_sync_batchnorm, data_parallel

N = 11
X = np.random.default_rng(0).standard_normal((N, 2, 3, 4)) * 3 + 1
LABELS = np.random.default_rng(1).integers(0, 3, N)
START = {
    "0.weight": np.random.default_rng(2).standard_normal((4, 2, 2, 2)),
    "0.bias": np.random.default_rng(3).standard_normal(4),
    "1.weight": np.array([1.0, 0.5, -2.0, 3.0]),
    "1.bias": np.array([0.1, -0.2, 0.3, 0.0]),
    "4.weight": np.random.default_rng(4).standard_normal((3, 24)),
    "4.bias": np.zeros(3),
}


def network(dtype: Any = np.float64, **options: Any) -> md.nn.Sequential:
    layers = [
        md.nn.Conv2d(2, 4, 2),
        md.nn.BatchNorm2d(4, **options),
        md.nn.ReLU(),
        md.nn.Flatten(),
        md.nn.Linear(24, 3),
    ]
    model = md.nn.Sequential(*layers).to(dtype)
    model.load_state_dict(START, strict=False)
    return model


def train(model: Any, optimizer: Any, steps: list[np.ndarray], dtype: Any = np.float64) -> None:
    for samples in steps:
        optimizer.zero_grad()
        F.cross_entropy(model(md.tensor(X[samples], dtype=dtype)), md.tensor(LABELS[samples])).backward()
        optimizer.step()


def one_rank(**options: Any) -> dict[str, np.ndarray]:
    """What plain BatchNorm2d gives with the whole batches: its derivative is checked, and compared, elsewhere."""
    model = network(**options)
    train(model, md.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), BATCHES)
    return {name: np.array(array) for name, array in model.state_dict().items()}


BATCHES = [np.arange(N), np.arange(7), np.arange(4, 9), np.arange(3)]  # the last is smaller than some worlds


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
@on_ranks(1, 2, 3, 4, 5)
def test_any_number_of_ranks_gives_the_weights_and_statistics_of_one(
    comm: Communicator, options: dict[str, Any], zero: int
) -> None:
    plain = network(**options)
    model = convert_sync_batchnorm(plain, comm)
    assert model is plain
    assert isinstance(model[1], SyncBatchNorm)
    wrapped, optimizer = data_parallel(model, md.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm, zero)
    train(wrapped, optimizer, [np.array_split(batch, comm.size)[comm.rank] for batch in BATCHES])
    state, expected = model.state_dict(), one_rank(**options)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert_allclose(state[name], array, rtol=1e-10, atol=1e-11, err_msg=name)
    assert_replicas_agree(model, comm)


@on_ranks(3)
def test_the_same_on_a_gpu(comm: Communicator, device: str) -> None:
    model = convert_sync_batchnorm(network().to(device), comm)
    share, alone = np.array_split(X.reshape(N, 4, 3, 2), comm.size)[comm.rank], network()
    x = md.tensor(share, device=device, requires_grad=True)
    whole = md.tensor(X.reshape(N, 4, 3, 2), requires_grad=True)
    ((model[1](x) ** 3).sum() / len(share)).backward()
    ((alone[1](whole) ** 3).sum() / N).backward()
    expected = np.array_split(whole.grad.numpy(), comm.size)[comm.rank] * N / len(share)
    assert_allclose(x.grad.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert_allclose(md.Tensor(model[1].running_var.data).numpy(), alone[1].running_var.numpy(), rtol=1e-12)


@on_ranks(2, 3)
def test_without_it_the_ranks_give_something_else(comm: Communicator) -> None:
    model = network()
    wrapped, optimizer = data_parallel(model, md.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
    train(wrapped, optimizer, [np.array_split(BATCHES[0], comm.size)[comm.rank]])
    plain = network()
    train(plain, md.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), BATCHES[:1])
    assert not np.allclose(model[0].weight.numpy(), plain[0].weight.numpy(), rtol=1e-4)


@on_ranks(1, 2, 3)
def test_in_evaluation_nothing_is_sent_and_the_running_statistics_count(comm: Communicator) -> None:
    layer = SyncBatchNorm(2, comm).double()
    layer.running_mean.data[:], layer.running_var.data[:] = [1, 2], [4, 9]
    layer.eval()
    if comm.rank == 0:  # alone
        y = layer(md.tensor(X)).numpy()
        expected = (X - np.array([1, 2])[:, None, None]) / np.sqrt(np.array([4, 9]) + 1e-5)[:, None, None]
        assert_allclose(y, expected, rtol=1e-12)


@on_ranks(1, 2, 3)
def test_float32_and_large_means_lose_nothing(comm: Communicator) -> None:
    layer = SyncBatchNorm(2, comm)
    x = (X + 1000).astype(np.float32)
    y = layer(md.tensor(np.array_split(x, comm.size)[comm.rank])).numpy()
    whole = np.concatenate([x[:, channel].ravel()[None] for channel in range(2)]).astype(np.float64)
    mean, std = whole.mean(1)[:, None, None], np.sqrt(whole.var(1) + 1e-5)[:, None, None]
    assert y.dtype == np.float32
    assert_allclose(y, np.array_split((x - mean) / std, comm.size)[comm.rank], atol=2e-4)


@on_ranks(1, 2, 3)
def test_one_value_in_all_is_refused_on_all_ranks(comm: Communicator) -> None:
    layer = SyncBatchNorm(2, comm)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(md.tensor(np.zeros((1 if comm.rank == 0 else 0, 2, 1, 1), np.float32)))


def test_every_batch_norm_of_a_model_is_converted_and_keeps_its_names() -> None:
    def program(comm: Communicator) -> None:
        inner = md.nn.Sequential(md.nn.BatchNorm2d(3), md.nn.ReLU())
        model = md.nn.Sequential(md.nn.BatchNorm2d(2), inner, inner)
        names = list(model.state_dict())
        parameters = list(model.parameters())
        model = convert_sync_batchnorm(model, comm)
        assert [type(module).__name__ for module in model.modules()].count("SyncBatchNorm") == 2
        assert list(model.state_dict()) == names
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert isinstance(convert_sync_batchnorm(md.nn.BatchNorm2d(2), comm), SyncBatchNorm)

    simulate(program, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_step_costs_what_the_docstring_says(size: int) -> None:
    def program(comm: Communicator, backward: bool) -> None:
        x = md.tensor(X[:2], requires_grad=True)
        y = SyncBatchNorm(2, comm).double()(x)
        if backward:
            y.sum().backward()

    forward, both = (simulate(program, size, backward) for backward in (False, True))
    assert forward.bytes == size * (size - 1) * (2 * 2 + 1) * 8
    assert both.bytes > forward.bytes or size == 1
