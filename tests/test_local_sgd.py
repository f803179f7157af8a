"""Local SGD and DiLoCo: all ranks' training, and the averages between, written down here in NumPy for all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.collectives import all_gather
from minidist.comm import Communicator, simulate
from minidist.nn import functional as F
from minidist.parallel import ReplicasDisagree, assert_replicas_agree, data_parallel
from minidist.parallel.local_sgd import LocalSGD, diloco, local_sgd

IN, HIDDEN, OUT, BATCH = 5, 4, 3, 6
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
SHAPES = [(HIDDEN, IN), (HIDDEN,), (OUT, HIDDEN), (OUT,)]
N = sum(int(np.prod(shape)) for shape in SHAPES)
LR = {"sgd": 0.1, "momentum": 0.1, "adam": 0.02}
OUTERS = [None, (0.7, 0.9), (0.5, 0.0), (1.0, 0.3)]
State = dict[str, np.ndarray]
every_outer = pytest.mark.parametrize("outer", OUTERS, ids=str)


def initial(seed: int = 0) -> State:
    rng = np.random.default_rng(100 + seed)
    return {name: rng.standard_normal(shape) for name, shape in zip(NAMES, SHAPES)}


def samples(rank: int, step: int, n: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """What this rank sees in this step, and nobody else, nor in any other."""
    rng = np.random.default_rng((7, rank, step))
    return rng.standard_normal((n, IN)) + rank, rng.standard_normal((n, OUT))


# -- the reference ----------------------------------------------------------------------------------------------------


def gradients(w: State, x: np.ndarray, y: np.ndarray) -> State:
    """Of the mean squared error of the network with one hidden layer of tanh, by the chain rule."""
    a = np.tanh(x @ w["0.weight"].T + w["0.bias"])
    dz = 2 * (a @ w["2.weight"].T + w["2.bias"] - y) / y.size
    dh = dz @ w["2.weight"] * (1 - a**2)
    return dict(zip(NAMES, [dh.T @ x, dh.sum(0), dz.T @ a, dz.sum(0)]))


class Inner:
    """One rank's optimizer: a step on one tensor after another."""

    def __init__(self, kind: str):
        self.kind = kind
        self.m: State = {}
        self.v: State = {}
        self.steps = 0

    def step(self, w: State, g: State) -> None:
        self.steps += 1
        for name in w:
            m, v = self.m.get(name, 0), self.v.get(name, 0)
            if self.kind == "adam":
                self.m[name], self.v[name] = 0.9 * m + 0.1 * g[name], 0.999 * v + 0.001 * g[name] ** 2
                mean, square = self.m[name] / (1 - 0.9**self.steps), self.v[name] / (1 - 0.999**self.steps)
                w[name] = w[name] - LR["adam"] * mean / (np.sqrt(square) + 1e-8)
            else:
                self.m[name] = (0.9 * m if self.kind == "momentum" else 0) + g[name]
                w[name] = w[name] - LR[self.kind] * self.m[name]


def reference(ranks: int, averages_after: list[int], steps: int, outer: Any, kind: str) -> list[State]:
    """Each rank's weights after so many steps, with an average after those steps (counted from 1)."""
    lr, momentum = outer or (1.0, 0.0)
    weights, inner = [initial() for _ in range(ranks)], [Inner(kind) for _ in range(ranks)]
    before, velocity = initial(), {name: np.zeros(shape) for name, shape in zip(NAMES, SHAPES)}
    for step in range(1, steps + 1):
        for rank in range(ranks):
            inner[rank].step(weights[rank], gradients(weights[rank], *samples(rank, step)))
        if step in averages_after:
            for name in NAMES:
                delta = before[name] - sum(w[name] for w in weights) / ranks
                velocity[name] = momentum * velocity[name] + delta
                before[name] = before[name] - lr * (delta + momentum * velocity[name])
            weights = [dict(before) for _ in range(ranks)]
    return weights


# -- what the ranks do ------------------------------------------------------------------------------------------------


def network(seed: int = 0, dtype: Any = np.float64, device: str = "cpu") -> md.nn.Sequential:
    model = md.nn.Sequential(md.nn.Linear(IN, HIDDEN), md.nn.Tanh(), md.nn.Linear(HIDDEN, OUT)).to(device, dtype)
    model.load_state_dict(initial(seed))
    return model


