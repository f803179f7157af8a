"""How much memory do a transformer's activations take, and what does it cost to compute them again?

    python benchmarks/activation_memory.py [--layers 4] [--length 512] [--batch 2] [--width 256] [--heads 8] [--save]

A stack of pre-norm blocks (GPT-2's, with dropout), float32, one thread; as/h (below) is that of GPT-3. A row for each
way of keeping less:

    none    keep all that backward needs
    core    Module.recompute_("core"): of attention not its weights and their mask, which grow with s², nor its result
    all     block.recompute_(): of each block its input only
    sqrt    recompute_sequential, in about sqrt(L) segments of several blocks: of each segment its input only

What to expect. Per block, with s tokens in each of b sequences, width h, a heads, in units of sbh numbers:

    layer norms    x̂ of each, and σ of each row                                            2 + 2 / h
    attention      the input of q, k, v; these; the weights and their mask, as² b each;    1 + 3 + 2 as / h
                   its result; that of all heads side by side, and the mask after it       1 + 1 + 1
    MLP            its input; GELU's slope; the second layer's input; the mask             1 + 4 + 4 + 1

    none    sbh (19 + 2 as/h) + 2 sb    numbers, in float32  sbh (76 + 8 as/h) + 8 sb bytes
    core    sbh  18           + 2 sb                         sbh  72           + 8 sb
    all     sbh                                              sbh   4
    sqrt    sbh, of every segment instead of every block

Korthikanti et al. count sbh (34 + 5 as/h) bytes, 34 sbh with the core recomputed and 2 sbh with all, in 16 bits, with
masks of one byte each, the input of a softmax beside its output, and the inputs of layer norms in the place of x̂. In
16 bits ours would be sbh (42 + 4 as/h) + 8 sb: masks are numbers, and x̂ stays in float32.

Recomputing all costs a forward more: 4/3 of the time, if backward takes twice a forward's. The core takes s / (6 h + s)
of a block's products, and element by element more than that: softmax and random numbers.

What is told: of all blocks together, in MB = 10^6 bytes,

    formula    the above
    kept       autograd.bytes_kept, which looks into the graph. It must be equal
    held       what Python's allocations have grown by, from before forward to after it (tracemalloc)
    peak       the most that they had grown by during the step, beside the parameters and their gradients
    s a step   forward and backward, without tracemalloc: median (least – most), in seconds of the processor, which has
               one thread, whatever else the machine does

The gradients must be the same on all rows, to the last bit.

Source  Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, sections 4 and 5
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
import tracemalloc
from typing import Any

from common import ONE_THREAD, RESULTS, machine, spread

KINDS = ("none", "core", "all", "sqrt")
DROPOUT = 0.1


def formula(kind: str, layers: int, s: int, b: int, h: int, a: int) -> int:
    """Bytes that the blocks keep, in float32."""
    if kind == "all":
        return 4 * s * b * h * layers
    if kind == "sqrt":
        return 4 * s * b * h * segments(layers)
    numbers = 18 * s * b * h + 2 * s * b
    return 4 * layers * (numbers + (s * b * h + 2 * a * s * s * b if kind == "none" else 0))


def segments(layers: int) -> int:
    return max(1, round(math.sqrt(layers)))


def make_blocks(kind: str, layers: int, h: int, a: int) -> Any:
    """The blocks in a row, with equal weights for every kind."""
    import minidist as md

    class Block(md.nn.Module):
        """x + attention(norm(x)), then the same with an MLP of width 4 h."""

        def __init__(self) -> None:
            self.norm1, self.norm2 = md.nn.LayerNorm(h), md.nn.LayerNorm(h)
            self.attention = md.nn.MultiHeadAttention(h, a, DROPOUT, batch_first=True)
            self.mlp = md.nn.Sequential(md.nn.Linear(h, 4 * h), md.nn.GELU(), md.nn.Linear(4 * h, h))
            self.dropout = md.nn.Dropout(DROPOUT)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            x = x + self.dropout(self.attention(y, y, y, need_weights=False, is_causal=True)[0])
            return x + self.dropout(self.mlp(self.norm2(x)))

    md.manual_seed(0)
    blocks = md.nn.Sequential(*[Block() for _ in range(layers)])
    if kind == "core":
        blocks.recompute_("core")
    elif kind == "all":
        for block in blocks:
            block.recompute_()
    return blocks


class Step:
    """A forward and a backward through blocks of one kind."""

    def __init__(self, kind: str, layers: int, s: int, b: int, h: int, a: int):
        import numpy as np

        import minidist as md

        self.kind, self.blocks = kind, make_blocks(kind, layers, h, a)
        (self.flat,) = md.nn.flatten(self.blocks.parameters())
        self.x = md.Tensor(np.random.default_rng(0).standard_normal((b, s, h), np.float32))

    def forward(self) -> Any:
        from minidist.recomputation import recompute_sequential

        if self.kind == "sqrt":
            return recompute_sequential(list(self.blocks), segments(len(self.blocks)), self.x)
        return self.blocks(self.x)

    def run(self) -> float:
        """Seconds that it took."""
        start = time.process_time()
        (self.forward() * self.x).sum().backward()
        seconds = time.process_time() - start
        self.blocks.zero_grad()
        return seconds

    def memory(self) -> dict[str, int]:
        """Bytes kept, held, and at the peak."""
        from minidist.autograd import bytes_kept

        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        y = self.forward()
        kept, held = bytes_kept([y]), tracemalloc.get_traced_memory()[0] - before
        (y * self.x).sum().backward()
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        self.blocks.zero_grad()
        return {"kept": kept, "held": held, "peak": peak}

    def gradient(self) -> bytes:
        """All parameters' gradients, for the same random numbers on each call."""
        import minidist as md

        md.manual_seed(1)
        (self.forward() * self.x).sum().backward()
        gradient = self.flat.grad.tobytes()
        self.blocks.zero_grad()
        return gradient


