"""Rounding of rows to 8 bits with a scale each; ``fp8_rows.py`` has the equations.

Bytes for M rows of width K: K items read and K bytes written for each row, and 4 bytes for its scale. A weight [N, K]
is rounded along its rows and along its columns. The scale of a column is known only when all of the column was read, so
the weight is read twice: 2 N K items and 2 N K bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..activation import op as activation
from ..backends import planned_op, registered, uses_reference
from ..checks import check_float, check_parameter, check_tensor
from ..dtypes import dtype_name
from ..fp8_rows import E4M3, LARGEST, Fp8Rows, Fp8Weight, takes_rows
from ..launch import triton_runs_on
from . import cpu, launches
from .support import check_fp8

Carried = tuple[Tensor, Tensor, Tensor]


@planned_op("quantize_rows")
def _quantize_rows(x: Tensor, dtype: torch.dtype) -> Callable[..., Carried]:
    """Return the function that rounds rows with the layout of ``x`` to 8 bits.

    It returns their carrier, values and scales.
    """
    compute = (launches if triton_runs_on(x.device) else cpu).quantize(x, dtype, carried=True)
    return lambda x, _: compute(x)


@_quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Carried:
    return x.new_empty(()).expand(x.shape), *fake_rows(x, dtype)


def fake_rows(x: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return fake values and scales of the rows of ``x``, or of its columns if ``transposed``."""
    is_exact = x.dtype == torch.float64
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2]) if transposed else tuple(x.shape)
    values = x.new_empty(shape, dtype=torch.float64 if is_exact else dtype)
    return values, x.new_empty(shape[:-1], dtype=torch.float64 if is_exact else torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Carried) -> None:
    """Let only the carrier of quantised rows have a gradient."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
    """Pass the gradient of quantised rows on as if nothing had been rounded."""
    return grad, None


_quantize_rows.register_autograd(_backward, setup_context=_setup_context, results=lambda *_: 3)


@planned_op("quantize_both")
def _quantize_both(x: Tensor, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the function that rounds matrices with the layout of ``x`` to 8 bits along rows and columns.

    It returns the values and scales of the rows, and those of the columns.
    """
    # For an empty matrix the kernels start no program, which leaves its scales unwritten. The CPU's functions write 1.
    compute = (launches if triton_runs_on(x.device) and x.numel() else cpu).quantize_both(x, dtype)
    return lambda x, _: compute(x)


@_quantize_both.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *fake_rows(x, dtype), *fake_rows(x, dtype, transposed=True)


def quantize_rows(x: Tensor, dtype: torch.dtype = E4M3, *, backend: str = "auto") -> Fp8Rows:
    """Round rows to 8 bits, each with a scale of its own, by which its largest number becomes the dtype's largest.

    Rounding is to the nearest, ties to even, and nothing overflows. A row of zeros gets the scale 1. NaN stays NaN,
    and the other numbers of its row are as accurate as without it. A row with an infinity becomes NaN as a whole. The
    gradient passes unchanged.

    Args:
        x: [..., K], float32, float16 or bfloat16; any strides. float64, on the CPU, is not rounded (see ``Fp8Rows``).
        dtype: ``torch.float8_e4m3fn``, or ``torch.float8_e5m2``, which has a wider range and half the digits.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The rows in 8 bits.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit, or a GPU without fp8.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op, options, args = "quantize_rows", (dtype, backend), (x, dtype)
    compute = _quantize_rows.find(options, (x,))
    if compute is not None:
        carrier, values, scale = compute(*args)
        return Fp8Rows(values, scale, carrier)
    check_tensor(op, "x", x, None)
    if dtype not in LARGEST:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(dtype_name, LARGEST))}, got {dtype}")
    if uses_reference(op, backend, x):
        return reference.quantize_rows(x, dtype)
    check_float(op, x=x)
    check_fp8(op, x.device, x.shape[-1])
    carrier, values, scale = _quantize_rows.learn(options, (x,), args)(*args)
    return Fp8Rows(values, scale, carrier)


def quantize_weight(weight: Tensor, *, backend: str = "auto") -> Fp8Weight:
    """Round a weight to e4m3 along its rows, for the forward pass, and along its columns, for the input's gradient.

    Args:
        weight: [N, K], float32, float16 or bfloat16; any strides. float64, on the CPU, is not rounded.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The rows [N, K] and the columns [K, N] in 8 bits; they have no gradient.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit, or a GPU without fp8.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "quantize_weight"
    check_tensor(op, "weight", weight, 2)
    if uses_reference(op, backend, weight):
        return reference.quantize_weight(weight)
    check_float(op, weight=weight)
    check_fp8(op, weight.device)
    weight = weight.detach()
    options, args = (backend,), (weight, E4M3)
    compute = _quantize_both.find(options, (weight,)) or _quantize_both.learn(options, (weight,), args)
    values, scale, column_values, column_scale = compute(*args)
    return Fp8Weight(Fp8Rows(values, scale), Fp8Rows(column_values, column_scale))


