"""Initial values, drawn from this rank's default generator. PyTorch's names and distributions.

Source  Glorot & Bengio 2010 (xavier); He et al. 2015 (kaiming)
"""

from __future__ import annotations

import math

from .. import backend
from ..autograd import no_grad
from ..tensor import Tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Fill with numbers uniform in [a, b)."""
    with no_grad():
        return tensor.copy_(backend.default_generator().uniform(a, b, tensor.shape, tensor.dtype, tensor.device))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill with normal numbers."""
    with no_grad():
        return tensor.copy_(backend.default_generator().normal(mean, std, tensor.shape, tensor.dtype, tensor.device))


def constant_(tensor: Tensor, value: float) -> Tensor:
    """Fill with one value."""
    with no_grad():
        return tensor.fill_(value)


def fans(tensor: Tensor) -> tuple[int, int]:
    """(inputs, outputs) that one output, or input, of a weight (O, I, …) is connected to."""
    receptive = math.prod(tensor.shape[2:])
    return tensor.shape[1] * receptive, tensor.shape[0] * receptive


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform with variance 2 / (inputs + outputs)."""
    fan_in, fan_out = fans(tensor)
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return uniform_(tensor, -bound, bound)


def kaiming_uniform_(tensor: Tensor, a: float = 0.0) -> Tensor:
    """Uniform with variance 2 / ((1 + a**2) inputs), for layers followed by a (leaky) ReLU of slope a."""
    fan_in, _ = fans(tensor)
    bound = math.sqrt(6 / ((1 + a * a) * fan_in)) if fan_in else 0
    return uniform_(tensor, -bound, bound)


def linear_(weight: Tensor, bias: Tensor | None) -> None:
    """What PyTorch starts linear and convolutional layers with: both uniform within 1 / sqrt(inputs)."""
    kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        fan_in, _ = fans(weight)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0
        uniform_(bias, -bound, bound)
