"""Some of the numbers only: the largest, or random ones. The others wait in the error memory.

    p = g + e               what there is to send: this step's gradient, and what earlier ones have left
    s = the k chosen of p   sent
    e = p - s               left

Source  Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with memory"; Lin et al. 2018, "Deep gradient compression"
"""

from __future__ import annotations

import numpy as np

from ...backend import Array, asarray, device_of, empty, full, namespace
from ...collectives import all_gather, all_reduce
from ...comm import Communicator
from ...nn.flat import FlatBuffer
from .base import Compression


class Sparse(Compression):
    """Of `share` of the numbers, at least one."""

    def __init__(self, comm: Communicator, flat: FlatBuffer, share: float):
        super().__init__(comm, flat)
        self.count = min(max(1, round(share * flat.size)), flat.size)
        self.error = full((flat.size,), 0, flat.dtype, flat.device)


class TopK(Sparse):
    """The k numbers of largest magnitude: other ones on each rank, so their places travel too.

    Cost  an all-gather of k numbers and k places (int32) a rank: 8 k (P-1) bytes for float32. All ranks' together may
          cover up to k P places, so it grows with P, where a ring does not
    """

    def add_up(self, gradient: Array) -> None:
        xp, comm, k = namespace(gradient), self.comm, self.count
        self.error += gradient
        # 1. Choose, and take out of the memory what is sent.
        chosen = xp.sort(xp.argpartition(xp.abs(self.error), gradient.size - k)[gradient.size - k :])
        places = empty((comm.size, k), np.int32 if gradient.size < 2**31 else np.int64, device_of(gradient))
        numbers = empty((comm.size, k), gradient.dtype, device_of(gradient))
        places[comm.rank], numbers[comm.rank] = chosen, self.error[chosen]
        self.error[chosen] = 0
        # 2. Everybody gets everybody's, and adds them up in the order of ranks.
        all_gather(comm, places)
        all_gather(comm, numbers)
        gradient.fill(0)
        for rank in range(comm.size):
            gradient[places[rank]] += numbers[rank]  # a rank names no place twice


class RandomK(Sparse):
    """k numbers at random places, drawn anew each step, the same on all ranks: only numbers travel.

    Cost  an all-reduce of k numbers
    """

    def __init__(self, comm: Communicator, flat: FlatBuffer, share: float):
        super().__init__(comm, flat, share)
        self.draw = np.random.default_rng(0)  # the same on all ranks

    def add_up(self, gradient: Array) -> None:
        self.error += gradient
        chosen = np.sort(self.draw.choice(gradient.size, self.count, replace=False, shuffle=False))
        chosen = asarray(chosen, np.int64, device_of(gradient))
        numbers = self.error[chosen]
        self.error[chosen] = 0
        all_reduce(self.comm, numbers)
        gradient.fill(0)
        gradient[chosen] = numbers
