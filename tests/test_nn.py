"""Modules against PyTorch's: names, layouts, results, gradients, first values; and the flat buffers beneath them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minidist as md
from minidist import nn
from minidist.nn import functional as F

NO_TORCH = "PyTorch is not installed: pip install 'minidist[peers]'"


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason=NO_TORCH)


def random(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def as_torch(torch: Any, state: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.tensor(np.asarray(md.Tensor(array))) for name, array in state.items()}


# -- against PyTorch --------------------------------------------------------------------------------------------------

numbers = np.array([[3, 0, 9], [9, 9, 1]])
IMAGES = random(4, 6, 9, 8)
# id: (the module, made from either library's nn, and its input)
MODULES: dict[str, tuple[Callable[[Any], Any], np.ndarray]] = {
    "linear": (lambda nn: nn.Linear(7, 5), random(4, 7)),
    "linear-no-bias": (lambda nn: nn.Linear(7, 5, bias=False), random(2, 3, 7)),
    "conv": (lambda nn: nn.Conv2d(6, 4, 3), IMAGES),
    "conv-all": (lambda nn: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2), 2, bias=False), IMAGES),
    "conv-same": (lambda nn: nn.Conv2d(6, 12, 3, padding="same", groups=6), IMAGES),
    "embedding": (lambda nn: nn.Embedding(10, 4), numbers),
    "embedding-padding": (lambda nn: nn.Embedding(10, 4, padding_idx=-1), numbers),
    "layer-norm": (lambda nn: nn.LayerNorm(8), IMAGES),
    "layer-norm-2d": (lambda nn: nn.LayerNorm((9, 8), 1e-3, bias=False), IMAGES),
    "layer-norm-plain": (lambda nn: nn.LayerNorm(8, elementwise_affine=False), IMAGES),
    "rms-norm": (lambda nn: nn.RMSNorm(8), IMAGES),
    "rms-norm-eps": (lambda nn: nn.RMSNorm((9, 8), eps=0.1), IMAGES),
    "rms-norm-plain": (lambda nn: nn.RMSNorm(8, elementwise_affine=False), IMAGES),
    "batch-norm": (lambda nn: nn.BatchNorm2d(6), IMAGES),
    "batch-norm-all": (lambda nn: nn.BatchNorm2d(6, 1e-2, 0.3, affine=False), IMAGES),
    "batch-norm-untracked": (lambda nn: nn.BatchNorm2d(6, track_running_stats=False), IMAGES),
    "batch-norm-cumulative": (lambda nn: nn.BatchNorm2d(6, momentum=None), IMAGES),
    "relu": (lambda nn: nn.ReLU(), random(4, 7)),
    "leaky-relu": (lambda nn: nn.LeakyReLU(0.2), random(4, 7)),
    "gelu": (lambda nn: nn.GELU(), random(4, 7)),
    "gelu-tanh": (lambda nn: nn.GELU("tanh"), random(4, 7)),
    "silu": (lambda nn: nn.SiLU(), random(4, 7)),
    "tanh": (lambda nn: nn.Tanh(), random(4, 7)),
    "sigmoid": (lambda nn: nn.Sigmoid(), random(4, 7)),
    "softplus": (lambda nn: nn.Softplus(2.0, 1.0), random(4, 7)),
    "softmax": (lambda nn: nn.Softmax(1), random(4, 7, 3)),
    "identity": (lambda nn: nn.Identity(), random(4, 7)),
    "flatten": (lambda nn: nn.Flatten(), IMAGES),
    "flatten-some": (lambda nn: nn.Flatten(0, 2), IMAGES),
    "max-pool": (lambda nn: nn.MaxPool2d(2), IMAGES),
    "max-pool-all": (lambda nn: nn.MaxPool2d((3, 2), 2, 1, (1, 2), ceil_mode=True), IMAGES),
    "avg-pool": (lambda nn: nn.AvgPool2d(3, 2, 1), IMAGES),
    "avg-pool-all": (lambda nn: nn.AvgPool2d((3, 2), 2, 1, True, False), IMAGES),
    "dropout-none": (lambda nn: nn.Dropout(0.0), random(4, 7)),
    "sequential": (lambda nn: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 2))), random(4, 7)),
    "convolutional": (
        lambda nn: nn.Sequential(
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(72, 3),
        ),
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_pytorch_state_dict_loads_and_gives_the_same_results_and_gradients(
    torch: Any, name: str, device: str
) -> None:
    make, x = MODULES[name]
    theirs, ours = make(torch.nn), make(nn)
    with torch.no_grad():  # biases of 0 and weights of 1 would hide their absence
        for i, p in enumerate(theirs.parameters()):
            p.add_(torch.tensor(random(*p.shape, seed=i) * 0.1))
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        ours.zero_grad(), theirs.zero_grad()
        xo = md.tensor(x, device=device, requires_grad=x.dtype.kind == "f")
        xt = torch.tensor(x, requires_grad=x.dtype.kind == "f")
        yo, yt = ours(xo), theirs(xt)
        assert yo.dtype == np.float32
        assert_allclose(yo.numpy(), yt.detach().numpy(), rtol=1e-5, atol=1e-5)
        dy = random(*yo.shape, seed=1)
        if yo.requires_grad:
            yo.backward(md.tensor(dy, device=device)), yt.backward(torch.tensor(dy))
        if xo.requires_grad:
            assert_allclose(xo.grad.numpy(), xt.grad.numpy(), rtol=1e-4, atol=2e-5)
        for (our_name, po), (their_name, pt) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert our_name == their_name
            assert_allclose(po.grad.numpy(), pt.grad.numpy(), rtol=1e-4, atol=5e-5, err_msg=our_name)
        for (our_name, bo), (their_name, bt) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert our_name == their_name
            assert_allclose(bo.numpy(), bt.numpy(), rtol=1e-5, atol=1e-6, err_msg=our_name)


@pytest.mark.parametrize("name", [*MODULES, "attention", "loss-weights"])
def test_state_dicts_go_to_pytorch_strictly_and_come_back(torch: Any, name: str) -> None:
    if name == "attention":
        ours, theirs = nn.MultiHeadAttention(6, 2), torch.nn.MultiheadAttention(6, 2)
    elif name == "loss-weights":
        ours = nn.CrossEntropyLoss(md.tensor([1.0, 2.0]))
        theirs = torch.nn.CrossEntropyLoss(torch.tensor([3.0, 4.0]))
    else:
        ours, theirs = MODULES[name][0](nn), MODULES[name][0](torch.nn)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert {n: str(a.dtype) for n, a in state.items()} == {
        n: str(t.dtype).removeprefix("torch.") for n, t in theirs.state_dict().items()
    }
    theirs.load_state_dict(as_torch(torch, state))
    back = copy.deepcopy(ours)
    for array in back.state_dict().values():
        array.fill(7)
    back.load_state_dict(theirs.state_dict())
    for key, array in back.state_dict().items():
        assert_array_equal(array, state[key], strict=True)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("CrossEntropyLoss", {}),
        ("CrossEntropyLoss", {"reduction": "sum"}),
        ("CrossEntropyLoss", {"ignore_index": 2, "label_smoothing": 0.1}),
        ("MSELoss", {}),
        ("MSELoss", {"reduction": "none"}),
        ("L1Loss", {}),
    ],
)
def test_losses_are_pytorchs(torch: Any, name: str, arguments: dict[str, Any]) -> None:
    x = random(5, 3)
    target = np.array([0, 2, 1, 1, 0]) if name == "CrossEntropyLoss" else random(5, 3, seed=1)
    weighted = name == "CrossEntropyLoss"
    xo, xt = md.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    ours = getattr(nn, name)(**arguments, **({"weight": md.tensor([1.0, 2.0, 0.5])} if weighted else {}))
    theirs = getattr(torch.nn, name)(**arguments, **({"weight": torch.tensor([1.0, 2.0, 0.5])} if weighted else {}))
    lo, lt = ours(xo, md.tensor(target)), theirs(xt, torch.tensor(target))
    assert_allclose(lo.numpy(), lt.detach().numpy(), rtol=1e-6)
    lo.sum().backward(), lt.sum().backward()
    assert_allclose(xo.grad.numpy(), xt.grad.numpy(), rtol=1e-5, atol=1e-7)


# -- attention --------------------------------------------------------------------------------------------------------

L, S, N, E, HEADS = 5, 4, 3, 6, 2


def attention_pair(torch: Any, **options: Any) -> tuple[Any, Any]:
    theirs = torch.nn.MultiheadAttention(E, HEADS, **options)
    ours = nn.MultiHeadAttention(E, HEADS, **options)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(torch.tensor(random(*p.shape, seed=i) * 0.5))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_attends_alike(
    torch: Any, pair: tuple[Any, Any], inputs: list[np.ndarray], ours_too: Any = None, **options: Any
) -> None:
    """Outputs, weights and all gradients; an array among the options is a mask, `ours_too` changes ours only."""
    ours, theirs = pair
    ours.zero_grad(), theirs.zero_grad()
    xo = [md.tensor(x, requires_grad=True) for x in inputs]
    xt = [torch.tensor(x, requires_grad=True) for x in inputs]
    query, key, value = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2)}[len(inputs)]
    for_ours = options | (ours_too or {})
    for_ours = {k: md.tensor(v) if isinstance(v, np.ndarray) else v for k, v in for_ours.items()}
    for_theirs = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    yo, wo = ours(xo[query], xo[key], xo[value], **for_ours)
    yt, wt = theirs(xt[query], xt[key], xt[value], **for_theirs)
    assert_allclose(yo.numpy(), yt.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert (wo is None) == (wt is None)
    dy = random(*yo.shape, seed=9)
    lo, lt = (yo * md.tensor(dy)).sum(), (yt * torch.tensor(dy)).sum()
    if wo is not None:
        assert_allclose(wo.numpy(), wt.detach().numpy(), rtol=1e-5, atol=1e-6)
        dw = random(*wo.shape, seed=8)
        lo, lt = lo + (wo * md.tensor(dw)).sum(), lt + (wt * torch.tensor(dw)).sum()
    lo.backward(), lt.backward()
    for a, b in zip([*xo, *ours.parameters()], [*xt, *theirs.parameters()], strict=True):
        assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-4, atol=2e-5)


MASKS = {
    "none": None,
    "bool": np.triu(np.ones((L, S), bool), 1),
    "float": random(L, S, seed=5),
    "bool-per-head": np.random.default_rng(6).random((N * HEADS, L, S)) < np.array([0, 0.5, 0.5, 0.5]),
    "float-per-head": random(N * HEADS, L, S, seed=7),
}
PADDING = np.arange(S) >= np.array([[4], [2], [1]])  # how many keys each sample has


MISMATCHED = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


PADDINGS = {"none": None, "bool": PADDING, "float": np.where(PADDING, np.float32(-2), np.float32(0.5))}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
@MISMATCHED
def test_attention_is_pytorchs_under_every_mask(torch: Any, mask: str, padding: str) -> None:
    masks = {"attn_mask": MASKS[mask], "key_padding_mask": PADDINGS[padding]}
    inputs = [random(L, N, E), random(S, N, E, seed=1), random(S, N, E, seed=2)]
    for batch_first, bias in itertools.product([False, True], [False, True]):
        pair = attention_pair(torch, batch_first=batch_first, bias=bias)
        given = [x.swapaxes(0, 1) for x in inputs] if batch_first else inputs
        for weights in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            assert_attends_alike(torch, pair, given, **masks, **weights)
            assert_attends_alike(torch, pair, given[:2], **masks, **weights)


@MISMATCHED
def test_attention_to_itself_without_a_batch_and_causal(torch: Any) -> None:
    pair = attention_pair(torch)
    for weights in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        assert_attends_alike(torch, pair, [random(L, N, E)], **weights)
        assert_attends_alike(torch, pair, [random(L, E)], **weights)
        for mask in (MASKS["bool"], MASKS["float"], MASKS["float-per-head"][:HEADS]):
            cross = [random(L, E), random(S, E, seed=1), random(S, E, seed=2)]
            assert_attends_alike(torch, pair, cross, attn_mask=mask, key_padding_mask=PADDING[1], **weights)
        # is_causal: PyTorch wants the mask beside it, ours spells it out by itself.
        causal = np.triu(np.ones((L, L), bool), 1)
        for padding in (None, np.arange(L) >= np.array([[5], [2], [1]])):
            options = dict(attn_mask=causal, key_padding_mask=padding, is_causal=True, **weights)
            assert_attends_alike(torch, pair, [random(L, N, E)], **options)
            assert_attends_alike(torch, pair, [random(L, N, E)], ours_too={"attn_mask": None}, **options)


def test_attention_drops_weights_in_training_only() -> None:
    attention = nn.MultiHeadAttention(E, HEADS, dropout=0.5)
    x = md.tensor(random(L, N, E))
    _, weights = attention(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights.numpy() == 0).mean() < 0.8
    different = [attention(x, x, x, need_weights=False)[0].numpy() for _ in range(2)]
    assert (different[0] != different[1]).any()
    attention.eval()
    assert (attention(x, x, x)[1].numpy() > 0).all()
    assert_allclose(attention(x, x, x)[0].numpy(), attention(x, x, x, need_weights=False)[0].numpy(), atol=1e-6)


def test_attention_refuses_what_does_not_fit_naming_it() -> None:
    with pytest.raises(ValueError, match="embed_dim 6 does not divide into 4 heads"):
        nn.MultiHeadAttention(6, 4)
    with pytest.raises(ValueError, match=r"query \(3, 5, 6\), key \(3, 4, 6\), value \(3, 5, 6\)"):
        x = md.zeros(5, 3, 6)
        nn.MultiHeadAttention(6, 2)(x, md.zeros(4, 3, 6), x)


# -- first values -----------------------------------------------------------------------------------------------------

LARGE: dict[str, Callable[[Any], Any]] = {
    "linear": lambda nn: nn.Linear(250, 400),
    "conv": lambda nn: nn.Conv2d(64, 128, (3, 5), groups=2),
    "embedding": lambda nn: nn.Embedding(300, 200, padding_idx=3),
    "attention": lambda nn: nn.MultiheadAttention(128, 4),
    "layer-norm": lambda nn: nn.LayerNorm((3, 4)),
    "rms-norm": lambda nn: nn.RMSNorm(4),
    "batch-norm": lambda nn: nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("name", LARGE)
def test_first_values_are_distributed_as_pytorchs(torch: Any, name: str) -> None:
    md.manual_seed(1)
    torch.manual_seed(1)
    ours, theirs = LARGE[name](nn).state_dict(), LARGE[name](torch.nn).state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        a, b = ours[key].astype(float), tensor.numpy().astype(float)
        std = b.std()
        if std == 0:
            assert_array_equal(a, b, err_msg=key)
            continue
        quantiles = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]
        slack = 6 * std / a.size**0.5
        assert_allclose(a.mean(), b.mean(), atol=slack, err_msg=key)
        assert_allclose(a.std(), std, atol=slack, err_msg=key)
        assert_allclose(np.quantile(a, quantiles), np.quantile(b, quantiles), atol=2 * slack, err_msg=key)
        if name != "embedding":  # uniform: bounds are sharp
            assert_allclose(abs(a).max(), abs(b).max(), rtol=40 / a.size, err_msg=key)


def test_a_padding_row_starts_at_zero_and_gets_no_gradient() -> None:
    embedding = nn.Embedding(5, 3, padding_idx=-2)
    assert embedding.padding_idx == 3
    assert_array_equal(embedding.weight.data[3], np.zeros(3))
    embedding(md.tensor([[3, 1], [3, 3]])).sum().backward()
    assert_array_equal(embedding.weight.grad.numpy(), [[0] * 3, [1] * 3, [0] * 3, [0] * 3, [0] * 3])


def test_one_seed_gives_one_model_and_another_another() -> None:
    def weights(seed: int) -> np.ndarray:
        md.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 2, 2)).state_dict()["1.weight"]

    assert_array_equal(weights(5), weights(5))
    assert (weights(5) != weights(6)).all()


# -- modules ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Own parameters after children, a buffer between them, a list, a tied weight, and things that are no state."""

    def __init__(self) -> None:
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3, bias=False))
        self.register_buffer("seen", md.zeros(2))
        self.register_buffer("nothing", None)
        self.scale = nn.Parameter(md.ones(3))
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.last = nn.Linear(4, 3, bias=False)
        self.last.weight = self.inner[2].weight
        self.plain = md.ones(5)
        self.unused = None

    def forward(self, x: md.Tensor) -> md.Tensor:
        h = self.inner(x) * self.scale
        for layer in self.layers:
            h = layer(h)
        return h


