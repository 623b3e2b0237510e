"""Ops on rows, which are the layer norms and the activations: axes, layouts and dtypes that no case of the
specifications has, algorithms, bytes, errors.
"""

import pytest
import torch

from clipfast.kernels import activation, bias_gelu, bias_quick_gelu, configs, launch, layer_norm, layer_norm_pair
from clipfast.kernels.layer_norm import launches
from clipfast.kernels.layer_norm.spec import NormShape
from clipfast.kernels.spec import RowShape, specs
from clipfast.verify.inputs import lay_out

from ..conftest import DTYPES, INTERPRET
from ..numerics import GRADIENT, as_good_as_torch, compare, value_and_grads
from .conftest import inputs_of

pytestmark = pytest.mark.usefixtures("poison")

KINDS = {
    "alone": ("layer_norm", NormShape),
    "residual": ("layer_norm", lambda rows, width: NormShape(rows, width, residual=True)),
    "pair": ("layer_norm_pair", RowShape),
    "gelu": ("bias_gelu", RowShape),
    "quick_gelu": ("bias_quick_gelu", RowShape),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def side_by_side(op, **inputs):
    """The result of ``op``, or both of its results in one tensor."""
    results = op(**inputs)
    return torch.cat(results, -1) if isinstance(results, tuple) else results


def ops(kind):
    """The op and its reference, each with one tensor as its result."""
    spec = specs()[KINDS[kind][0]]
    return tuple(lambda op=op, **inputs: side_by_side(op, **inputs) for op in (spec.op, spec.reference))


def call(kind, size, dtype, device):
    """Inputs whose streams have the shape ``size``, and the gradients of all results side by side."""
    op, shape = KINDS[kind]
    *rows, width = size
    inputs, grad = inputs_of(op, shape(torch.Size(rows).numel(), width), dtype, device)
    return {name: x.view(size) if x.ndim == 2 else x for name, x in inputs.items()}, grad.view(*rows, grad.shape[-1])


@each_kind
@pytest.mark.parametrize("size", [(24,), (2, 0, 24), (2, 3, 7, 24)], ids=str)
def test_any_number_of_axes(size, kind, device):
    inputs, grad = call(kind, size, torch.float32, device)
    compare(*ops(kind), inputs, grad)
    result = value_and_grads(ops(kind)[0], inputs, grad)
    assert result["value"].shape == grad.shape
    assert result["d_x"].shape == size


@each_kind
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_rows_that_do_not_lie_evenly_apart(layout, kind, device):
    inputs, grad = call(kind, (3, 7, 24), torch.float32, device)
    inputs = {name: lay_out(x, layout) for name, x in inputs.items()}
    compare(*ops(kind), inputs, lay_out(grad, layout))
    # one row of the gradient for all rows of an image
    compare(*ops(kind), inputs, grad[:, :1].expand(grad.shape))


@pytest.mark.parametrize("layout", ["", "transposed", "sliced", "offset"])
def test_gradients_of_two_layouts(layout, device):
    # the gradients of a concatenation have the same strides
    inputs, grad = call("pair", (3, 7, 24), torch.float32, device)
    same = value_and_grads(ops("pair")[0], inputs, grad)
    grad_s, grad_y = (x.contiguous() for x in grad.chunk(2, -1))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.autograd.backward(layer_norm_pair(**leaves), (grad_s, lay_out(grad_y, layout)))
    torch.testing.assert_close(leaves["x"].grad, same["d_x"])
    torch.testing.assert_close(leaves["weight_2"].grad, same["d_weight_2"])


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")], ids=str)
def test_a_stream_of_another_dtype(dtypes, device):
    # autocast gives x 16 bits; the stream that it is added to may be float32
    of_x, of_stream = (getattr(torch, name) for name in dtypes)
    inputs, grad = call("residual", (19, 72), of_x, device)
    inputs["residual"] = inputs["residual"].to(of_stream)
    y, s = layer_norm(**inputs)
    assert (y.dtype, s.dtype) == (of_x, of_stream)
    compare(*ops("residual"), inputs, grad.float())


@each_kind
@pytest.mark.parametrize("of_parameters", [torch.float16, torch.float32], ids=str)
def test_parameters_of_any_dtype(of_parameters, kind, device):
    inputs, grad = call(kind, (19, 72), torch.float16, device)
    inputs = {name: x.to(of_parameters) if x.ndim == 1 else x for name, x in inputs.items()}
    compare(*ops(kind), inputs, grad)
    result = value_and_grads(ops(kind)[0], inputs, grad)
    assert {result[f"d_{name}"].dtype for name, x in inputs.items() if x.ndim == 1} == {of_parameters}


@pytest.mark.parametrize(
    ("kind", "used", "names"),
    [
        ("residual", 0, ("x", "residual", "weight", "bias")),
        ("residual", 1, ("x", "residual")),
        ("pair", 0, ("x", "weight_1", "bias_1")),
        ("pair", 1, ("x", "weight_1", "bias_1", "weight_2", "bias_2")),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_two_results(dtype, kind, used, names, device):
    inputs, grad = call(kind, (9, 24), dtype, device)
    spec = specs()[KINDS[kind][0]]
    results = []
    for norm, copy in ((spec.op, torch.clone), (spec.reference, torch.clone), (spec.reference, torch.Tensor.double)):
        leaves = {name: copy(x).requires_grad_() for name, x in inputs.items()}
        y = norm(**leaves)[used]
        y.backward(grad.chunk(2, -1)[used].to(y))
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    assert {name for name, gradient in results[0].items() if gradient is not None} == set(names)
    for name in names:
        as_good_as_torch(*(result[name] for result in results), GRADIENT, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_once_and_what_is_stored_is_normalised(dtype, device):
    inputs, _ = call("residual", (33, 72), dtype, device)
    y, s = layer_norm(**inputs)
    assert torch.equal(s, inputs["x"] + inputs["residual"])
    assert torch.equal(y, layer_norm(s, inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("eps", [(1e-5, 1e-5), (1e-5, 0.5), (0.5, 1e-5)], ids=str)
@pytest.mark.parametrize("width", [72, 4100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_is_one_norm_after_the_other(dtype, width, eps, device):
    # what is stored is normalised, and each norm has its own eps
    inputs, grad = call("pair", (9, width), dtype, device)

    def one_after_the_other(x, weight_1, bias_1, weight_2, bias_2):
        s = layer_norm(x, weight_1, bias_1, eps[0])
        return torch.cat([s, layer_norm(s, weight_2, bias_2, eps[1])], -1)

    def pair(**inputs):
        return torch.cat(layer_norm_pair(**inputs, eps_1=eps[0], eps_2=eps[1]), -1)

    actual, same = (value_and_grads(op, inputs, grad) for op in (pair, one_after_the_other))
    assert torch.equal(actual["value"], same["value"])
    for name, gradient in same.items():
        # between two ops the gradient of s is rounded
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


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


def test_a_first_weight_of_zero(device):
    # the rows of the second norm are constant, but for rounding
    inputs, _ = call("pair", (5, 64), torch.float32, device)
    inputs |= {"weight_1": torch.zeros(64, device=device), "bias_1": torch.full((64,), 0.5, device=device)}
    s, y = layer_norm_pair(**inputs)
    assert torch.equal(s, torch.full_like(s, 0.5))
    torch.testing.assert_close(y, inputs["bias_2"].expand(5, 64))


@each_kind
def test_nan_stays_in_its_row(kind, device):
    inputs, grad = call(kind, (9, 24), torch.float32, device)
    inputs["x"][3, 5] = float("nan")
    result = value_and_grads(ops(kind)[0], inputs, grad)
    for name in ("value", "d_x"):
        assert result[name].isnan().any(1).tolist() == [row == 3 for row in range(9)]


@each_kind
@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("size", [(64, 768), (33, 77), (5, 1664)], ids=str)
def test_every_tensor_is_read_or_written_once(size, kind, device, monkeypatch, moved):
    # one program for each block of columns, which loads the parameters once
    for module in (launches, activation):
        monkeypatch.setattr(module, "programs_at_once", lambda *args: 1)
    inputs, grad = call(kind, size, torch.float16, device)
    op, shape = KINDS[kind]
    spec, leaves = specs()[op], {name: x.requires_grad_() for name, x in inputs.items()}
    results = spec.op(**leaves)
    assert sum(moved) == spec.floor(shape(*size), 2, False).bytes
    moved.clear()
    torch.autograd.backward(results, grad.chunk(2, -1) if isinstance(results, tuple) else grad)
    assert sum(moved) == spec.floor(shape(*size), 2, True).bytes


@pytest.mark.parametrize(("kind", "buffer"), [("alone", "dw_ptr"), ("pair", "sums_ptr")])
def test_the_buffer_of_sums_does_not_grow_with_the_rows(kind, buffer, device):
    for rows in (1, 3, 100000):
        inputs, grad = call(kind, (rows, 64), torch.float32, "cpu")
        with launch.record_launches(90) as recorded:
            value_and_grads(ops(kind)[0], inputs, grad)
        cfg = configs.row_config(f"{KINDS[kind][0]}_bwd", 90, torch.float32, 64)
        at_most = launch.programs_at_once(torch.device("cpu"), cfg.num_warps, 128)
        assert len(recorded[-1].args[buffer]) == recorded[-1].grid[0] <= at_most


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
def test_huge_values_are_not_nan(kind, device):
    x = torch.tensor([[-1e38, -1e20, -1e4, 1e4, 1e20, 1e38]], device=device)
    result = value_and_grads(ops(kind)[0], {"x": x, "bias": torch.zeros(6, device=device)}, torch.ones_like(x))
    torch.testing.assert_close(result["value"], x.clamp(min=0))
    torch.testing.assert_close(result["d_x"], (x > 0).float())


X, W = torch.zeros(4, 8), torch.ones(8)
NORM = {"x": X, "weight": W, "bias": W}
PAIR = {"x": X, "weight_1": W, "bias_1": W, "weight_2": W, "bias_2": W}
WIDE, WIDE_PAIR = ({name: torch.zeros(*x.shape[:-1], 8193) for name, x in valid.items()} for valid in (NORM, PAIR))
VALID = {layer_norm: NORM, layer_norm_pair: PAIR, bias_gelu: {"x": X, "bias": W}, bias_quick_gelu: {"x": X, "bias": W}}


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        (layer_norm, {"x": torch.zeros(())}, ValueError, r"x must have one dimension or more, got shape \(\)"),
        (layer_norm, {"weight": W[:7]}, ValueError, r"weight must be \[8\] on cpu, got \(7,\) on cpu"),
        (layer_norm, {"bias": W[None]}, ValueError, r"bias must have 1 dimensions, got shape \(1, 8\)"),
        (layer_norm, {"eps": "small"}, TypeError, "eps must be a number, got str"),
        (layer_norm, {"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        (layer_norm, {"residual": X[:3]}, ValueError, r"residual must be \(4, 8\) on cpu, got \(3, 8\) on cpu"),
        (layer_norm, {"x": X[:, :0], "weight": W[:0], "bias": W[:0]}, ValueError, "rows must be 1 to 8192 wide, got 0"),
        (layer_norm, WIDE, ValueError, "rows must be 1 to 8192 wide, got 8193: use backend='torch'"),
        (layer_norm_pair, {"weight_1": W[:7]}, ValueError, r"weight_1 must be \[8\] on cpu, got \(7,\) on cpu"),
        (layer_norm_pair, {"bias_1": W[None]}, ValueError, r"bias_1 must have 1 dimensions, got shape \(1, 8\)"),
        (layer_norm_pair, {"weight_2": 1.0}, TypeError, "weight_2 must be a torch.Tensor, got float"),
        (layer_norm_pair, {"eps_1": "small"}, TypeError, "eps_1 must be a number, got str"),
        (layer_norm_pair, {"eps_2": -1.0}, ValueError, "eps_2 must not be negative, got -1.0"),
        (layer_norm_pair, {name: x[..., :0] for name, x in PAIR.items()}, ValueError, "1 to 8192 wide, got 0"),
        (layer_norm_pair, WIDE_PAIR, ValueError, "1 to 8192 wide, got 8193: use backend='torch'"),
        (bias_gelu, {"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        (bias_gelu, {"bias": W[:7]}, ValueError, r"bias must be \[8\] on cpu, got \(7,\) on cpu"),
        (bias_quick_gelu, {"bias": W[:7]}, ValueError, r"bias must be \[8\] on cpu, got \(7,\) on cpu"),
    ],
)
def test_errors(op, changed, error, message):
    with pytest.raises(error, match=f"^{op.__name__}: .*{message}"):
        op(**VALID[op] | changed)
