"""The mesh: ranks in a grid, one axis for each way of splitting the work, and a communicator along every axis.

    mesh = Mesh(comm, dp=2, tp=2)          # 4 ranks

                 tp 0   tp 1
        dp 0   | rank 0 rank 1 |           mesh.tp joins the ranks of a row
        dp 1   | rank 2 rank 3 |           mesh.dp those of a column

    axis   what its ranks have of their own             what they say to one another, and how often
    pp     a stage: some of the layers                  activations, at the borders of the stages
    dp     a share of the samples                       gradients, once a step
    ep     a share of the samples, and of the experts   tokens, twice a layer of experts and pass
    cp     a part of every sequence                     keys and values, once a layer and pass
    tp     a slice of every layer                       activations, twice a layer and pass

The axis that talks most is innermost: its ranks are neighbours, and on one host as far as hosts have room.

Sources  Shoeybi et al. 2019, section 3; Narayanan et al. 2021, "Efficient large-scale language model training on GPU
         clusters using Megatron-LM", section 3
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

from .comm import Communicator

AXES = ("pp", "dp", "ep", "cp", "tp")  # outermost first


class Mesh:
    """A grid of all ranks of `comm`. Every rank makes it, with the same numbers.

    pp, dp, ep, cp, tp  a communicator along each axis: the ranks that differ in this coordinate only, in its order
    shape, coordinates  how many ranks each axis has, and where this rank is on it, by the axis' name

    Errors  ValueError: the product of the numbers is not the number of ranks; a number below 1
    """

    def __init__(self, comm: Communicator, dp: int = 1, pp: int = 1, tp: int = 1, cp: int = 1, ep: int = 1):
        self.shape = check_shape(comm.size, dp=dp, pp=pp, tp=tp, cp=cp, ep=ep)
        self.comm = comm
        # Ranks of one host come one after another, so that the innermost axes stay within a host.
        hosts = comm.hosts()
        self._order = sorted(range(comm.size), key=lambda rank: (hosts.index(hosts[rank]), rank))
        place = self._order.index(comm.rank)
        self.coordinates = dict.fromkeys(AXES, 0)
        for axis in reversed(AXES):
            place, self.coordinates[axis] = divmod(place, self.shape[axis])
        self._made: dict[tuple[str, ...], Communicator] = {}
        self.pp, self.dp, self.ep, self.cp, self.tp = (self.along(axis) for axis in AXES)

    def along(self, *axes: str) -> Communicator:
        """The ranks that differ in these axes only; the last axis in the mesh's order counts fastest.

        Made at the first call, which every rank of the mesh makes, and kept.
        """
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            raise ValueError(f"axis {unknown[0]!r}: the axes are {', '.join(AXES)}")
        # Axes of one rank add nothing: all that only differ in them are one communicator.
        key = tuple(axis for axis in AXES if axis in axes and self.shape[axis] > 1)
        if key not in self._made:
            fixed = {axis: 0 if axis in key else self.coordinates[axis] for axis in AXES}
            child = self.comm.split(self.rank_of(**fixed), self._order.index(self.comm.rank))
            assert child is not None
            self._made[key] = child
        return self._made[key]

    def rank_of(self, **coordinates: int) -> int:
        """The rank, in `comm`, at these coordinates; those not given are this rank's own."""
        place = 0
        for axis in AXES:
            at = coordinates.get(axis, self.coordinates[axis])
            if not 0 <= at < self.shape[axis]:
                raise ValueError(f"{axis}={at}: this axis has {self.shape[axis]} ranks, numbered from 0")
            place = place * self.shape[axis] + at
        return self._order[place]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={n}" for axis, n in self.shape.items() if n > 1)
        return f"Mesh({sizes or '1 rank'})"


def check_shape(ranks: int, **sizes: int) -> dict[str, int]:
    """The number of ranks of each axis, in the order of AXES. Raises ValueError where they don't make `ranks`."""
    shape = {axis: operator.index(sizes[axis]) for axis in AXES}
    for axis, n in shape.items():
        if n < 1:
            raise ValueError(f"{axis}={n}: an axis has at least 1 rank")
    product = math.prod(shape.values())
    if product != ranks:
        near = "; ".join(_words(each) for each in near_misses(ranks, shape))
        there = f"are {ranks}" if ranks > 1 else "is 1"
        raise ValueError(f"{_words(shape)} makes {product} ranks, but there {there}; what would fit: {near}")
    return shape


def _words(shape: dict[str, int]) -> str:
    return " × ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "dp=1"


def near_misses(ranks: int, shape: dict[str, int], most: int = 3) -> list[dict[str, int]]:
    """Shapes of so many ranks that use the same axes, and data parallelism: those with the least changes first."""
    used = [axis for axis in AXES if axis == "dp" or shape[axis] > 1]
    found = [dict(zip(used, sizes, strict=True)) for sizes in _factors(ranks, len(used))]

    def changes(each: dict[str, int]) -> tuple[int, bool, float]:
        changed = [axis for axis in used if each[axis] != shape[axis]]
        return len(changed), changed != ["dp"], sum(abs(math.log(each[axis] / shape[axis])) for axis in changed)

    return [{**dict.fromkeys(AXES, 1), **each} for each in sorted(found, key=changes)[:most]]


def _factors(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of so many numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            yield from ((first, *rest) for rest in _factors(n // first, parts - 1))
