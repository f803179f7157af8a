"""Master weights: parameters in half precision, and of each a float32 copy that the optimizer updates.

    forward, backward     float16 parameters, float16 activations, float16 gradients
    step, piece by piece  gradient -> float32,  master -= lr * ...,  parameter = master, rounded

float16 has 11 bits: 1 - 0.0001 is 1. An update 5,000 times smaller than its parameter is lost, every time, however many
there are; in the master they add up. Of n parameters are held 2 n bytes, 2 n of gradients, and 4 n of masters beside
the optimizer's state in float32, with Adam 12 n in all: K = 12 in parallel/sharded.py. Masters are sharded as the state
that they are: from zero=1 on each rank has 1/P of them.

Source  Micikevicius et al. 2018, Mixed Precision Training, section 3.1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..backend import namespace
from ..nn.flat import FlatBuffer
from .optimizer import Group, Optimizer, Part, Piece, Scratch

MASTER = "master"


def with_master_weights(optimizer: Optimizer) -> Optimizer:
    """Let an optimizer keep a float32 master of every half-precision parameter; returns it.

        model.half()
        optimizer = optim.with_master_weights(optim.AdamW(model.parameters()))

    Call it before the first step, and before data_parallel. The state, in float32 now, has the masters under "master".
    Parameters that are changed by others (load_state_dict, say) are taken over into their masters at the next step.

    Errors  TypeError: not an optimizer, as one that data_parallel returned; ValueError: no half-precision parameter;
            RuntimeError: after its first step
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"with_master_weights takes an optimizer, before data_parallel, not {type(optimizer).__name__}")
    dtypes = {part.flat.dtype.name for part in optimizer.parts}
    if "float16" not in dtypes:
        raise ValueError(
            f"with_master_weights: the parameters are {', '.join(sorted(dtypes))}: call model.half() first"
        )
    if any(part.state for part in optimizer.parts):
        raise RuntimeError("with_master_weights: before the optimizer's first step only")
    optimizer.parts = [
        MasterPart(part.group, part.flat) if part.flat.dtype == np.float16 else part for part in optimizer.parts
    ]
    return optimizer


class MasterPart(Part):
    """A part whose update is calculated in float32. Among its state are the masters.

    seen  of each parameter, the count of its in-place changes after our last step; where it is another one by now,
          somebody else has changed it
    """

    num_scratch = 3  # the third for the gradient

    def __init__(self, group: Group, flat: FlatBuffer):
        super().__init__(group, flat)
        self.loaded()

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32)

    def allocate(self, names: tuple[str, ...], scratch: Scratch) -> None:
        super().allocate((*names, MASTER), scratch)

    def loaded(self) -> None:
        self.seen = [-1] * len(self.flat.parameters)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        self._follow()
        yield from super().runs()
        self.seen = [p._version[0] for p in self.flat.parameters]

    def _follow(self) -> None:
        """Take over parameters that others have changed. Numbers that are the master's, rounded, leave it as it is."""
        for before, p, (start, stop) in zip(self.seen, self.flat.parameters, self.flat.bounds, strict=True):
            start, stop = max(start, self.start) - self.start, min(stop, self.stop) - self.start
            if before != p._version[0] and start < stop:
                master, data = self.state[MASTER][start:stop], self.data[start:stop]
                namespace(data).copyto(master, data, where=master.astype(data.dtype) != data)

    def updates(self, start: int, stop: int) -> Iterable[Piece]:
        for data, grad, state, t, u, wide in self.pieces(start, stop):
            wide[...] = grad
            if self.flat.grad_scale != 1:
                wide *= 1 / self.flat.grad_scale
            yield state[MASTER], wide, state, t, u
            data[...] = state[MASTER]
