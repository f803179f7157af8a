"""Buckets that overlap backward, no_sync, count: what travels when, and that it gives what one rank would get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import once_on_ranks as on_ranks
from test_data_parallel import (
    LABELS,
    LR,
    State,
    X,
    assert_weights,
    batches,
    copied,
    gradients,
    gradients_here,
    initial,
    loss_of,
    network,
    pair,
    share,
    train,
)

import minidist as md
from minidist.collectives.lane import TAGS
from minidist.comm import Communicator, simulate
from minidist.comm.network import Link, Network
from minidist.comm.record import Operation
from minidist.nn import functional as F
from minidist.optim import clip_grad_norm_
from minidist.parallel import SyncBatchNorm, assert_replicas_agree, data_parallel, fixed_tree
from minidist.parallel.buckets import LEAST, MOST, SHARDED, size_of_buckets

EACH = 1  # bytes: every parameter is a bucket of its own
AVERAGE = "D.3(4) average gradients"


# -- what one rank would get ------------------------------------------------------------------------------------------


def adam(
    steps: list[np.ndarray], frozen: tuple[str, ...] = (), thaw: int = 99, clip: float = np.inf, decay: float = 0
) -> State:
    """The weights after a step of Adam with each of these batches.

    frozen  these rest in the first `thaw` steps;   clip  the gradients' norm;   decay  the loss has decay/2 |w|^2 more
    """
    w = initial(0)
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in "mv")
    for number, batch in enumerate(steps):
        resting = frozen if number < thaw else ()
        grads = {name: g + decay * w[name] for name, g in gradients(w, X[batch], LABELS[batch]).items()}
        grads = {name: g for name, g in grads.items() if name not in resting}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1, clip / (norm + 1e-6))
            step = number + 1 - (thaw if name in frozen else 0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            w[name] -= LR * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
    return w


# -- the strategy under test ------------------------------------------------------------------------------------------


def parallel(model: Any, optimizer: Any, comm: Communicator, zero: int = 0, nbytes: int | None = EACH) -> Any:
    """data_parallel with buckets of so many bytes; with zero=3, which has no choice, layer by layer."""
    return data_parallel(model, optimizer, comm, zero, bucket_bytes=None if zero == 3 else nbytes)


def buckets(comm: Communicator, zero: int, nbytes: int | None = EACH) -> Any:
    """The same with the network and optimizer of test_data_parallel."""
    model = network()
    return parallel(model, md.optim.Adam(model.parameters(), lr=LR), comm, zero, nbytes)


# -- models -----------------------------------------------------------------------------------------------------------

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}  # elements: the bytes of a message tell which it is about


class Four(md.nn.Module):
    """y = x times the sum of all elements of the parameters named; their gradients come in the opposite order."""

    def __init__(self) -> None:
        for i, (name, size) in enumerate(SIZES.items()):
            setattr(self, name, md.nn.Parameter(md.tensor(np.full(size, 2.0 + i))))

    def forward(self, x: md.Tensor, names: str) -> md.Tensor:
        y = x * 0
        for name in names:
            y = y + x * getattr(self, name).sum()
        return y


class Scale(md.nn.Module):
    """y = p x."""

    def __init__(self, value: float) -> None:
        self.p = md.nn.Parameter(md.tensor(np.array([value])))

    def forward(self, x: md.Tensor) -> md.Tensor:
        return x * self.p


@contextmanager
def failing(parameter: md.nn.Parameter) -> Iterator[None]:
    """In here a backward raises when the parameter's gradient is finished."""

    def fails(_: md.Tensor) -> None:
        raise KeyError("in a hook")

    remove = parameter.register_post_accumulate_grad_hook(fails)
    with pytest.raises(KeyError, match="in a hook"):
        yield
    remove()


def latest(comm: Communicator) -> int:
    """The number of what this rank did last."""
    return max((op.number for op in comm.record.operations()), default=0)


def averages(comm: Communicator, after: int) -> list[Operation]:
    """The gradients' collectives of this rank since that number, in the order they set off."""
    operations = [op for op in comm.record.operations() if op.number > after]
    return [op for op in operations if op.label.startswith(AVERAGE) and "all_gather" not in op.kind]


