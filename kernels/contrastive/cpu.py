"""The blocks of the contrastive losses on a CPU: the kernels' algorithm in PyTorch, products through its BLAS.

A chunk of rows is one product, large enough for BLAS to run at its best; what follows goes through the chunk in pieces
that stay in a core's cache. Operands are float32, or float64 for float64 features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common import LOG2E, slices
from ..dtypes import accumulate_dtype
from .stats import Stats, Weights, is_exact, no_stats, pairs_in, shared_shift

CHUNK_ROWS = 1024  # more would not make the products faster
CHUNK_ELEMENTS = 2**24  # of the logits: 64 MiB of float32
EPS = 1e-12  # of torch.nn.functional.normalize
PIECE_ELEMENTS = 2**17  # 512 KiB: half of a core's second-level cache


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """``x`` as the products take it, rounded to ``dtype``, and with ``normalize`` one over the norm of each row."""
    wide = x.to(accumulate_dtype(x.dtype))
    if not normalize:
        return wide.to(dtype).to(accumulate_dtype(dtype)).contiguous(), None
    inv_norm = torch.linalg.vector_norm(wide, dim=-1).clamp_min_(EPS).reciprocal_()
    return (wide * inv_norm[:, None]).to(dtype).to(accumulate_dtype(dtype)), inv_norm


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Zeros [rows, D] that gradients are added to."""
    return like.new_zeros(rows, like.shape[1])


def strips(x: Tensor) -> list[slice]:
    """Rows to accumulate before they are finished: all at once, since accumulators become the gradients."""
    return [slice(0, len(x))]


def stats(x: Tensor, y: Tensor, logit_scale: Tensor, diagonal: int) -> Stats:
    """One product and one exponential per logit serve rows and columns, if the shared shift suits the logits."""
    result = no_stats(x, y)
    shift = shared_shift(logit_scale)
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        paired, _ = pairs_in(len(logits), len(y), rows.start + diagonal)
        pairs = logits.diagonal(rows.start + diagonal)
        result.positive[rows][paired] = pairs
        pairs.fill_(float("-inf"))
        for piece in _pieces(logits):
            result.row_sum[rows][piece] = logits[piece].sub_(shift).exp2_().sum(1)
        result.col_sum.add_(logits.sum(0))
    result.row_max.copy_(shift)
    result.col_max.copy_(shift)
    result.shared.copy_(is_exact(result.row_sum, result.col_sum))
    return result if result.shared else _online_stats(x, y, logit_scale, diagonal, result)


def _online_stats(x: Tensor, y: Tensor, logit_scale: Tensor, diagonal: int, result: Stats) -> Stats:
    """The same for any logits: a maximum for each row and column, two exponentials per logit."""
    result.col_max.fill_(float("-inf"))
    result.col_sum.zero_()
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        logits.diagonal(rows.start + diagonal).fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece]
            row_max = tile.amax(1)
            result.row_max[rows][piece] = row_max
            result.row_sum[rows][piece] = (tile - _finite(row_max)[:, None]).exp2_().sum(1)
            col_max = torch.maximum(result.col_max, tile.amax(0))
            pivot = _finite(col_max)
            result.col_sum.mul_((result.col_max - pivot).exp2_()).add_(tile.sub_(pivot).exp2_().sum(0))
            result.col_max.copy_(col_max)
    return result


def add_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    weights: Weights,
    diagonal: int,
    acc_x: Tensor | None,
    acc_y: Tensor | None,
) -> None:
    """acc_x += G y and acc_y += G^T x, with G recomputed once for both. G is not rounded, so it says nothing that the
    accumulators do not.
    """
    shift = shared_shift(logit_scale)
    (row_max, row_weights, _), (col_max, col_weight, _) = weights.row, weights.col
    row_max, col_max = _finite(row_max), _finite(col_max)
    scratch = x.new_empty(max(PIECE_ELEMENTS, len(y)))
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        for piece in _pieces(logits):
            tile, row_weight = logits[piece], row_weights[rows][piece, None]
            other = scratch[: tile.numel()].view_as(tile)
            if weights.shared:
                tile.sub_(shift).exp2_().mul_(torch.add(row_weight, col_weight, out=other))
            else:
                torch.sub(tile, row_max[rows][piece, None], out=other).exp2_().mul_(row_weight)
                torch.addcmul(other, tile.sub_(col_max).exp2_(), col_weight, out=tile)
        logits.diagonal(rows.start + diagonal).zero_()
        if acc_x is not None:
            acc_x[rows].addmm_(logits, y)
        if acc_y is not None:
            acc_y.addmm_(logits.T, x[rows])


def finish(
    acc: Tensor, own: Tensor, other: Tensor, diagonal: int, miss: Tensor, factor: Tensor, inv_norm: Tensor | None,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """out = factor * (acc - miss * positive), through the normalisation if there was one.

    Args:
        acc: [R, D], G times the other side's features; used up.
        own: [R, D], the features whose gradient it is.
        other: [C, D], features of the other side; the positive of row i is row i + diagonal, if there is one.
        diagonal: see ``other``.
        miss: [R], 1 - probability of the positive, summed over directions; zero without one.
        factor: [], gradient of the loss times scale.
        inv_norm: [R], one over the norm of the features before they were normalised.
        out: [R, D], in any dtype.

    Returns:
        [R], the product of each row's gradient and features, before the factor.
    """
    paired, partners = pairs_in(len(acc), len(other), diagonal)
    acc[paired].addcmul_(miss[paired, None], other[partners], value=-1)
    dot = torch.linalg.vecdot(acc, own)
    if inv_norm is not None:
        # at the least norm, the norm is a constant
        along = dot.where(inv_norm < 0.999 / EPS, 0)
        acc.addcmul_(along[:, None], own, value=-1).mul_(inv_norm[:, None])
    out.copy_(acc.mul_(factor))
    return dot


def _chunks(x: Tensor, y: Tensor, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with ``factor`` times their products, in one buffer that is used again."""
    m, n = len(x), len(y)
    if m == 0 or n == 0:
        return
    size = chunk_rows(m, n)
    buffer = x.new_empty(size, n)
    factor = factor.to(x.dtype)
    for rows in slices(m, size):
        yield rows, torch.mm(x[rows] * factor, y.T, out=buffer[: rows.stop - rows.start])


def chunk_rows(m: int, n: int) -> int:
    """Rows of [m, n] logits that are worked on at once."""
    return min(m, CHUNK_ROWS, max(16, CHUNK_ELEMENTS // n))


def _pieces(chunk: Tensor) -> list[slice]:
    return slices(len(chunk), max(1, PIECE_ELEMENTS // chunk.shape[1]))


def _finite(maximum: Tensor) -> Tensor:
    # where nothing is left of a row, its maximum minus itself would be NaN
    return maximum.where(maximum > float("-inf"), 0)
