"""Losses whose rows meet several blocks of columns: values and gradients, without autograd.

The statistics of each block are merged before the loss is taken from them, and each block's G then takes the merged
ones, so no block needs to know of the others.
"""

import torch
from torch import Tensor

from ..common import LOG2E
from .blocks import blocks_on
from .stats import Stats, Weights, merge, no_stats, terms
from .symmetric import _part, pair_products, scale_gradient


def info_nce_forward(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss; of the queries [3, N], maximum, weight and miss; whether maxima are one shift."""
    blocks = blocks_on(query.device)
    x, y, queue = (blocks.prepare(side, dtype, normalize=normalize)[0] for side in (query, key, negatives))
    parts = [blocks.stats(x, queue, logit_scale, len(queue)) if len(queue) else no_stats(x, queue)]
    if in_batch:
        parts.append(blocks.stats(x, y, logit_scale, 0))
        positive = parts[-1].positive
    else:
        positive = pair_products(x, y) * (logit_scale * LOG2E)
    maximum, total, shared = _merged([(part.row_max, part.row_sum, part.shared) for part in parts])
    rows = terms(maximum, total, positive)
    return rows.nll.mean(), torch.stack([maximum, rows.weight, rows.miss]), shared


def info_nce_backward(
    grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, row: Tensor, shared: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype, needs_key: bool, needs_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, negatives (both empty where they are not needed) and scale."""
    blocks = blocks_on(query.device)
    sides = query, key, negatives
    (x, x_inv_norm), (y, y_inv_norm), (queue, queue_inv_norm) = (
        blocks.prepare(side, dtype, normalize=normalize) for side in sides
    )
    coefficient = grad_loss.to(row.dtype) / max(len(x), 1)
    factor = coefficient * logit_scale
    query_grad, key_grad, negatives_grad = (
        torch.empty_like(side if needed else side[:0], memory_format=torch.contiguous_format)
        for side, needed in zip(sides, (True, needs_key, needs_negatives), strict=True)
    )
    acc_y = blocks.new_accumulator(len(y), y) if needs_key else None
    acc_queue = blocks.new_accumulator(len(queue), queue) if needs_negatives else None
    of_keys, of_queue = _no_weights(row, len(y)), _no_weights(row, len(queue))
    dot = row.new_empty(len(x))
    products = []
    for strip in blocks.strips(x):
        acc = blocks.new_accumulator(strip.stop - strip.start, x)
        of_rows, start = row[:, strip], strip.start
        if in_batch:
            weights = Weights(of_rows, of_keys, shared)
            products.append(blocks.add_gradients(x[strip], y, logit_scale, weights, start, acc, acc_y))
        weights = Weights(of_rows, of_queue, shared)
        products.append(blocks.add_gradients(x[strip], queue, logit_scale, weights, len(queue), acc, acc_queue))
        finish = (row[2, strip], factor, _part(x_inv_norm, strip), query_grad[strip])
        dot[strip] = blocks.finish(acc, x[strip], y, start, *finish)
    if acc_y is not None:
        blocks.finish(acc_y, y, x, 0, row[2], factor, y_inv_norm, key_grad)
    if acc_queue is not None:
        miss = row.new_zeros(len(queue))
        blocks.finish(acc_queue, queue, x, len(x), miss, factor, queue_inv_norm, negatives_grad)
    of_scale = scale_gradient(dot, products, row[2], x, y)
    return query_grad, key_grad, negatives_grad, of_scale * coefficient


def nt_xent_forward(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; of the first views [2, 3, N] and of the second, as rows and as columns among their own, maximum, weight and
    miss; whether maxima are one shift.
    """
    blocks = blocks_on(first.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize)[0] for side in (first, second))
    # without their diagonals, the views of one side are each other's negatives
    within: list[Stats] = [blocks.stats(side, side, logit_scale, 0) for side in (x, y)]
    across: Stats = blocks.stats(x, y, logit_scale, 0)
    sums = [
        [merge([part, other]) for part in (own[:2], own[2:4])]
        for own, other in zip(within, (across[:2], across[2:4]), strict=True)
    ]
    found = [[terms(*side, across.positive) for side in sides] for sides in sums]
    miss = found[0][0].miss + found[1][0].miss
    row, col = (
        torch.stack([torch.stack([sums[side][i][0], found[side][i].weight, miss]) for i in range(2)])
        for side in range(2)
    )
    shared = torch.stack([part.shared for part in (*within, across)]).amin()
    return (found[0][0].nll.mean() + found[1][0].nll.mean()) / 2, row, col, shared


def nt_xent_backward(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both views and of the scale."""
    blocks = blocks_on(first.device)
    (x, x_inv_norm), (y, y_inv_norm) = (blocks.prepare(side, dtype, normalize=normalize) for side in (first, second))
    coefficient = grad_loss.to(row.dtype) / max(2 * len(x), 1)
    factor = coefficient * logit_scale
    first_grad, second_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (first, second))
    acc_y = blocks.new_accumulator(len(y), y)
    dot = row.new_zeros(())
    products = []
    (row, row_within), (col, col_within) = row, col
    for strip in blocks.strips(x):
        acc, start = blocks.new_accumulator(strip.stop - strip.start, x), strip.start
        weights = Weights(row[:, strip], col, shared)
        across = blocks.add_gradients(x[strip], y, logit_scale, weights, start, acc, acc_y)
        # G of a side with itself is symmetric: its rows alone hold the whole gradient. Only rounding tells its column
        # sums from its row sums, but a probability near 1 must be taken of the sum that it is in.
        weights = Weights(row[:, strip], row_within, shared)
        within = blocks.add_gradients(x[strip], x, logit_scale, weights, start, acc, None)
        products += [across, across, within]
        finish = (row[2, strip], factor, _part(x_inv_norm, strip), first_grad[strip])
        dot += blocks.finish(acc, x[strip], y, start, *finish).sum()
    products.append(blocks.add_gradients(y, y, logit_scale, Weights(col, col_within, shared), 0, acc_y, None))
    dot += blocks.finish(acc_y, y, x, 0, col[2], factor, y_inv_norm, second_grad).sum()
    # each logit is a product of two features, so the features' gradients count it twice
    of_scale = scale_gradient(dot, products, 2 * row[2], x, y) / 2
    return first_grad, second_grad, of_scale * coefficient


def _merged(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total = merge([part[:2] for part in parts])
    return maximum, total, torch.stack([part[2] for part in parts]).amin()


def _no_weights(row: Tensor, columns: int) -> Tensor:
    """What columns say in a loss of the rows only: nothing, to logits of any size."""
    col = row.new_zeros(3, columns)
    col[0] = float("inf")
    return col
