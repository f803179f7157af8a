"""The recorder: its rows, against what the program is known to have done; clocks; what it costs when nobody asks."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks

import minidist as md
from minidist.comm import Network, alone, simulate
from minidist.trace import record, recorder
from minidist.trace.clocks import offset_to_first

NETWORK = Network(alpha=1e-3, beta=1e-6)  # 1 ms a message, 1 us a byte


def read(folder, rank):
    """(header, rows by their kind) of one rank."""
    header, *lines = (Path(folder) / f"rank-{rank:04}.jsonl").read_text("utf-8").splitlines()
    rows = {}
    for line in lines:
        kind, *fields = json.loads(line)
        rows.setdefault(kind, []).append(fields)
    return json.loads(header), rows


def recorded(comm, program):
    """What a rank's recorder has written of program(comm)."""
    with tempfile.TemporaryDirectory() as folder:
        with record(comm, folder, program="a test"):
            program(comm)
        return read(folder, comm.rank)


def simulated(program, size, network=NETWORK):
    """(header, rows) of every rank."""
    return simulate(lambda comm: recorded(comm, program), size, network=network).results


class Slow(md.nn.Module):
    """Takes virtual time: so many seconds forward, twice as many backward."""

    def __init__(self, comm, seconds):
        self.comm, self.seconds = comm, seconds
        self.weight = md.nn.Parameter(np.ones(1, np.float32))

    def forward(self, x):
        return Slowly.apply(x, self.weight, comm=self.comm, seconds=self.seconds)


class Slowly(md.Function):
    def forward(self, x, w, comm, seconds):
        self.comm, self.seconds = comm, seconds
        self.save(x, w)
        comm.elapse(seconds)
        return x * w

    def backward(self, dy):
        x, w = self.saved
        self.comm.elapse(2 * self.seconds)
        return dy * w, (dy * x).sum(keepdims=True).reshape(1)


# -- communication ----------------------------------------------------------------------------------------------------


@on_ranks(1, 2, 3, 4)
def test_a_collective_is_an_operation_and_the_messages_inside(comm):
    n, p = 10, comm.size

    def program(comm):
        with comm.step("D.3(4) average gradients"):
            md.collectives.all_reduce(comm, np.arange(n, dtype=np.float64) * comm.rank, algorithm="ring")

    header, rows = recorded(comm, program)
    assert (header["rank"], header["size"], header["program"]) == (comm.rank, p, "a test")
    assert (header["format"], header["version"], header["virtual"]) == ("minidist trace", 1, comm.virtual)
    (operation,) = rows["O"]
    number, kind, group, peer, nbytes, dtype, _, label, start, end = operation
    assert (kind, group, peer, nbytes, dtype) == ("all_reduce ring", "0", None, 8 * n, "float64")
    assert label == "D.3(4) average gradients"
    assert number >= 1
    ((label, depth, began, ended),) = rows["L"]
    assert (label, depth) == ("D.3(4) average gradients", 0)
    assert began <= start <= end <= ended
    assert rows["G"] == [["0", list(comm.members)]]
    sent = [row for row in rows.get("M", []) if row[0] == "s"]
    received = [row for row in rows.get("M", []) if row[0] == "r"]
    assert len(sent) == len(received) == 2 * (p - 1)
    sizes = [8 * len(part) for part in np.array_split(np.arange(n), p)]
    # In each half all chunks but one leave: not that which this rank ends with, and then not that which comes last.
    left_out = [sizes[comm.rank], sizes[(comm.rank + 1) % p]]
    right, left = (comm.members[(comm.rank + d) % p] for d in (1, -1))
    assert Counter(row[4] for row in sent) == Counter(sizes * 2) - Counter(left_out)
    assert {row[2] for row in sent} <= {right}
    assert {row[2] for row in received} <= {left}
    assert all(row[1] == "0" and start <= row[5] <= row[6] <= end for row in sent + received)


@on_ranks(2, 3)
def test_messages_have_the_worlds_ranks_and_the_groups_name(comm):
    def program(comm):
        group = comm.split(0, key=-comm.rank)  # the other way round
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        group.sendrecv(np.zeros(3), right, np.empty(3), left, tag=5)

    _, rows = recorded(comm, program)
    (name, members), *_ = [row for row in rows["G"] if row[0] != "0"]
    assert members == list(comm.members)[::-1]
    left, right = (comm.members[(comm.rank + d) % comm.size] for d in (1, -1))
    directions = {tuple(row[:5]) for row in rows["M"] if row[1] == name}
    assert directions == {("s", name, right, 5, 24), ("r", name, left, 5, 24)}
    operations = {(row[1], row[2], row[3]) for row in rows["O"] if row[2] == name}
    place = members.index(comm.members[comm.rank])
    p = comm.size
    assert operations == {("send", name, (place + 1) % p), ("receive", name, (place - 1) % p)}


