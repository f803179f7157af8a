"""Recursive halving and its mirror image, recursive doubling: a reduce-scatter and an all-gather in lg P steps each.

    P = 4, what each rank still has to add up        and, read upwards, what it has gathered

                            rank 0    rank 1    rank 2    rank 3
        at first            0 1 2 3   0 1 2 3   0 1 2 3   0 1 2 3
        after 0<>2, 1<>3    0 1       0 1           2 3       2 3
        after 0<>1, 2<>3    0           1           2           3

In each halving step a rank sends its partner the half that is the partner's, and adds the partner's share to the half
that is its own. So both directions send what the ring does, (P-1)/P n bytes, in lg P messages instead of P - 1.

Of P ranks that are no power of two, the extra ones rest meanwhile (see extra_ranks.py): a rank that stands for two
works for both their chunks, and passes on the one that is not its own.
Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", sections 3
and 4.
"""

from __future__ import annotations

from itertools import pairwise

from ..comm.handle import Steps
from .chunks import Chunks
from .extra_ranks import PowerOfTwo, hand_back, hand_on, power_of_two
from .lane import Lane
from .reductions import Reduction


def recursive_halving_reduce_scatter(comm: Lane, chunks: Chunks, reduction: Reduction) -> Steps:
    """Chunk `rank` ends with the sum over all ranks; the other chunks are left holding partial sums.

    dtype   kept; accumulates in it, the farthest ranks' sums first: (0+2)+(1+3) for P = 4
    Cost    lg P messages, (P-1)/P n bytes, sent per rank, for P a power of two; the extra ranks cost more
    """
    # 1. Make the number of ranks a power of two; each that works has a block of one chunk, or of two neighbouring ones.
    group = power_of_two(comm.rank, comm.size)
    yield from hand_on(comm, chunks.flat, reduction, group)
    blocks = _blocks(chunks, group)

    # 2. Those that work add up their blocks.
    yield from halve(comm, blocks, group, reduction)
    if group.number is not None:
        reduction.finish(blocks[group.number], comm.size)

    # 3. The ranks that rested get their chunk.
    yield from hand_back(comm, chunks[min(comm.rank | 1, comm.size - 1)], group)


def recursive_doubling_all_gather(comm: Lane, chunks: Chunks) -> Steps:
    """Every rank gives chunk `rank`; all end with all chunks.

    Cost    lg P messages, (P-1)/P n bytes, sent per rank, for P a power of two; the extra ranks cost more
    """
    # 1. Make the number of ranks a power of two: the ranks that will rest give their chunk to the one before them.
    group = power_of_two(comm.rank, comm.size)
    if comm.rank < 2 * group.extra:
        if group.number is None:
            comm.isend(chunks[comm.rank], comm.rank - 1)
            yield from comm.sent()
        else:
            yield comm.irecv(chunks[comm.rank + 1], comm.rank + 1)

    # 2. Those that work gather all blocks.
    yield from double(comm, _blocks(chunks, group), group)

    # 3. The ranks that rested get the whole.
    yield from hand_back(comm, chunks.flat, group)


def halve(comm: Lane, blocks: Chunks, group: PowerOfTwo, reduction: Reduction) -> Steps:
    """Among the ranks that work: block `number` ends with the sum over them; the other blocks hold partial sums."""
    if group.number is None:
        return
    # Invariant: blocks first ... first + count - 1 here are the sums over the numbers that differ from ours in bits
    # from `count` up only; nobody whose number is not among those blocks' needs anything from us any more.
    first, count = 0, group.size
    while count > 1:
        count //= 2
        partner = group.number ^ count
        theirs, first = (first, first + count) if partner < group.number else (first + count, first)
        comm.send_partial(blocks[theirs : theirs + count], group.rank(partner))
        yield from comm.fold_partial(
            blocks[first : first + count], group.rank(partner), reduction, theirs_first=partner < group.number
        )
    yield from comm.sent()  # nothing sent was changed above


def double(comm: Lane, blocks: Chunks, group: PowerOfTwo) -> Steps:
    """Among the ranks that work: each gives block `number`; all end with all blocks."""
    if group.number is None:
        return
    # Invariant: the `count` blocks from `first` on are here: all whose numbers differ from ours in bits below `count`.
    first, count = group.number, 1
    while count < group.size:
        partner = group.number ^ count
        theirs = first ^ count
        receive = comm.irecv(blocks[theirs : theirs + count], group.rank(partner))
        comm.isend(blocks[first : first + count], group.rank(partner))
        yield receive
        first, count = min(first, theirs), 2 * count
    yield from comm.sent()


def _blocks(chunks: Chunks, group: PowerOfTwo) -> Chunks:
    """A block per rank that works: its own chunk, and that of the rank it stands for."""
    if not group.extra:
        return chunks
    ends = [chunks.start(group.rank(number)) for number in range(group.size)] + [chunks.flat.size]
    return Chunks(chunks.flat, group.size, [end - start for start, end in pairwise(ends)])


def recursive_halving_reduce_scatter_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """lg P a + n (P-1)/P (b + g) for P a power of two. With E extra ranks, Q that work (P = Q + E), and equal chunks:

    (2 + lg Q) a + n (b + g) + n/P b + (Q - 1 + min(E, Q/2) + min(E, Q/4) + ... + min(E, 1)) n/P (b + g)
    """
    halves = _longest_halves(P)
    extra = P & (P - 1) != 0
    return len(halves) * a + sum(halves) * n / P * (b + g) + extra * (2 * a + n * (b + g) + n / P * b)


def recursive_doubling_all_gather_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """lg P a + n (P-1)/P b for P a power of two. With E extra ranks, Q that work (P = Q + E), and equal chunks:

    (2 + lg Q) a + n/P b + n b + (Q - 1 + min(E, Q/2) + min(E, Q/4) + ... + min(E, 1)) n/P b
    """
    halves = _longest_halves(P)
    extra = P & (P - 1) != 0
    return len(halves) * a + sum(halves) * n / P * b + extra * (2 * a + n / P * b + n * b)


def _longest_halves(P: int) -> list[int]:
    """How many chunks the longer half has, in each of the lg Q steps. The extra ranks' neighbours come first."""
    group = power_of_two(0, P)
    counts = [group.size >> step for step in range(1, group.size.bit_length())]
    return [count + min(group.extra, count) for count in counts]
