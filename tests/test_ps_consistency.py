"""When pushes count and pulls are answered: bsp as one rank, ssp within its bound, backup without the last, async."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ps_cases import (
    LABELS,
    OPTIMIZERS,
    Adam,
    Momentum,
    N,
    Served,
    State,
    X,
    by_hand,
    gradients,
    initial,
    one_rank,
)
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.nn import functional as F
from minidist.parallel import ParameterServer, data_parallel
from minidist.parallel.parameter_server import Roles, Stretch, Worker, consistency_of, keys
from minidist.parallel.parameter_server.dealing import Dealer

EPOCHS = 3


def network() -> md.nn.Sequential:
    model = md.nn.Sequential(md.nn.Linear(6, 5), md.nn.ReLU(), md.nn.Linear(5, 4)).to("cpu", np.float64)
    model.load_state_dict(initial())
    return model


def optimizer_of(name: str, model: md.nn.Module) -> md.optim.Optimizer:
    if name == "momentum":
        return md.optim.SGD(model.parameters(), lr=Momentum.lr, momentum=Momentum.momentum)
    decay = OPTIMIZERS[name].decay
    kind = md.optim.AdamW if decay else md.optim.Adam
    return kind(model.parameters(), lr=Adam.lr, weight_decay=decay)


def loss_of(model: Any, samples: np.ndarray) -> md.Tensor:
    return F.cross_entropy(model(md.tensor(X[samples], dtype=np.float64)), md.tensor(LABELS[samples]))


def train(ps: ParameterServer, model: md.nn.Module, epochs: int = EPOCHS) -> Any:
    """What every rank does: the same loop as in the class's docstring, the samples in order."""
    if ps.serves:
        return ps.serve()
    for epoch in range(epochs):
        for start, size in ps.shares(epoch):
            ps.zero_grad()
            if size:
                loss_of(model, np.arange(start, start + size)).backward()
            ps.step()
    ps.pull()
    ps.leave()
    return None


def numbers(model: md.nn.Module) -> State:
    return {name: np.array(md.Tensor(array)) for name, array in model.state_dict().items()}


def assert_weights(model: md.nn.Module, expected: State, rtol: float = 1e-10) -> None:
    got = numbers(model)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert_allclose(got[name], array, rtol=rtol, atol=rtol, err_msg=name)


def roles_fit(comm: Communicator, servers: int, copies: int) -> bool:
    """Whether a worker is left. If not, that is refused."""
    if servers + (copies > 0) < comm.size:
        return True
    with pytest.raises(ValueError, match="that leaves no worker"):
        Roles(comm.size, servers, copies)
    return False


