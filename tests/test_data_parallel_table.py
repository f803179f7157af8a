"""Every combination of data parallelism's options gives the weights of one rank, which NumPy alone works out.

{partition} x {bucket size} x {accumulation} x {zero stage} x {algorithm} x {ranks}, float64, 1e-10
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import once_on_ranks as on_ranks
from test_data_parallel import LABELS, LR, N, adam, loss_of, network

import minidist as md
from minidist.collectives import ALGORITHMS
from minidist.comm import Communicator
from minidist.data import partition
from minidist.parallel import assert_replicas_agree, data_parallel

BATCH, EPOCHS, HOSTS = 9, 1, 2  # 3 batches an epoch, the last of 5 samples: some shares and microbatches are empty
BUCKETS = {"one": 1 << 30, "some": 200, "each": 1}  # bytes; weights have 240 and 160
SHARDED = sorted({name for name in ALGORITHMS["reduce_scatter"] if name in ALGORITHMS["all_gather"]} - {"mpi"})
WHOLE = sorted(set(ALGORITHMS["all_reduce"]) - {"mpi", "shared_memory"})  # those need mpirun
STRATEGIES = [
    (zero, name, bucket)
    for zero in range(4)
    for name in ("auto", *(SHARDED if zero else WHOLE))
    for bucket in (BUCKETS if zero < 3 else ("a layer",))
]


@functools.cache
def shares(name: str, size: int) -> list[list[np.ndarray]]:
    """Of each rank, its samples in each step."""
    how = partition.named(name, LABELS, hosts=[rank * HOSTS // size for rank in range(size)])
    return [[share for epoch in range(EPOCHS) for share in how(N, size, rank, BATCH, 3, epoch)] for rank in range(size)]


@functools.cache
def one_rank(name: str, size: int) -> dict[str, np.ndarray]:
    """After Adam's steps with each step's samples of all ranks together."""
    return adam([np.concatenate(parts) for parts in zip(*shares(name, size), strict=True)])


@pytest.mark.parametrize("zero, algorithm, bucket", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 3])
@on_ranks(1, 2, 3, 4, 5, seeds=1)
def test_every_combination_gives_the_weights_of_one_rank(
    comm: Communicator, accumulate: int, zero: int, algorithm: str, bucket: str
) -> None:
    for name in partition.NAMES:
        model = network()
        optimizer = md.optim.Adam(model.parameters(), lr=LR)
        model, optimizer = data_parallel(model, optimizer, comm, zero, algorithm, bucket_bytes=BUCKETS.get(bucket))
        for mine in shares(name, comm.size)[comm.rank]:
            optimizer.zero_grad()
            for number, part in enumerate(pieces := np.array_split(mine, accumulate), start=1):
                with nullcontext() if number == len(pieces) else model.no_sync():
                    weight = len(part) / len(mine) if len(mine) else 0
                    (loss_of(model, part) * weight).backward() if len(part) else empty(model)
            optimizer.step()
        assert_replicas_agree(model, comm)
        for key, array in model.state_dict().items():
            assert_allclose(array, one_rank(name, comm.size)[key], rtol=1e-10, atol=1e-10, err_msg=f"{name} {key}")


def empty(model: md.nn.Module) -> None:
    """A backward with no samples: the mean over none would be nan, and stay so in the sum."""
    (model(md.tensor(np.zeros((0, 6)))).sum() * 0).backward()
