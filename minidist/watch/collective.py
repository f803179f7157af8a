"""Collectives, watched: one of minidist.collectives runs on simulated ranks, on numbers that tell their origin.

Whose part a chunk holds is read from the chunk itself. Rank r gives the number 8 ** r: so the octal digits of a sum say
how often each rank is in it. Above them stands the number of the chunk. Barriers move no numbers; there, a message is
taken to tell all that its sender has been told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import collectives
from ..collectives import ALGORITHMS
from ..comm import Network, simulate
from ..comm.base import Communicator
from .observe import Message, Observed, Observer, Step

MOST_RANKS = 16  # more can't be told apart in a number, nor in a picture
DIGIT, INDEX = 3, 48  # bits: of a rank's digit; and where, above the digits of 16 ranks, a chunk's number begins

Program = Callable[[Communicator, np.ndarray], Any]
Cell = frozenset[int]  # the ranks whose parts a chunk holds; empty: nothing yet
Row = tuple[Cell, ...]  # a rank's chunks


class Kind(NamedTuple):
    """How an operation is watched.

    what    "sum": chunks are added up; "copy": they are handed on; "swap": everybody has one for everybody;
            "word": there are none
    goal    goal(rank, chunk, ranks, root): what the operation leaves there; None: nothing of meaning
    """

    what: str
    goal: Callable[[int, int, int, int], Cell | None]
    free: bool = False  # whether the array may have any number of chunks
    rooted: bool = False


def everyone(rank: int, chunk: int, ranks: int, root: int) -> Cell:
    return frozenset(range(ranks))


KINDS = {
    "all_reduce": Kind("sum", everyone, free=True),
    "reduce_scatter": Kind("sum", lambda r, c, ranks, root: frozenset(range(ranks)) if r == c else None),
    "all_gather": Kind("copy", lambda r, c, ranks, root: frozenset({c})),
    "broadcast": Kind("copy", lambda r, c, ranks, root: frozenset({root}), free=True, rooted=True),
    "scatter": Kind("copy", lambda r, c, ranks, root: frozenset({root}) if r == c else None, rooted=True),
    "gather": Kind("copy", lambda r, c, ranks, root: frozenset({c}) if r == root else None, rooted=True),
    "all_to_all": Kind("swap", lambda r, c, ranks, root: frozenset({(r - c) % ranks})),
    "reduce": Kind(
        "sum", lambda r, c, ranks, root: frozenset(range(ranks)) if r == root else None, free=True, rooted=True
    ),
    "scan": Kind("sum", lambda r, c, ranks, root: frozenset(range(r + 1)), free=True),
    "": Kind("sum", everyone, free=True),  # a program of the caller's: taken to be an all-reduce
    "barrier": Kind("word", lambda r, c, ranks, root: frozenset({c})),
}
# Of some algorithms the natural number of chunks is not that of the ranks: one, where only whole arrays travel; or a
# few, of which each is a message of its own.
WHOLE = {"naive", "binomial", "recursive_doubling", "tree"}
PIECES = {"chain": 4, "double_tree": 4}


class Move(NamedTuple):
    """A message.

    chunk     the (first) chunk in it, None in an empty one; `chunks` are all. (Of all_to_all: how far on it is to go)
    holds     the ranks whose parts are in it; `contents` says so of each chunk
    sent      when, in virtual seconds; `time` is when its receiver took it in
    """

    source: int
    dest: int
    chunks: tuple[int, ...]
    contents: Row
    sent: float
    time: float
    step: Step

    @property
    def chunk(self) -> int | None:
        return self.chunks[0] if self.chunks else None

    @property
    def holds(self) -> Cell:
        return frozenset().union(*self.contents)


class Frame(NamedTuple):
    """A moment: the messages that came just then, and state[rank][chunk] after them."""

    time: float
    moves: tuple[Move, ...]
    state: tuple[Row, ...]


class Setting(NamedTuple):
    """One call of a collective, and what messages cost."""

    operation: str
    algorithm: str
    ranks: int
    chunks: int
    root: int
    hosts: tuple[int, ...] | None
    alpha: float
    beta: float
    program: Program | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.operation]

    def goal(self, rank: int, chunk: int) -> Cell | None:
        """What a rank's chunk is to hold at the end; None where it does not matter."""
        return self.kind.goal(rank, chunk, self.ranks, self.root)