# -- bsp: what one rank would get -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "copies", "sharding", "optimizer", "batch"),
    [
        (1, 0, "range", "momentum", 8),
        (1, 0, "range", "adam", 3),
        (2, 0, "range", "adamw", 5),
        (2, 0, "hash", "momentum", 2),
        (3, 0, "range", "adam", 8),
        (3, 0, "hash", "adamw", 8),
        (2, 1, "range", "momentum", 8),
        (3, 2, "hash", "adam", 5),
        (1, 0, "range", "adamw", 1),
        (1, 0, "hash", "momentum", 50),
    ],
)
@on_ranks(2, 3, 4, 5, 7)
def test_bsp_gives_the_weights_of_one_rank(
    comm: Communicator,
    servers: int,
    copies: int,
    sharding: str,
    optimizer: str,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not roles_fit(comm, servers, copies):
        return
    monkeypatch.setattr(keys, "BLOCK", 80)  # small pieces, so that there are some to hash
    model = network()
    ps = ParameterServer(
        model, optimizer_of(optimizer, model), comm, servers, "bsp", copies, sharding, samples=N, batch_size=batch
    )
    if sharding == "range":
        assert len({key.server for key in ps.layout.keys}) == servers
    train(ps, model)
    if comm.rank == 0 or not ps.serves:
        assert_weights(model, one_rank(optimizer, batch, EPOCHS))


@pytest.mark.parametrize(("servers", "batch"), [(1, 8), (2, 5), (1, 2)])
@on_ranks(2, 3, 4, 5, 7)
def test_bsp_gives_what_the_ring_gives(comm: Communicator, servers: int, batch: int) -> None:
    if not roles_fit(comm, servers, 0):
        return
    model = network()
    ps = ParameterServer(model, optimizer_of("adamw", model), comm, servers, samples=N, batch_size=batch)
    train(ps, model)
    workers = comm.split(None if ps.serves else 0)
    if workers is None:
        return
    other = network()
    wrapped, optimizer = data_parallel(other, optimizer_of("adamw", other), workers, algorithm="ring")
    for _ in range(EPOCHS):
        for start in range(0, N, batch):
            samples = np.arange(start, min(start + batch, N))
            optimizer.zero_grad()
            loss_of(wrapped, np.array_split(samples, workers.size)[workers.rank]).backward()
            optimizer.step()
    assert_weights(model, numbers(other))


@on_ranks(2, 3, 5)
def test_workers_begin_with_the_servers_values(comm: Communicator) -> None:
    model = network()
    if comm.rank:
        model.load_state_dict(initial(seed=comm.rank))
    ps = ParameterServer(model, optimizer_of("adam", model), comm, samples=N, batch_size=6)
    if not ps.serves:
        assert_weights(model, initial(), rtol=0)
    train(ps, model)
    assert_weights(model, one_rank("adam", 6, EPOCHS))


@pytest.mark.parametrize("sizes", [(1, 0, 3, 0), (0, 2, 0, 5), (4, 4, 1, 2)])
@on_ranks(3, 4, 5)
def test_gradients_count_by_their_samples(comm: Communicator, sizes: tuple[int, ...]) -> None:
    # Shares of the caller's own: as many samples as it likes, other ones at each step, none at times.
    cuts = [np.roll(sizes, step)[: comm.size - 1] for step in range(4)]
    shares = [np.split(np.arange(sum(cut)) + 3 * step, np.cumsum(cut)[:-1]) for step, cut in enumerate(cuts)]
    model = network()
    ps = ParameterServer(model, optimizer_of("momentum", model), comm)
    w, reference = initial(), Momentum()
    for step in range(4):
        whole = np.concatenate(shares[step])
        # (A round in which nobody has a sample is a step with a gradient of zeros.)
        zeros = {name: np.zeros_like(a) for name, a in w.items()}
        reference.step(w, gradients(w, X[whole], LABELS[whole]) if len(whole) else zeros)
    if ps.serves:
        ps.serve()
    else:
        for step in range(4):
            mine = shares[step][comm.rank - 1]
            ps.zero_grad()
            if len(mine):
                loss_of(model, mine).backward()
            ps.step()
            ps._samples = 0
        ps.pull()
        ps.leave()
    assert_weights(model, w)


@on_ranks(2, 3, 4)
def test_under_no_sync_gradients_add_up_and_are_pushed_once(comm: Communicator) -> None:
    model = network()
    ps = ParameterServer(model, optimizer_of("momentum", model), comm, samples=N, batch_size=12)
    w, reference = initial(), Momentum()
    workers = comm.size - 1
    for start in (0, 12) * EPOCHS:
        parts = np.array_split(np.arange(start, min(start + 12, N)), workers)
        total: State = dict.fromkeys(w, 0)
        for part in parts:  # each worker's gradient: the sum over its three pieces, each divided by its share's size
            for piece in np.array_split(part, 3):
                for name, g in gradients(w, X[piece], LABELS[piece]).items() if len(piece) else ():
                    total[name] = total[name] + g * len(piece)
        reference.step(w, {name: g / sum(map(len, parts)) for name, g in total.items()})
    if ps.serves:
        report = ps.serve()
        assert report is not None
        assert sum(report.samples.values()) == EPOCHS * N
        assert report.staleness == {0: 2 * EPOCHS * workers * len(ps.layout.keys)}
    else:
        for epoch in range(EPOCHS):
            for start, size in ps.shares(epoch):
                ps.zero_grad()
                pieces = [p for p in np.array_split(np.arange(start, start + size), 3) if len(p)]
                with ps.no_sync():
                    for piece in pieces[:-1]:
                        (loss_of(model, piece) * (len(piece) / size)).backward()
                (loss_of(model, pieces[-1]) * (len(pieces[-1]) / size)).backward()
                ps.step()
        ps.pull()
        ps.leave()
    assert_weights(model, w)


@on_ranks(2, 3)
def test_a_second_backward_outside_of_no_sync_is_refused(comm: Communicator) -> None:
    model = network()
    ps = ParameterServer(model, optimizer_of("momentum", model), comm)
    if ps.serves:
        ps.serve()
        return
    ps.zero_grad()
    loss_of(model, np.arange(3)).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) after each backward, or add up under no_sync"):
        loss_of(model, np.arange(3)).backward()
    ps.step()
    ps.leave()


# -- models of other kinds --------------------------------------------------------------------------------------------


