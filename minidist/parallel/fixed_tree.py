r"""A sum over ranks with the same bits however many ranks there are: the gradients of M microbatches, say.

Floats do not add associatively: sums of each rank's own, added over the ranks, have other last bits on 4 ranks than on
8. Here the M arrays, the leaves, are always added along one binary tree, whoever holds them:

    node (level, i) = node (level - 1, 2i) + node (level - 1, 2i + 1)      or only the first, where leaves end before

Each rank has a stretch of the leaves, and adds what it can. For M = 8 on 3 ranks that leaves the nodes in brackets;
those in round ones need leaves of several ranks:

    level 3                    (3,0)
                         /               \
    level 2         (2,0)                 (2,1)
                   /     \               /     \
    level 1     [1,0]    (1,1)        [1,2]    [1,3]
                /   \    /   \        /   \    /   \
    level 0    0     1 [0,2][0,3]    4     5  6     7
               -- rank 0 -- | ---- rank 1 --- | rank 2

    1. add          rank r: its leaves, as they come, into a TreeSum
    2. all-to-all   chunk j of all nodes goes to rank j; which nodes a rank has follows from M, P and r: no headers
    3. add          rank j: the rest of the tree, for chunk j
    4. all-gather   everybody gets all chunks (all_reduce only)

Cost: a rank with k nodes of n bytes sends k n (P-1)/P + n (P-1)/P. Where M/P is a power of two k is 1, and that is the
ring's 2 n (P-1)/P; m leaves make at most 2 lg (m + 1) nodes.

-0.0 stays: a node without a second child is its first child, not that plus 0. A nan is a nan in any order, but of two
nans' bits NumPy takes the first or the second by the place in the array, so all nans in the result are made one.
"""

from __future__ import annotations

from itertools import chain

from ..backend import Array, device_of, empty, namespace
from ..collectives import all_gather, all_to_all, chunk_slice
from ..collectives.call import flat_view
from ..comm import Communicator


def share(leaves: int, ranks: int, rank: int) -> range:
    """The leaves of one rank: np.array_split(range(leaves), ranks)[rank]. If ranks > leaves, some have none."""
    if leaves < 1 or not 0 <= rank < ranks:
        raise ValueError(f"leaves={leaves}, ranks={ranks}, rank={rank}: expected leaves >= 1, 0 <= rank < ranks")
    part = chunk_slice(leaves, ranks, rank)
    return range(part.start, part.stop)


def nodes_of(leaves: int, part: range) -> list[tuple[int, int]]:
    """(level, index) of the fewest nodes that make up this part of the leaves, in their order."""
    nodes, leaf = [], part.start
    while leaf < part.stop:
        level, index = _highest(leaves, 0, leaf, part.stop)
        nodes.append((level, index))
        leaf = min((index + 1) << level, leaves)
    return nodes


def _highest(leaves: int, level: int, index: int, stop: int) -> tuple[int, int]:
    """The highest node that begins where this one does, and ends by leaf `stop`."""
    root = (leaves - 1).bit_length()
    while level < root and index % 2 == 0 and min((index + 2) << level, leaves) <= stop:
        level, index = level + 1, index // 2
    return level, index


