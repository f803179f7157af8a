"""Optimizers, schedules and clipping against PyTorch's. A new optimizer is a row of OPTIMIZERS."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minidist as md
from minidist.nn import Parameter
from minidist.optim import lr_scheduler
from minidist.optim.optimizer import PIECE, Optimizer

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", dict(lr=0.1)),
    "sgd-decay": ("SGD", dict(lr=0.1, weight_decay=0.2)),
    "sgd-momentum": ("SGD", dict(lr=0.1, momentum=0.9)),
    "sgd-dampening": ("SGD", dict(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1)),
    "sgd-nesterov": ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    "sgd-nesterov-decay": ("SGD", dict(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.3)),
    "adam": ("Adam", dict()),
    "adam-betas": ("Adam", dict(lr=0.05, betas=(0.5, 0.9), eps=1e-3)),
    "adam-decay": ("Adam", dict(lr=0.05, weight_decay=0.2)),
    "adam-no-means": ("Adam", dict(lr=0.05, betas=(0.0, 0.0))),
    "adamw": ("AdamW", dict()),
    "adamw-decay": ("AdamW", dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.3)),
}
SHAPES = [(3, 4), (5,), (), (2, 1, 3), (0,)]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
Numbers = list[np.ndarray]


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'minidist[peers]'")


def numbers(seed: int, dtype: Any = np.float64, shapes: Any = SHAPES) -> Numbers:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def gradients(step: int, dtype: Any = np.float64, shapes: Any = SHAPES) -> Numbers:
    return numbers(1000 + step, dtype, shapes)


def parameters(values: Numbers, device: str = "cpu") -> list[Parameter]:
    return [Parameter(md.tensor(value, device=device)) for value in values]


def backward(params: Any, grads: Numbers, skip: Container[int] = ()) -> None:
    """Give parameter i the gradient grads[i], by a loss that has it; works on both libraries' tensors."""
    make: Any = (lambda g, p: md.tensor(g, device=p.device)) if isinstance(params[0], md.Tensor) else None
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        p.grad = None
        if i not in skip:
            (p * (make(g, p) if make else p.new_tensor(g))).sum().backward()


def make(module: Any, name: str, params: Any) -> Any:
    kind, options = OPTIMIZERS[name]
    return getattr(module, kind)(params, **options)


def assert_equal_to(params: Any, others: Any, tolerance: float) -> None:
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        q = q.numpy() if isinstance(q, md.Tensor) else q.detach().numpy()
        assert_allclose(p.numpy(), q, rtol=tolerance, atol=tolerance, err_msg=f"parameter {i}")


# -- trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-5)])
@every_optimizer
def test_twenty_steps_are_pytorchs(torch: Any, name: str, dtype: Any, tolerance: float, device: str) -> None:
    ours = parameters(numbers(0, dtype), device)
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0, dtype)]
    our_optimizer, their_optimizer = make(md.optim, name, ours), make(torch.optim, name, theirs)
    for step in range(20):
        backward(ours, gradients(step, dtype)), backward(theirs, gradients(step, dtype))
        our_optimizer.step(), their_optimizer.step()
    assert all(p.dtype == dtype for p in ours)
    assert_equal_to(ours, theirs, tolerance)


@every_optimizer
def test_a_parameter_without_a_gradient_is_skipped_and_does_not_age(torch: Any, name: str) -> None:
    ours = parameters(numbers(0))
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0)]
    our_optimizer, their_optimizer = make(md.optim, name, ours), make(torch.optim, name, theirs)
    for step in range(20):
        # Everyone, every other one, nobody, only the first (so that the others are younger), ...
        skip = [(), (0, 2, 4), range(5), (1, 2, 3, 4), (1,)][(step + 3) % 5]
        before = [p.numpy().copy() for p in ours]
        backward(ours, gradients(step), skip), backward(theirs, gradients(step), skip)
        our_optimizer.step(), their_optimizer.step()
        assert_equal_to(ours, theirs, 1e-10)
        for i in skip:
            assert_array_equal(ours[i].numpy(), before[i])


