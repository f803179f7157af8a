"""What the doctor asks of processes of their own, for opening MPI or CUDA changes a process, and may end it.

    python -m minidist.doctor.inside library | ring | gpu | gpu-ring

Each writes one line of JSON. `ring` is started by a launcher, on 2 ranks or more.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ELEMENTS = 1 << 18  # of the arrays that go round: 1 MiB of float32
ROUNDS = 5


def library() -> dict[str, Any]:
    """Which MPI library mpi4py loads, without opening it (MPI4PY_RC_INITIALIZE=0 is set by who asks).

    description  the library's own
    path         of its file, "" where the system does not tell
    error        why there is none instead; `missing`: whether mpi4py itself is
    """
    try:
        from ..comm.mpi import MPI
    except Exception as error:  # ImportError; RuntimeError of mpi4py where no library can be loaded
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mpi4py"
        return {"error": " ".join(str(error).split()), "missing": missing}
    return {"description": MPI.Get_library_version().rstrip("\0"), "path": _file_of(MPI.__file__, "MPI_Get_version")}


def _file_of(module: str, symbol: str) -> str:
    """The file that holds a function which a loaded extension module uses: what dladdr says of its address."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    info = Info()
    try:
        address = ctypes.cast(getattr(ctypes.CDLL(module), symbol), ctypes.c_void_p)
        found = ctypes.CDLL(None).dladdr(address, ctypes.byref(info))
    except (AttributeError, OSError):
        return ""
    return info.file.decode() if found and info.file else ""


def ring(device: str = "cpu") -> dict[str, Any]:
    """All-reduce an array around a ring of all ranks, and compare it with the sum.

    seconds  of the slowest of ROUNDS, on the slowest rank
    right    whether all numbers are, on all ranks
    """
    import numpy as np

    from .. import backend
    from ..collectives import all_reduce
    from ..comm import world

    comm = world()
    slowest, right = 0.0, True
    for number in range(ROUNDS):
        mine = np.arange(ELEMENTS, dtype=np.float32) % 1000 + comm.rank + number
        sum_of_all = (np.arange(ELEMENTS) % 1000 + number) * comm.size + sum(range(comm.size))
        array = backend.to(mine, device)
        start = comm.clock()
        all_reduce(comm, array, algorithm="ring")
        slowest = max(slowest, comm.clock() - start)
        right &= bool((backend.to_numpy(array) == sum_of_all).all())
    worst = all_reduce(comm, np.array([slowest, not right]), op="max")
    from ..comm.mpi import _cuda_aware

    found = {"ranks": comm.size, "seconds": float(worst[0]), "right": not worst[1], "cuda_aware": _cuda_aware()}
    return found if comm.rank == 0 else {}


def gpu() -> dict[str, Any]:
    """How many GPUs CuPy can use, and whether a product on one of them is right; or why not."""
    import numpy as np

    from .. import backend

    try:
        count = backend.gpu_count() or backend.cupy().cuda.runtime.getDeviceCount()
        start = time.perf_counter()
        x = backend.to(np.arange(64.0, dtype=np.float32).reshape(8, 8), "cuda")
        right = bool(np.array_equal(backend.to_numpy(x @ x), backend.to_numpy(x) @ backend.to_numpy(x)))
    except Exception as error:  # CuPy raises many kinds, where libraries of CUDA are missing too
        return {"error": " ".join(str(error).split())[:300]}
    return {"count": count, "right": right, "seconds": time.perf_counter() - start}


QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "library": library,
    "ring": ring,
    "gpu": gpu,
    "gpu-ring": lambda: ring("cuda"),
}

if __name__ == "__main__":
    answer = QUESTIONS[sys.argv[1]]()
    if answer:
        print(json.dumps(answer), flush=True)
