"""Every op, by the table in op_cases.py; then what is particular to one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from gradcheck import gradcheck, outputs
from numpy.testing import assert_allclose, assert_array_equal
from op_cases import CASES, Case

import minidist as md
from minidist import backend, ops
from minidist.backend import Generator, manual_seed
from minidist.ops.normal import normal
from minidist.tensor import Tensor

each_case = pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])


def tensors(arrays: list[np.ndarray], device: str = "cpu") -> list[Tensor]:
    return [Tensor(backend.to(a, device), requires_grad=a.dtype.kind == "f") for a in arrays]


def run(case: Case, arrays: list[np.ndarray], device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Forward, and backward from a fixed random gradient: the inputs and all results."""
    inputs = tensors(arrays, device)
    result = case.call(ops, *inputs)
    results = list(result) if isinstance(result, tuple | list) else [result]
    rng = np.random.default_rng(1)
    grads = [backend.to(np.asarray(rng.normal(size=y.shape), y.dtype), device) for y in outputs(result)]
    for y, dy in zip(outputs(result), grads, strict=True):
        if y.requires_grad:
            y.backward(dy, retain_graph=True)
    return inputs, results


# -- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.check], ids=[c.id for c in CASES if c.check])
def test_gradient_agrees_with_central_differences(case: Case) -> None:
    gradcheck(lambda *xs: case.call(ops, *xs), *case.arrays())


@each_case
@pytest.mark.filterwarnings("error")
def test_float32_stays_float32(case: Case) -> None:
    inputs, results = run(case, case.arrays(np.float32))
    exact_inputs, exact_results = run(case, case.arrays())
    assert all(y.dtype == np.float32 for y in results if y.dtype.kind == "f")
    for y, exact in zip(results, exact_results, strict=True):
        assert y.shape == exact.shape
        assert_allclose(y.numpy(), exact.numpy(), rtol=case.tolerance, atol=case.tolerance)
    for x, exact in zip(inputs, exact_inputs, strict=True):
        assert (x.grad is None) == (exact.grad is None)
        if x.grad is not None:
            assert (x.grad.dtype, x.grad.shape) == (np.float32, x.shape)
            assert_allclose(x.grad.numpy(), exact.grad.numpy(), rtol=10 * case.tolerance, atol=10 * case.tolerance)


@each_case
@pytest.mark.filterwarnings("error")
def test_no_argument_is_written_to(case: Case) -> None:
    arrays = case.arrays()
    for a in arrays:
        a.flags.writeable = False
    inputs = tensors(arrays)
    result = case.call(ops, *inputs)
    for y in outputs(result):
        dy = np.ones(y.shape)
        dy.flags.writeable = False
        if y.requires_grad:
            y.backward(dy, retain_graph=True)
    for a, before in zip(arrays, case.arrays(), strict=True):
        assert_array_equal(a, before)


@each_case
def test_layout_of_inputs_and_gradient_does_not_matter(case: Case) -> None:
    inputs, results = run(case, case.arrays())
    strided = [np.repeat(a.T, 2, axis=0)[::2].T if a.ndim else a for a in case.arrays()]
    again, results_again = run(case, strided)
    for y, y_again in zip(results, results_again, strict=True):
        assert_allclose(y_again.numpy(), y.numpy(), rtol=1e-12, atol=1e-12)
    for x, x_again in zip(inputs, again, strict=True):
        if x.grad is not None:
            assert_allclose(x_again.grad.numpy(), x.grad.numpy(), rtol=1e-12, atol=1e-12)
    # y.sum() sends back one number laid over y without a copy: it can't be written to, and its strides are 0.
    summed, ones = tensors(case.arrays()), tensors(case.arrays())
    for y, z in zip(outputs(case.call(ops, *summed)), outputs(case.call(ops, *ones)), strict=True):
        if y.requires_grad:
            y.sum().backward()
            z.backward(np.ones(z.shape))
            break
    for x, z in zip(summed, ones, strict=True):
        assert (x.grad is None) == (z.grad is None)
        if x.grad is not None:
            assert_allclose(x.grad.numpy(), z.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICES == ["cpu"], reason="MINIDIST_TEST_DEVICE=cpu")
