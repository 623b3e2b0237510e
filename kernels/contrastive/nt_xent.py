"""NT-Xent, SimCLR's contrastive loss of two views of each image.

With views x, y [N, D] and scale s, each of the 2N views is classified among all views but itself:

    Z of x_i = sum_{j != i} [exp(s x_i . x_j) + exp(s x_i . y_j)], and of y_i likewise
    L = 1/2N sum over all views of log(1 + Z / exp(s x_i . y_i))

The product x y^T serves both views, and x x^T and y y^T are symmetric. That makes three products in place of four:
6 N^2 D FLOPs forward and 14 N^2 D backward. As in ``contrastive``, a pair is in no sum and passes through no 16-bit
tile, and the logits never exist.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..dtypes import accumulate_dtype
from .gradients import gradients_in_strips, new_gradient, scale_gradient
from .logit_blocks import logit_blocks
from .loss_arguments import check_pairs, operand_dtype, scale_tensor
from .registration import register_gradients
from .softmax_stats import Normalizers, merge, pair_terms


@registered("nt_xent_fwd")
def _nt_xent_fwd(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and what the backward pass needs: row [2, 3, N], col [2, 3, N] and uses_shared_shift [].

    row is of the first views, col of the second. Each holds maximum, inv_denom and one_minus_p (summed over both views
    of the pair) twice: [0] for a view as a row among the views of its own side, [1] for it as a column there. The two
    are the same numbers, but for rounding.
    """
    blocks = logit_blocks(first.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize).rows for side in (first, second))
    # The pairs of a side with itself are its views with themselves: they are left out, all others are negatives.
    within = [blocks.statistics(side, side, logit_scale, 0) for side in (x, y)]
    across = blocks.statistics(x, y, logit_scale, 0)
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


@registered("nt_xent_bwd")
def _nt_xent_bwd(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor,
    row: Tensor, col: Tensor, uses_shared_shift: Tensor, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of both views and of the scale."""
    blocks = logit_blocks(first.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize) for side in (first, second))
    coefficient = grad_loss.to(row.dtype) / max(2 * len(first), 1)
    factor = coefficient * logit_scale
    first_grad = new_gradient(first)
    acc_second = blocks.new_accumulator(len(second), y.rows)
    (row, row_within), (col, col_within) = row, col
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        own, start = x.rows[strip], strip.start
        normalizers = Normalizers(row[:, strip], col, uses_shared_shift)
        across = blocks.add_gradients(own, y.rows, logit_scale, normalizers, start, acc, acc_second)
        # G of a side with itself is symmetric, so its rows hold the whole gradient. Row and column sums differ by
        # rounding only, but for a probability near 1 the sum must be the one that the logit was added to.
        normalizers = Normalizers(row[:, strip], row_within, uses_shared_shift)
        within = blocks.add_gradients(own, x.rows, logit_scale, normalizers, start, acc, None)
        # both views of a pair meet in ``across``
        return [across, across, within]

    parts = gradients_in_strips(blocks, x, y.rows, 0, one_minus_p, factor, first_grad, add)
    normalizers = Normalizers(col, col_within, uses_shared_shift)
    parts.append(blocks.add_gradients(y.rows, y.rows, logit_scale, normalizers, 0, acc_second, None))
    second_grad = new_gradient(second)  # in the memory that G had
    parts.append(blocks.finish(acc_second, y, x.rows, 0, one_minus_p, factor, second_grad))
    # Each logit is a product of two features, and the features' gradients count it for both.
    return first_grad, second_grad, scale_gradient(parts, coefficient / 2)


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
    check_pairs(op, ("first", "second"), first, second)
    scale = scale_tensor(op, logit_scale, first, like_name="first")
    if uses_reference(op, backend, first):
        return reference.nt_xent_loss(first, second, scale, normalize=normalize)
    dtype = operand_dtype(op, "first", first)
    return _nt_xent_fwd(first, second, scale.to(accumulate_dtype(dtype)), normalize, dtype)[0]
