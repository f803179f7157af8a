"""Tensor and sequence parallelism: each layer, and a small language model of them, are one rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist import nn
from minidist.comm import Communicator
from minidist.nn import functional as F
from minidist.parallel.functions import scatter_to
from minidist.parallel.tensor import (
    ColumnParallelLinear,
    ParallelMLP,
    ParallelSelfAttention,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
    VocabParallelHead,
    sharded_dropout,
    vocab_parallel_cross_entropy,
)
from minidist.tensor import Tensor

B, T, C = 2, 12, 5  # T divides by all numbers of ranks, as sequence parallelism wants; features do not, or are fewer
close = dict(rtol=1e-10, atol=1e-10)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def part(whole: np.ndarray, comm: Communicator, dim: int, blocks: int = 1) -> np.ndarray:
    """This rank's chunk of each block, cut independently of what is tested."""
    cut = [np.array_split(block, comm.size, dim)[comm.rank] for block in np.split(whole, blocks, dim)]
    return np.concatenate(cut, dim)


def seeded(make: Callable[[], Any]) -> Any:
    """A module in float64, with the weights that seed 3 gives it."""
    md.manual_seed(3)
    return make().double()


def grad(t: Tensor) -> np.ndarray:
    assert t.grad is not None
    return t.grad.numpy()


