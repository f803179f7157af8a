"""How an array is dealt to ranks: contiguous chunks whose sizes differ by at most one, as np.array_split cuts it."""

from __future__ import annotations

from ..backend import Array


def chunk_slice(length: int, ranks: int, rank: int) -> slice:
    """Where chunk `rank` of `ranks` lies in an array of `length` elements; the first length % ranks have one more."""
    size, longer = divmod(length, ranks)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


def split(array: Array, ranks: int) -> list[Array]:
    """All chunks of the flattened array, as views: writing to one writes to `array`.

    Errors  ValueError: the array is not contiguous, so that its flat form would be a copy
    """
    if not array.flags.c_contiguous:
        raise ValueError(f"array of shape {array.shape} and strides {array.strides} is not contiguous in memory")
    flat = array.reshape(-1)
    return [flat[chunk_slice(flat.size, ranks, rank)] for rank in range(ranks)]
