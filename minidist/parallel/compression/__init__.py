"""Gradients in fewer bytes: what each rank sends stands for its gradient, and what was left out is not forgotten.

    fp16, bf16      every number in 16 bits                          half.py
    topk:R          the largest R of all numbers (0 < R <= 1)        sparse.py
    randomk:R       a random R of them, the same on all ranks        sparse.py
    sign            the signs, and one number a parameter tensor     sign.py
    powersgd:R      matrices as products of two of rank R            power.py

All but the first two keep an error memory: the part of a gradient that was not sent is added to the next one (error
feedback; Seide et al. 2014, Karimireddy et al. 2019). So over time everything is sent, and reaches the optimizer later.
A new one is a class and a row here, and the tests take it from there.
"""

from __future__ import annotations

from collections.abc import Callable

from ...comm import Communicator
from ...nn.flat import FlatBuffer
from .base import Compression
from .half import BFloat16, Float16
from .power import PowerSGD
from .sign import Sign
from .sparse import RandomK, TopK

Make = Callable[[Communicator, FlatBuffer], Compression]

# name: (class, what the number after the colon is: nothing, a share of the numbers, or a matrix's rank)
COMPRESSIONS: dict[str, tuple[Callable[..., Compression], str]] = {
    "fp16": (Float16, ""),
    "bf16": (BFloat16, ""),
    "topk": (TopK, "share"),
    "randomk": (RandomK, "share"),
    "sign": (Sign, ""),
    "powersgd": (PowerSGD, "rank"),
}


def compression_of(text: str) -> Make:
    """What makes the compression of this name for a flat buffer: "sign", "topk:0.01", "powersgd:4", ...

    Errors  ValueError: no such name; a number that is missing, too many, or out of range
    """
    name, colon, argument = text.partition(":")
    if name not in COMPRESSIONS:
        raise ValueError(f"compress {text!r}: choose one of {', '.join(_usage(name) for name in COMPRESSIONS)}")
    make, kind = COMPRESSIONS[name]
    if not kind:
        if colon:
            raise ValueError(f"compress {text!r}: {name} takes no number")
        return make
    try:
        number = float(argument) if kind == "share" else int(argument)
    except ValueError:
        number = 0
    if not (0 < number <= 1 if kind == "share" else number > 0):
        wanted = "a share above 0 and up to 1" if kind == "share" else "a whole number above 0"
        raise ValueError(f"compress {text!r}: {_usage(name)}, where R is {wanted}")
    return lambda comm, flat: make(comm, flat, number)


def _usage(name: str) -> str:
    return f"{name}:R" if COMPRESSIONS[name][1] else name
