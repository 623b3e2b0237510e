"""A linear layer whose products multiply 8-bit operands, and a cache of weights in 8 bits between optimizer steps.

With Q(A) the rows of A in 8 bits, each with its scale (``fp8_rows.py``), for x [M, K] and a weight W [N, K]:

    y  = Q(x) Q(W)^T + b        dx = Q(dy) Q(W^T)^T        db = sum over rows of dy

    switchback      dW = dy^T Q(x)                          in 16 bits, the rows of x read as 16-bit numbers
    full            dW = Q(dy^T) Q(Q(x)^T)^T                in 8 bits

The backward pass reads Q(x), 8 bits a number, instead of x. In ``switchback``, dW is the exact gradient with respect to
Q(W) of the y that was computed, so no rounding is added to those of the forward pass. The gradient of a rounding is
taken to be 1. A model's block that is one function (``clipfast/models/whole_block.py``) computes dW = dy^T x instead.

FLOPs: 2 M N K for each of the three products. Bytes: M K + N K + 2 M N forward.
Method: SwitchBack, in the form that keeps 8 bits (Wortsman et al. 2023, "Stable and low-precision training for
large-scale vision-language models").
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_device, check_float, check_tensor
from ..common import as_rows
from ..dtypes import autocast_to
from ..fp8_rows import E4M3, E5M2, Fp8Rows, Fp8Weight, rows_beside
from ..launch import triton_runs_on
from . import cpu, launches
from .multiply import multiply
from .op import quantize_rows, quantize_weight
from .support import check_fp8

RECIPES = ("switchback", "full")
EIGHT_BITS = (E4M3, E5M2)


@registered("fp8_linear_fwd")
def _fp8_linear_fwd(
    carrier: Tensor, values: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, row_values: Tensor,
    row_scale: Tensor, column_values: Tensor, column_scale: Tensor, full: bool,
) -> Tensor:  # fmt: skip
    """Return the linear layer's output [..., N]. This is the registered op.

    Args:
        carrier, values, scale: the rows of the input in 8 bits.
        weight: [N, K], which is not read, and only receives its gradient.
        bias: [N] or None.
        row_values, row_scale, column_values, column_scale: the rows and the columns of the weight in 8 bits.
        full: whether the weight's gradient is computed in 8 bits.
    """
    y = multiply(as_rows(values), scale.flatten(), row_values, row_scale, carrier.dtype, bias)
    return y.view(*values.shape[:-1], len(row_values))


_fp8_linear_fwd.planned_by(lambda *_: _fp8_linear_fwd.run)


@_fp8_linear_fwd.register_fake
def _(
    carrier: Tensor, values: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, row_values: Tensor,
    row_scale: Tensor, column_values: Tensor, column_scale: Tensor, full: bool,
) -> Tensor:  # fmt: skip
    return carrier.new_empty((*values.shape[:-1], row_values.shape[0]))


def _plan_backward(
    grad: Tensor, grad_values: Tensor | None, grad_scale: Tensor | None, values: Tensor, scale: Tensor,
    column_values: Tensor, column_scale: Tensor, full: bool, with_dx: bool, with_dw: bool, with_db: bool,
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that computes a linear layer's gradients for tensors with the layout of the arguments."""
    # For an empty matrix the kernels start no program, which leaves its scales unwritten. The CPU's functions write 1.
    side: Any = launches if triton_runs_on(grad.device) and grad.numel() else cpu
    dy, rows, dtype = as_rows(grad), as_rows(values), grad.dtype
    quantize = side.quantize(dy, E4M3) if grad_values is None else None
    if with_dw and full:
        quantize_both, quantize_columns = side.quantize_both(dy, E4M3), side.quantize_columns(rows, E4M3)
    elif with_dw:
        dequantize = side.dequantize(rows, dtype)

    def compute(
        grad: Tensor, grad_values: Any, grad_scale: Any, values: Tensor, scale: Tensor, column_values: Tensor,
        column_scale: Tensor, *_: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Compute the gradients of a linear layer, for tensors of the planned layout."""
        dy, rows, scale = as_rows(grad), as_rows(values), scale.flatten()
        dx = dw = db = None
        if with_dw and full:
            dy_values, dy_scale, columns, columns_scale = quantize_both(dy)
            x_columns, x_scale = quantize_columns(rows, scale)
            dw = multiply(columns, columns_scale, x_columns, x_scale, dtype)
        elif with_dx:
            dy_values, dy_scale = quantize(dy) if quantize else (as_rows(grad_values), grad_scale.view(-1))
        if with_dw and not full:
            dw = dy.T @ dequantize(rows, scale)
        if with_dx:
            dx = multiply(dy_values, dy_scale, column_values, column_scale, dtype).view(values.shape)
        if with_db:
            db = dy.sum(0, dtype=scale.dtype)
        return dx, dw, db

    return compute


@registered("fp8_linear_bwd")
def _fp8_linear_bwd(
    grad: Tensor, grad_values: Tensor | None, grad_scale: Tensor | None, values: Tensor, scale: Tensor,
    column_values: Tensor, column_scale: Tensor, full: bool, with_dx: bool, with_dw: bool, with_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the linear layer: of its input, its weight, and its bias (float32).

    Gradients that are not wanted are empty. ``grad_values`` and ``grad_scale`` are the rows of ``grad`` in 8 bits; if
    they are None, ``grad`` is rounded here.
    """
    args = (
        grad, grad_values, grad_scale, values, scale, column_values, column_scale, full, with_dx, with_dw, with_db
    )  # fmt: skip
    dx, dw, db = _plan_backward(*args)(*args)
    empty = (like.new_empty(0) for like in (grad, grad, scale))
    dx, dw, db = (nothing if x is None else x for x, nothing in zip((dx, dw, db), empty, strict=True))
    return dx, dw, db


_fp8_linear_bwd.planned_by(_plan_backward)


@_fp8_linear_bwd.register_fake
def _(
    grad: Tensor, grad_values: Tensor | None, grad_scale: Tensor | None, values: Tensor, scale: Tensor,
    column_values: Tensor, column_scale: Tensor, full: bool, with_dx: bool, with_dw: bool, with_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = grad.new_empty(values.shape if with_dx else (0,))
    dw = grad.new_empty((grad.shape[-1], values.shape[-1]) if with_dw else (0,))
    return dx, dw, scale.new_empty(grad.shape[-1] if with_db else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the 8-bit rows of the linear layer's input, and the columns of its weight, for the backward pass."""
    carrier, values, scale, weight, bias, _, _, column_values, column_scale, ctx.full = inputs
    if not weight.is_leaf:  # an empty part stands for a computed weight, whose memory would be kept
        with torch.enable_grad():
            weight = weight[:0].clone()
    ctx.operands = carrier, weight
    ctx.dtypes, ctx.takes_rows = (weight.dtype, None if bias is None else bias.dtype), not ctx.full
    ctx.save_for_backward(values, scale, column_values, column_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the linear layer to autograd."""
    if torch.is_grad_enabled():
        # The products read other tensors than the op's operands. With empty parts of these in the upstream gradient,
        # autograd finds a second derivative, and refuses it.
        grad = torch.cat([grad, *(x[:0].flatten().to(grad.dtype) for x in ctx.operands)])
    needs = ctx.needs_input_grad
    wanted = needs[0], needs[3], needs[4]
    found = _fp8_linear_bwd(grad, *rows_beside(grad), *ctx.saved_tensors, ctx.full, *wanted)
    dx, dw, db = (x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True))
    dw, db = (x if x is None else x.to(dtype) for x, dtype in zip((dw, db), ctx.dtypes, strict=True))
    return dx, None, None, dw, db, None, None, None, None, None


_fp8_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _optimizer_steps() -> list[int]:
    """Return a list with one number: how many steps the optimizers of this process have taken since the first call.

    :class:`CachedWeights` needs it, since fused optimizers change weights without changing the counter that PyTorch
    keeps of a tensor's changes.
    """
    steps = [0]

    def count(*_: Any) -> None:
        """Count a step of an optimizer, after which the 8-bit forms of weights are out of date."""
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


class CachedWeights:
    """The 8-bit forms of weights, computed when first asked for and again after a weight has changed.

    They are computed again after each step of an optimizer, and if PyTorch's counter of a tensor's changes, or its
    address, has changed. Code that writes past that counter has to call :meth:`clear`: through ``.data``, by a replayed
    CUDA graph that holds an optimizer's step, or by loading weights that FSDP2 shards and gathers.
    Nothing is kept under a compiler or in the capture of a CUDA graph, whose replay must compute them again.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._steps = _optimizer_steps()

    def get(self, weight: Tensor, *, backend: str = "auto") -> Fp8Weight:
        """Return the 8-bit forms of a weight [N, K] as it is now; raise the errors of ``quantize_weight``."""
        if torch.compiler.is_compiling() or weight.is_inference():
            return quantize_weight(weight, backend=backend)
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return quantize_weight(weight, backend=backend)
        layout = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        state = self._steps[0], weight._version, *layout, backend
        known = self._known.get(weight)
        if known is None or known[0] != state:
            with torch.inference_mode(False):  # else training could not use tensors that an evaluation has made
                known = self._known[weight] = state, quantize_weight(weight, backend=backend)
        found: Fp8Weight = known[1]
        return found

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle as an object that knows no weights and counts the steps of its own process."""
        return type(self), ()

    def clear(self) -> None:
        """Forget all weights, so that their 8-bit forms are computed again."""
        self._known.clear()


def fp8_linear(
    x: Tensor | Fp8Rows, weight: Tensor, bias: Tensor | None = None, *, recipe: str = "switchback",
    weight_fp8: Fp8Weight | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute a linear layer, x W^T + b, by products of e4m3 operands with a scale for each row.

    Forward and input gradient are always products in 8 bits. On a CPU these are emulated exactly, with sums in float32.
    The backward pass keeps only the 8-bit rows of ``x``.

    Args:
        x: [..., K], float32, float16 or bfloat16 (float64, on the CPU, is not rounded), or its rows in e4m3, as an op
            that quantises has returned them.
        weight: [N, K], of any floating dtype.
        bias: [N] or None, of any floating dtype.
        recipe: "switchback" computes the weight's gradient in the dtype of ``x``, "full" in 8 bits.
        weight_fp8: ``quantize_weight(weight)``, if it is known already. It must belong to the present values of
            ``weight``; :meth:`CachedWeights.get` makes sure of that.
        backend: "auto" (kernels on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [..., N] in the dtype of ``x``; under autocast in the autocast dtype, unless ``x`` is in 8 bits already.

    Raises:
        ValueError, TypeError: a shape, a device, a dtype or a name that does not fit, or a GPU without fp8.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "fp8_linear"
    rows = x.values if isinstance(x, Fp8Rows) else x
    check_tensor(op, "x", rows, None, also=EIGHT_BITS)
    check_tensor(op, "weight", weight, 2)
    check_device(op, "weight", weight, "x", rows)
    if weight.shape[1] != rows.shape[-1]:
        raise ValueError(f"{op}: weight must be [N, {rows.shape[-1]}], got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, 1)
        check_device(op, "bias", bias, "x", rows)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{len(weight)}], got {tuple(bias.shape)}")
    if recipe not in RECIPES:
        raise ValueError(f"{op}: recipe must be {' or '.join(map(repr, RECIPES))}, got {recipe!r}")
    if weight_fp8 is not None:
        _check_weight(op, weight_fp8, weight)
    if isinstance(x, Tensor):
        x = autocast_to(x)
    if uses_reference(op, backend, rows):
        return reference.fp8_linear(x, weight, bias, recipe=recipe, weight_fp8=weight_fp8)
    if isinstance(x, Tensor):
        check_float(op, x=x, weight=weight, bias=bias)
        check_fp8(op, x.device, max(weight.shape))
        x = quantize_rows(x, backend=backend)
    of_rows, of_columns = weight_fp8 or quantize_weight(weight, backend=backend)
    carrier = x.values.new_zeros((), dtype=x.dtype).expand(x.values.shape) if x.carrier is None else x.carrier
    return _fp8_linear_fwd(carrier, x.values, x.scale, weight, bias, *of_rows[:2], *of_columns[:2], recipe == "full")


def _check_weight(op: str, found: Fp8Weight, weight: Tensor) -> None:
    """Refuse 8-bit forms whose shape or device is not that of ``weight``."""
    for name, rows, shape in (("rows", found.rows, weight.shape), ("columns", found.columns, weight.T.shape)):
        if rows.values.shape != shape or rows.values.device != weight.device:
            raise ValueError(
                f"{op}: the {name} of weight_fp8 must be {tuple(shape)} on {weight.device}, "
                f"got {tuple(rows.values.shape)} on {rows.values.device}"
            )
