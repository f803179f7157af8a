"""What a rank program is written against: `Communicator` and `Request`.

A communicator joins `size` ranks, numbered from 0. There are two kinds: over MPI (mpi.py), and simulated in one
process (simulated.py; a program started without mpirun gets a simulated world of one rank). Every argument is checked
here, once for both, so that a mistake is refused at the call with both values named.

Messages are arrays: their bytes travel, never a pickle. A message is matched by communicator, source and tag; two
messages with the same three arrive in the order they were sent.
"""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..backend import Array, namespace, on_gpu

if TYPE_CHECKING:
    from .handle import InFlight, Waits
    from .native import Native
    from .network import Network
    from .record import Entry, FlightRecord, Message
    from .scratch import Scratch
    from .shared import SharedMemory

MAX_TAG = 31999  # every MPI allows tags up to 32767; those from 32000 up are minidist's own


def default_timeout() -> float:
    """Seconds a rank waits for another before it gives up: MINIDIST_TIMEOUT, else 600."""
    text = os.environ.get("MINIDIST_TIMEOUT") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"MINIDIST_TIMEOUT={text!r}: expected a number of seconds above 0")
    return seconds


def default_checked() -> bool:
    """Whether MINIDIST_CHECK asks for checked mode: 1 for yes, 0 (or nothing) for no."""
    text = os.environ.get("MINIDIST_CHECK", "0")
    if text not in ("", "0", "1"):
        raise ValueError(f"MINIDIST_CHECK={text!r}: expected 1 (compare every collective's arguments) or 0")
    return text == "1"


