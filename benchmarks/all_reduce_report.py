"""What all_reduce.py makes of its measurements: the table, the judgement against our targets, the model, the plot.

A report is what rank 0 measured: `seconds[contender][str(nbytes)]` is a list with each repeat's time of one call on the
slowest rank; `ranks`, `hosts`, `bandwidth` (bit/s between hosts, or None) and so on say of what.
"""

from __future__ import annotations

import math
import statistics
from itertools import combinations
from pathlib import Path

from common import spread

OURS, MPI, IN_PLACE, GLOO, COPY = "minidist ", "MPI_Allreduce", "MPI_Allreduce in place", "Gloo", "copy"
AUTO, HIERARCHICAL = OURS + "auto", OURS + "hierarchical"
EXCHANGE, CALL = "exchange", "call"  # of a bare Sendrecv with the neighbours, and with no one

# -- single figures -------------------------------------------------------------------------------------------------


def algbw(nbytes: int, seconds: float) -> float:
    """Bytes of the array per second."""
    return nbytes / seconds


def busbw(ranks: int, nbytes: int, seconds: float) -> float:
    """Bytes per second that each rank must send at the least, 2 (P-1)/P of the array: comparable for all P."""
    return algbw(nbytes, seconds) * 2 * (ranks - 1) / ranks


def link_seconds(hosts: int, nbytes: int, bandwidth: float) -> float:
    """The least that an all-reduce takes: each host sends and receives 2 (h-1)/h of the array, at `bandwidth` bit/s."""
    return nbytes * 2 * (hosts - 1) / hosts * 8 / bandwidth


def times(report: dict, name: str, nbytes: int) -> list[float]:
    return report["seconds"].get(name, {}).get(str(nbytes), [])


def median(report: dict, name: str, nbytes: int) -> float:
    return statistics.median(times(report, name, nbytes))


def ratios(report: dict, theirs: str, ours: str, nbytes: int) -> list[float]:
    """Their time over ours, in each repeat: above 1 where ours is faster. Empty if either was not measured."""
    return [a / b for a, b in zip(times(report, theirs, nbytes), times(report, ours, nbytes))]


def best(report: dict, nbytes: int) -> str:
    """Our algorithm with the least median at this size; auto, which only chooses among them, is not one."""
    names = [name for name in report["seconds"] if name.startswith(OURS) and name != AUTO]
    return min(names, key=lambda name: median(report, name, nbytes))


