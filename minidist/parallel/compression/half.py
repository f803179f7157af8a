"""Gradients in 16 bits on the wire, added up in their own dtype.

    1. round        rank r: its gradient to 16 bits
    2. all-to-all   chunk j of all ranks' goes to rank j
    3. add          rank j: chunk j, in the gradient's dtype (at least float32), and rounds the sum to 16 bits
    4. all-gather   everybody gets all chunks

A ring in 16 bits would round at every hop, P - 1 times; here every number is rounded twice. There is no error memory:
what rounding loses is a 2,000th of a number (float16) or a 256th (bfloat16).

On several hosts with several ranks each only what crosses between hosts is in 16 bits: the ranks of a host first add up
among themselves, and each then does the above on its piece with its peers on the other hosts. So a host's link carries
half of what the hierarchical all-reduce sends over it.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from ...backend import Array, namespace
from ...collectives import all_gather, all_reduce, all_to_all, chunk_slice, reduce_scatter
from ...comm import Communicator
from .base import Compression


class HalfPrecision(Compression):
    """Of float16 and bfloat16.

    Cost  n bytes of float32 send n (P-1)/P bytes a rank, half of the ring's. On H hosts: n (H-1)/H bytes a host to
          others; within it the ring's 2 n (R-1)/R by each of R ranks
    """

    def add_up(self, gradient: Array) -> None:
        hosts = self.comm.hosts()
        if len(set(hosts)) in (1, self.comm.size):
            self.exchange(self.comm, gradient)
            return
        host, across = self.comm.by_host()
        pieces = min(hosts.count(number) for number in set(hosts))  # for as many ranks of each host
        sizes = _sizes(gradient.size, pieces) + [0] * (host.size - pieces)
        piece = reduce_scatter(host, gradient, counts=sizes)
        if host.rank < pieces:
            self.exchange(across, piece)
        all_gather(host, gradient, counts=sizes)

    def exchange(self, comm: Communicator, gradient: Array) -> None:
        """Add up over the ranks of `comm`, all of it in 16 bits."""
        n = gradient.size
        sizes = _sizes(n, comm.size)
        mine = sizes[comm.rank]
        # 1. Round.
        scale = self.scale(comm, gradient)
        narrow = self.narrow(gradient * scale)
        # 2. Chunk j goes to rank j.
        parts = all_to_all(comm, narrow, counts=sizes, out_counts=[mine] * comm.size)
        # 3. Add, in the order of ranks.
        dtype = np.result_type(gradient.dtype, np.float32)
        total = self.wide(parts, dtype).reshape(comm.size, mine).sum(0)  # so far times scale
        narrow[chunk_slice(n, comm.size, comm.rank)] = self.narrow(total)
        # 4. Everybody gets all.
        gradient[...] = self.wide(all_gather(comm, narrow), gradient.dtype)
        gradient *= 1 / scale

    def scale(self, comm: Communicator, gradient: Array) -> float:
        """A power of two, the same on all ranks, by which numbers are multiplied before they are rounded."""
        return 1.0

    @abstractmethod
    def narrow(self, numbers: Array) -> Array:
        """Rounded to 16 bits."""

    @abstractmethod
    def wide(self, narrow: Array, dtype: np.dtype) -> Array:
        """As numbers again."""


class Float16(HalfPrecision):
    """11 bits of precision. Numbers are scaled so that no sum leaves the range of float16, which ends at 65504.

    What is 10^12 times smaller than the largest number becomes 0. (Without the scale most gradients would be below
    float16's smallest normal number, 6e-5, where rounding is coarse, and 30 times slower.) Cost: an all-reduce of one
    number more.
    """

    def scale(self, comm: Communicator, gradient: Array) -> float:
        largest = namespace(gradient).abs(gradient).max(keepdims=True) if gradient.size else gradient
        largest = float(all_reduce(comm, largest, "max")[0]) if gradient.size else 0.0
        if not 0 < largest < math.inf:
            return 1.0
        return 2.0 ** min(15 - math.frexp(largest * comm.size)[1], 100)

    def narrow(self, numbers: Array) -> Array:
        return numbers.astype(np.float16)

    def wide(self, narrow: Array, dtype: np.dtype) -> Array:
        return narrow.astype(dtype)


class BFloat16(HalfPrecision):
    """8 bits of precision, and the range of float32, of which it is the upper half; to nearest, ties to even."""

    def narrow(self, numbers: Array) -> Array:
        xp = namespace(numbers)
        bits = numbers.astype(np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
        return xp.where(xp.isnan(numbers), np.uint16(0x7FC0), rounded)  # a nan could have become infinite

    def wide(self, narrow: Array, dtype: np.dtype) -> Array:
        return (narrow.astype(np.uint32) << 16).view(np.float32).astype(dtype)


def _sizes(n: int, parts: int) -> list[int]:
    chunks = [chunk_slice(n, parts, index) for index in range(parts)]
    return [chunk.stop - chunk.start for chunk in chunks]
