"""Two layer norms in a row: the one at the entrance of a CLIP image tower, and the first one of its first block.

Per row, with the equations of ``layer_norm.op`` for each of the two:

    s = LN_1(x), rounded once to the dtype of x        y = LN_2(s)

    ds = (gradient through LN_2 of dy) + the gradient that arrives through s
    dx = gradient through LN_1 of ds        and the parameters' gradients of both

The second norm takes s as it is stored, rounded. Forward writes s, since the residual stream goes on from it; backward
does not read s, but makes it again from x.

Bytes for M rows of width N: forward 3 M N items, backward 4 M N; two layer norms take 4 M N and, with the addition of
two gradients between them, 9 M N. Statistics and sums are in float32. Rows wider than
4,096, which no CLIP has, take two layer norms.
FLOPs: about 16 M N forward and 28 M N backward, far below what the bytes take.
Method: layer normalisation (Ba et al. 2016), twice.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_float, check_parameter, check_tensor
from ..common import as_rows
from ..dtypes import accumulate_dtype
from ..launch import triton_runs_on
from . import cpu, launches
from .op import check_eps, check_width, layer_norm

MAX_WIDTH = 4096  # of one pass: with four sums over rows, wider rows do not fit the registers


@registered("layer_norm_pair_fwd")
def _layer_norm_pair_fwd(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, eps_1: float, eps_2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, y, and the mean and rstd [4, ...] of each row in both norms."""
    path = launches if triton_runs_on(x.device) else cpu
    s, y, stats = path.pair_forward(as_rows(x), [weight_1, bias_1, weight_2, bias_2], eps_1, eps_2)
    return s.view(x.shape), y.view(x.shape), stats.view(4, *x.shape[:-1])


@_layer_norm_pair_fwd.register_fake
def _(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, eps_1: float, eps_2: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats = x.new_empty((4, *x.shape[:-1]), dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), stats


@registered("layer_norm_pair_bwd")
def _layer_norm_pair_bwd(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor,
    weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, stats: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, and of the four parameters in float32 [4, N] (empty unless ``with_sums``)."""
    path = launches if triton_runs_on(x.device) else cpu
    rows_of_s = None if grad_s is None else as_rows(grad_s)
    parameters = [weight_1, bias_1, weight_2]
    dx, sums = path.pair_backward(rows_of_s, as_rows(grad_y), as_rows(x), parameters, stats.view(4, -1), with_sums)
    return dx.view(x.shape), sums


@_layer_norm_pair_bwd.register_fake
def _(
    grad_s: Tensor | None, grad_y: Tensor, x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor,
    stats: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), stats.new_empty(4, x.shape[-1] if with_sums else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [parameter.dtype for parameter in parameters]
    # the last bias is only added, so its value has no part in any gradient
    ctx.save_for_backward(x, *parameters[:3], output[2])


def _backward(ctx: Any, grad_s: Tensor | None, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, *parameters, stats = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 4
    if grad_y is None:
        if grad_s is None:
            return (None,) * 7
        # only the first norm was used
        with_sums = any(ctx.needs_input_grad[1:3])
        mean, rstd = stats[0], stats[1]
        dx, _, sums = torch.ops.clipfast.layer_norm_bwd(grad_s, None, x, parameters[0], mean, rstd, with_sums)
    else:
        with_sums = any(ctx.needs_input_grad[1:5])
        dx, sums = torch.ops.clipfast.layer_norm_pair_bwd(grad_s, grad_y, x, *parameters, stats, with_sums)
    if with_sums:
        grads[: len(sums)] = [total.to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=False)]
    return dx, *grads, None, None


_layer_norm_pair_fwd.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_pair(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    eps_1: float = 1e-5,
    eps_2: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute a layer norm over the last dimension, and a second layer norm of the result in the same pass.

    Autocast changes nothing: a 16-bit ``x`` is read and written as it is, with statistics in float32.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU); any strides (rows that do not lie evenly apart
            are copied first). N is from 1 to 8,192 outside the reference.
        weight_1, bias_1, weight_2, bias_2: [N] of the first and the second norm, of any floating dtype: float32 under
            a 16-bit ``x``, as a model keeps it.
        eps_1, eps_2: added to the variance of each norm, not negative.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        The first norm and the second, each [..., N] in the dtype of ``x``, contiguous. The first is rounded to that
        dtype before the second is taken.

    Raises:
        ValueError, TypeError: a shape, a device, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "layer_norm_pair"
    parameters = weight_1, bias_1, weight_2, bias_2
    names = "weight_1", "bias_1", "weight_2", "bias_2"
    check_tensor(op, "x", x, None)
    for name, parameter in zip(names, parameters, strict=True):
        check_parameter(op, name, parameter, x)
    check_eps(op, "eps_1", eps_1)
    check_eps(op, "eps_2", eps_2)
    if uses_reference(op, backend, x):
        return reference.layer_norm_pair(x, *parameters, eps_1, eps_2)
    for name, tensor in zip(("x", *names), (x, *parameters), strict=True):
        check_float(op, name, tensor)
    check_width(op, x)
    if x.shape[-1] > MAX_WIDTH:
        s = layer_norm(x, weight_1, bias_1, eps_1, backend=backend)
        return s, layer_norm(s, weight_2, bias_2, eps_2, backend=backend)
    s, y, _ = _layer_norm_pair_fwd(x, *parameters, float(eps_1), float(eps_2))
    return s, y
