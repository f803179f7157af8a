"""NumPy or CuPy behind one name: devices, moving arrays, random numbers.

The rest of minidist asks this module which library an array belongs to and never names CuPy itself:

    xp = backend.namespace(x)        # numpy or cupy
    y = xp.maximum(x, 0)

Devices are strings: "cpu", "cuda" (this process's current GPU) or "cuda:1". CuPy is imported the first time a GPU is
asked for, so a machine without one pays nothing for it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np

# Memory that is let go of is to stay with the process. By default glibc gives large blocks back to the system and takes
# them anew, page by page, at every operation: a tenth of a training step of a small network. Where a block of almost
# 32 MiB was freed once, it keeps blocks up to that size, and up to 64 MiB of what is free. (Not where the user has set
# MALLOC_*, nor with other C libraries.) The block is never touched, so it takes no memory.
np.empty(2**25 - 2**16, np.uint8)

Array = Any  # numpy.ndarray or cupy.ndarray; the two share no base class
Shape = tuple[int, ...]


class DeviceError(RuntimeError):
    """A device was asked for that this machine or installation cannot give. The message is one line."""


# -- which library ------------------------------------------------------------------------------------------------

OF_NUMPY = np.ndarray | np.generic  # made once: it is asked for at every operation


def cupy() -> ModuleType:
    """The CuPy module. Raises DeviceError, with what to install, where it is missing or sees no GPU."""
    try:
        import cupy as cp
    except ImportError:
        raise DeviceError(
            "device cuda: CuPy is not installed; for CUDA 12: pip install 'minidist[cuda12]', "
            "for CUDA 13: pip install 'minidist[cuda13]'"
        ) from None
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except Exception as error:  # cupy raises CUDARuntimeError, and others where the driver itself is missing
        raise DeviceError(
            f"device cuda: CuPy finds no usable GPU ({str(error).splitlines()[0]}); install an NVIDIA driver that fits "
            "CuPy's CUDA version, or use --device cpu"
        ) from None
    if count == 0:
        raise DeviceError("device cuda: CuPy is installed but this machine has no GPU; use --device cpu")
    return cp


def namespace(array: Array) -> Any:
    """The module whose functions work on this array: numpy, or cupy for an array on a GPU."""
    if isinstance(array, OF_NUMPY):
        return np
    if on_gpu(array):
        return sys.modules["cupy"]  # without cupy()'s checks, which every operation would repeat
    raise TypeError(f"{type(array).__name__} is not an array of NumPy or CuPy")


def is_array(value: object) -> bool:
    """Whether `value` is an array (of either library), as against a number or a list."""
    return isinstance(value, OF_NUMPY) or on_gpu(value)


def on_gpu(value: object) -> bool:
    """Whether `value` is a CuPy array. Imports nothing: without CuPy in the process there are none."""
    module = sys.modules.get("cupy")
    return module is not None and isinstance(value, module.ndarray)


# -- devices ------------------------------------------------------------------------------------------------------


def gpu_count() -> int:
    """GPUs that CuPy can use here; 0 without CuPy, without a driver or without a GPU."""
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return 0
    try:
        return int(cupy().cuda.runtime.getDeviceCount())
    except DeviceError:
        return 0


def choose(device: str = "auto", host_rank: int = 0) -> str:
    """Turn what a user typed (auto, cpu, cuda or cuda:N) into "cpu" or "cuda:N".

    `host_rank` is the caller's rank among the ranks of its host: with `auto` and `cuda` rank r takes GPU r, counting
    round again where there are more ranks than GPUs. Raises DeviceError.
    """
    # C.1 Hardware: a GPU where there is one, else the CPU; the same program runs on either.
    if device == "auto":
        device = "cuda" if gpu_count() else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise DeviceError(f"unknown device {device!r}; choose auto, cpu, cuda or cuda:N")
    count = int(cupy().cuda.runtime.getDeviceCount())
    chosen = int(index) if index else host_rank % count
    if chosen >= count:
        raise DeviceError(f"device {device}: this machine has {count} GPU{'s' * (count > 1)}, numbered from 0")
    return f"cuda:{chosen}"


def is_device(target: object) -> bool:
    """Whether an argument of `to` names a device, as against a dtype."""
    return isinstance(target, str) and target.partition(":")[0] in ("cpu", "cuda")


def use(device: str) -> None:
    """Make a GPU (as `choose` names it) this process's current one: what "cuda" means from now on."""
    if device.startswith("cuda"):
        cupy().cuda.Device(int(choose(device)[5:])).use()


def device_of(array: Array) -> str:
    """Where an array lives: "cpu" or "cuda:N"."""
    return f"cuda:{array.device.id}" if on_gpu(array) else "cpu"


def _entered(device: str) -> AbstractContextManager[Any]:
    """A context in which new CuPy arrays land on `device`."""
    _, _, index = device.partition(":")
    return cupy().cuda.Device(int(index)) if index else nullcontext()


def synchronize() -> None:
    """Wait until the GPU has done everything asked of it, if there is one in use. For clocks and for messages."""
    if "cupy" in sys.modules and gpu_count():
        cupy().cuda.get_current_stream().synchronize()


# -- moving arrays ------------------------------------------------------------------------------------------------


def asarray(data: Any, dtype: Any = None, device: str | None = None) -> Array:
    """`data` (numbers, lists, or an array of either library) as an array, on `device` if one is named.

    No copy is made where the data are already such an array. Python floats become float32 (rule 6).
    """
    if not is_array(data):
        data = np.asarray(data)
        if dtype is None and data.dtype == np.float64:
            dtype = np.float32
    elif isinstance(data, np.generic):
        data = np.asarray(data)
    if dtype is not None and data.dtype != dtype:
        data = data.astype(dtype)
    return data if device is None else to(data, device)


