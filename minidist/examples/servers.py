"""`--sync parameter-server`: what the workers do, and what rank 0 tells of it (D.2, C.3)."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

import minidist as md
from minidist.comm import Communicator
from minidist.examples.options import OPTIMIZERS
from minidist.examples.straggler import Straggler
from minidist.examples.summary import epoch_in_words
from minidist.nn import functional as F
from minidist.parallel.parameter_server import Expelled, ParameterServer

TRAINED, TESTED = 0, 1  # why the workers meet: an epoch is trained, or what came of it is known


def fit_with_servers(
    model: md.nn.Module, train: Any, test: Any, args: argparse.Namespace, comm: Communicator, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `fit`, with workers and servers; the result and the parameters are rank 0's to use."""
    # D.3(1) Initialise the parameters: every worker begins with the servers'.
    ps = ParameterServer(
        model,
        OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr),
        comm,
        servers=args.servers,
        consistency=args.consistency,
        copies=args.copies,
        sharding=args.sharding,
        samples=len(train[0]),
        batch_size=args.batch_size,
        balanced=not args.even_shares,
        deadline=args.deadline,
    )
    servers, workers = (", ".join(map(str, ranks)) for ranks in (ps.roles.server_ranks, ps.roles.workers))
    comm.mark("D.2", f"the parameters are kept by ranks {servers}; ranks {workers} pull them")
    if not ps.serves:
        work(ps, train, test, args, comm, device)
        return {}, {}
    teller = Teller(ps, args, comm, device, len(train[0]))
    report = ps.serve(teller.met, teller.trained)
    if report is None:
        return {}, {}
    teller.say(report.in_words())
    return {**teller.result, **report.as_json()}, model.state_dict()


def work(ps: ParameterServer, train: Any, test: Any, args: Any, comm: Communicator, device: str) -> None:
    """A worker: takes its shares, epoch by epoch, until there are no more."""
    deal: Any = partial(md.data.Loader, seed=args.seed, dtype=args.dtype, device=device)
    loader = deal(*train, batch_size=args.batch_size)
    slow = Straggler(args.straggler, comm)
    while (epoch := ps.share().epoch) < args.epochs:  # D.3(5); one that joins late begins with the epoch of its share
        try:
            trained = train_shares(ps, loader, epoch, args, slow)
            ps.meet(trained, TRAINED)
            ps.pull()  # every gradient of the epoch is in them now
            _, which, living = ps.meet((), TESTED)
            ps.meet(evaluate(ps.model, test, which, living, args, device), TESTED + 1)
        except Expelled as error:
            print(f"rank {comm.rank}: {error}; it joins again", flush=True)
            ps.join()
    ps.leave()


def train_shares(ps: ParameterServer, loader: md.data.Loader, epoch: int, args: Any, slow: Straggler) -> np.ndarray:
    """One epoch of this worker's; returns the sum of the losses, and the samples."""
    total = np.zeros(2)
    for start, size in ps.shares(epoch):  # D.3(2): the share that it is dealt
        # D.3(3) Each worker trains on its own share. D.3(4) Gradients are pushed while backward goes on ...
        before = total[0]
        if size:
            ps.zero_grad()
            with slow.computing(lambda: ps.worker.waited):
                for piece in range(args.accumulate):
                    part = md.collectives.chunk_slice(size, args.accumulate, piece)
                    images, labels = loader.take(epoch, start + part.start, part.stop - part.start)
                    with ps.comm.step("D.3(3) train"):
                        total += train_on(ps, images, labels, size, last=piece == args.accumulate - 1)
            ps.comm.value("loss", (total[0] - before) / size)
        ps.step()  # ... and the parameters come before the next forward.
    return total


def train_on(ps: ParameterServer, images: Any, labels: Any, size: int, last: bool) -> tuple[float, int]:
    """A share, or a piece of one of `size` samples; returns the sum of the losses, and the samples."""
    with nullcontext() if last else ps.no_sync():
        logits = ps.model(md.Tensor(images))
        loss = F.cross_entropy(logits, md.Tensor(labels), reduction="sum") / size
        loss.backward()
    return loss.item() * size, len(labels)


@md.no_grad()
def evaluate(model: md.nn.Module, test: Any, which: int, living: int, args: Any, device: str) -> tuple[int, int]:
    """This worker's part of the test images: how many it gets right, of how many."""
    deal: Any = partial(md.data.Loader, dtype=args.dtype, device=device, shuffle=False)
    loader = deal(*test, batch_size=1000 * living, rank=which, size=living)
    right = tried = 0
    for images, labels in loader.epoch(0):
        right += int((model(md.Tensor(images)).argmax(1) == md.Tensor(labels)).sum())
        tried += len(labels)
    return right, tried


class Teller:
    """Rank 0's terminal, and the result."""

    def __init__(self, ps: ParameterServer, args: Any, comm: Communicator, device: str, samples: int):
        self.comm, self.args, self.device, self.samples = comm, args, device, samples
        self.epoch, self.seconds, self.took, self.loss = 0, 0.0, 0.0, float("nan")
        self.since = comm.clock()
        speaks = comm.rank == 0 and not args.quiet
        self.say: Any = (lambda text: print(text, flush=True)) if speaks else (lambda text: None)
        roles = ps.roles
        parameters = sum(p.numel() for p in ps.model.parameters())
        self.say(f"{parameters:,} {args.dtype} parameters, {samples:,} images, batch {args.batch_size}")
        scheduler = "a scheduler, " if roles.copies else ""
        copies = f" with {roles.copies} cop{'y' if roles.copies == 1 else 'ies'}" if roles.copies else ""
        self.say(
            f"{comm.size} ranks on {device}: {scheduler}{args.servers} server{'s' * (args.servers > 1)}{copies}, "
            f"{len(roles.workers)} worker{'s' * (len(roles.workers) > 1)}, {args.consistency}, "
            f"{args.optimizer} lr {args.lr}"
        )
        self.bar = tqdm(
            total=samples, unit=" samples", unit_scale=True, leave=False, mininterval=0.25, ncols=88, disable=not speaks
        )
        self.result: dict[str, Any] = {}

    def trained(self, samples: int) -> None:
        """A worker has."""
        self.bar.update(samples)

    def met(self, label: int, sums: np.ndarray, workers: int) -> None:
        """The workers have met."""
        now = self.comm.clock()
        if label == TRAINED:
            self.took = now - self.since
            self.seconds += self.took
            self.loss = sums[0] / max(sums[1], 1)
        elif len(sums):
            self.epoch += 1
            self.since = now
            self.bar.clear()
            accuracy = sums[0] / max(sums[1], 1)
            self.comm.value("accuracy", accuracy)
            self.comm.mark("D.3(5)", f"epoch {self.epoch} of {self.args.epochs} is over")
            self.say(epoch_in_words(self.epoch - 1, self.args.epochs, self.loss, accuracy, self.samples, self.took))
            self.bar.reset()
            self.result = {
                "strategy": f"parameter-server {self.args.consistency} servers={self.args.servers}",
                "ranks": self.comm.size,
                "mesh": {"dp": workers},
                "epochs": self.epoch,
                "seconds": self.seconds,
                "samples_per_second": self.epoch * self.samples / self.seconds,
                "train_loss": float(self.loss),
                "test_accuracy": float(accuracy),
                "device": self.device,
            }
