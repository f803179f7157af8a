"""Communication that gradients come back through: every function's backward is its dual.

    forward                                 backward
    copy_to              x, as it is        all_reduce           Megatron's f
    reduce_from          all_reduce         dy, as it is         Megatron's g
    scatter_to           own chunk          all_gather
    gather_from          all_gather         own chunk
    all_gather_from      all_gather         reduce_scatter       what follows differs from rank to rank
    reduce_scatter_to    reduce_scatter     all_gather
    all_to_all           all_to_all         all_to_all, the other way
    send_to              send               receive
    recv_from            receive            send

The first four lead into and out of a region where each rank computes something of its own. Outside of it all ranks
have the same values and the same gradients; so the gradient of what they share is either the same on all of them
already, or the sum over all.

Each must be called by every rank of `comm`, in one order, and so must backward be: it goes the other way round. On one
rank they are the identity. Chunks along a dim are those of np.array_split.

Source  Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import backend
from ..autograd import after_backward
from ..backend import Array, Shape, namespace
from ..collectives import all_gather, all_reduce, chunk_slice, reduce_scatter
from ..collectives import all_to_all as exchange
from ..comm import Communicator
from ..comm.base import Request
from ..tensor import Function, Tensor

STEP = "M.2(4) combine"  # of the document: the results are combined by communication


# -- on arrays: along any dim, whole arrays in and out ---------------------------------------------------------------


def _total(comm: Communicator, x: Array) -> Array:
    """The sum over all ranks, as a new array."""
    whole = namespace(x).array(x, order="C")
    with comm.step(STEP):
        return all_reduce(comm, whole)


def _own_chunk(comm: Communicator, x: Array, dim: int) -> Array:
    """This rank's chunk along a dim, as an array of its own."""
    mine = chunk_slice(x.shape[dim], comm.size, comm.rank)
    return x[(slice(None),) * dim + (mine,)].copy()


def _lengths(comm: Communicator, length: int) -> list[int]:
    """How long each rank's chunk is."""
    return [len(range(length)[chunk_slice(length, comm.size, rank)]) for rank in range(comm.size)]


def _joined(comm: Communicator, chunk: Array, dim: int, length: int) -> Array:
    """All ranks' chunks, one after another along a dim that is `length` then."""
    mine = chunk_slice(length, comm.size, comm.rank)
    first = chunk.swapaxes(0, dim)  # chunks are contiguous in memory where they lie along the first dim
    whole = backend.empty((length, *first.shape[1:]), chunk.dtype, backend.device_of(chunk))
    whole[mine] = first
    row = whole.size // max(length, 1)
    with comm.step(STEP):
        all_gather(comm, whole, counts=[n * row for n in _lengths(comm, length)])
    return namespace(whole).ascontiguousarray(whole.swapaxes(0, dim))


def _own_chunk_of_total(comm: Communicator, x: Array, dim: int) -> Array:
    """This rank's chunk, along a dim, of the sum over all ranks."""
    first = namespace(x).array(x.swapaxes(0, dim), order="C")
    length, row = len(first), first.size // max(len(first), 1)
    lengths = _lengths(comm, length)
    with comm.step(STEP):
        chunk = reduce_scatter(comm, first, counts=[n * row for n in lengths])
    return chunk.reshape(lengths[comm.rank], *first.shape[1:]).swapaxes(0, dim).copy()


def _dealt(
    comm: Communicator, x: Array, split_dim: int, lengths: list[int], concat_dim: int, out_lengths: list[int]
) -> Array:
    """Chunk j of x along one dim goes to rank j; what comes from all ranks is joined along another (or the same)."""
    xp = namespace(x)
    stops = np.cumsum(lengths)[:-1].tolist()
    outgoing = xp.concatenate([chunk.reshape(-1) for chunk in xp.split(x, stops, axis=split_dim)])
    shape = list(x.shape)
    shape[split_dim] = lengths[comm.rank]
    shapes = [(*shape[:concat_dim], n, *shape[concat_dim + 1 :]) for n in out_lengths]
    counts = [x.size // max(x.shape[split_dim], 1) * n for n in lengths]
    out_counts = [int(np.prod(s)) for s in shapes]
    incoming = backend.empty((sum(out_counts),), x.dtype, backend.device_of(x))
    with comm.step(STEP):
        exchange(comm, outgoing, incoming, counts=counts, out_counts=out_counts)
    pieces = xp.split(incoming, np.cumsum(out_counts)[:-1].tolist())
    return xp.concatenate([piece.reshape(s) for piece, s in zip(pieces, shapes, strict=True)], axis=concat_dim)


# -- the functions: forward beside its dual --------------------------------------------------------------------------


class CopyTo(Function):
    """y = x on every rank.   dx = the sum of all ranks' dy"""

    is_view = True

    def forward(self, x: Array, comm: Communicator) -> Array:
        self.comm = comm
        return x[...]

    def backward(self, dy: Array) -> tuple[Array]:
        return (_total(self.comm, dy),)


class ReduceFrom(Function):
    """y = the sum of all ranks' x.   dx = dy"""

    def forward(self, x: Array, comm: Communicator) -> Array:
        return _total(comm, x)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy,)


