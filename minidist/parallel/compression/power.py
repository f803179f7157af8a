"""Matrices as products of two thin ones, found by one step of power iteration.

    M = g + e       (a, b): a tensor's gradient, and what earlier steps have left of it
    P = M Q         (a, R), added up over all ranks, and made orthonormal
    Q = M' P        (b, R), added up over all ranks; kept, for the next step's first line
    P Q'            (a, b): what stands for the sum of all M
    e = M - P Q'    with this rank's own Q: what was not sent

Tensors of more than two dims are matrices of their first dim by the rest. Vectors, and matrices for which it would not
pay, travel whole.

Source  Vogels, Karimireddy & Jaggi 2019, "PowerSGD", algorithms 1 and 2
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backend import Array, asarray, full, namespace
from ...collectives import all_reduce
from ...comm import Communicator
from ...nn.flat import FlatBuffer
from .base import Compression


class PowerSGD(Compression):
    """Of rank `rank`.

    Cost  two all-reduces: of R numbers for each row of all matrices, with what travels whole; of R for each column
    """

    def __init__(self, comm: Communicator, flat: FlatBuffer, rank: int):
        super().__init__(comm, flat)
        self.rank, dtype, device = rank, flat.dtype, flat.device
        self.matrices: list[tuple[int, int, int, int]] = []  # start and stop in the buffer, rows, columns
        self.whole: list[tuple[int, int]] = []  # of the others
        for p, (start, stop) in zip(flat.parameters, flat.bounds, strict=True):
            rows = p.shape[0] if p.ndim else 1
            columns = (stop - start) // max(rows, 1)
            if p.ndim > 1 and rank * (rows + columns) < rows * columns:
                self.matrices.append((start, stop, rows, columns))
            else:
                self.whole.append((start, stop))
        self.error = full((flat.size,), 0, dtype, device)
        draw = np.random.default_rng(0)  # the same on all ranks
        self.q = [asarray(draw.standard_normal((b, rank)), dtype, device) for _, _, _, b in self.matrices]

    def add_up(self, gradient: Array) -> None:
        xp = namespace(gradient)
        for start, stop, _, _ in self.matrices:
            gradient[start:stop] += self.error[start:stop]
        m = [gradient[start:stop].reshape(rows, columns) for start, stop, rows, columns in self.matrices]
        # 1. P = M Q, of all matrices in one message; what travels whole comes along.
        products = [matrix @ q for matrix, q in zip(m, self.q)]
        vectors = [gradient[start:stop] for start, stop in self.whole]
        p = self._added_up([*products, *vectors], xp)
        for vector, total in zip(vectors, p[len(m) :]):
            vector[...] = total
        p = [xp.linalg.qr(product)[0] for product in p[: len(m)]]
        # 2. Q = M' P. What P Q' of our own does not tell stays in the memory.
        own = [matrix.T @ product for matrix, product in zip(m, p)]
        for (start, stop, _, _), matrix, product, q in zip(self.matrices, m, p, own):
            self.error[start:stop] = (matrix - product @ q.T).reshape(-1)
        self.q = self._added_up(own, xp)
        # 3. The sum of all.
        for matrix, product, q in zip(m, p, self.q):
            matrix[...] = product @ q.T

    def _added_up(self, arrays: list[Array], xp: Any) -> list[Array]:
        """The sums of arrays over all ranks, in one all-reduce."""
        if not arrays:
            return []
        flat = xp.concatenate([array.reshape(-1) for array in arrays])
        all_reduce(self.comm, flat)
        ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
        return [part.reshape(array.shape) for part, array in zip(xp.split(flat, ends), arrays)]
