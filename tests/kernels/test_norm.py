"""Layer norm: values and gradients with and without a residual, layouts, extremes, bytes."""

import functools

import pytest
import torch

from clipfast.kernels import configs, floors, launch, layer_norm, reference

from ..conftest import DTYPES, INTERPRET
from ..numerics import FORWARD, as_good_as_torch, compare, value_and_grads
from .cases import both, counted_bytes, huge_strides, norm_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")

# one; odd; a power of two; the text tower's length; CLIP's widths, those that are no power of two too; the widest
WIDTHS = (1, 3, 64, 77, 768, 1000, 1024, 1664, 8192)


def sum_and_norm(norm, **inputs):
    return both(inputs, norm)


def ops(residual):
    """The op and its reference, both results in one tensor where there are two."""
    if not residual:
        return layer_norm, reference.layer_norm
    return functools.partial(sum_and_norm, layer_norm), functools.partial(sum_and_norm, reference.layer_norm)


def call(shape, dtype, device, residual):
    inputs, grad = norm_inputs(shape, dtype, device, residual=residual)
    return inputs, torch.cat([grad, grad.flip(0)], -1) if residual else grad


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_value_and_gradients(width, dtype, residual, device):
    rows = 5 if width > 1024 else 37
    inputs, grad = call((rows, width), dtype, device, residual)
    if width == 1:
        # a row of one is its own mean: what is left of its gradient is rounding
        inputs["x"] = torch.zeros(rows, 1, dtype=dtype, device=device)
        # the gradient of the bias is one number, of which PyTorch's error is small by chance: this sum is exact
        grad = (8 * grad).round() / 8
    compare(*ops(residual), inputs, grad)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (2, 0, 24), (2, 3, 7, 24), (4099, 24)], ids=str)
def test_rows(shape, residual, device):
    inputs, grad = call(shape, torch.float32, device, residual)
    if 0 not in shape:
        compare(*ops(residual), inputs, grad)
        return
    result = value_and_grads(ops(residual)[0], inputs, grad)
    assert result["value"].shape == grad.shape
    assert result["d_x"].shape == shape
    assert result["d_weight"].tolist() == result["d_bias"].tolist() == [0.0] * 24


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")], ids=str)
def test_a_stream_of_another_dtype(dtypes, device):
    # autocast makes what is added 16-bit; the stream that it is added to may be float32
    of_x, of_stream = (getattr(torch, name) for name in dtypes)
    inputs, grad = norm_inputs((19, 72), of_x, device, residual=True)
    inputs["residual"] = inputs["residual"].to(of_stream)
    y, s = layer_norm(**inputs)
    assert (y.dtype, s.dtype) == (of_x, of_stream)
    compare(*ops(True), inputs, torch.cat([grad, grad], -1).to(torch.float32))


