"""Pipeline parallelism: a model cut by layers into stages, each on its own rank, fed with microbatches (M.1, M.2).

The document's five steps, and where they are:

    M.2(1) initialise the parameters              the caller: every rank makes the same whole model
    M.2(2) partition the model over the nodes     Pipeline: stages.py cuts it, and each rank keeps its stages
    M.2(3) each node trains its part              _do: in the order that schedules.py says
    M.2(4) combine the results by communication   post.py: activations go down the pipeline, gradients come back up
    M.2(5) repeat 3 and 4 until done              the caller's loop

A schedule is a list of actions for each rank, without any communication in it. One loop carries it out: receive what
the action needs, compute, start to send what came out. A rank waits for nothing but what it is to receive next, so
that no order of sends can deadlock, whatever MPI does with them.

Source  Huang et al. 2019, GPipe; Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters
        using Megatron-LM"; Qi et al. 2023, "Zero bubble pipeline parallelism"
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from .. import backend
from ..autograd import bytes_kept, no_grad
from ..backend import Array
from ..collectives import all_reduce, chunk_slice
from ..comm import Communicator
from ..nn import Sequential
from ..nn.skip import put_aside
from ..split_backward import SplitBackward
from ..tensor import Function, Tensor
from .post import Post
from .schedules import SCHEDULES, Action, BackwardInput, BackwardWeight, Forward
from .stages import Link, plan, where_to_cut

Loss = Callable[[Tensor, Tensor], Tensor]  # of the model's output and the targets: the mean over the samples


class Span(NamedTuple):
    """When an action began, had all it needed, and was done: seconds of the communicator's clock."""

    action: Action
    start: float
    ready: float
    end: float


