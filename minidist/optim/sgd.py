"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..backend import Array, namespace
from ..nn.module import Parameter
from .optimizer import Group, Optimizer, flush_subnormals


class SGD(Optimizer):
    """p -= lr v, with the gradient's running sum v:

        g += weight_decay p
        v  = momentum v + (1 - dampening) g         (v = g at the first step; v = g without momentum)
        v  = g + momentum v                         (nesterov: this one for the update only)

    Source  Sutskever et al. 2013, in PyTorch's form
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[Group],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov),
        )

    def check(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"SGD: {name} must not be negative, it is {group[name]}")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "SGD: nesterov needs a momentum and no dampening; "
                f"they are {group['momentum']} and {group['dampening']}"
            )

    def names_of_state(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, p: Array, g: Array, state: dict[str, Array], t: Array, u: Array, group: Any, step: int) -> None:
        xp = namespace(p)
        momentum, decay = group["momentum"], group["weight_decay"]
        if decay:
            xp.multiply(p, decay, out=t)
            g = xp.add(t, g, out=t)
        if momentum:
            v = state["momentum_buffer"]
            if step == 1:
                v[...] = g
            else:
                xp.multiply(v, momentum, out=v)
                xp.add(v, xp.multiply(g, 1 - group["dampening"], out=u) if group["dampening"] else g, out=v)
            flush_subnormals(v, momentum, step, u)
            if group["nesterov"]:
                xp.multiply(v, momentum, out=u)
                g = xp.add(g, u, out=t)
            else:
                g = v
        xp.multiply(g, -group["lr"], out=u)
        xp.add(p, u, out=p)
