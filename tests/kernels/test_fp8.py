"""Test rows in 8 bits, linear layers on them, and the 8-bit forms of weights that are kept for a step."""

import copy
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clipfast.kernels import (
    CachedWeights,
    Fp8Rows,
    bias_gelu_fp8,
    bias_quick_gelu_fp8,
    fp8_linear,
    fp8_rows,
    layer_norm_fp8,
    quantize_rows,
    quantize_weight,
    reference,
)
from clipfast.kernels.common import cdiv, next_power_of_2
from clipfast.kernels.configs import RowConfig
from clipfast.kernels.fp8 import launches, support
from clipfast.kernels.fp8.multiply import multiply
from clipfast.kernels.fp8_rows import E4M3, E5M2, LARGEST, lay_beside, rows_beside

each_dtype = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
RECIPES = ("switchback", "full")


@each_dtype
def test_rows_of_all_magnitudes(dtype):
    most, inf, nan = LARGEST[dtype], float("inf"), float("nan")
    rows = torch.randn(40, 33) * 2.0 ** torch.linspace(-90, 120, 40)[:, None]
    found = quantize_rows(rows, dtype)
    assert (found.values.float().abs().amax(1) == most).all()
    torch.testing.assert_close(found.dequantize(), rows, rtol=2**-3 if dtype is E5M2 else 2**-4, atol=torch.inf)
    error = (found.dequantize() - rows).abs() / rows.abs().amax(1, keepdim=True)
    assert error.max() <= (2**-3 if dtype is E5M2 else 2**-4)
    zero, tiny = torch.zeros(2, 5), torch.full((2, 5), 1e-40)
    assert quantize_rows(zero, dtype).scale.eq(1).all()
    assert not quantize_rows(zero, dtype).values.float().any()
    assert quantize_rows(tiny, dtype).dequantize().lt(1e-35).all()
    odd = torch.tensor([1.0, nan, -0.25, 0.5])
    torch.testing.assert_close(quantize_rows(odd, dtype).dequantize(), odd, equal_nan=True)
    assert quantize_rows(torch.tensor([1.0, -inf, 0.0]), dtype).dequantize().isnan().all()


def operands(dtype=torch.float32):
    """Return an input, a weight, a bias and an upstream gradient of a linear layer of 72 to 40 features."""
    generator = torch.Generator().manual_seed(0)
    x, w, b, dy = (torch.randn(size, generator=generator) for size in ((3, 50, 72), (40, 72), (40,), (3, 50, 40)))
    return x.to(dtype).requires_grad_(), w.requires_grad_(), b.requires_grad_(), dy.to(dtype)


def expected_of(x, w, dy, recipe):
    """Return output and gradients of a linear layer, without its bias, in float64 on the operands in 8 bits."""
    exact = [rows.wide().double() for rows in (quantize_rows(x), *quantize_weight(w), quantize_rows(dy))]
    rows, weight, columns, grad = (y.flatten(0, -2) for y in exact)
    flat = dy.flatten(0, -2)
    if recipe == "full":
        dw = quantize_weight(flat).columns.wide().double() @ quantize_weight(rows.float()).columns.wide().double().T
    else:
        dw = flat.double().T @ rows.to(x.dtype).double()
    shape = dy.shape[:-1]
    return (rows @ weight.T).unflatten(0, shape), (grad @ columns.T).unflatten(0, shape), dw


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_operands_in_8_bits(dtype, recipe):
    x, w, b, dy = operands(dtype)
    y = fp8_linear(x, w, b, recipe=recipe)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    of_y, of_x, of_w = expected_of(x.detach(), w.detach(), dy, recipe)
    exact = of_y + b.double(), of_x, of_w, dy.flatten(0, -2).double().sum(0)
    for found, expected in zip((y, dx, dw, db), exact, strict=True):
        assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)


