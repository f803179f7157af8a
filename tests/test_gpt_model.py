"""The GPT of the example: against PyTorch's, with every choice of its shape; generation with its cache."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from gradcheck import gradcheck
from launch import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from ranks import on_ranks

import minidist as md
from minidist import backend
from minidist.autograd import bytes_kept
from minidist.backend import Generator
from minidist.collectives import all_reduce
from minidist.comm import Communicator
from minidist.examples.gpt import GPT, GPTConfig, generate
from minidist.examples.gpt.model import Experts
from minidist.examples.gpt.rotary import rotary
from minidist.mesh import Mesh
from minidist.parallel.tensor import vocab_parallel_cross_entropy
from minidist.parallel.whole import splits_of
from minidist.parallel.zigzag import zigzag_take

SMALL = dict(vocab_size=61, context=16, layers=2, heads=3, width=24)
BOTH = pytest.mark.parametrize("positions, mlp", [("learned", "gelu"), ("learned", "gelu-erf"), ("rotary", "swiglu")])


def gpt(**options: Any) -> GPT:
    """On one rank."""
    md.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **options}), Mesh(md.comm.world()))


def windows(n: int, length: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (n, length))


# -- against PyTorch ------------------------------------------------------------------------------------------------


@BOTH
def test_logits_and_20_steps_of_training_are_pytorchs(positions: str, mlp: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'minidist[peers]'")
    sys.path.append(str(ROOT / "benchmarks"))
    from torch_gpt import torch_gpt

    ours = gpt(positions=positions, mlp=mlp)
    theirs = torch_gpt(ours.config)

    with md.no_grad():  # biases and norms that do something
        for p in ours.parameters():
            p.add_(md.randn(*p.shape), alpha=0.05)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in ours.state_dict().items()})
    tokens = windows(3)
    assert_allclose(ours(md.Tensor(tokens)).numpy(), theirs(torch.tensor(tokens)).detach().numpy(), rtol=0, atol=1e-5)

    our_optimizer = md.optim.AdamW(ours.parameters(), lr=3e-3)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        batch = windows(4, 17, seed=step % 4)
        x, y = batch[:, :-1], batch[:, 1:]
        our_optimizer.zero_grad()
        our_loss = vocab_parallel_cross_entropy(ours(md.Tensor(x)), md.Tensor(y), ours.mesh.tp)
        our_loss.backward()
        our_optimizer.step()
        their_optimizer.zero_grad()
        logits = theirs(torch.tensor(x))
        their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).flatten())
        their_loss.backward()
        their_optimizer.step()
        losses.append((our_loss.item(), their_loss.item()))
    mine, other = np.array(losses).T
    assert_allclose(mine, other, rtol=0, atol=1e-4)
    assert mine[-1] < mine[0] - 0.3  # it learns


# -- its parts ------------------------------------------------------------------------------------------------------


def test_initial_values_are_gpt2s() -> None:
    model = gpt(layers=2, width=96, vocab_size=256, hidden=300)
    state = model.state_dict()
    assert state["head.weight"] is state["embed.tokens.weight"]
    assert len(list(model.parameters())) == len(state) - 1
    for name, array in state.items():
        if name.endswith("bias"):
            assert not array.any(), name
        elif "norm" in name:
            assert (array == 1).all(), name
        else:
            expected = 0.02 / 2 if name.endswith(("out.weight", "down.weight")) else 0.02  # sqrt(2 * 2 layers) = 2
            assert array.std() == pytest.approx(expected, rel=0.05), name
            assert abs(array.mean()) < 0.1 * expected, name


@BOTH
def test_a_token_sees_none_that_come_later(positions: str, mlp: str) -> None:
    model = gpt(positions=positions, mlp=mlp)
    tokens = windows(1)
    other = tokens.copy()
    other[0, 9:] += 1
    other %= SMALL["vocab_size"]
    before, after = (model(md.Tensor(t)).numpy() for t in (tokens, other))
    assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert (np.abs(before[:, 9:] - after[:, 9:]).max(axis=-1) > 1e-4).all()


def test_rotary_scores_depend_on_the_distance_only() -> None:
    qkv = np.random.default_rng(0).normal(size=(1, 1, 3 * 2 * 6))  # of two heads

    def parts(at: int) -> np.ndarray:
        return rotary(md.Tensor(qkv), 2, np.array([at])).numpy().reshape(3, 2, 6)

    def score(i: int, j: int) -> list[float]:
        return (parts(i)[0] * parts(j)[1]).sum(axis=-1)

    assert_allclose(score(7, 3), score(104, 100))
    assert (np.abs(score(7, 3) - score(8, 3)) > 1e-3).all()
    assert_array_equal(parts(5)[2], qkv.reshape(3, 2, 6)[2])  # values stand nowhere


def test_the_gradient_of_rotary() -> None:
    qkv = np.random.default_rng(0).normal(size=(2, 3, 3 * 2 * 4))
    gradcheck(lambda x: rotary(x, 2, np.array([0, 3, 40])), qkv)
    with pytest.raises(ValueError, match="heads of 3"):
        rotary(md.Tensor(qkv[:, :, :18]), 2, np.arange(3))


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"experts": 3, "positions": "rotary"}], ids=["dropout", "moe"])
def test_recomputed_gradients_are_the_same_and_less_is_kept(options: dict[str, Any]) -> None:
    batch, kept, found = windows(2, 17), [], []
    for how in (None, "selective", "whole"):
        model = gpt(recompute=how, **options)
        loss = vocab_parallel_cross_entropy(model(md.Tensor(batch[:, :-1])), md.Tensor(batch[:, 1:]), model.mesh.tp)
        for module in model.modules():
            if isinstance(module, Experts):
                loss = loss + module.auxiliary_loss
        kept.append(bytes_kept([loss]))
        loss.backward()
        found.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    assert kept[0] > kept[1] > 2 * kept[2]
    for other in found[1:]:
        for name, expected in found[0].items():
            assert_array_equal(other[name], expected, err_msg=name)


def test_dropout_is_for_training_only_and_repeats_by_seed() -> None:
    model = gpt(dropout=0.3)
    x = md.Tensor(windows(2))

    def logits(seed: int) -> np.ndarray:
        md.manual_seed(seed)
        return model(x).numpy()

    assert_array_equal(logits(1), logits(1))
    assert np.abs(logits(1) - logits(2)).max() > 1e-3
    model.eval()
    assert_array_equal(logits(1), logits(2))
    assert_allclose(logits(1), gpt()(x).numpy(), atol=1e-6)


def test_attention_with_dropout_is_the_fused_one_where_nothing_is_dropped() -> None:
    model = gpt(dropout=1e-9)  # the long way, and a mask of ones
    x = md.Tensor(windows(2))
    assert_allclose(model(x).numpy(), gpt()(x).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 25}, "width 25 does not divide into 3 heads"),
        ({"layers": 0}, "layers 0"),
        ({"hidden": 0}, "hidden 0"),
        ({"experts": -1}, "experts -1"),
        ({"experts": 2, "mlp": "swiglu"}, "experts 2 with mlp 'swiglu'"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"positions": "sine"}, "positions 'sine': choose learned, rotary"),
        ({"mlp": "relu"}, "mlp 'relu': choose gelu, gelu-erf, swiglu"),
        ({"recompute": "all"}, "recompute 'all': choose None, selective, whole"),
        ({"width": 9, "positions": "rotary"}, "heads of 3"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**options)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than the context of 16"):
        gpt()(md.Tensor(windows(1, 17)))


# -- on a mesh ------------------------------------------------------------------------------------------------------

MESHES = {1: [{}], 2: [{"tp": 2}, {"cp": 2}], 4: [{"tp": 4}, {"tp": 2, "cp": 2}]}


@on_ranks(1, 2, 4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "rotary", "mlp": "swiglu", "context_parallel": "ulysses"},
        {"sequence_parallel": True, "dropout": 0.3},
        {"sequence_parallel": True, "experts": 3},
    ],
    ids=["plain", "rotary", "dropout", "experts"],
)
def test_along_a_mesh_it_is_the_gpt_of_one_rank(options: dict[str, Any], comm: Communicator) -> None:
    batch = windows(3, 17)
    expected_loss, expected = gradients(Mesh(comm.split(comm.rank)), batch, options)
    for axes in MESHES[comm.size]:
        if "cp" in axes and ("dropout" in options or "experts" in options):
            continue  # each cp rank draws for its own tokens, and counts what it may send to an expert
        loss, got = gradients(Mesh(comm, **axes), batch, options)
        assert loss == pytest.approx(expected_loss, rel=1e-10)
        assert got.keys() == expected.keys()
        for name, (dw, split) in got.items():
            whole, _ = expected[name]
            part = whole if split is None else split[0].slice(whole, split[1].size, split[1].rank)
            assert_allclose(dw, part, rtol=1e-10, atol=1e-12, err_msg=f"{axes} {name}")


def gradients(
    mesh: Mesh, batch: np.ndarray, options: dict[str, Any], device: str = "cpu"
) -> tuple[float, dict[str, Any]]:
    """The loss of a batch, and every parameter's gradient (summed along cp) with how it is split."""
    md.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "heads": 4, **options}), mesh).double().to(device)
    x, y = (md.tensor(zigzag_take(part, mesh.cp, 1), device=device) for part in (batch[:, :-1], batch[:, 1:]))
    loss = vocab_parallel_cross_entropy(model(x), y, mesh.tp) / mesh.cp.size
    loss.backward()
    splits = splits_of(model)
    found = {name: (all_reduce(mesh.cp, p.grad.data), splits.get(p)) for name, p in model.named_parameters()}
    return float(all_reduce(mesh.cp, loss.data)), found


