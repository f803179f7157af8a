"""Data parallelism: any number of ranks gives what one rank would, which a few lines of NumPy work out here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.comm import Communicator, simulate
from minidist.data import partition
from minidist.nn import functional as F
from minidist.parallel import ReplicasDisagree, assert_replicas_agree, data_parallel

IN, HIDDEN, OUT = 6, 5, 4
STEPS, LR = 16, 0.02  # more than an epoch of the smallest batches
N = 23  # samples: no batch size below divides it
X = np.random.default_rng(0).standard_normal((N, IN))
LABELS = np.random.default_rng(1).integers(0, OUT, N)
State = dict[str, np.ndarray]


def initial(seed: int) -> State:
    rng = np.random.default_rng(100 + seed)
    shapes = {"0.weight": (HIDDEN, IN), "0.bias": (HIDDEN,), "2.weight": (OUT, HIDDEN), "2.bias": (OUT,)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def batches(size: int, steps: int = STEPS) -> list[np.ndarray]:
    """The samples of each global batch: epochs in order, a smaller batch at the end of each."""
    epoch = [np.arange(start, min(start + size, N)) for start in range(0, N, size)]
    return (epoch * steps)[:steps]


# -- what one rank would get ------------------------------------------------------------------------------------------


def gradients(w: State, x: np.ndarray, labels: np.ndarray) -> State:
    """Of the mean cross-entropy of the two-layer network, by the chain rule."""
    h = x @ w["0.weight"].T + w["0.bias"]
    a = np.maximum(h, 0)
    z = a @ w["2.weight"].T + w["2.bias"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    dz = (p - np.eye(OUT)[labels]) / len(x)
    dh = (dz @ w["2.weight"]) * (h > 0)
    return {"0.weight": dh.T @ x, "0.bias": dh.sum(0), "2.weight": dz.T @ a, "2.bias": dz.sum(0)}


@functools.cache
def one_rank(batch_size: int) -> State:
    """The weights after STEPS steps of Adam."""
    return adam(batches(batch_size))


def adam(steps: list[np.ndarray]) -> State:
    """The weights after a step with each of these batches."""
    w = initial(0)
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in "mv")
    for step, batch in enumerate(steps, start=1):
        for name, g in gradients(w, X[batch], LABELS[batch]).items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            w[name] -= LR * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
    return w


# -- what the ranks do ------------------------------------------------------------------------------------------------


def network(seed: int = 0, dtype: Any = np.float64, device: str = "cpu") -> md.nn.Sequential:
    model = md.nn.Sequential(md.nn.Linear(IN, HIDDEN), md.nn.ReLU(), md.nn.Linear(HIDDEN, OUT)).to(device, dtype)
    model.load_state_dict(initial(seed))
    return model


def share(batch: np.ndarray, comm: Communicator) -> np.ndarray:
    """This rank's part of a global batch; none, where the batch is small."""
    return np.array_split(batch, comm.size)[comm.rank]


def loss_of(model: Any, samples: np.ndarray, dtype: Any = np.float64, device: str = "cpu") -> md.Tensor:
    x = md.tensor(X[samples], dtype=dtype, device=device)
    return F.cross_entropy(model(x), md.tensor(LABELS[samples], device=device))


def train(model: Any, optimizer: Any, comm: Communicator, steps: list[np.ndarray], **options: Any) -> None:
    for batch in steps:
        optimizer.zero_grad()
        loss_of(model, share(batch, comm), **options).backward()
        optimizer.step()


def pair(comm: Communicator, zero: int, seed: int = 0, dtype: Any = np.float64, **options: Any) -> tuple[Any, Any]:
    model = network(seed, dtype)
    return data_parallel(model, md.optim.Adam(model.parameters(), lr=LR), comm, zero, **options)


def copied(state: Any) -> State:
    return {name: np.array(md.Tensor(array)) for name, array in state.items()}


