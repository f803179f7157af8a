"""When is a push applied, and when is a pull answered? Five answers, from the safest to the fastest.

    bsp            bulk synchronous: round t closes when every worker has pushed its gradient of clock t. One update
                   from the mean by samples; a pull for clock t + 1 is answered then. As all-reduce, and as one rank
    backup:b       synchronous with b backup workers: a round closes with the first N of N + b gradients. Later ones are
                   dropped, and their workers go on with the round that is open by then
    ssp:s          stale synchronous: a push is applied when it comes. A worker at clock c waits until the slowest has
                   done c - s: nobody is more than s clocks ahead
    async          asynchronous: as ssp, without a bound
    async-scaled   async, and the learning rate of a gradient that is t updates old is divided by t
    async-dc:x     async, delay-compensated: g + x g² (w - w_old) in the place of g, w_old being the values that the
                   gradient was taken at, and w the present ones (a first-order step from the one to the other)

Source  Valiant 1990 (bsp); Chen et al. 2016, "Revisiting distributed synchronous SGD" (backup); Ho et al. 2013, "More
        effective distributed ML via a stale synchronous parallel parameter server"; Dean et al. 2012, "Large scale
        distributed deep networks" (async); Zhang et al. 2016, "Staleness-aware async-SGD"; Zheng et al. 2017,
        "Asynchronous stochastic gradient descent with delay compensation"
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from ...backend import Array
from .messages import Code, Message, Refused
from .store import Store

# Apply a gradient (None: there is none, but clocks move) to a store; it is made of these pushes (worker, number); the
# last argument scales the learning rate.
Apply = Callable[[Store, Array | None, list[tuple[int, int]], float], None]
CHOICES = "bsp, backup:B, ssp:S, async, async-scaled or async-dc:X"


class Consistency(ABC):
    """How a server goes about pushes and pulls. It keeps nothing itself: what there is to know stands in the store."""

    name: str
    goes_on = True  # whether the rest goes on when a worker dies
    synchronous = False  # whether workers meet in rounds, with equal shares of a global batch
    bounded = True  # whether somebody who is ahead waits for others
    patient = False  # whether what a new head can't know yet is believed: there are copies

    def begin(self, workers: int, copies: int = 0) -> None:
        """The run begins with so many workers, and copies of each server. Errors  ValueError: too few workers"""
        self.patient = copies > 0

    @abstractmethod
    def push(self, store: Store, worker: int, message: Message, gradient: Array | None, apply: Apply) -> bool:
        """Take a gradient (None: nothing this time). False: it was dropped.

        Errors  Refused: its clock is closed already, or not open yet
        """

    @abstractmethod
    def ready(self, store: Store, clock: int) -> bool:
        """Whether a worker may have the values for its clock."""

    def answered(self, store: Store, worker: int) -> None:  # noqa: B027  nothing, for most
        """A worker has been given the values."""

    def changed(self, store: Store, apply: Apply) -> None:  # noqa: B027
        """A worker has gone or come."""


class Synchronous(Consistency):
    """bsp, or with some workers as backup."""

    synchronous = True

    def __init__(self, backup: int = 0):
        self.backup, self.goes_on = backup, backup > 0
        self.name = f"backup:{backup}" if backup else "bsp"
        self.full = 0  # gradients that close a round; set by `begin`

    def begin(self, workers: int, copies: int = 0) -> None:
        super().begin(workers, copies)
        if self.backup >= workers:
            raise ValueError(f"backup:{self.backup} with {workers} workers: none would be left to wait for")
        self.full = workers - self.backup

    def push(self, store: Store, worker: int, message: Message, gradient: Array | None, apply: Apply) -> bool:
        if message.clock < store.clock and self.backup:
            store.clocks[worker] = message.clock + 1
            return False
        if message.clock > store.clock and self.patient:
            # A dead head has closed this round, and told this worker; the others send their pushes again, and close it.
            store.early.append((worker, message, gradient))
            self._close(store, apply)  # it is not waited for in this round any more
            return True
        again = worker in store.open and store.open[worker][0] != message.number
        if message.clock != store.clock or again:
            said = "has been pushed to already" if again else f"is not open: {store.clock} is"
            raise Refused(Code.CLOSED, f"clock {message.clock} of {store.key.name} {said}")
        store.clocks[worker] = message.clock + 1
        store.open[worker] = (message.number, message.weight if gradient is not None else 0.0, gradient)
        self._close(store, apply)
        return True

    def changed(self, store: Store, apply: Apply) -> None:
        if store.clocks and not store.open and not store.early:  # rounds that nobody takes part in any more
            store.clock = max(store.clock, min(store.clocks.values()))
        self._close(store, apply)

    def ready(self, store: Store, clock: int) -> bool:
        return store.clock >= clock

    def _close(self, store: Store, apply: Apply) -> None:
        """Add up what has come, in the order of the workers (with backup: as they came); close the round when full."""
        early = {worker for worker, _, _ in store.early}
        expected = [
            w for w, clock in store.clocks.items() if w in store.open or (clock <= store.clock and w not in early)
        ]
        need = min(self.full, len(expected)) if self.backup else len(expected)
        order = list(store.open) if self.backup else sorted(expected)
        for worker in order[len(store.added) :]:
            if worker not in store.open:
                break
            self._add(store, worker)
        if not need or len(store.open) < need:
            return
        total, weights = store.total, [weight for _, weight, _ in store.open.values()]
        if sum(weights):
            first = next(weight for worker in store.added if (weight := store.open[worker][1]))
            factor = first / math.fsum(weights)
            if factor != 1:
                total *= total.dtype.type(factor)
        else:
            total = store.zeros()
        made_of = [(worker, number) for worker, (number, _, _) in store.open.items()]
        store.open, store.added, store.total = {}, [], None
        store.clock += 1
        apply(store, total, made_of, 1.0)
        store.give_back(total)
        if store.early:
            waiting, store.early = store.early, []
            for worker, message, gradient in waiting:
                if worker in store.clocks:
                    self.push(store, worker, message, gradient, apply)

    def _add(self, store: Store, worker: int) -> None:
        number, weight, gradient = store.open[worker]
        store.added.append(worker)
        if not weight:
            return
        if store.total is None:
            store.total = gradient
        else:
            first = next(w for other in store.added if (w := store.open[other][1]))
            if weight != first:
                gradient *= gradient.dtype.type(weight / first)
            store.total += gradient
            store.give_back(gradient)
        store.open[worker] = (number, weight, None)


class Stale(Consistency):
    """ssp with a bound; async with none. Pushes are applied one by one."""

    def __init__(self, bound: float = math.inf):
        self.bound, self.bounded = bound, bound < math.inf
        self.name = f"ssp:{bound:g}" if self.bounded else "async"

    def push(self, store: Store, worker: int, message: Message, gradient: Array | None, apply: Apply) -> bool:
        done = store.clocks[worker]
        if message.clock < done:
            raise Refused(Code.CLOSED, f"clock {message.clock} of {store.key.name} is closed: {done} is open")
        if message.stamp > store.version and not self.patient:
            raise Refused(
                Code.CLOSED,
                f"a gradient taken at version {message.stamp} of {store.key.name}; it is at {store.version}",
            )
        store.clocks[worker] = message.clock + 1
        if gradient is None:
            apply(store, None, [(worker, message.number)], 0.0)
        else:
            gradient = self.corrected(store, worker, gradient)
            apply(store, gradient, [(worker, message.number)], self.scale(store.version - message.stamp))
            store.give_back(gradient)
        return True

    def ready(self, store: Store, clock: int) -> bool:
        return min(store.clocks.values(), default=clock) >= clock - self.bound

    def corrected(self, store: Store, worker: int, gradient: Array) -> Array:
        return gradient

    def scale(self, staleness: int) -> float:
        return 1.0


class Scaled(Stale):
    """async-scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "async-scaled"

    def scale(self, staleness: int) -> float:
        return 1 / max(staleness, 1)


