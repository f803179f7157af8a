"""Operations of all ranks together, each by one or more algorithms written over point-to-point messages.

Every rank of the communicator calls the same operation with an array of the same size and dtype. Arrays are NumPy's or
CuPy's, contiguous, of any shape; an operation works on the flattened array, in place. An array's chunks are those of
np.array_split(flat, P), and rank r's chunk is number r; chunk_slice says where that is. So ZeRO needs no copies:

    chunk = reduce_scatter(comm, gradients)                  # a view: this rank's part of the sum
    ...update this rank's part of the parameters...
    all_gather(comm, parameters)                             # everyone gets all parts

A new algorithm is one file and one row of ALGORITHMS.
"""

from .checked import Mismatch
from .chunks import chunk_slice
from .dealing import all_to_all, gather, scatter
from .operations import all_gather, all_reduce, barrier, broadcast, reduce, reduce_scatter, scan
from .reductions import OPS
from .table import ALGORITHMS

__all__ = [
    "ALGORITHMS",
    "OPS",
    "Mismatch",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "chunk_slice",
    "gather",
    "reduce",
    "reduce_scatter",
    "scan",
    "scatter",
]
