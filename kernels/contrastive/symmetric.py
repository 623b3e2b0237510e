"""Forward and backward pass of the loss of pairs, on blocks: values and gradients, without autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from .blocks import blocks_on
from .stats import Weights, pairs_in, terms

PAIR_ROWS = 4096


def forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, offset: int, both: bool, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; of the rows [3, M] and of the columns [3, N], maximum, weight and miss; whether maxima are one shift."""
    blocks = blocks_on(image.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize)[0] for side in (image, text))
    stats = blocks.stats(x, y, logit_scale, offset)
    paired, partners = pairs_in(len(x), len(y), offset)
    rows = terms(stats.row_max[paired], stats.row_sum[paired], stats.positive[paired])
    cols = terms(stats.col_max[partners], stats.col_sum[partners], stats.positive[paired])
    loss = (rows.nll.mean() + cols.nll.mean()) / 2 if both else rows.nll.mean()
    miss = rows.miss + cols.miss if both else rows.miss
    row, col = stats.row_max.new_zeros(3, len(x)), stats.row_max.new_zeros(3, len(y))
    row[0], row[1, paired], row[2, paired] = stats.row_max, rows.weight, miss
    col[0], col[1, partners], col[2, partners] = stats.col_max, cols.weight if both else 0, miss
    return loss, row, col, stats.shared


def backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of images, texts and scale."""
    blocks = blocks_on(image.device)
    x, x_inv_norm = blocks.prepare(image, dtype, normalize=normalize)
    y, y_inv_norm = blocks.prepare(text, dtype, normalize=normalize)
    paired, partners = pairs_in(len(x), len(y), offset)
    coefficient = grad_loss.to(row.dtype) / max((2 if both else 1) * (paired.stop - paired.start), 1)
    factor = coefficient * logit_scale
    image_grad, text_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (image, text))
    acc_text = None if save_memory else blocks.new_accumulator(len(y), y)
    dot = row.new_empty(len(x))
    products = []
    for strip in blocks.strips(x):
        acc = blocks.new_accumulator(strip.stop - strip.start, x)
        diagonal = offset + strip.start
        weights = Weights(row[:, strip], col, shared)
        products.append(blocks.add_gradients(x[strip], y, logit_scale, weights, diagonal, acc, acc_text))
        finish = (row[2, strip], factor, _part(x_inv_norm, strip), image_grad[strip])
        dot[strip] = blocks.finish(acc, x[strip], y, diagonal, *finish)
    for strip in blocks.strips(y) if acc_text is None else [slice(0, len(y))]:
        acc = acc_text
        if acc is None:
            acc = blocks.new_accumulator(strip.stop - strip.start, y)
            weights = Weights(row, col[:, strip], shared)
            blocks.add_gradients(x, y[strip], logit_scale, weights, offset - strip.start, None, acc)
        finish = (col[2, strip], factor, _part(y_inv_norm, strip), text_grad[strip])
        blocks.finish(acc, y[strip], x, strip.start - offset, *finish)
    of_scale = scale_gradient(dot, products, row[2, paired], x[paired], y[partners])
    return image_grad, text_grad, of_scale * coefficient


def scale_gradient(dot: Tensor, products: Sequence[Tensor | None], miss: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum of G_ij x_i . y_j over all that are no pairs, less the sum of miss_i x_i . y_i over the pairs.

    Args:
        dot: finished rows' share of it, any shape: what rounding has done to G is in there.
        products: what ``add_gradients`` has returned for each block.
        miss: [P], of the pairs.
        x: [P, D], first features of the pairs; ``y``: [P, D], second ones.

    Returns:
        [], in the dtype of ``dot``: from G before it was rounded, or from ``dot`` if it is not rounded.
    """
    before = [part for part in products if part is not None]
    if len(before) < len(products):
        return dot.sum()
    of_pairs = (miss * pair_products(x, y)).sum(dtype=torch.float64)
    return sum(before, -of_pairs).to(dot.dtype)


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i [N], in float32 at least; few rows are widened at once."""
    wide = accumulate_dtype(x.dtype)
    rows = zip(x.split(PAIR_ROWS), y.split(PAIR_ROWS), strict=True)
    return torch.cat([torch.linalg.vecdot(a.to(wide), b.to(wide)) for a, b in rows])


def _part(vector: Tensor | None, strip: slice) -> Tensor | None:
    return None if vector is None else vector[strip]