def assert_weights(model: Any, expected: State, rtol: float = 1e-10) -> None:
    for name, array in copied(model.state_dict()).items():
        assert_allclose(array, expected[name], rtol=rtol, atol=rtol, err_msg=name)


def assert_same_bits(model: Any, expected: State) -> None:
    for name, array in copied(model.state_dict()).items():
        assert_array_equal(array, expected[name], err_msg=name, strict=True)


# -- equivalence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 5, 2])
@pytest.mark.parametrize("algorithm", ["ring", "naive"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4, 5, 7, seeds=1)
def test_any_number_of_ranks_gives_the_weights_of_one(
    comm: Communicator, zero: int, algorithm: str, batch_size: int
) -> None:
    model, optimizer = pair(comm, zero, seed=comm.rank, algorithm=algorithm)  # rank 0's first weights count
    train(model, optimizer, comm, batches(batch_size))
    assert_weights(model, one_rank(batch_size))
    assert_replicas_agree(model, comm)


@pytest.mark.parametrize("name", partition.NAMES)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4, 5, seeds=1)
def test_every_partition_gives_the_weights_of_one_rank_with_the_same_batches(
    comm: Communicator, zero: int, name: str
) -> None:
    how = partition.named(name, LABELS, hosts=[rank // 2 for rank in range(comm.size)])
    shares = [[share for epoch in range(4) for share in how(N, comm.size, r, 6, 3, epoch)] for r in range(comm.size)]
    model, optimizer = pair(comm, zero)
    for mine in shares[comm.rank]:  # of unequal lengths; with "skewed" by far, and often empty
        optimizer.zero_grad()
        loss_of(model, mine).backward()
        optimizer.step()
    assert_weights(model, adam([np.concatenate(parts) for parts in zip(*shares, strict=True)]))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(3)
def test_the_same_on_a_gpu(comm: Communicator, zero: int, device: str) -> None:
    model = network(comm.rank, device=device)
    optimizer = md.optim.Adam(model.parameters(), lr=LR)
    model, optimizer = data_parallel(model, optimizer, comm, zero)
    train(model, optimizer, comm, batches(5), device=device)
    assert_weights(model, one_rank(5))
    assert_replicas_agree(model, comm)


class Mean(md.nn.Module):
    """y = p times the mean of x: of an empty share the mean is nan, and so is the gradient of p."""

    def __init__(self) -> None:
        self.p = md.nn.Parameter(md.tensor([2.0]))

    def forward(self, x: md.Tensor) -> md.Tensor:
        return self.p * x.mean()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@on_ranks(2, 3, 4)
def test_a_rank_without_samples_adds_nothing_not_even_nan(comm: Communicator, zero: int) -> None:
    model = Mean()
    wrapped, optimizer = data_parallel(model, md.optim.SGD(model.parameters(), lr=1.0), comm, zero)
    wrapped(md.tensor(share(np.array([5.0], np.float32), comm))).sum().backward()
    optimizer.step()
    assert_array_equal(copied(wrapped.state_dict())["p"], [-3])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(2, 3, 4)
def test_a_run_repeats_bit_for_bit_and_leaves_equal_replicas(comm: Communicator, zero: int) -> None:
    runs = []
    for _ in range(2):
        model, optimizer = pair(comm, zero, dtype=np.float32)
        train(model, optimizer, comm, batches(5), dtype=np.float32)
        assert_replicas_agree(model, comm)
        runs.append(copied(model.state_dict()))
    assert_same_bits(model, runs[0])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 3, 4)
def test_backward_leaves_the_gradient_of_the_global_batch(comm: Communicator, zero: int) -> None:
    model, _ = pair(comm, zero)
    batch = np.arange(7)
    loss_of(model, share(batch, comm)).backward()
    expected = gradients(initial(0), X[batch], LABELS[batch])
    whole = np.concatenate([g.ravel() for g in expected.values()])
    mine, averaged = gradients_here(model)
    assert_allclose(averaged, whole[mine], rtol=1e-12, atol=1e-14)
    assert len(mine) == (whole.size if zero == 0 else sum(len(chunk) for chunk in chunks_of(model, comm)))
    assert all((p.grad is None) == (zero > 1) for p in model.parameters())


def gradients_here(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """The averaged gradients that this rank has, and where among all of the model's they stand."""
    parts, start, where = model.optimizer.parts, 0, []
    for part in parts:
        where.append(start + np.arange(part.start, part.stop))
        start += part.flat.size
    return np.concatenate(where), np.concatenate([part.grad for part in parts])


def chunks_of(model: Any, comm: Communicator) -> list[np.ndarray]:
    return [np.array_split(np.arange(part.flat.size), comm.size)[comm.rank] for part in model.optimizer.parts]


@pytest.mark.parametrize("order", [2, 1, 3, np.inf])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 7)
def test_gradients_are_clipped_as_on_one_rank(comm: Communicator, zero: int, order: float) -> None:
    batch = np.arange(5)
    whole = np.concatenate([g.ravel() for g in gradients(initial(0), X[batch], LABELS[batch]).values()])
    norm = np.linalg.norm(whole, order)
    for limit in (0.1, 2 * norm):
        model, _ = pair(comm, zero)
        loss_of(model, share(batch, comm)).backward()
        assert_allclose(model.clip_grad_norm_(limit, order).item(), norm, rtol=1e-12)
        mine, clipped = gradients_here(model)
        assert_allclose(clipped, whole[mine] * min(limit / (norm + 1e-6), 1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_a_norm_that_is_no_number_is_refused_on_all_ranks(comm: Communicator, zero: int) -> None:
    model, _ = pair(comm, zero)
    loss_of(model, share(np.arange(5), comm)).backward()
    if comm.rank == 0 or not zero:
        model.optimizer.parts[0].grad[0] = np.inf
    with pytest.raises(RuntimeError, match="the norm of the gradients is inf"):
        model.clip_grad_norm_(1.0, error_if_nonfinite=True)


@on_ranks(2, 3)
def test_schedules_and_closures_work_on_the_sharded_optimizer(comm: Communicator) -> None:
    weights = []
    for zero in (0, 1):
        model, optimizer = pair(comm, zero)
        schedule = md.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        for batch in batches(5, steps=6):

            def closure(batch: np.ndarray = batch, model: Any = model, optimizer: Any = optimizer) -> float:
                optimizer.zero_grad()
                loss = loss_of(model, share(batch, comm))
                loss.backward()
                return loss.item()

            assert optimizer.step(closure) > 0
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == LR / 8
        weights.append(copied(model.state_dict()))
    assert_weights(model, weights[0], rtol=1e-12)


# -- the beginning ----------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4)
def test_all_start_from_the_parameters_and_buffers_of_rank_0(comm: Communicator) -> None:
    model = md.nn.Sequential(md.nn.Conv2d(1, 2, 3), md.nn.BatchNorm2d(2), md.nn.Linear(3, 2))
    for i, array in enumerate(model.state_dict().values()):
        array[...] = 10 * i + comm.rank
    model[2].requires_grad_(False)  # frozen, and no business of the optimizer's
    data_parallel(model, md.optim.SGD(model[:2].parameters()), comm)
    for i, array in enumerate(model.state_dict().values()):
        assert_array_equal(array, np.full(array.shape, 10 * i))


@on_ranks(1, 2)
def test_the_wrapper_adds_nothing_to_names(comm: Communicator) -> None:
    model = network()
    wrapped, _ = data_parallel(model, md.optim.Adam(model.parameters()), comm)
    assert list(wrapped.state_dict()) == list(model.state_dict())
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in model.named_parameters()]
    wrapped.load_state_dict(initial(3))
    assert_weights(model, initial(3))
    wrapped.eval()
    assert not model[0].training


@on_ranks(1, 3)
def test_what_cannot_work_is_refused_at_the_call(comm: Communicator) -> None:
    model = network()
    optimizer = md.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="zero=4"):
        data_parallel(model, optimizer, comm, zero=4)
    for zero in (0, 1):
        with pytest.raises(ValueError, match=r"'rign': .* naive, ring"):
            data_parallel(model, optimizer, comm, zero, algorithm="rign")
    with pytest.raises(ValueError, match=r"lacks parameters that the model trains: 2\.weight, 2\.bias"):
        data_parallel(model, md.optim.Adam(model[0].parameters()), comm)
    wrapped, sharded = data_parallel(model, optimizer, comm, zero=1)
    for pair_again in ((wrapped, optimizer), (model, sharded)):
        with pytest.raises(TypeError, match="already"):
            data_parallel(*pair_again, comm)


# -- parameters that are not used -------------------------------------------------------------------------------------


class Branches(md.nn.Module):
    """y = x * (a or b or c), whichever is asked for; `frozen` has no part in it."""

    def __init__(self) -> None:
        self.a, self.b, self.c, self.frozen = (md.nn.Parameter(md.tensor(np.full(3, 2.0 + i))) for i in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: md.Tensor, branch: str) -> md.Tensor:
        return x * getattr(self, branch)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4)
