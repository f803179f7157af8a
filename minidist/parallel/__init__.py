"""Strategies: a model of the engine, trained by the ranks of a communicator."""

from . import fixed_tree, parameter_server
from .batch_norm import SyncBatchNorm, convert_sync_batchnorm
from .data import DataParallel, data_parallel
from .local_sgd import LocalSGD, diloco, local_sgd
from .parameter_server import ParameterServer
from .replicas import ReplicasDisagree, assert_replicas_agree
from .sharded import ShardedOptimizer, bytes_per_rank

__all__ = [
    "DataParallel",
    "LocalSGD",
    "ParameterServer",
    "ReplicasDisagree",
    "ShardedOptimizer",
    "SyncBatchNorm",
    "assert_replicas_agree",
    "bytes_per_rank",
    "convert_sync_batchnorm",
    "data_parallel",
    "diloco",
    "fixed_tree",
    "local_sgd",
    "parameter_server",
]
