"""ZeRO's stages: what each rank holds and sends, and that the weights are those of one rank all the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import once_on_ranks as on_ranks
from test_buckets import EACH, Four, Scale, backward_of, column, failing, microbatches, parallel
from test_buckets import adam as adam_clipped
from test_data_parallel import (
    LABELS,
    X,
    adam,
    assert_same_bits,
    assert_weights,
    batches,
    copied,
    gradients,
    gradients_here,
    initial,
    loss_of,
    pair,
    share,
    train,
)

import minidist as md
from minidist import checkpoint
from minidist.comm import Communicator, simulate
from minidist.nn import functional as F
from minidist.parallel import SyncBatchNorm, assert_replicas_agree, bytes_per_rank

ABSENT = "zero=3"  # part of what is raised where a parameter is not there


def layers(*widths: int, bias: bool = True) -> md.nn.Sequential:
    """Linear layers one after the other."""
    md.manual_seed(3)
    return md.nn.Sequential(*(md.nn.Linear(a, b, bias) for a, b in pairwise(widths)))


def step(model: Any, optimizer: Any, x: np.ndarray) -> None:
    optimizer.zero_grad()
    model(md.tensor(x)).sum().backward()
    optimizer.step()


def sharded(comm: Communicator, zero: int, *widths: int, nbytes: int | None = None) -> Any:
    model = layers(*widths)
    return parallel(model, md.optim.Adam(model.parameters(), lr=0.01), comm, zero, nbytes)


# -- what a rank holds ------------------------------------------------------------------------------------------------


def held(model: Any) -> dict[str, int]:
    """Bytes of the arrays of a rank's parameters, gradients and optimizer; looked up as they lie there."""
    parts = model.optimizer.parts
    found = {
        "parameters": [a for part in parts for a in (part.flat.data, part.own_data)],
        "gradients": [a for part in parts for a in (part.flat._grad, part.own_grad)],
        "optimizer": [a for part in parts for a in part.state.values()],
    }
    return {kind: sum(a.nbytes for a in arrays if a is not None) for kind, arrays in found.items()}


