"""Data: the MNIST files and their reader, the partition over ranks (D.1), the loader. Knows no communicator."""

from . import partition
from .idx import read_idx
from .loader import Loader
from .mnist import mnist, read_mnist

__all__ = ["Loader", "mnist", "partition", "read_idx", "read_mnist"]