HEADER = f"{'':>6}{'formula MB':>12}{'kept MB':>10}{'held MB':>10}{'peak MB':>10}{'of none':>9}   s a step, of none"


def measure(layers: int, s: int, b: int, h: int, a: int, steps: int) -> list[str]:
    """A line for each kind. Asserts that what is kept is what the formula says, and that all kinds train alike."""
    size = layers, s, b, h, a
    runs = {kind: Step(kind, *size) for kind in KINDS}
    expected = runs["none"].gradient()
    memory = {}
    for kind, step in runs.items():
        assert step.gradient() == expected, f"{kind}: other gradients"
        memory[kind] = step.memory()
        kept, said = memory[kind]["kept"], formula(kind, *size)
        assert kept == said, f"{kind}: {kept:,} bytes kept, {said:,} by the formula"
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(steps):  # in turn, so that a slow moment meets all
        for kind, step in runs.items():
            seconds[kind].append(step.run())
    lines = []
    for kind in KINDS:
        mb = {name: value / 1e6 for name, value in memory[kind].items()}
        slower = statistics.median(x / y for x, y in zip(seconds[kind], seconds["none"], strict=True))
        lines.append(
            f"{kind:>6}{formula(kind, *size) / 1e6:>12,.1f}{mb['kept']:>10,.1f}{mb['held']:>10,.1f}{mb['peak']:>10,.1f}"
            f"{mb['peak'] / (memory['none']['peak'] / 1e6):>9.2f}   {spread(seconds[kind], '.3f')}, {slower:.2f}"
        )
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, what in (
        ("layers", 4, "L"),
        ("length", 512, "s"),
        ("batch", 2, "b"),
        ("width", 256, "h"),
        ("heads", 8, "a"),
        ("steps", 5, "that are timed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    if min(args.layers, args.length, args.batch, args.width, args.heads, args.steps) < 1 or args.width % args.heads:
        parser.error("expected numbers from 1 up, and --width that divides by --heads")
    return args


def main() -> None:
    args = parse()
    os.environ.update(ONE_THREAD)  # before NumPy is imported
    shape = f"{args.layers} blocks of width {args.width}, {args.heads} heads; {args.batch} sequences of {args.length}"
    lines = [machine(), f"{shape}; dropout {DROPOUT}; {args.steps} steps", "", HEADER]
    print("\n".join(lines), flush=True)
    rows = measure(args.layers, args.length, args.batch, args.width, args.heads, args.steps)
    print("\n".join(rows))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "activation_memory.txt").write_text("\n".join(lines + rows) + "\n")


if __name__ == "__main__":
    main()
