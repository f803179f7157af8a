"""What an algorithm is written against: a `Lane`, one operation's own way through a communicator.

A lane has the communicator's ranks, and a tag that no other operation in flight and no message of the program uses.
Arrays were checked when the operation was called, so its messages cost less than the communicator's own.

An algorithm is a generator function (see comm/handle.py). It starts messages, and yields what it must wait for:

    comm.isend(chunk, right)                               # start; `chunk` must stay as it is ...
    yield comm.irecv(other, left)                          # start, and wait for it
    yield from comm.sent()                                 # ... until here: wait for all that was sent

    comm.send_partial(chunk, right)                        # a partial sum, for someone who
    yield from comm.fold_partial(other, left, reduction)   # receives it and adds it to his own
"""

from __future__ import annotations

from ..backend import Array
from ..comm.base import Communicator, Request
from ..comm.handle import Steps, Uses
from .reductions import Reduction

FIRST_TAG, TAGS = 32256, 512  # operations number their tags in turn, the same on all ranks


class Lane:
    """One operation's way through a communicator."""

    __slots__ = ("comm", "rank", "size", "tag", "uses", "_sends", "_scratch")

    def __init__(self, comm: Communicator, part_of: Lane | None = None):
        """`part_of`: the operation's first lane, for one that needs several. Those are made before it begins."""
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.tag = FIRST_TAG + comm.operations % TAGS
        comm.operations += 1
        if comm.in_flight:
            _free(comm, self.tag)
        self.uses: Uses = [] if part_of is None else part_of.uses  # the communicators and tags of all its lanes
        self.uses.append((comm, self.tag))
        self._sends: list[Request] = []
        self._scratch = comm.scratch

    # -- whole messages -------------------------------------------------------------------------------------------

    def isend(self, array: Array, dest: int) -> None:
        """Start sending. The array must not change before `sent`."""
        self._sends.append(self.comm._isend(array, dest, self.tag))

    def irecv(self, array: Array, source: int) -> Request:
        """Start receiving; yield what it returns, and then the array is filled."""
        return self.comm._irecv(array, source, self.tag)

    def sent(self) -> Steps:
        """Wait for all that has been sent."""
        for send in self._sends:
            if not send._poll():
                yield send
        self._sends.clear()

    # -- partial sums ---------------------------------------------------------------------------------------------

    def send_partial(self, array: Array, dest: int) -> None:
        """Start sending what the receiver takes by `fold_partial`: in segments, where it is large."""
        for segment in self._segments(array):
            self.isend(segment, dest)

    def fold_partial(self, array: Array, source: int, reduction: Reduction, theirs_first: bool = False) -> Steps:
        """Receive a partial sum and add it to `array`. While one segment is added the next arrives.

        Needs scratch memory of at most two segments; all that is in it stays in the processor's cache.
        """
        # 1. Ask for the first segment.
        segments = self._segments(array)
        scratch = [self.scratch_like(segment) for segment in segments[:2]]
        receive = self.irecv(scratch[0], source)
        for i, segment in enumerate(segments):
            # 2. When it has come, ask for the next, and add this one meanwhile.
            yield receive
            partial = scratch[i % 2][: segment.size]
            if i + 1 < len(segments):
                receive = self.irecv(scratch[(i + 1) % 2][: segments[i + 1].size], source)
            self.combine(segment, partial, reduction, theirs_first)
        for memory in scratch:
            self.give_back(memory)

    def combine(self, mine: Array, theirs: Array, reduction: Reduction, theirs_first: bool = False) -> None:
        """Fold `theirs` into `mine`; in a simulation it takes the network's time for it."""
        reduction.combine(mine, theirs, theirs_first)
        self.comm.reduced(mine.nbytes)

    # -- scratch memory -------------------------------------------------------------------------------------------

    def scratch_like(self, array: Array) -> Array:
        """Memory of an array's size and dtype, its content undefined; `give_back` it when it is no longer used."""
        return self._scratch.take(array)

    def give_back(self, array: Array) -> None:
        """End the use of what `scratch_like` returned."""
        self._scratch.give(array)

    def _segments(self, array: Array) -> list[Array]:
        if array.nbytes <= self.comm.segment:
            return [array]
        step = max(1, int(self.comm.segment // array.itemsize))
        return [array[start : start + step] for start in range(0, array.size, step)]


def _free(comm: Communicator, tag: int) -> None:
    """A tag comes round again after TAGS operations: if one that has it is still under way, let it end first."""
    for handle in tuple(comm.in_flight):
        if (comm, tag) in handle.uses:
            handle.settle()
