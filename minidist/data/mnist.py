"""MNIST, and any data set published as the same four files (Fashion-MNIST, KMNIST, ...).

The files lie beside this module, in mnist/, with a note on where they come from.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array
from .idx import read_idx

FOLDER = Path(__file__).parent / "mnist"
PREFIXES = {"train": "train", "test": "t10k"}


def mnist(split: str, directory: str | PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of `split` ("train" or "test"), ready to use: 4 bytes a pixel.

    Shapes  images (n, pixels) float32 in [0, 1]; labels (n,) int64
    Errors  those of `read_mnist`
    """
    images, labels = read_mnist(split, directory)
    return scaled(images), labels


def read_mnist(split: str, directory: str | PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of `split` as the files hold them: 1 byte a pixel, which `Loader` scales batch by batch.

    `directory` holds the four files of another data set, gzip'd or not; by default MNIST's own are read.

    Shapes  images (n, pixels) uint8, one row an image; labels (n,) int64
    Errors  FileNotFoundError; ValueError naming the file and what is wrong with it
    """
    if split not in PREFIXES:
        raise ValueError(f"split {split!r} is not one of {', '.join(map(repr, PREFIXES))}")
    folder = FOLDER if directory is None else Path(directory)
    images_path = _find(folder, f"{PREFIXES[split]}-images-idx3-ubyte")
    labels_path = _find(folder, f"{PREFIXES[split]}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    _expect(images_path, images, 3, "images (count, rows, columns)")
    _expect(labels_path, labels, 1, "labels (count,)")
    if len(images) != len(labels):
        raise ValueError(f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels")
    if not images.size:
        raise ValueError(f"{images_path}: shape {images.shape} holds no pixel at all")
    return images.reshape(len(images), -1), labels.astype(np.int64)


def scaled(pixels: Array, dtype: Any = np.float32) -> Array:
    """Pixels 0 .. 255 as numbers in [0, 1]; a new array of the same shape, on the same device."""
    numbers = pixels.astype(dtype)
    numbers *= 1 / 255  # a product, which takes half the time of a quotient
    return numbers


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name}.gz nor {name}")


def _expect(path: Path, array: np.ndarray, ndim: int, what: str) -> None:
    if array.ndim != ndim or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: holds {array.dtype} of shape {array.shape}, where {what} of uint8 are expected; "
            "are images and labels swapped?"
        )
