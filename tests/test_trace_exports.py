"""A trace in other programs' formats: Chrome's Trace Event Format by its schema, and pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import jsonschema
import pytest
import trace_cases as cases

from minidist.trace import Trace, read, write_chrome
from minidist.trace.plots import write_plots


def event(phases: str, required: dict, **more: dict) -> dict:
    """The schema of events of these phases."""
    common = {
        "ph": {"enum": list(phases)},
        "name": {"type": "string"},
        "cat": {"type": "string"},
        "pid": {"type": "integer"},
        "tid": {"type": "integer"},
        "args": {"type": "object"},
    }
    properties = {**common, **required, **more}
    return {
        "type": "object",
        "properties": properties,
        "required": ["ph", "name", "pid", "tid", *required],
        "additionalProperties": False,
    }


# From the document "Trace Event Format" of the Chromium project: the JSON object format, and of the events those that
# we write. Timestamps and durations are microseconds, and may have fractions.
TIME = {"ts": {"type": "number", "minimum": 0}}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["traceEvents"],
    "additionalProperties": False,
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object", "additionalProperties": {"type": "string"}},
        "traceEvents": {
            "type": "array",
            "items": {
                "oneOf": [
                    event("X", {**TIME, "dur": {"type": "number", "minimum": 0}}),  # complete: a slice
                    event("i", {**TIME}, s={"enum": ["g", "p", "t"]}),  # instant, and how far it goes
                    event(  # a counter: its series are its arguments
                        "C",
                        {
                            **TIME,
                            "args": {"type": "object", "minProperties": 1, "additionalProperties": {"type": "number"}},
                        },
                    ),
                    event("sf", {**TIME, "id": {"type": ["integer", "string"]}}, bp={"const": "e"}),  # flows
                    {  # metadata: what has which name, and stands where
                        **event("M", {"args": {"type": "object"}}),
                        "oneOf": [
                            {
                                "properties": {
                                    "name": {"enum": ["process_name", "thread_name"]},
                                    "args": {"required": ["name"], "properties": {"name": {"type": "string"}}},
                                }
                            },
                            {
                                "properties": {
                                    "name": {"enum": ["process_sort_index", "thread_sort_index"]},
                                    "args": {
                                        "required": ["sort_index"],
                                        "properties": {"sort_index": {"type": "integer"}},
                                    },
                                }
                            },
                        ],
                    },
                ]
            },
        },
    },
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rows = cases.ring_run(steps=4, evaluate=2)
    rows[1].append(["P", "Forward", 0, 0, 100, 200, 300])
    rows[1].append(["O", 99, "receive", "0", 0, 8, "float32", 1, "", 1000, None])
    return read(cases.write(tmp_path_factory.mktemp("trace"), rows))


@pytest.fixture(scope="module")
def chrome(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("chrome") / "trace.json"
    write_chrome(trace, path)
    return json.loads(path.read_text("utf-8"))


def test_chromes_json_is_as_its_schema_says(chrome: dict) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(chrome)
    broken = {"traceEvents": [{"ph": "X", "name": "no duration", "pid": 0, "tid": 0, "ts": 1}]}
    assert not validator.is_valid(broken)


def slices(chrome: dict) -> dict[tuple[int, int], list[tuple[float, float, str]]]:
    found = defaultdict(list)
    for one in chrome["traceEvents"]:
        if one["ph"] == "X":
            found[one["pid"], one["tid"]].append((one["ts"], one["ts"] + one["dur"], one["name"]))
    return found


def test_slices_of_a_thread_nest_and_all_are_there(trace: Trace, chrome: dict) -> None:
    for spans in slices(chrome).values():
        open_ends: list[float] = []
        for start, end, _ in spans:  # in order of their starts
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-6
            open_ends.append(end)
    rows = sum(
        len(table)
        for rank in trace.ranks
        for table in (rank.computing, rank.operations, rank.wire, rank.waits, rank.labels, rank.steps, rank.actions)
    )
    assert sum(map(len, slices(chrome).values())) == rows
    first = trace.ranks[0].computing
    zero = trace.span[0]
    computing = [(start, end) for start, end, name in slices(chrome)[0, 2000] if name == "forward 0"]
    kept = [i for i, layer in enumerate(first.layer) if (layer, first.kind[i]) == ("0", "forward")]
    expected = [((first.start[i] - zero) / 1000, (first.end[i] - zero) / 1000) for i in kept]
    assert computing == [pytest.approx(pair) for pair in expected]


def test_each_message_is_an_arrow_from_its_sending_to_its_receiving(trace: Trace, chrome: dict) -> None:
    places = slices(chrome)
    flows: dict[int, dict[str, dict]] = defaultdict(dict)
    for one in chrome["traceEvents"]:
        if one["ph"] in "sf":
            flows[one["id"]][one["ph"]] = one
    assert len(flows) == len(trace.messages)
    for number, (sender, receiver) in enumerate(zip(trace.messages.sender, trace.messages.receiver)):
        for phase, rank, name in (("s", sender, f"to rank {receiver}"), ("f", receiver, f"from rank {sender}")):
            end = flows[number][phase]
            assert end["pid"] == rank
            inside = [what for start, stop, what in places[rank, end["tid"]] if start <= end["ts"] <= stop]
            assert name in inside


def test_ranks_are_processes_and_numbers_counters(chrome: dict) -> None:
    names = {
        (one["pid"], one["name"]): one["args"]["name"] for one in chrome["traceEvents"] if one["name"] == "process_name"
    }
    assert names == {(rank, "process_name"): f"rank {rank} (here, cpu)" for rank in range(4)}
    loss = [
        one["args"]["loss"]
        for one in chrome["traceEvents"]
        if one["ph"] == "C" and one["pid"] == 0 and one["name"] == "loss"
    ]
    assert loss == pytest.approx([2.3 / (1 + 0.1 * step) for step in range(4)])


def test_pictures(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: the extra `plot`")
    written = write_plots(trace, tmp_path / "new")
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("curves", "breakdown", "traffic", "step") for kind in ("png", "svg")
    ]
    assert all(path.stat().st_size > 4000 for path in written)
    assert (tmp_path / "new" / "step.png").read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_plots(trace, tmp_path / "new")] == before  # the same bytes every time


def test_pictures_of_a_trace_with_nothing_in_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: the extra `plot`")
    assert write_plots(read(cases.write(tmp_path / "trace", [[], []])), tmp_path) == []
