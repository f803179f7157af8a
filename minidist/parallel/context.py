"""Context parallelism: each rank has a part of every sequence, and attention looks across the parts.

All else in a transformer treats each time by itself; only attention has queries meet the keys and values of other
times. There are two ways, from and to this rank's times of all heads (B, H, T/P, E), dealt as in zigzag.py:

    ring_attention      keys and values travel from rank to rank; heads in any number
    ulysses_attention   an all_to_all turns a part of the times of all heads into all times of a part of the heads

Sources  Liu et al. 2023, "Ring attention with blockwise transformers for near-infinite context"
         Jacobs et al. 2023, "DeepSpeed Ulysses"
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .. import backend
from ..backend import Array, namespace
from ..comm import Communicator
from ..comm.base import MAX_TAG, Request
from ..ops import scaled_dot_product_attention
from ..ops.common import same_dtype, wide
from ..tensor import Function, Tensor
from .functions import STEP, all_to_all
from .pieces import pieces
from .zigzag import by_rank, by_time, checked_length, chunks_of, lengths_of, zigzag_join, zigzag_positions, zigzag_take

__all__ = ["ring_attention", "ulysses_attention", "zigzag_join", "zigzag_positions", "zigzag_take"]

KEYS, GRADIENTS = MAX_TAG - 1, MAX_TAG  # tags, far from those that programs choose


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    comm: Communicator,
    causal: bool = True,
    scale: float | None = None,
    length: int | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks, which go around a ring.

    Shapes  q, k (B, H, T_r, E), v (B, H, T_r, V) -> (B, H, T_r, V), with T_r this rank's times (zigzag_positions)
    causal  a query looks at its own time and earlier ones; else at all
    scale   1 / sqrt(E) if not given
    length  T, of the whole sequence; P T_r if not given: then T divides by P
    Cost    with n the bytes of this rank's k and v: forward P - 1 messages, (P-1) n bytes; backward 2 (P-1) messages,
            2 (P-1) n bytes (half precision: 3 (P-1) n, since sums travel in float32). A message is on its way while a
            block is computed
    Work    causal: (P+1)/P of an even share of the pairs of times, the same on every rank in every step
    Memory  the scores of one block, of (T/P)² pairs, at a time; on one rank those of all pairs, for it has no blocks
    Errors  ValueError: shapes that do not match, a part of the wrong length; TypeError: different dtypes
    Source  Liu et al. 2023. One rank does what scaled_dot_product_attention does
    """
    if comm.size == 1:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    whole = _checked("ring_attention", q, k, v, comm, length)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return RingAttention.apply(q, k, v, comm=comm, length=whole, causal=causal, scale=scale)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    comm: Communicator,
    causal: bool = True,
    scale: float | None = None,
    length: int | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks: each rank does it for some of the heads.

    Shapes, causal, scale, length  as ring_attention
    Cost    four all_to_alls, of q, k, v and the result: 4 (P-1) messages, (P-1)/P of their bytes; backward the same
    Memory  the scores of all T² pairs of times, of H/P heads
    Errors  as ring_attention; ValueError: heads that do not divide by P
    Source  Jacobs et al. 2023, section 3
    """
    if q.ndim == 4 and q.shape[1] % comm.size:
        raise ValueError(f"ulysses_attention: {q.shape[1]} heads do not divide by {comm.size} ranks")
    if comm.size == 1:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    length = _checked("ulysses_attention", q, k, v, comm, length)
    lengths = lengths_of(length, comm.size)
    # 1. All times of some heads; they come rank by rank, and are put in their order.
    came = [all_to_all(x, comm, split_dim=1, concat_dim=2, out_lengths=lengths) for x in (q, k, v)]
    q, k, v = (pieces(x, 2, by_time(length, comm.size)) for x in came)
    # 2. Attention as on one rank.
    y = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    # 3. And back.
    return all_to_all(pieces(y, 2, by_rank(length, comm.size)), comm, split_dim=2, concat_dim=1, lengths=lengths)


def _checked(name: str, q: Tensor, k: Tensor, v: Tensor, comm: Communicator, length: int | None) -> int:
    """The length of the whole sequence, the tensors found to fit."""
    same_dtype(name, q, k, v)
    if q.ndim != 4 or k.shape != q.shape or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{name}: q {q.shape}, k {k.shape}, v {v.shape}; expected (B, H, T, E) twice and (B, H, T, V)")
    return checked_length(name, comm, q.shape[2], length)


class Block(NamedTuple):
    """Which of a rank's queries look at which of another's keys: at all of these; if causal, at none after them."""

    queries: slice
    keys: slice
    causal: bool = False


def block(length: int, size: int, rank: int, source: int, causal: bool) -> Block:
    """What rank `rank` computes with the keys and values of rank `source`.

    Half of the pairs, and nothing masked, wherever source is not rank, so each step is as much work for every rank:

        source < rank    chunk source is before both of our chunks, chunk 2P-1-source after both
        source > rank    our first chunk is before both of theirs, our second one after both
    """
    everything = slice(None)
    if not causal or source == rank:
        return Block(everything, everything, causal)
    if source < rank:
        first, _ = chunks_of(length, size, source)
        return Block(everything, slice(first.stop - first.start))
    first, _ = chunks_of(length, size, rank)
    return Block(slice(first.stop - first.start, None), everything)


class Both(NamedTuple):
    """Keys and values (or their gradients), one after the other in one array: what travels as one message."""

    flat: Array
    k: Array  # (B, H, S, E), a view
    v: Array  # (B, H, S, V)


def _both(k: Array, v: Array, length: int, dtype: Any) -> Both:
    """Room for keys and values of so many times, else like these."""
    shapes = [(*x.shape[:2], length, x.shape[3]) for x in (k, v)]
    flat = backend.empty((sum(math.prod(shape) for shape in shapes),), dtype, backend.device_of(k))
    cut = math.prod(shapes[0])
    return Both(flat, flat[:cut].reshape(shapes[0]), flat[cut:].reshape(shapes[1]))


def _around(comm: Communicator, k: Array, v: Array, lengths: list[int]) -> Iterator[tuple[int, Both]]:
    """(rank, its keys and values) for every rank: this one first, then those to the left of it.

    The next ones are on their way while the caller works on those it has got.
    Cost  P - 1 messages, of one rank's keys and values each
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    here = _both(k, v, lengths[comm.rank], k.dtype)
    here.k[...], here.v[...] = k, v
    # Invariant: `here` are those of rank - step.
    for step in range(comm.size - 1):
        there = _both(k, v, lengths[(comm.rank - step - 1) % comm.size], k.dtype)
        with comm.step(STEP):
            receiving = comm.irecv(there.flat, left, KEYS)
            sending = comm.isend(here.flat, right, KEYS)
        yield (comm.rank - step) % comm.size, here
        with comm.step(STEP):
            receiving.wait()
            sending.wait()
        here = there
    yield right, here


