"""Ranks and messages: `world()` for the ranks that mpirun started, `simulate()` for many ranks in one process.

    comm = world()
    if comm.rank == 0:
        comm.send(array, dest=1)
    elif comm.rank == 1:
        comm.recv(array, source=0)
"""

from minidist.comm.base import MAX_TAG, Communicator, Request
from minidist.comm.endings import PeerEnded, refuse
from minidist.comm.report import Deadlock, LostMessages
from minidist.comm.simulated import Simulation, alone, simulate
from minidist.comm.world import world

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
