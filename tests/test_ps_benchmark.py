"""benchmarks/parameter_server.py: its simulated figures, and a quick run of each part."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launch import ROOT, needs_mpi

sys.path.append(str(ROOT / "benchmarks"))
import parameter_server
import parameter_server_simulated as simulated

SCRIPT = str(ROOT / "benchmarks" / "parameter_server.py")


@pytest.fixture(scope="module")
def exchanges() -> list[simulated.Exchange]:
    return simulated.all_exchanges(8)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, bool], simulated.Run]:
    args = parameter_server.parse(["--quick"])
    return {(run.name, run.slow): run for run in simulated.all_runs(args.samples, args.test, args.workers)}


# -- servers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_one_way_takes_what_the_link_of_a_server_takes(exchanges, servers):
    mine = [e for e in exchanges if e.servers == servers]
    assert [e.workers for e in mine] == [1, 2, 4, 8]
    for e in mine:
        assert e.formula == pytest.approx(max(1, e.workers / servers) * 4 * 814_090 * 8e-9)
        for seconds in (e.push, e.pull):
            assert e.formula <= seconds <= 1.05 * e.formula
        assert min(e.push_at_once, e.pull_at_once) >= e.formula


def test_the_ring_takes_what_its_formula_says(exchanges):
    ring = [e for e in exchanges if not e.servers]
    for e in ring:
        P, n = e.workers, 4 * 814_090
        assert e.push == pytest.approx(2 * (P - 1) * (50e-6 + n / P * 8e-9))


# -- consistency ----------------------------------------------------------------------------------------------------


def test_a_straggler_sets_the_pace_of_those_that_wait_for_it_and_of_no_others(runs):
    def kept(name: str) -> float:
        beside, alone = runs[name, True], runs[name, False]
        return (beside.samples / beside.seconds) / (alone.samples / alone.seconds)

    # 4 workers; the slow one does a third: of 4 workers' work 3 1/3 are left, less the last step that it is late with
    assert kept("async") > 0.7
    assert kept("ring") < 0.4
    assert kept("bsp") < 0.5
    assert kept("ssp:3, even shares") < 0.5
    assert kept("ssp:3, even shares") < kept("ssp:3") < kept("async")
    assert kept("backup:1") > 0.8


def test_the_ring_and_bsp_learn_alike_and_bsp_pays_for_the_servers_link(runs):
    n, c = 4 * (785 * 128 + 129 * 10) * 8e-9, 32e-3
    assert runs["ring", False].accuracy == pytest.approx(runs["bsp", False].accuracy, abs=2e-3)
    steps = 1536 // (4 * 32)
    assert runs["ring", False].seconds == pytest.approx(steps * (c + 2 * 3 / 4 * n), rel=0.03)
    assert runs["bsp", False].seconds == pytest.approx(steps * (c + 5 * n), rel=0.1)
    assert runs["async", False].staleness == pytest.approx(3, rel=0.1)


def test_everyone_sees_the_same_budget_and_time_goes_on(runs):
    for run in runs.values():
        seconds, samples, _ = zip(*run.points, strict=True)
        assert list(seconds) == sorted(seconds) and list(samples) == sorted(samples)
        assert (seconds[-1], samples[-1]) == (run.seconds, run.samples)
        assert run.samples == 1536 or run.name == "backup:1"


def test_the_pictures_are_drawn(tmp_path, runs, exchanges):
    pytest.importorskip("matplotlib")
    parameter_server.plot_runs(tmp_path / "runs.png", list(runs.values()))
    parameter_server.plot_exchanges(tmp_path / "exchanges.png", exchanges)
    assert all((tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG" for name in ("runs", "exchanges"))


# -- measured -------------------------------------------------------------------------------------------------------


@needs_mpi
@pytest.mark.parametrize(
    "part, words",
    [
        ("straggler", ["ssp:3, even shares", "backup:1", "its pace"]),
        ("messages", ["mpi4py Send, Recv", "one at a time", "windows of 64"]),
        ("ddp", ["minidist, bsp (and 1 server)", "left out of a quick run"]),
    ],
)
def test_a_quick_run_finds_its_own_checks_fulfilled(tmp_path, part, words):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--part", part, "--deadline", "90"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=100,
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    for word in words:
        assert word in done.stdout, done.stdout
