"""A model on a parameter server: the document's steps, the order of the layers, shares, meetings, errors."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from ps_cases import LABELS, N, X, initial, one_rank
from ranks import once_on_ranks as on_ranks

import minidist as md
from minidist.comm import Communicator, Network, simulate
from minidist.nn import functional as F
from minidist.parallel import ParameterServer
from minidist.parallel.parameter_server import Expelled, Refused


def network() -> md.nn.Sequential:
    model = md.nn.Sequential(md.nn.Linear(6, 5), md.nn.ReLU(), md.nn.Linear(5, 4)).to("cpu", np.float64)
    model.load_state_dict(initial())
    return model


def started(comm: Communicator, **options: Any) -> tuple[md.nn.Sequential, ParameterServer]:
    model = network()
    return model, ParameterServer(model, md.optim.Adam(model.parameters(), lr=0.02), comm, **options)


def step(ps: ParameterServer, model: Any, samples: np.ndarray) -> None:
    ps.zero_grad()
    if len(samples):
        F.cross_entropy(model(md.tensor(X[samples % N], dtype=np.float64)), md.tensor(LABELS[samples % N])).backward()
    ps.step()


def train(ps: ParameterServer, model: Any, epochs: int = 2) -> None:
    for epoch in range(epochs):
        for start, size in ps.shares(epoch):
            step(ps, model, np.arange(start, start + size))


# -- D.3 --------------------------------------------------------------------------------------------------------------


def test_the_flight_record_names_the_documents_steps() -> None:
    # On a network that takes time: what waits is what receives.
    labels: list[dict[tuple[str, str], int]] = [{} for _ in range(3)]

    def program(comm: Communicator) -> None:
        seen, begin = labels[comm.rank], comm.record.begin

        def noting(kind: str, group: Any, *arguments: Any) -> Any:
            seen[kind, comm.record.label] = seen.get((kind, comm.record.label), 0) + 1
            return begin(kind, group, *arguments)

        comm.record.begin = noting  # type: ignore[method-assign]
        model, ps = started(comm, samples=N, batch_size=4)
        if ps.serves:
            ps.serve()
        else:
            assert set(seen) == {("send", "D.3(1) initialise"), ("receive", "D.3(1) initialise"),
                                 ("receive", "D.3(4) pull")}  # fmt: skip
            train(ps, model)
            ps.meet()
            assert comm.record.label == ""
            ps.leave()
        del comm.record.begin

    simulate(program, 3, network=Network(alpha=1e-3))
    assert set(labels[0]) == {("send", "D.3(4) serve"), ("receive", "D.3(4) serve")}
    for rank in (1, 2):
        names = {label for _, label in labels[rank]}
        assert names >= {"D.3(1) initialise", "D.3(4) push", "D.3(4) pull", "D.3(5) meet"}
        assert labels[rank]["send", "D.3(4) push"] >= 12  # one a step, at the least


def test_waiting_for_a_share_is_d_3_2() -> None:
    labels = []

    def program(comm: Communicator) -> None:
        _, ps = started(comm, samples=8, batch_size=4)
        if ps.serves:
            ps.serve()
            return
        ps.step()
        ps.worker.wait(*(n for n in ps.worker.requests if n != ps._asked))
        wait = ps.worker.wait

        def noting(*numbers: int) -> Any:
            labels.append(comm.record.label)
            return wait(*numbers)

        ps.worker.wait = noting  # type: ignore[method-assign]
        ps.share()
        ps.worker.wait = wait  # type: ignore[method-assign]
        ps.leave()

    simulate(program, 3)
    assert labels == ["D.3(2) share"] * 2


# -- the order of the layers, and what goes on at the same time -------------------------------------------------------

WIDE = 60  # a layer of 60 x 60 float64: 28,800 bytes, on a network of 1 MB/s 29 ms
ALPHA, BETA = 1e-4, 1e-6


class Deep(md.nn.Module):
    """Six layers, each of which takes a while, there and back; who notes when forward comes to each."""

    def __init__(self, comm: Communicator, seconds: float) -> None:
        self.layers = md.nn.Sequential(*(md.nn.Linear(WIDE, WIDE, bias=False) for _ in range(6))).to("cpu", np.float64)
        self.times: list[float] = []
        self.comm, self.seconds = comm, seconds
        for layer in self.layers:
            layer.weight.register_post_accumulate_grad_hook(lambda _: comm.elapse(2 * seconds))
            layer.weight.data[...] = np.random.default_rng(2).standard_normal((WIDE, WIDE)) / 8

    def work(self) -> None:
        """Forward takes a while, from when the values are there: these hooks come after the parameter server's."""
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: self.times.append(self.comm.clock()))
            layer.register_forward_pre_hook(lambda *_: self.comm.elapse(self.seconds))

    def forward(self, x: md.Tensor) -> md.Tensor:
        return self.layers(x)


