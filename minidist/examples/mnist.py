"""Train the document's network on MNIST, on one rank or many (C.4).

    python -m minidist.examples.mnist
    mpirun -n 4 python -m minidist.examples.mnist

784 inputs, a hidden layer of 1024 with ReLU, 10 outputs, cross-entropy from logits, Adam, 10 epochs. The batch size is
that of all ranks together, so batch and seed decide the result and the number of ranks only how soon it comes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import minidist as md
from minidist import backend
from minidist.comm import Communicator
from minidist.data.picture import draw_partitions
from minidist.nn import functional as F
from minidist.parallel.compression import compression_of

OPTIMIZERS = {"adam": md.optim.Adam, "adamw": md.optim.AdamW, "sgd": md.optim.SGD}


def main(argv: list[str] | None = None) -> None:
    comm = md.comm.world()
    args = parse(argv, comm)
    if args.comm_timeout is not None:
        comm.timeout = args.comm_timeout  # groups made of it from here on inherit it
    on_host, _ = comm.split_by_host()
    problem = ""
    try:  # nothing in here waits for another rank
        if comm.rank == 0:
            check_files(args)
        device = backend.choose(args.device, on_host.rank)
        backend.use(device)
        train, test = (md.data.read_mnist(split, args.data) for split in ("train", "test"))
        initial = md.checkpoint.load(args.load) if args.load else None
        model = build(args, train, test, device, initial)
    except (OSError, ValueError, backend.DeviceError) as error:
        problem = f"mnist: rank {comm.rank}: {error}" if comm.rank else f"mnist: {error}"
    refuse_if_any(comm, problem)
    result = fit(model, train, test, args, comm, device)
    if args.save and comm.rank == 0:
        md.checkpoint.save(args.save, model.state_dict())
    if args.json and comm.rank == 0:
        write_json(args.json, result)


def check_files(args: argparse.Namespace) -> None:
    """Refuse, before any training, what could not be written after it. Rank 0 writes, so it alone can tell."""
    if args.partition_picture and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--partition-picture draws with matplotlib: pip install 'minidist[plot]'")
    files = {"save": args.save, "json": args.json, "partition-picture": args.partition_picture}
    for name, path in files.items():
        if not path or (name, path) == ("json", "-"):
            continue
        target, folder = Path(path), Path(path).absolute().parent
        if not folder.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {folder}")
        if target.is_dir():
            raise ValueError(f"--{name} {path}: this is a folder")
        if name == "save" and target.exists() and not target.is_file():
            raise ValueError(f"--{name} {path}: this is not a file")
        in_place = name == "json" and target.exists()  # a saved file is written beside the old one, then replaces it
        if not os.access(target if in_place else folder, os.W_OK):
            raise ValueError(f"--{name} {path}: it may not be written")


def refuse_if_any(comm: Communicator, problem: str) -> None:
    """End all ranks if one has a problem (its host lacks the data, say), by the message of the lowest that has one."""
    first = int(md.collectives.all_reduce(comm, np.array([comm.rank if problem else comm.size]), "min")[0])
    if first < comm.size:
        led_by_first = comm.split(0, key=(comm.rank - first) % comm.size)
        assert led_by_first is not None
        md.comm.refuse(led_by_first, problem)


def build(args: argparse.Namespace, train: Any, test: Any, device: str, initial: Any) -> md.nn.Module:
    """The network, with the data's number of inputs and classes."""
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(f"training images have {train[0].shape[1]} pixels, test images {test[0].shape[1]}")
    classes = int(max(train[1].max(), test[1].max())) + 1
    md.manual_seed(args.seed)
    # D.3(1) Initialise the parameters: every rank draws the same ones (and data_parallel makes sure of it).
    model = md.nn.Sequential(
        md.nn.Linear(train[0].shape[1], args.hidden), md.nn.ReLU(), md.nn.Linear(args.hidden, classes)
    ).to(device, args.dtype)
    if initial is not None:
        try:
            model.load_state_dict(initial)
        except (KeyError, ValueError) as error:
            raise ValueError(f"cannot load {args.load}: {error.args[0]}") from None
    return model


