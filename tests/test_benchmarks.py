"""benchmarks/: what all_reduce.py makes of its measurements, and a small run of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launch import ROOT, needs_mpi

sys.path.append(str(ROOT / "benchmarks"))
import all_reduce
import all_reduce_report as report_of
import common

KIB, MIB = 1 << 10, 1 << 20


def report(seconds: dict[str, dict[int, list[float]]], **changes) -> dict:
    sizes = sorted({n for times in seconds.values() for n in times})
    whole = {
        "ranks": 4,
        "hosts": 1,
        "per_host": 4,
        "library": "MPICH 5.0.2",
        "bandwidth": None,
        "repeats": 3,
        "sizes": sizes,
        "left_out": "",
        "seconds": {name: {str(n): values for n, values in times.items()} for name, times in seconds.items()},
    }
    return {**whole, **changes}


def one_host(ours: float) -> dict:
    """MPI_Allreduce takes 10 µs for 1 KiB and 1 ms for 1 MiB; our best `ours` times that, and naive 100 times."""
    short, long = [10e-6, 11e-6, 9e-6], [1e-3, 2e-3, 0.9e-3]  # a slow repeat is slow for all

    def times(factor: float) -> dict[int, list[float]]:
        return {KIB: [t * factor for t in short], MIB: [t * factor for t in long]}

    seconds = {
        "minidist naive": times(100),
        "minidist ring": {KIB: times(2 * ours)[KIB], MIB: times(ours)[MIB]},
        "minidist recursive_doubling": {KIB: times(ours)[KIB], MIB: times(2 * ours)[MIB]},
        "minidist auto": times(1.5 * ours),
        report_of.MPI: times(1),
        report_of.IN_PLACE: times(0.5),
        report_of.GLOO: times(10),
        report_of.COPY: {KIB: [1e-6] * 3, MIB: [0.1e-3] * 3},
        report_of.EXCHANGE: {KIB: [3e-6] * 3},
        report_of.CALL: {KIB: [1e-6] * 3},
    }
    return report(seconds)


# -- single figures -------------------------------------------------------------------------------------------------


def test_bandwidths_and_the_links_limit():
    assert report_of.algbw(8_000_000, 2e-3) == pytest.approx(4e9)
    assert report_of.busbw(2, 8_000_000, 2e-3) == pytest.approx(4e9)
    assert report_of.busbw(4, 8_000_000, 2e-3) == pytest.approx(6e9)
    assert report_of.link_seconds(2, 4 * MIB, 1e9) == pytest.approx(33.554432e-3)
    assert report_of.link_seconds(4, 4 * MIB, 1e9) == pytest.approx(1.5 * 33.554432e-3)


def test_sizes_are_read_and_written_with_units():
    assert [all_reduce.size(text) for text in ("64", "16KiB", "2MiB")] == [64, 16 * KIB, 2 * MIB]
    assert [report_of.bytes_text(n) for n in (64, 16 * KIB, 2 * MIB)] == ["64 B", "16 KiB", "2 MiB"]
    for wrong in ("0", "6", "1GB", "-4"):
        with pytest.raises(all_reduce.argparse.ArgumentTypeError):
            all_reduce.size(wrong)


def test_libraries_are_called_by_name_and_version():
    assert all_reduce.library("MPICH Version:      5.0.2\nMPICH Release date: ...") == "MPICH 5.0.2"
    assert all_reduce.library("Open MPI v5.0.11, package: Open MPI root@x, ident: 5.0.11") == "Open MPI 5.0.11"


def test_the_machine_is_told_in_a_line_without_what_is_absent():
    line = common.machine(Pytest="pytest", Nothing="a-package-of-no-one")
    assert f"Pytest {pytest.__version__}" in line
    assert "Nothing" not in line and "commit" in line and "\n" not in line


# -- the judgement --------------------------------------------------------------------------------------------------


def test_our_best_is_an_algorithm_and_ratios_are_within_repeats():
    measured = one_host(0.5)
    assert report_of.best(measured, KIB) == "minidist recursive_doubling"
    assert report_of.best(measured, MIB) == "minidist ring"
    assert report_of.ratios(measured, report_of.MPI, "minidist ring", MIB) == pytest.approx([2, 2, 2])
    assert report_of.ratios(measured, "nobody", "minidist ring", MIB) == []


def test_targets_are_judged_against_each_form_of_the_peer():
    text = "\n".join(report_of.judgement(one_host(0.8)))  # 1.25 × MPI_Allreduce, 0.625 × in place
    assert (
        "MPI_Allreduce's time / our best's: geometric mean 1.25, least 1.25 (1 MiB); target 1.2: met, 0.95: met" in text
    )
    assert (
        "in place's time / our best's: geometric mean 0.62, least 0.62 (1 MiB); target 1.2: NOT met, 0.95: NOT" in text
    )
    assert "Gloo's time / our best's: geometric mean 12.50, least 12.50 (1 KiB); target 5: met" in text
    assert "latency / MPI_Allreduce's: at most 0.80 (1 KiB); target at most 2.5: met, and the aim of 1.5" in text
    assert "latency / MPI_Allreduce in place's: at most 1.60 (1 KiB); target at most 2.5: met\n" in text
    assert "auto takes at most 1.50 times as long as our best" in text
    assert "our best: 1 KiB recursive_doubling, 1 MiB ring" in text
    assert "target at most 2.5: NOT met" in "\n".join(report_of.judgement(one_host(2)))


def test_pythons_share_is_what_two_exchanges_leave():
    line = report_of.python_share(one_host(1), KIB)  # 10 µs, of which lg 4 exchanges of 3 - 1 µs
    assert "MPI 2 × (3.0 - 1.0) = 4.0 µs, the rest Python 6.0 µs (60%)" in line


def test_across_hosts_hierarchical_is_judged_by_the_link():
    allowed = {n: report_of.link_seconds(2, n, 1e9) for n in (4 * MIB, 64 * MIB)}
    seconds = {
        "minidist ring": {n: [t * 1.5] for n, t in allowed.items()},
        "minidist hierarchical": {4 * MIB: [allowed[4 * MIB] / 0.8], 64 * MIB: [allowed[64 * MIB] / 0.95]},
        "minidist auto": {n: [t * 1.5] for n, t in allowed.items()},
        report_of.MPI: {n: [t * 1.5] for n, t in allowed.items()},
        report_of.IN_PLACE: {n: [t * 1.8] for n, t in allowed.items()},
    }
    measured = report(seconds, hosts=2, per_host=2, bandwidth=1e9)
    text = "\n".join(report_of.judgement(measured))
    assert (
        "MPI_Allreduce's time / hierarchical's: geometric mean 1.31, least 1.20 (4 MiB); target 1.25: NOT met" in text
    )
    assert "in place's time / hierarchical's: geometric mean 1.57, least 1.44 (4 MiB); target 1.25: met" in text
    assert "hierarchical's share of what the link allows: least 80.0% (4 MiB); target 90 %: NOT met" in text
    del seconds["minidist hierarchical"]
    assert "there is no algorithm hierarchical" in "\n".join(report_of.judgement(report(seconds, hosts=2)))


def test_the_table_has_a_row_for_each_contender_and_size():
    lines = report_of.table(one_host(0.5))
    assert lines[0] == "4 ranks on one host, MPICH 5.0.2; 3 repeats, median (range)"
    rows = [line for line in lines if line.startswith(("   1 KiB", "   1 MiB"))]
    assert len(rows) == 10 + 8
    (ring,) = [line for line in rows if "1 MiB  minidist ring" in line]
    # 0.5 ms: 2.097 GB/s, on the bus 1.5 times that; 1 MiB is copied in 0.1 ms
    figures = "500.0 (450.0 – 1,000.0) 2.097 3.146 30% 2.00 (2.00 – 2.00) 1.00 (1.00 – 1.00) 20.00 (20.00 – 20.00)"
    assert " ".join(ring.split()[4:]) == figures


# -- the model ------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_figures_that_times_were_made_of():
    P, constants = 4, (3e-6, 0.5e-9, 0.2e-9)
    seconds = {}
    for name in ("ring", "recursive_doubling"):
        cost = report_of.cost_of(f"minidist {name}")
        seconds[f"minidist {name}"] = {n: [cost(P, n, *constants)] for n in (KIB, 64 * KIB, 4 * MIB)}
    assert report_of.fit(report(seconds)) == pytest.approx(constants)
    assert report_of.fit(report({report_of.MPI: {KIB: [1e-6]}})) is None


def test_no_fitted_figure_is_negative():
    assert min(report_of.fit(one_host(1))) >= 0


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report_of.plot([one_host(0.5), one_host(2)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


# -- a small run ----------------------------------------------------------------------------------------------------


def run(arguments: list[str], tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in an environment without PyTorch."""
    (tmp_path / "torch.py").write_text("raise ImportError('there is no PyTorch here')\n")
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        timeout=100,
    )


