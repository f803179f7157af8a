"""Which server keeps what: keys, dealt to servers by range or by consistent hashing.

A stretch is a run of parameters that is ready, pushed and pulled at one time: a layer's, say. A key is a stretch, or
the part of one that a server keeps; it belongs to one server (its shard), and all ranks number the keys alike.

    by range     stretches end to end, cut into equal numbers of bytes       |-- server 0 --|-- server 1 --|
    by hashing   pieces of at most BLOCK bytes, each hashed to a place on a circle; the next server on it keeps the
                 piece. When a server is added, only its share of the pieces moves: 1/S of them on the average

Cuts are made between rows, so that a row (of an embedding) is on one server.

Source  Li et al. 2014, sections 3.3 and 4.3; Karger et al. 1997, "Consistent hashing and random trees"
"""

from __future__ import annotations

import bisect
import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 1 << 18  # bytes of a piece that is hashed
POINTS = 64  # places of a server on the circle


@dataclass(frozen=True)
class Stretch:
    """A run of elements of one dtype that travels together."""

    name: str
    size: int  # elements
    dtype: Any
    width: int = 1  # elements of a row

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Key:
    """The elements start … stop of a stretch, on one server."""

    number: int
    stretch: int
    start: int
    stop: int
    server: int  # which of the servers: 0, 1, …
    dtype: np.dtype
    width: int
    name: str

    @property
    def size(self) -> int:
        return self.stop - self.start


class Layout:
    """All keys, of all servers, by number; in the order of the stretches."""

    def __init__(self, stretches: Sequence[Stretch], servers: int, sharding: str = "range"):
        """Errors  ValueError: no server; a sharding that is neither "range" nor "hash"; a dtype without a code"""
        if operator.index(servers) < 1:
            raise ValueError(f"servers={servers}: a parameter server needs at least 1")
        if sharding not in SHARDINGS:
            raise ValueError(f"sharding {sharding!r}: choose {' or '.join(map(repr, SHARDINGS))}")
        self.stretches, self.servers = list(stretches), servers
        # D.2 Parameter partition: stretches of the parameters, spread over the servers.
        self.keys: list[Key] = []
        for index, start, stop, server in SHARDINGS[sharding](self.stretches, servers):
            s = self.stretches[index]
            self.keys.append(Key(len(self.keys), index, start, stop, server, np.dtype(s.dtype), s.width, s.name))
        if len(self.keys) > 1 << 16:
            raise ValueError(f"{len(self.keys)} keys: a message names 65,536 at most")

    def of_server(self, server: int) -> list[Key]:
        return [key for key in self.keys if key.server == server]

    def of_stretch(self, stretch: int) -> list[Key]:
        return [key for key in self.keys if key.stretch == stretch]

    def bytes_by_server(self) -> list[int]:
        """How many bytes of values each server keeps."""
        return [sum(key.size * key.dtype.itemsize for key in self.of_server(s)) for s in range(self.servers)]


Cuts = list[tuple[int, int, int, int]]  # of each key: its stretch, start, stop and server


def by_range(stretches: Sequence[Stretch], servers: int) -> Cuts:
    """Server s keeps the bytes s n/S … (s+1) n/S of all n, to within a row."""
    total, before, server = sum(s.nbytes for s in stretches), 0, 0
    cuts: Cuts = []
    for index, stretch in enumerate(stretches):
        start, itemsize = 0, np.dtype(stretch.dtype).itemsize
        while start < stretch.size:
            # 1. Up to where this server's share ends, or the stretch does.
            room = total * (server + 1) // servers - before
            stop = min(stretch.size, start + round(room / itemsize / stretch.width) * stretch.width)
            # 2. The last server takes what rounding left.
            if server == servers - 1:
                stop = stretch.size
            if stop > start:
                cuts.append((index, start, stop, server))
                before += (stop - start) * itemsize
            if stop < stretch.size or before >= total * (server + 1) // servers:
                server = min(server + 1, servers - 1)
            start = max(start, stop)
    return cuts


def by_hashing(stretches: Sequence[Stretch], servers: int) -> Cuts:
    """Pieces of the stretches; each on the server that comes next on the circle."""
    circle = sorted((_place(f"server {s} point {point}"), s) for s in range(servers) for point in range(POINTS))
    places = [place for place, _ in circle]
    cuts: Cuts = []
    for index, stretch in enumerate(stretches):
        row = stretch.width * np.dtype(stretch.dtype).itemsize
        step = max(BLOCK // row, 1) * stretch.width
        for start in range(0, stretch.size, step):
            place = bisect.bisect(places, _place(f"{stretch.name} {start}")) % len(circle)
            cuts.append((index, start, min(start + step, stretch.size), circle[place][1]))
    return cuts


def _place(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


SHARDINGS = {"range": by_range, "hash": by_hashing}


@dataclass(frozen=True)
class Roles:
    """Who does what: rank 0 is the scheduler, and server 0 as well unless shards have copies; then the servers follow,
    then the workers. (Copies need a scheduler that outlives any server.)"""

    size: int  # ranks
    servers: int
    copies: int = 0  # of each shard, on other servers

    def __post_init__(self) -> None:
        if self.servers < 1:
            raise ValueError(f"servers={self.servers}: a parameter server needs at least 1")
        if not 0 <= self.copies < self.servers:
            raise ValueError(f"copies={self.copies} of each shard on other servers: there are {self.servers} servers")
        if self.first_worker >= self.size:
            scheduler = " and a scheduler" if self.copies else ""
            raise ValueError(f"servers={self.servers}{scheduler} of {self.size} ranks: that leaves no worker")

    @property
    def scheduler(self) -> int:
        return 0

    @property
    def server_ranks(self) -> list[int]:
        first = 1 if self.copies else 0
        return list(range(first, first + self.servers))

    @property
    def first_worker(self) -> int:
        return self.servers + (1 if self.copies else 0)

    @property
    def workers(self) -> list[int]:
        return list(range(self.first_worker, self.size))