class Forked(md.nn.Module):
    """y = x a b or x b a or x a, as it is told: layers in any order, and not all of them; `idle` is never used."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.a, self.idle, self.b = (md.nn.Linear(3, 3, bias=False).to("cpu", np.float64) for _ in range(3))
        for layer in (self.a, self.idle, self.b):
            layer.weight.data[...] = rng.standard_normal((3, 3))

    def forward(self, x: md.Tensor, path: str) -> md.Tensor:
        for name in path:
            x = getattr(self, name)(x)
        return x


Z = np.random.default_rng(9).standard_normal((40, 3))
PATHS = ["ab", "ba", "a", "b", "ab", "a", "ba", "aa"]


@on_ranks(2, 3, 4, 5)
def test_layers_in_another_order_at_each_step_and_some_not_at_all(comm: Communicator) -> None:
    model = Forked()
    ps = ParameterServer(model, optimizer_of("momentum", model), comm, samples=len(PATHS) * 5, batch_size=5)
    # One rank, by the chain rule: loss = the mean over samples of |y|² / 2. Unused layers have gradients of zeros.
    w = {name: array.copy() for name, array in numbers(model).items()}
    reference = Momentum()
    for step, path in enumerate(PATHS):
        inputs = [Z[5 * step : 5 * step + 5]]
        for name in path:
            inputs.append(inputs[-1] @ w[f"{name}.weight"].T)
        dy, grads = inputs[-1] / 5, {name: np.zeros((3, 3)) for name in w}
        for name, x in zip(reversed(path), inputs[-2::-1]):
            grads[f"{name}.weight"] += dy.T @ x
            dy = dy @ w[f"{name}.weight"]
        reference.step(w, grads)
    if ps.serves:
        ps.serve()
    else:
        for start, size in ps.shares(0):
            ps.zero_grad()
            if size:
                y = model(md.Tensor(Z[start : start + size]), PATHS[start // 5])
                ((y * y).sum() * (0.5 / size)).backward()
            ps.step()
        ps.pull()
        ps.leave()
    assert_weights(model, w, rtol=1e-9)


class Pair(md.nn.Module):
    """Two parameters of one module, used together or one alone: loss = mean(x) (p, q or p + 2 q)."""

    def __init__(self) -> None:
        self.p, self.q = md.nn.Parameter(md.tensor([1.0])), md.nn.Parameter(md.tensor([10.0]))

    def forward(self, x: md.Tensor, which: str) -> md.Tensor:
        value = {"p": lambda: self.p, "q": lambda: self.q, "both": lambda: self.p + 2 * self.q}[which]()
        return (x.mean() * value).sum()


@pytest.mark.parametrize("order", [("p", "both"), ("both", "q"), ("p", "q"), ("both", "both"), ("q", "q")])
@on_ranks(2, 3)
def test_under_no_sync_a_module_may_use_a_part_of_its_parameters(comm: Communicator, order: tuple[str, str]) -> None:
    model = Pair()
    ps = ParameterServer(model, md.optim.SGD(model.parameters(), lr=1.0), comm)
    if ps.serves:
        ps.serve()
    else:
        ps.zero_grad()
        with ps.no_sync():
            model(md.tensor([float(comm.rank)]), order[0]).backward()
        model(md.tensor([float(comm.rank)]), order[1]).backward()
        ps.step()
        ps.pull()
        ps.leave()
    mean = np.mean(range(1, comm.size))  # the workers' inputs are their ranks
    used = dict(p=(1, 0), q=(0, 1), both=(1, 2))
    p, q = (1 - mean * sum(used[o][0] for o in order), 10 - mean * sum(used[o][1] for o in order))
    assert_allclose([numbers(model)["p"][0], numbers(model)["q"][0]], [p, q], rtol=1e-6)


@on_ranks(2, 3, 4)
def test_frozen_parameters_stay(comm: Communicator) -> None:
    model = network()
    for name in ("0.weight", "2.bias"):
        dict(model.named_parameters())[name].requires_grad_(False)
    ps = ParameterServer(
        model,
        md.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9),
        comm,
        samples=N,
        batch_size=8,
    )
    w, reference = initial(), Momentum()
    for _ in range(EPOCHS):
        for start in range(0, N, 8):
            g = gradients(w, X[start : start + 8], LABELS[start : start + 8])
            reference.step(w, {name: g[name] for name in ("0.bias", "2.weight")})
    train(ps, model)
    assert_weights(model, w)


@on_ranks(2, 3, 5)
def test_servers_may_do_what_they_are_told_with_a_gradient(comm: Communicator) -> None:
    def signs(values: np.ndarray, gradient: np.ndarray, scale: float) -> None:
        values -= 0.01 * scale * np.sign(gradient)

    model = network()
    ps = ParameterServer(model, signs, comm, samples=N, batch_size=7)
    w = initial()
    for _ in range(EPOCHS):
        for start in range(0, N, 7):
            for name, g in gradients(w, X[start : start + 7], LABELS[start : start + 7]).items():
                w[name] = w[name] - 0.01 * np.sign(np.where(abs(g) < 1e-13, 0, g))
    train(ps, model)
    assert_weights(model, w)


# -- sparse embeddings ------------------------------------------------------------------------------------------------

ROWS, WIDTH = 211, 7
WORDS = np.random.default_rng(3).integers(0, ROWS, (30, 4))
WORDS[:, 1] = WORDS[:, 0]  # every sample has a row twice
WORDS[::3, 2] = 17  # and one row is in many


class Bag(md.nn.Module):
    """The loss |mean of the words' rows - 1|² / 2, with a layer behind: y = bag w."""

    def __init__(self) -> None:
        rng = np.random.default_rng(6)
        self.table = md.nn.Embedding(ROWS, WIDTH).to("cpu", np.float64)
        self.head = md.nn.Linear(WIDTH, 1, bias=False).to("cpu", np.float64)
        self.table.weight.data[...] = rng.standard_normal((ROWS, WIDTH))
        self.head.weight.data[...] = rng.standard_normal((1, WIDTH))

    def forward(self, words: md.Tensor) -> md.Tensor:
        return self.head(self.table(words).mean(1))