class ScatterTo(Function):
    """y = this rank's chunk of x.   dx = all ranks' dy, joined"""

    def forward(self, x: Array, comm: Communicator, dim: int) -> Array:
        self.comm, self.dim, self.length = comm, dim, x.shape[dim]
        return _own_chunk(comm, x, dim)

    def backward(self, dy: Array) -> tuple[Array]:
        return (_joined(self.comm, dy, self.dim, self.length),)


class GatherFrom(Function):
    """y = all ranks' x, joined.   dx = this rank's chunk of dy"""

    def forward(self, x: Array, comm: Communicator, dim: int, length: int) -> Array:
        self.comm, self.dim = comm, dim
        return _joined(comm, x, dim, length)

    def backward(self, dy: Array) -> tuple[Array]:
        return (_own_chunk(self.comm, dy, self.dim),)


class AllGatherFrom(GatherFrom):
    """y = all ranks' x, joined.   dx = this rank's chunk of the sum of all ranks' dy"""

    def backward(self, dy: Array) -> tuple[Array]:
        return (_own_chunk_of_total(self.comm, dy, self.dim),)


class ReduceScatterTo(Function):
    """y = this rank's chunk of the sum of all ranks' x.   dx = all ranks' dy, joined"""

    def forward(self, x: Array, comm: Communicator, dim: int) -> Array:
        self.comm, self.dim, self.length = comm, dim, x.shape[dim]
        return _own_chunk_of_total(comm, x, dim)

    def backward(self, dy: Array) -> tuple[Array]:
        return (_joined(self.comm, dy, self.dim, self.length),)


class AllToAll(Function):
    """y = what all ranks had for this one.   dx = what all ranks' dy have for this one, the other way"""

    def forward(
        self, x: Array, comm: Communicator, split_dim: int, lengths: list[int], concat_dim: int, out_lengths: list[int]
    ) -> Array:
        self.comm, self.back = comm, (concat_dim, out_lengths, split_dim, lengths)
        return _dealt(comm, x, split_dim, lengths, concat_dim, out_lengths)

    def backward(self, dy: Array) -> tuple[Array]:
        return (_dealt(self.comm, dy, *self.back),)


class SendTo(Function):
    """y = 0, and x goes to rank `dest`.   dx comes from there"""

    def forward(self, x: Array, comm: Communicator, dest: int, tag: int) -> Array:
        self.comm, self.dest, self.tag, self.shape, self.dtype = comm, dest, tag, x.shape, x.dtype
        self.device = backend.device_of(x)
        self.array = namespace(x).array(x, order="C")  # ours alone: it is on its way until `sending` is done
        with comm.step(STEP):
            self.sending: Request = comm.isend(self.array, dest, tag)
            if not self.recording:
                self.sending.wait()
        return backend.full((), 0, x.dtype, self.device)

    def backward(self, dy: Array) -> tuple[Array]:
        dx = backend.empty(self.shape, self.dtype, self.device)
        with self.comm.step(STEP):
            receiving = self.comm.irecv(dx, self.dest, self.tag)
            self.sending.wait()
            receiving.wait()
        return (dx * dy,)


class RecvFrom(Function):
    """y = what rank `source` sent; `after` only puts it in its place in the graph.   dy goes back there"""

    def forward(
        self, after: Array, comm: Communicator, source: int, shape: Shape, dtype: Any, tag: int, device: str
    ) -> Array:
        self.comm, self.source, self.tag = comm, source, tag
        with comm.step(STEP):
            return comm.recv(backend.empty(shape, dtype, device), source, tag)

    def backward(self, dy: Array) -> tuple[None]:
        with self.comm.step(STEP):
            sending = self.comm.isend(namespace(dy).array(dy, order="C"), self.source, self.tag)
        after_backward(sending.wait)  # and not here: the other rank may itself be sending, to one that waits for us
        return (None,)


# -- what is called --------------------------------------------------------------------------------------------------


def copy_to(x: Tensor, comm: Communicator) -> Tensor:
    """Enter a region where each rank uses x, equal on all, in its own way.

    Cost  backward: an all_reduce of x's size
    """
    return x if comm.size == 1 else CopyTo.apply(x, comm=comm)


def reduce_from(x: Tensor, comm: Communicator) -> Tensor:
    """Leave it: the sum of what each rank has, equal on all.

    Cost  forward: an all_reduce of x's size
    """
    return x if comm.size == 1 else ReduceFrom.apply(x, comm=comm)