def test_state_has_nested_names_and_tied_parameters_under_each(torch: Any) -> None:
    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3, bias=False))
            self.register_buffer("seen", torch.zeros(2))
            self.register_buffer("nothing", None)
            self.scale = nn.Parameter(torch.ones(3))
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
            self.last = nn.Linear(4, 3, bias=False)
            self.last.weight = self.inner[2].weight

    ours, theirs = Block(), Theirs()
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    theirs.load_state_dict(as_torch(torch, ours.state_dict()))
    ours.load_state_dict(theirs.state_dict())
    assert ours.last.weight is ours.inner[2].weight


def test_a_shared_module_is_listed_once_but_stands_in_the_state_twice(torch: Any) -> None:
    def twice(nn: Any) -> Any:
        norm = nn.BatchNorm2d(2)
        return nn.Sequential(norm, nn.ReLU(), norm)

    ours, theirs = twice(nn), twice(torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for what in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(ours, what)()] == [n for n, _ in getattr(theirs, what)()], what
    assert len(list(ours.parameters())) == 2


def test_load_state_dict_names_what_is_wrong_and_then_loads_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    good = {name: np.full(array.shape, 5.0) for name, array in before.items()}

    lacking = {name: good[name] for name in ("0.weight", "1.weight")} | {"2.weight": np.zeros(1)}
    with pytest.raises(KeyError, match=r"missing \['0.bias', '1.bias'\], unexpected \['2.weight'\]"):
        model.load_state_dict(lacking)
    misshapen = good | {"1.weight": np.zeros((3, 1)), "0.bias": np.zeros(4)}
    with pytest.raises(ValueError, match=r"0\.bias has shape \(3,\), the state \(4,\); 1\.weight .*\(1, 3\).*\(3, 1\)"):
        model.load_state_dict(misshapen)
    for name, array in model.state_dict().items():
        assert_array_equal(array, before[name])

    model.load_state_dict(lacking, strict=False)
    assert_array_equal(model[0].weight.numpy(), np.full((3, 2), 5, np.float32), strict=True)
    assert_array_equal(model[0].bias.numpy(), before["0.bias"])


