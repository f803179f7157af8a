"""The hierarchical all-reduce, for ranks on several hosts: most of the work stays within each host.

    2 hosts of 2 ranks. A letter is a piece of the array, ' the sum over a host, " the sum over all:

                                        host 0             host 1
                                        rank 0  rank 1     rank 2  rank 3
        at first                        A B     A B        A B     A B
        1. reduce-scatter, each host    A'        B'       A'        B'
        2. all-reduce, across hosts     A" <-----------------> A"
           on each rank's piece                   B" <-------------> B"
        3. all-gather, each host        A" B"   A" B"      A" B"   A" B"

The slow part is step 2, since the ranks of a host share its link. Each host sends and receives 2 n (H-1)/H bytes there,
the least that an all-reduce over H hosts can; one ring through all ranks does so too, but in P - 1 steps each way
instead of H - 1. A long array is cut into slices that go through the steps one after the other, so that the link
carries one slice while others are added up within the hosts.

Hosts may differ in their number of ranks: with L on the smallest, there are L pieces, for the first L of each host.
On one host, and on hosts of one rank each, there is no hierarchy: then it is the ring.
Source: Cho, Finkler, Serrano, Kung & Hunter 2019, "BlueConnect: decomposing all-reduce for deep learning on
heterogeneous network hierarchy", of which this is the case of two levels; NCCL's and Horovod's hierarchical all-reduce.
"""

from __future__ import annotations

from ..backend import Array
from ..comm.handle import Steps
from .at_once import at_once
from .chunks import Chunks, chunk_slice
from .lane import Lane
from .reductions import Reduction, reduction_of
from .ring import ring_all_gather, ring_all_reduce, ring_all_reduce_cost, ring_reduce_scatter

SLICES = 8  # of a long array: the link lies idle while the first one is added up and the last one handed round
AT_ONCE = 4  # two on the link, so that it is busy while one is added up; one before it, one behind it


def hierarchical_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """Every rank ends with the sum over all ranks.

    dtype   kept; accumulates in it, first the ranks of each host, then the hosts
    Cost    2 (H-1)/H n bytes sent by each host to others; within it, 2 (R-1)/R n by each of R ranks
    """
    hosts = comm.comm.hosts()
    if len(set(hosts)) in (1, comm.size):  # no host has a neighbour, or none has two ranks
        yield from ring_all_reduce(comm, array, reduction)
        return
    host, across = comm.comm.by_host()
    pieces = min(hosts.count(number) for number in set(hosts))

    # Cut the array into slices, none much shorter than two segments; AT_ONCE of them are worked on at a time.
    count = max(1, min(SLICES, round(array.nbytes / 2 / comm.comm.segment)))
    slices = [array[chunk_slice(array.size, count, index)] for index in range(count)]
    workers = min(count, AT_ONCE)
    lanes = [(Lane(host, part_of=comm), Lane(across, part_of=comm)) for _ in range(workers)]
    yield from at_once(
        comm,
        [_slices(slices[worker::workers], *lanes[worker], pieces, reduction, comm.size) for worker in range(workers)],
    )


def _slices(slices: list[Array], host: Lane, across: Lane, pieces: int, reduction: Reduction, ranks: int) -> Steps:
    """All-reduce some slices, one after the other."""
    partial = reduction_of("sum", slices[0]) if reduction.op == "mean" else reduction  # finished in step 2 only
    for array in slices:
        # 1. Add up our piece of the slice within the host. The ranks after the first L have none.
        sizes = [piece.stop - piece.start for piece in (chunk_slice(array.size, pieces, i) for i in range(pieces))]
        here = Chunks(array, host.size, sizes + [0] * (host.size - pieces))
        yield from ring_reduce_scatter(host, here, partial)

        # 2. All-reduce the piece across hosts. Its chunk is finished on one rank, so that all get the same bits.
        if host.rank < pieces:
            there = Chunks(here[host.rank], across.size)
            yield from ring_reduce_scatter(across, there, partial)
            reduction.finish(there[across.rank], ranks)
            yield from ring_all_gather(across, there)

        # 3. Put the pieces together within the host.
        yield from ring_all_gather(host, here)


def hierarchical_all_reduce_cost(
    P: int, n: int, a: float, b: float, g: float, hosts: int = 1, between: tuple[float, float] | None = None
) -> float:
    """With H hosts of R = P/H ranks each, A and B the costs of a message between them, and x = n/P, a chunk's bytes:

        2 (R-1) a + 2 n (R-1)/R b + n (R-1)/R g                              within a host
        + (H-1) max(R x B, A + x (B+g)) + (H-2) max(R x B, A + x B) + R x B + A    between

    The first of each max is the time for which the link is busy with all R ranks' messages. Without `between` all
    messages cost alike and share no link: 2 (H-1) a + 2 (H-1) x b + (H-1) x g. In one slice; several overlap.
    """
    H, R, x = hosts, P // hosts, n / P
    within = ring_all_reduce_cost(R, n, a, b, g)
    if H == 1:
        return within
    if between is None:
        return within + ring_all_reduce_cost(H, n // R, a, b, g)
    A, B = between
    adding, passing = max(R * x * B, A + x * (B + g)), max(R * x * B, A + x * B)
    return within + (H - 1) * adding + (H - 2) * passing + R * x * B + A
