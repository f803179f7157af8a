"""How fast is training a small GPT, beside PyTorch, and along each axis of a mesh?

    python benchmarks/train_gpt.py [--parts one dp pp tp shallow] [--repeats 5] [--seconds 4] [--save]

4 layers, 4 heads, width 128, context 64, batch 12, bytes, float32, AdamW, learned positions, GELU by tanh, tied
head, no dropout; one BLAS thread a rank on both sides. The parts, and what to expect of them:

    one       one rank, beside PyTorch eager. Products are 6 · 853,000 parameters · 768 tokens = 4 Gflop a step, 28 ms
              at OpenBLAS's 140 GFLOP/s (PyTorch's MKL: 165); the rest is memory traffic of elementwise operations, and
              3 ms of Python. GELU by tanh, as GPT-2 has it; and (erf) the exact one, which NumPy has no function for
    dp        two ranks of 12 sequences each, beside DistributedDataParallel over Gloo. 3.4 MB of gradients a step
    pp        two stages of a batch of 96 in 8 microbatches, by each schedule: the share of time that ranks wait for
              one another, beside what the schedule's formula says for equal stages, (p-1)/(m+p-1) = 11 % for GPipe
              and 1F1B, (p-1)/(3m+p-1) = 4 % for zero-bubble where both halves of a backward take as long as a forward
    tp        width 512: one rank, and two that split every layer. The products are halved, what is between the layers
              is not; 4 all-reduces of 1.6 MB a layer and step
    shallow   ShallowSpeed's network, 784-128-127-126-125-124-123-10, batch 128 in 4 microbatches, SGD: seconds an epoch
              of MNIST, with dp 2, pp 2 (cut by measured time), and dp 2 × pp 2

How it is measured. Each repeat starts every contender once, in turn, as processes of their own, on the same windows of
text; some steps to warm up, then so many as take about --seconds, between barriers. The slowest rank counts; the table
gives the median over repeats and the range; ratios are taken within each repeat. That contenders do the same is checked
on the losses of their first steps. PyTorch needs `pip install -e ".[peers]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ONE_THREAD, RESULTS, find_mpirun, machine, spread

WARM_UP = 8
SCHEDULES = ("naive", "gpipe", "1f1b", "zero-bubble")
STRICT = 2e-3  # relative: how far the losses of two contenders may be from each other, in float32


# -- a rank ---------------------------------------------------------------------------------------------------------


def windows(batch: int, context: int = 64):
    """Batches of windows of the default text, the same for all contenders: x, y (batch, context) int64."""
    from minidist.data import text

    tokens = np.frombuffer(text.default_text().encode(), np.uint8).astype(np.int64)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(tokens) - context - 1, batch)
        whole = tokens[starts[:, None] + np.arange(context + 1)]
        yield whole[:, :-1].copy(), whole[:, 1:].copy()


def config_of(width: int, mlp: str):
    from minidist.examples.gpt import GPTConfig

    return GPTConfig(vocab_size=256, context=64, layers=4, heads=4, width=width, mlp=mlp)


def gpt_of_minidist(comm: Any, width: int, axes: dict[str, int], options: dict[str, Any], mlp: str):
    """One step of training as a function of this rank's share; and the trainer."""
    import minidist as md
    from minidist.examples.gpt import GPT
    from minidist.parallel.tensor import vocab_parallel_cross_entropy

    mesh = md.Mesh(comm, **axes)
    md.manual_seed(0)
    model = GPT(config_of(width, mlp), mesh)
    loss = lambda logits, targets: vocab_parallel_cross_entropy(logits, targets, mesh.tp)  # noqa: E731
    if options.pop("cut", None) == "time":
        options |= {"cut": "time", "sample": next(windows(12))[0]}
    make = lambda own: md.optim.AdamW(own, lr=3e-4)  # noqa: E731
    trainer = md.parallel.Trainer(model, make, mesh, loss, **options)
    return trainer.step, trainer, mesh.dp


