"""The IDX file format: an array of any number of dims in a dozen bytes of header.

    bytes 0, 1    zero
    byte  2       the type of an element (TYPES below)
    byte  3       the number of dims, d
    d x 4 bytes   the size of each dim, unsigned
    the rest      the elements, last dim fastest; every number in the file is big-endian

Source  LeCun, Cortes & Burges, "The MNIST database of handwritten digits", which ends with this definition
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMS = 64  # NumPy's own limit
PIECE = 1 << 20  # bytes read at a time


def read_idx(path: str | PathLike[str]) -> np.ndarray:
    """Read an IDX file, gzip'd if its name ends in .gz, as an array of this machine's byte order.

    Memory  the array, and an eighth of it while reading, whatever the header claims
    Errors  FileNotFoundError; ValueError, naming the file and what is wrong with it
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _parse(file)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not gzip, or damaged: {error}") from None
    except EOFError:
        raise ValueError(f"{path}: truncated: the gzip'd data break off before their end") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(file: io.BufferedIOBase) -> np.ndarray:
    """The array that an open IDX file holds. Raises ValueError with what is wrong."""
    # 1. The magic number: two zero bytes, the element type, the number of dims.
    magic = _read(file, 4, "the magic number")
    zeros, code, dims = magic[:2], magic[2], magic[3]
    if zeros != b"\0\0":
        hint = "; it looks gzip'd, and such a file's name must end in .gz" if zeros == b"\x1f\x8b" else ""
        raise ValueError(f"not an IDX file: it begins with bytes {zeros.hex(' ')}, not 00 00{hint}")
    if code not in TYPES:
        raise ValueError(f"unknown element type 0x{code:02x}; IDX has {', '.join(f'0x{known:02x}' for known in TYPES)}")
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"the header claims {dims} dims; 1 to {MAX_DIMS} can be read")

    # 2. The size of each dim.
    shape = struct.unpack(f">{dims}I", _read(file, 4 * dims, f"the sizes of {dims} dims"))

    # 3. The elements, and nothing after them.
    dtype = np.dtype(TYPES[code])
    elements = _read(file, prod(shape) * dtype.itemsize, f"elements of shape {shape}")
    if file.read(1):
        raise ValueError(f"trailing bytes: more than the {len(elements)} bytes that shape {shape} needs")
    array = np.frombuffer(elements, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read(file: io.BufferedIOBase, count: int, what: str) -> bytearray:
    """Exactly `count` bytes. They are read piece by piece, so that a header that lies cannot make us reserve memory."""
    data = bytearray()
    while len(data) < count:
        piece = file.read(min(PIECE, count - len(data)))
        if not piece:
            raise ValueError(f"truncated: expected {count} bytes for {what}, found {len(data)}")
        data += piece
    return data
