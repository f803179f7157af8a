"""A rank is killed. Where the launcher lets the others go on, they do and know who died; elsewhere the job says why."""

from __future__ import annotations

import subprocess
import time

import pytest
from launch import needs_mpi, run_ranks
from open_mpi import SURVIVING, open_mpi

from minidist.comm import simulate

pytestmark = needs_mpi

# Rank 0 answers every message with its double, until it has answered all that the living will send.
SERVER_AND_WORKERS = """
import os, signal, sys, time
import numpy as np
from minidist.comm import PeerFailed, world
comm = world()
killed, length, each = int(sys.argv[1]), int(sys.argv[2]), 30
say = lambda text: os.write(1, f"{text}\\n".encode())  # in one piece
say("outlives" if comm.outlive() else "does not outlive")
if comm.rank == 0:
    answered = dict.fromkeys(range(1, comm.size), 0)
    caught = set()

    def serve():
        try:
            found = comm.iprobe() or comm.probe(timeout=5)
            message = comm.recv(np.empty(found.nbytes // 8), found.source)
            comm.send(message * 2, found.source)
            answered[found.source] += 1
        except PeerFailed as error:
            caught.add(error.rank)

    while any(answered[rank] < each for rank in answered if rank not in comm.failed()):
        serve()
    assert caught <= comm.failed(), caught
    for rank in comm.failed():
        for needs in (lambda: comm.isend(np.ones(1), rank), lambda: comm.irecv(np.ones(1), rank),
                      lambda: comm.iprobe(rank), lambda: comm.probe(rank), lambda: comm.split(0)):
            try:
                needs()
            except PeerFailed as error:
                assert error.rank == rank and f"rank {rank} of 4 has died" in str(error), error
            else:
                raise AssertionError("needs the dead, and goes on")
    assert comm.iprobe() is None
    say(f"died: {sorted(comm.failed())} answered: {list(answered.values())}")
else:
    for step in range(each):
        if comm.rank == killed and step == each // 2:
            comm.isend(np.ones(length), 0)
            os.kill(os.getpid(), signal.SIGKILL)
        comm.send(np.full(length, float(step)), 0)
        got = comm.recv(np.empty(length), 0)
        assert (got == 2 * step).all()
    say("finished")
"""

ALL_REDUCE = """
import os, signal, sys, threading, time
import numpy as np
import minidist as md
from minidist.collectives import all_reduce
comm = md.comm.world()
all_reduce(comm, np.ones(1000), algorithm="ring")
if comm.rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if comm.rank == 0:
    time.sleep(100)  # it needs nobody
all_reduce(comm, np.ones(1000), algorithm=sys.argv[1])
"""


@pytest.fixture(scope="session")
def survive(tmp_path_factory):
    """Runs a program on 4 ranks that outlive one another."""
    try:
        start, python = open_mpi(tmp_path_factory.mktemp("open_mpi"))
    except RuntimeError as error:
        pytest.skip(str(error))

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        begin = time.monotonic()
        texts = [str(argument) for argument in arguments]
        done = run_ranks(4, "-c", program, *texts, deadline=30, start=[*start, *SURVIVING], python=python)
        assert time.monotonic() - begin < 12, done.stderr
        return done

    return run


@pytest.mark.parametrize("length", [3, 200_000])
def test_the_others_go_on_and_know_who_died(survive, length):
    done = survive(SERVER_AND_WORKERS, 2, length)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outlives") == 4
    assert done.stdout.count("finished") == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("died:")]
    died, answered = line.removeprefix("died: ").split(" answered: ")
    assert died == "[2]"
    assert answered in ("[30, 15, 30]", "[30, 16, 30]")  # what it sent last may be found, or lost
    assert "minidist:" not in done.stderr


def test_nothing_is_different_where_nobody_dies(survive):
    done = survive(SERVER_AND_WORKERS, -1, 3)
    assert done.returncode == 0, done.stderr
    assert "died: [] answered: [30, 30, 30]" in done.stdout
    assert done.stdout.count("finished") == 3
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("algorithm", ["ring", "mpi"])
def test_a_death_that_nobody_catches_ends_the_job_and_is_named(survive, algorithm):
    done = survive(ALL_REDUCE, algorithm)
    assert done.returncode == 1, done.stderr
    assert "PeerFailed: rank 2 of 4 has died; rank " in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr


def test_a_job_that_ends_with_its_rank_says_that_others_do_not():
    done = run_ranks(4, "-c", SERVER_AND_WORKERS, "2", "3", deadline=30)
    assert done.returncode != 0
    assert done.stdout.count("does not outlive") == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("minidist:")]
    assert "If that is because a rank has died: this MPI, " in line
    assert "Open MPI's `mpirun --with-ft ulfm` lets them go on" in line


def test_a_job_that_ends_well_says_nothing_of_it():
    done = run_ranks(4, "-c", SERVER_AND_WORKERS, "-1", "3", deadline=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "died: [] answered: [30, 30, 30]" in done.stdout


def test_an_exception_is_no_death():
    program = "from minidist.comm import world; comm = world(); comm.outlive(); 1 / (comm.rank == 1); comm.split(0)"
    done = run_ranks(2, "-c", program, deadline=30)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "minidist:" not in done.stderr


def test_simulated_ranks_do_not_die():
    def program(comm):
        return comm.survives, comm.outlive(), comm.failed()

    assert simulate(program, 2).results == [(False, False, frozenset())] * 2
