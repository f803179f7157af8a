"""Modules: networks and their parts, with PyTorch's names, parameter layouts and initial distributions."""

from . import functional, init
from .attention import MultiHeadAttention, MultiheadAttention
from .flat import FlatBuffer, flatten
from .layers import BatchNorm2d, Conv2d, Embedding, LayerNorm, Linear, RMSNorm
from .module import Module, ModuleList, Parameter, Sequential
from .simple import (
    GELU,
    AvgPool2d,
    CrossEntropyLoss,
    Dropout,
    Flatten,
    Identity,
    L1Loss,
    LeakyReLU,
    MaxPool2d,
    MSELoss,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .skip import Pop, Stash

__all__ = [
    "GELU",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "FlatBuffer",
    "Flatten",
    "Identity",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MSELoss",
    "MaxPool2d",
    "Module",
    "ModuleList",
    "MultiHeadAttention",
    "MultiheadAttention",
    "Parameter",
    "Pop",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Stash",
    "Tanh",
    "flatten",
    "functional",
    "init",
]
