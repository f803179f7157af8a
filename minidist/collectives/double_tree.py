"""Two binary trees over the same ranks, each for one half of the array: what is inside one is a leaf of the other.

    P = 6      first half                second half: each rank one further on

                   3                         4
                1     5                   2     0
               0 2   4                   1 3   5

In one tree alone the inner ranks send two messages down for each one they get, and the leaves, half of all ranks, send
none. In both together every rank sends and receives n bytes on the way up, and n on the way down, so all links are
busy: 2 n b for long arrays, as the ring, but in a number of steps that grows with lg P.

Each half goes through its tree in k pieces. Two colours of the edges say who sends when: edges of one colour are used
in even steps, of the other in odd ones, and no rank sends, or receives, along two edges of one colour. Down the trees:

    step 0    3>1            4>2
    step 1    1>2   3>5      2>1   4>0
    step 2    1>0   5>4      2>3   0>5       and the next pieces: 3>1   4>2
    step 3    these: 1>2   3>5   2>1   4>0   ...

and up the trees the same backwards. A rank receives in this order, one message at a time; it does not wait for its
sends, as that would double the time of ranks that share a core.
Source: Sanders, Speck & Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan". There the
colours are computed from bits, and the root is in neither tree; here they are found by walking along the edges.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from ..backend import Array
from ..comm.handle import Steps
from .chain import segments
from .chunks import Chunks
from .lane import Lane
from .reductions import Reduction

TREES = (0, 1)
Edge = tuple[int, int]  # the tree, and the rank at the lower end


class Trees(NamedTuple):
    """The two trees over a number of ranks, [tree][rank], and when each rank gets the first piece."""

    parent: list[list[int | None]]
    children: list[list[list[int]]]
    step: list[list[int]]  # -1 for the root
    last: int  # the last of all steps in `step`


class Move(NamedTuple):
    """A message down a tree. Up the tree it goes the other way."""

    peer: int
    tree: int
    piece: int


def parent_of(number: int, ranks: int) -> int | None:
    """In the binary tree whose numbers, 1 to `ranks`, increase from left to right: the odd ones are leaves.

    The lowest set bit of a number says how far away its children are: half that bit, or less where there are no more
    ranks on the right. So its parent has the next higher bit set, and this one not, if that is a rank at all.
    """
    bit = number & -number
    if number == 1 << (ranks.bit_length() - 1):
        return None
    above = (number - bit) | (2 * bit)
    return above if above <= ranks else number - bit


@cache
def trees_over(size: int) -> Trees:
    """The trees, and the steps in which their first pieces arrive."""
    # 1. The trees. Rank r is number r + 1 of the first; of the second number r, and rank 0 number P.
    parent: list[list[int | None]] = [[None] * size for _ in TREES]
    children: list[list[list[int]]] = [[[] for _ in range(size)] for _ in TREES]
    for tree in TREES:
        for number in range(1, size + 1):
            above = parent_of(number, size)
            if above is not None:
                low, high = (number - 1 + tree) % size, (above - 1 + tree) % size
                parent[tree][low] = high
                children[tree][high].append(low)

    # 2. The colours: different for the two edges down from a rank, and for the two that end at a rank. So an edge has
    #    at most two others that it must differ from, and they form paths, and circles of even length.
    colour: dict[Edge, int] = {}
    roots = [parent[tree].index(None) for tree in TREES]
    first = [(tree, rank) for tree in TREES for rank in children[tree][roots[tree]]]  # these get the colour of step 0
    for start in first + [(tree, rank) for tree in TREES for rank in range(size)]:
        walk = [(start, 0)]
        while walk:
            (tree, rank), number = walk.pop()
            end = parent[tree][rank]
            if end is None or (tree, rank) in colour:
                continue
            colour[tree, rank] = number
            walk.append(((1 - tree, rank), 1 - number))
            walk += [((tree, sibling), 1 - number) for sibling in children[tree][end] if sibling != rank]

    # 3. The steps: as soon as the parent has it, in the next step of the edge's colour.
    step = [[-1] * size for _ in TREES]
    for tree in TREES:
        ranks = [roots[tree]]
        for rank in ranks:  # it grows: from the root down
            for low in children[tree][rank]:
                soonest = step[tree][rank] + 1
                step[tree][low] = soonest + (soonest % 2 != colour[tree, low])
                ranks.append(low)
    return Trees(parent, children, step, max(map(max, step)))


def moves(rank: int, size: int, pieces: int) -> list[tuple[Move | None, Move | None]]:
    """What a rank receives and sends in each step on the way down; piece p follows the first 2 p steps later."""
    trees = trees_over(size)
    steps: list[list[Move | None]] = [[None, None] for _ in range(trees.last + 2 * pieces)]
    for tree in TREES:
        for piece in range(pieces):
            high = trees.parent[tree][rank]
            if high is not None:
                steps[trees.step[tree][rank] + 2 * piece][0] = Move(high, tree, piece)
            for low in trees.children[tree][rank]:
                steps[trees.step[tree][low] + 2 * piece][1] = Move(low, tree, piece)
    return [(receive, send) for receive, send in steps if receive or send]


def double_tree_all_reduce(comm: Lane, array: Array, reduction: Reduction) -> Steps:
    """Every rank ends with the sum over all ranks. All get the same bits, those of the two roots.

    dtype   kept; accumulates in it, in an order that the trees fix
    Cost    at most 4 k messages, and 2 n bytes, sent per rank
    """
    size, rank = comm.size, comm.rank
    halves = Chunks(array, 2)
    k = pieces_of(size, array.nbytes, comm.comm.segment)
    pieces = [Chunks(halves[tree], k) for tree in TREES]
    down = moves(rank, size, k)

    # 1. Up: what is to come down from a parent, backwards, is what we send it, and the other way round.
    #    Invariant: a piece that we send is the sum over all ranks below us, and ours.
    partial = comm.scratch_like(pieces[0][0])
    for send, receive in reversed(down):
        if send is not None:
            comm.isend(pieces[send.tree][send.piece], send.peer)
        if receive is not None:
            mine = pieces[receive.tree][receive.piece]
            theirs = partial[: mine.size]
            yield comm.irecv(theirs, receive.peer)
            comm.combine(mine, theirs, reduction)
    yield from comm.sent()
    comm.give_back(partial)
    for tree in TREES:
        if trees_over(size).parent[tree][rank] is None:
            reduction.finish(halves[tree], size)

    # 2. Down: the results take the place of our sums.
    for receive, send in down:
        if send is not None:
            comm.isend(pieces[send.tree][send.piece], send.peer)
        if receive is not None:
            yield comm.irecv(pieces[receive.tree][receive.piece], receive.peer)
    yield from comm.sent()


def pieces_of(P: int, n: int, longest: float = math.inf) -> int:
    """How many pieces each half of n bytes is cut into: see `segments` of chain.py, with the trees' last step for P."""
    return max(segments(trees_over(P).last + 1, n // 4), math.ceil(n / 2 / longest))


def double_tree_all_reduce_cost(P: int, n: int, a: float, b: float, g: float) -> float:
    """(s + 2 k - 1) (2 a + n/2k (2 b + g)): s, in which the last rank gets its first piece, is at most
    2 ceil(lg P) - 2

    Met where sends wait for their receives and nobody is early enough to get into another's way; else up to a third
    more, or twice as much where sends do not wait at all.
    """
    k = pieces_of(P, n)
    return (trees_over(P).last + 2 * k - 1) * (2 * a + n / 2 / k * (2 * b + g)) if P > 1 else 0.0
