"""The table of the collectives' tests: how each operation is called, and what NumPy on one rank says of its result.

    problem = Problem("reduce_scatter", comm.size, (5, 3), "int8", op="max")
    problem.solve(comm, "ring")                         # on every rank: call it and compare the result
    handle = problem.run(comm, "ring", async_op=True)   # or in two steps
    problem.check(comm.rank, handle.wait())

A new algorithm needs nothing here: `rows` takes it from ALGORITHMS. A new operation needs a row of OPERATIONS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import UNDER_MPIRUN

from minidist import backend, collectives
from minidist.collectives import ALGORITHMS

ARITHMETIC = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
LOGICAL = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}
BITWISE = {"bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or, "bitwise_xor": np.bitwise_xor}
COMBINE = {**ARITHMETIC, "mean": np.add, **LOGICAL, **BITWISE}

WHOLE = ["bool", "int8", "int16", "int32", "int64", "uint8"]
FLOATS = ["float16", "float32", "float64"]
DTYPES = [*WHOLE, *FLOATS, "complex64", "complex128"]


def ops_of(dtype: str) -> list[str]:
    """The ops that have a meaning for a dtype."""
    whole = np.dtype(dtype).kind in "iub"
    return [op for op in COMBINE if op not in (BITWISE if not whole else ("mean",))]


def rows(*operations: str) -> list[tuple[str, str]]:
    """(operation, algorithm) for every algorithm of these operations (none: of all with an array) that runs here."""
    return [
        (operation, algorithm)
        for operation in operations or OPERATIONS
        for algorithm in ALGORITHMS[operation]
        if UNDER_MPIRUN or not needs_processes(operation, algorithm)
    ]


def needs_processes(operation: str, algorithm: str) -> bool:
    """Whether it can do nothing for simulated ranks, nor for arrays on a GPU: MPI's own, and through shared memory."""
    return algorithm == "mpi" or ALGORITHMS[operation][algorithm].shared


def every_algorithm(*operations: str) -> pytest.MarkDecorator:
    """Run the test for each of `rows`."""
    return pytest.mark.parametrize("operation, algorithm", rows(*operations))


def where(flag: str) -> list[str]:
    """The operations that take an argument."""
    return [name for name, operation in OPERATIONS.items() if flag in operation.takes]


@functools.lru_cache(maxsize=4096)
def payload(rank: int, shape: tuple[int, ...], dtype: str, op: str = "sum", seed: int = 0) -> np.ndarray:
    """A rank's numbers: random, but such that any order of combining up to 16 ranks' is exact."""
    rng, kind = np.random.default_rng((seed, rank)), np.dtype(dtype).kind
    if kind == "b" or op in LOGICAL:
        zeros = {"logical_and": 0.1, "logical_or": 0.9}.get(op, 0.5)
        values = rng.integers(1, 100, shape) * (rng.random(shape) >= zeros)
    elif kind in "iu":
        limits = np.iinfo(dtype)
        values = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)  # sums and products wrap around
    elif op == "prod":
        values = 2.0 ** rng.integers(-1, 2, shape) * (1j ** rng.integers(0, 4, shape) if kind == "c" else 1)
    else:
        values = rng.integers(-15, 16, shape) + (1j * rng.integers(-15, 16, shape) if kind == "c" else 0)
    values = np.asarray(values).astype(dtype)
    values.flags.writeable = False
    return values


@dataclass(frozen=True)
class Problem:
    """One call of an operation by all ranks: each rank's numbers, and the result.

    `shape` is that of a rank's array; of scatter, gather and all_to_all without `counts` that of each of P chunks.
    """

    operation: str
    ranks: int
    shape: tuple[int, ...] = (10,)
    dtype: str = "int64"
    op: str = "sum"
    root: int = 0
    counts: tuple[int, ...] | None = None  # of all_to_all: rank i gives counts[(i + j) % P] to rank j
    seed: int = 0

    def _payload(self, rank: int) -> np.ndarray:
        dealt = OPERATIONS[self.operation].dealt and self.counts is None
        return payload(rank, (self.ranks, *self.shape) if dealt else self.shape, self.dtype, self.op, self.seed)

    def array(self, rank: int) -> np.ndarray:
        """A new copy of this rank's numbers."""
        return self._payload(rank).copy()

    def flat(self, rank: int) -> np.ndarray:
        """The same in one dimension, not to be written."""
        return self._payload(rank).reshape(-1)

    def cut(self, flat: Any, shift: int = 0) -> list[Any]:
        """An array's chunks, one per rank; of sizes counts[shift], counts[shift + 1], ... if there are counts."""
        if self.counts is None:
            return np.array_split(flat, self.ranks)
        ends = np.cumsum(self.counts[shift:] + self.counts[:shift]).tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends)]

    @functools.lru_cache(maxsize=512)  # noqa: B019  problems are small and frozen
    def combined(self, ranks: int | None = None) -> np.ndarray:
        """The reduction of the first `ranks` ranks' arrays (None: of all)."""
        ranks = self.ranks if ranks is None else ranks
        total = functools.reduce(lambda a, b: COMBINE[self.op](a, b).astype(self.dtype), map(self.flat, range(ranks)))
        if self.op == "mean":
            return total / np.asarray(ranks, total.dtype)
        return (total != 0).astype(self.dtype) if self.op in LOGICAL else total

    def expected(self, rank: int) -> np.ndarray | None:
        """What this rank's call returns, in one dimension; None where that means nothing."""
        return OPERATIONS[self.operation].expected(self, rank)

    def run(self, comm: Any, algorithm: str, array: Any = None, **more: Any) -> Any:
        """Call the operation on this rank, with its own numbers unless others are given; what the call returns."""
        operation = OPERATIONS[self.operation]
        array = self.array(comm.rank) if array is None else array
        mine = {"op": self.op, "root": self.root, "counts": self.counts}
        options = {name: value for name, value in mine.items() if name in operation.takes}
        return operation.call(comm, array, algorithm=algorithm, **options, **more)

    def solve(self, comm: Any, algorithm: str, array: Any = None, **more: Any) -> Any:
        """Run and check; the result. MPI's own algorithms may refuse what MPI does not know: then None."""
        try:
            result = self.run(comm, algorithm, array, **more)
        except (TypeError, ValueError) as error:
            if needs_processes(self.operation, algorithm) and str(error).startswith(f"algorithm '{algorithm}'"):
                return None
            raise
        self.check(comm.rank, result)
        return result

    def check(self, rank: int, result: Any) -> None:
        """Compare a result with NumPy's: dtype and values, exactly (a mean within its rounding)."""
        expected = self.expected(rank)
        if expected is None:
            return
        got = backend.to_numpy(result).reshape(-1)
        assert got.dtype == expected.dtype
        if self.op == "mean" and "op" in OPERATIONS[self.operation].takes:
            eps = 2.0**-7 if self.dtype == "bfloat16" else float(np.finfo(self.dtype).eps)
            assert_allclose(got.astype(complex), expected.astype(complex), rtol=2 * eps)
        else:
            assert_array_equal(got, expected, str(self))


