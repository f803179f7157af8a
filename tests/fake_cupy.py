"""A stand-in for CuPy on machines without a GPU: the same strictness, none of the hardware.

`install()` puts a module into sys.modules["cupy"] for a while. Its arrays keep their values in NumPy, but behave like
CuPy's where a program written and tested on NumPy would go wrong on its first GPU:

* nothing turns into a NumPy array by itself: `np.asarray(x)`, `np.sin(x)` and `x + numpy_array` raise TypeError
  (CuPy itself lets `np.sin(x)` pass; here it is refused, for the program should have asked for x's own library)
* what exists is what CuPy 14 has: names and parameters are listed below, everything else raises
* reductions and `x[0]` give arrays of no dims, never Python or NumPy numbers; there is no `__index__`
* every copy between host and device is counted in `transfers`, the implicit ones of `float(x)` and `if x:` too
"""

from __future__ import annotations

import contextlib
import operator
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Transfers:
    """Copies between host and device since the last `reset`."""

    to_device: int = 0
    to_host: int = 0

    def reset(self) -> None:
        self.to_device = self.to_host = 0


transfers = Transfers()
module = types.ModuleType("cupy", "a stand-in for CuPy; see tests/fake_cupy.py")
_devices = {"count": 1, "current": 0}


@contextlib.contextmanager
def install(devices: int = 1) -> Iterator[types.ModuleType]:
    """Within it `import cupy` gives the stand-in, with this number of GPUs (0: CuPy without a GPU)."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = module
    _devices.update(count=devices, current=0)
    transfers.reset()
    try:
        yield module
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


# -- in and out of the wrapper --------------------------------------------------------------------------------------


def _enter(value: Any) -> Any:
    """What a CuPy function is given, with the wrapped arrays taken out. NumPy arrays are refused."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(_enter(v) for v in value)
    return value


def _leave(value: Any, *known: Any) -> Any:
    """A result, wrapped; the very object where it is one of the arrays that went in."""
    for array in known:
        if isinstance(array, ndarray) and array._host is value:
            return array
    if isinstance(value, np.ndarray | np.generic):
        return ndarray._wrap(np.asarray(value))
    if isinstance(value, list | tuple):
        return type(value)(_leave(v, *known) for v in value)
    return value


