"""The mesh: who shares which axis with whom, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from minidist.comm import Communicator, Network, simulate
from minidist.mesh import AXES, Mesh, check_shape

SHAPES = {1: {}, 2: {"cp": 2}, 4: {"dp": 2, "tp": 2}, 8: {"pp": 2, "ep": 2, "tp": 2}, 12: {"pp": 3, "cp": 2, "tp": 2}}


def members(comm: Communicator, world: Communicator) -> list[int]:
    """The world's ranks of a communicator, in its order, by asking them."""
    mine = np.array([world.rank])
    if comm.rank:
        comm.send(mine, 0)
        return []
    return [world.rank, *(int(comm.recv(np.empty_like(mine), rank)[0]) for rank in range(1, comm.size))]


@on_ranks(1, 2, 4, 8, 12)
def test_an_axis_joins_the_ranks_that_differ_in_it_alone(comm: Communicator) -> None:
    shape = SHAPES[comm.size]
    mesh = Mesh(comm, **shape)
    # Reference: the grid as an array, the last axis fastest.
    grid = np.arange(comm.size).reshape([shape.get(axis, 1) for axis in AXES])
    here = np.argwhere(grid == comm.rank)[0]
    assert list(mesh.coordinates.values()) == here.tolist()
    for i, axis in enumerate(AXES):
        line = grid[tuple(slice(None) if j == i else at for j, at in enumerate(here))]
        along = getattr(mesh, axis)
        assert (along.rank, along.size) == (here[i], len(line))
        assert members(along, comm) in ([], line.tolist())
    assert mesh.rank_of() == comm.rank


@on_ranks(1, 4, 8)
def test_a_communicator_over_several_axes(comm: Communicator) -> None:
    shape = SHAPES[comm.size]
    mesh = Mesh(comm, **shape)
    for axes in itertools.combinations(AXES, 2):
        over = mesh.along(*axes)
        assert over.size == math.prod(shape.get(axis, 1) for axis in axes)
        assert over is mesh.along(*reversed(axes))
    assert mesh.along(*AXES).size == comm.size


def test_the_innermost_axis_stays_on_one_host() -> None:
    def program(comm: Communicator) -> tuple[list[int], list[int]]:
        mesh = Mesh(comm, dp=2, tp=2)
        return [mesh.rank_of(tp=t) for t in (0, 1)], [mesh.rank_of(dp=d) for d in (0, 1)]

    results = simulate(program, 4, network=Network(hosts=(0, 1, 0, 1))).results
    assert [tp for tp, _ in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]  # ranks 0 and 2 share a host
    assert [dp for _, dp in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    "ranks, shape, message",
    [
        (4, {"dp": 3}, "dp=3 makes 3 ranks, but there are 4; what would fit: dp=4"),
        (8, {"pp": 2, "tp": 2}, "pp=2 × tp=2 makes 4 ranks, but there are 8; what would fit: pp=2 × dp=2 × tp=2; pp=2"),
        (1, {"tp": 2}, "tp=2 makes 2 ranks, but there is 1; what would fit: dp=1"),
        (6, {"pp": 4}, "pp=4 makes 4 ranks, but there are 6; what would fit: pp=6; "),
        (4, {"tp": 0, "dp": 4}, "tp=0: an axis has at least 1 rank"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_those_that_would(ranks: int, shape: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_shape(ranks, **{axis: shape.get(axis, 1) for axis in AXES})
    assert str(error.value).startswith(message)


@settings(max_examples=40)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_every_near_miss_fits(ranks: int, pp: int, tp: int, cp: int) -> None:
    shape = dict(dp=1, pp=pp, ep=1, cp=cp, tp=tp)
    try:
        assert math.prod(check_shape(ranks, **shape).values()) == ranks
    except ValueError as error:
        _, _, near = str(error).partition("would fit: ")
        assert near
        for each in near.split("; "):
            sizes = {axis: int(n) for axis, n in (part.split("=") for part in each.split(" × "))}
            assert math.prod(sizes.values()) == ranks
            assert sizes.keys() <= {"dp", *(axis for axis in shape if shape[axis] > 1)}


@on_ranks(2)
def test_what_does_not_exist_is_refused(comm: Communicator) -> None:
    mesh = Mesh(comm, dp=2)
    with pytest.raises(ValueError, match="axis 'xp': the axes are pp, dp, ep, cp, tp"):
        mesh.along("xp")
    with pytest.raises(ValueError, match="dp=2: this axis has 2 ranks"):
        mesh.rank_of(dp=2)
