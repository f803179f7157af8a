"""Does a parameter server do what it is for: go on beside a straggler, and share its load among servers? At what price?

    python benchmarks/parameter_server.py [--part consistency servers straggler messages ddp] [--quick] [--save]

consistency  Simulated. MNIST, 784-128-10, SGD, 8 workers and a server (the ring: 8 ranks), 1 Gbit/s and 50 us a link;
             the same seed, model and samples under the ring, bsp, ssp:1, 3 and 10, async and backup:1, with and without
             a worker that is three times slower. A sample takes a worker 1 ms (Communicator.elapse); a backward ends
             before its gradients leave. A push that is applied on its own has the learning rate divided by the workers,
             so that a sample moves the parameters equally far everywhere.
servers      Simulated, without a model: W = 1 ... 256 workers push and pull the document's 814,090 float32 on S = 1, 2
             and 4 servers; the ring on W ranks. Same links.
straggler    Measured: 3 workers and a server. The work of the healthy workers with one that is three times slower, as
             a share of theirs without. Computing is training 784-1024-10 (on fewer cores than ranks, who waits leaves
             them to others), or sleeping, as if every rank had a computer of its own.
messages     Measured: 10,000 pushes and as many pulls of 1 KiB between a worker and a server, against round trips of
             1 KiB through bare mpi4py.
ddp          Measured: BSP on 4 ranks (3 workers, a server) against PyTorch DDP over Gloo with 3; 784-1024-10, Adam,
             batch 128 a worker, one BLAS thread a rank. PyTorch needs `pip install -e ".[peers]"`.

What to expect. n bytes of parameters, c seconds of computing, b seconds a byte; here c = 32 ms and n b = 3.3 ms a step.

    ring        c + 2 (W-1)/W n b    38 ms; beside a straggler 3 c in the place of c, 102 ms
    bsp         c + (W+1) n b        61 ms; with a straggler 125 ms. Pulls leave the server one after another, so
                                     workers begin, and push, one after another: the queue is paid once, not twice
    async       max(c + 2 n b, W n b)  39 ms, and no more for the healthy beside a straggler: they and it do the work
                                     of 7 1/3 workers
    ssp:s       between the two. With even shares all are at the straggler's pace from clock s on; with shares by speed,
                as is the default, they are not
    backup:1    bsp, with 7 of 8 gradients a step. The straggler's come too late: an eighth of the samples is lost, and
                no time

A sample teaches as much as in the ring where gradients are fresh. Under async they are W - 1 updates old in the mean,
which at this learning rate does no harm. With S servers one way takes at least max(1, W/S) n b, the ring's all-reduce
2 (W-1)/W n b and the latency of 2 (W-1) messages: however many ranks there are, no link carries more; a server's
carries W/S times as much, so that 256 workers wait for 4 servers 44 times as long. The bound is reached, but for 2
messages' latency a part, where no two parts wait for one another: each worker sends its S parts one after another, and
begins with another server. If they leave all at once, as ParameterServer's do, a part that waits for its server's port
holds up those behind it, on a network that serves messages in the order of the sends (comm/network.py): up to 2.5
times as long.

Measured: sleeping, bsp keeps a third beside a straggler, and what its messages take anyway; async keeps all, ssp:3
almost all. A message of ours costs a probe, a receive and Python at each end, where mpi4py's costs a receive: one at a
time a push takes several times as long as a bare round trip. Requests that leave together share MPI messages, and
Python's share is left. Beside DDP: the workers do no optimizer's step, which takes DDP 1.1 ms of some 8 (more with
subnormal numbers); the server does one for all. 2 n bytes a worker go through the server's memory, as many as in an
all-reduce.

Tried without gain: keys cut into slices of 256 KiB, 512 KiB, 1 and 2 MiB, so that the server updates one while the next
is on its way. On two cores bsp was 0 to 30 % slower: messages are carried by the cores that compute.

How it is measured. Contenders take turns, beginning with another one in each repeat, in the same ranks (ddp: each in
processes of its own); medians over repeats and the range; ratios are taken within each repeat. Results are checked
outside of the timed parts: simulated times against the formula, bsp's parameters with and without a straggler against
each other (bit for bit), sums of pushes, and losses against DDP's. A figure beside a target says whether it is met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parameter_server_measured as measured
import parameter_server_simulated as simulated
from common import RESULTS, machine

Say = Callable[[str], None]
Plots = dict[str, Callable[[Path], None]]  # of each file, what draws it
NAME = "parameter_server"


def consistency(args: argparse.Namespace, say: Say) -> Plots:
    runs = simulated.all_runs(args.samples, args.test, args.workers)
    for line in simulated.table_of_runs(runs, args.samples, args.workers):
        say(line)
    return {NAME: lambda path: plot_runs(path, runs)}


def servers(args: argparse.Namespace, say: Say) -> Plots:
    exchanges = simulated.all_exchanges(args.up_to)
    for line in simulated.table_of_exchanges(exchanges):
        say(line)
    return {f"{NAME}_servers": lambda path: plot_exchanges(path, exchanges)}


def straggler(args: argparse.Namespace, say: Say) -> Plots:
    for line in measured.straggler_lines(measured.ranks_report("straggler", 4, args)):
        say(line)
    return {}


def messages(args: argparse.Namespace, say: Say) -> Plots:
    for line in measured.messages_lines(measured.ranks_report("messages", 2, args), args.messages):
        say(line)
    return {}


def ddp(args: argparse.Namespace, say: Say) -> Plots:
    for line in measured.ddp_lines(args):
        say(line)
    return {}


PARTS = {
    "consistency": consistency,
    "servers": servers,
    "straggler": straggler,
    "messages": messages,
    "ddp": ddp,
}


# -- pictures -------------------------------------------------------------------------------------------------------


def plot_runs(path: Path, runs: list[simulated.Run]) -> None:
    """Above without a straggler, below with one; accuracy against time, and against samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    rows = figure.subplots(2, 2, sharey=True)
    longest = max(run.seconds for run in runs)
    names = list(dict.fromkeys(run.name for run in runs))
    for slow, row in zip((False, True), rows, strict=True):
        for run in (run for run in runs if run.slow == slow):
            look: Any = dict(color=f"C{names.index(run.name)}", linewidth=1.2, label=run.name)
            look |= dict(linestyle="--") if "even" in run.name else {}
            row[0].plot([seconds for seconds, _, _ in run.points], [100 * a for _, _, a in run.points], **look)
            row[1].plot([samples / 1e3 for _, samples, _ in run.points], [100 * a for _, _, a in run.points], **look)
        words = f"one worker {simulated.FACTOR:g} times slower" if slow else "without a straggler"
        row[0].set(xlabel="simulated seconds", ylabel="test accuracy, %", title=words, xlim=(0, 1.02 * longest))
        row[1].set(xlabel="thousand samples, of all workers", title=words)
        row[1].legend()
        for axes in row:
            axes.grid(alpha=0.3)
    rows[0][0].set_ylim(70, 95)
    figure.savefig(path, dpi=110)