def gpt_of_pytorch(rank: int, size: int, width: int, meeting: str, mlp: str):
    import torch
    import torch.distributed as dist
    from torch_gpt import torch_gpt

    import minidist as md
    from minidist.examples.gpt import GPT

    torch.set_num_threads(1)
    md.manual_seed(0)
    alone = md.comm.world()
    ours = GPT(config_of(width, mlp), md.Mesh(alone.split(alone.rank)))
    model = torch_gpt(ours.config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step(x, y):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(x))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def run_contender(what: dict[str, Any], folder: str) -> dict[str, Any]:
    """What one rank does: steps to warm up, then timed ones."""
    import minidist as md

    comm = md.comm.world()
    size, rank, trainer = comm.size, comm.rank, None
    if what["library"] == "pytorch":
        step, place, places = gpt_of_pytorch(rank, size, what["width"], f"{folder}/meeting", what["mlp"]), rank, size
    else:
        step, trainer, dp = gpt_of_minidist(comm, what["width"], what["axes"], dict(what["options"]), what["mlp"])
        place, places = dp.rank, dp.size
    source = windows(what["batch"])
    share = md.collectives.chunk_slice(what["batch"], places, place)

    def next_share():
        x, y = next(source)
        return x[share], y[share]

    losses, idle, took = [], [], []
    for _ in range(WARM_UP):
        start = time.perf_counter()
        losses.append(step(*next_share()))
        took.append(time.perf_counter() - start)
    steps = np.array([max(5, what["seconds"] / max(statistics.median(took), 1e-6))])
    steps = int(md.collectives.all_reduce(comm, steps, "min")[0])
    md.collectives.barrier(comm)
    begun = time.perf_counter()
    for _ in range(steps):
        step(*next_share())
        if trainer is not None:
            spans = trainer.pipeline.spans
            busy = sum(span.end - span.ready for span in spans)
            idle.append([busy, spans[0].start, spans[-1].end])
    md.collectives.barrier(comm)
    seconds = (time.perf_counter() - begun) / steps
    report = {"rank": rank, "seconds": seconds, "losses": losses}
    if idle:
        report["spans"] = idle
    return report


# -- the whole ------------------------------------------------------------------------------------------------------


def launch(ranks: int, what: dict[str, Any]) -> list[dict[str, Any]]:
    """Start one contender; the reports of its ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--contender", json.dumps(what), "--folder", folder]
        if ranks > 1:
            command = [find_mpirun() or "mpirun", "-n", str(ranks), *command]
        subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True, timeout=300)
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    assert len(reports) == ranks, f"{what}: {len(reports)} reports from {ranks} ranks"
    return reports


def seconds_of(reports: list[dict[str, Any]]) -> float:
    return max(report["seconds"] for report in reports)


def losses_of(reports: list[dict[str, Any]]) -> list[float]:
    """The mean loss of each of the first steps."""
    return [statistics.fmean(r["losses"][i] for r in reports) for i in range(WARM_UP)]


def idle_of(reports: list[dict[str, Any]]) -> float:
    """The share of the ranks' time, between the first action of a step and the last one, that no rank computed in."""
    shares = []
    for each in zip(*(r["spans"] for r in reports), strict=True):
        start, end = min(start for _, start, _ in each), max(end for _, _, end in each)
        shares.append(1 - sum(busy for busy, _, _ in each) / (len(each) * (end - start)))
    return statistics.median(shares)


def ours(axes: dict[str, int], width: int = 128, batch: int = 12, mlp: str = "gelu", **options: Any) -> dict[str, Any]:
    return {"library": "minidist", "axes": axes, "width": width, "batch": batch, "mlp": mlp, "options": options}


def theirs(batch: int = 12, mlp: str = "gelu") -> dict[str, Any]:
    return {"library": "pytorch", "width": 128, "batch": batch, "mlp": mlp}


Contenders = dict[str, tuple[int, dict[str, Any]]]  # by name: how many ranks, and what they do
PARTS: dict[str, tuple[str, Contenders]] = {  # by name: whom ratios are to, and who takes part
    "one": (
        "PyTorch",
        {
            "PyTorch": (1, theirs()),
            "minidist": (1, ours({})),
            "PyTorch, erf": (1, theirs(mlp="gelu-erf")),
            "minidist, erf": (1, ours({}, mlp="gelu-erf")),
        },
    ),
    "dp": (
        "PyTorch DDP",
        {
            "PyTorch DDP": (2, theirs(24)),
            "minidist, zero=0": (2, ours({"dp": 2}, batch=24)),
            "minidist, zero=1": (2, ours({"dp": 2}, batch=24, zero=1)),
        },
    ),
    "pp": (
        "one rank",
        {
            "one rank": (1, ours({}, batch=96, microbatches=8)),
            **{name: (2, ours({"pp": 2}, batch=96, microbatches=8, schedule=name, cut="time")) for name in SCHEDULES},
        },
    ),
    "tp": ("one rank", {"one rank": (1, ours({}, width=512)), "tp 2": (2, ours({"tp": 2}, width=512))}),
}


