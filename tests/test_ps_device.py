"""The parameter server with models on a GPU (or its stand-in): the same numbers as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks

import minidist as md
from minidist import backend
from minidist.nn import functional as F
from minidist.optim import SGD, Adam

TOKENS = np.random.default_rng(5).integers(0, 40, (24, 3))
LABELS = TOKENS.sum(1) % 4


def make() -> md.nn.Sequential:
    md.manual_seed(3)
    return md.nn.Sequential(md.nn.Embedding(40, 60), md.nn.Flatten(), md.nn.Linear(180, 4)).to("cpu", "float64")


def train(model, optimizer, shares, device, step, zero_grad):
    """Steps over (start, size) of the samples, in their order."""
    for start, size in shares:
        if size:
            zero_grad()
            tokens, labels = (md.tensor(array[start : start + size]).to(device) for array in (TOKENS, LABELS))
            F.cross_entropy(model(tokens), labels).backward()
        step()


def one_rank(kind) -> dict[str, np.ndarray]:
    model = make()
    optimizer = kind(model.parameters(), lr=0.02)
    train(model, optimizer, [(0, 9), (9, 9), (18, 6)] * 2, "cpu", optimizer.step, optimizer.zero_grad)
    return model.state_dict()


@on_ranks(2, 4)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_workers_on_a_gpu_train_as_one_rank_on_the_cpu(comm, device, kind, sparse):
    model = make().to(device)
    optimizer = kind(model.parameters(), lr=0.02)
    ps = md.parallel.ParameterServer(model, optimizer, comm, samples=24, batch_size=9, sparse=sparse)
    if ps.serves:
        ps.serve()
        for name, value in one_rank(kind).items():
            got = backend.to_numpy(model.state_dict()[name])
            np.testing.assert_allclose(got, value, rtol=1e-10, atol=1e-14, err_msg=name)
        return
    for epoch in range(2):
        train(model, optimizer, ps.shares(epoch), device, ps.step, ps.zero_grad)
        ps.meet()
    ps.leave()
