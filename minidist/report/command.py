"""The command `python -m minidist report DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..trace.chrome import write_chrome
from ..trace.read import read
from .page import write_page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidist report",
        description="A traced run as one page to look at, which needs no network; and as files for other programs.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what the run's --trace DIR has written")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    parser.add_argument("--chrome", metavar="FILE", type=Path, help="also a trace for https://ui.perfetto.dev")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="also pictures, PNG and SVG (needs the extra `plot`)")
    args = parser.parse_args(argv)
    try:
        trace = read(args.folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"minidist report: {error}") from None
    for note in trace.notes:
        print(f"note: {note}", file=sys.stderr)
    write_page(trace, args.output)
    written = [args.output]
    if args.chrome:
        write_chrome(trace, args.chrome)
        written.append(args.chrome)
    if args.plots:
        from ..trace.plots import write_plots

        try:
            written += write_plots(trace, args.plots)
        except ImportError as error:
            raise SystemExit(
                f'minidist report: --plots needs matplotlib: pip install "minidist[plot]" ({error})'
            ) from None
    for path in written:
        print(f"{path}   {path.stat().st_size / 1e6:.2f} MB")
