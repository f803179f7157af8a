"""`--trace` and `--explain`: what every example lets be seen of itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

import minidist as md
from minidist.comm import Communicator


def add_options(add: Any) -> None:
    add("--explain", action="store_true", help="rank 0 tells what it does, step by step; at length at first")
    add("--trace", metavar="DIR", help="record what every rank does, for `python -m minidist report DIR`")


@contextmanager
def seen(args: argparse.Namespace, comm: Communicator, device: str) -> Iterator[None]:
    """A run that is recorded, and explained, if the options ask for it. Every rank calls it."""
    with ExitStack() as stack:
        if args.trace:
            stack.enter_context(md.trace.record(comm, args.trace, device))
        if args.explain and not args.quiet:
            stack.enter_context(md.trace.narrate(comm, tqdm.write))  # above the bar, if there is one
        yield
    if args.trace and comm.rank == 0 and not args.quiet:
        print(f"recorded in {args.trace}: python -m minidist report {args.trace}", flush=True)