@each_case
def test_gpu_agrees_with_cpu_and_leaves_no_data_behind(case: Case, gpu: Any) -> None:
    arrays = case.arrays()
    on_cpu, cpu_results = run(case, arrays)
    on_gpu, gpu_results = run(case, arrays, "cuda")
    for y, expected in zip(gpu_results, cpu_results, strict=True):
        assert backend.on_gpu(y.data)
        assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
        assert_allclose(y.numpy(), expected.numpy(), rtol=1e-9, atol=1e-9)
    for x, expected in zip(on_gpu, on_cpu, strict=True):
        assert (x.grad is None) == (expected.grad is None)
        if x.grad is not None:
            assert backend.on_gpu(x.grad.data)
            assert_allclose(x.grad.numpy(), expected.grad.numpy(), rtol=1e-9, atol=1e-9)


# A boolean mask takes out as many elements as it has trues: the host must ask how many. A list is on the host.
TRANSFERS_ALLOWED = {"x[mask]", "x[[0, 0]]"}


@each_case
def test_nothing_goes_between_host_and_device(case: Case, double: Any) -> None:
    if case.id.split("#")[0] in TRANSFERS_ALLOWED:
        pytest.skip("indexing that needs a transfer")
    inputs = tensors(case.arrays(np.float32), "cuda")
    double.reset()
    for y in outputs(case.call(ops, *inputs)):
        if y.requires_grad:
            y.sum().backward(retain_graph=True)
    assert (double.to_device, double.to_host) == (0, 0)


# -- the normal distribution ----------------------------------------------------------------------------------------