def column(comm: Communicator) -> tuple[np.ndarray, md.Tensor]:
    """A number for each rank, and this one's as a batch of one sample."""
    numbers = np.arange(1.0, comm.size + 1) ** 2
    return numbers, md.tensor(numbers[comm.rank : comm.rank + 1, None])


# -- which gradients are in a bucket ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nbytes, expected",
    [
        (1 << 30, ["0.weight 0.bias 2.weight 2.bias"]),
        (233, ["0.weight 0.bias 2.weight 2.bias"]),  # what is left, 240 bytes, would be one of its own, but is not cut
        (232, ["0.bias 2.weight 2.bias", "0.weight"]),
        (33, ["2.weight 2.bias", "0.bias", "0.weight"]),
        (32, ["2.bias", "2.weight", "0.bias", "0.weight"]),
        (EACH, ["2.bias", "2.weight", "0.bias", "0.weight"]),
    ],
)
@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 3)
def test_buckets_have_at_least_so_many_bytes_counted_from_the_last_parameter(
    comm: Communicator, zero: int, nbytes: int, expected: list[str]
) -> None:
    model, _ = buckets(comm, zero, nbytes)
    name_of = {p: name for name, p in model.named_parameters()}
    assert [" ".join(name_of[p] for p in bucket.part.flat.parameters) for bucket in model.buckets] == expected
    assert_weights(model, initial(0))


@pytest.mark.parametrize(
    "zero, network, expected",
    [
        (0, Network(), None),
        (1, Network(alpha=1e-3, beta=1e-9), None),  # one host
        (2, Network(), SHARDED),
        (3, Network(alpha=1e-3, beta=1e-9, ranks_per_host=1), SHARDED),
        (0, Network(alpha=5, beta=7, ranks_per_host=2, between=Link(2e-5, 2e-10)), 9 * 4 * 100_000),
        (1, Network(alpha=1e-5, beta=1e-10, ranks_per_host=1), 9 * 4 * 100_000),  # between hosts as within
        (0, Network(ranks_per_host=2, between=Link(1e-6, 1e-9)), LEAST),
        (0, Network(ranks_per_host=2, between=Link(1e-2, 1e-9)), MOST),
        (0, Network(ranks_per_host=2, between=Link(1e-6, 0)), MOST),
    ],
)
def test_size_of_buckets_makes_latency_a_tenth_of_their_time(zero: int, network: Network, expected: int | None) -> None:
    results = simulate(size_of_buckets, 4, zero, network=network).results
    assert results == [None if expected is None else pytest.approx(expected, abs=1)] * 4


def test_between_hosts_there_are_buckets_without_asking() -> None:
    def program(comm: Communicator) -> list[int]:
        model = md.nn.Sequential(*(md.nn.Linear(512, 512, bias=False) for _ in range(3)), md.nn.Linear(512, 100))
        wrapped, _ = data_parallel(model, md.optim.SGD(model.parameters(), lr=1.0), comm)
        return [bucket.part.flat.data.nbytes for bucket in wrapped.buckets]

    layer, last = 4 * 512 * 512, 4 * (512 * 100 + 100)
    network = Network(ranks_per_host=1, between=Link(1e-6, 1e-9))
    assert simulate(program, 2, network=network).results == [[last + layer, layer, layer]] * 2
    assert simulate(program, 2).results == [[last + 3 * layer]] * 2


# -- when they travel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_last_layers_are_under_way_before_backward_reaches_the_first(zero: int, size: int) -> None:
    def program(comm: Communicator) -> None:
        model = md.nn.Sequential(*(md.nn.Linear(3, 3, bias=False) for _ in range(LAYERS)))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda _: comm.elapse(0.01))  # longer than a message takes
        wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero)
        seen: list[list[Operation]] = []
        model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(averages(comm, 0)))
        wrapped(md.tensor(np.ones((1 + comm.rank, 3), np.float32))).sum().backward()
        (begun,) = seen
        assert len(begun) >= LAYERS // 2
        assert len(averages(comm, 0)) == LAYERS
        assert not comm.in_flight  # it is all over when backward is
        optimizer.step()
        assert not comm.in_flight

    simulate(program, size, network=Network(alpha=1e-3))