def fit(
    model: md.nn.Module, train: Any, test: Any, args: argparse.Namespace, comm: Communicator, device: str
) -> dict[str, Any]:
    """Train, tell rank 0's terminal how it goes, and return what there is to report."""
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    network, optimizer = md.parallel.data_parallel(model, optimizer, comm, args.zero, args.sync, args.compress)
    # D.3(2) Partition the data (D.1): every rank has its share of each global batch.
    deal: Any = partial(md.data.Loader, rank=comm.rank, size=comm.size, seed=args.seed, dtype=args.dtype, device=device)
    loader = deal(*train, batch_size=args.batch_size, partition=args.partition, hosts=comm.hosts())
    if args.partition_picture and comm.rank == 0:
        draw_partitions({args.partition: loader.histogram()}, args.partition_picture)
    test_loader = deal(*test, batch_size=1000 * comm.size, shuffle=False)
    say = print if comm.rank == 0 and not args.quiet else (lambda *_, **__: None)
    parameters = sum(p.numel() for p in model.parameters())
    strategy = "one rank" if comm.size == 1 else f"{args.sync} all-reduce" + ", ZeRO 1" * args.zero
    if args.compress and comm.size > 1:
        strategy = f"gradients by {args.compress}"
    if args.partition != "uniform":
        strategy += f", {args.partition} partition"
    say(f"{parameters:,} {args.dtype} parameters, {len(train[0]):,} images, batch {args.batch_size}", flush=True)
    say(f"{comm.size} rank{'s' * (comm.size > 1)} on {device}, {strategy}, {args.optimizer} lr {args.lr}", flush=True)

    seconds, loss, accuracy = 0.0, float("nan"), float("nan")
    # D.3(5) Repeat 3 and 4 until the stopping condition holds: so many epochs.
    for epoch in range(args.epochs):
        start = time.perf_counter()
        loss = train_epoch(network, optimizer, loader, epoch, args, comm)
        backend.synchronize()
        took = time.perf_counter() - start
        seconds += took
        accuracy = evaluate(model, test_loader, comm)
        say(
            f"epoch {epoch + 1:2}/{args.epochs}   loss {loss:.4f}   test accuracy {accuracy:6.2%}   "
            f"{len(train[0]) / took:7,.0f} samples/s   {took:5.1f} s",
            flush=True,
        )
    md.parallel.assert_replicas_agree(model, comm)
    if comm.size > 1:
        say(f"the parameters of all {comm.size} ranks are equal, bit for bit", flush=True)
    return {
        "strategy": "single" if comm.size == 1 else f"data-parallel {args.sync} zero={args.zero}",
        "ranks": comm.size,
        "mesh": {"dp": comm.size},
        "epochs": args.epochs,
        "seconds": seconds,
        "samples_per_second": args.epochs * len(train[0]) / seconds,
        "train_loss": loss,
        "test_accuracy": accuracy,
        "device": device,
    }


def train_epoch(
    network: md.parallel.DataParallel,
    optimizer: Any,
    loader: md.data.Loader,
    epoch: int,
    args: argparse.Namespace,
    comm: Communicator,
) -> float:
    """One pass over the training data; returns the mean loss over all ranks' samples."""
    total = np.zeros(2)  # the sum of the losses, and of the samples
    with tqdm(
        total=len(loader.labels),
        desc=f"epoch {epoch + 1:2}/{args.epochs}",
        unit=" samples",
        unit_scale=True,
        leave=False,
        mininterval=0.25,
        ncols=88,
        disable=args.quiet or comm.rank != 0,
    ) as bar:
        for samples, (images, labels) in zip(loader.batch_sizes, loader.epoch(epoch), strict=True):
            # D.3(3) Each rank trains on its own share.
            optimizer.zero_grad()
            loss = F.cross_entropy(network(md.Tensor(images)), md.Tensor(labels))
            # D.3(4) Synchronise: backward ends with the average of all ranks' gradients, and step keeps ranks alike.
            loss.backward()
            if args.clip:
                network.clip_grad_norm_(args.clip)
            optimizer.step()
            if len(labels):
                total += loss.item() * len(labels), len(labels)
            if not bar.disable:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update(samples)
    loss_sum, count = md.collectives.all_reduce(comm, total)
    return float(loss_sum / count)


@md.no_grad()
def evaluate(model: md.nn.Module, loader: md.data.Loader, comm: Communicator) -> float:
    """The share of test images that the model gets right; each rank tries its part of them."""
    right = np.zeros(1, np.int64)
    for images, labels in loader.epoch(0):
        right += int((model(md.Tensor(images)).argmax(1) == md.Tensor(labels)).sum())
    return int(md.collectives.all_reduce(comm, right)[0]) / len(loader.labels)


