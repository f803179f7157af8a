"""The table of what every rank is doing, in words: who waits for whom, in which operation, at which line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .record import aligned
from .status import DIED, ENDED, RUNS, WAITS, Status
from .where import shortened

LONGEST = 64  # ranks that are listed; of more, first those that do not wait
NO_ANSWER = "no answer (stopped, or inside a call that holds Python)"
STATES = {RUNS: "runs", WAITS: "waits", ENDED: "has ended", DIED: "has died"}


def table(title: str, size: int, answers: Mapping[int, Status]) -> str:
    """The whole report; `answers` are the status of each rank that has given it."""
    waits = {rank: _awaited(rank, answers) for rank, status in answers.items() if status.state == WAITS}
    text = [title, *_rows(size, answers, waits)]
    around = circle(waits)
    if around:
        chain = " waits for ".join(f"rank {rank}" for rank in (*around, around[0]))
        text.append(f"A circle of {len(around)}: {chain}")
    awaited = {peer for peers in waits.values() for peer in peers}
    absent = [rank for rank in range(size) if rank not in waits and rank in awaited]
    if absent:
        text.append(f"Waited for, but not waiting: {_ranks(absent)}")
    return "\n".join([*text, *_uneven(answers)]) + "\n"


def circle(waits: Mapping[int, Iterable[int]]) -> list[int]:
    """Ranks of which each waits for the next, and the last for the first; empty if there are none such."""
    finished: set[int] = set()
    for start in waits:
        # Depth first: `path` is how we came here, `branches` what is left to try at each rank on it.
        path, branches = [start], [iter(waits[start])]
        while path:
            peer = next(branches[-1], None)
            if peer is None:
                finished.add(path.pop())
                branches.pop()
            elif peer in path:
                return path[path.index(peer) :]
            elif peer in waits and peer not in finished:
                path.append(peer)
                branches.append(iter(waits[peer]))
    return []


def _awaited(rank: int, answers: Mapping[int, Status]) -> list[int]:
    """Whom a rank waits for. Where several have to meet (in a split), those that are there do not count."""
    me = answers[rank]
    if len(me.peers) < 2:
        return me.peers

    def is_there(peer: int) -> bool:
        other = answers.get(peer)
        if other is None or other.state != WAITS or {peer, *other.peers} != {rank, *me.peers}:
            return False
        return other.operation.partition("(")[0] == me.operation.partition("(")[0]

    return [peer for peer in me.peers if not is_there(peer)]


def _rows(size: int, answers: Mapping[int, Status], waits: Mapping[int, list[int]]) -> list[str]:
    """Two lines a rank: what it does, and where."""
    listed = sorted(sorted(range(size), key=lambda rank: rank in waits)[:LONGEST])
    rows = [("rank", "host", "does", "seconds", "for rank", "step", "operation")]
    for rank in listed:
        if rank not in answers:
            rows.append((str(rank), "?", NO_ANSWER, "", "", "", ""))
            continue
        status = answers[rank]
        whom = shortened(waits[rank]) if rank in waits else ""
        does, seconds = STATES[status.state], "" if status.state in (ENDED, DIED) else f"{status.seconds:.1f}"
        rows.append((str(rank), status.host, does, seconds, whom, status.label, status.operation))
    # NO_ANSWER is longer than its column; it is put in when the columns' widths are known.
    short = [tuple("\0" if cell == NO_ANSWER else cell for cell in row) for row in rows]
    head, *lines = (line.replace("\0", NO_ANSWER) for line in aligned(short, right=1))
    text = [head]
    for rank, line in zip(listed, lines):
        text.append(line)
        if rank in answers and answers[rank].place:
            text.append(f"      at {answers[rank].place}")
    if len(listed) < size:
        text.append(f"  and {size - len(listed)} more")
    return text


def _uneven(answers: Mapping[int, Status]) -> list[str]:
    """A line for each group on which ranks have started different numbers of collectives."""
    started: dict[tuple[int, str], dict[int, list[int]]] = {}  # group: number of collectives: ranks
    for rank in sorted(answers):
        for check, count, name in answers[rank].groups:
            started.setdefault((check, name), {}).setdefault(count, []).append(rank)
    lines = []
    for (_, name), ranks_by_count in started.items():
        if len(ranks_by_count) > 1:
            (most, ahead), *rest = sorted(ranks_by_count.items(), reverse=True)
            has = "has" if len(ahead) == 1 else "have"
            behind = ", ".join(f"{_ranks(ranks)} only {count}" for count, ranks in rest)
            lines.append(f"On {name} {_ranks(ahead)} {has} started {most} collective{'s' * (most != 1)}, {behind}")
    return lines


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {shortened(ranks)}"
