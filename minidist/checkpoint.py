"""Checkpoints: a state_dict in one safetensors file, which PyTorch and others read and write too.

Source  the safetensors format: a length, a JSON header of names, dtypes, shapes and offsets, then the bytes of the
        arrays. Nothing in it is executed when it is read, unlike a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from .backend import Array, to_numpy


def save(path: str | PathLike[str], state: Mapping[str, Array]) -> None:
    """Write arrays by name. The file appears whole or not at all: an earlier one stays until the new one is complete.

    Call it on one rank only.

    dtype   kept
    Errors  FileNotFoundError: the folder does not exist. ValueError: the path is a folder's or a device's, the
            disk is full, or a dtype safetensors lacks
    """
    from safetensors import SafetensorError  # here, so that a program that saves nothing starts without it
    from safetensors.numpy import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a folder; or a device, such as /dev/null, which a file must not replace
        raise ValueError(f"cannot save {path}: it exists and is not a file")
    # C.2 Software platform: names and layouts are PyTorch's, so that it reads these files, and we read its own.
    # safetensors takes an array's bytes as they lie in memory, so each must be contiguous.
    arrays = {name: np.asarray(to_numpy(array), order="C") for name, array in state.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # of any new file of this user; safetensors lets nobody else read what it writes
        save_file(arrays, partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except SafetensorError as error:
        raise ValueError(f"cannot save {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """Read a safetensors file: its arrays by name, in host memory, the caller's to change.

    Errors  FileNotFoundError; ValueError, naming the file and what is wrong with it
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"cannot load {path}: there is no such file")
    try:
        arrays = load_file(path)
        for array in arrays.values():
            if array.dtype.kind == "V":  # ml_dtypes is at hand, and has taught NumPy such a type
                raise TypeError(f"data type {array.dtype.name!r} is none of NumPy's own")
        return arrays
    except SafetensorError as error:
        raise ValueError(f"cannot load {path}: truncated, or not a safetensors file: {error}") from None
    except TypeError as error:  # bfloat16 and 8-bit floats, which PyTorch has and NumPy has not
        raise ValueError(f"cannot load {path}: {error}") from None
