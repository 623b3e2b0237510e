"""Layer norm of the residual stream, with the addition that comes before it.

Per row, with width N and, where a residual is given, s = x + residual rounded once to the dtype of the stream:

    mean = sum_n s_n / N        rstd = (sum_n (s_n - mean)^2 / N + eps)^-1/2
    x^_n = (s_n - mean) rstd    y_n = x^_n w_n + b_n

    g_n = dy_n w_n              ds_n = rstd (g_n - mean(g) - x^_n mean(g x^)) + the gradient that arrives through s
    dw_n = sum over rows of dy_n x^_n                  db_n = sum over rows of dy_n

The norm is computed from the rounded s that is stored. So y is a function of the stored s, and the backward pass needs
neither x nor the residual.

Bytes for M rows: forward 2 M N items, with a residual 4 M N; backward 3 M N, with a residual 4 M N: every tensor is
read or written once, and a row stays in registers. Statistics and sums are in float32.
FLOPs: about 8 M N forward and 13 M N backward; they take far less time than the bytes.
Method: layer normalisation (Ba et al. 2016).
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import Op, registered, uses_reference
from ..checks import check_float, check_parameter, check_tensor
from ..configs import WIDTHS
from ..dtypes import accumulate_dtype
from ..fp8_rows import lay_beside
from ..launch import triton_runs_on
from . import cpu, launches

MAX_WIDTH = WIDTHS[-1]


def _plan_forward(x: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes a layer norm for tensors with the memory layout of the arguments."""
    return (launches if triton_runs_on(x.device) else cpu).forward(x, *args)


@registered("layer_norm_fwd")
def _layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the layer norm y, the sum s (empty without a residual), and mean and rstd [..., 1] of each row."""
    y, s, mean, rstd = _plan_forward(x, residual, weight, bias, eps)(x, residual, weight, bias, eps)
    return y, x.new_empty(0) if s is None else s, mean, rstd


_layer_norm_fwd.planned_by(_plan_forward)


@_layer_norm_fwd.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    stream = x if residual is None else residual
    s = x.new_empty(0) if residual is None else stream.new_empty(x.shape)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(stream.dtype)) for _ in range(2))
    return x.new_empty(x.shape), s, mean, rstd


def _plan_backward(grad_y: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes a layer norm's gradients for tensors with the layout of the arguments."""
    return (launches if triton_runs_on(grad_y.device) else cpu).backward(grad_y, *args)


