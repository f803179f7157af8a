"""Where simulated messages lie between send and receive, and the requests that put and take them.

A message waits in its channel: the queue for one (communicator, source, tag) of one receiving rank. The k-th receive
posted on a channel gets the k-th message sent into it, as in MPI. How long it is under way is the network's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..backend import Array, copy_into
from .agenda import Rank
from .base import Envelope, Request
from .network import Network, Traffic
from .record import MESSAGE_END, Entry, FlightRecord
from .record import Message as Told
from .scheduler import Scheduler
from .where import Place, here

if TYPE_CHECKING:
    from .injection import Injection
    from .simulated import SimulatedCommunicator

CALLER = 3  # frames from `here` up to who called the communicator, over its _isend or _irecv, and post_...


class Sent(Request):
    """An eager send: done at once, since the message is a copy. One object serves all sends of a communicator."""

    __slots__ = ("_record",)

    def __init__(self, record: FlightRecord):
        self._record = record

    @property
    def entry(self) -> Entry | None:
        """Its place in the flight record: noted there as done when it is set, and not kept."""
        return None

    @entry.setter
    def entry(self, entry: Entry | None) -> None:
        if entry is not None:
            self._record.end(entry)

    @property
    def message(self) -> Told | None:
        return None

    @message.setter
    def message(self, message: Told | None) -> None:
        if message is not None:
            message[MESSAGE_END] = self._record.clock()

    def wait(self, timeout: float | None = None) -> None:
        pass

    def _poll(self) -> bool:
        return True


class Pending(Request):
    """A send or receive that is done at the virtual time `at`: None until it has been matched with the other."""

    __slots__ = ("comm", "array", "peer", "tag", "place", "data", "at", "done")

    def __init__(self, comm: SimulatedCommunicator, array: Array, peer: int, tag: int, place: Place):
        self.comm = comm
        self.array = array
        self.peer = peer
        self.tag = tag
        self.place = place  # the line that started it
        self.data: Array | None = None  # of a receive: the message, between its match and its end
        self.at: float | None = None
        self.done = False  # and its rank has seen it
        self.entry = self.message = None

    def wait(self, timeout: float | None = None) -> None:
        if not self._poll():
            self.comm.wait_for(self, timeout)
            self._poll()

    def test(self) -> bool:
        if not self._poll():
            self.comm.tested_in_vain(self)
        return self._poll()

    def _poll(self) -> bool:
        if not self.done and self.at is not None and self.at <= self.comm.me.now:
            self.done = True
            if self.entry is not None:
                self.comm.record.end(self.entry)
            if self.message is not None:
                self.message[MESSAGE_END] = self.comm.me.now
            self._finish()
        return self.done

    def _finish(self) -> None:
        """It is done."""

    def waits_for(self) -> list[int]:
        return [self.comm.members[self.peer]]

    def describe(self) -> str:
        return str(self)

    def __str__(self) -> str:
        what = "receive from" if isinstance(self, Receive) else "send to"
        return f"{what} rank {self.peer}, tag {self.tag}, {self.array.dtype}[{self.array.size}]{self.comm.group()}"


class Send(Pending):
    """A rendezvous send: its array is read when the receive has been posted."""

    __slots__ = ()


class Receive(Pending):
    """A posted receive. The array is filled by wait or test."""

    __slots__ = ()

    def _finish(self) -> None:
        """Copy the message, if it fits, into the receiving array."""
        data, array = self.data, self.array
        assert data is not None
        self.data = None
        del self.comm.mailboxes.open_receives[self.comm.world_rank][self]
        if data.dtype != array.dtype:
            raise TypeError(f"{self}: the message is {data.dtype}, the receiving array is {array.dtype}")
        if data.size != array.size:
            raise ValueError(
                f"{self}: the message has {data.size} elements ({data.nbytes} bytes), the receiving array "
                f"has {array.size} ({array.nbytes} bytes)"
            )
        copy_into(array, data.reshape(array.shape))


class Split:
    """A `split` under way: what each rank that has called it gave. It is over when the last one calls."""

    def __init__(self, comm: SimulatedCommunicator):
        self.comm = comm
        self.given: dict[int, tuple[int | None, int]] = {}  # rank: (color, key)
        self.callers: list[Rank] = []
        self.at: float | None = None

    def waits_for(self) -> list[int]:
        return [member for rank, member in enumerate(self.comm.members) if rank not in self.given]

    def describe(self) -> str:
        return f"split{self.comm.group()}"


class Probe:
    """A look for a message that nobody has asked for yet, from one source or from anyone; it ends when one is there."""

    def __init__(self, comm: SimulatedCommunicator, source: int | None, tag: int):
        self.comm, self.source, self.tag = comm, source, tag

    @property
    def at(self) -> float | None:
        return min((arrival for arrival, _, _ in self._messages()), default=None)

    def found(self) -> Envelope | None:
        """The message that came first, of those that have come by now; of several at one time a random one."""
        now = self.comm.me.now
        here = [message for message in self._messages() if message[0] <= now]
        if not here:
            return None
        first = min(here, key=lambda message: message[0])[0]
        ties = [message for message in here if message[0] == first]
        _, source, nbytes = ties[0] if len(ties) == 1 else ties[int(self.comm.scheduler.draw() * len(ties))]
        return Envelope(source, self.tag, nbytes)

    def sees(self, context: int, source: int, tag: int) -> bool:
        """Whether it looks for a message from that rank of the world, on that communicator."""
        if (context, tag) != (self.comm.context, self.tag):
            return False
        return self.source is None or self.comm.members[self.source] == source

    def _messages(self) -> list[tuple[float, int, int]]:
        """Of each source's next message, its arrival, the source's rank, and its size."""
        channels = self.comm.mailboxes.unclaimed[self.comm.world_rank].get((self.comm.context, self.tag), {})
        if self.source is None:
            sources = list(channels)
        else:
            sources = [self.comm.members[self.source]]
        found = []
        for source in sources:
            channel = channels.get(source)
            if channel is None:
                continue
            if channel.messages:
                data, _, arrival, _ = channel.messages[0]
                found.append((arrival, self.comm.rank_of(source), data.nbytes))
            else:
                del channels[source]
        return found

    def waits_for(self) -> list[int]:
        members = self.comm.members
        if self.source is not None:
            return [members[self.source]]
        return [member for rank, member in enumerate(members) if rank != self.comm.rank] or list(members)

    def describe(self) -> str:
        whom = "anyone" if self.source is None else f"rank {self.source}"
        return f"a message from {whom}, tag {self.tag}{self.comm.group()}"


# The array, copied if the send is eager; the line that sent it; when it can be seen: if eager its arrival, else when it
# was sent; and, if not eager, the send itself.
Message = tuple[Array, Place, float, Send | None]


class Channel:
    """One (communicator, source, tag) of one receiver. At most one of the two queues holds anything."""

    __slots__ = ("messages", "receives")

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()  # sent, not yet asked for
        self.receives: deque[Receive] = deque()  # asked for, not yet sent


class Mailboxes:
    """All channels of all ranks, the receives that are open, and the counts of what was sent."""

    def __init__(self, scheduler: Scheduler, network: Network):
        size = len(scheduler.ranks)
        self.network = network
        self.traffic = Traffic(network, size)
        self.channels: list[dict[tuple[int, int, int], Channel]] = [{} for _ in range(size)]
        self.open_receives: list[dict[Receive, None]] = [{} for _ in range(size)]  # a dict for its order
        # Of each rank, by communicator and tag, and then by source: the channels that (may) hold messages.
        self.unclaimed: list[dict[tuple[int, int], dict[int, Channel]]] = [{} for _ in range(size)]
        self.probes: dict[int, Probe] = {}  # of each rank that waits in one
        self.messages_sent = [0] * size
        self.bytes_sent = [0] * size
        self.splits: dict[tuple[int, int], Split] = {}  # those that some ranks have called and some have not
        self.faults: Injection | None = None
        self._scheduler = scheduler
        self._eager = network.sends == "eager"
        self._contexts: dict[tuple[int, int, int], int] = {}

    def post_send(self, comm: SimulatedCommunicator, array: Array, dest: int, tag: int) -> Request:
        """Count a message, and give it to its receive, or put it where a later one finds it."""
        # 1. Eager: it leaves now, as a copy. Rendezvous: it is seen now, and leaves when both are posted.
        me, receiver = comm.world_rank, comm.members[dest]
        self.messages_sent[me] += 1
        self.bytes_sent[me] += array.nbytes
        request: Request
        message: Message
        if self._eager:
            arrival = self.traffic.carry(comm.me.now, me, receiver, array.nbytes)
            if self.faults is not None:
                arrival = self.faults.arrival(receiver, comm.context, me, tag, arrival)
            request, message = comm.sent, (array.copy(), here(CALLER), arrival, None)
        else:
            request = send = Send(comm, array, dest, tag, here(CALLER))
            arrival = comm.me.now if self.faults is None else self.faults.gets_through(me, receiver, comm.me.now)
            message = (array, send.place, arrival, send)
        if arrival == math.inf:  # a fault has lost it
            return request
        # 2. Match it.
        channel = self._channel(receiver, comm.context, me, tag)
        if channel.receives:
            self._match(message, channel.receives.popleft())
        else:
            channel.messages.append(message)
            self.unclaimed[receiver].setdefault((comm.context, tag), {})[me] = channel
            probe = self.probes.get(receiver)
            if probe is not None and probe.sees(comm.context, me, tag):
                self._scheduler.ends(probe.comm.me, probe)
        self._scheduler.happened()
        return request

    def post_receive(self, comm: SimulatedCommunicator, array: Array, source: int, tag: int) -> Receive:
        """Ask for a message: one that is here or under way, or one that is still to be sent."""
        receive = Receive(comm, array, source, tag, here(CALLER))
        self.open_receives[comm.world_rank][receive] = None
        channel = self._channel(comm.world_rank, comm.context, comm.members[source], tag)
        if channel.messages:
            self._match(channel.messages.popleft(), receive)
        else:
            channel.receives.append(receive)
        return receive

    def _match(self, message: Message, receive: Receive) -> None:
        """A message and a receive have met: both now know when they are done."""
        data, _, arrival, send = message
        scheduler, receiver = self._scheduler, receive.comm.me
        if send is not None:
            sender = send.comm.me
            arrival = self.traffic.carry(scheduler.now, sender.number, receiver.number, data.nbytes)
            if self.faults is not None:
                context, tag = receive.comm.context, receive.tag
                arrival = self.faults.arrival(receiver.number, context, sender.number, tag, arrival)
                if arrival == math.inf:
                    return
            data = data.copy()
            send.at = arrival
            scheduler.ends(sender, send)
            scheduler.happened()
        receive.data, receive.at = data, arrival
        scheduler.ends(receiver, receive)

    def _channel(self, receiver: int, context: int, source: int, tag: int) -> Channel:
        """The channel for messages from world rank `source` to world rank `receiver`."""
        key = (context, source, tag)
        channel = self.channels[receiver].get(key)
        if channel is None:
            channel = self.channels[receiver][key] = Channel()
        return channel

    def child_context(self, context: int, split: int, color: int) -> int:
        """The number that keeps a child communicator's messages apart from all others'."""
        return self._contexts.setdefault((context, split, color), len(self._contexts) + 1)

    # -- what is left ---------------------------------------------------------------------------------------------

    def withdraw(self, sender: int) -> None:
        """A rank is gone: its rendezvous messages, which wait here for their receives, will never leave."""
        for channels in self.channels if not self._eager else ():
            for (_, source, _), channel in channels.items():
                if source == sender:
                    channel.messages.clear()

    def unreceived(self) -> Iterator[tuple[int, int, int, Message]]:
        """(source, receiver, tag, message) of every message that was never received, and has no excuse for that."""
        for receiver, channels in enumerate(self.channels):
            for (_, source, tag), channel in channels.items():
                if channel.messages and not (self.faults and self.faults.parted(source, receiver)):
                    yield from ((source, receiver, tag, message) for message in channel.messages)

    def unfinished(self) -> Iterator[tuple[int, Receive]]:
        """(receiver, receive) of every receive that was never waited for, though its message may have come."""
        for receiver, receives in enumerate(self.open_receives):
            for receive in receives:
                if not (self.faults and self.faults.parted(receive.waits_for()[0], receiver)):
                    yield receiver, receive

    def lost(self) -> bool:
        """Whether a message was never received, or a receive never waited for."""
        return any(True for _ in self.unreceived()) or any(True for _ in self.unfinished())
