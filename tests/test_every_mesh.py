"""Every mesh equals one rank: a GPT's losses and weights after 10 steps, whatever the axes, schedule and sharding.

The reference is a plain loop on one rank: forward of the whole batch, backward, clip, step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.comm.simulated import alone
from minidist.examples.gpt import GPT, GPTConfig
from minidist.mesh import Mesh
from minidist.nn import functional as F
from minidist.parallel.experts import MixtureOfExperts
from minidist.parallel.tensor import vocab_parallel_cross_entropy
from minidist.parallel.trainer import Trainer

STEPS, BATCH, LENGTH = 10, 6, 16
SHAPE = dict(vocab_size=19, context=LENGTH, layers=3, heads=4, width=16, hidden=24)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary, swiglu": dict(positions="rotary", mlp="swiglu"),
    "experts": dict(experts=3),
    "recomputed": dict(recompute="whole"),
    "dropout": dict(dropout=0.2),
}
SEQUENCE = dict(sequence_parallel=True)


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, SHAPE["vocab_size"], (BATCH - step % 3, LENGTH + 1)) for step in range(STEPS)]


def gpt(mesh: Mesh, kind: str, **options: Any) -> GPT:
    md.manual_seed(3)
    model = GPT(GPTConfig(**SHAPE, **MODELS[kind], **options), mesh).double()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.capacity_factor = None  # whom a full expert turns away depends on who shares its rank
    md.manual_seed(4)
    return model


def adam(parameters: Any) -> md.optim.Optimizer:
    return md.optim.AdamW(parameters, lr=0.01)


@cache
def reference(kind: str, clip: float | None) -> tuple[list[float], dict[str, np.ndarray]]:
    model = gpt(Mesh(alone()), kind)
    optimizer, losses = adam(model.parameters()), []
    for batch in batches():
        optimizer.zero_grad()
        logits = model(md.Tensor(batch[:, :-1]))
        loss = F.cross_entropy(logits.reshape(-1, SHAPE["vocab_size"]), md.Tensor(batch[:, 1:].reshape(-1)))
        extra = [m.auxiliary_loss for m in model.modules() if getattr(m, "auxiliary_loss", None) is not None]
        loss = sum(extra, start=loss)
        loss.backward()
        if clip is not None:
            md.optim.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: array.copy() for name, array in model.state_dict().items()}


def train(comm: Communicator, kind: str, axes: dict[str, int], shape: dict[str, Any], options: dict[str, Any]) -> None:
    """10 steps on the mesh, compared with one rank's."""
    mesh = Mesh(comm, **axes)
    model = gpt(mesh, kind, **shape)
    loss = lambda logits, targets: vocab_parallel_cross_entropy(logits, targets, mesh.tp)  # noqa: E731
    trainer = Trainer(model, adam, mesh, loss, **options)
    shares, losses = mesh.along("dp", "ep"), []
    for batch in batches():
        mine = np.array_split(batch, shares.size)[shares.rank]
        losses.append(trainer.step(mine[:, :-1], mine[:, 1:]))
    expected, weights = reference(kind, options.get("clip"))
    assert_allclose(losses, expected, rtol=1e-10)
    state = trainer.state_dict()
    assert state.keys() == weights.keys()
    for name, array in weights.items():
        assert_allclose(state[name], array, rtol=1e-8, atol=1e-10, err_msg=name)


SIMULATED: list[tuple[str, dict[str, int], dict[str, Any], dict[str, Any]]] = [
    ("plain", dict(dp=3), {}, dict(zero=2, microbatches=2)),
    ("plain", dict(tp=4), {}, dict(clip=0.5)),
    ("plain", dict(tp=4), SEQUENCE, dict(clip=0.5)),
    ("plain", dict(pp=5), {}, dict(schedule="gpipe", microbatches=4)),
    ("plain", dict(pp=3), {}, dict(schedule="zero-bubble", microbatches=5, clip=0.5)),
    ("plain", dict(cp=4), {}, {}),
    ("plain", dict(cp=2, tp=2), dict(context_parallel="ulysses"), {}),
    ("plain", dict(dp=2, pp=2, tp=2), {}, dict(schedule="1f1b", microbatches=3, zero=1, clip=0.5)),
    ("plain", dict(dp=2, pp=2, tp=2), SEQUENCE, dict(schedule="interleaved", chunks=2, microbatches=2, clip=0.5)),
    ("plain", dict(dp=2, pp=2, cp=2), {}, dict(schedule="breadth-first", chunks=2, microbatches=3, zero=2, clip=0.5)),
    ("rotary, swiglu", dict(pp=2, cp=2, tp=2), {}, dict(schedule="naive", microbatches=2)),
    ("rotary, swiglu", dict(dp=2, cp=2, tp=2), {}, dict(zero=1)),
    ("experts", dict(ep=3), {}, dict(clip=0.5)),
    ("experts", dict(dp=2, ep=2, tp=2), {}, dict(zero=1, clip=0.5)),
    ("experts", dict(pp=2, ep=2, cp=2), {}, dict(schedule="gpipe")),
    ("recomputed", dict(dp=2, pp=2, tp=2), {}, dict(schedule="zero-bubble", microbatches=3)),
    ("dropout", dict(tp=4), {}, {}),
    ("dropout", dict(tp=2), SEQUENCE, {}),
]


def named(row: tuple[Any, ...]) -> str:
    kind, axes, shape, options = row
    return " ".join([kind, *(f"{a}{n}" for a, n in axes.items()), *shape, *map(str, options.values())])


@pytest.mark.parametrize("row", SIMULATED, ids=named)
def test_a_simulated_mesh_equals_one_rank(row: tuple[Any, ...]) -> None:
    size = int(np.prod(list(row[1].values())))
    network = Network(sends="rendezvous") if "pp" in row[1] else None  # sends that wait for their receives
    simulate(lambda comm: train(comm, *row), size, network=network)


REAL: dict[int, list[tuple[str, dict[str, int], dict[str, Any], dict[str, Any]]]] = {
    1: [("plain", {}, {}, dict(microbatches=4)), ("experts", {}, {}, dict(clip=0.5))],
    2: [("plain", dict(pp=2), {}, dict(schedule="zero-bubble", microbatches=4))],
    4: [
        ("plain", dict(pp=2, tp=2), {}, dict(microbatches=4)),
        ("plain", dict(dp=2, tp=2), SEQUENCE, dict(zero=1, clip=0.5)),
        ("plain", dict(pp=4), {}, dict(schedule="1f1b", microbatches=6)),
        ("rotary, swiglu", dict(cp=2, dp=2), {}, dict(zero=2)),
        ("experts", dict(ep=2, tp=2), {}, {}),
    ],
}


@on_ranks(1, 2, 4)
def test_a_mesh_equals_one_rank(comm: Communicator) -> None:
    for row in REAL[comm.size]:
        train(comm, *row)
