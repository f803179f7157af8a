"""`python -m minidist.examples.gpt` as its user runs it, on one rank: what it prints, writes and refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT

from minidist import checkpoint
from minidist.comm import simulate
from minidist.examples.gpt.__main__ import main

SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "4", "--device", "cpu",
         "--length", "20"]  # fmt: skip
KEYS = ["strategy", "ranks", "mesh", "epochs", "steps", "seconds", "samples_per_second", "tokens_per_second",
        "train_loss", "validation_loss", "bits_per_byte", "test_accuracy", "device",
        "a_step", "peak_bytes"]  # fmt: skip
TEXT = "the cat sat on the mat, and the dog sat on the log; the café is shut.\n" * 30


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the example prints."""
    main([*SMALL, *map(str, arguments)])
    return capsys.readouterr().out


def test_it_tells_how_it_goes_and_writes_text_and_json(text: Path, tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    words = [*SMALL, "--text", text, "--steps", 60, "--lr", 0.02, "--generate", "the c", "--json", result_file]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "minidist.examples.gpt", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    parameters = 256 * 16 + 16 * 16 + 2 * 2 * 16 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16 + 2 * 16
    assert lines[0] == f"{parameters:,} float32 parameters, {len(TEXT):,} characters, 256 tokens, batch 4 windows of 16"
    assert lines[1] == "1 rank on cpu, one rank, AdamW lr 0.02"
    an_epoch = (len(TEXT[: round(0.9 * len(TEXT))].encode()) // 16 - 1) // 4
    told = []
    for line, step in zip(lines[2:], (an_epoch, 2 * an_epoch, 60)):
        found = re.fullmatch(
            rf"step {step}/60   loss (\d\.\d{{4}})   held out (\d\.\d{{4}}), (\d\.\d{{3}}) bits a byte "
            r"  +[\d,]+ tokens/s   +\d+\.\d s",
            line,
        )
        assert found, line
        told.append(found)
    assert float(told[2][2]) < float(told[0][2])
    assert lines[5].startswith("a rank's step   sent 0.000 MB in 0.0 messages")
    assert lines[7].startswith("peak memory     parameters 0.0 MB")
    assert done.stdout.split("\n", 8)[8].startswith("\nthe c")
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(result_file.read_text())
    assert list(result) == KEYS
    assert (result["strategy"], result["ranks"], result["device"], result["test_accuracy"]) == (
        "single",
        1,
        "cpu",
        None,
    )
    assert result["mesh"] == {"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 1}
    assert (result["steps"], result["epochs"]) == (60, pytest.approx(60 / an_epoch))
    assert [f"{result[key]:.4f}" for key in ("train_loss", "validation_loss")] == [told[2][1], told[2][2]]
    assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] / math.log(2))
    assert result["samples_per_second"] == pytest.approx(60 * 4 / result["seconds"])
    assert result["tokens_per_second"] == pytest.approx(60 * 4 * 16 / result["seconds"])


def test_quiet_prints_nothing_but_what_was_asked_for(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--text", text, "--steps", 1, "--quiet") == ""
    sample = run(capsys, "--text", text, "--steps", 1, "--quiet", "--generate", "a b")
    assert sample.startswith("a b")
    (line,) = run(capsys, "--text", text, "--epochs", 1, "--quiet", "--json", "-").splitlines()
    assert json.loads(line)["epochs"] == 1


def test_without_a_prompt_it_continues_what_was_held_out(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = TEXT[round(0.9 * len(TEXT)) :]
    lines = run(capsys, "--text", text, "--steps", 0, "--temperature", 0).split("\n", 4)
    assert re.fullmatch(r"held out \d\.\d{4}, \d\.\d{3} bits a byte", lines[2])
    assert lines[3] == ""
    assert lines[4].startswith(held_out[:8])


@pytest.mark.parametrize("vocabulary", ["bytes", "bpe:30"])
def test_what_was_saved_goes_on_where_it_ended(
    vocabulary: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--text", text, "--positions", "rotary", "--mlp", "swiglu", "--generate", "the ", "--temperature", 0]
    path = tmp_path / "model.safetensors"
    first = run(capsys, *shape, "--vocabulary", vocabulary, "--steps", 40, "--lr", 0.02, "--save", path)
    assert (tmp_path / "model.safetensors.json").exists() == (vocabulary != "bytes")
    again = tmp_path / "again.safetensors"
    second = run(capsys, *shape, "--load", path, "--steps", 0, "--save", again)  # finds the vocabulary by itself
    loss = re.compile(r"held out \d\.\d+, \d\.\d+ bits a byte")
    assert loss.findall(first)[-1] == loss.findall(second)[-1]
    sample = [out[out.rindex("\nthe ") :] for out in (first, second)]
    assert sample[0] == sample[1]
    before, after = checkpoint.load(path), checkpoint.load(again)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


def test_a_seed_repeats_a_run_and_another_gives_another(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", text, "--steps", 5, "--quiet", "--json", "-", "--dropout", 0.1, "--seed"]
    losses = [json.loads(run(capsys, *options, seed))["train_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_half_precision_trains_as_single_does(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", text, "--steps", 20, "--lr", 0.02, "--quiet", "--json", "-", "--precision"]
    half, single = (json.loads(run(capsys, *options, precision)) for precision in ("float16", "float32"))
    assert half["validation_loss"] == pytest.approx(single["validation_loss"], abs=0.02)
    assert half["validation_loss"] != single["validation_loss"]
    assert half["peak_bytes"]["parameters"] * 2 == single["peak_bytes"]["parameters"]
    assert half["peak_bytes"]["optimizer"] == 6 * half["peak_bytes"]["parameters"]  # masters, and AdamW's two averages


@pytest.mark.parametrize(
    "mesh, ranks",
    [
        ("--tp 2 --pp 2 --schedule 1f1b --microbatches 4", 4),
        ("--pp 2 --schedule interleaved --chunks 2 --cp 2 --context-parallel ulysses --recompute whole", 4),
        ("--tp 2 --sequence-parallel --zero 2 --recompute selective --cut bytes", 4),
        ("--pp 3 --cut 1,3 --schedule zero-bubble --microbatches 2", 3),
    ],
)
def test_ranks_of_a_mesh_say_once_what_one_rank_says(mesh: str, ranks: int, text: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    options = ["--text", text, "--layers", 2, "--steps", 6, "--precision", "float64", "--lr", 0.02, "--save"]
    expected = run(capsys, *options, tmp_path / "one")
    words = [*SMALL, *map(str, options), str(tmp_path / "many"), *mesh.split(), "--json", str(tmp_path / "json")]
    simulate(lambda comm: main(words), ranks)
    got = capsys.readouterr().out
    losses = re.compile(r"loss .* bits a byte")
    assert losses.findall(got) == losses.findall(expected)
    assert got.splitlines()[0] == expected.splitlines()[0]  # as many parameters
    assert got[got.index("\n\n") :] == expected[expected.index("\n\n") :]  # the same text, written once
    one, many = checkpoint.load(tmp_path / "one"), checkpoint.load(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, array in one.items():
        np.testing.assert_allclose(many[name], array, rtol=1e-10, atol=1e-12, err_msg=name)
    result = json.loads((tmp_path / "json").read_text())
    assert (result["ranks"], math.prod(result["mesh"].values())) == (ranks, ranks)


# -- what it refuses ------------------------------------------------------------------------------------------------

REFUSED = {
    "steps": ("--steps -1", "--steps -1: must not be negative"),
    "steps-epochs": ("--steps 3 --epochs 1", "--steps 3 with --epochs 1: give the one or the other"),
    "epochs": ("--epochs 0", "--epochs 0: must be at least 1"),
    "lr": ("--lr 0", r"--lr 0\.0: must be more than 0"),
    "width": ("--width 15", "width 15 does not divide into 2 heads"),
    "dropout": ("--dropout 1", r"dropout 1\.0: must be a probability below 1"),
    "positions": ("--positions sine", "--positions: invalid choice: 'sine'"),
    "vocabulary": ("--vocabulary bpe:many", "--vocabulary bpe:many: N of bpe:N is a number of merges"),
    "vocabulary-file": ("--vocabulary {}/no.json", r"no\.json: there is no such file"),
    "vocabulary-text": ("--vocabulary {}/text.txt", r"text\.txt: not a vocabulary of byte pairs"),
    "text": ("--text {}/no.txt", r"no\.txt: there is no such file"),
    "short": ("--text {}/short.txt", "windows of 16 tokens do not fill a batch of 4|fewer than a window of 16"),
    "batch": ("--batch-size 3 --microbatches 4", "--batch-size 3: less than 1 shares of 4 microbatches"),
    "mesh": ("--tp 2", r"--tp 2 makes 2 ranks, but there is 1"),
    "axis": ("--pp 0", "--pp 0: an axis has at least 1 rank"),
    "schedule": ("--schedule carrier", "--schedule: invalid choice: 'carrier'"),
    "no-pipeline": ("--schedule gpipe", "--schedule gpipe with --pp 1: there is no pipeline"),
    "cut": ("--cut half", "--cut half: choose bytes, time, or numbers of layers"),
    "experts": ("--experts -1", "--experts -1: must not be negative"),
    "prompt": ("--generate=", "--generate: a prompt has one character at least"),
    "device": ("--device gpu", "unknown device 'gpu'"),
    "load": ("--load {}/no.safetensors", r"cannot load .*no\.safetensors: there is no such file"),
    "load-shape": ("--load {}/other.safetensors", r"cannot load .*other\.safetensors: .*missing \['block0"),
    "save": ("--save {}/no/model", "--save .*model: there is no folder .*/no"),
    "json": ("--json {}", "--json .*: this is a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_one_message(
    name: str, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text.parent
    (folder / "short.txt").write_text("too short for anything, this is")
    checkpoint.save(folder / "other.safetensors", {"embed.tokens.weight": np.zeros((256, 16), np.float32)})
    arguments, message = REFUSED[name]
    with pytest.raises(SystemExit) as exit:
        main([*SMALL, "--text", str(text), *arguments.format(folder).split()])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert len(re.findall(message, err)) == 1, err
    assert len(re.findall("^(?:gpt: |.*: error: )", err, re.MULTILINE)) == 1, err
    assert "Traceback" not in err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    options = "dp pp tp cp ep schedule microbatches zero sync clip recompute precision layers heads width context "
    options += "batch-size steps epochs lr warmup text vocabulary dropout positions mlp experts save load generate json"
    for option in options.split():
        assert f"--{option}" in out
