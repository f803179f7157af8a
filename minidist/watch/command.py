"""`python -m minidist watch NAME`: a film in the terminal, or as a file."""

from __future__ import annotations

import argparse
from typing import Any

from . import listing, watch
from .terminal import show, style_of

OPTIONS = ("root", "chunks", "hosts", "microbatches", "message", "steps", "straggler")  # those of `watch`


def main(argv: list[str]) -> None:
    """Errors  SystemExit: there is nothing of that name, or it cannot be watched so; with why"""
    args = parser().parse_args(argv)
    if not args.name:
        print(f"What can be watched:\n\n{listing()}")
        return
    options: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    try:
        if args.speed is not None and not args.speed > 0:
            raise ValueError(f"--speed {args.speed}: expected frames a second, above 0")
        film = watch(" ".join(args.name), args.ranks, **options)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"minidist watch: {error}") from None
    if args.svg:
        film.svg(args.svg)
    if args.gif:
        try:
            film.gif(args.gif)
        except ImportError as error:
            raise SystemExit(f"minidist watch: --gif needs Pillow ({error}); pip install pillow") from None
    for path in filter(None, (args.svg, args.gif)):
        print(f"{path}: {film.summary()}")
    if not (args.svg or args.gif):
        show(film, style_of(args.ascii, args.width), not args.no_pause, args.speed)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m minidist watch",
        description="Run an algorithm on simulated ranks and step through what happened, message by message.",
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("name", nargs="*", help="ring, broadcast binomial, 1f1b, ssp:3, ...; none: list them")
    found.add_argument("--ranks", type=int, default=4, help="how many (default 4)")
    found.add_argument("--root", type=int, help="of a broadcast, reduce, scatter or gather")
    found.add_argument("--chunks", type=int, help="of the array; or of the model on each rank of a pipeline")
    found.add_argument("--hosts", type=int, help="to which the ranks are dealt")
    found.add_argument("--microbatches", type=int, help="of a pipeline (default: two for each rank)")
    found.add_argument(
        "--message", type=float, help="seconds that one takes between a pipeline's stages, beside 1 a forward"
    )
    found.add_argument("--steps", type=int, help="of each worker of a parameter server")
    found.add_argument("--straggler", type=float, help="how many times slower the last worker is (default 3)")
    found.add_argument("--svg", metavar="FILE", help="write an animated picture, in the place of showing it here")
    found.add_argument("--gif", metavar="FILE", help="the same as GIF")
    found.add_argument("--speed", type=float, metavar="X", help="X frames a second, without waiting for keys")
    found.add_argument("--no-pause", action="store_true", help="print all frames (as when output is no terminal)")
    found.add_argument("--ascii", action="store_true", help="no signs beyond ASCII")
    found.add_argument("--width", type=int, help="of the terminal, in letters")
    return found