@every_optimizer
def test_groups_have_options_of_their_own(torch: Any, name: str) -> None:
    def groups(params: Any) -> list[dict[str, Any]]:
        return [
            dict(params=params[:2], lr=0.3),
            dict(params=iter(params[2:4]), weight_decay=0.5),
            dict(params=params[4:]),
        ]

    ours = parameters(numbers(0))
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0)]
    our_optimizer, their_optimizer = make(md.optim, name, groups(ours)), make(torch.optim, name, groups(theirs))
    for step in range(20):
        for optimizer in (our_optimizer, their_optimizer):
            optimizer.param_groups[1]["lr"] *= 0.9  # what a schedule does
        backward(ours, gradients(step)), backward(theirs, gradients(step))
        our_optimizer.step(), their_optimizer.step()
    assert_equal_to(ours, theirs, 1e-10)


@every_optimizer
@pytest.mark.parametrize("sizes", [[PIECE - 1], [PIECE], [PIECE + 1], [2 * PIECE + 3], [PIECE - 1, 2, PIECE]], ids=str)
def test_an_update_in_pieces_misses_no_element(torch: Any, name: str, sizes: list[int]) -> None:
    shapes = [(n,) for n in sizes]
    ours = parameters(numbers(0, shapes=shapes))
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0, shapes=shapes)]
    our_optimizer, their_optimizer = make(md.optim, name, ours), make(torch.optim, name, theirs)
    for step in range(3):
        backward(ours, gradients(step, shapes=shapes)), backward(theirs, gradients(step, shapes=shapes))
        our_optimizer.step(), their_optimizer.step()
    assert_equal_to(ours, theirs, 1e-10)


def test_a_step_of_adam_by_hand() -> None:
    p = Parameter(md.tensor(np.array([1.0, -2.0])))
    optimizer = md.optim.Adam([p], lr=0.1)
    m = v = np.zeros(2)
    expected = p.numpy().copy()
    for k in range(1, 6):
        g = np.array([0.5 * k, -3.0])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= 0.1 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        backward([p], [g])
        optimizer.step()
        assert_allclose(p.numpy(), expected, rtol=1e-12)


# -- state ------------------------------------------------------------------------------------------------------------


def to_torch(torch: Any, state: dict[str, Any]) -> dict[str, Any]:
    def entry(values: dict[str, Any]) -> dict[str, Any]:
        return {k: torch.tensor(float(v) if k == "step" else v) for k, v in values.items()}

    return {"state": {i: entry(values) for i, values in state["state"].items()}, "param_groups": state["param_groups"]}


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-5)])
@every_optimizer
def test_state_goes_to_pytorch_and_comes_back(torch: Any, name: str, dtype: Any, tolerance: float, device: str) -> None:
    ours = parameters(numbers(0, dtype), device)
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0, dtype)]
    our_optimizer, their_optimizer = make(md.optim, name, ours), make(torch.optim, name, theirs)

    def run(steps: range, *pairs: tuple[Any, Any]) -> None:
        for step in steps:
            for params, optimizer in pairs:
                backward(params, gradients(step, dtype), (1,) if step % 2 == 0 else ())
                optimizer.step()

    # 1. The states of both are the same after some steps, name by name.
    run(range(5), (ours, our_optimizer), (theirs, their_optimizer))
    mine, other = our_optimizer.state_dict(), their_optimizer.state_dict()
    for i, entry in other["state"].items():
        for key, value in entry.items():
            if value is not None:
                value = np.asarray(mine["state"][i][key] if key == "step" else md.Tensor(mine["state"][i][key]))
                assert_allclose(value, np.asarray(entry[key]), rtol=tolerance, atol=tolerance, err_msg=key)
    assert [g["params"] for g in mine["param_groups"]] == [g["params"] for g in other["param_groups"]]

    # 2. Each takes over the other's, and both go on as one would have.
    back = parameters([p.numpy() for p in ours], device)
    back_optimizer = make(md.optim, name, back)
    back_optimizer.load_state_dict(other)
    forth = [torch.tensor(p.numpy().copy(), requires_grad=True) for p in ours]
    forth_optimizer = make(torch.optim, name, forth)
    on_host = {
        i: {k: v if k == "step" else md.Tensor(v).numpy() for k, v in e.items()} for i, e in mine["state"].items()
    }
    forth_optimizer.load_state_dict(to_torch(torch, mine | {"state": on_host}))
    run(range(5, 12), (ours, our_optimizer), (back, back_optimizer), (forth, forth_optimizer))
    assert_equal_to(ours, back, tolerance)
    assert_equal_to(ours, forth, tolerance)


