"""Several pieces of work inside of one operation, carried out at once: each goes on while the others wait.

    rank 0 of its host     add up slice 0 | slice 0 on the link to other hosts ......... | slice 0 to all here
                                           | add up slice 1 | slice 1 on the link ............................

The pieces are generators, like the operation itself, and each becomes a Handle in flight; so whoever waits for one of
them keeps all of them moving. A piece needs a lane of its own, since messages of one lane are told apart by their order
only. Lanes must be made before the operation waits for anything: then all ranks make the same ones.
"""

from __future__ import annotations

from ..comm.handle import Handle, Steps
from .lane import Lane


def at_once(comm: Lane, pieces: list[Steps]) -> Steps:
    """Carry out all of them."""
    if len(pieces) == 1:
        yield from pieces[0]
        return
    handles = [Handle(comm.comm, [], piece) for piece in pieces]
    try:
        for handle in handles:
            yield handle
            handle.wait()  # it is done; if it has failed, this raises
    finally:
        for handle in handles:
            handle.cancel()
