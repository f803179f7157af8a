"""What travels between the stages of a pipeline: activations one way, their gradients the other.

Every link has a tag of its own for each direction; what goes by one is received in the order in which it was sent. A
receiver learns shape and dtype from a header, ten int64, that goes before the first message of a kind; from then on
both sides remember them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

import numpy as np

from .. import backend
from ..backend import Array, Shape
from ..comm import Communicator
from ..comm.base import Request
from .stages import Link

STEP = "M.2(4) combine"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
MOST_DIMS = 8
HEADER = 2 + MOST_DIMS  # int64


class Post:
    """One rank's end of all links. A stage s is on rank s % comm.size."""

    def __init__(self, comm: Communicator, links: list[Link], device: str = "cpu"):
        self.comm, self.links, self.device = comm, links, device
        self._number = {link: i for i, link in enumerate(links)}
        self._told: set[tuple[Link, Hashable]] = set()  # of what kinds the other side knows the shape,
        self._heard: dict[tuple[Link, Hashable], tuple[Shape, np.dtype]] = {}  # and of what kinds this one does
        self._sending: list[Request] = []
        self._coming: dict[tuple[Link, bool], deque[tuple[Array, Request]]] = {}  # begun, and not waited for so far

    def send(self, link: Link, array: Array, kind: Hashable) -> None:
        """Start to send activations to the link's end. Equal kinds have equal shapes and dtypes."""
        dest, tag = link.dest % self.comm.size, 4 * self._number[link]
        if (link, kind) not in self._told:
            self._told.add((link, kind))
            self._start(header_of(array), dest, tag + 2)
        self._start(array, dest, tag)

    def expect(self, link: Link, kind: Hashable) -> None:
        """Begin to receive activations, if their shape is known; `receive` will wait for them."""
        if (link, kind) in self._heard:
            self._begin(link, *self._heard[link, kind])

    def receive(self, link: Link, kind: Hashable) -> Array:
        """Wait for activations."""
        if (link, kind) not in self._heard:
            source, tag = link.source % self.comm.size, 4 * self._number[link] + 2
            with self.comm.step(STEP):
                self._heard[link, kind] = read_header(self.comm.recv(np.empty(HEADER, np.int64), source, tag))
        return self._wait(link, *self._heard[link, kind])

    def send_gradient(self, link: Link, array: Array) -> None:
        """Start to send the gradient of what was received, back."""
        self._start(array, link.source % self.comm.size, 4 * self._number[link] + 1)

    def expect_gradient(self, link: Link, like: Array) -> None:
        """Begin to receive the gradient of what was sent; `receive_gradient` will wait for it."""
        self._begin(link, like.shape, like.dtype, gradient=True)

    def receive_gradient(self, link: Link, like: Array) -> Array:
        """Wait for the gradient of what was sent."""
        return self._wait(link, like.shape, like.dtype, gradient=True)

    def _begin(self, link: Link, shape: Shape, dtype: np.dtype, gradient: bool = False) -> None:
        source = (link.dest if gradient else link.source) % self.comm.size
        array = backend.empty(shape, dtype, self.device)
        with self.comm.step(STEP):
            request = self.comm.irecv(array, source, 4 * self._number[link] + gradient)
        self._coming.setdefault((link, gradient), deque()).append((array, request))

    def _wait(self, link: Link, shape: Shape, dtype: np.dtype, gradient: bool = False) -> Array:
        if not self._coming.get((link, gradient)):
            self._begin(link, shape, dtype, gradient)
        array, request = self._coming[link, gradient].popleft()
        with self.comm.step(STEP):
            request.wait()
        return array

    def finish(self) -> None:
        """Wait until all has been sent."""
        with self.comm.step(STEP):
            for request in self._sending:
                request.wait()
        self._sending.clear()

    def _start(self, array: Array, dest: int, tag: int) -> None:
        # Whoever is done may go, with its array. No wait: the receiver may be waiting for something of ours first.
        self._sending = [request for request in self._sending if not request.test()]
        with self.comm.step(STEP):
            self._sending.append(self.comm.isend(backend.namespace(array).ascontiguousarray(array), dest, tag))


def header_of(array: Array) -> np.ndarray:
    """(dtype, number of dims, dims, 0, …) as int64."""
    if array.ndim > MOST_DIMS or array.dtype.name not in DTYPES:
        raise TypeError(f"an array of {array.dtype} and {array.ndim} dims can't go from rank to rank")
    dims = [*array.shape, *[0] * (MOST_DIMS - array.ndim)]
    return np.array([DTYPES.index(array.dtype.name), array.ndim, *dims], np.int64)


def read_header(header: np.ndarray) -> tuple[Shape, np.dtype]:
    dtype, ndim, *dims = header.tolist()
    return tuple(dims[:ndim]), np.dtype(DTYPES[dtype])
