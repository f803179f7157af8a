"""What a run tells: a bar while an epoch goes on, a line for each, and what it has cost, by the meters of all ranks."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from tqdm import tqdm

import minidist as md
from minidist.comm import Communicator
from minidist.parallel.meter import Meter


def progress(samples: int, epoch: int, args: argparse.Namespace, comm: Communicator) -> tqdm:
    """A bar of so many samples, on rank 0's terminal."""
    return tqdm(
        total=samples,
        desc=f"epoch {epoch + 1:2}/{args.epochs}",
        unit=" samples",
        unit_scale=True,
        leave=False,
        mininterval=0.25,
        ncols=88,
        disable=args.quiet or comm.rank != 0,
    )


def epoch_in_words(epoch: int, epochs: int, loss: float, accuracy: float, samples: int, seconds: float) -> str:
    return (
        f"epoch {epoch + 1:2}/{epochs}   loss {loss:.4f}   test accuracy {accuracy:6.2%}   "
        f"{samples / seconds:7,.0f} samples/s   {seconds:5.1f} s"
    )


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
