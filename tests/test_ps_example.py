"""`--sync parameter-server` of the MNIST example, as its user runs it: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from launch import needs_mpi
from test_mnist_example import KEYS, PIXELS, SAMPLES, SMALL, data, ran, trained  # noqa: F401  fixtures too

from minidist import checkpoint
from minidist.comm import Communicator, simulate
from minidist.examples.options import parse
from minidist.examples.straggler import straggler_of

SERVERS = ("--sync", "parameter-server")


@needs_mpi
def test_it_tells_how_it_goes_and_writes_json(data: Path, tmp_path: Path) -> None:  # noqa: F811
    result_file = tmp_path / "result.json"
    options = [*SMALL, *SERVERS, "--data", data, "--epochs", 2, "--lr", 0.02, "--json", result_file]
    done = ran(4, *options, "--consistency", "ssp:3", "--straggler", "2:1.5")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("float32 parameters, 50 images, batch 8")
    assert lines[1] == "4 ranks on cpu: 1 server, 3 workers, ssp:3, adam lr 0.02"
    epoch = r"epoch  {}/2   loss (\d\.\d{{4}})   test accuracy +(\d+\.\d\d)%   +[\d,]+ samples/s   +\d+\.\d s"
    first, last = (re.fullmatch(epoch.format(i), lines[1 + i]) for i in (1, 2))
    assert first and last, done.stdout
    assert float(last[1]) < float(first[1])
    assert re.match(r"staleness       \d\.\d\d updates in the mean \(0: ", lines[4])
    assert re.fullmatch(r"waiting         rank 1 \d+\.\d s, rank 2 \d+\.\d s, rank 3 \d+\.\d s", lines[5])
    assert re.fullmatch(r"servers         rank 0 received \d+\.\d MB, sent \d+\.\d MB", lines[6])
    assert len(lines) == 7

    result = json.loads(result_file.read_text())
    assert set(KEYS) - {"a_step", "peak_bytes"} <= result.keys()
    assert result["strategy"] == "parameter-server ssp:3 servers=1"
    assert (result["ranks"], result["mesh"], result["epochs"]) == (4, {"dp": 3}, 2)
    # Every sample once an epoch, whoever had it; and each of 7 batches an epoch is a clock of every worker's.
    assert sum(result["samples"].values()) == 2 * SAMPLES
    assert result["clocks"] == {"1": 14, "2": 14, "3": 14}
    assert sum(result["staleness"].values()) == 2 * (3 * 14 - 2)  # two layers; an epoch's last batch has 2 samples
    assert set(map(int, result["lag"])) <= {0, 1, 2, 3}
    assert result["deaths"] == [] and result["dropped"] == 0
    assert result["received"]["0"] > 3 * 14 * 4 * PIXELS * 16


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        (2, "--accumulate 2"),
        (4, "--servers 2 --straggler 3:2"),
        (4, "--servers 2 --copies 1 --sharding hash"),
    ],
)
def test_bulk_synchronous_workers_end_with_the_weights_of_one_rank(
    ranks: int,
    how: str,
    data: Path,  # noqa: F811
    trained: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    saved = tmp_path / "saved.safetensors"
    options = ["--data", data, "--dtype", "float64", "--epochs", 3, "--save", saved, "--quiet"]
    done = ran(ranks, *SMALL, *SERVERS, *options, *how.split())
    assert done.stdout == done.stderr == ""
    one, ours = checkpoint.load(trained), checkpoint.load(saved)
    for name, expected in one.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-10, err_msg=name)


@needs_mpi
@pytest.mark.parametrize("how", ["async", "async-scaled", "async-dc:0.1", "backup:1"])
def test_the_others_learn_it_too(how: str, data: Path) -> None:  # noqa: F811
    options = ["--data", data, "--epochs", 8, "--lr", 0.02, "--quiet", "--json", "-"]
    result = json.loads(ran(3, *SMALL, *SERVERS, *options, "--consistency", how).stdout)
    assert result["test_accuracy"] > 0.8
    steps = 8 * 7 if how == "backup:1" else 8 * len(range(0, SAMPLES, 4))
    assert sum(result["staleness"].values()) == 2 * steps


REFUSED = {
    "--servers 4": "--servers 4 of 4 ranks: that leaves no worker",
    "--servers 0": "--servers 0: a parameter server needs at least 1",
    "--servers 3 --copies 1": "--servers 3 and a scheduler of 4 ranks: that leaves no worker",
    "--copies 1": "--copies 1 of each shard on other servers: there are 1 servers",
    "--consistency sometimes": "--consistency 'sometimes': choose bsp, backup:B, ssp:S, async",
    "--consistency ssp:-1": "--consistency 'ssp:-1': choose",
    "--consistency backup:0": "--consistency 'backup:0': choose",
    "--consistency backup:3": "--backup:3 with 3 workers: none would be left to wait for",
    "--deadline -1": "--deadline -1.0: must be more than 0",
    "--even-shares": "--even-shares with --consistency bsp: that is ssp's",
    "--straggler 0:2": "--straggler 0:2: the workers are ranks 1 to 3",
    "--straggler 4:2": "--straggler 4:2: the ranks are 0 to 3",
    "--straggler 2": "--straggler '2': expected RANK:FACTOR",
    "--straggler 2:0.5": "--straggler '2:0.5': expected RANK:FACTOR",
    "--zero 1": "--zero 1 with --sync parameter-server",
    "--clip 1": "--clip 1.0 with --sync parameter-server",
    "--compress sign": "--compress sign with --sync parameter-server",
    "--diloco 5": "--diloco 5 with --sync parameter-server",
    "--partition stratified": "--partition stratified with --sync parameter-server",
}


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    def program(comm: Communicator) -> None:
        with pytest.raises(SystemExit):
            parse(list(words), comm)

    simulate(program, 4)
    return capsys.readouterr().err


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_work_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED[given] in refusal(capsys, *SERVERS, *given.split())


@pytest.mark.parametrize("given", ["--servers 1", "--consistency async", "--copies 1", "--even-shares", "--deadline 3"])
def test_its_options_need_it(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{given.split()[0]} needs --sync parameter-server" in refusal(capsys, "--sync", "ring", *given.split())


def test_a_straggler_is_a_rank_and_a_factor() -> None:
    assert straggler_of("2:3.0") == (2, 3.0)
    for wrong in ("", "2", "a:b", "-1:2", "2:0.9", "2:nan", "2:inf"):
        with pytest.raises(ValueError, match="expected RANK:FACTOR"):
            straggler_of(wrong)
