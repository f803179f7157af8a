"""Checkpoints: what is saved comes back, PyTorch reads it, and a bad file is named."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidist import checkpoint

STATE = {
    "0.weight": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
    "0.bias": np.arange(3, dtype=np.float64),
    "half": np.array([1.5, -2.25], np.float16),
    "step": np.array(7),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 5), np.float32),
}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, strict=True)


def test_what_is_saved_comes_back_and_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, STATE)
    state = checkpoint.load(str(path))
    assert_same(state, STATE)
    state["0.weight"] += 1
    assert_same(checkpoint.load(path), STATE)


def test_arrays_that_are_not_contiguous_come_back_whole(tmp_path: Path) -> None:
    grid = np.arange(24.0).reshape(4, 6)
    state = {"transposed": grid.T, "strided": grid[::2, 1::3], "reversed": grid[::-1], "big": grid.astype(">f8")}
    checkpoint.save(tmp_path / "views", state)
    assert_same(checkpoint.load(tmp_path / "views"), {**state, "big": grid})


def test_saving_replaces_the_file_whole_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, STATE)
    checkpoint.save(path, {"other": np.ones(2)})
    assert_same(checkpoint.load(path), {"other": np.ones(2)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_save_that_fails_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, STATE)
    with pytest.raises(ValueError, match=r"cannot save .*model\.safetensors: .*str"):
        checkpoint.save(path, {"words": np.array(["not", "numbers"])})
    assert_same(checkpoint.load(path), STATE)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_a_checkpoint_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", STATE)
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "plain")]
    assert modes[0] == modes[1]


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot load .*gone\.safetensors: there is no such file"):
        checkpoint.load(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"cannot save .*: there is no folder .*nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "model.safetensors", STATE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """As root, saving to /dev/null would otherwise put a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=r"cannot save .*: it exists and is not a file"):
            checkpoint.save(path, STATE)
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "trailing"])
def test_a_bad_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    bad = {"empty": b"", "text": b"these are no weights", "truncated": whole[:-1], "trailing": whole + b"x"}
    path.write_bytes(bad[damage])
    with pytest.raises(ValueError, match=r"cannot load .*model\.safetensors: truncated, or not a safetensors file"):
        checkpoint.load(path)


def test_pytorch_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    ours = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}

    checkpoint.save(tmp_path / "ours", ours)
    theirs.load_state_dict(load_file(tmp_path / "ours"))
    save_file(theirs.state_dict(), tmp_path / "theirs")
    assert_same(checkpoint.load(tmp_path / "theirs"), ours)


def test_bfloat16_is_refused_whether_or_not_ml_dtypes_has_been_imported(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "brain")
    load = "import sys; from minidist import checkpoint; checkpoint.load(sys.argv[1])"
    for before in ("", "import ml_dtypes; "):
        command = [sys.executable, "-c", before + load, str(tmp_path / "brain")]
        ran = subprocess.run(command, text=True, capture_output=True, timeout=60)
        assert re.search(r"ValueError: cannot load .*brain: .*bfloat16", ran.stderr), ran
