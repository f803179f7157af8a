"""minidist: distributed training of neural networks, from scratch, to be read.

    import minidist as md

Two towers: the engine (backend, autograd, tensor, ops, nn, optim) knows nothing of other ranks; communication (comm,
collectives) knows nothing of tensors. `parallel` puts them together.
"""

from . import checkpoint, collectives, comm, data, nn, optim, parallel
from .autograd import enable_grad, is_grad_enabled, no_grad
from .backend import manual_seed
from .creation import arange, full, ones, rand, randn, tensor, zeros
from .ops import (
    amax,
    amin,
    argmax,
    argmin,
    cat,
    clip,
    einsum,
    exp,
    gather,
    log,
    logsumexp,
    matmul,
    maximum,
    minimum,
    stack,
    where,
)
from .tensor import Function, Tensor

__version__ = "0.1.0"
