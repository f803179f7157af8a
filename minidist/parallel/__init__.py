"""Strategies: a model of the engine, trained by the ranks of a communicator, or of a mesh."""

from . import fixed_tree, functions, parameter_server
from .batch_norm import SyncBatchNorm, convert_sync_batchnorm
from .branch import Branches
from .context import ring_attention, ulysses_attention
from .data import DataParallel, data_parallel
from .experts import MixtureOfExperts
from .local_sgd import LocalSGD, diloco, local_sgd
from .overflow import any_rank
from .parameter_server import ParameterServer
from .pipeline import Pipeline
from .replicas import ReplicasDisagree, assert_replicas_agree
from .schedules import SCHEDULES
from .sharded import ShardedOptimizer, bytes_per_rank
from .tensor import (
    ColumnParallelLinear,
    ParallelMLP,
    ParallelSelfAttention,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_cross_entropy,
)
from .timeline import Timeline, play
from .trainer import Trainer

__all__ = [
    "SCHEDULES",
    "Branches",
    "ColumnParallelLinear",
    "DataParallel",
    "LocalSGD",
    "MixtureOfExperts",
    "ParallelMLP",
    "ParallelSelfAttention",
    "ParameterServer",
    "Pipeline",
    "ReplicasDisagree",
    "RowParallelLinear",
    "ShardedOptimizer",
    "SyncBatchNorm",
    "Timeline",
    "Trainer",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "any_rank",
    "assert_replicas_agree",
    "bytes_per_rank",
    "convert_sync_batchnorm",
    "data_parallel",
    "diloco",
    "fixed_tree",
    "functions",
    "local_sgd",
    "parameter_server",
    "play",
    "ring_attention",
    "ulysses_attention",
    "vocab_parallel_cross_entropy",
]
