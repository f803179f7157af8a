"""The scheduler: who takes part, who is dead, who trains on what, and when all meet.

Its word is the view (membership.py). Whenever somebody comes, leaves or dies:

    1. a new view goes to the servers; until all of them have acknowledged it, no clock is given out
    2. then it goes to workers that come, and if a server has died to all: what the dead has not answered, they send to
       its successor
    3. who comes takes part from the first clock that nobody was given before step 1

So all servers count the same workers in every round. A rank is dead when nothing was heard of it for `deadline`
seconds, or when MPI says so. Every message to the scheduler is a sign of life; ranks that wait send HEARTBEAT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ... import backend
from ...backend import Array
from ...comm import Communicator
from .consistency import Consistency
from .dealing import Dealer
from .keys import Roles
from .membership import View, first_view
from .messages import Code, Expelled, Kind, Message, Refused
from .post import Post
from .report import Event, Report

OVER = "the run is over; it ended without this rank"
ASK = 0.1  # seconds between two questions to MPI who has died
OnMeet = Callable[[int, np.ndarray, int], None]  # label, sums, number of workers that met
OnSamples = Callable[[int], None]  # so many more have been trained on


class WorkerLost(RuntimeError):
    """A worker has died in a run that cannot go on without it."""


class Scheduler:
    """The scheduler's part of rank 0.

    absent    worker ranks that the run does not wait for at its beginning
    deadline  seconds without a word after which a rank is taken for dead
    """

    def __init__(
        self,
        comm: Communicator,
        post: Post,
        roles: Roles,
        consistency: Consistency,
        dealer: Dealer,
        deadline: float,
        absent: frozenset[int] = frozenset(),
        on_meet: OnMeet | None = None,
        on_samples: OnSamples | None = None,
    ):
        self.comm, self.post, self.roles, self.consistency, self.dealer = comm, post, roles, consistency, dealer
        self.deadline, self.on_meet, self.on_samples = deadline, on_meet, on_samples
        self.view = first_view(roles)
        self.awaited = [rank for rank in roles.workers if rank not in absent]  # who has to come before the run begins
        self.registered: dict[int, int] = {}  # ranks that want to take part: their request's number
        self.gone: set[int] = set()  # ranks that have left or died
        self.dead: set[int] = set()  # those of them that have died, and not come back
        self.heard = dict.fromkeys([*self.awaited, *roles.server_ranks], comm.clock())
        self.told = self.view.servers  # which servers live, as the workers know it
        self.unsure: set[int] = set()  # servers that have not acknowledged the view
        self.changes = False  # whether another view is to follow
        self.asking: list[tuple[int, Message]] = []  # clocks asked for while the view changes
        self.meeting: dict[int, tuple[Message, np.ndarray]] = {}  # at the barrier: each worker's request and numbers
        self.clocks: dict[int, int] = {}  # as far as we were told
        self.entered: dict[int, int] = {}  # of each worker, the epoch of its first share
        self.began = comm.clock()
        self.report = Report(consistency.name)
        self.values: list[Array] = []
        self.figures: dict[int, np.ndarray] = {}  # of each server
        self.told_all = False  # whether the last values and figures are here
        self.stopping: set[int] | None = None  # servers that have been told to stop, and have not yet answered
        self.handlers = {
            Kind.REGISTER: self.on_register,
            Kind.CLOCK: self.on_clock,
            Kind.BARRIER: self.on_barrier,
            Kind.HEARTBEAT: self.on_heartbeat,
            Kind.LEAVE: self.on_leave,
            Kind.ACK: self.on_ack,
            Kind.VALUES: self.on_values,
            Kind.STATS: self.on_stats,
        }

    # -- signs of life --------------------------------------------------------------------------------------------

    def check(self) -> float:
        """Look who is dead; returns after how many seconds to look again."""
        now = self.comm.clock()
        failed = self.comm.failed()
        self.heard[self.comm.rank] = now
        for rank in self._living():
            silent = now - self.heard[rank]
            if rank in failed:
                self._is_dead(rank, "its process ended")
            elif silent >= self.deadline:
                self._is_dead(rank, f"not heard of for {silent:.1f} s")
        self._change_view()
        soon = min((self.heard[rank] for rank in self._living()), default=now) + self.deadline - now
        return max(min(soon, ASK if self.comm.survives else soon), 1e-3)

    def _living(self) -> list[int]:
        """Ranks that are expected to give signs of life."""
        waited_for = self.awaited if not self.view.number else []
        servers = [rank for rank in self.view.servers if rank >= 0]
        return [rank for rank in dict.fromkeys([*servers, *self.view.workers, *waited_for]) if rank not in self.gone]

    def _is_dead(self, rank: int, how: str) -> None:
        seconds = self.comm.clock() - self.began
        role = "server" if rank in self.roles.server_ranks else "worker"
        self.report.deaths.append(Event(rank, role, seconds, self.clocks.get(rank, 0), how))
        self.gone.add(rank)
        self.dead.add(rank)
        self.entered.pop(rank, None)
        self.registered.pop(rank, None)
        self.meeting.pop(rank, None)
        self.unsure.discard(rank)
        if rank in self.awaited:
            self.awaited.remove(rank)
        if self.told_all and self.stopping is not None:
            self.stopping.discard(rank)
        if role == "worker" and not self.consistency.goes_on:
            raise WorkerLost(
                f"worker rank {rank} is lost ({how}, at clock {self.clocks.get(rank, 0)}), and {self.consistency.name} "
                "cannot go on without it; async, ssp:S and backup:B can"
            )
        if role == "server" and not self.roles.copies:
            raise WorkerLost(f"server rank {rank} is lost ({how}), and with copies=0 nobody else has its parameters")
        if role == "server":
            self._with_servers().check(self.roles.copies)
        self.changes = True

    def _with_servers(self) -> View:
        """The present view, with the servers that live now."""
        return replace(self.view, servers=tuple(-1 if rank in self.gone else rank for rank in self.view.servers))

    def heard_of(self, rank: int, message: Message) -> None:
        """A worker lives. Errors  Expelled: it does not take part any more. Refused: it is no worker"""
        if rank not in self.roles.workers:
            raise Refused(Code.NO_ROLE, f"rank {rank} is no worker: those are {self.roles.workers}")
        if rank not in self.view.workers:
            raise Expelled(Code.EXPELLED, f"rank {rank} does not take part (any more): register first")
        self.heard[rank] = self.comm.clock()
        self.clocks[rank] = max(self.clocks.get(rank, 0), message.clock)

    def on_heartbeat(self, source: int, message: Message, body: Any) -> None:
        """It lives. A server that was taken for dead is told so."""
        if source in self.roles.server_ranks and source not in self.view.servers:
            self._send_view(source)
        elif source in self.view.servers:
            self.heard[source] = self.comm.clock()
            if self.stopping is None:
                self.post.send(source, Kind.ACK)  # so that it knows that we live
        elif source in self.awaited and not self.view.number:
            self.heard[source] = self.comm.clock()
        else:
            self.heard_of(source, message)

    # -- coming, leaving, dying -----------------------------------------------------------------------------------

    def on_register(self, source: int, message: Message, body: Any) -> None:
        """A worker wants to take part: at the beginning, or later."""
        if source not in self.roles.workers or source in self.view.workers:
            why = (
                "takes part already" if source in self.view.workers else f"is no worker: those are {self.roles.workers}"
            )
            raise Refused(Code.NO_ROLE, f"rank {source} {why}")
        if self.stopping is not None:
            self.dead.discard(source)  # it knows now
            raise Refused(Code.OVER, OVER)
        self.registered[source] = message.number
        self.heard[source] = self.comm.clock()
        self.gone.discard(source)
        self.dead.discard(source)
        self.changes = True
        self._change_view()

    def on_leave(self, source: int, message: Message, body: Any) -> None:
        """A worker is done."""
        self.heard_of(source, message)
        self.report.waited[source] = message.weight
        self.report.clocks[source] = message.clock
        self.post.send(source, Kind.ACK, number=message.number)
        self.gone.add(source)
        self.changes = True
        self._change_view()

    def _change_view(self) -> None:
        """Step 1, unless the last view is still on its way, or the run has not begun."""
        beginning = not self.view.number
        if (
            self.told_all
            or not self.changes
            or self.unsure
            or (beginning and not set(self.awaited) <= self.registered.keys())
        ):
            self._meet()
            return
        self.changes = False
        first = 0 if beginning else max([self.dealer.newest, *self.clocks.values()]) + 1
        workers = {rank: clock for rank, clock in self.view.workers.items() if rank not in self.gone}
        for rank in sorted(self.registered.keys() - workers.keys()):
            workers[rank] = self.clocks[rank] = first
            self.heard[rank] = self.comm.clock()
            if not beginning:
                self.report.joined.append(Event(rank, "worker", self.comm.clock() - self.began, first, "joined"))
        if beginning:
            self.began = self.comm.clock()
        servers = self._with_servers().servers
        self.view = View(self.view.number + 1, workers, servers)
        self.unsure = {rank for rank in servers if rank >= 0}
        for rank in self.unsure:
            self._send_view(rank)

    def on_ack(self, source: int, message: Message, body: Any) -> None:
        """A server knows the view; when all do, step 2."""
        if source in self.view.servers:
            self.heard[source] = self.comm.clock()
        if message.stamp != self.view.number or source not in self.unsure:
            return
        self.unsure.discard(source)
        self._settle()

    def _settle(self) -> None:
        if self.unsure:
            return
        for rank in self.view.workers:
            if rank in self.registered or (self.told != self.view.servers and rank not in self.gone):
                self._send_view(rank, self.registered.pop(rank, 0))
        self.told = self.view.servers
        asking, self.asking = self.asking, []
        for source, message in asking:
            if source in self.view.workers:
                self._deal(source, message)
        if self.changes:
            self._change_view()
        elif self.stopping and not self.told_all:
            self._ask_for_the_last()
        self._meet()

    def _send_view(self, rank: int, number: int = 0) -> None:
        self.post.send(rank, Kind.VIEW, self.view.pack(), number=number, stamp=self.view.number)

    # -- clocks and shares ----------------------------------------------------------------------------------------

    def on_clock(self, source: int, message: Message, body: Any) -> None:
        """A worker has come to a clock: D.3(2), its share of the data."""
        self.heard_of(source, message)
        if self.unsure:
            self.asking.append((source, message))
        else:
            self._deal(source, message)

    def _deal(self, source: int, message: Message) -> None:
        members = [rank for rank, first in self.view.workers.items() if first <= message.clock]
        share = self.dealer.deal(source, message.clock, members, message.size, message.weight)
        self.entered.setdefault(source, share.epoch)
        self.report.samples[source] = self.report.samples.get(source, 0) + message.size
        if self.on_samples is not None:
            self.on_samples(message.size)
        self.post.send(
            source, Kind.DEAL, number=message.number, clock=message.clock, stamp=share.epoch, start=share.start,
            size=share.size,
        )  # fmt: skip

    # -- the barrier ----------------------------------------------------------------------------------------------

    def on_barrier(self, source: int, message: Message, body: Any) -> None:
        """A worker waits for all others that live; numbers are added up on the way."""
        self.heard_of(source, message)
        if message.length != 8 * message.size:
            raise Refused(Code.WRONG_LENGTH, f"barrier with {message.length} bytes for {message.size} float64 numbers")
        numbers = np.empty(0) if body is None else np.frombuffer(body, np.float64)
        for other, theirs in self.meeting.values():
            if (other.key, len(theirs)) != (message.key, len(numbers)):
                raise Refused(
                    Code.WRONG_LENGTH,
                    f"barrier {message.key} with {len(numbers)} numbers; others are at {other.key} with {len(theirs)}",
                )
        self.meeting[source] = (message, numbers.copy())
        self._meet()

    def _meet(self) -> None:
        """If all are there, let them go on."""
        if self.unsure or self.changes or not self.meeting:
            return
        # Who joined late and has had shares of a later epoch only does not come to this barrier.
        epoch = max(message.stamp for message, _ in self.meeting.values())
        expected = {
            rank for rank, first in self.view.workers.items() if not first or self.entered.get(rank, epoch) < epoch
        }
        if not expected <= self.meeting.keys():
            return
        workers = sorted(self.meeting)
        total = np.sum([self.meeting[rank][1] for rank in workers], axis=0)
        label = self.meeting[workers[0]][0].key
        for i, rank in enumerate(workers):
            self.post.send(
                rank, Kind.RELEASE, total, number=self.meeting[rank][0].number, start=i, size=len(workers),
                dtype=ord("d"),
            )  # fmt: skip
        self.meeting.clear()
        if self.on_meet is not None:
            self.post.flush()
            self.on_meet(label, total, len(workers))

    # -- the end --------------------------------------------------------------------------------------------------

    def all_have_left(self) -> bool:
        """Whether the run has begun and no worker takes part any more.

        Errors  WorkerLost: none of them got to its end
        """
        if not self.view.number or self.view.workers or self.registered or self.unsure or self.changes:
            return False
        if self.report.deaths and not self.report.waited:
            raise WorkerLost("all workers are lost:\n" + self.report.events())
        return True

    def stop(self, values: list[Array]) -> None:
        """Tell the servers that it is over. `values`: of each key, where its values are to be put."""
        self.values = values
        self.report.seconds = self.comm.clock() - self.began
        self._ask_for_the_last()

    def _ask_for_the_last(self) -> None:
        """Values and figures; again, of all, if a server has died before all have told them."""
        self.stopping = {rank for rank in self.view.servers if rank >= 0}
        for rank in self.stopping:
            self.post.send(rank, Kind.STOP)

    def _end(self) -> None:
        """All has been told: the servers may end, and say so."""
        self.told_all = True
        for server, figures in self.figures.items():
            self.report.take(server, figures)
        self.stopping = {rank for rank in self.view.servers if rank >= 0}
        for rank in self.stopping:
            self.post.send(rank, Kind.STOP, size=1)
        for rank in self.dead:  # should it wake up, it finds this
            self.post.refuse(rank, None, Refused(Code.OVER, OVER))

    def on_values(self, source: int, message: Message, body: Any) -> None:
        """The last values of a key."""
        into = self.room(source, message)
        if body is not into:
            into[...] = backend.to(body.view(into.dtype), backend.device_of(into))

    def room(self, source: int, message: Message) -> Array:
        """Where values, or a barrier's numbers, are to be put. Errors  Refused: nobody asked for them"""
        if message.kind == Kind.BARRIER:
            if source not in self.view.workers or message.length != 8 * message.size:
                raise Refused(Code.WRONG_LENGTH, f"barrier with {message.length} bytes for {message.size} numbers")
            return np.empty(message.length, np.uint8)
        if self.stopping is None or source not in self.stopping or message.key >= len(self.values):
            raise Refused(Code.NO_ROLE, f"values from rank {source}, which was not asked")
        into = self.values[message.key]
        if message.length != into.nbytes:
            raise Refused(Code.WRONG_LENGTH, f"{message.length} bytes of key {message.key}, which has {into.nbytes}")
        return into

    def on_stats(self, source: int, message: Message, body: Any) -> None:
        """A server's figures, its last words."""
        if self.stopping is None or source not in self.stopping:
            raise Refused(Code.NO_ROLE, f"figures from rank {source}, which was not asked")
        self.stopping.discard(source)
        self.heard[source] = self.comm.clock()
        if not self.told_all:
            self.figures[source] = np.empty(0, np.int64) if body is None else np.frombuffer(body, np.int64)
            if not self.stopping:
                self._end()
