"""The parameter server: servers keep the parameters, workers push gradients and pull values.

Read in this order: messages.py (what is said), node.py, server.py and worker.py (who says it), consistency.py (when),
keys.py (who keeps what), scheduler.py and membership.py (who takes part), replication.py (copies), training.py and
layer.py (a model on it).
"""

from .consistency import Consistency, consistency_of
from .keys import Key, Layout, Roles, Stretch
from .messages import Expelled, Kind, Refused, RunOver
from .node import Node
from .report import Report
from .scheduler import WorkerLost
from .server import Server
from .store import Store, add
from .training import ParameterServer
from .worker import Worker

__all__ = [
    "Consistency",
    "Expelled",
    "Key",
    "Kind",
    "Layout",
    "Node",
    "ParameterServer",
    "Refused",
    "Report",
    "Roles",
    "RunOver",
    "Server",
    "Store",
    "Stretch",
    "Worker",
    "WorkerLost",
    "add",
    "consistency_of",
]
