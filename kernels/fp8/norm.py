"""Layer norm whose result is rows in 8 bits: the forward kernel of ``layer_norm`` writes them in place of 16 bits.

``layer_norm/op.py`` and ``fp8_rows.py`` have the equations; y is rounded once, from float32. The backward pass is that
of ``layer_norm``.

Bytes for M rows of width N: forward (itemsize + 1) M N, with a residual (3 itemsize + 1) M N, and 4 M for the scales.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_float
from ..dtypes import accumulate_dtype
from ..fp8_rows import E4M3, Fp8Rows, rounded, takes_rows, zero_carrier
from ..launch import triton_runs_on
from ..layer_norm import cpu, launches
from ..layer_norm.op import (
    _backward,
    _layer_norm_bwd,
    _setup_context,
    as_outputs,
    check_input,
    check_width,
    fake_gradients,
)
from .cpu import with_rows
from .op import fake_rows
from .support import check_fp8

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _plan_forward(x: Tensor, residual: Tensor | None, *args: Any) -> Callable[..., Any]:
    """Return the function that computes a layer norm in 8 bits for tensors with the memory layout of the arguments."""
    if triton_runs_on(x.device):
        return launches.forward(x, residual, *args, in_fp8=True)
    wide = accumulate_dtype(x.dtype)
    normalize = cpu.forward(x.to(wide), residual, *args)

    def compute(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Any, ...]:
        """Compute the layer norm in 8 bits on the CPU."""
        y, *others = normalize(x.to(wide), residual, *args)
        return zero_carrier(x), *rounded(y, E4M3), *others

    return compute


@registered("layer_norm_fp8_fwd")
def _layer_norm_fp8_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Outputs:
    """Return the carrier, the values and the scales of a layer norm, the sum s (empty without a residual), and mean and
    rstd [..., 1] of each row.
    """
    args = x, residual, weight, bias, eps
    carrier, values, scale, s, mean, rstd = _plan_forward(*args)(*args)
    return carrier, values, scale, x.new_empty(0) if s is None else s, mean, rstd


_layer_norm_fp8_fwd.planned_by(_plan_forward)


@_layer_norm_fp8_fwd.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Outputs:
    stream = x if residual is None else residual
    s = x.new_empty(0) if residual is None else stream.new_empty(x.shape)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(stream.dtype)) for _ in range(2))
    return x.new_empty(()).expand(x.shape), *fake_rows(x, E4M3), s, mean, rstd


def _plan_backward(grad_y: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes a layer norm's gradients, and the gradient of x in 8 bits as well, for tensors
    with the memory layout of the arguments.
    """
    if triton_runs_on(grad_y.device):
        return launches.backward(grad_y, *args, in_fp8=True)
    return with_rows(cpu.backward(grad_y, *args), lambda found: found[0] if found[1] is None else found[1])


@registered("layer_norm_fp8_bwd")
def _layer_norm_fp8_bwd(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients that ``layer_norm_bwd`` returns, the norm once more in 16 bits, as ``layer_norm`` rounds it
    (empty without its ``bias``), and values and scales of the gradient of x in 8 bits.
    """
    args = grad_y, grad_s, s, weight, mean, rstd, with_sums, bias
    ds, dx, sums, *y, values, scale = _plan_backward(*args)(*args)
    return *as_outputs(grad_y, mean, ds, dx, sums), *(y or [grad_y.new_empty(0)]), values, scale


_layer_norm_fp8_bwd.planned_by(_plan_backward)


@_layer_norm_fp8_bwd.register_fake
def _(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, with_sums: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = grad_y.new_empty((0,) if bias is None else grad_y.shape)
    return *fake_gradients(grad_y, s, mean, with_sums), y, *fake_rows(grad_y, E4M3)


def _setup_fp8(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    """Save s, weight and statistics for the layer norm's backward pass; of its result in 8 bits, let only the carrier
    have a gradient.
    """
    carrier, values, scale, s, mean, rstd = output
    ctx.mark_non_differentiable(values, scale, mean, rstd, *(() if inputs[1] is not None or s is None else (s,)))
    _setup_context(ctx, inputs, (carrier, s, mean, rstd))
    ctx.op = _layer_norm_fp8_bwd if takes_rows(inputs[0]) else _layer_norm_bwd


def _backward_fp8(
    ctx: Any, grad: Tensor | None, _values: None, _scale: None, grad_s: Tensor | None = None, *_: None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the layer norm to autograd."""
    return _backward(ctx, grad, grad_s, op=ctx.op)


_layer_norm_fp8_fwd.register_autograd(
    _backward_fp8, setup_context=_setup_fp8, results=lambda *args: 3 if args[1] is None else 4
)


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None, backend: str = "auto"
) -> Fp8Rows | tuple[Fp8Rows, Tensor]:
    """Compute a layer norm as rows in e4m3, and the residual addition before it: ``layer_norm`` and ``quantize_rows``
    in one pass.

    The norm is rounded once, from float32. The gradient is that of ``layer_norm``.

    Args:
        x, weight, bias, eps, residual, backend: as ``layer_norm`` takes them. float64, on the CPU, is not rounded.

    Returns:
        The rows [..., N] in 8 bits; with ``residual`` also the sum [..., N], in the dtype of ``residual``.

    Raises:
        ValueError, TypeError: a shape, a device, a dtype or a value that does not fit, or a GPU without fp8.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "layer_norm_fp8"
    options = eps, eps.__class__, backend
    tensors = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    args = x, residual, weight, bias, eps
    compute = _layer_norm_fp8_fwd.find(options, tensors)
    if compute is None:
        check_input(op, x, weight, bias, eps, residual)
        if uses_reference(op, backend, x):
            found: Fp8Rows | tuple[Fp8Rows, Tensor] = reference.layer_norm_fp8(x, weight, bias, eps, residual=residual)
            return found
        check_float(op, x=x, weight=weight, bias=bias, residual=residual)
        check_fp8(op, x.device)
        check_width(op, x)
        args = x, residual, weight, bias, float(eps)
        compute = _layer_norm_fp8_fwd.learn(options, tensors, args)
    carrier, values, scale, *others = compute(*args)
    rows = Fp8Rows(values, scale, carrier)
    return rows if residual is None else (rows, others[0])
