"""How a strategy starts: what does not go together is refused, and all ranks begin with the same parameters."""

from __future__ import annotations

from ..collectives import ALGORITHMS, broadcast
from ..comm import Communicator
from ..nn import Module
from ..optim import Optimizer
from .compression import Make, compression_of


def check_algorithm(algorithm: str, *operations: str) -> None:
    """Raise ValueError if one of the operations has no such algorithm."""
    for operation in operations:
        if algorithm not in ("auto", *ALGORITHMS[operation]):
            raise ValueError(f"algorithm {algorithm!r}: {operation} has auto, {', '.join(ALGORITHMS[operation])}")


def check_options(
    ranks: int, zero: int, algorithm: str, compress: str | None, bucket_bytes: int | None, reproducible: int | None
) -> Make | None:
    """Raise ValueError where options of data_parallel do not go together; returns what makes the compressions."""
    if zero not in (0, 1, 2, 3):
        stages = "0 (nothing sharded), 1 (the optimizer's state), 2 (gradients too) or 3 (parameters too)"
        raise ValueError(f"zero={zero}: choose {stages}")
    check_algorithm(algorithm, *(("reduce_scatter", "all_gather") if zero else ("all_reduce",)))
    make = None if compress is None else compression_of(compress)
    if bucket_bytes is not None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes}: less than 1")
        if make is not None:
            raise ValueError(
                f"bucket_bytes={bucket_bytes} with compress={compress!r}, which takes all gradients at once"
            )
        if zero == 3:
            raise ValueError(f"bucket_bytes={bucket_bytes} with zero=3, which goes layer by layer")
    if reproducible is not None:
        if make is not None:
            raise ValueError(
                f"reproducible={reproducible} with compress={compress!r}: what is left out depends on the rank"
            )
        if bucket_bytes is not None:
            raise ValueError(
                f"reproducible={reproducible} with bucket_bytes={bucket_bytes}: gradients travel at the end"
            )
        if zero > 1:
            raise ValueError(f"reproducible={reproducible} with zero={zero}: it keeps whole gradients of microbatches")
        if reproducible < ranks:
            raise ValueError(f"reproducible={reproducible} microbatches for {ranks} ranks: some would have none")
    return make


def start_alike(model: Module, optimizer: Optimizer, comm: Communicator) -> None:
    """D.3(1) Initialise the parameters: every rank starts from rank 0's, and its buffers.

    Errors  ValueError: the optimizer lacks trained parameters
    """
    known = {p for part in optimizer.parts for p in part.flat.parameters}
    rest = {name: p for name, p in model.named_parameters() if p not in known}
    lost = [name for name, p in rest.items() if p.requires_grad]
    if lost:
        raise ValueError(f"the optimizer lacks parameters that the model trains: {', '.join(lost)}")
    with comm.step("D.3(1) initialise"):
        for part in optimizer.parts:
            broadcast(comm, part.flat.data)
            part.flat.changed()
        for tensor in [*rest.values(), *(buffer for _, buffer in model.named_buffers())]:
            broadcast(comm, tensor.data)
