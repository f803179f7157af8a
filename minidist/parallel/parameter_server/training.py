"""Data parallelism with a parameter server: a model and its optimizer, trained by workers and servers.

The document's five steps, and where they are:

    D.3(1) initialise the parameters                 every worker's first pull: the servers' values
    D.3(2) partition the data over the nodes         `shares`, dealt by the scheduler (dealing.py)
    D.3(3) each node trains on its own               forward and backward
    D.3(4) synchronise through communication         push and pull, layer by layer
    D.3(5) repeat 3 and 4 until done                 the caller's loop

    backward    layer 3 | layer 2 | layer 1 |                    a layer's gradient is pushed as soon as it is there
    pushes              3 ......  2 ......  1 ......
    pulls                                     1 ...... 2 ...... 3 ......    asked for, and answered, first layers first
    forward                                          | layer 1 | layer 2 | layer 3      waits for its own layer only

Source  Li et al. 2014, algorithm 1; of the order of the layers: Jayarajan et al. 2019, "Priority-based parameter
        propagation for distributed DNN training" (P3)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from ...autograd import is_grad_enabled
from ...comm import Communicator
from ...nn import Embedding, Module
from ...nn.flat import flatten
from ...optim import Optimizer
from ...optim.optimizer import Part
from ...watcher import current_watchers
from ..buckets import cut_by_layer, owners_of
from .consistency import Synchronous, consistency_of
from .dealing import BY_SPEED, EVEN, IN_TURN, Dealer, Share
from .keys import Key, Layout, Roles, Stretch
from .layer import Layer
from .messages import Expelled, RunOver
from .node import Node
from .report import Report
from .scheduler import OnMeet, OnSamples, Scheduler
from .server import Server
from .store import OptimizerUpdate, Store, Update
from .worker import Worker


class ParameterServer:
    """A model trained by the workers among the ranks of `comm`, its parameters kept by servers. Every rank makes one.

        ps = md.parallel.ParameterServer(model, optimizer, comm, servers=1, consistency="ssp:3",
                                         samples=len(labels), batch_size=128)
        if ps.serves:
            report = ps.serve()                              # until all workers have left
        else:
            for epoch in range(10):
                for start, size in ps.shares(epoch):         # of the epoch's samples, this worker's next
                    ps.zero_grad()
                    criterion(model(images), labels).backward()
                    ps.step()                                # pushes the gradients, pulls the parameters
            ps.leave()

    The first ranks serve: rank 0 is scheduler and server, 1 … servers - 1 are servers; all others are workers. With
    `copies`, rank 0 is scheduler only, and the servers are 1 … servers. Every rank builds the same model and optimizer;
    the optimizer works on the servers. Afterwards the model of rank 0 has the final parameters.

    consistency  "bsp", "backup:B", "ssp:S", "async", "async-scaled" or "async-dc:X", see consistency.py
    optimizer    one of ours; or what the servers are to do with a gradient: update(values, gradient, scale), in place
    copies       other servers that hold a copy of each shard; as many may die
    sharding     "range" or "hash", see keys.py
    samples, batch_size   of an epoch, and of a step of all workers together: what `shares` deals
    balanced     ssp only: shares as long as workers are fast
    deadline     seconds without a sign of life after which a rank is taken for dead. Workers give them between layers
    absent       ranks of workers that the run does not wait for; they `join` when they come
    sparse       of nn.Embedding, only the rows that a step uses are pulled and pushed
    Cost         a step of a worker, n bytes of parameters: n pushed, n pulled, 2 messages each way for each key; a
                 server of W workers and S servers: W n / S in and W n / S out
    Errors       ValueError: no worker would be left; another consistency or sharding. WorkerLost (in `serve`): a worker
                 has died, and bsp can't go on. Expelled (at a worker): it was taken for dead; it may `join` again
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer | Update,
        comm: Communicator,
        servers: int = 1,
        consistency: str = "bsp",
        copies: int = 0,
        sharding: str = "range",
        samples: int = 0,
        batch_size: int = 1,
        balanced: bool = True,
        deadline: float = 30.0,
        absent: Collection[int] = (),
        sparse: bool = False,
    ):
        self.roles = Roles(comm.size, servers, copies)
        self.consistency = consistency_of(consistency)
        workers = self.roles.workers
        synchronous = self.consistency.synchronous
        self.consistency.begin(len(workers), copies)
        if not deadline > 0:
            raise ValueError(f"deadline={deadline}: expected seconds above 0")
        strange = sorted(set(absent) - set(workers))
        if strange:
            raise ValueError(f"absent={sorted(absent)}: the workers are {workers}")
        self.model = model
        parts = (
            optimizer.parts if isinstance(optimizer, Optimizer) else [Part({}, f) for f in flatten(model.parameters())]
        )
        owner, place = owners_of(model), {p: i for i, p in enumerate(model.parameters())}
        self.parts = [piece for part in parts for piece in cut_by_layer(part, model)]
        self.parts.sort(key=lambda part: place.get(part.flat.parameters[0], -1))
        self.layout = Layout([_stretch(i, part) for i, part in enumerate(self.parts)], servers, sharding)
        self.optimizer = optimizer
        self.heartbeat, self.deadline = deadline / 4, deadline
        if self.consistency.goes_on:
            comm.outlive()
        group = comm.split(0)
        assert group is not None
        self.comm = group
        how = IN_TURN if not self.consistency.bounded else BY_SPEED if balanced and not synchronous else EVEN
        self.dealer = Dealer(samples, batch_size, len(workers), how)
        self._absent = frozenset(absent)
        self.serves = comm.rank not in workers
        self.clock = self._samples = 0
        self._layers: list[Layer] = []
        self.syncing = True
        if self.serves:
            return
        # A worker.
        self.worker = Worker(self.comm, self.roles, self.layout, self.heartbeat)
        for i, part in enumerate(self.parts):
            module = owner.get(part.flat.parameters[0], model)
            rows = sparse and isinstance(module, Embedding) and len(part.flat.parameters) == 1
            self._layers.append(Layer(self, part, self.layout.of_stretch(i), rows))
            module.register_forward_pre_hook(self._layers[-1].before)
        model.register_forward_pre_hook(self._count)
        self._asked: int | None = None  # the request for a share
        self._share = Share(-1, 0, 0)
        self._began = self._idle = 0.0
        if comm.rank not in self._absent:
            self.join()

    # -- a server -------------------------------------------------------------------------------------------------

    def serve(self, on_meet: OnMeet | None = None, on_samples: OnSamples | None = None) -> Report | None:
        """Serve until all workers have left. Returns the report on rank 0, None on the other servers.

        on_meet     called on rank 0 with (label, sums, workers) each time that the workers meet
        on_samples  called on rank 0 with the number of samples that a worker has just trained on
        Errors   WorkerLost: somebody has died without whom it does not go on
        """
        node, rank = Node(self.comm, self.roles, self.heartbeat), self.comm.rank
        with self.comm.step("D.3(4) serve"):
            if rank in self.roles.server_ranks:
                arguments = (self.comm, node.post, self.roles, self.layout, self.consistency, self._store)
                node.server = Server(*arguments)
            if rank != self.roles.scheduler:
                with suppress(Expelled, RunOver):  # the others go on without us
                    node.run(lambda: node.server is not None and node.server.stopped)
                return None
            scheduler = node.scheduler = Scheduler(
                self.comm,
                node.post,
                self.roles,
                self.consistency,
                self.dealer,
                self.deadline,
                self._absent,
                on_meet,
                on_samples,
            )
            node.run(scheduler.all_have_left)
            scheduler.stop([self.parts[key.stretch].flat.data[key.start : key.stop] for key in self.layout.keys])
            node.run(lambda: not scheduler.stopping)
            for part in self.parts:
                part.flat.changed()
            return scheduler.report

    def _store(self, key: Key) -> Store:
        """What a server begins with, for a key of its own or one that it has a copy of. D.3(1)"""
        part = self.parts[key.stretch]
        data = part.flat.data[key.start : key.stop].copy()
        if isinstance(self.optimizer, Optimizer):
            return Store(key, data, OptimizerUpdate(self.optimizer, part, key.start, key.stop))
        return Store(key, data, self.optimizer)

    # -- a worker -------------------------------------------------------------------------------------------------

    def join(self) -> int:
        """Take part from now on (again, if it was expelled). Returns the clock to begin with.

        D.3(1): the parameters are the servers'.
        """
        with self.comm.step("D.3(1) initialise"):
            self._asked = None
            self.clock = self.worker.register()
            for layer in self._layers:
                layer.reset()
            self._ask_for_share(0, 0.0)
            self.pull()
        return self.clock

    def shares(self, epoch: int) -> Iterator[tuple[int, int]]:
        """D.3(2): this worker's stretches (start, size) of an epoch's samples, one a step; until it is dealt out.

        Call `step` after each. A share may be empty (size 0): then just `step`.
        """
        while self.share().epoch <= epoch:
            share = self._share
            self._began, self._idle = self.comm.clock(), self.worker.waited
            self._samples = 0
            yield share.start, share.size

    def share(self) -> Share:
        """The share for the present clock."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            with self.comm.step("D.3(2) share"):
                dealt = self.worker.wait(asked)
            self._share = Share(dealt.stamp, dealt.start, dealt.size)
        return self._share

    def count(self, samples: int) -> None:
        """Say how many samples the gradients are of, where that is not the length of the model's first argument."""
        self._samples = samples

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for layer in self._layers:
            for p in layer.part.flat.parameters:
                p.forget_grad()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here leave gradients to add up; the next one outside pushes the sums."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before
            for layer in self._layers:
                layer.missing = len(layer.trained)

    def step(self) -> None:
        """D.3(4): push what backward has not pushed yet, and ask for the parameters and a share for the next clock.

        It does not wait for them: each layer's forward does.
        """
        worker = self.worker
        seconds = self.comm.clock() - self._began - (worker.waited - self._idle)
        with self.comm.step("D.3(4) push"):
            for layer in self._layers:
                layer.push()
            worker.flush()
        # How far are we? With backup workers the others may have closed our round, and more.
        self.clock += 1
        if isinstance(self.consistency, Synchronous) and self.consistency.backup:
            with self.comm.step("D.3(4) acknowledged"):
                self.clock = max([self.clock, *(layer.acknowledged() for layer in self._layers)])
        self._ask_for_share(self._samples, max(seconds, 0.0))
        self._ask_for_values()
        worker.poll()
        for watcher in current_watchers():
            watcher.update_ends()

    def pull(self) -> None:
        """Have the parameters of the present clock, all of them, now."""
        self._ask_for_values()
        with self.comm.step("D.3(4) pull"):
            for layer in self._layers:
                layer.arrived()

    def meet(self, numbers: Any = (), label: int = 0) -> tuple[np.ndarray, int, int]:
        """Wait for all living workers; returns the sums of their numbers, and (which, of how many) this worker is."""
        for layer in self._layers:
            layer.arrived()
        with self.comm.step("D.3(5) meet"):
            return self.worker.barrier(numbers, label, self.share().epoch)

    def leave(self) -> None:
        """This worker is done. Its model keeps the parameters that it pulled last."""
        self.share()
        self.worker.leave(self.clock)

    def _ask_for_share(self, samples: int, seconds: float) -> None:
        if self._asked is not None:
            self.share()
        self._asked = self.worker.clock(self.clock, samples, seconds)

    def _ask_for_values(self) -> None:
        for layer in self._layers:  # the first layers first
            layer.pull()
        self.worker.flush()

    def _count(self, _: Module, arguments: tuple[Any, ...]) -> None:
        if is_grad_enabled() and arguments:
            self._samples += len(arguments[0])


def _stretch(number: int, part: Part) -> Stretch:
    flat = part.flat
    only = flat.parameters[0] if len(flat.parameters) == 1 else None
    width = int(np.prod(only.shape[1:])) if only is not None and len(only.shape) > 1 and only.data.size else 1
    return Stretch(f"layer {number}", flat.size, flat.dtype, width)