class Pipeline:
    """This rank's layers of a model, and how they train with those of other ranks.

        pipeline = Pipeline(model, mesh.pp, F.cross_entropy, schedule="1f1b", microbatches=8)
        optimizer = SGD(pipeline.module.parameters(), lr=0.1)
        for x, y in batches:                        # the same on all ranks of the pipeline
            optimizer.zero_grad()
            loss = pipeline.step(x, y)              # forward and backward of all microbatches
            optimizer.step()                        # every rank its own layers

    model         the whole of it, made alike on every rank. The layers of other ranks are let go of
    comm          one rank for each stage, in order; with `chunks`, stage s is on rank s % comm.size
    loss          called where the last stage is
    schedule      one of SCHEDULES
    microbatches  into how many a batch is cut (np.array_split's); a smaller batch into as many as it has samples
    chunks        stages of each rank; more than one with the schedules "interleaved" and "breadth-first" only
    cut           where: "bytes" (as many bytes of parameters in each stage as in the others), "time" (measured, with
                  `sample`), or the numbers of the layers that stages 1, 2, … begin with

    A module that has an attribute `auxiliary_loss` after its forward (a layer of experts) has it added to the loss.
    Parameters that layers of several stages share (a tied embedding) are copied to each, and stay equal.

    module            this rank's layers, under their names in the whole
    layout            (name, rank) of everything in the whole model's state
    spans             what the last step did, and when
    in_flight         the most microbatches, of all chunks, that were between forward and backward
    activation_bytes  the most that the first step has kept for backward

    Cost    for each microbatch and border between stages the activations' bytes forward, as many backward; before the
            first message of a shape another of 80 bytes. A shared parameter: an all_reduce among its stages a step
    Errors  ValueError: an unknown schedule, chunks that it can't have, a cut that does not fit
    """

    def __init__(
        self,
        model: Sequential,
        comm: Communicator,
        loss: Loss,
        schedule: str = "1f1b",
        microbatches: int = 1,
        chunks: int = 1,
        cut: str | Sequence[int] = "bytes",
        sample: Array = None,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: choose {', '.join(SCHEDULES)}")
        if operator.index(microbatches) < 1:
            raise ValueError(f"microbatches={microbatches}: less than 1")
        self.comm, self.loss, self.schedule = comm, loss, SCHEDULES[schedule]
        self.microbatches, self.chunks, self.num_stages = microbatches, chunks, comm.size * chunks
        self._actions(microbatches)  # refuses what the schedule can't do
        # M.2(2) Partition the model: cut it, and keep the stages of this rank.
        whole = plan(model, where_to_cut(model, self.num_stages, cut, comm, sample))
        self._stages = [Sequential(whole.stages[self._stage(chunk)]) for chunk in range(chunks)]
        self.module = Sequential({name: layer for stage in self._stages for name, layer in stage.named_children()})
        held = ", ".join(name for name, _ in self.module.named_children()) or "none"
        comm.mark("M.2(2)", f"of {self.num_stages} stages rank {comm.rank} has {chunks}: layers {held}")
        self.layout = [
            (name, s % comm.size)
            for s, stage in enumerate(whole.stages)
            for name, _ in Sequential(stage)._named_state(True, True)
        ]
        device = next((p.device for p in model.parameters()), "cpu")
        self.post = Post(comm, whole.links, device)
        # Ranks that share a parameter, for each such; on every rank in one order.
        shared = [(p, sorted({s % comm.size for s in users})) for p, users in whole.tied]
        groups = [(p, comm.split(0 if comm.rank in ranks else None)) for p, ranks in shared if len(ranks) > 1]
        self.tied = [(p, group) for p, group in groups if group is not None]
        self._own = set(self.module.parameters())
        self.spans: list[Span] = []
        self.in_flight = self.activation_bytes = 0

    # -- what is called ----------------------------------------------------------------------------------------------

    def step(self, x: Array, target: Array, weight: float = 1.0) -> float:
        """Forward and backward of a batch: adds weight × the gradient of the mean loss to the parameters' gradients.

        x, target  arrays (samples, …), the same on every rank
        returns    this rank's part of weight × the mean loss: all of it on the rank of the last stage, 0 on others;
                   but for auxiliary losses, each of which counts on the rank of its layer
        """
        batch = _Batch(self._cut(x, target), weight, self.loss, training=True)
        self.comm.fact("schedule", self.schedule.name, self.comm.size, len(batch.pieces), self.chunks)
        before = [None if p.grad is None else p.grad.data.copy() for p, _ in self.tied]
        for p, _ in self.tied:
            p.grad = None
        self._run(self._actions(len(batch.pieces)), batch)
        # The gradient of a parameter that several stages use is the sum of theirs.
        for (p, group), earlier in zip(self.tied, before, strict=True):
            if p.grad is None:
                p.grad = Tensor(backend.full(p.shape, 0, p.dtype, p.device))
            with self.comm.step("M.2(4) shared parameters"):
                all_reduce(group, p.grad.data)
            if earlier is not None:
                p.grad.data += earlier
        return batch.total()

    @no_grad()
    def evaluate(self, x: Array, target: Array, loss: Loss | None = None) -> float:
        """The mean loss of a batch (or another mean over samples), as `step` returns it; nothing is trained."""
        batch = _Batch(self._cut(x, target), 1.0, loss or self.loss, training=False)
        self._run([Forward(m, chunk) for chunk in range(self.chunks) for m in range(len(batch.pieces))], batch)
        return batch.total()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _actions(self, microbatches: int) -> list[Action]:
        return list(self.schedule(self.comm.rank, self.comm.size, microbatches, self.chunks)) if microbatches else []

    def _stage(self, chunk: int) -> int:
        return chunk * self.comm.size + self.comm.rank

    def _cut(self, x: Array, target: Array) -> list[_Piece]:
        """The microbatches."""
        if len(x) != len(target):
            raise ValueError(f"{len(x)} samples do not fit {len(target)} targets")
        count = min(self.microbatches, len(x))
        parts = [chunk_slice(len(x), count, m) for m in range(count)]
        return [_Piece(x[part], target[part], len(range(len(x))[part]) / len(x)) for part in parts]

    def _run(self, actions: list[Action], batch: _Batch) -> None:
        """M.2(3) Train this rank's part: do the actions in their order."""
        self.spans = []
        for action, following in zip_longest(actions, actions[1:]):
            start = self.comm.clock()
            with self.comm.step(f"M.2(3) {action}"):
                ready = self._do(action, following, batch)
            self.spans.append(Span(action, start, ready, self.comm.clock()))
            self.comm.fact("action", type(action).__name__, action.micro, action.chunk, *self.spans[-1][1:])
        self.post.finish()
        self.in_flight = max(self.in_flight, batch.in_flight)

    def _do(self, action: Action, following: Action | None, batch: _Batch) -> float:
        """Receive, compute, start to send; returns when all was received. What follows may arrive meanwhile."""
        key = action.micro, action.chunk
        if isinstance(action, Forward):
            inputs = self._receive(action, batch)
            ready = self._expect(following, batch)
            self._forward(action, batch, inputs)
        elif isinstance(action, BackwardWeight):
            ready = self._expect(following, batch)
            batch.halves.pop(key).finish()
        else:
            inputs, seeds = self._receive_gradients(action, batch)
            ready = self._expect(following, batch)
            root = Seeds.apply(*seeds, dys=[*seeds.values()])
            one = backend.full((), 1, root.dtype, root.device)
            if isinstance(action, BackwardInput):
                batch.halves[key] = SplitBackward(root, one, self._own)
            elif root.requires_grad:
                root.backward(one)
            for link, leaf in inputs.items():
                if leaf.requires_grad:
                    dx = backend.namespace(leaf.data).zeros_like(leaf.data) if leaf.grad is None else leaf.grad.data
                    self.post.send_gradient(link, dx)
        return ready

    def _expect(self, action: Action | None, batch: _Batch) -> float:
        """Begin to receive what an action needs, as far as its shape is known; returns the time."""
        if isinstance(action, Forward):
            stage, piece = self._stage(action.chunk), batch.pieces[action.micro]
            for link in self.post.links:
                if link.dest == stage:
                    self.post.expect(link, piece.kind)
        elif action is not None and (kept := batch.kept.get((action.micro, action.chunk))) is not None:
            for link, y in kept.outputs.items():
                self.post.expect_gradient(link, y.data)
        return self.comm.clock()

    def _receive(self, action: Action, batch: _Batch) -> dict[Link, Tensor]:
        """What a forward needs of other stages."""
        stage, piece = self._stage(action.chunk), batch.pieces[action.micro]
        came = {link: self.post.receive(link, piece.kind) for link in self.post.links if link.dest == stage}
        return {link: Tensor(a, requires_grad=batch.training and a.dtype.kind == "f") for link, a in came.items()}

    def _forward(self, action: Action, batch: _Batch, inputs: dict[Link, Tensor]) -> None:
        """Through the layers of a stage. What backward needs of it is kept in the batch."""
        stage, layers, piece = self._stage(action.chunk), self._stages[action.chunk], batch.pieces[action.micro]
        x = next((t for link, t in inputs.items() if not link.name), None)
        with put_aside({link.name: t for link, t in inputs.items() if link.name}) as aside:
            y = layers(Tensor(piece.x) if x is None else x)
        if not isinstance(y, Tensor):
            raise TypeError(f"stage {stage} gave a {type(y).__name__}: a stage hands on one tensor; see Stash and Pop")
        outputs = {link: aside[link.name] if link.name else y for link in self.post.links if link.source == stage}
        for link, t in outputs.items():
            self.post.send(link, t.data, piece.kind)
        losses = []
        if batch.training:
            losses = [loss for m in layers.modules() if (loss := getattr(m, "auxiliary_loss", None)) is not None]
        if stage == self.num_stages - 1:
            losses.append(batch.loss(y, Tensor(piece.target)))
        batch.losses += [(loss.detach(), piece.share * batch.weight) for loss in losses]
        if batch.training:
            batch.keep(action, _Kept(inputs, outputs, losses))
            if not self.in_flight:  # the first step
                self.activation_bytes = max(self.activation_bytes, batch.bytes_kept())

    def _receive_gradients(self, action: Action, batch: _Batch) -> tuple[dict[Link, Tensor], dict[Tensor, Array]]:
        """What a backward needs: the tensors to begin at, each with its gradient; and the inputs, to have theirs."""
        kept, piece = batch.kept.pop((action.micro, action.chunk)), batch.pieces[action.micro]
        seeds: dict[Tensor, Array] = {}
        for link, y in kept.outputs.items():
            dy = self.post.receive_gradient(link, like=y.data)
            seeds[y] = seeds[y] + dy if y in seeds else dy
        for loss in kept.losses:
            seeds[loss] = backend.full(loss.shape, piece.share * batch.weight, loss.dtype, loss.device)
        return kept.inputs, seeds


class Seeds(Function):
    """Where a backward from several tensors begins, each with a gradient of its own."""

    def forward(self, *ys: Array, dys: list[Array]) -> Array:
        self.dys = dys
        return backend.full((), 0, dys[0].dtype, backend.device_of(dys[0]))

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return tuple(self.dys)


# -- one batch -------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A microbatch, and its share of the batch's samples."""

    x: Array
    target: Array
    share: float

    @property
    def kind(self) -> Hashable:
        """Microbatches of one kind give activations of one shape."""
        return self.x.shape, self.x.dtype


class _Kept(NamedTuple):
    """What backward needs of a forward."""

    inputs: dict[Link, Tensor]
    outputs: dict[Link, Tensor]
    losses: list[Tensor]


@dataclass
class _Batch:
    """What is known of a batch on its way through this rank's stages."""

    pieces: list[_Piece]
    weight: float
    loss: Loss
    training: bool
    kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)  # by microbatch and chunk
    halves: dict[tuple[int, int], SplitBackward] = field(default_factory=dict)  # backwards whose weights are to come
    losses: list[tuple[Tensor, float]] = field(default_factory=list)  # each with its weight
    in_flight: int = 0

    def keep(self, action: Action, kept: _Kept) -> None:
        self.kept[action.micro, action.chunk] = kept
        self.in_flight = max(self.in_flight, len(self.kept))

    def bytes_kept(self) -> int:
        """What backward needs: what the layers have saved, and what came from other stages."""
        came = sum(leaf.data.nbytes for kept in self.kept.values() for leaf in kept.inputs.values())
        return came + bytes_kept([t for kept in self.kept.values() for t in (*kept.outputs.values(), *kept.losses)])

    def total(self) -> float:
        return float(sum(loss.item() * share for loss, share in self.losses))
