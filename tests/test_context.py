"""Context parallelism: attention over parts of sequences is that of one rank over the whole, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate, world
from minidist.parallel import context
from minidist.parallel.context import (
    block,
    ring_attention,
    ulysses_attention,
    zigzag_join,
    zigzag_positions,
    zigzag_take,
)
from minidist.tensor import Tensor

BATCH, HEADS, E, V = 2, 24, 3, 2  # 24 heads divide by 1, 2, 3, 4 and 8 ranks
Attention = Callable[..., Tensor]
both_ways = pytest.mark.parametrize("attention", [ring_attention, ulysses_attention])


def sequences(length: int, heads: int = HEADS, spread: float = 1.0) -> list[np.ndarray]:
    """q, k, v and the gradient of the result, of whole sequences."""
    rng = np.random.default_rng(length)
    return [rng.normal(size=(BATCH, heads, length, width)) * spread for width in (E, E, V, V)]


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray, causal: bool, scale: float
) -> list[np.ndarray]:
    """y, dq, dk and dv of attention over whole sequences."""
    scores = scale * np.einsum("bhle,bhse->bhls", q, k)
    if causal:
        scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bhlv,bhsv->bhls", dy, v)
    ds = scale * p * (dp - (dp * p).sum(-1, keepdims=True))
    return [
        np.einsum("bhls,bhsv->bhlv", p, v),
        np.einsum("bhls,bhse->bhle", ds, k),
        np.einsum("bhls,bhle->bhse", ds, q),
        np.einsum("bhls,bhlv->bhsv", p, dy),
    ]


def check(
    comm: Communicator, attention: Attention, length: int, causal: bool, spread: float = 1.0, device: str = "cpu"
) -> None:
    whole = sequences(length, spread=spread)
    mine = zigzag_positions(length, comm.size, comm.rank)
    q, k, v = (md.tensor(x[:, :, mine], device=device, requires_grad=True) for x in whole[:3])
    before = [x.numpy().copy() for x in (q, k, v)]
    y = attention(q, k, v, comm, causal=causal, scale=0.7, length=length)
    y.backward(md.tensor(whole[3][:, :, mine], device=device))
    assert y.device.startswith(device)
    got = [y.numpy(), *(x.grad.numpy() for x in (q, k, v))]
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, reference(*whole, causal, 0.7), strict=True):
        assert_allclose(a, b[:, :, mine], rtol=1e-10, atol=1e-10 * np.abs(b).max(), err_msg=name)
    for x, array in zip((q, k, v), before, strict=True):
        assert_array_equal(x.numpy(), array)


@on_ranks(1, 2, 3, 4, 8)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [5, 29])  # neither divides; of 5 some of 8 ranks have none
@both_ways
def test_values_and_gradients_are_those_of_one_rank(
    comm: Communicator, attention: Attention, length: int, causal: bool
) -> None:
    check(comm, attention, length, causal)


@on_ranks(3)
def test_scores_too_large_for_exp(comm: Communicator) -> None:
    check(comm, ring_attention, 11, True, spread=40.0)


@both_ways
def test_sends_that_wait_for_their_receives(attention: Attention) -> None:
    for size in (2, 3, 4):
        simulate(check, size, attention, 13, True, network=Network(sends="rendezvous"))


@both_ways
def test_on_a_gpu(attention: Attention, device: str) -> None:
    simulate(check, 2, attention, 13, True, 1.0, device)


@on_ranks(2, 4)
@both_ways
def test_the_scale_and_the_length_need_not_be_given(comm: Communicator, attention: Attention) -> None:
    whole = sequences(8)
    q, k, v = (Tensor(zigzag_take(x, comm, 2)) for x in whole[:3])
    y = attention(q, k, v, comm)
    assert not y.requires_grad
    assert_allclose(zigzag_join(y.numpy(), comm, 2), reference(*whole, True, 3**-0.5)[0], rtol=1e-10)


@on_ranks(1)
@both_ways
def test_one_rank_does_what_the_plain_op_does(comm: Communicator, attention: Attention) -> None:
    q, k, v = (Tensor(x.astype(np.float32)) for x in sequences(6)[:3])
    plain = md.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_array_equal(attention(q, k, v, comm).numpy(), plain.numpy())


@on_ranks(2)
def test_half_precision_in_and_out(comm: Communicator) -> None:
    whole = [x.astype(np.float16) for x in sequences(64)]
    q, k, v, dy = (Tensor(zigzag_take(x, comm, 2), requires_grad=True) for x in whole)
    y = ring_attention(q, k, v, comm)
    y.backward(dy)
    expected = reference(*(x.astype(float) for x in whole), True, 3**-0.5)
    for got, b in zip((y, q.grad, k.grad, v.grad), expected, strict=True):
        assert got.dtype == np.float16
        assert np.abs(got.numpy() - zigzag_take(b, comm, 2)).max() < 2e-3 * np.abs(b).max()


# -- what it costs -----------------------------------------------------------------------------------------------------


def passes(comm: Communicator, attention: Attention, backward: bool) -> None:
    q, k, v, dy = (Tensor(zigzag_take(x, comm, 2), requires_grad=True) for x in sequences(48))
    y = attention(q, k, v, comm)
    if backward:
        y.backward(dy)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_messages_and_bytes_are_as_the_docstrings_say(size: int) -> None:
    time = BATCH * HEADS * 48 // size * 8  # bytes of all numbers that a rank has one of for each time and head
    expected = {
        ring_attention: ((size - 1), (size - 1) * time * (E + V)),
        ulysses_attention: (4 * (size - 1), (size - 1) * time * 2 * (E + V) // size),
    }
    for attention, (messages, nbytes) in expected.items():
        forward, whole = (simulate(passes, size, attention, backward) for backward in (False, True))
        assert forward.messages_by_rank == [messages] * size
        assert forward.bytes_by_rank == [nbytes] * size
        more = 2 if attention is ring_attention else 1
        assert whole.messages_by_rank == [(1 + more) * messages] * size
        assert whole.bytes_by_rank == [(1 + more) * nbytes] * size


@pytest.mark.parametrize("size", [2, 4])
def test_messages_travel_while_blocks_are_computed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = context._scores

    def one_second(*args: object) -> np.ndarray:
        world().elapse(1.0)
        return scores(*args)

    monkeypatch.setattr(context, "_scores", one_second)
    network = Network(alpha=1.0, ports="many")  # as long as a block takes
    for backward, seconds in ((False, size), (True, size + size + 1)):  # the last gradients' way home is not hidden
        assert simulate(passes, size, ring_attention, backward, network=network).seconds == seconds


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [5, 16, 29, 48])
def test_blocks_are_the_lower_triangle_and_as_large_on_every_rank(size: int, length: int) -> None:
    met = np.zeros((length, length), int)
    positions = [zigzag_positions(length, size, rank) for rank in range(size)]
    for step in range(size):
        work = []
        for rank in range(size):
            source = (rank - step) % size
            queries, keys, masked = block(length, size, rank, source, True)
            q, k = positions[rank][queries], positions[source][keys]
            met[np.ix_(q, k)] += np.tri(len(q), len(k), dtype=int) if masked else 1
            work.append(len(q) * len(k))
        if length % (2 * size) == 0:  # in each step two of four pairs of chunks; in step 0 all, masked
            chunk = length // (2 * size)
            assert work == [(4 if step == 0 else 2) * chunk**2] * size
    assert_array_equal(met, np.tri(length, dtype=int))


# -- who has which times -----------------------------------------------------------------------------------------------


def test_positions() -> None:
    assert [zigzag_positions(8, 2, rank).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [zigzag_positions(7, 3, rank).tolist() for rank in (0, 1, 2)] == [[0, 1, 6], [2, 5], [3, 4]]
    assert zigzag_positions(5, 1, 0).tolist() == [0, 1, 2, 3, 4]
    assert [len(zigzag_positions(1, 2, rank)) for rank in (0, 1)] == [1, 0]


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("shape, dim", [((3, 29), 1), ((8, 2, 3), 0), ((2, 3, 3), -1)])
def test_take_and_join(comm: Communicator, shape: tuple[int, ...], dim: int) -> None:
    rng = np.random.default_rng(4)
    array, length = rng.normal(size=shape), shape[dim]
    mine = zigzag_positions(length, comm.size, comm.rank)
    tokens = (array * 100).astype(np.int64)
    assert_array_equal(zigzag_take(tokens, comm, dim), tokens.take(mine, axis=dim))
    assert_array_equal(zigzag_join(zigzag_take(tokens, comm, dim), comm, dim, length), tokens)
    x = Tensor(array, requires_grad=True)
    part = zigzag_take(x, comm, dim)
    assert_array_equal(part.numpy(), array.take(mine, axis=dim))
    joined = zigzag_join(part, comm, dim, length)
    assert_array_equal(joined.numpy(), array)
    assert joined.data.flags.c_contiguous
    dy = rng.normal(size=shape)
    joined.backward(Tensor(dy))
    here = np.isin(np.arange(length), mine).reshape([-1 if i == dim % len(shape) else 1 for i in range(len(shape))])
    assert x.grad is not None
    assert_array_equal(x.grad.numpy(), np.where(here, dy, 0))


@on_ranks(2)
def test_bad_arguments_are_refused(comm: Communicator) -> None:
    x = Tensor(np.zeros((1, 3, 4, 2)))
    for attention in (ring_attention, ulysses_attention):
        even = Tensor(np.zeros((1, 2, 4, 2)))
        with pytest.raises(ValueError, match=r"q \(1, 2, 4, 2\), k \(1, 2, 4, 2\), v \(1, 3, 4, 2\)"):
            attention(even, even, x, comm)
        with pytest.raises(ValueError, match=rf"rank {comm.rank} has 4 times, not 5 of 10 over 2 ranks"):
            attention(even, even, even, comm, length=10)
        with pytest.raises(TypeError, match="float64, float64, float32"):
            attention(even, even, even.float(), comm)
    with pytest.raises(ValueError, match="3 heads do not divide by 2 ranks"):
        ulysses_attention(x, x, x, comm)
    with pytest.raises(ValueError, match="rank 2, but the ranks are 0 to 1"):
        zigzag_positions(4, 2, 2)
    with pytest.raises(ValueError, match="zigzag_join: rank"):
        zigzag_join(x, comm, 2, 11)