def inner_optimizer(model: Any, kind: str) -> md.optim.Optimizer:
    if kind == "adam":
        return md.optim.Adam(model.parameters(), lr=LR[kind])
    return md.optim.SGD(model.parameters(), lr=LR[kind], momentum=0.9 if kind == "momentum" else 0)


def pair(
    comm: Communicator, every: int, kind: str = "momentum", dtype: Any = np.float64, **options: Any
) -> tuple[Any, LocalSGD]:
    """The networks begin differently: rank 0's weights count."""
    model = network(comm.rank, dtype)
    return local_sgd(model, inner_optimizer(model, kind), comm, every, **options)


def loss_of(model: Any, rank: int, step: int) -> md.Tensor:
    device, dtype = model[0].weight.device, model[0].weight.dtype
    x, y = (md.tensor(array, dtype=dtype, device=device) for array in samples(rank, step))
    return F.mse_loss(model(x), y)


def train(model: Any, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def copied(model: Any) -> State:
    return {name: np.array(md.Tensor(array)) for name, array in model.state_dict().items()}


def assert_weights(model: Any, expected: State, rtol: float = 1e-10) -> None:
    for name, array in copied(model).items():
        assert_allclose(array, expected[name], rtol=rtol, atol=rtol, err_msg=name)


def assert_same_bits(model: Any, expected: State) -> None:
    for name, array in copied(model).items():
        assert_array_equal(array, expected[name], err_msg=name, strict=True)


# -- equivalence ------------------------------------------------------------------------------------------------------


@every_outer
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", list(LR))
@on_ranks(1, 2, 3, 4, 5, seeds=1)
def test_it_is_the_papers_algorithm(comm: Communicator, kind: str, every: int, outer: Any) -> None:
    model, optimizer = pair(comm, every, kind, outer=outer)
    train(model, optimizer, comm.rank, range(1, 11))
    averages = [step for step in range(1, 11) if step % every == 0]
    assert_weights(model, reference(comm.size, averages, 10, outer, kind)[comm.rank])
    optimizer.synchronise()  # with every=3 one step is left over, and may not be the last
    averages = sorted({*averages, 10})
    assert_weights(model, reference(comm.size, averages, 10, outer, kind)[comm.rank])
    assert_replicas_agree(model, comm)
    train(model, optimizer, comm.rank, range(11, 16))
    averages += [step for step in range(11, 16) if (step - 10) % every == 0]  # counted anew from the last average
    assert_weights(model, reference(comm.size, averages, 15, outer, kind)[comm.rank])


@pytest.mark.parametrize("algorithm", ["naive", "ring", "recursive_doubling"])
@on_ranks(1, 2, 3, 4, 5)
def test_every_all_reduce_will_do(comm: Communicator, algorithm: str) -> None:
    model, optimizer = pair(comm, 4, outer=(0.7, 0.9), algorithm=algorithm)
    train(model, optimizer, comm.rank, range(1, 9))
    assert_weights(model, reference(comm.size, [4, 8], 8, (0.7, 0.9), "momentum")[0])
    assert_replicas_agree(model, comm)


@on_ranks(1, 2, 3, 4, 5)
def test_an_average_after_each_step_of_plain_sgd_is_data_parallelism(comm: Communicator) -> None:
    model, optimizer = pair(comm, 1, "sgd")
    train(model, optimizer, comm.rank, range(1, 9))
    w = initial()
    for step in range(1, 9):
        every_ranks = [gradients(w, *samples(rank, step)) for rank in range(comm.size)]
        w = {name: w[name] - LR["sgd"] * sum(g[name] for g in every_ranks) / comm.size for name in NAMES}
    assert_weights(model, w)


@on_ranks(1, 2, 3)
def test_diloco_is_local_sgd_with_the_papers_outer_optimizer(comm: Communicator) -> None:
    model = network(comm.rank)
    model, optimizer = diloco(model, inner_optimizer(model, "adam"), comm, every=4)
    train(model, optimizer, comm.rank, range(1, 13))
    assert_weights(model, reference(comm.size, [4, 8, 12], 12, (0.7, 0.9), "adam")[comm.rank])
    assert diloco(model, inner_optimizer(model, "adam"), comm)[1].every == 50


@every_outer
@on_ranks(3)
def test_the_same_on_a_gpu(comm: Communicator, outer: Any, device: str) -> None:
    model = network(comm.rank, device=device)
    model, optimizer = local_sgd(model, inner_optimizer(model, "momentum"), comm, 3, outer)
    train(model, optimizer, comm.rank, range(1, 8))
    assert_weights(model, reference(3, [3, 6], 7, outer, "momentum")[comm.rank])
    state = optimizer.state_dict()
    train(model, optimizer, comm.rank, range(8, 9))
    optimizer.load_state_dict(state)
    optimizer.synchronise()
    assert_replicas_agree(model, comm)


@on_ranks(4)
def test_islands_average_gradients_and_are_joined_by_their_parameters(comm: Communicator) -> None:
    island, across = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
    model = network(comm.rank)
    wrapped, optimizer = data_parallel(model, inner_optimizer(model, "sgd"), island)
    wrapped, optimizer = local_sgd(wrapped, optimizer, across, 3, (0.7, 0.9))
    for step in range(1, 7):
        optimizer.zero_grad()
        x, y = samples(island_number := comm.rank // 2, step)  # an island shares what a rank has elsewhere
        half = slice(island.rank * BATCH // 2, (island.rank + 1) * BATCH // 2)
        F.mse_loss(wrapped(md.tensor(x[half])), md.tensor(y[half])).backward()
        optimizer.step()
    assert_weights(model, reference(2, [3, 6], 6, (0.7, 0.9), "sgd")[island_number])
    assert_replicas_agree(model, comm)


# -- when ranks agree -------------------------------------------------------------------------------------------------


@every_outer
@on_ranks(2, 3, 4, 5)
def test_ranks_agree_after_an_average_and_not_before(comm: Communicator, outer: Any) -> None:
    model = network(comm.rank, np.float32)
    model, optimizer = local_sgd(model, inner_optimizer(model, "adam"), comm, 4, outer)
    assert_replicas_agree(model, comm)
    for step in range(1, 9):
        train(model, optimizer, comm.rank, range(step, step + 1))
        if step % 4:
            with pytest.raises(ReplicasDisagree):
                assert_replicas_agree(model, comm)
        else:
            assert_replicas_agree(model, comm)


@every_outer
@on_ranks(1, 2, 3)
def test_without_a_step_there_is_nothing_to_average(comm: Communicator, outer: Any) -> None:
    model, optimizer = pair(comm, 3, outer=outer)
    operations = len(comm.record.operations())
    optimizer.synchronise()
    assert_same_bits(model, initial())
    train(model, optimizer, comm.rank, range(1, 4))
    after = copied(model)
    operations = len(comm.record.operations())
    optimizer.synchronise()
    assert_same_bits(model, after)
    assert len(comm.record.operations()) == operations


@on_ranks(1, 2, 3)
def test_all_start_from_the_parameters_and_buffers_of_rank_0(comm: Communicator) -> None:
    model = md.nn.Sequential(md.nn.Conv2d(1, 2, 3), md.nn.BatchNorm2d(2), md.nn.Linear(3, 2))
    for i, array in enumerate(model.state_dict().values()):
        array[...] = 10 * i + comm.rank
    model[2].requires_grad_(False)  # frozen, and no business of the optimizer's
    same, _ = local_sgd(model, md.optim.SGD(model[:2].parameters()), comm)
    assert same is model
    for i, array in enumerate(model.state_dict().values()):
        assert_array_equal(array, np.full(array.shape, 10 * i))


@on_ranks(1, 2, 3)
def test_the_flight_record_names_the_steps(comm: Communicator) -> None:
    model, optimizer = pair(comm, 2)
    train(model, optimizer, comm.rank, range(1, 4))
    labels = [operation.label for operation in comm.record.operations() if "reduce" in operation.kind]
    assert labels[-1:] == ["D.3(4) average parameters"]
    assert comm.record.operations()[-1].label == "D.3(4) average parameters"
    assert "D.3(1) initialise" in {operation.label for operation in comm.record.operations()}


class Buffered(md.nn.Module):
    """y = p x, and buffers of several kinds."""

    def __init__(self, rank: int) -> None:
        self.p = md.nn.Parameter(md.tensor([2.0]))
        self.rank = rank
        self.register_buffer("mean", md.tensor(np.zeros((2, 3))))
        self.register_buffer("count", md.tensor(np.zeros((), np.int64)))
        self.register_buffer("seen", md.tensor(np.zeros(5, bool)))
        self.register_buffer("nothing", None)

    def forward(self, x: md.Tensor) -> md.Tensor:
        self.mean.data += np.arange(6.0).reshape(2, 3) * (self.rank + 1)
        self.count.data += self.rank + 1
        self.seen.data[self.rank] = True
        return self.p * x


@pytest.mark.parametrize("outer", [None, (0.5, 0.9)])
@on_ranks(1, 2, 3, 4, 5)
def test_buffers_of_floats_are_averaged_and_counts_are_the_largest(comm: Communicator, outer: Any) -> None:
    model = Buffered(comm.rank)
    model, optimizer = local_sgd(model, md.optim.SGD(model.parameters(), lr=0.1), comm, 2, outer)
    for _ in range(2):
        optimizer.zero_grad()
        model(md.tensor([1.0])).sum().backward()
        optimizer.step()
    assert_allclose(model.mean.numpy(), np.arange(6.0).reshape(2, 3) * (comm.size + 1), rtol=1e-12)
    assert model.count.numpy() == 2 * comm.size
    assert model.seen.tolist() == [rank < comm.size for rank in range(5)]
    assert_replicas_agree(model, comm)


@pytest.mark.parametrize("outer", [None, (0.7, 0.9)])
@on_ranks(1, 2, 3)
def test_running_statistics_of_batch_norm(comm: Communicator, outer: Any) -> None:
    model = md.nn.Sequential(md.nn.BatchNorm2d(2)).double()
    model, optimizer = local_sgd(model, md.optim.SGD(model.parameters(), lr=0.1), comm, 3, outer)
    x = np.random.default_rng(0).standard_normal((3, 3, 4, 2, 3, 3))  # by rank and step
    x = x * np.arange(1, 4).reshape(3, 1, 1, 1, 1, 1) + np.arange(3).reshape(3, 1, 1, 1, 1, 1)
    for step in range(3):
        optimizer.zero_grad()
        (model(md.tensor(x[comm.rank, step])) ** 3).mean().backward()
        optimizer.step()
    means, variances = np.zeros((comm.size, 2)), np.ones((comm.size, 2))
    for step in range(3):
        means = 0.9 * means + 0.1 * x[: comm.size, step].mean((1, 3, 4))
        variances = 0.9 * variances + 0.1 * x[: comm.size, step].var((1, 3, 4), ddof=1)
    assert_allclose(model[0].running_mean.numpy(), means.mean(0), rtol=1e-10)
    assert_allclose(model[0].running_var.numpy(), variances.mean(0), rtol=1e-10)
    assert model[0].num_batches_tracked.item() == 3
    assert_replicas_agree(model, comm)


# -- groups, dtypes, schedules, closures ------------------------------------------------------------------------------


class Mixed(md.nn.Module):
    def __init__(self) -> None:
        self.single = md.nn.Parameter(md.tensor([1.0, 2.0, 3.0]))
        self.double = md.nn.Parameter(md.tensor(np.array([4.0, 5.0, 6.0])))
        self.other = md.nn.Parameter(md.tensor(np.array([7.0, 8.0])))

    def forward(self, x: md.Tensor) -> md.Tensor:
        return (x * self.single).sum() + (x * 2 * self.double).sum() + (x[:2] * self.other).sum()


@every_outer
@on_ranks(1, 2, 3, 4)
def test_groups_of_several_dtypes(comm: Communicator, outer: Any) -> None:
    model = Mixed()
    groups = [{"params": [model.single, model.double]}, {"params": [model.other], "lr": 0.5}]
    model, optimizer = local_sgd(model, md.optim.SGD(groups, lr=1.0), comm, 2, outer)
    rows = np.random.default_rng(0).standard_normal((6, comm.size, 3)).astype(np.float32)
    for row in rows[:, comm.rank]:
        optimizer.zero_grad()
        model(md.tensor(row)).backward()
        optimizer.step()
    lr, momentum = outer or (1, 0)
    factors = {"single": (1.0, slice(None)), "double": (2.0, slice(None)), "other": (0.5, slice(2))}
    start = {"single": [1.0, 2, 3], "double": [4.0, 5, 6], "other": [7.0, 8]}
    for name, (factor, which) in factors.items():  # gradients are the rows: no weights in them
        w, velocity = np.array(start[name]), np.zeros(len(start[name]))
        for both in rows.reshape(3, 2, comm.size, 3):
            delta = factor * both.mean(1).sum(0)[which]
            velocity = momentum * velocity + delta
            w = w - lr * (delta + momentum * velocity)
        p = getattr(model, name)
        assert p.dtype == (np.float32 if name == "single" else np.float64)
        assert_allclose(p.numpy(), w, rtol=1e-5 if name == "single" else 1e-6)
    assert_replicas_agree(model, comm)


@on_ranks(1, 2, 3)
def test_schedules_and_closures_work(comm: Communicator) -> None:
    model, optimizer = pair(comm, 2, "sgd")
    plain_model, plain = pair(comm, 2, "sgd")
    schedule = md.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for step in range(1, 7):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, comm.rank, step)
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) > 0
        schedule.step()
        train(plain_model, plain, comm.rank, range(step, step + 1))
        plain.param_groups[0]["lr"] = LR["sgd"] * 0.5 ** (step // 2)
    assert optimizer.param_groups[0]["lr"] == LR["sgd"] / 8
    assert_same_bits(model, copied(plain_model))


@on_ranks(2, 3)
def test_a_rank_without_samples_steps_without_a_backward(comm: Communicator) -> None:
    model, optimizer = pair(comm, 2, "sgd")
    for step in (1, 2):
        optimizer.zero_grad()
        if comm.rank:
            loss_of(model, comm.rank, step).backward()
        optimizer.step()
    weights = [initial() for _ in range(comm.size)]
    for w, rank in zip(weights[1:], range(1, comm.size)):
        for step in (1, 2):
            Inner("sgd").step(w, gradients(w, *samples(rank, step)))
    assert_weights(model, {name: sum(w[name] for w in weights) / comm.size for name in NAMES})


@pytest.mark.parametrize("outer", [None, (0.7, 0.9)])
@on_ranks(1, 2)
def test_a_graph_that_saved_a_parameter_notices_the_average(comm: Communicator, outer: Any) -> None:
    model, optimizer = pair(comm, 2, outer=outer)
    train(model, optimizer, comm.rank, range(1, 2))
    loss = loss_of(model, comm.rank, 2)
    optimizer.synchronise()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


# -- memory and state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outer, kept", [(None, []), ((1, 0), []), ((0.5, 0), ["before"]), ((1, 0.5), ["before", "velocity"])]
)
@on_ranks(1, 2)
def test_memory_is_kept_only_for_what_the_outer_optimizer_needs(
    comm: Communicator, outer: Any, kept: list[str]
) -> None:
    _, optimizer = pair(comm, 2, outer=outer)
    (memory,) = optimizer.memory
    assert {name: array.shape for name, array in memory.items()} == dict.fromkeys(kept, (N,))


@every_outer
@pytest.mark.parametrize("stop", [6, 7, 8])
@on_ranks(1, 2, 3, 4)
def test_a_resumed_run_goes_on_bit_for_bit(comm: Communicator, stop: int, outer: Any) -> None:
    model, optimizer = pair(comm, 3, "adam", np.float32, outer=outer)
    train(model, optimizer, comm.rank, range(1, stop + 1))
    weights, state = copied(model), optimizer.state_dict()
    train(model, optimizer, comm.rank, range(stop + 1, 15))

    resumed, optimizer = pair(comm, 3, "adam", np.float32, outer=outer)
    train(resumed, optimizer, comm.rank, range(20, 25))  # a past that loading is to wipe out
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, comm.rank, range(stop + 1, 15))
    assert_same_bits(resumed, copied(model))


