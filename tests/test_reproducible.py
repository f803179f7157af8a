"""reproducible=M: the same bits on 1, 2, 3, 4, 8 and other numbers of ranks, with every algorithm."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import once_on_ranks as on_ranks
from test_data_parallel import LABELS, LR, N, X, adam, assert_same_bits, copied, network, pair

import minidist as md
from minidist.collectives import ALGORITHMS
from minidist.comm import Communicator, world
from minidist.data import partition
from minidist.nn import functional as F
from minidist.parallel import assert_replicas_agree, data_parallel
from minidist.parallel.fixed_tree import share

MICRO, BATCH, STEPS = 8, 19, 5  # 19 samples in 8 microbatches, and at the end of an epoch 4, so that some have none


def model_with_dropout() -> md.nn.Module:
    md.manual_seed(1)
    nn = md.nn
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(40), nn.Linear(40, 4))


def trained(comm: Communicator, micro: int = MICRO, **options: Any) -> dict[str, np.ndarray]:
    """The weights after some steps in float32."""
    model = model_with_dropout()
    model, optimizer = data_parallel(
        model, md.optim.Adam(model.parameters(), lr=LR), comm, reproducible=micro, **options
    )
    train(model, optimizer, comm, micro)
    assert_replicas_agree(model, comm)
    return copied(model.state_dict())


def train(model: Any, optimizer: Any, comm: Communicator, micro: int, dtype: Any = np.float32) -> None:
    parts = [
        [batch for epoch in (0, 1) for batch in partition.uniform(N, micro, part, BATCH, 5, epoch)]
        for part in share(micro, comm.size, comm.rank)
    ]
    for batches in zip(*parts, strict=True):
        optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else model.no_sync():
                loss = F.cross_entropy(model(md.tensor(X[batch], dtype=dtype)), md.tensor(LABELS[batch]))
                loss.backward()
        optimizer.step()


@functools.cache
def on_one_rank(micro: int) -> dict[str, np.ndarray]:
    return md.comm.simulate(lambda comm: trained(comm, micro), 1).results[0]


ON_ONE = {micro: on_one_rank(micro) for micro in (MICRO, 11)}  # here, since ranks can't start simulations


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("algorithm", ["auto", *sorted(set(ALGORITHMS["all_reduce"]) - {"mpi", "shared_memory"})])
@on_ranks(1, 2, 3, 4, 5, 8)
def test_the_bits_depend_neither_on_the_ranks_nor_on_the_algorithm(comm: Communicator, algorithm: str) -> None:
    for name, array in trained(comm, algorithm=algorithm).items():
        assert array.tobytes() == ON_ONE[MICRO][name].tobytes(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("micro, zero", [(11, 0), (11, 1), (MICRO, 1)])
@on_ranks(1, 2, 3, 4, 8)
def test_nor_on_what_is_sharded_and_microbatches_need_not_divide(comm: Communicator, micro: int, zero: int) -> None:
    for name, array in trained(comm, micro, zero=zero).items():
        assert array.tobytes() == ON_ONE[micro][name].tobytes(), name


def test_without_it_the_bits_do_depend_on_the_ranks() -> None:
    """Or the tests above would show nothing."""

    def program(comm: Communicator) -> dict[str, np.ndarray]:
        model = network(dtype=np.float32)
        model, optimizer = data_parallel(model, md.optim.Adam(model.parameters(), lr=LR), comm)
        for epoch in (0, 1):
            for batch in partition.uniform(N, comm.size, comm.rank, BATCH, 5, epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(md.tensor(X[batch], dtype=np.float32)), md.tensor(LABELS[batch])).backward()
                optimizer.step()
        return copied(model.state_dict())

    one, three = (md.comm.simulate(program, size).results[0] for size in (1, 3))
    assert any((one[name] != three[name]).any() for name in one)
    for name in one:
        assert_allclose(one[name], three[name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@on_ranks(1, 2, 3, 4)
def test_the_weights_are_those_of_one_rank(comm: Communicator) -> None:
    model, optimizer = pair(comm, 0, reproducible=MICRO)
    train(model, optimizer, comm, MICRO, np.float64)
    expected = adam([batch for epoch in (0, 1) for batch in partition.uniform(N, 1, 0, BATCH, 5, epoch)])
    for name, array in copied(model.state_dict()).items():
        assert_allclose(array, expected[name], rtol=1e-10, atol=1e-10, err_msg=name)


@on_ranks(1, 2, 3)
def test_each_microbatch_must_have_its_backward(comm: Communicator) -> None:
    model, _ = pair(comm, 0, reproducible=6)
    mine = len(share(6, comm.size, comm.rank))

    def backward() -> None:
        F.cross_entropy(model(md.tensor(X[:2])), md.tensor(LABELS[:2])).backward()

    with pytest.raises(RuntimeError, match=rf"reproducible=6: this rank has {mine} .* this was number 1"):
        backward()
    model, _ = pair(comm, 0, reproducible=6)
    for _ in range(mine):
        with model.no_sync():
            backward()
    with pytest.raises(RuntimeError, match=rf"this was number {mine + 1}"), model.no_sync():
        backward()
    model, _ = pair(comm, 0, reproducible=comm.size)
    backward()
    with pytest.raises(RuntimeError, match=r"the finished average .*zero_grad"):
        backward()


def test_what_does_not_go_with_it_is_refused() -> None:
    comm, model = world(), network()
    for options, message in (
        ({"zero": 2}, "zero=2"),
        ({"zero": 3}, "zero=3"),
        ({"compress": "sign"}, "compress='sign'"),
        ({"bucket_bytes": 10}, "bucket_bytes=10"),
        ({"reproducible": 0}, "some would have none"),
    ):
        with pytest.raises(ValueError, match=message):
            data_parallel(model, md.optim.SGD(model.parameters()), comm, **{"reproducible": 8, **options})  # type: ignore[arg-type]


@on_ranks(2, 3)
def test_two_runs_with_the_same_ranks_have_the_same_bits_without_it_too(comm: Communicator) -> None:
    runs = []
    for _ in range(2):
        model, optimizer = pair(comm, 0, dtype=np.float32)
        for batch in partition.uniform(N, comm.size, comm.rank, BATCH, 5, 0):
            optimizer.zero_grad()
            F.cross_entropy(model(md.tensor(X[batch], dtype=np.float32)), md.tensor(LABELS[batch])).backward()
            optimizer.step()
        runs.append(copied(model.state_dict()))
    assert_same_bits(model, runs[0])
