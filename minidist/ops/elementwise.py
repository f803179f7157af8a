"""Arithmetic and elementary functions, element by element, with broadcasting."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from ..backend import Array, namespace
from ..tensor import Function, Tensor, plain
from .common import as_tensor, cast, promote, to_float, unbroadcast

# -- two operands ---------------------------------------------------------------------------------------------------


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x, "shape", ())


class Binary(Function):
    """z = f(x, y), broadcast. A subclass gives f and its two partial derivatives; a number's is never asked for."""

    def forward(self, x: Any, y: Any) -> Array:
        self.shapes = _shape(x), _shape(y)
        return self.compute(x, y)

    def backward(self, dz: Array) -> tuple[Array | None, Array | None]:
        dx = unbroadcast(self.partial_x(dz), self.shapes[0]) if self.needs[0] else None
        dy = unbroadcast(self.partial_y(dz), self.shapes[1]) if self.needs[1] else None
        return dx, dy

    @abstractmethod
    def compute(self, x: Any, y: Any) -> Array:
        """f(x, y); saves what the derivatives need."""

    def partial_x(self, dz: Array) -> Array:
        """dz · ∂f/∂x, still of z's shape."""
        return dz

    def partial_y(self, dz: Array) -> Array:
        """dz · ∂f/∂y, still of z's shape."""
        return dz


class Add(Binary):
    """z = x + y.   dx = dz, dy = dz"""

    def compute(self, x: Any, y: Any) -> Array:
        return x + y


class Sub(Binary):
    """z = x - y.   dx = dz, dy = -dz"""

    def compute(self, x: Any, y: Any) -> Array:
        return x - y

    def partial_y(self, dz: Array) -> Array:
        return -dz


class Mul(Binary):
    """z = x * y.   dx = dz * y, dy = dz * x"""

    def compute(self, x: Any, y: Any) -> Array:
        self.save(x if self.needs[1] else None, y if self.needs[0] else None)
        return x * y

    def partial_x(self, dz: Array) -> Array:
        return dz * self.saved[1]

    def partial_y(self, dz: Array) -> Array:
        return dz * self.saved[0]


class Div(Binary):
    """z = x / y.   dx = dz / y, dy = -dz * z / y"""

    def compute(self, x: Any, y: Any) -> Array:
        self.save(x if self.needs[1] else None, y)
        return x / y

    def partial_x(self, dz: Array) -> Array:
        return dz / self.saved[1]

    def partial_y(self, dz: Array) -> Array:
        x, y = self.saved
        return -dz * (x / y) / y  # y * y might overflow, or vanish


class Pow(Binary):
    """z = x ** y.   dx = dz * y * x**(y - 1), dy = dz * z * log(x), where 0 ** y counts as constant in y >= 0"""

    def compute(self, x: Any, y: Any) -> Array:
        z = x**y
        self.save(z if self.needs[1] else None, x, y)
        return z

    def partial_x(self, dz: Array) -> Array:
        _, x, y = self.saved
        if isinstance(y, int | float):
            return dz * (y * x ** (y - 1)) if y != 0 else dz * 0
        xp = namespace(dz)
        return dz * xp.where(y == 0, 0, y * x ** xp.where(y == 0, 1, y - 1))

    def partial_y(self, dz: Array) -> Array:
        z, x, y = self.saved
        xp = namespace(dz)
        x = xp.full((), x, z.dtype) if isinstance(x, int | float) else x
        constant = (x == 0) & (y >= 0)
        return dz * xp.where(constant, 0, z * xp.log(xp.where(constant, 1, x)))


class Maximum(Binary):
    """z = max(x, y).   The gradient goes to the larger; half to each where they are equal"""

    def compute(self, x: Any, y: Any) -> Array:
        xp = namespace(x)
        self.save(x, y)
        return xp.maximum(x, y)

    def partial_x(self, dz: Array) -> Array:
        x, y = self.saved
        return dz * self._share(x, y, dz)

    def partial_y(self, dz: Array) -> Array:
        x, y = self.saved
        return dz * self._share(y, x, dz)

    def _share(self, mine: Array, other: Array, dz: Array) -> Array:
        return ((mine > other) + 0.5 * (mine == other)).astype(dz.dtype)


class Minimum(Maximum):
    """z = min(x, y).   The gradient goes to the smaller; half to each where they are equal"""

    def compute(self, x: Any, y: Any) -> Array:
        xp = namespace(x)
        self.save(x, y)
        return xp.minimum(x, y)

    def _share(self, mine: Array, other: Array, dz: Array) -> Array:
        return Maximum._share(self, other, mine, dz)


class Where(Function):
    """z = x where condition holds, else y.   dx = dz where it holds, dy = dz elsewhere"""

    def forward(self, condition: Array, x: Any, y: Any) -> Array:
        self.shapes = _shape(x), _shape(y)
        self.save(condition)
        return namespace(condition).where(condition, x, y)

    def backward(self, dz: Array) -> tuple[None, Array | None, Array | None]:
        (condition,) = self.saved
        xp, zero = namespace(dz), dz.dtype.type(0)
        dx = unbroadcast(xp.where(condition, dz, zero), self.shapes[0]) if self.needs[1] else None
        dy = unbroadcast(xp.where(condition, zero, dz), self.shapes[1]) if self.needs[2] else None
        return None, dx, dy