def test_loading_is_in_place_casts_and_copies() -> None:
    model = nn.Linear(2, 3)
    memory = model.weight.data
    state = {"weight": np.arange(6.0).reshape(3, 2), "bias": md.tensor([1, 2, 3])}
    model.load_state_dict(state)
    state["weight"][:] = -1
    assert model.weight.data is memory
    assert memory.dtype == np.float32
    assert_array_equal(memory, np.arange(6).reshape(3, 2))
    assert_array_equal(model.bias.numpy(), [1, 2, 3])
    model.state_dict()["bias"][0] = 9  # views, not copies
    assert model.bias.data[0] == 9


def test_train_and_eval_reach_every_module() -> None:
    model = Block()
    assert all(m.training for m in model.modules())
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    model.inner.train()
    assert model.inner[1].training
    assert not model.training
    model.train()
    assert all(m.training for m in model.modules())
    assert Block().training  # others are not touched


def test_dropout_drops_and_scales_in_training_and_is_absent_in_evaluation(device: str) -> None:
    x = md.tensor(np.arange(1, 10_001, dtype=np.float32), device=device, requires_grad=True)
    dropout = nn.Dropout(0.3)
    md.manual_seed(3)
    y = dropout(x)
    factor = y.numpy() / x.numpy()
    assert abs((factor == 0).mean() - 0.3) < 0.02
    assert_allclose(factor[factor != 0], 1 / 0.7, rtol=1e-6)
    y.backward(md.ones(10_000, device=device))
    assert_allclose(x.grad.numpy(), factor, rtol=1e-6)  # the same mask
    assert (dropout(x).numpy() != y.numpy()).any()
    md.manual_seed(3)
    assert_array_equal(dropout(x).numpy(), y.numpy())
    assert not nn.Dropout(1.0)(x).numpy().any()
    dropout.eval()
    assert_array_equal(dropout(x).numpy(), x.numpy())
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"probability, not {p}"):
            nn.Dropout(p)


