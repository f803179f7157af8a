"""Buckets: gradients that travel together, while backward is still busy with the layers before.

    parameters   layer 1 | layer 2 | layer 3 | layer 4        backward finishes the last layers first
    buckets      |----- 1 -------- | ------- 0 ------|

    backward     layer 4 | layer 3 | layer 2 | layer 1 |
    network                        | bucket 0 ......... | bucket 1 ... | then the optimizer's step

A bucket is a flat buffer of its own: a stretch of the parameters. Large buckets waste little on latency, small ones can
start sooner. All ranks start them in the same order, however the gradients come.

Source  Li et al. 2020, PyTorch Distributed, section 3.2
"""

from __future__ import annotations

from ..backend import Array
from ..collectives import all_reduce, reduce_scatter
from ..collectives.choice import USUAL
from ..collectives.tuning import Tuning
from ..comm import Communicator
from ..comm.handle import Handle
from ..comm.record import END, START
from ..nn import Module, Parameter
from ..optim.optimizer import Part
from ..tensor import Tensor
from .compression import Make
from .meter import Meter

LEAST, MOST = 1 << 20, 25 << 20  # bytes of a bucket, where its size is chosen
SHARDED = 4 << 20  # bytes: with zero=2 a bucket's gradients are all there at once, and later a part of them only


def size_of_buckets(comm: Communicator, zero: int) -> int | None:
    """Bytes; None for all gradients of a dtype in one.

    Between ranks of one host, messages are carried by the cores that compute: there is nothing to hide behind, and one
    large message costs the least. Between hosts a bucket is so large that latency is a tenth of its time on the way,
    by the figures that `python -m minidist.comm tune` has measured, or usual ones.
    """
    if zero >= 2:
        return SHARDED
    if len(set(comm.hosts())) == 1:
        return None
    network = comm.network
    if network is None:
        tuning = Tuning.read(comm.tuning)
        network = USUAL if tuning is None else tuning.network
    link = network.between or network
    if not link.beta:
        return MOST
    return int(min(max(9 * comm.size * link.alpha / link.beta, LEAST), MOST))


def cut(part: Part, nbytes: int | None) -> list[Part]:
    """A part of the optimizer for each bucket: at least `nbytes` each, counted from the last parameter."""
    stops, size = [len(part.flat.parameters)], 0
    for i in range(len(part.flat.parameters) - 1, 0, -1):
        size += part.flat.parameters[i].data.nbytes
        if nbytes is not None and size >= nbytes:
            stops.insert(0, i)
            size = 0
    return [part] if len(stops) == 1 else part.split(stops)


def cut_by_layer(part: Part, model: Module) -> list[Part]:
    """A part for each module's own parameters."""
    owner = owners_of(model)
    owners = [owner.get(p) for p in part.flat.parameters]
    stops = [i for i in range(1, len(owners)) if owners[i] is not owners[i - 1]]
    return part.split([*stops, len(owners)]) if stops else [part]


def owners_of(model: Module) -> dict[Parameter, Module]:
    """Of each parameter the module that has it as an attribute; the whole model, if several have."""
    owner: dict[Parameter, Module] = {}
    for module in model.modules():
        for p in module.own_parameters():
            owner[p] = model if p in owner else module
    return owner


class Bucket:
    """One flat buffer's gradients, added up over all ranks.

    zero  0: in place. 1: in place too, but of this rank's chunk only. 2, 3: this rank's chunk is added to the part's
          own gradients, and the whole is let go of
    """

    final = False  # whether an average may not be added to, also with zero=0

    def __init__(self, part: Part, comm: Communicator, zero: int, algorithm: str, make: Make | None, meter: Meter):
        self.part, self.comm, self.zero, self.algorithm, self.meter = part, comm, zero, algorithm, meter
        self.compression = None if make is None else make(comm, part.flat)
        self.used: list[bool] = []  # which parameters had a gradient here, when it started
        self.missing = 0  # parameters whose gradients this backward has not finished so far
        self._reached: set[Tensor] = set()  # those of which it finishes any
        self._handle: Handle | None = None
        self._averaged: dict[Tensor, Tensor] = {}  # gradients that nothing can be added to any more

    def expect(self, leaves: set[Tensor]) -> None:
        """A backward begins, that will reach these."""
        self._reached = {p for p in self.part.flat.parameters if p in leaves}
        self.missing = len(self._reached)

    def pending(self) -> list[bool]:
        """For each parameter, whether it has a gradient that is to be averaged."""
        return [
            p.grad is not None and (p in self._reached or p.grad is not self._averaged.get(p))
            for p in self.part.flat.parameters
        ]

    def skip(self) -> None:
        """No rank has anything in it."""
        self.used = [False] * len(self.part.flat.parameters)

    def start(self, weight: float | None, background: bool, check: bool = True) -> None:
        """Begin to add up. weight: of this rank's gradients in the sum; None where all ranks' are equal."""
        flat = self.part.flat
        if check:
            self.check_fresh()
        gradient = flat.gradient()
        self.used = self.pending()
        self.meter.weigh()
        if weight == 0:
            gradient.fill(0)  # from an empty share may come anything, nan too
        elif weight is not None:
            gradient *= weight
        # Equal shares need the plain mean, for which each rank divides its own chunk only.
        op = "mean" if weight is None else "sum"
        if self.compression is not None:
            self.compression.add_up(gradient)
            return
        reduce = reduce_scatter if self.zero else all_reduce
        # Half precision is too short for sums: 2048 + 1 is 2048.
        accumulate = "float32" if gradient.dtype.itemsize == 2 else None
        result = reduce(self.comm, gradient, op, algorithm=self.algorithm, accumulate=accumulate, async_op=background)
        self._handle = result if background else None

    def check_fresh(self) -> None:
        """Refuse gradients that were added to what an average has left, where they can't be."""
        if any(p.grad is not None and p.grad is self._averaged.get(p) for p in self.part.flat.parameters):
            why = "has the average of a part only" if self.zero else "has the finished average (reproducible)"
            raise RuntimeError(
                f"backward adds to gradients of which, with zero={self.zero}, this rank {why}: call "
                "optimizer.zero_grad() before each backward, or add up under no_sync(), or use another zero"
            )

    def finish(self) -> None:
        """Wait until all is added up."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.wait()
            if handle.entry is not None:
                self.meter.on_its_way(handle.entry[START], handle.entry[END])
        if self.zero >= 2 and self.part.flat.has_gradients:
            self._take(self.part.flat.grad[self.part.start : self.part.stop])
            self.part.flat.release_grad()

    def _take(self, chunk: Array) -> None:
        """Add this rank's chunk to what earlier backwards have left of it."""
        part, has_grad = self.part, self.part.flat.gradients()
        if not any(has_grad):
            part.own_grad[...] = chunk
            return
        for has, (start, stop) in zip(has_grad, part.flat.bounds, strict=True):
            if not has:
                part.own_grad[max(start - part.start, 0) : max(stop - part.start, 0)] = 0
        part.own_grad += chunk

    def note(self, anywhere: list[bool]) -> None:
        """A parameter that only other ranks used has a gradient now. One that nobody used has none, as on one rank."""
        flat = self.part.flat
        if flat.has_grad is not None:
            flat.has_grad = [a or b for a, b in zip(flat.has_grad, anywhere, strict=True)]
            return
        for i, (p, used) in enumerate(zip(flat.parameters, anywhere, strict=True)):
            if used and p.grad is None:
                p.grad = Tensor(flat.room(i))
        if self.zero or self.final:
            self._averaged = {p: p.grad for p in flat.parameters if p.grad is not None}