def test_groups_of_the_same_ranks_have_names_of_their_own_equal_on_all():
    def program(comm):
        first, second = comm.split(0), comm.split(0)
        apart = comm.split(comm.rank % 2)
        for group in (second, apart, first):
            md.collectives.barrier(group)

    runs = simulated(program, 3)
    names = [[row[2] for row in rows["O"]] for _, rows in runs]
    assert names[0] == names[2]
    assert names[0][0] == names[1][0] != names[0][2] == names[1][2]
    assert names[0][1] != names[1][1]


def test_virtual_times_are_those_of_the_network():
    """Rank 1 waits 3 s for what rank 0 then sends: 1 ms, and 8000 bytes at 1 us."""

    def program(comm):
        if comm.rank == 0:
            comm.elapse(3.0)
            comm.send(np.zeros(1000), 1)
        else:
            comm.recv(np.empty(1000), 0)

    (_, first), (header, second) = simulated(program, 2)
    assert header["virtual"]
    arrival = round((3.0 + 1e-3 + 8e-3) * 1e9)
    assert second["W"] == [[0, arrival]]
    assert second["M"] == [["r", "0", 0, 0, 8000, 0, arrival]]
    assert first["M"] == [["s", "0", 1, 0, 8000, 3 * 10**9, 3 * 10**9]]
    assert "W" not in first
    assert [row[1] for row in first["A"]] == [0, 0]


@on_ranks(2)
def test_a_wait_is_as_long_as_the_other_is_late(comm):
    import time

    def program(comm):
        if comm.rank == 0:
            comm.elapse(0.05)
            if not comm.virtual:
                time.sleep(0.05)
            comm.send(np.zeros(4), 1)
        else:
            comm.recv(np.empty(4), 0)

    _, rows = recorded(comm, program)
    if comm.rank == 1:
        assert sum(end - start for start, end in rows["W"]) == pytest.approx(0.05e9, rel=0.9)
        assert all(a[1] <= b[0] for a, b in zip(rows["W"], rows["W"][1:]))


def test_marks_values_and_facts():
    def program(comm):
        comm.mark("D.1", "uniform")
        comm.elapse(1.5)
        comm.value("loss", 0.25)
        comm.fact("schedule", "1f1b", 2, 4, 1)
        comm.fact("action", "Forward", 3, 0, 1.0, 1.25, 1.5)
        comm.fact("unknown", 1, 2)

    ((header, rows),) = simulated(program, 1)
    assert rows["I"] == [["D.1", "uniform", 0]]
    assert rows["V"] == [["loss", 0.25, 1_500_000_000]]
    assert header["schedule"] == {"name": "1f1b", "stages": 2, "microbatches": 4, "chunks": 1}
    assert rows["P"] == [["Forward", 3, 0, 1_000_000_000, 1_250_000_000, 1_500_000_000]]


# -- computing --------------------------------------------------------------------------------------------------------


def train(comm, model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        with comm.step("D.3(3) train"):
            model(md.Tensor(np.ones(1, np.float32), requires_grad=True)).sum().backward()
        optimizer.step()


def test_forward_and_backward_are_told_by_layer():
    def program(comm):
        inner = md.nn.Sequential({"b": Slow(comm, 2.0), "c": Slow(comm, 3.0)})
        model = md.nn.Sequential({"a": Slow(comm, 1.0), "inner": inner})
        train(comm, model, md.optim.SGD(model.parameters(), lr=0.0), steps=2)

    ((_, rows),) = simulated(program, 1)
    spans = [(kind, layer, label, (end - start) / 1e9) for kind, layer, label, start, end in rows["C"]]
    step = [("forward", "a", 1.0), ("forward", "inner.b", 2.0), ("forward", "inner.c", 3.0)]
    step += [("backward", "inner.c", 6.0), ("backward", "inner.b", 4.0), ("backward", "a", 2.0)]
    assert spans == [(kind, layer, "D.3(3) train", seconds) for kind, layer, seconds in step * 2]
    assert [(n, start / 1e9, end / 1e9) for n, start, end in rows["S"]] == [(1, 0.0, 18.0), (2, 18.0, 36.0)]


def test_what_is_computed_again_is_told_and_evaluation_is_no_step():
    def program(comm):
        layer = Slow(comm, 1.0).recompute_()
        model = md.nn.Sequential(layer)
        optimizer = md.optim.SGD(model.parameters(), lr=0.0)
        train(comm, model, optimizer, steps=1)
        with md.no_grad():
            model(md.Tensor(np.ones(1, np.float32)))

    ((_, rows),) = simulated(program, 1)
    assert [(kind, (end - start) / 1e9) for kind, _, _, start, end in rows["C"]] == [
        ("forward", 1.0),
        ("recompute", 1.0),
        ("backward", 2.0),
        ("forward", 1.0),
    ]
    assert rows["S"] == [[1, 0, 4 * 10**9]]


def test_data_parallel_layers_keep_their_names():
    def program(comm):
        model = md.nn.Sequential(Slow(comm, 1.0), Slow(comm, 1.0))
        wrapped, optimizer = md.parallel.data_parallel(model, md.optim.SGD(model.parameters(), lr=0.0), comm)
        train(comm, wrapped, optimizer, steps=1)

    for _, rows in simulated(program, 2):
        assert [row[1] for row in rows["C"]] == ["0", "1", "1", "0"]


def test_a_pipelines_actions_are_told():
    def program(comm):
        model = md.nn.Sequential(Slow(comm, 1.0), Slow(comm, 1.0))
        loss = lambda y, t: (y - t).sum()  # noqa: E731
        pipeline = md.parallel.Pipeline(model, comm, loss, schedule="gpipe", microbatches=3)
        pipeline.step(np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32))

    runs = simulated(program, 2, Network())
    for stage, (header, rows) in enumerate(runs):
        assert header["schedule"] == {"name": "gpipe", "stages": 2, "microbatches": 3, "chunks": 1}
        forward = [row for row in rows["P"] if row[0] == "Forward"]
        assert [row[1] for row in forward] == [0, 1, 2]
        assert [row[4] / 1e9 for row in forward] == [stage + m for m in range(3)]  # ready: stage s starts s later
        assert {row[2] for row in rows["C"] if row[0] == "forward"} == {f"M.2(3) forward {m}" for m in range(3)}


