"""A mixture of experts: many MLPs of which each token goes through the few that a router chooses for it.

Experts are dealt to the ranks of the mesh's axis ep, tokens travel to their experts and back:

    rank 0   tokens --router--> rows by expert --+-- all_to_all --> experts 0, 1 -- all_to_all --+--> weighted sums
    rank 1   tokens --router--> rows by expert --+                  experts 2, 3                 +--> weighted sums

A rank of ep has tokens of its own, as one of dp has; only the experts are split.

Sources  Lepikhin et al. 2020, "GShard"; Fedus, Zoph & Shazeer 2021, "Switch transformers", section 2
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from .. import backend
from ..backend import Array, Shape, namespace
from ..collectives import all_reduce, chunk_slice
from ..collectives import all_to_all as exchange
from ..comm import Communicator
from ..nn import Linear, Module, Parameter, init
from ..nn import functional as F
from ..ops import gather
from ..ops.common import cast, wide
from ..tensor import Function, Tensor
from .functions import STEP, all_to_all
from .pieces import pieces, side_by_side, turned
from .splits import Split

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class MixtureOfExperts(Module):
    """y = Σ over the top_k experts e of token x:  gate_e (w2_e · act(w1_e · x + b1_e) + b2_e)

    Router    p = softmax(router · x); the top_k largest are chosen. Their gates are p over their sum, or p itself for
              top_k = 1. Ties go to the first. Gradients come to the router through the gates only
    Capacity  an expert takes at most ceil(capacity_factor * top_k * tokens / num_experts) of each rank's tokens: first
              come, first served, in the order of tokens, all first choices before all second ones. Who is left out gets
              0 from this expert. None: no limit. The limit counts a rank's own tokens; so as long as nothing is dropped
              the result is that of one rank, whatever the number of ranks
    Experts   dealt as np.array_split would: rank r of comm holds E_r of them. Drawn whole, so that all ranks hold
              exactly the weights that one rank would

    Shapes  x (..., dim) -> (..., dim); as many tokens as a rank likes, also none
    router.weight  (num_experts, dim), the same on all ranks
    w1, b1         (E_r, hidden, dim), (E_r, hidden), uniform within 1 / sqrt(dim)
    w2, b2         (E_r, dim, hidden), (E_r, dim), uniform within 1 / sqrt(hidden)

    auxiliary_loss  after a forward: num_experts Σ_e f_e P_e, 1 if all is even; the caller adds a little of it to its
                    loss. f_e is e's share of the choices of all ranks of `tokens`, P_e the mean of p_e over this rank's
                    own tokens: since f has no gradient, the mean over ranks, weighted by their tokens as their losses
                    are, is what one rank would have, and so is its gradient. Each microbatch has one of its own
    dropped         after a forward: the share of this rank's choices that found no room
    tokens          all ranks with tokens of their own (dp, cp and ep); comm if not given

    Gradients  An expert hears from the losses of all ranks of comm, and takes the mean of what they say. What is left
               is to average it over the ranks that hold the same experts, and all else over all ranks with tokens
    Cost    with n bytes of rows here, top_k for each token: forward two all_to_alls of (P-1)/P n bytes if choices are
            even, one of 8 E bytes to tell how many come, and an all_reduce of 8 (E + 1) bytes; backward two large ones
    Errors  ValueError: fewer experts than ranks, top_k experts that there are not, a capacity_factor of 0 or less, an
            unknown activation, x of another width
    Source  Lepikhin et al. 2020, algorithm 1 (not its random second expert); Fedus et al. 2021, equations 4 to 6. The
            probabilities are float32 at least (section 2.4 there)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        comm: Communicator,
        top_k: int = 2,
        capacity_factor: float | None = 1.25,
        activation: str = "gelu",
        tokens: Communicator | None = None,
    ):
        if num_experts < comm.size:
            raise ValueError(f"MixtureOfExperts: {num_experts} experts for {comm.size} ranks; each needs one")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MixtureOfExperts: top_k={top_k} of {num_experts} experts")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"MixtureOfExperts: capacity_factor={capacity_factor}; expected a number above 0, or None")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MixtureOfExperts: activation={activation!r}; choose {', '.join(ACTIVATIONS)}")
        self.dim, self.num_experts, self.top_k, self.capacity_factor = dim, num_experts, top_k, capacity_factor
        self.activation, self.comm, self.tokens = activation, comm, comm if tokens is None else tokens
        self.lengths = [len(range(num_experts)[chunk_slice(num_experts, comm.size, r)]) for r in range(comm.size)]
        self.router = Linear(dim, num_experts, bias=False)
        self.w1 = self._drawn(1 / math.sqrt(dim), hidden, dim)
        self.b1 = self._drawn(1 / math.sqrt(dim), hidden)
        self.w2 = self._drawn(1 / math.sqrt(hidden), dim, hidden)
        self.b2 = self._drawn(1 / math.sqrt(hidden), dim)
        self.splits = {name: Split(0) for name in ("w1", "b1", "w2", "b2")}
        self.auxiliary_loss: Tensor | None = None
        self.dropped = 0.0

    def _drawn(self, bound: float, *shape: int) -> Parameter:
        """This rank's experts' chunk of a parameter of all experts, uniform within the bound."""
        whole = init.uniform_(Tensor(backend.empty((self.num_experts, *shape))), -bound, bound)
        return Parameter(whole.data[chunk_slice(self.num_experts, self.comm.size, self.comm.rank)].copy())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"MixtureOfExperts: x has {x.shape[-1]} channels, the layer {self.dim}")
        rows = x.reshape(-1, self.dim)
        # 1. Each token chooses its experts; those that have room take it.
        logits = self.router(rows)
        p = F.softmax(cast(logits, wide(logits.data[:0]).dtype), -1)
        chosen = largest(p.data, self.top_k)
        gates = gather(p, 1, Tensor(chosen))
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        plan = assign(chosen, self.num_experts, self._capacity(len(rows)))
        self.auxiliary_loss = self._balance(p, plan.wanted)
        self.dropped = int((plan.wanted - plan.counts).sum()) / max(chosen.size, 1)
        # 2. To the experts' ranks; there from the order of ranks to that of experts.
        sends = [int(plan.counts[mine].sum()) for mine in side_by_side(self.lengths)]
        counts = self._told(plan.counts)
        comes = counts.sum(axis=1).tolist()
        sent = Dispatch.apply(rows, tokens=plan.tokens, rounds=plan.rounds)
        came = all_to_all(sent, self.comm, 0, 0, lengths=sends, out_lengths=comes)
        by_expert = pieces(came, 0, turned(counts))
        # 3. The experts at work.
        bounds = [0, *accumulate(counts.sum(axis=0).tolist())]
        hidden = ACTIVATIONS[self.activation](self._linear(by_expert, self.w1, self.b1, bounds))
        out = self._linear(hidden, self.w2, self.b2, bounds)
        # 4. The same way back.
        back = all_to_all(pieces(out, 0, turned(counts.T)), self.comm, 0, 0, lengths=comes, out_lengths=sends)
        return Combine.apply(back, cast(gates, x.dtype), tokens=plan.tokens, rounds=plan.rounds).reshape(x.shape)

    def _capacity(self, tokens: int) -> int:
        """How many of this rank's tokens an expert takes at most."""
        if self.capacity_factor is None:
            return tokens
        return math.ceil(self.capacity_factor * self.top_k * tokens / self.num_experts)

    def _balance(self, p: Tensor, wanted: np.ndarray) -> Tensor:
        """The auxiliary loss, from this rank's probabilities (N, E) and how often it chose each expert."""
        total = np.append(wanted, len(p))
        with self.tokens.step(STEP):
            all_reduce(self.tokens, total)
        f = backend.asarray(total[:-1] / max(self.top_k * total[-1], 1), p.dtype, p.device)
        return (p.sum(0) * Tensor(f)).sum() * (self.num_experts / max(len(p), 1))

    def _told(self, counts: np.ndarray) -> np.ndarray:
        """(P, E_r): how many rows come from each rank for each of our experts, when all have told what goes where."""
        ours = self.lengths[self.comm.rank]
        came = np.empty((self.comm.size, ours), counts.dtype)
        with self.comm.step(STEP):
            exchange(self.comm, counts, came, counts=self.lengths, out_counts=[ours] * self.comm.size)
        return came

    def _linear(self, x: Tensor, w: Tensor, b: Tensor, bounds: list[int]) -> Tensor:
        return GroupedLinear.apply(x, w, b, bounds=bounds, ranks=self.comm.size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, here={len(self.w1)}"


# -- who goes where ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which choices are granted. They make up the rows that are sent, in the order of experts.

    tokens  (R,) whose row it is
    rounds  for each of the k choices, which rows are such: no token is twice in one of them
    counts  (E,) how many rows each expert gets, in host memory
    wanted  (E,) how many it was chosen for
    """

    tokens: Array
    rounds: list[Array]
    counts: np.ndarray
    wanted: np.ndarray


def largest(p: Array, k: int) -> Array:
    """Where the k largest of each row are, largest first; the first of equal ones first.   p (N, E) -> (N, k)"""
    xp = namespace(p)
    left, rows = p.copy(), xp.arange(len(p))
    chosen = xp.empty((len(p), k), np.int64)
    for choice in range(k):
        chosen[:, choice] = left.argmax(axis=1)
        left[rows, chosen[:, choice]] = -1  # less than any probability
    return chosen


def assign(chosen: Array, num_experts: int, capacity: int) -> Plan:
    """Give each expert the first `capacity` of those that chose it.   chosen (N, k): experts, by each token's liking"""
    xp = namespace(chosen)
    n, k = chosen.shape
    # 1. All first choices, then all second ones; put in the order of experts, else as they are.
    experts = chosen.T.reshape(-1)
    order = (experts * experts.size + xp.arange(experts.size)).argsort()
    wanted = xp.bincount(experts, minlength=num_experts)
    # 2. The places within each expert's run; those up to the capacity are granted.
    place = xp.arange(experts.size) - (wanted.cumsum() - wanted)[experts[order]]
    kept = order[place < capacity]
    rounds = [xp.flatnonzero(kept // n == choice) for choice in range(k)]
    wanted = backend.to_numpy(wanted)
    return Plan(kept % n, rounds, np.minimum(wanted, capacity), wanted)


# -- on rows -----------------------------------------------------------------------------------------------------------


class Dispatch(Function):
    """y = x[tokens]: a row for each choice granted.   dx = the sum of dy over a token's rows, in the order of rounds"""

    def forward(self, x: Array, tokens: Array, rounds: list[Array]) -> Array:
        self.shape, self.tokens, self.rounds = x.shape, tokens, rounds
        return x[tokens]

    def backward(self, dy: Array) -> tuple[Array]:
        dx = namespace(dy).zeros(self.shape, dy.dtype)
        for rows in self.rounds:
            dx[self.tokens[rows]] += dy[rows]
        return (dx,)


class Combine(Function):
    """y[t] = Σ over t's rows r, of choice c:  g[t, c] x[r].   x (R, C), g (N, k) -> y (N, C)

    dx[r] = g[t, c] dy[t],   dg[t, c] = <dy[t], x[r]>, 0 where nothing was granted
    """

    def forward(self, x: Array, g: Array, tokens: Array, rounds: list[Array]) -> Array:
        self.tokens, self.rounds = tokens, rounds
        self.save(x, g)
        y = namespace(x).zeros((len(g), x.shape[1]), x.dtype)
        for choice, rows in enumerate(rounds):
            whose = tokens[rows]
            y[whose] += g[whose, choice, None] * x[rows]
        return y

    def backward(self, dy: Array) -> tuple[Array, Array]:
        x, g = self.saved
        xp = namespace(dy)
        dx, dg = xp.empty_like(x), xp.zeros_like(g)
        for choice, rows in enumerate(self.rounds):
            whose = self.tokens[rows]
            dx[rows] = g[whose, choice, None] * dy[whose]
            dg[whose, choice] = xp.einsum("rc,rc->r", dy[whose], x[rows])
        return dx, dg


class GroupedLinear(Function):
    """y[i:j] = x[i:j] @ w[e].T + b[e], where i and j are bounds e and e + 1.   x (R, I), w (E, O, I), b (E, O)

    dx[i:j] = dy[i:j] @ w[e]
    dw[e]   = dy[i:j].T @ x[i:j] / ranks, whose losses these are; so with db
    """

    def forward(self, x: Array, w: Array, b: Array, bounds: list[int], ranks: int) -> Array:
        self.bounds, self.ranks = bounds, ranks
        self.save(x, w)
        xp = namespace(x)
        y = xp.empty((len(x), w.shape[1]), x.dtype)
        for e, (i, j) in enumerate(pairwise(bounds)):
            xp.matmul(x[i:j], w[e].T, out=y[i:j])
            y[i:j] += b[e]
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, w = self.saved
        xp = namespace(dy)
        share = dy / self.ranks
        dx, dw, db = (self._room(i, shape, dy) for i, shape in enumerate((x.shape, w.shape, w.shape[:2])))
        for e, (i, j) in enumerate(pairwise(self.bounds)):
            if dx is not None:
                xp.matmul(dy[i:j], w[e], out=dx[i:j])
            if dw is not None:
                xp.matmul(share[i:j].T, x[i:j], out=dw[e])
            if db is not None:
                share[i:j].sum(axis=0, out=db[e])
        return dx, dw, db

    def _room(self, i: int, shape: Shape, like: Array) -> Array | None:
        """Where the gradient of input i goes; None if it is not wanted."""
        if not self.needs[i]:
            return None
        return namespace(like).empty(shape, like.dtype) if self.into[i] is None else self.into[i]
