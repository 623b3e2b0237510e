"""Two layer norms in one pass: values and gradients, layouts, extremes, bytes."""

import functools

import pytest
import torch
from torch import Tensor

from clipfast.kernels import configs, floors, launch, layer_norm, layer_norm_pair, reference

from ..conftest import DTYPES, INTERPRET
from ..numerics import FORWARD, GRADIENT, as_good_as_torch, compare, value_and_grads
from .cases import both, counted_bytes, huge_strides, pair_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")

# one; odd; a power of two; the text tower's length; CLIP's widths, those that are no power of two too; the widest that
# one pass takes, and the widest of all
WIDTHS = (1, 3, 64, 77, 768, 1000, 1024, 1664, 4096, 8192)


def ours(**inputs):
    return both(inputs, layer_norm_pair)


def expected(**inputs):
    return both(inputs, reference.layer_norm_pair)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_value_and_gradients(width, dtype, device):
    rows = 5 if width > 1024 else 37
    # the error of a few sums is luck, so narrow ones are drawn often
    made = [pair_inputs((rows, width), dtype, device) for _ in range(20 if width < 64 else 1)]
    draws, grad = [inputs for inputs, _ in made], made[0][1]
    if width == 1:
        # a row of one is its own mean: what is left of its gradient is rounding, of which these numbers have none
        for inputs in draws:
            inputs["x"] = torch.zeros(rows, 1, dtype=dtype, device=device)
            inputs["bias_1"].fill_(0.5)
            inputs["weight_2"].fill_(1)
        grad = grad.sign()
    compare(ours, expected, draws, grad)


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (2, 0, 24), (2, 3, 7, 24), (4099, 24)], ids=str)
def test_rows(shape, device):
    inputs, grad = pair_inputs(shape, torch.float32, device)
    if 0 not in shape:
        compare(ours, expected, inputs, grad)
        return
    result = value_and_grads(ours, inputs, grad)
    assert result["value"].shape == grad.shape
    assert result["d_x"].shape == shape
    for name in ("weight_1", "bias_1", "weight_2", "bias_2"):
        assert result[f"d_{name}"].tolist() == [0.0] * 24


@pytest.mark.parametrize("of_parameters", [torch.float16, torch.float32], ids=str)
def test_parameters_of_any_dtype(of_parameters, device):
    inputs, grad = pair_inputs((19, 72), torch.float16, device)
    inputs = {name: x if name == "x" else x.to(of_parameters) for name, x in inputs.items()}
    compare(ours, expected, inputs, grad)
    results = value_and_grads(ours, inputs, grad)
    assert {results[f"d_{name}"].dtype for name in inputs if name != "x"} == {of_parameters}


