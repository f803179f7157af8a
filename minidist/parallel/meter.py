"""Where a rank's time and memory go in data parallelism: what the summary of a run tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..comm import Communicator
from ..optim import Optimizer

Span = tuple[float, float]  # start and end, seconds of the communicator's clock


class Meter:
    """Sums over all steps so far; `reset` begins anew.

    waited         seconds in which the program could do nothing but communicate
    communicated   seconds in which something was on its way, waited for or not. What was on its way and not waited for
                   was hidden behind computing: `hidden`. (Not all of that is saved: messages move on only when a rank
                   looks after them, and are on their way a little longer for it.)
    memory         peaks in bytes: "parameters", "gradients", "optimizer" (its state), "activations" (what backward
                   needs of a forward, beside the parameters)
    """

    def __init__(self, comm: Communicator, optimizer: Optimizer):
        self.comm, self.optimizer = comm, optimizer
        self.reset()

    def reset(self) -> None:
        """Forget times and peaks; count bytes and messages from here."""
        self.waited = self.communicated = 0.0
        self.memory = {"parameters": 0, "gradients": 0, "optimizer": 0, "activations": 0}
        self._spans: list[Span] = []
        self._before = self.comm.record.sent_bytes, self.comm.record.sent_messages

    @property
    def hidden(self) -> float:
        return max(0.0, self.communicated - self.waited)

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent (to shared memory: written there). MPI's own collectives are not seen."""
        return self.comm.record.sent_bytes - self._before[0]

    @property
    def sent_messages(self) -> int:
        return self.comm.record.sent_messages - self._before[1]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in here is communication that the program waits for."""
        start = self.comm.clock()
        try:
            yield
        finally:
            self.has_waited(start, self.comm.clock())

    def has_waited(self, start: float, end: float) -> None:
        """The program has waited for communication in this time."""
        self.waited += end - start
        self._spans.append((start, end))

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What is done in here (an evaluation) does not count, but as a peak of memory."""
        self.end_step()
        times, sent = (self.waited, self.communicated), (self.sent_bytes, self.sent_messages)
        yield
        self._spans.clear()
        self.waited, self.communicated = times
        record = self.comm.record
        self._before = record.sent_bytes - sent[0], record.sent_messages - sent[1]

    def on_its_way(self, start: float, end: float | None) -> None:
        """An operation was, in this time."""
        if end is not None:
            self._spans.append((start, end))

    def end_step(self) -> None:
        """All that was begun is done: add up the time."""
        until = float("-inf")
        for start, end in sorted(self._spans):
            self.communicated += max(0.0, end - max(start, until))
            until = max(until, end)
        self._spans.clear()

    def weigh(self, activations: int = 0, trees: int = 0) -> None:
        """Look how much memory is in use now; `trees`: for gradients elsewhere."""
        now = {"parameters": 0, "gradients": trees, "optimizer": 0, "activations": activations}
        for part in self.optimizer.parts:
            for kind, array in (
                ("parameters", part.flat.data),
                ("parameters", part.own_data),
                ("gradients", part.flat._grad),
                ("gradients", part.own_grad),
                *(("optimizer", array) for array in part.state.values()),
            ):
                now[kind] += 0 if array is None else array.nbytes
        before, self.memory = self.memory, {kind: max(nbytes, now[kind]) for kind, nbytes in self.memory.items()}
        for kind, nbytes in self.memory.items():
            if nbytes > before[kind]:
                self.comm.value(f"memory {kind}", nbytes)
