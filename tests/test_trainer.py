"""Training on a mesh: whatever the axes, the weights of one rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import on_ranks

import minidist as md
from minidist.comm import Communicator
from minidist.mesh import Mesh
from minidist.nn import Linear, Pop, ReLU, Sequential, Stash, Tanh
from minidist.nn import functional as F
from minidist.parallel.trainer import Trainer
from minidist.tensor import Tensor

RNG = np.random.default_rng(5)
STEPS = 4
BATCHES = [(RNG.normal(size=(n, 6)), RNG.integers(0, 4, n)) for n in (13, 13, 12, 5)]


def model() -> Sequential:
    md.manual_seed(1)
    layers = [Linear(6, 9), Tanh(), Stash("early"), Linear(9, 7), ReLU(), Linear(7, 9), Pop("early"), Linear(9, 4)]
    return Sequential(*layers).double()


def adam(parameters: Any) -> md.optim.Optimizer:
    return md.optim.AdamW(parameters, lr=0.05)


@cache
def reference(clip: float | None) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and final weights of one rank, by a plain loop."""
    whole = model()
    optimizer, losses = adam(whole.parameters()), []
    for x, labels in BATCHES:
        optimizer.zero_grad()
        loss = F.cross_entropy(whole(Tensor(x)), Tensor(labels))
        loss.backward()
        if clip:
            md.optim.clip_grad_norm_(whole.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: array.copy() for name, array in whole.state_dict().items()}


def share(mesh: Mesh, *arrays: np.ndarray) -> list[np.ndarray]:
    """This rank's part of a global batch."""
    ranks = mesh.along("dp", "ep")
    return [np.array_split(array, ranks.size)[ranks.rank] for array in arrays]


CASES = {
    1: [({}, {})],
    2: [(dict(dp=2), {}), (dict(pp=2), dict(schedule="zero-bubble", microbatches=3))],
    3: [(dict(pp=3), dict(schedule="gpipe", microbatches=2)), (dict(dp=3), dict(zero=1))],
    4: [
        (dict(dp=2, pp=2), dict(zero=zero, microbatches=4, clip=clip)) for zero in (0, 1, 2) for clip in (None, 0.1)
    ]
    + [
        (dict(pp=4), dict(schedule="breadth-first", chunks=2, microbatches=3, clip=0.1)),
        (dict(dp=4), dict(algorithm="tree", microbatches=2)),
        (dict(dp=2, pp=2), dict(schedule="interleaved", chunks=2, microbatches=2)),
    ],
    6: [(dict(dp=2, pp=3), dict(zero=1, clip=0.1, microbatches=3))],
}


@on_ranks(1, 2, 3, 4, 6)
def test_the_weights_of_one_rank(comm: Communicator) -> None:
    for axes, options in CASES[comm.size]:
        mesh = Mesh(comm, **axes)
        trainer = Trainer(model(), adam, mesh, F.cross_entropy, **options)
        losses, weights = reference(options.get("clip"))
        got = [trainer.step(*share(mesh, *batch)) for batch in BATCHES]
        assert_allclose(got, losses, rtol=1e-10, err_msg=f"{axes} {options}")
        state = trainer.state_dict()
        assert state.keys() == weights.keys()
        for name, array in state.items():
            assert_allclose(array, weights[name], rtol=1e-10, atol=1e-13, err_msg=f"{axes} {options} {name}")


@on_ranks(2, 4)
def test_evaluation_and_state_from_another_mesh(comm: Communicator) -> None:
    _, weights = reference(None)
    mesh = Mesh(comm, dp=comm.size // 2, pp=2)
    trainer = Trainer(model(), adam, mesh, F.cross_entropy)
    trainer.load_state_dict(weights)
    whole = model()
    whole.load_state_dict(weights)
    x, labels = BATCHES[0]
    expected = F.cross_entropy(whole(Tensor(x)), Tensor(labels)).item()
    assert_allclose(trainer.evaluate(*share(mesh, x, labels)), expected, rtol=1e-12)
    with pytest.raises(KeyError, match=r"missing \['7.bias'\], unexpected \['8.bias'\]"):
        trainer.load_state_dict({name.replace("7.bias", "8.bias"): array for name, array in weights.items()})


@on_ranks(2)
def test_bad_options_are_refused(comm: Communicator) -> None:
    mesh = Mesh(comm, dp=2)
    with pytest.raises(ValueError, match="zero=3: on a mesh, choose 0"):
        Trainer(model(), adam, mesh, F.cross_entropy, zero=3)
    with pytest.raises(ValueError, match="algorithm 'best'"):
        Trainer(model(), adam, mesh, F.cross_entropy, algorithm="best")
