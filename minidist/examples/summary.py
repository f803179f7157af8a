"""What a run has cost: bytes, time and memory of a rank, from the meters of all."""

from __future__ import annotations

from typing import Any

import numpy as np

import minidist as md
from minidist.comm import Communicator
from minidist.parallel.meter import Meter


def costs_of(meter: Meter, comm: Communicator, seconds: float, steps: int) -> dict[str, Any]:
    """A step of a rank, in the mean over ranks; and the most memory that any rank has used. Every rank calls it."""
    meter.weigh()
    mine = [meter.sent_bytes, meter.sent_messages, seconds - meter.waited, meter.communicated, meter.hidden]
    mean = md.collectives.all_reduce(comm, np.array(mine, float), "mean") / max(steps, 1)
    peak = md.collectives.all_reduce(comm, np.array(list(meter.memory.values()), np.int64), "max")
    names = ("sent_bytes", "sent_messages", "compute_seconds", "communication_seconds", "hidden_seconds")
    return {
        "a_step": dict(zip(names, mean.tolist(), strict=True)),
        "peak_bytes": dict(zip(meter.memory, peak.tolist(), strict=True)),
    }


def in_words(costs: dict[str, Any]) -> str:
    """Three lines."""
    step, peak = costs["a_step"], costs["peak_bytes"]
    names = ("compute_seconds", "communication_seconds", "hidden_seconds")
    busy, sending, hidden = (f"{1e3 * step[name]:.2f} ms" for name in names)
    return (
        f"a rank's step   sent {step['sent_bytes'] / 1e6:.3f} MB in {step['sent_messages']:.1f} messages\n"
        f"                computing {busy}, communicating {sending}, of which hidden {hidden}\n"
        "peak memory     " + ", ".join(f"{kind} {nbytes / 1e6:.1f} MB" for kind, nbytes in peak.items())
    )
