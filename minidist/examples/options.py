"""The command line of the MNIST example; what can't work is refused here, on all ranks, by one message."""

from __future__ import annotations

import argparse
import re
from typing import Any

import minidist as md
from minidist.comm import Communicator
from minidist.examples.seen import add_options
from minidist.examples.straggler import straggler_of
from minidist.mesh import AXES, check_shape
from minidist.parallel.parameter_server import Roles, consistency_of
from minidist.parallel.parameter_server.consistency import CHOICES
from minidist.parallel.schedules import SCHEDULES
from minidist.parallel.starting import check_algorithm, check_options

OPTIMIZERS = {"adam": md.optim.Adam, "adamw": md.optim.AdamW, "sgd": md.optim.SGD}
MICROBATCHES = 8  # of --reproducible
SERVERS = "parameter-server"
MESH: dict[str, Any] = {"dp": 1, "pp": 1, "tp": 1, "schedule": "1f1b", "chunks": 1, "cut": "bytes"}
DEFAULTS = {"servers": 1, "consistency": "bsp", "copies": 0, "sharding": "range", "deadline": 30.0}  # of its options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that speaks on rank 0 only; all ranks end."""

    speaks = True

    def _print_message(self, message: str, file: Any = None) -> None:
        if self.speaks:
            super()._print_message(message, file)


