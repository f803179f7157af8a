"""`Communicator` over MPI. The only module that imports mpi4py, and only when a world is opened.

Arrays travel as bytes: their own memory, seen as uint8, is what MPI reads and writes. One message of ours is one of
MPI's, or several where it is larger than PIECE (MPI counts in 32 bits); MPI keeps messages in order, so the pieces
need no numbers. MPI does not know dtypes here: the receiver checks the number of bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from mpi4py import MPI

from .. import backend
from ..backend import Array
from .base import Communicator, Envelope, Request, default_checked, default_timeout
from .deaths import Deaths, Epitaph
from .endings import Endings, say
from .handle import Handle, InFlight, Waits, progress
from .notes import Notes
from .record import MESSAGE_END, FlightRecord
from .scratch import Scratch
from .shared import SharedMemory
from .status import place_in
from .stored import stored_tuning
from .threads import share_cores
from .waiting import FIRST_TURNS, PolledRequest, give_way, wait_until
from .watchdog import Watchdog
from .where import shortened

if TYPE_CHECKING:
    from .native import Native

BYTE = MPI.BYTE
PIECE = 1 << 30  # bytes of the largest single MPI message
SEGMENT = 1 << 19  # bytes; see Communicator.segment. A ring all-reduce of 64 MiB by 2 ranks takes 16.0 ms uncut, 10.9
# in segments of 512 KiB or 1 MiB, 11.0 of 256 KiB, 15.5 of 64 KiB; of 4 MiB and less, cutting gains nothing
PLAIN = frozenset("?bBhHiIlLqQefdFD")  # dtypes whose arrays MPI takes as they are, without our telling it the bytes


def open_world(survives: bool = False, finalizes: bool = True) -> MpiCommunicator:
    """The communicator of all ranks; every rank must call it, once.

    `survives`: the job goes on when a rank dies. `finalizes`: Python will call MPI_Finalize at its end.

    From here on an exception, sys.exit or the death of one rank ends the job (see endings.py; for jobs that outlive
    their ranks, deaths.py), a wait that passes its deadline is explained (see watchdog.py), and BLAS uses this rank's
    share of the cores.
    """
    deaths = Deaths(MPI, survives)
    endings = Endings(MPI, Notes(MPI, MPI.COMM_WORLD.Dup(), deaths))
    endings.must_leave = survives and finalizes
    endings.install()
    world = _kind(survives)(MPI.COMM_WORLD.Dup(), endings)
    if world.size > 1:
        notes = Notes(MPI, MPI.COMM_WORLD.Dup(), deaths, endings.ended_by_another)
        endings.watchdog = Watchdog(MPI, notes, world, say)
        endings.watchdog.start()
    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    share_cores(host.size)
    first = np.array(MPI.Group.Translate_ranks(host.group, [0], MPI.COMM_WORLD.group))
    MPI.COMM_WORLD.Allgather(first, world.world_hosts)
    host.Free()
    world.prepare()
    world.tuning = _told_by_rank_0(stored_tuning() if world.rank == 0 else "")
    return world


def _kind(survives: bool) -> type[MpiCommunicator]:
    if not survives:
        return MpiCommunicator
    from .survival import SurvivingCommunicator

    return SurvivingCommunicator


def _told_by_rank_0(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    length = np.array([data.size])
    MPI.COMM_WORLD.Bcast(length)
    data = np.resize(data, length[0])
    MPI.COMM_WORLD.Bcast(data)
    return data.tobytes().decode()


def library() -> str:
    """The first words of the MPI library's own description."""
    return MPI.Get_library_version().splitlines()[0].strip()


def _cut(buffer: Any, nbytes: int) -> list[Any]:
    """Memory in pieces that MPI can count; one, empty, for no bytes."""
    if nbytes <= PIECE:
        return [buffer]
    return [buffer[start : start + PIECE] for start in range(0, nbytes, PIECE)]


