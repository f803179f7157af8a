"""Where the time goes: cases worked out by hand, and any case adds up."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import trace_cases as cases
from hypothesis import given
from hypothesis import strategies as st

import minidist as md
from minidist.trace import breakdown, memory, read, time_by_label, time_by_layer, traffic
from minidist.trace.analysis import PARTS
from minidist.trace.intervals import Intervals
from minidist.trace.matching import match_collectives, match_messages
from minidist.trace.tables import CLASSES, TABLES, Rank, Trace

Row = list


def parts(folder: Path, *ranks: list[Row]) -> list[tuple[int, ...]]:
    """Compute, hidden, exposed and idle of each rank's only step."""
    return [
        tuple(int(getattr(b, name)[0]) for name in PARTS) for b in breakdown(read(cases.write(folder, list(ranks))))
    ]


def computes(*spans: tuple[int, int]) -> list[Row]:
    return [["C", "forward", "0", "", start, end] for start, end in spans]


def collective(start: int, end: int | None, root: int | None = None, number: int = 1) -> Row:
    return ["O", number, "all_reduce ring", "0", root, 8, "float32", 0, "", start, end]


STEP = ["S", 1, 0, 100]


@pytest.mark.parametrize("noted", ["waits", "blocking receive"])
def test_late_sender(tmp_path: Path, noted: str) -> None:
    # Rank 1 wants the message at 10; it is sent at 30 and there at 50.
    sender = [*computes((0, 30), (50, 100)), ["M", "s", "0", 1, 0, 8, 30, 50], ["W", 32, 50], STEP]
    wait = ["W", 10, 50] if noted == "waits" else ["O", 1, "receive", "0", 0, 8, "float32", 0, "", 10, 50]
    receiver = [*computes((0, 10), (50, 100)), ["M", "r", "0", 0, 0, 8, 10, 50], wait, STEP]
    assert parts(tmp_path, sender, receiver) == [(80, 2, 18, 0), (60, 0, 20, 20)]


def test_late_sender_of_a_message_that_is_asked_for_when_it_is_there(tmp_path: Path) -> None:
    # A server looks (10 to 45) for messages, sees one that was sent at 30, and only then receives it.
    sender = [*computes((0, 30), (40, 100)), ["M", "s", "0", 1, 0, 8, 30, 40], ["W", 30, 40], STEP]
    receiver = [*computes((0, 10), (50, 100)), ["W", 10, 45], ["M", "r", "0", 0, 0, 8, 45, 48], STEP]
    assert parts(tmp_path, sender, receiver)[1] == (62, 3, 15, 20)


def test_a_wait_before_computing_is_not_for_a_message_asked_for_after_it(tmp_path: Path) -> None:
    sender = [*computes((0, 100)), ["M", "s", "0", 1, 0, 8, 30, 60], STEP]
    receiver = [
        *computes((0, 10), (20, 50), (60, 100)),
        ["W", 10, 20],
        ["W", 50, 60],
        ["M", "r", "0", 0, 0, 8, 50, 60],
        STEP,
    ]
    assert parts(tmp_path, sender, receiver)[1] == (80, 0, 20, 0)


def test_of_several_messages_the_next_to_arrive_is_waited_for(tmp_path: Path) -> None:
    # Asked for at 10: one that is sent at 20 and there at 40, and one that is sent at 60 and there at 70.
    sender = [["M", "s", "0", 1, 1, 8, 20, 21], ["M", "s", "0", 1, 2, 8, 60, 61], STEP]
    receiver = [["M", "r", "0", 0, 2, 8, 10, 70], ["M", "r", "0", 0, 1, 8, 10, 40], ["W", 10, 70], STEP]
    assert parts(tmp_path, sender, receiver)[1] == (40, 0, 20 + 10, 10 + 20)


def test_wait_at_nxn(tmp_path: Path) -> None:
    # Nothing is known of messages (MPI's own all-reduce): rank 1 comes at 40, 30 after rank 0.
    early = [*computes((0, 10), (60, 100)), collective(10, 60), STEP]
    late = [*computes((0, 40), (60, 100)), collective(40, 60), STEP]
    assert parts(tmp_path, early, late) == [(50, 0, 20, 30), (80, 0, 20, 0)]


def test_a_collective_with_a_root_waits_for_nobody_but_the_sender(tmp_path: Path) -> None:
    receiver = [*computes((0, 10), (30, 100)), collective(10, 30, root=0), STEP]
    assert parts(tmp_path, receiver, receiver, [collective(40, 60, root=0), STEP])[0] == (80, 0, 20, 0)


def test_hidden(tmp_path: Path) -> None:
    # Computing goes on from 10 to 50 while gradients are on their way; from 50 to 60 nothing is left to do.
    rank = [*computes((0, 10), (10, 50), (60, 100)), collective(10, 60), STEP]
    assert parts(tmp_path, rank, rank) == [(50, 40, 10, 0)] * 2


