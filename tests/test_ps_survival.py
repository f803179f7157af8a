"""Real processes of a parameter server are killed: the rest finishes and says who died, or the job says why it ends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import needs_mpi, run_ranks
from open_mpi import SURVIVING, open_mpi

pytestmark = needs_mpi

RANKS, DEADLINE = 4, 60.0  # seconds, for a job

# The MNIST example. KILL is "rank:count": a worker dies at the step of this number, a server at its update.
EXAMPLE = """
import os, signal, sys
from minidist.comm import world
from minidist.examples import mnist
from minidist.parallel import ParameterServer
from minidist.parallel.parameter_server import Server

victim, count = map(int, os.environ["KILL"].split(":"))
left = count if world().rank == victim else -1

def until_it_dies(method):
    def counted(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    return counted

ParameterServer.step, Server.apply = until_it_dies(ParameterServer.step), until_it_dies(Server.apply)
mnist.main(sys.argv[1:])
"""

Survive = Callable[..., "subprocess.CompletedProcess[str]"]


def options(how: str, *more: object) -> list[str]:
    usual = [
        "--sync",
        "parameter-server",
        "--consistency",
        how,
        "--hidden",
        "64",
        "--batch-size",
        "256",
        "--lr",
        "0.004",
    ]
    return [*usual, *map(str, more)]


@pytest.fixture(scope="module")
def survive(tmp_path_factory: pytest.TempPathFactory) -> Survive:
    """Runs the example on ranks that outlive one another."""
    try:
        start, python = open_mpi(tmp_path_factory.mktemp("open_mpi"))
    except RuntimeError as error:
        pytest.skip(str(error))

    def run(
        kill: str, arguments: list[str], ranks: int = RANKS, deadline: float = DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        return run_ranks(
            ranks, "-c", EXAMPLE, *arguments, deadline=deadline, env={"KILL": kill, "OMP_NUM_THREADS": "1"},
            start=[*start, *SURVIVING], python=python,
        )  # fmt: skip

    return run


def report_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_an_asynchronous_run_outlives_a_worker_and_says_who_died_and_when(survive: Survive, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = survive("2:60", options("async", "--epochs", 1, "--json", file))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("died")]
    assert "worker rank 2 at " in line
    assert line.endswith(": its process ended")
    assert "minidist:" not in done.stderr
    result = report_of(file)
    (death,) = result["deaths"]
    assert (death["rank"], death["role"], death["how"]) == (2, "worker", "its process ended")
    assert 0 < death["seconds"] < result["seconds"] + 5
    assert 50 <= death["clock"] <= 60
    assert result["joined"] == []
    assert sorted(result["clocks"]) == ["1", "3"]
    assert result["mesh"] == {"dp": 2}
    assert result["test_accuracy"] > 0.9
    # What the dead one had been dealt and not trained on, one share at the most, is all that was missed.
    assert sum(result["samples"].values()) >= 60_000 - 2 * 256 // 3


def test_a_run_outlives_a_server_that_has_a_copy(survive: Survive, tmp_path: Path) -> None:
    # A scheduler, two servers, two workers: the first server dies, and its shard is taken over.
    file = tmp_path / "result.json"
    arguments = options("bsp", "--epochs", 1, "--servers", 2, "--copies", 1, "--json", file)
    done = survive("1:60", arguments, ranks=5)
    assert done.returncode == 0, done.stderr
    result = report_of(file)
    (death,) = result["deaths"]
    assert (death["rank"], death["role"], death["how"]) == (1, "server", "its process ended")
    assert f"died            server rank 1 at {death['seconds']:.1f} s" in done.stdout
    assert result["test_accuracy"] > 0.9
    assert sum(result["samples"].values()) == 60_000


def test_bsp_ends_and_says_who_died_and_what_could_go_on(survive: Survive) -> None:
    begin = time.monotonic()
    done = survive("2:30", options("bsp", "--epochs", 2))
    assert done.returncode != 0
    assert time.monotonic() - begin < 30
    assert "rank 2" in done.stderr, done.stderr
    assert "async, ssp:S and backup:B can" in done.stderr, done.stderr


def test_a_run_whose_scheduler_dies_ends_and_says_so(survive: Survive) -> None:
    done = survive("0:300", options("async", "--epochs", 30, "--deadline", 3), deadline=DEADLINE)
    assert done.returncode != 0
    assert "rank 0" in done.stderr, done.stderr


@pytest.mark.parametrize("how", ["async", "bsp"])
def test_a_job_that_cannot_go_on_says_that_others_could(how: str) -> None:
    # Rank 2 dies in the middle of its messages, which rank 0 may be receiving.
    done = run_ranks(RANKS, "-c", EXAMPLE, *options(how, "--epochs", 2), deadline=DEADLINE, env={"KILL": "2:30"})
    assert done.returncode != 0
    if how == "async":  # (bsp would not go on elsewhere either)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("minidist:")]
        assert "If that is because a rank has died: this MPI, " in line
        assert "Open MPI's `mpirun --with-ft ulfm` lets them go on" in line
