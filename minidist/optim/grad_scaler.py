"""Loss scaling: gradients so many times larger, on their way through backward, that float16 can hold them.

float16's smallest number is 6e-8, and its largest 65504. Many gradients are smaller, and would be 0; none comes near
the largest. So the loss is multiplied by a scale S, and with it all gradients, and the step divides by S:

    scaler.scale(loss).backward()       gradients S g
    overflow?                           some S g is infinite or nan: no step, S /= 2
                                        none was for 2000 steps:              S *= 2
    step                                with S g / S, in float32

S tries out by itself what fits.

Source  Micikevicius et al. 2018, Mixed Precision Training, section 3.2; the interface is PyTorch's torch.amp.GradScaler
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array, namespace
from .masters import MasterPart
from .optimizer import Part


class GradScaler:
    """Used so, on every rank alike; the model computes in float16, and its last result is cast for the loss:

        scaler = optim.GradScaler(agree=parallel.any_rank(comm))
        ...
        optimizer.zero_grad()
        loss = criterion(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)                        # if gradients are clipped, or looked at
        network.clip_grad_norm_(1.0)
        scaler.step(optimizer)                            # unless there was an overflow
        scaler.update()

    agree    whether any rank has found an overflow, given whether this one has: ranks that hold parts of the gradients
             see different overflows, and all must step or none. Without it this rank decides alone
    enabled  False: everything does as if there was no scale, so that a program needs no second loop
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        agree: Callable[[bool], bool] | None = None,
    ):
        if not (0 < init_scale < math.inf and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval >= 1):
            raise ValueError(
                f"GradScaler: init_scale={init_scale} must be positive, growth_factor={growth_factor} more than 1, "
                f"backoff_factor={backoff_factor} between 0 and 1, growth_interval={growth_interval} at least 1"
            )
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.enabled = growth_interval, enabled
        self.agree = agree or bool
        self._scale = float(init_scale)
        self._good_steps = 0  # since the scale was changed
        self._found: dict[Any, bool] = {}  # of each optimizer since the last update: whether there was an overflow
        self._stepped: set[Any] = set()

    def get_scale(self) -> float:
        return self._scale if self.enabled else 1.0

    def is_enabled(self) -> bool:
        return self.enabled

    def scale(self, outputs: Any) -> Any:
        """A loss times the scale; or a tuple or list of them.

        Errors  TypeError: a loss in half precision, which ends where the scale begins
        """
        if isinstance(outputs, tuple | list):
            return type(outputs)(self.scale(output) for output in outputs)
        if not self.enabled:
            return outputs
        if outputs.dtype.itemsize < 4:
            raise TypeError(
                f"GradScaler.scale: a loss in {outputs.dtype}, whose largest number is 65504: let the loss be float32, "
                "criterion(model(x).float(), target)"
            )
        return outputs * self._scale

    def unscale_(self, optimizer: Any) -> None:
        """Look for overflows, and divide the gradients by the scale. Once, between backward and step, by every rank.

        Half-precision gradients stay as they are, for most would become 0; the step divides them, and clipping knows.

        Cost    one number from the GPU; what `agree` costs
        Errors  RuntimeError: a second time; TypeError: half-precision parameters without master weights
        """
        if not self.enabled:
            return
        if optimizer in self._found:
            raise RuntimeError("unscale_() has been called on this optimizer since the last update() already")
        parts = _parts(optimizer)
        for part in parts:
            if part.flat.dtype.itemsize < 4 and not isinstance(part, MasterPart):
                raise TypeError(
                    f"GradScaler: parameters in {part.flat.dtype} would lose what they have of digits: "
                    "optim.with_master_weights(optimizer), before its first step"
                )
        flags = []
        for part in parts:
            part.flat.collect()
            gradients = part.gradients()
            flags += [_all_finite(g) for g in gradients]
            if isinstance(part, MasterPart):
                part.flat.grad_scale = self._scale
                continue
            for g in gradients:
                g *= 1 / self._scale
        here = bool(flags) and not bool(namespace(flags[0]).stack(flags).all())
        self._found[optimizer] = self.agree(here)

    def step(self, optimizer: Any) -> Any:
        """optimizer.step(), unless there was an overflow: then nothing, and None. Every rank calls it."""
        if not self.enabled:
            return optimizer.step()
        if optimizer in self._stepped:
            raise RuntimeError("step() has been called with this optimizer since the last update() already")
        if optimizer not in self._found:
            self.unscale_(optimizer)
        self._stepped.add(optimizer)
        return None if self._found[optimizer] else optimizer.step()

    def update(self, new_scale: float | None = None) -> None:
        """Make the scale smaller after an overflow, larger after enough steps without one; or what is given."""
        if not self.enabled:
            return
        if not self._found and new_scale is None:
            raise RuntimeError(
                "update() without a step() or unscale_() since the last one: nobody looked for overflows"
            )
        if new_scale is not None:
            self._scale = float(new_scale)
        elif any(self._found.values()):
            self._scale *= self.backoff_factor
            self._good_steps = 0
        else:
            self._good_steps += 1
            if self._good_steps == self.growth_interval:
                grown = self._scale * self.growth_factor
                self._scale = grown if grown < np.finfo(np.float32).max else self._scale
                self._good_steps = 0
        for optimizer in self._found:
            for part in _parts(optimizer):
                part.flat.grad_scale = 1.0
        self._found.clear()
        self._stepped.clear()

    # -- state, under PyTorch's names -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Errors  RuntimeError: the state of a scaler that was not enabled"""
        if not self.enabled:
            return
        if not state:
            raise RuntimeError("GradScaler.load_state_dict: the state is empty, of a scaler that was not enabled")
        self._scale, self._good_steps = float(state["scale"]), int(state["_growth_tracker"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]


def _parts(optimizer: Any) -> list[Part]:
    """Of an optimizer, or of the one in what data_parallel returned."""
    return getattr(optimizer, "optimizer", optimizer).parts


def _all_finite(g: Array) -> Array:
    """Whether all numbers are, as an array of no dims (on a GPU nobody waits for it)."""
    # The sum in a larger type can't overflow by itself, is infinite or nan if a number is, and needs no array for it.
    wider = {2: np.float32, 4: np.float64}.get(g.dtype.itemsize)
    xp = namespace(g)
    if wider is None:
        return xp.asarray(xp.isfinite(g).all())
    with np.errstate(invalid="ignore"):
        return xp.asarray(xp.isfinite(g.sum(dtype=wider)))
