"""`--branches` of the MNIST example: the same network, in towers on several ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from launch import needs_mpi
from test_mnist_example import KEYS, PIXELS, SAMPLES, SMALL, data, ran, trained  # noqa: F401  fixtures too

from minidist import checkpoint
from minidist.comm import simulate
from minidist.examples import mnist


def assert_same_file(ours: Path, expected: Path) -> None:
    one, other = checkpoint.load(ours), checkpoint.load(expected)
    assert list(one) == list(other)
    for name, array in other.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(one[name], array, rtol=1e-10, atol=1e-12, err_msg=name)


@needs_mpi
def test_two_ranks_with_three_towers_end_with_the_whole_network(
    data: Path,  # noqa: F811
    trained: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    save, result_file = tmp_path / "towers.safetensors", tmp_path / "result.json"
    how = ["--dtype", "float64", "--epochs", 3, "--branches", 3, "--save", save, "--json", result_file]
    lines = ran(2, *SMALL, "--data", data, *how).stdout.splitlines()
    assert_same_file(save, trained)
    assert lines[0] == f"{PIXELS * 16 + 16 + 16 * 3 + 3} float64 parameters, {SAMPLES} images, batch 8"
    assert lines[1] == "2 ranks on cpu, 3 branches (rank 0: 0; rank 1: 1, 2), adam lr 0.001"
    epoch = r"epoch  {}/3   loss \d\.\d{{4}}   test accuracy +\d+\.\d\d%   +[\d,]+ samples/s   +\d+\.\d s"
    assert all(re.fullmatch(epoch.format(i), lines[1 + i]) for i in (1, 2, 3)), lines
    assert re.fullmatch(r"a rank's step   sent 0\.\d+ MB in \d\.\d messages", lines[5])
    assert len(lines) == 6
    result = json.loads(result_file.read_text())
    assert list(result) == KEYS[:-1]
    assert (result["strategy"], result["ranks"], result["mesh"]) == ("branches=3", 2, {"branches": 2})


def test_a_rank_without_a_tower_clips_and_loads_with_the_others(
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    def run(ranks: int, name: str, *how: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        small = [*SMALL, "--data", str(data), "--dtype", "float64", "--quiet", "--optimizer", "sgd", "--lr", "0.5"]
        words = [*small, *how, "--save", str(path)]
        simulate(lambda comm: mnist.main(words), ranks)
        return path

    first = run(1, "first", "--seed", "1")
    clip = ("--load", str(first), "--clip", "0.3")
    expected = run(1, "clipped", *clip)
    assert_same_file(run(4, "towers", *clip, "--branches", "3", "--accumulate", "3"), expected)
    before, after = checkpoint.load(first), checkpoint.load(expected)
    assert not np.allclose(before["0.weight"], after["0.weight"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--branches 0", "--branches 0: must be at least 1"),
        ("--branches 17", "--branches 17: the hidden layer has only --hidden 16 neurons to share out"),
        ("--branches 2 --zero 1", "--zero 1 with --branches: that is for ranks with a whole network each"),
        ("--branches 2 --sync ring", "--sync ring with --branches: that is for ranks with"),
        ("--branches 2 --sync parameter-server", "--sync parameter-server with --branches: that is"),
        ("--branches 2 --partition stratified", "--partition stratified with --branches: every rank sees all"),
    ],
)
def test_what_does_not_go_together(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mnist.main([*SMALL, *arguments.split()])
    assert message in capsys.readouterr().err
