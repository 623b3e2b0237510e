"""Attention on the packed projection: values and gradients, layouts, extremes."""

import functools

import pytest
import torch

from clipfast.kernels import _launch, attention, reference

from ..conftest import DTYPES, INTERPRET
from ..numerics import as_good_as_torch, compare, value_and_grads
from .cases import ATTENTION_SHAPES, attention_inputs, huge_strides, strided

pytestmark = pytest.mark.usefixtures("poison")


def ops(shape):
    """The op and its reference for ``shape``."""
    options = {"num_heads": shape[2], "causal": shape[4]}
    return functools.partial(attention, **options), functools.partial(reference.attention, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_value_and_gradients(shape, dtype, device):
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, dtype, device)
    compare(op, expected, inputs, grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, causal, device):
    shape = (2, 70, 2, 32, causal)
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    expected = value_and_grads(op, inputs, grad)
    actual = value_and_grads(op, {"qkv": strided(inputs["qkv"], layout)}, strided(grad, layout))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_expanded_gradient(device):
    # What loss.sum().backward() sends: one number with every stride 0.
    op, expected = ops((2, 50, 2, 16, False))
    inputs, _ = attention_inputs((2, 50, 2, 16, False), torch.float32, device)
    compare(op, expected, inputs, torch.ones((), device=device).expand(2, 50, 32))


@pytest.mark.parametrize("size", [8.0, 1e-4], ids=["one-hot", "uniform"])
def test_extreme_scores(size, device):
    shape = (1, 77, 1, 64, True)
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    compare(op, expected, {"qkv": inputs["qkv"] * size}, grad)


def test_keys_beyond_the_end_have_no_weight(device):
    # Scores far below zero everywhere: padded keys, whose score is 0, would take all the weight if they were let in.
    qkv = torch.zeros(1, 50, 3 * 64, device=device)
    qkv[..., :64], qkv[..., 64:128], qkv[..., 128:] = 10.0, -10.0, 1.0
    result = value_and_grads(
        functools.partial(attention, num_heads=1), {"qkv": qkv}, torch.ones(1, 50, 64, device=device)
    )
    torch.testing.assert_close(result["value"], torch.ones_like(result["value"]))
    assert result["d_qkv"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 50, 2, 16, False), (3, 0, 2, 16, True)], ids=["no images", "no tokens"])
def test_empty(shape, device):
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    result = value_and_grads(op, inputs, grad)
    assert result["value"].shape == grad.shape
    assert result["d_qkv"].shape == inputs["qkv"].shape


@pytest.mark.skipif(not INTERPRET, reason="a GPU has its own architecture")
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("shape", [(1, 77, 1, 64, True), (1, 65, 1, 80, False)], ids=str)
def test_configurations_of_other_architectures(shape, arch, device, monkeypatch):
    monkeypatch.setattr(_launch, "CPU_ARCH", arch)
    op, expected = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float16, device)
    compare(op, expected, inputs, grad)


def test_scores_of_minus_infinity(device):
    # A whole first tile without weight: its maximum minus itself must not become NaN.
    qkv = torch.randn(1, 70, 3 * 16, device=device)
    qkv[..., :16].abs_()
    qkv[:, :40, 16:32] = float("-inf")
    op, expected = ops((1, 70, 1, 16, False))
    as_good_as_torch(op(qkv), expected(qkv), expected(qkv.double()), 2.0, "value")


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    qkv = huge_strides((2, 5, 48))
    values = torch.randn(2, 5, 48).half()
    qkv.copy_(values)
    torch.testing.assert_close(attention(qkv, 2), attention(values, 2))


def test_causal_ignores_the_future(device):
    op, _ = ops((1, 77, 2, 32, True))
    inputs, _ = attention_inputs((1, 77, 2, 32, True), torch.float32, device)
    changed = inputs["qkv"].clone()
    changed[:, 40:] = 9.0
    assert torch.equal(op(**inputs)[:, :40], op(changed)[:, :40])


def test_nan_stays_in_its_image(device):
    op, _ = ops((2, 20, 1, 16, False))
    inputs, _ = attention_inputs((2, 20, 1, 16, False), torch.float32, device)
    inputs["qkv"][0, 3, 20] = float("nan")
    out = op(**inputs)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    shape = (2, 77, 2, 64, True)
    op, _ = ops(shape)
    inputs, grad = attention_inputs(shape, torch.float32, device)
    first = value_and_grads(op, inputs, grad)
    for _ in range(5):
        again = value_and_grads(op, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
