"""A layer at a worker: pushed as soon as backward has its gradient, pulled before the next forward uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import backend
from ...nn import Module
from ...optim.optimizer import Part
from ...tensor import Tensor
from .keys import Key

if TYPE_CHECKING:
    from .training import ParameterServer


class Layer:
    """A stretch of the parameters at a worker: pushed in backward, pulled before the next forward."""

    def __init__(self, ps: ParameterServer, part: Part, keys: list[Key], rows: bool):
        # Not all workers begin with the same server.
        first = ps.roles.workers.index(ps.comm.rank) % len(keys)
        self.ps, self.part, self.keys = ps, part, keys[first:] + keys[:first]
        self.sparse = rows
        self.trained = [p for p in part.flat.parameters if p.requires_grad]
        self.reset()
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self._finished, last=True)

    def reset(self) -> None:
        """Nothing is on its way."""
        self.pulls: list[int] = []
        self.pushes: list[int] = []
        self.pushed = False
        self.missing = len(self.trained)  # gradients of this backward
        self.rows: np.ndarray | None = None  # those that this step uses

    # -- D.3(4): pull ---------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Ask for the values. Of sparse layers only when it is known which rows are used."""
        self.pushed, self.missing = False, len(self.trained)
        if self.sparse and self.rows is not None:
            self.rows = np.empty(0, np.int64)
            return
        worker, data = self.ps.worker, self.part.flat.data
        self.pulls += [worker.pull(key.number, data[key.start : key.stop], self.ps.clock) for key in self.keys]
        if self.sparse:
            self.rows = np.empty(0, np.int64)

    def before(self, _: Module, arguments: tuple[Any, ...]) -> None:
        """Forward is about to use the parameters."""
        with self.ps.comm.step("D.3(4) pull"):
            self.arrived()
            if self.sparse:
                self._pull_rows(arguments[0])
        self.ps.worker.beat(self.ps.clock)

    def arrived(self) -> None:
        """Wait until the values are here, and until the gradients' memory may be used again."""
        if self.pulls or self.pushes:
            pulls, pushes = self.pulls, self.pushes
            self.pulls, self.pushes = [], []
            self.ps.worker.wait(*pushes, *pulls)
            self.part.flat.changed()

    def _pull_rows(self, indices: Any) -> None:
        data = indices.data if isinstance(indices, Tensor) else indices
        rows = np.unique(backend.to_numpy(data))
        assert self.rows is not None
        new = np.setdiff1d(rows, self.rows)
        if not len(new):
            return
        self.rows = np.union1d(self.rows, rows)
        flat, worker = self.part.flat, self.ps.worker
        table, asked = flat.data.reshape(-1, self.keys[0].width), []
        for key, local, where in self._on_keys(new):
            into = np.empty((len(local), key.width), key.dtype)
            asked.append((worker.pull_rows(key.number, local, into, self.ps.clock), where, into))
        worker.wait(*(number for number, _, _ in asked))
        for _, where, into in asked:
            table[backend.to(where, flat.device)] = backend.to(into, flat.device)
        flat.changed()

    def _on_keys(self, rows: np.ndarray) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Rows by key: (key, their numbers in the key, their numbers in the layer)."""
        for key in self.keys:
            first, last = key.start // key.width, key.stop // key.width
            here = rows[(rows >= first) & (rows < last)]
            yield key, here - first, here

    # -- D.3(4): push ---------------------------------------------------------------------------------------------

    def _finished(self, _: Tensor) -> None:
        """A parameter's gradient is there; if it was the layer's last, it sets off."""
        self.missing -= 1
        if self.ps.syncing and self.missing <= 0:
            if self.pushed:
                raise RuntimeError(
                    "backward adds to gradients that were pushed already: call step() after each backward, or add up "
                    "under no_sync()"
                )
            with self.ps.comm.step("D.3(4) push"):
                self.push()
                self.ps.worker.flush()
                self.ps.worker.poll()
            self.ps.worker.beat(self.ps.clock)

    def push(self) -> None:
        """Push this layer's gradient, unless that is done."""
        if self.pushed:
            return
        ps, worker = self.ps, self.ps.worker
        ps.share()  # nobody pushes before it has its share: see scheduler.py
        self.arrived()
        self.pushed = True
        weight = float(ps._samples)
        if not weight:
            self.pushes += [worker.push(key.number, None, ps.clock) for key in self.keys]
            return
        gradient = self.part.flat.gradient()
        if self.sparse:
            table = gradient.reshape(-1, self.keys[0].width)
            for key, local, where in self._on_keys(self.rows if self.rows is not None else np.empty(0, np.int64)):
                self.pushes.append(
                    worker.push_rows(
                        key.number, local, table[backend.to(where, self.part.flat.device)], ps.clock, weight
                    )
                )
            return
        self.pushes += [
            worker.push(key.number, gradient[key.start : key.stop], ps.clock, weight=weight) for key in self.keys
        ]

    def acknowledged(self) -> int:
        """Wait for this layer's acknowledgements; returns the clock that the servers are at."""
        pushes, self.pushes = self.pushes, []
        return max((self.ps.worker.wait(number).clock for number in pushes), default=0)