def scatter_to(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """Enter: this rank's chunk of x, which is equal on all ranks.

    Cost  backward: an all_gather of x's size
    """
    return x if comm.size == 1 else ScatterTo.apply(x, comm=comm, dim=_dim(x, dim))


def gather_from(x: Tensor, comm: Communicator, dim: int, length: int | None = None) -> Tensor:
    """Leave: all ranks' chunks joined; what follows is the same on every rank.

    length  of the result along dim, where chunks are not of one size
    Cost    forward: an all_gather of the result's size
    Errors  ValueError: this rank's chunk is not as long as np.array_split would have it
    """
    if comm.size == 1:
        return x
    return GatherFrom.apply(x, comm=comm, dim=_dim(x, dim), length=_whole(x, comm, dim, length))


def all_gather_from(x: Tensor, comm: Communicator, dim: int, length: int | None = None) -> Tensor:
    """All ranks' chunks joined, each of which every rank then uses in its own way.

    Cost    an all_gather of the result's size forward, a reduce_scatter of it backward
    Errors  as gather_from
    """
    if comm.size == 1:
        return x
    return AllGatherFrom.apply(x, comm=comm, dim=_dim(x, dim), length=_whole(x, comm, dim, length))


def reduce_scatter_to(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """This rank's chunk of the sum of what each rank has.

    Cost  a reduce_scatter of x's size forward, an all_gather of it backward
    """
    return x if comm.size == 1 else ReduceScatterTo.apply(x, comm=comm, dim=_dim(x, dim))


def all_to_all(
    x: Tensor,
    comm: Communicator,
    split_dim: int,
    concat_dim: int,
    lengths: Sequence[int] | None = None,
    out_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Chunk j of x along split_dim goes to rank j; the chunks that come are joined along concat_dim.

    lengths      of the chunks along split_dim; np.array_split's if not given
    out_lengths  along concat_dim, of what comes from each rank; as long as x itself (or, where both dims are the same,
                 as what goes to each rank) if not given
    Cost         x's size × (P-1)/P in P - 1 messages, forward and backward
    Errors       ValueError: lengths that don't add up to x's, or don't fit out_lengths
    """
    split, concat = _dim(x, split_dim), _dim(x, concat_dim)
    sizes = _lengths(comm, x.shape[split]) if lengths is None else list(lengths)
    if out_lengths is not None:
        out = list(out_lengths)
    else:
        out = list(sizes) if split == concat else [x.shape[concat]] * comm.size
    if len(sizes) != comm.size or sum(sizes) != x.shape[split]:
        raise ValueError(f"all_to_all: lengths {sizes} for {comm.size} ranks and a dim of {x.shape[split]}")
    own = sizes[comm.rank] if split == concat else x.shape[concat]
    if len(out) != comm.size or out[comm.rank] != own:
        raise ValueError(f"all_to_all: out_lengths {out}, but this rank {comm.rank} deals {own} to itself")
    if comm.size == 1:
        return x
    return AllToAll.apply(x, comm=comm, split_dim=split, lengths=sizes, concat_dim=concat, out_lengths=out)


def send_to(x: Tensor, comm: Communicator, dest: int, tag: int = 0) -> Tensor:
    """Send x to rank `dest`, which has it from recv_from. Returns 0, to be added to this rank's loss.

    The 0 stands for what the other rank makes of x: backward from it waits for x's gradient. Where no gradient is
    wanted send_to waits until x has been sent; else that is done by the time of backward, so that two ranks may both
    send first and receive second.
    """
    return SendTo.apply(x, comm=comm, dest=dest, tag=tag)


def recv_from(
    comm: Communicator,
    source: int,
    shape: Shape,
    dtype: Any = np.float32,
    tag: int = 0,
    after: Tensor | None = None,
    device: str = "cpu",
) -> Tensor:
    """What rank `source` gave to send_to; backward sends its gradient there, also if it is all that is upstream.

    after  a tensor (the 0 of a send_to, say) that backward shall come to later than to this
    """
    anchor = Tensor(backend.full((), 0, np.float32, device), requires_grad=True) if after is None else after
    return RecvFrom.apply(anchor, comm=comm, source=source, shape=shape, dtype=dtype, tag=tag, device=device)


def _dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"dim {dim} is out of range for a tensor of {x.ndim} dims")
    return dim % x.ndim


def _whole(x: Tensor, comm: Communicator, dim: int, length: int | None) -> int:
    """How long all ranks' chunks are together."""
    own = x.shape[_dim(x, dim)]
    length = own * comm.size if length is None else length
    expected = _lengths(comm, length)[comm.rank]
    if own != expected:
        raise ValueError(f"rank {comm.rank}'s chunk is {own} long, not {expected} of {length} over {comm.size} ranks")
    return length
