"""`@on_ranks(1, 2, 3, 4)`: one test body, run by every rank of communicators of these sizes.

    @on_ranks(1, 2, 3, 4)
    def test_everyone_hears_from_the_left(comm): ...

Under plain pytest the ranks are simulated, with two interleavings per size; that every message is received is checked
by the simulator. Under `mpirun -n 4 python -m pytest tests` the same bodies run on real communicators of up to four
ranks, and the tests without on_ranks are left out. There a test that fails on one rank fails on all: a rank waits for
another no longer than DEADLINE, and after each body the ranks tell rank 0 how it went.

`@on_ranks(1, 2, 3, 4, seeds=1)`: one interleaving per size, for a long table whose rows communicate alike.
`from ranks import once_on_ranks as on_ranks`: simulated as ever, but under mpirun on one of the sizes only; for what is
made of collectives and messages that other tests run on real ranks of all sizes.

Composes with pytest's parametrize and, in either order, with hypothesis' @given (which draws the same on every rank).
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import pytest

from minidist.comm import Communicator, simulate, world
from minidist.comm.world import launched

UNDER_MPIRUN = launched() is not None
SEEDS = 2
DEADLINE = 10.0  # seconds a rank waits for another inside a body
REPORT_BYTES = 4000  # of the traceback that a failing rank tells the others

Body = Callable[..., None]


def on_ranks(*sizes: int, seeds: int = SEEDS, once: bool = False) -> Callable[[Body], Body]:
    """Give the test's argument `comm` a communicator of each of these sizes in turn.

    seeds: interleavings of each size that are simulated.   once: under mpirun take one of the sizes
    """

    def decorate(test: Body) -> Body:
        given = getattr(test, "hypothesis", None)
        body = test if given is None else given.inner_test

        @functools.wraps(body)
        def on_all_ranks(*args: Any, comm: Ranks, **arguments: Any) -> None:
            comm.run(functools.partial(body, *args), arguments)

        if given is None:
            test = on_all_ranks
        else:
            given.inner_test = on_all_ranks
        return pytest.mark.ranks(pytest.mark.parametrize("comm", _choices(sizes, seeds, once), ids=str)(test))

    return decorate


once_on_ranks = functools.partial(on_ranks, once=True)


def _choices(sizes: Sequence[int], seeds: int, once: bool) -> list[Ranks]:
    if UNDER_MPIRUN:
        fitting = [size for size in sizes if size <= world().size]
        if once:  # 3, which is no power of two, or else the largest
            fitting = [3] if 3 in fitting else sorted(fitting)[-1:]
        return [RealRanks(size) for size in fitting]
    return [SimulatedRanks(size, seed) for size in sizes for seed in range(seeds if size > 1 else 1)]


@dataclass(frozen=True)
class SimulatedRanks:
    """A way of running a body on some ranks: what pytest passes as `comm`, until the body gets the real one."""

    size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.size}-ranks-seed-{self.seed}"

    def run(self, body: Body, arguments: dict[str, Any]) -> None:
        """Call body(comm=..., **arguments) on every rank."""
        simulate(lambda comm: body(comm=comm, **arguments), self.size, seed=self.seed)


@dataclass(frozen=True)
class RealRanks:
    """The other way, under mpirun."""

    size: int

    def __str__(self) -> str:
        return f"{self.size}-ranks"

    def run(self, body: Body, arguments: dict[str, Any]) -> None:
        """Call body(comm=..., **arguments) on the first ranks of the world; every rank must call this."""
        # 1. Ranks of this size run the body; the others of the world only take part in step 2.
        comm = _group(self.size)
        error: BaseException | None = None
        if comm is not None:
            try:
                body(comm=comm, **arguments)
            except (Exception, pytest.fail.Exception, pytest.skip.Exception) as caught:
                error = caught
        # 2. All agree on how it went.
        story = _first_failure("" if error is None else "".join(traceback.format_exception(error)))
        if "UnsatisfiedAssumption" in story:
            hypothesis.reject()
        if "Skipped: " in story:
            pytest.skip(story.rpartition("Skipped: ")[2])
        if story:
            _group.cache_clear()  # messages of the failed test may still be under way in the old group
        if error is not None and not isinstance(error, TimeoutError):
            raise error
        if story:
            pytest.fail(f"it failed on another rank:\n{story}", pytrace=False)


Ranks = SimulatedRanks | RealRanks


@functools.cache
def _group(size: int) -> Communicator | None:
    """The first `size` ranks of the world, with a deadline fit for tests; None for the other ranks."""
    group = world().split(0 if world().rank < size else None)
    if group is not None:
        group.timeout = DEADLINE
    return group


def _first_failure(story: str) -> str:
    """Every rank tells its story ("" for success); all learn one of a rank that has one.

    That of a rank that only waited in vain counts less: it is likely that another's failure is why.
    """
    comm = world()
    comm.timeout = 3 * DEADLINE  # a failing rank comes here at once, the others after they have waited in vain for it
    mine = np.frombuffer(story.encode()[-REPORT_BYTES:].rjust(REPORT_BYTES), np.uint8).copy()
    try:
        if comm.rank == 0:
            stories = [_text(mine)] + [_text(comm.recv(np.empty_like(mine), rank)) for rank in range(1, comm.size)]
            told = [f"rank {rank}: {story}" for rank, story in enumerate(stories) if story]
            told.sort(key=lambda story: "TimeoutError" in story)
            mine[:] = np.frombuffer("".join(told[:1]).encode()[:REPORT_BYTES].rjust(REPORT_BYTES), np.uint8)
            for rank in range(1, comm.size):
                comm.send(mine, rank)
        else:
            comm.send(mine, 0)
            comm.recv(mine, 0)
    except TimeoutError:  # the ranks no longer run the same test: nothing after this would mean anything
        traceback.print_exc()
        comm.abort()
    return _text(mine)


def _text(report: np.ndarray) -> str:
    return report.tobytes().decode(errors="replace").strip()
