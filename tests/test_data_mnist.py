"""MNIST as it ships with the package, and other data sets in the same four files."""

import gzip
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_data_idx import idx_bytes

import minidist as md
from minidist.data import read_mnist
from minidist.data.mnist import FOLDER, scaled

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 3, 4), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 5 training images of 3 x 4 pixels; images gzip'd, labels not."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    return tmp_path


def test_the_files_are_the_ones_whose_sums_stand_beside_them() -> None:
    rows = re.findall(r"\| (\S+\.gz) \| (\w{64}) \| (\w{64}) \|", (FOLDER / "README.md").read_text("utf-8"))
    assert {name for name, _, _ in rows} == {path.name for path in FOLDER.glob("*.gz")}
    assert len(rows) == 4
    for name, packed, unpacked in rows:
        content = (FOLDER / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == packed, name
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == unpacked, name


@pytest.mark.parametrize("split, count", [("train", 60_000), ("test", 10_000)])
def test_mnist_is_the_real_one(split: str, count: int) -> None:
    images, labels = read_mnist(split)
    assert (images.shape, images.dtype) == ((count, 784), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert np.unique(labels).tolist() == list(range(10))
    first = {"train": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "test": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]}[split]
    assert labels[:10].tolist() == first
    mean = {"train": 0.1307, "test": 0.1325}[split]  # known to everyone who has normalised MNIST
    assert images.mean() / 255 == pytest.approx(mean, abs=5e-5)


def test_mnist_gives_float32_in_0_to_1_and_int64_labels() -> None:
    images, labels = md.data.mnist("test")
    assert (images.shape, images.dtype) == ((10_000, 784), np.float32)
    assert (labels.shape, labels.dtype) == ((10_000,), np.int64)
    assert (images.min(), images.max()) == (0, 1)


def test_scaled_leaves_its_argument_alone_and_maps_all_greys_into_0_to_1() -> None:
    greys = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        got = scaled(greys, dtype)
        np.testing.assert_allclose(got, np.arange(256) / 255, rtol=np.finfo(dtype).eps)
        assert (got[0], got[255], got.dtype) == (0, 1, dtype)
    assert greys.tolist() == list(range(256))


def test_another_data_set_of_any_image_size(folder: Path) -> None:
    images, labels = read_mnist("train", folder)
    np.testing.assert_array_equal(images, IMAGES.reshape(5, 12))
    np.testing.assert_array_equal(labels, LABELS)
    images, _ = md.data.mnist("train", str(folder))
    np.testing.assert_allclose(images, IMAGES.reshape(5, 12) / 255, rtol=1e-6)


def test_a_missing_file_is_named_with_its_folder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds neither t10k-images-idx3-ubyte.gz nor t10k-images"):
        read_mnist("test", folder)


def test_images_and_labels_swapped(folder: Path) -> None:
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte"
    images.write_bytes(gzip.compress(labels.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: holds uint8 of shape \(5,\).*swapped"):
        read_mnist("train", folder)
    images.write_bytes(gzip.compress(idx_bytes(IMAGES)))
    labels.write_bytes(idx_bytes(IMAGES))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: holds uint8 of shape \(5, 3, 4\).*swapped"):
        read_mnist("train", folder)


def test_train_and_test_files_mixed_up(folder: Path) -> None:
    shutil.copy(FOLDER / "t10k-labels-idx1-ubyte.gz", folder / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"holds 5 images, but .*train-labels-idx1-ubyte\.gz 10000 labels"):
        read_mnist("train", folder)


def test_elements_of_another_type_and_no_images(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS.astype(np.int32)))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte: holds int32"):
        read_mnist("train", folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:0]))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(IMAGES[:0])))
    with pytest.raises(ValueError, match="holds no pixel"):
        read_mnist("train", folder)


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="split 'valid' is not one of 'train', 'test'"):
        read_mnist("valid")
