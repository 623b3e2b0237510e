"""NT-Xent, SimCLR's loss of two views of each image.

With views x, y [N, D] and scale s, each of the 2N views is classified among all views but itself:

    Z of x_i = sum_{j != i} [exp(s x_i . x_j) + exp(s x_i . y_j)], and of y_i likewise
    L = 1/2N sum over all views of log(1 + Z / exp(s x_i . y_i))

The product x y^T serves both views, and x x^T and y y^T are symmetric. That makes three products in place of four:
6 N^2 D FLOPs forward and 14 N^2 D backward. Pairs and logits are treated as in InfoNCE (``nce``).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import planned_op, uses_reference
from ..checks import check_bool
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from . import cpu, merges
from .shared import (
    call_planned,
    check_pairs,
    features_pass,
    gradients_in_strips,
    is_small_block,
    logit_blocks,
    new_gradient,
    operand_dtype,
    prepare_both,
    register_gradients,
    scale_gradient,
    scale_tensor,
)
from .small_batch import suits_whole, whole_nt_xent_loss, whole_operands
from .stats import Normalizers, merge, new_accumulator, pair_terms


@planned_op("nt_xent_fwd")
def _nt_xent_fwd(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the function that computes the NT-Xent loss for tensors with the layout of the arguments.

    It returns the loss, and for the backward pass row [2, 3, N], col [2, 3, N] and uses_shared_shift []. ``row``
    belongs to the first views and ``col`` to the second. Both hold maximum, inv_denom and one_minus_p (summed over both
    views of the pair) twice: [0] treats a view as a row of the logits of its own side, and [1] as a column. These
    logits are symmetric, so [0] and [1] differ by rounding only.
    """
    if not triton_runs_on(first.device):
        return _nt_xent_on_cpu
    forward = functools.partial(merges.nt_xent, normalize=normalize, dtype=dtype)
    return features_pass(forward, (first, second, None), dtype, normalize=normalize)


