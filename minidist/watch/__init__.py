"""Algorithms to be watched: each is run by the simulator, as it is, and its messages are seen.

    film = watch("ring", ranks=4)
    film.frames[1].moves        who sent what to whom
    film.frames[1].state        what each rank has then
    film.svg("ring.svg")        a picture that moves

    python -m minidist watch ring --ranks 4

Read in this order: observe.py (how messages are seen), collective.py, schedule.py and server.py (what is made of
them), collective_film.py and gantt.py (how it looks), scene.py, svg.py, gif.py and terminal.py (how that is shown).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .film import Film
from .names import listing, subject_of

__all__ = ["Film", "listing", "watch"]


def watch(name: str | Callable[..., Any], ranks: int = 4, **options: Any) -> Film:
    """Run an algorithm on simulated ranks and return what there was to see.

    name     a collective ("ring", "broadcast binomial"), a pipeline schedule ("1f1b"), or a parameter server's
             consistency ("ssp:3"); `listing()` has them all. Or a program of your own: program(comm, array) is called
             on every rank, and adds the ranks' arrays up in place; they are of int64, with an element for each chunk
    options  of a collective: root, chunks, hosts, alpha, beta. Of your own program: those but root. Of a pipeline:
             microbatches, chunks, forward, backward, message. Of a parameter server: steps, straggler, alpha
    Errors   ValueError: there is nothing of that name, and what is near; or numbers that cannot be
             TypeError: an option that it does not have
    """
    if callable(name):
        from .collective import setting
        from .collective_film import CollectiveFilm

        title = getattr(name, "__name__", "program")
        _check(options, ("chunks", "hosts", "alpha", "beta"), title)
        return CollectiveFilm(setting("", title, ranks, program=name, **options))
    subject = subject_of(name)
    if subject.kind == "collective":
        from .collective import setting
        from .collective_film import CollectiveFilm

        _check(options, ("root", "chunks", "hosts", "alpha", "beta"), name)
        return CollectiveFilm(setting(subject.operation, subject.name, ranks, **options))
    if subject.kind == "pipeline":
        from .schedule import PipelineFilm

        _check(options, ("microbatches", "chunks", "forward", "backward", "message"), name)
        return PipelineFilm(subject.name, ranks, **options)
    from .server_film import ServerFilm

    _check(options, ("steps", "straggler", "alpha"), name)
    return ServerFilm(subject.name, ranks, **options)


def _check(options: dict[str, Any], known: tuple[str, ...], name: str) -> None:
    strange = sorted(set(options) - set(known))
    if strange:
        raise TypeError(f"{', '.join(strange)}: to watch {name!r} there are {', '.join(known)}")
