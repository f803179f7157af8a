"""However one rank ends, the job ends: soon, with a status that says so, and with the guilty rank's lines once."""

from __future__ import annotations

import subprocess
import time

import pytest
from launch import needs_mpi, run_ranks

pytestmark = needs_mpi

# Rank 2 does what the test says; the others wait for it, as a training step would.
PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
from minidist.comm import world, refuse
comm = world()

def guilty_function():
    {guilty}

def others():
    {others}

guilty_function() if comm.rank in {ranks} else others()
"""
WAIT = "comm.recv(np.zeros(3), 2)"


def run(guilty: str, others: str = WAIT, ranks: tuple[int, ...] = (2,)) -> subprocess.CompletedProcess[str]:
    start = time.monotonic()
    done = run_ranks(4, "-c", PROGRAM.format(guilty=guilty, others=others, ranks=ranks), deadline=30)
    assert time.monotonic() - start < 12, done.stderr
    return done


def assert_failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It ended with an error, and one rank's story, which has these words in it."""
    assert done.returncode != 0, done.stderr
    stories = [line for line in done.stderr.splitlines() if line.startswith("rank ") and " of 4 " in line]
    assert len(stories) == 1, done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def words_of_ours(text: str) -> list[str]:
    """The lines that the launcher did not add: Open MPI reports a status other than 0, between two rules."""
    return "".join(text.split("-" * 74 + "\n")[::2]).splitlines()


@pytest.mark.parametrize("others", [WAIT, "time.sleep(100)", "comm.split(0)", "comm.recv(np.zeros(1), 0)"])
def test_an_exception(others):
    assert_failed(
        run("raise ValueError('broken')", others), "rank 2 of 4 failed", "in guilty_function", "ValueError: broken"
    )


def test_an_exception_in_a_thread():
    done = run("threading.Thread(target=lambda: 1 / 0).start(); comm.recv(np.zeros(3), 2)")
    assert_failed(done, "rank 2 of 4 failed: in thread", "ZeroDivisionError")


def test_an_exception_on_every_rank_is_printed_once():
    assert_failed(run("raise ValueError('broken')", ranks=(0, 1, 2, 3)), "rank 0 of 4 failed", "ValueError: broken")


@pytest.mark.parametrize("code", [0, 3])
def test_a_lone_sys_exit_while_others_wait(code):
    done = run(f"sys.exit({code})")
    assert_failed(done, f"rank 2 of 4 called sys.exit({code}) while rank ", "waits for it", "in guilty_function")
    assert done.returncode == (code or 1)


def test_a_lone_sys_exit_with_an_error_while_others_work():
    done = run("sys.exit(3)", "time.sleep(100)")
    assert_failed(done, "rank 2 of 4 called sys.exit(3) before the others", "in guilty_function")
    assert done.returncode == 3


def test_a_lone_end_of_the_program_while_others_wait():
    assert_failed(
        run("pass"), "PeerEnded: rank 2 of 4 has ended; rank ", " waits for rank 2: receive from rank 2, tag 0"
    )


def test_a_rank_may_end_before_the_others_where_nobody_waits_for_it():
    done = run("sys.exit(0)", "time.sleep(3); print('finished', flush=True)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("finished") == 3


def test_a_sys_exit_that_is_caught_is_none():
    caught = "\n    try: sys.exit(5)\n    except SystemExit: pass\n"
    done = run(caught, "time.sleep(3); print('finished', flush=True)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("finished") == 3


def test_what_was_sent_before_the_end_still_arrives():
    done = run(
        "[comm.isend(np.ones(3), rank) for rank in (0, 1, 3)]", "time.sleep(1); print(comm.recv(np.zeros(3), 2))"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("[1. 1. 1.]") == 3


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("ending", ["raise ValueError('broken')", "sys.exit(3)"])
def test_a_failure_that_cannot_be_printed_still_ends_the_job(stream, ending):
    assert run(f"sys.{stream}.close(); {ending}").returncode != 0


def test_an_interrupt():
    done = run("os.kill(os.getpid(), signal.SIGINT); time.sleep(100)")
    assert_failed(done, "rank 2 of 4 failed", "in guilty_function", "KeyboardInterrupt")


def test_an_interrupt_while_waiting():
    done = run("threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start(); comm.recv(np.zeros(3), 2)")
    assert_failed(done, "rank 2 of 4 failed", "in guilty_function", "KeyboardInterrupt")


def test_a_kill():
    done = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_an_abort():
    done = run("comm.abort(9)")
    assert done.returncode == 9
    assert "Traceback" not in done.stderr


def test_refuse_prints_one_line_and_ends_all_ranks_with_its_code():
    done = run("refuse(comm, 'a batch of 2 is too small for 4 ranks')", ranks=(0, 1, 2, 3))
    assert done.returncode == 2
    assert words_of_ours(done.stderr) == ["a batch of 2 is too small for 4 ranks"]


def test_sys_exit_on_every_rank_is_no_failure_to_talk_about():
    done = run("sys.exit(4)", ranks=(0, 1, 2, 3))
    assert (done.returncode, words_of_ours(done.stderr)) == (4, [])


def test_a_message_given_to_sys_exit_is_printed():
    assert "no such file\n" in run("sys.exit('no such file')").stderr
