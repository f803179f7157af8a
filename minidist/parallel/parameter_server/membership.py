"""Who takes part: the view that the scheduler tells all ranks, each time that someone comes, leaves or dies.

The body of a VIEW is int64:

    workers, servers, (rank, first clock) of each worker, rank of each server (-1: it is dead)

A shard's copies form a chain: server s, s + 1, …, s + copies, counted in a circle. The dead are skipped; the first that
lives is the head, which serves the shard, and the last the tail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .keys import Roles
from .messages import Code, Refused


@dataclass(frozen=True)
class View:
    """Who takes part, from the scheduler's word number `number` on."""

    number: int
    workers: dict[int, int] = field(default_factory=dict)  # rank: the first clock at which it takes part
    servers: tuple[int, ...] = ()  # rank of each, -1 for the dead

    def pack(self) -> np.ndarray:
        joined = [figure for item in self.workers.items() for figure in item]
        return np.array([len(self.workers), len(self.servers), *joined, *self.servers], np.int64)

    @staticmethod
    def most(roles: Roles) -> int:
        """Bytes of the longest."""
        return 8 * (2 + 2 * len(roles.workers) + roles.servers)

    @staticmethod
    def unpack(number: int, body: Any) -> View:
        """Errors  Refused: it is no view"""
        data = np.frombuffer(body, np.int64) if body is not None and len(body) % 8 == 0 else np.empty(0, np.int64)
        if len(data) < 2 or min(data[:2]) < 0 or len(data) != 2 + 2 * data[0] + data[1]:
            raise Refused(Code.WRONG_LENGTH, "a view whose length is not that of its workers and servers")
        workers = int(data[0])
        joined = data[2 : 2 + 2 * workers].reshape(workers, 2).tolist()
        return View(number, {rank: clock for rank, clock in joined}, tuple(data[2 + 2 * workers :].tolist()))  # noqa: C416

    def chain(self, shard: int, copies: int) -> list[int]:
        """The ranks that keep a shard, head first. Errors  LostShard: all of them are dead"""
        places = [self.servers[(shard + i) % len(self.servers)] for i in range(copies + 1)]
        living = [rank for rank in places if rank >= 0]
        if not living:
            raise LostShard(f"shard {shard} is lost: all servers that had a copy of it are dead")
        return living

    def check(self, copies: int) -> None:
        """Errors  LostShard: nobody has a copy of some shard any more"""
        for shard in range(len(self.servers)):
            self.chain(shard, copies)


class LostShard(RuntimeError):
    """All copies of some parameters have died with their servers."""


def first_view(roles: Roles) -> View:
    """The view in which the run begins, before any worker has registered."""
    return View(0, {}, tuple(roles.server_ranks))
