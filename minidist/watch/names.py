"""What can be watched, by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple

from ..collectives import ALGORITHMS
from ..parallel.parameter_server.consistency import CHOICES, consistency_of
from ..parallel.schedules import SCHEDULES

MODES = ("bsp", "backup:1", "ssp:3", "async", "async-scaled", "async-dc:0.04")  # one of each kind


class Subject(NamedTuple):
    """What a name means. `kind` is "collective", "pipeline" or "parameter server"."""

    kind: str
    operation: str  # of a collective; else ""
    name: str  # of the algorithm, schedule or consistency


def able(operation: str, algorithm: str) -> bool:
    """Whether simulated ranks can run it: not MPI's own, nor those that need processes with shared memory."""
    row = ALGORITHMS[operation][algorithm]
    return not row.shared and row.check is None


def collectives() -> list[str]:
    """ "all_reduce ring", ..."""
    return [f"{op} {name}" for op, rows in ALGORITHMS.items() for name in rows if able(op, name)]


def listing() -> str:
    """All names, as text."""
    lines = ["collectives"]
    for operation, rows in ALGORITHMS.items():
        lines.append(f"  {operation:<15}{', '.join(name for name in rows if able(operation, name))}")
    unable = sorted({name for op, rows in ALGORITHMS.items() for name in rows if not able(op, name)})
    lines.append(f"  (not {' and '.join(unable)}: simulated ranks have no MPI library and share no memory)")
    lines += ["pipeline schedules", f"  {', '.join(SCHEDULES)}"]
    lines += ["parameter server", f"  {CHOICES}"]
    return "\n".join(lines)


def subject_of(name: str) -> Subject:
    """What is meant by a name: "1f1b", "ssp:3", "broadcast binomial", or an algorithm alone, "ring".

    An algorithm alone is that of the first operation that has it, so "ring" is "all_reduce ring"; but "naive" is the
    schedule, as the other must be told apart.

    Errors  TypeError: it is no text. ValueError: there is nothing of that name, with near ones; or it can't be watched
    """
    if not isinstance(name, str):
        raise TypeError(f"name {name!r}: expected a text, such as 'ring', '1f1b' or 'ssp:3'")
    words = name.strip().lower().split()
    text = " ".join(words)
    if words[:1] == ["pipeline"] and " ".join(words[1:]) in SCHEDULES:
        text = words[1]
    if text in SCHEDULES:
        return Subject("pipeline", "", text)
    plain = text.replace("-", "_").split()
    if len(plain) == 1:
        plain = [op for op, rows in ALGORITHMS.items() if plain[0] in rows][:1] + plain
    if len(plain) == 2 and plain[1] in ALGORITHMS.get(plain[0], {}):
        if not able(*plain):
            why = "MPI's library does not say what it sends" if plain[1] == "mpi" else "simulated ranks share no memory"
            raise ValueError(f"{name!r} can't be watched: {why}. What can be:\n{listing()}")
        return Subject("collective", *plain)
    if text.split(":")[0] in {mode.split(":")[0] for mode in MODES}:
        return Subject("parameter server", "", consistency_of(text).name)
    every = [*collectives(), *dict.fromkeys(n.split()[1] for n in collectives()), *SCHEDULES, *MODES]
    near = get_close_matches(text.replace("-", "_"), every, 3, 0.5) or get_close_matches(text, every, 3, 0.4)
    if plain[:1] and plain[-1] in ALGORITHMS:
        near = [n for n in collectives() if n.startswith(f"{plain[-1]} ")]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    raise ValueError(f"there is no {name!r} to watch{hint} What there is:\n{listing()}")