@on_ranks(1, 3)
def test_outer_state_is_equal_on_all_ranks_and_a_copy(comm: Communicator) -> None:
    model, optimizer = pair(comm, 3, outer=(0.7, 0.9))
    train(model, optimizer, comm.rank, range(1, 6))
    state = optimizer.state_dict()
    assert state["local_steps"] == 2
    for name in ("before", "velocity"):
        mine = state["outer"][0][name]
        everyones = all_gather(comm, np.broadcast_to(mine, (comm.size, N)).copy())
        for other in everyones:
            assert_array_equal(other, mine)
        mine.fill(0)
        assert optimizer.state_dict()["outer"][0][name].any()


@on_ranks(1, 2)
def test_weights_loaded_between_two_rounds_are_what_the_next_sets_out_from(comm: Communicator) -> None:
    model, optimizer = pair(comm, 2, "sgd", outer=(0.5, 0))
    train(model, optimizer, comm.rank, range(1, 3))
    model.load_state_dict(initial())
    train(model, optimizer, comm.rank, range(1, 3))
    assert_weights(model, reference(comm.size, [2], 2, (0.5, 0), "sgd")[0])


@on_ranks(1, 2)
def test_the_state_of_another_outer_optimizer_is_refused(comm: Communicator) -> None:
    states = {outer: pair(comm, 2, outer=outer)[1] for outer in (None, (0.5, 0), (0.5, 0.5))}
    for outer, optimizer in states.items():
        for other, origin in states.items():
            if outer != other:
                with pytest.raises(ValueError, match="load_state_dict: outer state"):
                    optimizer.load_state_dict(origin.state_dict())
    with pytest.raises(ValueError, match="load_state_dict: outer state"):
        states[None].load_state_dict(states[None].optimizer.state_dict())
    smaller = md.nn.Linear(2, 2)
    _, small = local_sgd(smaller, md.optim.SGD(smaller.parameters()), comm, 2, (0.5, 0))
    with pytest.raises(ValueError, match=r"\(6,\)"):
        small.load_state_dict(states[0.5, 0].state_dict())


