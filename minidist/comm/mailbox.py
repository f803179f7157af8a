"""Where simulated messages lie between send and receive, and the communicator that puts and takes them.

A message is copied when it is sent ("eager") and waits in its channel: the queue for one (communicator, source, tag)
of one receiving rank. The k-th receive posted on a channel gets the k-th message sent into it, as in MPI.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from ..backend import Array, copy_into
from .base import Communicator, Request, default_checked, default_timeout
from .handle import Handle
from .record import FlightRecord
from .where import Place, here, shortened

if TYPE_CHECKING:
    from .simulated import Scheduler

Message = tuple[Array, Place]  # the copied array, and the line that sent it


class Killed(BaseException):
    """Ends a simulated rank because the simulation is over. Not an Exception: programs should not catch it."""


class Wait(Protocol):
    """Something a rank waits for, as a deadlock report needs it."""

    def waits_for(self) -> list[int]:
        """World ranks that have to act."""

    def describe(self) -> str:
        """The operation, in the caller's terms."""


class Channel:
    """One (communicator, source, tag) of one receiver. At most one of the two queues holds anything."""

    __slots__ = ("messages", "receives")

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()  # sent, not yet asked for
        self.receives: deque[Receive] = deque()  # asked for, not yet sent


class Mailboxes:
    """All channels of all ranks, the receives that are open, and the counts of what was sent."""

    def __init__(self, size: int):
        self.channels: list[dict[tuple[int, int, int], Channel]] = [{} for _ in range(size)]
        self.open_receives: list[dict[Receive, None]] = [{} for _ in range(size)]  # a dict for its order
        self.messages_sent = [0] * size
        self.bytes_sent = [0] * size
        self.splits: dict[tuple[int, int], Split] = {}  # those that some ranks have called and some have not
        self._contexts: dict[tuple[int, int, int], int] = {}

    def channel(self, receiver: int, context: int, source: int, tag: int) -> Channel:
        """The channel for messages from world rank `source` to world rank `receiver`."""
        key = (context, source, tag)
        channel = self.channels[receiver].get(key)
        if channel is None:
            channel = self.channels[receiver][key] = Channel()
        return channel

    def child_context(self, context: int, split: int, color: int) -> int:
        """The number that keeps a child communicator's messages apart from all others'."""
        return self._contexts.setdefault((context, split, color), len(self._contexts) + 1)

    def lost(self) -> bool:
        """Whether a message was never received, or a receive never waited for."""
        return any(self.open_receives) or any(c.messages for channels in self.channels for c in channels.values())


class Sent(Request):
    """A send: done at once, since the message is a copy."""

    __slots__ = ()

    def __init__(self) -> None:
        self.entry = None

    def wait(self, timeout: float | None = None) -> None:
        pass

    def _poll(self) -> bool:
        return True


class Receive(Request):
    """A posted receive. `message` is set by the sender; the array is filled by wait or test."""

    __slots__ = ("comm", "array", "source", "tag", "place", "message", "done")

    def __init__(self, comm: SimulatedCommunicator, array: Array, source: int, tag: int):
        self.comm = comm
        self.array = array
        self.source = source
        self.tag = tag
        self.place = here()
        self.message: Message | None = None
        self.done = False
        self.entry = None

    def wait(self, timeout: float | None = None) -> None:
        if self.done:
            return
        comm = self.comm
        if self.message is None and not comm.scheduler.block(comm.world_rank, self, timeout):
            raise TimeoutError(f"{comm.name()} has waited {timeout:g} virtual seconds: {self.describe()}")
        self._finish()

    def test(self) -> bool:
        if self.message is None and not self.done:
            self.comm.scheduler.idle(self.comm.world_rank, self)
        return self._poll()

    def _poll(self) -> bool:
        if self.message is not None and not self.done:
            self._finish()
        return self.done

    def _finish(self) -> None:
        """Copy the message, if it fits, into the receiving array."""
        assert self.message is not None
        (data, _), array, comm = self.message, self.array, self.comm
        self.done, self.message = True, None
        del comm.scheduler.mailboxes.open_receives[comm.world_rank][self]
        if data.dtype != array.dtype:
            raise TypeError(f"{self.describe()}: the message is {data.dtype}, the receiving array is {array.dtype}")
        if data.size != array.size:
            raise ValueError(
                f"{self.describe()}: the message has {data.size} elements ({data.nbytes} bytes), the receiving array "
                f"has {array.size} ({array.nbytes} bytes)"
            )
        copy_into(array, data.reshape(array.shape))
        if self.entry is not None:
            comm.record.end(self.entry)

    def waits_for(self) -> list[int]:
        return [self.comm.members[self.source]]

    def describe(self) -> str:
        return (
            f"receive from rank {self.source}, tag {self.tag}, {self.array.dtype}[{self.array.size}]{self.comm.group()}"
        )


