"""Text: one that every Python ships, files, and the loader that deals windows of tokens (see vocabulary.py)."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from .. import backend
from ..backend import Array
from .partition import uniform


def default_text() -> str:
    """The English reference of the Python language, as this Python's `help("assert")` and the like print it.

    The topics in the order of their names. A paragraph that stands under several of them is taken once, where it comes
    first, so that what is held out has not been trained on. Some 380,000 characters, which differ between Pythons.

    Errors  FileNotFoundError: an installation without pydoc's topics
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError("this Python has no pydoc_data.topics, the default text: give a text file") from None
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"


def read_text(path: str | PathLike[str]) -> str:
    """A file of UTF-8.

    Errors  FileNotFoundError; ValueError, naming the file and what is wrong with it: a folder, no UTF-8, no text
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder, not a text file")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return text


def split_text(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """What to train on, and the part at the end that is held out."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}: must be a part between 0 and 1")
    cut = round(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


class TextLoader:
    """This rank's share of every global batch of windows, in an order that changes with the epoch and the seed.

        loader = TextLoader(tokens, context=64, batch_size=12, rank=comm.rank, size=comm.size)
        for inputs, targets in loader.epoch(0):
            ...

    An epoch cuts the tokens into windows side by side; with `shuffle`, from an offset of its own. Within a window the
    targets are the inputs shifted by one: what comes next. `batch_size` counts the windows of all ranks together, which
    are dealt as `partition.uniform` deals samples: batch and seed decide which windows meet in a step, and the number
    of ranks does not. A rank's share may be empty; all ranks take equally many steps. With `drop_last` windows that
    do not fill a batch are left out (with `shuffle`, others in every epoch). len(loader): the steps of an epoch.

    Shapes  tokens (n,) of integers -> a batch of inputs and targets, (share, context) int64 each
    Errors  ValueError: fewer tokens than a window and its last target; fewer windows than the batch that is to be
            filled; those of the partition
    """

    def __init__(
        self,
        tokens: Array,
        context: int,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        device: str = "cpu",
    ):
        self.tokens = backend.asarray(tokens, np.int64, device)
        if self.tokens.ndim != 1:
            raise ValueError(f"tokens of shape {self.tokens.shape}: expected one long row of them")
        if context < 1:
            raise ValueError(f"context {context} is less than 1")
        if len(self.tokens) <= context:
            raise ValueError(f"{len(self.tokens)} tokens: fewer than a window of {context} and the token after it")
        self.context, self.batch_size, self.rank, self.size = context, batch_size, rank, size
        self.seed, self.shuffle, self.drop_last, self.device = seed, shuffle, drop_last, device
        # As many windows as fit; but with offsets up to context - 1, so as many as fit behind the largest.
        n = len(self.tokens)
        self.windows = max(n // context - 1, 1) if shuffle else (n - 1) // context
        if drop_last and self.windows < batch_size:
            raise ValueError(f"{self.windows} windows of {context} tokens do not fill a batch of {batch_size}")
        self.shares(epoch=0)  # refuses bad arguments here, not in the first step

    def __len__(self) -> int:
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> list[int]:
        """How many windows each global batch has, over all ranks: what a rank's share is weighted against."""
        whole, rest = divmod(self.windows, self.batch_size)
        return [self.batch_size] * whole + [rest] * (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int) -> Iterator[tuple[Array, Array]]:
        """Deal all batches of one epoch, counted from 0."""
        within = np.arange(self.context + 1)
        for starts in self.shares(epoch):
            window = self.tokens.take(backend.to(starts[:, None] + within, self.device))
            yield window[:, :-1].copy(), window[:, 1:].copy()

    def shares(self, epoch: int) -> list[np.ndarray]:
        """Where this rank's windows begin, batch by batch."""
        dealt = uniform(self.windows, self.size, self.rank, self.batch_size, self.seed, epoch, self.shuffle)
        offset = 0
        if self.shuffle:  # any that leaves room for all windows and the last target
            spare = len(self.tokens) - self.windows * self.context
            draw = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch, 0)))
            offset = int(draw.integers(min(spare, self.context)))
        return [offset + self.context * share for share in dealt[: len(self)]]