@pytest.mark.parametrize("eps", [(1e-5, 1e-5), (1e-5, 0.5), (0.5, 1e-5)], ids=str)
@pytest.mark.parametrize("width", [72, 4100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_as_one_norm_after_the_other(dtype, width, eps, device):
    # what is stored is normalised, and each norm has its own eps
    inputs, grad = pair_inputs((9, width), dtype, device)

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


@pytest.mark.parametrize("used", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_two_results(dtype, used, device):
    inputs, grad = pair_inputs((9, 24), dtype, device)
    names = ("x", "weight_1", "bias_1", "weight_2", "bias_2") if used else ("x", "weight_1", "bias_1")
    plain = reference.layer_norm_pair
    norms = (layer_norm_pair, torch.clone), (plain, torch.clone), (plain, Tensor.double)
    results = []
    for norm, copy in norms:
        leaves = {name: copy(x).requires_grad_() for name, x in inputs.items()}
        y = norm(**leaves)[used]
        y.backward(grad.chunk(2, -1)[used].to(y))
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in inputs:
        assert (results[0][name] is None) == (name not in names)
    for name in names:
        as_good_as_torch(*(result[name] for result in results), GRADIENT, name)


def test_frozen_parameters(device):
    inputs, grad = pair_inputs((9, 24), torch.float32, device)
    expected = value_and_grads(ours, inputs, grad)
    x = inputs["x"].clone().requires_grad_()
    ours(**(inputs | {"x": x})).backward(grad)
    assert torch.equal(x.grad, expected["d_x"])
    bias_2 = inputs["bias_2"].clone().requires_grad_()
    ours(**(inputs | {"bias_2": bias_2})).backward(grad)
    assert torch.equal(bias_2.grad, expected["d_bias_2"])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    inputs, grad = pair_inputs((3, 7, 24), torch.float32, device)
    inputs = {name: strided(x, layout) for name, x in inputs.items()}
    compare(ours, expected, inputs, strided(grad, layout))
    # one row for all, and what loss.sum().backward() sends
    compare(ours, expected, inputs, grad[:, :1].expand(grad.shape))
    compare(ours, expected, inputs, torch.ones((), device=device).expand(grad.shape))


@pytest.mark.parametrize("layout", ["", "transposed", "sliced", "offset"])
def test_layouts_of_separate_gradients(layout, device):
    # those of a concatenation have its strides, both the same
    inputs, grad = pair_inputs((3, 7, 24), torch.float32, device)
    grad_s, grad_y = (x.contiguous() for x in grad.chunk(2, -1))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    same = value_and_grads(ours, inputs, grad)
    torch.autograd.backward(layer_norm_pair(**leaves), (grad_s, strided(grad_y, layout)))
    torch.testing.assert_close(leaves["x"].grad, same["d_x"])
    torch.testing.assert_close(leaves["weight_2"].grad, same["d_weight_2"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_values(size, dtype, device):
    inputs, grad = pair_inputs((9, 72), dtype, device)
    inputs["x"] *= size
    compare(ours, expected, inputs, grad)


def test_constant_rows(device):
    # no variance: the first norm is its bias, the second the norm of that
    x = torch.tensor([[3.0], [-8192.0], [0.0]], device=device).repeat(1, 64).requires_grad_()
    weight_1, bias_1, weight_2, bias_2 = torch.randn(4, 64).to(device)
    s, y = layer_norm_pair(x, weight_1, bias_1, weight_2, bias_2)
    torch.testing.assert_close(s, bias_1.expand(3, 64))
    torch.testing.assert_close(y, reference.layer_norm(bias_1, weight_2, bias_2).expand(3, 64))
    grad = torch.randn(3, 64).to(device)
    s.backward(grad)
    g = grad * weight_1
    torch.testing.assert_close(x.grad, (g - g.mean(1, keepdim=True)) * 1e-5**-0.5, rtol=1e-4, atol=1e-3)


def test_a_first_weight_of_zero(device):
    # the second norm's rows are constant, but for rounding
    inputs, _ = pair_inputs((5, 64), torch.float32, device)
    inputs |= {"weight_1": torch.zeros(64, device=device), "bias_1": torch.full((64,), 0.5, device=device)}
    s, y = layer_norm_pair(**inputs)
    assert torch.equal(s, torch.full_like(s, 0.5))
    torch.testing.assert_close(y, inputs["bias_2"].expand(5, 64))


@pytest.mark.parametrize("which", ["x", "bias_1"])
def test_a_mean_far_from_zero(which, device):
    # E[x^2] - E[x]^2 would have nothing left of the variance, of either norm
    inputs, _ = pair_inputs((9, 768), torch.float32, device)
    inputs[which] += 3000
    truth = expected(**{name: x.double() for name, x in inputs.items()})
    as_good_as_torch(ours(**inputs), expected(**inputs), truth, FORWARD, "value")


def test_nan_stays_in_its_row(device):
    inputs, grad = pair_inputs((9, 24), torch.float32, device)
    inputs["x"][3, 5] = float("nan")
    result = value_and_grads(ours, inputs, grad)
    for name in ("value", "d_x"):
        assert result[name].isnan().any(1).tolist() == [row == 3 for row in range(9)]


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    x = huge_strides((5, 48))
    values = torch.randn(5, 48).half()
    x.copy_(values)
    parameters = torch.randn(4, 48)
    torch.testing.assert_close(layer_norm_pair(x, *parameters), layer_norm_pair(values, *parameters))


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    inputs, grad = pair_inputs((4099, 96), torch.float32, device)
    first = value_and_grads(ours, inputs, grad)
    for _ in range(5):
        again = value_and_grads(ours, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("shape", [(64, 768), (33, 77), (5, 1664)], ids=str)
def test_every_tensor_is_read_or_written_once(shape, device, monkeypatch):
    # one program, which loads the parameters once
    monkeypatch.setattr("clipfast.kernels.norm.programs_at_once", lambda *args: 1)
    inputs, grad = pair_inputs(shape, torch.float16, device)
    floor = functools.partial(floors.layer_norm_pair_floor, *shape, 2)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    moved = counted_bytes(monkeypatch)
    results = layer_norm_pair(**leaves)
    assert sum(moved) == floor(backward=False).bytes
    moved.clear()
    torch.autograd.backward(results, grad.chunk(2, -1))
    assert sum(moved) == floor(backward=True).bytes


def test_the_buffer_of_sums_does_not_grow_with_the_rows():
    for rows in (1, 3, 100000):
        x = torch.zeros(rows, 64, requires_grad=True)
        with launch.record_launches(90) as launches:
            torch.cat(layer_norm_pair(x, *torch.ones(4, 64, requires_grad=True))).sum().backward()
        cfg = configs.row_config("layer_norm_pair_bwd", 90, torch.float32, 64)
        at_most = launch.programs_at_once(x.device, cfg.num_warps, 128)
        assert len(launches[-1].args["sums_ptr"]) == launches[-1].grid[0] <= at_most
