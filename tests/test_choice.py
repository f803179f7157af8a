"""algorithm="auto": by measurement where there is one, else by the model; and the same on every rank."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import needs_mpi, run_ranks

from minidist.collectives import ALGORITHMS, all_reduce, broadcast
from minidist.collectives.choice import CLASSES, by_measurement, by_model
from minidist.collectives.tuning import Tuning, merged
from minidist.comm import Link, Network, simulate

NETWORK = Network(alpha=1e-5, beta=1e-9, gamma=1e-10)


def seconds(operation, size: int, nbytes: int, network: Network, algorithm: str) -> float:
    def program(comm):
        args = (0,) if operation is broadcast else ("sum",)
        operation(comm, np.zeros(nbytes // 4, np.float32), *args, algorithm)

    return simulate(program, size, network=network).seconds


@pytest.mark.parametrize("operation", [all_reduce, broadcast])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("nbytes", [96, 3 << 12, 3 << 18])
def test_in_a_simulation_auto_takes_the_time_of_the_fastest(operation, size, nbytes):
    names = [name for name, row in ALGORITHMS[operation.__name__].items() if row.cost and not row.shared]
    fastest = min(seconds(operation, size, nbytes, NETWORK, name) for name in names)
    assert seconds(operation, size, nbytes, NETWORK, "auto") == pytest.approx(fastest, rel=1e-9)


def test_short_arrays_take_few_messages_long_ones_few_bytes_and_several_hosts_the_hierarchy():
    choices = by_model(NETWORK, 8, 1)["all_reduce"]
    assert choices[3] == "recursive_doubling"  # 3 messages
    assert choices[30] in ("rabenseifner", "ring")  # 2 n (P-1)/P bytes
    two = Network(alpha=1e-6, beta=1e-10, ranks_per_host=4, between=Link(5e-5, 8e-9))
    assert by_model(two, 8, 2)["all_reduce"][26] == "hierarchical"
    assert "hierarchical" not in by_model(NETWORK, 8, 1)["all_reduce"]


@given(ranks=st.integers(1, 100), hosts=st.integers(1, 3))
def test_every_class_of_sizes_has_an_algorithm_that_may_be_chosen(ranks, hosts):
    for operation, names in by_model(NETWORK, ranks * hosts, hosts).items():
        assert len(names) == CLASSES
        assert all(ALGORITHMS[operation][name].cost is not None for name in names)
        assert "mpi" not in names


MEASURED = {"naive": {"64": 1e-6, "1048576": 9e-3}, "ring": {"64": 2e-6, "1048576": 1e-3}}


def tuning() -> Tuning:
    return Tuning(NETWORK, {"5 ranks on 1 hosts": {"all_reduce": MEASURED}})


def test_what_was_measured_decides_and_the_model_the_rest():
    text = tuning().write()
    measured = by_measurement(text, 5, 1)
    assert [measured["all_reduce"][n.bit_length()] for n in (8, 64, 4096, 1 << 15, 1 << 20, 1 << 30)] == [
        *["naive"] * 3, *["ring"] * 3
    ]  # fmt: skip
    modelled = by_model(NETWORK, 5, 1)
    assert measured["broadcast"] == modelled["broadcast"]
    assert by_measurement(text, 6, 1) == by_model(NETWORK, 6, 1)  # with the measured figures, if not of these ranks


def test_beyond_what_was_measured_the_model_decides():
    small = Tuning(NETWORK, {"5 ranks on 1 hosts": {"all_reduce": {"tree": {"1024": 1e-6, "64": 1e-6}}}})
    measured, modelled = by_measurement(small.write(), 5, 1)["all_reduce"], by_model(NETWORK, 5, 1)["all_reduce"]
    assert set(measured[:13]) == {"tree"}
    assert measured[13:] == modelled[13:]


def test_measuring_again_keeps_the_other_sizes():
    old = {"ring": {"64": 1.0, "256": 2.0}, "tree": {"64": 3.0, "256": 4.0, "1024": 5.0}}
    assert merged(old, {"ring": {"64": 6.0, "256": 7.0}, "tree": {"64": 8.0}}) == {
        "ring": {"64": 6.0, "256": 7.0},
        "tree": {"64": 8.0, "1024": 5.0},  # of 256 bytes it has become hopeless
    }


def test_measurements_are_kept_as_they_were_written():
    two_hosts = Network(1e-6, 2e-10, 3e-11, ranks_per_host=1, between=Link(4e-5, 5e-9))
    for network in (NETWORK, two_hosts):
        tuning = Tuning(network, {"5 ranks on 1 hosts": {"all_reduce": MEASURED}})
        assert Tuning.read(tuning.write()) == tuning


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"within": [1], "between": null, "seconds": {}}',
        '{"within": [-1, 0, 0]}',
        "null",
    ],
)
def test_a_file_that_is_not_ours_is_as_none(text):
    assert Tuning.read(text) is None
    assert by_measurement(text, 4, 1)["all_reduce"]


def test_an_algorithm_of_another_version_is_not_chosen():
    text = json.dumps(
        {
            "within": [1e-6, 1e-10, 1e-11],
            "between": None,
            "seconds": {"2 ranks on 1 hosts": {"all_reduce": {"star": {"64": 0.0}, "ring": {"64": 1.0}}, "no": {}}},
        }
    )
    assert set(by_measurement(text, 2, 1)["all_reduce"][:9]) == {"ring"}


PROGRAM = """
import numpy as np, minidist as md
comm = md.comm.world()
md.collectives.all_reduce(comm, np.ones(100, np.float32))
group = comm.split(comm.rank % 2)
md.collectives.all_reduce(group, np.ones(100, np.float32))
print([op.kind for op in comm.record.operations()])
"""


@needs_mpi
def test_all_ranks_go_by_what_rank_0_has_read(monkeypatch, tmp_path):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("MINIDIST_TUNING", str(file))
    for name in ("naive", "ring"):
        measured = {
            place: {"all_reduce": {name: {"1024": 1e-6}}} for place in ("4 ranks on 1 hosts", "2 ranks on 1 hosts")
        }
        file.write_text(Tuning(NETWORK, measured).write())
        done = run_ranks(4, "-c", PROGRAM, deadline=30)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"['all_reduce {name}', 'all_reduce {name}']") == 4


QUICK_TUNE = """
import runpy
from minidist.collectives import tuning
tuning.BUDGET = 0.002  # to be over sooner
runpy.run_module("minidist.comm", run_name="__main__")
"""


@needs_mpi
def test_tune_measures_and_keeps(monkeypatch, tmp_path):
    file = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("MINIDIST_TUNING", str(file))
    for ranks in (2, 3):
        done = run_ranks(ranks, "-c", QUICK_TUNE, "tune", "--largest", "256", deadline=100)
        assert done.returncode == 0, done.stderr
        assert f"kept in {file}" in done.stdout
    tuning = Tuning.read(file.read_text())
    assert tuning is not None
    assert set(tuning.seconds) == {"2 ranks on 1 hosts", "3 ranks on 1 hosts"}
    measured = tuning.seconds["3 ranks on 1 hosts"]
    for operation, rows in ALGORITHMS.items():
        able = {name for name, row in rows.items() if row.cost is not None}
        assert len(able) == 1 or set(measured[operation]) == able
    assert 0 < tuning.network.alpha < 0.1
    assert 0 < tuning.network.gamma < 1e-6
    assert by_measurement(file.read_text(), 3, 1)["all_reduce"][6] in ALGORITHMS["all_reduce"]


@needs_mpi
def test_tuning_needs_several_ranks():
    done = run_ranks(1, "-m", "minidist.comm", "tune", deadline=30)
    assert done.returncode == 2
    assert "mpirun -n 4" in done.stderr


@needs_mpi
def test_tuning_of_no_size_is_refused():
    done = run_ranks(2, "-m", "minidist.comm", "tune", "--largest", "10", deadline=30)
    assert done.returncode == 2
    assert "--largest 10: the smallest size measured is 64 bytes" in done.stderr


@needs_mpi
def test_a_file_that_is_not_ours_is_told(monkeypatch, tmp_path):
    file = tmp_path / "tuning.json"
    file.write_text("{bad")
    monkeypatch.setenv("MINIDIST_TUNING", str(file))
    done = run_ranks(4, "-c", PROGRAM, deadline=30)
    assert done.returncode == 0
    assert f"{file} does not hold what `tune` writes" in done.stderr