def write_json(path: str, result: dict[str, Any]) -> None:
    """One JSON object on one line; a loss that is not a number any more is null there."""
    line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()})
    if path == "-":
        print(line, flush=True)
    else:
        Path(path).write_text(line + "\n")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that speaks on rank 0 only; all ranks end."""

    speaks = True

    def _print_message(self, message: str, file: Any = None) -> None:
        if self.speaks:
            super()._print_message(message, file)


def parse(argv: list[str] | None, comm: Communicator) -> argparse.Namespace:
    """The command line; one that can't work is refused here, on all ranks, by one message."""
    parser = _Parser("python -m minidist.examples.mnist", description="Train the document's network on MNIST.")
    parser.speaks = comm.rank == 0
    add = parser.add_argument
    add("--epochs", type=int, default=10, metavar="N", help="passes over the training data (%(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="samples a step, of all ranks together (%(default)s)")
    add("--lr", type=float, default=1e-3, metavar="X", help="learning rate (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="(%(default)s)")
    add("--hidden", type=int, default=1024, metavar="N", help="width of the hidden layer (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of initial weights and shuffling (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    add("--sync", choices=["auto", *md.collectives.ALGORITHMS["all_reduce"]], default="ring",
        help="the all-reduce that keeps ranks in step (%(default)s)")  # fmt: skip
    add("--zero", type=int, choices=(0, 1), default=0, help="1: each rank keeps 1/P of the optimizer (%(default)s)")
    add("--partition", default="uniform", metavar="HOW",
        help="which samples a rank takes: uniform, hierarchical (hosts first), stratified (by label), skewed or "
        "skewed:ALPHA (Dirichlet, for experiments) (%(default)s)")  # fmt: skip
    add("--partition-picture", metavar="FILE", help="draw who holds what (.svg, .png or .pdf; needs matplotlib)")
    add("--compress", metavar="HOW",
        help="send less than whole gradients: fp16, bf16, topk:0.01, randomk:0.01, sign, powersgd:4 (off)")  # fmt: skip
    add("--clip", type=float, metavar="X", help="scale gradients whose norm is larger than this (off)")
    add("--data", metavar="DIR", help="folder of another data set in MNIST's four files (MNIST itself)")
    add("--save", metavar="FILE", help="write the trained parameters (safetensors)")
    add("--load", metavar="FILE", help="start from these parameters (safetensors)")
    add("--json", metavar="FILE", help="write the result as one JSON object; - for standard output")
    add("--comm-timeout", type=float, metavar="SECONDS",
        help="a rank that waits longer for another ends all, and a table says who waits for whom "
        "(MINIDIST_TIMEOUT, else 600)")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but errors (and what --json - asks for)")
    args = parser.parse_args(argv)
    for name in ("epochs", "hidden", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.batch_size < comm.size:
        parser.error(f"--batch-size {args.batch_size}: less than the {comm.size} ranks, so some would have no sample")
    try:
        md.data.partition.named(args.partition, labels=None, hosts=comm.hosts())
    except ValueError as error:
        parser.error(f"--partition {args.partition}: {str(error).partition(': ')[2]}")
    if args.partition_picture and not args.partition_picture.endswith((".svg", ".png", ".pdf")):
        parser.error(f"--partition-picture {args.partition_picture}: the name must end in .svg, .png or .pdf")
    try:
        if args.compress:
            compression_of(args.compress)
    except ValueError as error:
        parser.error(f"--compress {args.compress}: {str(error).partition(': ')[2]}")
    if args.compress and args.zero:
        parser.error(
            f"--compress {args.compress} with --zero {args.zero}: a part of the gradients cannot be compressed"
        )
    if args.clip is not None and not args.clip > 0:
        parser.error(f"--clip {args.clip}: must be more than 0")
    if not args.lr > 0:
        parser.error(f"--lr {args.lr}: must be more than 0")
    for operation in ("reduce_scatter", "all_gather") if args.zero else ("all_reduce",):
        if args.sync not in ("auto", *md.collectives.ALGORITHMS[operation]):
            able = ", ".join(md.collectives.ALGORITHMS[operation])
            parser.error(f"--sync {args.sync} with --zero {args.zero}: {operation} has auto, {able}")
    if args.comm_timeout is not None and not args.comm_timeout > 0:
        parser.error(f"--comm-timeout {args.comm_timeout}: must be more than 0")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must not be negative")
    return args


if __name__ == "__main__":
    main()