def test_a_parameter_counts_where_it_is_used_and_rests_where_nobody_uses_it(comm: Communicator, zero: int) -> None:
    model = Branches()
    # Decay and momentum would move a parameter whose gradient is zero and not None.
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.5)
    wrapped, optimizer = data_parallel(model, md.optim.SGD(model.parameters(), **options), comm, zero)
    rows = np.arange(3.0 * comm.size).reshape(comm.size, 3)  # one sample per rank
    expected = {"a": np.full(3, 2.0), "b": np.full(3, 3.0), "c": np.full(3, 4.0), "frozen": np.full(3, 5.0)}
    velocity: dict[str, np.ndarray] = {}
    for step in range(4):
        branch_of = ["ab"[(rank + (step > 1)) % 2] for rank in range(comm.size)]
        optimizer.zero_grad()
        wrapped(md.tensor(rows[[comm.rank]]), branch_of[comm.rank]).sum().backward()
        optimizer.step()
        for name in set(branch_of):
            g = sum(rows[rank] for rank in range(comm.size) if branch_of[rank] == name) / comm.size
            g = g + 0.5 * expected[name]
            velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
            expected[name] = expected[name] - 0.1 * velocity[name]
        assert_weights(wrapped, expected, rtol=1e-12)
        assert model.c.grad is None
        assert model.frozen.grad is None
    aged = {i: entry["step"] for i, entry in optimizer.state_dict()["state"].items()}
    assert aged == ({0: 2, 1: 2} if comm.size == 1 else {0: 4, 1: 4})
    assert_replicas_agree(wrapped, comm)


