"""What does it cost to get the same bits on any number of ranks?

    python benchmarks/reproducible.py [--ranks 1 2 3 4] [--repeats 5] [--microbatches 8] [--save]

The document's network (784-1024-10, 814,090 float32) on MNIST, 128 samples a rank, Adam. Contenders:

    plain           data_parallel: one backward a step
    microbatches    the same, with the samples in as many microbatches as below, added up under no_sync: each rank has
                    fixed_tree.share(8, P, rank) of the 8, and the loss of each counts by its samples
    reproducible    data_parallel(…, reproducible=8): the same microbatches, their gradients added in one fixed tree

So from the first to the second is what small batches cost, and from the second to the third what the tree does. All
average gradients by --algorithm (the tree's all-to-all has none to choose); told is what "auto" has chosen. Bytes are
those of the rank that sends most: messages, and what is written to shared memory.

What to expect. n is 3.26 MB. A microbatch of 16 samples takes 0.5 ms more than an eighth of what 128 take, and adding
its gradient to those before 0.25 ms; the tree 0.45 ms, since it weights each gradient by its samples, and adds or
copies it. That is for each of a rank's 8/P microbatches; on 3 ranks the slowest has 3, 9/8 of its share. Then a rank
with k nodes sends k n (P-1)/P bytes, k = 1 where 8/P is a power of two, 2 on two of 3 ranks; and for the all-gather
n (P-1)/P, or n/P through shared memory. The ring sends 2 n (P-1)/P, an all-reduce through shared memory writes n.

How it is measured. Each number of ranks is a job of its own. Each repeat trains every contender for --steps steps,
in turn, beginning with another one each time, from the same weights, between barriers; the slowest rank counts. Ratios
are taken within each repeat. Then, outside of the timed part, each contender trains --check-steps steps with one and
the same global batch on every number of ranks, and its weights' digest is told: reproducible's must all be equal, or
the script fails; the others' are expected to differ.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from common import ONE_THREAD, RESULTS, machine, report_of_ranks, spread

BATCH, WARM_UP = 128, 5
SMALL = 1 << 10  # bytes: less is not gradients, but numbers of samples
PLAIN, MICRO, FIXED = "plain", "microbatches", "reproducible"
CONTENDERS = [PLAIN, MICRO, FIXED]
Data = tuple[Any, Any]  # images and labels


# -- a rank ---------------------------------------------------------------------------------------------------------


class Training:
    """One contender, from the same start as all others; `batch` samples a step, over all ranks."""

    def __init__(self, comm: Any, how: str, args: argparse.Namespace, data: Data, batch: int):
        import minidist as md

        md.manual_seed(0)
        self.how = how
        self.model = md.nn.Sequential(md.nn.Linear(784, args.hidden), md.nn.ReLU(), md.nn.Linear(args.hidden, 10))
        adam = md.optim.Adam(self.model.parameters(), lr=1e-3)
        pieces = args.microbatches if how == FIXED else None
        self.network, self.optimizer = md.parallel.data_parallel(
            self.model, adam, comm, algorithm=args.algorithm, reproducible=pieces
        )
        share, size = [comm.rank], comm.size
        if how != PLAIN:
            share, size = list(md.parallel.fixed_tree.share(args.microbatches, comm.size, comm.rank)), args.microbatches
        self.loaders = [md.data.Loader(*data, batch_size=batch, rank=part, size=size) for part in share]
        self.full = len(data[1]) // batch  # steps of an epoch that have a whole batch

    def steps(self) -> Iterator[None]:
        """Train for ever; yields after each step."""
        for epoch in count():
            for batches in islice(zip(*[loader.epoch(epoch) for loader in self.loaders], strict=True), self.full):
                self.step(batches)
                yield

    def step(self, batches: Any) -> None:
        from minidist import Tensor
        from minidist.nn import functional as F

        self.optimizer.zero_grad()
        samples = sum(len(labels) for _, labels in batches)
        for number, (images, labels) in enumerate(batches, start=1):
            with contextlib.nullcontext() if number == len(batches) else self.network.no_sync():
                loss = F.cross_entropy(self.network(Tensor(images)), Tensor(labels))
                (loss * (len(labels) / samples) if self.how == MICRO else loss).backward()
        self.optimizer.step()

    def digest(self) -> str:
        """Of the weights' bits."""
        content = hashlib.blake2b(digest_size=8)
        for array in self.model.state_dict().values():
            content.update(array.tobytes())
        return content.hexdigest()