@on_ranks(1, 2)
@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"positions": "rotary", "mlp": "swiglu"}, {"experts": 3}])
def test_on_gpus_it_is_the_same(options: dict[str, Any], comm: Communicator, gpu: None) -> None:
    batch = windows(2, 17)
    mesh = Mesh(comm, tp=comm.size)
    expected_loss, expected = gradients(mesh, batch, options)
    loss, got = gradients(mesh, batch, options, "cuda")
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    for name, (dw, _) in got.items():
        assert_allclose(backend.to_numpy(dw), expected[name][0], rtol=1e-10, atol=1e-12, err_msg=name)


# -- generation -----------------------------------------------------------------------------------------------------


def plain_generation(model: GPT, tokens: np.ndarray, length: int) -> np.ndarray:
    """The likeliest next token, again and again, each time from the whole context."""
    context = model.config.context
    start = max(tokens.shape[1] - context, 0)
    for _ in range(length):
        if tokens.shape[1] - start > context:  # full: the newer half stays
            start = tokens.shape[1] - context // 2
        with md.no_grad():
            logits = model(md.Tensor(tokens[:, start:])).numpy()[:, -1]
        tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], axis=1)
    return tokens


@BOTH
@pytest.mark.parametrize("prompt, length", [(1, 12), (5, 40), (16, 3), (20, 20)])
def test_generation_with_the_cache_is_generation_without(positions: str, mlp: str, prompt: int, length: int) -> None:
    model = gpt(positions=positions, mlp=mlp, recompute="selective")
    with md.no_grad():  # far from even odds, so that rounding does not decide
        for p in model.parameters():
            p.add_(md.randn(*p.shape), alpha=0.2)
    tokens = windows(2, prompt)
    got = generate(model, tokens, length, temperature=0)
    assert_array_equal(got, plain_generation(model, tokens, length))
    assert len(np.unique(got[:, prompt:])) > 1
    assert_array_equal(got[:, :prompt], tokens)