def test_only_8_bits_of_the_input_are_kept():
    x, w, _, _ = operands(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        fp8_linear(x, w)
    assert all(y.itemsize == 1 or y.numel() <= x.numel() // 50 for y in saved)


def test_a_computed_weight_is_not_kept():
    x, w, _, _ = operands()
    computed = 2 * w
    kept = weakref.ref(computed)
    output = fp8_linear(x, computed)
    del computed
    assert output.requires_grad
    assert kept() is None


@pytest.mark.parametrize("factor", [None, 2], ids=["leaf", "computed"])
def test_a_second_derivative_is_refused(factor):
    x, w, _, _ = operands()
    total = fp8_linear(x, factor * w if factor else w).sum()
    (of_x,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.autograd.grad(total + of_x.square().sum(), w)


def test_rows_that_an_op_has_quantised_pass_their_gradient_on():
    x, w, b, dy = operands()
    direct = torch.autograd.grad(fp8_linear(x, w, b), (x, w, b), dy)
    rows = quantize_rows(x)
    torch.testing.assert_close(torch.autograd.grad(fp8_linear(rows, w, b), (x, w, b), dy), direct, rtol=0, atol=0)
    constant = Fp8Rows(rows.values, rows.scale)
    assert torch.equal(fp8_linear(constant, w, b), fp8_linear(x, w, b))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_a_weight_is_quantised_again_after_it_has_changed(options):
    w, weights = torch.nn.Parameter(torch.randn(8, 16)), CachedWeights()
    optimizer = torch.optim.AdamW([w], **options)
    first = weights.get(w)
    assert weights.get(w) is first
    w.grad = torch.randn_like(w)
    optimizer.step()
    assert torch.equal(weights.get(w).rows.values.float(), quantize_weight(w).rows.values.float())
    assert weights.get(w) is not first
    with torch.no_grad():
        w[0, 0] = 50.0
    assert weights.get(w).rows.dequantize()[0, 0] == 50.0


def test_weights_that_evaluation_has_quantised_serve_training():
    (x, w, _, _), weights = operands(), CachedWeights()
    with torch.inference_mode():
        fp8_linear(x, w, weight_fp8=weights.get(w))
    found, expected = (torch.autograd.grad(fp8_linear(x, w, weight_fp8=k).sum(), x) for k in (weights.get(w), None))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_cached_weights_notice_steps_too(copied):
    w, weights = torch.nn.Parameter(torch.randn(8, 16)), CachedWeights()
    weights.get(w)
    weights, optimizer = copied(weights), torch.optim.AdamW([w], fused=True)
    weights.get(w)
    w.grad = torch.randn_like(w)
    optimizer.step()
    assert torch.equal(weights.get(w).rows.scale, quantize_weight(w).rows.scale)


def test_wrong_arguments():
    x, w, b, _ = operands()
    for args, options, error, message in (
        ((x, w[:, 1:], b), {}, ValueError, r"weight must be \[N, 72\], got \(40, 71\)"),
        ((x, w, b[1:]), {}, ValueError, r"bias must be \[40\], got \(39,\)"),
        ((x, w), {"recipe": "half"}, ValueError, "recipe must be 'switchback' or 'full', got 'half'"),
        ((x, w), {"weight_fp8": quantize_weight(w.T)}, ValueError, r"rows of weight_fp8 must be \(40, 72\)"),
        ((x.int(), w), {}, TypeError, "x must be one of .*float8_e4m3fn.*, got int32"),
    ):
        with pytest.raises(error, match=f"^fp8_linear: .*{message}"):
            fp8_linear(*args, **options)
    with pytest.raises(TypeError, match=r"^quantize_rows: dtype must be float8_e4m3fn or float8_e5m2, got torch.int8"):
        quantize_rows(x, torch.int8)


def test_products_on_gpus_are_contiguous_as_a_compiler_is_told():
    with FakeTensorMode():
        a, b = (torch.empty(rows, 32).to(E4M3) for rows in (6, 24))
        y = multiply(a, torch.ones(6), b, torch.ones(24), torch.bfloat16)
    assert y.is_contiguous()


def test_registered_ops():
    x, w, b, dy = operands()
    ops, fakes = torch.ops.clipfast, ("test_autograd_registration", "test_faketensor")
    rows, weight = quantize_rows(x.detach()), quantize_weight(w)
    given = (rows.carrier.requires_grad_(), *rows[:2], w, b, *weight.rows[:2], *weight.columns[:2])
    torch.library.opcheck(ops.quantize_rows.default, (x, E4M3), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.quantize_both.default, (w, E4M3), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(ops.quantize_rows(x.detach().double(), E4M3)[1], x)  # not rounded, and no view of the argument
    for full in (False, True):
        torch.library.opcheck(ops.fp8_linear_fwd.default, (*given, full), test_utils=fakes)
        for of_dy in ((None, None), quantize_rows(dy)[:2]):
            backward = (dy, *of_dy, *rows[:2], *weight.columns[:2], full, True, True, True)
            torch.library.opcheck(ops.fp8_linear_bwd.default, backward, test_utils=("test_faketensor",))
    for y in (dy, dy.half()):  # the residual stream has the dtype of the gradient, or another one
        h, stats = y.transpose(0, 1), torch.ones(50, 3, 1)
        for wanted, again in ((False, False), (True, False), (True, True)):
            given = (
                (h, h, b.detach(), False, wanted, again),
                (h, None, dy.transpose(0, 1), b.detach(), stats, stats, wanted, b.detach() if again else None),
            )
            for op, args in zip((ops.bias_act_fp8_bwd, ops.layer_norm_fp8_bwd), given, strict=True):
                torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def bits(rows):
    """Return the bits of values and scales of rows in 8 bits, with 255 for every code of NaN."""
    return torch.where(rows.values.float().isnan(), 255, rows.values.view(torch.uint8)).cpu(), rows.scale.cpu()


def magnitudes(count, width):
    """Return rows of all magnitudes: from subnormal numbers to overflow, with zeros, NaN and infinities in some."""
    rows = torch.randn(count, width) * 2.0 ** torch.linspace(-148, 126, count)[:, None]
    rows *= 2.0 ** torch.randint(-24, 1, rows.shape)
    rows[::17, ::3], rows[3::19], rows[5::23, 1:4] = 0, 0, float("nan")
    rows[7::29, -1], rows[9::31, 0], rows[11::37] = float("inf"), float("-inf"), -0.0
    return rows


@pytest.fixture
def large_tiles(monkeypatch):
    """Let a program of the kernels for rows take 2^18 numbers at once, which the interpreter computes faster."""

    def row_tiles(rows, width, *_):
        """Return the layout of a launch with large tiles."""
        block_n = next_power_of_2(width)
        block_m = 2**18 // block_n
        return RowConfig(block_m, block_n, num_warps=4, num_stages=1), cdiv(rows, block_m), {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_STAGES": 1,
        }  # fmt: skip

    monkeypatch.setattr(launches, "row_tiles", row_tiles)


@pytest.mark.usefixtures("large_tiles")
@each_dtype
def test_kernels_round_10_million_numbers_to_the_bits_of_the_reference(dtype, interpreted):
    for width, numbers in ((1, 2**16), (77, 2**20), (1000, 10**7), (16384, 2**20)):
        rows = magnitudes(numbers // width, width).to(interpreted)
        assert all(map(torch.equal, bits(quantize_rows(rows, dtype)), bits(reference.quantize_rows(rows, dtype))))


@each_dtype
def test_kernels_round_to_the_bits_of_the_reference_in_any_layout(dtype, triton_device):
    x = magnitudes(200, 77).half().to(triton_device)
    for rows in (x.T, x[::2, ::3], x.view(4, 50, 77).transpose(0, 1), x[:1].expand(9, 77), x[0]):
        assert all(map(torch.equal, bits(quantize_rows(rows, dtype)), bits(reference.quantize_rows(rows, dtype))))


@pytest.mark.parametrize("size", [(70, 130), (64, 64), (1, 5), (200, 33)], ids=str)
def test_both_forms_of_a_weight_have_the_bits_of_the_reference(size, triton_device):
    weight = magnitudes(*size).to(triton_device)
    for x in (weight, weight.half(), weight.T):
        for found, expected in zip(quantize_weight(x), reference.quantize_weight(x), strict=True):
            assert all(map(torch.equal, bits(found), bits(expected)))


@pytest.mark.parametrize("size", [(0, 5), (4, 0)], ids=str)
def test_the_scales_of_an_empty_weight_are_1(size, triton_device):
    rows, columns = quantize_weight(torch.empty(size, device=triton_device))
    assert bool((rows.scale == 1).all())
    assert bool((columns.scale == 1).all())


@pytest.mark.parametrize("shape", [(33, 77), (2, 3, 64), (5,)], ids=str)
def test_the_norm_and_the_activations_round_once_from_float32(shape, device):
    x, residual = (torch.randn(shape, device=device).half().requires_grad_() for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], device=device).unbind()
    for op, args, options in (
        (layer_norm_fp8, (x, weight, bias), {}), (layer_norm_fp8, (x, weight, bias), {"residual": residual.float()}),
        (bias_gelu_fp8, (x, bias), {}), (bias_quick_gelu_fp8, (x, bias), {}),
    ):  # fmt: skip
        found, expected = (op(*args, **options, backend=backend) for backend in ("auto", "torch"))
        if options:
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
            found, expected = found[0], expected[0]
        gradients = [torch.autograd.grad(rows.dequantize().float().sum(), x)[0] for rows in (found, expected)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(found.scale, expected.scale)
        # An error in the last digits of float32 may decide how a number halfway between two 8-bit numbers is rounded.
        assert (found.values.float() != expected.values.float()).double().mean() <= 0.01


@pytest.mark.parametrize("shape", [(33, 77), (2, 3, 64), (5, 4100)], ids=str)
def test_gradients_bring_their_rows_in_8_bits(shape, device):
    x, of_linear = torch.randn(*shape[:-1], 8, device=device).half(), torch.randn(shape[-1], 8, device=device)
    residual = torch.randn(shape, device=device).half()
    weight, bias = torch.randn(2, shape[-1], device=device).unbind()
    for op, args, options in (
        (layer_norm_fp8, (weight, bias), {"residual": residual.float()}), (layer_norm_fp8, (weight, bias), {}),
        (layer_norm_fp8, (weight, bias), {"residual": residual}), (bias_gelu_fp8, (bias,), {}),
        (bias_quick_gelu_fp8, (bias,), {}),
    ):  # fmt: skip
        for recipe in RECIPES:
            seen, y = [], fp8_linear(x, of_linear.requires_grad_(), recipe=recipe)
            results = op(y, *args, **options)
            y.register_hook(seen.append)
            rows = results[0] if options else results
            rows.dequantize().backward(torch.randn(shape, device=device).half())
            (grad,), (values, scale) = seen, rows_beside(seen[0])
            assert (values is not None) == (recipe == "switchback")
            if values is not None:
                assert all(map(torch.equal, bits(Fp8Rows(values, scale)), bits(reference.quantize_rows(grad))))
                grad.add_(1)
                assert rows_beside(grad) == (None, None)


@pytest.mark.parametrize("of_stream", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(33, 77), (2, 3, 64), (5, 4100)], ids=str)
def test_backward_kernels_write_results_of_forward_kernels_again(shape, of_stream, device):
    ops = torch.ops.clipfast
    x, dy = (torch.randn(shape, device=device).half() for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], device=device).unbind()
    y, s, mean, rstd = ops.layer_norm_fwd(x, torch.randn(shape, device=device).to(of_stream), weight, bias, 1e-5)
    calls = [(ops.layer_norm_fp8_bwd, (dy, dy.to(of_stream), s, weight, mean, rstd, True), 3, bias, y)]
    for quick in (False, True):
        calls.append((ops.bias_act_fp8_bwd, (dy, x, bias, quick, True), 2, True, ops.bias_act_fwd(x, bias, quick)))
    for op, args, place, wanted, expected in calls:
        with_y, without_y = list(op(*args, wanted)), list(op(*args))
        found, nothing = with_y.pop(place), without_y.pop(place)
        assert nothing.numel() == 0
        assert all(map(torch.equal, with_y, without_y))
        torch.testing.assert_close(found, expected)
        assert (found != expected).double().mean() <= 0.01  # errors in the last digits of float32 may decide a rounding


def test_rows_of_a_gradient_serve_only_the_stream_on_which_they_were_made(monkeypatch):
    grad = torch.randn(3, 8)
    rows, current = quantize_rows(grad)[:2], [1]
    monkeypatch.setattr(fp8_rows, "_stream", lambda _: current[0])
    lay_beside(grad, *rows)
    assert rows_beside(grad) == rows
    current[0] = 2
    assert rows_beside(grad) == (None, None)


def test_a_gradient_that_a_hook_changes_without_a_trace_is_rounded_after_it():
    def triple(grad):
        """Change a gradient through ``.data``, so that PyTorch's counter of the tensor's changes stays as it is."""
        grad.data.mul_(3)

    x, w, b, dy = operands()
    for op, args in ((bias_gelu_fp8, (b,)), (layer_norm_fp8, (b, b))):
        found = []
        for hook in (triple, lambda grad: 3 * grad):
            y = fp8_linear(x, w)
            y.register_hook(hook)
            found.append(torch.autograd.grad(op(y, *args).dequantize(), x, dy)[0])
        assert torch.equal(*found)


def test_a_card_without_numbers_of_8_bits_is_refused(monkeypatch):
    x = operands()[0].detach()
    monkeypatch.setattr(support, "triton_runs_on", lambda device: True)
    monkeypatch.setattr(support, "arch_of", lambda device: 86)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    message = r"^fp8_linear: .* compute capability 8\.9 or newer, .* and NVIDIA A10 has 8\.6: .* by backend='torch'"
    with pytest.raises(ValueError, match=message):
        support.check_fp8("fp8_linear", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"^quantize_rows: rows must be 1 to 16384 wide, got 16385"):
        quantize_rows(torch.ones(2, 16385))
    assert fp8_linear(x, torch.ones(8, 72), backend="torch").shape == (3, 50, 8)