def run_deep(how: str, servers: int = 1, steps: int = 4) -> tuple[float, list[float]]:
    """Virtual seconds of a run; and at the last step, when a worker's forward came to each layer."""

    def program(comm: Communicator) -> list[float]:
        model = Deep(comm, 0.02)
        ps = ParameterServer(model, md.optim.SGD(model.parameters(), lr=0.01), comm, servers, deadline=1e4)
        model.work()
        if ps.serves:
            ps.serve()
            return []
        for _ in range(steps):
            ps.zero_grad()
            model.times.clear()
            loss = model(md.tensor(np.ones((2, WIDE)))).sum()
            if how == "at the end":
                with ps.no_sync():
                    loss.backward()
            else:
                loss.backward()
            ps.step()
            if how != "overlapped":  # and everything pulled before the next step begins
                ps.pull()
        ps.leave()
        return model.times

    run = simulate(program, 2 + servers, network=Network(alpha=ALPHA, beta=BETA))
    return run.seconds, run.results[-1]


def test_the_first_layers_values_arrive_first_and_forward_goes_on_with_them() -> None:
    _, times = run_deep("overlapped")
    assert len(times) == 6
    assert times == sorted(times)
    # If forward waited for all six layers, it would come to all of them 20 ms apart: it waits for each on its way.
    gaps = np.diff(times)
    layer = ALPHA + WIDE * WIDE * 8 * BETA
    assert (gaps > 0.02 + 1e-9).any()
    assert (gaps <= 0.02 + 2 * layer).all()


@pytest.mark.parametrize("servers", [1, 2])
def test_pushing_while_backward_goes_on_beats_pushing_at_the_end(servers: int) -> None:
    overlapped, pulled, late = (run_deep(how, servers)[0] for how in ("overlapped", "pulled whole", "at the end"))
    assert overlapped < pulled < late
    assert overlapped < 0.95 * late


# -- shares and meetings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "batch"), [("bsp", 7), ("bsp", 2), ("ssp:2", 7), ("async", 6), ("backup:1", 7)])
@on_ranks(3, 4, 5)
def test_workers_are_dealt_all_samples_of_each_epoch(comm: Communicator, how: str, batch: int) -> None:
    model, ps = started(comm, samples=N, batch_size=batch, consistency=how)
    if ps.serves:
        report = ps.serve()
        assert report is not None
        if how != "backup:1":  # (where a worker may skip a clock, and what it would have had)
            assert sum(report.samples.values()) == 3 * N
        return
    counts = np.zeros((3, N))
    for epoch in range(3):
        for start, size in ps.shares(epoch):
            assert 0 <= start <= start + size <= N
            counts[epoch, start : start + size] += 1
            step(ps, model, np.arange(start, start + size))
        total, which, of = ps.meet(counts[epoch], label=epoch)
        assert (which, of) == (comm.rank - 1, comm.size - 1)
        if how == "backup:1":
            assert total.max() <= 1
        else:
            assert_array_equal(total, np.ones(N))
    ps.leave()


@on_ranks(3, 4, 5)
def test_shares_may_be_empty(comm: Communicator) -> None:
    model, ps = started(comm, samples=N, batch_size=1)
    if ps.serves:
        ps.serve()
    else:
        sizes = []
        for epoch in range(2):
            for start, size in ps.shares(epoch):
                sizes.append(size)
                step(ps, model, np.arange(start, start + size))
        assert sizes == [1 if comm.rank == 1 else 0] * (2 * N)  # as an array split deals one sample
        ps.pull()
        ps.leave()
    for name, array in one_rank("adam", 1, 2).items():
        np.testing.assert_allclose(np.array(md.Tensor(model.state_dict()[name])), array, rtol=1e-10, atol=1e-10)


@on_ranks(2, 3, 5)
def test_meetings_add_up_and_tell_rank_0(comm: Communicator) -> None:
    model, ps = started(comm, samples=N, batch_size=6)
    workers = comm.size - 1
    if ps.serves:
        met: list[Any] = []
        trained: list[int] = []
        ps.serve(lambda label, total, of: met.append((label, total.tolist(), of)), trained.append)
        ranks = range(1, comm.size)
        assert met == [(3, [sum(ranks), sum(r * r for r in ranks)], workers), (0, [], workers)]
        assert sum(trained) == N
        return
    train(ps, model, epochs=1)
    total, which, of = ps.meet([comm.rank, comm.rank**2], label=3)
    assert total.dtype == np.float64
    assert_array_equal(total, [sum(range(1, comm.size)), sum(r * r for r in range(1, comm.size))])
    assert (which, of) == (comm.rank - 1, workers)
    nothing, which, of = ps.meet()
    assert (nothing.size, which, of) == (0, comm.rank - 1, workers)
    ps.leave()


