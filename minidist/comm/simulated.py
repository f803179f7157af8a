"""Many ranks in one process: `simulate` runs a rank program unchanged, once per rank, deterministically.

A seeded scheduler decides which rank runs next, so that one seed gives one interleaving and another seed another; what
goes wrong with seed 7 goes wrong with seed 7 again. Ranks change at every wait, and at half of all sends.

Time is virtual. Every rank has its own clock, which moves on when the rank waits for a message that takes time on the
`Network`, when it says that it works (`elapse`), and when a wait given a timeout of its own gives up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..backend import Array
from .agenda import AnyOf, Wait
from .base import Communicator, Envelope, Request, default_checked, default_timeout
from .faults import Fault, Strike
from .handle import InFlight, Waits, progress
from .injection import Injection
from .mailbox import Mailboxes, Pending, Probe, Sent, Split
from .network import Network
from .record import FlightRecord, Waiting
from .report import LostMessages, lost_text
from .scheduler import Scheduler
from .scratch import Scratch
from .where import shortened

Program = Callable[..., Any]

# The world communicator of the simulated rank that is running; unset outside of one. Each greenlet has its own context.
current_world: ContextVar[SimulatedCommunicator] = ContextVar("current_world")


@dataclass(frozen=True)
class Simulation:
    """What a simulated run left behind. Messages and bytes are counted where they are sent."""

    results: list[Any]  # what each rank's program returned; None of those who are gone
    seconds_by_rank: list[float]  # each rank's virtual clock when its program returned, or when it was gone
    messages_by_rank: list[int]
    bytes_by_rank: list[int]
    struck: list[Strike] = field(default_factory=list)  # the faults that have, in this order
    gone: list[int] = field(default_factory=list)  # ranks that were killed, or hang for ever

    @property
    def seconds(self) -> float:
        """Virtual seconds until the last rank had finished."""
        return max(self.seconds_by_rank)

    @property
    def messages(self) -> int:
        """Messages sent by all ranks together."""
        return sum(self.messages_by_rank)

    @property
    def bytes(self) -> int:
        """Bytes sent by all ranks together."""
        return sum(self.bytes_by_rank)


def simulate(
    program: Program,
    size: int,
    *args: Any,
    seed: int = 0,
    network: Network | None = None,
    faults: Sequence[Fault] = (),
) -> Simulation:
    """Run `program(comm, *args)` once per rank, for `size` ranks, in this process; `seed` picks the interleaving.

    `network` says what messages cost in virtual time, and whether a send waits for its receive; None: they cost
    nothing, and a send copies its array and never waits. `faults` says what goes wrong, see faults.py. The arguments
    are shared by all ranks, not copied.

    Errors  whatever a rank raises is raised here, with that rank's traceback; the other ranks are ended
            Deadlock: every rank waits for another. LostMessages: something sent was never received, though neither
            rank was killed or hung, and no partition was between them
            TypeError, ValueError (in the receiver): a message's dtype or size is not the receiving array's
    """
    if size < 1:
        raise ValueError(f"size {size}: expected at least 1 rank")
    scheduler = Scheduler(size, seed)
    mailboxes = Mailboxes(scheduler, network or Network())
    if faults:
        mailboxes.faults = Injection(faults, scheduler, mailboxes)

    def run_rank(rank: int) -> Any:
        comm = SimulatedCommunicator(scheduler, mailboxes, range(size), rank)
        current_world.set(comm)
        comm.prepare()
        return program(comm, *args)

    results = scheduler.run(run_rank)
    if mailboxes.lost():
        raise LostMessages(lost_text(mailboxes))
    clocks = [rank.now for rank in scheduler.ranks]
    gone = [rank.number for rank in scheduler.ranks if rank.gone]
    return Simulation(results, clocks, mailboxes.messages_sent, mailboxes.bytes_sent, scheduler.struck, gone)


def alone() -> SimulatedCommunicator:
    """The world of a program started without mpirun: one rank, which can send to itself.

    Waiting for a message that it has not sent raises Deadlock at once.
    """
    scheduler = Scheduler(1, seed=0)
    return Alone(scheduler, Mailboxes(scheduler, Network()), range(1), 0)


class SimulatedCommunicator(Communicator):
    """One simulated rank's end of a communicator. `timeout` never passes here: a deadlock is found at once instead.

    Splitting costs no messages. Nobody leaves a split before the last rank has come, so all leave at that one's time.
    """

    virtual = True

    def __init__(
        self,
        scheduler: Scheduler,
        mailboxes: Mailboxes,
        members: Sequence[int],
        rank: int,
        context: int = 0,
        parent: SimulatedCommunicator | None = None,
    ):
        self.rank = rank
        self.size = len(members)
        self.scheduler = scheduler
        self.mailboxes = mailboxes
        self.members = members  # world ranks, in the order of this communicator
        self.world_rank = members[rank]
        self._ranks = {member: number for number, member in enumerate(members)}
        self._looks: dict[tuple[int | None, int], Probe] = {}
        self.me = scheduler.ranks[self.world_rank]
        self.context = context
        self.network = mailboxes.network
        self.segment = mailboxes.network.segment
        self.timeout = default_timeout() if parent is None else parent.timeout
        self.checked = default_checked() if parent is None else parent.checked
        self.record = FlightRecord(self.clock) if parent is None else parent.record
        self.in_flight = InFlight() if parent is None else parent.in_flight
        self.scratch = Scratch() if parent is None else parent.scratch
        self.group_name = self.record.name_group(members)
        self.sent = Sent(self.record)
        self.me.record = self.record
        self._splits = 0

    def name(self) -> str:
        """ "rank 2 of 4", for messages."""
        return f"rank {self.rank} of {self.size}{self.group()}"

    def group(self) -> str:
        """Words that tell a communicator made by `split` from the world."""
        return "" if self.context == 0 else f" in a group of {self.size} (world ranks {shortened(self.members)})"

    # -- messages -------------------------------------------------------------------------------------------------

    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        self.scheduler.check_running(self.me)
        if self.mailboxes.faults is not None:
            self.mailboxes.faults.before_send(self.me, self.mailboxes.messages_sent[self.world_rank] + 1)
        self.record.sent_bytes += array.nbytes
        self.record.sent_messages += 1
        told = self._tell("s", dest, tag, array) if self.record.listeners else None
        request = self.mailboxes.post_send(self, array, dest, tag)
        request.message = told
        self.scheduler.pause(self.me)
        return request

    def _irecv(self, array: Array, source: int, tag: int) -> Request:
        self.scheduler.check_running(self.me)
        told = self._tell("r", source, tag, array) if self.record.listeners else None
        request = self.mailboxes.post_receive(self, array, source, tag)
        request.message = told
        return request

    def _iprobe(self, source: int | None, tag: int) -> Envelope | None:
        self.scheduler.check_running(self.me)
        probe = self._probe_of(source, tag)
        found = probe.found()
        if found is None:
            self.tested_in_vain(probe)
            found = probe.found()
        return found

    def _probe(self, source: int | None, tag: int, timeout: float | None) -> Envelope:
        self.scheduler.check_running(self.me)
        probe = self._probe_of(source, tag)
        soon = probe.found()
        if soon is not None:
            return soon
        self.mailboxes.probes[self.world_rank] = probe
        try:
            self.wait_for(probe, timeout)
        finally:
            del self.mailboxes.probes[self.world_rank]
        found = probe.found()
        assert found is not None
        return found

    def _probe_of(self, source: int | None, tag: int) -> Probe:
        """One object for all looks at a place: that it is looked at again shows that the rank waits."""
        return self._looks.setdefault((source, tag), Probe(self, source, tag))

    def rank_of(self, world_rank: int) -> int:
        """The number in this communicator of a rank of the world."""
        return self._ranks[world_rank]

    # -- waiting --------------------------------------------------------------------------------------------------

    def wait_for(self, wait: Wait, timeout: float | None) -> None:
        """Wait until the clock has reached `wait.at`. Operations in flight go on meanwhile.

        Errors  TimeoutError: `timeout` virtual seconds have passed (None: it never passes)
        """
        me, record = self.me, self.record
        began = me.now
        deadline = None if timeout is None else began + timeout
        record.waiting = Waiting(wait, wait.waits_for(), me.now)
        try:
            while True:
                moved = bool(self.in_flight) and progress(self.in_flight)
                if wait.at is not None and wait.at <= me.now:
                    return
                if not moved:
                    self.scheduler.block(me, AnyOf([wait, *self._in_flight()]) if self.in_flight else wait, deadline)
                    if deadline is not None and me.now >= deadline and not (wait.at is not None and wait.at <= me.now):
                        raise TimeoutError(f"{self.name()} has waited {timeout:g} virtual seconds: {wait.describe()}")
        finally:
            record.waiting = None
            if record.listeners:
                record.waited(began)

    def _wait_any(self, waits: Waits, timeout: float | None) -> None:
        self.wait_for(AnyOf(request for _, request in waits if isinstance(request, Pending)), timeout)

    def _in_flight(self) -> list[Pending]:
        """What this rank's operations in flight wait for."""
        current = [handle.current for handle in self.in_flight]
        return [request for request in current if isinstance(request, Pending) and not request.done]

    def tested_in_vain(self, wait: Any) -> None:
        """Let other ranks run; time passes if this one does nothing but test."""
        self.scheduler.idle(self.me, wait, self._in_flight() if self.in_flight else ())

    # -- time -----------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.me.now

    def elapse(self, seconds: float) -> None:
        if not 0 <= seconds < math.inf:
            raise ValueError(f"elapse({seconds}): expected a number of seconds, 0 or more")
        if seconds:
            self.scheduler.elapse(self.me, seconds)

    def reduced(self, nbytes: int) -> None:
        self.elapse(self.mailboxes.network.gamma * nbytes)

    def hosts(self) -> list[int]:
        return [self.mailboxes.traffic.hosts[member] for member in self.members]

    # -- groups ---------------------------------------------------------------------------------------------------

    def _split(self, color: int | None, key: int) -> Communicator | None:
        self.scheduler.check_running(self.me)
        scheduler, mailboxes = self.scheduler, self.mailboxes
        # 1. Say what we want, and wait until every rank has.
        self._splits += 1
        name = (self.context, self._splits)
        split = mailboxes.splits.setdefault(name, Split(self))
        split.given[self.rank] = (color, key)
        split.callers.append(self.me)
        if len(split.given) < self.size:
            self.wait_for(split, None)
        else:
            del mailboxes.splits[name]
            split.at = self.me.now
            for caller in split.callers:
                scheduler.ends(caller, split)
            scheduler.happened()
        # 2. Everyone now works out the same groups.
        if color is None:
            return None
        group = sorted((k, rank) for rank, (c, k) in split.given.items() if c == color)
        members = [self.members[rank] for _, rank in group]
        context = mailboxes.child_context(*name, color)
        rank = members.index(self.world_rank)
        return type(self)(scheduler, mailboxes, members, rank, context, self)

    def _split_by_host(self) -> Communicator:
        host = self.split(self.mailboxes.traffic.hosts[self.world_rank], self.rank)
        assert host is not None
        return host

    # -- ending ---------------------------------------------------------------------------------------------------

    def abort(self, code: int = 1) -> NoReturn:
        raise SystemExit(code)


class Alone(SimulatedCommunicator):
    """One rank that is no simulation of anything: its clock is the real one."""

    virtual = False
    clock = staticmethod(time.perf_counter)