@pytest.mark.parametrize("nbytes", [None, EACH, 1 << 30])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4)
def test_between_steps_a_rank_holds_what_the_formula_says(comm: Communicator, zero: int, nbytes: int | None) -> None:
    model, optimizer = sharded(comm, zero, 12, 24, 36, nbytes=nbytes)  # all sizes divide
    n = sum(p.numel() for p in model.parameters())
    for _ in range(2):
        step(model, optimizer, np.ones((2, 12), np.float32))
        assert sum(held(model).values()) == bytes_per_rank(zero, n, comm.size)
        model.state_dict(), optimizer.state_dict()
        assert sum(held(model).values()) == bytes_per_rank(zero, n, comm.size)
    whole = {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    cut = ["optimizer", "gradients", "parameters"][:zero]
    assert held(model) == {kind: nbytes // (comm.size if kind in cut else 1) for kind, nbytes in whole.items()}


@pytest.mark.parametrize("zero", [1, 2, 3])
@on_ranks(2, 3, 4, 5)
def test_chunks_that_do_not_divide_differ_by_an_element(comm: Communicator, zero: int) -> None:
    model, optimizer = sharded(comm, zero, 3, 7, 1)  # layers of 28 and 8
    step(model, optimizer, np.ones((2, 3), np.float32))
    parts, n = len(model.optimizer.parts), sum(p.numel() for p in model.parameters())
    arrays = 2 + (zero > 1) + (zero > 2)  # that are cut: Adam's two, then gradients, then parameters
    assert abs(sum(held(model).values()) - bytes_per_rank(zero, n, comm.size)) < 4 * parts * arrays


@on_ranks(1, 2, 3)
def test_with_zero_3_the_whole_arrays_are_freed(comm: Communicator) -> None:
    model = layers(5, 6, 7)
    optimizer = md.optim.Adam(model.parameters())
    arrays = [weakref.ref(model[0].weight.data.base)]

    def note(module: Any, *_: Any) -> None:  # registered first, so called before the layer lets go
        assert module.weight.data.any()
        arrays.append(weakref.ref(module.weight.data.base))

    def note_gradient(p: Any) -> None:
        arrays.append(weakref.ref(p.grad.data.base))

    for layer in model:
        layer.register_forward_hook(note)
        for p in layer.parameters():
            p.register_post_accumulate_grad_hook(note_gradient)
    wrapped, own = parallel(model, optimizer, comm, zero=3)
    assert arrays[0]() is None
    loss = wrapped(md.tensor(np.ones((2, 5), np.float32))).sum()
    assert len(arrays) == 3
    assert all(array() is None for array in arrays)  # though the graph is there
    loss.backward()
    assert len(arrays) == 7
    assert all(array() is None for array in arrays)
    own.step()


class Inside(md.nn.Module):
    """A layer around another: its own parameter is there while the inner one's are."""

    def __init__(self, width: int) -> None:
        self.inner, self.shift = md.nn.Linear(width, width), md.nn.Parameter(md.ones(width))

    def forward(self, x: md.Tensor) -> md.Tensor:
        return (self.inner(x) + self.shift).tanh() * self.shift


@pytest.mark.parametrize("nested", [False, True])
@on_ranks(1, 2, 4)
def test_with_zero_3_a_rank_has_its_chunks_and_a_layer_at_most(comm: Communicator, nested: bool) -> None:
    sizes = [8, 16, 4, 20, 8]
    inner = md.nn.Sequential(*(Inside(16) for _ in range(4))) if nested else layers(*sizes)
    n = sum(p.numel() for p in inner.parameters())
    largest = 16 * 17 + 16 if nested else max(a * b + b for a, b in pairwise(sizes))
    model, optimizer = parallel(inner, md.optim.SGD(inner.parameters(), lr=0.1), comm, zero=3)
    model.meter.reset()
    x = np.ones((2, 16 if nested else 8), np.float32)
    for _ in range(2):
        step(model, optimizer, x)
    with md.no_grad():
        model(md.tensor(x))
    memory = model.meter.memory
    assert memory["parameters"] == 4 * n // comm.size + 4 * largest
    assert 4 * largest < memory["gradients"] <= 4 * n // comm.size + 2 * 4 * largest
    with model.whole():
        pass
    assert memory["parameters"] < model.meter.memory["parameters"] == 4 * n // comm.size + 4 * n


@pytest.mark.parametrize("kind", ["frozen", "unused", "twice"])
@on_ranks(2, 4)
def test_nor_more_where_gradients_of_a_layer_are_finished_late_or_never(comm: Communicator, kind: str) -> None:
    inner = layers(*[16] * 7, bias=False)
    for layer in list(inner)[1:]:
        layer.requires_grad_(kind != "frozen")
        if kind == "unused":
            setattr(layer, "spare", md.nn.Parameter(md.ones(4)))  # noqa: B010
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in inner)
    n = sum(p.numel() for p in inner.parameters())
    model, _ = parallel(inner, md.optim.SGD(inner.parameters(), lr=0.1), comm, zero=3)
    x = md.tensor(np.ones((2, 16), np.float32))
    (model(x).sum() + model(x).sum() if kind == "twice" else model(x).sum()).backward()
    assert model.meter.memory["parameters"] <= 4 * n // comm.size + 4 * largest


@pytest.mark.parametrize("bucket_bytes", [EACH, 1 << 30])
@on_ranks(1, 2, 4)
def test_with_zero_2_whole_gradients_of_two_buckets_are_there_at_most(comm: Communicator, bucket_bytes: int) -> None:
    inner = layers(*[16] * 7, bias=False)
    model, optimizer = parallel(inner, md.optim.SGD(inner.parameters(), lr=0.1), comm, 2, bucket_bytes)
    for _ in range(2):
        step(model, optimizer, np.ones((2, 16), np.float32))
    layer = 4 * 16 * 16
    assert model.meter.memory["gradients"] == 6 * layer // comm.size + (2 if bucket_bytes == EACH else 6) * layer
    assert held(model)["gradients"] == 6 * layer // comm.size


@on_ranks(1, 2)
def test_the_meter_sees_the_optimizers_state_of_the_first_step(comm: Communicator) -> None:
    model, optimizer = sharded(comm, 1, 12, 24)
    step(model, optimizer, np.ones((2, 12), np.float32))
    assert model.meter.memory["optimizer"] == held(model)["optimizer"]


# -- what it sends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "zero, bucket_bytes, buckets", [(0, 1, 4), (1, 1, 4), (2, None, 1), (2, 200, 2), (2, 1, 4), (3, None, 2)]
)
def test_a_step_sends_what_the_formula_says(size: int, zero: int, bucket_bytes: int | None, buckets: int) -> None:
    def program(comm: Communicator, steps: int) -> tuple[int, int]:
        model, optimizer = pair(comm, zero, algorithm="ring", bucket_bytes=bucket_bytes)
        assert len(model.buckets) == buckets
        model.meter.reset()
        train(model, optimizer, comm, batches(8, steps))
        return model.meter.sent_bytes, model.meter.sent_messages

    once, thrice = (simulate(program, size, steps) for steps in (1, 3))
    others, parameters = size - 1, len(initial(0))
    times = 3 if zero == 3 else 2
    nbytes = 8 * sum(array.size for array in initial(0).values())
    told = [8 + 8 * parameters] if buckets == 1 else [16, 8 + 8 * parameters]
    # Among all ranks, n (P-1)/P bytes each, `times` times; beside what they tell one another.
    assert (thrice.bytes - once.bytes) / 2 == times * nbytes * others + size * others * sum(told)
    lg = others.bit_length()
    assert (thrice.messages - once.messages) / 2 == times * size * others * buckets + size * lg * len(told)
    for a, b, ours, theirs in zip(once.bytes_by_rank, thrice.bytes_by_rank, once.results, thrice.results, strict=True):
        assert theirs[0] - ours[0] == b - a  # the meter counts the same
        even = times * nbytes * others / size + others * sum(told)
        assert abs((b - a) / 2 - even) <= times * 8 * buckets  # spread evenly, but for an element of each chunk


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_looking_at_a_sharded_model_costs_a_gather(size: int) -> None:
    def program(comm: Communicator, look: Callable[[Any], None] | None) -> None:
        model, _ = pair(comm, 3, algorithm="ring")
        if look is not None:
            look(model)

    def forward(model: Any) -> None:
        with md.no_grad():
            model(md.tensor(X[:3]))

    def whole(model: Any) -> None:
        with model.whole():
            forward(model)

    nbytes = 8 * sum(array.size for array in initial(0).values())
    nothing = simulate(program, size, None).bytes
    for look in (forward, whole, lambda model: model.state_dict(), lambda model: model.load_state_dict(initial(1))):
        assert simulate(program, size, look).bytes - nothing == nbytes * (size - 1)


