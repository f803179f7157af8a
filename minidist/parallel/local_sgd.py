"""Local SGD and DiLoCo: every rank trains alone for a while, then all average their parameters. Here with `every` = 3:

    rank 0    --o--o--o--.     .--o--o--o--.     .--         o   a step of the rank's own optimizer, on its own share
    rank 1    --o--o--o-- mean ---o--o--o-- mean ---         mean   D.3(4), the only communication
    rank 2    --o--o--o--'     '--o--o--o--'     '--

    1. remember      θ, which all ranks have alike           (not needed for the plain mean)
    2. inner steps   `every` of them: θ_r on rank r, without a message
    3. average       θ_mean = (θ_0 + … + θ_(P-1)) / P        an all-reduce, in place
    4. outer step    Δ = θ - θ_mean, the outer gradient      v = μ v + Δ,   θ = θ - lr (Δ + μ v)

Local SGD ends with θ_mean: step 4 with lr = 1 and μ = 0. DiLoCo hands the displacement Δ to SGD with Nesterov momentum.
With `every` = 1 and plain SGD, local SGD is data parallelism: the mean of θ - lr g_r is θ - lr mean g_r. With more the
ranks drift apart between two means, and end elsewhere than one rank would.

Cost    per average, 2 n (P-1)/P bytes in 2 (P-1) messages a rank with the ring, for n bytes of parameters: what a step
        of data parallelism costs, but every `every` steps
Source  McMahan et al. 2017, FedAvg, algorithm 1 (it weighs ranks by their samples; here all count alike);
        Stich 2019, "Local SGD converges fast and communicates little"; Douillard et al. 2023, DiLoCo, algorithm 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import backend
from ..collectives import all_reduce
from ..comm import Communicator
from ..nn import Module
from ..optim import Optimizer
from ..tensor import plain
from .meter import Meter
from .starting import check_algorithm, start_alike

Outer = tuple[float, float]  # lr and momentum of the outer optimizer, SGD with Nesterov momentum


def local_sgd(
    model: Module,
    optimizer: Optimizer,
    comm: Communicator,
    every: int = 8,
    outer: Outer | None = None,
    algorithm: str = "auto",
) -> tuple[Module, LocalSGD]:
    """Make the ranks of `comm` train alone, and average their parameters every so many steps. Every rank calls it.

    Returns the model itself (backward stays on this rank) and an optimizer in the place of the one given:

        for images, labels in loader.epoch(epoch):      # this rank's share
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()                            # each `every`-th ends with the average
        optimizer.synchronise()                         # before the model is evaluated, or saved once for all ranks

    All ranks step equally often; one that has no samples for a step leaves out its backward, not the step. `model` may
    come from data_parallel: islands of ranks that average gradients, and `comm` joins one rank of each.

    every      steps from one average to the next
    outer      (lr, momentum) of an outer optimizer, as in DiLoCo; None: the average is taken as it is
    algorithm  of all_reduce; see collectives.ALGORITHMS
    Errors     TypeError: an optimizer that is wrapped already. ValueError: a number out of its range; another
               algorithm; a trained parameter that the optimizer does not have
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"local_sgd needs the optimizer itself, not what already wraps it: {type(optimizer).__name__}")
    if not every >= 1:
        raise ValueError(f"every={every}: at least 1 step lies between two averages")
    lr, momentum = outer or (1, 0)
    if not lr > 0 or not 0 <= momentum < 1:
        raise ValueError(f"outer lr={lr}, momentum={momentum}: lr must be above 0, momentum at least 0 and below 1")
    check_algorithm(algorithm, "all_reduce")
    start_alike(model, optimizer, comm)
    return model, LocalSGD(model, optimizer, comm, every, (lr, momentum), algorithm)


def diloco(
    model: Module,
    optimizer: Optimizer,
    comm: Communicator,
    every: int = 50,
    lr: float = 0.7,
    momentum: float = 0.9,
    algorithm: str = "auto",
) -> tuple[Module, LocalSGD]:
    """local_sgd with an outer optimizer of this `lr` and `momentum`. The paper's inner optimizer is AdamW."""
    return local_sgd(model, optimizer, comm, every, (lr, momentum), algorithm)


