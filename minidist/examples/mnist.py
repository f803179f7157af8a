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
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import minidist as md
from minidist import backend
from minidist.comm import Communicator
from minidist.data.picture import draw_partitions
from minidist.examples.branches import fit_with_branches
from minidist.examples.on_mesh import fit_on_mesh
from minidist.examples.options import OPTIMIZERS, SERVERS, json_name, parse
from minidist.examples.seen import seen
from minidist.examples.servers import fit_with_servers
from minidist.examples.straggler import Straggler
from minidist.examples.summary import costs_of, epoch_in_words, in_words, progress
from minidist.nn import functional as F


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
    how: Any = fit_with_servers if args.sync == SERVERS else fit
    if args.on_mesh or args.branches:
        how = fit_on_mesh if args.on_mesh else fit_with_branches
    with seen(args, comm, device):
        comm.mark("C.1", f"{comm.size} rank{'s' * (comm.size > 1)} on {device}")
        network = "-".join(map(str, widths(train, test, args)))
        comm.mark("C.4", f"{network}, ReLU, cross-entropy from logits, {args.optimizer}, {args.epochs} epochs")
        result, state = how(model, train, test, args, comm, device)
    if args.save and comm.rank == 0:
        md.checkpoint.save(args.save, state)
    if args.json and comm.rank == 0:
        write_json(args.json, result)


def check_files(args: argparse.Namespace) -> None:
    """Refuse, before any training, what could not be written after it. Rank 0 writes, so it alone can tell."""
    picture = getattr(args, "partition_picture", None)  # which not every example draws
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--partition-picture draws with matplotlib: pip install 'minidist[plot]'")
    files = {"save": args.save, "json": args.json, "partition-picture": picture}
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


def build(args: argparse.Namespace, train: Any, test: Any, device: str, initial: Any) -> md.nn.Sequential:
    """The network, with the data's number of inputs and classes."""
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(f"training images have {train[0].shape[1]} pixels, test images {test[0].shape[1]}")
    md.manual_seed(args.seed)
    # C.4 The practical case: this network, on logits; the document's has a softmax more, in front of its loss.
    # D.3(1) Initialise the parameters: every rank draws the same ones (and data_parallel makes sure of it).
    layers = [layer for a, b in pairwise(widths(train, test, args)) for layer in (md.nn.Linear(a, b), md.nn.ReLU())]
    model = md.nn.Sequential(*layers[:-1])
    model.to(device, args.dtype)
    if initial is not None:
        try:
            model.load_state_dict(initial)
        except (KeyError, ValueError) as error:
            raise ValueError(f"cannot load {args.load}: {error.args[0]}") from None
    return model


def widths(train: Any, test: Any, args: argparse.Namespace) -> list[int]:
    """How many numbers come into each layer, and out of the last: a logit for each class."""
    return [train[0].shape[1], *args.hidden, int(max(train[1].max(), test[1].max())) + 1]


def strategy_of(
    model: md.nn.Module, optimizer: md.optim.Optimizer, args: argparse.Namespace, comm: Communicator
) -> tuple[Any, Any, str]:
    """What trains on all ranks: a model, an optimizer, and words for it."""
    if args.local_sgd:
        network, averaging = md.parallel.local_sgd(model, optimizer, comm, args.local_sgd, algorithm=args.sync)
        return network, averaging, f"local SGD, every {args.local_sgd} steps"
    if args.diloco:
        network, averaging = md.parallel.diloco(model, optimizer, comm, args.diloco, algorithm=args.sync)
        return network, averaging, f"DiLoCo, every {args.diloco} steps"
    bucket_bytes = None if args.bucket_mb is None else int(args.bucket_mb * 1e6)
    options = (args.zero, args.sync, args.compress, bucket_bytes, args.reproducible)
    wrapped, sharded = md.parallel.data_parallel(model, optimizer, comm, *options)
    words = f"{args.sync} all-reduce" if not args.zero else f"{args.sync} reduce-scatter, ZeRO {args.zero}"
    if args.compress:
        words = f"gradients by {args.compress}" + f", ZeRO {args.zero}" * bool(args.zero)
    if args.reproducible:
        words = f"gradients of {args.reproducible} microbatches in a fixed tree" + ", ZeRO 1" * args.zero
    return wrapped, sharded, words