# -- cost -------------------------------------------------------------------------------------------------------------


@every_outer
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_it_sends_what_the_docstring_says(size: int, outer: Any) -> None:
    def program(comm: Communicator, steps: int) -> None:
        model, optimizer = pair(comm, 4, outer=outer, algorithm="ring")
        train(model, optimizer, comm.rank, range(steps))

    runs = {steps: simulate(program, size, steps) for steps in (0, 3, 4, 7, 12)}
    for steps, run in runs.items():
        averages = steps // 4
        assert run.bytes - runs[0].bytes == averages * 2 * 8 * N * (size - 1)
        assert run.messages - runs[0].messages == averages * 2 * size * (size - 1)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(every=0), "every=0"),
        (dict(every=-3), "every=-3"),
        (dict(every=np.nan), "every=nan"),
        (dict(outer=(0, 0.9)), "outer lr=0"),
        (dict(outer=(-0.5, 0.9)), r"outer lr=-0\.5"),
        (dict(outer=(np.nan, 0.9)), "outer lr=nan"),
        (dict(outer=(0.7, 1.0)), r"momentum=1\.0"),
        (dict(outer=(0.7, -0.1)), r"momentum=-0\.1"),
        (dict(algorithm="rign"), r"'rign': .* naive, ring"),
    ],
    ids=str,
)
@on_ranks(1, 3)
def test_what_cannot_be_is_refused_at_the_call(comm: Communicator, options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        local_sgd(model, inner_optimizer(model, "sgd"), comm, **options)
    if "outer" in options:
        lr, momentum = options["outer"]
        with pytest.raises(ValueError, match=message):
            diloco(model, inner_optimizer(model, "sgd"), comm, lr=lr, momentum=momentum)


@on_ranks(1, 3)
def test_an_optimizer_that_is_wrapped_or_lacks_parameters_is_refused(comm: Communicator) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"lacks parameters that the model trains: 2\.weight, 2\.bias"):
        local_sgd(model, md.optim.SGD(model[0].parameters()), comm)
    model, optimizer = local_sgd(model, inner_optimizer(model, "sgd"), comm)
    with pytest.raises(TypeError, match="already wraps it: LocalSGD"):
        local_sgd(model, optimizer, comm)
    model = network()
    _, sharded = data_parallel(model, inner_optimizer(model, "sgd"), comm, zero=1)
    with pytest.raises(TypeError, match="already wraps it: ShardedOptimizer"):
        local_sgd(model, sharded, comm)