def measure(args: argparse.Namespace) -> dict[str, dict] | None:
    """As one of the ranks: of each contender samples/s, bytes a step, by which algorithms, and digest. For rank 0."""
    import numpy as np

    import minidist as md

    comm = md.comm.world()
    data = md.data.read_mnist("train")
    speeds: dict[str, list[float]] = {how: [] for how in CONTENDERS}
    sent, ways = {}, {}
    for repeat in range(args.repeats):
        first = repeat % len(CONTENDERS)
        for how in CONTENDERS[first:] + CONTENDERS[:first]:
            training = Training(comm, how, args, data, BATCH * comm.size)
            running = training.steps()
            for _ in range(WARM_UP):
                next(running)
            training.network.meter.reset()
            md.collectives.barrier(comm)
            start = time.perf_counter()
            for _ in range(args.steps):
                next(running)
            took = time.perf_counter() - start
            here = np.array([took, training.network.meter.sent_bytes / args.steps])
            slowest, most = md.collectives.all_reduce(comm, here, "max").tolist()
            speeds[how].append(args.steps * BATCH * comm.size / slowest)
            sent[how] = most
            averaging = [op for op in comm.record.operations() if op.label == "D.3(4) average gradients"][
                -4:
            ]  # a step's
            ways[how] = ", ".join(dict.fromkeys(op.kind for op in averaging if op.nbytes > SMALL))
    digests = {}
    for how in CONTENDERS:
        training = Training(comm, how, args, data, args.check_batch)
        for _ in islice(training.steps(), args.check_steps):
            pass
        md.parallel.assert_replicas_agree(training.model, comm)
        digests[how] = training.digest()
    if comm.rank:
        return None
    told = {"speeds": speeds, "sent": sent, "ways": ways, "digest": digests}
    return {how: {name: of_each[how] for name, of_each in told.items()} for how in CONTENDERS}


# -- the whole ------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, ranks: int) -> dict[str, dict]:
    """Have so many ranks measure; what `measure` gives."""
    names = ("repeats", "steps", "hidden", "microbatches", "algorithm", "check_steps")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    batch = str(BATCH * max(args.ranks))
    return report_of_ranks(ranks, [__file__, *options, "--check-batch", batch], args.deadline)


def table(ranks: int, report: dict[str, dict]) -> list[str]:
    """A line for each contender."""
    lines = []
    for how in CONTENDERS:
        mine = report[how]["speeds"]
        against = [
            spread([a / b for a, b in zip(mine, report[other]["speeds"], strict=True)], ".2f")
            for other in (PLAIN, MICRO)
        ]
        lines.append(
            f"{ranks:>5}  {how:<14}{spread(mine, ',.0f'):<28}{against[0]:<22}{against[1] if how == FIXED else '':<22}"
            f"{report[how]['sent'] / 1e6:>9.3f}  {report[how]['digest']}"
            f"  {report[how]['ways']}"
        )
    return lines


def check(reports: dict[int, dict[str, dict]]) -> list[str]:
    """What the digests say; ends the program if reproducible's differ."""
    different = {how: len({report[how]["digest"] for report in reports.values()}) for how in CONTENDERS}
    if different[FIXED] > 1:
        told = ", ".join(f"{ranks} ranks {report[FIXED]['digest']}" for ranks, report in reports.items())
        raise SystemExit(f"reproducible: the weights differ between numbers of ranks: {told}")
    several = f"on {len(reports)} numbers of ranks"
    lines = [f"different weights {several}: " + ", ".join(f"{how} {number}" for how, number in different.items())]
    for how in (MICRO, FIXED):
        costs = []
        for ranks, report in reports.items():
            pairs = zip(report[how]["speeds"], report[PLAIN]["speeds"], strict=True)
            costs.append(f"{ranks} ranks {statistics.median(plain / mine for mine, plain in pairs) - 1:+.0%}")
        lines.append(f"time of a step against plain, {how}: {', '.join(costs)}")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--microbatches", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--algorithm", default="auto", help="that averages gradients (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="that are timed (%(default)s)")
    parser.add_argument("--check-steps", type=int, default=50, help="before weights are compared (%(default)s)")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for each mpirun (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--check-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.repeats, args.steps, args.check_steps, args.hidden, *args.ranks) < 1:
        parser.error("expected --ranks, --repeats, --steps, --check-steps and --hidden from 1 up")
    if not max(args.ranks) <= args.microbatches <= BATCH:
        parser.error(f"--microbatches: expected a microbatch for each rank at least, and {BATCH} at most")
    return args


def main() -> None:
    args = parse()
    os.environ.update(ONE_THREAD)  # before NumPy is imported
    if args.report:
        report = measure(args)
        if report is not None:
            args.report.write_text(json.dumps(report))
        return

    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(machine())
    say(
        f"784-{args.hidden}-10, {BATCH} samples a rank, {args.microbatches} microbatches, algorithm {args.algorithm}; "
        f"{args.repeats} repeats of {args.steps} steps; weights after {args.check_steps} steps of "
        f"{BATCH * max(args.ranks)} samples"
    )
    say("")
    ratios = f"{'against plain':<22}{'against microbatches':<22}"
    say(f"{'ranks':>5}  {'gradients':<14}{'samples/s':<28}{ratios}MB a step  {'weights':<18}by")
    reports = {}
    for ranks in args.ranks:
        reports[ranks] = launch(args, ranks)
        for line in table(ranks, reports[ranks]):
            say(line)
    say("")
    for line in check(reports):
        say(line)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "reproducible.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