@needs_mpi
def test_a_small_run_measures_every_algorithm_and_leaves_gloo_out(tmp_path):
    from minidist.collectives import ALGORITHMS

    script = str(ROOT / "benchmarks" / "all_reduce.py")
    options = ["--ranks", "3", "--sizes", "1KiB", "256KiB", "--repeats", "1", "--batch", "0.001", "--deadline", "60"]
    done = run([script, *options], tmp_path)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert "Gloo is left out: there is no PyTorch here" in done.stdout
    names = {f"minidist {name}" for name in ALGORITHMS["all_reduce"] if name != "mpi"} | {"minidist auto"}
    for name in [*names, "MPI_Allreduce", "MPI_Allreduce in place", "copy"]:
        for size in ("1 KiB", "256 KiB"):
            assert f" {size}  {name}  " in done.stdout
    assert "from 256 KiB up, MPI_Allreduce's time / our best's: geometric mean" in done.stdout


SMALL_RUNS = {  # of each script its options, and words of what it says
    "zero_memory.py": ("--hidden 64 --layers 3 --ranks 2 --steps 1", ["nowhere"]),
    "scaling.py": (
        "--simulated 1 4 16 --with-model 4 --ranks 1 2 --repeats 1 --steps 3",
        ["data_parallel", "hierarchical"],
    ),
    "reproducible.py": (
        "--ranks 1 2 3 --repeats 1 --steps 2 --check-steps 3 --hidden 32 --microbatches 4",
        ["reproducible", "plain"],
    ),
}


