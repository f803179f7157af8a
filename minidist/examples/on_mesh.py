"""`--dp --pp --tp`: the network of the MNIST example on a mesh, its layers on several ranks (M.1, M.2)."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import minidist as md
from minidist import backend
from minidist.comm import Communicator
from minidist.examples.options import OPTIMIZERS
from minidist.examples.summary import costs_of, epoch_in_words, in_words, progress
from minidist.nn import functional as F
from minidist.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from minidist.parallel.trainer import Trainer
from minidist.parallel.whole import load_state


def fit_on_mesh(
    model: md.nn.Sequential, train: Any, test: Any, args: argparse.Namespace, comm: Communicator, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `fit`: train, tell rank 0's terminal how it goes, and return what there is to report, and the parameters."""
    mesh = md.Mesh(comm, dp=args.dp, pp=args.pp, tp=args.tp)
    deal: Any = partial(md.data.Loader, dtype=args.dtype, device=device, rank=mesh.dp.rank, size=mesh.dp.size)
    comm.mark("M.2(1)", "every rank has drawn the whole network, alike")
    comm.mark("M.1", f"by layer: {args.pp} stages; by module: the inside of every layer over {args.tp} ranks")
    # D.3(2) Partition the data over dp: along the other axes all ranks have the same samples.
    loader = deal(*train, batch_size=args.batch_size, seed=args.seed)
    test_loader = deal(*test, batch_size=1000 * mesh.dp.size, shuffle=False)
    # M.2(1) Initialise the parameters: every rank has drawn the whole model. M.2(2) Partition it.
    parameters = sum(p.numel() for p in model.parameters())
    layers = split_layers(model, mesh.tp) if mesh.tp.size > 1 else model
    sample = loader.take(0, 0, max(args.batch_size // args.microbatches, 1))[0]
    trainer = Trainer(
        layers,
        lambda own: OPTIMIZERS[args.optimizer](own, lr=args.lr),
        mesh,
        F.cross_entropy,
        schedule=args.schedule,
        microbatches=args.microbatches,
        chunks=args.chunks,
        cut=args.cut,
        sample=sample,
        zero=args.zero,
        algorithm=args.sync,
        clip=args.clip,
    )
    say = print if comm.rank == 0 and not args.quiet else (lambda *_, **__: None)
    how = f"{args.schedule}, {args.microbatches} microbatch{'es' * (args.microbatches > 1)}"
    say(f"{parameters:,} {args.dtype} parameters, {len(train[0]):,} images, batch {args.batch_size}", flush=True)
    say(f"{comm.size} ranks on {device}, {mesh!r}, {how}, {args.optimizer} lr {args.lr}", flush=True)

    seconds, loss, accuracy = 0.0, float("nan"), float("nan")
    trainer.meter.reset()
    # M.2(5), D.3(5) Repeat until the stopping condition holds: so many epochs.
    for epoch in range(args.epochs):
        start = time.perf_counter()
        loss = train_epoch(trainer, loader, epoch, args, comm)
        backend.synchronize()
        took = time.perf_counter() - start
        seconds += took
        with trainer.meter.left_out():
            accuracy = evaluate(trainer, test_loader)
        comm.value("accuracy", accuracy)
        comm.mark("M.2(5)", f"epoch {epoch + 1} of {args.epochs} is over")
        say(epoch_in_words(epoch, args.epochs, loss, accuracy, len(train[0]), took), flush=True)
    if any(True for _ in trainer.module.parameters()):
        md.parallel.assert_replicas_agree(trainer.module, mesh.dp)
    costs = costs_of(trainer.meter, comm, seconds, args.epochs * len(loader))
    say(in_words(costs), flush=True)
    return {
        "strategy": f"mesh {args.schedule} microbatches={args.microbatches} zero={args.zero} {args.sync}",
        "ranks": comm.size,
        "mesh": {axis: n for axis, n in mesh.shape.items() if axis in ("dp", "pp", "tp")},
        "epochs": args.epochs,
        "seconds": seconds,
        "samples_per_second": args.epochs * len(train[0]) / seconds,
        "train_loss": loss,
        "test_accuracy": accuracy,
        "device": device,
        **costs,
    }, trainer.state_dict()


def split_layers(model: md.nn.Sequential, tp: Communicator) -> md.nn.Sequential:
    """The network with every two linear layers split over `tp`, the first by columns and the second by rows.

    So what is between them (a ReLU) works on a slice, and one all-reduce joins what comes out (Shoeybi et al. 2019). A
    last one without a partner is split by columns, and its outputs are gathered. Parameters are this model's.
    """
    layers = dict(model.named_children())
    linears = [(name, layer) for name, layer in layers.items() if isinstance(layer, md.nn.Linear)]
    for i, (name, layer) in enumerate(linears):
        part: Any
        if i % 2:
            part = RowParallelLinear(layer.in_features, layer.out_features, tp)
        else:
            last = i == len(linears) - 1
            part = ColumnParallelLinear(layer.in_features, layer.out_features, tp, gather_output=last)
        part.to(layer.weight.device, layer.weight.dtype)
        load_state(md.nn.Sequential({name: part}), md.nn.Sequential({name: layer}).state_dict())
        layers[name] = part
    return md.nn.Sequential(layers)


def train_epoch(trainer: Trainer, loader: md.data.Loader, epoch: int, args: Any, comm: Communicator) -> float:
    """One pass over the training data; returns the mean loss."""
    total, count = 0.0, 0
    with progress(len(loader.labels), epoch, args, comm) as bar:
        for samples, (images, labels) in zip(loader.batch_sizes, loader.epoch(epoch), strict=True):
            loss = trainer.step(images, labels)
            comm.value("loss", loss)
            total += loss * samples
            count += samples
            if not bar.disable:
                bar.set_postfix_str(f"loss {total / count:.3f}", refresh=False)
                bar.update(samples)
    return total / count


def evaluate(trainer: Trainer, loader: md.data.Loader) -> float:
    """The share of test images that the model gets right."""
    batches = zip(loader.batch_sizes, loader.epoch(0), strict=True)
    return sum(trainer.evaluate(*batch, right) * samples for samples, batch in batches) / len(loader.labels)


def right(logits: md.Tensor, labels: md.Tensor) -> md.Tensor:
    """The share of samples whose label has the largest logit."""
    return (logits.argmax(1) == labels).to(logits.dtype).mean()
