"""What a run tells of itself, and the document's steps: every one has its place in the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, needs_mpi, run_ranks

import minidist as md
from minidist.comm import Network, simulate
from minidist.trace import narrate
from minidist.trace.labels import LABELS, main, places

# As the mission has them; not read from the code under test.
DOCUMENT = [
    "D.1",
    "D.2",
    "D.3(1)",
    "D.3(2)",
    "D.3(3)",
    "D.3(4)",
    "D.3(5)",
    "M.1",
    "M.2(1)",
    "M.2(2)",
    "M.2(3)",
    "M.2(4)",
    "M.2(5)",
    "C.1",
    "C.2",
    "C.3",
    "C.4",
]


def told(program, size, network=None, rank=0):
    """The lines that rank 0 tells of a program."""
    lines = []

    def narrated(comm):
        with narrate(comm, lines.append):
            program(comm)

    simulate(narrated, size, network=network)
    return lines


# -- the narrator -----------------------------------------------------------------------------------------------------


def test_a_ring_is_told_in_numbers():
    """6 messages of a quarter of 814,090 float32 each: 3,256,360 bytes / 4 at 2 ns a byte, and 50 us each."""
    seconds = 6 * (50e-6 + 3_256_360 / 4 * 2e-9)

    def program(comm):
        with comm.step("D.3(4) average gradients"):
            md.collectives.all_reduce(comm, np.zeros(814_090, np.float32), algorithm="ring")

    (line,) = told(program, 4, Network(alpha=50e-6, beta=2e-9))
    assert line == (
        "D.3(4) synchronise: ring all-reduce of 814,090 float32 (3.26 MB) over 4 ranks, 6 messages of 0.81 MB each, "
        f"{seconds * 1e3:.1f} ms (average gradients)"
    )


def test_only_the_first_rank_tells():
    def program(comm):
        with comm.step("D.3(4) average gradients"):
            if comm.rank == 1:
                comm.send(np.zeros(500), 2)
            elif comm.rank == 2:
                comm.recv(np.empty(500), 1)

    assert told(program, 3) == []


def test_messages_tell_both_their_ends():
    def program(comm):
        with comm.step("M.2(4) combine"):
            if comm.rank == 0:
                comm.send(np.zeros(500, np.float32), 1)
                comm.recv(np.empty((2, 500)), 1)
            else:
                comm.recv(np.empty(500, np.float32), 0)
                comm.send(np.zeros((2, 500)), 0)

    assert told(program, 2, Network(alpha=1e-3)) == [
        "M.2(4) combine: send 500 float32 (2 kB) to rank 1, 0 µs",
        "M.2(4) combine: receive 1,000 float64 (8 kB) from rank 1, 2.0 ms",
    ]


def training(comm, steps, news=None):
    model = md.nn.Sequential(md.nn.Linear(3, 400), md.nn.ReLU(), md.nn.Linear(400, 2))
    model, optimizer = md.parallel.data_parallel(
        model, md.optim.SGD(model.parameters(), lr=0.1), comm, algorithm="ring", bucket_bytes=10**9
    )
    for step in range(steps):
        optimizer.zero_grad()
        with comm.step("D.3(3) train"):
            model(md.randn(4, 3)).sum().backward()
        optimizer.step()
        if step == news:
            with comm.step("D.3(4) clip gradients"):
                md.collectives.all_reduce(comm, np.zeros(1000))
    comm.mark("D.3(5)", "epoch 1 of 1 is over")


def test_the_first_two_steps_are_told_whole_and_then_what_is_new():
    lines = told(lambda comm: training(comm, 30, news=20), 2)
    assert sum("D.3(3) train: forward" in line for line in lines) == 2
    assert sum("D.3(3) train: backward" in line for line in lines) == 2
    assert sum("ring all-reduce of 2,402 float32" in line for line in lines) == 2
    (silence,) = [i for i, line in enumerate(lines) if line.startswith("...")]
    (news,) = [i for i, line in enumerate(lines) if "(clip gradients)" in line]
    assert silence < news == len(lines) - 3
    assert lines[-2] == "D.3(5) repeat: epoch 1 of 1 is over"
    # 30 rings, and as many exchanges of who has how many samples.
    summed_up = r"  D\.3\(4\) synchronise: 60 operations, \d+ µs in the median \(average gradients\)"
    assert re.fullmatch(summed_up, lines[-1])
    assert len(lines) < 20


def test_what_a_step_does_often_is_told_three_times():
    def program(comm):
        for _ in range(50):
            with comm.step("M.2(4) combine"):
                md.collectives.all_reduce(comm, np.zeros(1000), algorithm="ring")

    assert len(told(program, 2)) == 3


def test_much_that_is_new_ends_the_beginning():
    def program(comm):
        for n in range(300, 500):
            with comm.step("M.2(4) combine"):
                for _ in range(3):
                    md.collectives.all_reduce(comm, np.zeros(n), algorithm="ring")

    lines = told(program, 2)
    assert lines[60] == "... (from here on, what is new)"
    assert len(lines) == 61 + 180  # three of each of the first 20, and one of each other size


def test_small_messages_beside_the_steps_and_groups_of_one_are_not_told():
    def program(comm):
        md.collectives.all_reduce(comm, np.zeros(3))
        alone = comm.split(comm.rank)
        with comm.step("D.3(4) average gradients"):
            md.collectives.all_reduce(alone, np.zeros(1000))
        md.collectives.all_reduce(comm, np.zeros(1000), algorithm="ring")

    (line,) = told(program, 2)
    assert line.startswith("beside the steps: ring all-reduce of 1,000 float64 (8 kB) over 2 ranks, 2 messages of 4 kB")


def test_nobody_listens_afterwards():
    def program(comm):
        with narrate(comm, print):
            pass
        return comm.record.listeners

    assert simulate(program, 2).results == [(), ()]


# -- the steps --------------------------------------------------------------------------------------------------------


def test_every_step_of_the_document_is_somewhere_in_the_code():
    assert list(LABELS) == DOCUMENT
    found = places()
    assert {place.label for place in found} == set(DOCUMENT)
    for place in found:
        lines = (ROOT / "minidist" / place.file).read_text("utf-8").splitlines()
        near = lines[place.line - 1 : place.line + 14]  # a docstring is below its function's first line
        assert any(place.label in line for line in near), place
        assert place.words, place


@pytest.mark.parametrize("label", [label for label in DOCUMENT if label[0] in "DM"])
def test_the_strategies_have_the_steps_themselves(label):
    """Not only the examples: what others build on does."""
    assert any(not place.file.startswith("examples/") for place in places() if place.label == label) or "(5)" in label


def test_marks_are_found_as_they_are_meant(tmp_path: Path):
    (tmp_path / "a.py").write_text(
        '"""D.1 in a module\'s docstring is talk."""\n'
        "# M.2(5), D.3(5) Repeat.\n"
        "x = 1  # D.3(2) Deal. D.3(3) Train.\n"
        "def f():\n"
        '    """D.2 Spread."""\n'
        'STEP = "M.2(4) combine"\n'
        'comm.step(f"M.2(3) {x} now")\n'
        'comm.mark("C.1", "words")\n'
        'comm.other("C.2", "words")\n'
        "# see D.3(1)\n"
    )
    assert [(place.label, place.line, place.words) for place in places(tmp_path)] == [
        ("D.2", 4, "Spread."),
        ("D.3(2)", 3, "Deal."),
        ("D.3(3)", 3, "Train."),
        ("D.3(5)", 2, "Repeat."),
        ("M.2(3)", 7, "{...} now"),
        ("M.2(4)", 6, "combine"),
        ("M.2(5)", 2, "Repeat."),
        ("C.1", 8, "words"),
    ]