@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(2, 3, 4)
def test_all_ranks_start_buckets_in_one_order_whichever_gradients_come_and_when(comm: Communicator, zero: int) -> None:
    model = Four()
    # Decay and momentum would move a parameter that got zeros and not None.
    sgd = md.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    wrapped, optimizer = parallel(model, sgd, comm, zero)
    numbers, x = column(comm)
    expected = copied(wrapped.state_dict())
    velocity: State = {}
    for names in (["abcd", "dcba", "cadb", "bdac"], ["a", "bd", "dba", "ab"], ["d", "dc", "c", "d"]):
        used = names[: comm.size]
        before = latest(comm)
        optimizer.zero_grad()
        wrapped(x, used[comm.rank]).sum().backward()
        optimizer.step()
        assert [op.nbytes // 8 for op in averages(comm, before)] == [4, 3, 2, 1]
        for name in set("".join(used)):
            total = sum(number for number, own in zip(numbers, used, strict=False) if name in own)
            g = total / comm.size + 0.5 * expected[name]
            velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
            expected[name] = expected[name] - 0.1 * velocity[name]
        assert_weights(wrapped, expected, rtol=1e-12)
    assert_replicas_agree(wrapped, comm)


class Normed(md.nn.Module):
    """A layer that communicates in its backward, below one of which a rank may leave out a parameter."""

    def __init__(self, comm: Communicator):
        self.conv, self.norm, self.top = md.nn.Conv2d(1, 2, 1).double(), SyncBatchNorm(2, comm).double(), Four()
        self.early = Scale(2.0)  # the last of the parameters, and so in the first bucket, comes last in backward

    def forward(self, x: md.Tensor, names: str) -> md.Tensor:
        x = self.early(x) if "e" in names else x
        return self.top(self.norm(self.conv(x)), names.replace("e", ""))


@pytest.mark.parametrize("bucket_bytes", [1 << 30, EACH])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_unused_parameters_go_together_with_layers_that_communicate(zero: int, bucket_bytes: int) -> None:
    def program(comm: Communicator) -> None:
        model = Normed(comm)
        wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero, bucket_bytes)
        x = md.tensor(np.random.default_rng(comm.rank).standard_normal((2, 1, 2, 2)))
        for few, many in (("abc", "abcd"), ("abcd", "eabcd"), ("abe", "cd")):
            wrapped(x, many if comm.rank else few).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_replicas_agree(wrapped, comm)

    simulate(program, 3)


def test_more_buckets_may_be_in_flight_than_there_are_tags() -> None:
    class Many(md.nn.Module):
        def __init__(self) -> None:
            self.scales = md.nn.ModuleList(Scale(float(i)) for i in range(TAGS + 30))

        def forward(self, x: md.Tensor) -> md.Tensor:
            return md.stack([scale(x) * (i % 7) for i, scale in enumerate(self.scales)]).sum(0)

    def program(comm: Communicator) -> None:
        model = Many()
        wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=1.0), comm)
        assert len(wrapped.buckets) == TAGS + 30
        numbers, x = column(comm)
        wrapped(x).sum().backward()
        optimizer.step()
        got = np.concatenate([p.numpy() for p in model.parameters()])
        before = np.arange(TAGS + 30)
        assert_allclose(got, before - before % 7 * numbers.mean(), rtol=1e-12, atol=1e-9)

    simulate(program, 3)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_buckets_in_checked_mode(comm: Communicator, zero: int) -> None:
    comm.checked = True
    try:
        model, optimizer = buckets(comm, zero)
        train(model, optimizer, comm, batches(5, 4))
        assert_weights(model, adam(batches(5, 4)))
    finally:
        comm.checked = False


# -- time -------------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, SECONDS = 12, 16, 1e-4  # backward computes for so long in each layer
TWO_HOSTS = Network(alpha=1e-7, beta=1e-10, hosts=(0, 0, 1, 1), between=Link(1e-5, 4e-8))  # a layer: 1e-4 s, too


