"""Ranks and messages: `world()` for the ranks that mpirun started, `simulate()` for many ranks in one process.

comm = world()
if comm.rank == 0:
    comm.send(array, dest=1)
elif comm.rank == 1:
    comm.recv(array, source=0)
"""

from .base import MAX_TAG, Communicator, Envelope, Request
from .deaths import PeerEnded, PeerFailed
from .endings import refuse
from .faults import Delay, Fault, Hang, Kill, Partition, Slow, Strike
from .handle import Handle, helper_thread
from .network import Link, Network
from .report import Deadlock, LostMessages
from .simulated import Simulation, alone, simulate
from .world import world

__all__ = [
    "MAX_TAG",
    "Communicator",
    "Deadlock",
    "Delay",
    "Envelope",
    "Fault",
    "Handle",
    "Hang",
    "Kill",
    "Link",
    "LostMessages",
    "Network",
    "Partition",
    "PeerEnded",
    "PeerFailed",
    "Request",
    "Simulation",
    "Slow",
    "Strike",
    "alone",
    "helper_thread",
    "refuse",
    "simulate",
    "world",
]