def _strict(name: str, function: Callable[..., Any], parameters: list[str]) -> Callable[..., Any]:
    """`function` for wrapped arrays, with no parameters but CuPy's."""
    names = [p.lstrip("*") for p in parameters]
    anything = any(p.startswith("*") for p in parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = [key for key in kwargs if key not in names] if not any(p.startswith("**") for p in parameters) else []
        if unknown or (len(args) > len(names) and not anything):
            raise TypeError(f"cupy.{name} takes {', '.join(parameters)}; it was given {len(args)} and {sorted(kwargs)}")
        if kwargs.get("kind") not in (None, "stable"):
            raise ValueError(f"cupy.{name}: kind can only be None or 'stable'")
        entered = {key: _enter(value) for key, value in kwargs.items()}
        return _leave(function(*_enter(args), **entered), *args, *kwargs.values())

    call.__name__ = name
    return call


# -- the array ------------------------------------------------------------------------------------------------------


class ndarray:
    """cupy.ndarray. Made by the functions of the module, never directly."""

    __slots__ = ("__weakref__", "_device", "_host")
    __hash__ = None  # type: ignore[assignment]
    _host: np.ndarray

    @classmethod
    def _wrap(cls, host: np.ndarray) -> ndarray:
        self = object.__new__(cls)
        self._host = host
        self._device = _devices["current"]
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError("make arrays with cupy.empty and its like")

    # What NumPy would call to convert it, or to compute with it.
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called on a GPU array: use namespace(x).{function.__name__}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # np.float32(2) * x gets here as well, and is fine.
        if method == "__call__" and len(inputs) == 2 and isinstance(inputs[0], np.generic) and not kwargs:
            return _leave(ufunc(*_enter(inputs)))
        raise TypeError(f"numpy.{ufunc.__name__} was called on a GPU array: use namespace(x).{ufunc.__name__}")

    # Attributes.
    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    T = property(lambda self: _leave(self._host.T))
    mT = property(lambda self: _leave(self._host.swapaxes(-1, -2)))
    real = property(lambda self: _leave(self._host.real, self))
    imag = property(lambda self: _leave(self._host.imag))
    data = property(lambda self: types.SimpleNamespace(ptr=self._host.ctypes.data))
    device = property(lambda self: Device(self._device))

    @property
    def base(self) -> Any:
        return _leave(self._host.base)

    @property
    def flags(self) -> Any:
        flags = self._host.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata
        )

    # To the host: every one of these waits for the GPU.
    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        transfers.to_host += 1
        if out is None:
            return self._host.copy(order)
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        if (out.dtype, out.shape) != (self.dtype, self.shape):
            raise ValueError(f"shape and dtype mismatch: {out.shape} {out.dtype} for {self.shape} {self.dtype}")
        np.copyto(out, self._host)
        return out

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    # From the host.
    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise (TypeError if arr.dtype != self.dtype else ValueError)(
                f"cannot set {arr.shape} {arr.dtype} to {self.shape} {self.dtype}"
            )
        transfers.to_device += 1
        self._host[...] = arr

    # Indexing.
    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return _leave(self._host[_enter(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_enter(index)] = _enter(value)

    # Python passes all of these on to the type, so they must be there by name; the rest is set below.
    def __matmul__(self, other: Any) -> Any:
        return _binary("matmul")(self, other)

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> Any:
        return _leave(self._host.reshape(*shape, order=order), self)

    def transpose(self, *axes: Any) -> Any:
        return _leave(self._host.transpose(*axes))

    def view(self, dtype: Any = None, type: Any = None) -> Any:
        return _leave(self._host.view() if dtype is None else self._host.view(dtype))

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Any:
        return _leave(self._host.astype(dtype, order, copy=copy), self)


def _binary(name: str, reflected: bool = False) -> Callable[[ndarray, Any], Any]:
    function = getattr(operator, name)

    def method(self: ndarray, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            raise TypeError(f"Unsupported type {type(other)}")
        if not isinstance(other, ndarray | np.generic | bool | int | float | complex):
            return NotImplemented
        a, b = _enter(self), _enter(other)
        return _leave(function(b, a) if reflected else function(a, b), self)

    return method


for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
]:
    _function = {"and": "and_", "or": "or_"}.get(_name, _name)
    setattr(ndarray, f"__{_name}__", _binary(_function))
    setattr(ndarray, f"__r{_name}__", _binary(_function, reflected=True))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _binary(f"i{_name}"))
for _name in ["eq", "ne", "lt", "le", "gt", "ge"]:
    setattr(ndarray, f"__{_name}__", _binary(_name))
for _name, _unary in [("neg", operator.neg), ("pos", operator.pos), ("abs", abs), ("invert", operator.invert)]:
    setattr(ndarray, f"__{_name}__", lambda self, function=_unary: _leave(function(self._host)))

# Methods and their parameters (reshape, transpose, view and astype stand above).
METHODS = """
all(axis, out, keepdims); any(axis, out, keepdims); argmax(axis, out, dtype, keepdims);
argmin(axis, out, dtype, keepdims); argsort(axis, kind); clip(min, max, out); compress(condition, axis, out);
conj(); copy(order); cumprod(axis, dtype, out); cumsum(axis, dtype, out); diagonal(offset, axis1, axis2);
dot(b, out); fill(value); flatten(order); max(axis, out, keepdims); mean(axis, dtype, out, keepdims);
min(axis, out, keepdims); nonzero(); prod(axis, dtype, out, keepdims); ravel(order); repeat(repeats, axis);
round(decimals, out); searchsorted(v, side, sorter); sort(axis, kind); squeeze(axis);
std(axis, dtype, out, ddof, keepdims); sum(axis, dtype, out, keepdims); swapaxes(axis1, axis2);
take(indices, axis, out); trace(offset, axis1, axis2, dtype, out); var(axis, dtype, out, ddof, keepdims)
"""

# Functions and their parameters, read off CuPy 14.2 with inspect.signature.
FUNCTIONS = """
all(a, axis, out, keepdims); allclose(a, b, rtol, atol, equal_nan); any(a, axis, out, keepdims);
arange(start, stop, step, dtype); argmax(a, axis, dtype, out, keepdims); argmin(a, axis, dtype, out, keepdims);
argsort(a, axis, kind); argwhere(a); array_equal(a1, a2, equal_nan); array_split(ary, indices_or_sections, axis);
ascontiguousarray(a, dtype); atleast_1d(*arys); bincount(x, weights, minlength); broadcast_arrays(*args);
broadcast_to(array, shape); clip(a, a_min, a_max, out); concatenate(tup, axis, out, dtype, casting); copy(a, order);
copyto(dst, src, casting, where); count_nonzero(a, axis); cumprod(a, axis, dtype, out); cumsum(a, axis, dtype, out);
diag(v, k); diagonal(a, offset, axis1, axis2); diff(a, n, axis, prepend, append); dot(a, b, out);
einsum(*operands, **kwargs); empty(shape, dtype, order); empty_like(prototype, dtype, order, subok, shape);
expand_dims(a, axis); eye(N, M, k, dtype, order); flatnonzero(a); flip(a, axis);
full(shape, fill_value, dtype, order); full_like(a, fill_value, dtype, order, subok, shape);
hstack(tup, dtype, casting); identity(n, dtype); inner(a, b); isclose(a, b, rtol, atol, equal_nan);
linspace(start, stop, num, endpoint, retstep, dtype, axis); max(a, axis, out, keepdims);
amax(a, axis, out, keepdims); mean(a, axis, dtype, out, keepdims); min(a, axis, out, keepdims);
amin(a, axis, out, keepdims); moveaxis(a, source, destination); may_share_memory(a, b, max_work);
nan_to_num(x, copy, nan, posinf, neginf); nonzero(a); ones(shape, dtype, order);
ones_like(a, dtype, order, subok, shape); outer(a, b, out); pad(array, pad_width, mode, **kwargs);
partition(a, kth, axis); prod(a, axis, dtype, out, keepdims); put_along_axis(arr, indices, values, axis);
ravel(a, order); repeat(a, repeats, axis); reshape(a, newshape, order, copy); roll(a, shift, axis);
searchsorted(a, v, side, sorter); shares_memory(a, b, max_work); sort(a, axis, kind);
split(ary, indices_or_sections, axis); squeeze(a, axis); stack(tup, axis, out, dtype, casting);
std(a, axis, dtype, out, ddof, keepdims); sum(a, axis, dtype, out, keepdims); swapaxes(a, axis1, axis2);
take(a, indices, axis, out); take_along_axis(a, indices, axis); tensordot(a, b, axes); tile(A, reps);
trace(a, offset, axis1, axis2, dtype, out); transpose(a, axes); tri(N, M, k, dtype); tril(m, k); triu(m, k);
unique(ar, return_index, return_inverse, return_counts, axis, equal_nan); var(a, axis, dtype, out, ddof, keepdims);
vdot(a, b); vstack(tup, dtype, casting); where(condition, x, y); zeros(shape, dtype, order);
zeros_like(a, dtype, order, subok, shape)
"""

# Element-wise functions: they take out=, dtype= and casting=, and no where=.
UFUNCS = """
abs absolute add arccos arcsin arctan arctan2 bitwise_and bitwise_or bitwise_xor cbrt ceil conj copysign cos cosh
divide equal exp exp2 expm1 floor floor_divide fmax fmin greater greater_equal heaviside hypot invert isfinite isinf
isnan less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor matmul maximum
minimum mod multiply negative not_equal positive power reciprocal remainder rint sign signbit sin sinh sqrt square
subtract tan tanh true_divide trunc
"""

# What CuPy borrows from NumPy as it is.
SAME = """
bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 generic
floating integer dtype finfo iinfo inf nan pi e newaxis promote_types issubdtype broadcast_shapes
"""


def _listed(table: str) -> Iterator[tuple[str, list[str]]]:
    for entry in table.replace("\n", " ").split(";"):
        name, _, parameters = entry.strip().rstrip(")").partition("(")
        yield name, [p.strip() for p in parameters.split(",") if p.strip()]


def _method(name: str, parameters: list[str]) -> Callable[..., Any]:
    function = _strict(f"ndarray.{name}", getattr(np.ndarray, name), ["self", *parameters])
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


class _Ufunc:
    """An element-wise function. Of the methods NumPy's have, CuPy's `add` has these."""

    def __init__(self, name: str):
        self.__name__, self._numpy = name, getattr(np, name)
        parameters = [f"x{i}" for i in range(self._numpy.nin)] + ["out", "dtype", "casting"]
        self._call = _strict(name, self._numpy, parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, ndarray) for a in (*args, kwargs.get("out"))):
            _enter(args)  # refuses NumPy arrays
        return self._call(*args, **kwargs)

    def at(self, a: ndarray, indices: Any, b: Any) -> None:
        kinds = ("int32", "float16", "float32", "float64", "uint32", "uint64", "complex64", "complex128")
        if self.__name__ != "add" or str(a.dtype) not in kinds:
            raise TypeError(f"cupy.{self.__name__}.at does not take {a.dtype}")
        self._numpy.at(a._host, _enter(indices), _enter(b))


