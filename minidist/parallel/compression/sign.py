"""One bit a number: its sign; and for each parameter tensor one number, the mean magnitude.

    p = g + e                      what there is to send
    s = mean(|p|) sign(p)          sent, tensor by tensor
    e = p - s                      left for later steps

Source  Karimireddy, Rebjock, Stich & Jaggi 2019, "Error feedback fixes SignSGD and other gradient compression schemes",
        algorithm 1; the idea: Seide et al. 2014, "1-bit stochastic gradient descent"
"""

from __future__ import annotations

import numpy as np

from ...backend import Array, device_of, empty, full, namespace
from ...collectives import all_gather
from ...comm import Communicator
from ...nn.flat import FlatBuffer
from .base import Compression


class Sign(Compression):
    """Signs and mean magnitudes; 0 counts as positive.

    Cost  an all-gather of n numbers' n / 8 bytes and a number a tensor, a rank: for P ranks (P-1) times that, against
          the ring's 8 n (P-1)/P bytes of float32
    """

    def __init__(self, comm: Communicator, flat: FlatBuffer):
        super().__init__(comm, flat)
        self.error = full((flat.size,), 0, flat.dtype, flat.device)

    def add_up(self, gradient: Array) -> None:
        xp, comm, flat, n = namespace(gradient), self.comm, self.flat, gradient.size
        self.error += gradient
        # 1. Signs, eight to a byte, and of each tensor the mean magnitude.
        bits = empty((comm.size, -(-n // 8)), np.uint8, device_of(gradient))
        scales = empty((comm.size, len(flat.bounds)), gradient.dtype, device_of(gradient))
        bits[comm.rank] = xp.packbits(self.error >= 0)
        for i, (start, stop) in enumerate(flat.bounds):
            scales[comm.rank, i] = xp.abs(self.error[start:stop]).mean() if stop > start else 0
        all_gather(comm, bits)
        all_gather(comm, scales)
        # 2. Add up, in the order of ranks; what this rank has sent leaves its memory.
        gradient.fill(0)
        for rank in range(comm.size):
            sent = xp.unpackbits(bits[rank])[:n].astype(gradient.dtype)
            sent *= 2
            sent -= 1
            for i, (start, stop) in enumerate(flat.bounds):
                sent[start:stop] *= scales[rank, i]
            gradient += sent
            if rank == comm.rank:
                self.error -= sent