def timed(comm: Communicator, zero: int, bucket_bytes: int) -> tuple[float, ...]:
    """Seconds of two backwards: by the clock; waited, communicated and hidden by the meter."""
    model = md.nn.Sequential(*(md.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: comm.elapse(SECONDS))
    wrapped, _ = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero, bucket_bytes)
    wrapped.meter.reset()
    start = comm.clock()
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(md.tensor(np.full((1 + comm.rank, WIDTH), 1e-3, np.float32))).sum().backward()
    meter = wrapped.meter
    return comm.clock() - start, meter.waited, meter.communicated, meter.hidden


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_buckets_hide_communication_behind_computing(zero: int) -> None:
    together = simulate(timed, 4, zero, 1 << 30, network=TWO_HOSTS)
    apart = simulate(timed, 4, zero, 2 * 4 * WIDTH**2, network=TWO_HOSTS)
    compute = 2 * LAYERS * SECONDS
    for run in (together, apart):
        for seconds, waited, communicated, hidden in run.results:
            assert seconds == pytest.approx(compute + waited)  # nothing else takes time here
            assert hidden == pytest.approx(communicated - waited)
            assert communicated <= seconds  # what overlaps counts once
    for (before, waited_before, _, none), (after, waited, _, hidden) in zip(
        together.results, apart.results, strict=True
    ):
        assert none == pytest.approx(0, abs=1e-12)
        assert hidden >= waited_before - waited > 0.4 * waited_before  # (on its way counts too what nobody pushed on)
        assert after < before - 0.3 * waited_before


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_was_waited_for_was_communicated(zero: int) -> None:
    def program(comm: Communicator) -> None:
        model, optimizer = pair(comm, zero)
        model.meter.reset()
        train(model, optimizer, comm, batches(8, 2))
        assert 0 < model.meter.waited <= model.meter.communicated * (1 + 1e-12)

    simulate(program, 3, network=Network(alpha=1e-5, beta=1e-9))


# -- which parameters, and how they are used --------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("0.weight",), ("0.bias", "2.weight"), ("2.weight", "2.bias")])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 3)
def test_frozen_parameters_stay_and_hold_nothing_up(comm: Communicator, zero: int, frozen: tuple[str, ...]) -> None:
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    optimizer = md.optim.Adam(model.parameters(), lr=LR)
    wrapped, sharded = parallel(model, optimizer, comm, zero)
    train(wrapped, sharded, comm, batches(5, 4))
    assert_weights(wrapped, adam(batches(5, 4), frozen))
    model.requires_grad_(True)  # fine-tuning: all are trained from here on
    train(wrapped, sharded, comm, batches(5, 7)[4:])
    assert_weights(wrapped, adam(batches(5, 7), frozen, thaw=4))
    assert_replicas_agree(wrapped, comm)


class TwoDtypes(md.nn.Module):
    """y = x * (w + 2 b + 3 v + 4 c), each summed up: single and double weights and biases."""

    def __init__(self) -> None:
        for i, (name, shape, dtype) in enumerate(
            [("w", (3, 2), np.float32), ("b", (3,), np.float32), ("v", (5,), np.float64), ("c", (1,), np.float64)]
        ):
            setattr(self, name, md.nn.Parameter(md.tensor(np.full(shape, 1.0 + i, dtype))))

    w: md.nn.Parameter
    b: md.nn.Parameter
    v: md.nn.Parameter
    c: md.nn.Parameter

    def forward(self, x: md.Tensor) -> md.Tensor:
        return (x * self.w.sum()).sum() + (x * 2 * self.b.sum()).sum() + (x * (3 * self.v.sum() + 4 * self.c)).sum()