def as_strided(x: ndarray, shape: Any = None, strides: Any = None) -> ndarray:
    return _leave(np.lib.stride_tricks.as_strided(x._host, shape, strides))


def sliding_window_view(x: ndarray, window_shape: Any, axis: Any = None) -> ndarray:
    return _leave(np.lib.stride_tricks.sliding_window_view(x._host, window_shape, axis))


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, copy: bool | None = None, blocking: bool = False
) -> ndarray:
    """An array on the device: the same where it is one, else a copy of host data (a transfer)."""
    if isinstance(a, ndarray):
        return _leave(np.asarray(a._host, dtype), a)
    if isinstance(a, list | tuple) and any(isinstance(v, ndarray) for v in a):
        return module.stack([asarray(v, dtype) for v in a])
    transfers.to_device += 1
    return ndarray._wrap(np.array(a, dtype))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    return asarray(obj, dtype).copy() if isinstance(obj, ndarray) else asarray(obj, dtype)


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(out=out) if isinstance(a, ndarray) else np.asarray(a)


def result_type(*values: Any) -> np.dtype[Any]:
    return np.result_type(*_enter(values))


# -- devices --------------------------------------------------------------------------------------------------------


class Device:
    """cupy.cuda.Device: makes a GPU the current one, by `use` or for a `with` block."""

    def __init__(self, device: int | None = None):
        self.id = _devices["current"] if device is None else device

    def use(self) -> None:
        if not 0 <= self.id < _devices["count"]:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _devices["current"] = self.id

    def __enter__(self) -> Device:
        self._before = _devices["current"]
        self.use()
        return self

    def __exit__(self, *exc: object) -> None:
        _devices["current"] = self._before

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def synchronize(self) -> None:
        pass