def test_batch_norm_keeps_averages_in_buffers_that_are_not_trained() -> None:
    norm = nn.BatchNorm2d(2)
    assert [n for n, _ in norm.named_parameters()] == ["weight", "bias"]
    x = random(8, 2, 3, 3)
    norm(md.tensor(x))
    assert_allclose(norm.running_mean.numpy(), 0.1 * x.mean((0, 2, 3)), rtol=1e-5, atol=1e-7)
    assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * x.var((0, 2, 3), ddof=1), rtol=1e-5)
    assert norm.num_batches_tracked.item() == 1
    norm.eval()(md.tensor(x))
    assert norm.num_batches_tracked.item() == 1
    with pytest.raises(ValueError, match=r"\(2, 3\) has 2 dims, not 4"):
        norm(md.zeros(2, 3))


def test_to_casts_floats_only_and_moves(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)).to(device)
    assert model.double() is model
    kinds = {name: array.dtype for name, array in model.state_dict().items()}
    assert kinds.pop("1.num_batches_tracked") == np.int64
    assert set(kinds.values()) == {np.dtype(np.float64)}
    x = md.tensor(random(2, 1, 4, 4, dtype=np.float64), device=device)
    assert model(x).dtype == np.float64
    assert {p.device.partition(":")[0] for p in model.parameters()} == {device}
    assert model.to("float32", "cpu")[0].weight.device == "cpu"
    assert model[0].weight.dtype == np.float32
    with pytest.raises(TypeError, match="int64"):
        model.to(np.int64)
    md.optim.SGD(model.parameters())
    with pytest.raises(RuntimeError, match="before its optimizer is made"):
        model.double()