def _nt_xent_on_cpu(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the op for NT-Xent, on a CPU."""
    x, y = (cpu.prepare(side, dtype, normalize=normalize).rows for side in (first, second))
    # Among the logits of first views with first views, and of second with second, the pairs with offset 0 are each view
    # with itself. They are left out; all other logits belong to negatives.
    within = [cpu.statistics(side, side, logit_scale, 0) for side in (x, y)]
    across = cpu.statistics(x, y, logit_scale, 0)
    sums = [
        [merge([part, other]) for part in (own.rows, own.cols)]
        for own, other in zip(within, (across.rows, across.cols), strict=True)
    ]
    terms = [[pair_terms(*part, across.positive) for part in side] for side in sums]
    one_minus_p = terms[0][0].one_minus_p + terms[1][0].one_minus_p
    row, col = (
        torch.stack([torch.stack([sums[side][i][0], terms[side][i].inv_denom, one_minus_p]) for i in range(2)])
        for side in range(2)
    )
    uses_shared_shift = torch.stack([part.uses_shared_shift for part in (*within, across)]).amin()
    return (terms[0][0].nll.mean() + terms[1][0].nll.mean()) / 2, row, col, uses_shared_shift


@_nt_xent_fwd.register_fake
def _(first: Tensor, second: Tensor, logit_scale: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, col = (logit_scale.new_empty(2, 3, x.shape[0]) for x in (first, second))
    return logit_scale.new_empty(()), row, col, logit_scale.new_empty((), dtype=torch.int8)


@planned_op("nt_xent_bwd")
def _nt_xent_bwd(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor,
    row: Tensor, col: Tensor, uses_shared_shift: Tensor, normalize: bool, dtype: torch.dtype,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes NT-Xent's gradients of both views and of the scale, for tensors with the layout
    of the arguments.
    """
    function: Any = functools.partial(_nt_xent_parts, normalize=normalize, dtype=dtype, grad_dtype=first.dtype)
    if is_small_block(first, second, dtype):
        function = features_pass(function, (first, second, *[None] * 5), dtype, normalize=normalize)

    def compute(
        grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor,
        row: Tensor, col: Tensor, uses_shared_shift: Tensor, *_: object,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Compute the gradients of NT-Xent."""
        coefficient = grad_loss.to(row.dtype) / max(2 * len(first), 1)
        first_grad, second_grad, *parts = function(
            first, second, logit_scale, row, col, uses_shared_shift, coefficient * logit_scale
        )
        # Each logit is a product of two features, and the gradients of both count it. Therefore the sum is halved.
        return first_grad, second_grad, scale_gradient(parts, coefficient / 2)

    return compute


def _nt_xent_parts(
    first: Tensor, second: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, uses_shared_shift: Tensor,
    factor: Tensor, *, normalize: bool, dtype: torch.dtype, grad_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the NT-Xent gradients of both views, and the terms of that of the scale."""
    blocks = logit_blocks(first.device)
    x, y = prepare_both(first, second, dtype, normalize=normalize)
    first_grad = new_gradient(first, grad_dtype)
    acc_second = new_accumulator(y.rows)
    (row, row_within), (col, col_within) = row, col
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the NT-Xent gradient of a strip of one view, against both views."""
        own, start = x.rows[strip], strip.start
        block = own, y.rows, logit_scale, Normalizers(row[:, strip], col, uses_shared_shift), start
        across = blocks.add_gradients(*block, acc, acc_second, is_new_x=True, is_new_y=start == 0)
        # The G of first views with first views is symmetric, so its rows hold the whole gradient. Row sums and column
        # sums differ by rounding only. But a probability near 1 must be computed from the very sum that contains its
        # logit, so the columns take the column sums.
        normalizers = Normalizers(row[:, strip], row_within, uses_shared_shift)
        within = blocks.add_gradients(own, x.rows, logit_scale, normalizers, start, acc, None)
        # ``across`` counts twice, since its logits contribute to the gradients of first and of second views.
        return [across, across, within]

    parts = gradients_in_strips(blocks, x, y.rows, 0, one_minus_p, factor, first_grad, add)
    normalizers = Normalizers(col, col_within, uses_shared_shift)
    parts.append(blocks.add_gradients(y.rows, y.rows, logit_scale, normalizers, 0, acc_second, None))
    second_grad = new_gradient(second, grad_dtype)  # allocated here, so that it can reuse the memory of G
    parts.append(blocks.finish(acc_second, y, x.rows, 0, one_minus_p, factor, second_grad))
    return first_grad, second_grad, *(part for part in parts if part is not None)


register_gradients(_nt_xent_fwd, _nt_xent_bwd)


def nt_xent_loss(
    first: Tensor, second: Tensor, logit_scale: Tensor | float, *, normalize: bool = True, backend: str = "auto"
) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, equation 1): each view's other view against all views but itself.

    Args:
        first: features [N, D] of one view of each image, float32, float16 or bfloat16 (float64 on the CPU); any
            strides. Under autocast both are taken in the autocast dtype, as a matrix product would.
        second: features [N, D] of the other view, in the same order; same dtype and device as ``first``.
        logit_scale: the factor on the cosine similarities, one over the temperature: a one-element tensor, into which
            gradients flow, or a number.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over 2N views, a float32 scalar (float64 for float64 input); NaN without views, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "nt_xent_loss"
    options = op, normalize, normalize.__class__, backend
    tensors: Any = (first, second, logit_scale)
    compute = _nt_xent_fwd.find(options, tensors)
    if compute is not None:
        found: Tensor = compute(*tensors, normalize, autocast_dtype(first))[0]
        return found
    check_pairs(op, ("first", "second"), first, second)
    check_bool(op, "normalize", normalize)
    scale = scale_tensor(op, logit_scale, first, like_name="first")
    if uses_reference(op, backend, first):
        return reference.nt_xent_loss(first, second, scale, normalize=normalize)
    dtype = operand_dtype(op, "first", first)
    scale = scale.to(accumulate_dtype(dtype))
    if suits_whole(first, second, dtype, 2):  # each side of the logits has both views
        (views,) = whole_operands(torch.cat((first, second)), normalize=normalize, dtype=dtype)
        whole = whole_nt_xent_loss(views, scale)
        if whole is not None:
            return whole
    args = first, second, scale, normalize, dtype
    loss: Tensor = call_planned(_nt_xent_fwd, options, args[:3], args)[0]
    return loss
