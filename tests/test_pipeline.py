"""Pipelines: every schedule gives one rank's gradients, and what travels is what should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from ranks import on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.nn import Linear, Module, Pop, ReLU, Sequential, Stash, Tanh
from minidist.nn import functional as F
from minidist.parallel.pipeline import Pipeline
from minidist.parallel.schedules import SCHEDULES
from minidist.parallel.stages import balanced
from minidist.tensor import Tensor

RNG = np.random.default_rng(5)
X, LABELS = RNG.normal(size=(11, 6)), RNG.integers(0, 4, 11)


def model() -> Sequential:
    """Eight layers; a skip connection over the middle."""
    md.manual_seed(1)
    layers = [Linear(6, 9), Tanh(), Stash("early"), Linear(9, 7), ReLU(), Linear(7, 9), Pop("early"), Linear(9, 4)]
    return Sequential(*layers).double()


def reference(make: Any = model) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the whole batch, on one rank, without a pipeline."""
    whole = make()
    loss = F.cross_entropy(whole(Tensor(X)), Tensor(LABELS))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in whole._named_state(True, False)}


def check(comm: Communicator, pipeline: Pipeline, make: Any = model) -> None:
    """After a step: this rank's gradients are those of one rank, and the ranks' losses add up to its loss."""
    loss, gradients = reference(make)
    total = md.collectives.all_reduce(comm, np.array([pipeline.step(X, LABELS)]))[0]
    assert_allclose(total, loss, rtol=1e-12)
    here = dict(pipeline.module.named_parameters())
    for name, p in here.items():
        assert_allclose(p.grad.numpy(), gradients[name], rtol=1e-10, atol=1e-14, err_msg=name)
    counts = md.collectives.all_reduce(comm, np.array([len(here)]))[0]
    assert counts >= len(list(make().parameters()))  # nothing is lost


CASES = [(name, m, 1) for name in SCHEDULES for m in (1, 3, 11)] + [("interleaved", 5, 2), ("breadth-first", 3, 2)]


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("schedule, micro, chunks", CASES)
def test_every_schedule_gives_one_rank_s_gradients(comm: Communicator, schedule: str, micro: int, chunks: int) -> None:
    pipeline = Pipeline(model(), comm, F.cross_entropy, schedule, micro, chunks)
    check(comm, pipeline)
    for p in pipeline.module.parameters():
        p.grad = None
    check(comm, pipeline)  # headers are not sent again


class Head(Module):
    """Logits by the weight of the first layer."""

    def __init__(self, first: Linear):
        self.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def tied_model() -> Sequential:
    md.manual_seed(2)
    first = Linear(6, 6)
    return Sequential(first, Tanh(), Linear(6, 6), Tanh(), Head(first)).double()


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_a_weight_that_two_stages_use(comm: Communicator, schedule: str) -> None:
    pipeline = Pipeline(tied_model(), comm, F.cross_entropy, schedule, 3)
    ends = comm.size > 1 and comm.rank in (0, comm.size - 1)
    assert [group.size for _, group in pipeline.tied] == [2] * ends
    check(comm, pipeline, tied_model)
    before = {p: p.grad.numpy().copy() for p in pipeline.module.parameters()}
    pipeline.step(X, LABELS)  # gradients add up, as in any backward
    for p, gradient in before.items():
        assert_allclose(p.grad.numpy(), 2 * gradient, rtol=1e-12)


@on_ranks(2, 3, 4)
@pytest.mark.parametrize("stops", [(2,), (3,), (0,), (8,), (3, 6), (2, 2), (0, 8), (1, 4, 6), (8, 8, 8)])
def test_stages_cut_by_hand(comm: Communicator, stops: tuple[int, ...]) -> None:
    """Also uneven ones, empty ones, and those that a skip connection passes by."""
    if len(stops) != comm.size - 1:
        with pytest.raises(ValueError, match=rf"give {comm.size - 1} numbers from 0 to 8"):
            Pipeline(model(), comm, F.cross_entropy, cut=stops)
        return
    pipeline = Pipeline(model(), comm, F.cross_entropy, "1f1b", 4, cut=stops)
    bounds = [0, *stops, 8]
    mine = range(bounds[comm.rank], bounds[comm.rank + 1])
    assert [name for name, _ in pipeline.module.named_children()] == [str(i) for i in mine]
    check(comm, pipeline)


@on_ranks(1, 3)
def test_stages_cut_by_time(comm: Communicator) -> None:
    """The layer that takes the longest is on a stage of its own."""

    class Slow(Linear):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2000):
                y = super().forward(x)
            return y

    def slow_model() -> Sequential:
        md.manual_seed(1)
        return Sequential(Linear(6, 6), Slow(6, 6), Linear(6, 4), ReLU()).double()

    pipeline = Pipeline(slow_model(), comm, F.cross_entropy, "gpipe", 2, cut="time", sample=X)
    names = [name for name, _ in pipeline.module.named_children()]
    assert names == [["0"], ["1"], ["2", "3"]][comm.rank] if comm.size == 3 else ["0", "1", "2", "3"]
    assert all(p.grad is None for p in pipeline.module.parameters())
    check(comm, pipeline, slow_model)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_no_deadlock_where_sends_wait_for_receives(schedule: str, chunks: int) -> None:
    if chunks > 1 and not SCHEDULES[schedule].chunks:
        return

    def program(comm: Communicator) -> None:
        check(comm, Pipeline(model(), comm, F.cross_entropy, schedule, 8, chunks))

    for seed in range(3):
        simulate(program, 4, seed=seed, network=Network(sends="rendezvous", alpha=1e-6))