class LocalSGD:
    """A rank's own optimizer that averages the model with the other ranks' every so many steps. From `local_sgd`.

    meter        where time and memory went, see parallel/meter.py
    local_steps  steps since the last average, as many on every rank
    memory       for each flat buffer, what step 4 needs: "before", the θ of step 1; "velocity", v. Equal on all ranks
    """

    def __init__(
        self, model: Module, optimizer: Optimizer, comm: Communicator, every: int, outer: Outer, algorithm: str
    ):
        self.model, self.optimizer, self.comm = model, optimizer, comm
        self.every, self.algorithm, self.meter = every, algorithm, Meter(comm, optimizer)
        self.lr, self.momentum = outer
        self.local_steps = 0
        names = ["before"] * (outer != (1, 0)) + ["velocity"] * (self.momentum > 0)
        arrays = [part.flat.data for part in optimizer.parts]
        self.memory = [{n: backend.full(a.shape, 0, a.dtype, backend.device_of(a)) for n in names} for a in arrays]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """D.3(3): a step of this rank's own; and D.3(4) after each `every`-th. Every rank calls it."""
        if not self.local_steps:
            for part, memory in zip(self.optimizer.parts, self.memory, strict=True):
                if "before" in memory:
                    memory["before"][...] = part.flat.data
        loss = self.optimizer.step(closure)
        self.local_steps += 1
        if self.local_steps >= self.every:
            self.synchronise()
        return loss

    def synchronise(self) -> None:
        """D.3(4): average now, however few steps there were; without any do nothing. Every rank calls it.

        All ranks end with the same bits. The model's buffers too: of floats (BatchNorm's running statistics) the mean,
        without an outer step; of integers and booleans (its count of batches) the largest. What is frozen but known to
        the optimizer is averaged with the rest, and may be rounded. The inner optimizer's state stays the rank's own.

        Cost  an all-reduce for each flat buffer of parameters, and one for each of the model's buffers
        """
        if not self.local_steps:
            return
        with self.meter.waiting(), self.comm.step("D.3(4) average parameters"):
            for part, memory in zip(self.optimizer.parts, self.memory, strict=True):
                all_reduce(self.comm, part.flat.data, "mean", self.algorithm)
                if memory:
                    self._outer_step(part.flat.data, **memory)
                part.flat.changed()
            for _, buffer in self.model.named_buffers():
                all_reduce(self.comm, buffer.data, "max" if buffer.dtype.kind in "iub" else "mean", self.algorithm)
                buffer._version[0] += 1  # a graph that saved it notices
        self.meter.end_step()
        self.meter.weigh()
        self.local_steps = 0

    def _outer_step(self, theta: backend.Array, before: backend.Array, velocity: backend.Array = None) -> None:
        """Turn the mean of all ranks' θ, in place, into what the outer optimizer makes of it."""
        backend.namespace(theta).subtract(before, theta, out=theta)  # Δ
        if velocity is not None:
            velocity *= self.momentum
            velocity += theta
            theta += self.momentum * velocity
        theta *= -self.lr
        theta += before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, this rank's own, with "local_steps" and "outer", which are equal on all ranks.

        So every rank saves its own, and its model if there were steps since the last average. What local_sgd was
        called with is not in it.
        """
        outer = [{name: array.copy() for name, array in memory.items()} for memory in self.memory]
        return {**self.optimizer.state_dict(), "local_steps": self.local_steps, "outer": outer}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank. Every rank loads one of the same moment.

        Errors  ValueError: the state of another outer optimizer, or of other parameters
        """
        both = self.memory, saved.get("outer", [])
        mine, theirs = ([{n: tuple(a.shape) for n, a in memory.items()} for memory in memories] for memories in both)
        if theirs != mine:
            raise ValueError(f"load_state_dict: outer state {theirs} for an optimizer with {mine}")
        self.optimizer.load_state_dict(saved)
        for memory, arrays in zip(self.memory, saved["outer"], strict=True):
            for name, array in memory.items():
                array[...] = backend.to(plain(arrays[name]), backend.device_of(array))
        self.local_steps = int(saved["local_steps"])
