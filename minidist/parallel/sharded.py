"""Sharding: what every rank would hold alike is held once, 1/P on each rank.

ZeRO's stages, for n parameters of 2 bytes, gradients of 2, and an optimizer's state of K bytes a parameter (in float32,
with Adam: 4, 4 and 8):

    stage      each rank holds, in bytes         sharded is               sent a step, in parameters
      0        (2 + 2 + K) n                     nothing                  2 n (P-1)/P
      1        (2 + 2) n + K n / P               the optimizer's state    2 n (P-1)/P
      2        2 n + (2 + K) n / P               and the gradients        2 n (P-1)/P
      3        (2 + 2 + K) n / P                 and the parameters       3 n (P-1)/P

(With n = 7.5 billion, K = 12, P = 64: 120, 31.4, 16.6 and 1.9 GB.) The two halves of the ring all-reduce come apart,
and the update goes in between:

    gradients  --reduce-scatter-->  rank r has the summed chunk r        (2: lets go of the others, bucket by bucket)
               --update-->          rank r updates its chunk of the parameters
    parameters --all-gather-->      every rank has all chunks again      (3: layer by layer, just before it is used)

Each rank computes 1/P of the update.

Source  Rajbhandari et al. 2020, ZeRO, sections 5 and 7, figure 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import backend
from ..collectives import all_gather, chunk_slice
from ..comm import Communicator
from ..nn import Module
from ..optim import Optimizer
from ..optim.optimizer import Part
from .layers import Layers
from .meter import Meter


def bytes_per_rank(stage: int, n: int, ranks: int, parameter: int = 4, gradient: int = 4, state: int = 8) -> float:
    """What a rank holds between two steps, by the formula: the last three are bytes a parameter.

    The defaults are those of float32 and Adam. Before it is dealt, the model is made whole on each rank. While it
    computes a rank needs more: activations, with stage 2 a bucket's gradients or two, with stage 3 a layer's and its
    parameters.
    """
    whole = parameter * (stage < 3) + gradient * (stage < 2) + state * (stage < 1)
    return n * whole + n * (parameter + gradient + state - whole) / ranks


class ShardedOptimizer:
    """An optimizer of which each rank keeps and applies 1/P. Made by `data_parallel(…, zero=1)`, or 2, or 3."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: Module,
        comm: Communicator,
        zero: int,
        algorithm: str,
        meter: Meter,
        apart: Mapping[Part, Communicator] | None = None,
    ):
        """`apart`: parts that other ranks than those of comm hold alike, and share out."""
        self.optimizer, self.comm, self.zero, self.algorithm, self.meter = optimizer, comm, zero, algorithm, meter
        self.apart = apart or {}
        for part in optimizer.parts:
            among = self.apart.get(part, comm)
            mine = chunk_slice(part.flat.size, among.size, among.rank)
            part.shard(mine.start, mine.stop)
            if zero >= 2:
                part.own_grad = backend.empty((mine.stop - mine.start,), part.flat.dtype, part.flat.device)
                part.flat.has_grad = [False] * len(part.flat.parameters)
        self.layers = Layers(model, optimizer.parts, comm, algorithm, meter) if zero == 3 else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's chunks, then gather all ranks' (with zero=3 that is left to the next forward).

        Every rank calls it.

        Cost  n (P-1)/P bytes in P - 1 messages a rank, for n bytes of parameters; none with zero=3
        """
        loss = closure() if closure is not None else None
        gathers = []
        several = len(self.optimizer.parts) > 1
        if self.layers is not None:
            self.layers.release_all()
        for part in self.optimizer.parts:
            self.optimizer.update_part(part)
            if part.flat.data is not None:  # with zero=3, in `with whole()` only
                with self.meter.waiting(), self.comm.step("D.3(4) gather parameters"):
                    among = self.apart.get(part, self.comm)
                    handle = all_gather(among, part.flat.data, algorithm=self.algorithm, async_op=several)
                    gathers.append(handle)
        with self.meter.waiting():
            for handle in gathers if several else ():
                handle.wait()
        self.meter.end_step()
        self.meter.weigh()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. With zero=2 and 3 they are gone in any case, and not zeros."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, gathered from all ranks; what an optimizer on one rank would give. Every rank calls it.

        Cost  the state's n (P-1)/P bytes in P - 1 messages a rank, and room for all of it
        """
        own = [(part, part.start, part.stop, part.state) for part in self.optimizer.parts]
        try:
            for part, start, stop, state in own:
                part.start, part.stop, part.state = 0, part.flat.size, {}
                for name, array in state.items():
                    whole = backend.empty((part.flat.size,), array.dtype, backend.device_of(array))
                    whole[start:stop] = array
                    part.state[name] = all_gather(self.apart.get(part, self.comm), whole)
            return self.optimizer.state_dict()
        finally:
            for part, start, stop, state in own:
                part.start, part.stop, part.state = start, stop, state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over this rank's part of a whole state."""
        own = [(part, part.start, part.stop, part.state) for part in self.optimizer.parts]
        loaded = False
        try:
            for part, *_ in own:
                part.start, part.stop, part.state = 0, part.flat.size, {}
            self.optimizer.load_state_dict(saved)
            loaded = True
        finally:
            for part, start, stop, before in own:
                new = {name: array[start:stop].copy() for name, array in part.state.items()}
                part.start, part.stop, part.state = start, stop, new if loaded else before
                part.views.clear()