@pytest.mark.parametrize("bucket_bytes", [EACH, 16, 1 << 30])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 3)
def test_two_groups_with_options_of_their_own_and_two_dtypes(comm: Communicator, zero: int, bucket_bytes: int) -> None:
    model = TwoDtypes()
    groups: list[dict[str, Any]] = [
        {"params": [model.w, model.v], "weight_decay": 0.5},
        {"params": [model.b, model.c], "lr": 0.2},
    ]
    optimizer = md.optim.SGD(groups, lr=0.1, momentum=0.9)
    wrapped, sharded = parallel(model, optimizer, comm, zero, bucket_bytes)
    numbers, x = column(comm)
    expected, velocity = copied(wrapped.state_dict()), dict.fromkeys("wbvc", 0.0)
    for _ in range(3):
        sharded.zero_grad()
        wrapped(md.tensor(x.numpy().astype(np.float32))).sum().backward()
        norm = np.sqrt(sum(size * (factor * numbers.mean()) ** 2 for size, factor in ((6, 1), (3, 2), (5, 3), (1, 4))))
        assert_allclose(wrapped.clip_grad_norm_(1e9).item(), norm, rtol=1e-6)
        sharded.step()
        for factor, name in enumerate("wbvc", start=1):
            g = factor * numbers.mean() + (0.5 * expected[name] if name in "wv" else 0)
            velocity[name] = 0.9 * velocity[name] + g
            expected[name] = expected[name] - (0.1 if name in "wv" else 0.2) * velocity[name]
    assert_weights(wrapped, expected, rtol=1e-6)
    state = copied(wrapped.state_dict())
    assert [state[name].dtype.itemsize for name in "wbvc"] == [4, 4, 8, 8]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_a_tied_parameter_travels_once_all_its_uses_have_contributed(comm: Communicator, zero: int) -> None:
    first, middle, last = Scale(2.0), Scale(3.0), Scale(0.0)
    last.p = first.p
    model = md.nn.Sequential(first, middle, last)
    wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.01), comm, zero)
    numbers, x = column(comm)
    p, q = 2.0, 3.0
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(x).sum().backward()
        optimizer.step()
        p, q = p - 0.01 * 2 * p * q * numbers.mean(), q - 0.01 * p * p * numbers.mean()
    assert_weights(wrapped, {"0.p": np.array([p]), "1.p": np.array([q]), "2.p": np.array([p])}, rtol=1e-12)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 2, 3)
def test_parameters_may_stand_in_the_loss_as_well(comm: Communicator, zero: int, before: bool) -> None:
    model, optimizer = buckets(comm, zero)

    def penalty() -> md.Tensor:
        total = md.tensor(np.zeros(()))
        for p in model.parameters():
            total = total + (p * p).sum() * 0.15
        return total

    for batch in batches(5, 6):
        optimizer.zero_grad()
        first = penalty() if before else None
        loss = loss_of(model, share(batch, comm)) if len(share(batch, comm)) else model(md.tensor(X[:0])).sum()
        (loss + (penalty() if first is None else first)).backward()
        optimizer.step()
    assert_weights(model, adam(batches(5, 6), decay=0.3))


@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 2, 3)
def test_parameters_may_stand_in_the_loss_only(comm: Communicator, zero: int) -> None:
    class Idle(Scale):  # has a parameter that its forward does not use
        def __init__(self) -> None:
            super().__init__(2.0)
            self.own = md.nn.Parameter(md.tensor(np.array([5.0])))

    model, factor = Idle(), md.nn.Parameter(md.tensor(np.array([3.0])))  # which no model has
    optimizer = md.optim.SGD([*model.parameters(), factor], lr=0.1)
    wrapped, sharded = parallel(model, optimizer, comm, zero)
    numbers, x = column(comm)
    (wrapped(x) * factor + model.own * 7).sum().backward()
    sharded.step()
    mean = numbers.mean()
    assert_weights(wrapped, {"p": np.array([2 - 0.1 * 3 * mean]), "own": np.array([5 - 0.7])}, rtol=1e-12)
    assert_allclose(factor.numpy(), [3 - 0.1 * 2 * mean], rtol=1e-12)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_two_forwards_of_the_same_parameters_and_one_backward(comm: Communicator, zero: int) -> None:
    model, optimizer = buckets(comm, zero)
    for batch in (np.arange(14), np.arange(9, 23)):
        mine = share(batch, comm)
        one, two = mine[:3], mine[3:]  # of unequal sizes, which differ from rank to rank
        optimizer.zero_grad()
        ((loss_of(model, one) * len(one) + loss_of(model, two) * len(two)) / len(mine)).backward()
        optimizer.step()
    assert_weights(model, adam([np.arange(14), np.arange(9, 23)]))


