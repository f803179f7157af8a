"""Ranks and messages: `world()` for the ranks that mpirun started, `simulate()` for many ranks in one process.

comm = world()
if comm.rank == 0:
    comm.send(array, dest=1)
elif comm.rank == 1:
    comm.recv(array, source=0)
"""

from .base import MAX_TAG, Communicator, Request
from .endings import PeerEnded, refuse
from .report import Deadlock, LostMessages
from .simulated import Simulation, alone, simulate
from .world import world

__all__ = [
    "MAX_TAG",
    "Communicator",
    "Deadlock",
    "LostMessages",
    "PeerEnded",
    "Request",
    "Simulation",
    "alone",
    "refuse",
    "simulate",
    "world",
]
