"""Communication that gradients come back through: what comes out, and derivatives checked across ranks.

The loss of a check is that of all ranks together, Σ_r <dy_r, y_r>; or <dy, y>, once, where the result is the same on
all. Its differences are taken by moving an element on one rank, or on all, where all have the same; every rank runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.parallel.functions import (
    all_gather_from,
    all_to_all,
    copy_to,
    gather_from,
    recv_from,
    reduce_from,
    reduce_scatter_to,
    scatter_to,
    send_to,
)
from minidist.tensor import Tensor

Operation = Callable[[Tensor, Communicator], Tensor]
N = 7  # divides by none of the numbers of ranks


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def part(whole: np.ndarray, comm: Communicator, dim: int) -> np.ndarray:
    return np.array_split(whole, comm.size, axis=dim)[comm.rank]


# name: (operation, input of rank r of P, is the input the same on all, is the result)
SHARED = lambda comm: numbers(9, 3, N, 2)  # noqa: E731
OWN = lambda comm: numbers(comm.rank, 3, N, 2)  # noqa: E731
CHUNK = lambda comm: part(numbers(9, 3, N, 2), comm, 1)  # noqa: E731
EVEN = lambda comm: numbers(comm.rank, 2 * comm.size, 3, N)  # noqa: E731
TABLE: dict[str, tuple[Operation, Callable[[Communicator], np.ndarray], bool, bool]] = {
    "copy_to": (copy_to, SHARED, True, False),
    "reduce_from": (reduce_from, OWN, False, True),
    "scatter_to": (lambda x, comm: scatter_to(x, comm, 1), SHARED, True, False),
    "gather_from": (lambda x, comm: gather_from(x, comm, -2, N), CHUNK, False, True),
    "all_gather_from": (lambda x, comm: all_gather_from(x, comm, 1, N), CHUNK, False, False),
    "reduce_scatter_to": (lambda x, comm: reduce_scatter_to(x, comm, 1), OWN, False, False),
    "all_to_all, same dim": (lambda x, comm: all_to_all(x, comm, 0, 0), EVEN, False, False),
    "all_to_all, other dim": (lambda x, comm: all_to_all(x, comm, 2, 1), EVEN, False, False),
}


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("name", TABLE)
def test_the_derivative_across_ranks(comm: Communicator, name: str) -> None:
    operation, make, same_input, same_result = TABLE[name]
    array = make(comm)
    before = array.copy()
    x = Tensor(array, requires_grad=True)
    y = operation(x, comm)
    dy = numbers(99 if same_result else 100 + comm.rank, *y.shape)
    (y * Tensor(dy)).sum().backward()
    assert_array_equal(array, before)
    assert x.grad is not None and x.grad.shape == x.shape and y.data.flags.c_contiguous

    def loss(moved: np.ndarray) -> float:
        with md.no_grad():
            here = float((operation(Tensor(moved), comm).numpy() * dy).sum())
        total = np.array([here if comm.rank == 0 or not same_result else 0.0])
        return float(md.collectives.all_reduce(comm, total)[0])

    shapes = [array.shape] if same_input else [np.empty(0)] * comm.size
    for owner in range(len(shapes)):
        mine = same_input or owner == comm.rank
        for place in (0, 5, 11):  # the operations are linear: any places show it
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                if mine:
                    moved.reshape(-1)[place % array.size] += sign
                ends.append(loss(moved))
            if mine:
                assert_allclose(x.grad.numpy().reshape(-1)[place % array.size], (ends[0] - ends[1]) / 2, rtol=1e-10)


@on_ranks(1, 2, 3, 4)
def test_what_comes_out(comm: Communicator) -> None:
    whole = numbers(9, 3, N, 2)
    own = Tensor(numbers(comm.rank, 3, N, 2))
    total = sum(numbers(rank, 3, N, 2) for rank in range(comm.size))
    chunk = Tensor(part(whole, comm, 1).copy())
    assert_array_equal(copy_to(own, comm).numpy(), own.numpy())
    assert_allclose(reduce_from(own, comm).numpy(), total, rtol=1e-12)
    assert_array_equal(scatter_to(Tensor(whole), comm, 1).numpy(), chunk.numpy())
    assert_array_equal(gather_from(chunk, comm, 1, N).numpy(), whole)
    assert_array_equal(all_gather_from(chunk, comm, 1, N).numpy(), whole)
    assert_allclose(reduce_scatter_to(own, comm, 1).numpy(), part(total, comm, 1), rtol=1e-12)


@on_ranks(1, 2, 3, 4)
def test_everyone_deals_to_everyone(comm: Communicator) -> None:
    # By heads and by time, say: rank r has time r of all heads, and then all times of head r.
    whole = numbers(3, comm.size * 2, N, 4)
    mine = Tensor(np.array_split(whole, comm.size)[comm.rank].copy())
    got = all_to_all(mine, comm, split_dim=1, concat_dim=0)
    assert_array_equal(got.numpy(), part(whole, comm, 1))
    back = all_to_all(
        got, comm, split_dim=0, concat_dim=1, out_lengths=[len(c) for c in np.array_split(range(N), comm.size)]
    )
    assert_array_equal(back.numpy(), mine.numpy())


@on_ranks(1, 2, 3, 4)
def test_rows_in_any_numbers(comm: Communicator) -> None:
    sends = [[(i + 2 * j + 1) % 4 for j in range(comm.size)] for i in range(comm.size)]  # from i to j; some are 0
    rows = np.array([[i, j] for i in range(comm.size) for j in range(comm.size) for _ in range(sends[i][j])], float)
    here = rows[rows[:, 0] == comm.rank]
    x = Tensor(here.copy(), requires_grad=True)
    came = [sends[i][comm.rank] for i in range(comm.size)]
    y = all_to_all(x, comm, 0, 0, lengths=sends[comm.rank], out_lengths=came)
    assert_array_equal(y.numpy(), rows[rows[:, 1] == comm.rank])
    y.backward(y)  # each row's gradient is the row
    assert x.grad is not None
    assert_array_equal(x.grad.numpy(), here)


@on_ranks(2, 3, 4)
def test_around_a_ring_both_send_first(comm: Communicator) -> None:
    """Each rank's x goes to the right, is squared there, and its gradient comes back."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = Tensor(numbers(comm.rank, 3), requires_grad=True)
    sent = send_to(x, comm, right)
    got = recv_from(comm, left, (3,), np.float64, after=sent)
    assert_array_equal(got.numpy(), numbers(left, 3))
    ((got * got).sum() + sent).backward()
    assert x.grad is not None
    assert_allclose(x.grad.numpy(), 2 * x.numpy(), rtol=1e-12)