@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 2, 3)
def test_one_backward_may_go_through_two_forwards_of_other_parameters(comm: Communicator, zero: int) -> None:
    numbers, x = column(comm)
    for bucket_bytes in (EACH, 1 << 30):
        model = Four()
        optimizer = md.optim.SGD(model.parameters(), lr=0.1)
        wrapped, _ = parallel(model, optimizer, comm, zero, bucket_bytes)
        first, second = wrapped(x, "ab"), wrapped(x, "cd")
        (first + second).sum().backward()
        _, averaged = gradients_here(wrapped)
        assert_allclose(averaged, np.full(averaged.shape, numbers.mean()), rtol=1e-12)


@pytest.mark.parametrize(
    "zero, where",
    [*((zero, where) for zero in range(4) for where in ("2.bias", "2.weight", "0.weight")), (0, ""), (1, ""), (2, "")],
)
@on_ranks(1, 2, 4)
def test_after_a_backward_that_failed_with_buckets_on_their_way_training_goes_on(
    comm: Communicator, zero: int, where: str
) -> None:
    model, optimizer = buckets(comm, zero)
    parameters = dict(model.named_parameters())
    where = where or ["0.bias", "2.bias", "2.weight", "0.weight"][comm.rank]  # "": elsewhere on each rank
    for batch in batches(5, 4):
        optimizer.zero_grad()
        with failing(parameters[where]):
            loss_of(model, np.arange(1 + 3 * comm.rank)).backward()  # other numbers of samples on other ranks
        train(model, optimizer, comm, [batch])
    assert_weights(model, adam(batches(5, 4)))


@pytest.mark.parametrize("bucket_bytes", [1 << 30, EACH])
def test_a_hook_may_change_a_gradient_before_it_is_averaged(bucket_bytes: int) -> None:
    def program(comm: Communicator) -> None:
        model, _ = pair(comm, 0, algorithm="ring", bucket_bytes=bucket_bytes)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2.0))
        loss_of(model, share(np.arange(9), comm)).backward()
        for name, g in gradients(initial(0), X[:9], LABELS[:9]).items():
            assert_allclose(dict(model.named_parameters())[name].grad.numpy(), 2 * g, rtol=1e-10, atol=1e-14)

    simulate(program, 3)


# -- no_sync ----------------------------------------------------------------------------------------------------------


def microbatches(batch: np.ndarray, number: int, comm: Communicator) -> Iterator[tuple[bool, np.ndarray, float]]:
    """(is it the last, samples, their part of this rank's share) of each microbatch; some are empty."""
    mine = share(batch, comm)
    for k, part in enumerate(np.array_split(mine, number), start=1):
        yield k == number, part, len(part) / max(len(mine), 1)


def backward_of(model: Any, part: np.ndarray, weight: float) -> None:
    loss = loss_of(model, part) if len(part) else model(md.tensor(X[:0])).sum()
    (loss * weight).backward()


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 3, 4)
def test_microbatches_under_no_sync_are_one_batch_clipped_as_one(comm: Communicator, zero: int, number: int) -> None:
    model, optimizer = buckets(comm, zero)
    for batch in batches(9, 5):
        optimizer.zero_grad()
        for last, part, weight in microbatches(batch, number, comm):
            with nullcontext() if last else model.no_sync():
                backward_of(model, part, weight)
        model.clip_grad_norm_(0.3)
        optimizer.step()
    assert_weights(model, adam(batches(9, 5), clip=0.3))
    assert_replicas_agree(model, comm)


