"""No silent hang: one table for the job says what every rank does, who waits for whom, and at which line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from launch import needs_mpi, run_ranks

from minidist.comm.hanging import LONGEST, NO_ANSWER, circle, table
from minidist.comm.status import ENDED, MOST_PEERS, RUNS, WAITS, Status, place_in

START = """
import os, signal, subprocess, sys, threading, time
import numpy as np
import minidist as md
from minidist.collectives import all_reduce
from minidist.comm import watchdog
watchdog.LOOK = 0.05  # to be over sooner
comm = md.comm.world()
one = np.ones(1)

def culprit():
    {culprit}

"""
TITLE = "What every rank is doing:"


def run(size: int, program: str, culprit: str = "pass", **env: str) -> tuple[int, str]:
    """(status, standard error) of a program that is over in less than 15 seconds."""
    start = time.monotonic()
    done = run_ranks(size, "-c", START.replace("{culprit}", culprit) + program, deadline=30, env=env)
    assert time.monotonic() - start < 15, done.stderr
    return done.returncode, done.stderr


def the_table(text: str, size: int) -> dict[int | str, str]:
    """Of the one table in a text: what it says of each rank, and as "end" the lines below."""
    assert text.count(TITLE) == 1, text
    lines = text.partition(TITLE)[2].splitlines()[2:]
    rows: dict[int | str, str] = {}
    for rank in range(size):
        number, said = re.fullmatch(r" +(\d+)  (.*)", lines.pop(0)).groups()
        assert int(number) == rank, text
        if lines[0].startswith("      at "):
            said += "\n" + lines.pop(0)
        rows[rank] = said
    rows["end"] = "\n".join(lines).partition("Traceback")[0]
    return rows


# -- a rank that does not come ----------------------------------------------------------------------------------------

ABSENT = """
all_reduce(comm, one)
comm.timeout = 0.5
with comm.step("D.3(3)"):
    if comm.rank == 2:
        culprit()
with comm.step("D.3(4)"):
    all_reduce(comm, one, algorithm="ring")
"""


@needs_mpi
@pytest.mark.parametrize(
    "culprit", ["time.sleep(100)", "while True: pass", "a = np.ones((6000, 6000)); a = a @ a @ a @ a @ a @ a @ a @ a"]
)
def test_a_rank_that_is_busy_or_asleep(culprit):
    status, text = run(4, ABSENT, culprit)
    assert status != 0
    rows = the_table(text, 4)
    assert "has waited 0.5 s, its deadline. " + TITLE in text
    assert re.search(r"  runs +\d\.\d +D\.3\(3\)  last: all_reduce \w+, 8 bytes float64, on the world", rows[2])
    assert "at <string>:12 in culprit" in rows[2]
    for rank, left in ((0, 3), (1, 0), (3, 2)):
        operation = rf"all_reduce ring, 8 bytes float64, on the world: receive from rank {left}, tag \d+, \d bytes"
        assert re.search(
            rf"  waits +\d\.\d +{left} +D\.3\(4\)  {operation}\n      at <string>:21 in <module>", rows[rank]
        )
    assert "Waited for, but not waiting: rank 2\n" in rows["end"]
    assert "On the world ranks 0, 1, 3 have started 2 collectives, rank 2 only 1\n" in rows["end"]
    assert "circle" not in text
    assert text.count("Traceback (most recent call last)") == 1, text
    assert text.count("TimeoutError: rank ") == 1, text


@needs_mpi
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_rank_that_is_stopped_gives_no_answer(stopped):
    program = f"""
