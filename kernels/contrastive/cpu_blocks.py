"""The work on blocks of logits on a CPU: the kernels' algorithm in PyTorch. ``logit_blocks`` describes the functions.

A chunk of rows times all columns is one product, large enough for BLAS to run at its best. What follows goes through
the chunk in pieces that stay in a core's cache. Operands are float32, or float64 for float64 features.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import LOG2E, slices
from ..dtypes import accumulate_dtype
from . import softmax_stats
from .features import Features, pairs_in
from .softmax_stats import Normalizers, SoftmaxStats, finite, is_exact, new_stats, shared_shift

CHUNK_ROWS = 1024  # more rows would not make the products faster
CHUNK_ELEMENTS = 2**24  # of the logits of a chunk: 64 MiB of float32
EPS = 1e-12  # the least norm that torch.nn.functional.normalize divides by
PIECE_ELEMENTS = 2**17  # 512 KiB of float32: half of a core's second-level cache


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
    """Return rows that have been rounded to ``dtype``, as float32 or float64."""
    wide = x.to(accumulate_dtype(x.dtype))
    if not normalize:
        return Features(wide.to(dtype).to(accumulate_dtype(dtype)).contiguous(), None)
    inv_norm = torch.linalg.vector_norm(wide, dim=-1).clamp_min_(EPS).reciprocal_()
    return Features((wide * inv_norm[:, None]).to(dtype).to(accumulate_dtype(dtype)), inv_norm)


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Return zeros [rows, D] in the dtype of the operands."""
    return like.new_zeros(rows, like.shape[1])


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Return all rows as one strip; the accumulators are then as large as the gradients in float32."""
    return [slice(0, len(x))]


def statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Take one product and one exponential per logit, for rows and columns at once, if the shared shift is exact."""
    result = new_stats(x, y)
    shift = shared_shift(logit_scale)
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        paired, _ = pairs_in(len(logits), len(y), rows.start + offset)
        pairs = logits.diagonal(rows.start + offset)
        result.positive[rows][paired] = pairs
        pairs.fill_(float("-inf"))
        for piece in _pieces(logits):
            result.row_sum[rows][piece] = logits[piece].sub_(shift).exp2_().sum(1)
        result.col_sum.add_(logits.sum(0))
    result.row_max.copy_(shift)
    result.col_max.copy_(shift)
    result.uses_shared_shift.copy_(is_exact(result.row_sum, result.col_sum))
    if not result.uses_shared_shift:
        _online_statistics(x, y, logit_scale, offset, result)
    return result


def _online_statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int, result: SoftmaxStats) -> None:
    """Write the statistics of any logits: with a maximum for each row and column, and two exponentials per logit."""
    result.col_max.fill_(float("-inf"))
    result.col_sum.zero_()
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        logits.diagonal(rows.start + offset).fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece]
            row_max = tile.amax(1)
            result.row_max[rows][piece] = row_max
            result.row_sum[rows][piece] = (tile - finite(row_max)[:, None]).exp2_().sum(1)
            col_max = torch.maximum(result.col_max, tile.amax(0))
            pivot = finite(col_max)
            result.col_sum.mul_((result.col_max - pivot).exp2_()).add_(tile.sub_(pivot).exp2_().sum(0))
            result.col_max.copy_(col_max)


pair_losses = softmax_stats.pair_losses


def add_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    acc_x: Tensor | None, acc_y: Tensor | None,
) -> None:  # fmt: skip
    """Add G y to acc_x and G^T x to acc_y. G is not rounded, so there is no sum to return."""
    shift = shared_shift(logit_scale)
    row_max, row_inv_denoms = finite(normalizers.row[0]), normalizers.row[1]
    col_max, col_inv_denom = finite(normalizers.col[0]), normalizers.col[1]
    scratch = x.new_empty(max(PIECE_ELEMENTS, len(y)))
    for rows, logits in _chunks(x, y, logit_scale * LOG2E):
        for piece in _pieces(logits):
            tile, row_inv_denom = logits[piece], row_inv_denoms[rows][piece, None]
            other = scratch[: tile.numel()].view_as(tile)
            if normalizers.uses_shared_shift:
                tile.sub_(shift).exp2_().mul_(torch.add(row_inv_denom, col_inv_denom, out=other))
            else:
                torch.sub(tile, row_max[rows][piece, None], out=other).exp2_().mul_(row_inv_denom)
                torch.addcmul(other, tile.sub_(col_max).exp2_(), col_inv_denom, out=tile)
        logits.diagonal(rows.start + offset).zero_()
        if acc_x is not None:
            acc_x[rows].addmm_(logits, y)
        if acc_y is not None:
            acc_y.addmm_(logits.T, x[rows])


def sigmoid_sums(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum of losses, sum of probabilities, and logits of the pairs."""
    positive = x.new_empty(len(x))
    loss, probability = x.new_zeros(2, dtype=torch.float64).unbind()
    for rows, logits in _chunks(x, y, logit_scale):
        paired, _ = pairs_in(len(logits), len(y), rows.start + offset)
        pairs = logits.diagonal(rows.start + offset)
        positive[rows][paired] = pairs + logit_bias
        pairs.fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece].add_(logit_bias)
            loss += F.softplus(tile).sum()
            probability += tile.sigmoid_().sum()
    return loss, probability, positive


def add_sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor
) -> None:
    """Add G y to acc_x and G^T x to acc_y. G is not rounded, so there is no sum to return."""
    for rows, logits in _chunks(x, y, logit_scale):
        for piece in _pieces(logits):
            logits[piece].add_(logit_bias).sigmoid_()
        logits.diagonal(rows.start + offset).zero_()
        acc_x[rows].addmm_(logits, y)
        acc_y.addmm_(logits.T, x[rows])


def finish(
    acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
) -> Tensor:
    """Write factor * (acc - one_minus_p * positive) to out, through the normalisation; return its product with own."""
    paired, partners = pairs_in(len(acc), len(other), offset)
    acc[paired].addcmul_(one_minus_p[paired, None], other[partners], value=-1)
    dot = torch.linalg.vecdot(acc, own.rows)
    if own.inv_norm is not None:
        # where the norm was raised to EPS, it is a constant: nothing flows through it
        along = dot.where(own.inv_norm < 0.999 / EPS, 0)
        acc.addcmul_(along[:, None], own.rows, value=-1).mul_(own.inv_norm[:, None])
    out.copy_(acc.mul_(factor))
    return dot


def _chunks(x: Tensor, y: Tensor, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and ``factor`` times their products with y; each reuses the memory of the one before."""
    m, n = len(x), len(y)
    if m == 0 or n == 0:
        return
    size = min(m, CHUNK_ROWS, max(16, CHUNK_ELEMENTS // n))
    buffer = x.new_empty(size, n)
    factor = factor.to(x.dtype)
    for rows in slices(m, size):
        yield rows, torch.mm(x[rows] * factor, y.T, out=buffer[: rows.stop - rows.start])


def _pieces(chunk: Tensor) -> list[slice]:
    """Return slices of the rows of a chunk, each of which fits the cache."""
    return slices(len(chunk), max(1, PIECE_ELEMENTS // chunk.shape[1]))