# -- several forwards and backwards -----------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4)
def test_gradients_of_two_backwards_add_up(comm: Communicator) -> None:
    model, _ = pair(comm, zero=0)
    halves = [np.arange(7), np.arange(7, 9)]
    for batch in halves:
        loss_of(model, share(batch, comm)).backward()
    first, second = (gradients(initial(0), X[batch], LABELS[batch]) for batch in halves)
    for name, p in model.named_parameters():
        assert_allclose(p.grad.numpy(), first[name] + second[name], rtol=1e-12, atol=1e-14, err_msg=name)


@on_ranks(1, 2, 3, 4)
def test_with_zero_1_gradients_cannot_add_up(comm: Communicator) -> None:
    model, optimizer = pair(comm, zero=1)
    train(model, optimizer, comm, batches(8, 1))
    loss = loss_of(model, share(np.arange(8), comm))
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before each backward, or add up"):
        loss.backward()
    train(model, optimizer, comm, batches(8, 1))  # and with zero_grad it goes on


@on_ranks(1, 2, 3)
def test_nor_may_a_backward_leave_the_part_of_a_gradient_that_it_does_not_touch(comm: Communicator) -> None:
    model = Branches()
    wrapped, _ = data_parallel(model, md.optim.SGD(model.parameters(), lr=0.1), comm, zero=1)
    wrapped(md.tensor(np.ones((1, 3))), "a").sum().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before each backward"):
        wrapped(md.tensor(np.ones((1, 3))), "b").sum().backward()