def plot_exchanges(path: Path, exchanges: list[simulated.Exchange]) -> None:
    """A push and a pull for each number of servers, on the formulas' lines, and the ring."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    counts = sorted({e.workers for e in exchanges})
    for number, servers in enumerate(sorted({e.servers for e in exchanges if e.servers})):
        mine = [e for e in exchanges if e.servers == servers]
        words, look = f"{servers} server{'s' * (servers > 1)}", f"C{number}"
        axes.plot(counts, [(e.push + e.pull) * 1e3 for e in mine], "o", color=look, label=words)
        axes.plot(counts, [2 * e.formula * 1e3 for e in mine], color=look, linewidth=1)
        if servers > 1:
            both = [(e.push_at_once + e.pull_at_once) * 1e3 for e in mine]
            axes.plot(counts, both, "x", color=look, label=f"{words}, all parts at once")
    ring = [e for e in exchanges if not e.servers and e.workers > 1]
    axes.plot(counts[1:], [e.push * 1e3 for e in ring], "s", color="black", label="ring all-reduce")
    axes.plot(counts[1:], [e.formula * 1e3 for e in ring], color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="workers", ylabel="push and pull, ms", xticks=counts)
    axes.set_ylim(bottom=10)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.set_title("simulated (points), formulas (lines)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


# -- the whole ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="(all)")
    parser.add_argument("--repeats", type=int, help="of what is measured (5; straggler and ddp: 3)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for each mpirun (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the tables and plots to benchmarks/results/")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        parser.error("--repeats: expected 1 at least")
    if args.save and importlib.util.find_spec("matplotlib") is None:
        parser.error("--save draws plots with matplotlib: pip install 'minidist[plot]'")
    quick = args.quick
    args.samples, args.test = (1536, 500) if quick else (60_000, 10_000)  # of the simulated training
    args.workers = 4 if quick else 8
    args.up_to = 8 if quick else 256  # workers
    args.steps = {"trains": 2, "sleeps": 2} if quick else {"trains": 60, "sleeps": 40}
    args.warm_up = 1 if quick else 5  # steps of each worker, until those that deal by speed know it
    args.messages = 200 if quick else 10_000
    args.few = args.repeats or (1 if quick else 3)
    args.many = args.repeats or (1 if quick else 5)
    return args


def main() -> None:
    args = parse()
    if args.report:  # one of the ranks
        result = measured.RANKS[args.part[0]](args)
        if result is not None:
            args.report.write_text(json.dumps(result))
        return

    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(machine(mpi4py="mpi4py", PyTorch="torch"))
    plots: Plots = {}
    for part in dict.fromkeys(args.part):
        say("")
        plots |= PARTS[part](args, say)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        some = "" if set(args.part) == set(PARTS) else "_" + "_".join(dict.fromkeys(args.part))
        (RESULTS / f"{NAME}{some}.txt").write_text("\n".join(lines) + "\n")
        for name, draw in plots.items():
            draw(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
