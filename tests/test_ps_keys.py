"""Which server keeps what: every element once, in balance, and little moves when a server comes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minidist.parallel.parameter_server import Layout, Roles, Stretch, keys

DTYPES = ["f2", "f4", "f8"]


@st.composite
def stretches(draw: st.DrawFn) -> list[Stretch]:
    shapes = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.sampled_from(DTYPES)), max_size=8))
    return [Stretch(f"layer {i}", rows * width, dtype, width) for i, (rows, width, dtype) in enumerate(shapes)]


def check(layout: Layout, given_: list[Stretch]) -> None:
    """Every element of every stretch is in exactly one key, cut between rows; keys are numbered, in order."""
    counts = [np.zeros(stretch.size, int) for stretch in given_]
    for i, key in enumerate(layout.keys):
        stretch = given_[key.stretch]
        counts[key.stretch][key.start : key.stop] += 1
        assert key.number == i
        assert 0 <= key.start < key.stop <= stretch.size
        assert key.size == key.stop - key.start
        assert key.start % stretch.width == 0
        assert key.stop % stretch.width == 0
        assert (key.dtype, key.width, key.name) == (np.dtype(stretch.dtype), stretch.width, stretch.name)
        assert 0 <= key.server < layout.servers
    assert all((count == 1).all() for count in counts)
    places = [(key.stretch, key.start) for key in layout.keys]
    assert places == sorted(places)
    assert [[k.number for k in layout.of_stretch(s)] for s in range(len(given_))] == [
        [k.number for k in layout.keys if k.stretch == s] for s in range(len(given_))
    ]
    each = [0] * layout.servers
    for key in layout.keys:
        each[key.server] += key.size * np.dtype(given_[key.stretch].dtype).itemsize
    assert layout.bytes_by_server() == each
    assert sorted(k.number for s in range(layout.servers) for k in layout.of_server(s)) == list(range(len(layout.keys)))


@given(given_=stretches(), servers=st.integers(1, 7))
def test_by_range_covers_every_element_once_in_balance(given_: list[Stretch], servers: int) -> None:
    layout = Layout(given_, servers)
    check(layout, given_)
    order = [key.server for key in layout.keys]
    assert order == sorted(order)  # end to end
    total = sum(s.size * np.dtype(s.dtype).itemsize for s in given_)
    row = max((s.width * np.dtype(s.dtype).itemsize for s in given_), default=0)
    ends = np.cumsum(layout.bytes_by_server())
    for server in range(servers):
        assert abs(ends[server] - total * (server + 1) / servers) <= row / 2 + 1  # each cut, to the nearest row
        assert abs(layout.bytes_by_server()[server] - total / servers) <= row + 2


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 7])
def test_by_range_gives_the_elements_of_an_array_split(servers: int) -> None:
    layout = Layout([Stretch("a", 1000, "f8"), Stretch("b", 9, "f8"), Stretch("c", 41, "f8")], servers)
    flat = np.concatenate([np.full(key.size, key.server) for key in layout.keys])
    assert len(flat) == 1050
    sizes = np.bincount(flat, minlength=servers)
    assert sizes.max() - sizes.min() <= 1


@given(given_=stretches(), servers=st.integers(1, 7), block=st.sampled_from([16, 100, 1 << 18]))
def test_by_hashing_covers_every_element_once(given_: list[Stretch], servers: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "BLOCK", block)
        layout = Layout(given_, servers, "hash")
    check(layout, given_)
    for key in layout.keys:
        row = key.width * key.dtype.itemsize
        assert key.size * key.dtype.itemsize <= max(block, row)


MANY = [Stretch(f"layer {i}", 30 * keys.BLOCK // 4 + 17, "f4") for i in range(60)]  # 1860 pieces


@pytest.mark.parametrize("servers", [2, 3, 5, 8, 16])
def test_by_hashing_no_server_has_twice_its_share(servers: int) -> None:
    # With 64 places each on the circle, a server's share varies by 1/8 (one over the root of 64) of itself.
    each = np.array(Layout(MANY, servers, "hash").bytes_by_server())
    assert each.sum() == sum(s.nbytes for s in MANY)
    assert each.max() <= 1.5 * each.mean()
    assert each.min() >= 0.5 * each.mean()


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 8])
def test_by_hashing_a_new_server_takes_its_share_and_nothing_else_moves(servers: int) -> None:
    before, after = Layout(MANY, servers, "hash").keys, Layout(MANY, servers + 1, "hash").keys
    assert [(k.stretch, k.start, k.stop) for k in before] == [(k.stretch, k.start, k.stop) for k in after]
    moved = Counter(
        (old.server, new.server) for old, new in zip(before, after, strict=True) if old.server != new.server
    )
    assert {to for _, to in moved} == {servers}
    assert 0.5 / (servers + 1) <= moved.total() / len(before) <= 1.5 / (servers + 1)
    if servers > 1:  # by range, most would have: two servers' halves become thirds
        assert len({source for source, _ in moved}) > 1


def test_the_place_of_a_piece_does_not_depend_on_the_process() -> None:
    layout = Layout(MANY[:1], 3, "hash")  # (Python's own hash of a string does: it is salted)
    assert "".join(str(key.server) for key in layout.keys[:12]) == "112121211012"


def test_layouts_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"servers=0: .* at least 1"):
        Layout(MANY, 0)
    with pytest.raises(ValueError, match="sharding 'ring': choose 'range' or 'hash'"):
        Layout(MANY, 1, "ring")
    with pytest.raises(TypeError):
        Layout(MANY, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="65537 keys: a message names 65,536 at most"):
        Layout([Stretch(f"{i}", 1, "f4") for i in range(65537)], 1)
    assert len(Layout([Stretch(f"{i}", 1, "f4") for i in range(65536)], 3).keys) == 65536


# -- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "servers", "copies", "server_ranks", "workers"),
    [
        (2, 1, 0, [0], [1]),
        (4, 1, 0, [0], [1, 2, 3]),
        (5, 2, 0, [0, 1], [2, 3, 4]),
        (4, 3, 0, [0, 1, 2], [3]),
        (4, 2, 1, [1, 2], [3]),
        (7, 3, 2, [1, 2, 3], [4, 5, 6]),
    ],
)
def test_who_does_what(size: int, servers: int, copies: int, server_ranks: list[int], workers: list[int]) -> None:
    roles = Roles(size, servers, copies)
    assert (roles.scheduler, roles.server_ranks, roles.workers) == (0, server_ranks, workers)


@given(size=st.integers(1, 12), servers=st.integers(1, 6), copies=st.integers(0, 5))
def test_every_rank_has_a_role_or_the_roles_are_refused(size: int, servers: int, copies: int) -> None:
    assume(copies < servers)
    needed = servers + (1 if copies else 0)
    if needed >= size:
        with pytest.raises(ValueError, match=rf"servers={servers}.* of {size} ranks: that leaves no worker"):
            Roles(size, servers, copies)
        return
    roles = Roles(size, servers, copies)
    assert sorted({roles.scheduler, *roles.server_ranks, *roles.workers}) == list(range(size))
    assert not set(roles.server_ranks) & set(roles.workers)
    assert (roles.scheduler in roles.server_ranks) == (not copies)


def test_roles_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="servers=0"):
        Roles(3, 0)
    with pytest.raises(ValueError, match=r"copies=2 .* there are 2 servers"):
        Roles(7, 2, 2)
    with pytest.raises(ValueError, match="copies=-1"):
        Roles(7, 2, -1)