@on_ranks(4)
def test_what_is_in_flight_and_what_it_costs(comm: Communicator) -> None:
    """1F1B keeps min(m, p - i) microbatches, GPipe all; messages are m down and m up each border, and headers once."""
    m, dims = 8, 5
    md.manual_seed(0)
    x, labels = np.zeros((m, dims)), np.zeros(m, int)
    expected = {"1f1b": min(m, 4 - comm.rank), "gpipe": m, "naive": 1, "zero-bubble": min(m, 4 - comm.rank)}
    for schedule, in_flight in expected.items():
        whole = Sequential(*(Linear(dims, dims) for _ in range(4))).double()
        pipeline = Pipeline(whole, comm, F.cross_entropy, schedule, m)
        for headers in (1, 0):
            sent = comm.record.sent_messages, comm.record.sent_bytes
            pipeline.step(x, labels)
            down, up = comm.rank < 3, comm.rank > 0
            assert comm.record.sent_messages - sent[0] == m * down + m * up + headers * down
            assert comm.record.sent_bytes - sent[1] == (m * down + m * up) * dims * 8 + 80 * headers * down
        assert pipeline.in_flight == in_flight, schedule
        assert [span.action for span in pipeline.spans] == list(SCHEDULES[schedule](comm.rank, 4, m))


@on_ranks(1, 3)
def test_evaluation_trains_nothing(comm: Communicator) -> None:
    pipeline = Pipeline(model(), comm, F.cross_entropy, "1f1b", 4)
    loss, _ = reference()
    total = md.collectives.all_reduce(comm, np.array([pipeline.evaluate(X, LABELS)]))[0]
    assert_allclose(total, loss, rtol=1e-12)
    right = lambda y, t: (y.argmax(1) == t).to(np.float64).mean()  # noqa: E731
    total = md.collectives.all_reduce(comm, np.array([pipeline.evaluate(X, LABELS, right)]))[0]
    assert_allclose(total, (model()(Tensor(X)).numpy().argmax(1) == LABELS).mean())
    assert all(p.grad is None for p in pipeline.module.parameters())


@on_ranks(1, 2)
def test_an_empty_batch_and_a_last_small_one(comm: Communicator) -> None:
    pipeline = Pipeline(model(), comm, F.cross_entropy, "1f1b", 4)
    assert pipeline.step(X[:0], LABELS[:0]) == 0
    assert all(p.grad is None for p in pipeline.module.parameters())
    check(comm, pipeline)
    pipeline.step(X[:3], LABELS[:3], weight=0.0)


@on_ranks(2)
def test_bad_arguments_are_refused(comm: Communicator) -> None:
    def make(whole: Sequential | None = None, **options: Any) -> Pipeline:
        return Pipeline(whole or model(), comm, F.cross_entropy, **options)

    with pytest.raises(ValueError, match="schedule='best': choose naive, gpipe, 1f1b"):
        make(schedule="best")
    with pytest.raises(ValueError, match="microbatches=0: less than 1"):
        make(microbatches=0)
    with pytest.raises(ValueError, match="num_chunks=2: 1f1b has one chunk"):
        make(chunks=2)
    with pytest.raises(ValueError, match="cut='luck': choose 'bytes'"):
        make(cut="luck")
    with pytest.raises(ValueError, match="cut='time' needs sample"):
        make(cut="time")
    with pytest.raises(ValueError, match=r"Pop\('a'\): no Stash"):
        make(Sequential(Pop("a"), Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Stash\('a'\): no Pop"):
        make(Sequential(Stash("a"), Linear(2, 2)))
    with pytest.raises(ValueError, match="11 samples do not fit 10 targets"):
        make().step(X, LABELS[:10])


@pytest.mark.parametrize("costs", [[1, 2, 3, 4, 5], [9, 1, 1, 1], [0, 0, 5, 0, 0, 5], [1.5], [2, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_most_costly_stage_is_as_cheap_as_can_be(costs: list[float], stages: int) -> None:
    from itertools import combinations_with_replacement, pairwise

    stops = balanced(costs, stages)
    cost = lambda stops: max(sum(costs[a:b]) for a, b in pairwise([0, *stops, len(costs)]))  # noqa: E731
    assert len(stops) == stages - 1 and sorted(stops) == stops
    assert cost(stops) == min(map(cost, combinations_with_replacement(range(len(costs) + 1), stages - 1)))
    sizes = [b - a for a, b in pairwise([0, *stops, len(costs)])]
    assert all(sizes) or len(costs) < stages


@pytest.mark.parametrize("schedule, kept", [("gpipe", [4, 4, 4]), ("1f1b", [3, 2, 1])])
@on_ranks(3)
def test_what_came_from_other_stages_is_kept(comm, schedule, kept):
    """A stage that is one linear layer saves its input, which is a message: 2 samples of 5 float32 a microbatch."""
    model = md.nn.Sequential(*(md.nn.Linear(5, 5) for _ in range(3)))
    loss = lambda y, target: y.sum() * 0.5  # noqa: E731  saves nothing
    pipeline = Pipeline(model, comm, loss, schedule=schedule, microbatches=4, cut=[1, 2])
    pipeline.step(np.ones((8, 5), np.float32), np.zeros(8))
    first = 8 * 5 * 4  # the microbatches are views of the batch, all of which stays
    assert pipeline.activation_bytes == (kept[comm.rank] * 2 * 5 * 4 if comm.rank else first)
