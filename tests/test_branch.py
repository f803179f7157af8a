"""Branches on ranks of their own train as all of them do on one, where a plain module calls one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist import backend
from minidist.comm import Communicator, Network, simulate
from minidist.mesh import Mesh
from minidist.nn import functional as F
from minidist.parallel.branch import Branches, whole_state
from minidist.tensor import Function, Tensor

STEPS = 5
B = 6  # samples


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tower(*sizes: int) -> md.nn.Module:
    """Linear layers with tanh between them."""
    layers: list[md.nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [md.nn.Linear(n, m), md.nn.Tanh()]
    return md.nn.Sequential(*layers[:-1])


class ByHand(md.nn.Module):
    """What Branches does, on one rank, written out. `comm` and places are taken and not used."""

    def __init__(self, branches: Sequence[md.nn.Module], comm: Any, join: str = "cat", dim: int = 1, **_: Any):
        self.branches, self.join, self.dim = md.nn.ModuleList(branches), join, dim

    def forward(self, x: Any) -> Any:
        xs = x if isinstance(x, list) else [x] * len(self.branches)
        ys = [branch(each) for branch, each in zip(self.branches, xs, strict=True)]
        if self.join == "list":
            return ys
        if self.join == "cat":
            return md.cat(ys, self.dim)
        total = ys[0]
        for y in ys[1:]:
            total = total + y
        return total if self.join == "sum" else total * (1 / len(ys))


class Each(md.nn.Module):
    """So many linear layers, each of the same x: makes a list."""

    def __init__(self, n: int, m: int):
        self.one, self.two, self.three = (md.nn.Linear(n, m) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.one(x), self.two(x), self.three(x)]


class Product(md.nn.Module):
    """Of all in a list."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return xs[0] * xs[1] * xs[2]


Kind = Callable[..., md.nn.Module]
Build = Callable[[Kind, Any], md.nn.Module]


def inside(branches: Kind, comm: Any) -> md.nn.Module:
    """Replicated layers before and after."""
    return md.nn.Sequential(
        tower(4, 5), branches([tower(5, 2, 3), tower(5, 9, 2), tower(5, 4)], comm), md.nn.Tanh(), tower(9, 2)
    )


def ensemble(branches: Kind, comm: Any) -> md.nn.Module:
    """Nothing before or after: with 4 ranks one has no parameter at all."""
    return branches([tower(4, 3, 2), tower(4, 8, 2), tower(4, 2)], comm, join="mean")


def inception(branches: Kind, comm: Any) -> md.nn.Module:
    """Of images (B, 2, 4, 4), three channels and two and two; a branch without parameters, one with buffers."""
    return md.nn.Sequential(
        branches(
            [
                md.nn.Sequential(md.nn.Conv2d(2, 3, 1), md.nn.BatchNorm2d(3)),
                md.nn.MaxPool2d(3, 1, 1),
                md.nn.Sequential(md.nn.Conv2d(2, 2, 1), md.nn.ReLU(), md.nn.Conv2d(2, 2, 3, padding=1)),
            ],
            comm,
        ),
        md.nn.Flatten(),
        md.nn.Linear(7 * 16, 2),
    )


def lists(branches: Kind, comm: Any) -> md.nn.Module:
    """A tensor for each branch, from one row of branches to the next, placed by hand."""
    last = comm.size - 1
    return md.nn.Sequential(
        Each(4, 5),
        branches([tower(5, 3), tower(5, 2, 3), tower(5, 3)], comm, join="list", place=[last, 0, last]),
        branches([tower(3, 7), tower(3, 7), tower(3, 5, 7)], comm, join="list"),
        Product(),
        branches([tower(7, 2), tower(7, 3, 2)], comm, join="sum", place=[last, last]),
    )


BUILDS: dict[str, tuple[Build, tuple[int, ...], Any]] = {
    "inside": (inside, (B, 4), lambda p: md.optim.SGD(p, lr=0.1, momentum=0.9)),
    "ensemble": (ensemble, (B, 4), lambda p: md.optim.Adam(p, lr=0.05)),
    "inception": (inception, (B, 2, 4, 4), lambda p: md.optim.SGD(p, lr=0.1, momentum=0.9)),
    "lists": (lists, (B, 4), lambda p: md.optim.Adam(p, lr=0.05)),
}


