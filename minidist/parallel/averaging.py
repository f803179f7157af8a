"""D.3(4): gradients are averaged over all ranks, while backward goes on.

One rank's part of a backward:

    begins        told by each forward that it goes through, and with how many samples; tells the other ranks
    goes on       a parameter's gradient is finished; its bucket's was the last one: the bucket sets off
    is over       the rest sets off; wait for all; a parameter that any rank has used has a gradient now

All ranks do the same in the same order, so none waits for what another does not do: buckets set off in one order; where
ranks will use other parameters each, at the end of backward; and messages go by a communicator of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from ..autograd import after_backward
from ..collectives import all_gather
from ..comm import Communicator
from ..comm.handle import Handle, progress
from ..tensor import Tensor
from .buckets import Bucket
from .counting import Start
from .layers import Layers
from .meter import Meter
from .reproducible import FixedBucket, Microbatches


class Averaging:
    """What happens in the backwards of one model.

    syncing  whether the backwards to come average; else they leave gradients to add up
    told     what the next average is weighted by, if not by samples
    """

    def __init__(
        self,
        comm: Communicator,
        zero: int,
        buckets: list[Bucket],
        layers: Layers | None,
        micro: Microbatches | None,
        meter: Meter,
    ):
        self.comm, self.zero, self.buckets = comm, zero, buckets
        self.layers, self.micro, self.meter = layers, micro, meter
        self.syncing = True
        self.told: int | None = None
        self._several = len(buckets) > 1 and micro is None  # whether there is a bucket to set off before the end
        self._samples = 0  # of the backwards that did not average, since the last one that did
        self._taken: dict[object, int] = {}  # of each forward that this backward goes through: its samples
        self._telling: Handle | None = None  # on its way: ranks tell one another what they will do
        self._alike = False  # whether all ranks will reach the same parameters
        self._start_anew()
        for bucket in buckets:
            for p in bucket.part.flat.parameters:
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(partial(self._finished, bucket), last=True)

    def take_in(self, key: object, samples: int) -> Start:
        """A backward will go through one of our forwards."""
        if self._samples and not self._taken and self.micro is None and not any(self._used()):
            self._samples = 0  # of gradients that were thrown away
        self._taken[key] = samples
        return self._begin

    def _begin(self, leaves: Iterable[Tensor]) -> None:
        """A backward begins, that will reach these."""
        after_backward(self._synchronise)
        reached = set(leaves)
        for bucket in self.buckets:
            bucket.expect(reached)
        if self.syncing and self._several:
            plan = bytes(p in reached for bucket in self.buckets for p in bucket.part.flat.parameters)
            with self.comm.step("D.3(4) average gradients"):
                self._telling = self._exchange([self._here(), zlib.crc32(plan)], background=True)
            if self.layers is not None:
                self._agree()
                if not self._alike:  # ranks will ask for other layers: have all of them
                    self.layers.gather()
                    self._gathered = True

    def _start_anew(self) -> None:
        self._taken.clear()
        self._next = 0  # the bucket to set off next
        self._telling = None
        self._weight: tuple[float | None] | None = None  # of this rank's gradients, once all ranks have told
        self._gathered = False  # whether all layers are there for this backward
        self._alike = False
        self._anywhere: list[bool] | None = None  # which parameters any rank has used

    def give_up(self) -> None:
        """Forget what a backward that failed has left."""
        if self._telling is not None:
            # All ranks come to the same place: every bucket has been on its way, and what was in it is of no use.
            self._agree()
            for bucket in self.buckets[self._next :]:
                bucket.start(0.0, background=True, check=False)
            for bucket in self.buckets:
                bucket.finish()
        if self._taken:
            self.told = None
        self._over()

    def _over(self) -> None:
        """A backward is over."""
        if self.layers is not None:
            if self._gathered:
                self.layers.scatter()
            self.layers.release_all()
        self._start_anew()

    def _finished(self, bucket: Bucket, _: Tensor) -> None:
        """A parameter's gradient is finished: if it was the last of the bucket's, that can set off."""
        after_backward(self._synchronise)
        bucket.missing -= 1
        if self.layers is not None and not bucket.missing:
            self.layers.release(self.layers.of(bucket.part))
        if self._telling is not None:
            with self.meter.waiting(), self.comm.step("D.3(4) average gradients"):
                progress(self.comm.in_flight)
                self._agree()
                # In one order on all ranks, whatever the order of the gradients. Where ranks use other parameters each,
                # they would set off at different moments, and might wait for one another for ever, in a layer that
                # communicates: then all buckets set off at the end.
                while self._alike and self._next < len(self.buckets) and self.buckets[self._next].missing <= 0:
                    self._set_off()

    def _set_off(self) -> None:
        """Start the next bucket."""
        assert self._weight is not None
        bucket = self.buckets[self._next]
        if self._alike and not any(self._anywhere or bucket.pending()):
            bucket.skip()
        elif self._several:
            with self.comm.step(f"D.3(4) average gradients, bucket {self._next + 1}"):
                bucket.start(*self._weight, background=True)
        else:
            bucket.start(*self._weight, background=False)
        if self.zero >= 2 and self._next:  # wait, so that the whole gradients of two buckets are there at most
            self.buckets[self._next - 1].finish()
        self._next += 1

    def _agree(self) -> None:
        """Know how many samples all ranks took in, and if they will use the same; with one bucket, what they used."""
        if self._weight is not None:
            return
        here = self._here()
        counts = self._exchange([here, *self._used()]) if self._telling is None else self._telling.wait()
        total = int(counts[:, 0].sum())
        if self._several:
            self._alike = bool((counts[:, 1] == counts[0, 1]).all())
        else:
            self._anywhere, self._alike = np.logical_or.reduce(counts[:, 1:]).tolist(), len(self.buckets) == 1
        if self.micro is not None:
            self._weight = (1 / max(total, 1),)  # of each sample
        elif not here:
            self._weight = (0.0,)
        elif (counts[:, 0] == here).all() and self.buckets[0].compression is None:
            self._weight = (None,)
        else:
            self._weight = (here / total,)

    def _here(self) -> int:
        """The samples that this rank's gradients are the mean over."""
        return self._samples + sum(self._taken.values()) if self.told is None else self.told

    def _used(self) -> list[bool]:
        """Which parameters have a gradient here."""
        if self.micro is not None:
            return [used for bucket in self.buckets for used in bucket.used]
        return [pending for bucket in self.buckets for pending in bucket.pending()]

    def _exchange(self, mine: list[int], background: bool = False) -> Any:
        """All ranks' numbers, (P, len(mine)) int64; in the background, what gives them."""
        told = np.empty((self.comm.size, len(mine)), np.int64)
        told[self.comm.rank] = mine
        return all_gather(self.buckets[0].comm, told, "bruck", async_op=background)

    def _synchronise(self) -> None:
        """Backward is over: the gradient of the mean over all ranks' samples, Σ n_r g_r / Σ n_r."""
        if not self._taken:
            raise RuntimeError("backward without a forward through the model that data_parallel returned")
        if self.micro is not None:
            self._keep_leaf()
        if not self.syncing:
            self._samples += sum(self._taken.values())
            self._over()
            return
        with self.meter.waiting(), self.comm.step("D.3(4) average gradients"):
            self._agree()
            while self._next < len(self.buckets):
                self._set_off()
            if self._anywhere is None:
                order = 0
                if self.layers is not None:
                    order, self.layers.gathered = self.layers.gathered, 0
                told = self._exchange([order, *(used for bucket in self.buckets for used in bucket.used)])
                self._anywhere = np.logical_or.reduce(told[:, 1:]).tolist()
                if (told[:, 0] != order).any():
                    raise RuntimeError(
                        "the ranks have gone through different layers, or in another order: with zero=3 what they "
                        "gathered is worth nothing. Let all ranks take the same way, or use another zero"
                    )
            for bucket in self.buckets:
                bucket.finish()
        anywhere = iter(self._anywhere)
        for bucket in self.buckets:
            bucket.note(list(islice(anywhere, len(bucket.used))))
        self.meter.end_step()
        self.meter.weigh()
        self._samples, self.told = 0, None
        self._over()

    def _keep_leaf(self) -> None:
        """A microbatch's backward is over."""
        assert self.micro is not None
        self.micro.after_backward(last=self.syncing)
        samples = sum(self._taken.values()) if self.told is None else self.told
        for bucket in self.buckets:
            assert isinstance(bucket, FixedBucket)
            bucket.keep(samples)
        if self.told is not None:  # told for each
            self._taken, self.told = {None: self.told}, None