@pytest.mark.parametrize(("servers", "copies", "sharding"), [(1, 0, "range"), (2, 0, "hash"), (2, 1, "range")])
@on_ranks(4, 5)
def test_the_final_model_of_rank_0_is_what_workers_pull_last(
    comm: Communicator, servers: int, copies: int, sharding: str
) -> None:
    model, ps = started(comm, samples=N, batch_size=5, servers=servers, copies=copies, sharding=sharding)
    if ps.serves:
        ps.serve()
    else:
        train(ps, model)
        ps.pull()
        ps.leave()
    if comm.rank and ps.serves:
        return
    whole = np.concatenate([np.array(md.Tensor(a)).ravel() for a in model.state_dict().values()])
    root = comm.size - 1
    if comm.rank == root:
        for rank in [0, *ps.roles.workers[:-1]]:
            assert_array_equal(comm.recv(np.empty_like(whole), rank), whole)  # bit for bit
    else:
        comm.send(whole, root)


def test_who_was_absent_joins_later() -> None:
    def program(comm: Communicator) -> None:
        model, ps = started(comm, samples=N, batch_size=5, absent=[2])
        if ps.serves:
            report = ps.serve()
            assert report is not None
            assert [(e.rank, e.role, e.clock > 0) for e in report.joined] == [(2, "worker", True)]
            return
        if comm.rank == 1:
            for _ in range(3):
                step(ps, model, np.arange(4))
            comm.send(np.zeros(1), 2)
        else:
            comm.recv(np.zeros(1), 1)
            assert ps.join() >= 3
        for _ in range(ps.clock, 20):
            step(ps, model, np.arange(3))
            comm.elapse(0.1)
        ps.leave()

    simulate(program, 3)


def test_who_was_expelled_may_join_again_whatever_it_was_waiting_for() -> None:
    def program(comm: Communicator) -> int:
        model, ps = started(comm, samples=8 * N, batch_size=8, consistency="ssp:3", deadline=5.0)
        if ps.serves:
            report = ps.serve()
            assert report is not None
            assert [event.rank for event in report.deaths] == [2]
            assert [event.rank for event in report.joined] == [2]
            return 0
        steps = expelled = 0
        while steps < 40:
            try:
                step(ps, model, np.arange(4))
                steps += 1
                comm.elapse(1.0)
                if comm.rank == 2 and steps == 4 and not expelled:
                    comm.elapse(12.0)  # asleep, with its next share on the way
            except Expelled:
                expelled += 1
                ps.join()
        ps.leave()
        return expelled

    run = simulate(program, 4, network=Network(alpha=0.001))
    assert run.results[1:] == [0, 1, 0]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(servers=0), "servers=0: a parameter server needs at least 1"),
        (dict(servers=3), "servers=3 of 3 ranks: that leaves no worker"),
        (dict(servers=2, copies=1), "servers=2 and a scheduler of 3 ranks: that leaves no worker"),
        (dict(copies=1), "copies=1 of each shard on other servers: there are 1 servers"),
        (dict(consistency="sync"), "consistency 'sync': choose bsp"),
        (dict(consistency="backup:2"), "backup:2 with 2 workers: none would be left to wait for"),
        (dict(sharding="ring"), "sharding 'ring': choose 'range' or 'hash'"),
        (dict(deadline=0.0), "deadline=0.0: expected seconds above 0"),
        (dict(deadline=float("nan")), "deadline=nan: expected seconds above 0"),
        (dict(absent=[0]), r"absent=\[0\]: the workers are \[1, 2\]"),
        (dict(absent=[7]), r"absent=\[7\]: the workers are \[1, 2\]"),
        (dict(samples=-1), "samples=-1, batch_size=1: expected samples"),
        (dict(batch_size=0), "samples=0, batch_size=0: expected samples, and at least 1 a batch"),
    ],
)
@on_ranks(3)
def test_constructors_refuse_what_makes_no_sense(comm: Communicator, options: dict[str, Any], match: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=match):
        ParameterServer(model, md.optim.SGD(model.parameters(), lr=0.1), comm, **options)


@on_ranks(1)
def test_one_rank_has_no_worker(comm: Communicator) -> None:
    model = network()
    with pytest.raises(ValueError, match="servers=1 of 1 ranks: that leaves no worker"):
        ParameterServer(model, md.optim.SGD(model.parameters(), lr=0.1), comm)


@on_ranks(2, 3)
def test_what_a_server_refuses_is_raised_at_the_step_that_waits(comm: Communicator) -> None:
    model, ps = started(comm, consistency="ssp:3")
    if ps.serves:
        ps.serve()
        return
    step(ps, model, np.arange(3))
    ps.pull()
    if comm.rank == 1:
        ps.clock -= 1  # it forgets that it has made a step
        step(ps, model, np.arange(3))
        with pytest.raises(Refused, match=r"rank 0 refused: clock 0 of layer \d is closed: 1 is open"):
            ps.pull()
        ps.share()
        while ps.worker.requests:  # the other layer's is refused as well
            with suppress(Refused):
                ps.worker.wait(*ps.worker.requests)
    ps.leave()