def test_requires_grad_freezes_and_thaws() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert model[0].requires_grad_(False) is model[0]
    model(md.ones(1, 2)).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    model.requires_grad_()
    assert all(p.requires_grad for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_sequential_is_indexed_sliced_counted_and_iterated() -> None:
    layers = [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)]
    model = nn.Sequential(*layers)
    assert len(model) == 3
    assert list(model) == layers
    assert model[0] is layers[0]
    assert model[-1] is layers[2]
    assert list(model[1:]) == layers[1:]
    assert isinstance(model[:2], nn.Sequential)
    assert_array_equal(model(md.ones(1, 2)).numpy(), model[1:](model[:1](md.ones(1, 2))).numpy())
    assert list(model[1:].state_dict()) == ["2.weight", "2.bias"]  # names stay, as in PyTorch
    assert list(nn.Sequential({"first": layers[0], "second": layers[1]}).state_dict()) == ["first.weight", "first.bias"]
    with pytest.raises(IndexError):
        model[3]
    modules = nn.ModuleList(layers[:1]).append(layers[2])
    assert list(modules) == [layers[0], layers[2]]
    assert modules[-1] is layers[2]
    with pytest.raises(TypeError, match="loop over it"):
        modules(md.ones(1, 2))


def test_a_module_prints_as_pytorchs_does(torch: Any) -> None:
    def nested(nn: Any) -> Any:
        return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1, bias=False)), nn.Dropout(0.5))

    assert repr(nested(nn)) == repr(nested(torch.nn)).replace(", inplace=False", "")
    for make, _ in MODULES.values():  # a word on each, at least
        module = make(nn)
        assert type(module).__name__ in repr(module)


