"""The parameter server's messages: their bytes, and what becomes of bytes that are none."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from ps_cases import FIELDS, KINDS, header, post_of, send_raw
from ranks import on_ranks

from minidist.comm import Communicator
from minidist.parallel.parameter_server import Refused, messages
from minidist.parallel.parameter_server.messages import Code, Kind, Message, check, unpack
from minidist.parallel.parameter_server.post import TAG, Post

I64 = st.integers(-(2**63), 2**63 - 1)
ANY = dict(
    key=st.integers(0, 2**16 - 1), dtype=st.integers(0, 255), number=I64, clock=I64, start=I64, size=I64, stamp=I64,
    weight=st.floats(), length=st.integers(0, 1 << 30),
)  # fmt: skip

# -- the header -------------------------------------------------------------------------------------------------------


def test_a_header_has_64_bytes_and_the_fields_stand_where_they_always_stood() -> None:
    assert messages.NBYTES == messages.HEADER.size == 64
    assert list(Message._fields) == list(FIELDS)
    assert (messages.MAGIC, messages.VERSION) == (0x6D64, 1)
    values = (0x6D64, 1, 5, 0x0302, 7, 11, -12, 13, 14, 15, 1.5, 16)
    raw = messages.HEADER.pack(*values)
    for (at, letter), value in zip(FIELDS.values(), values, strict=True):
        assert raw[at : at + struct.calcsize(letter)] == struct.pack("<" + letter, value)
    assert raw[:7] == b"dm\x01\x05\x02\x03\x07"
    assert raw[7] == 0


@pytest.mark.parametrize("name", KINDS)
@given(fields=st.fixed_dictionaries(ANY), at=st.integers(0, 70))
def test_a_header_is_read_as_it_was_written_for_every_kind(name: str, fields: dict[str, Any], at: int) -> None:
    raw = bytes(at) + header(KINDS[name], **fields) + b"rest"
    message = unpack(raw, at)
    expected = dict(magic=0x6D64, version=1, kind=KINDS[name], **fields)
    assert_array_equal(list(message), list(Message(**expected)))  # nan is like nan
    assert message.name == name.lower().replace("_", " ")
    assert messages.HEADER.pack(*message) == raw[at : at + 64] or np.isnan(fields["weight"])


def test_the_numbers_of_the_kinds_do_not_change() -> None:
    order = "register pull pull_rows values push push_rows ack clock deal barrier release heartbeat leave view forward"
    names = [*order.upper().split(), "REPLICATED", "STOP", "STATS", "REFUSED"]
    assert {name: i for i, name in enumerate(names, 1)} == KINDS


def test_the_docstrings_table_has_exactly_the_kinds_that_exist() -> None:
    table = messages.__doc__.split("answer\n", 1)[1].split("\n\n", 1)[0]
    rows = [line.split()[0] for line in table.splitlines()]
    assert rows == list(KINDS)
    assert set(re.findall(r"\b[A-Z_]{3,}\b", messages.__doc__)) - {"UTF", "OSDI"} <= set(KINDS)  # its answers too


@pytest.mark.parametrize(
    ("raw", "code", "text"),
    [
        (b"", Code.NOT_UNDERSTOOD, "a message of 0 bytes, shorter than a header of 64"),
        (header(2)[:63], Code.NOT_UNDERSTOOD, "a message of 63 bytes, shorter than a header of 64"),
        (bytes(64), Code.NOT_UNDERSTOOD, "marked 0x0000 version 0; expected 0x6d64 version 1"),
        (b"\x65" + header(2)[1:], Code.NOT_UNDERSTOOD, "marked 0x6d65 version 1"),
        (header(2)[:2] + b"\x02" + header(2)[3:], Code.NOT_UNDERSTOOD, "version 2; expected 0x6d64 version 1"),
        (header(0), Code.NOT_UNDERSTOOD, "unknown kind 0"),
        (header(20), Code.NOT_UNDERSTOOD, "unknown kind 20"),
        (header(255), Code.NOT_UNDERSTOOD, "unknown kind 255"),
        (header(5, length=-1), Code.WRONG_LENGTH, "a body of -1 bytes; 0 to 1073741824"),
        (header(5, length=(1 << 30) + 1), Code.WRONG_LENGTH, "a body of 1073741825 bytes"),
    ],
)
def test_what_is_no_header_is_refused_by_name(raw: bytes, code: Code, text: str) -> None:
    with pytest.raises(Refused) as refused:
        check(unpack(raw, 0))
    assert refused.value.code == code
    assert text in str(refused.value)


# -- post: parcels and bodies -----------------------------------------------------------------------------------------


def take(post: Post, count: int) -> list[tuple[int, Message, bytes | None]]:
    """The next `count` messages, their bodies as bytes."""
    items = [post.receive(None) for _ in range(count)]
    return [(source, message, None if body is None else body.tobytes()) for source, message, body in items]


def roomy(source: int, message: Message) -> np.ndarray:
    return np.empty(message.length, np.uint8)


# Of bodies: up to 4096 bytes they travel in the parcel, longer ones on their own.
LENGTHS = [0, 1, 7, 8, 9, 0, 100, 4095, 4096, 4097, 3, 70_000, 0, 5]


def content(rank: int, length: int) -> bytes:
    return np.random.default_rng([rank, length]).bytes(length)


@on_ranks(2, 3, 5)
def test_bodies_of_every_length_come_whole_and_in_order(comm: Communicator) -> None:
    post = post_of(comm, roomy)
    for i, length in enumerate(LENGTHS):
        for dest in range(comm.size):
            body = np.frombuffer(content(comm.rank, length), np.uint8)
            post.send(dest, Kind.PUSH, body if length else None, number=i, key=dest, clock=comm.rank)
    post.flush()
    items = take(post, len(LENGTHS) * comm.size)
    for rank in range(comm.size):
        mine = [(message, body) for source, message, body in items if source == rank]
        assert [m.number for m, _ in mine] == list(range(len(LENGTHS)))
        assert [m.length for m, _ in mine] == LENGTHS
        assert all((m.key, m.clock) == (comm.rank, rank) for m, _ in mine)
        assert [body or b"" for _, body in mine] == [content(rank, length) for length in LENGTHS]
    post.finish(5.0)
    # A header each; short bodies padded to 8 bytes, long ones as they are.
    inside = sum(64 + (length + -length % 8 if length <= 4096 else length) for length in LENGTHS)
    assert post.received_bytes == post.sent_bytes == comm.size * inside


@on_ranks(2)
def test_short_messages_share_a_parcel_whose_bytes_are_known(comm: Communicator) -> None:
    post = post_of(comm, roomy)
    if comm.rank == 0:
        post.send(1, Kind.PULL, key=3, number=1, clock=2, start=5, size=6)
        post.send(1, Kind.PUSH, np.arange(3, dtype=np.float32), key=4, dtype=ord("f"), number=2, size=3, weight=2.5)
        post.send(1, Kind.REFUSED, b"no", start=4)
        assert post.sent_bytes == 0  # nothing leaves before `flush`
        post.finish(5.0)
        return
    expected = [
        header(2, key=3, number=1, clock=2, start=5, size=6),
        header(5, key=4, dtype=ord("f"), number=2, size=3, weight=2.5, length=12),
        np.arange(3, dtype="<f4").tobytes() + bytes(4),
        header(19, start=4, length=2),
        b"no" + bytes(6),
    ]
    raw = comm.recv(np.empty(sum(map(len, expected)), np.uint8), 0, TAG)
    assert raw.tobytes() == b"".join(expected)


# -- post: bytes that are no messages ---------------------------------------------------------------------------------

LAST = 77  # number of the good message behind each case
LONG = bytes(range(256)) * 20  # 5120 bytes: a body of its own


def padded(body: bytes) -> bytes:
    return body + bytes(-len(body) % 8)


# The MPI messages that a rank sends; (number, body) of what the other takes in; (number, code) of what it refuses.
CASES: dict[str, tuple[list[bytes], list[tuple[int, bytes]], list[tuple[int, Code]]]] = {
    "good": ([header(2, number=1) + header(5, number=2, length=3) + padded(b"abc")], [(1, b""), (2, b"abc")], []),
    "no padding behind the last body": ([header(5, number=1, length=3) + b"abc"], [(1, b"abc")], []),
    "nothing": ([b""], [], []),
    "shorter than a header": ([header(2)[:40]], [], [(0, Code.NOT_UNDERSTOOD)]),
    "wrong magic": ([b"xx" + header(2, number=1)[2:]], [], [(0, Code.NOT_UNDERSTOOD)]),
    "wrong version": ([header(2, number=1)[:2] + b"\t" + header(2)[3:]], [], [(0, Code.NOT_UNDERSTOOD)]),
    "wrong kind": ([header(77, number=1)], [], [(0, Code.NOT_UNDERSTOOD)]),
    "negative length": ([header(5, number=1, length=-8)], [], [(1, Code.WRONG_LENGTH)]),
    "absurd length": ([header(5, number=1, length=1 << 60)], [], [(1, Code.WRONG_LENGTH)]),
    "a short body cut off": ([header(5, number=1, length=9) + b"abc"], [], [(1, Code.WRONG_LENGTH)]),
    "one in the middle is wrong": (
        [header(2, number=1) + header(5, number=2, length=4) + padded(b"body") + bytes(64) + header(2, number=3)],
        [(1, b""), (2, b"body")],
        [(0, Code.NOT_UNDERSTOOD)],
    ),
    "one in the middle is not wanted": (
        [header(2, number=1) + header(5, key=9, number=2, length=5120), LONG],
        [(1, b"")],
        [(2, Code.UNKNOWN_KEY)],
    ),
    "garbage behind the last message": ([header(2, number=1) + b"garbage"], [(1, b"")], [(0, Code.NOT_UNDERSTOOD)]),
    "a long body": ([header(5, number=1, length=5120), LONG, header(2, number=2)], [(1, LONG), (2, b"")], []),
    "a long body, too short": ([header(5, number=1, length=5120), LONG[1:]], [], [(1, Code.WRONG_LENGTH)]),
    "a long body, too long": ([header(5, number=1, length=5120), LONG + b"x"], [], [(1, Code.WRONG_LENGTH)]),
    "a long body, empty": ([header(5, number=1, length=5120), b""], [], [(1, Code.WRONG_LENGTH)]),
    "garbage behind a header that announces a body": (
        [header(5, number=1, length=5120) + b"garbage", LONG, header(2, number=2)],
        [(2, b"")],
        [(1, Code.NOT_UNDERSTOOD)],
    ),
    "a whole message behind a header that announces a body": (
        [header(5, number=1, length=5120) + header(2, number=3), LONG, header(2, number=2)],
        [(2, b"")],
        [(1, Code.NOT_UNDERSTOOD)],
    ),
    "a body that looks like a message": (
        [header(5, number=1, length=5120), header(2, number=5) * 80],
        [(1, header(2, number=5) * 80)],
        [],
    ),
    "a body that is not wanted and looks like a message": (
        [header(5, key=9, number=1, length=5120), header(2, number=5) * 80],
        [],
        [(1, Code.UNKNOWN_KEY)],
    ),
}


def picky(source: int, message: Message) -> np.ndarray:
    if message.key == 9:
        raise Refused(Code.UNKNOWN_KEY, f"no key {message.key} here")
    return np.empty(message.length, np.uint8)


@pytest.mark.parametrize("case", CASES)
@on_ranks(2, 3)
def test_what_is_not_understood_is_refused_and_what_comes_later_arrives(comm: Communicator, case: str) -> None:
    sent, expected, refused = CASES[case]
    post = post_of(comm, picky)
    if comm.rank:
        for raw in [*sent, header(2, number=LAST)]:
            send_raw(comm, raw, 0)
        answers = take(post, len(refused) + 1)  # and nothing else is refused
        said = [(m.kind, m.number, m.start) for _, m, _ in answers]
        assert said == [*((Kind.REFUSED, n, int(code)) for n, code in refused), (Kind.STOP, 0, 0)]
        assert all(len(body or b"") > 10 for _, _, body in answers[:-1])  # it says why
        return
    got: dict[int, list[tuple[int, bytes]]] = {rank: [] for rank in range(1, comm.size)}
    going = set(got)
    while going:
        source, message, body = take(post, 1)[0]
        if message.number == LAST:
            going.remove(source)
            post.send(source, Kind.STOP)
        else:
            got[source].append((message.number, body or b""))
    assert got == dict.fromkeys(got, expected)
    post.finish(5.0)


@on_ranks(3)
def test_who_announces_a_body_and_does_not_send_it_holds_up_nobody(comm: Communicator) -> None:
    post = post_of(comm, picky)
    if comm.rank == 1:
        send_raw(comm, header(5, number=1, length=5120), 0)
        comm.send(np.zeros(1), 2)
        comm.recv(np.empty(1), 0)
        send_raw(comm, LONG, 0)
    elif comm.rank == 2:
        comm.recv(np.empty(1), 1)
        for i in range(3):
            send_raw(comm, header(2, number=i), 0)
    else:
        assert [(source, m.number) for source, m, _ in take(post, 3)] == [(2, 0), (2, 1), (2, 2)]
        comm.send(np.zeros(1), 1)
        assert take(post, 1)[0][2] == LONG


@given(garbage=st.binary(max_size=300), good=st.integers(0, 3))
@on_ranks(2)
def test_any_bytes_are_taken_in(comm: Communicator, garbage: bytes, good: int) -> None:
    post = post_of(comm, picky)
    if comm.rank:
        first = [header(5, number=i, length=4) + padded(b"body") for i in range(1, good + 1)]
        send_raw(comm, b"".join(first) + garbage, 0)
        send_raw(comm, bytes(5000), 0)  # the body, if the garbage has announced one; else it is refused
        send_raw(comm, header(2, number=LAST), 0)
        while take(post, 1)[0][1].kind != Kind.STOP:
            pass
        return
    numbers: list[int] = []
    while LAST not in numbers:
        numbers.append(take(post, 1)[0][1].number)
    assert numbers[:good] == list(range(1, good + 1))
    post.send(1, Kind.STOP)
    post.finish(5.0)
