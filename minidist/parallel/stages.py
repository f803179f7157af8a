"""M.1 by layer: a model is cut into stages, runs of layers that follow one another, each on one rank.

    layers    embed | block0 | block1 | block2 | block3 | norm | head
    stages    |--------- 0 ---------- | ----------- 1 ------------- |

A `Plan` says which layers each stage has, what flows between the stages (the activations from each to the next, and
skip connections straight from where they are put aside to where they are taken up), and which parameters several
stages share.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np

from .. import backend
from ..collectives import broadcast
from ..comm import Communicator
from ..nn import Module, Parameter, Pop, Sequential, Stash
from ..nn.skip import put_aside
from ..tensor import Tensor

REPEATS = 5  # of a measurement of a layer's time


class Link(NamedTuple):
    """What one stage sends another in every forward, and gets the gradient of in backward."""

    source: int
    dest: int
    name: str  # of the skip connection; "" for the activations, from each stage to the next


@dataclass(frozen=True)
class Plan:
    """How a model is cut.

    stages  the layers of each stage, by name
    links   all that flows between stages: first the activations, in order, then the skip connections
    tied    for each parameter that several stages use, those stages
    """

    stages: list[dict[str, Module]]
    links: list[Link]
    tied: list[tuple[Parameter, list[int]]]


def plan(model: Sequential, stops: Sequence[int]) -> Plan:
    """Cut a model's layers at these places: stage s has the layers stops[s-1] … stops[s] - 1."""
    # M.1 Model partition by layer (按层划分): a stretch of layers for each stage.
    layers = list(model.named_children())
    stages = [dict(layers[start:stop]) for start, stop in pairwise([0, *stops, len(layers)])]
    links = [Link(s, s + 1, "") for s in range(len(stages) - 1)] + _skips(stages)
    users: dict[Parameter, list[int]] = {}
    for s, stage in enumerate(stages):
        for p in Sequential(stage).parameters():
            users.setdefault(p, []).append(s)
    return Plan(stages, links, [(p, used) for p, used in users.items() if len(used) > 1])


def _skips(stages: list[dict[str, Module]]) -> list[Link]:
    """The skip connections that cross the border of a stage."""
    links, open_ends = [], {}
    for s, stage in enumerate(stages):
        for module in Sequential(stage)._all_modules():
            match module[1]:
                case Stash(name=name):
                    open_ends[name] = s
                case Pop(name=name):
                    if name not in open_ends:
                        raise ValueError(f"Pop({name!r}): no Stash of this name comes before it")
                    if open_ends[name] != s:
                        links.append(Link(open_ends[name], s, name))
                    del open_ends[name]
    if open_ends:
        raise ValueError(f"Stash({next(iter(open_ends))!r}): no Pop of this name comes after it")
    return links


# -- where to cut ----------------------------------------------------------------------------------------------------


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Where to cut layers of these costs, so that the most costly stage is as cheap as can be.

    Returns stages - 1 stops. Every stage gets a layer, as long as there are enough; of the best ways to cut, the one
    whose first stages are the fullest.

    Cost  O(stages n²), for n layers
    """
    n = len(costs)
    filled = min(stages, n)
    until = [0.0, *np.cumsum(np.asarray(costs, float)).tolist()]
    # best[k][i]: the cost of the most costly stage, when the layers from i on are cut into k stages
    best = [[float("inf")] * (n + 1) for _ in range(filled + 1)]
    best[0][n] = 0.0
    for k in range(1, filled + 1):
        for i in range(n - k, -1, -1):
            best[k][i] = min(max(until[j] - until[i], best[k - 1][j]) for j in range(i + 1, n - k + 2))
    stops, i = [], 0
    for k in range(filled, 1, -1):
        i = max(j for j in range(i + 1, n - k + 2) if max(until[j] - until[i], best[k - 1][j]) <= best[filled][0])
        stops.append(i)
    return stops + [n] * (stages - max(filled, 1))


def where_to_cut(
    model: Sequential, stages: int, cut: str | Sequence[int], comm: Communicator, sample: object
) -> list[int]:
    """The stops of a cut "bytes", "time" or by hand: the numbers of the layers that stages 1, 2, … begin with.

    bytes   each stage has about the same number of bytes of parameters
    time    each stage takes about as long, by what rank 0 measures with `sample`, an array of inputs
    Errors  ValueError: a list of another length, or whose numbers don't go up; "time" without a sample
    """
    layers = list(model.children())
    if not isinstance(cut, str):
        stops = [operator.index(stop) for stop in cut]
        if len(stops) != stages - 1 or any(a > b for a, b in pairwise([0, *stops, len(layers)])):
            raise ValueError(
                f"cut={list(cut)}: for {stages} stages of {len(layers)} layers give {stages - 1} "
                f"numbers from 0 to {len(layers)}, none less than the one before"
            )
        return stops
    if cut == "bytes":
        return balanced([sum(p.data.nbytes for p in layer.parameters()) for layer in layers], stages)
    if cut == "time":
        if sample is None:
            raise ValueError("cut='time' needs sample=, an array of inputs to measure the layers with")
        return balanced(broadcast(comm, measured(model, sample)).tolist(), stages)
    raise ValueError(f"cut={cut!r}: choose 'bytes', 'time', or a list of the layers that stages begin with")


def measured(model: Sequential, sample: object) -> np.ndarray:
    """Seconds that each layer's forward and backward take with this input: the medians of a few.   (layers,) float64"""
    seconds = np.zeros((REPEATS, len(model)))
    state = backend.default_generator().numpy.bit_generator.state
    for row in seconds:
        x = Tensor(backend.asarray(sample))
        with put_aside({}):
            for i, layer in enumerate(model):
                start = perf_counter()
                x = x.detach()
                if x.dtype.kind == "f":
                    x.requires_grad_()
                y = layer(x)
                if y.requires_grad and y is not x:
                    y.backward(backend.namespace(y.data).ones_like(y.data))
                    backend.synchronize()
                row[i] = perf_counter() - start
                x = y
    model.zero_grad()
    backend.default_generator().numpy.bit_generator.state = state
    return np.median(seconds, axis=0)