def test_a_copy_of_a_model_has_memory_of_its_own() -> None:
    model = nn.Linear(2, 1)
    optimizer = md.optim.SGD(model.parameters(), lr=1.0)
    other = copy.deepcopy(model)
    model(md.ones(1, 2)).sum().backward()
    optimizer.step()
    assert_allclose(other.weight.numpy(), model.weight.numpy() + 1, atol=1e-6)
    theirs = md.optim.SGD(other.parameters(), lr=1.0)
    other(md.ones(1, 2)).sum().backward()
    theirs.step()
    assert_array_equal(other.weight.numpy(), model.weight.numpy())


# -- flat buffers -----------------------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_of_one_array_each() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    (flat,) = nn.flatten(model.parameters())
    assert flat.data.shape == flat.grad.shape == (3 * 4 + 4 + 4 * 2 + 2,)
    assert flat.bounds == [(0, 12), (12, 16), (16, 24), (24, 26)]
    for name, array in model.state_dict().items():
        assert np.shares_memory(array, flat.data)
        assert_array_equal(array, before[name])
    assert_array_equal(flat.data, np.concatenate([array.ravel() for array in before.values()]))
    flat.data += 1
    for name, array in model.state_dict().items():
        assert_array_equal(array, before[name] + np.float32(1))