def ends(x: Tensor, y: Tensor, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, dx) for the loss <y, dy>."""
    assert y.shape == dy.shape
    (y * Tensor(dy)).sum().backward()
    return y.numpy(), grad(x)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("form", ["plain", "no bias", "gathered", "blocks", "sequence", "few, sequence of blocks"])
def test_a_linear_layer_by_columns(comm: Communicator, form: str) -> None:
    blocks = 3 if "blocks" in form else 1
    outputs, sequence, gather = (3 if "few" in form else 7) * blocks, "sequence" in form, form == "gathered"
    options = dict(bias=form != "no bias", gather_output=gather, sequence_parallel=sequence, blocks=blocks)
    layer = seeded(lambda: ColumnParallelLinear(C, outputs, comm, **options))
    one = seeded(lambda: nn.Linear(C, outputs, options["bias"]))
    w, b = one.weight.numpy(), one.bias.numpy() if one.bias is not None else np.zeros(outputs)
    assert_array_equal(layer.weight.numpy(), part(w, comm, 0, blocks))
    assert set(layer.splits) == ({"weight", "bias"} if one.bias is not None else {"weight"})

    x, dy = numbers(1, B, T, C), numbers(2, B, T, outputs)
    mine = Tensor(part(x, comm, 1) if sequence else x, requires_grad=True)
    got, dx = ends(mine, layer(mine), dy if gather else part(dy, comm, 2, blocks))
    y = x @ w.T + b
    assert_allclose(got, y if gather else part(y, comm, 2, blocks), **close)
    assert_allclose(dx, part(dy @ w, comm, 1) if sequence else dy @ w, **close)
    assert_allclose(grad(layer.weight), part(np.einsum("bto,bti->oi", dy, x), comm, 0, blocks), **close)
    if one.bias is not None:
        assert_allclose(grad(layer.bias), part(dy.sum((0, 1)), comm, 0, blocks), **close)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("form", ["plain", "no bias", "whole input", "few", "few, sequence", "sequence, no bias"])
def test_a_linear_layer_by_rows(comm: Communicator, form: str) -> None:
    inputs, outputs, sequence, whole = 3 if "few" in form else 7, C, "sequence" in form, form == "whole input"
    options = dict(bias="no bias" not in form, input_is_parallel=not whole, sequence_parallel=sequence)
    layer = seeded(lambda: RowParallelLinear(inputs, outputs, comm, **options))
    one = seeded(lambda: nn.Linear(inputs, outputs, options["bias"]))
    w, b = one.weight.numpy(), one.bias.numpy() if one.bias is not None else np.zeros(outputs)
    assert_array_equal(layer.weight.numpy(), part(w, comm, 1))
    assert set(layer.splits) == {"weight"}

    x, dy = numbers(1, B, T, inputs), numbers(2, B, T, outputs)
    mine = Tensor(x if whole else part(x, comm, 2), requires_grad=True)
    got, dx = ends(mine, layer(mine), part(dy, comm, 1) if sequence else dy)
    assert_allclose(got, part(x @ w.T + b, comm, 1) if sequence else x @ w.T + b, **close)
    assert_allclose(dx, dy @ w if whole else part(dy @ w, comm, 2), **close)
    assert_allclose(grad(layer.weight), part(np.einsum("bto,bti->oi", dy, x), comm, 1), **close)
    if one.bias is not None:
        assert_array_equal(layer.bias.numpy(), b)
        assert_allclose(grad(layer.bias), dy.sum((0, 1)), **close)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("rows", [10, 3])  # 3: with four ranks one has none
def test_an_embedding_by_rows_of_its_table(comm: Communicator, rows: int, sequence: bool) -> None:
    layer = seeded(lambda: VocabParallelEmbedding(rows, C, comm, sequence))
    w = seeded(lambda: nn.Embedding(rows, C)).weight.numpy()
    ids, dy = np.random.default_rng(1).integers(0, rows, (B, T)), numbers(2, B, T, C)
    y = layer(Tensor(ids))
    (y * Tensor(part(dy, comm, 1) if sequence else dy)).sum().backward()
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dy)
    assert_array_equal(y.numpy(), part(w[ids], comm, 1) if sequence else w[ids])
    assert_allclose(grad(layer.weight), part(dw, comm, 0), **close)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("classes", [10, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_from_columns_of_logits(comm: Communicator, classes: int, reduction: str) -> None:
    x, t = 300 * numbers(1, B, T, classes), np.random.default_rng(2).integers(0, classes, (B, T))
    # One rank, in NumPy: log-sum-exp less the target's own logit.
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    losses = (
        np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))
        + x.max(-1)
        - np.take_along_axis(x, t[..., None], -1)[..., 0]
    )
    dy = numbers(3, B, T) if reduction == "none" else np.array(2.0)
    dx = (p - np.eye(classes)[t]) * (dy[..., None] if reduction == "none" else dy)
    expected = dict(mean=losses.mean(), sum=losses.sum(), none=losses)[reduction]

    mine = Tensor(part(x, comm, 2), requires_grad=True)
    got = vocab_parallel_cross_entropy(mine, Tensor(t), comm, reduction)
    got.backward(Tensor(dy))
    assert_allclose(got.numpy(), expected, **close)
    assert_allclose(grad(mine), part(dx / t.size if reduction == "mean" else dx, comm, 2), **close)


@on_ranks(1, 2, 3)
def test_numbers_in_bytes(comm: Communicator) -> None:
    """Differences of uint8 wrap around: byte 10 is not row 10 - 150 + 256 of rank 1."""
    ids = np.array([10, 250, 149, 150, 0], np.uint8)
    rows = seeded(lambda: nn.Embedding(300, 300)).weight.numpy()[ids]
    assert_array_equal(seeded(lambda: VocabParallelEmbedding(300, 300, comm))(Tensor(ids)).numpy(), rows)
    loss = vocab_parallel_cross_entropy(Tensor(part(rows, comm, 1)), Tensor(ids), comm)
    assert_allclose(loss.item(), F.cross_entropy(Tensor(rows), Tensor(ids.astype(int))).item(), **close)


# -- a language model of all of them ---------------------------------------------------------------------------------

VOCABULARY, WIDTH, HEADS, HIDDEN, P_DROP = 11, 24, 12, 50, 0.3


class OneRank(nn.Module):
    """An embedding, one pre-norm block, a norm and the tied head, without communication."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, ids: Tensor, shift: Tensor, target: Tensor) -> Tensor:
        p = P_DROP if self.training else 0.0
        x = F.dropout(self.embed(ids) + shift, p)
        q, k, v = (t.reshape(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(WIDTH, -1))
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.proj(heads.transpose(1, 2).reshape(B, T, WIDTH)), p)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), p)
        return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).transpose(1, 2), target)


