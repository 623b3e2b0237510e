"""Rounding of rows to 8 bits with a scale each; ``fp8_rows.py`` has the equations.

Bytes for M rows of width K: K items read and K bytes written for each row, and 4 bytes for its scale. A weight [N, K]
is rounded along its rows and along its columns. The scale of a column is known only when all of the column was read, so
the weight is read twice: 2 N K items and 2 N K bytes.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_float, check_tensor
from ..dtypes import dtype_name
from ..fp8_rows import E4M3, LARGEST, Fp8Rows, Fp8Weight, zero_carrier
from . import cpu

Carried = tuple[Tensor, Tensor, Tensor]


@registered("quantize_rows")
def _quantize_rows(x: Tensor, dtype: torch.dtype) -> Carried:
    """Return the carrier, the values and the scales of rows. This is the registered op."""
    return zero_carrier(x), *cpu.quantize(x, dtype)


@_quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Carried:
    return x.new_empty(()).expand(x.shape), *_fake_rows(x, dtype)


def _fake_rows(x: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return tensors without values in the shapes of values and scales of the rows of ``x``."""
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


@registered("quantize_both")
def _quantize_both(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values and scales of the rows, and of the columns, of a matrix. This is the registered op."""
    return cpu.quantize_both(x, dtype)


@_quantize_both.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_rows(x, dtype), *_fake_rows(x, dtype, transposed=True)


def quantize_rows(x: Tensor, dtype: torch.dtype = E4M3, *, backend: str = "auto") -> Fp8Rows:
    """Round rows to 8 bits, each with a scale of its own, by which its largest number becomes the dtype's largest.

    Rounding is to the nearest, ties to even, and nothing overflows. A row of zeros gets the scale 1. NaN and infinities
    become NaN; the other numbers of their row are as accurate as without them. The gradient passes unchanged.

    Args:
        x: [..., K], float32, float16 or bfloat16; any strides. float64, on the CPU, is not rounded (see ``Fp8Rows``).
        dtype: ``torch.float8_e4m3fn``, or ``torch.float8_e5m2``, which has a wider range and half the digits.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The rows in 8 bits.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run, or a GPU without fp8.
    """
    op = "quantize_rows"
    check_tensor(op, "x", x, None)
    if dtype not in LARGEST:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(dtype_name, LARGEST))}, got {dtype}")
    if uses_reference(op, backend, x):
        return reference.quantize_rows(x, dtype)
    check_float(op, x=x)
    carrier, values, scale = _quantize_rows(x, dtype)
    return Fp8Rows(values, scale, carrier)


def quantize_weight(weight: Tensor, *, backend: str = "auto") -> Fp8Weight:
    """Round a weight to e4m3 along its rows, for the forward pass, and along its columns, for the input's gradient.

    Args:
        weight: [N, K], float32, float16 or bfloat16; any strides. float64, on the CPU, is not rounded.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The rows [N, K] and the columns [K, N] in 8 bits; they have no gradient.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run, or a GPU without fp8.
    """
    op = "quantize_weight"
    check_tensor(op, "weight", weight, 2)
    if uses_reference(op, backend, weight):
        return reference.quantize_weight(weight)
    check_float(op, weight=weight)
    values, scale, column_values, column_scale = _quantize_both(weight.detach(), E4M3)
    return Fp8Weight(Fp8Rows(values, scale), Fp8Rows(column_values, column_scale))