def test_around_a_ring_where_sends_wait_for_receives() -> None:
    simulate(lambda comm: test_around_a_ring_both_send_first.__wrapped__(comm), 3, network=Network(sends="rendezvous"))


@on_ranks(2)
def test_a_chain_over_ranks(comm: Communicator) -> None:
    """Rank 0 computes, rank 1 goes on; without gradients too."""
    w = Tensor(numbers(comm.rank, 4), requires_grad=True)
    for grad in (True, False):
        with md.enable_grad() if grad else md.no_grad():
            if comm.rank == 0:
                loss = send_to(w * 3, comm, 1, tag=2)
            else:
                loss = (recv_from(comm, 0, (4,), np.float64, tag=2) * w).sum()
        if grad:
            loss.backward()
    assert w.grad is not None
    other = numbers(1 - comm.rank, 4)
    assert_allclose(w.grad.numpy(), 3 * other, rtol=1e-12)


@on_ranks(2)
def test_bad_arguments_are_refused(comm: Communicator) -> None:
    x = Tensor(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="chunk is 4 long, not 5 of 10 over 2 ranks"):
        gather_from(x, comm, 0, 10)
    with pytest.raises(IndexError, match="dim 2 is out of range"):
        scatter_to(x, comm, 2)
    with pytest.raises(ValueError, match=r"lengths \[1, 2\] for 2 ranks and a dim of 4"):
        all_to_all(x, comm, 0, 1, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"out_lengths \[1, 1\], but this rank"):
        all_to_all(x, comm, 0, 1, out_lengths=[1, 1])