def _count() -> int:
    if _devices["count"] == 0:
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    return _devices["count"]


_stream = types.SimpleNamespace(synchronize=lambda: None, ptr=0)

module.__dict__.update(
    {name: getattr(np, name) for name in SAME.split()},
    ndarray=ndarray,
    asarray=asarray,
    array=array,
    asnumpy=asnumpy,
    result_type=result_type,
    lib=types.SimpleNamespace(
        stride_tricks=types.SimpleNamespace(as_strided=as_strided, sliding_window_view=sliding_window_view)
    ),
    linalg=types.SimpleNamespace(norm=_strict("linalg.norm", np.linalg.norm, ["x", "ord", "axis", "keepdims"])),
    cuda=types.SimpleNamespace(
        Device=Device,
        alloc_pinned_memory=bytearray,
        get_current_stream=lambda: _stream,
        get_device_id=lambda: _devices["current"],
        is_available=lambda: _devices["count"] > 0,
        runtime=types.SimpleNamespace(getDeviceCount=_count),
    ),
    __version__="14.2.0",
)
for _name, _parameters in _listed(FUNCTIONS):
    setattr(module, _name, _strict(_name, getattr(np, _name), _parameters))
for _name in UFUNCS.split():
    setattr(module, _name, _Ufunc(_name))
for _name, _parameters in _listed(METHODS):
    setattr(ndarray, _name, _method(_name, _parameters))