@every_optimizer
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    for dtype, tolerance in ((np.float32, 0), (np.float64, 1e-14)):
        straight = parameters(numbers(0, dtype))
        optimizer = make(md.optim, name, straight)
        for step in range(20):
            if step == 7:
                saved, values = optimizer.state_dict(), [p.numpy().copy() for p in straight]
            backward(straight, gradients(step, dtype))
            optimizer.step()
        resumed = parameters(values)
        optimizer = make(md.optim, name, resumed)
        if "sgd" not in name:
            optimizer.param_groups[0]["lr"] = 17.0  # the saved options win
        optimizer.load_state_dict(saved)
        for step in range(7, 20):
            backward(resumed, gradients(step, dtype))
            optimizer.step()
        assert_equal_to(resumed, straight, tolerance)


def test_a_state_dict_is_a_copy_with_pytorchs_names() -> None:
    params = parameters(numbers(0))
    optimizer = md.optim.Adam([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    assert optimizer.state_dict()["state"] == {}
    backward(params, gradients(0), (2,))
    optimizer.step()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    assert [g["params"] for g in saved["param_groups"]] == [[0], [1, 2, 3, 4]]
    assert [g["lr"] for g in saved["param_groups"]] == [1e-3, 0.5]
    assert list(saved["state"]) == [0, 1, 3, 4]  # 2 had no gradient
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]
    assert saved["state"][0]["step"] == 1
    assert saved["state"][3]["exp_avg"].shape == (2, 1, 3)
    assert_allclose(saved["state"][0]["exp_avg"], 0.1 * gradients(0)[0])
    assert_allclose(saved["state"][0]["exp_avg_sq"], 0.001 * gradients(0)[0] ** 2)
    backward(params, gradients(1))
    optimizer.step()
    assert_array_equal(saved["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])


def test_a_state_that_does_not_fit_is_refused_naming_both() -> None:
    def optimizer(shapes: Any) -> Optimizer:
        params = parameters(numbers(0, shapes=shapes))
        made = md.optim.Adam(params)
        backward(params, gradients(0, shapes=shapes))
        made.step()
        return made

    saved = optimizer([(2, 3), (4,)]).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters for an optimizer of \[3\]"):
        optimizer([(2, 3), (4,), (1,)]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"exp_avg of shape \(2, 3\) for a parameter \(3, 2\)"):
        optimizer([(3, 2), (4,)]).load_state_dict(saved)
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer([(2, 3), (4,)]).load_state_dict(saved)


# -- parts ------------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("start, stop", [(0, 7), (5, 21), (13, 14), (20, 24), (24, 24)])
def test_a_shard_is_updated_as_the_whole_would_be_and_nothing_else(name: str, start: int, stop: int) -> None:
    whole, part = parameters(numbers(0)), parameters(numbers(0))
    optimizer, sharded = make(md.optim, name, whole), make(md.optim, name, part)
    assert optimizer.parts[0].flat.size == 24
    before = sharded.parts[0].flat.data.copy()
    sharded.parts[0].shard(start, stop)
    for step in range(5):
        for params in (whole, part):
            backward(params, gradients(step), (1,) if step == 1 else ())
        optimizer.step(), sharded.step()
    all_of_it, mine = optimizer.parts[0].flat.data, sharded.parts[0].flat.data
    assert_array_equal(mine[start:stop], all_of_it[start:stop])
    assert_array_equal(np.delete(mine, range(start, stop)), np.delete(before, range(start, stop)))
    assert all(array.size == stop - start for array in sharded.parts[0].state.values())
    if stop < 24:
        with pytest.raises(RuntimeError, match="sharded"):
            sharded.state_dict()
    if sharded.parts[0].state:
        with pytest.raises(RuntimeError, match="before its first step"):
            sharded.parts[0].shard(0, 1)


def test_parameters_of_two_dtypes_train_side_by_side() -> None:
    mixed = parameters([numbers(0, np.float32)[0], numbers(0)[1], numbers(0, np.float32)[1]])
    alone = [parameters([p.numpy().copy()]) for p in mixed]
    optimizers = [md.optim.Adam(mixed), *(md.optim.Adam(p) for p in alone)]
    assert [part.flat.data.dtype for part in optimizers[0].parts] == [np.float32, np.float64]
    for step in range(5):
        grads = [gradients(step, np.float32)[0], gradients(step)[1], gradients(step, np.float32)[1]]
        backward(mixed, grads)
        for p, g in zip(alone, grads, strict=True):
            backward(p, [g])
        for optimizer in optimizers:
            optimizer.step()
    for p, (q,) in zip(mixed, alone, strict=True):
        assert_array_equal(p.numpy(), q.numpy(), strict=True)
    assert [e["exp_avg"].shape for e in optimizers[0].state_dict()["state"].values()] == [(3, 4), (5,), (5,)]


# -- the rest of an optimizer -----------------------------------------------------------------------------------------


def test_frozen_parameters_stay() -> None:
    model = md.nn.Sequential(md.nn.Linear(3, 4), md.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    optimizer = md.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(md.ones(1, 3)).sum().backward()
        optimizer.step()
    for name, array in model.state_dict().items():
        assert (array == before[name]).all() == name.startswith("0."), name


def test_zero_grad_makes_gradients_none_and_without_it_they_add_up() -> None:
    p = Parameter(md.tensor([1.0, 2.0]))
    optimizer = md.optim.SGD([p], lr=1.0)
    for _ in range(2):
        (p * md.tensor([1.0, 10.0])).sum().backward()
    assert_array_equal(p.grad.numpy(), [2, 20])
    optimizer.zero_grad()
    assert p.grad is None
    (p * md.tensor([1.0, 10.0])).sum().backward()
    optimizer.step()
    assert_array_equal(p.numpy(), [0, -8])


def test_a_closure_is_called_first_and_its_loss_returned() -> None:
    p = Parameter(md.tensor([3.0]))
    optimizer = md.optim.SGD([p], lr=0.5)

    def closure() -> md.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert p.item() == 0
    assert optimizer.step() is None


def test_an_update_is_noticed_by_a_graph_that_saved_the_parameter() -> None:
    p = Parameter(md.tensor([3.0]))
    optimizer = md.optim.SGD([p])
    y = (p * p).sum()
    backward([p], [np.ones(1, np.float32)])
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


BAD: list[tuple[Callable[[list[Parameter]], Any], str]] = [
    (lambda p: md.optim.SGD(p, lr=-0.1), "SGD: lr .* -0.1"),
    (lambda p: md.optim.SGD(p, lr=math.nan), "SGD: lr .* nan"),
    (lambda p: md.optim.SGD(p, momentum=-1), "SGD: momentum .* -1"),
    (lambda p: md.optim.SGD(p, weight_decay=-2), "SGD: weight_decay .* -2"),
    (lambda p: md.optim.SGD(p, nesterov=True), "nesterov .* 0 and 0"),
    (lambda p: md.optim.SGD(p, momentum=0.9, dampening=0.1, nesterov=True), "nesterov .* 0.9 and 0.1"),
    (lambda p: md.optim.Adam(p, lr=-1), "Adam: lr .* -1"),
    (lambda p: md.optim.Adam(p, eps=-1e-8), "Adam: eps .* -1e-08"),
    (lambda p: md.optim.Adam(p, betas=(0.9, 1.0)), r"Adam: betas .* \(0.9, 1.0\)"),
    (lambda p: md.optim.Adam(p, betas=(-0.1, 0.9)), r"Adam: betas .* \(-0.1, 0.9\)"),
    (lambda p: md.optim.AdamW(p, weight_decay=-3), "AdamW: weight_decay .* -3"),
    (lambda p: md.optim.Adam([{"params": p, "lr": -7}]), "Adam: lr .* -7"),
    (lambda p: md.optim.Adam([]), "empty"),
    (lambda p: md.optim.Adam([p[0], p[1], p[0]]), "twice"),
    (lambda p: md.optim.Adam([{"params": p}, {"params": p[:1]}]), "twice"),
    (lambda p: lr_scheduler.StepLR(md.optim.SGD(p), 0), "step_size .* 0"),
    (lambda p: lr_scheduler.CosineAnnealingLR(md.optim.SGD(p), 0), "T_max .* 0"),
    (lambda p: lr_scheduler.LinearLR(md.optim.SGD(p), 0.0), "0.0"),
    (lambda p: lr_scheduler.LinearLR(md.optim.SGD(p), 1.5), "1.5"),
    (lambda p: lr_scheduler.LinearLR(md.optim.SGD(p), total_iters=0), "total_iters 0"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_bad_options_are_refused_naming_them(make: Callable[[list[Parameter]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(numbers(0)))


def test_what_is_no_list_of_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match="not one tensor"):
        md.optim.SGD(parameters(numbers(0))[0])
    with pytest.raises(TypeError, match="make it a Parameter"):
        md.optim.SGD([md.ones(3, requires_grad=True)])


# -- schedules --------------------------------------------------------------------------------------------------------


def warm_up_then_cosine(schedules: Any, optimizer: Any) -> Any:
    warm_up = schedules.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = schedules.CosineAnnealingLR(optimizer, T_max=25, eta_min=1e-3)
    return schedules.SequentialLR(optimizer, [warm_up, cosine], milestones=[5])


SCHEDULES: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda s, o: s.StepLR(o, 7),
    "step-gamma": lambda s, o: s.StepLR(o, 4, gamma=0.5),
    "cosine": lambda s, o: s.CosineAnnealingLR(o, 30),
    "cosine-up-again": lambda s, o: s.CosineAnnealingLR(o, 8, 1e-4),
    "linear": lambda s, o: s.LinearLR(o),
    "linear-down": lambda s, o: s.LinearLR(o, 1.0, 0.0, 20),
    "warm-up-then-cosine": warm_up_then_cosine,
    "three": lambda s, o: s.SequentialLR(o, [s.LinearLR(o), s.StepLR(o, 2), s.LinearLR(o, 1.0, 0.5)], [5, 12]),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_pytorchs_over_thirty_epochs(torch: Any, name: str) -> None:
    def rates(optimizer: Any, schedules: Any) -> Iterator[list[float]]:
        schedule = SCHEDULES[name](schedules, optimizer)
        for _ in range(31):
            assert schedule.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
            yield [float(g["lr"]) for g in optimizer.param_groups]
            optimizer.step()
            schedule.step()

    def groups(params: Any) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "lr": 2.0}]

    ours = md.optim.SGD(groups(parameters(numbers(0))), lr=0.3)
    theirs = torch.optim.SGD(groups([torch.tensor(v, requires_grad=True) for v in numbers(0)]), lr=0.3)
    expected = list(rates(theirs, torch.optim.lr_scheduler))
    assert_allclose(list(rates(ours, lr_scheduler)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_resumes(name: str) -> None:
    optimizer = md.optim.SGD(parameters(numbers(0)), lr=0.3)
    schedule = SCHEDULES[name](lr_scheduler, optimizer)
    for _ in range(6):
        schedule.step()
    saved, options = schedule.state_dict(), optimizer.state_dict()
    other = md.optim.SGD(parameters(numbers(0)), lr=0.3)
    other.load_state_dict(options)
    resumed = SCHEDULES[name](lr_scheduler, other)
    resumed.load_state_dict(saved)
    for _ in range(10):
        assert resumed.get_last_lr() == schedule.get_last_lr()
        resumed.step(), schedule.step()


def test_a_sequence_wants_a_milestone_between_any_two() -> None:
    optimizer = md.optim.SGD(parameters(numbers(0)))
    parts: list[Any] = [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 3)]
    for milestones in ([], [1, 2]):
        with pytest.raises(ValueError, match="2 schedules"):
            lr_scheduler.SequentialLR(optimizer, parts, milestones)


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_pytorchs(torch: Any, norm_type: float, max_norm: float, device: str) -> None:
    shapes = SHAPES[:4]
    ours = parameters(numbers(0, np.float32, shapes), device)
    theirs = [torch.tensor(value, requires_grad=True) for value in numbers(0, np.float32, shapes)]
    md.nn.flatten(ours)
    for params in (ours, theirs):
        backward(params, gradients(0, np.float32, shapes), (1,))
    kept = [p.grad.data if p.grad is not None else None for p in ours]
    mine = md.optim.clip_grad_norm_((p for p in ours), max_norm, norm_type)
    other = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert mine.shape == ()
    assert_allclose(mine.numpy(), other.numpy(), rtol=1e-6)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if i == 1:
            assert p.grad is None
        else:
            assert p.grad.data is kept[i]  # in place
            assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-6)


def test_clipping_nothing_and_the_infinite() -> None:
    (p,) = parameters([np.zeros(2)])
    assert md.optim.clip_grad_norm_([p], 1.0).item() == 0
    p.grad = md.tensor(np.array([math.inf, 1.0]))
    with pytest.raises(RuntimeError, match="inf"):
        md.optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert_array_equal(p.grad.numpy(), [math.inf, 1])


# -- subnormal numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {}),
        ("Adam", {"betas": (0.5, 0.9)}),
        ("AdamW", {"betas": (0.99, 0.99)}),
        ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    ],
)
def test_averages_of_gradients_that_have_ceased_never_become_subnormal(name: str, options: dict[str, Any]) -> None:
    (p,) = parameters([np.ones(50, np.float32)])
    optimizer = getattr(md.optim, name)([p], **options)
    first = np.random.default_rng(0).lognormal(-10, 8, 50).astype(np.float32)  # from 1e-12 to 1e3
    tiny = np.finfo(np.float32).tiny
    for step in range(4000):
        backward([p], [first if step < 3 else np.zeros_like(first)])
        optimizer.step()
        optimizer.zero_grad()
        for average in optimizer.parts[0].state.values():
            assert not ((average != 0) & (np.abs(average) < tiny)).any(), f"step {step}"


@pytest.mark.parametrize(("name", "options"), [("Adam", {}), ("SGD", {"lr": 1e-3, "momentum": 0.9})])
def test_sweeping_out_what_is_tiny_changes_no_parameter(name: str, options: dict[str, Any], torch: Any) -> None:
    start = np.random.default_rng(1).standard_normal(50)
    (p,), q = parameters([start]), torch.nn.Parameter(torch.tensor(start))
    ours, theirs = getattr(md.optim, name)([p], **options), getattr(torch.optim, name)([q], **options)
    for step in range(600):
        g = np.random.default_rng(step).standard_normal(50) * (0.1**step if step < 300 else 0)
        backward([p], [g])
        q.grad = torch.tensor(g)
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert_allclose(p.numpy(), q.detach().numpy(), rtol=1e-10)


def test_half_precision_averages_are_not_swept_out() -> None:
    (p,) = parameters([np.ones(3, np.float16)])
    optimizer = md.optim.SGD([p], lr=0.0, momentum=0.9)
    for _ in range(180):
        backward([p], [np.ones(3, np.float16)])
        optimizer.step()
        optimizer.zero_grad()
        assert (optimizer.parts[0].state["momentum_buffer"] > 0).all()


@pytest.mark.parametrize("owner", ["optimizer", "module"])
def test_gradients_can_be_set_to_zero_and_not_to_none(owner: str) -> None:
    layer = md.nn.Linear(2, 1)
    optimizer = md.optim.SGD(layer.parameters(), lr=0.1)
    layer(md.ones(1, 2)).sum().backward()
    (optimizer if owner == "optimizer" else layer).zero_grad(set_to_none=False)
    assert layer.weight.grad is not None
    assert_array_equal(layer.weight.grad.numpy(), [[0, 0]])
    layer(md.ones(1, 2)).sum().backward()
    assert_array_equal(layer.weight.grad.numpy(), [[1, 1]])
