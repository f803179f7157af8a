"""Train a GPT on text, on one rank or on any mesh of ranks, and let it write.

    python -m minidist.examples.gpt
    mpirun -n 4 python -m minidist.examples.gpt --tp 2 --pp 2 --schedule 1f1b --microbatches 4

Pre-norm, with learned or rotary positions, GELU or SwiGLU, and a tied head; AdamW, with warm-up and a cosine. The last
tenth of the text is held out. Batch and seed decide the result; the mesh, only how soon it comes and what fits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import minidist as md
from minidist import Tensor, backend
from minidist.comm import Communicator
from minidist.data import BytePairVocabulary, ByteVocabulary, TextLoader, Vocabulary
from minidist.examples.gpt.generate import generate
from minidist.examples.gpt.model import GPT, GPTConfig
from minidist.examples.gpt.options import EPOCHS, parse, strategy_of
from minidist.examples.mnist import check_files, refuse_if_any, write_json
from minidist.examples.seen import seen
from minidist.examples.summary import costs_of, in_words
from minidist.mesh import AXES, Mesh
from minidist.nn import Parameter
from minidist.optim import AdamW, GradScaler, Optimizer, with_master_weights
from minidist.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from minidist.parallel.tensor import vocab_parallel_cross_entropy
from minidist.parallel.trainer import Trainer
from minidist.parallel.whole import splits_of


class Data(NamedTuple):
    """A text: this rank's windows of it, and of what is held out."""

    vocabulary: Vocabulary
    train: TextLoader
    held_out: TextLoader
    characters: int
    bytes_a_token: float  # of what is held out
    beginning: np.ndarray  # of it


class Result(NamedTuple):
    """Of a training: losses in nats a token, the first of the last epoch."""

    steps: int
    seconds: float
    train_loss: float
    held_out_loss: float
    costs: dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    comm = md.comm.world()
    args = parse(argv, comm)
    if args.comm_timeout is not None:
        comm.timeout = args.comm_timeout  # groups made of it from here on inherit it
    on_host, _ = comm.split_by_host()
    mesh = Mesh(comm, **{axis: getattr(args, axis) for axis in AXES})
    problem = ""
    try:  # nothing in here waits for another rank
        if comm.rank == 0:
            check_files(args)
        device = backend.choose(args.device, on_host.rank)
        backend.use(device)
        initial = md.checkpoint.load(args.load) if args.load else None
        data = read(args, mesh, device)
        config = config_of(args, data.vocabulary)
        md.manual_seed(args.seed)
        # M.2(1), D.3(1) Initialise the parameters: every rank draws the whole model.
        model = GPT(config, mesh)
        model.to(device, args.precision)
    except (OSError, ValueError, backend.DeviceError) as error:
        problem = f"gpt: rank {comm.rank}: {error}" if comm.rank else f"gpt: {error}"
    refuse_if_any(comm, problem)
    # From here on ranks draw numbers (for dropout) alike only where they compute alike: along tp.
    place = [mesh.coordinates[axis] for axis in AXES if axis != "tp"]
    md.manual_seed(int(np.random.SeedSequence(args.seed, spawn_key=place).generate_state(1)[0]))
    parameters = size_of(model)
    optimizers: list[Optimizer] = []

    def optimizer_of(parameters: list[Parameter]) -> Optimizer:
        optimizer: Optimizer = AdamW(parameters, lr=args.lr)
        if any(p.dtype == np.float16 for p in parameters):
            optimizer = with_master_weights(optimizer)
        optimizers.append(optimizer)
        return optimizer

    scaler = GradScaler(enabled=args.precision == "float16")
    try:
        # M.2(2) Partition the model.
        trainer = Trainer(model, optimizer_of, mesh, loss_of(mesh), scaler=scaler, **trainer_options(args, data))
        if initial is not None:
            load(trainer, initial, args.load)
    except ValueError as error:
        problem = f"gpt: {error}"
    refuse_if_any(comm, problem)
    say = print if comm.rank == 0 and not args.quiet else (lambda *_, **__: None)
    say(f"{parameters:,} {args.precision} parameters, {data.characters:,} characters, {len(data.vocabulary):,} tokens, "
        f"batch {args.batch_size} windows of {args.context}", flush=True)  # fmt: skip
    words = "one rank" if comm.size == 1 else strategy_of(args)
    say(f"{comm.size} rank{'s' * (comm.size > 1)} on {device}, {words}, AdamW lr {args.lr}", flush=True)
    with seen(args, comm, device):
        comm.mark("C.1", f"{comm.size} rank{'s' * (comm.size > 1)} on {device}")
        comm.mark("M.1", words)
        result = fit(trainer, optimizers[0], data, args, comm, say)
    state = trainer.state_dict()
    write(args, state, config, data, comm)
    if args.json and comm.rank == 0:
        write_json(args.json, in_json(args, data, result, mesh, device))


