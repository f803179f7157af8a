"""The IDX reader: every element type, and every way in which a file can be wrong."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minidist.data import read_idx

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX file of an array, written here from the definition and not by the code under test."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[array.dtype.name], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
GOOD = idx_bytes(IMAGES)


@pytest.mark.parametrize("name", ["plain-idx3-ubyte", "packed-idx3-ubyte.gz"])
@pytest.mark.parametrize("dtype", CODES)
def test_every_element_type_comes_back_in_this_machines_byte_order(tmp_path: Path, dtype: str, name: str) -> None:
    array = np.array([[1, 2, 100], [3, -4 if dtype != "uint8" else 4, 0]], dtype)
    content = idx_bytes(array)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    got = read_idx(tmp_path / name)

    assert got.dtype == np.dtype(dtype)
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, array)


def test_an_array_without_elements(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(path).shape == (0, 28, 28)


PLAIN = {
    "empty file": (b"", "truncated: expected 4 bytes for the magic number, found 0"),
    "no sizes": (GOOD[:9], "truncated: expected 12 bytes for the sizes of 3 dims, found 5"),
    "truncated": (GOOD[:-5], r"truncated: expected 24 bytes for elements of shape \(2, 3, 4\), found 19"),
    "trailing bytes": (GOOD + b"x", "trailing bytes: more than the 24 bytes"),
    "wrong magic": (b"PK" + GOOD[2:], "not an IDX file: it begins with bytes 50 4b, not 00 00"),
    "gzip'd without the name": (gzip.compress(GOOD), "such a file's name must end in .gz"),
    "unknown element type": (b"\0\0\x0a" + GOOD[3:], "unknown element type 0x0a; IDX has 0x08"),
    "no dims": (b"\0\0\x08\0" + GOOD[4:], "claims 0 dims"),
    "too many dims": (b"\0\0\x08\xff" + GOOD[4:] * 100, "claims 255 dims"),
    "lying header": (b"\0\0\x08\x03" + b"\x80\0\0\0" * 3 + b"pixels", f"expected {2**93} bytes .* found 6"),
    "lying header, no element": (b"\0\0\x08\x03" + b"\xff\xff\xff\xff" * 2 + b"\0\0\0\0", "big|dimension|size"),
}


@pytest.mark.parametrize("content, message", PLAIN.values(), ids=PLAIN)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: .*({message})"):
        read_idx(path)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


PACKED = gzip.compress(GOOD, mtime=0)
GZIPPED = {
    "not gzip": (GOOD, "not gzip, or damaged: Not a gzipped file"),
    "truncated": (PACKED[:-9], "truncated: the gzip'd data break off"),
    "truncated in the checksum": (PACKED[:-3], "truncated: the gzip'd data break off"),
    "wrong checksum": (damaged(PACKED, -8), "not gzip, or damaged: CRC check failed"),
    "corrupt stream": (damaged(PACKED, 12), "not gzip, or damaged|truncated"),
    "truncated before packing": (gzip.compress(GOOD[:-5]), "truncated: expected 24 bytes .* found 19"),
    "trailing bytes": (gzip.compress(GOOD + b"x"), "trailing bytes"),
    "trailing bytes after the stream": (PACKED + b"more", "not gzip, or damaged"),
    "empty file": (b"", "truncated"),
}


@pytest.mark.parametrize("content, message", GZIPPED.values(), ids=GZIPPED)
def test_a_bad_gzipd_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz: .*({message})"):
        read_idx(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gz"):
        read_idx(tmp_path / "nowhere.gz")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, len(GOOD)),
    at=st.integers(0, len(GOOD) - 1),
    byte=st.integers(0, 255),
    packed=st.booleans(),
)
def test_no_damage_gets_past_as_another_error(tmp_path: Path, cut: int, at: int, byte: int, packed: bool) -> None:
    """A byte changed and the end cut off, before packing or after: an array, or a ValueError that names the file."""
    data = PACKED if packed else GOOD
    content = (data[:at] + bytes([byte]) + data[at + 1 :])[:cut]
    path = tmp_path / ("damaged.gz" if packed else "damaged")
    path.write_bytes(content)
    try:
        assert isinstance(read_idx(path), np.ndarray)
    except ValueError as error:
        assert str(path) in str(error)
