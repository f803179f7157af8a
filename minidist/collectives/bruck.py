"""Bruck's algorithms: all-gather and all-to-all in ceil(lg P) steps, for any number of ranks.

All-gather: what has been gathered doubles in every step, as it is sent on to the rank 1, 2, 4, ... before. For P = 5,
the chunks that each rank has:

                              rank 0      rank 1      rank 2      rank 3      rank 4
    at first                  0           1           2           3           4
    after 1 -> 0 -> 4 ...     0 1         1 2         2 3         3 4         4 0
    after 2 -> 0 -> 3 ...     0 1 2 3     1 2 3 4     2 3 4 0     3 4 0 1     4 0 1 2
    after 4 -> 0 -> 1 ...     all         all         all         all         all     (one chunk was missing)

All-to-all: a block that has to go 5 ranks on goes 1 on and then 4 on, together with all others that go that far. For
P = 4, what rank 0 has, "r+k" being the block that rank r gave for the rank k further on:

    at first            0+0  0+1  0+2  0+3
    after 0 -> 1 -> 2   0+0  3+1  0+2  3+3      blocks with k = 1 or 3 have gone 1 on
    after 0 -> 2 -> 0   0+0  3+1  2+2  1+3      blocks with k = 2 or 3 have gone 2 on: all are where they belong

So there are few messages, but a block travels up to lg P times: for short messages.
Source: Bruck, Ho, Kipnis, Upfal & Weathersby 1997, "Efficient algorithms for all-to-all communications in multiport
message-passing systems", sections 3 and 4.
"""

from __future__ import annotations

from ..backend import Array, namespace
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane


def bruck_all_gather(comm: Lane, chunks: Chunks) -> Steps:
    """Every rank gives chunk `rank`; all end with all chunks, of any sizes.

    Every chunk is received where it belongs (the paper turns the array round in the end); only a message that goes
    round the array's end is put together in scratch memory, and taken apart.

    Cost    ceil(lg P) messages, (P-1)/P n bytes, sent per rank
    """
    size, rank = comm.size, comm.rank
    joined: list[Array] = []
    distance = 1
    # Invariant: chunks rank, rank + 1, ... rank + distance - 1 are here.
    while distance < size:
        count = min(distance, size - distance)

        # 1. Send the first `count` of ours to the rank `distance` before, who lacks them.
        held = _circular(chunks, rank, count)
        message = held[0]
        if len(held) > 1:
            message = _joined_like(comm, chunks, held)
            message[: held[0].size], message[held[0].size :] = held
            joined.append(message)
        comm.isend(message, (rank - distance) % size)

        # 2. Receive as many from the rank `distance` further on: they follow on ours.
        places = _circular(chunks, rank + distance, count)
        message = places[0] if len(places) == 1 else _joined_like(comm, chunks, places)
        yield comm.irecv(message, (rank + distance) % size)
        if len(places) > 1:
            places[0][...], places[1][...] = message[: places[0].size], message[places[0].size :]
            comm.give_back(message)
        distance *= 2
    yield from comm.sent()
    for memory in joined:
        comm.give_back(memory)


def _circular(chunks: Chunks, first: int, count: int) -> list[Array]:
    """`count` chunks from number `first` on, counted round the end: one view of the array, or two."""
    first %= len(chunks)
    beyond = first + count - len(chunks)
    return [chunks[first : first + count]] if beyond <= 0 else [chunks[first:], chunks[:beyond]]


def _joined_like(comm: Lane, chunks: Chunks, parts: list[Array]) -> Array:
    """Memory for both parts in one."""
    return comm.scratch_like(chunks.flat[: parts[0].size + parts[1].size])


def bruck_all_to_all(comm: Lane, chunks: Chunks, out: Chunks) -> Steps:
    """Chunk j goes to rank j; chunk i of `out` comes from rank i. All must be of one size: others pass them on.

    Cost    ceil(lg P) messages, of up to n/2 bytes, sent per rank; three copies of n bytes
    """
    size, rank = comm.size, comm.rank
    blocks, result = chunks.flat.reshape(size, -1), out.flat.reshape(size, -1)

    # 1. Turn the blocks round: number k is for the rank k further on.
    scratch = comm.scratch_like(chunks.flat)
    turned = scratch.reshape(size, -1)
    turned[: size - rank], turned[size - rank :] = blocks[rank:], blocks[:rank]

    # 2. Send those that have to go 1 further (and perhaps more), those that have to go 2 further, 4 further, ...
    #    Invariant: number k here was given for the rank k further on by the rank k modulo `distance` before us.
    distance = 1
    while distance < size:
        moving = namespace(turned).asarray([k for k in range(size) if k & distance])
        leaving = turned[moving]  # a copy
        coming = comm.scratch_like(leaving).reshape(leaving.shape)
        receive = comm.irecv(coming, (rank - distance) % size)
        comm.isend(leaving, (rank + distance) % size)
        yield receive
        turned[moving] = coming
        comm.give_back(coming)
        distance *= 2

    # 3. Number k now comes from the rank k before us.
    result[: rank + 1], result[rank + 1 :] = turned[rank::-1], turned[:rank:-1]
    comm.give_back(scratch)
    yield from comm.sent()


def bruck_all_gather_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) a + n (P-1)/P b"""
    return (P - 1).bit_length() * a + n * (P - 1) / P * b


def bruck_all_to_all_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) a + m n/P b, where m counts the set bits of 0, 1, ..., P-1; for P a power of two lg P (a + n/2 b)"""
    return (P - 1).bit_length() * a + sum(k.bit_count() for k in range(P)) * n / P * b
