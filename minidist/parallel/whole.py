"""The whole state of a model whose parameters are split over ranks and whose layers lie on several: as on one rank.

So a model can be saved from one mesh and loaded onto another, or compared with one that was trained on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from ..collectives import all_gather, all_reduce, broadcast
from ..comm import Communicator
from ..nn import Module, Parameter
from .post import HEADER, header_of, read_header
from .splits import Split


def splits_of(module: Module) -> dict[Parameter, tuple[Split, Communicator]]:
    """How each split parameter is split, and over which ranks: what modules say in their attributes splits and comm."""
    found = {}
    for each in module.modules():
        for name, split in getattr(each, "splits", {}).items():
            p = getattr(each, name)
            if p is not None:
                found[p] = split, vars(each)["comm"]
    return found


def joined(array: Array, split: Split, comm: Communicator) -> Array:
    """All ranks' parts of a split parameter, put together. Every rank of comm calls it."""
    first = np.ascontiguousarray(backend.to_numpy(array).swapaxes(0, split.dim))
    length = int(all_reduce(comm, np.array([len(first)]))[0])
    places = [split.indices(length, comm.size, rank) for rank in range(comm.size)]
    ends = np.cumsum([0, *map(len, places)])
    parts = np.empty((length, *first.shape[1:]), first.dtype)
    parts[ends[comm.rank] : ends[comm.rank + 1]] = first
    row = parts.size // max(length, 1)
    all_gather(comm, parts, counts=[len(p) * row for p in places])
    whole = np.empty_like(parts)
    whole[np.concatenate(places)] = parts
    return np.ascontiguousarray(whole.swapaxes(0, split.dim))


def own_state(module: Module) -> dict[str, np.ndarray]:
    """This rank's state, in host memory; what is split is put together, by all ranks that have a part."""
    splits = splits_of(module)
    own = {}
    for name, tensor in module._named_state(True, True):
        split = splits.get(tensor) if isinstance(tensor, Parameter) else None
        own[name] = np.array(backend.to_numpy(tensor.data)) if split is None else joined(tensor.data, *split)
    return own


def handed_round(own: Mapping[str, np.ndarray], comm: Communicator, layout: list[tuple[str, int]]) -> dict[str, Any]:
    """Arrays by name, each from the rank in comm that has it, on every rank. Every rank calls it."""
    state = {}
    for name, rank in layout:
        here = rank == comm.rank
        header = broadcast(comm, header_of(own[name]) if here else np.empty(HEADER, np.int64), rank)
        state[name] = broadcast(comm, own[name] if here else np.empty(*read_header(header)), rank)
    return state


def gather_state(module: Module, comm: Communicator, layout: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """The whole state, on every rank: arrays in host memory, by the names of one rank. Every rank calls it.

    module  this rank's layers, whose parameters may be split over other communicators
    layout  the name of everything in the whole model's state, and the rank in comm that has it

    Cost    the model's bytes, for each rank
    """
    return handed_round(own_state(module), comm, layout)


def load_state(module: Module, state: Mapping[str, Any]) -> None:
    """Take over this rank's part of a whole state, in place.

    Errors  KeyError: names that are missing; ValueError: another shape
    """
    splits = splits_of(module)
    mine = {}
    for name, tensor in module._named_state(True, True):
        split = splits.get(tensor) if isinstance(tensor, Parameter) else None
        array = np.asarray(state[name])
        mine[name] = array if split is None else split[0].slice(array, split[1].size, split[1].rank)
    module.load_state_dict(mine)