def add(x: Any, y: Any, alpha: float = 1) -> Tensor:
    """x + alpha * y"""
    return Add.apply(*promote(x, y if alpha == 1 else mul(y, alpha)))


def sub(x: Any, y: Any, alpha: float = 1) -> Tensor:
    """x - alpha * y"""
    return Sub.apply(*promote(x, y if alpha == 1 else mul(y, alpha)))


def mul(x: Any, y: Any) -> Tensor:
    """x * y"""
    return Mul.apply(*promote(x, y))


def div(x: Any, y: Any) -> Tensor:
    """x / y, always a floating-point result"""
    x, y = promote(x, y)
    return Div.apply(*(to_float(v) if isinstance(v, Tensor) else v for v in (x, y)))


def pow(x: Any, y: Any) -> Tensor:
    """x ** y"""
    return Pow.apply(*promote(x, y))


def maximum(x: Any, y: Any) -> Tensor:
    """The larger of two tensors, element by element."""
    return Maximum.apply(*promote(as_tensor(x), as_tensor(y)))


def minimum(x: Any, y: Any) -> Tensor:
    """The smaller of two tensors, element by element."""
    return Minimum.apply(*promote(as_tensor(x), as_tensor(y)))


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """x where condition holds, else y; the three are broadcast."""
    x, y = promote(x, y)
    result = Where.apply(as_tensor(condition), x, y)
    numbers = not isinstance(x, Tensor) and not isinstance(y, Tensor)
    return cast(result, np.float32) if numbers and result.dtype == np.float64 else result


# -- comparisons, and the logic of masks: no gradient -----------------------------------------------------------------


def eq(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) == plain(y))


def ne(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) != plain(y))


def lt(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) < plain(y))


def le(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) <= plain(y))


def gt(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) > plain(y))


def ge(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) >= plain(y))


def bitwise_and(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) & plain(y))


def bitwise_or(x: Any, y: Any) -> Tensor:
    return Tensor(plain(x) | plain(y))


def bitwise_not(x: Tensor) -> Tensor:
    return Tensor(~x.data)


# -- one operand ----------------------------------------------------------------------------------------------------


class Neg(Function):
    """y = -x.   dx = -dy"""

    def forward(self, x: Array) -> Array:
        return -x

    def backward(self, dy: Array) -> tuple[Array]:
        return (-dy,)


class Exp(Function):
    """y = e ** x.   dx = dy * y"""

    def forward(self, x: Array) -> Array:
        return self.save(namespace(x).exp(x))

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy * self.saved[0],)


class Log(Function):
    """y = ln x.   dx = dy / x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).log(x)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy / self.saved[0],)


class Sqrt(Function):
    """y = x ** 0.5.   dx = dy / 2y"""

    def forward(self, x: Array) -> Array:
        return self.save(namespace(x).sqrt(x))

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy / (2 * self.saved[0]),)


class Abs(Function):
    """y = |x|.   dx = dy * sign(x)"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).abs(x)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy * namespace(dy).sign(self.saved[0]),)


class Sin(Function):
    """y = sin x.   dx = dy * cos x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).sin(x)

    def backward(self, dy: Array) -> tuple[Array]:
        return (dy * namespace(dy).cos(self.saved[0]),)


class Cos(Function):
    """y = cos x.   dx = -dy * sin x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).cos(x)

    def backward(self, dy: Array) -> tuple[Array]:
        return (-dy * namespace(dy).sin(self.saved[0]),)


class Clip(Function):
    """y = min(max(x, low), high).   dx = dy where low <= x <= high, else 0"""

    def forward(self, x: Array, low: float | None, high: float | None) -> Array:
        self.low, self.high = low, high
        self.save(x)
        return namespace(x).clip(x, low, high)

    def backward(self, dy: Array) -> tuple[Array]:
        (x,) = self.saved
        inside = namespace(x).ones(x.shape, bool)
        if self.low is not None:
            inside &= x >= self.low
        if self.high is not None:
            inside &= x <= self.high
        return (dy * inside,)


def neg(x: Tensor) -> Tensor:
    return Neg.apply(x)


def exp(x: Tensor) -> Tensor:
    return Exp.apply(to_float(x))


def log(x: Tensor) -> Tensor:
    return Log.apply(to_float(x))


def sqrt(x: Tensor) -> Tensor:
    return Sqrt.apply(to_float(x))


def abs(x: Tensor) -> Tensor:
    return Abs.apply(x)


def sin(x: Tensor) -> Tensor:
    return Sin.apply(to_float(x))


def cos(x: Tensor) -> Tensor:
    return Cos.apply(to_float(x))


def clip(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """x held within [min, max]; PyTorch's `clamp`."""
    if min is None and max is None:
        raise ValueError("clip needs min, max or both")
    low, high = (v.item() if isinstance(v, np.generic) else v for v in (min, max))  # np.float64 would widen x
    x = to_float(x) if isinstance(low, float) or isinstance(high, float) else x
    return Clip.apply(x, low=low, high=high)