def test_normal_distribution_agrees_with_maths(device: str) -> None:
    special = [0.6629, -0.6629, 1e-300, -1e-8, 40, -40, 1e5, math.inf, -math.inf, math.nan]
    x = np.concatenate([np.linspace(-9, 9, 20_001), special])
    for dtype, tolerance in [(np.float64, 4e-16), (np.float32, 2e-7)]:
        x = x.astype(dtype)
        exact = [(math.erfc(-v / math.sqrt(2)) / 2, math.exp(-v * v / 2) / math.sqrt(2 * math.pi)) for v in x.tolist()]
        on_device = backend.to(x, device)
        cdf, density = on_device.copy(), on_device.copy()
        with np.errstate(over="ignore"):
            normal(on_device, cdf, density)
        for got, expected in zip((cdf, density), np.transpose(exact), strict=True):
            assert got.dtype == dtype
            assert_allclose(backend.to_numpy(got), expected, rtol=0, atol=tolerance)
        normal(on_device[:-4], cdf[:-4], density[:-4], with_density=False)
        assert_allclose(backend.to_numpy(cdf), np.transpose(exact)[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_gelu_is_exact_over_its_range(dtype: Any, tolerance: float) -> None:
    x = np.linspace(-8, 8, 100_001).astype(dtype)
    exact = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(float)]
    assert_allclose(ops.gelu(Tensor(x)).numpy(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_activations_of_large_arrays_keep_every_element_in_its_place(name: str) -> None:
    function = getattr(ops, name)
    x, dy = np.random.default_rng(0).normal(size=(2, 300, 400))  # several pieces
    for array in (x, x.T, np.asfortranarray(x), x[:, ::2]):
        whole = Tensor(array, requires_grad=True)
        weights = dy.reshape(-1)[: array.size].reshape(array.shape)
        y = function(whole)
        y.backward(weights)
        for i in (0, 123, -1):
            row = Tensor(array[i].copy(), requires_grad=True)
            function(row).backward(weights[i])
            assert_allclose(y.numpy()[i], function(row).numpy(), rtol=1e-12)
            assert_allclose(whole.grad.numpy()[i], row.grad.numpy(), rtol=1e-12)


# -- convolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_at_a_time", [1, 2, 3])
def test_a_convolution_in_parts_is_the_whole(images_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(5, 2, 4, 4)), rng.normal(size=(3, 2, 2, 2)), rng.normal(size=3)
    whole = ops.conv2d(Tensor(x), Tensor(w), Tensor(b)).numpy()
    monkeypatch.setattr("minidist.ops.conv.PIECE", images_at_a_time * 2 * 2 * 2 * 9)
    assert_allclose(ops.conv2d(Tensor(x), Tensor(w), Tensor(b)).numpy(), whole, rtol=1e-12)
    gradcheck(ops.conv2d, x, w, b)


# -- float16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid", "tanh", "softplus", "leaky_relu", "exp"])
def test_half_precision_stays(name: str) -> None:
    x = Tensor(np.linspace(-4, 4, 50).astype(np.float16), requires_grad=True)
    y = getattr(ops, name)(x)
    y.sum().backward()
    exact = getattr(ops, name)(Tensor(x.data.astype(float))).numpy()
    assert (y.dtype, x.grad.dtype) == (np.float16, np.float16)
    assert_allclose(y.numpy(), exact, rtol=5e-3, atol=2e-3)


def test_normalisation_of_half_precision_sums_in_single() -> None:
    x = np.random.default_rng(0).normal(100, 1, (4, 5000)).astype(np.float16)
    exact = ops.layer_norm(Tensor(x.astype(float)), (5000,)).numpy()
    got = ops.layer_norm(Tensor(x), (5000,))
    assert got.dtype == np.float16
    assert_allclose(got.numpy(), exact, atol=5e-3)


# -- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_scales_what_it_keeps_and_passes_the_same_mask_back(device: str) -> None:
    x = Tensor(backend.full((200, 300), 2.0, np.float32, device), requires_grad=True)
    y = ops.dropout(x, 0.25, generator=Generator(3))
    y.sum().backward()
    values = y.numpy()
    assert_allclose(np.unique(values), [0, 2 / 0.75], rtol=1e-6)
    assert abs((values == 0).mean() - 0.25) < 0.01
    assert_allclose(x.grad.numpy(), values / 2)


def test_dropout_repeats_with_its_seed_and_differs_between_calls() -> None:
    x = Tensor(np.ones(1000, np.float32))
    manual_seed(5)
    first, second = ops.dropout(x).numpy(), ops.dropout(x).numpy()
    manual_seed(5)
    assert_array_equal(ops.dropout(x).numpy(), first)
    assert (first != second).any()


def test_dropout_at_its_ends() -> None:
    x = Tensor(np.ones(5, np.float32))
    assert ops.dropout(x, training=False) is x
    assert_array_equal(ops.dropout(x, 1.0).numpy(), 0)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"1\.5"):
            ops.dropout(x, 1.5, training)


def test_attention_drops_weights_and_not_values() -> None:
    rng = np.random.default_rng(0)
    q, k = (Tensor(rng.normal(size=(1, 4, 3)), requires_grad=True) for _ in range(2))
    v = Tensor(np.eye(6)[None, :4], requires_grad=True)  # so that y shows the weights themselves
    plain = ops.scaled_dot_product_attention(q, k, v).numpy()[..., :4]
    manual_seed(1)
    y = ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    dropped = y.numpy()[..., :4]
    assert (dropped == 0).any()
    assert (dropped != 0).any()
    assert_allclose(dropped[dropped != 0], 2 * plain[dropped != 0])

    def again(*xs: Tensor) -> Tensor:
        manual_seed(1)
        return ops.scaled_dot_product_attention(*xs, dropout_p=0.5)

    gradcheck(again, q.data, k.data, v.data)


@pytest.mark.parametrize("shift", [3000.0, -3000.0, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_attention_to_scores_whose_exponentials_no_number_holds(dtype: Any, shift: float, device: str) -> None:
    q = np.array([[1.0, 0], [0, 1]])
    k = np.array([[2.0, 400], [1, 300], [0, 399]])  # the scores
    mask = np.full((2, 3), shift)
    weights = np.exp(k.T - k.T.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    q, k, v, mask = (Tensor(backend.to(a.astype(dtype), device)) for a in (q, k, np.eye(3), mask))
    y = ops.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    assert y.dtype == dtype
    assert_allclose(y.numpy(), weights, atol={8: 1e-12, 4: 1e-4, 2: 2e-3}[np.dtype(dtype).itemsize])


def test_packed_attention_drops_as_attention_does() -> None:
    rng = np.random.default_rng(0)
    x, drop = rng.normal(size=(2, 3, 12)), rng.choice([0.0, 2.0], (2, 2, 3, 3))

    def parted(x: Tensor) -> Tensor:
        q, k, v = (t.reshape(2, 3, 2, 2).transpose(1, 2) for t in x.split(4, -1))
        return ops.scaled_dot_product_attention(q, k, v, is_causal=True, drop=drop).transpose(1, 2).reshape(2, 3, 4)

    def packed(x: Tensor) -> Tensor:
        return ops.packed_attention(x, 2, is_causal=True, drop=drop)

    assert_allclose(packed(Tensor(x)).numpy(), parted(Tensor(x)).numpy(), rtol=1e-12)
    gradcheck(packed, x)


# -- batch_norm's running statistics --------------------------------------------------------------------------------


def test_batch_norm_moves_its_running_statistics_in_place(device: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 2, 5))
    mean, var = (Tensor(backend.to(a, device)) for a in (np.zeros(2), np.ones(2)))
    arrays = mean.data, var.data
    ops.batch_norm(Tensor(backend.to(x, device), requires_grad=True), mean, var, training=True, momentum=0.1)
    assert mean.data is arrays[0]
    assert var.data is arrays[1]
    assert not mean.requires_grad
    assert_allclose(mean.numpy(), 0.1 * x.mean(axis=(0, 2)))
    assert_allclose(var.numpy(), 0.9 + 0.1 * x.var(axis=(0, 2), ddof=1))
    before = mean.numpy().copy()
    ops.batch_norm(Tensor(backend.to(x, device)), mean, var)
    assert_array_equal(mean.numpy(), before)


def test_batch_norm_keeps_the_mean_it_was_given_for_backward() -> None:
    x, w = np.random.default_rng(0).normal(size=(4, 2)), np.ones(2)
    gradients = []
    for moved in (False, True):
        mean, weight = Tensor(np.array([1.0, 2.0])), Tensor(w, requires_grad=True)
        y = ops.batch_norm(Tensor(x), mean, Tensor(np.ones(2)), weight)
        if moved:
            mean.add_(5)
        y.sum().backward()
        gradients.append(weight.grad.numpy())
    assert_array_equal(gradients[0], gradients[1])


# -- errors ---------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype))


ERRORS = [
    (lambda: zeros(2, 3) + zeros(4), ValueError, r"2,\s*3.*4"),
    (lambda: zeros(2, 3) @ zeros(2, 3), ValueError, r"2, 3.*2, 3"),
    (lambda: ops.linear(zeros(2, 3), zeros(5, 4)), ValueError, r"2, 3.*5, 4"),
    (lambda: ops.matmul(zeros(2, 3), zeros(3, 2, dtype=np.float64)), TypeError, "float32.*float64"),
    (lambda: ops.sum(zeros(2, 3), dim=2), IndexError, "2.*2"),
    (lambda: ops.softmax(zeros(2, 3), dim=-3), IndexError, "-3.*2"),
    (lambda: ops.mean(zeros(2, dtype=np.int64)), TypeError, "int64"),
    (lambda: ops.gelu(zeros(2), approximate="erf"), ValueError, "erf"),
    (lambda: ops.cross_entropy(zeros(2, 3), zeros(3, dtype=np.int64)), ValueError, r"2, 3.*3"),
    (lambda: ops.cross_entropy(zeros(1, 3), Tensor(np.array([3]))), IndexError, "3"),
    (lambda: ops.conv2d(zeros(1, 3, 5, 5), zeros(2, 4, 3, 3)), ValueError, r"1, 3, 5, 5.*2, 4, 3, 3"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 2, 3, 3), groups=2), ValueError, "3.*2"),
    (lambda: ops.conv2d(zeros(1, 4, 2, 5), zeros(3, 4, 3, 3)), ValueError, r"3, 3.*2, 5"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 4, 3, 3), zeros(4)), ValueError, r"4,.*3, 4, 3, 3"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 4, 3, 3), stride=2, padding="same"), ValueError, "stride 1.*2"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 4, 3, 3), padding="full"), ValueError, "full"),
    (lambda: ops.conv2d(zeros(4, 5), zeros(3, 4, 3, 3)), ValueError, "4, 5"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 4, 3, 3), stride=0), ValueError, "0"),
    (lambda: ops.conv2d(zeros(1, 4, 5, 5), zeros(3, 4, 3, 3), padding=-1), ValueError, "-1"),
    (lambda: ops.max_pool2d(zeros(1, 4, 5, 5), 2, padding=2), ValueError, r"2, 2.*2, 2"),
    (lambda: ops.avg_pool2d(zeros(1, 4, 5, 5), 6), ValueError, r"6, 6.*5, 5"),
    (lambda: ops.max_pool2d(zeros(1, 4, 5, 5), (2, 2, 2)), ValueError, "kernel_size"),
    (lambda: ops.layer_norm(zeros(2, 3), (4,)), ValueError, r"2, 3.*4"),
    (lambda: ops.layer_norm(zeros(2, 3), (3,), zeros(2)), ValueError, r"2,.*3"),
    (lambda: ops.rms_norm(zeros(2, 3), (2, 2)), ValueError, r"2, 3.*2, 2"),
    (lambda: ops.batch_norm(zeros(2, 3), zeros(2), zeros(2)), ValueError, r"2,.*2, 3"),
    (lambda: ops.batch_norm(zeros(1, 3), None, None, training=True), ValueError, "1, 3"),
    (lambda: ops.batch_norm(zeros(2, 3), None, None), ValueError, "running_mean"),
    (lambda: ops.embedding(zeros(2), zeros(5, 3)), TypeError, "float32"),
    (lambda: ops.embedding(Tensor(np.array([1, 5])), zeros(5, 3)), IndexError, "5.*5"),
    (lambda: ops.embedding(Tensor(np.array([-1])), zeros(5, 3)), IndexError, "-1.*5"),
    (lambda: ops.embedding(Tensor(np.array([1])), zeros(5, 3), padding_idx=5), ValueError, "5.*5"),
    (
        lambda: ops.scaled_dot_product_attention(zeros(2, 3, 4), zeros(2, 3, 5), zeros(2, 3, 4)),
        ValueError,
        r"2, 3, 4.*2, 3, 5",
    ),
    (
        lambda: ops.scaled_dot_product_attention(zeros(3, 4), zeros(3, 4), zeros(3, 4), zeros(3, 3), is_causal=True),
        ValueError,
        "is_causal",
    ),
    (
        lambda: ops.scaled_dot_product_attention(zeros(3, 4), zeros(3, 4), zeros(3, 4), zeros(2, 3, 3)),
        ValueError,
        r"2, 3, 3.*3, 3",
    ),
    (lambda: ops.packed_attention(zeros(2, 3, 10), 2), ValueError, r"2, 3, 10.*2 heads"),
    (lambda: ops.packed_attention(zeros(3, 6), 2, zeros(3, 3), is_causal=True), ValueError, "is_causal"),
    (lambda: ops.packed_attention(zeros(3, 6), 2, zeros(4, 3)), ValueError, r"4, 3.*2, 3, 3"),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_a_bad_argument_raises_and_names_both_values(call: Any, error: type[Exception], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        call()


# -- all together ---------------------------------------------------------------------------------------------------


def test_a_training_step_on_a_gpu_never_touches_the_host(double: Any) -> None:
    class Net(md.nn.Module):
        def __init__(self) -> None:
            self.embedding = md.nn.Embedding(7, 8)
            self.norm = md.nn.LayerNorm(8)
            self.attention = md.nn.MultiHeadAttention(8, 2, batch_first=True)
            self.hidden = md.nn.Linear(8, 16)
            self.out = md.nn.Linear(16, 7)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.embedding(ids))
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.out(ops.relu(self.hidden(x)))

    ids = Tensor(backend.to(np.random.default_rng(0).integers(0, 7, (2, 5)), "cuda"))
    model = Net().to("cuda")
    optimizer = md.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):  # the first step may make the optimizer's arrays
        double.reset()
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(ids).reshape(10, 7), ids.reshape(10))
        loss.backward()
        optimizer.step()
        assert (double.to_device, double.to_host) == (0, 0)
    assert np.isfinite(loss.item())


