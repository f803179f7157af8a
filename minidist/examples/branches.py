"""`--branches N`: the hidden layer cut into N towers, which the ranks hold between them (M.1 by module, M.2).

              .-- 784 -> 512, ReLU, -> 10 --.
    image ----+                             +---- sum: the logits of 784 -> 1024, ReLU, -> 10
              '-- 784 -> 512, ReLU, -> 10 --'

The towers' weights are cut from those of the whole network. It stays the same network: what is trained, saved and
loaded does not depend on the number of towers, nor on that of the ranks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np

import minidist as md
from minidist import backend
from minidist.backend import Array
from minidist.comm import Communicator
from minidist.examples.options import OPTIMIZERS
from minidist.examples.summary import epoch_in_words, progress
from minidist.nn import functional as F
from minidist.optim.clip import clip_arrays
from minidist.parallel.branch import Branches, whole_state


def towers_of(model: Any, number: int) -> list[md.nn.Module]:
    """The network 784 -> hidden -> 10, cut into towers that add up to it; only the first adds the last layer's bias."""
    first, _, last = model
    towers = []
    for i in range(number):
        part = md.collectives.chunk_slice(first.out_features, number, i)
        state = {
            "0.weight": first.weight.data[part],
            "0.bias": first.bias.data[part],
            "2.weight": last.weight.data[:, part],
            **({"2.bias": last.bias.data} if i == 0 else {}),
        }
        size = part.stop - part.start
        above, below = md.nn.Linear(first.in_features, size), md.nn.Linear(size, last.out_features, bias=i == 0)
        tower = md.nn.Sequential(above, md.nn.ReLU(), below).to(first.weight.device, first.weight.dtype)
        tower.load_state_dict(state)
        towers.append(tower)
    return towers


def joined(state: dict[str, Array], number: int) -> dict[str, Array]:
    """The whole network's state, from that of its towers."""
    xp = backend.namespace(state["branches.0.2.bias"])

    def all_of(name: str, dim: int) -> Array:
        return xp.concatenate([state[f"branches.{i}.{name}"] for i in range(number)], axis=dim)

    return {
        "0.weight": all_of("0.weight", 0),
        "0.bias": all_of("0.bias", 0),
        "2.weight": all_of("2.weight", 1),
        "2.bias": state["branches.0.2.bias"],
    }


def fit_with_branches(
    model: md.nn.Module, train: Any, test: Any, args: argparse.Namespace, comm: Communicator, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, tell rank 0's terminal how it goes, and return what there is to report, and the whole network's state."""
    # M.2(1) Initialise the parameters: every rank has drawn the same network. M.2(2) Partition it over the ranks.
    network = Branches(towers_of(model, args.branches), comm, join="sum")
    comm.mark("M.1", f"by module: the hidden layer in {args.branches} towers")
    parameters = list(network.parameters())  # none, on a rank without a tower
    optimizer = OPTIMIZERS[args.optimizer](parameters, lr=args.lr) if parameters else None
    deal: Any = partial(md.data.Loader, dtype=args.dtype, device=device)  # the same batches on every rank
    loader, test_loader = deal(*train, args.batch_size, seed=args.seed), deal(*test, 1000, shuffle=False)
    say = print if comm.rank == 0 and not args.quiet else (lambda *_, **__: None)
    numbers = sum(p.numel() for p in model.parameters())
    say(f"{numbers:,} {args.dtype} parameters, {len(train[0]):,} images, batch {args.batch_size}", flush=True)
    held = [[str(i) for i, rank in network.placed.items() if rank == r] for r in range(comm.size)]
    where = "; ".join(f"rank {rank}: {', '.join(towers) or 'none'}" for rank, towers in enumerate(held))
    ranks, several = f"{comm.size} rank{'s' * (comm.size > 1)} on {device}", "es" * (args.branches > 1)
    say(f"{ranks}, {args.branches} branch{several} ({where}), {args.optimizer} lr {args.lr}", flush=True)

    seconds, loss, accuracy, sent = 0.0, float("nan"), float("nan"), np.zeros(2)
    # M.2(5) Repeat 3 and 4 until the stopping condition holds: so many epochs.
    for epoch in range(args.epochs):
        start, before = time.perf_counter(), np.array([comm.record.sent_bytes, comm.record.sent_messages])
        loss = train_epoch(network, optimizer, loader, epoch, args, comm)
        backend.synchronize()
        took = time.perf_counter() - start
        seconds += took
        sent += np.array([comm.record.sent_bytes, comm.record.sent_messages]) - before
        accuracy = evaluate(network, test_loader)
        comm.value("accuracy", accuracy)
        comm.mark("M.2(5)", f"epoch {epoch + 1} of {args.epochs} is over")
        say(epoch_in_words(epoch, args.epochs, loss, accuracy, len(train[0]), took), flush=True)
    nbytes, messages = (md.collectives.all_reduce(comm, sent, "mean") / (args.epochs * len(loader))).tolist()
    say(f"a rank's step   sent {nbytes / 1e6:.3f} MB in {messages:.1f} messages", flush=True)
    return {
        "strategy": f"branches={args.branches}",
        "ranks": comm.size,
        "mesh": {"branches": comm.size},
        "epochs": args.epochs,
        "seconds": seconds,
        "samples_per_second": args.epochs * len(train[0]) / seconds,
        "train_loss": loss,
        "test_accuracy": accuracy,
        "device": device,
        "a_step": {"sent_bytes": nbytes, "sent_messages": messages},
    }, joined(whole_state(network), args.branches)


def train_epoch(
    network: Branches, optimizer: Any, loader: md.data.Loader, epoch: int, args: argparse.Namespace, comm: Communicator
) -> float:
    """One pass over the training data, as on one rank; returns the mean loss, which is the same on all."""
    total = 0.0
    with progress(len(loader.labels), epoch, args, comm) as bar:
        for images, labels in loader.epoch(epoch):
            network.zero_grad()
            for piece in range(args.accumulate):
                part = md.collectives.chunk_slice(len(labels), args.accumulate, piece)
                # M.2(3) Each rank runs its towers. M.2(4) Combine the results: every rank has the sum of the logits.
                logits = network(md.Tensor(images[part]))
                loss = F.cross_entropy(logits, md.Tensor(labels[part]), reduction="sum") / len(labels)
                loss.backward()  # to the weights of its own towers; nothing is left to tell the others
                total += loss.item() * len(labels)
                comm.value("loss", loss.item() * len(labels) / max(part.stop - part.start, 1))
            if args.clip:  # the norm is that of all ranks' gradients
                mine = [p.grad.data for p in network.parameters() if p.grad is not None]
                none = backend.full((1,), 0, args.dtype, device=loader.device)
                clip_arrays(mine or [none], args.clip, combine=partial(md.collectives.all_reduce, comm))
            if optimizer is not None:
                optimizer.step()
            bar.update(len(labels))
    return total / len(loader.labels)


@md.no_grad()
def evaluate(network: Branches, loader: md.data.Loader) -> float:
    """The share of test images that the network gets right: every rank sees all of them, and its towers' logits."""
    right = 0
    for images, labels in loader.epoch(0):
        right += int((network(md.Tensor(images)).argmax(1) == md.Tensor(labels)).sum())
    return right / len(loader.labels)
