"""MPI's own collectives, for the algorithm "mpi": what collectives/library.py gets from Communicator.native."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .base import Request
from .mpi import MPI, MpiCommunicator, MpiRequest

# op: MPI's for numbers, and for truth values, whose sum is NumPy's. The logical ones are of C's integers only, there.
NATIVE_OPS = {
    "sum": (MPI.SUM, MPI.LOR, "iufcb"),
    "mean": (MPI.SUM, MPI.LOR, "fc"),
    "prod": (MPI.PROD, MPI.LAND, "iufcb"),
    "min": (MPI.MIN, MPI.LAND, "iufb"),
    "max": (MPI.MAX, MPI.LOR, "iufb"),
    "logical_and": (MPI.LAND, MPI.LAND, "iub"),
    "logical_or": (MPI.LOR, MPI.LOR, "iub"),
    "logical_xor": (MPI.LXOR, MPI.LXOR, "iub"),
    "bitwise_and": (MPI.BAND, MPI.LAND, "iub"),
    "bitwise_or": (MPI.BOR, MPI.LOR, "iub"),
    "bitwise_xor": (MPI.BXOR, MPI.LXOR, "iub"),
}


class Native:
    """MPI's non-blocking collectives for arrays like one, and for one op; see `Communicator.native`."""

    def __init__(self, comm: MpiCommunicator, array: Array, op: str | None):
        self.comm, self.mpi = comm, comm.mpi
        if backend.on_gpu(array):
            raise TypeError("algorithm 'mpi' takes arrays in host memory; choose another for an array on a GPU")
        kind = array.dtype.kind
        try:
            self.type = MPI.Datatype.fromcode(array.dtype.char if array.dtype.isnative else "")
        except (KeyError, ValueError):
            raise TypeError(f"algorithm 'mpi': MPI has no type for {array.dtype}; choose another") from None
        if op is not None:
            for_numbers, for_truth, kinds = NATIVE_OPS[op]
            if kind not in kinds:
                raise TypeError(f"algorithm 'mpi': MPI has no op {op!r} of {array.dtype}; choose another")
            self.op = for_truth if kind == "b" else for_numbers

    def all_reduce(self, array: Array) -> Request:
        return self._request("Iallreduce", array, MPI.IN_PLACE, self._of(array), self.op)

    def reduce_scatter(self, array: Array, out: Array, counts: list[int]) -> Request:
        return self._request("Ireduce_scatter", array, self._of(array), self._of(out), counts, self.op)

    def all_gather(self, array: Array, counts: list[int]) -> Request:
        return self._request("Iallgatherv", array, MPI.IN_PLACE, self._of(array, counts))

    def broadcast(self, array: Array, root: int) -> Request:
        return self._request("Ibcast", array, self._of(array), root)

    def reduce(self, array: Array, root: int) -> Request:
        buffers = (MPI.IN_PLACE, self._of(array)) if self.comm.rank == root else (self._of(array), None)
        return self._request("Ireduce", array, *buffers, self.op, root)

    def scatter(self, array: Array, counts: list[int], out: Array, root: int) -> Request:
        dealt = self._of(array, counts) if self.comm.rank == root else None
        return self._request("Iscatterv", out, dealt, self._of(out), root)

    def gather(self, array: Array, out: Array, counts: list[int], root: int) -> Request:
        collected = self._of(out, counts) if self.comm.rank == root else None
        return self._request("Igatherv", array, self._of(array), collected, root)

    def all_to_all(self, array: Array, counts: list[int], out: Array, out_counts: list[int]) -> Request:
        return self._request("Ialltoallv", array, self._of(array, counts), self._of(out, out_counts))

    def scan(self, array: Array, out: Array, exclusive: bool) -> Request:
        return self._request("Iexscan" if exclusive else "Iscan", array, self._of(array), self._of(out), self.op)

    def barrier(self) -> Request:
        return self._request("Ibarrier", np.empty(0, np.uint8))

    def _of(self, array: Array, counts: list[int] | None = None) -> list[Any]:
        return [array, self.type] if counts is None else [array, counts, None, self.type]

    def _request(self, name: str, array: Array, *arguments: Any) -> Request:
        return NativeRequest(self.comm, getattr(self.mpi, name)(*arguments), array, name)


class NativeRequest(MpiRequest):
    """One of MPI's own collectives, started. It keeps the arrays alive that MPI was given."""

    __slots__ = ("name",)

    def __init__(self, comm: MpiCommunicator, request: MPI.Request, array: Array, name: str):
        super().__init__(comm, request, array, comm.rank, 0, False)
        self.name = name

    def peers(self) -> list[int]:
        return [member for rank, member in enumerate(self.comm.members) if rank != self.comm.rank] or self.comm.members

    def __str__(self) -> str:
        return f"MPI_{self.name}, {self.array.nbytes} bytes"