# -- what users write -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [md.ones(3), md.ones(3).sum()], ids=["dims", "none"])
def test_a_numpy_number_never_widens_a_tensor(y: Tensor) -> None:
    root = np.sqrt(2)  # a np.float64, and so a Python float as well
    for z in (y * root, root * y, y / root, y + root, root - y, y**root, ops.where(y > 0, y, root)):
        assert z.dtype == np.float32


def test_where_of_two_numbers_is_float32_or_int64() -> None:
    mask = md.tensor([True, False])
    assert ops.where(mask, 1.0, 0).dtype == np.float32
    assert ops.where(mask, 1, 0).dtype == np.int64


def test_division_by_the_very_small_and_large_has_its_gradient() -> None:
    x, y = np.array([1e-25, 1e25], np.float32), md.tensor([1e-25, 1e25], requires_grad=True)
    (Tensor(x) / y).sum().backward()
    assert y.grad is not None
    assert_allclose(y.grad.numpy(), [-1e25, -1e-25], rtol=1e-6)


def test_backward_of_a_quotient_or_a_power_needs_no_more_than_it_uses() -> None:
    x = md.tensor([1.0, 2.0], requires_grad=True)
    y, z = x / 2, x**2
    with md.no_grad():
        z.zero_()
        x_before = x.numpy().copy()
    z.sum().backward()
    assert x.grad is not None
    assert_array_equal(x.grad.numpy(), 2 * x_before)
    with md.no_grad():
        x.add_(1)
    y.sum().backward()
    assert_array_equal(x.grad.numpy(), 2 * x_before + 0.5)


