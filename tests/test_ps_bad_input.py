"""What is wrong is refused by the rank that gets it, and raised at the rank that said it; all others go on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import ps_cases
import pytest
from numpy.testing import assert_array_equal
from ps_cases import KINDS, Served, by_hand, fields_of, header, send_raw
from ranks import once_on_ranks as on_ranks

from minidist.comm import Communicator, simulate
from minidist.parallel.parameter_server import Expelled, Refused, Server, Stretch, Worker
from minidist.parallel.parameter_server import node as node_module
from minidist.parallel.parameter_server.dealing import Dealer
from minidist.parallel.parameter_server.messages import Code, Kind
from minidist.parallel.parameter_server.post import Post

# Keys 0 (4 float64), 1 (a table of 9 rows of 3 float64) and 2 (2000 float32, whose bodies travel on their own).
STRETCHES = [Stretch("a", 4, "f8"), Stretch("table", 27, "f8", 3), Stretch("long", 2000, "f4")]
STEPS = 3

Wrong = Callable[[Worker], Any]


def ones(n: int, dtype: str = "f8") -> np.ndarray:
    return np.ones(n, dtype)


def rows(*numbers: int) -> dict[str, Any]:
    return dict(rows=np.array(numbers), gradient=np.ones((len(numbers), 3)))


def pushes_twice(worker: Worker) -> int:
    worker.wait(worker.push(0, ones(4) * 0, clock=0))
    return worker.push(0, ones(4), clock=0)


def pushes_twice_at_once(worker: Worker) -> int:
    worker.push(0, ones(4) * 0, clock=0)
    return worker.push(0, ones(4), clock=0)


def from_the_future(worker: Worker) -> int:
    worker.versions[0] = 70
    number = worker.push(0, ones(4))
    worker.versions[0], worker.pushes[0] = 0, 0
    return number


def ask(worker: Worker, kind: int, body: Any = None, dest: int = 0, **fields: Any) -> int:
    """Anything, as a request."""
    order = ("key", "dtype", "clock", "start", "size", "stamp", "weight")
    return worker._ask(dest, kind, body, None, *(fields.get(name, 0) for name in order))


F8, F4 = ord("d"), ord("f")

# What a worker does; the code that it is refused with; words that the refusal has, both values among them.
WRONG: dict[str, tuple[Wrong, Code, list[str]]] = {
    "pull of an unknown key": (lambda w: w.pull(33, ones(4)), Code.UNKNOWN_KEY, ["key 33", "3 keys"]),
    "push to an unknown key": (lambda w: w.push(33, ones(4)), Code.UNKNOWN_KEY, ["key 33", "3 keys"]),
    "long push to an unknown key": (lambda w: w.push(33, ones(4000)), Code.UNKNOWN_KEY, ["key 33", "3 keys"]),
    "push too long": (lambda w: w.push(0, ones(5), 0), Code.WRONG_LENGTH, ["40 bytes, 5 elements", "a (key 0)", "4"]),
    "long push too long": (
        lambda w: w.push(2, ones(2001, "f4"), 0), Code.WRONG_LENGTH, ["8004 bytes, 2001", "long (key 2)", "2000"],
    ),
    "push beyond the end": (lambda w: w.push(0, ones(2), 0, start=3), Code.WRONG_LENGTH, ["2 elements from 3", "4"]),
    "push from a negative start": (lambda w: w.push(0, ones(2), 0, start=-1), Code.WRONG_LENGTH, ["start -1", "0 to"]),
    "push whose size is not its body's": (
        lambda w: ask(w, Kind.PUSH, ones(3), dtype=F8, size=2, weight=1.0), Code.WRONG_LENGTH, ["24 bytes, 2", "4"],
    ),
    "push of negative size": (
        lambda w: ask(w, Kind.PUSH, key=0, dtype=F8, size=-1, weight=1.0), Code.WRONG_LENGTH, ["size -1", "0 to"],
    ),
    "push of a body and no size": (
        lambda w: ask(w, Kind.PUSH, ones(3), key=0, dtype=F8, weight=1.0), Code.WRONG_LENGTH, ["24 bytes, 0", "4"],
    ),
    "pull too long": (lambda w: w.pull(0, ones(5)), Code.WRONG_LENGTH, ["0 … 5", "a (key 0)", "4"]),
    "pull from a negative start": (lambda w: w.pull(0, ones(3), start=-1), Code.WRONG_LENGTH, ["start -1", "0 to"]),
    "pull of a negative size": (lambda w: ask(w, Kind.PULL, start=3, size=-2), Code.WRONG_LENGTH, ["size -2", "0 to"]),
    "push of float32": (lambda w: w.push(0, ones(4, "f4"), 0), Code.WRONG_DTYPE, ["float32", "a (key 0)", "float64"]),
    "push of int64": (lambda w: w.push(0, ones(4, "i8"), 0), Code.WRONG_DTYPE, ["int64", "float64"]),
    "long push of float64": (lambda w: w.push(2, ones(2000), 0), Code.WRONG_DTYPE, ["float64", "float32"]),
    "push of a dtype that is none": (
        lambda w: ask(w, Kind.PUSH, ones(4), dtype=255, size=4, weight=1.0), Code.WRONG_DTYPE, ["code 255", "float64"],
    ),
    "push of objects": (
        lambda w: ask(w, Kind.PUSH, ones(4), dtype=ord("O"), size=4, weight=1.0), Code.WRONG_DTYPE, ["object", "float"],
    ),
    "push with weight nan": (lambda w: w.push(0, ones(4), 0, weight=np.nan), Code.WRONG_LENGTH, ["weight nan"]),
    "push with weight -1": (lambda w: w.push(0, ones(4), 0, weight=-1), Code.WRONG_LENGTH, ["weight -1"]),
    "push with weight inf": (lambda w: w.push(0, ones(4), 0, weight=np.inf), Code.WRONG_LENGTH, ["weight inf"]),
    "push of a row beyond the table": (
        lambda w: w.push_rows(1, **rows(2, 9), clock=0), Code.WRONG_LENGTH, ["2 to 9", "9"],
    ),
    "push of a negative row": (lambda w: w.push_rows(1, **rows(-1, 3), clock=0), Code.WRONG_LENGTH, ["-1 to 3", "9"]),
    "push of more rows than there are": (
        lambda w: w.push_rows(1, **rows(*[0] * 10), clock=0), Code.WRONG_LENGTH, ["10 rows", "9 rows"],
    ),
    "push of rows too short": (
        lambda w: ask(w, Kind.PUSH_ROWS, ones(7), key=1, dtype=F8, size=2, weight=1.0),
        Code.WRONG_LENGTH,
        ["56 bytes, 2 rows"],
    ),
    "pull of a row beyond the table": (
        lambda w: w.pull_rows(1, np.array([0, 9]), np.zeros((2, 3))), Code.WRONG_LENGTH, ["0 to 9", "table (key 1)"],
    ),
    "pull of a negative row": (
        lambda w: w.pull_rows(1, np.array([-9]), np.zeros((1, 3))), Code.WRONG_LENGTH, ["-9 to -9", "table (key 1)"],
    ),
    "pull of more rows than were said": (
        lambda w: ask(w, Kind.PULL_ROWS, np.zeros(2, "i8"), key=1, size=3), Code.WRONG_LENGTH, ["3 rows", "16 bytes"],
    ),
    "register twice": (lambda w: ask(w, Kind.REGISTER), Code.NO_ROLE, ["takes part already"]),
    "stop by a worker": (lambda w: ask(w, Kind.STOP), Code.NO_ROLE, ["not the scheduler"]),
    "a view by a worker": (
        lambda w: ask(w, Kind.VIEW, np.array([0, 1, 0]), stamp=99), Code.NO_ROLE, ["not the scheduler"],
    ),
    "figures by a worker": (lambda w: ask(w, Kind.STATS, np.arange(5)), Code.NO_ROLE, ["not asked"]),
    "values by a worker": (lambda w: ask(w, Kind.VALUES, ones(4)), Code.NO_ROLE, ["not asked"]),
    "a forward by a worker": (lambda w: ask(w, Kind.FORWARD, ones(4), key=9), Code.UNKNOWN_KEY, ["key 9"]),
    "a share for a server": (lambda w: ask(w, Kind.DEAL), Code.NO_ROLE, ["no handler"]),
    "a long word of a kind without a body": (
        lambda w: ask(w, Kind.CLOCK, ones(2000)), Code.WRONG_LENGTH, ["clock", "16000 bytes"],
    ),
}  # fmt: skip
BSP_ONLY: dict[str, tuple[Wrong, Code, list[str]]] = {
    "push for a clock to come": (lambda w: w.push(0, ones(4), clock=5), Code.CLOSED, ["clock 5 of a", "0 is"]),
    "push for a clock before": (lambda w: w.push(0, ones(4), clock=-1), Code.WRONG_LENGTH, ["clock -1"]),
    "push twice": (pushes_twice_at_once, Code.CLOSED, ["clock 0 of a"]),
}
SSP_ONLY: dict[str, tuple[Wrong, Code, list[str]]] = {
    "push for a closed clock": (pushes_twice, Code.CLOSED, ["clock 0 of a is closed", "1 is open"]),
    "push of a gradient from the future": (from_the_future, Code.CLOSED, ["version 70 of a", "it is at"]),
}


DONE = ("push twice", "push for a closed clock")  # in these the first of the steps is made, by zeros


def goes_right(worker: Worker, first: int = 0) -> None:
    for step in range(first, STEPS):
        for key in worker.layout.keys:
            worker.push(key.number, np.full(key.size, worker.comm.rank, key.dtype), step)
        values = [np.zeros(key.size, key.dtype) for key in worker.layout.keys]
        worker.wait(*[worker.pull(key.number, v, step + 1) for key, v in zip(worker.layout.keys, values, strict=True)])
    worker.wait(*worker.requests)


UNDER = {"bsp": {**WRONG, **BSP_ONLY}, "ssp:5": {**WRONG, **SSP_ONLY}}


@pytest.mark.parametrize(("how", "case"), [(how, case) for how, cases in UNDER.items() for case in cases])
@on_ranks(2, 3, 4)
def test_what_is_wrong_is_refused_and_all_go_on(comm: Communicator, case: str, how: str) -> None:
    if comm.size == 2 and case == "push twice":
        return  # a worker alone closes its round at once, so that this is another case: the clock is closed
    wrong, code, words = UNDER[how][case]

    def work(worker: Worker) -> None:
        first = 0
        if comm.rank == 1:
            began = comm.clock()
            with pytest.raises(Refused) as refused:
                number = wrong(worker)
                worker.wait(number)
            assert comm.clock() - began < 2.0  # at once, and not with the next that is said to it
            assert refused.value.code == code
            text = str(refused.value)
            assert text.startswith("rank 0 refused: ")
            assert all(word in text for word in words), text
            if case in DONE:
                for key in worker.layout.keys[1:]:
                    worker.push(key.number, np.zeros(key.size, key.dtype), 0)
                worker.wait(*worker.requests)
                first = 1
        elif case in DONE:
            for key in worker.layout.keys:
                worker.push(key.number, np.zeros(key.size, key.dtype), 0)
            worker.wait(*worker.requests)
            first = 1
        goes_right(worker, first)

    served = by_hand(comm, work, STRETCHES, consistency=how)
    if isinstance(served, Served):
        steps = STEPS - (case in DONE)
        ranks = range(1, comm.size)
        each = steps * (np.mean(ranks) if how == "bsp" else np.sum(ranks))
        for values in served.values:
            assert_array_equal(values, np.full_like(values, each))


@on_ranks(3, 4)
def test_a_key_of_another_server_is_refused(comm: Communicator) -> None:
    def work(worker: Worker) -> None:
        other = worker.layout.of_server(1)[0].number
        with pytest.raises(Refused, match=rf"rank 0 refused: key {other} is not on server 0") as refused:
            worker.wait(ask(worker, Kind.PULL, key=other, size=1))
        assert refused.value.code == Code.UNKNOWN_KEY
        assert not str(refused.value).endswith("; exist")  # "key 2 is not on server 0; exist" says nothing
        goes_right(worker)

    by_hand(comm, work, STRETCHES, servers=2)


@on_ranks(3, 4)
def test_a_worker_that_has_not_registered_is_refused_everything_but_that(comm: Communicator) -> None:
    def work(worker: Worker) -> None:
        if comm.rank == 1:
            for number in (lambda: worker.push(0, ones(4)), lambda: worker.pull(0, ones(4)), lambda: worker.clock(0)):
                with pytest.raises(Expelled, match=r"rank 1 does not take part .*: register first"):
                    worker.wait(number())
            with pytest.raises(Expelled):
                worker.barrier([1.0])
            began = comm.clock()
            with pytest.raises(Expelled):
                worker.wait(worker.push(2, ones(2000, "f4")))  # whose body is thrown away
            assert comm.clock() - began < 2.0
            comm.send(np.zeros(1), 2)
            return
        if comm.rank == 2:
            comm.recv(np.zeros(1), 1)  # (the run is not over before)
        goes_right(worker)

    served = by_hand(comm, work, STRETCHES, registers=lambda rank: rank > 1)
    if comm.rank == 0:
        for values in served.values:
            assert_array_equal(values, np.full_like(values, STEPS * np.mean(range(2, comm.size))))


@pytest.mark.parametrize("kind", ["PUSH", "PULL", "REGISTER", "CLOCK", "BARRIER", "LEAVE"])
def test_a_server_that_does_as_a_worker_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rank 1, a server, says to rank 0 what a worker would, at its second view: after the workers have begun.
    body = np.ones(4).tobytes() if kind == "PUSH" else b""
    fields = dict(dtype=F8, size=4, weight=1.0, length=32) if kind == "PUSH" else dict(number=1)
    refusals = []

    class Talking(Server):
        def on_view(self, source: int, message: Any, body_: Any) -> None:
            super().on_view(source, message, body_)
            if self.comm.rank == 1 and message.stamp == 1:
                self.post._parcels.setdefault(0, bytearray()).extend(header(KINDS[kind], **fields) + body)

    class Noting(Post):
        def refuse(self, dest: int, message: Any, refused: Refused) -> None:
            refusals.append((dest, message.kind, refused.code))
            super().refuse(dest, message, refused)

    def work(worker: Worker) -> None:
        goes_right(worker)
        total, _, of = worker.barrier([1.0])
        assert (total[0], of) == (2, 2)

    monkeypatch.setattr(ps_cases, "Server", Talking)
    monkeypatch.setattr(node_module, "Post", Noting)
    run = simulate(lambda comm: by_hand(comm, work, STRETCHES, servers=2, deadline=100.0), 4)
    assert refusals == [(1, KINDS[kind], Code.NO_ROLE)]
    assert not run.results[0].report.deaths
    for values in run.results[0].values:
        assert_array_equal(values, np.full_like(values, STEPS * 2.5))


@on_ranks(3, 4, 5)
def test_a_barrier_with_other_sizes_is_refused_to_who_comes_later(comm: Communicator) -> None:
    def work(worker: Worker) -> None:
        turn = np.zeros(1)
        if comm.rank == 1:  # it comes first, and waits
            number = worker._ask(0, Kind.BARRIER, np.array([1.0, 2.0]), np.zeros(2), size=2, key=7)
            worker.flush()
            worker.wait(worker.clock(0))  # (so that the scheduler has had the one before)
            comm.send(turn, 2)
            worker.wait(number)
            return
        if comm.rank == 2:
            comm.recv(turn, 1)
            with pytest.raises(Refused, match="barrier 7 with 3 numbers; others are at 7 with 2"):
                worker.barrier([1.0, 2.0, 3.0], label=7)
            with pytest.raises(Refused, match="barrier 8 with 2 numbers; others are at 7 with 2"):
                worker.barrier([1.0, 2.0], label=8)
        total, which, of = worker.barrier([1.0, 2.0], label=7)
        assert_array_equal(total, [comm.size - 1, 2 * (comm.size - 1)])
        assert (which, of) == (comm.rank - 1, comm.size - 1)

    by_hand(comm, work, STRETCHES)


SENSELESS: dict[str, Wrong] = {
    "a barrier of 5 bytes": lambda w: ask(w, Kind.BARRIER, np.zeros(5, np.uint8), size=0),
    "a barrier of fewer numbers than it says": lambda w: ask(w, Kind.BARRIER, ones(2), size=3),
    "clock -1": lambda w: ask(w, Kind.CLOCK, clock=-1),
    "a share's seconds below any": lambda w: ask(w, Kind.CLOCK, clock=0, size=5, weight=5e-324),
    "a share's seconds nan": lambda w: ask(w, Kind.CLOCK, clock=0, size=5, weight=np.nan),
    "a share's seconds negative": lambda w: ask(w, Kind.CLOCK, clock=0, size=5, weight=-1.0),
    "a share of -5 samples": lambda w: ask(w, Kind.CLOCK, clock=0, size=-5, weight=1.0),
    "the largest clock": lambda w: ask(w, Kind.CLOCK, clock=2**63 - 1),
    "a pull for clock -1": lambda w: w.pull(0, ones(4), clock=-1),
    "a pull for the smallest clock": lambda w: w.pull(0, ones(4), clock=-(2**63)),
    "a push of the smallest version": lambda w: ask(
        w, Kind.PUSH, ones(4) * 0, dtype=F8, size=4, stamp=-(2**63), weight=1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("how", ["ssp:5", "async"])
@pytest.mark.parametrize("case", SENSELESS)
def test_figures_without_sense_end_nobody(case: str, how: str, copies: int) -> None:
    """They are refused or taken, as the rank likes that gets them; but the run goes on."""

    def work(worker: Worker) -> None:
        shares = Dealer(10, 4, 2, "by speed")
        if worker.comm.rank == first:
            try:
                worker.wait(SENSELESS[case](worker))
            except Refused as refused:
                assert refused.code != Code.EXPELLED
            worker.pushes[0] = max(worker.pushes[0], 1)
        worker.wait(worker.clock(0, 3, 1.0), worker.push(0, ones(4)))
        for step in (1, 2):
            dealt = worker.wait(worker.clock(step, 3, 1.0))
            assert 0 <= dealt.start <= dealt.start + dealt.size <= 10
        worker.barrier([1.0])
        assert shares.samples == 10

    first, servers = (3, 2) if copies else (1, 1)
    run = simulate(
        lambda comm: by_hand(
            comm, work, STRETCHES, servers, how, copies, dealer=Dealer(10, 4, 2, "by speed"), deadline=100.0
        ),
        first + 2,
    )
    report = run.results[0].report
    assert_array_equal(run.results[0].values[0], [2.0] * 4)
    assert not report.deaths
    assert all(samples >= 0 for samples in report.samples.values())


@pytest.mark.parametrize("copies", [0, 1])
def test_a_push_for_the_last_of_all_clocks_ends_nobody(copies: int) -> None:
    first, servers = (3, 2) if copies else (1, 1)

    def work(worker: Worker) -> None:
        if worker.comm.rank == first:
            try:
                worker.wait(worker.push(0, ones(4), clock=2**63 - 1))
            except Refused:
                worker.wait(worker.push(0, ones(4), clock=0))
        else:
            worker.wait(worker.push(0, ones(4)))

    run = simulate(lambda comm: by_hand(comm, work, STRETCHES, servers, "async", copies, deadline=100.0), first + 2)
    assert_array_equal(run.results[0].values[0], [2.0] * 4)


@on_ranks(2, 3)
def test_a_meeting_of_many_numbers(comm: Communicator) -> None:
    def work(worker: Worker) -> None:
        total, _, _ = worker.barrier(np.arange(600.0) * comm.rank)  # 4800 bytes: a body of its own
        assert_array_equal(total, np.arange(600.0) * sum(range(1, comm.size)))

    by_hand(comm, work, STRETCHES)


# -- ten thousand random strings of bytes -----------------------------------------------------------------------------


def uniform(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.randint(0, 300))]


def number(rng: random.Random) -> int:
    return rng.choice([0, 1, 2, 4, 7, -1, 27, 2000, 2**31, 2**62, 2**63 - 1, -(2**63), rng.getrandbits(63)])


def random_fields(rng: random.Random, registered: bool) -> list[bytes]:
    """Headers that are well made, of fields that are not; with short bodies, long ones, and none."""
    kind = rng.choice(list(KINDS.values()))
    while kind == KINDS["REGISTER"] or (registered and kind in (KINDS["LEAVE"], KINDS["CLOCK"], KINDS["BARRIER"])):
        kind = rng.choice(list(KINDS.values()))  # (what a worker may say, and mean; of them the test above)
    length = rng.choice([0, 0, 1, 8, 32, 40, 216, 4097, 5000, 8000, 8001])
    fields = {name: number(rng) for name in ("number", "clock", "start", "size", "stamp")}
    key, dtype = rng.choice([0, 1, 2, 3, 65535]), rng.choice([F8, F4, 0, 255, ord("O")])
    weight = rng.choice([0.0, 1.0, -1.0, np.nan, np.inf, 1e300])
    if registered and kind in (KINDS["PUSH"], KINDS["PUSH_ROWS"]):
        fields["size"], weight = rng.choice([(-1, 1.0), (3, -1.0), (4, np.nan), (1 << 40, 1.0)])
    raw = header(kind, key=key, dtype=dtype, weight=weight, length=length, **fields)
    if length > 4096:
        return [raw, rng.randbytes(rng.choice([length, length, length - 1, 64]))]
    return [raw + rng.randbytes(rng.choice([length, length + -length % 8, max(length - 1, 0)]))]


def mutated(rng: random.Random, registered: bool) -> list[bytes]:
    """Good messages with one byte changed, or cut off. From who takes part, only such as can't be good any more."""
    good = [
        header(KINDS["PUSH"], key=0, dtype=F8, number=9, size=4, weight=1.0, length=32) + np.ones(4).tobytes(),
        header(KINDS["PUSH_ROWS"], key=1, dtype=F8, number=9, size=1, weight=1.0, length=32) + np.ones(4).tobytes(),
        header(KINDS["PULL"], key=0, number=9, size=4),
        header(KINDS["PULL_ROWS"], key=1, number=9, size=1, length=8) + bytes(8),
        header(KINDS["FORWARD"], key=0, number=1, size=0, weight=1.0, length=40) + bytes(8) + np.ones(4).tobytes(),
        header(KINDS["STOP"], number=9),
        header(KINDS["VIEW"], number=9, stamp=99, length=24) + np.array([0, 1, 0]).tobytes(),
    ]
    raw = bytearray(rng.choice(good))
    if rng.random() < 0.3:
        return [bytes(raw[: rng.randint(0, len(raw) - 1)])]
    at = rng.choice([0, 1, 2]) if registered else rng.randrange(len(raw))
    raw[at] ^= rng.randint(1, 255)
    if raw[3] == KINDS["REGISTER"]:
        return []
    fields = fields_of(bytes(raw))
    if 4096 < fields["length"] <= 1 << 30 and (fields["magic"], fields["version"]) == (0x6D64, 1):
        return [bytes(raw), rng.randbytes(50)]
    return [bytes(raw)]


