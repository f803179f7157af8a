"""What is particular to MPI: pieces, GPU memory, waiting, threads, starting. Programs run under mpirun here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from launch import ROOT, needs_mpi, run_ranks

from minidist.comm import threads
from minidist.comm.waiting import wait_until


def run(size: int, program: str, deadline: float = 60, **env: str) -> str:
    """What `program` prints, run on `size` ranks; it has to end well."""
    start = "import sys, time, os\nimport numpy as np\nfrom minidist.comm import world\ncomm = world()\n"
    done = run_ranks(size, "-c", start + program, deadline=deadline, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- messages -----------------------------------------------------------------------------------------------------

PIECES = """
import minidist.comm.mpi as mpi
mpi.PIECE = 1000
right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
for size in (0, 1, 999, 1000, 1001, 2000, 12345):
    mine = np.random.default_rng(comm.rank).integers(0, 256, size).astype(np.uint8)
    theirs = np.random.default_rng(left).integers(0, 256, size).astype(np.uint8)
    got = comm.sendrecv(mine, right, np.zeros_like(mine), left)
    assert (got == theirs).all(), size
if comm.rank == 0:
    comm.send(np.zeros(2500, np.uint8), 1)
elif comm.rank == 1:
    try:
        comm.recv(np.zeros(2900, np.uint8), 0)
    except ValueError as error:
        assert "2500 bytes, the receiving array 2900" in str(error), error
    else:
        raise AssertionError("a short last piece was accepted")
print("same")
"""


@needs_mpi
def test_a_message_is_cut_into_pieces_and_put_together():
    assert run(3, PIECES).count("same") == 3


LARGE = """
size = (2 << 30) + (100 << 20) + 3  # over 2 GiB, and no multiple of the piece
marks = {0: 1, (1 << 30) - 1: 2, 1 << 30: 3, (2 << 30) - 1: 4, 2 << 30: 5, size - 1: 6}
array = np.zeros(size, np.uint8) if comm.rank == 0 else np.empty(size, np.uint8)
if comm.rank == 0:
    for place, value in marks.items():
        array[place] = value
    comm.send(array, 1)
else:
    comm.recv(array, 0)
    print([int(array[place]) for place in marks], np.count_nonzero(array))
"""


@needs_mpi
def test_a_message_of_more_than_two_gib():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if memory < 8 << 30:
        pytest.skip("needs 8 GiB of memory")
    assert run(2, LARGE).split() == ["[1,", "2,", "3,", "4,", "5,", "6]", "6"]


# -- waiting ------------------------------------------------------------------------------------------------------


def test_waiting_returns_when_the_test_is_true_and_says_when_it_is_too_late():
    answers = iter([False] * 50 + [True])
    assert wait_until(lambda: next(answers), 10, lambda: None)
    start, watched = time.monotonic(), []
    assert not wait_until(lambda: False, 0.5, lambda: watched.append(1))
    assert 0.5 <= time.monotonic() - start < 5
    assert 1 <= len(watched) <= 2


def test_waiting_long_leaves_the_core_to_others():
    before = time.process_time()
    wait_until(lambda: False, 1.0, lambda: None)
    assert time.process_time() - before < 0.3


@needs_mpi
def test_a_deadline_says_who_waits_for_whom_where():
    program = """
comm.timeout = 0.5 if comm.rank else 30
if comm.rank == 1:
    try:
        comm.recv(np.zeros(5), 0, tag=3)
    except TimeoutError as error:
        print(error)
    comm.send(np.zeros(1), 0)
else:
    comm.recv(np.zeros(1), 1)
"""
    text = run(2, program)
    assert "rank 1 of 2 has waited 0.5 s for rank 0: receive from rank 0, tag 3, 40 bytes, at <string>:" in text


@needs_mpi
def test_a_split_that_a_rank_does_not_call_passes_its_deadline():
    program = """
if comm.rank == 1:
    comm.timeout = 0.5
    try:
        comm.split(0)
    except TimeoutError as error:
        print(error)
    comm.send(np.zeros(1), 0)
else:
    comm.recv(np.zeros(1), 1)
"""
    assert "rank 1 of 2 has waited 0.5 s for one of ranks 0, 1: split(color=0, key=0)" in run(2, program)


# -- starting -----------------------------------------------------------------------------------------------------


def test_a_program_on_one_rank_does_not_load_mpi():
    program = "import sys; from minidist.comm import world; print(world().size, 'mpi4py' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.split() == ["1", "False"], done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
@pytest.mark.parametrize("rank", [0, 1])
def test_an_mpirun_of_another_mpi_is_named_once(rank):
    """As under an mpirun that mpi4py's library does not know: each process believes that it is alone."""
    program = "from minidist.comm import world; world()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("mpirun started 2 ranks, but mpi4py's MPI") == (rank == 0)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_without_mpi4py_the_first_rank_says_what_to_install(rank):
    program = "import sys; sys.modules['mpi4py'] = None; from minidist.comm import world; world()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PMI_RANK": str(rank), "PMI_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("pip install 'minidist[mpi]'") == (rank == 0)
    assert len(done.stderr.splitlines()) == (rank == 0)


@needs_mpi
def test_a_timeout_that_is_no_number_is_refused_once():
    done = run_ranks(3, "-c", "from minidist.comm import world; world()", deadline=60, env={"MINIDIST_TIMEOUT": "soon"})
    assert done.returncode != 0
    assert done.stderr.count("MINIDIST_TIMEOUT='soon': expected a number of seconds above 0") == 1, done.stderr


@needs_mpi
def test_ranks_share_the_cores_of_their_host_unless_the_user_says_otherwise():
    program = """
from threadpoolctl import threadpool_info
most = max([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"], default=1)
sys.stdout.write(f"{most} ")  # at once, also where Python does not buffer
"""
    unset = dict.fromkeys(threads.USER_CHOICES, "")
    share = max(1, threads.cores() // 2)
    assert run(2, program, **unset).split() == [str(share)] * 2
    wish = str(threads.cores())  # no more: OpenBLAS takes no more threads than there are cores
    assert run(2, program, **dict.fromkeys(threads.USER_CHOICES, wish)).split() == [wish] * 2


# -- GPUs ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
@pytest.mark.parametrize("answer, aware", [("1", True), ("0", False)])
def test_the_user_may_say_whether_mpi_knows_gpus(answer, aware):
    program = "from minidist.comm.mpi import _cuda_aware; print(_cuda_aware())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MINIDIST_CUDA_AWARE": answer}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.split() == [str(aware)], done.stderr
