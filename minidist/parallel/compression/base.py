"""What a compression is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...backend import Array
from ...comm import Communicator
from ...nn.flat import FlatBuffer


class Compression(ABC):
    """How the gradients of one flat buffer are added up over the ranks in fewer bytes.

    Every rank makes one and calls `add_up` once a step. Error memory is this rank's own, and lost with the object.
    """

    def __init__(self, comm: Communicator, flat: FlatBuffer):
        self.comm, self.flat = comm, flat

    @abstractmethod
    def add_up(self, gradient: Array) -> None:
        """Put the sum over all ranks, or what is sent of it, in the place of this rank's gradient (n,).

        All ranks end with the same bits.
        """
