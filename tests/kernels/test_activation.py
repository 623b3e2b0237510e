"""GELU and QuickGELU with a bias: values and gradients, layouts, extremes, bytes."""

import functools

import pytest
import torch

from clipfast.kernels import bias_gelu, bias_quick_gelu, floors, reference

from ..conftest import DTYPES, INTERPRET
from ..numerics import compare, value_and_grads
from .cases import counted_bytes, huge_strides, strided

pytestmark = pytest.mark.usefixtures("poison")

OPS = {"gelu": (bias_gelu, reference.bias_gelu), "quick": (bias_quick_gelu, reference.bias_quick_gelu)}
each_op = pytest.mark.parametrize(("op", "expected"), OPS.values(), ids=OPS)


def inputs_of(shape, dtype, device, *, size=2.0):
    x, grad = (torch.randn(shape).to(device, dtype) for _ in range(2))
    bias = torch.randn(shape[-1]).to(device, torch.promote_types(dtype, torch.float32))
    return {"x": x * size, "bias": bias}, grad


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 64, 77, 1000, 1024, 8192, 8200])
def test_value_and_gradients(width, dtype, op, expected, device):
    # the error of a single sum is luck, so narrow ones are drawn often
    draws = [inputs_of((5 if width > 1024 else 37, width), dtype, device) for _ in range(20 if width < 64 else 1)]
    compare(op, expected, [inputs for inputs, _ in draws], draws[0][1])


@each_op
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (2, 0, 24), (3, 0), (2, 3, 7, 24), (1033, 24)], ids=str)
def test_rows(shape, op, expected, device):
    inputs, grad = inputs_of(shape, torch.float32, device)
    if 0 not in shape:
        compare(op, expected, inputs, grad)
        return
    result = value_and_grads(op, inputs, grad)
    assert result["value"].shape == result["d_x"].shape == shape
    assert result["d_bias"].tolist() == [0.0] * shape[-1]


@each_op
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, op, expected, device):
    inputs, grad = inputs_of((3, 7, 24), torch.float32, device)
    inputs = {name: strided(x, layout) for name, x in inputs.items()}
    compare(op, expected, inputs, strided(grad, layout))
    # one row for all, and what loss.sum().backward() sends
    compare(op, expected, inputs, grad[:, :1].expand(grad.shape))
    compare(op, expected, inputs, torch.ones((), device=device).expand(grad.shape))


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_range(dtype, op, expected, device):
    x = torch.linspace(-60, 60, 4001).to(device, dtype)[:, None].repeat(1, 3)
    bias = torch.tensor([0.0, 0.3, -7.0], device=device)
    compare(op, expected, {"x": x, "bias": bias}, torch.randn(x.shape).to(device, dtype))


@each_op
def test_huge_values_are_not_nan(op, expected, device):
    x = torch.tensor([[-1e38, -1e20, -1e4, 1e4, 1e20, 1e38]], device=device)
    result = value_and_grads(op, {"x": x, "bias": torch.zeros(6, device=device)}, torch.ones_like(x))
    torch.testing.assert_close(result["value"], x.clamp(min=0))
    torch.testing.assert_close(result["d_x"], (x > 0).float())


@each_op
def test_bias_of_another_dtype_and_frozen(op, expected, device):
    inputs, grad = inputs_of((19, 72), torch.float16, device)
    inputs["bias"] = inputs["bias"].half()
    compare(op, expected, inputs, grad)
    result = value_and_grads(op, inputs, grad)
    assert result["d_bias"].dtype == torch.float16
    x = inputs["x"].requires_grad_()
    op(x, inputs["bias"]).backward(grad)
    assert torch.equal(x.grad, result["d_x"])


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    x = huge_strides((5, 48))
    values = torch.randn(5, 48).half()
    x.copy_(values)
    torch.testing.assert_close(bias_gelu(x, torch.ones(48)), bias_gelu(values, torch.ones(48)))


@each_op
@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(op, expected, device, two_threads):
    inputs, grad = inputs_of((4099, 96), torch.float32, device)
    first = value_and_grads(op, inputs, grad)
    for _ in range(5):
        again = value_and_grads(op, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@each_op
@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("shape", [(64, 768), (33, 77)], ids=str)
def test_every_tensor_is_read_or_written_once(shape, op, expected, device, monkeypatch):
    # one program for each block of columns, which loads the bias once
    monkeypatch.setattr("clipfast.kernels.activation.programs_at_once", lambda *args: 1)
    inputs, grad = inputs_of(shape, torch.float16, device)
    floor = functools.partial(floors.bias_act_floor, *shape, 2)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    moved = counted_bytes(monkeypatch)
    y = op(**leaves)
    assert sum(moved) == floor(backward=False).bytes
    moved.clear()
    y.backward(grad)
    assert sum(moved) == floor(backward=True).bytes