@pytest.mark.parametrize("name", ["mean", "var", "std"])
def test_statistics_of_many_float16_stay_finite(name: str, device: str) -> None:
    numbers = np.tile(np.array([2, 4], np.float16), 40_000)
    x = Tensor(backend.to(numbers, device), requires_grad=True)
    y = getattr(x, name)()
    assert y.dtype == np.float16
    assert_allclose(y.item(), getattr(md.tensor(numbers).double(), name)().item(), rtol=1e-3)
    y.backward()
    assert x.grad is not None and x.grad.dtype == np.float16
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("name", ["mean", "var", "std"])
def test_statistics_of_integers_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} of a int64 tensor.*x\.float\(\)"):
        getattr(md.arange(3), name)()


def test_einsum_broadcasts_dims_of_1_and_refuses_mixed_dtypes() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 1, 3)), np.random.default_rng(1).normal(size=(2, 4, 3))
    gradcheck(lambda x, y: ops.einsum("...i,...i->...", x, y), x, y)
    gradcheck(lambda x, y: ops.einsum("bti,bti->t", x, y), x, y)
    gradcheck(lambda x, y: ops.einsum("i,i->", x, y), x[0, 0], y[0, 0, :1])
    with pytest.raises(TypeError, match="float64, float32"):
        ops.einsum("i,i->", Tensor(x[0, 0]), md.ones(3))


