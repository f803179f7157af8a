"""Checked mode: collectives that differ between ranks are told on all of them, with both lines."""

from __future__ import annotations

import re

import numpy as np
import pytest
from launch import needs_mpi, run_ranks
from ranks import on_ranks

from minidist.collectives import Mismatch, all_gather, all_reduce, barrier, broadcast, reduce_scatter
from minidist.comm import Communicator, simulate

HERE = "test_checked.py:"


@pytest.fixture
def checked():
    """Give `comm` checked mode, for one test: under mpirun the next test may get the same communicator."""
    with_it: list[Communicator] = []

    def turn_on(comm: Communicator) -> None:
        with_it.append(comm)
        comm.checked = True

    yield turn_on
    for comm in with_it:
        comm.checked = False


def differ(comm: Communicator, call, words: str) -> None:
    """`call(odd)`, where the last rank is the odd one, raises Mismatch on every rank; and then all goes on."""
    with pytest.raises(Mismatch, match=words):
        call(comm.rank == comm.size - 1)
    assert all_reduce(comm, np.array([comm.rank + 1]))[0] == comm.size * (comm.size + 1) // 2


@pytest.mark.parametrize(
    "call, one, other",
    [
        (lambda c, odd: all_reduce(c, np.zeros(6 + odd)), r"shape=\(6,\)", r"shape=\(7,\)"),
        (lambda c, odd: all_reduce(c, np.zeros(6, "f" if odd else "d")), "dtype=float64", "dtype=float32"),
        (lambda c, odd: all_reduce(c, np.zeros(6), "max" if odd else "min"), "op=min", "op=max"),
        (
            lambda c, odd: all_reduce(c, np.zeros(6), "sum", "naive" if odd else "ring"),
            "all_reduce ring",
            "all_reduce naive",
        ),
        (lambda c, odd: broadcast(c, np.zeros(6), int(odd)), "root=0", "root=1"),
        (lambda c, odd: (barrier if odd else all_gather)(*([c] if odd else [c, np.zeros(6)])), "all_gather", "barrier"),
        (lambda c, odd: reduce_scatter(c, np.zeros(c.size), counts=_counts(c, odd)), "counts=", "counts=None"),
        (lambda c, odd: all_reduce(c, np.zeros(6), async_op=True) if odd else barrier(c), "barrier", "all_reduce"),
    ],
)
@on_ranks(2, 3, 4)
def test_what_differs_is_told_on_every_rank_with_the_ranks_and_their_lines(comm, checked, call, one, other):
    checked(comm)
    first = "rank 0" if comm.size == 2 else f"ranks {', '.join(map(str, range(comm.size - 1)))}"
    differ(
        comm,
        lambda odd: call(comm, odd),
        rf"(?s)collective [0-9]+ .*{first}: .*{one}.*at .*{HERE}\d+.*rank {comm.size - 1}: .*{other}.*at .*{HERE}\d+",
    )


def _counts(comm: Communicator, odd: bool) -> list[int] | None:
    return None if odd else [1] * comm.size


@on_ranks(2, 3)
def test_the_same_call_from_two_lines_is_told_too(comm, checked):
    checked(comm)

    def call(odd: bool) -> None:
        if odd:
            barrier(comm)
        else:
            barrier(comm)

    with pytest.raises(Mismatch) as caught:
        call(comm.rank == 0)
    lines = {int(line) for line in re.findall(HERE + r"(\d+) in call", str(caught.value))}
    assert len(lines) == 2


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c, odd: all_reduce(c, np.zeros(6), "median" if odd else "sum"), "op 'median': choose one of sum"),
        (lambda c, odd: all_reduce(c, np.zeros((3, 4)).T if odd else np.zeros((4, 3))), "not contiguous"),
        (lambda c, odd: broadcast(c, np.zeros(2), 99 if odd else 0), "root 99"),
        (lambda c, odd: all_gather(c, [1.0] if odd else np.zeros(1)), "expected a NumPy or CuPy array, got list"),
        (lambda c, odd: all_reduce(c, np.zeros(6), algorithm="star" if odd else "ring"), "no algorithm 'star'"),
    ],
)
@on_ranks(2, 3, 4)
def test_what_is_refused_on_one_rank_is_refused_on_all(comm, checked, call, words):
    checked(comm)
    odd = comm.rank == 1
    with pytest.raises((ValueError, TypeError) if odd else Mismatch, match=words) as caught:
        call(comm, odd)
    if not odd:
        assert f"refused on rank 1 of {comm.size}" in str(caught.value)
        assert HERE in str(caught.value)
    assert all_reduce(comm, np.array([1]))[0] == comm.size