@pytest.mark.parametrize("of_parameters", [torch.float16, torch.float32], ids=str)
def test_parameters_of_any_dtype(of_parameters, device):
    inputs, grad = call((19, 72), torch.float16, device, True)
    inputs |= {name: inputs[name].to(of_parameters) for name in ("weight", "bias")}
    compare(*ops(True), inputs, grad)
    assert value_and_grads(ops(True)[0], inputs, grad)["d_weight"].dtype == of_parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_once_and_what_is_stored_is_normalised(dtype, device):
    inputs, _ = norm_inputs((33, 72), dtype, device, residual=True)
    y, s = layer_norm(**inputs)
    assert torch.equal(s, inputs["x"] + inputs["residual"])
    assert torch.equal(y, layer_norm(s, inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
def test_one_of_two_results(used, device):
    inputs, grad = norm_inputs((9, 24), torch.float32, device, residual=True)
    op, expected = (lambda norm=norm, **inputs: norm(**inputs)[used] for norm in (layer_norm, reference.layer_norm))
    x, residual = (inputs[name].requires_grad_() for name in ("x", "residual"))
    actual = torch.autograd.grad(op(**inputs), (x, residual), grad)
    same = torch.autograd.grad(expected(**inputs), (x, residual), grad)
    for ours, theirs in zip(actual, same, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters(device):
    inputs, grad = norm_inputs((9, 24), torch.float32, device, residual=False)
    expected = value_and_grads(layer_norm, inputs, grad)["d_x"]
    x = inputs["x"].requires_grad_()
    layer_norm(x, inputs["weight"], inputs["bias"]).backward(grad)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    op, expected = ops(True)
    inputs, grad = call((3, 7, 24), torch.float32, device, True)
    inputs = {name: strided(x, layout) for name, x in inputs.items()}
    compare(op, expected, inputs, strided(grad, layout))
    # one row for all, and what loss.sum().backward() sends
    compare(op, expected, inputs, grad[:, :1].expand(grad.shape))
    compare(op, expected, inputs, torch.ones((), device=device).expand(grad.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_values(size, dtype, device):
    inputs, grad = call((9, 72), dtype, device, True)
    inputs |= {name: inputs[name] * size for name in ("x", "residual")}
    compare(*ops(True), inputs, grad)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_constant_rows(eps, device):
    # no variance: eps alone keeps the scale finite
    x = torch.tensor([[3.0], [-8192.0], [0.0]], device=device).repeat(1, 64).requires_grad_()
    weight, bias = torch.randn(2, 64).to(device)
    y = layer_norm(x, weight, bias, eps)
    torch.testing.assert_close(y, bias.expand(3, 64))
    grad = torch.randn(3, 64).to(device)
    y.backward(grad)
    g = grad * weight
    torch.testing.assert_close(x.grad, (g - g.mean(1, keepdim=True)) * eps**-0.5, rtol=1e-4, atol=1e-3)


def test_a_mean_far_from_zero(device):
    # E[x^2] - E[x]^2 would have nothing left of the variance
    inputs, _ = norm_inputs((9, 768), torch.float32, device, residual=False)
    inputs["x"] += 3000
    truth = reference.layer_norm(**{name: x.double() for name, x in inputs.items()})
    as_good_as_torch(layer_norm(**inputs), reference.layer_norm(**inputs), truth, FORWARD, "value")


def test_nan_stays_in_its_row(device):
    inputs, grad = norm_inputs((9, 24), torch.float32, device, residual=False)
    inputs["x"][3, 5] = float("nan")
    result = value_and_grads(layer_norm, inputs, grad)
    for name in ("value", "d_x"):
        assert result[name].isnan().any(1).tolist() == [row == 3 for row in range(9)]


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    x = huge_strides((5, 48))
    values = torch.randn(5, 48).half()
    x.copy_(values)
    parameters = torch.randn(2, 48)
    torch.testing.assert_close(layer_norm(x, *parameters), layer_norm(values, *parameters))


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    inputs, grad = call((4099, 96), torch.float32, device, True)
    first = value_and_grads(ops(True)[0], inputs, grad)
    for _ in range(5):
        again = value_and_grads(ops(True)[0], inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
def test_autocast_leaves_the_stream_as_it_is(device):
    inputs, _ = norm_inputs((9, 24), torch.bfloat16, device, residual=True)
    with torch.autocast(device.type, torch.bfloat16):
        y, s = layer_norm(**inputs)
    assert y.dtype == s.dtype == torch.bfloat16
    inputs = {name: x.float() for name, x in inputs.items()}
    with torch.autocast(device.type, torch.bfloat16):
        y, s = layer_norm(**inputs)
    assert y.dtype == s.dtype == torch.float32


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(64, 768), (33, 77), (5, 1664)], ids=str)
def test_every_tensor_is_read_or_written_once(shape, residual, device, monkeypatch):
    # one program, which loads the parameters once
    monkeypatch.setattr("clipfast.kernels.norm.programs_at_once", lambda *args: 1)
    inputs, grad = call(shape, torch.float16, device, residual)
    floor = functools.partial(floors.layer_norm_floor, *shape, 2, residual=residual)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    moved = counted_bytes(monkeypatch)
    results = layer_norm(**leaves)
    assert sum(moved) == floor(backward=False).bytes
    moved.clear()
    torch.autograd.backward(results, grad.chunk(2, -1) if residual else grad)
    assert sum(moved) == floor(backward=True).bytes


def test_the_buffer_of_sums_does_not_grow_with_the_rows():
    for rows in (1, 3, 100000):
        x = torch.zeros(rows, 64, requires_grad=True)
        with launch.record_launches(90) as launches:
            layer_norm(x, torch.ones(64, requires_grad=True), torch.ones(64)).sum().backward()
        cfg = configs.row_config("layer_norm_bwd", 90, torch.float32, 64)
        at_most = launch.programs_at_once(x.device, cfg.num_warps, 128)
        assert len(launches[-1].args["dw_ptr"]) == launches[-1].grid[0] <= at_most