def parse(argv: list[str] | None, comm: Communicator) -> argparse.Namespace:
    """The options, once they are known to go together."""
    parser = Parser("python -m minidist.examples.mnist", description="Train the document's network on MNIST.")
    parser.speaks = comm.rank == 0
    add = parser.add_argument
    add("--epochs", type=int, default=10, metavar="N", help="passes over the training data (%(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="samples a step, of all ranks together (%(default)s)")
    add("--lr", type=float, default=1e-3, metavar="X", help="learning rate (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="(%(default)s)")
    add("--hidden", type=_widths, default=[1024], metavar="N,…", help="widths of the hidden layers, by commas (1024)")
    add("--seed", type=int, default=0, metavar="N", help="of initial weights and shuffling (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    add("--clip", type=float, metavar="X", help="scale gradients whose norm is larger than this (off)")

    add = parser.add_argument_group("the data (D.1)").add_argument
    add("--partition", default="uniform", metavar="HOW",
        help="which samples a rank takes: uniform, hierarchical (hosts first), stratified (by label), skewed or "
        "skewed:ALPHA (Dirichlet, for experiments) (%(default)s)")  # fmt: skip
    add("--partition-picture", metavar="FILE", help="draw who holds what (.svg, .png or .pdf; needs matplotlib)")
    add("--data", metavar="DIR", help="folder of another data set in MNIST's four files (MNIST itself)")

    add = parser.add_argument_group("ranks in step (D.3)").add_argument
    add("--sync", choices=["auto", *md.collectives.ALGORITHMS["all_reduce"], SERVERS],
        help="the all-reduce (with --zero: reduce-scatter, all-gather) that keeps ranks in step, "
        "or a parameter server (ring)")  # fmt: skip
    add("--zero", type=int, choices=(0, 1, 2, 3), default=0,
        help="a rank keeps 1/P: 1 of the optimizer's state, 2 of gradients too, "
        "3 of parameters too (%(default)s)")  # fmt: skip
    add("--bucket-mb", type=float, metavar="X", help="gradients travel in buckets of so many MB (chosen by itself)")
    add("--accumulate", type=int, default=1, metavar="K", help="cut a rank's share into K microbatches (%(default)s)")
    add("--compress", metavar="HOW",
        help="send less than whole gradients: fp16, bf16, topk:0.01, randomk:0.01, sign, powersgd:4 (off)")  # fmt: skip
    add("--local-sgd", type=int, metavar="K", help="ranks train alone, and average parameters every K steps (off)")
    add("--diloco", type=int, metavar="K", help="the same, with an outer optimizer that has momentum (off)")
    add("--reproducible", type=int, nargs="?", const=MICROBATCHES, metavar="M",
        help=f"the same bits on any number of ranks: M microbatches ({MICROBATCHES}), "
        "added in one fixed tree (off)")  # fmt: skip
    add("--comm-timeout", type=float, metavar="SECONDS",
        help="a rank that waits longer for another ends all, and a table says who waits for whom "
        "(MINIDIST_TIMEOUT, else 600)")  # fmt: skip

    add("--straggler", metavar="RANK:FACTOR", help="this rank runs FACTOR times slower, say 2:3.0 (off)")

    add = parser.add_argument_group("parts of the network on different ranks (M.1, M.2)").add_argument
    add("--dp", type=int, metavar="N", help="ranks that share out every batch (all ranks; 1 with --pp or --tp)")
    add("--pp", type=int, metavar="N", help="ranks that share out the layers, one stage after another (1)")
    add("--tp", type=int, metavar="N", help="ranks that share out the inside of every layer (1)")
    add("--schedule", choices=list(SCHEDULES), help="of the pipeline's microbatches (1f1b)")
    add("--microbatches", type=int, metavar="M", help="into how many a rank's share is cut (4 with --pp, else 1)")
    add("--chunks", type=int, metavar="V", help="stages of each rank, with interleaved and breadth-first (1)")
    add("--cut", type=_cut, metavar="HOW",
        help="where stages begin: by bytes of parameters, by time (measured), or layers' numbers (bytes)")  # fmt: skip
    add("--branches", type=int, metavar="N",
        help="by module: the hidden layer in N towers, each on one rank; their logits add up to those of the "
        "same network (off)")  # fmt: skip

    add = parser.add_argument_group("with --sync parameter-server").add_argument
    add("--servers", type=int, metavar="N", help="the first N ranks are servers, the others workers (1)")
    add("--consistency", metavar="HOW", help=f"{CHOICES} (bsp)")
    add("--copies", type=int, metavar="K",
        help="each server's parameters are copied to K others; rank 0 then schedules only (0)")  # fmt: skip
    add("--sharding", choices=("range", "hash"), help="how parameters are dealt to the servers (range)")
    add("--even-shares", action="store_true",
        help="ssp: equal shares of every batch (without: in proportion to the workers' speeds)")  # fmt: skip
    add("--deadline", type=float, metavar="SECONDS", help="who is not heard of for so long is taken for dead (30)")

    add = parser.add_argument_group("what it writes").add_argument
    add("--save", metavar="FILE", help="write the trained parameters (safetensors)")
    add("--load", metavar="FILE", help="start from these parameters (safetensors)")
    add("--json", metavar="FILE", help="write the result as one JSON object; - for standard output")
    add_options(add)
    add("--quiet", action="store_true", help="print nothing but errors (and what --json - asks for)")
    args = parser.parse_args(argv)
    problem = problem_of(args, comm)
    if problem:
        parser.error(problem)
    args.sync = args.sync or "ring"
    for name, value in DEFAULTS.items():
        setattr(args, name, getattr(args, name) or value)
    args.on_mesh = on_mesh(args)
    for name, value in {**MESH, "microbatches": 4 if (args.pp or 1) > 1 else 1}.items():
        setattr(args, name, getattr(args, name) or value)
    return args


def _widths(text: str) -> list[int]:
    """128,64 as [128, 64]."""
    return [int(width) for width in text.split(",")]


def _cut(text: str) -> str | list[int]:
    return text if text in ("bytes", "time") else [int(stop) for stop in text.split(",")]


def on_mesh(args: argparse.Namespace) -> bool:
    """Whether the layers are on several ranks."""
    return (args.pp or 1) > 1 or (args.tp or 1) > 1


def problem_of(args: argparse.Namespace, comm: Communicator) -> str:
    """What is wrong with these options; "" if nothing is."""
    counts = ("epochs", "batch_size", "accumulate", "local_sgd", "diloco", "microbatches", "chunks", "branches")
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"{option(name)} {getattr(args, name)}: must be at least 1"
    if min(args.hidden) < 1:
        return f"--hidden {','.join(map(str, args.hidden))}: must be at least 1"
    for name in ("lr", "clip", "bucket_mb", "comm_timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            return f"{option(name)} {getattr(args, name)}: must be more than 0"
    if args.seed < 0:
        return f"--seed {args.seed}: must not be negative"
    problem = problem_with_mesh(args, comm)
    if problem or on_mesh(args):
        return problem
    if args.batch_size < comm.size:
        return f"--batch-size {args.batch_size}: less than the {comm.size} ranks, so some would have no sample"
    if args.partition_picture and not args.partition_picture.endswith((".svg", ".png", ".pdf")):
        return f"--partition-picture {args.partition_picture}: the name must end in .svg, .png or .pdf"
    try:
        md.data.partition.named(args.partition, labels=None, hosts=comm.hosts())
    except ValueError as error:
        return f"--partition {args.partition}: {str(error).partition(': ')[2]}"
    if args.straggler:
        try:
            slow, _ = straggler_of(args.straggler)
        except ValueError as error:
            return f"--{error}"
        if slow >= comm.size:
            return f"--straggler {args.straggler}: the ranks are 0 to {comm.size - 1}"
    problem = problem_with_branches(args) if args.branches else problem_with_servers(args, comm)
    if problem or args.branches or args.sync == SERVERS:
        return problem
    # What does not go together. First what data_parallel itself refuses, in the command line's words.
    bucket_bytes = None if args.bucket_mb is None else max(1, int(args.bucket_mb * 1e6))
    try:
        check_options(comm.size, args.zero, args.sync or "ring", args.compress, bucket_bytes, args.reproducible)
    except ValueError as error:
        return in_options(str(error), args)
    given = {option(name): getattr(args, name) for name in ("local_sgd", "diloco")}
    alone = [name for name, steps in given.items() if steps]
    if len(alone) == 2:
        return "--local-sgd with --diloco: ranks that train alone are joined by the one or the other"
    unfit = {
        "--zero": args.zero,
        "--compress": args.compress,
        "--bucket-mb": args.bucket_mb,
        "--reproducible": args.reproducible,
    }
    for name, value in unfit.items():
        if alone and value:
            return f"{name} {value} with {alone[0]}: there gradients stay on their rank"
    if args.compress and args.sync and not args.zero:
        return f"--sync {args.sync} with --compress {args.compress}: a compression has its own way of adding up"
    if args.reproducible:
        if args.accumulate > 1:
            return f"--accumulate {args.accumulate} with --reproducible: that cuts batches into microbatches already"
        if args.clip and args.zero:
            return f"--clip with --reproducible and --zero {args.zero}: the norm is added up by rank"
        if args.partition == "hierarchical":
            return "--partition hierarchical with --reproducible: it depends on the ranks of each host"
        if args.partition_picture:
            return "--partition-picture with --reproducible: microbatches are dealt, not ranks' shares"
    return ""


def problem_with_mesh(args: argparse.Namespace, comm: Communicator) -> str:
    """What is wrong with the axes, and the options that belong to them."""
    axes = {name: getattr(args, name) for name in ("dp", "pp", "tp") if getattr(args, name) is not None}
    if not axes:
        given = [option(name) for name in (*MESH, "microbatches") if getattr(args, name)]
        return f"{given[0]} needs --pp or --tp" if given else ""
    try:
        check_shape(comm.size, **{**dict.fromkeys(AXES, 1), **axes})
    except ValueError as error:
        return re.sub(r"\b(dp|pp|tp)=", r"--\1 ", str(error))
    if not on_mesh(args):
        return ""
    try:
        schedule = SCHEDULES[args.schedule or "1f1b"]
        list(schedule(0, axes.get("pp", 1), args.microbatches or 4, args.chunks or 1))
        check_algorithm(args.sync or "ring", *(("reduce_scatter", "all_gather") if args.zero else ("all_reduce",)))
    except (KeyError, ValueError) as error:
        return f"--pp {axes.get('pp', 1)}: {error}"
    if args.zero == 3:
        return "--zero 3 with --pp or --tp: choose 0, 1 or 2"
    unfit = ("compress", "bucket_mb", "local_sgd", "diloco", "reproducible", "partition_picture", "straggler")
    for name in (*unfit, "branches"):
        if getattr(args, name):
            return f"{option(name)} {getattr(args, name)} with --pp or --tp: it is for ranks that have the whole model"
    if args.sync == SERVERS or args.accumulate > 1 or args.partition != "uniform":
        what = f"--sync {SERVERS}" if args.sync == SERVERS else "--accumulate" if args.accumulate > 1 else "--partition"
        instead = " (there --microbatches cuts a share)" if what == "--accumulate" else ""
        return f"{what} with --pp or --tp: it is for ranks that have the whole model{instead}"
    if args.batch_size < axes.get("dp", 1):
        return f"--batch-size {args.batch_size}: less than --dp {axes['dp']}, so some ranks would have no sample"
    return ""


def problem_with_servers(args: argparse.Namespace, comm: Communicator) -> str:
    """What is wrong with the options of --sync parameter-server."""
    if args.sync != SERVERS:
        given = [option(name) for name in (*DEFAULTS, "even_shares") if getattr(args, name)]
        return f"{given[0]} needs --sync {SERVERS}" if given else ""
    try:
        roles = Roles(comm.size, 1 if args.servers is None else args.servers, args.copies or 0)
    except ValueError as error:
        return "--" + str(error).replace("=", " ", 1)
    try:
        how = consistency_of(args.consistency or "bsp")
        how.begin(len(roles.workers))
    except ValueError as error:
        return f"--{error}"
    if args.deadline is not None and not args.deadline > 0:
        return f"--deadline {args.deadline}: must be more than 0"
    if args.even_shares and not how.name.startswith("ssp"):
        return f"--even-shares with --consistency {how.name}: that is ssp's"
    if args.straggler and straggler_of(args.straggler)[0] not in roles.workers:
        return f"--straggler {args.straggler}: the workers are ranks {roles.first_worker} to {comm.size - 1}"
    unfit = ("zero", "compress", "bucket_mb", "local_sgd", "diloco", "reproducible", "clip", "partition_picture")
    for name in unfit:
        if getattr(args, name):
            return f"{option(name)} {getattr(args, name)} with --sync {SERVERS}: it is for ranks that all-reduce"
    if args.partition != "uniform":
        return f"--partition {args.partition} with --sync {SERVERS}: its scheduler deals the samples, uniformly"
    return ""


def problem_with_branches(args: argparse.Namespace) -> str:
    """What does not go with --branches."""
    if len(args.hidden) > 1:
        return f"--branches {args.branches} with {len(args.hidden)} hidden layers: it shares out the neurons of one"
    if args.branches > args.hidden[0]:
        return f"--branches {args.branches}: the hidden layer has only --hidden {args.hidden[0]} neurons to share out"
    unfit = ("sync", "zero", "compress", "bucket_mb", "local_sgd", "diloco", "reproducible", "straggler",
             "partition_picture", *DEFAULTS, "even_shares")  # fmt: skip
    for name in unfit:
        if getattr(args, name):
            return f"{option(name)} {getattr(args, name)} with --branches: that is for ranks with a whole network each"
    if args.partition != "uniform":
        return f"--partition {args.partition} with --branches: every rank sees all samples"
    return ""


def option(name: str) -> str:
    """As it is typed."""
    return "--" + name.replace("_", "-")


def in_options(message: str, args: argparse.Namespace) -> str:
    """A message of data_parallel's, with options in the place of arguments."""
    message = re.sub(r"algorithm '(\w+)':", rf"--sync \1 with --zero {args.zero}:", message)
    message = re.sub(r"^compress '[^']*':", f"--compress {args.compress}:", message)
    message = re.sub(r"bucket_bytes=\d+", f"--bucket-mb {args.bucket_mb}", message)
    return re.sub(r"\b(zero|compress|reproducible)='?([^'\s:,]+(?::[\d.]+)?)'?", r"--\1 \2", message)


def json_name(args: argparse.Namespace) -> str:
    """The strategy in the JSON line."""
    if args.local_sgd:
        return f"local-sgd every={args.local_sgd}"
    if args.diloco:
        return f"diloco every={args.diloco}"
    how = f"{args.sync} zero={args.zero}"
    if args.compress:
        how = f"compress={args.compress} zero={args.zero}"
    if args.reproducible:
        how = f"reproducible={args.reproducible} zero={args.zero}"
    return f"data-parallel {how}" + (f" accumulate={args.accumulate}" if args.accumulate > 1 else "")