def built(build: Build, kind: Kind, comm: Any) -> md.nn.Module:
    md.manual_seed(3)
    return build(kind, comm).double()


def train(model: md.nn.Module, shape: tuple[int, ...], make: Any) -> list[float]:
    """The losses; cross-entropy of two classes."""
    parameters = list(model.parameters())
    optimizer = make(parameters) if parameters else None
    losses = []
    for step in range(STEPS):
        x, labels = numbers(step, *shape), np.arange(shape[0]) % 2
        for p in parameters:
            p.grad = None
        loss = F.cross_entropy(model(Tensor(x)), Tensor(labels))
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    return losses


def assert_states_agree(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(ours) == list(expected)
    for name, array in expected.items():
        assert_allclose(ours[name], array, rtol=1e-10, atol=1e-12, err_msg=name)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("name", BUILDS)
def test_ranks_train_as_one(comm: Communicator, name: str) -> None:
    build, shape, make = BUILDS[name]
    reference = built(build, ByHand, comm)
    before = {name: array.copy() for name, array in reference.state_dict().items()}
    expected = train(reference, shape, make)
    model = built(build, Branches, comm)
    losses = train(model, shape, make)
    assert_allclose(losses, expected, rtol=1e-10)
    whole = whole_state(model)  # on every rank: what is replicated is this rank's own
    assert_states_agree(whole, reference.state_dict())
    trained = {name for name in whole if name.endswith("weight")}
    assert all(not np.allclose(whole[name], before[name]) for name in trained)
    # Every rank has its own branches only, under the names that they have on one rank ...
    own = list(model.state_dict())
    elsewhere = [
        f"{prefix}.branches.{i}.".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, Branches)
        for i, rank in module.placed.items()
        if rank != comm.rank
    ]
    assert own == [name for name in whole if not name.startswith(tuple(elsewhere))]
    # ... and what all have is the same on all, bit for bit.
    for name, array in whole.items():
        assert_array_equal(md.collectives.broadcast(comm, array.copy()), array)
        assert name in own or ".branches." in f".{name}"


@on_ranks(1, 2, 3, 4)
def test_without_gradients(comm: Communicator) -> None:
    reference, model = (built(inside, kind, comm) for kind in (ByHand, Branches))
    x = Tensor(numbers(1, B, 4))
    with md.no_grad():
        ours, expected = model(x), reference(x)
    assert not ours.requires_grad
    assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-12)


# -- what is asked of backward ----------------------------------------------------------------------------------------