def bag_by_numpy(optimizer: Any, batch: int) -> State:
    model = numbers(Bag())
    for start in list(range(0, len(WORDS), batch)) * 2:
        words = WORDS[start : start + batch]
        bags = model["table.weight"][words].mean(1)
        dy = (bags @ model["head.weight"].T - 1) / len(words)
        table = np.zeros((ROWS, WIDTH))
        np.add.at(table, words, np.repeat((dy @ model["head.weight"] / 4)[:, None], 4, axis=1))
        optimizer.step(model, {"table.weight": table, "head.weight": dy.T @ bags})
    return model


@pytest.mark.parametrize(("servers", "sharding"), [(1, "range"), (2, "range"), (3, "range"), (2, "hash")])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@on_ranks(2, 3, 4, 5)
def test_sparse_embeddings_give_the_same_and_send_less(
    comm: Communicator, servers: int, sharding: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not roles_fit(comm, servers, 0):
        return
    monkeypatch.setattr(keys, "BLOCK", 1000)
    sent = []
    expected = bag_by_numpy(OPTIMIZERS[optimizer](), 6)
    for sparse in (False, True):
        model = Bag()
        before = comm.record.sent_bytes
        ps = ParameterServer(
            model, optimizer_of(optimizer, model), comm, servers, sharding=sharding, samples=len(WORDS), batch_size=6,
            sparse=sparse,
        )  # fmt: skip
        if ps.serves:
            ps.serve()
        else:
            for epoch in range(2):
                for start, size in ps.shares(epoch):
                    ps.zero_grad()
                    if size:
                        error = model(md.tensor(WORDS[start : start + size])) - 1
                        ((error * error).sum() * (0.5 / size)).backward()
                    ps.step()
            with md.no_grad():  # the rows that a forward uses are pulled for it
                final = np.array(model(md.tensor(WORDS)))
            bags = expected["table.weight"][WORDS].mean(1) @ expected["head.weight"].T
            assert_allclose(final, bags, rtol=1e-9, atol=1e-10)
            ps.leave()
        sent.append(comm.record.sent_bytes - before)
        if comm.rank == 0:
            assert_weights(model, expected)
    assert sent[1] < 0.6 * sent[0]


# -- ssp --------------------------------------------------------------------------------------------------------------

STRETCHES = [Stretch("a", 3, "f8"), Stretch("b", 700, "f4"), Stretch("c", 2, "f8")]


def race(comm: Communicator, how: str, servers: int, steps: int, seed: int, events: list[tuple[str, int, int, float]]):
    """Workers of random speeds. Notes when each begins a clock, having its values, and when it has done it."""

    def work(worker: Worker) -> None:
        rng = random.Random(seed * 100 + comm.rank)
        pace = rng.choice([0.1, 1.0, 3.0])
        values = [np.zeros(key.size, key.dtype) for key in worker.layout.keys]
        for clock in range(steps):
            worker.wait(*[worker.pull(key.number, into, clock) for key, into in zip(worker.layout.keys, values)])
            events.append(("begins", comm.rank, clock, comm.clock()))
            comm.elapse(pace * rng.random())
            events.append(("done", comm.rank, clock, comm.clock()))
            for key in worker.layout.keys:
                worker.push(key.number, np.ones(key.size, key.dtype), clock)
        worker.wait(*worker.requests)

    return by_hand(comm, work, STRETCHES, servers, how)


def leads(events: list[tuple[str, int, int, float]], workers: int) -> tuple[int, int]:
    """By how many clocks somebody was ahead of the slowest, at most: by the order of events, and by virtual time."""
    worst, done = 0, Counter[int]()
    for what, rank, clock, _ in events:
        if what == "done":
            done[rank] = clock + 1
        else:
            worst = max(worst, clock - min(done.values()) if len(done) == workers else clock)
    by_time = 0
    finished: dict[int, list[float]] = {}
    for what, rank, _, when in events:
        if what == "done":
            finished.setdefault(rank, []).append(when)
    for what, _, clock, when in events:
        if what == "begins":
            by_time = max(by_time, clock - min(sum(t <= when for t in times) for times in finished.values()))
    return worst, by_time


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize(("size", "servers"), [(4, 1), (6, 2)])
def test_ssp_nobody_is_further_ahead_than_its_bound(bound: int, size: int, servers: int) -> None:
    reached = []
    for seed in range(12):
        events: list[Any] = []
        network = Network(alpha=0.01, beta=1e-6)
        run = simulate(race, size, f"ssp:{bound}", servers, 10, seed, events, seed=seed, network=network)
        reached += leads(events, size - servers)
        assert len(events) == 2 * 10 * (size - servers)  # everyone got to the end
        report = run.results[0].report
        assert max(report.lag) <= bound
        assert report.lag.total() == 10 * (size - servers) * len(STRETCHES) + (
            servers > 1
        ) * report.lag.total() * 0 or (servers > 1)
        assert_array_equal(np.concatenate(run.results[0].values), 10.0 * (size - servers))
    assert max(reached) == bound  # never more, and it does come to that


def test_async_knows_no_bound() -> None:
    lags = []
    for seed in range(6):
        events: list[Any] = []
        simulate(race, 4, "async", 1, 10, seed, events, seed=seed, network=Network(alpha=0.01))
        lags.append(leads(events, 3)[0])
    assert max(lags) > 4


@pytest.mark.parametrize("bound", [0, 2])
def test_ssp_holds_for_a_model_that_is_trained(bound: int) -> None:
    reached = []

    def program(comm: Communicator, seed: int, events: list[Any]) -> None:
        model, rng = network(), random.Random(seed * 100 + comm.rank)
        ps = ParameterServer(
            model, optimizer_of("momentum", model), comm, 1, f"ssp:{bound}", samples=48, batch_size=6, deadline=1e4
        )
        if ps.serves:
            report = ps.serve()
            assert report is not None
            assert max(report.lag) <= bound
            assert sum(report.samples.values()) == 48
            return
        pace = rng.choice([0.1, 3.0])
        for clock, (start, size) in enumerate(ps.shares(0)):
            samples = np.arange(start, start + size) % N
            ps.zero_grad()
            loss = loss_of(model, samples)
            events.append(("begins", comm.rank, clock, comm.clock()))
            comm.elapse(pace * size * rng.random())
            events.append(("done", comm.rank, clock, comm.clock()))
            loss.backward()
            ps.step()
        ps.leave()

    for seed in range(10):
        events: list[Any] = []
        simulate(program, 4, seed, events, seed=seed, network=Network(alpha=0.001))
        reached += leads(events, 3)
    assert max(reached) == bound


@pytest.mark.parametrize("bound", [0, 1, 4])
@on_ranks(2, 3, 4, 5)
def test_ssp_counts_every_push_once(comm: Communicator, bound: int) -> None:
    served = race(comm, f"ssp:{bound}", 1, 7, 1, [])
    if isinstance(served, Served):
        assert_array_equal(np.concatenate(served.values), 7.0 * (comm.size - 1))


# -- backup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backup", "size"), [(1, 4), (2, 5), (1, 3), (3, 7)])
def test_backup_rounds_close_with_the_first_gradients_and_drop_the_rest(backup: int, size: int) -> None:
    workers, steps = size - 1, 6
    full = workers - backup
    straggler = size - 1
    rounds: list[np.ndarray] = []
    joined: list[int] = []  # clocks at which the straggler pushed

    def update(values: np.ndarray, gradient: np.ndarray, scale: float) -> None:
        rounds.append(gradient.copy())

    def work(worker: Worker) -> None:
        rank = worker.comm.rank
        values, clock, made = np.zeros(workers), 0, 0
        while clock < steps:
            worker.wait(worker.pull(0, values, clock))
            worker.comm.elapse(5.5 if rank == straggler else 1 + 0.01 * rank)
            mine = np.zeros(workers)
            mine[rank - 1] = 1
            joined.extend([clock] if rank == straggler else [])
            answer = worker.wait(worker.push(0, mine, clock))
            made += 1
            assert answer.clock > clock
            clock = answer.clock  # the round that is open now
        assert made == steps or rank == straggler or workers - full > 1

    run = simulate(
        lambda comm: by_hand(comm, work, [Stretch("a", workers, "f8")], 1, f"backup:{backup}", update=update), size
    )
    report = run.results[0].report
    assert len(rounds) == steps
    for gradient in rounds:  # the mean of exactly N different workers'
        assert np.count_nonzero(gradient) == min(full, workers)
        assert_allclose(gradient[gradient != 0], 1 / full)
        assert not gradient[straggler - 1]
    assert joined[0] == 0  # it began with the others, came too late, and went on where they were
    assert joined[1:] == sorted(set(joined[1:]))
    assert joined[1] >= 4
    assert report.dropped >= 1
    assert report.staleness == {0: steps * full}


@on_ranks(3, 4, 5)
def test_backup_trains_and_drops_only_what_it_may(comm: Communicator) -> None:
    model = network()
    ps = ParameterServer(model, optimizer_of("momentum", model), comm, 1, "backup:1", samples=N, batch_size=8)
    report = train(ps, model)
    if ps.serves:
        updates = report.staleness[0] / len(ps.layout.keys)
        assert updates % (comm.size - 2) == 0
        assert all(np.isfinite(a).all() for a in numbers(model).values())


# -- async ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["async", "ssp:2"])
@pytest.mark.parametrize(("servers", "copies", "sharding"), [(1, 0, "range"), (3, 0, "hash"), (2, 1, "range")])
@on_ranks(2, 3, 4, 5, 7)
def test_async_loses_nothing_and_counts_nothing_twice(
    comm: Communicator, how: str, servers: int, copies: int, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not roles_fit(comm, servers, copies):
        return
    monkeypatch.setattr(keys, "BLOCK", 300)
    first = servers + (copies > 0)
    stretches = [Stretch("a", 360, "f8", 9), Stretch("b", 1501, "f8")]  # some bodies are short, some long

    def content(rank: int, step: int, key: int, size: int) -> np.ndarray:
        return np.random.default_rng([rank, step, key]).integers(-1000, 1000, size).astype("f8")

    def work(worker: Worker) -> None:
        for step in range(6):
            kept = []
            for key in worker.layout.keys:
                kept.append(content(comm.rank, step, key.number, key.size))
                if (step + comm.rank) % 3:
                    worker.push(key.number, kept[-1])
                elif step % 2:  # a part of it: half here, half there
                    half = key.size // 2
                    worker.push(key.number, kept[-1][:half])
                    worker.push(key.number, kept[-1][half:], start=half)
                elif key.stretch == 0:  # rows, the first one twice, as two halves
                    rows = np.arange(key.size // 9)
                    table = kept[-1].reshape(-1, 9)
                    half = len(rows) // 2
                    twice = np.concatenate([table[1:half], table[:1] / 2, table[:1] / 2])
                    worker.push_rows(key.number, np.r_[rows[1:half], 0, 0], twice)
                    worker.push_rows(key.number, rows[half:], table[half:])
                else:
                    worker.push(key.number, None)
                    worker.push(key.number, kept[-1])
            if step % 2:
                worker.wait(*worker.requests)
        worker.wait(*worker.requests)

    served = by_hand(comm, work, stretches, servers, how, copies, sharding)
    if comm.rank:
        return
    from minidist.parallel.parameter_server import Layout

    for key, got in zip(Layout(stretches, servers, sharding).keys, served.values, strict=True):
        every = [content(r, step, key.number, key.size) for r in range(first, comm.size) for step in range(6)]
        assert_array_equal(got, np.sum(every, axis=0), err_msg=f"key {key.number}")


def lagging(comm: Communicator, how: str, gradients_: Any, update: Any, values: np.ndarray) -> Any:
    """Rank 1 pulls at version 0 and pushes last; rank 2 pulls and pushes three times meanwhile. Then rank 1 goes on:
    two more pushes without a pull, and one with. Returns what rank 0 serves."""

    def work(worker: Worker) -> None:
        mine, turn = np.zeros(len(values)), np.zeros(1)
        if comm.rank == 1:
            worker.wait(worker.pull(0, mine))
            worker.comm.send(turn, 2)
            worker.comm.recv(turn, 2)
            for g in gradients_[3:5]:
                worker.wait(worker.push(0, g))
            worker.wait(worker.pull(0, mine))
            worker.wait(worker.push(0, gradients_[5]))
        elif comm.rank == 2:
            worker.comm.recv(turn, 1)
            for g in gradients_[:3]:
                worker.wait(worker.pull(0, mine))
                worker.wait(worker.push(0, g))
            worker.comm.send(turn, 1)

    return by_hand(
        comm, work, [Stretch("a", len(values), "f8")], 1, how, update=update, initial=lambda key: values.copy()
    )


GRADIENTS = [np.random.default_rng(i).standard_normal(5) for i in range(6)]
START = np.random.default_rng(77).standard_normal(5)
LR = 0.1


def sgd(values: np.ndarray, gradient: np.ndarray, scale: float) -> None:
    values -= LR * scale * gradient


@on_ranks(3, 4)
def test_async_by_hand_with_its_histogram_of_staleness(comm: Communicator) -> None:
    served = lagging(comm, "async", GRADIENTS, sgd, START)
    if comm.rank == 0:
        assert_allclose(served.values[0], START - LR * np.sum(GRADIENTS, axis=0), rtol=1e-12)
        # Rank 2's three and rank 1's last are fresh; two of rank 1's were taken at version 0, when there were 3 and 4.
        assert served.report.staleness == {0: 4, 3: 1, 4: 1}
        assert served.report.mean_staleness == pytest.approx(7 / 6)
        assert served.report.dropped == 0


@on_ranks(3, 4)
def test_async_scaled_by_hand(comm: Communicator) -> None:
    served = lagging(comm, "async-scaled", GRADIENTS, sgd, START)
    if comm.rank == 0:
        parts = [g / old for g, old in zip(GRADIENTS, [1, 1, 1, 3, 4, 1], strict=True)]
        assert_allclose(served.values[0], START - LR * np.sum(parts, axis=0), rtol=1e-12)


@on_ranks(3, 4)
def test_async_scaled_scales_the_learning_rate_of_an_optimizer(comm: Communicator) -> None:
    # With momentum 0.5: v takes in the gradient whole, and lr v / staleness is what the values lose.
    v = np.zeros(5)

    def momentum(values: np.ndarray, gradient: np.ndarray, scale: float) -> None:
        v[...] = 0.5 * v + gradient
        values -= LR * scale * v

    served = lagging(comm, "async-scaled", GRADIENTS, momentum, START)
    if comm.rank == 0:
        w, u = START.copy(), np.zeros(5)
        for g, old in zip(GRADIENTS, [1, 1, 1, 3, 4, 1], strict=True):
            u = 0.5 * u + g
            w -= LR / old * u
        assert_allclose(served.values[0], w, rtol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.04, 2.0])
@on_ranks(3, 4)
def test_async_dc_by_hand(comm: Communicator, strength: float) -> None:
    served = lagging(comm, f"async-dc:{strength}", GRADIENTS, sgd, START)
    if comm.rank == 0:
        w = START.copy()
        for g in GRADIENTS[:3]:  # fresh: w is what it was pulled as
            w -= LR * g
        for g in GRADIENTS[3:5]:
            w -= LR * (g + strength * g * g * (w - START))
        w -= LR * GRADIENTS[5]
        assert_allclose(served.values[0], w, rtol=1e-12)


@on_ranks(2, 3)
def test_async_scaled_leaves_the_optimizers_learning_rate_as_it_was(comm: Communicator) -> None:
    model = network()
    optimizer = optimizer_of("momentum", model)
    ps = ParameterServer(model, optimizer, comm, 1, "async-scaled", samples=N, batch_size=4)
    train(ps, model, epochs=1)
    assert [group["lr"] for group in optimizer.param_groups] == [Momentum.lr]
    if ps.serves:
        assert all(np.isfinite(a).all() for a in numbers(model).values())
        assert not np.array_equal(numbers(model)["0.weight"], initial()["0.weight"])


@pytest.mark.parametrize("how", ["async", "ssp:1", "async-scaled", "async-dc:0.04"])
@on_ranks(2, 3)
def test_one_worker_alone_trains_as_one_rank(comm: Communicator, how: str) -> None:
    servers = comm.size - 1
    model = network()
    ps = ParameterServer(model, optimizer_of("adam", model), comm, servers, how, samples=N, batch_size=8)
    train(ps, model)
    if comm.rank == 0 or not ps.serves:
        assert_weights(model, one_rank("adam", 8, EPOCHS))


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_reports_bytes_and_seconds_are_those_of_a_hand_count() -> None:
    stretches = [Stretch("a", 40, "f4"), Stretch("b", 5000, "f8"), Stretch("c", 33, "f4")]
    steps, size, servers = 3, 5, 2
    workers = size - servers
    waits = {2: 0.0, 3: 0.0, 4: 0.0}

    def work(worker: Worker) -> None:
        rank, values = worker.comm.rank, [np.zeros(key.size, key.dtype) for key in worker.layout.keys]
        for clock in range(steps):
            began = worker.comm.clock()
            worker.wait(*[worker.pull(k.number, v, clock) for k, v in zip(worker.layout.keys, values, strict=True)])
            waits[rank] += worker.comm.clock() - began
            worker.wait(worker.clock(clock, samples=10 * rank, seconds=1.0))
            worker.comm.elapse(rank)
            for key in worker.layout.keys:
                worker.push(key.number, np.ones(key.size, key.dtype), clock, weight=1.0)
        began = worker.comm.clock()
        worker.wait(*worker.requests)
        worker.wait(worker.clock(steps, samples=rank))
        worker.barrier([1.0])
        waits[rank] += worker.comm.clock() - began
        worker.comm.elapse(10.0 * rank)  # so that they leave one after the other
        worker.wait(worker._ask(0, 8, clock=steps))  # (a CLOCK)

    def padded(nbytes: int) -> int:
        return nbytes + -nbytes % 8 if nbytes <= 4096 else nbytes

    run = simulate(lambda comm: by_hand(comm, work, stretches, servers, "bsp"), size)
    served = run.results[0]
    report = served.report
    layout = run.results[1].server.layout
    assert set(report.received) == set(report.sent) == {0, 1}
    mine = layout.of_server(1)
    body = sum(padded(key.size * key.dtype.itemsize) for key in mine)
    # Server 1 is told of a view by the scheduler at the beginning, and when each of the workers has left.
    views = sum(64 + 8 * (2 + 2 * left + servers) for left in range(workers + 1))
    requests = workers * steps * (len(mine) * 128 + body)  # PULL, PUSH with its body
    assert report.received[1] == requests + views + 64  # and STOP
    answers = workers * steps * (len(mine) * 128 + body)  # VALUES with its body, ACK
    assert report.sent[1] == answers + (workers + 1) * 64 + len(mine) * 64 + body  # ACK of views; the last VALUES
    assert report.samples == {rank: 3 * 10 * rank + rank for rank in (2, 3, 4)}
    assert report.clocks == dict.fromkeys((2, 3, 4), 0)  # what `leave` was told
    assert report.waited == pytest.approx(waits)
    assert max(waits.values()) > 1.0
    assert report.seconds == pytest.approx(3 * 4 + 10 * 4)  # steps of the slowest, then it leaves
    assert report.dropped == 0
    assert report.staleness == {0: workers * steps * len(layout.keys)}
    assert report.lag.total() == workers * steps * len(layout.keys)
    words = report.in_words()
    assert "staleness       0.00 updates in the mean (0: 100%)" in words
    assert f"rank 1 received {report.received[1] / 1e6:.1f} MB" in words
    plain = report.as_json()
    assert plain["samples"] == report.samples
    assert plain["staleness"] == {0: workers * steps * len(layout.keys)}


@on_ranks(3, 4)
def test_a_push_of_nothing_is_no_gradient_in_the_histogram(comm: Communicator) -> None:
    def work(worker: Worker) -> None:
        worker.wait(worker.push(0, None), worker.push(0, np.ones(4)), worker.push(0, None))

    served = by_hand(comm, work, [Stretch("a", 4, "f8")], 1, "async")
    if comm.rank == 0:
        assert_array_equal(served.values[0], comm.size - 1)
        assert served.report.staleness.total() == comm.size - 1  # "of each gradient that was applied"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bsp", "backup:2", "ssp:0", "ssp:7", "async", "async-scaled", "async-dc:0.5"])
def test_consistencies_have_names(name: str) -> None:
    assert consistency_of(name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "bsp:1", "BSP", "backup", "backup:0", "backup:-1", "ssp", "ssp:-1", "ssp:x", "ssp:1.5", "async:1",
     "async-dc:-1", "async-dc:nan", "async-dc:inf", "async-scaled:2"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="choose bsp, backup:B, ssp:S, async"):
        consistency_of(name)


def test_backup_needs_somebody_to_wait_for() -> None:
    with pytest.raises(ValueError, match="backup:3 with 3 workers: none would be left"):
        simulate(lambda comm: by_hand(comm, lambda worker: None, STRETCHES, 1, "backup:3"), 4)
    assert Dealer(1, 1, 1, "even").samples == 1