# -- the recorder itself ----------------------------------------------------------------------------------------------


def test_what_is_written_in_between_is_what_is_written_at_the_end(monkeypatch):
    def program(comm):
        model = md.nn.Sequential(Slow(comm, 1.0), Slow(comm, 1.0))
        pair = md.parallel.data_parallel(model, md.optim.SGD(model.parameters(), lr=0.0), comm, algorithm="ring")
        train(comm, *pair, steps=5)

    def by_kind(runs):
        return [{kind: sorted(map(str, rows)) for kind, rows in rows.items()} for _, rows in runs]

    whole = simulated(program, 3)
    monkeypatch.setattr(recorder, "ROOM", 5)
    pieces = simulated(program, 3)
    assert by_kind(pieces) == by_kind(whole)
    for (_, one), (_, other) in zip(whole, pieces):
        assert one["M"] == other["M"]  # in one order, by which they are matched


def test_a_failing_program_leaves_what_was_recorded(tmp_path):
    comm = alone()
    with pytest.raises(ZeroDivisionError), record(comm, tmp_path):
        comm.mark("D.1", "uniform")
        with comm.step("D.3(3) train"):
            raise ZeroDivisionError
    _, rows = read(tmp_path, 0)
    assert rows["I"][0][:2] == ["D.1", "uniform"]
    assert rows["L"][0][0] == "D.3(3) train"
    assert comm.record.listeners == ()


def test_an_earlier_run_is_replaced(tmp_path):
    (tmp_path / "rank-0007.jsonl").write_text("old")
    with record(alone(), tmp_path / "."):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0000.jsonl"]


def test_one_rank_alone_has_real_time(tmp_path):
    comm = alone()
    with record(comm, tmp_path):
        layer = md.nn.Linear(300, 300)
        layer(md.randn(300, 300))
    header, rows = read(tmp_path, 0)
    assert not header["virtual"]
    ((kind, layer, _, start, end),) = rows["C"]
    assert (kind, layer) == ("forward", "")
    assert 1_000 < end - start < 10**9


def test_nobody_listens_unless_asked(monkeypatch):
    told = []
    monkeypatch.setattr("minidist.comm.record.FlightRecord.message", lambda *args: told.append(args))

    def program(comm):
        md.collectives.all_reduce(comm, np.ones(5), algorithm="ring")

    simulate(program, 3)
    assert not told


# -- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_clocks_of_other_hosts_are_compared_with_the_firsts(size):
    """Rank r's clock is 100 r ahead; a message takes 1 ms each way, so nothing is lost by taking the middle."""
    between = md.comm.Link(alpha=1e-3)

    def program(comm):
        ahead = 100.0 * comm.rank
        comm.clock = lambda: comm.me.now + ahead
        comm.virtual = False
        return offset_to_first(comm)

    network = Network(hosts=list(range(size)), between=between)
    offsets = simulate(program, size, network=network).results
    np.testing.assert_allclose(offsets, [-100.0 * rank for rank in range(size)], atol=1e-9)


def test_ranks_of_the_first_host_are_not_asked():
    network = Network(hosts=[0, 0, 1, 1], between=md.comm.Link(alpha=1e-3))

    def program(comm):
        comm.virtual = False
        before = comm.record.sent_messages
        offset_to_first(comm)
        return comm.record.sent_messages - before

    asked, first, second, third = simulate(program, 4, network=network).results
    assert (first, second, third) == (0, 16, 16)
    assert asked == 2 * 17
