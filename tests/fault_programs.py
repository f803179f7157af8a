"""Programs of simulated ranks that tell when messages came, for tests of faults."""

from __future__ import annotations

import numpy as np

from minidist.comm import Communicator, Network

PLAIN = Network(alpha=1.0)  # a message takes a second
LATE = Network(alpha=1.0, sends="rendezvous")
NEVER = "never"


def number(value: int = 0) -> np.ndarray:
    return np.array([value])


def arrival(comm: Communicator, source: int, patience: float = 100.0, tag: int = 0) -> float | str:
    """When the next message came; or NEVER, after some patience."""
    try:
        comm.irecv(number(), source, tag).wait(patience)
    except TimeoutError:
        return NEVER
    return comm.clock()


def every_second(comm: Communicator, count: int):
    """Rank 1 sends to rank 0 at 1, 2, 3, ... s; rank 0 says when each arrived, up to the first that does not."""
    if comm.rank == 1:
        for _ in range(count):
            comm.elapse(1.0)
            comm.send(number(), 0)
        return "done"
    times: list[float | str] = []
    while comm.rank == 0 and len(times) < count and NEVER not in times:
        times.append(arrival(comm, 1))
    return times


def at_once(comm: Communicator, count: int) -> list[int] | None:
    """Rank 1 sends 1, 2, 3, ... to rank 0, which says what it got; nothing takes time."""
    if comm.rank == 1:
        for value in range(1, count + 1):
            comm.send(number(value), 0)
    got: list[int] = []
    while comm.rank == 0 and len(got) < count:
        try:
            comm.probe(1, timeout=100)
        except TimeoutError:
            break
        got.append(int(comm.recv(number(), 1)[0]))
    return got
