"""Is the stand-in for CuPy as strict as it should be, and does it count? Where CuPy itself is installed: as CuPy."""

from __future__ import annotations

import importlib.util
import inspect
import operator
from typing import Any

import fake_cupy
import numpy as np
import pytest

from minidist import backend

cp = fake_cupy.module


@pytest.fixture
def x(double: Any) -> Any:
    return cp.asarray(np.arange(6.0).reshape(2, 3))


REFUSED = {
    "conversion": lambda x: np.asarray(x),
    "numpy function": lambda x: np.concatenate([x, x]),
    "numpy ufunc": lambda x: np.exp(x),
    "numpy operand": lambda x: x + np.ones(3),
    "numpy operand on the left": lambda x: np.ones(3) * x,
    "numpy operand in place": lambda x: operator.iadd(x, np.ones(3)),
    "numpy argument": lambda x: cp.maximum(x, np.ones(3)),
    "numpy arguments only": lambda x: cp.exp(np.ones(3)),
    "numpy among several": lambda x: cp.concatenate([x, np.ones((1, 3))]),
    "assigning numpy": lambda x: operator.setitem(x, 0, np.ones(3)),
    "numpy index": lambda x: x[np.array([0, 1])],
    "as an index": lambda x: [1, 2, 3][cp.asarray(1)],
    "where= of a ufunc": lambda x: cp.exp(x, where=x > 0),
    "where= of a reduction": lambda x: x.sum(where=x > 0),
    "initial= of a reduction": lambda x: cp.max(x, initial=0),
    "unhashable": lambda x: {x},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_array_refuses(x: Any, what: str) -> None:
    with pytest.raises(TypeError):
        REFUSED[what](x)


def test_what_cupy_lacks_is_lacking(x: Any) -> None:
    for name in ("nditer", "errstate", "block", "vecdot", "ma"):
        assert not hasattr(cp, name)
    assert not hasattr(x, "ctypes")


def test_results_are_arrays_even_of_one_number(x: Any) -> None:
    for y in (x.sum(), x[0, 0], x.max(axis=None), cp.mean(x), np.float32(2) * x[0, 0], x.argmax()):
        assert isinstance(y, cp.ndarray)
        assert y.shape == ()


def test_in_place_keeps_the_object_and_out_returns_it(x: Any) -> None:
    y = x
    y += 1
    assert y is x
    assert cp.add(x, 1, out=x) is x
    assert x.sum(axis=0, out=(out := cp.zeros(3))) is out
    x[0].fill(7)  # a view
    assert x.get()[0].tolist() == [7, 7, 7]


def test_copies_between_host_and_device_are_counted(double: Any) -> None:
    x = cp.zeros(3)
    x += 1
    assert (double.to_device, double.to_host) == (0, 0)
    cp.asarray([1.0, 2.0])
    x.set(np.ones(3))
    assert double.to_device == 2
    for look in (lambda: x.get(), lambda: x[0].item(), lambda: bool(x[0]), lambda: float(x[0]), lambda: cp.asnumpy(x)):
        double.reset()
        look()
        assert double.to_host == 1


def test_the_backend_moves_arrays_and_finds_devices() -> None:
    with fake_cupy.install(devices=2):
        assert backend.choose("auto", host_rank=3) == "cuda:1"
        backend.use("cuda:1")
        x = backend.to(np.arange(3.0), "cuda")
        assert backend.device_of(x) == "cuda:1"
        assert backend.device_of(backend.to(np.arange(3.0), "cuda:0")) == "cuda:0"
        pinned = backend.pinned_like(x)
        backend.copy_into(pinned, x)
        assert pinned.tolist() == [0, 1, 2]
        backend.copy_into(x, pinned[::-1].copy())
        assert backend.to_numpy(x).tolist() == [2, 1, 0]
        with pytest.raises(backend.DeviceError, match="2 GPUs"):
            backend.choose("cuda:2")
    with fake_cupy.install(devices=0):
        assert backend.choose("auto") == "cpu"
        with pytest.raises(backend.DeviceError, match="no usable GPU"):
            backend.choose("cuda")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_every_name_and_parameter_is_cupys() -> None:
    import cupy

    for table, owner in ((fake_cupy.FUNCTIONS, cupy), (fake_cupy.METHODS, cupy.ndarray)):
        for name, parameters in fake_cupy._listed(table):
            assert hasattr(owner, name), name
            if table is fake_cupy.FUNCTIONS:
                real = {p.name for p in inspect.signature(getattr(cupy, name)).parameters.values()}
                assert {p.lstrip("*") for p in parameters} <= real, name
            else:
                signature = getattr(cupy.ndarray, name).__doc__.splitlines()[0]
                assert all(p in signature for p in parameters), name
    for name in fake_cupy.UFUNCS.split():
        assert callable(getattr(cupy, name)), name
    for name in fake_cupy.SAME.split():
        assert hasattr(cupy, name), name
