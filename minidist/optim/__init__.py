"""Optimizers, learning-rate schedules, gradient clipping. PyTorch's names and semantics."""

from . import lr_scheduler
from .adam import Adam, AdamW
from .clip import clip_grad_norm_
from .grad_scaler import GradScaler
from .masters import with_master_weights
from .optimizer import Optimizer
from .sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GradScaler",
    "Optimizer",
    "clip_grad_norm_",
    "lr_scheduler",
    "with_master_weights",
]
