"""Training on a mesh: every axis at once, and each step of the document's M.2 and D.3 where it happens.

    a batch          dp, ep     every rank has its share of the samples
    a sequence       cp         and of their tokens
    the layers       pp         stages, and microbatches that go down and up the pipeline
    a layer          tp, ep     slices of its weights; experts

    M.2(1), D.3(1)   initialise the parameters       every rank draws the whole model; replicas start from one copy
    M.2(2)           partition the model             Pipeline; the layers themselves for tp and ep
    D.3(2)           partition the data              the caller deals samples over dp and ep; `step` tokens over cp
    M.2(3), D.3(3)   train                           Pipeline.step
    M.2(4), D.3(4)   combine, synchronise            inside of layers, between stages; then gradients, over replicas
    M.2(5), D.3(5)   repeat                          the caller's loop

Whatever the mesh, the weights are those of one rank that trains on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from ..collectives import all_reduce, broadcast
from ..mesh import Mesh
from ..nn import Parameter, Sequential
from ..optim import GradScaler, Optimizer
from ..optim.clip import clip_arrays
from ..optim.optimizer import Part
from .buckets import Bucket
from .context import zigzag_take
from .meter import Meter
from .overflow import any_rank
from .pipeline import Loss, Pipeline
from .sharded import ShardedOptimizer
from .stages import where_to_cut
from .starting import check_algorithm
from .whole import gather_state, load_state, splits_of


class Trainer:
    """A model, an optimizer and a mesh, ready to train. Every rank of the mesh makes it, with the same model.

        mesh = Mesh(md.comm.world(), dp=2, pp=2)
        trainer = Trainer(model, lambda parameters: AdamW(parameters, lr=1e-3), mesh, F.cross_entropy, microbatches=4)
        for x, y in loader.epoch(0):        # the share of this rank's place in dp and ep; the same along other axes
            loss = trainer.step(x, y)

    model      a Sequential, whole: made from the same seed on every rank, of layers that know the axes they are split
               over
    optimizer  makes one, of the parameters it is given: those of this rank
    loss       of output and target, the mean over the samples
    zero       what is sharded over the ranks that have the same parameters: 0 nothing, 1 the optimizer's state, 2
               gradients too (whole ones are there while microbatches add up); see sharded.py
    algorithm  of the all_reduce (with zero: reduce_scatter and all_gather) over gradients
    clip       scale gradients so that the norm of all of them is at most this
    scaler     scales the loss, for layers in half precision (and an optimizer with master weights); the ranks of the
               mesh agree on what is an overflow. `loss` must cast: lambda y, t: F.cross_entropy(y.float(), t)
    schedule, microbatches, chunks, cut, sample   see Pipeline

    module, pipeline, meter   this rank's layers; how they run; where time and memory went (what layers of tp, cp and ep
                              say to one another counts as computing)

    Cost    beside what layers and pipeline send: a step's gradients over the replicas, 2 n (P-1)/P bytes for n bytes;
            and three all-reduces of a few numbers (four with clip)
    Errors  ValueError: another `zero` or algorithm, and those of Pipeline
    """

    def __init__(
        self,
        model: Sequential,
        optimizer: Callable[[list[Parameter]], Optimizer],
        mesh: Mesh,
        loss: Loss,
        schedule: str = "1f1b",
        microbatches: int = 1,
        chunks: int = 1,
        cut: str | Sequence[int] = "bytes",
        sample: Array = None,
        zero: int = 0,
        algorithm: str = "auto",
        clip: float | None = None,
        scaler: GradScaler | None = None,
    ):
        if zero not in (0, 1, 2):
            raise ValueError(f"zero={zero}: on a mesh, choose 0 (nothing sharded), 1 (the optimizer's state) or 2")
        check_algorithm(algorithm, *(("reduce_scatter", "all_gather") if zero else ("all_reduce",)))
        self.mesh, self.clip = mesh, clip
        self.scaler = GradScaler(enabled=False) if scaler is None else scaler
        self.scaler.agree = any_rank(mesh.comm)
        # M.2(2) Partition the model. Where to cut is measured on one rank for all.
        stops = where_to_cut(model, mesh.pp.size * chunks, cut, mesh.comm, sample)
        self.pipeline = Pipeline(model, mesh.pp, loss, schedule, microbatches, chunks, stops)
        self.module = self.pipeline.module
        self.shares = mesh.along("dp", "ep")  # ranks with other samples
        replicas = mesh.along("dp", "ep", "cp")  # ranks with the same parameters: all but their experts
        self.splits = splits_of(self.module)
        experts = {p for p, (_, comm) in self.splits.items() if comm is mesh.ep and comm.size > 1}
        parameters = list(self.module.parameters()) or [Parameter(backend.full((0,), 0))]  # a stage may have none
        inner = optimizer(parameters)
        inner.parts = [piece for part in inner.parts for piece in _apart(part, experts)]
        among = {part: mesh.along("dp", "cp") for part in inner.parts if part.flat.parameters[0] in experts}
        # M.2(1), D.3(1) Initialise the parameters: all who have the same start from the first one's.
        with mesh.comm.step("M.2(1) initialise"):
            for part in inner.parts:
                broadcast(among.get(part, replicas), part.flat.data)
                part.flat.changed()
            for _, buffer in self.module.named_buffers():
                broadcast(replicas, buffer.data)
        self.meter = Meter(mesh.comm, inner)
        self.optimizer: Any = inner
        if zero:
            self.optimizer = ShardedOptimizer(inner, self.module, replicas, zero, algorithm, self.meter, among)
        self.buckets = [
            Bucket(part, among.get(part, replicas), zero, algorithm, None, self.meter) for part in inner.parts
        ]
        self._replicas = replicas
        self._once = {p for p in parameters if self._counts_here(p)}

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, x: Array, target: Array) -> float:
        """Train on a global batch, of which this is this rank's share; returns its mean loss, on every rank.

        x, target  (samples, …); with cp (samples, tokens, …), whole sequences, of which this rank takes its part
        """
        self.optimizer.zero_grad()
        # D.3(3), M.2(3) Forward and backward. A gradient weighs as much as the share it comes from: then plain means
        # over ranks, as below, give that of the mean over all samples.
        share = self._weight(x, target)
        scale = self.scaler.get_scale()
        mine = self.pipeline.step(self._part(x), self._part(target), share * scale) / scale
        for span in self.pipeline.spans:
            self.meter.has_waited(span.start, span.ready)
        # D.3(4) Synchronise: average gradients over the ranks that have the same parameters.
        with self.meter.waiting(), self.mesh.comm.step("D.3(4) average gradients"):
            self._average()
            self.scaler.unscale_(self.optimizer)
            if self.clip is not None:
                self._clip(self.clip)
            loss = all_reduce(self.mesh.comm, np.array([mine]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.meter.end_step()
        self.meter.weigh(self.pipeline.activation_bytes)
        return float(loss[0]) * self.mesh.pp.size / self.mesh.comm.size

    def evaluate(self, x: Array, target: Array, loss: Loss | None = None) -> float:
        """The mean loss (or another mean over samples) of a global batch, on every rank; nothing is trained."""
        self.module.eval()
        mine = self.pipeline.evaluate(self._part(x), self._part(target), loss) * self._weight(x, target)
        self.module.train()
        return float(all_reduce(self.mesh.comm, np.array([mine]))[0]) * self.mesh.pp.size / self.mesh.comm.size

    def _weight(self, x: Array, target: Array) -> float:
        """How many times the mean share this rank's is."""
        samples = all_reduce(self.shares, np.array([float(len(x))]))[0]
        tokens = 1.0 if self.mesh.cp.size == 1 else self._part(target).shape[1] * self.mesh.cp.size / target.shape[1]
        return len(x) * self.shares.size / max(samples, 1.0) * tokens

    def _part(self, sequences: Array) -> Array:
        """D.3(2) Partition the data: this rank's tokens of each sequence."""
        return sequences if self.mesh.cp.size == 1 else zigzag_take(sequences, self.mesh.cp, 1)

    def _average(self) -> None:
        for bucket in self.buckets:
            # 1. A parameter that no rank has used gets no gradient, as on one rank.
            used = all_reduce(bucket.comm, np.array(bucket.pending(), np.uint8), "max")
            if used.any():
                # 2. Add up, and divide: in place, or this rank's chunk of it.
                bucket.start(None, background=False)
                bucket.finish()
                bucket.note(used.astype(bool).tolist())

    # -- the norm of all gradients -----------------------------------------------------------------------------------

    def _counts_here(self, p: Parameter) -> bool:
        """Whether this rank counts a parameter that ranks of tp may have the same of, or other stages."""
        split = self.splits.get(p)
        first_stage = all(group.rank == 0 for tied, group in self.pipeline.tied if tied is p)
        return first_stage and (self.mesh.tp.rank == 0 or (split is not None and split[1] is self.mesh.tp))

    def _clip(self, most: float) -> None:
        """Scale the gradients by their norm over all ranks, in which each number counts once."""
        counted: list[Array] = []
        uncounted: list[Array] = []
        scales: list[float] = []
        for bucket in self.buckets:
            part, flat = bucket.part, bucket.part.flat
            alone = bucket.zero or bucket.comm.rank == 0
            for p, used, (start, stop) in zip(flat.parameters, flat.gradients(), flat.bounds, strict=True):
                a, b = max(start - part.start, 0), min(stop, part.stop) - part.start
                if used and a < b:
                    (counted if alone and p in self._once else uncounted).append(part.grad[a:b])
            scales += [flat.grad_scale] * (len(counted) - len(scales))
        counted.append(backend.full((1,), 0, flat.dtype, flat.device))  # a rank may have none
        add_up = lambda own: all_reduce(self.mesh.comm, own.astype(np.float64)).astype(own.dtype)  # noqa: E731
        clip_arrays(counted, most, combine=add_up, uncounted=uncounted, scales=[*scales, 1.0])

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """The whole model's, on every rank, by the names it has on one. Every rank calls it; see whole.py."""
        return gather_state(self.module, self.mesh.pp, self.pipeline.layout)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over this rank's part of a whole state, from whatever mesh.

        Errors  KeyError: names that are missing, or too many; ValueError: another shape
        """
        names = {name for name, _ in self.pipeline.layout}
        missing, unexpected = sorted(names - state.keys()), sorted(state.keys() - names)
        if missing or unexpected:
            raise KeyError(f"load_state_dict: missing {missing}, unexpected {unexpected}")
        load_state(self.module, state)


def _apart(part: Part, experts: Iterable[Parameter]) -> list[Part]:
    """Cut where parameters and experts meet: a part has the ones or the others."""
    kinds = [p in experts for p in part.flat.parameters]
    stops = [i for i, (a, b) in enumerate(pairwise(kinds), start=1) if a != b]
    return part.split([*stops, len(kinds)]) if stops else [part]
