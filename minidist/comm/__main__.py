"""`mpirun -n 4 python -m minidist.comm tune`: measure which algorithm is fastest on this machine, and remember it."""

from __future__ import annotations

import argparse
import sys

from minidist.collectives.tuning import SIZES, Tuning, tune
from minidist.comm import refuse, world
from minidist.comm.stored import tuning_file


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m minidist.comm",
        description='Measure what algorithm="auto" of the collectives chooses by. Start it under mpirun, with the '
        "number of ranks that you will use: mpirun -n 4 python -m minidist.comm tune",
    )
    parser.add_argument("command", choices=["tune"])
    parser.add_argument("--largest", type=int, default=SIZES[-1], metavar="BYTES", help="of the arrays (%(default)s)")
    args = parser.parse_args()
    comm = world()
    if comm.size == 1:
        refuse(comm, "nothing to measure on one rank: mpirun -n 4 python -m minidist.comm tune")
    if args.largest < SIZES[0]:
        refuse(comm, f"--largest {args.largest}: the smallest size measured is {SIZES[0]} bytes")
    say = print if comm.rank == 0 else (lambda *_, **__: None)
    new = tune(comm, Tuning.read(comm.tuning), lambda text: say(text, flush=True), args.largest)
    if comm.rank == 0:
        file = tuning_file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(new.write(), "utf-8")
        except OSError as error:
            print(f"cannot keep the result: {error}; MINIDIST_TUNING names another file", file=sys.stderr)
            sys.exit(1)
        print(f"kept in {file}")


if __name__ == "__main__":
    main()