def fit(
    model: md.nn.Module, train: Any, test: Any, args: argparse.Namespace, comm: Communicator, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, tell rank 0's terminal how it goes, and return what there is to report, and the parameters."""
    optimizer: Any = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    network, optimizer, words = strategy_of(model, optimizer, args, comm)
    comm.mark("D.2", f"every rank has all parameters; kept in step by {words}")
    # D.3(2) Partition the data (D.1): every rank has its share of each global batch.
    deal: Any = partial(md.data.Loader, seed=args.seed, dtype=args.dtype, device=device)
    cut: Any = partial(deal, *train, batch_size=args.batch_size, partition=args.partition)
    if args.reproducible:  # each microbatch is dealt as if it were a rank's share; this rank has a few of them
        mine = md.parallel.fixed_tree.share(args.reproducible, comm.size, comm.rank)
        loaders = [cut(rank=micro, size=args.reproducible) for micro in mine]
    else:
        loaders = [cut(rank=comm.rank, size=comm.size, hosts=comm.hosts())]
    if comm.record.listeners:  # dealing a whole epoch takes a moment
        share = sum(len(indices) for loader in loaders for indices in loader.shares(epoch=0))
        comm.mark("D.1", f"{args.partition}: {share:,} of {len(train[0]):,} images an epoch are this rank's")
    comm.mark("D.3(2)", f"{len(loaders[0]):,} batches of {args.batch_size} images, each dealt over the ranks")
    if args.partition_picture and comm.rank == 0:
        draw_partitions({args.partition: loaders[0].histogram()}, args.partition_picture)
    test_loader = deal(*test, batch_size=1000 * comm.size, shuffle=False, rank=comm.rank, size=comm.size)
    say = print if comm.rank == 0 and not args.quiet else (lambda *_, **__: None)
    parameters = sum(p.numel() for p in model.parameters())
    words = "one rank" if comm.size == 1 else words
    if args.partition != "uniform":
        words += f", {args.partition} partition"
    say(f"{parameters:,} {args.dtype} parameters, {len(train[0]):,} images, batch {args.batch_size}", flush=True)
    say(f"{comm.size} rank{'s' * (comm.size > 1)} on {device}, {words}, {args.optimizer} lr {args.lr}", flush=True)

    seconds, loss, accuracy = 0.0, float("nan"), float("nan")
    meter = optimizer.meter if args.local_sgd or args.diloco else network.meter
    meter.reset()
    pace = partial(Straggler(args.straggler, comm).computing, lambda: meter.waited)
    # D.3(5) Repeat 3 and 4 until the stopping condition holds: so many epochs.
    for epoch in range(args.epochs):
        start = time.perf_counter()
        loss = train_epoch(network, optimizer, loaders, epoch, args, comm, pace)
        backend.synchronize()
        took = time.perf_counter() - start
        seconds += took
        with meter.left_out():
            accuracy = evaluate(model, test_loader, comm)
        comm.value("accuracy", accuracy)
        comm.mark("D.3(5)", f"epoch {epoch + 1} of {args.epochs} is over")
        say(epoch_in_words(epoch, args.epochs, loss, accuracy, len(train[0]), took), flush=True)
    md.parallel.assert_replicas_agree(network, comm)
    costs = costs_of(meter, comm, seconds, args.epochs * len(loaders[0]))
    say(in_words(costs), flush=True)
    if comm.size > 1:
        say(f"the parameters of all {comm.size} ranks are equal, bit for bit", flush=True)
    return {
        "strategy": "single" if comm.size == 1 else json_name(args),
        "ranks": comm.size,
        "mesh": {"dp": comm.size},
        "epochs": args.epochs,
        "seconds": seconds,
        "samples_per_second": args.epochs * len(train[0]) / seconds,
        "train_loss": loss,
        "test_accuracy": accuracy,
        "device": device,
        **costs,
    }, network.state_dict()


def train_epoch(
    network: Any, optimizer: Any, loaders: list[md.data.Loader], epoch: int, args: Any, comm: Communicator, pace: Any
) -> float:
    """One pass over the training data; returns the mean loss over all ranks' samples. `pace` slows a straggler down."""
    total = np.zeros(2)  # the sum of the losses, and of the samples
    alone = args.local_sgd or args.diloco  # between two averages
    with progress(len(loaders[0].labels), epoch, args, comm) as bar:
        dealt = zip(*(loader.epoch(epoch) for loader in loaders), strict=True)
        for samples, parts in zip(loaders[0].batch_sizes, dealt, strict=True):
            # D.3(3) Each rank trains on its own share, in one piece or several.
            optimizer.zero_grad()
            share = sum(len(labels) for _, labels in parts)
            pieces = parts if args.accumulate == 1 else cut_share(parts[0], args.accumulate)
            for number, (images, labels) in enumerate(pieces, start=1):
                if alone and not share:
                    break
                # D.3(4) Synchronise: the last backward ends with the average of all ranks' gradients ...
                sync = nullcontext() if alone or number == len(pieces) else network.no_sync()
                with comm.step("D.3(3) train"), pace(), sync:
                    logits = network(md.Tensor(images))
                    if args.accumulate == 1:
                        loss = F.cross_entropy(logits, md.Tensor(labels))
                    else:  # pieces add up to the mean over the share
                        loss = F.cross_entropy(logits, md.Tensor(labels), reduction="sum") / max(share, 1)
                    loss.backward()
                if len(labels):
                    loss_sum = loss.item() * (len(labels) if args.accumulate == 1 else share)
                    total += loss_sum, len(labels)
                    comm.value("loss", loss_sum / len(labels))
            if args.clip:
                clip = partial(md.optim.clip_grad_norm_, network.parameters()) if alone else network.clip_grad_norm_
                clip(args.clip)
            optimizer.step()  # ... and this keeps the ranks alike.
            if not bar.disable:
                bar.set_postfix_str(f"loss {total[0] / max(total[1], 1):.3f}", refresh=False)
                bar.update(samples)
    if alone:
        optimizer.synchronise()
    loss_sum, count = md.collectives.all_reduce(comm, total)
    return float(loss_sum / count)


def cut_share(share: tuple[Any, Any], pieces: int) -> list[tuple[Any, Any]]:
    """In so many pieces; equally many on all ranks, and so perhaps empty ones."""
    images, labels = share
    return [
        (images[part], labels[part])
        for part in (md.collectives.chunk_slice(len(labels), pieces, number) for number in range(pieces))
    ]


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


if __name__ == "__main__":
    main()