def test_what_outlasts_its_step_does_not_block(tmp_path: Path) -> None:
    # Begun by a hook at 20, in a step that is over at once; and done at 40, while the same layer's backward goes on.
    begun = ["O", 1, "all_reduce ring", "0", None, 8, "float32", 0, "D.3(4) average, bucket 1", 20, 40]
    step = ["L", "D.3(4) average, bucket 1", 0, 20, 20]
    rank = [*computes((20, 100)), begun, step, STEP]
    assert parts(tmp_path / "outlasts", rank, rank) == [(80, 20, 0, 0)] * 2
    rank[2] = ["L", "D.3(4) average, bucket 1", 0, 20, 40]
    assert parts(tmp_path / "blocks", rank, rank) == [(80, 0, 20, 0)] * 2


def test_a_message_inside_of_computing_is_hidden_and_a_collective_there_is_not(tmp_path: Path) -> None:
    send = [
        *computes((0, 100)),
        ["M", "s", "0", 1, 0, 8, 10, 40],
        ["O", 1, "send", "0", 1, 8, "float32", 0, "", 10, 40],
        STEP,
    ]
    want = [
        *computes((0, 100)),
        ["M", "r", "0", 0, 0, 8, 20, 60],
        ["O", 1, "receive", "0", 0, 8, "float32", 0, "", 20, 60],
        STEP,
    ]
    assert parts(tmp_path / "message", send, want) == [(70, 30, 0, 0), (60, 40, 0, 0)]
    rank = [*computes((0, 100)), collective(30, 50), STEP]
    assert parts(tmp_path / "collective", rank, rank) == [(80, 0, 20, 0)] * 2


def test_what_a_sender_is_done_with_late_was_on_its_way_until_it_was_there(tmp_path: Path) -> None:
    send = [*computes((0, 100)), ["M", "s", "0", 1, 0, 8, 10, 90], STEP]
    want = [["M", "r", "0", 0, 0, 8, 5, 30], ["W", 5, 30], STEP]
    assert parts(tmp_path, send, want)[0] == (80, 20, 0, 0)


def test_an_operation_that_never_finished_lasts_to_the_end(tmp_path: Path) -> None:
    assert parts(tmp_path, [*computes((0, 20)), collective(20, None), STEP]) == [(20, 0, 80, 0)]


def test_steps_and_the_whole(tmp_path: Path) -> None:
    rows = [["W", 5, 15], ["W", 7, 12], ["W", 18, 22], ["S", 3, 0, 10], ["S", 4, 10, 20], ["L", "D.1", 0, 0, 40]]
    (found,) = breakdown(read(cases.write(tmp_path, [rows])))
    assert found.step.tolist() == [3, 4]
    assert (found.compute.tolist(), found.exposed.tolist()) == ([5, 3], [5, 7])
    assert found.whole == {"compute": 26, "hidden": 0, "exposed": 14, "idle": 0}


def test_clocks_that_differ_change_nothing(tmp_path: Path) -> None:
    rows = cases.ring_run(steps=6)
    exact, apart = (
        breakdown(read(cases.write(tmp_path / name, run)))
        for name, run in (("exact", rows), ("apart", cases.ring_run(steps=6, drift=100_000)))
    )
    assert any(part.idle.sum() > 50_000 for part in exact)  # it is not all zeros that are compared
    for one, other in zip(exact, apart):
        for name in PARTS:
            np.testing.assert_allclose(getattr(other, name), getattr(one, name), atol=60)  # nanoseconds, of rounding


