"""Pipeline schedules, watched: the actions of minidist.parallel.schedules, played by the clock of timeline.py."""

from __future__ import annotations

from typing import NamedTuple

from ..parallel.schedules import SCHEDULES, Action, Backward, BackwardInput, BackwardWeight, Forward
from ..parallel.timeline import Span, Timeline, play
from .gantt import Arrow, Bar, GanttFilm
from .words import amount

MOST_RANKS = 16
COLOURS: dict[type[Action], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward",
    BackwardWeight: "weight",
}
NAMES: dict[type[Action], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward to the input",
    BackwardWeight: "the weights' gradient",
}


class Move(NamedTuple):
    """A message between stages: `what` is "y", an activation, or "dx", its gradient, of microbatch `micro`."""

    source: int
    dest: int
    micro: int
    chunk: int  # of the model, where it is needed
    what: str
    sent: float
    time: float


class Doing(NamedTuple):
    """A rank at a moment: at work on `action`; or waiting for a message `needs` (None: it is done)."""

    action: Action | None
    needs: Move | None


class Frame(NamedTuple):
    """What goes on from `time` to the next frame; `moves` came just then. in_flight: forwards not done backward."""

    time: float
    moves: tuple[Move, ...]
    state: tuple[Doing, ...]
    in_flight: tuple[int, ...]


class PipelineFilm(GanttFilm):
    """frames[i].state[rank].action; `timeline` is what was played."""

    frames: list[Frame]

    def __init__(
        self,
        name: str,
        ranks: int = 4,
        microbatches: int | None = None,
        chunks: int | None = None,
        forward: float = 1,
        backward: float = 2,
        message: float = 0,
    ):
        """`forward`, `backward`, `message`: seconds that they take; a backward is half the input's, half the weights'.

        microbatches  None: two for each rank. chunks  of the model on each rank; None: as many as make a difference
        Errors        ValueError: see timeline.play
        """
        schedule = SCHEDULES[name]
        if not 1 <= ranks <= MOST_RANKS:
            raise ValueError(f"ranks={ranks}: expected 1 to {MOST_RANKS}, as more are too many to be seen")
        chunks = (2 if schedule.chunks else 1) if chunks is None else chunks
        microbatches = 2 * ranks if microbatches is None else microbatches
        self.timeline: Timeline = play(
            schedule, ranks, microbatches, chunks,
            forward=forward, backward_input=backward / 2, backward_weight=backward / 2, message=message,
        )  # fmt: skip
        self.name, self.ranks, self.microbatches, self.chunks = name, ranks, microbatches, chunks
        parts = f", {chunks} chunks a rank" if chunks > 1 else ""
        self.title = f"{name}, {amount(ranks, 'rank')}{parts}, {amount(microbatches, 'microbatch')}"
        if microbatches != 1:
            self.title = self.title.replace("microbatchs", "microbatches")
        self.seconds = float(self.timeline.seconds)
        self.unit = float(min(s.end - s.start for spans in self.timeline.spans for s in spans if s.end > s.start))
        self._delay = message if ranks > 1 else 0
        self.frames = self._frames()
        every = [(rank, span) for rank, spans in enumerate(self.timeline.spans) for span in spans]
        self.bars = [self._bar(rank, span) for rank, span in every]
        self.arrows = [
            Arrow(m.source, m.dest, m.sent, m.time, COLOURS[Forward if m.what == "y" else Backward])
            for m in self.messages()
            if m.source != m.dest
        ]
        kinds = dict.fromkeys(type(span.action) for _, span in every)
        self.keys = [(COLOURS[kind], NAMES[kind]) for kind in COLOURS if kind in kinds] + [("cell", "waits")]
        if chunks > 1:
            self.keys[0] = "forward", "forward (paler: odd chunks)"

    # -- what happened --------------------------------------------------------------------------------------------

    def messages(self) -> list[Move]:
        """All that stages hand to one another, in the order in which it comes."""
        found = [self._sends(rank, span) for rank, spans in enumerate(self.timeline.spans) for span in spans]
        return sorted((move for move in found if move), key=lambda move: (move.time, move.source, move.micro))

    def _sends(self, rank: int, span: Span) -> Move | None:
        action = span.action
        stage = action.chunk * self.ranks + rank
        to = stage + action.direction
        if not action.direction or not 0 <= to < self.ranks * self.chunks:
            return None
        what = "y" if action.direction > 0 else "dx"
        chunk, dest = divmod(to, self.ranks)
        return Move(rank, dest, action.micro, chunk, what, span.end, span.end + self._delay)

    def _frames(self) -> list[Frame]:
        messages = self.messages()
        times = {0.0, self.seconds} | {span.start for spans in self.timeline.spans for span in spans}
        times |= {span.end for spans in self.timeline.spans for span in spans} | {move.time for move in messages}
        return [
            Frame(
                time,
                tuple(move for move in messages if move.time == time),
                tuple(self._doing(rank, time, messages) for rank in range(self.ranks)),
                tuple(self._in_flight(rank, time) for rank in range(self.ranks)),
            )
            for time in sorted(time for time in times if time <= self.seconds)
        ]

    def _doing(self, rank: int, now: float, messages: list[Move]) -> Doing:
        for action, start, end in self.timeline.spans[rank]:
            if start <= now < end:
                return Doing(action, None)
            if start > now:
                what = "y" if action.direction > 0 else "dx"
                needs = [m for m in messages if (m.dest, m.micro, m.chunk, m.what) == (rank, *_key(action), what)]
                return Doing(None, needs[0] if needs else None)
        return Doing(None, None)

    def _in_flight(self, rank: int, now: float) -> int:
        begun = sum(isinstance(a, Forward) and start <= now for a, start, _ in self.timeline.spans[rank])
        ends = [end for action, _, end in self.timeline.spans[rank] if isinstance(action, Backward | BackwardWeight)]
        return begun - sum(end <= now for end in ends)

    # -- how it looks ---------------------------------------------------------------------------------------------

    def _bar(self, rank: int, span: Span) -> Bar:
        action = span.action
        letter = chr(ord("a") + action.chunk) if self.chunks > 1 else ""
        short = f"{action.letter}{action.micro}{letter}"
        return Bar(rank, span.start, span.end, COLOURS[type(action)], short, short, bool(action.chunk % 2))

    def rows(self) -> list[str]:
        return [f"rank {rank}" for rank in range(self.ranks)]

    def notes(self, i: int) -> list[str]:
        return [f"{count} in flight" for count in self.frames[i].in_flight]

    def lines(self, i: int) -> list[str]:
        frame = self.frames[i]
        if i == len(self.frames) - 1:
            return [self.summary()]
        return [f"rank {rank} {self._words(doing, frame.time)}" for rank, doing in enumerate(frame.state)]

    def _words(self, doing: Doing, now: float) -> str:
        if doing.action is not None:
            part = f" in chunk {doing.action.chunk}" if self.chunks > 1 else ""
            return f"does {NAMES[type(doing.action)]} of microbatch {doing.action.micro}{part}"
        if doing.needs is None:
            return "is done"
        what = "activation" if doing.needs.what == "y" else "gradient"
        return f"waits for rank {doing.needs.source}: the {what} of microbatch {doing.needs.micro}"

    def summary(self) -> str:
        most = [max(frame.in_flight[rank] for frame in self.frames) for rank in range(self.ranks)]
        return (
            f"{self.title}: {self.seconds:g} s, of which ranks wait {self.timeline.idle:.0%}; "
            f"most in flight {', '.join(map(str, most))}, by rank."
        )


def _key(action: Action) -> tuple[int, int]:
    return action.micro, action.chunk