# -- parameters that are not there ------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
def test_parameters_used_elsewhere_than_in_their_modules_forward_are_absent(comm: Communicator) -> None:
    model, optimizer = pair(comm, 3)
    inner, weight = model.module, model.module[0].weight
    for use in (
        lambda: weight * 2,
        lambda: (weight * weight).sum(),
        lambda: F.linear(md.tensor(X), weight),
        lambda: weight.reshape(-1).sum(),
        lambda: weight[0] + 1,
        lambda: md.cat([weight, weight]),
        lambda: np.linalg.norm(weight.data),
        lambda: inner[0].forward(md.tensor(X)),
        lambda: inner.state_dict(),
    ):
        with pytest.raises(RuntimeError, match=ABSENT):
            use()
    for change in (lambda: weight.fill_(1), lambda: weight.copy_(0), lambda: inner.load_state_dict(initial(1))):
        with pytest.raises((RuntimeError, ValueError)), md.no_grad():
            change()
    assert (weight.shape, weight.dtype, weight.numel()) == ((5, 6), np.float64, 30)
    train(model, optimizer, comm, batches(5, 2))
    assert_weights(model, adam(batches(5, 2)))


@pytest.mark.parametrize(
    "read",
    [
        lambda p: p.numpy(),
        lambda p: p.tolist(),
        lambda p: np.array(p),
        lambda p: p.data.copy(),
        lambda p: F.embedding(md.tensor([0]), p).numpy(),
    ],
    ids=["numpy", "tolist", "array", "copy", "embedding"],
)
@on_ranks(1)
def test_an_absent_parameter_cannot_be_read(comm: Communicator, read: Callable[[Any], Any]) -> None:
    model, _ = pair(comm, 3)
    with pytest.raises(RuntimeError, match=ABSENT):
        read(model.module[0].weight)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4)