def test_backward_leaves_gradients_in_the_buffer(device: str) -> None:
    x = random(5, 3)

    def model() -> nn.Module:
        md.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)

    loose, laid = model(), model()
    (flat,) = nn.flatten(laid.parameters())
    for times in (1, 2):  # the second backward adds
        for m in (loose, laid):
            m(md.tensor(x, device=device)).sum().backward()
        for a, b in zip(loose.parameters(), laid.parameters(), strict=True):
            assert_array_equal(a.grad.numpy(), b.grad.numpy())
            assert b.grad.data is b._grad_room()
        expected = np.concatenate([p.grad.numpy().ravel() for p in loose.parameters()])
        assert_array_equal(md.Tensor(flat.grad).numpy(), expected, err_msg=str(times))
    if device == "cpu":
        assert all(np.shares_memory(p.grad.data, flat.grad) for p in laid.parameters())
    # A parameter without a gradient counts as zero.
    laid.zero_grad()
    laid[2](md.ones(1, 4, device=device)).sum().backward()
    gradient = md.Tensor(flat.gradient()).numpy()
    assert not gradient[:16].any()
    assert gradient[16:].all()


def test_the_first_gradient_is_written_into_the_buffer_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 4)
    nn.flatten(layer.parameters())
    got: list[Any] = []
    accumulate = md.Tensor._accumulate
    monkeypatch.setattr(md.Tensor, "_accumulate", lambda self, dx: (got.append((self, dx)), accumulate(self, dx))[1])
    layer(md.tensor(random(5, 3))).sum().backward()
    assert {id(p) for p, _ in got} == {id(layer.weight), id(layer.bias)}
    assert all(dx is p._grad_room() for p, dx in got)


def test_gradients_that_were_there_move_with_the_parameters() -> None:
    layer = nn.Linear(3, 1)
    layer(md.tensor(random(1, 3))).sum().backward()
    kept = layer.weight.grad.numpy().copy()
    (flat,) = nn.flatten([layer.bias, layer.weight])
    assert np.shares_memory(layer.weight.grad.data, flat.grad)
    assert_array_equal(flat.grad, [1, *kept.ravel()])


