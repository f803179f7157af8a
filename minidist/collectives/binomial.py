"""The binomial tree: broadcast, scatter and gather in lg P rounds, for any number of ranks and any root.

A head holds what a range of ranks is to get. It halves the range, keeps the half that it is in itself (the longer one,
if they differ), and hands the other half on to that half's first rank, which is its head from then on. After
ceil(lg P) rounds every range is one rank. For P = 6 and root 0:

    round 1   0 -> 3                        0 1 2 | 3 4 5
    round 2   0 -> 2   3 -> 5               0 1 | 2 | 3 4 | 5
    round 3   0 -> 1   3 -> 4               0 | 1 | 2 | 3 | 4 | 5

A broadcast hands on the whole array each time, a scatter only the chunks of the range; a gather is the scatter with its
arrows turned round. Since ranges are of neighbours, their chunks lie side by side, and travel as one message.

Source: Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory, practice, and
experience", where it is called minimum spanning tree. There a range is cut in the middle, whichever half the head is
in; here its half is the longer one, so that the costs below are met for any P.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..backend import Array, device_of, empty
from ..comm.handle import Steps
from .chunks import Chunks
from .lane import Lane


class Branch(NamedTuple):
    """A part of the tree: ranks first ... stop - 1, one of which, the head, talks to the rest of the tree for them."""

    head: int
    first: int
    stop: int


class Node(NamedTuple):
    """A rank's place in the tree: its parent (None: the root), the branch it is head of, what it hands on to whom."""

    parent: int | None
    own: Branch
    children: tuple[Branch, ...]  # in the order of the rounds, so the longest first


@lru_cache(maxsize=1 << 14)
def binomial_tree(rank: int, size: int, root: int) -> Node:
    """Where `rank` is in the tree of `size` ranks that grows from `root`."""
    parent, own, children = None, Branch(root, 0, size), []
    # Invariant: `rank` is in the branch head, first, stop; once it is the head, that is what is left of `own`.
    head, first, stop = own
    while stop - first > 1:
        longer = (stop - first + 1) // 2
        if head < first + longer:
            kept, given = (first, first + longer), (first + longer, stop)
        else:
            kept, given = (stop - longer, stop), (first, stop - longer)
        branch = Branch(given[0], *given)
        if head == rank:
            children.append(branch)
        if given[0] <= rank < given[1]:
            parent, own = head, branch
            head, first, stop = branch
        else:
            first, stop = kept
    return Node(parent, own, tuple(children))


def hand_down(comm: Lane, node: Node, held: Array, part: Callable[[Branch], Array]) -> Steps:
    """Receive `held` from the parent, and hand each child its part of it.

    One at a time: the child with the longest branch must have its part first, and sends at once would share the link.
    """
    if node.parent is not None:
        yield comm.irecv(held, node.parent)
    for child in node.children:
        comm.isend(part(child), child.head)
        yield from comm.sent()


def binomial_broadcast(comm: Lane, array: Array, root: int = 0) -> Steps:
    """Every rank ends with the root's array. P - 1 messages in all, of n bytes; at most ceil(lg P) sent by any rank."""
    return hand_down(comm, binomial_tree(comm.rank, comm.size, root), array, lambda child: array)


def binomial_scatter_in_place(comm: Lane, chunks: Chunks, root: int = 0) -> Steps:
    """Chunk `rank` ends as the root's; ranks inside of the tree get the chunks of their branch as well."""
    node = binomial_tree(comm.rank, comm.size, root)
    return hand_down(comm, node, chunks[node.own.first : node.own.stop], lambda child: chunks[child.first : child.stop])


def binomial_scatter(comm: Lane, chunks: Chunks, out: Array, root: int = 0) -> Steps:
    """`out` ends as chunk `rank` of the root; on the others `chunks` only says how long the chunks are.

    Cost    P - 1 messages in all; the root sends ceil(lg P), with (P-1)/P n bytes. A rank inside of the tree needs
            memory for the chunks of its branch
    """
    node = binomial_tree(comm.rank, comm.size, root)
    held, part = _branch(chunks, node, out)
    yield from hand_down(comm, node, held, part)
    if held is not out:
        out[...] = part(Branch(comm.rank, comm.rank, comm.rank + 1))


def binomial_gather(comm: Lane, chunks: Chunks, array: Array, root: int = 0) -> Steps:
    """Chunk r of the root ends as rank r's array; on the others `chunks` only says how long the chunks are.

    Cost    as for the scatter, received instead of sent
    """
    # 1. Put our own chunk in its place.
    node = binomial_tree(comm.rank, comm.size, root)
    held, part = _branch(chunks, node, array)
    if held is not array:
        part(Branch(comm.rank, comm.rank, comm.rank + 1))[...] = array

    # 2. Collect the children's, the shortest first: it is complete first.
    yield from [comm.irecv(part(child), child.head) for child in reversed(node.children)]

    # 3. Hand all of them up.
    if node.parent is not None:
        comm.isend(held, node.parent)
        yield from comm.sent()


def _branch(chunks: Chunks, node: Node, mine: Array) -> tuple[Array, Callable[[Branch], Array]]:
    """Memory for the chunks of our branch, and a function that finds a smaller branch's in it.

    That is the root's array; `mine` where there is one chunk only; else new memory.
    """
    start, stop = chunks.start(node.own.first), chunks.start(node.own.stop)
    if node.parent is None:
        held = chunks.flat
    else:
        held = empty((stop - start,), mine.dtype, device_of(mine)) if node.children else mine
    return held, lambda branch: held[chunks.start(branch.first) - start : chunks.start(branch.stop) - start]


def binomial_barrier(comm: Lane) -> Steps:
    """Done when every rank has called it: word of all comes up the tree, and word of that goes down."""
    nothing = np.empty(0, np.uint8)
    yield from binomial_gather(comm, Chunks(nothing, comm.size), nothing)
    yield from binomial_broadcast(comm, nothing)


def binomial_broadcast_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) (a + n b)"""
    return (P - 1).bit_length() * (a + n * b)


def binomial_scatter_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """ceil(lg P) a + n (P-1)/P b"""
    return (P - 1).bit_length() * a + n * (P - 1) / P * b


def binomial_barrier_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """2 ceil(lg P) a"""
    return 2 * (P - 1).bit_length() * a