class Dealt(nn.Module):
    """The same, dealt over the ranks."""

    def __init__(self, comm: Communicator, sequence: bool):
        self.comm, self.sequence = comm, sequence
        self.embed = VocabParallelEmbedding(VOCABULARY, WIDTH, comm, sequence)
        norms = (nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False))
        if sequence:
            norms = (
                SequenceParallelLayerNorm(WIDTH, comm),
                SequenceParallelRMSNorm(WIDTH, comm),
                SequenceParallelLayerNorm(WIDTH, comm, bias=False),
            )
        self.norm1, self.norm2, self.norm = norms
        self.attention = ParallelSelfAttention(WIDTH, HEADS, comm, P_DROP, sequence)
        self.mlp = ParallelMLP(WIDTH, HIDDEN, comm, sequence_parallel=sequence)
        self.head = VocabParallelHead(self.embed.weight, comm, sequence)

    def dropped(self, x: Tensor) -> Tensor:
        if self.sequence:
            return sharded_dropout(x, P_DROP, self.training, self.comm, 1)
        return F.dropout(x, P_DROP, self.training)

    def forward(self, ids: Tensor, shift: Tensor, target: Tensor) -> Tensor:
        x = self.dropped(self.embed(ids) + (scatter_to(shift, self.comm, 1) if self.sequence else shift))
        x = x + self.dropped(self.attention(self.norm1(x)))
        x = x + self.dropped(self.mlp(self.norm2(x)))
        return vocab_parallel_cross_entropy(self.head(self.norm(x)), target, self.comm)


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_a_language_model_is_one_ranks(comm: Communicator, sequence: bool, device: str) -> None:
    ids, target = (md.tensor(t, device=device) for t in np.random.default_rng(1).integers(0, VOCABULARY, (2, B, T)))
    results = []
    for make in (OneRank, lambda: Dealt(comm, sequence)):
        model = seeded(make).to(device)
        shift = md.tensor(numbers(2, B, T, WIDTH), np.float64, device, requires_grad=True)
        losses = []
        for _ in range(2):  # microbatches: gradients are summed
            losses.append(model(ids, shift, target))
            losses[-1].backward()
        losses.append(model.eval()(ids, shift, target))
        # Every rank has drawn as much as the one rank.
        drawn = md.backend.default_generator().numpy.bit_generator.state
        results.append((model, [loss.item() for loss in losses], grad(shift), drawn))
    (one, losses, dshift, drawn), (dealt, *others) = results
    assert len(set(losses)) == 3
    assert_allclose(others[0], losses, **close)
    assert_allclose(others[1], dshift, **close)
    assert others[2] == drawn

    names = {"attention.qkv": "qkv", "attention.proj": "proj", "mlp.up": "up", "mlp.down": "down"}
    compared = 0
    for place, module in dealt.named_modules():
        for name in ("weight", "bias") if place != "head" else ():
            if (mine := vars(module).get(name)) is None:
                continue
            whole, split = getattr(getattr(one, names.get(place, place)), name), getattr(module, "splits", {}).get(name)
            for ours, theirs in ((mine.numpy(), whole.numpy()), (grad(mine), grad(whole))):
                assert_allclose(ours, theirs if split is None else part(theirs, comm, *split), **close)
            compared += 1
    assert compared == len(list(one.parameters())) == 13


@on_ranks(1, 2, 3, 4)
def test_dropout_of_a_part_is_that_of_the_whole(comm: Communicator) -> None:
    x, dy = numbers(1, B, 7, C), numbers(2, B, 7, C)
    md.manual_seed(5)
    whole = Tensor(x, requires_grad=True)
    y, dx = ends(whole, F.dropout(whole, 0.4), dy)
    md.manual_seed(5)
    mine = Tensor(part(x, comm, 1), requires_grad=True)
    got, dgot = ends(mine, sharded_dropout(mine, 0.4, True, comm, -2, length=7), part(dy, comm, 1))
    assert_array_equal(got, part(y, comm, 1))
    assert_array_equal(dgot, part(dx, comm, 1))
    assert sharded_dropout(mine, 0.4, False, comm, 1) is mine
    if comm.size > 1:
        with pytest.raises(ValueError, match=rf"rank {comm.rank}'s chunk is {mine.shape[1]} long, not \d of 2 over"):
            sharded_dropout(mine, 0.4, True, comm, 1, length=2)


# -- what it costs, and what it refuses ------------------------------------------------------------------------------


def said(comm: Communicator, what: Callable[[], Any]) -> list[tuple[str, int]]:
    """The collectives that this does, with their bytes."""
    before = [0, *(op.number for op in comm.record.operations())][-1]
    what()
    new = [op for op in comm.record.operations() if op.number > before and op.group is comm]
    return [(op.kind.split()[0], op.nbytes) for op in new if not op.kind.startswith("compare")]