class TreeSum:
    """Of `leaves` leaves those from first to stop - 1, added as they come: a binary counter, whose digits are arrays.

    nodes  [(level, index, array)] in the order of leaves, arrays flat; after the last leaf those of `nodes_of`.
           The TreeSum's own memory, used again after `clear`
    """

    def __init__(self, leaves: int, first: int, stop: int):
        if leaves < 1 or not 0 <= first <= stop <= leaves:
            raise ValueError(f"leaves={leaves}, first={first}, stop={stop}: expected 0 <= first <= stop <= leaves >= 1")
        self.leaves, self.first, self.stop = leaves, first, stop
        self.next = first  # the leaf to come
        self.nodes: list[tuple[int, int, Array]] = []
        self.kind: tuple[int, str, str] | None = None  # of the leaves: size, dtype, device
        self._spare: list[Array] = []  # memory of nodes that were added to others

    def add(self, array: Array) -> None:
        """Take the next leaf: half are copied, half added to another. The caller may use its array again.

        Errors  ValueError: a leaf too many, not of floats, or of another size, dtype or device than the first
        """
        if self.next == self.stop:
            raise ValueError(f"leaves {self.first}:{self.stop} of {self.leaves} are all added, and here is one more")
        if array.dtype.kind != "f" or _kind(array) != (self.kind or _kind(array)):
            raise ValueError(f"leaf {self.next} is {_kind(array)}: expected floats, as all others {self.kind}")
        self.kind = _kind(array)
        self._take(0, self.next, namespace(array).reshape(array, -1), ours=False)
        self.next += 1

    def clear(self) -> None:
        """Begin again with leaf `first`."""
        self._spare += [array for _, _, array in self.nodes]
        self.nodes, self.next = [], self.first

    def _take(self, level: int, index: int, array: Array, ours: bool) -> None:
        """Take the next node in the order of leaves. Unless it is `ours`, its array is not to change."""
        # Invariant: each of `nodes` is the highest of its leaves, and no two are siblings.
        level, index = _highest(self.leaves, level, index, (index + 1) << level)
        while index % 2 and self.nodes and self.nodes[-1][:2] == (level, index - 1):
            left = self.nodes.pop()[2]
            left += array
            if ours:
                self._spare.append(array)
            array, ours = left, True
            level, index = _highest(self.leaves, level + 1, index // 2, (index + 1) << level)
        if not ours:
            leaf, array = array, self._spare.pop() if self._spare else empty(array.shape, array.dtype, device_of(array))
            array[...] = leaf
        self.nodes.append((level, index, array))


def _kind(array: Array) -> tuple[int, str, str]:
    return array.size, str(array.dtype), device_of(array)


def reduce_scatter(comm: Communicator, tree: TreeSum, out: Array) -> Array:
    """Sum all ranks' leaves; return this rank's chunk of the sum, a view of `out` in one dimension.

    Every rank calls it, with the leaves of its `share` in its tree, which stays as it is; so does the rest of `out`.

    Shapes  leaves and `out` of n elements -> chunk `rank` of np.array_split(flat, P)
    Cost    P - 1 messages, k n (P-1)/P bytes sent by a rank with k nodes
    Memory  1/P of all ranks' nodes; where k > 1 another k n bytes
    Errors  ValueError: the tree lacks leaves, or has another rank's; `out` is not like them
    """
    flat, part = flat_view(comm, out), share(tree.leaves, comm.size, comm.rank)
    if range(tree.first, tree.next) != part:
        mine = f"rank {comm.rank} of {comm.size} has {part.start}:{part.stop} of {tree.leaves}"
        raise ValueError(f"the tree has leaves {tree.first}:{tree.next}, where {mine}")
    if tree.kind and tree.kind != _kind(flat):
        raise ValueError(f"out is {_kind(flat)}, the leaves are {tree.kind}: expected them alike")
    slices = [chunk_slice(flat.size, comm.size, rank) for rank in range(comm.size)]
    nodes = [nodes_of(tree.leaves, share(tree.leaves, comm.size, rank)) for rank in range(comm.size)]
    chunk, xp = flat[slices[comm.rank]], namespace(flat)

    # 1. Chunk j of all our nodes goes to rank j. A single node already lies as it is sent.
    ours = [array for _, _, array in tree.nodes]
    pieces = [array[part] for part in slices for array in ours]
    packed = ours[0] if len(ours) == 1 else xp.concatenate([flat[:0], *pieces])
    counts = [len(ours) * (part.stop - part.start) for part in slices]
    came = all_to_all(comm, packed, counts=counts, out_counts=[len(theirs) * chunk.size for theirs in nodes])

    # 2. What came is in the order of leaves: finish the tree.
    whole = TreeSum(tree.leaves, 0, tree.leaves)
    rows = came.reshape(sum(map(len, nodes)), chunk.size)
    for (level, index), row in zip(chain(*nodes), rows, strict=True):
        whole._take(level, index, row, ours=True)
    comm.reduced((len(rows) - 1) * chunk.nbytes)

    # 3. The root is the sum; make its nans one.
    chunk[...] = whole.nodes[0][2]
    chunk[xp.isnan(chunk)] = xp.nan
    return chunk


def all_reduce(comm: Communicator, tree: TreeSum, out: Array, algorithm: str = "auto") -> Array:
    """Sum all ranks' leaves; every rank ends with the whole sum in `out`, which is returned.

    Cost  `reduce_scatter`, then an all-gather by `algorithm`: (k + 1) n (P-1)/P bytes sent by a rank with k nodes
    """
    reduce_scatter(comm, tree, out)
    return all_gather(comm, out, algorithm)
