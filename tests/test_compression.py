"""Gradients in fewer bytes: each compression against its published rule, written down here for all ranks at once."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.nn import functional as F
from minidist.nn.flat import FlatBuffer
from minidist.parallel import assert_replicas_agree, data_parallel
from minidist.parallel.compression import COMPRESSIONS, compression_of

SHAPES = [(6, 5), (6,), (3, 4, 2), (2, 2), ()]  # of the parameters: matrices, vectors, more dims, a small one, a number
SIZES = [int(np.prod(shape)) for shape in SHAPES]
BOUNDS = [(sum(SIZES[:i]), sum(SIZES[: i + 1])) for i in range(len(SIZES))]
N = sum(SIZES)
EXAMPLES = ["fp16", "bf16", "topk:0.1", "randomk:0.2", "sign", "powersgd:2"]
every_one = pytest.mark.parametrize("name", EXAMPLES)


def flat(dtype: Any = np.float64) -> FlatBuffer:
    return FlatBuffer([md.nn.Parameter(md.tensor(np.zeros(shape, dtype))) for shape in SHAPES])


def gradient(rank: int, step: int) -> np.ndarray:
    """Numbers of very different sizes, no two alike."""
    rng = np.random.default_rng((rank, step))
    return rng.standard_normal(N) * 10.0 ** rng.integers(-3, 2, N)


def results(comm: Communicator, name: str, steps: int, dtype: Any = np.float64) -> tuple[list[np.ndarray], Any]:
    """What add_up gives in each step, and the compression."""
    compression = compression_of(name)(comm, flat(dtype))
    sums = []
    for step in range(steps):
        own = gradient(comm.rank, step).astype(dtype)
        compression.add_up(own)
        sums.append(own)
    return sums, compression


def sizes(*ranks: int) -> Any:
    return on_ranks(*(ranks or (1, 2, 3, 4, 5)))


# -- what all of them promise -----------------------------------------------------------------------------------------


def test_every_one_is_tested_here() -> None:
    assert {name.partition(":")[0] for name in EXAMPLES} == set(COMPRESSIONS)


@every_one
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@sizes()
def test_all_ranks_get_the_same_bits(comm: Communicator, name: str, dtype: str) -> None:
    sums, _ = results(comm, name, 3, dtype)
    for own in sums:
        assert own.dtype == dtype
        everyones = md.collectives.all_gather(comm, np.broadcast_to(own, (comm.size, N)).copy())
        for other in everyones:
            assert_array_equal(other, own)


@every_one
@sizes()
def test_what_was_not_sent_is_remembered_to_the_last(comm: Communicator, name: str) -> None:
    """Error feedback: what came out so far, and all that is in the memories, is the sum of all gradients."""
    sums, compression = results(comm, name, 5)
    memory = getattr(compression, "error", None)
    left = np.zeros(N) if memory is None else md.collectives.all_reduce(comm, memory.copy())
    total = sum(gradient(rank, step) for rank in range(comm.size) for step in range(5))
    tolerance = {"fp16": 2e-3, "bf16": 2e-2}.get(name, 1e-12)
    scale = sum(np.abs(gradient(rank, step)) for rank in range(comm.size) for step in range(5))
    assert (np.abs(sum(sums) + left - total) <= tolerance * scale + (memory is None) * 1e-10).all()


@every_one
@on_ranks(1, 2, 3, 4, seeds=1)
def test_training_reaches_what_whole_gradients_reach(comm: Communicator, name: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = (rng.standard_normal((3, 8))[labels] * 2 + rng.standard_normal((60, 8))).astype(np.float32)
    md.manual_seed(0)
    model = md.nn.Sequential(md.nn.Linear(8, 16), md.nn.Tanh(), md.nn.Linear(16, 3))
    optimizer = md.optim.SGD(model.parameters(), lr=0.2)
    wrapped, optimizer = data_parallel(model, optimizer, comm, compress=name)
    for step in range(60):
        share = np.array_split(rng.permutation(60)[: 23 + step % 3], comm.size)[comm.rank]
        optimizer.zero_grad()
        F.cross_entropy(wrapped(md.tensor(x[share])), md.tensor(labels[share])).backward()
        optimizer.step()
    assert_replicas_agree(model, comm)
    with md.no_grad():
        right = (model(md.tensor(x)).argmax(1).numpy() == labels).mean()
    assert right > 0.9


# -- 16 bits ----------------------------------------------------------------------------------------------------------


@sizes()
def test_bfloat16_rounds_each_number_and_then_the_sum(comm: Communicator) -> None:
    sums, _ = results(comm, "bf16", 2, np.float32)
    for step, own in enumerate(sums):
        total = np.zeros(N, np.float32)
        for rank in range(comm.size):
            total += gradient(rank, step).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert_array_equal(own, total.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
@sizes()
def test_float16_rounds_to_a_2000th_whatever_the_scale(comm: Communicator, scale: float) -> None:
    compression = compression_of("fp16")(comm, flat(np.float32))
    parts = [(gradient(rank, 0) * scale).astype(np.float32) for rank in range(comm.size)]
    own = parts[comm.rank].copy()
    compression.add_up(own)
    exact, size = sum(map(np.float64, parts)), sum(np.abs(part).astype(np.float64) for part in parts)
    assert (np.abs(own - exact) <= (size + np.abs(exact)) / 2**11 * 1.01 + 1e-9 * size.max()).all()


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 0, 0, 1], [5, 7, 5, 7, 7], [0, 0, 1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("name, part", [("fp16", 2**-11), ("bf16", 2**-8)])
def test_between_hosts_16_bits_within_a_host_all(hosts: list[int], name: str, part: float) -> None:
    def program(comm: Communicator) -> np.ndarray:
        return results(comm, name, 1, np.float32)[0][0]

    run = simulate(program, len(hosts), network=Network(hosts=hosts))
    parts = [gradient(rank, 0).astype(np.float32) for rank in range(len(hosts))]
    exact, size = sum(map(np.float64, parts)), sum(np.abs(part).astype(np.float64) for part in parts)
    for own in run.results:
        assert_array_equal(own, run.results[0])
        assert (np.abs(own - exact) <= (size + np.abs(exact)) * part * 1.02 + 1e-6 * size).all()
    assert not np.allclose(run.results[0], exact, rtol=part / 100)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@sizes(1, 2, 3)
def test_what_is_no_number_is_told(comm: Communicator, name: str) -> None:
    own = np.zeros(N, np.float32)
    if comm.rank == 0:
        own[:3] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        compression_of(name)(comm, flat(np.float32)).add_up(own)
    assert_array_equal(own[:4], [np.nan, np.inf, -np.inf, 0])


# -- some of the numbers ----------------------------------------------------------------------------------------------


@sizes()
def test_top_k_sends_the_largest_of_gradient_and_memory(comm: Communicator) -> None:
    sums, _ = results(comm, "topk:0.1", 4)
    k, memory = round(0.1 * N), np.zeros((comm.size, N))
    for step, own in enumerate(sums):
        total = np.zeros(N)
        for rank in range(comm.size):
            memory[rank] += gradient(rank, step)
            largest = sorted(range(N), key=lambda i: -abs(memory[rank, i]))[:k]
            total[largest] += memory[rank, largest]
            memory[rank, largest] = 0
        assert_array_equal(own, total)


@sizes()
def test_random_k_sends_the_same_places_of_all_ranks(comm: Communicator) -> None:
    sums, compression = results(comm, "randomk:0.2", 6)
    k, memory, used = round(0.2 * N), np.zeros((comm.size, N)), set()
    for step, own in enumerate(sums):
        memory += [gradient(rank, step) for rank in range(comm.size)]
        places = np.flatnonzero(own)
        assert len(places) == k
        assert_allclose(own[places], memory[:, places].sum(0), rtol=1e-12)
        memory[:, places] = 0
        used |= set(places.tolist())
    assert_allclose(compression.error, memory[comm.rank], rtol=1e-12, atol=1e-15)
    assert len(used) > 2 * k  # others in each step


# -- signs ------------------------------------------------------------------------------------------------------------


@sizes()
def test_signs_travel_with_each_tensors_mean_magnitude(comm: Communicator) -> None:
    sums, _ = results(comm, "sign", 4)
    memory = np.zeros((comm.size, N))
    for step, own in enumerate(sums):
        total = np.zeros(N)
        for rank in range(comm.size):
            p = memory[rank] + gradient(rank, step)
            sent = np.zeros(N)
            for start, stop in BOUNDS:
                sent[start:stop] = np.where(p[start:stop] < 0, -1, 1) * np.abs(p[start:stop]).sum() / (stop - start)
            memory[rank] = p - sent
            total += sent
        assert_allclose(own, total, rtol=1e-12, atol=1e-13)


# -- thin matrices ----------------------------------------------------------------------------------------------------


@sizes()
def test_power_sgd_is_one_step_of_power_iteration_on_the_sum(comm: Communicator) -> None:
    sums, _ = results(comm, "powersgd:2", 4)
    draw = np.random.default_rng(0)
    rows = {0: (6, 5), 2: (3, 8)}  # the tensors that are compressed; of 3 x 8, 2 (3 + 8) < 24
    q = {i: draw.standard_normal((shape[1], 2)) for i, shape in rows.items()}
    memory = np.zeros((comm.size, N))
    for step, own in enumerate(sums):
        g = np.array([gradient(rank, step) for rank in range(comm.size)])
        for i, (start, stop) in enumerate(BOUNDS):
            if i not in rows:
                assert_allclose(own[start:stop], g[:, start:stop].sum(0), rtol=1e-12)
                continue
            m = (g + memory)[:, start:stop].reshape(comm.size, *rows[i])
            basis = np.linalg.qr(m.sum(0) @ q[i])[0]
            project = basis @ basis.T  # onto the span of P: the same whatever its orthonormal basis
            assert_allclose(own[start:stop].reshape(rows[i]), project @ m.sum(0), rtol=1e-9, atol=1e-12)
            memory[:, start:stop] = (m - project @ m).reshape(comm.size, -1)
            q[i] = m.sum(0).T @ basis


def test_a_matrix_of_that_rank_is_sent_whole_in_two_steps() -> None:
    def program(comm: Communicator) -> list[np.ndarray]:
        compression = compression_of("powersgd:2")(comm, flat())
        exact = np.random.default_rng(3).standard_normal((6, 2)) @ np.random.default_rng(4).standard_normal((2, 5))
        own = np.zeros(N)
        own[:30] = exact.reshape(-1) * (comm.rank + 1)
        compression.add_up(own)
        return [own[:30] - exact.reshape(-1) * 6]

    for (difference,) in simulate(program, 3).results:
        assert_allclose(difference, 0, atol=1e-12)


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
@every_one
def test_it_sends_what_its_docstring_says(name: str, size: int) -> None:
    n = 4000

    def program(comm: Communicator, steps: int) -> None:
        big = FlatBuffer([md.nn.Parameter(md.tensor(np.zeros((50, 80), np.float32)))])
        compression = compression_of(name)(comm, big)
        for _ in range(steps):
            compression.add_up(np.random.default_rng(comm.rank).standard_normal(n).astype(np.float32))

    sent = simulate(program, size, 2).bytes - simulate(program, size, 1).bytes
    others = size - 1
    whole = 2 * n * 4 * others  # the ring's, of all ranks
    exact = {
        "fp16": 2 * n * 2 * others,
        "bf16": 2 * n * 2 * others,
        "topk:0.1": size * others * 400 * 8,
        "sign": size * others * (n // 8 + 4),
    }
    if name in exact:
        assert exact[name] <= sent <= exact[name] + 4 * size * size  # float16's scale
    elif name.startswith("randomk"):
        assert sent <= 2 * 800 * 4 * others * size
    else:
        assert sent <= 2 * 2 * (50 + 80) * 4 * others * size
    assert sent < whole


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("zip", "compress 'zip': choose one of fp16, bf16, topk:R, randomk:R, sign, powersgd:R"),
        ("fp16:2", "fp16 takes no number"),
        ("topk", "topk:R, where R is a share above 0 and up to 1"),
        ("topk:0", "a share above 0"),
        ("topk:1.5", "a share above 0"),
        ("randomk:nan", "a share above 0"),
        ("powersgd:0", "powersgd:R, where R is a whole number above 0"),
        ("powersgd:1.5", "a whole number above 0"),
    ],
)
def test_what_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compression_of(name)


# -- with sharding ----------------------------------------------------------------------------------------------------


@every_one
@pytest.mark.parametrize("zero", [1, 2, 3])
@on_ranks(1, 2, 3, 4, seeds=1)
def test_sharding_changes_not_a_bit(comm: Communicator, zero: int, name: str) -> None:
    """But for what looks at all gradients at once, which with zero=3 are those of a layer."""

    def trained(zero: int) -> dict[str, np.ndarray]:
        md.manual_seed(0)
        model = md.nn.Sequential(md.nn.Linear(8, 16), md.nn.Tanh(), md.nn.Linear(16, 3))
        optimizer = md.optim.Adam(model.parameters(), lr=0.01)
        wrapped, optimizer = data_parallel(model, optimizer, comm, zero, compress=name)
        rng = np.random.default_rng(comm.rank)
        for step in range(5):
            optimizer.zero_grad()
            n = 3 + (comm.rank + step) % 2
            loss = F.cross_entropy(wrapped(md.randn(n, 8)), md.tensor(rng.integers(0, 3, n)))
            loss.backward()
            optimizer.step()
        assert_replicas_agree(wrapped, comm)
        return {key: np.array(array) for key, array in wrapped.state_dict().items()}

    expected, got = trained(0), trained(zero)
    for key, array in expected.items():
        if zero < 3 or name == "sign":
            assert_array_equal(got[key], array)
        elif name in ("fp16", "bf16"):  # a scale of its own for each layer; what is rounded away, Adam may enlarge
            assert np.abs(got[key] - array).max() < 5e-3