def test_the_command_lists_them(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == DOCUMENT
    main(["D.3(4)"])
    chosen = capsys.readouterr().out.splitlines()
    assert chosen[0] == "D.3(4)  synchronise  同步参数"
    assert any(line.startswith("    minidist/parallel/averaging.py:") for line in chosen[1:])
    with pytest.raises(SystemExit):
        main(["D.9"])
    assert "there is no step D.9" in capsys.readouterr().err


def test_python_m_minidist_says_what_there_is():
    done = subprocess.run(
        [sys.executable, "-m", "minidist"], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert "usage: python -m minidist COMMAND" in done.stdout
    assert re.search(r"^  steps +the document's numbered steps", done.stdout, re.MULTILINE)
    command = [sys.executable, "-m", "minidist", "stepz"]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert wrong.returncode != 0
    assert "there is no command 'stepz'" in wrong.stderr


# -- in the examples --------------------------------------------------------------------------------------------------


def assert_messages_match(folder: Path, ranks: int) -> None:
    """What one rank has sent, another has received: as often, in the same order, no sooner."""
    sent, received = defaultdict(list), defaultdict(list)
    for rank in range(ranks):
        for line in (folder / f"rank-{rank:04}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if isinstance(row, list) and row[0] == "M":
                _, direction, group, peer, tag, nbytes, start, end = row
                ends = (rank, peer) if direction == "s" else (peer, rank)
                table = sent if direction == "s" else received
                table[group, tag, *ends].append((nbytes, start if direction == "s" else end))
    assert sent.keys() == received.keys()
    assert sent
    for key, messages in sent.items():
        assert [n for n, _ in messages] == [n for n, _ in received[key]], key
        assert all(left <= came for (_, left), (_, came) in zip(messages, received[key], strict=True)), key


@needs_mpi
@pytest.mark.parametrize(
    "ranks, options, steps",
    [
        (2, (), "C.1 C.4 D.3(1) D.2 D.1 D.3(2) D.3(3) D.3(4) D.3(5)"),
        (2, ("--pp", "2"), "C.1 C.4 M.2(1) M.1 M.2(2) M.2(3) M.2(4) M.2(5)"),
        (3, ("--sync", "parameter-server"), "C.1 C.4 D.2 D.3(4) D.3(5)"),
    ],
    ids=("data", "pipeline", "server"),
)
def test_the_example_explains_and_records_itself(ranks, options, steps, tmp_path):
    command = ["-m", "minidist.examples.mnist", "--explain", "--trace", str(tmp_path / "run"), "--epochs", "1"]
    small = ["--batch-size", "6000", "--hidden", "16"]
    done = run_ranks(ranks, *command, *small, *options, deadline=120)
    assert done.returncode == 0, done.stderr
    for step in steps.split():
        assert re.search(rf"^{re.escape(step)} {LABELS[step][0]}: ", done.stdout, re.MULTILINE), (step, done.stdout)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"rank-{r:04}.jsonl" for r in range(ranks)]
    assert_messages_match(tmp_path / "run", ranks)
    text = (tmp_path / "run" / f"rank-{ranks - 1:04}.jsonl").read_text()
    assert '["V","loss",' in text