comm.timeout = 0.5
watchdog.COLLECT, watchdog.PATIENCE = 0.7, 0.3
if comm.rank == {stopped}:
    print("stopped", os.getpid(), file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
comm.recv(one, {stopped})
"""
    text = ""
    try:
        status, text = run(3, program)
        assert status != 0
        rows = the_table(text, 3)
        assert rows[stopped].endswith(NO_ANSWER)
        assert f"Waited for, but not waiting: rank {stopped}" in rows["end"]
        assert text.count("Traceback (most recent call last)") == 1, text
    finally:
        for process in re.findall(r"stopped (\d+)", text):
            try:
                command = subprocess.run(["ps", "-o", "args=", "-p", process], capture_output=True, text=True).stdout
                if "watchdog.COLLECT" in command:  # the launcher has left it
                    os.kill(int(process), signal.SIGKILL)
            except (OSError, subprocess.SubprocessError):
                pass


@needs_mpi
def test_a_split_waits_for_those_who_have_not_called_it():
    program = """
if comm.rank == 3:
    culprit()
comm.split(0, key=-comm.rank)
"""
    status, text = run(4, program, "time.sleep(100)", MINIDIST_TIMEOUT="0.5")
    assert status != 0
    rows = the_table(text, 4)
    for rank in range(3):
        assert re.search(rf"  waits +\d\.\d +3 +split\(color=0, key={-rank}\)\n      at <string>:17", rows[rank])
    assert "Waited for, but not waiting: rank 3" in rows["end"]


@needs_mpi
def test_collectives_are_counted_on_each_group():
    program = """
group = comm.split(comm.rank % 2)
all_reduce(group, one)
group.timeout = 0.5
if comm.rank == 2:
    culprit()
if comm.rank % 2 == 0:
    all_reduce(group, one, algorithm="mpi")
"""
    status, text = run(4, program, "time.sleep(100)")
    assert status != 0
    rows = the_table(text, 4)
    assert "all_reduce mpi, 8 bytes float64, on the group of 2 (ranks 0, 2): MPI_Iallreduce" in rows[0]
    assert re.search(r"  has ended *$", rows[1])
    assert "On the group of 2 (ranks 0, 2) rank 0 has started 2 collectives, rank 2 only 1\n" in rows["end"]
    assert rows["end"].count("collective") == 1


# -- ranks that wait for each other -----------------------------------------------------------------------------------


@needs_mpi
def test_a_circle_is_told_by_the_numbers_of_the_world():
    program = """
group = comm.split(None if comm.rank == 0 else 0, key=-comm.rank)  # its ranks 0 and 1 are the world's 2 and 1
comm.timeout = 0.5
if group is not None:
    group.timeout = 0.5
    group.recv(np.zeros(3), 1 - group.rank, tag=4)
"""
    status, text = run(3, program)
    assert status != 0
    rows = the_table(text, 3)
    assert re.search(r"  has ended *$", rows[0])
    operation = "receive from rank {}, tag 4, 24 bytes float64, on the group of 2 (ranks 2, 1)"
    assert operation.format(0) in rows[1]
    assert operation.format(1) in rows[2]
    assert re.search("A circle of 2: rank (1 waits for rank 2 waits for rank 1|2 waits .* 1 waits for rank 2)", text)


@needs_mpi
def test_a_program_may_catch_it_and_a_wait_is_shown_once():
    program = """
comm.timeout = 0.5 if comm.rank == 1 else 0.8
if comm.rank == 0:
    time.sleep(1.5)
else:
    try:
        comm.recv(one, 0)
    except TimeoutError:
        comm.timeout = 30
comm.sendrecv(one, (comm.rank + 1) % 3, np.zeros(1), (comm.rank - 1) % 3)
[comm.send(one, rank) for rank in (1, 2) if comm.rank == 0]
"""
    status, text = run(3, program)
    assert status == 0, text
    rows = the_table(text, 3)
    assert "rank 1 of 3 has waited 0.5 s, its deadline" in text
    assert "at <string>:17 in <module>" in rows[0]


@needs_mpi
def test_a_timeout_of_the_caller_s_own_prints_nothing():
    program = """
if comm.rank == 1:
    request = comm.irecv(one, 0)
    for _ in range(3):
        try:
            request.wait(timeout=0.1)
        except TimeoutError:
            continue
        raise AssertionError
    comm.send(one, 0)
    request.wait()
elif comm.rank == 0:
    comm.recv(one, 1)
    comm.send(one, 1)
"""
    assert run(2, program) == (0, "")


# -- SIGUSR1 ----------------------------------------------------------------------------------------------------------

ASKED = """
def ask():
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGUSR1)
if comm.rank in {asked}:
    threading.Thread(target=ask).start()
if comm.rank == 1:
    culprit()