def setting(
    operation: str,
    algorithm: str,
    ranks: int = 4,
    root: int = 0,
    chunks: int | None = None,
    hosts: int | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    program: Program | None = None,
) -> Setting:
    """The call to watch. Every message takes alpha seconds, and beta a byte; a chunk has 8.

    chunks  of the array; None: as many as the algorithm deals with
    hosts   so many, to which the ranks are dealt; None: one, but two for what works by host
    Errors  ValueError: what cannot be
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"ranks={ranks}: expected 1 to {MOST_RANKS}, as more are too many to be seen")
    if not 0 <= root < ranks:
        raise ValueError(f"root={root}: the ranks are 0 to {ranks - 1}")
    if not (0 < alpha < math.inf and 0 <= beta < math.inf):
        raise ValueError(f"alpha={alpha}, beta={beta}: expected seconds, alpha above 0")
    kind, by_host = KINDS[operation], program is None and ALGORITHMS[operation][algorithm].by_host
    if root and not kind.rooted:
        raise ValueError(f"root={root}: {operation or algorithm} has no root")
    if hosts is None:
        hosts = 2 if by_host and ranks > 1 else 1
    if not 1 <= hosts <= ranks:
        raise ValueError(f"hosts={hosts}: expected 1 to {ranks}, the number of ranks")
    of_rank = tuple(rank * hosts // ranks for rank in range(ranks)) if hosts > 1 else None
    if chunks is None:
        chunks = natural(algorithm, ranks, of_rank if by_host else None) if kind.free else ranks
    elif not kind.free and chunks != ranks:
        raise ValueError(f"chunks={chunks}: {operation} has a chunk for each of the {ranks} ranks")
    if not 1 <= chunks <= 32:
        raise ValueError(f"chunks={chunks}: expected 1 to 32")
    return Setting(operation, algorithm, ranks, chunks, root, of_rank, alpha, beta, program)


def natural(algorithm: str, ranks: int, hosts: tuple[int, ...] | None) -> int:
    """How many chunks an algorithm cuts an array into."""
    if algorithm in WHOLE:
        return 1
    if algorithm == "rabenseifner":
        return 1 << (ranks.bit_length() - 1)
    if hosts is not None and 1 < len(set(hosts)) < ranks:
        return min(map(hosts.count, hosts)) * len(set(hosts))
    return PIECES.get(algorithm, ranks)


# -- numbers that tell their origin -----------------------------------------------------------------------------------


def number_of(rank: int, chunk: int) -> int:
    """What a rank gives for a chunk."""
    return 1 << DIGIT * rank | chunk + 1 << INDEX


def origin_of(number: int) -> tuple[Cell, int | None]:
    """Whose parts are in a sum of such numbers, and of which chunk; of 0 nobody's.

    Errors  ValueError: a rank is in it twice, or it mixes chunks
    """
    digits, index = number & (1 << INDEX) - 1, number >> INDEX
    ranks = set()
    for rank in range(MOST_RANKS):
        digit = digits >> DIGIT * rank & (1 << DIGIT) - 1
        if digit > 1:
            raise ValueError(f"a chunk holds {digit} times the part of rank {rank}: it was added up too often")
        if digit:
            ranks.add(rank)
    if not ranks:
        return frozenset(), None
    chunk, beside = divmod(index, len(ranks))  # each has given chunk + 1
    if beside:
        raise ValueError(f"a chunk mixes parts of ranks {sorted(ranks)} that are of different chunks")
    return frozenset(ranks), chunk - 1


# -- the run ----------------------------------------------------------------------------------------------------------


class Watcher(Observer):
    """Follows the chunks of one run."""

    def __init__(self, given: Setting):
        super().__init__()
        self.given = given
        self.arrays: dict[int, np.ndarray] = {}  # where ranks' chunks lie in memory, if they do
        self.rows: list[list[tuple[float, Row]]] = [[(0.0, self._first(rank))] for rank in range(given.ranks)]

    def _first(self, rank: int) -> Row:
        """What a rank has before anything has happened."""
        s = self.given
        if s.kind.what == "swap":
            return (frozenset({rank}),) * s.ranks
        if s.operation in ("broadcast", "scatter"):
            return (frozenset({rank} if rank == s.root else ()),) * s.chunks
        alone = frozenset({rank})
        return tuple(alone if s.kind.what == "sum" or chunk == rank else frozenset() for chunk in range(s.chunks))

    def begins(self, rank: int, array: np.ndarray) -> None:
        """The rank's chunks are in `array`, from now on to its end."""
        self.arrays[rank] = array

    def looks(self, rank: int, now: float) -> None:
        if rank in self.arrays:
            self._note(rank, now, tuple(origin_of(int(number))[0] for number in self.arrays[rank]))

    def sends(self, message: Message) -> None:
        s = self.given
        if s.kind.what == "word":  # all that the sender has been told
            row = self.rows[message.source][-1][1]
            message.contents = [(chunk, cell) for chunk, cell in enumerate(row) if cell]
            return
        numbers = message.data.tolist() if message.data.dtype == np.int64 else []  # a program may send others
        cells = [origin_of(number) for number in numbers]
        message.contents = [(chunk, ranks) for ranks, chunk in cells if chunk is not None]
        if s.kind.what == "swap":  # slot k is for what has to go k ranks further than where it came from
            message.contents = [((chunk - min(ranks)) % s.ranks, ranks) for chunk, ranks in message.contents]

    def receives(self, message: Message) -> None:
        if message.dest in self.arrays:
            return
        row, came = self.rows[message.dest][-1][1], dict(message.contents)
        none: Cell = frozenset()
        self._note(message.dest, message.received, tuple(cell | came.get(i, none) for i, cell in enumerate(row)))
        if self.given.kind.what == "swap":  # what has come there is not here any more
            row = self.rows[message.source][-1][1]
            self._note(message.source, message.received, tuple(cell - came.get(i, none) for i, cell in enumerate(row)))

    def _note(self, rank: int, now: float, row: Row) -> None:
        """Keep what a rank has at the end of each moment."""
        rows = self.rows[rank]
        if rows[-1][0] == now and len(rows) > 1:
            rows[-1] = now, row
        elif rows[-1][1] != row:
            rows.append((now, row))

    def frames(self) -> list[Frame]:
        """What happened: a frame for each moment at which messages came, after one for the beginning."""
        found = [Frame(0.0, (), tuple(rows[0][1] for rows in self.rows))]
        times = sorted({message.received for message in self.messages})
        for time in times:
            moves = [self._move(message) for message in self.messages if message.received == time]
            state = tuple([row for at, row in rows if at <= time][-1] for rows in self.rows)
            found.append(Frame(time, tuple(sorted(moves, key=lambda m: (m.source, m.dest, m.chunks))), state))
        return found

    def _move(self, message: Message) -> Move:
        chunks, contents = zip(*message.contents) if message.contents else ((), ())
        return Move(message.source, message.dest, chunks, contents, message.sent, message.received, message.step)