@needs_mpi
@pytest.mark.parametrize("script", SMALL_RUNS)
def test_a_small_run_of_each_finds_its_own_checks_fulfilled(tmp_path, script):
    options, words = SMALL_RUNS[script]
    done = run([str(ROOT / "benchmarks" / script), *options.split()], tmp_path)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    for word in words:
        assert word in done.stdout, done.stdout


@needs_mpi
@pytest.mark.parametrize(
    "script, options, words",
    [
        ("buckets.py", "--layers 2 --batch 4 --steps 1 --repeats 1", ["one bucket", "4 MiB", "hidden"]),
        ("compression.py", "--steps 1 --repeats 1 --epochs 0", ["powersgd:4", "MB a step"]),
    ],
)
def test_a_small_run_of_those_started_by_mpirun(tmp_path, script, options, words):
    code = f"import common; common.run_ranks(2, [{str(ROOT / 'benchmarks' / script)!r}, *{options!r}.split()], 60)"
    done = run(["-c", code], tmp_path, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    for word in words:
        assert word in done.stdout, done.stdout


@needs_mpi
def test_ranks_that_are_too_late_end_the_run(tmp_path):
    code = "import common; common.run_ranks(2, ['-c', 'import time; time.sleep(60)'], 1.0)"
    done = run(["-c", code], tmp_path, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.returncode == 1
    assert "2 ranks were not done after 1 s" in done.stderr


@needs_mpi
def test_ranks_end_with_the_program_that_started_them(tmp_path):
    rank = f"import os, time; open({str(tmp_path)!r} + f'/rank-{{os.getpid()}}', 'x'); time.sleep(60)"
    code = f"import common; common.run_ranks(2, ['-c', {rank!r}], 60)"
    path = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", code], env=path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 40
    while len(started := list(tmp_path.glob("rank-*"))) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    assert process.wait(40) == 128 + signal.SIGTERM
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{path.name.removeprefix('rank-')}/exe") for path in started):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_reports_are_plain_json():
    assert json.loads(json.dumps(one_host(1))) == one_host(1)