class AnyOf:
    """Several receives, of which a rank waits for the first."""

    def __init__(self, receives: list[Receive]):
        self.receives = receives

    def __contains__(self, receive: Receive) -> bool:
        return receive in self.receives

    def waits_for(self) -> list[int]:
        return [receive.waits_for()[0] for receive in self.receives]

    def describe(self) -> str:
        return " or ".join(receive.describe() for receive in self.receives)


class Split:
    """A `split` under way: what each rank that has called it gave."""

    def __init__(self, comm: SimulatedCommunicator):
        self.comm = comm
        self.given: dict[int, tuple[int | None, int]] = {}  # rank: (color, key)

    def waits_for(self) -> list[int]:
        return [member for rank, member in enumerate(self.comm.members) if rank not in self.given]

    def describe(self) -> str:
        return f"split{self.comm.group()}"


class SimulatedCommunicator(Communicator):
    """One simulated rank's end of a communicator. `timeout` never passes here: a deadlock is found at once instead."""

    segment = math.inf

    def __init__(
        self,
        scheduler: Scheduler,
        members: Sequence[int],
        rank: int,
        context: int,
        parent: SimulatedCommunicator | None = None,
    ):
        self.rank = rank
        self.size = len(members)
        self.timeout = default_timeout() if parent is None else parent.timeout
        self.checked = default_checked() if parent is None else parent.checked
        self.record = FlightRecord(self.clock) if parent is None else parent.record
        self.in_flight: list[Handle] = [] if parent is None else parent.in_flight
        self.scheduler = scheduler
        self.members = members  # world ranks, in the order of this communicator
        self.world_rank = members[rank]
        self.context = context
        self._splits = 0

    def name(self) -> str:
        """ "rank 2 of 4", for messages."""
        return f"rank {self.rank} of {self.size}{self.group()}"

    def group(self) -> str:
        """Words that tell a communicator made by `split` from the world."""
        return "" if self.context == 0 else f" in a group of {self.size} (world ranks {shortened(self.members)})"

    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        self.scheduler.check_running()
        scheduler, me, receiver = self.scheduler, self.world_rank, self.members[dest]
        mailboxes = scheduler.mailboxes
        message = (array.copy(), here())
        channel = mailboxes.channel(receiver, self.context, me, tag)
        if channel.receives:
            receive = channel.receives.popleft()
            receive.message = message
            waiting = scheduler.ranks[receiver].waiting
            if waiting is receive or (isinstance(waiting, AnyOf) and receive in waiting):
                scheduler.wake(receiver)
        else:
            channel.messages.append(message)
        mailboxes.messages_sent[me] += 1
        mailboxes.bytes_sent[me] += array.nbytes
        scheduler.progress()
        scheduler.pause(me)
        return Sent()

    def _irecv(self, array: Array, source: int, tag: int) -> Request:
        self.scheduler.check_running()
        mailboxes = self.scheduler.mailboxes
        receive = Receive(self, array, source, tag)
        mailboxes.open_receives[self.world_rank][receive] = None
        channel = mailboxes.channel(self.world_rank, self.context, self.members[source], tag)
        if channel.messages:
            receive.message = channel.messages.popleft()
        else:
            channel.receives.append(receive)
        return receive

    def _wait_any(self, requests: Sequence[Request], timeout: float | None) -> None:
        open_receives = [request for request in requests if isinstance(request, Receive)]
        if not any(receive.message is not None for receive in open_receives):
            self.scheduler.block(self.world_rank, AnyOf(open_receives), timeout)

    def clock(self) -> float:
        return self.scheduler.now

    def elapse(self, seconds: float) -> None:
        pass

    def reduced(self, nbytes: int) -> None:
        pass

    def _split(self, color: int | None, key: int) -> Communicator | None:
        self.scheduler.check_running()
        scheduler, mailboxes = self.scheduler, self.scheduler.mailboxes
        # 1. Say what we want, and wait until every rank has.
        self._splits += 1
        name = (self.context, self._splits)
        split = mailboxes.splits.setdefault(name, Split(self))
        split.given[self.rank] = (color, key)
        if len(split.given) < self.size:
            scheduler.block(self.world_rank, split, None)
        else:
            del mailboxes.splits[name]
            scheduler.progress()
            for rank, member in enumerate(self.members):
                if rank != self.rank:
                    scheduler.wake(member)
        # 2. Everyone now works out the same groups.
        if color is None:
            return None
        group = sorted((k, rank) for rank, (c, k) in split.given.items() if c == color)
        members = [self.members[rank] for _, rank in group]
        context = mailboxes.child_context(*name, color)
        return SimulatedCommunicator(scheduler, members, members.index(self.world_rank), context, self)

    def _split_by_host(self) -> Communicator:
        host = self.split(0, self.rank)  # one process is one host
        assert host is not None
        return host

    def abort(self, code: int = 1) -> NoReturn:
        raise SystemExit(code)