comm.split(0)
time.sleep(0.3)
"""


@needs_mpi
@pytest.mark.parametrize("asked", [(1,), (0, 1, 2, 3)])
def test_a_signal_to_one_rank_or_to_all_prints_one_table_and_the_job_goes_on(asked):
    matmul = "a = np.ones((1500, 1500)); end = time.time() + 0.8\n    while time.time() < end: a @ a"
    status, text = run(4, ASKED.format(asked=asked), matmul)
    assert status == 0, text
    rows = the_table(text, 4)
    assert text.startswith("minidist: SIGUSR1. " + TITLE)
    assert "in culprit" in rows[1]
    assert "split(color=0, key=0)" in rows[0] + rows[2] + rows[3]
    assert "Traceback" not in text


@needs_mpi
def test_a_program_s_own_handler_and_children_are_left_alone():
    program = """
if comm.rank == 1:
    child = os.fork()
    if child == 0:
        time.sleep(10)
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR1
    assert subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True).stdout == b"5\\n"
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.3)
    assert heard
"""
    status, text = run(2, program)
    assert status == 0, text
    assert TITLE not in text


@needs_mpi
def test_where_mpi_takes_no_threads_the_waiting_ranks_answer():
    program = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
import minidist as md, minidist.comm.watchdog as watchdog, threading, time, numpy as np
comm = md.comm.world()
assert threading.active_count() == 1
comm.timeout, watchdog.COLLECT = 0.5, 0.7
if comm.rank == 2:
    time.sleep(100)
comm.recv(np.zeros(1), 2)
"""
    done = run_ranks(3, "-c", program, deadline=30)
    assert done.returncode != 0
    rows = the_table(done.stderr, 3)
    assert rows[2].endswith(NO_ANSWER)
    assert re.search(r"  waits +\d\.\d +2 ", rows[0])
    assert re.search(r"  waits +\d\.\d +2 ", rows[1])


# -- in words ---------------------------------------------------------------------------------------------------------


def status(state=RUNS, peers=(), groups=(), operation="", host="node"):
    return Status(state, 1.5, list(peers), list(groups), host, operation, "D.3(4)", "train.py:3 in step")


def test_a_status_travels_as_bytes():
    sent = status(WAITS, [3, 0], [(7, 2, "the world"), (9, 1, "a group of 2")], "receive", host="knoten-ä")
    message = sent.pack()
    assert message.dtype == np.uint8
    assert Status.unpack(message) == sent
    long = status(WAITS, range(10_000), [(i, i, "ö" * 1000) for i in range(100)], "ö" * 1000, "h" * 1000).pack()
    assert long.nbytes < 4000
    assert Status.unpack(long).peers == list(range(MOST_PEERS))


@pytest.mark.parametrize(
    "waits, ranks",
    [
        ({}, set()),
        ({0: [1], 1: [2]}, set()),
        ({0: [1], 1: [0]}, {0, 1}),
        ({0: [0]}, {0}),
        ({0: [1], 1: [2], 2: [3], 3: [1]}, {1, 2, 3}),
        ({0: [5, 1], 1: [6, 2], 2: [0]}, {0, 1, 2}),
        ({rank: range(rank + 1, 60) for rank in range(60)}, set()),
    ],
)
def test_a_circle_is_found_if_there_is_one(waits, ranks):
    found = circle(waits)
    assert set(found) == ranks
    assert len(found) == len(ranks)
    for rank, peer in zip(found, found[1:] + found[:1]):
        assert peer in waits[rank]


def test_of_many_ranks_those_that_do_not_wait_are_listed_first():
    size = 10 * LONGEST
    answers = {rank: status(WAITS, [size - 1]) for rank in range(size - 2)} | {size - 1: status(RUNS)}
    text = table("title", size, answers)
    assert f"\n {size - 1}  node  runs" in text
    assert f"\n {size - 2}  ?     {NO_ANSWER}\n" in text
    assert text.count("\n      at ") == LONGEST - 1
    assert f"and {size - LONGEST} more" in text
    assert text.endswith(f"Waited for, but not waiting: rank {size - 1}\n")


def test_a_rank_that_has_ended_says_so():
    assert "  has ended" in table("title", 1, {0: status(ENDED)})


def test_the_user_s_line_is_told_and_the_library_s_in_which_it_is():
    with pytest.raises(np.linalg.LinAlgError) as error:
        np.linalg.inv(np.zeros((2, 2)))
    frame = error.tb
    while frame.tb_next is not None:
        frame = frame.tb_next
    assert re.fullmatch(
        r"tests/test_hanging\.py:\d+ in test_the_user_.*, inside of .*_linalg\.py:\d+ in \w+", place_in(frame.tb_frame)
    )
    assert place_in(None) == ""