@pytest.mark.parametrize("bucket_bytes", [EACH, None])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(2, 3)
def test_inside_of_no_sync_no_gradient_travels(comm: Communicator, zero: int, bucket_bytes: int | None) -> None:
    model, optimizer = buckets(comm, zero, bucket_bytes)
    batch = np.arange(11)
    mine = share(batch, comm)
    optimizer.zero_grad()
    before, sent = latest(comm), model.meter.sent_messages
    with model.no_sync():
        with model.no_sync():
            backward_of(model, mine[:1], 1 / len(mine))
        backward_of(model, mine[1:2], 1 / len(mine))  # the inner one has not ended the outer one
    with pytest.raises(KeyError), model.no_sync():
        raise KeyError
    assert not averages(comm, before)
    assert zero == 3 or model.meter.sent_messages == sent
    own = gradients(initial(0), X[mine[:2]], LABELS[mine[:2]])
    for name, p in model.named_parameters():
        assert_allclose(p.grad.numpy(), own[name] * 2 / len(mine), rtol=1e-10, atol=1e-14, err_msg=name)
    backward_of(model, mine[2:], len(mine[2:]) / len(mine))  # nor has the exception left it
    optimizer.step()
    assert averages(comm, before)
    assert_weights(model, adam([batch]))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_between_microbatches_one_may_look_at_the_model_and_save_it(comm: Communicator, zero: int) -> None:
    model, optimizer = buckets(comm, zero)
    for step, batch in enumerate(batches(9, 4)):
        optimizer.zero_grad()
        for last, part, weight in microbatches(batch, 2, comm):
            with nullcontext() if last else model.no_sync():
                backward_of(model, part, weight)
            assert_weights(model, adam(batches(9, step)))
            optimizer.state_dict()
            with md.no_grad():
                model(md.tensor(X[: 1 + comm.rank]))
        optimizer.step()
    assert_weights(model, adam(batches(9, 4)))


@pytest.mark.parametrize("zero", [0, 2])
@on_ranks(2)
def test_gradients_of_no_sync_that_are_thrown_away_do_not_count(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    with model.no_sync():
        loss_of(model, np.arange(1 + 9 * comm.rank)).backward()
    train(model, optimizer, comm, [np.arange(7)])  # which begins with zero_grad
    assert_weights(model, adam([np.arange(7)]))


# -- count ------------------------------------------------------------------------------------------------------------

PADDED = np.where(np.random.default_rng(5).random(len(LABELS)) < 0.6, -1, LABELS)  # -1: no label
PADDED[:4] = -1  # so that rank 0 often has none at all


def told(samples: np.ndarray) -> np.ndarray:
    """Those that have a label."""
    return samples[PADDED[samples] >= 0]


def masked_loss(model: Any, samples: np.ndarray, reduction: str = "mean") -> md.Tensor:
    output = model(md.tensor(X[samples]))
    return F.cross_entropy(output, md.tensor(PADDED[samples]), ignore_index=-1, reduction=reduction)


def by_hand(model: Any, samples: np.ndarray, reduction: str = "mean") -> md.Tensor:
    """The same with a mask."""
    mask = PADDED[samples] >= 0
    each = F.cross_entropy(model(md.tensor(X[samples])), md.tensor(LABELS[samples]), reduction="none")
    total = (each * md.tensor(mask.astype(float))).sum()
    return total / max(mask.sum(), 1) if reduction == "mean" else total


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean over no labels is nan
@pytest.mark.parametrize("loss", [masked_loss, by_hand])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 4)
def test_means_over_unequal_numbers_of_tokens(comm: Communicator, zero: int, loss: Callable[..., md.Tensor]) -> None:
    model, optimizer = buckets(comm, zero)
    for batch in batches(12, 4):
        mine = share(batch, comm)
        optimizer.zero_grad()
        model.count(len(told(mine)))
        loss(model, mine).backward()
        optimizer.step()
    train(model, optimizer, comm, batches(9, 1))  # which is not told, and goes by the samples again
    assert_weights(model, adam([*map(told, batches(12, 4)), *batches(9, 1)]))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 4)
