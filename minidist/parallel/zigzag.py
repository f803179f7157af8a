"""Who has which times of a sequence: with a causal mask its end is much work, and its beginning little.

So it is cut into 2P chunks, those of np.array_split, and rank r has chunks r and 2P-1-r:

    P = 4    | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |    chunk -> rank

Any length does. All ranks have equally many times if the length divides by P.

Source  Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, namespace
from ..collectives import all_gather, chunk_slice
from ..comm import Communicator
from ..ops.common import one_dim
from ..tensor import Function, Tensor
from .functions import STEP
from .pieces import joined, pieces, side_by_side


def zigzag_positions(length: int, size: int, rank: int) -> np.ndarray:
    """The times, of a sequence so long, that rank `rank` of `size` has: int64, rising.

    Errors  ValueError: no such rank
    """
    if not 0 <= rank < size:
        raise ValueError(f"zigzag_positions: rank {rank}, but the ranks are 0 to {size - 1}")
    return np.concatenate([np.arange(length)[chunk] for chunk in chunks_of(length, size, rank)])


def zigzag_take(x: Any, comm: Communicator, dim: int) -> Any:
    """This rank's part of x (a tensor or an array), which has whole sequences along `dim`; a copy.

    Nothing is sent, backward neither: the gradient is 0 where other ranks' times are.
    """
    dim = one_dim(dim, x.ndim)
    mine = chunks_of(x.shape[dim], comm.size, comm.rank)
    return pieces(x, dim, mine) if isinstance(x, Tensor) else joined(x, dim, mine)


def zigzag_join(x: Any, comm: Communicator, dim: int, length: int | None = None) -> Any:
    """Whole sequences, in their order, from all ranks' parts of them (tensors or arrays). Undoes zigzag_take.

    Of a tensor the gradient is this rank's part: as after gather_from, what follows is the same on every rank.

    length  of the whole along dim; P times this part's if not given
    Cost    an all_gather of the whole; backward nothing
    Errors  ValueError: this rank's part is not as long as it should be
    """
    dim = one_dim(dim, x.ndim)
    length = checked_length("zigzag_join", comm, x.shape[dim], length)
    if isinstance(x, Tensor):
        return ZigzagJoin.apply(x, comm=comm, dim=dim, length=length)
    return _gathered(comm, x, dim, length)


class ZigzagJoin(Function):
    """y = all ranks' parts, as whole sequences.   dx = this rank's part of dy"""

    def forward(self, x: Array, comm: Communicator, dim: int, length: int) -> Array:
        self.dim, self.mine = dim, chunks_of(length, comm.size, comm.rank)
        return _gathered(comm, x, dim, length)

    def backward(self, dy: Array) -> tuple[Array]:
        return (joined(dy, self.dim, self.mine),)


def _gathered(comm: Communicator, x: Array, dim: int, length: int) -> Array:
    """Whole sequences along a dim, from all ranks' parts."""
    lengths = lengths_of(length, comm.size)
    first = x.swapaxes(0, dim)  # parts are contiguous in memory where they lie along the first dim
    whole = backend.empty((length, *first.shape[1:]), x.dtype, backend.device_of(x))
    whole[side_by_side(lengths)[comm.rank]] = first
    row = whole.size // max(length, 1)
    with comm.step(STEP):
        all_gather(comm, whole, counts=[n * row for n in lengths])
    return namespace(x).ascontiguousarray(joined(whole, 0, by_time(length, comm.size)).swapaxes(0, dim))


# -- where the chunks lie: in a sequence; and in all ranks' parts, one after another as messages bring them ------------


def chunks_of(length: int, size: int, rank: int) -> list[slice]:
    """Where the two chunks of a rank lie in a sequence."""
    return [chunk_slice(length, 2 * size, chunk) for chunk in (rank, 2 * size - 1 - rank)]


def lengths_of(length: int, size: int) -> list[int]:
    """How many times each rank has."""
    return [sum(c.stop - c.start for c in chunks_of(length, size, rank)) for rank in range(size)]


def by_rank(length: int, size: int) -> list[slice]:
    """Where the chunks lie in a sequence, those of rank 0 first."""
    return [chunk for rank in range(size) for chunk in chunks_of(length, size, rank)]


def by_time(length: int, size: int) -> list[slice]:
    """Where the chunks lie in all ranks' parts, that with the first times first."""
    places = side_by_side(chunk.stop - chunk.start for chunk in by_rank(length, size))
    return places[0::2] + places[::-2]  # the ranks' first chunks rise, their second ones fall


def checked_length(name: str, comm: Communicator, own: int, length: int | None) -> int:
    """The length of the sequences of which this rank has `own` times: `length`, or so many on every rank."""
    length = own * comm.size if length is None else length
    expected = lengths_of(length, comm.size)[comm.rank]
    if own != expected:
        ranks = f"{comm.size} ranks"
        raise ValueError(f"{name}: rank {comm.rank} has {own} times, not {expected} of {length} over {ranks}")
    return length
