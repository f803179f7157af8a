"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..backend import Array, namespace
from ..nn.module import Parameter
from .optimizer import Group, Optimizer, flush_subnormals


class Adam(Optimizer):
    """Steps scaled by running means of the gradient and of its square:

        g += weight_decay p
        m  = β1 m + (1 - β1) g                      exp_avg
        v  = β2 v + (1 - β2) g²                     exp_avg_sq
        p -= lr m' / (√v' + eps),   m' = m / (1 - β1^k),  v' = v / (1 - β2^k) at the k-th step

    Kept are the running sums M = m / (1 - β1) and V = v / (1 - β2): M = β1 M + g takes two passes over memory where
    the mean takes three. The constants move into the last line. `state_dict` gives the means, as PyTorch does.

    Source  Kingma & Ba 2015, algorithm 1
    """

    state_names = ("exp_avg", "exp_avg_sq")
    decoupled = False  # weight decay: added to the gradient, or (AdamW) straight to the parameter

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def check(self, group: Group) -> None:
        name = type(self).__name__
        for option in ("lr", "eps", "weight_decay"):
            if not group[option] >= 0:
                raise ValueError(f"{name}: {option} must not be negative, it is {group[option]}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{name}: betas must be at least 0 and below 1, they are {group['betas']}")

    def scale_of_state(self, name: str, group: Group) -> float:
        return 1 - group["betas"][self.state_names.index(name)] if name in self.state_names else 1.0

    def update(self, p: Array, g: Array, state: dict[str, Array], t: Array, u: Array, group: Any, step: int) -> None:
        xp = namespace(p)
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if decay and self.decoupled:
            xp.multiply(p, 1 - lr * decay, out=p)
        elif decay:
            xp.multiply(p, decay, out=u)
            g = xp.add(u, g, out=u)
        # M and V take in the gradient.
        xp.multiply(m, beta1, out=m)
        xp.add(m, g, out=m)
        xp.multiply(g, g, out=t)
        xp.multiply(v, beta2, out=v)
        xp.add(v, t, out=v)
        flush_subnormals(m, beta1, step, t)
        flush_subnormals(v, beta2, step, t)
        # √v' = √V / root; so p -= lr m' / (√v' + eps) = (lr (1 - β1) / (1 - β1^k) root) M / (√V + eps root).
        root = math.sqrt((1 - beta2**step) / (1 - beta2))
        xp.sqrt(v, out=t)
        xp.add(t, eps * root, out=t)
        xp.divide(m, t, out=t)
        xp.multiply(t, -lr * (1 - beta1) / (1 - beta1**step) * root, out=t)
        xp.add(p, t, out=p)


class AdamW(Adam):
    """Adam with decoupled weight decay: p -= lr weight_decay p, beside the step and not through it.

    Source  Loshchilov & Hutter 2019, algorithm 2
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)