def read(args: argparse.Namespace, mesh: Mesh, device: str) -> Data:
    """The text in tokens, split and dealt: each rank of dp and ep has its share of every batch of windows."""
    text = md.data.read_text(args.text) if args.text else md.data.default_text()
    train, held_out = md.data.split_text(text)
    vocabulary = vocabulary_of(args, train)
    tokens = vocabulary.encode(held_out)
    # D.3(2) Partition the data (D.1): the same windows meet in a step, whatever the number of ranks.
    share = mesh.coordinates["dp"] * mesh.shape["ep"] + mesh.coordinates["ep"]
    deal: Any = partial(TextLoader, context=args.context, rank=share, size=args.dp * args.ep, device=device)
    # Along ep ranks exchange tokens in every microbatch, so each needs a share of every batch.
    held_out_loader = deal(tokens, batch_size=args.batch_size, shuffle=False, drop_last=args.ep > 1)
    return Data(
        vocabulary,
        deal(vocabulary.encode(train), batch_size=args.batch_size, seed=args.seed, drop_last=True),
        held_out_loader,
        len(text),
        len(held_out.encode()) / len(tokens),
        tokens[: min(args.context // 2 + 1, 16)],
    )


def vocabulary_of(args: argparse.Namespace, text: str) -> Vocabulary:
    """As --vocabulary says. Every rank learns byte pairs for itself: one text gives the same ones everywhere."""
    beside = beside_file(args.load) if args.load else None
    how = args.vocabulary or ("bytes" if beside is None or not beside.exists() else str(beside))
    if how == "bytes":
        return ByteVocabulary()
    if how.startswith("bpe:"):
        return BytePairVocabulary.train(text, int(how[4:]))
    return BytePairVocabulary.load(how)


def beside_file(path: str) -> Path:
    """Where the vocabulary of saved parameters is."""
    return Path(f"{path}.json")


def config_of(args: argparse.Namespace, vocabulary: Vocabulary) -> GPTConfig:
    names = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
    return GPTConfig(len(vocabulary), **{name: getattr(args, name) for name in names})


def size_of(model: GPT) -> int:
    """How many parameters the whole model has. Every rank calls it."""
    splits = splits_of(model)
    total = sum(p.numel() for p in model.parameters() if p not in splits)
    for comm in dict.fromkeys(comm for _, comm in splits.values()):
        own = sum(p.numel() for p, (_, over) in splits.items() if over is comm)
        total += int(md.collectives.all_reduce(comm, np.array([own]))[0])
    return total


def loss_of(mesh: Mesh) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over all tokens, from logits of this rank's part of the vocabulary; in float32 at least."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        exact = logits if logits.dtype.itemsize >= 4 else logits.float()
        return vocab_parallel_cross_entropy(exact, targets, mesh.tp)

    return loss


def trainer_options(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """What Trainer is told; a microbatch to measure layers with, too, if stages are cut by time."""
    cut = args.cut if args.cut in ("bytes", "time") else [int(layer) for layer in args.cut.split(",")]
    samples, length = args.batch_size // (args.dp * args.ep * args.microbatches), args.context // args.cp
    sample = data.train.tokens[: samples * length].reshape(samples, length)
    options = {name: getattr(args, name) for name in ("schedule", "microbatches", "chunks", "zero", "clip")}
    return {"cut": cut, "sample": sample, "algorithm": args.sync, **options}


def load(trainer: Trainer, state: dict[str, Any], path: str) -> None:
    """Start from saved parameters, of whatever mesh. Errors  ValueError: they are another network's"""
    try:
        trainer.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"cannot load {path}: {error.args[0]}") from None


def fit(
    trainer: Trainer, optimizer: Optimizer, data: Data, args: argparse.Namespace, comm: Communicator, say: Any
) -> Result:
    """Train, and tell rank 0's terminal how it goes."""
    an_epoch = len(data.train)
    steps = (args.epochs or EPOCHS) * an_epoch if args.steps is None else args.steps
    rate = rising_and_falling(optimizer, steps, steps // 20 if args.warmup is None else args.warmup)
    seconds, loss, step = 0.0, math.nan, 0
    trainer.meter.reset()
    # M.2(5), D.3(5) Repeat until the stopping condition holds: so many steps.
    while step < steps:
        start, number = time.perf_counter(), min(an_epoch, steps - step)
        loss = train_epoch(trainer, rate, islice(data.train.epoch(step // an_epoch), number), number, args, comm)
        backend.synchronize()
        took = time.perf_counter() - start
        seconds, step = seconds + took, step + number
        with trainer.meter.left_out():
            held_out = evaluate(trainer, data.held_out)
        comm.value("held-out loss", held_out)
        comm.mark("M.2(5)", f"step {step} of {steps}")
        say(
            f"step {step:{len(str(steps))}}/{steps}   loss {loss:.4f}   {in_bits(held_out, data)}   "
            f"{number * args.batch_size * args.context / took:8,.0f} tokens/s   {took:5.1f} s",
            flush=True,
        )
    if not steps:
        held_out = evaluate(trainer, data.held_out)
        say(in_bits(held_out, data), flush=True)
    costs = costs_of(trainer.meter, comm, seconds, steps)
    say((in_words(costs) + "\n") * (steps > 0), flush=True)
    return Result(steps, seconds, loss, held_out, costs)


def rising_and_falling(optimizer: Optimizer, steps: int, warmup: int) -> SequentialLR:
    """The learning rate rises in a line for `warmup` steps, then falls along half a cosine to a tenth."""
    highest = optimizer.param_groups[0]["lr"]
    rising = LinearLR(optimizer, 1 / (warmup + 1), total_iters=max(warmup, 1))
    falling = CosineAnnealingLR(optimizer, max(steps - warmup, 1), eta_min=highest / 10)
    return SequentialLR(optimizer, [rising, falling], [warmup])


def train_epoch(
    trainer: Trainer, rate: SequentialLR, batches: Iterable[Any], number: int, args: argparse.Namespace, comm: Any
) -> float:
    """So many steps; returns their mean loss."""
    total = 0.0
    with tqdm(
        total=number, unit=" steps", leave=False, mininterval=0.25, ncols=88, disable=args.quiet or comm.rank != 0
    ) as bar:
        for done, (x, y) in enumerate(batches, start=1):
            # M.2(3), D.3(3) Each rank computes its part. M.2(4), D.3(4) The gradients of all make one step.
            loss = trainer.step(x, y)
            comm.value("loss", loss)
            total += loss
            rate.step()
            if not bar.disable:
                bar.set_postfix_str(f"loss {total / done:.3f}", refresh=False)
                bar.update()
    return total / number


def evaluate(trainer: Trainer, loader: TextLoader) -> float:
    """The mean loss of a token, over all windows."""
    sizes = loader.batch_sizes
    return sum(n * trainer.evaluate(x, y) for n, (x, y) in zip(sizes, loader.epoch(0), strict=True)) / sum(sizes)


def in_bits(held_out: float, data: Data) -> str:
    return f"held out {held_out:.4f}, {bits_a_byte(held_out, data):.3f} bits a byte"


def bits_a_byte(loss: float, data: Data) -> float:
    """From nats a token: what vocabularies can be compared by."""
    return loss / math.log(2) / data.bytes_a_token


def write(args: argparse.Namespace, state: dict[str, Any], config: GPTConfig, data: Data, comm: Communicator) -> None:
    """The parameters, and text. The first rank does it, with the whole model."""
    alone = comm.split(comm.rank)
    if comm.rank != 0:
        return
    if args.save:
        md.checkpoint.save(args.save, state)
        if isinstance(data.vocabulary, BytePairVocabulary):
            data.vocabulary.save(beside_file(args.save))
    if args.quiet and args.generate is None:
        return
    assert alone is not None
    model = GPT(replace(config, sequence_parallel=False, recompute=None), Mesh(alone))
    model.load_state_dict(state)
    prompt = data.beginning if args.generate is None else data.vocabulary.encode(args.generate)
    generator = backend.Generator(args.seed)
    tokens = generate(model, prompt[None], args.length, args.temperature, args.top_k, generator)
    print(data.vocabulary.decode(tokens[0]).decode(errors="replace"), flush=True)


def in_json(args: argparse.Namespace, data: Data, result: Result, mesh: Mesh, device: str) -> dict[str, Any]:
    samples = result.steps * args.batch_size / result.seconds if result.steps else 0.0
    return {
        "strategy": strategy_of(args),
        "ranks": mesh.comm.size,
        "mesh": mesh.shape,
        "epochs": result.steps / len(data.train),
        "steps": result.steps,
        "seconds": result.seconds,
        "samples_per_second": samples,
        "tokens_per_second": samples * args.context,
        "train_loss": result.train_loss,
        "validation_loss": result.held_out_loss,
        "bits_per_byte": bits_a_byte(result.held_out_loss, data),
        "test_accuracy": None,
        "device": device,
        **result.costs,
    }


if __name__ == "__main__":
    main()
