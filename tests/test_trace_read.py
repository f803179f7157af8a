"""Reading a trace: what is matched, how clocks are aligned, and what is said of a folder that is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trace_cases as cases

from minidist.trace import read
from minidist.trace.tables import NONE

TWO = [
    [["M", "s", "0", 1, 5, 40, 100, 300], ["O", 1, "send", "0", 1, 40, "float32", 5, "", 100, 300], ["W", 150, 300]],
    [["M", "r", "0", 0, 5, 40, 200, 290], ["O", 1, "receive", "0", 0, 40, "float32", 5, "", 200, None]],
]


def test_rows_become_columns_and_unknown_kinds_are_passed_over(tmp_path: Path) -> None:
    more = [["Z", "news"], ["V", "loss", 2, 7], ["V", "loss", 1.5, 9], ["I", "D.1", "60,000 样本", 3], ["S", 1, 0, 400]]
    trace = read(cases.write(tmp_path, [[*TWO[0], *more], TWO[1]], program="mnist --epochs 1"))
    first, second = trace.ranks
    assert trace.header["program"] == "mnist --epochs 1"
    assert first.groups == {"0": (0, 1)}
    assert list(first.values) == [("loss", 2.0, 7), ("loss", 1.5, 9)]
    assert list(first.marks) == [("D.1", "60,000 样本", 3)]
    assert list(first.steps) == [(1, 0, 400)]
    assert list(second.operations) == [(1, "receive", "0", 0, 40, "float32", 5, "", 200, NONE)]
    assert trace.span == (0, 400)
    assert trace.notes == ["rank 1: 1 operations never finished"]


def test_the_kth_message_sent_is_the_kth_received_with_the_same_key(tmp_path: Path) -> None:
    def wire(direction: str, peer: int, tag: int, start: int) -> list:
        return ["M", direction, "0", peer, tag, 8, start, start + 5]

    zero = [wire("s", 1, 1, 10), wire("s", 1, 1, 20), wire("s", 1, 2, 15), wire("s", 2, 1, 30)]
    one = [wire("r", 0, 2, 40), wire("r", 0, 1, 50), wire("r", 0, 1, 60)]
    two = [wire("r", 0, 1, 70), wire("r", 1, 1, 70)]
    trace = read(cases.write(tmp_path, [zero, one, two]))
    m = trace.messages
    found = sorted(zip(m.sender.tolist(), m.receiver.tolist(), m.tag.tolist(), m.sent.tolist(), m.posted.tolist()))
    assert found == [(0, 1, 1, 10, 50), (0, 1, 1, 20, 60), (0, 1, 2, 15, 40), (0, 2, 1, 30, 70)]
    for message in m:
        sender, receiver, *_, send, receive = message
        assert trace.ranks[sender].wire.direction[send] == "s" and trace.ranks[receiver].wire.direction[receive] == "r"
    assert trace.notes == ["1 messages were waited for that did not come"]


def test_the_kth_collective_of_a_group_is_the_kth_on_all(tmp_path: Path) -> None:
    def op(number: int, group: str, start: int, kind: str = "all_reduce ring") -> list:
        return ["O", number, kind, group, None, 8, "float32", 0, "", start, start + 5]

    pair = ["G", "pair", [0, 2]]
    rows = [
        [pair, op(2, "pair", 12), op(1, "0", 10)],  # rows may come in any order: the number says which was first
        [op(1, "0", 30), op(2, "0", 40, "barrier")],
        [pair, op(1, "0", 20), op(2, "pair", 25)],
    ]
    trace = read(cases.write(tmp_path, rows))
    assert [(c.group, c.calls, c.entered, c.complete) for c in trace.collectives] == [
        ("pair", {0: 0, 2: 1}, 25, True),
        ("0", {0: 1, 1: 0, 2: 0}, 30, True),
        ("0", {1: 1}, 40, False),
    ]
    assert trace.notes == ["1 collectives were not called by all ranks of their group"]


def test_collectives_that_differ_are_told(tmp_path: Path) -> None:
    rows = [[["O", 1, kind, "0", None, 8, "float32", 0, "", 0, 5]] for kind in ("all_reduce ring", "barrier")]
    (note,) = read(cases.write(tmp_path, rows)).notes
    assert note.startswith(
        "collective 1 of group 0 differs between ranks: all_reduce ring on rank 0, barrier on rank 1"
    )


def test_clocks_are_brought_to_rank_0s_and_in_between_interpolated(tmp_path: Path) -> None:
    # Rank 1's clock is 1,000,000 behind at first and 1,000,100 at the end, when it shows 1000.
    late = [["A", 0, 1_000_000], ["S", 1, 0, 500], ["S", 2, 500, 1000], ["W", 250, 2000], ["A", 1000, 1_000_100]]
    second = read(cases.write(tmp_path, [[], late])).ranks[1]
    assert list(second.steps) == [(1, 1_000_000, 1_000_550), (2, 1_000_550, 1_001_100)]
    assert list(second.waits) == [(1_000_275, 1_002_100)]  # after the last row "A" its offset holds


def test_a_drifting_clock_leaves_the_messages_of_a_run_as_they_were(tmp_path: Path) -> None:
    exact = read(cases.write(tmp_path / "exact", cases.ring_run(steps=4)))
    drifting = read(cases.write(tmp_path / "drifting", cases.ring_run(steps=4, drift=100_000)))
    assert len(exact.messages) == 4 * 6 * 4
    for name in ("sent", "posted", "arrived"):
        np.testing.assert_allclose(getattr(drifting.messages, name), getattr(exact.messages, name), atol=3)


def test_a_last_line_cut_off_is_left_out_and_told(tmp_path: Path) -> None:
    cases.write(tmp_path, [[["S", 1, 0, 5]], []])
    path = tmp_path / "rank-0000.jsonl"
    text = path.read_text()
    path.write_text(text + '["S",2,5,')
    trace = read(tmp_path)
    assert len(trace.ranks[0].steps) == 1
    assert trace.notes == ["rank-0000.jsonl:5: the last line is cut off, and left out: was the rank killed?"]
    path.write_text(text.rstrip("\n"))  # cut at a line's end: nothing is lost
    assert read(tmp_path).notes == []


def lines_of(folder: Path) -> list[str]:
    return (folder / "rank-0000.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    "line, problem",
    [
        ('["S",1,0', "rank-0000.jsonl:3: expected an array that begins with a kind"),
        ('{"S": 1}', "rank-0000.jsonl:3: expected an array that begins with a kind"),
        ('["S",1,0,5],["S",2,5,9]', "rank-0000.jsonl:3: expected an array that begins with a kind"),
        ("", "rank-0000.jsonl:3: expected an array that begins with a kind"),
        ('["S",1,0]', "rank-0000.jsonl:3: expected 3 items after the first: number, start, end"),
        ('["S",1,0,"5"]', "rank-0000.jsonl:3: end: expected integers, got str"),
        ('["S",1,0,5.5]', "rank-0000.jsonl:3: end: expected integers, got float"),
        ('["S",1,0,null]', "rank-0000.jsonl:3: end: expected integers, got NoneType"),
        ('["G","x",[0,"1"]]', "rank-0000.jsonl:3: expected a group's name and its ranks"),
        ('["M","s","new",1,0,8,0,1]', "group 'new', of which no row \"G\" tells"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    cases.write(tmp_path, [[["S", 7, 0, 5]], []])
    lines = lines_of(tmp_path)
    lines.insert(2, line)
    (tmp_path / "rank-0000.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert problem in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"format": "other"}, 'rank-0001.jsonl:1: no trace: expected a header with "format": "minidist trace"'),
        ({"version": 2}, "rank-0001.jsonl:1: version 2 of the format; this reads version 1"),
        ({"rank": 3}, "rank-0001.jsonl:1: rank 3 of 2; expected rank 1"),
        ({"size": 4}, "rank-0001.jsonl:1: of a run of 4 ranks; rank 0's file is of one of 2"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, change: dict, problem: str) -> None:
    cases.write(tmp_path, [[], []])
    path = tmp_path / "rank-0001.jsonl"
    _, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(cases.header(1, 2) | change), *rest]) + "\n")
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert problem in str(caught.value)


def test_a_folder_without_a_trace_and_a_missing_rank_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trace: there is no rank-0000\.jsonl"):
        read(tmp_path)
    cases.write(tmp_path, [[], [], []])
    (tmp_path / "rank-0001.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rank-0001\.jsonl:1: the file is empty"):
        read(tmp_path)
    (tmp_path / "rank-0002.jsonl").unlink()
    with pytest.raises(ValueError, match=r"rank-0002\.jsonl is missing, of 3 ranks"):
        read(tmp_path)