@on_ranks(1, 2, 3)
def test_one_backward_may_come_from_two_forwards(comm: Communicator) -> None:
    model, _ = pair(comm, zero=0)
    batch = np.arange(12)
    one, two = np.array_split(share(batch, comm), 2)  # equal halves on every rank
    ((loss_of(model, one) + loss_of(model, two)) / 2).backward()
    expected = gradients(initial(0), X[batch], LABELS[batch])
    for name, p in model.named_parameters():
        assert_allclose(p.grad.numpy(), expected[name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4)
def test_two_forwards_may_have_a_backward_each(comm: Communicator, zero: int) -> None:
    model, optimizer = pair(comm, zero)
    reference, alone = pair(comm.split(comm.rank), 0)
    for network, its_optimizer, take in ((model, optimizer, share), (reference, alone, lambda batch, comm: batch)):
        losses = [loss_of(network, take(batch, comm)) for batch in (np.arange(7), np.arange(7, 9))]
        for loss in losses:
            its_optimizer.zero_grad()
            loss.backward()
        its_optimizer.step()
    assert_weights(model, copied(reference.state_dict()))


@on_ranks(1, 3)
def test_outputs_of_any_structure_and_arguments_by_name(comm: Communicator) -> None:
    class Several(md.nn.Module):
        def __init__(self) -> None:
            self.p = md.nn.Parameter(md.tensor([2.0]))

        def forward(self, x: md.Tensor) -> Any:
            return {"a": (self.p * x, None), "b": [self.p * x * 3]}

    model = Several()
    wrapped, _ = data_parallel(model, md.optim.SGD(model.parameters(), lr=1.0), comm)
    x = np.arange(5, dtype=np.float32)
    mine = share(x, comm)
    y = wrapped(x=md.tensor(mine))
    ((y["a"][0].sum() + y["b"][0].sum()) / len(mine)).backward()
    assert_allclose(model.p.grad.numpy(), [4 * x.mean()], rtol=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_after_a_backward_that_failed_training_goes_on(comm: Communicator, zero: int) -> None:
    def fails(parameter: md.Tensor) -> None:
        raise KeyError("in a hook")

    model, optimizer = pair(comm, zero)
    remove = model.module[0].weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(KeyError, match="in a hook"):
        loss_of(model, np.arange(1 + 3 * comm.rank)).backward()  # other numbers of samples on other ranks
    remove()
    train(model, optimizer, comm, batches(5))
    assert_weights(model, one_rank(5))


@on_ranks(1, 2, 3)
def test_messages_of_the_program_are_not_taken_for_those_of_a_step(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    got = {tag: np.zeros(1, int) for tag in (0, 1, 1000, 31999)}
    receives = [comm.irecv(array, left, tag) for tag, array in got.items()]
    model, optimizer = pair(comm, 0)
    train(model, optimizer, comm, batches(5))
    for tag in got:
        comm.send(np.array([tag]), right, tag)
    for receive in receives:
        receive.wait()
    assert all(array == tag for tag, array in got.items())
    assert_weights(model, one_rank(5))


@on_ranks(1, 2, 3)
def test_backward_without_a_forward_through_the_wrapper_is_refused(comm: Communicator) -> None:
    model = network()
    data_parallel(model, md.optim.Adam(model.parameters()), comm)
    with pytest.raises(RuntimeError, match="through the model that data_parallel returned"):
        loss_of(model, np.arange(3)).backward()


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "forgotten no_grad"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_evaluation_between_steps_disturbs_nothing(comm: Communicator, zero: int, recording: bool) -> None:
    results = []
    for evaluate in (False, True):
        model, optimizer = pair(comm, zero)
        for batch in batches(5, steps=6):
            train(model, optimizer, comm, [batch])
            if evaluate:
                with md.enable_grad() if recording else md.no_grad():
                    loss_of(model, np.arange(1 + 3 * comm.rank))  # other numbers of samples on other ranks
        results.append(copied(model.state_dict()))
    assert_same_bits(model, results[0])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3)
def test_parameters_of_two_dtypes(comm: Communicator, zero: int) -> None:
    class Mixed(md.nn.Module):
        def __init__(self) -> None:
            self.single = md.nn.Parameter(md.tensor([1.0, 2.0, 3.0]))
            self.double = md.nn.Parameter(md.tensor(np.array([4.0, 5.0, 6.0])))

        def forward(self, x: md.Tensor) -> md.Tensor:
            return (x * self.single).sum() + (x * 2 * self.double).sum()

    model = Mixed()
    wrapped, optimizer = data_parallel(model, md.optim.SGD(model.parameters(), lr=1.0), comm, zero)
    rows = np.arange(3.0 * comm.size, dtype=np.float32).reshape(comm.size, 3)
    wrapped(md.tensor(rows[[comm.rank]])).backward()
    norm = wrapped.clip_grad_norm_(1e9)
    assert norm.dtype == np.float64
    assert_allclose(norm.item(), np.sqrt(5) * np.linalg.norm(rows.mean(0)), rtol=1e-6)
    optimizer.step()
    with wrapped.whole():
        assert_allclose(model.single.numpy(), [1, 2, 3] - rows.mean(0), rtol=1e-6)
        assert_allclose(model.double.numpy(), [4, 5, 6] - 2 * rows.mean(0), rtol=1e-6)
    assert [p.dtype for p in model.parameters()] == [np.float32, np.float64]


# -- the state of a sharded optimizer ---------------------------------------------------------------------------------


def assert_states_agree(state: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        assert state["state"][i]["step"] == entry["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_allclose(state["state"][i][name], entry[name], rtol=rtol, atol=rtol)


@on_ranks(1, 2, 3, 4)
def test_a_sharded_optimizers_state_is_that_of_one_rank(comm: Communicator) -> None:
    model, optimizer = pair(comm, zero=1)
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, comm, batches(5))
    alone = network()
    reference = md.optim.Adam(alone.parameters(), lr=LR)
    for batch in batches(5):
        reference.zero_grad()
        loss_of(alone, batch).backward()
        reference.step()
    for _ in range(2):  # asking changes nothing
        assert_states_agree(optimizer.state_dict(), reference.state_dict(), rtol=1e-10)
    train(model, optimizer, comm, batches(5, 1))


@on_ranks(1, 2, 3, 4)
def test_each_rank_keeps_its_part_of_the_state(comm: Communicator) -> None:
    model, optimizer = pair(comm, zero=1)
    train(model, optimizer, comm, batches(5, 2))
    total = sum(p.numel() for p in model.parameters())
    mine = len(np.array_split(np.arange(total), comm.size)[comm.rank])
    (part,) = optimizer.optimizer.parts
    assert {name: array.size for name, array in part.state.items()} == {"exp_avg": mine, "exp_avg_sq": mine}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(1, 2, 3, 4)
def test_a_resumed_run_goes_on_bit_for_bit(comm: Communicator, zero: int) -> None:
    steps = batches(5)
    model, optimizer = pair(comm, zero, dtype=np.float32)
    train(model, optimizer, comm, steps[:9], dtype=np.float32)
    weights, state = copied(model.state_dict()), optimizer.state_dict()
    train(model, optimizer, comm, steps[9:], dtype=np.float32)

    resumed, optimizer = pair(comm, zero, seed=5, dtype=np.float32)
    train(resumed, optimizer, comm, steps[:2], dtype=np.float32)  # a past that loading is to wipe out
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, comm, steps[9:], dtype=np.float32)
    assert_same_bits(resumed, copied(model.state_dict()))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@on_ranks(2, 3, 4)
def test_a_run_resumes_on_fewer_ranks(comm: Communicator, zero: int) -> None:
    steps = batches(5)
    model, optimizer = pair(comm, zero)
    train(model, optimizer, comm, steps[:9])
    weights, state = copied(model.state_dict()), optimizer.state_dict()
    fewer = comm.split(0 if comm.rank < comm.size - 1 else None)
    if fewer is not None:
        resumed, optimizer = pair(fewer, 1, seed=5)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(resumed, optimizer, fewer, steps[9:])
        assert_weights(resumed, one_rank(5))


# -- replicas ---------------------------------------------------------------------------------------------------------


@on_ranks(2, 3, 4)
def test_replicas_that_differ_are_named_with_their_ranks_on_every_rank(comm: Communicator) -> None:
    model = md.nn.Sequential(md.nn.Linear(3, 4), md.nn.BatchNorm2d(2))
    model.load_state_dict({name: np.full(array.shape, 3) for name, array in model.state_dict().items()})
    assert_replicas_agree(model, comm)
    if comm.rank == comm.size - 1:
        model[1].running_mean.data[1] = 4
    with pytest.raises(ReplicasDisagree, match=rf"1\.running_mean on rank {comm.size - 1} is not"):
        assert_replicas_agree(model, comm)
    if comm.rank > 0:  # a single bit
        bias = model[0].bias.data
        bias[2] = np.nextafter(bias[2], np.float32(9))
    others = ", ".join(map(str, range(1, comm.size)))
    with pytest.raises(ReplicasDisagree, match=rf"0\.bias on rank {others} is not"):
        assert_replicas_agree(model, comm)


@on_ranks(1, 3)
def test_replicas_of_nothing_agree(comm: Communicator) -> None:
    assert_replicas_agree(md.nn.ReLU(), comm)
    assert_replicas_agree(md.nn.Linear(0, 2), comm)


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("zero, algorithm", [(0, "ring"), (0, "naive"), (1, "ring")])
def test_a_step_costs_what_the_docstring_says(size: int, zero: int, algorithm: str) -> None:
    def program(comm: Communicator, steps: int) -> None:
        model, optimizer = pair(comm, zero, algorithm=algorithm)
        train(model, optimizer, comm, batches(8, steps))

    once, thrice = (simulate(program, size, steps) for steps in (1, 3))
    others = size - 1
    nbytes = 8 * sum(array.size for array in initial(0).values())
    told = 8 + 8 * len(initial(0))  # gathered from all ranks: the number of samples, and which parameters were used
    # Among all ranks: n (P-1) bytes each way, and what they tell one another.
    assert (thrice.bytes - once.bytes) / 2 == 2 * nbytes * others + size * others * told
    each_way = others if algorithm == "naive" else size * others
    assert (thrice.messages - once.messages) / 2 == 2 * each_way + size * (size - 1).bit_length()
    if algorithm == "ring":  # and evenly spread: a rank sends all chunks but one, twice
        chunk = -(-nbytes // 8 // size) * 8
        for a, b in zip(once.bytes_by_rank, thrice.bytes_by_rank, strict=True):
            assert (b - a) / 2 <= 2 * others * chunk + others * told


def test_the_interleaving_of_the_ranks_changes_nothing() -> None:
    def program(comm: Communicator, zero: int) -> State:
        model, optimizer = pair(comm, zero, dtype=np.float32)
        train(model, optimizer, comm, batches(5, 6), dtype=np.float32)
        return copied(model.state_dict())

    for zero in (0, 1):
        first, *others = (simulate(program, 4, zero, seed=seed).results[0] for seed in range(4))
        for other in others:
            for name, array in first.items():
                assert_array_equal(other[name], array, strict=True)