def measure(part: str, repeats: int, seconds: float, say: Any) -> None:
    """One part of the table."""
    base, contenders = PARTS[part]
    runs: dict[str, list[list[dict]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (ranks, what) in contenders.items():
            runs[name].append(launch(ranks, {**what, "seconds": seconds}))
    expected = losses_of(runs[base][0])
    for name, several in runs.items():
        for reports in several:
            worst = max(abs(a - b) / b for a, b in zip(losses_of(reports), expected, strict=True))
            assert worst < STRICT, f"{name}: losses differ from those of {base} by {worst:.2e}"
    for name, (ranks, what) in contenders.items():
        tokens = what["batch"] * 64
        ratios = [seconds_of(b) / seconds_of(a) for a, b in zip(runs[name], runs[base], strict=True)]
        line = (
            f"{part:<4} {ranks:>5}  {name:<18}{spread([1e3 * seconds_of(r) for r in runs[name]], '.1f'):<24}"
            f"{spread([tokens / seconds_of(r) for r in runs[name]], ',.0f'):<28}{spread(ratios, '.2f'):<22}"
        )
        if part == "pp" and ranks > 1:
            from minidist.parallel.schedules import SCHEDULES as all_schedules

            formula = all_schedules[name].idle(2, 8, f=1, b=1, w=1)
            line += f"{spread([100 * idle_of(r) for r in runs[name]], '.0f'):<16}{100 * formula:.0f}"
        say(line.rstrip())


SHALLOW = ["--hidden", "128,127,126,125,124,123", "--batch-size", "128", "--optimizer", "sgd", "--lr", "0.1"]
MESHES = {
    "one rank": (1, []),
    "dp 2": (2, ["--dp", "2"]),
    "pp 2": (2, ["--pp", "2", "--microbatches", "4", "--cut", "time"]),
    "dp 2 × pp 2": (4, ["--dp", "2", "--pp", "2", "--microbatches", "4", "--cut", "time"]),
}


def measure_shallow(repeats: int, say: Any) -> None:
    """Seconds an epoch of MNIST, by the example itself."""
    seconds: dict[str, list[float]] = {name: [] for name in MESHES}
    accuracy: dict[str, float] = {}
    for _ in range(repeats):
        for name, (ranks, axes) in MESHES.items():
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "result.json")
                command = [sys.executable, "-m", "minidist.examples.mnist", *SHALLOW, *axes, "--epochs", "3", "--quiet"]
                if ranks > 1:
                    command = [find_mpirun() or "mpirun", "-n", str(ranks), *command]
                environment = {**os.environ, **ONE_THREAD}
                subprocess.run([*command, "--json", str(file)], env=environment, check=True, timeout=300)
                result = json.loads(file.read_text())
            seconds[name].append(result["seconds"] / result["epochs"])
            accuracy[name] = result["test_accuracy"]
    say(f"\n{'shallow':<10}{'ranks':>6}  {'seconds an epoch':<24}{'test accuracy after 3':<22}")
    for name, (ranks, _) in MESHES.items():
        say(f"{name:<12}{ranks:>4}  {spread(seconds[name], '.2f'):<24}{accuracy[name]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "shallow"], choices=[*PARTS, "shallow"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="about so long are a contender's timed steps")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        report = run_contender(json.loads(args.contender), args.folder)
        Path(args.folder, f"rank-{report['rank']}.json").write_text(json.dumps(report))
        return

    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(machine(PyTorch="torch"))
    say(f"{args.repeats} repeats of about {args.seconds:g} s; median (range); ratios to the first line of each part\n")
    say(f"{'part':<4} ranks  {'contender':<18}{'ms a step':<24}{'tokens/s':<28}{'ratio':<22}idle %, and by the formula")
    for part in args.parts:
        if part == "shallow":
            measure_shallow(args.repeats, say)
        else:
            measure(part, args.repeats, args.seconds, say)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        name = "train_gpt" if len(args.parts) > len(PARTS) else f"train_gpt_{'_'.join(args.parts)}"
        (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