def bodies(rng: random.Random) -> list[bytes]:
    """Nothing but values."""
    return [np.array([rng.gauss(0, 1) for _ in range(rng.randint(1, 40))]).tobytes()]


def strings(rng: random.Random, registered: bool) -> list[bytes]:
    which = rng.randrange(4)
    if which == 1:
        return random_fields(rng, registered)
    if which == 2:
        return mutated(rng, registered)
    return uniform(rng) if which == 0 else bodies(rng)


START = np.random.default_rng(0).standard_normal(2031)


def attack(comm: Communicator, how: str, count: int, registered: bool, seed: int, servers: dict[int, Server]) -> Any:
    """Rank 1 sends `count` strings to rank 0, registered or not; rank 2 and 3 train before, between and after."""
    answers = 0

    def initial(key: Any) -> np.ndarray:
        begins = sum(s.size for s in STRETCHES[: key.stretch])
        return START[begins : begins + key.size].astype(key.dtype)

    def snapshot() -> list[bytes]:
        return [store.data.tobytes() for _, store in sorted(servers[0].stores.items())]

    def state() -> list[Any]:
        return [(s.version, s.clock, dict(s.clocks), dict(s.seen)) for _, s in sorted(servers[0].stores.items())]

    def work(worker: Worker) -> None:
        nonlocal answers
        turn, post, rng = np.zeros(1), worker.post, random.Random(seed)
        if comm.rank != 1:
            comm.recv(turn, 1)
            for step in range(STEPS):
                for key in worker.layout.keys:
                    worker.push(key.number, np.full(key.size, comm.rank, key.dtype), step, weight=1.0)
                worker.wait(*(n for n in worker.requests))
            return
        # A pull that is answered: all that came before it has been dealt with. (Rank 2 and 3 have not begun.)
        send_raw(post.comm, header(KINDS["PULL"], number=1, key=0, size=4), 0)
        post.receive(None)  # (the server is there)
        before, stood = snapshot(), state()
        sent = 0
        while sent < count:
            for _ in range(50):
                for raw in strings(rng, registered):
                    send_raw(post.comm, raw, 0)
                    sent += 1
            send_raw(post.comm, bytes(80), 0)  # the body of what has announced one; else it is refused as well
            send_raw(post.comm, header(KINDS["PULL"], number=2**40, key=0, size=4, clock=0), 0)
            while (item := post.receive(None))[1].number != 2**40:
                answers += item[1].kind == Kind.REFUSED
            if not registered:
                assert item[1].kind == Kind.REFUSED
            assert snapshot() == before
            assert state() == stood
        comm.send(turn, 2)
        comm.send(turn, 3)
        if registered:
            for step in range(STEPS):
                for key in worker.layout.keys:
                    worker.push(key.number, np.full(key.size, 1, key.dtype), step)
                worker.wait(*worker.requests)
        else:  # what is still on its way to it
            post.finish(5.0)

    def registers(rank: int) -> bool:
        return registered or rank != 1

    return by_hand(comm, work, STRETCHES, 1, how, initial=initial, registers=registers, seen=servers), answers


@pytest.mark.parametrize("how", ["async", "bsp"])
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_ten_thousand_random_strings_change_nothing_and_end_nobody(how: str, registered: bool, seed: int) -> None:
    run = simulate(attack, 4, how, 1300, registered, seed, {}, seed=seed)
    served = run.results[0][0]
    workers = [1, 2, 3] if registered else [2, 3]
    each = STEPS * (np.mean(workers) if how == "bsp" else np.sum(workers))
    got = np.concatenate([v.astype("f8") for v in served.values])
    np.testing.assert_allclose(got, START + each, rtol=1e-5)
    assert run.results[1][1] > 500  # refused, and it was told so