def bytes_text(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


# -- the table ------------------------------------------------------------------------------------------------------


def table(report: dict) -> list[str]:
    P = report["ranks"]
    link = f", {report['bandwidth'] / 1e6:g} Mbit/s between them" if report["bandwidth"] else ""
    where = "one host" if report["hosts"] == 1 else f"{report['hosts']} hosts of {report['per_host']}{link}"
    lines = [f"{P} ranks on {where}, {report['library']}; {report['repeats']} repeats, median (range)"]
    if report["left_out"]:
        lines.append(report["left_out"])
    peers = [name for name in (MPI, IN_PLACE, GLOO) if name in report["seconds"]]
    heads = {MPI: "MPI / this", IN_PLACE: "in place / this", GLOO: "Gloo / this"}
    head = f"{'size':>8}  {'contender':<29}{'time, µs':<37}{'algbw, GB/s':<13}{'busbw, GB/s':<13}{'of copy':<9}"
    lines.append((head + "".join(f"{heads[peer]:<22}" for peer in peers)).rstrip())
    for nbytes in report["sizes"]:
        copied = median(report, COPY, nbytes)
        for name in report["seconds"]:
            if not times(report, name, nbytes):
                continue
            middle = median(report, name, nbytes)
            line = f"{bytes_text(nbytes):>8}  {name:<29}"
            line += f"{spread([t * 1e6 for t in times(report, name, nbytes)], ',.1f' if middle < 1e-3 else ',.0f'):<37}"
            if name not in (EXCHANGE, CALL):
                line += f"{algbw(nbytes, middle) / 1e9:<13.3f}"
            if name not in (EXCHANGE, CALL, COPY):
                bus = busbw(P, nbytes, middle)
                line += f"{bus / 1e9:<13.3f}{bus * copied / nbytes:<9.0%}"
                line += "".join(f"{spread(ratios(report, peer, name, nbytes), '.2f'):<22}" for peer in peers)
            lines.append(line.rstrip())
    return lines


# -- the judgement --------------------------------------------------------------------------------------------------


def judgement(report: dict) -> list[str]:
    """Our targets, each with what was measured."""
    return across_hosts(report) if report["hosts"] > 1 else on_one_host(report)


def on_one_host(report: dict) -> list[str]:
    P = report["ranks"]
    lines = [f"On {P} ranks of one host, {report['library']}:"]
    long = [n for n in report["sizes"] if n >= 256 << 10]
    short = [n for n in report["sizes"] if n <= 16 << 10]
    for peer in (MPI, IN_PLACE):
        if long:
            name = f"from 256 KiB up, {peer}'s time / our best's"
            lines.append(compared(report, name, peer, best, long, mean=1.2, least=0.95))
    if GLOO in report["seconds"]:
        lines.append(compared(report, "Gloo's time / our best's", GLOO, best, report["sizes"], least=5))
    for peer in (MPI, IN_PLACE):
        if short:
            worst, at = max((1 / statistics.median(ratios(report, peer, best(report, n), n)), n) for n in short)
            verdict = met(worst <= 2.5) + (", and the aim of 1.5" if worst <= 1.5 else "")
            lines.append(
                f"  up to 16 KiB, our best's latency / {peer}'s: at most {worst:.2f} ({bytes_text(at)}); "
                f"target at most 2.5: {verdict}"
            )
    for n in short:
        lines.append(f"    {python_share(report, n)}")
    lines += chosen(report)
    return lines


def across_hosts(report: dict) -> list[str]:
    h, bandwidth = report["hosts"], report["bandwidth"]
    lines = [f"On {h} hosts of {report['per_host']} ranks, {report['library']}:"]
    long = [n for n in report["sizes"] if 4 << 20 <= n <= 64 << 20]
    contenders = {"hierarchical": lambda report, n: HIERARCHICAL} if HIERARCHICAL in report["seconds"] else {}
    if not contenders:
        lines.append("  there is no algorithm hierarchical")
    contenders["our best"] = best
    for called, pick in contenders.items():
        for peer in (MPI, IN_PLACE):
            if long:
                name = f"from 4 to 64 MiB, {peer}'s time / {called}'s"
                lines.append(compared(report, name, peer, pick, long, least=1.25))
        if long and bandwidth:
            shares = [(link_seconds(h, n, bandwidth) / median(report, pick(report, n), n), n) for n in long]
            share, at = min(shares)
            all_of_them = ", ".join(f"{s:.1%} at {bytes_text(n)}" for s, n in shares)
            lines.append(
                f"  from 4 to 64 MiB, {called}'s share of what the link allows: least {share:.1%} ({bytes_text(at)}); "
                f"target 90 %: {met(share >= 0.9)} ({all_of_them})"
            )
    lines += chosen(report)
    return lines


def compared(report: dict, name: str, peer: str, pick, sizes: list[int], least: float, mean: float = 0.0) -> str:
    """One line: the medians of `peer`'s time over that of the algorithm picked for each size, and the targets."""
    medians = [(statistics.median(ratios(report, peer, pick(report, n), n)), n) for n in sizes]
    geometric = statistics.geometric_mean(m for m, _ in medians)
    smallest, at = min(medians)
    targets = [f"{mean}: {met(geometric >= mean)}"] * bool(mean) + [f"{least}: {met(smallest >= least)}"]
    figures = f"geometric mean {geometric:.2f}, least {smallest:.2f} ({bytes_text(at)})"
    return f"  {name}: {figures}; target {', '.join(targets)}"


def met(fulfilled: bool) -> str:
    return "met" if fulfilled else "NOT met"


def python_share(report: dict, nbytes: int) -> str:
    """How much of our best's latency is Python; the method is in all_reduce.py."""
    name = best(report, nbytes)
    ours, exchange, call = (median(report, key, nbytes) * 1e6 for key in (name, EXCHANGE, CALL))
    rounds = math.ceil(math.log2(report["ranks"]))
    mpi = min(ours, max(0.0, rounds * (exchange - call)))
    return (
        f"{bytes_text(nbytes)}: {name} {ours:.1f} µs: MPI {rounds} × ({exchange:.1f} - {call:.1f}) = {mpi:.1f} µs, "
        f"the rest Python {ours - mpi:.1f} µs ({1 - mpi / ours:.0%})"
    )


def chosen(report: dict) -> list[str]:
    """How good auto's choice is, and what is best at each size."""
    slower = [(statistics.median(ratios(report, AUTO, best(report, n), n)), n) for n in report["sizes"]]
    worst, at = max(slower)
    names = ", ".join(f"{bytes_text(n)} {best(report, n).removeprefix(OURS)}" for n in report["sizes"])
    return [
        f"  auto takes at most {worst:.2f} times as long as our best ({bytes_text(at)})",
        f"  our best: {names}",
    ]


def against_other(report: dict, other: dict) -> list[str]:
    """Another MPI library's all-reduce beside our best: over that library in its own run, and over the first one's."""
    lines = [f"{other['library']} on {report['ranks']} ranks, directly after; its time / our best's, of medians:"]
    for peer in (MPI, IN_PLACE):
        for over in (other, report):
            figures = [
                f"{bytes_text(n)} {median(other, peer, n) / median(over, best(over, n), n):.2f}"
                for n in report["sizes"]
            ]
            lines.append(f"  {peer}, ours over {over['library']}: {', '.join(figures)}")
    return lines


# -- the model ------------------------------------------------------------------------------------------------------


def cost_of(name: str):
    """The cost function of one of our algorithms, (P, n, a, b, g) -> seconds; None if it has none."""
    from minidist.collectives import ALGORITHMS

    return getattr(ALGORITHMS["all_reduce"].get(name.removeprefix(OURS)), "cost", None)


def fit(report: dict) -> tuple[float, float, float] | None:
    """a, b, g (seconds a message, a byte, a reduced byte) by least squares of the relative error over this report.

    Over all our algorithms and sizes at once; of the subsets of {a, b, g} that fit without negative figures the best.
    Algorithms whose cost is not linear in a, b, g (pipelines of the best length) have no part in it. None if there is
    no algorithm with a cost.
    """
    import numpy as np

    P, rows = report["ranks"], []
    for name in report["seconds"]:
        cost = cost_of(name) if name.startswith(OURS) else None
        if cost is None:
            continue
        for n in report["sizes"]:
            row = [cost(P, n, *unit) for unit in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
            if math.isclose(sum(row), cost(P, n, 1, 1, 1), rel_tol=1e-6):
                rows.append([part / median(report, name, n) for part in row])
    if not rows:
        return None
    matrix, target = np.array(rows), np.ones(len(rows))
    choices = []
    for some in (list(some) for k in (1, 2, 3) for some in combinations(range(3), k)):
        scale = np.abs(matrix[:, some]).max(axis=0)
        if not scale.all():
            continue
        values = np.linalg.lstsq(matrix[:, some] / scale, target, rcond=None)[0] / scale
        if (values >= 0).all():
            whole = np.zeros(3)
            whole[some] = values
            choices.append((float(np.square(matrix @ whole - target).sum()), whole.tolist()))
    return tuple(min(choices)[1]) if choices else None


def plot(reports: list[dict], path: Path) -> None:
    """Time against size, one panel for each report: measured as points, the model's prediction as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(reports), figsize=(1.5 + 6.5 * len(reports), 6.5), sharey=True, squeeze=False, layout="constrained"
    )
    names = [name for name in reports[0]["seconds"] if name.startswith(OURS) and name != AUTO]
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    peers = {MPI: ("black", "s"), IN_PLACE: ("black", "D"), GLOO: ("grey", "v"), COPY: ("grey", "x")}
    shown = [*names, *peers]
    # Costs that are equal lie on one another, so lines differ in more than colour.
    dashes = ["-", "--", ":", "-.", (0, (6, 4)), (0, (2, 4)), (0, (8, 3, 1, 3)), (0, (1, 5))]
    for panel, report in zip(panels[0], reports):
        P, sizes = report["ranks"], report["sizes"]
        constants = fit(report)
        for place, name in enumerate(shown):
            some = [n for n in sizes if times(report, name, n)]
            medians = [median(report, name, n) * 1e6 for n in some]
            beside = [n * 2 ** (0.9 * (place / (len(shown) - 1) - 0.5)) for n in some]  # so that no point hides another
            color, marker = (colors[name], "o") if name in colors else peers[name]
            face = "none" if name == IN_PLACE else color
            style = dict(color=color, markerfacecolor=face, markersize=5, linestyle="none")
            panel.plot(beside, medians, marker, label=name, **style)
            cost = cost_of(name) if name in colors else None
            if constants and cost:
                fine = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 100) for i in range(101)]
                panel.plot(
                    fine,
                    [cost(P, n, *constants) * 1e6 for n in fine],
                    color=color,
                    linestyle=dashes[place % len(dashes)],
                )
        if report["hosts"] > 1 and report["bandwidth"]:
            allowed = [link_seconds(report["hosts"], n, report["bandwidth"]) * 1e6 for n in sizes]
            panel.plot(sizes, allowed, ":", color="black", linewidth=1, label="what the link allows")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [bytes_text(n) for n in sizes], rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_xlabel("size of the array")
        title = f"{P} ranks on {report['hosts']} host{'s' * (report['hosts'] > 1)}, {report['library']}"
        if constants:
            a, b, g = constants
            title += (
                f"\nlines: the model, fitted to all points of ours:\n"
                f"α = {a * 1e6:.1f} µs a message, β = {b * 1e9:.2f} ns/B, γ = {g * 1e9:.2f} ns/B"
            )
        panel.set_title(title, fontsize=10)
    panels[0][0].set_ylabel("time of one all-reduce, µs (median; slowest rank)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