class Compensated(Stale):
    """async-dc. Cost: a copy of the values for each worker."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength, self.name = strength, f"async-dc:{strength:g}"

    def answered(self, store: Store, worker: int) -> None:
        copy = store.pulled.get(worker)
        if copy is None:
            store.pulled[worker] = store.data.copy()
        else:
            copy[...] = store.data

    def corrected(self, store: Store, worker: int, gradient: Array) -> Array:
        if worker in store.pulled:
            drift = store.data - store.pulled[worker]
            drift *= gradient
            drift *= gradient
            drift *= gradient.dtype.type(self.strength)
            gradient += drift
        return gradient


def consistency_of(name: str) -> Consistency:
    """The consistency of a name: one of CHOICES.

    Errors  ValueError: no such name, or a number out of its range
    """
    kind, colon, text = name.partition(":")
    try:
        if kind in ("bsp", "async", "async-scaled") and not colon:
            return {"bsp": Synchronous, "async": Stale, "async-scaled": Scaled}[kind]()
        if kind == "ssp" and int(text) >= 0:
            return Stale(int(text))
        if kind == "backup" and int(text) >= 1:
            return Synchronous(int(text))
        if kind == "async-dc" and 0 <= float(text or 0.04) < math.inf:
            return Compensated(float(text or 0.04))
    except ValueError:
        pass
    raise ValueError(f"consistency {name!r}: choose {CHOICES} (B from 1, S from 0 up)")
