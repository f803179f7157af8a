"""`python -m minidist.examples.mnist` as its user runs it: what it prints, writes and refuses, on 1 rank and on 3."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import ROOT, needs_mpi, run_ranks

from minidist import backend, checkpoint
from minidist.comm import Communicator, simulate
from minidist.examples import mnist

MODULE = "minidist.examples.mnist"
KEYS = ["strategy", "ranks", "mesh", "epochs", "seconds", "samples_per_second", "train_loss", "test_accuracy", "device",
        "a_step", "peak_bytes"]  # fmt: skip
SAMPLES, TESTS, PIXELS, CLASSES = 50, 20, 16, 3  # 50 is no multiple of the batch size, nor are batches of 3 ranks
SMALL = ("--hidden", "16", "--epochs", "1", "--batch-size", "8", "--device", "cpu")
DEADLINE = 60.0


def run(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The example on so many ranks; plain python for 1."""
    words = ["-m", MODULE, *map(str, arguments)]
    if ranks > 1:
        return run_ranks(ranks, *words, deadline=DEADLINE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT, env=env)


def ran(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run`, of what is to succeed."""
    done = run(ranks, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


one_and_three_ranks = pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=needs_mpi)])


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three patterns under noise, as four IDX files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 160, (CLASSES, 4, 4))
    for split, n in (("train", SAMPLES), ("t10k", TESTS)):
        labels = np.arange(n) % CLASSES
        images = patterns[labels] + rng.integers(0, 90, (n, 4, 4))
        write_idx(folder / f"{split}-images-idx3-ubyte", images.astype(np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels.astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The parameters that one rank ends with, in float64."""
    path = data / "one-rank.safetensors"
    ran(1, *SMALL, "--data", data, "--dtype", "float64", "--epochs", 3, "--save", path, "--quiet")
    return path


# -- what it says -----------------------------------------------------------------------------------------------------


@one_and_three_ranks
def test_it_tells_how_it_goes_once_and_writes_json(ranks: int, data: Path, tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    options = [*SMALL, "--data", data, "--epochs", 2, "--lr", 0.02]
    done = ran(ranks, *options, "--json", result_file)
    lines = done.stdout.splitlines()
    parameters = PIXELS * 16 + 16 + 16 * CLASSES + CLASSES
    assert lines[0] == f"{parameters} float32 parameters, 50 images, batch 8"
    assert lines[1].startswith(f"{ranks} rank{'s' * (ranks > 1)} on cpu, ")
    epoch = r"epoch  {}/2   loss (\d\.\d{{4}})   test accuracy +(\d+\.\d\d)%   +[\d,]+ samples/s   +\d+\.\d s"
    first, last = (re.fullmatch(epoch.format(i), lines[1 + i]) for i in (1, 2))
    assert first, done.stdout
    assert last, done.stdout
    assert float(last[1]) < float(first[1])
    number = r"\d+\.\d+"
    sent = re.fullmatch(rf"a rank's step   sent ({number}) MB in ({number}) messages", lines[4])
    assert sent, lines[4]
    assert re.fullmatch(rf" +computing {number} ms, communicating {number} ms, of which hidden {number} ms", lines[5])
    kinds = ", ".join(f"{kind} {number} MB" for kind in ("parameters", "gradients", "optimizer", "activations"))
    assert re.fullmatch(f"peak memory     {kinds}", lines[6])
    assert lines[7:] == (["the parameters of all 3 ranks are equal, bit for bit"] if ranks > 1 else [])
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert len(re.findall(r"epoch  1/2: +0%", done.stderr)) == 1  # a progress bar, of one rank

    text = result_file.read_text()
    assert text.count("\n") == 1
    result = json.loads(text)
    assert list(result) == KEYS
    if ranks > 1:  # the ring's gradients; and who has how many samples, and which parameters have gradients
        assert sent[1] == f"{(2 * 4 * parameters * 2 / 3 + 8 * 5 * 2) / 1e6:.3f}"
        assert 4 <= float(sent[2]) <= 7
    assert result["a_step"]["sent_bytes"] == pytest.approx(float(sent[1]) * 1e6, abs=500)
    assert result["a_step"]["compute_seconds"] > 0
    assert result["peak_bytes"] == {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": result["peak_bytes"]["activations"],
    }
    assert result["strategy"] == ("single" if ranks == 1 else "data-parallel ring zero=0")
    assert (result["ranks"], result["mesh"], result["epochs"], result["device"]) == (ranks, {"dp": ranks}, 2, "cpu")
    assert f"{result['train_loss']:.4f}" == last[1]
    assert f"{result['test_accuracy']:.2%}" == last[2] + "%"
    assert result["samples_per_second"] == pytest.approx(2 * SAMPLES / result["seconds"])


@one_and_three_ranks
def test_quiet_prints_nothing_but_the_json_that_was_asked_for(ranks: int, data: Path) -> None:
    done = ran(ranks, *SMALL, "--data", data, "--quiet", "--json", "-", "--zero", 1, "--sync", "naive")
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert list(result) == KEYS
    assert result["strategy"] == ("single" if ranks == 1 else "data-parallel naive zero=1")
    silent = ran(ranks, *SMALL, "--data", data, "--quiet")
    assert (silent.stdout, silent.stderr) == ("", "")


@one_and_three_ranks
def test_help_is_printed_once(ranks: int) -> None:
    done = ran(ranks, "--help")
    assert done.stdout.count("usage:") == 1
    options = "epochs, batch-size, lr, optimizer, hidden, seed, device, data, save, load, json, comm-timeout, quiet"
    for option in options.split(", "):
        assert f"--{option}" in done.stdout
    assert done.stderr == ""


# -- what it learns ---------------------------------------------------------------------------------------------------


@needs_mpi
@pytest.mark.parametrize(
    "how",
    [
        "--zero 0",
        "--zero 1 --bucket-mb 0.001",
        "--zero 2 --accumulate 2 --sync naive",
        "--zero 3 --accumulate 3",
        "--bucket-mb 0.0001 --accumulate 2 --sync auto",
        "--reproducible",
        "--reproducible 5 --zero 1 --sync auto",
    ],
)
def test_three_ranks_end_with_the_weights_of_one(data: Path, trained: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "three.safetensors"
    options = [*SMALL, "--data", data, "--dtype", "float64", "--epochs", 3, "--quiet"]
    ran(3, *options, *how.split(), "--save", path)
    ours, expected = checkpoint.load(path), checkpoint.load(trained)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(ours[name], array, rtol=1e-10, atol=1e-12, err_msg=name)


@needs_mpi
def test_reproducible_ranks_end_with_the_very_bits_of_one(data: Path, tmp_path: Path) -> None:
    saved = []
    for ranks, sync in ((1, "ring"), (2, "ring"), (3, "auto"), (4, "rabenseifner"), (8, "tree")):
        path = tmp_path / f"{ranks}.safetensors"
        ran(ranks, *SMALL, "--data", data, "--quiet", "--reproducible", "--sync", sync, "--save", path)
        saved.append(path.read_bytes())
    assert len(set(saved)) == 1


@needs_mpi
def test_much_at_once(data: Path) -> None:
    how = "--partition hierarchical --zero 2 --accumulate 4 --compress powersgd:4 --clip 1.0"
    done = ran(3, *SMALL, "--data", data, "--epochs", 10, "--lr", 0.02, *how.split(), "--json", "-")
    assert json.loads(done.stdout.splitlines()[-1])["test_accuracy"] > 0.9
    assert "gradients by powersgd:4, ZeRO 2, hierarchical partition" in done.stdout


@needs_mpi
@pytest.mark.parametrize("how", ["--local-sgd 3", "--diloco 3 --clip 2 --accumulate 2"])
def test_ranks_that_train_alone_and_average_learn_it_too(data: Path, how: str) -> None:
    options = [*SMALL, "--data", data, "--epochs", 12, "--lr", 0.02, "--batch-size", 9, "--json", "-"]
    done = ran(3, *options, *how.split())
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["test_accuracy"] > 0.9
    steps, parameters = 12 * 6, PIXELS * 16 + 16 + 16 * CLASSES + CLASSES
    averages = 12 * 2  # every 3 steps, of 6 an epoch
    assert result["a_step"]["sent_bytes"] == pytest.approx(averages * 2 * 4 * parameters * 2 / 3 / steps, rel=0.01)
    assert "the parameters of all 3 ranks are equal" in done.stdout


@needs_mpi
def test_three_ranks_clip_as_one(data: Path, tmp_path: Path) -> None:
    options = [
        *SMALL,
        "--data",
        data,
        "--dtype",
        "float64",
        "--optimizer",
        "sgd",
        "--lr",
        0.5,
        "--clip",
        0.3,
        "--quiet",
    ]
    results = []
    for ranks, zero in ((1, 0), (3, 0), (3, 1), (3, 2), (3, 3)):
        path = tmp_path / f"{ranks}-{zero}.safetensors"
        ran(ranks, *options, "--zero", zero, "--save", path)
        results.append(checkpoint.load(path))
    ran(1, *options[:-3], "--quiet", "--save", tmp_path / "unclipped.safetensors")
    unclipped = checkpoint.load(tmp_path / "unclipped.safetensors")
    for name, array in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[name], array, rtol=1e-10, atol=1e-12, err_msg=name)
        assert not np.allclose(unclipped[name], array, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_saved_parameters_are_loaded_to_the_last_bit(data: Path, trained: Path, tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "again.safetensors"
    # A learning rate that moves nothing leaves what was loaded.
    options = [*SMALL, "--data", data, "--dtype", "float64", "--quiet", "--lr", 1e-300, "--optimizer", optimizer]
    ran(1, *options, "--load", trained, "--save", path)
    ours, expected = checkpoint.load(path), checkpoint.load(trained)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name, strict=True)


def test_pytorch_takes_the_saved_parameters_and_is_as_right(data: Path, trained: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'minidist[peers]'")
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(PIXELS, 16), torch.nn.ReLU(), torch.nn.Linear(16, CLASSES)).double()
    model.load_state_dict(load_file(trained))
    images = np.fromfile(data / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(TESTS, PIXELS) / 255
    labels = np.fromfile(data / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    right = (model(torch.tensor(images)).argmax(1).numpy() == labels).mean()
    options = [*SMALL, "--data", data, "--dtype", "float64", "--quiet", "--lr", 1e-300, "--load", trained]
    result = json.loads(ran(1, *options, "--json", "-").stdout)
    assert result["test_accuracy"] == pytest.approx(right)


def test_a_seed_repeats_a_run_and_another_gives_another(data: Path, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        done = ran(1, *SMALL, "--data", data, "--quiet", "--json", "-", "--seed", seed)
        losses.append(json.loads(done.stdout)["train_loss"])
    assert losses[0] == losses[1] != losses[2]


# -- what it waits for ------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
import minidist as md
from minidist.examples import mnist
before = mnist.fit
def fit(*args):
    if md.comm.world().rank == 1:
        time.sleep(100)
    return before(*args)
mnist.fit = fit
mnist.main(sys.argv[1:])
"""


@needs_mpi
def test_a_rank_that_does_not_come_ends_all_after_the_timeout(data: Path) -> None:
    options = [*SMALL, "--data", str(data), "--comm-timeout", "0.5"]
    done = run_ranks(3, "-c", SLOW, *options, deadline=DEADLINE)
    assert done.returncode != 0
    assert done.stderr.count("has waited 0.5 s, its deadline. What every rank is doing:") == 1, done.stderr
    assert "      at <string>:8 in fit\n" in done.stderr
    assert "minidist/examples/mnist.py:" in done.stderr  # the line at which the others wait


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(data: Path) -> Path:
    """A folder of things that can't be used."""
    folder = data.parent / "bad"
    shutil.copytree(data, folder / "truncated")
    images = folder / "truncated" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    shutil.copytree(data, folder / "other-size")
    write_idx(folder / "other-size" / "t10k-images-idx3-ubyte", np.zeros((TESTS, 5, 4), np.uint8))
    (folder / "protected").mkdir(mode=0o555)
    (folder / "text.safetensors").write_text("no weights")
    checkpoint.save(folder / "names.safetensors", {"weight": np.zeros((16, PIXELS))})
    shapes = {"0.weight": (8, PIXELS), "0.bias": (16,), "2.weight": (CLASSES, 16), "2.bias": (CLASSES,)}
    checkpoint.save(folder / "shapes.safetensors", {name: np.zeros(shape) for name, shape in shapes.items()})
    return folder


# Of each: the arguments ({} is the folder of bad things), and the one message.
REFUSED = {
    "epochs": ("--epochs 0", r"--epochs 0: must be at least 1"),
    "batch-size": ("--batch-size 0", r"--batch-size 0: must be at least 1"),
    "hidden": ("--hidden -3", r"--hidden -3: must be at least 1"),
    "lr": ("--lr nan", r"--lr nan: must be more than 0"),
    "comm-timeout": ("--comm-timeout 0", r"--comm-timeout 0.0: must be more than 0"),
    "comm-timeout-nan": ("--comm-timeout nan", r"--comm-timeout nan: must be more than 0"),
    "seed": ("--seed -1", r"--seed -1: must not be negative"),
    "number": ("--epochs many", r"--epochs: invalid int value: 'many'"),
    "optimizer": ("--optimizer adagrad", r"--optimizer: invalid choice: 'adagrad'"),
    "zero": ("--zero 4", r"--zero: invalid choice: 4"),
    "accumulate": ("--accumulate 0", r"--accumulate 0: must be at least 1"),
    "bucket": ("--bucket-mb 0", r"--bucket-mb 0.0: must be more than 0"),
    "bucket-zero": ("--bucket-mb 1 --zero 3", r"--bucket-mb 1.0 with --zero 3, which goes layer by layer"),
    "bucket-compress": ("--bucket-mb 1 --compress sign", r"--bucket-mb 1.0 with --compress sign, which takes all"),
    "sync-zero": ("--zero 2 --sync tree", r"--sync tree with --zero 2: reduce_scatter has auto, naive, ring"),
    "sync-compress": (
        "--sync ring --compress sign",
        r"--sync ring with --compress sign: a compression has its own way",
    ),
    "alone": ("--local-sgd 2 --diloco 2", r"--local-sgd with --diloco: ranks that train alone are joined by"),
    "alone-zero": ("--local-sgd 2 --zero 1", r"--zero 1 with --local-sgd: there gradients stay on their rank"),
    "reproducible": ("--reproducible 0", r"--reproducible 0 microbatches for 1 ranks: some would have none"),
    "reproducible-zero": ("--reproducible --zero 2", r"--reproducible 8 with --zero 2: it keeps whole gradients"),
    "reproducible-compress": ("--reproducible --compress topk:0.1", r"--reproducible 8 with --compress topk:0.1: what"),
    "reproducible-accumulate": ("--reproducible --accumulate 2", r"--accumulate 2 with --reproducible: that cuts"),
    "reproducible-clip": ("--reproducible --clip 1 --zero 1", r"--clip with --reproducible and --zero 1: the norm is"),
    "sync": ("--sync carrier-pigeon", r"--sync: invalid choice: 'carrier-pigeon'"),
    "partition": ("--partition even", r"--partition even: choose uniform, hierarchical, stratified, skewed or"),
    "partition-alpha": ("--partition skewed:0", r"--partition skewed:0: ALPHA must be a number above 0"),
    "picture": ("--partition-picture {}/a.gif", r"--partition-picture .*a\.gif: the name must end in \.svg, \.png or"),
    "compress": ("--compress zip", r"--compress zip: choose one of fp16, bf16, topk:R, "),
    "clip": ("--clip 0", r"--clip 0.0: must be more than 0"),
    "option": ("--speed 3", r"unrecognized arguments: --speed 3"),
    "device": ("--device gpu", r"unknown device 'gpu'; choose auto, cpu, cuda or cuda:N"),
    "data": ("--data {}/nowhere", r"nowhere holds neither train-images-idx3-ubyte\.gz nor train-images-idx3-ubyte"),
    "data-truncated": ("--data {}/truncated", r"truncated/train-images-idx3-ubyte: truncated: .*800 bytes.* 799"),
    "data-sizes": ("--data {}/other-size", r"training images have 16 pixels, test images 20"),
    "load-nothing": ("--load {}/gone.safetensors", r"cannot load .*gone\.safetensors: there is no such file"),
    "load-text": ("--load {}/text.safetensors", r"cannot load .*text\.safetensors: .*not a safetensors file"),
    "load-names": ("--load {}/names.safetensors", r"cannot load .*names\.safetensors: .*missing \['0\.bias', "),
    "load-shapes": (
        "--load {}/shapes.safetensors",
        r"shapes\.safetensors: .*0\.weight has shape \(16, 16\).* \(8, 16\)",
    ),
    "save-nowhere": ("--save {}/no/model.safetensors", r"--save .*model\.safetensors: there is no folder .*/no"),
    "save-folder": ("--save {}", r"--save .*/bad: this is a folder"),
    "save-device": (f"--save {os.devnull}", r"--save .*: this is not a file"),
    "save-protected": ("--save {}/protected/model", r"--save .*protected/model: it may not be written"),
    "json-nowhere": ("--json {}/no/result.json", r"--json .*result\.json: there is no folder .*/no"),
}
IN_ALL_WAYS = ("epochs", "optimizer", "device", "data-truncated", "load-shapes", "save-nowhere")  # also as processes


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """A status of failure, and one message: a line, or argparse's usage and a line. (mpirun may have its own word.)"""
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(re.findall(message, done.stderr)) == 1, done.stderr
    assert len(re.findall("^(?:mnist: |.*: error: )", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert done.stderr.count("usage:") == done.stderr.count(": error: "), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_one_message(
    name: str, data: Path, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = REFUSED[name]
    if name == "save-protected" and os.access(bad / "protected", os.W_OK):
        pytest.skip("root may write anywhere")
    words = [*SMALL, "--data", str(data), *arguments.format(bad).split()]

    def program(comm: Communicator) -> Any:
        with pytest.raises(SystemExit) as caught:
            mnist.main(words)
        return caught.value.code

    (status,) = simulate(program, 1).results  # here, and not in a process of its own
    assert_refused(subprocess.CompletedProcess(words, status, *capsys.readouterr()), message)


@one_and_three_ranks
@pytest.mark.parametrize("name", IN_ALL_WAYS)
def test_and_by_one_message_of_processes(name: str, ranks: int, data: Path, bad: Path) -> None:
    arguments, message = REFUSED[name]
    assert_refused(run(ranks, *SMALL, "--data", data, *arguments.format(bad).split()), message)


@needs_mpi
def test_what_only_one_rank_cannot_do_ends_all_by_its_message(data: Path, bad: Path) -> None:
    """Of two hosts, say, one lacks the data."""
    words = [str(word) for word in ("-m", MODULE, *SMALL, "--data")]
    others = [":", "-n", "2", sys.executable, *words]
    done = run_ranks(1, *words, str(data), *others, str(bad / "truncated"), deadline=DEADLINE)
    assert_refused(done, r"mnist: rank 1: .*truncated/train-images-idx3-ubyte: truncated: ")


@needs_mpi
def test_a_batch_smaller_than_the_ranks_is_refused(data: Path) -> None:
    done = run(3, *SMALL, "--data", data, "--batch-size", 2)
    assert_refused(done, "--batch-size 2: less than the 3 ranks")


@pytest.mark.skipif(backend.gpu_count() > 0, reason="this machine has a GPU")
@one_and_three_ranks
def test_cuda_without_a_gpu_says_what_to_do(ranks: int, data: Path) -> None:
    done = run(ranks, *SMALL, "--data", data, "--device", "cuda")
    assert_refused(done, r"device cuda: .*(pip install|install an NVIDIA driver|--device cpu)")


@needs_mpi
@pytest.mark.parametrize("partition", ["hierarchical", "stratified", "skewed:0.2"])
def test_three_ranks_train_on_another_partition(data: Path, partition: str) -> None:
    done = ran(3, *SMALL, "--data", data, "--epochs", 8, "--lr", 0.02, "--partition", partition, "--json", "-")
    assert f"{partition} partition" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["test_accuracy"] > 0.9


def test_a_picture_of_the_partition_is_drawn(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran(1, *SMALL, "--data", data, "--partition-picture", tmp_path / "who.svg")
    assert (tmp_path / "who.svg").read_text().startswith("<?xml")
