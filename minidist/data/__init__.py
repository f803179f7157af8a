"""Data: MNIST's files and their reader, text and vocabularies, the partition over ranks (D.1), loaders.

Knows no communicator.
"""

from . import partition
from .idx import read_idx
from .loader import Loader
from .mnist import mnist, read_mnist
from .text import TextLoader, default_text, read_text, split_text
from .vocabulary import BytePairVocabulary, ByteVocabulary, Vocabulary

__all__ = [
    "BytePairVocabulary",
    "ByteVocabulary",
    "Loader",
    "TextLoader",
    "Vocabulary",
    "default_text",
    "mnist",
    "partition",
    "read_idx",
    "read_mnist",
    "read_text",
    "split_text",
]
