"""The `device` fixture: a test that takes it runs on every device there is to test.

By default these are the CPU and the stand-in for a GPU (tests/fake_cupy.py), called "cuda" like the real one.
MINIDIST_TEST_DEVICE=cuda runs on the real one instead, MINIDIST_TEST_DEVICE=cpu on the CPU alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import fake_cupy
import pytest

DEVICES = {"": ["cpu", "double"], "cpu": ["cpu"], "cuda": ["cuda"]}[os.environ.get("MINIDIST_TEST_DEVICE", "")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu" or "cuda"."""
    if request.param == "double":
        with fake_cupy.install():
            yield "cuda"
    else:
        yield request.param


@pytest.fixture
def double() -> Iterator[fake_cupy.Transfers]:
    """The stand-in for a GPU, whatever else is tested; gives the counts of copies between host and device."""
    with fake_cupy.install():
        yield fake_cupy.transfers


@pytest.fixture
def gpu() -> Iterator[None]:
    """A GPU, real or the stand-in."""
    if DEVICES == ["cuda"]:
        yield
    else:
        with fake_cupy.install():
            yield