def empty(shape: Shape, dtype: Any = np.float32, device: str = "cpu") -> Array:
    """Uninitialised memory. On CPU it begins on a cache line (64 bytes): NumPy's own often begins 16 bytes off, and
    with 512-bit registers every access then touches two lines (measured: 32 Ki float32 added in 3.3 µs, not 6.6).
    """
    if device != "cpu":
        with _entered(device):
            return cupy().empty(shape, dtype)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def full(shape: Shape, value: Any, dtype: Any = np.float32, device: str = "cpu") -> Array:
    """An array of one value."""
    array = empty(shape, dtype, device)
    array.fill(value)
    return array


class Absent(np.ndarray):
    """What a parameter's array is while the array itself is elsewhere: of its shape and dtype, and without memory."""

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise, whatever is asked of it."""
        raise RuntimeError(
            "a sharded parameter (zero=3) is used outside of its module's forward: call the module that owns it; or "
            "let all parameters be there for a while: `with network.whole():`, on every rank"
        )

    __array_ufunc__ = __array_function__ = __getitem__ = copy = tolist = item = refuse


def absent(shape: Shape, dtype: Any = np.float32, device: str = "cpu") -> Array:
    """The place of an array that is not there. On CPU every calculation with it raises; on a GPU it is all nan."""
    if device != "cpu":
        one = full((), math.nan, dtype, device)
        return namespace(one).broadcast_to(one, shape)
    return np.broadcast_to(np.array(math.nan, dtype), shape).view(Absent)


def to(array: Array, device: str) -> Array:
    """`array` on `device`; the same array where it is there already."""
    if device == "cpu":
        return to_numpy(array)
    device = choose(device) if ":" in device else device
    if on_gpu(array) and device in ("cuda", device_of(array)):
        return array
    with _entered(device):
        return cupy().asarray(array)


def to_numpy(array: Array) -> np.ndarray:
    """`array` in host memory: itself if it is a NumPy array, a copy if it is a CuPy one (waits for the GPU)."""
    if isinstance(array, Absent):
        array.refuse()
    return cupy().asnumpy(array) if on_gpu(array) else np.asarray(array)


def pinned_like(array: Array) -> np.ndarray:
    """Uninitialised page-locked host memory of a GPU array's shape and dtype: what a GPU copies to and from fastest."""
    memory = cupy().cuda.alloc_pinned_memory(max(array.nbytes, 1))
    return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)


def copy_into(target: Array, source: Array) -> None:
    """Copy `source` into `target`, of equal shape and dtype, whichever side each is on; done when it returns."""
    if on_gpu(target):
        target.set(source) if not on_gpu(source) else target.__setitem__(..., source)
    elif on_gpu(source):
        source.get(out=target)
    else:
        np.copyto(target, source)


# -- random numbers -----------------------------------------------------------------------------------------------


class Generator:
    """A seeded stream of random numbers, the same on every device: drawn on the host, then moved.

    That costs a GPU a copy, and buys that one seed gives one result everywhere.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._numpy = np.random.Generator(np.random.PCG64(seed))

    @property
    def numpy(self) -> np.random.Generator:
        """NumPy's generator, which all numbers come from."""
        for draws in _draws.get():
            draws.before.setdefault(self, self._numpy.bit_generator.state)
        return self._numpy

    def uniform(self, low: float, high: float, shape: Shape, dtype: Any = np.float32, device: str = "cpu") -> Array:
        """Uniform in [low, high)."""
        drawn = self.numpy.random(shape, dtype=np.float64 if np.dtype(dtype) == np.float64 else np.float32)
        drawn *= high - low
        drawn += low
        return asarray(drawn, dtype, device)

    def normal(self, mean: float, std: float, shape: Shape, dtype: Any = np.float32, device: str = "cpu") -> Array:
        """Normal with the given mean and standard deviation."""
        drawn = self.numpy.standard_normal(shape, dtype=np.float64 if np.dtype(dtype) == np.float64 else np.float32)
        drawn *= std
        drawn += mean
        return asarray(drawn, dtype, device)


class Draws:
    """What a stretch of a program drew: from which generators, and what state each was in before.

    default  what was the default generator
    before   the state of each generator that was drawn from, whether the default one or another
    """

    def __init__(self) -> None:
        self.default = default_generator()
        self.before: dict[Generator, Any] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The stretch is in here."""
        token = _draws.set((*_draws.get(), self))
        try:
            yield
        finally:
            _draws.reset(token)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """In here the same numbers are drawn once more; afterwards all generators go on from where they are now."""
        now = {generator: generator._numpy.bit_generator.state for generator in self.before}
        token = _generator.set(self.default)
        for generator, state in self.before.items():
            generator._numpy.bit_generator.state = state
        try:
            yield
        finally:
            for generator, state in now.items():
                generator._numpy.bit_generator.state = state
            _generator.reset(token)


# Context variables and not plain globals: every simulated rank has a context of its own, as every process has.
_generator: ContextVar[Generator] = ContextVar("generator")
_draws: ContextVar[tuple[Draws, ...]] = ContextVar("draws", default=())


def manual_seed(seed: int) -> Generator:
    """Seed this rank's default generator, from which initial weights and dropout masks are drawn."""
    _generator.set(Generator(seed))
    return _generator.get()


def default_generator() -> Generator:
    """This rank's default generator; seeded with 0 until `manual_seed` is called, so that a run repeats."""
    try:
        return _generator.get()
    except LookupError:
        return manual_seed(0)


@contextmanager
def drawing_from(generator: Generator) -> Iterator[None]:
    """Within it `generator` is this rank's default one."""
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)