@on_ranks(1, 2, 3, 4)
def test_what_is_communicated(comm: Communicator) -> None:
    """As the docstrings say: which collectives, of how many bytes."""
    x_whole, x_part = numbers(1, B, T, C), part(numbers(1, B, T, C), comm, 1)
    hidden = part(numbers(1, B, T, 7), comm, 2)
    ids = np.zeros((B, T), np.int64)
    plain, sequence = {}, dict(sequence_parallel=True)
    nbytes, logits = 8 * B * T * C, part(numbers(1, B, T, 10), comm, 2)
    reduce, scatter, gather = (("all_reduce", nbytes),), (("reduce_scatter", nbytes),), (("all_gather", nbytes),)
    table: list[tuple[Callable[[Tensor], Tensor], np.ndarray, tuple, tuple]] = [
        (ColumnParallelLinear(C, 7, comm, **plain).double(), x_whole, (), reduce),
        (ColumnParallelLinear(C, 7, comm, **sequence).double(), x_part, gather, gather + scatter),
        (RowParallelLinear(7, C, comm, **plain).double(), hidden, reduce, ()),
        (RowParallelLinear(7, C, comm, **sequence).double(), hidden, scatter, gather),
        (VocabParallelEmbedding(10, C, comm, **plain).double(), ids, reduce, ()),
        (VocabParallelEmbedding(10, C, comm, **sequence).double(), ids, scatter, gather),
        (SequenceParallelLayerNorm(C, comm).double(), x_part, (), (("all_reduce", 8 * C),) * 2 * (comm.size > 1)),
        (
            lambda x: vocab_parallel_cross_entropy(x, Tensor(ids), comm),
            logits,
            (("all_reduce", 8 * (B * T + comm.size)), ("all_reduce", 8 * 2 * B * T)),
            (),
        ),
    ]
    for layer, array, forward, backward in table:
        ys: list[Tensor] = []
        x = Tensor(array, requires_grad=array.dtype.kind == "f")
        assert tuple(said(comm, lambda: ys.append(layer(x)))) == forward, layer  # noqa: B023
        assert tuple(said(comm, lambda: ys[0].sum().backward())) == backward, layer  # noqa: B023
        # Where no gradient is asked for, none is sent.
        x = Tensor(array)
        frozen = layer.requires_grad_(False)(x) if isinstance(layer, nn.Module) else layer(x)
        assert not frozen.requires_grad


@on_ranks(1, 2, 4)
def test_bad_input_is_refused(comm: Communicator) -> None:
    size, ids = comm.size, Tensor(np.zeros((B, 5), np.int64))
    with pytest.raises(ValueError, match="20 does not divide into 3 blocks"):
        ColumnParallelLinear(C, 20, comm, blocks=3)
    with pytest.raises(ValueError, match="gather_output=True would mix up 3 blocks"):
        ColumnParallelLinear(C, 21, comm, blocks=3, gather_output=True)
    with pytest.raises(ValueError, match=r"x \(2, 4\) and this rank's weight \(\d, 5\)"):
        ColumnParallelLinear(C, 8, comm)(md.zeros(2, 4))
    with pytest.raises(ValueError, match=r"3 dims \(batch, time, channels\), not shape \(2, 5\)"):
        ColumnParallelLinear(C, 8, comm, sequence_parallel=True)(md.zeros(2, C))
    with pytest.raises(TypeError, match="float64, float32"):
        RowParallelLinear(8, C, comm)(Tensor(np.zeros((2, 8 // size))))
    with pytest.raises(IndexError, match="index 10 is not one of the 10 of all ranks"):
        VocabParallelEmbedding(10, C, comm)(Tensor(np.array([0, 10])))
    with pytest.raises(TypeError, match="must be integers, not float32"):
        VocabParallelEmbedding(10, C, comm)(md.zeros(2))
    logits = Tensor(part(numbers(1, B, 5, 10), comm, 2))
    with pytest.raises(IndexError, match="target -1 is not one of the 10 of all ranks"):
        vocab_parallel_cross_entropy(logits, ids - 1, comm)
    with pytest.raises(ValueError, match=r"want a target of shape \(2, 5\), not \(2,\)"):
        vocab_parallel_cross_entropy(logits, ids[:, 0], comm)
    with pytest.raises(TypeError, match="class numbers, not float32"):
        vocab_parallel_cross_entropy(logits, md.zeros(B, 5), comm)
    with pytest.raises(ValueError, match="not 'max'"):
        vocab_parallel_cross_entropy(logits, ids, comm, "max")
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        ParallelSelfAttention(10, 3, comm)
    with pytest.raises(ValueError, match=r"drop \(2, 3\) for scores \(2, 3, 3\)"):
        F.scaled_dot_product_attention(*(md.zeros(2, 3, 4) for _ in "qkv"), drop=np.ones((2, 3), np.float32))
    if size > 1:
        with pytest.raises(ValueError, match=f"5 heads do not divide by {size} ranks"):
            ParallelSelfAttention(10, 5, comm)
        uneven = f"a sequence of 5 does not divide into {size} parts"
        with pytest.raises(ValueError, match=uneven):
            RowParallelLinear(8, C, comm, sequence_parallel=True)(md.zeros(2, 5, 8 // size))
        with pytest.raises(ValueError, match=uneven):
            VocabParallelEmbedding(10, C, comm, sequence_parallel=True)(ids)
