"""Pipeline schedules: what they do, what they hold in memory, and how long they take, without any ranks.

Closed forms are written out here once more, from the papers where they have them, for p ranks, m microbatches, v chunks
a rank, and f, b, w seconds for a chunk's forward, its input's gradient and its weights'. Times are integers, or
Fractions: what is compared is equal, not close.
"""

from __future__ import annotations

import doctest
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidist.comm import Deadlock
from minidist.parallel import timeline
from minidist.parallel.schedules import SCHEDULES, Action, Backward, BackwardInput, BackwardWeight, Forward, Schedule
from minidist.parallel.timeline import Timeline, check, in_flight, play

NAMES = tuple(SCHEDULES)
CHUNKED = tuple(name for name in NAMES if SCHEDULES[name].chunks)
SHAPES = [(p, m) for p in (1, 2, 3, 5) for m in (1, 2, 3, 4, 7, 12)]

ranks = st.integers(1, 6)
several = st.integers(2, 5)
micros = st.integers(1, 13)
chunks = st.integers(1, 4)
time = st.integers(1, 6)
some = settings(max_examples=60)


def actions_of(name: str, p: int, m: int, v: int = 1) -> list[list[Action]]:
    """Of each rank."""
    return [list(SCHEDULES[name](rank, p, m, v)) for rank in range(p)]


def usable(name: str, v: int) -> int:
    return v if name in CHUNKED else 1


def timed(name: str, p: int, m: int, v: int = 1, f: float = 1, b: float = 1, w: float = 1, t: float = 0) -> Timeline:
    return play(name, p, m, v, forward=f, backward_input=b, backward_weight=w, message=t)


# -- what they do


@pytest.mark.parametrize("name", NAMES)
@some
@given(ranks, micros, chunks)
def test_every_microbatch_goes_once_forward_then_once_backward_through_every_chunk(
    name: str, p: int, m: int, v: int
) -> None:
    v = usable(name, v)
    kinds = (Forward, BackwardInput, BackwardWeight) if SCHEDULES[name].splits else (Forward, Backward)
    for actions in actions_of(name, p, m, v):
        place = {action: index for index, action in enumerate(actions)}
        assert len(place) == len(actions) == m * v * len(kinds)
        for micro in range(m):
            for chunk in range(v):
                places = [place[kind(micro, chunk)] for kind in kinds]
                assert places == sorted(places)
        check(actions, m, v)


@pytest.mark.parametrize("name", NAMES)
@some
@given(ranks, micros, chunks)
def test_a_chunk_sums_its_gradients_in_the_order_of_microbatches(name: str, p: int, m: int, v: int) -> None:
    v = usable(name, v)
    for actions in actions_of(name, p, m, v):
        for chunk in range(v):
            for kinds in (Forward, (Backward, BackwardInput), (Backward, BackwardWeight)):
                assert [a.micro for a in actions if isinstance(a, kinds) and a.chunk == chunk] == list(range(m))


def messages(name: str, p: int, m: int, v: int) -> tuple[dict, dict]:
    """What is sent, and what is wanted, in order: {(sender, receiver, direction): [(microbatch, sending stage)]}."""
    sent, wanted = defaultdict(list), defaultdict(list)
    for rank, actions in enumerate(actions_of(name, p, m, v)):
        for action in actions:
            way = {Forward: 1, Backward: -1, BackwardInput: -1, BackwardWeight: 0}[type(action)]
            stage = action.chunk * p + rank
            if way and 0 <= stage + way < p * v:
                sent[rank, (rank + way) % p, way].append((action.micro, stage))
            if way and 0 <= stage - way < p * v:
                wanted[(rank - way) % p, rank, way].append((action.micro, stage - way))
    return sent, wanted


@pytest.mark.parametrize("name", NAMES)
@some
@given(ranks, micros, chunks)
def test_a_rank_wants_messages_in_the_order_in_which_the_other_sends_them(name: str, p: int, m: int, v: int) -> None:
    """Those of one direction, of all chunks together: a tag for the direction is enough."""
    sent, wanted = messages(name, p, m, usable(name, v))
    assert sent == wanted


def test_one_tag_for_both_directions_would_not_be_enough() -> None:
    """Rank 0 sends rank 1 both y and, from its second chunk, dx: in another order than they are wanted."""
    rank0, rank1 = actions_of("interleaved", 2, 5, 2)
    sent = [(a.direction, a.micro) for a in rank0 if isinstance(a, Forward) or a.chunk == 1]
    wanted = [(a.direction, a.micro) for a in rank1 if isinstance(a, Forward) or a.chunk == 0]
    assert sent != wanted
    assert sorted(sent) == sorted(wanted)


