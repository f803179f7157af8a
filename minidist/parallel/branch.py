"""Branches: parts of a model that don't need one another, each on a rank of its own (M.1, by module).

                 .-- branch 0, on rank 0 --.
    x, on all ---+-- branch 1, on rank 1 --+--- joined, on all
                 '-- branch 2, on rank 1 --'

Each rank runs its branches while the others run theirs: a step takes as long as the busiest rank, not as all branches
one after another. Backward goes the other way round, as long again.

By default every rank has the inputs and gets every output, so what comes before and after is plain code, the same on
all ranks: so are its gradients. With root=r inputs and outputs, and whatever is before and after, are on rank r alone.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from .. import backend
from ..backend import Array, Shape, namespace
from ..collectives import all_gather, all_reduce, broadcast
from ..comm import Communicator
from ..nn.module import Module, ModuleList, Parameter
from ..ops import cat
from ..tensor import Function, Tensor
from .functions import STEP, copy_to, recv_from, send_to
from .post import HEADER, header_of, read_header
from .stages import balanced
from .whole import handed_round, own_state

JOINS = ("cat", "sum", "mean", "list")
ALIGNED = 64  # bytes: in the buffer of all outputs each begins at a multiple


class Told(NamedTuple):
    """What ranks know of a tensor before it comes: eleven int64."""

    shape: Shape
    dtype: np.dtype
    gradient: bool  # whether one is to go back

    @staticmethod
    def pack(x: Tensor) -> np.ndarray:
        return np.array([1 + x.requires_grad, *header_of(x.data)], np.int64)

    @classmethod
    def unpack(cls, row: np.ndarray) -> Told:
        return cls(*read_header(row[1:]), bool(row[0] == 2))


class Branches(Module):
    """Modules side by side, placed on the ranks of `comm` one by one; their outputs joined.

    join    "cat": one after another along `dim`; "sum" and "mean": of one shape; "list": as they are
    place   of each branch, the rank that holds it, on which it may have company. Without it neighbours stay together,
            and the heaviest rank (in bytes of parameters) is as light as can be. A rank without a branch takes part
    root    None: every rank gives the inputs and has the result. Else rank `root` does alone; the others call it with
            None, and get a 0 to call backward on
    placed  branch -> rank; `branches` has this rank's own, under the names they have on one rank ("branches.1.weight")

    Inputs  one Tensor for all branches, or a list of as many as there are branches, one for each
    Init    all ranks make all branches, from one seed, and let go of those that are placed elsewhere
    Grad    a parameter inside has its gradient on its rank. That of an input is the sum over the branches, on all
            ranks (or the root); 0, and not None, if none of them uses it
    Random  in a forward, each branch draws from a generator of its own, seeded by one number that every rank draws from
            its default generator: masks don't depend on the placement, and ranks stay in step for what follows
    Cost    forward: an all_gather of 88 bytes a branch (outputs may have any shape, and another at every call), and one
            of the outputs; for "sum" and "mean" an all_reduce of one output. Backward: an all_reduce of each input
            that wants a gradient. With a root: 88 bytes a branch more; inputs and outputs as single messages, there
            and, as gradients, back
    Errors  ValueError: no branches, ranks that there are not, parameters shared by branches of two ranks, other numbers
            of inputs than branches, outputs that can't be joined; TypeError: what is no Module or no Tensor
    """

    def __init__(
        self,
        branches: Sequence[Module],
        comm: Communicator,
        join: str = "cat",
        dim: int = 1,
        place: Sequence[int] | None = None,
        root: int | None = None,
    ):
        if not branches:
            raise ValueError("Branches: there must be at least 1 branch, not 0")
        if join not in JOINS:
            raise ValueError(f"Branches: join {join!r}; choose one of {', '.join(JOINS)}")
        for i, branch in enumerate(branches):
            if not isinstance(branch, Module):
                raise TypeError(f"Branches: branch {i} is a {type(branch).__name__}, not a Module")
        if place is None:
            stops = balanced([_nbytes(branch) for branch in branches], comm.size)
            place = [bisect(stops, i) for i in range(len(branches))]
        if len(place) != len(branches) or not all(0 <= rank < comm.size for rank in place):
            raise ValueError(f"Branches: place {[*place]} for {len(branches)} branches on ranks 0 to {comm.size - 1}")
        # M.1 Model partition by module (按模块划分): whole branches on different ranks.
        self.comm, self.join, self.dim = comm, join, dim
        self.root = None if root is None else comm.check_root(root)
        self.placed = dict(enumerate(place))
        self._order = sorted(self.placed, key=lambda i: (self.placed[i], i))  # rank after rank
        _check_apart(branches, self.placed, comm)
        self.names = [_all_names(branch, f"branches.{i}.") for i, branch in enumerate(branches)]
        self.branches = ModuleList()
        for i in self._own(comm.rank):
            setattr(self.branches, str(i), branches[i])

    def _own(self, rank: int) -> list[int]:
        """The branches of a rank."""
        return [i for i, where in self.placed.items() if where == rank]

    def forward(self, inputs: Tensor | Sequence[Tensor] | None) -> Any:
        # 1. Hand the inputs out: to the graph, or to the ranks that have a branch for them.
        xs = self._checked(inputs)
        given, tie = self._from_all(xs) if self.root is None else self._from_root(xs, self.root)
        # 2. M.2(3) of the document: each rank runs its branches, and meanwhile the others run theirs.
        seed, outputs = self._drawn(), {}
        for branch, (i, x) in zip(self.branches, given.items(), strict=True):
            with backend.drawing_from(backend.Generator(seed + i)):
                outputs[i] = branch(x)
            if not isinstance(outputs[i], Tensor):
                raise TypeError(f"Branches: branch {i} gave a {type(outputs[i]).__name__}, not a Tensor")
        # 3. Hand the outputs on, once all ranks know their shapes.
        told = self._told(outputs)
        if self.root is None:
            results = self._to_all(outputs, told, tie, xs[0].device)
        elif self.comm.rank == self.root:
            results = self._at_root(outputs, told, tie, xs[0].device)
        else:
            return self._to_root(outputs, tie, self.root)
        # 4. Join them.
        if self.join == "list":
            return results
        if self.join == "cat":
            return cat(results, self.dim)
        total = sum(results[1:], start=results[0])
        return total if self.join == "sum" else total / len(self.placed)

    def _checked(self, inputs: Any) -> list[Tensor]:
        """One input for all, or one for each; none where the root is another rank."""
        if self.root is not None and self.comm.rank != self.root:
            if inputs is not None:
                raise ValueError(f"Branches: inputs on rank {self.comm.rank}, but they come from rank {self.root}")
            return []
        several = isinstance(inputs, list | tuple)
        xs = [*inputs] if several else [inputs]
        if several and len(xs) != len(self.placed):
            raise ValueError(f"Branches: {len(xs)} inputs for {len(self.placed)} branches")
        for x in xs:
            if not isinstance(x, Tensor):
                raise TypeError(f"Branches: an input is a {type(x).__name__}, not a Tensor")
        return xs

    def _drawn(self) -> int:
        """A number that is the same on all ranks. Evaluation leaves the generator as it is, as it does elsewhere."""
        generator = backend.default_generator().numpy
        return int((generator if self.training else deepcopy(generator)).integers(1 << 62))

    # -- inputs -------------------------------------------------------------------------------------------------

    def _from_all(self, xs: list[Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """Each own branch's input; and a tie to all inputs."""
        entered = [copy_to(x, self.comm) for x in xs]
        given = {i: entered[i if len(xs) > 1 else 0] for i in self._own(self.comm.rank)}
        return given, Tie.apply(_anchor(), *entered, zeros=1)

    def _from_root(self, xs: list[Tensor], root: int) -> tuple[dict[int, Tensor], Tensor]:
        """The same. Input j goes to the ranks that have a branch for it, once each."""
        rows = np.zeros((len(self.placed), 1 + HEADER), np.int64)
        for row, x in zip(rows, xs):
            row[:] = Told.pack(x)
        with self.comm.step(STEP):
            broadcast(self.comm, rows, root)
        told = [Told.unpack(row) for row in rows if row[0]]
        which = [i if len(told) > 1 else 0 for i in self.placed]  # the input of each branch
        own = self._own(self.comm.rank)
        if self.comm.rank == root:
            goes = dict.fromkeys((which[i], rank) for i, rank in self.placed.items() if rank != root)
            sent = [send_to(xs[j], self.comm, rank, tag=j) for j, rank in goes]
            return {i: xs[which[i]] for i in own}, Tie.apply(_anchor(), *sent, zeros=1 + len(sent))
        device = next((p.device for p in self.parameters()), "cpu")
        came = {}
        for j in dict.fromkeys(which[i] for i in own):
            shape, dtype, gradient = told[j]
            came[j] = recv_from(self.comm, root, shape, dtype, tag=j, after=_anchor(gradient), device=device)
        return {i: came[which[i]] for i in own}, Tie.apply(_anchor(), *came.values(), zeros=1)

    # -- outputs ------------------------------------------------------------------------------------------------

    def _told(self, outputs: dict[int, Tensor]) -> list[Told]:
        """What each branch gives, known to all ranks."""
        rows = np.zeros((len(self.placed), 1 + HEADER), np.int64)
        for i, y in outputs.items():
            rows[self._order.index(i)] = Told.pack(y)
        counts = [len(self._own(rank)) * rows.shape[1] for rank in range(self.comm.size)]
        with self.comm.step(STEP):
            all_gather(self.comm, rows, counts=counts)
        told = [Told.unpack(rows[self._order.index(i)]) for i in self.placed]
        if self.join in ("sum", "mean"):
            for i, (shape, dtype, _) in enumerate(told):
                if (shape, dtype) != told[0][:2]:
                    raise ValueError(
                        f"Branches: join {self.join!r} of outputs of one shape and dtype; branch 0 gave "
                        f"{told[0].dtype} {told[0].shape}, branch {i} {dtype} {shape}"
                    )
        return told

    def _to_all(self, outputs: dict[int, Tensor], told: list[Told], tie: Tensor, device: str) -> list[Tensor]:
        """All outputs, or only their sum, on every rank."""
        if self.join in ("sum", "mean"):
            total = backend.full(told[0].shape, 0, told[0].dtype, device)
            for y in outputs.values():
                total += y.data
            with self.comm.step(STEP):
                all_reduce(self.comm, total)
            wanted = any(each.gradient for each in told)
            return [Delivered.apply(tie, *outputs.values(), array=total) if wanted else Tensor(total)]
        return [
            Delivered.apply(tie, outputs.get(i), array=array) if told[i].gradient else Tensor(array)
            for i, array in enumerate(self._gathered(outputs, told, device))
        ]

    def _gathered(self, outputs: dict[int, Tensor], told: list[Told], device: str) -> list[Array]:
        """All outputs: views of one buffer of bytes, rank after rank, so that what a rank has is one chunk."""
        nbytes = [math.prod(each.shape) * each.dtype.itemsize for each in told]
        room = [-(-n // ALIGNED) * ALIGNED for n in nbytes]
        start = dict(zip(self._order, accumulate((room[i] for i in self._order), initial=0)))
        buffer = backend.empty((sum(room),), np.uint8, device)
        arrays = [
            buffer[start[i] : start[i] + nbytes[i]].view(dtype).reshape(shape)
            for i, (shape, dtype, _) in enumerate(told)
        ]
        for i, y in outputs.items():
            arrays[i][...] = y.data
        counts = [sum(room[i] for i in self._own(rank)) for rank in range(self.comm.size)]
        with self.comm.step(STEP):
            all_gather(self.comm, buffer, counts=counts)
        return arrays

    def _to_root(self, outputs: dict[int, Tensor], tie: Tensor, root: int) -> Tensor:
        """Send them there; the 0 stands for what becomes of them."""
        sent = [send_to(y, self.comm, root, tag=i) for i, y in outputs.items()]
        return Tie.apply(tie, *sent, zeros=1 + len(sent))

    def _at_root(self, outputs: dict[int, Tensor], told: list[Told], tie: Tensor, device: str) -> list[Tensor]:
        """All outputs, on the root."""
        results = []
        for i, (shape, dtype, gradient) in enumerate(told):
            y = outputs.get(i)
            if y is None:
                y = recv_from(self.comm, self.placed[i], shape, dtype, i, _anchor(gradient), device)
            results.append(y if dtype.kind in "biu" else Delivered.apply(tie, y, array=y.data))
        return results


# -- the graph: backward comes by every rank's messages --------------------------------------------------------------


class Tie(Function):
    """y = 0. Backward that comes by it comes by all of its inputs, too.

    The first so many inputs are such zeros themselves, of send_to or of a Tie: they pass a 1 on. The gradient of the
    others is 0: they are joined with what the branches give, where there is one, so that every rank takes part in the
    communication behind.
    """

    def forward(self, *xs: Array, zeros: int) -> Array:
        self.like = [(x.shape, x.dtype, backend.device_of(x), int(i < zeros)) for i, x in enumerate(xs)]
        return self.save(np.zeros((), np.float32))

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return tuple(_constant(*like) if need else None for like, need in zip(self.like, self.needs, strict=True))


class Delivered(Function):
    """y = an array, made by communication of this rank's xs, if it has any, and the others'. Each dx = dy"""

    def forward(self, tie: Array, *xs: Array | None, array: Array) -> Array:
        self.save(tie)
        return array

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (np.zeros((), np.float32), *[dy] * (len(self.needs) - 1))


def _anchor(requires_grad: bool = True) -> Tensor:
    """A leaf that is nobody's."""
    return Tensor(np.zeros((), np.float32), requires_grad)


def _constant(shape: tuple[int, ...], dtype: Any, device: str, value: int) -> Array:
    """An array of one value, without the memory for it."""
    one = backend.full((), value, dtype, device)
    return namespace(one).broadcast_to(one, shape)


# -- where branches go -----------------------------------------------------------------------------------------------


def _nbytes(branch: Module) -> int:
    """Of its parameters; 1 for a branch without, so that these are spread too."""
    return sum(p.data.nbytes for p in branch.parameters()) or 1


def _check_apart(branches: Sequence[Module], placed: dict[int, int], comm: Communicator) -> None:
    """Branches of different ranks share no parameters, and none waits for ranks that don't have it."""
    seen: dict[int, tuple[int, str]] = {}
    for i, branch in enumerate(branches):
        for name, p in branch.named_parameters():
            other, first = seen.setdefault(id(p), (i, name))
            if placed[other] != placed[i]:
                raise ValueError(
                    f"Branches: {name} of branch {i} is {first} of branch {other}, but they are on ranks {placed[i]} "
                    f"and {placed[other]}: place={list(placed.values())} must have branches that share on one rank"
                )
        for name, module in branch.named_modules():
            if comm.size > 1 and getattr(module, "comm", None) is comm:
                raise ValueError(
                    f"Branches: in branch {i}, {name or 'the branch'} ({type(module).__name__}) speaks to all ranks, "
                    f"but only rank {placed[i]} has it: give it ranks along another axis of the mesh"
                )


# -- the whole state -------------------------------------------------------------------------------------------------


def _all_names(module: Module, prefix: str = "") -> list[str]:
    """The names of a module's state as on one rank: also of what Branches in it have elsewhere."""
    if isinstance(module, Branches):
        return [prefix + name for branch in module.names for name in branch]
    tensors = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    names = [prefix + n for n, t in tensors.items() if isinstance(t, Parameter) or n in module._buffer_names]
    for name, child in module.named_children():
        names += _all_names(child, f"{prefix}{name}.")
    return names


def whole_state(model: Module) -> dict[str, np.ndarray]:
    """model.state_dict() with the branches of all ranks, on every rank: arrays in host memory. Every rank calls it.

    Cost  the branches' bytes, for each rank
    """
    state = own_state(model)
    # Inner Branches come before those that they are in, which so hand on what is whole.
    for prefix, module in reversed(list(model.named_modules())):
        if isinstance(module, Branches):
            before = prefix + "." if prefix else ""
            layout = [(before + name, module.placed[i]) for i, names in enumerate(module.names) for name in names]
            state |= handed_round(state, module.comm, layout)
    return {name: state[name] for name in _all_names(model)}
