"""D.3(2), D.1: who trains on which samples, dealt clock by clock while the run goes on.

A worker that asks for its next clock is dealt a stretch of the epoch's samples, in the order that all ranks compute
from (seed, epoch). So who joins gets a share at once, and who has died leaves the rest to the others.

    even       (bsp, backup) clock t is global batch t; each worker has its chunk of it, as with all-reduce
    by speed   (ssp) the same, but the chunks are as long as the workers are fast, so that a clock takes all equally
               long. With even ones the bound would soon hold everyone to the pace of the slowest, as bsp does
    in turn    (async) the next stretch of batch / workers samples, whoever asks: who is faster does more of the epoch

Source  by speed: Chen et al. 2020, "Semi-dynamic load balancing" (LB-BSP); Harlap et al. 2016, "Addressing the
        straggler problem for iterative convergent parallel ML" (FlexRR), who hand work on within a clock
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

EVEN, BY_SPEED, IN_TURN = "even", "by speed", "in turn"
CATCH_UP = 0.1  # of its work, that a worker is let off for each clock that it is behind
FASTEST = 1e12  # samples a second; more is a clock that did not move


class Share(NamedTuple):
    """Samples start … start + size of the order of an epoch."""

    epoch: int
    start: int
    size: int


class Dealer:
    """Deals `samples` an epoch, in global batches of `batch`, to `workers`; `how` is one of the three."""

    def __init__(self, samples: int, batch: int, workers: int, how: str):
        if samples < 0 or batch < 1:
            raise ValueError(f"samples={samples}, batch_size={batch}: expected samples, and at least 1 a batch")
        self.samples, self.batch, self.workers, self.how = samples, batch, workers, how
        self.newest = -1  # the largest clock that was dealt
        self.speed: dict[int, float] = {}  # samples a second, of each worker
        self._turn = 0  # samples dealt, over all epochs (in turn)
        self._cuts: dict[int, dict[int, Share]] = {}  # of the latest clocks: everyone's share
        self._at: dict[int, int] = {}  # of each worker, the clock that it has asked for last

    def deal(self, worker: int, clock: int, members: Sequence[int], samples: int, seconds: float) -> Share:
        """A worker's share for its clock. It has computed its last one, of `samples`, in `seconds`."""
        self.newest = max(self.newest, clock)
        if samples and seconds > 0:
            speed = min(samples / seconds, FASTEST)
            self.speed[worker] = (self.speed.get(worker, speed) + speed) / 2
        if not self.samples:
            return Share(0, 0, 0)
        return self._in_turn() if self.how == IN_TURN else self._of_batch(worker, clock, members)

    def _in_turn(self) -> Share:
        epoch, start = divmod(self._turn, self.samples)
        size = min(max(self.batch // self.workers, 1), self.samples - start)
        self._turn += size
        return Share(epoch, start, size)

    def _of_batch(self, worker: int, clock: int, members: Sequence[int]) -> Share:
        batches = -(-self.samples // self.batch)
        epoch, batch = divmod(clock, batches)
        start = batch * self.batch
        if clock not in self._cuts:  # the first to ask; the others find theirs
            sizes = self._sizes(min(self.batch, self.samples - start), sorted(members))
            starts = accumulate(sizes, initial=start)
            self._cuts[clock] = {w: Share(epoch, a, n) for w, a, n in zip(sorted(members), starts, sizes)}
        # Cuts are kept until nobody can ask for them any more.
        self._at[worker] = clock
        oldest = min(self._at.get(member, 0) for member in members)
        while (first := next(iter(self._cuts))) < oldest:
            del self._cuts[first]
        return self._cuts[clock].get(worker, Share(epoch, start, 0))

    def _sizes(self, size: int, members: list[int]) -> list[int]:
        """A batch of `size` samples, cut for the members."""
        each, extra = divmod(size, len(members))
        if self.how == EVEN or not each or any(member not in self.speed for member in members):
            return [each + (i < extra) for i in range(len(members))]  # as np.array_split
        # Who is behind has less to do until it has caught up: at the bound, all would wait for it at every clock.
        ahead = max(self._at.get(member, 0) for member in members)
        speeds = [self.speed[member] * max(1 - CATCH_UP * (ahead - self._at.get(member, 0)), 0.5) for member in members]
        # At least one sample each: who has none has no speed either. Then the largest fractions are rounded up.
        exact = [(size - len(members)) * speed / sum(speeds) for speed in speeds]
        sizes = [1 + int(share + 1e-9) for share in exact]
        for i in sorted(range(len(members)), key=lambda i: sizes[i] - exact[i])[: size - sum(sizes)]:
            sizes[i] += 1
        return sizes
