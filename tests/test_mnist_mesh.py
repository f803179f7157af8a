"""`python -m minidist.examples.mnist` on a mesh, as its user runs it: one rank's weights, whatever the axes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launch import needs_mpi
from test_mnist_example import SMALL, data, ran, run  # noqa: F401  a fixture

from minidist import checkpoint

DEEP = [*SMALL, "--hidden", "16,7,5", "--dtype", "float64", "--epochs", 2, "--lr", 0.02]
AXES = {
    "pp": ["--pp", 4],
    "tp": ["--tp", 4, "--clip", 0.2],
    "dp pp": ["--dp", 2, "--pp", 2, "--zero", 1, "--schedule", "interleaved", "--chunks", 2, "--microbatches", 3],
    "pp tp": ["--pp", 2, "--tp", 2, "--schedule", "zero-bubble", "--cut", "1"],
    "cut by time": ["--dp", 2, "--pp", 2, "--cut", "time", "--sync", "tree"],
}


@pytest.fixture(scope="module")
def deep(data: Path) -> dict[bool, dict[str, np.ndarray]]:  # noqa: F811
    """What one rank ends with: without and with clipping."""
    states = {}
    for clip in (False, True):
        path = data / f"deep-{clip}.safetensors"
        options = [*DEEP, "--data", data, "--save", path, "--quiet", *(["--clip", 0.2] * clip)]
        ran(1, *options)
        states[clip] = checkpoint.load(path)
    return states


@needs_mpi
@pytest.mark.parametrize("axes", AXES)
def test_four_ranks_end_with_the_weights_of_one(data: Path, deep: dict, tmp_path: Path, axes: str) -> None:  # noqa: F811
    path = tmp_path / "four.safetensors"
    done = ran(4, *DEEP, "--data", data, "--save", path, "--json", "-", *AXES[axes])
    state, expected = checkpoint.load(path), deep["--clip" in AXES[axes]]
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-10, atol=1e-12, err_msg=name)
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert np.prod(list(result["mesh"].values())) == result["ranks"] == 4
    assert result["strategy"].startswith("mesh ")
    assert f"{result['test_accuracy']:.2%}" in lines[3]
    assert lines[1].startswith("4 ranks on cpu, Mesh(")


REFUSED = {
    "--pp 3": "--pp 3 makes 3 ranks, but there is 1; what would fit: --dp 1",
    "--tp 2 --dp 2": "--dp 2 × --tp 2 makes 4 ranks, but there is 1",
    "--schedule gpipe": "--schedule needs --pp or --tp",
    "--pp 0": "--pp 0: an axis has at least 1 rank",
    "--hidden 16,0": "--hidden 16,0: must be at least 1",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused(data: Path, words: str) -> None:  # noqa: F811
    done = run(1, *SMALL, "--data", data, *words.split())
    assert done.returncode == 2
    assert REFUSED[words] in done.stderr


@needs_mpi
@pytest.mark.parametrize(
    "words, message",
    {
        "--pp 2 --chunks 2": "--pp 2: num_chunks=2: 1f1b has one chunk a rank",
        "--pp 2 --zero 3": "--zero 3 with --pp or --tp: choose 0, 1 or 2",
        "--tp 2 --compress fp16": "--compress fp16 with --pp or --tp",
        "--tp 2 --accumulate 2": "ranks that have the whole model (there --microbatches cuts a share)",
    }.items(),
)
def test_and_what_does_not_go_together(data: Path, words: str, message: str) -> None:  # noqa: F811
    done = run(2, *SMALL, "--data", data, *words.split())
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("error:") == 1