def test_generation_on_a_gpu(gpu: None) -> None:
    on_cpu, on_gpu = (gpt(positions="rotary").double().to(device) for device in ("cpu", "cuda"))
    tokens = windows(2, 3)
    expected, got = (generate(model, tokens, 20, top_k=9, generator=Generator(4)) for model in (on_cpu, on_gpu))
    assert_array_equal(got, expected)


def test_tokens_are_drawn_by_their_odds() -> None:
    model = gpt(layers=1, width=12)
    with md.no_grad():
        for p in model.parameters():
            p.add_(md.randn(*p.shape), alpha=0.3)
    logits = model(md.Tensor(windows(1))).numpy()[0, -1].astype(float)
    draws = np.repeat(windows(1), 1500, axis=0)
    for temperature, top_k in ((1.0, None), (0.7, 5)):
        odds = np.exp(logits / temperature)
        if top_k:
            odds[np.argsort(odds)[:-top_k]] = 0
        odds /= odds.sum()
        drawn = generate(model, draws, 1, temperature, top_k, Generator(3))[:, -1]
        seen = np.bincount(drawn, minlength=len(odds)) / len(drawn)
        assert (seen[odds == 0] == 0).all()
        assert_allclose(seen, odds, atol=4 * np.sqrt(odds.max() / len(drawn)))
    again = [generate(model, draws[:3], 5, generator=Generator(seed)) for seed in (1, 1, 2)]
    assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_generation_leaves_the_model_as_it_was() -> None:
    model = gpt(dropout=0.5)
    tokens = windows(1, 4)
    first, second = (generate(model, tokens, 5, generator=Generator(0)) for _ in range(2))
    assert_array_equal(first, second)  # nothing is dropped
    assert model.training
    assert_array_equal(generate(model.eval(), tokens, 0), tokens)
    assert not model.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": np.zeros((1, 0))}, r"tokens of shape \(1, 0\)"),
        ({"tokens": np.zeros(3)}, r"tokens of shape \(3,\)"),
        ({"tokens": np.full((1, 2), 61)}, "tokens 61 to 61: the vocabulary has 61"),
        ({"length": -1}, "length -1"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_what_cannot_be_continued_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(gpt(), **{"tokens": windows(1, 2), "length": 3, **options})