def as_outputs(grad_y: Tensor, mean: Tensor, ds: Tensor, dx: Tensor | None, sums: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer norm's gradients as its registered ops have to: with an empty tensor in place of None, and the
    gradients of weight and bias in one tensor.
    """
    if sums.__class__ is tuple:
        sums = mean.new_empty(2, 0) if sums[0] is None else torch.stack(sums)
    return ds, grad_y.new_empty(0) if dx is None else dx, sums


@registered("layer_norm_bwd")
def _layer_norm_bwd(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the layer norm: of s, of x, and of weight and bias in float32 [2, N].

    The gradient of x is empty if it has the dtype of the gradient of s, to which it is then equal. The gradients of the
    parameters are empty unless ``with_sums``.
    """
    args = grad_y, grad_s, s, weight, mean, rstd, with_sums
    return as_outputs(grad_y, mean, *_plan_backward(*args)(*args))


_layer_norm_bwd.planned_by(_plan_backward)


@_layer_norm_bwd.register_fake
def _(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_gradients(grad_y, s, mean, with_sums)


def fake_gradients(grad_y: Tensor, s: Tensor, mean: Tensor, with_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without values in the shapes of the layer norm's gradients."""
    dx = grad_y.new_empty((0,) if grad_y.dtype == s.dtype else s.shape)
    return s.new_empty(s.shape), dx, mean.new_empty(2, s.shape[-1] if with_sums else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the sum s, the weight and the statistics of the layer norm for the backward pass."""
    x, residual, weight, bias, _ = inputs
    ctx.x_dtype, ctx.bias_dtype, ctx.has_sum = x.dtype, bias.dtype, residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight, *output[2:])


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None = None, *_: None, op: Op = _layer_norm_bwd
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the layer norm, which ``op`` computes, to autograd."""
    if not ctx.has_sum:
        grad_s = None  # a compiled graph makes a gradient even for the empty tensor that stands for s
    if grad_y is None:
        # Only the sum s was used, not the norm.
        return grad_s if grad_s is None else grad_s.to(ctx.x_dtype), grad_s, None, None, None
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    s, weight, _, _ = saved
    with_sums = needed[2] or needed[3]
    options = (with_sums,)
    tensors = (grad_y, *saved) if grad_s is None else (grad_y, grad_s, *saved)
    args = grad_y, grad_s, *saved, with_sums
    ds, dx, sums, *rows = (op.find(options, tensors) or op.learn(options, tensors, args))(*args)
    dx = ds if ctx.x_dtype is s.dtype else dx
    if rows:
        lay_beside(dx, *rows[-2:])
    d_residual = ds if needed[1] else None
    if not with_sums:
        return dx, d_residual, None, None, None
    dw, db = sums if sums.__class__ is tuple else sums.unbind(0)
    if dw.dtype is not weight.dtype or db.dtype is not ctx.bias_dtype:
        dw, db = dw.to(weight.dtype), db.to(ctx.bias_dtype)
    return dx, d_residual, dw, db, None


def _count_results(x: Tensor, residual: Tensor | None, *_: Any) -> int:
    """Return the number of results of the layer norm: y, and s with a residual."""
    return 1 if residual is None else 2


_layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context, results=_count_results)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: None = ..., backend: str = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor, backend: str = ...
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a layer norm over the last dimension, and the residual addition before it in the same pass.

    Autocast changes nothing: a 16-bit stream is read and written as it is, with statistics in float32.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU); any strides (rows that do not lie evenly apart
            are copied first). N is from 1 to 8,192 outside the reference.
        weight, bias: [N], of any floating dtype: float32 under a 16-bit ``x``, as a model keeps it.
        eps: added to the variance, not negative.
        residual: [..., N], the residual stream that ``x`` is added to; it may have another dtype than ``x``, such as
            float32 where autocast makes ``x`` bfloat16.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The norm [..., N] in the dtype of ``x``, contiguous; with ``residual`` also the sum [..., N] in the dtype of
        ``residual``. The sum is rounded to that dtype before it is normalised.

    Raises:
        ValueError, TypeError: a shape, a device, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "layer_norm"
    options = eps, eps.__class__, backend
    tensors = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    compute = _layer_norm_fwd.find(options, tensors)
    if compute is not None:
        outputs = compute(x, residual, weight, bias, eps)
        return outputs[0] if residual is None else outputs[:2]
    check_input(op, x, weight, bias, eps, residual)
    if uses_reference(op, backend, x):
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    check_float(op, x=x, weight=weight, bias=bias, residual=residual)
    check_width(op, x)
    args = x, residual, weight, bias, float(eps)
    outputs = _layer_norm_fwd.learn(options, tensors, args)(*args)
    return outputs[0] if residual is None else outputs[:2]


def check_input(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> None:
    """Refuse tensors, or an eps, that the layer norm ``op`` cannot take, with a ValueError or a TypeError."""
    check_tensor(op, "x", x, None)
    check_parameter(op, "weight", weight, x)
    check_parameter(op, "bias", bias, x)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    if residual is not None:
        check_tensor(op, "residual", residual, None)
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"{op}: residual must be {tuple(x.shape)} on {x.device}, "
                f"got {tuple(residual.shape)} on {residual.device}"
            )


def check_width(op: str, x: Tensor) -> None:
    """Refuse rows of a layer norm that are empty or too wide for a tile, with a ValueError."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: rows must be 1 to {MAX_WIDTH} wide, got {x.shape[-1]}: use backend='torch'")