class Constant(md.nn.Module):
    """Looks at no input."""

    def __init__(self) -> None:
        self.value = md.nn.Parameter(np.arange(3.0) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.value * 2


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("root", [None, 0])
def test_backward_comes_by_all_inputs_whatever_is_used(comm: Communicator, root: int | None) -> None:
    """Of two inputs and two branches only one reaches the loss; and one of the branches looks at no input."""
    last = comm.size - 1
    for used, wanted, place in ((0, 3.0, [last, 0]), (1, 0.0, [0, last])):
        a, b = (Tensor(numbers(seed, 3), requires_grad=True) for seed in (0, 1))
        triple = md.nn.Sequential(md.nn.Linear(3, 3, bias=False)).double()
        triple.load_state_dict({"0.weight": 3 * np.eye(3)})
        model = Branches([triple, Constant()], comm, join="list", place=place, root=root)
        here = root in (None, comm.rank)
        results = model([a, b] if here else None)
        (results[used].sum() if here else results).backward()
        for x, value in ((a, wanted), (b, 0.0)) if here else ():
            assert_array_equal(0 if x.grad is None else x.grad.numpy(), np.full(3, value))
        for name, p in model.named_parameters():
            assert (p.grad is not None and bool(p.grad.numpy().any())) == (name[9] == str(used))


@on_ranks(1, 2, 3, 4)
def test_what_is_frozen_wants_no_gradient_on_any_rank(comm: Communicator) -> None:
    frozen = tower(3, 3).double().requires_grad_(False)
    model = Branches([frozen, tower(3, 2).double()], comm, join="list")
    still, trained = model(Tensor(numbers(0, B, 3)))
    assert not still.requires_grad
    assert trained.requires_grad
    total = Branches([frozen, md.nn.Softmax()], comm, join="sum")(Tensor(numbers(0, 2, 3)))
    assert not total.requires_grad
    sent = comm.record.sent_messages
    trained.sum().backward()
    assert comm.record.sent_messages == sent  # the inputs want no gradient: there is nothing to tell


class Odd(md.nn.Module):
    """Outputs of this kind."""

    def __init__(self, dtype: Any, *shape: int):
        self.dtype, self.shape = dtype, shape

    def forward(self, x: Tensor) -> Tensor:
        return Tensor((numbers(len(self.shape), *self.shape, len(x)) * 9).astype(self.dtype))


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("root", [None, 0])
def test_outputs_of_any_shape_and_dtype(comm: Communicator, root: int | None) -> None:
    odd = [Odd(np.float32, 3), Odd(np.int64, 2, 3), Odd(np.float64), Odd(np.bool_, 1, 1, 1), Odd(np.uint8, 5, 0)]
    model = Branches(odd, comm, join="list", root=root)
    here = root in (None, comm.rank)
    for n in (2, 0, 3):  # another at every call
        results = model(Tensor(np.zeros(n)) if here else None)
        for y, branch in zip(results, odd, strict=True) if here else ():
            expected = branch(Tensor(np.zeros(n))).numpy()
            assert y.dtype == expected.dtype
            assert not (y.requires_grad and y.dtype.kind != "f")
            assert_array_equal(y.numpy(), expected)


# -- random numbers ---------------------------------------------------------------------------------------------------


class Dropping(md.nn.Module):
    """Three branches with dropout and one after them, by hand: with masks drawn as Branches says."""

    def __init__(self) -> None:
        self.before = md.nn.Linear(4, 5)
        self.branches = md.nn.ModuleList([md.nn.Linear(5, n) for n in (3, 7, 4)])
        self.after = md.nn.Linear(14, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        seed = int(backend.default_generator().numpy.integers(1 << 62)) if self.training else 0
        masks = [backend.Generator(seed + i) for i in range(3)]
        ys = [F.dropout(b(x), 0.5, self.training, mask) for b, mask in zip(self.branches, masks, strict=True)]
        return self.after(F.dropout(md.cat(ys, 1), 0.3, self.training))


def dropping(comm: Communicator) -> md.nn.Module:
    before = md.nn.Linear(4, 5)
    branches = [md.nn.Sequential(md.nn.Linear(5, n), md.nn.Dropout(0.5)) for n in (3, 7, 4)]
    return md.nn.Sequential(before, Branches(branches, comm), md.nn.Dropout(0.3), md.nn.Linear(14, 2)).double()


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("recomputed", ["none", "all"])
def test_dropout_inside_and_after_does_not_depend_on_the_ranks(comm: Communicator, recomputed: str) -> None:
    sgd = BUILDS["inside"][2]
    md.manual_seed(5)
    reference = Dropping().double()
    expected = train(reference, (B, 4), sgd)
    drawn = backend.default_generator().numpy.random()
    md.manual_seed(5)
    model = dropping(comm)
    model[1].recompute_(recomputed)  # what is done over in backward draws the same again, with all ranks
    losses = train(model, (B, 4), sgd)
    # Evaluation draws nothing, here as elsewhere.
    model.eval()
    reference.eval()
    x = Tensor(numbers(0, B, 4))
    assert_allclose(model(x).numpy(), reference(x).numpy(), rtol=1e-10)
    assert_allclose(losses, expected, rtol=1e-10)
    assert backend.default_generator().numpy.random() == drawn
    # Every forward, and every branch, has masks of its own.
    ones = Branches([md.nn.Dropout(0.5), md.nn.Dropout(0.5)], comm, join="list")
    four = [y.numpy().tobytes() for _ in range(2) for y in ones(Tensor(np.ones((9, 9))))]
    assert len(set(four)) == 4


# -- where branches are placed ----------------------------------------------------------------------------------------


@on_ranks(4)
def test_placed_by_bytes_or_by_hand(comm: Communicator) -> None:
    branches = [tower(3, 2), tower(3, 50), md.nn.Tanh(), tower(3, 2).double(), tower(3, 3)]
    assert Branches(branches, comm).placed == {0: 0, 1: 1, 2: 2, 3: 2, 4: 3}
    model = Branches(branches, comm, place=[3, 3, 1, 0, 3])
    assert model.placed == {0: 3, 1: 3, 2: 1, 3: 0, 4: 3}
    here = {0: ["3"], 1: ["2"], 2: [], 3: ["0", "1", "4"]}
    assert [name for name, _ in model.branches.named_children()] == here[comm.rank]


# -- all on one root --------------------------------------------------------------------------------------------------


class Rooted(md.nn.Module):
    """Layers on the root, branches on all."""

    def __init__(self, comm: Communicator, kind: Kind, root: int, join: str, several: bool):
        self.before: Any = Each(4, 5) if several else tower(4, 5)
        towers = [tower(5, 6), tower(5, 2, 6), tower(5, 6)]
        self.middle = kind(towers, comm, join=join, root=root, dim=0)
        self.after = tower(6, 2)
        self.here = comm.rank == root or kind is ByHand
        if not self.here:
            del self.before, self.after

    def forward(self, x: Any) -> Any:
        middle = self.middle(self.before(x) if self.here else None)
        return self.after(middle) if self.here else middle


def rooted(comm: Communicator, join: str, several: bool) -> None:
    root = comm.size // 2
    labels = Tensor(np.arange(B * (3 if join == "cat" else 1)) % 2)
    md.manual_seed(1)
    reference = Rooted(comm, ByHand, root, join, several).double()
    md.manual_seed(1)
    model = Rooted(comm, Branches, root, join, several).double()
    model.middle.recompute_("all" if several else "none")
    optimizers = [md.optim.SGD(list(m.parameters()), lr=0.1) if list(m.parameters()) else None
                  for m in (reference, model)]  # fmt: skip
    for step in range(3):
        losses = []
        for m, optimizer, here in zip((reference, model), optimizers, (True, model.here), strict=True):
            m.zero_grad()
            result = m(Tensor(numbers(step, B, 4)) if here else None)
            loss = F.cross_entropy(result, labels) if here else result
            loss.backward()
            losses.append(loss.item())
            if optimizer is not None:
                optimizer.step()
        assert_allclose(losses[1], losses[0] if model.here else 0, rtol=1e-10)
    for name, array in model.state_dict().items():
        assert_allclose(array, reference.state_dict()[name], rtol=1e-10, err_msg=name)
    with md.no_grad():
        ours, expected = model(Tensor(numbers(9, B, 4)) if model.here else None), reference(Tensor(numbers(9, B, 4)))
    assert_allclose(ours.numpy(), expected.numpy() if model.here else 0, rtol=1e-10)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("join, several", [("cat", False), ("mean", True)])
def test_inputs_from_a_root_and_outputs_to_it(comm: Communicator, join: str, several: bool) -> None:
    rooted(comm, join, several)


def test_a_root_where_sends_wait_for_receives() -> None:
    simulate(lambda comm: rooted(comm, "cat", True), 3, network=Network(sends="rendezvous"))


@on_ranks(2, 3)
def test_a_root_without_branches_whose_inputs_want_no_gradient(comm: Communicator) -> None:
    frozen = tower(3, 2).double().requires_grad_(False)
    own = tower(3, 2).double()
    weights = {name: array.copy() for name, array in own.state_dict().items()}
    model = Branches([frozen, own, md.nn.Tanh()], comm, "list", root=0, place=[1, comm.size - 1, 1])
    x = numbers(0, B, 3)
    results = model(Tensor(x) if comm.rank == 0 else None)
    if comm.rank == 0:
        assert [y.shape for y in results] == [(B, 2), (B, 2), (B, 3)]
        (results[1].sum() + results[2].sum()).backward()
    else:
        results.backward()
    if comm.rank == comm.size - 1:
        grad = dict(model.named_parameters())["branches.1.0.weight"].grad
        assert grad is not None
        assert_allclose(grad.numpy(), np.ones((2, B)) @ x, rtol=1e-10)
        assert_array_equal(weights["0.weight"], model.state_dict()["branches.1.0.weight"])


@pytest.mark.parametrize("root", [None, 1])
def test_on_gpus(gpu: None, root: int | None) -> None:
    def program(comm: Communicator) -> None:
        reference = ByHand([tower(4, 3), tower(4, 2)], comm).double()
        model = Branches([tower(4, 3), tower(4, 2)], comm, root=root).double().to("cuda")
        state = {name: array.copy() for name, array in reference.state_dict().items()}
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        x, weights = Tensor(numbers(0, B, 4), requires_grad=True), numbers(1, B, 5)
        y = model(x.to("cuda") if root in (None, comm.rank) else None)
        if root in (None, comm.rank):
            assert y.device.startswith("cuda")
            y = (y * Tensor(weights).to("cuda")).sum()
        y.backward()
        given = Tensor(numbers(0, B, 4), requires_grad=True)
        (reference(given) * Tensor(weights)).sum().backward()
        expected = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert_allclose(p.grad.numpy(), expected[name], rtol=1e-10)
        if root in (None, comm.rank):
            assert x.grad is not None and given.grad is not None
            assert_allclose(x.grad.numpy(), given.grad.numpy(), rtol=1e-10)
        for name, array in whole_state(model).items():
            assert_array_equal(backend.to_numpy(array), state[name])

    simulate(program, 2)


# -- with other ways of sharing the work ------------------------------------------------------------------------------


@on_ranks(1, 2, 4)
def test_branches_of_branches_on_a_mesh(comm: Communicator) -> None:
    mesh = Mesh(comm, pp=min(comm.size, 2), tp=max(comm.size // 2, 1))

    def build(kind: Kind, comm: Any) -> md.nn.Module:
        def inner() -> md.nn.Module:
            return md.nn.Sequential(kind([tower(5, 3), tower(5, 4, 2)], mesh.tp), tower(5, 3))

        return md.nn.Sequential(tower(4, 5), kind([inner(), inner(), tower(5, 3)], mesh.pp, join="sum"), tower(3, 2))

    reference, model = (built(build, kind, comm) for kind in (ByHand, Branches))
    sgd = BUILDS["inside"][2]
    assert_allclose(train(model, (B, 4), sgd), train(reference, (B, 4), sgd), rtol=1e-10)
    assert_states_agree(whole_state(model), reference.state_dict())


@on_ranks(4)
def test_data_parallel_along_the_other_axis(comm: Communicator) -> None:
    mesh = Mesh(comm, dp=2, pp=2)
    reference, model = built(inside, ByHand, comm), built(inside, Branches, mesh.pp)
    optimizers = [md.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (reference, model)]
    network, optimizer = md.parallel.data_parallel(model, optimizers[1], mesh.dp)
    half = slice(mesh.dp.rank * B // 2, (mesh.dp.rank + 1) * B // 2)
    for step in range(3):
        x, labels = numbers(step, B, 4), np.arange(B) % 2
        for m, o, part in ((reference, optimizers[0], slice(None)), (network, optimizer, half)):
            o.zero_grad()
            F.cross_entropy(m(Tensor(x[part])), Tensor(labels[part])).backward()
            o.step()
    assert_states_agree(whole_state(model), reference.state_dict())


# -- what it is good for ----------------------------------------------------------------------------------------------


class Work(Function):
    """y = x.   dx = dy, in so many seconds, as forward took"""

    def forward(self, x: np.ndarray, comm: Communicator, seconds: float) -> np.ndarray:
        self.comm, self.seconds = comm, seconds
        comm.elapse(seconds)
        return x.copy()

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray]:
        self.comm.elapse(self.seconds)
        return (dy,)


class Working(md.nn.Module):
    """A branch that takes its time."""

    def __init__(self, comm: Communicator, seconds: float):
        self.comm_here, self.seconds = comm, seconds

    def forward(self, x: Tensor) -> Tensor:
        return Work.apply(x, comm=self.comm_here, seconds=self.seconds)


@pytest.mark.parametrize("place, seconds", [([0, 0, 0], 6), ([0, 0, 1], 3), ([0, 1, 0], 4), ([2, 1, 0], 3)])
def test_a_step_takes_as_long_as_the_busiest_rank(place: list[int], seconds: float) -> None:
    def program(comm: Communicator) -> tuple[float, float]:
        model = Branches([Working(comm, s) for s in (1, 2, 3)], comm, join="sum", place=place)
        y = model(Tensor(numbers(0, B), requires_grad=True))
        forward = comm.clock()
        y.sum().backward()
        return forward, comm.clock()

    run = simulate(program, max(place) + 1, network=Network(alpha=1e-5, beta=1e-9))
    for forward, both in run.results:
        assert forward == pytest.approx(seconds, abs=1e-3)
        assert both == pytest.approx(2 * seconds, abs=1e-3)


def test_what_a_step_sends() -> None:
    def program(comm: Communicator) -> list[int]:
        model = Branches([tower(3, 2).double() for _ in range(4)], comm)
        x = Tensor(numbers(0, 4, 3), requires_grad=True)
        sent = [comm.record.sent_bytes]
        y = model(x)
        sent.append(comm.record.sent_bytes)
        y.sum().backward()
        sent.append(comm.record.sent_bytes)
        md.collectives.all_reduce(comm, numbers(0, 4, 3))
        return np.diff([*sent, comm.record.sent_bytes]).tolist()

    forward, backward, plain = np.array(simulate(program, 4).results).sum(axis=0).tolist()
    assert forward == 3 * 4 * (88 + 64)  # two all_gathers
    assert backward == plain > 0


# -- what it refuses --------------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_bad_arguments_are_refused(comm: Communicator) -> None:
    two: list[Any] = [tower(3, 2), tower(3, 4)]
    last = comm.size - 1
    with pytest.raises(ValueError, match="at least 1 branch, not 0"):
        Branches([], comm)
    with pytest.raises(ValueError, match="join 'stack'; choose one of cat, sum, mean, list"):
        Branches(two, comm, join="stack")
    with pytest.raises(TypeError, match="branch 1 is a float, not a Module"):
        Branches([two[0], 1.0], comm)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=rf"place \[0\] for 2 branches on ranks 0 to {last}"):
        Branches(two, comm, place=[0])
    with pytest.raises(ValueError, match=rf"place \[0, 7\] for 2 branches on ranks 0 to {last}"):
        Branches(two, comm, place=[0, 7])
    with pytest.raises(ValueError, match="root 5"):
        Branches(two, comm, root=5)
    x = Tensor(np.zeros((B, 3), np.float32))
    with pytest.raises(ValueError, match="3 inputs for 2 branches"):
        Branches(two, comm)([x, x, x])
    with pytest.raises(TypeError, match="an input is a ndarray, not a Tensor"):
        Branches(two, comm)([x, x.numpy()])
    with pytest.raises(TypeError, match="an input is a NoneType, not a Tensor"):
        Branches(two, comm)(None)
    with pytest.raises(ValueError, match=r"'sum' of outputs .* branch 0 gave float32 \(6, 2\), branch 1 float32"):
        Branches(two, comm, join="sum")(x)


class Several(md.nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


@on_ranks(2)
def test_and_what_several_ranks_cannot_do(comm: Communicator) -> None:
    first = tower(3, 2)
    with pytest.raises(ValueError, match=r"0\.weight of branch 1 is 0\.weight of branch 0, but .* ranks 1 and 0"):
        Branches([first, md.nn.Sequential(first[0])], comm)
    assert Branches([first, first], comm, place=[1, 1]).placed == {0: 1, 1: 1}
    inner = md.nn.Sequential(Branches([tower(3, 2), tower(3, 2)], comm))
    with pytest.raises(ValueError, match=r"in branch 1, 0 \(Branches\) speaks to all ranks, but only rank 1 has it"):
        Branches([tower(3, 2), inner], comm)
    model = Branches([Several(), Several()], comm)
    with pytest.raises(TypeError, match=f"branch {comm.rank} gave a tuple, not a Tensor"):
        model(Tensor(np.zeros(2)))
    if comm.rank == 1:
        with pytest.raises(ValueError, match="inputs on rank 1, but they come from rank 0"):
            Branches([tower(3, 2), tower(3, 2)], comm, root=0)(Tensor(np.zeros((B, 3))))
    with pytest.raises(TypeError, match="an array of float64 and 9 dims can't go from rank to rank"):
        Branches([md.nn.Tanh(), md.nn.Tanh()], comm)(Tensor(np.zeros((1,) * 9)))
