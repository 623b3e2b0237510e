"""GELU and QuickGELU with a bias: shapes and values that no case of the specifications has, bytes, errors."""

import pytest
import torch

from clipfast.kernels import bias_gelu, bias_quick_gelu
from clipfast.kernels.spec import Draw, RowShape, specs

from ..conftest import INTERPRET
from ..numerics import compare, value_and_grads
from .cases import counted_bytes, huge_strides, strided

pytestmark = pytest.mark.usefixtures("poison")

each_op = pytest.mark.parametrize("name", ["bias_gelu", "bias_quick_gelu"])


def call(name, size, dtype, device):
    """The op, its reference, inputs with an x of shape ``size``, and a gradient."""
    spec = specs()[name]
    *rows, width = size
    made = spec.call(RowShape(torch.Size(rows).numel(), width), "", Draw(), dtype)
    inputs = {"x": made.inputs["x"].view(size).to(device), "bias": made.inputs["bias"].to(device)}
    return spec.op, spec.reference, inputs, made.grads[0].view(size).to(device)


@each_op
@pytest.mark.parametrize("size", [(24,), (2, 0, 24), (2, 3, 7, 24)], ids=str)
def test_any_number_of_axes(size, name, device):
    op, reference, inputs, grad = call(name, size, torch.float32, device)
    compare(op, reference, inputs, grad)
    result = value_and_grads(op, inputs, grad)
    assert result["value"].shape == result["d_x"].shape == size


@each_op
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_rows_that_do_not_lie_evenly_apart(layout, name, device):
    op, reference, inputs, grad = call(name, (3, 7, 24), torch.float32, device)
    inputs = {key: strided(x, layout) for key, x in inputs.items()}
    compare(op, reference, inputs, strided(grad, layout))
    # one row of the gradient for all rows of an image
    compare(op, reference, inputs, grad[:, :1].expand(grad.shape))


@each_op
def test_huge_values_are_not_nan(name, device):
    x = torch.tensor([[-1e38, -1e20, -1e4, 1e4, 1e20, 1e38]], device=device)
    result = value_and_grads(specs()[name].op, {"x": x, "bias": torch.zeros(6, device=device)}, torch.ones_like(x))
    torch.testing.assert_close(result["value"], x.clamp(min=0))
    torch.testing.assert_close(result["d_x"], (x > 0).float())


@each_op
def test_a_bias_of_16_bits_and_frozen_inputs(name, device):
    op, reference, inputs, grad = call(name, (19, 72), torch.float16, device)
    inputs["bias"] = inputs["bias"].half()
    compare(op, reference, inputs, grad)
    result = value_and_grads(op, inputs, grad)
    assert result["d_bias"].dtype == torch.float16
    for key in inputs:
        leaf = inputs[key].clone().requires_grad_()
        op(**inputs | {key: leaf}).backward(grad)
        assert torch.equal(leaf.grad, result[f"d_{key}"]), key


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    x = huge_strides((5, 48))
    values = torch.randn(5, 48).half()
    x.copy_(values)
    torch.testing.assert_close(bias_gelu(x, torch.ones(48)), bias_gelu(values, torch.ones(48)))


@each_op
@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("size", [(64, 768), (33, 77)], ids=str)
def test_every_tensor_is_read_or_written_once(size, name, device, monkeypatch):
    # one program for each block of columns, which loads the bias once
    monkeypatch.setattr("clipfast.kernels.activation.programs_at_once", lambda *args: 1)
    op, _, inputs, grad = call(name, size, torch.float16, device)
    floor = specs()[name].floor
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    moved = counted_bytes(monkeypatch)
    y = op(**leaves)
    assert sum(moved) == floor(RowShape(*size), 2, False).bytes
    moved.clear()
    y.backward(grad)
    assert sum(moved) == floor(RowShape(*size), 2, True).bytes


X, W = torch.zeros(4, 8), torch.ones(8)


@pytest.mark.parametrize("op", [bias_gelu, bias_quick_gelu])
@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (1.0, TypeError, "bias must be a torch.Tensor, got float"),
        (W[:7], ValueError, r"bias must be \[8\] on cpu, got \(7,\) on cpu"),
    ],
)
def test_errors(bias, error, message, op):
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(X, bias)
