"""Strategies: a model of the engine, trained by the ranks of a communicator."""

from .batch_norm import SyncBatchNorm, convert_sync_batchnorm
from .data import DataParallel, data_parallel
from .replicas import ReplicasDisagree, assert_replicas_agree
from .sharded import ShardedOptimizer

__all__ = [
    "DataParallel",
    "ReplicasDisagree",
    "ShardedOptimizer",
    "SyncBatchNorm",
    "assert_replicas_agree",
    "convert_sync_batchnorm",
    "data_parallel",
]