def _memory(array: Array) -> tuple[Any, np.ndarray | None]:
    """What MPI is to read or write for `array`, and the pinned host memory it is in if not the array's own."""
    if not backend.on_gpu(array):
        return array.reshape(-1).view(np.uint8), None
    if _cuda_aware():
        backend.synchronize()  # MPI does not know of the GPU's queue of work
        return MPI.buffer.fromaddress(array.data.ptr, array.nbytes), None
    staged = backend.pinned_like(array)
    return staged.reshape(-1).view(np.uint8), staged


@cache
def _fence() -> Callable[[], None]:
    """What orders this process's reads and writes of memory that it shares: MPI's, which is portable."""
    window = MPI.Win.Allocate_shared(8, comm=MPI.COMM_SELF)
    window.Lock_all(MPI.MODE_NOCHECK)
    return window.Sync


@cache
def _cuda_aware() -> bool:
    """Whether MPI may be handed a GPU's addresses: MINIDIST_CUDA_AWARE=0/1, else what the library says of itself."""
    wish = os.environ.get("MINIDIST_CUDA_AWARE")
    if wish is not None:
        return wish == "1"
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


class MpiCommunicator(Communicator):
    """A communicator backed by one of MPI's."""

    def __init__(self, comm: MPI.Comm, endings: Endings, parent: MpiCommunicator | None = None):
        self.rank, self.size = comm.rank, comm.size
        self.mpi, self.endings = comm, endings
        # The world's numbers of its ranks.
        self.members: list[int] = MPI.Group.Translate_ranks(comm.group, range(comm.size), MPI.COMM_WORLD.group)
        # The host of each rank of the world, and what `stored_tuning` gave on its rank 0: filled in by open_world.
        self.world_hosts: np.ndarray = np.zeros(endings.size, np.int64) if parent is None else parent.world_hosts
        self.tuning: str = "" if parent is None else parent.tuning
        self.segment = SEGMENT if parent is None else parent.segment
        self.timeout = default_timeout() if parent is None else parent.timeout
        self.checked = default_checked() if parent is None else parent.checked
        self.record = FlightRecord(self.clock) if parent is None else parent.record
        self.group_name = self.record.name_group(self.members)
        self.in_flight = InFlight() if parent is None else parent.in_flight
        self._shared: SharedMemory | None = None
        self._status = MPI.Status()  # of iprobe
        self.scratch = Scratch() if parent is None else parent.scratch

    clock = staticmethod(time.perf_counter)

    def hosts(self) -> list[int]:
        return self.world_hosts[self.members].tolist()

    def elapse(self, seconds: float) -> None:
        pass

    def reduced(self, nbytes: int) -> None:
        pass

    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        self.record.sent_bytes += array.nbytes
        self.record.sent_messages += 1
        told = self._tell("s", dest, tag, array) if self.record.listeners else None
        if type(array) is np.ndarray and array.dtype.char in PLAIN and array.nbytes <= PIECE:
            return MpiRequest(self, self.mpi.Isend((array, BYTE), dest, tag), array, dest, tag, False, told)
        buffer, staged = _memory(array)
        if staged is not None:
            backend.copy_into(staged, array)
        pieces = [self.mpi.Isend((piece, BYTE), dest, tag) for piece in _cut(buffer, array.nbytes)]
        return LongRequest(self, pieces, array, None, dest, tag, False, told)

    def _irecv(self, array: Array, source: int, tag: int) -> Request:
        told = self._tell("r", source, tag, array) if self.record.listeners else None
        if type(array) is np.ndarray and array.dtype.char in PLAIN and array.nbytes <= PIECE:
            return MpiRequest(self, self.mpi.Irecv((array, BYTE), source, tag), array, source, tag, True, told)
        buffer, staged = _memory(array)
        pieces = [self.mpi.Irecv((piece, BYTE), source, tag) for piece in _cut(buffer, array.nbytes)]
        return LongRequest(self, pieces, array, staged, source, tag, True, told)

    def _iprobe(self, source: int | None, tag: int) -> Envelope | None:
        status = self._status
        if not self.mpi.Iprobe(MPI.ANY_SOURCE if source is None else source, tag, status):
            return None
        return Envelope(status.source, tag, status.Get_count(BYTE))

    def _probe(self, source: int | None, tag: int, timeout: float | None) -> Envelope:
        found = [self._iprobe(source, tag)]
        if timeout == 0 and found[0] is None:
            raise TimeoutError(f"no message with tag {tag} is here")

        def look() -> bool:
            found[0] = self._iprobe(source, tag)
            return found[0] is not None

        for _ in range(0 if self.in_flight else FIRST_TURNS):  # as for a message that is asked for: MpiRequest.wait
            if found[0] is not None or look() or look():
                return found[0]  # type: ignore[return-value]
            give_way()
        peers = [m for rank, m in enumerate(self.members) if (rank != self.rank if source is None else rank == source)]
        what = f"a message from {'anyone' if source is None else source}, tag {tag}"
        self.wait_for(look, peers, timeout, what, anyone=source is None)
        return found[0]  # type: ignore[return-value]

    def _wait_any(self, waits: Waits, timeout: float | None) -> None:
        requests: list[Any] = [request for _, request in waits if not isinstance(request, Handle)]
        if not requests:
            return  # a helper thread has just moved on what they wait for
        peers = sorted({peer for request in requests for peer in request.peers()})
        # Nobody but an operation itself tests what it waits for: what is wrong with it is raised there. So this only
        # looks whether one has gone on, with wait_for's help.
        self.wait_for(
            lambda: any(handle.done or handle.current is not request for handle, request in waits),
            peers,
            timeout,
            requests[0],
        )

    def _split(self, color: int | None, key: int) -> Communicator | None:
        self._meet(f"split(color={color}, key={key})")
        child = self.mpi.Split(MPI.UNDEFINED if color is None else color, key)
        return None if child == MPI.COMM_NULL else type(self)(child, self.endings, self)

    def _split_by_host(self) -> Communicator:
        self._meet("split_by_host()")
        return type(self)(self.mpi.Split_type(MPI.COMM_TYPE_SHARED, self.rank), self.endings, self)

    def shared_memory(self, slot: int, common: int) -> SharedMemory:
        if self._shared is None:
            self.check_shares_memory()
            self._shared = SharedMemory(self, slot, common, _fence())
        return self._shared

    def check_shares_memory(self) -> None:
        if self._shared is None and (hosts := len(set(self.hosts()))) > 1:
            raise ValueError(f"algorithm 'shared_memory' needs ranks of one host; these are on {hosts}")

    def tested_in_vain(self, request: Request) -> None:
        pass

    def drive(self) -> None:
        """Let MPI move on messages that are under way: it works in calls of its functions only."""
        self.mpi.Iprobe(MPI.ANY_SOURCE, 0)

    def _meet(self, why: str) -> None:
        """Wait for all ranks: MPI's own split waits without a deadline, and now it has nothing to wait for."""
        everyone = self.mpi.Ibarrier()
        self.wait_for(everyone.Test, self.members, None, why)

    def native(self, array: Array, op: str | None = None) -> Native:
        from .native import Native

        return Native(self, array, op)

    def abort(self, code: int = 1) -> NoReturn:
        self.endings.abort(code)

    def outlive(self) -> bool:
        if self.rank == 0 and not self.survives and self.endings.epitaph is None:
            self.endings.epitaph = Epitaph(MPI)
        return self.survives

    def explained(self, error: Exception, peers: list[int], what: object) -> Exception:
        """What to raise for an error of MPI's in a wait for the world ranks `peers`."""
        if self.endings.epitaph is not None:
            error.add_note(self.endings.epitaph.line)
        return error

    def wait_for(
        self, test: Callable[[], bool], peers: list[int], timeout: float | None, what: object, anyone: bool = False
    ) -> None:
        """Wait for `test()`, which depends on the world ranks `peers`; `what` names the operation if it fails.

        It depends on all of them, or where `anyone`, on one that is left. Operations in flight go on meanwhile.
        `timeout` None: the communicator's deadline; when that passes, a table of what every rank is doing is printed
        before TimeoutError is raised.
        """
        seconds = self.timeout if timeout is None else timeout
        record, watchdog = self.record, self.endings.watchdog

        def who() -> str:
            whom = f"rank {peers[0]}" if len(peers) == 1 else f"one of ranks {shortened(peers)}"
            return f"{whom}: {what}, at {place_in(sys._getframe(1))}"

        def test_all() -> bool:
            progress(self.in_flight)
            return test()

        waits = test_all if self.in_flight else test
        before, began = record.waiting, self.clock()
        record.waiting = (what, peers, began)
        try:
            if wait_until(waits, seconds, lambda: self.endings.check(peers, waits, who, anyone)):
                return
            if timeout is None and watchdog is not None:
                watchdog.deadline_passed(began, seconds)
        finally:
            record.waiting = before
            if record.listeners:
                record.waited(began)
        raise TimeoutError(
            f"rank {self.endings.rank} of {self.endings.size} has waited {seconds:g} s for {who()} "
            "(the deadline is comm.timeout, at first MINIDIST_TIMEOUT or 600 s)"
        )


