"""Strategies: a model of the engine, trained by the ranks of a communicator."""

from .data import DataParallel, data_parallel
from .replicas import ReplicasDisagree, assert_replicas_agree
from .sharded import ShardedOptimizer

__all__ = ["DataParallel", "ReplicasDisagree", "ShardedOptimizer", "assert_replicas_agree", "data_parallel"]