@dataclass(frozen=True)
class Operation:
    """A row of the table."""

    call: Callable[..., Any]  # call(comm, array, algorithm=..., **options)
    takes: tuple[str, ...]  # of op, accumulate, root, counts
    expected: Callable[[Problem, int], np.ndarray | None]
    returns: str = "array"  # "array", "part" of it, or "out"

    @property
    def dealt(self) -> bool:
        """Whether it moves chunks, of one size unless counts are given, to another array."""
        return self.returns == "out"


# Of these three every rank is given an array here, but not all of it goes into the call: see Problem.


def scatter(comm: Any, array: Any, root: int = 0, counts: Any = None, **options: Any) -> Any:
    """Only the root's array counts."""
    mine = array.size // comm.size if counts is None else counts[comm.rank]
    out = backend.namespace(array).empty(mine, array.dtype)
    whole = array if comm.rank == root else None
    return collectives.scatter(comm, whole, out, root=root, counts=counts, **options)


def gather(comm: Any, array: Any, root: int = 0, counts: Any = None, **options: Any) -> Any:
    """Of each rank's array only its own chunk counts."""
    counts = [array.size // comm.size] * comm.size if counts is None else counts
    start = sum(counts[: comm.rank])
    mine = array.reshape(-1)[start : start + counts[comm.rank]]
    return collectives.gather(comm, mine, root=root, counts=None if len(set(counts)) == 1 else counts, **options)


def all_to_all(comm: Any, array: Any, counts: Any = None, **options: Any) -> Any:
    """Counts in their turn: see Problem.counts."""
    turned = None if counts is None else [counts[(comm.rank + rank) % comm.size] for rank in range(comm.size)]
    return collectives.all_to_all(comm, array, counts=turned, out_counts=turned, **options)


def _gathered(problem: Problem) -> np.ndarray:
    chunks = [problem.cut(problem.flat(rank))[rank] for rank in range(problem.ranks)]
    return np.concatenate(chunks).astype(problem.dtype)  # of another byte order, say


def _swapped(problem: Problem, rank: int) -> np.ndarray:
    chunks = [problem.cut(problem.flat(other), shift=other)[rank] for other in range(problem.ranks)]
    return np.concatenate(chunks).astype(problem.dtype)


OPERATIONS = {
    "all_reduce": Operation(
        collectives.all_reduce,
        ("op", "accumulate"),
        lambda problem, rank: problem.combined(),
    ),
    "reduce_scatter": Operation(
        collectives.reduce_scatter,
        ("op", "accumulate", "counts"),
        lambda problem, rank: problem.cut(problem.combined())[rank],
        "part",
    ),
    "all_gather": Operation(
        collectives.all_gather,
        ("counts",),
        lambda problem, rank: _gathered(problem),
    ),
    "broadcast": Operation(
        collectives.broadcast,
        ("root",),
        lambda problem, rank: problem.flat(problem.root),
    ),
    "reduce": Operation(
        collectives.reduce,
        ("op", "accumulate", "root"),
        lambda problem, rank: problem.combined() if rank == problem.root else None,
    ),
    "scatter": Operation(
        scatter,
        ("root", "counts"),
        lambda problem, rank: problem.cut(problem.flat(problem.root))[rank],
        "out",
    ),
    "gather": Operation(
        gather,
        ("root", "counts"),
        lambda problem, rank: _gathered(problem) if rank == problem.root else None,
        "out",
    ),
    "all_to_all": Operation(
        all_to_all,
        ("counts",),
        _swapped,
        "out",
    ),
    "scan": Operation(
        collectives.scan,
        ("op", "accumulate"),
        lambda problem, rank: problem.combined(rank + 1),
    ),
}

EQUAL_CHUNKS = {("all_to_all", "bruck")}  # which take no counts