@pytest.mark.parametrize("late", [0, 1e-3])
def test_a_simulated_ring_waits_as_the_formula_says(tmp_path: Path, late: float) -> None:
    """Four ranks all-reduce n bytes: 6 hops of alpha + beta n / 4 seconds each, all exposed if they come together.

    If rank 2 is late, all wait for it. Then its messages go round the ring: the rank k to its right still waits for k-1
    hops for something that nobody has sent yet, and rank 2 itself for 3.
    """
    n = 4000
    hop = 1e9 * (1e-5 + 1e-9 * n / 4)  # nanoseconds

    def program(comm: md.comm.Communicator) -> None:
        with md.trace.record(comm, tmp_path):
            if comm.rank == 2:
                comm.elapse(late)
            md.collectives.all_reduce(comm, np.ones(n // 4, np.float32), algorithm="ring")

    md.comm.simulate(program, 4, network=md.comm.Network(alpha=1e-5, beta=1e-9))
    trace = read(tmp_path)
    assert trace.header["virtual"] and len(trace.collectives) == 1
    hops = [1, 2, 3, 0] if late else [0, 0, 0, 0]
    for rank, found in enumerate(breakdown(trace)):
        waits_for_it = 0 if rank == 2 else 1e9 * late
        expected = {"idle": waits_for_it + hops[rank] * hop, "exposed": (6 - hops[rank]) * hop, "hidden": 0}
        assert {name: found.whole[name] for name in expected} == pytest.approx(expected, abs=20)  # ends are rounded
    sent = traffic(trace)
    np.testing.assert_array_equal(sent.bytes, np.roll(np.eye(4, dtype=int), 1, axis=1) * 6 * n // 4)
    np.testing.assert_array_equal(sent.messages, np.roll(np.eye(4, dtype=int), 1, axis=1) * 6)


def test_labels_layers_and_memory(tmp_path: Path) -> None:
    first = [
        ["L", "D.3(4) average gradients", 0, 0, 50],
        ["L", "D.3(4) average gradients, bucket 2", 1, 10, 20],  # in the one before: counts once
        ["L", "D.1", 0, 60, 70],
        ["C", "forward", "block", "", 0, 100],
        ["C", "forward", "block.attention", "", 20, 50],
        ["C", "backward", "block", "", 100, 130],
        ["V", "memory gradients", 40, 1],
        ["V", "memory gradients", 30, 2],
    ]
    trace = read(cases.write(tmp_path, [first, [["L", "D.1", 0, 0, 5], ["V", "memory process", 7, 1]]]))
    assert time_by_label(trace) == {"D.1": [10, 5], "D.3(4)": [50, 0]}
    assert time_by_layer(trace) == {
        ("block.attention", "forward"): [30, 0],
        ("block", "forward"): [70, 0],
        ("block", "backward"): [30, 0],
    }
    assert memory(trace) == {"gradients": [40, 0], "process": [0, 7]}


pairs = st.lists(st.tuples(st.integers(-5, 25), st.integers(-5, 25)), max_size=8)


def points(spans: list[tuple[int, int]]) -> set[int]:
    return {t for start, end in spans for t in range(start, end)}


@given(pairs, pairs, pairs)
def test_intervals_are_sets_of_moments(a: list, b: list, windows: list) -> None:
    one, other = (Intervals(*zip(*spans)) if spans else Intervals() for spans in (a, b))
    for got, expected in (
        (one, points(a)),
        (one | other, points(a) | points(b)),
        (one & other, points(a) & points(b)),
        (one - other, points(a) - points(b)),
    ):
        found = list(zip(got.starts.tolist(), got.ends.tolist()))
        assert points(found) == expected and got.total == len(expected)
        assert all(end < start for (_, end), (start, _) in pairwise(found))  # apart, and in order
        inside = got.within(np.array([min(w) for w in windows], int), np.array([max(w) for w in windows], int))
        assert inside.tolist() == [len(expected & set(range(min(w), max(w)))) for w in windows]


span = st.tuples(st.integers(0, 60), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@st.composite
def any_rank(draw: st.DrawFn, number: int, size: int) -> Rank:
    """Whatever rows: they need not make sense together."""
    rows: dict[str, list[Row]] = {kind: [] for kind in CLASSES}
    rows["C"] = computes(*draw(st.lists(span, max_size=5)))
    rows["W"] = [["W", *each] for each in draw(st.lists(span, max_size=4))]
    rows["S"] = [["S", i, *each] for i, each in enumerate(draw(st.lists(span, max_size=3)))]
    for i, (start, end) in enumerate(draw(st.lists(span, max_size=4))):
        kind = draw(st.sampled_from(["send", "receive", "barrier", "broadcast tree"]))
        root = 0 if kind.startswith("broadcast") else None
        rows["O"].append(["O", i + 1, kind, "0", root, 8, "int64", 0, "", start, draw(st.sampled_from([end, None]))])
    for start, end in draw(st.lists(span, max_size=5)):
        peer = draw(st.integers(0, size - 1))
        rows["M"].append(["M", draw(st.sampled_from("sr")), "0", peer, 0, 8, start, draw(st.sampled_from([end, None]))])
    tables = {name: CLASSES[kind].of(rows[kind]) for kind, name in TABLES.items()}
    return Rank(number, {}, {"0": tuple(range(size))}, clock=CLASSES["A"].of([]), **tables)


@given(st.data())
def test_the_four_parts_add_up_to_the_step_whatever_the_trace(data: st.DataObject) -> None:
    ranks = [data.draw(any_rank(number, 3)) for number in range(3)]
    trace = Trace(ranks, match_messages(ranks, []), match_collectives(ranks, []), [])
    for rank, found in zip(ranks, breakdown(trace)):
        every = [getattr(found, name) for name in PARTS]
        np.testing.assert_array_equal(sum(every), rank.steps.end - rank.steps.start)
        assert all((values >= 0).all() for values in every)
        assert min(found.whole.values()) >= 0
        waits = Intervals(rank.waits.start, rank.waits.end)
        waited = waits.within(rank.steps.start, rank.steps.end)
        assert (found.exposed + found.idle >= waited).all()