def test_dtypes_have_a_buffer_each_and_tied_parameters_one_place() -> None:
    single, double = nn.Linear(2, 3), nn.Linear(2, 3).double()
    flats = nn.flatten([single.weight, double.weight, single.bias, double.bias, single.weight])
    assert [(f.data.dtype, f.size) for f in flats] == [(np.float32, 9), (np.float64, 9)]
    assert [p is q for p, q in zip(flats[0].parameters, [single.weight, single.bias], strict=True)] == [True, True]
    assert np.shares_memory(double.bias.data, flats[1].data)

    class Tied(nn.Module):
        def __init__(self) -> None:
            self.embedding = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x: md.Tensor) -> md.Tensor:
            return self.out(self.embedding(x))

    tied = Tied()
    (flat,) = nn.flatten(tied.parameters())
    assert flat.size == 15
    tied(md.tensor([1, 2])).sum().backward()
    # Both uses contribute: as rows that were looked up, and as the output's weight.
    weight = tied.embedding.weight.numpy()
    expected = np.tile(weight[1] + weight[2], (5, 1))
    expected[[1, 2]] += weight.sum(0)
    assert_allclose(flat.grad.reshape(5, 3), expected, rtol=1e-5)


def test_laying_out_again_changes_nothing_and_with_others_makes_the_old_one_stale() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    (flat,) = nn.flatten(model.parameters())
    assert nn.flatten(model.parameters()) == [flat]
    flat.check()
    before = flat.data.copy()
    optimizer = md.optim.SGD(model.parameters())
    assert optimizer.parts[0].flat is flat

    (other,) = nn.flatten(reversed(list(model.parameters())))  # another order
    assert other is not flat
    other.check()
    with pytest.raises(RuntimeError, match="laid out anew"):
        flat.check()
    with pytest.raises(RuntimeError, match="laid out anew"):
        optimizer.step()
    assert_array_equal(np.concatenate([p.numpy().ravel() for p in model.parameters()]), before)

    (part,) = nn.flatten(model[0].parameters())  # a part of it
    with pytest.raises(RuntimeError, match="laid out anew"):
        other.check()
    part.check()


def test_an_array_put_in_a_parameters_place_is_noticed() -> None:
    layer = nn.Linear(2, 1)
    optimizer = md.optim.SGD(layer.parameters())
    layer.weight.data = np.ones((1, 2), np.float32)
    with pytest.raises(RuntimeError, match="replaced by another array"):
        optimizer.step()
    md.optim.SGD(layer.parameters()).step()  # a new one lays them out again
    assert_array_equal(layer.weight.numpy(), [[1, 1]])


def test_a_gradient_set_by_hand_counts() -> None:
    layer = nn.Linear(2, 1)
    optimizer = md.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.numpy().copy()
    layer.weight.grad = md.tensor([[1.0, -2.0]])
    optimizer.step()
    assert_array_equal(layer.weight.numpy(), before - np.array([[1, -2]], np.float32))


def test_functions_of_modules_are_those_of_functional() -> None:
    assert set(F.__all__) <= set(dir(F))
    x = md.tensor(random(3, 4))
    assert_array_equal(nn.GELU("tanh")(x).numpy(), F.gelu(x, "tanh").numpy())


def test_casting_and_moving_by_name() -> None:
    layer = nn.Linear(2, 3)
    for name, dtype in dict(half="float16", double="float64", float="float32").items():
        assert getattr(layer, name)() is layer
        assert layer.weight.dtype == dtype
    assert layer.to(device="cpu", dtype=np.float64).bias.dtype == np.float64  # type: ignore[attr-defined]


def test_max_pool_takes_ceil_mode_by_name_only() -> None:
    with pytest.raises(TypeError):
        nn.MaxPool2d(2, 2, 0, 1, True)  # type: ignore[misc]  # PyTorch's return_indices
    assert nn.MaxPool2d(2, ceil_mode=True)(md.ones(1, 1, 3, 3)).shape == (1, 1, 2, 2)