@on_ranks(1, 2, 3)
def test_a_right_program_runs_as_without(comm, checked):
    checked(comm)
    for _ in range(3):
        handles = [all_reduce(comm, np.full(5, comm.rank + k), async_op=True) for k in range(3)]
        total = comm.size * (comm.size - 1) // 2
        assert [int(handle.wait()[0]) for handle in handles] == [total + comm.size * k for k in range(3)]
    barrier(comm)


def test_without_it_nothing_is_sent_for_it():
    plain = simulate(lambda comm: all_reduce(comm, np.ones(4), "sum", "ring"), 3)

    def checked(comm):
        comm.checked = True
        return all_reduce(comm, np.ones(4), "sum", "ring")

    assert simulate(checked, 3).messages == plain.messages + 3 * 2


@needs_mpi
def test_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("MINIDIST_CHECK", "1")
    program = (
        "import numpy as np, minidist as md\n"
        "comm = md.comm.world()\n"
        'md.collectives.all_reduce(comm, np.ones(3 + comm.rank // 2), algorithm="ring")\n'
    )
    done = run_ranks(3, "-c", program, deadline=30)
    assert done.returncode != 0
    assert done.stderr.count("Mismatch: collective 1") == 1  # by the lowest rank, for all
    assert re.search(r"ranks 0, 1: all_reduce \w+\(op=sum, shape=\(3,\)", done.stderr)
    assert re.search(r"rank 2: all_reduce \w+\(op=sum, shape=\(4,\)", done.stderr)


def test_a_wrong_value_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MINIDIST_CHECK", "yes")
    with pytest.raises(ValueError, match="MINIDIST_CHECK='yes': expected 1"):
        simulate(barrier, 1)


@needs_mpi
def test_where_a_rank_works_does_not_matter(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, numpy as np, minidist as md\n"
        "comm = md.comm.world()\n"
        "if comm.rank == 0:\n"
        f"    os.chdir({str(tmp_path)!r})\n"
        "print(md.collectives.all_reduce(comm, np.ones(3)))\n"
    )
    done = run_ranks(2, str(tmp_path / "program.py"), deadline=30, env={"MINIDIST_CHECK": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2. 2. 2.]") == 2


@on_ranks(2, 3)
def test_after_a_refusal_and_a_mismatch_operations_in_flight_find_their_messages(comm, checked):
    checked(comm)
    odd = comm.rank == 1
    for call in (
        lambda: all_reduce(comm, np.ones(3), "median" if odd else "sum"),
        lambda: all_reduce(comm, np.ones(3 + odd)),
    ):
        with pytest.raises((ValueError, Mismatch)):
            call()
        handles = [all_reduce(comm, np.full(5, k), algorithm="ring", async_op=True) for k in range(3)]
        assert [int(handle.wait()[0]) for handle in handles] == [0, comm.size, 2 * comm.size]


@on_ranks(2, 3)
def test_the_comparison_is_in_the_flight_record(comm, checked):
    checked(comm)
    all_reduce(comm, np.ones(3), algorithm="ring")
    last, before = comm.record.operations()[:-3:-1]
    assert (last.kind, before.kind) == ("all_reduce ring", "compare before all_reduce ring")
    assert before.end is not None
