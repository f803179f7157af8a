"""The report: its data, its page as a file, its command. What the page does in a browser: test_report_page.py."""

from __future__ import annotations

import base64
import gzip
import json
import re
from itertools import accumulate
from pathlib import Path

import pytest
import trace_cases as cases

from minidist.__main__ import main
from minidist.parallel.timeline import play
from minidist.report import page
from minidist.report.data import data
from minidist.trace import Trace, breakdown, read


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read(cases.write(tmp_path_factory.mktemp("trace"), cases.ring_run(steps=6, evaluate=3, jitter=500)))


def unpacked(html: str) -> dict:
    packed = re.search(r'<script id="data" type="application/octet-stream">([^<]*)</script>', html)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_the_page_holds_the_trace(trace: Trace) -> None:
    content = unpacked(page(trace))
    assert content == json.loads(json.dumps(data(trace)))
    zero = trace.span[0]
    for rank, lanes in zip(trace.ranks, content["timeline"]["lanes"]):
        starts, lengths, codes = lanes["computing"]
        table = content["timeline"]["computing"]
        found = [
            (*table[code], start, start + length) for start, length, code in zip(accumulate(starts), lengths, codes)
        ]
        expected = [(*row[:3], row[3] - zero, row[4] - zero) for row in sorted(rank.computing, key=lambda row: row[3])]
        assert found == [tuple(row) for row in expected]
    sent, lengths, codes = content["timeline"]["messages"]
    found = [
        (*content["timeline"]["wire"][code], time, time + length)
        for time, length, code in zip(accumulate(sent), lengths, codes)
    ]
    m = trace.messages
    columns = (m.sender, m.receiver, m.group, m.tag, m.nbytes, m.sent - zero, m.arrived - zero)
    assert sorted(map(tuple, found)) == sorted(tuple(row) for row in zip(*columns))


def test_main_numbers_are_the_means_of_the_steps(trace: Trace) -> None:
    for of, part in zip(data(trace)["numbers"], breakdown(trace)):
        assert of["steps"] == 6
        assert of["step"] == pytest.approx((part.end - part.start).mean())
        assert of["idle"] == pytest.approx(part.idle.mean())
        assert (of["messages"], of["bytes"]) == (6 * 6, 6 * 6 * (3_256_360 // 4))
        assert of["memory"] == int(3_256_360 * 4.4)


def test_curves_are_means_over_ranks(trace: Trace) -> None:
    times, steps, values = data(trace)["curves"]["loss"]
    assert steps == [1, 2, 3, 4, 5, 6] and sorted(times) == times
    assert values == pytest.approx([2.3 / (1 + 0.1 * step) + 0.015 for step in range(6)], rel=1e-5)
    assert data(trace)["curves"]["accuracy"][1] == [3, 6]


def test_nothing_is_fetched_and_no_text_becomes_markup(tmp_path: Path) -> None:
    rows = [[["L", "<img src=x onerror=alert(1)>", 0, 0, 5]]]
    html = page(read(cases.write(tmp_path, rows, program="<script>alert(1)</script> {{data}} & more")))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp;" in html
    assert "<script>alert" not in html and "onerror" not in html
    assert "default-src 'none'" in html
    addresses = set(re.findall(r"https?://[\w./-]+", html)) - {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not addresses
    assert not re.search(r"\{\{\w+\}\}", html.replace("{{data}}", "", 1))


def test_staleness_is_counted(tmp_path: Path) -> None:
    rows = [[["V", "staleness", late, 5]] * times for late, times in ((0, 3), (2, 4))]
    assert data(read(cases.write(tmp_path, rows)))["staleness"] == [(0, 3), (2, 4)]


def pipeline_rows(schedule: str, stages: int, micro: int, chunks: int, slow: int, **times: float) -> list[list]:
    """What the ranks of a pipeline would write that is played `slow` times slower than its ideal."""
    timeline = play(schedule, stages, micro, chunks, **times)
    ranks = []
    for spans in timeline.spans:
        rows: list[list] = [["S", 1, 0, int(timeline.seconds) * slow]]
        last = 0
        for action, start, end in spans:
            begin, done = int(start) * slow, int(start) * slow + int(end - start)
            rows.append(["P", type(action).__name__, action.micro, action.chunk, last, begin, done])
            last = done
        ranks.append(rows)
    return ranks


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("gpipe", 1), ("zero-bubble", 1), ("interleaved", 2)])
def test_a_pipeline_is_shown_beside_its_ideal(tmp_path: Path, name: str, chunks: int) -> None:
    times = dict(forward=100, backward_input=100, backward_weight=100)
    schedule = {"name": name, "stages": 3, "microbatches": 4, "chunks": chunks}
    exact = cases.write(tmp_path / "exact", pipeline_rows(name, 3, 4, chunks, 1, **times), schedule=schedule)
    found = data(read(exact))["pipeline"]
    assert [[tuple(action) for action in row] for row in found["played"]] == [
        [(type(s.action).__name__, s.action.micro, s.action.chunk, s.start, s.end - s.start) for s in row]
        for row in play(name, 3, 4, chunks, **times).spans
    ]
    assert found["idle"] == pytest.approx(found["ideal_idle"]) == pytest.approx(found["formula"])
    assert found["ideal"] == found["played"]
    slow = cases.write(tmp_path / "slow", pipeline_rows(name, 3, 4, chunks, 3, **times), schedule=schedule)
    slowly = data(read(slow))["pipeline"]
    assert slowly["ideal"] == found["ideal"] and slowly["idle"] > 0.6


def test_of_several_pipelines_that_of_rank_0_is_shown(tmp_path: Path) -> None:
    schedule = {"name": "1f1b", "stages": 2, "microbatches": 2, "chunks": 1}
    first, second = pipeline_rows("1f1b", 2, 2, 1, 1, forward=10, backward_input=10, backward_weight=10)
    send = ["O", 1, "send", "stages", 1, 8, "float32", 0, "", 5, 6]
    rows = [[["G", "stages", [0, 2]], send, *first], first, second, second]
    assert data(read(cases.write(tmp_path, rows, schedule=schedule)))["pipeline"]["ranks"] == [0, 2]


def test_a_trace_with_nothing_in_it_has_a_page(tmp_path: Path) -> None:
    content = unpacked(page(read(cases.write(tmp_path, [[], []]))))
    assert content["curves"] == {} and content["pipeline"] is None and content["staleness"] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cases.write(tmp_path / "trace", cases.ring_run(steps=2))
    output, chrome = tmp_path / "page.html", tmp_path / "chrome.json"
    main(["report", str(folder), "--output", str(output), "--chrome", str(chrome)])
    assert unpacked(output.read_text("utf-8"))["ranks"] == [0, 1, 2, 3]
    assert json.loads(chrome.read_text("utf-8"))["traceEvents"]
    told = capsys.readouterr().out
    assert f"{output}   0." in told and f"{chrome}   0." in told
    with pytest.raises(SystemExit, match=r"minidist report: .*no trace: there is no rank-0000\.jsonl"):
        main(["report", str(tmp_path)])