def test_tokens_of_several_microbatches_are_told_once(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    for batch in batches(12, 4):
        tokens = len(told(share(batch, comm)))
        optimizer.zero_grad()
        for last, part, _ in microbatches(batch, 3, comm):
            if last:
                model.count(tokens)
            with nullcontext() if last else model.no_sync():
                (masked_loss(model, part, "sum") / max(tokens, 1)).backward()
        model.clip_grad_norm_(0.5)
        optimizer.step()
    assert_weights(model, adam([told(batch) for batch in batches(12, 4)], clip=0.5))


@on_ranks(1, 2)
def test_a_count_below_zero_is_refused(comm: Communicator) -> None:
    model, _ = pair(comm, 0)
    with pytest.raises(ValueError, match=r"count\(-1\)"):
        model.count(-1)


@on_ranks(2)
def test_a_count_that_is_no_whole_number_is_refused(comm: Communicator) -> None:
    model, _ = pair(comm, 0)
    with pytest.raises(TypeError):
        model.count(2.5)


# -- beside it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(2, 3)
def test_gradients_may_be_set_to_zero_and_not_to_none(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    for batch in batches(5, 3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, share(batch, comm)).backward()
        optimizer.step()
    assert_weights(model, adam(batches(5, 3)))


@on_ranks(1, 3)
def test_buckets_of_a_model_that_has_been_trained_keep_the_optimizers_state(comm: Communicator) -> None:
    model = network()
    optimizer = md.optim.Adam(model.parameters(), lr=LR)
    for batch in batches(5, 3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    wrapped, same = parallel(model, optimizer, comm)
    train(wrapped, same, comm, batches(5, 6)[3:])
    assert_weights(wrapped, adam(batches(5, 6)))
    assert_array_equal([entry["step"] for entry in same.state_dict()["state"].values()], [6] * 4)
    clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize("zero", [0, 1])
@on_ranks(1, 2, 3)
def test_the_same_bits_with_parameters_in_two_groups(comm: Communicator, zero: int) -> None:
    model = network()
    weights, biases = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (2, 1))
    optimizer = md.optim.Adam([{"params": weights}, {"params": biases}], lr=LR)
    wrapped, own = data_parallel(model, optimizer, comm, zero, reproducible=4)
    for batch in batches(8, 3):
        own.zero_grad()
        mine = fixed_tree.share(4, comm.size, comm.rank)
        for i in mine:
            with nullcontext() if i == mine[-1] else wrapped.no_sync():
                loss_of(wrapped, np.array_split(batch, 4)[i]).backward()
        own.step()
    assert_weights(wrapped, adam(batches(8, 3)))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2)
def test_a_backward_may_be_for_the_input_only(comm: Communicator, zero: int) -> None:
    model, optimizer = buckets(comm, zero)
    train(model, optimizer, comm, batches(5, 1))
    model.requires_grad_(False)  # as the generator's step does with the discriminator
    x = md.tensor(X[:3], requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    model.requires_grad_(True)
    train(model, optimizer, comm, batches(5, 3)[1:])
    assert_weights(model, adam(batches(5, 3)))


@pytest.mark.parametrize("zero", [0, 1, 2])
@on_ranks(1, 2)
def test_a_parameter_that_no_model_has_is_clipped_with_the_others(comm: Communicator, zero: int) -> None:
    model, factor = Scale(2.0), md.nn.Parameter(md.tensor(np.array([3.0])))
    wrapped, _ = parallel(model, md.optim.SGD([model.p, factor], lr=0.1), comm, zero)
    numbers, x = column(comm)
    (wrapped(x) * factor).sum().backward()
    assert_allclose(wrapped.clip_grad_norm_(1.0).item(), np.hypot(3, 2) * numbers.mean(), rtol=1e-12)


class Pair(NamedTuple):
    y: md.Tensor
    twice: md.Tensor


@on_ranks(1, 2)
def test_outputs_may_be_named_tuples(comm: Communicator) -> None:
    class Both(Scale):
        def forward(self, x: md.Tensor) -> Any:
            return Pair(x * self.p, x * self.p * 2)

    model = Both(2.0)
    wrapped, _ = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm)
    numbers, x = column(comm)
    wrapped(x).twice.sum().backward()
    assert model.p.grad is not None
    assert_allclose(model.p.grad.numpy(), [2 * numbers.mean()])