def observe(given: Setting) -> tuple[list[Frame], list[np.ndarray | None], Any]:
    """Run it. Returns the frames, the array that each rank ended with (None: none of its own), and the Simulation."""
    watcher = Watcher(given)
    pieces = {"segment": 8.0} if given.algorithm in PIECES else {}  # a message a chunk
    network = Network(alpha=given.alpha, beta=given.beta, hosts=given.hosts, **pieces)  # type: ignore[arg-type]

    def program(comm: Communicator) -> np.ndarray | None:
        result = call(given, Observed(comm, watcher), watcher)
        watcher.looks(comm.rank, comm.clock())
        return result

    run = simulate(program, given.ranks, network=network)
    assert run.messages == len(watcher.messages)
    return watcher.frames(), run.results, run


def call(s: Setting, comm: Communicator, watcher: Watcher) -> np.ndarray | None:
    """One rank's call of the operation; returns what it ends with."""
    rank, root, algorithm = comm.rank, s.root, s.algorithm
    tagged = np.array([number_of(rank, chunk) for chunk in range(s.chunks)])
    if s.operation == "barrier":
        collectives.barrier(comm, algorithm)
        return None
    if s.operation == "all_to_all":
        return collectives.all_to_all(comm, tagged, algorithm=algorithm)
    if s.operation == "gather":
        return collectives.gather(comm, tagged[rank : rank + 1].copy(), root=root, algorithm=algorithm)
    if s.operation == "scatter":
        return collectives.scatter(comm, tagged if rank == root else None, np.zeros(1, np.int64), root, algorithm)
    # The others work in place, and their arrays can be looked at meanwhile.
    if s.operation == "broadcast" and rank != root:
        tagged[:] = 0
    if s.operation == "all_gather":
        tagged[np.arange(s.chunks) != rank] = 0
    watcher.begins(rank, tagged)
    if s.program is not None:
        s.program(comm, tagged)
        return tagged
    options = {"root": root} if s.kind.rooted else {}
    return getattr(collectives, s.operation)(comm, tagged, algorithm=algorithm, **options)


__all__ = ["KINDS", "Cell", "Frame", "Move", "Row", "Setting", "observe", "setting"]
