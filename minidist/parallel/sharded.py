"""Sharding: what every rank would hold alike is held once, 1/P on each rank.

Stage 1 of ZeRO shards the optimizer's state. The two halves of the ring all-reduce come apart, and the update goes in
between:

    gradients  --reduce-scatter-->  rank r has the summed chunk r
               --update-->          rank r updates its chunk of the parameters
    parameters --all-gather-->      every rank has all chunks again

As many bytes travel as in an all-reduce; each rank computes 1/P of the update and keeps 1/P of the state.

Source  Rajbhandari et al. 2020, ZeRO, section 5.1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import backend
from ..collectives import all_gather, chunk_slice
from ..comm import Communicator
from ..optim import Optimizer


class ShardedOptimizer:
    """An optimizer of which each rank keeps and applies 1/P. Made by `data_parallel(…, zero=1)`."""

    def __init__(self, optimizer: Optimizer, comm: Communicator, algorithm: str = "auto"):
        self.optimizer, self.comm, self.algorithm = optimizer, comm, algorithm
        for part in optimizer.parts:
            mine = chunk_slice(part.flat.size, comm.size, comm.rank)
            part.shard(mine.start, mine.stop)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's chunks, then gather all ranks'. Every rank calls it.

        Cost  n (P-1)/P bytes in P - 1 messages a rank, for n bytes of parameters
        """
        loss = self.optimizer.step(closure)
        with self.comm.step("D.3(4) gather parameters"):
            for part in self.optimizer.parts:
                all_gather(self.comm, part.flat.data, algorithm=self.algorithm)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
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
                    part.state[name] = all_gather(self.comm, whole)
            return self.optimizer.state_dict()
        finally:
            for part, start, stop, state in own:
                part.start, part.stop, part.state = start, stop, state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over this rank's part of a whole state."""
        own = [(part, part.start, part.stop) for part in self.optimizer.parts]
        try:
            for part, _, _ in own:
                part.start, part.stop, part.state = 0, part.flat.size, {}
            self.optimizer.load_state_dict(saved)
        finally:
            for part, start, stop in own:
                part.state = {name: array[start:stop].copy() for name, array in part.state.items()}
                part.start, part.stop = start, stop
