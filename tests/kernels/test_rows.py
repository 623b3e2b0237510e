"""Test layer norm and the activations, which work row by row, beyond their cases.

The tests are about axes, layouts, dtypes, algorithms, memory traffic and errors.
"""

import functools
import math

import pytest
import torch

from clipfast.kernels import bias_gelu, layer_norm
from clipfast.kernels.activation import launches as activation
from clipfast.kernels.layer_norm import launches
from clipfast.kernels.layer_norm.spec import NormShape
from clipfast.kernels.spec import RowShape, specs
from clipfast.verify.ops import lay_out

from ..conftest import DTYPES
from ..numerics import compare
from .conftest import call_at, leaves_of

pytestmark = pytest.mark.usefixtures("poison")

KINDS = {
    "alone": ("layer_norm", NormShape),
    "residual": ("layer_norm", functools.partial(NormShape, residual=True)),
    "gelu": ("bias_gelu", RowShape),
    "quick_gelu": ("bias_quick_gelu", RowShape),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def call(kind, size, device, dtype=torch.float32, **options):
    """Return a call of a layer norm or an activation on inputs with any number of axes, of the shape ``size``."""
    op, shape = KINDS[kind]
    flat = call_at(op, shape(math.prod(size[:-1]), size[-1]), device, dtype, **options)
    inputs = {name: x.view(size) if x.ndim == 2 else x for name, x in flat.inputs.items()}
    return flat._replace(inputs=inputs, grads=tuple(grad.view(size) for grad in flat.grads))


@each_kind
@pytest.mark.parametrize("size", [(24,), (2, 0, 24), (2, 3, 7, 24)], ids=str)
def test_any_number_of_axes(size, kind, device):
    streams = call(kind, size, device)
    compare(*streams)
    result = streams.results()
    assert result["value"].shape == result["d_x"].shape == size


@each_kind
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_rows_that_do_not_lie_evenly_apart(layout, kind, device):
    even = call(kind, (3, 7, 24), device)
    uneven = even._replace(inputs={name: lay_out(x, layout) for name, x in even.inputs.items()})
    laid_out = [lay_out(grad, layout) for grad in even.grads]
    two_layouts = [even.grads[0], *laid_out[1:]]
    one_row_for_all_of_an_image = [grad[:, :1].expand(grad.shape) for grad in even.grads]
    for grads in (laid_out, two_layouts, one_row_for_all_of_an_image):
        compare(*uneven._replace(grads=grads))


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")], ids=str)
def test_a_stream_of_another_dtype(dtypes, device):
    # Autocast gives x 16 bits; the residual stream that x is added to may be float32.
    of_x, of_stream = (getattr(torch, name) for name in dtypes)
    added = call("residual", (19, 72), device, of_x)
    added.inputs["residual"] = added.inputs["residual"].to(of_stream)
    compare(*added)
    result = added.results()
    assert (result["value"].dtype, result["value_2"].dtype) == (of_x, of_stream)


@each_kind
@pytest.mark.parametrize("of_parameters", [torch.float16, torch.float32], ids=str)
def test_parameters_of_any_dtype(of_parameters, kind, device):
    half = call(kind, (19, 72), device, torch.float16)
    parameters = {name: x.to(of_parameters) for name, x in half.inputs.items() if x.ndim == 1}
    half.inputs.update(parameters)
    compare(*half)
    result = half.results()
    assert {result[f"d_{name}"].dtype for name in parameters} == {of_parameters}


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results(used, device):
    op, reference, inputs, grads = call("residual", (9, 24), device)

    def gradients(norm):
        """Return the gradients of a layer norm whose other result is not used."""
        leaves = leaves_of(inputs)
        norm(**leaves)[used].backward(grads[used])
        return {name: leaf.grad for name, leaf in leaves.items()}

    # The second result, the residual stream, does not depend on weight and bias, so these have no gradient from it.
    torch.testing.assert_close(gradients(op), gradients(reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_once_and_what_is_stored_is_normalised(dtype, device):
    op, _, inputs, _ = call("residual", (33, 72), device, dtype)
    y, s = op(**inputs)
    assert torch.equal(s, inputs["x"] + inputs["residual"])
    assert torch.equal(y, layer_norm(s, inputs["weight"], inputs["bias"]))


def test_constant_rows(device):
    # The variance is zero, so only eps keeps the scale finite.
    norm = call("alone", (3, 64), device, eps=1e-2)
    norm.inputs["x"].copy_(torch.tensor([[3.0], [-8192.0], [0.0]]))
    compare(*norm)
    torch.testing.assert_close(norm.results()["value"], norm.inputs["bias"].expand(3, 64))


@each_kind
def test_nan_stays_in_its_row(kind, device):
    rows = call(kind, (9, 24), device)
    rows.inputs["x"][3, 5] = float("nan")
    result = rows.results()
    for name in ("value", "d_x"):
        assert result[name].isnan().any(1).tolist() == [row == 3 for row in range(9)]


@each_kind
@pytest.mark.parametrize("size", [(64, 768), (33, 77)], ids=str)
def test_each_tensor_is_read_or_written_once(size, kind, monkeypatch, moved):
    # There is one program for each block of columns, so the parameters are loaded once.
    for module in (launches, activation):
        monkeypatch.setattr(module, "programs_at_once", lambda *args: 1)
    op, _, inputs, grads = call(kind, size, "cpu", torch.float16)
    name, shape = KINDS[kind]
    floor = functools.partial(specs()[name].floor, shape(*size), 2)
    results = op(**leaves_of(inputs))
    assert sum(moved) == floor(backward=False).bytes
    moved.clear()
    torch.autograd.backward(results, grads)
    assert sum(moved) == floor(backward=True).bytes


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
def test_huge_values_are_not_nan(kind, device):
    x = torch.tensor([[-1e38, -1e20, -1e4, 1e4, 1e20, 1e38]], device=device)
    gelu = call(kind, x.shape, device)._replace(grads=(torch.ones_like(x),))
    result = gelu.results(x=x, bias=torch.zeros(6, device=device))
    torch.testing.assert_close(result["value"], x.clamp(min=0))
    torch.testing.assert_close(result["d_x"], (x > 0).float())


X, W = torch.zeros(4, 8), torch.ones(8)
VALID = {layer_norm: {"x": X, "weight": W, "bias": W}, bias_gelu: {"x": X, "bias": W}}
WIDE = {"x": torch.zeros(4, 8193), "weight": torch.zeros(8193), "bias": torch.zeros(8193)}


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        (layer_norm, {"x": torch.zeros(())}, "x .*one dimension or more"),
        (layer_norm, {"weight": W[:7]}, r"weight must be \[8\]"),
        (layer_norm, {"bias": W[None]}, "bias .*1 dimensions"),
        (layer_norm, {"eps": "small"}, "eps .*got str"),
        (layer_norm, {"eps": -1.0}, "eps .*got -1.0"),
        (layer_norm, {"residual": X[:3]}, r"residual must be \(4, 8\)"),
        (layer_norm, {"x": X[:, :0], "weight": W[:0], "bias": W[:0]}, "1 to 8192 wide, got 0"),
        (layer_norm, WIDE, "8193: use backend='torch'"),
        (bias_gelu, {"bias": W[:7]}, r"bias must be \[8\]"),
    ],
)
def test_errors(op, changed, message):
    with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: .*{message}"):
        op(**VALID[op] | changed)
