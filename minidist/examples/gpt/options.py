"""The command line of the GPT example; what can't work is refused here, on all ranks, by one message."""

from __future__ import annotations

import argparse
import re

import minidist as md
from minidist.comm import Communicator
from minidist.examples.gpt.model import CHOICES
from minidist.examples.options import Parser, option
from minidist.examples.seen import add_options
from minidist.mesh import AXES, check_shape
from minidist.parallel.schedules import SCHEDULES

EPOCHS = 3
PRECISIONS = ("float16", "float32", "float64")
MEANING = {
    "dp": "samples: each has a share of the batch (what is left)",
    "pp": "layers: each has a stage of them",
    "tp": "the insides of layers: each has a slice",
    "cp": "the sequence: each has a part of it",
    "ep": "experts: each has some, and a share of the batch",
}


def parse(argv: list[str] | None, comm: Communicator) -> argparse.Namespace:
    """The options, once they are known to go together. dp is what the other axes leave, if it is not given."""
    parser = Parser("python -m minidist.examples.gpt", description="Train a small GPT on text.")
    parser.speaks = comm.rank == 0
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", help=f"passes over the text ({EPOCHS})")
    add("--steps", type=int, metavar="N", help="or so many steps; 0 to only generate")
    add("--batch-size", type=int, default=12, metavar="N", help="windows a step, of all ranks together (%(default)s)")
    add("--lr", type=float, default=2e-3, metavar="X", help="learning rate at its highest, of AdamW (%(default)s)")
    add("--warmup", type=int, metavar="N", help="steps in which it rises; then it falls as a cosine (a twentieth)")
    add("--clip", type=float, default=1.0, metavar="X",
        help="scale gradients whose norm is larger than this (%(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of initial weights, shuffling, dropout (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--precision", choices=PRECISIONS, default="float32",
        help="float16 is for GPUs: with float32 masters of the weights, and a scaled loss (%(default)s)")  # fmt: skip

    add = parser.add_argument_group("the text").add_argument
    add("--text", metavar="FILE", help="UTF-8 (the English reference of the Python language, which comes with Python)")
    add("--vocabulary", metavar="HOW",
        help="bytes; bpe:N, bytes and N merges of pairs, learned from the text; or FILE, as --save writes it beside "
        "the parameters (what lies beside those of --load, else bytes)")  # fmt: skip

    add = parser.add_argument_group("the network").add_argument
    add("--layers", type=int, default=4, metavar="N", help="(%(default)s)")
    add("--heads", type=int, default=4, metavar="N", help="(%(default)s)")
    add("--width", type=int, default=128, metavar="N", help="(%(default)s)")
    add("--hidden", type=int, metavar="N", help="of the MLP (4 times the width; 8/3 with swiglu)")
    add("--context", type=int, default=64, metavar="N", help="tokens of a window (%(default)s)")
    add("--positions", choices=CHOICES["positions"], default="learned", help="(%(default)s)")
    add("--mlp", choices=CHOICES["mlp"], default="gelu", help="(%(default)s)")
    add("--dropout", type=float, default=0.0, metavar="P", help="(%(default)s)")
    add("--experts", type=int, default=0, metavar="N", help="N MLPs a layer, of which each token takes two (one MLP)")

    add = parser.add_argument_group("the mesh: how many ranks split").add_argument
    for axis in reversed(AXES):
        add(f"--{axis}", type=int, default=None if axis == "dp" else 1, metavar="N", help=MEANING[axis])
    add("--schedule", choices=SCHEDULES, help="of the pipeline (1f1b)")
    add("--microbatches", type=int, metavar="N", help="a rank's share is cut into (1; twice the stages with --pp)")
    add("--chunks", type=int, default=1, metavar="N", help="stages of each pp rank (%(default)s)")
    add("--cut", default="bytes", metavar="HOW",
        help="the pipeline's stages by parameter bytes, by measured time, or by hand: 2,4 cuts before layers 2 and 4 "
        "(%(default)s)")  # fmt: skip
    add("--sequence-parallel", action="store_true", help="tp ranks part the sequence where they do not part layers")
    add("--context-parallel", choices=CHOICES["context_parallel"], default="ring", help="(%(default)s)")
    add("--zero", type=int, choices=(0, 1, 2), default=0,
        help="of what ranks of dp, ep and cp have alike, each keeps 1/P: 1 of the optimizer's state, "
        "2 of gradients too (%(default)s)")  # fmt: skip
    add("--sync", choices=["auto", *md.collectives.ALGORITHMS["all_reduce"]], default="auto",
        help="the all-reduce (with --zero: reduce-scatter, all-gather) of gradients (%(default)s)")  # fmt: skip
    add("--recompute", choices=CHOICES["recompute"][1:], help="keep less of a forward, and compute it again")
    add("--comm-timeout", type=float, metavar="SECONDS",
        help="a rank that waits longer for another ends all, and a table says who waits for whom "
        "(MINIDIST_TIMEOUT, else 600)")  # fmt: skip

    add = parser.add_argument_group("what it writes").add_argument
    add("--generate", metavar="PROMPT", help="continue this text at the end (the beginning of what was held out)")
    add("--length", type=int, default=200, metavar="N", help="tokens to generate (%(default)s)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (%(default)s)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (all)")
    add("--save", metavar="FILE", help="write the trained parameters (safetensors), and FILE.json if it is bpe")
    add("--load", metavar="FILE", help="start from these parameters (safetensors)")
    add("--json", metavar="FILE", help="write the result as one JSON object; - for standard output")
    add_options(add)
    add("--quiet", action="store_true", help="print nothing but errors, and what --generate and --json - ask for")
    args = parser.parse_args(argv)
    problem = problem_of(args, comm)
    if problem:
        parser.error(problem)
    args.schedule = args.schedule or "1f1b"
    if args.microbatches is None:  # no more than the least share has windows
        args.microbatches = 1 if args.pp == 1 else min(2 * args.pp, args.batch_size // (args.dp * args.ep))
    return args


def problem_of(args: argparse.Namespace, comm: Communicator) -> str:
    """What is wrong with these options; "" if nothing is."""
    positive = "epochs, batch_size, layers, heads, width, hidden, context, microbatches, chunks, top_k, length"
    for name in positive.split(", "):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"{option(name)} {getattr(args, name)}: must be at least 1"
    for name in ("steps", "warmup", "seed", "experts", "temperature"):
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            return f"{option(name)} {getattr(args, name)}: must not be negative"
    for name in ("lr", "clip", "comm_timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            return f"{option(name)} {getattr(args, name)}: must be more than 0"
    if args.steps is not None and args.epochs is not None:
        return f"--steps {args.steps} with --epochs {args.epochs}: give the one or the other"
    if args.generate == "":
        return "--generate: a prompt has one character at least"
    kind, _, merges = (args.vocabulary or "bytes").partition(":")
    if kind == "bpe" and not merges.isdecimal():
        return f"--vocabulary {args.vocabulary}: N of bpe:N is a number of merges"
    if args.cut not in ("bytes", "time") and not re.fullmatch(r"\d+(,\d+)*", args.cut):
        return f"--cut {args.cut}: choose bytes, time, or numbers of layers such as 2,4"
    return problem_of_mesh(args, comm)


def problem_of_mesh(args: argparse.Namespace, comm: Communicator) -> str:
    """What is wrong with the mesh, and what is split over it; sets args.dp, if it is not given."""
    others = args.pp * args.tp * args.cp * args.ep
    if args.dp is None:
        args.dp = max(comm.size // others, 1) if others > 0 else 1
    try:
        check_shape(comm.size, **{axis: getattr(args, axis) for axis in AXES})
    except ValueError as error:
        return re.sub(r"\b([dptce]p)=", r"--\1 ", str(error))
    if args.pp == 1:
        for name, unused in (("schedule", None), ("chunks", 1), ("cut", "bytes")):
            if getattr(args, name) != unused:
                return f"{option(name)} {getattr(args, name)} with --pp 1: there is no pipeline"
    for axis, name in (("tp", "heads"), ("ep", "experts")):
        if getattr(args, name) % getattr(args, axis):
            return f"--{name} {getattr(args, name)} with --{axis} {getattr(args, axis)}: they do not divide"
    if args.ep > 1 and not args.experts:
        return f"--ep {args.ep} without --experts: there are none to be split"
    shares = args.dp * args.ep
    if args.batch_size < shares * (args.microbatches or 1):
        pieces = f"{shares} shares" + (f" of {args.microbatches} microbatches" if args.microbatches else "")
        return f"--batch-size {args.batch_size}: less than {pieces}, so some would have no window"
    return ""


def strategy_of(args: argparse.Namespace) -> str:
    """In words, for the terminal and the JSON line."""
    words = [f"{axis}={getattr(args, axis)}" for axis in AXES if getattr(args, axis) > 1] or ["single"]
    if args.pp > 1:
        words.append(f"{args.schedule} of {args.microbatches} microbatches")
        words += [f"{args.chunks} chunks"] * (args.chunks > 1)
    elif args.microbatches > 1:
        words.append(f"{args.microbatches} microbatches")
    words += ["sequence-parallel"] * args.sequence_parallel
    words += [args.context_parallel] * (args.cp > 1)
    if args.dp * args.ep * args.cp > 1:
        words.append(f"{args.sync} zero={args.zero}")
    return " ".join(words)