class MpiRequest(PolledRequest):
    """A started send or receive."""

    __slots__ = ("comm", "request", "array", "peer", "tag", "receiving", "status")

    def __init__(
        self, comm: MpiCommunicator, request: Any, array: Array, peer: int, tag: int, receiving: bool, told: Any = None
    ):
        self.comm = comm
        self.request = request  # None: done
        self.array = array  # also keeps its memory alive while MPI uses it
        self.peer = peer
        self.tag = tag
        self.receiving = receiving
        self.status = MPI.Status() if receiving else None
        self.entry, self.message = None, told

    def _poll(self) -> bool:
        while self.request is not None:
            status = self.status
            try:
                if not self.request.Test(status):
                    return False
            except MPI.Exception as error:
                self.request = None
                self._over()
                if status is not None and error.Get_error_class() == MPI.ERR_TRUNCATE:
                    raise ValueError(f"{self}: {self._too_long(status.Get_count(BYTE))}") from None
                raise self.comm.explained(error, self.peers(), self) from None
            self.request = None
            self._done(0 if status is None else status.Get_count(BYTE))
        return True

    def _done(self, received: int) -> None:
        """The MPI request is."""
        self._over()
        if self.receiving and received != self.array.nbytes:
            raise ValueError(f"{self}: the message has {received} bytes, the receiving array {self.array.nbytes}")

    def _over(self) -> None:
        if self.entry is not None:
            self.comm.record.end(self.entry)
        if self.message is not None:
            self.message[MESSAGE_END] = self.comm.clock()

    def _too_long(self, received: int) -> str:
        """Some MPIs say how long a message is that did not fit, others do not."""
        has = f"{received} bytes" if received > self.array.nbytes else "more bytes"
        return f"the message has {has}, the receiving array {self.array.nbytes}"

    def peers(self) -> list[int]:
        """World ranks it waits for."""
        return [self.comm.members[self.peer]]

    def __str__(self) -> str:
        what = "receive from" if self.receiving else "send to"
        return f"{what} rank {self.peer}, tag {self.tag}, {self.array.nbytes} bytes"


class LongRequest(MpiRequest):
    """One in several pieces, or through staging memory, or of a dtype that MPI does not know."""

    __slots__ = ("rest", "staged", "received")

    def __init__(
        self,
        comm: MpiCommunicator,
        pieces: list[MPI.Request],
        array: Array,
        staged: np.ndarray | None,
        peer: int,
        tag: int,
        receiving: bool,
        told: Any,
    ):
        super().__init__(comm, pieces[0], array, peer, tag, receiving, told)
        self.rest = pieces[1:]  # finished in order
        self.staged = staged  # host memory in which a GPU's array arrives
        self.received = 0  # bytes, of the pieces that are done

    def _done(self, received: int) -> None:
        self.received += received
        if self.rest:
            self.request = self.rest.pop(0)
            return
        super()._done(self.received)
        if self.staged is not None:
            backend.copy_into(self.array, self.staged)
