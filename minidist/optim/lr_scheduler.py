"""Learning-rate schedules: call `step()` after every epoch (or every step, if its numbers count steps).

Each gives the learning rate in closed form, as a factor of (or a path from) the one the optimizer began with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from .optimizer import Optimizer


class LRScheduler(ABC):
    """Sets the learning rate of every group to `rate(base, last_epoch)`, from the moment it is made."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.last_epoch = 0
        self._set()

    @abstractmethod
    def rate(self, base: float, epoch: int) -> float:
        """The learning rate in epoch 0, 1, … of a group that began with `base`."""

    def step(self) -> None:
        """One epoch (or step) is over."""
        self.last_epoch += 1
        self._set()

    def _set(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(group["initial_lr"], self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]
        self._set()


class StepLR(LRScheduler):
    """base · gamma ^ (epoch // step_size)"""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1):
        if step_size < 1:
            raise ValueError(f"StepLR: step_size must be at least 1, it is {step_size}")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int) -> float:
        return base * self.gamma ** (epoch // self.step_size)


class CosineAnnealingLR(LRScheduler):
    """From base down to eta_min in T_max epochs, along half a cosine (and up again after, as PyTorch does).

    Source  Loshchilov & Hutter 2017 (SGDR), without restarts
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0):
        if T_max < 1:
            raise ValueError(f"CosineAnnealingLR: T_max must be at least 1, it is {T_max}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int) -> float:
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * epoch / self.T_max)) / 2


class LinearLR(LRScheduler):
    """Warm-up: from base · start_factor to base · end_factor in total_iters equal steps; constant after."""

    def __init__(
        self, optimizer: Optimizer, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5
    ):
        if not (0 < start_factor <= 1 and 0 <= end_factor <= 1 and total_iters >= 1):
            raise ValueError(
                f"LinearLR: factors {start_factor} (above 0) and {end_factor} must be at most 1, "
                f"total_iters {total_iters} at least 1"
            )
        self.start, self.end, self.total = start_factor, end_factor, total_iters
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int) -> float:
        return base * (self.start + (self.end - self.start) * min(epoch, self.total) / self.total)


class SequentialLR(LRScheduler):
    """One schedule after another: schedulers[i] takes over, from its own epoch 0, at epoch milestones[i - 1]."""

    def __init__(self, optimizer: Optimizer, schedulers: list[LRScheduler], milestones: list[int]):
        if len(milestones) != len(schedulers) - 1 or sorted(milestones) != milestones:
            raise ValueError(f"{len(schedulers)} schedules want as many milestones less one, rising; got {milestones}")
        self.schedulers, self.milestones = schedulers, milestones
        super().__init__(optimizer)

    def rate(self, base: float, epoch: int) -> float:
        begun = [m for m in self.milestones if m <= epoch]
        return self.schedulers[len(begun)].rate(base, epoch - (begun[-1] if begun else 0))
