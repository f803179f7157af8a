"""Operations on tensors, a family a file. All are functions here; most are methods of Tensor as well."""

from functools import partialmethod
from typing import Any

import numpy as np

from ..tensor import Tensor
from .activation import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from .attention import packed_attention, scaled_dot_product_attention
from .conv import conv2d
from .dropout import dropout
from .elementwise import (
    abs,
    add,
    bitwise_and,
    bitwise_not,
    bitwise_or,
    clip,
    cos,
    div,
    eq,
    exp,
    ge,
    gt,
    le,
    log,
    lt,
    maximum,
    minimum,
    mul,
    ne,
    neg,
    pow,
    sin,
    sqrt,
    sub,
    where,
)
from .embedding import embedding
from .index import gather, getitem
from .loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    l1_loss,
    log_softmax,
    mse_loss,
    nll_loss,
    softmax,
)
from .matmul import einsum, linear, matmul, outer
from .norm import batch_norm, layer_norm, rms_norm
from .pool import avg_pool2d, max_pool2d
from .reduce import all, amax, amin, any, argmax, argmin, cumsum, logsumexp, max, mean, min, prod, std, sum, var
from .shape import (
    cat,
    chunk,
    clone,
    contiguous,
    expand,
    flatten,
    flip,
    masked_fill,
    pad,
    permute,
    repeat,
    reshape,
    roll,
    split,
    squeeze,
    stack,
    to,
    transpose,
    tril,
    triu,
    unsqueeze,
)

# Functions of a tensor that are its methods too, under the same name.
_METHODS: list[Any] = [
    *(abs, add, all, amax, amin, any, argmax, argmin, chunk, clip, clone, contiguous, cos, cumsum, div, eq, exp),
    *(expand, flatten, flip, gather, ge, gt, le, log, log_softmax, logsumexp, lt, masked_fill, matmul, max, maximum),
    *(mean, min, minimum, mul, ne, neg, permute, pow, prod, relu, repeat, reshape, roll, sigmoid, sin, softmax, split),
    *(sqrt, squeeze, std, sub, sum, tanh, to, transpose, tril, triu, unsqueeze, var),
]
for _method in _METHODS:
    setattr(Tensor, _method.__name__, _method)
for _name, _function in dict(clamp=clip, view=reshape).items():  # PyTorch's other names
    setattr(Tensor, _name, _function)

# x.float(), x.cpu() and the like: `to` with the target fixed.
_TARGETS = dict(float=np.float32, double=np.float64, half=np.float16, int=np.int32, long=np.int64, bool=np.bool_)
for _name, _target in {**_TARGETS, "cpu": "cpu", "cuda": "cuda"}.items():
    setattr(Tensor, _name, partialmethod(to, _target))


def _swapped(function: Any) -> Any:
    """For `2 - x`, which Python calls as x.__rsub__(2)."""
    return lambda x, y: function(y, x)


# The operators.
for _name, _function in dict(add=add, sub=sub, mul=mul, truediv=div, pow=pow, matmul=matmul).items():
    setattr(Tensor, f"__{_name}__", _function)
    setattr(Tensor, f"__r{_name}__", _swapped(_function))
_OTHERS: dict[str, Any] = dict(eq=eq, ne=ne, lt=lt, le=le, gt=gt, ge=ge, neg=neg, abs=abs, getitem=getitem)
_OTHERS |= {"and": bitwise_and, "or": bitwise_or, "invert": bitwise_not}
for _name, _function in _OTHERS.items():
    setattr(Tensor, f"__{_name}__", _function)


def _reversed(x: Tensor) -> Tensor:
    """x with its dims in reverse order."""
    return permute(x, *reversed(range(x.ndim)))


for _name, _function in dict(T=_reversed, mT=lambda x: transpose(x, -2, -1)).items():
    setattr(Tensor, _name, property(_function))
