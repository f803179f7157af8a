"""minidist: distributed training of neural networks, from scratch, to be read.

    import minidist as md

Two towers: the engine (backend, autograd, tensor, ops, nn, optim) knows nothing of other ranks; communication (comm,
collectives) knows nothing of tensors. `parallel` puts them together.
"""

from numpy import bool_ as bool
from numpy import float16, float32, float64, int32, int64, uint8

from . import checkpoint, collectives, comm, data, nn, optim, parallel, trace
from .autograd import enable_grad, is_grad_enabled, no_grad
from .backend import manual_seed
from .creation import arange, full, ones, rand, randn, tensor, zeros
from .mesh import Mesh
from .ops import (
    abs,
    all,
    amax,
    amin,
    any,
    argmax,
    argmin,
    cat,
    chunk,
    clip,
    cos,
    cumsum,
    einsum,
    exp,
    flatten,
    flip,
    gather,
    log,
    log_softmax,
    logsumexp,
    masked_fill,
    matmul,
    max,
    maximum,
    mean,
    min,
    minimum,
    outer,
    permute,
    pow,
    prod,
    relu,
    reshape,
    roll,
    sigmoid,
    sin,
    softmax,
    split,
    sqrt,
    squeeze,
    stack,
    std,
    sum,
    tanh,
    transpose,
    tril,
    triu,
    unsqueeze,
    var,
    where,
)
from .recomputation import recompute, recompute_sequential
from .tensor import Function, Tensor

__version__ = "0.1.0"