class Request(ABC):
    """A send or receive that has been started. Its array belongs to it until `wait` returns or `test` says True."""

    __slots__ = ("entry", "message")

    entry: Entry | None  # its place in the flight record, whose end is noted when it is done
    message: Message | None  # what the record's listeners know of it, where there are any; its end is noted as well

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Return when done. After `timeout` seconds (None: the communicator's) raise TimeoutError; wait may be retried.

        Errors  ValueError: the message's size is not the receiving array's
        """

    def test(self) -> bool:
        """Whether it is done, without waiting. Errors as for `wait`."""
        return self._poll()

    @abstractmethod
    def _poll(self) -> bool:
        """As `test`; but in a simulation no other rank gets to run meanwhile."""


class Envelope(NamedTuple):
    """What is known of a message before it is received."""

    source: int
    tag: int
    nbytes: int


class Communicator(ABC):
    """`size` ranks that can send one another arrays; this process is number `rank`.

    Arrays are NumPy's or CuPy's, C-contiguous, of any dtype but object. `timeout` is the deadline, in seconds, of every
    wait; a child made by `split` inherits it. A rank has one flight record, one list of operations in flight
    and one of scratch memory, which all its communicators share.
    """

    rank: int
    size: int
    members: Sequence[int]  # their numbers in the world
    group_name: str  # the same on all of them, and no other communicator of theirs has it
    timeout: float
    record: FlightRecord
    in_flight: InFlight
    checked: bool  # whether collectives compare what they were called with first (MINIDIST_CHECK=1)
    segment: float  # bytes; a larger message of a collective is cut, so that adding overlaps receiving
    scratch: Scratch
    network: Network | None = None  # what messages cost, where that is known: in a simulation
    tuning = ""  # what was measured on this machine, in JSON; the same on all ranks
    choices: tuple[dict[str, list[str]], dict[str, list[str]]] | None = None  # for "auto"; see collectives/choice.py
    virtual = False  # whether time is: that of a simulation
    survives = False  # whether the job goes on when a rank of it dies; see deaths.py
    operations = 0  # collectives started on this communicator so far
    agreements = 0  # in checked mode: how often all ranks compared what they had called
    _by_host: tuple[Communicator, Communicator] | None = None

    # -- point to point -------------------------------------------------------------------------------------------

    def send(self, array: Array, dest: int, tag: int = 0) -> None:
        """Send `array` to rank `dest`; when it returns, the array may be changed.

        It may wait for the receiver to come (MPI does for large messages): two ranks that both send first and receive
        second can wait for each other for ever. Use `sendrecv` or `isend` there.
        """
        self.isend(array, dest, tag).wait()

    def recv(self, array: Array, source: int, tag: int = 0) -> Array:
        """Wait for a message from rank `source`; fills `array` and returns it."""
        self.irecv(array, source, tag).wait()
        return array

    def isend(self, array: Array, dest: int, tag: int = 0) -> Request:
        """Start sending; leave `array` unchanged until the request is done."""
        dest = self._check_peer("dest", dest, tag)
        self._check_array(array)
        entry = self.record.begin("send", self, dest, array, tag)
        request = self._isend(array, dest, tag)
        request.entry = entry
        return request

    def irecv(self, array: Array, source: int, tag: int = 0) -> Request:
        """Start receiving; `array` is filled when the request is done."""
        source = self._check_peer("source", source, tag)
        self._check_array(array)
        if not getattr(array.flags, "writeable", True):  # CuPy's arrays are all writeable and have no such flag
            raise ValueError(f"cannot receive into a read-only array (shape {array.shape}, {array.dtype})")
        entry = self.record.begin("receive", self, source, array, tag)
        request = self._irecv(array, source, tag)
        request.entry = entry
        return request

    def sendrecv(self, sendarray: Array, dest: int, recvarray: Array, source: int, tag: int = 0) -> Array:
        """Send to one rank while receiving from another (or the same); fills `recvarray` and returns it."""
        receiving = self.irecv(recvarray, source, tag)
        sending = self.isend(sendarray, dest, tag)
        receiving.wait()
        sending.wait()
        return recvarray

    def iprobe(self, source: int | None = None, tag: int = 0) -> Envelope | None:
        """The next message from `source` (None: from anyone), if one is there; it is still to be received.

        Until it has been, nothing else may receive from that source with that tag. A message of more than 1 GiB shows
        its first GiB only.
        """
        self._check_look(source, tag)
        return self._iprobe(source, tag)

    def probe(self, source: int | None = None, tag: int = 0, timeout: float | None = None) -> Envelope:
        """As `iprobe`, but waits for a message. After `timeout` seconds (None: the communicator's): TimeoutError.

        A look for anyone's message goes on while some other rank is left that could send it.
        """
        self._check_look(source, tag)
        began = self.clock() if self.record.listeners else None
        try:
            return self._probe(source, tag, timeout)
        finally:
            if began is not None:
                self.record.waited(began)

    # -- groups ---------------------------------------------------------------------------------------------------

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """A communicator of the ranks that gave the same `color`, ordered by (key, rank). Every rank must call it.

        `color` is a number from 0 up, or None to be in no group; who gives None gets None.
        """
        if color is not None and operator.index(color) < 0:
            raise ValueError(f"color {color}: expected a number from 0 up, or None for no group")
        child = self._split(color, operator.index(key))
        if child is not None:
            child.prepare()
        return child

    def split_by_host(self) -> tuple[Communicator, Communicator]:
        """(the ranks on my host, one rank per host). Every rank must call it.

        The first orders the ranks of a host by rank. The second joins the ranks that have the same number in the
        first: for a host's first rank those are the first ranks of all hosts, for its second rank the second ranks, and
        so on, so every rank has a peer per host (fewer where a host has fewer ranks).
        """
        host = self._split_by_host()
        across = self.split(host.rank, self.rank)
        assert across is not None
        return host, across

    @abstractmethod
    def hosts(self) -> list[int]:
        """A number for the host of each rank, the same for ranks on the same host. Known without asking anyone."""

    def prepare(self) -> None:
        """Make what needs all ranks of a new communicator at once, so that no operation has to wait for it later."""
        if 1 < len(set(self.hosts())) < self.size:
            self.by_host()

    def by_host(self) -> tuple[Communicator, Communicator]:
        """As `split_by_host`, but made once and kept: by `prepare` where some ranks share a host and some do not.

        Elsewhere every rank must call it the first time.
        """
        if self._by_host is None:
            self._by_host = self.split_by_host()
        return self._by_host

    def native(self, array: Array, op: str | None = None) -> Native:
        """The MPI library's own collectives, for arrays like this one and for one of minidist.collectives.OPS.

        Errors  ValueError: these ranks are simulated. TypeError: MPI does not know the dtype, or the op of it
        """
        raise ValueError("algorithm 'mpi' needs ranks started by mpirun; these are simulated")

    def check_shares_memory(self) -> None:
        """Errors  ValueError: the ranks are not all processes of one host, and share no memory"""
        raise ValueError("algorithm 'shared_memory' needs ranks started by mpirun; these are simulated")

    def shared_memory(self, slot: int, common: int) -> SharedMemory:
        """Memory that these ranks share: `slot` bytes for each and `common` bytes for all. Made once, and kept.

        It must be opened before its first use, see there. Errors as for check_shares_memory.
        """
        self.check_shares_memory()
        raise AssertionError

    # -- time, and what passes it ---------------------------------------------------------------------------------

    @abstractmethod
    def clock(self) -> float:
        """Seconds since some moment in the past: real ones over MPI, this rank's virtual ones in a simulation."""

    @abstractmethod
    def elapse(self, seconds: float) -> None:
        """Say that this rank now works for so long. Virtual time passes; over MPI nothing happens."""

    @abstractmethod
    def reduced(self, nbytes: int) -> None:
        """Say that this rank has combined so many bytes with as many others: `elapse` at the network's rate."""

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Name what this rank does inside of the `with`: "D.3(4)", say. Flight records and deadlock reports tell it."""
        record = self.record
        before, record.label = record.label, label
        for listener in record.listeners:
            listener.step_began(label)
        try:
            yield
        finally:
            record.label = before
            for listener in record.listeners:
                listener.step_ended(label)

    def _tell(self, direction: str, peer: int, tag: int, array: Array) -> Message:
        """Whoever listens to the record, of a message that is about to be started."""
        return self.record.message(direction, self, self.members[peer], tag, array.nbytes)

    def mark(self, label: str, words: str) -> None:
        """Tell whoever listens to this rank what has been done or decided in a step that takes no time of its own."""
        for listener in self.record.listeners:
            listener.mark(label, words)

    def value(self, name: str, number: float) -> None:
        """Tell whoever listens to this rank a number that changes as the program goes on: "loss", say."""
        for listener in self.record.listeners:
            listener.value(name, number)

    def fact(self, kind: str, *fields: Any) -> None:
        """Tell whoever listens to this rank something else that he may know what to make of, by its kind."""
        for listener in self.record.listeners:
            listener.fact(kind, fields)

    # -- ending ---------------------------------------------------------------------------------------------------

    def failed(self) -> frozenset[int]:
        """Ranks of this communicator that are known to have died. Asking costs about a microsecond, and no message.

        None ever are where `survives` is False. Elsewhere a death is known some 10 ms later; from then on PeerFailed is
        raised by what needs the dead rank: `isend`, `irecv`, `iprobe` and `probe` of it, `test` and `wait` of what was
        started before, collectives, `split`. A look for anyone's message is not disturbed.
        """
        return frozenset()

    def outlive(self) -> bool:
        """Say that this program goes on without ranks that die. Whether the job does, too: `survives`.

        Where it does not, a line on standard error will say so if the launcher ends it. Every rank calls it, once.
        """
        return self.survives

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """End the whole job, every rank of it, with exit status `code`."""

    # -- what the two kinds provide -------------------------------------------------------------------------------

    @abstractmethod
    def _isend(self, array: Array, dest: int, tag: int) -> Request:
        """Start sending. Whoever listens to the record is told of the message, as by `_irecv`."""

    @abstractmethod
    def _irecv(self, array: Array, source: int, tag: int) -> Request: ...

    @abstractmethod
    def _iprobe(self, source: int | None, tag: int) -> Envelope | None: ...

    @abstractmethod
    def _probe(self, source: int | None, tag: int, timeout: float | None) -> Envelope: ...

    @abstractmethod
    def _wait_any(self, waits: Waits, timeout: float | None) -> None:
        """Return when an operation can go on. After `timeout` seconds (None: the communicator's) raise TimeoutError."""

    @abstractmethod
    def tested_in_vain(self, request: Request) -> None:
        """A test has found that a request is not done: in a simulation, other ranks get to run."""

    @abstractmethod
    def _split(self, color: int | None, key: int) -> Communicator | None: ...

    @abstractmethod
    def _split_by_host(self) -> Communicator: ...

    # -- checks ---------------------------------------------------------------------------------------------------

    def check_root(self, root: int) -> int:
        """`root`, found to be a rank of this communicator."""
        try:
            return self._check_peer("root", root, 0)
        except TypeError:
            raise TypeError(f"root {root!r}: expected a rank's number, 0 to {self.size - 1}") from None

    def _check_peer(self, role: str, peer: int, tag: int) -> int:
        try:
            peer, tag = operator.index(peer), operator.index(tag)
        except TypeError:
            raise TypeError(f"{role} {peer!r}, tag {tag!r}: expected whole numbers") from None
        if not 0 <= peer < self.size:
            raise ValueError(f"{role} {peer}: the ranks of this communicator are 0 to {self.size - 1}")
        if not 0 <= tag <= MAX_TAG:
            raise ValueError(f"tag {tag}: tags are 0 to {MAX_TAG}")
        return peer

    def _check_look(self, source: int | None, tag: int) -> None:
        self._check_peer("source", 0 if source is None else source, tag)

    def _check_array(self, array: Array) -> None:
        if not (isinstance(array, np.ndarray) or on_gpu(array)):
            raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")
        if isinstance(array, np.matrix | np.ma.MaskedArray):
            raise TypeError(f"a {type(array).__name__} is more than an array of numbers; give np.asarray of it")
        if not array.flags.c_contiguous:
            raise ValueError(
                f"array of shape {array.shape} and strides {array.strides} is not contiguous in memory; "
                f"send {namespace(array).__name__}.ascontiguousarray(array), or receive into a new array and copy"
            )
        if array.dtype.hasobject:
            raise TypeError(f"dtype {array.dtype} holds Python objects; only plain numbers travel")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}>"
