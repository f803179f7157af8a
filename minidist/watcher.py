"""Who wants to see what the engine does, as it does it: a recorder of timelines, a narrator.

    with watched_by(MyWatcher()):
        loss = criterion(model(x), y)   # forward_begins, forward_ends of every module
        loss.backward()                 # backward_begins, visits (each node), backward_ends
        optimizer.step()                # update_begins, update_ends of every part of its work

Nobody watches unless asked to; then it costs the engine a look at a context variable for each module called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Watcher:
    """What the engine tells. A subclass overrides what it wants to know."""

    def forward_begins(self, module: Any) -> None: ...

    def forward_ends(self, module: Any) -> None: ...

    def backward_begins(self) -> None: ...

    def visits(self, node: Any) -> None:
        """Backward comes to a node: until the next call its derivative is computed."""

    def backward_ends(self) -> None: ...

    def update_begins(self) -> None: ...

    def update_ends(self) -> None: ...


# A context variable: every simulated rank has a context of its own, as every process has.
_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())

current_watchers = _watchers.get  # most often none


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """In here the engine tells `watcher` too what it does."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)