@planned_op("bias_act_fp8_fwd")
def _bias_act_fp8_fwd(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Carried]:
    """Return the function that computes GELU or QuickGELU of x + bias in 8 bits for tensors with the layout of ``x``.

    It returns the carrier, the values and the scales.
    """
    return (launches if triton_runs_on(x.device) else cpu).bias_act(x, bias, quick)


@_bias_act_fp8_fwd.register_fake
def _(x: Tensor, bias: Tensor, quick: bool) -> Carried:
    return x.new_empty(()).expand(x.shape), *fake_rows(x, E4M3)


def _plan_bias_act_bwd(grad: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes the gradients of bias and activation, and that of x in 8 bits as well, for
    tensors with the layout of the arguments.
    """
    return (launches if triton_runs_on(grad.device) else cpu).bias_act_bwd(grad, *args)


@registered("bias_act_fp8_bwd")
def _bias_act_fp8_bwd(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients that ``bias_act_bwd`` returns, the activation once more in 16 bits, as ``bias_gelu`` rounds
    it (empty unless ``with_y``), and values and scales of the gradient of x in 8 bits.
    """
    args = grad, x, bias, quick, with_sums, with_y
    dx, sums, *y, values, scale = _plan_bias_act_bwd(*args)(*args)
    return *activation.as_outputs(x, dx, sums), *(y or [x.new_empty(0)]), values, scale


_bias_act_fp8_bwd.planned_by(_plan_bias_act_bwd)


@_bias_act_fp8_bwd.register_fake
def _(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape if with_y else (0,))
    return *activation.fake_gradients(x, with_sums), y, *fake_rows(x, E4M3)


def _bias_act_context(ctx: Any, inputs: tuple[Any, ...], output: Carried) -> None:
    """Save x and bias for the backward pass of GELU or QuickGELU, as the op in 16 bits does."""
    _setup_context(ctx, inputs, output)
    activation._setup_context(ctx, inputs, output[0])
    ctx.op = _bias_act_fp8_bwd if takes_rows(inputs[0]) else activation._bias_act_bwd


def _bias_act_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of GELU or QuickGELU of x + bias to autograd."""
    return (None, None, None) if grad is None else activation._backward(ctx, grad, ctx.op)


_bias_act_fp8_fwd.register_autograd(_bias_act_backward, setup_context=_bias_act_context, results=lambda *_: 3)


def bias_gelu_fp8(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Fp8Rows:
    """Compute GELU(x + bias), by the error function, as rows in e4m3: ``bias_gelu`` and ``quantize_rows`` in one pass.

    The activation is rounded once, from float32. The gradient is that of ``bias_gelu``.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64, on the CPU, is not rounded); any strides. N is at most
            16,384 on GPUs.
        bias: [N], of any floating dtype.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The rows in 8 bits.

    Raises:
        ValueError, TypeError: a shape, a device or a dtype that does not fit, or a GPU without fp8.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    return _bias_act_rows("bias_gelu_fp8", x, bias, backend)


def bias_quick_gelu_fp8(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Fp8Rows:
    """Compute QuickGELU(x + bias), u sigmoid(1.702 u), as rows in e4m3.

    The arguments, the result and the errors are those of :func:`bias_gelu_fp8`.
    """
    return _bias_act_rows("bias_quick_gelu_fp8", x, bias, backend)


def _bias_act_rows(op: str, x: Tensor, bias: Tensor, backend: str) -> Fp8Rows:
    """Check the input of bias_gelu_fp8 or bias_quick_gelu_fp8 and compute it."""
    options, tensors, args = (op, backend), (x, bias), (x, bias, op == "bias_quick_gelu_fp8")
    compute = _bias_act_fp8_fwd.find(options, tensors)
    if compute is None:
        check_tensor(op, "x", x, None)
        check_parameter(op, "bias", bias, x)
        if uses_reference(op, backend, x):
            return reference.bias_quick_gelu_fp8(x, bias) if args[2] else reference.bias_gelu_fp8(x, bias)
        check_float(op, x=x, bias=bias)
        check_fp8(op, x.device, x.shape[-1])
        compute = _bias_act_fp8_fwd.learn(options, tensors, args)
    carrier, values, scale = compute(*args)
    return Fp8Rows(values, scale, carrier)