@pytest.mark.parametrize("name", NAMES)
@some
@given(ranks, micros, chunks)
def test_how_many_activations_are_in_flight(name: str, p: int, m: int, v: int) -> None:
    v = usable(name, v)
    group = -(-m // max(m // p, 1))  # the length of the first, which is the longest
    for rank, actions in enumerate(actions_of(name, p, m, v)):
        most = {
            "naive": 1,
            "gpipe": m,
            "1f1b": min(m, p - rank),
            "zero-bubble": min(m, p),
            "interleaved": min(m * v, (v - 1) * group + 2 * (p - 1 - rank) + 1),
            "breadth-first": m * v,
        }
        assert in_flight(actions) == most[name]
        if name == "zero-bubble":
            assert in_flight(actions, until=BackwardInput) == most["1f1b"]


def test_interleaved_holds_what_its_papers_say() -> None:
    """Korthikanti et al. 2022: on the first rank 1 + (p - 1)/(p v) times 1F1B's. A chunk is 1/v of a rank's layers."""
    for p, v in ((2, 2), (4, 2), (3, 4)):
        held = in_flight(actions_of("interleaved", p, 4 * p, v)[0])
        assert Fraction(held, v) == p * (1 + Fraction(p - 1, p * v))


# -- how long they take


def seconds(name: str, p: int, m: int, v: int, f: int, b: int, w: int) -> int:
    flush = (m + p - 1) * (f + b + w)
    looped = ((v - 1) * max(m, p) + m + p - 1) * (f + b + w)
    zero = (m + p - 1) * (f + b) + m * w - (min(m, p) - 1) * min(f, b, w)
    naive = m * p * (f + b + w)
    return dict(zip(NAMES, (naive, flush, flush, zero, looped, looped)))[name]


@pytest.mark.parametrize("name", NAMES)
@some
@given(ranks, micros, chunks, time, time, time)
def test_equal_stages_take_exactly_the_time_of_the_closed_form(
    name: str, p: int, m: int, v: int, f: int, b: int, w: int
) -> None:
    v = usable(name, v)
    played = timed(name, p, m, v, f, b, w)
    form, work = seconds(name, p, m, v, f, b, w), m * v * (f + b + w)
    assert played.seconds == form == SCHEDULES[name].seconds(p, m, v, f, b, w)
    assert played.busy == (work,) * p
    assert played.idle == (form - work) / form == SCHEDULES[name].idle(p, m, v, f, b, w)
    assert played.bubble == (form - work) / work


@pytest.mark.parametrize("p, m", SHAPES)
def test_the_bubbles_of_the_papers(p: int, m: int) -> None:
    """A backward takes twice the forward's time, in two equal parts."""
    one = Fraction(1)
    for name in ("gpipe", "1f1b"):
        assert timed(name, p, m, 1, one, one, one).idle == Fraction(p - 1, m + p - 1)
    if m >= p:
        assert timed("zero-bubble", p, m, 1, one, one, one).idle == Fraction(p - 1, 3 * m + p - 1)
        for v in (1, 2, 3):
            for name in CHUNKED:
                assert timed(name, p, m, v, one, one, one).bubble == Fraction(p - 1, v * m)


@some
@given(several, st.integers(2, 13), time, time, time)
def test_naive_is_slower_than_gpipe_which_takes_as_long_as_1f1b_and_zero_bubble_is_faster(
    p: int, m: int, f: int, b: int, w: int
) -> None:
    naive, gpipe, one, zero = (timed(name, p, m, 1, f, b, w) for name in ("naive", "gpipe", "1f1b", "zero-bubble"))
    assert naive.seconds > gpipe.seconds == one.seconds > zero.seconds


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_never_waits(name: str) -> None:
    assert timed(name, 1, 5, usable(name, 3), 1, 2, 3, t=7).idle == 0


# What a message of t seconds adds for each microbatch while the pipeline is full.
PER_MESSAGE: dict[str, Callable[[int, int, int], Fraction | int]] = {
    "naive": lambda p, w, t: 2 * (p - 1) * t,
    "gpipe": lambda p, w, t: 0,
    "1f1b": lambda p, w, t: 2 * t * Fraction(p - 1, p),
    "zero-bubble": lambda p, w, t: max(0, 2 * t - w) * Fraction(p - 1, p),
}


@pytest.mark.parametrize("name", PER_MESSAGE)
@some
@given(several, time, time, time, time)
def test_what_messages_cost_while_the_pipeline_is_full(name: str, p: int, f: int, b: int, w: int, t: int) -> None:
    short, long = (timed(name, p, m, 1, f, b, w, t).seconds for m in (3 * p, 5 * p))
    without = seconds(name, p, 5 * p, 1, f, b, w) - seconds(name, p, 3 * p, 1, f, b, w)
    assert long - short == without + 2 * p * PER_MESSAGE[name](p, w, t)


@some
@given(several, chunks, time, time, time, time)
def test_interleaved_hides_messages_no_longer_than_a_forward_or_a_backward(
    p: int, v: int, f: int, b: int, w: int, t: int
) -> None:
    hidden = min(t, f, b + w)
    short, long = (timed("interleaved", p, m, v, f, b, w, hidden).seconds for m in (2 * p, 4 * p))
    assert long - short == 2 * p * v * (f + b + w)


@some
@given(several, several, st.integers(2, 3), time, time, time)
def test_breadth_first_hides_messages_until_they_hold_up_the_next_chunk(
    p: int, rounds: int, v: int, f: int, b: int, w: int
) -> None:
    """Of the others there remain those that fill the pipeline, and those that drain it."""
    m, t = rounds * p, (rounds - 1) * min(f, b + w)
    without = seconds("breadth-first", p, m, v, f, b, w)
    assert timed("breadth-first", p, m, v, f, b, w, t).seconds == without + 2 * (p - 1) * t
    assert timed("breadth-first", p, m, v, f, b, w, t + 1).seconds > without + 2 * (p - 1) * (t + 1)


def test_uneven_stages_wait_for_the_slowest() -> None:
    played = play("gpipe", 2, 2, forward=[1, 3], backward_input=[1, 1], backward_weight=[0, 1])
    assert [[(span.start, span.end) for span in spans] for spans in played.spans] == [
        [(0, 1), (1, 2), (9, 10), (11, 12)],
        [(1, 4), (4, 7), (7, 9), (9, 11)],
    ]
    assert (played.seconds, played.busy, played.idle, played.bubble) == (12, (4, 10), 10 / 24, 2 / 10)


def test_every_chunk_has_its_own_time() -> None:
    """Stage c p + i is chunk c of rank i."""
    played = play("breadth-first", 2, 1, 2, forward=[1, 2, 3, 4], backward_input=0, backward_weight=[5, 6, 7, 8])
    assert played.spans[1] == (
        (Forward(0, 0), 1, 3),
        (Forward(0, 1), 6, 10),
        (Backward(0, 1), 10, 18),
        (Backward(0, 0), 25, 31),
    )


@pytest.mark.parametrize(
    "sends, starts",
    [
        ("buffered", [(0, 1, 13, 15), (5, 6, 7, 9)]),
        ("rendezvous", [(0, 1, 17, 23), (5, 10, 11, 13)]),
        ("blocking", [(0, 5, 17, 23), (5, 10, 11, 17)]),
    ],
)
def test_when_messages_set_off(sends: str, starts: list[tuple[int, ...]]) -> None:
    """GPipe with two ranks and two microbatches, f = b = w = 1; a message takes 4."""
    played = play("gpipe", 2, 2, message=4, sends=sends)
    assert [tuple(span.start for span in spans) for spans in played.spans] == starts


# -- deadlocks


@pytest.mark.parametrize("sends", ["buffered", "rendezvous"])
@pytest.mark.parametrize("name", NAMES)
def test_with_sends_that_nobody_waits_for_there_is_no_deadlock(name: str, sends: str) -> None:
    for p, m in SHAPES:
        for v in (1, 2, 3):
            play(name, p, m, usable(name, v), message=1, sends=sends)


@pytest.mark.parametrize("name", NAMES)
def test_with_blocking_sends_there_is_one_where_messages_cross(name: str) -> None:
    for p, m in SHAPES:
        if 2 <= p <= m:
            if name in ("naive", "gpipe"):
                assert play(name, p, m, sends="blocking") == play(name, p, m)
            else:
                with pytest.raises(Deadlock):
                    play(name, p, m, usable(name, 2), sends="blocking")


def test_a_deadlock_says_who_waits_for_whom() -> None:
    with pytest.raises(Deadlock) as caught:
        play("1f1b", 3, 4, sends="blocking")
    assert str(caught.value).splitlines() == [
        "no rank can go on",
        "  rank 0 waits for rank 1 to receive y of microbatch 2, made by stage 0",
        "  rank 1 waits for rank 2 to receive y of microbatch 1, made by stage 1",
        "  rank 2 waits for rank 1 to receive dx of microbatch 0, made by stage 2",
    ]


def test_a_schedule_of_ones_own_can_be_played_and_its_deadlock_is_found() -> None:
    def crossed(stage: int, num_stages: int, num_micro: int) -> Iterator[Action]:
        for m in range(num_micro) if stage else reversed(range(num_micro)):
            yield Forward(m)
            yield Backward(m)

    with pytest.raises(Deadlock) as caught:
        play(Schedule("crossed", crossed, SCHEDULES["naive"].seconds), 2, 2)
    assert str(caught.value).splitlines()[1:] == [
        "  rank 0 waits for rank 1 to send dx of microbatch 1, made by stage 1",
        "  rank 1 waits for rank 0 to send y of microbatch 0, made by stage 0",
    ]


# -- pictures


@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_in_the_docstring_is_what_happens(name: str) -> None:
    p, m, v, part = (2, 4, 2, 0.5) if name in CHUNKED else (3, 2 if name == "naive" else 4, 1, 1)
    drawn = re.findall(r"^ *(rank \d .*)$", inspect.getdoc(SCHEDULES[name].actions) or "", re.MULTILINE)
    assert "\n".join(drawn) == timed(name, p, m, v, 1, part, part).picture(1)


def test_a_picture_of_uneven_times() -> None:
    played = play("1f1b", 2, 2, forward=[0.5, 1], backward_input=[0.5, 1], backward_weight=[0.9, 0], message=0.2)
    assert played.picture(unit=0.5).splitlines() == [
        "rank 0  f0 f1 .  .  .  .  B0 B0 B0 .  B1 B1 B1",
        "rank 1  .  f0 f0 B0 B0 f1 f1 B1 B1 .  .  .  .",
    ]


def test_the_example_of_the_timeline() -> None:
    assert doctest.testmod(timeline) == (0, 3)


# -- bad input


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 2, 1), "stage=2, num_stages=2"),
        ((-1, 2, 1), "stage=-1, num_stages=2"),
        ((0, 2, 0), "num_micro=0, num_chunks=1"),
        ((0, 2, 1, 0), "num_micro=1, num_chunks=0"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(name: str, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](*arguments)


def test_several_chunks_are_refused_where_there_can_be_but_one() -> None:
    with pytest.raises(ValueError, match="num_chunks=2: 1f1b has one chunk a rank; several have interleaved, breadth"):
        SCHEDULES["1f1b"](0, 2, 4, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(schedule="2f2b"), "schedule='2f2b': expected one of naive, gpipe"),
        (dict(sends="eager"), "sends='eager': expected one of buffered"),
        (dict(num_stages=0), "num_stages=0"),
        (dict(message=-1), "message=-1"),
        (dict(forward=[1, 2, 3]), r"\[1, 2, 3\] for 2 stages"),
        (dict(backward_weight=-2), r"\[-2, -2\] for 2 stages"),
        (dict(forward=0, backward_input=0, backward_weight=0), "all 0"),
    ],
)
def test_bad_arguments_of_play(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play(**{"schedule": "gpipe", "num_stages": 2, "num_micro": 2, **arguments})


@pytest.mark.parametrize(
    "actions, message",
    [
        ([Forward(0)], "microbatch 0, chunk 0: Forward;"),
        ([Forward(0), Forward(0), Backward(0)], "chunk 0: Forward, Forward, Backward;"),
        ([Backward(0), Forward(0)], "Backward, Forward;"),
        ([Forward(0), BackwardInput(0)], "Forward, BackwardInput;"),
        ([Forward(0), BackwardWeight(0), BackwardInput(0)], "Forward, BackwardWeight, BackwardInput;"),
        ([Forward(0), Backward(0), BackwardWeight(0)], "Forward, Backward, BackwardWeight;"),
        ([Forward(1), Backward(1)], r"forward 1: there are 1 microbatches and 1 chunks"),
        ([Forward(0, 1)], r"forward 0, chunk 1"),
    ],
)
def test_check_finds_what_is_wrong(actions: list[Action], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(actions, num_micro=1)


def test_actions_of_different_kinds_differ() -> None:
    assert len({Forward(0), Forward(0), Backward(0), BackwardInput(0), BackwardWeight(0), Forward(0, 1)}) == 5
    with pytest.raises(AttributeError):
        Forward(0).micro = 1