def test_in_whole_all_parameters_are_there_and_changes_stay(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    with model.whole():
        assert_same_bits(model.module, initial(0))
        with md.no_grad():
            for name, p in model.named_parameters():
                p.copy_(initial(7)[name])
        loss_of(model, share(np.arange(5), comm))  # a forward changes nothing
    assert_same_bits(model, initial(7))
    with pytest.raises(KeyError), model.whole(), md.no_grad():
        for p in model.parameters():
            p.fill_(1)
        raise KeyError
    assert all((array == 1).all() for array in model.state_dict().values())
    model.load_state_dict(initial(0))
    train(model, optimizer, comm, batches(5, 3))
    assert_weights(model, adam(batches(5, 3)))


@pytest.mark.parametrize("zero", [0, 3])
@on_ranks(1, 2, 3)
def test_a_graph_may_be_made_in_whole_or_outlive_it(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    for i, batch in enumerate(batches(5, 4)):
        optimizer.zero_grad()
        with model.whole() if i % 2 else nullcontext():
            loss = loss_of(model, share(batch, comm))
        with nullcontext() if i % 2 else model.whole():
            pass
        loss.backward()
        optimizer.step()
    assert_weights(model, adam(batches(5, 4)))
    loss = loss_of(model, share(np.arange(5), comm))
    with model.whole(), md.no_grad():
        model.module[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
    loss_of(model, share(np.arange(5), comm))  # ends what that backward has left under way


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("inside", ["state_dict", "backward", "step", "whole"])
@on_ranks(1, 2, 3)
def test_in_whole_one_may_do_what_one_does_elsewhere(comm: Communicator, zero: int, inside: str) -> None:
    model, optimizer = pair(comm, zero)
    with model.whole():
        if inside == "state_dict":
            model.state_dict()
        elif inside == "whole":
            with model.whole():
                pass
        else:
            loss_of(model, share(np.arange(8), comm)).backward()
            if inside == "step":
                optimizer.step()
        assert_weights(model.module, adam(batches(8, 1)) if inside == "step" else initial(0))
    if inside == "backward":
        optimizer.step()
    assert_weights(model, initial(0) if inside in ("state_dict", "whole") else adam(batches(8, 1)))


@on_ranks(1, 2)
def test_an_array_put_in_a_parameters_place_in_whole_is_refused(comm: Communicator) -> None:
    model, _ = pair(comm, 3)
    with pytest.raises(RuntimeError, match="replaced by another array"), model.whole():
        model.module[0].weight.data = np.zeros((5, 6))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_an_evaluation_sees_the_parameters_as_they_are(comm: Communicator, zero: int) -> None:
    def output(w: dict[str, np.ndarray]) -> np.ndarray:
        return np.maximum(X @ w["0.weight"].T + w["0.bias"], 0) @ w["2.weight"].T + w["2.bias"]

    model, optimizer = pair(comm, zero)
    for number, batch in enumerate(batches(5, 3)):
        for inside in (nullcontext(), model.whole()):
            with md.no_grad(), inside:
                for network in (model, model.module):
                    assert_allclose(network(md.tensor(X)).numpy(), output(adam(batches(5, number))), rtol=1e-8)
        train(model, optimizer, comm, [batch])


def fails_at(module: md.nn.Module) -> Callable[[], None]:
    """Make a module's forward raise after it; returns what ends that."""

    def raises(*_: Any) -> None:
        raise KeyError("in a forward")

    return module.register_forward_pre_hook(raises)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("zero", [2, 3])
@on_ranks(1, 2, 3)
def test_after_a_forward_or_backward_that_failed_training_goes_on(comm: Communicator, zero: int, where: int) -> None:
    model, optimizer = pair(comm, zero)
    for batch in batches(5, 3):
        for recording in (md.enable_grad(), md.no_grad()):
            end = fails_at(model.module[where])
            with recording, pytest.raises(KeyError, match="in a forward"):
                model(md.tensor(X[: 1 + comm.rank]))
            end()
        optimizer.zero_grad()
        with failing(model.module[0].bias):
            loss_of(model, np.arange(1 + comm.rank)).backward()
        train(model, optimizer, comm, [batch])
    assert_weights(model, adam(batches(5, 3)))


@on_ranks(1, 2)
def test_a_forward_that_failed_leaves_no_old_parameters_behind(comm: Communicator) -> None:
    model, optimizer = pair(comm, 3)
    loss_of(model, share(np.arange(8), comm)).backward()
    with md.no_grad(), pytest.raises(ValueError, match="do not match"):
        model.module[2](md.tensor(np.ones((2, 3))))  # of a wrong width
    optimizer.step()
    assert_weights(model, adam(batches(8, 1)))


# -- the same layers on all ranks -------------------------------------------------------------------------------------


class Either(md.nn.Module):
    def __init__(self) -> None:
        self.one, self.two = (md.nn.Linear(3, 3).double() for _ in "12")

    def forward(self, x: md.Tensor, one: bool) -> md.Tensor:
        return (self.one if one else self.two)(x)


@on_ranks(2, 3)
def test_other_layers_of_equal_shape_on_some_ranks_are_refused_on_all(comm: Communicator) -> None:
    either = Either()
    model, _ = parallel(either, md.optim.SGD(either.parameters(), lr=0.1), comm, 3)
    with pytest.raises(RuntimeError, match="different layers, or in another order"):
        model(md.tensor(np.ones((2, 3))), comm.rank > 0).sum().backward()
    model(md.tensor(np.ones((2, 3))), True)  # ends what that backward has left under way


@on_ranks(2, 3)
def test_and_the_next_step_may_be_right(comm: Communicator) -> None:
    either = Either()
    model, optimizer = parallel(either, md.optim.SGD(either.parameters(), lr=0.1), comm, 3)
    with pytest.raises(RuntimeError, match="different layers"):
        model(md.tensor(np.ones((2, 3))), comm.rank > 0).sum().backward()
    optimizer.zero_grad()
    model(md.tensor(np.ones((2, 3))), True).sum().backward()
    optimizer.step()


class Below(md.nn.Module):
    """A layer below one of which a rank may use some parameters only: both go through the same layers."""

    def __init__(self) -> None:
        self.below, self.top = md.nn.Linear(1, 1).double(), Four()

    def forward(self, x: md.Tensor, names: str) -> md.Tensor:
        return self.top(self.below(x), names)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_ranks_may_use_other_parameters_of_the_same_layers(zero: int) -> None:
    def program(comm: Communicator) -> None:
        model = Below()
        before = copied(model.state_dict())
        wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero, 1 << 30)
        _, x = column(comm)
        wrapped(x, "abcd" if comm.rank else "abc").sum().backward()
        optimizer.step()
        h = [(rank + 1) ** 2 * before["below.weight"] + before["below.bias"] for rank in range(comm.size)]
        expected = before["top.d"] - 0.1 * np.sum(h[1:]) / comm.size
        assert_allclose(wrapped.state_dict()["top.d"], expected, rtol=1e-12)

    simulate(program, 3)


class Optional(Scale):
    def forward(self, x: md.Tensor, use: bool = True) -> md.Tensor:
        return x * self.p if use else x * 1


class Skips(md.nn.Module):
    """A layer below one that may do nothing."""

    def __init__(self) -> None:
        self.below, self.top = md.nn.Linear(1, 1).double(), Optional(3.0)

    def forward(self, x: md.Tensor, use: bool) -> md.Tensor:
        return self.top(self.below(x), use)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_may_use_nothing_of_a_layer_that_it_goes_through(zero: int) -> None:
    def program(comm: Communicator) -> None:
        model = Skips()
        before = copied(model.state_dict())
        wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero)
        _, x = column(comm)
        wrapped(x, comm.rank > 0).sum().backward()
        optimizer.step()
        h = [(rank + 1) ** 2 * before["below.weight"] + before["below.bias"] for rank in range(1, comm.size)]
        assert_allclose(wrapped.state_dict()["top.p"], [3 - 0.1 * np.sum(h) / comm.size], rtol=1e-12)

    simulate(program, 3)


# -- what models are made of ------------------------------------------------------------------------------------------

WORDS, DIMS, LENGTH, TEXTS = 7, 6, 5, 9
rng = np.random.default_rng(7)
TEXT = rng.integers(0, WORDS, (TEXTS, LENGTH))
NEXT = np.where(rng.random(TEXT.shape) < 0.3, -1, rng.integers(0, WORDS, TEXT.shape))  # -1: no label
POSITIONS = rng.standard_normal((LENGTH, DIMS))
del rng


class Transformer(md.nn.Module):
    """Layers of many kinds, parameters of its own (one of no dims), a layer used twice, tied weights."""

    def __init__(self, comm: Communicator | None) -> None:
        nn = md.nn
        self.embed = nn.Embedding(WORDS, DIMS, padding_idx=0)
        self.positions = nn.Parameter(md.tensor(POSITIONS))
        self.gain, self.nothing = nn.Parameter(md.tensor(np.array(1.5))), nn.Parameter(md.tensor(np.zeros((0, 2))))
        self.norm, self.rms = nn.LayerNorm(DIMS), nn.RMSNorm(DIMS)
        self.attend = nn.MultiHeadAttention(DIMS, 2, batch_first=True)
        self.cross = nn.MultiHeadAttention(DIMS, 3, batch_first=True)
        self.twice = nn.Linear(DIMS, DIMS)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(2) if comm is None else SyncBatchNorm(2, comm)
        self.out = nn.Linear(DIMS, WORDS)
        self.out.weight = self.embed.weight

    def forward(self, words: md.Tensor) -> md.Tensor:
        h = self.norm(self.embed(words) + self.positions)
        h = h + self.attend(h, h, h, need_weights=False)[0] * self.gain
        h = h + self.cross(h, self.rms(h), self.twice(h))[0]  # cuts its weights into views
        h = self.twice(h).tanh() + self.nothing.sum()
        return self.out(h + self.batch_norm(self.conv(h.unsqueeze(1))).mean(1))


def transformer(comm: Communicator | None) -> Transformer:
    md.manual_seed(5)
    model = Transformer(comm)
    model.to(np.float64)
    return model


def text_loss(model: Any, rows: np.ndarray) -> md.Tensor:
    return F.cross_entropy(model(md.tensor(TEXT[rows])).reshape(-1, WORDS), md.tensor(np.abs(NEXT[rows]).reshape(-1)))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_layers_of_all_kinds_give_what_they_give_on_one_rank(comm: Communicator, zero: int) -> None:
    alone, inner = transformer(None), transformer(comm)
    reference = md.optim.AdamW(alone.parameters(), lr=0.01)
    model, optimizer = parallel(inner, md.optim.AdamW(inner.parameters(), lr=0.01), comm, zero, 300)
    for rows in (np.arange(TEXTS), np.arange(4), np.arange(3, TEXTS)):
        reference.zero_grad()
        text_loss(alone, rows).backward()
        norm = md.optim.clip_grad_norm_(alone.parameters(), 0.5)
        reference.step()
        optimizer.zero_grad()
        text_loss(model, share(rows, comm)).backward()
        assert_allclose(model.clip_grad_norm_(0.5).item(), norm.item(), rtol=1e-9)
        optimizer.step()
    expected = alone.state_dict()
    for name, array in model.state_dict().items():
        assert_allclose(array, expected[name], rtol=1e-8, atol=1e-9, err_msg=name)
    alone.eval(), model.eval()
    with md.no_grad():
        assert_allclose(model(md.tensor(TEXT)).numpy(), alone(md.tensor(TEXT)).numpy(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("zero", [0, 2, 3])
@on_ranks(1, 2, 3)
def test_a_second_backward_adds_the_same_again(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    loss = loss_of(model, share(np.arange(7), comm))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    whole = np.concatenate([g.ravel() for g in gradients(initial(0), X[:7], LABELS[:7]).values()])
    mine, averaged = gradients_here(model)
    assert_allclose(averaged, 2 * whole[mine], rtol=1e-12, atol=1e-14)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
    train(model, optimizer, comm, [np.arange(7, 12)])


@on_ranks(1, 2)
def test_a_graph_that_is_retained_does_not_retain_the_parameters(comm: Communicator) -> None:
    model, _ = sharded(comm, 3, 8, 8, 8)
    arrays: list[Any] = []
    for layer in model.module:
        layer.weight.register_post_accumulate_grad_hook(lambda p: arrays.append(weakref.ref(p.data.base)))
    # Registered after data_parallel's own hook, but before the bias lets the layer go.
    loss = model(md.tensor(np.ones((2, 8), np.float32))).sum()
    loss.backward(retain_graph=True)
    assert len(arrays) == 2
    assert not any(array() is not None for array in arrays)


# -- all together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
@on_ranks(2, 3, 5)
def test_clipping_accumulation_and_shards_together(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero, algorithm="ring", bucket_bytes=None if zero == 3 else 200)
    for batch in batches(9, 6):
        optimizer.zero_grad()
        for last, part, weight in microbatches(batch, 3, comm):
            with nullcontext() if last else model.no_sync():
                backward_of(model, part, weight)
        model.clip_grad_norm_(0.2)
        optimizer.step()
    assert_weights(model, adam_clipped(batches(9, 6), clip=0.2))
    assert_replicas_agree(model, comm)


@pytest.mark.parametrize("zero", [2, 3])
@on_ranks(1, 2, 3)
def test_gradients_of_several_averages_add_up_until_they_are_forgotten(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    for forget in (optimizer.zero_grad, model.zero_grad):
        forget()
        expected = np.zeros(59)
        for batch in (np.arange(7), np.arange(7, 9), np.arange(2, 23)):
            loss_of(model, share(batch, comm)).backward()
            expected = expected + np.concatenate(
                [g.ravel() for g in gradients(initial(0), X[batch], LABELS[batch]).values()]
            )
            assert all(p.grad is None for p in model.parameters())
        mine, averaged = gradients_here(model)
        assert_allclose(averaged, expected[mine], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("zero", [2, 3])
@on_ranks(1, 2)
def test_zero_grad_of_the_model_that_was_wrapped(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    for batch in batches(5, 3):
        model.module.zero_grad()
        loss_of(model, share(batch, comm)).backward()
        optimizer.step()
    assert_weights(model, adam(batches(5, 3)))


@pytest.mark.parametrize("zero", [0, 2, 3])
@on_ranks(1, 2, 3)
def test_gradients_of_a_part_of_the_model_may_be_forgotten(comm: Communicator, zero: int) -> None:
    model, _ = pair(comm, zero)
    batches_here = [np.arange(7), np.arange(5, 14)]
    for batch in batches_here:
        model.module[0].zero_grad()
        loss_of(model, share(batch, comm)).backward()
    first, second = (gradients(initial(0), X[batch], LABELS[batch]) for batch in batches_here)
    expected = {name: g + (first[name] if name.startswith("2") else 0) for name, g in second.items()}
    mine, averaged = gradients_here(model)
    assert_allclose(averaged, np.concatenate([g.ravel() for g in expected.values()])[mine], rtol=1e-12, atol=1e-13)


# -- state ------------------------------------------------------------------------------------------------------------


def assert_same_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        assert state["state"][i].keys() == entry.keys()
        for name, value in entry.items():
            assert_array_equal(state["state"][i][name], value, strict=True)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
@on_ranks(2, 4, seeds=1)
def test_a_run_goes_on_on_other_ranks_with_another_stage(comm: Communicator, before: int, after: int) -> None:
    steps = batches(5, 8)
    fewer = comm.split(0 if comm.rank < comm.size - 1 else None)
    model, optimizer = pair(comm, before)
    train(model, optimizer, comm, steps[:3])
    weights, state = copied(model.state_dict()), optimizer.state_dict()
    if fewer is not None:
        model, optimizer = pair(fewer, after, seed=5)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert_same_bits(model, weights)
        train(model, optimizer, fewer, steps[3:])
        assert_weights(model, adam(steps))
    model, optimizer = pair(comm, before, dtype=np.float32)
    train(model, optimizer, comm, steps[:2], dtype=np.float32)
    weights, state = copied(model.state_dict()), optimizer.state_dict()
    other, its_optimizer = pair(comm, after, seed=5, dtype=np.float32)
    other.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    assert_same_bits(other, weights)  # every bit arrives
    assert_same_state(its_optimizer.state_dict(), state)


@pytest.mark.parametrize("zero", [1, 2, 3])
@on_ranks(1, 2)
def test_up_to_two_ranks_all_stages_give_the_same_bits(comm: Communicator, zero: int) -> None:
    runs = []
    for stage in (0, zero):  # a sum of two has one order
        model, optimizer = pair(comm, stage, dtype=np.float32)
        train(model, optimizer, comm, batches(6, 5), dtype=np.float32)
        runs.append(copied(model.state_dict()))
    assert_same_bits(model, runs[0])


def test_a_checkpoint_of_three_ranks_goes_on_on_five_and_on_one(tmp_path: Path) -> None:
    steps, path = batches(5, 9), tmp_path / "model.safetensors"

    def first(comm: Communicator) -> dict[str, Any]:
        model, optimizer = pair(comm, 3)
        train(model, optimizer, comm, steps[:4])
        state = model.state_dict()  # every rank asks
        if comm.rank == 0:
            checkpoint.save(path, state)
        return optimizer.state_dict()

    def then(comm: Communicator, zero: int, state: dict[str, Any]) -> None:
        model, optimizer = pair(comm, zero, seed=9)
        model.load_state_dict(checkpoint.load(path))
        optimizer.load_state_dict(state)
        train(model, optimizer, comm, steps[4:])
        assert_weights(model, adam(steps))

    states = simulate(first, 3).results
    for state in states[1:]:
        assert_same_state(state, states[0])
    for zero in range(4):
        simulate(then, 5, zero, states[0])
        simulate(then, 1, zero, states[0])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2)
def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    train(model, optimizer, comm, batches(5, 2))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="groups of"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert_same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize("zero", [1, 2, 3])
@on_ranks(1, 2, 3)
def test_sgd_without_state_and_with_a_momentum_that_comes_later(comm: Communicator, zero: int) -> None:
    model = Four()
    wrapped, optimizer = parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero, None)
    numbers, x = column(comm)
    position, velocity = copied(wrapped.state_dict()), 0.0
    for momentum in (0.0, 0.0, 0.9, 0.9):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["momentum"] = momentum
        optimizer.zero_grad()
        wrapped(x, "abcd").sum().backward()
        optimizer.step()
        velocity = momentum * velocity + numbers.mean()
        position = {name: array - 0.1 * velocity for name, array in position.items()}
        if not momentum:
            velocity = 0.0
    assert_weights(wrapped, position, rtol=1e-12)


# -- hooks of modules -------------------------------------------------------------------------------------------------


def test_hooks_are_called_around_a_modules_forward_until_they_are_removed() -> None:
    model = layers(2, 3, 2)
    said: list[Any] = []
    removes = [
        model[1].register_forward_pre_hook(lambda m, args: said.append(("before", m, args))),
        model[1].register_forward_hook(lambda m, args, y: said.append(("after", m, args, y))),
        model[1].register_forward_hook(lambda *_: said.append(("last",))),
        model.register_forward_pre_hook(lambda m, args: said.append(("outside", m))),
    ]
    x = md.tensor(np.ones((1, 2), np.float32))
    with md.no_grad():
        y = model(x)
    outside, before, after, last = said
    h = before[2][0]
    assert outside == ("outside", model)
    assert before[:2] == ("before", model[1])
    assert_allclose(h.numpy(), x.numpy() @ model[0].weight.numpy().T + model[0].bias.numpy(), rtol=1e-6)
    assert after[:2] == ("after", model[1])
    assert after[2][0] is h
    assert after[3] is y
    assert last == ("last",)
    said.clear()
    model[1].forward(h)
    assert not said  # only a call is one
    for remove in (*removes, *removes):  # twice does no harm
        remove()
    model(x)
    assert not said
    assert "hook" not in repr(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert layers(2, 2)._hooks == ()  # each module has its own


def test_a_hook_registered_twice_is_removed_once() -> None:
    model = md.nn.ReLU()
    said: list[int] = []

    def hook(*_: Any) -> None:
        said.append(1)

    first, _ = model.register_forward_hook(hook), model.register_forward_hook(hook)
    first()
    model(md.tensor([1.0]))
    assert said == [1]