@pytest.mark.parametrize("target", [[0, 1, 1], [False, True, True]])
def test_binary_targets_may_be_integers_or_booleans(target: list[int]) -> None:
    x = md.tensor([0.5, -1.0, 2.0])
    loss = ops.binary_cross_entropy_with_logits(x, md.tensor(target))
    assert loss.dtype == np.float32
    expected = ops.binary_cross_entropy_with_logits(x, md.tensor(target).float())
    assert loss.item() == expected.item()


def test_a_dim_may_be_a_numpy_integer() -> None:
    assert md.ones(2, 3).sum(np.int64(1)).shape == (2,)


def test_masks(device: str) -> None:
    x = Tensor(backend.to(np.arange(6.0).reshape(2, 3), device))
    low, high = x < 4, x > 1
    assert_array_equal((low & high).numpy(), [[False, False, True], [True, False, False]])
    assert_array_equal((~low | ~high).numpy(), [[True, True, False], [False, True, True]])
    assert_array_equal(low.all(1).numpy(), [True, False])
    assert_array_equal(high.any(0, keepdim=True).numpy(), [[True, True, True]])
    assert low.any().item() is True and low.all().item() is False


def test_numpy_numbers_as_arguments_never_widen_a_result() -> None:
    x, half = md.tensor([1.0, -2.0]), np.float64(0.5)
    for y in (x.clip(-half, half), ops.leaky_relu(x, half), ops.softplus(x, half), ops.pad(x, (1, 1), value=half)):
        assert y.dtype == np.float32


def test_padding_with_no_value_pads_zeros() -> None:
    assert_array_equal(ops.pad(md.ones(1), (1, 1), "constant", None).numpy(), [0, 1, 0])


def test_one_element_is_a_view_too(device: str) -> None:
    x = Tensor(backend.to(np.zeros((2, 3)), device))
    x[1, 2].fill_(5)
    x[0][-1].add_(1)
    x[0, ..., 0].fill_(2)
    assert_array_equal(x.numpy(), [[2, 0, 1], [0, 0, 5]])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_a_mean_over_ignored_samples_only_is_nan_with_a_gradient_of_0(options: dict[str, float]) -> None:
    for loss in (ops.cross_entropy, *(() if options else (ops.nll_loss,))):
        x = md.tensor([[0.5, 1.0, 2.0]] * 2, requires_grad=True)
        y = loss(x, md.tensor([-100, -100]), **options)
        assert math.isnan(y.item())
        y.backward()
        assert x.grad is not None
        assert_array_equal(x.grad.numpy(), np.zeros((2, 3)))
