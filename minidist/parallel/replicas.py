"""Whether all ranks still hold the same parameters, to the last bit."""

from __future__ import annotations

import hashlib

import numpy as np

from .. import backend
from ..collectives import all_gather
from ..comm import Communicator
from ..nn import Module


class ReplicasDisagree(AssertionError):
    """Ranks that should hold equal parameters do not."""


def assert_replicas_agree(model: Module, comm: Communicator) -> None:
    """Compare every rank's parameters and buffers with rank 0's, bit by bit. Every rank calls it.

    What travels are digests (BLAKE2b, 8 bytes each): n tensors cost n * 8 * (P-1) bytes a rank in P - 1 messages.

    Errors  ReplicasDisagree, on every rank: names the first tensor that differs, and the ranks
    """
    state = model.state_dict()
    digests = np.zeros((comm.size, len(state)), np.int64)
    digests[comm.rank] = [_digest(array) for array in state.values()]
    all_gather(comm, digests)
    differs = digests != digests[0]
    if differs.any():
        first = int(differs.any(axis=0).argmax())
        ranks = ", ".join(map(str, np.flatnonzero(differs[:, first])))
        raise ReplicasDisagree(f"{list(state)[first]} on rank {ranks} is not what it is on rank 0")


def _digest(array: backend.Array) -> int:
    content = np.ascontiguousarray(backend.to_numpy(array))
    return int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "little", signed=True)