def _scores(q: Array, k: Array, scale: float, causal: bool) -> Array:
    """scale * q @ k.T, -inf for keys after the query if causal, in float32 at least."""
    xp = namespace(q)
    scores = wide(xp.matmul(q * scale, k.swapaxes(-1, -2)))
    if causal:
        scores += xp.triu(xp.full(scores.shape[-2:], -math.inf, scores.dtype), 1)
    return scores


class RingAttention(Function):
    """y = softmax(scale * q @ k.T, masked) @ v, where k and v are those of all ranks. The result is of q's rank.

    forward   For each block of keys, with s its scores, m the largest score so far and l the sum of exp(scores - m)
              so far, y not yet divided by l:

              m' = max(m, max s),   l = l e**(m - m') + sum of e**(s - m'),   y = y e**(m - m') + e**(s - m') @ v

              At the end y /= l, and m + log l is kept: from it any block's p = e**(s - (m + log l)) can be had again.
    backward  For each block, with d = sum of dy * y over V:

              dv += p.T @ dy,   ds = p * (dy @ v.T - d),   dq += scale * ds @ k,   dk += scale * ds.T @ q

              k and v come around once more. What they get here is added to dk and dv, which follow them a step behind:
              they set off one rank to the right of their own and are home after P - 1 steps.
    Memory    the scores of one block: a rank's queries × a rank's keys. Sums are in float32 at least
    Source    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax" (m and l); Dao 2023,
              "FlashAttention-2", section 3.1 (backward); Liu et al. 2023 (the ring)
    """

    def forward(
        self, q: Array, k: Array, v: Array, comm: Communicator, length: int, causal: bool, scale: float
    ) -> Array:
        self.comm, self.causal, self.scale = comm, causal, scale
        self.length, self.lengths = length, lengths_of(length, comm.size)
        xp = namespace(q)
        dtype = wide(q[:0]).dtype
        y = xp.zeros((*q.shape[:3], v.shape[3]), dtype)
        largest = xp.full((*q.shape[:3], 1), -math.inf, dtype)
        total = xp.zeros_like(largest)
        for source, theirs in _around(comm, k, v, self.lengths):
            queries, keys, masked = self._block(source)
            k_part, v_part = theirs.k[:, :, keys], theirs.v[:, :, keys]
            if not (q[:, :, queries].size and k_part.size):
                continue
            scores = _scores(q[:, :, queries], k_part, scale, masked)
            before = largest[:, :, queries]
            now = xp.maximum(before, scores.max(axis=-1, keepdims=True))
            shrink = xp.exp(before - now)
            scores -= now
            p = xp.exp(scores, out=scores)
            total[:, :, queries] *= shrink
            total[:, :, queries] += p.sum(axis=-1, keepdims=True)
            y[:, :, queries] *= shrink
            y[:, :, queries] += xp.matmul(p.astype(q.dtype, copy=False), v_part)
            largest[:, :, queries] = now
        y /= total
        y = y.astype(q.dtype, copy=False)
        self.save(q, k, v, y, largest + xp.log(total))
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        q, k, v, y, log_total = self.saved
        xp, comm = namespace(dy), self.comm
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        dots = xp.einsum("...v,...v->...", wide(dy), wide(y))[..., None]
        dq = xp.zeros(q.shape, log_total.dtype)
        trip = _around(comm, k, v, self.lengths)
        # 1. With our own keys and values; what they get stays here.
        own = self._block_backward(*next(trip), dy, dots, dq)
        # 2. With the others'. What they get is sent after them, added to what comes from the left, where they were
        #    before, and which arrives while we compute. The first are the left neighbour's: there nothing comes yet.
        sending: Request | None = None
        for source, there in trip:
            so_far = _both(k, v, self.lengths[source], dq.dtype)
            if sending is not None:
                with comm.step(STEP):
                    receiving = comm.irecv(so_far.flat, left, GRADIENTS)
            given = self._block_backward(source, there, dy, dots, dq)
            with comm.step(STEP):
                if sending is not None:
                    receiving.wait()
                    xp.add(given.flat, so_far.flat, out=given.flat)
                    sending.wait()
                sending = comm.isend(given.flat, right, GRADIENTS)
        # 3. Ours come home.
        home = _both(k, v, self.lengths[comm.rank], dq.dtype)
        with comm.step(STEP):
            comm.recv(home.flat, left, GRADIENTS)
            if sending is not None:
                sending.wait()
        xp.add(own.flat, home.flat, out=own.flat)
        return tuple(x.astype(q.dtype, copy=False) for x in (dq, own.k, own.v))

    def _block_backward(self, source: int, theirs: Both, dy: Array, dots: Array, dq: Array) -> Both:
        """What our queries give to the keys and values of rank `source`; dq is added to."""
        q, k, v, _, log_total = self.saved
        xp = namespace(dy)
        given = _both(k, v, self.lengths[source], dq.dtype)
        given.flat.fill(0)
        queries, keys, masked = self._block(source)
        q, dy = q[:, :, queries], dy[:, :, queries]
        k, v = theirs.k[:, :, keys], theirs.v[:, :, keys]
        if dy.size and v.size:
            p = _scores(q, k, self.scale, masked)
            p -= log_total[:, :, queries]
            p = xp.exp(p, out=p)
            given.v[:, :, keys] = xp.matmul(p.astype(dy.dtype, copy=False).swapaxes(-1, -2), dy)
            ds = wide(xp.matmul(dy, v.swapaxes(-1, -2)))
            ds -= dots[:, :, queries]
            ds *= p
            ds *= self.scale
            ds = ds.astype(dy.dtype, copy=False)
            dq[:, :, queries] += xp.matmul(ds, k)
            given.k[:, :, keys] = xp.matmul(ds.swapaxes(-1, -2), q)
        return given

    def _block(self, source: int) -> Block:
        return block(self.length, self.comm.size, self.comm.rank, source, self.causal)
